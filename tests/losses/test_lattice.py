"""Masks on a lattice, against PointRend's sampling at the lattice's pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from originals import assert_agrees
from pointrend import lattice_points, sample_maps
from scipy.ndimage import map_coordinates

from mqformer_jax.losses import costs, lattice

rng = np.random.default_rng(0)
STRIDE, CANVAS = 4, (20, 28)
SHAPE = (5, 7)


def bilinear(maps, points):
    """Bilinear at pixel centers, zero outside, by SciPy. maps: [n h w]; points: [n k 2]."""
    _, h, w = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    return np.stack(
        [
            map_coordinates(m, [p[:, 1] * h + 0.5, p[:, 0] * w + 0.5], order=1, mode="constant")
            for m, p in zip(padded, points)
        ]
    )


def test_reference_point_sampling_matches_scipy_bilinear_interpolation():
    maps = rng.normal(size=(3, 5, 7)).astype(np.float32)
    points = rng.uniform(-0.05, 1.05, (3, 50, 2)).astype(np.float32)
    assert_agrees("point sampling (SciPy)", "forward", sample_maps(maps, points), bilinear(maps, points), 1e-5)


@pytest.mark.parametrize(
    "stride, offset", [(4, (0, 0)), (4, (1, 2)), (4, (3, 3)), (2, (0, 1)), (2, (1, 0)), (1, (0, 0))]
)
def test_lattice_features_match_bilinear_sampling_at_lattice_pixels(stride, offset):
    features = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    points = lattice_points(CANVAS, stride, offset)
    expected = bilinear(features.transpose(2, 0, 1), np.tile(points.reshape(-1, 2), (3, 1, 1))).T
    found = lattice.at_offset(features, jnp.array(offset), stride, STRIDE)
    expected = expected.reshape(*points.shape[:2], 3)
    assert_agrees("features on the lattice (SciPy)", "forward", found, expected, 1e-5)


def test_lattice_losses_and_gradients_match_point_sampled_losses():
    """Values and gradients: weights of 0 and 1 on the lattice against PointRend's sampling of the chosen pixels."""
    features = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    embed = rng.normal(size=(2, 3)).astype(np.float32)
    masks = rng.random((2, *CANVAS)) < 0.5
    offset, count = (1, 3), 12
    chosen = np.stack([rng.permutation(35)[:count] for _ in range(2)])
    weight = np.zeros((2, 35), np.float32)
    np.put_along_axis(weight, chosen, 1, 1)
    points = lattice_points(CANVAS, STRIDE, offset).reshape(-1, 2)[chosen]
    truth = masks[:, offset[0] :: STRIDE, offset[1] :: STRIDE].reshape(2, -1).astype(np.float32)

    def ours(features, embed):
        logits = jnp.einsum("nd,hwd->nhw", embed, lattice.at_offset(features, jnp.array(offset), STRIDE, STRIDE))
        return sum(term.sum() for term in costs.entropy_and_dice(logits.reshape(2, -1), truth, weight))

    def theirs(features, embed):
        logits = sample_maps(jnp.einsum("nd,hwd->nhw", embed, features), points)
        drawn = sample_maps(masks.astype(np.float32), points)
        return sum(term.sum() for term in costs.entropy_and_dice(logits, drawn, jnp.ones((2, count))))

    (value, gradient), (wanted, wanted_gradient) = (
        jax.value_and_grad(f, argnums=(0, 1))(features, embed) for f in (ours, theirs)
    )
    assert_agrees("losses on the lattice (points)", "forward", value, wanted, 1e-5)
    for a, b in zip(gradient, wanted_gradient):
        assert_agrees("losses on the lattice (points)", "gradient", a, b, 1e-5)


@pytest.mark.parametrize("width", [3, 8, 13])
def test_unpack_inverts_numpy_packbits(width):
    masks = rng.random((2, 4, width)) < 0.5
    np.testing.assert_array_equal(lattice.unpack(np.packbits(masks, axis=-1), width), masks)


def test_lattice_step_approximates_num_points_and_offsets_are_disjoint():
    assert lattice.step_of((256, 256), 12544) == 2 and lattice.step_of((24, 24), 256) == 1
    x = np.arange(6 * 9 * 2).reshape(6, 9, 2)
    seen = [np.array(lattice.every(x, 3, jnp.array([a, b]), 0)) for a in range(3) for b in range(3)]
    np.testing.assert_array_equal(seen[5], x[1::3, 2::3])
    np.testing.assert_array_equal(np.sort(np.concatenate([s.reshape(-1) for s in seen])), x.reshape(-1))


def test_most_uncertain_quarter_of_candidate_pixels_is_weighted():
    """With as many candidates as pixels, no pixel is drawn twice, and the choice can be checked by sorting."""
    logits = rng.normal(size=(3, 24, 24)).astype(np.float32)
    inside = np.ones((24, 24), bool)
    inside[20:] = inside[:, 22:] = False
    weights = np.array(lattice.point_weights(lattice.draw_pixels(jax.random.key(0), inside, 256), logits))
    assert not weights[:, ~inside].any()
    magnitude = np.abs(logits).astype(jnp.bfloat16).astype(np.float32)
    limit = np.sort(magnitude[:, inside], axis=1)[:, inside.sum() // 4 - 1]
    uniform = weights - ((magnitude <= limit[:, None, None]) & inside)
    assert 0.05 < uniform[0][inside].mean() < 0.12  # a twelfth
    np.testing.assert_array_equal(uniform, np.broadcast_to(uniform[0], uniform.shape))
    assert set(np.unique(uniform)) == {0, 1}


def test_mean_point_count_is_num_points_and_uncertain_pixels_are_favored():
    rng = np.random.default_rng(0)  # its own, so that the result does not depend on which tests ran before
    logits, inside = rng.normal(size=(2, 64, 64)).astype(np.float32), np.ones((64, 64), bool)
    draw = jax.jit(lambda key: lattice.point_weights(lattice.draw_pixels(key, inside, 400), logits).sum((1, 2)))
    sums = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 50)])
    np.testing.assert_allclose(sums.mean(0), 400, rtol=0.15)
    near_zero = np.where(np.arange(64) < 8, 0.1, 5.0) * rng.uniform(0.5, 1, (1, 64, 64))
    drawn = lattice.draw_pixels(jax.random.key(1), inside, 400)
    weights = np.array(lattice.point_weights(drawn, near_zero.astype(np.float32)))[0]
    assert weights[:, :8].sum() > 0.35 * weights.sum()  # 13 % of the pixels
