#!/usr/bin/env python3
"""What the tokens bought: agent sessions joined with the git history of where they worked.

    python3 examples/git_insights.py --repo . --days 30
    python3 examples/git_insights.py --repo a --repo b --days 90 --split 2026-05-01 --format html

A session belongs to the repository of its working directory, a commit to the session that the best
evidence names. Correlations are computed, never assumed; what cannot be shown is "no evidence".
docs/git.md explains every number. Exit status: 0 done, 1 failed, 2 bad command line.
"""
from __future__ import annotations

import argparse
import asyncio
import html
import json
import operator
import os
import re
import shlex
import sqlite3
import sys
import warnings
from bisect import bisect
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from functools import reduce
from statistics import fmean, mode
from types import SimpleNamespace
from typing import (
    Any, Iterable, Mapping, NamedTuple, Optional, Protocol, Sequence, runtime_checkable)

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # from a clone: the module's directory and this one
from git_history import (  # noqa: E402, F401
    Commit, GitReader, GitVelocityMetrics, History, InsightsError, language_of, ratio,
    repository_of)
from git_statistics import (  # noqa: E402
    MIN_POINTS, CorrelationInsight, CorrelationStorage, CorrelationStorageSQLite,
    NoOpCorrelationStorage, correlate, median_change, random, split_at)
from sessionoptimizer import (  # noqa: E402
    EventType, SessionOptimizer, SessionOptimizerError, parse_time, plain)

Moment = Optional[datetime]
SESSION_BUDDY_DB = "~/.claude/data/workflow_metrics.db"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOUR = 3_600  # seconds from a write to the commit that may hold it
UNTIMED = 120  # seconds a command of unknown duration may have taken
NEAR = 100  # lines of a transcript within which a command's output follows it
COMMITS = re.compile(r"\bgit(?:\s+-[cC]\s+\S+|\s+--?[\w-]+(?:=\S+)?)*\s+commit\b")
MESSAGE = re.compile(r"""\s(?:-[a-z]*m|--message)[ =]?(["'])(.*?)(?:\1|\n|$)""", re.S)
ADDED_TREE = re.compile(r"\bgit\b[^\n;&|]*\sworktree\s+add\s+([^\n;&|]+)")
PRINTED = re.compile(  # "[branch 1a2b3c4] subject", up to a quote or escape of the JSON around it
    rb'\[(?:[^\[\]\s"\\]+(?: \(root-commit\))?|detached HEAD) ([0-9a-f]{7,40})\] ([^"\\\n]+)')
CLOUD_ID = re.compile(rb"Claude-Session: *[^\s\"\\]*?(session_\w+)")
CHECKPOINT = re.compile(r"/([0-9a-f]{2})/([0-9a-f]{10})/\d+/[^/\n]+$", re.M)  # Entire's copy
DRIVE = re.compile(r"[A-Za-z]:[\\/]")
WORKTREE = re.compile(r"(.*?)(?:/\.[^/]+)?[/._-]+worktrees/[^/]+(?:/|$)")  # group 1: the repository


# ---- Records ----

class Made(NamedTuple):
    """A `git commit` that a session ran: when, the ids it printed, how the subjects begin."""
    start: float
    end: float
    ids: frozenset[str]
    subjects: frozenset[str]


class Traces(NamedTuple):
    """What a session left that tells its commits."""
    ids: frozenset[str] = frozenset()  # names for the session, in lower case
    writes: Mapping[str, list[float]] = {}  # file, relative to its work tree: times, ascending
    made: Sequence[Made] = ()


@dataclass(frozen=True)
class ExtendedSessionMetrics:
    """One session and what it left in git; quality is the efficiency score, 0 to 100; None is
    unknown."""
    session_id: str
    project_path: str
    started_at: datetime
    ended_at: Moment
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
    traces: Traces | None = None  # None: the source records none

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; tokens and USD per commit and per surviving line, None without a divisor."""
        rates = {"%s_per_%s" % (name, unit): ratio(getattr(self, name), count)
                 for name in ("tokens", "cost") for unit, count in (
                     ("commit", self.commit_count), ("surviving_line", self.lines_surviving))}
        fields = {name: value for name, value in vars(self).items() if name != "traces"}
        return dict(fields, **rates, started_at=self.started_at.isoformat(),
                    ended_at=self.ended_at and self.ended_at.isoformat(),
                    files_written=sorted(self.traces.writes if self.traces else ()))


SESSION_BUDDY_FIELDS = list(ExtendedSessionMetrics.__dataclass_fields__)[:15]


def metrics_of(row: Mapping[str, Any]) -> ExtendedSessionMetrics:
    """A record of the fifteen fields that session-buddy keeps; times without a zone are local."""
    values = {name: row.get(name) for name in SESSION_BUDDY_FIELDS}
    for name in ("started_at", "ended_at"):
        at = values[name]
        values[name] = at.astimezone() if isinstance(at, datetime) else parse_time(at or "")
    for name, default in (("tools_used", []), ("files_modified", 0), ("checkpoint_count", 0)):
        values[name] = values[name] or default
    return ExtendedSessionMetrics(**values)


# ---- Sources ----

@runtime_checkable
class GitMetricsReader(Protocol):
    def get_metrics(self, repository_path: str, metric_types: list[str] | None = None,
                    since: Moment = None, until: Moment = None) -> list[Any]: ...
    def get_latest_metrics(self, repository_path: str) -> dict[str, Any]: ...


@runtime_checkable
class SessionBuddyClient(Protocol):
    async def get_session_metrics(
            self, session_id: str | None = None, project_path: str | None = None,
            start_date: Moment = None, end_date: Moment = None) -> Sequence[Any]: ...
    async def get_workflow_metrics(self, project_path: str | None = None, start_date: Moment = None,
                                   end_date: Moment = None) -> Any: ...


class NoOpGitMetricsReader:
    """Knows no repository."""

    def get_metrics(self, repository_path: str, metric_types: list[str] | None = None,
                    since: Moment = None, until: Moment = None) -> list[Any]:
        return []

    def get_latest_metrics(self, repository_path: str) -> dict[str, Any]:
        return {}


class SessionClient:
    """The asynchronous answers of a source whose `sessions` gives records."""

    def sessions(self, root: str, since: Moment = None, until: Moment = None) -> list:
        """Those that started in the work tree `root` in the period; of no source, none."""
        return []

    async def get_session_metrics(
            self, session_id: str | None = None, project_path: str | None = None,
            start_date: Moment = None, end_date: Moment = None) -> list[dict]:
        """The sessions of a project (default: of the current directory) as `to_dict` gives them."""
        found = await off_loop(self.sessions, project_path or ".", start_date, end_date)
        return [s.to_dict() for s in found if session_id in (None, s.session_id)]

    async def get_workflow_metrics(self, project_path: str | None = None, start_date: Moment = None,
                                   end_date: Moment = None) -> SimpleNamespace | None:
        """Totals and means of the sessions, None without any. The trend compares the two halves and
        is "stable" unless the interval of the change leaves zero out."""
        found = await off_loop(self.sessions, project_path or ".", start_date, end_date)
        known = sorted((s.started_at, s.avg_quality) for s in found if s.avg_quality is not None)
        quality = [score for _, score in known]
        change = median_change(quality[:len(quality) // 2], quality[len(quality) // 2:],
                               random.Random(0))["verdict"]
        trend = {"higher after": "improving", "lower after": "declining"}.get(change, "stable")
        minutes = [s.duration_minutes for s in found if s.duration_minutes is not None]
        return SimpleNamespace(
            total_sessions=len(found), avg_quality_score=fmean(quality) if quality else None,
            quality_trend=trend, total_commits=sum(s.commit_count or 0 for s in found),
            avg_session_duration_minutes=fmean(minutes) if minutes else None) if found else None


class NoOpSessionBuddyClient(SessionClient):
    """Knows no session."""


class Places:
    """The paths of one repository: its work trees now, those that were removed, and `--map`."""

    def __init__(self, root: str, maps: Iterable[tuple[str, str]] = ()) -> None:
        self.common = repository_of(root)[1]
        known = GitReader().trees(root) if self.common else []
        self.trees = set(map(slashed, [root, *known]))
        clean = [(slashed(old).rstrip("/"), slashed(new).rstrip("/")) for old, new in maps]
        self.maps = [(re.compile(re.escape(old).replace(r"\*", "[^/]+") + r"(?=/|$)"), new)
                     for old, new in clean]

    def here(self, path: str) -> str:
        """A recorded path as this machine has it."""
        path = slashed(path)
        for old, new in self.maps:
            if old.match(path):
                return new + path[old.match(path).end():]
        return path

    def joined(self, place: str, name: str) -> str:
        name = self.here(name)
        return os.path.normpath(name if DRIVE.match(name) else os.path.join(place, name))

    def inside(self, path: str) -> str | None:
        """A path relative to its work tree; None outside of all. Also below `.worktrees/NAME`,
        `.claude/worktrees/NAME` and beside, in `REPOSITORY-worktrees/NAME`, when these are gone."""
        told = WORKTREE.match(path)
        if told and told.group(1) in self.trees:
            return path[told.end():]
        trees = [tree for tree in self.trees if path == tree or path.startswith(tree + "/")]
        return path[len(max(trees, key=len)) + 1:] if trees else None

    def hold(self, place: str, source: Mapping[str, Any]) -> bool:
        """Whether a session's directory belongs here; the work tree it tells of is remembered."""
        tree, common = repository_of(place)
        told = source.get("repository")  # as it was when the session was read
        if common and common == self.common:
            below = os.path.relpath(os.path.realpath(place), tree)
            self.trees.add(slashed(tree))
            if below == "." or place.endswith("/" + below):  # the same by a symbolic link
                self.trees.add(place if below == "." else place[:-len(below) - 1])
            return True
        if told:
            ours = os.path.realpath(self.here(told)) == self.common
            self.trees |= {self.here(source.get("work_tree") or place)} if ours else set()
            return ours
        return not os.path.isdir(place) and self.inside(place) is not None

    def learn(self, command: str, place: str) -> None:
        """Remember the work tree that a `git worktree add` made."""
        for told in ADDED_TREE.finditer(command):
            try:
                words = shlex.split(told.group(1))
            except ValueError:  # cut off within quotes
                words = told.group(1).split()
            names = [word for before, word in zip([""] + words, words)
                     if not word.startswith("-") and before not in ("-b", "-B", "--reason")]
            path = self.joined(place, names[0]) if names else ""
            if path and not os.path.isdir(path):
                self.trees.add(path)


def slashed(path: str) -> str:
    return path.replace("\\", "/") if DRIVE.match(path) else path


class StoreSource(SessionClient):
    """The sessions of a SessionOptimizer store; `maps` are pairs of a path of another machine (`*`:
    any name) and the path here."""

    def __init__(self, optimizer: SessionOptimizer, maps: Iterable[tuple[str, str]] = ()) -> None:
        self.optimizer, self.maps = optimizer, list(maps)

    def sessions(self, root: str, since: Moment = None, until: Moment = None) -> list:
        """Newest first; a warning names a damaged one."""
        root = repository_of(root)[0] or root
        places, found, open_heads, kept = Places(root, self.maps), [], [], defaultdict(set)
        for head in self.optimizer.list_sessions(since=since, limit=sys.maxsize):
            start, origin = parse_time(head.started_at), head.metadata.get("source")
            origin = dict(origin) if isinstance(origin, dict) else {}
            named = (origin.get("cwd"), head.metadata.get("cwd"), head.metadata.get("project_path"))
            place = next((name for name in named if isinstance(name, str) and name), "")
            paths = "\n".join(map(slashed, [origin.get("path") or "", *origin.get("paths", ())]))
            origin["checkpoints"] = kept[origin.get("session_id") or head.id]  # of all its copies
            origin["checkpoints"].update(map("".join, CHECKPOINT.findall(paths)))
            if place and start and start <= (until or start):
                open_heads.append((head, start, places.here(place), origin))
        while True:  # a session may tell of a work tree in which others ran
            ours = [told for told in open_heads if places.hold(*told[2:])]
            found += [record for told in ours for record in self._read(places, root, *told)]
            open_heads = [told for told in open_heads if told not in ours]
            if not ours:
                return sorted(found, key=lambda record: record.started_at, reverse=True)

    def _read(self, places: Places, root: str, head: Any, start: datetime, place: str,
              origin: Mapping) -> list[ExtendedSessionMetrics]:
        try:
            session = self.optimizer.get_session(head.id)
            if not session or not session.events and "calls_elsewhere" in session.metadata:
                return []  # just deleted, or a copy of what other files tell
            return [self._record(session, start, root, traces_of(session, places, place, origin))]
        except SessionOptimizerError as error:
            warnings.warn("left out: %s" % error, stacklevel=2)
            return []

    def _record(self, session: Any, start: datetime, root: str,
                traces: Traces) -> ExtendedSessionMetrics:
        report, events = self.optimizer.analyze(session.id), session.events
        times = filter(None, (parse_time(event.timestamp) for event in events))
        end = max(filter(None, (parse_time(session.ended_at), *times)), default=start)
        wasted = Counter()
        for issue in report.issues:
            for key, claim in issue.claims.items():
                size = claim if isinstance(claim, (int, float)) else sum(claim)
                wasted[key] = max(wasted[key], size)  # charged once, to the largest claim
        metered, middle = session.total_tokens > 0, len(events) // 2
        first, second = (efficiency(half, wasted) for half in (events[:middle], events[middle:]))
        delta = second - first if None not in (first, second) else None
        part_of_day = bisect((5, 12, 17, 21), start.astimezone().hour) % 4
        return ExtendedSessionMetrics(
            session.id, root, start, end, session.duration_seconds / 60,
            sum("checkpoint" in e.data for e in events), None, first, second, delta,
            report.efficiency_score if metered else None, len(traces.writes),
            sorted({e.data["tool"] for e in events if isinstance(e.data.get("tool"), str)}),
            language_of(list(traces.writes)),
            ("night", "morning", "afternoon", "evening")[part_of_day], traces=traces,
            tokens=session.total_tokens if metered else None,
            waste_tokens=report.total_waste_tokens if metered else None,
            cost=session.estimated_cost if metered else None,
            user_turns=sum(e.event_type is EventType.USER_MESSAGE and not e.agent_id
                           for e in events))


def efficiency(events: Sequence[Any], wasted: Mapping[str, int]) -> float | None:
    """Share of the events' tokens that no finding claims, 0 to 100; None without tokens."""
    total = sum(event.tokens_input + event.tokens_output for event in events)
    share = ratio(sum(wasted[event.id] for event in events), total)
    return None if share is None else max(0.0, 100.0 * (1 - share))


def traces_of(session: Any, places: Places, place: str, origin: Mapping[str, Any]) -> Traces:
    writes, ran = defaultdict(list), []
    names = [session.id, origin.get("session_id"), *origin.get("checkpoints", ())]
    for event in session.events:
        at, command = seconds(event), event.data.get("command")
        for name in written_by(event):
            path = places.inside(places.joined(place, name))
            if path:
                writes[path].append(at)
        if isinstance(command, str):
            places.learn(command, place)
            ran += [event] if COMMITS.search(command) else []
    made, aliases = made_by(ran, origin.get("path") or "")
    ids = frozenset(name.lower() for name in [*names, *aliases] if isinstance(name, str))
    return Traces(ids, {name: sorted(times) for name, times in writes.items()}, made)


def seconds(event: Any) -> float:
    moment = parse_time(event.timestamp)
    return moment.timestamp() if moment else 0.0


def written_by(event: Any) -> list[str]:
    """The paths an event wrote, also by a shell command where the transcript's reader knew them."""
    named = event.data.get("changes") or []
    if event.event_type is EventType.FILE_WRITE:
        one = event.data.get("file_path") or event.data.get("path")
        named = event.data.get("file_paths") or [one]
    return [name for name in named if isinstance(name, str) and name not in ("", "*", "?")]


def opening(subject: str) -> str:
    """What of a subject is the same within quotes and JSON: its ASCII up to a quote or escape."""
    return re.match(r"""[^"'\\`$\x00-\x1f\x7f-\U0010ffff]*""", subject).group()[:60].strip()


def made_by(events: Sequence[Any], transcript: str) -> tuple[list[Made], set[str]]:
    """The commits that these commands made, and the cloud ids they signed with. The store keeps ids
    only, so subjects are looked up in the transcript, where the events point, if it is there."""
    files, printed, aliases, made = defaultdict(dict), defaultdict(list), set(), []
    for event in events:
        files[event.data.get("path") or transcript][event.data.get("line") or 0] = event.id
    for name, at in files.items():
        starts = sorted(at)
        try:
            with open(name, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    place = bisect(starts, number)
                    if place and number - starts[place - 1] <= NEAR:
                        printed[at[starts[place - 1]]] += PRINTED.findall(line)
                        aliases |= set(map(bytes.decode, CLOUD_ID.findall(line)))
        except OSError:  # gone, or never a file: times and subjects must do
            continue
    for event in events:
        start, lasted = seconds(event), event.duration_ms / 1_000
        ids = {found.decode() for found, _ in printed[event.id]}
        told = [text for _, text in MESSAGE.findall(event.data["command"])]
        told += [subject.decode("utf-8", "replace") for _, subject in printed[event.id]]
        made.append(Made(start - (0 if lasted else UNTIMED), start + (lasted or UNTIMED),
                         frozenset(ids.union(event.data.get("commits") or ())),
                         frozenset(filter(None, map(opening, told)))))
    return made, aliases


class SessionBuddyDirectClient(SessionClient):
    """The table session_metrics of session-buddy's DuckDB file, opened read-only."""

    def __init__(self, db_path: str = SESSION_BUDDY_DB) -> None:
        self.db_path = os.path.expanduser(db_path)

    def sessions(self, root: str, since: Moment = None, until: Moment = None) -> list:
        try:
            import duckdb
        except ImportError as error:
            reason = "reading %s takes the package duckdb: pip install duckdb" % self.db_path
            raise InsightsError(reason) from error
        names = SESSION_BUDDY_FIELDS
        query = "SELECT %s FROM session_metrics ORDER BY started_at DESC" % ", ".join(names)
        try:
            with closing(duckdb.connect(self.db_path, read_only=True)) as connection:
                rows = connection.execute(query).fetchall()
        except duckdb.Error as error:
            raise InsightsError("%s: %s" % (self.db_path, error)) from error
        records = [metrics_of(dict(zip(names, row))) for row in rows]
        common = repository_of(root)[1]
        return [s for s in records if repository_of(s.project_path)[1] == common
                and (since or s.started_at) <= s.started_at <= (until or s.started_at)]


# ---- Joining ----

RELATIONS = (  # type, unit, what the two sides are
    ("quality_vs_velocity", "sessions", "efficiency", "commits per hour"),
    ("conventional_vs_quality", "sessions", "conventional share of commits", "efficiency"),
    ("waste_vs_commits", "days", "wasted share of tokens", "commits"),
    ("cost_vs_surviving_lines", "sessions", "cost", "surviving lines"))


FIGURES = (  # field of a session, metric type of the readers' protocol, how several are one
    ("git_velocity_per_hour", "commit_velocity_per_hour", fmean),
    ("git_velocity_per_day", "commit_velocity_per_day", fmean),
    ("git_conventional_compliance", "conventional_compliance_rate", fmean),
    ("git_breaking_changes", "breaking_changes", sum),
    ("git_avg_commits_per_week", "avg_commits_per_week", fmean),
    ("git_most_active_hour", "most_active_hour", mode),
    ("git_most_active_day", "most_active_day", mode))


class Join(NamedTuple):
    commit: str
    session: str
    evidence: str
    confidence: float  # 0 to 1


class Joiner:
    """Gives commits, oldest first, to sessions: what a session wrote and committed is spent."""

    def __init__(self, sessions: Sequence[ExtendedSessionMetrics],
                 checkpoints: Mapping[str, Iterable[str]]) -> None:
        self.sessions = {s.session_id: s for s in sessions}
        self.named, self.writers = defaultdict(set), defaultdict(list)
        self.made, self.spent = [], {}
        for s in sessions:
            traces = s.traces or Traces()
            self.made += [(made, s) for made in traces.made]
            for name in traces.ids:
                self.named[name].add(s.session_id)
            for name in traces.writes:
                self.writers[name].append(s)
        for checkpoint, ids in checkpoints.items():  # one that is not here keeps its foreign name
            self.named[checkpoint].update(*(self.named.get(name.lower(), {name}) for name in ids))
        self.short = defaultdict(list)
        for made, s in self.made:
            for short in made.ids:
                self.short[short].append((made.start, s.session_id))
        self.lengths = sorted({len(short) for short in self.short}, reverse=True)

    def join(self, commit: Commit) -> Join | None:
        """The session of a commit by the best evidence there is; None where there is none, or where
        a trailer names a session that is not here."""
        at = commit.authored.timestamp()
        names = {name for change in commit.files for name in change[2:] if name}
        writers = {s.session_id: s for name in names for s in self.writers.get(name, ())}
        found = ((key, self.fresh(s, names, at)) for key, s in writers.items())
        wrote = {key: files for key, files in found if files[0]}
        for evidence, find in (("trailer", self.by_trailer), ("commit line", self.by_line),
                               ("commit command", self.by_command), ("files", self.by_files),
                               ("time", self.by_time)):
            session, confidence = find(commit, at, wrote)
            if session in self.sessions:
                self.spent.update({(session, name): at for name in names})
                return Join(commit.sha, session, evidence, round(confidence, 2))
            if session:
                return None
        return None

    def fresh(self, s: ExtendedSessionMetrics, names: Iterable[str],
              at: float) -> tuple[int, float]:
        """(how many of the files the session wrote in the hour before and did not commit since, the
        time of the last write)."""
        last = []
        for name in names:
            times = s.traces.writes.get(name, ())
            place = bisect(times, at + 1)  # a commit's time is cut to the second
            if place and times[place - 1] > max(at - HOUR, self.spent.get((s.session_id, name), 0)):
                last.append(times[place - 1])
        return len(last), max(last, default=0.0)

    def by_trailer(self, commit: Commit, at: float, wrote: Mapping) -> tuple[str | None, float]:
        named = {session for name in commit.named for session in self.named.get(name, ())}
        ours = sorted(named & set(self.sessions), key=lambda name: (wrote.get(name, (0, 0)), name))
        return (ours or sorted(named) or [None])[-1], 0.99

    def by_line(self, commit: Commit, at: float, wrote: Mapping) -> tuple[str | None, float]:
        told = [pair for length in self.lengths for pair in self.short.get(commit.sha[:length], ())]
        nearest = min(told, key=lambda pair: abs(pair[0] - at), default=(0, None))
        return nearest[1], 0.98

    def by_command(self, commit: Commit, at: float, wrote: Mapping) -> tuple[str | None, float]:
        """The command ran when the commit was authored (which a rebase keeps) and gave its subject,
        or gave none that is known and the session wrote some of the files."""
        able = []
        for made, s in self.made:
            if made.start - 2 <= at <= made.end + 2:
                same = any(commit.subject.startswith(text) for text in made.subjects)
                if same or s.session_id in wrote and not made.subjects:
                    able.append((same, wrote.get(s.session_id, (0, 0)), s.session_id))
        same, _, session = max(able, default=(False, None, None))
        return session, 0.95 if same else 0.8

    def by_files(self, commit: Commit, at: float, wrote: Mapping) -> tuple[str | None, float]:
        """Most of its files, then the newest write; surer the more files and the further ahead."""
        order = sorted(wrote, key=lambda name: (wrote[name], name))
        if not order:
            return None, 0.0
        count, files = wrote[order[-1]][0], len({change[2] for change in commit.files})
        rival = wrote[order[-2]][0] if len(order) > 1 else 0
        return order[-1], 0.9 * count / (count + rival) * (1 + min(1.0, count / files)) / 2

    def by_time(self, commit: Commit, at: float, wrote: Mapping) -> tuple[str | None, float]:
        """Only of sessions whose source records neither files nor commands."""
        able = [(s.started_at, s.session_id) for s in self.sessions.values()
                if s.traces is None and span(s)[0] <= commit.authored <= span(s)[1]]
        return max(able, default=(None, None))[1], 0.3


@dataclass
class Report:
    history: History
    sessions: list[ExtendedSessionMetrics]
    joins: list[Join]
    complete: bool  # whether every touched file was searched for surviving lines
    repositories: list[dict[str, Any]]
    insights: list[CorrelationInsight] = field(default_factory=list)

    def __add__(self, other: Report) -> Report:
        return Report(self.history + other.history, self.sessions + other.sessions,
                      self.joins + other.joins, self.complete and other.complete,
                      self.repositories + other.repositories)


def span(session: ExtendedSessionMetrics) -> tuple[datetime, datetime]:
    """Start, on a whole second as git's times are, and end."""
    return session.started_at.replace(microsecond=0), session.ended_at or session.started_at


def with_git(session: ExtendedSessionMetrics, commits: list[Commit],
             lines: Mapping[str, int]) -> ExtendedSessionMetrics:
    own = History(session.project_path, *span(session))
    for commit in commits:
        own.add(commit)
    pace, paths = own.velocity(), [change[2] for commit in commits for change in commit.files]
    count = len(commits) if session.commit_count is None else session.commit_count
    return replace(
        session, commit_count=count,
        files_modified=session.files_modified or len(set(paths)),
        primary_language=session.primary_language or language_of(paths),
        git_velocity_per_hour=pace.commit_velocity_per_hour,
        git_velocity_per_day=pace.commit_velocity_per_day,
        git_conventional_compliance=pace.conventional_compliance_rate if commits else None,
        git_breaking_changes=pace.breaking_change_count,
        git_avg_commits_per_week=pace.avg_commits_per_week,
        git_most_active_hour=pace.most_active_hour, git_most_active_day=pace.most_active_day,
        lines_changed=own.added + own.deleted,
        lines_surviving=sum(lines[c.sha] for c in commits))


def collect(reader: GitReader, sessions: Sequence[ExtendedSessionMetrics], path: str,
            since: datetime, until: datetime, author: str = "") -> Report:
    """Join sessions with the history of their repository."""
    root = reader.root(path)
    reach = [(start, end + timedelta(seconds=HOUR)) for start, end in map(span, sessions)]
    history = reader.history(root, since, until, author, reach)
    joiner = Joiner(sessions, reader.checkpoints(root))
    ordered = sorted(history.commits[::-1], key=lambda commit: commit.authored)
    joins = [join for join in map(joiner.join, ordered) if join]
    commits, owned = {commit.sha: commit for commit in history.commits}, defaultdict(list)
    for join in joins:
        owned[join.session].append(commits[join.commit])
    lines, complete = reader.surviving_lines(root, [commits[join.commit] for join in joins])
    found = [with_git(s, owned[s.session_id], lines) for s in sessions]
    row = dict(
        repository=root, commits=history.total, in_sessions=len(joins), **spent_in(sessions),
        branches=reader.branches(root, since), conflicts=reader.conflicts(root, since, until))
    return Report(history, found, joins, complete, [row])


def measured(reader: GitMetricsReader, sessions: Sequence[ExtendedSessionMetrics], path: str,
             since: datetime, until: datetime) -> Report:
    """What a reader that knows only `get_metrics` can tell: figures of each session's own time."""
    found = []
    for s in sessions:
        values = defaultdict(list)
        for row in reader.get_metrics(path, since=s.started_at, until=s.ended_at):
            values[row["metric_type"]].append(row["value"])
        figures = {name: merge(values[kind]) for name, kind, merge in FIGURES if values[kind]}
        found.append(replace(s, **figures))
    row = dict(repository=path, commits=None, in_sessions=0, **spent_in(found), branches=[],
               conflicts=None)
    return Report(History(path, since, until), found, [], True, [row])


def insights_of(report: Report, seed: int = 0) -> list[CorrelationInsight]:
    """The four relations; pairs with an unknown side are left out."""
    days = defaultdict(Counter)
    for s in report.sessions:
        if s.waste_tokens is not None and s.tokens:
            days[s.started_at.astimezone().date()].update(waste=s.waste_tokens, tokens=s.tokens)
    pairs = ([(s.avg_quality, s.git_velocity_per_hour) for s in report.sessions],
             [(s.git_conventional_compliance, s.avg_quality) for s in report.sessions],
             [(days[day]["waste"] / days[day]["tokens"], report.history.days[day])
              for day in sorted(days)],
             [(s.cost, s.lines_surviving) for s in report.sessions])
    known = [[pair for pair in side if None not in pair] for side in pairs]
    tests = sum(len(side) >= MIN_POINTS for side in known)
    found = [correlate(kind, side, unit, labels, tests=max(1, tests), seed=seed,
                       series=unit == "days")
             for (kind, unit, *labels), side in zip(RELATIONS, known)]
    return [replace(insight, project_path=report.history.root) for insight in found]


async def off_loop(function: Any, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


class SessionBuddyIntegration:
    """The answers for other programs; the work is done in a thread, off the event loop."""

    def __init__(self, git_metrics_reader: GitMetricsReader | None = None,
                 session_buddy_client: SessionBuddyClient | None = None,
                 correlation_storage: CorrelationStorage | None = None) -> None:
        self.git_reader = git_metrics_reader or NoOpGitMetricsReader()
        self.session_buddy = session_buddy_client or NoOpSessionBuddyClient()
        self.storage = correlation_storage or NoOpCorrelationStorage()

    async def report(self, paths: Sequence[str], since: datetime, until: datetime,
                     author: str = "") -> Report:
        """Read, join and correlate a period of one or more repositories."""
        parts = []
        for path in paths:
            sessions = await self._sessions(path, since, until)
            parts.append(await off_loop(self._part, sessions, path, since, until, author))
        report = reduce(operator.add, parts)
        report.insights = await off_loop(insights_of, report)
        for insight in report.insights:
            await self.storage.store_insight(insight)
        return report

    async def calculate_correlations(self, project_path: str,
                                     days_back: int = 30) -> list[CorrelationInsight]:
        """The four insights of the last days."""
        now = datetime.now(timezone.utc)
        return (await self.report([project_path], now - timedelta(days=days_back), now)).insights

    async def collect_extended_session_metrics(
            self, session_id: str, project_path: str) -> ExtendedSessionMetrics | None:
        """One session with its git figures; None when none of that id ran in the repository."""
        sessions = await self._sessions(project_path)
        ours = next((s for s in sessions if s.session_id == session_id), None)
        if ours is None:
            return None
        around = ours.started_at - timedelta(days=1), span(ours)[1] + timedelta(days=1)
        rivals = [s for s in sessions if around[0] <= s.started_at <= around[1]]
        report = await off_loop(self._part, rivals, project_path, *around)
        return next(s for s in report.sessions if s.session_id == session_id)

    async def _sessions(self, path: str, since: Moment = None,
                        until: Moment = None) -> list[ExtendedSessionMetrics]:
        if isinstance(self.session_buddy, SessionClient):
            return await off_loop(self.session_buddy.sessions, path, since, until)
        rows = await self.session_buddy.get_session_metrics(
            project_path=path, start_date=since, end_date=until)
        return [metrics_of(row) for row in rows]

    def _part(self, sessions: list, path: str, since: datetime, until: datetime,
              author: str = "") -> Report:
        if isinstance(self.git_reader, GitReader):
            return collect(self.git_reader, sessions, path, since, until, author)
        return measured(self.git_reader, sessions, path, since, until)


# ---- Reports ----

def spent_in(sessions: Sequence[ExtendedSessionMetrics]) -> dict[str, Any]:
    """Sums over the sessions that know the amount; None where none does."""
    known = {name: [getattr(s, name) for s in sessions if getattr(s, name) is not None]
             for name in ("tokens", "waste_tokens", "cost")}
    return dict({name: sum(values) if values else None for name, values in known.items()},
                sessions=len(sessions))


def summary_of(report: Report, author: str, splits: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the reports show, JSON-ready. Money is USD at API prices; None is unknown."""
    history, sessions, spent = report.history, report.sessions, spent_in(report.sessions)
    made = Counter(join.session for join in report.joins)
    lines = {s.session_id: s.lines_surviving or 0 for s in sessions}
    unknown = sum(s.cost is None for s in sessions)
    notes = (
        ("Shallow clone: older commits are missing, and the oldest here counts without its lines.",
         history.shallow),
        ("No commits in this period.", not history.total),
        ("No recorded session of this period ran in this repository.", not sessions),
        ("What %d of %d sessions cost is unknown; prices leave them out."
         % (unknown, len(sessions)), unknown),
        ("Not every file could be searched in time: surviving lines are a lower bound.",
         not report.complete))

    def price(divisors: Mapping[str, int]) -> dict[str, float | None]:
        known = {name: [s.session_id for s in sessions if getattr(s, name) is not None]
                 for name in ("tokens", "cost")}
        return {name: ratio(spent[name], sum(map(divisors.__getitem__, ids)))
                for name, ids in known.items()}

    return {
        "repository": history.root, "repositories": report.repositories, "author": author,
        "notes": [text for text, holds in notes if holds], "spent": spent,
        "committed": dict(
            commits=history.total, merges=history.merges, added=history.added,
            deleted=history.deleted, in_sessions=len(report.joins), surviving=sum(lines.values()),
            changed_in_sessions=sum(s.lines_changed for s in sessions)),
        "per_commit": price(made), "per_surviving_line": price(lines),
        "joins": [join._asdict() for join in report.joins], "velocity": asdict(history.velocity()),
        "insights": [vars(insight) for insight in report.insights], "split": splits,
        "sessions": [session.to_dict() for session in sessions]}


def amount(value: float | None) -> str:
    return "\u2013" if value is None else format(value, ",.3g" if abs(value) < 100 else ",.0f")


def money(value: float | None) -> str:
    return amount(value) if value is None else "$" + amount(value)


def places_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each repository has of its own: figures where there are several, branches, conflicts."""
    found = []
    for row in rows:
        name, conflicts = os.path.basename(row["repository"]), row["conflicts"]
        if len(rows) > 1:
            found.append((name, "%s commits, %d of them in %d sessions, %s" % (
                amount(row["commits"]), row["in_sessions"], row["sessions"], money(row["cost"]))))
        ahead = ["; %s: %d, last %s" % (branch["name"], branch["commits"], branch["last"].date())
                 for branch in row["branches"] if branch["commits"]]
        found.append(("Branches", "%d, %d with commits not in HEAD%s" % (
            len(row["branches"]), len(ahead), "".join(ahead[:5]))))
        files = Counter(name for names in (conflicts or {}).values() for name in names)
        found.append(("Conflicts", "\u2013" if conflicts is None else "in %d merges%s" % (
            len(conflicts), "".join("; %s: %d" % pair for pair in files.most_common(5)))))
    return found


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, sentence) rows of the text and HTML reports; money in USD."""
    pace, spent, committed = summary["velocity"], summary["spent"], summary["committed"]
    evidence = Counter(join["evidence"] for join in summary["joins"])
    numbers = dict(
        pace, **committed, share=100 * pace["conventional_compliance_rate"],
        paid=money(spent["cost"]), used=amount(spent["tokens"]), lost=amount(spent["waste_tokens"]),
        sessions=spent["sessions"], each=money(summary["per_commit"]["cost"]),
        line=money(summary["per_surviving_line"]["cost"]),
        how=", ".join("%d by %s" % (count, kind) for kind, count in evidence.items()) or "none")
    rows = [(label, text.format(**numbers)) for label, text in (
        ("Period", "{period_start:%Y-%m-%d} to {period_end:%Y-%m-%d}"),
        ("Spent", "{paid} at API prices: {used} tokens ({lost} wasted) in {sessions:,} sessions"),
        ("Committed", "{commits:,} commits and {merges:,} merges, +{added:,} -{deleted:,} lines"),
        ("In session", "{in_sessions:,} of them ({how}) changed {changed_in_sessions:,} lines; "
                       "{surviving:,} are at HEAD"),
        ("Price", "{each} per commit made in a session, {line} per surviving line"),
        ("Pace", "{commit_velocity_per_day:.2f} commits a day, {avg_commits_per_week:.1f} a week"),
        ("Messages", "{share:.0f}% conventional, {breaking_change_count:,} breaking"))]
    if pace["total_commits"]:
        day = WEEKDAYS[pace["most_active_day"]]
        rows.append(("Busiest", "%s, and %02d:00" % (day, pace["most_active_hour"])))
    rows += places_of(summary["repositories"])
    for row in summary["split"]:
        change, values = "", [row[name] for name in ("before", "after", "difference")]
        if row["interval"]:
            change = "median %s -> %s, difference %s (95%% %s to %s), " % tuple(
                map(amount, (*values, *row["interval"])))
        text = "{measure}: {}{verdict} ({n_before} and {n_after} sessions)"
        rows.append(("Split", text.format(change, **row)))
    return rows + [("Note", note) for note in summary["notes"]]


def on_grid(points: Sequence[tuple], width: float, height: float) -> list[tuple[float, float]]:
    """The points stretched to a field of that size, y upwards."""
    if not points:
        return []
    (left, right), (low, high) = ((min(side), max(side)) for side in zip(*points))
    return [((x - left) / (right - left or 1) * width, (high - y) / (high - low or 1) * height)
            for x, y in points]


def title_of(summary: dict[str, Any]) -> str:
    names = [os.path.basename(row["repository"]) for row in summary["repositories"]]
    return "What the tokens bought: " + plain(", ".join(names))


def to_text(summary: dict[str, Any]) -> str:
    lines = [title_of(summary), ""]
    lines += ["%-10s %s" % tuple(map(plain, row)) for row in facts(summary)]
    for insight in summary["insights"]:
        lines += ["", insight["correlation_type"] + ": " + insight["description"]]
        if len(insight["points"]) >= MIN_POINTS:
            cells = Counter((round(x), round(y)) for x, y in on_grid(insight["points"], 59, 9))
            lines += ["  |" + "".join(" .oO@"[min(cells[x, y], 4)] for x in range(60)).rstrip()
                      for y in range(10)]
            lines += ["  +" + "-" * 60, "   across: %s; up: %s" % tuple(insight["labels"])]
    return "\n".join(lines)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>%(title)s</title><style>
:root{color-scheme:light dark}th{text-align:left;padding-right:1em}svg{max-width:40em}
body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
path{fill:none;stroke:currentColor}circle{fill:#2a7de1}
</style><h1>%(title)s</h1><table>%(rows)s</table>%(plots)s</html>"""
PLOT = """<h2>%s</h2><p>%s</p><svg viewBox="0 0 500 200"><path d="M5 0V195H500"/>%s</svg>
<p>across: %s; up: %s</p>"""


def to_html(summary: dict[str, Any]) -> str:
    """One page without scripts or links, light or dark as the reader's system is."""
    plots = []
    for insight in summary["insights"]:
        places = on_grid(insight["points"], 480, 180)
        dots = ('<circle cx="%.1f" cy="%.1f" r="4"/>' % (x + 12, y + 6) for x, y in places)
        words = (insight["correlation_type"], insight["description"], *insight["labels"])
        heading, text, across, up = map(html.escape, words)
        plots.append(PLOT % (heading, text, "".join(dots), across, up))
    rows = "".join("<tr><th>%s</th><td>%s</td></tr>" % tuple(map(html.escape, row))
                   for row in facts(summary))
    return PAGE % {"title": html.escape(title_of(summary)), "rows": rows, "plots": "".join(plots)}


FORMATS = {"text": to_text, "html": to_html,
           "json": lambda summary: json.dumps(summary, indent=2, default=datetime.isoformat)}


# ---- Command line ----

def create_session_buddy_integration(
        git_metrics_reader: GitMetricsReader | None = None, db_path: str | None = None,
        insights_db_path: str | None = None, *, storage_path: str | None = None,
        store_insights: bool = True,
        maps: Iterable[tuple[str, str]] = ()) -> SessionBuddyIntegration:
    """Wire an integration. Sessions come from the SessionOptimizer store (at `storage_path`), or
    from session-buddy's file `db_path`; insights go to insights.db in the store, or to
    `insights_db_path`, or nowhere."""
    optimizer = SessionOptimizer(storage_path)
    insights = insights_db_path or os.path.join(str(optimizer.storage_path), "insights.db")
    return SessionBuddyIntegration(
        git_metrics_reader or GitReader(),
        SessionBuddyDirectClient(db_path) if db_path else StoreSource(optimizer, maps),
        CorrelationStorageSQLite(insights) if store_insights else None)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the tokens bought.", allow_abbrev=False)
    add = parser.add_argument
    add("--repo", action="append", metavar="PATH",
        help="a git work tree, repeatable (default: the current directory)")
    add("--map", action="append", default=[], metavar="OLD=NEW",
        help="where a recorded path is on this machine, repeatable; * is any name")
    add("--days", type=int, default=30, help="how far back to look (default: 30)")
    add("--author", default="", help="only commits whose author's name or address contains this")
    add("--split", metavar="DATE", help="compare the sessions before and after a date")
    add("--format", choices=sorted(FORMATS), default="text")
    add("--store", metavar="DIR", help="the SessionOptimizer store")
    add("--session-buddy", nargs="?", const=SESSION_BUDDY_DB, metavar="FILE",
        help="read the sessions from session-buddy's DuckDB file instead (%(const)s)")
    add("--save", action="store_true", help="keep the insights in insights.db in the store")
    options = parser.parse_args(argv)
    if not 1 <= options.days <= 36_500:
        parser.error("--days takes 1 to 36500")
    if options.split and not parse_time(options.split):
        parser.error("--split takes a date as 2026-05-01, not %r" % options.split)
    if not all(all(pair.partition("=")) for pair in options.map):
        parser.error("--map takes OLD=NEW")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options, now = parse_arguments(argv), datetime.now(timezone.utc)
    maps = [(old, new) for old, _, new in (pair.partition("=") for pair in options.map)]
    try:
        wired = create_session_buddy_integration(
            db_path=options.session_buddy, storage_path=options.store, store_insights=options.save,
            maps=maps)
        since = now - timedelta(days=options.days)
        report = asyncio.run(wired.report(options.repo or ["."], since, now, options.author))
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
