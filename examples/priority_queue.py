#!/usr/bin/env python3
"""A queue of commands on disk: the most urgent first, a session for each, costs by priority.

    python3 examples/priority_queue.py add QUEUE ID [--priority 50] [--after ID] \\
        [--requires NAME] [--attempts 3] -- COMMAND...
    python3 examples/priority_queue.py work QUEUE [--as NAME] [--can NAME] [--stay] [--store DIR]
    python3 examples/priority_queue.py list QUEUE

QUEUE is a file (SQLite) or a redis:// URL, the queue of examples/crew: as many workers as you like
share it, one that is killed loses its task to the next, tasks of equal priority keep their order. A
command runs in the directory it was added from, with its session in SESSIONOPTIMIZER_SESSION for
``sessionoptimizer log``; what fails is tried again while attempts are left.
"""
from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import defaultdict
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
if HERE not in sys.path:
    sys.path.append(HERE)
from crew import Bus, Claim, CrewError, Task, open_bus  # noqa: E402
from crew.agents import Runner  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    EventType, SessionOptimizer, SessionOptimizerError, SessionStatus, mask_secrets, plain, slug)

DONE, FAILED, NOT_ALL = 0, 1, 3
LONGEST = 86_400.0  # seconds for one command
IDLE_SECONDS = 1.0


def run_task(optimizer: SessionOptimizer, claim: Claim, output: str) -> dict[str, Any]:
    """Run a task's command in a session: what it did, what it cost, how many seconds it waited."""
    task, began = claim.task, time.monotonic()
    session = optimizer.start_session(
        claim.agent, task.title, session_id=slug(f"{task.id}-{claim.attempt}-{int(time.time())}"),
        metadata={"task_id": task.id, "priority": task.priority, "attempt": claim.attempt})
    runner, over = Runner(os.path.dirname(output)), threading.Event()

    def stay_alive() -> None:
        while not over.wait(claim.bus.lease_seconds / 4):
            if not claim.renew():
                runner.lost.set()

    thread = threading.Thread(target=stay_alive, daemon=True)
    thread.start()
    try:
        ended = runner.run(task.data["command"], task.data["cwd"], LONGEST, output, environment={
            "SESSIONOPTIMIZER_HOME": os.path.abspath(str(optimizer.storage_path)),
            "SESSIONOPTIMIZER_SESSION": session.id})
    finally:
        over.set()
        thread.join()
    if ended.status != 0:
        optimizer.log_event(session.id, EventType.ERROR,
                            {"command": mask_secrets(" ".join(task.data["command"]))[:200],
                             "message": mask_secrets(ended.tail)[-300:]})
    optimizer.end_session(session.id,
                          SessionStatus.FAILED if ended.status else SessionStatus.COMPLETED)
    report = optimizer.analyze(session.id)
    return {"task": task.id, "priority": task.priority, "session": session.id,
            "success": ended.status == 0, "error": ended.tail, "tokens": report.total_tokens,
            "cost": report.estimated_cost, "efficiency": report.efficiency_score,
            "seconds": time.monotonic() - began}


def work_off(optimizer: SessionOptimizer, bus: Bus, name: str, able: list[str], *,
             stay: bool = False) -> list[dict[str, Any]]:
    """Do tasks until none is left for us (``stay``: for ever); what `run_task` said of each."""
    results = []
    folder = os.path.join(str(optimizer.storage_path), "commands")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    while True:
        claim = bus.claim(name, able)
        if claim is not None:
            output = os.path.join(folder, f"{slug(claim.task.id)}-{claim.attempt}.log")
            results.append(run_task(optimizer, claim, output))
            settled = (bus.complete(claim, results[-1]) if results[-1]["success"]
                       else bus.fail(claim, results[-1]["error"][-300:]))
            print(
                f"{claim.task.priority:>4} {plain(claim.task.id, 20):<20} "
                f"{results[-1]['tokens']:>9,} tokens "
                f"{results[-1]['seconds']:>8.1f} s {'done' if results[-1]['success'] else 'failed'}"
                + ("" if settled else ", too late: another worker has it"), flush=True)
        elif stay or any(state.status in ("READY", "WAITING", "CLAIMED")
                         and set(state.task.requires) <= set(able) for state in bus.tasks()):
            time.sleep(IDLE_SECONDS)
        else:
            return results


def efficiency_of(results: list[dict[str, Any]]) -> float:
    """In percent of all their tokens."""
    tokens = sum(row["tokens"] for row in results)
    good = sum(row["tokens"] * row["efficiency"] for row in results)
    return good / tokens if tokens else 100.0


def statistics(results: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """By priority: runs, successes, tokens, USD, efficiency over all tokens (percent), longest run
    (seconds)."""
    groups = defaultdict(list)
    for result in results:
        groups[result["priority"]].append(result)
    return {priority: {"runs": len(group), "succeeded": sum(row["success"] for row in group),
                       "tokens": sum(row["tokens"] for row in group),
                       "cost": sum(row["cost"] for row in group),
                       "efficiency": efficiency_of(group),
                       "longest": max(row["seconds"] for row in group)}
            for priority, group in sorted(groups.items(), reverse=True)}


def add(options: argparse.Namespace, bus: Bus) -> int:
    """Put a command into the queue."""
    bus.submit(Task(options.id, " ".join(options.command)[:100], priority=options.priority,
                    after=tuple(options.after),
                    requires=tuple(options.requires), max_attempts=options.attempts,
                    data={"command": options.command, "cwd": os.getcwd()}))
    return DONE


def work(options: argparse.Namespace, bus: Bus) -> int:
    """Do what is in the queue; NOT_ALL when a task is FAILED in the end."""
    results = work_off(
        SessionOptimizer(options.store), bus, options.name, options.can, stay=options.stay)
    for priority, row in statistics(results).items():
        print(f"priority {priority}: {row['succeeded']} of {row['runs']} runs succeeded, "
              f"{row['tokens']:,} tokens, "
              f"${row['cost']:.4f}, {row['efficiency']:.1f}% efficient")
    return NOT_ALL if any(state.status == "FAILED" for state in bus.tasks()) else DONE


def show(options: argparse.Namespace, bus: Bus) -> int:
    """Print how every task stands."""
    for state in bus.tasks():
        print(f"{state.status:<8}{state.task.priority:>4} {plain(state.task.id, 20):<20} "
              f"{plain(state.task.title, 60)}"
              + (f"  ({plain(state.error, 80)})" if state.status == "FAILED" else ""))
    return DONE


def main(argv: list[str] | None = None) -> int:
    """Run a command of the queue."""
    parser = argparse.ArgumentParser(description="A queue of commands, the most urgent first.")
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for function, name in ((add, "add"), (work, "work"), (show, "list")):
        one = commands.add_parser(name, help=function.__doc__.split("\n")[0])
        one.set_defaults(function=function)
        one.add_argument("queue", metavar="QUEUE", help="a file, or a redis:// URL")
    adding, working = commands.choices["add"], commands.choices["work"]
    adding.add_argument("id", metavar="ID")
    adding.add_argument(
        "--priority", type=int, default=50, metavar="N", help="larger is more urgent (50)")
    adding.add_argument(
        "--after", action="append", default=[], metavar="ID", help="only when this task is done")
    adding.add_argument("--requires", action="append", default=[], metavar="NAME",
                        help="what a worker has to be able to do")
    adding.add_argument(
        "--attempts", type=int, default=3, metavar="N", help="try at most N times (3)")
    adding.add_argument("command", nargs="+", metavar="COMMAND")
    working.add_argument("--as", dest="name", default=f"worker-{os.getpid()}", metavar="NAME",
                         help="the worker's name")
    working.add_argument(
        "--can", action="append", default=[], metavar="NAME", help="what this worker can do")
    working.add_argument(
        "--stay", action="store_true", help="wait for more when the queue is empty")
    working.add_argument(
        "--store", metavar="DIR", help="where the sessions go (default: as for sessionoptimizer)")
    options = parser.parse_args(argv)
    try:
        with open_bus(options.queue, name="priority-queue") as bus:
            return options.function(options, bus)
    except (CrewError, OSError, SessionOptimizerError) as error:
        print(f"priority_queue: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
