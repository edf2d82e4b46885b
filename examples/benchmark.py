#!/usr/bin/env python3
"""Time SessionOptimizer against the least any Python program could do, on data made here.

    python3 examples/benchmark.py                    # a table of ratios, the target beside each; about ten minutes
    python3 examples/benchmark.py --quick --json     # small data, as JSON
    python3 examples/benchmark.py --svg cost.svg     # how cost grows with events, sessions and megabytes
    python3 examples/benchmark.py --against FILE     # another module with this API, beside ours

Machines differ, and one machine from hour to hour: only the ratios say something. Each is the median over rounds in
which ours and its floor ran in turn; times are CPU time. docs/performance.md shows a whole run.
"""
from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import py_compile
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FULL = {"rounds": 5, "starts": 15, "events": 100_000, "sessions": 10_000, "megabytes": 50, "logged": 10_000}
QUICK = {"rounds": 1, "starts": 2, "events": 2_000, "sessions": 100, "megabytes": 1, "logged": 300}
Row = Dict[str, Any]
READ = {"file_path": "src/module.py"}


def load(path: str, name: str) -> Any:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# data

def make_event(chance: random.Random, number: int) -> Dict[str, Any]:
    """One event of a hand-logged session."""
    kind, data = chance.choice([
        ("FILE_READ", {"file_path": f"src/package_{chance.randrange(10)}/module_{chance.randrange(400)}.py"}),
        ("FILE_WRITE", {"file_path": f"src/package_{chance.randrange(10)}/module_{chance.randrange(400)}.py"}),
        ("SEARCH", {"query": f"def name_{chance.randrange(300)}"}), ("AI_RESPONSE", {}), ("THINKING", {}),
        ("TOOL_CALL", {"tool": "bash", "command": f"pytest -q tests/test_{chance.randrange(30)}.py"}),
        ("ERROR", {"tool": "bash", "message": f"AssertionError: expected 3 got {chance.randrange(9)}"})])
    stamp = f"2026-03-{1 + number // 86400 % 28:02d}T{number // 3600 % 24:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000000+00:00"
    return {"id": f"e{number}", "timestamp": stamp, "event_type": kind, "data": data,
            "tokens_input": chance.randrange(3000), "tokens_output": chance.randrange(500), "duration_ms": 20}


def make_sessions(module: Any, root: str, sessions: int, events: int) -> str:
    """A store with sessions of an agent BENCH that began within the last minutes."""
    optimizer, chance = module.SessionOptimizer(root), random.Random(1)
    for number in range(sessions):
        started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - number)) + ".000000+00:00"
        optimizer.import_session({
            "id": f"bench-{number}", "agent": "BENCH", "task": "measure", "status": "COMPLETED", "started_at": started,
            "ended_at": started, "model": "sonnet", "metadata": {}, "total_tokens_input": 0, "total_tokens_output": 0,
            "total_duration_ms": 0, "events": [make_event(chance, n) for n in range(events)]})
        optimizer.sessions_held = None
    return root


def make_transcripts(root: str, megabytes: float) -> str:
    """Transcripts in Claude Code's format: responses over several lines, a tool call each, results of a few KB."""
    chance, session, size = random.Random(2), 0, 0
    words = [chance.choice(["loader", "index", "parse", "the", "of", "scan", "report", "file"]) for _ in range(500)]
    os.makedirs(os.path.join(root, "projects"))
    while size < megabytes * 1e6:
        session += 1
        path = os.path.join(root, "projects", f"{session:08d}-0000-4000-8000-000000000000.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            for line in transcript_lines(chance, session, words):
                size += file.write(json.dumps(line, separators=(",", ":")) + "\n")
    return root


def transcript_lines(chance: random.Random, session: int, words: List[str], turns: int = 60):
    """The lines of one session."""
    context, clock, parent = 20_000, 0, None

    def line(kind: str, message: Dict[str, Any], **more: Any) -> Dict[str, Any]:
        nonlocal clock, parent
        clock += 7
        uuid = f"{session:08d}-{clock:04d}-4000-8000-000000000000"
        entry = {"parentUuid": parent, "isSidechain": False, "userType": "external", "cwd": "/home/dev/project",
                 "sessionId": f"{session:08d}", "version": "2.0.14", "type": kind, "message": message, "uuid": uuid,
                 "timestamp": f"2026-03-01T{clock // 3600:02d}:{clock // 60 % 60:02d}:{clock % 60:02d}.000Z", **more}
        parent = uuid
        return entry

    yield line("user", {"role": "user", "content": "Make the loader tolerant of truncated files"})
    for turn in range(turns):
        path = f"/home/dev/project/src/module_{chance.randrange(12)}.py"
        call = chance.choice([("Read", {"file_path": path}), ("Grep", {"pattern": f"def name_{chance.randrange(9)}"}),
                              ("Bash", {"command": f"cd /home/dev/project && pytest -q tests/test_{chance.randrange(60)}.py 2>&1 | tail -20"}),
                              ("Edit", {"file_path": path, "old_string": "a = 1", "new_string": "a = 2"})])
        written, entered = chance.randrange(50, 400), chance.randrange(300, 3000)
        message = {"id": f"msg_{session}_{turn}", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5",
                   "stop_reason": "tool_use", "usage": {
                       "input_tokens": 5, "cache_creation_input_tokens": entered, "cache_read_input_tokens": context,
                       "output_tokens": written}}
        context += entered
        identity = f"toolu_{session}_{turn}"
        for block in ({"type": "text", "text": " ".join(chance.sample(words, 40))},
                      {"type": "tool_use", "id": identity, "name": call[0], "input": call[1]}):
            yield line("assistant", dict(message, content=[block]), requestId=f"req_{turn}")
        text = "\n".join(f"{n:6}\t{' '.join(chance.sample(words, 8))}" for n in range(1, chance.randrange(20, 180)))
        yield line("user", {"role": "user", "content": [
            {"tool_use_id": identity, "type": "tool_result", "content": text}]}, toolUseResult={"stdout": text})


# measuring

def cpu(run: Callable[[], Any]) -> float:
    """CPU seconds of a call, its child processes included."""
    before = os.times()
    run()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def pairs(ours: Callable[[], Any], floor: Callable[[], Any], rounds: int) -> Tuple[float, float, float]:
    """Medians of ours, of the floor, and of their ratio, run in turn."""
    times = [(cpu(ours), cpu(floor)) for _ in range(rounds)]
    return (statistics.median(one for one, _ in times), statistics.median(other for _, other in times),
            statistics.median(one / max(other, 1e-9) for one, other in times))


def clean_environment() -> Dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


class Command:
    """The command line of a module, compiled, run in processes of its own."""

    def __init__(self, path: str, work: str):
        self.folder = tempfile.mkdtemp(dir=work)
        with open(path, "rb") as source, open(os.path.join(self.folder, "subject.py"), "wb") as copy:
            copy.write(source.read())
        py_compile.compile(os.path.join(self.folder, "subject.py"))

    def run(self, store: str, *words: str, **options: Any) -> None:
        environment = dict(clean_environment(), SESSIONOPTIMIZER_HOME=store)
        subprocess.run([sys.executable, "-m", "subject", *words], env=environment, cwd=self.folder, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def python(code: str) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, "-c", code], env=clean_environment(), check=True)


def parse_lines(pattern: str) -> Callable[[], None]:
    """The floor of reading: ``json.loads`` of every line of the files."""
    def run() -> None:
        for path in glob.glob(pattern, recursive=True):
            with open(path, "rb", buffering=1 << 20) as file:
                for line in file:
                    line = line.lstrip(b",")
                    if line.startswith(b"{") and line.rstrip().endswith(b"}"):
                        json.loads(line)
    return run


def parse_files(pattern: str) -> Callable[[], None]:
    """The floor of statistics: ``json.load`` of every file."""
    def run() -> None:
        for path in glob.glob(pattern):
            with open(path, "rb") as file:
                json.load(file)
    return run


def log_many(module: Any, root: str, size: int, count: int) -> float:
    """Microseconds of ``log_event`` at the end of a session of this size."""
    optimizer = module.SessionOptimizer(root)
    session = optimizer.start_session("BENCH", "measure")
    for _ in range(size):
        optimizer.log_event(session.id, "FILE_READ", READ, 100)
    return cpu(lambda: [optimizer.log_event(session.id, "FILE_READ", READ, 100) for _ in range(count)]) / count * 1e6


def written_bytes(run: Callable[[], Any]) -> Optional[int]:
    """Bytes this process hands to the system meanwhile; None where the system does not count."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            before = int(file.read().split("wchar: ")[1].split()[0])
        run()
        with open("/proc/self/io", encoding="ascii") as file:
            return int(file.read().split("wchar: ")[1].split()[0]) - before
    except OSError:
        return None
