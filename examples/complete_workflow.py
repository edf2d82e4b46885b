#!/usr/bin/env python3
"""From a list of tasks to a checked bill: agents work, and every figure comes from a program here.

    python3 examples/complete_workflow.py --repo DIR \\
        --agent 'claude:2=claude -p {prompt} --permission-mode acceptEdits' [--test COMMAND] \\
        [--tasks FILE] [--knowledge FILE] [--ccusage FILE] [--name NAME] [--store DIR]
    python3 examples/complete_workflow.py               # the same, with a script for an agent

1 queue the tasks · 2 add what is known · 3 let the agents work · 4 what was merged · 5 what was not
· 6 what it cost · 7 tell who wasted · 8 reconcile with ccusage's count · 9 health · 10 keep what
was learned. Tasks are those of examples/crew, one JSON object per line. Copy ``crew/`` and the
programs it imports along.
"""
from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
if HERE not in sys.path:
    sys.path.append(HERE)
from agent_health import health_summary, print_health, worker_health  # noqa: E402
from crew import Bus, CrewError, Task  # noqa: E402
from crew.__main__ import Crew, build_parser, read_tasks, settings_of  # noqa: E402
from crew.agents import settle_left  # noqa: E402
from crew.report import crew_report, report_text, sessions_of  # noqa: E402
from knowledge_base import SqliteKnowledge  # noqa: E402
from message_bus_alerts import send_efficiency_alert, to_stdout  # noqa: E402
from sessionoptimizer import SessionOptimizerError, plain  # noqa: E402
from token_tracker import from_ccusage, print_rows, reconcile  # noqa: E402

ALERT_BELOW = 80.0  # percent
KNOWN = 3           # entries that go with a prompt
# Reads a file twice, writes one, and logs what it did as any agent may; one of its tasks is
# protected.
SCRIPT = """import os
from sessionoptimizer import SessionOptimizer
optimizer, task = SessionOptimizer(), os.environ["CREW_TASK"]
session, read = os.environ["SESSIONOPTIMIZER_SESSION"], {"file_path": os.path.abspath("app.txt")}
for _ in range(2):
    optimizer.log_event(session, "FILE_READ", read, tokens_input=900)
with open({"ci": ".gitlab-ci.yml"}.get(task, task + ".txt"), "w") as file:
    file.write(os.environ["CREW_PROMPT"] + "\\n")
optimizer.log_event(session, "AI_RESPONSE", tokens_output=400)
"""
TASKS = [Task("docs", "Write the API page", "Describe the endpoints."),
         Task("login", "Fix the login", "Lock it.", priority=90),
         Task("ci", "Speed up the tests", after=("docs",), max_attempts=1)]


def phase(number: int, title: str) -> None:
    """A heading."""
    print(f"\n{number}. {title}", flush=True)


def with_knowledge(task: Task, base: SqliteKnowledge) -> Task:
    """The task with what is known about its subject in its prompt."""
    found = base.query(f"{task.title} {task.prompt}", KNOWN)
    lines = "\n".join(f"- {topic}: {text}" for _, topic, text in found)
    prompt = ((task.prompt or task.title)
              + (f"\n\nKnown from earlier work:\n{lines}" if lines else ""))
    return Task(**{**task.__dict__, "prompt": prompt})


def queue_tasks(crew: Crew, bus: Bus, tasks: list[Task], base: SqliteKnowledge) -> None:
    """Phases 1 and 2. What is in the queue stays as it was submitted, whatever is known by now."""
    phase(1, "Queue the tasks")
    there = {state.task.id for state in bus.tasks()}
    new = [task for task in tasks if task.id not in there]
    print(f"{len(new)} new, {len(there)} there already; branch {crew.repository.into}")
    phase(2, "Add what is known")
    for task in new:
        known = with_knowledge(task, base)
        bus.submit(known)
        print(f"{plain(task.id)}: {known.prompt.count(chr(10) + '- ')} entries")


def let_them_work(crew: Crew, bus: Bus) -> dict[str, Any]:
    """Phases 3 to 6: the report of the crew."""
    phase(3, "Let the agents work")
    crew.pool().run()
    optimizer = crew.optimizer()
    settle_left(crew.repository, optimizer, bus.tasks())
    report = crew_report(bus, crew.repository, optimizer)
    print(", ".join(f"{plain(row['id'])}: {row['outcome']}" for row in report["tasks"]))
    phase(4, "What was merged")
    for row in report["tasks"]:
        if row.get("commit"):
            print(f"{row['commit'][:10]} {plain(row['title'])}: {plain(', '.join(row['files']))}")
    phase(5, "What was not")
    for row in report["tasks"]:
        if row.get("error"):
            print(f"{plain(row['id'])}: {plain(row['error'])}")
    phase(6, "What it cost")
    print(report_text(dict(report, tasks=[row for row in report["tasks"] if not row.get("error")])))
    return report


def look_back(crew: Crew, bus: Bus, ccusage: str) -> bool:
    """Phases 7 to 9; whether the reconciled tokens agree (True where there is nothing to reconcile
    with)."""
    optimizer, agree = crew.optimizer(), True
    found = [session for session, _ in sessions_of(optimizer, crew.repository.crew,
                                                   os.path.join(
                                                       crew.repository.state, "sessions.jsonl"))]
    phase(7, "Tell who wasted")
    told = [send_efficiency_alert(optimizer, session.id, to_stdout, ALERT_BELOW)
            for session in found]
    print(f"{sum(told)} of {len(found)} sessions below {ALERT_BELOW:g}%")
    phase(8, "Reconcile")
    if ccusage:
        with open(ccusage, encoding="utf-8") as file:
            counted = from_ccusage(file.read())
        rows = reconcile(optimizer, {session.id: counted[session.id] for session in found
                                     if session.id in counted})
        print_rows(rows)
        agree = all(row["equal"] for row in rows)
    else:
        print("no other count was given: npx ccusage session --json > FILE, then --ccusage FILE")
    phase(9, "Health")
    print_health([health_summary(optimizer, name)
                  for name in sorted({session.agent for session in found})], worker_health(bus))
    return agree


def keep_learned(report: dict[str, Any], base: SqliteKnowledge) -> None:
    """Phase 10: what was merged where, and what failed why, for the next tasks on the subject."""
    phase(10, "Keep what was learned")
    for row in report["tasks"]:
        text = f"changed {', '.join(row['files'])}" if row.get("commit") else row.get("error", "")
        if text and not any(topic == row["title"]
                            for _, topic, _ in base.query(row["title"], KNOWN)):
            base.save(row["title"], plain(text))
            print(f"{plain(row['title'])}: {plain(text)}")


def workflow(options: argparse.Namespace, tasks: list[Task]) -> int:
    """The ten phases: 0; 3 when a task is not done, or another count differs."""
    arguments = ["run", "--repo", options.repo, "--name", options.name, "--test", options.test,
                 "--store", options.store or ""]
    given = build_parser().parse_args(
        arguments + [word for agent in options.agent for word in ("--agent", agent)])
    crew = Crew(given, settings_of(given))
    crew.repository.prepare()
    path = options.knowledge or os.path.join(crew.repository.state, "knowledge.db")
    with crew.bus() as bus, closing(SqliteKnowledge(path)) as base:
        queue_tasks(crew, bus, tasks, base)
        report = let_them_work(crew, bus)
        agree = look_back(crew, bus, options.ccusage)
        keep_learned(report, base)
    return 0 if agree and all(row["status"] == "DONE" for row in report["tasks"]) else 3


def scratch_repository(folder: str) -> tuple[str, str]:
    """A repository with one file, and the agent that works on it."""
    script, top = os.path.join(folder, "agent.py"), os.path.join(folder, "app")
    with open(script, "w", encoding="utf-8") as file:
        file.write(SCRIPT)
    os.makedirs(top)
    git = functools.partial(subprocess.run, cwd=top, check=True, stdout=subprocess.DEVNULL)
    git(["git", "init", "-q", "-b", "main"])
    with open(os.path.join(top, "app.txt"), "w", encoding="utf-8") as file:
        file.write("an app\n")
    git(["git", "add", "-A"])
    git(["git", "-c", "user.name=Demo", "-c", "user.email=demo@example.org", "commit", "-q",
         "-m", "Base"])
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    return top, f"script:2={sys.executable} {script}"


def main(argv: list[str] | None = None) -> int:
    """Run the workflow."""
    parser = argparse.ArgumentParser(
        description="From a list of tasks to a checked bill, in ten phases.")
    parser.add_argument("--repo", metavar="DIR",
                        help="the repository (default: one of its own, with a script for an agent)")
    parser.add_argument("--agent", action="append", default=[], metavar="NAME[:COUNT]=COMMAND",
                        help="as for examples/crew")
    parser.add_argument("--tasks", metavar="FILE",
                        help="a file of tasks; without it, go on with those in the queue")
    parser.add_argument(
        "--test", default="", metavar="COMMAND", help="what has to pass before a merge")
    parser.add_argument("--knowledge", metavar="FILE",
                        help="the knowledge base (default: in the repository's .git)")
    parser.add_argument(
        "--ccusage", default="", metavar="FILE", help="what ccusage session --json printed")
    parser.add_argument(
        "--name", default="workflow", metavar="NAME", help="the crew's name (workflow)")
    parser.add_argument(
        "--store", metavar="DIR", help="where the sessions go (default: as for sessionoptimizer)")
    options = parser.parse_args(argv)
    if bool(options.repo) != bool(options.agent):
        parser.error("give --repo and --agent together")
    try:
        if options.repo:
            return workflow(options, read_tasks(options.tasks) if options.tasks else [])
        with tempfile.TemporaryDirectory() as folder:
            options.repo, agent = scratch_repository(folder)
            options.agent, options.store = [agent], options.store or os.path.join(folder, "store")
            options.name = f"{options.name}-{os.getpid()}"  # its sessions' ids begin so
            workflow(options, TASKS)  # one of them fails on purpose
    except (CrewError, SessionOptimizerError, OSError, ValueError, KeyError) as error:
        print(f"complete_workflow: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
