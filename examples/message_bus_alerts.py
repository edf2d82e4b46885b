#!/usr/bin/env python3
"""Tell when a session was inefficient: a terminal, file, webhook, or a crew's agents on its bus.

    python3 examples/message_bus_alerts.py [--session ID | --since 2026-01-31] [--to TARGET] \\
        [--threshold 70] [--summary]

TARGET is ``-`` (stdout, the default), a file that gets one JSON object per line, an http(s) URL
that gets the same object by POST (its ``text`` is what chat webhooks show), or the queue of a crew:
``bus:FILE``, or a Redis URL with the crew's name in it (``redis://HOST#crew:NAME``). There the
alert is a note to the worker whose session it was, else to all: it goes with the next prompt.
Priorities: HIGH below 50%, MEDIUM below the threshold, LOW for a summary.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import urllib.request
from typing import Any, Callable, Dict

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
if HERE not in sys.path:
    sys.path.append(HERE)
from crew import ALL, CrewError, open_bus  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    Session, SessionOptimizer, SessionOptimizerError, counted, now_text, parse_time, plain)

Message = Dict[str, Any]
Bus = Callable[[Message], None]  # takes a message; raises OSError when it cannot be sent
HIGH_BELOW = 50.0      # percent
WEBHOOK_TIMEOUT = 5.0  # seconds
PRIORITIES = {"HIGH": 90, "MEDIUM": 50, "LOW": 10}  # of a message, on a crew's bus


def to_stdout(message: Message) -> None:
    """Print a message."""
    print(f"[{message['priority']}] {message['subject']}\n{message['text']}\n", flush=True)


def to_file(path: str, message: Message) -> None:
    """Append a message as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(message) + "\n")


def to_webhook(url: str, message: Message) -> None:
    """POST a message as JSON; OSError when it does not arrive (refused, timed out, a status from
    400 on)."""
    request = urllib.request.Request(url, json.dumps(message).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT):
        pass


def to_crew(where: str, message: Message) -> None:
    """Send a message as a note on a crew's bus, once however often it is tried; OSError when the
    bus cannot be had."""
    try:
        with open_bus(where, name="crew:crew") as bus:
            bus.send("alerts", message.get("agent") or ALL,
                     f"{message['subject']}\n{message['text']}",
                     priority=PRIORITIES.get(message["priority"], 50),
                     message_id=f"{message['session_id']}:{message['subject']}"
                     if message["session_id"] else "")
    except CrewError as error:
        raise OSError(str(error)) from error


def bus_to(target: str) -> Bus:
    """The bus a target names; ValueError for a URL it has no way to send to."""
    if target == "-":
        return to_stdout
    if target.startswith(("http://", "https://")):
        return functools.partial(to_webhook, target)
    if target.startswith("bus:"):
        return functools.partial(to_crew, target[4:])
    if target.startswith(("redis://", "rediss://", "unix://")):
        return functools.partial(to_crew, target)
    if "://" in target:
        raise ValueError(
            f"cannot send to {target}: give an http(s) URL, bus:FILE, a redis:// URL, a file, or -")
    return functools.partial(to_file, target)


def make_message(subject: str, lines: list[str], priority: str, session_id: str = "",
                 agent: str = "") -> Message:
    """A message of one shape for every bus; ``agent``: the worker of a crew it is for."""
    return {"subject": subject, "text": "\n".join(lines), "priority": priority,
            "session_id": session_id, "agent": agent, "time": now_text()}


def worker_of(session: Session) -> str:
    """The worker of a crew whose session it is; "" for a session of no crew."""
    return str(session.metadata.get("crew_agent") or "")


def send_efficiency_alert(optimizer: SessionOptimizer, session_id: str, bus: Bus,
                          threshold: float = 70.0) -> bool:
    """Send an alert when the session's score is below the threshold (percent); True when one was
    sent."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None or report.efficiency_score >= threshold:
        return False
    score = report.efficiency_score
    lines = [f"Task: {plain(session.task)}", f"Efficiency: {score:.1f}% (threshold {threshold:g}%)",
             f"Wasted: {report.total_waste_tokens:,} of {report.total_tokens:,} tokens "
             f"(${report.total_waste_cost:.4f})"]
    lines += [f"- [{issue.severity.value}] {plain(issue.description)}"
              for issue in report.issues[:3]]
    lines += [f"* {plain(advice)}" for advice in report.recommendations[:3]]
    bus(make_message(f"Low efficiency: {plain(session.agent)}, {score:.0f}%", lines,
                     "HIGH" if score < HIGH_BELOW else "MEDIUM", session_id, worker_of(session)))
    return True


def send_session_summary(optimizer: SessionOptimizer, session_id: str, bus: Bus) -> bool:
    """Send what a session used and found; False when there is no such session."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None:
        return False
    lines = [f"Task: {plain(session.task)}",
             f"Status: {session.status.value}, model: {plain(session.model)}",
             f"Efficiency: {report.efficiency_score:.1f}%, issues: {len(report.issues)}",
             f"Tokens: {session.total_tokens_input:,} in, {session.total_tokens_output:,} out "
             f"(${report.estimated_cost:.4f})"]
    bus(make_message(f"Session summary: {plain(session.agent)}", lines, "LOW", session_id,
                     worker_of(session)))
    return True


def main(argv: list[str] | None = None) -> int:
    """Send what is to be told of the sessions in the store; 1 when a message could not be sent."""
    parser = argparse.ArgumentParser(description="Send efficiency alerts and session summaries.")
    parser.add_argument("--session", metavar="ID", help="of this session (default: of all)")
    parser.add_argument("--since", default="1970-01-01", metavar="WHEN",
                        help="of sessions started since then (ISO-8601)")
    parser.add_argument(
        "--to", default="-", metavar="TARGET", help="- (default), a file, a URL, or a crew's bus")
    parser.add_argument(
        "--threshold", type=float, default=70.0, metavar="PERCENT", help="alert below (70)")
    parser.add_argument("--summary", action="store_true", help="a summary of every session too")
    parser.add_argument(
        "--store", metavar="DIR", help="the store (default: as for sessionoptimizer)")
    options = parser.parse_args(argv)
    sent = 0
    try:
        optimizer, bus, since = (SessionOptimizer(options.store), bus_to(options.to),
                                 parse_time(options.since))
        if since is None:
            raise ValueError(f"--since {options.since} is no time")
        found = [options.session] if options.session else [
            session.id
            for session in reversed(optimizer.list_sessions(since=since, limit=sys.maxsize))]
        for session_id in found:
            sent += send_efficiency_alert(optimizer, session_id, bus, options.threshold)
            sent += options.summary and send_session_summary(optimizer, session_id, bus)
    except (OSError, ValueError, SessionOptimizerError) as error:
        print(f"message_bus_alerts: not sent: {error}", file=sys.stderr)
        return 1
    print(f"{sent} of {counted(len(found), 'session')} told" if not options.summary
          else f"{sent} messages sent", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
