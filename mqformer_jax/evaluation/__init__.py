"""One evaluator a task, each a thin state around a well-kept metric library. What several processes saw is merged into
one result.

An evaluator has `update` (one image), `merge`, `result` (figures of the whole set, in percent unless it says otherwise)
and `details` (a table of its classes where there are any, and the images it did worst on).
"""

from __future__ import annotations

from collections.abc import Sequence

WORST = 10  # images


def shifted(annotations: list[dict], images: int, ids: int = 0) -> list[dict]:
    """COCO annotations with their image ids, and their own ids where they have one, raised by so much."""
    return [
        {**a, "image_id": a["image_id"] + images, **({"id": a["id"] + ids} if "id" in a else {})} for a in annotations
    ]


def worst(name: str, scores: Sequence[tuple[str, float]], error: bool = False) -> list[dict]:
    """The images with the lowest scores, or the highest errors: [{"key": of the record, name: its score}], the worst
    first.
    """
    ranked = sorted(scores, key=lambda item: (-item[1] if error else item[1], item[0]))
    return [{"key": key, name: score} for key, score in ranked[:WORST]]
