"""AdamW with Mask DINO's learning rate schedule, parameter groups and weight decay."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mqformer_jax.parallel.rules import path_name

NO_DECAY = re.compile(
    r"norm|^learnable/|^conditional/content|^region_embedding|level_embed|text_encoder/(tokens|positions|types|rows)|position_bias|logit_"
)


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Return the learning rate schedule: linear warm-up, then a cosine decay to zero or divisions by ten.

    The rate is divided by ten at each of `config.lr_milestones`, which are fractions of the run. config:
    `config.optimizer`. steps: length of the run.
    """
    peak, warmup = config.learning_rate, config.warmup
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    drops = optax.piecewise_constant_schedule(peak, {int(f * steps): 0.1 for f in config.lr_milestones})
    return lambda step: drops(step) * jax.numpy.minimum(1.0, (step + 1) / max(warmup, 1))


def make_optimizer(config: ConfigDict, steps: int, params: Any) -> optax.GradientTransformation:
    """Return AdamW with clipping of the global gradient norm and a learning rate per parameter group.

    The groups are the backbone, the text encoder and the rest. A group with the multiplier 0 is frozen: it has no
    optimizer state and is excluded from the global norm. Weight decay excludes norms and embeddings, but includes the
    biases of Linear and Conv, as in Mask DINO.
    """
    rates = {"rest": 1.0, "backbone": config.backbone_lr_mult, "text_encoder": config.text_lr_mult}
    rate = schedule(config, steps)
    group = lambda path, _: next((g for g in ("backbone", "text_encoder") if path_name(path).startswith(g)), "rest")
    labels = jax.tree_util.tree_map_with_path(group, params)
    decays = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: not NO_DECAY.search(path_name(path)), tree)

    def adamw(multiplier: float) -> optax.GradientTransformation:
        if multiplier == 0:
            return optax.set_to_zero()
        return optax.adamw(lambda step: multiplier * rate(step), weight_decay=config.weight_decay, mask=decays)

    frozen = jax.tree.map(lambda label: rates[label] == 0, labels)
    groups = optax.multi_transform({name: adamw(m) for name, m in rates.items()}, labels)
    return optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.clip_by_global_norm(config.clip_norm), groups)
