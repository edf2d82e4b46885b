"""Tests of the crew. Those on Redis start a server of their own on a socket; without one they say so and skip."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.dirname(HERE)
sys.path[:0] = [os.path.dirname(EXAMPLES), EXAMPLES]
from crew import ALL, CrewError, Task, open_bus  # noqa: E402  (found through the line above)

BACKENDS = ("sqlite", "redis")


@pytest.fixture(scope="module")
def redis_url():
    pytest.importorskip("redis", reason="the redis package is missing: pip install -e '.[redis]'")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is missing: apt-get install redis-server")
    place = tempfile.mkdtemp(prefix="crew")  # short: the path of a socket has at most 107 bytes
    socket = os.path.join(place, "redis.sock")
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--dir", place], stdout=subprocess.DEVNULL
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
    return request.getfixturevalue("redis_url") if request.param == "redis" else str(tmp_path / "queue.db")


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
    assert [bus.claim("y", ["docs", "gpu", "more"]).task.id for _ in range(3)] == ["both", "gpu", "later"]


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
    assert states(bus) == {"a": "FAILED", "b": "FAILED", "c": "FAILED", "free": "READY", "late": "FAILED"}
    assert [state.error for state in bus.tasks()] == ["protected file", "a failed", "b failed", "", "c failed"]


def test_a_failed_attempt_goes_behind_its_equals_until_none_is_left(bus):
    bus.submit(Task("a", "", max_attempts=2))
    bus.submit(Task("b", ""))
    assert bus.fail(bus.claim("x"), "first")
    assert bus.claim("x").task.id == "b"
    again = bus.claim("y")
    assert (again.task.id, again.attempt) == ("a", 2)
    assert bus.fail(again, "second") and not bus.fail(again, "third")
    assert (bus.tasks()[0].status, bus.tasks()[0].error, bus.tasks()[0].attempts) == ("FAILED", "second", 2)


def test_a_lease_that_ran_out_gives_the_task_to_the_next_and_the_first_counts_no_more(open_queue):
    bus = open_queue(lease_seconds=0.2)
    bus.submit(Task("a", "", max_attempts=2))
    first = bus.claim("x")
    second = bus.claim("y", wait=10)
    assert (first.attempt, second.attempt, second.agent) == (1, 2, "y")
    assert not first.renew() and not bus.complete(first) and not bus.fail(first, "late")
    assert second.renew() and bus.complete(second, "kept") and not bus.complete(first)
    assert (bus.tasks()[0].status, bus.tasks()[0].result, bus.tasks()[0].agent) == ("DONE", "kept", "y")


def test_a_lease_that_is_renewed_does_not_run_out(open_queue):
    bus = open_queue(lease_seconds=0.6)
    bus.submit(Task("a", ""))
    held = bus.claim("x")
    for _ in range(6):
        assert bus.claim("y", wait=0.2) is None and held.renew()
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
    assert bus.submit(task) == bus.submit(Task("a", "Title", requires=("y", "x", "x"), data={"n": [1, None]})) == "a"
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
    "text", ["", "[]", "{}", '{"id": "a"}', '{"id": "a", "title": "b", "owner": "c"}', '{"id": 3, "title": "x"}']
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
    for request in (lambda: bus.receive(name), lambda: bus.claim(name), lambda: bus.send(name, "b", 1)):
        with pytest.raises(CrewError, match="no name of an agent"):
            request()


# ---- Where it is ----


def test_what_was_submitted_is_there_after_closing(open_queue):
    first = open_queue(lease_seconds=7.5)
    first.submit(Task("a", ""))
    first.send("a", "b", "kept")
    first.close()
    second = open_queue(lease_seconds=99)
    assert (states(second), bodies(second.receive("b")), second.lease_seconds) == ({"a": "READY"}, ["kept"], 7.5)


def test_crews_of_one_redis_are_apart(redis_url, tmp_path):
    with open_bus(redis_url, name=tmp_path.name + "-1") as one, open_bus(redis_url, name=tmp_path.name + "-2") as two:
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
    code = "import crew\ntry: crew.open_bus('redis://127.0.0.1')\nexcept crew.CrewError as error: print(error)"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), EXAMPLES]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=30)
    assert "sessionoptimizer[redis]" in done.stdout.decode()


# ---- Workers that are killed ----

# Takes tasks and messages until its input ends; writes what it did to a log, one short line at a time.
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
MEMBERS, TASKS, LETTERS, BROADCASTS = 8, 320, 160, 20
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
        """Stop one for so long that its lease runs out; then it goes on with what it no longer holds."""
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
        return [line.split()[1:] for line in self.log.read_text().splitlines() if line.startswith(word + " ")]


def send_all(bus):
    """Tasks that depend on each other, letters to each agent, and broadcasts; returns what must be got."""
    for number in range(TASKS):
        after = (f"t{number - 40}",) if number >= 40 else ()
        bus.submit(Task(f"t{number}", "", priority=number % 3, requires=("work",), after=after, max_attempts=50))
    for number in range(LETTERS):
        bus.send("sender", AGENTS[number % MEMBERS], f"letter{number}", priority=number % 3)
    for number in range(BROADCASTS):
        bus.send("sender", ALL, f"all{number}")
    letters = {(AGENTS[number % MEMBERS], f"letter{number}") for number in range(LETTERS)}
    return letters | {(agent, f"all{number}") for agent in AGENTS for number in range(BROADCASTS)}


@pytest.mark.parametrize("kills", [0, 30])
def test_whoever_is_killed_every_task_is_done_once_and_no_message_is_lost(where, open_queue, tmp_path, kills):
    bus = open_queue(lease_seconds=1.0 if kills else 60.0)
    expected = send_all(bus)
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
            elif set(states(bus).values()) == {"DONE"} and expected == set(map(tuple, crowd.lines("got"))):
                break
    finally:
        for timer in crowd.frozen:
            timer.join()
        for agent in AGENTS:
            crowd.end(agent)
    assert killed == kills and set(states(bus).values()) == {"DONE"}
    accepted = [task for task, _ in crowd.lines("accepted")]
    assert len(accepted) == len(set(accepted)) and TASKS - kills <= len(accepted) <= TASKS
    got = [tuple(row) for row in crowd.lines("got")]
    assert set(got) == expected
    collected = []
    while len(collected) < TASKS:
        found = bus.receive("collector", limit=50)
        assert found, f"{TASKS - len(collected)} messages are lost"
        collected += [message.body for message in found if message.to != ALL]
    assert sorted(collected) == sorted(f"t{number}" for number in range(TASKS))
    if not kills:
        assert len(got) == len(expected) and {state.attempts for state in bus.tasks()} == {1}
    assert json.dumps([state.result in AGENTS for state in bus.tasks()]).count("true") == TASKS
