#!/usr/bin/env python3
"""A live dashboard of a store: efficiency by agent, active sessions, trend, alerts and reports in a browser.

    python3 examples/dashboard.py         your own store (SESSIONOPTIMIZER_HOME or ~/.sessionoptimizer)
    python3 examples/dashboard.py --store DIR --port 9000

It serves dashboard.html, a JSON API, /metrics for Prometheus and /health, on this machine only unless --host
and --token say otherwise. It reads sessions and changes none. docs/dashboard.md describes it all.
"""
import argparse
import json
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from datetime import date, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, unquote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone needs no installation
import sessionoptimizer
from local_server import JSON, LOOPBACK, LocalServer, Refused, tag_of
from sessionoptimizer import SessionOptimizer, SessionOptimizerError, SessionStatus, seconds_of

MAX_DAYS, MAX_ROWS = 3_650, 1_000  # of a query
MAX_STEPS = 160  # bars of a report's timeline
MAX_KEPT = 200  # answers
MIN_TOKEN = 16  # characters
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
STATES = [status.value for status in SessionStatus]


def sums(rows):
    """The totals of ``summaries()`` rows; the efficiency is the sessions' average, None without any."""
    names = ("waste_tokens", "measured_waste_tokens", "cost", "waste_cost")
    totals = {name: round(sum(row[name] for row in rows), 6) for name in names}
    return dict(totals, sessions=len(rows), total_tokens=sum(row["tokens"] for row in rows),
                efficiency=round(sum(row["efficiency"] for row in rows) / len(rows), 2) if rows else None)


def listed(row):
    """A ``summaries()`` row as the API shows it. Duration in seconds, cost in USD."""
    names = "id agent task model status started_at last_at tokens waste_tokens cost".split()
    return dict({name: row[name] for name in names}, duration=round(row["minutes"] * 60),
                efficiency=round(row["efficiency"], 2), issues=sum(row["issues"].values()))


def wasted_tokens(session, report):
    """Wasted tokens by event id. As in the report an event pays its largest measured claim and what the
    largest estimated one adds, so the sum is the report's total."""
    ledger = sessionoptimizer.ClaimsLedger(sessionoptimizer.Analysis(session), report.issues)
    return {event_id: tokens for event_id, tokens in ledger.by_event.items() if tokens}


def timeline(session, wasted):
    """The session in at most MAX_STEPS steps of equally many events, first to last."""
    size, steps = -(-len(session.events) // MAX_STEPS) or 1, []
    for first in range(0, len(session.events), size):
        events = session.events[first:first + size]
        kinds = Counter(event.event_type.value for event in events).most_common(4)
        text = ", ".join(f"{count} {kind}" for kind, count in kinds)
        steps.append({"first": first + 1, "events": len(events),
                      "time": events[0].timestamp, "type": kinds[0][0],
                      "text": text if size > 1 else sessionoptimizer.event_extract(session, events[0]),
                      "input": sum(event.tokens_input for event in events),
                      "output": sum(event.tokens_output for event in events),
                      "wasted": sum(wasted.get(event.id, 0) for event in events)})
    return steps


class Source:
    """The answers of the API. One is computed again only after a session file has changed, and once a minute
    for the passing of time; its ETag stays while its content does."""

    def __init__(self, store=None):
        self.store, self.optimizer, self.lock = store, SessionOptimizer(store), threading.RLock()
        self.prices = self.optimizer.prices  # read now: one that cannot be used is told at the start
        self.files, self.version, self.seen = {}, 0, 0.0
        self.rows, self.rows_version, self.problems, self.cost = [], 0, [], 0.0
        self.kept = {}

    def look(self, max_age=0.0):
        """The number of the store's state, which grows when a session file has changed."""
        if self.version and time.monotonic() - self.seen < max_age:
            return self.version
        found = self.optimizer.store.files()
        files = {session_id: (info.st_size, info.st_mtime_ns) for session_id, info in found}
        with self.lock:
            self.seen = time.monotonic()
            if files != self.files or not self.version:
                self.files, self.version = files, self.version + 1
            return self.version

    def answer(self, name, arguments):
        """(ETag, body) of the answer of that name."""
        version, key = self.look(), (name, *sorted(arguments.items()))
        valid = self.files.get(arguments["name"]) if name == "report" else (version, int(time.time() // 60))
        kept = self.kept.get(key, (None, None, None))
        if kept[0] is not None and kept[0] == valid:
            return kept[1:]
        if name == "report":
            content = self.report(**arguments)
        else:
            with self.lock:
                self._refresh()
                content = getattr(self, name)(**arguments)
        text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
        body = text.encode("utf-8", "replace")
        etag = tag_of(re.sub(b'^{"timestamp":"[^"]*"', b"", body))
        with self.lock:
            self.kept[key] = (valid, etag, kept[2] if kept[1] == etag else body)
            if len(self.kept) > MAX_KEPT:
                self.kept = {key: self.kept[key]}  # start again: clients ask for a few
            return self.kept[key][1:]

    def _refresh(self):
        if self.rows_version != self.version:
            self.rows_version, began = self.version, time.monotonic()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.rows = self.optimizer.summaries()
            self.problems = sorted({str(warning.message) for warning in caught})
            self.cost = time.monotonic() - began

    def _since(self, days):
        return [row for row in self.rows if row["started"] >= time.time() - days * 86_400]

    def current(self, days=1):
        rows, agents = self._since(days), defaultdict(list)
        for row in rows:
            agents[row["agent"]].append(row)
        totals = sums(rows)
        return {"timestamp": datetime.now().astimezone().isoformat(timespec="seconds"), "days": days,
                "agents": {agent: sums(agents[agent]) for agent in sorted(agents)},
                "total_sessions": len(rows), "average_efficiency": totals["efficiency"],
                "total_waste_tokens": totals["waste_tokens"], "totals": totals,
                "stored_sessions": len(self.rows), "problems": self.problems,
                "latest": self.rows[-1]["started_at"] if self.rows else ""}

    def agent(self, name, days=7):
        if name.upper() not in {row["agent"].upper() for row in self.rows}:
            raise Refused(404, f"no session of agent {name!r}")
        figures = self.optimizer.agent_statistics(name, days)
        trends = figures.pop("trends", {"trend": "insufficient_data", "change_percent": 0.0})
        figures.setdefault("sessions_analyzed", figures.pop("sessions", 0))
        none = {"average_efficiency": None, "total_tokens": 0, "total_cost": 0.0, "total_waste_tokens": 0}
        trends = {"direction": trends["trend"], "change": trends["change_percent"]}
        return dict(none, **figures, trends=trends)

    def trend(self, days=7):
        by_day, today = defaultdict(list), date.today()
        for row in self.rows:
            by_day[date.fromtimestamp(row["started"])].append(row)
        dates = [today - timedelta(days=back) for back in reversed(range(days))]
        points = [dict(sums(by_day.get(day, ())), date=day.isoformat()) for day in dates]
        return {"days": days, "trend": [
            {"date": point["date"], "efficiency": point["efficiency"], "sessions": point["sessions"],
             "tokens": point["total_tokens"]} for point in points]}

    def sessions(self, agent="", status="", limit=50, days=MAX_DAYS):
        rows = [row for row in reversed(self._since(days))
                if row["status"] == (status.upper() or row["status"])
                and row["agent"].upper() == (agent.upper() or row["agent"].upper())]
        shown = [listed(row) for row in rows[:limit]]
        return {"sessions": shown, "count": len(shown), "total": len(rows)}

    def active(self):
        rows = [listed(row) for row in self.rows if row["status"] == SessionStatus.ACTIVE.value]
        rows.sort(key=lambda row: seconds_of(row["last_at"]) or 0.0, reverse=True)
        return {"sessions": rows, "count": len(rows)}

    def alerts(self, days=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `problems` has them
            found = self.optimizer.alerts(since=datetime.now() - timedelta(days=days))
        tasks = {row["id"]: row["task"] for row in self.rows}
        found.sort(key=lambda alert: seconds_of(alert["time"]) or 0.0, reverse=True)
        return {"alerts": [dict(alert, task=tasks.get(alert["session_id"], "")) for alert in found],
                "count": len(found)}

    def report(self, name):
        optimizer = SessionOptimizer(self.store)  # of its own: the events it reads do not stay in memory
        session = optimizer.get_session(name) if name in self.files else None
        if session is None:
            raise Refused(404, f"no session {name!r}")
        report = sessionoptimizer.build_report(session, optimizer.analyzers)
        wasted = wasted_tokens(session, report)
        named = {event_id for issue in report.issues for event_id in issue.events_involved}
        header = {"id": name, "agent": session.agent, "task": session.task, "model": session.model,
                  "status": session.status.value, "started_at": session.started_at,
                  "ended_at": session.ended_at, "duration": round(session.duration_seconds),
                  "events": len(session.events)}
        events = {event.id: {"number": number, "type": event.event_type.value, "tokens": event.tokens,
                             "wasted": wasted.get(event.id, 0),
                             "text": sessionoptimizer.event_extract(session, event)}
                  for number, event in enumerate(session.events, 1) if event.id in named}
        return dict(report.to_dict(), session=header, timeline=timeline(session, wasted), evidence=events)

    def metrics(self):
        groups, states = defaultdict(list), Counter((row["agent"], row["status"]) for row in self.rows)
        for row in self.rows:
            groups[row["agent"]].append(row)
        tables = {"info": [(("version",), (sessionoptimizer.__version__,), 1)],
                  "unreadable": [((), (), len(self.problems))],
                  "sessions": [(("agent", "status"), key, number) for key, number in sorted(states.items())]}
        for agent, rows in sorted(groups.items()):
            for name, value in sums(rows).items():
                if name != "sessions":  # which are told by status
                    tables.setdefault(METRICS[name], []).append((("agent",), (agent,), value))
        lines = []
        for name, samples in tables.items():
            lines += [f"# HELP sessionoptimizer_{name} {HELP[name]}.",
                      f"# TYPE sessionoptimizer_{name} gauge"]
            for labels, texts, value in samples:
                texts = (re.sub(r'([\\"])', r"\\\1", text).replace("\n", r"\n") for text in texts)
                inside = ",".join(f'{label}="{text}"' for label, text in zip(labels, texts))
                lines.append(f"sessionoptimizer_{name}{f'{{{inside}}}' if inside else ''} {value}")
        return "\n".join(lines) + "\n"


METRICS = {"total_tokens": "tokens", "waste_tokens": "wasted_tokens", "cost": "cost_usd",
           "waste_cost": "wasted_cost_usd", "measured_waste_tokens": "measured_wasted_tokens",
           "efficiency": "efficiency_percent"}
HELP = {"info": "Version", "unreadable": "Problems met while reading the store", "sessions": "Sessions",
        "tokens": "Tokens, input and output", "wasted_tokens": "Wasted tokens, estimates included",
        "measured_wasted_tokens": "Wasted tokens, estimates left out", "cost_usd": "Cost at API prices",
        "wasted_cost_usd": "Cost of the wasted tokens", "efficiency_percent": "Average efficiency, 0 to 100"}
ROUTES = {"/api/stats/current": ("current", "days"), "/api/stats/trend": ("trend", "days"),
          "/api/sessions/active": ("active",), "/api/alerts": ("alerts", "days"), "/metrics": ("metrics",),
          "/api/sessions": ("sessions", "agent", "status", "limit", "days")}
NAMED = {"/api/stats/agent": ("agent", "days"), "/api/reports": ("report",)}


def route(path, query):
    """(answer, its arguments); Refused names what is wrong."""
    parent, _, name = path.rpartition("/")
    answer, *allowed = ROUTES.get(path) or NAMED.get(name and parent) or [None]
    if answer is None:
        raise Refused(404, "there is nothing here: docs/dashboard.md describes the API")
    try:
        values = {key: texts[-1] for key, texts in parse_qs(query, True, max_num_fields=10).items()}
    except ValueError:
        raise Refused(400, "the query has too many parameters") from None
    for key, text in values.items():
        most = {"days": MAX_DAYS, "limit": MAX_ROWS}.get(key)
        if key not in allowed:
            raise Refused(400, f"unknown parameter {key!r}: use {', '.join(allowed) or 'none'}")
        if key == "status" and text.upper() not in STATES + [""]:
            raise Refused(400, f"unknown status {text!r}: use one of {', '.join(STATES)}")
        if most and not (re.fullmatch("[0-9]{1,6}", text) and 1 <= int(text) <= most):
            raise Refused(400, f"{key} is {text!r}: give a whole number from 1 to {most}")
        values[key] = int(text) if most else text
    return answer, dict(values, name=unquote(name)) if path not in ROUTES else values


class Dashboard(LocalServer):
    """The page dashboard.html and the answers of a source."""

    def __init__(self, source, **options):
        self.source = source
        super().__init__(Path(__file__).with_name("dashboard.html").read_bytes(), **options)

    def answer(self, path, query):
        name, arguments = route(path, query)
        try:
            return (METRICS_TEXT if name == "metrics" else JSON, *self.source.answer(name, arguments))
        except (SessionOptimizerError, OSError) as error:
            raise Refused(500, str(error)) from error

    def takes_long(self, path):
        return path.startswith("/api/reports/")

    def state(self, max_age):
        return self.source.look(max_age), 4 * self.source.cost  # reading takes a fifth of the time at most


def read_options(argv):
    parser = argparse.ArgumentParser(prog="dashboard.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="DIR",
                        help="directory of the store; without it your own (not a temporary one as elsewhere "
                        "in examples/: there would be nothing to see)")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on, default 127.0.0.1; others need --token")
    parser.add_argument("--token", default=os.environ.get("SESSIONOPTIMIZER_TOKEN", ""),
                        help=f"secret that requests need, {MIN_TOKEN} characters or more; by default the "
                        "variable SESSIONOPTIMIZER_TOKEN")
    options = parser.parse_args(argv)
    if not 0 <= options.port <= 65_535:
        parser.error(f"--port is {options.port}: give a number from 0 to 65535")
    if options.host not in LOOPBACK and not options.token:
        parser.error(f"--host {options.host} lets other machines read your sessions: give a --token as well, "
                     "e.g. one from python3 -c 'import secrets; print(secrets.token_urlsafe())'")
    if 0 < len(options.token) < MIN_TOKEN:
        parser.error(f"--token has {len(options.token)} characters: give at least {MIN_TOKEN}")
    return options


def main(argv=None):
    options = read_options(argv)
    place = f"{f'[{options.host}]' if ':' in options.host else options.host}:"
    try:
        server = Dashboard(Source(options.store), host=options.host, port=options.port, token=options.token)
    except (SessionOptimizerError, OSError, OverflowError) as error:
        reason = f"{place}{options.port} cannot be used: {error}; another --port may do"
        print("dashboard:", error if isinstance(error, SessionOptimizerError) else reason, file=sys.stderr)
        return 1
    print(f"Dashboard of {server.source.optimizer.storage_path}: http://{place}{server.server_address[1]}/"
          f"{'?token=TOKEN' if options.token else ''}  (Ctrl-C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
