import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mqformer_jax.parallel.mesh import make_mesh
from mqformer_jax.parallel.rules import shardings

RULES = [(r"ffn/.*kernel", ("fsdp", "tensor")), (r"kernel", ("fsdp", None))]


def test_first_matching_rule_determines_the_sharding():
    mesh = make_mesh((2, 2, 2))
    tree = {"ffn": {"kernel": np.zeros((3, 8, 8))}, "attention": {"kernel": np.zeros((8, 5)), "bias": np.zeros(8)}}
    found = jax.tree.map(lambda s: s.spec, shardings(tree, mesh, RULES))
    assert found == {
        "ffn": {"kernel": P(None, "fsdp", "tensor")},
        "attention": {"kernel": P("fsdp", None), "bias": P()},
    }


def test_mesh_axis_that_does_not_divide_a_dimension_is_dropped():
    found = shardings({"kernel": np.zeros((3, 8))}, make_mesh((2, 4, 1)), RULES)
    assert found["kernel"].spec == P(None, None)


def test_mesh_that_does_not_fit_the_devices_is_rejected():
    assert dict(make_mesh((-1, 2, 1)).shape) == {"data": len(jax.devices()) // 2, "fsdp": 2, "tensor": 1}
    with pytest.raises(ValueError, match="config.mesh"):
        make_mesh((3, 1, 1))
