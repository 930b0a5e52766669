"""What the documentation says exists: commands, flags, recipes, fields, files. The site and the notebook build."""

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from tiny import REPOSITORY

from mqformer_jax import cli
from mqformer_jax.__main__ import COMMANDS
from mqformer_jax.config import base
from mqformer_jax.input.record import ClassInfo, DatasetInfo
from mqformer_jax.main import check_devices
from mqformer_jax.synthesize import teachers

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")] + DOCS
RECIPES = sorted((REPOSITORY / "configs").glob("*.py"))
MAKEFILE = (REPOSITORY / "Makefile").read_text()
LAUNCH = (REPOSITORY / "launch_tpu.sh").read_text()
PARTS = "|".join(name for name, value in base().items() if isinstance(value, ConfigDict))
MODULES = ("mqformer_jax.main", "mqformer_jax.convert.verify")  # run with `python -m`


# ---- Reading ------------------------------------------------------------------------------------------------------


def code_of(path) -> str:
    """Return the code of a page, or the docstring of a recipe: one command a line, continuation lines joined."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        fences = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
        prose = fences.sub("", text)
        spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose)]
        indented = re.findall(r"^    .*$", prose, re.MULTILINE)
        text = "\n".join([*fences.findall(text), *indented, *spans])
    return re.sub(r"\\\n\s*", " ", text)


def commands_of(path) -> list[list[str]]:
    """Return the commands of this project on a page, each as its words."""
    starts = r"(?:^|(?<=[\s/(|`]))(?:mqformer [a-z]|python -m mqformer_jax|python benchmarks/|make [a-z])[^\n`]*"
    found = []
    for line in re.findall(starts, code_of(path), re.MULTILINE):
        words = shlex.split(line, comments=True)
        ends = [i for i, word in enumerate(words) if word in ("|", "&&", "||", ">")]
        found.append(words[: min(ends, default=len(words))])
    return found


def all_commands(program: str) -> list:
    """Return (page, words) of every command of a program, for parametrize."""
    return [
        pytest.param(words, id=f"{path.name}: {' '.join(words)[:90]}")
        for path in (*PAGES, *RECIPES)
        for words in commands_of(path)
        if words[0] == program or " ".join(words).startswith(program)
    ]


OURS = all_commands("mqformer") + all_commands("python -m mqformer_jax")


# ---- Commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the recipes, where every data set that the documentation fine-tunes on is prepared."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    text = "\n".join(code_of(path) for path in (*PAGES, *RECIPES))
    for name in set(re.findall(r"finetune(?:\.py)?:(\w+)", text)):
        folder = tmp_path / "data" / "records" / name
        folder.mkdir(parents=True)
        DatasetInfo(name, (ClassInfo(("thing",)),), {"train": 40, "val": 4}).save(str(folder))
    monkeypatch.setattr("mqformer_jax.checkpoint.load_config", lambda path: base())
    monkeypatch.chdir(tmp_path)


def module_of(words: list[str]) -> tuple[types.ModuleType, list[str]]:
    """Return the module of a command, and its arguments."""
    if words[0] == "mqformer":
        assert words[1] in COMMANDS, f"there is no command `mqformer {words[1]}`"
        return importlib.import_module(COMMANDS[words[1]][0]), words[2:]
    if words[2] == "mqformer_jax":
        return module_of(["mqformer", *words[3:]])
    assert words[2] in MODULES, f"`{' '.join(words[:3])}`: say `mqformer <command>`"
    return importlib.import_module(words[2]), words[3:]


def parsed_flags(module: types.ModuleType, arguments: list[str], monkeypatch) -> tuple[flags.FlagValues, list[str]]:
    """Parse the arguments of a command whose options are absl's. Exits at a flag, recipe or field that is not there.

    Returns the values of the flags, and the arguments that are no flags.
    """
    values = flags.FlagValues()
    module.define_flags(values)
    argv = ["mqformer", *cli.find_recipe(arguments)]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks for --config.FIELD there
    return values, cli.parse_flags(argv, "mqformer", values)[1:]


@pytest.mark.parametrize("words", OURS)
def test_documented_command_parses(words, place, monkeypatch, capsys):
    """A command without options is a mention: it, and what it names, must exist."""
    module, arguments = module_of([word for word in words if word != "--help"])
    mention = not any(word.startswith("-") for word in arguments)
    try:
        if not hasattr(module, "define_flags"):
            parser = parser_of(module)
            if not mention:
                parser.parse_args(arguments)
            assert not mention or set(arguments[:1]) <= subcommands(parser).keys()
        elif not mention:
            values, rest = parsed_flags(module, arguments, monkeypatch)
            if words[1] == "synthesize":
                known = {"masks": teachers.MASK_TEACHERS, "captions": teachers.CAPTIONERS}[rest.pop()]
                assert values.teacher.split(":")[0] in known
                assert not values.verifier or values.verifier.split(":")[0] in teachers.CAPTION_SCORERS
            assert not rest
    except SystemExit as e:
        pytest.fail(f"{' '.join(words)}: {e.code} {capsys.readouterr().err}")


def parser_of(module: types.ModuleType) -> argparse.ArgumentParser:
    return module.parser() if hasattr(module, "parser") else module.arguments()


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: sub for action in actions for name, sub in action.choices.items()}


def test_documented_standalone_flags_exist():
    """In backticks, such as `--score=0.5`."""
    known = set(re.findall(r"--\w+", LAUNCH))
    for name in {module for module, _ in COMMANDS.values()} | set(MODULES):
        module = importlib.import_module(name)
        if hasattr(module, "define_flags"):
            module.define_flags(values := flags.FlagValues())
            known |= {f"--{flag}" for flag in values}
        else:
            parsers = [parser_of(module), *subcommands(parser_of(module)).values()]
            known |= {option for parser in parsers for option in parser._option_string_actions}
    for path in PAGES:
        for flag in re.findall(r"^(--\w+)", code_of(path), re.MULTILINE):
            assert flag in known or flag in ("--config", "--help"), f"{path.name}: {flag}"


@pytest.mark.parametrize("words", all_commands("python benchmarks/"))
def test_documented_benchmark_and_its_flags_exist(words):
    source = (REPOSITORY / words[1]).read_text()
    names = [word.split("=")[0].removeprefix("--") for word in words[2:] if word.startswith("--")]
    missing = [name for name in names if not name.startswith("config.") and not re.search(f'"(--)?{name}"', source)]
    assert not missing


@pytest.mark.parametrize("words", all_commands("make"))
def test_documented_make_target_and_its_variables_exist(words):
    target, *variables = words[1:]
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"the Makefile has no target {target}"
    for variable in variables:
        assert f"$({variable.split('=')[0]})" in MAKEFILE or f"$(if $({variable.split('=')[0]})" in MAKEFILE


@pytest.mark.parametrize("name", ["README.md", "docs/tpu.md"])
def test_documented_pod_command_is_valid_for_its_pod(name, place, monkeypatch):
    """Its settings exist, the batch divides by the chips, and all paths of the run are in the bucket."""
    code = code_of(REPOSITORY / name)
    if name == "README.md":
        settings, run = re.search(r"launch_tpu\.sh all (.*?) -- (.*)", code).groups()
    else:
        settings = re.search(r'launch_tpu\.sh "\$1" (.*) "\$\{@:2}"', code)[1]
        run = re.search(r"^flags=\(\n(.*?)\n\)", code, re.MULTILINE | re.DOTALL)[1]
    for setting in shlex.split(settings):
        assert re.search(rf"^# +.*{setting.split('=')[0]}\b", LAUNCH, re.MULTILINE), f"launch_tpu.sh has no {setting}"
    generation, count = re.search(r"--type=(\w+)-(\d+)", settings).groups()
    chips = int(count) // (2 if generation in ("v4", "v5p") else 1)  # these count cores
    values, _ = parsed_flags(importlib.import_module("mqformer_jax.main"), shlex.split(run), monkeypatch)
    check_devices(values.config, chips)
    assert all(p.startswith("bucket/") for p in (values.workdir, values.config.data.root, *values.config.init_from))


# ---- Fields, links, the site --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documented_config_fields_exist(path):
    code = code_of(path)
    named = re.findall(r"\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", code)
    named += re.findall(rf"^((?:{PARTS})(?:\.[a-z_0-9]+)+)\b", code, re.MULTILINE)  # alone in backticks
    missing = [name for name in named if not name.endswith((".json", ".py", ".md")) and not is_field(name)]
    assert not [name for name in missing if name not in ("json", "py")]


def is_field(name: str) -> bool:
    node = base()
    for part in name.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            return False
        node = node[part]
    return True


@pytest.mark.parametrize("path", [*PAGES, REPOSITORY / "CHANGELOG.md"], ids=lambda path: path.name)
def test_relative_links_resolve(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_documented_files_exist():
    """In backticks, a path that starts in one of the repository's folders."""
    pattern = r"(?:^|\s)((?:mqformer_jax|configs|docs|tests|benchmarks|examples)/[\w/.-]*\w)"
    for path in PAGES:
        for name in re.findall(pattern, code_of(path), re.MULTILINE):
            assert (REPOSITORY / name).exists(), f"{path.name}: {name}"


def test_constants_in_contributing_guide_exist_in_their_files():
    """In the guide of contributors, in backticks, such as `TASKS`. The file is the last one in the same paragraph."""
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Where things go")[1]
    found = set()
    for paragraph in guide.split("\n\n"):
        file = None
        for span in re.findall(r"`([^`]+)`", paragraph):
            if span.endswith(".py"):
                file = REPOSITORY / span
            elif re.fullmatch(r"[A-Z][A-Z_]+", span):
                assert file and re.search(rf"^{span}\b", file.read_text(), re.MULTILINE), f"{file}: {span}"
                found.add(span)
    assert {"BACKBONES", "TASKS", "MEANING"} <= found


def test_custom_format_script_in_docs_prepares_a_data_set(tmp_path):
    page = (REPOSITORY / "docs" / "data.md").read_text().split("### Another format")[1]
    (tmp_path / "photos").mkdir()
    for i, boxes in enumerate(("0 1 2 30 35\n1 5 5 20 20\n", "no box")):
        cv2.imwrite(str(tmp_path / "photos" / f"{i}.jpg"), np.full((40, 60, 3), 50 * i, np.uint8))
        (tmp_path / "photos" / f"{i}.txt").write_text(boxes)
    (tmp_path / "script.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "mine train: 1 images kept, 1 dropped" in done.stdout and "2 box only" in done.stdout, done.stderr
    info = DatasetInfo.load(str(tmp_path / "data" / "records" / "mine"))
    assert info.splits == {"train": 1} and info.classes[1] == ClassInfo(("dog", "puppy"))


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_in_the_navigation():
    named = re.findall(r"^  - .*: (\w+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == [path.name for path in DOCS]


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        remote = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not remote, page


@pytest.mark.slow
def test_the_notebook_runs(tiny_checkpoint, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MQFORMER_CHECKPOINT", tiny_checkpoint)
    notebook = nbformat.read(REPOSITORY / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    resources = {"metadata": {"path": str(REPOSITORY / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
