"""Compares the type checker's diagnostics of the package with tests/type_baseline.txt, which can only shrink.

The baseline says how many diagnostics each file has of each rule. More than that fails, and prints them; fewer fails
too, until `python tests/type_check.py --update` has written the smaller numbers. Another version of the checker finds
other things: then, and only then, `--update` may write larger numbers.
"""

from __future__ import annotations

import collections
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "type_baseline.txt"
SHRINK = "the baseline can shrink: run `python tests/type_check.py --update`"
_DIAGNOSTIC = re.compile(r"(?P<path>[^:\s]+):\d+:\d+: (?:error|warning)\[(?P<rule>[\w-]+)\] ")

Counts = dict[tuple[str, str], int]  # by path and rule


def checker() -> str | None:
    """The ty of this Python environment, else the one on PATH."""
    return shutil.which("ty", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("ty")


def version(ty: str) -> str:
    """As "ty 0.0.108"."""
    told = subprocess.run([ty, "--version"], capture_output=True, text=True, check=True).stdout
    return " ".join(told.split()[:2])


def diagnostics(ty: str) -> list[str]:
    """One line for each, with paths from the repository's root."""
    command = [ty, "check", "--python", sys.prefix, "--output-format", "concise", "--color", "never", "mqformer_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if _DIAGNOSTIC.match(line)]
    if done.returncode not in (0, 1) or (done.returncode == 1 and f"Found {len(lines)} diag" not in done.stdout):
        raise RuntimeError(f"ty failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return lines


def count(lines: list[str]) -> Counts:
    found = (_DIAGNOSTIC.match(line) for line in lines)
    return dict(collections.Counter((match["path"], match["rule"]) for match in found if match))


def read(text: str) -> tuple[str, Counts]:
    """A baseline: the checker's version, and its counts."""
    first, *rows = text.splitlines()
    split = (row.split() for row in rows)
    return first.removeprefix("# "), {(path, rule): int(n) for path, rule, n in split}


def write(made_by: str, counts: Counts) -> str:
    rows = [f"{path} {rule} {n}" for (path, rule), n in sorted(counts.items())]
    return "\n".join([f"# {made_by}", *rows]) + "\n"


def more(lines: list[str], baseline: Counts) -> list[str]:
    """What to print where a file has more diagnostics of a rule than the baseline: all of these, the new among them."""
    told = []
    for key, n in sorted(count(lines).items()):
        if n > (known := baseline.get(key, 0)):
            told.append(f"{key[0]}: {n} of {key[1]}, the baseline knows {known}:")
            told += [f"  {line}" for line in lines if count([line]) == {key: 1}]
    return told


def fewer(lines: list[str], baseline: Counts) -> bool:
    found = count(lines)
    return any(found.get(key, 0) < known for key, known in baseline.items())


def main(arguments: list[str]) -> str | None:
    """None where all is well, else what is wrong."""
    if (ty := checker()) is None:
        return "ty is not installed: pip install -e '.[dev]'"
    found, installed = diagnostics(ty), version(ty)
    made_by, baseline = read(BASELINE.read_text()) if BASELINE.exists() else ("", {})
    if arguments == ["--update"]:
        if installed == made_by and (new := more(found, baseline)):
            return "\n".join([*new, "the baseline cannot grow: mend these first"])
        BASELINE.write_text(write(installed, count(found)))
        print(f"{BASELINE}: {len(found)} diagnostics")
        return None
    if arguments:
        return "usage: python tests/type_check.py [--update]"
    if installed != made_by:
        return f"the baseline was made by {made_by}, this is {installed}: pip install -e '.[dev]'"
    if new := more(found, baseline):
        return "\n".join(new)
    if fewer(found, baseline):
        return SHRINK
    print(f"no new type errors; {len(found)} known ones")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
