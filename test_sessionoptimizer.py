"""The tests of SessionOptimizer, in the order of the module's rooms.

Everything runs in a home of its own below pytest's temporary directory, and warnings are errors.
Environment: SESSIONOPTIMIZER_KILLS=2000 kills that many writing processes instead of 100.
"""
import ast
import copy
import csv
import dataclasses
import doctest
import errno
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
import tracemalloc
import warnings
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser

import pytest

import sessionoptimizer as so
from sessionoptimizer import (
    DamagedSession, EventType, InvalidSessionId, InvalidValue, IssueType, SessionExists,
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
def home(tmp_path_factory, monkeypatch):
    """A home directory of the test's own, where nothing of this machine is seen."""
    place = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if (name.startswith(("SESSIONOPTIMIZER_", "CLAUDE_", "CODEX_", "GEMINI_"))
                and name != "SESSIONOPTIMIZER_KILLS"):
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


def E(_kind, _in=0, _out=0, *, _at=None, _agent="", _model="", _ms=0, _write=0, _hour=0,
      _read=0, **data):
    """An event; ``_at`` in minutes after 10:00 UTC;
    the keywords without underscore are its data."""
    stamp = "" if _at is None else (datetime(2026, 3, 1, 10, tzinfo=timezone.utc)
                                    + timedelta(minutes=_at)).isoformat()
    return so.SessionEvent("", stamp, EventType[_kind], data, _in, _out, _ms, _write, _hour, _read,
                           _model, _agent)


def session_of(*events, model="opus", **metadata):
    """A session of these events, whose ids are e1, e2, ..."""
    session = so.Session("s", "FORGE", "a task", SessionStatus.COMPLETED,
                         "2026-03-01T10:00:00+00:00",
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
    for place, _, names in os.walk(str(folder)):
        for name in names:
            path = os.path.join(place, name)
            parts.append(os.path.relpath(path, str(folder)).encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
                parts.append(file.read())
    return b"\n".join(parts)


def python(*args, stdin="", **environment):
    """Run this interpreter; (status, standard output, standard error)."""
    env = dict(os.environ, PYTHONIOENCODING="utf-8", **environment)
    done = subprocess.run([sys.executable] + list(args), input=stdin.encode("utf-8"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    return done.returncode, done.stdout.decode("utf-8"), unwrapped(done.stderr.decode("utf-8"))


def unwrapped(messages):
    """Messages of the command line, each on a line of its own whatever the width."""
    return re.sub(r"\n(?!sessionoptimizer|warning|usage|Traceback|$)", " ", messages)


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


# ==================================================================================================
# Vocabulary
# ==================================================================================================

def names(enum):
    return " ".join(member.name for member in enum)


def test_the_words_are_those_of_the_contract():
    assert names(SessionStatus) == "ACTIVE COMPLETED FAILED ABANDONED"
    assert (names(EventType)
            == ("SESSION_START SESSION_END TOOL_CALL TOKEN_USAGE FILE_READ FILE_WRITE SEARCH ERROR "
                "USER_MESSAGE AI_RESPONSE CONTEXT_LOAD THINKING CUSTOM"))
    assert (names(IssueType)
            == ("REPEATED_FILE_READ REPEATED_SEARCH LARGE_FILE_UNCOMPRESSED EXCESSIVE_THINKING "
                "UNUSED_CONTEXT FAILED_RETRY CIRCULAR_SEARCH LONG_SESSION HIGH_ERROR_RATE "
                "INEFFICIENT_TOOL_USE TOKEN_SPIKE CONTEXT_OVERFLOW"))
    assert names(Severity) == "LOW MEDIUM HIGH CRITICAL"
    for enum in (SessionStatus, EventType, IssueType, Severity):
        assert all(member.value == member.name for member in enum)


def test_severities_are_ordered():
    shuffled = [Severity.HIGH, Severity.LOW, Severity.CRITICAL, Severity.MEDIUM]
    assert sorted(shuffled) == list(Severity) and max(shuffled) is Severity.CRITICAL
    assert (Severity.LOW < Severity.MEDIUM <= Severity.MEDIUM
            and Severity.HIGH > Severity.MEDIUM >= Severity.LOW)
    assert (not Severity.HIGH < Severity.HIGH
            and [member.rank for member in Severity] == [0, 1, 2, 3])
    with pytest.raises(TypeError):
        assert Severity.LOW < "HIGH"


def test_kinds_without_a_built_in_analyzer_are_said_to_be_for_the_users():
    built_in = {cls.issue_type for cls in so.BUILT_IN_ANALYZERS}
    for kind in set(IssueType) - built_in:
        assert kind.name in IssueType.__doc__


# ==================================================================================================
# Prices
# ==================================================================================================

# USD per 1,000 tokens: input, output, cache read, 5-minute write, 1-hour write. Written down from
# the vendors' lists.
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
    # as people and other tools write them
    ("claude-sonnet-4.5", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("anthropic/claude-opus-4.5", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("Opus 4.5", (0.005, 0.025, 0.0005, 0.00625, 0.010), True),
    ("claude-4.5-sonnet", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("Claude 3.5 Sonnet", (0.003, 0.015, 0.0003, 0.00375, 0.006), True),
    ("opus-4", (0.015, 0.075, 0.0015, 0.01875, 0.030), True),
    ("gemini-3-pro-preview", (0.002, 0.012, 0.0002, 0.002, 0.002), True),
    ("xai/grok-4.5", (0.002, 0.006, 0.0003, 0.002, 0.002), True),
    ("Grok (Cline)", (0, 0, 0, 0, 0), True),
    ("gpt-4.1-nano", (0.0001, 0.0004, 0.000025, 0.0001, 0.0001), True),
    ("unpriced", (0, 0, 0, 0, 0), True),
    # a family or the default stands in
    ("gpt-5-new-thing", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), False),
    ("gpt-5.1-codex-experimental", (0.00125, 0.010, 0.000125, 0.00125, 0.00125), False),
    ("claude-opus-4-5-turbo", (0.005, 0.025, 0.0005, 0.00625, 0.010), False),
    ("gpt-5.7", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("gpt-55", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("opus 9", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("sonnet2", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("my-own-model", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
    ("-", (0.010, 0.030, 0.001, 0.0125, 0.020), False),
]


def per_1000(price):
    return price.input, price.output, price.cache_read, price.cache_write, price.cache_write_1h


@pytest.mark.parametrize("model, figures, exact", PRICES, ids=[row[0] for row in PRICES])
def test_price_of_a_model(model, figures, exact):
    price = so.PriceList().lookup(model)
    assert per_1000(price) == pytest.approx(figures, abs=1e-12) and price.exact is exact


@pytest.mark.parametrize("model, rate, usd", [  # of 1,000 uncached, 10,000 read, 100 written tokens
    ("claude-opus-5-5", "", 0.004 + 0.002 + 0.002), ("claude-opus-5-5", "fast", 0.016),
    ("claude-opus-4-5", "fast", 0.005 + 0.005 + 0.0025),    # has no fast mode of its own
    ("gemini-2.5-pro", "", 0.00125 + 0.00125 + 0.001),
    ("gemini-2.5-pro", "long", 0.0025 + 0.00125 + 0.0015),  # cache reads keep their price
    ("gemini-3-pro-preview", "long", 0.004 + 0.004 + 0.0018),
    ("claude-opus-4-5", "long", 0.005 + 0.005 + 0.0025),
    ("gemini-2.5-pro", "fast long", 0.0025 + 0.00125 + 0.0015)])
def test_fast_mode_and_long_contexts_have_prices_of_their_own(model, rate, usd):
    event = E("AI_RESPONSE", 1_000, 100, _read=10_000)
    event.rate = rate
    session = session_of(event, model=model)
    assert session.estimated_cost == pytest.approx(usd)
    assert so.Session.from_dict(session.to_dict()).estimated_cost == session.estimated_cost
    assert session.cost_in_pico == session.price_of(event).cost(event.usage)


def test_a_price_list_of_the_users_has_every_field():
    prices = so.PriceList({"mine": {
        "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06,
        "cache_read_input_token_cost": 3e-07, "cache_creation_input_token_cost": 4e-06,
        "cache_creation_input_token_cost_above_1hr": 5e-06,
        "input_cost_per_token_above_200k_tokens": 6e-06,
        "output_cost_per_token_above_200k_tokens": 7e-06,
        "cache_read_input_token_cost_above_200k_tokens": 8e-07,
        "cache_creation_input_token_cost_above_200k_tokens": 9e-06, "fast": 3}})
    usage = so.Usage(1, 10, 100, 1_000, 10_000)
    million = 10**6
    assert (prices.lookup("mine").cost(usage)
            == 1 * million + 40 * million + 500 * million + 300 * million + 20_000 * million)
    above = 6 * million + 90 * million + 500 * million + 800 * million + 70_000 * million
    assert prices.lookup("mine", "long").cost(usage) == above
    assert prices.lookup("mine", "fast long").cost(usage) == 3 * above
    with pytest.raises(InvalidValue, match="above_200k_tokens of 'mine'"):
        so.PriceList(
            {"mine": {"input_cost_per_token": 0, "input_cost_per_token_above_200k_tokens": -1}})


def test_money_does_not_depend_on_the_order_of_summation():
    events = [E("AI_RESPONSE", n, 7 * n % 13, _read=n * n, _model=model)
              for n in range(1, 60) for model in ("claude-opus-4-5", "gpt-5", "gemini-2.5-pro")]
    costs = {session_of(*order).cost_in_pico
             for order in (events, events[::-1], sorted(events, key=lambda e: e.tokens_output))}
    assert len(costs) == 1
    assert costs.pop() == sum(session_of(event).cost_in_pico for event in events)


def test_the_first_releases_table_is_still_there():
    assert (so.TOKEN_COSTS["opus"] == {"input": 0.015, "output": 0.075}
            and so.TOKEN_COSTS["grok"]["input"] == 0.0)
    for name, costs in so.TOKEN_COSTS.items():
        price = so.PriceList().lookup(name)
        assert (price.input, price.output) == (costs["input"], costs["output"])


def test_the_published_example_costs_what_it_says():
    session = session_of(E("AI_RESPONSE", 10_000, 5_000), model="opus")
    assert "%.4f" % session.estimated_cost == "0.5250"
    totals = so.Session("s", "A", "t", total_tokens_input=10_000,
                        total_tokens_output=5_000, model="opus")
    assert "%.4f" % totals.estimated_cost == "0.5250"
    assert session_of(E("AI_RESPONSE", 10_000, 5_000), model="grok").estimated_cost == 0


def test_every_price_class_is_billed_at_its_own_price():
    # 1,000 plain at 0.015, 2,000 five-minute writes at 0.01875, 3,000 one-hour writes at 0.030,
    # 40,000 read at 0.0015, 500 written at 0.075: 0.015 + 0.0375 + 0.090 + 0.060 + 0.0375
    event = E("AI_RESPONSE", 6_000, 500, _write=5_000, _hour=3_000, _read=40_000)
    assert session_of(event, model="opus").estimated_cost == pytest.approx(0.24)
    # an event of another model is billed as that one: 1,000 at 0.001 and 1,000 out at 0.005
    other = E("AI_RESPONSE", 1_000, 1_000, _model="claude-haiku-4-5")
    assert session_of(event, other, model="opus").estimated_cost == pytest.approx(0.24 + 0.006)


def own_prices(optimizer, value):
    os.makedirs(optimizer.store.root, exist_ok=True)
    write(os.path.join(optimizer.store.root, "prices.json"),
          json.dumps(value) if not isinstance(value, bytes) else value)
    return SessionOptimizer(optimizer.store.root)


def test_prices_of_the_user_come_first(optimizer):
    optimizer = own_prices(optimizer, {
        "sample_spec": {"input_cost_per_token": "a text", "litellm_provider": "one of"},
        "my-model": {"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06, "mode": "chat"},
        "opus": {"input_cost_per_token": 4e-06, "output_cost_per_token": 8e-06,
                 "cache_read_input_token_cost": 1e-06},
        "gpt-5.7": {"input_cost_per_token": 3e-06, "output_cost_per_token": 0,
                    "cache_creation_input_token_cost": 5e-06,
                    "cache_creation_input_token_cost_above_1hr": 6e-06},
        "an-embedding": {"output_vector_size": 3, "litellm_provider": "x"}})
    for model, cost in (("my-model", 1.0 + 2.0), ("my-model-2026-01-01", 3.0), ("opus", 4.0 + 8.0),
                        ("gpt-5.7", 3.0), ("sonnet", 3.0 + 15.0), ("an-embedding", 10.0 + 30.0)):
        session = optimizer.start_session("a", "t", model=model)
        optimizer.log_event(session.id, "AI_RESPONSE", tokens_input=1_000_000,
                            tokens_output=1_000_000)
        assert session.estimated_cost == pytest.approx(cost), model
    price = optimizer.prices.lookup("gpt-5.7")
    assert per_1000(price) == pytest.approx((0.003, 0, 0.003, 0.005, 0.006)) and price.exact


@pytest.mark.parametrize("content", [
    b"[]", b"{", b"\xff", b"1", {"m": {"input_cost_per_token": "0.1"}},
    {"m": {"input_cost_per_token": -1}},
    {"m": {"input_cost_per_token": True}}, {"m": {"input_cost_per_token": 1e300}},
    b'{"m": {"input_cost_per_token": NaN}}'], ids=str)
def test_prices_that_cannot_be_used_are_named(optimizer, content):
    with pytest.raises(InvalidValue, match="price"):
        own_prices(optimizer, content).start_session("a", "t")


@pytest.mark.parametrize("entry, says", [
    ({"input_cost_per_token": 0.003, "output_cost_per_token": 0.015}, r"'mine', \[0.003, 0.015\]"),
    ({"input_cost_per_token": 3}, r"'mine', \[3\]"), ({"input": 3, "output": 15}, "'input': 3"),
    ({"input_cost_per_token": 0, "cache_read_input_token_cost": 1}, r"\[1\]"), (3, "'mine', 3")],
    ids=str)
def test_a_price_of_more_than_a_token_is_named(optimizer, entry, says):
    with pytest.warns(SessionOptimizerWarning, match=says + ".*: give .* USD per single token"):
        _ = own_prices(optimizer, {"mine": entry}).prices


def test_the_dearest_price_of_the_table_is_none_of_more_than_a_token(optimizer):
    dearest = max(price for row in so._parse_prices(so._PRICE_TABLE).values()
                  for price in row.figures if price)
    _ = own_prices(optimizer, {"mine": {"input_cost_per_token": dearest}}).prices


def test_a_price_that_had_to_be_guessed_is_reported(optimizer):
    for model, note in (("gpt-5.7", "priced as default"), ("gpt-5-turbo", "priced as gpt-5"),
                        ("my-own", "priced as default"),
                        ("claude-opus-4-5-20251101", None), ("opus", None), ("default", None)):
        session = optimizer.start_session("a", "t", model=model)
        report = optimizer.analyze(session.id)
        assert ([model in text and note in text for text in report.notes]
                == ([True] if note else [])), model
        assert (note or "a score") in optimizer.export_report(session.id, "text") or note is None


# ==================================================================================================
# Errors
# ==================================================================================================

def test_errors_have_one_base_and_keep_the_built_in_ones():
    for cls, also in ((InvalidValue, ValueError), (InvalidSessionId, InvalidValue),
                      (SessionExists, Exception), (SessionNotFound, LookupError),
                      (StorageError, Exception), (DamagedSession, StorageError)):
        assert issubclass(cls, SessionOptimizerError) and issubclass(cls, also)
    assert issubclass(SessionOptimizerWarning, UserWarning)


def test_errors_travel_and_print():
    error = pickle.loads(pickle.dumps(StorageError("/x\x1b[31m", "reason", "remedy")))
    assert str(error) == "/x\\x1b[31m: reason; remedy" and error.path == "/x\x1b[31m"


def test_no_broad_except_but_around_a_users_analyzer_a_unit_and_a_hook():
    """None may take down what it is run from.
    Handlers that only clean up and raise again hide nothing."""
    tree = ast.parse(read(MODULE))
    broad = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)
             and (node.type is None
                  or getattr(node.type, "id", "") in ("Exception", "BaseException"))
             and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)]
    around = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
              and any(handler in ast.walk(node) for handler in broad)]
    assert sorted(around) == ["charged_report", "describe_transcript", "main", "read_unit"]


# ==================================================================================================
# Records
# ==================================================================================================

WHOLE_SESSION = {
    "id": "s", "agent": "FORGE", "task": "a task", "status": "FAILED",
    "started_at": "2026-03-01T10:00:00+00:00",
    "ended_at": "2026-03-01T11:00:00+00:00", "model": "opus", "metadata": {"k": [1, {"a": "é\n"}]},
    "total_tokens_input": 130, "total_tokens_output": 7, "total_duration_ms": 9,
    "events": [
        {"id": "e1", "timestamp": "2026-03-01T10:00:01+00:00", "event_type": "FILE_READ",
         "data": {"file_path": "a"}, "tokens_input": 100, "tokens_output": 5, "duration_ms": 9},
        {"id": "e2", "timestamp": "", "event_type": "AI_RESPONSE", "data": {}, "tokens_input": 30,
         "tokens_output": 2,
         "duration_ms": 0, "tokens_cache_write": 20, "tokens_cache_write_1h": 10,
         "tokens_cache_read": 50, "model": "sonnet", "agent_id": "sub"}]}


def test_a_session_survives_a_round_trip():
    session = so.Session.from_dict(WHOLE_SESSION)
    assert session.to_dict() == WHOLE_SESSION == json.loads(json.dumps(session.to_dict()))
    assert ((session.status, session.total_tokens, session.events[0].tokens)
            == (SessionStatus.FAILED, 137, 105))
    assert (session.events[1].event_type is EventType.AI_RESPONSE
            and session.events[1].agent_id == "sub")


def test_an_event_is_a_dataclass_as_any_other_without_a_dict_of_its_own():
    event = so.SessionEvent.from_dict(
        dict(WHOLE_SESSION["events"][1], data={"a": [1]}, of_a_later_version=1))
    assert not hasattr(event, "__dict__") and not hasattr(event, "of_a_later_version")
    for same in (pickle.loads(pickle.dumps(event)), copy.deepcopy(event),
                 dataclasses.replace(event), so.SessionEvent(**dataclasses.asdict(event))):
        assert same == event and same is not event and repr(same) == repr(event)
    assert (event != dataclasses.replace(event, tokens_output=3)
            and event != so.Session("e2", "", ""))
    assert (so.SessionEvent("a", "", EventType.CUSTOM).data
            is not so.SessionEvent("b", "", EventType.CUSTOM).data)


class Tagged(so.SessionEvent):
    """What a user may have made of an event: attributes of its own."""


def test_an_event_is_pickled_and_copied_in_every_way():
    tagged = Tagged("a", "", EventType.SEARCH, {"query": ["q"]}, 5, 3)
    tagged.tag = "mine"
    for event in (read_of(tokens=7, _write=3, _model="opus"), tagged):
        for same in [pickle.loads(pickle.dumps(event, protocol))
                     for protocol in range(pickle.HIGHEST_PROTOCOL + 1)] + [
                         copy.copy(event), copy.deepcopy(event)]:
            assert same == event and type(same) is type(event)
            assert getattr(same, "tag", "") == getattr(event, "tag", "")
    assert (copy.copy(tagged).data is tagged.data
            and copy.deepcopy(tagged).data["query"] is not tagged.data["query"])


def test_an_event_that_the_first_release_pickled_is_read():
    """It had seven fields, in the dict of the object."""
    state = dict(id="e", timestamp="", event_type=EventType.SEARCH, data={"query": "q"},
                 tokens_input=5, tokens_output=2, duration_ms=1)
    event = so.SessionEvent.__new__(so.SessionEvent)
    event.__setstate__(state)
    assert event == so.SessionEvent(**state) and event.tokens_cache_read == 0


def test_fields_that_are_empty_are_left_out_of_an_event():
    assert sorted(E("CUSTOM").to_dict()) == ["data", "duration_ms", "event_type", "id", "timestamp",
                                             "tokens_input", "tokens_output"]


def test_unknown_keys_are_ignored_and_totals_recomputed():
    extended = json.loads(json.dumps(WHOLE_SESSION))
    extended.update(tags=[1], total_tokens_input=99, total_tokens_output=99, total_duration_ms=99,
                    event_count=50)
    extended["events"][0]["later"] = {"x": 1}
    assert so.Session.from_dict(extended).to_dict() == WHOLE_SESSION


def test_totals_of_a_session_without_events_are_kept():
    session = so.Session.from_dict(
        {"id": "s", "agent": "A", "task": "t", "total_tokens_input": 1_000,
         "total_tokens_output": 500, "total_duration_ms": 60_000})
    assert ((session.total_tokens, session.duration_seconds, session.status)
            == (1_500, 60.0, SessionStatus.ACTIVE))
    assert so.Session.from_dict(session.to_dict()).to_dict() == session.to_dict()
    direct = so.Session("s", "A", "t")
    direct.total_tokens_input = 7
    assert direct.total_tokens == 7 and direct.started_at and direct.model == "default"


@pytest.mark.parametrize("change, says", [
    ({"status": "DONE"}, "DONE.*ACTIVE, COMPLETED"), ({"metadata": []}, "metadata.*list"),
    ({"events": {}}, "events.*dict"), ({"events": [1]}, "int"),
    ({"events": [{}]}, "id and an event_type"), ({"events": [{"id": "x"}]}, "event_type"),
    ({"events": [{"id": "x", "event_type": "NAP"}]}, "FILE_READ"),
    ({"events": [{"event_type": "CUSTOM"}]}, "id"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "data": []}]}, "data.*list"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_input": -1}]}, "tokens_input.*-1"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_output": "5"}]}, "tokens_output.*'5'"),
    ({"events": [{"id": "x", "event_type": "CUSTOM", "tokens_cache_read": 1.5}]},
     "tokens_cache_read.*1.5"),
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
    assert (again.issues[0].issue_type is IssueType.REPEATED_FILE_READ
            and again.issues[0].severity is Severity.HIGH)
    for key in ("id", "issue_type", "severity", "description", "suggestion",
                "estimated_waste_tokens", "estimated_waste_cost", "events_involved", "metadata"):
        assert key in stored["issues"][0]
    for key in ("session_id", "generated_at", "issues", "total_waste_tokens", "total_waste_cost",
                "efficiency_score", "recommendations", "token_breakdown", "comparisons"):
        assert key in stored
    for cls, bad in ((so.EfficiencyIssue, {"id": "x"}),
                     (so.EfficiencyIssue, dict(stored["issues"][0], severity="HUGE")),
                     (so.OptimizationReport, {}), (so.OptimizationReport, {"issues": [1]})):
        with pytest.raises(InvalidValue, match="not an? "):
            cls.from_dict(bad)


TIMES = [
    ("2026-03-01T10:00:00Z", 1772359200), ("2026-03-01T10:00:00z", 1772359200),
    ("2026-03-01 10:00:00+00:00", 1772359200), ("2026-03-01T12:30:00+02:30", 1772359200),
    ("2026-03-01T05:00:00-0500", 1772359200), ("2026-03-01T10:00Z", 1772359200),
    ("2026-03-01T10:00:00.5Z", 1772359200.5), ("2026-03-01T10:00:00,25Z", 1772359200.25),
    ("2026-03-01T10:00:00.123456Z", 1772359200.123456),
    ("2026-03-01T10:00:00.123456789Z", 1772359200.123456),
    ("0001-01-01T00:00:00Z", -62135596800), ("9999-12-31T23:59:59Z", 253402300799),
    ("", None), (None, None), ("soon", None), ("2026-13-01T10:00:00Z", None), ("2026-02-30", None),
    (5, None), ([], None), ("2026-03-01T25:00:00Z", None), ("2026-03-01T10:00:00+99:00", None),
    ("2026-03-01T10:00:00Z; rm", None)]


@pytest.mark.parametrize("text, seconds", TIMES, ids=str)
def test_times_in_every_spelling(text, seconds):
    assert so.seconds_of(text) == seconds
    moment = so.parse_time(text)
    assert moment is None or moment.tzinfo is not None


def test_times_without_a_zone_are_local(monkeypatch):
    set_zone(monkeypatch, "UTC-2")  # two hours ahead of UTC
    try:
        assert (so.seconds_of("2026-03-01T12:00:00") == 1772359200
                == so.seconds_of("2026-03-01T12:00:00.000"))
        assert so.seconds_of("2026-03-01") == 1772359200 - 12 * 3600
        assert (so.now_text().endswith("+02:00")
                and abs(so.seconds_of(so.now_text()) - time.time()) < 60)
        for text in ("0001-01-01T00:00:00", "9999-12-31T23:59:59", "0001-01-01", "9999-12-31"):
            assert so.parse_time(text).year in (1, 9999)
            assert isinstance(so.seconds_of(text), float)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_hour_that_comes_twice_is_not_an_hour_of_work(monkeypatch):
    """Clocks went back between 02:55 summer time and 02:05 winter time: ten minutes passed."""
    session = session_of(E("CUSTOM"), E("CUSTOM"))
    session.events[0].timestamp, session.events[1].timestamp = ("2026-10-25T02:55:00+02:00",
                                                                "2026-10-25T02:05:00+01:00")
    assert session.duration_seconds == 600


DURATIONS = [  # minutes of the events, seconds
    ([0, 5, 10], 600), ([0, 10], 600), ([0, 10.01], 0), ([0, 5, 60, 65], 600), ([5, 0, 3], 300),
    ([0], 0), ([], 600), ([0, 0, 0], 0)]


@pytest.mark.parametrize("minutes, seconds", DURATIONS, ids=str)
def test_active_time_leaves_out_the_gaps(minutes, seconds):
    assert (session_of(*[E("CUSTOM", _at=at) for at in minutes]).duration_seconds
            == pytest.approx(seconds))


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
    session = session_of(
        E("USER_MESSAGE"), E("CUSTOM", _agent="b"), E("AI_RESPONSE"), E("CONTEXT_LOAD", **compact),
        E("AI_RESPONSE"), E("CUSTOM", _agent="b"), E("CONTEXT_LOAD", _agent="b", **compact),
        E("CONTEXT_LOAD", source="system"))
    windows = sorted([event.id for event in window] for window in session.windows())
    assert windows == [["e1", "e3"], ["e2", "e6"], ["e4", "e5", "e8"], ["e7"]]
    assert list(session_of().windows()) == []


def test_a_session_made_with_events_has_their_totals():
    session = so.Session("s", "A", "t", events=[event_like("FILE_READ", {}, 70)])
    assert session.total_tokens == 70 and so.build_report(session, []).efficiency_score == 100.0


def test_cache_writes_are_part_of_the_input():
    with pytest.raises(InvalidValue, match="cache writes"):
        so.SessionEvent.from_dict(
            {"id": "e", "event_type": "CUSTOM", "tokens_input": 5, "tokens_cache_write": 6})


# ==================================================================================================
# Secrets
# ==================================================================================================

@pytest.mark.parametrize("text, masked", [
    ("export K=sk-ant-abcdefghij0123456789", "export K=***"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
    ("AWS AKIAABCDEFGHIJKLMNOP x", "AWS *** x"),
    ("curl -H 'Authorization: Bearer abc.def-123'", "curl -H 'Authorization: Bearer ***'"),
    ("curl 'https://x.y/?token=abc123&z=1'", "curl 'https://x.y/?token=***&z=1'"),
    ("login --password hunter2 now", "login --password *** now"),
    ("password=hunter2", "password=***"),
    ('{"api_key": "abc"}', '{"api_key": "***"}'),
    ("git clone https://me:pw@host/x.git", "git clone https://me:***@host/x.git"),
    ("curl -u me:pw http://x", "curl -u me:*** http://x"),
    ("export TOKEN=$TOKEN", "export TOKEN=$TOKEN"),
    ("monkey business, keyboard: 3", "monkey business, keyboard: 3"),
    ("rg max_tokens src", "rg max_tokens src"),
    ("cat secret/list.py", "cat secret/list.py"),
    ("ssh git@host:22/x", "ssh git@host:22/x"),
    ("plain text", "plain text"),
])
def test_mask_secrets(text, masked):
    assert so.mask_secrets(text) == masked


# What a secret looks like: %s stands for it. A word drawn by lot is the same each time.

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HEX, LOWER, UPPER = "0123456789abcdef", LETTERS + "0123456789", LETTERS.upper() + "0123456789"


def drawn(length, letters=LETTERS + UPPER):
    rng = random.Random(f"{length}{letters[:3]}")
    return "".join(rng.choice(letters) for _ in range(length))


KEYS = [  # by the prefixes that providers give them
    "sk-ant-api03-" + drawn(40), "sk-proj-" + drawn(48), "sk-" + drawn(48), "sk_live_" + drawn(24),
    "rk_live_" + drawn(24), "sk_test_" + drawn(24), "ghp_" + drawn(36), "gho_" + drawn(36),
    "ghs_" + drawn(36), "github_pat_" + drawn(22) + "_" + drawn(59), "AKIA" + drawn(16, UPPER),
    "ASIA" + drawn(16, UPPER), "xoxb-123456789012-123456789012-" + drawn(24),
    "xapp-1-A012-123-" + drawn(64, HEX), "xoxe.xoxp-1-" + drawn(60), "AIza" + drawn(35),
    "ya29." + drawn(60), "GOCSPX-" + drawn(28), "glpat-" + drawn(20), "gldt-" + drawn(20),
    "glrt-" + drawn(20), "npm_" + drawn(36), "hf_" + drawn(34), "pypi-AgEIcHlwaS5vcmc" + drawn(60),
    "SG." + drawn(22) + "." + drawn(43), "whsec_" + drawn(32), "hvs." + drawn(90),
    "gsk_" + drawn(52), "dapi" + drawn(32, HEX), "shpat_" + drawn(32, HEX),
    "shpss_" + drawn(32, HEX), "dop_v1_" + drawn(64, HEX),
    "lin_api_" + drawn(40), "PMAK-" + drawn(24, HEX) + "-" + drawn(34, HEX),
    "NRAK-" + drawn(27, UPPER), "rubygems_" + drawn(48, HEX), "sq0atp-" + drawn(22),
    "figd_" + drawn(40), "glsa_" + drawn(32) + "_" + drawn(8, HEX),
    "HRKU-AA" + drawn(58), "r8_" + drawn(37), "pplx-" + drawn(48), "nvapi-" + drawn(60),
    drawn(14, LOWER) + ".atlasv1." + drawn(60),
    "dt0c01." + drawn(24, UPPER) + "." + drawn(64, UPPER), "AGE-SECRET-KEY-1" + drawn(58, UPPER),
    "ATATT3xFf" + drawn(60), "dckr_pat_" + drawn(27), "fo1_" + drawn(43), "pscale_tkn_" + drawn(40),
    "sbp_" + drawn(40, HEX), "ntn_" + drawn(46), "dp.pt." + drawn(43), "CFPAT-" + drawn(43),
    "sntrys_" + drawn(60), "key-" + drawn(32, HEX), drawn(32, HEX) + "-us12", "SK" + drawn(32, HEX),
    "eyJ" + drawn(33) + ".eyJ" + drawn(60) + "." + drawn(43),
    "M" + drawn(23) + "." + drawn(6) + "." + drawn(27),
    "1234567890:AA" + drawn(33), "lsv2_pt_" + drawn(32, HEX) + "_" + drawn(10, HEX),
    "xkeysib-" + drawn(64, HEX) + "-" + drawn(16), "EZAK" + drawn(54), "sk-or-v1-" + drawn(64, HEX),
    "xai-" + drawn(80), "tvly-" + drawn(32), "LTAI" + drawn(20),
    "ops_eyJ" + drawn(60), "p8e-" + drawn(32, LOWER), drawn(3) + "8Q~" + drawn(33),
    "A3-" + "-".join(drawn(n, UPPER) for n in (6, 6, 5, 5, 5, 5)), "sha256~" + drawn(43),
    "pat" + drawn(14) + "." + drawn(64, HEX), "glimt-" + drawn(25), "gloas-" + drawn(64, HEX),
    "sl." + drawn(140), "t1." + drawn(60) + "." + drawn(86), "pnu_" + drawn(36, LOWER),
    "sgp_" + drawn(40, HEX), "pat." + drawn(22) + "." + drawn(24, HEX) + "." + drawn(20),
    "sm_pat_" + drawn(16), "API-" + drawn(26, UPPER), "rdme_" + drawn(70, LOWER),
    "live_" + drawn(35, HEX), "squ_" + drawn(40, HEX), "NRJS-" + drawn(19, HEX),
    "s-s4t2ud-" + drawn(64, HEX), "hf_" + drawn(34, LETTERS), "api_org_" + drawn(34, LETTERS),
    "v2.local." + drawn(80), "amzn.mws." + drawn(8, HEX) + "-ab12-cd34-ef56-" + drawn(12, HEX),
    "access_token$production$" + drawn(16, LOWER) + "$" + drawn(32, HEX), "A3T" + drawn(17, UPPER),
    "pubkey-" + drawn(32, HEX), "oy2" + drawn(43, LOWER), "dp.audit." + drawn(43),
    "SWMTKN-1-" + drawn(50, LOWER) + "-" + drawn(25, LOWER), "mfa." + drawn(84),
    "sdk-" + drawn(8, HEX) + "-ab12-cd34-ef56-" + drawn(12, HEX), "rzp_live_" + drawn(14),
    "sandbox_" + drawn(8) + "_" + drawn(16, LOWER), "waka_" + drawn(8, HEX) + "-" + drawn(27, HEX),
    "sc_" + drawn(10, LOWER) + ".ab12c.acc-" + drawn(20, LOWER) + "." + drawn(60),
    "tskey-auth-" + drawn(17) + "-" + drawn(32),
]
SECRETS = [("curl -d %s https://x.y", key) for key in KEYS] + [
    ("export DB_PASS=%s", "hunter2"), ("DB_PASSWORD=%s psql", "hunter2"),
    ("PGPASSWORD=%s psql -h db", "geheim"), ("MYSQL_PWD=%s mysql", "tiger"),
    ("export SSHPASS=%s", "letmein"), ("export APP_KEY=%s", "abcdefgh"),
    ("DEPLOY_KEY='%s' ./d.sh", "a b c d"), ("export MY_SECRET=%s", "swordfish"),
    ("JWT_SECRET=\"%s\" node s.js", "very secret words"),
    ("SECRET_KEY_BASE=%s rails s", drawn(40, HEX)), ("GITHUB_TOKEN=%s gh pr list", "abc123"),
    ("TOKEN=%s", "xyzzy"), ("AWS_SECRET_ACCESS_KEY=%s aws s3 ls", drawn(40)),
    ("DB_CRED=%s", "hunter2"), ("X_CREDENTIALS=%s", "u-p-1"),
    ("NPM_AUTH=%s npm i", "dXNlcjpwYXNz1"),
    ("BASIC_AUTH=%s", "user1:pass1x"), ("REQUEST_SIG=%s", drawn(32, HEX)),
    ("curl 'https://x.y/z?sig=%s'", drawn(32, HEX)),
    ("curl 'https://x.y/?a=1&api_key=%s&z=1'", "abc"),
    ("curl 'https://x.y/?access_token=%s'", "abc123"), ("{\"password\": \"%s\"}", "two words"),
    ("{\"apiKey\": \"%s\"}", "abc"), ("{\"clientSecret\":\"%s\"}", "abc-def"),
    ("curl -d '{\"passwd\":\"%s\"}' x", "a,b;c"),
    ("curl -d \"{\\\"password\\\":\\\"%s\\\"}\" x", "hunter2"),
    ("echo \"password: %s\" >> c.yml", "hunter2"), ("password='%s'", "first SECOND"),
    ("PASSWORD=\"%s\" ./x", "first SECOND"), ("mysql --password=%s", "hunter2"),
    ("mysql --password %s db", "hunter2"), ("mysqldump -u root -p%s db", "4711"),
    ("mysql -uroot -p'%s' db", "geheim"), ("sshpass -p %s ssh a@b", "hunter2"),
    ("sshpass -p '%s' ssh a@b", "hun ter2"), ("docker login -u me -p %s reg.io", "hunter2"),
    ("mongosh -u a -p %s", "hunter2"), ("redis-cli -h x -a %s ping", "hunter2"),
    ("curl -u me:%s https://x", "hunter2"),
    ("curl --user me:%s https://x", "hunter2"), ("curl --user 'me:%s' https://x", "hunter2"),
    ("curl --proxy-user me:%s x", "hunter2"), ("curl -b session=%s https://x", "abcdef"),
    ("curl -b 'sid=%s' https://x", "a1b2c3"), ("curl --cookie \"session=%s\" x", "abcdef"),
    ("curl -H 'Cookie: sid=%s' x", "abcdef"),
    ("curl -H 'Authorization: Bearer %s' x", "abc.def-123"),
    ("curl -H \"Authorization: Basic %s\" x", "dXNlcjpwYXNz"),
    ("curl -H 'Authorization: %s' x", "abc123"),
    ("curl -H 'X-Api-Key: %s' x", "abc"), ("curl -H 'PRIVATE-TOKEN: %s' x", "abc"),
    ("curl -H 'X-Auth-Token: %s' x", "abc"), ("curl --oauth2-bearer %s x", "abc"),
    ("gpg --batch --passphrase %s -d f", "hunter2"), ("gpg --passphrase '%s' -d f", "two words"),
    ("keytool -storepass %s -list", "changeit"), ("keytool -keypass %s -list", "changeit"),
    ("openssl enc -aes-256-cbc -k %s -in f", "hunter2"), ("openssl rsa -passin pass:%s", "hunter2"),
    ("zip -P %s a.zip b", "hunter2"), ("unzip -P %s a.zip", "hunter2"),
    ("7z x -p%s a.7z", "hunter2"), ("ldapsearch -D cn=a -w %s", "hunter2"),
    ("mysql -e \"CREATE USER a IDENTIFIED BY '%s'\"", "hunter2"),
    ("psql -c \"ALTER USER a WITH PASSWORD '%s'\"", "hun ter2"),
    ("echo %s | sudo -S apt update", "hunter2"), ("echo '%s' | sudo -S ls", "hunter2"),
    ("printf '%s' | docker login -u me --password-stdin", "hunter2"),
    ("echo %s | gh auth login --with-token", "abc"), ("git clone https://me:%s@host/x.git", "pw"),
    ("psql postgres://me:%s@db/x", "p@ss"), ("redis-cli -u redis://:%s@h:6379", "hunter2"),
    ("git clone https://%s@github.com/a/b", drawn(40, HEX)),
    ("mongodb+srv://me:%s@c.net/db", "p@s@s"),
    ("curl -X POST https://hooks.slack.com/services/%s", "T00000000/B00000000/" + drawn(24)),
    ("curl https://discord.com/api/webhooks/123456789/%s", drawn(68)),
    ("curl https://discordapp.com/api/webhooks/123456789/%s", drawn(68)),
    ("curl https://a.webhook.office.com/webhookb2/%s", drawn(40, HEX)),
    ("curl https://hooks.zapier.com/hooks/catch/%s", "123456/abcdef"),
    ("curl https://api.telegram.org/bot%s/getMe", "123456789:AA" + drawn(33)),
    ("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=%s;", drawn(86) + "=="),
    ("Endpoint=sb://x/;SharedAccessKeyName=a;SharedAccessKey=%s", drawn(43) + "="),
    ("echo %s", drawn(40)), ("run %s now", drawn(32)), ("x '%s'", drawn(64) + "=="),
    ("-----BEGIN RSA PRIVATE KEY-----\n%s\n-----END RSA PRIVATE KEY-----", drawn(64)),
    ("cat <<E\n-----BEGIN OPENSSH PRIVATE KEY-----\n%s\n", drawn(64)),
    ("npm config set //r/:_authToken=%s", "abc"),
    ("npm config set //r/:_authToken %s", "abc"), ("$env:API_KEY = \"%s\"", "abc def"),
    ("set -x OPENAI_API_KEY %s", drawn(20)), ("twine upload -u me --password %s", "abc"),
    ("terraform apply -var db_password=%s", "hunter2"),
    ("helm install x --set auth.password=%s", "hunter2"),
    ("kubectl create secret generic a --from-literal=password=%s", "hunter2"),
    ("heroku config:set STRIPE_SECRET=%s", "abc"), ("vault login %s", "s.abcdefgh"),
    ("machine x login me password %s", "hunter2"), ("client.login(token=\"%s\")", "abc"),
    ("requests.get(u, headers={'X-API-KEY': '%s'})", "abc"),
    ("ftp://me:%s@host/f", "a/b".replace("/", ":")), ("smbclient //h/s -U me%%%s", "hunter2"),
    ("az login --service-principal -u a -p %s", "hunter2"),
    ("snowsql --private-key-passphrase=%s", "abc"),
    ("ansible-playbook x -e ansible_become_pass=%s", "hunter2"),
    ("wget --http-password=%s u", "hunter2"), ("rclone --s3-secret-access-key %s ls", "abcdef123"),
    ("PASSPHRASE='%s' gpg", "a \"b\" c"), ("webhook_secret: \"%s\"", "abc"),
    ("auth_token=%s&x", "abcd"), ("--client-secret=%s", "abcdefg"),
    ("SIGNING_KEY=%s make", "abcdefg"), ("export STRIPE_KEY=%s","rk_test_51H8"),
    ("HEROKU_API_KEY=%s heroku ps","01234567-89ab-cdef-0123-456789abcdef"),
    ("curl -H 'api-key: %s' https://s.search.windows.net","0F1E2D3C4B5A69788796A5B4C3D2E1F0"),
    ("curl -H \"apikey: %s\" https://x.supabase.co","abcdef123456"),
    ("curl -H 'X-Vault-Token: %s' https://v","root"),
    ("curl -H 'x-functions-key: %s' u","abcdefg=="),
    ("docker run -e POSTGRES_PASSWORD=%s postgres","mysecret"),
    ("docker run -e MYSQL_ROOT_PASSWORD='%s' mysql","my secret"),
    ("docker build --build-arg NPM_TOKEN=%s .","abcdef"),
    ("export OPENAI_API_KEY='%s'","sk-abc123def456ghi789"),
    ("az storage blob list --account-key %s",
     "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq=="),
    ("az ad sp create --password %s","P@ssw0rd!"), ("net use Z: \\\\s\\h /user:me %s","hunter2"),
    ("psql \"host=db user=me password=%s\"","hunter2"),
    ("psql 'postgresql://me:%s@h:5432/d'","p@ss:w0rd"),
    ("sqlplus me/%s@db","tiger"), ("mysql -h db -u me --password=\"%s\" x","a b"),
    ("mysqladmin -u root -p%s shutdown","rootpw"), ("mariadb -uroot -p%s","rootpw"),
    ("sudo -S <<< '%s' apt update","hunter2"), ("sudo -S apt update <<< %s","hunter2"),
    ("echo '%s' | passwd --stdin me","hunter2"), ("echo 'me:%s' | chpasswd","hunter2"),
    ("echo -n %s | base64","c0ffee!Pass"), ("printf '%%s' %s | sudo -S id","hunter2"),
    ("ssh-keygen -t rsa -N '%s' -f k","my pass"), ("ssh-keygen -p -P %s -N x","oldpass1"),
    ("gpg --passphrase=%s -c f","hunter2"), ("openssl pkcs12 -export -passout pass:%s","hunter2"),
    ("openssl enc -k '%s'","two words"), ("ansible-vault encrypt --vault-password %s","hunter2"),
    ("curl -d 'username=me&password=%s' u","hunter2"), ("curl -F password=%s u","hunter2"),
    ("curl --data '{\"token\": \"%s\"}' u","abc"),
    ("curl --data '{\"secret\":\"%s\"}' u","abc def"),
    ("curl -d '{\"user\":\"me\",\"pwd\":\"%s\"}' u","hunter2"),
    ("http POST x password=%s","hunter2"), ("http -a me:%s x","hunter2"),
    ("xh --auth me:%s x","hunter2"), ("wget --user=me --password='%s' u","a b"),
    ("wget --header='Authorization: token %s' u","abcdef"),
    ("curl -H 'Authorization: ApiKey %s' u","VnVhQ2ZHY0JDZGJrU"), ("curl -u 'me:%s' u","two words"),
    ("curl -ume:%s u","hunter2"), ("curl --cookie 'session=%s; a=b' u","abcdef"),
    ("curl -b \"JSESSIONID=%s\" u","ABCDEF123"),
    ("export SLACK_WEBHOOK=https://hooks.slack.com/services/%s","T000/B000/XXXXXXXX"),
    ("export DATABASE_URL=postgres://u:%s@h/d","pw"), ("redis-cli -a '%s'","two words"),
    ("redis-cli --pass %s","hunter2"), ("mongo mongodb://u:%s@h","pw"),
    ("mongodump -u me -p %s","hunter2"),
    ("rabbitmqctl add_user me %s","hunter2"), ("htpasswd -bc f me %s","hunter2"),
    ("smbclient //s/h -U 'me%%%s'","hunter2"),
    ("mount -t cifs //s /m -o username=me,password=%s","hunter2"),
    ("xfreerdp /u:me /p:%s /v:h","hunter2"), ("rdesktop -u me -p %s h","hunter2"),
    ("lftp -u me,%s h","hunter2"),
    ("aws configure set aws_secret_access_key %s","wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("export AWS_SESSION_TOKEN=%s","FwoGZXIvYXdzEBYaDHqa0AP"),
    ("gcloud auth activate --key %s","a1b2c3d4e5"), ("vault kv put secret/x password=%s","hunter2"),
    ("vault write auth/userpass/login/me password=%s","hunter2"),
    ("kubectl create secret docker-registry r --docker-password=%s","hunter2"),
    ("kubectl config set-credentials me --token=%s","abc.def"),
    ("helm repo add r u --username me --password %s","hunter2"),
    ("npm login --auth-type=legacy; npm set //r/:_password=%s","aHVudGVyMg=="),
    ("npm token revoke %s","npm_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"),
    ("poetry config pypi-token.pypi %s","pypi-AgEIcHlwaS5vcmcCJDNhYjQ"),
    ("twine upload -p %s d/*","hunter2"), ("cargo login %s","cioABCDEF0123456789abcdef012345678"),
    ("gh secret set X --body %s","hunter2secret"),
    ("gh api -H 'Authorization: token %s' x","abc"), ("glab auth login --token %s","abc"),
    ("firebase deploy --token \"%s\"","1//0abc-def"), ("netlify deploy --auth %s","abc123def456"),
    ("vercel --token %s","abc123"), ("fly secrets set K=%s","hunter2"),
    ("heroku config:set PASSWORD=%s","x1"),
    ("flyctl auth token %s","fo1_abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"),
    ("export PGPASS=%s","hunter2"),
    ("set PASSWORD=%s","hunter2"), ("setx API_TOKEN %s","abc123"), ("$env:DB_PASSWORD='%s'","a b"),
    ("$password = '%s'","a b"), ("ConvertTo-SecureString '%s' -AsPlainText","P@ss w0rd"),
    ("const apiKey = \"%s\";","abc"), ("password: '%s'","it is a secret"),
    ("  api_token: %s","abcdef"),
    ("client_secret = \"%s\"","abc"), ("<password>%s</password>","hunter2"),
    ("spring.datasource.password=%s","hunter2"), ("-Djavax.net.ssl.keyStorePassword=%s","changeit"),
    ("jdbc:mysql://h/d?user=me&password=%s","hunter2"),
    ("Server=h;Database=d;User Id=me;Password=%s;","P@ss"), ("Server=h;Uid=me;Pwd=%s;","P@ss"),
    ("git remote set-url origin https://x-access-token:%s@github.com/a/b","abc"),
    ("git -c http.extraheader='AUTHORIZATION: basic %s' fetch","eDphYmM="),
    ("git config credential.helper '!f() { echo password=%s; }; f'","hunter2"),
    ("pip install --index-url https://u:%s@r/simple x","p@w"), ("ftp://u:%s@h","p@w@"),
    ("sshpass -p%s ssh h","hunter2"), ("expect -c 'send \"%s\\r\"'","hunter2"),
    ("telegram: curl https://api.telegram.org/bot%s/x",
     "987654321:AAF-abcdefghijklmnopqrstuvwxyz01234"),
    ("python x.py --password='%s'","it's".replace("'","")), ("./x --db-pass %s","hunter2"),
    ("./x -pass %s","hunter2"),
    ("./x --pwd=%s","hunter2"), ("./x --apikey %s","abc"), ("./x --api_key=%s","abc"),
    ("./x --access-key %s","abc123abc"), ("./x --auth-token=%s","abc"),
    ("./x --bearer-token %s","abc"),
    ("./x --signing-secret %s","abc"), ("./x --cred=%s","abc"), ("./x --sig %s","a1b2c3d4e5f6"),
    ("export GH_PAT=%s","abcd1234"), ("ENV DB_PASSWD %s","hunter2"),
    ("curl -H 'X-Token:%s' u","abc123"), ("curl -H 'token: %s' u","abc123"),
    ("curl 'u?key=%s'","AIzaSyD-abc123"), ("curl 'u?apikey=%s&x'","abc"),
    ("curl 'u?client_secret=%s'","abc"), ("curl 'u?password=%s'","a%20b"),
    ("curl -G u --data-urlencode 'password=%s'","hunter2"),
    ("curl -d '{\"auth\":{\"pass\":\"%s\"}}' u","hunter2"),
    ("psql \"user=me password='%s' host=h\"","a b"), ("PGPASSWORD='%s' pg_dump","a b"),
    ("mysql -u me --password=%s -e 'x'","h!u"), ("mysqldump -ume -p\"%s\" db","a b"),
    ("mongo -u me --password %s","hunter2"), ("influx -username me -password %s","hunter2"),
    ("sshpass -e ssh h; SSHPASS='%s'","x y"), ("export VAULT_TOKEN=%s","hvs.CAESIabc"),
    ("export CLOUDFLARE_API_TOKEN=%s","abcdef"), ("export AZURE_CLIENT_SECRET=%s","a~b.c"),
    ("export TWILIO_AUTH_TOKEN=%s","abcdef0123456789abcdef0123456789"),
    ("export DATADOG_API_KEY=%s","abcdef0123456789abcdef0123456789"),
    ("export SENTRY_AUTH_TOKEN=%s","abc"), ("export AUTH=%s","bearerX1"),
    ("export AUTH_SECRET=%s","abc"), ("export NEXTAUTH_SECRET=%s","abc"),
    ("export COOKIE_SECRET='%s'","a b"), ("export SESSION_KEY=%s","abcdefgh"),
    ("export ENCRYPTION_KEY=%s","abc"),
    ("cast send --private-key %s",
     "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"),
    ("export SIG=%s","abcdef12"), ("wrangler secret put X <<< %s","hunter2"),
    ("echo \"%s\" | wrangler secret put X","hunter2"),
    ("echo -n '%s' | docker secret create x -","hunter2"), ("echo %s | kinit me","hunter2"),
    ("echo '%s' | su -c id","hunter2"), ("yes %s | passwd me","hunter2"),
    ("echo \"root:%s\" | sudo chpasswd","hunter2"), ("usermod -p '%s' me","$6$abc$def"),
    ("net user me %s /add","hunter2"), ("cmdkey /add:h /user:me /pass:%s","hunter2"),
    ("runas /savecred; psexec -u me -p %s","hunter2"), ("winscp sftp://me:%s@h","hunter2"),
    ("tar c x | openssl enc -pass pass:%s","hunter2"), ("7z a -p'%s' x.7z","a b"),
    ("rar a -hp%s x.rar","hunter2"),
    ("qpdf --password=%s a b","hunter2"), ("pdftk a.pdf input_pw %s","hunter2"),
    ("cryptsetup luksOpen <<< '%s'","a b"), ("security add-generic-password -a me -w %s","hunter2"),
    ("security unlock-keychain -p %s x","hunter2"), ("keyring set s me <<< %s","hunter2"),
    ("git push https://oauth2:%s@gitlab.com/a/b","glpat-abc"), ("git clone https://:%s@h/x","tok"),
    ("composer config github-oauth.github.com %s","ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
    ("npm publish --otp=%s","123456"), ("gradle -PnexusPassword=%s","hunter2"),
    ("mvn -Dpassword=%s","hunter2"), ("java -Ddb.password=%s -jar x","hunter2"),
    ("dotnet user-secrets set Db:Password %s","hunter2"),
    ("rails r \"User.create(password: '%s')\"","a b"), ("node -e \"process.env.TOKEN='%s'\"","a b"),
    ("python -c \"import x; x.login('me', password='%s')\"","a b"), ("const secret = '%s'","a b"),
    ("secret := \"%s\"","a b"), ("api_key: '%s',","abc"), ("\"access_token\" : \"%s\"","abc"),
    ("<add key=\"Password\" value=\"%s\"/>","hunter2"), ("AUTH_TOKEN: %s","abc"),
    ("--from-literal=api-key=%s","abc"),
    ("--set secrets.apiKey=%s","abc"), ("-e TOKEN=%s","abc"), ("--env API_SECRET=%s","abc"),
    ("--build-arg PASS=%s","abc"),
    # a line that goes on, what is quoted, and what a value may look like
    ("export DB_PASSWORD=\\\n%s", "hunter2"), ("mysql \\\n  -u me \\\n  -p%s x", "hunter2"),
    ("docker login \\\n  -u me \\\n  -p %s r.io", "hunter2"), ("curl -u \\\n me:%s u", "hunter2"),
    ("PASSWORD='%s'", "{br}ace"), ("PASSWORD='%s'", "(pa)ren"), ("PASSWORD='%s'", "*star"),
    ("PASSWORD='%s'", "~tilde!x"), ("PASSWORD='%s'", "no way in"), ("PASSWORD='%s'", "1 way"),
    ("PASSWORD='%s'", "env-x1"), ("password=%s", "none-x1"), ("PASSWORD=%s", "config-x1"),
    ("PASSWORD=$'%s\\n'", "hunter2"), ("PASSWORD='it'\\''s %s'", "hunter2"),
    ("PASSWORD=\"a\\\"%s\"", "hunter2"), ("PASSWORD='%s'", "hun\nter2"), ("SECRET = r'%s'", "abc"),
    ("secret_key = b'%s'", "abc"), ("TOKEN=$(echo '%s')", "hunter2"), ("TOKEN=`echo %s`", "abc"),
    ("${DB_PASS:=%s}", "hunter2"), ("${DB_PASS:-%s}", "hunter2"),
    # names
    ("export WIFI_PSK=%s", "hunter2"), ("export MY_PIN=%s", "hunter2"), ("dbPwd=%s x", "hunter2"),
    ("$pw = \"%s\"", "hunter2"), ("launchctl setenv API_KEY %s", "hunter2"),
    ("[Environment]::SetEnvironmentVariable('API_KEY','%s','User')", "hunter2"),
    ("define('DB_PASSWORD', '%s');", "hunter2"), ("#define WIFI_PASSWORD \"%s\"", "hunter2"),
    ("os.environ.setdefault('TOKEN', '%s')", "hunter2"), ("x.set_password('%s')", "hunter2"),
    ("password: str = '%s'", "hunter2"), ("$ENV{TOKEN}=\"%s\"", "hunter2"),
    ("env:\n  - name: DB_PASSWORD\n    value: %s", "hunter2"),
    ("{\"name\":\"DB_PASSWORD\",\"value\":\"%s\"}", "hunter2"), ("PASSWORD -> %s", "hunter2"),
    ("<entry key='password'>%s</entry>", "hunter2"), ("the secret key is \"%s\"", "two words"),
    ("The password is %s", "hunter2"), ("Incorrect API key provided: %s. See", "abcd1234"),
    ("use token %s to log in", "ab12cd34"), ("curl 'u?jwt=%s'", "abcd1234"),
    ("curl -H 'Authorization: Splunk %s' u", "abcd1234"), ("x --server.password %s", "hunter2"),
    ("x _gitlab_session=%s", drawn(32, HEX)), ("cf set-env app API_TOKEN %s", "hunter2"),
    # programs
    ("curl -su 'me:%s' u", "hunter2"), ("curl -u 'DOM\\me:%s' u", "hunter2"),
    ("curl -b 'a=1; sid=%s; c=2' u", "abcdef"), ("curl -H 'Cookie: a=1; x=%s; b' u", "abcdef"),
    ("curl --cert c.pem:%s u", "hunter2"), ("git clone https://%s:x-oauth-basic@h/x", "abcd1234"),
    ("gh secret set T -b '%s'", "hunter2"), ("eas secret:create --name X --value %s", "hunter2"),
    ("aws ssm put-parameter --type SecureString --value '%s'", "hunter2"),
    ("ConvertTo-SecureString -String '%s' -AsPlainText", "hunter2"),
    ("az keyvault secret set -n n --value '%s'", "hunter2"), ("snyk auth %s", "hunter2"),
    ("printf %s | gcloud secrets versions add s --data-file=-", "hunter2"),
    ("echo '%s' | vercel env add S production", "hunter2"), ("bw unlock %s", "hunter2"),
    ("vercel env add S production <<< '%s'", "hunter2"), ("sudo -S id <<EOF\n%s\nEOF", "hunter2"),
    ("pulumi config set --secret dbPassword %s", "hunter2"), ("ngrok authtoken %s", "hunter2"),
    ("mc alias set m http://h me %s", "hunter2"), ("poetry config http-basic.x me %s", "hunter2"),
    ("bundle config gems.x.com me:%s", "hunter2"), ("npm config set _auth %s", "hunter2"),
    ("mysqlsh root:%s@localhost", "hunter2"), ("tsql -S h -U me -P %s", "hunter2"),
    ("mysql -e \"SET PASSWORD FOR 'me'@'h' = '%s'\"", "hunter2"),
    ("psql -c \"CREATE ROLE me LOGIN PASSWORD '%s'\"", "hunter2"), ("redis-cli AUTH %s", "hunter2"),
    ("cqlsh -u me -p %s h", "hunter2"), ("neo4j-admin set-initial-password %s", "hunter2"),
    ("plink -pw %s me@h", "hunter2"), ("openssl passwd -6 -salt ab '%s'", "hunter2"),
    ("openssl dgst -hmac '%s' f", "hunter2"), ("htpasswd -nbB me %s", "hunter2"),
    ("echo 'h:5432:db:me:%s' > ~/.pgpass", "hunter2"), ("qpdf --encrypt %s o 256", "hunter2"),
    ("nmcli d wifi connect s password '%s'", "two words"), ("swaks -ap %s -t x", "hunter2"),
    ("requests.get(u, auth=('me', '%s'))", "hunter2"), ("db.auth('me','%s')", "hunter2"),
]
INNOCENT = [
    "git show 3812fab9c0b7a1d2e3f4a5b6c7d8e9f0a1b2c3d4", "git log --author='Jane Doe' --oneline",
    "git log --author=jane", "ssh -p 8080 host", "docker run -p 8080:80 x", "psql -p 5432 -h db",
    "cat 123e4567-e89b-12d3-a456-426614174000.jsonl", "sort --key=2,2 f", "sort -t= -k2 f",
    "rg 'key=value' src", "cat src/AuthenticationProviderFactoryTest.java",
    "cat docs/2025-12-24T21-37-2ccb51c5-session-notes.json", "ls ~/.ssh/id_rsa.pub",
    "ssh -i ~/.ssh/deploy_key host", "rg max_tokens=4096 src", "python x.py --max-tokens 4096",
    "rg 'password' src", "export TOKEN=$TOKEN", "export API_KEY=\"$(op read op://x/y)\"",
    "GITHUB_TOKEN=${GITHUB_TOKEN} gh pr list", "curl -H \"Authorization: Bearer $TOKEN\" x",
    "echo $PASSWORD | sudo -S ls", "monkey business, keyboard: 3", "cat secret/list.py",
    "ssh git@host:22/x", "git clone git@github.com:a/b.git", "curl http://localhost:8080/@scope/x",
    "docker run -u 1000:1000 x",
    "docker run --user 1000:1000 x", "key = lambda x: x[1]", "sorted(a, key=len)",
    "{\"key\": \"value\"}", "primary_key: id", "token = get_token()", "password = input('x')",
    "api_key = os.environ['API_KEY']", "if token == other:", "pytest -k test_auth",
    "echo 'PASS: 3 FAIL: 0'", "PASS=0; FAIL=1", "passed: 3", "--sig-proxy=false", "--signal=KILL",
    "design=flat", "--password-stdin", "--passphrase-file ~/x", "--key-file=/etc/x.pem",
    "ssl_key: /etc/x.pem", "cd /home/me/work/sessions/2026/01/some-long-directory-name",
    "compass=3", "tokens: 512", "npm run build -- --tokenizer=gpt2",
    "echo sha256-47DEQpj8HBSa-/TImW-5JCeuQeRkm5NMpJWZG3hSuFU= | cat".replace(
        "sha256-47DEQpj8HBSa-/TImW-5JCeuQeRkm5NMpJWZG3hSuFU=", "abc"),
    "shasum -c " + "a3" * 32, "rg 'TODO(auth)' src", "author: Jane", "authority=1",
    "git config user.signingkey",
    "ssh-keygen -t ed25519 -C me@x", "keyctl show", "rg '\\bpwd\\b'", "PWD=/x/y make", "cd $OLDPWD",
    "kubectl get secret db -o yaml", "gh secret list", "gh auth status",
    "aws sts get-caller-identity",
    "pass show mail", "go test -run TestCreateUserWithInvalidPasswordReturnsError",
    "toolu_01" + drawn(22), "msg_01" + drawn(22), "call_" + drawn(24), "req_011C" + drawn(20),
    "http://user@host/x", "-u origin main", "git push -u origin feature/x",
    "tar -xzf a_very_long_archive_name_v1_2_3_linux_x86_64_musl.tar.gz", "cookie policy: none",
    "type Session = string", "session=3", "basic auth is off", "the bearer of news", "tail -p",
    "mysql -p db", "rg 'sk-' src", "echo done | sudo tee f", "feat: mask secrets in commands",
    "token_count=3",
    "TOKEN_LIMIT=4096", "x-amz-security-token", "keys=3", "\"keyword\": \"abcd1234\"", "IDENTIFIED",
    "TestUserAuthFlowWithOAuth2AndRefreshTokens",
    "node_modules/.pnpm/x@1.2.3_abcdef12/node_modules/x",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "https://host:443/x?y=a@b",
    "https://docs.example.com/some/Long-Path-2024-With-Words/v2/Index.html",
    "rsync -a host:src dst", "grep -rn \"password=\" src", "grep -rn 'api_key:' config/",
    "rg 'Authorization: Bearer' src", "helm template . --set auth.existingSecret=db-secret",
    "export API_KEY=\"${API_KEY:-}\"", "${TOKEN:?must be set}", "read -s -p \"Password: \" PASS",
    "gpg --export-secret-keys ABCD1234", "grep \"token: \" a\necho \"x\"", "sc_auth list",
    "PUBLIC_KEY=\"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5\"", "docker run \\\n  -u 1000:1000 \\\n  nginx",
    "password: \"{{ vault_password }}\"", "token: '${TOKEN}'", "password='$PASSWORD'",
    "password: process.env.PASSWORD,", "the password is wrong", "unexpected token is here",
    "curl -H 'Authorization: Bearer ${TOKEN}' u", "password: str = Field(...)", "grep -E 'a:b' f",
    "sudo -u postgres mkdir -p data/x", "docker exec -u postgres db psql", "tar -su f",
    "kubectl create secret generic db --from-env-file=.env", "az keyvault secret list -n v",
    "kubectl get secret my-secret-2024abc -o yaml", "make test-token TOKEN_ID=abc12345",
    "the token is base64 encoded", "cargo test --package token lexer2024", "glab mr list -t bug",
    "chromium --password-store=basic", "./bench --token-bucket 100rps",
    "bundle config set without development:test", "doctl compute ssh -t x",
    "openssl rand -hex 32", "pip install -p x", "vercel env ls", "getenv('API_KEY', '')",
]


def leaks(shape, secret):
    """Whether more than two characters of any word of the secret are left."""
    told = so.mask_secrets(shape.replace("%%", "\0").replace("%s", secret).replace("\0", "%"))
    frame = so.mask_secrets(shape.replace("%%", "%").replace("%s", "$X"))
    return any(part in told and part not in frame for part in re.split(r"[ @:,;]", secret)
               if len(part) > 2)


def test_secrets_are_masked():
    told = [shape % secret if "%%" in shape else shape.replace("%s", secret)
            for shape, secret in SECRETS if leaks(shape, secret)]
    # Nothing says that these are secrets, or they look like the variable $6.
    missed = ["expect -c 'send \"hunter2\\r\"'", "usermod -p '$6$abc$def' me",
              "npm publish --otp=123456"]
    assert told == missed
    with open(os.path.join(HERE, "docs", "accuracy.md"), encoding="utf-8") as page:
        assert (f"| {len(SECRETS)} shapes of secrets | {len(SECRETS) - len(missed)} masked |"
                in page.read())


def test_a_secret_in_an_address_that_became_a_path():
    path = so.canonical_path("https://me:p@ss@host/x.git", "/w")
    assert so.mask_secrets(path) == "/w/https:/me:***@host/x.git"
    assert so.mask_secrets("C:/w/node_modules/x@1.2/a.js") == "C:/w/node_modules/x@1.2/a.js"


def test_innocent_words_are_kept():
    assert [text for text in INNOCENT if so.mask_secrets(text) != text] == []


def commands_in(value):
    """Every command in a transcript's JSON, strings and lists of words alike."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("command", "cmd", "script") and isinstance(part, (str, list)):
                yield from ([part] if isinstance(part, str)
                            else (word for word in part if isinstance(word, str)))
            if (key in ("arguments", "input", "params") and isinstance(part, str)
                    and part[:1] == "{"):
                try:
                    part = json.loads(part)
                except ValueError:
                    pass
            yield from commands_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from commands_in(part)


@pytest.mark.skipif(not os.path.isdir(REAL),
                    reason="needs the real transcripts beside the repository")
def test_real_commands_are_kept():
    commands = set()
    for folder, _, names in os.walk(REAL):
        for name in names:
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                text = file.read()
            for part in [text] if name.endswith((".json", ".traj")) else text.split("\n"):
                try:
                    commands.update(commands_in(json.loads(part)))
                except ValueError:
                    pass
    touched = [command for command in commands if so.mask_secrets(command) != command]
    assert len(commands) > 3_000 and len(touched) <= 0.005 * len(commands)


def test_masking_grows_with_the_text():
    for part in ("eyJ-", "eyJ-é", "eyJsk-", "PASSWORD", "password=", "login ", "://a:",
                 "-----BEGIN PRIVATE KEY-----", "aB3" * 9 + "/", "-", "--key ", "echo a",
                 "| sudo -S", "curl -u ", '\\"', "key=\"", "SG." + "a" * 20, "Bearer ", "\\\n",
                 "password='\n", "pass=$(echo ", "mc alias set ", ":a:", "cookie: a=",
                 "ldappasswd ", "sl."):
        assert so.mask_secrets(part * 2_000).count("***") <= 2_001
    code = ("import sessionoptimizer as so\n"
            "for part in ('eyJ-', 'eyJ-é', 'eyJsk-', 'aB3', '-', 'key=\"', '://a:', 'a1B/', "
            "'login '):\n"
            "    so.mask_secrets(part * (400_000 // len(part)))\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=HERE)


def test_masked_values():
    key = "ghp_" + drawn(36)
    assert (so.masked({"response_id": drawn(32), "x": drawn(32)})
            == {"response_id": drawn(32), "x": "***"})
    assert (so.masked({"db_pw": "Hunter2x9Kq", "X-pw": "Hunter2x9Kq", "power": "Hunter2x9Kq"})
            == {"db_pw": "***", "X-pw": "***", "power": "Hunter2x9Kq"})
    value = {"tool": "Bash", "n": 3, "x": None, "ok": True, "args": [{"token": key}, ("-p", key)],
             f"at {key}": [1.5]}
    assert so.masked(value) == {"tool": "Bash", "n": 3, "x": None, "ok": True,
                                "args": [{"token": "***"}, ["-p", "***"]], "at ***": [1.5]}
    assert so.masked({"password": "it's\nx\\", "tokens": ["a"], "secret": ["b", "c"]}) == {
        "password": "***", "tokens": ["a"], "secret": ["***", "***"]}
    pairs = [{"name": "DB_PASSWORD", "value": "hunter2"}, {"name": "x", "value": "y"}]
    assert so.masked(pairs) == [{"name": "DB_PASSWORD", "value": "***"}, pairs[1]]
    words = ["mysql", "-u", "me", "-phunter2", "db"]
    assert so.masked({"x": words, "y": words[:3]}) == {
        "x": ["mysql", "-u", "me", "-p***", "db"], "y": words[:3]}
    stored = {"content_hash": "0123456789abcdef", "operation": "build", "query": "0123456789abcdef",
              "events": [{"operation": "0123456789abcdef", "query": "prompt 0123456789abcdef"}]}
    assert so.masked(stored) == stored
    assert so.masked(stored, hashes=False) == {"operation": "build", "query": "0123456789abcdef",
                                               "events": [{}]}


# ==================================================================================================
# Shell
# ==================================================================================================

# What shell commands read, search and change: commands run in /w.

W = "/w"


READS = [  # command, reads, pure
    ("cat a.py", [("/w/a.py", 1, None)], True),
    ("cat ./sub/../a.py", [("/w/a.py", 1, None)], True),
    ("cat /w/a.py", [("/w/a.py", 1, None)], True),
    ("cat -n 'a b.py' c.py", [("/w/a b.py", 1, None), ("/w/c.py", 1, None)], True),
    ("cat a\\ b.py # why", [("/w/a b.py", 1, None)], True),
    ("head a.py", [("/w/a.py", 1, 10)], True),
    ("head -50 a.py", [("/w/a.py", 1, 50)], True),
    ("head -n 50 a.py", [("/w/a.py", 1, 50)], True),
    ("head -n50 a.py 2>/dev/null", [("/w/a.py", 1, 50)], True),
    ("head --lines=5 a.py", [("/w/a.py", 1, 5)], True),
    ("tail -n 20 a.py", [("/w/a.py", -20, None)], True),
    ("tail -n +20 a.py", [("/w/a.py", 20, None)], True),
    ("head -c 100 a.py", [], False),
    ("sed -n '1,80p' a.py", [("/w/a.py", 1, 80)], True),
    ("sed -n 5p a.py", [("/w/a.py", 5, 5)], True),
    ("sed -n '5,$p' a.py", [("/w/a.py", 5, None)], True),
    ("sed -n '1,5p;8,9p' a.py", [("/w/a.py", 1, 5), ("/w/a.py", 8, 9)], True),
    ("sed -n -e 1,5p -e 8,9p a.py", [("/w/a.py", 1, 5), ("/w/a.py", 8, 9)], True),
    ("sed 20q a.py", [("/w/a.py", 1, 20)], True),
    ("sed 's/a/b/' a.py", [], False),
    ("awk 'NR>=3 && NR<=9' a.py", [("/w/a.py", 3, 9)], True),
    ("awk 'NR==4{print}' a.py", [("/w/a.py", 4, 4)], True),
    ("awk '{print $2}' a.py", [], False),
    ("nl -ba a.py", [("/w/a.py", 1, None)], True),
    ("nl -n ln a.py", [("/w/a.py", 1, None)], True),
    ("cat 'routes/$id.tsx' \"b\\$c\"", [("/w/routes/$id.tsx", 1, None), ("/w/b$c", 1, None)], True),
    ("cat - < a.py", [("/w/a.py", 1, None)], True),
    ("wsl -d Debian cat a.py", [("/w/a.py", 1, None)], True),
    ("nl -ba a.py | sed -n '10,20p'", [("/w/a.py", 10, 20)], True),
    ("sed -n '1,80p' a.py | nl", [("/w/a.py", 1, 80)], True),
    ("cat a.py | head -50", [("/w/a.py", 1, 50)], True),
    ("head -100 a.py | tail -20", [("/w/a.py", 81, 100)], True),
    ("tail -n +5 a.py | head -10", [("/w/a.py", 5, 14)], True),
    ("cat a.py | wc -l", [], False),
    ("cat a.py | python -", [], False),
    ("cat a.py | jq .x", [], False),
    ("cat a.py | sort | head -5", [], False),
    ("cat < a.py", [("/w/a.py", 1, None)], True),
    ("wc -l < a.py", [], False),
    ("cat a.py && cat b.py", [("/w/a.py", 1, None), ("/w/b.py", 1, None)], True),
    ("cat a.py; git status", [("/w/a.py", 1, None)], False),
    ("echo '== a'; cat a.py; printf '\\n'; cat b.py",
     [("/w/a.py", 1, None), ("/w/b.py", 1, None)], True),
    ("cat a.py || cat b.py", [("/w/a.py", 1, None)], False),
    ("cat a.py 2>/dev/null || true", [("/w/a.py", 1, None)], True),
    ("cd sub && cat a.py", [("/w/sub/a.py", 1, None)], True),
    ("(cd sub; cat a.py); cat b.py", [("/w/sub/a.py", 1, None), ("/w/b.py", 1, None)], True),
    ("pushd sub; cat a.py; popd; cat a.py", [("/w/sub/a.py", 1, None)], False),
    ("cd $X && cat a.py", [], False),
    ("cd $X && cat /w/a.py", [("/w/a.py", 1, None)], True),
    ("for f in a b; do cat $f.py; done", [("/w/a.py", 1, None), ("/w/b.py", 1, None)], True),
    ('for f in a.py b.py; do echo "== $f"; sed -n 1,3p "$f"; done',
     [("/w/a.py", 1, 3), ("/w/b.py", 1, 3)], True),
    ("for f in $(ls); do cat $f; done", [], False),
    ("F=a.py; cat $F", [("/w/a.py", 1, None)], True),
    ("cat $F", [], False),
    ("cat $HOME/x ~/x", [("~/x", 1, None), ("~/x", 1, None)], True),
    ("cat src/{a,b}.ts", [("/w/src/a.ts", 1, None), ("/w/src/b.ts", 1, None)], True),
    ("cat src/*.ts", [("/w/src/*.ts", 1, None)], True),
    ("bash -lc 'cat a.py'", [("/w/a.py", 1, None)], True),
    ('bash -lc "cd sub && sed -n \'1,3p\' a.py"', [("/w/sub/a.py", 1, 3)], True),
    (["bash", "-lc", "cat a.py"], [("/w/a.py", 1, None)], True),
    (["cat", "a b.py"], [("/w/a b.py", 1, None)], True),
    ("sudo -u root timeout 10 nice -n 5 cat a.py", [("/w/a.py", 1, None)], True),
    ("A=1 env B=2 time cat a.py", [("/w/a.py", 1, None)], True),
    ("find . | xargs cat", [], False),
    ("if [ -f a.py ]; then cat a.py; fi", [("/w/a.py", 1, None)], False),
    ("echo $(cat a.py)", [], False),
    ("cat <<'EOF'\ncat a.py\nEOF", [], False),
    ("cat <<EOF | head\nx\nEOF\ncat a.py", [("/w/a.py", 1, None)], False),
    ("Get-Content a.py", [("/w/a.py", 1, None)], True),
    ("Get-Content -Path 'a.py' -TotalCount 30", [("/w/a.py", 1, 30)], True),
    ("Get-Content a.py -Tail 5", [("/w/a.py", -5, None)], True),
    ("Get-Content .\\sub\\a.py | Select-Object -First 5", [("/w/sub/a.py", 1, 5)], True),
    ("Get-Content a.py | Select-Object -Skip 10 -First 5", [], False),
    ("Get-Content a.py | Select-Object Name", [], False),
    ("powershell.exe -NoProfile -Command \"Get-Content 'sub\\a.py'\"",
     [("/w/sub/a.py", 1, None)], True),
    ("pwsh -c 'gc a.py'", [("/w/a.py", 1, None)], True),
]


SEARCHES = [  # command, searches
    ("rg -n 'foo bar' src", [("foo bar", "rg /w/src")]),
    ("rg foo", [("foo", "rg /w")]),
    ("rg foo .", [("foo", "rg /w")]),
    ("rg --color=never -in foo src ./docs/", [("foo", "rg /w/docs /w/src -i")]),
    ("rg foo -g '*.py' -C 3", [("foo", "rg /w -C3 -g*.py")]),
    ("rg --files src", [("*", "rg /w/src --files")]),
    ("grep -rn 'a|b' src | head -20", [("a|b", "grep /w/src -r | head -20")]),
    ("grep -e a -e b x.py", [("a|b", "grep /w/x.py")]),
    ("cat x.py | grep y", [("y", "grep /w/x.py")]),
    ("sed -n 5,9p x.py | grep y", [("y", "grep /w/x.py:5-9")]),
    ("git status | grep y", []),
    ("grep y x.py > out", []),
    ("git -C sub grep -n foo", [("foo", "git grep /w/sub")]),
    ("git ls-files src", [("*", "git ls-files /w/src")]),
    ("find . -name '*.py' -not -path './x/*'", [("-name *.py -not -path ./x/*", "find /w")]),
    ("find . -type f | grep -v test | wc -l", [("-type f", "find /w | grep test -v | wc -l")]),
    ("fd -e py foo src", [("foo", "fd /w/src -epy")]),
    ("ls -la src", [("*", "ls /w/src -a -l")]),
    ("ls", [("*", "ls /w")]),
    ("tree -I node_modules", [("*", "tree /w -Inode_modules")]),
    ("tree -L 2 src", [("*", "tree /w/src -L2")]),
    ("sed -n '/def x/,/return/p' a.py", [("/def x/,/return/p", "sed /w/a.py")]),
    ("find . -name '*.py' | xargs grep -l foo", [("-name *.py", "find /w | xargs grep -l foo")]),
    ("find . -name '*.py' -exec grep -l foo {} +",
     [("-name *.py -exec grep -l foo {} +", "find /w")]),
    ("Select-String -Path src\\a.py -Pattern 'foo'", [("foo", "select-string /w/src/a.py")]),
    ("Get-ChildItem src -Recurse", [("*", "get-childitem /w/src -recurse")]),
    ("cmd /c dir src", [("*", "dir /w/src")]),
    ("rg foo src | findstr bar", [("foo", "rg /w/src | findstr bar")]),
]


CHANGES = [  # command, changes, kind
    ("echo x > a.py", ["/w/a.py"], "write"),
    ("echo x >> a.py 2>&1", ["/w/a.py"], "write"),
    ("make_it &> out.log", ["?"], "other"),
    ("cat a.py > b.py", ["/w/b.py"], "write"),
    ("ls 2>/dev/null >/dev/null", [], "other"),
    ("ls 2> err.log", ["/w/err.log"], "write"),
    ("cat > f.py <<'EOF'\nrm -rf x; $(touch y)\nEOF", ["/w/f.py"], "write"),
    ("cat <<-EOF >f.py\n\tx\n\tEOF\nrm g.py", ["/w/f.py", "/w/g.py"], "write"),
    ("cat a.py | tee b.py c.py", ["/w/b.py", "/w/c.py"], "write"),
    ("sed -i 's/a/b/' a.py b.py", ["/w/a.py", "/w/b.py"], "write"),
    ("sed -i.bak -e 's/a/b/' a.py && cat a.py", ["/w/a.py"], "write"),
    ("sed -i '' 's/a/b/' a.py", ["/w/a.py"], "write"),
    ("perl -pi -e 's/a/b/' a.py", ["/w/a.py"], "write"),
    ("perl -i.bak -pe 's/a/b/' a.py", ["/w/a.py"], "write"),
    ("perl -Ilib -ne 'print' a.py", ["?"], "other"),
    ("ruby -pi -e 'gsub(/a/, %q(b))' a.py", ["/w/a.py"], "write"),
    ("gawk -i inplace '{ print }' a.py", ["/w/{ print }", "/w/a.py"], "write"),
    ("awk '{ print }' a.py", [], "other"),
    ("dos2unix a.py", ["/w/a.py"], "write"),
    ("mv a.py b.py", ["/w/a.py", "/w/b.py"], "write"),
    ("cp a.py b.py", ["/w/b.py"], "write"),
    ("rm -rf build dist", ["/w/build", "/w/dist"], "write"),
    ("rm *.pyc", ["*"], "write"),
    ("rm -rf .", ["*"], "write"),
    ("echo x > $OUT", ["*"], "write"),
    ("T=$(mktemp); echo x > $T", ["/tmp/mktemp"], "write"),
    ("mkdir -p x/y && touch x/y/z", ["/w/x/y", "/w/x/y/z"], "write"),
    ("truncate -s 0 a.log", ["/w/a.log"], "write"),
    ("dd if=/dev/zero of=x.img bs=1", ["*"], "write"),
    ("patch -p1 < x.diff", ["*"], "write"),
    ("patch -p1 <<'E'\n--- a/x.py\n+++ b/x.py\n@@\nE", ["/w/x.py"], "write"),
    (("apply_patch <<'P'\n*** Begin Patch\n*** Update File: a.py\n*** Move to: b.py\n"
      "*** Add File: c d.py\nP"),
     ["/w/a.py", "/w/b.py", "/w/c d.py"], "write"),
    (["apply_patch", "*** Begin Patch\n*** Delete File: a.py\n*** End Patch"],
     ["/w/a.py"], "write"),
    (["bash", "-lc", "*** Begin Patch\n*** Update File: a.py\n*** End Patch\n"],
     ["/w/a.py"], "write"),
    (["bash", "-lc", "cd sub && apply_patch <<'P'\n*** Update File: a.py\nP\n"],
     ["/w/sub/a.py"], "write"),
    ("git checkout main", ["*"], "write"),
    ("git checkout -- a.py", ["/w/a.py"], "write"),
    ("git checkout -b topic", [], "other"),
    ("git restore a.py", ["/w/a.py"], "write"),
    ("git restore --staged a.py", [], "other"),
    ("git -C sub restore a.py", ["/w/sub/a.py"], "write"),
    ("git reset --hard", ["*"], "write"),
    ("git reset HEAD a.py", [], "other"),
    ("git stash", ["*"], "write"),
    ("git stash list", [], "other"),
    ("git pull --rebase", ["*"], "write"),
    ("git apply x.patch", ["*"], "write"),
    ("git apply --check x.patch", [], "other"),
    ("git rm a.py", ["/w/a.py"], "write"),
    ("git add -A && git commit -m 'x > y; rm z' && git push", [], "other"),
    ("git commit -m \"$(cat <<'EOF'\nit's (fine\n\nEOF\n)\"", [], "other"),
    ("git status && git diff | cat", [], "other"),
    ("git --no-pager log -3", [], "other"),
    ("black a.py", ["/w/a.py"], "write"),
    ("black .", ["*"], "write"),
    ("black --check .", [], "other"),
    ("ruff check src", [], "other"),
    ("ruff check --fix src", ["/w/src"], "write"),
    ("ruff format", ["*"], "write"),
    ("npx prettier --write a.ts", ["/w/a.ts"], "write"),
    ("npx eslint src", [], "other"),
    ("eslint --fix src", ["/w/src"], "write"),
    ("gofmt -w f.go", ["/w/f.go"], "write"),
    ("gofmt -l .", [], "other"),
    ("cargo fmt", ["*"], "write"),
    ("cargo add serde", ["?"], "other"),
    ("cargo clippy", [], "other"),
    ("cargo clippy --fix", ["*"], "write"),
    ("npm ci", ["?"], "other"),
    ("yarn", ["?"], "other"),
    ("npm run test:unit -- --watch=false", [], "other"),
    ("npm run lint:fix", ["*"], "write"),
    ("npm run build", ["?"], "other"),
    ("npm ls", [], "other"),
    ("pip install -r r.txt", ["?"], "other"),
    ("uv pip install x", ["?"], "other"),
    ("uv run pytest -q", [], "other"),
    ("poetry run python x.py", ["?"], "other"),
    ("python -m pytest tests -q 2>&1 | tail -5", [], "other"),
    ("python3 -m unittest", [], "other"),
    ("python -m black a.py", ["/w/a.py"], "write"),
    ("python x.py", ["?"], "other"),
    ("python --version", [], "other"),
    ("python - <<'EOF'\nopen('x')\nEOF", ["?"], "other"),
    ("node -e 'x'", ["?"], "other"),
    ("npx tsc --noEmit", [], "other"),
    ("go test ./...", [], "other"),
    ("go mod tidy", ["?"], "other"),
    ("make test", [], "other"),
    ("make", ["?"], "other"),
    ("pytest; mypy .; flake8", [], "other"),
    ("frobnicate --now", ["?"], "other"),
    ("frobnicate list", [], "other"),
    ("./run.sh", ["?"], "other"),
    ("bash run.sh", ["?"], "other"),
    ("bash -n run.sh", [], "other"),
    ("source .venv/bin/activate && pytest", [], "other"),
    ("find . -name '*.pyc' -delete", ["*"], "write"),
    ("find . -name '*.pyc' -exec rm {} \\;", ["*"], "write"),
    ("find . | xargs rm -f", ["*"], "write"),
    ("find . | xargs sed -i s/a/b/", ["*"], "write"),
    ("rg -l a | xargs -I{} mv {} {}.bak", ["*"], "write"),
    ("echo $(rm a.py)", ["/w/a.py"], "write"),
    ("echo `rm a.py`", ["/w/a.py"], "write"),
    ("echo '$(rm a.py)' \"a > b\"", [], "other"),
    ("diff <(sort a) <(rm b)", ["/w/b"], "write"),
    ("rm a.py; frobnicate", ["?"], "other"),
    ("git stash; frobnicate; rm a", ["*"], "write"),
    ("curl -s https://x.y/z | head", [], "other"),
    ("curl -o f.zip https://x.y/z", ["/w/f.zip"], "write"),
    ("awk '{print > \"x\"}' a", ["?"], "other"),
    ("docker ps && gh pr view 3 && gh run list", [], "other"),
    ("docker run x", ["?"], "other"),
    ("sleep 5; date; pwd; env; which x; ps aux; du -sh .", [], "other"),
    ("[ -f a ] && test -d b; [[ $x == y ]]", [], "other"),
    ("for f in a b; do rm $f.py; done", ["/w/a.py", "/w/b.py"], "write"),
    ("while read f; do rm \"$f\"; done < list", ["*"], "write"),
    ("echo 'unbalanced", ["?"], "other"),
    ("echo \"unbalanced $(", ["?"], "other"),
    ("ssh host 'rm -rf x'", ["?"], "other"),
    ("ssh host ls", ["?"], "other"),
    ("ssh -V", [], "other"),
    ("echo ssh host", [], "other"),
    ("mise run fmt", ["*"], "write"),
    ("mise run lint", [], "other"),
    ("make format", ["*"], "write"),
    ("just fmt", ["*"], "write"),
    ("npm run format:all", ["*"], "write"),
    ("npm run format:check", [], "other"),
    ("npm run prettier -- --write src", ["*"], "write"),
    ("pnpm run fix-imports", ["*"], "write"),
    ("mix format --check-formatted", [], "other"),
    ("fmt -w 80 a.txt", [], "other"),
    ("markdownlint-cli2 a.md", ["?"], "other"),
    ("Set-Content -Path a.txt -Value 'x'", ["/w/a.txt"], "write"),
    ("Remove-Item 'a.txt','b.txt' -Force", ["/w/a.txt", "/w/b.txt"], "write"),
    ("Copy-Item a.txt -Destination b.txt", ["/w/b.txt"], "write"),
    ("Copy-Item -Path a.txt b.txt", ["/w/b.txt"], "write"),
    ("cp a.txt 'b, c.txt'", ["/w/b, c.txt"], "write"),
    ("cp -t sub a.txt", ["/w/sub"], "write"),
    ("git /x/rm a.py", ["?"], "other"),
    ("git status -h", [], "other"),
    ("python x.py --version now", ["?"], "other"),
    ("Get-Process | Where-Object { $_.CPU -gt 5 } | Sort-Object CPU", [], "other"),
    ("$x = Get-Item a; $x.Name", [], "other"),
    ("", [], "other"),
]


@pytest.mark.parametrize("command, reads, pure", READS, ids=lambda value: str(value)[:60])
def test_what_a_command_reads(command, reads, pure):
    effects = so.shell_effects(command, W)
    assert (effects.reads, effects.pure) == (reads, pure)
    assert effects.kind != "read" or reads


@pytest.mark.parametrize("command, searches", SEARCHES, ids=lambda value: str(value)[:60])
def test_what_a_command_searches(command, searches):
    effects = so.shell_effects(command, W)
    assert effects.searches == searches and not effects.reads and not effects.pure
    assert effects.kind == ("search" if searches else "write" if effects.changes else "other")


@pytest.mark.parametrize("command, changes, kind", CHANGES, ids=lambda value: str(value)[:60])
def test_what_a_command_changes(command, changes, kind):
    effects = so.shell_effects(command, W)
    assert effects.changes == changes
    if kind == "write" or changes:
        assert effects.kind == ("other" if changes == ["?"] else "write")


@pytest.mark.parametrize("path, cwd, expected", [
    ("a.py", "", "a.py"), ("./x/../a.py", "", "a.py"), ("a.py", "/w/", "/w/a.py"),
    ("/a//b.py", "/w", "/a/b.py"),
    ("src\\a.py", "C:\\w", "C:/w/src/a.py"), ("C:\\w\\.\\a.py", "", "C:/w/a.py"),
    ("/c/w/a.py", "C:\\w", "C:/w/a.py"), ("c:\\w\\a.py", "", "C:/w/a.py"),
    ("a.py", "c:\\w", "C:/w/a.py"), ("c/w/a.py", "", "c/w/a.py"),
    ("~/a", "/w", "~/a"), ("..\\a.py", "C:/w/x", "C:/w/a.py"),
])
def test_canonical_path(path, cwd, expected):
    assert so.canonical_path(path, cwd) == expected


def test_windows_folder():
    assert so.shell_effects("cd sub && cat a.py", "C:\\w").reads == [("C:/w/sub/a.py", 1, None)]
    assert so.shell_effects('cat "C:\\w\\a.py"', "C:\\w").reads == [("C:/w/a.py", 1, None)]


@pytest.mark.parametrize("command", [
    "\0", "a" * 1_000_000, "'" * 999_999, '"$(' * 300_000, "((((" * 250_000, "`" * 1_000_001,
    "{a,b}" * 200_000,
    "<<E\n" * 250_000, "cat " + "$x" * 400_000, "| " * 500_000,
    "sed -n '" + "1,2p;" * 200_000 + "' f", "\\" * 999_999, "$(" * 3_000 + ")" * 3_000, "for",
    "for x", ">", "<", "2>", "<<", "|", "bash -c", "xargs", "sed -i", "git", "find",
    "find -exec", "cat <(", "${", "env", "sudo", "timeout 5", "head -n", "grep", "Get-Content",
    "awk", "[", "a=", ")" * 9, "bash -c " * 50, "cd", "cd -", "popd", "find . -exec", "python -m",
    "dd", "tar", "\ud800 > \ud800", "git -C", "sed -n p",
], ids=lambda command: repr(command[:12]))
def test_no_command_is_too_strange(command):
    assert so.shell_effects(command, W).kind in ("read", "search", "write", "other")
    assert (so.shell_effects(command.split(" ")[:2000], W).kind
            in ("read", "search", "write", "other"))
    assert isinstance(so.mask_secrets(command), str)


def test_no_random_text_is_too_strange():
    parts = [
        "cat", "sed", "-n", "-i", "'", '"', "$(", ")", "`", "|", ">", "<", "<<E", "\n", "&&", ";",
        "a.py", "1,2p", "$x",
        "{", "}", "\\", "git", "find", "-exec", "xargs", "bash -c", "head", "-5", "for", "in", "do",
        "done", "rg", "*",
        "Get-Content", "-Tail", "powershell -c", "#", "=", "tee", "awk", "nl", " ", " ", " ", "é",
        "\0", "cd", "-C"]
    rng = random.Random(3)
    for _ in range(20_000):
        text = "".join(rng.choice(parts) + rng.choice(("", " "))
                       for _ in range(rng.randrange(1, 14)))
        effects = so.shell_effects(text, W)
        assert effects.kind in ("read", "search", "write", "other")


def test_long_commands_are_cut_but_here_documents_are_not():
    assert so.shell_effects("echo a; " * 5_000 + "rm x", W).changes == ["?"]
    assert (so.shell_effects("cat > a <<'E'\n" + "x\n" * 50_000 + "E\nrm b", W).changes
            == ["/w/a", "/w/b"])


COSTLY = {  # what n of something may ask for, and n; twice as much may cost 2.5 times as much
    "a variable doubled": (lambda n: "A=xxxxxxxxxx;" + "A=$A$A;" * n + "cat $A", 30),
    "find in find": (lambda n: "find . " + "-exec find . " * n, 44),
    "an exec without an end": (lambda n: "find . " + "-exec a " * n, 500),
    "an exec with an end": (lambda n: "find . " + "-exec a ; " * n, 500),
    "commas after a brace": (lambda n: "echo {" + "," * n, 4_000),
    "braces": (lambda n: "echo " + "{a,b}" * n, 500),
    "words times choices": (lambda n: "echo " + "x" * n + "{" + "," * n + "}", 1_000),
    "at signs": (lambda n: "npx " + "@" * n + "/", 4_000),
    "wrappers": (lambda n: "sudo " * n + "cat a", 400),
    "runners": (lambda n: "uv run " * n + "cat a", 400),
    "settings": (lambda n: "A=1 " * n + "cat a", 500),
    "keywords": (lambda n: "! " * n + "cat a", 500),
    "folders": (lambda n: "cd a;" * n + "cat a", 400),
    "pipes over a search": (lambda n: "rg x" + "|a" * n, 500),
    "substitutions": (lambda n: "echo " + "$(a)" * n, 500),
    "substitutions inside each other": (lambda n: "echo " + "$(" * n + ")" * n, 400),
    "shells inside each other": (lambda n: "bash -c " * n + "x", 400),
    "variables and substitutions": (lambda n: "".join("A%d=1;$(a);" % i for i in range(n)), 200),
    "open braces": (lambda n: "cat " + "${" * n, 4_000),
    "here-documents": (lambda n: "<<E\n" * n, 2_000),
    "here-documents of other names": (lambda n: "".join("cat <<E%d\n" % i for i in range(n)), 400),
    "here-strings": (lambda n: "Get-A " + "@'\n" * n, 2_000),
    "ranges": (lambda n: "sed -n '" + "1,2p;" * n + "' f", 1_000),
    "files": (lambda n: "cat" + " a" * n, 1_000),
    "a patch of blanks": (lambda n: "*** Begin Patch\n*** Update File: a" + " " * n + "b", 4_000),
}


def operations(function, *args):
    """Calls that a function makes, its own and the interpreter's: counted,
    so the same on each machine."""
    count = 0

    def note(*_):
        nonlocal count
        count += 1

    function(*args)  # what is compiled at first use
    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", COSTLY)
def test_a_command_twice_as_long_costs_twice_as_much(name):
    make, n = COSTLY[name]
    once, twice = (operations(so.shell_effects, make(size), W) for size in (n, 2 * n))
    assert twice <= 2.5 * once
    words = [make(size).split(" ") for size in (n, 2 * n)]
    assert (operations(so.shell_effects, words[1], W)
            <= 2.5 * operations(so.shell_effects, words[0], W))


def test_the_largest_commands_end():
    """What a regular expression does inside is not counted: a hundred times the sizes,
    in a minute."""
    code = ("import test_sessionoptimizer as t\n"
            "for make, n in t.COSTLY.values():\n"
            "    for text in (make(n), make(50 * n)):\n"
            "        for command in (text, text.split(' '), ['bash', '-lc', text]):\n"
            "            t.so.shell_effects(command, t.W)\n"
            "        t.so.patched_paths(text)\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60,
                   cwd=os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.parametrize("command", [
    "A=xxxxxxxxxx;" + "A=$A$A;" * 30 + "cat $A", "find . " + "-exec find . " * 22,
    "sudo " * 900 + "cat a", "echo; " * 4_000, "cat" + " a" * 9_999, ["cat"] + ["a"] * 20_000,
    "cat " + "a/" * 5_000 + "{b,c}" * 5,
], ids=lambda command: str(command)[:20])
def test_what_costs_too_much_is_not_known(command):
    assert so.shell_effects(command, W).changes == ["?"]


@pytest.mark.parametrize("command, reads", [
    ("A=src; B=$A/lib; cat $B/a.py", ["/w/src/lib/a.py"]),
    ("sudo -E env A=1 timeout 5 nice -n 5 nohup bash -c 'bash -c \"cat a.py\"'", ["/w/a.py"]),
    ("for f in a b; do for g in c d; do cat $f/$g; done; done",
     ["/w/a/c", "/w/a/d", "/w/b/c", "/w/b/d"]),
    ("cat" + " a.py" * 500, ["/w/a.py"] * 500),
    ("cat {a,b}/{c,d}/{e,f}.py",
     ["/w/%s/%s/%s.py" % (a, c, e) for a in "ab" for c in "cd" for e in "ef"]),
    ("cat > x.md <<'E'\n" + "long text " * 100_000 + "\nE\ncat a.py", ["/w/a.py"]),
    ("npx eslint@8 src; npx @scope/tool@latest list; cat a.py", ["/w/a.py"]),
])
def test_what_costs_little_is_followed(command, reads):
    effects = so.shell_effects(command, W)
    assert [path for path, _, _ in effects.reads] == reads and "?" not in effects.changes


@pytest.mark.parametrize("command, changes", [
    (None, ["?"]), (5, ["?"]), (True, ["?"]), ({"command": "ls"}, ["?"]), (["cat", 5], ["?"]),
    ([["cat"]], ["?"]), (b"cat a", ["?"]), ([], []), ((), []), ("", []), (("cat", "a"), []),
])
def test_a_command_that_is_none(command, changes):
    assert so.shell_effects(command, W).changes == changes
    assert so.shell_effects(command, {"cwd": 1}).changes == changes
    deep = command
    for _ in range(5_000):
        deep = [deep]
    assert so.shell_effects(deep, W).changes == ["?"]


@pytest.mark.parametrize("command", [
    "head -n %s a", "head -%s a", "tail -n +%s a", "sed -n %sp a", "sed -n 1,%sp a",
    "sed -n '1,+%sp' a", "sed %sq a",
    "awk NR==%s a", "awk 'NR>=1 && NR<=%s' a", "Get-Content a -Tail %s", "cat a | head -n %s"])
def test_a_number_of_4301_digits_is_no_line(command):
    assert so.shell_effects(command % ("9" * 4_301), W).reads == []
    assert so.shell_effects(command % 999, W).reads


# ==================================================================================================
# Accounting
# ==================================================================================================

class Claims(so.BaseAnalyzer):
    """An analyzer of the test's own: one issue with these claims."""

    def __init__(self, claims=None, measured=False, tokens=0, events=(), cost=0.0,
                 severity=Severity.MEDIUM):
        self.made = dict(claims=claims or {}, measured=measured, estimated_waste_tokens=tokens,
                         events_involved=list(events), estimated_waste_cost=cost)
        self.severity = severity

    def analyze(self, session):
        yield so.EfficiencyIssue("own", IssueType.UNUSED_CONTEXT, self.severity, "what",
                                 "do it", **self.made)


def charged(session, *analyzers):
    """What each analyzer's issue is charged, in the order given, and the report; the parts are
    checked to add up."""
    analyzers = list(analyzers)
    issues = []
    for analyzer in analyzers:
        issues += list(analyzer.analyze(session))

    class Given(so.BaseAnalyzer):
        def analyze(self, session):
            return issues
    report = so.build_report(session, [Given()])
    assert (report.total_waste_tokens == sum(issue.charged_tokens for issue in issues)
            <= session.total_tokens)
    assert report.total_waste_cost == pytest.approx(sum(issue.charged_cost for issue in issues))
    assert report.total_waste_cost <= session.estimated_cost + 1e-12
    assert report.measured_waste_tokens == sum(issue.charged_tokens for issue in issues
                                               if issue.measured)
    assert (report.measured_waste_cost
            == pytest.approx(sum(issue.charged_cost for issue in issues if issue.measured)))
    assert report.efficiency_score == pytest.approx(
        100 * (1 - report.total_waste_tokens / session.total_tokens)
        if session.total_tokens else 100)
    return [issue.charged_tokens for issue in issues], report


# name, claims of each issue (claims, measured), what each is charged; the events: 100 in 50 out,
# 200 in, 50 out
LEDGER = [
    ("one", [({"e1": (40, 10)}, True)], [50]),
    ("never more than the event has", [({"e1": (999, 999), "e2": (999, 5)}, True)], [350]),
    ("negative is nothing", [({"e1": (-5, 20)}, True)], [20]),
    ("the larger of two measured", [({"e2": (50, 0)}, True), ({"e2": (80, 0)}, True)], [0, 80]),
    ("the larger of two estimated", [({"e2": (80, 0)}, False), ({"e2": (50, 0)}, False)], [80, 0]),
    ("a tie goes to the first", [({"e2": (80, 0)}, True), ({"e2": (80, 0)}, True)], [80, 0]),
    ("measured first, the estimate adds the rest",
     [({"e2": (120, 0)}, False), ({"e2": (80, 0)}, True)], [40, 80]),
    ("a smaller estimate adds nothing",
     [({"e2": (60, 0)}, False), ({"e2": (80, 0)}, True)], [0, 80]),
    ("an equal estimate adds nothing",
     [({"e2": (80, 0)}, False), ({"e2": (80, 0)}, True)], [0, 80]),
    ("input and output apart", [({"e1": (30, 0)}, True), ({"e1": (0, 20)}, False)], [30, 20]),
    ("other events add up",
     [({"e1": (30, 0)}, True), ({"e2": (20, 0)}, True), ({"e3": (0, 5)}, False)], [30, 20, 5]),
    ("an unknown event is nothing", [({"nobody": (30, 0)}, True)], [0]),
    ("a bare number in the event's proportion", [({"e1": 75}, True)], [75]),
    ("three on one event",
     [({"e1": (50, 0)}, True), ({"e1": (60, 20)}, False), ({"e1": (70, 0)}, False)], [50, 30, 0]),
]


@pytest.mark.parametrize("name, issues, expected", LEDGER, ids=[row[0] for row in LEDGER])
def test_every_event_is_charged_once(name, issues, expected):
    session = session_of(E("CUSTOM", 100, 50), E("CUSTOM", 200), E("CUSTOM", 0, 50))
    assert (charged(session, *[Claims(claims, measured) for claims, measured in issues])[0]
            == expected)


def test_a_bare_number_is_split_like_the_event():
    session = session_of(E("CUSTOM", 100, 50), E("CUSTOM", 200), model="opus")
    assert so.cut_claim(session.events[0], 75) == (50, 25)
    # 50 in at 0.015 and 25 out at 0.075 per 1,000
    assert (charged(session, Claims({"e1": 75}))[1].total_waste_cost
            == pytest.approx(0.00075 + 0.001875))


def test_tokens_and_events_without_claims():
    session = session_of(E("CUSTOM", 100, 50), E("CUSTOM", 200), E("CUSTOM", 0, 50))
    for tokens, events, expected in ((60, ["e2"], 60), (999, ["e2"], 200), (100, ["e1", "e2"], 100),
                                     (80, [], 80), (9_999, [], 400),
                                     (0, ["e1"], 0), (5, ["nobody"], 0), (-5, ["e1"], 0)):
        assert charged(session, Claims(tokens=tokens, events=events))[0] == [expected]
    spread = so.claims_of(so.Analysis(session), list(Claims(tokens=80).analyze(session))[0])
    # pro rata: 150, 200 and 50 of 400
    assert list(map(so.cut_claim, session.events, spread.values())) == [(20, 10), (40, 0), (0, 10)]


def test_a_session_wide_claim_adds_only_what_is_not_charged_yet():
    session = session_of(E("CUSTOM", 100, 50), E("CUSTOM", 200), E("CUSTOM", 0, 50))
    # of the 80 spread over all, e2's 40 are within the measured 150; 40 more elsewhere
    assert charged(session, Claims(tokens=80), Claims({"e2": (150, 0)}, True))[0] == [40, 150]


def test_totals_without_events_count_as_one_event():
    session = so.Session("s", "A", "t", total_tokens_input=10_000,
                         total_tokens_output=5_000, model="opus")
    parts, report = charged(session, Claims(tokens=3_000))
    assert parts == [3_000] and report.efficiency_score == pytest.approx(80)
    assert report.total_waste_cost == pytest.approx(0.030 + 0.075)  # 2,000 in and 1,000 out
    session.total_duration_ms = 90 * 60_000
    assert so.build_report(session, [so.LongSessionAnalyzer()]).total_waste_tokens == 1_500


def test_unattributed_tokens_belong_to_nobody():
    session = session_of(E("CONTEXT_LOAD", 500, source="unattributed"), E("CUSTOM", 100))
    assert charged(session, Claims({"e1": (500, 0)}), Claims(tokens=600))[0] == [0, 100]


def test_every_analyzer_at_once_never_exceeds_the_session():
    generator = random.Random(11)
    kinds = ["FILE_READ", "SEARCH", "ERROR", "THINKING", "AI_RESPONSE", "TOOL_CALL",
             "CONTEXT_LOAD", "FILE_WRITE"]
    for _ in range(150):
        events = [E(generator.choice(kinds), generator.choice((0, 5, 900, 30_000)),
                    generator.choice((0, 5, 900)),
                    _at=number * generator.choice((1, 8)), _agent=generator.choice(("", "", "b")),
                    _write=0, _read=generator.choice((0, 40_000)), file_path=generator.choice("ab"),
                    query=generator.choice("ab"), message=generator.choice("ab"), tool="t",
                    source=generator.choice(("", "compaction", "unattributed")))
                  for number in range(generator.randrange(40))]
        charged(session_of(*events), *[cls() for cls in so.BUILT_IN_ANALYZERS])


def calls_of_a_window():
    """One window on opus: a read of 500 tokens enters with the second call."""
    return [
        E("CONTEXT_LOAD", 1_000, source="system", _write=1_000), E("AI_RESPONSE", 0, 0),
        # e3 lies at 1,000 to 1,500
        read_of(tokens=500, _write=500), E("AI_RESPONSE", 0, 10, _read=1_000),
        # reaches it whole
        E("USER_MESSAGE", 100, _write=100), E("AI_RESPONSE", 0, 10, _read=1_500),
        E("CONTEXT_LOAD", 400, source="cache rebuild", _write=400),
        # reaches 200 of it
        E("USER_MESSAGE", 100, _write=100), E("AI_RESPONSE", 0, 10, _read=1_200)]


def cost_of(event, *analyzers, session):
    return charged(session, Claims({event: (10**9, 0)}, True))[1].total_waste_cost


def test_waste_costs_what_it_was_billed_at_and_every_time_it_was_sent_again():
    session = session_of(*calls_of_a_window(), model="opus")
    # 500 at the five-minute write price, 0.01875, and 500 + 200 sent again at 0.0015
    assert cost_of("e3", session=session) == pytest.approx(0.009375 + 0.00105)
    # the system prompt: 1,000 at 0.01875, sent again whole by three calls
    assert cost_of("e1", session=session) == pytest.approx(0.01875 + 0.0045)
    # the last prompt enters with the last call and is never sent again
    assert cost_of("e8", session=session) == pytest.approx(0.001875)


def test_carry_ends_with_the_window_and_stays_with_the_agent():
    events = calls_of_a_window() + [
        E("CONTEXT_LOAD", 50, _write=50, **COMPACTION), E("AI_RESPONSE", 0, 1, _read=5_000),
        E("CUSTOM", 5, _agent="b"), E("AI_RESPONSE", 0, 1, _agent="b", _read=9_000)]
    assert (cost_of("e3", session=session_of(*events, model="opus"))
            == pytest.approx(0.009375 + 0.00105))


def test_one_hour_writes_plain_input_and_models_have_their_own_prices():
    events = calls_of_a_window()
    events[2].tokens_cache_write_1h = 300  # 200 at 0.01875, 300 at 0.030
    assert (cost_of("e3", session=session_of(*events, model="opus"))
            == pytest.approx(0.00375 + 0.009 + 0.00105))
    events = calls_of_a_window()
    events[2].tokens_cache_write = 0  # plain input, 0.015
    assert (cost_of("e3", session=session_of(*events, model="opus"))
            == pytest.approx(0.0075 + 0.00105))
    events = calls_of_a_window()
    events[5].model = "sonnet"  # the call that sends 500 again reads at 0.0003
    assert (cost_of("e3", session=session_of(*events, model="opus"))
            == pytest.approx(0.009375 + 500 * 0.0003 / 1000 + 0.0003))


def test_a_cache_that_expired_carries_nothing_until_it_is_rebuilt():
    events = calls_of_a_window()[:4] + [
        E("CONTEXT_LOAD", 1_510, source="cache rebuild", _write=1_510),
        E("AI_RESPONSE", 0, 10, _read=0),
        E("USER_MESSAGE", 100, _write=100), E("AI_RESPONSE", 0, 10, _read=1_510)]
    # sent again by the last call alone: the rebuild itself is a cost of its own, not of the read
    assert (cost_of("e3", session=session_of(*events, model="opus"))
            == pytest.approx(0.009375 + 0.00075))


def test_wasted_output_costs_the_output_price():
    session = session_of(E("AI_RESPONSE", 0, 1_000), E("AI_RESPONSE", 0, 1_000), model="opus")
    assert charged(session, Claims({"e1": (0, 400)}))[1].total_waste_cost == pytest.approx(0.030)


def test_a_free_model_wastes_no_money():
    session = session_of(*calls_of_a_window(), model="grok")
    parts, report = charged(session, Claims({"e3": (500, 0)}, True))
    assert parts == [500] and report.total_waste_cost == report.estimated_cost == 0


def test_waste_never_costs_more_than_the_session():
    session = session_of(*calls_of_a_window(), model="opus")
    everything = {event.id: (10**9, 10**9) for event in session.events}
    report = charged(session, Claims(everything, True))[1]
    assert report.total_waste_tokens == session.total_tokens and report.efficiency_score == 0
    # all input at 0.01875, all output at 0.075, all reads at 0.0015;
    # a live cache would have cost a read
    assert (session.estimated_cost
            == pytest.approx((2_100 * 0.01875 + 30 * 0.075 + 3_700 * 0.0015) / 1000))
    assert report.total_waste_cost == pytest.approx(session.estimated_cost - 400 * 0.0015 / 1000)


def test_a_cost_its_analyzer_has_set_stays_on_the_issue():
    issue = so.build_report(session_of(E("CUSTOM", 100)),
                            [Claims({"e1": (10, 0)}, cost=1.25)]).issues[0]
    assert (issue.estimated_waste_cost == 1.25
            and issue.charged_cost == pytest.approx(10 * 0.015 / 1000))


def test_the_score():
    assert so.build_report(session_of(), []).efficiency_score == 100.0
    assert so.build_report(session_of(E("CUSTOM", 100)), []).efficiency_score == 100.0
    session = session_of(E("CUSTOM", 600, 400))
    assert charged(session, Claims({"e1": (250, 0)}))[1].efficiency_score == pytest.approx(75)


def test_token_breakdown_and_use_add_up():
    session = session_of(read_of(tokens=100, tool="Read"), E("AI_RESPONSE", 20, 30),
                         E("THINKING", 0, 5), E("USER_MESSAGE", 7),
                         E("CONTEXT_LOAD", 50, source="system"),
                         E("CONTEXT_LOAD", 9, source="cache rebuild"), read_of(tokens=8))
    report = so.build_report(session, [])
    assert report.token_breakdown == {"FILE_READ": 108, "AI_RESPONSE": 50, "THINKING": 5,
                                      "USER_MESSAGE": 7, "CONTEXT_LOAD": 59,
                                      "TOTAL_INPUT": 194, "TOTAL_OUTPUT": 35, "TOTAL": 229}
    assert (sum(report.token_use.values()) == 229
            and list(report.token_use.values()) == sorted(report.token_use.values(), reverse=True))
    assert report.token_use["results of Read"] == 100 and report.token_use["thinking"] == 5


def test_an_analyzer_that_raises_is_named_and_the_score_is_not_silent(optimizer):
    class Broken(so.BaseAnalyzer):
        def find(self, session):
            yield self.issue(Severity.LOW, "a", "b")
            raise RuntimeError("out of\x1b[31m luck")
    optimizer.analyzers = [Broken(), so.RepeatedFileReadAnalyzer()]
    session = optimizer.start_session("a", "t")
    for _ in range(2):
        optimizer.log_event(session.id, "FILE_READ", {"file_path": "a"}, 100)
    with pytest.warns(SessionOptimizerWarning, match="Broken: RuntimeError"):
        report = optimizer.analyze(session.id)
    assert (report.total_waste_tokens == 100
            and ["Broken" in text for text in report.analyzer_errors] == [True])
    assert "Broken" in report.recommendations[0]
    for form in ("text", "markdown", "json"):
        with pytest.warns(SessionOptimizerWarning):
            text = optimizer.export_report(session.id, form)
        assert "Broken" in text and "\x1b" not in text
        assert form == "json" or "incomplete" in text


@pytest.mark.parametrize("result", [None, [None], ["text"], 5, [{"id": "x"}]], ids=str)
def test_an_analyzer_that_gives_no_issues_is_named_or_silent(result):
    class Odd(so.BaseAnalyzer):
        def analyze(self, session):
            return result
    report = so.build_report(session_of(E("CUSTOM", 5)), [Odd(), Claims({"e1": (2, 0)})])
    assert report.total_waste_tokens == 2 and len(report.analyzer_errors) == (result is not None)


def test_issues_stand_by_severity_then_waste_and_advice_is_given_once():
    session = session_of(E("CUSTOM", 1_000), E("CUSTOM", 1_000), E("CUSTOM", 1_000),
                         E("CUSTOM", 1_000))
    report = so.build_report(session, [
        Claims({"e1": (10, 0)}, severity=Severity.LOW),
        Claims({"e2": (20, 0)}, severity=Severity.CRITICAL),
        Claims({"e3": (900, 0)}, severity=Severity.MEDIUM),
        Claims({"e4": (30, 0)}, severity=Severity.CRITICAL)])
    assert [(issue.severity.name, issue.estimated_waste_tokens) for issue in report.issues] == [
        ("CRITICAL", 30), ("CRITICAL", 20), ("MEDIUM", 900), ("LOW", 10)]
    assert report.recommendations == ["[CRITICAL] do it"]


@pytest.mark.parametrize("odd", [
    {"severity": "HIGH"}, {"issue_type": "TOKEN_SPIKE"}, {"estimated_waste_tokens": None},
    {"estimated_waste_tokens": -5}, {"suggestion": None}, {"events_involved": None},
    {"claims": None}, {"estimated_waste_tokens": 10**20}])
def test_odd_issues_of_a_users_analyzer_are_mended_or_named(odd):
    class Odd(so.BaseAnalyzer):
        def analyze(self, session):
            values = dict({"id": "i", "issue_type": IssueType.UNUSED_CONTEXT,
                           "severity": Severity.LOW, "description": "d",
                           "suggestion": "s", "estimated_waste_tokens": 100}, **odd)
            return [so.EfficiencyIssue(**values)]
    report = so.build_report(session_of(read_of(), read_of("b.py")), [Odd()])
    assert (0 <= report.total_waste_tokens <= report.total_tokens
            and 0 <= report.efficiency_score <= 100)
    assert report.issues or report.analyzer_errors


def test_what_is_no_issue_is_named():
    class Wrong(so.BaseAnalyzer):
        def analyze(self, session):
            return ["waste!"]
    report = so.build_report(session_of(read_of()), [Wrong()])
    assert "Wrong" in report.analyzer_errors[0] and "INCOMPLETE" in report.recommendations[0]


def six_calls(**metadata):
    """Six calls on opus: a read of 30,000 tokens, a pause of 20 minutes after which the cache is
    gone but for 16,000 tokens of the system prompt, and the same read again.
    Each answer keeps 100 tokens."""
    return session_of(
        E("CONTEXT_LOAD", 20_000, _at=0, _write=20_000, source="system"),
        E("USER_MESSAGE", 1_000, _at=0, _write=1_000),
        E("AI_RESPONSE", 100, 200, _at=0.1, _write=100),
        read_of(tokens=30_000, _at=0.2, _write=30_000),
        E("AI_RESPONSE", 100, 200, _at=0.3, _write=100, _read=21_000),
        E("SEARCH", 2_000, _at=0.4, _write=2_000, query="q"),
        E("AI_RESPONSE", 100, 200, _at=0.5, _write=100, _read=51_100),
        E("USER_MESSAGE", 800, _at=20.4, _write=800),
        E("CONTEXT_LOAD", 37_200, _at=20.5, _write=37_200, source="cache rebuild"),
        E("AI_RESPONSE", 100, 200, _at=20.5, _write=100, _read=16_000),
        read_of(tokens=30_000, _at=20.6, _write=30_000),
        E("AI_RESPONSE", 100, 200, _at=20.7, _write=100, _read=54_100),
        E("TOOL_CALL", 900, _at=20.8, _write=900, tool="Bash", command="make"),
        E("AI_RESPONSE", 0, 200, _at=20.9, _read=84_200), **metadata)


def cells_of(session):
    return {(cell["content"], cell["how"]): cell["tokens"] for cell in so.bill_of(session)["cells"]}


def test_the_bill_of_six_calls_as_counted_by_hand():
    session = six_calls()
    bill = so.bill_of(session)
    assert cells_of(session) == {
        ("start load", "first"): 20_000, ("start load", "carried"): 4 * 20_000 + 16_000,
        ("start load", "again"): 4_000,
        ("prompts", "first"): 1_800, ("prompts", "carried"): 5_600, ("prompts", "again"): 1_000,
        ("file reads", "first"): 60_000, ("file reads", "carried"): 120_000,
        ("file reads", "again"): 30_000,
        ("searches", "first"): 2_000, ("searches", "carried"): 4_000, ("searches", "again"): 2_000,
        ("answers kept in the context", "first"): 500,
        ("answers kept in the context", "carried"): 800,
        ("answers kept in the context", "again"): 200, ("shell", "first"): 900,
        ("output", "output"): 1_200}
    usd = so.in_usd(bill)
    assert usd["total"] == session.estimated_cost == sum(usd["models"].values())
    # 85,200 entered and 37,200 again at 0.01875 per 1,000, 226,400 carried at 0.0015,
    # 1,200 written at 0.075
    assert usd["classes"] == {"uncached_input": 0.0, "cache_write_5m": 2.295, "cache_write_1h": 0.0,
                              "cache_read": 0.3396, "output": 0.09}
    rebuild, = usd["rebuilds"]
    assert {name: rebuild[name] for name in (
        "session", "cause", "source", "gap_seconds", "tokens", "cost", "net_cost")} == {
            "session": "s", "cause": "expired", "source": "clock", "gap_seconds": 1_200,
            "tokens": 37_200, "cost": 0.6975, "net_cost": 0.6417}


def assert_adds_up(session):
    bill = so.bill_of(session)
    paid = {how: [cell for cell in bill["cells"] if cell["how"] == how]
            for how in ("first", "carried", "again", "output")}
    tokens = {how: sum(cell["tokens"] for cell in cells) for how, cells in paid.items()}
    assert tokens["first"] + tokens["again"] == session.total_tokens_input
    assert tokens["carried"] == sum(event.tokens_cache_read for event in session.events)
    assert tokens["output"] == session.total_tokens_output
    assert sum(cell["cost"] for cell in bill["cells"]) == bill["total"] == session.cost_in_pico
    assert sum(bill["classes"].values()) == sum(bill["models"].values()) == bill["total"]
    assert all(cell["tokens"] > 0 and cell["cost"] >= 0 for cell in bill["cells"])
    days = so.bill_columns(so.Analysis(session))["days"]
    assert sum(day["total_tokens"] for day in days) == session.total_tokens
    for how, cells in paid.items():
        assert sum(day["paid"].get(how, 0) for day in days) == sum(cell["cost"] for cell in cells)
    assert len({(cell["content"], cell["how"]) for cell in bill["cells"]}) == len(bill["cells"])
    for step in so.ContextWalk(session):
        fresh = sum(event.tokens_input for event in step.events)
        assert step.call is None or step.held.length == step.call.tokens_cache_read + fresh


def random_calls(generator):
    """Events of calls that read and write anything: more than the context, less, nothing."""
    kinds = ["FILE_READ", "SEARCH", "USER_MESSAGE", "AI_RESPONSE", "AI_RESPONSE", "TOOL_CALL",
             "CONTEXT_LOAD"]
    return session_of(*(
        E(generator.choice(kinds), tokens, generator.choice((0, 5, 900)),
          _at=generator.choice((-9, 1, 7)) * number, _agent=generator.choice(("", "", "b")),
          _model=generator.choice(("", "gpt-5", "unheard-of")), _write=tokens // 2,
          _hour=generator.choice((0, tokens // 2)), _read=generator.choice((0, 900, 5_000, 40_000)),
          tool="T", source=generator.choice(("", "compaction", "cache rebuild", "unattributed",
                                             "attachment")))
        for number, tokens in enumerate(generator.choice((0, 5, 900, 3_001, 30_000))
                                        for _ in range(generator.randrange(60)))))


def test_every_token_of_a_bill_is_in_one_cell_whatever_the_calls_say():
    generator = random.Random(7)
    for _ in range(200):
        assert_adds_up(random_calls(generator))


def test_bills_add_up_in_any_order():
    generator = random.Random(8)
    bills = [so.bill_of(random_calls(generator)) for _ in range(6)]
    total = so.add_bills(bills)
    assert (so.add_bills(reversed(bills))
            == so.add_bills([so.add_bills(bills[:2]), so.add_bills(bills[2:])]) == total)
    assert (total["total"] == sum(bill["total"] for bill in bills)
            == sum(cell["cost"] for cell in total["cells"]))
    assert so.add_bills([]) == so.empty_bill()


def test_what_left_unmarked_is_the_oldest_result_of_a_tool():
    session = session_of(
        E("CONTEXT_LOAD", 1_000, source="system"), read_of(tokens=500), E("SEARCH", 500, query="q"),
        E("AI_RESPONSE", 0, 1),
        # 700 have left: the read, and 200 of the search
        E("USER_MESSAGE", 100), E("AI_RESPONSE", 0, 1, _read=1_300),
        E("USER_MESSAGE", 100), E("AI_RESPONSE", 0, 1, _read=1_400))
    cells = cells_of(session)
    assert ("file reads", "carried") not in cells
    assert cells["searches", "carried"] == 2 * 300 and cells["start load", "carried"] == 2_000
    assert cells["prompts", "carried"] == 100


def test_the_load_after_a_compaction_is_start_load_and_the_rest_reload():
    session = session_of(
        E("CONTEXT_LOAD", 1_000, source="system"), E("USER_MESSAGE", 50),
        E("AI_RESPONSE", 0, 1, _read=500),
        E("CONTEXT_LOAD", 700, **COMPACTION), E("CONTEXT_LOAD", 1_500, source="system"),
        E("USER_MESSAGE", 50), E("AI_RESPONSE", 0, 1, _read=600))
    # the first call's load is 500 + 1,000; after the compaction 600 + 700 + 1,500 stand there
    assert cells_of(session) == {
        ("start load", "first"): 1_000 + 900, ("start load", "carried"): 500 + 600,
        ("reload after a compaction", "first"): 1_300, ("prompts", "first"): 100,
        ("output", "output"): 2}


def test_a_read_beyond_the_context_is_carried_but_unattributed():
    session = session_of(E("CONTEXT_LOAD", 1_000, source="system"), E("AI_RESPONSE", 0, 1),
                         E("USER_MESSAGE", 10), E("AI_RESPONSE", 0, 1, _read=1_200))
    assert cells_of(session)["unattributed", "carried"] == 200


def test_what_was_counted_elsewhere_keeps_its_content_and_has_no_first():
    told = E("CONTEXT_LOAD", source="history", contents={"start load": 800, "file reads": 300})
    session = session_of(told, E("USER_MESSAGE", 10), E("AI_RESPONSE", 0, 1, _read=1_150))
    assert cells_of(session) == {("start load", "carried"): 800, ("file reads", "carried"): 300,
                                 ("prompts", "first"): 10,
                                 ("unattributed", "carried"): 50, ("output", "output"): 1}


CAUSES = [  # name, changes to the fourth call, what happens before it, cause, source
    ("a pause longer than the cache lives", {}, [], "expired", "clock"),
    ("another model", {"model": "gpt-5"}, [], "model_switch", "transcript"),
    ("the provider names another model", {"cache_miss": "model_changed"}, [],
     "model_changed", "provider"),
    ("the provider names the system prompt", {"cache_miss": "system_changed"}, [],
     "system_changed", "provider"),
    ("the provider does not find the message", {"cache_miss": "previous_message_not_found"}, [],
     "expired", "clock"),
    ("a pause of 330 seconds", {"minutes": 5.9}, [], "not_explained", "none"),
    ("a pause of 331 seconds", {"minutes": 5.92}, [], "expired", "clock"),
    ("an hour's cache", {"hour": True}, [], "not_explained", "none"),
    ("a new process", {"hour": True}, [E("CONTEXT_LOAD", source="resume")], "resume", "transcript"),
    ("a new client", {"hour": True, "version": "2"}, [], "settings", "transcript"),
    ("a tool server", {"hour": True}, [E("CONTEXT_LOAD", source="injected", command="/mcp")],
     "settings", "transcript"),
    ("a harmless command", {"hour": True}, [E("CONTEXT_LOAD", source="injected", command="/cost")],
     "not_explained", "none"),
    ("a shorter context", {"hour": True, "lost": 500}, [], "shortened", "transcript"),
    ("rounding", {"hour": True, "lost": 400}, [], "not_explained", "none"),
    ("the provider does not know", {"hour": True, "cache_miss": "unavailable"}, [],
     "unavailable", "provider"),
    ("a reader without a clock", {"source": {"reader": "codex", "path": "p"}}, [],
     "not_explained", "none"),
]


@pytest.mark.parametrize("name, changes, before, cause, source", CAUSES,
                         ids=[case[0] for case in CAUSES])
def test_why_a_cache_was_lost(name, changes, before, cause, source):
    session = six_calls(**({"source": changes["source"]} if "source" in changes else {}))
    prompt, rebuild, call = session.events[7:10]
    call.model = changes.get("model", "")
    session.events[6].data["version"], call.data["version"] = "1", changes.get("version", "1")
    if "cache_miss" in changes:
        call.data["cache_miss"] = changes["cache_miss"]
    if "minutes" in changes:
        prompt.timestamp = E("CUSTOM", _at=changes["minutes"]).timestamp
    for event in session.events[:7] if "hour" in changes else ():
        event.tokens_cache_write_1h = event.tokens_cache_write
    rebuild.tokens_input -= changes.get("lost", 0)
    rebuild.tokens_cache_write -= changes.get("lost", 0)
    session.events[7:7] = before
    found, = so.bill_of(session)["rebuilds"]
    assert (found["cause"], found["source"]) == (cause, source)


def test_small_rebuilds_are_one_line_and_have_no_cause():
    session = six_calls()
    session.events[8].tokens_input = session.events[8].tokens_cache_write = 1_999
    bill = so.bill_of(session)
    assert (bill["rebuilds"] == []
            and bill["small_rebuilds"] == {"count": 1, "tokens": 1_999, "cost": 1_999 * 18_750_000})


def test_a_guessed_price_and_an_unpriced_model_are_told():
    bill = so.bill_of(session_of(E("CUSTOM", 10), E("CUSTOM", 10, _model="unheard-of"),
                                 E("CUSTOM", 10, _model="unpriced"),
                                 E("AI_RESPONSE", 0, 7, _model="unpriced")))
    assert 0 < bill["guessed"] < bill["total"] and bill["unpriced"] == {"calls": 1, "tokens": 17}


@pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real transcripts beside the project")
def test_the_bills_of_real_sessions_add_up():
    sessions = so.sessions_at([REAL], so.PriceList())
    assert len(sessions) > 100
    for session in sessions:
        assert_adds_up(session)


ROW = {"agent": "Claude Code", "model": "opus", "replay": {}, "start_load": 0, "large_reads": [],
       "version": "2.1.9", "project": "/home/me/shop-api"}


def test_advice_names_what_to_do_where_and_what_it_saves():
    bill = so.empty_bill()
    bill.update(total=100 * so.PICO, cells=[
        {"content": "start load", "how": "carried", "tokens": 9, "cost": 40 * so.PICO}])
    rows = [dict(ROW, id="a", bill=bill, start_load=40_000,
                 large_reads=[{"file": "x/big.json", "tokens": 20_000, "cost": 5 * so.PICO}]),
            dict(ROW, id="b", bill=bill, start_load=20_000, project="/home/me/lib", replay={
                "return 80000": [2 * so.PICO, 4 * so.PICO, 6 * so.PICO],
                "compact 200000": [-1, 9 * so.PICO, 9 * so.PICO]})]
    advice = {entry["kind"]: entry for entry in so.in_usd(so.advice_of(rows))}
    assert set(advice) == {"start_load", "large_reads", "return"}  # compacting could cost more
    start = advice["start_load"]
    assert (start["text"]
            == "shop-api loads 40k tokens before the first prompt: $40.00, 40% of its bill.")
    assert (start["saves"] == {"low": 1.0, "middle": 10.0, "high": 20.0}
            and start["project"] == "/home/me/shop-api")
    assert advice["return"]["saves"] == {"low": 2.0, "middle": 4.0, "high": 6.0}
    assert advice["return"]["point"] is False and advice["return"]["sessions"] == ["b"]
    assert advice["large_reads"]["saves"] == {"low": 0.0, "middle": 1.5, "high": 3.0}
    assert ("big.json" in advice["large_reads"]["text"]
            and "search first" in advice["large_reads"]["paste"])
    assert start["without_largest"] == advice["large_reads"]["without_largest"] == 0.0
    rows[0]["replay"] = {"compact 200000": [5 * so.PICO, -so.PICO // 5, 9 * so.PICO]}
    context, = [entry for entry in so.in_usd(so.advice_of(rows)) if entry["kind"] == "context"]
    assert (context["worse"], context["worst"], context["saves"]["middle"]) == (1, 0.2, 8.8)
    shown = so.text_sections([so.advice_section(so.in_usd(so.advice_of(rows)))])
    assert "1 worse ($0.2" in shown


def test_the_report_of_one_session_has_the_advice_for_it(optimizer):
    session = six_calls(source={"reader": "claude-code", "path": "p", "cwd": "/home/me/shop"})
    report = so.build_report(session, optimizer.analyzers)
    rows = [dict(so.bill_columns(so.Analysis(session)), id="s", agent=session.agent, model="opus")]
    assert (report.advice == so.in_usd(so.advice_of(rows))
            and [entry["kind"] for entry in report.advice] == ["large_reads"])
    # both reads: 60,000 entered, 120,000 carried, 30,000 again: $1.8675, of which 60% might do
    assert report.advice[0]["saves"] == {"low": 0.0, "middle": 0.56025, "high": 1.1205}
    assert "Large files read whole cost $1.87: a.py." in so.text_report(session, report)
    assert so.OptimizationReport.from_dict(report.to_dict()).advice == report.advice
    assert so.build_report(session_of(E("USER_MESSAGE", 10)), []).advice == []  # nothing to do


def test_advice_on_broken_prefixes_names_the_cause_and_the_client():
    session = six_calls(source={"reader": "claude-code", "path": "p", "version": "2.1.9",
                                "cwd": "/home/me/shop-api"})
    session.events[9].data["cache_miss"] = "messages_changed"
    advice, = so.advice_of(
        [dict(so.bill_columns(so.Analysis(session)), id="s", agent="A", model="m", large_reads=[])])
    assert (advice["kind"] == "broken_prefix" and "2.1.9" in advice["text"]
            and advice["sessions"] == ["s"])
    assert advice["saves"] == {"low": 0, "middle": 641_700_000_000, "high": 641_700_000_000}


def test_a_free_cache_read_carries_nothing_and_a_cache_that_never_dies_never_expires(monkeypatch):
    session = six_calls()
    session.prices = so.PriceList(
        {"opus": {"input_cost_per_token": 15e-6, "output_cost_per_token": 75e-6,
                  "cache_read_input_token_cost": 0, "cache_creation_input_token_cost": 18.75e-6}})
    cells = so.bill_of(session)["cells"]
    assert {cell["cost"] for cell in cells if cell["how"] == "carried"} == {0}
    assert so.bill_of(six_calls())["rebuilds"][0]["cause"] == "expired"
    monkeypatch.setattr(so, "SHORT_TTL", 10**9)
    assert so.bill_of(six_calls())["rebuilds"][0]["cause"] == "not_explained"


def test_odd_clocks_prove_nothing_and_mixed_writes_live_as_most_of_them():
    session = six_calls()
    for event in session.events[7:10]:
        event.timestamp = E("CUSTOM", _at=-60).timestamp
    rebuild, = so.bill_of(session)["rebuilds"]
    assert (rebuild["cause"], rebuild["gap_seconds"]) == ("not_explained", -3_624.0)
    for event in session.events:
        event.timestamp = ""
    assert so.bill_of(session)["rebuilds"][0]["gap_seconds"] is None
    # of the 2,100 that the third call wrote
    for hour, cause in ((1_400, "not_explained"), (1_000, "expired")):
        session = six_calls()
        session.events[5].tokens_cache_write_1h = hour
        assert so.bill_of(session)["rebuilds"][0]["cause"] == cause


def test_a_session_told_in_two_files_is_billed_as_in_one(tmp_path):
    """What the first file tells keeps its content in the second, and has no first there."""
    folder = os.path.join(SAMPLES, "claude-code", "resumed-session")
    files = sorted((os.path.join(place, name) for place, _, names in os.walk(folder)
                    for name in names), key=os.path.getsize)
    shutil.copy(files[-1], str(tmp_path))  # tells all of it
    first, second = sorted(so.sessions_at([folder], so.PriceList()),
                           key=lambda session: session.started_at)
    history, = [event for event in second.events if event.data.get("source") == "history"]
    assert (history.tokens == 0 and history.data["contents"]["start load"] > 16_000
            and "history" not in [event.data.get("source") for event in first.events])
    assert (("start load", "first") not in cells_of(second)
            and cells_of(second)["start load", "carried"] > 16_000)
    whole, = so.sessions_at([str(tmp_path)], so.PriceList())
    assert so.add_bills(map(so.bill_of, (first, second)))["cells"] == so.bill_of(whole)["cells"]
    assert_adds_up(second)


def test_usage_rows_add_up_to_the_row_and_every_call_is_on_its_own_day():
    session = six_calls(source={"reader": "claude-code", "path": "p", "cwd": "/home/me/shop"})
    for event in session.events[7:]:
        event.timestamp = event.timestamp.replace("2026-03-01T10:", "2026-03-02T00:")
    rows = so.usage_rows(session)
    assert {(row["day"], row["model"], row["tool"], row["project"]) for row in rows} == {
        (day, "opus", tool, "/home/me/shop") for day, tool in (
            ("2026-03-01", ""), ("2026-03-02", ""), ("2026-03-02", "Bash"))}
    sums = {name: sum(row[name] for row in rows) for name in (*so.CLASSES, "cost", "calls")}
    assert sums == {"uncached_input": 0, "cache_write_5m": 122_400, "cache_write_1h": 0,
                    "cache_read": 226_400,
                    "output": 1_200, "cost": session.cost_in_pico, "calls": 6}
    # the answer to the third call entered with the fourth, on the next day
    assert sum(row["cache_write_5m"] for row in rows if row["day"] == "2026-03-01") == 53_200
    generator = random.Random(12)
    for _ in range(100):
        session = random_calls(generator)
        rows = so.usage_rows(session)
        assert sum(row["cost"] for row in rows) == session.cost_in_pico
        assert (sum(row["cache_read"] for row in rows)
                == sum(event.tokens_cache_read for event in session.events))


@pytest.mark.parametrize("zone, days", [
    ("UTC", {"2026-03-01": (1, 1_150_650), "2026-03-02": (1, 1_573_950)}),
    # west of Greenwich: the calls after midnight are of the day before
    ("UTC+5", {"2026-03-01": (2, 2_724_600)}),
    ("UTC-13:45", {"2026-03-01": (1, 1_150_650), "2026-03-02": (1, 1_573_950)}),
    ("UTC-14", {"2026-03-02": (2, 2_724_600)})])
def test_a_call_is_paid_on_its_own_local_day(monkeypatch, utc, zone, days):
    session = six_calls()
    for event in session.events[7:]:
        event.timestamp = event.timestamp.replace("2026-03-01T10:", "2026-03-02T00:")
    set_zone(monkeypatch, zone)
    row = so.full_row(session, [])
    # 53,200 written, 72,100 read and three answers on the first day: $1.15065
    parts = so.grouped([row], "day", {})
    assert ({part["key"]: (part["sessions"], round(part["estimated_cost"] * 1e6)) for part in parts}
            == {day: (1, cost) for day, (_, cost) in days.items()})
    assert (sum(part["estimated_cost"] for part in parts)
            == pytest.approx(session.estimated_cost, abs=1e-12))
    for day, (prompts, _) in days.items():
        assert sum(part["prompts"] for part in so.day_parts(row) if part["day"] == day) == prompts
    # the 1st of March 2026 is a Sunday
    weeks = {week["key"]: week["sessions"] for week in so.grouped([row], "week", {})}
    assert weeks == {{"2026-03-01": "2026-02-23"}.get(day, day): 1 for day in days}


def told_reasons():
    """Why the provider missed its cache, by response, as the real transcripts tell it."""
    reasons = {}
    for folder, _, names in os.walk(REAL):
        for name in names:
            for line in (read(os.path.join(folder, name)).split(b"\n")
                         if name.endswith(".jsonl") else ()):
                if b"cache_miss_reason" in line:
                    message = json.loads(line).get("message", {})
                    reason = (message.get("diagnostics") or {}).get("cache_miss_reason")
                    if reason:
                        reasons[message["id"]] = reason["type"]
    return reasons


@pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real transcripts beside the project")
def test_no_expiry_is_claimed_against_what_the_provider_says():
    reasons, judged = told_reasons(), []
    for session in so.sessions_at([REAL], so.PriceList()):
        for step in so.ContextWalk(session):
            reason = reasons.get(step.call.data.get("response_id")) if step.call else None
            if reason and step.last is not None and step.kept - step.read >= so.SMALL:
                judged.append((reason, so.expired(step, session)))
    assert len(judged) >= 10
    assert [reason for reason, expired in judged if expired and reason.endswith("_changed")] == []
    assert any(expired for reason, expired in judged if reason == "previous_message_not_found")


@pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real transcripts beside the project")
def test_what_the_earlier_half_recommends_saves_in_the_later_half():
    sessions = sorted(so.sessions_at([REAL], so.PriceList()),
                      key=lambda session: session.started_at)
    earlier, later = sessions[:len(sessions) // 2], sessions[len(sessions) // 2:]
    for policy in ("return --above 80k", "compact --above 200k", "compact --above 150k"):
        if so.what_if(earlier, policy)["recommended"]:
            assert so.what_if(later, policy)["saves"]["middle"] > 0, policy


# ==================================================================================================
# Analyzers
# ==================================================================================================

def found_by(analyzer, *events, **metadata):
    return analyzer.analyze(session_of(*events, **metadata))


def check(issue, waste, severity, events, measured=True, **metadata):
    """A finding: exact tokens, severity, the events it names, and the numbers behind it."""
    assert (issue.estimated_waste_tokens, issue.severity.name) == (waste, severity)
    assert issue.events_involved == events and issue.measured is measured
    for name, value in metadata.items():
        assert issue.metadata[name] == (pytest.approx(value) if isinstance(value, float)
                                        else value), name
    assert issue.id and issue.description and issue.suggestion and json.dumps(issue.to_dict())


COMPACTION = dict(source="compaction")


def bash(text, _kind="TOOL_CALL", **data):
    return E(_kind, 10, 5, tool="Bash", command=text, **data)


REPEATED_READS = [  # name, events, (tokens, severity, ids of the events) of each finding
    ("read twice", [read_of(), read_of()], [(1000, "MEDIUM", "e1 e2")]),
    ("what the second brought counts", [read_of(), read_of(tokens=700)],
     [(700, "MEDIUM", "e1 e2")]),
    ("three times", [read_of(), read_of(tokens=10), read_of(tokens=20)],
     [(30, "HIGH", "e1 e2 e3")]),
    ("five times", [read_of()] + [read_of() for _ in range(4)], [(4000, "HIGH", "e1 e2 e3 e4 e5")]),
    ("two files", [read_of(), read_of("b.py"), read_of(), read_of("b.py", 5)],
     [(1000, "MEDIUM", "e1 e3"), (5, "MEDIUM", "e2 e4")]),
    ("spelled otherwise", [read_of("sub/../a.py"), read_of("./a.py"), read_of("/w/a.py")],
     [(2000, "HIGH", "e1 e2 e3")]),
    ("other keys", [E("FILE_READ", 9, file="a.py"), E("FILE_READ", 9, path="a.py")],
     [(9, "MEDIUM", "e1 e2")]),
    ("harmless command between", [read_of(), bash("git status"), read_of()],
     [(1000, "MEDIUM", "e1 e3")]),
    ("a search between", [read_of(), E("SEARCH", 5, query="x"), read_of()],
     [(1000, "MEDIUM", "e1 e3")]),
    ("a todo list between", [read_of(), E("TOOL_CALL", tool="TodoWrite"), read_of()],
     [(1000, "MEDIUM", "e1 e3")]),
    ("the user speaks between", [read_of(), E("USER_MESSAGE", 5), E("AI_RESPONSE"), read_of()],
     [(1000, "MEDIUM", "e1 e4")]),
    ("another file is written between", [read_of(), E("FILE_WRITE", file_path="b.py"), read_of()],
     [(1000, "MEDIUM", "e1 e3")]),
    ("an unknown command, the same content",
     [read_of(content_hash="1"), bash("./go"), read_of(content_hash="1")],
     [(1000, "MEDIUM", "e1 e3")]),
    ("a page again", [read_of(lines=[1, 100]), read_of(lines=[1, 100])],
     [(1000, "MEDIUM", "e1 e2")]),
    ("pages that overlap by half", [read_of(lines=[1, 100]), read_of(lines=[51, 150])],
     [(500, "MEDIUM", "e1 e2")]),
    ("pages that overlap by a tenth", [read_of(lines=[1, 100]), read_of(lines=[91, 190])],
     [(100, "MEDIUM", "e1 e2")]),
    ("two halves and the whole",
     [read_of(lines=[1, 50]), read_of(lines=[51, 100]), read_of(lines=[1, 100])],
     [(1000, "MEDIUM", "e1 e2 e3")]),
    ("the middle of two overlapping pages",
     [read_of(lines=[1, 60]), read_of(lines=[40, 100]), read_of(lines=[31, 130])],
     # of e2's 61 lines 21 come again, 1000 * 21 // 61; of e3's 100 lines 70
     [(344 + 700, "HIGH", "e1 e2 e3")]),
    ("a page of a whole file", [read_of(), read_of(tokens=90, lines=[10, 20])],
     [(90, "MEDIUM", "e1 e2")]),
    ("the whole after half", [read_of(lines=[1, 50]), read_of(total_lines=100)],
     [(500, "MEDIUM", "e1 e2")]),
    ("offset and limit", [read_of(offset=11, limit=10), read_of(lines=[16, 25])],
     [(500, "MEDIUM", "e1 e2")]),
    ("line numbers by other names",
     [read_of(start_line=1, end_line=10), read_of(line_range="1-10")], [(1000, "MEDIUM", "e1 e2")]),
    ("both windows", [read_of(), read_of(), E("CONTEXT_LOAD", **COMPACTION), read_of(), read_of()],
     [(1000, "MEDIUM", "e1 e2"), (1000, "MEDIUM", "e4 e5")]),
    ("each of two agents", [read_of(_agent="b"), read_of(_agent="b"), read_of(), read_of()],
     [(1000, "MEDIUM", "e1 e2"), (1000, "MEDIUM", "e3 e4")]),
    ("read, written, read twice", [read_of(), E("FILE_WRITE", file_path="a.py"), read_of(),
                                   read_of()], [(1000, "MEDIUM", "e3 e4")]),
    ("a notice in between is no read", [read_of(), read_of(tokens=5, unchanged=True), read_of()],
     [(1000, "MEDIUM", "e1 e3")]),
    # the innocent
    ("one read", [read_of()], []),
    ("nothing", [], []),
    ("pages", [read_of(lines=[1, 100]), read_of(lines=[101, 200]), read_of(lines=[201, 300])], []),
    ("pages by offset", [read_of(offset=1, limit=100), read_of(offset=101, limit=100)], []),
    ("pages that overlap by a few lines", [read_of(lines=[1, 100]), read_of(lines=[92, 191])], []),
    ("after a write", [read_of(), E("FILE_WRITE", file_path="a.py"), read_of()], []),
    ("after a write spelled otherwise",
     [read_of("/w/a.py"), E("FILE_WRITE", file_path="./b/../a.py"), read_of()], []),
    ("after a write that names nothing", [read_of(), E("FILE_WRITE"), read_of()], []),
    ("after an edit by name",
     [read_of(), E("TOOL_CALL", tool="Edit", file_path="a.py"), read_of()], []),
    ("after sed -i", [read_of(), bash("sed -i s/a/b/ a.py"), read_of()], []),
    ("after git checkout", [read_of(), bash("git checkout main"), read_of()], []),
    ("after a formatter", [read_of(), bash("black ."), read_of()], []),
    ("after a failed command that wrote",
     [read_of(), bash("sed -i s/a/b/ a.py && false", "ERROR"), read_of()], []),
    ("after another agent's write",
     [read_of(), E("FILE_WRITE", file_path="a.py", _agent="b"), read_of()], []),
    ("after an unknown command", [read_of(), bash("./deploy"), read_of()], []),
    ("after an unknown tool", [read_of(), E("TOOL_CALL", tool="mcp__x__apply"), read_of()], []),
    ("after an unknown command, other content",
     [read_of(content_hash="1"), bash("./go"), read_of(content_hash="2")], []),
    ("other content", [read_of(content_hash="1"), read_of(content_hash="2")], []),
    ("content known to be changed", [read_of(), read_of(content="changed")], []),
    ("after a compaction", [read_of(), E("CONTEXT_LOAD", **COMPACTION), read_of()], []),
    ("in another agent's window", [read_of(), read_of(_agent="b")], []),
    ("after a failed read",
     [E("ERROR", 9, tool="Read", file_path="a.py", message="no"), read_of()], []),
    ("after a read that was cut off", [read_of(truncated=True), read_of()], []),
    ("a notice that it is unchanged", [read_of(), read_of(tokens=20, unchanged=True)], []),
    ("many blocks of one response",
     [read_of(), E("AI_RESPONSE", 0, 9), E("AI_RESPONSE", 0, 9)], []),
    ("reads that name no file", [E("FILE_READ", 9), E("FILE_READ", 9)], []),
]


def copies(events):
    return [so.SessionEvent.from_dict(dict(event.to_dict(), id="")) for event in events]


@pytest.mark.parametrize("name, events, expected", REPEATED_READS,
                         ids=[row[0] for row in REPEATED_READS])
def test_repeated_file_reads(name, events, expected):
    issues = found_by(so.RepeatedFileReadAnalyzer(), *copies(events), cwd="/w")
    assert len(issues) == len(expected)
    for issue, (tokens, severity, ids) in zip(
            sorted(issues, key=lambda i: i.events_involved), expected):
        check(issue, tokens, severity, ids.split(), read_count=len(issue.claims) + 1)
        assert issue.metadata["file_path"] in ("/w/a.py", "/w/b.py")
        assert (issue.issue_type is IssueType.REPEATED_FILE_READ
                and "cache" in issue.suggestion.lower())


def search_of(query="needle", tokens=100, written=10, **data):
    return E("SEARCH", tokens, written, query=query, **data)


REPEATED_SEARCHES = [
    ("run twice", [search_of(), search_of(tokens=70, written=7)], [(77, "e1 e2")]),
    ("three times", [search_of(), search_of(), search_of()], [(220, "e1 e2 e3")]),
    ("case and space", [search_of("Find  me"), search_of(" find\tME ")], [(110, "e1 e2")]),
    ("a pattern", [E("SEARCH", 1, 1, pattern="x"), E("SEARCH", 2, 3, pattern="x")], [(5, "e1 e2")]),
    ("the same scope", [search_of(path="src", glob="*.py"), search_of(path="src", glob="*.py")],
     [(110, "e1 e2")]),
    ("a read between", [search_of(), read_of(), search_of()], [(110, "e1 e3")]),
    ("a harmless command between", [search_of(), bash("git log -3"), search_of()],
     [(110, "e1 e3")]),
    ("both sides of a write",
     [search_of(), search_of(), E("FILE_WRITE", file_path="b"), search_of(), search_of()],
     [(110, "e1 e2"), (110, "e4 e5")]),
    ("the same answer", [search_of(content_hash="1"), search_of(content_hash="1")],
     [(110, "e1 e2")]),
    # the innocent
    ("one", [search_of()], []),
    ("another query", [search_of(), search_of("needles")], []),
    ("another scope", [search_of(path="src"), search_of(path="docs")], []),
    ("another scope by name", [search_of(scope="src"), search_of(scope="src/a")], []),
    ("another tool", [search_of(tool="Grep"), search_of(tool="Glob")], []),
    ("after a write", [search_of(), E("FILE_WRITE", file_path="b.py"), search_of()], []),
    ("after another agent's write",
     [search_of(), E("FILE_WRITE", file_path="b.py", _agent="b"), search_of()], []),
    ("after an unknown command", [search_of(), bash("./deploy"), search_of()], []),
    ("after a compaction", [search_of(), E("CONTEXT_LOAD", **COMPACTION), search_of()], []),
    ("in another agent's window", [search_of(), search_of(_agent="b")], []),
    ("polling whose answer changed",
     [search_of(content_hash="1"), search_of(content_hash="2"), search_of(content_hash="3")], []),
    ("after one that was cut off", [search_of(truncated=True), search_of()], []),
    ("searches that name no query", [E("SEARCH", 9), E("SEARCH", 9)], []),
]


@pytest.mark.parametrize("name, events, expected", REPEATED_SEARCHES,
                         ids=[row[0] for row in REPEATED_SEARCHES])
def test_repeated_searches(name, events, expected):
    issues = found_by(so.RepeatedSearchAnalyzer(), *copies(events))
    assert len(issues) == len(expected)
    for issue, (tokens, ids) in zip(sorted(issues, key=lambda i: i.events_involved), expected):
        check(issue, tokens, "MEDIUM", ids.split(), search_count=len(ids.split()))
        assert issue.issue_type is IssueType.REPEATED_SEARCH and issue.metadata["query"]


@pytest.mark.parametrize("event, waste", [
    (read_of(tokens=10_000), 6_000), (read_of(tokens=10_001), 6_000),
    (read_of(tokens=25_000, compressed=False), 15_000),
    (read_of(tokens=12_000, lines=[1, 2]), 7_200), (read_of(tokens=9_999), None),
    (read_of(tokens=50_000, compressed=True), None),
    (E("FILE_READ", 9_999, 50_000, file_path="a.py"), None), (E("SEARCH", 50_000, query="x"), None),
    (E("CONTEXT_LOAD", 50_000), None)], ids=lambda value: str(value)[:40])
def test_large_files(event, waste):
    issues = found_by(so.LargeFileAnalyzer(), *copies([event]))
    assert len(issues) == (waste is not None)
    for issue in issues:
        check(issue, waste, "HIGH", ["e1"], measured=False, tokens=event.tokens_input,
              file_path="a.py")


@pytest.mark.parametrize("thinking, text, shares", [
    ([401], 599, [101]), ([600], 400, [300]), ([1000], 0, [700]), ([400, 200], 400, [200, 100]),
    ([300, 0, 300], 400, [150, 0, 150]),
    ([400], 600, None), ([100], 900, None), ([], 1000, None), ([0], 0, None), ([], 0, None)],
    ids=str)
def test_excessive_thinking(thinking, text, shares):
    events = [E("THINKING", 0, tokens) for tokens in thinking] + [E("AI_RESPONSE", 5_000, text)]
    issues = found_by(so.ExcessiveThinkingAnalyzer(), *events)
    assert len(issues) == (shares is not None)
    for issue in issues:
        ids = ["e%d" % number for number, tokens in enumerate(thinking, 1) if tokens]
        check(issue, sum(shares), "MEDIUM", ids, measured=False,
              thinking_percent=100.0 * sum(thinking) / (sum(thinking) + text))
        assert ({key: claim[1] for key, claim in issue.claims.items()}
                == dict(zip(ids, [s for s in shares if s])))


def failure(message="boom", tokens=100, written=10, tool="Bash", **data):
    return E("ERROR", tokens, written, tool=tool, message=message, **data)


RETRIES = [
    ("twice", [failure(), failure(tokens=30, written=3)], [(33, "e1 e2")]),
    ("four times", [failure() for _ in range(4)], [(330, "e1 e2 e3 e4")]),
    ("numbers and addresses differ", [failure("line 12 at 0xFF"), failure("line 7 at 0xab12")],
     [(110, "e1 e2")]),
    ("a message without a tool", [E("ERROR", 5, message="m"), E("ERROR", 6, message="m")],
     [(6, "e1 e2")]),
    ("a tool without a message", [E("ERROR", 5, tool="x"), E("ERROR", 6, tool="x")],
     [(6, "e1 e2")]),
    ("the same command", [bash("pytest -q", "ERROR"), bash("pytest  -q", "ERROR")],
     [(15, "e1 e2")]),
    ("other work between", [failure(), read_of(), search_of(), bash("git status"), failure()],
     [(110, "e1 e5")]),
    ("different responses", [failure(response_id="1"), failure(response_id="2")], [(110, "e1 e2")]),
    ("equal times are no batch", [failure(_at=1), failure(_at=1)], [(110, "e1 e2")]),
    ("recovered after two", [failure(), failure(), failure(recovered=True), failure()],
     [(110, "e1 e2")]),
    ("a write after two", [failure(), failure(), E("FILE_WRITE", file_path="a"), failure()],
     [(110, "e1 e2")]),
    # the innocent
    ("once", [failure()], []),
    ("other messages", [failure("no file"), failure("no permission")], []),
    ("other tools", [failure(tool="Bash"), failure(tool="Edit")], []),
    ("other commands", [bash("pytest a", "ERROR"), bash("pytest b", "ERROR")], []),
    ("neither tool nor message", [E("ERROR", 5), E("ERROR", 6)], []),
    ("a write between", [failure(), E("FILE_WRITE", file_path="a.py"), failure()], []),
    ("an unknown command between", [failure(), bash("./fix"), failure()], []),
    ("a change by command between", [failure(), bash("git checkout main"), failure()], []),
    ("it worked in between",
     [bash("pytest", "ERROR"), bash("pytest"), bash("pytest", "ERROR")], []),
    ("a process was ended in between", [failure(), bash("pkill -f server"), failure()], []),
    ("it may be run since", [failure(), bash("chmod +x a.sh"), failure()], []),
    ("it is to be committed since", [failure(), bash("git add a.py"), failure()], []),
    ("a reader says that it acts", [failure(), bash("x", acts=True, changes=[]), failure()], []),
    ("a compaction between", [failure(), E("CONTEXT_LOAD", **COMPACTION), failure()], []),
    ("another agent", [failure(), failure(_agent="b")], []),
    ("one parallel batch",
     [failure(response_id="1"), failure(response_id="1"), failure(response_id="1")], []),
    ("one batch by another name", [failure(batch_id="1"), failure(batch_id="1")], []),
    ("several failures of one batch",
     [failure("a", response_id="1"), failure("b", response_id="1")], []),
    ("recovered", [failure(), failure(recovered=True), failure()], []),
    ("declined", [failure("The user doesn't want to proceed with this tool use.")] * 3, []),
    ("denied", [failure("Permission to use Bash has been denied")] * 3, []),
    ("not approved", [failure("This command requires approval")] * 3, []),
    ("not granted", [failure(
        "Claude requested permissions to write to a.py, but you haven't granted it yet.")] * 3, []),
    ("too many requests", [failure("429 Too Many Requests")] * 3, []),
    ("overloaded", [failure("Overloaded")] * 3, []),
    ("unavailable", [failure("HTTP 503: service unavailable")] * 3, []),
    ("unavailable by code", [failure("failed", status_code=503)] * 3, []),
    ("collateral", [failure(kind="collateral")] * 3, []),
    ("interrupted", [failure(kind="interrupted")] * 3, []),
]


@pytest.mark.parametrize("name, events, expected", RETRIES, ids=[row[0] for row in RETRIES])
def test_failed_retries(name, events, expected):
    issues = found_by(so.FailedRetryAnalyzer(), *copies(events))
    assert len(issues) == len(expected)
    for issue, (tokens, ids) in zip(issues, expected):
        check(issue, tokens, "HIGH", ids.split(), retry_count=len(ids.split()))


LONG = [  # minutes, waste of 10,000 tokens, severity
    (60, None, None), (60.001, 0, "MEDIUM"), (75, 500, "MEDIUM"), (90, 1_000, "MEDIUM"),
    (119, 1_966, "MEDIUM"), (120, 2_000, "HIGH"),
    (150, 3_000, "HIGH"), (600, 3_000, "HIGH"), (0, None, None)]


@pytest.mark.parametrize("minutes, waste, severity", LONG, ids=str)
def test_long_sessions(minutes, waste, severity):
    totals = so.Session("s", "A", "t", total_tokens_input=6_000, total_tokens_output=4_000,
                        total_duration_ms=int(minutes * 60_000))
    for session in (totals, session_of(E("CUSTOM", 6_000, 0, _ms=totals.total_duration_ms),
                                       E("CUSTOM", 0, 4_000))):
        issues = so.LongSessionAnalyzer().analyze(session)
        assert len(issues) == (severity is not None)
        for issue in issues:
            check(issue, waste, severity, [], measured=False, duration_minutes=float(minutes))
            assert "if " in issue.suggestion.lower(), "often legitimate, so no blame"


def test_idle_time_makes_no_session_long():
    idle = [E("CUSTOM", 1_000, _at=at) for at in (0, 5, 100, 105, 300)]
    assert found_by(so.LongSessionAnalyzer(), *idle) == []
    busy = [E("CUSTOM", 1_000, _at=at) for at in range(0, 91, 9)] + [E("CUSTOM", 0, _at=500)]
    issue, = found_by(so.LongSessionAnalyzer(), *busy)  # 90 minutes of 11,000 tokens
    check(issue, 1_100, "MEDIUM", [], measured=False, duration_minutes=90.0)


@pytest.mark.parametrize("errors, others, severity", [
    (5, 0, None), (1, 5, "MEDIUM" if 1 * 100 > 6 * 20 else None), (2, 8, None), (2, 7, "MEDIUM"),
    (3, 7, "MEDIUM"), (4, 6, "MEDIUM"), (5, 6, "HIGH"), (6, 0, "HIGH"), (0, 10, None)], ids=str)
def test_high_error_rates(errors, others, severity):
    events = ([failure("m%s" % "abcdefgh"[number], 50, 5) for number in range(errors)]
              + [E("AI_RESPONSE", 0, 9) for _ in range(others)])
    issues = found_by(so.HighErrorRateAnalyzer(), *events)
    assert len(issues) == (severity is not None)
    for issue in issues:
        check(issue, 55 * errors, severity, ["e%d" % n for n in range(1, errors + 1)],
              measured=False, error_rate=100.0 * errors / (errors + others))


def test_failures_that_are_nobodys_fault_make_no_error_rate():
    events = ([failure("Overloaded"), failure(kind="declined"), failure(kind="collateral")] * 2
              + [E("CUSTOM")])
    assert found_by(so.HighErrorRateAnalyzer(), *copies(events)) == []
    # 2 of 9
    assert len(found_by(so.HighErrorRateAnalyzer(), *copies(events + [failure(), failure()]))) == 1


SPIKES = [  # name, events, (ids, multiplier); nothing is ever charged
    ("four times the others",
     [read_of("a", 100), read_of("b", 100), E("CUSTOM", 400)], ("e3", 4.0)),
    ("just above three times", [read_of("a", 100), read_of("b", 100), E("CUSTOM", 200, 101)],
     ("e3", 3.01)),
    ("its own type has ten", [E("SEARCH", 1_000) for _ in range(9)] + [E("SEARCH", 4_000)]
     + [E("CUSTOM", 5) for _ in range(9)], ("e10", 4.0)),
    ("worst first",
     [read_of("a", 100) for _ in range(20)] + [E("FILE_READ", 1_000), E("FILE_READ", 2_000)],
     ("e22 e21", 14.0)),
    # the innocent
    ("three times is not above", [read_of("a", 100), read_of("b", 100), E("CUSTOM", 300)], ()),
    ("two events", [E("CUSTOM", 1), E("CUSTOM", 1_000)], ()),
    ("a context load", [E("CUSTOM", 100), E("CUSTOM", 100), E("CONTEXT_LOAD", 50_000)], ()),
    ("usual for its type",
     [E("SEARCH", 1_000) for _ in range(10)] + [E("CUSTOM", 5) for _ in range(200)], ()),
    ("no tokens", [E("CUSTOM"), E("CUSTOM"), E("CUSTOM"), E("CUSTOM", 5)], ()),
    ("nothing", [], ()),
]


@pytest.mark.parametrize("name, events, expected", SPIKES, ids=[row[0] for row in SPIKES])
def test_token_spikes(name, events, expected):
    issues = found_by(so.TokenSpikeAnalyzer(), *copies(events))
    assert len(issues) == (expected != ())
    if expected:
        ids, multiplier = expected
        check(issues[0], 0, "MEDIUM", ids.split(), measured=False, multiplier=multiplier)
        assert "look" in issues[0].suggestion and not issues[0].claims


def test_events_logged_by_hand_are_judged_alike(optimizer):
    session = optimizer.start_session("forge", "t", model="opus")
    for kind, data, entered in (("FILE_READ", {"file_path": "a.py"}, 10_000),
                                ("FILE_READ", {"file_path": "./a.py"}, 9_000),
                                ("SEARCH", {"query": "x"}, 100), ("SEARCH", {"query": "X"}, 100),
                                ("error", {"tool": "t", "message": "m"}, 10),
                                ("ERROR", {"tool": "t", "message": "m"}, 10)):
        optimizer.log_event(session.id, kind, data, tokens_input=entered)
    report = optimizer.analyze(session.id)
    assert {issue.issue_type.name: issue.estimated_waste_tokens for issue in report.issues} == {
        "LARGE_FILE_UNCOMPRESSED": 6_000, "REPEATED_FILE_READ": 9_000, "REPEATED_SEARCH": 100,
        "FAILED_RETRY": 10, "TOKEN_SPIKE": 0, "HIGH_ERROR_RATE": 20}


def test_thresholds_are_given_to_the_instance_alone():
    assert (len(found_by(so.LargeFileAnalyzer(limit=500), read_of())) == 1
            and so.LargeFileAnalyzer().limit == 10_000)
    assert so.LargeFileAnalyzer(limit=500).thresholds() == {"limit": 500, "saving_percent": 60}
    with pytest.raises(InvalidValue,
                       match="LargeFileAnalyzer has no threshold 'limits'.*limit, saving_percent"):
        so.LargeFileAnalyzer(limits=5)
    for cls in so.BUILT_IN_ANALYZERS:
        assert cls().thresholds() == {name: getattr(cls, name) for name in cls().thresholds()}


def all_subclasses(cls):
    return [found for sub in cls.__subclasses__() for found in [sub] + all_subclasses(sub)]


def test_every_analyzer_is_registered_documented_and_exercised():
    own = [cls for cls in all_subclasses(so.BaseAnalyzer) if cls.__module__ == so.__name__]
    assert (sorted(cls.__name__ for cls in own)
            == sorted(cls.__name__ for cls in so.BUILT_IN_ANALYZERS))
    assert [cls.__name__ for cls in so.BUILT_IN_ANALYZERS] == [
        "RepeatedFileReadAnalyzer", "RepeatedSearchAnalyzer", "LargeFileAnalyzer",
        "ExcessiveThinkingAnalyzer",
        "FailedRetryAnalyzer", "LongSessionAnalyzer", "HighErrorRateAnalyzer", "TokenSpikeAnalyzer"]
    page, tests = read(os.path.join(HERE, "docs", "analyzers.md")).decode(), read(__file__).decode()
    for cls in own:
        assert cls.__name__ in page and cls.issue_type.name in page, cls.__name__
        assert "so.%s(" % cls.__name__ in tests and cls.__doc__ and "analyze" not in vars(cls)
        section, = [text for text in page.split("\n## ") if text.startswith(cls.__name__ + "\n")]
        for name, value in cls().thresholds().items():
            assert "`%s = %s`" % (name, "{:_}".format(value)) in section, (
                "%s.%s" % (cls.__name__, name))


def test_an_analyzer_without_find_says_so():
    class Empty(so.BaseAnalyzer):
        pass
    report = so.build_report(session_of(E("CUSTOM", 5)), [Empty()])
    assert "Empty" in report.analyzer_errors[0] and "find(session" in report.analyzer_errors[0]


def test_nothing_is_remembered_of_events_that_are_changed_in_place():
    session = session_of(*(E("FILE_READ", 1_000, file_path="a.py") for _ in range(2)))
    analyzer = so.RepeatedFileReadAnalyzer()
    assert len(analyzer.analyze(session)) == len(so.build_report(session, [analyzer]).issues) == 1
    session.events[1].data["file_path"] = "b.py"
    assert analyzer.analyze(session) == so.build_report(session, [analyzer]).issues == []
    assert not [name for name in vars(session) if name.startswith("_")]


def test_a_find_of_ones_own_may_take_the_analysis_or_leave_it():
    class Alone(so.BaseAnalyzer):
        def find(self, session):
            yield self.issue(so.Severity.LOW, "one", "s", events=session.events[:1], tokens=500,
                             metadata={"why": 1})

    class Heir(Alone):
        pass

    class Both(so.BaseAnalyzer):
        def find(self, session, analysis):
            yield self.issue(so.Severity.LOW, "two", "s", events=[analysis.by_id["e1"]], tokens=500)

    session = session_of(E("CUSTOM", 600))
    for kind in (Alone, Heir, Both):
        issue, = kind().analyze(session)
        # session_of: opus
        assert (issue.estimated_waste_tokens, issue.estimated_waste_cost) == (500, 0.0075), kind
        assert so.build_report(session, [kind()]).total_waste_tokens == 500, kind
    with pytest.raises(TypeError, match="severity_of_it"):
        so.BaseAnalyzer().issue(so.Severity.LOW, "d", "s", severity_of_it=3)


def test_the_end_of_a_growing_file_is_no_repetition():
    events = [read_of("log", 100, lines=[-20, None], content_hash=digest)
              for digest in ("a", "b", "b")]
    report = so.build_report(session_of(*events), [so.RepeatedFileReadAnalyzer()])
    assert [issue.estimated_waste_tokens for issue in report.issues] == [100]


def test_a_look_at_the_file_between_two_failed_writes_is_an_attempt_to_mend():
    failed = dict(tool="Edit", file_path="a.py", message="String to replace not found")
    fail = [event_like("ERROR", dict(failed), 50) for _ in range(2)]
    look = event_like("FILE_READ", {"file_path": "a.py"}, 500)
    guilty = so.build_report(session_of(*copies(fail)), [so.FailedRetryAnalyzer()])
    innocent = so.build_report(session_of(*copies([fail[0], look, fail[1]])),
                               [so.FailedRetryAnalyzer()])
    assert len(guilty.issues) == 1 and innocent.issues == []


def event_like(kind, data, tokens):
    return so.SessionEvent("", "", EventType[kind], data, tokens)


def test_a_spike_says_what_it_means_for_the_bill():
    issue, = so.TokenSpikeAnalyzer().analyze(six_calls())
    # two reads of 30,000: entered at 0.01875 per 1,000, carried 120,000 tokens in all at 0.0015
    assert issue.metadata["cost"] == 2 * 0.5625 + 0.18 and issue.estimated_waste_tokens == 0
    assert issue.description.endswith(
        "and 1 more: with what was sent again 48% of the session's $2.72")
    free = six_calls()
    free.model = "grok"
    assert so.TokenSpikeAnalyzer().analyze(free)[0].description.endswith(
        "0% of the session's $0.00")


def test_writes_cost_the_same_however_many_files_were_read():
    def analysis(n):
        return session_of(*[read_of("src/%d.py" % number) for number in range(n)],
                          *[E("FILE_WRITE", 9, file_path="out/%d.py" % number)
                            for number in range(n)])

    once, twice = (operations(so.repeats_in, analysis(n)) for n in (150, 300))
    assert twice <= 2.5 * once


@pytest.mark.parametrize("changed, repeated", [
    ("src/a.py", False), ("src", False), ("src/", False), ("/", False), ("sr", True),
    ("src/a", True), ("src/a.pyc", True), ("lib", True), ("src/b.py", True), ("srcs", True)])
def test_a_write_makes_what_it_names_and_all_below_it_new(changed, repeated):
    path = "/src/a.py" if changed == "/" else "src/a.py"
    events = [read_of(path), E("TOOL_CALL", 9, command="make", changes=[changed]), read_of(path)]
    assert bool(so.repeats_in(session_of(*events))) == repeated


def test_thinking_is_not_judged_by_placeholders():
    thinking = event_like("THINKING", {}, 0)
    thinking.tokens_output = 90
    session = session_of(*copies([thinking]), output_lower_bound_calls=3)
    assert so.build_report(session, [so.ExcessiveThinkingAnalyzer()]).issues == []
    assert so.build_report(session_of(*copies([thinking])), [so.ExcessiveThinkingAnalyzer()]).issues


@pytest.mark.parametrize("data", [{"total_lines": "120"}, {"reads": [5]}, {"changes": [5]},
                                  {"lines": "x"}, {"offset": "9"}])
def test_event_data_of_a_wrong_kind_breaks_no_analyzer(optimizer, data):
    optimizer.start_session("A", "t", session_id="s")
    for _ in range(2):
        optimizer.log_event("s", "FILE_READ", dict({"file_path": "a.py"}, **data), 100)
    optimizer.log_event("s", "ERROR", {"error_hash": ["x"], "tool": "t"})
    assert optimizer.analyze("s").analyzer_errors == []
    optimizer.would_repeat("s", "FILE_READ", {"file_path": "a.py"})


# ==================================================================================================
# Replay
# ==================================================================================================

# policy, what it saves of six_calls() in micro-dollars: worst, middle, best (docs/bill.md)
BY_HAND = [
    ("none", 0, 0, 0),
    # the fourth call begins with 33,000 tokens, 10,700 are read again; by hand, compacted before,
    # or after the pause
    ("return --above 50k", 222_675 - 909_000, 222_675 - 267_300, 222_675),
    # the third call compacts 51,100 tokens; then 0, 10,700 or 42,100 are read again
    ("compact --above 50k", -983_250, -300_300, -67_575),
    ("compact --above 90k", 0, 0, 0), ("return", 0, 0, 0),
    # 122,400 written at 30 instead of 18.75; 37,200 read instead of written in 75,
    # 87 or 100 of 100 cases
    ("ttl 1h", -1_377_000 + 795_150, -1_377_000 + 922_374, -1_377_000 + 1_060_200),
    ("ttl 5m", 0, 0, 0),
    ("cap 10k", 0, 622_500, 1_245_000), ("cap 10k --tool Bash", 0, 0, 0), ("cap 1m", 0, 0, 0),
    ("start --tokens 15k", 200_250, 200_250, 200_250), ("start --tokens 20k", 0, 0, 0),
    ("no-repeats", 607_500, 607_500, 607_500), ("all", 607_500, 607_500, 607_500),
    # the read leaves with the fourth call, which writes everything again; the search with the
    # fifth, behind which 960 tokens more are written than without the policy
    ("clear --older 2", 640_455, 640_455, 640_455),
    ("clear --older 2 --at-least 30k", 76_320, 76_320, 76_320),
    ("clear --older 2 --at-least 40k", 0, 0, 0),
    ("clear --older 2 --when-rebuilding", 561_375 + 44_910 + 44_910, 651_195, 651_195),
    ("clear --older 9", 0, 0, 0),
]


@pytest.mark.parametrize("policy, worst, middle, best", BY_HAND, ids=[row[0] for row in BY_HAND])
def test_a_policy_saves_of_six_calls_what_was_computed_by_hand(policy, worst, middle, best):
    saves, = so.replayed(so.Analysis(six_calls()), so.parse_policy(policy))
    assert saves == [figure * 10**6 for figure in (worst, middle, best)]
    result = so.what_if([six_calls()], policy)
    recorded = six_calls().estimated_cost
    assert result["recorded"] == recorded
    assert result["replayed"]["low"] == pytest.approx(recorded - best / 10**6, abs=1e-12)
    assert result["saves"] == {"low": worst / 10**6, "middle": middle / 10**6, "high": best / 10**6}
    assert result["recommended"] is (worst > 0 and middle / 10**6 >= recorded / 100)


def saved_of(session, policy):
    """What the middle case of a policy saves, in micro-dollars."""
    return so.replayed(so.Analysis(session), so.parse_policy(policy))[0][1] / 10**6


@pytest.mark.parametrize("hour, policy, saved", [
    # a cache that outlived its five minutes was recorded to do so
    (False, "ttl 5m", 0), (True, "ttl 1h", 0),
    # 32,000 at 18.75 instead of 30; the 10,000 beyond the first context are lost in 95 of 100 cases
    (True, "ttl 5m", 360_000 - 0.95 * 10_000 * (18.75 - 1.5)),
    (False, "ttl 1h", -360_000)])
def test_writes_that_live_as_long_as_the_policy_says_change_nothing(hour, policy, saved):
    def written(tokens, **more):
        return E("SEARCH", tokens, _write=tokens, _hour=tokens * hour, **more)

    session = session_of(
        written(21_000, _at=0, query="a"), E("AI_RESPONSE", 0, 9, _at=0),
        written(10_000, _at=1, query="b"), E("AI_RESPONSE", 0, 9, _at=1, _read=21_000),
        written(1_000, _at=11, query="c"), E("AI_RESPONSE", 0, 9, _at=11, _read=31_000))
    assert saved_of(session, policy) == saved


@pytest.mark.parametrize("left, saved", [
    # 5,000 of 9,000 tokens are not written, then not read
    (0, 5_000 * 18.75 + 2 * 5_000 * 1.5),
    # what left is the end of the start load, most of which was cut: 1,000 are not read, twice
    (4_000, 5_000 * 18.75 + 2 * 1_000 * 1.5),
    (6_000, 5_000 * 18.75)])
def test_what_a_policy_has_cut_is_the_first_that_leaves(left, saved):
    session = session_of(E("CONTEXT_LOAD", 9_000, _write=9_000, source="system"),
                         E("AI_RESPONSE", 0, 9), E("AI_RESPONSE", 0, 9, _read=9_000 - left),
                         E("AI_RESPONSE", 0, 9, _read=9_000 - left))
    assert saved_of(session, "start --tokens 4k") == saved


def test_a_context_may_be_compacted_from_the_first_token_on():
    session = long_session(5_000)
    for policy in ("compact --above %d", "return --above %d"):
        assert (so.replayed(so.Analysis(session), so.parse_policy(policy % 0))
                == so.replayed(so.Analysis(session), so.parse_policy(policy % 1)))
    assert saved_of(session, "compact --above 0")


def test_without_a_policy_the_replay_is_the_bill_whatever_the_calls_say():
    generator = random.Random(9)
    sessions = [random_calls(generator) for _ in range(100)]
    for policy in ("none", "compact --above 100m", "return --above 100m", "cap 100m",
                   "start --tokens 100m", "clear --older 1m"):
        result = so.what_if(sessions, policy)
        recorded = sum(session.cost_in_pico for session in sessions)
        assert result["recorded"] == pytest.approx(recorded / so.PICO, abs=1e-9)
        assert set(result["replayed"].values()) == {result["recorded"]}, policy
        assert result["sessions"]["same"] == 100 and result["recommended"] is False


ODD_SESSIONS = {
    "windows of one call": [event for _ in range(3) for event in (
        E("CONTEXT_LOAD", 900, **COMPACTION), E("USER_MESSAGE", 50),
        E("AI_RESPONSE", 0, 9, _read=400))],
    "time runs backwards": [event for number in range(4) for event in (
        E("USER_MESSAGE", 500, _at=-9 * number, _write=500),
        E("CONTEXT_LOAD", 3_000 * (number > 0), source="cache rebuild"),
        E("AI_RESPONSE", 0, 9, _at=-9 * number, _read=100))],
    "no times": [so.SessionEvent("", "", kind, {}, 90, 9)
                 for kind in (EventType.USER_MESSAGE, EventType.AI_RESPONSE) * 3],
    "calls counted elsewhere": [
        E("CONTEXT_LOAD", source="history", contents={"start load": 800, "file reads": 300}),
        E("USER_MESSAGE", 10), E("AI_RESPONSE", 0, 1, _read=1_150)],
    "a read above the context": [E("CONTEXT_LOAD", 100, source="system"), E("AI_RESPONSE", 0, 1),
                                 E("USER_MESSAGE", 5), E("AI_RESPONSE", 0, 1, _read=90_000)],
    "writes that live for five minutes and for an hour": [
        event for number in range(4) for event in (
            read_of(tokens=3_000, _at=20 * number, _write=3_000, _hour=1_000 * number),
            E("CONTEXT_LOAD", 2_500 * (number > 0), _write=2_500 * (number > 0),
              source="cache rebuild"),
            E("AI_RESPONSE", 0, 9, _at=20 * number, _read=100 * number))],
    "an unpriced model": [E("USER_MESSAGE", 90, _model="unpriced"),
                          E("AI_RESPONSE", 0, 9, _model="unpriced", _read=40)],
    "one call, and nothing": [E("AI_RESPONSE", 0, 9, _read=40)],
    "output alone": [E("AI_RESPONSE", 0, 9), E("THINKING", 0, 90)],
    "no events": [],
}


@pytest.mark.parametrize("name", ODD_SESSIONS)
def test_odd_sessions_add_up_and_replay_to_their_bill(name):
    session = session_of(*copies(ODD_SESSIONS[name]))
    assert_adds_up(session)
    assert (so.replayed(so.Analysis(session), so.parse_policy("none"), so.parse_policy("cap 100m"))
            == [[0] * 3] * 2)
    for policy in ("all", "compact --above 1", "return --above 1", "ttl 1h", "cap 0",
                   "clear --older 1", "start --tokens 0"):
        worst, middle, best = so.replayed(so.Analysis(session), so.parse_policy(policy))[0]
        assert worst <= middle <= best <= session.cost_in_pico


@pytest.mark.parametrize("policy", [
    "compact --above 5k", "return --above 5k", "ttl 1h", "ttl 5m", "cap 500", "start --tokens 1k",
    "clear --older 1", "all"])
def test_the_best_case_costs_least_and_a_smaller_cap_no_more(policy):
    generator = random.Random(10)
    for _ in range(60):
        session = random_calls(generator)
        worst, middle, best = so.replayed(so.Analysis(session), so.parse_policy(policy))[0]
        assert worst <= middle <= best
        capped = [so.replayed(so.Analysis(session), so.parse_policy("cap %d" % cap))[0][2]
                  for cap in (0, 900, 3_000)]
        assert capped == sorted(capped, reverse=True)


@pytest.mark.parametrize("tool, saves", [
    ("Bash", 450), ("bash", 450), ("shell", 450), ("file reads", 44_550), ("", 46_000)])
def test_a_cap_is_for_the_tool_it_names(tool, saves):
    session = session_of(
        E("CONTEXT_LOAD", 1_000, source="system"), E("FILE_READ", 90_000, file_path="a.py"),
        E("SEARCH", 2_900, query="q"), E("TOOL_CALL", 1_800, tool="Bash", command="make"),
        E("AI_RESPONSE", 0, 10))
    policy = "cap 900" + f" --tool {tool}" * bool(tool)
    assert so.what_if([session], policy)["saves"]["middle"] == pytest.approx(saves * 15e-6)


def test_a_cap_of_a_tool_that_returned_nothing_names_those_that_did():
    for tool in ("Nope", "file", "prompts"):
        with pytest.raises(InvalidValue, match=(
                f"no result of '{tool}': use one of bash, file reads, searches, shell$")):
            so.what_if([six_calls()], f"cap 1k --tool {tool}")
    assert so.what_if([], "cap 1k --tool Nope")["saves"]["high"] == 0


def test_a_policy_is_no_faster_word_than_it_says():
    assert so.parse_policy("clear --older 5 --at-least 20k") == (
        "clear", {"older": 5, "at_least": 20_000, "when_rebuilding": False})
    assert so.parse_policy("cap 2k --tool Bash") == ("cap", {"tokens": 2_000, "tool": "Bash"})
    for text, message in (("", "unknown policy"), ("shrink", "unknown policy"),
                          ("cap", "needs tokens"), ("ttl 2h", "5m or 1h"),
                          ("compact --over 5", "no option"), ("compact --above", "60k"),
                          ("all --above 5", "no option"),
                          ("none 5", "no option"), ("cap -3", "60k")):
        with pytest.raises(InvalidValue, match=message):
            so.parse_policy(text)


def long_session(size, **metadata):
    """A session that reads on and on and is compacted once in a while; ``size``: of a context after
    that, beyond the first."""
    events = [E("CONTEXT_LOAD", 10_000, source="system")]
    for window in range(2):
        for number in range(22):
            events += [E("SEARCH", 1_000, query="%d" % number, _write=1_000),
                       E("AI_RESPONSE", 0, 10,
                         _read=0 if not number else 10_000 + window * size + 1_000 * number)]
        events += [E("CONTEXT_LOAD", 10_000 + size - 1_000, _write=9_000 + size, **COMPACTION)]
    return session_of(*events[:-1], **metadata)


def test_the_users_own_compactions_stand_in_for_the_shipped_medians():
    sessions = [long_session(size) for size in (4_000, 4_000, 5_000, 6_000, 6_000)]
    result = so.what_if(sessions, "compact --above 25k")
    assert result["calibration"]["source"] == "own" and result["calibration"]["n"] == 5
    assert (0 < result["calibration"]["median_error"] <= result["calibration"]["p90_error"] < 0.2
            and result["point"] is True)
    few = so.what_if(sessions[:4], "compact --above 25k")
    assert few["calibration"] == {"n": 0, "source": "shipped", "median_error": 0.118,
                                  "p90_error": 0.63}
    assert few["point"] is False  # the shipped medians miss by more than half of the cost too often
    compactions = so.Compactions()
    for session in sessions:
        compactions.look_at(session)
    assert compactions.summary("FORGE") == 4_000 and compactions.summary("OTHER") == 0


def test_the_facade_replays_the_store_or_paths(optimizer, tmp_path):
    optimizer.scan([SAMPLES])
    done = []
    stored, read = (optimizer.whatif("no-repeats", progress=done.append),
                    optimizer.whatif("no-repeats", [SAMPLES]))
    assert stored == read and done == list(range(1, len(done) + 1))
    assert stored["saves"]["low"] > 0 and stored["sessions"]["worse"] == 0
    assert stored["without_largest"]["recorded"] < stored["recorded"]
    with pytest.raises(StorageError):
        optimizer.whatif("none", [str(tmp_path / "nowhere")])


@pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real transcripts beside the project")
def test_the_replay_of_real_sessions_is_their_bill_and_real_compactions_are_predicted():
    sessions = so.sessions_at([REAL], so.PriceList())
    for session in sessions:
        assert so.replayed(so.Analysis(session), so.parse_policy("none"),
                           ("cap", {"tokens": 10**9, "tool": ""})) == [[0] * 3] * 2
        stored = so.Session.from_dict(json.loads(json.dumps(session.to_dict())))
        assert (so.replayed(so.Analysis(stored), so.parse_policy("all"))
                == so.replayed(so.Analysis(session), so.parse_policy("all")))
    result = so.what_if(sessions, "compact --above 150k")
    assert result["calibration"]["source"] == "own" and result["calibration"]["median_error"] < 0.15
    assert result["calibration"]["p90_error"] < 0.2
    assert so.what_if(sessions, "compact --above 60k")["recommended"] is False


# ==================================================================================================
# Reports
# ==================================================================================================

def golden_session():
    """A session whose times, ids and numbers are all fixed."""
    session = session_of(
        E("SESSION_START", _at=0), E("CONTEXT_LOAD", 2_000, _at=0, source="system"),
        E("USER_MESSAGE", 100, _at=0),
        E("FILE_READ", 1_000, 20, _at=1, file_path="src/a.py", tool="Read"),
        E("FILE_READ", 1_000, 20, _at=2, file_path="src/a.py", tool="Read"),
        E("FILE_READ", 1_000, 20, _at=3, file_path="src/a.py", tool="Read"),
        E("SEARCH", 310, 10, _at=4, query="a|b `c`", tool="Grep"),
        E("SEARCH", 310, 10, _at=4.5, query="a|b `c`", tool="Grep"),
        E("AI_RESPONSE", 0, 900, _at=5), E("SESSION_END", _at=6), model="opus")
    session.task = "Mend the <loader> | *now*\nand more"
    return session


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 9) if isinstance(value, float) else value


def golden_report(session):
    report = so.build_report(session, [cls() for cls in so.BUILT_IN_ANALYZERS])
    report.generated_at = "2026-03-01T12:00:00+00:00"
    return report


@pytest.mark.parametrize("form", ["text", "markdown", "json", "evidence"])
def test_a_whole_report(form):
    session = golden_session()
    report = golden_report(session)
    shown = (so.evidence_text(session, report) if form == "evidence"
             else so.FORMATS[form](session, report))
    expected = read(os.path.join(HERE, "examples", "expected", "report." + form)).decode("utf-8")
    if form == "json":  # the last digit of a sum differs between versions
        assert rounded(json.loads(shown)) == rounded(json.loads(expected))
    else:
        assert shown.strip("\n") == expected.strip("\n")


NASTY = ("x| y\n# z\r\x1b[31m\x9b2J\x07\u202e\u2028[a](javascript:b) <script>alert(1)</script> `c` "
         "**d** \ud800 &lt; ~~e~~ $f$")


def nasty_session():
    session = session_of(
        read_of(NASTY), read_of(NASTY), read_of(NASTY), E("SEARCH", 10, query=NASTY, tool=NASTY),
        E("SEARCH", 10, query=NASTY, tool=NASTY),
        E("ERROR", 10, tool=NASTY, message=NASTY), E("ERROR", 10, tool=NASTY, message=NASTY),
        E("TOOL_CALL", 5, tool=NASTY), E("CONTEXT_LOAD", 9, source=NASTY), model=NASTY)
    session.agent = session.task = session.started_at = NASTY
    session.metadata = {"k": NASTY}
    for event in session.events:
        event.id, event.timestamp = event.id + NASTY, NASTY
    return session


def test_what_comes_from_outside_breaks_no_terminal_no_table_and_no_page():
    session = nasty_session()

    class Nasty(so.BaseAnalyzer):
        def analyze(self, session):
            yield so.EfficiencyIssue(NASTY, IssueType.CONTEXT_OVERFLOW, Severity.CRITICAL, NASTY,
                                     NASTY, 5, 0.0, [session.events[0].id], {"k": NASTY})

    class Fails(so.BaseAnalyzer):
        def analyze(self, session):
            raise ValueError(NASTY)
    report = so.build_report(session, [cls() for cls in so.BUILT_IN_ANALYZERS] + [Nasty(), Fails()])
    kinds = {issue.issue_type for issue in report.issues}
    assert ({IssueType.REPEATED_FILE_READ, IssueType.REPEATED_SEARCH, IssueType.FAILED_RETRY}
            <= kinds)
    session.id = report.session_id = NASTY
    text, markdown = so.FORMATS["text"](session, report), so.FORMATS["markdown"](session, report)
    for shown in (text, so.evidence_text(session, report), markdown):
        assert not re.search(
            "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
            shown)
        assert not [line for line in shown.splitlines() if line.startswith("# z")]
        assert shown.encode("utf-8")
    assert ("<script" not in markdown and not re.search(r"(?<!\\)\]\(", markdown)
            and not re.search(r"(?<!\\)\*\*d", markdown))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 5) for row in rows)
    assert not [line for shown in (text, so.evidence_text(session, report))
                for line in shown.splitlines() if len(line) > 80]
    parsed = json.loads(so.FORMATS["json"](session, report))
    assert "\x1b" not in so.FORMATS["json"](session, report) and parsed["session_id"] == NASTY


@pytest.mark.parametrize("number, shown",
                         [(0, "0"), (999, "999"), (9_999, "9,999"), (10_000, "10.0k"),
                          (999_949, "999.9k"), (1_000_000, "1.0M"),
                          (5_900_000, "5.9M"), (7_200_000_000, "7.2G"), (1.4, "1")])
def test_short_numbers(number, shown):
    assert so.short_number(number) == shown


def test_parts_add_up_to_the_whole():
    generator = random.Random(5)
    for _ in range(500):
        weights = [generator.randrange(0, 50) for _ in range(generator.randrange(1, 9))]
        total = generator.randrange(0, 1_000)
        shares = so.share_out(total, weights)
        assert (sum(shares) == (total if sum(weights) or len(weights) == 1 else 0)
                and min(shares) >= 0)
        for share, weight in zip(shares, weights):
            assert not sum(weights) or abs(share - total * weight / sum(weights)) < 1
    assert so.share_out(10, [1, 1, 1]) == [4, 3, 3] and so.share_out(5, [0, 0]) == [0, 0]


HOSTILE = "</title><script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\x1b[31m\u202e\ud800"


class Page(HTMLParser):
    """What a page holds, and whether its elements are closed in order."""

    VOID = {"meta", "circle", "rect", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.words, self.attributes = (
            [], [], [], set(), [], [])
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        given = dict(attributes)
        self.ids.update([given["id"]] if "id" in given else [])
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def checked(text):
    """A page that needs nothing else, runs nothing, and is ASCII."""
    page = Page(text)
    text.encode("ascii")
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert ("http:" not in text and "https:" not in text and "url(" not in text
            and "@import" not in text)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    return page


def heights(text, kind):
    """The heights of a colour class in the first picture, by column."""
    chart = re.search(r"<svg .*?</svg>", text, re.S).group()
    return [sum(float(h) for h in re.findall(rf'class="{kind}"[^/]*?height="([\d.]+)"', column))
            for column in chart.split("<g>")[1:]]


def test_the_session_page(optimizer):
    store_session(optimizer, "s", [READ, ANSWER, READ, READ, ANSWER])
    text = optimizer.export_report("s", "html")
    page = checked(text)
    for words in ("60.0/100", "2,000 measured (", "File 'a.py' was read 3 times", "s-2 ",
                  "HIGH PRIORITY", "Cache what was read",
                  "From start to end", "Where the money went", "entering the first time"):
        assert words in page.text, words
    assert ((heights(text, "first"), heights(text, "wasted"), heights(text, "output"))
            == ([33.33, 0], [0, 66.67], [33.33, 33.33]))
    assert "Sent again" not in page.text
    shown = re.sub(r"\s+", " ", optimizer.export_report("s", "text"))
    # the page says what the text says
    for section in so._session_sections(optimizer.get_session("s"), optimizer.analyze("s")):
        for label, value in section.facts[2:]:
            assert so.plain(value) in page.text and so.plain(value) in shown, label


def test_the_page_of_an_imported_session_names_lines_and_what_was_sent_again(optimizer):
    row, = optimizer.scan([os.path.join(TRANSCRIPTS, "story-checkout")])["sessions"]
    text = optimizer.export_report(row["id"], "html")
    page = checked(text)
    assert "Sent again" in page.text and 'class="carried"' in text and row["path"] in page.text
    report, session = optimizer.analyze(row["id"]), optimizer.get_session(row["id"])
    events = {event.id: event for event in session.events}
    for issue in report.issues:
        assert so.plain(issue.description) in page.text
        for event_id in issue.events_involved:
            assert f">line {events[event_id].data['line']}<" in text


@pytest.mark.parametrize("calls, columns",
                         [(0, 0), (1, 1), (2, 2), (120, 120), (121, 61), (5000, 120)])
def test_a_timeline_has_at_most_120_columns_and_loses_no_token(calls, columns):
    session = so.Session("s", "A", "t")
    for number in range(calls):
        session.add_event(so.SessionEvent(f"r{number}", f"2026-01-01T10:00:{number % 60:02d}",
                                          EventType.USER_MESSAGE, {}, 10))
        session.add_event(so.SessionEvent(f"c{number}", "", EventType.AI_RESPONSE, {}, 0, 30,
                                          tokens_cache_read=7))
    text = so.html_report(session, so.build_report(session, ()))
    checked(text)
    charts = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(charts) == (1 if calls else 0)
    if not calls:
        return
    assert len(heights(text, "output")) == columns <= so.MOST_COLUMNS
    said = re.findall(r"([\d,]+) (?:new|output|sent)",
                      " ".join(re.findall("<title>(.*?)</title>", charts[0])))
    assert sum(int(amount.replace(",", "")) for amount in said) == 47 * calls


def hostile_session():
    """A session all of whose texts are hostile, and a report on it."""
    session = so.Session(HOSTILE, HOSTILE, HOSTILE, model=HOSTILE, started_at=HOSTILE,
                         metadata={"source": {"reader": HOSTILE, "path": HOSTILE, "cwd": HOSTILE}})
    for number, kind in enumerate(EventType):
        for again in "ab":
            session.add_event(so.SessionEvent(f"{HOSTILE}{number}{again}", HOSTILE, kind, {
                "file_path": HOSTILE, "query": HOSTILE, "command": HOSTILE, "tool": HOSTILE,
                "message": HOSTILE, "source": HOSTILE, "line": HOSTILE, "path": HOSTILE}, 20000,
                500, agent_id=HOSTILE, model=HOSTILE))
    report = so.build_report(session, [cls() for cls in so.BUILT_IN_ANALYZERS])
    report.notes.append(HOSTILE)
    report.recommendations += [HOSTILE, f"[{HOSTILE}] x"]
    for issue in report.issues:
        issue.description = issue.suggestion = HOSTILE
    return session, report


def test_whatever_a_session_says_is_text_in_its_page():
    session, report = hostile_session()
    assert len(report.issues) > 3
    page = checked(so.html_report(session, report))
    assert ("<script>alert(1)</script>" in page.text and "\x1b" not in page.text
            and "\u202e" not in page.text)


def test_whatever_a_scan_found_is_text_in_its_page():
    day = {"day": "2026-03-01", "utc_day": "2026-03-01", "prompts": 1, "total_tokens": 5,
           "paid": {"first": 1.0}}
    row = dict(so.session_row(*hostile_session()), bill=so.in_usd(so.empty_bill()), days=[day])
    later = dict(row, started_at="2026-03-02T10:00:00Z", days=[dict(day, day="2026-03-02")])
    result = {"sessions": [row, later], "totals": so.scan_totals([row, later]), "changes": "",
              "skipped": [{"path": HOSTILE, "line": 0, "reason": HOSTILE}]}
    page = checked(so.html_scan_report(result))
    assert "<script>alert(1)</script>" in page.text and page.links == []
    assert max(map(len, so.scan_report(result).splitlines())) <= 80


def test_the_page_of_a_scan(optimizer, tmp_path):
    out = tmp_path / "scan.html"
    status, printed, _ = run(optimizer, "scan", TRANSCRIPTS, "--format", "html",
                             "--output", str(out))
    assert (status, printed) == (0, f"Report written: {out}\n")
    page = checked(out.read_text())
    result = optimizer.scan([TRANSCRIPTS])
    worst = max(result["sessions"], key=lambda row: (row["waste"]["cost"], row["waste"]["tokens"]))
    assert f"{len(result['sessions'])} sessions" in page.text
    assert so.plain(worst["task"]) in page.text and worst["id"][:8] in page.text
    # the page says what the text says
    for section in so._scan_sections(dict(result, advice=[]), 12):
        for text in ([section.title] + [value for _, value in section.facts[:3]]
                     + list(section.lines)):
            assert so.plain(text) in page.text
    spent = sum(float(amount) for amount in re.findall(
        r"\$([\d.]+) (?:new|sent again|written again|output)", out.read_text()))
    assert abs(spent - result["totals"]["estimated_cost"]) < 0.01
    status, printed, _ = run(optimizer, "scan", TRANSCRIPTS, "--format", "html")
    assert status == 0 and "By day" in checked(printed).text


def test_a_scan_that_found_nothing_has_a_page_too(optimizer, tmp_path):
    (tmp_path / "empty").mkdir()
    page = checked(so.html_scan_report(optimizer.scan([str(tmp_path / "empty")])))
    assert "No sessions found" in page.text


@pytest.mark.parametrize("days, columns", [
    (["2026-01-01T12:00:00Z", "2026-01-04T12:00:00Z", ""],
     ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04"]),
    (["2012-01-31T12:00:00Z", "2026-01-02T12:00:00Z", "2026-01-01T12:00:00Z"], 120), ([""], []),
    (["soon"], [])])
def test_days_without_a_session_stand_in_the_picture(days, columns, utc):
    paid = {"prompts": 1, "total_tokens": 5, "paid": {"first": 1.5, "again": 0.5}}
    row = {"estimated_cost": 2.0, "waste_cost": 0.0, "measured_waste_cost": 0.0}
    section = so._by_day([dict(row, days=[dict(paid, day=so.days_of(day)[0])]) for day in days])
    titles = re.findall(r"<title>([^<]*)</title>", section.picture)
    shown = [title.split(":")[0] for title in titles]
    assert shown == columns or len(shown) == columns and shown[-1] == "2026-01-02"
    assert not titles or titles[-1] == shown[-1] + ": $1.50 new, $0.5000 written again (cache lost)"
    early = ", and 1 day with sessions before" if columns == 120 else ""
    assert not titles or section.hint == f"{shown[0]} to {shown[-1]}{early}"


def test_a_row_has_one_shape_in_every_command(optimizer):
    """The same names in scan, summaries and totals; what earlier versions called them stays."""
    row = optimizer.scan([os.path.join(TRANSCRIPTS, "story-checkout")])["sessions"][0]
    kept, = optimizer.summaries()
    shared = ("id agent task model status started_at ended_at last_at project source model_calls "
              "total_tokens estimated_cost efficiency_score waste_tokens waste_cost "
              "measured_waste_tokens measured_waste_cost issue_count minutes events errors "
              "error_rate unattributed_tokens").split()
    assert {name: kept[name] for name in shared} == {name: row[name] for name in shared}
    assert ((kept["tokens"], kept["cost"], kept["efficiency"])
            == (row["total_tokens"], row["estimated_cost"], row["efficiency_score"]))
    assert sum(kept["issues"].values()) == row["issue_count"] == len(row["issues"])
    assert row["waste"] == {"tokens": row["waste_tokens"], "cost": row["waste_cost"],
                            "measured_tokens": row["measured_waste_tokens"],
                            "measured_cost": row["measured_waste_cost"]}
    totals = so.scan_totals([row, row])
    assert (totals["sessions"], totals["total_tokens"]) == (2, 2 * row["total_tokens"])
    assert totals["efficiency_score"] == pytest.approx(row["efficiency_score"])
    assert (so.scan_totals([])["efficiency_score"] == 100
            and so.scan_totals([])["tokens"]["output"] == 0)


def test_summaries_that_are_interrupted_go_on_where_they_stopped(optimizer, monkeypatch):
    for number in range(6):
        optimizer.start_session("FORGE", "t", session_id="s%d" % number)
    monkeypatch.setattr(so, "_SAVE_EVERY", 0.0)
    told = []

    def stop_at_the_fourth(done, total):
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.summaries(progress=stop_at_the_fourth)
    rows = optimizer.summaries(progress=lambda *figures: told.append(figures))
    assert told == [(1, 6), (2, 6), (3, 6), (4, 6), (1, 2), (2, 2)] and len(rows) == 6
    optimizer.log_event("s3", "CUSTOM", {}, 5)
    optimizer.delete_session("s4")
    assert sum(row["tokens"]
               for row in optimizer.summaries(progress=lambda *figures: told.append(figures))) == 5
    assert told[6:] == [(1, 1)] and len(optimizer.store.state.summaries(optimizer._settings())) == 5


def test_a_scan_keeps_the_summaries(optimizer, monkeypatch):
    """They are those that reading the sessions gives, and reading one again is not needed."""
    optimizer.scan([TRANSCRIPTS])
    settings = so.settings_of(optimizer.analyzers, optimizer.prices)
    with monkeypatch.context() as patch:
        patch.setattr(so.Store, "load_marked", lambda *_, **__: pytest.fail("a session was read"))
        kept = optimizer.summaries()
    assert len(kept) > 50
    optimizer.store.state.save_summaries(settings, {}, [row["id"] for row in kept])
    assert optimizer.summaries() == kept
    costs = optimizer.store.state.summaries(settings, lambda row: row["cost"])
    assert costs == {row["id"]: row["cost"] for row in kept}
    changed = kept[0]["id"]
    with pytest.warns(SessionOptimizerWarning, match="has ended"):
        optimizer.log_event(changed, "AI_RESPONSE", tokens_output=50)  # another stamp: read again
    assert ({row["id"]: row["tokens"] for row in optimizer.summaries()}[changed]
            == kept[0]["tokens"] + 50)


@pytest.mark.parametrize("ids, short", [
    (["f714ed36-6704", "ac0cd7d4-301e"], ["f714ed36", "ac0cd7d4"]),
    (["f714ed36-6704", "f714ed36-9999"], ["f714ed36-6704", "f714ed36-9999"]),
    (["s", "s1", "s12"], ["s", "s1", "s12"]), ([], []),
    (["forge_20261120_101500", "forge_20261120_1015001"],
     ["forge_20261120_101500", "forge_20261120_1015001"])])
def test_short_ids_are_beginnings_that_only_one_has(ids, short):
    assert [row["id"] for row in so.with_short_ids([{"id": name} for name in ids])] == list(short)


def test_the_screen_of_the_bill_adds_up_and_names_the_largest_parts():
    session = six_calls()
    bill = so.in_usd(so.bill_of(session))
    (section,) = so.bill_sections(bill, "2026-03-01")
    assert section.hint == f"{so.dollars(bill['total'])}, 2026-03-01"
    told = {row[0]: row[1:] for row in section.rows}
    assert list(told) == ["entering the first time", "written again (cache lost)",
                          "sent again with every call", "output"]
    assert told["entering the first time"][2].startswith(
        "file reads $1.12 · start load $0.3750 · searches $0.0375")
    assert told["written again (cache lost)"] == ("$0.6975", "25.6%",
                                                  "you came back after the cache expired $0.6975")
    assert (sum(float(row[1].strip("$")) for row in section.rows)
            == pytest.approx(bill["total"], abs=0.01))
    guessed = dict(bill, guessed=0.5, hidden_output={"calls": 2, "of": 6, "cost_if_visible": 1})
    shown = so.text_sections(so.bill_sections(guessed))
    assert ("$0.5000 of it at a guessed price" in shown
            and "a lower bound: hidden in 2 of 6 calls" in re.sub(r"\s+", " ", shown))
    assert so.text_sections(so.bill_sections(so.in_usd(so.empty_bill()))) == ""


@pytest.mark.parametrize("what", ["text", "markdown", "html"])
def test_a_bill_of_nothing_but_output_is_told(what):
    """Its table had a last column without a character, which cannot be wrapped."""
    session = session_of(E("AI_RESPONSE", 0, 1000))
    assert "100.0%" in so.FORMATS[what](session, golden_report(session)).replace("\\", "")


def test_a_format_of_your_own_is_one_of_the_command_line(optimizer, monkeypatch, capsys):
    store_session(optimizer, "s", [READ, ANSWER])
    lines = [[command, "s", "--format", "line", "--store", optimizer.store.root]
             for command in ("export", "analyze")]
    assert [so.main(line) for line in lines] == [2, 2] and capsys.readouterr().out == ""
    monkeypatch.setitem(so.FORMATS, "line",
                        lambda session, report: f"{session.id}: {len(report.issues)}")
    assert [so.main(line) for line in lines] == [0, 0] and capsys.readouterr().out == "s: 0\n" * 2


def test_every_cause_of_a_lost_cache_has_words():
    assert {case[3] for case in CAUSES} <= set(so.CAUSES)
    session = six_calls()
    (row,) = so.rebuild_section(so.in_usd(so.bill_of(session))).rows
    assert row == ("2026-03-01T10:20", "", "37,200", "$0.6417", "20",
                   "you came back after the cache expired (clock)")
    report = golden_report(session)
    assert ("WRITTEN AGAIN" in so.evidence_text(session, report)
            and "WHERE THE MONEY WENT" in so.text_report(session, report))
    assert "WRITTEN AGAIN" not in so.evidence_text(golden_session(),
                                                   golden_report(golden_session()))


ADVICE = [{"kind": "return", "text": "Leave early?", "paste": "/compact",
           "saves": {"low": 25.0, "middle": 30.0, "high": 50.0},
           "sessions": ["a", "b"], "project": "", "point": False, "worse": 1, "worst": 0.2},
          {"kind": "start_load", "text": "shop loads 41k.", "paste": "/context",
           "saves": {"low": 1.0, "middle": 2.0, "high": 3.0},
           "sessions": ["a"], "project": "/shop", "per_1000_tokens": {"cost": 6.88}},
          {"kind": "large_reads", "text": "Large files -- whole.", "paste": "Read in parts.",
           "sessions": ["a"], "project": "", "saves": {"low": 3.0, "middle": 3.0, "high": 3.0}}]


def test_a_replay_is_told_with_its_range_its_worst_and_its_worth(optimizer):
    optimizer.scan([SAMPLES])
    for policy in ("all", "no-repeats", "compact --above 10k", "none"):
        result = optimizer.whatif(policy)
        facts = dict(so.whatif_section(result).facts)
        low, middle, high = (so.dollars(result["saves"][name])
                             for name in ("low", "middle", "high"))
        assert (low in facts["Saves"] and high in facts["Saves"]
                and (middle in facts["Saves"] or not result["point"]))
        assert facts["Verdict"].startswith("recommended") is result["recommended"]
        status, out, err = run(optimizer, "whatif", *policy.split(), "--format", "json")
        assert (status, err) == (0, "") and json.loads(out) == json.loads(json.dumps(result))
    assert (run(optimizer, "whatif", "dream")[0] == run(optimizer, "whatif", "cap")[0]
            == run(optimizer, "whatif")[0] == 2)


def test_a_narrow_bill_cuts_no_word():
    lines = so.text_sections(so.bill_sections(so.in_usd(so.bill_of(six_calls()))), 60).splitlines()
    assert [line[2:19].rstrip() for line in lines[1:] if line[2:3].strip()] == [
        "entering the …", "written again …", "sent again …", "output"]


def test_the_trend_of_one_session_has_no_points(optimizer):
    for name, told in (("a", "insufficient data"), ("b", "stable (+0.0 points)")):
        store_session(optimizer, name, [ANSWER])
        stats = dict(optimizer.agent_statistics(""), groups={})
        facts = so.statistics_sections(stats, optimizer.summaries())[0].facts
        assert dict(facts)["Trend"] == told


def test_advice_says_what_it_saves_and_for_how_many():
    assert [part.title for part in so.advice_section(ADVICE).parts] == [
        "Leave early? Saves $25.00 to $50.00 (shipped medians); 2 sessions, 1 worse ($0.2000).",
        "shop loads 41k. Saves $6.88 per 1,000 tokens removed; 1 session.",
        "Large files -- whole. Saves $3.00; 1 session."]
    for low, told in ((0.0, "Saves up to $3.00;"), (10.0, "Saves $10.00 to $3.00;")):
        entry = dict(ADVICE[2], saves=dict(ADVICE[2]["saves"], low=low))
        assert told in so.advice_section([entry]).parts[0].title
    assert so.advice_markdown(ADVICE).splitlines() == [
        "<!-- sessionoptimizer: begin -->", "- Read in parts.",
        "  <!-- Large files - whole. Saves $3.00; 1 session. -->", "<!-- sessionoptimizer: end -->"]


def test_advice_says_how_much_of_it_is_not_shown():
    shown = so.text_sections([so.advice_section(ADVICE, 2)])
    assert (shown.endswith("1 session.\n  * and 1 more (--format json has all)")
            and "Large files" not in shown)
    assert "more (" not in so.text_sections([so.advice_section(ADVICE, 3)])


@pytest.mark.parametrize("before", [None, "", "# Rules\n", "# Rules\r\n\r\nno end of line", "é\n"])
def test_advice_goes_into_a_file_once_and_out_of_it_again(optimizer, tmp_path, before):
    optimizer.scan([SAMPLES])
    target = tmp_path / "CLAUDE.md"
    if before is not None:
        write(target, before)
    for _ in range(2):
        status, out, _ = run(optimizer, "advice", "--days", "9000", "--apply", str(target))
        assert status == 0 and out.startswith(f"Put into {target}: 1 line;")
        text = read(target).decode("utf-8")
        assert (text.count(so.ADVICE_BEGIN) == 1 and text.startswith(before or "")
                and "- Read files of more than" in text)
    assert run(optimizer, "advice", "--undo", str(target))[0] == 0
    assert read(target).decode("utf-8") == (before or "")
    status, out, _ = run(optimizer, "advice", "--days", "9000", "--format", "json")
    assert status == 0 and json.loads(out) == optimizer.agent_statistics("", 9000)["advice"]
    assert run(optimizer, "advice", "--apply", str(tmp_path))[0] == 1


def test_a_file_is_left_alone_where_there_is_nothing_to_put_in_or_take_out(optimizer, tmp_path):
    optimizer.scan([SAMPLES])
    target, missing = tmp_path / "CLAUDE.md", tmp_path / "none.md"
    assert run(optimizer, "advice", "--days", "9000", "--apply", str(target))[0] == 0
    applied = read(target)
    status, _, told = run(optimizer, "advice", "--days", "1", "--apply", str(target))
    assert status == 1 and "no advice is a line for a file" in told and read(target) == applied
    assert run(optimizer, "advice", "--undo", str(target))[0] == 0
    status, _, told = run(optimizer, "advice", "--undo", str(target))
    assert status == 1 and "holds no advice" in told and read(target) == b""
    assert run(optimizer, "advice", "--undo", str(missing))[0] == 1 and not missing.exists()


@posix_only
def test_advice_keeps_a_link_and_the_mode_of_its_file(optimizer, tmp_path):
    optimizer.scan([SAMPLES])
    (tmp_path / "dotfiles").mkdir()
    target, link, new = (tmp_path / "dotfiles" / "CLAUDE.md", tmp_path / "CLAUDE.md",
                         tmp_path / "new.md")
    write(target, "# Rules\n")
    target.chmod(0o640)
    link.symlink_to(target)
    for place in (link, new):
        assert run(optimizer, "advice", "--days", "9000", "--apply", str(place))[0] == 0
    write(tmp_path / "plain", "")
    assert (link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640
            and so.ADVICE_BEGIN in target.read_text())
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert run(optimizer, "advice", "--undo", str(link))[0] == 0 and read(target) == b"# Rules\n"
    assert os.listdir(str(target.parent)) == ["CLAUDE.md"]
    assert run(optimizer, "advice", "--days", "9000", "--apply",
               str(tmp_path / "none" / "x.md"))[0] == 1
    assert not (tmp_path / "none").exists()


@posix_only
@pytest.mark.parametrize("kind", ["folder", "pipe", "read-only", "no text"])
def test_advice_leaves_alone_what_is_no_text_to_be_changed(optimizer, tmp_path, monkeypatch,
                                                           capsys, kind):
    optimizer.scan([SAMPLES])
    target = str(tmp_path / "CLAUDE.md")
    if kind == "folder":
        os.mkdir(target)
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        write(target, b"\xff" if kind == "no text" else b"# Rules\n")

    def refuse(path, flags, *mode, real=os.open):
        if path == target and flags == os.O_WRONLY:  # root may write everywhere
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *mode)
    if kind == "read-only":
        monkeypatch.setattr(so.os, "open", refuse)
    before = os.lstat(target)
    for option in ("--apply", "--undo"):
        assert so.main(
            ["--store", optimizer.store.root, "advice", "--days", "9000", option, target]) == 1
        assert ("cannot be changed" in " ".join(capsys.readouterr().err.split())
                or option == "--undo")
    assert (os.lstat(target).st_ino, os.lstat(target).st_size) == (before.st_ino, before.st_size)
    assert sorted(os.listdir(str(tmp_path))) == ["CLAUDE.md", "store"]


@pytest.mark.parametrize("function, number", [
    ("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES),
    ("chmod", errno.EPERM), ("open", errno.EMFILE), ("edit", 0)])
def test_advice_that_cannot_be_written_whole_is_not_written(optimizer, tmp_path, monkeypatch,
                                                            capsys, function, number):
    optimizer.scan([SAMPLES])
    optimizer.summaries()
    target = tmp_path / "CLAUDE.md"
    write(target, "# Rules\n")
    before = "# Rules\n"
    with monkeypatch.context() as patched:
        def fail(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        def edit(text):
            write(target, "# Other rules\n")  # as an editor does meanwhile
            return text
        if function == "edit":
            before = "# Other rules\n"
            patched.setattr(so, "without_advice", edit)
        else:
            temporary = so._temporary

            def breaking(*args):
                patched.setattr(so.os, function, fail)
                return temporary(*args)
            patched.setattr(so, "_temporary", breaking)
        status = so.main(
            ["--store", optimizer.store.root, "advice", "--days", "9000", "--apply", str(target)])
    assert (status == 1 and "cannot be changed" in capsys.readouterr().err
            and target.read_text() == before)
    assert sorted(os.listdir(str(tmp_path))) == ["CLAUDE.md", "store"]


def test_sums_by_everything_add_up_to_the_bill(optimizer):
    result = optimizer.scan([SAMPLES])
    total = result["totals"]["estimated_cost"]
    for by in so.GROUPS:
        groups = so.grouped(result["sessions"], by, result["bill"])
        assert sum(group["estimated_cost"] for group in groups) == pytest.approx(total)
        assert "BY " + by.upper() in so.text_sections([so.group_section(groups, by)])
        status, out, _ = run(optimizer, "scan", SAMPLES, "--by", by, "--format", "json")
        assert status == 0 and json.loads(out)["groups"] == {by: json.loads(json.dumps(groups))}
        status, out, _ = run(optimizer, "stats", "--days", "9000", "--by", by, "--format", "json")
        found = json.loads(out)["groups"]
        assert (status == 0 and set(found) == {by, "week"}
                and sum(group["estimated_cost"] for group in found[by]) == pytest.approx(total))
    assert len(so.grouped(result["sessions"], "session", result["bill"])) == len(result["sessions"])


def rows_of(*costs, begun=0.0):
    return [{"id": "%d-%d" % (begun, number), "started": begun + number,
             "started_at": "2026-03-0%dT10:00:00Z" % (1 + number % 9),
             "estimated_cost": cost, "prompts": 2,
             "measured_waste_cost": 0.0, "waste_cost": 0.0, "total_tokens": 5, "bill": {
                 "total": 10, "cells": [{"how": "again", "cost": 1}, {"how": "first", "cost": 9}]},
             "days": [{"day": "2026-03-0%d" % (1 + number % 9), "prompts": 2, "total_tokens": 5,
                       "paid": {"first": cost}}]} for number, cost in enumerate(costs)]


@pytest.mark.parametrize("before, after, change, told", [
    ([1.0] * 8, [2.0] * 8, 1.0, "a session costs $1.00 more, surely"),
    ([2.0] * 8, [1.0] * 9, -1.0, "a session costs $1.00 less, surely"),
    ([1.0, 9.0] * 4, [2.0, 9.0] * 4, 0.5, "a session costs $0.5000 more, perhaps"),
    ([1.0] * 7, [2.0] * 8, None, "not enough sessions"), ([], [], None, "not enough sessions")])
def test_before_and_after(before, after, change, told):
    split = so.split_at(rows_of(*before) + rows_of(*after, begun=100.0), 100.0)
    assert split["change"] == change and told in so.split_sections(split)[0].lines[0]
    assert (split["before"]["sessions"], split["after"]["sessions"]) == (len(before), len(after))
    if change is not None:
        assert (split["interval"][0] <= change <= split["interval"][1]
                and split["before"]["written_again"] == 0.1)
        assert split["before"]["cost_per_prompt"] == split["before"]["cost_per_session"] / 2
        # no chance in it
        assert split == so.split_at(rows_of(*before) + rows_of(*after, begun=100.0), 100.0)


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Pacific/Pago_Pago"])
@pytest.mark.parametrize(
    "began", ["9999-12-31T23:59:59.999-14:00", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00",
              "0001-01-01T00:00:00Z", "2026-05-01T12:00:00Z"])
def test_a_session_at_the_end_of_time_hides_no_other(monkeypatch, zone, began):
    set_zone(monkeypatch, zone)
    rows = [dict(row, started_at=at, last_at=at, agent="A",
                 days=[dict(row["days"][0], day=so.days_of(at)[0])])
            for row, at in zip(rows_of(1.0, 2.0), (began, "2026-04-05T12:00:00Z"))]
    assert ([entry["sessions"] for entry in so.grouped(rows, "day", {})] == [1, 1]
            == [entry["sessions"] for entry in so.grouped(rows, "week", {})])
    assert so.selection(rows)["newest"] == max(so.grouped(rows, "day", {})[-1]["key"], "2026-04-05")
    assert "<svg" in so._by_day(rows).picture and "<svg" in so._by_day(rows[:1]).picture


def test_weeks_begin_on_monday(utc):
    weeks = so.grouped(rows_of(*[1.0] * 9), "week", {})  # 1 March 2026 is a Sunday
    assert ([(week["key"], week["sessions"]) for week in weeks]
            == [("2026-02-23", 1), ("2026-03-02", 7), ("2026-03-09", 1)])


def on_days(row, **dollars):
    """The row of a session that paid so much on these days of March 2026 (``d1``: the 1st)."""
    return dict(row, days=[
        {"day": "2026-03-%02d" % int(day[1:]), "prompts": 1, "total_tokens": 5,
         "paid": {"first": paid}} for day, paid in dollars.items()])


def test_a_session_of_several_days_is_one_of_their_week():
    first, second = rows_of(6.0, 2.0)
    rows = [on_days(first, d3=1.0, d4=3.0, d9=2.0), on_days(second, d3=2.0)]
    weeks = so.grouped(rows, "week", {})
    assert ([(week["key"], week["sessions"], week["cost_per_session"]) for week in weeks]
            == [("2026-03-02", 2, 3.0), ("2026-03-09", 1, 2.0)])


@pytest.mark.parametrize("prompts, each", [(2, 2.0), (0, 0.0)])
def test_without_a_prompt_none_cost_anything(prompts, each):
    row = dict(rows_of(4.0)[0], prompts=prompts)
    assert so.measures([row])["cost_per_prompt"] == each


def test_a_budget_and_where_the_pace_leads(optimizer, utc):
    now = datetime.now(timezone.utc)
    rows = [dict(row, days=[dict(row["days"][0], day=now.strftime("%Y-%m-%d"))])
            for row in rows_of(30.0)] + rows_of(99.0)
    budget = so.budget_of(rows, 60.0, "month")
    days = now.day - 1 + (now.hour * 3600 + now.minute * 60 + now.second) / 86_400
    assert budget["spent"] == 30 and budget["pace"] == pytest.approx(30 * 31 / days, rel=0.12)
    assert (bool(so.budget_alerts(dict(budget, pace=60.1)))
            and so.budget_alerts(dict(budget, pace=60.0)) == [])
    store_session(optimizer, "s", [("AI_RESPONSE", {}, 0, 1_000_000)])
    status, out, _ = run(optimizer, "alerts", "--budget", "1/day", "--format", "json",
                         "--fail-on", "HIGH")
    assert status == 3 and [alert["kind"] for alert in json.loads(out)] == ["BUDGET"]
    assert "Pace:" in run(optimizer, "stats", "--budget", "60/month")[1]
    assert (run(optimizer, "alerts", "--budget", "60")[0]
            == run(optimizer, "stats", "--budget", "x/month")[0] == 2)


@pytest.mark.parametrize("zone, unit, spent, pace", [
    # noon of a day of 24 hours, and of one of 23, of which 11 are over
    ("UTC", "day", 4.0, 4.0 * 24 / 12), ("Europe/Berlin", "day", 4.0, 4.0 * 23 / 11),
    ("UTC", "week", 7.0, 7.0 * 168 / 156), ("UTC", "month", 7.5, 7.5 * 31 / 28.5)])
def test_a_budget_counts_what_was_paid_since_whenever_the_session_began(
        monkeypatch, utc, zone, unit, spent, pace):
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 29, 12, tzinfo=tz)

    set_zone(monkeypatch, zone)
    monkeypatch.setattr("datetime.datetime", Noon)
    began, other = rows_of(8.0, 0.5)
    budget = so.budget_of([on_days(began, d28=3.0, d29=4.0), on_days(other, d2=0.5)], 60.0, unit)
    assert budget["spent"] == spent and budget["pace"] == pytest.approx(pace)


@pytest.mark.parametrize("command", ["analyze", "export"])
@pytest.mark.parametrize("form", ["html", "csv"])
def test_both_commands_write_the_new_formats(optimizer, command, form):
    store_session(optimizer, "s", [READ, READ, ANSWER])
    status, out, _ = run(optimizer, command, "s", "--format", form)
    assert status == 0
    if form == "html":
        checked(out)
    else:
        assert out.rstrip("\n") == optimizer.export_report("s", "csv").rstrip("\n")


def test_the_spreadsheet_has_every_event_and_the_reports_waste(optimizer):
    row, = optimizer.scan([os.path.join(TRANSCRIPTS, "story-checkout")])["sessions"]
    session, report = optimizer.get_session(row["id"]), optimizer.analyze(row["id"])
    rows = list(csv.DictReader(io.StringIO(optimizer.export_report(row["id"], "csv"))))
    assert list(rows[0]) == ["id", "timestamp", "event_type", "agent_id", "model", "tokens_input",
                             "tokens_output", "tokens_cache_write", "tokens_cache_read",
                             "duration_ms", "charged_tokens", "file_path", "query",
                             "command", "tool", "line"]
    assert [line["id"] for line in rows] == [event.id for event in session.events]
    assert (sum(int(line["tokens_input"]) + int(line["tokens_output"]) for line in rows)
            == session.total_tokens)
    assert sum(int(line["charged_tokens"]) for line in rows) == report.total_waste_tokens > 0
    assert {line["model"] for line in rows} == {session.model}
    assert [line["line"] for line in rows] == [str(event.data.get("line", ""))
                                               for event in session.events]


@pytest.mark.parametrize("text, cell", [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-rf", "'-rf"), ("@SUM(A1)", "'@SUM(A1)"), ("\t=1", "'=1"),
    ("\r=1", "'=1"), ("a=1", "a=1"), ("", ""), ('say "hi", all', 'say "hi", all'),
    ("two\nlines", "two lines"), ("x\ud800", "x"), (" =cmd()", "'=cmd()"), ("\u200b+1", "'+1"),
    ("\uff1d1", "'\uff1d1"), ("a -b", "a -b")])
def test_no_cell_is_a_formula(text, cell):
    session = so.Session("s", "A", "t")
    session.add_event(so.SessionEvent("e", "2026-01-01", EventType.SEARCH, {
        "query": text, "file_path": text, "command": text, "tool": text, "line": text}))
    (row,) = csv.DictReader(io.StringIO(so.csv_report(session, so.build_report(session, ()))))
    assert {row[name] for name in ("query", "file_path", "command", "tool", "line")} == {cell}


# ==================================================================================================
# Store
# ==================================================================================================

def header(session_id="s1"):
    return {"id": session_id, "agent": "FORGE", "task": "a task",
            "started_at": "2026-01-01T12:00:00+02:00",
            "model": "opus", "metadata": {"k": [1, {"a": "\u00e9\n"}]}}


def event(number, kind="FILE_READ", size=0, **data):
    return {"id": f"s1_{number}", "timestamp": f"2026-01-01T12:00:{number % 60:02d}+02:00",
            "event_type": kind, "data": dict(data, file_path="a.py" + "x" * size),
            "tokens_input": 10, "tokens_output": 3, "duration_ms": 7}


def make(size=0, kind="FILE_READ", changes=None, **data):
    return lambda footer: (event(footer["event_count"], kind, size, **data), changes or {})


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def filled(store, events=3, session_id="s1"):
    store.create(header(session_id), [], {})
    for _ in range(events):
        store.append(session_id, make())
    return store.find(session_id)


def put(store, name, data):
    os.makedirs(store.sessions, exist_ok=True)
    write(os.path.join(store.sessions, name), data)


def old_session(session_id="old", events=3):
    found = [event(number) for number in range(events)]
    return {"id": session_id, "agent": "ATLAS", "task": "t", "status": "COMPLETED",
            "started_at": "2026-01-01T12:00:00",
            "ended_at": "2026-01-01T13:00:00", "events": found, "total_tokens_input": 10 * events,
            "total_tokens_output": 3 * events, "total_duration_ms": 7 * events, "model": "opus",
            "metadata": {}}


def heads(store):
    """Header and footer of every session by id, or the error of one that cannot be read."""
    found = {}
    for name, _ in store.files():
        try:
            found[name] = store.head(name)
        except SessionOptimizerError as error:
            found[name] = error
    return found


def ids(doc):
    return [one.get("id") for one in doc["events"]]


# the layout and the ordinary life of a session

def test_file_is_one_json_document_with_an_event_per_line(store):
    path = filled(store, 3)
    lines = read(path).decode("ascii").splitlines()
    assert lines[0].endswith('"events": [') and lines[0].startswith('{"id":"s1","agent":"FORGE"')
    assert [json.loads(line.lstrip(","))["id"] for line in lines[1:4]] == ["s1_0", "s1_1", "s1_2"]
    assert (lines[4]
            == ('], "status":"ACTIVE","ended_at":"","event_count":3,"total_tokens_input":30,'
                '"total_tokens_output":9,"total_duration_ms":21,"layout":2}'))
    assert json.loads(read(path)) == store.load("s1")


def test_append_returns_event_footer_and_mark(store):
    store.create(header(), [], {})
    one, footer, mark = store.append("s1", make())
    assert one["id"] == "s1_0" and footer["event_count"] == 1 and footer["total_tokens_input"] == 10
    assert store.tail("s1", mark)[0] == []


def test_none_event_changes_only_the_footer(store):
    path = filled(store, 2)
    for status in ("COMPLETED_WITH_A_LONG_NAME", "FAILED", "COMPLETED"):
        result = store.append(
            "s1", lambda footer, status=status: (None, {"status": status, "ended_at": "x"}),
            sync=True)
        assert result[0] is None and result[1]["status"] == status
        assert json.loads(read(path))["status"] == status and len(store.load("s1")["events"]) == 2
    store.append("s1", make())
    assert ids(store.load("s1")) == ["s1_0", "s1_1", "s1_2"] and not store.warnings


def test_tiny_event_over_a_long_footer(store):
    path = filled(store, 0)
    store.append("s1", lambda footer: (None, {"status": "X" * 300}))
    store.append("s1", lambda footer: ({}, {"status": "A"}))
    store.append("s1", make())
    assert len(json.loads(read(path))["events"]) == 2 and not store.warnings


def test_event_that_ends_like_a_footer_is_kept(store):
    path = filled(store, 1)
    store.append("s1", lambda footer: ({"id": "x", "event_type": "T", "layout": 2}, {}))
    write(path, read(path)[:-5])
    assert ids(store.load("s1")) == ["s1_0", "x"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_event_without_a_json_form_writes_nothing(store, value):
    path = filled(store, 1)
    before = read(path)
    with pytest.raises((TypeError, ValueError)):
        store.append("s1", lambda footer: ({"id": "x", "data": value}, {}))
    with pytest.raises(ZeroDivisionError):
        store.append("s1", lambda footer: 1 / 0)
    assert read(path) == before
    store.append("s1", make())


def test_footer_over_a_kilobyte_is_refused(store):
    path = filled(store, 1)
    before = read(path)
    with pytest.raises(ValueError):
        store.append("s1", lambda footer: (None, {"status": "X" * 2000}))
    assert read(path) == before


def test_odd_text_survives(store):
    filled(store, 0)
    text = "\ud800 \u2028 \x1b[31m \U0001f600 \n\r\x00"
    store.append("s1", lambda footer: ({"id": "x", "data": {"t": text}, "tokens_input": True}, {}))
    doc = store.load("s1")
    assert doc["events"][0]["data"]["t"] == text and doc["total_tokens_input"] == 0


def test_create_is_exclusive_unless_replace(store):
    filled(store, 2)
    with pytest.raises(SessionExists, match="s1"):
        store.create(header(), [], {})
    assert len(store.load("s1")["events"]) == 2
    store.create(header(), [event(0)], {"status": "COMPLETED", "ended_at": "later"}, replace=True)
    doc = store.load("s1")
    assert ((len(doc["events"]), doc["status"], doc["ended_at"], doc["total_tokens_input"])
            == (1, "COMPLETED", "later", 10))
    store.create(header("new"), [], {"total_tokens_input": 500}, replace=True, sync=False)
    assert store.load("new")["total_tokens_input"] == 500


def test_nothing_is_created_by_reading(store):
    assert (heads(store) == {} and store.state.scanned() == (0, {}, {}, {})
            and store.state.summaries("") == {})
    store.state.forget("s1", False)
    assert not store.delete("s1")
    for call in (store.load, store.archive):
        with pytest.raises(SessionNotFound, match="s1"):
            call("s1")
    with pytest.raises(SessionNotFound):
        store.append("s1", make())
    assert not os.path.exists(store.root)


@posix_only
def test_modes(store):
    previous = os.umask(0)
    try:
        path = filled(store, 1)
        store.write_report("s1", {"a": 1})
    finally:
        os.umask(previous)
    modes = [stat.S_IMODE(os.stat(name).st_mode)
             for name in (store.root, store.sessions, store.reports, path)]
    assert modes == [0o700, 0o700, 0o700, 0o600]
    assert stat.S_IMODE(os.stat(os.path.join(store.reports, "s1_report.json")).st_mode) == 0o600


def test_archive_takes_the_first_free_name(store):
    for expected in ("s1.1", "s1.2"):
        filled(store, 2)
        assert store.archive("s1") == expected
        assert store.load(expected)["id"] == expected and len(store.load(expected)["events"]) == 2
    long_id = "x" * 200
    filled(store, 1, long_id)
    assert store.archive(long_id) == "x" * 198 + ".1"
    with pytest.raises(SessionNotFound):
        store.load("s1")


def test_a_change_loses_no_event_that_comes_meanwhile(store):
    filled(store, 2)
    threads = []

    def edit(doc):
        threads.append(threading.Thread(target=store.append, args=("s1", make())))
        threads[0].start()
        time.sleep(0.1)
        doc["task"] = "another"
    store.change("s1", edit)
    threads[0].join()
    doc = store.load("s1")
    assert (doc["task"], ids(doc), doc["event_count"]) == ("another", ["s1_0", "s1_1", "s1_2"], 3)


def test_delete_takes_the_report_along(store):
    filled(store, 1)
    store.write_report("s1", {"a": 1})
    assert json.loads(read(os.path.join(store.reports, "s1_report.json"))) == {"a": 1}
    assert store.delete("s1") and not store.delete("s1")
    assert os.listdir(store.reports) == os.listdir(store.sessions) == []


# what other processes did

def test_tail_reads_what_was_added(store):
    filled(store, 2)
    doc, mark = store.load_marked("s1")
    assert store.tail("s1", mark)[0] == [] and len(doc["events"]) == 2
    store.append("s1", make(size=3000))
    store.append("s1", make(changes={"status": "FAILED"}))
    events, footer, mark = store.tail("s1", mark)
    assert [one["id"] for one in events] == ["s1_2", "s1_3"] and footer["status"] == "FAILED"
    assert store.tail("s1", mark)[0] == []
    store.append("s1", lambda footer: (None, {"status": "COMPLETED"}))
    assert store.tail("s1", mark)[:2] == ([], dict(footer, status="COMPLETED"))


def test_tail_notices_a_replaced_file(store):
    filled(store, 2)
    mark = store.load_marked("s1")[1]
    store.create(dict(header(), task="b task"), [event(5), event(6)], {}, replace=True)
    assert store.tail("s1", mark) is None
    mark = store.load_marked("s1")[1]
    path = store.find("s1")
    write(path, read(path).replace(b"s1_6", b"s1_7"))  # the same inode and size
    assert store.tail("s1", mark) is None
    put(store, "old.json", json.dumps(old_session(), indent=2).encode())
    assert store.tail("old", store.load_marked("old")[1]) is None
    store.delete("s1")
    with pytest.raises(SessionNotFound):
        store.tail("s1", mark)


def test_waiting_writer_follows_a_replaced_file(store):
    path = filled(store, 1)
    with so._locked(path, exclusive=True):
        thread = threading.Thread(target=store.append, args=("s1", make()))
        thread.start()
        time.sleep(0.1)
        so._replace(path, so._lay_out(dict(header(), events=[event(8), event(9)])), sync=False)
    thread.join()
    assert ids(store.load("s1")) == ["s1_8", "s1_9", "s1_2"]


@posix_only
def test_fork_during_an_append_does_not_keep_the_lock(store):
    filled(store, 1)
    children = []

    def slow(footer):
        children.append(subprocess.Popen(["sleep", "60"], close_fds=False))
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        return event(1), {}
    store.append("s1", slow)
    store.append("s1", make())  # would wait for both children
    assert children[0].poll() is None and os.waitpid(children[1], os.WNOHANG) == (0, 0)
    children[0].kill()
    children[0].wait()
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)


def writer(root, name, count):
    store = Store(root)
    for number in range(count):
        store.append("s1", make(size=number * 7 % 3000, kind="TOOL_CALL", who=name))
        if number % 50 == 0:
            store.append("s1", lambda footer, status="X" * (number % 9): (None, {"status": status}))


def reader(root, stop, problems):
    store = Store(root)
    mark, known = None, 0
    while not stop.is_set():
        doc, fresh = store.load_marked("s1")
        if len(doc["events"]) < known or doc["event_count"] != len(doc["events"]):
            problems.put("load went back")
        known = len(doc["events"])
        news = store.tail("s1", mark) if mark else None
        if news and news[1]["event_count"] < known:
            problems.put("tail went back")
        mark = fresh
        if not dict(store.headers()) or store.readable_head("s1") is None:
            problems.put("a problem in headers")
    for warning in store.warnings:
        problems.put(warning)


@posix_only
def test_eight_writers_and_two_readers(store):
    filled(store, 0)
    stop, problems = fork.Event(), fork.Queue()
    readers = [fork.Process(target=reader, args=(store.root, stop, problems)) for _ in range(2)]
    writers = [fork.Process(target=writer, args=(store.root, name, 200)) for name in "abcdefgh"]
    for process in readers + writers:
        process.start()
    for process in writers:
        process.join()
    stop.set()
    for process in readers:
        process.join()
    assert [process.exitcode for process in readers + writers] == [0] * 10
    assert problems.empty(), problems.get()
    doc = json.loads(read(store.find("s1")))
    assert ids(doc) == [f"s1_{number}" for number in range(1600)] and doc["event_count"] == 1600
    assert sorted(one["data"]["who"] for one in doc["events"]) == sorted("abcdefgh" * 200)


def test_threads_share_a_store(store):
    filled(store, 0)
    threads = [threading.Thread(target=lambda: [store.append("s1", make()) for _ in range(100)])
               for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(store.load("s1")) == [f"s1_{number}" for number in range(800)]


def creator(root, wins):
    try:
        Store(root).create(header(), [], {}, sync=False)
        wins.put(os.getpid())
    except SessionExists:
        pass


@posix_only
def test_one_of_many_creators_wins(store):
    wins = fork.Queue()
    processes = [fork.Process(target=creator, args=(store.root, wins)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert wins.get() and wins.empty() and os.listdir(store.sessions) == ["s1.json"]


# crashes

def logging_loop(root, size, pipe):
    store = Store(root)
    while True:
        one = store.append("s1", make(size=size))[0]
        os.write(pipe, one["id"].encode() + b"\n")


@posix_only
def test_kill_loses_no_acknowledged_event(store):
    random.seed(4)
    filled(store, 0)
    for number in range(KILLS):
        if number % 100 == 99:  # keep the file small
            store.delete("s1")
            filled(store, 0)
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                logging_loop(store.root, (100, 3000, 50_000)[number % 3], send)
            finally:
                os._exit(1)
        os.close(send)
        with open(receive, "rb") as acknowledged:
            acknowledged.readline()
            time.sleep(random.random() * 0.003)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            last = acknowledged.read().decode().split("\n")[-2:][0]
        doc = store.load("s1")
        assert ids(doc) == [f"s1_{count}" for count in range(len(doc["events"]))]
        assert not last or int(last[3:]) < len(doc["events"])
        assert json.loads(read(store.find("s1"))) == doc


def test_truncation_at_every_byte_of_the_last_two_events(store):
    path = filled(store, 3)
    store.append("s1", make(kind="SESSION_END", status="FAILED",
                            changes={"status": "FAILED", "ended_at": "e"}))
    data = read(path)
    ends = [place for place in range(len(data)) if data[place:place + 1] == b"\n"][1:5]
    for cut in range(ends[1], len(data)):
        write(path, data[:cut])
        whole = sum(end <= cut for end in ends)
        fresh = Store(store.root)
        if cut % 2:  # the first access is a read or a write or a listing
            fresh.append("s1", make())
        elif cut % 4:
            assert [head["event_count"] for head in heads(fresh).values()] == [whole]
        doc = fresh.load("s1")
        assert ids(doc)[:whole] == [f"s1_{number}" for number in range(whole)]
        assert len(doc["events"]) == whole + cut % 2 == doc["event_count"]
        assert doc["status"] == ("FAILED" if whole == 4 else "ACTIVE")
        assert (doc["ended_at"] == ("2026-01-01T12:00:03+02:00" if whole == 4 else "")
                or cut == len(data) - 1)
        assert doc["total_tokens_input"] == 10 * len(doc["events"])
        if cut < len(data) - 1:  # only a newline is missing: nothing to report
            assert len(fresh.warnings) == 1 and path in fresh.warnings[0]
        assert json.loads(read(path)) == doc
    assert os.listdir(store.sessions) == ["s1.json"]


@pytest.mark.parametrize("size", [None, 0, 40, 900])
def test_torn_overwrite_at_every_byte(store, size):
    path = filled(store, 2)
    old = read(path)
    tiny = {"id": "n", "event_type": "T"}
    new_event = tiny if size is None else event(2, size=size)
    store.append("s1", lambda footer: (new_event, {}))
    new = read(path)
    start = next(place for place in range(len(old)) if old[place] != new[place])
    end = new.index(b"\n", start)
    for cut in range(start, len(new)):
        if start + 200 < cut < end - 50 and cut % 11:
            continue  # within a long event
        for rest in (old[cut:], b"\0" * (len(new) - cut)):
            write(path, new[:cut] + rest)
            fresh = Store(store.root)
            if cut % 2:
                fresh.append("s1", make())
            doc = fresh.load("s1")
            whole = 2 + (cut >= end)
            assert ids(doc)[:whole] == ["s1_0", "s1_1", new_event["id"]][:whole], (cut, rest)
            assert len(doc["events"]) == whole + cut % 2 == doc["event_count"]
            assert json.loads(read(path)) == doc


def test_byte_flips(store):
    path = filled(store, 12)
    data, whole = read(path), store.load("s1")["events"]
    lines = data.split(b"\n")
    random.seed(7)
    repaired = 0
    for _ in range(500):
        for name in os.listdir(store.sessions):
            os.unlink(os.path.join(store.sessions, name))
        place = random.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1:]
        write(path, flipped)
        fresh = Store(store.root)
        doc = fresh.load("s1")
        hurt = data.count(b"\n", 0, place)  # index of the line the flip is in (12 + 1: the footer)
        hurt = {hurt - 1} | ({hurt} if lines and data[place:place + 1] == b"\n" else set())
        kept = {json.dumps(one) for one in doc["events"]}
        for index, one in enumerate(whole):
            assert index in hurt or json.dumps(one) in kept, (place, fresh.warnings)
        if fresh.warnings:
            repaired += 1
            if ".damaged-1" in fresh.warnings[0]:
                assert read(path + ".damaged-1") == flipped and path + ":" in fresh.warnings[0]
        new = fresh.append("s1", make())[0]
        assert new["id"] not in ids(doc) or place > len(data) - 160
        assert json.loads(read(path)) == fresh.load("s1")
    assert repaired > 100


def test_damage_in_the_middle_is_counted_and_kept_beside(store):
    path = filled(store, 5)
    data = read(path).replace(b',{"id":"s1_2"', b',{"id":"s1_2')
    write(path, data)
    heard = []
    fresh = Store(store.root, warn=heard.append)
    doc = fresh.load("s1")
    assert (ids(doc) == ["s1_0", "s1_1", "s1_3", "s1_4"] and doc["lost_events"] == 1
            and doc["event_count"] == 5)
    assert heard == fresh.warnings and f"{path}:4" in heard[0] and "kept 4 events" in heard[0]
    assert read(path + ".damaged-1") == data and list(heads(fresh)) == ["s1"]
    # not the id of an event that is still there
    assert fresh.append("s1", make())[0]["id"] == "s1_5"
    assert fresh.load("s1")["event_count"] == 6 and len(fresh.warnings) == 1


def test_damaged_header_is_made_again_from_the_events(store):
    store.create(
        header(),
        [dict(event(0, "SESSION_START"), data={"agent": "NEXUS", "task": "t", "model": "m"})], {})
    store.append("s1", make())
    path = store.find("s1")
    write(path, b"#" + read(path)[1:])
    doc = store.load("s1")
    assert (doc["id"], doc["agent"], doc["model"], len(doc["events"])) == ("s1", "NEXUS", "m", 2)
    assert f"{path}:1" in store.warnings[0]


# files of other kinds

@pytest.mark.parametrize("options", [{"indent": 2}, {}, {"separators": (",", ":")}, {"indent": 4}])
@pytest.mark.parametrize("events", [0, 1, 3, 200])
def test_older_layouts_are_read_and_converted_at_the_first_append(store, options, events):
    session = old_session(events=events)
    put(store, "old.json", json.dumps(session, **options).encode())
    before = read(store.find("old"))
    head = store.head("old")
    assert ((head["status"], head["event_count"]) == ("COMPLETED", events)
            and list(dict(store.headers())) == ["old"])
    assert (store.load("old") == dict(session, event_count=events)
            and read(store.find("old")) == before)
    store.append("old", make())
    doc = store.load("old")
    assert (doc["events"][:-1] == session["events"] and doc["event_count"] == events + 1
            and doc["layout"] == 2)
    assert {key: doc[key] for key in ("status", "ended_at", "agent")} == {
        key: session[key] for key in ("status", "ended_at", "agent")}
    assert not store.warnings and store.head("old")["event_count"] == events + 1


def test_pretty_printed_new_session_stays_readable(store):
    path = filled(store, 3)
    write(path, json.dumps(json.loads(read(path)), indent=2).encode())
    assert len(store.load("s1")["events"]) == 3
    store.append("s1", make())
    assert len(json.loads(read(path))["events"]) == 4


GOOD = json.dumps(old_session("odd"), indent=2)


DAMAGED = {
    "empty": b"", "blank": b" \n", "list": b"[]", "null": b"null", "object": b"{}", "number": b"1",
    "text": b'"x"', "cut": GOOD.encode()[:-40], "nan": GOOD.replace("30", "NaN").encode(),
    "infinite": GOOD.replace("30", "1e999").encode(),
    "deep": b'{"id":"a","events":' + b"[" * 100_000, "deep2": b"[" * 10_000 + b"]" * 10_000,
    "deep3": GOOD.replace('"metadata": {}',
                          '"metadata": {"a":' + "[" * 10_000 + "]" * 10_000 + "}").encode(),
    "binary": bytes(range(256)) * 20, "utf16": GOOD.encode("utf-16"),
    "surrogate": GOOD.encode().replace(b"opus", b"\xed\xa0\x80"),
    "id": GOOD.replace('"id": "odd"', '"id": 5').encode(), "events": b'{"id":"a","events":{}}',
    "event": b'{"id":"a","events":[1]}', "agent": b'{"id":"a","agent":[],"events":[]}',
    "metadata": b'{"id":"a","metadata":[],"events":[]}',
    "total": b'{"id":"a","total_tokens_input":"x","events":[]}',
    "jsonl": b'{"type":"user"}\n{"type":"assistant"}\n', "zeros": b"\0" * 5000,
}


FINE = {
    "bom": b"\xef\xbb\xbf" + GOOD.encode(), "crlf": GOOD.replace("\n", "\r\n").encode(),
    "twice": GOOD.replace('"agent"', '"agent": "X", "agent"').encode(),
    "huge": GOOD.replace('"task": "t"', '"task": "' + "x" * 10_000_000 + '"').encode(),
    "null_fields": GOOD.replace('"ended_at": "2026-01-01T13:00:00"', '"ended_at": null').encode(),
    "escape": GOOD.replace('"opus"', '"\\ud800"').encode(),
    "unknown": GOOD.replace('"agent"', '"tags": [1], "agent"').encode(),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_file_is_a_named_problem_and_hides_no_other(store, name):
    filled(store, 1)
    put(store, "odd.json", DAMAGED[name])
    for call in (store.load, store.archive, lambda name: store.append(name, make())):
        if name == "deep3" and call == store.load and sys.version_info >= (3, 12):
            continue  # nesting that later versions parse
        with pytest.raises(DamagedSession) as raised:
            call("odd")
        assert (os.path.join(store.sessions, "odd.json") in str(raised.value)
                and "delete" in str(raised.value))
    found = heads(store)
    assert (found["s1"]["id"] == "s1"
            and (isinstance(found["odd"], DamagedSession) or name in ("deep3", "infinite")))
    assert read(store.find("odd")) == DAMAGED[name] and not store.warnings
    assert sorted(os.listdir(store.sessions)) == ["odd.json", "s1.json"]
    assert store.delete("odd")


@pytest.mark.parametrize("name", sorted(FINE))
def test_unusual_file_is_read(store, name):
    put(store, "odd.json", FINE[name])
    assert len(store.load("odd")["events"]) == 3 and store.head("odd")["event_count"] == 3
    store.append("odd", make())
    assert len(store.load("odd")["events"]) == 4 and store.head("odd")["event_count"] == 4


def test_large_events_and_headers(store):
    store.create(dict(header(), metadata={"paths": ["p" * 100] * 300}), [], {})
    store.append("s1", make(size=10_000_000))
    assert store.head("s1")["event_count"] == 1 and len(store.load("s1")["events"]) == 1


@posix_only
def test_links_directories_and_pipes_are_problems(store, tmp_path):
    filled(store, 1)
    outside = tmp_path / "outside.json"
    outside.write_text(GOOD)
    os.symlink(outside, os.path.join(store.sessions, "link.json"))
    os.mkdir(os.path.join(store.sessions, "directory.json"))
    os.mkfifo(os.path.join(store.sessions, "pipe.json"))
    assert list(dict(store.headers())) == ["s1"]
    assert (sorted(problem.split(".json")[0].rpartition("/")[2] for problem in store.warnings)
            == ["directory", "link", "pipe"])
    assert "symbolic link" in str(store.warnings)
    for name in ("directory", "link", "pipe"):
        with pytest.raises(DamagedSession):
            store.head(name)
        with pytest.raises(DamagedSession):
            store.append(name, make())
        with pytest.raises(SessionExists):
            store.create(header(name), [], {})
    assert store.delete("link") and store.delete("pipe") and outside.read_text() == GOOD
    with pytest.raises(StorageError):
        store.delete("directory")


@posix_only
def test_linked_directory_is_refused(store, tmp_path):
    os.makedirs(store.root)
    os.symlink(tmp_path, store.sessions)
    for call in (lambda: store.load("s1"), lambda: store.create(header(), [], {}),
                 lambda: list(store.headers())):
        with pytest.raises(StorageError, match="symbolic link"):
            call()


# ids

@pytest.mark.parametrize("bad", [
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\n", "\n", "x" * 201, "x" * 300, ".x",
    "CON", "con.txt", "Nul", "COM1", "lpt9.1", "a b", "a\0", "\uff0e\uff0e", "\u0430bc", "\u0661",
    "a:b", "~", None, 5, b"a", ["a"]])
def test_bad_ids_are_refused_everywhere(store, bad, tmp_path):
    filled(store, 1)
    calls = [so.check_id, store.load, store.find, store.archive, store.delete, store.head,
             lambda i: store.create(header(i), [], {}), lambda i: store.append(i, make()),
             lambda i: store.write_report(i, {}), lambda i: store.tail(i, ())]
    for call in calls:
        with pytest.raises(InvalidSessionId, match="characters A-Z"):
            call(bad)
    assert (os.listdir(str(tmp_path)) == ["store"]
            and sorted(os.listdir(store.root)) == ["masked-1", "sessions"])


@pytest.mark.parametrize("good", ["a", "A-b_c.9", "x" * 200, "console", "com10", "_x", "a..b"])
def test_good_ids(store, good):
    assert so.check_id(good) == good
    filled(store, 1, good)
    assert len(store.load(good)["events"]) == 1


def test_older_names_that_break_the_rule_stay_readable(store):
    name = "my agent: \u00e9_2025"
    put(store, name + ".json", json.dumps(old_session("inside"), indent=2).encode())
    assert store.load(name)["id"] == "inside" and list(dict(store.headers())) == [name]
    store.append(name, make())
    store.write_report(name, {"a": 1})
    assert (os.listdir(store.reports) == [name + "_report.json"]
            and len(store.load(name)["events"]) == 4)
    with pytest.raises(InvalidSessionId):
        store.create(header(name), [], {})
    assert store.delete(name)


@pytest.mark.parametrize("text, expected", [
    ("Forge 1", "Forge-1"), ("a//b", "a--b"), ("", "_"), (".x", "_.x"), ("\u00e9t\u00e9", "_-t-"),
    ("CON", "_CON"), ("../../x", "_..-..-x"), ("a\n", "a-"), ("x" * 500, "x" * 100)])
def test_slug(text, expected):
    assert so.slug(text) == expected and so.check_id(so.slug(text))
    assert so.check_id(so.slug("-" * 500)) and len(so.slug("-" * 500)) == 100


# what an older version stored

SECRET = "pypi-AgEIcHlwaS5vcmcCJDU3YzQ0Zjk5LTkwYzUtNGFhZS1hYzQ1"


ROWS_OF_2_0 = set("id source path agent task model started_at ended_at project model_calls tokens "
                  "estimated_cost efficiency_score waste issues token_use unattributed_tokens "
                  "notes most_read".split())


def older_store(root, transcript):
    """A store as version 2.0 left it: a logged and an imported session, a report, a scan's rows,
    none of them masked."""
    optimizer = SessionOptimizer(root)
    row, = optimizer.scan([transcript])["sessions"]
    optimizer.start_session("FORGE", "zebra", session_id="s",
                            metadata={"cwd": "/w", "note": "TOKEN=" + SECRET})
    optimizer.log_event("s", "TOOL_CALL",
                        {"command": "twine -p " + SECRET,
                         "response_id": "msg_01AbCdEfGhIjKlMnOpQrStUv", "changes": []}, 50)
    optimizer.log_event("s", "FILE_READ",
                        {"file_path": "a.py", "content_hash": "0123456789abcdef"}, 50)
    optimizer.analyze("s"), optimizer.summaries()
    path = os.path.join(optimizer.store.reports, "s_report.json")
    write(path, read(path).replace(b"FORGE", SECRET.encode()))
    old_state_of(optimizer.store)
    path = os.path.join(root, "scan.json")
    state = json.loads(read(path).replace(json.dumps(row["task"]).encode(),
                                          json.dumps("export KEY=" + SECRET).encode()))
    for unit in state["units"].values():
        unit["settings"] = "of version 2.0, whose rows had fewer columns"
        unit["rows"] = [{name: kept for name, kept in one.items() if name in ROWS_OF_2_0}
                        for one in unit["rows"]]
    write(path, json.dumps(state))
    os.unlink(os.path.join(root, "masked-1"))
    return row["id"]


@pytest.mark.parametrize(
    "words", [["repair"], ["scan", "TRANSCRIPT"], ["delete", "other"], ["import", "session.json"]])
def test_an_older_store_is_masked_once_by_the_first_command_that_may_take_its_time(
        tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(str(tmp_path))
    transcript, root = tiny(tmp_path / "t").save(), str(tmp_path / "store")
    imported = older_store(root, transcript)
    SessionOptimizer(root).start_session("FORGE", "t", session_id="other")
    write("session.json", json.dumps(dict(WHOLE_SESSION, id="new")))
    assert (SECRET.encode() in stored_bytes(root)
            and not os.path.exists(os.path.join(root, "masked-1")))
    fresh = SessionOptimizer(root)
    assert SECRET not in str(fresh.get_session("s")) + fresh.export_report("s", "csv")
    assert so.main(
        ["--store", root, *[transcript if word == "TRANSCRIPT" else word for word in words]]) == 0
    capsys.readouterr()
    kept = stored_bytes(root)
    assert SECRET.encode() not in kept and b"0123456789abcdef" not in kept
    session = SessionOptimizer(root).get_session("s")
    assert ([event.tokens for event in session.events] == [0, 50, 50] and session.task == "zebra"
            and session.metadata["cwd"] == "/w")
    assert (session.events[1].data["response_id"] == "msg_01AbCdEfGhIjKlMnOpQrStUv"
            and session.events[2].data == {"file_path": "a.py"})
    assert SessionOptimizer(root).get_session(imported).metadata["source"]["path"] == transcript
    before = {name: os.stat(os.path.join(root, "sessions", name)).st_mtime_ns
              for name in os.listdir(os.path.join(root, "sessions"))}
    so.main(["--store", root, "repair"])
    assert before == {name: os.stat(os.path.join(root, "sessions", name)).st_mtime_ns
                      for name in os.listdir(os.path.join(root, "sessions"))}
    assert len(SessionOptimizer(root).scan([transcript])["sessions"]) == 1
    assert SessionOptimizer(root).scan([transcript])["changes"] == "nothing since the last scan"


def test_a_new_store_is_never_masked_again(tmp_path):
    for number, begin in enumerate(
            (lambda o: o.start_session("FORGE", "t", session_id="s"), lambda o: o.import_session(
                    dict(WHOLE_SESSION, id="s", status="ACTIVE")),
             lambda o: o.scan([tiny(tmp_path / "t").save()]))):
        optimizer = SessionOptimizer(str(tmp_path / str(number)))
        assert (not optimizer.store.needs_masking()
                and not os.path.exists(os.path.join(optimizer.store.root, "masked-1")))
        begin(optimizer)
        assert not SessionOptimizer(optimizer.store.root).store.needs_masking()
        if os.path.exists(optimizer.store.find("s")):
            optimizer.log_event("s", "FILE_READ", {"content_hash": "0123456789abcdef"})
            assert SessionOptimizer(optimizer.store.root).get_session(
                "s").events[-1].data["content_hash"] == "0123456789abcdef"


# every file call of ours that fails, or is the last

FILE_CALLS = ("open", "close", "read", "write", "lseek", "fsync", "ftruncate", "link", "unlink",
              "replace", "makedirs", "chmod", "stat", "lstat", "fstat", "scandir", "access")


class Faulty:
    """Stands for `os` (and for `open`) in the module: counts its file calls, and lets the one of
    number ``at`` fail with ``error``, or be the last thing the process does (``error`` None), a
    write then being half done."""

    def __init__(self, at=0, error=None):
        self.at, self.error, self.count = at, error, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        return self.wrapped(name, real) if name in FILE_CALLS else real

    def wrapped(self, name, real):
        def call(*args, **kwargs):
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            if self.error is None:
                if name == "write":
                    real(args[0], bytes(args[1])[:len(args[1]) // 2], *args[2:])
                os._exit(7)
            if name == "close":
                real(*args)
            raise OSError(self.error, os.strerror(self.error))
        return call

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(so, "os", self)
        self.patch.setattr(so, "open", self.wrapped("open", open), raising=False)
        return self

    def __exit__(self, *_):
        self.patch.undo()


def torn(o, _):
    path = o.store.find("s")
    write(path, read(path)[:-30])
    o.log_event("s", "CUSTOM")


def damaged(o, _):
    path = o.store.find("s")
    write(path, read(path).replace(b',{"id":"s_1', b',#"id":"s_1'))
    o.log_event("s", "CUSTOM")


# what is done to a store that holds a session "s" with three events, its report, and one imported
# session
WRITING = {
    "start": lambda o, _: o.start_session("FORGE", "t", session_id="new"),
    "start over": lambda o, _: (o.end_session("s"), o.start_session("FORGE", "t", session_id="s")),
    "log": lambda o, _: o.log_event("s", "CUSTOM", {"x": "y" * 3_000}),
    "end": lambda o, _: o.end_session("s"),
    "analyze": lambda o, _: o.analyze("s"),
    "import": lambda o, _: o.import_session(dict(WHOLE_SESSION, id="s")),
    "hook": lambda o, _: o.log_hook(
        {"session_id": "h", "hook_event_name": "UserPromptSubmit", "prompt": "Fix it"}),
    "name": lambda o, _: [
        o.log_hook({"session_id": "n", "hook_event_name": name, "prompt": "Fix it"})
        for name in ("SessionStart", "UserPromptSubmit")],
    "summaries": lambda o, _: o.summaries(),
    "delete": lambda o, _: o.delete_session("s"),
    "delete imported": lambda o, _: o.delete_session("11111111-2222-4333-8444-555555555555"),
    "scan": lambda o, transcripts: o.scan([transcripts], again=True),
    "mend a torn end": torn,
    "mend with losses": damaged,
    "repair": lambda o, _: o.repair(discard=True),
    "mask": lambda o, _: (os.unlink(os.path.join(o.store.root, "masked-1")), o.repair()),
}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    place = tmp_path_factory.mktemp("stocked")
    optimizer = SessionOptimizer(str(place / "store"))
    optimizer.start_session("FORGE", "t", session_id="s")
    for _ in range(2):
        optimizer.log_event("s", "FILE_READ", {"file_path": "a.py"}, 100)
    optimizer.analyze("s")
    tiny(place / "t").save()
    optimizer.scan([str(place / "t")])
    return place


def outcome(root, doing, faulty, transcripts):
    """"done", the error's text, or None after a kill: of doing one thing with a faulty system."""
    optimizer = SessionOptimizer(root)
    pid = os.fork() if faulty.error is None else 0
    if pid:
        return None if os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 7 else "done"
    try:
        with warnings.catch_warnings(), faulty:
            warnings.simplefilter("ignore")
            WRITING[doing](optimizer, transcripts)
        return "done"
    except (SessionOptimizerError, OSError) as error:
        return str(error)
    finally:
        if faulty.error is None:
            os._exit(0)


def check_intact(root, doing, result, transcripts):
    """Nothing acknowledged is lost, nothing is unreadable, and the next command works."""
    optimizer = SessionOptimizer(root)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sessions = {session.id: session for session in optimizer.list_sessions()}
        assert all(session.events for session in sessions.values())
        kept = [session for name, session in sessions.items()
                if name in ("s", "s.1") and len(session.events) >= 3]
        assert kept or doing in ("delete", "mend with losses"), sorted(sessions)
        if result == "done":
            assert doing != "log" or len(kept[0].events) == 4
            assert (doing != "delete" or "s" not in sessions
                    and "s_report.json" not in os.listdir(optimizer.store.reports))
            assert doing != "delete imported" or optimizer.scan([transcripts])["sessions"] == []
        assert len(optimizer.summaries()) == len(sessions)
        assert (optimizer.start_session("FORGE", "t", session_id="next")
                and optimizer.log_event("next", "CUSTOM"))
        optimizer.scan([transcripts])
        optimizer.delete_session("s")
        assert (optimizer.get_session("s") is None
                and optimizer.repair(discard=True)["damaged"] == [])
    said = [str(one.message) for one in told]
    assert not [text for text in said if not re.search("repaired|kept as|in memory", text)], said


ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR)


@posix_only
@pytest.mark.parametrize("doing", WRITING)
@pytest.mark.parametrize("turn", ["kill", 0, 1, 2] if KILLS > 100 else ["kill", 0])
def test_whichever_file_call_fails_or_is_the_last_nothing_is_lost(stocked, tmp_path, doing, turn):
    transcripts, number, result = str(stocked / "t"), 0, ""
    while number < 400:
        number += 1
        root = str(tmp_path / str(number))
        shutil.copytree(str(stocked / "store"), root)
        faulty = Faulty(number, None if turn == "kill" else ERRORS[(number + turn) % 3])
        result = outcome(root, doing, faulty, transcripts)
        check_intact(root, doing, result, transcripts)
        shutil.rmtree(root)
        if result == "done" and (turn == "kill" or faulty.count < number):
            break
    assert 5 < number < 400


# what a store knows across its sessions

def unit_of(name, *, rows=1, size=0):
    """(files, units, told, rows) of one unit, as a scan saves them."""
    about = {"files": [name], "reader": "claude-code", "order": ["a", "b", name], "settings": "s",
             "skipped": []}
    found = [{"id": f"{name}-{number}", "task": "x" * size} for number in range(rows)]
    return ({name: {"stamp": [1, 2], "unit": name}}, {name: about}, {name: {f"r-{name}": 7}},
            {name: found})


def test_a_state_keeps_what_scans_found(store):
    state, odd = store.state, "/t/\udce9 '\"\u2028.jsonl"
    for name in ("a", odd):
        assert state.save_scan(*unit_of(name, rows=2), [], 0) == set()
    assert (set(state.scanned()[1]) == set(state.scanned()[2]) == {"a", odd}
            and state.responses() == {"a": {"r-a": 7}, odd: {f"r-{odd}": 7}})
    assert [row["id"] for row in state.rows_of(["a", odd, "none"])[odd]] == [odd + "-0", odd + "-1"]
    assert state.rows_of(["none"]) == {"none": []} and state.units_of_rows()["a-1"] == "a"
    before = state.generation()
    state.save_scan({}, {}, {}, {}, ["a"], 0)
    assert (set(state.scanned()[2]) == set(state.units_of_rows().values()) == {odd}
            and state.responses() == {odd: {f"r-{odd}": 7}})
    state.save_scan(*unit_of("a"), [], 0)
    assert state.generation() > before


def test_what_was_deleted_during_a_scan_stays_deleted(store):
    state = store.state
    state.forget("early", True)
    mark = max(state.scanned()[3].values())
    state.forget("u-1", True), state.forget("never-imported", False)
    files, units, told, rows = unit_of("u", rows=3)
    rows["u"].append({"id": "early"})
    assert state.save_scan(files, units, told, rows, [], mark) == {"u-1"}
    assert ([row["id"] for row in state.rows_of(["u"])["u"]] == ["u-0", "u-2", "early"]
            and list(state.scanned()[3]) == ["u-1"])
    state.forget("u-0", False)  # it has a row, so a scan would bring it back
    assert (list(state.scanned()[3]) == ["u-1", "u-0"]
            and [row["id"] for row in state.rows_of(["u"])["u"]] == ["u-2", "early"])


def test_summaries_belong_to_their_settings(store):
    store.state.save_summaries("a", {"s1": {"x": 1}, "s2": {"x": 2}}, [])
    store.state.save_summaries("b", {"s2": {"x": 3}}, ["s3"])
    assert (store.state.summaries("a") == {"s1": {"x": 1}}
            and store.state.summaries("b") == {"s2": {"x": 3}})
    store.state.save_summaries("a", {}, ["s1"])
    store.state.forget("s2", False)
    assert (store.state.summaries("a") == store.state.summaries("b")
            == store.state.scanned()[3] == {})


def test_a_python_without_sqlite_says_so_and_still_logs(tmp_path, optimizer, monkeypatch):
    path = tiny(tmp_path / "t").save()
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with pytest.raises(StorageError, match="without sqlite3.*--no-store"):
        optimizer.scan([path])
    assert len(optimizer.scan([path], store=False)["sessions"]) == 1
    assert (optimizer.start_session("FORGE", "t", session_id="s")
            and optimizer.log_event("s", "CUSTOM"))
    write(optimizer.store.state.path, b"")  # of another Python, which had it
    with pytest.warns(SessionOptimizerWarning, match="may come back.*without sqlite3"):
        assert optimizer.delete_session("s")


@posix_only
def test_the_state_is_its_owners_alone(store):
    previous = os.umask(0)
    try:
        store.state.forget("s1", True)
    finally:
        os.umask(previous)
    assert (stat.S_IMODE(os.stat(store.state.path).st_mode) == 0o600
            and os.listdir(store.root) == ["state.sqlite3"])
    os.rename(store.state.path, store.root + ".elsewhere")
    os.symlink(store.root + ".elsewhere", store.state.path)
    with pytest.raises(StorageError, match="symbolic link"):
        store.state.scanned()


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs /proc")
def test_an_update_writes_what_changed_and_not_what_the_history_holds(store):
    def written():
        return int(re.search(rb"wchar: (\d+)", read("/proc/self/io")).group(1))

    parts = [unit_of(f"/transcripts/{number:05}.jsonl", size=5_000) for number in range(1_000)]
    files, units, told, rows = ({key: value for part in parts for key, value in part[kind].items()}
                                for kind in range(4))
    store.state.save_scan(files, units, told, rows, [], 0)
    size, before = os.path.getsize(store.state.path), written()
    store.state.save_scan(*unit_of("/transcripts/00500.jsonl", size=6_000), [], 0)
    assert size > 5_000_000 and written() - before < 500_000


@pytest.mark.parametrize("damage", [b"x" * 700, b"SQLite format 3\0" + b"\1" * 5_000,
                                    b"\0" * 10_000, "middle", "tables", "json", "version"],
                         ids=lambda value: str(value)[:12])
def test_a_damaged_state_is_begun_afresh(tmp_path, optimizer, damage):
    import sqlite3
    path = tiny(tmp_path / "t").save()
    row, = optimizer.scan([path])["sessions"]
    state = optimizer.store.state
    if damage == "middle":
        data = read(state.path)
        damage = data[:4_096] + b"\xa5" * (len(data) - 4_096)
    if isinstance(damage, bytes):
        write(state.path, damage)
    else:
        db = sqlite3.connect(state.path)
        db.execute({"tables": "DROP TABLE units", "json": "UPDATE files SET value = '[1'",
                    "version": "PRAGMA user_version = 9"}[damage])
        db.commit()
        db.close()
    fresh = SessionOptimizer(optimizer.store.root)
    with pytest.warns(SessionOptimizerWarning, match="state.sqlite3 was damaged .* begun afresh"):
        assert fresh.scan([path])["sessions"] == [row]
    assert (fresh.scan([path])["changes"] == "nothing since the last scan"
            and len(fresh.list_sessions()) == 1)


def old_state_of(store):
    """Write the state files of version 2.0 in place of the state there is."""
    state = store.state
    _, files, units, deleted = state.scanned()
    rows = state.rows_of(units)
    owners = {response: [unit, output] for unit, its in state.responses().items()
              for response, output in its.items()}
    found = {"scan": {"version": 1, "files": files,
                      "units": {name: dict(unit, rows=rows[name]) for name, unit in units.items()}},
             "scan-responses": owners, "deleted": sorted(deleted),
             "summaries": {"settings": SETTINGS, "rows": state.summaries(SETTINGS)}}
    os.unlink(state.path)
    for name, value in found.items():
        write(os.path.join(store.root, name + ".json"), json.dumps(value))


SETTINGS = so.settings_of([cls() for cls in so.BUILT_IN_ANALYZERS], so.PriceList())


def test_what_version_2_0_had_noted_as_deleted_stays_deleted(tmp_path, optimizer):
    for name in ("a", "b", "c"):
        tiny(tmp_path / "t", name=name * 8 + "-2222-4333-8444-555555555555").save()
    rows = optimizer.scan([str(tmp_path / "t")])["sessions"]
    assert optimizer.delete_session(rows.pop(0)["id"]) and len(optimizer.summaries()) == 2
    before = optimizer.summaries()
    old_state_of(optimizer.store)
    fresh = SessionOptimizer(optimizer.store.root)
    result = fresh.scan([str(tmp_path / "t")])
    assert (result["sessions"] == rows
            and [row["id"] for row in fresh.summaries()] == [row["id"] for row in before])
    assert fresh.scan([str(tmp_path / "t")])["changes"] == "nothing since the last scan"
    assert sorted(os.listdir(fresh.store.root)) == ["masked-1", "reports", "scan.lock", "sessions",
                                                    "state.sqlite3"]


@pytest.mark.parametrize(
    "name, value", [("scan", 5), ("deleted", 5), ("deleted", {"a": 1}), ("deleted", "not JSON")])
def test_old_state_files_that_hold_something_else_are_left_out(tmp_path, optimizer, name, value):
    path = tiny(tmp_path / "t").save()
    write(os.path.join(optimizer.store.root, name + ".json"),
          "{" if value == "not JSON" else json.dumps(value))
    assert optimizer.scan([path])["totals"]["sessions"] == 1 and len(optimizer.summaries()) == 1


def scan_alone(root, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SessionOptimizer(root).scan([folder])


@posix_only
def test_two_scans_at_once_keep_all_units(tmp_path, optimizer):
    for number in range(24):
        tiny(tmp_path / "ab"[number % 2], name=f"{number:08}-2222-4333-8444-555555555555").save()
    scans = [fork.Process(target=scan_alone, args=(optimizer.store.root, str(tmp_path / name)))
             for name in "abab"]
    for scan in scans:
        scan.start()
    for scan in scans:
        scan.join()
    assert [scan.exitcode for scan in scans] == [0] * 4
    assert (len(optimizer.store.state.scanned()[2]) == len(optimizer.store.state.units_of_rows())
            == 24 == len(optimizer.list_sessions()))
    assert optimizer.scan([str(tmp_path)])["changes"] == "nothing since the last scan"


@posix_only
def test_a_scan_that_waits_for_another_says_so(tmp_path, optimizer):
    path = tiny(tmp_path / "t").save()
    lock = so.lock_scan(optimizer.store.root)
    release = threading.Timer(0.3, so._release, [lock])
    release.start()
    with pytest.warns(SessionOptimizerWarning, match="another scan"):
        assert len(optimizer.scan([path])["sessions"]) == 1
    release.join()
    assert len(optimizer.scan([path], again=True)["sessions"]) == 1


@posix_only
def test_deletes_during_a_scan_all_stick(tmp_path, optimizer):
    transcripts = [tiny(tmp_path / "t", name=f"{number:08}-2222-4333-8444-555555555555")
                   for number in range(48)]
    for transcript in transcripts:
        transcript.save()
    ids = [row["id"] for row in optimizer.scan([str(tmp_path / "t")])["sessions"]]
    for transcript in transcripts:  # so that the scan has to read them all again
        transcript.answer("m3", (5, 0, 1_160, 7), text(20))
        transcript.save()
    scan = fork.Process(target=scan_alone, args=(optimizer.store.root, str(tmp_path / "t")))
    deletes = [fork.Process(target=SessionOptimizer(optimizer.store.root).delete_session,
                            args=(name,)) for name in ids[::2]]
    for process in [scan, *deletes]:
        process.start()
    for process in [scan, *deletes]:
        process.join()
    assert [process.exitcode for process in [scan, *deletes]] == [0] * 25
    assert sorted(session.id for session in optimizer.list_sessions()) == sorted(ids[1::2])
    assert (sorted(row["id"] for row in optimizer.scan([str(tmp_path / "t")])["sessions"])
            == sorted(ids[1::2]))


# what is left behind

def hour_old(path):
    os.utime(write(path, b"{}"), (time.time() - 4_000,) * 2)
    return path


def test_delete_leaves_nothing_of_the_session(tmp_path, optimizer):
    transcript = tiny(tmp_path / "t", name="aaaaaaaa-2222-4333-8444-555555555555").save()
    row, = optimizer.scan([transcript])["sessions"]
    for name in ("mine", row["id"]):
        if name == "mine":
            optimizer.start_session("FORGE", "zebra77", session_id=name)
            for _ in range(3):
                optimizer.log_event(name, "FILE_READ", {"file_path": "zebra77.py"}, 10)
        optimizer.analyze(name), optimizer.summaries()
        path = optimizer.store.find(name)
        write(path, read(path).replace(b"FILE_READ", b"FILE_READ\"", 1))
        with pytest.warns(SessionOptimizerWarning, match="damaged-1"):
            optimizer.get_session(name)
        assert optimizer.delete_session(name) and not optimizer.delete_session(name)
    assert os.listdir(optimizer.store.sessions) == os.listdir(optimizer.store.reports) == []
    kept = stored_bytes(optimizer.store.root)
    assert b"zebra77" not in kept and b"mine" not in kept and row["task"].encode() not in kept
    assert optimizer.scan([transcript])["sessions"] == [] == optimizer.summaries()


def test_a_report_of_a_session_that_was_deleted_meanwhile_is_not_kept(optimizer, monkeypatch):
    optimizer.start_session("FORGE", "t", session_id="s")
    report = optimizer.analyze("s")
    SessionOptimizer(optimizer.store.root).delete_session("s")
    optimizer.store.write_report("s", report.to_dict())
    assert os.listdir(optimizer.store.reports) == []
    monkeypatch.setattr(so, "build_report", lambda *_: (optimizer.store.delete("t"), report)[1])
    optimizer.start_session("FORGE", "t", session_id="t")
    assert optimizer.analyze("t") is report and os.listdir(optimizer.store.reports) == []


def test_what_crashes_left_is_swept(store):
    filled(store, 1), store.write_report("s1", {}), filled(store, 1, "mine_report")
    gone = [hour_old(os.path.join(folder, ".%d.tmp" % number))
            for number, folder in enumerate((store.root, store.sessions, store.reports))]
    gone.append(write(os.path.join(store.reports, "nobody_report.json"), b"{}"))
    kept = [write(os.path.join(store.sessions, ".new.tmp"), b"{}"),
            hour_old(os.path.join(store.root, "mine.tmp")),
            hour_old(os.path.join(store.root, "prices.json")),
            os.path.join(store.reports, "s1_report.json"), store.find("s1"),
            store.find("mine_report"), hour_old(os.path.join(store.root, "all_report.json"))]
    assert store.sweep() == 4 and store.sweep() == 0
    assert not [path for path in gone if os.path.exists(path)] and all(map(os.path.exists, kept))
    hour_old(gone[0]), filled(store, 1, "s2"), Store(store.root).delete("s2")
    assert os.path.exists(gone[0])
    SessionOptimizer(store.root).delete_session("s1")
    assert not os.path.exists(gone[0])


def test_damaged_copies_are_listed_and_removed_on_demand(tmp_path, capsys):
    store = Store(str(tmp_path / "store"))
    for name, good in (("a", False), ("b", False), ("good", True)):
        path = filled(store, 4, name)
        if not good:
            write(path, read(path).replace(b"FILE_READ", b"FILE_READ\"", 1))
    put(store, "hopeless.json", b"[]")
    hour_old(os.path.join(store.sessions, ".x.tmp"))

    def shown(*words, status=0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert so.main(["--store", store.root, *words]) == status
        return capsys.readouterr().out

    assert store.copies() == []
    assert re.search(r"Repaired: 2\n.*kept.*: 2\nOther.*: 1\nNot readable: 1\n.*hopeless.json",
                     shown("repair", status=1))
    assert (len(re.findall(r"damaged-1 \(.*repair.* --discard.* removes it\)", shown("list"))) == 2
            and len(store.load("a")["events"]) == 3)
    assert re.search(r"Repaired: 0\n.*removed: 2\nOther.*: 0\nNot readable: 1",
                     shown("repair", "--discard", status=1))
    assert (shown("delete", "hopeless") and shown("repair").count(": 0") == 4
            and store.copies() == [])


@posix_only
def test_nobody_else_may_write_into_the_store(tmp_path):
    store = Store(tmp_path / "store")
    filled(store, 1)
    for folder, mode in ((store.sessions, 0o777), (store.reports, 0o775)
                         if os.path.isdir(store.reports) else (store.sessions, 0o775)):
        os.chmod(folder, mode)
    fresh = Store(store.root)
    assert len(fresh.load("s1")["events"]) == 1 and fresh.warnings == []
    assert stat.S_IMODE(os.stat(store.sessions).st_mode) & 0o022 == 0
    for mode, told in ((0o755, 0), (0o777, 1), (0o1777, 0)):
        os.chmod(store.root, mode)
        fresh = Store(store.root)
        fresh.load("s1"), fresh.load("s1")
        assert (len(fresh.warnings) == told
                and all("others can write" in text for text in fresh.warnings))
        assert stat.S_IMODE(os.stat(store.root).st_mode) == mode


@posix_only
def test_pipes_and_devices_are_refused(tmp_path, optimizer, capsys):
    pipe = str(tmp_path / "pipe.json")
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        assert (so.main(["--store", optimizer.store.root, "import", path]) == 1
                and "regular file" in capsys.readouterr().err)
        with pytest.raises(StorageError, match="regular file"):
            optimizer.scan([path])
    os.mkfifo(os.path.join(optimizer.store.root, "prices.json"))
    with pytest.raises(InvalidValue, match="regular file"):
        _ = SessionOptimizer(optimizer.store.root).prices


def test_what_another_process_deletes_is_simply_not_there(tmp_path, optimizer, monkeypatch, capsys):
    for name in ("alpha", "beta", "gamma"):
        optimizer.start_session("FORGE", "t", session_id=name)
    entries = optimizer.store._entries

    def vanishing(folder):
        for entry in list(entries(folder)):
            if entry.name == "beta.json" and os.path.exists(entry.path):
                assert entry.is_file(follow_symlinks=False)
                os.unlink(entry.path)
            yield entry
    monkeypatch.setattr(Store, "_entries", staticmethod(vanishing))
    assert [row["id"] for row in optimizer.summaries()] == ["alpha", "gamma"]
    optimizer.start_session("FORGE", "t", session_id="beta")
    assert (optimizer.alerts() == []
            and optimizer.agent_statistics("FORGE")["sessions_analyzed"] == 2)
    optimizer.start_session("FORGE", "t", session_id="beta")
    assert (so.main(["--store", optimizer.store.root, "analyze", "alp"]) == 0
            and capsys.readouterr().err == "")
    optimizer.start_session("FORGE", "t", session_id="beta")
    assert [session.id for session in optimizer.list_sessions()] == ["gamma", "alpha"]
    optimizer.start_session("FORGE", "t", session_id="beta")
    monkeypatch.setattr(so, "build_report", lambda session, _, build=so.build_report: (
        os.unlink(optimizer.store.find(session.id)), build(session, _))[1])
    assert optimizer.analyze("beta").total_tokens == 0 and optimizer.get_session("beta") is None


# large sessions, and the disk

@pytest.mark.parametrize("block", [7, 100, 1 << 20])
def test_a_session_read_in_blocks_is_the_session(store, monkeypatch, block):
    monkeypatch.setattr(so, "_BLOCK", block)
    monkeypatch.setattr(so, "_LINES", 2)
    for count in (0, 1, 2, 7):
        store.create(header(), [event(number, size=number * 40) for number in range(count)],
                     {}, replace=True)
        doc = store.load("s1")
        assert doc == json.loads(read(store.find("s1"))) and len(doc["events"]) == count
        made, mark = store.load_marked("s1", so.SessionEvent.from_dict)
        assert [one.to_dict() for one in made["events"]] == doc["events"]
        store.append("s1", make())
        assert ([one["id"] for one in store.tail("s1", mark)[0]] == ["s1_%d" % count]
                and not store.warnings)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_large_session_is_never_whole_in_memory_as_text(store):
    path = filled(store, 0)
    with open(path, "rb") as file:
        head, foot = file.read().split(b"\n", 1)
    line = json.dumps(event(1, size=20_000)).encode()[:-1] + b" }\n"
    write(path, head + b"\n" + b",".join([line] * 3_000)
          + foot.replace(b'"event_count":0', b'"event_count":3000'))
    code = ("import sessionoptimizer as so, resource; peak = lambda: "
            "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); optimizer = "
            "so.SessionOptimizer(%r); optimizer.store.load_marked('s1', lambda one: one['id']); "
            "optimizer.repair(); optimizer.log_event('s1', 'CUSTOM'); optimizer.list_sessions(); "
            "optimizer.delete_session('s1'); print(peak() - before)" % store.root)
    assert int(python("-c", code, PYTHONPATH=HERE)[1]) < 20_000  # KB, of a file of 60 MB


def test_a_loaded_session_takes_about_twice_its_file_in_memory(optimizer):
    session = session_of(*(E("FILE_READ", 1_000 + number, 40, _at=number // 3,
                             file_path="/src/module_%d.py" % (number % 50),
                             tool="Read", content_hash="%016x" % number, line=number,
                             response_id="msg_%020d" % (number // 3)) for number in range(20_000)),
                         source={"reader": "claude-code", "path": "/t.jsonl"})
    optimizer._live.create(session)
    size = os.path.getsize(optimizer.store.find("s"))
    tracemalloc.start()
    try:
        events = optimizer.get_session("s").events
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert events == session.events and kept < 2.3 * size
    assert events[0].data["response_id"] is events[1].data["response_id"]  # told once
    assert events[0].data is not events[1].data


def test_durable_forces_every_event_to_the_disk(tmp_path, monkeypatch, capsys):
    forced = []
    monkeypatch.setattr(so.os, "fsync", lambda fd, real=os.fsync: forced.append(fd) or real(fd))
    for durable, expected in ((False, 0), (True, 1)):
        optimizer = SessionOptimizer(str(tmp_path / "store"), durable=durable)
        optimizer.start_session("FORGE", "t", session_id="s%d" % expected)
        del forced[:]
        optimizer.log_event("s%d" % expected, "CUSTOM")
        assert len(forced) == expected
    for words, expected in (([], 0), (["--durable"], 1)):
        del forced[:]
        assert (so.main(["--store", optimizer.store.root, "log", "s1", "CUSTOM", *words]) == 0
                and len(forced) == expected)


# the state, killed and without room

def state_loop(root, pipe):
    state, number = Store(root).state, 0
    while True:
        number += 1
        state.forget("gone-%d" % number, True)
        state.save_scan(*unit_of("u%d" % number, rows=20, size=2_000), [], 0)
        state.save_summaries("s", {"u%d" % number: {"x": "y" * 3_000}}, [])
        os.write(pipe, b"%d\n" % number)


@posix_only
def test_a_kill_loses_nothing_that_the_state_acknowledged(store):
    random.seed(5)
    for _ in range(max(20, KILLS // 5)):
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                state_loop(store.root, send)
            finally:
                os._exit(1)
        os.close(send)
        with open(receive, "rb") as acknowledged:
            first = acknowledged.readline()
            time.sleep(random.random() * 0.03)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            last = int((first + acknowledged.read()).split(b"\n")[-2])
        _, files, units, deleted = store.state.scanned()
        assert {"gone-%d" % number for number in range(1, last + 1)} <= set(deleted)
        assert ({"u%d" % number for number in range(1, last + 1)} <= set(units) == set(files)
                == set(store.state.units_of_rows().values()))
        assert len(store.state.summaries("s")) >= last and not store.warnings
        store.state.save_scan({}, {}, {}, {}, units, 0)  # keep the file small
        os.unlink(store.state.path)


@posix_only
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting takes root")
def test_a_full_disk_leaves_the_state_intact(tmp_path):
    if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]).returncode:
        pytest.skip("no mount here")
    try:
        store, number, ballast = (Store(tmp_path / "store"), 0,
                                  write(tmp_path / "ballast", b"x" * 150_000))
        with pytest.raises(StorageError, match="disk is full|full"):
            while True:
                store.state.save_scan(*unit_of("u%d" % number, size=20_000), [], 0)
                number += 1
        fresh = Store(store.root)
        assert (set(fresh.state.scanned()[2]) == {"u%d" % done for done in range(number)}
                and number > 3)
        assert len(fresh.state.rows_of(["u0"])["u0"]) == 1 and not fresh.warnings
        os.unlink(ballast)
        fresh.state.forget("u0-0", True)
        assert list(fresh.state.scanned()[3]) == ["u0-0"] and not fresh.warnings
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# disks

def run_child(function, uid=None):
    """True when `function` returns in a forked child (after giving up root)."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if uid is not None and os.getuid() == 0:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            function()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("below", [False, True])
def test_store_path_that_is_a_file(tmp_path, below):
    path = tmp_path / "file"
    path.write_text("mine")
    store = Store(path / "below" if below else path)
    for call in (lambda: store.create(header(), [], {}), lambda: store.load("s1"),
                 lambda: list(store.headers()),
                 lambda: store.append("s1", make()), lambda: store.write_report("s1", {})):
        with pytest.raises(StorageError, match="file.*--store"):
            call()
    assert path.read_text() == "mine"


@posix_only
def test_size_limit_leaves_the_session_intact(store):
    import resource
    path = filled(store, 20)
    before = read(path)

    def child():
        for room in (0, 1, 50, 170, 250):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, resource.RLIM_INFINITY))
            with pytest.raises(StorageError, match="size limit.*intact"):
                store.append("s1", make(size=200))
            assert read(path) == before
            with pytest.raises(StorageError, match="size limit"):
                store.create(header("big"), [event(0, size=50_000)], {})
            assert os.listdir(store.sessions) == ["s1.json"]
    assert run_child(child)
    store.append("s1", make())
    assert len(store.load("s1")["events"]) == 21 and not store.warnings


@posix_only
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("size", [300, 3000, 50_000])
def test_full_disk_leaves_the_session_intact(tmp_path, size):
    if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]).returncode:
        pytest.skip("no mount here")
    try:
        store = Store(tmp_path / "store")
        path = filled(store, 0)
        with pytest.raises(StorageError, match="disk is full.*intact"):
            while True:
                before = read(path)
                store.append("s1", make(size=size))
        assert read(path) == before and not Store(store.root).warnings
        write(path, before[:-20])  # and a torn one is repaired in memory
        assert (store.load("s1")["events"] == json.loads(before)["events"]
                and "in memory" in store.warnings[0])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@posix_only
def test_directory_without_permission(tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if (parent.stat().st_uid == os.getuid() and parent != parent.parent
                and str(parent) != "/tmp"):
            os.chmod(parent, 0o755)
    store = Store(tmp_path / "store")
    path = filled(store, 3)
    data = read(path)
    write(path, data[:-20])
    for name, mode in ((path, 0o444), (store.sessions, 0o555), (store.root, 0o555)):
        os.chmod(name, mode)

    def read_only():
        fresh = Store(store.root)
        assert len(fresh.load("s1")["events"]) == 3 and "in memory" in fresh.warnings[0]
        assert fresh.head("s1")["event_count"] == 3
        for call in (lambda: fresh.append("s1", make()), lambda: fresh.create(header("s2"), [], {}),
                     lambda: fresh.delete("s1"), lambda: fresh.write_report("s1", {}),
                     lambda: Store(tmp_path / "other").create(header(), [], {})):
            with pytest.raises(StorageError, match="no permission.*(chown|--store)"):
                call()

    def unreadable():
        with pytest.raises(StorageError, match="no permission"):
            list(Store(store.root).headers())
    assert run_child(read_only, 65534)
    os.chmod(path, 0)
    assert run_child(lambda: _one_problem(store), 65534)
    os.chmod(store.sessions, 0)
    assert run_child(unreadable, 65534)
    for name, mode in ((store.root, 0o700), (store.sessions, 0o700), (path, 0o600)):
        os.chmod(name, mode)
    assert read(path) == data[:-20]


def _one_problem(store):
    with pytest.raises(StorageError, match="no permission"):
        Store(store.root).head("s1")


@posix_only
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting takes root")
def test_read_only_file_system(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode:
        pytest.skip("no mount here")
    try:
        optimizer = SessionOptimizer(tmp_path / "store")
        store = Store(optimizer.store.root)
        path = filled(store, 3)
        rows = optimizer.scan([tiny(tmp_path / "t").save()])["sessions"]
        write(path, read(path)[:-20])
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        assert optimizer.scan([str(tmp_path / "t")])["sessions"] == rows
        with pytest.warns(SessionOptimizerWarning,
                          match="in memory|summaries could not be saved: .*state.sqlite3"):
            assert len(optimizer.summaries()) == 2
        assert len(store.load("s1")["events"]) == 3 and "in memory" in store.warnings[0]
        with pytest.raises(StorageError, match="read-only"):
            store.append("s1", make())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_hard_links(store, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")
    monkeypatch.setattr(os, "link", refuse)
    filled(store, 2)
    with pytest.raises(SessionExists):
        store.create(header(), [], {})
    assert len(store.load("s1")["events"]) == 2 and os.listdir(store.sessions) == ["s1.json"]


# ==================================================================================================
# Recorder
# ==================================================================================================

# What scans make of transcripts.

class Transcript:
    """Writes a Claude Code transcript line by line."""

    def __init__(self, folder, name="11111111-2222-4333-8444-555555555555", cwd="/w",
                 model="claude-opus-4-5-20251101"):
        self.path = os.path.join(str(folder), name + ".jsonl")
        self.session, self.cwd, self.model, self.lines = name, cwd, model, []

    def line(self, kind, message=None, **more):
        number = len(self.lines) + 1
        entry = {"type": kind, "uuid": "u%d-%s" % (number, self.session), "parentUuid": None,
                 "sessionId": self.session,
                 "timestamp": "2026-03-01T10:%02d:%02d.000Z" % (number // 60, number % 60),
                 "cwd": self.cwd, "version": "2.1.200", "isSidechain": False}
        if message is not None:
            entry["message"] = message
        self.lines.append(json.dumps(dict(entry, **more)).encode() + b"\n")

    def prompt(self, text, **more):
        self.line("user", {"role": "user", "content": text}, **more)

    def answer(self, identity, usage, *blocks, **more):
        """``usage``: plain input, five-minute writes, cache reads, output."""
        plain, written, cached, output = usage
        for block in blocks:
            self.line("assistant", {
                "id": identity, "model": self.model, "role": "assistant", "type": "message",
                "content": [block], "stop_reason": "end_turn", "usage": {
                    "input_tokens": plain, "output_tokens": output,
                    "cache_creation_input_tokens": written,
                    "cache_read_input_tokens": cached}}, **more)

    def result(self, identity, content, error=False, **more):
        block = {"type": "tool_result", "tool_use_id": identity, "content": content}
        self.line("user",
                  {"role": "user", "content": [dict(block, is_error=True) if error else block]},
                  **more)

    def save(self):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write(self.path, b"".join(self.lines))
        return self.path


def text(size):
    return {"type": "text", "text": "x" * size}


def use(identity, name, **arguments):
    return {"type": "tool_use", "id": identity, "name": name, "input": arguments}


def tiny(folder, **options):
    """Two calls with a read in between, whose tokens are laid out by hand below."""
    transcript = Transcript(folder, **options)
    transcript.prompt("Please look at this file.")
    transcript.answer("m1" + transcript.session, (10, 1_000, 0, 50), text(200))
    transcript.answer("m1" + transcript.session, (10, 1_000, 0, 50),
                      use("t1", "Read", file_path="/w/a.py"))
    transcript.result("t1", "y" * 400)
    transcript.answer("m2" + transcript.session, (10, 150, 1_000, 30), text(100))
    return transcript


def test_tokens_are_laid_out_by_growth(tmp_path, optimizer):
    """The context grows from 1,010 to 1,160: 150 of the second call's 160 fresh tokens are new and
    10 were written again. Of the 150, 50 are the first answer and 100 the file; of the first 1,010
    the prompt's 25 characters make 10 at most."""
    row, = optimizer.scan([tiny(tmp_path).save()])["sessions"]
    session = optimizer.get_session(row["id"])
    laid = [(event.event_type.name, event.data.get("source", event.data.get("tool", "")),
             event.tokens_input, event.tokens_cache_read) for event in session.events]
    assert sorted(laid) == sorted([
        ("CONTEXT_LOAD", "system", 1_000, 0), ("USER_MESSAGE", "", 10, 0),
        ("AI_RESPONSE", "", 50, 0), ("FILE_READ", "Read", 100, 0),
        ("CONTEXT_LOAD", "cache rebuild", 10, 0), ("AI_RESPONSE", "", 0, 1_000)])
    assert row["tokens"] == {"uncached_input": 20, "cache_write": 1_150,
                             "cache_read": 1_000, "output": 80}
    assert (row["model_calls"], row["agent"], row["task"], row["model"]) == (
        2, "CLAUDE-CODE", "Please look at this file.", "claude-opus-4-5-20251101")
    # 20 at 0.005, 1,150 at 0.00625, 1,000 at 0.0005, 80 at 0.025 per 1,000
    assert (row["estimated_cost"]
            == pytest.approx((20 * 0.005 + 1_150 * 0.00625 + 1_000 * 0.0005 + 80 * 0.025) / 1000))
    assert ((row["started_at"], row["path"], row["source"])
            == ("2026-03-01T10:00:01.000Z", str(tmp_path / (session.id + ".jsonl")), "claude-code"))
    # the output of the first response is shared by size between its text and its call;
    # nothing is lost
    assert sum(event.tokens_output for event in session.events) == 80
    lines = {event.data["line"] for event in session.events}
    assert lines == {1, 2, 3, 5}


def recorder(**options):
    told = so.Recorder(so.TranscriptReader(), ["an-example"], **options)
    told.at("2026-03-01T10:00:00Z", 1)
    return told


def laid(told):
    """What the events of a told session are, with the tokens laid on them."""
    session, = told.finish()
    return [(event.event_type.name, event.data.get("source") or event.data.get("tool") or "",
             event.tokens_input, event.tokens_output) for event in session.events]


def test_a_response_a_tool_and_a_result_told_twice_are_one():
    told = recorder()
    told.prompt("Look at it", 40)
    for output in (3, 90, 7):
        told.call("r1", "m", so.Usage(1_000, output=output))
        told.tool("t1", "Read", {"file_path": "/w/a.py"}, 100)
    for _ in range(2):
        told.returned("t1", "x = 1\n" * 100)
    told.call("r2", "m", so.Usage(190, read=1_000, output=10), text=30)
    assert laid(told) == [
        ("CONTEXT_LOAD", "system", 984, 0), ("USER_MESSAGE", "", 16, 0), ("AI_RESPONSE", "", 90, 0),
        ("FILE_READ", "Read", 100, 90), ("AI_RESPONSE", "", 0, 10)]


def test_a_result_enters_with_the_call_that_follows_it():
    """A command that runs in the background returns after another response has begun."""
    told = recorder()
    told.call("r1", "m", so.Usage(1_000, output=20))
    told.tool("slow", "Bash", {"command": "make"}, 20)
    told.tool("quick", "Bash", {"command": "ls src"}, 20)
    told.returned("quick", "a.py", 400)
    told.call("r2", "m", so.Usage(110, read=1_000, output=20), text=40)
    told.returned("slow", "made", 800)
    told.call("r3", "m", so.Usage(220, read=1_110, output=20), text=40)
    events = laid(told)
    assert [event for event in events if event[0] in ("SEARCH", "TOOL_CALL")] == [
        ("SEARCH", "Bash", 90, 10), ("TOOL_CALL", "Bash", 200, 10)]


@pytest.mark.parametrize("prompted, complete, size, answer", [
    (False, True, 4_000, 500), (True, True, 4_000, 50),
    (False, None, 4_000, 50),      # a placeholder: the result explains what entered
    (False, None, 1_000, 1_300),   # it explains 400 tokens of the 1,700
    (True, None, 1_000, 50), (False, True, 1_000, 500)])
def test_thinking_stays_in_the_context_until_the_next_prompt(prompted, complete, size, answer):
    """The text of the answer has 100 characters; the rest of its 500 tokens is hidden thinking."""
    told = recorder()
    told.call("r1", "m", so.Usage(1_000, output=500), text=80, thinking=0, complete=complete)
    told.tool("t", "Bash", {"command": "make"}, 20)
    told.returned("t", "x" * size)
    if prompted:
        told.prompt("stop", 0)
    told.call("r2", "m", so.Usage(1_700, read=1_000, output=10), text=20)
    assert [tokens for kind, _, tokens, _ in laid(told) if kind == "AI_RESPONSE"] == [answer, 0]


@pytest.mark.parametrize("command, printed, repeated", [
    ("sed -n '1,3p' /w/a.py | nl", "sed: can't read /w/a.py: No such file or directory", False),
    ("cat /w/a.py | head -5", "usage: cat [-benstuv] [file ...]", False),
    ("sed -n '1,3p' /w/a.py | nl", "     1\tsed = 1\n     2\tusage = 2\n     3\tx = 3", True)])
def test_what_a_broken_pipe_prints_is_no_file(command, printed, repeated):
    told = recorder()
    for number in (1, 2, 3):
        told.call("r%d" % number, "m", so.Usage(100, read=1_000 * number, output=10))
        told.tool("t%d" % number, "Bash", {"command": command}, 20)
        told.returned("t%d" % number, printed)
    session, = told.finish()
    assert bool(so.RepeatedFileReadAnalyzer().analyze(session)) == repeated


@pytest.mark.parametrize("found, repeated", [("ten pages", True), (None, False)])
def test_a_search_whose_result_is_not_recorded_is_no_repetition(found, repeated):
    """What a hosted search found leaves the context after the response."""
    told = recorder()
    for number in (1, 2):
        told.call("r%d" % number, "m", so.Usage(900, read=900 * number, output=10))
        told.tool("t%d" % number, "web_search", {"query": "release notes"}, 20)
        if found:
            told.returned("t%d" % number, found, 2_000)
    told.call("r9", "m", so.Usage(900, read=2_700, output=10))
    session, = told.finish()
    assert bool(so.RepeatedSearchAnalyzer().analyze(session)) == repeated


@pytest.mark.parametrize("told_of_it, counted", [
    # the output grew; the split of the writes came with it, or the part that a cache held
    ([so.Usage(9, 40, output=2), so.Usage(9, 40, output=7)], so.Usage(9, 40, output=7)),
    ([so.Usage(9, 40, output=7), so.Usage(9, 40, output=2)], so.Usage(9, 40, output=7)),
    ([so.Usage(9, 40, output=7), so.Usage(9, 0, 40, output=7)], so.Usage(9, 0, 40, output=7)),
    ([so.Usage(50, output=1), so.Usage(10, read=40, output=7)], so.Usage(10, read=40, output=7))])
def test_the_largest_usage_that_was_told_of_a_response_counts_as_it_is(told_of_it, counted):
    told = recorder()
    for usage in told_of_it:
        told.call("r1", "m", usage)
    session, = told.finish()
    assert session.usages() == {("m", ""): counted}


def test_a_response_that_another_agent_told_is_a_replay():
    told = recorder()
    told.call("r1", "m", so.Usage(1_000, output=20), text=40)
    told.at(agent="aside")
    told.call("r1", "m", so.Usage(1_000, output=20), text=40)
    told.call("r2", "m", so.Usage(30, read=1_020, output=20), text=40)
    session, = told.finish()
    assert sum(event.event_type is EventType.AI_RESPONSE for event in session.events) == 2
    assert session.total_tokens == 1_000 + 30 + 40
    assert ([event.agent_id for event in session.events if event.data.get("response_id") == "r2"]
            == ["aside"])


@pytest.mark.parametrize("name, arguments, kind, data", [
    ("Read", {"file_path": "a.py", "offset": 3, "limit": 2}, "FILE_READ",
     {"file_path": "/w/a.py", "offset": 3}),
    ("Bash", {"command": "cat a.py"}, "FILE_READ", {"file_path": "/w/a.py"}),
    ("Bash", {"command": "curl -u me:hunter2 example.org"}, "TOOL_CALL",
     {"command": "curl -u me:*** example.org"}),
    ("grep", {"pattern": "x"}, "SEARCH", {"query": "x"}),
    ("Edit", {"file_path": "a.py"}, "FILE_WRITE", {"changes": ["/w/a.py"]}),
    ("TodoWrite", {}, "TOOL_CALL", {"changes": []}),
    ("frobnicate", {}, "TOOL_CALL", {"changes": ["?"]}),
    ("frobnicate", [1], "TOOL_CALL", {"changes": ["?"]})])
def test_what_a_told_tool_becomes(name, arguments, kind, data):
    told = recorder()
    told.session(cwd="/w")
    told.call("r1", "m", None)
    event = told.tool("t", name, arguments)
    assert event.event_type.name == kind and {key: event.data.get(key) for key in data} == data


def test_failures_told_and_what_they_keep():
    told = recorder()
    for key, text, kind in (("a", "Exit code 2\nno", None),
                            ("b", "429 too many requests", "transient"), ("c", "", "declined")):
        told.tool(key, "Bash", {"command": "make"})
        event = told.returned(key, text, failed=True, kind="declined" if key == "c" else "")
        assert (event.event_type, event.data.get("kind")) == (EventType.ERROR, kind)
        assert text not in json.dumps(event.data) or not text
    assert told.returned("never told", "x" * 10).data["kind"] == "unreadable"
    assert told.call_failed("overloaded").data["kind"] == "transient"
    assert told.call_failed("no such model").data["kind"] == "interrupted"


@pytest.mark.parametrize("told_first, replayed, counted",
                         [(6, 900, 900), (900, 6, 900), (70, 70, 70)])
def test_a_response_counts_its_largest_output_whichever_agent_told_it(
        tmp_path, optimizer, told_first, replayed, counted):
    """The main file ends in mid-response, of which an aside holds the rest."""
    main = Transcript(tmp_path)
    main.prompt("go")
    main.answer("m1", (10, 1_000, 0, told_first), text(40))
    aside = Transcript(tmp_path / main.session / "subagents", "agent-aside")
    aside.session = main.session
    for identity, output in (("m1", replayed), ("m2", 30)):
        aside.answer(identity, (10, 1_000, 0, output), text(40), uuid=identity, isSidechain=True,
                     agentId="aside")
    main.save()
    aside.save()
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    assert (row["tokens"]["output"], row["model_calls"]) == (counted + 30, 2)
    events = [event for event in optimizer.get_session(row["id"]).events
              if event.event_type is EventType.AI_RESPONSE]
    assert ([(event.agent_id, event.tokens_output) for event in events]
            == [("", counted), ("aside", 30)])


def test_nothing_told_is_no_session_and_a_sum_is_laid_on_no_item():
    assert recorder().finish() == []
    told = recorder()
    told.prompt("x" * 100)
    told.rolled_up("agent-1", "m", so.Usage(500, 100, 50, 2_000, 70))
    session, = told.finish()
    assert [(event.data.get("source"), event.tokens_input, event.tokens_cache_write,
             event.tokens_cache_write_1h,
             event.tokens_cache_read, event.tokens_output) for event in session.events] == [
        (None, 0, 0, 0, 0, 0), ("unattributed", 650, 150, 50, 0, 0), (None, 0, 0, 0, 2_000, 70)]


@pytest.mark.parametrize("resends, answer", [(True, 90), (False, 30)])
def test_thinking_gets_the_tokens_that_the_provider_tells(resends, answer):
    """Where it is not sent back, the next context holds the rest of the output alone."""
    told = recorder(resends_thoughts=resends)
    told.call("r1", "m", so.Usage(1_000, output=90), text=400, thoughts=60)
    told.prompt("more", 1_000)
    told.call("r2", "m", so.Usage(300, read=1_000, output=5), text=20, thoughts=0)
    assert laid(told)[1:] == [("AI_RESPONSE", "", answer, 30), ("THINKING", "", 0, 60),
                              ("USER_MESSAGE", "", 300 - answer, 0), ("AI_RESPONSE", "", 0, 5)]


# ==================================================================================================
# Readers
# ==================================================================================================

def test_a_response_is_counted_once_with_its_largest_output(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("x")
    for output in (1, 700, 30):
        transcript.answer("m1", (10, 1_000, 0, output), text(50))
    transcript.model = "<synthetic>"
    transcript.answer("m2", (0, 0, 0, 0), text(50))
    row, = optimizer.scan([transcript.save()])["sessions"]
    assert (row["model_calls"] == 1 and row["tokens"]
            == {"uncached_input": 10, "cache_write": 1_000, "cache_read": 0, "output": 700})


@pytest.mark.parametrize("outputs, owner",
                         [((6, 2_409), "b"), ((2_409, 2_409), "a"), ((2_409, 6), "a")])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_response_belongs_to_the_file_that_tells_most_of_it(
        tmp_path, optimizer, outputs, owner, order):
    """A fork in mid-response leaves its first block in the earlier file: the later one holds all of
    it."""
    files = {}
    for name, output in zip("ab", outputs):
        transcript = Transcript(tmp_path, name * 8 + "-2222-4333-8444-555555555555")
        transcript.prompt("x" * 40)
        transcript.answer("m1", (10, 1_000, 0, output), text(400))
        if name == "b":
            transcript.answer("m2", (10, 50, 1_000, 5), text(40))
        files[name] = transcript.save()
    for name in order:  # one scan after the other
        optimizer.scan([files[name]])
    rows = {row["path"][-41]: row for row in optimizer.scan([str(tmp_path)])["sessions"]}
    assert rows[owner]["tokens"]["output"] - (5 if owner == "b" else 0) == max(outputs)
    assert sum(row["tokens"]["output"] for row in rows.values()) == max(outputs) + 5
    assert sum(row["model_calls"] for row in rows.values()) == 2


def hook_line(transcript, name, **more):
    transcript.line("progress",
                    data={"type": "hook_progress", "hookEvent": "SessionStart", "hookName": name},
                    **more)


def scanned(transcript, optimizer):
    row, = optimizer.scan([transcript.save()])["sessions"]
    return optimizer.get_session(row["id"])


def test_what_the_bill_asks_of_a_call_is_kept(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("go", permissionMode="plan")
    transcript.answer("m1", (10, 1_000, 0, 20), text(40), effort="high")
    transcript.prompt("<command-name>/mcp</command-name>")
    transcript.answer("m2", (10, 1_100, 0, 20), text(40), version="2.1.201")
    missed = json.loads(transcript.lines[-1])
    missed["message"]["diagnostics"] = {
        "cache_miss_reason": {"type": "tools_changed", "cache_missed_input_tokens": 1_000}}
    missed["message"]["usage"]["speed"] = "fast"
    transcript.lines[-1] = json.dumps(missed).encode() + b"\n"
    session = scanned(transcript, optimizer)
    first, second = [event for event in session.events if event.event_type is EventType.AI_RESPONSE]
    keys = (so.CACHE_MISS, so.VERSION, so.EFFORT, so.MODE)
    assert [first.data.get(key) for key in keys] == [None, "2.1.200", "high", "plan"]
    assert [second.data.get(key) for key in keys] == ["tools_changed", "2.1.201", None, "plan"]
    assert (first.rate, second.rate) == ("", "fast")
    assert ([event.data[so.COMMAND] for event in session.events if so.COMMAND in event.data]
            == ["/mcp"])


@pytest.mark.parametrize("hook, more, sources", [
    ("SessionStart:clear", {}, ["clear"]),
    ("SessionStart:clear", {"parentUuid": "u1"}, []),     # it goes on from a line before
    ("SessionStart:resume", {"parentUuid": "u1"}, ["resume"]),
    ("SessionStart:compact", {}, []),                     # the boundary itself tells
    ("PreToolUse:Read", {}, [])])
def test_a_new_beginning_in_mid_file(tmp_path, optimizer, hook, more, sources):
    """After `/clear` a read is no repetition; after a resume the context is what it was."""
    transcript = tiny(tmp_path)
    for _ in range(2):  # two hooks run
        hook_line(transcript, hook, **more)
    transcript.answer("m3", (10, 100, 1_160, 30), use("t9", "Read", file_path="/w/a.py"))
    transcript.result("t9", "y" * 400)
    transcript.answer("m4", (10, 400, 1_260, 30), text(100))
    session = scanned(transcript, optimizer)
    found = [event.data["source"] for event in session.events
             if event.data.get("source") in ("clear", "resume", "compaction")]
    assert found == sources and len(list(session.windows())) == 1 + ("clear" in sources)
    repeats = [issue for issue in optimizer.analyze(session.id).issues
               if issue.issue_type is IssueType.REPEATED_FILE_READ]
    assert bool(repeats) == ("clear" not in sources)


def test_a_session_that_goes_on_in_a_new_file_is_resumed_there(tmp_path, optimizer):
    first = tiny(tmp_path)
    first.save()
    second = Transcript(tmp_path, "99999999-2222-4333-8444-555555555555")
    second.lines = [line.replace(b'"sessionId": "1111', b'"sessionId": "9999')
                    for line in first.lines]
    second.prompt("go on")
    second.answer("m9", (10, 200, 1_160, 30), text(60))
    second.save()
    optimizer.scan([str(tmp_path)])
    resumed, = [session
                for session in map(optimizer.get_session, [s.id for s in optimizer.list_sessions()])
                if session.metadata.get("calls_elsewhere")]
    resume, history = (
        [event for event in resumed.events if event.event_type is EventType.CONTEXT_LOAD][:2])
    assert ((resume.data["source"], history.data["source"], history.tokens_input)
            == ("resume", "history", 0))
    assert history.data["contents"] == {"start load": 1_000, "prompts": 10,
                                        "answers kept in the context": 50, "file reads": 100}


def read_again(told, last, **between):
    """Two files of 4,000 tokens are read, then the first of them again;
    the last call's usage is given."""
    told.call("r1", "m", so.Usage(20_000, output=20), text=40)
    for number, name in enumerate(("old", "new"), 2):
        told.tool(name, "Read", {"file_path": "/w/%s.py" % name})
        told.returned(name, "%s = 1\n" % name * 2_000)
        told.call("r%d" % number, "m",
                  so.Usage(4_020, read=20_000 + 4_020 * (number - 2), output=20), text=40)
    told.prompt("and now?", 40)
    told.call("r4", "m", last, text=40)
    for name in ("old", "new"):
        told.tool(name + " again", "Read", {"file_path": "/w/%s.py" % name})
        told.returned(name + " again", "%s = 1\n" % name * 2_000)
    told.call("r5", "m", so.Usage(8_000, read=sum(last[:4]), output=20), text=40)
    session, = told.finish()
    report = so.build_report(session, [so.RepeatedFileReadAnalyzer()])
    return sorted(os.path.basename(re.search("'([^']+)'", issue.description).group(1))
                  for issue in report.issues), session


@pytest.mark.parametrize("last, repeated", [
    (so.Usage(50, read=28_040), ["new.py", "old.py"]),      # the context grew
    # it fell by 3,940 and begins anew behind the system prompt
    (so.Usage(9_100, read=15_000), ["new.py"]),
    # a fall that dropped thinking explains: its cache was found
    (so.Usage(500, read=23_500), ["new.py", "old.py"]),
    # less than what a turn's thinking may be
    (so.Usage(12_000, read=15_000), ["new.py", "old.py"])])
def test_a_context_that_shrank_without_a_mark_lost_its_oldest_results(last, repeated):
    found, session = read_again(recorder(), last)
    assert found == repeated and len(list(session.windows())) == 1
    left = [event.data["left"] for event in session.events if "left" in event.data]
    assert [[event.data["file_path"] for event in session.events if event.id in ids]
            for ids in left] == ([["/w/old.py"]] if repeated == ["new.py"] else [])
    assert session.total_tokens_input == 20_000 + 2 * 4_020 + sum(last[:3]) + 8_000


@pytest.mark.parametrize("keys, lost, repeated", [
    (["old"], 0, ["new.py"]), (["new"], 0, ["old.py"]), ([], 3_000, ["new.py"]), ([], 7_000, []),
    (["unheard of"], 0, ["new.py", "old.py"])])
def test_results_that_were_cleared_are_not_there_to_be_repeated(keys, lost, repeated):
    told = recorder()
    told.call("r1", "m", so.Usage(20_000, output=20), text=40)
    for number, name in enumerate(("old", "new"), 2):
        told.tool(name, "Read", {"file_path": "/w/%s.py" % name})
        told.returned(name, "%s = 1\n" % name * 2_000)
        told.call("r%d" % number, "m",
                  so.Usage(4_020, read=20_000 + 4_020 * (number - 2), output=20), text=40)
    told.cleared(keys, lost)
    for name in ("old", "new"):
        told.tool(name + " again", "Read", {"file_path": "/w/%s.py" % name})
        told.returned(name + " again", "%s = 1\n" % name * 2_000)
    told.call("r5", "m", so.Usage(8_000, read=28_000 if keys == ["unheard of"] else 24_000,
                                  output=20), text=40)
    session, = told.finish()
    report = so.build_report(session, [so.RepeatedFileReadAnalyzer()])
    assert (sorted(re.search("'([^']+)'", issue.description).group(1) for issue in report.issues)
            == repeated)


@pytest.mark.parametrize("second, repeated", [((1, 2), True), ((3, 4), False)])
def test_a_page_of_a_file_is_what_stands_behind_its_frame(tmp_path, optimizer, second, repeated):
    """Gemini CLI says above a page which lines it holds: that is no line of the file."""
    frame = ("\nIMPORTANT: The file content has been truncated.\n"
             "Status: Showing lines %d-%d of 9 total lines.\n"
             "Action: read more of it.\n\n--- FILE CONTENT (truncated) ---\n")
    messages = [{"id": "u", "type": "user", "content": "look", "timestamp": "2026-03-01T10:00:00Z"}]
    for number, page in enumerate(((1, 2), second)):
        output = frame % page + "".join("line %d\n" % line for line in page)
        messages.append(
            {"id": "m%d" % number, "type": "gemini", "content": "", "model": "gemini-2.5-pro",
             "timestamp": "2026-03-01T10:00:0%dZ" % number,
             "tokens": {"input": 1_000 + 300 * number, "output": 20, "cached": 900 * number,
                        "thoughts": 0, "tool": 0},
             "toolCalls": [{"id": "t%d" % number, "name": "read_file", "status": "success",
                            "args": {"file_path": "/w/a.py", "offset": page[0] - 1, "limit": 2},
                            "result": [{"functionResponse": {"response": {"output": output}}}]}]})
    messages.append(
        {"id": "m9", "type": "gemini", "content": "done", "model": "gemini-2.5-pro",
         "timestamp": "2026-03-01T10:00:09Z",
         "tokens": {"input": 1_700, "output": 5, "cached": 1_200, "thoughts": 0, "tool": 0}})
    path = write(tmp_path / "session-a.json", json.dumps({
        "sessionId": "s1", "projectHash": "x", "startTime": "2026-03-01T10:00:00Z",
        "lastUpdated": "2026-03-01T10:00:09Z", "messages": messages}))
    row, = optimizer.scan([str(path)])["sessions"]
    reads = [event.data for event in optimizer.get_session(row["id"]).events
             if event.event_type is EventType.FILE_READ]
    assert ([data["lines"] for data in reads] == [[1, 2], list(second)]
            and reads[0]["total_lines"] == 9)
    assert "truncated" not in reads[0]
    assert any(issue["issue_type"] == "REPEATED_FILE_READ" for issue in row["issues"]) == repeated


REMINDER = "\n\n<system-reminder>\nWhenever you read a file, consider %s.\n</system-reminder>\n"


@pytest.mark.parametrize("first, second, repeated", [
    ("", REMINDER % "this", True), (REMINDER % "this", REMINDER % "that", True),
    ("", "\n     3\tz = 3", False)])
def test_a_reminder_behind_a_file_is_not_part_of_it(tmp_path, optimizer, first, second, repeated):
    """A sub-agent's reads tell no number of lines: the text is all there is."""
    transcript = Transcript(tmp_path)
    transcript.prompt("look")
    for number, frame in enumerate((first, second)):
        transcript.answer("m%d" % number, (10, 1_000 + 400 * number, 0, 20),
                          use("t%d" % number, "Read", file_path="/w/a.py"))
        transcript.result("t%d" % number, "     1\tx = 1\n     2\ty = 2" + frame)
    transcript.answer("m9", (10, 400, 1_400, 20), text(40))
    reads = [event for event in scanned(transcript, optimizer).events
             if event.event_type is EventType.FILE_READ]
    assert (reads[1].data.get("content") == "same"
            and reads[0].data["content_hash"] == reads[1].data["content_hash"]) == repeated
    assert reads[0].data["lines"] == [1, 2]


@pytest.mark.parametrize("command, printed, commits", [
    ("git commit -m x", "[main 1a2b3c4] x\n 1 file changed", ["1a2b3c4"]),
    ("git add . && git commit -qam x && git commit --amend",
     "[topic/a (root-commit) 1a2b3c4d5] x\n[topic/a 99887766] y", ["1a2b3c4d5", "99887766"]),
    ("git commit -m x", "nothing to commit", None),
    ("cat notes", "[main 1a2b3c4] x", None)])
def test_commits_that_a_command_made(command, printed, commits):
    told = recorder()
    told.tool("t", "Bash", {"command": command})
    assert told.returned("t", printed).data.get(so.COMMITS) == commits


ROW_KEYS = ("id source path agent task model started_at model_calls tokens estimated_cost "
            "efficiency_score waste issues").split()


def consistent(result, optimizer=None):
    """What must be true of every scan: keys, sums, bounds;
    the events of each stored session add up to its row."""
    assert {"sessions", "totals", "skipped"} <= set(result)
    for row in result["sessions"]:
        assert set(ROW_KEYS) <= set(row)
        assert set(row["waste"]) == {"tokens", "measured_tokens", "cost", "measured_cost"}
        assert 0 <= row["waste"]["measured_tokens"] <= row["waste"]["tokens"]
        assert (0 <= row["waste"]["measured_cost"] <= row["waste"]["cost"] + 1e-9
                <= row["estimated_cost"] + 2e-9)
        assert 0 <= row["efficiency_score"] <= 100
        assert sum(issue["charged_tokens"] for issue in row["issues"]) == row["waste"]["tokens"]
        tokens = row["tokens"]
        assert min(tokens.values()) >= 0
        if optimizer:
            session = optimizer.get_session(row["id"])
            entered = sum(event.tokens_input for event in session.events)
            written = sum(event.tokens_cache_write for event in session.events)
            assert tokens == {
                "uncached_input": entered - written, "cache_write": written,
                "cache_read": sum(event.tokens_cache_read for event in session.events),
                "output": sum(event.tokens_output for event in session.events)}
            assert session.estimated_cost == pytest.approx(row["estimated_cost"])
            assert (sum(row["token_use"].values()) == session.total_tokens
                    == entered + tokens["output"])
            assert row["model_calls"] == sum(
                event.event_type is EventType.AI_RESPONSE and not event.data.get("unmetered")
                for event in session.events)
    totals = result["totals"]
    for part in ("tokens", "waste"):
        for name, value in totals[part].items():
            assert value == pytest.approx(sum(row[part][name] for row in result["sessions"]))
    assert totals["sessions"] == len(result["sessions"])
    assert totals["model_calls"] == sum(row["model_calls"] for row in result["sessions"])
    assert (totals["estimated_cost"]
            == pytest.approx(sum(row["estimated_cost"] for row in result["sessions"])))
    for entry in result["skipped"]:
        assert set(entry) == {"path", "line", "reason"} and entry["reason"]


def test_images_read_from_one_path_are_not_the_same_text(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("compare the pictures")
    for number in (1, 2):
        transcript.answer("m%d" % number, (3, 2000, 0, 20),
                          use("t%d" % number, "Read", file_path="/w/a.png"))
        transcript.result("t%d" % number,
                          [{"type": "image", "source": {"type": "base64", "data": "A" * number}}])
    transcript.answer("m3", (3, 2000, 4000, 20), {"type": "text", "text": "they differ"})
    assert not [issue for row in optimizer.scan([transcript.save()])["sessions"]
                for issue in row["issues"] if issue["measured"]]


def test_tokens_are_billed_at_the_model_that_takes_them_in(tmp_path, optimizer):
    transcript = tiny(tmp_path)
    transcript.prompt("look", isSidechain=True, agentId="abc")
    transcript.model = "claude-haiku-4-5-20251001"
    transcript.answer("msg_sub", (0, 10_000, 0, 0), {"type": "text", "text": "done"},
                      isSidechain=True, agentId="abc")
    with_agent = optimizer.scan([transcript.save()])["totals"]["estimated_cost"]
    alone = optimizer.scan([tiny(tmp_path / "alone").save()],
                           store=False)["totals"]["estimated_cost"]
    assert with_agent - alone == pytest.approx(10_000 * 1.25e-6)


def test_files_that_an_earlier_version_described_are_grouped_anew(tmp_path, optimizer):
    """It kept no name of a session's own file."""
    import sqlite3
    from contextlib import closing
    shutil.copytree(os.path.join(TRANSCRIPTS, "subagent-subagents"), tmp_path / "t")
    before = optimizer.scan([str(tmp_path)])["sessions"]
    with closing(sqlite3.connect(optimizer.store.state.path)) as base:
        for key, value in base.execute("SELECT key, value FROM files").fetchall():
            facts = json.loads(value)
            if isinstance(facts, dict):  # the sums of the last scan stand beside the files
                older = [*facts["stamp"], facts["reader"], facts["unit"], ""]
                base.execute("UPDATE files SET value = ? WHERE key = ?", (json.dumps(older), key))
        base.commit()
    os.utime(before[0]["path"])  # what has changed makes all of them be grouped
    after = SessionOptimizer(optimizer.store.root).scan([str(tmp_path)])["sessions"]
    assert after == before and len(after) == 1


def test_a_session_of_two_models_counts_with_both_by_what_was_billed_at_each(tmp_path, optimizer):
    transcript = tiny(tmp_path)
    transcript.prompt("Go on.")
    leads, transcript.model = transcript.model, "claude-haiku-4-5-20251001"
    transcript.answer("m9", (10, 1_400, 0, 40), text(90))
    transcript.save()
    tiny(tmp_path / "other", name="22222222-2222-4333-8444-555555555555").save()
    result = optimizer.scan([str(tmp_path)])
    groups = {group["key"]: group for group in so.grouped(result["sessions"], "model",
                                                          result["bill"])}
    assert ({key: group["estimated_cost"] for key, group in groups.items()}
            == result["bill"]["models"])
    assert {key: group["sessions"] for key, group in groups.items()} == {
        leads: 2, transcript.model: 1}
    assert "used in" in so.text_sections([so.group_section(list(groups.values()), "model")])


def test_an_answer_is_billed_where_it_was_written_and_where_it_was_taken_in(tmp_path, optimizer):
    """At a change of the model the tokens of the last answer, and of a tool's result,
    are input of the new one."""
    transcript = tiny(tmp_path)
    usages = {transcript.model: [1_160 + 10, 1_000, 80]}
    for model, usage in (("claude-haiku-4-5-20251001", (10, 1_400, 0, 40)),
                         ("claude-opus-4-6", (10, 1_600, 0, 30))):
        transcript.model = model
        transcript.prompt("Go on.")
        transcript.answer(model, usage, text(90), use("t" + model, "Bash", command="make"))
        usages[model] = [sum(usage[:2]), usage[2], usage[3]]
        transcript.result("t" + model, "z" * 300)
    transcript.model = "claude-haiku-4-5-20251001"
    transcript.answer("last", (5, 1_700, 0, 20), text(10))
    usages[transcript.model] = [1_410 + 1_705, 0, 60]
    session, = so.sessions_at([transcript.save()], so.PriceList())
    assert {model: [sum(usage[:3]), usage.read, usage.output]
            for (model, _), usage in session.usages().items()} == usages
    bill, rows = so.bill_of(session), so.usage_rows(session)
    for model, (entered, *_) in usages.items():
        its = [row for row in rows if row["model"] == model]
        assert bill["models"][model] == sum(row["cost"] for row in its)
        assert sum(row["uncached_input"] + row["cache_write_5m"] for row in its) == entered
    assert_adds_up(session)
    assert_adds_up(so.Session.from_dict(json.loads(json.dumps(session.to_dict()))))


@pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real transcripts beside the project")
def test_every_model_of_real_gemini_sessions_is_billed_what_it_was_told():
    several = 0
    for path, _, _ in so.find_transcripts([os.path.join(REAL, "gemini-cli")]):
        sessions = so.sessions_at([path], so.PriceList()) if path.endswith(".json") else []
        messages = json.loads(read(path).decode("utf-8")).get("messages", []) if sessions else []
        told, found = {}, {}
        for message in (
                {message["id"]: message for message in messages if message.get("tokens")}.values()):
            tokens, sums = message["tokens"], told.setdefault(message["model"], [0, 0])
            fresh = tokens["input"] - tokens["cached"] + tokens.get("tool", 0)
            sums[:] = sums[0] + fresh, sums[1] + tokens["cached"]
        for session in sessions:
            for (model, _), usage in session.usages().items():
                sums = found.setdefault(model, [0, 0])
                sums[:] = sums[0] + usage.uncached, sums[1] + usage.read
        several += len(told) > 1
        assert {model: sums for model, sums in found.items() if any(sums)} == told, path
    assert several


def test_an_inline_sub_agent_is_one_window(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("delegate")
    parent = None
    for number in range(4):
        for kind, message, name in (
                ("assistant",
                 {"id": "s%d" % number, "model": transcript.model, "role": "assistant",
                  "stop_reason": "tool_use",
                  "content": [use("t%d" % number, "Read", file_path="/w/%d.py" % number)],
                  "usage": {"input_tokens": 3, "output_tokens": 9,
                            "cache_creation_input_tokens": 100,
                            "cache_read_input_tokens": 100 * number}}, "a%d" % number),
                ("user",
                 {"role": "user", "content": [{"tool_use_id": "t%d" % number, "type": "tool_result",
                                               "content": "x = 1\n" * 40}]}, "r%d" % number)):
            transcript.line(kind, message, isSidechain=True, uuid=name, parentUuid=parent)
            parent = name
    row, = optimizer.scan([transcript.save()])["sessions"]
    agents = {event.agent_id for event in optimizer.get_session(row["id"]).events if event.agent_id}
    assert len(agents) == 1


def test_two_thinking_blocks_of_one_response_are_one_event(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("think twice")
    thought = {"type": "thinking", "thinking": "x" * 400, "signature": "s"}
    for block in (thought, text(40), thought, text(40)):
        transcript.answer("m1", (3, 1_000, 0, 1_000), block)
    row, = optimizer.scan([transcript.save()])["sessions"]
    session = optimizer.get_session(row["id"])
    assert session.total_tokens_output == row["tokens"]["output"] == 1_000
    assert len({event.id for event in session.events}) == len(session.events)


def test_what_a_counted_response_wrote_stays_when_the_next_is_counted_elsewhere(
        tmp_path, optimizer):
    first, fork = (Transcript(tmp_path),
                   Transcript(tmp_path, name="22222222-2222-4333-8444-555555555555"))
    for transcript, own in ((first, False), (fork, True)):
        transcript.prompt("go on")
        transcript.answer("a", (3, 1_000, 0, 10), text(20))
        if own:
            transcript.answer("b", (3, 100, 1_003, 400),
                              use("t1", "Write", file_path="/w/a.py", content="x" * 900))
            transcript.result("t1", "File created")
        transcript.answer("c", (3, 100, 1_106, 20), text(40))
    first.save()
    fork.save()
    totals = optimizer.scan([str(tmp_path)])["totals"]
    assert totals["tokens"]["output"] == 430 and totals["model_calls"] == 3
    assert sum(session.total_tokens_output for session in optimizer.list_sessions()) == 430


def test_a_project_below_a_folder_named_like_the_sub_agents(tmp_path, optimizer):
    folder = tmp_path / "subagents-of-mine" / "proj"
    main = tiny(folder).save()
    session = os.path.splitext(os.path.basename(main))[0]
    agent = Transcript(folder / session / "subagents", "agent-abc")
    agent.session = session
    agent.prompt("look", isSidechain=True, agentId="abc")
    agent.answer("msg_sub", (3, 500, 0, 20), text(9), isSidechain=True, agentId="abc")
    agent.save()
    assert optimizer.scan([str(tmp_path)])["totals"]["sessions"] == 1


@pytest.mark.parametrize("secret", [
    "SECRET_KEY_BASE=zebra77 rails s", "aws configure set aws_secret_access_key zebra77",
    "docker login -p zebra77 host", "mysql -pzebra77 -e 'select 1'",
    "gh auth login --with-token zebra77", "az login --client-secret zebra77",
    "curl -H 'Cookie: session=zebra77' http://h", "cat 'token=zebra77'", "rm '/p/token=zebra77'"])
def test_secrets_of_commands_are_not_kept(tmp_path, optimizer, secret):
    transcript = Transcript(tmp_path / "t")
    transcript.prompt("run it")
    transcript.answer("m1", (3, 1_000, 0, 10), use("t1", "Bash", command=secret))
    transcript.result("t1", "done")
    transcript.answer("m2", (3, 100, 1_003, 10), text(9))
    optimizer.scan([transcript.save()])
    assert b"zebra77" not in stored_bytes(optimizer.store.root)


PROMPT = "Fix the loader\nIt is slow. password=hunter2hunter2"


TRANSCRIPTS = os.path.join(os.path.dirname(MODULE), "examples", "transcripts", "claude-code")


class Agent:
    """An agent at work whose hooks call the library, or the command line with `call`."""

    def __init__(self, optimizer, folder, session_id="0f0f0f0f-1111-2222-3333-444455556666"):
        self.optimizer, self.folder = optimizer, folder
        self.common = {"session_id": session_id,
                       "transcript_path": str(folder / f"{session_id}.jsonl"), "cwd": str(folder)}
        self.id = session_id

    def payload(self, name, **fields):
        return {**self.common, "hook_event_name": name, **fields}

    def hook(self, name, **fields):
        return self.optimizer.log_hook(self.payload(name, **fields))

    def call(self, *arguments, **payload):
        return run(self.optimizer, "hook", *arguments,
                   stdin=json.dumps({**self.common, **payload}).encode())

    def read(self, path, **arguments):
        lines = path.read_text().splitlines(True)
        first, count = arguments.get("offset", 1), arguments.get("limit", len(lines))
        content = "".join(lines[first - 1:first - 1 + count])
        return self.hook(
            "PostToolUse", tool_name="Read", tool_input={"file_path": str(path), **arguments},
            tool_response={"type": "text", "file": {
                "filePath": str(path), "content": content, "numLines": content.count("\n"),
                "startLine": first, "totalLines": len(lines)}})

    def bash(self, command, stdout=""):
        return self.hook("PostToolUse", tool_name="Bash", tool_input={"command": command},
                         tool_response={"stdout": stdout, "stderr": "", "interrupted": False})

    def about_to(self, tool, deny=False, **arguments):
        return self.optimizer.guard(
            self.payload("PreToolUse", tool_name=tool, tool_input=arguments), deny=deny)

    def session(self):
        return self.optimizer.get_session(self.id)


@pytest.fixture
def agent(optimizer, tmp_path):
    return Agent(optimizer, tmp_path)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "loader.py"
    path.write_text("".join(f"line {number} of the loader\n" for number in range(1, 101)))
    past = time.time() - 60
    os.utime(path, (past, past))
    return path


HOOKS = [  # hook, its fields: event type, what its data must hold, tokens in and out
    ("UserPromptSubmit", {"prompt": "x" * 360}, EventType.USER_MESSAGE,
     {"estimated": True}, 100, 0),
    ("Stop", {"last_assistant_message": "x" * 720}, EventType.AI_RESPONSE,
     {"estimated": True}, 0, 200),
    ("PreCompact", {"trigger": "auto"}, EventType.CONTEXT_LOAD,
     {"source": "compaction", "trigger": "auto"}, 0, 0),
    ("SubagentStop", {"agent_id": "a1", "agent_type": "Explore",
                      "last_assistant_message": "x" * 36}, EventType.CUSTOM,
     {"source": "sub-agent", "agent_type": "Explore"}, 0, 10),
    ("PostToolUse",
     {"tool_name": "Bash", "tool_input": {"command": "pytest -q"}, "duration_ms": 1234,
      "tool_response": {"stdout": "x" * 36, "stderr": "", "interrupted": False}},
     EventType.TOOL_CALL, {"tool": "Bash", "command": "pytest -q", "changes": []}, 10, 6),
    ("PostToolUse", {"tool_name": "Bash", "tool_input": {"command": "sed -i s/a/b/ a.py"},
                     "tool_response": {"stdout": ""}},
     EventType.FILE_WRITE, {"changes": ["/w/a.py"]}, 0, 9),
    ("PostToolUse", {"tool_name": "Grep", "tool_input": {"pattern": "def load", "path": "/w/src"},
                     "tool_response": {"mode": "files_with_matches",
                                       "filenames": ["/w/a.py", "/w/b.py"], "numFiles": 2}},
     EventType.SEARCH, {"query": "def load", "file_path": "/w/src"}, 4, 11),
    ("PostToolUse", {"tool_name": "Edit", "tool_input": {
        "file_path": "/w/a.py", "old_string": "a", "new_string": "b"},
        "tool_response": {"filePath": "/w/a.py", "originalFile": "y" * 9000,
                          "structuredPatch": [{"lines": ["-" + "a" * 17, "+" + "b" * 16]}]}},
     EventType.FILE_WRITE, {"file_path": "/w/a.py", "changes": ["/w/a.py"]}, 10, 16),
    ("PostToolUse", {"tool_name": "Agent", "tool_input": {"prompt": "look"}, "tool_response": {
        "content": [{"type": "text", "text": "x" * 36}], "totalTokens": 5}}, EventType.TOOL_CALL,
     {"changes": []}, 10, 5),
    ("PostToolUse", {"tool_name": "mcp__db__list_tables", "tool_input": {},
                     "tool_response": [{"type": "text", "text": "x" * 36}]},
     EventType.TOOL_CALL, {"tool": "mcp__db__list_tables"}, 10, 1),
    ("PostToolUseFailure",
     {"tool_name": "Bash", "tool_input": {"command": "make"}, "error": "Exit code 2\n" + "x" * 24},
     EventType.ERROR, {"exit_code": 2, "command": "make"}, 10, 5),
    ("PostToolUseFailure", {"tool_name": "Bash", "tool_input": {"command": "make"},
                            "error": "stopped", "is_interrupt": True},
     EventType.ERROR, {"kind": "interrupted"}, 2, 5),
]


@pytest.mark.parametrize("name, fields, event_type, data, entered, written", HOOKS,
                         ids=lambda value: str(value)[:20])
def test_a_hook_becomes_the_event(optimizer, name, fields, event_type, data, entered, written):
    event = optimizer.log_hook({"session_id": "s", "hook_event_name": name, "cwd": "/w", **fields})
    assert ((event.event_type, event.tokens_input, event.tokens_output)
            == (event_type, entered, written))
    assert {key: event.data.get(key) for key in data} == data
    assert (event.duration_ms == fields.get("duration_ms", 0)
            and event.agent_id == fields.get("agent_id", ""))
    stored = SessionOptimizer(optimizer.store.root).get_session("s").events[-1]
    assert stored.to_dict() == event.to_dict()


@pytest.mark.parametrize("name", ["Notification", "PreToolUse", "SubagentStart", "PostCompact",
                                  "SomethingNew", "SessionEnd"])
def test_other_hooks_log_nothing_and_create_nothing(optimizer, name):
    assert optimizer.log_hook({"session_id": "s", "hook_event_name": name}) is None
    assert optimizer.get_session("s") is None


def test_a_session_from_start_to_end(agent):
    agent.hook("SessionStart", source="startup", model="claude-opus-5")
    session = agent.session()
    assert (session.agent, session.task, session.model) == ("CLAUDE-CODE", "", "claude-opus-5")
    assert session.metadata == {"transcript_path": agent.common["transcript_path"],
                                "cwd": str(agent.folder), "live": True}
    agent.hook("UserPromptSubmit", prompt=PROMPT)
    agent.hook("Stop", last_assistant_message="Done.")
    agent.hook("UserPromptSubmit", prompt="And now the tests")
    assert agent.session().task == "Fix the loader"
    agent.hook("SessionEnd", reason="prompt_input_exit")
    session = agent.session()
    assert session.status is so.SessionStatus.COMPLETED and session.ended_at
    assert [event.event_type.name for event in session.events] == [
        "SESSION_START", "USER_MESSAGE", "AI_RESPONSE", "USER_MESSAGE", "SESSION_END"]
    agent.hook("SessionEnd", reason="other")  # told twice
    assert len(agent.session().events) == 5


def test_a_session_without_a_start_begins_with_its_first_event(agent):
    agent.hook("UserPromptSubmit", prompt=PROMPT)
    assert agent.session().task == "Fix the loader" and agent.session().model == "default"


@pytest.mark.parametrize("without", [0, 1, 3, 5])
def test_no_event_is_lost_where_the_first_hooks_name_no_transcript(agent, source, without):
    agent_path = agent.common.pop("transcript_path")
    steps = [lambda: agent.hook("SessionStart", source="startup"),
             lambda: agent.hook("UserPromptSubmit", prompt="go"), lambda: agent.read(source),
             lambda: agent.bash("ls"), lambda: agent.hook("Stop", last_assistant_message="Done.")]
    for number, step in enumerate(steps):
        if number == without:
            agent.common["transcript_path"] = agent_path
            transcript_of(agent)
        step()
    assert [event.event_type.name for event in agent.session().events] == [
        "SESSION_START", "USER_MESSAGE", "FILE_READ", "SEARCH", "AI_RESPONSE"]


def test_the_store_keeps_no_prompt_and_no_output(agent, source):
    agent.hook("SessionStart", source="startup")
    agent.hook("UserPromptSubmit", prompt=PROMPT)
    agent.read(source)
    agent.bash("cat loader.py", source.read_text())
    agent.hook("PostToolUseFailure", tool_name="Bash", tool_input={"command": "x"},
               error="a private message")
    agent.hook("Stop", last_assistant_message="It was slow because")
    agent.hook("PreCompact", trigger="manual", custom_instructions="keep the secret plan")
    text = "".join(path.read_text() for path in agent.optimizer.sessions_dir.iterdir())
    for secret in ("hunter2", "It is slow", "of the loader", "a private message", "because",
                   "secret plan"):
        assert secret not in text


def test_a_resume_goes_on_with_the_session(agent, recwarn):
    agent.hook("UserPromptSubmit", prompt="one")
    agent.hook("SessionEnd", reason="other")
    agent.bash("git status")  # a hook that came late
    assert agent.session().status is so.SessionStatus.COMPLETED
    agent.hook("SessionStart", source="resume")
    assert agent.session().status is so.SessionStatus.ACTIVE and not agent.session().ended_at
    agent.hook("UserPromptSubmit", prompt="two")
    agent.hook("SessionEnd", reason="other")
    session = agent.session()
    assert session.status is so.SessionStatus.COMPLETED and session.task == "one"
    ids = [event.id for event in session.events]
    assert len(set(ids)) == len(ids) == 6
    assert ([str(w.message) for w in recwarn if issubclass(w.category, so.SessionOptimizerWarning)]
            == [])


def test_hooks_of_one_moment_make_one_session(agent):
    from concurrent.futures import ThreadPoolExecutor
    stores = [SessionOptimizer(agent.optimizer.store.root) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(
            lambda one: one.log_hook(agent.payload("UserPromptSubmit", prompt="go")), stores))
    assert len(agent.session().events) == 9 and len(agent.optimizer.list_sessions()) == 1


def transcript_of(agent, *, prompt="Fix the loader", reads=2):
    """The transcript the agent itself keeps: a prompt, `reads` reads of a.py, an answer."""
    common = {"sessionId": agent.id, "cwd": str(agent.folder), "version": "2.1.200",
              "isSidechain": False}
    lines, number = [], 0

    def add(kind, message, **more):
        nonlocal number
        number += 1
        lines.append(
            {"type": kind, "uuid": f"u{number}", "parentUuid": f"u{number - 1}", "message": message,
             "timestamp": f"2026-08-01T10:00:{number:02d}.000Z", **common, **more})

    def answer(key, block, read):
        add("assistant", {"id": key, "role": "assistant", "model": "claude-opus-5",
                          "content": [block], "stop_reason": "x",
                          "usage": {"input_tokens": 5, "cache_creation_input_tokens": 400,
                                    "cache_read_input_tokens": read, "output_tokens": 30}})

    add("user", {"role": "user", "content": prompt})
    for index in range(reads):
        answer(f"m{index}", {"type": "tool_use", "id": f"t{index}", "name": "Read",
                             "input": {"file_path": str(agent.folder / "a.py")}}, 400 * index)
        add("user", {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"t{index}",
                                                  "content": "1\tx" * 300}]},
            toolUseResult={"type": "text",
                           "file": {"content": "x\n" * 300, "startLine": 1, "totalLines": 300}})
    answer("last", {"type": "text", "text": "Done"}, 400 * reads)
    path = agent.folder / f"{agent.id}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_live_session_knows_the_model_its_transcript_names(agent):
    agent.hook("SessionStart", source="startup")
    assert agent.session().model == "default"
    path = transcript_of(agent)
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    assert (agent.session().model, agent.session().task) == ("claude-opus-5", "Fix the loader")
    path.write_text(path.read_text().replace("claude-opus-5", "claude-haiku-4-5"))
    agent.hook("Stop", last_assistant_message="Done.")
    assert agent.session().model == "claude-opus-5"  # that of the session, once known


@pytest.mark.parametrize("text, model", [
    ("", ""), ("{", ""), ('{"type": "assistant", "message": {"model": "<synthetic>"}}', ""),
    (('{"type": "assistant", "message": {"model": "Claude-A"}}\n'
      '{"type": "assistant", "message": {"model": "<synthetic>"}}'), "claude-a"),
    ('{"type": "user", "toolUseResult": {"model": "b"}}', ""),
    ('{"type": "assistant", "message": []}', ""), ('["assistant"]', ""),
])
def test_the_model_of_a_transcripts_last_answer(tmp_path, text, model):
    (tmp_path / "t.jsonl").write_text(text)
    assert (so._last_model(str(tmp_path / "t.jsonl")) == model
            and so._last_model(str(tmp_path / "none")) == "")


class Claude:
    """A home with the list of running processes that Claude Code keeps in it."""

    def __init__(self, optimizer, folder):
        self.work = folder / "projects" / "-w"
        self.work.mkdir(parents=True)
        (folder / "sessions").mkdir()
        self.list, self.agent = folder / "sessions", Agent(optimizer, self.work)

    def runs(self, process, session_id):
        (self.list / f"{process}.json").write_text(
            json.dumps({"pid": process, "sessionId": session_id}))


@pytest.fixture
def claude(optimizer, tmp_path):
    return Claude(optimizer, tmp_path)


def test_the_end_of_a_session_brings_what_its_transcript_tells(claude):
    agent = claude.agent
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    transcript_of(agent)
    agent.hook("SessionEnd", reason="other")
    session = agent.session()
    assert ((session.status, session.model, session.task)
            == (so.SessionStatus.COMPLETED, "claude-opus-5", "Fix the loader"))
    kinds = [event.event_type.name for event in session.events]
    assert ((kinds.count("FILE_READ"), kinds.count("AI_RESPONSE"), session.total_tokens_output)
            == (2, 3, 90))
    before = len(session.events)
    agent.bash("git status")  # a hook that came late: the transcript has told it
    assert len(agent.session().events) == before
    claude.runs(os.getpid(), agent.id)
    agent.hook("UserPromptSubmit", prompt="And now?")
    agent.bash("git status")
    assert (agent.session().status is so.SessionStatus.ACTIVE
            and len(agent.session().events) == before + 2)


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


LOOKS = [lambda o, i: o.list_sessions(), lambda o, i: o.get_session(i), lambda o, i: o.summaries(),
         lambda o, i: o.analyze(i)]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("told", [True, False], ids=["transcript", "none"])
def test_a_session_whose_agent_has_gone_is_closed_by_whoever_looks(claude, optimizer, look, told):
    agent = claude.agent
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    if told:
        transcript_of(agent)
    claude.runs(os.getpid(), agent.id)
    (claude.list / "other.json").write_text("[")
    look(optimizer, agent.id)
    assert optimizer.store.head(agent.id)["status"] == "ACTIVE"
    claude.runs(os.getpid(), "another")
    claude.runs(ended_process(), agent.id)
    look(SessionOptimizer(optimizer.store.root), agent.id)
    head = optimizer.store.head(agent.id)
    assert head["status"] == ("COMPLETED" if told else "ABANDONED") and head["ended_at"]
    assert head["model"] == ("claude-opus-5" if told else "default")


@pytest.mark.parametrize(
    "text", ["[", "[]", "{}", '{"sessionId": 5}', '{"sessionId": "ID", "pid": "1"}',
             '{"sessionId": "ID", "pid": 1e9}', '{"sessionId": "ID", "pid": 99999999999999999999}'])
def test_what_is_no_entry_of_a_running_agent(claude, optimizer, text):
    claude.agent.hook("UserPromptSubmit", prompt="Fix the loader")
    (claude.list / "1.json").write_text(text.replace("ID", claude.agent.id))
    assert optimizer.list_sessions()[0].status is so.SessionStatus.ABANDONED


def test_a_session_that_cannot_be_caught_up_is_listed_all_the_same(claude, optimizer, monkeypatch):
    def full():
        raise so.StorageError(optimizer.store.root, "No space left on device", "make room")

    claude.agent.hook("UserPromptSubmit", prompt="Fix the loader")
    transcript_of(claude.agent)
    monkeypatch.setattr(type(optimizer.store.state), "scanned", lambda _: full())
    with pytest.warns(so.SessionOptimizerWarning, match="could not be noted"):
        (head,) = [optimizer.store.head(session.id) for session in optimizer.list_sessions()]
    assert head["status"] == "ACTIVE"


def test_a_folder_of_the_same_name_is_no_list_of_processes(agent, optimizer, tmp_path, monkeypatch):
    (tmp_path / "sessions").mkdir()
    monkeypatch.chdir(tmp_path)
    optimizer.start_session("CLAUDE-CODE", "imported", session_id=agent.id)
    optimizer.end_session(agent.id)
    assert agent.bash("git status") is not None


def test_without_a_list_of_processes_a_day_of_silence_is_the_end(agent, optimizer):
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    path = transcript_of(agent)
    os.utime(path, (time.time() - 80_000,) * 2)
    assert optimizer.list_sessions()[0].status is so.SessionStatus.ACTIVE
    os.utime(path, (time.time() - 90_000,) * 2)
    assert optimizer.list_sessions()[0].status is so.SessionStatus.COMPLETED


def test_sessions_of_other_programs_stay_active(optimizer):
    optimizer.start_session("FORGE", "x", session_id="mine")
    assert optimizer.list_sessions()[0].status is so.SessionStatus.ACTIVE


def test_a_scan_replaces_the_estimates_in_place(agent):
    path = transcript_of(agent)
    agent.hook("SessionStart", source="startup")
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    assert "estimated from their size" in " ".join(agent.optimizer.analyze(agent.id).notes)
    result = agent.optimizer.scan([str(path)])
    assert [row["id"] for row in result["sessions"]] == [agent.id]
    assert [session.id for session in agent.optimizer.list_sessions()] == [agent.id]
    session = agent.session()
    assert session.metadata["source"]["path"] == str(path) and "live" not in session.metadata
    assert (session.total_tokens_output == 90
            and not any(event.data.get("estimated") for event in session.events))
    assert agent.optimizer.analyze(agent.id).notes == []


@pytest.mark.parametrize("begun", ["by a hook without its path", "by hand"])
def test_a_scan_takes_the_place_of_what_hooks_logged_without_a_path(optimizer, tmp_path, begun):
    """What was logged by hand under the same id stays beside it."""
    transcript = tiny(tmp_path / "t")
    agent = Agent(optimizer, tmp_path, transcript.session)
    agent.common["transcript_path"] = ""
    if begun == "by hand":
        optimizer.start_session("forge", "mine", session_id=agent.id)
    else:
        del agent.common["transcript_path"]
        agent.hook("UserPromptSubmit", prompt=PROMPT)
    row, = optimizer.scan([transcript.save()])["sessions"]
    ids = sorted(session.id for session in optimizer.list_sessions())
    assert (ids == ([agent.id, agent.id + "-2"] if begun == "by hand" else [agent.id])
            and row["id"] == ids[-1])
    assert optimizer.get_session(row["id"]).total_tokens == row["total_tokens"] > 0
    assert optimizer.scan([transcript.path])["changes"] == "nothing since the last scan"


def test_a_scan_in_the_middle_and_one_at_the_end(agent):
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    path = transcript_of(agent, reads=1)
    agent.optimizer.scan([str(path)])
    agent.hook("UserPromptSubmit", prompt="go on")
    assert agent.session().status is so.SessionStatus.ACTIVE
    transcript_of(agent, reads=3)
    agent.hook("SessionEnd", reason="other")
    result = agent.optimizer.scan([str(path)])
    assert [row["id"] for row in result["sessions"]] == [agent.id]
    assert [session.id for session in agent.optimizer.list_sessions()] == [agent.id]
    assert agent.session().total_tokens_output == 120


def test_a_live_session_that_was_deleted_stays_deleted(agent):
    path = transcript_of(agent)
    agent.hook("UserPromptSubmit", prompt="Fix the loader")
    agent.optimizer.delete_session(agent.id)
    assert agent.optimizer.scan([str(path)])["sessions"] == []
    assert ([row["id"] for row in agent.optimizer.scan([str(path)], again=True)["sessions"]]
            == [agent.id])


@pytest.mark.parametrize("queries, recorded, repeated", [
    (["release notes", "changelog"], True, True), (["release notes", "license"], True, False),
    (["release notes", "changelog"], False, False)])
def test_all_queries_of_a_web_search_are_compared(optimizer, tmp_path, queries, recorded, repeated):
    """Two calls that agree in the first query are one search where they agree in all of them."""
    items = [("session_meta", {"id": "a-thread", "cwd": "/p", "cli_version": "0.98.0"})]
    for number, asked in enumerate((["release notes", "changelog"], queries, ["roadmap"]), 1):
        call = {"type": "web_search_call",
                "action": {"type": "search", "query": asked[0], "queries": asked}}
        items.append(("response_item", dict(call, call_id="c%d" % number) if recorded else call))
        items.append(("event_msg", {"type": "token_count", "info": {"total_token_usage": {
            "input_tokens": 9_000 * number + 500 * number ** 2, "output_tokens": 50 * number}}}))
        if recorded:
            items.append(
                ("response_item", {"type": "function_call_output", "call_id": "c%d" % number,
                                   "output": " ".join(asked) * 90}))
    write(str(tmp_path / "rollout-1.jsonl"), "".join(json.dumps(
        {"timestamp": "2026-11-20T10:00:%02dZ" % second, "type": kind, "payload": payload}) + "\n"
        for second, (kind, payload) in enumerate(items)))
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    searches = [event.data["query"] for event in optimizer.get_session(row["id"]).events
                if "query" in event.data]
    assert searches == ["release notes | changelog", " | ".join(queries), "roadmap"]
    assert [issue["issue_type"] == "REPEATED_SEARCH" for issue in row["issues"]
            if issue["measured"]] == [True] * repeated


def rollout(folder, name, metas, totals, turn=""):
    """A rollout: facts of the thread and of those it goes back to,
    then calls by their running totals."""
    items = [("session_meta", dict(meta, cwd="/p", cli_version="0.98.0")) for meta in metas]
    items.append(("turn_context", {"model": "gpt-5", "turn_id": turn}))
    for total in totals:
        items.append(("response_item",
                      {"type": "message", "role": "assistant", "content": [{"text": "so"}]}))
        items.append(("event_msg", {"type": "token_count", "info": {"total_token_usage": {
            "input_tokens": 1_000 * total, "output_tokens": 10 * total}}}))
    write(str(folder / ("rollout-%s.jsonl" % name)), "".join(json.dumps(
        {"timestamp": "2026-11-20T%s:00:%02dZ" % (name, second), "type": kind, "payload": payload})
        + "\n" for second, (kind, payload) in enumerate(items)))


@pytest.mark.parametrize("forked, calls", [(True, 4), (False, 9)])
@pytest.mark.parametrize("turn", ["", "1"])
def test_a_fork_of_a_fork_counts_its_own_calls_alone(optimizer, tmp_path, turn, forked, calls):
    """Each repeats the facts and the token counts of all it goes back to; threads that only have
    the same totals are others."""
    metas = []
    for number, name in enumerate(("10", "11", "12"), 1):
        origin = {"forked_from_id": "thread-%d" % (number - 1)} if forked and number > 1 else {}
        metas.insert(0, dict(origin, id="thread-%d" % number))
        rollout(tmp_path, name, metas if forked else metas[:1], [1, 2, 3, 4][:number + 1], turn)
    result = optimizer.scan([str(tmp_path)])
    assert (len(result["sessions"]), result["totals"]["model_calls"]) == (3, calls)


@pytest.mark.parametrize("total, last, counted", [
    (7, 2, 2), (9, 4, 4), (3, 3, 3), (9, 9, 9),   # grown; began anew, below and above where it was
    (9, 3, 4)])                                   # one count between them is missing
def test_a_running_total_that_began_anew_counts_whole(optimizer, tmp_path, total, last, counted):
    rollout(tmp_path, "10", [{"id": "a-thread"}], [5, total])
    path = tmp_path / "rollout-10.jsonl"
    usage = {name: {"input_tokens": 1_000 * tokens, "output_tokens": 10 * tokens} for name, tokens
             in (("total_token_usage", total), ("last_token_usage", last))}
    *lines, end = path.read_text().splitlines()
    end = dict(json.loads(end), payload={"type": "token_count", "info": usage})
    path.write_text("\n".join([*lines, json.dumps(end), ""]))
    row, = optimizer.scan([str(path)])["sessions"]
    assert row["tokens"] == {"uncached_input": 1_000 * (5 + counted), "cache_write": 0,
                             "cache_read": 0, "output": 10 * (5 + counted)}


def hooks_of(path):
    """The hook payloads that the calls of a transcript would have made, by the line of the call."""
    calls, payloads = {}, {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            entry = json.loads(line)
            message = entry.get("message") or {}
            for block in message.get("content") if isinstance(message.get("content"), list) else ():
                if block.get("type") == "tool_use":
                    calls[block["id"]] = (number, block, entry.get("cwd", ""))
                elif block.get("type") == "tool_result" and entry.get("toolUseResult"):
                    place, call, cwd = calls[block["tool_use_id"]]
                    failed = block.get("is_error") is True
                    payloads[place] = {
                        "session_id": "s", "cwd": cwd, "tool_name": call["name"],
                        "tool_input": call["input"],
                        "hook_event_name": "PostToolUseFailure" if failed else "PostToolUse",
                        "error": so._content(block["content"])[0],
                        "tool_response": entry["toolUseResult"]}
    return payloads


@pytest.mark.parametrize(
    "case", ["story-checkout", "read-twice", "read-then-cat", "search-twice", "read-after-sed-i",
             "make-fails-twice", "six-of-eight-fail", "read-unchanged-notice",
             "grep-finds-nothing"])
def test_a_hook_makes_the_event_a_scan_makes(optimizer, case):
    folder = os.path.join(TRANSCRIPTS, case)
    main = next(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names
                if name.endswith(".jsonl"))
    session = optimizer.get_session(optimizer.scan([main])["sessions"][0]["id"])
    payloads = hooks_of(main)
    assert payloads
    for event in session.events:
        if event.data["line"] in payloads and event.data.get("tool"):
            told = so.hook_event(payloads.pop(event.data["line"]))
            keys = ["tool", "file_path", "query", "scope", "changes", "lines", "total_lines",
                    "command", "operation", "offset",
                    "limit", "reads", "error_hash", "exit_code", "kind", "unchanged"]
            if event.data["tool"] != "Read":  # whose lines the model is shown with numbers
                keys.append("content_hash")
            assert (told.event_type, {key: told.data.get(key) for key in keys}) == (
                event.event_type, {key: event.data.get(key) for key in keys})
    assert not payloads


OPENCODE_SAMPLES = os.path.join(os.path.dirname(MODULE), "examples", "transcripts", "opencode")


def opencode_exports(case):
    folder = os.path.join(OPENCODE_SAMPLES, case)
    return [json.loads(read(os.path.join(folder, name))) for name in sorted(os.listdir(folder))]


def opencode_database(path, exports):
    """What `opencode export` wrote, as the program's own database holds it."""
    import sqlite3
    base = sqlite3.connect(str(path))
    base.executescript("""
        PRAGMA journal_mode = WAL;
        CREATE TABLE session (id text PRIMARY KEY, project_id text, parent_id text, slug text,
            directory text, title text, version text, time_created integer, time_updated integer);
        CREATE TABLE message (id text PRIMARY KEY, session_id text, time_created integer,
            time_updated integer, data text);
        CREATE TABLE part (id text PRIMARY KEY, message_id text, session_id text,
            time_created integer, data text);
    """)
    for serial, export in enumerate(exports):
        info = export["info"]
        base.execute("INSERT INTO session VALUES (?, 'p', ?, ?, ?, ?, ?, ?, ?)", (
            info["id"], info.get("parentID"), info["slug"], info["directory"], info["title"],
            info["version"], info["time"]["created"], info["time"]["updated"]))
        for number, message in enumerate(export["messages"]):
            body = {k: v for k, v in message["info"].items() if k not in ("id", "sessionID")}
            name = "msg_%d_%04d" % (serial, number)
            base.execute("INSERT INTO message VALUES (?, ?, 1, 1, ?)",
                         (name, info["id"], json.dumps(body)))
            for place, part in enumerate(message["parts"]):
                body = {k: v for k, v in part.items() if k not in ("id", "sessionID", "messageID")}
                base.execute("INSERT INTO part VALUES (?, ?, ?, 1, ?)", (
                    "prt_%d_%04d_%02d" % (serial, number, place), name, info["id"],
                    json.dumps(body)))
    base.commit()
    return base


def told_by(optimizer, path):
    result = optimizer.scan([str(path)], store=False)
    return [(row["task"], row["tokens"], row["model_calls"], row["waste"], row["started_at"],
             [(i["issue_type"], i["claims"]) for i in row["issues"]]) for row in result["sessions"]]


@pytest.mark.parametrize("case", sorted(os.listdir(OPENCODE_SAMPLES)))
def test_opencode_says_the_same_in_exports_and_database(optimizer, tmp_path, case):
    exports = opencode_exports(case)
    expected = told_by(optimizer, os.path.join(OPENCODE_SAMPLES, case))
    assert len(expected) == 1
    # open, as while the program runs
    open_base = opencode_database(tmp_path / "opencode.db", exports)
    assert told_by(optimizer, tmp_path) == expected
    open_base.close()


@pytest.mark.parametrize("odd", ["[]", "{}", "5", "null", '"other"'])
@pytest.mark.parametrize("table", ["session", "message", "part"])
def test_an_odd_id_within_a_row_of_the_database_costs_nothing(optimizer, tmp_path, table, odd):
    exports = opencode_exports("opencode-read-twice")
    base = opencode_database(tmp_path / "opencode.db", exports)
    expected = told_by(optimizer, tmp_path)
    if table == "session":
        base.execute("ALTER TABLE session ADD COLUMN data text")
    base.execute("UPDATE %s SET data = '{\"id\": %s' || CASE WHEN data IS NULL THEN '}' ELSE ', ' "
                 "|| substr(data, 2) END" % (table, odd))
    base.commit()
    assert told_by(optimizer, tmp_path) == expected and len(expected) == 1
    base.close()


def test_a_new_row_in_the_write_ahead_log_is_a_change(optimizer, tmp_path):
    first, second = (opencode_exports(case)
                     for case in ("opencode-read-twice", "opencode-search-twice"))
    base = opencode_database(tmp_path / "opencode.db", first)
    assert len(optimizer.scan([str(tmp_path)])["sessions"]) == 1
    assert optimizer.scan([str(tmp_path)])["changes"] == "nothing since the last scan"
    info = second[0]["info"]
    base.execute("INSERT INTO session VALUES (?, 'p', NULL, 's', '/w', 'another', '1', ?, ?)",
                 (info["id"], info["time"]["created"], info["time"]["updated"]))
    base.execute("INSERT INTO message VALUES ('msg_z', ?, 1, 1, ?)", (
        info["id"], json.dumps(second[0]["messages"][1]["info"])))
    base.commit()
    assert len(optimizer.scan([str(tmp_path)])["sessions"]) == 2
    base.close()


@pytest.mark.parametrize("tokens, usage", [
    ({"input": 10, "output": 50, "reasoning": 20, "cache": {"read": 5, "write": 3}},
     (10, 3, 0, 5, 50)),
    ({"total": 68, "input": 10, "output": 50, "reasoning": 20, "cache": {"read": 5, "write": 3}},
     (10, 3, 0, 5, 50)),
    ({"total": 88, "input": 10, "output": 50, "reasoning": 20, "cache": {"read": 5, "write": 3}},
     (10, 3, 0, 5, 70)),
    ({"input": 10, "output": 5, "reasoning": 20, "cache": {"read": 5, "write": 3}},
     (10, 3, 0, 5, 25)),
    ({"input": -1, "output": "5", "cache": None}, (0, 0, 0, 0, 0))])
def test_opencode_counts_reasoning_once(tokens, usage):
    assert tuple(so._opencode_usage({"tokens": tokens})[0]) == usage


def test_a_message_of_several_steps_is_several_calls(optimizer, tmp_path):
    export, = opencode_exports("opencode-read-twice")
    message = next(m for m in export["messages"] if m["info"]["role"] == "assistant")
    finish = next(part for part in message["parts"] if part["type"] == "step-finish")
    before, = told_by(optimizer, os.path.join(OPENCODE_SAMPLES, "opencode-read-twice"))
    message["parts"].append(
        dict(finish, id="prt_more", tokens=dict(finish["tokens"], input=7, total=None)))
    write(str(tmp_path / "export.json"), json.dumps(export))
    after, = told_by(optimizer, tmp_path)
    assert after[2] == before[2] + 1
    assert after[1]["uncached_input"] == before[1]["uncached_input"] + 7


@pytest.mark.parametrize("parents, rows", [
    ((None, 0), 1), ((1, 0), 1), ((0, 0), 1), ((1, 0, 0), 1), ((None, 0, 1), 1), ((2, 0, 1), 1),
    ((None, None), 2), ((None, 0, 3, 2), 2)])
@pytest.mark.parametrize("shape", ["exports", "database"])
def test_sessions_that_are_each_others_parent_are_read(optimizer, tmp_path, parents, rows, shape):
    """A circle is one session, as is what hangs on it, and what hangs on one without a parent."""
    export, = opencode_exports("opencode-read-twice")
    exports = []
    for number, parent in enumerate(parents):
        copy = json.loads(json.dumps(export).replace("ses_", "ses_%d" % number).replace(
            "msg_", "msg_%d" % number))
        copy["info"]["parentID"] = None if parent is None else copy["info"]["id"].replace(
            "ses_%d" % number, "ses_%d" % parent, 1)
        exports.append(copy)
        if shape == "exports":
            write(str(tmp_path / ("%d.json" % number)), json.dumps(copy))
    if shape == "database":
        opencode_database(tmp_path / "opencode.db", exports).close()
    (_, _, calls, _, _, _), = told_by(optimizer,
                                      os.path.join(OPENCODE_SAMPLES, "opencode-read-twice"))
    found = told_by(optimizer, tmp_path)
    assert len(found) == rows and sum(told[2] for told in found) == calls * len(parents)


def test_grouping_takes_as_many_steps_as_there_are_files():
    def chain(n):
        return {"p%d" % i: ["s%d" % i, "s%d" % (i - 1)] for i in range(n)}

    reader = so.TranscriptReader()
    assert reader.group(chain(30)) == [["p0"] + sorted("p%d" % i for i in range(1, 30))]
    once, twice = (operations(reader.group, chain(n)) for n in (500, 1_000))
    assert twice <= 2.5 * once


@pytest.mark.parametrize("named", [True, False])
def test_messages_without_an_id_count_each(optimizer, tmp_path, named):
    export, = opencode_exports("opencode-read-twice")
    expected = told_by(optimizer, os.path.join(OPENCODE_SAMPLES, "opencode-read-twice"))
    for message in [] if named else export["messages"]:
        del message["info"]["id"]
        for part in message["parts"]:
            part.pop("id", None)
            part.pop("callID", None)
    for name in "ab" if named else "a":  # a copy of a message is the same one
        write(str(tmp_path / (name + ".json")), json.dumps(export))
    assert told_by(optimizer, tmp_path) == expected


@pytest.mark.parametrize("end, found", [
    ("(End of file - total 6 lines)", 1), ("(File has more lines. Use 'offset' to read on)", 0)])
def test_the_end_of_a_file_that_a_read_showed_is_known(optimizer, tmp_path, end, found):
    export, = opencode_exports("opencode-read-twice")
    first, *_, again = [part for message in export["messages"] for part in message["parts"]
                        if "src/cart.py" in str(part.get("state", {}).get("input"))]
    shown, path = first["state"]["output"], first["state"]["input"]["filePath"]
    first["state"]["output"] = shown.replace("(End of file - total 6 lines)", end)
    lines = re.findall(r"(?m)^\d+\| (.*)$", shown)
    again.update(tool="bash", state=dict(again["state"], output="\n".join(lines),
                                         input={"command": "tail -n 6 " + path}))
    write(str(tmp_path / "export.json"), json.dumps(export))
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    assert [issue["issue_type"] for issue in row["issues"]] == ["REPEATED_FILE_READ"] * found


def test_a_database_of_another_kind_is_no_transcript(optimizer, tmp_path):
    import sqlite3
    for name in ("state.db", "opencode.db"):
        base = sqlite3.connect(str(tmp_path / name))
        base.execute("CREATE TABLE other (id text)")
        base.commit()
        base.close()
    write(str(tmp_path / "opencode-old.db"), b"SQLite format 3\0 and no more")
    result = optimizer.scan([str(tmp_path)])
    assert result["sessions"] == []
    assert (sorted(os.path.basename(entry["path"]) for entry in result["skipped"])
            == ["opencode-old.db", "opencode.db"])
    assert all("database" in entry["reason"] for entry in result["skipped"])


GIT_DIFF = "\n".join("+    line %d of a change that is long enough to be worth a word" % n
                     for n in range(60))


def told_twice(folder, first, second, between=(), name="Bash", again=None, **arguments):
    """Two calls of a tool with their results, and what happens between them."""
    told = Transcript(folder)
    told.prompt("go")
    arguments = arguments or {"command": "git diff"}
    for number, (answer, given) in enumerate(((first, arguments), (second, again or arguments))):
        told.answer("m%d" % number, (10, 3_000, 5_000 + 4_000 * number, 40),
                    use("t%d" % number, name, **given))
        told.result("t%d" % number, answer)
        for step, block in enumerate(between if not number else ()):
            if isinstance(block, str):
                told.prompt(block)
            else:
                told.answer("b%d" % step, (10, 200, 8_000, 20), block)
                told.result(block["id"], "done")
    told.answer("m9", (10, 3_000, 14_000, 40), text(40))
    return told.save()


@pytest.mark.parametrize("name, arguments, first, second, between, found", [
    ("the same diff", {}, GIT_DIFF, GIT_DIFF, (), [True]),
    ("after an edit", {}, GIT_DIFF, GIT_DIFF,
     (use("e", "Edit", file_path="/w/a.py", old_string="a", new_string="b"),), []),
    ("after a command nobody knows", {}, GIT_DIFF, GIT_DIFF,
     (use("e", "Bash", command="./deploy-all"),), []),
    ("after a harmless one", {}, GIT_DIFF, GIT_DIFF, (use("e", "Bash", command="pwd"),), [True]),
    ("git was told something in between", {}, GIT_DIFF, GIT_DIFF,
     (use("e", "Bash", command="git push origin main"),), []),
    ("git was asked something in between", {}, GIT_DIFF, GIT_DIFF,
     (use("e", "Bash", command="git log -3"),), [True]),
    ("a command that acts, again", {"command": "git reset -q && git status"}, GIT_DIFF,
     GIT_DIFF, (), []),
    ("a process was waited for in between", {}, GIT_DIFF[:400], GIT_DIFF[:400],
     (use("e", "BashOutput", bash_id="1"),), []),
    ("a list was asked for in between", {}, GIT_DIFF[:400], GIT_DIFF[:400],
     (use("e", "TaskList"),), [True]),
    ("what is polled while one waits", {}, GIT_DIFF, GIT_DIFF,
     (use("e", "BashOutput", bash_id="1"),), [False]),
    ("one more question, without an answer",
     {"command": "git diff", "again": {"command": "git diff; git diff --cached"}},
     GIT_DIFF, GIT_DIFF, (), [False]),
    ("another directory first", {"command": "git diff", "again": {"command": "cd /w && git diff"}},
     GIT_DIFF, GIT_DIFF, (), [True]),
    ("two questions, both again", {"command": "git diff; git log"}, GIT_DIFF, GIT_DIFF, (), [True]),
    ("somebody spoke in between", {}, GIT_DIFF, GIT_DIFF, ("look again",), [False]),
    ("nine lines in ten are the same", {}, GIT_DIFF,
     GIT_DIFF.replace("line 7 ", "line seven "), (), [False]),
    ("nine lines in ten, and the tenth is most of it", {}, GIT_DIFF,
     GIT_DIFF.replace("line 7 ", "line seven " * 300), (), []),
    ("half of it is the same", {}, GIT_DIFF,
     GIT_DIFF[:len(GIT_DIFF) // 2] + GIT_DIFF[len(GIT_DIFF) // 2:].upper(), (), []),
    ("a short answer", {}, "ok, 1 file", "ok, 1 file", (), []),
    ("an acknowledgement", {"name": "TodoWrite", "todos": [1]}, GIT_DIFF, GIT_DIFF, (), []),
    ("an MCP server's answer", {"name": "mcp__tracker__get_issue", "id": "7"}, GIT_DIFF,
     GIT_DIFF, (), [True]),
    ("another question, the same answer",
     {"command": "git diff HEAD", "again": {"command": "git diff"}},
     GIT_DIFF, GIT_DIFF, (), [True]),
    ("another question, the same short answer",
     {"command": "git diff HEAD", "again": {"command": "git diff"}},
     GIT_DIFF[:400], GIT_DIFF[:400], (), [False]),
    ("the same grep answer for another pattern",
     {"name": "Grep", "pattern": "ab", "again": {"pattern": "ab+"}},
     GIT_DIFF, GIT_DIFF, (), [True]),
], ids=lambda value: value if isinstance(value, str) and len(value) < 45 else "")
def test_an_answer_given_again(tmp_path, optimizer, name, arguments, first, second, between, found):
    row, = optimizer.scan([told_twice(tmp_path, first, second, between, **arguments)])["sessions"]
    issues = [issue for issue in row["issues"] if issue["issue_type"] == "REPEATED_SEARCH"]
    assert [issue["measured"] for issue in issues] == found
    for issue in issues:
        assert 0 < issue["estimated_waste_tokens"] and len(issue["events_involved"]) == 2
        share = sum(map(sum, issue["claims"].values()))
        assert issue["estimated_waste_tokens"] == share


NUMBERED = "\n".join("%6d\tline %d" % (n, n) for n in range(1, 201))
PLAIN = "\n".join("line %d" % n for n in range(1, 201))


@pytest.mark.parametrize("first, second, whole", [
    ("cat a.py", "cat a.py", True), ("nl -ba a.py", "nl -ba a.py", True),
    ("nl -ba a.py", "cat a.py", True), ("cat a.py", "nl -ba a.py", False)])
def test_line_numbers_that_are_new_are_no_repetition(tmp_path, optimizer, first, second, whole):
    shown = [NUMBERED if "nl" in command else PLAIN for command in (first, second)]
    transcript = told_twice(tmp_path, *shown, command=first, again={"command": second})
    row, = optimizer.scan([transcript])["sessions"]
    issue, = [issue for issue in row["issues"] if issue["issue_type"] == "REPEATED_FILE_READ"]
    (event, claim), = issue["claims"].items()
    tokens, = [e.tokens_input for e in optimizer.get_session(row["id"]).events if e.id == event]
    share = 1 if whole else (len(PLAIN) + 1) / len(NUMBERED)
    assert issue["measured"] and claim[0] == pytest.approx(tokens * share, abs=1)


ANOTHER = PLAIN.replace("line", "word")


@pytest.mark.parametrize("steps, repeated", [
    ("cat a.py|cat b.py|cat a.py b.py", "1 1"), ("cat a.py|cat a.py b.py", ""),
    ("cat a.py|cat b.py|./gen|cat a.py b.py", "1 1"),
    ("cat a.py|cat b.py|edited|cat a.py b.py", ""), ("cat a.py|edited|cat b.py|cat a.py b.py", ""),
    ("cat a.py|cat b.py|sed -i s/x/y/ a.py|cat a.py b.py", ""),
    ("cat a.py|cat b.py|grown|cat a.py b.py", ""), ("cat a.py|grown|cat b.py|cat a.py b.py", ""),
    ("cat a.py|cat b.py|sed -n 1,9p a.py; sed -n 1,9p b.py", "1 1"),
    ("sed -n 1,9p a.py|sed -n 1,9p b.py|cat a.py b.py", ""),
    ("cat a.py b.py|cat a.py", "1"), ("sed -n 1,9p a.py; sed -n 1,9p b.py|sed -n 1,9p b.py", "1"),
    ("cat a.py b.py|edited|cat a.py", ""), ("cat a.py b.py|edited|cat b.py", "1"),
    ("sed -n 1,9p a.py; sed -n 1,9p b.py|sed -n 10,19p b.py", ""),
], ids=str)
def test_several_files_in_one_result_are_compared_line_by_line(steps, repeated):
    """A file changes where nothing tells of it ("edited") as well."""
    told, texts = recorder(), {"a.py": PLAIN, "b.py": ANOTHER}
    for number, command in enumerate(steps.split("|")):
        if command == "grown":
            texts["a.py"] += "\nmore" * 60
            continue
        if command == "edited":
            texts["a.py"] = texts["a.py"].replace("line 5\n", "line five\n")
            continue
        told.call("r%d" % number, "m", so.Usage(100, read=1_000 * number, output=10))
        told.tool("t%d" % number, "Bash", {"command": command}, 20)
        shown = []
        for first, last, name in re.findall(r"(?:(\d+),(\d+)p )?(\w\.py)", command):
            lines = texts[name].split("\n")
            shown += lines[int(first) - 1:int(last)] if last else lines
        told.returned("t%d" % number, "\n".join(shown) or "done")
    told.call("r9", "m", so.Usage(100, read=9_000, output=10))
    found = so.repeats_in(told.finish()[0])
    assert len(found) == bool(repeated)
    for _, repeat in found:
        assert repeat.covered == repeat.total
        assert len((repeat.earlier, *repeat.also)) == len(repeated.split())


@pytest.mark.parametrize("lines, found", [("171,200", True), ("151,180", False)])
def test_the_end_of_a_file_whose_length_a_page_told(lines, found):
    told = recorder()
    first, last = map(int, lines.split(","))
    shown = PLAIN.split("\n")[first - 1:last]
    told.call("r1", "m", so.Usage(100, output=10))
    told.tool("t1", "Read", {"file_path": "/w/a.py", "offset": first, "limit": 30}, 20)
    told.returned("t1", "\n".join(shown), lines=(first, 30, 200))
    told.call("r2", "m", so.Usage(100, read=1_000, output=10))
    told.tool("t2", "Bash", {"command": "tail -n 30 /w/a.py"}, 20)
    told.returned("t2", "\n".join(PLAIN.split("\n")[-30:]))
    told.call("r3", "m", so.Usage(100, read=2_000, output=10))
    shares = [repeat.covered / repeat.total for _, repeat in so.repeats_in(told.finish()[0])]
    assert [share > 0.9 for share in shares] == [found]


@pytest.mark.parametrize("command, named", [
    ("ls -la /w/docs", "ls -la /w/docs"), ("rg -n total /w/docs", "total")])
def test_a_listing_is_known_by_its_directory(tmp_path, optimizer, command, named):
    row, = optimizer.scan([told_twice(tmp_path, GIT_DIFF, GIT_DIFF, command=command)])["sessions"]
    issue, = [issue for issue in row["issues"] if issue["issue_type"] == "REPEATED_SEARCH"]
    assert issue["metadata"]["query"] == named and repr(named) in issue["description"]


@pytest.mark.parametrize("prompt, repeated", [
    ("and now?", True), ("is a > b; or not", True), ("a list:\n- cp /w/a.py > /w/a.py", True),
    ("tr -d x < /w/a.py > /w/b && mv /w/b /w/a.py", False), ("! sed -i s/a/b/ /w/a.py", False),
    ("$ make fmt", False), ("! git log", True)])
def test_a_shell_line_that_the_user_ran_changes_its_files(prompt, repeated):
    told = recorder()
    for number in (1, 2):
        told.call("r%d" % number, "m", so.Usage(100, read=1_000 * number, output=10))
        told.tool("t%d" % number, "Read", {"file_path": "/w/a.py"}, 20)
        told.returned("t%d" % number, "x = 1\n" * 40)
        told.prompt(prompt, 10)
    told.call("r3", "m", so.Usage(100, read=3_000, output=10))
    assert bool(so.repeats_in(told.finish()[0])) == repeated


@pytest.mark.parametrize("command, second, repeated", [
    ("npm install", "x = 1", True), ("pip install -r requirements.txt", "x = 1", True),
    ("go mod download", "x = 1", True), ("cargo fetch", "x = 1", True),
    ("npm install", "x = 2", False), ("npm run format", "x = 1", False),
    ("npx prisma generate", "x = 1", True), ("npm create vite", "x = 1", True),
    ("npm create vite", "x = 2", False)])
def test_an_install_changes_its_own_tree(command, second, repeated):
    told = recorder()
    for number, text in ((1, "x = 1"), (2, second)):
        told.call("r%d" % number, "m", so.Usage(100, read=1_000 * number, output=10))
        told.tool("t%d" % number, "Read", {"file_path": "/w/a.py"}, 20)
        told.returned("t%d" % number, text)
        told.tool("c%d" % number, "Bash", {"command": command}, 20)
        told.returned("c%d" % number, "done")
    told.call("r3", "m", so.Usage(100, read=3_000, output=10))
    assert bool(so.repeats_in(told.finish()[0])) == repeated


@pytest.mark.parametrize("field, tell", [
    ("operation",
     lambda told, secret: told.tool("t", "Bash", {"command": "mysql -p%s shop" % secret})),
    ("operation",
     lambda told, secret: told.tool("t", "Bash", {"command": "cat <<E\npassword=%s\nE" % secret})),
    ("content_hash", lambda told, secret: (told.tool("t", "Read", {"file_path": "/w/.env"}),
                                           told.returned("t", "DB_PASSWORD=%s\n" % secret))[1]),
    ("error_hash", lambda told, secret: (told.tool("t", "Bash", {"command": "x"}),
                                         told.returned("t", "refused: --password %s" % secret,
                                                       failed=True))[1])])
def test_no_secret_can_be_guessed_from_a_hash(field, tell):
    hashes = {tell(recorder(), secret).data[field] for secret in ("hunter4711", "correcthorse9")}
    assert len(hashes) == 1
    assert tell(recorder(), "$PASS").data[field] not in hashes


@pytest.mark.parametrize("field, tell", [
    ("operation", lambda told, key, text: told.tool(key, "Bash", {"command": text})),
    ("operation", lambda told, key, text: (told.tool(key, "mcp__a__b", {"text": text}),
                                           told.returned(key, "no", failed=True))[1]),
    ("content_hash", lambda told, key, text: (told.tool(key, "Read", {"file_path": "/w/.env"}),
                                              told.returned(key, text))[1]),
    ("error_hash", lambda told, key, text: (told.tool(key, "Bash", {"command": "x"}),
                                            told.returned(key, text, failed=True))[1]),
    ("query", lambda told, key, text: told.tool(key, "WebFetch", {"prompt": text}))])
def test_a_long_text_is_numbered_and_no_hash_of_it_is_kept(field, tell):
    texts = ["the known rest\n" * 900 + "opens with %s" % word
             for word in ("sesame", "barley", "sesame")]
    told = recorder()
    first, other, same = [tell(told, str(key), text).data[field] for key, text in enumerate(texts)]
    assert first == same != other
    # whatever the text is, it is the first
    assert tell(recorder(), "t", texts[1]).data[field] == first
    assert so.digest_of(texts[0]) not in json.dumps(told.finish()[0].to_dict())


@pytest.mark.parametrize("length, kept", [(600, True), (15_000, True), (25_000, False)])
def test_a_hook_masks_a_long_text_and_keeps_no_hash_of_a_longer_one(length, kept):
    def digest(secret, rest="x "):
        event = so.hook_event({
            "hook_event_name": "PostToolUse", "session_id": "s", "cwd": "/w", "tool_name": "Bash",
            "tool_input": {"command": "cat /w/.env"},
            "tool_response": {"stdout": "PASSWORD=%s\n" % secret + rest * (length // 2),
                              "stderr": ""}})
        return event.data.get("content_hash", "")
    assert digest("hunter4711") == digest("correcthorse9") and bool(digest("hunter4711")) == kept
    assert (digest("hunter4711", "y ") != digest("hunter4711")) == kept


@pytest.mark.parametrize("second, between, found", [
    ({}, (), [True]), ({"dangerouslyDisableSandbox": True}, (), []), ({}, ("try again",), [False])])
def test_a_retry_knows_its_rights_and_who_asked_for_it(tmp_path, optimizer, second, between, found):
    told = Transcript(tmp_path)
    told.prompt("go")
    for number in range(2):
        told.answer("m%d" % number, (10, 3_000, 5_000 + 4_000 * number, 90),
                    use("t%d" % number, "Bash", command="make check", **(second if number else {})))
        told.result("t%d" % number,
                    "Exit code 2\nmake: *** [check] Error 1 " + "x" * 400, error=True)
        for words in between if not number else ():
            told.prompt(words)
    told.answer("m9", (10, 3_000, 14_000, 40), text(40))
    row, = optimizer.scan([told.save()])["sessions"]
    assert [i["measured"] for i in row["issues"] if i["issue_type"] == "FAILED_RETRY"] == found


@pytest.mark.parametrize("message, kind", [
    ("Exit code 128\nerror: gpg failed to sign the data\nfatal: failed to write commit object",
     "transient"),
    ("Exit code 6\ncurl: (6) Could not resolve host: example.org", "transient"),
    ("Exit code 1\nnpm error code EAI_AGAIN", "transient"),
    ("Exit code 1\nModuleNotFoundError: no module", ""),
    ("Exit code 7\nconnect ECONNRESET 127.0.0.1:8080", ""), ("Exit code 1\nassert 1 == 2", "")])
def test_a_service_that_failed_is_nobodys_retry(message, kind):
    assert so._kind_of(message) == kind


def test_the_end_of_a_long_error_tells_two_apart():
    head = "Traceback\n" + "  frame of a call\n" * 400
    assert so.normal_message(head + "KeyError: a") != so.normal_message(head + "ValueError: b")
    assert (so.normal_message(head + "KeyError: at 12")
            == so.normal_message(head + "KeyError: at 99"))


def test_every_read_whose_lines_are_used_is_evidence_and_shares_are_by_characters():
    def read_of(first, last, **data):
        return E("FILE_READ", 1_000, file_path="/w/a.py", lines=[first, last], **data)
    session = session_of(read_of(1, 50), read_of(51, 100), read_of(1, 100),
                         read_of(40, 139, overlap=[61, 100, 1_000]))
    issues = so.RepeatedFileReadAnalyzer().analyze(session)
    claims = {key: claim for issue in issues for key, claim in issue.claims.items()}
    assert claims == {"e3": (1_000, 0), "e4": (100, 0)}  # by lines it would be 610
    assert ({event for issue in issues for event in issue.events_involved}
            == {"e1", "e2", "e3", "e4"})


def test_small_repeats_of_a_transcript_are_a_note_and_those_logged_by_hand_findings(optimizer):
    events = [E("FILE_READ", 30, file_path="a.py"), E("FILE_READ", 30, file_path="a.py")]
    by_hand, imported = session_of(*events), session_of(*events, source={"reader": "x"})
    assert len(so.build_report(by_hand, optimizer.analyzers).issues) == 1
    report = so.build_report(imported, optimizer.analyzers)
    assert report.issues == [] and report.total_waste_tokens == 0
    assert "1 of the repeats: small, not listed (tokens: 30)" in report.notes
    assert len(so.RepeatedFileReadAnalyzer().analyze(imported)) == 1


# ==================================================================================================
# Scan
# ==================================================================================================

def transcripts_in(folder):
    found = [path for path, _, _ in so.find_transcripts([folder])]
    return [path for path in found if os.path.basename(path) != "labels.json"]


def test_the_samples_add_up_and_every_file_is_read_or_named(optimizer):
    result = optimizer.scan([SAMPLES])
    consistent(result, optimizer)
    used = {path for row in result["sessions"]
            for source in [optimizer.get_session(row["id"]).metadata["source"]]
            for path in [source["path"]] + source.get("paths", [])}
    assert used | {entry["path"] for entry in result["skipped"]} >= set(transcripts_in(SAMPLES))
    assert ({row["agent"] for row in result["sessions"]}
            == {"CLAUDE-CODE", "CODEX", "GEMINI-CLI", "OPENCODE"})


@pytest.mark.skipif(not os.path.isdir(REAL), reason="the real transcripts are not here")
def test_real_transcripts_add_up_and_every_file_is_read_or_named(optimizer):
    result = optimizer.scan([REAL])
    assert len(result["sessions"]) > 100
    consistent(result, optimizer)
    used = {path for row in result["sessions"]
            for source in [optimizer.get_session(row["id"]).metadata["source"]]
            for path in [source["path"]] + source.get("paths", [])}
    named = {entry["path"] for entry in result["skipped"]}
    assert [path for path in transcripts_in(REAL)
            if path not in used | named and path.endswith(".jsonl")] == []
    assert so.scan_report(result)


SHOWN_AS = [words.split() for words in (
    "", "--by day --format json", "--format html", "--agent codex",
    "--project project --fail-under 100", "--since 2026-01-01")]
NAMES = ["%d1111111-2222-4333-8444-555555555555" % number for number in range(3)]


def grow(folder):
    transcript = tiny(folder, name=NAMES[0])
    transcript.answer("m3", (5, 0, 1_160, 7), text(20))
    transcript.save()


# what is done between two scans of a folder into an optimizer's store; whether the next scan's
# output is made anew
CHANGES = {
    "nothing": (lambda o, folder, patch: None, False),
    "a file grows": (lambda o, folder, patch: grow(folder), True),
    "a file is cut": (lambda o, folder, patch: os.truncate(tiny(folder, name=NAMES[0]).save(), 900),
                      True),
    "a session comes": (lambda o, folder, patch: tiny(folder, name=NAMES[2]).save(), True),
    "a transcript goes": (lambda o, folder, patch: os.unlink(tiny(folder, name=NAMES[1]).save()),
                          True),
    "a file of no agent comes": (
        lambda o, folder, patch: write(os.path.join(folder, "odd.jsonl"), "?"), True),
    "a session is deleted": (lambda o, folder, patch: o.delete_session(o.list_sessions()[0].id),
                             True),
    "one is read again": (lambda o, folder, patch: o.scan([folder], again=True), True),
    "prices": (lambda o, folder, patch: write(os.path.join(o.store.root, "prices.json"),
                                              '{"opus": {"input": 1, "output": 2}}'), True),
    "a version": (lambda o, folder, patch: patch.setattr(so, "__version__", "9"), True),
    "a zone": (lambda o, folder, patch: set_zone(patch, "Asia/Tokyo"), True),
    "a day": (lambda o, folder, patch: patch.setattr(so, "now_text",
                                                     lambda: "2031-01-01T00:00:00Z"), True),
    "a width": (lambda o, folder, patch: patch.setenv("COLUMNS", "61"), True),
    "a session is logged": (lambda o, folder, patch: o.start_session("FORGE", "t"), False)}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_scan_has_shown_is_kept_only_while_it_would_be_made_the_same(
        tmp_path, utc, monkeypatch, capsys, change):
    root, folder, made = str(tmp_path / "store"), str(tmp_path / "t"), []
    monkeypatch.setenv("COLUMNS", "90")
    for name in NAMES[:2]:
        tiny(folder, name=name).save()
    result = so.TranscriptScan.result
    monkeypatch.setattr(so.TranscriptScan, "result",
                        lambda scan, *how: made.append(1) or result(scan, *how))

    def shown():
        del made[:]
        return [(so.main(["--store", root, "scan", folder] + words), capsys.readouterr().out)
                for words in SHOWN_AS]
    shown()
    before = shown()
    do, anew = CHANGES[change]
    do(SessionOptimizer(root), folder, monkeypatch)
    if anew:
        shown()
        assert len(made) == len(SHOWN_AS)
    kept = shown()
    assert kept == before or anew
    with monkeypatch.context() as patch:
        patch.setattr(so.State, "shown", lambda state, key, generation, show: show())
        assert shown() == kept and len(made) == len(SHOWN_AS)
    assert shown() == kept and len(made) == 1  # with a time


def test_what_is_shown_of_an_earlier_state_is_not_kept(store):
    state = store.state
    state.save_scan(*unit_of("a"), [], 0)
    earlier = state.generation()
    assert (state.shown("k", earlier, lambda: ["one"])
            == state.shown("k", earlier, lambda: ["two"]) == ["one"])
    state.forget("a-0", False)
    assert (state.shown("k", earlier, lambda: ["three"]) == ["three"]
            and state.shown("k", earlier, lambda: ["four"]) == ["four"])
    assert (state.shown("k", state.generation(), lambda: ["five"])
            == state.shown("k", -1, lambda: ["six"]) == ["five"])
    assert (state.shown("long", state.generation(), lambda: ["x" * so._MOST_SHOWN])
            and state.shown("long", -1, lambda: ["y"]) == ["y"])


def test_a_second_scan_reads_only_what_changed(tmp_path, optimizer, monkeypatch):
    first, second = (tiny(tmp_path / "p"),
                     tiny(tmp_path / "p", name="99999999-2222-4333-8444-555555555555"))
    first.save(), second.save()
    reads = []
    for reader in so.READERS:
        monkeypatch.setattr(type(reader), "read",
                            lambda self, paths, *rest, _read=reader.read: reads.append(paths)
                            or _read(paths, *rest))
    before = optimizer.scan([str(tmp_path / "p")])
    assert sorted(reads) == [[first.path], [second.path]] and before["changes"] == ""
    del reads[:]
    again = optimizer.scan([str(tmp_path / "p")])
    assert (reads == [] and again["sessions"] == before["sessions"]
            and again["changes"] == "nothing since the last scan")
    second.answer("m3", (5, 0, 1_160, 7), text(20))
    second.save()
    del reads[:]
    later = optimizer.scan([str(tmp_path / "p")])
    assert (reads == [[second.path]]
            and "+0 sessions, +1 model call, +1,172 tokens" in later["changes"])
    consistent(later, optimizer)
    os.utime(first.path, ns=(1, 1))
    del reads[:]
    assert (optimizer.scan([str(tmp_path / "p")])["sessions"] == later["sessions"]
            and reads == [[first.path]])
    del reads[:]
    optimizer.scan([str(tmp_path / "p")], again=True)
    assert len(reads) == 2


def test_a_scan_says_what_went_and_what_came_back(tmp_path, optimizer):
    first, second, third = (tiny(tmp_path / "p", name=f"{digit * 8}-2222-4333-8444-555555555555")
                            for digit in "789")
    for transcript in (first, second, third):
        transcript.save()

    def scan():
        found = optimizer.scan([str(tmp_path / "p")])
        return found["changes"], found["found"]["only_stored"]

    assert scan() == ("", 0) and scan() == ("nothing since the last scan", 0)
    os.rename(first.path, first.path + ".away")
    gone, stored = scan()
    assert gone.startswith("since the last scan: -1 session, -2 model calls, -2,250 tokens, -0.")
    assert (stored == 1 and scan() == ("nothing since the last scan", 1)
            and len(optimizer.list_sessions()) == 3)
    optimizer.scan([second.path])  # of one file alone: the folder's last scan stays what it was
    os.rename(first.path + ".away", first.path)
    back, stored = scan()
    assert (back.startswith("since the last scan: +1 session, +2 model calls, +2,250 tokens, +0.")
            and stored == 0)
    for transcript in (second, third):
        optimizer.delete_session(transcript.session)
    os.remove(third.path)  # deleted on purpose: not only stored
    assert scan()[0].startswith("since the last scan: -2 sessions, -4 model calls, ")
    assert scan() == ("nothing since the last scan", 0)
    os.remove(first.path), os.remove(second.path)
    empty = optimizer.scan([str(tmp_path / "p")])
    shown = so.scan_report(empty)
    assert ("NO SESSIONS FOUND" in shown
            and "1 more session in the store alone" in " ".join(shown.split()))
    assert optimizer.agent_statistics("", 9_000)["sessions_analyzed"] == 1
    assert optimizer.scan([str(tmp_path / "p")], store=False)["found"]["only_stored"] == 0


def test_what_a_scan_changed_is_told_of_a_store_for_reading_only(tmp_path, optimizer, monkeypatch):
    path = tiny(tmp_path / "p").save()
    optimizer.scan([str(tmp_path / "p")])
    os.remove(path)

    def refuse(*_):
        raise StorageError("state.sqlite3", "it is for reading only", "make it writable")
    monkeypatch.setattr(so.State, "save_scan", refuse)
    for _ in range(2):
        assert optimizer.scan([str(tmp_path / "p")])["changes"].startswith(
            "since the last scan: -1 session, ")


def read_apart(paths, seed=0):
    """What the pure functions find in files looked at in any order, each unit for itself,
    as a cluster does."""
    chance = random.Random(seed)
    facts = [so.describe_transcript(path) for path in chance.sample(paths, len(paths))]
    units = {unit[0]["path"]: unit for unit in so.group_transcripts(json.loads(json.dumps(facts)))}
    found = {name: so.read_session_files(units[name])
             for name in chance.sample(list(units), len(units))}
    order = {name: unit[0]["order"] for name, unit in units.items()}
    owners = so.owners_of((key, output, order[name]) for name, its in found.items()
                          for key, output in its["responses"].items())
    for name, its in list(found.items()):
        lost = {key for key in its["responses"] if owners[key] != order[name]}
        if lost:
            found[name] = so.read_session_files(units[name], lost)
            assert found[name]["responses"] == its["responses"], name
    assert json.loads(json.dumps(found)) == found
    ids = so.session_ids((name, [row["id"] for row in found[name]["rows"]]) for name in units)
    rows = [so.renamed(row, session_id) for name in units
            for row, session_id in zip(found[name]["rows"], ids[name])]
    return (rows, [entry for its in found.values() for entry in its["skipped"]]
            + so.left_out(facts), found)


@pytest.mark.parametrize("folder", [SAMPLES, pytest.param(REAL, marks=pytest.mark.skipif(
    not os.path.isdir(REAL), reason="the real transcripts are not here"))], ids=["samples", "real"])
def test_units_read_apart_say_what_a_scan_says(folder, optimizer):
    """And no reader's claims depend on the answers,
    which `read_apart` holds for the units that lose some."""
    rows, skipped, found = read_apart(transcripts_in(folder), seed=1)
    result = dict(optimizer.scan([folder]), changes="")
    assert (json.dumps(so.scan_result(rows, skipped), sort_keys=True)
            == json.dumps(result, sort_keys=True))
    random.Random(2).shuffle(rows)
    assert so.scan_totals(rows) == result["totals"]
    for its in found.values():
        for row, usage in zip(its["rows"], its["usage"]):
            tokens = {name: sum(part[name] for part in usage) for name in so.CLASSES}
            assert row["tokens"] == {
                "uncached_input": tokens["uncached_input"],
                "cache_write": tokens["cache_write_5m"] + tokens["cache_write_1h"],
                "cache_read": tokens["cache_read"], "output": tokens["output"]}, row["path"]
            assert sum(part["cost"] for part in usage) == row["bill"]["total"]


@pytest.mark.parametrize("folder", [SAMPLES, pytest.param(REAL, marks=pytest.mark.skipif(
    not os.path.isdir(REAL), reason="the real transcripts are not here"))], ids=["samples", "real"])
def test_what_is_claimed_does_not_depend_on_the_answers(folder):
    class Everything:
        def __contains__(self, key):
            return True
    units = so.group_transcripts(map(so.describe_transcript, transcripts_in(folder)))
    assert len(units) > 10
    for unit in units:
        told = [so.read_unit(unit, elsewhere, lambda session, found: None)["responses"]
                for elsewhere in (frozenset(), Everything())]
        assert told[0] == told[1], unit[0]["path"]


@pytest.mark.parametrize("folder", [SAMPLES, pytest.param(REAL, marks=pytest.mark.skipif(
    not os.path.isdir(REAL), reason="the real transcripts are not here"))], ids=["samples", "real"])
def test_any_number_of_processes_says_and_stores_the_same(folder, tmp_path):
    outcomes = []
    for jobs in (1, 2, 3):
        optimizer = SessionOptimizer(str(tmp_path / str(jobs)))
        result = optimizer.scan([folder], jobs=jobs)
        files = {name: read(os.path.join(optimizer.store.sessions, name))
                 for name in os.listdir(optimizer.store.sessions)}
        outcomes.append((json.dumps(result), files, optimizer.store.state.responses(),
                         optimizer.store.state.scanned()[1:]))
        assert optimizer.scan([folder], jobs=jobs)["changes"] == "nothing since the last scan"
    assert outcomes[0] == outcomes[1] == outcomes[2] and len(outcomes[0][1]) > 10


class Dying:
    """Tells ids, and ends every worker that asks it to."""

    def __call__(self, session, found):
        if multiprocessing.parent_process() is not None:
            os._exit(9)
        found["rows"].append(session.id)


class Alone(Dying):
    """Cannot be given to another process."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("case", ["workers die", "no pickle", "no processes", "no executor"])
def test_where_processes_cannot_work_this_one_reads(case, monkeypatch, recwarn):
    units = so.group_transcripts(
        map(so.describe_transcript, transcripts_in(os.path.join(SAMPLES, "claude-code"))))[:6]
    tasks = [(unit[0]["path"], unit, frozenset()) for unit in units]
    tell = Alone() if case == "no pickle" else Dying()
    expected = list(so.found_in(tasks, tell))
    if case.startswith("no "):
        from concurrent.futures import process
        def refuse(*args):
            raise OSError("out of processes")
        if case == "no processes":
            monkeypatch.setattr(process, "ProcessPoolExecutor", refuse)
        elif case == "no executor":
            monkeypatch.setitem(sys.modules, "concurrent.futures.process", None)
    assert (list(so.found_in(tasks, tell, 2)) == expected
            and all(found["rows"] for _, _, found in expected))
    assert (["reading goes on in this one" in str(warning.message) for warning in recwarn]
            == [True] * (case == "workers die"))


@posix_only
def test_an_interrupt_ends_all_processes(tmp_path):
    chats = tiny(tmp_path / "p")
    chats.lines *= 100
    for number in range(400):
        chats.path = str(tmp_path / "p" / ("%08d-2222-4333-8444-555555555555.jsonl" % number))
        chats.save()
    process = subprocess.Popen(
        [sys.executable, so.__file__, "scan", "--no-store", "--jobs", "2", str(tmp_path / "p")],
        start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ, HOME=str(tmp_path)))
    try:
        end, workers = time.monotonic() + 60, 0
        while workers < 2 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
            listed = subprocess.run(["ps", "-ww", "-o", "args=", "-s", str(process.pid)],
                                    stdout=subprocess.PIPE).stdout
            workers = listed.count(b"spawn_main")
        assert workers >= 2, listed
        # a worker that has not been told its work yet complains of its pipe, as Python has it
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
        assert b"Traceback" not in output and process.returncode not in (0, None), output
        while time.monotonic() < end:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        raise AssertionError("a worker is left")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_response_belongs_to_the_unit_that_tells_most_then_to_the_earliest():
    early, late, same = (["2026-03-01", "~", "/a"], ["2026-03-02", "~", "/b"],
                         ["2026-03-02", "~", "/c"])
    told = [("cut", 5, early), ("cut", 90, late), ("whole", 7, late), ("whole", 7, early),
            ("alone", 0, same), ("twins", 3, same), ("twins", 3, late)]
    for seed in range(20):
        random.Random(seed).shuffle(told)
        assert so.owners_of(told) == {"cut": late, "whole": early, "alone": same, "twins": late}


def test_sessions_that_want_one_id_get_it_in_their_order():
    assert so.session_ids([("/a", ["x"]), ("/b", ["x", "x"]), ("/c", ["x-2", "y"])]) == {
        "/a": ["x"], "/b": ["x-2", "x-3"], "/c": ["x-2-2", "y"]}
    # not tried one after the other
    many = so.session_ids((str(number), ["x"]) for number in range(30_000))
    assert many["29999"] == ["x-30000"]


def test_a_description_reads_the_ends_of_a_file_alone(tmp_path):
    transcript = tiny(tmp_path)
    transcript.lines[1:1] = [b'{"type":"system","timestamp":"2030-01-01T00:00:00Z","x":"'
                             + b"y" * 1_000_000 + b'"}\n']
    path, read_bytes = transcript.save(), []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            read_bytes.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size=-1):
            raise AssertionError("reads of no size told")

        def readline(self):  # as some object stores' files have it
            raise AssertionError("reads of no size told")
    facts = so.describe_transcript(path, open=Counting)
    assert sum(read_bytes) <= 128 * 1024 and facts == so.describe_transcript(path)
    assert (facts["reader"], facts["size"], facts["order"]) == (
        "claude-code", os.path.getsize(path),
        ["2026-03-01T10:00:01.000Z", "2026-03-01T10:00:05.000Z", path])


def test_files_elsewhere_are_opened_by_what_is_given():
    """No reader goes to the disk for a transcript that it is given by other means."""
    names = [path for path in transcripts_in(SAMPLES)
             if not path.endswith(".db") and "storage" not in path]
    away = {"/nowhere" + path: read(path) for path in names}
    def opened(path, mode):
        return io.BytesIO(away[path])
    units = so.group_transcripts(so.describe_transcript(path, open=opened) for path in away)
    for unit in units:
        found = so.read_session_files(unit, open=opened)
        here = so.read_session_files(
            [so.describe_transcript(file["path"][len("/nowhere"):]) for file in unit])
        assert ([row["tokens"] for row in found["rows"]] == [row["tokens"] for row in here["rows"]]
                and len(found["skipped"]) == len(here["skipped"]))
        # of old rollouts by path
        assert found["responses"].keys() == here["responses"].keys() or unit[0]["reader"] == "codex"
    assert len(units) > 10


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), KeyError("x"),
                                   OSError(5, "Input/output error")],
                         ids=lambda error: type(error).__name__)
def test_a_unit_that_cannot_be_read_costs_no_other_its_figures(
        tmp_path, optimizer, monkeypatch, error):
    good, bad = (tiny(tmp_path / "p"),
                 tiny(tmp_path / "p", name="99999999-2222-4333-8444-555555555555"))
    good.save(), bad.save()
    original = so.ClaudeCodeReader.read
    def read_or_fail(self, paths, claim, skip):
        sessions = original(self, paths, claim, skip)
        if paths == [bad.path]:
            raise error
        return sessions
    monkeypatch.setattr(so.ClaudeCodeReader, "read", read_or_fail)
    result = optimizer.scan([str(tmp_path / "p")])
    assert [row["path"] for row in result["sessions"]] == [good.path]
    entry, = result["skipped"]
    assert (entry["path"] == bad.path and entry["reason"].startswith("cannot be read: ")
            and len(entry["reason"]) > 20)
    assert so.read_session_files([so.describe_transcript(bad.path)]) == {
        "rows": [], "usage": [], "responses": {}, "skipped": [[bad.path, 0, entry["reason"]]]}


def test_a_unit_that_failed_counts_nothing(tmp_path, optimizer, monkeypatch):
    """What it told is counted where a copy of it is read, earlier or later."""
    for folder in ("a", "b"):
        tiny(tmp_path / folder).save()
    original = so.ClaudeCodeReader.read
    def read_or_fail(self, paths, claim, skip):
        sessions = original(self, paths, claim, skip)
        if os.sep + "a" + os.sep in paths[0]:
            raise MemoryError
        return sessions
    monkeypatch.setattr(so.ClaudeCodeReader, "read", read_or_fail)
    result = optimizer.scan([str(tmp_path)])
    assert result["totals"]["tokens"]["output"] == 80 and len(result["skipped"]) == 1


def test_a_line_too_long_is_named_and_the_others_count(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr(so, "MAX_LINE", 4096)
    transcript = tiny(tmp_path)
    transcript.lines[2:2] = [b'{"type":"user","x":"' + b"y" * 5_000_000 + b'"}\n',
                             b"z" * 4095 + b"\n"]
    path = transcript.save()
    result = optimizer.scan([path])
    assert ([(entry["line"], entry["reason"][:11]) for entry in result["skipped"]]
            == [(3, "longer than"), (4, "not JSON: E")])
    assert result["sessions"][0]["model_calls"] == 2


@posix_only
def test_pipes_and_devices_are_not_opened(tmp_path, optimizer):
    path = tiny(tmp_path / "p").save()
    below = path[:-len(".jsonl")] + os.sep + "subagents"
    os.makedirs(below)
    os.mkfifo(os.path.join(below, "agent-1.jsonl")), os.mkfifo(str(tmp_path / "p" / "x.jsonl"))
    result = optimizer.scan([str(tmp_path / "p")])
    assert len(result["sessions"]) == 1 and result["skipped"] == []
    result = optimizer.scan([path])  # a file that was named brings those of its sub-agents
    assert len(result["sessions"]) == 1 and result["skipped"] == []
    for odd in (str(tmp_path / "p" / "x.jsonl"), "/dev/zero"):
        assert so.describe_transcript(odd)["reason"] == "cannot be read: not a regular file"
        with pytest.raises(OSError, match="not a regular file"):
            so.open_transcript(odd)
        with pytest.raises(StorageError, match="not a regular file"):
            optimizer.scan([odd])


@posix_only
def test_a_pipe_that_takes_a_files_place_just_now_blocks_nobody(tmp_path, monkeypatch):
    path, seen = tiny(tmp_path).save(), os.stat(tiny(tmp_path / "other").save())
    os.unlink(path)
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: seen)
    with pytest.raises(OSError, match="not a regular file"):
        so.open_transcript(path)


def test_files_joined_by_cat_lose_no_line_to_a_mark_in_between(tmp_path, optimizer):
    mark, path = b"\xef\xbb\xbf", str(tmp_path / "joined.jsonl")
    write(path, mark + b"".join(read(tiny(tmp_path / name, name=name * 8).save())
                                for name in "ab").replace(b"\n{", b"\n" + mark + b"{"))
    assert len(read(path).split(mark)) > 8
    result = optimizer.scan([path])
    assert result["skipped"] == [] and result["totals"]["model_calls"] == 4


def test_only_who_loses_or_regains_a_response_is_read_again(tmp_path, optimizer):
    """A copy that is cut off in a response leaves it to the whole one; when that is gone from the
    file, it takes it back."""
    name = "99999999-2222-4333-8444-555555555555"
    whole, copy_ = tiny(tmp_path / "p"), tiny(tmp_path / "p", name=name)
    copy_.lines = [line.replace(name.encode(), whole.session.encode(),
                                line.count(name.encode()) - 1) for line in copy_.lines]
    copy_.lines = [line.replace(b'"output_tokens": 30', b'"output_tokens": 3')
                   for line in whole.lines]
    other = tiny(tmp_path / "p", name="77777777-2222-4333-8444-555555555555")
    whole.save(), copy_.save(), other.save()
    rows = {row["path"]: row["tokens"]["output"]
            for row in optimizer.scan([str(tmp_path / "p")])["sessions"]}
    assert rows == {whole.path: 80, copy_.path: 0, other.path: 80}
    reads, original = [], so.ClaudeCodeReader.read
    def noted(self, paths, claim, skip):
        reads.append(paths[0])
        return original(self, paths, claim, skip)
    whole.lines.pop()
    whole.save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(so.ClaudeCodeReader, "read", noted)
        rows = {row["path"]: row["tokens"]["output"]
                for row in optimizer.scan([str(tmp_path / "p")])["sessions"]}
    assert rows == {whole.path: 50, copy_.path: 3, other.path: 80}
    assert other.path not in reads and set(reads) == {whole.path, copy_.path}
    fresh = SessionOptimizer(str(tmp_path / "other")).scan([str(tmp_path / "p")])
    assert {row["path"]: row["tokens"]["output"] for row in fresh["sessions"]} == rows


def test_a_deleted_session_stays_deleted_until_told_otherwise(tmp_path, optimizer):
    path = tiny(tmp_path / "p").save()
    row, = optimizer.scan([path])["sessions"]
    assert optimizer.delete_session(row["id"]) and optimizer.list_sessions() == []
    transcript = tiny(tmp_path / "p")
    assert optimizer.scan([path])["sessions"] == [] and optimizer.list_sessions() == []
    transcript.answer("m3", (5, 0, 1_160, 7), text(20))
    transcript.save()
    assert SessionOptimizer(optimizer.store.root).scan([path])["sessions"] == []
    assert [row["id"] for row in optimizer.scan([path], again=True)["sessions"]] == [row["id"]]
    assert (len(optimizer.scan([path])["sessions"]) == 1
            and optimizer.get_session(row["id"]) is not None)


def test_an_unfinished_last_line_is_no_damage(tmp_path, optimizer):
    transcript = tiny(tmp_path)
    transcript.answer("m3", (5, 0, 1_160, 7), text(20))
    path = transcript.save()
    whole = read(path)
    for cut in (1, 2, 100, len(transcript.lines[-1]) - 1):
        write(path, whole[:-cut])
        result = optimizer.scan([path])
        assert (result["skipped"] == []
                and result["sessions"][0]["model_calls"] == (3 if cut == 1 else 2)), cut
    write(path, whole)
    assert optimizer.scan([path])["sessions"][0]["model_calls"] == 3


def test_damaged_lines_are_named(tmp_path, optimizer):
    transcript = tiny(tmp_path)
    transcript.lines[1:1] = [b"{broken\n", b"[1, 2]\n", b"\xff\xfe\n", b'"text"\n']
    path = transcript.save()
    result = optimizer.scan([path])
    assert ([(entry["path"], entry["line"]) for entry in result["skipped"]]
            == [(path, 2), (path, 3), (path, 4), (path, 5)])
    assert result["sessions"][0]["model_calls"] == 2 and any(
        "4 of the transcript's lines: damaged" in note for note in result["sessions"][0]["notes"])
    status, out, err = command("--store", str(tmp_path / "s"), "scan", path)
    assert status == 0 and "4 damaged lines in 1 file" in out


def test_files_that_are_no_transcripts_are_named(tmp_path, optimizer):
    write(tmp_path / "empty.jsonl", b"")
    write(tmp_path / "other.jsonl", b'{"a": 1}\n')
    write(tmp_path / "binary.jsonl", bytes(range(256)) * 10)
    write(tmp_path / "notes.txt", b"not looked at")
    result = optimizer.scan([str(tmp_path)])
    assert (result["sessions"] == []
            and {os.path.basename(entry["path"]) for entry in result["skipped"]} == {
                "empty.jsonl", "other.jsonl", "binary.jsonl"})
    with pytest.raises(StorageError, match="nowhere.*no such file"):
        optimizer.scan([str(tmp_path / "nowhere")])


def copied_cases(tmp_path):
    """A resumed session and a fork: files that repeat others' responses."""
    pairs = []
    for name in ("resumed-session", "forked-session"):
        target = str(tmp_path / name)
        shutil.copytree(os.path.join(SAMPLES, "claude-code", name), target)
        paths = transcripts_in(target)
        assert len(paths) == 2
        pairs.append(paths)
    return pairs


def recount(paths):
    """An independent count of Claude Code's usage: every message id once, its largest output."""
    usage = {}
    for path in paths:
        for line in read(path).splitlines():
            entry = json.loads(line.decode("utf-8"))
            message = entry.get("message") if entry.get("type") == "assistant" else None
            if message and message.get("model") != "<synthetic>":
                seen = message["usage"]
                figures = [seen.get("input_tokens", 0), seen.get("cache_creation_input_tokens", 0),
                           seen.get("cache_read_input_tokens", 0), seen.get("output_tokens", 0)]
                usage[message["id"]] = [max(pair)
                                        for pair in zip(figures, usage.get(message["id"], figures))]
    return dict(zip(("uncached_input", "cache_write", "cache_read", "output"),
                    map(sum, zip(*usage.values())))), len(usage)


def test_a_repeated_response_is_counted_once_in_any_order_of_discovery(tmp_path):
    for number, paths in enumerate(copied_cases(tmp_path)):
        tokens, calls = recount(paths)
        outcomes = []
        for order in ([paths], [paths[::-1]], [paths[:1], paths], [paths[1:], paths],
                      [paths[:1], paths[1:], paths], [paths[1:], paths[:1], paths]):
            optimizer = SessionOptimizer(str(tmp_path / ("store%d-%d" % (number, len(outcomes)))))
            for some in order:
                result = optimizer.scan(some)
                consistent(result, optimizer)
            assert (result["totals"]["tokens"], result["totals"]["model_calls"]) == (tokens, calls)
            outcomes.append({row["path"]: row["tokens"] for row in result["sessions"]})
        assert all(outcome == outcomes[0] for outcome in outcomes)
        alone = SessionOptimizer(str(tmp_path / ("alone%d" % number))).scan(paths[:1])
        assert alone["totals"]["tokens"] == recount(paths[:1])[0]


MARK = "MaRkEr-4711"


_SECRET_KEYS = ("text", "content", "output", "message", "aggregated_output", "formatted_output",
                "stdout", "stderr", "thinking", "thought", "description", "prompt", "old_string",
                "new_string", "originalFile", "lastPrompt", "resultDisplay", "newContent",
                "subject", "title", "summary", "fileDiff", "oldString", "newString")


def marked(value, key=""):
    """The value with the mark at the end of every text that is a prompt, an answer, a file's
    content or a tool's output."""
    if isinstance(value, dict):  # the prompt of a web search is its query, which is kept
        return {name: entry if name == "prompt" and "description" not in value
                else marked(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [marked(entry, key) for entry in value]
    return value + "\n" + MARK if isinstance(value, str) and key in _SECRET_KEYS else value


def test_the_store_keeps_no_prompt_no_content_and_no_output(tmp_path, optimizer):
    planted = 0
    for path in transcripts_in(SAMPLES):
        target = tmp_path / "p" / os.path.relpath(path, SAMPLES)
        os.makedirs(str(target.parent), exist_ok=True)
        raw = read(path).decode("utf-8")
        if path.endswith(".json"):
            changed = json.dumps(marked(json.loads(raw)))
        else:
            changed = "".join(json.dumps(marked(json.loads(line))) + "\n"
                              for line in raw.splitlines())
        planted += changed.count(MARK)
        write(target, changed)
    result = optimizer.scan([str(tmp_path / "p")])
    assert planted > 1_000 and len(result["sessions"]) > 100
    for row in result["sessions"]:
        for form in so.FORMATS:
            assert MARK not in optimizer.export_report(row["id"], form)
    kept = stored_bytes(optimizer.store.root)
    assert kept.count(b"AI_RESPONSE") > 300 and MARK.encode() not in kept
    assert MARK not in json.dumps(result)


def test_error_messages_and_secrets_in_commands_are_not_kept(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("First line, kept.\nSecond line: " + MARK + "\n" + MARK)
    transcript.prompt("A later prompt: " + MARK)
    commands = ["curl -H 'Authorization: Bearer %s' https://x.y" % MARK,
                "export API_KEY=sk-ant-%s0123456789abcdef; run" % MARK.replace("-", "")]
    for number, line in enumerate(commands * 2):
        transcript.answer("m%d" % number, (9, 400, 1_000 + 409 * number, 40),
                          {"type": "thinking", "thinking": MARK * 9}, text(9),
                          use("t%d" % number, "Bash", command=line))
        transcript.result("t%d" % number, "Exit code 1\n" + "%s: no such thing\n" % MARK * 20,
                          error=True, toolUseResult="Error: " + MARK)
    transcript.answer("m8", (9, 400, 2_636, 9),
                      use("t8", "Write", file_path="/w/a.txt", content=MARK),
                      use("t9", "Grep", pattern="x", path="/w"))
    transcript.result("t8", MARK, toolUseResult={"content": MARK, "originalFile": MARK})
    transcript.result("t9", MARK)
    transcript.line("attachment", attachment={"type": "file", "content": MARK})
    transcript.line("system", subtype="local_command", content=MARK)
    transcript.lines.append(b'{"type":"user","broken ' + MARK.encode() + b"\n")
    result = optimizer.scan([transcript.save()])
    issues = {issue["issue_type"] for issue in result["sessions"][0]["issues"]}
    assert result["sessions"][0]["task"] == "First line, kept." and "FAILED_RETRY" in issues
    for form in so.FORMATS:
        assert MARK not in optimizer.export_report(result["sessions"][0]["id"], form)
    kept = stored_bytes(optimizer.store.root)
    assert (b"curl" in kept and MARK.encode() not in kept
            and MARK.replace("-", "").encode() not in kept)
    assert MARK not in json.dumps(result)


def test_a_long_first_prompt_is_cut(tmp_path, optimizer):
    transcript = Transcript(tmp_path)
    transcript.prompt("word " * 200 + MARK)
    transcript.answer("m1", (9, 9, 9, 9), text(9))
    row, = optimizer.scan([transcript.save()])["sessions"]
    assert row["task"].startswith("word word") and len(row["task"]) <= 160
    assert MARK.encode() not in stored_bytes(optimizer.store.root)


def test_scanning_without_a_store_keeps_nothing(tmp_path, home):
    path = tiny(tmp_path).save()
    optimizer = SessionOptimizer()
    assert len(optimizer.scan([path], store=False)["sessions"]) == 1
    assert len(optimizer.scan([path], store=False)["sessions"]) == 1
    status, out, _ = command("scan", path, "--no-store", "--format", "json")
    assert status == 0 and len(json.loads(out)["sessions"]) == 1 and os.listdir(str(home)) == []


def test_filters_narrow_what_a_scan_reports(optimizer):
    def scanned(**filters):
        return len(optimizer.scan([SAMPLES], **filters)["sessions"])
    everything = scanned()
    by_agent = [scanned(agent=name) for name in ("claude-code", "codex", "gemini-cli", "opencode")]
    assert min(by_agent) > 0 and sum(by_agent) == everything and scanned(agent="nobody") == 0
    assert scanned(agent="CLAUDE-CODE") == by_agent[0] == scanned(agent="Claude Code")
    assert (0 < scanned(project="/home/dev/shop") < everything
            and scanned(project="no such place") == 0)
    assert (scanned(since=datetime(2020, 1, 1)) == everything
            and scanned(since=datetime(2090, 1, 1)) == 0)
    rows = optimizer.scan([SAMPLES])["sessions"]
    middle = sorted(so.seconds_of(row["ended_at"]) for row in rows)[len(rows) // 2]
    assert (scanned(since=datetime.fromtimestamp(middle, timezone.utc))
            == sum(so.seconds_of(row["ended_at"]) >= middle for row in rows))


def test_default_places_follow_the_agents_settings(tmp_path, home, monkeypatch):
    assert SessionOptimizer().scan(store=False)["sessions"] == []
    tiny(home / ".claude" / "projects" / "-w").save()
    assert len(SessionOptimizer().scan(store=False)["sessions"]) == 1
    tiny(tmp_path / "c" / "projects" / "-w", name="22222222-2222-4333-8444-555555555555").save()
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "c"))
    assert [row["id"][0] for row in SessionOptimizer().scan(store=False)["sessions"]] == ["2"]
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / "x,y"))  # Claude Code's would be two
    shutil.copytree(os.path.join(SAMPLES, "codex", "codex-compacted"),
                    str(tmp_path / "x,y" / "sessions" / "2026"))
    assert ({row["agent"] for row in SessionOptimizer().scan(store=False)["sessions"]}
            == {"CLAUDE-CODE", "CODEX"})


@pytest.mark.parametrize("separator, homes", [(":", ["/a", "/b"]), (None, ["/a:/b"])])
def test_a_reader_says_how_several_homes_are_told_apart(separator, homes, monkeypatch):
    mine = type("Mine", (so.TranscriptReader,), dict(
        {"separator": separator} if separator else {}, home=("MINE", "~/.mine", "logs old")))
    monkeypatch.setenv("MINE", "/a:/b")
    assert mine().roots() == [os.path.join(place, name) for place in homes
                              for name in ("logs", "old")]


def test_ids_that_are_taken_get_a_suffix(tmp_path, optimizer):
    name = "11111111-2222-4333-8444-555555555555"
    tiny(tmp_path / "a", name=name).save()
    other = tiny(tmp_path / "b", name=name)
    other.lines = [line.replace(b'"id": "m', b'"id": "n') for line in other.lines]
    other.save()
    rows = optimizer.scan([str(tmp_path / "a"), str(tmp_path / "b")])["sessions"]
    assert (sorted(row["id"] for row in rows) == [name, name + "-2"]
            and [row["model_calls"] for row in rows] == [2, 2])
    mine = SessionOptimizer(str(tmp_path / "mine"))
    mine.start_session("me", "by hand", session_id=name)
    assert [row["id"] for row in mine.scan([str(tmp_path / "a")])["sessions"]] == [name + "-2"]
    assert mine.get_session(name).task == "by hand"


def mutations(raw, generator):
    """A transcript with a few things wrong."""
    for _ in range(generator.randrange(1, 5)):
        place, size = generator.randrange(len(raw) + 1), generator.randrange(1, 200)
        how = generator.randrange(9)
        lines = raw.split(b"\n")
        one = generator.randrange(len(lines))
        if how == 0:
            raw = raw[:place] + raw[place + size:]
        elif how == 1:
            raw = (raw[:place] + bytes(generator.randrange(256) for _ in range(size % 20))
                   + raw[place:])
        elif how == 2:
            raw = raw[:place]
        elif how == 3:
            lines[one:one + 1] = [lines[one]] * 3
            raw = b"\n".join(lines)
        elif how == 4:
            generator.shuffle(lines)
            raw = b"\n".join(lines)
        else:
            try:
                value = strange(json.loads(lines[one].decode("utf-8")), generator)
            except ValueError:
                continue
            lines[one] = json.dumps(value).encode()
            raw = b"\n".join(lines)
    return raw


STRANGE = (None, True, False, 0, -1, 1.5, 1e308, 10**30, "", "x", [], {}, [None], {"a": None}, [[]],
           "\ud800", "9999-99-99", float("nan"))


def strange(value, generator):
    """The value with one part replaced by something of another kind."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(sorted(value))
        return dict(value, **{key: strange(value[key], generator)})
    if isinstance(value, list) and value and generator.random() < 0.8:
        place = generator.randrange(len(value))
        return value[:place] + [strange(value[place], generator)] + value[place + 1:]
    return generator.choice(STRANGE)


@pytest.mark.parametrize("seed", range(6))
def test_no_transcript_is_too_strange(tmp_path, seed):
    """300 mutated samples in all, 50 a time: whatever they hold, they are read or named, and the
    figures add up."""
    generator = random.Random(seed)
    samples = sorted(transcripts_in(SAMPLES))
    for number in range(50):
        path = generator.choice(samples)
        name = os.path.basename(path)
        write(tmp_path / ("%02d-%s" % (number, name)), mutations(read(path), generator))
    optimizer = SessionOptimizer(str(tmp_path / "store"))
    paths = sorted(str(path) for path in tmp_path.iterdir() if path.is_file())
    result = optimizer.scan(paths)
    consistent(result, optimizer)
    used = {path for row in result["sessions"] for path in [row["path"]]
            + optimizer.get_session(row["id"]).metadata["source"].get("paths", [])}
    named = {entry["path"] for entry in result["skipped"]}
    assert [path for path in paths if path not in used | named and not path.endswith(".json")] == []
    for row in result["sessions"]:
        for form in so.FORMATS:
            assert optimizer.export_report(row["id"], form)
    assert so.scan_report(result)
    assert (json.loads(json.dumps(optimizer.scan(paths)["sessions"]))
            == json.loads(json.dumps(result["sessions"])))


def test_the_sums_of_a_scan_are_the_same_in_any_order(optimizer):
    rows = optimizer.scan([SAMPLES], store=False)["sessions"]
    totals = so.scan_totals(rows)
    assert (so.scan_totals(rows[::-1])
            == so.scan_totals(sorted(rows, key=lambda row: row["estimated_cost"])) == totals)
    assert (totals["estimated_cost"]
            == round(sum(round(row["estimated_cost"] * so.PICO) for row in rows) / so.PICO, 12))


def test_a_scan_as_a_whole_report(tmp_path, optimizer):
    """Three stories, one per agent."""
    stories = ("claude-code/story-checkout", "codex/codex-story-logging",
               "gemini/gemini-story-handbook")
    result = optimizer.scan([os.path.join(SAMPLES, story) for story in stories])
    expected = read(os.path.join(HERE, "examples", "expected", "scan.text")).decode("utf-8")
    assert so.scan_report(result).strip("\n") == expected.strip("\n")


def test_a_moved_transcript_keeps_what_it_has_counted(tmp_path, optimizer):
    path = tiny(tmp_path / "old").save()
    before = optimizer.scan([str(tmp_path)])
    (tmp_path / "new").mkdir()
    os.rename(path, str(tmp_path / "new" / os.path.basename(path)))
    after = optimizer.scan([str(tmp_path)])
    assert (after["totals"] == before["totals"] and [row["id"] for row in after["sessions"]]
            == [row["id"] for row in before["sessions"]])
    assert len(optimizer.list_sessions()) == 1


def test_both_of_two_that_began_together_are_known_when_they_move(tmp_path, optimizer):
    path = tiny(tmp_path / "a").save()
    other = read(path).replace(b'"m1', b'"n1').replace(b'"m2', b'"n2')
    for place, data in (("a", read(path)), ("b", other)):
        os.makedirs(str(tmp_path / place), exist_ok=True)
        write(tmp_path / place / os.path.basename(path), data)
    before = optimizer.scan([str(tmp_path)])
    for place in "ab":
        os.rename(str(tmp_path / place), str(tmp_path / ("new " + place)))
    after = optimizer.scan([str(tmp_path)])
    assert (after["totals"] == before["totals"]
            and len(after["sessions"]) == len(optimizer.list_sessions()) == 2)
    assert optimizer.agent_statistics("", 9000)["total_tokens"] == before["totals"]["total_tokens"]


def test_a_transcript_without_times_is_not_taken_for_another_of_its_name_and_size(
        tmp_path, optimizer):
    path = tiny(tmp_path / "a").save()
    first = re.sub(rb'"timestamp":\s*"[^"]*"', b'"timestamp":""', read(path))
    other = first.replace(b'"m1', b'"n1').replace(b'"m2', b'"n2').replace(
        b'"cache_read_input_tokens": 1000', b'"cache_read_input_tokens": 1001')
    write(path, first)
    kept, = optimizer.scan([str(tmp_path)])["sessions"]
    os.unlink(path)
    write(tmp_path / os.path.basename(path), other)
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    assert len(first) == len(other) and first != other
    assert ({kept["id"], row["id"]} == {session.id for session in optimizer.list_sessions()}
            and kept["id"] != row["id"])


@pytest.mark.parametrize("shared", [False, True])
def test_a_session_that_is_told_another_name_does_not_stay_under_the_old_one(
        tmp_path, optimizer, shared):
    """The span of the agent, which names the conversation, comes last."""
    def line(name, parent="", **attributes):
        values = [{"key": "gen_ai." + key.replace("__", "."), "value": {"stringValue": value}}
                  for key, value in attributes.items()]
        values += ([{"key": "gen_ai.usage.input_tokens", "value": {"intValue": "100"}}]
                   if parent else [])
        return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{
            "traceId": "trace1", "spanId": name, "parentSpanId": parent, "name": name,
            "startTimeUnixNano": str(10**18),
            "endTimeUnixNano": str(10**18 + 5), "attributes": values}]}]}]}) + "\n"
    path = tmp_path / "spans.jsonl"
    write(path, line("call", "agent", operation__name="chat", request__model="gpt-5"))
    first, = optimizer.scan([str(path)])["sessions"]
    optimizer.analyze(first["id"])
    if shared:  # the old name is another file's session by then
        optimizer.delete_session(first["id"])
        optimizer.start_session("FORGE", "t", session_id=first["id"])
    write(path, read(path).decode()
          + line("agent", operation__name="invoke_agent", conversation__id="talk"))
    second, = (optimizer.scan([str(path)])["sessions"]
               or optimizer.scan([str(path)], again=True)["sessions"])
    assert first["id"] == "trace1" and second["id"] == "talk"
    assert (sorted(session.id for session in optimizer.list_sessions())
            == ["talk"] + ["trace1"] * shared)
    assert os.listdir(str(optimizer.reports_dir)) == []


def test_a_session_that_its_database_no_longer_has_stays_in_the_store(tmp_path, optimizer):
    """Another name for the same responses is something else: see above."""
    exports = [opencode_exports(case)[0] for case in sorted(os.listdir(OPENCODE_SAMPLES))[:2]]
    for number, export in enumerate(exports):
        export["info"].update(id=f"ses_{number}", parentID=None)
    base = opencode_database(tmp_path / "opencode.db", exports)
    assert len(optimizer.scan([str(tmp_path)])["sessions"]) == 2
    for table, column in (("session", "id"), ("message", "session_id"), ("part", "session_id")):
        base.execute(f"DELETE FROM {table} WHERE {column} = 'ses_0'")
    base.commit()
    assert [row["id"] for row in optimizer.scan([str(tmp_path)])["sessions"]] == ["ses_1"]
    assert {session.id for session in optimizer.list_sessions()} == {"ses_0", "ses_1"}


@pytest.mark.parametrize("told, tokens", [
    ({"intValue": "500"}, 500), ({"intValue": 500}, 500), ({"doubleValue": 500.0}, 500),
    ({"doubleValue": 500.5}, 0), ({"doubleValue": float("nan")}, 0)])
def test_a_span_that_tells_its_tokens_as_a_double_counts(tmp_path, optimizer, told, tokens):
    values = [("operation.name", {"stringValue": "chat"}), ("request.model", {
        "stringValue": "gpt-5"}), ("usage.input_tokens", told),
        ("usage.output_tokens", {"intValue": "7"})]
    span = {"traceId": "t1", "spanId": "s1", "parentSpanId": "", "name": "chat",
            "startTimeUnixNano": str(10**18), "endTimeUnixNano": str(10**18 + 5),
            "attributes": [{"key": "gen_ai." + key, "value": value} for key, value in values]}
    write(tmp_path / "spans.jsonl",
          json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}) + "\n")
    row, = optimizer.scan([str(tmp_path / "spans.jsonl")])["sessions"]
    assert row["tokens"]["uncached_input"] == tokens and row["tokens"]["output"] == 7


@pytest.mark.parametrize("answers, message, kinds", [
    ("no rule|no rule", "the tool failed", [""]), ("no rule|no file", "the tool failed", []),
    ("no rule|no rule", "429 Too Many Requests", []), ("|", "no rule", [""])])
def test_a_failed_span_is_known_by_its_result(tmp_path, answers, message, kinds):
    spans = []
    for number, answer in enumerate(answers.split("|")):
        values = [("operation.name", "execute_tool"), ("tool.name", "bash"),
                  ("tool.call.arguments", '{"command": "make"}'), ("tool.call.result", answer)]
        spans.append({
            "traceId": "t1", "spanId": "s%d" % number, "parentSpanId": "c%d" % number,
            "name": "execute_tool bash", "startTimeUnixNano": str(10**18 + number),
            "endTimeUnixNano": str(10**18 + number), "status": {"code": 2, "message": message},
            "attributes": [{"key": "gen_ai." + key, "value": {"stringValue": value}}
                           for key, value in values]})
    write(tmp_path / "spans.jsonl",
          json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}) + "\n")
    session, = so.sessions_at([str(tmp_path)], so.PriceList())
    found = so.FailedRetryAnalyzer().analyze(session)
    assert ["" for _ in found] == kinds


def test_another_transcript_of_a_moved_ones_name_takes_nothing_away(tmp_path, optimizer):
    path = tiny(tmp_path / "day1").save()
    kept, = optimizer.scan([str(tmp_path)])["sessions"]
    other = read(path).replace(b"2026-03-01", b"2026-03-02").replace(b'"m1', b'"n1').replace(
        b'"m2', b'"n2')
    os.unlink(path)
    (tmp_path / "day2").mkdir()
    write(tmp_path / "day2" / os.path.basename(path), other)
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    stored = {session.id: session.total_tokens for session in optimizer.list_sessions()}
    assert (len(stored) == 2
            and stored == {kept["id"]: kept["total_tokens"], row["id"]: row["total_tokens"]})


def test_a_copied_transcript_is_stored_once_and_counts_once(tmp_path, optimizer):
    path = tiny(tmp_path / "a").save()
    (tmp_path / "b").mkdir()
    shutil.copy(path, str(tmp_path / "b"))
    result = optimizer.scan([str(tmp_path)])
    stored = [session.total_tokens for session in optimizer.list_sessions()]
    assert (sum(stored) == result["totals"]["total_tokens"]
            and len(stored) == len(result["sessions"]) == 2)
    assert optimizer.agent_statistics("", 9000)["total_tokens"] == result["totals"]["total_tokens"]


def test_a_session_keeps_its_number_when_the_first_of_its_name_is_deleted(tmp_path, optimizer):
    first = tiny(tmp_path / "a").save()
    second = str(tmp_path / "b" / os.path.basename(first))
    os.mkdir(os.path.dirname(second))
    write(second, read(first).replace(b'"m1', b'"n1').replace(b'"m2', b'"n2'))
    names = sorted(row["id"] for row in optimizer.scan([str(tmp_path)])["sessions"])
    assert optimizer.delete_session(names[0])
    write(second, read(second)
          + read(second).splitlines(True)[-1].replace(b'"n2', b'"n3').replace(b'"u', b'"v', 1))
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    assert row["id"] == names[1] and row["model_calls"] == 3


def test_of_two_exports_of_a_session_the_last_one_counts(tmp_path, optimizer):
    export = opencode_exports("opencode-read-twice")[0]
    whole = optimizer.scan([str(write(tmp_path / "b.json", json.dumps(export).encode()))])["totals"]
    early = dict(export, info=dict(export["info"], time=dict(export["info"]["time"], updated=1)),
                 messages=export["messages"][:2])
    write(tmp_path / "a.json", json.dumps(early).encode())
    assert (SessionOptimizer(str(tmp_path / "s")).scan([str(tmp_path)])["totals"]["tokens"]
            == whole["tokens"])


def test_an_odd_response_item_costs_no_rollout(tmp_path, optimizer):
    def line(kind, **payload):
        return json.dumps(
            {"timestamp": "2026-03-01T10:00:00.000Z", "type": kind, "payload": payload})
    usage = {"input_tokens": 70, "cached_input_tokens": 0, "output_tokens": 7, "total_tokens": 77}
    write(tmp_path / "rollout-2026-03-01T10-00-00-00000000-0000-4000-8000-000000000001.jsonl",
          "\n".join([line("session_meta", id="00000000-0000-4000-8000-000000000001", cwd="/w"),
                     line("response_item", type="function_call", name="shell", call_id="q",
                          arguments='{"command": ["ls"]}'),
                     line("event_msg", type="token_count",
                          info={"total_token_usage": usage, "last_token_usage": usage}),
                     line("response_item", type="mcp_tool_call_end", call_id="q"), ""]).encode())
    row, = optimizer.scan([str(tmp_path)])["sessions"]
    assert row["total_tokens"] == 77


@pytest.mark.parametrize("cut", range(5, 41, 5))
@pytest.mark.parametrize("name, key, size",
                         [("Bash", "command", so.GUESSABLE), ("Grep", "pattern", 600)])
def test_a_secret_that_is_cut_off_is_not_kept(tmp_path, optimizer, name, key, size, cut):
    secret = drawn(36)
    begin = "curl -H 'X: eyJhbGciOiJIUzI1NiJ9.eyJ%s.%s' " % (drawn(380), drawn(30))
    command = begin + "w" * (size - len(begin) - cut - 1) + " ghp_" + secret + " end"
    row, = (
        optimizer.scan([told_twice(tmp_path, "ok", "ok", name=name, **{key: command})])["sessions"])
    assert secret[:8].encode() not in stored_bytes(optimizer.store.root)


def test_what_a_fork_left_to_a_replaced_transcript_is_its_own_again(tmp_path, optimizer):
    first = tiny(tmp_path).save()
    fork = os.path.join(str(tmp_path), "99999999-2222-4333-8444-555555555555.jsonl")
    write(fork, read(first).replace(b'"sessionId": "11111111', b'"sessionId": "99999999'))
    once = optimizer.scan([str(tmp_path)])["totals"]
    write(first, b'{"type":"user","sessionId":"x","parentUuid":null,"isSidechain":false,"uuid":"z",'
          b'"timestamp":"2026-03-02T10:00:00.000Z","message":{"role":"user","content":"hello"}}\n')
    again = optimizer.scan([str(tmp_path)])["totals"]
    assert again["tokens"] == once["tokens"] and again["model_calls"] == once["model_calls"]


@pytest.mark.parametrize("messages, prompts", [
    ([{"role": "user", "parts": [{"type": "text", "content": "x" * 1_000}]}], [400]),
    ([{"role": "user", "parts": [{"type": "text", "text": "x" * 1_000}]}], [400]),
    ([{"role": "user", "content": "x" * 1_000}], [400]),
    ([{"role": "assistant", "parts": [{"type": "text", "content": "x" * 1_000}]}], []),
    ("no list", []), (None, [])])
def test_the_messages_of_a_span_give_its_prompts_their_size(tmp_path, messages, prompts):
    attributes = {"gen_ai.operation.name": {"stringValue": "chat"},
                  "gen_ai.usage.input_tokens": {"intValue": "9000"},
                  "gen_ai.usage.output_tokens": {"intValue": 10},
                  "gen_ai.input.messages": {"stringValue": json.dumps(messages)}}
    span = {"traceId": "t", "spanId": "a", "startTimeUnixNano": str(10**18), "attributes": [
        {"key": key, "value": value} for key, value in attributes.items()]}
    write(tmp_path / "spans.jsonl",
          json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}) + "\n")
    session, = so.sessions_at([str(tmp_path)], so.PriceList())
    assert [event.tokens_input for event in session.events
            if event.event_type is EventType.USER_MESSAGE] == prompts
    assert session.total_tokens == 9_010


@pytest.mark.parametrize("identity", [[], {}, [["msg_1"]], 5, True, None, "msg_9"], ids=repr)
def test_an_odd_id_in_a_progress_line_costs_no_session(tmp_path, identity):
    transcript = tiny(tmp_path)
    before = so.read_session_files([so.describe_transcript(transcript.save())])
    inner = {"type": "assistant", "message": {"id": identity, "role": "assistant",
                                              "model": "claude-sonnet-4-5", "content": [],
                                              "usage": {"input_tokens": 5, "output_tokens": 7}}}
    transcript.lines.append(
        json.dumps({"type": "progress", "sessionId": transcript.session, "uuid": "p",
                    "timestamp": "2026-03-01T10:00:09.000Z",
                    "data": {"agentId": "a1", "message": inner}}).encode() + b"\n")
    after = so.read_session_files([so.describe_transcript(transcript.save())])
    assert before["skipped"] == after["skipped"] == []
    told = after["rows"][0]["tokens"]["output"] - before["rows"][0]["tokens"]["output"]
    assert told == (7 if identity == "msg_9" else 0)  # nothing says which response it is of


def test_deleting_one_of_a_files_sessions_leaves_the_others(tmp_path, optimizer):
    spans = [{"traceId": "t%d" % n, "spanId": "s%d" % n, "name": "chat m",
              "startTimeUnixNano": str(10**18 + n),
              "endTimeUnixNano": str(10**18 + n + 5), "attributes": [
                  {"key": key, "value": value} for key, value in (
                      ("gen_ai.operation.name", {"stringValue": "chat"}),
                      ("gen_ai.conversation.id", {"stringValue": "c%d" % n}),
                      ("gen_ai.request.model", {"stringValue": "gpt-5"}),
                      ("gen_ai.usage.input_tokens", {"intValue": "100"}),
                      ("gen_ai.usage.output_tokens", {"intValue": "10"}))]} for n in (1, 2)]
    path = str(tmp_path / "spans.jsonl")
    write(path,
          json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode() + b"\n")
    rows = optimizer.scan([path])["sessions"]
    assert len(rows) == 2 and optimizer.delete_session(rows[0]["id"])
    assert [row["id"] for row in optimizer.scan([path])["sessions"]] == [rows[1]["id"]]
    assert len(optimizer.scan([path], again=True)["sessions"]) == 2


@pytest.mark.parametrize("case",
                         ["repository", "below", "work tree", "no repository", "gone", "odd"])
def test_a_session_knows_the_repository_it_ran_in(tmp_path, optimizer, case):
    main, linked = tmp_path / "main", tmp_path / "linked"
    git = main / ".git"
    ((git / "worktrees" / "linked").mkdir(parents=True), (main / "src").mkdir(), linked.mkdir(),
     (tmp_path / "none").mkdir())
    write(linked / ".git", "gitdir: %s\n" % (git / "worktrees" / "linked"))
    write(git / "worktrees" / "linked" / "commondir", "../..\n")
    cwd = {"repository": main, "below": main / "src", "work tree": linked,
           "no repository": tmp_path / "none", "gone": main / "gone", "odd": linked}[case]
    if case == "odd":
        write(linked / ".git", b"\xff\xfe")
    transcript = tiny(tmp_path / "t")
    transcript.lines = [line.replace(b'"cwd": "/w"', b'"cwd": ' + json.dumps(str(cwd)).encode())
                        for line in transcript.lines]
    row, = optimizer.scan([transcript.save()])["sessions"]
    source = optimizer.get_session(row["id"]).metadata["source"]
    assert source["cwd"] == str(cwd)
    found = {name: source.get(name) for name in ("repository", "work_tree")}
    if case in ("repository", "below", "work tree"):
        assert found == {"repository": str(git),
                         "work_tree": str(linked if case == "work tree" else main)}
    else:
        assert found == {"repository": None, "work_tree": None}


def test_a_file_that_vanishes_while_it_is_listed_is_left_out(tmp_path, optimizer, monkeypatch):
    kept, gone = (tiny(tmp_path / "p").save(),
                  tiny(tmp_path / "p", name="99999999-2222-4333-8444-555555555555").save())
    look = os.lstat

    def vanishing(path, **more):
        if str(path) == gone and os.path.exists(gone):
            os.unlink(gone)
        return look(path, **more)
    monkeypatch.setattr(os, "lstat", vanishing)
    result = optimizer.scan([str(tmp_path / "p")])
    assert [row["path"] for row in result["sessions"]] == [kept] and result["skipped"] == []


def test_the_part_of_a_session_stands_for_the_whole(tmp_path, optimizer):
    main = tiny(tmp_path).save()
    agent = Transcript(
        tmp_path / os.path.splitext(os.path.basename(main))[0] / "subagents", "agent-abc")
    agent.session = os.path.splitext(os.path.basename(main))[0]
    agent.prompt("look", isSidechain=True, agentId="abc")
    agent.answer("msg_sub", (3, 500, 0, 20), {"type": "text", "text": "done"}, isSidechain=True,
                 agentId="abc")
    part = agent.save()
    whole = optimizer.scan([str(tmp_path)])["totals"]
    assert optimizer.scan([part])["totals"] == whole and optimizer.scan([main])["totals"] == whole
    assert len(optimizer.list_sessions()) == 1


def test_a_folder_that_cannot_be_read_is_named_and_hides_no_other(tmp_path, optimizer, monkeypatch):
    tiny(tmp_path / "open").save()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(path="."):  # the superuser may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.warns(SessionOptimizerWarning, match="locked.*check its permissions"):
        assert optimizer.scan([str(tmp_path)])["totals"]["sessions"] == 1


# ==================================================================================================
# SessionOptimizer
# ==================================================================================================

def test_a_session_begins(optimizer):
    session = optimizer.start_session("Forge", "Mend it", model="Opus",
                                      metadata={"ticket": [1, {"a": None}]})
    assert ((session.agent, session.task, session.model, session.status)
            == ("FORGE", "Mend it", "opus", SessionStatus.ACTIVE))
    assert (re.match(r"forge_\d{8}_\d{6}$", session.id)
            and session.metadata == {"ticket": [1, {"a": None}]})
    event, = session.events
    assert event.event_type is EventType.SESSION_START and event.timestamp == session.started_at
    assert so.parse_time(session.started_at).utcoffset() is not None
    assert (SessionOptimizer(optimizer.store.root).get_session(session.id).to_dict()
            == session.to_dict())
    assert optimizer.start_session("a", "t").model == "default"


@pytest.mark.parametrize("agent, begins", [("Claude Code", "claude-code_"), ("a/../b", "a-..-b_"),
                                           ("", "__"), ("..", "_."), ("é\n", "_--_"),
                                           ("CON", "_con_"), ("x" * 300, "x" * 100 + "_")])
def test_ids_are_made_of_the_agents_name(optimizer, agent, begins):
    session = optimizer.start_session(agent, "t")
    assert (session.id.startswith(begins)
            and re.match(r"[A-Za-z0-9_][A-Za-z0-9._-]*_\d{8}_\d{6}$", session.id))
    assert (optimizer.get_session(session.id) is session
            and os.listdir(optimizer.store.sessions) == [session.id + ".json"])


def test_two_starts_in_one_second_are_two_sessions(optimizer, monkeypatch):
    monkeypatch.setattr(so, "now_text", lambda: "2026-03-01T10:00:00+00:00")
    sessions = [optimizer.start_session("forge", "t%d" % number) for number in range(4)]
    assert (sessions[0].id == "forge_20260301_100000"
            and len({session.id for session in sessions}) == 4)
    assert all(session.id.startswith(sessions[0].id) for session in sessions)
    assert ([optimizer.get_session(session.id).task for session in sessions]
            == ["t0", "t1", "t2", "t3"])
    assert len({session.events[0].id for session in sessions}) == 4


def test_an_id_may_be_used_again_when_its_session_has_ended(optimizer):
    for number in range(3):
        if number:
            with pytest.warns(SessionOptimizerWarning, match=r"demo.*kept as demo\.%d" % number):
                session = optimizer.start_session("a", "run %d" % number, session_id="demo")
        else:
            session = optimizer.start_session("a", "run 0", session_id="demo")
        optimizer.log_event("demo", "CUSTOM", tokens_input=number)
        optimizer.end_session("demo")
    assert optimizer.get_session("demo") is session and session.task == "run 2"
    assert [optimizer.get_session(name).task for name in ("demo.1", "demo.2")] == ["run 0", "run 1"]
    assert {session.id for session in optimizer.list_sessions()} == {"demo", "demo.1", "demo.2"}


def test_the_id_of_an_active_session_is_refused_with_the_way_out(optimizer):
    optimizer.start_session("a", "t", session_id="demo")
    before = stored_bytes(optimizer.store.sessions)
    with pytest.raises(SessionExists, match="demo.*end demo --status ABANDONED"):
        SessionOptimizer(optimizer.store.root).start_session("b", "u", session_id="demo")
    assert stored_bytes(optimizer.store.sessions) == before


@pytest.mark.parametrize("bad", ["../x", "/etc/passwd", "a/b", "a\n", ".x", "CON", "x" * 300, "a b",
                                 "\uff0e", "\u0430bc"], ids=ascii)
def test_ids_that_could_leave_the_store_are_refused(optimizer, bad, tmp_path):
    with pytest.raises(InvalidSessionId, match="A-Z"):
        optimizer.start_session("a", "t", session_id=bad)
    with pytest.raises(InvalidSessionId, match="invalid session id"):
        optimizer.log_event(bad, "CUSTOM")
    assert (optimizer.get_session(bad) is None and optimizer.analyze(bad) is None
            and optimizer.delete_session(bad) is False)
    assert os.listdir(str(tmp_path)) == ["store"] and stored_bytes(optimizer.store.root) == b""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"x", {("a",): 1}],
                         ids=lambda value: type(value).__name__)
def test_what_json_cannot_hold_is_refused_and_nothing_is_stored(optimizer, value):
    with pytest.raises(InvalidValue, match="JSON"):
        optimizer.start_session("a", "t", metadata={"x": value})
    session = optimizer.start_session("a", "t")
    before = stored_bytes(optimizer.store.root)
    with pytest.raises(InvalidValue, match="JSON"):
        optimizer.log_event(session.id, "CUSTOM", {"x": value})
    assert stored_bytes(optimizer.store.root) == before and len(session.events) == 1
    with pytest.warns(SessionOptimizerWarning, match="not imported"):
        assert optimizer.import_session({"id": "i", "agent": "a", "task": "t", "events": [
            {"id": "e", "event_type": "CUSTOM", "data": {"x": value}}]}) is None
    assert stored_bytes(optimizer.store.root) == before


@pytest.mark.parametrize("arguments, says", [
    (dict(event_type="NAP"), "NAP.*FILE_READ"), (dict(event_type=None), "None.*FILE_READ"),
    (dict(event_type=""), "FILE_READ"), (dict(tokens_input=-1), "tokens_input.*-1.*whole number"),
    (dict(tokens_output=1.5), "tokens_output.*1.5"),
    (dict(tokens_input=True), "tokens_input.*True"), (dict(tokens_input=10**16), "tokens_input"),
    (dict(tokens_output="5"), "tokens_output.*'5'"),
    (dict(duration_ms=float("nan")), "duration_ms.*nan"),
    (dict(duration_ms=float("inf")), "duration_ms.*inf"),
    (dict(tokens_input=None), "tokens_input.*None")], ids=str)
def test_bad_events_are_refused_with_value_and_remedy(optimizer, arguments, says):
    session = optimizer.start_session("a", "t")
    before = stored_bytes(optimizer.store.root)
    with pytest.raises(InvalidValue, match=says):
        optimizer.log_event(session.id, **dict(dict(event_type="CUSTOM"), **arguments))
    assert stored_bytes(optimizer.store.root) == before and len(session.events) == 1


def test_events_are_logged(optimizer):
    session = optimizer.start_session("a", "t", session_id="s")
    for kind in (EventType.FILE_READ, "FILE_READ", "file_read"):
        event = optimizer.log_event("s", kind, {"file_path": "x"}, tokens_input=3,
                                    tokens_output=2.0, duration_ms=5)
        assert (event.event_type is EventType.FILE_READ
                and (event.tokens, event.duration_ms) == (5, 5))
    assert ((session.total_tokens_input, session.total_tokens_output, session.total_duration_ms)
            == (9, 6, 15))
    assert len({event.id for event in session.events}) == 4
    assert SessionOptimizer(optimizer.store.root).get_session("s").to_dict() == session.to_dict()
    data = {"a": [1]}
    optimizer.log_event("s", "CUSTOM", data)
    data["a"].append(2)
    data["b"] = 1
    assert "b" not in session.events[-1].data


def test_a_session_ends(optimizer):
    session = optimizer.start_session("a", "t", session_id="s")
    assert (optimizer.end_session("s") is session and session.status is SessionStatus.COMPLETED
            and session.ended_at)
    assert [event.event_type.name for event in session.events] == ["SESSION_START", "SESSION_END"]
    ended = session.ended_at
    optimizer.end_session("s", SessionStatus.FAILED)
    assert (session.status is SessionStatus.FAILED and len(session.events) == 2
            and session.ended_at == ended)
    with pytest.warns(SessionOptimizerWarning, match="has ended"):
        assert optimizer.log_event("s", "CUSTOM", tokens_input=5) is not None
    assert session.status is SessionStatus.FAILED and session.total_tokens == 5
    assert SessionOptimizer(optimizer.store.root).get_session("s").to_dict() == session.to_dict()
    with pytest.raises(InvalidValue, match="DONE.*COMPLETED"):
        optimizer.end_session("s", "DONE")
    assert optimizer.end_session("s", "ABANDONED").status is SessionStatus.ABANDONED


def test_a_session_that_is_not_there(optimizer):
    for name in ("nobody", "", "../x", "a b"):
        assert (optimizer.get_session(name) is None and optimizer.analyze(name) is None
                and optimizer.export_report(name) is None)
        assert optimizer.delete_session(name) is False
    for lost in (lambda: optimizer.log_event("nobody", "CUSTOM"),
                 lambda: optimizer.end_session("nobody")):
        with pytest.warns(SessionOptimizerWarning, match="nobody"):
            assert lost() is None
    assert stored_bytes(optimizer.store.root) == b""


def made(optimizer, name, at, events=(), agent="FORGE", status="COMPLETED", **more):
    """A stored session that began ``at`` (a datetime)."""
    session = optimizer.import_session(dict(
        {"id": name, "agent": agent, "task": "t " + name, "status": status,
         "started_at": at.isoformat(), "model": "opus", "events": [
             dict({"id": "%s-%d" % (name, number), "timestamp": at.isoformat()}, **event)
             for number, event in enumerate(events)]}, **more))
    assert session.id == name
    return session


def read_event(tokens=1000, path="a.py"):
    return {"event_type": "FILE_READ", "data": {"file_path": path}, "tokens_input": tokens}


def test_lists_are_newest_first_and_narrowed(optimizer):
    now = datetime.now(timezone.utc)
    for number in range(5):
        made(optimizer, "s%d" % number, now - timedelta(hours=number), agent="FORGE" if number % 2
             else "ATLAS", status="FAILED" if number == 3 else "COMPLETED")

    def ids_of(**filters):
        return " ".join(session.id for session in optimizer.list_sessions(**filters))
    assert ids_of() == "s0 s1 s2 s3 s4" and ids_of(limit=2) == "s0 s1" and ids_of(limit=0) == ""
    assert (ids_of(agent="forge") == "s1 s3" and ids_of(agent="Atlas", limit=1) == "s0"
            and ids_of(agent="nobody") == "")
    assert ids_of(status=SessionStatus.FAILED) == ids_of(status="FAILED") == "s3"
    assert ids_of(since=now - timedelta(hours=2, minutes=1)) == "s0 s1 s2"
    assert ids_of(since=datetime.now() - timedelta(hours=1, minutes=30)) == "s0 s1"
    with pytest.raises(InvalidValue, match="DONE"):
        optimizer.list_sessions(status="DONE")


def test_a_session_listed_again_is_whole_in_both_lists(optimizer):
    optimizer.start_session("a", "t", session_id="s")
    optimizer.log_event("s", "CUSTOM", tokens_input=5)
    fresh = SessionOptimizer(optimizer.store.root)
    (one,), (other,) = fresh.list_sessions(), fresh.list_sessions()
    assert len(one.events) == len(other.events) == 2


def test_a_listed_session_is_whole(optimizer):
    made(optimizer, "s", datetime.now(timezone.utc), [read_event(), read_event()])
    session, = SessionOptimizer(optimizer.store.root).list_sessions()
    assert (session.total_tokens == 2_000 and len(session.events) == 2
            and session.estimated_cost == pytest.approx(0.030))
    assert isinstance(session, so.Session) and json.dumps(session.to_dict())


def test_one_damaged_file_hides_no_other(optimizer):
    made(optimizer, "good", datetime.now(timezone.utc), [read_event()])
    write(os.path.join(optimizer.store.sessions, "bad.json"), b"[]")
    fresh = SessionOptimizer(optimizer.store.root)
    with pytest.warns(SessionOptimizerWarning, match=r"bad\.json"):
        assert [session.id for session in fresh.list_sessions()] == ["good"]
    with pytest.warns(SessionOptimizerWarning, match=r"bad\.json"):
        assert fresh.agent_statistics("FORGE")["sessions_analyzed"] == 1
    for call in (fresh.get_session, fresh.analyze):
        with pytest.raises(DamagedSession, match=r"bad\.json"):
            call("bad")
    assert fresh.delete_session("bad") is True


def test_deleting_takes_the_report_along(optimizer):
    session = optimizer.start_session("a", "t", session_id="s")
    optimizer.analyze("s")
    assert os.listdir(str(optimizer.reports_dir)) == ["s_report.json"]
    assert optimizer.delete_session("s") is True and optimizer.delete_session("s") is False
    assert os.listdir(str(optimizer.reports_dir)) == os.listdir(str(optimizer.sessions_dir)) == []
    assert optimizer.get_session("s") is None and session.id == "s"


def test_a_session_ends_with_its_block(optimizer):
    with optimizer.session("forge", "Mend it", model="opus", session_id="good") as session:
        optimizer.log_event(session.id, "CUSTOM")
        assert session.status is SessionStatus.ACTIVE
    assert session.status is SessionStatus.COMPLETED and len(session.events) == 3
    with pytest.raises(ZeroDivisionError), optimizer.session("forge", "Mend it",
                                                             session_id="bad") as session:
        _ = 1 / 0
    assert session.status is SessionStatus.FAILED and session.ended_at
    with optimizer.session("forge", "Mend it", session_id="ended") as session:
        optimizer.end_session("ended", "ABANDONED")
    assert session.status is SessionStatus.ABANDONED and len(session.events) == 2
    with optimizer.session("forge", "Mend it", session_id="gone"):
        optimizer.delete_session("gone")
    assert optimizer.get_session("gone") is None
    with pytest.raises(SessionExists), optimizer.session("forge", "t", session_id="live"):
        with optimizer.session("forge", "t", session_id="live"):
            pytest.fail("an id was used twice")
    assert optimizer.get_session("live").status is SessionStatus.FAILED


def test_tasks_of_an_event_loop_share_an_optimizer(optimizer):
    import asyncio

    async def work(number):
        with optimizer.session("forge", "t", session_id="s%d" % number) as session:
            for count in range(5):
                optimizer.log_event(session.id, "CUSTOM", tokens_input=count)
                optimizer.log_event("s0", "CUSTOM")
                await asyncio.sleep(0)
            if number == 2:
                raise ZeroDivisionError

    async def all_of_them():
        return await asyncio.gather(*map(work, range(4)), return_exceptions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SessionOptimizerWarning)  # s0 has ended before the others
        results = asyncio.run(all_of_them())
    sessions = [optimizer.get_session("s%d" % number) for number in range(4)]
    assert ([session.status.value for session in sessions]
            == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"])
    assert ([len(session.events) for session in sessions] == [27, 7, 7, 7]
            and [type(one) for one in results if one] == [ZeroDivisionError])


def test_threads_see_every_event_once(optimizer):
    """Four threads log through one object and read what it hands out; each event counts once, and
    invents no waste."""
    for turn in range(6):
        name, switch = "s%d" % turn, sys.getswitchinterval()
        session = optimizer.start_session("FORGE", "t", session_id=name)
        listed, = [one for one in SessionOptimizer(optimizer.store.root).list_sessions()
                   if one.id == name]

        def work(number, name=name, listed=listed):
            for count in range(40):
                optimizer.log_event(name, "FILE_READ",
                                    {"file_path": "%d-%d.py" % (number, count)}, 10)
                assert len(optimizer.get_session(name).events) > count and listed.events
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        try:
            sys.setswitchinterval(1e-5)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switch)
        seen = [event.id for event in session.events]
        assert len(seen) == len(set(seen)) == 161 and session.total_tokens == 1_600
        assert (session.to_dict()
                == SessionOptimizer(optimizer.store.root).get_session(name).to_dict())
        assert optimizer.analyze(name).total_waste_tokens == 0


@pytest.mark.parametrize("rate, kept", [
    ("", ""), (None, ""), ("fast", "fast"), ("long", "long"), ("fast long", "fast long"),
    ("quick", None), ("long fast", None), ("Fast", None), (5, None)])
def test_an_events_rate_is_one_that_has_a_price(optimizer, rate, kept):
    optimizer.start_session("FORGE", "t", session_id="s")
    if kept is None:
        with pytest.raises(InvalidValue, match="use 'fast', 'long', 'fast long'"):
            optimizer.log_event("s", "AI_RESPONSE", {}, 10, 5, rate=rate)
    else:
        assert optimizer.log_event("s", "AI_RESPONSE", {}, 10, 5, rate=rate).rate == kept
    assert len(optimizer.get_session("s").events) == 1 + (kept is not None)


def test_every_text_of_an_imported_session_is_masked_but_what_names_things(optimizer):
    secret = "sk-ant-api03-" + "Ab1" * 12
    session = dict(WHOLE_SESSION, status="FAILED", metadata={"a": {secret: [secret]}},
                   **dict.fromkeys(("agent", "task", "model", "started_at", "ended_at"),
                                   "x " + secret))
    session["events"] = [dict(WHOLE_SESSION["events"][1], data={"id": secret, "query": [secret]},
                              **dict.fromkeys(("timestamp", "model", "rate", "input_model",
                                               "input_rate"), secret))]
    assert optimizer.import_session(session).events[0].tokens_cache_read == 50
    assert secret.encode() not in stored_bytes(optimizer.store.root)
    optimizer.import_session(dict(WHOLE_SESSION, id="innocent"))
    assert optimizer.get_session("innocent").to_dict() == dict(WHOLE_SESSION, id="innocent")


def test_an_optimizer_is_pickled_to_an_equal_one(optimizer, tmp_path):
    session = optimizer.start_session("FORGE", "t", session_id="s")
    optimizer.log_event("s", "CUSTOM", tokens_input=5)
    listed, = SessionOptimizer(optimizer.store.root).list_sessions()
    again = pickle.loads(pickle.dumps(optimizer))
    assert again == optimizer and hash(again) == hash(optimizer) and again is not optimizer
    assert again._sessions["s"] == session and again.log_event("s", "CUSTOM").id.startswith("s_2_")
    assert len(again._sessions["s"].events) == 3 == len(optimizer.get_session("s").events)
    assert pickle.loads(pickle.dumps(listed)).total_tokens == 5
    whole = so.Session.from_dict(listed.to_dict())
    assert listed == whole == listed and not listed != whole and listed != listed.id
    whole.end()
    assert listed != whole != listed
    assert optimizer not in (SessionOptimizer(str(tmp_path / "other")), "optimizer")
    other = SessionOptimizer(optimizer.store.root, analyzers=[so.LargeFileAnalyzer(limit=5)])
    same = SessionOptimizer(optimizer.store.root, analyzers=[c() for c in so.BUILT_IN_ANALYZERS])
    assert optimizer != other and optimizer == same


def test_an_optimizer_shows_its_store_and_counts(optimizer, monkeypatch):
    for name in "ab":
        optimizer.start_session("FORGE", "t", session_id=name)
    fresh = SessionOptimizer(optimizer.store.root)
    fresh.get_session("a")
    assert repr(fresh) == "<SessionOptimizer %s: sessions stored: 2, in use: 1>" % fresh.store.root
    monkeypatch.setenv("SESSIONOPTIMIZER_HOME", write(os.path.join(fresh.store.root, "file"), b""))
    assert "sessions stored: part of this path is a file" in repr(SessionOptimizer())


def test_sessions_stay_live_across_two_optimizers(optimizer):
    other = SessionOptimizer(optimizer.store.root)
    session = optimizer.start_session("a", "t", session_id="s")
    seen = other.get_session("s")
    assert seen is not session and seen.to_dict() == session.to_dict()
    other.log_event("s", "FILE_READ", {"file_path": "x"}, tokens_input=7)
    assert seen.total_tokens == 7 and session.total_tokens == 0
    optimizer.log_event("s", "CUSTOM", tokens_output=1)
    assert session.total_tokens == 8 and [event.tokens for event in session.events] == [0, 7, 1]
    assert optimizer._sessions["s"] is session is optimizer.get_session("s")
    other.end_session("s", SessionStatus.FAILED)
    assert (seen.status is SessionStatus.FAILED
            and optimizer.get_session("s").status is SessionStatus.FAILED)
    assert session.to_dict() == seen.to_dict()
    with pytest.warns(SessionOptimizerWarning, match="kept as"):
        again = other.start_session("a", "later", session_id="s")
    assert optimizer.get_session("s").task == "later" and again.task == "later"
    other.delete_session("s")
    assert optimizer.get_session("s") is None


def test_sessions_stay_live_across_two_processes(optimizer):
    session = optimizer.start_session("a", "t", session_id="s")
    for number in range(1, 3):
        status, out, err = command("--store", optimizer.store.root, "log", "s", "CUSTOM",
                                   "--tokens-in", "5")
        assert (status, err) == (0, "")
        assert optimizer.get_session("s") is session and session.total_tokens == 5 * number
    assert command("end", "s", "--store", optimizer.store.root)[0] == 0
    optimizer.list_sessions()
    assert session.status is SessionStatus.COMPLETED and optimizer.analyze("s").total_tokens == 10


def log_many(root, name, count):
    optimizer = SessionOptimizer(root)
    for number in range(count):
        optimizer.log_event("s", "TOOL_CALL", {"who": name, "filling": "x" * (number * 37 % 2_000)},
                            tokens_input=1)


@posix_only
def test_no_event_of_eight_processes_is_lost(optimizer):
    session = optimizer.start_session("a", "t", session_id="s")
    writers = [fork.Process(target=log_many, args=(optimizer.store.root, name, 200))
               for name in "abcdefgh"]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        optimizer.get_session("s"), optimizer.list_sessions(limit=1)
        count = len(session.events)
        assert session.total_tokens == count - 1
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * 8
    optimizer.end_session("s")
    assert len(session.events) == 1_602 == len({event.id for event in session.events})
    assert json.loads(read(optimizer.store.find("s")))["total_tokens_input"] == 1_600


@posix_only
def test_no_event_of_eight_command_lines_is_lost(optimizer):
    optimizer.start_session("a", "t", session_id="s")
    lines = "".join(json.dumps({"event_type": "CUSTOM", "tokens_input": 1, "data": {"n": n}}) + "\n"
                    for n in range(200)).encode()
    writers = [subprocess.Popen([sys.executable, MODULE, "--store", optimizer.store.root, "log",
                                 "s", "-"], stdin=subprocess.PIPE,
                                stdout=subprocess.DEVNULL) for _ in range(8)]
    threads = [threading.Thread(target=process.communicate, args=(lines,)) for process in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session = optimizer.get_session("s")
    assert [process.returncode for process in writers] == [0] * 8
    assert session.total_tokens == 1_600 and len({event.id for event in session.events}) == 1_601


def test_a_session_is_imported(optimizer):
    document = dict(WHOLE_SESSION, id="i")
    session = optimizer.import_session(document)
    assert (session.to_dict() == document
            == SessionOptimizer(optimizer.store.root).get_session("i").to_dict())
    assert (optimizer.import_session(document).to_dict() == document
            and len(optimizer.list_sessions()) == 1)
    with pytest.warns(SessionOptimizerWarning, match=r"kept as i\.1"):
        assert optimizer.import_session(dict(document, task="other")).task == "other"
    assert optimizer.get_session("i.1").task == "a task"
    totals = optimizer.import_session(
        {"id": "x", "agent": "a", "task": "t", "total_tokens_input": 10, "total_tokens_output": 5})
    assert (totals.total_tokens == 15
            == SessionOptimizer(optimizer.store.root).get_session("x").total_tokens)


@pytest.mark.parametrize("data, says", [(None, "object"), ([], "object"), ({}, "id, agent, task"), (
    dict(WHOLE_SESSION, id="../x"), "A-Z"),
    (dict(WHOLE_SESSION, id=""), "A-Z"), (dict(WHOLE_SESSION, status="x"), "status"),
    (dict(WHOLE_SESSION, events=[{"id": "e", "event_type": "NAP"}]), "event"),
    (dict(WHOLE_SESSION, metadata={"x": {1}}), "JSON")], ids=lambda value: str(value)[:30])
def test_what_cannot_be_imported_is_named(optimizer, data, says):
    with pytest.warns(SessionOptimizerWarning, match="not imported.*" + says):
        assert optimizer.import_session(data) is None
    assert stored_bytes(optimizer.store.root) == b""


def test_files_of_the_first_layout_are_read_and_go_on(optimizer):
    os.makedirs(optimizer.store.sessions, exist_ok=True)
    write(os.path.join(optimizer.store.sessions, "s.json"),
          json.dumps(dict(WHOLE_SESSION, status="ACTIVE", ended_at=None), indent=2))
    assert optimizer.get_session("s").total_tokens == 137
    optimizer.log_event("s", "CUSTOM", tokens_input=3)
    optimizer.end_session("s")
    session = SessionOptimizer(optimizer.store.root).get_session("s")
    assert (session.total_tokens == 140 and len(session.events) == 4
            and session.status is SessionStatus.COMPLETED)


def test_a_report_is_saved_with_its_fingerprint(optimizer):
    session = made(optimizer, "s", datetime.now(timezone.utc), [read_event(), read_event()])
    report = optimizer.analyze("s")
    saved = json.loads(read(os.path.join(optimizer.store.reports, "s_report.json")))
    assert saved["total_waste_tokens"] == 1_000 and saved["fingerprint"]
    assert (so.OptimizationReport.from_dict(saved).to_dict()
            == so.OptimizationReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict())
    assert report.session_id == session.id and so.parse_time(report.generated_at)


def test_a_report_that_cannot_be_saved_is_a_warning(optimizer):
    made(optimizer, "s", datetime.now(timezone.utc), [read_event(), read_event()])
    shutil.rmtree(optimizer.store.reports)
    write(optimizer.store.reports, b"a file")
    with pytest.warns(SessionOptimizerWarning, match="could not be saved"):
        assert optimizer.analyze("s").total_waste_tokens == 1_000


def test_statistics_of_an_agent(optimizer):
    now = datetime.now(timezone.utc)
    # oldest first: 50, 50, 75 and 100 % efficient; another agent's and an old one do not count
    for number, reads in enumerate(([1000, 1000], [500, 500], [1000, 1000], [7])):
        events = [read_event(tokens) for tokens in reads]
        if number == 2:
            events.append({"event_type": "AI_RESPONSE", "tokens_output": 2_000})
        made(optimizer, "s%d" % number, now - timedelta(days=4 - number), events)
    made(optimizer, "other", now, [read_event(), read_event()], agent="ATLAS")
    made(optimizer, "old", now - timedelta(days=40), [read_event(), read_event()])
    for asked in (optimizer, SessionOptimizer(optimizer.store.root)):
        stats = asked.agent_statistics("forge")
        assert set(stats) >= {"agent", "period_days", "sessions_analyzed", "total_tokens",
                              "total_cost", "average_efficiency",
                              "total_waste_tokens", "total_waste_cost", "common_issues", "trends"}
        assert (stats["agent"].upper(), stats["period_days"], stats["sessions_analyzed"],
                stats["total_tokens"]) == ("FORGE", 30, 4, 7_007)
        assert (stats["total_waste_tokens"] == 2_500
                and stats["average_efficiency"] == pytest.approx((50 + 50 + 75 + 100) / 4))
        # 5,007 in at 0.015 and 2,000 out at 0.075 per 1,000; 2,500 wasted at 0.015
        assert (stats["total_cost"] == pytest.approx(0.075105 + 0.150)
                and stats["total_waste_cost"] == pytest.approx(0.0375))
        assert stats["common_issues"] == [{"type": "REPEATED_FILE_READ", "count": 3}]
        assert stats["trends"] == {"trend": "improving", "change_percent": 37.5,
                                   "first_period_avg": 50.0, "second_period_avg": 87.5}
    assert optimizer.agent_statistics("FORGE", days=60)["sessions_analyzed"] == 5
    empty = optimizer.agent_statistics("nobody")
    assert (set(empty) == {"agent", "sessions", "message"} and empty["sessions"] == 0
            and "30 days" in empty["message"])


@pytest.mark.parametrize("scores, trend", [([], "insufficient_data"), ([50], "insufficient_data"),
                                           ([50, 55], "stable"), ([50, 55.1], "improving"),
                                           ([60, 55], "stable"), ([60, 54.9], "declining"),
                                           ([0, 100, 100], "improving")], ids=str)
def test_trends_begin_beyond_five_points(scores, trend):
    assert so._trend(scores)["trend"] == trend and set(so._trend(scores)) == {
        "trend", "change_percent", "first_period_avg", "second_period_avg"}


def test_statistics_count_every_session_and_read_unchanged_ones_once(optimizer, monkeypatch):
    now = datetime.now(timezone.utc)
    for number in range(130):
        made(optimizer, "s%d" % number, now - timedelta(minutes=number), [read_event(10)])
    assert (SessionOptimizer(optimizer.store.root).agent_statistics("FORGE")["sessions_analyzed"]
            == 130)
    fresh = SessionOptimizer(optimizer.store.root)
    loads = []
    load = fresh.store.load_marked
    monkeypatch.setattr(fresh.store, "load_marked",
                        lambda name, make, **how: loads.append(name) or load(name, make, **how))
    assert fresh.agent_statistics("FORGE")["total_tokens"] == 1_300 and loads == []
    with pytest.warns(SessionOptimizerWarning, match="has ended"):
        optimizer.log_event("s5", "CUSTOM", tokens_input=1)
    assert fresh.agent_statistics("FORGE")["total_tokens"] == 1_301 and loads in ([], ["s5"])
    stricter = SessionOptimizer(optimizer.store.root, analyzers=[so.LargeFileAnalyzer(limit=5)])
    assert stricter.agent_statistics("FORGE")["total_waste_tokens"] == 130 * 6


def test_common_issues_are_the_five_most_frequent(optimizer):
    class Many(so.BaseAnalyzer):
        def analyze(self, session):
            for number, kind in enumerate(list(IssueType)[:7], 1):
                for _ in range(number):
                    yield so.EfficiencyIssue("i", kind, Severity.LOW, "d", "s")
    optimizer.analyzers = [Many()]
    made(optimizer, "s", datetime.now(timezone.utc), [read_event()])
    assert [(row["type"], row["count"])
            for row in optimizer.agent_statistics("FORGE")["common_issues"]] == [
                (kind.name, number)
                for number, kind in reversed(list(enumerate(list(IssueType)[:7], 1)))][:5]


def test_sessions_are_compared(optimizer):
    now = datetime.now(timezone.utc)
    made(optimizer, "bad", now, [read_event(), read_event()])
    made(optimizer, "good", now, [read_event(3_000)])
    result = optimizer.compare_sessions(["bad", "good", "nobody", "bad"])
    assert set(result) >= {"sessions", "averages", "best_performer", "worst_performer",
                           "recommendations"}
    names = ("id", "agent", "task", "total_tokens", "cost", "efficiency_score", "issue_count")
    assert [dict({name: row[name] for name in names}, cost=round(row["cost"], 6))
            for row in result["sessions"]] == [
                {"id": "bad", "agent": "FORGE", "task": "t bad", "total_tokens": 2_000,
                 "cost": 0.03, "efficiency_score": 50.0, "issue_count": 1},
                {"id": "good", "agent": "FORGE", "task": "t good", "total_tokens": 3_000,
                 "cost": 0.045, "efficiency_score": 100.0, "issue_count": 0}]
    assert rounded(result["averages"]) == {"tokens": 2_500, "cost": 0.0375, "efficiency": 75.0,
                                           "issues": 0.5}
    assert (result["best_performer"], result["worst_performer"]) == ("good", "bad")
    assert (len(result["recommendations"]) == 1
            and "REPEATED_FILE_READ" in result["recommendations"][0])
    for few in ([], ["good"], ["good", "good"], ["good", "nobody"]):
        assert list(optimizer.compare_sessions(few)) == ["error"]
    assert "nobody" in optimizer.compare_sessions(["good", "nobody"])["error"]


def test_reports_are_exported(optimizer):
    made(optimizer, "s", datetime.now(timezone.utc), [read_event(), read_event()])
    assert json.loads(optimizer.export_report("s"))["total_waste_tokens"] == 1_000
    markdown, shown = (optimizer.export_report("s", format="markdown"),
                       optimizer.export_report("s", "text"))
    assert (markdown.startswith("# Session Optimization Report")
            and "SESSION OPTIMIZATION REPORT" == shown.split("\n")[0])
    assert "Efficiency Score" in markdown and "Efficiency Score" in shown
    with pytest.raises(InvalidValue, match="'pdf'.*json, markdown, text"):
        optimizer.export_report("s", "pdf")


def test_where_the_store_is(tmp_path, home, monkeypatch):
    assert (str(SessionOptimizer().storage_path) == str(home / ".sessionoptimizer")
            and os.listdir(str(home)) == [])
    monkeypatch.setenv("SESSIONOPTIMIZER_HOME", str(tmp_path / "elsewhere"))
    assert str(SessionOptimizer().storage_path) == str(tmp_path / "elsewhere")
    mine = SessionOptimizer(tmp_path / "mine")
    mine.start_session("a", "t")
    assert (str(mine.storage_path) == str(tmp_path / "mine")
            and not (tmp_path / "elsewhere").exists())
    write(tmp_path / "file", b"mine")
    with pytest.raises(StorageError, match="file.*--store"):
        SessionOptimizer(str(tmp_path / "file"))
    assert read(tmp_path / "file") == b"mine"


def test_would_repeat_follows_the_analyzers_rule(optimizer):
    optimizer.start_session("a", "t", session_id="s", metadata={"cwd": "/w"})
    optimizer.log_event("s", "FILE_READ", {"file_path": "a.py", "lines": [1, 100]},
                        tokens_input=1_000)
    found = optimizer.would_repeat("s", "FILE_READ", {"file_path": "/w/./a.py", "lines": [51, 150]})
    assert ((found["tokens"], found["lines"], found["of_lines"]) == (500, 50, 100)
            and len(optimizer.get_session("s").events) == 2)
    assert optimizer.would_repeat("s", "FILE_READ", {"file_path": "b.py"}) is None
    assert optimizer.would_repeat("nobody", "FILE_READ", {"file_path": "a.py"}) is None
    optimizer.log_event("s", "FILE_WRITE", {"file_path": "a.py"})
    assert (optimizer.would_repeat("s", "FILE_READ", {"file_path": "a.py", "lines": [1, 100]})
            is None)


@pytest.mark.parametrize("call", [
    lambda o: o.list_sessions(since="yesterday"), lambda o: o.list_sessions(limit=None),
    lambda o: o.log_event("s", "CUSTOM", "text"), lambda o: o.start_session("A", "t", metadata=5),
    lambda o: o.agent_statistics("A", days="7"), lambda o: o.compare_sessions(None),
    lambda o: o.compare_sessions("s"), lambda o: o.export_report("s", format=[]),
    lambda o: o.end_session("s", "ACTIVE")])
def test_arguments_of_a_wrong_kind_are_named(optimizer, call):
    optimizer.start_session("A", "t", session_id="s")
    with pytest.raises(InvalidValue):
        call(optimizer)


def test_a_session_without_a_status_hides_no_other(optimizer):
    optimizer.start_session("A", "t", session_id="good")
    write(os.path.join(optimizer.store.sessions, "x.json"),
          b'{"id":"x","agent":"a","task":"t","events":[]}')
    assert {session.id for session in optimizer.list_sessions()} == {"good", "x"}


def run(optimizer, *arguments, stdin=None):
    """Run the command line in a process of its own: (status, standard output, standard error)."""
    done = subprocess.run([sys.executable, MODULE, "--store", optimizer.store.root, *arguments],
                          input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), unwrapped(done.stderr.decode())


def store_session(optimizer, name, events, *, agent="FORGE", minutes_ago=5.0, step=1.0):
    """A stored session of (event type, data, tokens in, tokens out), `step` minutes apart, the last
    one `minutes_ago`."""
    end = datetime.now().astimezone() - timedelta(minutes=minutes_ago)
    begin = end - timedelta(minutes=step * max(0, len(events) - 1))
    document = {"id": name, "agent": agent, "task": "t", "started_at": begin.isoformat(),
                "events": [
                    {"id": f"{name}-{number}", "timestamp": (
                        begin + timedelta(minutes=step * number)).isoformat(), "event_type": kind,
                     "data": data, "tokens_input": entered, "tokens_output": written}
                    for number, (kind, data, entered, written) in enumerate(events)]}
    optimizer.import_session(document)
    return name


READ = ("FILE_READ", {"file_path": "a.py"}, 1000, 0)


ANSWER = ("AI_RESPONSE", {}, 0, 1000)


FAILED = [("ERROR", {"message": f"cannot do {word}", "tool": word}, 2000, 0)
          for word in ("one", "two", "three", "four")]


ALERTING = {  # kind: a session that alerts, and the same with a little less of it
    "LOW_EFFICIENCY": ([READ, READ, READ, ANSWER], [READ, READ, READ] + [ANSWER] * 4),
    "HIGH_WASTE": (
        [("FILE_READ", {"file_path": "a.py"}, 5001, 0)] * 2 + [("AI_RESPONSE", {}, 0, 5000)] * 5,
        [("FILE_READ", {"file_path": "a.py"}, 5000, 0)] * 2 + [("AI_RESPONSE", {}, 0, 5000)] * 5),
    "LONG_SESSION": ([ANSWER] * 62, [ANSWER] * 61),
    "HIGH_ERROR_RATE": (FAILED + [ANSWER] * 9, FAILED + [ANSWER] * 10),
}


@pytest.mark.parametrize("kind", ALERTING)
def test_an_alert_of_every_kind_fires_above_its_limit_and_not_at_it(optimizer, kind):
    above, at = ALERTING[kind]
    store_session(optimizer, "above", above)
    store_session(optimizer, "at", at)
    fired = [alert for alert in optimizer.alerts(thresholds={"dollars": 0})
             if alert["kind"] == kind]
    assert [alert["session_id"] for alert in fired] == ["above"]
    rule = next(rule for rule in so.ALERT_RULES if rule.kind == kind)
    assert fired[0]["level"] == rule.level.value and fired[0]["threshold"] == rule.threshold
    assert (fired[0]["id"] == f"above:{kind}" and fired[0]["action"] == rule.action
            and fired[0]["agent"] == "FORGE")
    assert set(fired[0]) == {"id", "level", "kind", "session_id", "agent", "message", "action",
                             "value", "threshold", "time", "cost"}
    assert so.parse_time(fired[0]["time"]) is not None and fired[0]["value"] != rule.threshold


def test_the_table_of_alerts():
    assert ([(rule.name, rule.level.name, rule.threshold, rule.cause) for rule in so.ALERT_RULES]
            == [("efficiency", "HIGH", 70, "waste"), ("waste", "MEDIUM", 5000, "waste"),
                ("minutes", "MEDIUM", 60, "length"), ("error_rate", "HIGH", 30, "errors")])


def test_alerts_are_ranked_by_dollars_and_one_per_session_and_cause(optimizer):
    big = [("FILE_READ", {"file_path": "a.py"}, 9000, 0)] * 3 + [ANSWER]
    store_session(optimizer, "small", ALERTING["LOW_EFFICIENCY"][0])
    store_session(optimizer, "big", big, minutes_ago=90)
    store_session(optimizer, "long", ALERTING["LONG_SESSION"][0], minutes_ago=1)
    alerts = optimizer.alerts()
    assert ([alert["cost"] for alert in alerts]
            == sorted((alert["cost"] for alert in alerts), reverse=True))
    row = next(row for row in optimizer.summaries() if row["id"] == "big")
    assert row["waste_tokens"] > 5000 and row["efficiency_score"] < 70  # two rules, one cause
    assert [alert["kind"] for alert in alerts if alert["session_id"] == "big"] == ["LOW_EFFICIENCY"]
    assert [alert["kind"] for alert in optimizer.alerts(thresholds={"efficiency": 0})
            if alert["session_id"] == "big"] == ["HIGH_WASTE"]
    assert len({(alert["session_id"], alert["kind"]) for alert in alerts}) == len(alerts)


@pytest.mark.parametrize("least, fires", [(0, True), (0.02, True), (0.0201, False)])
def test_less_than_the_dollars_asked_for_does_not_alert(optimizer, least, fires):
    # 2,000 of the price default: two cents
    store_session(optimizer, "s", ALERTING["LOW_EFFICIENCY"][0])
    assert bool(optimizer.alerts(thresholds={"dollars": least})) is fires


def test_since_means_active_since_and_agent_is_any_case(optimizer):
    # begun 94 minutes ago, still at work
    store_session(optimizer, "long", [ANSWER] * 90, minutes_ago=5)
    store_session(optimizer, "old", [ANSWER] * 90, agent="ATLAS", minutes_ago=120)
    hour = datetime.now() - timedelta(hours=1)
    assert {alert["session_id"] for alert in optimizer.alerts(since=hour)} == {"long"}
    assert {alert["session_id"] for alert in optimizer.alerts(agent="atlas")} == {"old"}
    assert optimizer.alerts(since=hour, agent="ATLAS") == []
    store_session(optimizer, "spelt", [ANSWER] * 90, agent="Claude Code", minutes_ago=5)
    for name in ("Claude Code", "claude-code", "CLAUDE-CODE"):
        assert {alert["session_id"] for alert in optimizer.alerts(agent=name)} == {"spelt"}
        assert [session.id for session in optimizer.list_sessions(agent=name)] == ["spelt"]


def test_thresholds_replace_the_tables(optimizer):
    store_session(optimizer, "s", [READ, READ, ANSWER, ANSWER])
    assert "LOW_EFFICIENCY" not in {alert["kind"] for alert in optimizer.alerts()}
    (alert,) = [alert for alert in optimizer.alerts(thresholds={"efficiency": 80})
                if alert["kind"] == "LOW_EFFICIENCY"]
    assert alert["threshold"] == 80 and alert["value"] == 75.0 and "75.0%" in alert["message"]
    kinds = {alert["kind"] for alert in optimizer.alerts(thresholds={"waste": 10, "minutes": 1})}
    assert kinds == {"HIGH_WASTE", "LONG_SESSION"}


@pytest.mark.parametrize("thresholds", [{"speed": 1}, {"spike": 3}, {"dollars": -1},
                                        {"waste": "many"}, {"waste": -1}, {"waste": float("nan")},
                                        {"waste": True}, {"waste": None}])
def test_a_threshold_that_cannot_be_is_named(optimizer, thresholds):
    with pytest.raises(so.InvalidValue, match=next(iter(thresholds))):
        optimizer.alerts(thresholds=thresholds)


def test_one_failure_is_no_rate_and_those_of_others_do_not_count(optimizer):
    store_session(optimizer, "one", [FAILED[0], ANSWER])
    store_session(optimizer, "declined",
                  [("ERROR", {"message": "declined by the user"}, 0, 0)] * 5 + [ANSWER])
    assert [alert for alert in optimizer.alerts() if alert["kind"] == "HIGH_ERROR_RATE"] == []


def test_an_empty_store_has_no_alerts(optimizer):
    assert optimizer.alerts() == []
    assert run(optimizer, "alerts") == (0, "ALERTS\n  * No alerts.\n", "")
    status, out, _ = run(optimizer, "alerts", "--format", "json")
    assert (status, json.loads(out)) == (0, [])


def test_the_alerts_command(optimizer):
    nothing = "ALERTS\n  * No alerts.\n"
    store_session(optimizer, "wasteful", ALERTING["LOW_EFFICIENCY"][0])
    store_session(optimizer, "long", ALERTING["LONG_SESSION"][0], agent="ATLAS")
    status, out, _ = run(optimizer, "alerts", "--format", "json")
    assert status == 0 and json.loads(out) == optimizer.alerts()
    status, out, _ = run(optimizer, "alerts")
    assert status == 0 and re.search(
        r"\$0\.0200  wasteful  HIGH +Low efficiency: 50\.0% +See analyze --evidence", out)
    status, out, _ = run(optimizer, "alerts", "--limit", "1", "--dollars", "0")
    assert len(out.partition("\n\nWHY\n  $ ")[0].splitlines()) == 4 and "and 1 more" in out
    status, _, err = run(optimizer, "alerts", "--fail-on", "high")
    assert (status, err) == (3, "sessionoptimizer: an alert is HIGH or above\n")
    assert run(optimizer, "alerts", "--fail-on", "critical")[0] == 0
    assert (run(optimizer, "alerts", "--agent", "atlas", "--dollars", "0", "--fail-on", "HIGH")[0]
            == 0)
    assert (run(optimizer, "alerts", "--agent", "atlas", "--dollars", "0", "--fail-on", "MEDIUM")[0]
            == 3)
    quiet = ["--efficiency", "0", "--waste", "1e9", "--minutes", "1e9", "--error-rate", "100"]
    assert run(optimizer, "alerts", "--fail-on", "LOW", *quiet) == (0, nothing, "")
    assert run(optimizer, "alerts", "--fail-on", "URGENT")[0] == 2
    assert run(optimizer, "alerts", "--waste", "-1")[0] == 2
    # a gate that judged nothing does not pass
    told = "sessionoptimizer: nothing to judge: no session was selected\n"
    assert run(optimizer, "alerts", "--since", "1m", "--fail-on", "LOW") == (3, nothing, told)
    assert run(optimizer, "alerts", "--since", "1m") == (0, nothing, "")


def test_a_read_of_what_the_window_holds_gets_advice(agent, source):
    agent.read(source)
    answer = agent.about_to("Read", file_path=str(source))
    output = answer["hookSpecificOutput"]
    assert (set(output) == {"hookEventName", "additionalContext"}
            and output["hookEventName"] == "PreToolUse")
    assert (str(source) in output["additionalContext"]
            and "has not changed" in output["additionalContext"])
    assert agent.about_to("Read", file_path=str(source), offset=10, limit=20)
    assert agent.about_to("Bash", command="sed -n 5,9p loader.py")


SILENT = {  # what happens between the read and the call: nothing may be said
    "an edit": lambda a, s: a.hook("PostToolUse", tool_name="Edit",
                                   tool_input={"file_path": str(s)}, tool_response={}),
    "sed -i": lambda a, s: a.bash("sed -i s/1/2/ loader.py"),
    "a compaction": lambda a, s: a.hook("PreCompact", trigger="auto"),
    "the user's editor": lambda a, s: s.write_text("new\n"),
    "a removal": lambda a, s: s.unlink(),
    "a newer time": lambda a, s: os.utime(s, (time.time() + 60, time.time() + 60)),
}


@pytest.mark.parametrize("between", SILENT)
def test_a_read_that_may_bring_something_new_goes_on(agent, source, between):
    agent.read(source)
    SILENT[between](agent, source)
    assert agent.about_to("Read", file_path=str(source)) is None


def test_what_the_window_holds_only_in_part_is_read(agent, source):
    agent.read(source, offset=1, limit=50)
    assert agent.about_to("Read", file_path=str(source)) is None
    assert agent.about_to("Read", file_path=str(source), offset=40, limit=20) is None
    assert agent.about_to("Read", file_path=str(source), offset=1, limit=50)
    assert agent.about_to("Read", file_path=str(source), offset=11, limit=10)
    agent.read(source, offset=51, limit=50)
    assert agent.about_to("Read", file_path=str(source))


def test_a_limit_beyond_the_end_is_the_end(agent, source):
    agent.read(source)
    assert agent.about_to("Read", file_path=str(source), offset=1, limit=5000)


def test_a_command_nobody_knows_does_not_silence_the_guard_while_the_file_is_untouched(
        agent, source):
    agent.read(source)
    agent.bash("./build.sh")
    assert agent.about_to("Read", file_path=str(source))


def test_every_agent_has_a_window_of_its_own(agent, source):
    agent.read(source)
    payload = agent.payload("PreToolUse", tool_name="Read", tool_input={"file_path": str(source)},
                            agent_id="sub1")
    assert agent.optimizer.guard(payload) is None


def test_a_search_is_repeated_until_something_changes_or_the_user_speaks(agent):
    search = {"pattern": "def load", "path": str(agent.folder)}
    found = {"mode": "files_with_matches", "filenames": ["a.py"], "numFiles": 1}
    agent.hook("PostToolUse", tool_name="Grep", tool_input=search, tool_response=found)
    assert "def load" in agent.about_to("Grep", **search)["hookSpecificOutput"]["additionalContext"]
    agent.hook("UserPromptSubmit", prompt="I changed something")
    assert agent.about_to("Grep", **search) is None
    agent.hook("PostToolUse", tool_name="Grep", tool_input=search, tool_response=found)
    assert agent.about_to("Grep", **search)
    agent.bash("./build.sh")
    assert agent.about_to("Grep", **search) is None


def test_deny_refuses_once_and_lets_the_second_try_pass(agent, source):
    agent.read(source)
    output = agent.about_to("Read", deny=True, file_path=str(source))["hookSpecificOutput"]
    assert set(output) == {"hookEventName", "permissionDecision", "permissionDecisionReason"}
    assert (output["permissionDecision"] == "deny"
            and str(source) in output["permissionDecisionReason"])
    assert agent.about_to("Read", deny=True, file_path=str(source)) is None
    agent.read(source)  # which it did; the next repeat is another one
    assert agent.optimizer.analyze(agent.id).issues[0].issue_type is so.IssueType.REPEATED_FILE_READ


def test_the_guard_says_nothing_of_a_session_or_a_tool_it_does_not_know(agent, source):
    assert agent.about_to("Read", file_path=str(source)) is None
    assert agent.session() is None
    agent.read(source)
    assert agent.about_to("Bash", command="make") is None
    assert agent.about_to("Write", file_path=str(source), content="x") is None


def test_would_repeat_counts_the_tokens_of_the_lines_asked_for(agent, source):
    tokens = agent.read(source).tokens_input
    found = agent.optimizer.would_repeat(agent.id, "FILE_READ",
                                         {"file_path": str(source), "lines": [1, 1]})
    assert (found["lines"], found["of_lines"], found["tokens"]) == (1, 1, tokens // 100)
    whole = agent.optimizer.would_repeat(agent.id, "FILE_READ", {"file_path": str(source)})
    assert (whole["lines"], whole["of_lines"], whole["tokens"]) == (100, 100, tokens)


PLANTED = ["ghp_0123456789abcdefghijklmnopqrstuvwxyz",
           "sk-ant-api03-Abc123Def456Ghi789Jkl012Mno345", "hunter2hunter2"]


def test_no_planted_secret_is_stored_whatever_brings_it(tmp_path, optimizer):
    token, key, password = PLANTED
    told = Transcript(tmp_path / "projects", cwd="/w/%s" % token)
    told.prompt("use %s please" % token)
    calls = [("Bash", {"command": "curl -u me:%s https://x.y" % password}),
             ("Read", {"file_path": "/w/%s.txt" % token}), ("Grep", {"pattern": key, "path": "/w"}),
             ("WebFetch", {"url": "https://me:%s@x.y/" % password, "prompt": "p"}),
             ("mcp__db__query", {"query": "IDENTIFIED BY '%s'" % password, "path": "/w/%s" % key}),
             ("tool_%s" % token, {"a": 1})]
    for number, (name, arguments) in enumerate(calls):
        told.answer("m%d" % number, (10, 300, 1_000 + 300 * number, 20),
                    use("t%d" % number, name, **arguments))
        told.result("t%d" % number, "fine")
    told.answer("m9", (10, 300, 3_000, 9), text(9))
    row, = optimizer.scan([told.save()])["sessions"]
    session = optimizer.start_session("agent", "task %s" % token,
                                      metadata={"note": key, "deep": [{"x": token}]})
    optimizer.log_event(session.id, "TOOL_CALL",
                        {"command": "export API_KEY=%s" % key, "args": {"password": password}})
    optimizer.import_session(so.Session("imported", "A", "t " + token, events=[
        so.SessionEvent("e1", "", EventType.TOOL_CALL,
                        {"command": "login --password %s" % password})]).to_dict())
    optimizer.log_hook({"session_id": "live", "hook_event_name": "UserPromptSubmit",
                        "prompt": "p " + token, "cwd": "/w/" + key})
    optimizer.log_hook(
        {"session_id": "live", "hook_event_name": "PostToolUse", "tool_name": "Bash", "cwd": "/w",
         "tool_input": {"command": "mysql -p%s" % password}, "tool_response": {"stdout": key}})
    optimizer.summaries()
    exported = [optimizer.export_report(row["id"], form) for form in so.FORMATS]
    stored = stored_bytes(optimizer.store.root).replace(str(tmp_path).encode(), b"")
    for secret in PLANTED:
        assert secret.encode() not in stored, secret
        assert not any(secret in report for report in exported), secret
    kept = optimizer.get_session(session.id)  # and what is no secret is kept as it was told
    assert (kept.events[1].data["args"].keys() == {"password"}
            and kept.metadata["deep"][0].keys() == {"x"})


# ==================================================================================================
# Quick functions
# ==================================================================================================

def test_quick_functions_stand_for_the_methods(tmp_path, home):
    first = so.get_optimizer(str(tmp_path / "store"))
    assert (so.get_optimizer() is first is so._default_optimizer
            is so.get_optimizer(str(tmp_path / "store")))
    session = so.start_session("forge", "t", model="OPUS", session_id="s", metadata={"k": 1})
    assert (session.model, session.id, session.metadata) == ("opus", "s", {"k": 1})
    event = so.log_event("s", EventType.AI_RESPONSE, {"d": 1}, tokens_input=10, tokens_output=20,
                         duration_ms=30)
    assert ((event.data, event.tokens_input, event.tokens_output, event.duration_ms)
            == ({"d": 1}, 10, 20, 30))
    assert (so.end_session("s", status=SessionStatus.FAILED) is session
            and session.status is SessionStatus.FAILED)
    assert (so.analyze_session("s").total_tokens == 30
            and so.get_agent_stats("forge", days=7)["period_days"] == 7)
    assert (so.get_optimizer(str(tmp_path / "other")) is not first
            and so.get_optimizer().list_sessions() == [])
    assert os.listdir(str(home)) == []


def test_quick_functions_have_the_parameters_of_their_methods():
    import inspect
    for name, method in (("start_session", "start_session"), ("end_session", "end_session"),
                         ("log_event", "log_event"),
                         ("analyze_session", "analyze"), ("get_agent_stats", "agent_statistics")):
        own = [(p.name, p.default)
               for p in inspect.signature(getattr(so, name)).parameters.values()]
        its = [(p.name, p.default) for p in inspect.signature(
            getattr(SessionOptimizer, method)).parameters.values()][1:]
        assert own == its


SIGNATURES = {
    "start_session": "agent task model='default' session_id=None metadata=None",
    "end_session": "session_id status=COMPLETED", "get_session": "session_id",
    "list_sessions": "agent=None status=None since=None limit=100", "delete_session": "session_id",
    "log_event": ("session_id event_type data=None tokens_input=0 tokens_output=0 duration_ms=0 "
                  "usage=None model='' rate=''"),
    "analyze": "session_id",
    "compare_sessions": "session_ids", "agent_statistics": "agent days=30",
    "export_report": "session_id format='json'", "import_session": "data"}


def test_signatures_are_those_of_the_contract():
    import inspect
    for name, expected in SIGNATURES.items():
        shown = []
        for parameter in (
                list(inspect.signature(getattr(SessionOptimizer, name)).parameters.values())[1:]):
            default = parameter.default
            default = default.name if isinstance(default, SessionStatus) else repr(default)
            shown.append(parameter.name if parameter.default is parameter.empty
                         else "%s=%s" % (parameter.name, default))
        assert " ".join(shown) == expected


# ==================================================================================================
# Command line
# ==================================================================================================

CALLS = [  # a command line, and the calls of the library it makes
    ("start forge task", [("start_session", dict(agent="forge", task="task", model="default",
                                                 session_id=None, metadata=None))]),
    ("start forge task --model opus --id x --metadata '{\"k\": 1}' -q",
     [("start_session",
       dict(agent="forge", task="task", model="opus", session_id="x", metadata={"k": 1}))]),
    ("start forge task --format json",
     [("start_session",
       dict(agent="forge", task="task", model="default", session_id=None, metadata=None))]),
    ("end s1", [("end_session", dict(session_id="s1", status=SessionStatus.COMPLETED))]),
    ("end s1 --status abandoned",
     [("end_session", dict(session_id="s1", status=SessionStatus.ABANDONED))]),
    (("log s1 FILE_READ --data '{\"file_path\": \"a\"}' --tokens-in 5 --tokens-out 6 "
      "--duration-ms 7"),
     [("log_event", dict(session_id="s1", event_type="FILE_READ", data={"file_path": "a"},
                         tokens_input=5, tokens_output=6, duration_ms=7))]),
    ("log s1 custom", [("log_event", dict(session_id="s1", event_type="custom", data=None,
                                          tokens_input=0, tokens_output=0, duration_ms=0))]),
    ("list", [("list_sessions", dict(agent=None, status=None, since=None, limit=20))]),
    ("list --agent forge",
     [("list_sessions", dict(agent="forge", status=None, since=None, limit=sys.maxsize))]),
    ("list --agent forge --status active --since 2026-03-01T10:00:00Z --limit 3 --format json",
     [("list_sessions", dict(agent="forge", status=SessionStatus.ACTIVE, since=datetime(
         2026, 3, 1, 10, tzinfo=timezone.utc), limit=sys.maxsize))]),
    ("repair --discard", [("repair", dict(discard=True))]),
    ("delete s1", [("delete_session", dict(session_id="s1"))]),
    ("analyze s1", [("analyze", dict(session_id="s1")), ("get_session", dict(session_id="s1"))]),
    ("analyze s1 --format markdown --fail-under 1",
     [("analyze", dict(session_id="s1")), ("get_session", dict(session_id="s1"))]),
    ("stats", [("summaries", dict(progress=None)), ("agent_statistics", dict(agent="", days=30)),
               ("summaries", dict(days=30))]),
    ("stats forge --days 7 --format json",
     [("summaries", dict(progress=None)), ("agent_statistics", dict(agent="forge", days=7)),
      ("summaries", dict(days=7))]),
    ("compare s1 s2", [("compare_sessions", dict(session_ids=["s1", "s2"]))]),
    ("export s1", [("export_report", dict(session_id="s1", format="text"))]),
    ("export s1 --format json", [("export_report", dict(session_id="s1", format="json"))]),
    ("scan . --no-store --again --agent codex --project p --since 2026-03-01T10:00:00Z",
     [("scan", dict(paths=["."], agent="codex", project="p", since=datetime(
         2026, 3, 1, 10, tzinfo=timezone.utc), store=False, again=True, jobs=0))]),
    ("scan", [("scan", dict(paths=None, agent="", project="", since=None, store=True,
                            again=False, jobs=0))]),
    ("scan --jobs 3", [("scan", dict(paths=None, agent="", project="", since=None, store=True,
                                     again=False, jobs=3))]),
    ("advice", [("agent_statistics", dict(agent="", days=30))]),
    ("whatif cap 2k --tool Bash", [("whatif", dict(policy="cap 2k --tool Bash", paths=None))]),
    ("whatif clear --older 5 --at-least 1k --when-rebuilding --paths .",
     [("whatif", dict(policy="clear --older 5 --at-least 1k --when-rebuilding", paths=["."]))]),
    ("alerts", [("alerts", dict(since=None, agent=None, thresholds={}))]),
    ("alerts --agent forge --minutes 9 --dollars 1",
     [("alerts", dict(since=None, agent="forge", thresholds={"minutes": 9, "dollars": 1})),
      ("summaries", {})]),
    ("import session.json", [("import_session", dict(data=WHOLE_SESSION))]),
]


FACADE = sorted({name for _, calls in CALLS for name, _ in calls})


@pytest.mark.parametrize("line, calls", CALLS, ids=[row[0] for row in CALLS])
def test_a_command_is_one_call_of_the_library(line, calls, tmp_path, monkeypatch, capsys):
    import inspect
    root = str(tmp_path / "store")
    for name in ("s1", "s2"):
        SessionOptimizer(root).start_session("forge", "t", session_id=name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(str(tmp_path / "empty"))
    write("session.json", json.dumps(WHOLE_SESSION))
    made_calls, depth = [], []

    def recorder(name, method):
        def record(self, *args, **kwargs):
            if not depth:
                bound = inspect.signature(method).bind(self, *args, **kwargs)
                made_calls.append((name, dict(list(bound.arguments.items())[1:])))
            depth.append(name)
            try:
                return method(self, *args, **kwargs)
            finally:
                depth.pop()
        return record
    for name in FACADE:
        monkeypatch.setattr(SessionOptimizer, name, recorder(name, getattr(SessionOptimizer, name)))
    assert so.main(["--store", root] + shlex.split(line)) == 0
    assert [name for name, _ in made_calls] == [name for name, _ in calls]
    for (_, given), (_, expected) in zip(made_calls, calls):
        assert {name: given.get(name) for name in expected} == expected
    assert capsys.readouterr().err == ""


def test_every_command_is_in_the_table_of_calls():
    tried = {row[0].split()[0] for row in CALLS}
    # which call no more than they print
    assert set(so.commands()) - tried == {"version", "help", "hook"}


BAD_LINES = [
    "start", "start a", "start a b c", "log s1", "log s1 CUSTOM --data {",
    "log s1 CUSTOM --data []", "log s1 CUSTOM --data NaN",
    "log s1 CUSTOM --tokens-in -1", "log s1 CUSTOM --tokens-in 1.5", "log s1 CUSTOM --tokens-in x",
    "list --limit -1", "list --limit x",
    "list --since soon", "list --since 5y", "list --status DONE", "end s1 --status DONE",
    "stats a b", "stats a --days x", "compare", "export",
    "export s1 --format pdf", "analyze s1 --fail-under x", "scan --fail-under 200",
    "analyze s1 --fail-under -1", "scan --by year", "scan --color pink", "scan --format yaml",
    "import", "frobnicate", "--frobnicate", "list --frobnicate",
    "start a b --mod opus", "start a b --metadata []", "version now", "--store", "list extra"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_command_lines_end_with_2(line, tmp_path, capsys, home):
    assert so.main(shlex.split(line)) == 2
    shown = capsys.readouterr()
    assert "usage:" in shown.err and shown.out == "" and os.listdir(str(home)) == []


FAILING = [
    ("analyze nobody", "nobody"), ("end nobody", "nobody"), ("log nobody CUSTOM", "nobody"),
    ("delete nobody", "nobody"), ("export nobody", "nobody"),
    ("compare s1 nobody", "nobody"), ("compare s1 s1", "2"), ("log s1 NAP", "NAP.*FILE_READ"),
    ("start a t --id s1", "end s1 --status ABANDONED"),
    ("start a t --id ../x", "A-Z"), ("analyze ../x", "list"), ("scan nowhere", "nowhere"),
    ("import nowhere.json", "nowhere.json"), ("export s1 --output no/such/place", "no/such/place"),
    ("log s1 CUSTOM --tokens-in 9999999999999999", "tokens_input")]


@pytest.mark.parametrize("line, says", FAILING, ids=[row[0] for row in FAILING])
def test_failed_requests_end_with_1_and_say_why(line, says, tmp_path, monkeypatch, capsys):
    root = str(tmp_path / "store")
    SessionOptimizer(root).start_session("forge", "t", session_id="s1")
    before = stored_bytes(os.path.join(root, "sessions"))
    monkeypatch.chdir(str(tmp_path))
    assert so.main(["--store", root] + shlex.split(line)) == 1
    shown = capsys.readouterr()
    assert (re.search(says, unwrapped(shown.err), re.S) and shown.out == ""
            and "Traceback" not in shown.err)
    assert stored_bytes(os.path.join(root, "sessions")) == before


def test_statuses_of_real_processes(tmp_path):
    store = str(tmp_path / "store")
    status, out, err = command("--store", store, "start", "FORGE", "Mend it",
                               "--model", "opus", "-q")
    identity = out.strip()
    assert (status, err) == (0, "") and re.match(r"forge_\d{8}_\d{6}$", identity)
    for _ in range(2):
        status, out, err = command("log", identity, "FILE_READ", "--data", '{"file_path": "a.py"}',
                                   "--tokens-in", "1000", "--store", store)
        assert (status, err) == (0, "") and out.startswith("Event logged: " + identity)
    assert command("end", identity, "--store=" + store)[0] == 0
    status, out, err = command("analyze", identity, "--store", store, "--fail-under", "50")
    assert status == 0 and "50.0/100" in out and err == ""
    status, out, err = command("analyze", identity, "--store", store, "--fail-under", "50.1")
    assert status == 3 and "50.0/100" in out and "below 50.1" in err
    assert command("analyze", "nobody", "--store", store)[0] == 1
    assert command("analyze", "--store", store)[0] == 2
    status, out, err = command("analyze", identity, "--format", "json", SESSIONOPTIMIZER_HOME=store)
    assert status == 0 and json.loads(out)["total_waste_tokens"] == 1_000
    status, out, _ = python("-m", "sessionoptimizer", "version", PYTHONPATH=HERE)
    assert (status, out) == (0, "sessionoptimizer %s\n" % so.__version__)


def test_json_stands_alone_on_standard_output(tmp_path, capsys):
    root = str(tmp_path / "store")

    def asked(line, *, status=0):
        assert so.main(shlex.split(line) + ["--store", root, "--format", "json"]) == status
        return json.loads(capsys.readouterr().out)
    assert asked("list") == [] and asked("stats nobody")["sessions"] == 0
    first = asked("start forge 'Mend it' --id s1")
    assert ((first["id"], first["agent"], first["status"]) == ("s1", "FORGE", "ACTIVE")
            and "events" not in first)
    asked("start forge two --id s2")
    assert {row["id"] for row in asked("list")} == {"s1", "s2"}
    assert set(asked("list --limit 1")[0]) >= {"id", "agent", "task", "status", "model",
                                               "started_at", "ended_at", "total_tokens"}
    assert asked("analyze s1 --fail-under 100")["efficiency_score"] == 100
    assert (asked("compare s1 s2")["averages"]["tokens"] == 0
            and asked("stats forge")["sessions_analyzed"] == 2)
    result = asked("scan %s --fail-under 99"
                   % shlex.quote(os.path.join(SAMPLES, "claude-code", "large-file")), status=3)
    consistent(result)
    assert result["sessions"][0]["issues"][0]["issue_type"] == "LARGE_FILE_UNCOMPRESSED"
    assert asked("alerts") is not None


def test_a_beginning_or_last_serves_as_an_id(tmp_path, capsys):
    root = str(tmp_path / "store")
    now = datetime.now(timezone.utc)
    optimizer = SessionOptimizer(root)
    for number, name in enumerate(("alpha-1", "alpha-2", "beta", "beta-2")):
        made(optimizer, name, now - timedelta(minutes=number), [read_event(number)])

    def asked(name):
        status = so.main(["--store", root, "analyze", name, "--format", "json"])
        shown = capsys.readouterr()
        return json.loads(shown.out)["session_id"] if status == 0 else shown.err
    assert asked("alpha-2") == "alpha-2" and asked("last") == "alpha-1"
    assert asked("beta") == "beta" and asked("beta-") == "beta-2"
    message = asked("alpha")
    assert ("'alpha' begins 2 ids: give more of " in message and "alpha-1" in message
            and "alpha-2" in message)
    assert "no session 'gamma'" in asked("gamma") and asked("").startswith("sessionoptimizer:")
    empty = str(tmp_path / "empty")
    assert (so.main(["--store", empty, "analyze", "last"]) == 1
            and "no session yet" in capsys.readouterr().err)


def test_a_stream_of_events(tmp_path):
    root = str(tmp_path / "store")
    optimizer = SessionOptimizer(root)
    session = optimizer.start_session("forge", "t", session_id="s1")
    good = [{"event_type": "FILE_READ", "data": {"file_path": "a"}, "tokens_input": 5},
            {"event_type": "custom", "tokens_output": 2, "duration_ms": 3}]
    text = "\n\n".join(json.dumps(event) for event in good) + "\n"
    assert command("--store", root, "log", "s1", "-", stdin=text)[::2] == (0, "")
    bad = [json.dumps(good[0]), "{", "[]", '{"data": {}}', '{"event_type": "NAP"}',
           '{"event_type": "CUSTOM", "tokens_input": -1}',
           '{"event_type": "CUSTOM", "data": 5}', '{"event_type": ["x"]}',
           '{"event_type": "CUSTOM", "data": {"x": NaN}}', "[" * 100_000, "\ufeff",
           json.dumps(good[1])]
    status, out, err = command("--store", root, "log", "s1", "-", stdin="\n".join(bad))
    assert status == 1 and "Events logged: 2, lines skipped: 10" in out and "Traceback" not in err
    assert [int(number) for number in re.findall(r"line (\d+) skipped", err)] == list(range(2, 12))
    optimizer.get_session("s1")
    assert [event.tokens for event in session.events] == [0, 5, 2, 5, 2]


def test_a_stream_is_logged_as_it_comes(tmp_path):
    root = str(tmp_path / "store")
    optimizer = SessionOptimizer(root)
    optimizer.start_session("forge", "t", session_id="s1")
    process = subprocess.Popen([sys.executable, MODULE, "--store", root, "log", "s1", "-"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for count in (1, 2):
        process.stdin.write(b'{"event_type": "CUSTOM", "tokens_input": 1}\n')
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while optimizer.get_session("s1").total_tokens < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert optimizer.get_session("s1").total_tokens == count
    process.communicate()
    assert process.returncode == 0


@posix_only
def test_interrupting_ends_quietly(tmp_path):
    root = str(tmp_path / "store")
    optimizer = SessionOptimizer(root)
    optimizer.start_session("forge", "t", session_id="s1")
    process = subprocess.Popen([sys.executable, MODULE, "--store", root, "log", "s1", "-"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdin.write(b'{"event_type": "CUSTOM", "tokens_input": 1}\n')
    process.stdin.flush()
    while optimizer.get_session("s1").total_tokens < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode == 130 and err == b""
            and optimizer.get_session("s1").total_tokens == 1)


@posix_only
@pytest.mark.parametrize("line", ["list", "analyze s1", "help", "help scan", "--help", "version",
                                  "--version", "scan SAMPLES --no-store", "log s1 CUSTOM"])
def test_a_closed_pipe_ends_quietly(tmp_path, line):
    root = str(tmp_path / "store")
    SessionOptimizer(root).start_session("forge", "t", session_id="s1")
    receive, send = os.pipe()
    os.close(receive)
    words = shlex.split(line.replace("SAMPLES", shlex.quote(os.path.join(SAMPLES, "gemini"))))
    process = subprocess.Popen(
        [sys.executable, MODULE] + words
        + ([] if "--version" in words or "--help" in words else ["--store", root]), stdout=send,
        stderr=subprocess.PIPE)
    os.close(send)
    err = process.communicate()[1]
    assert (process.returncode, err) == (0, b"")


def test_nothing_is_made_at_home_when_nothing_is_stored(home, tmp_path):
    for line in ("list", "stats nobody", "version", "help", "help log", "analyze x", "log x CUSTOM",
                 "scan", "alerts", "delete x"):
        status, out, err = command(*shlex.split(line))
        assert status in (0, 1) and "Traceback" not in err and os.listdir(str(home)) == [], line
    status, out, err = command("start", "a", "t", "-q")
    assert status == 0 and os.listdir(str(home)) == [".sessionoptimizer"]
    if os.name == "posix":
        assert stat.S_IMODE(os.stat(str(home / ".sessionoptimizer")).st_mode) == 0o700


def test_help_and_version_return_their_status(capsys):
    assert [so.main(line) for line in (["help"], ["--help"], ["help", "scan"], ["scan", "--help"],
                                       ["version"], ["--version"])] == [0] * 6
    shown = capsys.readouterr()
    assert ("--fail-under" in shown.out and shown.err == ""
            and shown.out.count("sessionoptimizer " + so.__version__) == 2)
    overview = so._overview()
    for name, command in so.commands().items():
        assert so.main(["help", name]) == 0
        shown = capsys.readouterr().out
        assert command.summary in shown and command.example in shown and "status: 0 done" in shown
        assert (re.search(rf"^  {name} +{re.escape(command.summary)}$", overview, re.M)
                and command.example in overview)
        line = shlex.split(command.example.replace("3f2a 91bc", "a b"))
        assert so.build_parser().parse_args(line).func is command.run
    assert overview.index("scan ") < overview.index("list ") < overview.index("start ")


def test_injection_through_every_field_of_the_command_line(tmp_path):
    root = str(tmp_path / "store")
    nasty = "x| y\n# z\x1b[31m\u202e`c` <script>"
    status, identity, err = command("--store", root, "start", nasty, nasty, "--model", nasty,
                                    "--metadata", json.dumps({"k": nasty}), "-q")
    assert status == 0 and re.match(r"[A-Za-z0-9._-]+\n$", identity)
    identity = identity.strip()
    for kind, data in (("FILE_READ", {"file_path": nasty}),
                       ("SEARCH", {"query": nasty, "tool": nasty}),
                       ("ERROR", {"tool": nasty, "message": nasty})):
        for _ in range(2):
            command("--store", root, "log", identity, kind, "--data", json.dumps(data),
                    "--tokens-in", "10")
    assert command("--store", root, "log", identity, nasty)[0] == 1
    for line in (["list"], ["stats", nasty], ["analyze", identity, "--evidence"],
                 ["export", identity, "--format", "markdown"], ["alerts"],
                 ["analyze", nasty], ["list", "--agent", nasty], ["compare", identity, nasty],
                 ["log", identity, nasty], ["end", identity]):
        status, out, err = command("--store", root, *line)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out + err), line
        assert "\n# z" not in out + err


def test_output_fits_a_terminal_that_knows_no_unicode(tmp_path):
    root = str(tmp_path / "store")
    SessionOptimizer(root).start_session("forge", "é \U0001f600 … " + "x" * 300, session_id="s1")
    for line in (["list"], ["analyze", "s1"], ["export", "s1", "--format", "markdown"],
                 ["stats", "forge"], ["end", "s1"]):
        done = subprocess.run([sys.executable, MODULE, "--store", root] + line,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=dict(os.environ, PYTHONIOENCODING="ascii"))
        assert done.returncode == 0 and b"Traceback" not in done.stderr, (line, done.stderr)


def test_no_colour_where_no_terminal_is(tmp_path):
    root = str(tmp_path / "store")
    SessionOptimizer(root).start_session("forge", "t", session_id="s1")
    for words in (["analyze", "s1"], ["list"], ["scan", os.path.join(SAMPLES, "gemini")]):
        status, out, err = command("--store", root, *words)
        assert status == 0 and "\x1b" not in out + err and "\r" not in out + err


def test_a_report_is_written_to_a_file(tmp_path, capsys):
    root, target = str(tmp_path / "store"), tmp_path / "report.md"
    SessionOptimizer(root).start_session("forge", "é", session_id="s1")
    assert so.main(["--store", root, "export", "s1", "--format", "markdown", "--output",
                    str(target)]) == 0
    shown = read(target).decode("utf-8")
    assert (shown.startswith("# Session Optimization Report\n") and "é" in shown
            and shown.endswith("\n"))
    assert capsys.readouterr().out == "Report written: %s\n" % target


@pytest.mark.parametrize("text, seconds", [("90m", 5_400), ("12h", 43_200), ("7d", 604_800),
                                           ("2w", 1_209_600), ("30s", 30), ("1.5h", 5_400)])
def test_times_on_the_command_line(text, seconds):
    ago = (datetime.now(timezone.utc) - so._when(text)).total_seconds()
    assert (abs(ago - seconds) < 60
            and so._when("2026-03-01T10:00:00Z") == datetime(2026, 3, 1, 10, tzinfo=timezone.utc))


def test_an_import_takes_sessions_and_transcripts(tmp_path, capsys, monkeypatch):
    root = str(tmp_path / "store")
    monkeypatch.chdir(str(tmp_path))
    own, other = (write("own.json", json.dumps(dict(WHOLE_SESSION, id="own"))),
                  write("bad.json", '{"id": "x"}'))
    transcript = tiny(tmp_path).save()
    assert so.main(["--store", root, "import", own, transcript]) == 0
    assert (re.findall(r"Imported: (\S+)", capsys.readouterr().out)
            == ["own", "11111111-2222-4333-8444-555555555555"])
    assert so.main(["--store", root, "import", other]) == 1
    shown = capsys.readouterr()
    assert "no agent, task" in shown.err and "Traceback" not in shown.err
    assert len(SessionOptimizer(root).list_sessions()) == 2
    assert so.main(["--store", root, "import", write("none.txt", "x\n")]) == 1
    shown = capsys.readouterr()
    assert shown.err.endswith("none.txt: not a transcript of a known agent\n"), shown.err


STANDS = [  # a command line, and the command in it
    ("log s1 -", "log"), ("--store log log s1 CUSTOM", "log"), ("--store=d log s1 CUSTOM", "log"),
    ("--color never --store d hook --guard", "hook"), ("--color always --store scan list", "list"),
    ("--version", ""), ("", ""), ("-- log", "log"), ("--frob scan", "scan"), ("scna", "scna")]


@pytest.mark.parametrize("line, command", STANDS)
def test_the_parser_of_one_command_reads_what_the_whole_one_reads(line, command, capsys):
    """A hook starts once per event: only the command that is named is made."""
    argv, read = shlex.split(line), []
    assert so._command_word(argv) == command
    for only in ("", command):
        try:
            read.append(vars(so.build_parser(only).parse_args(argv)))
        except SystemExit as stop:
            read.append((stop.code, capsys.readouterr().err))
    assert read[0] == read[1]


MISTYPED = [  # a command line, what it is told, and whose usage it sees
    ("scna", "no command 'scna': did you mean scan?", "sessionoptimizer [-h]"),
    ("scan --sinc 7d", "unknown: --sinc: did you mean --since?", "sessionoptimizer scan"),
    ("list --stroe x", "did you mean --store?", "sessionoptimizer list"),
    ("analyze x --evidnece", "did you mean --evidence?", "sessionoptimizer analyze"),
    ("--limit 3 list", "--limit is unknown before a command, it may stand behind one: did",
     "sessionoptimizer [-h]"),
    ("frobnicate", "no command 'frobnicate'\n", "sessionoptimizer [-h]"),
    ("list zzz", "unknown: zzz\n", "sessionoptimizer list")]


@pytest.mark.parametrize("line, says, usage", MISTYPED, ids=[row[0] for row in MISTYPED])
def test_a_mistyped_word_is_told_what_was_meant(line, says, usage, capsys):
    assert so.main(shlex.split(line)) == 2
    shown = capsys.readouterr().err
    assert says in shown and shown.startswith("usage: " + usage), shown


@pytest.mark.parametrize("start", [[MODULE], ["-m", "sessionoptimizer"]], ids=["script", "module"])
@pytest.mark.parametrize("line", ["-h", "list -h", "list --zzz"])
def test_the_usage_names_the_program_in_the_form_it_was_started_in(start, line):
    done = subprocess.run([sys.executable, *start, *line.split()], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(os.environ, COLUMNS="300"))
    usage = done.stdout.decode("utf-8").split("[")[0].split()
    own = [os.path.basename(sys.executable), *start], [sys.executable, *start]
    assert usage[0] == "usage:" and usage[1:4 if start[1:] else 3] in own
    assert usage[4 if start[1:] else 3:] == ["list"] * ("list" in line)


def test_help_about_nothing(capsys):
    assert so.main(["help", "scn"]) == 2
    assert "did you mean scan?" in capsys.readouterr().err


def test_without_a_command_it_says_what_it_is_and_what_is_here(home, capsys):
    assert so.main([]) == 0
    shown = capsys.readouterr().out
    assert "none where agents keep them" in shown and all(
        "sessionoptimizer " + words in shown for words in ("scan\n", "analyze last", "help\n"))
    place = home / ".claude" / "projects" / "p"
    place.mkdir(parents=True)
    write(place / "a.jsonl", "{}")
    assert so.main([]) == 0 and "1 file of claude-code" in capsys.readouterr().out
    place = home / ".local" / "share" / "opencode"
    place.mkdir(parents=True)
    write(place / "opencode.db", "")
    assert so.main([]) == 0
    assert "1 file of claude-code, 1 file of opencode" in capsys.readouterr().out


FILTERS = [  # arguments of scan after the samples, status, what is said
    ("--since 2031-01-01", 0, "6 sessions, none of them as asked for; the newest is of 2026-"),
    ("--since 2031-01-01 --fail-under 1", 3, "nothing to judge"),
    ("--project nowhere --fail-under 1", 3, "nothing to judge"),
    ("--agent claude --fail-under 99", 2, "did you mean claude-code?"),
    ("--agent forge", 2, "agents: "), ("--agent codex --fail-under 1", 3, "nothing to judge"),
    ("--agent 'Claude Code' --fail-under 1", 0, "SESSIONS"),
    ("--agent claude-code --fail-under 1", 0, "SESSIONS")]


@pytest.mark.parametrize("line, status, says", FILTERS, ids=[row[0] for row in FILTERS])
def test_a_filter_that_matches_nothing_says_so_and_passes_no_gate(
        optimizer, line, status, says, tmp_path):
    folder = tmp_path / "some"
    for name in sorted(os.listdir(TRANSCRIPTS))[:6]:
        shutil.copytree(os.path.join(TRANSCRIPTS, name), str(folder / name))
    found, out, err = run(optimizer, "scan", str(folder), *shlex.split(line))
    count = len(optimizer.scan([str(folder)])["sessions"])
    assert found == status and says.replace("6 sessions", f"{count} sessions") in out + err, (
        found, out, err)


@pytest.mark.parametrize("line", ["list --agent forg", "stats forg", "alerts --agent forg"])
def test_an_unknown_agent_is_a_bad_command_line(optimizer, line):
    assert run(optimizer, *line.split())[0] == 0  # nothing there: every name may come
    store_session(optimizer, "s", [READ, ANSWER])
    status, out, err = run(optimizer, *line.split())
    assert (status, out) == (2, "") and "did you mean forge?" in err and "agents: forge" in err
    assert run(optimizer, *line.replace("forg", "Forge").split())[0] == 0


@pytest.mark.parametrize("line, says", [
    ("scan", "argument PATH: '' is not a value: it is empty"),
    ("whatif none --paths", "--paths: ''"), ("import", "argument FILE: ''"),
    ("advice --apply", "--apply: ''"), ("export s --output", "--output: ''"),
    ("list --store", "--store: ''"), ("list --agent", "--agent: ''"), ("analyze", "no session ''"),
    ("delete", "no session ''"), ("compare s", "session_id: ''"), ("end", "no session ''")])
def test_a_variable_that_is_not_set_is_nothing_else(optimizer, line, says):
    store_session(optimizer, "s", [ANSWER])
    status, out, err = run(optimizer, *line.split(), "")
    assert (status, out) == (1 if "no session" in says else 2, "") and says in err
    assert os.listdir(optimizer.store.sessions) == ["s.json"]


@pytest.mark.parametrize("text", ["today", "yesterday", "Today"])
def test_days_on_the_command_line(text):
    now = datetime.now().astimezone()
    expected = datetime(now.year, now.month, now.day) - timedelta(days=text == "yesterday")
    assert so._when(text) == expected.astimezone()


@pytest.fixture
def crowded(optimizer):
    """A store with every kind of finding, long names and paths, and sessions logged by hand."""
    long = "a/very/long/path/" * 12 + "end.py"
    store_session(optimizer, "f" * 60,
                  [("FILE_READ", {"file_path": long, "tool": "Read"}, 30_000, 0)] * 3 + FAILED + [
                      ("SEARCH", {"query": "x" * 200}, 400, 9)] * 2 + [ANSWER] * 70,
                  agent="AN-AGENT-WITH-A-LONG-NAME")
    store_session(optimizer, "short", [READ, READ, ANSWER])
    optimizer.scan([SAMPLES])
    return optimizer


ONE_OF_EACH = [READ, READ, ("SEARCH", {"query": "q"}, 60, 1), ("SEARCH", {"query": "q"}, 60, 1),
               ("ERROR", {"message": "m", "tool": "t"}, 1, 0),
               ("USER_MESSAGE", {}, 1, 0), ("AI_RESPONSE", {}, 0, 1)]


@pytest.mark.parametrize("line", ["", "list --limit 1", "stats --days 1", "stats --by day",
                                  "stats --by tool", "alerts --waste 0 --dollars 0 --minutes 0",
                                  "advice", "whatif none", "whatif return",
                                  "analyze one --evidence", "export one --format markdown",
                                  "export one --format html", "compare one two", "scan t --again",
                                  "scan t --again --format html", "scan none"])
def test_one_of_a_thing_is_not_told_as_many(optimizer, line, tmp_path, monkeypatch):
    """A store, a transcript and a folder with exactly one of everything."""
    monkeypatch.chdir(str(tmp_path))
    store_session(optimizer, "one", ONE_OF_EACH, step=0.0)
    store_session(optimizer, "two", [("AI_RESPONSE", {}, 0, 1)])
    transcript = tiny(tmp_path / "t")
    transcript.lines.append(b"{damaged\n")
    transcript.save()
    (tmp_path / "none").mkdir()
    write(tmp_path / "none" / "x.jsonl", "{}\n")
    optimizer.scan([str(tmp_path / "t")])
    _, out, err = run(optimizer, *line.split())
    found = re.findall(r"(?<![\d.,:#=-])1 (?:[a-z-]+ )?[a-z]+s\b(?! (?:than|as)\b)",
                       re.sub("<style>.*?</style>", "", out + err, flags=re.S))
    assert not [text for text in found
                if not re.search(r"(ss|us|is|hides|was|minutes active|has)$", text)], (found, out)
    assert out


def test_notes_of_many_sessions_are_added_up():
    rows = [{"notes": notes} for notes in (
        ["2 of the responses: 5", "3 of the repeats: small (tokens: 1,250)",
         "no price for model 'x 5'"],
        ["1 of the responses: 7", "1 of the repeats: small (tokens: 50)",
         "no price for model 'x 5'"], ["no price for model 'x 6'"])]
    assert (so._scan_notes(rows)
            == ["3 of the responses: 12", "4 of the repeats: small (tokens: 1,300)",
                "no price for model 'x 5' (2 sessions)", "no price for model 'x 6' (1 session)"])


@pytest.mark.parametrize("width", [60, 70, 80, 120])
@pytest.mark.parametrize(
    "line", ["list", "scan t --again", "stats --by session", "stats --by agent",
             "alerts --waste 1 --dollars 0", "compare story other", "analyze last --evidence"])
def test_a_narrow_table_leaves_columns_out_and_cuts_no_word(optimizer, line, width, tmp_path,
                                                            monkeypatch, capsys):
    """Ids and paths lose their middle, texts end after a word."""
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setenv("COLUMNS", str(width))
    shutil.copytree(os.path.join(TRANSCRIPTS, "story-checkout"), "t")
    store_session(optimizer, "other", [READ, READ, ANSWER], agent="FORGE")
    optimizer.scan(["t"])
    story, = [session.id for session in optimizer.list_sessions() if session.id != "other"]
    so.main(["--store", optimizer.store.root,
             *line.replace("story", story).replace("last", story).split()])
    shown = re.sub(r"(?m)^  [$] .*\n", "", capsys.readouterr().out)  # commands stay on one line
    assert max(map(len, shown.splitlines())) <= width
    tables = [text for text in re.findall(r"\S*…\S*", shown)
              if not re.search(r"[/.~]|^…$|^[0-9a-z-]*…", text)]
    assert not tables, (tables, shown)
    if line == "list":
        assert (("CLAUDE-CODE" in shown) == (width > 60) and ("status" in shown) == (width > 80)
                and "session $" in shown)


def test_alerts_name_the_command_that_says_why(optimizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert "WHY" not in run(optimizer, "alerts")[1]
    store_session(optimizer, "bad", [READ, READ, READ, ANSWER])
    told = " ".join(run(optimizer, "alerts", "--dollars", "0", "--budget", "0.001/day")[1].split())
    assert (
        "BUDGET" in told
        and f"sessionoptimizer.py analyze bad --evidence --store {optimizer.store.root}" in told)


def test_statistics_of_no_recent_session_say_when_the_newest_was(optimizer):
    assert "The store has 0 sessions; the newest is of no day" in run(optimizer, "stats")[1]
    store_session(optimizer, "s", [ANSWER], minutes_ago=60 * 24 * 90)
    _, out, _ = run(optimizer, "stats")
    assert "last 30 days" in out and re.search(
        r"The store has 1 session; the newest is of 20\d\d-\d\d-\d\d \(--days asks", out)
    assert "The store has" not in run(optimizer, "stats", "--days", "91")[1]


def test_a_command_stays_on_one_line_and_other_lines_do_not():
    long = "sessionoptimizer " + "x" * 90 + " --evidence"
    shown = so.text_sections([so.Section("Why", lines=[so.Pasted(long), "$ " + "y " * 60,
                                                       "$ \x1b[31m"])], 60).splitlines()
    assert (shown[1] == "  $ " + long and max(map(len, shown[2:])) <= 60
            and shown[-1] == "  * $ [31m")


def test_a_list_says_how_many_it_leaves_out(optimizer):
    for number in range(3):
        store_session(optimizer, f"s{number}", [ANSWER])
    out = run(optimizer, "list", "--limit", "1")[1]
    assert out.splitlines()[-1] == "  * and 2 more (--limit 3 shows them)"
    assert "more" not in run(optimizer, "list", "--limit", "3")[1]
    assert "and 3 more (--limit 3 " in run(optimizer, "list", "--limit", "0")[1]
    narrowed = run(optimizer, "list", "--limit", "1", "--status", "active")[1]
    assert narrowed.splitlines()[-1] == out.splitlines()[-1]
    assert "more" not in run(optimizer, "list", "--limit", "0", "--status", "failed")[1]
    assert len(json.loads(run(optimizer, "list", "--limit", "2", "--format", "json")[1])) == 2


@pytest.mark.parametrize("line, most", [
    ("", 20), ("--limit 3", 3), ("--limit 3 --format json", 3), ("--status active", 30)])
def test_a_list_reads_no_more_heads_than_it_shows(optimizer, monkeypatch, capsys, line, most):
    for number in range(30):
        store_session(optimizer, f"s{number}", [ANSWER])
    heads, head = [], so.Store.head
    monkeypatch.setattr(so.Store, "head", lambda *told: heads.append(told) or head(*told))
    assert so.main(["--store", optimizer.store.root, "list", *line.split()]) == 0
    assert len(heads) == most


@pytest.mark.parametrize("by", so.GROUPS)
@pytest.mark.parametrize("name", ["scan t", "stats --days 9000"])
def test_a_table_by_something_is_all_that_is_printed_and_adds_up_to_the_bill(
        optimizer, name, by, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    shutil.copytree(os.path.join(TRANSCRIPTS, "story-checkout"), "t")
    shutil.copytree(os.path.join(SAMPLES, "codex", "codex-story-logging"),
                    os.path.join("t", "codex"))
    bill = optimizer.scan(["t"])["bill"]["total"]
    _, out, _ = run(optimizer, *name.split(), "--by", by)
    lines = out.splitlines()
    assert lines[0].startswith(f"BY {by.upper()} (") and len(re.findall("(?m)^[A-Z]{2}", out)) == 1
    assert lines[-1].split()[0] == "total" and so.dollars(bill) in lines[-1].split()
    groups = (
        json.loads(run(optimizer, *name.split(), "--by", by, "--format", "json")[1])["groups"][by])
    assert (sum(group["estimated_cost"] for group in groups) == pytest.approx(bill)
            and "total" not in [group["key"] for group in groups])


GUESSES = [("scan t --agent claud", "claude-code"), ("scan --by modle", "model"),
           ("scan --format jsn", "json"), ("whatif compct", "compact"),
           ("list --status complted", "COMPLETED"), ("alerts --fail-on hihg", "HIGH"),
           ("stats --split yesterdy", "yesterday"),
           ("log s FILE_RAED", "FILE_READ"), ("scna", "scan"), ("scan --sinc 7d", "--since"),
           ("help scna", "scan"), ("list --colour always", "--color"),
           ("--formt json list", "--format"), ("--formt=json list", "--format"),
           ("--sotre x list", "--store"), ("--frmat json", "--format"),
           ("whatif cap 1 --paths t --tool Raed", "read"),
           ("whatif cap 1 --paths t --tool file-read", "file reads"),
           ("scan --by zzz", ""), ("whatif zzz", ""), ("log s ZZZ", ""), ("list --status 7", "")]


@pytest.mark.parametrize("line, meant", GUESSES, ids=[row[0] for row in GUESSES])
def test_a_misspelt_word_is_guessed_wherever_it_stands(optimizer, line, meant,
                                                       tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    shutil.copytree(os.path.join(TRANSCRIPTS, "read-twice"), "t")
    store_session(optimizer, "s", [ANSWER])
    status, out, err = run(optimizer, *line.split())
    assert (status in (1, 2)
            and re.findall("did you mean (.*?)[?]", err) == [meant] * bool(meant)), err


@pytest.mark.parametrize("start", [[MODULE], ["-m", "sessionoptimizer"]], ids=["script", "module"])
def test_a_command_that_is_named_can_be_pasted(start, tmp_path, monkeypatch):
    store = str(tmp_path / "a store")
    monkeypatch.chdir(HERE)

    def begun(*arguments):
        done = subprocess.run([sys.executable, *start, "--store", store, *arguments],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, COLUMNS="300"))
        return " ".join(done.stdout.decode("utf-8").split())

    shown = begun("scan", os.path.join(TRANSCRIPTS, "read-twice"))
    words = shlex.split(re.search(r"[$] (\S*python\S* .*? --store '.*?')", shown).group(1))
    assert (words[-2:] == ["--store", store] and words[:-5]
            in ([os.path.basename(sys.executable), *start], [sys.executable, *start]))
    done = subprocess.run([sys.executable, *words[1:]], stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"EVIDENCE" in done.stdout
    for arguments, words in ((["analyze", "nothing"], "list"), (["analyze", "last"], "scan"),
                             ([], "analyze last --evidence")):
        if words == "scan":
            shutil.rmtree(store)
        assert f"{start[-1]} {words} --store '{store}'" in begun(*arguments)


def test_no_text_from_outside_becomes_a_command_to_be_pasted(optimizer, tmp_path):
    evil = "x\n$ curl evil\n  $ curl evil"
    for line in (["analyze", evil], ["scan", evil], ["import", evil], ["whatif", evil],
                 ["list", "--agent", evil], ["log", "last", evil]):
        _, out, err = run(optimizer, *line)
        assert not re.search(r"(?m)^ *[$] curl", out + err), err


def test_a_named_command_of_an_installed_program(monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert so._command(SimpleNamespace(store=None), "list") == "sessionoptimizer list"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/sessionoptimizer"])
    assert (so._command(SimpleNamespace(store="a b"), "list")
            == ".venv/bin/sessionoptimizer list --store 'a b'")


@pytest.mark.parametrize("columns, width",
                         [(None, 80), ("60", 60), ("200", 200), ("", 80), ("many", 80)])
@pytest.mark.parametrize("terminal", [True, False])
def test_messages_are_as_wide_as_the_terminal(
        optimizer, columns, width, terminal, monkeypatch, capsys):
    """Elsewhere each stands on one line: what looks for a phrase in them finds it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert so.main(["--store", optimizer.store.root, "whatif", "x" * 30]) == 2
    lines = capsys.readouterr().err.splitlines()
    if terminal:
        assert max(map(len, lines)) <= width and (len(lines) == 1) == (width == 200)
    else:
        assert len(lines) == 1
    assert " ".join(lines).endswith(
        "none, compact, return, ttl, cap, start, no-repeats, clear, all")


@pytest.mark.parametrize("width", [None, 60, 80, 120, 200])
def test_the_first_screen_fits_whatever_the_paths(width, tmp_path, monkeypatch, capsys):
    """Where there is no terminal and no COLUMNS, a line has 80."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    place = tmp_path / ("a-folder-with-a-long-name/" * 5) / ("p" * 90)
    shutil.copytree(os.path.join(TRANSCRIPTS, "story-checkout"), str(place))
    store = os.path.join(str(tmp_path), "another-folder/" * 6, "store")
    for by in ([], ["--by", "session"], ["--by", "project"]):
        assert so.main(["scan", str(place), *by, "--store", store]) == 0
        shown = re.sub(r"(?m)^  [$] .*\n", "", capsys.readouterr().out)  # commands stay on one line
        assert ("KEPT, ALSO WHEN" in shown) is (not by) and "a-folder" not in shown
        assert [line for line in shown.splitlines() if len(line) > (width or 80)] == []
        assert by or "/store" in shown and ("…" in shown or (width or 80) >= 200)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(crowded, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    root, widest = crowded.store.root, 0
    for line in (["scan", SAMPLES], ["scan", SAMPLES, "--by", "project"], ["list", "--limit", "50"],
                 ["stats", "--days", "9000", "--by", "session"],
                 ["alerts", "--limit", "50"], ["analyze", "short", "--evidence"],
                 ["analyze", "fff", "--evidence"], ["analyze", "f714ed36", "--evidence"],
                 ["compare", "fff", "short", "f714ed36"],
                 ["help", "scan"] if width >= 80 else [], []):
        assert so.main([*line, "--store", root] if line and line[0] != "help" else line) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [text for text in shown if len(text) > width and text[:4] != "  $ "] == [], line
        widest = max(widest, *map(len, shown))
    assert widest > width - 12  # and a wide terminal is used
    if width >= 80:
        assert max(map(len, so._overview().splitlines())) <= 80


@pytest.mark.parametrize("when, environment, coloured", [
    ("always", {}, True), ("always", {"NO_COLOR": "1"}, True), ("never", {}, False),
    ("auto", {}, False)])
def test_colour_on_demand(optimizer, when, environment, coloured):
    store_session(optimizer, "s", [READ, READ, READ, ANSWER])
    for words in (["analyze", "s"], ["alerts"], ["list"]):
        for line in ([*words, "--color", when], ["--color", when, *words]):
            status, out, _ = command("--store", optimizer.store.root, *line, **environment)
            assert status == 0 and ("\033[1m" in out) is coloured, line
    assert "\033" not in command("--store", optimizer.store.root, "analyze", "s", "--format",
                                 "json", "--color", "always")[1]


@posix_only
def test_reports_in_files_are_for_their_owner(optimizer, tmp_path):
    store_session(optimizer, "s", [READ, READ, ANSWER])
    old, fresh = tmp_path / "old.html", tmp_path / "fresh.html"
    old.write_text("x")
    os.chmod(str(old), 0o644)
    for target in (old, fresh):
        for line in (["export", "s", "--format", "html"],
                     ["scan", os.path.join(TRANSCRIPTS, "read-twice"), "--format", "html"]):
            assert run(optimizer, *line, "--output", str(target))[0] == 0
            assert stat.S_IMODE(os.stat(str(target)).st_mode) == 0o600
    assert (run(optimizer, "export", "s", "--output", "/dev/null")[0] == 0
            and not stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o600)


def test_a_file_name_that_the_terminal_cannot_show(optimizer, tmp_path):
    store_session(optimizer, "s", [READ, READ, ANSWER])
    target = tmp_path / "\u2603.html"
    done = subprocess.run([sys.executable, MODULE, "--store", optimizer.store.root, "export", "s",
                           "--format", "html", "--output", str(target)],
                          env=dict(os.environ, PYTHONIOENCODING="cp1252"), capture_output=True)
    assert ((done.returncode, done.stderr) == (0, b"") and b"?.html" in done.stdout
            and target.exists())


@posix_only
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_errors(optimizer, closed):
    line = f"{sys.executable} {MODULE} --store {optimizer.store.root} scan {TRANSCRIPTS} {closed}"
    assert (subprocess.run(["sh", "-c", line], stdout=subprocess.DEVNULL, timeout=120).returncode
            == 0)


HOOKS = {"a bad option before it": (["-x", "hook"], b"{}"),
         "too large": (["hook"], b'{"x": "' + b"a" * 50_000_000 + b'"}'),
         "an endless number": (["hook"], b'{"session_id": ' + b"9" * 5000 + b"}")}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_says_one_line_and_ends_with_0(tmp_path, case):
    words, given = HOOKS[case]
    done = subprocess.run([sys.executable, MODULE, "--store", str(tmp_path / "s"), *words],
                          input=given, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"") and b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"sessionoptimizer")


def test_a_hook_reads_no_more_than_it_can(tmp_path, monkeypatch):
    """Beyond the size nothing is parsed, and what is left is read in pieces."""
    read_sizes = []

    class Pipe:
        def __init__(self, size):
            self.left = size

        def read(self, size):
            read_sizes.append(size)
            size = min(size, self.left)
            self.left -= size
            return b" " * size
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Pipe(3 * so.HOOK_SIZE)})())
    monkeypatch.setattr(so.json, "loads", lambda *_: pytest.fail("parsed"))
    assert so.main(["--store", str(tmp_path), "hook"]) == 0
    assert sys.stdin.buffer.left == 0 and max(read_sizes) == so.HOOK_SIZE + 1


@pytest.mark.parametrize("shell, name",
                         [("bash", "sessionoptimizer.bash"), ("zsh", "_sessionoptimizer")])
def test_the_completions_are_those_of_the_parser(shell, name):
    """Made anew by: python3 -m shtab --shell bash sessionoptimizer.build_parser"""
    shtab = pytest.importorskip("shtab")
    kept = read(os.path.join(HERE, "examples", "completions", name)).decode("utf-8")
    assert shtab.complete(so.build_parser(), shell=shell).strip() == kept.strip()


# The module as a whole, and its documentation.

def test_importing_the_module_stays_light():
    """A hook calls the command line once per event: what is heavy or rare is loaded where it is
    used."""
    heavy = ("argparse logging subprocess tempfile statistics hashlib html http pathlib "
             "typing sqlite3 decimal random shlex socket email urllib asyncio unittest pickle "
             "inspect csv").split()
    code = ("import sys; before = set(sys.modules); import sessionoptimizer; "
            "print(' '.join(set(sys.modules) - before))")
    status, out, err = python("-S", "-E", "-c",
                              "import sys; sys.path.insert(0, %r); %s" % (HERE, code))
    assert (status, err) == (0, "") and "sessionoptimizer" in out.split()
    loaded = {name.split(".")[0] for name in out.split()}
    # dataclasses loads inspect, and with it what inspect needs,
    # before Python 3.14: no choice of ours
    status, out, _ = python("-S", "-E", "-c",
                            "import sys, dataclasses, json; print(' '.join(sys.modules))")
    unavoidable = {name.split(".")[0] for name in out.split()}
    assert sorted(loaded & set(heavy) - unavoidable) == []
    assert not unavoidable & {"argparse", "typing", "logging", "pathlib", "hashlib"}


def banners(path):
    lines = read(path).decode("utf-8").split("\n")
    rule = "# " + "=" * 98
    return [lines[number + 1][2:] for number, line in enumerate(lines[:-2])
            if line == lines[number + 2] == rule and lines[number + 1].startswith("# ")]


ROOMS = ["Vocabulary", "Prices", "Errors", "Records", "Secrets", "Shell", "Context", "Accounting",
         "Analyzers", "Replay", "Reports", "Store", "Recorder", "Readers", "Scan",
         "SessionOptimizer", "Quick functions", "Command line"]


def test_the_map_in_the_docstring_equals_the_banners():
    map_of_rooms = so.__doc__.split("rooms of this module")[1]
    rooms = re.findall(r"^    ([A-Z][A-Za-z]*(?: [a-z]+)*)   +\S", map_of_rooms, re.M)
    assert rooms == banners(MODULE) == ROOMS
    assert banners(__file__) == [room for room in ROOMS if room in banners(__file__)]


def test_the_docstring_runs():
    assert (doctest.testmod(so, optionflags=doctest.ELLIPSIS).failed == 0
            < doctest.testmod(so).attempted)


def test_functions_and_classes_stay_small():
    tree = ast.parse(read(MODULE))
    sizes = [(node.end_lineno - node.lineno + 1, node.name, isinstance(node, ast.ClassDef))
             for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [(name, size) for size, name, is_class in sizes if size > 50 and not is_class] == []
    assert [(name, size) for size, name, is_class in sizes if size > 400 and is_class] == []


def test_names_only_look_up():
    """A room uses the rooms above it: there are no cycles. Errors may be raised everywhere."""
    tree, text = ast.parse(read(MODULE)), read(MODULE).decode("utf-8").split("\n")
    rule = "# " + "=" * 98
    starts = [number + 2 for number in range(len(text) - 2)
              if text[number] == text[number + 2] == rule]

    def room_of(node):
        return sum(start <= node.lineno for start in starts)
    places = {}
    for node in tree.body:
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        for name in ([getattr(node, "name", "")]
                     + [part.id for target in targets for part in ast.walk(target)
                        if isinstance(part, ast.Name)]):
            places[name] = room_of(node)
    hints = [hint for node in ast.walk(tree) for hint in (
        [node.returns] + [argument.annotation for argument in ast.walk(node.args)
                          if isinstance(argument, ast.arg)] if isinstance(node, ast.FunctionDef)
        else [node.annotation] if isinstance(node, ast.AnnAssign) else []) if hint]
    hints = {id(part) for hint in hints for part in ast.walk(hint)}
    down = set()
    for node in tree.body:
        parts = list(ast.walk(node))
        own = {part.arg for part in parts if isinstance(part, ast.arg)} | {
            part.id for part in parts
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        down |= {(ROOMS[room_of(node) - 1], part.id) for part in parts
                 if isinstance(part, ast.Name) and part.id not in own
                 and id(part) not in hints and places.get(part.id, 0) > room_of(node)}
    errors = {cls.__name__ for cls in all_subclasses(SessionOptimizerError)}
    assert {(room, name) for room, name in down if name not in errors} == set()


MOST_TOKENS = 90_900  # of the module, comments and layout left out


@pytest.mark.skipif(sys.version_info >= (3, 12),
                    reason="counted as Python up to 3.11 does: later ones look into f-strings")
def test_the_module_does_not_grow_and_no_room_takes_a_fifth():
    import tokenize
    left_out = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                tokenize.ENCODING, tokenize.ENDMARKER}
    text = read(MODULE).decode("utf-8")
    edges = [text[:match.start()].count("\n")
             for match in re.finditer(r"^# ={98}\n# [A-Z].*\n# ={98}$", text, re.M)]
    counts = [0] * (len(edges) + 1)
    for token in tokenize.tokenize(io.BytesIO(read(MODULE)).readline):
        if token.type not in left_out:
            counts[sum(edge < token.start[0] for edge in edges)] += 1
    assert len(counts) == len(ROOMS) + 1 and sum(counts) <= MOST_TOKENS
    assert [(room, count) for room, count in zip(["head"] + ROOMS, counts)
            if count > sum(counts) / 5] == []


def test_no_line_of_the_module_is_wider_than_100_columns():
    lines = enumerate(read(MODULE).decode("utf-8").split("\n"), 1)
    assert [(number, len(line)) for number, line in lines if len(line) > 100] == []


def test_a_private_class_has_more_than_one_heir_or_none():
    classes = [node for node in ast.walk(ast.parse(read(MODULE))) if isinstance(node, ast.ClassDef)]
    bases = [base.id for node in classes for base in node.bases if isinstance(base, ast.Name)]
    assert [node.name for node in classes
            if node.name.startswith("_") and bases.count(node.name) == 1] == []


def test_every_public_name_has_a_docstring():
    tree = ast.parse(read(MODULE))
    bare = [node.name for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            and not ast.get_docstring(node)]
    assert bare == []


def test_single_backticks_hold_names_of_the_module():
    """Parameters, keys and literals stand in double ones: one dialect,
    as the module's docstring says."""
    tree = ast.parse(read(MODULE))
    defined = {node.name for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {part.id for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree)
             if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    single = re.findall(r"(?<!`)`([^`\n]+)`(?!`)",
                        re.sub(r"``.*?``", "", "\n".join(texts), flags=re.S))
    assert len(single) > 20 and {word for word in single
                                 if word.rstrip("()").split(".")[0] not in defined} == set()


def test_no_name_is_given_twice():
    """A second definition would silently replace the first."""
    tree = ast.parse(read(MODULE))
    for scope in [tree] + [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
        given = [node.name for node in scope.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                 and not any("setter" in ast.dump(decorator) for decorator in node.decorator_list)]
        given += [target.id for node in scope.body if isinstance(node, ast.Assign)
                  for target in node.targets if isinstance(target, ast.Name)]
        assert sorted(given) == sorted(set(given))


def test_every_command_and_option_is_documented():
    page = read(os.path.join(HERE, "docs", "command-line.md")).decode("utf-8")
    sections = {title: body
                for title, body in re.findall(r"^### (.+)\n((?:(?!^##).*\n?)*)", page, re.M)}
    for name, (_, _, summary, _, options) in so.commands().items():
        found = [body for title, body in sections.items() if name in re.split(r"\W+", title)]
        assert len(found) == 1, "%s needs one section" % name
        for *flags, settings in options:
            for flag in flags:
                assert not flag.startswith("-") or re.search(r"%s\b" % re.escape(flag), found[0]), (
                    "%s %s" % (name, flag))
            assert settings.get("help") or name in ("help",), "%s %s" % (name, flags)
        assert summary
    for shared in ("--store", "--help", "--version", "SESSIONOPTIMIZER_HOME", "NO_COLOR"):
        assert shared in page
    for title in sections:
        for word in re.split(r" and |, ", title):
            assert word in so.commands(), "a section about no command: %s" % title


def documented_calls():
    """Every `name(parameters)` in the text of docs/python-api.md,
    with the heading it stands below."""
    text = re.sub(r"^```.*?^```$", "",
                  read(os.path.join(HERE, "docs", "python-api.md")).decode("utf-8"),
                  flags=re.M | re.S)
    heading = ""
    for line in re.sub(r"(?<!\|)\n(?![\n#|*])", " ", text).split("\n"):
        heading = line.strip("# ") if line.startswith("#") else heading
        for name, parameters in re.findall(r"`([A-Za-z_.]+)\(([^`]*)\)`", line):
            yield heading, name, parameters


OWNERS = {"Sessions and events": "SessionOptimizer", "Reports": "SessionOptimizer",
          "Transcripts": "SessionOptimizer",
          "Live hooks": "SessionOptimizer", "The store": "Store", "Analyzers": "BaseAnalyzer"}


def parameters_of(function):
    """Name, whether it must be named, and default of every parameter."""
    import inspect
    found = [p for p in inspect.signature(function).parameters.values()
             if p.name not in ("self", "cls")]
    return [(p.name, p.kind is p.KEYWORD_ONLY, p.default if p.default is not p.empty else "needed")
            for p in found]


@pytest.mark.parametrize("heading, name, parameters", sorted(set(documented_calls())))
def test_documented_signatures_are_those_of_the_module(heading, name, parameters):
    owners = [so, getattr(so, OWNERS.get(heading, heading), so), SessionOptimizer]
    if heading == "Analyzers":
        owners.append(so.ContextMemory)
    if heading == "Prices":
        owners.append(so.PriceList), owners.append(so.Price)
    for part in name.split(".")[:-1]:
        owners = [getattr(so, part)]
    found = [getattr(owner, name.split(".")[-1]) for owner in owners
             if hasattr(owner, name.split(".")[-1])]
    assert found, "%s is not there" % name
    space = dict(vars(so))
    exec("def documented(%s): pass" % parameters, space)
    told = parameters_of(space["documented"])
    for own in map(parameters_of, found):  # "..." stands for a default that is not told
        if told == [(*p[:2], ... if tell[2:] == (...,) and p[2] != "needed" else p[2])
                    for tell, p in zip(told, own)] \
                and len(told) == len(own):
            return
    assert told == parameters_of(found[0])


def test_all_names_what_the_page_describes():
    page = re.sub(r"```.*?```", "",
                  read(os.path.join(HERE, "docs", "python-api.md")).decode("utf-8"), flags=re.S)
    words = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"`([^`\n]+)`", page))))
    names = {name for node in ast.parse(read(MODULE)).body for name in (
        [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else
        [t.id for t in node.targets if isinstance(t, ast.Name)]
        if isinstance(node, ast.Assign) else [])}
    also_fields = {"token_breakdown", "token_use", "recommendations", "event_id"}
    assert len(set(so.__all__)) == len(so.__all__)
    assert {name for name in so.__all__ if name not in words or not hasattr(so, name)} == set()
    assert ({name for name in names & words if not name.startswith("_")} - also_fields
            == set(so.__all__) & names)
    everything = {}
    exec("from sessionoptimizer import *", everything)
    assert (set(so.__all__) <= set(everything) and "_live" not in everything
            and "Rows" not in everything)


USERS_SCRIPT = """
from typing import Any, Dict, Iterator, List
from sessionoptimizer import (
    BaseAnalyzer, EfficiencyIssue, EventType, OptimizationReport, Session, SessionOptimizer,
    SessionStatus, Severity, IssueType)


class Short(BaseAnalyzer):
    issue_type = IssueType.UNUSED_CONTEXT

    def find(self, session: Session) -> Iterator[EfficiencyIssue]:
        yield self.issue(Severity.LOW, "short", "write more", events=session.events, tokens=5)


def wasted(place: str) -> Dict[str, int]:
    optimizer = SessionOptimizer(place, analyzers=[Short()])
    with optimizer.session("forge", "Fix the loader", model="opus") as session:
        optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "a.py"}, tokens_input=10)
        optimizer.log_event(session.id, "SEARCH", {"query": "def"})
    ended = optimizer.end_session(session.id, SessionStatus.FAILED)
    assert ended is not None and ended.duration_seconds >= 0.0
    report = optimizer.analyze(session.id)
    rows: List[Dict[str, Any]] = optimizer.summaries(days=3)
    sessions: List[Session] = optimizer.list_sessions(limit=5)
    return {found.id: kept(report) + len(rows) for found in sessions}


def kept(report: "OptimizationReport | None") -> int:
    return report.total_waste_tokens if report else 0
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The interpreter of an environment in which the module is installed."""
    pytest.importorskip("mypy", reason="mypy is missing: pip install -e '.[lint]'")
    place = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)],
                   check=True, timeout=120)
    program = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
    where = subprocess.run(
        [program, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        stdout=subprocess.PIPE, check=True)
    shutil.copy(MODULE, where.stdout.decode().strip())
    return program


@pytest.mark.parametrize("line, complaint", [
    ("", ""), ("wasted(5)", "incompatible type"),
    ("SessionOptimizer('x').analyze(b'x')", "incompatible type"),
    ("SessionOptimizer('x').analise('x')", "no attribute"),
    ("number: int = kept(None).bit_length() + 'a'", "Unsupported operand")])
def test_a_strictly_typed_script_of_a_user_passes(line, complaint, tmp_path, installed):
    """A single module cannot carry py.typed: docs/python-api.md names the setting that makes mypy
    read it all the same."""
    script = write(tmp_path / "script.py", USERS_SCRIPT + line + "\n")
    setting, = re.findall(r"^follow_untyped_imports = true$",
                          read(os.path.join(HERE, "docs", "python-api.md")).decode("utf-8"), re.M)

    def checked_with(setting):
        config = write(tmp_path / "mypy.ini",
                       "[mypy]\nstrict = true\n[mypy-sessionoptimizer]\n%s\n" % setting)
        done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir",
                               str(tmp_path / "cache"), "--python-executable", installed, script],
                              cwd=str(tmp_path), stdout=subprocess.PIPE, timeout=240)
        return done.returncode, done.stdout.decode("utf-8")
    status, shown = checked_with(setting)
    assert (status == 0) is (not complaint) and complaint in shown, shown
    if not line:
        status, shown = checked_with("")
        assert status != 0 and "py.typed" in shown, (
            "the setting is not needed any more: take it out of the page")


def test_every_issue_type_format_and_error_is_documented():
    docs = "".join(read(os.path.join(HERE, "docs", name)).decode("utf-8")
                   for name in sorted(os.listdir(os.path.join(HERE, "docs")))
                   if name.endswith(".md"))
    for name in (
            [kind.name for enum in (IssueType, EventType, SessionStatus, Severity) for kind in enum]
            + list(so.FORMATS) + [cls.__name__ for cls in all_subclasses(SessionOptimizerError)]
            + list(SIGNATURES) + [reader.name for reader in so.READERS]):
        assert re.search(r"\b%s\b" % re.escape(name), docs), name


PAGES = (["README.md"]
         + sorted(os.path.join("docs", name) for name in os.listdir(os.path.join(HERE, "docs"))
                  if name.endswith(".md")))


def blocks(page, language):
    text = read(os.path.join(HERE, page)).decode("utf-8")
    return [(text[:match.start()].count("\n") + 1, match.group(1))
            for match in re.finditer(r"^```%s\n(.*?)^```" % language, text, re.M | re.S)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory like a fresh clone, where ``sessionoptimizer`` is a command."""
    place, programs = tmp_path / "clone", tmp_path / "bin"
    place.mkdir(), programs.mkdir()
    for name in ("examples", "sessionoptimizer.py", "docs", "README.md"):
        if name == "examples":
            shutil.copytree(os.path.join(HERE, name), str(place / name),
                            ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        elif os.path.isfile(os.path.join(HERE, name)):
            shutil.copy(os.path.join(HERE, name), str(place / name))
    for name, words in (("sessionoptimizer",
                         '"%s" "%s" "$@"' % (sys.executable, place / "sessionoptimizer.py")),
                        ("python3", '"%s" "$@"' % sys.executable),
                        ("python", '"%s" "$@"' % sys.executable)):
        os.chmod(write(programs / name, "#!/bin/sh\nexec %s\n" % words), 0o755)
    monkeypatch.setenv("PATH", str(programs) + os.pathsep + os.environ["PATH"])
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(str(place))
    if shutil.which("git"):
        for words in (["init", "-q"], ["add", "README.md"],
                      ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm",
                       "feat: begin"]):
            subprocess.run(["git"] + words, check=True)
    return place


def matches(shown, expected):
    """Whether what was printed is what a page shows, where ``...`` stands for anything."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..."
        else ".*".join(re.escape(part) for part in line.rstrip().split("...")) + r"[ ]*\n"
        for line in expected)
    return re.match("(?:%s)\n*\\Z" % pattern, shown) is not None


@posix_only
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")])
def test_console_examples_run(page, workplace):
    """The lines that begin with ``$`` (and go on with ``>``) run in one shell per block, all blocks
    of a page in one directory and home. Blocks marked ``bash`` do not run: servers, and what
    changes the reader's machine."""
    for line, block in blocks(page, "console"):
        assert block.startswith("$ "), "%s:%d does not begin with a command" % (page, line)
        steps = [step.split("\n") for step in re.split(r"^\$ ", block, flags=re.M)[1:]]
        commands, expected = [], []
        for step in steps:
            text = step.pop(0)
            while step[0].startswith("> "):
                text += "\n" + step.pop(0)[2:]
            commands.append(text)
            expected.append(step[:-1] if step[-1:] == [""] else step)
        script = "".join("%s\nprintf '\\n@@@%%d\\n' $?\n" % text for text in commands)
        done = subprocess.run(["sh", "-c", script], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        outputs = re.split(r"\n?@@@(\d+)\n", done.stdout.decode("utf-8"))
        assert len(outputs) == 2 * len(commands) + 1, (page, line, done.stderr.decode())
        for text, shown, status, wanted in zip(commands, outputs[::2], outputs[1::2], expected):
            if not wanted:  # a command whose output the page does not show
                assert status == "0", "%s:%d: $ %s\n%s" % (page, line, text, done.stderr.decode())
                continue
            shown = shown + "\n" if shown and not shown.endswith("\n") else shown
            assert matches(shown, wanted), "%s:%d: $ %s\n%s\n%s--- expected\n%s" % (
                page, line, text, shown, done.stderr.decode(), "\n".join(wanted))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_run_and_print_what_their_comments_say(page, workplace):
    """All blocks of a page run in order as one program; a comment after ``print(...)``, and a block
    without a language right after one of Python, is what it prints."""
    text = read(os.path.join(HERE, page)).decode("utf-8")
    outputs = dict(re.findall(r"^```python\n(.*?)^```\n\s*^```\n(.*?)^```", text, re.M | re.S))
    code, wanted = "", []
    for line, block in blocks(page, "python"):
        code += "\n" * max(0, line - code.count("\n")) + block
        wanted += (re.findall(r"^ *print\(.*\) {2,}# (.*)$", block, re.M)
                   + outputs.get(block, "").splitlines())
    write(workplace / "page.py", code)
    status, out, err = python("-W", "error", "page.py", PYTHONPATH=os.pathsep.join(
        [str(workplace), str(workplace / "examples")]))
    assert status == 0, err
    shown = iter(out.splitlines())
    for text in wanted:
        assert any(matches(line + "\n", [text]) for line in shown), (
            "%s: %r is not printed; it prints\n%s" % (page, text, out))


def test_pages_without_examples_are_known():
    """A page whose examples lost their language would be skipped silently."""
    for page in PAGES:
        text = read(os.path.join(HERE, page)).decode("utf-8")
        fences = re.findall(r"^```(.*)$", text, re.M)
        assert len(fences) % 2 == 0 and set(fences[::2]) <= {
            "python", "console", "bash", "sh", "text", "json", "yaml", "ini", "toml", ""}, page
        for _, block in blocks(page, "text") + blocks(page, ""):
            assert not re.search(r"^(?:\$ sessionoptimizer|>>> |import |from \w+ import)",
                                 block, re.M), page


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_an_error_with_a_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, MODULE, "--store", str(tmp_path), "version"],
                              stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode == 1 and b"Traceback" not in done.stderr
            and done.stderr.count(b"\n") <= 2)


def test_the_hook_command_logs_and_prints_nothing(agent, source):
    assert agent.call(hook_event_name="SessionStart", source="startup") == (0, "", "")
    assert agent.call(hook_event_name="UserPromptSubmit", prompt=PROMPT) == (0, "", "")
    assert (agent.call("--guard", hook_event_name="Stop", last_assistant_message="Done")
            == (0, "", ""))
    assert agent.call(hook_event_name="SessionEnd", reason="clear") == (0, "", "")
    assert [event.event_type.name for event in agent.session().events] == [
        "SESSION_START", "USER_MESSAGE", "AI_RESPONSE", "SESSION_END"]


def test_the_hook_command_guards(agent, source):
    agent.read(source)
    call = {"hook_event_name": "PreToolUse", "tool_name": "Read",
            "tool_input": {"file_path": str(source)}}
    assert agent.call(**call) == (0, "", "")
    status, out, err = agent.call("--guard", **call)
    assert (status, err) == (0, "") and "additionalContext" in json.loads(out)["hookSpecificOutput"]
    status, out, err = agent.call("--guard", "--deny", **call)
    assert ((status, err) == (0, "")
            and json.loads(out)["hookSpecificOutput"]["permissionDecision"] == "deny")
    source.write_text("new")
    assert agent.call("--guard", **call) == (0, "", "")


BROKEN = {"empty": b"", "no JSON": b"{", "not text": b"\xff\xfe\x00", "a list": b"[1]",
          "null": b"null", "no id": b"{}",
          "an id of another kind": b'{"session_id": 5, "hook_event_name": "Stop"}',
          "an empty id": b'{"session_id": "", "hook_event_name": "Stop"}',
          "a path as id": b'{"session_id": "../../x", "hook_event_name": 7}',
          "deep": b"[" * 100000, "odd fields": json.dumps({
              "session_id": "s", "hook_event_name": "PostToolUse", "tool_name": ["Read"],
              "tool_input": "x", "cwd": 7,
              "tool_response": {"file": [], "structuredPatch": 5, "content": {}},
              "duration_ms": "no", "agent_id": {}}).encode(),
          "lone surrogates": (b'{"session_id": "s", "hook_event_name": "UserPromptSubmit", '
                              b'"prompt": "\\ud800 x"}')}


@pytest.mark.parametrize("case", BROKEN)
def test_a_hook_never_stops_the_agent_whatever_it_is_given(optimizer, case):
    for arguments in ([], ["--guard", "--deny"]):
        status, out, err = run(optimizer, "hook", *arguments, stdin=BROKEN[case])
        assert (status, out) == (0, "") and "Traceback" not in err
    assert not os.path.exists(os.path.join(optimizer.store.root, "..", "x.json"))


def test_a_hook_never_stops_the_agent_whatever_its_command_line_or_store(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    event = json.dumps({"session_id": "s", "hook_event_name": "Stop"}).encode()
    for arguments in (["--store", str(file), "hook"], ["hook", "--store", str(file / "below")],
                      ["hook", "--gard"],
                      [f"--store={file}", "hook", "--bad"], ["hook", "--store"]):
        done = subprocess.run([sys.executable, MODULE, *arguments], input=event,
                              capture_output=True, timeout=60)
        assert ((done.returncode, done.stdout) == (0, b"") and b"Traceback" not in done.stderr
                and done.stderr)


def test_a_hook_gives_up_in_time_when_the_session_is_locked(agent):
    fcntl = pytest.importorskip("fcntl")
    agent.hook("UserPromptSubmit", prompt="go")
    with open(agent.optimizer.store.find(agent.id), "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begun = time.monotonic()
        status, out, err = agent.call(hook_event_name="SessionEnd", reason="other")
        assert ((status, out, err)
                == (0, "", "sessionoptimizer hook: no time left, this event is not logged\n"))
        assert time.monotonic() - begun < 10
    assert agent.call(hook_event_name="SessionEnd", reason="other") == (0, "", "")
    assert agent.session().status is so.SessionStatus.COMPLETED


def test_a_session_end_does_not_read_the_session(agent, monkeypatch):
    agent.hook("UserPromptSubmit", prompt="go")
    fresh = SessionOptimizer(agent.optimizer.store.root)
    monkeypatch.setattr(so.Store, "load_marked",
                        lambda *_: pytest.fail("the whole session was read"))
    fresh.log_hook(agent.payload("SessionEnd", reason="other"))
    fresh.log_hook(agent.payload("Stop", last_assistant_message="x"))


def test_the_store_may_stand_before_a_command(optimizer):
    assert run(optimizer, "list")[0] == 0
    done = subprocess.run([sys.executable, MODULE, f"--store={optimizer.store.root}", "start", "A",
                           "hook"], capture_output=True)
    assert done.returncode == 0
    assert subprocess.run([sys.executable, MODULE, "start", "hook"],
                          capture_output=True).returncode == 2


def on_a_terminal(optimizer, *arguments, **environment):
    """What a command prints on a terminal."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, MODULE, "--store", optimizer.store.root, *arguments],
        stdout=child, stderr=subprocess.DEVNULL, env={**env, "TERM": "xterm", **environment})
    os.close(child)
    text = b""
    try:
        while True:
            piece = os.read(parent, 4096)
            if not piece:
                break
            text += piece
    except OSError:
        pass
    process.wait(30)
    os.close(parent)
    return text.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "command", [["analyze", "s"], ["alerts"], ["scan", os.path.join(TRANSCRIPTS, "read-twice")]])
def test_colour_is_for_terminals_alone(optimizer, command):
    store_session(optimizer, "s", [READ, READ, READ, ANSWER])
    run(optimizer, *command)
    bare = run(optimizer, *command)[1]
    assert "\033" not in bare
    shown = on_a_terminal(optimizer, *command)
    assert "\033[" in shown

    def timeless(text):
        return re.sub(r"Generated:.*", "", re.sub(r"\033\[[\d;]*m", "", text))
    assert timeless(shown) == timeless(bare)
    assert "\033" not in on_a_terminal(optimizer, *command, NO_COLOR="1")
    assert "\033" not in on_a_terminal(optimizer, *command, TERM="dumb")


def test_importing_the_module_loads_nothing_of_this():
    heavy = ["html", "csv", "signal", "argparse", "http", "html.entities"]
    code = (f"import sys; sys.path.insert(0, {os.path.dirname(MODULE)!r}); "
            f"import sessionoptimizer; print([name for name in {heavy!r} if name in sys.modules])")
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code],
                          capture_output=True).stdout.decode().strip() == "[]"
