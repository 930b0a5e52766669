"""What a recipe may hold, with Mask DINO's values where the paper says "as Mask DINO", and the check of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

TASKS = ("panoptic", "instance", "semantic", "detection", "referring", "foreground")
EVALUATIONS = ("panoptic", "instance", "semantic", "referring", "foreground", "matting")
BACKBONES = ("resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l", "efficientnet_lite0", "convnet")
CHOICES = {
    "model.queries": ("mixed", "learnable", "conditional", "decoupled"),
    "model.score": ("cosine", "dot"),
    "model.box_init": ("no", "mask2box", "bitmask"),
    "model.interaction": ("exchange", "joint", "none"),
    "model.backbone.name": BACKBONES,
    "matting.backbone.name": BACKBONES,
    "model.text.name": ("clip", "bert", "classes"),
    "model.text.tokenizer": ("words", "clip", "wordpiece", "classes"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "layers"),
    "optimizer.schedule": ("steps", "cosine"),
    "not_finite": ("stop", "skip"),
}

# Parameters and their optimiser state live in slices along fsdp. Along tensor, each device computes some heads and some
# of an MLP's hidden channels.
RULES = (
    (r"(query|key|value|value_proj|attention_weights|sampling_offsets|fc1|ffn/layers/0)/kernel$", ("fsdp", "tensor")),
    (r"(out|output_proj|fc2|ffn/layers/1)/kernel$", ("tensor", "fsdp")),
    (r"kernel$|text_encoder/tokens$", ("fsdp", None)),
)


def _backbone() -> dict[str, Any]:
    return dict(
        name="resnet50",
        stride_in_1x1=False,  # ResNet: Microsoft's original weights have it
        window=7,  # Swin
        drop_path=0.0,  # Swin: chance of leaving out the deepest block's branch in training
        widths=(32, 48, 64, 96),  # convnet: channels from stride 2 on
    )


def _model() -> dict[str, Any]:
    return dict(
        backbone=_backbone(),
        text=dict(
            name="clip",
            tokenizer="words",
            vocab_size=49408,
            context=32,
            width=512,
            heads=8,
            layers=12,
            embed_dim=512,
            norm_eps=1e-5,
            classes=(),  # "classes": the names that the table's rows stand for
        ),
        grain=True,  # tell the model whether a prompt owns one region or several segments
        width=256,
        heads=8,
        points=4,
        ffn=2048,  # of the decoder
        strides=(8, 16, 32, 64),  # from 4 on: five levels
        encoder_layers=6,
        encoder_ffn=2048,
        decoder_layers=9,
        mask_dim=256,
        mask_stride=4,
        score="cosine",  # of query and text, with a learned scale and bias; or their plain "dot" product
        box_init="no",  # conditional anchors: the proposals' boxes, or those around their masks (Mask DINO's two ways)
        learned_content=False,  # conditional queries take anchors from the image, content from parameters
        coarse_first=True,  # the order in which the decoder counts levels; Mask DINO's high2low is False
        initial_pred=True,  # supervise the queries before the first layer too
        queries="mixed",  # which kinds there are; every strategy has num_learnable + num_conditional in all
        num_learnable=100,
        num_conditional=300,
        interaction="exchange",  # of the two kinds; "joint" is one self-attention over both
        dtype="bfloat16",
        # what is computed again for gradients: nothing ("none"), layers but for their matmuls ("dots"), or whole layers
        remat="layers",
    )


def _data() -> dict[str, Any]:
    return dict(
        root="data/records",
        # dicts: name, split, tasks, weight (default size ** alpha), least_mask, least_caption (scores of what a teacher
        # added)
        mixture=(),
        alpha=0.5,
        canvas=(1024, 1024),
        max_targets=100,
        max_prompts=160,
        mask_canvases=8.0,  # room for the masks of an image, in canvases; COCO panoptic needs 1.1 on average, 3 at most
        scale=(0.1, 2.0),
        flip=0.5,
        jitter=0.0,
        templates=(
            "{}",
        ),  # around class names: one is drawn in training, evaluation averages them all (`prompts.PHOTO_TEMPLATES`)
        # images of eval.sets, and of val and test splits of expressions under root, are not trained on
        leak_guard=True,
        max_bad=0.05,  # more unusable records of a data set than this share stop the run
        workers=0,
        threads=8,
    )


def _eval() -> dict[str, Any]:
    return dict(
        every=0,  # steps; 0: at the end only. A checkpoint is saved before
        sets=(),  # dicts: name, split, tasks
        batch_size=8,
        limit=0,  # images a set; 0: all
        pictures=8,
        keep=0.25,  # panoptic: the least score of a segment
        overlap=0.8,  # panoptic: the least visible share of a segment
        top=100,  # instance: segments an image
        least=-1.0,  # instance: the least score of a segment; average precision wants all of them
        absent=0.0,  # referring: below this score an expression names nothing
        kinds=(),  # referring: (name, regex) pairs; expressions are also reported by the first that fits
        scales=(1.0,),  # semantic, and one region a prompt: canvases, in the recipe's, whose answers are averaged
        flip=False,  # likewise with the mirrored image
    )


def _matting() -> dict[str, Any]:
    return dict(
        backbone=_backbone(),
        init_from=(),  # folders of checkpoints whose image encoder it starts from
        width=64,  # channels of its decoder at strides 4 and coarser, half and a quarter of that at 2 and 1
        canvas=512,  # side of the square that the surroundings of a mask are brought to
        crop=320,  # side of the square parts of the canvas that training sees
        margin=0.1,  # around the mask's box, in its larger side
        reach=0.06,  # how far from the mask's outline alpha may differ from it, in the canvas' side
        mixture=(),  # dicts: name, split; of their records the segments with a matte
        sets=(),  # likewise; measured at the end
        own=0.5,  # with --checkpoint: the share of foregrounds guided by the model's own mask, not by a perturbed matte
        steps=50_000,
        batch_size=16,
        learning_rate=5e-4,
        encoder=0.1,  # multiplies the learning rate of its image encoder; 0 freezes it
    )


def base() -> ConfigDict:
    """Every field a recipe has. Recipes in `configs/` start from it and change numbers."""
    return ConfigDict(
        dict(
            seed=0,
            steps=368_750,
            batch_size=16,  # images a step over all devices
            accumulate=1,  # parts of a device's images, computed one after the other
            not_finite="stop",  # when a loss or gradient is NaN or infinite: "stop", or "skip" the step
            init_from=(),  # folders of converted or trained checkpoints: a run starts from all that fits
            init_skip=(),  # regexes over parameter paths that stay fresh all the same
            model=_model(),
            loss=dict(
                class_=4.0,
                mask=5.0,
                dice=5.0,
                box=5.0,
                giou=2.0,
                # of targets that have a box only: that their mask fills it from side to side (DaTaSeg uses it)
                projection=0.0,
                points=12544,
            ),
            denoising=dict(slots=100, flip=0.2, jitter=0.4, masks=True),
            optimizer=dict(
                learning_rate=1e-4,
                weight_decay=0.05,
                clip=0.01,
                warmup=10,
                schedule="steps",  # learning rate / 10 at each of `drops`, fractions of the run; or "cosine" to zero
                drops=(0.8889, 0.963),
                backbone=0.1,  # multiplies the learning rate of the image encoder
                text=0.1,  # likewise of the text encoder; 0 freezes it, and each text is then encoded once
            ),
            data=_data(),
            mesh=(-1, 1, 1),  # data, fsdp, tensor; -1: what is left
            # (regex over a parameter's path, mesh axes of its trailing dimensions), the first that matches
            rules=RULES,
            log_every=50,
            checkpoint_every=5000,
            keep_checkpoints=2,
            eval=_eval(),
            matting=_matting(),  # of the refiner that makes alpha mattes of masks: mqformer_jax/refine.py
        )
    )


def check(config: ConfigDict) -> None:
    """Raise ValueError with one line that names the field and the mend, or return."""
    check_choices(config)
    model, data = config.model, config.data
    _require(config.batch_size > 0, "batch_size", config.batch_size, "must be positive")
    parts = config.accumulate
    _require(
        parts > 0 and config.batch_size % parts == 0,
        "accumulate",
        parts,
        f"must divide the {config.batch_size} images of a step",
    )
    _require(config.steps > 0, "steps", config.steps, "must be positive")
    _require(
        model.width % model.heads == 0 and model.width % 4 == 0,
        "model.width",
        model.width,
        f"must divide by {model.heads} heads and by 4",
    )
    _check_text(config)
    total = model.num_learnable + model.num_conditional
    both = model.num_learnable > 0 and model.num_conditional > 0
    _require(
        model.queries != "decoupled" or both, "model.queries", "decoupled", "it needs learnable and conditional queries"
    )
    _require(len(model.strides) > 0, "model.strides", tuple(model.strides), "must name at least one stride")
    _require(model.backbone.window > 0, "model.backbone.window", model.backbone.window, "must be positive")
    _require(
        0 <= model.backbone.drop_path < 1,
        "model.backbone.drop_path",
        model.backbone.drop_path,
        "must be at least 0 and below 1",
    )
    _require(total >= data.max_targets, "data.max_targets", data.max_targets, f"must not exceed the {total} queries")
    deepest = max(model.strides)
    fits = all(side % deepest == 0 and side % 8 == 0 for side in data.canvas)
    _require(
        fits, "data.canvas", tuple(data.canvas), f"both sides must divide by 8 and by the largest stride {deepest}"
    )
    _require(
        0 < data.scale[0] <= data.scale[1], "data.scale", tuple(data.scale), "the least and the largest, both positive"
    )
    _require(0 <= data.flip <= 1, "data.flip", data.flip, "is a probability: 0 to 1")
    _require(0 <= data.jitter < 1, "data.jitter", data.jitter, "must be at least 0 and below 1")
    _require(
        data.max_prompts > 0 and data.max_targets > 0,
        "data.max_prompts",
        data.max_prompts,
        "it and max_targets must be positive",
    )
    _require(
        data.mask_canvases >= 1, "data.mask_canvases", data.mask_canvases, "must be at least 1, the room of one mask"
    )
    _require(0 <= data.max_bad <= 1, "data.max_bad", data.max_bad, "is a share of a data set's records: 0 to 1")
    _require(len(data.mixture) > 0, "data.mixture", list(data.mixture), "must name at least one data set")
    tokens = sum((data.canvas[0] // s) * (data.canvas[1] // s) for s in model.strides)
    _require(
        total <= tokens,
        "model.num_conditional",
        model.num_conditional,
        f"{total} queries are more than the {tokens} tokens of the canvas",
    )
    _require(
        config.log_every > 0 and config.checkpoint_every > 0,
        "log_every",
        config.log_every,
        "it and checkpoint_every must be positive",
    )
    for entry in data.mixture:
        _check_entry(
            "data.mixture", entry, TASKS, {"name", "split", "tasks"}, {"weight", "least_mask", "least_caption"}
        )
    for entry in config.eval.sets:
        _check_entry("eval.sets", entry, EVALUATIONS, {"name", "split", "tasks"}, set())
    scales = tuple(config.eval.scales)
    _require(len(scales) > 0 and min(scales) > 0, "eval.scales", scales, "must be positive, and one at least")
    _check_matting(config.matting)


def _check_text(config: ConfigDict) -> None:
    """That encoder, tokenizer, templates and tasks can work together."""
    text, templates = config.model.text, tuple(config.data.templates)
    fits = {"clip": ("words", "clip"), "bert": ("words", "wordpiece"), "classes": ("classes",)}[text.name]
    _require(
        text.tokenizer in fits,
        "model.text.tokenizer",
        text.tokenizer,
        f"the encoder {text.name!r} goes with {' or '.join(fits)}",
    )
    _require(
        len(templates) > 0 and all(t.count("{}") == 1 for t in templates),
        "data.templates",
        templates,
        'each must hold "{}" once',
    )
    if text.name == "classes":
        _require(
            len(text.classes) > 0, "model.text.classes", (), "name the classes that the rows of the table stand for"
        )
        _require(text.context == 1, "model.text.context", text.context, "a class is one token: 1")
        _require(templates == ("{}",), "data.templates", templates, 'a table of classes knows no sentences: ("{}",)')
        asked = {task for entry in (*config.data.mixture, *config.eval.sets) for task in entry.get("tasks", ())}
        free = sorted(asked & {"referring", "foreground", "matting"})
        _require(
            not free,
            "model.text.name",
            "classes",
            f"a table of classes cannot answer {', '.join(free)}: leave those tasks out",
        )
    else:
        _require(text.width % text.heads == 0, "model.text.width", text.width, f"must divide by {text.heads} heads")
    if text.name == "bert":
        _require(
            text.embed_dim == text.width,
            "model.text.embed_dim",
            text.embed_dim,
            f"the encoder 'bert' has no projection: {text.width}",
        )


def _check_matting(matting: ConfigDict) -> None:
    """That the refiner's canvas and numbers can work; a recipe need not name data for it."""
    for field in ("canvas", "crop"):
        fits = matting[field] > 32 and matting[field] % 32 == 0
        _require(fits, f"matting.{field}", matting[field], "must be a multiple of 32, and 64 at least")
    _require(matting.width >= 4, "matting.width", matting.width, "must be at least 4")
    _require(matting.reach > 0, "matting.reach", matting.reach, "must be positive")
    _require(matting.margin >= 0, "matting.margin", matting.margin, "must not be negative")
    _require(0 <= matting.own <= 1, "matting.own", matting.own, "is a share: 0 to 1")
    _require(
        matting.steps > 0 and matting.batch_size > 0,
        "matting.steps",
        matting.steps,
        "it and batch_size must be positive",
    )
    _require(matting.encoder >= 0, "matting.encoder", matting.encoder, "must not be negative")
    for field in ("mixture", "sets"):
        for entry in matting[field]:
            _require(set(entry) == {"name", "split"}, f"matting.{field}", dict(entry), "an entry has name, split")


def check_choices(config: ConfigDict) -> None:
    """The part of `check` that holds for a config without data: no unknown fields, and words that mean something."""
    _known(config.to_dict(), base().to_dict(), "config")
    for field, allowed in CHOICES.items():
        value = _get(config, field)
        if value not in allowed:
            raise ValueError(f"config.{field} = {value!r} is not one of {', '.join(allowed)}.")


def set_field(config: ConfigDict, field: str, value: Any, where: str = "config.") -> None:
    """config.a.b = value for the field "a.b". Raises ValueError in one line for an unknown field or a value of another
    type.
    """
    *parents, last = field.split(".")
    node = config
    for name in parents:
        node = node.get(name) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or last not in node or isinstance(node[last], ConfigDict):
        raise ValueError(f"{where}{field}: there is no such field; mqformer_jax/config.py lists them all.")
    try:
        node[last] = value
    except TypeError as e:
        raise ValueError(f"{where}{field}={value!r}: it must be a {type(node[last]).__name__}.") from e


def _check_entry(field: str, entry: Mapping, tasks: tuple[str, ...], needed: set[str], allowed: set[str]) -> None:
    """One data set of a recipe: its keys, and that its tasks exist."""
    keys = set(entry)
    _require(
        needed <= keys <= needed | allowed, field, dict(entry), f"an entry has {', '.join(sorted(needed | allowed))}"
    )
    wrong = [t for t in entry["tasks"] if t not in tasks]
    _require(not wrong, f"{field} ({entry['name']})", wrong, f"tasks are {', '.join(tasks)}")


def _known(given: dict, allowed: dict, where: str) -> None:
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(f"{where}.{key} is not a field; {where} has {', '.join(allowed)}.")
        if isinstance(allowed[key], dict):
            _known(value, allowed[key], f"{where}.{key}")


def _get(config: ConfigDict, path: str):
    for part in path.split("."):
        config = config[part]
    return config


def _require(ok: object, field: str, value: object, mend: str) -> None:
    if not ok:
        raise ValueError(f"config.{field} = {value!r}: {mend}.")
