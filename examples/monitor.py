#!/usr/bin/env python3
"""Check the store for alerts and send the new ones (stdout, file, webhook), or watch what runs now.

    python3 examples/monitor.py                                          once, to standard output
    python3 examples/monitor.py --interval 300 --to alerts.jsonl         every five minutes
    python3 examples/monitor.py --level HIGH --to https://chat.example.com/hooks/T0/B0
    python3 examples/monitor.py --live                                   a line for each that runs

From cron, every five minutes:

    */5 * * * * python3 /opt/sessionoptimizer/examples/monitor.py --level MEDIUM --to
    "$HOME/alerts.jsonl"

As a systemd user service, in ~/.config/systemd/user/sessionoptimizer-monitor.service (then
``systemctl --user enable --now sessionoptimizer-monitor``):

    [Service]
    ExecStart=python3 /opt/sessionoptimizer/examples/monitor.py --interval 300 --to %h/alerts.jsonl
    Restart=on-failure
    [Install]
    WantedBy=default.target

What was sent is kept in a file (monitor.json in the store), so a restart repeats nothing; an alert
that could not be sent is tried again next time, and one whose trouble went away and came back
counts as new. Give a second monitor of one store a file of its own (--state).

``--live`` shows the sessions that are active in the store, as the hooks log them: the context of
the last call, the dollars so far and per call, when the cache expires, what was read twice (see
claude_code_status.py). In a terminal the lines are refreshed until Ctrl-C, every 2 seconds or as
--interval says; elsewhere they are printed once. Copy message_bus_alerts.py and
claude_code_status.py along with this program.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from datetime import datetime, timedelta
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from claude_code_status import last_call, line_of, logged  # noqa: E402
from message_bus_alerts import Bus, bus_to, make_message  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    Session, SessionOptimizer, SessionOptimizerError, Severity, plain,
)

LIVE_SECONDS = 2.0  # between two looks at the running sessions
SPARED = (r", until \d\d:\d\d", r", \$[\d.,]+ (?:per|for the next) call", r" \(~[^()]*\)$",
          r" · read twice: .*$")


def read_sent(path: str) -> set[str]:
    """The ids of the alerts that were sent and still held at the last check;
    none without such a file."""
    try:
        with open(path, encoding="utf-8") as file:
            sent = json.load(file)
    except (OSError, ValueError):
        return set()
    return {name for name in sent if isinstance(name, str)} if isinstance(sent, list) else set()


def write_sent(path: str, sent: set[str]) -> None:
    """Keep the ids, in one step."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(sorted(sent), file)
    os.replace(path + ".new", path)


def message_of(alert: dict[str, Any]) -> dict[str, Any]:
    """An alert as a message for a bus."""
    message = make_message(f"{alert['kind']}: {plain(alert['agent'])}",
                           [f"Session: {plain(alert['session_id'])}", plain(alert["message"]),
                            alert["action"]], alert["level"], alert["session_id"])
    return dict(message, id=alert["id"])


def check(optimizer: SessionOptimizer, bus: Bus, *, level: Severity = Severity.LOW,
          hours: float = 24.0, state: str = "") -> list[str]:
    """Send the alerts at or above the level that are new among those of the last hours;
    the ids sent now.

    ``state``: the file that tells which were sent. OSError when the bus refuses one: it and those
    after it count as not sent.
    """
    since = datetime.now().astimezone() - timedelta(hours=hours)
    alerts = [alert for alert in optimizer.alerts(since=since) if Severity(alert["level"]) >= level]
    path = state or os.path.join(str(optimizer.storage_path), "monitor.json")
    sent = read_sent(path)
    current = {alert["id"] for alert in alerts}
    kept, news = sent & current, []
    try:
        for alert in alerts:
            if alert["id"] not in kept:
                bus(message_of(alert))
                kept.add(alert["id"])
                news.append(alert["id"])
    finally:
        if kept != sent:
            write_sent(path, kept)
    return news


def watch(optimizer: SessionOptimizer, bus: Bus, options: argparse.Namespace) -> int:
    """Check once, or on the interval until interrupted; 1 when the only check failed."""
    while True:
        try:
            check(optimizer, bus, level=options.level, hours=options.hours, state=options.state)
            failed = False
        except (OSError, SessionOptimizerError) as error:
            print(f"monitor: {plain(error, 500)}", file=sys.stderr, flush=True)
            failed = True
        if not options.interval:
            return 1 if failed else 0
        time.sleep(options.interval)


class Live:
    """A line for every running session. What a transcript cost is kept until the transcript has
    grown."""

    def __init__(self, optimizer: SessionOptimizer):
        self.optimizer = optimizer
        # by session: sizes of its files, USD
        self.costs: dict[str, tuple[list[tuple[str, int]], float | None]] = {}

    def cost(self, session_id: str, transcript: str) -> float | None:
        """USD by the usage in the transcript and those of its sub-agents;
        None where it cannot be read."""
        files = [transcript]
        for folder, _, names in os.walk(os.path.splitext(transcript)[0]):
            files += [os.path.join(folder, name) for name in sorted(names)
                      if name.endswith(".jsonl")]
        try:
            sizes = [(path, os.path.getsize(path)) for path in files]
            if self.costs.get(session_id, ([], None))[0] != sizes:
                rows = self.optimizer.scan(files, store=False)["sessions"]
                self.costs[session_id] = (
                    sizes, sum(row["estimated_cost"] for row in rows if row["id"] == session_id))
            return self.costs[session_id][1]
        except (OSError, SessionOptimizerError):
            return None

    def line(self, session: Session, now: float = 0.0) -> str:
        """What a session has cost and holds;
        of one without a transcript its recorded tokens and cost."""
        data = session.metadata
        transcript = data.get("transcript_path") or (data.get("source") or {}).get("path") or ""
        call, cost = last_call(transcript), self.cost(session.id, transcript)
        if not call.context:
            call, cost = (call._replace(context=session.total_tokens, model=""),
                          session.estimated_cost)
        text = line_of(self.optimizer, call, cost=cost,
                       session=logged(self.optimizer, session.id), now=now)
        return f"{plain(session.id, 8)}  {plain(session.task, 30) or session.agent}  {text}"

    def lines(self, now: float = 0.0) -> list[str]:
        """The lines, the newest session first."""
        sessions = self.optimizer.list_sessions(status="ACTIVE")
        return [self.line(session, now) for session in sessions] or ["no session is running"]


def fitted(row: str, width: int) -> str:
    """The line without what can be spared most, until it fits; the cache's end stays longest."""
    for part in SPARED:
        row = row if len(row) <= width else re.sub(part, "", row)
    return row if len(row) <= width else row[:max(0, width - 1)] + "…"


def live(optimizer: SessionOptimizer, interval: float) -> int:
    """Print the lines, in a terminal again and again in the same place."""
    watched, drawn = Live(optimizer), 0
    while True:
        width, height = shutil.get_terminal_size()
        tall = watched.lines()[:max(1, height - 1)]
        rows = [fitted(row, width - 1) for row in tall] if sys.stdout.isatty() else tall
        print((f"\x1b[{drawn}A\x1b[J" if drawn else "") + "\n".join(rows), flush=True)
        if not sys.stdout.isatty():
            return 0
        drawn = len(rows)
        time.sleep(interval or LIVE_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Run the monitor; 0, 1 when something could not be sent, 2 for a bad command line."""
    parser = argparse.ArgumentParser(description="Send new alerts of the store.")
    parser.add_argument("--to", default="-", metavar="TARGET",
                        help="- (default), a file, or an http(s) URL")
    parser.add_argument("--interval", type=float, default=0, metavar="SECONDS",
                        help="repeat (default: once)")
    parser.add_argument("--live", action="store_true",
                        help="show the running sessions instead, one line each")
    parser.add_argument("--level", type=lambda text: Severity(text.upper()), default=Severity.LOW,
                        metavar="LEVEL", help="LOW (default), MEDIUM or HIGH")
    parser.add_argument("--hours", type=float, default=24.0, metavar="N",
                        help="active in these hours (24)")
    parser.add_argument("--state", default="", metavar="FILE",
                        help="what was sent (default: in the store)")
    parser.add_argument("--store", metavar="DIR", help="the store (default: your own)")
    options = parser.parse_args(argv)
    try:
        if options.live:
            return live(SessionOptimizer(options.store), options.interval)
        return watch(SessionOptimizer(options.store), bus_to(options.to), options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
