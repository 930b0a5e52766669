import jax
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.input.transforms import fit_image
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.predict import Predictor
from mqformer_jax.train_step import build_model


@pytest.fixture(scope="module")
def predictor():
    config = get_config()
    params, frozen = jax.jit(lambda k: build_model(config, k)[1:])(jax.random.key(0))
    return Predictor(config, params, frozen, make_tokenizer(config.model.text))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)


def test_segments_have_the_size_of_the_image_whatever_it_is(predictor, image):
    for picture in (image, image[:1, :1], np.zeros((200, 30, 3), np.uint8)):
        found = predictor(picture, ["sky", "the red star"], task="referring")
        assert found.masks.shape == (2, *picture.shape[:2])
        assert found.boxes.min() >= 0 and (found.boxes <= np.tile(picture.shape[1::-1], 2)).all()


def test_panoptic_segments_do_not_overlap_and_instances_are_ranked(predictor, image):
    predictor.config.eval.keep = 0.0
    panoptic = predictor(image, ["sky", "ball"], task="panoptic", regions=[True, False])
    assert panoptic.panoptic.shape == image.shape[:2] and panoptic.masks.sum(0).max(initial=0) <= 1
    instances = predictor(image, ["sky", "ball"], task="instance", regions=[True, False])
    assert (np.diff(instances.scores) <= 0).all() and (instances.prompt_ids == 1).all()


def test_an_image_is_answered_alike_alone_and_in_a_batch(predictor, image):
    prompts = predictor.embed(["ball", "star"], [False, False])
    few = predictor.embed(["sky"], [True])
    alone = predictor.ask([image], [prompts])[0]
    _, beside = predictor.ask([image[:20], image], [few, prompts], batch=3)
    np.testing.assert_allclose(alone.class_probs, beside.class_probs, atol=1e-5)
    np.testing.assert_allclose(alone.boxes, beside.boxes, atol=1e-2)


def test_boxes_come_back_in_pixels_of_the_image(predictor, image):
    """A box that fills the valid part of the canvas is the whole image."""
    from mqformer_jax.predict import _to_pixels

    _, valid = fit_image(image, (64, 64))
    fraction = np.array([[valid[1] / 128, valid[0] / 128, valid[1] / 64, valid[0] / 64]], np.float32)
    np.testing.assert_allclose(_to_pixels(fraction, (64, 64), valid, (50, 90)), [[0, 0, 90, 50]], atol=1e-4)


def test_no_prompt_and_an_unknown_task_are_one_line(predictor, image):
    with pytest.raises(ValueError, match="no prompts"):
        predictor(image, [])
    with pytest.raises(ValueError, match="panoptic, instance, semantic, referring, foreground"):
        predictor(image, ["sky"], task="depth")


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_image_that_is_not_rgb_bytes_is_one_line(predictor, wrong):
    with pytest.raises(ValueError, match="uint8 RGB"):
        predictor(wrong, ["sky"])


def test_regions_must_be_one_a_prompt(predictor, image):
    with pytest.raises(ValueError, match="1 regions for 2 prompts"):
        predictor(image, ["sky", "ball"], regions=[True])


def test_semantic_gives_every_pixel_to_one_prompt(predictor, image):
    found = predictor(image, ["sky", "ball"], task="semantic")
    assert (found.masks.sum(0) == 1).all() and (found.panoptic > 0).all()


def test_templates_are_averaged_as_directions(predictor):
    """One template changes nothing; of several, the unit vectors are averaged (CLIP, OpenSeeD)."""
    texts, regions = ["sky", "ball"], [True, False]
    np.testing.assert_allclose(predictor.embed(texts, regions), predictor.embed(texts, regions, ["{}"]), atol=1e-6)
    templates = ["{}", "a photo of {}", "the small {}"]
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    merge = lambda t: np.array(predictor._encode(predictor.params, predictor.frozen, predictor.tokenizer([t.format(x) for x in texts])))
    each = [merge(t) for t in templates]
    found = np.array(predictor.embed(texts, regions, templates)) - np.array(predictor.params["grain"])[[1, 0]]
    np.testing.assert_allclose(unit(found), unit(sum(unit(e) for e in each)), atol=1e-5)


def test_a_closed_set_model_answers_to_its_classes_and_to_nothing_else(image):
    """What a converted Mask DINO is: a table of classes, plain dot products, conditional queries."""
    config = get_config()
    config.model.update(queries="conditional", score="dot", grain=False, box_init="bitmask")
    config.model.text.update(name="classes", tokenizer="classes", classes=("sky", "traffic light"), context=1, embed_dim=9)
    params, frozen = jax.jit(lambda k: build_model(config, k)[1:])(jax.random.key(0))
    predictor = Predictor(config, params, frozen, make_tokenizer(config.model.text))
    found = predictor(image, ["Traffic  light"], task="instance")
    assert len(found.scores) > 0 and (found.prompt_ids == 0).all()
    with pytest.raises(ValueError, match="'trafic lights'.*closest is 'traffic light'") as error:
        predictor(image, ["trafic lights"])
    assert "\n" not in str(error.value)
