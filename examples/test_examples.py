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
from pathlib import Path

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SAMPLES = os.path.join(HERE, "transcripts")
sys.path[:0] = [ROOT, HERE]
import agent_health  # noqa: E402  (found through the line above)
import sessionoptimizer  # noqa: E402
import ci_report  # noqa: E402
import claude_code_hooks as hooks  # noqa: E402
import collaboration  # noqa: E402
import context_compressor as compressor  # noqa: E402
import export_otlp  # noqa: E402
import knowledge_base  # noqa: E402
import message_bus_alerts as bus  # noqa: E402
import monitor  # noqa: E402
import selftest  # noqa: E402
import token_tracker  # noqa: E402
from crew import Task, open_bus  # noqa: E402
from sessionoptimizer import (EventType, Session, SessionEvent, SessionOptimizer,  # noqa: E402
                              SessionStatus, Severity)

pytestmark = pytest.mark.filterwarnings("error")
TIMEOUT = 30  # seconds for one program

INTEGRATIONS = {
    "context_compressor": ["sessionoptimizer.py: ", "tokens (estimated)", "saved: ", "issues: 0"],
    "knowledge_base": ["best match: JWT", "REPEATED_SEARCH"],
    "complete_workflow": [
        "docs: merged, login: merged, ci: protected",
        "together               3 sessions      6,600 tokens $0.0900, +2 -0 lines",
        "3 of 3 sessions below 80%",
        "10. Keep what was learned",
    ],
}
# What works on what is in a store, a file or a queue.
PROGRAMS = ("token_tracker", "error_recovery", "message_bus_alerts", "agent_health",
            "collaboration", "priority_queue")
EXPLAINED = (
    *INTEGRATIONS,
    *PROGRAMS,
    "dashboard",
    "monitor",
    "ci_report",
    "selftest",
    "claude_code_hooks",
    "export_otlp",
    "git_insights",
    "compression",
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
    """A server on 127.0.0.1 that keeps what is posted and answers with ``status`` and
    ``answer``."""

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
    thread = threading.Thread(target=server.serve_forever,
                              kwargs={"poll_interval": 0.01}, daemon=True)
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
    return [event for event in optimizer.get_session(session_id).events
            if event.event_type is event_type]


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


@pytest.mark.parametrize("name", [*INTEGRATIONS, *PROGRAMS, "monitor", "ci_report", "selftest",
                                  "export_otlp", "claude_code_hooks"])
def test_help_and_a_bad_option(name, capsys):
    if name == "error_recovery":
        pytest.importorskip("tenacity", reason="tenacity is missing: pip install -e '.[recovery]'")
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(name).main([option])
        assert stop.value.code == status
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", [*INTEGRATIONS, *PROGRAMS])
def test_a_program_stays_small_and_explains_itself(name):
    with open(os.path.join(HERE, name + ".py"), encoding="utf-8") as file:
        text = file.read()
    tree = ast.parse(text)
    assert 40 <= len(text.splitlines()) <= 250
    assert f"python3 examples/{name}.py" in ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_the_table_names_every_program():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for name in EXPLAINED:
        assert f"`{name}.py`" in text or f"[{name}.py]" in text, name


# ---- Token tracker ----

# What ccusage 20.0.26 printed for three of the samples (`ccusage claude session --json`, `ccusage
# session --json`). It counts the sub-agent whose file lies beside the session's own as a session of
# its own, so the last one differs.
CCUSAGE = {
    "sessions": [
        {
            "sessionId": "f714ed36-6704-5270-9cc6-0bb8ff3d909d", "inputTokens": 108,
            "outputTokens": 569, "cacheCreationTokens": 15113, "cacheReadTokens": 569459,
            "totalCost": 0.4506245000000001,
        },
        {
            "sessionId": "dc5caaa6-2c15-540c-8204-baa120fdf75f", "inputTokens": 24,
            "outputTokens": 91,
            "cacheCreationTokens": 10542, "cacheReadTokens": 121234, "totalCost": 0.168432,
        },
        {
            "sessionId": "3bb8a77a-323f-513f-ba8d-8e650bc7675d", "inputTokens": 12,
            "outputTokens": 59,
            "cacheCreationTokens": 5274, "cacheReadTokens": 60600, "totalCost": 0.084575,
        },
    ]
}
CCUSAGE_SESSIONS = {
    "session": [{**{k: v for k, v in row.items() if k != "sessionId"}, "period": row["sessionId"]}
                for row in CCUSAGE["sessions"]]}
F714 = CCUSAGE["sessions"][0]["sessionId"]


def litellm_rows(session_id, **change):
    """One request as LiteLLM 1.106 logs it (StandardLoggingPayload),
    and one as its spend log has it."""
    detail = {"prompt_tokens": 500, "completion_tokens": 4, "cache_read_input_tokens": 400,
              "cache_creation_input_tokens": 97}
    row = {"prompt_tokens": 500, "completion_tokens": 4, "status": "success",
           "metadata": {"usage_object": detail}}
    first = dict(row, response_cost=0.25, end_user=f"user_0f_account_{F714}_session_{session_id}",
                 session_id="", **change)
    second = dict(row, spend=0.5, metadata=json.dumps(row["metadata"]), session_id=session_id,
                  end_user=None)
    failed = dict(first, status="failure", prompt_tokens=9_999)
    return [first, second, failed]


def otel_export(session_id, temporality, *exports):
    """Claude Code's metrics as OTLP/JSON, one line per export."""
    lines = []
    for figures in exports:
        points = [
            {
                "attributes": [{"key": "session.id", "value": {"stringValue": session_id}},
                               {"key": "type", "value": {"stringValue": kind}}],
                "startTimeUnixNano": "1", "asDouble": value,
            }
            for kind, value in figures.items()
        ]
        cost = {"attributes": points[0]["attributes"][:1], "startTimeUnixNano": "1",
                "asDouble": 0.25}
        metrics = [
            {"name": "claude_code.token.usage",
             "sum": {"aggregationTemporality": temporality, "dataPoints": points}},
            {"name": "claude_code.cost.usage",
             "sum": {"aggregationTemporality": temporality, "dataPoints": [cost]}},
            {"name": "claude_code.session.count",
             "sum": {"dataPoints": [{"attributes": [], "asInt": "1"}]}},
        ]
        lines.append(json.dumps(
            {"resourceMetrics": [{"resource": {}, "scopeMetrics": [{"metrics": metrics}]}]}))
    return "\n".join(lines)


@pytest.mark.parametrize("report", [CCUSAGE, CCUSAGE_SESSIONS], ids=["claude session", "session"])
def test_ccusage_is_reconciled_to_the_token_and_a_difference_is_told(tmp_path, report):
    optimizer = SessionOptimizer(str(tmp_path / "store"))
    optimizer.scan([os.path.join(SAMPLES, "claude-code")])
    status, output, _ = run("token_tracker", "ccusage", "-", "--store", tmp_path / "store",
                            stdin=json.dumps(report))
    assert status == 3 and "2 of 3 sessions agree to the token" in output
    rows = {row["session"]: row for row in token_tracker.reconcile(
        optimizer, token_tracker.from_ccusage(json.dumps(report)))}
    assert (rows[F714]["equal"]
            and rows[F714]["ours"].cost == pytest.approx(rows[F714]["theirs"].cost, abs=1e-9))
    apart = rows["3bb8a77a-323f-513f-ba8d-8e650bc7675d"]
    assert apart["ours"].tokens() == [21, 7462, 77072, 104]  # with the sub-agent
    two = {"sessions": report.get("sessions", [])[:2], "session": report.get("session", [])[:2]}
    assert run("token_tracker", "ccusage", "-", "--store", tmp_path / "store",
               stdin=json.dumps(two))[0] == 0


@pytest.mark.parametrize(
    "source, text",
    [
        ("litellm", json.dumps(litellm_rows("a1b2c3d4-0000-4000-8000-000000000001"))),
        ("litellm",
         "\n".join(map(json.dumps, litellm_rows("a1b2c3d4-0000-4000-8000-000000000001")))),
        ("otel", otel_export("a1b2c3d4-0000-4000-8000-000000000001", 1,
                             {"input": 2, "output": 5, "cacheRead": 800},
                             {"input": 4, "output": 3, "cacheCreation": 194})),
        ("otel", otel_export("a1b2c3d4-0000-4000-8000-000000000001", 2,
                             {"input": 2, "output": 5, "cacheRead": 800},
                             {"input": 6, "output": 8, "cacheRead": 800, "cacheCreation": 194})),
    ],
    ids=["litellm array", "litellm lines", "otel delta", "otel cumulative"],
)
def test_classes_do_not_overlap_whoever_counted(source, text):
    ((session_id, usage),) = token_tracker.SOURCES[source](text).items()
    assert session_id == "a1b2c3d4-0000-4000-8000-000000000001"
    assert usage.tokens() == [6, 194, 800, 8]
    assert usage.cost == {"litellm": 0.75,
                          "otel": 0.5 if '"aggregationTemporality": 1' in text else 0.25}[source]


@pytest.mark.parametrize(
    "text", ["", "no json", "[1]", '{"sessions": [{"sessionId": "x"}]}', '[{"metadata": "{"}]'])
def test_what_no_tracker_wrote_is_named(text, tmp_path):
    sources = (["ccusage"] if "sessionId" in text else ["litellm"] if "metadata" in text
               else ["ccusage", "litellm", "otel"])
    for source in sources:
        status, output, errors = run("token_tracker", source, "-", "--store", tmp_path, stdin=text)
        assert (status, "is not what" in errors) == (1, True) or (text == "" and status == 0)


def test_a_session_that_is_not_in_the_store_is_a_difference(tmp_path):
    text = json.dumps({"sessions": [dict(CCUSAGE["sessions"][0], sessionId="../../etc/passwd")]})
    status, output, _ = run("token_tracker", "ccusage", "-", "--store", tmp_path, stdin=text)
    assert status == 3 and "not in the store" in output


def test_usage_is_counted_once_however_often_it_is_synced(optimizer, session):
    counted = token_tracker.Usage(uncached=900, cache_write=100, output=300)
    optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_input=400, tokens_output=300)
    assert ([token_tracker.sync_usage(optimizer, session.id, counted) for _ in range(3)]
            == [600, 0, 0])
    counted.add(token_tracker.Usage(50, output=7))
    token_tracker.sync_usage(optimizer, session.id, counted)
    assert (session.total_tokens_input, session.total_tokens_output) == (1_050, 307)
    assert len(events_of(optimizer, session.id, EventType.TOKEN_USAGE)) == 2
    assert token_tracker.sync_usage(optimizer, session.id, token_tracker.Usage()) == 0
    assert token_tracker.sync_usage(optimizer, "nobody", counted) == 0


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
        ("# Title\n\ntext", "a.txt"),
        ("", "a.py"),
        ("(" * 500 + ")" * 500, "a.py"),
    ],
)
def test_what_is_not_python_stays_as_it_is(text, path):
    assert compressor.outline(text, path) == text


def test_reads_are_logged_with_original_and_compressed_tokens(optimizer, session, tmp_path):
    code, prose = tmp_path / "latin.py", tmp_path / "notes.txt"
    code.write_bytes(b"# -*- coding: latin-1 -*-\n" + PYTHON.encode("latin-1"))
    prose.write_text("Prose.\n" * 20_000, encoding="utf-8")
    read = compressor.read_compressed(optimizer, session.id, str(code))
    compressor.read_compressed(optimizer, session.id, str(prose))
    assert "ü" in read.text and read.compressed_tokens < read.original_tokens
    first, second = events_of(optimizer, session.id, EventType.FILE_READ)
    assert first.tokens_input == first.data["compressed_tokens"] == read.compressed_tokens
    assert (first.data["original_tokens"] == read.original_tokens
            and first.data["compressed"] is True)
    assert "compressed" not in second.data and second.tokens_input == 35_000
    stats = compressor.compression_stats(session)
    assert (stats["files"], stats["original_tokens"]) == (1, read.original_tokens)
    assert [issue.issue_type.value for issue in optimizer.analyze(session.id).issues] == [
        "LARGE_FILE_UNCOMPRESSED"
    ]


# ---- Error recovery ----


@pytest.fixture
def recovery():
    pytest.importorskip("tenacity", reason="tenacity is missing: pip install -e '.[recovery]'")
    return importlib.import_module("error_recovery")


def flaky(failures, error=ConnectionError):
    """A function that fails so many times, and what it was called with."""
    calls = []

    def call(value):
        calls.append(value)
        if len(calls) <= failures:
            raise error(f"no answer, password=hunter2secret {len(calls)}")
        return value * 2

    return call, calls


def test_an_import_that_fails_says_which_extra(tmp_path):
    (tmp_path / "tenacity.py").write_text("raise ImportError('not here')")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    command = [sys.executable, os.path.join(HERE, "error_recovery.py"), "--", "true"]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=TIMEOUT)
    assert done.returncode == 1 and "sessionoptimizer[recovery]" in done.stderr.decode()


def test_backoff_doubles_up_to_the_limit_and_every_attempt_is_told(recovery, optimizer, session):
    call, calls = flaky(4)
    pauses = []
    wait = recovery.tenacity.wait_exponential(multiplier=1, max=3)
    stop = recovery.tenacity.stop_after_attempt(5)
    tracked = recovery.retry_with_tracking(optimizer, session.id, stop=stop, wait=wait,
                                           sleep=pauses.append)(call)
    assert tracked(21) == 42 and calls == [21] * 5
    assert pauses == [1, 2, 3, 3]
    (error,) = events_of(optimizer, session.id, EventType.ERROR)
    assert ((error.data["recovery_strategy"], error.data["recovered"], error.data["attempts"])
            == ("retry", True, 5))
    assert "hunter2secret" not in json.dumps(optimizer.get_session(session.id).to_dict())
    told = [event.data for event in events_of(optimizer, session.id, EventType.CUSTOM)]
    assert ([(data["attempt"], data["delay_seconds"]) for data in told]
            == [(1, 1), (2, 2), (3, 3), (4, 3)])
    assert optimizer.analyze(session.id).issues == []


def test_no_attempt_left(recovery, optimizer, session):
    call, calls = flaky(9)
    with pytest.raises(ConnectionError, match="no answer"):
        recovery.retry_with_tracking(optimizer, session.id, sleep=lambda seconds: None)(call)(1)
    (error,) = events_of(optimizer, session.id, EventType.ERROR)
    assert len(calls) == 3 and error.data["recovered"] is False and error.data["attempts"] == 3


@pytest.mark.parametrize("error, retry_on, attempts",
                         [(TypeError, (OSError,), 1), (TypeError, (TypeError,), 3)])
def test_a_bug_is_not_retried_unless_it_is_named(recovery, optimizer, session, error,
                                                 retry_on, attempts):
    call, calls = flaky(9, error)
    with pytest.raises(error):
        recovery.retry_with_tracking(optimizer, session.id, retry_on=retry_on,
                                     sleep=lambda seconds: None)(call)(1)
    (told,) = events_of(optimizer, session.id, EventType.ERROR)
    assert ((len(calls), told.data["recovery_strategy"])
            == (attempts, "retry" if attempts > 1 else "none"))


def test_success_at_once_logs_nothing_and_the_name_stays(recovery, optimizer, session):
    call, _ = flaky(0)
    tracked = recovery.retry_with_tracking(optimizer, session.id)(call)
    assert tracked(1) == 2 and tracked.__name__ == "call"
    assert not events_of(optimizer, session.id, EventType.ERROR)


def test_tracking_and_fallback(recovery, optimizer, session):
    call, _ = flaky(9, KeyError)
    with pytest.raises(KeyError):
        recovery.with_session_tracking(optimizer, session.id)(call)(1)
    assert recovery.with_session_tracking(optimizer, session.id,
                                          fallback=lambda error: "spare")(call)(1) == "spare"
    with pytest.raises(ZeroDivisionError):
        recovery.with_session_tracking(optimizer, session.id, fallback=lambda error: 1 / 0)(call)(1)
    assert [
        (e.data["recovery_strategy"], e.data["recovered"])
        for e in events_of(optimizer, session.id, EventType.ERROR)
    ] == [("none", False), ("fallback", True), ("fallback", False)]


@pytest.mark.parametrize(
    "fails, options, status, runs, strategies",
    [
        (2, [], 0, 3, [("retry", True)]),
        (9, ["--attempts", "2"], 7, 2, [("retry", False)]),
        (9, ["--on-status", "75"], 7, 1, [("none", False)]),
        (1, ["--on-status", "7"], 0, 2, [("retry", True)]),
        (0, [], 0, 1, []),
    ],
)
def test_a_command_is_run_again_until_it_works(recovery, tmp_path, optimizer, fails, options,
                                               status, runs, strategies):
    script = (f"echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -gt {fails} ] || {{ echo "
              f"no luck >&2; exit 7; }}")
    store = ["--store", tmp_path / "store"]
    assert (run("error_recovery", *options, "--wait", "0.01", *store, "--", "sh", "-c", script)[0]
            == status)
    assert len((tmp_path / "runs").read_text().split()) == runs
    (session,) = optimizer.list_sessions()
    assert session.status is (SessionStatus.FAILED if status else SessionStatus.COMPLETED)
    told = events_of(optimizer, session.id, EventType.ERROR)
    assert ([(event.data["recovery_strategy"], event.data["recovered"]) for event in told]
            == strategies)
    assert all("no luck" in event.data["message"] for event in told)
    assert run("error_recovery", *store, "--session", "last", "--", "sh", "-c", "exit 0")[0] == 0
    assert run("error_recovery", *store, "--session", "nobody", "--", "true")[0] == 1
    assert run("error_recovery", *store, "--", "/no/such/command")[0] == 1


# ---- Message bus ----


def wasteful(optimizer, session_id, reads):
    """Reads one file again and again: with 1,000 more tokens,
    the score is 100 * 2 / (1 + reads)."""
    for _ in range(reads):
        optimizer.log_event(session_id, EventType.FILE_READ, {"file_path": "a.py"},
                            tokens_input=1_000)
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
    assert (alert["priority"] == "HIGH" and "40.0%" in alert["text"]
            and alert["session_id"] == session.id)
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
    assert ([json.loads(line)["priority"] for line in path.read_text(encoding="utf-8").splitlines()]
            == ["LOW", "LOW"])
    assert not bus.send_session_summary(optimizer, "nobody", bus.bus_to(str(path)))


def test_on_a_crews_bus_an_alert_is_a_note_to_the_worker_and_comes_once(
        optimizer, session, tmp_path):
    worker = optimizer.start_session("FORGE", "Crew", session_id="crewed",
                                     metadata={"crew_agent": "forge-2"})
    for one in (session, worker):
        wasteful(optimizer, one.id, 4)
    for _ in range(2):
        status, _, errors = run("message_bus_alerts", "--store", tmp_path / "store", "--to",
                                f"bus:{tmp_path}/queue.db")
        assert (status, "2 of 2 sessions told" in errors) == (0, True)
    with open_bus(str(tmp_path / "queue.db")) as queue:
        (for_all,) = queue.receive("forge-1")
        mine = queue.receive("forge-2")
    assert for_all.to == "*" and [message.to for message in mine] == ["*", "forge-2"]
    assert all("Low efficiency" in message.body and message.priority == 90 for message in mine)


def test_alerts_of_the_sessions_in_a_store(optimizer, session, tmp_path):
    wasteful(optimizer, session.id, 4)
    store = ["--store", tmp_path / "store"]
    status, output, errors = run("message_bus_alerts", *store, "--summary")
    assert ((status, errors) == (0, "2 messages sent\n")
            and "[HIGH] Low efficiency: FORGE" in output and "[LOW]" in output)
    assert (run("message_bus_alerts", *store, "--since", "2999-01-01")[1:]
            == ("", "0 of 0 sessions told\n"))
    assert run("message_bus_alerts", *store, "--session", session.id, "--threshold", "10")[1] == ""
    for wrong in (["--to", tmp_path / "no" / "such" / "file"], ["--since", "soon"],
                  ["--to", "ftp://example.com/x"], ["--to", f"bus:{tmp_path}/store/sessions"]):
        status, _, errors = run("message_bus_alerts", *store, *wrong)
        assert status == 1 and "not sent" in errors


# ---- All programs ----


@pytest.mark.parametrize("path", sorted(Path(agent_health.__file__).parent.glob("*.py")),
                         ids=lambda path: path.name)
def test_programs_use_public_names_alone(path):
    """Of the module, so that they can be copied and go on working."""
    if path.name.startswith("test_"):
        pytest.skip("tests may look inside")
    tree, used, called = ast.parse(path.read_text(encoding="utf-8")), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            called |= {each.asname or each.name for each in node.names
                       if each.name == "sessionoptimizer"}
        elif isinstance(node, ast.ImportFrom) and node.module == "sessionoptimizer":
            used |= {each.name for each in node.names}
    used |= {node.attr for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
             and node.value.id in called}
    assert {name for name in used if not name.startswith("__")} <= set(sessionoptimizer.__all__)


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


def test_metrics_of_a_session(optimizer, session):
    wasteful(optimizer, session.id, 2)
    optimizer.log_event(session.id, EventType.ERROR, {"message": "x"})
    metrics = agent_health.session_metrics(optimizer, session.id)
    assert ((metrics["agent"], metrics["waste_tokens"], metrics["error_rate"])
            == ("FORGE", 1_000, 20.0))
    assert agent_health.session_metrics(optimizer, "nobody") is None
    assert agent_health.health_summary(optimizer, "FORGE")["status"] == "CRITICAL"
    assert agent_health.health_summary(optimizer, "NOBODY")["status"] == "UNKNOWN"


def test_the_health_of_all_agents_and_of_a_crews_workers(optimizer, session, tmp_path):
    store = ["--store", tmp_path / "store"]
    wasteful(optimizer, session.id, 1)
    assert (run("agent_health", *store)[:2]
            == (0, "FORGE: HEALTHY, 1 session in 7 days, efficiency 100.0%, "
                   "trend insufficient_data\n"))
    with open_bus(str(tmp_path / "queue.db"), lease_seconds=0.05) as queue:
        for name in ("a", "b", "c", "d"):
            queue.submit(Task(name, name, max_attempts=1))
        queue.claim("dead")
        time.sleep(0.1)
        queue.complete(queue.claim("fit"), 1)
        queue.fail(queue.claim("weak"), "tests: no")
        assert queue.claim("fit").task.id == "d"
    status, output, _ = run("agent_health", *store, "--queue", tmp_path / "queue.db",
                            "--format", "json")
    workers = {row["agent"]: (row["status"], row["done"], row["holds"])
               for row in json.loads(output)["workers"]}
    assert workers == {"dead": ("CRITICAL", 0, []), "fit": ("HEALTHY", 1, ["d"]),
                       "weak": ("WARNING", 0, [])}
    assert status == 3 and run("agent_health", *store, "--queue", tmp_path / "nothing.db")[0] == 1
    assert not (tmp_path / "nothing.db").exists()


# ---- Collaboration ----


def test_agents_of_different_processes_share_one_collaboration(tmp_path):
    def join(collab_id, agent, role):
        collab = collaboration.Collaboration(SessionOptimizer(str(tmp_path)), "Task", None,
                                             collab_id=collab_id)
        collab.join(agent, role)
        return collab

    first, second, other = (join("c1", "A", "planner"), join("c1", "B", "builder"),
                            join("c2", "C", "builder"))
    for collab, agent, reads in ((first, "A", 1), (second, "B", 3), (other, "C", 1)):
        for _ in range(reads):
            collab.log(agent, EventType.FILE_READ, {"file_path": "a.py"}, tokens_input=1_000)
    first.finish()
    result = second.finish()
    assert ((result["total_tokens"], result["waste_tokens"], result["combined_efficiency"])
            == (4_000, 2_000, 50.0))
    assert [row["agent"] for row in result["agents"].values()] == ["A", "B"]
    assert result["shared_files"] == ["a.py"]
    status, output, _ = run("collaboration", "c1", "--store", tmp_path)
    assert status == 0 and "together" in output and "read by more than one agent: a.py" in output
    assert ([line.split()[0] for line in run("collaboration", "--store", tmp_path)[1].splitlines()]
            == ["c1", "c2"])
    assert json.loads(run("collaboration", "c1", "--store", tmp_path, "--format",
                          "json")[1])["agents"] == result["agents"]
    assert run("collaboration", "c3", "--store", tmp_path)[0] == 1


def test_a_handoff_reaches_another_process_once_and_costs_its_receiver(optimizer, tmp_path):
    with open_bus(str(tmp_path / "queue.db")) as here, open_bus(
            str(tmp_path / "queue.db")) as there:
        sender = collaboration.Collaboration(optimizer, "Task", here, collab_id="c1")
        receiver = collaboration.Collaboration(SessionOptimizer(str(tmp_path / "store")), "Task",
                                               there, collab_id="c1")
        one, two = sender.join("A", "planner"), receiver.join("B", "builder")
        there.send("X", "B", "a note of another kind")
        sender.handoff("A", "B", "x" * 400)
        assert (receiver.take_over("B", wait=5) == [("A", "x" * 400)]
                and receiver.take_over("B") == [])
    assert (one.total_tokens, two.total_tokens) == (0, 100)
    assert one.metadata["collab_id"] == two.metadata["collab_id"] == "c1"
    assert (one.events[-1].data["type"] == "handoff_out"
            and two.events[-1].data["type"] == "handoff_in")


# ---- Priority queue ----


def test_the_most_urgent_command_first_with_a_session_each(optimizer, tmp_path):
    queue, store, log = tmp_path / "queue.db", tmp_path / "store", tmp_path / "log"
    script = [sys.executable, "-c",
              ("import os, sys; sys.path.insert(0, sys.argv[1]); from sessionoptimizer import *; "
               "SessionOptimizer().log_event(os.environ['SESSIONOPTIMIZER_SESSION'], "
               "'AI_RESPONSE', tokens_output=10); open(sys.argv[2], 'a').write(sys.argv[3]); "
               "sys.exit(sys.argv[3] == 'b')"), ROOT, log]
    for name, priority, more in (("a", 1, []), ("b", 9, ["--attempts", "1"]), ("c", 9, []),
                                 ("d", 5, ["--after", "c"]), ("e", 7, ["--requires", "gpu"])):
        assert run("priority_queue", "add", queue, name, "--priority", priority, *more, "--",
                   *script, name)[0] == 0
    assert run("priority_queue", "add", queue, "x", "--after", "nothing", "--", "true")[0] == 1
    status, output, _ = run("priority_queue", "work", queue, "--as", "w1", "--store", store)
    assert (status, log.read_text()) == (3, "bcda")
    assert "priority 9: 1 of 2 runs succeeded, 20 tokens" in output
    assert "READY      7 e" in run("priority_queue", "list", queue)[1]
    assert (run("priority_queue", "work", queue, "--can", "gpu", "--store", store)[0] == 3
            and log.read_text() == "bcdae")
    by_task = {session.metadata["task_id"]: session for session in optimizer.list_sessions()}
    assert (sorted(by_task) == list("abcde")
            and {session.total_tokens for session in by_task.values()} == {10})
    assert ([name for name, session in by_task.items() if session.status is SessionStatus.FAILED]
            == ["b"])


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
        assert ([i.issue_type.value for i in optimizer.analyze(session.id).issues]
                == ["REPEATED_SEARCH"])
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
        monitor.check(SessionOptimizer(str(optimizer.storage_path)), sent.append) == []
        and len(sent) == count
    )
    for _ in range(40):
        optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=1_000)
    assert "LOW_EFFICIENCY" not in str(monitor.check(optimizer, sent.append))
    for _ in range(80):
        optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "a.py"},
                            tokens_input=1_000)
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
    large = optimizer.start_session("forge", "Much waste, more work", session_id="large")
    wasteful(optimizer, large.id, 9)
    for _ in range(40):
        optimizer.log_event(large.id, EventType.AI_RESPONSE, tokens_output=1_000)
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
        assert run("monitor", "--store", optimizer.storage_path, "--to", path, "--level",
                   "high")[0] == 0
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
    assert (suites.tag == "testsuites"
            and len(cases) == len(result["sessions"]) == int(suite.get("tests")))
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
        counts.append(
            int(ElementTree.parse(str(tmp_path / "report.xml")).getroot().get("failures")))
    assert counts[0] == 0 < counts[1] < counts[2]
    assert run("ci_report", path, "--strict")[0] == 3
    assert run("ci_report", path, "--strict", "--level", "CRITICAL")[0] == 0
    assert run("ci_report", path, "--level", "LOUD")[0] == 2


def test_whatever_is_in_a_session_the_report_is_xml(scan_json):
    result = json.loads(scan_json)
    row = next(
        row for row in result["sessions"]
        if any(issue["severity"] == "HIGH" for issue in row["issues"])
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
    assert (float(case.get("time")) == pytest.approx(60 * row["minutes"], abs=0.001)
            and row["minutes"] > 0)
    assert kept in case.find("failure").text and kept in case.find("system-out").text
    assert kept in suite.find("system-err").text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"sessions": 3}', '{"sessions": [{}]}', '{"sessions": [3]}', "\ufeff"]
)
def test_what_is_no_scan_is_named(text, tmp_path, capsys):
    path = tmp_path / "scan.json"
    path.write_text(text, encoding="utf-8")
    assert ci_report.main([str(path)]) == 1
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"ci_report: {path} is not what")


def test_standard_input_that_is_empty_is_named():
    status, output, errors = run("ci_report")
    assert (status == 1 and output == ""
            and errors.startswith("ci_report: standard input is not what"))


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
        "".join(json.dumps(part) + "\n" for part in export_otlp.documents(session, batch)),
        encoding="utf-8"
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
        assert totals(read_back(session, tmp_path / f"{number}.jsonl")) == totals(session), (
            session.metadata["source"
            ]["path"])


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
    assert (back.agent == "FORGE"
            and sum(event.event_type is EventType.ERROR for event in back.events) == 1)


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
        session.id, "FILE_READ", {"file_path": "a.py", "lines": [1, 9]}, tokens_input=500,
        duration_ms=12
    )
    optimizer.log_event(session.id, "AI_RESPONSE", {"response_id": "r1"}, tokens_output=50)
    (first,) = export_otlp.documents(session)
    assert [first] == list(export_otlp.documents(copy.deepcopy(session)))  # the same ids every time
    agent, tool, chat = first["resourceSpans"][0]["scopeSpans"][0]["spans"]
    values = {pair["key"]: pair["value"] for pair in chat["attributes"]}
    assert chat["name"] == "chat opus" and chat["kind"] == 3 and agent["parentSpanId"] == ""
    assert chat["parentSpanId"] == tool["parentSpanId"] == agent["spanId"]
    assert (re.fullmatch("[0-9a-f]{32}", chat["traceId"])
            and re.fullmatch("[0-9a-f]{16}", chat["spanId"]))
    assert (values["gen_ai.usage.input_tokens"] == {"intValue": "500"}
            and values["gen_ai.provider.name"] == {"stringValue": "anthropic"
            })
    assert int(tool["endTimeUnixNano"]) - int(tool["startTimeUnixNano"]) == 12_000_000
    assert agent["name"] == "invoke_agent FORGE" and tool["name"] == "execute_tool read"


def test_the_exporter_as_a_program(optimizer, session, tmp_path, server):
    wasteful(optimizer, session.id, 2)
    place = ["--store", optimizer.storage_path]
    status, output, errors = run("export_otlp", session.id, *place)
    assert (status, errors) == (0, "") and json.loads(output)["resourceSpans"]
    assert run("export_otlp", "last", "--output", tmp_path / "o.jsonl", *place)[0] == 0
    assert (tmp_path / "o.jsonl").read_text(encoding="utf-8") == output
    assert (run("export_otlp", "last", "--endpoint", server.url, "--header", "X-Key=k=1", *place)[0]
            == 0)
    path, headers, body = server.requests[0]
    assert ((path, headers["X-Key"], headers["Content-Type"])
            == ("/v1/traces", "k=1", "application/json"))
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
    b'\xef\xbb\xbf{\n  "a": 1\n}\n',
    ('{"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "say \\u00fc ü"}]}], '
     '"PreToolUse": []}, "x": 1.50}').encode(),
    (b'{"hooks": {"PostToolUse": [{"matcher": "Edit", "hooks": [{"type": "command", "command": '
     b'"fmt"}]}]}}\n'),
]


@pytest.fixture
def settings(home):
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("before", SETTINGS)
@pytest.mark.parametrize("options", [(), ("--guard", "deny", "--status-line")])
def test_install_twice_is_once_and_uninstall_restores(settings, before, options, capsys):
    settings.write_bytes(before)
    assert hooks.main(["--install", *options]) == 0
    once = settings.read_bytes()
    assert hooks.main(["--install", *options]) == 0
    assert settings.read_bytes() == once and "nothing to change" in capsys.readouterr().out
    assert ("claude_code_status.py" in once.decode()) is bool(options)
    assert once.startswith(hooks.BOM) is before.startswith(hooks.BOM)
    found = json.loads(once.decode("utf-8-sig"))["hooks"]
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
                {"matcher": "",
                 "hooks": [{"type": "command", "command": "my-sessionoptimizer-hook"}]}
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
        assert ("nothing written" in output
                and '+    "SessionStart": [' in output.replace('+  "', '+    "'))
    assert (settings.read_bytes() == b'{"model": "opus"}'
            and len(list(settings.parent.iterdir())) == 1)


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
        assert handler.get("async", False) is (event not in ("Stop", "SessionEnd", "PreToolUse"))
    assert found["PreToolUse"]["hooks"][0]["command"].endswith("hook --guard")


@pytest.mark.parametrize(
    "command, ours",
    [
        ("sessionoptimizer hook", True),
        ("/usr/bin/python3 /opt/so/sessionoptimizer.py --store '/a b' hook --guard --deny", True),
        ("python3 -m sessionoptimizer hook", True),
        ('"C:\\x y\\sessionoptimizer.exe" hook', True),
        ("my-sessionoptimizer hook", False),
        ("my sessionoptimizer wrapper hook", False),
        ("sessionoptimizer wrapper hook", False),
        ("env A=1 sessionoptimizer hook", False),
        ("echo 'sessionoptimizer hook'", False),
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
    common = {"session_id": "0b1c", "transcript_path": str(tmp_path / "t.jsonl"),
              "cwd": str(tmp_path)}
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
        event.event_type.value for event in session.events
        if event.event_type is EventType.FILE_READ
    ] == ["FILE_READ"]


def test_the_installer_as_a_program(home):
    status, output, errors = run("claude_code_hooks")
    assert (
        (status, errors) == (0, "") and "--install makes this change" in output
        and list(home.iterdir()) == []
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
    (tmp_path / "labels.json").write_text(json.dumps({"cases": [dict(case, **change(case))]}),
                                          encoding="utf-8")
    assert len(selftest.run_labelled_cases(str(tmp_path))["mistakes"]) == mistakes
    status, out, errors = run("selftest", tmp_path, "--format", "json")
    assert (status, json.loads(out)["wrong"], errors) == (3 if mistakes else 0, mistakes, "")


def test_a_folder_without_labels_is_named(tmp_path):
    status, out, errors = run("selftest", tmp_path / "nowhere")
    assert (status, out) == (1, "") and "labels.json" in errors
