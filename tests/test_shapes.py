"""The shapes in annotations are executed while tests run, so what they say is true."""

from __future__ import annotations

import ast
import inspect
import pathlib
import typing

import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped

import mqformer_jax
from mqformer_jax.input.batch import Batch
from mqformer_jax.losses.costs import class_cost
from mqformer_jax.models.deformable_attention import ms_deform_attn

zeros = lambda *shape: np.zeros(shape, np.float32)
ONE_NUMBER = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)


@pytest.mark.parametrize(
    "logits, positive",
    [
        (zeros(6), zeros(2, 3)),
        (zeros(6, 3), zeros(2, 4)),
        (zeros(6, 3), np.zeros((2, 3), bool)),
    ],
    ids=["another rank", "other prompts", "another type"],
)
def test_arrays_that_do_not_fit_their_annotations_are_refused(logits, positive):
    assert class_cost(zeros(6, 3), zeros(2, 3)).shape == (2, 6)
    with pytest.raises(TypeCheckError):
        class_cost(logits, positive)


@pytest.mark.parametrize(
    "locations, weights", [((1, 5, 2, 3, 2), (1, 5, 2, 1, 3)), ((1, 5, 2, 1, 3, 2), (1, 5, 2, 1, 4))]
)
def test_attention_rejects_wrong_rank_and_wrong_number_of_points(locations, weights):
    maps, shapes = zeros(1, 12, 2, 4), ((3, 4),)
    assert ms_deform_attn(maps, shapes, zeros(1, 5, 2, 1, 3, 2), zeros(1, 5, 2, 1, 3)).shape == (1, 5, 8)
    with pytest.raises(TypeCheckError):
        ms_deform_attn(maps, shapes, zeros(*locations), zeros(*weights))


def test_batch_fields_match_their_annotations(tiny_batch):
    """They are not checked where one is made: transformations make ones that hold something else."""
    kinds = {name: typing.get_args(hint) for name, hint in inspect.get_annotations(Batch, eval_str=True).items()}

    def wrong(batch: Batch) -> list[str]:
        with jaxtyped("context"):
            return [name for name in kinds if not any(isinstance(getattr(batch, name), kind) for kind in kinds[name])]

    assert wrong(tiny_batch) == []
    assert wrong(tiny_batch.replace(has_mask=tiny_batch.has_mask[:, 1:])) == ["has_mask"]


def test_annotation_axes_use_only_single_valued_expressions():
    """jaxtyping evaluates an axis as Python: "2|4" is no choice, but 6."""
    axes, wrong = 0, []
    for path in sorted(pathlib.Path(mqformer_jax.__file__).parent.rglob("*.py")):
        for shape in _shapes(ast.parse(path.read_text(encoding="utf-8"))):
            for axis in shape.split():
                axes += 1
                tree = ast.parse(axis.lstrip("*#_?") or "_", mode="eval")
                kinds = [n.op for n in ast.walk(tree) if isinstance(n, ast.BinOp)]
                kinds += [n for n in ast.walk(tree) if isinstance(n, (ast.BoolOp, ast.Compare, ast.UnaryOp, ast.IfExp))]
                if not all(isinstance(kind, ONE_NUMBER) for kind in kinds):
                    wrong.append(f"{path.name}: {shape!r}")
    assert axes > 500 and not wrong


def _shapes(module: ast.Module) -> typing.Iterator[str]:
    """The strings inside subscripts of what a module has from jaxtyping."""
    imports = [n for n in ast.walk(module) if isinstance(n, ast.ImportFrom) and n.module == "jaxtyping"]
    names = {alias.asname or alias.name for n in imports for alias in n.names}
    for node in ast.walk(module):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield ast.literal_eval(node.slice.elts[1])
