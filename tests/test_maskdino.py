"""The whole of Mask DINO against numbers recorded from its own code: proposals, every decoder layer, masks, losses,
gradients.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from originals import assert_agrees
from pointrend import sample_maps

from mqformer_jax.convert.maskdino import head_plan
from mqformer_jax.convert.rules import apply, invert, leaves
from mqformer_jax.losses import costs
from mqformer_jax.losses.assignment import Pairs, Samples, matching_costs
from mqformer_jax.losses.costs import LossWeights
from mqformer_jax.losses.criterion import box_losses, class_loss
from mqformer_jax.losses.matcher import match
from mqformer_jax.losses.targets import ImageTargets
from mqformer_jax.models.mqformer import MQFormer


def recorded(folder: pathlib.Path, name: str) -> tuple[dict, dict, dict]:
    """Arrays, weights and description of a recording."""
    safetensors = pytest.importorskip("safetensors.numpy")
    stem = folder / "maskdino" / name
    about = json.loads(stem.with_suffix(".json").read_text())
    base = stem.with_name(about.get("base", name))
    weights, layout = (
        safetensors.load_file(base.with_suffix(".safetensors")),
        json.loads(base.with_suffix(".json").read_text()).get("weights", {}),
    )
    if "scale" in layout:
        weights = {key: value.astype(np.float32) * layout["scale"][key] for key, value in weights.items()}
        weights |= {key: weights[other] for key, other in layout["alias_of"].items()}
    arrays = dict(np.load(base.with_suffix(".npz"))) | dict(np.load(stem.with_suffix(".npz")))
    return arrays, weights, about.get("model")


@functools.cache
def converted(folder: pathlib.Path, name: str, queries: str = "conditional"):
    """Our model with the recording's weights, and what it says of the recording's inputs.

    The recording starts at the backbone's features, so the backbone is a small one of those widths, not run.
    """
    arrays, weights, about = recorded(folder, name)
    plan = head_plan({key: value.shape for key, value in weights.items()})
    model = plan.config.model
    model.update(
        heads=about["enc_nheads"],
        num_conditional=about["num_queries"],
        initialize_box_type=about["initialize_box_type"],
        dtype="float32",
        remat="none",
    )
    model.backbone.update(name="convnet", widths=(8, *about["in_channels"]))
    if queries == "mixed":
        model.update(queries="mixed", num_learnable=5, interaction="exchange", region_embedding=True)
    graph, state = nnx.split(nnx.eval_shape(lambda: MQFormer(model, rngs=nnx.Rngs(0))))
    pure = nnx.to_pure_dict(state)
    named = leaves(pure)
    values, report = apply(plan, weights, named)
    assert not report.unused and not report.mismatched, report.table()
    extra = (
        ("backbone/", "learnable/", "decoder/layers/exchange/", "region_embedding")
        if queries == "mixed"
        else ("backbone/",)
    )
    assert all(path.startswith(extra) for path in report.missing), report.table()
    filled = [jnp.asarray(values.get(path, np.zeros(leaf.shape))) for path, leaf in named.items()]
    params = jax.tree.unflatten(jax.tree.structure(pure), filled)
    features = {4 << i: jnp.asarray(arrays[f"in/res{i + 2}"].transpose(0, 2, 3, 1)) for i in range(4)}
    height, width = about["image_size"]

    def run(params, features):
        model_state = state
        nnx.replace_by_pure_dict(model_state, params)
        ours = nnx.merge(graph, model_state)
        b = features[4].shape[0]
        tokens = jnp.broadcast_to(jnp.arange(1, about["num_classes"] + 1)[:, None], (b, about["num_classes"], 1))
        text = ours.embed_text(tokens, jnp.zeros(tokens.shape[:2], bool))
        size = jnp.full((b, 2), jnp.array([height, width]))
        return ours.segment(features, (height, width), size, text, jnp.ones(tokens.shape[:2], bool))

    return params, features, run, jax.jit(run)(params, features)


def masks(outputs, stage: int):
    return np.einsum("bqd,bhwd->bqhw", outputs.matching.mask_embed[stage], outputs.mask_features)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["maskdino_tiny_s0", "maskdino_tiny_s0_bitmask", "maskdino_tiny_s0_mask2box", "maskdino_h256_s0"]
)
def test_proposals_and_decoder_layers_match_mask_dino(fixtures, name):
    """h256 is the code as released (width 256, high2low, three levels); tiny has four levels and both box
    initializations.
    """
    arrays, _, about = recorded(fixtures, name)
    _, _, _, out = converted(fixtures, name)
    stages = ["interm", *(f"pred/{i}" for i in range(about["dec_layers"] + 1))]
    assert out.matching.boxes.shape[0] == len(stages)
    for i, stage in enumerate(stages):
        close = functools.partial(assert_agrees, kind="forward", told=stage)
        close(
            "Mask DINO proposals and layers: classes",
            ours=out.matching.class_logits[i],
            theirs=arrays[f"{stage}/pred_logits"],
        )
        close("Mask DINO proposals and layers: boxes", ours=out.matching.boxes[i], theirs=arrays[f"{stage}/pred_boxes"])
        if f"{stage}/pred_masks" in arrays:
            close("Mask DINO proposals and layers: masks", ours=masks(out, i), theirs=arrays[f"{stage}/pred_masks"])


NAMES = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice", "box": "loss_bbox", "giou": "loss_giou"}


def stages_of(about: dict) -> list[str]:
    """The recording's stages as ours are stacked."""
    return ["interm", *(f"aux_{i}" for i in range(about["criterion"]["dec_layers"])), "last"]


def image(arrays, i: int, classes: int) -> ImageTargets:
    """One image's recorded targets: every class is a prompt, all of them exhaustively labeled."""
    labels, boxes, drawn = (arrays[f"target/{name}_{i}"] for name in ("labels", "boxes", "masks"))
    n, (h, w) = len(labels), drawn.shape[1:]
    targets = ImageTargets(
        num_targets=np.array(n), size=np.array([h, w]), boxes=boxes, positive=np.eye(classes, dtype=bool)[labels],
        negative=np.zeros((n, classes), bool), exhaustive=np.ones(classes, bool), has_mask=np.ones(n, bool),
        offset=np.zeros(2, int), masks=drawn.astype(bool), inside=np.ones((h, w), bool), known=np.ones((h, w), bool),
        canvas=(h, w),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, targets)


def of_image(outputs, i: int, stage: int):
    return jax.tree.map(lambda x: x[stage : stage + 1, i], outputs.matching), outputs.mask_features[i]


@pytest.fixture(scope="module")
def loss_recording(fixtures):
    arrays, gradients, _ = recorded(fixtures, "matcher_criterion_s0")
    about = json.loads((fixtures / "maskdino" / "matcher_criterion_s0.json").read_text())
    draws = {name: arrays[f"rand_log/{k:03d}"] for k, name in enumerate(about["rand_log_order"])}
    return arrays, draws, gradients, about


@pytest.mark.parity
@pytest.mark.slow
def test_matching_costs_and_assignments_match_mask_dino(fixtures, loss_recording):
    arrays, draws, _, about = loss_recording
    _, _, _, out = converted(fixtures, "maskdino_tiny_s0")
    cost_of = jax.jit(functools.partial(matching_costs, weights=LossWeights()))
    for i in range(out.mask_features.shape[0]):
        targets = image(arrays, i, about["criterion"]["num_classes"])
        for s, stage in enumerate(stages_of(about)):
            points = draws[f"{stage}/matcher_points_{i}"][0]
            predictions, features = of_image(out, i, s)
            cost, in_ignored_area = cost_of(at_points(points, features, targets), predictions, targets)
            assert_agrees(
                "Mask DINO matching cost", "forward", cost[0].T, arrays[f"{stage}/cost_total_{i}"], told=f"{stage} {i}"
            )
            assert not in_ignored_area.any()
            query = np.array(jax.jit(match)(cost[0], targets.num_targets))
            target = np.argsort(query)
            np.testing.assert_array_equal(query[target], arrays[f"{stage}/match_src_{i}"])
            np.testing.assert_array_equal(target, arrays[f"{stage}/match_tgt_{i}"])


def at_points(points, features, targets: ImageTargets) -> Samples:
    """The mask features and masks at recorded points [k 2], instead of on the lattice."""
    sample = lambda maps: sample_maps(maps, jnp.broadcast_to(points, (len(maps), *points.shape)))
    known = jnp.ones(len(points))
    return Samples(
        sample(features.transpose(2, 0, 1)).T, sample(targets.masks.astype(jnp.float32)), known, jnp.zeros_like(known)
    )


def recorded_losses(outputs, arrays, about) -> dict:
    """Each term [stages], divided by the targets of both images, at the recorded points for the recorded pairs."""
    stages, queries = stages_of(about), outputs.matching.boxes.shape[2]
    all_targets = [image(arrays, i, about["criterion"]["num_classes"]) for i in range(outputs.mask_features.shape[0])]
    count = sum(targets.boxes.shape[0] for targets in all_targets)
    found, first = dict.fromkeys(NAMES, 0.0), 0
    for i, targets in enumerate(all_targets):
        n = targets.boxes.shape[0]
        both = lambda name, i=i: np.stack([arrays[f"{stage}/{name}_{i}"] for stage in stages])
        known = np.ones((len(stages), n), bool), np.ones((len(stages), queries), bool)
        pairs = Pairs(both("match_src"), both("match_tgt"), *known)
        points = np.stack([arrays[f"{stage}/loss_points"][first : first + n] for stage in stages])
        predictions = jax.tree.map(lambda x, i=i: x[:, i], outputs.matching)
        chosen = jnp.take_along_axis(predictions.mask_embed, pairs.query[..., None], 1)
        logits = jnp.einsum("srd,hwd->srhw", chosen, outputs.mask_features[i])
        drawn = sample_maps(targets.masks[pairs.target].astype(jnp.float32), points)
        entropy, dice = costs.entropy_and_dice(sample_maps(logits, points), drawn, jnp.ones(drawn.shape))
        terms = {
            "class": class_loss(predictions.class_logits, targets, pairs),
            "mask": entropy.sum(1),
            "dice": dice.sum(1),
            **box_losses(predictions.boxes, targets, pairs),
        }
        found = {name: found[name] + terms[name] / count for name in NAMES}
        first += n
    return found


@pytest.mark.parity
@pytest.mark.slow
def test_losses_and_parameter_gradients_match_mask_dino(fixtures, loss_recording):
    arrays, _, gradients, about = loss_recording
    params, features, run, _ = converted(fixtures, "maskdino_tiny_s0")

    @jax.jit
    def losses(params):
        terms = recorded_losses(run(params, features), arrays, about)
        return sum(about["weight_dict"][NAMES[name]] * value.sum() for name, value in terms.items()), terms

    (total, terms), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True, allow_int=True))(params)
    for name, value in terms.items():
        assert_agrees(
            "Mask DINO losses",
            "forward",
            value,
            [arrays[f"{stage}/{NAMES[name]}"] for stage in stages_of(about)],
            told=name,
        )
    assert float(total) == pytest.approx(float(arrays["total_weighted"]), rel=1e-5)
    _, weights, _ = recorded(fixtures, "maskdino_tiny_s0")
    ours = invert(head_plan({key: value.shape for key, value in weights.items()}), leaves(gradient))
    zero = 1e-5 * max(about["grad_norms"].values())  # what the norm of a gradient that is zero in truth may be
    for key, norm in about["grad_norms"].items():
        assert np.linalg.norm(ours[key]) == pytest.approx(norm, rel=1e-4, abs=zero), key
    scale = max(np.abs(value).max() for value in gradients.values())
    close = functools.partial(
        assert_agrees, "Mask DINO: gradient of the loss in every parameter", "gradient", scale=scale
    )
    for key, value in gradients.items():
        close(ours[key], value, told=key)


@pytest.mark.parity
@pytest.mark.slow
def test_mixed_model_with_mask_dino_weights_keeps_its_conditional_outputs(fixtures):
    """What MQ-Former adds starts as the identity: the conditional queries of a converted Mask DINO are exactly its
    own.
    """
    _, _, _, alone = converted(fixtures, "maskdino_tiny_s0")
    _, _, _, mixed = converted(fixtures, "maskdino_tiny_s0", "mixed")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, :, 5:], b, atol=1e-5), mixed.matching, alone.matching)
