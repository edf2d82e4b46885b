#!/usr/bin/env python3
"""A live dashboard of a store: efficiency by agent, active sessions, trend, alerts and reports.

    python3 examples/dashboard.py         your own store (SESSIONOPTIMIZER_HOME or
                                          ~/.sessionoptimizer)
    python3 examples/dashboard.py --store DIR --port 9000

It serves dashboard.html, a JSON API, /metrics for Prometheus and /health, on this machine only
unless --host and --token say otherwise. It reads sessions and changes none, but ends those whose
agent has gone, as every command does. docs/dashboard.md describes it all.
"""
import argparse
import gc
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
MAX_CALLS = 320  # columns of a session's context
MAX_KEPT = 200  # answers
MIN_TOKEN = 16  # characters
AT_ONCE, AT_ONCE_BYTES = 40, 4_000_000  # sessions that are read while a request waits
SHARE = 20  # of the time that makes an answer which needs the whole summaries
LOOK_SECONDS = 1e-5  # for every session of the store: how old what is known of its files may be
CLOSING_SECONDS = 120  # between two looks for sessions whose agent has gone
CHUNK = 50  # sessions that are read before the page hears of them
IDLE_SECONDS = 600  # between two calls: a pause worth a mark
HEARING = threading.Lock()  # what is done with warnings is done for all threads
PERIODS = (1, 7, 30, MAX_DAYS)
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
STATES = [status.value for status in SessionStatus]
HOW = ("carried", "first", "again", "output")  # the ways a token is paid, see docs/bill.md
FIGURES = ("waste_tokens", "measured_waste_tokens", "cost", "waste_cost", "measured_waste_cost")
KEPT = ("id agent task model status started_at last_at started project minutes prompts model_calls "
        "tokens efficiency efficiency_score error_rate stamp").split() + list(FIGURES)
SORTS = {"task": lambda row: row["task"].lower(), "project": lambda row: row["project"].lower(),
         "duration": lambda row: row["minutes"], "issues": lambda row: row["issues"],
         **{name: (lambda row, name=name: row[name]) for name in (
             "agent", "model", "status", "efficiency", "cost", "tokens", "waste_tokens",
             "waste_cost", "started")}}


def light(row):
    """A ``summaries()`` row without what only a report shows: ten thousand of them fit into memory.
    ``paid``: whole pico-dollars by HOW, as docs/bill.md has them."""
    kept = {name: row[name] for name in KEPT}
    kept["paid"] = dict.fromkeys(HOW, 0)
    for cell in row["bill"]["cells"]:
        kept["paid"][cell["how"]] += cell["cost"]
    return dict(kept, issues=sum(row["issues"].values()))


def paid(rows):
    """USD by HOW of light rows, exact until they are rounded once."""
    return {how: round(sum(row["paid"][how] for row in rows) / sessionoptimizer.PICO, 12)
            for how in HOW}


def sums(rows):
    """The totals of light rows. ``efficiency`` and ``efficiency_score``: of all their tokens, as
    scan and stats print it; None without any."""
    totals = {name: round(sum(row[name] for row in rows), 6) for name in FIGURES}
    tokens = sum(row["tokens"] for row in rows)
    score = round(100 * (1 - totals["waste_tokens"] / (tokens or 1)), 2) if rows else None
    return dict(totals, sessions=len(rows), total_tokens=tokens, efficiency_score=score,
                efficiency=score)


def listed(row):
    """A light row as the API shows it. Duration in seconds, cost in USD."""
    names = ("id agent task model status started_at last_at project tokens waste_tokens "
             "measured_waste_tokens cost waste_cost issues").split()
    return dict({name: row[name] for name in names}, duration=round(row["minutes"] * 60),
                efficiency=round(row["efficiency"], 2))


def periods_of(first, last):
    """(unit, dates) from one day to another, without a gap: days, or weeks (from Monday) beyond
    three months, or months beyond two years."""
    unit = "day" if (last - first).days <= 92 else "week" if (last - first).days <= 731 else "month"
    dates = [begin_of(first, unit)]
    while dates[-1] < last:
        following = begin_of(dates[-1] + timedelta({"day": 1, "week": 7, "month": 32}[unit]), unit)
        if following > last:
            break
        dates.append(following)
    return unit, dates


def begin_of(day, unit):
    """The first day of the day's week or month."""
    if unit == "week":
        return day - timedelta(day.weekday())
    return day.replace(day=1) if unit == "month" else day


def wasted_tokens(session, report):
    """Wasted tokens by event id. As in the report an event pays its largest measured claim and what
    the largest estimated one adds, so the sum is the report's total."""
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
                      "text": text if size > 1
                      else sessionoptimizer.event_extract(session, events[0]),
                      "input": sum(event.tokens_input for event in events),
                      "output": sum(event.tokens_output for event in events),
                      "again": sum(event.tokens_input for event in events
                                   if event.data.get("source") == sessionoptimizer.Source.REBUILD),
                      "wasted": sum(wasted.get(event.id, 0) for event in events)})
    return steps


def context_of(session, bill):
    """The main agent's context call by call: ``{"calls", "helpers" (calls of sub-agents),
    "columns"}``, a column for a call or for several where there are more than MAX_CALLS: ``{"call"
    (number of the last), "time", "read" (tokens sent again from the cache), "again" (written a
    second time), "new", "gap" (seconds of idleness before it, 0 for none), "compacted", "causes"
    (why the cache was lost), "cost" (USD of that)}``. Empty where no call tells what it read."""
    causes = {}
    for rebuild in bill["rebuilds"]:
        causes[rebuild["event"]] = sessionoptimizer.CAUSES[rebuild["cause"]], rebuild["cost"]
    calls, helpers, main = [], 0, ""
    for step in sessionoptimizer.ContextWalk(session):
        if step.call is None:
            continue
        main = main if calls else step.call.agent_id
        if step.call.agent_id != main:
            helpers += 1
            continue
        lost = [causes[event.id] for event in step.events if event.id in causes]
        gap = step.gap or 0
        calls.append({
            "call": len(calls) + 1, "time": step.call.timestamp, "read": step.read,
            "again": step.kept - step.read, "new": max(0, step.held.length - step.kept),
            "gap": round(gap) if gap > IDLE_SECONDS else 0,
            "compacted": any(map(sessionoptimizer.is_compaction, step.events)),
            "causes": [cause for cause, _ in lost], "cost": sum(cost for _, cost in lost)})
    if not any(call["read"] for call in calls):
        return {"calls": 0, "helpers": 0, "columns": []}
    size, columns = -(-len(calls) // MAX_CALLS), []
    for first in range(0, len(calls), size):
        several = calls[first:first + size]
        column = dict(max(several, key=lambda call: call["read"] + call["again"] + call["new"]))
        column.update(call=several[-1]["call"], gap=max(call["gap"] for call in several),
                      compacted=any(call["compacted"] for call in several),
                      causes=[cause for call in several for cause in call["causes"]],
                      cost=round(sum(call["cost"] for call in several), 6))
        columns.append(column)
    return {"calls": len(calls), "helpers": helpers, "columns": columns}


class Source:
    """The answers of the API, made of one light row per session. The rows come from the summaries
    that a scan, ``stats`` and this program keep in the store; sessions that have none are read: a
    few at once, many in the background, the newest first, while the page shows how many are left.
    An answer is made again only after a session file has changed, and once a minute for the passing
    of time; its ETag stays while its content does."""

    def __init__(self, store=None):
        self.store, self.optimizer, self.lock = store, SessionOptimizer(store), threading.RLock()
        prices = self.optimizer.prices  # read now: one that cannot be used is told at the start
        self.settings = sessionoptimizer.scan_settings(self.optimizer.analyzers, prices)
        self.files, self.version, self.seen = {}, 0, 0.0
        self.spent = 0.0  # seconds on reading and answering since the last change
        self.by_id, self.rows, self.problems, self.unread = None, [], {}, []
        self.kept, self.reader, self.closed = {}, None, threading.Event()
        threading.Thread(target=self._attend, daemon=True).start()

    def _attend(self):
        """Take in what is there before somebody asks; from then on end, as every command does, the
        sessions that run no more because their agent has gone."""
        try:
            self.answer("overview", {})
        except (SessionOptimizerError, OSError):
            pass  # the first request is told
        while not self.closed.wait(CLOSING_SECONDS):
            if any(row["status"] == SessionStatus.ACTIVE.value for row in self.rows):
                with HEARING, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # `problems` has them
                    try:
                        self.optimizer.summaries()
                    except (SessionOptimizerError, OSError):
                        pass  # the next answer says it

    def look(self, max_age=0.0):
        """The number of the store's state, which grows when a session has changed or was read."""
        if (self.version
                and time.monotonic() - self.seen < max(max_age, len(self.files) * LOOK_SECONDS)):
            return self.version
        with self.lock:
            found = {session_id: [info.st_size, info.st_mtime_ns]
                     for session_id, info in self.optimizer.store.files()}
            self.seen = time.monotonic()
            if self.by_id is None:
                gc.disable()  # all of it is kept: looking through it takes a fifth of the time
                try:
                    self.by_id = self.optimizer.store.state.summaries(self.settings, light)
                finally:
                    gc.enable()
            if found != self.files or not self.version:
                self._take(found)
            return self.version

    def _take(self, found):
        """Take in what the session files have become."""
        self.files, self.version, self.spent = found, self.version + 1, 0.0
        gone = self.by_id.keys() - found.keys()
        for session_id in gone:
            del self.by_id[session_id]
        self.problems = {name: told for name, told in self.problems.items()
                         if told[0] == found.get(name)}
        self.unread = sorted(
            (name for name, stamp in found.items() if not self._known(name, stamp)),
            key=lambda name: found[name][1], reverse=True)
        if (len(self.unread) <= AT_ONCE
                and sum(found[name][0] for name in self.unread) <= AT_ONCE_BYTES):
            self._keep(*self._read(self.unread))
            self.unread = []
        elif self.reader is None:
            self.reader = threading.Thread(target=self._read_all, daemon=True)
            self.reader.start()
        self._keep({}, {})

    def _known(self, name, stamp):
        row, problem = self.by_id.get(name), self.problems.get(name)
        return (row is not None and row["stamp"] == stamp
                or problem is not None and problem[0] == stamp)

    def _keep(self, rows, problems):
        """Take rows and problems by session id among those that are shown."""
        for session_id in problems.keys() - rows.keys():
            self.by_id.pop(session_id, None)
        self.by_id.update((session_id, row) for session_id, row in rows.items()
                          if session_id in self.files)
        self.problems.update(problems)
        self.rows = sorted(self.by_id.values(), key=lambda row: (row["started"], row["id"]))

    def _read_all(self):
        """Read what is left, in chunks, until nothing is."""
        while True:
            with self.lock:
                names, self.unread = self.unread[:CHUNK], self.unread[CHUNK:]
                if not names:
                    self.reader = None
                    return
            found = self._read(names)
            with self.lock:
                self.version += 1
                self._keep(*found)

    def _read(self, names):
        """The light rows of these sessions, kept in the store for the next time, and the problems
        of those that cannot be read, by session id."""
        began, news, problems = time.monotonic(), {}, {}
        # of its own: the events it reads do not stay in memory
        optimizer = SessionOptimizer(self.store)
        for name in names:
            stamp = self.files.get(name)
            with HEARING, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    session = optimizer.get_session(name)
                    if session is None:
                        continue  # deleted meanwhile
                    row = sessionoptimizer.full_row(session, optimizer.analyzers, short=True)
                    news[name] = dict(row, id=name, stamp=stamp)
                except (SessionOptimizerError, OSError) as error:
                    problems[name] = stamp, str(error)
            if caught:
                problems.setdefault(name, (stamp, str(caught[0].message)))
        try:
            if news:
                self.optimizer.store.state.save_summaries(self.settings, news, ())
            for name in news:
                if not os.path.lexists(self.optimizer.store.find(name)):
                    self.optimizer.store.state.forget(name, False)  # deleted meanwhile
        except SessionOptimizerError:
            pass  # a store that can only be read
        self.spent += time.monotonic() - began
        return {name: light(row) for name, row in news.items()}, problems

    def answer(self, name, arguments):
        """(ETag, body) of the answer of that name."""
        version, key = self.look(), (name, *sorted(arguments.items()))
        stamp = self.files.get(arguments["name"]) if name == "report" else None
        valid = tuple(stamp) if stamp else (version, int(time.time() // 60))
        kept, began = self.kept.get(key, (None, None, None, 0.0)), time.monotonic()
        if kept[0] is not None and (kept[0] == valid or began < kept[3]):
            return kept[1:3]
        content = getattr(self, name)(**arguments)
        text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
        body = text.encode("utf-8", "replace")
        etag = tag_of(re.sub(b'^{"timestamp":"[^"]*"', b"", body))
        took = time.monotonic() - began
        self.spent += took
        until = time.monotonic() + SHARE * took if name == "bill" else 0.0
        with self.lock:
            self.kept[key] = (valid, etag, kept[2] if kept[1] == etag else body, until)
            if len(self.kept) > MAX_KEPT:
                self.kept = {key: self.kept[key]}  # start again: clients ask for a few
            return etag, self.kept[key][2]

    def _since(self, days):
        rows, since = self.rows, time.time() - days * 86_400
        first, end = 0, len(rows)  # they stand in the order in which they began
        while first < end:
            middle = (first + end) // 2
            first, end = (middle + 1, end) if rows[middle]["started"] < since else (first, middle)
        return rows[first:]

    def overview(self, days=0):
        """What a page shows first. Without ``days`` those of the shortest period that has a
        session."""
        now = time.time()
        counts = {period: len(self._since(period)) for period in PERIODS}
        chosen = days or next((period for period in PERIODS if counts[period]), MAX_DAYS)
        rows, agents = self._since(chosen), defaultdict(list)
        for row in rows:
            agents[row["agent"]].append(row)
        choices = {name: Counter() for name in ("agent", "project", "model")}
        for row in rows:
            for name, counter in choices.items():
                counter[row[name]] += 1
        totals = dict(sums(rows), paid=paid(rows))
        return {"timestamp": datetime.fromtimestamp(now).astimezone().isoformat(timespec="seconds"),
                "days": chosen, "counts": {str(period): count for period, count in counts.items()},
                "totals": totals,
                "agents": {agent: sums(agents[agent]) for agent in sorted(agents)},
                "choices": {name: sorted(counter) for name, counter in choices.items()},
                "spending": self.spending(chosen), "stored_sessions": len(self.rows),
                "unread": len(self.unread),
                "latest": self.rows[-1]["started_at"] if self.rows else "",
                "problems": self._problems()}

    def _problems(self):
        return sorted({told for _, told in list(self.problems.values())})

    def spending(self, days):
        """Dollars by HOW, efficiency and tokens of every day (local, the one on which a session
        began) of at least a week, or of every week or month:
        ``{"unit", "rows": [{"date", ...}], "undated" (USD)}``."""
        today, rows = date.today(), self._since(max(days, 7))
        dated = [row for row in rows if row["started"] > 0]
        first = today - timedelta(min(max(days, 7), MAX_DAYS) - 1)
        if days > 92:
            first = min([date.fromtimestamp(row["started"]) for row in dated[:1]]
                        + [today - timedelta(6)])
        last = max([date.fromtimestamp(row["started"]) for row in dated[-1:]] + [today])
        unit, dates = periods_of(first, last)
        groups = {day: [] for day in dates}
        for row in dated:
            day = begin_of(date.fromtimestamp(row["started"]), unit)
            if day in groups:  # a period of 24 hours or 7 days begins in the middle of a day
                groups[day].append(row)
        names = ("sessions", "total_tokens", "efficiency_score", "cost",
                 "measured_waste_cost", "waste_cost")
        told = []
        for day, its in groups.items():
            figures = sums(its)
            told.append(
                dict(paid(its), date=day.isoformat(), **{name: figures[name] for name in names}))
        undated = sum(row["cost"] for row in rows if row["started"] <= 0)
        return {"unit": unit, "rows": told, "undated": round(undated, 6)}

    def bill(self, days=MAX_DAYS):
        """Where the money went and what to do first, in the words of ``scan``: ``{"total", "rows":
        [[how, cost, share, largest parts]], "advice": [{"text",
        "saves"}]}``. The whole rows are read for it."""
        since, wanted = time.time() - days * 86_400, {row["id"] for row in self.rows}
        rows = self.optimizer.store.state.summaries(
            self.settings,
            lambda row: row if row["started"] >= since and row["id"] in wanted else None)
        billed = sessionoptimizer.billed([row for row in rows.values() if row is not None])
        section, = sessionoptimizer.bill_sections(billed["bill"])
        advice = sessionoptimizer.advice_section(billed["advice"])
        return {"total": billed["bill"]["total"], "guessed": billed["bill"].get("guessed", 0),
                "rows": section.rows, "advice": [part.title for part in advice.parts][:5]}

    def current(self, days=1):
        rows, agents = self._since(days), defaultdict(list)
        for row in rows:
            agents[row["agent"]].append(row)
        totals = sums(rows)
        return {"timestamp": datetime.now().astimezone().isoformat(timespec="seconds"),
                "days": days, "agents": {agent: sums(agents[agent]) for agent in sorted(agents)},
                "total_sessions": len(rows), "average_efficiency": totals["efficiency"],
                "total_waste_tokens": totals["waste_tokens"], "totals": totals,
                "stored_sessions": len(self.rows), "problems": self._problems(),
                "latest": self.rows[-1]["started_at"] if self.rows else ""}

    def agent(self, name, days=7):
        if name.upper() not in {row["agent"].upper() for row in self.rows}:
            raise Refused(404, f"no session of agent {name!r}")
        with HEARING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `problems` has them
            figures = self.optimizer.agent_statistics(name, days)
        trends = figures.pop("trends", {"trend": "insufficient_data", "change_percent": 0.0})
        figures.setdefault("sessions_analyzed", figures.pop("sessions", 0))
        none = {"total_tokens": 0, "total_cost": 0.0, "total_waste_tokens": 0}
        trends = {"direction": trends["trend"], "change": trends["change_percent"]}
        figures["average_efficiency"] = figures.get("efficiency_score")
        return dict(none, **dict(figures, trends=trends))

    def trend(self, days=7):
        by_day, today = defaultdict(list), date.today()
        for row in self.rows:
            by_day[date.fromtimestamp(row["started"])].append(row)
        dates = [today - timedelta(days=back) for back in reversed(range(days))]
        points = [dict(sums(by_day.get(day, ())), date=day.isoformat()) for day in dates]
        return {"days": days, "trend": [
            {"date": point["date"], "efficiency": point["efficiency"],
             "sessions": point["sessions"], "tokens": point["total_tokens"]} for point in points]}

    def sessions(self, agent="", project="", model="", status="", q="", sort="started",
                 order="desc", limit=50, offset=0, days=MAX_DAYS):
        words = q.lower().split()
        exact = {"agent": agent.upper(), "status": status.upper(), "project": project.upper(),
                 "model": model.upper()}
        exact = {name: value for name, value in exact.items() if value}
        rows = [row for row in self._since(days)
                if all(row[name].upper() == value for name, value in exact.items())
                and all(any(word in row[name].lower()
                            for name in ("task", "id", "project", "agent", "model"))
                        for word in words)]
        rows.sort(key=SORTS[sort], reverse=order == "desc")
        shown = [listed(row) for row in rows[offset:offset + limit]]
        return {"sessions": shown, "count": len(shown), "offset": offset, "total": len(rows),
                "cost": round(sum(row["cost"] for row in rows), 6),
                "latest": self.rows[-1]["started_at"] if self.rows else ""}

    def active(self):
        rows = [listed(row) for row in self.rows if row["status"] == SessionStatus.ACTIVE.value]
        rows.sort(key=lambda row: seconds_of(row["last_at"]) or 0.0, reverse=True)
        return {"sessions": rows, "count": len(rows)}

    def alerts(self, days=1, limit=MAX_ROWS, offset=0):
        limits, since = sessionoptimizer.alert_limits(), time.time() - days * 86_400
        found = [dict(alert, task=row["task"]) for row in self.rows
                 if (seconds_of(row["last_at"]) or row["started"]) >= since
                 for alert in sessionoptimizer.alerts_of(row, limits)]
        found.sort(key=lambda alert: (-alert["cost"], -(seconds_of(alert["time"]) or 0.0)))
        shown = found[offset:offset + limit]
        return {"alerts": shown, "count": len(shown), "offset": offset, "total": len(found),
                "sessions": len({alert["session_id"] for alert in found})}

    def report(self, name):
        # of its own: the events it reads do not stay in memory
        optimizer = SessionOptimizer(self.store)
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
        events = {
            event.id: {"number": number, "type": event.event_type.value, "tokens": event.tokens,
                       "wasted": wasted.get(event.id, 0),
                       "text": sessionoptimizer.event_extract(session, event)}
            for number, event in enumerate(session.events, 1) if event.id in named}
        bill, = sessionoptimizer.bill_sections(report.bill)
        return dict(report.to_dict(), session=header, timeline=timeline(session, wasted),
                    evidence=events, money=bill.rows, context=context_of(session, report.bill))

    def metrics(self):
        groups, states = (defaultdict(list),
                          Counter((row["agent"], row["status"]) for row in self.rows))
        for row in self.rows:
            groups[row["agent"]].append(row)
        tables = {"info": [(("version",), (sessionoptimizer.__version__,), 1)],
                  "unreadable": [((), (), len(self.problems))],
                  "sessions": [(("agent", "status"), key, number)
                               for key, number in sorted(states.items())]}
        for agent, rows in sorted(groups.items()):
            for name, value in sums(rows).items():
                if name in METRICS:
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
HELP = {
    "info": "Version", "unreadable": "Problems met while reading the store", "sessions": "Sessions",
    "tokens": "Tokens, input and output", "wasted_tokens": "Wasted tokens, estimates included",
    "measured_wasted_tokens": "Wasted tokens, estimates left out", "cost_usd": "Cost at API prices",
    "wasted_cost_usd": "Cost of the wasted tokens",
    "efficiency_percent": "Efficiency over all tokens, 0 to 100"}
ROUTES = {"/api/overview": ("overview", "days"), "/api/bill": ("bill", "days"),
          "/api/stats/current": ("current", "days"), "/api/stats/trend": ("trend", "days"),
          "/api/sessions/active": ("active",), "/metrics": ("metrics",),
          "/api/alerts": ("alerts", "days", "limit", "offset"),
          "/api/sessions": ("sessions", "agent", "project", "model", "status", "q", "sort", "order",
                            "limit", "offset", "days")}
CHOICES = {"status": (*STATES, ""), "sort": tuple(SORTS), "order": ("asc", "desc")}
LIMITS = {"days": (1, MAX_DAYS), "limit": (1, MAX_ROWS), "offset": (0, 1_000_000)}
NAMED = {"/api/stats/agent": ("agent", "days"), "/api/reports": ("report",)}


def route(path, query):
    """(answer, its arguments); Refused names what is wrong."""
    parent, _, name = path.rpartition("/")
    answer, *allowed = ROUTES.get(path) or NAMED.get(name and parent) or [None]
    if answer is None:
        raise Refused(404, "there is nothing here: docs/dashboard.md describes the API")
    try:
        values = {key: texts[-1] for key, texts in parse_qs(query, True, max_num_fields=12).items()}
    except ValueError:
        raise Refused(400, "the query has too many parameters") from None
    for key, text in values.items():
        if key not in allowed:
            raise Refused(400, f"unknown parameter {key!r}: use {', '.join(allowed) or 'none'}")
        known = CHOICES.get(key, ())
        if known and text.upper() not in map(str.upper, known):
            raise Refused(400,
                          f"unknown {key} {text!r}: use one of {', '.join(filter(None, known))}")
        if key in LIMITS:
            least, most = LIMITS[key]
            if not (re.fullmatch("[0-9]{1,7}", text) and least <= int(text) <= most):
                raise Refused(400, f"{key} is {text!r}: give a whole number from {least} to {most}")
        values[key] = (int(text) if key in LIMITS else text.lower()
                       if key in ("sort", "order") else text)
    return answer, dict(values, name=unquote(name)) if path not in ROUTES else values


class Dashboard(LocalServer):
    """The page dashboard.html and the answers of a source."""

    def __init__(self, source, **options):
        self.source = source
        super().__init__(Path(__file__).with_name("dashboard.html").read_bytes(), **options)

    def answer(self, path, query):
        name, arguments = route(path, query)
        try:
            return (METRICS_TEXT if name == "metrics" else JSON,
                    *self.source.answer(name, arguments))
        except (SessionOptimizerError, OSError) as error:
            raise Refused(500, str(error)) from error

    def takes_long(self, path):
        return path.startswith(("/api/reports/", "/api/bill", "/api/stats/agent/"))

    def server_close(self):
        self.source.closed.set()
        super().server_close()

    def state(self, max_age):
        # that takes a fifth of the time at most
        return self.source.look(max_age), 4 * self.source.spent


def read_options(argv):
    parser = argparse.ArgumentParser(prog="dashboard.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="DIR",
                        help="directory of the store; without it your own (not a temporary one as "
                        "elsewhere in examples/: there would be nothing to see)")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on, default 127.0.0.1; others need --token")
    parser.add_argument("--token", default=os.environ.get("SESSIONOPTIMIZER_TOKEN", ""),
                        help=f"secret that requests need, {MIN_TOKEN} characters or more; "
                        "by default the variable SESSIONOPTIMIZER_TOKEN")
    options = parser.parse_args(argv)
    if not 0 <= options.port <= 65_535:
        parser.error(f"--port is {options.port}: give a number from 0 to 65535")
    if options.host not in LOOPBACK and not options.token:
        parser.error(
            f"--host {options.host} lets other machines read your sessions: give a --token as "
            "well, e.g. one from python3 -c 'import secrets; print(secrets.token_urlsafe())'")
    if 0 < len(options.token) < MIN_TOKEN:
        parser.error(f"--token has {len(options.token)} characters: give at least {MIN_TOKEN}")
    return options


def main(argv=None):
    options = read_options(argv)
    place = f"{f'[{options.host}]' if ':' in options.host else options.host}:"
    try:
        server = Dashboard(Source(options.store), host=options.host, port=options.port,
                           token=options.token)
    except (SessionOptimizerError, OSError, OverflowError) as error:
        reason = f"{place}{options.port} cannot be used: {error}; another --port may do"
        print("dashboard:", error if isinstance(error, SessionOptimizerError) else reason,
              file=sys.stderr)
        return 1
    print(f"Dashboard of {server.source.optimizer.storage_path}: "
          f"http://{place}{server.server_address[1]}/{'?token=TOKEN' if options.token else ''}  "
          "(Ctrl-C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
