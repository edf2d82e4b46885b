"""Tests of the programs in this directory that have no test file of their own.

Every program runs as a subprocess in an empty home; their logic is tested in process.
"""

import ast
import copy
import http.server
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from contextlib import closing

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SAMPLES = os.path.join(HERE, "transcripts")
sys.path[:0] = [ROOT, HERE]
import agent_health  # noqa: E402  (found through the line above)
import ci_report  # noqa: E402
import claude_code_hooks as hooks  # noqa: E402
import collaboration  # noqa: E402
import context_compressor as compressor  # noqa: E402
import error_recovery as recovery  # noqa: E402
import export_otlp  # noqa: E402
import knowledge_base  # noqa: E402
import message_bus_alerts as bus  # noqa: E402
import monitor  # noqa: E402
import priority_queue as tasks  # noqa: E402
import selftest  # noqa: E402
import token_tracker  # noqa: E402
from sessionoptimizer import (EventType, Session, SessionEvent, SessionOptimizer,  # noqa: E402
                              SessionStatus, Severity)

pytestmark = pytest.mark.filterwarnings("error")
TIMEOUT = 30  # seconds for one program

INTEGRATIONS = {
    "token_tracker": [
        "synced: 0 tokens in, 0 out",
        "tracker: 5,000 in, 2,000 out",
        "session: 5,000 in, 2,000 out",
    ],
    "context_compressor": ["sessionoptimizer.py: ", "tokens (estimated)", "saved: ", "issues: 0"],
    "error_recovery": [
        "fetched: index v2",
        "fetch: ConnectionError, retry, recovered: True, attempts: 3",
        "parse: ValueError, fallback, recovered: True",
    ],
    "message_bus_alerts": ["[HIGH] Low efficiency: FORGE", "[LOW] Session summary: FORGE"],
    "agent_health": ['"efficiency_score": 60.0', "ATLAS: WARNING, 3 sessions"],
    "collaboration": ["together", "read by more than one agent: src/auth.py"],
    "priority_queue": [" 90 Fix the login", "priority 50: 1 of 2 done"],
    "knowledge_base": ["best match: JWT", "REPEATED_SEARCH"],
    "complete_workflow": ["1. Start the session", "10. Report health", "tests: 3 passed", "FORGE: HEALTHY"],
}
EXPLAINED = (
    *INTEGRATIONS,
    "dashboard",
    "monitor",
    "ci_report",
    "selftest",
    "claude_code_hooks",
    "export_otlp",
    "git_insights",
    "benchmark",
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, where nothing of this machine is seen and no proxy stands before 127.0.0.1."""
    place = tmp_path / "home"
    place.mkdir()
    for name in list(os.environ):
        if name.startswith(("SESSIONOPTIMIZER_", "CLAUDE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(place))
    return place


@pytest.fixture
def optimizer(tmp_path):
    return SessionOptimizer(str(tmp_path / "store"))


@pytest.fixture
def session(optimizer):
    return optimizer.start_session("FORGE", "Test", model="opus")


@pytest.fixture
def server():
    """A server on 127.0.0.1 that keeps what is posted and answers with ``status`` and ``answer``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            time.sleep(server.delay)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.path, dict(self.headers), json.loads(body.decode())))
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(server.answer)))
            self.end_headers()
            self.wfile.write(server.answer)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.status, server.answer, server.delay = [], 200, b"", 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


def run(name, *arguments, stdin=""):
    """A program's status, output and error output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", os.path.join(HERE, name + ".py"), *map(str, arguments)],
        input=stdin.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def events_of(optimizer, session_id, event_type):
    return [event for event in optimizer.get_session(session_id).events if event.event_type is event_type]


# ---- All programs ----


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_a_program_runs_as_it_is_and_leaves_nothing_behind(name, home):
    status, output, errors = run(name)
    assert (status, errors) == (0, "")
    for text in INTEGRATIONS[name]:
        assert text in output
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_store_keeps_the_sessions_and_runs_twice(name, tmp_path):
    for _ in range(2):
        assert run(name, "--store", tmp_path / "kept")[0] == 0
    ended = SessionOptimizer(str(tmp_path / "kept")).list_sessions()
    assert len(ended) >= 2 and all(session.status is not SessionStatus.ACTIVE for session in ended)


@pytest.mark.parametrize("name", [*INTEGRATIONS, "monitor", "ci_report", "selftest", "export_otlp", "claude_code_hooks"])
def test_help_and_a_bad_option(name, capsys):
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(name).main([option])
        assert stop.value.code == status
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_a_program_stays_small_and_explains_itself(name):
    with open(os.path.join(HERE, name + ".py"), encoding="utf-8") as file:
        text = file.read()
    tree = ast.parse(text)
    assert 40 <= len(text.splitlines()) <= 150
    assert f"python3 examples/{name}.py" in ast.get_docstring(tree)
    if name != "complete_workflow":
        assert re.search(r"import it[ :(]|import it\n|library of your own instead|import it instead", text)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_the_table_names_every_program():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for name in EXPLAINED:
        assert f"`{name}.py`" in text or f"[{name}.py]" in text, name


# ---- Token tracker ----


def test_usage_is_counted_once_however_often_it_is_synced(optimizer, session):
    tracker = token_tracker.MemoryTracker()
    tracker.log_usage(session.id, "opus", 1_000, 300)
    optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_input=400, tokens_output=300)
    for added in (600, 0, 0):
        assert token_tracker.sync_usage(optimizer, tracker, session.id).added_input == added
    tracker.log_usage(session.id, "opus", 50, 7)
    token_tracker.sync_usage(optimizer, tracker, session.id)
    assert (session.total_tokens_input, session.total_tokens_output) == (1_050, 307)
    assert len(events_of(optimizer, session.id, EventType.TOKEN_USAGE)) == 2


def test_a_sync_from_another_process_is_seen(tmp_path, session):
    tracker = token_tracker.MemoryTracker()
    tracker.log_usage(session.id, "opus", 1_000, 300)
    token_tracker.sync_usage(SessionOptimizer(str(tmp_path / "store")), tracker, session.id)
    again = token_tracker.sync_usage(SessionOptimizer(str(tmp_path / "store")), tracker, session.id)
    assert (again.added_input, again.added_output) == (0, 0)


def test_events_beyond_the_tracker_are_told_and_nothing_is_logged(optimizer, session):
    optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=90)
    synced = token_tracker.sync_usage(optimizer, token_tracker.MemoryTracker(), session.id)
    assert (synced.ahead_output, synced.added_output) == (90, 0)
    assert not events_of(optimizer, session.id, EventType.TOKEN_USAGE)
    assert token_tracker.sync_usage(optimizer, token_tracker.MemoryTracker(), "nobody") is None


# ---- Context compressor ----

PYTHON = '''"""Module."""
import os
LIMIT = 3  # ä

@decorated
class A(Base):
    """Class."""
    x: int = 1

    @property
    def first(self, a: int = 1, *, b="ü") -> int:
        """What it gives."""
        total = 0
        for number in range(a):
            total += number
        return total

    async def second(self):
        @wrap("ö")
        def inner():
            return 1
        return inner()

    def third(self): return "one line that is long"

def only_docstring():
    """Nothing else."""

if LIMIT:
    def conditional():
        return os.getcwd()
'''
OUTLINE = '''"""Module."""
import os
LIMIT = 3  # ä

@decorated
class A(Base):
    """Class."""
    x: int = 1

    @property
    def first(self, a: int = 1, *, b="ü") -> int:
        """What it gives."""
        ...

    async def second(self):
        ...

    def third(self): ...

def only_docstring():
    """Nothing else."""

if LIMIT:
    def conditional():
        ...
'''


def test_an_outline_keeps_signatures_and_docstrings():
    assert compressor.outline(PYTHON, "a.py") == OUTLINE
    assert compressor.outline(OUTLINE, "a.py") == OUTLINE


@pytest.mark.parametrize(
    "name", ["sessionoptimizer.py", "examples/export_otlp.py", "examples/claude_code_hooks.py"]
)
def test_the_outline_of_a_real_file_is_python_with_the_same_interface(name):
    text = compressor.read_text(os.path.join(ROOT, name))
    short = compressor.outline(text, name)

    def interface(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, *compressor.FUNCTIONS)):
                yield (
                    type(child),
                    child.name,
                    ast.get_docstring(child),
                    ast.dump(getattr(child, "args", ast.Pass())),
                )
            if not isinstance(child, compressor.FUNCTIONS):
                yield from interface(child)

    assert list(interface(ast.parse(short))) == list(interface(ast.parse(text)))
    assert len(short) < 0.7 * len(text)


@pytest.mark.parametrize(
    "text, path",
    [
        ("def f(:\n", "a.py"),
        ("x\0", "a.py"),
        ("# Title\n\ntext", "a.md"),
        ("", "a.py"),
        ("(" * 500 + ")" * 500, "a.py"),
    ],
)
def test_what_is_not_python_stays_as_it_is(text, path):
    assert compressor.outline(text, path) == text


def test_reads_are_logged_with_original_and_compressed_tokens(optimizer, session, tmp_path):
    code, prose = tmp_path / "latin.py", tmp_path / "notes.md"
    code.write_bytes(b"# -*- coding: latin-1 -*-\n" + PYTHON.encode("latin-1"))
    prose.write_text("Prose.\n" * 20_000, encoding="utf-8")
    read = compressor.read_compressed(optimizer, session.id, str(code))
    compressor.read_compressed(optimizer, session.id, str(prose))
    assert "ü" in read.text and read.compressed_tokens < read.original_tokens
    first, second = events_of(optimizer, session.id, EventType.FILE_READ)
    assert first.tokens_input == first.data["compressed_tokens"] == read.compressed_tokens
    assert first.data["original_tokens"] == read.original_tokens and first.data["compressed"] is True
    assert "compressed" not in second.data and second.tokens_input == 35_000
    stats = compressor.compression_stats(session)
    assert (stats["files"], stats["original_tokens"]) == (1, read.original_tokens)
    assert [issue.issue_type.value for issue in optimizer.analyze(session.id).issues] == [
        "LARGE_FILE_UNCOMPRESSED"
    ]


# ---- Error recovery ----


def flaky(failures, error=ConnectionError):
    """A function that fails so many times, and what it was called with."""
    calls = []

    def call(value):
        calls.append(value)
        if len(calls) <= failures:
            raise error(f"no answer, password=hunter2secret {len(calls)}")
        return value * 2

    return call, calls


def test_backoff_doubles_up_to_the_limit(optimizer, session):
    call, calls = flaky(4)
    pauses = []
    tracked = recovery.retry_with_tracking(
        optimizer, session.id, max_attempts=5, delay=1, max_delay=3, jitter=0, sleep=pauses.append
    )(call)
    assert tracked(21) == 42 and calls == [21] * 5
    assert pauses == [1, 2, 3, 3]
    (error,) = events_of(optimizer, session.id, EventType.ERROR)
    assert (error.data["recovery_strategy"], error.data["recovered"], error.data["attempts"]) == (
        "retry",
        True,
        5,
    )
    assert "hunter2secret" not in json.dumps(optimizer.get_session(session.id).to_dict())
    assert [event.data["attempt"] for event in events_of(optimizer, session.id, EventType.CUSTOM)] == [
        1,
        2,
        3,
        4,
    ]
    assert optimizer.analyze(session.id).issues == []


def test_jitter_makes_pauses_longer_within_its_share():
    delays = recovery.backoff_delays(50, 1.0, 1.0, 10.0, 0.5)
    assert len(delays) == 49 and all(1.0 <= delay <= 1.5 for delay in delays) and len(set(delays)) > 1


def test_no_attempt_left(optimizer, session):
    call, calls = flaky(9)
    tracked = recovery.retry_with_tracking(optimizer, session.id, max_attempts=2, sleep=lambda seconds: None)(
        call
    )
    with pytest.raises(ConnectionError, match="no answer"):
        tracked(1)
    (error,) = events_of(optimizer, session.id, EventType.ERROR)
    assert len(calls) == 2 and error.data["recovered"] is False and error.data["attempts"] == 2


def test_a_bug_is_not_retried(optimizer, session):
    call, calls = flaky(9, TypeError)
    pauses = []
    with pytest.raises(TypeError):
        recovery.retry_with_tracking(optimizer, session.id, sleep=pauses.append)(call)(1)
    (error,) = events_of(optimizer, session.id, EventType.ERROR)
    assert (len(calls), pauses, error.data["recovery_strategy"]) == (1, [], "none")


def test_success_at_once_logs_nothing_and_the_name_stays(optimizer, session):
    call, _ = flaky(0)
    tracked = recovery.retry_with_tracking(optimizer, session.id)(call)
    assert tracked(1) == 2 and tracked.__name__ == "call"
    assert not events_of(optimizer, session.id, EventType.ERROR)
    with pytest.raises(ValueError, match="at least 1"):
        recovery.retry_with_tracking(optimizer, session.id, max_attempts=0)(call)(1)


def test_tracking_and_fallback(optimizer, session):
    call, _ = flaky(9, KeyError)
    with pytest.raises(KeyError):
        recovery.with_session_tracking(optimizer, session.id)(call)(1)
    assert (
        recovery.with_session_tracking(optimizer, session.id, fallback=lambda error: "spare")(call)(1)
        == "spare"
    )
    with pytest.raises(ZeroDivisionError):
        recovery.with_session_tracking(optimizer, session.id, fallback=lambda error: 1 / 0)(call)(1)
    assert [
        (e.data["recovery_strategy"], e.data["recovered"])
        for e in events_of(optimizer, session.id, EventType.ERROR)
    ] == [("none", False), ("fallback", True), ("fallback", False)]


# ---- Message bus ----


def wasteful(optimizer, session_id, reads):
    """Reads one file again and again: with 1,000 more tokens, the score is 100 * 2 / (1 + reads)."""
    for _ in range(reads):
        optimizer.log_event(session_id, EventType.FILE_READ, {"file_path": "a.py"}, tokens_input=1_000)
    optimizer.log_event(session_id, EventType.AI_RESPONSE, tokens_output=1_000)


@pytest.mark.parametrize("reads, priority", [(1, None), (2, "MEDIUM"), (4, "HIGH")])
def test_priorities(optimizer, session, reads, priority):
    sent = []
    wasteful(optimizer, session.id, reads)
    assert bus.send_efficiency_alert(optimizer, session.id, sent.append) is (priority is not None)
    assert [message["priority"] for message in sent] == [priority] * bool(priority)


def test_a_webhook_gets_the_message(optimizer, session, server):
    wasteful(optimizer, session.id, 4)
    bus.send_efficiency_alert(optimizer, session.id, bus.bus_to(server.url + "/hook"))
    bus.send_session_summary(optimizer, session.id, bus.bus_to(server.url + "/hook"))
    (path, headers, alert), (_, _, summary) = server.requests
    assert path == "/hook" and headers["Content-Type"] == "application/json"
    assert alert["priority"] == "HIGH" and "40.0%" in alert["text"] and alert["session_id"] == session.id
    assert summary["priority"] == "LOW" and "4,000 in" in summary["text"]


def test_a_webhook_that_fails_is_an_error(server, monkeypatch):
    message = bus.make_message("s", ["t"], "LOW")
    server.status = 500
    with pytest.raises(OSError):
        bus.bus_to(server.url)(message)
    monkeypatch.setattr(bus, "WEBHOOK_TIMEOUT", 0.2)
    server.delay = 0.6
    with pytest.raises(OSError):
        bus.bus_to(server.url)(message)
    with pytest.raises(ValueError, match="http"):
        bus.bus_to("ftp://example.com/x")
    with pytest.raises(ValueError):
        bus.bus_to("file:///etc/passwd")


def test_a_file_gets_one_line_per_message(optimizer, session, tmp_path):
    path = tmp_path / "messages.jsonl"
    for _ in range(2):
        assert bus.send_session_summary(optimizer, session.id, bus.bus_to(str(path)))
    assert [json.loads(line)["priority"] for line in path.read_text(encoding="utf-8").splitlines()] == [
        "LOW",
        "LOW",
    ]
    assert not bus.send_session_summary(optimizer, "nobody", bus.bus_to(str(path)))
    assert run("message_bus_alerts", "--to", tmp_path / "no" / "such" / "file")[0] == 1


# ---- Agent health ----


@pytest.mark.parametrize(
    "average, status",
    [
        (100, "HEALTHY"),
        (85, "HEALTHY"),
        (84.99, "WARNING"),
        (70, "WARNING"),
        (69.99, "CRITICAL"),
        (0, "CRITICAL"),
    ],
)
def test_health_status(average, status):
    assert agent_health.health_status(average) == status


def test_metrics_reach_the_monitor(optimizer, session):
    seen = []

    class Sink:
        def report_session(self, agent, metrics):
            seen.append((agent, metrics))

    wasteful(optimizer, session.id, 2)
    optimizer.log_event(session.id, EventType.ERROR, {"message": "x"})
    agent_health.report_session(optimizer, Sink(), session.id)
    ((agent, metrics),) = seen
    assert agent == "FORGE" and metrics["waste_tokens"] == 1_000 and metrics["error_rate"] == 20.0
    assert agent_health.session_metrics(optimizer, "nobody") is None
    assert agent_health.health_summary(optimizer, "FORGE")["status"] == "CRITICAL"
    assert agent_health.health_summary(optimizer, "NOBODY")["status"] == "UNKNOWN"


# ---- Collaboration ----


def test_agents_of_different_processes_share_one_collaboration(tmp_path):
    first = collaboration.Collaboration(SessionOptimizer(str(tmp_path)), "Task", collab_id="c1")
    second = collaboration.Collaboration(SessionOptimizer(str(tmp_path)), "Task", collab_id="c1")
    other = collaboration.Collaboration(SessionOptimizer(str(tmp_path)), "Task", collab_id="c2")
    first.join("A", "planner")
    second.join("B", "builder")
    other.join("C", "builder")
    for collab, agent, reads in ((first, "A", 1), (second, "B", 3), (other, "C", 1)):
        for _ in range(reads):
            collab.log(agent, EventType.FILE_READ, {"file_path": "a.py"}, tokens_input=1_000)
    first.finish()
    result = second.finish()
    assert (result["total_tokens"], result["waste_tokens"], result["combined_efficiency"]) == (
        4_000,
        2_000,
        50.0,
    )
    assert [row["agent"] for row in result["agents"].values()] == ["A", "B"]
    assert result["shared_files"] == ["a.py"]


def test_a_handoff_is_delivered_and_costs_its_receiver(optimizer):
    collab = collaboration.Collaboration(optimizer, "Task")
    one, two = collab.join("A", "planner"), collab.join("B", "builder")
    collab.handoff("A", "B", "x" * 400)
    assert collab.channel.mail == {"B": [("A", "x" * 400)]}
    assert (one.total_tokens, two.total_tokens) == (0, 100)
    assert one.metadata["collab_id"] == two.metadata["collab_id"] == collab.collab_id
    assert one.events[-1].data["type"] == "handoff_out" and two.events[-1].data["type"] == "handoff_in"


# ---- Priority queue ----


def test_the_most_urgent_task_first_and_equals_in_order(optimizer):
    queue, done = tasks.TaskQueue(), []
    for name, priority in (("a", 1), ("b", 9), ("c", 9), ("d", 5)):
        queue.push(tasks.Task(name, name, "BOLT", priority))

    def work(optimizer, session_id, task):
        done.append(task.id)
        optimizer.log_event(session_id, EventType.AI_RESPONSE, tokens_output=10)
        if task.id == "b":
            queue.push(tasks.Task("e", "e", "BOLT", 7))  # while the queue is being worked through
            raise RuntimeError("broken")

    results = tasks.run_queue(optimizer, queue, work)
    assert done == ["b", "c", "e", "d", "a"] and queue.pop() is None
    assert [result.success for result in results] == [False, True, True, True, True]
    assert optimizer.get_session(results[0].session_id).status is SessionStatus.FAILED
    stats = tasks.statistics(results)
    assert list(stats) == [9, 7, 5, 1] and (stats[9]["tasks"], stats[9]["succeeded"], stats[9]["tokens"]) == (
        2,
        1,
        20,
    )


# ---- Knowledge base ----


@pytest.mark.parametrize("full_text", [True, False])
def test_search_finds_the_best_match(tmp_path, full_text):
    path = str(tmp_path / "kb.db")
    with closing(knowledge_base.SqliteKnowledge(path, full_text=full_text)) as base:
        ids = [
            base.save(topic, text)
            for topic, text in (
                ("Retries", "Back off exponentially"),
                ("Keys", "Sign tokens, rotate keys"),
                ("Locks", "Lock the file"),
            )
        ]
        assert [row[0] for row in base.query("rotate the KEYS")][0] == ids[1]
        assert base.query('" OR NEAR( * --') == [] or full_text  # no operator of FTS5 is one here
        assert base.query("") == base.query("?!") == base.query("nothing") == []
        assert len(base.query("off tokens file", limit=2)) == 2
        assert base.load(ids[2]) == ("Locks", "Lock the file") and base.load(99) is None
    with closing(knowledge_base.SqliteKnowledge(path, full_text=full_text)) as base:
        assert base.load(ids[0])[0] == "Retries"


def test_without_fts5_it_searches_word_by_word(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base.SqliteKnowledge, "_has_fts5", lambda self: False)
    with closing(knowledge_base.SqliteKnowledge(str(tmp_path / "kb.db"))) as base:
        assert base.full_text is False
        base.save("a", "100% of _tokens_")
        assert base.query("100")[0][1] == "a"


def test_a_query_repeated_is_waste_until_something_is_saved(optimizer, session, tmp_path):
    with closing(knowledge_base.SqliteKnowledge(str(tmp_path / "kb.db"))) as base:
        for _ in range(2):
            knowledge_base.query_knowledge(optimizer, session.id, base, "keys")
            knowledge_base.save_knowledge(optimizer, session.id, base, "Keys", "Rotate keys weekly")
        assert optimizer.analyze(session.id).issues == []
        knowledge_base.query_knowledge(optimizer, session.id, base, "keys")
        knowledge_base.query_knowledge(optimizer, session.id, base, "Keys ")
        assert [i.issue_type.value for i in optimizer.analyze(session.id).issues] == ["REPEATED_SEARCH"]
        assert knowledge_base.load_knowledge(optimizer, session.id, base, 99) == ""
        assert knowledge_base.load_knowledge(optimizer, session.id, base, 1) == "Rotate keys weekly"
    (load,) = events_of(optimizer, session.id, EventType.CONTEXT_LOAD)
    assert load.tokens_input == 5 and load.data["knowledge_id"] == 1


# ---- Monitor ----


def test_an_alert_is_sent_once_and_again_after_it_was_gone(optimizer, session):
    sent = []
    wasteful(optimizer, session.id, 4)
    assert monitor.check(optimizer, sent.append) != []
    assert sent[0]["priority"] == "HIGH" and sent[0]["session_id"] == session.id and sent[0]["id"]
    count = len(sent)
    assert (
        monitor.check(SessionOptimizer(str(optimizer.storage_path)), sent.append) == [] and len(sent) == count
    )
    for _ in range(40):
        optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=1_000)
    assert "LOW_EFFICIENCY" not in str(monitor.check(optimizer, sent.append))
    for _ in range(80):
        optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "a.py"}, tokens_input=1_000)
    assert f"{session.id}:LOW_EFFICIENCY" in monitor.check(optimizer, sent.append)


def test_what_could_not_be_sent_is_tried_again(optimizer, session):
    wasteful(optimizer, session.id, 4)

    def broken(message):
        raise OSError("no route")

    with pytest.raises(OSError):
        monitor.check(optimizer, broken)
    assert monitor.check(optimizer, lambda message: None) != []


def test_levels_and_a_damaged_state(optimizer, session):
    wasteful(optimizer, session.id, 9)
    levels = {alert["level"] for alert in optimizer.alerts()}
    sent = []
    monitor.check(optimizer, sent.append, level=Severity.HIGH)
    assert "MEDIUM" in levels and {message["priority"] for message in sent} == {"HIGH"}
    (optimizer.storage_path / "monitor.json").write_text("{", encoding="utf-8")
    assert monitor.check(optimizer, sent.append, level=Severity.HIGH) != []


def test_the_monitor_as_a_program(tmp_path, optimizer, session, server):
    wasteful(optimizer, session.id, 4)
    path = tmp_path / "alerts.jsonl"
    for _ in range(2):
        assert run("monitor", "--store", optimizer.storage_path, "--to", path, "--level", "high")[0] == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["priority"] for line in lines] == ["HIGH"]
    server.status = 503
    place = ["--store", optimizer.storage_path, "--state", tmp_path / "other.json"]
    status, _, errors = run("monitor", *place, "--to", server.url)
    assert status == 1 and errors.startswith("monitor: ") and "503" in errors
    server.status = 200
    assert run("monitor", *place, "--to", server.url)[0] == 0 and len(server.requests) == 2
    assert run("monitor", "--to", "ftp://example.com")[0] == 2
    assert run("monitor", "--level", "loud")[0] == 2
    assert run("monitor")[:2] == (0, "")


def test_the_monitor_repeats_on_its_interval(tmp_path, optimizer, session):
    path = tmp_path / "alerts.jsonl"
    watching = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            os.path.join(HERE, "monitor.py"),
            "--interval",
            "0.1",
            "--to",
            str(path),
            "--level",
            "high",
            "--store",
            str(optimizer.storage_path),
        ]
    )
    try:
        wasteful(optimizer, session.id, 4)
        deadline = time.monotonic() + TIMEOUT
        while not path.exists() and time.monotonic() < deadline and watching.poll() is None:
            time.sleep(0.05)
        assert path.exists() and watching.poll() is None
    finally:
        watching.kill()
        watching.wait(TIMEOUT)


# ---- CI report ----


def scanned(path):
    """What ``scan --format json`` prints for a path."""
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "sessionoptimizer.py"),
            "scan",
            path,
            "--format",
            "json",
            "--no-store",
        ],
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
        check=True,
    )
    return done.stdout.decode()


@pytest.fixture(scope="module")
def scan_json():
    return scanned(os.path.join(SAMPLES, "claude-code"))


def test_a_scan_becomes_junit_with_one_testcase_per_session(scan_json):
    status, text, errors = run("ci_report", stdin=scan_json)
    assert (status, errors) == (0, "")
    result, suites = json.loads(scan_json), ElementTree.fromstring(text)
    (suite,) = suites
    cases = suite.findall("testcase")
    assert suites.tag == "testsuites" and len(cases) == len(result["sessions"]) == int(suite.get("tests"))
    for row, case in zip(result["sessions"], cases):
        high = [issue for issue in row["issues"] if issue["severity"] in ("HIGH", "CRITICAL")]
        failures = case.findall("failure")
        assert len(failures) == bool(high) and row["id"] in case.get("name")
        for issue in high:
            assert issue["description"] in failures[0].text
    failed = sum(case.find("failure") is not None for case in cases)
    assert failed == int(suite.get("failures")) == int(suites.get("failures")) > 0


def test_level_and_strict(scan_json, tmp_path):
    path = tmp_path / "scan.json"
    path.write_text(scan_json, encoding="utf-8")
    counts = []
    for level in ("critical", "HIGH", "low"):
        assert run("ci_report", path, "--level", level, "--output", tmp_path / "report.xml")[0] == 0
        counts.append(int(ElementTree.parse(str(tmp_path / "report.xml")).getroot().get("failures")))
    assert counts[0] == 0 < counts[1] < counts[2]
    assert run("ci_report", path, "--strict")[0] == 3
    assert run("ci_report", path, "--strict", "--level", "CRITICAL")[0] == 0
    assert run("ci_report", path, "--level", "LOUD")[0] == 2


def test_whatever_is_in_a_session_the_report_is_xml(scan_json):
    result = json.loads(scan_json)
    row = next(
        row for row in result["sessions"] if any(issue["severity"] == "HIGH" for issue in row["issues"])
    )
    evil = "]]> <b a=\"'&amp; \0\x1b[31m\x0b\ufffe\ud800 \U0001f600 ü"
    row.update(task=evil + "\nnext", agent=evil, path=evil, notes=[evil])
    for issue in row["issues"]:
        issue.update(description=evil, suggestion=evil)
    skipped = [{"path": evil, "line": 3, "reason": evil}]
    text, failed = ci_report.junit({"sessions": [row], "skipped": skipped})
    (suite,) = ElementTree.fromstring(text.encode("utf-8"))
    case = suite.find("testcase")
    kept = "]]> <b a=\"'&amp; [31m \U0001f600 ü"
    assert failed == 1 and case.get("name").startswith(kept + "\nnext")
    assert kept in case.find("failure").text and kept in case.find("system-out").text
    assert kept in suite.find("system-err").text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"sessions": 3}', '{"sessions": [{}]}', '{"sessions": [3]}', "\ufeff"]
)
def test_what_is_no_scan_is_named(text, tmp_path, capsys):
    path = tmp_path / "scan.json"
    path.write_text(text, encoding="utf-8")
    assert ci_report.main([str(path)]) == 1
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"ci_report: {path} is not what")


def test_standard_input_that_is_empty_is_named():
    status, output, errors = run("ci_report")
    assert status == 1 and output == "" and errors.startswith("ci_report: standard input is not what")


def test_a_file_that_is_not_there():
    assert run("ci_report", "/no/such/file")[0] == 1


# ---- OTLP ----


def totals(session):
    """Uncached and cached input, output, model calls, thinking."""
    events = session.events
    return {
        "input": sum(e.tokens_input for e in events),
        "write": sum(e.tokens_cache_write for e in events),
        "read": sum(e.tokens_cache_read for e in events),
        "output": sum(e.tokens_output for e in events),
        "calls": sum(e.event_type is EventType.AI_RESPONSE for e in events),
        "thinking": sum(e.tokens_output for e in events if e.event_type is EventType.THINKING),
    }


def read_back(session, path, batch=export_otlp.BATCH):
    """The session that our own reader makes of what was written."""
    path.write_text(
        "".join(json.dumps(part) + "\n" for part in export_otlp.documents(session, batch)), encoding="utf-8"
    )
    reader = SessionOptimizer(str(path) + "-store")
    result = reader.scan([str(path)])
    assert result["skipped"] == [] and len(result["sessions"]) == 1
    assert result["sessions"][0]["source"] == "otel"
    return reader.get_session(result["sessions"][0]["id"])


def test_what_is_written_is_read_back_equal_for_every_sample(optimizer, tmp_path):
    optimizer.scan([os.path.join(SAMPLES, name) for name in ("claude-code", "codex", "gemini")])
    rows = optimizer.list_sessions(limit=1_000)
    assert len(rows) > 50
    for number, row in enumerate(rows):
        session = optimizer.get_session(row.id)
        assert totals(read_back(session, tmp_path / f"{number}.jsonl")) == totals(session), session.metadata[
            "source"
        ]["path"]


def test_a_session_logged_by_hand_is_read_back_equal(optimizer, session, tmp_path):
    for kind, data, given, written in (
        ("USER_MESSAGE", {}, 40, 0),
        ("THINKING", {}, 0, 70),
        ("FILE_READ", {"file_path": "a.py"}, 900, 20),
        ("AI_RESPONSE", {}, 5, 300),
        ("SEARCH", {"query": "x"}, 60, 9),
        ("ERROR", {"message": "<no>\x1b"}, 30, 3),
        ("AI_RESPONSE", {}, 0, 200),
        ("FILE_WRITE", {"file_path": "a.py"}, 0, 100),
        ("TOKEN_USAGE", {}, 11, 12),
    ):
        optimizer.log_event(session.id, kind, data, tokens_input=given, tokens_output=written)
    back = read_back(optimizer.get_session(session.id), tmp_path / "x.jsonl", batch=3)
    assert (
        totals(back)
        == totals(session)
        == {"input": 1_046, "write": 0, "read": 0, "output": 714, "calls": 2, "thinking": 70}
    )
    assert back.agent == "FORGE" and sum(event.event_type is EventType.ERROR for event in back.events) == 1


@pytest.mark.parametrize(
    "events, expected",
    [
        ([], dict(input=0, output=0, calls=0)),
        (
            [("FILE_READ", 100, 5)],
            dict(input=100, output=5, calls=1),
        ),  # tokens without a model call: one stands for it
        ([("AI_RESPONSE", 0, 0)], dict(input=0, output=0, calls=1)),
    ],
)
def test_the_edges_of_a_round_trip(optimizer, session, tmp_path, events, expected):
    for kind, given, written in events:
        optimizer.log_event(session.id, kind, tokens_input=given, tokens_output=written)
    back = totals(read_back(session, tmp_path / "x.jsonl"))
    assert {key: back[key] for key in expected} == expected


def test_times_that_are_missing_or_go_back_keep_the_order(tmp_path):
    session = Session("s1", "FORGE", "t", started_at="2026-01-01T00:00:00Z")
    for number, stamp in enumerate(
        ("", "2026-01-01T10:00:00Z", "2026-01-01T09:00:00Z", "", "2026-01-01T10:00:00Z")
    ):
        kind = EventType.AI_RESPONSE if number % 2 else EventType.FILE_READ
        session.add_event(SessionEvent(f"e{number}", stamp, kind, {"file_path": "a"}, 10, 7))
    (document,) = export_otlp.documents(session)
    spans = document["resourceSpans"][0]["scopeSpans"][0]["spans"]
    starts = [int(span["startTimeUnixNano"]) for span in spans]
    assert starts == sorted(set(starts))
    assert totals(read_back(session, tmp_path / "x.jsonl")) == totals(session)


def test_the_spans_follow_the_conventions(optimizer, session):
    optimizer.log_event(
        session.id, "FILE_READ", {"file_path": "a.py", "lines": [1, 9]}, tokens_input=500, duration_ms=12
    )
    optimizer.log_event(session.id, "AI_RESPONSE", {"response_id": "r1"}, tokens_output=50)
    (first,) = export_otlp.documents(session)
    assert [first] == list(export_otlp.documents(copy.deepcopy(session)))  # the same ids every time
    agent, tool, chat = first["resourceSpans"][0]["scopeSpans"][0]["spans"]
    values = {pair["key"]: pair["value"] for pair in chat["attributes"]}
    assert chat["name"] == "chat opus" and chat["kind"] == 3 and agent["parentSpanId"] == ""
    assert chat["parentSpanId"] == tool["parentSpanId"] == agent["spanId"]
    assert re.fullmatch("[0-9a-f]{32}", chat["traceId"]) and re.fullmatch("[0-9a-f]{16}", chat["spanId"])
    assert values["gen_ai.usage.input_tokens"] == {"intValue": "500"} and values["gen_ai.provider.name"] == {
        "stringValue": "anthropic"
    }
    assert int(tool["endTimeUnixNano"]) - int(tool["startTimeUnixNano"]) == 12_000_000
    assert agent["name"] == "invoke_agent FORGE" and tool["name"] == "execute_tool read"


def test_the_exporter_as_a_program(optimizer, session, tmp_path, server):
    wasteful(optimizer, session.id, 2)
    place = ["--store", optimizer.storage_path]
    status, output, errors = run("export_otlp", session.id, *place)
    assert (status, errors) == (0, "") and json.loads(output)["resourceSpans"]
    assert run("export_otlp", "last", "--output", tmp_path / "o.jsonl", *place)[0] == 0
    assert (tmp_path / "o.jsonl").read_text(encoding="utf-8") == output
    assert run("export_otlp", "last", "--endpoint", server.url, "--header", "X-Key=k=1", *place)[0] == 0
    path, headers, body = server.requests[0]
    assert (path, headers["X-Key"], headers["Content-Type"]) == ("/v1/traces", "k=1", "application/json")
    assert body == json.loads(output)
    server.answer = b'{"partialSuccess": {"rejectedSpans": "2"}}'
    status, _, errors = run("export_otlp", "last", "--endpoint", server.url + "/v1/traces", *place)
    assert status == 1 and "rejected 2 spans" in errors and server.requests[-1][0] == "/v1/traces"
    server.status = 401
    assert run("export_otlp", "last", "--endpoint", server.url, *place)[0] == 1
    assert run("export_otlp", "nobody", *place)[0] == 1
    assert run("export_otlp", "last", "--endpoint", "file:///etc", *place)[0] == 2
    assert run("export_otlp", "last", "--header", "no value", *place)[0] == 2
    assert run("export_otlp", "last", "--store", tmp_path / "empty")[0] == 1


# ---- Claude Code hooks ----

SETTINGS = [
    b"",
    b"{}",
    b'{"model": "opus"}\n',
    b'{\n\t"model": "opus",\n\t"n": [1, 2]\n}',
    b'{"hooks": {}}\n',
    b'{\r\n  "a": 1\r\n}\r\n',
    '{"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "say \\u00fc ü"}]}], "PreToolUse": []}, '
    '"x": 1.50}'.encode(),
    b'{"hooks": {"PostToolUse": [{"matcher": "Edit", "hooks": [{"type": "command", "command": "fmt"}]}]}}\n',
]


@pytest.fixture
def settings(home):
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("before", SETTINGS)
@pytest.mark.parametrize("options", [(), ("--guard", "deny")])
def test_install_twice_is_once_and_uninstall_restores(settings, before, options, capsys):
    settings.write_bytes(before)
    assert hooks.main(["--install", *options]) == 0
    once = settings.read_bytes()
    assert hooks.main(["--install", *options]) == 0
    assert settings.read_bytes() == once and "nothing to change" in capsys.readouterr().out
    found = json.loads(once.decode())["hooks"]
    assert set(hooks.EVENTS) <= set(found) and ("PreToolUse" in found) == (
        bool(options) or b"PreToolUse" in before
    )
    copies = [path for path in settings.parent.iterdir() if path.name.endswith(".bak")]
    assert [path.read_bytes() for path in copies] == [before]
    assert hooks.main(["--uninstall"]) == 0
    assert settings.read_bytes() == before
    assert hooks.main(["--uninstall"]) == 0 and settings.read_bytes() == before


def test_where_no_file_was_none_is_left(settings):
    settings.parent.rmdir()
    assert hooks.main(["--install"]) == 0 and settings.exists()
    assert hooks.main(["--uninstall"]) == 0 and not settings.exists()


def test_other_entries_are_never_touched(settings):
    mine = {
        "model": "opus",
        "hooks": {
            "Stop": [{"hooks": [{"type": "command", "command": "say done"}]}],
            "Notification": [
                {"matcher": "", "hooks": [{"type": "command", "command": "my-sessionoptimizer-hook"}]}
            ],
        },
    }
    settings.write_text(json.dumps(mine), encoding="utf-8")
    hooks.main(["--install"])
    now = json.loads(settings.read_text(encoding="utf-8"))
    now["hooks"]["Stop"][1]["hooks"].append({"type": "command", "command": "added later"})
    now["env"] = {"A": "1"}
    settings.write_text(json.dumps(now), encoding="utf-8")
    hooks.main(["--install", "--guard"])
    hooks.main(["--uninstall"])
    mine["hooks"]["Stop"].append({"hooks": [{"type": "command", "command": "added later"}]})
    mine["env"] = {"A": "1"}
    assert json.loads(settings.read_text(encoding="utf-8")) == mine


def test_nothing_is_written_without_install(settings, capsys):
    settings.write_bytes(b'{"model": "opus"}')
    for options in ([], ["--dry-run"], ["--install", "--dry-run"]):
        assert hooks.main(options) == 0
        output = capsys.readouterr().out
        assert "nothing written" in output and '+    "SessionStart": [' in output.replace('+  "', '+    "')
    assert settings.read_bytes() == b'{"model": "opus"}' and len(list(settings.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "damaged",
    [
        b"{",
        b"[]",
        b"3",
        b'{"hooks": []}',
        b'{"hooks": {"Stop": {}}}',
        b'{"a": 1, "a": 2}',
        b'{"a": 1} // note',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_damaged_settings_are_refused(settings, damaged, capsys):
    settings.write_bytes(damaged)
    for action in ("--install", "--uninstall"):
        assert hooks.main([action]) == 1
        error = capsys.readouterr().err
        assert str(settings) in error and "nothing was changed" in error
    assert settings.read_bytes() == damaged and len(list(settings.parent.iterdir())) == 1


def test_a_project_a_config_directory_and_a_link(home, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    assert hooks.main(["--install", "--project"]) == 0
    assert (project / ".claude" / "settings.json").exists() and not (home / ".claude").exists()
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    (tmp_path / "dotfiles.json").write_bytes(b"{}")
    (tmp_path / "dotfiles.json").chmod(0o600)
    (tmp_path / "config" / "settings.json").symlink_to(tmp_path / "dotfiles.json")
    assert hooks.main(["--install"]) == 0
    assert (tmp_path / "config" / "settings.json").is_symlink() and b"SessionEnd" in (
        tmp_path / "dotfiles.json"
    ).read_bytes()
    assert (tmp_path / "dotfiles.json").stat().st_mode & 0o777 == 0o600


def test_what_the_entries_say(tmp_path):
    found = hooks.entries(hooks.hook_command(str(tmp_path / "a store")), "advise")
    for event, group in found.items():
        (handler,) = group["hooks"]
        assert handler["timeout"] <= 10 and hooks.is_ours(handler)
        assert handler.get("async", False) is (event not in ("SessionEnd", "PreToolUse"))
    assert found["PreToolUse"]["hooks"][0]["command"].endswith("hook --guard")


@pytest.mark.parametrize(
    "command, ours",
    [
        ("sessionoptimizer hook", True),
        ("/usr/bin/python3 /opt/so/sessionoptimizer.py --store '/a b' hook --guard --deny", True),
        ("python3 -m sessionoptimizer hook", True),
        ('"C:\\x y\\sessionoptimizer.exe" hook', True),
        ("my-sessionoptimizer hook", False),
        ("sessionoptimizer hook | tee log", False),
        ("sessionoptimizer scan", False),
        ("sessionoptimizer-wrapper hook", False),
    ],
)
def test_which_entries_are_ours(command, ours):
    assert hooks.is_ours({"command": command}) is ours


def test_an_installed_hook_logs_a_session(settings, tmp_path):
    hooks.main(["--install", "--store", str(tmp_path / "live")])
    found = json.loads(settings.read_text(encoding="utf-8"))["hooks"]
    common = {"session_id": "0b1c", "transcript_path": str(tmp_path / "t.jsonl"), "cwd": str(tmp_path)}
    for event, more in (
        ("SessionStart", {"source": "startup"}),
        ("UserPromptSubmit", {"prompt": "Fix the loader"}),
        (
            "PostToolUse",
            {
                "tool_name": "Read",
                "tool_input": {"file_path": "/a.py"},
                "tool_use_id": "t1",
                "tool_response": {
                    "type": "text",
                    "file": {
                        "filePath": "/a.py",
                        "content": "x\n" * 99,
                        "numLines": 99,
                        "startLine": 1,
                        "totalLines": 99,
                    },
                },
            },
        ),
        ("SessionEnd", {"reason": "other"}),
    ):
        payload = dict(common, hook_event_name=event, **more)
        command = found[event][0]["hooks"][0]["command"]
        done = subprocess.run(
            command,
            shell=True,
            input=json.dumps(payload).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    session = SessionOptimizer(str(tmp_path / "live")).get_session("0b1c")
    assert session.status is SessionStatus.COMPLETED and session.task == "Fix the loader"
    assert [
        event.event_type.value for event in session.events if event.event_type is EventType.FILE_READ
    ] == ["FILE_READ"]


def test_the_installer_as_a_program(home):
    status, output, errors = run("claude_code_hooks")
    assert (
        (status, errors) == (0, "") and "--install makes this change" in output and list(home.iterdir()) == []
    )


def test_the_labelled_samples_are_all_judged_right():
    result = selftest.run_labelled_cases(SAMPLES)
    assert result["mistakes"] == [] and result["wrong"] == 0 and result["cases"] >= 40
    assert len({row["analyzer"] for row in result["analyzers"]}) == 8
    for row in result["analyzers"]:
        assert row["true_positives"] > 0 and row["true_negatives"] > 0
        assert row["false_positives"] == row["false_negatives"] == 0
        assert row["precision"] == row["recall"] == 1 and row["token_error_percent"] == 0
    with open(os.path.join(ROOT, "docs", "accuracy.md"), encoding="utf-8") as page:
        assert selftest.selftest_report(result) in page.read()


@pytest.mark.parametrize("change, mistakes", [
    (lambda case: {}, 0),
    (lambda case: {"expected": []}, 1),
    (lambda case: {"totals": dict(case["totals"], output=1)}, 1),
])
def test_a_wrong_label_is_noticed(tmp_path, change, mistakes):
    with open(os.path.join(SAMPLES, "labels.json"), encoding="utf-8") as file:
        case = next(case for case in json.load(file)["cases"] if case["name"] == "read-twice")
    shutil.copytree(os.path.join(SAMPLES, case["path"]), str(tmp_path / case["path"]))
    (tmp_path / "labels.json").write_text(json.dumps({"cases": [dict(case, **change(case))]}), encoding="utf-8")
    assert len(selftest.run_labelled_cases(str(tmp_path))["mistakes"]) == mistakes
    status, out, errors = run("selftest", tmp_path, "--format", "json")
    assert (status, json.loads(out)["wrong"], errors) == (3 if mistakes else 0, mistakes, "")


def test_a_folder_without_labels_is_named(tmp_path):
    status, out, errors = run("selftest", tmp_path / "nowhere")
    assert (status, out) == (1, "") and "labels.json" in errors
