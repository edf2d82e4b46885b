#!/usr/bin/env python3
"""Send an alert when a session was inefficient, and a summary when it ends: to stdout, a file or a webhook.

    python3 examples/message_bus_alerts.py [--to TARGET] [--threshold 70] [--store DIR]

TARGET is ``-`` (stdout, the default), a file that gets one JSON object per line, or an http(s) URL that gets
the same object by POST; its ``text`` is what chat webhooks show. Priorities: HIGH below 50%, MEDIUM below the
threshold, LOW for a summary.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import urllib.request
from typing import Any, Callable, Dict

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer, now_text, plain  # noqa: E402

# A bus is any function that takes a message and raises OSError when it cannot be sent. To use your own,
# import it instead (from synapselink import quick_send) and call it with subject, text and priority.
Message = Dict[str, Any]
Bus = Callable[[Message], None]
HIGH_BELOW = 50.0      # percent
WEBHOOK_TIMEOUT = 5.0  # seconds


def to_stdout(message: Message) -> None:
    """Print a message."""
    print(f"[{message['priority']}] {message['subject']}\n{message['text']}\n", flush=True)


def to_file(path: str, message: Message) -> None:
    """Append a message as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(message) + "\n")


def to_webhook(url: str, message: Message) -> None:
    """POST a message as JSON; OSError when it does not arrive (refused, timed out, a status from 400 on)."""
    request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT):
        pass


def bus_to(target: str) -> Bus:
    """The bus a target names: ``-``, a URL or a file; ValueError for a URL that is not http or https."""
    if target == "-":
        return to_stdout
    if target.startswith(("http://", "https://")):
        return functools.partial(to_webhook, target)
    if "://" in target:
        raise ValueError(f"cannot send to {target}: give an http(s) URL, a file, or - for standard output")
    return functools.partial(to_file, target)


def make_message(subject: str, lines: list[str], priority: str, session_id: str = "") -> Message:
    """A message of one shape for every bus."""
    return {"subject": subject, "text": "\n".join(lines), "priority": priority, "session_id": session_id,
            "time": now_text()}


def send_efficiency_alert(optimizer: SessionOptimizer, session_id: str, bus: Bus,
                          threshold: float = 70.0) -> bool:
    """Send an alert when the session's score is below the threshold (percent); True when one was sent."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None or report.efficiency_score >= threshold:
        return False
    score = report.efficiency_score
    lines = [f"Task: {plain(session.task)}", f"Efficiency: {score:.1f}% (threshold {threshold:g}%)",
             f"Wasted: {report.total_waste_tokens:,} of {report.total_tokens:,} tokens "
             f"(${report.total_waste_cost:.4f})"]
    lines += [f"- [{issue.severity.value}] {plain(issue.description)}" for issue in report.issues[:3]]
    lines += [f"* {plain(advice)}" for advice in report.recommendations[:3]]
    bus(make_message(f"Low efficiency: {plain(session.agent)}, {score:.0f}%", lines,
                     "HIGH" if score < HIGH_BELOW else "MEDIUM", session_id))
    return True


def send_session_summary(optimizer: SessionOptimizer, session_id: str, bus: Bus) -> bool:
    """Send what a session used and found; False when there is no such session."""
    report, session = optimizer.analyze(session_id), optimizer.get_session(session_id)
    if report is None or session is None:
        return False
    lines = [f"Task: {plain(session.task)}", f"Status: {session.status.value}, model: {plain(session.model)}",
             f"Efficiency: {report.efficiency_score:.1f}%, issues: {len(report.issues)}",
             f"Tokens: {session.total_tokens_input:,} in, {session.total_tokens_output:,} out "
             f"(${report.estimated_cost:.4f})"]
    bus(make_message(f"Session summary: {plain(session.agent)}", lines, "LOW", session_id))
    return True


def demo(optimizer: SessionOptimizer, bus: Bus, threshold: float) -> None:
    """A session that reads one file four times."""
    session = optimizer.start_session("FORGE", "Plan with a bad memory", model="opus")
    for _ in range(4):
        optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "src/plan.py"}, tokens_input=500)
    optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=400)
    optimizer.end_session(session.id)
    send_efficiency_alert(optimizer, session.id, bus, threshold)
    send_session_summary(optimizer, session.id, bus)


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; 1 when a message could not be sent."""
    parser = argparse.ArgumentParser(description="Send efficiency alerts and session summaries.")
    parser.add_argument("--to", default="-", metavar="TARGET", help="- (default), a file, or an http(s) URL")
    parser.add_argument("--threshold", type=float, default=70.0, metavar="PERCENT", help="alert below (70)")
    parser.add_argument("--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            demo(SessionOptimizer(options.store or scratch), bus_to(options.to), options.threshold)
        except (OSError, ValueError) as error:
            print(f"message_bus_alerts: not sent: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
