import pytest
from tiny import recipe

from mqformer_jax import config as recipes
from mqformer_jax.train import train


@pytest.mark.parametrize("variant", ["full", "gpu", "sample", "small"])
def test_coco_ref_variants_are_valid(variant):
    recipes.check(recipe(variant))


@pytest.mark.parametrize("variant", ["coco", "small"])
def test_lite_variants_are_valid(variant):
    recipes.check(recipe(variant, "lite"))


def test_the_scaled_recipe_is_the_full_one_with_more_data():
    scaled, full = recipe("", "scaled"), recipe("full")
    recipes.check(scaled)
    assert scaled.data.mixture[: len(full.data.mixture)] == full.data.mixture and scaled.model == full.model


def test_variants_have_the_same_fields_as_the_base_config():
    shape = lambda tree: {k: shape(v) for k, v in tree.items()} if isinstance(tree, dict) else None
    shapes = [shape(recipe(v).to_dict()) for v in ("full", "sample", "small")]
    assert shapes[0] == shapes[1] == shapes[2] == shape(recipes.base().to_dict())


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("model.queries", "both", "mixed, learnable, conditional"),
        ("model.backbone.name", "vgg", "resnet50"),
        ("data.canvas", (100, 96), "data.canvas"),
        ("data.max_targets", 500, "queries"),
        ("data.mixture", (), "at least one data set"),
        ("data.mixture", (dict(name="coco", split="train", tasks=("depth",)),), "depth"),
        ("data.mixture", (dict(name="coco", split="train", tasks=("panoptic",), wieght=2),), "wieght"),
        ("eval.sets", (dict(name="coco", split="val"),), "an entry must have the keys name, split, tasks"),
        ("model.num_conditional", 400, "more than the 180 tokens"),
        ("batch_size", 0, "positive"),
        ("model.width", 250, "heads"),
        ("model.text.tokenizer", "wordpiece", "words or clip"),
        ("model.text.name", "t5", "clip, bert, classes"),
        ("model.text.width", 65, "2 heads"),
        ("data.templates", (), "contain"),
        ("data.templates", ("a photo",), "contain"),
        ("model.backbone.drop_path", 1.0, "below 1"),
        ("model.backbone.window", 0, "positive"),
        ("model.strides", (), "at least one stride"),
        ("model.level_order", "coarse_first", "coarse_to_fine, fine_to_coarse"),
        ("model.initialize_box_type", "mask", "no, mask2box, bitmask"),
        ("checkpoint_every", 0, "positive"),
        ("grad_accum_steps", 3, "divide batch_size = 8"),
        ("data.max_prompts", 0, "positive"),
        ("data.scale_range", (2.0, 1.0), "smallest, largest"),
        ("data.color_jitter", 1.0, "below 1"),
        ("data.max_corrupt_fraction", 1.5, "at most 1"),
        ("optimizer.learning_rate", float("nan"), "positive"),
        ("optimizer.clip_norm", float("inf"), "positive"),
        ("model.heads", 0, "positive"),
        ("loss.mask", -1.0, "negative"),
        ("denoising.label_noise", 7.0, "at most 1"),
        ("matting.backbone.drop_path", 1.0, "below 1"),
        ("eval.scales", (), "at least one scale"),
        ("eval.sets", (dict(name="coco", split="val", tasks=("detection",)),), "unknown tasks"),
        ("matting.batch_size", 0, "positive"),
        ("matting.crop", 100, "multiple of 32"),
        ("matting.sets", (dict(name="mattes"),), "an entry must have the keys name, split"),
    ],
)
def test_invalid_value_error_names_the_field(field, value, words):
    config = recipe("sample")
    *parents, last = field.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.ignore_type():
        node[last] = value
    with pytest.raises(ValueError, match=words) as error:
        recipes.check(config)
    assert field in str(error.value) and "\n" not in str(error.value)


def test_unknown_field_is_rejected_by_name():
    config = recipe("sample")
    with config.unlocked():
        config.model.dropout = 0.1
    with pytest.raises(ValueError, match="config.model.dropout is not a field"):
        recipes.check(config)


def test_missing_data_error_names_the_prepare_command(tmp_path):
    config = recipe("sample")
    config.data.root = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="mqformer prepare sample"):
        train(config, str(tmp_path / "run"))


def test_class_table_encoder_rejects_expression_tasks():
    config = recipe("sample")
    config.model.text.update(name="classes", tokenizer="classes", classes=("sky",), context=1)
    with pytest.raises(ValueError, match="foreground, matting, referring"):
        recipes.check(config)
    config.data.mixture, config.eval.sets = (dict(name="sample_boxes", split="train", tasks=("detection",)),), ()
    recipes.check(config)
    config.model.text.classes = ()
    with pytest.raises(ValueError, match="text.classes"):
        recipes.check(config)


def test_decoupled_queries_require_learnable_and_conditional():
    config = recipe("sample")
    config.model.update(queries="decoupled", num_conditional=0)
    with pytest.raises(ValueError, match="set num_learnable and num_conditional above 0"):
        recipes.check(config)


def test_lattice_stride_must_divide_mask_stride():
    config = recipe("sample")
    config.data.lattice_stride = 3
    with pytest.raises(ValueError, match="config.data.lattice_stride = 3: must divide model.mask_stride = 4"):
        recipes.check(config)
