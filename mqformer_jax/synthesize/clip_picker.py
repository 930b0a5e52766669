"""Which box words mean, by CLIP (Radford et al. 2021, arXiv:2103.00020): in torch, as Hugging Face transformers has
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from transformers import CLIPModel

from mqformer_jax.synthesize.hugging_face import PIXELS, crop, device, load
from mqformer_jax.synthesize.teachers import Picture

CHUNK = 64  # crops or texts at a time


class ClipPicker:
    """Fit is the cosine, -1 to 1, between a caption and the crop of a box with a margin (`crop`).

    The crop is warped to CLIP's square: of a long box the usual centre crop would show the middle only.
    where: a local folder or a name on the Hugging Face hub, such as openai/clip-vit-large-patch14.
    Raises ValueError in one line where it cannot be loaded.
    """

    def __init__(self, where: str) -> None:
        self.model, self.processor, self.name = load("clip", CLIPModel, where)
        self.side = self.model.config.vision_config.image_size
        self.longest = self.model.config.text_config.max_position_embeddings

    def __call__(
        self, pictures: Sequence[Picture], captions: Sequence[Sequence[Sequence[str]]]
    ) -> list[list[Float[np.ndarray, "_c _n"]]]:
        """Of each picture, for each of its n boxes, the cosines of its c captions with each of the n boxes.

        Captions beyond CLIP's context (77 tokens) are cut. Every crop is encoded once, and so is every text, however
        often it occurs.
        """
        texts = list(dict.fromkeys(text for boxes in captions for said in boxes for text in said))
        rows = {text: row for row, text in enumerate(texts)}
        words = self._encode(texts, self._words)
        crops = self._encode([(picture.image, box) for picture in pictures for box in picture.boxes], self._crops)
        first = np.cumsum([0, *(len(picture.boxes) for picture in pictures)])
        return [
            [words[[rows[text] for text in said]] @ crops[start:stop].T for said in boxes]
            for boxes, start, stop in zip(captions, first, first[1:])
        ]

    @torch.inference_mode()
    def _encode(self, items: list, features: Callable[[list], torch.Tensor]) -> Float[np.ndarray, "i d"]:
        """Unit vectors, one an item."""
        parts = [features(items[i : i + CHUNK]).float() for i in range(0, len(items), CHUNK)]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()

    def _words(self, texts: list[str]) -> torch.Tensor:
        inputs = self.processor(text=texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        return self.model.get_text_features(**inputs.to(*device())).pooler_output

    def _crops(self, asked: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
        size = dict(height=self.side, width=self.side)
        inputs = self.processor(images=[crop(*one) for one in asked], size=size, do_center_crop=False, **PIXELS)
        return self.model.get_image_features(**inputs.to(*device())).pooler_output
