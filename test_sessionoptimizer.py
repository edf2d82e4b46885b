"""The tests of SessionOptimizer, in the order of the module's rooms.

Everything runs in a home of its own below pytest's temporary directory, and warnings are errors. Environment:
SESSIONOPTIMIZER_KILLS=2000 kills that many writing processes instead of 100.
"""
import ast
import doctest
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from datetime import datetime, timedelta, timezone

import pytest

import sessionoptimizer as so
from sessionoptimizer import (DamagedSession, EventType, InvalidSessionId, InvalidValue, IssueType, SessionExists,
                              SessionNotFound, SessionOptimizer, SessionOptimizerError, SessionOptimizerWarning,
                              SessionStatus, Severity, StorageError, Store)

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "sessionoptimizer.py")
SAMPLES = os.path.join(HERE, "examples", "transcripts")
REAL = os.path.join(HERE, "..", "shared", "data", "transcripts")
KILLS = int(os.environ.get("SESSIONOPTIMIZER_KILLS", "100"))

pytestmark = pytest.mark.filterwarnings("error")
posix_only = pytest.mark.skipif(os.name == "nt", reason="signals, permissions and limits of POSIX")
fork = multiprocessing.get_context("fork") if os.name == "posix" else None


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home directory of the test's own, where nothing of this machine is seen."""
    place = tmp_path / "home"
    place.mkdir()
    for name in list(os.environ):
        if name.startswith(("SESSIONOPTIMIZER_", "CLAUDE_", "CODEX_", "GEMINI_")) and name != "SESSIONOPTIMIZER_KILLS":
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(place))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(so, "_default_optimizer", None)
    return place


@pytest.fixture
def optimizer(tmp_path):
    return SessionOptimizer(str(tmp_path / "store"))


@pytest.fixture
def utc(monkeypatch):
    """Local time is UTC."""
    set_zone(monkeypatch, "UTC")
    yield
    monkeypatch.undo()
    getattr(time, "tzset", int)()


def set_zone(monkeypatch, name):
    if not hasattr(time, "tzset"):
        pytest.skip("no time zones to switch here")
    monkeypatch.setenv("TZ", name)
    time.tzset()


def E(_kind, _in=0, _out=0, *, _at=None, _agent="", _model="", _ms=0, _write=0, _hour=0, _read=0, **data):
    """An event; ``_at`` in minutes after 10:00 UTC; the keywords without underscore are its data."""
    stamp = "" if _at is None else (datetime(2026, 3, 1, 10, tzinfo=timezone.utc) + timedelta(minutes=_at)).isoformat()
    return so.SessionEvent("", stamp, EventType[_kind], data, _in, _out, _ms, _write, _hour, _read, _model, _agent)


def session_of(*events, model="opus", **metadata):
    """A session of these events, whose ids are e1, e2, ..."""
    session = so.Session("s", "FORGE", "a task", SessionStatus.COMPLETED, "2026-03-01T10:00:00+00:00",
                         "2026-03-01T10:10:00+00:00", model=model, metadata=metadata)
    for number, event in enumerate(events, 1):
        event.id = event.id or "e%d" % number
        session.add_event(event)
    return session


def read_of(path="a.py", tokens=1000, **data):
    return E("FILE_READ", tokens, file_path=path, **data)


def stored_bytes(folder):
    """Everything a store holds, file names included."""
    parts = []
    for place, folders, names in os.walk(str(folder)):
        for name in names:
            path = os.path.join(place, name)
            parts.append(os.path.relpath(path, str(folder)).encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
                parts.append(file.read())
    return b"\n".join(parts)


def python(*args, stdin="", **environment):
    """Run this interpreter; (status, standard output, standard error)."""
    env = dict(os.environ, PYTHONIOENCODING="utf-8", **environment)
    done = subprocess.run([sys.executable] + list(args), input=stdin.encode("utf-8"), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=env)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def command(*args, stdin="", **environment):
    """Run the command line as its own process."""
    return python(MODULE, *args, stdin=stdin, **environment)


def write(path, data):
    with open(str(path), "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode("utf-8"))
    return str(path)


def read(path):
    with open(str(path), "rb") as file:
        return file.read()


# ======================================================================================================
# Vocabulary
# ======================================================================================================

def names(enum):
    return " ".join(member.name for member in enum)


def test_the_words_are_those_of_the_contract():
    assert names(SessionStatus) == "ACTIVE COMPLETED FAILED ABANDONED"
    assert names(EventType) == ("SESSION_START SESSION_END TOOL_CALL TOKEN_USAGE FILE_READ FILE_WRITE SEARCH ERROR "
                                "USER_MESSAGE AI_RESPONSE CONTEXT_LOAD THINKING CUSTOM")
    assert names(IssueType) == ("REPEATED_FILE_READ REPEATED_SEARCH LARGE_FILE_UNCOMPRESSED EXCESSIVE_THINKING "
                                "UNUSED_CONTEXT FAILED_RETRY CIRCULAR_SEARCH LONG_SESSION HIGH_ERROR_RATE "
                                "INEFFICIENT_TOOL_USE TOKEN_SPIKE CONTEXT_OVERFLOW")
    assert names(Severity) == "LOW MEDIUM HIGH CRITICAL"
    for enum in (SessionStatus, EventType, IssueType, Severity):
        assert all(member.value == member.name for member in enum)


def test_severities_are_ordered():
    shuffled = [Severity.HIGH, Severity.LOW, Severity.CRITICAL, Severity.MEDIUM]
    assert sorted(shuffled) == list(Severity) and max(shuffled) is Severity.CRITICAL
    assert Severity.LOW < Severity.MEDIUM <= Severity.MEDIUM and Severity.HIGH > Severity.MEDIUM >= Severity.LOW
    assert not Severity.HIGH < Severity.HIGH and [member.rank for member in Severity] == [0, 1, 2, 3]
    with pytest.raises(TypeError):
        Severity.LOW < "HIGH"


def test_kinds_without_a_built_in_analyzer_are_said_to_be_for_the_users():
    built_in = {cls.issue_type for cls in so.BUILT_IN_ANALYZERS}
    for kind in set(IssueType) - built_in:
        assert kind.name in IssueType.__doc__


# ======================================================================================================
# Prices
# ======================================================================================================

# USD per 1,000 tokens: input, output, cache read, 5-minute write, 1-hour write. Written down from the vendors' lists.
PRICES = [
    ("opus", (0.015, 0.075, 0.0015, 0.01875, 0.030), True),
    ("sonnet", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("gpt4", (0.010, 0.030, 0.010, 0.010, 0.010), True),
    ("gemini", (0.00025, 0.0005, 0.00025, 0.00025, 0.00025), True),
    ("grok", (0, 0, 0, 0, 0), True),
    ("default", (0.010, 0.030, 0.001, 0.0125, 0.020), True),
    ("OPUS", (0.015, 0.075, 0.0015, 0.01875, 0.030), True),
    ("claude-opus-4-5-20251101", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("claude-opus-4-20250514", (0.015, 0.075, 0.0015, 0.01875, 0.030), True),
    ("claude-opus-4-1-20250805", (0.015, 0.075, 0.0015, 0.01875, 0.030), True),
    ("claude-sonnet-4-5-20250929", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("claude-sonnet-4-20250514", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("claude-haiku-4-5-20251001", (0.001, 0.005, 0.0001, 0.00125, 0.002), True),
    ("anthropic/claude-opus-4-5", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("us.anthropic.claude-opus-4-5-20251101-v1:0", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("anthropic.claude-opus-4-5-20251101-v1:0", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("claude-opus-4-5@20251101", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("openrouter/anthropic/claude-opus-4-5", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("gpt-5", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), True),
    ("openai/gpt-5-2025-08-07", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), True),
    ("gpt-5.1-codex", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), True),
    ("gpt-5.1-codex-mini", (0.00025, 0.002, 0.000025, 0.00025, 0.00025), True),
    ("gpt-5-mini", (0.00025, 0.002, 0.000025, 0.00025, 0.00025), True),
    ("gemini-3.1-pro-preview", (0.002, 0.012, 0.0002, 0.002, 0.002), True),
    ("gemini-2.5-pro", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), True),
    # a family or the default stands in
    ("gpt-5-new-thing", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), False),
    ("gpt-5.1-codex-experimental", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), False),
    ("claude-opus-4-5-turbo", (0.005, 0.025, 0.0005, 0.00625, 0.010), False),
    ("gpt-5.7", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("gpt-55", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("opus-4", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("sonnet2", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("my-own-model", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("-", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
]


@pytest.mark.parametrize("model, figures, exact", PRICES, ids=[row[0] for row in PRICES])
def test_price_of_a_model(model, figures, exact):
    price = so.PriceList().lookup(model)
    assert tuple(price[1:6]) == pytest.approx(figures, abs=1e-12) and price.exact is exact


def test_the_published_example_costs_what_it_says():
    session = session_of(E("AI_RESPONSE", 10_000, 5_000), model="opus")
    assert "%.4f" % session.estimated_cost == "0.5250"
    totals = so.Session("s", "A", "t", total_tokens_input=10_000, total_tokens_output=5_000, model="opus")
    assert "%.4f" % totals.estimated_cost == "0.5250"
    assert session_of(E("AI_RESPONSE", 10_000, 5_000), model="grok").estimated_cost == 0


def test_every_price_class_is_billed_at_its_own_price():
    # 1,000 plain at 0.015, 2,000 five-minute writes at 0.01875, 3,000 one-hour writes at 0.030, 40,000 read at 0.0015,
    # 500 written at 0.075: 0.015 + 0.0375 + 0.090 + 0.060 + 0.0375
    event = E("AI_RESPONSE", 6_000, 500, _write=5_000, _hour=3_000, _read=40_000)
    assert session_of(event, model="opus").estimated_cost == pytest.approx(0.24)
    # an event of another model is billed as that one: 1,000 at 0.001 and 1,000 out at 0.005
    other = E("AI_RESPONSE", 1_000, 1_000, _model="claude-haiku-4-5")
    assert session_of(event, other, model="opus").estimated_cost == pytest.approx(0.24 + 0.006)


def own_prices(optimizer, value):
    os.makedirs(optimizer.store.root, exist_ok=True)
    write(os.path.join(optimizer.store.root, "prices.json"), json.dumps(value) if not isinstance(value, bytes) else value)
    return SessionOptimizer(optimizer.store.root)


def test_prices_of_the_user_come_first(optimizer):
    optimizer = own_prices(optimizer, {
        "sample_spec": {"input_cost_per_token": "a text"},
        "my-model": {"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06, "mode": "chat"},
        "opus": {"input_cost_per_token": 4e-06, "output_cost_per_token": 8e-06, "cache_read_input_token_cost": 1e-06},
        "gpt-5.7": {"input_cost_per_token": 3e-06, "output_cost_per_token": 0,
                    "cache_creation_input_token_cost": 5e-06, "cache_creation_input_token_cost_above_1hr": 6e-06},
        "an-embedding": {"output_vector_size": 3}})
    for model, cost in (("my-model", 1.0 + 2.0), ("my-model-2026-01-01", 3.0), ("opus", 4.0 + 8.0), ("gpt-5.7", 3.0),
                        ("sonnet", 3.0 + 15.0), ("an-embedding", 10.0 + 30.0)):
        session = optimizer.start_session("a", "t", model=model)
        optimizer.log_event(session.id, "AI_RESPONSE", tokens_input=1_000_000, tokens_output=1_000_000)
        assert session.estimated_cost == pytest.approx(cost), model
    price = optimizer.prices.lookup("gpt-5.7")
    assert tuple(price[1:6]) == pytest.approx((0.003, 0, 0.003, 0.005, 0.006)) and price.exact


@pytest.mark.parametrize("content", [
    b"[]", b"{", b"\xff", b"1", {"m": {"input_cost_per_token": "0.1"}}, {"m": {"input_cost_per_token": -1}},
    {"m": {"input_cost_per_token": True}}, {"m": {"input_cost_per_token": 1e300}},
    b'{"m": {"input_cost_per_token": NaN}}'], ids=str)
def test_prices_that_cannot_be_used_are_named(optimizer, content):
    with pytest.raises(InvalidValue, match="price"):
        own_prices(optimizer, content).start_session("a", "t")


def test_a_price_that_had_to_be_guessed_is_reported(optimizer):
    for model, note in (("gpt-5.7", "priced as default"), ("gpt-5-turbo", "priced as gpt-5"), ("my-own", "priced as default"),
                        ("claude-opus-4-5-20251101", None), ("opus", None), ("default", None)):
        session = optimizer.start_session("a", "t", model=model)
        report = optimizer.analyze(session.id)
        assert [model in text and note in text for text in report.notes] == ([True] if note else []), model
        assert (note or "a score") in optimizer.export_report(session.id, "text") or note is None


# ======================================================================================================
# Errors
# ======================================================================================================

def test_errors_have_one_base_and_keep_the_built_in_ones():
    for cls, also in ((InvalidValue, ValueError), (InvalidSessionId, InvalidValue), (SessionExists, Exception),
                      (SessionNotFound, LookupError), (StorageError, Exception), (DamagedSession, StorageError)):
        assert issubclass(cls, SessionOptimizerError) and issubclass(cls, also)
    assert issubclass(SessionOptimizerWarning, UserWarning)


def test_errors_travel_and_print():
    error = pickle.loads(pickle.dumps(StorageError("/x\x1b[31m", "reason", "remedy")))
    assert str(error) == "/x\\x1b[31m: reason; remedy" and error.path == "/x\x1b[31m"


def test_no_broad_except_but_the_one_around_a_users_analyzer():
    tree = ast.parse(read(MODULE))
    broad = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)
             and (node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException"))]
    around = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
              and any(handler in ast.walk(node) for handler in broad)]
    assert around == ["build_report"]


# ======================================================================================================
# Records
# ======================================================================================================

WHOLE_SESSION = {
    "id": "s", "agent": "FORGE", "task": "a task", "status": "FAILED", "started_at": "2026-03-01T10:00:00+00:00",
    "ended_at": "2026-03-01T11:00:00+00:00", "model": "opus", "metadata": {"k": [1, {"a": "é\n"}]},
    "total_tokens_input": 130, "total_tokens_output": 7, "total_duration_ms": 9,
    "events": [
        {"id": "e1", "timestamp": "2026-03-01T10:00:01+00:00", "event_type": "FILE_READ", "data": {"file_path": "a"},
         "tokens_input": 100, "tokens_output": 5, "duration_ms": 9},
        {"id": "e2", "timestamp": "", "event_type": "AI_RESPONSE", "data": {}, "tokens_input": 30, "tokens_output": 2,
         "duration_ms": 0, "tokens_cache_write": 20, "tokens_cache_write_1h": 10, "tokens_cache_read": 50,
         "model": "sonnet", "agent_id": "sub"}]}


def test_a_session_survives_a_round_trip():
    session = so.Session.from_dict(WHOLE_SESSION)
    assert session.to_dict() == WHOLE_SESSION == json.loads(json.dumps(session.to_dict()))
    assert (session.status, session.total_tokens, session.events[0].tokens) == (SessionStatus.FAILED, 137, 105)
    assert session.events[1].event_type is EventType.AI_RESPONSE and session.events[1].agent_id == "sub"


def test_fields_that_are_empty_are_left_out_of_an_event():
    assert sorted(E("CUSTOM").to_dict()) == ["data", "duration_ms", "event_type", "id", "timestamp", "tokens_input",
                                             "tokens_output"]


def test_unknown_keys_are_ignored_and_totals_recomputed():
    extended = json.loads(json.dumps(WHOLE_SESSION))
    extended.update(tags=[1], total_tokens_input=99, total_tokens_output=99, total_duration_ms=99, event_count=50)
    extended["events"][0]["later"] = {"x": 1}
    assert so.Session.from_dict(extended).to_dict() == WHOLE_SESSION


def test_totals_of_a_session_without_events_are_kept():
    session = so.Session.from_dict({"id": "s", "agent": "A", "task": "t", "total_tokens_input": 1_000,
                                    "total_tokens_output": 500, "total_duration_ms": 60_000})
    assert (session.total_tokens, session.duration_seconds, session.status) == (1_500, 60.0, SessionStatus.ACTIVE)
    assert so.Session.from_dict(session.to_dict()).to_dict() == session.to_dict()
    direct = so.Session("s", "A", "t")
    direct.total_tokens_input = 7
    assert direct.total_tokens == 7 and direct.started_at and direct.model == "default"


@pytest.mark.parametrize("change, says", [
    ({"status": "DONE"}, "DONE.*ACTIVE, COMPLETED"), ({"metadata": []}, "metadata.*list"), ({"events": {}}, "events.*dict"),
    ({"events": [1]}, "int"), ({"events": [{}]}, "id and an event_type"), ({"events": [{"id": "x"}]}, "event_type"),
    ({"events": [{"id": "x", "event_type": "NAP"}]}, "FILE_READ"), ({"events": [{"event_type": "CUSTOM"}]}, "id"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "data": []}]}, "data.*list"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_input": -1}]}, "tokens_input.*-1"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_output": "5"}]}, "tokens_output.*'5'"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_cache_read": 1.5}]}, "tokens_cache_read.*1.5"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "duration_ms": True}]}, "duration_ms.*True"),
    ({"events": [{"id": "x", "event_type": []}]}, "event"),
    ({"events": [], "total_tokens_input": -5}, "total_tokens_input.*-5")])
def test_bad_values_are_named(change, says):
    with pytest.raises(InvalidValue, match=says):
        so.Session.from_dict(dict(WHOLE_SESSION, **change))


@pytest.mark.parametrize("data", [None, [], "x", 1, {}, {"id": "s", "agent": "A"}])
def test_what_is_no_session_is_refused(data):
    with pytest.raises(InvalidValue, match="id, agent and task|needs id"):
        so.Session.from_dict(data)


def test_issue_and_report_survive_a_round_trip():
    session = session_of(read_of(), read_of(), read_of())
    report = so.build_report(session, [so.RepeatedFileReadAnalyzer()])
    stored = json.loads(json.dumps(report.to_dict()))
    again = so.OptimizationReport.from_dict(dict(stored, later=1))
    assert json.loads(json.dumps(again.to_dict())) == stored
    assert again.issues[0].issue_type is IssueType.REPEATED_FILE_READ and again.issues[0].severity is Severity.HIGH
    for key in ("id", "issue_type", "severity", "description", "suggestion", "estimated_waste_tokens",
                "estimated_waste_cost", "events_involved", "metadata"):
        assert key in stored["issues"][0]
    for key in ("session_id", "generated_at", "issues", "total_waste_tokens", "total_waste_cost", "efficiency_score",
                "recommendations", "token_breakdown", "comparisons"):
        assert key in stored
    for cls, bad in ((so.EfficiencyIssue, {"id": "x"}), (so.EfficiencyIssue, dict(stored["issues"][0], severity="HUGE")),
                     (so.OptimizationReport, {}), (so.OptimizationReport, {"issues": [1]})):
        with pytest.raises(InvalidValue, match="not an? "):
            cls.from_dict(bad)


TIMES = [
    ("2026-03-01T10:00:00Z", 1772359200), ("2026-03-01T10:00:00z", 1772359200), ("2026-03-01 10:00:00+00:00", 1772359200),
    ("2026-03-01T12:30:00+02:30", 1772359200), ("2026-03-01T05:00:00-0500", 1772359200), ("2026-03-01T10:00Z", 1772359200),
    ("2026-03-01T10:00:00.5Z", 1772359200.5), ("2026-03-01T10:00:00,25Z", 1772359200.25),
    ("2026-03-01T10:00:00.123456Z", 1772359200.123456), ("2026-03-01T10:00:00.123456789Z", 1772359200.123456),
    ("0001-01-01T00:00:00Z", -62135596800), ("9999-12-31T23:59:59Z", 253402300799),
    ("", None), (None, None), ("soon", None), ("2026-13-01T10:00:00Z", None), ("2026-02-30", None), (5, None), ([], None),
    ("2026-03-01T25:00:00Z", None), ("2026-03-01T10:00:00+99:00", None), ("2026-03-01T10:00:00Z; rm", None)]


@pytest.mark.parametrize("text, seconds", TIMES, ids=str)
def test_times_in_every_spelling(text, seconds):
    assert so.seconds_of(text) == seconds
    moment = so.parse_time(text)
    assert moment is None or moment.tzinfo is not None


def test_times_without_a_zone_are_local(monkeypatch):
    set_zone(monkeypatch, "UTC-2")  # two hours ahead of UTC
    try:
        assert so.seconds_of("2026-03-01T12:00:00") == 1772359200 == so.seconds_of("2026-03-01T12:00:00.000")
        assert so.seconds_of("2026-03-01") == 1772359200 - 12 * 3600
        assert so.now_text().endswith("+02:00") and abs(so.seconds_of(so.now_text()) - time.time()) < 60
        for text in ("0001-01-01T00:00:00", "9999-12-31T23:59:59", "0001-01-01", "9999-12-31"):
            assert so.parse_time(text).year in (1, 9999)
            assert isinstance(so.seconds_of(text), float)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_hour_that_comes_twice_is_not_an_hour_of_work(monkeypatch):
    """Clocks went back between 02:55 summer time and 02:05 winter time: ten minutes passed."""
    session = session_of(E("CUSTOM"), E("CUSTOM"))
    session.events[0].timestamp, session.events[1].timestamp = "2026-10-25T02:55:00+02:00", "2026-10-25T02:05:00+01:00"
    assert session.duration_seconds == 600


DURATIONS = [  # minutes of the events, seconds
    ([0, 5, 10], 600), ([0, 10], 600), ([0, 10.01], 0), ([0, 5, 60, 65], 600), ([5, 0, 3], 300), ([0], 0), ([], 600), ([0, 0, 0], 0)]


@pytest.mark.parametrize("minutes, seconds", DURATIONS, ids=str)
def test_active_time_leaves_out_the_gaps(minutes, seconds):
    assert session_of(*[E("CUSTOM", _at=at) for at in minutes]).duration_seconds == pytest.approx(seconds)


def test_durations_of_the_caller_count_but_not_those_of_parallel_calls_in_transcripts():
    events = [E("TOOL_CALL", _at=0, _ms=300_000), E("TOOL_CALL", _at=1, _ms=600_000)]
    assert session_of(*events).duration_seconds == 900
    assert session_of(*events, source={"path": "x"}).duration_seconds == 60
    assert session_of(E("CUSTOM"), E("CUSTOM", _at=3), E("CUSTOM")).duration_seconds == 0
    backwards = session_of()
    backwards.started_at, backwards.ended_at = backwards.ended_at, backwards.started_at
    assert backwards.duration_seconds == 0


def test_windows_belong_to_one_agent_and_end_at_compactions():
    compact = dict(source="compaction")
    session = session_of(E("USER_MESSAGE"), E("CUSTOM", _agent="b"), E("AI_RESPONSE"), E("CONTEXT_LOAD", **compact),
                         E("AI_RESPONSE"), E("CUSTOM", _agent="b"), E("CONTEXT_LOAD", _agent="b", **compact),
                         E("CONTEXT_LOAD", source="system"))
    windows = sorted([event.id for event in window] for window in session.windows())
    assert windows == [["e1", "e3"], ["e2", "e6"], ["e4", "e5", "e8"], ["e7"]]
    assert list(session_of().windows()) == []
