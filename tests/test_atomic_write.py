"""A file is written whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mqformer_jax.files import atomic_write, write_bytes, write_json, write_text


def test_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as temporary:
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old" and os.path.dirname(temporary) == str(tmp_path)
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_failed_write_keeps_old_file_and_removes_temporary(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_atomic_write_without_output_raises(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        pass
    assert not os.listdir(tmp_path)


def test_ctrl_c_of_a_command_leaves_no_temporary_file(tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from mqformer_jax.files import atomic_write
        from mqformer_jax.interrupts import exit_on_ctrl_c
        exit_on_ctrl_c("stopped.")
        with atomic_write(sys.argv[1]) as temporary:
            open(temporary, "w").write("half")
            print("ready", flush=True)
            time.sleep(60)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n" and len(os.listdir(tmp_path)) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not os.listdir(tmp_path)


def test_bytes_text_and_json_are_written_exactly(tmp_path):
    write_bytes(tmp_path / "bytes", b"\0\r\n")
    write_text(tmp_path / "text", "gr\u00fcn\n")
    write_json(tmp_path / "json", {"a": [1, None]})
    assert (tmp_path / "bytes").read_bytes() == b"\0\r\n"
    assert (tmp_path / "text").read_bytes() == "gr\u00fcn\n".encode()
    assert (tmp_path / "json").read_text() == '{\n "a": [\n  1,\n  null\n ]\n}'
