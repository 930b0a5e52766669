"""Captions of boxes by models that others trained: BLIP, BLIP-2 and Florence-2, in torch, as Hugging Face transformers
has them.

As in the paper (MQ-Former, sec. 3.4), the five best captions of each box: beam search. A caption's score is exp of the
mean log-probability of its tokens, 0 to 1. They speak of the box alone, so one may fit other objects of the image as
well.
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

CAPTIONS = 5  # a box
TOKENS = 32  # the longest caption
# boxes at a time; the search keeps TOKENS x 5 x CHUNK rows of the vocabulary: 0.5 GB where that has 50,000 tokens
CHUNK = 16

Asked = Sequence[tuple[Picture, Float[ndarray, "4"]]]


class Blip:
    """BLIP (Li et al. 2022, arXiv:2201.12086) is shown the crop of the box, with a margin (`crop`), and asked nothing.

    where: a local folder or a name on the Hugging Face hub, such as Salesforce/blip-image-captioning-large.
    Raises ValueError in one line where it cannot be loaded.
    """

    family, model_class = "blip", BlipForConditionalGeneration
    unique = False

    def __init__(self, where: str) -> None:
        self.model, self.processor, self.name = load(self.family, self.model_class, where)
        self.processors: list[LogitsProcessor] = []

    def __call__(self, pictures: Sequence[Picture]) -> list[list[list[Caption]]]:
        """Of each picture, for each of its boxes, `CAPTIONS` captions, best first. Two may read the same."""
        asked = [(picture, box) for picture in pictures for box in picture.boxes]
        found = iter([captions for i in range(0, len(asked), CHUNK) for captions in self._search(asked[i : i + CHUNK])])
        return [[next(found) for _ in picture.boxes] for picture in pictures]

    @torch.inference_mode()
    def _search(self, asked: Asked) -> list[list[Caption]]:
        inputs = self._inputs(asked).to(*device())  # not model.dtype: half a BLIP-2 stays in float32
        # all that a checkpoint's generation_config could say of the search, and what makes the scores means
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

    def _inputs(self, asked: Asked) -> BatchFeature:
        return self.processor(images=[crop(picture.image, box) for picture, box in asked], **PIXELS)


class Blip2(Blip):
    """BLIP-2 (Li et al. 2023, arXiv:2301.12597), shown what BLIP is shown; such as Salesforce/blip2-opt-2.7b."""

    family, model_class = "blip2", Blip2ForConditionalGeneration


class Florence2(Blip):
    """Florence-2 (Xiao et al. 2023, arXiv:2311.06242) is shown the whole image and asked to describe the box.

    The box is given as four of the 1,000 location tokens of each axis. where: such as
    florence-community/Florence-2-large (microsoft's own folder of those weights is laid out for other code).
    """

    family, model_class = "florence2", Florence2ForConditionalGeneration

    def __init__(self, where: str) -> None:
        super().__init__(where)
        tokenizer = self.processor.tokenizer
        vocabulary = tokenizer.get_vocab()
        if "<loc_999>" not in vocabulary:
            raise ValueError(
                f"florence2:{where}: its tokenizer has no location tokens. Give a folder such as florence-community's."
            )
        locations = torch.tensor([vocabulary[f"<loc_{i}>"] for i in range(1000)], device=self.model.device)
        self.processors = [WordsOnly(tokenizer.eos_token_id, locations)]

    def _inputs(self, asked: Asked) -> BatchFeature:
        prompts = []
        for picture, box in asked:
            height, width = picture.image.shape[:2]
            bins = self.processor.post_processor.quantize(
                torch.as_tensor(box, dtype=torch.float32), (width, height)
            ).tolist()
            prompts.append("<REGION_TO_DESCRIPTION>" + "".join(f"<loc_{i}>" for i in bins))
        images = [picture.image for picture, _ in asked]
        return self.processor(images=images, text=prompts, padding=True, **PIXELS)


class WordsOnly(LogitsProcessor):
    """A caption ends where a location would follow.

    Florence-2 says the box again after its words ("turquoise car<loc_52><loc_332><loc_932><loc_774>"); most of five
    beams would differ in that alone. So the probability of all locations is that of the end: exactly that of these
    words being all the words.
    """

    def __init__(self, end: int, locations: Int[torch.Tensor, " l"]) -> None:
        self.end, self.locations = end, locations

    def __call__(
        self, input_ids: Int[torch.Tensor, "b t"], scores: Float[torch.Tensor, "b v"]
    ) -> Float[torch.Tensor, "b v"]:
        """scores: log-probabilities, which is what a beam search hands on."""
        at_end = torch.cat([scores[:, self.locations], scores[:, [self.end]]], 1).logsumexp(1)
        scores = scores.index_fill(1, self.locations, -torch.inf)
        scores[:, self.end] = at_end
        return scores
