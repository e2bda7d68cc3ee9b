"""Other programs, each in a process group of its own that ends as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench import PATHS, ROOT

POLL_S = 0.02
END_S = 10.0
"""Seconds that a process gets to disappear once it was killed; one that waits for a broken driver may never do."""


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: Its exit status, negative for a signal; None if it ran past its limit.
        output: What it printed, errors included.
        limit_s: The seconds that it had.
    """

    status: int | None
    output: str
    limit_s: float

    @property
    def how(self) -> str:
        """In words."""
        if self.status is None:
            return f"ran past {self.limit_s:.0f} s"
        if self.status < 0:
            return f"died by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}"

    def tail(self, lines: int = 6) -> str:
        """The last lines of the output."""
        return "\n".join(self.output.strip().splitlines()[-lines:])


def run(
    command: Sequence[str], limit_s: float, heard: Callable[[str], None] | None = None, **environment: str
) -> Ended:
    """Run a program in the checkout's root, and end its process group, so that what it has started ends with it.

    Args:
        command: The program and its arguments.
        limit_s: Seconds after which it is ended.
        heard: Called with each line that it prints, as it comes.
        **environment: Variables beside those of this process.
    """
    paths = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if heard is not None:
                heard(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    in_time = False
    try:
        in_time = _ends(process.pid, limit_s)
    finally:  # also when this process is interrupted
        _end_group(process)
    # A process that made a session of its own may still hold the pipe, and is not waited for.
    listener.join(END_S)
    return Ended(process.returncode if in_time else None, "".join(lines), limit_s)


def _ends(pid: int, limit_s: float) -> bool:
    """Whether a child ends within the limit. It is left to be collected: until then, its group's number is not reused."""
    deadline = time.monotonic() + limit_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _end_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} can't be ended", flush=True)
