"""Draw the scenes of the sample: colored things on textured ground.

A `Scene` also holds a map of what each pixel shows. Lengths of a `Thing` are fractions of the image's side, so a scene
looks the same at every size. All randomness comes from one `numpy.random.Generator`.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

SHAPES = ("ball", "square", "triangle", "star", "ring")
STUFF = ("sky", "grass", "water", "sand", "rock")
COLORS = {
    "red": (212, 34, 34),
    "orange": (246, 132, 18),
    "yellow": (252, 226, 40),
    "blue": (42, 62, 226),
    "purple": (146, 46, 186),
    "white": (246, 246, 246),
}
# Radii as fractions of the side. The gap between them makes "small" and "large" unambiguous.
RADII = {"small": (0.065, 0.082), "large": (0.125, 0.155)}
SALIENT_RADIUS = (0.165, 0.195)
MIN_VISIBLE = 0.45  # smallest visible fraction of a thing's area
FINE = 4  # outlines are drawn at this multiple of the image's resolution, then averaged


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene. x, y (center) and radius: fractions of the image's side. angle: in radians."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A drawn scene of s x s pixels.

    things: from front to back; the first is the salient one. image: RGB. alpha: matte of the salient thing.
    owner: what each pixel shows, as an index into `things`, or len(things) + an index into STUFF.
    """

    things: tuple[Thing, ...]
    image: UInt8[np.ndarray, "s s 3"]
    alpha: UInt8[np.ndarray, "s s"]
    owner: Int[np.ndarray, "s s"]


def draw(rng: np.random.Generator, size: int) -> Scene:
    """Draw a scene of `size` x `size` pixels, with 2 to 6 things and 1 to 4 kinds of ground (rarely 1)."""
    things, covers, owner = _place_things(rng, size)
    ground = _ground_map(rng, size, owner < 0)
    owner = np.where(owner < 0, len(things) + ground, owner)
    image = _paint_ground(rng, ground)
    for thing, cover in reversed(list(zip(things, covers))):
        image = _paint_thing(rng, image, thing, cover)
    contrast, light = rng.uniform(0.88, 1.08), rng.uniform(-12, 10)
    image = (image - 128) * contrast + 128 + light + 2.0 * rng.standard_normal(image.shape, np.float32)
    return Scene(
        things, np.clip(np.rint(image), 0, 255).astype(np.uint8), np.rint(covers[0] * 255).astype(np.uint8), owner
    )


# ---- Things -------------------------------------------------------------------------------------------------------


def _place_things(rng: np.random.Generator, size: int) -> tuple[tuple[Thing, ...], list[np.ndarray], np.ndarray]:
    """Return the things from front to back, a coverage map of each thing, and the owner of each pixel.

    Coverage is 0 to 1 for each pixel, as if no other thing hid this one. The owner of a pixel is an index into the
    things, or -1. A new thing lies behind all others, so it hides none of them. It is kept if enough of it is visible.
    """
    wanted = int(rng.integers(2, 7))
    owner = np.full((size, size), -1)
    things: list[Thing] = []
    covers: list[np.ndarray] = []
    for _ in range(40):
        thing = _propose(rng, things)
        cover = _cover(thing, size)
        if not things:
            cover = _feather(rng, thing, cover)
        solid = cover > 0.5
        free = solid & (owner < 0)
        if free.sum() >= max(20 * (size / 96) ** 2, MIN_VISIBLE * solid.sum()):
            owner[free] = len(things)
            things.append(thing)
            covers.append(cover)
        if len(things) == wanted:
            break
    return tuple(things), covers, owner


def _propose(rng: np.random.Generator, others: list[Thing]) -> Thing:
    """Return a random thing. It often has the shape or color of another thing, and often lies partly behind one.

    others: the things in front of it. The first thing of a scene is large.
    """
    shape, color, size = _pick(rng, SHAPES), _pick(rng, tuple(COLORS)), _pick(rng, tuple(RADII))
    if others:
        model, fate = _pick(rng, others), rng.random()
        if fate < 0.55:
            shape = model.shape
        if 0.45 < fate < 0.8:
            color = model.color
    else:
        size = "large"
    radius = rng.uniform(*(RADII[size] if others else SALIENT_RADIUS))
    x, y = rng.uniform(radius, 1 - radius, 2)
    if others and rng.random() < 0.35:
        model, turn = _pick(rng, others), rng.uniform(0, 2 * np.pi)
        reach = (model.radius + radius) * rng.uniform(0.65, 0.95)
        x, y = np.clip([model.x + reach * np.cos(turn), model.y + reach * np.sin(turn)], radius, 1 - radius)
    return Thing(shape, color, size, float(x), float(y), float(radius), float(rng.uniform(0, 2 * np.pi)))


def _outline(thing: Thing) -> Float[np.ndarray, "n 2"]:
    """Return the corners x, y of a thing's outer outline, as fractions of the image's side.

    The radius is scaled for each shape, so that all shapes look equally large.
    """
    count, scale = {
        "ball": (40, 1.0),
        "ring": (40, 1.08),
        "square": (4, 1.22),
        "triangle": (3, 1.35),
        "star": (10, 1.3),
    }[thing.shape]
    turn = thing.angle + np.arange(count) * (2 * np.pi / count)
    reach = np.full(count, thing.radius * scale)
    if thing.shape == "star":
        reach[1::2] *= 0.46
    return np.stack([thing.x + reach * np.cos(turn), thing.y + reach * np.sin(turn)], -1)


def _cover(thing: Thing, size: int) -> Float32[np.ndarray, "s s"]:
    fine = np.zeros((size * FINE, size * FINE), np.uint8)
    corners, center = _outline(thing), np.array([thing.x, thing.y])
    _fill(fine, corners, 255)
    if thing.shape == "ring":
        _fill(fine, center + 0.55 * (corners - center), 0)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _feather(rng: np.random.Generator, thing: Thing, cover: np.ndarray) -> Float32[np.ndarray, "s s"]:
    """Return the coverage map with a soft rim: blurred and frayed, with thin strands of hair around the thing."""
    size = len(cover)
    soft = cv2.GaussianBlur(cover, (0, 0), 0.014 * size)
    frayed = soft + 2.4 * soft * (1 - soft) * (_noise(rng, size, size // 2) - 0.5)
    hair = np.zeros((size * FINE, size * FINE), np.uint8)
    corners, center = _outline(thing), np.array([thing.x, thing.y])
    first = rng.integers(len(corners), size=70)
    root = corners[first - 1] + rng.random((70, 1)) * (corners[first] - corners[first - 1])
    tip = root + (root - center) * rng.uniform(0.12, 0.3, (70, 1)) + rng.uniform(-0.02, 0.02, (70, 2))
    ends = np.rint(np.stack([root, tip], 1) * size * FINE).astype(int).tolist()
    strengths, widths = rng.integers(130, 256, 70).tolist(), rng.integers(1, 3, 70).tolist()
    for (start, end), strength, width in zip(ends, strengths, widths):
        cv2.line(hair, start, end, strength, width)
    strands = cv2.resize(hair, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    # Round to gray levels, so that the image is blended with exactly the matte that is stored.
    return np.rint(255 * np.clip(np.maximum(frayed, strands), 0, 1)).astype(np.float32) / 255


def _paint_thing(rng: np.random.Generator, image: np.ndarray, thing: Thing, cover: np.ndarray) -> np.ndarray:
    size = len(cover)
    shift = max(1, round(0.02 * size))
    shadow = np.zeros_like(cover)
    shadow[shift:, shift:] = cover[:-shift, :-shift]
    image = image * (1 - 0.3 * cv2.GaussianBlur(shadow, (0, 0), 0.018 * size))[..., None]
    rows, cols = np.mgrid[:size, :size].astype(np.float32) / size
    lit = ((thing.x - cols) + (thing.y - rows)) / thing.radius  # the light comes from the upper left
    shade = rng.uniform(0.93, 1.04) + 0.07 * lit + 0.07 * (_noise(rng, size, size // 3) - 0.5)
    if thing.shape == "ball":
        spot = ((cols - thing.x) / thing.radius + 0.35) ** 2 + ((rows - thing.y) / thing.radius + 0.35) ** 2
        shade = shade + 0.05 - 0.09 * spot
    inside = cv2.GaussianBlur(cover, (0, 0), 0.01 * size)
    shade = shade * np.clip(0.5 + 0.5 * (inside - 0.5) / 0.38, 0.5, 1)  # a darker outline
    paint = (np.array(COLORS[thing.color]) + rng.uniform(-8, 8, 3)).astype(np.float32)
    return image + cover[..., None] * (np.clip(paint * shade[..., None], 0, 255) - image)


# ---- Ground -------------------------------------------------------------------------------------------------------


def _ground_map(rng: np.random.Generator, size: int, seen: Bool[np.ndarray, "s s"]) -> Int[np.ndarray, "s s"]:
    """Return an index into STUFF for every pixel.

    Each kind of ground has a site (a point), and a pixel belongs to the kind of the nearest site. Noise shifts the
    coordinates of the pixels, which makes the borders ragged. In some scenes, horizontal distances count less, so that
    the kinds form horizontal bands instead of blobs. seen: True for pixels that no thing covers. Kinds with too few of
    these pixels are left out.
    """
    kinds = rng.permutation(len(STUFF))[: int(rng.integers(2, 5))]
    bands = rng.random() < 0.6
    sites = rng.uniform(0.1, 0.9, (len(kinds), 2))
    if bands:
        sites[:, 1] = (np.arange(len(kinds)) + rng.uniform(0.2, 0.8, len(kinds))) / len(kinds)
    if rng.random() < 0.85:  # the sky is nearly always on top
        top, sky = sites[:, 1].argmin(), kinds == STUFF.index("sky")
        if sky.any():
            sites[[top, sky.argmax()]] = sites[[sky.argmax(), top]]
    rows, cols = np.mgrid[:size, :size].astype(np.float32) / size
    ragged = [0.28 * (_noise(rng, size, 5) - 0.5) + 0.12 * (_noise(rng, size, 16) - 0.5) for _ in range(2)]
    across = 0.15 if bands else 1.0
    away = (rows + ragged[0] - sites[:, 1, None, None]) ** 2 + across * (
        cols + ragged[1] - sites[:, 0, None, None]
    ) ** 2
    while True:
        nearest = away.argmin(0)
        counts = np.bincount(nearest[seen], minlength=len(kinds))
        few = [i for i in np.unique(nearest) if counts[i] < max(30, 0.03 * size * size)]
        if not few:
            return kinds[nearest]
        away[min(few, key=lambda i: counts[i])] = np.inf


def _paint_ground(rng: np.random.Generator, ground: np.ndarray) -> Float[np.ndarray, "s s 3"]:
    size, image = len(ground), 0.0
    for kind in np.unique(ground):
        weight = cv2.GaussianBlur((ground == kind).astype(np.float32), (0, 0), 0.6)
        tint = (rng.uniform(-7, 7, 3) + rng.uniform(-8, 8)).astype(np.float32)
        image = image + weight[..., None] * (_TEXTURES[STUFF[kind]](rng, size) + tint)
    return image


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    height = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    cloud = 0.65 * _noise(rng, size, 8, 4) + 0.35 * _noise(rng, size, 16, 9)
    return _mix(
        _mix((112, 176, 240), (184, 216, 246), height + np.zeros_like(cloud)), (240, 244, 250), (cloud - 0.5) * 3.5
    )


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    blades = 0.6 * _noise(rng, size, size // 4, size) + 0.4 * _noise(rng, size, 8)
    return _mix((28, 84, 22), (116, 176, 62), 0.5 + 1.5 * (blades - 0.5))


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    phase = 2 * np.pi * (rows * rng.uniform(13, 17) + 1.3 * _noise(rng, size, 7))
    crest = np.maximum(np.sin(phase), 0) ** 3 * (0.35 + 0.9 * _noise(rng, size, 10, 5))
    return _mix(_mix((8, 70, 92), (14, 104, 118), _noise(rng, size, 4)), (104, 190, 196), 0.8 * crest)


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    plain = _mix((196, 166, 116), (222, 198, 150), _noise(rng, size, 5))
    return (
        plain - (34 * rng.random((size, size), np.float32) ** 6 + 10 * (_noise(rng, size, size // 2) - 0.5))[..., None]
    )


def _rock(rng: np.random.Generator, size: int) -> np.ndarray:
    lumps = 0.7 * _noise(rng, size, 9) + 0.3 * _noise(rng, size, 18)
    patches = _mix((92, 88, 86), (164, 160, 156), np.floor(lumps * 6) / 5 + 0.25 * (_noise(rng, size, size // 2) - 0.5))
    crack = np.abs(_noise(rng, size, 9) - 0.5) < 0.028
    return patches * np.where(crack, np.float32(0.5), 1)[..., None]


_TEXTURES = {"sky": _sky, "grass": _grass, "water": _water, "sand": _sand, "rock": _rock}


# ---- Small tools --------------------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, size: int, rows: int, cols: int | None = None) -> Float32[np.ndarray, "s s"]:
    """Return smooth noise [size, size], mostly within 0 to 1: a grid of random values that is enlarged.

    rows, cols: size of the grid (default of cols: rows).
    """
    grid = rng.random((rows, cols or rows), np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _mix(low: object, high: object, part: np.ndarray) -> np.ndarray:
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return low + np.clip(part, 0, 1)[..., None] * (high - low)


def _fill(canvas: np.ndarray, corners: np.ndarray, value: int) -> None:
    cv2.fillPoly(canvas, [np.rint(corners * len(canvas) * 256).astype(np.int32)], value, shift=8)


def _pick(rng: np.random.Generator, items: list | tuple) -> object:
    return items[int(rng.integers(len(items)))]
