"""Convert Swin Transformers with the tensor names of Microsoft or Hugging Face.

timm and detection projects use Microsoft's names. Hugging Face's names in files differ from those of a loaded model.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mqformer_jax.config import base
from mqformer_jax.convert.rules import (
    Entry,
    Family,
    Plan,
    Shapes,
    conv,
    is_model,
    linear,
    norm,
    packing,
    prefix_of,
    shape_of,
)
from mqformer_jax.models.swin import SIZES, Size


@dataclasses.dataclass(frozen=True)
class Names:
    """The tensor names of a Swin in one kind of checkpoint.

    block: prefix of a block's names, with {} for the numbers of the stage and the block. merge, norm: names of the
    patch merge and of the norm of an output feature, with {} for the number of the stage. norm1 and all later fields
    follow the prefix `block`. qkv: one packed layer, or three layers.
    """

    embed: str
    embed_norm: str
    block: str
    merge: str
    norm: str
    norm1: str
    qkv: tuple[str, ...]
    out: str
    table: str
    norm2: str
    fc1: str
    fc2: str

    @property
    def first_table(self) -> str:
        """Return the name of the first block's position bias table, which identifies this kind of checkpoint."""
        return self.block.format(0, 0) + self.table


MICROSOFT = Names(
    embed="patch_embed.proj",
    embed_norm="patch_embed.norm",
    block="layers.{}.blocks.{}.",
    merge="layers.{}.downsample.",
    norm="norm{}",
    norm1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    table="attn.relative_position_bias_table",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
HUGGING_FACE = Names(
    embed="embeddings.patch_embeddings.projection",
    embed_norm="embeddings.norm",
    block="encoder.layers.{}.blocks.{}.",
    merge="encoder.layers.{}.downsample.",
    norm="hidden_states_norms.stage{}",
    norm1="layernorm_before",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    table="attention.relative_position_bias.relative_position_bias_table",
    norm2="layernorm_after",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
HUGGING_FACE_ON_DISK = dataclasses.replace(
    HUGGING_FACE,
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    table="attention.self.relative_position_bias_table",
    fc1="intermediate.dense",
    fc2="output.dense",
)
KINDS = {"swin": (MICROSOFT,), "hf_swin": (HUGGING_FACE, HUGGING_FACE_ON_DISK)}

IGNORED = {
    r"relative_position_index$": "computed from the window size",
    r"attn_mask$": "computed from the image's size",
    r"(^|\.)(norm|layernorm)\.(weight|bias)$": (
        "the classifier's norm; features have their own norms, initially with scale 1 and bias 0"
    ),
    r"(^|\.)(head|classifier)\.": "the classifier",
    r"embeddings\.mask_token$": "only for masked image modeling",
}


def sizes_of(shapes: Shapes, prefix: str = "") -> tuple[str, int]:
    """Return the size ("t", "s", "b" or "l") and the window side of a Swin. Raises ValueError for other sizes.

    prefix: prefix of the Swin's tensor names, e.g. "backbone.".
    """
    _, root = _kind(shapes, prefix)
    size, window = _size(shapes, prefix)
    name = next((name for name, known in SIZES.items() if known == size), None)
    if name is None:
        known = "; ".join(f"{name}: {size.width}, {size.depths}" for name, size in SIZES.items())
        raise ValueError(
            f"{root or 'the file'}: a Swin of width {size.width} and depths {size.depths} cannot be converted; "
            f"the supported widths and depths are {known}."
        )
    return name, window


def entries(shapes: Shapes, prefix: str = "") -> list[Entry]:
    """Return the conversion rules of a Swin backbone.

    prefix: prefix of the Swin's tensor names, e.g. "" or "backbone.". The tensor names determine the naming scheme.
    Output norms are included if the checkpoint has them (see `absent_norms`).
    """
    names, root = _kind(shapes, prefix)
    size, _ = _size(shapes, prefix)
    # the patch merge belongs to the stage after it in timm, to the stage before it elsewhere
    timm = int(f"{root}{names.merge.format(3)}reduction.weight" in shapes)
    found = conv("backbone/embed", root + names.embed, bias=True) + norm("backbone/embed/norm", root + names.embed_norm)
    for stage, depth in enumerate(size.depths):
        for block in range(depth):
            ours = f"backbone/stages/{stage}/{('plain', 'shifted')[block % 2]}"
            found += _block(ours, root + names.block.format(stage, block), names, size.width * 2**stage, block // 2)
        if stage < 3:
            merge, theirs = f"backbone/merges/{stage}", root + names.merge.format(stage + timm)
            found += norm(f"{merge}/norm", f"{theirs}norm") + linear(
                f"{merge}/reduction", f"{theirs}reduction", bias=False
            )
        if (theirs := _norm(names, prefix, stage)) + ".weight" in shapes:
            found += norm(f"backbone/norms/{stage}", theirs)
    return found


def absent_norms(shapes: Shapes, prefix: str = "") -> dict[str, np.ndarray]:
    """Return {path: value} of the output norms that the checkpoint lacks, with scale 1 and bias 0.

    For example, classifiers have no output norms.
    """
    names, _ = _kind(shapes, prefix)
    size, _ = _size(shapes, prefix)
    absent = [stage for stage in range(4) if _norm(names, prefix, stage) + ".weight" not in shapes]
    widths = {f"backbone/norms/{stage}": size.width * 2**stage for stage in absent}
    scales = {f"{path}/scale": np.ones(width, np.float32) for path, width in widths.items()}
    return scales | {f"{path}/bias": np.zeros(width, np.float32) for path, width in widths.items()}


def _block(ours: str, theirs: str, names: Names, width: int, pair: int) -> list[Entry]:
    """Return the conversion rules of one block.

    The model stacks the parameters of the plain blocks of a stage, and those of its shifted blocks. pair: index of this
    block in its stack.
    """
    qkv = [theirs + name for name in names.qkv]
    found = linear(f"{ours}/qkv", qkv[0], pair) if len(qkv) == 1 else packing(f"{ours}/qkv", qkv, width, pair)
    for name in ("out", "fc1", "fc2"):
        found += linear(f"{ours}/{name}", theirs + getattr(names, name), pair)
    for name in ("norm1", "norm2"):
        found += norm(f"{ours}/{name}", theirs + getattr(names, name), pair)
    return [*found, Entry(f"{ours}/position_bias", theirs + names.table, index=pair)]


def _norm(names: Names, prefix: str, stage: int) -> str:
    """Return the name of the output norm of a stage, e.g. "norm0" or "hidden_states_norms.stage1".

    stage: counted from 0; Hugging Face's names count from 1. prefix: prefix of the Swin's tensor names without a final
    "swin.", because the names of the output norms do not contain it.
    """
    return prefix + names.norm.format(stage + (names is not MICROSOFT))


def _kind(shapes: Shapes, prefix: str) -> tuple[Names, str]:
    """Return the naming scheme of a Swin, and the full prefix of its tensor names: `prefix` or `prefix` + "swin.".

    Raises ValueError if the first block has none of the known names.
    """
    for names in (MICROSOFT, HUGGING_FACE, HUGGING_FACE_ON_DISK):
        for root in (prefix, f"{prefix}swin."):
            if root + names.first_table in shapes:
                return names, root
    raise ValueError(
        f"{prefix}{MICROSOFT.first_table} is missing: this is not a complete Swin checkpoint; give the complete file."
    )


def _size(shapes: Shapes, prefix: str) -> tuple[Size, int]:
    """Return the size of a Swin and the side of its windows.

    The width and the window come from tensor shapes, the depths from tensor names. Raises ValueError if a tensor is
    missing or has an impossible shape.
    """
    names, root = _kind(shapes, prefix)
    table = lambda stage, block: root + names.block.format(stage, block) + names.table
    depths = []
    for stage in range(4):
        depths.append(0)
        while table(stage, depths[-1]) in shapes:
            depths[-1] += 1
    offsets, embed = shape_of(shapes, table(0, 0), 2), shape_of(shapes, f"{root}{names.embed}.weight", 4)
    side = round(offsets[0] ** 0.5)
    if side**2 != offsets[0] or side % 2 == 0:
        raise ValueError(
            f"{table(0, 0)} has shape {offsets}: expected (2 * window - 1)^2 rows; give the original file."
        )
    return Size(embed[0], tuple(depths)), (side + 1) // 2


def _prefix(shapes: Shapes, family: str) -> str | None:
    """Return the prefix of the Swin's tensor names, or None if the checkpoint has no Swin with this family's names.

    A final "swin." is left out, because the names of the output norms do not contain it (see `_norm`).
    """
    found = (prefix_of(shapes, names.first_table) for names in KINDS[family])
    root = next((root for root in found if root is not None), None)
    return root[: -len("swin.")] if root is not None and f".{root}".endswith(".swin.") else root


def _family(name: str, originals: str) -> Family:
    def recognizes(shapes: Shapes) -> bool:
        return not is_model(shapes) and _prefix(shapes, name) is not None

    def plan(shapes: Shapes) -> Plan:
        prefix = _prefix(shapes, name) or ""
        size, window = sizes_of(shapes, prefix)
        config = base()
        config.model.backbone.name, config.model.backbone.window = f"swin_{size}", window
        return Plan(config, "backbone", entries(shapes, prefix), absent_norms(shapes, prefix), IGNORED)

    return Family(name, originals, recognizes, plan)


FAMILIES = (
    _family("swin", "Swin-T/S/B/L of Microsoft's repositories, timm and detection projects"),
    _family(
        "hf_swin", "Swin-T/S/B/L of Hugging Face transformers (SwinModel, SwinBackbone, SwinForImageClassification)"
    ),
)
