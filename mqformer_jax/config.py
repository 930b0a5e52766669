"""The fields of a recipe, their defaults, and the check that a recipe is valid.

Where the MQ-Former paper says "as Mask DINO", the defaults are those of Mask DINO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mqformer_jax.tasks import EVALUATED, TASKS, TRAINED

BACKBONES = ("resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l", "efficientnet_lite0", "convnet")
CHOICES = {
    "model.queries": ("mixed", "learnable", "conditional", "decoupled"),
    "model.score": ("cosine", "dot"),
    "model.level_order": ("coarse_to_fine", "fine_to_coarse"),
    "model.initialize_box_type": ("no", "mask2box", "bitmask"),
    "model.interaction": ("exchange", "joint", "none"),
    "model.backbone.name": BACKBONES,
    "matting.backbone.name": BACKBONES,
    "model.text.name": ("clip", "bert", "classes"),
    "model.text.tokenizer": ("words", "clip", "wordpiece", "classes"),
    "model.dtype": ("float32", "bfloat16"),
    "model.decoder_dtype": ("", "float32", "bfloat16"),
    "model.remat": ("none", "dots", "layers"),
    "optimizer.schedule": ("steps", "cosine"),
    "not_finite": ("stop", "skip"),
}

# Fields with a limited range. NaN and infinity are outside every range.
POSITIVE = """
    steps batch_size log_every checkpoint_every keep_checkpoints loss.num_points optimizer.learning_rate
    optimizer.clip_norm data.max_targets data.max_prompts data.threads eval.batch_size eval.max_detections
    model.width model.heads model.num_sampling_points model.ffn model.encoder_ffn model.decoder_layers model.mask_dim
    model.mask_stride model.backbone.window model.text.vocab_size model.text.context model.text.width model.text.heads
    model.text.embed_dim matting.backbone.window matting.reach matting.steps matting.batch_size matting.learning_rate
""".split()
NOT_NEGATIVE = """
    seed loss.class_ loss.mask loss.dice loss.box loss.giou loss.projection denoising.num_queries denoising.box_noise
    optimizer.weight_decay optimizer.warmup optimizer.backbone_lr_mult optimizer.text_lr_mult model.num_learnable
    model.num_conditional model.encoder_layers data.size_exponent data.workers eval.every eval.max_images
    eval.num_visualizations matting.margin matting.encoder
""".split()
FRACTIONS = """
    data.flip data.max_corrupt_fraction denoising.label_noise eval.object_mask_threshold eval.overlap_threshold
    eval.no_target_threshold matting.own
""".split()
BELOW_ONE = "data.color_jitter model.backbone.drop_path matting.backbone.drop_path".split()

# How parameters and their optimizer state are sharded. A rule has a regex over parameter paths, and the mesh axes that
# split the last dimensions of these parameters. The axis fsdp splits storage. The axis tensor splits computation: each
# device computes some heads of an attention and some hidden channels of an MLP.
SHARDING_RULES = (
    (r"(query|key|value|value_proj|attention_weights|sampling_offsets|fc1|ffn/layers/0)/kernel$", ("fsdp", "tensor")),
    (r"(out|output_proj|fc2|ffn/layers/1)/kernel$", ("tensor", "fsdp")),
    (r"kernel$|text_encoder/tokens$", ("fsdp", None)),
)


def _backbone() -> dict[str, Any]:
    return dict(
        name="resnet50",
        stride_in_1x1=False,  # ResNet: put strides into the 1x1 convolutions, as Microsoft's original weights do
        window=7,  # Swin: side of an attention window, in tokens
        drop_path=0.0,  # Swin: probability of skipping a branch in training, from 0 (first block) to this (last)
        widths=(32, 48, 64, 96),  # convnet: channels at strides 2, 4, 8 and 16
    )


def _text() -> dict[str, Any]:
    return dict(
        name="clip",
        tokenizer="words",
        vocab_size=49408,
        context=32,  # tokens per text
        width=512,
        heads=8,
        layers=12,
        embed_dim=512,
        norm_eps=1e-5,
        classes=(),  # text encoder "classes": the class name of each row of the embedding table
    )


def _model() -> dict[str, Any]:
    return dict(
        backbone=_backbone(),
        text=_text(),
        region_embedding=True,  # add a learned embedding of whether a prompt owns one region or several instances
        width=256,
        heads=8,
        num_sampling_points=4,  # points of deformable attention, for each head and level
        ffn=2048,  # hidden channels of the decoder's MLPs
        strides=(8, 16, 32, 64),  # of the pixel decoder's levels; Mask DINO with five levels starts at 4
        encoder_layers=6,
        encoder_ffn=2048,
        decoder_layers=9,
        mask_dim=256,
        mask_stride=4,
        score="cosine",  # class score: the scaled cosine similarity of query and text; "dot": their dot product
        initialize_box_type="no",  # conditional anchors: proposed boxes; "mask2box", "bitmask": boxes of proposed masks
        learned_content=False,  # if True, conditional queries take only their anchors from the image, not their content
        level_order="coarse_to_fine",  # of the decoder's levels; "fine_to_coarse" is Mask DINO's feature order high2low
        initial_pred=True,  # also supervise the queries before the first decoder layer
        queries="mixed",  # "learnable" or "conditional": all num_learnable + num_conditional queries are of this kind
        num_learnable=100,
        num_conditional=300,
        interaction="exchange",  # cross-attention between the two kinds of queries; "joint": one shared self-attention
        dtype="bfloat16",
        decoder_dtype="",  # of proposals, decoder and heads; "" means the same as dtype. Mask DINO uses float32
        # what the backward pass recomputes: "none", "dots" (layers, except their matmuls) or "layers" (whole layers)
        remat="layers",
    )


def _data() -> dict[str, Any]:
    return dict(
        root="data/records",
        # Dicts with the keys name, split and tasks. Optional keys: weight (default: size ** size_exponent);
        # min_mask_score and min_caption_score: synthetic masks and captions with lower scores are not used.
        mixture=(),
        size_exponent=0.5,
        canvas=(1024, 1024),  # height, width
        max_targets=100,  # per image
        max_prompts=160,  # per image
        lattice_stride=4,  # mask losses read one pixel of each square with this side; it divides model.mask_stride
        scale_range=(0.1, 2.0),  # of large-scale jitter; 1.0 fits the image into the canvas
        flip=0.5,  # probability
        color_jitter=0.0,  # brightness, contrast and saturation change by up to this fraction
        # Sentences for class names: training draws one, evaluation averages all embeddings (`prompts.PHOTO_TEMPLATES`).
        templates=("{}",),
        # Do not train on images of eval.sets, nor on those of the val and test splits of expression sets under root.
        leak_guard=True,
        max_corrupt_fraction=0.05,  # stop the run if a larger fraction of a data set's records is unusable
        workers=0,  # processes that load data; 0: the training process loads it
        threads=8,  # of each process
    )


def _eval() -> dict[str, Any]:
    return dict(
        every=0,  # steps between evaluations, each after a checkpoint; 0: evaluate at the end only
        sets=(),  # dicts with name, split and tasks
        batch_size=8,
        max_images=0,  # per data set; 0: all
        num_visualizations=8,  # images per data set in the picture of its predictions
        object_mask_threshold=0.25,  # panoptic: lowest score of a segment
        overlap_threshold=0.8,  # panoptic: lowest fraction of a segment that must stay visible
        max_detections=100,  # instance: segments per image
        score_threshold=-1.0,  # instance: lowest score of a segment; average precision needs all segments
        crop_masks=False,  # instance: cut off masks outside their box; for models that were trained for a short time
        no_target_threshold=0.0,  # referring: an expression whose best score is lower has no target
        # referring: (name, regex) pairs of groups with their own metrics; an expression is in the first that matches
        expression_groups=(),
        scales=(1.0,),  # semantic and region tasks: average the predictions at these multiples of the canvas
        flip=False,  # semantic and region tasks: also average with the predictions for the mirrored image
    )


def _matting() -> dict[str, Any]:
    return dict(
        backbone=_backbone(),
        init_from=(),  # checkpoint folders that initialize the image encoder
        width=64,  # decoder channels at stride 4 and coarser; stride 2 has half as many, stride 1 a quarter
        canvas=512,  # side of the square that the window around a mask is resized to
        crop=320,  # side of the square crops of the canvas in training
        margin=0.1,  # around the mask's box, as a fraction of its longer side
        reach=0.06,  # largest distance from the mask's outline at which alpha may change, as a fraction of the canvas
        mixture=(),  # dicts with name and split; training uses the segments that have a matte
        sets=(),  # dicts with name and split; these data sets are evaluated at the end
        # with --checkpoint: fraction of foregrounds whose guide is a mask of that model instead of a perturbed matte
        own=0.5,
        steps=50_000,
        batch_size=16,
        learning_rate=5e-4,
        encoder=0.1,  # learning-rate multiplier of the image encoder; 0 freezes it
    )


def base() -> ConfigDict:
    """Return a config with every field of a recipe. Recipes in `configs/` start from it and change values."""
    return ConfigDict(
        dict(
            about="",  # a description of the trained model for users, shown after training and on the web page
            expected="",  # the expected results of this recipe (the range over several seeds), shown after training
            seed=0,
            steps=368_750,
            batch_size=16,  # images per step, over all devices
            grad_accum_steps=1,  # split each device's images into this many parts, computed one after the other
            not_finite="stop",  # when a loss or gradient is NaN or infinite: "stop" the run, or "skip" the step
            init_from=(),  # folders of converted or trained checkpoints whose weights the run starts from
            init_skip=(),  # regexes over the paths of parameters that are not loaded from init_from
            model=_model(),
            loss=dict(  # the weights of the losses, and num_points
                class_=4.0,
                mask=5.0,
                dice=5.0,
                box=5.0,
                giou=2.0,
                projection=0.0,  # for targets that have only a box: the predicted mask must span it (BoxInst, DaTaSeg)
                num_points=12544,  # pixels at which a predicted mask is compared with its target, on average
            ),
            # masks: whether denoising queries have mask losses, besides class and box losses
            denoising=dict(num_queries=100, label_noise=0.2, box_noise=0.4, masks=True),
            optimizer=dict(
                learning_rate=1e-4,
                weight_decay=0.05,
                clip_norm=0.01,
                warmup=10,  # steps
                schedule="steps",  # divide the learning rate by 10 at each milestone; "cosine": decay to zero
                lr_milestones=(0.8889, 0.963),  # fractions of the run
                backbone_lr_mult=0.1,  # learning-rate multiplier of the image encoder
                text_lr_mult=0.1,  # the same for the text encoder; 0 freezes it, so each text is encoded only once
            ),
            data=_data(),
            mesh=(-1, 1, 1),  # sizes of the mesh axes data, fsdp and tensor; -1: the number of remaining devices
            sharding_rules=SHARDING_RULES,  # the first rule that matches a parameter's path applies
            log_every=50,  # steps
            checkpoint_every=5000,  # steps
            keep_checkpoints=2,
            eval=_eval(),
            matting=_matting(),  # of the refiner that turns masks into alpha mattes (mqformer_jax/train_matting.py)
        )
    )


def check(config: ConfigDict) -> None:
    """Raise ValueError with a one-line message about the first wrong field of a recipe and how to correct it."""
    check_values(config)
    divides = config.grad_accum_steps > 0 and config.batch_size % config.grad_accum_steps == 0
    _require(config, "grad_accum_steps", divides, f"must divide batch_size = {config.batch_size}")
    _check_model(config)
    _check_text(config)
    _check_data(config)
    for entry in config.eval.sets:
        _check_entry("eval.sets", entry, EVALUATED, {"name", "split", "tasks"}, set())
    scales = tuple(config.eval.scales)
    _require(config, "eval.scales", scales and min(scales) > 0, "needs at least one scale, all positive")
    _check_matting(config)


def check_values(config: ConfigDict) -> None:
    """Raise ValueError for an unknown field, or for a value outside its list in CHOICES or outside its range.

    `check` also checks that the fields fit together and that the recipe names data sets.
    """
    _check_known(config.to_dict(), base().to_dict(), "config")
    for field, allowed in CHOICES.items():
        _require(config, field, _get(config, field) in allowed, f"must be one of {', '.join(allowed)}")
    infinity = float("inf")
    for field in POSITIVE:
        _require(config, field, 0 < _get(config, field) < infinity, "must be positive")
    for field in NOT_NEGATIVE:
        _require(config, field, 0 <= _get(config, field) < infinity, "must not be negative")
    for field in FRACTIONS:
        _require(config, field, 0 <= _get(config, field) <= 1, "must be at least 0 and at most 1")
    for field in BELOW_ONE:
        _require(config, field, 0 <= _get(config, field) < 1, "must be at least 0 and below 1")


def _check_model(config: ConfigDict) -> None:
    model = config.model
    divisible = model.width % model.heads == 0 and model.width % 4 == 0
    _require(config, "model.width", divisible, f"must be divisible by model.heads = {model.heads} and by 4")
    _require(config, "model.strides", len(model.strides) > 0, "must name at least one stride")
    if model.queries == "decoupled":
        both = model.num_learnable > 0 and model.num_conditional > 0
        _require(config, "model.queries", both, "set num_learnable and num_conditional above 0: it needs both kinds")


def _check_text(config: ConfigDict) -> None:
    """Check that the text encoder, the tokenizer, the templates and the tasks fit together."""
    text, templates = config.model.text, tuple(config.data.templates)
    tokenizers = {"clip": ("words", "clip"), "bert": ("words", "wordpiece"), "classes": ("classes",)}[text.name]
    _require(
        config,
        "model.text.tokenizer",
        text.tokenizer in tokenizers,
        f"the text encoder {text.name!r} needs the tokenizer {' or '.join(tokenizers)}",
    )
    _require(
        config,
        "data.templates",
        templates and all(template.count("{}") == 1 for template in templates),
        'needs at least one template, and each must contain "{}" exactly once',
    )
    if text.name == "classes":
        _require(config, "model.text.classes", len(text.classes) > 0, "must list the class of each embedding")
        _require(config, "model.text.context", text.context == 1, "must be 1: a class is one token")
        _require(config, "data.templates", templates == ("{}",), 'must be ("{}",): the encoder takes only class names')
        tasks = {task for entry in (*config.data.mixture, *config.eval.sets) for task in entry.get("tasks", ())}
        impossible = sorted(tasks & {name for name, task in TASKS.items() if not task.by_class})
        _require(
            config,
            "model.text.name",
            not impossible,
            f"the text encoder 'classes' cannot encode free text: remove the tasks {', '.join(impossible)}",
        )
    else:
        divisible = text.width % text.heads == 0
        _require(config, "model.text.width", divisible, f"must be divisible by the {text.heads} heads")
    if text.name == "bert":
        _require(
            config,
            "model.text.embed_dim",
            text.embed_dim == text.width,
            f"must be model.text.width = {text.width}: the text encoder 'bert' has no projection",
        )


def _check_data(config: ConfigDict) -> None:
    """Check `config.data` and that it fits the model's strides and queries."""
    model, data = config.model, config.data
    queries = model.num_learnable + model.num_conditional
    _require(config, "data.max_targets", queries >= data.max_targets, f"must not exceed the {queries} queries")
    coarsest = max(model.strides)
    _require(
        config,
        "data.canvas",
        all(side % coarsest == 0 and side % 8 == 0 for side in data.canvas),
        f"both sides must be divisible by 8 and by the largest stride, {coarsest}",
    )
    fits = data.lattice_stride > 0 and model.mask_stride % data.lattice_stride == 0
    _require(config, "data.lattice_stride", fits, f"must divide model.mask_stride = {model.mask_stride}")
    low, high = data.scale_range
    _require(config, "data.scale_range", 0 < low <= high < float("inf"), "must be (smallest, largest), both positive")
    _require(config, "data.mixture", len(data.mixture) > 0, "must name at least one data set")
    tokens = sum((data.canvas[0] // stride) * (data.canvas[1] // stride) for stride in model.strides)
    _require(
        config,
        "model.num_conditional",
        queries <= tokens,
        f"{queries} queries are more than the {tokens} tokens of the canvas: use fewer queries or a larger canvas",
    )
    optional = {"weight", "min_mask_score", "min_caption_score"}
    for entry in data.mixture:
        _check_entry("data.mixture", entry, TRAINED, {"name", "split", "tasks"}, optional)


def _check_matting(config: ConfigDict) -> None:
    """Check the values of `config.matting`. Its data sets may be empty: only `mqformer train-matting` needs them."""
    matting = config.matting
    for field in ("canvas", "crop"):
        valid = matting[field] > 32 and matting[field] % 32 == 0
        _require(config, f"matting.{field}", valid, "must be a multiple of 32, and at least 64")
    _require(config, "matting.width", matting.width >= 4, "must be at least 4")
    for field in ("mixture", "sets"):
        for entry in matting[field]:
            _check_entry(f"matting.{field}", entry, (), {"name", "split"}, set())


def set_field(config: ConfigDict, field: str, value: Any, where: str = "config.") -> None:
    """Set the field "a.b" of a config. Raises ValueError if there is no such field or the value has another type.

    where: the text before the field's name in error messages.
    """
    *parents, last = field.split(".")
    node = config
    for name in parents:
        node = node.get(name) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or last not in node or isinstance(node[last], ConfigDict):
        raise ValueError(f"{where}{field}: there is no such field; mqformer_jax/config.py lists all fields.")
    try:
        node[last] = value
    except TypeError as e:
        raise ValueError(f"{where}{field}={value!r}: it must be of type {type(node[last]).__name__}.") from e


def _check_entry(field: str, entry: Mapping, tasks: tuple[str, ...], required: set[str], optional: set[str]) -> None:
    """Raise ValueError if an entry of the list `field` has wrong keys, or a task that is not in `tasks`."""
    if not required <= set(entry) <= required | optional:
        keys = ", ".join(sorted(required)) + (f"; optional: {', '.join(sorted(optional))}" if optional else "")
        raise ValueError(f"config.{field} = {dict(entry)!r}: an entry must have the keys {keys}.")
    unknown = [task for task in entry.get("tasks", ()) if task not in tasks]
    if unknown:
        raise ValueError(f"config.{field} ({entry['name']}): unknown tasks {unknown}; tasks are {', '.join(tasks)}.")


def _check_known(given: dict, allowed: dict, where: str) -> None:
    """Raise ValueError if `given` has a key that `allowed` lacks, at any level. where: `given`'s path, for messages."""
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(f"{where}.{key} is not a field; {where} has {', '.join(allowed)}.")
        if isinstance(allowed[key], dict):
            _check_known(value, allowed[key], f"{where}.{key}")


def _get(config: ConfigDict, field: str) -> Any:
    """Return config.a.b for the field "a.b"."""
    for name in field.split("."):
        config = config[name]
    return config


def _require(config: ConfigDict, field: str, valid: object, message: str) -> None:
    if not valid:
        raise ValueError(f"config.{field} = {_get(config, field)!r}: {message}.")
