#!/usr/bin/env python3
"""Several agents on one task: a session each, handoffs over a real bus, and one combined report.

    python3 examples/collaboration.py [--store DIR]                    # those in the store
    python3 examples/collaboration.py COLLAB_ID [--store DIR] [--format text|json]

The sessions share a ``collab_id`` in their metadata; a crew (examples/crew) writes it too, so its
name is such an id. Agents of your own join with `Collaboration`: in any process that has the
store and the queue. A handoff is a message on the bus of examples/crew: it arrives once, whoever is
killed, and costs its receiver the tokens of the text.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from collections import defaultdict
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
if HERE not in sys.path:
    sys.path.append(HERE)
from crew import Bus  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    EventType, Session, SessionOptimizer, SessionOptimizerError, SessionStatus, plain)


class Collaboration:
    """Agents that work on one task. ``bus``: what ``crew.open_bus`` gives; ``collab_id``: give the
    same one in every process that takes part."""

    def __init__(self, optimizer: SessionOptimizer, task: str, bus: Bus, *, collab_id: str = ""):
        self.optimizer, self.task, self.bus = optimizer, task, bus
        self.collab_id = collab_id or f"collab-{uuid.uuid4().hex[:12]}"
        self.sessions: dict[str, Session] = {}

    def join(self, agent: str, role: str, model: str = "default") -> Session:
        """Start the session of an agent in a role."""
        session = self.optimizer.start_session(agent, f"{self.task} ({role})", model=model,
                                               metadata={"collab_id": self.collab_id, "role": role})
        self.sessions[agent] = session
        return session

    def log(self, agent: str, event_type: EventType | str, data: dict[str, Any] | None = None,
            **counts: int) -> None:
        """Log an event of an agent; KeyError when it has not joined here."""
        self.optimizer.log_event(self.sessions[agent].id, event_type, data, **counts)

    def handoff(self, sender: str, receiver: str, text: str, *, priority: int = 50) -> str:
        """Pass work on to an agent, in this process or another; the message's id."""
        self.log(sender, EventType.CUSTOM,
                 {"type": "handoff_out", "to_agent": receiver, "characters": len(text)})
        return self.bus.send(
            sender, receiver, {"handoff": self.collab_id, "text": text}, priority=priority)

    def take_over(self, receiver: str, *, wait: float = 0.0) -> list[tuple[str, str]]:
        """The handoffs for an agent as (sender, text), each logged and charged to it, who has to
        read it. One that was taken and not logged, because its receiver died, comes again."""
        taken = []
        for message in self.bus.receive(receiver, wait=wait):
            if isinstance(message.body, dict) and message.body.get("handoff") == self.collab_id:
                text = str(message.body["text"])
                tokens = (len(text) + 3) // 4  # estimated: about four characters per token
                self.log(receiver, EventType.CONTEXT_LOAD,
                         {"source": "handoff", "type": "handoff_in", "from_agent": message.sender,
                          "characters": len(text)}, tokens_input=tokens)
                taken.append((message.sender, text))
                message.acknowledge()
        return taken

    def finish(self, status: SessionStatus = SessionStatus.COMPLETED) -> dict[str, Any]:
        """End the sessions of this process and return the combined report of all that share the
        id."""
        for session in self.sessions.values():
            self.optimizer.end_session(session.id, status)
        return combined_report(self.optimizer, self.collab_id)


def sessions_of(optimizer: SessionOptimizer, collab_id: str = "") -> dict[str, list[Session]]:
    """The sessions of one collaboration, or of each, by its id; oldest first."""
    found: dict[str, list[Session]] = defaultdict(list)
    for session in reversed(optimizer.list_sessions(limit=sys.maxsize)):
        name = str(session.metadata.get("collab_id") or "")
        if name and collab_id in ("", name):
            found[name].append(session)
    return found


def path_read(session: Session, path: str) -> str:
    """A file's path as others know it: relative to the worktree where the session has one."""
    worktree = str(session.metadata.get("worktree") or "")
    return (os.path.relpath(path, worktree)
            if worktree and path.startswith(worktree + os.sep) else path)


def combined_report(optimizer: SessionOptimizer, collab_id: str) -> dict[str, Any]:
    """Tokens, waste, USD and efficiency of the collaboration and of each session, and the files
    that more than one agent read: no waste by itself, since contexts are apart, but what a better
    handoff could save."""
    agents, readers = {}, defaultdict(set)
    for session in sessions_of(optimizer, collab_id)[collab_id]:
        report = optimizer.analyze(session.id)
        agent = session.metadata.get("crew_agent") or session.agent
        agents[session.id] = {"agent": agent, "role": session.metadata.get("role")
                              or session.metadata.get("task_id", ""), "tokens": report.total_tokens,
                              "waste_tokens": report.total_waste_tokens,
                              "cost": report.estimated_cost, "efficiency": report.efficiency_score}
        for event in session.events:
            if event.event_type is EventType.FILE_READ and event.data.get("file_path"):
                readers[path_read(session, event.data["file_path"])].add(agent)
    rows = list(agents.values())
    tokens, waste = sum(row["tokens"] for row in rows), sum(row["waste_tokens"] for row in rows)
    return {"collab_id": collab_id, "agents": agents, "total_tokens": tokens, "waste_tokens": waste,
            "cost": sum(row["cost"] for row in rows),
            "combined_efficiency": 100 * (1 - waste / tokens) if tokens else 100.0,
            "shared_files": sorted(path for path, names in readers.items() if len(names) > 1)}


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    for row in report["agents"].values():
        print(f"{plain(row['agent'], 16):<17}{plain(row['role'], 16):<17}{row['tokens']:>10,} "
              f"tokens ${row['cost']:>8.4f} "
              f"{row['efficiency']:>6.1f}%")
    print(f"{'together':<34}{report['total_tokens']:>10,} tokens ${report['cost']:>8.4f} "
          f"{report['combined_efficiency']:>6.1f}%")
    for path in report["shared_files"]:
        print(f"read by more than one agent: {plain(path)}")


def main(argv: list[str] | None = None) -> int:
    """Report on a collaboration; 1 when there is none of that id."""
    parser = argparse.ArgumentParser(description="What several agents on one task cost together.")
    parser.add_argument(
        "collab_id", nargs="?", metavar="COLLAB_ID", help="a collaboration (default: list them)")
    parser.add_argument(
        "--store", metavar="DIR", help="the store (default: as for sessionoptimizer)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    try:
        optimizer = SessionOptimizer(options.store)
        found = sessions_of(optimizer, options.collab_id or "")
        if options.collab_id and options.collab_id not in found:
            print(f"collaboration: no session has the collab_id {options.collab_id!r}",
                  file=sys.stderr)
            return 1
        reports = [combined_report(optimizer, name) for name in found]
    except SessionOptimizerError as error:
        print(f"collaboration: {error}", file=sys.stderr)
        return 1
    if options.format == "json":
        print(json.dumps(reports[0] if options.collab_id else reports, indent=2))
    elif options.collab_id:
        print_report(reports[0])
    else:
        for report in reports:
            print(f"{plain(report['collab_id'], 30):<31}{len(report['agents']):>4} sessions "
                  f"{report['total_tokens']:>12,} tokens "
                  f"${report['cost']:>9.4f} {report['combined_efficiency']:>6.1f}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
