"""Run a command that ends with whoever started it: all of it, when standard input closes.

    leash.py SLOTS LIMIT COMMAND...

It waits until fewer than LIMIT of the commands that share the directory SLOTS run; 0 means no
limit. A worker that is killed closes the pipe to here, whatever it could not do any more, so no
agent goes on without one.
"""
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from typing import Dict, List, Optional

GRACE_SECONDS = 2.0  # between asking the processes to end and ending them
LOOK_SECONDS = 0.05


def take_slot(folder: str, limit: int) -> Optional[int]:
    """A lock on one of the ``limit`` files; None while all are held."""
    for number in range(limit):
        slot = os.open(os.path.join(folder, str(number)), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return slot
        except BlockingIOError:
            os.close(slot)
    return None


def let_go(seconds: float) -> bool:
    """Whether standard input closed within ``seconds``."""
    readable, _, _ = select.select([0], [], [], seconds)
    return bool(readable) and not os.read(0, 1024)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none gets away (Linux
    only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def descendants() -> List[int]:
    """The processes below this one; where there is no /proc, none is known."""
    children: Dict[int, List[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(name)}/stat", encoding="latin-1") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def send(number: int) -> int:
    """Send a signal to everything below this process; how many there were."""
    found = descendants()
    for process in found:
        with contextlib.suppress(OSError):
            os.kill(process, number)
    return len(found)


def end_all(process: subprocess.Popen) -> None:
    """Ask all processes to end, and after the grace end them, until none is left."""
    os.killpg(0, signal.SIGTERM)
    number, end = signal.SIGTERM, time.monotonic() + GRACE_SECONDS
    while send(number) or process.poll() is None:
        if time.monotonic() > end:
            number = signal.SIGKILL
            process.kill()
        time.sleep(LOOK_SECONDS)


def main(argv: List[str]) -> int:
    """Run the command and return its status, 128 and its signal for one that was killed."""
    folder, limit, command = argv[0], int(argv[1]), argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the others of the group
    adopt_orphans()
    while limit and take_slot(folder, limit) is None:
        if let_go(LOOK_SECONDS):
            return 1
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", flush=True)
        return 127
    while process.poll() is None:
        if let_go(LOOK_SECONDS):
            break
    end_all(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
