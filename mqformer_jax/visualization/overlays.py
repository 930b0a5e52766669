"""Draw segments over an image, grids of images, and curves of metrics."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mqformer_jax.arrays import Number
from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.segments import Segments, ground_truth_segments

SMALL = 384  # small images are enlarged to at most this longer side, in pixels, so that labels are legible
GAP = 10
GOLDEN = 0.618034
INK = (32, 33, 36)
Ids = Sequence[int] | Int[np.ndarray, "_"]
Rect = tuple[Number, Number, Number, Number]


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    segments: Segments,
    opacity: float = 0.55,
    boxes: bool = False,
    labels: bool = True,
    among: Ids | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image with the segments drawn over it in color, with contours and labels (see `label_of`).

    Each prompt has a color, and each of its segments has a shade of it, so overlays with the same prompts are
    comparable. A small image is enlarged by the largest integer factor with which its longer side stays within `SMALL`
    pixels. Large segments are labeled first, and a label without room is omitted.

    opacity: of the colors, 0 to 1. boxes, labels: whether to draw them.
    among: indices of the prompts among which colors are distributed (default: all). If only a few of many prompts have
    segments, pass these few, so that their colors differ more.
    """
    factor = max(1, SMALL // max(image.shape[:2]))
    masks = [_enlarge(m, factor) for m in segments.masks]
    largest_first = np.argsort([-m.sum() for m in masks], kind="stable")
    among = range(len(segments.texts)) if among is None else among
    shades = colors(segments.prompt_ids, among)
    if factor > 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[..., None]
    canvas, faded = (
        image.astype(np.float32),
        0.3 * image + 0.7 * gray,
    )  # partly gray, so that the image's colors do not mix with those of the segments
    for i in largest_first:
        canvas[masks[i]] = (1 - opacity) * faded[masks[i]] + opacity * shades[i]
    canvas = np.ascontiguousarray(canvas.round().astype(np.uint8))
    thickness = max(1, round(max(canvas.shape) / 600))
    for i in largest_first:
        # Extend the mask beyond the image, so that no contour follows the image's edge.
        wider = cv2.copyMakeBorder(masks[i].astype(np.uint8), 4, 4, 4, 4, cv2.BORDER_REPLICATE)
        outlines, _ = cv2.findContours(wider, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(
            canvas, outlines, -1, (0.3 * shades[i] + 0.7 * 255).tolist(), thickness, cv2.LINE_AA, offset=(-4, -4)
        )
    if boxes:
        for i in largest_first:
            x0, y0, x1, y1 = (segments.boxes[i] * factor).round().astype(int).tolist()
            cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), shades[i].tolist(), thickness + 1, cv2.LINE_AA)
    if labels:
        texts = [label_of(segments, i) for i in range(len(segments))]
        _draw_labels(canvas, texts, masks, segments.boxes * factor, shades, largest_first)
    return canvas


def label_of(segments: Segments, index: int) -> str:
    """Return the label of a segment: the prompt and the score, 0 to 1. Ground truth (query id -1) has no score."""
    text = segments.texts[segments.prompt_ids[index]]
    return text if segments.query_ids[index] < 0 else f"{text} {segments.scores[index]:.2f}"


def colors(prompt_ids: Ids, among: Ids) -> Float[np.ndarray, "n 3"]:
    """Return one RGB color (0 to 255) per segment: the hue of its prompt, shifted for further segments of the prompt.

    among: indices of the prompts among which colors are distributed. The hues of successive prompts are golden-ratio
    steps apart, so that up to about twenty prompts are distinguishable.
    """
    rank = {prompt: i for i, prompt in enumerate(sorted(set(map(int, among))))}
    seen: dict[int, int] = {}
    out = np.zeros((len(prompt_ids), 3))
    for row, prompt in enumerate(map(int, prompt_ids)):
        again = seen[prompt] = seen.get(prompt, -1) + 1
        lightness = (0.70, 0.60, 0.79, 0.65)[(rank[prompt] + again) % 4]
        out[row] = _oklch(lightness, 0.17, 0.09 + GOLDEN * rank[prompt] + 0.045 * ((again + 1) // 2) * (-1) ** again)
    return out


def grid(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: str, columns: Sequence[str] = ()) -> None:
    """Write a PNG with rows of captioned images. The images of a row are resized to the same height.

    columns: titles above the columns. rows: (caption, uint8 [h, w, 3]) for each cell. Captions are wrapped to the width
    of the image and may be empty.
    """
    rows = [[(text, _to_height(image, max(i.shape[0] for _, i in row))) for text, image in row] for row in rows]
    widths = [max(row[k][1].shape[1] for row in rows if k < len(row)) for k in range(max(map(len, rows)))]
    size = max(13, min(widths) // 26)
    font, head = ImageFont.load_default(size), ImageFont.load_default(round(1.25 * size))
    line = round(1.35 * size)
    captions = [[_wrap(text, font, image.shape[1]) for text, image in row] for row in rows]
    heights = [row[0][1].shape[0] + line * max(map(len, lines)) for row, lines in zip(rows, captions)]
    top = GAP + (round(1.8 * size) if columns else 0)
    page = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), top + sum(heights) + GAP * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    left = np.cumsum([GAP] + [w + GAP for w in widths])
    for title, x, width in zip(columns, left, widths):
        draw.text((x + width / 2, (GAP + top) / 2), title, INK, head, anchor="mm")
    y = top
    for row, lines, height in zip(rows, captions, heights):
        for (_, image), text, x, width in zip(row, lines, left, widths):
            page.paste(Image.fromarray(image), (int(x) + (width - image.shape[1]) // 2, y))
            for k, part in enumerate(text):
                draw.text((x + width / 2, y + image.shape[0] + (k + 0.6) * line), part, INK, font, anchor="mm")
        y += height + GAP
    page.save(path)


@dataclasses.dataclass
class Shown:
    """One image of a prediction grid.

    panoptic: the predicted segments. regions: the predicted region of each expression. None if the task was
    not evaluated.
    """

    record: Record
    image: UInt8[np.ndarray, "h w 3"]
    panoptic: Segments | None = None
    regions: Segments | None = None


def prediction_grid(shown: Sequence[Shown], info: DatasetInfo, path: str) -> None:
    """Write a PNG with one row per image: input, ground truth, prediction, and the regions of expressions.

    Columns of tasks that were not evaluated are omitted.
    """
    rows = []
    for item in shown:
        truth = ground_truth_segments(item.record, info)
        row = [("", _enlarged(item.image))]
        if item.panoptic is not None:
            among = np.union1d(truth.prompt_ids, item.panoptic.prompt_ids)
            row += [
                ("", overlay(item.image, truth, among=among)),
                ("", overlay(item.image, item.panoptic, among=among)),
            ]
        rows.append(row + ([] if item.regions is None else _region_cells(item)))
    columns = ["input"] + ["ground truth", "prediction"] * any(item.panoptic is not None for item in shown)
    grid(rows, path, columns + ["prompts"] * (max(map(len, rows)) - len(columns)))


def _region_cells(item: Shown, most: int = 3) -> list[tuple[str, np.ndarray]]:
    """Return (caption, panel) for up to `most` evenly spaced expressions. The caption has the expression and score."""
    regions = item.regions
    rows = np.unique(np.linspace(0, len(regions) - 1, most).round().astype(int))
    return [(f"“{regions.texts[i]}” {regions.scores[i]:.2f}", spotlight(item.image, regions.masks[i])) for i in rows]


def spotlight(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image with the masked part outlined in its original colors, and the rest in dark gray.

    Small images are enlarged as in `overlay`.
    """
    mask, image = _enlarge(mask, max(1, SMALL // max(image.shape[:2]))), _enlarged(image)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    canvas = np.where(mask[..., None], image, (40 + 0.45 * gray).astype(np.uint8))
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, (255, 221, 51), max(2, round(max(canvas.shape) / 180)), cv2.LINE_AA)
    return canvas


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = max(1, SMALL // max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else image


def curves(runs: Mapping[str, str], keys: Sequence[str], path: str) -> None:
    """Write a PNG with one plot per key, and one curve per run in each plot.

    runs: {label: JSON-lines file of metrics}; each line of a file has "step" and some of the keys. Raises
    FileNotFoundError if a file is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window and no global state, unlike pyplot
    from matplotlib.figure import Figure

    logs = {}
    for label, file in runs.items():
        if not os.path.exists(file):
            raise FileNotFoundError(f"{file}: no such file; give the JSON-lines file of metrics of the run {label!r}.")
        with open(file) as f:
            logs[label] = [json.loads(line) for line in f if line.strip()]
    figure = Figure(figsize=(4.2 * len(keys), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for i, (label, lines) in enumerate(logs.items()):
            points = [(entry["step"], entry[key]) for entry in lines if key in entry]
            if points:
                marker = "o" if len(points) < 20 else None  # few points, or only one, need markers
                axis.plot(
                    *zip(*points), marker=marker, color=colors([i], range(i + 1))[0] / 255, linewidth=1.8, label=label
                )
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _draw_labels(
    canvas: np.ndarray,
    texts: list[str],
    masks: list[np.ndarray],
    boxes: np.ndarray,
    shades: np.ndarray,
    order: np.ndarray,
) -> None:
    """Draw the label of each segment on `canvas`, which is changed in place.

    A label stands where its segment is widest, or above or below the segment if it would cover a large part of it.
    order: the indices of the segments in the order of labeling. A label that finds no room is omitted.
    """
    height, width = canvas.shape[:2]
    size = max(14, round(max(height, width) / 34))
    font = ImageFont.load_default(size)
    page = Image.fromarray(canvas)
    draw = ImageDraw.Draw(page)
    taken: list[Rect] = []
    for i in order:
        text = _shorten(texts[i], font, 0.6 * width)
        w, h = draw.textlength(text, font) + 0.8 * size, 1.4 * size
        for x, y in _label_places(masks[i], boxes[i], w, h):
            x, y = min(max(x, 1), width - w - 1), min(max(y, 1), height - h - 1)
            rect = (x, y, x + w, y + h)
            if not any(_overlap(rect, other) for other in taken):
                taken.append(rect)
                draw.rounded_rectangle(rect, 0.3 * size, tuple((0.4 * shades[i]).astype(int).tolist()))
                draw.text((x + w / 2, y + h / 2), text, "white", font, anchor="mm")
                break
    canvas[...] = np.asarray(page)


def _label_places(mask: Bool[np.ndarray, "h w"], box: np.ndarray, w: Number, h: Number) -> list[tuple[Number, Number]]:
    """Return possible upper left corners for a label of w x h pixels, best first; [] if it should be omitted."""
    if not mask.any():  # a segment that has only a box, or neither mask nor box
        return [(box[0], box[1] - h), (box[0], box[1])] if box[2] > box[0] else []
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    x, y = _widest_point(mask)
    left, top, width, height, area = stats[pieces[y, x]]
    if area < 0.5 * w * h:  # too small for a label
        return []
    if area < 4 * w * h:
        middle = left + width / 2 - w / 2
        return [(middle, top - h - 2), (middle, top + height + 2)]
    return [(x - w / 2, y - h / 2 + shift * h) for shift in (0, -1.1, 1.1)]


def _widest_point(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
    """Return x, y of the pixel farthest from the edges of the mask and the image."""
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), mask.shape)
    return int(x), int(y)


def _overlap(a: Rect, b: Rect) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _enlarge(mask: Bool[np.ndarray, "h w"], factor: int) -> Bool[np.ndarray, "H W"]:
    if factor == 1:
        return mask
    soft = cv2.resize(mask.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    return cv2.GaussianBlur(soft, (0, 0), 0.4 * factor) > 0.5  # smooths the enlarged pixels


def _to_height(image: np.ndarray, height: int) -> np.ndarray:
    if image.shape[0] == height:
        return image
    scale = height / image.shape[0]
    return cv2.resize(image, (round(image.shape[1] * scale), height), interpolation=cv2.INTER_CUBIC)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: Number) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: Number) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _oklch(lightness: float, chroma: float, hue: float) -> Float[np.ndarray, " 3"]:
    """Convert OKLCH (Ottosson 2020), whose lightness looks equal in all hues, to sRGB, 0 to 255. hue: 0 to 1."""
    a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    lms = np.array([[0.3963377774, 0.2158037573], [-0.1055613458, -0.0638541728], [-0.0894841775, -1.2914855480]]) @ [
        a,
        b,
    ]
    to_rgb = [[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965]]
    to_rgb += [[-0.0041960863, -0.7034186147, 1.7076147010]]
    linear = np.clip(to_rgb @ (lightness + lms) ** 3, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
