import jax
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.checkpoint import Weights, save_weights
from mqformer_jax.inference.predictor import Predictor, padded_length
from mqformer_jax.input.transforms import fit_image
from mqformer_jax.models.build import build_model
from mqformer_jax.models.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def predictor(tiny_weights):
    config = get_config()
    return Predictor(config, *tiny_weights, make_tokenizer(config.model.text))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)


def test_segments_have_the_image_size_for_any_image_shape(predictor, image):
    for picture in (image, image[:1, :1], np.zeros((200, 30, 3), np.uint8)):
        found = predictor(picture, ["sky", "the red star"], task="referring")
        assert found.masks.shape == (2, *picture.shape[:2])
        assert found.boxes.min() >= 0 and (found.boxes <= np.tile(picture.shape[1::-1], 2)).all()


def test_panoptic_segments_do_not_overlap_and_instances_are_ranked(predictor, image):
    predictor.config.eval.object_mask_threshold = 0.0
    panoptic = predictor(image, ["sky", "ball"], task="panoptic", regions=[True, False])
    assert panoptic.panoptic.shape == image.shape[:2] and panoptic.masks.sum(0).max(initial=0) <= 1
    instances = predictor(image, ["sky", "ball"], task="instance", regions=[True, False])
    assert (np.diff(instances.scores) <= 0).all() and (instances.prompt_ids == 1).all()


def test_batched_prediction_matches_single_prediction(predictor, image):
    prompts = predictor.embed(["ball", "star"], [False, False])
    few = predictor.embed(["sky"], [True])
    alone = predictor.predict_raw([image], [prompts])[0]
    _, beside = predictor.predict_raw([image[:20], image], [few, prompts], batch=3)
    np.testing.assert_allclose(alone.class_probs, beside.class_probs, atol=1e-5)
    np.testing.assert_allclose(alone.boxes, beside.boxes, atol=1e-2)


@pytest.mark.slow
def test_prediction_on_several_devices_matches_one_device(predictor, image):
    devices = jax.devices()[:4]
    several = Predictor(predictor.config, predictor.params, predictor.frozen, predictor.tokenizer, devices)
    images, texts = [image, image[:20], image[:, :30], image[10:], image[5:]], ["sky", "ball"]
    embedded = [predictor.embed(texts, [True, False])] * len(images)
    for one, other in zip(predictor.predict_raw(images, embedded), several.predict_raw(images, embedded)):
        np.testing.assert_allclose(one.class_probs, other.class_probs, atol=1e-5)
        np.testing.assert_allclose(one.masks.logits, other.masks.logits, atol=1e-3)
    assert len(several.params["region_embedding"].devices()) == 4


def test_boxes_are_returned_in_image_pixels(predictor, image):
    """A box that fills the valid part of the canvas is the whole image."""
    from mqformer_jax.inference.predictor import _to_pixels

    _, valid = fit_image(image, (64, 64))
    fraction = np.array([[valid[1] / 128, valid[0] / 128, valid[1] / 64, valid[0] / 64]], np.float32)
    np.testing.assert_allclose(_to_pixels(fraction, (64, 64), valid, (50, 90)), [[0, 0, 90, 50]], atol=1e-4)


def test_missing_prompts_and_unknown_task_are_rejected(predictor, image):
    with pytest.raises(ValueError, match="no prompts"):
        predictor(image, [])
    with pytest.raises(ValueError, match="panoptic, instance, semantic, referring, foreground"):
        predictor(image, ["sky"], task="depth")


@pytest.mark.parametrize(
    "wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_image_that_is_not_uint8_rgb_is_rejected(predictor, wrong):
    with pytest.raises(ValueError, match="uint8 RGB"):
        predictor(wrong, ["sky"])


def test_regions_must_have_one_value_per_prompt(predictor, image):
    with pytest.raises(ValueError, match="1 values for 2 prompts"):
        predictor(image, ["sky", "ball"], regions=[True])


def test_semantic_gives_every_pixel_to_one_prompt(predictor, image):
    found = predictor(image, ["sky", "ball"], task="semantic")
    assert (found.masks.sum(0) == 1).all() and (found.panoptic > 0).all()


def test_prompt_template_embeddings_are_averaged_as_unit_vectors(predictor):
    """One template changes nothing; of several, the unit vectors are averaged (CLIP, OpenSeeD)."""
    texts, regions = ["sky", "ball"], [True, False]
    np.testing.assert_allclose(predictor.embed(texts, regions), predictor.embed(texts, regions, ["{}"]), atol=1e-6)
    templates = ["{}", "a photo of {}", "the small {}"]
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    merge = lambda t: np.array(
        predictor.encode_tokens(predictor.params, predictor.frozen, predictor.tokenizer([t.format(x) for x in texts]))
    )
    each = [merge(t) for t in templates]
    of_regions = np.array(predictor.params["region_embedding"])[[1, 0]]
    found = np.array(predictor.embed(texts, regions, templates)) - of_regions
    np.testing.assert_allclose(unit(found), unit(sum(unit(e) for e in each)), atol=1e-5)


@pytest.mark.slow
def test_closed_set_model_accepts_only_its_own_classes(image):
    """What a converted Mask DINO is: a table of classes, plain dot products, conditional queries."""
    config = get_config()
    config.model.update(queries="conditional", score="dot", region_embedding=False, initialize_box_type="bitmask")
    config.model.text.update(
        name="classes", tokenizer="classes", classes=("sky", "traffic light"), context=1, embed_dim=9
    )
    params, frozen = jax.jit(lambda k: build_model(config.model, k)[1:])(jax.random.key(0))
    predictor = Predictor(config, params, frozen, make_tokenizer(config.model.text))
    found = predictor(image, ["Traffic  light"], task="instance")
    assert len(found.scores) > 0 and (found.prompt_ids == 0).all()
    with pytest.raises(ValueError, match="'trafic lights'.*closest is 'traffic light'") as error:
        predictor(image, ["trafic lights"])
    assert "\n" not in str(error.value)


def test_image_list_gives_the_same_results_as_single_images(predictor, image):
    images = [image, image[:20], image[:, :30]]
    together = predictor(images, ["sky", "ball"], task="referring")
    for one, found in zip(images, together):
        alone = predictor(one, ["sky", "ball"], task="referring")
        assert found.masks.shape == alone.masks.shape
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


@pytest.mark.parametrize("task", ["referring", "panoptic", "instance"])
def test_predictions_can_be_limited_to_one_query_kind(predictor, image, task):
    learnable = predictor.config.model.num_learnable
    found = {
        kind: predictor(image, ["sky", "ball"], task=task, queries=kind, score=0.0).query_ids
        for kind in ("learnable", "conditional")
    }
    assert len(found["learnable"]) and (found["learnable"] < learnable).all()
    assert len(found["conditional"]) and (found["conditional"] >= learnable).all()
    with pytest.raises(ValueError, match="all, learnable, conditional"):
        predictor(image, ["sky"], queries="both")


def test_score_threshold_removes_lower_scoring_predictions(predictor, image):
    every = predictor(image, ["sky", "ball"], task="instance")
    middle = float(np.median(every.scores))
    some = predictor(image, ["sky", "ball"], task="instance", score=middle)
    assert (some.scores > middle).all() and 0 < len(some) == (every.scores > middle).sum()
    assert not predictor(image, ["ball"], task="referring", score=1.0).masks.any()


def test_a_text_is_encoded_once(predictor, monkeypatch):
    first = predictor.embed(["a new word", "ball"], [False, False])
    monkeypatch.setattr(predictor, "encode_tokens", None)
    again = predictor.embed(["ball", "a new word", "ball"], [False, True, False])
    np.testing.assert_array_equal(again[0], first[1])
    assert not np.array_equal(again[1], first[0])  # a region is asked for in another way


def test_ten_thousand_prompts_are_supported(predictor, image):
    prompts = [f"thing {i}" for i in range(10_000)]
    found = predictor(image, prompts, task="instance")
    assert len(found) == predictor.config.eval.max_detections and found.prompt_ids.max() < len(prompts)


def test_padded_prompt_counts_take_few_distinct_values():
    lengths = [padded_length(n) for n in range(1, 4097)]
    assert all(n <= length <= max(8, 1.25 * n + 8) and length % 8 == 0 for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) < 50


def test_matting_requires_a_refiner_and_returns_alphas(predictor, image, monkeypatch):
    with pytest.raises(ValueError, match="mqformer train-matting"):
        predictor(image, ["sky"], task="matting")
    monkeypatch.setattr(predictor, "refiner", lambda image, masks: masks / 2)
    found = predictor(image, ["sky", "ball"], task="matting")
    assert found.alphas.shape == found.masks.shape and 0 < found.alphas.max() <= 0.5
    np.testing.assert_array_equal(found.alphas > 0.25, found.masks)


@pytest.mark.slow
def test_checkpoint_keeps_the_order_of_ten_or_more_blocks(tmp_path, image):
    """EfficientNet has 16 blocks; in a checkpoint's tree "10" comes before "2"."""
    config = get_config()
    config.model.backbone.name = "efficientnet_lite0"
    params, frozen = jax.jit(lambda k: build_model(config.model, k)[1:])(jax.random.key(0))
    save_weights(str(tmp_path), Weights(config, params, frozen), {})
    tokenizer = make_tokenizer(config.model.text)
    answers = []
    for predictor in (Predictor(config, params, frozen, tokenizer), Predictor.from_checkpoint(str(tmp_path))):
        answers.append(predictor.predict_raw([image], [predictor.embed(["ball"], [False])])[0])
    np.testing.assert_array_equal(answers[0].class_probs, answers[1].class_probs)
    np.testing.assert_array_equal(answers[0].masks.logits, answers[1].masks.logits)
