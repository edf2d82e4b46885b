#!/usr/bin/env python3
"""All of it in one session: ten phases, most of them with the program beside this one that shows it.

    python3 examples/complete_workflow.py [--store DIR]

Context is read compressed, knowledge asked for, an operation retried, usage synced, the session analyzed, an
alert or a summary sent, the health reported. Copy the programs it imports along.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import closing

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from agent_health import JsonLines, health_summary, report_session  # noqa: E402
from context_compressor import read_compressed  # noqa: E402
from error_recovery import retry_with_tracking  # noqa: E402
from knowledge_base import SqliteKnowledge, query_knowledge, save_knowledge  # noqa: E402
from message_bus_alerts import send_efficiency_alert, send_session_summary, to_stdout  # noqa: E402
from sessionoptimizer import EventType, Session, SessionOptimizer  # noqa: E402
from token_tracker import MemoryTracker, sync_usage  # noqa: E402

AGENT = "FORGE"
ALERT_BELOW = 80.0  # percent


def phase(number: int, title: str) -> None:
    """A heading."""
    print(f"\n{number}. {title}")


def load_context(optimizer: SessionOptimizer, session: Session) -> None:
    """Read this program as an outline."""
    read = read_compressed(optimizer, session.id, os.path.abspath(__file__))
    print(f"{read.original_tokens:,} -> {read.compressed_tokens:,} tokens")


def ask_knowledge(optimizer: SessionOptimizer, session: Session, base: SqliteKnowledge) -> None:
    """Look up what is known."""
    base.save("Retries", "Back off exponentially; a bug is not cured by waiting.")
    found = query_knowledge(optimizer, session.id, base, "how to back off")
    print(f"found: {', '.join(topic for _, topic, _ in found)}")


def plan_and_build(optimizer: SessionOptimizer, session: Session, tracker: MemoryTracker) -> None:
    """Think, specify, write a file, and read one twice (which the report will find)."""
    optimizer.log_event(session.id, EventType.THINKING, tokens_output=300)
    optimizer.log_event(session.id, EventType.AI_RESPONSE, {"type": "specification"}, tokens_output=2_000)
    phase(5, "Execute")
    for _ in range(2):
        optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "src/fetch.py"}, tokens_input=900)
    optimizer.log_event(session.id, EventType.FILE_WRITE, {"file_path": "src/fetch.py"}, tokens_output=1_500)
    tracker.log_usage(session.id, session.model, 4_500, 3_900)
    print("two reads, one write")


def recover(optimizer: SessionOptimizer, session: Session) -> None:
    """Run something that works at the second attempt."""
    answers = iter([TimeoutError("no answer"), "3 passed"])

    @retry_with_tracking(optimizer, session.id, delay=0.01)
    def run_tests() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    print(f"tests: {run_tests()}")


def workflow(optimizer: SessionOptimizer, base: SqliteKnowledge) -> Session:
    """The ten phases."""
    tracker = MemoryTracker()
    phase(1, "Start the session")
    session = optimizer.start_session(AGENT, "Make the fetcher robust", "opus", metadata={"project": "web"})
    print(session.id)
    phase(2, "Load context, compressed")
    load_context(optimizer, session)
    phase(3, "Ask the knowledge base")
    ask_knowledge(optimizer, session, base)
    phase(4, "Plan")
    print("a specification")
    plan_and_build(optimizer, session, tracker)
    phase(6, "Recover from an error")
    recover(optimizer, session)
    phase(7, "Save what was learned, sync with the token tracker")
    save_knowledge(optimizer, session.id, base, "Fetcher", "It answers at the second attempt.")
    synced = sync_usage(optimizer, tracker, session.id)
    print(f"added {synced.added_input:,} tokens in, {synced.added_output:,} out")
    phase(8, "End and analyze")
    optimizer.end_session(session.id)
    report = optimizer.analyze(session.id)
    print(f"efficiency {report.efficiency_score:.1f}%, {report.total_waste_tokens:,} of "
          f"{report.total_tokens:,} tokens wasted, ${report.estimated_cost:.4f}")
    phase(9, "Notify")
    if not send_efficiency_alert(optimizer, session.id, to_stdout, ALERT_BELOW):
        send_session_summary(optimizer, session.id, to_stdout)
    phase(10, "Report health")
    report_session(optimizer, JsonLines(), session.id)
    summary = health_summary(optimizer, AGENT)
    print(f"{summary['agent']}: {summary['status']}")
    return session


def main(argv: list[str] | None = None) -> int:
    """Run the workflow and return 0."""
    parser = argparse.ArgumentParser(description="The complete workflow in ten phases.")
    parser.add_argument("--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        with closing(SqliteKnowledge(os.path.join(scratch, "knowledge.db"))) as base:
            workflow(SessionOptimizer(options.store or scratch), base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
