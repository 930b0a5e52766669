"""The sample recipe with everything in it and every number small: what tests train."""

import importlib
import pathlib

from ml_collections import ConfigDict

REPOSITORY = pathlib.Path(__file__).parent.parent

# One cache of compiled programs for all runs in this checkout, all pytest workers and all programs that tests start.
CACHE = REPOSITORY / ".cache" / "compiled"
# Tests compile more than they compute. --xla_cpu_use_fusion_emitters=false would save half of it again, but computes
# wrong numbers: Mask2Former's pixel decoder is then off by a tenth (jaxlib 0.10.2).
# XLA:CPU (jaxlib 0.10.2 to 0.12.0) computes garbage where it fuses a reduction with a product by a constant that is
# uniform, such as the zeros of a fresh layer that a jitted function closes over: softmax(x @ zeros) is sometimes NaN.
NO_REDUCE_FUSION = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
COMPILATION = f"--xla_backend_optimization_level=0 {NO_REDUCE_FUSION}"


def recipe(variant: str, name: str = "coco_ref") -> ConfigDict:
    """Return a variant of configs/NAME.py."""
    module = importlib.import_module(f"mqformer_jax.configs.{name}")
    return module.get_config(variant) if variant else module.get_config()


def get_config(variant: str = "") -> ConfigDict:
    """`variant` "train" evaluates nothing; "process" also compiles in a third of the time, for several processes."""
    config = recipe("sample")
    config.steps = 6
    config.model.backbone.widths = (8, 8, 16, 16)
    config.model.text.update(vocab_size=512, width=16, heads=2, layers=2, embed_dim=16)
    config.model.update(
        width=32,
        heads=2,
        ffn=32,
        encoder_ffn=32,
        num_sampling_points=2,
        mask_dim=16,
        num_learnable=6,
        num_conditional=8,
    )
    config.loss.num_points = 32
    config.denoising.num_queries = 6
    config.data.update(canvas=(64, 64), max_targets=10, max_prompts=16)
    config.log_every = 1
    config.checkpoint_every = 2
    config.eval.update(batch_size=4, max_images=4, num_visualizations=2)
    config.matting.backbone.widths = (8, 8, 16, 16)
    config.matting.update(width=8, canvas=64, crop=64, steps=250, learning_rate=3e-3)
    if variant in ("train", "process"):
        config.eval.sets = ()
    if variant == "process":
        config.model.update(queries="learnable", decoder_layers=1, strides=(8,))
        config.model.backbone.widths = (8, 8, 16)
        config.model.text.layers = 1
        config.denoising.num_queries = 0
        config.optimizer.update(schedule="steps", lr_milestones=(), warmup=10)  # a step is the same in a longer run
    return config
