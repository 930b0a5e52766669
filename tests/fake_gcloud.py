"""A Google Cloud project in a folder, for tests/test_launch_tpu.py: a bucket, and a TPU of two workers.

Its gcloud writes down what it is called for, and does it. Its ssh runs the command in this machine's shell and the
worker's home, with stand-ins for what needs a network or root (apt, uv, gcsfuse) and for the program, so that what the
script sends is really run.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mqformer_jax.interrupts import PREEMPTED

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch_tpu.sh"
WORKER = Path("mqformer_jax/tools/tpu_worker.sh")  # what it sends to the workers
FLAGS = (
    "--config=configs/coco_ref.py:small",
    "--config.data.canvas=(512, 512)",
    '--config.note=it\'s "so" $HOME * \\',
    "--workdir=bucket/runs/mq",
)

GCLOUD = r"""
command="" worker=""
for word; do
  case $word in --command=*) command=${word#*=} ;; --worker=*) worker=${word#*=} ;; esac
done
call=${command##*\}; }
echo "$2 $3 $4 ${call%% *}" >> "$CLOUD/calls"
mapfile -t calls < "$CLOUD/calls"
[ "${#calls[@]}" != "${FAIL_AT:-}" ] || { echo "ERROR: (gcloud) no" >&2; exit 5; }
gone() { # the machines, with all that ran on them
  for run in "$CLOUD"/worker?/mqformer; do
    [ -e "$run/status" ] || [ ! -e "$run/pid" ] || kill -KILL -- "-$(cat "$run/pid")" 2> /dev/null
  done
  rm -rf "$CLOUD"/{node,worker?}
}
list() { # the first of the states to come; the last one stays
  [ -s "$CLOUD/$1" ] || return 0
  mapfile -t states < "$CLOUD/$1"
  echo "${states[0]}"
  [ "${#states[@]}" = 1 ] || printf '%s\n' "${states[@]:1}" > "$CLOUD/$1"
}
case "$1 $2 $3 $4" in
  "storage buckets describe gs://b") echo "${HIERARCHICAL-True}" ;;
  "compute tpus tpu-vm list") list node ;;
  "compute tpus queued-resources list") list request ;;
  "compute tpus queued-resources create")
    echo ACTIVE > "$CLOUD/request"
    printf '\nCREATING\nREADY\n' > "$CLOUD/node" ;;
  "compute tpus tpu-vm create") echo READY > "$CLOUD/node" ;;
  "compute tpus queued-resources delete")
    [[ "$*" = *" --force"* ]] || [ ! -e "$CLOUD/node" ] || { echo "ERROR: the queued resource has a TPU" >&2; exit 1; }
    gone
    rm -f "$CLOUD/request" ;;
  "compute tpus tpu-vm delete") gone ;;
  "compute tpus tpu-vm ssh" | "compute tpus tpu-vm scp")
    [ "$(cat "$CLOUD/node")" = READY ] || { echo "ERROR: the TPU is $(cat "$CLOUD/node")" >&2; exit 1; }
    [ "$worker" != all ] || worker="0 1"
    code=0
    for i in $worker; do
      export HOME=$CLOUD/worker$i
      mkdir -p "$HOME"
      if [ "$4" = scp ]; then head -c "${CUT:--0}" "$5" > "$HOME/${5##*/}"; continue; fi
      (cd && PATH=$HOME/bin:$PATH exec bash -c "$command") || code=$?
    done
    exit "$code" ;;
  *) echo "no such command: $*" >&2; exit 2 ;;
esac
"""

# On a worker; in images/ what has to be installed. $FAIL names one that fails on worker 1.
TOOLS = {
    "hostname": 'basename "$HOME"',
    "curl": "echo key",
    "lsb_release": "echo jammy",
    "sudo": (
        'cat > /dev/null; case "$*" in *" install --yes gcsfuse") '
        'mkdir -p ~/bin; cp "$TOOLS/images/gcsfuse" ~/bin ;; esac'
    ),
    "images/gcsfuse": 'rmdir ~/bucket && ln -s "$CLOUD/bucket" ~/bucket && echo "$3" > ~/mounted',
    "findmnt": "cat ~/mounted 2> /dev/null",
    "fusermount": "rm ~/mounted ~/bucket",
    "python3": (
        '[ "$*" = "-m pip install --quiet --user uv" ] && mkdir -p ~/.local/bin && cp "$TOOLS/images/uv" ~/.local/bin'
    ),
    "images/uv": (
        'echo "$1" >> ~/uv; '
        '[ "$1" != venv ] || { mkdir -p ../venv/bin; cp "$TOOLS/images/program" ../venv/bin/python; }'
    ),
    "images/program": r"""
[ "$1 $2" = "-m mqformer_jax.main" ] || exit 99
printf '%s\0' "${@:3}" >> "bucket/flags of $(hostname)"
trap 'echo "checkpoint saved. Run the same command to resume."; exit PREEMPTED' TERM
. "$CLOUD/training"
""".replace("PREEMPTED", str(PREEMPTED)),
}
# Trainings: one that waits for the test; and the start of one whose rest is the fate of worker 0's first run.
GOES_ON = "touch ~/started; while [ ! -e $CLOUD/enough ]; do sleep 0.02; done; echo done"
ONCE = '[ "$(hostname)" = worker0 ] && mkdir bucket/checkpoint || exit 0'


def make_place(place: Path) -> Path:
    """A small checkout to launch from, and the stand-ins."""
    (place / "tools" / "images").mkdir(parents=True)
    for name, body in (("gcloud", GCLOUD), *TOOLS.items()):
        fails = (
            f'[ "${{FAIL:-}} ${{HOME##*/}}" != "{name.removeprefix("images/")} worker1" ] || exit 1\n'
            if name in TOOLS
            else ""
        )
        (place / "tools" / name).write_text(f"#!/usr/bin/env bash\n{fails}{body}\n")
        (place / "tools" / name).chmod(0o755)
    (place / "checkout").mkdir()
    shutil.copy(SCRIPT, place / "checkout")
    (place / "checkout" / WORKER).parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / WORKER, place / "checkout" / WORKER)
    for name in ("setup.cfg", "pyproject.toml", "kept.py", "removed.py", "ignored"):
        (place / "checkout" / name).write_text(name)
    (place / "checkout" / ".gitignore").write_text("ignored\n")
    for words in (["init", "--quiet", "--template="], ["add", "."]):
        subprocess.run(["git", *words], cwd=place / "checkout", check=True)
    return place


class Cloud:
    """The project, and a checkout of its own."""

    def __init__(self, folder: Path, place: Path):
        self.folder, self.checkout, tools = folder / "cloud", folder / "checkout", place / "tools"
        (self.folder / "bucket").mkdir(parents=True)
        shutil.copytree(place / "checkout", self.checkout)
        self.env = {
            "PATH": f"{tools}:{tools}/images:{os.environ['PATH']}",
            "HOME": str(folder),
            "CLOUD": str(self.folder),
            "TOOLS": str(tools),
        }
        self.training("exit 0")

    def training(self, body: str) -> None:
        """What the program does, once it has written down its flags."""
        (self.folder / "training").write_text(body)

    def repository(self) -> str:
        words = "git status --short && git count-objects -v"
        return subprocess.run(words, shell=True, cwd=self.checkout, check=True, capture_output=True, text=True).stdout

    def script(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(SCRIPT), *words], env=self.env, capture_output=True, text=True, timeout=300)

    def words(self, command: str, *args: str) -> list[str]:
        settings = (
            "--name=mq",
            "--zone=z",
            "--type=v5litepod-8",
            "--version=v2",
            "--bucket=b",
            "--wait=0",
            "--retries=2",
        )
        flags = ("--", *FLAGS) if command in ("run", "all", "watch") and "--" not in args else ()
        return [str(self.checkout / "launch_tpu.sh"), command, *settings, *args, *flags]

    def launch(self, command: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.words(command, *args), env=self.env | env, capture_output=True, text=True, timeout=300, cwd="/"
        )

    def ok(self, command: str, *args: str, **env: str) -> str:
        result = self.launch(command, *args, **env)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    def start(self, *args: str) -> str:
        """Start a run and leave it in the background: `all` without the log."""
        return "".join(self.ok(command, *args) for command in ("create", "sync", "install", "run"))

    def calls(self) -> list[str]:
        """What gcloud was called for since this was last asked."""
        path = self.folder / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [call.strip() for call in calls]

    def state(self, what: str, state: str) -> None:
        """what: node, or the request for it."""
        (self.folder / what).write_text(state + "\n")

    def flags(self, worker: int) -> list[str]:
        """What the program got, run after run."""
        path = self.folder / "bucket" / f"flags of worker{worker}"
        return path.read_text().split("\0")[:-1] if path.exists() else []

    def end(self) -> None:
        """The power is off."""
        for run in self.folder.glob("worker?/mqformer"):
            if (run / "pid").exists() and not (run / "status").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int((run / "pid").read_text()), signal.SIGKILL)


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]
