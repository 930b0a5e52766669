"""End a command at once on Ctrl-C, with a one-line message.

By default, Python raises an exception in whatever code is running. This does not suit a program that spends its time in
compiled code: the exception waits until a compilation ends, a callback of the garbage collector swallows it, or a
library catches it and reports a damaged file. Here, a separate thread receives the signal and ends the process. This is
safe at any moment because every file is first written under a temporary name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator

STATUS = 130  # what shells report after Ctrl-C
# Exit status of a training run that received SIGTERM: its checkpoint is saved, and the same command resumes it. The
# value is EX_TEMPFAIL of sysexits.h, "try again". launch_tpu.sh reads it.
PREEMPTED = 75

_socket: socket.socket | None = None  # receives the number of each signal, which Python writes to `_writer`
_writer: socket.socket | None = None
_message, _status = "stopped.", STATUS
_temporary: set[str] = set()
_before_exit: list[Callable[[], None]] = []
_postpone: Callable[[], bool] | None = None
_was_postponed = _exits_on_sigterm = False


def exit_on_ctrl_c(message: str, status: int = STATUS) -> None:
    """Make Ctrl-C print `message` and end this process with exit status `status`. A later call replaces both.

    Call it from the main thread of a command, before slow imports. A program that only imports this package keeps
    Python's KeyboardInterrupt. By convention, a process that was started with SIGINT ignored (by nohup, or in the
    background of a script) continues to ignore it.
    """
    global _socket, _writer, _message, _status
    _message, _status = message, status
    if _socket is not None:
        return
    _socket, _writer = socket.socketpair()
    _writer.setblocking(False)
    # Python's resource tracker cleans up after this process; suppress its warning about it.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    signal.set_wakeup_fd(_writer.fileno(), warn_on_full_buffer=False)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # signals that have no Python handler are not written to the socket
        signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_watch, args=(_socket,), name="ctrl-c", daemon=True).start()


def exit_now(status: int, message: str) -> None:
    """End this process at once: print `message` to stderr, kill child processes, remove temporary paths."""
    write = lambda: os.write(2, f"\n{message}\n".encode())
    for step in (_flush_stdout, write, _kill_children, _remove_temporary, *_before_exit):
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            step()
    os._exit(status)


def before_exit(step: Callable[[], None]) -> None:
    """Register a function that `exit_now` calls before it ends the process. It should return quickly."""
    _before_exit.append(step)


@contextlib.contextmanager
def removed_on_exit(path: str | os.PathLike) -> Generator[None]:
    """Remove a temporary file or folder if `exit_now` ends the process inside this context."""
    _temporary.add(os.fspath(path))
    try:
        yield
    finally:
        _temporary.discard(os.fspath(path))


@contextlib.contextmanager
def block_ctrl_c_in_children() -> Generator[None]:
    """Block Ctrl-C in child processes that are started inside this context. `exit_now` kills them instead."""
    from multiprocessing.resource_tracker import ensure_running

    ensure_running()  # before the block, because its first call unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def postponed(ask: Callable[[], bool]) -> Generator[None]:
    """On Ctrl-C inside this context, call `ask()` and exit only if it returns False.

    If it returns True, the caller must stop soon, e.g. after a save (see `was_postponed`). SIGTERM only runs its Python
    handler in this context, except inside a nested `exit_on_sigterm`.
    """
    global _postpone, _exits_on_sigterm
    exits, _exits_on_sigterm, _postpone = _exits_on_sigterm, False, ask
    try:
        yield
    finally:
        _postpone, _exits_on_sigterm = None, exits


@contextlib.contextmanager
def exit_on_sigterm() -> Generator[None]:
    """Exit with status PREEMPTED on SIGTERM inside this context. Requires a Python handler for SIGTERM."""
    global _exits_on_sigterm
    exits, _exits_on_sigterm = _exits_on_sigterm, True
    try:
        yield
    finally:
        _exits_on_sigterm = exits


def was_postponed() -> bool:
    """Return whether `postponed` kept a Ctrl-C from ending the process, so that the caller must stop."""
    return _was_postponed


def _watch(numbers: socket.socket) -> None:
    global _was_postponed
    while True:
        for number in numbers.recv(64):
            if number == signal.SIGINT:
                if not (_postpone and _postpone()):
                    exit_now(_status, _message)
                _was_postponed = True
            if number == signal.SIGTERM and _exits_on_sigterm:
                exit_now(PREEMPTED, "Received SIGTERM. Run the same command to resume.")


def _flush_stdout() -> None:
    """Flush stdout, waiting at most a second: a blocked thread may hold the lock of stdout."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1)


def _kill_children() -> None:
    multiprocessing = sys.modules.get("multiprocessing")
    for child in multiprocessing.active_children() if multiprocessing else ():
        child.kill()


def _remove_temporary() -> None:
    for path in list(_temporary):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.lexists(path):
            os.remove(path)
