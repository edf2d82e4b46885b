#!/usr/bin/env python3
"""Time SessionOptimizer against the least any Python program could do, on data made here.

    python3 examples/benchmark.py                    # a table of ratios, the target beside each
    python3 examples/benchmark.py --quick --json     # small data, as JSON
    python3 examples/benchmark.py --svg FILE         # also draw how cost grows with size
    python3 examples/benchmark.py --against FILE     # another module with this API, in turn
    python3 examples/benchmark.py --real FOLDER      # also scan the transcripts there

Only ratios say something: each is the median over rounds in which ours and its floor ran in turn.
Times are CPU time, child processes included (not on Windows: it needs the module ``resource``).
Commands start as ``python -S -E``, the floor's too: what an installation's ``site`` takes is no
part of either. docs/performance.md shows a whole run.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import py_compile
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FULL = {"rounds": 5, "starts": 15, "events": 100_000, "sessions": 10_000, "megabytes": 50,
        "logged": 10_000, "files": 24_000}
QUICK = {"rounds": 1, "starts": 2, "events": 2_000, "sessions": 100, "megabytes": 1,
         "logged": 300, "files": 80}
READ, BEGIN = {"file_path": "src/module.py"}, 1_770_000_000  # the file read, and when
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def load(path: str, name: str) -> Any:
    """A module from its file, and a compiled copy of it in ``folder`` to run as
    ``python -m subject``."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.folder = tempfile.mkdtemp()
    py_compile.compile(shutil.copy(path, os.path.join(module.folder, "subject.py")))
    return module


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def make_event(chance: random.Random, number: int) -> Dict[str, Any]:
    kind, data = chance.choice([
        (kind, {"file_path": f"src/module_{chance.randrange(4000)}.py"})
        for kind in ("FILE_READ", "FILE_WRITE")] + [
        ("AI_RESPONSE", {}), ("THINKING", {}),
        ("SEARCH", {"query": f"def name_{chance.randrange(300)}"}),
        ("TOOL_CALL",
         {"tool": "bash", "command": f"pytest -q tests/test_{chance.randrange(30)}.py"}),
        ("ERROR",
         {"tool": "bash", "message": f"AssertionError: expected 3 got {chance.randrange(9)}"})])
    return {"id": f"e{number}", "timestamp": stamp(BEGIN + number), "event_type": kind,
            "data": data, "duration_ms": 20,
            "tokens_input": chance.randrange(3000), "tokens_output": chance.randrange(500)}


def make_store(module: Any, sessions: int, events: int) -> str:
    """A store with sessions of an agent BENCH, one begun every second up to now."""
    root, chance = tempfile.mkdtemp(), random.Random(1)
    os.makedirs(os.path.join(root, "sessions"))
    for number in range(sessions):
        session = {
            "id": f"bench-{number}", "agent": "BENCH", "task": "measure", "status": "ACTIVE",
            "metadata": {}, "ended_at": "",
            "started_at": stamp(time.time() - number), "model": "sonnet", "total_tokens_input": 0,
            "total_tokens_output": 0, "total_duration_ms": 0,
            "events": [make_event(chance, number) for number in range(events)]}
        # the first release's layout
        Path(root, "sessions", f"bench-{number}.json").write_text(json.dumps(session, indent=2))
        if hasattr(module, "Store"):
            module.SessionOptimizer(Path(root)).import_session(session)
    return root


def make_transcripts(megabytes: float, *, files: int = 0, turns: int = 60) -> str:
    """Transcripts in Claude Code's format, so much or so many: a text and a tool call per response,
    results of a few KB."""
    root, chance, session, size = tempfile.mkdtemp(), random.Random(2), 0, 0
    while size < megabytes * 1e6 or session < files:
        session += 1
        with open(os.path.join(root, f"{session:08d}-0000-4000-8000-000000000000.jsonl"),
                  "w") as file:
            for number, (kind, message) in enumerate(messages(chance, session, turns), 1):
                size += file.write(json.dumps({
                    "parentUuid": f"{session}-{number - 1}", "isSidechain": False,
                    "cwd": "/home/dev/project", "sessionId": f"{session:08d}", "version": "2.0.14",
                    "type": kind, "message": message,
                    "uuid": f"{session}-{number}", "timestamp": stamp(BEGIN + 7 * number)},
                    separators=(",", ":")) + "\n")
    return root


def messages(chance: random.Random, session: int, turns: int = 60) -> Iterator[Any]:
    words, context = ["loader", "index", "parse", "the", "of", "scan", "report", "file"], 20_000
    yield "user", {"role": "user", "content": "Make the loader tolerant of truncated files"}
    for turn in range(turns):
        path, entered = f"/home/dev/project/m{chance.randrange(12)}.py", chance.randrange(300, 3000)
        identity = f"t{session}_{turn}"
        name, arguments = chance.choice([
            ("Read", {"file_path": path}), ("Grep", {"pattern": f"def name_{chance.randrange(9)}"}),
            ("Bash", {"command": "cd /home/dev/project && pytest -q "
                      f"tests/test_{chance.randrange(60)}.py 2>&1 | tail -20"}),
            ("Edit", {"file_path": path, "old_string": "a = 1", "new_string": "a = 2"})])
        for block in ({"type": "text", "text": " ".join(chance.choices(words, k=60))},
                      {"type": "tool_use", "id": identity, "name": name, "input": arguments}):
            yield "assistant", {
                "id": f"msg_{session}_{turn}", "role": "assistant", "model": "claude-sonnet-4-5",
                "content": [block], "stop_reason": "tool_use",
                "usage": {"input_tokens": 5, "cache_creation_input_tokens": entered,
                          "cache_read_input_tokens": context, "output_tokens": 200}}
        context += entered
        text = "\n".join(f"{n:6}\t{' '.join(chance.choices(words, k=8))}"
                         for n in range(chance.randrange(20, 180)))
        yield "user", {"role": "user", "content": [
            {"tool_use_id": identity, "type": "tool_result", "content": text}]}


def cpu(run: Callable[[], Any]) -> float:
    """CPU seconds of a call, its child processes included."""
    before = [sum(resource.getrusage(whose)[:2])
              for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    run()
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2]
               + resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - sum(before)


def python(*words: str, **options: Any) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, "-S", "-E", *words], env=ENVIRONMENT, check=True,
                                  stdout=subprocess.DEVNULL, **options)


def command(module: Any, store: str, *words: str, **options: Any) -> Callable[[], Any]:
    return python("-m", "subject", "--store", store, *words, cwd=module.folder, **options)


def parse(folder: str, whole: bool = False, paths: Any = ()) -> Callable[[], None]:
    """``json.loads`` of every line of the files in a folder (or of the ``paths``), or of every
    ``whole`` file."""
    def run() -> None:
        for path in map(Path, paths or Path(folder).glob("*.json*")):
            with path.open("rb", buffering=1 << 20) as file:
                for line in [file.read()] if whole else file:
                    if whole or line.endswith(b"}\n") and line[:1] in b",{":
                        # real ones are damaged here and there
                        with contextlib.suppress(ValueError):
                            json.loads(line.lstrip(b","))
    return run


def peak(module: Any, *words: str) -> float:
    """The most memory a command takes, MB."""
    code = ("import subject, sys; subject.main(sys.argv[1:]); "
            "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line), "
            "file=sys.stderr)")
    if not os.path.exists("/proc/self/status"):
        return 0.0  # where it is not told without what the parent took
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code, *words], cwd=module.folder,
                          env=ENVIRONMENT, check=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return int(done.stderr.split()[-2]) / 1024


def logging(module: Any, size: int, count: int) -> Callable[[], None]:
    log = module.SessionOptimizer(Path(make_store(module, 1, size))).log_event
    return lambda: [log("bench-0", "FILE_READ", READ, 100) for _ in range(count)] and None


def forget(path: Path, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` without what an earlier run has saved."""
    return lambda: (path.exists() and path.unlink(), run())


class Benchmark:
    """Measures ours, the other module where there is one, and the floor in turn; collects the
    rows."""
    def __init__(self, sizes: Dict[str, int], ours: Any, other: Any = None):
        self.sizes, self.ours, self.other, self.rows = sizes, ours, other, []

    def row(self, what: str, make: Callable[[Any], Any], floor: Optional[Callable[[], Any]],
            target: Optional[float], *, rounds: int = 0, per: int = 0, alone: bool = True) -> None:
        """``make`` gives what is timed of a module, of ours ``alone`` or of both. ``per``:
        microseconds per item."""
        runs = [make(module)
                for module in ([self.ours] if alone or not self.other else [self.ours, self.other])]
        times = [[cpu(run) for run in runs + [floor] * bool(floor)]
                 for _ in range(rounds or self.sizes["rounds"])]
        ours, last = (statistics.median(row[0] for row in times),
                      statistics.median(row[-1] for row in times))
        figure, unit = (ours / per * 1e6, "us each") if per else (ours, "s")
        if floor:
            figure, unit = statistics.median(row[0] / row[-1] for row in times), "x floor"
        other = statistics.median(row[0] / row[1] for row in times) if len(runs) > 1 else None
        self.rows.append({"what": what, "unit": unit, "figure": figure, "target": target,
                          "against": other, "ours_s": ours,
                          "met": None if target is None else figure <= target,
                          "floor_s": last if floor else None})

    def run(self) -> None:
        """Logging, listing, statistics, one long session, transcripts."""
        sizes, count = self.sizes, self.sizes["logged"]
        self.row("log_event, session of 10 events", lambda m: logging(m, 10, count // 10), None, 60,
                 per=count // 10, alone=False)
        self.row(f"log_event, session of {count:,} events (floor: of 10)",
                 lambda m: logging(m, count, count // 10), logging(self.ours, 10, count // 10), 1.2)
        stores = {m: make_store(m, sizes["sessions"], 50) for m in (self.ours, self.other) if m}
        store = stores[self.ours]
        self.row(f"log command, {sizes['sessions']:,} sessions (floor: python, dataclasses, json)",
                 lambda m: command(m, store, "log", "bench-0", "FILE_READ", "--tokens-in", "9"),
                 python("-c", "import dataclasses, json"), 1.35, rounds=sizes["starts"])
        line = b'{"event_type": "FILE_READ", "data": {"file_path": "a.py"}, "tokens_input": 9}\n'
        self.row("log -, a stream of events",
                 lambda m: command(m, store, "log", "bench-1", "-", input=line * count),
                 None, 80, per=count)
        self.row(f"list, {sizes['sessions']:,} sessions (floor: python -c pass)",
                 lambda m: command(m, store, "list"), python("-c", "pass"), 14)
        loads = parse(os.path.join(store, "sessions"), whole=True)

        def again(module: Any) -> Callable[[], Any]:
            return lambda: module.SessionOptimizer(Path(stores[module])).agent_statistics("BENCH")

        self.row("stats, 50 events each (floor: json.load of all files)",
                 lambda m: forget(Path(stores[m], "state.sqlite3"), again(m)), loads, None,
                 rounds=1, alone=False)
        self.row("stats again, nothing changed (same floor)", again, loads, None, alone=False)
        long = {m: make_store(m, 1, sizes["events"]) for m in (self.ours, self.other) if m}
        self.row(f"analyze, {sizes['events']:,} events (floor: json.loads of each line)",
                 lambda m: lambda: m.SessionOptimizer(Path(long[m])).analyze("bench-0"),
                 parse(os.path.join(long[self.ours], "sessions")), 2.5, alone=False)
        tree, kept = make_transcripts(sizes["megabytes"]), tempfile.mkdtemp()
        scan = command(self.ours, kept, "scan", "--jobs", "1", tree)
        self.row(f"scan, {sizes['megabytes']} MB (floor: json.loads of each line)",
                 lambda m: forget(Path(kept, "state.sqlite3"), scan), parse(tree), 3.5)
        self.row("scan again, nothing changed", lambda m: scan, None, 0.3)
        self.fact(f"memory of scan, {sizes['megabytes']} MB",
                  peak(self.ours, "scan", "--no-store", "--jobs", "1", tree), "MB", None)
        self.fact(f"memory of analyze, {sizes['events']:,} events", peak(
            self.ours, "--store", long[self.ours], "analyze", "bench-0"), "MB",
            200 if sizes is FULL else None)
        self.grown(sizes["megabytes"])
        few, many = (make_transcripts(0, files=files, turns=0)
                     for files in (sizes["files"] // 8, sizes["files"]))
        costs = [cpu(command(self.ours, tempfile.mkdtemp(), "scan", folder))
                 for folder in (few, many)]
        self.fact(f"scan of sessions of one line, {sizes['files']:,} (floor: 8 times an eighth)",
                  costs[1] / costs[0] / 8, "x floor", 2.2)

    def grown(self, megabytes: int) -> None:
        """One large transcript, then ten lines more: what those cost beyond a scan that finds
        nothing new."""
        tree, kept = (make_transcripts(megabytes, turns=20_000 if megabytes > 9 else 200),
                      tempfile.mkdtemp())
        path, scan = sorted(Path(tree).iterdir())[-1], command(self.ours, kept, "scan", tree)
        with path.open("rb") as file:
            lines = file.readlines()
        path.write_bytes(b"".join(lines[:-10]))
        first, nothing = cpu(scan), cpu(scan)
        path.write_bytes(b"".join(lines))
        self.fact(f"scan of ten lines more, in {sum(map(len, lines)) / 1e6:.0f} MB (floor: "
                  "the first scan)", max(0.0, cpu(scan) - nothing) / first, "x floor", 0.25)

    def real(self, folder: str) -> None:
        """The transcripts below a folder, each agent's by itself."""
        paths: Dict[str, List[str]] = {}
        for path, _, _ in self.ours.find_transcripts([folder]):
            paths.setdefault(self.ours.describe_transcript(path)["reader"], []).append(path)
        for reader, target in (("claude-code", 3.5), ("codex", 4.4)):
            if paths.get(reader):
                size = sum(map(os.path.getsize, paths[reader])) / 1e6
                self.row(f"scan of real {reader}, {size:.0f} MB (floor: json.loads of each line)",
                         lambda m, its=paths[reader]: command(m, tempfile.mkdtemp(), "scan",
                                                              "--no-store", "--jobs", "1", *its),
                         parse("", paths=paths[reader]), target)

    def fact(self, what: str, figure: float, unit: str, target: Optional[float]) -> None:
        """A figure that was measured once."""
        self.rows.append({"what": what, "unit": unit, "figure": figure, "target": target,
                          "against": None, "ours_s": None,
                          "met": None if target is None else figure <= target, "floor_s": None})


def growth(module: Any, sizes: Dict[str, int]) -> Dict[str, List[Any]]:
    """CPU seconds by size: a session's analysis, listing and statistics of a store, a scan. Making
    the data is not timed."""
    curves: Dict[str, List[Any]] = {"analyze: events": [], "list: sessions": [],
                                    "stats: sessions": [], "scan: megabytes": []}
    for step in (1, 2, 3, 4):
        events, sessions, size = (sizes[name] * step / 4
                                  for name in ("events", "sessions", "megabytes"))
        long, many = (module.SessionOptimizer(make_store(module, *shape))
                      for shape in ((1, int(events)), (int(sessions), 5)))
        tree = make_transcripts(size)
        for curve, at, run, words in zip(curves.values(), (events, sessions, sessions, size),
                                         (long.analyze, many.list_sessions, many.agent_statistics,
                                          many.scan), (["bench-0"], [], ["BENCH"], [[tree]])):
            curve.append((at, cpu(partial(run, *words))))
    return curves


def picture(curves: Dict[str, List[Any]]) -> str:
    """One panel per curve, both axes from 0: a straight line is cost in proportion to size."""
    parts = []
    for number, (name, points) in enumerate(curves.items()):
        most, width = max(cost for _, cost in points), max(size for size, _ in points) or 1
        spots = " ".join(f"{size / width * 150:.1f},{130 - cost / most * 110:.1f}"
                         for size, cost in [(0, 0.0)] + points)
        parts.append(f'<g transform="translate({20 + number * 190},30)"><text y="-10">{name}</text>'
                     '<path d="M0,10V130H155" fill="none" stroke="#888"/><polyline '
                     f'points="{spots}" fill="none" stroke="#06c" '
                     'stroke-width="2"/><text x="150" y="146" '
                     f'text-anchor="end">{width:,.0f}</text>'
                     f'<text x="4" y="14">{most:.2f} s</text></g>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 190" '
            'font-family="sans-serif" font-size="11"><title>'
            'CPU seconds by size</title><rect width="780" height="190" '
            f'fill="#fff"/>{"".join(parts)}</svg>\n')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in (("quick", {"action": "store_true"}), ("json", {"action": "store_true"}),
                           ("against", {}), ("svg", {}), ("real", {"metavar": "FOLDER"})):
        parser.add_argument("--" + name, **settings)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        tempfile.tempdir = work  # everything made here goes with it
        ours, sizes = (load(os.path.join(ROOT, "sessionoptimizer.py"), "ours"),
                       QUICK if options.quick else FULL)
        benchmark = Benchmark(sizes, ours,
                              load(options.against, "other") if options.against else None)
        benchmark.run()
        if options.real:
            benchmark.real(os.path.abspath(options.real))
        if options.svg:
            Path(options.svg).write_text(picture(growth(ours, sizes)), encoding="utf-8")
        tempfile.tempdir = None
    if options.json:
        print(json.dumps(
            {"python": sys.version.split()[0], "sizes": sizes, "rows": benchmark.rows}, indent=2))
    for row in [] if options.json else benchmark.rows:
        goal = ("" if row["target"] is None
                else f"target {row['target']:g}: " + ("met" if row["met"] else "missed"))
        other = "" if row["against"] is None else f"  {row['against']:.3f} of the other"
        print(f"{row['what']:<70}{row['figure']:>8.2f} {row['unit']:<8} {goal}{other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
