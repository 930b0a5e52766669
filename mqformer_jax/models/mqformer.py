"""MQ-Former (Wang et al., CVPR 2025): the paper's figure, top to bottom.

    image -> backbone -> segmentation encoder -> memory, mask features
    text  -> text encoder -> prompts
    memory x prompts -> conditional queries        parameters -> learnable queries
    both -> decoder (they exchange in every layer) -> classes against the prompts, boxes, masks

Every query of both kinds answers every prompt; the matcher (losses/) decides which takes which object.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from mqformer_jax.arrays import Array
from mqformer_jax.models.backbone import make_backbone
from mqformer_jax.models.decoder import Decoder
from mqformer_jax.models.heads import Heads, inverse_sigmoid, normalize
from mqformer_jax.models.pixel_decoder import PixelDecoder
from mqformer_jax.models.queries import ConditionalQueries, LearnableQueries, Noised, mask_boxes
from mqformer_jax.models.text_encoder import make_text_encoder


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Predictions:
    """What q queries say at s stages, for p prompts.

    Stages: the first proposals (where there are conditional queries), the initial queries, then one a decoder layer.
    boxes are cx, cy, w, h as fractions of the canvas; a mask is mask_embed . mask_features, as logits.
    """

    class_logits: Float[Array, "s b q p"]
    boxes: Float[Array, "s b q 4"]
    mask_embed: Float[Array, "s b q d"]


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Outputs:
    """Matching queries (learnable first), denoising queries where asked for, and the features their masks are made of.

    decoupled: learnable queries may take regions only and conditional ones instances only (OpenSeeD's hard split).
    """

    matching: Predictions
    denoising: Predictions | None
    mask_features: Float[Array, "b h w d"]
    num_learnable: int = flax.struct.field(pytree_node=False)
    decoupled: bool = flax.struct.field(pytree_node=False, default=False)


class MQFormer(nnx.Module):
    """See the module's docstring. `config` is the `model` part of a recipe (`mqformer_jax.config.model`)."""

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        self.dtype = dtype
        self.num_learnable, self.num_conditional = query_counts(c)
        self.joint, self.decoupled = c.interaction == "joint", c.queries == "decoupled"
        self.box_init, self.coarse_first, self.initial_pred = c.box_init, c.coarse_first, c.initial_pred
        mixed = self.num_learnable > 0 and self.num_conditional > 0

        self.backbone = make_backbone(c.backbone, c.remat, rngs, dtype)
        self.text_encoder = make_text_encoder(c.text, rngs, dtype)
        self.grain = nnx.Param(0.02 * jax.random.normal(rngs.params(), (2, c.text.embed_dim))) if c.grain else None
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, c.width, c.heads, c.points, c.encoder_layers, c.encoder_ffn, tuple(c.strides),
            c.mask_dim, c.mask_stride, rngs=rngs, dtype=dtype, remat=c.remat,
        )  # fmt: skip
        self.heads = Heads(c.width, c.text.embed_dim, c.mask_dim, c.score == "cosine", rngs=rngs, dtype=dtype)
        self.learnable = LearnableQueries(self.num_learnable, c.width, rngs=rngs) if self.num_learnable else None
        conditional = functools.partial(ConditionalQueries, self.num_conditional, c.width, c.learned_content)
        self.conditional = conditional(rngs=rngs, dtype=dtype) if self.num_conditional else None
        self.noised = nnx.Linear(c.text.embed_dim, c.width, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(
            c.width, c.heads, c.ffn, c.decoder_layers, len(c.strides), c.points, mixed and c.interaction == "exchange",
            rngs=rngs, dtype=dtype, remat=c.remat,
        )  # fmt: skip

    def embed_text(
        self, tokens: Int[Array, "*n l"] | Float[Array, "*n e"], region: Bool[Array, "*n"]
    ) -> Float[Array, "*n e"]:
        """Prompts as vectors: the text encoder's (or given: what a frozen one said), plus what tells "one region" from
        "several segments".

        The paper says nothing of how COCO's "person" (each one) and ADE's "person" (all of them) live together; a
        learned two-valued embedding lets one text ask either way (`model.grain` turns it off). It starts random: from
        zero, expressions ground worse (docs/results.md); a model of trained weights that know no grain starts it at
        zero (`initialize`).
        """
        given = jnp.issubdtype(tokens.dtype, jnp.floating)
        text = tokens.astype(self.dtype) if given else self.text_encoder(tokens)
        return text if self.grain is None else text + self.grain[...][region.astype(jnp.int32)].astype(text.dtype)

    def __call__(
        self,
        image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
        size: Int[Array, "b 2"],
        text: Float[Array, "b p e"],
        prompt_valid: Bool[Array, "b p"],
        noised: Noised | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> Outputs:
        """image: 0 to 255, padded right and below its `size` (pixels). text: from `embed_text`. keys: of the backbone's
        drop path; None in evaluation."""
        pixels = (image.astype(jnp.float32) - jnp.asarray(self.backbone.mean)) / jnp.asarray(self.backbone.std)
        features = self.backbone(pixels.astype(self.dtype), keys)
        return self.segment(features, image.shape[1:3], size, text, prompt_valid, noised)

    def segment(
        self,
        features: dict[int, Float[Array, "b _h _w _c"]],
        canvas: tuple[int, int],
        size: Int[Array, "b 2"],
        text: Float[Array, "b p e"],
        prompt_valid: Bool[Array, "b p"],
        noised: Noised | None = None,
    ) -> Outputs:
        """All that follows the backbone. features: {stride: feature} of a canvas (h, w)."""
        memory, shapes, valid, mask_features = self.pixel_decoder(features, size, canvas)
        if self.coarse_first:
            memory, shapes, valid = _coarse_first(memory, shapes, valid)
        batch = memory.shape[0]

        contents, anchors, first = [], [], None
        if self.learnable is not None:
            content, anchor = self.learnable(batch)
            contents.append(content)
            anchors.append(anchor)
        if self.conditional is not None:
            tokens, anchor = self.conditional(memory, shapes, valid, self.heads, text, prompt_valid)
            # learnable queries compete for targets here too, but learn this state once only: from the initial stage
            rivals = jax.lax.stop_gradient((contents, anchors))
            first = jnp.concatenate([*rivals[0], tokens], 1), jnp.concatenate([*rivals[1], anchor], 1)
            contents.append(self.conditional.start(tokens))
            anchors.append(jax.lax.stop_gradient(self._anchors_from_masks(tokens, anchor, mask_features)))
        if noised is not None:
            claimed = jnp.take_along_axis(text, noised.prompt[..., None], 1)
            contents.append(self.noised(normalize(claimed) if self.heads.cosine else claimed))
            anchors.append(jax.scipy.special.logit(jnp.clip(noised.boxes, 1e-3, 1 - 1e-3)))  # Mask DINO's range
        content = jnp.concatenate([c.astype(jnp.float32) for c in contents], 1)
        anchor = jnp.concatenate(anchors, 1)

        mask = visibility(self.num_learnable, self.num_conditional, self.joint, noised)
        queries, boxes = self.decoder(
            content, anchor, mask, (self.num_learnable, self.num_conditional), memory, shapes, valid, self.heads
        )
        if self.initial_pred:
            boxes = jnp.concatenate([jax.nn.sigmoid(anchor)[None], boxes])
            queries = jnp.concatenate([content.astype(queries.dtype)[None], queries])
        stages, n = self._predict(queries, boxes, text, prompt_valid), self.num_learnable + self.num_conditional
        matching = jax.tree.map(lambda x: x[:, :, :n], stages)
        if first is not None:
            proposals = self._predict(
                first[0].astype(queries.dtype)[None], jax.nn.sigmoid(first[1])[None], text, prompt_valid
            )
            matching = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), proposals, matching)
        denoising = None if noised is None else jax.tree.map(lambda x: x[:, :, n:], stages)
        return Outputs(matching, denoising, mask_features, self.num_learnable, self.decoupled)

    def _predict(self, queries: Array, boxes: Array, text: Array, prompt_valid: Array) -> Predictions:
        logits, embeds = self.heads(queries, text, prompt_valid)
        return Predictions(logits, boxes, embeds)

    def _anchors_from_masks(self, tokens: Array, anchor: Array, mask_features: Array) -> Float[Array, "b k 4"]:
        """Anchors (before the sigmoid): the boxes that were predicted, or those around the masks that were
        (`box_init`).
        """
        if self.box_init == "no":
            return anchor
        embed = self.heads.mask_embed(self.heads.norm(tokens))
        masks = jnp.einsum(
            "bqd,bhwd->bqhw", embed, mask_features.astype(embed.dtype), preferred_element_type=jnp.float32
        )
        return inverse_sigmoid(mask_boxes(masks > 0, inclusive=self.box_init == "mask2box"))


def query_counts(config: ConfigDict) -> tuple[int, int]:
    """Learnable and conditional queries of a strategy; every strategy uses all of them (400 in the paper's
    ablations).
    """
    total = config.num_learnable + config.num_conditional
    return {"learnable": (total, 0), "conditional": (0, total)}.get(
        config.queries, (config.num_learnable, config.num_conditional)
    )


def visibility(learnable: int, conditional: int, joint: bool, noised: Noised | None) -> Bool[Array, "b q q"]:
    """Who sees whom in self-attention: True where row may look at column.

    The two kinds see their own unless `joint`; noised copies see their group and the conditional queries (both are
    anchored boxes), and nobody sees them.
    """
    kind = np.repeat([0, 1], [learnable, conditional])
    own = np.full((len(kind),) * 2, True) if joint else kind[:, None] == kind[None]
    if noised is None:
        return jnp.asarray(own)[None]
    b, d = noised.group.shape
    top = np.concatenate([own, np.zeros((len(kind), d), bool)], 1)
    same = (noised.group[:, :, None] == noised.group[:, None]) & noised.valid[:, None]
    same |= jnp.eye(d, dtype=bool)  # padding looks at itself, so that no softmax is empty
    seen = jnp.broadcast_to(jnp.asarray(kind == (1 if conditional else 0)), (b, d, len(kind)))
    return jnp.concatenate([jnp.broadcast_to(top, (b, *top.shape)), jnp.concatenate([seen, same], 2)], 1)


def _coarse_first(memory, shapes, valid):
    """The decoder reads the levels in the other order than the encoder (Mask DINO)."""
    cuts = np.cumsum([h * w for h, w in shapes])[:-1]
    reverse = lambda x: jnp.concatenate(jnp.split(x, cuts, 1)[::-1], 1)
    return reverse(memory), shapes[::-1], reverse(valid)
