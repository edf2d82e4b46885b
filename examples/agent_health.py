#!/usr/bin/env python3
"""How every agent is doing: HEALTHY, WARNING or CRITICAL, by its sessions and a crew's queue.

    python3 examples/agent_health.py [--agent NAME] [--days 7] [--store DIR] [--queue WHERE] \\
        [--format text|json]

HEALTHY from an efficiency (over all tokens, as ``stats`` prints it) of 85%, WARNING from 70%,
CRITICAL below; UNKNOWN without sessions. With ``--queue`` (a crew's queue.db, or
redis://HOST#crew:NAME) a worker is CRITICAL when a task ended after it gave no sign of life, and
WARNING when one of its attempts failed. Status 3 when somebody is CRITICAL,
for a health check from cron.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
if HERE not in sys.path:
    sys.path.append(HERE)
from crew import Bus, CrewError, open_bus  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    EventType, SessionOptimizer, SessionOptimizerError, counted, now_text, plain)

HEALTHY_FROM, WARNING_FROM = 85.0, 70.0  # efficiency, percent
DONE, FAILED, UNWELL = 0, 1, 3


def session_metrics(optimizer: SessionOptimizer, session_id: str) -> dict[str, Any] | None:
    """What a monitor wants to know of a session (rates in percent, seconds, USD); None when there
    is none."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None:
        return None
    errors = sum(event.event_type is EventType.ERROR for event in session.events)
    return {"session_id": session_id, "agent": session.agent, "status": session.status.value,
            "efficiency_score": report.efficiency_score, "total_tokens": report.total_tokens,
            "waste_tokens": report.total_waste_tokens, "issue_count": len(report.issues),
            "error_rate": 100 * errors / len(session.events) if session.events else 0.0,
            "duration_seconds": session.duration_seconds, "estimated_cost": report.estimated_cost,
            "timestamp": now_text()}


def health_status(efficiency: float) -> str:
    """The status of an efficiency in percent."""
    if efficiency >= HEALTHY_FROM:
        return "HEALTHY"
    return "WARNING" if efficiency >= WARNING_FROM else "CRITICAL"


def health_summary(optimizer: SessionOptimizer, agent: str, days: int = 7) -> dict[str, Any]:
    """An agent's last days: status, sessions, efficiency, wasted tokens, USD, trend, common
    issues."""
    stats = optimizer.agent_statistics(agent, days)
    count = stats.get("sessions_analyzed", 0)
    return {"agent": agent, "period_days": days, "sessions": count,
            "status": health_status(stats["efficiency_score"]) if count else "UNKNOWN",
            "efficiency_score": stats.get("efficiency_score"),
            "waste_tokens": stats.get("total_waste_tokens", 0),
            "cost": stats.get("total_cost", 0.0),
            "trend": stats["trends"]["trend"] if count else "insufficient_data",
            "common_issues": stats.get("common_issues", [])}


def worker_health(bus: Bus) -> list[dict[str, Any]]:
    """By worker of a crew, as its last tasks tell: what it holds, did, failed at, and where it was
    not heard of again."""
    workers: dict[str, dict[str, Any]] = {}
    for state in bus.tasks():
        if not state.agent:
            continue
        row = workers.setdefault(
            state.agent, {"agent": state.agent, "holds": [], "done": 0, "failed": 0, "lost": 0})
        lost = state.status == "FAILED" and state.error.startswith("no sign of life")
        row["holds"] += [state.task.id] if state.status == "CLAIMED" else []
        row["done"] += state.status == "DONE"
        row["lost"] += lost
        row["failed"] += bool(state.error) and not lost
    for row in workers.values():
        row["status"] = "CRITICAL" if row["lost"] else "WARNING" if row["failed"] else "HEALTHY"
    return [workers[name] for name in sorted(workers)]


def agents_of(optimizer: SessionOptimizer) -> list[str]:
    """The agents that have sessions in the store."""
    return sorted({session.agent for session in optimizer.list_sessions(limit=sys.maxsize)})


def open_queue(where: str) -> Bus:
    """The queue of a crew; CrewError when it cannot be had."""
    if "://" not in where and not os.path.exists(where):
        raise CrewError(f"no queue at {where}")
    return open_bus(where, name="crew:crew")


def print_health(agents: list[dict[str, Any]], workers: list[dict[str, Any]]) -> None:
    """The tables for people."""
    for row in agents:
        score, count = row["efficiency_score"], counted(row["sessions"], "session")
        print(f"{plain(row['agent'], 30)}: {row['status']}, {count} in "
              f"{counted(row['period_days'], 'day')}"
              + (f", efficiency {score:.1f}%, trend {row['trend']}" if count[:2] != "0 " else ""))
        for issue in row["common_issues"]:
            print(f"  {issue['type']}: {issue['count']}")
    for row in workers:
        print(f"{plain(row['agent'], 30)}: {row['status']}, {row['done']} tasks done, "
              f"{row['failed']} failed, {row['lost']} lost"
              + (f", works on {plain(', '.join(row['holds']))}" if row["holds"] else ""))


def main(argv: list[str] | None = None) -> int:
    """Print the agents' health."""
    parser = argparse.ArgumentParser(description="How every agent is doing.")
    parser.add_argument("--agent", metavar="NAME", help="this agent only")
    parser.add_argument(
        "--days", type=int, default=7, metavar="N", help="of the last N days (default 7)")
    parser.add_argument(
        "--store", metavar="DIR", help="the store (default: as for sessionoptimizer)")
    parser.add_argument("--queue", metavar="WHERE", help="the workers of this queue too")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    workers: list[dict[str, Any]] = []
    try:
        optimizer = SessionOptimizer(options.store)
        names = [options.agent] if options.agent else agents_of(optimizer)
        agents = [health_summary(optimizer, name, options.days) for name in names]
        if options.queue:
            with open_queue(options.queue) as bus:
                workers = worker_health(bus)
    except (CrewError, SessionOptimizerError) as error:
        print(f"agent_health: {error}", file=sys.stderr)
        return FAILED
    if options.format == "json":
        print(json.dumps({"agents": agents, "workers": workers}, indent=2))
    else:
        print_health(agents, workers)
    return UNWELL if any(row["status"] == "CRITICAL" for row in agents + workers) else DONE


if __name__ == "__main__":
    sys.exit(main())
