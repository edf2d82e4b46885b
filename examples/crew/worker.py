"""One agent's place in a crew: takes tasks, lets the agent work in a worktree, tests, and merges.

A worker may be killed at any moment: its agent ends with it, its lease runs out, and the next
worker finds what is left: the tokens that were used, a worktree to remove, or a merge that only has
to be reported.
"""
from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterator, List, Tuple

from sessionoptimizer import SessionOptimizer, SessionOptimizerError, SessionStatus, mask_secrets

from .agents import Agent, Attempt, Ended, Runner
from .bus import ALL, Bus, Claim, CrewError
from .repository import Conflict, Merge, Repository

# how long a claim waits before the worker looks whether there is anything left to do
IDLE_SECONDS = 1.0
NOTES = 10          # messages that go with one prompt
REASON_LENGTH = 1_500


@dataclass
class Rules:
    """What a crew holds its agents to. ``test`` is a command line for ``sh``; "" lets everything
    pass.

    ``protected``: patterns of paths no agent may change. ``forbidden``: regular expressions no
    added line may match. Seconds: how long one run of the agent, and one of the tests, may take."""

    test: str = ""
    protected: List[str] = field(default_factory=list)
    forbidden: List[str] = field(default_factory=list)
    agent_seconds: float = 3600.0
    test_seconds: float = 900.0


class Refused(Exception):
    """Work that does not go on the branch; ``again``: whether another attempt may do better."""

    def __init__(self, outcome: str, reason: str, *, again: bool):
        super().__init__(f"{outcome}: {reason}")
        self.again = again


class Lost(Exception):
    """The task went to another worker."""


class Worker:
    """Works as ``name`` with an agent's command; ``limit`` bounds the agents that run at once, over
    all workers."""

    def __init__(self, bus: Bus, repository: Repository, agent: Agent, rules: Rules, *,
                 name: str = "", store: str = "", limit: int = 0):
        self.bus, self.repository, self.agent, self.rules = bus, repository, agent, rules
        self.name = name or agent.name
        self.optimizer = SessionOptimizer(store or None)
        self.slots, self.limit = os.path.join(repository.state, "slots"), limit

    def run(self) -> int:
        """Take tasks until none is left that could still become this worker's; how many it
        finished."""
        finished, wait = 0, 0.0
        while True:
            claim = self.bus.claim(self.name, self.agent.capabilities, wait=wait)
            wait = 0.0 if claim else IDLE_SECONDS
            if claim is not None:
                finished += self.do(claim)
            elif not self._work_left():
                return finished

    def _work_left(self) -> bool:
        able = set(self.agent.capabilities)
        return any(state.status in ("WAITING", "READY", "CLAIMED")
                   and able >= set(state.task.requires) for state in self.bus.tasks())

    def do(self, claim: Claim) -> bool:
        """Do one task; True when this worker's attempt settled it, done or failed."""
        runner = Runner(self.slots, self.limit)
        with self._kept_alive(claim, runner):
            try:
                self._settle_earlier(claim)
                result = self._merged_before(claim) or self._attempt(claim, runner)
            except Refused as refusal:
                return self.bus.fail(claim, str(refusal), retry=refusal.again)
            except Lost:
                return False
            except (CrewError, OSError, SessionOptimizerError) as error:
                return self.bus.fail(claim, f"crew: {error}")
            except (KeyboardInterrupt, SystemExit):
                self.bus.fail(claim, "the worker was stopped")
                raise
            finally:
                self.repository.remove_worktree(
                    self.repository.path_of(claim.task.id, claim.attempt))
            return self._report(claim, result)

    @contextlib.contextmanager
    def _kept_alive(self, claim: Claim, runner: Runner) -> Iterator[None]:
        """Renew the lease from a thread until the work is over; a lease that is lost stops the
        runner."""
        over = threading.Event()

        def renew() -> None:
            sign = time.monotonic()
            while not over.wait(self.bus.lease_seconds / 4):
                try:
                    if not claim.renew():
                        break
                    sign = time.monotonic()
                except CrewError:
                    # no answer: others will take the task once the lease is over, not before
                    if time.monotonic() - sign > self.bus.lease_seconds:
                        break
            if not over.is_set():
                runner.lost.set()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _settle_earlier(self, claim: Claim) -> None:
        """Clear up after attempts that were never ended: their sessions, and their worktrees."""
        for number in range(1, claim.attempt):
            Attempt(self.repository, claim.task, number).settle(
                self.optimizer, SessionStatus.ABANDONED)
        for path in self.repository.worktrees_of(claim.task.id):
            self.repository.remove_worktree(path)

    def _merged_before(self, claim: Claim) -> Dict[str, Any]:
        """The result of a task whose worker was killed between the merge and its report."""
        commit = self.repository.merged().get(claim.task.id)
        return dict(asdict(self.repository.measure(commit)), outcome="merged") if commit else {}

    def _attempt(self, claim: Claim, runner: Runner) -> Dict[str, Any]:
        path, base = self.repository.add_worktree(claim.task.id, claim.attempt)
        ended = self._let_the_agent_work(claim, runner, path)
        if runner.lost.is_set():
            raise Lost
        if ended.status != 0:
            raise Refused(
                "agent",
                f"ended with status {ended.status}: {mask_secrets(ended.tail)[-REASON_LENGTH:]}",
                again=True)
        head = self.repository.commit_all(path, claim.task.title, self.name)
        if head == base:
            return {"outcome": "unchanged"}
        self._check(claim, base, head)
        self._test(runner, claim, path)
        return dict(asdict(self._merge(claim, runner, path, base, head)), outcome="merged")

    def _let_the_agent_work(self, claim: Claim, runner: Runner, path: str) -> Ended:
        """Run the agent with the task and what was said to it; its sessions are in the store
        afterwards."""
        attempt = Attempt(self.repository, claim.task, claim.attempt)
        environment = attempt.begin(self.agent, self.name)
        prompt, notes = self._prompt(claim)
        status = SessionStatus.FAILED
        try:
            ended = runner.run(
                attempt.command(self.agent, prompt), path, self.rules.agent_seconds, attempt.output,
                limited=True, environment=dict(environment, CREW_PROMPT=prompt))
            if ended.status == 0:
                status = SessionStatus.COMPLETED
                for note in notes:
                    note.acknowledge()
        finally:
            attempt.settle(self.optimizer, status)
        return ended

    def _prompt(self, claim: Claim) -> Tuple[str, List[Any]]:
        """The task's prompt, with the notes that are waiting for this agent; news of merges are
        read and dropped."""
        notes = []
        for message in self.bus.receive(self.name, limit=NOTES):
            if isinstance(message.body, str):
                notes.append(message)
            else:
                message.acknowledge()
        lines = [f"{note.sender}: {note.body}" for note in notes]
        prompt = claim.task.prompt or claim.task.title
        return prompt + ("\n\nMessages for you:\n" + "\n".join(lines) if lines else ""), notes

    def _check(self, claim: Claim, base: str, head: str) -> None:
        if not self.repository.is_ancestor(base, head):
            raise Refused("history", "the agent's commits do not build on the branch", again=True)
        found = self.repository.refused(base, head, self.rules.protected, self.rules.forbidden)
        if found:
            left = self.repository.keep(claim.task.id, head)
            raise Refused("protected", f"{'; '.join(found[:10])}; left on {left}", again=False)

    def _test(self, runner: Runner, claim: Claim, path: str) -> None:
        if not self.rules.test:
            return
        output = os.path.join(self.repository.state, "attempts", os.path.basename(path) + ".test")
        try:
            ended = runner.run(["sh", "-c", self.rules.test], path, self.rules.test_seconds, output)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(output)
        if runner.lost.is_set():
            raise Lost
        if ended.status != 0:
            raise Refused(
                "tests",
                f"ended with status {ended.status}: {mask_secrets(ended.tail)[-REASON_LENGTH:]}",
                again=True)

    def _merge(self, claim: Claim, runner: Runner, path: str, base: str, head: str) -> Merge:
        """Put the work on the branch, one worker at a time: on its tip, tested there if that moved
        meanwhile."""
        with self.repository.lock() as held:
            tip = self.repository.tip()
            before = self.repository.merged().get(claim.task.id)
            if before:  # by a worker that was suspended for longer than its lease
                return self.repository.measure(before)
            message = (f"Merge {' '.join(claim.task.title.split())}\n\nCrew-Task: {claim.task.id}\n"
                       f"Crew-Agent: {self.name}\n"
                       f"Crew-Name: {self.repository.crew}\n")
            try:
                commit = self.repository.join(path, head, tip, message, self.name)
            except Conflict as conflict:
                left = self.repository.keep(claim.task.id, head, held)
                raise Refused("conflict", f"{conflict}; left on {left}", again=False) from None
            if tip != base:
                self._test(runner, claim, path)
            if not claim.renew():
                raise Lost
            self.repository.move(commit, tip, held)
            return self.repository.measure(commit)

    def _report(self, claim: Claim, result: Dict[str, Any]) -> bool:
        """Tell the others and mark the task as done. In this order, and with an id for the message,
        a worker that is killed in between neither loses the news nor doubles it."""
        self.bus.send(self.name, ALL, dict(result, task=claim.task.id, title=claim.task.title),
                      message_id=f"{self.repository.crew}/{claim.task.id}")
        return self.bus.complete(claim, result)
