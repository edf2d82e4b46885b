"""Several agents on one repository.

    python3 examples/crew run TASKS.jsonl \\
        --agent 'claude:2=claude -p {prompt} --permission-mode acceptEdits' \\
        --test 'python3 -m pytest -q' --protect 'migrations/*'
    python3 examples/crew status | report | send TO TEXT | receive NAME | clean

A task is a line of JSON: {"id": "login", "title": "Sign in by e-mail", "prompt": "...", "priority":
90, "requires": ["python"], "after": ["schema"]}. Run it again to go on where it ended; see
docs/crew.md.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from typing import Any, Dict, List, Optional

EXAMPLES = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.dirname(EXAMPLES), EXAMPLES]
from crew import ALL, Bus, CrewError, Task, open_bus  # noqa: E402  (found through the line above)
from crew.agents import Agent, settle_left  # noqa: E402
from crew.pool import Pool  # noqa: E402
from crew.report import crew_report, report_text  # noqa: E402
from crew.repository import Repository  # noqa: E402
from crew.worker import Rules, Worker  # noqa: E402
from sessionoptimizer import SessionOptimizer, SessionOptimizerError, plain  # noqa: E402

DONE, FAILED, USAGE, NOT_ALL = 0, 1, 2, 3
PROTECTED = (".github/*", ".gitlab-ci.yml", ".gitmodules", ".env", ".env.*", "*.pem",
             "*.key", "id_rsa*")


class Crew:
    """A crew of a repository by its name, as its settings in the repository's state say."""

    def __init__(self, options: argparse.Namespace, settings: Optional[Dict[str, Any]] = None):
        into = (settings or {}).get("into", "")
        self.repository = Repository(options.repo, options.name, into)
        self.path = os.path.join(self.repository.state, "crew.json")
        if settings is None:
            self.settings = self._read()
            self.repository = Repository(options.repo, options.name, self.settings["into"])
        else:
            self.settings = settings
            self._write()

    def _read(self) -> Dict[str, Any]:
        try:
            with open(self.path, encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError as error:
            raise CrewError(
                f"no crew {self.repository.crew} has run in {self.repository.top}") from error

    def _write(self) -> None:
        with open(self.path + ".new", "w", encoding="utf-8") as file:
            json.dump(self.settings, file, indent=2)
        os.replace(self.path + ".new", self.path)

    def bus(self) -> Bus:
        """The crew's queue and bus."""
        where = self.settings["queue"] or os.path.join(self.repository.state, "queue.db")
        return open_bus(
            where, name=f"crew:{self.repository.crew}", lease_seconds=self.settings["lease"])

    def optimizer(self) -> SessionOptimizer:
        """The store its sessions go to."""
        return SessionOptimizer(self.settings["store"] or None)

    def agents(self) -> Dict[str, Agent]:
        """The agent of every worker."""
        kinds = [Agent.parse(text) for text in self.settings["agents"]]
        return {f"{kind.name}-{number}": kind for kind in kinds
                for number in range(1, kind.count + 1)}

    def rules(self) -> Rules:
        """What its agents are held to."""
        return Rules(**self.settings["rules"])

    def pool(self) -> Pool:
        """A process for every worker."""
        command = [sys.executable, os.path.dirname(os.path.abspath(__file__)), "work", "--repo",
                   self.repository.top, "--name", self.repository.crew]
        return Pool({name: [*command, "--worker", name] for name in self.agents()},
                    lambda text: print(text, file=sys.stderr))


def read_tasks(path: str) -> List[Task]:
    """The tasks of a file of JSON lines; ``-`` is standard input."""
    with (sys.stdin if path == "-" else open(path, encoding="utf-8")) as file:
        return [Task.from_json(line) for line in file if line.strip()]


def settings_of(options: argparse.Namespace) -> Dict[str, Any]:
    """What ``run`` keeps for the workers and for the other commands."""
    store = os.path.abspath(options.store) if options.store else ""
    queue = (options.queue if "://" in options.queue or not options.queue
             else os.path.abspath(options.queue))
    rules = {"test": options.test, "forbidden": options.forbid,
             "agent_seconds": options.agent_seconds,
             "protected": [*([] if options.unprotected else PROTECTED), *options.protect],
             "test_seconds": options.test_seconds}
    return {"into": options.into, "queue": queue, "store": store, "lease": options.lease,
            "agents": options.agent, "limit": options.limit, "rules": rules}


def run(options: argparse.Namespace) -> int:
    """Add tasks and work until everything is merged, or named as what it failed at."""
    tasks = read_tasks(options.tasks) if options.tasks else []
    crew = Crew(options, settings_of(options))
    agents = crew.agents()
    crew.repository.prepare()
    with crew.bus() as bus:
        for task in tasks:
            bus.submit(task)
        unable = [state.task for state in bus.tasks() if state.status in ("READY", "WAITING")
                  and not any(set(state.task.requires) <= set(agent.capabilities)
                              for agent in agents.values())]
        for task in unable:  # another run may bring who can
            print(f"nobody can do {plain(task.id)}: it requires {', '.join(task.requires)}",
                  file=sys.stderr)
        crew.pool().run()
        settle_left(crew.repository, crew.optimizer(), bus.tasks())
        return show_report(crew, bus, options.format)


def show_report(crew: Crew, bus: Bus, form: str) -> int:
    """Print the report; NOT_ALL when a task is not done."""
    report = crew_report(bus, crew.repository, crew.optimizer())
    print(json.dumps(report, indent=2) if form == "json" else report_text(report))
    return DONE if all(row.get("status") == "DONE" for row in report["tasks"]) else NOT_ALL


def work(options: argparse.Namespace) -> int:
    """What one worker of the pool does; it ends when its standard input does."""
    crew = Crew(options)
    threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM)),
                     daemon=True).start()
    with crew.bus() as bus:
        Worker(bus, crew.repository, crew.agents()[options.worker], crew.rules(),
               name=options.worker,
               store=crew.settings["store"], limit=crew.settings["limit"]).run()
    return DONE


def status(options: argparse.Namespace) -> int:
    """Print how every task stands."""
    with Crew(options).bus() as bus:
        for state in bus.tasks():
            print(f"{state.status:<8} {state.task.priority:>4} {plain(state.task.id, 20):<20} "
                  f"{plain(state.agent, 12):<12} {plain(state.task.title, 60)}")
    return DONE


def report(options: argparse.Namespace) -> int:
    """Print what the work cost and what came of it."""
    crew = Crew(options)
    with crew.bus() as bus:
        return show_report(crew, bus, options.format)


def send(options: argparse.Namespace) -> int:
    """Send a note: it goes with the next prompt of the worker, or of every worker."""
    with Crew(options).bus() as bus:
        print(bus.send(options.sender, ALL if options.to.lower() == "all" else options.to,
                       options.text, priority=options.priority))
    return DONE


def receive(options: argparse.Namespace) -> int:
    """Print the messages for a name as JSON lines, and acknowledge them."""
    with Crew(options).bus() as bus:
        for message in bus.receive(options.as_, limit=100, wait=options.wait):
            print(json.dumps({"id": message.id, "from": message.sender, "to": message.to,
                              "body": message.body}), flush=True)
            message.acknowledge()
    return DONE


def clean(options: argparse.Namespace) -> int:
    """Remove the worktrees that killed workers left."""
    crew = Crew(options)
    with crew.bus() as bus:
        settle_left(crew.repository, crew.optimizer(), bus.tasks())
    return DONE


def add_run(parser: argparse.ArgumentParser) -> None:
    """The options of ``run``."""
    parser.add_argument("tasks", nargs="?", metavar="TASKS",
                        help="a file of JSON lines, - for standard input; without it, go on")
    parser.add_argument(
        "--agent", action="append", required=True, metavar="NAME[:COUNT[:CAPABILITY,...]]=COMMAND",
        help="an agent's command with {prompt} in it, how many may run (1), what they can do")
    parser.add_argument("--limit", type=int, default=0, metavar="N",
                        help="at most N agents at once, over all kinds and runs")
    parser.add_argument(
        "--test", default="", metavar="COMMAND", help="what has to pass before a merge")
    parser.add_argument(
        "--protect", action="append", default=[], metavar="GLOB", help="paths no agent may change")
    parser.add_argument("--forbid", action="append", default=[], metavar="REGEX",
                        help="what no added line may contain")
    parser.add_argument(
        "--unprotected", action="store_true", help="drop the protected paths that are built in")
    parser.add_argument(
        "--into", default="", metavar="BRANCH", help="the branch to merge into (crew/NAME)")
    parser.add_argument("--queue", default="", metavar="WHERE",
                        help="a file or a redis:// URL (in the repository's .git)")
    parser.add_argument("--store", default="", metavar="DIR",
                        help="where the sessions go (as for sessionoptimizer)")
    parser.add_argument("--lease", type=float, default=60.0, metavar="S",
                        help="seconds without a sign of life (60)")
    parser.add_argument("--agent-seconds", type=float, default=3600.0, metavar="S",
                        help="longest run of an agent (3600)")
    parser.add_argument("--test-seconds", type=float, default=900.0, metavar="S",
                        help="longest run of the tests (900)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="crew", description="Several agents on one repository.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (run, work, status, report, send, receive, clean):
        one = commands.add_parser(
            function.__name__, help=function.__doc__.split("\n")[0], allow_abbrev=False)
        one.set_defaults(function=function)
        one.add_argument("--repo", default=".", metavar="DIR", help="the repository (here)")
        one.add_argument("--name", default=os.environ.get("CREW_NAME", "crew"), metavar="NAME",
                         help="the crew's name (crew)")
        if function is run:
            add_run(one)
    commands.choices["work"].add_argument("--worker", required=True, metavar="NAME")
    commands.choices["report"].add_argument("--format", choices=("text", "json"), default="text")
    commands.choices["send"].add_argument("to", metavar="TO", help="a worker (claude-1), or all")
    commands.choices["send"].add_argument("text", metavar="TEXT")
    commands.choices["send"].add_argument(
        "--from", dest="sender", metavar="NAME", default=os.environ.get("CREW_AGENT", "user"))
    commands.choices["send"].add_argument("--priority", type=int, default=50, metavar="N")
    commands.choices["receive"].add_argument("as_", metavar="NAME")
    commands.choices["receive"].add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="seconds to wait for one")
    return parser


def stop(*_: Any) -> None:
    """End in an orderly way: what is running is ended, the task goes back, the worktree is
    removed."""
    sys.exit(FAILED)


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; 0 done, 1 failed, 2 bad command line, 3 not every task was done."""
    options = build_parser().parse_args(argv)
    try:
        return options.function(options)
    except (CrewError, SessionOptimizerError, OSError) as error:
        print(f"crew: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
