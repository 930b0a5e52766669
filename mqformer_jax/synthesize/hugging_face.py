"""Shared helpers of the teachers that are Hugging Face models: loading, device, name and crop."""

from __future__ import annotations

import hashlib
import math
import os
import re

import torch  # before transformers, which otherwise imports without torch and fails later
import transformers
from huggingface_hub import snapshot_download
from jaxtyping import Float, UInt8
from numpy import ndarray
from transformers import AutoProcessor, PreTrainedConfig

# Margin on each side, as a fraction of the box's width and height. R-CNN uses 0.08 (16 of 227 pixels); ViLD combines
# crops with 0 and 0.25.
MARGIN = 0.1
# Without this format, an image with three rows would be read as an image with its three channels first.
PIXELS = dict(input_data_format="channels_last", return_tensors="pt")


def load(
    family: str, model_class: type[transformers.PreTrainedModel], where: str
) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin, str]:
    """Load a model for inference. Return the model on the `device()`, its processor, and its `teacher_name`.

    family: the name on the command line. where: a local folder, or a name on the Hugging Face hub, from which the JSON,
    text and safetensors files are downloaded. Nothing is unpickled, and no code of the repository is run.
    Raises ValueError if the model cannot be loaded, with a one-line message that tells the user what to do.
    """
    given = f"{family}:{where}"
    folder = find(given, where)
    wanted = model_class.config_class.model_type
    try:
        found = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if found != wanted:
            raise ValueError(f'its config.json has model_type "{found}", not "{wanted}"')
        place, dtype = device()
        options = dict(local_files_only=True, trust_remote_code=False)
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        if report["missing_keys"]:  # they would keep random values
            raise ValueError(
                f"the weights of {model_class.__name__} lack {len(report['missing_keys'])} tensors, "
                f"such as {sorted(report['missing_keys'])[0]}"
            )
        # The backend "pil" gives the same result with and without torchvision.
        processor = AutoProcessor.from_pretrained(folder, backend="pil", **options)
        if not isinstance(processor, transformers.ProcessorMixin):  # some of its files are missing
            raise ValueError(f"the processor is incomplete: only the files of a {type(processor).__name__} were found")
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("the tokenizer has no vocabulary: tokenizer.json is missing")
    except Exception as e:  # broken files raise errors of json, safetensors, tokenizers, torch or transformers
        reason = " ".join(str(e).split())[:300].rstrip(" .")
        raise ValueError(
            f"{given}: {reason}. Give a folder with safetensors, written by save_pretrained of {model_class.__name__} "
            "and of its processor."
        ) from e
    return model.to(place).eval(), processor, teacher_name(family, where, folder)


def device() -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for inference: GPU and float16 if there is a GPU, else CPU and float32."""
    return (torch.device("cuda"), torch.float16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def teacher_name(family: str, where: str, folder: str) -> str:
    """Return the name under which records store a teacher, e.g. "blip:my_blip 0f3a9c1e (transformers 5.4.0)".

    The name consists of the family, the name of the folder or hub repository, eight hex digits of a digest of the
    config and the weights, and the version of transformers. family, where: see `load`. folder: the local folder.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in os.listdir(folder) if name == "config.json" or name.endswith(".safetensors")):
        with open(os.path.join(folder, name), "rb") as f:
            # Hash whole files: a fine-tuned model may differ only in the values of its weights.
            digest.update(hashlib.file_digest(f, "sha256").digest())
    label = os.path.basename(os.path.abspath(where)) if os.path.isdir(where) else where
    return f"{family}:{label} {digest.hexdigest()[:8]} (transformers {transformers.__version__})"


def crop(image: UInt8[ndarray, "h w 3"], box: Float[ndarray, " 4"]) -> UInt8[ndarray, "ch cw 3"]:
    """Return the pixels of the box x0, y0, x1, y1 enlarged by `MARGIN` and clipped to the image."""
    x0, y0, x1, y1 = map(float, box)
    x, y = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    return image[max(math.floor(y0 - y), 0) : math.ceil(y1 + y), max(math.floor(x0 - x), 0) : math.ceil(x1 + x)]


def find(given: str, where: str) -> str:
    """Return the local folder of a model. Download the model if necessary.

    given: the teacher as the user wrote it, for messages. Raises ValueError if `where` is neither a folder nor a model
    that can be downloaded.
    """
    if os.path.isdir(where):
        return where
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", where):
        raise ValueError(
            f"{given}: there is no such folder, and this is not a name on the Hugging Face hub. "
            "Give a local folder or a name such as OWNER/NAME."
        )
    try:
        return snapshot_download(
            where, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"], ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as e:  # no network, no such name, or no access
        raise ValueError(
            f"{given}: there is no such folder, and the download from the Hugging Face hub failed "
            f"({type(e).__name__}). Run `hf download {where} --local-dir FOLDER` on a machine with network access, "
            "and give that folder."
        ) from e
