"""Evaluators: one per task, most of them thin wrappers of a maintained metric library.

An evaluator has `update` (add one image or expression), `merge` (add the state of another process), `result` (metrics
of the whole set, in percent unless stated otherwise) and `details` (metrics by class, if any, and the worst images).
"""

from __future__ import annotations

from collections.abc import Sequence

WORST = 10  # number of images in `details`


def shifted(annotations: list[dict], images: int, ids: int = 0) -> list[dict]:
    """Return COCO annotations with `images` added to their image ids, and `ids` to their own ids, if any."""
    return [
        {**a, "image_id": a["image_id"] + images, **({"id": a["id"] + ids} if "id" in a else {})} for a in annotations
    ]


def worst(name: str, scores: Sequence[tuple[str, float]], error: bool = False) -> list[dict]:
    """Return the `WORST` images with the lowest scores, worst first: [{"key": record key, name: score}].

    name: of the metric. scores: (record key, score) of each image. error: whether the highest scores are the worst.
    """
    ranked = sorted(scores, key=lambda item: (-item[1] if error else item[1], item[0]))
    return [{"key": key, name: score} for key, score in ranked[:WORST]]
