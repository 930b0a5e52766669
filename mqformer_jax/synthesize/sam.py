"""Predict masks from boxes with SAM, HQ-SAM and SAM 2, using torch and Hugging Face transformers (5.4 or newer)."""

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
from mqformer_jax.synthesize.hugging_face import device, find, teacher_name
from mqformer_jax.synthesize.teachers import BoxMasks, Picture

PICTURES = 2  # images per call of the encoder: one image of 1024 x 1024 already fills a device
BOXES = 32  # boxes of an image per call of the decoder: each box has its own copy of the image's features
# {model_type of a config.json: name of the teacher that reads it}. SAM 2 is published as its video model, which
# contains the image model.
FAMILIES = {"sam": "sam", "sam_hq": "hq-sam", "sam2": "sam2", "sam2_video": "sam2"}

transformers.logging.set_verbosity_error()  # otherwise transformers warns about the unused video parts
transformers.logging.disable_progress_bar()


class Sam:
    """A `MaskTeacher` that uses Segment Anything (Kirillov et al., arXiv:2304.02643).

    Source: github.com/facebookresearch/segment-anything.

    where: a folder written by save_pretrained, or a name on the Hugging Face hub, such as "facebook/sam-vit-huge".
    Raises ValueError with a one-line message if the model cannot be read or belongs to another family. The model runs
    on the GPU if torch finds one, else on the CPU.

    Each box gets one mask (`multimask_output=False`), as in the authors' code. The model's other three masks are for
    prompts of a single point, which may mean a part or the whole of an object. The score is the IoU that the model
    predicts.
    """

    family = "sam"
    model_type: type = transformers.SamModel
    # Resize with Pillow, like the authors, so that the masks do not depend on whether torchvision is installed.
    image_processor_type: type = transformers.SamImageProcessorPil
    pads = True  # whether to keep the aspect ratio and pad the image; else resize both sides to the canvas

    def __init__(self, where: str) -> None:
        found, folder = self.family, find(f"{self.family}:{where}", where)
        try:
            with open(os.path.join(folder, "config.json")) as f:
                found = FAMILIES.get(json.load(f)["model_type"], "")
            if found != self.family:
                raise ValueError(f"its config.json describes {found or 'another model'}")
            self.image_processor = self.image_processor_type.from_pretrained(folder)
            model, report = self.model_type.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if lacking := {
                *report["missing_keys"],
                *(key for key, *_ in report["mismatched_keys"]),
            }:  # these have random values
                raise ValueError(f"{min(lacking)} is missing or has an unexpected shape")
        except Exception as e:  # broken files raise errors of json, safetensors, torch or transformers
            files = "config.json, preprocessor_config.json and model.safetensors, as save_pretrained writes them"
            mend = f"give a folder with {files}" if found in ("", self.family) else f"use {found}:{where}"
            raise ValueError(f"{self.family}:{where} cannot be read ({_gist(e)}): {mend}.") from e
        self.name, (self.device, _) = teacher_name(self.family, where, folder), device()
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture], boxes: Sequence[Float[np.ndarray, "_k 4"]]) -> list[BoxMasks]:
        """Return the logits of one mask for each box (x0, y0, x1, y1 in pixels) of each image."""
        drawn = [_nothing(picture.image.shape[:2]) for picture in pictures]
        nonempty = [i for i, wanted in enumerate(boxes) if len(wanted)]
        for start in range(0, len(nonempty), PICTURES):
            group = nonempty[start : start + PICTURES]
            inputs = [
                self.image_processor(pictures[i].image, input_data_format="channels_last", return_tensors="pt")
                for i in group
            ]
            pixels = torch.cat([given["pixel_values"] for given in inputs]).to(self.device)
            # The encoder takes nearly all the time. The authors of SAM 2 also use half precision.
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                encoded = self._encode(pixels)
            canvas = tuple(pixels.shape[-2:])
            for row, (i, given) in enumerate(zip(group, inputs)):
                valid = tuple(given["reshaped_input_sizes"][0].tolist()) if self.pads else canvas
                drawn[i] = self._draw(_row(encoded, row), boxes[i], canvas, valid, pictures[i].image.shape[:2])
        return drawn

    def _encode(self, pixels: torch.Tensor) -> dict[str, Any]:
        """Return the decoder's inputs for b images [b, 3, h, w]: tensors [b, ...], or lists of them."""
        return {"image_embeddings": self.model.get_image_embeddings(pixels)}

    def _draw(
        self,
        encoded: dict[str, Any],
        boxes: Float[np.ndarray, "k 4"],
        canvas: tuple[int, int],
        valid: tuple[int, int],
        output: tuple[int, int],
    ) -> BoxMasks:
        """Return the masks of one image. encoded: see `_encode`. canvas, valid, output: sizes as in `CanvasMasks`."""
        scale = np.tile([valid[1] / output[1], valid[0] / output[0]], 2)
        prompts = torch.from_numpy(boxes * scale)[None].to(self.device)
        answers = [self.model(input_boxes=some, multimask_output=False, **encoded) for some in prompts.split(BOXES, 1)]
        logits = torch.cat([answer.pred_masks[0, :, 0] for answer in answers]).cpu().numpy()
        scores = torch.cat([answer.iou_scores[0, :, 0] for answer in answers]).clamp(0, 1).cpu().numpy()
        if not self.pads:  # the mask covers the image without padding
            canvas = valid = logits.shape[1:]
        return BoxMasks(CanvasMasks(logits, canvas, valid, output), scores)


class HqSam(Sam):
    """A `MaskTeacher` that uses HQ-SAM, a SAM with finer edges (Ke et al., arXiv:2306.01567; github.com/SysCV/sam-hq).

    The mask logits are SAM's plus those of the high-quality token. This is the authors' default
    (`hq_token_only=False`), which they recommend for images with many objects. The score is the IoU that the model
    predicts for SAM's mask. where: see `Sam`.
    """

    family = "hq-sam"
    model_type = transformers.SamHQModel

    def _encode(self, pixels: torch.Tensor) -> dict[str, Any]:
        return dict(zip(("image_embeddings", "intermediate_embeddings"), self.model.get_image_embeddings(pixels)))


class _Sam2Pixels(PilBackend):
    """An image processor for SAM 2 that does not need torchvision.

    The result differs from that of transformers' `Sam2ImageProcessor`, which needs torchvision, by at most one of 256
    levels.
    """

    size = {"height": 1024, "width": 1024}
    resample = PILImageResampling.BILINEAR
    image_mean, image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    do_resize = do_rescale = do_normalize = True


class Sam2(Sam):
    """A `MaskTeacher` that uses SAM 2 or 2.1 (Ravi et al., arXiv:2408.00714; github.com/facebookresearch/sam2).

    where: see `Sam`, e.g. "facebook/sam2.1-hiera-large". If the single mask is unstable, the model returns the best of
    its other three masks instead, as in the authors' code.
    """

    family = "sam2"
    model_type = transformers.Sam2Model
    image_processor_type = _Sam2Pixels
    pads = False


def _nothing(output: tuple[int, int]) -> BoxMasks:
    return BoxMasks(CanvasMasks(np.zeros((0, 1, 1), np.float32), (1, 1), (1, 1), output), np.zeros(0, np.float32))


def _row(encoded: Any, row: int) -> Any:
    """Return the features of one image of a batch, in float32."""
    if isinstance(encoded, dict):
        return {key: _row(value, row) for key, value in encoded.items()}
    return (
        encoded[row : row + 1].float() if isinstance(encoded, torch.Tensor) else [_row(value, row) for value in encoded]
    )


def _gist(error: Exception) -> str:
    """Return the first sentence of an error's message, or the error's type if there is no message."""
    return re.split(r"\.?\s*\n|\.( |$)", str(error).strip())[0] or type(error).__name__
