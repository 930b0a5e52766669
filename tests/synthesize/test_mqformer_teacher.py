"""Our own model as a teacher: a box becomes a query, and has no part in another's answer."""

import re

import jax
import numpy as np
import pytest
import tiny
from sets import two_boxes

from mqformer_jax.checkpoint import Weights, save_weights
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import ClassInfo, DatasetInfo, Segment
from mqformer_jax.models.build import build_model
from mqformer_jax.synthesize import mqformer_teacher
from mqformer_jax.synthesize.annotations import usable_box
from mqformer_jax.synthesize.teachers import CAPTION_SCORERS, MASK_TEACHERS, Picture, make_teacher

INFO = DatasetInfo("toy", (ClassInfo(("ball",)), ClassInfo(("star",))), {})


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint


def saved(folder: str, config) -> str:
    params, frozen = jax.jit(lambda key: build_model(config.model, key)[1:])(jax.random.key(0))
    save_weights(folder, Weights(config, params, frozen), {})
    return folder


@pytest.fixture(scope="module")
def teacher(checkpoint):
    return mqformer_teacher.MqformerMasks(checkpoint)


def pictures(count: int) -> list[Picture]:
    made = two_boxes(count)
    return [Picture(r, INFO, r.decode_image(), (0, 1), np.stack([usable_box(r, i) for i in (0, 1)])) for r in made]


@pytest.mark.slow
def test_mask_of_a_box_does_not_depend_on_the_other_boxes(teacher):
    some = pictures(3)
    together = teacher(some, [p.boxes for p in some])
    for picture, drawn in zip(some, together):
        assert drawn.masks.shape == (2, 48, 64) and ((0 <= drawn.scores) & (drawn.scores <= 1)).all()
        (alone,) = teacher([picture], [np.concatenate([picture.boxes, picture.boxes * 0.9, picture.boxes[::-1]])])
        np.testing.assert_allclose(alone.masks.logits[:2], drawn.masks.logits, atol=1e-3)
    assert np.abs(together[0].masks.logits[0] - together[0].masks.logits[1]).max() > 0.1


def test_masks_match_the_denoising_query_outputs(teacher, checkpoint):
    from mqformer_jax.input.transforms import fit_image
    from mqformer_jax.models.queries import DenoisingQueries

    (picture,) = pictures(1)
    predictor = Predictor.from_checkpoint(checkpoint)
    image, size = fit_image(picture.image, predictor.canvas)
    text = predictor.embed(["ball", "star"], [False, False])[None]
    x0, y0, x1, y1 = (picture.boxes * size[1] / 64 / 64).T  # 64 x 48 pixels on a canvas of 64 x 64
    boxes = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1)[None].astype(np.float32)
    denoising = DenoisingQueries(np.array([[0, 1]]), boxes, np.array([[0, 1]]), np.ones((1, 2), bool))
    forward = jax.jit(lambda p, f, *asked: predictor.model(p, f)(*asked))
    outputs = forward(
        predictor.params, predictor.frozen, image[None], np.array([size]), text, np.ones((1, 2), bool), denoising
    )
    masks = np.einsum("qd,hwd->qhw", outputs.denoising.mask_embed[-1, 0], outputs.mask_features[0])
    (drawn,) = teacher([picture], [picture.boxes])
    np.testing.assert_allclose(drawn.masks.logits, masks, atol=1e-3)
    p = 1 / (1 + np.exp(-masks))
    np.testing.assert_allclose(
        drawn.scores, (p * (masks > 0)).sum((1, 2)) / np.maximum((masks > 0).sum((1, 2)), 1), atol=1e-4
    )


def test_segment_prompt_is_its_class_or_its_expression():
    made = two_boxes(1)[0]
    named = made.__class__(
        **{**vars(made), "segments": (Segment(1), Segment(texts=("red one",)), Segment(), Segment(foreground=True))}
    )
    picture = Picture(named, INFO, made.decode_image(), (), np.zeros((0, 4)))
    assert [mqformer_teacher._prompt(picture, i) for i in range(4)] == [
        ("star", False),
        ("red one", True),
        ("object", True),
        ("foreground", True),
    ]


def test_model_trained_without_denoising_is_rejected_as_teacher(tmp_path):
    config = tiny.get_config("train")
    config.denoising.num_queries = 0
    saved(str(tmp_path), config)
    with pytest.raises(ValueError, match=r"cannot predict masks from boxes: train it with denoising.num_queries > 0"):
        make_teacher(f"ours:{tmp_path}", MASK_TEACHERS)


@pytest.mark.slow
def test_scorer_rates_boxes_by_overlap_with_the_best_prediction(checkpoint):
    scorer = make_teacher(f"ours:{checkpoint}", CAPTION_SCORERS, "verifier")
    predictor, some = Predictor.from_checkpoint(checkpoint), pictures(2)
    captions = [[["a ball", "a star"], []], [["a ring"], ["a ball"]]]
    found = scorer(some, captions)
    assert [[f.shape for f in boxes] for boxes in found] == [[(2, 2), (0, 2)], [(1, 2), (1, 2)]]
    (answer,) = predictor.predict_raw([some[0].image], [predictor.embed(["a ball", "a star"], [True, True])])
    best = answer.boxes[answer.class_probs[:, 1].argmax()]
    own_box = Picture(some[0].record, INFO, some[0].image, (0,), best[None])
    ((fits,),) = scorer([own_box], [[["a star"]]])
    assert fits.tolist() == [[pytest.approx(1.0, abs=1e-3)]]


def test_teacher_name_contains_the_checkpoint_folder_and_step(checkpoint, teacher):
    assert re.fullmatch(r"ours:tiny_checkpoint\d*, step 0", teacher.name)
    with pytest.raises(FileNotFoundError, match="no checkpoint found"):
        make_teacher("ours:nowhere", MASK_TEACHERS)
