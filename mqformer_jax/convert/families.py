"""The families (kinds) of checkpoints that can be converted, and the function that finds a checkpoint's family."""

from __future__ import annotations

from mqformer_jax.convert import clip_text, efficientnet, mask2former, maskdino, minilm, openseed, resnet, swin
from mqformer_jax.convert.rules import Family, Shapes

# complete models first, since their files also contain backbones
_ALL = (
    maskdino.FAMILY,
    *openseed.FAMILIES,
    *mask2former.FAMILIES,
    *resnet.FAMILIES,
    *swin.FAMILIES,
    efficientnet.FAMILY,
    *clip_text.FAMILIES,
    minilm.FAMILY,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def find_family(shapes: Shapes, name: str | None, source: str) -> Family:
    """Return the family called `name`. If `name` is None, return the first family that recognizes the tensors.

    shapes: {tensor name: shape}. source: path of the checkpoint, for error messages. Raises ValueError if no family has
    this name, or if the tensors do not belong to the family, or to any family.
    """
    likely = [family.name for family in FAMILIES.values() if family.recognizes(shapes)]
    if name is not None and name not in FAMILIES:
        raise ValueError(f"--from {name}: unknown family; give one of {', '.join(FAMILIES)}.")
    if name is not None and name not in likely:
        found = (
            f"its tensors look like {likely[0]}" if likely else f"its first tensors are {', '.join(list(shapes)[:3])}"
        )
        hint = f"use --from {likely[0]}" if likely else f"give a checkpoint of one of {', '.join(FAMILIES)}"
        raise ValueError(f"{source} is not a checkpoint of {FAMILIES[name].originals}: {found}; {hint}.")
    if not likely:
        raise ValueError(
            f"{source}: no known family has these {len(shapes)} tensors ({', '.join(list(shapes)[:3])}, ...); "
            f"give a checkpoint of one of the families {', '.join(FAMILIES)}."
        )
    return FAMILIES[name or likely[0]]
