#!/usr/bin/env python3
"""Work through a queue of tasks, the most urgent first, a session for each, and see what each priority costs.

    python3 examples/priority_queue.py [--store DIR]

Tasks of equal priority keep their order. A task whose work raises ends as a FAILED session; the others go on.
"""
from __future__ import annotations

import argparse
import heapq
import itertools
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Callable, Protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer, SessionStatus, mask_secrets  # noqa: E402


@dataclass
class Task:
    """Something to do; a larger ``priority`` is more urgent."""

    id: str
    title: str
    agent: str
    priority: int = 50
    model: str = "default"


@dataclass
class TaskResult:
    """How a task went."""
    task: Task
    session_id: str
    success: bool
    tokens: int
    efficiency: float
    issues: int
    waited_seconds: float


class Queue(Protocol):
    """Where tasks come from. To use your own, import it: ``from priorityqueue import PriorityQueue``."""

    def pop(self) -> tuple[Task, float] | None:
        """The most urgent task and the seconds it waited; None when nothing is left."""


class TaskQueue:
    """A queue in memory."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, float, Task]] = []
        self._order = itertools.count()

    def push(self, task: Task) -> None:
        """Add a task."""
        heapq.heappush(self._heap, (-task.priority, next(self._order), time.monotonic(), task))

    def pop(self) -> tuple[Task, float] | None:
        """The most urgent task (the first of equals) and the seconds it waited; None when nothing is left."""
        if not self._heap:
            return None
        _, _, since, task = heapq.heappop(self._heap)
        return task, time.monotonic() - since


Work = Callable[[SessionOptimizer, str, Task], Any]  # does a task, logging to the session of this id


def run_task(optimizer: SessionOptimizer, task: Task, work: Work, waited: float = 0.0) -> TaskResult:
    """Do one task in a session of its own."""
    session = optimizer.start_session(task.agent, task.title, model=task.model,
                                      metadata={"task_id": task.id, "priority": task.priority})
    status = SessionStatus.COMPLETED
    try:
        work(optimizer, session.id, task)
    except Exception as error:  # one task's failure must not stop the queue
        status = SessionStatus.FAILED
        optimizer.log_event(session.id, EventType.ERROR,
                            {"tool": "task", "message": mask_secrets(str(error))[:300],
                             "error_type": type(error).__name__})
    optimizer.end_session(session.id, status)
    report = optimizer.analyze(session.id)
    return TaskResult(task, session.id, status is SessionStatus.COMPLETED, report.total_tokens,
                      report.efficiency_score, len(report.issues), waited)


def run_queue(optimizer: SessionOptimizer, queue: Queue, work: Work) -> list[TaskResult]:
    """Do all tasks, those that are added meanwhile too, in order of priority."""
    return [run_task(optimizer, task, work, waited) for task, waited in iter(queue.pop, None)]


def statistics(results: list[TaskResult]) -> dict[int, dict[str, float]]:
    """By priority, most urgent first: tasks, successes, tokens, mean efficiency, longest wait (seconds)."""
    groups = defaultdict(list)
    for result in results:
        groups[result.task.priority].append(result)
    return {priority: {"tasks": len(group), "succeeded": sum(result.success for result in group),
                       "tokens": sum(result.tokens for result in group),
                       "average_efficiency": sum(result.efficiency for result in group) / len(group),
                       "longest_wait": max(result.waited_seconds for result in group)}
            for priority, group in sorted(groups.items(), reverse=True)}


def demo(optimizer: SessionOptimizer) -> None:
    """Four tasks, one of which fails."""
    queue = TaskQueue()
    queue.push(Task("t1", "Write the API page", "ATLAS", 50, "sonnet"))
    queue.push(Task("t2", "Fix the login", "BOLT", 90, "grok"))
    queue.push(Task("t3", "Review the patch", "FORGE", 70, "opus"))
    queue.push(Task("t4", "Update the index", "ATLAS", 50))

    def work(optimizer: SessionOptimizer, session_id: str, task: Task) -> None:
        for _ in range(2 if task.id == "t1" else 1):
            optimizer.log_event(session_id, EventType.FILE_READ, {"file_path": "src/a.py"}, tokens_input=600)
        optimizer.log_event(session_id, EventType.AI_RESPONSE, tokens_output=900)
        if task.id == "t4":
            raise RuntimeError("the index is locked")

    results = run_queue(optimizer, queue, work)
    for result in results:
        print(f"{result.task.priority:>3} {result.task.title:<20}{result.tokens:>6,} tokens "
              f"{result.efficiency:>6.1f}% {'done' if result.success else 'failed'}")
    for priority, row in statistics(results).items():
        print(f"priority {priority}: {row['succeeded']} of {row['tasks']} done, {row['tokens']:,} tokens, "
              f"{row['average_efficiency']:.1f}% efficient")


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and return 0."""
    parser = argparse.ArgumentParser(description="Run tasks by priority with a session for each.")
    parser.add_argument("--store", metavar="DIR", help="keep the sessions there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        demo(SessionOptimizer(options.store or scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
