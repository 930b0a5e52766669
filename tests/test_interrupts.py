"""Ctrl-C ends every command with one line, whatever the process is doing, and leaves nothing behind."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mqformer_jax.__main__ import COMMANDS
from mqformer_jax.interrupts import PREEMPTED

REPOSITORY = pathlib.Path(__file__).parent.parent
ENTRANCES = [["mqformer_jax.main"], *(["mqformer_jax", command] for command in COMMANDS)]


def start(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A Python program, with its output on pipes and in a buffer. before: a command that executes it."""
    command, buffered = [*before, sys.executable, *arguments], os.environ | {"PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, env=buffered)


def program(body: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A program that can be interrupted, once it has printed "ready"."""
    head = 'from mqformer_jax.interrupts import *\nexit_on_ctrl_c("program: stopped.")\n'
    process = start("-c", head + textwrap.dedent(body), before=before)
    said = process.stdout.readline()
    if said != "ready\n":
        process.kill()
    assert said == "ready\n", process.stderr.read()
    return process


def interrupt(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its exit status, and what it wrote to stdout and stderr after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    return ended(process)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    kill = threading.Timer(60, process.kill)
    kill.start()
    out, err = process.stdout.read(), process.stderr.read()
    kill.cancel()
    return process.wait(), out, err


@pytest.mark.parametrize("entrance", ENTRANCES, ids=" ".join)
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_ctrl_c_during_imports_stops_every_command(entrance):
    process = start("-m", *entrance, "--help")
    while len(os.listdir(f"/proc/{process.pid}/task")) == 1:  # the thread that waits for Ctrl-C is the first one
        time.sleep(0.001)
    status, out, err = interrupt(process)
    assert (status, out) == (130, "") and re.fullmatch(r"\nmqformer[\w -]*: stopped.*\n", err), err


def test_ctrl_c_is_not_delayed_by_compiled_code():
    """Python runs no signal handler before the call returns, which takes minutes here."""
    body = "import numpy\nx = numpy.random.rand(6000, 6000)\nprint('ready', flush=True)\nnumpy.linalg.svd(x)"
    assert interrupt(program(body)) == (130, "", "\nprogram: stopped.\n")


def test_ctrl_c_is_not_swallowed_by_a_garbage_collector_callback():
    body = """
    import gc, time
    gc.callbacks.append(lambda *_: (print('ready', flush=True), time.sleep(1)))
    gc.collect()
    time.sleep(60)
    """
    assert interrupt(program(body)) == (130, "", "\nprogram: stopped.\n")


def test_ctrl_c_is_not_caught_by_except_base_exception():
    body = """
    print('ready', flush=True)
    while True:
        try:
            while True: pass
        except BaseException:
            print('a healthy file is damaged', flush=True)
    """
    assert interrupt(program(body)) == (130, "", "\nprogram: stopped.\n")


def test_ctrl_c_flushes_output_and_removes_temporary_files_and_children(tmp_path):
    body = f"""
    import os, subprocess, sys, time, multiprocessing
    if __name__ == "__main__":
        os.makedirs("{tmp_path}/folder/inner")
        open("{tmp_path}/file", "w").close()
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        with removed_on_exit("{tmp_path}/folder"), removed_on_exit("{tmp_path}/file"):
            child.start()
            print(child.pid)  # to the buffer
            os.write(1, b"ready\\n")
            time.sleep(600)
    """
    process = program(body)
    status, out, _ = interrupt(process)
    assert status == 130 and not os.listdir(tmp_path)
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):  # until whoever adopted it has noticed
            os.kill(int(out), 0)
            time.sleep(0.01)


def test_ctrl_c_can_be_postponed_once():
    body = """
    import time
    asked = []
    with postponed(lambda: not asked and not asked.append(1)):
        print("ready", flush=True)
        while not asked:
            time.sleep(0.01)
        print("saving", flush=True)
        time.sleep(60)
    """
    process = program(body)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    assert interrupt(process) == (130, "", "\nprogram: stopped.\n")


def test_sigterm_exits_with_the_preempted_status():
    body = """
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: None)
    with exit_on_sigterm():
        print("ready", flush=True)
        time.sleep(60)
    """
    process = program(body)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (PREEMPTED, "", "\nReceived SIGTERM. Run the same command to resume.\n")


DEAF = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as nohup starts a program, or a script in its background


@pytest.mark.parametrize("before", [(), DEAF], ids=["", "deaf to Ctrl-C"])
def test_sigterm_before_training_exits_with_the_preempted_status(before, tmp_path):
    body = f"""
    import time
    import mqformer_jax.train
    from mqformer_jax import main
    mqformer_jax.train.train = lambda *_: (print("ready", flush=True), time.sleep(60))
    main.run(["--config=coco_ref:sample", "--workdir={tmp_path}"])
    """
    process = program(body, before)
    process.send_signal(signal.SIGTERM)
    status, _, err = ended(process)
    assert status == PREEMPTED and err.endswith("\nReceived SIGTERM. Run the same command to resume.\n"), err


def test_children_started_with_ctrl_c_blocked_ignore_sigint():
    body = """
    import subprocess, sys
    code = "import time; print('ready', flush=True); time.sleep(1); print('heard nothing')"
    with block_ctrl_c_in_children():
        child = subprocess.Popen([sys.executable, "-c", code])
    child.wait()
    """
    process = program(body)
    child = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "heard nothing"], capture_output=True, text=True
    ).stdout
    os.kill(int(child), signal.SIGINT)
    assert ended(process) == (0, "heard nothing\n", "")


def test_program_started_with_sigint_ignored_keeps_ignoring_it():
    body = "import time\nprint('ready', flush=True)\ntime.sleep(1)\nprint('done')"
    process = program(body, DEAF)
    assert interrupt(process) == (0, "done\n", "")


def test_importing_the_package_keeps_the_default_sigint_handler():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
