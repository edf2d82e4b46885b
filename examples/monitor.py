#!/usr/bin/env python3
"""Check the store for alerts and send the new ones: to stdout, a file or a webhook.

    python3 examples/monitor.py                                          once, to standard output
    python3 examples/monitor.py --interval 300 --to alerts.jsonl         every five minutes
    python3 examples/monitor.py --level HIGH --to https://chat.example.com/hooks/T0/B0

From cron, every five minutes:

    */5 * * * * python3 /opt/sessionoptimizer/examples/monitor.py --level MEDIUM --to "$HOME/alerts.jsonl"

As a systemd user service, in ~/.config/systemd/user/sessionoptimizer-monitor.service (then
``systemctl --user enable --now sessionoptimizer-monitor``):

    [Service]
    ExecStart=python3 /opt/sessionoptimizer/examples/monitor.py --interval 300 --to %h/alerts.jsonl
    Restart=on-failure
    [Install]
    WantedBy=default.target

What was sent is kept in a file (monitor.json in the store), so a restart repeats nothing; an alert that could
not be sent is tried again next time, and one whose trouble went away and came back counts as new. Give a
second monitor of one store a file of its own (--state). Copy message_bus_alerts.py along with this program.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import datetime, timedelta
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from message_bus_alerts import Bus, bus_to, make_message  # noqa: E402
from sessionoptimizer import Severity, SessionOptimizer, SessionOptimizerError, plain  # noqa: E402


def read_sent(path: str) -> set[str]:
    """The ids of the alerts that were sent and still held at the last check; none without such a file."""
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
    """Send the alerts at or above the level that are new among those of the last hours; the ids sent now.

    ``state``: the file that tells which were sent. OSError when the bus refuses one: it and those after it
    count as not sent.
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


def main(argv: list[str] | None = None) -> int:
    """Run the monitor; 0, 1 when something could not be sent, 2 for a bad command line."""
    parser = argparse.ArgumentParser(description="Send new alerts of the store.")
    parser.add_argument("--to", default="-", metavar="TARGET", help="- (default), a file, or an http(s) URL")
    parser.add_argument("--interval", type=float, default=0, metavar="SECONDS", help="repeat (default: once)")
    parser.add_argument("--level", type=lambda text: Severity(text.upper()), default=Severity.LOW,
                        metavar="LEVEL", help="LOW (default), MEDIUM or HIGH")
    parser.add_argument("--hours", type=float, default=24.0, metavar="N", help="active in these hours (24)")
    parser.add_argument("--state", default="", metavar="FILE", help="what was sent (default: in the store)")
    parser.add_argument("--store", metavar="DIR", help="the store (default: your own)")
    options = parser.parse_args(argv)
    try:
        return watch(SessionOptimizer(options.store), bus_to(options.to), options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
