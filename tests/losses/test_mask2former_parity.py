"""Points, costs, losses and matching against Hugging Face's Mask2Former and Deformable DETR."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from originals import assert_agrees
from pointrend import sample_maps

from mqformer_jax.losses import costs
from mqformer_jax.losses.matcher import match

torch = pytest.importorskip("torch")
mask2former = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
detr = pytest.importorskip("transformers.loss.loss_for_object_detection")
deformable = pytest.importorskip("transformers.loss.loss_deformable_detr")
pytestmark = pytest.mark.parity

QUERIES, TARGETS, POINTS = 7, 4, 33
mask_costs, sample = jax.jit(costs.mask_costs), jax.jit(sample_maps)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def close(component: str, kind: str, ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_agrees(f"{component} (transformers)", kind, a, b.detach(), 1e-5)


def array(tensor) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())


def masks(n: int, k: int):
    """Mask values at points: zeros, ones, and between them, as on an edge."""
    return (torch.randn(n, k) * 2).clamp(0, 1)


def boxes(n: int):
    """cx, cy, w, h as fractions of an image."""
    return torch.cat([0.2 + 0.6 * torch.rand(n, 2), 0.1 + 0.3 * torch.rand(n, 2)], 1)


def with_gradients(f, *inputs, cotangent):
    """f(*inputs) and its gradients."""

    def run(inputs, cotangent):
        values, pull_back = jax.vjp(f, *inputs)
        return values, pull_back(cotangent)

    return jax.jit(run)(inputs, cotangent)


def test_point_sampling_matches_mask2former_inside_and_outside_the_map():
    maps = torch.randn(3, 1, 5, 8, requires_grad=True)
    points = (torch.rand(3, 40, 2) * 1.6 - 0.3).requires_grad_()
    expected = mask2former.sample_point(maps, points, align_corners=False).squeeze(1)
    assert ((points < 0) | (points > 1)).any() and (expected == 0).any()
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    values, gradients = with_gradients(sample_maps, array(maps[:, 0]), array(points), cotangent=array(cotangent))
    close("point sampling", "forward", [values], [expected])
    close("point sampling", "gradient", gradients, (maps.grad[:, 0], points.grad))


def test_pairwise_mask_costs_match_mask2former():
    logits, targets = 3 * torch.randn(QUERIES, POINTS), masks(TARGETS, POINTS)
    entropy, dice = mask_costs(array(logits), array(targets), jnp.ones(POINTS))
    theirs = (
        mask2former.pair_wise_sigmoid_cross_entropy_loss(logits, targets),
        mask2former.pair_wise_dice_loss(logits, targets),
    )
    close("pairwise mask costs", "forward", (entropy.T, dice.T), theirs)


def test_mask_loss_values_and_gradients_match_mask2former():
    logits, targets = (3 * torch.randn(TARGETS, POINTS)).requires_grad_(), masks(TARGETS, POINTS)
    expected = mask2former.sigmoid_cross_entropy_loss(logits, targets, 3), mask2former.dice_loss(logits, targets, 3)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in expected]
    ours = lambda x: [loss.sum() / 3 for loss in costs.entropy_and_dice(x, array(targets), jnp.ones(targets.shape))]
    values, found = jax.jit(lambda x: (ours(x), jax.jacrev(ours)(x)))(array(logits))
    close("mask losses", "forward", values, expected)
    close("mask losses", "gradient", found, gradients)


def test_zero_weight_points_do_not_affect_mask_costs():
    logits, targets = 3 * torch.randn(QUERIES, POINTS), masks(TARGETS, POINTS)
    weight = (jnp.arange(POINTS) < 20).astype(jnp.float32)
    entropy, dice = mask_costs(array(logits), array(targets), weight)
    logits, targets = logits[:, :20], targets[:, :20]
    theirs = (
        mask2former.pair_wise_sigmoid_cross_entropy_loss(logits, targets),
        mask2former.pair_wise_dice_loss(logits, targets),
    )
    close("pairwise mask costs", "forward", (entropy.T, dice.T), theirs)


@pytest.mark.parametrize("seed", range(3))
def test_assignment_matches_the_mask2former_matcher(seed):
    """Their cost matrix is rebuilt of our parts: their class cost is the softmax's, at their points, drawn from one
    seed.
    """
    torch.manual_seed(seed)
    maps, labels = 3 * torch.randn(1, QUERIES, 6, 9), torch.randint(0, 5, (TARGETS,))
    classes, targets = torch.randn(1, QUERIES, 6), (torch.randn(TARGETS, 12, 18) > 0).float()
    matcher = mask2former.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=4.0, num_points=POINTS)
    torch.manual_seed(seed)
    query, target = matcher(maps, classes, [targets], [labels])[0]
    torch.manual_seed(seed)
    points = array(torch.rand(1, POINTS, 2))
    at_points = lambda x: sample(array(x), jnp.broadcast_to(points, (len(x), POINTS, 2)))
    entropy, dice = mask_costs(at_points(maps[0]), at_points(targets), jnp.ones(POINTS))
    named = array(classes[0].softmax(-1)[:, labels]).T
    assigned = jax.jit(match)(5 * entropy + 4 * dice - 2 * named, TARGETS)
    np.testing.assert_array_equal(assigned[np.asarray(target)], query)


def test_focal_loss_values_and_gradients_match_detr():
    logits = (3 * torch.randn(QUERIES, 5)).requires_grad_()
    targets = (torch.rand(QUERIES, 5) > 0.7).float()
    expected = detr.sigmoid_focal_loss(logits, targets, 3)
    expected.backward()
    value, gradient = jax.jit(jax.value_and_grad(lambda x: costs.focal(x, array(targets)).mean(1).sum() / 3))(
        array(logits)
    )
    close("focal", "forward", [value], [expected])
    close("focal", "gradient", [gradient], [logits.grad])


def test_giou_values_and_gradients_match_detr():
    """In pixels, where the 1e-6 that ours adds to areas is nothing."""
    ours, theirs = (20 * boxes(QUERIES)).requires_grad_(), 20 * boxes(TARGETS)
    expected = detr.generalized_box_iou(detr.center_to_corners_format(ours), detr.center_to_corners_format(theirs))
    assert (expected < 0).any() and (expected > 0).any()
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    run = lambda a: costs.giou(costs.corners(a)[:, None], costs.corners(array(theirs))[None])
    values, (gradient,) = with_gradients(run, array(ours), cotangent=array(cotangent))
    close("GIoU", "forward", [values], [expected])
    close("GIoU", "gradient", [gradient], [ours.grad])


def test_giou_of_empty_boxes_is_finite_with_finite_gradients():
    nothing = jnp.zeros((1, 4))
    value, gradient = jax.jit(jax.value_and_grad(lambda a: costs.giou(a, nothing).sum()))(nothing)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("seed", range(3))
def test_class_and_box_assignment_matches_deformable_detr(seed):
    torch.manual_seed(seed)
    logits, labels, found, wanted = (
        torch.randn(1, QUERIES, 5),
        torch.randint(0, 5, (TARGETS,)),
        boxes(QUERIES),
        boxes(TARGETS),
    )
    matcher = deformable.DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
    query, target = matcher({"logits": logits, "pred_boxes": found[None]}, [{"class_labels": labels, "boxes": wanted}])[
        0
    ]

    @jax.jit
    def assign(logits, named, found, wanted):
        classes = costs.class_cost(logits, named)
        distance = jnp.abs(found[None] - wanted[:, None]).sum(-1)
        overlap = costs.giou(costs.corners(found)[None], costs.corners(wanted)[:, None])
        return match(2 * classes + 5 * distance - 2 * overlap, TARGETS)

    assigned = assign(array(logits[0]), jax.nn.one_hot(array(labels), 5), array(found), array(wanted))
    np.testing.assert_array_equal(assigned[np.asarray(target)], query)
