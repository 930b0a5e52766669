"""The losses of the matting refiner."""

from __future__ import annotations

import numpy as np
import pytest
from originals import assert_agrees

from mqformer_jax.matting.losses import BINOMIAL, laplacian_loss, matting_loss


def torch_laplacian(torch, a, b, levels: int = 5):
    """Hou and Liu's loss as the PyTorch ports have it, each pyramid by itself."""

    def pyramid(x) -> list:
        kernel = torch.outer(torch.tensor(BINOMIAL), torch.tensor(BINOMIAL))[None, None]
        bands, x = [], x[:, None]
        for _ in range(levels):
            blurred = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (2,) * 4, mode="reflect"), kernel)
            bands.append(x - blurred)
            x = blurred[..., ::2, ::2]
        return bands

    return sum(2**i * (p - q).abs().sum() for i, (p, q) in enumerate(zip(pyramid(a), pyramid(b)))) / a.numel()


@pytest.mark.parity
@pytest.mark.parametrize("side", [(64, 64), (96, 50)])
def test_laplacian_loss_matches_torch(side):
    import jax

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0, 1, (2, *side)).astype(np.float32) for _ in range(2))
    value, gradient = jax.jit(jax.value_and_grad(laplacian_loss))(a, b)
    theirs = torch_laplacian(torch, x := torch.tensor(a, requires_grad=True), torch.tensor(b))
    theirs.backward()
    assert_agrees("Laplacian pyramid loss", "forward", value, theirs.detach())
    assert_agrees("Laplacian pyramid loss", "gradient", gradient, x.grad)


def test_laplacian_loss_penalizes_blurred_edges_but_not_constant_offsets():
    edge = np.zeros((1, 64, 64), np.float32)
    edge[:, :, 32:] = 1
    soft = np.clip(np.linspace(-3, 4, 64), 0, 1).astype(np.float32)[None, None].repeat(64, 1)
    assert laplacian_loss(edge, soft) > 0.01
    assert laplacian_loss(edge, edge + 0.3) < 1e-5  # the L1 term sees that one


def test_matting_loss_ignores_padding_and_applies_pixel_weights():
    rng = np.random.default_rng(0)
    target, weight = rng.uniform(0, 1, (1, 64, 64)).astype(np.float32), np.ones((1, 64, 64), np.float32)
    weight[:, 32:] = 0
    wrong = target.copy()
    wrong[:, 32:] = 1 - wrong[:, 32:]
    small = wrong[:, ::2, ::2]
    assert sum(matting_loss({1: wrong}, target, weight).values()) == 0
    off = target.copy()
    off[:, :8] += 0.5
    weight[:, :8] = 5
    terms = matting_loss({1: off, 2: small}, target, weight)
    assert (
        terms["l1"] == pytest.approx(0.5 * 5 * 8 / (5 * 8 + 24), rel=1e-5)
        and terms["coarse"] > 0
        and terms["laplacian"] > 0
    )
