"""Caption boxes with BLIP, BLIP-2 and Florence-2 from Hugging Face transformers.

As in the paper (MQ-Former, sec. 3.4), each box gets the five best captions of a beam search. The score of a caption is
exp of the mean log-probability of its tokens, 0 to 1. Captions describe the box alone, so they may also fit other
objects of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from transformers import (
    BatchFeature,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
    LogitsProcessor,
)

from mqformer_jax.synthesize.hugging_face import PIXELS, crop, device, load
from mqformer_jax.synthesize.teachers import Caption, Picture

CAPTIONS = 5  # per box
TOKENS = 32  # largest length of a caption
# Boxes per batch. Beam search holds TOKENS x CAPTIONS x CHUNK scores per vocabulary entry: 0.5 GB for 50,000 entries.
CHUNK = 16

Regions = Sequence[tuple[Picture, Float[ndarray, "4"]]]


class Blip:
    """A `Captioner` that uses BLIP (Li et al. 2022, arXiv:2201.12086), without a prompt.

    The input is the crop of a box with a margin (see `crop`).
    where: a local folder or a name on the Hugging Face hub, such as Salesforce/blip-image-captioning-large.
    Raises ValueError with a one-line message if the model cannot be loaded.
    """

    family, model_class = "blip", BlipForConditionalGeneration
    unique = False

    def __init__(self, where: str) -> None:
        self.model, self.processor, self.name = load(self.family, self.model_class, where)
        self.processors: list[LogitsProcessor] = []

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """Return `CAPTIONS` captions for each box of each image, best first. Several may be equal."""
        regions = [(picture, box) for picture in pictures for box in picture.boxes]
        found = iter(
            [captions for i in range(0, len(regions), CHUNK) for captions in self._search(regions[i : i + CHUNK])]
        )
        return [[next(found) for _ in picture.boxes] for picture in pictures]

    @torch.inference_mode()
    def _search(self, regions: Regions) -> list[list[Caption]]:
        inputs = self._inputs(regions).to(*device())  # not model.dtype, because parts of BLIP-2 stay in float32
        # Override the generation_config of the checkpoint. With this length penalty, scores are means over tokens.
        search = dict(
            num_beams=CAPTIONS, num_return_sequences=CAPTIONS, do_sample=False, early_stopping=False, length_penalty=1.0
        )
        answer = dict(max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True)
        found = self.model.generate(**inputs, **search, **answer, logits_processor=self.processors)
        texts = self.processor.batch_decode(found.sequences, skip_special_tokens=True)
        captions = [
            Caption(text.strip(), score)
            for text, score in zip(texts, found.sequences_scores.exp().clamp(max=1).tolist())
        ]
        return [captions[i : i + CAPTIONS] for i in range(0, len(captions), CAPTIONS)]

    def _inputs(self, regions: Regions) -> BatchFeature:
        return self.processor(images=[crop(picture.image, box) for picture, box in regions], **PIXELS)


class Blip2(Blip):
    """A `Captioner` like `Blip` that uses BLIP-2 (Li et al. 2023, arXiv:2301.12597), e.g. Salesforce/blip2-opt-2.7b."""

    family, model_class = "blip2", Blip2ForConditionalGeneration


class Florence2(Blip):
    """A `Captioner` that uses Florence-2 (Xiao et al. 2023, arXiv:2311.06242).

    The input is the whole image. The prompt contains the box as four location tokens, of which the vocabulary has
    1,000. where: see `Blip`, e.g. florence-community/Florence-2-large. Microsoft's own repositories of these weights
    have another layout, which is not supported.
    """

    family, model_class = "florence2", Florence2ForConditionalGeneration

    def __init__(self, where: str) -> None:
        super().__init__(where)
        tokenizer = self.processor.tokenizer
        vocabulary = tokenizer.get_vocab()
        if "<loc_999>" not in vocabulary:
            raise ValueError(
                f"florence2:{where}: the model's tokenizer has no location tokens (<loc_0> to <loc_999>). "
                "Give another model, e.g. florence-community/Florence-2-large."
            )
        locations = torch.tensor([vocabulary[f"<loc_{i}>"] for i in range(1000)], device=self.model.device)
        self.processors = [WordsOnly(tokenizer.eos_token_id, locations)]

    def _inputs(self, regions: Regions) -> BatchFeature:
        prompts = []
        for picture, box in regions:
            height, width = picture.image.shape[:2]
            bins = self.processor.post_processor.quantize(
                torch.as_tensor(box, dtype=torch.float32), (width, height)
            ).tolist()
            prompts.append("<REGION_TO_DESCRIPTION>" + "".join(f"<loc_{i}>" for i in bins))
        images = [picture.image for picture, _ in regions]
        return self.processor(images=images, text=prompts, padding=True, **PIXELS)


class WordsOnly(LogitsProcessor):
    """End a caption where a location token would follow.

    Florence-2 repeats the box after its caption ("turquoise car<loc_52><loc_332><loc_932><loc_774>"), and most of the
    five beams would differ only in these tokens. So the probabilities of all location tokens are added to that of the
    end token. The sum is the probability that the caption is complete.
    """

    def __init__(self, end: int, locations: Int[torch.Tensor, " l"]) -> None:
        self.end, self.locations = end, locations

    def __call__(
        self, input_ids: Int[torch.Tensor, "b t"], scores: Float[torch.Tensor, "b v"]
    ) -> Float[torch.Tensor, "b v"]:
        """Return the scores with the probability of all location tokens added to that of the end token.

        scores: log-probabilities.
        """
        at_end = torch.cat([scores[:, self.locations], scores[:, [self.end]]], 1).logsumexp(1)
        scores = scores.index_fill(1, self.locations, -torch.inf)
        scores[:, self.end] = at_end
        return scores
