"""Draw training examples: each panel shows an image with its targets, and its prompts as text beside it."""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from mqformer_jax.arrays import Number
from mqformer_jax.input.batch import PAD

TEXT_WIDTH = 340  # width of the text beside an image, in pixels
COLUMNS, GAP, LINE = 3, 16, 18
INK, GRAY, RED = (32, 33, 36), (128, 132, 138), (200, 30, 30)
FONT, HEAD, SMALL = (ImageFont.load_default(size) for size in (13, 15, 11))
REGION, INSTANCES = "∎", "▢"  # drawn as icons, since the font lacks these characters
HIDDEN = 500  # area of a box in pixels; the number of a smaller target is drawn above the target
ABSENT = 8  # number of prompts named in the lists "absent" and "no loss"; further prompts are only counted
Rgb = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class ShownPrompt:
    """One prompt of an example.

    owned: indices of the targets that match the prompt. others: if the prompt is not exhaustive, indices of the targets
        that are known not to match it.
    """

    text: str
    is_region: bool
    exhaustive: bool
    owned: tuple[int, ...]
    others: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """One example of a batch, unpacked.

    key: "dataset/image". size: height and width of the image on the canvas, without padding.
    boxes: x0, y0, x1, y1 in pixels of the canvas. left_out: unusable records that were skipped before this example.
    """

    key: str
    prompts: tuple[ShownPrompt, ...]
    image: UInt8[np.ndarray, "h w 3"]
    size: tuple[int, int]
    ignore: Bool[np.ndarray, "h w"]
    masks: Bool[np.ndarray, "n h w"]
    has_mask: Bool[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    left_out: tuple[str, ...] = ()


# ---------------------------------------------------------------- the image


def color(target: int | np.integer) -> Rgb:
    """Return the color of a target. Successive targets differ in hue by the golden ratio, and in lightness."""
    r, g, b = colorsys.hls_to_rgb((0.92 + 0.618034 * target) % 1, (0.5, 0.62, 0.42)[target % 3], 0.95)
    return round(255 * r), round(255 * g), round(255 * b)


def picture(shown: ShownExample, side: int) -> Image.Image:
    """Return a picture of the canvas with its numbered targets. The longer side has `side` pixels.

    Masks are filled and outlined. Boxes without a mask are dashed.
    """
    height, width = shown.image.shape[:2]
    scale = side / max(height, width)
    size = (round(width * scale), round(height * scale))
    pixels = cv2.resize(shown.image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    ignored = cv2.resize(shown.ignore.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).view(bool)
    pixels[ignored] = _hatch(pixels)[ignored]
    masks = [_resize_mask(m, size) for m in shown.masks]
    largest_first = sorted(range(len(masks)), key=lambda i: -math.prod(shown.boxes[i, 2:] - shown.boxes[i, :2]))
    for i in largest_first:
        pixels[masks[i]] = (0.68 * pixels[masks[i]] + 0.32 * np.array(color(i))).astype(np.uint8)
    for i in largest_first:
        outlines, _ = cv2.findContours(masks[i].view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, color(i), 2, cv2.LINE_AA)
    page = Image.fromarray(pixels)
    draw = ImageDraw.Draw(page)
    for i in np.flatnonzero(~shown.has_mask):
        _dashed(draw, shown.boxes[i] * scale, color(i))
    bottom, right = (round(v * scale) for v in shown.size)
    # Draw the border between image and padding. Without padding, it is outside the picture.
    draw.line([(right, 0), (right, bottom), (0, bottom)], INK)
    _number(
        draw,
        [_anchor(mask, has, box * scale) for mask, has, box in zip(masks, shown.has_mask, shown.boxes)],
        largest_first,
        size,
    )
    return page


def _hatch(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return the image in dark gray with white diagonal lines."""
    gray = (40 + 0.4 * cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)).astype(np.uint8)
    y, x = np.indices(gray.shape)
    return np.repeat(np.where((x + y) % 8 < 2, 225, gray).astype(np.uint8)[..., None], 3, -1)


def _resize_mask(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    smaller = size[0] < mask.shape[1]
    soft = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return (soft > 0) & (soft >= min(0.5, 0.5 * soft.max()))  # keeps masks thinner than a pixel


def _dashed(draw: ImageDraw.ImageDraw, box: Float[np.ndarray, " 4"], ink: Rgb, dash: int = 6) -> None:
    """Draw a box with dashes of `ink` on white, which contrasts with any image."""
    x0, y0, x1, y1 = box
    for (ax, ay), (bx, by) in itertools.pairwise([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]):
        draw.line([(ax, ay), (bx, by)], "white", 2)
        length = max(abs(bx - ax), abs(by - ay), 1)
        for start in np.arange(0, length, 2 * dash):
            s, e = start / length, min(start + dash, length) / length
            draw.line([(ax + s * (bx - ax), ay + s * (by - ay)), (ax + e * (bx - ax), ay + e * (by - ay))], ink, 2)


def _anchor(
    mask: Bool[np.ndarray, "h w"], has_mask: bool | np.bool_, box: Float[np.ndarray, " 4"]
) -> tuple[Number, Number]:
    """Return x, y of a target's number: deep inside its mask, at the corner of its box, or above a small target."""
    x0, y0, x1, y1 = box
    if (x1 - x0) * (y1 - y0) < HIDDEN:
        return (x0 + x1) / 2, y0 - 9
    if not has_mask or not mask.any():
        return x0 + 7, y0 + 7
    depth = cv2.distanceTransform(np.pad(mask.view(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def _number(
    draw: ImageDraw.ImageDraw, anchors: Sequence[tuple[Number, Number]], order: Sequence[int], size: tuple[int, int]
) -> None:
    """Draw the number of each target at its anchor, or beside the anchor if another number is already there."""
    taken: list[tuple[Number, Number]] = []
    for i in order:
        w, h = _badge_size(str(i + 1))
        places = [
            (anchors[i][0] + dx * w, anchors[i][1] + dy * h) for dx, dy in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
        ]
        places = [(min(max(x, w / 2), size[0] - w / 2), min(max(y, h / 2), size[1] - h / 2)) for x, y in places]
        free = [(x, y) for x, y in places if all(abs(x - tx) >= w or abs(y - ty) >= h for tx, ty in taken)]
        x, y = (free or places)[0]
        taken.append((x, y))
        _badge(draw, x, y, str(i + 1), color(i))


def _badge_size(text: str) -> tuple[Number, Number]:
    return SMALL.getlength(text) + 7, 14


def _badge(draw: ImageDraw.ImageDraw, x: Number, y: Number, text: str, fill: Rgb) -> None:
    """Draw a number centered at x, y on the color of its target."""
    w, h = _badge_size(text)
    ink = "black" if np.dot(fill, (0.299, 0.587, 0.114)) > 140 else "white"
    draw.rounded_rectangle((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 4, fill, outline=ink)
    draw.text((x, y), text, ink, SMALL, anchor="mm")


# ---------------------------------------------------------------- the text


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a text: a word, an icon (`REGION`, `INSTANCES` or `image`), or a number on the color `fill`."""

    text: str
    ink: Rgb = INK
    fill: Rgb | None = None
    image: Image.Image | None = None

    @functools.cached_property
    def width(self) -> Number:
        if self.image or self.text in (REGION, INSTANCES):
            return self.image.width if self.image else 15
        return _badge_size(self.text)[0] if self.fill else FONT.getlength(self.text)


Item = list[Piece]
Placed = tuple[Number, Number, Piece]  # x of the left edge, y of the top of the line, and the piece


def prompt_items(prompts: Sequence[ShownPrompt]) -> tuple[list[Item], list[Item]]:
    """Return one item per prompt with targets, and up to two items that list the prompts without targets.

    The lists are "absent" (exhaustive prompts, which are negatives) and "no loss" (other prompts).
    """
    owning = sorted((a for a in prompts if a.owned), key=lambda a: a.owned)
    absent = [a.text for a in prompts if not a.owned and a.exhaustive]
    silent = [a.text for a in prompts if not a.owned and not a.exhaustive]
    rest = [_list("absent", absent)] if absent else []
    return [_prompt_item(a) for a in owning], rest + ([_list("no loss", silent)] if silent else [])


def _prompt_item(prompt: ShownPrompt) -> Item:
    item = [Piece(REGION if prompt.is_region else INSTANCES), *_say(prompt.text)]
    item += [Piece(f"x{len(prompt.owned)}", GRAY)] if len(prompt.owned) > 1 else []
    item += [Piece(str(i + 1), fill=color(i)) for i in prompt.owned]
    if not prompt.exhaustive:
        item += [Piece("?", RED)]
    if prompt.others:
        few = ", ".join(str(i + 1) for i in prompt.others) if len(prompt.others) < 4 else f"{len(prompt.others)} others"
        item += _say(f"not {few}", GRAY)
    return item


def _list(title: str, texts: Sequence[str]) -> Item:
    few = texts if len(texts) <= ABSENT + 1 else texts[:ABSENT]
    more = f" … +{len(texts) - len(few)}" if len(few) < len(texts) else ""
    return _say(f"{title} ({len(texts)}): {', '.join(few)}{more}", GRAY)


def _say(text: str, ink: Rgb = INK) -> Item:
    return [Piece(word, ink) for word in text.split()]


def facts(shown: ShownExample) -> list[Item]:
    """Return items with the numbers of targets and prompts, and with the skipped records."""
    n, masks, prompts = len(shown.masks), int(shown.has_mask.sum()), len(shown.prompts)
    kind = "boxes only" if not masks else "with masks" if masks == n else f"{masks} with masks, {n - masks} boxes only"
    words = _count(n, "target") + (f" ({kind})" if n else "") + f" · {_count(prompts, 'prompt')}"
    left_out = [_say(f"left out: {what}", RED) for what in shown.left_out[:3]]
    return [_say(words, GRAY), *left_out]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def flow(
    items: Sequence[Item], width: Number, own_line: bool = True, gap: Number = 12, line: Number = LINE
) -> tuple[list[Placed], Number]:
    """Lay out items in lines. Return the placed pieces and the total height.

    own_line: start each item on a new line. Otherwise, an item starts a new line only if it does not fit on the current
    one.
    """
    placed: list[Placed] = []
    x, y = 0.0, 0.0
    for item in items:
        whole = sum(piece.width + 4 for piece in item) - 4
        if placed and (own_line or x + min(whole, width) > width):
            x, y = 0.0, y + line
        for piece in item:
            if x and x + piece.width > width:
                x, y = 16.0, y + line
            placed.append((x, y, piece))
            x += piece.width + 4
        x += gap
    return placed, y + line


def fitted(owning: list[Item], rest: list[Item], room: Number, most: Number) -> tuple[list[Placed], Number]:
    """Lay out the prompts of an example. Return the placed pieces and the total height.

    owning, rest: the result of `prompt_items`. If the height `room` suffices, each item has its own line. Otherwise,
    items share lines, and prompts that would exceed the height `most` are only counted.
    """
    placed, height = flow(owning + rest, TEXT_WIDTH)
    if height <= room:
        return placed, height
    for count in range(len(owning), -1, -1):
        more = [_say(f"… and {len(owning) - count} more prompts with targets")] if count < len(owning) else []
        above, height = flow(owning[:count] + more, TEXT_WIDTH, own_line=False)
        below, tail = flow(rest, TEXT_WIDTH)
        if height + tail <= most:
            break
    return above + [(x, y + height, piece) for x, y, piece in below], height + tail


def write(page: Image.Image, placed: Iterable[Placed], left: Number, top: Number) -> None:
    """Draw the placed pieces with their upper left corner at left, top."""
    draw = ImageDraw.Draw(page)
    for x, y, piece in placed:
        x, middle = left + x, top + y + LINE / 2
        if piece.image:
            page.paste(piece.image, (round(x), round(middle - piece.image.height / 2)))
        elif piece.fill:
            _badge(draw, x + piece.width / 2, middle, piece.text, piece.fill)
        elif piece.text == REGION:
            draw.rectangle((x, middle - 5, x + 11, middle + 5), (150, 155, 165))
        elif piece.text == INSTANCES:
            draw.rectangle((x + 4, middle - 6, x + 12, middle + 2), outline=INK)
            draw.rectangle((x, middle - 2, x + 8, middle + 6), "white", outline=INK)
        else:
            draw.text((x, middle), piece.text, piece.ink, FONT, anchor="lm")


# ---------------------------------------------------------------- the grid


def panel(shown: ShownExample, side: int) -> Image.Image:
    """Draw one example: its image, with a longer side of `side` pixels, and its prompts on the right."""
    image = picture(shown, side)
    head, under = flow(facts(shown), TEXT_WIDTH)
    top = LINE + under + 5
    words, height = fitted(*prompt_items(shown.prompts), side - top, 2 * side - top)
    page = Image.new("RGB", (side + GAP + TEXT_WIDTH, round(max(image.height, top + height))), "white")
    page.paste(image, (0, 0))
    left = side + GAP
    ImageDraw.Draw(page).text((left, LINE / 2), _shortened(shown.key), INK, HEAD, anchor="lm")
    write(page, head, left, LINE)
    write(page, words, left, top)
    return page


def _shortened(key: str) -> str:
    """Shorten a key in its middle to fit in one line."""
    while HEAD.getlength(key) > TEXT_WIDTH:
        half = len(key) // 2
        key = key[: half - 2].rstrip("…") + "…" + key[half + 2 :].lstrip("…")
    return key


def grid(panels: Sequence[Image.Image], title: str) -> Image.Image:
    """Arrange panels in columns below a title and the legend."""
    columns = min(COLUMNS, len(panels))
    width = columns * (panels[0].width + 2 * GAP)
    head, height = flow(_legend(), width - 2 * GAP, own_line=False, gap=26, line=27)
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    tall = [max(c.height for c in line) for line in lines]
    page = Image.new("RGB", (width, round(GAP + 2 * LINE + height + sum(tall) + 2 * GAP * len(lines))), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP + LINE / 2), title, INK, HEAD, anchor="lm")
    write(page, head, GAP, GAP + 1.25 * LINE)
    y = GAP + 2 * LINE + height
    for line, bottom in zip(lines, tall):
        draw.line([(0, y), (width, y)], (225, 227, 230))
        for k, each in enumerate(line):
            page.paste(each, (round(GAP + k * width / columns), round(y + GAP)))
        y += bottom + 2 * GAP
    return page


def _legend() -> list[Item]:
    """Return the legend, drawn with the same functions as the panels."""
    height, width = 24, 36
    none = np.zeros((height, width), bool)
    mask, part = none.copy(), none.copy()
    mask[4:20, 5:31] = part[:, 14:] = True
    image = np.full((height, width, 3), 205, np.uint8)
    padded = np.where(part[..., None], np.uint8(PAD), image)
    plain = ShownExample("", (), image, (height, width), none, none[None][:0], np.zeros(0, bool), np.zeros((0, 4)))

    def entry(words: str, **changes) -> Item:
        return [Piece("", image=picture(dataclasses.replace(plain, **changes), width)), *_say(words)]

    corners = np.array([[3.0, 3, 33, 21]])
    return [
        entry("target with a mask", masks=mask[None], has_mask=np.ones(1, bool), boxes=corners),
        entry("target with a box only", masks=none[None], has_mask=np.zeros(1, bool), boxes=corners),
        entry("ignored pixels: no loss", ignore=part),
        entry("padding", image=padded, size=(height, 14)),
        [Piece(REGION), *_say("prompt for one region")],
        [Piece(INSTANCES), *_say("prompt for any number of instances")],
        [Piece("1", fill=color(0)), *_say("number of a target")],
        [Piece("?", RED), *_say("more instances may be unlabeled; “not 3”: target 3 does not match")],
        _say("absent: prompts known to have no target", GRAY),
    ]
