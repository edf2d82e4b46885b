"""An agent's run on a task as sessions: started, watched, its tokens taken from its own log.

The sessions are ordinary ones with ``collab_id``, ``task_id``, ``crew_agent`` and ``attempt`` in
their metadata.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

from sessionoptimizer import (READERS, Session, SessionOptimizer, SessionStatus,
                              find_transcripts, slug)

from .bus import CrewError, Task, TaskState
from .repository import Repository, safe_name

HERE = os.path.dirname(os.path.abspath(__file__))
RECORD = os.path.join(os.path.dirname(HERE), "agent_session", "record.py")
TAIL_BYTES = 2_000  # of a command's output, for a reason
LOOK_SECONDS = 0.1
CLOCK_SECONDS = 2.0  # by which a file system's clock may differ


@dataclass
class Agent:
    """A kind of agent: its command with ``{prompt}`` where the prompt goes, what it can do, how
    many may run."""

    name: str
    command: List[str]
    count: int = 1
    capabilities: Tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Agent":
        """The agent of ``NAME[:COUNT[:CAPABILITY,...]]=COMMAND``; CrewError for another text."""
        head, equals, command = text.partition("=")
        name, _, rest = head.partition(":")
        count, _, capabilities = rest.partition(":")
        try:
            agent = cls(name.strip(), shlex.split(command), int(count or 1),
                        tuple(word.strip() for word in capabilities.split(",") if word.strip()))
        except ValueError as error:
            raise CrewError(f"--agent {text}: {error}") from error
        if not equals or not agent.name or not agent.command or agent.count < 1:
            raise CrewError(f"--agent {text}: give NAME[:COUNT[:CAPABILITY,...]]=COMMAND")
        return agent

    def arguments(self, prompt: str) -> List[str]:
        """The command for a prompt. No shell sees it."""
        return [word.replace("{prompt}", prompt) for word in self.command]


@dataclass
class Ended:
    """How a command ended: its status (None when it was stopped), and the end of what it
    printed."""

    status: Any
    tail: str


@dataclass
class Runner:
    """Runs commands that end with this process, no more than ``limit`` of one crew at once (0: any
    number)."""

    slots: str
    limit: int = 0
    # set when the work counts for nothing any more
    lost: threading.Event = field(default_factory=threading.Event)

    def run(self, command: List[str], cwd: str, seconds: float, output: str, *,
            limited: bool = False,
            environment: Dict[str, str] = {}) -> Ended:  # noqa: B006 (read only)
        """Run a command with its output in a file, stopped after ``seconds`` or when the task is
        lost."""
        leash = [sys.executable, os.path.join(HERE, "leash.py"), self.slots,
                 str(self.limit if limited else 0)]
        with open(output, "ab") as file:
            process = subprocess.Popen(
                leash + command, cwd=cwd, stdin=subprocess.PIPE, stdout=file, stderr=file,
                start_new_session=True, env={**os.environ, **environment})
        end, stopped = time.monotonic() + seconds, True
        try:
            while not ended(process) and time.monotonic() < end and not self.lost.is_set():
                time.sleep(LOOK_SECONDS)
            stopped = not ended(process)
        finally:  # Ctrl-C too: nothing of it runs when the worktree is removed
            process.stdin.close()
            while not ended(process):
                time.sleep(LOOK_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                # what the command left running in the background
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with open(output, "rb") as file:
            file.seek(max(0, os.path.getsize(output) - TAIL_BYTES))
            tail = file.read().decode(errors="replace").strip()
        if stopped:
            return Ended(None, f"stopped after {seconds:g} s" if not self.lost.is_set()
                         else "the lease is lost")
        return Ended(process.returncode, tail)


def ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended. It is not waited for, so its number stays its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Attempt:
    """One attempt at a task: a scratch store while it runs, then its sessions in the store that is
    given.

    The scratch store stays until they are there, so what a killed worker's agent used is found by
    the next."""

    def __init__(self, repository: Repository, task: Task, number: int):
        self.task, self.number = task, number
        self.path = repository.path_of(self.task.id, self.number)
        self.folder = os.path.join(repository.state, "attempts", os.path.basename(self.path))
        self.crew = repository.crew
        self.id = slug(f"{self.crew}-{safe_name(task.id)}-{number}")
        self.recorded = self.id + "-recorded"
        self.store = os.path.join(self.folder, "store")
        self.output = os.path.join(self.folder, "output.txt")
        self.ledger = os.path.join(repository.state, "sessions.jsonl")

    def begin(self, agent: Agent, worker: str) -> Dict[str, str]:
        """Start the session a script may log to; what the agent's environment gets."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder, mode=0o700)
        with open(os.path.join(self.folder, "worker"), "w", encoding="utf-8") as file:
            file.write(worker)
        SessionOptimizer(self.store).start_session(agent.name, self.task.title, session_id=self.id)
        return {"SESSIONOPTIMIZER_HOME": self.store, "SESSIONOPTIMIZER_SESSION": self.id,
                "CREW_TASK": self.task.id, "CREW_AGENT": worker, "CREW_NAME": self.crew}

    def _worker(self) -> str:
        with open(os.path.join(self.folder, "worker"), encoding="utf-8") as file:
            return file.read()

    def command(self, agent: Agent, prompt: str) -> List[str]:
        """The agent's command under ``record``, where that can be had; it knows an agent's log by
        the agent's process."""
        command = agent.arguments(prompt)
        if not os.path.exists(RECORD) or importlib.util.find_spec("ptyprocess") is None:
            return command
        return [sys.executable, RECORD, "--store", self.store, "--agent", agent.name, "--task",
                self.task.title, "--session-id", self.recorded, "--result",
                os.path.join(self.folder, "result.json"), "--", *command]

    def settle(self, optimizer: SessionOptimizer, status: SessionStatus) -> List[str]:
        """Bring the sessions of this attempt into the store and return their ids; [] when nothing
        was begun."""
        scratch = SessionOptimizer(self.store) if os.path.isdir(self.store) else None
        own = scratch.get_session(self.id) if scratch else None
        ids = []
        if scratch and own:
            if own.status is SessionStatus.ACTIVE:
                scratch.end_session(self.id, status)
            ids = [self._import(optimizer, session, status) for session in self._used(scratch, own)]
        shutil.rmtree(self.folder, ignore_errors=True)
        return ids

    def _read_transcripts(self, scratch: SessionOptimizer) -> None:
        """Read what agents wrote to their logs since the attempt began."""
        started = os.path.getmtime(os.path.join(self.folder, "worker")) - CLOCK_SECONDS
        roots = [root for reader in READERS for root in reader.roots() if os.path.isdir(root)]
        recent = [path for path, _, changed in find_transcripts(roots) if changed >= started]
        if recent:
            scratch.scan(recent)

    def _used(self, scratch: SessionOptimizer, own: Session) -> List[Session]:
        """The sessions that say what the attempt cost: the agents' own logs, what a script logged
        itself, and without that the answers that went through ``record``. Without any, the script's
        empty one: the cost is not known then, and an estimate from what stood on the screen does
        not go into the sums."""
        told: Dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            with open(os.path.join(self.folder, "result.json"), encoding="utf-8") as file:
                told = json.load(file)
        if told.get("source") != "log":
            self._read_transcripts(scratch)
        logs = [session for session in scratch.list_sessions(limit=1_000)
                if session.imported
                and (session.id in told.get("sessions", ()) or self._is_here(session))]
        through = ([scratch.get_session(self.recorded)]
                   if told.get("source") == "pass-through" else [])
        return (logs + ([own] if own.total_tokens or not logs + through else [])
                + ([] if own.total_tokens else through))

    def _is_here(self, session: Session) -> bool:
        """Whether a transcript is of this attempt's worktree."""
        folder = os.path.realpath(str(session.metadata["source"].get("cwd") or os.sep))
        return folder == self.path or folder.startswith(self.path + os.sep)

    def _import(self, optimizer: SessionOptimizer, session: Session, status: SessionStatus) -> str:
        """Store a session under its id, once; where that was done before nothing changes."""
        data = session.to_dict()
        data["status"] = status.value
        data["metadata"] = dict(
            session.metadata, collab_id=self.crew, task_id=self.task.id, attempt=self.number,
            crew_agent=self._worker(), worktree=self.path)
        before = optimizer.get_session(session.id)
        if (before is None or before.metadata != data["metadata"]
                or before.total_tokens != session.total_tokens):
            optimizer.import_session(data)
            # a scan of the transcript knows no metadata
            with open(self.ledger, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": session.id, "metadata": data["metadata"]}) + "\n")
        return session.id


def settle_left(repository: Repository, optimizer: SessionOptimizer,
                states: List[TaskState]) -> None:
    """After the work: settle the attempts and remove the worktrees that killed workers left; not
    those under way."""
    for state in states:
        if state.status == "CLAIMED":
            continue
        for number in range(1, state.attempts + 1):
            Attempt(repository, state.task, number).settle(optimizer, SessionStatus.ABANDONED)
        for path in repository.worktrees_of(state.task.id):
            repository.remove_worktree(path)
    repository.tidy()
