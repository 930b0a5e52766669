"""MQ-Former with ResNet-50 on COCO panoptic and RefCOCO/+/g, and the same recipe in small sizes.

`full` (the default): CLIP's text encoder, 100 learnable and 300 conditional queries, large-scale jitter on 1024 x 1024,
Mask DINO's optimizer and schedule.

    pip install -e '.[text]'
    mqformer prepare public coco_2017_panoptic refcoco refcocoplus refcocog --root ~/datasets --output data/records
    mqformer convert --input resnet50.pth --output pretrained/resnet50
    mqformer convert --input ViT-B-32.pt --output pretrained/clip
    mqformer train --config=coco_ref --workdir=runs/coco_ref

- Hardware: 16 TPU v5e chips, one image each. Compiled for one chip, a step needs 8.3 GB of its 16.9 GB.
- Time: 368,750 steps, at least 9 hours by the compiler's estimate, which no TPU has confirmed (docs/benchmarks.md).
- Expected score: unknown, not yet run. The paper reports PQ 56.5 for mixed queries on COCO, with a Swin backbone.

`gpu`: the same recipe for GPUs (not run). For the backward pass, it stores the results of matmuls instead of
recomputing whole layers. It computes the images of a device in two parts.

    pip install -e '.[text,cuda]'
    mqformer train --config=coco_ref:gpu --workdir=runs/coco_ref

- Hardware: 8 GPUs with 40 GB or more. Each computes two images, one after the other. Time: unknown.

`sample`: the scenes that `mqformer prepare sample` draws. `make demo` runs both commands.

    mqformer prepare sample --output data/records
    mqformer train --config=coco_ref:sample --workdir=runs/demo

- Hardware: two CPU cores. Time: 1,300 steps, about 5 minutes.
- Expected score: PQ 70 to 73, mask AP 41 to 47, referring mIoU 62 to 67 (five seeds).

`small`: a small folder with every annotation type, as a test of the whole pipeline on a laptop.

    mqformer prepare small --source FOLDER --output data/records
    mqformer train --config=coco_ref:small --workdir=runs/small

- Hardware: two CPU cores. Time: 400 steps, about 6 minutes.
- Expected score: PQ 0.4 on COCO. All losses fall, but 400 steps from random weights are too few for more.
"""

from ml_collections import ConfigDict

from mqformer_jax.config import base
from mqformer_jax.input.prompts import PHOTO_TEMPLATES

# the data sets of `mqformer prepare small`, with all types of annotations
SMALL_MIXTURE = (
    dict(name="coco_2017_panoptic", split="train", tasks=("panoptic",)),
    dict(name="coco_2017", split="train", tasks=("instance",)),
    dict(name="lvis_v0.5", split="train", tasks=("instance",)),
    dict(name="refcoco", split="train", tasks=("referring",)),
    dict(name="camvid", split="train", tasks=("semantic",)),
    dict(name="ade20k_sem_seg", split="train", tasks=("semantic",)),
    dict(name="balloon", split="train", tasks=("instance",)),
    dict(name="foreground", split="train", tasks=("foreground",)),
    dict(name="mattes", split="train", tasks=("foreground",)),
    dict(name="raccoon", split="train", tasks=("detection",)),
    dict(name="kangaroo", split="train", tasks=("detection",)),
)
SMALL_EVAL = (
    dict(name="coco_2017_panoptic", split="val", tasks=("panoptic", "instance", "semantic")),
    dict(name="refcoco", split="val", tasks=("referring",)),
)


def get_config(variant: str = "full") -> ConfigDict:
    """Return the recipe of a variant: full, gpu, sample or small."""
    recipes = {"full": full, "gpu": gpu, "sample": sample, "small": small}
    if variant not in recipes:
        raise ValueError(f"configs/coco_ref.py has no variant {variant!r}; use one of {', '.join(recipes)}.")
    return recipes[variant]()


def full() -> ConfigDict:
    """Return the full-size recipe."""
    config = base()
    config.model.decoder_dtype = "float32"
    config.init_from = ("pretrained/resnet50", "pretrained/clip")
    config.model.text.tokenizer = "clip"
    config.data.templates = PHOTO_TEMPLATES
    refcoco = ("refcoco", "refcocoplus", "refcocog")
    config.data.mixture = (
        dict(name="coco_2017_panoptic", split="train", tasks=("panoptic",)),
        *(dict(name=name, split="train", tasks=("referring",)) for name in refcoco),
    )
    config.eval.sets = (
        dict(name="coco_2017_panoptic", split="val", tasks=("panoptic", "instance", "semantic")),
        *(dict(name=name, split="val", tasks=("referring",)) for name in refcoco),
    )
    return config


def gpu() -> ConfigDict:
    """Return the full-size recipe for GPUs, whose memory is larger than a TPU v5e's."""
    config = full()
    config.model.remat = "dots"
    config.grad_accum_steps = 2
    return config


def laptop() -> ConfigDict:
    """Return a recipe for two CPU cores (a small model, its optimizer and schedule), without data sets."""
    config = base()
    config.model.update(
        dict(
            backbone=dict(name="convnet", widths=(32, 48, 64, 96)),
            text=dict(vocab_size=1024, context=12, width=64, heads=2, layers=2, embed_dim=96),
            width=96, heads=4, ffn=192, encoder_ffn=192, strides=(8, 16), encoder_layers=1, decoder_layers=2,
            mask_dim=96, num_learnable=20, num_conditional=20, dtype="float32", remat="none",
        )
    )  # fmt: skip
    config.loss.update(class_=8.0, num_points=256)
    config.denoising.num_queries = 36  # three copies of max_targets targets
    config.optimizer.update(
        learning_rate=1.5e-3,
        weight_decay=0.02,
        clip_norm=10.0,
        warmup=100,
        schedule="cosine",
        backbone_lr_mult=1.0,
        text_lr_mult=1.0,
    )
    config.data.update(max_targets=12, max_prompts=32, lattice_stride=2, threads=2)
    config.matting.backbone.name = "convnet"
    config.matting.update(width=32, steps=400, batch_size=8, learning_rate=2e-3, encoder=1.0)
    config.batch_size = 8
    config.log_every = 20
    config.checkpoint_every = 200
    return config


def sample() -> ConfigDict:
    """Return the recipe for the scenes that `mqformer prepare sample` draws."""
    config = laptop()
    config.about = (
        "This model was trained on ten classes of drawn scenes: ball, square, triangle, star, ring, sky, grass, water, "
        "sand and rock. It does not work on photographs: there, it predicts wrong segments with high scores."
    )
    config.expected = (
        "With all 1,300 steps, five seeds reached PQ 70 to 73, mask AP 41 to 47, "
        "mIoU 73 to 79 and referring mIoU 62 to 67."
    )
    config.steps = 1300
    config.data.update(canvas=(96, 96), scale_range=(1.0, 1.0))
    config.data.mixture = (
        dict(name="sample_scenes", split="train", tasks=("panoptic", "referring", "foreground"), weight=0.8),
        dict(name="sample_boxes", split="train", tasks=("instance",), weight=0.1),
        dict(name="sample_mattes", split="train", tasks=("foreground",), weight=0.1),
    )
    config.eval.sets = (
        dict(name="sample_scenes", split="val", tasks=("panoptic", "instance", "semantic", "referring")),
        dict(name="sample_mattes", split="val", tasks=("foreground", "matting")),
    )
    config.matting.update(canvas=96, crop=64)
    config.matting.mixture = (dict(name="sample_mattes", split="train"),)
    config.matting.sets = (dict(name="sample_mattes", split="val"),)
    config.eval.batch_size = 16
    config.eval.no_target_threshold = 0.15
    config.eval.expression_groups = (
        ("relation", " of | above | below "),
        ("extremal", "most "),
        ("attribute", "the .+ "),
    )
    return config


def small() -> ConfigDict:
    """Return the recipe for the data sets of `mqformer prepare small`."""
    config = laptop()
    config.steps = 400
    config.model.text.vocab_size = 32768
    config.model.update(strides=(8, 16, 32), num_learnable=40, num_conditional=60)
    config.model.backbone.widths = (32, 48, 64, 96, 128)
    config.data.update(canvas=(192, 192), scale_range=(0.5, 1.5), max_targets=40, max_prompts=60)
    config.data.mixture = SMALL_MIXTURE
    config.matting.update(canvas=384, crop=256)
    config.matting.mixture = (dict(name="mattes", split="train"),)
    config.matting.sets = (dict(name="mattes", split="val"),)
    config.eval.sets = SMALL_EVAL
    return config
