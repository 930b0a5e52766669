"""Segment images by text prompts, and write an overlay and a JSON file with the masks for each image.

    mqformer predict --checkpoint=runs/demo --image=photo.jpg --prompts="sky*; road*; car" --output=found

A prompt with a star owns one region ("sky"). Other prompts may have several instances ("car").
"""

from __future__ import annotations

import ast
import itertools
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from mqformer_jax import cli, image_io
from mqformer_jax import config as recipes
from mqformer_jax.inference import save_results
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.segments import Segments
from mqformer_jax.tasks import FOREGROUND, PREDICTED, TASKS


def read_prompts(text: str) -> tuple[list[str], list[bool]]:
    """Split text at ";" and line breaks. Return the distinct prompts, and whether each one ended in a star ("sky*").

    The returned prompts have no stars.
    """
    parts = [" ".join(part.split()) for part in re.split("[;\n]", text)]
    prompts: dict[str, bool] = {}
    for part in parts:
        if name := part.rstrip("* "):
            prompts[name] = prompts.get(name, False) or part.endswith("*")
    return list(prompts), list(prompts.values())


def parse_prompts(text: str | None, task: str) -> tuple[list[str], list[bool] | None]:
    """Return the prompts, and which of them own one region (None if the task decides this).

    text: the prompts, "@FILE" to read them from a file, or None. Raises ValueError if there are no prompts but the task
    needs them.
    """
    if text is None and not TASKS[task].needs_prompts:
        text = FOREGROUND
    if text is not None and text.startswith("@"):
        with open(text[1:], encoding="utf-8") as f:
            text = f.read()
    prompts, regions = read_prompts(text or "")
    if not prompts:
        raise ValueError('--prompts: name at least one thing to look for, e.g. --prompts="sky*; road*; car".')
    return prompts, regions if TASKS[task].chooses_regions else None


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    prompts, regions = parse_prompts(given.prompts, given.task)
    paths = image_io.find_images([*given.image, *argv])  # a shell expands --image *.jpg to arguments without a flag
    cli.keep_compiled()
    predictor = Predictor.from_checkpoint(given.checkpoint)
    change_settings(predictor.config, given.set)
    score = TASKS[given.task].score if given.score is None else given.score
    segment = lambda image: predictor(image, prompts, given.task, regions, given.queries, score)
    bad = predict_files(segment, paths, given.task, given.output, given.masks)
    if bad == len(paths):
        raise ValueError("--image: none of the images could be read; see the reasons above.")
    print(f"{given.output}: results of {len(paths) - bad} images" + (f"; {bad} could not be read" if bad else ""))


def change_settings(config: ConfigDict, settings: Sequence[str]) -> None:
    """Change the fields of a trained model's config that matter for predictions. settings: "field=value" texts.

    Raises ValueError if a field cannot be changed after training, or does not exist, or if its value is not valid.
    """
    for setting in settings:
        field, _, value = setting.partition("=")
        if not field.startswith("eval.") and field != "data.templates":
            raise ValueError(f"--set {field}: only data.templates and the fields of eval can be changed here.")
        recipes.set_field(config, field, literal(value), "--set ")
    recipes.check_values(config)


def predict_files(
    segment: Callable[[np.ndarray], Segments], paths: Sequence[str], task: str, out: str, masks: bool
) -> int:
    """Segment images, write the results to the folder `out`, and return the number of unreadable images.

    segment: returns the segments of an RGB image. masks: also write each mask as a PNG file. Unreadable images are
    reported and skipped.
    """
    os.makedirs(out, exist_ok=True)
    bad = 0
    bar = tqdm(zip(paths, output_stems(paths, out)), desc="predict", unit="image", total=len(paths), dynamic_ncols=True)
    for path, stem in bar:
        try:
            image = image_io.read_image(path)
        except ValueError as e:
            bad += 1
            tqdm.write(f"skipped: {e}")
            continue
        segments = segment(image)
        save_results.save(stem, image, segments, task, path, masks)
        nonempty = np.flatnonzero(segments.masks.any((1, 2)))
        found = ", ".join(f"{segments.texts[segments.prompt_ids[i]]} {segments.scores[i]:.2f}" for i in nonempty)
        tqdm.write(f"{path}: {found or 'nothing found'}")
    return bad


def output_stems(paths: Sequence[str], out: str) -> list[str]:
    """Return for each image the path of its results in `out`, without extension.

    The file name is that of the image, with a number if an earlier image has the same name ("photo", "photo_2").
    """
    used: set[str] = set()
    stems = []
    for path in paths:
        name = base = "stdin" if path == image_io.STDIN else os.path.splitext(os.path.basename(path))[0]
        for number in itertools.count(2):
            if name not in used:
                break
            name = f"{base}_{number}"
        used.add(name)
        stems.append(os.path.join(out, name))
    return stems


def literal(text: str) -> object:
    """Return the value of a Python literal (number, tuple, True ...). Return any other text unchanged."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def define_flags(values: flags.FlagValues) -> None:
    """Define the flags of the command."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a training run or folder of a converted model, e.g. runs/demo. Required.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "image",
        None,
        "Image file, folder, pattern, or - for standard input (one image, or one path per line), "
        'e.g. "photos/*.jpg". Required; may be repeated.',
        flag_values=values,
    )
    flags.DEFINE_string(
        "prompts",
        None,
        'Prompts separated by ";", or @FILE with one prompt per line. A prompt with a star is one region; '
        'other prompts may have several instances, e.g. "sky*; car".',
        flag_values=values,
    )
    flags.DEFINE_enum("task", "panoptic", PREDICTED, "Segmentation task, e.g. referring.", flag_values=values)
    flags.DEFINE_string("output", "predictions", "Folder for the results, e.g. found.", flag_values=values)
    flags.DEFINE_float(
        "score",
        None,
        "Lowest score of a segment, 0 to 1, e.g. 0.5. (default: 0.3 for --task=instance, else the recipe's threshold)",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "queries",
        "all",
        ("all", "learnable", "conditional"),
        "Queries whose predictions are used, e.g. learnable.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "masks", False, "Also write each mask or matte as a PNG file. (default: false)", flag_values=values
    )
    flags.DEFINE_multi_string(
        "set",
        [],
        "Change a field of the recipe, e.g. eval.overlap_threshold=0.5. May be repeated. (default: none)",
        flag_values=values,
    )
    flags.mark_flags_as_required(["checkpoint", "image"], values)
    cli.require_fractions("score", values=values)


def run(argv: Sequence[str]) -> None:
    define_flags(flags.FLAGS)
    cli.run(main, "predict", __doc__, "stopped; the files written so far are complete.", argv)
