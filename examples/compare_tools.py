#!/usr/bin/env python3
"""What ccusage, codeburn, cachemiss and this tool say of the same transcripts, in tables.

    python3 examples/compare_tools.py                     the sample transcripts
    python3 examples/compare_tools.py FOLDER              a folder laid out like
                                                          examples/transcripts (claude-code, codex,
                                                          gemini)

A home of its own is made in a temporary directory, with the transcripts where each agent would keep
them and days moved so that the newest is yesterday's: some tools look back half a year at most.
Tools that are on the path are run as they are; the others come from npm (ccusage, codeburn, and
Node where it is too old) and PyPI (cachemiss) into that directory. Each tool's own figures are
shown, with its version; one that cannot be had is named with the reason. docs/comparison.md has a
run and what explains it.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULE = os.path.join(ROOT, "sessionoptimizer.py")
WAIT = 300  # seconds for one command
DAY = re.compile(rb"20\d\d-\d\d-\d\d(?=T\d\d[:-]\d\d)")
# folder: the name other tools give
AGENTS = {"claude-code": "claude", "codex": "codex", "gemini": "gemini"}
COLUMNS = ("sessions", "calls", "uncached input", "cache writes", "cache reads", "output", "USD")


class NotHere(Exception):
    """A tool that cannot be had or gave no figures; says why."""


def run(*words: str, **environment: str) -> str:
    """What a command prints; NotHere with its last line where it fails."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT,
                              env=dict(os.environ, **environment))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotHere(str(error)) from None
    out, errors = (done.stdout.decode("utf-8", "replace"),
                   done.stderr.decode("utf-8", "replace").strip())
    if done.returncode:
        raise NotHere((errors or out.strip() or f"status {done.returncode}").splitlines()[-1][:200])
    return out


def lay_out(source: str, home: str) -> None:
    """The transcripts where the agents keep them, the newest from yesterday."""
    found = [(agent, os.path.join(base, name)) for agent in AGENTS
             for base, _, names in os.walk(os.path.join(source, agent)) for name in names]
    newest = "2026-01-01"
    for _, path in found:
        with open(path, "rb") as file:
            newest = max([newest, *(day.decode() for day in DAY.findall(file.read()))])
    shift = datetime.date.today() - datetime.timedelta(1) - datetime.date.fromisoformat(newest)

    def moved(match: re.Match) -> bytes:
        return (datetime.date.fromisoformat(match.group().decode()) + shift).isoformat().encode()

    for agent, path in found:
        case, _, rest = os.path.relpath(path, os.path.join(source, agent)).partition(os.sep)
        folder, name = os.path.split(rest)
        name = DAY.sub(moved, name.encode()).decode()
        day = DAY.search(name.encode())
        place = {"claude-code": (".claude", "projects", folder),
                 "gemini": (".gemini", "tmp", case, "chats"),
                 "codex": (".codex", "sessions",
                           *(day.group().decode().split("-") if day else ()))}[agent]
        os.makedirs(os.path.join(home, *place), exist_ok=True)
        with open(path, "rb") as file, open(os.path.join(home, *place, name), "wb") as copy:
            copy.write(DAY.sub(moved, file.read()))


class Tools:
    """Finds the tools, or gets them into a folder."""

    def __init__(self, folder: str):
        self.folder, self.path = folder, os.environ["PATH"]

    def node(self, name: str, *native: str) -> list[str]:
        """The command of an npm package. ``native``: of its package for this machine, without which
        it does not run."""
        here = shutil.which(name)
        if here:
            return [here]
        if not shutil.which("npm"):
            raise NotHere("not on the path, and npm is not here")
        wanted, kind = name, {"x86_64": "x64", "AMD64": "x64", "aarch64": "arm64"}.get(
            platform.machine(), platform.machine())
        machine = (
            f"{ {'Windows': 'win32'}.get(platform.system(), platform.system().lower())}-{kind}")
        for package in native:  # the newest release that has its part for this machine
            wanted = f"{name}@{self.npm('view', f'{package}-{machine}', 'version').strip()}"
        packages = [wanted]
        if tuple(map(int, re.findall(r"\d+", run("node", "--version"))[:2])) < (22, 13):
            packages.append(f"node-{machine.replace('win32', 'win')}@^22.13")
        self.npm("install", "--prefix", self.folder, *packages)
        modules = os.path.join(self.folder, "node_modules")
        self.path = os.pathsep.join(
            [os.path.join(modules, packages[-1].partition("@")[0], "bin"), self.path])
        return [os.path.join(modules, ".bin", name)]

    def npm(self, *words: str) -> str:
        return run("npm", *words, *"--silent --no-audit --no-fund --loglevel=error".split())

    def python(self, name: str) -> list[str]:
        """The command of a Python package."""
        here = shutil.which(name)
        if not here:
            place = os.path.join(self.folder, "venv")
            venv.create(place, with_pip=True)
            programs = os.path.join(place, "Scripts" if os.name == "nt" else "bin")
            run(os.path.join(programs, "python"), "-m", "pip", "install", "-q", name)
            here = os.path.join(programs, name)
        return [here]


def told(command: list[str], *words: str, home: str, path: str = "") -> Any:
    """The JSON a tool prints of the transcripts in a home."""
    return json.loads(run(*command, *words, HOME=home, USERPROFILE=home, TZ="UTC", NO_COLOR="1",
                          PATH=path or os.environ["PATH"]))


def ours(home: str, tools: Tools) -> dict[str, Any]:
    rows, notes = {}, []
    for folder, agent in AGENTS.items():
        name = "gemini-cli" if folder == "gemini" else folder
        found = told([sys.executable, MODULE], "scan", "--no-store", "--format", "json", "--agent",
                     name, home=home)
        totals, rebuilds = found["totals"], found["bill"]["rebuilds"]
        rows[agent] = [totals["sessions"], totals["model_calls"], *totals["tokens"].values(),
                       totals["estimated_cost"]]
        notes.append(
            f"{agent}: waste ${totals['waste']['measured_cost']:.4f} measured, "
            f"up to ${totals['waste']['cost']:.4f}; "
            f"{len(rebuilds)} rebuilds of {sum(each['tokens'] for each in rebuilds):,} tokens, "
            f"${sum(each['net_cost'] for each in rebuilds):.4f} above a read")
    return {"version": run(sys.executable, MODULE, "version").split()[-1], "rows": rows,
            "notes": notes}


def ccusage(home: str, tools: Tools) -> dict[str, Any]:
    command, rows = tools.node("ccusage", "@ccusage/ccusage"), {}
    for agent in AGENTS.values():
        sessions = told(command, agent, "session", "--json", "--offline", home=home,
                        path=tools.path)["sessions"]
        totals = told(
            command, agent, "daily", "--json", "--offline", home=home, path=tools.path)["totals"]
        names = "inputTokens", "cacheCreationTokens", "cacheReadTokens", "outputTokens"
        rows[agent] = [len(sessions), None, *(totals[name] for name in names),
                       totals.get("totalCost", totals.get("costUSD"))]
    version = run(*command, "--version", PATH=tools.path).split()[-1]
    return {"version": version, "rows": rows,
            "notes": ["days, months, sessions, models; no waste, no rebuilds"]}


def codeburn(home: str, tools: Tools) -> dict[str, Any]:
    command, rows = tools.node("codeburn"), {}
    for agent in AGENTS.values():
        found = told(command, "report", "--period", "all", "--provider", agent, "--format", "json",
                     home=home, path=tools.path)["overview"]
        rows[agent] = [found["sessions"], found["calls"], *(found["tokens"][name] for name in (
            "input", "cacheWrite", "cacheRead", "output")), found["cost"]]
    found = told(
        command, "optimize", "--period", "all", "--format", "json", home=home, path=tools.path)
    titles = "; ".join(finding.get("title", "?") for finding in found["findings"])
    notes = [f"all agents: could save {found['summary']['potentialSavingsTokens']:,} tokens, "
             f"${found['summary']['potentialSavingsCostUSD']:.4f} ({titles})"]
    return {"version": run(*command, "--version", PATH=tools.path).split()[-1], "rows": rows,
            "notes": notes}


def cachemiss(home: str, tools: Tools) -> dict[str, Any]:
    command = tools.python("cachemiss")
    found = told(command, "ledger", "--since", "all", "--json", "--limit", "100000", home=home)
    rebuilds = found["rebuilds"]
    notes = [f"claude: {len(rebuilds)} rebuilds of "
             f"{sum(each['rebuilt_tokens'] for each in rebuilds):,} tokens, "
             f"${sum(each['premium'] for each in rebuilds):.4f} above a read; "
             "Claude Code only, no bill"]
    rows = {"claude": [found["sessions"], found["calls"], found["input_tokens"],
                       found["cache_creation"], found["cache_read"], found["output_tokens"], None]}
    return {"version": run(*command, "--version").split()[-1], "rows": rows, "notes": notes}


def table(agent: str, results: dict[str, Any]) -> str:
    lines = [f"{agent:<16}" + "".join(f"{name:>16}" for name in COLUMNS)]
    for name, result in results.items():
        row = result.get("rows", {}).get(agent)
        if row:
            shown = [f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" for value in row
                     if value is not None]
            cells = [shown.pop(0) if value is not None else "-" for value in row]
            lines.append(f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=os.path.join(ROOT, "examples", "transcripts"),
                        help="default: the samples")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        home, tools = os.path.join(place, "home"), Tools(os.path.join(place, "tools"))
        lay_out(options.folder, home)
        for name, ask in (("sessionoptimizer", ours), ("ccusage", ccusage), ("codeburn", codeburn),
                          ("cachemiss", cachemiss)):
            try:
                results[name] = ask(home, tools)
            except (NotHere, KeyError, TypeError, ValueError) as error:
                results[name] = {
                    "notes": [f"skipped: {error if isinstance(error, NotHere) else repr(error)}"]}
    print("\n\n".join(table(agent, results) for agent in AGENTS.values()), end="\n\n")
    for name, result in results.items():
        print("\n".join(f"{name} {result.get('version', '')}".strip() + f": {note}"
                        for note in result["notes"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
