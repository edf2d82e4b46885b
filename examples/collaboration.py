#!/usr/bin/env python3
"""Several agents on one task: a session each, handoffs between them, and one combined efficiency.

    python3 examples/collaboration.py [--store DIR]

The sessions share a ``collab_id`` in their metadata, so agents in different processes can take part as long
as they use one store; ``sessions_of`` finds them all. A handoff costs its receiver the tokens of the text.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
import uuid
from collections import defaultdict
from typing import Any, Protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, Session, SessionOptimizer, SessionStatus  # noqa: E402


class Channel(Protocol):
    """How a handoff arrives. To use your own, import it: ``from collabsession import CollabSession``."""

    def deliver(self, sender: str, receiver: str, text: str) -> None:
        """Bring the text to the receiver."""


class Mailboxes:
    """A channel in memory: one list of (sender, text) per receiver."""

    def __init__(self) -> None:
        self.mail: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def deliver(self, sender: str, receiver: str, text: str) -> None:
        """Put the text into the receiver's box."""
        self.mail[receiver].append((sender, text))


class Collaboration:
    """Agents that work on one task. ``collab_id``: give the same one in every process that takes part."""

    def __init__(self, optimizer: SessionOptimizer, task: str, *, collab_id: str = "",
                 channel: Channel | None = None):
        self.optimizer, self.task = optimizer, task
        self.collab_id = collab_id or f"collab-{uuid.uuid4().hex[:12]}"
        self.channel = channel or Mailboxes()
        self.sessions: dict[str, Session] = {}

    def join(self, agent: str, role: str, model: str = "default") -> Session:
        """Start the session of an agent in a role."""
        session = self.optimizer.start_session(agent, f"{self.task} ({role})", model=model,
                                               metadata={"collab_id": self.collab_id, "role": role})
        self.sessions[agent] = session
        return session

    def log(self, agent: str, event_type: EventType | str, data: dict[str, Any] | None = None,
            **counts: int) -> None:
        """Log an event of an agent; KeyError when it has not joined."""
        self.optimizer.log_event(self.sessions[agent].id, event_type, data, **counts)

    def handoff(self, sender: str, receiver: str, text: str) -> None:
        """Pass work on: logged on both sides, delivered, and charged to the receiver, who has to read it."""
        tokens = (len(text) + 3) // 4  # estimated: about four characters per token
        self.log(sender, EventType.CUSTOM,
                 {"type": "handoff_out", "to_agent": receiver, "characters": len(text)})
        self.log(receiver, EventType.CONTEXT_LOAD,
                 {"source": "handoff", "type": "handoff_in", "from_agent": sender, "characters": len(text)},
                 tokens_input=tokens)
        self.channel.deliver(sender, receiver, text)

    def finish(self, status: SessionStatus = SessionStatus.COMPLETED) -> dict[str, Any]:
        """End the sessions of this process and return the combined report of all that share the id."""
        for session in self.sessions.values():
            self.optimizer.end_session(session.id, status)
        return combined_report(self.optimizer, self.collab_id)


def sessions_of(optimizer: SessionOptimizer, collab_id: str) -> list[Session]:
    """All sessions of a collaboration in the store, oldest first."""
    found = optimizer.list_sessions(limit=sys.maxsize)
    return [session for session in reversed(found) if session.metadata.get("collab_id") == collab_id]


def combined_report(optimizer: SessionOptimizer, collab_id: str) -> dict[str, Any]:
    """Tokens, waste, USD and efficiency of the collaboration and of each agent, and the files that more than
    one agent read: no waste by itself, since contexts are apart, but what a better handoff could save."""
    agents, readers = {}, defaultdict(set)
    for session in sessions_of(optimizer, collab_id):
        report = optimizer.analyze(session.id)
        agents[session.id] = {"agent": session.agent, "role": session.metadata["role"],
                              "tokens": report.total_tokens, "waste_tokens": report.total_waste_tokens,
                              "cost": report.estimated_cost, "efficiency": report.efficiency_score}
        for event in session.events:
            if event.event_type is EventType.FILE_READ and event.data.get("file_path"):
                readers[event.data["file_path"]].add(session.id)
    rows = list(agents.values())
    tokens, waste = sum(row["tokens"] for row in rows), sum(row["waste_tokens"] for row in rows)
    return {"collab_id": collab_id, "agents": agents, "total_tokens": tokens, "waste_tokens": waste,
            "cost": sum(row["cost"] for row in rows),
            "combined_efficiency": 100 * (1 - waste / tokens) if tokens else 100.0,
            "shared_files": sorted(path for path, ids in readers.items() if len(ids) > 1)}


def demo(optimizer: SessionOptimizer) -> None:
    """A planner, a builder and a tester on one feature."""
    collab = Collaboration(optimizer, "Build the login")
    collab.join("FORGE", "planner", "opus")
    collab.join("ATLAS", "builder", "sonnet")
    collab.join("BOLT", "tester", "grok")
    collab.log("FORGE", EventType.FILE_READ, {"file_path": "src/auth.py"}, tokens_input=1_200)
    collab.log("FORGE", EventType.AI_RESPONSE, tokens_output=1_500)
    collab.handoff("FORGE", "ATLAS", "Specification: sign in by e-mail, lock after five failures. " * 10)
    for _ in range(2):
        collab.log("ATLAS", EventType.FILE_READ, {"file_path": "src/auth.py"}, tokens_input=1_200)
    collab.log("ATLAS", EventType.FILE_WRITE, {"file_path": "src/login.py"}, tokens_output=2_000)
    collab.handoff("ATLAS", "BOLT", "Built src/login.py; run tests/test_login.py.")
    collab.log("BOLT", EventType.TOOL_CALL, {"tool": "bash", "command": "pytest tests"}, tokens_input=300)
    result = collab.finish()
    for row in result["agents"].values():
        print(f"{row['agent']:<8}{row['role']:<9}{row['tokens']:>7,} tokens {row['efficiency']:>6.1f}%")
    print(f"{'together':<17}{result['total_tokens']:>7,} tokens {result['combined_efficiency']:>6.1f}%")
    print(f"read by more than one agent: {', '.join(result['shared_files'])}")


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and return 0."""
    parser = argparse.ArgumentParser(description="Track several agents on one task.")
    parser.add_argument("--store", metavar="DIR", help="keep the sessions there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        demo(SessionOptimizer(options.store or scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
