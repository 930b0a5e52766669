"""The layers of the package: setup.cfg says which module may import which."""

import subprocess
import sys

from tiny import REPOSITORY


def test_modules_import_only_from_layers_below_them():
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*lint, "setup.cfg"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
