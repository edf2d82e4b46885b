#!/usr/bin/env python3
"""What the tokens bought: agent sessions joined with the git history of the repository they worked in.

    python3 examples/git_insights.py --repo . --days 30
    python3 examples/git_insights.py --repo . --days 90 --split 2026-05-01 --format html > insights.html

A session belongs to the repository whose work tree holds its working directory, a commit to the session that ran when
it was authored and wrote one of its files. Correlations are computed, never assumed, and what the data cannot show is
called "no evidence": docs/git.md explains every number. Exit status: 0 done, 1 failed, 2 bad command line.
"""
from __future__ import annotations

import argparse
import asyncio
import html
import json
import os
import sqlite3
import sys
import warnings
from bisect import bisect
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol, Sequence

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # from a clone: the module's directory and this one
from git_history import (Commit, GitReader, GitVelocityMetrics, History, InsightsError, language_of,  # noqa: E402, F401
                         ratio, work_tree_of)
from git_statistics import (MIN_POINTS, CorrelationInsight, CorrelationStorage, SqliteCorrelationStorage,  # noqa: E402
                            correlate, split_at)
from sessionoptimizer import EventType, SessionOptimizer, SessionOptimizerError, parse_time, plain  # noqa: E402

SESSION_BUDDY_DB = "~/.claude/data/workflow_metrics.db"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


# ---- Records ----

@dataclass(frozen=True)
class ExtendedSessionMetrics:
    """One session and what it left in git. Quality is the efficiency score (0 to 100). What is unknown is None."""
    session_id: str
    project_path: str
    started_at: datetime
    ended_at: datetime | None
    duration_minutes: float | None
    checkpoint_count: int
    commit_count: int | None
    quality_start: float | None
    quality_end: float | None
    quality_delta: float | None
    avg_quality: float | None
    files_modified: int
    tools_used: list[str]
    primary_language: str | None
    time_of_day: str
    git_velocity_per_hour: float | None = None
    git_velocity_per_day: float | None = None
    git_conventional_compliance: float | None = None
    git_breaking_changes: int | None = None
    git_avg_commits_per_week: float | None = None
    git_most_active_hour: int | None = None
    git_most_active_day: int | None = None
    lines_changed: int = 0  # added and deleted by its commits
    lines_surviving: int | None = None  # lines of its commits that HEAD still holds
    tokens: int | None = None
    waste_tokens: int | None = None
    cost: float | None = None  # USD at API prices
    user_turns: int = 0
    files_written: frozenset[str] = frozenset()  # relative to the work tree

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; tokens and USD per commit and per surviving line are None where nothing can be divided by."""
        rates = {"%s_per_%s" % (name, unit): ratio(getattr(self, name), count) for name in ("tokens", "cost")
                 for unit, count in (("commit", self.commit_count), ("surviving_line", self.lines_surviving))}
        return dict(vars(self), **rates, started_at=self.started_at.isoformat(),
                    ended_at=self.ended_at and self.ended_at.isoformat(), files_written=sorted(self.files_written))


# ---- Sources and storage ----

class GitMetricsReader(Protocol):
    def root(self, path: str) -> str: ...
    def history(self, root: str, since: datetime, until: datetime, author: str, spans: Sequence) -> History: ...
    def surviving_lines(self, root: str, commits: Sequence[Commit]) -> tuple[dict[str, int], bool]: ...


class SessionSource(Protocol):
    def sessions(self, root: str, since: datetime | None, until: datetime | None) -> list[ExtendedSessionMetrics]: ...


class StoreSource:
    """The sessions of a SessionOptimizer store."""

    def __init__(self, optimizer: SessionOptimizer) -> None:
        self.optimizer = optimizer

    def sessions(self, root: str, since: datetime | None = None, until: datetime | None = None) -> list:
        """Those that started in the work tree `root` in the period, newest first; a warning names a damaged one."""
        found = []
        for head in self.optimizer.list_sessions(since=since, limit=sys.maxsize):
            start, origin = parse_time(head.started_at), head.metadata.get("source")
            places = [dict(origin).get("cwd") if isinstance(origin, dict) else ""]
            places += map(head.metadata.get, ("cwd", "project_path"))
            place = next((place for place in places if isinstance(place, str) and place), "")
            if start and start <= (until or start) and work_tree_of(place) == root:
                try:
                    session = self.optimizer.get_session(head.id)
                    found += [self._record(session, place, root, start)] if session else []  # None: just deleted
                except SessionOptimizerError as error:
                    warnings.warn("left out: %s" % error, stacklevel=2)
        return found

    def _record(self, session: Any, place: str, root: str, start: datetime) -> ExtendedSessionMetrics:
        report, events = self.optimizer.analyze(session.id), session.events
        times = filter(None, (parse_time(event.timestamp) for event in events))
        end = parse_time(session.ended_at) or max(times, default=start)
        named = (os.path.realpath(os.path.join(place, name)) for event in events for name in written_by(event))
        written = frozenset(os.path.relpath(path, root) for path in named if path.startswith(os.path.join(root, "")))
        wasted = Counter()
        for issue in report.issues:
            for key, claim in issue.claims.items():
                size = claim if isinstance(claim, (int, float)) else sum(claim)
                wasted[key] = max(wasted[key], size)  # an event is charged once, to its largest claim
        first, second = (efficiency(half, wasted) for half in (events[:len(events) // 2], events[len(events) // 2:]))
        return ExtendedSessionMetrics(
            session.id, root, start, end, session.duration_seconds / 60, sum("checkpoint" in e.data for e in events),
            None, first, second, second - first, report.efficiency_score, len(written),
            sorted({e.data["tool"] for e in events if isinstance(e.data.get("tool"), str)}), language_of(written),
            ("night", "morning", "afternoon", "evening")[bisect((5, 12, 17, 21), start.astimezone().hour) % 4],
            tokens=session.total_tokens, waste_tokens=report.total_waste_tokens, cost=session.estimated_cost,
            files_written=written,
            user_turns=sum(e.event_type is EventType.USER_MESSAGE and not e.agent_id for e in events))


def written_by(event: Any) -> list[str]:
    """The paths an event wrote, also those a shell command changed where the reader of the transcript knew them."""
    named = event.data.get("changes") or []
    if event.event_type is EventType.FILE_WRITE:
        named = event.data.get("file_paths") or [event.data.get("file_path") or event.data.get("path")]
    return [name for name in named if isinstance(name, str) and name not in ("", "*", "?")]


def efficiency(events: Sequence[Any], wasted: dict[str, int]) -> float:
    """Share of the events' tokens that no finding claims, 0 to 100."""
    total = sum(event.tokens_input + event.tokens_output for event in events)
    return max(0.0, 100.0 * (1 - (ratio(sum(wasted[event.id] for event in events), total) or 0)))


class SessionBuddySource:
    """The table session_metrics of session-buddy's DuckDB file, opened read-only; its times are local."""

    def __init__(self, db_path: str = SESSION_BUDDY_DB) -> None:
        self.db_path = os.path.expanduser(db_path)

    def sessions(self, root: str, since: datetime | None = None, until: datetime | None = None) -> list:
        try:
            import duckdb
        except ImportError as error:
            raise InsightsError("reading %s takes the package duckdb: pip install duckdb" % self.db_path) from error
        names = list(ExtendedSessionMetrics.__dataclass_fields__)[:15]
        try:
            with closing(duckdb.connect(self.db_path, read_only=True)) as connection:
                query = "SELECT %s FROM session_metrics ORDER BY started_at DESC" % ", ".join(names)
                rows = [dict(zip(names, row)) for row in connection.execute(query).fetchall()]
        except duckdb.Error as error:
            raise InsightsError("%s: %s" % (self.db_path, error)) from error
        found = []
        for row in rows:
            row.update({name: row[name] and row[name].astimezone() for name in ("started_at", "ended_at")},
                       tools_used=row["tools_used"] or [], files_modified=row["files_modified"] or 0)
            start = row["started_at"]
            if work_tree_of(row["project_path"]) == root and (since or start) <= start <= (until or start):
                found.append(ExtendedSessionMetrics(**row))
        return found


# ---- Joining ----

RELATIONS = (  # type, unit, what the two sides are
    ("quality_vs_velocity", "sessions", "efficiency", "commits per hour"),
    ("conventional_vs_quality", "sessions", "conventional share of commits", "efficiency"),
    ("waste_vs_commits", "days", "wasted tokens", "commits"),
    ("cost_vs_surviving_lines", "sessions", "cost", "surviving lines"))


@dataclass
class Report:
    history: History
    sessions: list[ExtendedSessionMetrics]
    claimed: int  # commits made in a session
    complete: bool  # whether every touched file was searched for surviving lines
    insights: list[CorrelationInsight] = field(default_factory=list)


def claim(commits: Sequence[Commit], sessions: Sequence[ExtendedSessionMetrics]) -> dict[str, list[Commit]]:
    """{session id: its commits}. A commit goes to the session that ran when it was authored and wrote most of its
    files; a session that wrote files has no claim on a commit that touches none of them."""
    claimed = defaultdict(list)
    for commit in commits:
        names = {name for change in commit.files for name in change[2:]}
        running = (s for s in sessions if span(s)[0] <= commit.authored <= span(s)[1])
        able = [(len(names & s.files_written), s.started_at, s.session_id) for s in running
                if names & s.files_written or not s.files_written]
        if able:
            claimed[max(able)[2]].append(commit)
    return claimed


def span(session: ExtendedSessionMetrics) -> tuple[datetime, datetime]:
    """Start and end, the start on a whole second as git's times are."""
    return session.started_at.replace(microsecond=0), session.ended_at or session.started_at


def with_git(session: ExtendedSessionMetrics, commits: list[Commit], lines: dict[str, int]) -> ExtendedSessionMetrics:
    own = History(session.project_path, *span(session))
    for commit in commits:
        own.add(commit)
    pace, paths = own.velocity(), [change[2] for commit in commits for change in commit.files]
    return replace(
        session, commit_count=len(commits) if session.commit_count is None else session.commit_count,
        files_modified=session.files_modified or len(set(paths)),
        primary_language=session.primary_language or language_of(paths),
        git_velocity_per_hour=pace.commit_velocity_per_hour, git_velocity_per_day=pace.commit_velocity_per_day,
        git_conventional_compliance=pace.conventional_compliance_rate if commits else None,
        git_breaking_changes=pace.breaking_change_count, git_avg_commits_per_week=pace.avg_commits_per_week,
        git_most_active_hour=pace.most_active_hour, git_most_active_day=pace.most_active_day,
        lines_changed=own.added + own.deleted, lines_surviving=sum(lines[c.sha] for c in commits))


def collect(reader: GitMetricsReader, source: SessionSource, path: str, since: datetime, until: datetime,
            author: str = "") -> Report:
    """Read sessions and history of the period, join them and compute the insights."""
    root = reader.root(path)
    sessions = source.sessions(root, since, until)
    history = reader.history(root, since, until, author, [span(session) for session in sessions])
    claimed = claim(history.commits, sessions)
    commits = [commit for own in claimed.values() for commit in own]
    lines, complete = reader.surviving_lines(root, commits)
    report = Report(history, [with_git(s, claimed[s.session_id], lines) for s in sessions], len(commits), complete)
    report.insights = insights_of(report)
    return report


def insights_of(report: Report, seed: int = 0) -> list[CorrelationInsight]:
    """The four relations; pairs with an unknown side are left out."""
    waste = Counter()
    for s in report.sessions:
        if s.waste_tokens is not None:
            waste[s.started_at.astimezone().date()] += s.waste_tokens
    pairs = ([(s.avg_quality, s.git_velocity_per_hour) for s in report.sessions],
             [(s.git_conventional_compliance, s.avg_quality) for s in report.sessions],
             [(tokens, report.history.days[day]) for day, tokens in waste.items()],
             [(s.cost, s.lines_surviving) for s in report.sessions])
    known = [[pair for pair in side if None not in pair] for side in pairs]
    tests = sum(len(side) >= MIN_POINTS for side in known)
    return [correlate(kind, side, unit, labels, tests=tests, seed=seed)
            for (kind, unit, *labels), side in zip(RELATIONS, known)]


class SessionBuddyIntegration:
    """The answers for other programs. The asynchronous methods work in a thread, off the event loop."""

    def __init__(self, reader: GitMetricsReader, source: SessionSource, storage: CorrelationStorage | None) -> None:
        self.reader, self.source, self.storage = reader, source, storage

    def report(self, path: str, since: datetime, until: datetime, author: str = "") -> Report:
        """Read, join and correlate a period; the insights are stored when there is a storage."""
        report = collect(self.reader, self.source, path, since, until, author)
        for insight in report.insights if self.storage else ():
            self.storage.store_insight(insight, report.history.root)
        return report

    async def calculate_correlations(self, project_path: str, days_back: int = 30) -> list[CorrelationInsight]:
        """The four insights of the last days."""
        now = datetime.now(timezone.utc)
        work = asyncio.get_running_loop().run_in_executor(
            None, self.report, project_path, now - timedelta(days=days_back), now)
        return (await work).insights

    async def collect_extended_session_metrics(self, session_id: str,
                                               project_path: str) -> ExtendedSessionMetrics | None:
        """One session with its git figures; None when no session of that id ran in the repository."""
        return await asyncio.get_running_loop().run_in_executor(None, self._extended, session_id, project_path)

    def _extended(self, session_id: str, project_path: str) -> ExtendedSessionMetrics | None:
        sessions = self.source.sessions(self.reader.root(project_path), None, None)
        period = next((span(s) for s in sessions if s.session_id == session_id), None)
        if period is None:
            return None
        joined = collect(self.reader, self.source, project_path, period[0] - timedelta(days=1), period[1]).sessions
        return next(s for s in joined if s.session_id == session_id)


# ---- Reports ----

def summary_of(report: Report, author: str, splits: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the reports show, JSON-ready. Money is USD at API prices; rates with nothing to divide by are None."""
    history, sessions = report.history, report.sessions
    spent = {name: sum(getattr(s, name) or 0 for s in sessions) for name in ("tokens", "waste_tokens", "cost")}
    surviving = sum(s.lines_surviving or 0 for s in sessions)
    notes = (
        ("Shallow clone: older commits are missing, and the oldest here counts without its lines.", history.shallow),
        ("No commits in this period.", not history.total),
        ("No recorded session of this period ran in this repository.", not sessions),
        ("Not every file could be searched in time: surviving lines are a lower bound.", not report.complete))
    return {
        "repository": history.root, "author": author, "notes": [text for text, holds in notes if holds],
        "spent": dict(spent, sessions=len(sessions)),
        "committed": dict(commits=history.total, merges=history.merges, added=history.added, deleted=history.deleted,
                          in_sessions=report.claimed, changed_in_sessions=sum(s.lines_changed for s in sessions),
                          surviving=surviving),
        "per_commit": {name: ratio(spent[name], report.claimed) for name in ("tokens", "cost")},
        "per_surviving_line": {name: ratio(spent[name], surviving) for name in ("tokens", "cost")},
        "velocity": asdict(history.velocity()), "insights": [vars(insight) for insight in report.insights],
        "split": splits, "sessions": [session.to_dict() for session in sessions]}


def amount(value: float | None) -> str:
    return "\u2013" if value is None else format(value, ",.3g" if abs(value) < 100 else ",.0f")


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, sentence) rows of the text and HTML reports; money in USD."""
    pace, price = summary["velocity"], (summary[per]["cost"] for per in ("per_commit", "per_surviving_line"))
    numbers = dict(pace, **summary["spent"], **summary["committed"], share=100 * pace["conventional_compliance_rate"])
    rows = [(label, text.format(**numbers)) for label, text in (
        ("Period", "{period_start:%Y-%m-%d} to {period_end:%Y-%m-%d}"),
        ("Spent", "${cost:,.2f} at API prices: {tokens:,} tokens ({waste_tokens:,} wasted) in {sessions:,} sessions"),
        ("Committed", "{commits:,} commits and {merges:,} merges, +{added:,} -{deleted:,} lines"),
        ("In session", "{in_sessions:,} of them changed {changed_in_sessions:,} lines; {surviving:,} are at HEAD"),
        ("Pace", "{commit_velocity_per_day:.2f} commits a day, {avg_commits_per_week:.1f} a week"),
        ("Messages", "{share:.0f}% conventional, {breaking_change_count:,} breaking"))]
    rows.append(("Price", "$%s per commit made in a session, $%s per surviving line" % tuple(map(amount, price))))
    if pace["total_commits"]:
        rows.append(("Busiest", "%s, and %02d:00" % (WEEKDAYS[pace["most_active_day"]], pace["most_active_hour"])))
    for row in summary["split"]:
        change = "median %s -> %s, difference %s (95%% %s to %s), " % tuple(map(amount, (
            row["before"], row["after"], row["difference"], *row["interval"]))) if row["interval"] else ""
        rows.append(("Split", "{measure}: {}{verdict} ({n_before} and {n_after} sessions)".format(change, **row)))
    return rows + [("Note", note) for note in summary["notes"]]


def on_grid(points: Sequence[tuple[float, float]], width: float, height: float) -> list[tuple[float, float]]:
    """The points stretched to a field of that size, y upwards."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [((x - min(xs)) / (max(xs) - min(xs) or 1) * width, (max(ys) - y) / (max(ys) - min(ys) or 1) * height)
            for x, y in points]


def to_text(summary: dict[str, Any]) -> str:
    lines = ["What the tokens bought: " + plain(os.path.basename(summary["repository"])), ""]
    lines += ["%-10s %s" % row for row in facts(summary)]
    for insight in summary["insights"]:
        lines += ["", insight["correlation_type"] + ": " + insight["description"]]
        if len(insight["points"]) >= MIN_POINTS:
            cells = Counter((round(x), round(y)) for x, y in on_grid(insight["points"], 59, 9))
            lines += ["  |" + "".join(" .oO@"[min(cells[x, y], 4)] for x in range(60)).rstrip() for y in range(10)]
            lines += ["  +" + "-" * 60, "   across: %s; up: %s" % tuple(insight["labels"])]
    return "\n".join(lines)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%(title)s</title><style>
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
th{text-align:left;padding-right:1em}svg{max-width:40em}path{fill:none;stroke:currentColor}circle{fill:#2a7de1}
</style><h1>%(title)s</h1><table>%(rows)s</table>%(plots)s</html>"""
PLOT = '<h2>%s</h2><p>%s</p><svg viewBox="0 0 500 200"><path d="M5 0V195H500"/>%s</svg><p>across: %s; up: %s</p>'


def to_html(summary: dict[str, Any]) -> str:
    """One page without scripts or links, light or dark as the reader's system is."""
    plots = []
    for insight in summary["insights"]:
        places = on_grid(insight["points"], 480, 180)
        dots = ('<circle cx="%.1f" cy="%.1f" r="4"/>' % (x + 12, y + 6) for x, y in places)
        words = (insight["correlation_type"], insight["description"], *insight["labels"])
        heading, text, across, up = map(html.escape, words)
        plots.append(PLOT % (heading, text, "".join(dots), across, up))
    rows = ("<tr><th>%s</th><td>%s</td></tr>" % tuple(map(html.escape, row)) for row in facts(summary))
    title = html.escape("What the tokens bought: " + plain(os.path.basename(summary["repository"])))
    return PAGE % {"title": title, "rows": "".join(rows), "plots": "".join(plots)}


FORMATS = {"text": to_text, "html": to_html,
           "json": lambda summary: json.dumps(summary, indent=2, default=datetime.isoformat)}


# ---- Command line ----

def create_session_buddy_integration(
        git_metrics_reader: GitMetricsReader | None = None, db_path: str | None = None,
        insights_db_path: str | None = None, *, storage_path: str | None = None,
        store_insights: bool = True) -> SessionBuddyIntegration:
    """Wire an integration. Sessions come from the SessionOptimizer store (at `storage_path`), or from session-buddy's
    file `db_path`; insights go to insights.db in the store, or to `insights_db_path`, or nowhere."""
    optimizer = SessionOptimizer(storage_path)
    insights = insights_db_path or os.path.join(str(optimizer.storage_path), "insights.db")
    return SessionBuddyIntegration(git_metrics_reader or GitReader(),
                                   SessionBuddySource(db_path) if db_path else StoreSource(optimizer),
                                   SqliteCorrelationStorage(insights) if store_insights else None)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the tokens bought.", allow_abbrev=False)
    parser.add_argument("--repo", default=".", help="the git work tree (default: the current directory)")
    parser.add_argument("--days", type=int, default=30, help="how far back to look (default: 30)")
    parser.add_argument("--author", default="", help="only commits of authors whose name or address contains this")
    parser.add_argument("--split", metavar="DATE", help="compare the sessions before and after a date")
    parser.add_argument("--format", choices=sorted(FORMATS), default="text")
    parser.add_argument("--store", metavar="DIR", help="the SessionOptimizer store")
    parser.add_argument("--session-buddy", nargs="?", const=SESSION_BUDDY_DB, metavar="FILE",
                        help="read the sessions from session-buddy's DuckDB file instead (%(const)s)")
    parser.add_argument("--save", action="store_true", help="keep the insights in insights.db in the store")
    options = parser.parse_args(argv)
    if not 1 <= options.days <= 36_500:
        parser.error("--days takes 1 to 36500")
    if options.split and not parse_time(options.split):
        parser.error("--split takes a date as 2026-05-01, not %r" % options.split)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options, now = parse_arguments(argv), datetime.now(timezone.utc)
    try:
        wired = create_session_buddy_integration(db_path=options.session_buddy, storage_path=options.store,
                                                 store_insights=options.save)
        report = wired.report(options.repo, now - timedelta(days=options.days), now, options.author)
    except (InsightsError, SessionOptimizerError, OSError, sqlite3.Error) as error:
        print("git_insights: %s" % plain(error), file=sys.stderr)
        return 1
    splits = split_at(report.sessions, parse_time(options.split)) if options.split else []
    text = FORMATS[options.format](summary_of(report, options.author, splits))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:  # a terminal that cannot show a dash still gets its numbers
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
