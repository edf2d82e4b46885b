"""Which transcripts an agent wrote while it ran in a terminal: by processes, directory, time.

What they say of tokens is read by SessionOptimizer's own readers.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from sessionoptimizer import SessionOptimizer, parse_time

AGENTS = {"claude": "claude-code", "codex": "codex", "gemini": "gemini-cli"}  # command: reader
HOMES = ("HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "GEMINI_CLI_HOME")  # where they keep them
# seconds that a transcript may be written before the recording began: clocks of file systems are
# coarse
EARLIER = 1.0
HEAD = 1 << 20  # bytes of a transcript, at either end, that are looked at for its directory
_CWD = re.compile(rb'"cwd"\s*:\s*"((?:[^"\\]|\\.)*)"')
CLASSES = ("uncached_input", "cache_write", "cache_write_1h", "cache_read", "output")


def agent_of(command: List[str]) -> str:
    """The agent that a command line starts, by its program's name: a key of AGENTS or ""."""
    for word in command[:2]:  # node /usr/bin/claude ...
        name = os.path.basename(word).lower()
        for ending in (".exe", ".cmd", ".js"):
            name = name[:-len(ending)] if name.endswith(ending) else name
        if name in AGENTS:
            return name
    return ""


def roots_of(env: Dict[str, str]) -> List[str]:
    """Where agents with these variables keep their transcripts."""
    home = env.get("HOME") or os.path.expanduser("~")
    given = env.get("CLAUDE_CONFIG_DIR")
    claude = (given.split(",") if given
              else [os.path.join(home, ".claude"), os.path.join(home, ".config", "claude")])
    return [os.path.join(place.strip(), "projects") for place in claude if place.strip()] + [
        os.path.join(env.get("CODEX_HOME") or os.path.join(home, ".codex"), "sessions"),
        os.path.join(env.get("GEMINI_CLI_HOME") or home, ".gemini", "tmp")]


class Watch:
    """Looks now and then at the processes under one process: where they are, which transcripts they
    say are theirs.

    Claude Code says so in ``sessions/PID.json`` of its directory; Codex keeps its rollout open.
    Where the system tells nothing of processes (no /proc), directory and time have to do.
    """

    def __init__(self, cwd: str, env: Dict[str, str]):
        self.began = time.time()
        self.directories: Set[str] = {os.path.realpath(cwd)}
        self.roots: Set[str] = set(map(os.path.realpath, roots_of(env)))
        self.open_files: Set[str] = set()
        self.sessions: Set[str] = set()  # of Claude Code, by id: our processes'
        self.others: Set[str] = set()  # and those of processes that are not ours
        self._known: Dict[str, str] = {name: env[name] for name in HOMES if env.get(name)}
        self.seen_agents: Set[str] = set()

    def look(self, pid: int) -> None:
        """Take in what can be seen now of a process and its descendants."""
        ours = set(descendants(pid))
        for process in ours:
            with contextlib.suppress(OSError, ValueError):
                self._look_at(process)
        for root in list(self.roots):
            if os.path.basename(root) == "projects":
                self._claude_sessions(os.path.join(os.path.dirname(root), "sessions"), ours)

    def _look_at(self, pid: int) -> None:
        place = f"/proc/{pid}"
        self.directories.add(os.path.realpath(f"{place}/cwd"))
        with open(f"{place}/cmdline", "rb") as file:
            agent = agent_of(file.read().decode("utf-8", "replace").split("\0"))
        if agent:
            self.seen_agents.add(agent)
        with open(f"{place}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
            env = {name.decode(): value.decode("utf-8", "replace") for name, _, value in pairs
                   if name in _HOMES_BYTES and value}
        if env and env != self._known:
            self.roots |= set(map(os.path.realpath, roots_of(env)))
        for descriptor in os.listdir(f"{place}/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"{place}/fd/{descriptor}")
                if (path.endswith(".jsonl")
                        and any(path.startswith(root + os.sep) for root in self.roots)):
                    self.open_files.add(path)

    def _claude_sessions(self, directory: str, ours: Set[int]) -> None:
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    with open(os.path.join(directory, name), encoding="utf-8") as file:
                        told = json.load(file)
                    (self.sessions if told.get("pid") in ours else self.others).add(
                        str(told.get("sessionId")))

    def transcripts(self) -> List[str]:
        """The files under the roots that were written since the recording began and may be ours: to
        read all of them would take the longer the more agents are at work."""
        found = []
        for root in sorted(self.roots):
            for place, _, names in os.walk(root):
                for name in names:
                    path = os.path.join(place, name)
                    with contextlib.suppress(OSError, ValueError):
                        if (name.endswith((".json", ".jsonl"))
                                and os.stat(path).st_mtime >= self.began - EARLIER
                                and self._may_be_ours(path)):
                            found.append(path)
        return found

    def _may_be_ours(self, path: str) -> bool:
        identity = os.path.splitext(os.path.basename(path))[0]
        if identity in self.sessions or os.path.realpath(path) in self.open_files:
            return True
        # its transcripts do not say where they were written
        if f"{os.sep}.gemini{os.sep}tmp{os.sep}" in path:
            return True
        with open(path, "rb") as file:
            ends = file.read(HEAD)
            file.seek(max(len(ends), os.fstat(file.fileno()).st_size - HEAD))
            told = set(_CWD.findall(ends + file.read()))
        return any(os.path.realpath(json.loads(b'"%s"' % place)) in self.directories
                   for place in told)

    def is_ours(self, row: Dict[str, Any]) -> bool:
        """Whether a session that the module has read was this recording's."""
        path = os.path.realpath(row["path"])
        identity = os.path.splitext(os.path.basename(path))[0]
        if (row["source"] == "claude-code"
                and (identity in self.sessions or identity in self.others)):
            return identity in self.sessions
        opened = {file for file in self.open_files
                  if file.endswith(".jsonl") and "rollout-" in file}
        if row["source"] == "codex" and opened:
            return path in opened
        return row["source"] in AGENTS.values() and self._is_here(row, path)

    def _is_here(self, row: Dict[str, Any], path: str) -> bool:
        project = row.get("project") or ""
        if not project and row["source"] == "gemini-cli":
            above = os.path.dirname(os.path.dirname(path))  # tmp/NAME/chats/session-....json
            with contextlib.suppress(OSError), open(
                    os.path.join(above, ".project_root"), encoding="utf-8") as file:
                project = file.read().strip()
            if not project:
                hashes = {hashlib.sha256(place.encode()).hexdigest() for place in self.directories}
                return os.path.basename(above) in hashes
        project = os.path.realpath(project) if project else ""
        return project in self.directories


_HOMES_BYTES = {name.encode() for name in HOMES}


def descendants(pid: int) -> Iterator[int]:
    """A process and all below it, as far as the system tells."""
    yield pid
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                for child in file.read().split():
                    yield from descendants(int(child))


class Found(NamedTuple):
    """What the agents' own logs say of a recording."""

    sessions: List[str]  # their ids in the store
    tokens: Dict[str, int]  # by class, of the time of the recording alone
    calls: int
    cost: float  # USD at API prices
    sources: Set[str]  # readers


def read_logs(watch: Watch, optimizer: SessionOptimizer) -> Optional[Found]:
    """The tokens that the recorded agents' own logs name, which become sessions of the store, as
    ``scan`` makes them; None when no log of theirs is found."""
    files = watch.transcripts()
    if not files:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the terminal is the agent's
        ours = [row["path"] for row in _rows(files) if watch.is_ours(row)]
        if not ours:
            return None
        with locked(os.path.join(str(optimizer.storage_path), "agent-session.lock")):
            rows = optimizer.scan(ours)["sessions"]
        found = Found([], dict.fromkeys(CLASSES, 0), 0, 0.0, set())
        calls, cost = 0, 0.0
        for row in rows:
            session = optimizer.get_session(row["id"])
            part = _since(session, watch.began - EARLIER) if session else None
            if session is None or part is None:
                continue
            found.sessions.append(session.id)
            found.sources.add(row["source"])
            calls += part[1]
            cost += part[2]
            for name, count in part[0].items():
                found.tokens[name] += count
    return found._replace(calls=calls, cost=cost) if found.sessions else None


def _rows(files: Iterable[str]) -> List[Dict[str, Any]]:
    """What the module makes of these files, without keeping it."""
    place = tempfile.mkdtemp()
    try:
        return list(SessionOptimizer(place).scan(files)["sessions"])
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _since(session: Any, moment: float) -> Optional[Tuple[Dict[str, int], int, float]]:
    """(tokens by class, model calls, USD) of a session's events since then; None when there was no
    call."""
    import copy
    part = copy.copy(session)
    part.events, part.total_tokens_input, part.total_tokens_output, part.total_duration_ms = (
        [], 0, 0, 0)
    tokens, calls = dict.fromkeys(CLASSES, 0), 0
    for event in session.events:
        at = parse_time(event.timestamp)
        if at is not None and at.timestamp() < moment:
            continue
        part.add_event(event)
        calls += event.event_type.value == "AI_RESPONSE"
        tokens["uncached_input"] += event.tokens_input - event.tokens_cache_write
        tokens["cache_write"] += event.tokens_cache_write
        tokens["cache_write_1h"] += event.tokens_cache_write_1h
        tokens["cache_read"] += event.tokens_cache_read
        tokens["output"] += event.tokens_output
    return (tokens, calls, part.estimated_cost) if calls else None


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """One at a time: recordings that end together read their logs one after the other."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
