"""A pool of worker processes: so many agents at once; a worker that dies is started again."""
from __future__ import annotations

import subprocess
import time
from typing import Callable, Dict, List

LOOK_SECONDS = 0.1
STOP_SECONDS = 15.0
# of one worker: what dies more often has a cause that starting it again does not cure
MOST_RESTARTS = 20


class Pool:
    """Runs a command for each name until all have ended by themselves. Their standard input is a
    pipe from here: when it closes, whatever the reason, they are to end."""

    def __init__(self, commands: Dict[str, List[str]], say: Callable[[str], None] = print):
        self.commands, self.say = commands, say
        self.processes: Dict[str, subprocess.Popen] = {}
        self.restarts = {name: 0 for name in commands}

    def start(self, name: str) -> None:
        """Start a worker."""
        self.processes[name] = subprocess.Popen(self.commands[name], stdin=subprocess.PIPE)

    def run(self) -> bool:
        """Work until every worker has ended; False when one could not be kept alive."""
        try:
            for name in self.commands:
                self.start(name)
            while self.processes:
                for name, process in list(self.processes.items()):
                    if process.poll() is not None:
                        self._ended(name, process)
                time.sleep(LOOK_SECONDS)
        finally:
            self.stop()
        return max(self.restarts.values()) <= MOST_RESTARTS

    def _ended(self, name: str, process: subprocess.Popen) -> None:
        process.stdin.close()
        del self.processes[name]
        if process.returncode == 0:
            return
        self.restarts[name] += 1
        again = self.restarts[name] <= MOST_RESTARTS
        self.say(f"{name} ended with status {process.returncode}"
                 + (", started again" if again else ""))
        if again:
            self.start(name)

    def stop(self) -> None:
        """Let all workers end, and wait until they have."""
        for process in self.processes.values():
            process.stdin.close()
        end = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
