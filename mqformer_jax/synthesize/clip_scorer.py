"""`ClipScorer`: use CLIP from Hugging Face (Radford et al. 2021, arXiv:2103.00020) to score captions of boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from transformers import CLIPModel

from mqformer_jax.synthesize.hugging_face import PIXELS, crop, device, load
from mqformer_jax.synthesize.teachers import Picture

CHUNK = 64  # crops or texts per batch


class ClipScorer:
    """A `CaptionScorer` that uses CLIP: a score is the cosine similarity, -1 to 1, of a caption and the crop of a box.

    The crop has a margin (see `crop`). It is resized to CLIP's square input without keeping the aspect ratio, because
    a center crop would show only the middle of a long box.
    where: a local folder or a name on the Hugging Face hub, such as openai/clip-vit-large-patch14.
    Raises ValueError with a one-line message if the model cannot be loaded.
    """

    def __init__(self, where: str) -> None:
        self.model, self.processor, self.name = load("clip", CLIPModel, where)
        self.side = self.model.config.vision_config.image_size
        self.longest = self.model.config.text_config.max_position_embeddings

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Float[np.ndarray, "_c _n"]]]:
        """Return, for each of the n boxes of each image, the similarity of the box's c captions to all n boxes.

        Captions are cut at CLIP's context length, 77 tokens. Each crop and each distinct text is encoded once.
        """
        texts = list(dict.fromkeys(text for boxes in captions for some in boxes for text in some))
        rows = {text: row for row, text in enumerate(texts)}
        words = self._encode(texts, self._words)
        crops = self._encode([(picture.image, box) for picture in pictures for box in picture.boxes], self._crops)
        first = np.cumsum([0, *(len(picture.boxes) for picture in pictures)])
        return [
            [words[[rows[text] for text in some]] @ crops[start:stop].T for some in boxes]
            for boxes, start, stop in zip(captions, first, first[1:])
        ]

    @torch.inference_mode()
    def _encode(self, items: list, features: Callable[[list], torch.Tensor]) -> Float[np.ndarray, "i d"]:
        """Return one unit vector per item."""
        parts = [features(items[i : i + CHUNK]).float() for i in range(0, len(items), CHUNK)]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()

    def _words(self, texts: list[str]) -> torch.Tensor:
        inputs = self.processor(text=texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(*device())).pooler_output

    def _crops(self, regions: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
        size = dict(height=self.side, width=self.side)
        inputs = self.processor(images=[crop(*region) for region in regions], size=size, do_center_crop=False, **PIXELS)
        return self.model.get_image_features(**inputs.to(*device())).pooler_output
