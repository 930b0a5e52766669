"""Segment images by text prompts in a web page.

    pip install -e '.[demo]'
    mqformer app --checkpoint=runs/demo

The page needs the package gradio, but no network connection.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mqformer_jax import cli
from mqformer_jax.image_io import read_image
from mqformer_jax.inference import save_results
from mqformer_jax.inference.predict import read_prompts
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.interrupts import removed_on_exit
from mqformer_jax.models.mqformer import query_counts
from mqformer_jax.segments import Segments
from mqformer_jax.tasks import FOREGROUND, PREDICTED, TASKS
from mqformer_jax.visualization.overlays import colors, overlay

QUERIES = ("all", "learnable", "conditional")


@dataclasses.dataclass(frozen=True)
class Row:
    """One segment in the legend. color: "#rrggbb". share: fraction of the image's area, 0 to 1."""

    prompt: str
    color: str
    score: float
    share: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """The results that the page shows.

    overlay: the image with its segments drawn over it. rows: the legend. archive: bytes of the zip file to download.
    """

    overlay: UInt8[np.ndarray, "H W 3"]
    rows: list[Row]
    archive: bytes


def answer(
    predictor: Predictor,
    image: UInt8[np.ndarray, "h w 3"] | None,
    text: str,
    task: str,
    queries: str = "all",
    score_threshold: float = 0.0,
) -> Reply:
    """Segment an image and return the results that the page shows.

    text: prompts in the notation of `read_prompts`; the task "foreground" ignores them. queries: see `Predictor`.
    score_threshold: the lowest score of a segment; only the task "instance" uses it. Raises ValueError with a message
    for the user if an input is missing or does not fit the task.
    """
    if image is None:
        raise ValueError("Upload or paste an image first.")
    texts, regions = read_prompts(text)
    if task == "foreground" or (not TASKS[task].needs_prompts and not texts):
        texts, regions = [FOREGROUND], [True]
    if not texts:
        raise ValueError("Name at least one thing to look for, such as: ball; star; sky*")
    if task == "instance" and all(regions):
        raise ValueError("“instance” finds single objects: remove the * from at least one prompt.")
    options: dict[str, Any] = dict(task=task, queries=queries, score=score_threshold if task == "instance" else None)
    found = in_order(predictor(image, texts, regions=regions if TASKS[task].chooses_regions else None, **options))
    picture, rows = overlay(image, found), legend(found)
    return Reply(picture, rows, archive(found, picture, {"task": task, "queries": queries}))


def in_order(found: Segments) -> Segments:
    """Return the segments with a nonempty mask, sorted by prompt and then from high to low score."""
    order = np.lexsort((-found.scores, found.prompt_ids))
    order = order[found.masks[order].any((1, 2))]
    alphas = None if found.alphas is None else found.alphas[order]
    rows = (
        found.masks[order],
        found.boxes[order],
        found.scores[order],
        found.prompt_ids[order],
        found.query_ids[order],
    )
    return Segments(found.texts, *rows, alphas=alphas)


def legend(found: Segments) -> list[Row]:
    """Return the legend: one row for each segment, with the segment's color in the overlay."""
    shades = colors(found.prompt_ids, range(len(found.texts)))
    cover = found.masks if found.alphas is None else found.alphas
    return [
        Row(found.texts[prompt], "#" + "".join(f"{round(c):02x}" for c in shade), float(score), float(mask.mean()))
        for prompt, shade, score, mask in zip(found.prompt_ids, shades, found.scores, cover)
    ]


def archive(found: Segments, picture: UInt8[np.ndarray, "H W 3"], options: dict[str, str]) -> bytes:
    """Return the bytes of a zip file with overlay.png, masks/NN_PROMPT.png and segments.json.

    The mask files hold masks or mattes, 0 to 255. picture: the overlay. options: the task and the queries, which are
    copied to segments.json; its other fields are those of `save_results.to_json`.
    """
    contents: dict[str, Any] = options | save_results.to_json(found, options["task"], "", found.masks.shape[1:])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("overlay.png", _png(picture[..., ::-1]))
        for entry, cover in zip(contents["segments"], found.masks if found.alphas is None else found.alphas):
            words = re.sub(r"[^\w-]+", "_", entry["text"])[:40]
            entry["file"] = f"masks/{entry['id']:02d}_{words}.png"
            out.writestr(entry["file"], _png(np.rint(255 * cover.astype(np.float32)).astype(np.uint8)))
        out.writestr("segments.json", json.dumps(contents, indent=1, ensure_ascii=False))
    return buffer.getvalue()


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def legend_html(rows: Sequence[Row]) -> str:
    """Return the rows as an HTML table: color, prompt, score as a bar, share of the image."""
    if not rows:
        return '<p class="none">Nothing was found.</p>'
    head = "<tr><th></th><th>prompt</th><th>score</th><th>area</th></tr>"
    line = (
        '<tr><td><i class="swatch" style="background:{r.color}"></i></td><td>{name}</td><td><span class="bar">'
        '<i style="width:{r.score:.0%};background:{r.color}"></i></span>{r.score:.2f}</td><td>{r.share:.1%}</td></tr>'
    )
    body = "".join(line.format(r=r, name=html.escape(r.prompt)) for r in rows)
    return f'<table class="legend">{head}{body}</table>'


CSS = """
.gradio-container {max-width: 1180px !important; margin: auto; padding-top: 14px !important}
#title h1 {font-size: 1.7rem; font-weight: 650; margin: 0; letter-spacing: -0.01em}
#title p {margin: 2px 0 4px; color: var(--body-text-color-subdued)}
#photo img, #shown img {width: 100%; height: 100%; object-fit: contain}
#legend table {width: 100%; border: 0; border-collapse: collapse; margin: 0; font-variant-numeric: tabular-nums}
#legend th {text-align: left; font-weight: 500; font-size: 0.8rem; color: var(--body-text-color-subdued)}
#legend tr {border: 0; background: none}
#legend th, #legend td {padding: 6px 8px; border: 0; border-bottom: 1px solid var(--border-color-primary)}
#legend th:first-child, #legend td:first-child {width: 22px; padding-right: 0}
#legend th:last-child, #legend td:last-child {text-align: right; width: 72px}
#legend td:nth-child(3) {width: 200px; white-space: nowrap}
#legend .swatch {display: inline-block; width: 14px; height: 14px; border-radius: 4px; vertical-align: -2px}
#legend .bar {display: inline-block; width: 120px; height: 6px; margin-right: 10px; border-radius: 3px;
  vertical-align: 2px; background: var(--border-color-primary); overflow: hidden}
#legend .bar i {display: block; height: 100%}
#legend .none {color: var(--body-text-color-subdued); text-align: center; padding: 18px}
"""
# plain titles instead of the theme's colored tags
PLAIN = dict(
    block_title_background_fill="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_weight="600",
    block_title_text_size="*text_sm",
    block_label_background_fill="*background_fill_primary",
    block_label_text_color="*body_text_color_subdued",
    block_border_width="1px",
    block_shadow="none",
    button_primary_shadow="none",
    checkbox_label_shadow="none",
    checkbox_label_border_width="1px",
)


def tasks_of(predictor: Predictor) -> list[str]:
    """Return the tasks that the page offers: all prediction tasks, without matting if the model has no refiner."""
    return [task for task in PREDICTED if task != "matting" or getattr(predictor, "refiner", None)]


def page(predictor: Predictor, name: str, folder: str) -> Any:
    """Build the page and return it as a `gradio.Blocks`.

    name: the model's name, for display. folder: the folder for the zip files that users download.
    """
    gr = _gradio()
    tasks = tasks_of(predictor)
    learnable, conditional = query_counts(predictor.config.model)

    def respond(path: str | None, *options: Any):
        try:
            reply = answer(predictor, None if path is None else read_image(path), *options)
        except ValueError as e:  # the user must change an input; the page keeps showing the last results
            gr.Warning(html.escape(str(e).replace(f"{os.path.dirname(path or '')}{os.sep}", "")), title="Invalid input")
            return gr.skip()
        zipped = os.path.join(tempfile.mkdtemp(dir=folder), "segments.zip")
        with open(zipped, "wb") as file:
            file.write(reply.archive)
        return reply.overlay, legend_html(reply.rows), gr.update(value=zipped, interactive=True)

    with gr.Blocks(title="MQ-Former", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        intro = (
            "Segment an image by text prompts. "
            f"Model: {html.escape(name)}, {learnable} learnable + {conditional} conditional queries."
        )
        about = html.escape(predictor.config.about)
        gr.HTML(f"<h1>MQ-Former</h1><p>{intro}</p><p>{about}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                photo = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=300, elem_id="photo"
                )
                photo.preprocess = lambda given: given and given.path  # pass the path on: `read_image` decodes the file
                prompts = gr.Textbox(
                    label="Prompts, separated by ;",
                    placeholder="ball; star; sky*; grass*",
                    lines=2,
                    elem_id="prompts",
                )
                task = gr.Radio(tasks, value=tasks[0], label="Task", info=TASKS[tasks[0]].help, elem_id="task")
                kinds = gr.Radio(
                    QUERIES,
                    value="all",
                    label="Queries to use",
                    visible=bool(learnable and conditional),
                    elem_id="queries",
                )
                start = float(predictor.config.eval.object_mask_threshold)
                score_threshold = gr.Slider(
                    0,
                    1,
                    value=start,
                    step=0.01,
                    label="Lowest score of an instance",
                    visible=False,
                    elem_id="score_threshold",
                )
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=6, min_width=340):
                shown = gr.Image(
                    label="Segments",
                    format="png",
                    buttons=["fullscreen"],
                    interactive=False,
                    height=430,
                    elem_id="shown",
                )
                table = gr.HTML('<p class="none">Segments and their scores appear here.</p>', elem_id="legend")
                download = gr.DownloadButton("Download masks", interactive=False, elem_id="download")
        explain = lambda t: (gr.update(info=TASKS[t].help), gr.update(visible=t == "instance"))
        task.input(explain, task, [task, score_threshold], show_progress="hidden")
        gr.on(
            [button.click, prompts.submit, kinds.input, score_threshold.release], respond,
            [photo, prompts, task, kinds, score_threshold], [shown, table, download],
            show_progress_on=[shown], concurrency_limit=1,
        )  # fmt: skip
    return blocks


def _gradio() -> ModuleType:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ModuleNotFoundError:
        raise ValueError("the page needs the package gradio. Run pip install 'mqformer_jax[demo]'.") from None
    return gradio


def launch(predictor: Predictor, name: str, folder: str, port: int, share: bool = False, wait: bool = True) -> Any:
    """Serve the page at http://127.0.0.1:PORT and return it as a `gradio.Blocks`.

    name, folder: see `page`. share: also serve it at a temporary public address of Gradio. wait: return only after
    Ctrl-C. Raises OSError if the port cannot be used.
    """
    gr = _gradio()
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    ).set(**PLAIN)
    blocks = page(predictor, name, folder)
    options = dict(theme=theme, css=CSS, footer_links=[], quiet=True, max_file_size="64mb")
    try:
        blocks.launch(server_port=port, share=share, prevent_thread_lock=True, **options)
    except OSError as e:
        raise OSError(f"--port={port}: the port cannot be used; name another one ({str(e).split('.')[0]}).") from e
    print(
        f"{name}: {blocks.share_url or blocks.local_url} "
        "(Ctrl-C stops the server; the first requests take longer, because the model is compiled)",
        flush=True,
    )
    if wait:
        blocks.block_thread()
    return blocks


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mqformer app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="Workdir of a training run or folder of a converted model, e.g. runs/demo. Required.",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="Port of the page on this machine, e.g. 8080. (default: %(default)s)"
    )
    parser.add_argument(
        "--share",
        nargs="?",
        const="true",
        default="false",
        choices=["true", "false"],
        help="Also serve the page at a temporary public address of Gradio. (default: %(default)s)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    _gradio()  # report a missing package before loading the model
    cli.keep_compiled()
    predictor = Predictor.from_checkpoint(args.checkpoint)
    with tempfile.TemporaryDirectory(prefix="mqformer_demo_") as folder, removed_on_exit(folder):
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads are deleted with the folder
        launch(predictor, args.checkpoint, folder, args.port, args.share == "true")


def run(argv: Sequence[str]) -> None:
    cli.run_parsed(arguments(), main, "stopped.", argv, status=0)
