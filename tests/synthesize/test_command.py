"""mqformer synthesize: names, mistakes in one line, the report and its pictures."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sets import two_boxes, write_set

from mqformer_jax.input.record import DatasetInfo, Record
from mqformer_jax.input.sources import ShardSource
from mqformer_jax.synthesize.cli import default_name, parse_share
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.teachers import CAPTIONERS, MASK_TEACHERS, make_teacher


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mqformer_jax", "synthesize", *args], capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_set(root, "toy", two_boxes(6))
    return root


def test_names_follow_the_paper():
    assert default_name("masks", "objects365") == "objects365_syn_m"
    assert (
        default_name("captions", "objects365_syn_m") == "objects365_syn"
        and default_name("captions", "coco") == "coco_syn"
    )


@pytest.mark.slow
def test_captions_by_attributes_end_in_a_set_a_report_and_a_picture(root):
    pytest.importorskip("better_profanity")
    done = run("captions", "--data=toy", f"--root={root}", "--teacher=attributes")
    assert done.returncode == 0, done.stderr
    assert "toy_syn train: 12 of 12 boxes (100.0 %) in 6 images have captions by attributes" in done.stdout
    source = ShardSource(str(root), "toy_syn", "train")
    for i in range(6):
        cat, dog = Record.from_bytes(source[i]).segments
        assert {"the cat", "the kitty"} & dict(cat.captions).keys() and "the dog" in dict(dog.captions)
        assert cat.captions_by.startswith("attributes")
    info = DatasetInfo.load(str(root / "toy_syn"))
    assert info.unique_texts and info.expressions["train"] >= 12
    tally = Tally.load(str(root / "toy_syn" / "train.synthesis.json"))
    assert tally.taken == {"cat": 6, "dog": 6} and len(tally.samples) == 12
    page = np.asarray(Image.open(root / "toy_syn" / "train.synthesis.png"))
    assert page.shape[0] > 500 and page.std() > 20
    again = run("captions", "--data=toy", f"--root={root}", "--teacher=attributes")
    assert again.returncode == 0 and "made of the same already, nothing was done" in again.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--data=toy", "--teacher=attributes"),
            "say what is to be made: mqformer synthesize masks|captions",
        ),
        (
            ("masks", "--data=toy", "--teacher=attributes"),
            "--teacher=attributes: it may be one of ours, sam, sam2, hq-sam.",
        ),
        (
            ("masks", "--data=toy", "--teacher=sam"),
            "--teacher=sam: say which weights: sam:FOLDER or a name on the Hugging Face hub.",
        ),
        (("masks", "--data=toy", "--teacher=ours:nowhere"), "nowhere: no checkpoint there"),
        (("captions", "--data=nosuch", "--teacher=attributes"), "data set 'nosuch' split 'train' is not in"),
        (
            ("captions", "--data=toy", "--teacher=attributes", "--share=4/4"),
            "--share=4/4: give a process's number and how many there are",
        ),
        (
            ("captions", "--data=toy", "--teacher=attributes", "--out=toy"),
            "--out=toy: give the new set a name of its own",
        ),
        (("masks", "--data=toy", "--teacher=ours:nowhere", "--pick=ours:nowhere"), "--pick goes with captions"),
    ],
)
def test_a_mistake_is_one_line(root, args, message):
    done = run(*args, f"--root={root}")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_teacher_that_is_not_installed_is_one_line(monkeypatch):
    for module in ("sam", "region_captions", "hugging_face"):
        monkeypatch.delitem(sys.modules, f"mqformer_jax.synthesize.{module}", raising=False)
    for missing in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
    for given, among in (("sam2:folder", MASK_TEACHERS), ("blip:folder", CAPTIONERS)):
        with pytest.raises(
            ValueError,
            match=rf"--teacher={given}: (torch|transformers) is not installed: pip install -e '.\[teachers\]'.",
        ):
            make_teacher(given, among)


def test_shares():
    assert parse_share("0/1") == (0, 1) and parse_share("3/8") == (3, 8)
    for wrong in ("1", "1/1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="--share="):
            parse_share(wrong)


@pytest.mark.slow
def test_reports_of_shards_add_up_to_that_of_the_split(root):
    pytest.importorskip("better_profanity")
    run("captions", "--data=toy", f"--root={root}", "--teacher=attributes", "--out=again_syn")
    whole = Tally.load(str(root / "again_syn" / "train.synthesis.json"))
    assert json.loads(json.dumps(vars(whole)))["images"] == 6 and sum(whole.of_size.values()) == 12
    twice = Tally(whole.kind, whole.teacher)
    twice.update(whole), twice.update(whole)
    assert twice.asked.total() == 24 and twice.captions == 2 * whole.captions and len(twice.samples) == 24
