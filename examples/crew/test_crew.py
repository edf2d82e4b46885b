"""Tests of the crew. Those on Redis start a server on a socket; without one they say so and
skip."""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

if os.name == "nt":
    pytest.skip("a crew needs POSIX: locks, process groups", allow_module_level=True)
HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.dirname(HERE)
sys.path[:0] = [os.path.dirname(EXAMPLES), EXAMPLES]
from crew import ALL, CrewError, Task, open_bus  # noqa: E402  (found through the line above)
from crew import __main__ as crew_program  # noqa: E402
from crew.agents import Agent, Runner  # noqa: E402
from crew.report import crew_report  # noqa: E402
from crew.repository import Conflict, Repository, safe_name  # noqa: E402
from crew.worker import Rules, Worker  # noqa: E402
from sessionoptimizer import SessionOptimizer, SessionStatus  # noqa: E402

BACKENDS = ("sqlite", "redis")


@pytest.fixture(scope="module")
def redis_url():
    pytest.importorskip("redis", reason="the redis package is missing: pip install -e '.[redis]'")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is missing: apt-get install redis-server")
    place = tempfile.mkdtemp(prefix="crew")  # short: the path of a socket has at most 107 bytes
    socket = os.path.join(place, "redis.sock")
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--dir", place],
        stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 10
    while not os.path.exists(socket) and time.monotonic() < end:
        time.sleep(0.02)
    yield f"unix://{socket}"
    server.terminate()
    server.wait(10)
    shutil.rmtree(place)


@pytest.fixture(params=BACKENDS)
def where(request, tmp_path):
    """Where a queue of its own is."""
    return (request.getfixturevalue("redis_url") if request.param == "redis"
            else str(tmp_path / "queue.db"))


@pytest.fixture
def open_queue(where, tmp_path):
    """Opens the test's queue, as often as asked."""
    opened = []

    def open_one(lease_seconds=60.0):
        opened.append(open_bus(where, name=tmp_path.name, lease_seconds=lease_seconds))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def bus(open_queue):
    return open_queue()


def states(bus):
    return {state.task.id: state.status for state in bus.tasks()}


# ---- Tasks ----


def test_the_most_urgent_first_and_equals_in_order(bus):
    for name, priority in (("a", 1), ("b", 9), ("c", -5), ("d", 9), ("e", 100)):
        bus.submit(Task(name, name, priority=priority))
    assert [bus.claim("x").task.id for _ in range(5)] == ["e", "b", "d", "a", "c"]
    assert bus.claim("x") is None


def test_requirements_are_matched_to_capabilities_and_equals_keep_their_order(bus):
    bus.submit(Task("both", "", priority=90, requires=("gpu", "docs")))
    bus.submit(Task("gpu", "", requires=("gpu",)))
    bus.submit(Task("none", ""))
    assert bus.claim("x", ["docs"]).task.id == "none"  # not the urgent one, of which it can do half
    bus.submit(Task("later", ""))
    assert ([bus.claim("y", ["docs", "gpu", "more"]).task.id for _ in range(3)]
            == ["both", "gpu", "later"])


def test_a_task_waits_for_those_before_it(bus):
    bus.submit(Task("a", ""))
    bus.submit(Task("b", ""))
    bus.submit(Task("c", "", priority=90, after=("a", "b")))
    one, two = bus.claim("x"), bus.claim("x")
    assert (one.task.id, two.task.id, bus.claim("x")) == ("a", "b", None)
    assert bus.complete(one, {"lines": 3}) and bus.claim("x") is None
    assert bus.complete(two) and bus.claim("x").task.id == "c"
    bus.submit(Task("d", "", after=("a",)))  # what it waits for is done already
    assert bus.claim("x").task.id == "d"
    assert bus.tasks()[0].result == {"lines": 3}


def test_what_waits_for_a_failed_task_fails_with_it(bus):
    for name, after in (("a", ()), ("b", ("a",)), ("c", ("b",)), ("free", ())):
        bus.submit(Task(name, "", after=after))
    assert bus.fail(bus.claim("x"), "protected file", retry=False)
    bus.submit(Task("late", "", after=("c",)))
    assert states(bus) == {"a": "FAILED", "b": "FAILED", "c": "FAILED", "free": "READY",
                           "late": "FAILED"}
    assert [state.error for state in bus.tasks()] == ["protected file", "a failed", "b failed",
                                                      "", "c failed"]


def test_a_failed_attempt_goes_behind_its_equals_until_none_is_left(bus):
    bus.submit(Task("a", "", max_attempts=2))
    bus.submit(Task("b", ""))
    assert bus.fail(bus.claim("x"), "first")
    assert bus.claim("x").task.id == "b"
    again = bus.claim("y")
    assert (again.task.id, again.attempt) == ("a", 2)
    assert bus.fail(again, "second") and not bus.fail(again, "third")
    assert ((bus.tasks()[0].status, bus.tasks()[0].error, bus.tasks()[0].attempts)
            == ("FAILED", "second", 2))


def test_a_lease_that_ran_out_gives_the_task_to_the_next_and_the_first_counts_no_more(open_queue):
    bus = open_queue(lease_seconds=0.2)
    bus.submit(Task("a", "", max_attempts=2))
    first = bus.claim("x")
    second = bus.claim("y", wait=10)
    assert (first.attempt, second.attempt, second.agent) == (1, 2, "y")
    assert not first.renew() and not bus.complete(first) and not bus.fail(first, "late")
    assert second.renew() and bus.complete(second, "kept") and not bus.complete(first)
    assert ((bus.tasks()[0].status, bus.tasks()[0].result, bus.tasks()[0].agent)
            == ("DONE", "kept", "y"))


def test_a_lease_that_is_renewed_does_not_run_out(open_queue):
    bus = open_queue(lease_seconds=2.0)
    bus.submit(Task("a", ""))
    held = bus.claim("x")
    for _ in range(5):
        assert bus.claim("y", wait=0.5) is None and held.renew()
    assert bus.complete(held)


def test_late_but_nobody_else_took_it_still_counts(open_queue):
    bus = open_queue(lease_seconds=0.1)
    bus.submit(Task("a", ""))
    held = bus.claim("x")
    time.sleep(0.2)
    assert bus.complete(held)


def test_a_task_that_kills_its_agents_fails_when_no_attempt_is_left(open_queue):
    bus = open_queue(lease_seconds=0.1)
    bus.submit(Task("poison", "", max_attempts=2))
    bus.submit(Task("after", "", after=("poison",)))
    assert bus.claim("x") and bus.claim("y", wait=10).attempt == 2
    assert bus.claim("z", wait=0.5) is None
    assert states(bus) == {"poison": "FAILED", "after": "FAILED"}
    assert bus.tasks()[0].error == "no sign of life from y in attempt 2"


def test_submitting_twice_is_once(bus):
    task = Task("a", "Title", requires=("x", "y"), data={"n": [1, None]})
    assert bus.submit(task) == bus.submit(
        Task("a", "Title", requires=("y", "x", "x"), data={"n": [1, None]})) == "a"
    with pytest.raises(CrewError, match="other content"):
        bus.submit(Task("a", "Another"))
    assert bus.claim("w", ["x", "y"]).task.data == {"n": [1, None]} and len(bus.tasks()) == 1


@pytest.mark.parametrize(
    "task, message",
    [
        (Task("a", "", after=("b",)), "submit that first"),
        (Task("a", "", after=("a",)), "waits for itself"),
        (Task(" ", ""), "not empty"),
        (Task("a", "", requires=("x,y",)), "comma"),
        (Task("a", "", max_attempts=0), "at least 1"),
        (Task("a", "", priority="high"), "whole numbers"),
    ],
)
def test_a_task_that_cannot_be_kept_is_named(bus, task, message):
    with pytest.raises(CrewError, match=message):
        bus.submit(task)
    assert bus.tasks() == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"id": "a"}', '{"id": "a", "title": "b", "owner": "c"}',
             '{"id": 3, "title": "x"}']
)
def test_a_line_that_is_no_task(text):
    with pytest.raises(CrewError):
        Task.from_json(text)


# ---- Messages ----


def bodies(messages):
    return [message.body for message in messages]


def test_messages_go_to_their_recipient_the_most_urgent_first(bus):
    bus.send("a", "b", "first")
    bus.send("a", "b", {"deep": [1, None, "ü"]})
    bus.send("a", "b", "urgent", priority=90)
    bus.send("a", "c", "for another")
    assert bodies(bus.receive("b", limit=2)) == ["urgent", "first"]
    assert bodies(bus.receive("b")) == [{"deep": [1, None, "ü"]}]
    assert bus.receive("b") == [] and bodies(bus.receive("c")) == ["for another"]


def test_a_broadcast_reaches_all_but_its_sender_those_that_join_later_too(bus):
    bus.receive("b")
    bus.send("a", ALL, "to all")
    bus.send("c", "b", "between")
    bus.send("a", ALL, "more", priority=10)
    assert bodies(bus.receive("b")) == ["to all", "between", "more"]
    assert bus.receive("a") == [] and bodies(bus.receive("new")) == ["to all", "more"]
    assert bus.receive("b") == [] == bus.receive("new")


def test_what_is_not_acknowledged_comes_again(open_queue):
    bus = open_queue(lease_seconds=0.2)
    for number in range(3):
        bus.send("a", ALL if number else "b", number)
    bus.receive("b")[1].acknowledge()
    again = bus.receive("b", wait=10)
    again += bus.receive("b", wait=0.3) if len(again) < 2 else []
    assert bodies(again) == [0, 2]
    for message in again:
        message.acknowledge()
        message.acknowledge()
    assert bus.receive("b", wait=0.4) == []


def test_a_message_sent_again_under_its_id_is_not_doubled(bus):
    for _ in range(2):
        assert bus.send("a", "b", "once", message_id="m1") == "m1"
    assert bodies(bus.receive("b")) == ["once"]


@pytest.mark.parametrize("name", ["", " ", ALL])
def test_a_name_that_is_nobodys(bus, name):
    for request in (lambda: bus.receive(name), lambda: bus.claim(name),
                    lambda: bus.send(name, "b", 1)):
        with pytest.raises(CrewError, match="no name of an agent"):
            request()


# ---- Where it is ----


def test_what_was_submitted_is_there_after_closing(open_queue):
    first = open_queue(lease_seconds=7.5)
    first.submit(Task("a", ""))
    first.send("a", "b", "kept")
    first.close()
    second = open_queue(lease_seconds=99)
    assert ((states(second), bodies(second.receive("b")), second.lease_seconds)
            == ({"a": "READY"}, ["kept"], 7.5))


def test_crews_of_one_redis_are_apart(redis_url, tmp_path):
    with open_bus(redis_url, name=tmp_path.name + "-1") as one, open_bus(
            redis_url, name=tmp_path.name + "-2") as two:
        one.submit(Task("a", ""))
        assert two.tasks() == [] and two.claim("x") is None


def test_a_queue_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").write_text("no database, but long enough to be looked at as one " * 40)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CrewError, match="file"):
            open_bus(str(path))


def test_a_redis_that_does_not_answer_is_named(redis_url):
    with pytest.raises(CrewError, match="no answer"):
        open_bus("unix:///nowhere/at/all.sock")


def test_an_import_that_fails_says_which_extra(tmp_path):
    (tmp_path / "redis.py").write_text("raise ImportError('not here')")
    code = ("import crew\ntry: crew.open_bus('redis://127.0.0.1')\n"
            "except crew.CrewError as error: print(error)")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), EXAMPLES]))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=30)
    assert "sessionoptimizer[redis]" in done.stdout.decode()


# ---- Workers that are killed ----

# Takes tasks and messages until its input ends; writes what it did to a log, one short line at a
# time.
MEMBER = """
import os, random, sys, threading, time
from crew import open_bus
where, name, agent, path = sys.argv[1:]
log = os.open(path, os.O_WRONLY | os.O_APPEND)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
bus = open_bus(where, name=name)
while not ended.is_set():
    for message in bus.receive(agent, limit=3):
        time.sleep(random.uniform(0, 0.05))
        os.write(log, f"got {agent} {message.body}\\n".encode())
        message.acknowledge()
    claim = bus.claim(agent, ["work"], wait=0.05)
    if claim is None:
        continue
    time.sleep(random.uniform(0, 0.1))
    bus.send(agent, "collector", claim.task.id, message_id="done " + claim.task.id)
    if bus.complete(claim, agent):
        os.write(log, f"accepted {claim.task.id} {claim.attempt}\\n".encode())
"""
MEMBERS, LETTERS, BROADCASTS = 8, 60, 8
AGENTS = [f"m{number}" for number in range(MEMBERS)]


class Crowd:
    """Eight processes that work on one queue, and the log they write."""

    def __init__(self, where, name, log):
        self.arguments, self.log = (where, name), log
        self.frozen = []
        log.write_text("")
        self.processes = {agent: self.start(agent) for agent in AGENTS}

    def start(self, agent):
        command = [sys.executable, "-c", MEMBER, *self.arguments, agent, str(self.log)]
        environment = dict(os.environ, PYTHONPATH=EXAMPLES)
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    def kill_one(self):
        agent = random.choice(AGENTS)
        self.processes[agent].send_signal(signal.SIGKILL)
        self.end(agent)
        self.processes[agent] = self.start(agent)

    def freeze_one(self):
        """Stop one for so long that its lease runs out; then it goes on with what it no longer
        holds."""
        process = self.processes[random.choice(AGENTS)]
        process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(1.5, process.send_signal, [signal.SIGCONT])
        timer.start()
        self.frozen.append(timer)

    def end(self, agent):
        self.processes[agent].send_signal(signal.SIGCONT)
        self.processes[agent].stdin.close()
        self.processes[agent].wait(20)

    def lines(self, word):
        return [line.split()[1:] for line in self.log.read_text().splitlines()
                if line.startswith(word + " ")]


def send_all(bus, tasks):
    """Tasks that depend on each other, letters to each agent, and broadcasts; returns what must be
    got."""
    for number in range(tasks):
        after = (f"t{number - 40}",) if number >= 40 else ()
        bus.submit(Task(f"t{number}", "", priority=number % 3, requires=("work",), after=after,
                        max_attempts=50))
    for number in range(LETTERS):
        bus.send("sender", AGENTS[number % MEMBERS], f"letter{number}", priority=number % 3)
    for number in range(BROADCASTS):
        bus.send("sender", ALL, f"all{number}")
    letters = {(AGENTS[number % MEMBERS], f"letter{number}") for number in range(LETTERS)}
    return letters | {(agent, f"all{number}") for agent in AGENTS for number in range(BROADCASTS)}


@pytest.mark.parametrize("kills, tasks", [(0, 40), (12, 100)])
def test_whoever_is_killed_every_task_is_done_once_and_no_message_is_lost(
        where, open_queue, tmp_path, kills, tasks):
    bus = open_queue(lease_seconds=1.0 if kills else 60.0)
    expected = send_all(bus, tasks)
    crowd, killed = Crowd(where, tmp_path.name, tmp_path / "log"), 0
    try:
        end = time.monotonic() + 45
        while time.monotonic() < end:
            time.sleep(random.uniform(0.05, 0.25))
            if killed < kills:
                crowd.kill_one()
                killed += 1
                if killed % 4 == 0:
                    crowd.freeze_one()
            elif (set(states(bus).values()) == {"DONE"}
                  and expected == set(map(tuple, crowd.lines("got")))):
                break
    finally:
        for timer in crowd.frozen:
            timer.join()
        for agent in AGENTS:
            crowd.end(agent)
    assert killed == kills and set(states(bus).values()) == {"DONE"}
    accepted = [task for task, _ in crowd.lines("accepted")]
    assert len(accepted) == len(set(accepted)) and tasks - kills <= len(accepted) <= tasks
    got = [tuple(row) for row in crowd.lines("got")]
    assert set(got) == expected
    collected = []
    while len(collected) < tasks:
        found = bus.receive("collector", limit=50)
        assert found, f"{tasks - len(collected)} messages are lost"
        collected += [message.body for message in found if message.to != ALL]
    assert sorted(collected) == sorted(f"t{number}" for number in range(tasks))
    if not kills:
        assert len(got) == len(expected) and {state.attempts for state in bus.tasks()} == {1}
    assert json.dumps([state.result in AGENTS for state in bus.tasks()]).count("true") == tasks


# ---- The repository ----


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home and no setting of this machine."""
    for name in list(os.environ):
        if name.startswith(("GIT_", "SESSIONOPTIMIZER_", "CLAUDE", "ANTHROPIC_", "CREW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return tmp_path


def git(top, *arguments):
    done = subprocess.run(["git", *arguments], cwd=str(top), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode().strip()


@pytest.fixture
def top(home):
    """A repository with a module for each of eight tasks, and one that several of them change."""
    if shutil.which("git") is None:
        pytest.skip("git is missing")
    place = home / "shop"
    place.mkdir()
    git(place, "init", "-q", "-b", "main")
    git(place, "config", "user.email", "dev@example.org")
    git(place, "config", "user.name", "Dev")
    for number in range(1, 9):
        (place / f"m{number}.txt").write_text(f"module {number}\n")
    (place / "shared.txt").write_text("x = 0\n" + "-\n" * 20)
    git(place, "add", "-A")
    git(place, "commit", "-q", "-m", "Base")
    return place


@pytest.fixture
def repository(top):
    made = Repository(str(top), "team")
    made.prepare()
    return made


def work_in(repository, task, files, attempt=1):
    """A worktree of a task with a commit of these files: (path, base, head)."""
    path, base = repository.add_worktree(task, attempt)
    for name, text in files.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        with open(os.path.join(path, name), "w") as file:
            file.write(text)
    return path, base, repository.commit_all(path, "Work on " + task, "agent-1")


def merge(repository, task, path, head):
    tip = repository.tip()
    commit = repository.join(path, head, tip, f"Merge it\n\nCrew-Task: {task}\n", "agent-1")
    with repository.lock() as held:
        repository.move(commit, tip, held)
    return commit


def test_a_merge_moves_the_crews_branch_alone_and_is_known_by_its_task(repository, top):
    before = git(top, "rev-parse", "HEAD")
    path, _, head = work_in(repository, "a b/ü", {"m1.txt": "one\ntwo\n", "new/file.txt": "x\n"})
    commit = merge(repository, "a b/ü", path, head)
    assert repository.merged() == {"a b/ü": commit} and repository.tip() == commit
    measured = repository.measure(commit)
    assert (measured.added, measured.deleted, measured.files) == (3, 1, ["m1.txt", "new/file.txt"])
    assert git(top, "log", "-1", "--format=%an <%ae>", head) == "agent-1 <agent-1@crew.invalid>"
    assert git(top, "rev-parse", "HEAD") == before and git(top, "status", "--porcelain") == ""


def test_a_conflict_names_the_files_and_the_task_in_the_way(repository):
    one, other = (work_in(repository, task, {"shared.txt": f"x = {task}\n"})
                  for task in ("t1", "t2"))
    free = work_in(repository, "t3", {"m3.txt": "three\n"})
    merge(repository, "t1", one[0], one[2])
    with pytest.raises(Conflict) as met:
        merge(repository, "t2", other[0], other[2])
    assert (met.value.files, met.value.tasks) == (["shared.txt"], ["t1"])
    merge(repository, "t3", free[0], free[2])  # what changed elsewhere merges
    assert sorted(repository.merged()) == ["t1", "t3"]


def test_a_branch_that_moved_meanwhile_is_not_moved(repository):
    (one, base, head), (other, _, second) = (work_in(repository, task, {task: "x\n"})
                                             for task in ("t1", "t2"))
    late = repository.join(other, second, base, "late\n\nCrew-Task: t2\n", "agent-1")
    merge(repository, "t1", one, head)
    with repository.lock() as held, pytest.raises(CrewError, match="update-ref"):
        repository.move(late, base, held)
    assert list(repository.merged()) == ["t1"]


@pytest.mark.parametrize(
    "name, text, refused",
    [
        (".github/workflows/ci.yml", "on: push", True),
        ("deep/down/.env", "A=1", True),
        ("keys/server.pem", "x", True),
        ("migrations/deep/0001.sql", "drop", True),
        ("m1.txt", "ok = 1\nos.system('rm -rf /')", True),
        ("github/workflows/ci.yml", "on: push", False),
        ("environment.py", "A=1", False),
        ("migrations.txt", "rm -r build", False),
    ],
)
def test_protected_paths_and_forbidden_lines(repository, name, text, refused):
    _, base, head = work_in(repository, "t1", {name: text})
    protected = [*crew_program.PROTECTED, "migrations/*"]
    assert bool(repository.refused(base, head, protected, [r"rm\s+-rf"])) is refused


def test_a_deletion_and_a_rename_touch_protected_paths_and_a_removed_line_is_not_added(repository):
    path, base, _ = work_in(repository, "t1", {})
    git(path, "mv", "m1.txt", "other.txt")
    with open(os.path.join(path, "shared.txt"), "w") as file:
        file.write("-\n")
    head = repository.commit_all(path, "Move", "agent-1")
    assert (repository.refused(base, head, ["m1.txt"], ["x = 0"])
            == ["m1.txt is protected by m1.txt"])


def test_what_a_killed_git_leaves_is_cleared(repository, top):
    path, _, head = work_in(repository, "t1", {"m1.txt": "x\n"})
    lock = os.path.join(repository.common, "refs", "heads", "crew", "team.lock")
    with open(lock, "w"):
        pass
    merge(repository, "t1", path, head)
    git(top, "worktree", "lock", path)
    os.unlink(os.path.join(path, ".git"))
    assert repository.worktrees_of("t1") == [path]
    repository.remove_worktree(path)
    repository.remove_worktree(repository.path_of("never", 1))
    assert len(git(top, "worktree", "list").splitlines()) == 1
    repository.tidy()
    assert not os.path.exists(os.path.dirname(repository.worktrees))


def test_names_that_differ_stay_different():
    names = ["a b", "a-b", "a/b", "ü", "", "-", "x" * 80, "x" * 81]
    assert len({safe_name(name) for name in names}) == len(names)
    assert all(name and len(name) < 70 and "@" not in name for name in map(safe_name, names))


def test_a_branch_that_is_checked_out_and_a_place_without_a_repository_are_refused(top, home):
    with pytest.raises(CrewError, match="checked out"):
        Repository(str(top), "team", "main").prepare()
    with pytest.raises(CrewError, match="in no git repository"):
        Repository(str(home), "team")


# ---- One worker ----


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Where the agents' scripts are, with the interpreter and the module to run them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(EXAMPLES), EXAMPLES]))
    place = tmp_path / "tools"
    place.mkdir()
    return place


def agent_of(tools, code, name="script", **rest):
    path = tools / (name + ".py")
    path.write_text(code)
    return Agent(name, [sys.executable, str(path), "{prompt}"], **rest)


class Post:
    """A bus in a file of the test's, a worker on it, and what came of its tasks."""

    def __init__(
            self, tmp_path, repository, agent, rules=None, lease_seconds=20.0, queue="queue.db"):
        self.bus = open_bus(str(tmp_path / queue), lease_seconds=lease_seconds)
        self.store = str(tmp_path / "store")
        self.repository = repository
        self.worker = Worker(
            self.bus, repository, agent, rules or Rules(), name=agent.name + "-1", store=self.store)

    def do(self, *tasks):
        for task in tasks:
            self.bus.submit(task)
        self.worker.run()
        report = crew_report(self.bus, self.repository, self.worker.optimizer)
        assert self.repository.all_worktrees() == []
        self.bus.close()
        return report


WRITE = "import os, sys; open(os.environ['CREW_TASK'] + '.txt', 'a').write(sys.argv[1] + '\\n')"


def outcomes(report):
    return {row["id"]: row["outcome"] for row in report["tasks"]}


def test_an_agents_change_is_merged_with_its_prompt_as_it_is(tmp_path, repository, tools):
    prompt = "$(touch x) 'quoted' \"twice\" {braces} ü"
    report = Post(tmp_path, repository, agent_of(tools, WRITE)).do(Task("t1", "Write", prompt))
    assert (outcomes(report) == {"t1": "merged"}
            and repository.git("show", repository.into + ":t1.txt") == prompt)
    row = report["tasks"][0]
    assert ((row["added"], row["deleted"], row["files"], row["agent"])
            == (1, 0, ["t1.txt"], "script-1"))
    # a script that logs nothing: no usage is known
    assert (row["sessions"], row["cost_per_line"]) == (1, None)


@pytest.mark.parametrize(
    "code, rules, outcome, attempts",
    [
        ("import sys; print('no idea'); sys.exit(3)", {}, "agent", 2),
        ("pass", {}, "unchanged", 1),
        (WRITE, {"test": "grep never t1.txt"}, "tests", 2),
        (WRITE, {"protected": ["t1*"]}, "protected", 1),
        (WRITE, {"forbidden": ["do it"]}, "protected", 1),
        (WRITE, {"protected": ["t2*"], "forbidden": ["other"], "test": "grep 'do it' t1.txt"},
         "merged", 1),
        ("import time; time.sleep(60)", {"agent_seconds": 0.3}, "agent", 2),
        (WRITE, {"test": "sleep 60", "test_seconds": 0.3}, "tests", 2),
        (("import subprocess as s; s.run('git checkout -q --orphan x$$ && git commit -qm x', "
          "shell=True)"), {}, "history", 2),
    ],
)
def test_what_becomes_of_a_task(tmp_path, repository, tools, code, rules, outcome, attempts):
    report = Post(tmp_path, repository, agent_of(tools, code), Rules(**rules)).do(
        Task("t1", "x", "do it", max_attempts=2))
    (row,) = report["tasks"]
    assert (row["outcome"], row["attempts"]) == (outcome, attempts)
    assert (repository.merged() != {}) is (outcome == "merged")
    statuses = {session.status
                for session in SessionOptimizer(str(tmp_path / "store")).list_sessions()}
    assert statuses == {SessionStatus.FAILED if outcome == "agent" else SessionStatus.COMPLETED}
    left = repository.git("branch", "--list", "crew-left/*")
    assert bool(left) is (outcome == "protected")


def test_an_agent_that_cannot_be_started_is_named(tmp_path, repository):
    report = Post(tmp_path, repository, Agent("nobody", ["/no/such/agent"])).do(
        Task("t1", "x", max_attempts=1))
    assert ("/no/such/agent" in report["tasks"][0]["error"]
            and report["tasks"][0]["outcome"] == "agent")


def test_notes_go_with_the_next_prompt_and_news_of_merges_do_not(tmp_path, repository, tools):
    post = Post(tmp_path, repository, agent_of(tools, WRITE))
    post.bus.send("user", "script-1", "keep it short")
    post.bus.send("user", ALL, "tabs, not spaces", priority=90)
    post.bus.send("script-2", ALL, {"task": "t0", "outcome": "merged"})
    post.do(Task("t1", "one", "first", priority=90), Task("t2", "two", "second"))
    said = repository.git("show", repository.into + ":t1.txt")
    assert said == "first\n\nMessages for you:\nuser: tabs, not spaces\nuser: keep it short"
    assert repository.git("show", repository.into + ":t2.txt") == "second"


def test_a_merge_that_was_not_reported_is_reported_and_not_made_again(tmp_path, repository, tools):
    post = Post(tmp_path, repository, agent_of(tools, WRITE), lease_seconds=0.5)
    post.bus.submit(Task("t1", "Write"))
    lost = post.bus.claim("script-9")
    path, _, head = work_in(repository, "t1", {"m1.txt": "x\n"})
    commit = merge(repository, "t1", path, head)
    report = post.do()
    (row,) = report["tasks"]
    assert ((row["outcome"], row["attempts"], row["commit"], row["sessions"])
            == ("merged", 2, commit, 0))
    assert repository.tip() == commit and lost.attempt == 1


def test_a_worker_that_lost_its_lease_merges_nothing(tmp_path, repository, tools):
    post = Post(
        tmp_path, repository, agent_of(tools, "import time; time.sleep(60)"), lease_seconds=0.4)
    post.bus.submit(Task("t1", "Write"))
    claim = post.bus.claim("script-1")
    claim.renew = lambda: False  # as if it had been suspended
    assert post.worker.do(claim) is False and repository.merged() == {}
    assert post.bus.tasks()[0].status == "CLAIMED"
    post.bus.close()


def test_an_agent_ends_with_its_worker(tmp_path, tools):
    """Three processes: one that starts the agent and is killed, the leash, and an agent that will
    not go."""
    stubborn = tools / "stubborn.py"
    stubborn.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                        "print('started', flush=True)\n"
                        "while True: time.sleep(0.05); open('alive', 'a').write('x')")
    code = ("from crew.agents import Runner; import sys\n"
            "Runner(sys.argv[1]).run([sys.executable, sys.argv[2]], sys.argv[1], 60, "
            "sys.argv[1] + '/out')")
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(stubborn)])
    end = time.monotonic() + 20
    while not (tmp_path / "alive").exists() and time.monotonic() < end:
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    sizes = [-1]
    while time.monotonic() < end and (len(sizes) < 8 or len(set(sizes[-8:])) > 1):
        time.sleep(0.1)
        sizes.append((tmp_path / "alive").stat().st_size)
    assert len(set(sizes[-8:])) == 1, "the agent goes on"


def test_what_an_agent_leaves_running_ends_with_it(tmp_path, tools):
    code = ("import subprocess as s; s.Popen('while :; do sleep 0.05; echo x >> alive; "
            "done', shell=True)")
    (tools / "a.py").write_text(code)
    assert Runner(str(tmp_path)).run([sys.executable, str(tools / "a.py")], str(tmp_path), 20,
                                     str(tmp_path / "o")).status == 0
    time.sleep(0.2)
    size = (tmp_path / "alive").stat().st_size if (tmp_path / "alive").exists() else 0
    time.sleep(0.4)
    assert ((tmp_path / "alive").stat().st_size if size else 0) == size


def test_no_more_agents_run_at_once_than_the_limit(tmp_path, tools):
    code = ("import os, sys, time; open(f'began-{os.getpid()}', 'w')\n"
            "while not os.path.exists('go'): time.sleep(0.02)")
    (tools / "a.py").write_text(code)

    def start(number):
        runner = Runner(str(tmp_path / "slots"), limit=2)
        command = [sys.executable, str(tools / "a.py")]
        thread = threading.Thread(target=lambda: ended.append(
            runner.run(command, str(tmp_path), 60, str(tmp_path / f"out{number}"),
                       limited=True).status))
        thread.start()
        return thread

    (tmp_path / "slots").mkdir()
    ended = []
    threads = [start(number) for number in range(4)]
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("began-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # in which the others would have begun
    assert len(list(tmp_path.glob("began-*"))) == 2
    (tmp_path / "go").write_text("")
    for thread in threads:
        thread.join(30)
    assert ended == [0] * 4 and len(list(tmp_path.glob("began-*"))) == 4


@pytest.mark.parametrize("text", ["", "claude", "=x", "a:0=x", "a:b=x", "a=", "a='x"])
def test_an_agent_that_is_not_understood(text):
    with pytest.raises(CrewError, match="--agent"):
        Agent.parse(text)


def test_an_agent_as_it_is_written():
    agent = Agent.parse(
        "claude:2:python, docs=claude -p {prompt} --allowedTools 'Edit,Bash(git *)'")
    assert (agent.name, agent.count, agent.capabilities) == ("claude", 2, ("python", "docs"))
    assert agent.arguments("a 'b' {c}") == ["claude", "-p", "a 'b' {c}", "--allowedTools",
                                            "Edit,Bash(git *)"]
    assert Agent.parse("sh=run.sh a=b").arguments("x") == ["run.sh", "a=b"]


# ---- Eight tasks, five workers, two of them at once ----

# Reads two files, changes its own and, for tasks 3 and 4, the same line of a shared one; tells how
# many run beside it.
SCRIPTED = """
import os, random, sys, time
from sessionoptimizer import SessionOptimizer
number = os.environ["CREW_TASK"][1:]
running = sys.argv[2]
mine = os.path.join(running, str(os.getpid()))
open(mine, "w").close()
def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
beside = sum(alive(pid) for pid in os.listdir(running) if pid.isdigit())
with open(os.path.join(running, "most.log"), "a") as file:
    file.write(f"{beside}\\n")
optimizer, session = SessionOptimizer(), os.environ["SESSIONOPTIMIZER_SESSION"]
for name in (f"m{number}.txt", "shared.txt"):
    read = {"file_path": os.path.abspath(name)}
    optimizer.log_event(session, "FILE_READ", read, tokens_input=1000)
time.sleep(random.uniform(0, 0.5))
with open(f"m{number}.txt", "a") as file:
    file.write("done\\n")
if number in "34":
    with open("shared.txt", "r+") as file:
        file.write(f"x = {number}")
if number == "5":
    open(".env", "w").close()
optimizer.log_event(session, "AI_RESPONSE", tokens_output=int(number) * 10)
os.unlink(mine)
"""


def crew_options(top, home, *rest):
    return crew_program.build_parser().parse_args(
        ["run", "--repo", str(top), "--name", "team", "--store", str(home / "store"),
         "--limit", "2", *rest]
    )


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="counts the agents that run through /proc")
@pytest.mark.parametrize(
    "where, kills", [("sqlite", 0), ("sqlite", 4), ("redis", 4)], indirect=["where"])
def test_eight_tasks_are_merged_or_named_whoever_is_killed(
        where, kills, top, home, tools, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    agent = agent_of(tools, SCRIPTED)
    options = crew_options(top, home, "--agent", f"script:5={' '.join(agent.command)} {running}",
                           "--test", "grep -q done m*.txt",
                           "--lease", "1.5" if kills else "60", "--queue", where)
    crew = crew_program.Crew(options, dict(crew_program.settings_of(options), queue=where))
    crew.repository.prepare()
    pool, killed = crew.pool(), 0
    with crew.bus() as bus:
        for number in range(1, 9):
            after = ("t1",) if number == 8 else ()
            bus.submit(Task(f"t{number}", f"Task {number}", after=after, max_attempts=50))
        thread = threading.Thread(target=pool.run)
        thread.start()
        end = time.monotonic() + 60
        while thread.is_alive() and time.monotonic() < end:
            time.sleep(random.uniform(0.1, 0.4))
            busy = [pool.processes.get(state.agent) for state in bus.tasks()
                    if state.status == "CLAIMED"]
            if killed < kills and any(busy):
                random.choice([process for process in busy if process]).kill()
                killed += 1
        thread.join(20)
        assert not thread.is_alive() and killed == kills
        crew_program.settle_left(crew.repository, crew.optimizer(), bus.tasks())
        report = crew_report(bus, crew.repository, crew.optimizer())
    found = outcomes(report)
    # an attempt made again may start after the merge
    assert {found.pop("t3"), found.pop("t4")} <= {"merged", "conflict"}
    assert found == {"t1": "merged", "t2": "merged", "t5": "protected", "t6": "merged",
                     "t7": "merged", "t8": "merged"}
    log = git(top, "log", "--first-parent", "--format=%(trailers:key=Crew-Task,valueonly)",
              "main..crew/team").split()
    # each once
    assert len(log) == len(set(log)) == sum(row["outcome"] == "merged" for row in report["tasks"])
    assert (git(top, "worktree", "list").splitlines()
            == [f"{top}  {git(top, 'rev-parse', '--short', 'HEAD')} [main]"])
    assert not os.path.exists(str(top) + ".crew") and git(top, "status", "--porcelain") == ""
    check_the_sums(report, home)
    assert max(map(int, (running / "most.log").read_text().split())) <= 2
    assert "shared.txt" in report["shared_files"] and (kills or len(report["shared_files"]) == 1)


def check_the_sums(report, home):
    """Tasks and agents add up to the totals, and those are what ``stats`` says of the store."""
    stats = SessionOptimizer(str(home / "store")).agent_statistics("script")
    totals = report["totals"]
    assert ((totals["tokens"], totals["sessions"])
            == (stats["total_tokens"], stats["sessions_analyzed"]))
    assert totals["cost"] == pytest.approx(stats["total_cost"], rel=1e-9) and totals["cost"] > 0
    for rows in (report["tasks"], report["agents"]):
        for name in ("tokens", "sessions", "added", "deleted", "waste_tokens"):
            assert sum(row[name] for row in rows) == totals[name], name
        assert sum(row["cost"] for row in rows) == pytest.approx(totals["cost"], rel=1e-9)
    assert (totals["cost_per_line"]
            == pytest.approx(totals["cost"] / (totals["added"] + totals["deleted"])))


# ---- The program ----


def crew(top, *arguments, stdin="", status=0):
    """The output of ``python3 examples/crew run``. A task claimed at the moment of a stop waits for
    its lease of 60 s."""
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE, *arguments[:1], "--repo", str(top), *arguments[1:]],
        input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=180,
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()


def inside(top, *arguments, stdin="", status=0):
    """The same of a command in this process."""
    said, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ended = crew_program.main([*arguments[:1], "--repo", str(top), *arguments[1:]])
    except SystemExit as bad_command_line:
        ended = bad_command_line.code
    finally:
        sys.stdin = before
    assert ended == status, said.getvalue()
    return said.getvalue()


def lines_of(*tasks):
    return "".join(task.to_json() + "\n" for task in tasks)


def test_the_program_from_tasks_to_the_report(top, home, tools):
    agent = "script:1:text=" + " ".join(agent_of(tools, WRITE).command)
    tasks = lines_of(Task("t1", "One", "first", requires=("text",)),
                     Task("t2", "Two", requires=("gpu",)))
    options = ["--agent", agent, "--store", str(home / "store"), "--test", "ls t1.txt"]
    output = crew(top, "run", "-", *options, stdin=tasks, status=3)
    assert "nobody can do t2: it requires gpu" in output and "Crew crew, branch crew/crew" in output
    report = json.loads(inside(top, "report", "--format", "json", status=3))
    assert outcomes(report) == {"t1": "merged", "t2": "ready"} and report["totals"]["added"] == 1
    status = inside(top, "status")
    assert status.split()[:3] == ["DONE", "50", "t1"] and "READY      50 t2" in status
    assert (inside(top, "send", "script-1", "mind the gap")
            and inside(top, "send", "all", "hello", "--from", "boss"))
    told = [json.loads(line) for line in inside(top, "receive", "script-1").splitlines()]
    assert ([(row["from"], row["body"]) for row in told]
            == [("user", "mind the gap"), ("boss", "hello")])
    assert inside(top, "receive", "script-1") == ""
    able = ["--agent", agent.replace(":text", ":text,gpu"), *options[2:4]]
    assert "t2                   merged" in crew(top, "run", *able)
    inside(top, "clean")


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["report"], 1, "no crew crew has run"),
        (["run", "--agent", "x"], 1, "--agent x"),
        (["run", "/no/such/file", "--agent", "x=y"], 1, "/no/such/file"),
        (["run", "-", "--agent", "x=y"], 1, "no task"),
        (["run", "--agent", "x=y", "--into", "main"], 1, "checked out"),
        (["run"], 2, "--agent"),
        (["fly"], 2, "fly"),
    ],
)
def test_a_request_that_cannot_be_met(top, arguments, status, message):
    assert message in inside(top, *arguments, stdin="nothing\n", status=status)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_when_the_whole_crew_is_stopped_the_next_run_goes_on(top, home, tools, number):
    code = ("import os, time\nif not os.path.exists(r'%s'):\n    time.sleep(60)\n" % (home / "go")
            + WRITE)
    options = ["--agent", "script:2=" + " ".join(agent_of(tools, code).command), "--store",
               str(home / "store")]
    command = [sys.executable, HERE, "run", "-", "--repo", str(top), *options]
    first = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    first.stdin.write(lines_of(Task("t1", "One"), Task("t2", "Two")).encode())
    first.stdin.close()
    folder, end = str(top) + ".crew/crew", time.monotonic() + 30
    while time.monotonic() < end and not (os.path.isdir(folder) and len(os.listdir(folder)) == 2):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT) if number == signal.SIGINT else first.kill()
    first.wait(30)
    # the workers end by themselves
    while time.monotonic() < end and os.path.isdir(folder) and os.listdir(folder):
        time.sleep(0.05)
    (home / "go").write_text("")
    assert crew(top, "run", *options).count("merged") == 2
    assert (len(git(top, "worktree", "list").splitlines()) == 1
            and not os.path.exists(str(top) + ".crew"))


def real_agent(name, fake_api, url, monkeypatch):
    """(its command, what it calls writing n lines to a file, what its sessions call it)."""
    if not shutil.which(name):
        package = {"claude": "@anthropic-ai/claude-code", "codex": "@openai/codex"}[name]
        pytest.skip(f"{name} is not on the path: npm install -g {package}")
    if name == "codex":
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        words = ["codex", "exec", "--sandbox", "danger-full-access",
                 *fake_api.codex_config(url), "{prompt}"]
        return (words, lambda n: {"tool": "exec_command", "input": {"cmd": f"seq {n} > n{n}.txt"}},
                "CODEX")
    for key, value in (("ANTHROPIC_BASE_URL", url), ("ANTHROPIC_API_KEY", "any"),
                       ("DISABLE_AUTOUPDATER", "1"),
                       ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"), ("IS_SANDBOX", "1")):
        monkeypatch.setenv(key, value)
    words = ["claude", "-p", "{prompt}", "--allowedTools", "Read,Write"]
    return words, lambda n: {"tool": "Write", "input": {"file_path": f"n{n}.txt",
                                                        "content": "line\n" * n}}, "CLAUDE-CODE"


@pytest.mark.parametrize("name", ["claude", "codex"])
def test_a_real_agent_works_in_a_crew_and_its_tokens_are_what_the_model_counted(
        name, top, home, monkeypatch):
    fake_api = pytest.importorskip("agent_session.fake_api")
    tasks = [Task(f"n{n}", f"Write number {n}", f"Write the file of number {n}.")
             for n in (1, 2, 3)]
    script = {}
    with fake_api.FakeApi(script) as api:
        words, write, agent = real_agent(name, fake_api, api.url, monkeypatch)
        script.update({f"number {n}": [write(n), {"text": "Done."}] for n in (1, 2, 3)})
        options = ["--agent", f"{name}:2=" + " ".join(map(shlex.quote, words)), "--store",
                   str(home / "store")]
        report = json.loads(crew(top, "run", "-", *options, "--test", "ls n*.txt", "--format",
                                 "json", stdin=lines_of(*tasks)))
    assert (outcomes(report) == {"n1": "merged", "n2": "merged", "n3": "merged"}
            and report["totals"]["added"] == 6)

    def counted(key):
        rows = [row for row in api.truth if key in row["conversation"]]
        return sum(row[part] for row in rows
                   for part in ("uncached_input", "cache_write", "output"))

    stats = SessionOptimizer(str(home / "store")).agent_statistics(agent)
    assert report["totals"]["tokens"] == stats["total_tokens"] == counted("") > 0
    assert report["totals"]["cost"] == pytest.approx(stats["total_cost"], rel=1e-9)
    assert ({row["id"]: row["tokens"] for row in report["tasks"]}
            == {f"n{n}": counted(f"number {n}") for n in (1, 2, 3)})
    assert len(git(top, "worktree", "list").splitlines()) == 1


ASKS = """
import json, os, urllib.request
for number in range(2):
    messages = [{"role": "user", "content": "number 7 " * 99}]
    body = {"model": "claude-opus-4-5", "max_tokens": 9, "tools": [{}], "messages": messages}
    request = urllib.request.Request(
        os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        open("answer.txt", "a").write(json.load(answer)["content"][0]["text"] + "\\n")
"""


def test_a_script_that_asks_a_provider_itself_is_billed_by_the_answers(
        tmp_path, repository, tools, monkeypatch):
    """It keeps no log and logs nothing: ``record`` reads what goes through."""
    fake_api = pytest.importorskip("agent_session.fake_api")
    pytest.importorskip("ptyprocess", reason="ptyprocess is missing: pip install -e '.[agents]'")
    with fake_api.FakeApi([{"text": "Seven."}]) as api:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
        post = Post(tmp_path, repository, agent_of(tools, ASKS))
        report = post.do(Task("t1", "Ask"))
    (row,) = report["tasks"]
    counted = sum(told[name] for told in api.truth
                  for name in ("uncached_input", "cache_write", "output"))
    assert ((row["outcome"], row["tokens"], row["sessions"], len(api.truth))
            == ("merged", counted, 1, 2))
    assert row["cost"] > 0 and row["cost_per_line"] == row["cost"] / 2
    (session,) = post.worker.optimizer.list_sessions()
    assert (session.metadata["collab_id"], session.metadata["task_id"]) == ("team", "t1")
