from __future__ import annotations

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image
from scipy import ndimage

from mqformer_jax.cli import parse_flags
from mqformer_jax.input.batch import PAD, BatchSpec, collate, pack_example
from mqformer_jax.input.example import Example, Prompt, Target
from mqformer_jax.input.mixture import Note, make_loader
from mqformer_jax.models.tokenizer import make_tokenizer
from mqformer_jax.tools import show_batch
from mqformer_jax.visualization.training_batch import (
    ShownExample,
    ShownPrompt,
    color,
    facts,
    grid,
    panel,
    picture,
    prompt_items,
)

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
RECIPE = f"--config={REPOSITORY}/configs/coco_ref.py:sample"
GRAY, SCALE = 90, 4  # of a 64 x 48 canvas, drawn 256 pixels long


def shown(masks=(), boxes=(), ignore=None, size=(48, 64), asked=(), **fields):
    """A gray row. masks: rows of (top, left, bottom, right) in canvas pixels; boxes: x0, y0, x1, y1 of targets without
    a mask.
    """
    filled = np.zeros((len(masks) + len(boxes), 48, 64), bool)
    for mask, (top, left, bottom, right) in zip(filled, masks):
        mask[top:bottom, left:right] = True
    corners = [(left, top, right, bottom) for top, left, bottom, right in masks] + list(boxes)
    image = np.full((48, 64, 3), GRAY, np.uint8)
    image[size[0] :], image[:, size[1] :] = PAD, PAD
    ignored = np.zeros((48, 64), bool)
    if ignore:
        ignored[ignore] = True
    has_mask = np.arange(len(filled)) < len(masks)
    return ShownExample(
        "set/image",
        tuple(asked),
        image,
        size,
        ignored,
        filled,
        has_mask,
        np.array(corners, np.float32).reshape(-1, 4),
        **fields,
    )


def near(pixels, rgb, most=40):
    return np.abs(pixels.astype(int) - rgb).max(-1) <= most


def words(items):
    return [" ".join(piece.text for piece in item) for item in items]


def test_outline_follows_the_mask_and_fill_stays_inside():
    pixels = np.asarray(picture(shown(masks=[(8, 12, 40, 52)]), 64 * SCALE))
    inside = np.zeros((48 * SCALE, 64 * SCALE), bool)
    inside[8 * SCALE : 40 * SCALE, 12 * SCALE : 52 * SCALE] = True
    edge = inside ^ ndimage.binary_erosion(inside)
    line = near(pixels, color(0))
    line[ndimage.binary_erosion(inside, iterations=20)] = False  # the number in the middle has the color too
    assert (ndimage.distance_transform_edt(~edge)[line] <= 3).all(), "drawn away from the mask's edge"
    assert (ndimage.distance_transform_edt(~line)[edge] <= 2).all(), "a part of the edge is not drawn"
    assert (pixels[~ndimage.binary_dilation(inside, iterations=4)] == GRAY).all(), "painted outside the mask"
    np.testing.assert_allclose(pixels[16 * SCALE, 20 * SCALE], 0.68 * GRAY + 0.32 * np.array(color(0)), atol=1.5)


def test_target_thinner_than_an_output_pixel_is_drawn():
    pixels = np.asarray(picture(shown(masks=[(0, 30, 48, 31)]), 16))
    assert near(pixels[:3, 4:12], color(0)).any()


def test_target_without_mask_is_drawn_as_unfilled_dashed_box():
    pixels = np.asarray(picture(shown(boxes=[(12, 8, 52, 40)]), 64 * SCALE))
    for strip in (
        pixels[8 * SCALE, 80:200],
        pixels[40 * SCALE, 80:200],
        pixels[60:150, 12 * SCALE],
        pixels[60:150, 52 * SCALE],
    ):
        dashes, gaps = near(strip, color(0)), near(strip, (255, 255, 255))
        assert (
            (dashes | gaps).all()
            and abs(dashes.mean() - 0.5) < 0.15
            and np.abs(np.diff(dashes.astype(int))).sum() >= 10
        )
    assert (pixels[20 * SCALE : 38 * SCALE, 16 * SCALE : 50 * SCALE] == GRAY).all()


def test_ignored_pixels_are_hatched_and_padding_is_outlined():
    pixels = np.asarray(picture(shown(ignore=np.s_[:20, :20], size=(40, 50)), 64 * SCALE))[..., 0]
    hatched = pixels[: 20 * SCALE, : 20 * SCALE]
    assert 0.15 < (hatched > 200).mean() < 0.35 and (hatched < GRAY).mean() > 0.6, "white diagonals on dim gray"
    assert (pixels[: 38 * SCALE, 22 * SCALE : 48 * SCALE] == GRAY).all(), "what is not ignored is untouched"
    assert (pixels[42 * SCALE :] == PAD).all() and (pixels[:, 52 * SCALE :] == PAD).all()
    assert (pixels[: 40 * SCALE, 50 * SCALE] < 50).all() and (pixels[40 * SCALE, : 50 * SCALE] < 50).all(), (
        "the padding begins at a line"
    )


def test_numbers_of_coinciding_targets_do_not_overlap():
    four = shown(masks=[(10, 10, 30, 30)] * 4)
    pixels = np.asarray(picture(four, 64 * SCALE))[48:112, 48:112]  # without the outlines
    centers = [ndimage.center_of_mass(near(pixels, color(i), 3)) for i in range(4)]
    gaps = [np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(centers, 2)]
    assert np.isfinite(centers).all() and min(gaps) > 8


@pytest.mark.parametrize("small", [dict(masks=[(20, 30, 23, 33)]), dict(boxes=[(30, 20, 33, 23)])])
def test_number_of_a_small_target_does_not_cover_it(small):
    pixels = np.asarray(picture(shown(**small), 64 * SCALE))
    inside = pixels[20 * SCALE + 3 : 23 * SCALE - 3, 30 * SCALE + 3 : 33 * SCALE - 3]
    expected = 0.68 * GRAY + 0.32 * np.array(color(0)) if "masks" in small else GRAY
    np.testing.assert_allclose(inside, np.broadcast_to(expected, inside.shape), atol=8)
    assert near(pixels[: 20 * SCALE - 3], color(0), 3).any(), "it stands above"


def batch_of_one():
    """Two people (one by its box alone), a ball that a phrase of a set without exhaustive labels names, sky; no dog."""
    prompts = [
        Prompt(("person",), False),
        Prompt(("sky",), True),
        Prompt(("dog",), False),
        Prompt(("red ball",), True, exhaustive=False),
    ]

    def target(prompt, x, with_mask=True):
        box = np.array([x, 8, x + 8, 16], np.float32)
        return Target((prompt,), box, np.ones((8, 8), bool) if with_mask else None, at=(8, x))

    ignore = np.zeros((32, 64), bool)
    ignore[30:] = True
    targets = [target(0, 0), target(0, 12, with_mask=False), target(3, 24), target(1, 40)]
    example = Example("set/image", np.zeros((32, 64, 3), np.uint8), prompts, targets, ignore)
    texts = [p.texts[0] for p in prompts]
    spec = BatchSpec((48, 64), prompts=6, targets=5, lattice_stride=1)
    row = pack_example(
        example, texts, np.arange(4), lambda t: np.zeros((len(t), 1), np.int32), spec, 0, np.random.default_rng(0)
    )
    return collate([row], spec), [Note("set/image", tuple(texts), ((7, "no record"),))]


def test_panel_text_lists_prompt_targets_and_absent_classes():
    seen = show_batch.describe(*next(show_batch.rows([batch_of_one()])))
    owning, rest = prompt_items(seen.prompts)
    assert words(owning) == ["▢ person x2 1 2", "∎ red ball 3 ? not 1, 2, 4", "∎ sky 4"]
    assert words(rest) == ["absent (1): dog"]
    assert [piece.fill for piece in owning[0] if piece.fill] == [color(0), color(1)]
    assert words(facts(seen)) == ["4 targets (3 with masks, 1 boxes only) · 4 prompts", "left out: record 7: no record"]


def test_described_row_matches_the_masks_and_boxes_of_its_batch():
    seen = show_batch.describe(*next(show_batch.rows([batch_of_one()])))
    assert seen.size == (32, 64) and seen.has_mask.tolist() == [True, False, True, True]
    assert [ndimage.find_objects(m)[0] for m in seen.masks[[0, 2, 3]].astype(int)] == [
        np.s_[8:16, x : x + 8] for x in (0, 24, 40)
    ]
    np.testing.assert_allclose(seen.boxes, [[x, 8, x + 8, 16] for x in (0, 12, 24, 40)], atol=1e-4)
    assert seen.ignore[30:32].all() and not seen.ignore[:30].any() and not seen.ignore[32:].any()


def test_panel_with_160_prompts_is_truncated_with_counts():
    asked = [
        ShownPrompt(f"the man behind the table number {i}", True, False, (i,) if i < 100 else (), ())
        for i in range(120)
    ]
    asked += [ShownPrompt(f"thing {i}", False, True, (), ()) for i in range(40)]
    many = shown(boxes=[(4, 4, 30, 30)] * 100, asked=asked)
    page = panel(many, 320)
    assert page.height <= 640
    assert (np.asarray(page)[:, -1] == 255).all(), "words run out of the panel"
    _, rest = prompt_items(many.prompts)
    assert words(rest)[0].startswith("absent (40): thing 0, ") and words(rest)[0].endswith("+32")
    assert words(rest)[1].startswith("no loss (20): ")
    assert grid([page], "title").width == page.width + 32, (
        "a grid as narrow as its one panel has a legend of several lines"
    )


def test_drawn_rows_match_the_training_stream(tiny_config, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(show_batch, "panel", lambda shown, side: drawn.append(shown) or panel(shown, side))
    tallies = show_batch.show(tiny_config, str(tmp_path / "a.png"), 11, start_step=3)
    stream = make_loader(tiny_config, make_tokenizer(tiny_config.model.text)).stream(3)
    batches = [batch for _, (batch, _) in zip(range(2), stream)]
    size = tiny_config.batch_size
    for i, seen in enumerate(drawn):
        batch, row = batches[i // size], i % size
        np.testing.assert_array_equal(seen.image, batch.image[row])
        assert len(seen.masks) == batch.num_targets[row] and len(seen.prompts) == batch.prompt_valid[row].sum()
    assert len(drawn) == 11 == sum(t.rows for t in tallies.values())
    sources = np.concatenate([b.source for b in batches])[:11]
    targets = np.concatenate([b.num_targets for b in batches])[:11]
    assert tallies["sample_scenes/train"].targets == targets[sources == 0].sum()
    with Image.open(tmp_path / "a.png") as page:
        assert page.format == "PNG"


def test_dataset_option_draws_only_rows_of_that_data_set(tiny_config, tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(show_batch, "panel", lambda shown, side: keys.append(shown.key) or panel(shown, side))
    tallies = show_batch.show(tiny_config, str(tmp_path / "a.png"), 2, dataset="sample_boxes", side=128)
    stream = make_loader(tiny_config, make_tokenizer(tiny_config.model.text)).stream()
    every = (note.key for _, notes in stream for note in notes)
    assert keys == list(itertools.islice((k for k in every if k.startswith("sample_boxes/")), 2))
    assert tallies["sample_boxes/train"].rows == 2 < tallies["sample_scenes/train"].rows
    assert "0% of them with masks" in str(tallies["sample_boxes/train"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([RECIPE, "--config.zzqq=1"], ["--config.zzqq=1", "config.py"]),
        ([RECIPE, "--confg=1"], ["confg", "Did you mean"]),
        ([RECIPE, "--count=0"], ["--count=0"]),
        ([f"--config={REPOSITORY}/configs/coco_ref.py:huge"], ["huge", "full, gpu, sample, small"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
    ],
)
def test_invalid_command_line_gives_one_line_error(arguments, words, monkeypatch):
    values = flags.FlagValues()
    show_batch.define_flags(values)
    argv = ["show", "--output=unused.png", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections finds its overrides there
    with pytest.raises(SystemExit) as stopped:
        parse_flags(argv, "show", values)
    message = str(stopped.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(output="a.png", dataset="coco"), "--dataset=coco: .* sample_scenes, sample_boxes, sample_mattes"),
        (dict(output="a.jpg"), "--output=a.jpg: .* .png"),
    ],
)
def test_unknown_data_set_and_output_format_are_rejected(arguments, words, tiny_config):
    with pytest.raises(ValueError, match=words) as wrong:
        show_batch.show(tiny_config, count=1, **arguments)
    assert "\n" not in str(wrong.value)


def test_command_writes_the_grid_and_a_summary_per_data_set(sample_root, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mqformer_jax",
        "show",
        RECIPE,
        f"--config.data.root={sample_root}",
        "--count=3",
    ]
    ran = subprocess.run(
        [*command, f"--output={tmp_path}/new/grid.png"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("sample_scenes/train: 32 images, ")
    assert [line.split()[0] for line in ran.stdout.splitlines()[4:7]] == [
        f"sample_{s}/train" for s in ("scenes", "boxes", "mattes")
    ]
    with Image.open(tmp_path / "new" / "grid.png") as page:
        assert page.width == 3 * (320 + 340 + 16 + 2 * 16)
