#!/usr/bin/env python3
"""What recording costs: processor time of record.py over a bare pseudo terminal, by output rate.

    python3 examples/agent_session/measure.py [--megabytes 10] [--seconds 5] [--rounds 3]

Both copy the same command's output to /dev/null. Bare: a loop of read and write in Python, which
nothing can undercut without leaving Python. Rounds alternate, since machines differ from minute to
minute; the figure is the median.
"""
from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import List

HERE = os.path.dirname(os.path.abspath(__file__))
BARE = """
import os, pty, sys
pid, master = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
try:
    while os.write(1, os.read(master, 65536)):
        pass
except OSError:
    os.waitpid(pid, 0)
open(os.environ["DONE"], "w").close()
while True:
    __import__("time").sleep(60)
"""
WRITER = """
import os, sys, time
rate, seconds, done = float(sys.argv[1]) * 1e6, float(sys.argv[2]), sys.argv[3]
line = (b"x" * 78 + b"\\r\\n") * 128
began, written = time.monotonic(), 0
while written < rate * seconds:
    written += os.write(1, line)
    time.sleep(max(0.0, began + written / rate - time.monotonic()))
if done:
    open(done, "w").close()
    time.sleep(60)
"""


def processor_seconds(pid: int) -> float:
    """User and system time of one process, without its children."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def share(command: List[str], done: str, env: "dict[str, str]", seconds: float) -> float:
    """Percent of one processor that a program takes from its start until ``done`` is there; its
    start is left out."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        time.sleep(1.0)  # interpreter, imports, the session's beginning
        first, at = processor_seconds(process.pid), time.monotonic()
        while not os.path.exists(done):
            if time.monotonic() - began > 20 * seconds + 30:
                raise SystemExit("measure.py: the output did not come to its end")
            time.sleep(0.02)
        return 100 * (processor_seconds(process.pid) - first) / (time.monotonic() - at)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "--megabytes", type=float, default=10.0, help="of output per second (default: 10)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of each (default: 3)")
    given = parser.parse_args()
    found = {"bare": [], "record": []}  # type: dict[str, List[float]]
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.rounds):
            for name in found:
                done = os.path.join(place, f"{name}-{number}")
                writer = [sys.executable, "-c", WRITER, str(given.megabytes),
                          str(given.seconds + 1), done]
                program = [sys.executable, "-c", BARE] if name == "bare" else [
                    sys.executable, os.path.join(HERE, "record.py"), "--store",
                    os.path.join(place, "store"), "--"]
                env = dict(os.environ, DONE=os.path.join(place, "unused"))
                found[name].append(share(program + writer, done, env, given.seconds))
                print(f"{name:8} {found[name][-1]:5.2f}% of one processor", flush=True)
    over = statistics.median(found["record"]) - statistics.median(found["bare"])
    print(f"record over a bare terminal at {given.megabytes:g} MB/s: {over:+.2f}% of one processor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
