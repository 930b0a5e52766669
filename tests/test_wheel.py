"""The wheel alone, in an empty environment and an empty folder, prepares, trains, predicts and evaluates."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from tiny import CACHE, COMPILATION, REPOSITORY

pytestmark = pytest.mark.slow
TRAINED = ("--config=coco_ref:sample", "--config.model.encoder_layers=1", "--config.model.decoder_layers=1")


@pytest.fixture(scope="module")
def mqformer(tmp_path_factory):
    """Runs a command of the installed wheel in a folder that was empty: (arguments) -> what it printed."""
    root = tmp_path_factory.mktemp("wheel")
    files = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines()
    for name in files:  # a copy, because building leaves files behind
        if name.endswith((".py", ".cfg", ".toml", ".md", ".json", ".txt", "LICENSE")):
            os.makedirs((root / "source" / name).parent, exist_ok=True)
            shutil.copy(REPOSITORY / name, root / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, root / "source"]
    subprocess.run(build, check=True)
    venv.create(root / "venv", with_pip=False)
    scheme = {"base": str(root / "venv"), "platbase": str(root / "venv")}
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", scheme))
    # The dependencies of this environment. Its own .pth files, among them an editable mqformer_jax, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = root.glob("*.whl")
    python = root / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    work = root / "work"
    work.mkdir()
    cached = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "XLA_FLAGS": COMPILATION, "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | cached

    def run(*arguments: str) -> str:
        command = [root / "venv" / "bin" / "mqformer", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.python = work, python
    return run


def test_wheel_contains_recipes_and_class_lists_but_no_tests(mqformer):
    code = "import mqformer_jax, mqformer_jax.configs.coco_ref as c, sys; print(mqformer_jax.__file__, c.__file__)"
    ours, recipe = subprocess.check_output([mqformer.python, "-c", code], text=True, cwd=mqformer.folder).split()
    site = pathlib.Path(ours).parent
    assert "site-packages" in ours and pathlib.Path(recipe) == site / "configs" / "coco_ref.py"
    assert (site / "prepare" / "classes" / "camvid.json").exists() and not list(site.rglob("test_*"))


def test_installed_wheel_prepares_trains_predicts_and_evaluates(mqformer):
    mqformer("prepare", "sample", "--train=32", "--val=4", "--size=64", "--output=data/records", "--workers=1")
    small = ("--config.data.canvas=(64, 64)", "--config.steps=20", "--config.eval.max_images=4")
    assert "eval.json" in mqformer("train", *TRAINED, *small, "--workdir=run")
    assert len((mqformer.folder / "run" / "metrics.jsonl").read_text().splitlines()) >= 1
    assert json.loads((mqformer.folder / "run" / "eval.json").read_text())["panoptic.pq"] >= 0
    picture = REPOSITORY / "docs" / "demo.png"
    mqformer("predict", "--checkpoint=run", f"--image={picture}", "--prompts=sky*; star", "--output=found")
    assert (mqformer.folder / "found" / "demo.json").exists()
    mqformer("evaluate", *TRAINED, *small, "--checkpoint=run")
    assert (mqformer.folder / "run" / "eval" / "eval.json").exists()
