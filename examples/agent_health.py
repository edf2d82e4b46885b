#!/usr/bin/env python3
"""Report every session to a health monitor, and say how an agent is doing: HEALTHY, WARNING or CRITICAL.

    python3 examples/agent_health.py [--agent NAME] [--days 7] [--store DIR]

HEALTHY from an average efficiency of 85%, WARNING from 70%, CRITICAL below; UNKNOWN without sessions. With
``--store`` and ``--agent`` it reports on the sessions that are there; else it makes some of its own.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any, Protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer, now_text  # noqa: E402

HEALTHY_FROM, WARNING_FROM = 85.0, 70.0  # average efficiency, percent


class HealthMonitor(Protocol):
    """Who wants to know. To use your own, import it instead: ``from agenthealth import AgentHealth``."""

    def report_session(self, agent: str, metrics: dict[str, Any]) -> None:
        """Take the metrics of one session."""


class JsonLines:
    """A monitor that prints one JSON object per session, for a log collector."""

    def report_session(self, agent: str, metrics: dict[str, Any]) -> None:
        """Print the metrics."""
        print(json.dumps(dict(metrics, agent=agent), sort_keys=True))


def session_metrics(optimizer: SessionOptimizer, session_id: str) -> dict[str, Any] | None:
    """What a monitor wants to know of a session (rates in percent, seconds, USD); None when there is none."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None:
        return None
    errors = sum(event.event_type is EventType.ERROR for event in session.events)
    return {"session_id": session_id, "status": session.status.value,
            "efficiency_score": report.efficiency_score, "total_tokens": report.total_tokens,
            "waste_tokens": report.total_waste_tokens, "issue_count": len(report.issues),
            "error_rate": 100 * errors / len(session.events) if session.events else 0.0,
            "duration_seconds": session.duration_seconds, "estimated_cost": report.estimated_cost,
            "timestamp": now_text()}


def report_session(optimizer: SessionOptimizer, monitor: HealthMonitor,
                   session_id: str) -> dict[str, Any] | None:
    """Hand a session's metrics to the monitor and return them; None when there is no such session."""
    metrics, session = session_metrics(optimizer, session_id), optimizer.get_session(session_id)
    if metrics is not None and session is not None:
        monitor.report_session(session.agent, metrics)
    return metrics


def health_status(average_efficiency: float) -> str:
    """The status of an average efficiency in percent."""
    if average_efficiency >= HEALTHY_FROM:
        return "HEALTHY"
    return "WARNING" if average_efficiency >= WARNING_FROM else "CRITICAL"


def health_summary(optimizer: SessionOptimizer, agent: str, days: int = 7) -> dict[str, Any]:
    """An agent's last days: status, sessions, average efficiency, wasted tokens, trend, common issues."""
    stats = optimizer.agent_statistics(agent, days)
    count = stats.get("sessions_analyzed", 0)
    return {"agent": agent, "period_days": days, "sessions": count,
            "status": health_status(stats["average_efficiency"]) if count else "UNKNOWN",
            "average_efficiency": stats.get("average_efficiency"),
            "waste_tokens": stats.get("total_waste_tokens", 0),
            "trend": stats["trends"]["trend"] if count else "insufficient_data",
            "common_issues": stats.get("common_issues", [])}


def demo(optimizer: SessionOptimizer, agent: str) -> None:
    """Three sessions of an agent, each reading one file once more than the session before."""
    for reads in (1, 2, 3):
        session = optimizer.start_session(agent, f"Task {reads}", model="sonnet")
        for _ in range(reads):
            optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "src/a.py"}, tokens_input=500)
        optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=1_000)
        optimizer.end_session(session.id)
        report_session(optimizer, JsonLines(), session.id)


def main(argv: list[str] | None = None) -> int:
    """Print an agent's health and return 0."""
    parser = argparse.ArgumentParser(description="Report sessions to a health monitor and sum an agent up.")
    parser.add_argument("--agent", metavar="NAME", help="report on this agent's sessions in the store")
    parser.add_argument("--days", type=int, default=7, metavar="N", help="of the last N days (default 7)")
    parser.add_argument("--store", metavar="DIR", help="the store (default: a temporary one)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        optimizer = SessionOptimizer(options.store or scratch)
        if not options.agent:
            demo(optimizer, "ATLAS")
        summary = health_summary(optimizer, options.agent or "ATLAS", options.days)
    average = summary["average_efficiency"]
    print(f"{summary['agent']}: {summary['status']}, {summary['sessions']} sessions in {options.days} days"
          + (f", average efficiency {average:.1f}%, trend {summary['trend']}" if average is not None else ""))
    for issue in summary["common_issues"]:
        print(f"  {issue['type']}: {issue['count']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
