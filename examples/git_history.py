"""The history of a git repository as numbers: its log, surviving lines, branches and merges.

Used by git_insights.py. Nothing is read from the network or written to the repository, no setting
changes a number, and only commits that were asked for stay in memory.
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
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

CHUNK = 1 << 18  # bytes of git's output in memory at a time
LANGUAGES = dict(py="Python", js="JavaScript", jsx="JavaScript", ts="TypeScript", tsx="TypeScript",
                 go="Go", rs="Rust", java="Java", c="C", h="C", cc="C++", cpp="C++", cs="C#",
                 rb="Ruby", php="PHP", sh="Shell")
BLAME_FILES, BLAME_SECONDS = 1_000, 60  # for surviving lines; beyond, their number is a lower bound
MERGE_SECONDS = 60  # for making the merges of a period again
GIT = ("git", "--no-pager", "-c", "log.showRoot=true", "-c", "core.fsmonitor=false", "-C")
LOG = ("log", "-z", "-M", "--no-color", "--no-show-signature", "--no-ext-diff", "--no-textconv",
       "--encoding=UTF-8")
FIELDS = "--format=%x01%H%x1f%P%x1f%at%x1f%ct%x1f%ad%x1f%B"
NOUN = rb"[A-Za-z\x80-\xff][\w\x80-\xff-]*"
# https://www.conventionalcommits.org/en/v1.0.0/: header, blank line, body, blank line, footers.
HEADER = re.compile(NOUN + rb"(?:\([^()\n]+\))?(!)?: \S[^\n]*(?:\n\n|\Z)")
FOOTERS = re.compile(rb"\n\n(?=(?:BREAKING CHANGE|" + NOUN + rb")(?:: | #)[^\n])")
BREAKING = re.compile(rb"^BREAKING[ -]CHANGE: \S", re.M)
BLAMED = re.compile(rb"([0-9a-f]{40,64}) \d+ \d+ (\d+)$")
NAMING = re.compile(  # trailers that may name a session
    rb"^(?:[\w-]*-(?:Checkpoint|Session|Session-Id|Thread-Id)|Co-authored-by): *(\S[^\n]*)",
    re.M | re.I)
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[\w.-]{8,}", re.I)
STORED_ID = re.compile(rb'([0-9a-f]{2})/([0-9a-f]{10})/[^\0]*\0.*"session_?id": *"([^"]+)"', re.I)


class InsightsError(Exception):
    """The request cannot be answered; the text names the reason and the remedy."""


@dataclass(frozen=True)
class GitVelocityMetrics:
    """Pace and habits of a period's commits, merges left out. A rate is never extrapolated from
    less than its unit (ten minutes count as an hour); hours and days (0 = Monday) are the
    authors', or None."""
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
    subject: str
    named: tuple[str, ...]  # ids in its trailers, in lower case
    files: list[tuple[int, int, str, str]]  # lines added, deleted, path, path before a rename or ""


class History:
    """The commits of a period: counts of all (merges apart), and those that were asked for."""
    COUNTS = ("total", "merges", "conventional", "breaking", "added", "deleted",
              "hours", "weekdays", "days", "commits")

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

    def __add__(self, other: History) -> History:
        both = History(self.root + ", " + other.root, min(self.start, other.start),
                       max(self.end, other.end), self.shallow or other.shallow)
        for name in self.COUNTS:
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def velocity(self) -> GitVelocityMetrics:
        seconds = (self.end - self.start).total_seconds()
        hourly, daily, weekly = (
            self.total / max(seconds / unit, 1) for unit in (3_600, 86_400, 604_800))
        hour, day = (max(sorted(counts), key=counts.__getitem__, default=None)
                     for counts in (self.hours, self.weekdays))
        compliance = ratio(self.conventional, self.total) or 0.0
        return GitVelocityMetrics(hourly, daily, compliance, self.breaking, weekly, hour, day,
                                  self.total, self.start, self.end)


def conventional(message: bytes) -> tuple[bool, bool]:
    """(whether a commit message follows the grammar, whether it announces a breaking change)."""
    message = message.replace(b"\r\n", b"\n").strip()
    header = HEADER.match(message)
    footers = FOOTERS.search(message) if b"BREAKING" in message else None
    announced = footers and BREAKING.search(message, footers.end())
    return bool(header), bool(announced or header and header.group(1))


def git(root: str, *arguments: str, cut: bytes = b"\0", seconds: float = 86_400) -> Iterator[bytes]:
    """Yield git's output cut at `cut`, a chunk in memory at a time; a failure is an InsightsError.
    The environment is ours without GIT_* (they point git elsewhere), in English, and offline: a
    partial clone must not fetch."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env.update(LC_ALL="C", GIT_OPTIONAL_LOCKS="0", GIT_ALLOW_PROTOCOL="none", GIT_NO_LAZY_FETCH="1",
               GIT_FLUSH="0")  # blocks, not records, through the pipe
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen([*GIT, root, *arguments], env=env, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=complaints)
        except OSError as error:
            reason = "git cannot be run (%s): install it and put it on PATH" % error.strerror
            raise InsightsError(reason) from error
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
            said = said or "status %d" % process.returncode
            raise InsightsError("git %s: %s" % (arguments[0], said))


def ratio(amount: float | None, count: float | None) -> float | None:
    return amount / count if amount is not None and count else None


def repository_of(directory: str | None) -> tuple[str, str]:
    """(work tree, common git directory), real paths, of the nearest directory upwards with a
    `.git`; ("", "") without one. The directory itself need not exist now."""
    place = os.path.realpath(os.path.expanduser(directory)) if directory else os.sep
    while not os.path.exists(os.path.join(place, ".git")):
        place, child = os.path.dirname(place), place
        if place == child:
            return "", ""
    shared = os.path.join(place, ".git")
    if os.path.isfile(shared):  # of a linked work tree or a submodule: "gitdir: <path>"
        link = Path(shared).read_text(errors="replace").partition("gitdir:")[2].strip()
        shared = os.path.join(place, link)
    pointer = Path(shared, "commondir")
    if pointer.is_file():
        shared = os.path.join(shared, pointer.read_text(errors="replace").strip())
    return place, os.path.realpath(shared)


def language_of(paths: Sequence[str]) -> str | None:
    endings = (path.rpartition(".")[2].lower() for path in paths)
    known = Counter(LANGUAGES[ending] for ending in endings if ending in LANGUAGES)
    return max(sorted(known), key=known.__getitem__, default=None)


class GitReader:
    """Reads one repository: a streamed `git log --numstat`, `git blame` for the files of given
    commits, branches, conflicts, and the sessions that checkpoints name."""

    def root(self, path: str) -> str:
        """The real path of the work tree that holds `path`."""
        if not os.path.isdir(path):
            raise InsightsError("%s is no directory: name a git work tree" % path)
        try:
            told = b"".join(git(path, "rev-parse", "--show-toplevel"))
            return os.path.realpath(os.fsdecode(told[:-1]))
        except InsightsError as error:
            raise InsightsError("%s: %s (name a git work tree)" % (path, error)) from error

    def trees(self, root: str) -> list[str]:
        """The work trees of the repository, also those whose directory is gone but not pruned."""
        lines = git(root, "worktree", "list", "--porcelain", cut=b"\n")
        return [os.fsdecode(line[9:]) for line in lines if line.startswith(b"worktree ")]

    def history(self, root: str, since: datetime, until: datetime, author: str = "",
                spans: Sequence = ()) -> History:
        """The commits of HEAD authored in the period; kept are those that name a session and those
        within one of `spans`, pairs of moments."""
        cut_at = b"".join(git(root, "rev-parse", "--git-path", "shallow"))[:-1]
        shallow = os.path.join(root, os.fsdecode(cut_at))
        cut = set(Path(shallow).read_text().split()) if os.path.exists(shallow) else ()
        history, spans = History(root, since, until, bool(cut)), sorted(spans)
        starts = [start for start, _ in spans]
        reach = list(accumulate((end for _, end in spans), max))
        for commit in read_commits(root, since, author):
            if since <= commit.authored <= until:
                if commit.sha in cut:  # without its parents it seems to add every file
                    commit = commit._replace(files=[])
                history.add(commit)
                place = bisect(starts, commit.authored)
                within = place and commit.authored <= reach[place - 1]
                if spans and not commit.merge and (within or commit.named):
                    history.commits.append(commit)
        return history

    def surviving_lines(self, root: str, commits: Sequence[Commit]) -> tuple[dict[str, int], bool]:
        """({commit: lines of HEAD that blame gives to it}, whether all touched files were read)."""
        lines, later, deadline = Counter(), defaultdict(set), time.monotonic() + BLAME_SECONDS
        if not commits:
            return lines, True
        since = since_option(min(c.committed for c in commits) - 1)
        wanted = {c.sha.encode() for c in commits}
        moves = git(root, *LOG, "--topo-order", "--name-status", "--diff-filter=R", "--format=",
                    *since, "HEAD", "--")
        for _, before, after in zip(moves, moves, moves):  # newest first: all later names are known
            later[before] |= {after} | later[after]
        touched = Counter(os.fsencode(change[2]) for commit in commits for change in commit.files
                          if change[0])  # a binary, emptied or only renamed file has none
        names = list(dict.fromkeys(
            n for name, _ in touched.most_common() for n in sorted({name} | later[name])))
        for name in names[:BLAME_FILES]:
            blame = git(root, "blame", "--incremental", "--no-textconv", "--no-ignore-revs-file",
                        *since, "HEAD", "--", os.fsdecode(name), cut=b"\n",
                        seconds=max(deadline - time.monotonic(), 0))
            try:
                for found in map(BLAMED.match, blame):
                    if found and found.group(1) in wanted:
                        lines[found.group(1).decode()] += int(found.group(2))
            except InsightsError:  # no such file at HEAD, a submodule, or out of time
                continue
        return lines, len(names) <= BLAME_FILES and time.monotonic() < deadline

    def branches(self, root: str, since: datetime) -> list[dict[str, Any]]:
        """The local branches, most active first: name, time of the last commit, and how many
        commits of the period HEAD does not hold (each is counted for one branch)."""
        refs = git(root, "for-each-ref", "--format=%(refname:short)%00%(committerdate:unix)",
                   "refs/heads", cut=b"\n")
        named = [(os.fsdecode(name), float(at)) for name, at in (ref.split(b"\0") for ref in refs)]
        ahead = git(root, "log", "--source", "--branches", "--no-merges", "--format=%S", "--not",
                    "HEAD", *since_option(since.timestamp()), cut=b"\n") if has_head(root) else ()
        counts = Counter(re.sub("^refs/heads/", "", os.fsdecode(name)) for name in ahead)
        rows = [dict(name=name, commits=counts[name], last=datetime.fromtimestamp(at, timezone.utc))
                for name, at in named]
        return sorted(rows, key=lambda row: (-row["commits"], row["name"]))

    def conflicts(self, root: str, since: datetime, until: datetime) -> dict[str, list[str]] | None:
        """{merge of the period: its files in conflict}, found by making each merge of HEAD again,
        in memory. None where that takes too long, or git is older than 2.35."""
        lines = git(root, "log", "--merges", "--remerge-diff", "--diff-filter=U", "--no-color",
                    "--no-show-signature", "--no-ext-diff", "--format=%x01%H %at",
                    *since_option(since.timestamp()), "HEAD", "--", cut=b"\n",
                    seconds=MERGE_SECONDS)
        found, files = {}, []
        try:
            for line in lines if has_head(root) else ():
                if line.startswith(b"\x01"):
                    sha, authored = line[1:].decode().split()
                    files = []
                    if since.timestamp() <= int(authored) <= until.timestamp():
                        found[sha] = files
                elif line.startswith(b"diff --git "):
                    files.append(os.fsdecode(line.rpartition(b" b/")[2]))
        except InsightsError:
            return None
        return found

    def checkpoints(self, root: str) -> dict[str, set[str]]:
        """{checkpoint: ids of its sessions}, from the branches on which Entire keeps them."""
        found = defaultdict(set)
        places = ("%s/entire/%s" % (place, kind) for place in ("refs/heads", "refs/remotes/*")
                  for kind in ("checkpoints/*", "sessions", "sessions/*"))
        for ref in git(root, "for-each-ref", "--format=%(refname)", *places, cut=b"\n"):
            lines = git(root, "grep", "-z", "-i", "-E", "-e", "session_?id", os.fsdecode(ref), "--",
                        ":(glob)**/metadata.json", cut=b"\n")
            try:
                for told in filter(None, map(STORED_ID.search, lines)):
                    found[(told.group(1) + told.group(2)).decode()].add(told.group(3).decode())
            except InsightsError:  # nothing found, or a blob that was not fetched
                continue
        return found

    def get_metrics(self, repository_path: str, metric_types: list[str] | None = None,
                    since: datetime | None = None, until: datetime | None = None) -> list[dict]:
        """The figures of a period (default: the last 30 days) as {"metric_type", "value",
        "timestamp"}: those of GitVelocityMetrics; what is unknown is left out."""
        until = until or datetime.now(timezone.utc)
        since = since or until - timedelta(days=30)
        pace = asdict(self.history(self.root(repository_path), since, until).velocity())
        pace["breaking_changes"] = pace.pop("breaking_change_count")
        return [dict(metric_type=name, value=value, timestamp=until) for name, value in pace.items()
                if isinstance(value, (int, float)) and name in (metric_types or pace)]

    def get_latest_metrics(self, repository_path: str) -> dict[str, dict]:
        """{metric type: its figure of the last 30 days}."""
        return {row["metric_type"]: row for row in self.get_metrics(repository_path)}


def since_option(seconds: float) -> list[str]:
    """For a moment in seconds since 1970; none before 1971, which git reads as something else."""
    moment = datetime.fromtimestamp(max(seconds, 0), timezone.utc).isoformat()
    return ["--since=" + moment] if seconds > 31_536_000 else []


def has_head(root: str) -> bool:
    """Whether the branch has a commit."""
    try:
        return bool(list(git(root, "rev-parse", "--quiet", "--verify", "HEAD")))
    except InsightsError:
        return False


def read_header(token: bytes) -> Commit:
    sha, parents, authored, committed, moment, message = token[1:].split(b"\x1f", 5)
    try:
        when = datetime.fromisoformat(moment.decode().replace("Z", "+00:00"))
    except ValueError:  # a zone or a year out of range, as broken tools write them
        when = datetime.fromtimestamp(min(int(authored), 1 << 35), timezone.utc)
    subject = message.lstrip().partition(b"\n")[0].decode("utf-8", "replace").strip()
    told = b" ".join(NAMING.findall(message)).decode("utf-8", "replace").lower()
    return Commit(sha.decode(), b" " in parents, when, int(committed), *conventional(message),
                  subject, tuple(IDS.findall(told)), [])


def read_commits(root: str, since: datetime, author: str) -> Iterator[Commit]:
    """Yield the commits of HEAD, newest first, one in memory at a time; there may be none."""
    if not has_head(root):
        return
    only = ["--fixed-strings", "--author=" + author] if author else []
    tokens = git(root, *LOG, "--numstat", "--date=iso-strict", FIELDS,
                 *since_option(since.timestamp()), *only, "HEAD", "--")
    commit = None
    for token in tokens:
        if token[:1] == b"\x01":  # no numstat entry begins so; names of a rename are consumed below
            yield from filter(None, [commit])
            commit = read_header(token)
        else:
            added, deleted, name = token.lstrip(b"\n").split(b"\t", 2)
            before = b"" if name else next(tokens)  # a rename: the old and the new name follow
            counts = (0, 0) if added == b"-" else (int(added), int(deleted))  # "-": a binary file
            commit.files.append((*counts, os.fsdecode(name or next(tokens)), os.fsdecode(before)))
    yield from filter(None, [commit])
