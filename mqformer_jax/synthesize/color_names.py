"""Rate how certainly each of the eleven basic color terms (Berlin & Kay) fits an object.

A certainty is a number, as in `referring_grammar`: if it is above 0, the term certainly fits; if it is 0, the term may
fit; if it is -1, the term does not fit.

A pixel gets the terms of the nearest prototype in CIELAB. The prototypes are colors of the XKCD color survey
(https://xkcd.com/color/rgb, public domain), in which 200,000 people named colors on their screens. Some prototypes
(teal, maroon, cream) have two terms: each of the two may fit such a pixel, but neither certainly fits. Terms and color
names are spelled as in the survey.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

TERMS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

# The survey's colors (hex RGB) for each term or pair of terms, with light and dark shades.
_PROTOTYPES = {
    "black": "000000 070d0d",  # black, almost black
    "white": "ffffff fdfdfe d8dcd6",  # white, pale grey, light grey: white is rarely fully lit
    "grey": "7d7f7c",  # medium grey
    "red": "e50000 ff000d 980002 be0119 f7022a ef4026",  # red, bright red, blood red, scarlet, cherry red, tomato
    "orange": "f97306 ff5b00 fdaa48 e17701 ffa756",  # orange, bright, light, pumpkin, pale orange
    "yellow": "ffff14 fffd01 fffe7a fdff52 fec615 d5b60a",  # yellow, bright, light, lemon, golden, dark yellow
    # green, light, forest, bright, grass, lime, greyish, dark green
    "green": "15b01a 96f97b 06470c 01ff07 3f9b0b 89fe05 82a67d 033500",
    # blue, light, sky, royal, bright, cobalt, denim, dark
    "blue": "0343df 95d0fc 75bbfd 0504aa 0165fc 1e488f 3b638c 00035b",
    "purple": "7e1e9c 35063e bf77f6 9a0eea 825f87 c79fef",  # purple, dark, light, violet, dusty purple, lavender
    "pink": "ff81c0 ffd1df cb416b ff028d fe01b1 d58a94",  # pink, light, dark, hot, bright, dusty pink
    "brown": "653700 341c02 7f5112 7f4e1e",  # brown, dark, medium brown, milk chocolate
    "black grey": "343837 363737",  # charcoal, dark grey
    "white grey": "929591 a8a495 c5c9c7",  # grey, greyish, silver: also white in shade
    "black brown": "1d0200",  # very dark brown
    "black green": "062e03 373e02",  # very dark green, dark olive
    "black blue": "000133 01153e 1b2431",  # very dark blue, navy, dark
    "black purple": "2a0134 380835",  # very dark purple, eggplant
    "black red": "3c0008",  # dark maroon
    "white yellow": "ffffe4 ffffc2 ffffb6",  # off white, cream, a lighter straw
    "white pink": "fff4f2",  # very light pink
    "white blue": "d7fffe",  # ice blue
    "white green": "d1ffbd",  # very light green
    "white brown": "e6daa6 fbeeac",  # beige, light tan
    "grey brown": "b9a281 978a84 86775f 7a6a4f",  # taupe, warm grey, brownish grey, greyish brown
    "grey green": "96ae8d",  # greenish grey
    # bluish grey, cool grey, slate, slate grey, powder, steel blue
    "grey blue": "748b97 95a3a6 516572 59656d b1d1fc 5a7d9a",
    "grey purple": "7a687f",  # purplish grey
    "grey pink": "c8aca9",  # pinkish grey
    "red brown": "7f2b0a 8f1402 a83c09 840000",  # reddish brown, brick red, rust, dark red
    "red orange": "fd411e f8481c",  # orange red, reddish orange
    "red pink": "cf6275 fc5a50 c0737a",  # rose, coral, dusty rose
    "red purple": "650021 580f41 610023",  # maroon, plum, burgundy
    "orange yellow": "ffad01 feb308",  # orange yellow, amber
    # dark orange, burnt, umber, terracotta, copper, warm brown
    "orange brown": "c65102 c04e01 b26400 ca6641 b66325 964e02",
    "orange pink": "ffb07c ff796c",  # peach, salmon
    "yellow brown": "d1b26f bf9005 ceb301 e2ca76 c69f59 a6814c",  # tan, ochre, mustard, sand, camel, coffee
    "yellow green": "c0fb2d c1f80a 9cbb04",  # yellow green, chartreuse, bright olive
    "green brown": "6e750e 696112 aaa662",  # olive, greenish brown, khaki
    "green blue": "029386 06c2ac 13eac9 014d4e 00ffff",  # teal, turquoise, aqua, dark teal, cyan
    "blue purple": "380282 703be7",  # indigo, bluish purple
    "purple pink": "c20078 ae7181 cea2fd",  # magenta, mauve, lilac
    "pink brown": "b17261",  # pinkish brown
}
# (fraction of pixels above which a term may certainly fit, fraction below which it does not fit), for masks and boxes
_MASK_LIMITS = (0.6, 0.12)
_BOX_LIMITS = (0.7, 0.08)
_MIDDLE = 0.6  # the middle of a box is an ellipse with this fraction of its width and height
_MIN_PIXELS = 30  # an object with fewer visible pixels has no certain color
_NIGHT = 90  # brightness, 0 to 255: a set of pixels is dark if three quarters of them are below
_WARM = 18  # CIELAB's b (yellow): if its mean over the brightest tenth of the image is larger, the light may be warm
_STEP = 8  # the lookup table holds every eighth level of red, green and blue


def term_shares(pixels: UInt8[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, " 11"], Float[np.ndarray, " 11"]]:
    """Return two fractions of the pixels for each color term in `TERMS`: pixels of this color, and possibly of it.

    The second fraction includes the first. pixels: RGB values, at least one pixel.
    """
    r, g, b = (pixels // _STEP).T
    found = np.bincount(_table()[r, g, b], minlength=len(_PROTOTYPES)) / len(pixels)
    may = _terms_of_prototypes().astype(float)
    return found @ (may * (may.sum(1, keepdims=True) == 1)), found @ may


def fair_light(image: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Return whether the light of an image shows true colors: neither night nor warm lamps."""
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    lab = _lab(small)
    bright = lab[lab[:, 0] >= np.percentile(lab[:, 0], 90)].mean(0)
    cold = (lab[:, 0] > 40) & (lab[:, 2] < 3)  # under warm lamps no pixel is white or blue; in sunlight some are
    # Bright grass also has a high b. Its low a (green) tells it from warm light.
    warm = bright[2] > _WARM and bright[1] > -_WARM / 2 and cold.mean() < 0.03
    return not (_dark(small) or warm)


def of_mask(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "a b"], at: tuple[int, int]
) -> Float[np.ndarray, " 11"]:
    """Return the certainty (see `referring_grammar`) of each of `TERMS` for an object with a mask.

    mask: the object's pixels in a window of the image. at: top and left of the window. The rim of the mask is excluded,
    because its pixels mix with the background.
    """
    (top, left), (height, width) = at, mask.shape
    rim = max(1, round(0.03 * float(mask.sum()) ** 0.5))
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=rim)[1:-1, 1:-1] > 0
    seen = image[top : top + height, left : left + width][inner if inner.sum() >= 0.4 * mask.sum() else mask]
    if len(seen) < _MIN_PIXELS or _dark(_around(image, (left, top, left + width, top + height))):
        return np.zeros(len(TERMS))
    return term_certainties(*term_shares(seen), *_MASK_LIMITS)


def of_box(
    image: UInt8[np.ndarray, "h w 3"], box: tuple[int, int, int, int], free: Bool[np.ndarray, "a b"]
) -> Float[np.ndarray, " 11"]:
    """Return the certainty (see `referring_grammar`) of each of `TERMS` for an object that has a box but no mask.

    box: x0, y0, x1, y1 in whole pixels, not empty. free: the pixels of the box that no other box covers. A color
    certainly fits if most of the middle of the box has it and the pixels around the box do not. If these pixels
    have it too, it is possible but not certain that the color fits, because the background may show through the object,
    e.g. through a ring. Any other color that occurs in the box may also fit.
    """
    x0, y0, x1, y1 = box
    pixels, around = image[y0:y1, x0:x1], _around(image, box)
    rows, columns = np.mgrid[: y1 - y0, : x1 - x0]
    middle = np.hypot((2 * rows + 1) / (y1 - y0) - 1, (2 * columns + 1) / (x1 - x0) - 1) < _MIDDLE
    seen = pixels[middle & free]
    if len(seen) < max(_MIN_PIXELS, 0.5 * middle.sum()) or len(around) == 0 or _dark(around):
        return np.zeros(len(TERMS))
    certainties = term_certainties(*term_shares(seen), *_BOX_LIMITS)
    certainties[(certainties > 0) & (term_shares(around)[1] > 0.3)] = 0
    certainties[(certainties < 0) & (term_shares(pixels.reshape(-1, 3))[1] >= _BOX_LIMITS[1])] = 0
    return certainties


def _around(image: UInt8[np.ndarray, "h w 3"], box: tuple[int, int, int, int]) -> UInt8[np.ndarray, "n 3"]:
    """Return the pixels around a box, up to a quarter of its width or height away."""
    x0, y0, x1, y1 = box
    left, top = max(x0 - (x1 - x0 + 3) // 4, 0), max(y0 - (y1 - y0 + 3) // 4, 0)
    part = image[top : y1 + (y1 - y0 + 3) // 4, left : x1 + (x1 - x0 + 3) // 4]
    outside = np.ones(part.shape[:2], bool)
    outside[y0 - top : y1 - top, x0 - left : x1 - left] = False
    return part[outside]


def _dark(pixels: UInt8[np.ndarray, "n 3"]) -> bool:
    return len(pixels) > 0 and bool(np.percentile(pixels.max(1), 75) < _NIGHT)


def term_certainties(
    sure: Float[np.ndarray, " 11"], may: Float[np.ndarray, " 11"], most: float, least: float
) -> Float[np.ndarray, " 11"]:
    """Return the certainty (see `referring_grammar`) of each of `TERMS`.

    sure, may: the results of `term_shares`, the fractions of pixels that certainly and possibly have each term. A term
    certainly fits if its `may` is at least `most`, its `sure` is at least three quarters of that, and no other term is
    frequent. It does not fit if its `may` is below `least`. Otherwise, it may fit. Highlights and shadows of a colored
    object are white, gray and black. So these three terms may be more frequent beside a color, and need a larger
    fraction to fit.
    """
    certainties = np.where(may < least, -1.0, 0.0)
    best = int(sure.argmax())
    second, colored = np.delete(sure, best).max(), np.delete(sure, [best, *_NEUTRAL]).max()
    needed, forgiven = (most + 0.1, 0.12) if best in _NEUTRAL else (most, 0.25)
    if may[best] >= needed and sure[best] >= 0.75 * needed and second <= forgiven and colored <= 0.12:
        certainties[best] = (sure[best] + may[best]) / 2
    return certainties


_NEUTRAL = tuple(TERMS.index(term) for term in ("black", "white", "grey"))


@functools.cache
def _terms_of_prototypes() -> Bool[np.ndarray, "k 11"]:
    return np.array([[term in key.split() for term in TERMS] for key in _PROTOTYPES])


@functools.cache
def _table() -> UInt8[np.ndarray, "32 32 32"]:
    """Return the lookup table from 32 levels each of red, green and blue to the nearest index into `_PROTOTYPES`."""
    group = np.array([k for k, colors in enumerate(_PROTOTYPES.values()) for _ in colors.split()], np.uint8)
    prototypes = np.array([list(bytes.fromhex(c)) for colors in _PROTOTYPES.values() for c in colors.split()], np.uint8)
    levels = np.arange(_STEP // 2, 256, _STEP, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    apart = np.linalg.norm(_lab(grid)[:, None] - _lab(prototypes), axis=-1)
    return group[apart.argmin(1)].reshape(3 * (len(levels),))


def _lab(rgb: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
