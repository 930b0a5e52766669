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
from mqformer_jax.synthesize.cli import default_name, parse_worker
from mqformer_jax.synthesize.report import Tally
from mqformer_jax.synthesize.teachers import CAPTIONERS, MASK_TEACHERS, make_teacher


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mqformer_jax", "synthesize", *args], capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_set(root, "toy", two_boxes(6))
    return root


def test_default_output_names_follow_the_paper():
    assert default_name("masks", "objects365") == "objects365_syn_m"
    assert (
        default_name("captions", "objects365_syn_m") == "objects365_syn"
        and default_name("captions", "coco") == "coco_syn"
    )


@pytest.mark.slow
def test_rule_captions_command_writes_a_set_a_report_and_a_picture(root):
    pytest.importorskip("better_profanity")
    done = run("captions", "--data=toy", f"--root={root}", "--teacher=rules")
    assert done.returncode == 0, done.stderr
    assert "toy_syn train: 12 of 12 boxes (100.0 %) in 6 images have captions by rules" in done.stdout
    source = ShardSource(str(root), "toy_syn", "train")
    for i in range(6):
        cat, dog = Record.from_bytes(source[i]).segments
        assert {"the cat", "the kitty"} & dict(cat.captions).keys() and "the dog" in dict(dog.captions)
        assert cat.captions_by.startswith("rules")
    info = DatasetInfo.load(str(root / "toy_syn"))
    assert info.unique_texts and info.expressions["train"] >= 12
    tally = Tally.load(str(root / "toy_syn" / "train.synthesis.json"))
    assert tally.accepted == {"cat": 6, "dog": 6} and len(tally.samples) == 12
    page = np.asarray(Image.open(root / "toy_syn" / "train.synthesis.png"))
    assert page.shape[0] > 500 and page.std() > 20
    again = run("captions", "--data=toy", f"--root={root}", "--teacher=rules")
    assert again.returncode == 0 and "is up to date" in again.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--data=toy", "--teacher=rules"),
            "say what to generate, masks or captions: mqformer synthesize masks --data=NAME --teacher=TEACHER",
        ),
        (
            ("masks", "--data=toy", "--teacher=rules"),
            "--teacher=rules: 'rules' is not supported; give one of ours, sam, sam2, hq-sam.",
        ),
        (
            ("masks", "--data=toy", "--teacher=sam"),
            "--teacher=sam: the weights are missing; give sam:FOLDER or sam:NAME of the Hugging Face hub.",
        ),
        (("masks", "--data=toy", "--teacher=ours:nowhere"), "nowhere: no checkpoint found"),
        (("captions", "--data=nosuch", "--teacher=rules"), "data set 'nosuch' split 'train' is not in"),
        (
            ("captions", "--data=toy", "--teacher=rules", "--worker=4/4"),
            "--worker=4/4: give INDEX/COUNT",
        ),
        (
            ("captions", "--data=toy", "--teacher=rules", "--output=toy"),
            "--output=toy: give the new data set another name",
        ),
        (
            ("masks", "--data=toy", "--teacher=ours:nowhere", "--verifier=ours:nowhere"),
            "only `synthesize captions` takes a verifier",
        ),
    ],
)
def test_invalid_arguments_are_reported_without_a_traceback(root, args, message):
    done = run(*args, f"--root={root}")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_missing_teacher_package_error_says_what_to_install(monkeypatch):
    for module in ("sam", "hf_captioners", "hugging_face"):
        monkeypatch.delitem(sys.modules, f"mqformer_jax.synthesize.{module}", raising=False)
    for missing in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
    for given, among in (("sam2:folder", MASK_TEACHERS), ("blip:folder", CAPTIONERS)):
        with pytest.raises(
            ValueError,
            match=rf"--teacher={given}: (torch|transformers) is not installed: pip install 'mqformer_jax\[teachers\]'.",
        ):
            make_teacher(given, among)


def test_worker_argument_is_parsed_and_validated():
    assert parse_worker("0/1") == (0, 1) and parse_worker("3/8") == (3, 8)
    for wrong in ("1", "1/1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="--worker="):
            parse_worker(wrong)


@pytest.mark.slow
def test_tallies_can_be_added_up(root):
    pytest.importorskip("better_profanity")
    run("captions", "--data=toy", f"--root={root}", "--teacher=rules", "--output=again_syn")
    whole = Tally.load(str(root / "again_syn" / "train.synthesis.json"))
    assert json.loads(json.dumps(vars(whole)))["images"] == 6 and sum(whole.boxes_by_size.values()) == 12
    twice = Tally(whole.kind, whole.teacher)
    twice.update(whole), twice.update(whole)
    assert twice.boxes.total() == 24 and twice.captions == 2 * whole.captions and len(twice.samples) == 24
