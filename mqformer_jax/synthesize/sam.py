"""Masks in boxes by SAM, HQ-SAM and SAM 2: their published weights, run by torch and Hugging Face's transformers (5.4
or newer).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from mqformer_jax.segments import CanvasMasks
from mqformer_jax.synthesize.hugging_face import device, find, mark
from mqformer_jax.synthesize.teachers import Drawn, Picture

PICTURES = 2  # images that are encoded at once: one of 1024 x 1024 keeps a device busy
BOXES = 32  # boxes of one image that are decoded at once: each has its own copy of the image's features
# What a config.json calls itself: the teacher that reads it. SAM 2 is published as its video model, which holds the one
# for images.
FAMILIES = {"sam": "sam", "sam_hq": "hq-sam", "sam2": "sam2", "sam2_video": "sam2"}

transformers.logging.set_verbosity_error()  # else it warns of the parts for video that are not used
transformers.logging.disable_progress_bar()


class Sam:
    """Segment Anything, a `MaskTeacher` (Kirillov et al., arXiv:2304.02643;
    github.com/facebookresearch/segment-anything).

    where: a folder as transformers saves it, or a name on the Hugging Face hub, as "facebook/sam-vit-huge". Raises
    ValueError in one line where it cannot be read, or is another family's. Runs on the GPU where torch finds one, else
    on the CPU.

    A box is asked for one mask (`multimask_output=False`), as the authors do with boxes: the three others are for a
    lone point, which may mean a part or the whole. The score is the IoU that the model predicts.
    """

    family = "sam"
    model_type: type = transformers.SamModel
    # Pillow resizes for SAM's authors too; and so masks are the same whether torchvision is installed or not
    image_processor_type: type = transformers.SamImageProcessorPil
    pads = True  # the longer side is resized to the canvas and the rest of it padded; else both sides are resized to it

    def __init__(self, where: str) -> None:
        found, folder = self.family, find(f"{self.family}:{where}", where)
        try:
            with open(os.path.join(folder, "config.json")) as f:
                found = FAMILIES.get(json.load(f)["model_type"], "")
            if found != self.family:
                raise ValueError(f"it holds {found or 'something else'}")
            self.image_processor = self.image_processor_type.from_pretrained(folder)
            model, told = self.model_type.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if lacking := {
                *told["missing_keys"],
                *(key for key, *_ in told["mismatched_keys"]),
            }:  # these were drawn at random
                raise ValueError(f"{min(lacking)} is not there, or has another shape")
        except Exception as e:  # what is broken ends in an error of json, safetensors, torch or transformers
            files = "config.json, preprocessor_config.json and model.safetensors, as transformers saves them"
            mend = f"give a folder with its {files}" if found in ("", self.family) else f"say {found}:{where}"
            raise ValueError(f"{self.family}:{where} cannot be read ({_gist(e)}): {mend}.") from e
        self.name, (self.device, _) = mark(self.family, where, folder), device()
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture], boxes: Sequence[Float[np.ndarray, "_k 4"]]) -> list[Drawn]:
        """One mask, as logits, for each box (x0, y0, x1, y1 in pixels) of each picture."""
        drawn = [_nothing(picture.image.shape[:2]) for picture in pictures]
        asked = [i for i, wanted in enumerate(boxes) if len(wanted)]
        for start in range(0, len(asked), PICTURES):
            group = asked[start : start + PICTURES]
            inputs = [
                self.image_processor(pictures[i].image, input_data_format="channels_last", return_tensors="pt")
                for i in group
            ]
            pixels = torch.cat([given["pixel_values"] for given in inputs]).to(self.device)
            # nearly all the time goes here, and half precision is what the authors of SAM 2 run in
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                encoded = self._encode(pixels)
            canvas = tuple(pixels.shape[-2:])
            for row, (i, given) in enumerate(zip(group, inputs)):
                valid = tuple(given["reshaped_input_sizes"][0].tolist()) if self.pads else canvas
                drawn[i] = self._draw(_row(encoded, row), boxes[i], canvas, valid, pictures[i].image.shape[:2])
        return drawn

    def _encode(self, pixels: torch.Tensor) -> dict[str, Any]:
        """What the decoder is given of b images [b, 3, h, w]: tensors [b, ...], or lists of them."""
        return {"image_embeddings": self.model.get_image_embeddings(pixels)}

    def _draw(
        self,
        encoded: dict[str, Any],
        boxes: Float[np.ndarray, "k 4"],
        canvas: tuple[int, int],
        valid: tuple[int, int],
        output: tuple[int, int],
    ) -> Drawn:
        """The masks of one image. canvas, valid, output: as in `restore`."""
        scale = np.tile([valid[1] / output[1], valid[0] / output[0]], 2)
        prompts = torch.from_numpy(boxes * scale)[None].to(self.device)
        answers = [self.model(input_boxes=some, multimask_output=False, **encoded) for some in prompts.split(BOXES, 1)]
        logits = torch.cat([answer.pred_masks[0, :, 0] for answer in answers]).cpu().numpy()
        scores = torch.cat([answer.iou_scores[0, :, 0] for answer in answers]).clamp(0, 1).cpu().numpy()
        if not self.pads:  # all of the mask is the image: resized to it at once
            canvas = valid = logits.shape[1:]
        return Drawn(CanvasMasks(logits, canvas, valid, output), scores)


class HqSam(Sam):
    """SAM with finer edges (Ke et al., Segment Anything in High Quality, arXiv:2306.01567; github.com/SysCV/sam-hq).

    The logits are SAM's and those of the token for high quality, added: the authors' default, and their advice for
    images of many objects (`hq_token_only=False`). The score is what the model predicts of SAM's mask; nothing rates
    the sum.
    """

    family = "hq-sam"
    model_type = transformers.SamHQModel

    def _encode(self, pixels: torch.Tensor) -> dict[str, Any]:
        return dict(zip(("image_embeddings", "intermediate_embeddings"), self.model.get_image_embeddings(pixels)))


class _Sam2Pixels(PilBackend):
    """As transformers' `Sam2ImageProcessor`, which cannot be had without torchvision, to a step of 8 bits."""

    size = {"height": 1024, "width": 1024}
    resample = PILImageResampling.BILINEAR
    image_mean, image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    do_resize = do_rescale = do_normalize = True


class Sam2(Sam):
    """SAM 2 and 2.1 (Ravi et al., arXiv:2408.00714; github.com/facebookresearch/sam2), as
    "facebook/sam2.1-hiera-large".

    Where its one mask is unsteady the model gives the best of the three others, as the authors' does.
    """

    family = "sam2"
    model_type = transformers.Sam2Model
    image_processor_type = _Sam2Pixels
    pads = False


def _nothing(output: tuple[int, int]) -> Drawn:
    return Drawn(CanvasMasks(np.zeros((0, 1, 1), np.float32), (1, 1), (1, 1), output), np.zeros(0, np.float32))


def _row(encoded: Any, row: int) -> Any:
    """One image of those that were encoded together, in float32."""
    if isinstance(encoded, dict):
        return {key: _row(value, row) for key, value in encoded.items()}
    return (
        encoded[row : row + 1].float() if isinstance(encoded, torch.Tensor) else [_row(value, row) for value in encoded]
    )


def _gist(error: Exception) -> str:
    """The first sentence, of a line."""
    return re.split(r"\.?\s*\n|\.( |$)", str(error).strip())[0] or type(error).__name__
