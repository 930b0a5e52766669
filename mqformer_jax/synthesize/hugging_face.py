"""What the teachers that are Hugging Face models share: how one is loaded, where it runs, what it is called, what it
sees of a box.
"""

from __future__ import annotations

import hashlib
import math
import os
import re

import torch  # before transformers, which without it imports and fails later
import transformers
from huggingface_hub import snapshot_download
from jaxtyping import Float, UInt8
from numpy import ndarray
from transformers import AutoProcessor, PreTrainedConfig

MARGIN = 0.1  # of the box's width and height, on each side; R-CNN's is 0.08 (16 of 227 pixels), ViLD mixes 0 and 0.25
# else an image of three rows is taken for one of three channels
PIXELS = dict(input_data_format="channels_last", return_tensors="pt")


def load(
    family: str, model_class: type[transformers.PreTrainedModel], where: str
) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin, str]:
    """A model on its `device`, for inference, its processor, and its mark.

    family: what users call it. where: a local folder, or a name on the Hugging Face hub, of which the JSON and text
        files and
    the safetensors are fetched: nothing is unpickled, no code that comes with weights is run.
    Raises ValueError in one line, which names `family:where` and the mend.
    """
    given = f"{family}:{where}"
    folder = find(given, where)
    wanted = model_class.config_class.model_type
    try:
        found = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if found != wanted:
            raise ValueError(f'its config.json says model_type "{found}", not "{wanted}"')
        place, dtype = device()
        options = dict(local_files_only=True, trust_remote_code=False)
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        if report["missing_keys"]:  # they would stay random, and the words with them
            raise ValueError(
                f"its weights lack {len(report['missing_keys'])} tensors, {sorted(report['missing_keys'])[0]} for one"
            )
        # the same whether there is torchvision or not
        processor = AutoProcessor.from_pretrained(folder, backend="pil", **options)
        if not isinstance(processor, transformers.ProcessorMixin):  # some of its files are not there
            raise ValueError(f"half of its processor is missing, there is a {type(processor).__name__} only")
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("its tokenizer knows no words, tokenizer.json is missing")
    except (
        Exception
    ) as e:  # a file that is missing or broken ends in an error of json, safetensors, tokenizers, torch or transformers
        reason = " ".join(str(e).split())[:300].rstrip(" .")
        raise ValueError(
            f"{given}: {reason}. Give a folder that save_pretrained of {model_class.__name__} and its processor wrote, "
            "with safetensors."
        ) from e
    return model.to(place).eval(), processor, mark(family, where, folder)


def device() -> tuple[torch.device, torch.dtype]:
    """The GPU, where there is one, in half precision; else the CPU."""
    return (torch.device("cuda"), torch.float16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def mark(family: str, where: str, folder: str) -> str:
    """Teacher and version: the family, what `where` is called, a digest of the folder's config and weights, and the
    library's version.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in os.listdir(folder) if name == "config.json" or name.endswith(".safetensors")):
        with open(os.path.join(folder, name), "rb") as f:
            # all of it: weights that were tuned differ in nothing else
            digest.update(hashlib.file_digest(f, "sha256").digest())
    label = os.path.basename(os.path.abspath(where)) if os.path.isdir(where) else where
    return f"{family}:{label} {digest.hexdigest()[:8]} (transformers {transformers.__version__})"


def crop(image: UInt8[ndarray, "h w 3"], box: Float[ndarray, " 4"]) -> UInt8[ndarray, "ch cw 3"]:
    """The whole pixels that x0, y0, x1, y1 touches once it has grown by `MARGIN`, as far as the image goes."""
    x0, y0, x1, y1 = map(float, box)
    x, y = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
    return image[max(math.floor(y0 - y), 0) : math.ceil(y1 + y), max(math.floor(x0 - x), 0) : math.ceil(x1 + x)]


def find(given: str, where: str) -> str:
    """Where the files are on this machine. given: as users wrote it. Raises ValueError in one line."""
    if os.path.isdir(where):
        return where
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", where):
        raise ValueError(f"{given}: there is no such folder, and it is no name on the Hugging Face hub (OWNER/NAME).")
    try:
        return snapshot_download(
            where, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"], ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as e:  # no network, no such name, or none that may be read
        raise ValueError(
            f"{given}: there is no such folder, and the Hugging Face hub does not give it ({type(e).__name__}): "
            f"where there is network, hf download {where} --local-dir FOLDER, and give that folder."
        ) from e
