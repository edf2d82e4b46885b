"""The history of one git repository as numbers: a streamed `git log`, conventional commits, surviving lines.

Used by git_insights.py. Nothing is read from the network, no setting of the repository or the user changes a number,
and memory does not grow with the number of commits.
"""
from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

CHUNK = 1 << 18  # bytes of git's output in memory at a time
LANGUAGES = dict(py="Python", js="JavaScript", jsx="JavaScript", ts="TypeScript", tsx="TypeScript", go="Go",
                 rs="Rust", java="Java", c="C", h="C", cc="C++", cpp="C++", cs="C#", rb="Ruby", php="PHP", sh="Shell")
BLAME_FILES, BLAME_SECONDS = 1_000, 60  # spent on surviving lines; beyond that their number is a lower bound
GIT = ("git", "--no-pager", "--literal-pathspecs", "-c", "log.showRoot=true", "-c", "core.fsmonitor=false", "-C")
LOG = ("log", "-z", "-M", "--no-color", "--no-show-signature", "--no-ext-diff", "--no-textconv", "--encoding=UTF-8")
FIELDS = "--format=%x01%H%x1f%P%x1f%at%x1f%ct%x1f%ad%x1f%B"
NOUN = rb"[A-Za-z\x80-\xff][\w\x80-\xff-]*"
# The grammar of https://www.conventionalcommits.org/en/v1.0.0/: header, blank line, body, footers after a blank line.
HEADER = re.compile(NOUN + rb"(?:\([^()\n]+\))?(!)?: \S[^\n]*(?:\n\n|\Z)")
FOOTERS = re.compile(rb"\n\n(?=(?:BREAKING CHANGE|" + NOUN + rb")(?:: | #)[^\n])")
BREAKING = re.compile(rb"^BREAKING[ -]CHANGE: \S", re.M)
BLAMED = re.compile(rb"([0-9a-f]{40,64}) \d+ \d+ (\d+)$")


class InsightsError(Exception):
    """The request cannot be answered; the text names the reason and the remedy."""


@dataclass(frozen=True)
class GitVelocityMetrics:
    """Pace and habits of a period's commits, merges left out. A rate is never extrapolated from less than its unit
    (ten minutes count as an hour, three hours as a day); hours and days (0 = Monday) are the authors', or None."""
    commit_velocity_per_hour: float
    commit_velocity_per_day: float
    conventional_compliance_rate: float  # 0 to 1
    breaking_change_count: int
    avg_commits_per_week: float
    most_active_hour: int | None
    most_active_day: int | None
    total_commits: int
    period_start: datetime
    period_end: datetime


class Commit(NamedTuple):
    sha: str
    merge: bool
    authored: datetime  # in the author's zone
    committed: int  # seconds since 1970
    conventional: bool
    breaking: bool
    files: list[tuple[int, int, str, str]]  # lines added, lines deleted, path, path before a rename or ""


class History:
    """The commits of a period: counts of all (merges apart); the commits themselves where they were asked for."""

    def __init__(self, root: str, start: datetime, end: datetime, shallow: bool = False) -> None:
        self.root, self.start, self.end, self.shallow = root, start, end, shallow
        self.total = self.merges = self.conventional = self.breaking = self.added = self.deleted = 0
        self.hours, self.weekdays, self.days = Counter(), Counter(), Counter()
        self.commits: list[Commit] = []

    def add(self, commit: Commit) -> None:
        """Count one commit."""
        if commit.merge:
            self.merges += 1
            return
        self.total += 1
        self.conventional += commit.conventional
        self.breaking += commit.breaking
        for added, deleted, _path, _before in commit.files:
            self.added += added
            self.deleted += deleted
        self.hours[commit.authored.hour] += 1
        self.weekdays[commit.authored.weekday()] += 1
        self.days[commit.authored.date()] += 1

    def velocity(self) -> GitVelocityMetrics:
        seconds = (self.end - self.start).total_seconds()
        hourly, daily, weekly = (self.total / max(seconds / unit, 1) for unit in (3_600, 86_400, 604_800))
        hour, day = (max(sorted(c), key=c.__getitem__, default=None) for c in (self.hours, self.weekdays))
        compliance = ratio(self.conventional, self.total) or 0.0
        return GitVelocityMetrics(hourly, daily, compliance, self.breaking, weekly, hour, day, self.total, self.start,
                                  self.end)


def conventional(message: bytes) -> tuple[bool, bool]:
    """(whether a commit message follows the grammar, whether it announces a breaking change)."""
    message = message.replace(b"\r\n", b"\n").strip()
    header, footers = HEADER.match(message), FOOTERS.search(message) if b"BREAKING" in message else None
    announced = footers and BREAKING.search(message, footers.end())
    return bool(header), bool(announced or header and header.group(1))


def git(root: str, *arguments: str, cut: bytes = b"\0", seconds: float = 86_400) -> Iterator[bytes]:
    """Yield git's output cut at `cut`, one chunk in memory at a time; a failure is an InsightsError. The environment
    is ours without GIT_* (they point git elsewhere), in English, and offline: a partial clone must not fetch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env.update(LC_ALL="C", GIT_OPTIONAL_LOCKS="0", GIT_ALLOW_PROTOCOL="none", GIT_NO_LAZY_FETCH="1",
               GIT_FLUSH="0")  # blocks, not records, through the pipe
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen([*GIT, root, *arguments], env=env, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=complaints)
        except OSError as error:
            raise InsightsError("git cannot be run (%s): install it and put it on PATH" % error.strerror) from error
        watch = threading.Timer(seconds, process.kill)
        watch.start()
        try:
            with process:
                tail = b""
                for chunk in iter(lambda: process.stdout.read(CHUNK), b""):
                    *parts, tail = (tail + chunk).split(cut)
                    yield from parts
                yield from filter(None, [tail])
        finally:
            watch.cancel()
        if process.returncode:
            complaints.seek(0)
            said = complaints.readline().decode("utf-8", "replace").strip()
            raise InsightsError("git %s: %s" % (arguments[0], said or "status %d" % process.returncode))


def ratio(amount: float | None, count: float | None) -> float | None:
    return amount / count if amount is not None and count else None


def work_tree_of(directory: str | None) -> str:
    """The real path of the nearest directory upwards with a `.git`, "" without one; itself it need not exist now."""
    place = os.path.realpath(os.path.expanduser(directory)) if directory else os.sep
    while not os.path.exists(os.path.join(place, ".git")):
        place, child = os.path.dirname(place), place
        if place == child:
            return ""
    return place


def language_of(paths: Sequence[str]) -> str | None:
    known = Counter(filter(None, (LANGUAGES.get(path.rpartition(".")[2].lower()) for path in paths)))
    return max(sorted(known), key=known.__getitem__, default=None)


class GitReader:
    """Reads one repository: a streamed `git log --numstat`, and `git blame` for the files of given commits."""

    def root(self, path: str) -> str:
        """The real path of the work tree that holds `path`."""
        if not os.path.isdir(path):
            raise InsightsError("%s is no directory: name a git work tree" % path)
        try:
            return os.path.realpath(os.fsdecode(b"".join(git(path, "rev-parse", "--show-toplevel"))[:-1]))
        except InsightsError as error:
            raise InsightsError("%s: %s (name a git work tree)" % (path, error)) from error

    def history(self, root: str, since: datetime, until: datetime, author: str = "", spans: Sequence = ()) -> History:
        """The commits of HEAD authored in the period; kept are those within one of `spans`, pairs of moments."""
        shallow = os.path.join(root, os.fsdecode(b"".join(git(root, "rev-parse", "--git-path", "shallow"))[:-1]))
        cut = set(Path(shallow).read_text().split()) if os.path.exists(shallow) else ()
        history, spans = History(root, since, until, bool(cut)), sorted(spans)
        starts, reach = [start for start, _ in spans], list(accumulate((end for _, end in spans), max))
        for commit in read_commits(root, since, author):
            if since <= commit.authored <= until:
                if commit.sha in cut:  # its parents were not fetched, so git shows the whole tree as added by it
                    commit = commit._replace(files=[])
                history.add(commit)
                place = bisect(starts, commit.authored)
                if place and commit.authored <= reach[place - 1] and not commit.merge:
                    history.commits.append(commit)
        return history

    def surviving_lines(self, root: str, commits: Sequence[Commit]) -> tuple[dict[str, int], bool]:
        """({commit: lines of HEAD that blame gives to it}, whether all touched files were read within the limits)."""
        lines, later, deadline = Counter(), defaultdict(set), time.monotonic() + BLAME_SECONDS
        if not commits:
            return lines, True
        since, wanted = since_option(min(c.committed for c in commits) - 1), {c.sha.encode() for c in commits}
        moves = git(root, *LOG, "--topo-order", "--name-status", "--diff-filter=R", "--format=", *since, "HEAD", "--")
        for _, before, after in zip(moves, moves, moves):  # newest first: `later` holds all later names of a file
            later[before] |= {after} | later[after]
        touched = Counter(os.fsencode(change[2]) for commit in commits for change in commit.files
                          if change[0])  # no line of a binary, emptied or only renamed file is theirs
        names = list(dict.fromkeys(n for name, _ in touched.most_common() for n in sorted({name} | later[name])))
        for name in names[:BLAME_FILES]:
            blame = git(root, "blame", "--incremental", "--no-textconv", "--no-ignore-revs-file", *since, "HEAD",
                        "--", os.fsdecode(name), cut=b"\n", seconds=max(deadline - time.monotonic(), 0))
            try:
                for found in map(BLAMED.match, blame):
                    if found and found.group(1) in wanted:
                        lines[found.group(1).decode()] += int(found.group(2))
            except InsightsError:  # no such file at HEAD, a submodule, or out of time
                continue
        return lines, len(names) <= BLAME_FILES and time.monotonic() < deadline


def since_option(seconds: float) -> list[str]:
    """For a moment in seconds since 1970; nothing for one before 1971, which git reads as something else."""
    return ["--since=" + datetime.fromtimestamp(seconds, timezone.utc).isoformat()] if seconds > 31_536_000 else []


def read_header(token: bytes) -> Commit:
    sha, parents, authored, committed, moment, message = token[1:].split(b"\x1f", 5)
    try:
        when = datetime.fromisoformat(moment.decode().replace("Z", "+00:00"))
    except ValueError:  # a zone or a year out of range, as broken tools write them
        when = datetime.fromtimestamp(min(int(authored), 1 << 35), timezone.utc)
    return Commit(sha.decode(), b" " in parents, when, int(committed), *conventional(message), [])


def read_commits(root: str, since: datetime, author: str) -> Iterator[Commit]:
    """Yield the commits of HEAD, newest first, one in memory at a time; nothing while the branch has no commit."""
    try:
        list(git(root, "rev-parse", "--quiet", "--verify", "HEAD"))
    except InsightsError:
        return
    tokens = git(root, *LOG, "--numstat", "--date=iso-strict", FIELDS, *since_option(since.timestamp()),
                 *(["--fixed-strings", "--author=" + author] if author else []), "HEAD", "--")
    commit = None
    for token in tokens:
        if token[:1] == b"\x01":  # no numstat entry begins so, and the names of a rename are consumed below
            yield from filter(None, [commit])
            commit = read_header(token)
        else:
            added, deleted, name = token.lstrip(b"\n").split(b"\t", 2)
            before = b"" if name else next(tokens)  # a rename: the old and the new name follow
            counts = (0, 0) if added == b"-" else (int(added), int(deleted))  # "-": a binary file
            commit.files.append((*counts, os.fsdecode(name or next(tokens)), os.fsdecode(before)))
    yield from filter(None, [commit])
