"""Run a command that ends with whoever started it: when standard input closes, all its processes are ended.

    leash.py SLOTS LIMIT COMMAND...

It waits until fewer than LIMIT of the commands that share the directory SLOTS run; 0 means no limit. A worker
that is killed closes the pipe to here, whatever it could not do any more, so no agent goes on without one.
"""
from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from typing import List, Optional

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


def end_group(process: subprocess.Popen) -> None:
    """Ask the whole process group to end; what has not after the grace is killed, this process with it."""
    os.killpg(0, signal.SIGTERM)
    end = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main(argv: List[str]) -> int:
    """Run the command and return its status, 128 and its signal for one that was killed."""
    folder, limit, command = argv[0], int(argv[1]), argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the others of the group
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
            end_group(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
