"""The MQ-Former model (Wang et al., CVPR 2025), in the order of the paper's overview figure.

    image -> backbone -> segmentation encoder -> memory, mask features
    text  -> text encoder -> prompts
    memory x prompts -> conditional queries        parameters -> learnable queries
    all queries -> decoder (with an exchange in every layer) -> scores for the prompts, boxes, masks

Every query, learnable or conditional, predicts a score for every prompt. The matcher (losses/) assigns targets to
queries.
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
from mqformer_jax.models.heads import Heads, Prompts, normalize
from mqformer_jax.models.maskdino_options import initial_anchors, order_levels
from mqformer_jax.models.pixel_decoder import Features, Memory, PixelDecoder
from mqformer_jax.models.queries import (
    ConditionalQueries,
    DenoisingQueries,
    LearnableQueries,
    Queries,
    concatenate,
)
from mqformer_jax.models.text_encoder import make_text_encoder


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Predictions:
    """The predictions of q queries at s stages, for p prompts.

    The stages are the proposals (only if there are conditional queries), the decoder's initial queries (only with
    `model.initial_pred`) and each decoder layer. boxes: cx, cy, w, h as fractions of the canvas. mask_embed: mask
    embeddings, whose dot products with `Outputs.mask_features` are the mask logits.
    """

    class_logits: Float[Array, "s b q p"]
    boxes: Float[Array, "s b q 4"]
    mask_embed: Float[Array, "s b q d"]


@no_type_check  # see `Batch`
@flax.struct.dataclass
class Outputs:
    """The output of the model for a batch of images.

    matching: the predictions of the learnable and conditional queries, in this order, which are matched to targets.
    denoising: the predictions of the denoising queries, or None. mask_features: see `Predictions.mask_embed`.
    num_learnable: the number of learnable queries. decoupled: whether learnable queries match only regions and
    conditional queries only instances (OpenSeeD's hard split).
    """

    matching: Predictions
    denoising: Predictions | None
    mask_features: Float[Array, "b h w d"]
    num_learnable: int = flax.struct.field(pytree_node=False)
    decoupled: bool = flax.struct.field(pytree_node=False, default=False)


class MQFormer(nnx.Module):
    """The MQ-Former model: encode -> propose -> decode -> predict (see the module's docstring).

    config: `config.model`.
    """

    def __init__(self, config: ConfigDict, *, rngs: nnx.Rngs):
        c, dtype, decoder_dtype = config, jnp.dtype(config.dtype), jnp.dtype(config.decoder_dtype or config.dtype)
        self.dtype = dtype
        self.num_learnable, self.num_conditional = query_counts(c)
        self.joint, self.decoupled = c.interaction == "joint", c.queries == "decoupled"
        self.initialize_box_type, self.level_order = c.initialize_box_type, c.level_order
        self.initial_pred = c.initial_pred
        mixed = self.num_learnable > 0 and self.num_conditional > 0

        self.backbone = make_backbone(c.backbone, c.remat, rngs, dtype)
        self.text_encoder = make_text_encoder(c.text, rngs, dtype)
        self.region_embedding = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (2, c.text.embed_dim))) if c.region_embedding else None
        )
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels, c.width, c.heads, c.num_sampling_points, c.encoder_layers, c.encoder_ffn,
            tuple(c.strides), c.mask_dim, c.mask_stride, rngs=rngs, dtype=dtype, remat=c.remat,
        )  # fmt: skip
        self.heads = Heads(c.width, c.text.embed_dim, c.mask_dim, c.score == "cosine", rngs=rngs, dtype=decoder_dtype)
        self.learnable = LearnableQueries(self.num_learnable, c.width, rngs=rngs) if self.num_learnable else None
        conditional = functools.partial(ConditionalQueries, self.num_conditional, c.width, c.learned_content)
        self.conditional = conditional(rngs=rngs, dtype=decoder_dtype) if self.num_conditional else None
        self.denoising_embedding = nnx.Linear(c.text.embed_dim, c.width, dtype=decoder_dtype, rngs=rngs)
        self.decoder = Decoder(
            c.width, c.heads, c.ffn, c.decoder_layers, len(c.strides), c.num_sampling_points,
            mixed and c.interaction == "exchange", rngs=rngs, dtype=decoder_dtype, remat=c.remat,
        )  # fmt: skip

    def embed_text(
        self, tokens: Int[Array, "*n l"] | Float[Array, "*n e"], is_region: Bool[Array, "*n"]
    ) -> Float[Array, "*n e"]:
        """Return the prompt embeddings: the output of the text encoder plus a region embedding.

        tokens: token ids, or vectors that the text encoder has already computed. is_region: see `Prompt`.

        The paper does not say how one model distinguishes COCO's "person" (each person) from ADE's "person" (all people
        as one region). Here, one of two learned region embeddings is added to the text's embedding (unless
        `model.region_embedding` is off). In a new run, both start near the negative mean of the text embeddings
        (`TrainStep.center_prompts`). In a run that starts from trained weights without region embeddings, they start at
        zero (`training.warm_start`).
        """
        encoded = jnp.issubdtype(tokens.dtype, jnp.floating)
        embeddings = tokens.astype(self.dtype) if encoded else self.text_encoder(tokens)
        if self.region_embedding is None:
            return embeddings
        return embeddings + self.region_embedding[...][is_region.astype(jnp.int32)].astype(embeddings.dtype)

    def __call__(
        self,
        image: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
        size: Int[Array, "b 2"],
        prompt_embeddings: Float[Array, "b p e"],
        prompt_valid: Bool[Array, "b p"],
        denoising: DenoisingQueries | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> Outputs:
        """Return the predictions for a batch of images.

        image: 0 to 255, padded on the right and at the bottom to one canvas. size: height and width of the valid part,
        pixels. prompt_embeddings: from `embed_text`. denoising: queries to decode in addition, in training. keys: one
        per image, for the backbone's drop path; None in evaluation.
        """
        pixels = (image.astype(jnp.float32) - jnp.asarray(self.backbone.mean)) / jnp.asarray(self.backbone.std)
        features = self.backbone(pixels.astype(self.dtype), keys)
        return self.segment(features, image.shape[1:3], size, prompt_embeddings, prompt_valid, denoising)

    def segment(
        self,
        features: Features,
        canvas: tuple[int, int],
        size: Int[Array, "b 2"],
        prompt_embeddings: Float[Array, "b p e"],
        prompt_valid: Bool[Array, "b p"],
        denoising: DenoisingQueries | None = None,
    ) -> Outputs:
        """Return the predictions, given the features that the backbone has computed.

        features: {stride: feature}. canvas: height and width of the padded images in pixels. For the other arguments,
        see `__call__`.
        """
        # a float32 model multiplies in full precision; by default, TPUs and GPUs would round the factors
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None):
            prompts = Prompts(prompt_embeddings, prompt_valid)
            memory, mask_features = self.encode(features, canvas, size)
            proposals, queries = self.propose(memory, mask_features, prompts)
            if denoising is not None:
                queries = concatenate(queries, self.denoise(denoising, prompts))
            content, boxes = self.decode(queries, denoising, memory)
            return self.predict(proposals, content, boxes, mask_features, prompts)

    def encode(
        self, features: Features, canvas: tuple[int, int], size: Int[Array, "b 2"]
    ) -> tuple[Memory, Float[Array, "b h w m"]]:
        """Return the memory, with its levels in the decoder's order, and the mask features."""
        memory, mask_features = self.pixel_decoder(features, size, canvas)
        return order_levels(memory, self.level_order), mask_features

    def propose(
        self, memory: Memory, mask_features: Float[Array, "b h w m"], prompts: Prompts
    ) -> tuple[Queries | None, Queries]:
        """Return the proposals and the decoder's initial queries.

        In both, learnable queries come before conditional queries. Without conditional queries, the proposals are None.
        """
        learnable = None if self.learnable is None else self.learnable(len(memory.tokens))
        if self.conditional is None:
            return None, learnable
        proposals = self.conditional(memory, self.heads, prompts)
        anchors = initial_anchors(proposals, mask_features, self.heads, self.initialize_box_type)
        conditional = Queries(self.conditional.initial_content(proposals), anchors)
        if learnable is None:
            return proposals, conditional
        # The stage of the proposals includes the learnable queries, but passes no gradients to them. The stage of the
        # initial queries includes the same learnable queries and trains them.
        return concatenate(jax.lax.stop_gradient(learnable), proposals), concatenate(learnable, conditional)

    def denoise(self, denoising: DenoisingQueries, prompts: Prompts) -> Queries:
        """Return the denoising queries in the form that the decoder reads.

        The content is computed from the embedding of the query's prompt (`DenoisingQueries.prompt`). The anchors are
        the noised boxes.
        """
        claimed = jnp.take_along_axis(prompts.embeddings, denoising.prompt[..., None], 1)
        content = self.denoising_embedding(normalize(claimed) if self.heads.cosine else claimed)
        anchors = jax.scipy.special.logit(jnp.clip(denoising.boxes, 1e-3, 1 - 1e-3))  # Mask DINO's range
        return Queries(content, anchors)

    def decode(
        self, queries: Queries, denoising: DenoisingQueries | None, memory: Memory
    ) -> tuple[Float[Array, "s b q d"], Float[Array, "s b q 4"]]:
        """Return the queries' content and boxes before the first layer (with `initial_pred`) and after each layer."""
        counts = self.num_learnable, self.num_conditional
        mask = attention_mask(*counts, self.joint, denoising)
        content, boxes = self.decoder(queries, mask, counts, memory, self.heads)
        if self.initial_pred:
            content = jnp.concatenate([queries.content.astype(content.dtype)[None], content])
            boxes = jnp.concatenate([jax.nn.sigmoid(queries.anchors)[None], boxes])
        return content, boxes

    def predict(
        self,
        proposals: Queries | None,
        content: Float[Array, "s b q d"],
        boxes: Float[Array, "s b q 4"],
        mask_features: Float[Array, "b h w m"],
        prompts: Prompts,
    ) -> Outputs:
        """Return the predictions of all stages. The proposals, if any, are the first stage."""
        n = self.num_learnable + self.num_conditional
        stages = self._predictions(content, boxes, prompts)
        matching = jax.tree.map(lambda x: x[:, :, :n], stages)
        denoising = jax.tree.map(lambda x: x[:, :, n:], stages) if content.shape[2] > n else None
        if proposals is not None:
            first = proposals.content.astype(content.dtype)[None], jax.nn.sigmoid(proposals.anchors)[None]
            matching = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), self._predictions(*first, prompts), matching
            )
        return Outputs(matching, denoising, mask_features, self.num_learnable, self.decoupled)

    def _predictions(
        self, content: Float[Array, "s b q d"], boxes: Float[Array, "s b q 4"], prompts: Prompts
    ) -> Predictions:
        logits, mask_embed = self.heads(content, prompts)
        return Predictions(logits, boxes, mask_embed)


def query_counts(config: ConfigDict) -> tuple[int, int]:
    """Return the numbers of learnable and conditional queries for the strategy `config.queries`.

    The total is the same for all strategies (400 in the paper's ablations). config: `config.model`.
    """
    total = config.num_learnable + config.num_conditional
    return {"learnable": (total, 0), "conditional": (0, total)}.get(
        config.queries, (config.num_learnable, config.num_conditional)
    )


def attention_mask(
    learnable: int, conditional: int, joint: bool, denoising: DenoisingQueries | None
) -> Bool[Array, "#b q q"]:
    """Return the mask of self-attention: True where the query of a row may attend to the query of a column.

    learnable, conditional: the number of queries of each kind. These queries attend to their own kind, or to both kinds
    if `joint`. Denoising queries attend to their group and to the conditional queries, whose anchors also come from
    boxes (or to the learnable queries, if there are no conditional ones). No other query attends to denoising queries.
    """
    kind = np.repeat([0, 1], [learnable, conditional])
    own = np.full((len(kind),) * 2, True) if joint else kind[:, None] == kind[None]
    if denoising is None:
        return jnp.asarray(own)[None]
    b, d = denoising.group.shape
    top = np.concatenate([own, np.zeros((len(kind), d), bool)], 1)
    same = (denoising.group[:, :, None] == denoising.group[:, None]) & denoising.valid[:, None]
    same |= jnp.eye(d, dtype=bool)  # padding attends to itself, to avoid an empty softmax
    seen = jnp.broadcast_to(jnp.asarray(kind == (1 if conditional else 0)), (b, d, len(kind)))
    return jnp.concatenate([jnp.broadcast_to(top, (b, *top.shape)), jnp.concatenate([seen, same], 2)], 1)
