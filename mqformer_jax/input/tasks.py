"""Convert a Record (annotations) to an Example (prompts and targets) for one or several tasks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mqformer_jax.input.example import Example, Prompt, Target
from mqformer_jax.input.record import BadRecord, DatasetInfo, Record, Segment, box_of
from mqformer_jax.tasks import FOREGROUND, TRAINED

FOREGROUND_PROMPT = Prompt((FOREGROUND,), is_region=True)

# A prompt, the groups of segments that it fits (each group becomes one target), and whether its targets need masks.
PromptGroups = tuple[Prompt, list[tuple[int, ...]], bool]
Window = tuple[np.ndarray, tuple[int, int]]  # a crop of a mask, and its top and left in the image


def to_example(
    record: Record, info: DatasetInfo, tasks: Sequence[str], key: str, templates: tuple[str, ...] = ("{}",)
) -> Example:
    """Return the prompts and targets of one record for the given tasks.

    - panoptic: one target per thing, and one region per class of stuff.
    - instance: things only.
    - detection: things only, with boxes and without masks.
    - semantic: one region per class.
    - referring: one prompt per expression. If an object has synthetic captions, they are the wordings of one additional
      prompt, as in the paper.
    - foreground: all salient segments together are one region.

    If the same segments are a target of several prompts, even of different tasks, they become one Target.

    A class without a segment becomes a negative prompt if it is known to be absent: because the data set labels all
    objects of its classes (`info.exhaustive`), or because the record lists the class (`absent_classes`). A class with a
    crowd is not exhaustive, because the members of the crowd are not labeled (this rule is not in the paper).
    Templates apply to class names, not to expressions.

    Raises BadRecord for an invalid record (e.g. a class that the data set does not have), ValueError for an unknown
    task.
    """
    if unknown := sorted(set(tasks) - set(TRAINED)):
        raise ValueError(f"{info.name}: unknown task {unknown[0]!r}; tasks are {', '.join(TRAINED)}.")
    prompts: list[Prompt] = []
    groups: dict[tuple[int, ...], list[int]] = {}
    masked: set[tuple[int, ...]] = set()
    for prompt, prompt_groups, with_mask in _prompts(record, info, tasks, templates):
        for group in prompt_groups:
            groups.setdefault(group, []).append(len(prompts))
            if with_mask:
                masked.add(group)
        prompts.append(prompt)
    targets = []
    for group, ids in groups.items():
        if (target := _target(record, group, tuple(ids), group in masked)) is not None:
            targets.append(target)
            continue
        # The mask is empty, e.g. in a matte of glass: what the prompt names is in the image, but it has no target.
        for i in ids:
            prompts[i] = dataclasses.replace(prompts[i], exhaustive=False)
    return Example(key, np.ascontiguousarray(record.decode_image()), prompts, targets, _ignored(record))


def needs_whole_image(record: Record, tasks: Sequence[str]) -> bool:
    """Return whether a crop could make a prompt wrong, because expressions and salience depend on the whole image."""
    referring = "referring" in tasks and (record.absent_texts or any(s.expressions for s in record.segments))
    return bool(referring) or ("foreground" in tasks and any(s.foreground for s in record.segments))


def _prompts(
    record: Record, info: DatasetInfo, tasks: Sequence[str], templates: tuple[str, ...]
) -> Iterator[PromptGroups]:
    labeled = [(i, s) for i, s in enumerate(record.segments) if not s.crowd]
    yield from _class_prompts(record, info, tasks, templates)
    if "referring" in tasks:
        groups: dict[str, list[tuple[int, ...]]] = {}
        for i, segment in labeled:
            for text in dict.fromkeys(segment.texts):
                groups.setdefault(text, []).append((i,))
        for text, named in groups.items():
            yield Prompt((text,), is_region=True, exhaustive=info.unique_texts), named, True
        for i, segment in labeled:
            if captions := tuple(text for text, _ in segment.captions):
                yield Prompt(captions, is_region=True, exhaustive=info.unique_texts), [(i,)], True
        for text in record.absent_texts:
            yield Prompt((text,), is_region=True), [], True
    salient = tuple(i for i, s in labeled if s.foreground)
    if "foreground" in tasks and salient:
        yield FOREGROUND_PROMPT, [salient], True


def _class_prompts(
    record: Record, info: DatasetInfo, tasks: Sequence[str], templates: tuple[str, ...]
) -> Iterator[PromptGroups]:
    members: dict[int, list[int]] = {}
    crowded = set()
    for i, segment in enumerate(record.segments):
        if segment.class_id is None or segment.foreground:
            continue
        if not 0 <= segment.class_id < len(info.classes):
            raise BadRecord(
                f"{record.key}: segment {i} has class {segment.class_id}, but there are {len(info.classes)} classes; "
                "correct the label and prepare the data set again"
            )
        if segment.crowd:
            crowded.add(segment.class_id)
        else:
            members.setdefault(segment.class_id, []).append(i)
    known = range(len(info.classes)) if info.exhaustive else sorted({*members, *record.absent_classes})
    partial = crowded.union(record.partial_classes)
    for c in known:
        exhaustive = c not in partial
        ids = members.get(c, [])
        if not ids and not exhaustive:
            continue  # such a prompt has no loss
        for prompt, with_mask in _prompts_of_class(info, c, tuple(tasks), templates, exhaustive):
            groups: list[tuple[int, ...]] = [tuple(ids)] if prompt.is_region and ids else [(i,) for i in ids]
            yield prompt, groups, with_mask


@functools.lru_cache(maxsize=1 << 16)
def _prompts_of_class(
    info: DatasetInfo, c: int, tasks: tuple[str, ...], templates: tuple[str, ...], exhaustive: bool
) -> tuple[tuple[Prompt, bool], ...]:
    """Return (prompt, whether its targets need masks) for each prompt of a class.

    There is at most one prompt for all instances of the class, and at most one for its region.
    """
    is_region = info.classes[c].is_region
    texts = tuple(t.format(text) for text in info.classes[c].texts for t in templates)
    prompts = []
    if not is_region and ("panoptic" in tasks or "instance" in tasks or "detection" in tasks):
        prompts.append(
            (Prompt(texts, False, exhaustive, info.class_weights[c]), "panoptic" in tasks or "instance" in tasks)
        )
    if "semantic" in tasks or (is_region and "panoptic" in tasks):
        prompts.append((Prompt(texts, True, exhaustive, info.class_weights[c]), True))
    return tuple(prompts)


def _target(record: Record, group: tuple[int, ...], prompts: tuple[int, ...], with_mask: bool) -> Target | None:
    """Return a group of segments as one Target, or None if they are empty.

    prompts: indices of the prompts that fit the group.
    """
    segments = [record.segments[i] for i in group]
    if with_mask and all(s.mask is not None or s.alpha is not None for s in segments):
        mask, at = _union([_window(record, s) for s in segments])
        box = box_of(mask)
        return (
            None
            if box is None
            else Target(prompts, np.array(box, np.float32) + np.array([*at[::-1]] * 2, np.float32), mask, at)
        )
    boxes = [box for box in (_box(record, i) for i in group) if box is not None]
    if not boxes:
        return None
    corners = np.array(boxes, np.float32)
    return Target(prompts, np.concatenate([corners[:, :2].min(0), corners[:, 2:].max(0)]))


def _window(record: Record, segment: Segment) -> Window:
    """Return the mask of a segment, cropped to its box, and the box's top and left."""
    if segment.alpha is None:
        return record.decode_window(segment.mask)
    mask = record.decode_alpha(segment.alpha) > 127
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    return mask[y : y + max(h, 1), x : x + max(w, 1)], (y, x)


def _union(parts: list[Window]) -> Window:
    if len(parts) == 1:
        return parts[0]
    top, left = (min(at[axis] for _, at in parts) for axis in (0, 1))
    bottom, right = (max(at[axis] + mask.shape[axis] for mask, at in parts) for axis in (0, 1))
    union = np.zeros((bottom - top, right - left), bool)
    for mask, (y, x) in parts:
        union[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
    return union, (top, left)


def _box(record: Record, i: int) -> tuple[float, float, float, float] | None:
    """Return the labeled box of segment i or, without one, the box of its mask; None if the mask is empty."""
    segment = record.segments[i]
    if segment.box is not None:
        return segment.box
    if segment.mask is None and segment.alpha is None:
        raise BadRecord(f"{record.key}: segment {i} has neither a box nor a mask; prepare the data set again")
    return box_of(
        record.decode_mask(segment.mask) if segment.alpha is None else record.decode_alpha(segment.alpha) > 127
    )


def _ignored(record: Record) -> np.ndarray:
    """Return which pixels are unlabeled or belong to a crowd, bool [h, w]. A crowd without a mask covers its box."""
    ignore = (
        np.zeros((record.height, record.width), bool) if record.ignore is None else record.decode_mask(record.ignore)
    )
    for i, segment in enumerate(record.segments):
        if segment.crowd and segment.mask is not None:
            ignore |= record.decode_mask(segment.mask)
        elif segment.crowd and (box := _box(record, i)) is not None:
            x0, y0 = np.maximum(np.floor(box[:2]), 0).astype(int)
            x1, y1 = np.maximum(np.ceil(box[2:]), 0).astype(int)
            ignore[y0:y1, x0:x1] = True
    return ignore
