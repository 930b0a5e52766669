"""Evaluators of predictions, one for each task. Most of them are thin wrappers of a maintained metric library.

An evaluator has `update` (add one image or expression), `merge` (add the state of another process), `result` (metrics
of the whole set, in percent unless stated otherwise) and `details` (the worst images, and metrics of each class if
there are classes).
"""

from __future__ import annotations

from collections.abc import Sequence

WORST = 10  # number of images in `details`


def shifted(annotations: list[dict], images: int, ids: int = 0) -> list[dict]:
    """Return COCO annotations with `images` added to their image ids, and `ids` to their own ids if they have some."""
    return [
        {**a, "image_id": a["image_id"] + images, **({"id": a["id"] + ids} if "id" in a else {})} for a in annotations
    ]


def worst(name: str, scores: Sequence[tuple[str, float]], error: bool = False) -> list[dict]:
    """Return the `WORST` worst images, worst first: [{"key": record key, name: score}].

    name: of the metric. scores: (record key, score) of each image. error: True if the scores are errors, so that the
    highest is the worst.
    """
    ranked = sorted(scores, key=lambda item: (-item[1] if error else item[1], item[0]))
    return [{"key": key, name: score} for key, score in ranked[:WORST]]
