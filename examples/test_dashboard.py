"""Tests of dashboard.py and local_server.py: the API, what is refused, and the page in a real browser."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import dashboard  # noqa: E402
import local_server  # noqa: E402
from sessionoptimizer import SessionOptimizer  # noqa: E402

TASK = 'Escape <script>alert(1)</script> & "quotes"'
TOKEN = "a-long-enough-secret-token"


class Client:
    """A server in a thread, and requests to it."""

    def __init__(self, store, **options):
        self.optimizer = SessionOptimizer(str(store))
        self.server = dashboard.Dashboard(dashboard.Source(str(store)), port=0, **options)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    def ask(self, path, method="GET", body=None, **headers):
        """(status, headers, text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(
                method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
            )
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read().decode()
        finally:
            connection.close()

    def get(self, path, status=200):
        got, headers, text = self.ask(path)
        assert got == status, (path, got, text)
        assert headers["Content-Type"] == "application/json"
        return json.loads(text)

    def raw(self, data, wait=5):
        """What the server answers to these bytes until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            answer = b""
            while True:
                chunk = connection.recv(65_536)
                if not chunk:
                    return answer.decode()
                answer += chunk


def log_some(optimizer, agent="forge", task=TASK, end=False):
    """1,000 + 1,000 tokens of one file read twice, and 2,000 of answer: 1,000 wasted of 4,000."""
    session = optimizer.start_session(agent, task, model="opus")
    for _ in range(2):
        optimizer.log_event(session.id, "FILE_READ", {"file_path": "src/a.py"}, tokens_input=1000)
    optimizer.log_event(session.id, "AI_RESPONSE", tokens_output=2000, duration_ms=90_000)
    if end:
        optimizer.end_session(session.id)
    return session


@pytest.fixture
def client(tmp_path):
    client = Client(tmp_path / "store")
    yield client
    client.close()


# the API


def test_current(client):
    log_some(client.optimizer)
    log_some(client.optimizer, "atlas", end=True)
    answer = client.get("/api/stats/current")
    assert {
        "timestamp",
        "agents",
        "total_sessions",
        "average_efficiency",
        "total_waste_tokens",
        "totals",
    } <= set(answer)
    assert set(answer["agents"]) == {"ATLAS", "FORGE"}
    forge = answer["agents"]["FORGE"]
    assert {"sessions", "efficiency", "waste_tokens", "total_tokens", "cost"} <= set(forge)
    assert (forge["sessions"], forge["efficiency"], forge["waste_tokens"], forge["total_tokens"]) == (
        1,
        75.0,
        1000,
        4000,
    )
    assert (answer["total_sessions"], answer["average_efficiency"], answer["total_waste_tokens"]) == (
        2,
        75.0,
        2000,
    )
    assert answer["totals"]["total_tokens"] == 8000 and answer["totals"]["cost"] > 0


def test_current_of_an_empty_store(client):
    answer = client.get("/api/stats/current")
    assert answer["agents"] == {} and answer["total_sessions"] == 0 and answer["average_efficiency"] is None


def test_only_the_period_counts(client):
    old = datetime.now() - timedelta(days=3)
    client.optimizer.import_session(
        {
            "id": "old",
            "agent": "FORGE",
            "task": "t",
            "status": "COMPLETED",
            "started_at": old.isoformat(),
            "total_tokens_input": 10,
        }
    )
    assert client.get("/api/stats/current")["total_sessions"] == 0
    assert client.get("/api/stats/current?days=7")["total_sessions"] == 1


def test_agent(client):
    log_some(client.optimizer)
    answer = client.get("/api/stats/agent/forge?days=7")
    assert answer["sessions_analyzed"] == 1 and answer["average_efficiency"] == 75.0
    assert answer["trends"] == {"direction": "insufficient_data", "change": 0.0}
    assert answer["common_issues"][0] == {"type": "REPEATED_FILE_READ", "count": 1}
    assert "no session" in client.get("/api/stats/agent/nobody", 404)["error"]


def test_agent_without_sessions_in_the_period(client):
    old = datetime.now() - timedelta(days=30)
    client.optimizer.import_session(
        {
            "id": "old",
            "agent": "A/B c",
            "task": "t",
            "status": "COMPLETED",
            "started_at": old.isoformat(),
            "total_tokens_input": 10,
        }
    )
    answer = client.get("/api/stats/agent/A%2FB%20c?days=7")
    assert answer["sessions_analyzed"] == 0 and answer["average_efficiency"] is None


def test_trend(client):
    log_some(client.optimizer)
    answer = client.get("/api/stats/trend?days=3")
    assert answer["days"] == 3 and len(answer["trend"]) == 3
    assert answer["trend"][-1] == {
        "date": datetime.now().date().isoformat(),
        "efficiency": 75.0,
        "sessions": 1,
        "tokens": 4000,
    }
    assert answer["trend"][0]["efficiency"] is None


def test_sessions(client):
    running, ended = log_some(client.optimizer), log_some(client.optimizer, "atlas", end=True)
    active = client.get("/api/sessions/active")
    assert active["count"] == 1
    row = active["sessions"][0]
    assert {"id", "agent", "task", "model", "started_at", "duration", "tokens", "efficiency"} <= set(row)
    assert (row["id"], row["task"], row["duration"], row["tokens"], row["efficiency"]) == (
        running.id,
        TASK,
        90,
        4000,
        75.0,
    )
    assert client.get("/api/sessions")["count"] == 2
    assert [r["id"] for r in client.get("/api/sessions?status=completed")["sessions"]] == [ended.id]
    assert [r["id"] for r in client.get("/api/sessions?agent=forge")["sessions"]] == [running.id]
    limited = client.get("/api/sessions?limit=1")
    assert (limited["count"], limited["total"]) == (1, 2)


def test_alerts(client):
    session = log_some(client.optimizer)
    client.optimizer.log_event(session.id, "FILE_READ", {"file_path": "src/a.py"}, tokens_input=9000)
    alerts = client.get("/api/alerts")["alerts"]
    assert {
        "id",
        "level",
        "kind",
        "session_id",
        "agent",
        "message",
        "action",
        "value",
        "threshold",
        "time",
        "task",
    } <= set(alerts[0])
    assert "LOW_EFFICIENCY" in {alert["kind"] for alert in alerts} and alerts[0]["task"] == TASK


def test_report(client):
    session = log_some(client.optimizer)
    answer = client.get(f"/api/reports/{session.id}")
    report = client.optimizer.analyze(session.id)
    for name, value in json.loads(json.dumps(report.to_dict())).items():
        assert name == "generated_at" or answer[name] == value, name
    assert answer["session"]["task"] == TASK and answer["session"]["status"] == "ACTIVE"
    assert sum(step["wasted"] for step in answer["timeline"]) == report.total_waste_tokens == 1000
    assert sum(step["input"] + step["output"] for step in answer["timeline"]) == report.total_tokens
    named = answer["evidence"][report.issues[0].events_involved[-1]]
    assert (named["number"], named["type"], named["wasted"]) == (3, "FILE_READ", 1000)
    assert "error" in client.get("/api/reports/no-such-session", 404)
    assert "error" in client.get("/api/reports/..%2F..%2Fetc%2Fpasswd", 404)


def test_wasted_parts_of_all_transcripts_add_up_to_the_reports(tmp_path):
    optimizer = SessionOptimizer(str(tmp_path))
    optimizer.scan([str(HERE / "transcripts")])
    source, wasted = dashboard.Source(str(tmp_path)), 0
    source.look()
    for session_id in source.files:
        report = source.report(session_id)
        assert sum(step["wasted"] for step in report["timeline"]) == report["total_waste_tokens"], session_id
        wasted += report["total_waste_tokens"]
    assert wasted


def test_a_long_session_is_drawn_in_a_bounded_number_of_steps(client):
    events = [
        {
            "id": str(n),
            "timestamp": "2026-01-01T00:00:00Z",
            "event_type": "SEARCH",
            "data": {"query": str(n)},
            "tokens_input": 10,
        }
        for n in range(1001)
    ]
    client.optimizer.import_session({"id": "long", "agent": "A", "task": "t", "events": events})
    steps = client.get("/api/reports/long")["timeline"]
    assert len(steps) <= dashboard.MAX_STEPS and sum(step["events"] for step in steps) == 1001


def test_reading_changes_no_session_and_a_damaged_one_is_told(client, tmp_path):
    session = log_some(client.optimizer)
    before = (tmp_path / "store" / "sessions" / f"{session.id}.json").read_bytes()
    (tmp_path / "store" / "sessions" / "bad.json").write_text("{not json")
    current = client.get("/api/stats/current")
    assert current["total_sessions"] == 1 and any("bad" in problem for problem in current["problems"])
    assert "bad" in client.get("/api/reports/bad", 500)["error"]
    client.get(f"/api/reports/{session.id}")
    assert (tmp_path / "store" / "sessions" / f"{session.id}.json").read_bytes() == before
    assert not list((tmp_path / "store" / "reports").iterdir())


@pytest.mark.parametrize(
    "path, words",
    [
        ("/api/stats/current?days=0", "days"),
        ("/api/stats/current?days=x", "days"),
        ("/api/stats/trend?days=99999", "days"),
        ("/api/sessions?limit=0", "limit"),
        ("/api/sessions?limit=1001", "limit"),
        ("/api/sessions?status=asleep", "status"),
        ("/api/sessions?agnt=forge", "unknown parameter"),
        ("/metrics?days=1", "unknown parameter"),
        ("/api/sessions?" + "&".join(f"agent={n}" for n in range(20)), "too many"),
    ],
)
def test_a_bad_parameter_is_400(client, path, words):
    assert words in client.get(path, 400)["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/api",
        "/api/",
        "/api/reports/",
        "/api/reports/a/b",
        "/api/stats/agent/",
        "/../dashboard.py",
        "/dashboard.html",
    ],
)
def test_what_is_not_there_is_404(client, path):
    assert "error" in client.get(path, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_another_method_is_405(client, method):
    status, headers, text = client.ask("/api/sessions", method)
    assert status == 405 and headers["Allow"] == "GET, HEAD" and "error" in json.loads(text)


def test_head(client):
    status, headers, text = client.ask("/api/sessions", "HEAD")
    assert status == 200 and text == "" and int(headers["Content-Length"]) > 10


def test_an_unchanged_store_costs_next_to_nothing(client, monkeypatch):
    session, now = log_some(client.optimizer), time.time()
    paths = [
        "/api/stats/current",
        "/api/stats/trend",
        "/api/sessions",
        "/api/sessions/active",
        "/metrics",
        f"/api/reports/{session.id}",
        "/api/stats/agent/FORGE",
        "/api/alerts",
        "/",
    ]
    monkeypatch.setattr(time, "time", lambda: now)  # the minute does not end meanwhile
    tags, calls = {path: client.ask(path)[1]["ETag"] for path in paths}, []
    with monkeypatch.context() as patch:
        for name in ("summaries", "alerts", "agent_statistics", "get_session"):
            patch.setattr(SessionOptimizer, name, lambda self, *_, name=name, **options: calls.append(name))
        for path in paths:
            status, headers, text = client.ask(path, If_None_Match=f'"other", W/{tags[path]}')
            assert (status, text, headers["ETag"]) == (304, "", tags[path]), path
    assert calls == []
    client.optimizer.log_event(session.id, "AI_RESPONSE", tokens_output=50)
    changed = [path for path in paths if client.ask(path, If_None_Match=tags[path])[0] == 200]
    assert changed == paths[:-2], "all but the page and the alerts, of which there are none"


def test_the_tag_stays_while_time_passes_and_nothing_changes(client):
    log_some(client.optimizer)
    tag = client.ask("/api/stats/current")[1]["ETag"]
    client.server.source.kept.clear()
    time.sleep(1.1)
    assert client.ask("/api/stats/current", If_None_Match=tag)[0] == 304


def test_metrics(client):
    log_some(client.optimizer, agent='odd"na\\me\nx')
    log_some(client.optimizer, end=True)
    status, headers, text = client.ask("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert text.endswith("\n") and not text.endswith("\n\n")
    typed, samples = [], {}
    label = r'[a-z]+="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
    for line in text.split("\n")[:-1]:
        if line.startswith("# TYPE "):
            typed.append(line.split()[2])
            assert line.split()[3] == "gauge"
        elif not line.startswith("# HELP "):
            found = re.fullmatch(r"([a-z_]+)(?:\{%s(?:,%s)*\})? (-?[0-9.e+-]+)" % (label, label), line)
            assert found and found.group(1) == typed[-1], line
            assert line.rpartition(" ")[0] not in samples, "a sample stands twice"
            samples[line.rpartition(" ")[0]] = float(found.group(2))
    assert len(typed) == len(set(typed)) and all(name.startswith("sessionoptimizer_") for name in typed)
    assert samples['sessionoptimizer_tokens{agent="FORGE"}'] == 4000
    assert samples['sessionoptimizer_wasted_tokens{agent="FORGE"}'] == 1000
    assert samples['sessionoptimizer_sessions{agent="FORGE",status="COMPLETED"}'] == 1
    assert samples['sessionoptimizer_efficiency_percent{agent="ODD\\"NA\\\\ME\\nX"}'] == 75


def test_health(client):
    assert client.get("/health") == {"status": "ok"}


# what is refused


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1", 200),
        ("localhost:1", 200),
        ("[::1]:8765", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("0.0.0.0", 403),
        ("192.168.1.7", 403),
        ("user@localhost", 400),
        ("", 400),
        ("[::1", 400),
    ],
)
def test_host(client, host, status):
    for path in ("/", "/health", "/api/sessions"):
        assert client.ask(path, Host=host)[0] == status


def test_host_missing_or_twice(client):
    assert " 400 " in client.raw(b"GET / HTTP/1.1\r\n\r\n").split("\r\n")[0]
    assert (
        " 400 "
        in client.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").split("\r\n")[0]
    )


def test_origin(client):
    own = f"127.0.0.1:{client.port}"
    assert client.ask("/api/sessions", Origin=f"http://{own}")[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", f"http://{own}.evil.example", ""):
        status, headers, text = client.ask("/api/sessions", Origin=origin)
        assert status == 403 and "error" in json.loads(text), origin
        assert "Access-Control-Allow-Origin" not in headers
    assert client.ask("/api/sessions", Sec_Fetch_Site="cross-site")[0] == 403
    assert client.ask("/api/events", Sec_Fetch_Site="same-site")[0] == 403
    assert client.ask("/", Sec_Fetch_Site="cross-site")[0] == 200  # a link


def test_page_and_policy(client):
    import base64
    import hashlib

    status, headers, text = client.ask("/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert (
        policy["default-src"] == "'none'"
        and policy["frame-ancestors"] == "'none'"
        and "unsafe" not in str(policy)
    )
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy[rule]
    assert (
        headers["X-Content-Type-Options"] == "nosniff"
        and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    )
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(", text), "the page loads something"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_token(tmp_path):
    client = Client(tmp_path, token=TOKEN)
    try:
        log_some(client.optimizer)
        assert client.ask("/health")[0] == 200
        for path in (
            "/",
            "/api/sessions",
            "/metrics",
            "/api/events",
            "/?token=wrong",
            "/api/sessions?token=" + TOKEN,
        ):
            status, headers, text = client.ask(path)
            assert (
                status == 401 and headers["WWW-Authenticate"] == "Bearer" and "error" in json.loads(text)
            ), path
        assert client.ask("/api/sessions", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert client.ask("/api/sessions", Authorization=f"Bearer {TOKEN}x")[0] == 401
        assert client.ask("/api/sessions", Authorization=f"Basic {TOKEN}")[0] == 401
        assert client.ask("/api/sessions", Authorization="Bearer \xff")[0] == 401
        status, headers, _ = client.ask(f"/?token={TOKEN}")
        assert status == 303 and headers["Location"] == "/"
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        assert client.ask("/", Cookie="a=b; " + cookie.split(";")[0])[0] == 200
        assert client.ask("/", Cookie=cookie.split("=")[0] + "=wrong")[0] == 401
    finally:
        client.close()


def test_secrets_are_compared_in_constant_time(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(local_server.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    client = Client(tmp_path, token=TOKEN)
    try:
        assert client.ask("/metrics", Authorization="Bearer guess")[0] == 401
        assert (b"guess", TOKEN.encode()) in compared
        compared.clear()
        assert client.ask("/?token=guess")[0] == 401
        assert (b"guess", TOKEN.encode()) in compared
    finally:
        client.close()


def test_another_address_answers_by_address_only(tmp_path):
    client = Client(tmp_path, host="0.0.0.0", token=TOKEN)
    try:
        head = {"Authorization": f"Bearer {TOKEN}"}
        for host, status in (
            ("192.168.1.7:8765", 200),
            ("[fe80::1]", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ):
            assert client.ask("/metrics", Host=host, **head)[0] == status
    finally:
        client.close()


def test_request_size_is_bounded(client):
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert " 431 " in client.raw(start + b"X: " + b"a" * 20_000).split("\r\n")[0]
    assert " 431 " in client.raw(start + b"X: a\r\n" * 200 + b"\r\n").split("\r\n")[0]
    assert client.ask("/api/sessions?agent=" + "a" * 3000)[0] == 414
    assert client.ask("/api/sessions", "GET", b"body")[0] == 400
    assert " 400 " in client.raw(start + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n").split("\r\n")[0]
    assert " 400 " in client.raw(b"nonsense\r\n\r\n").split("\r\n")[0]
    assert client.get("/health") == {"status": "ok"}


def test_two_requests_sent_at_once_are_both_answered(client):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert client.raw(one + b"\r\n" + one + b"Connection: close\r\n\r\n").count('{"status": "ok"}') == 2


def test_a_slow_request_is_cut_off(client, monkeypatch):
    monkeypatch.setattr(local_server, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", client.port), timeout=5) as connection:
        began, answer = time.monotonic(), b""
        connection.settimeout(0.1)
        while time.monotonic() - began < 4 and not answer:  # a byte now and then does not help
            try:
                connection.sendall(b"G")
                answer = connection.recv(100)
            except socket.timeout:
                continue
        assert b" 408 " in answer and time.monotonic() - began < 3


def quick(client, path="/health"):
    """Seconds until a client that is not slow has its answer, over a connection of its own."""
    began = time.monotonic()
    status, _, text = client.ask(path)
    assert status == 200 and text
    return time.monotonic() - began


def silent(client):
    return socket.create_connection(("127.0.0.1", client.port))


def half_sent(client):
    connection = silent(client)
    connection.sendall(b"GET /api/sessions HTTP/1.1\r\nHost: localhost\r\nX: ")
    return connection


def never_reading(client):
    connection = silent(client)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_024)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
    return connection


def gone_stream(client):
    connection = silent(client)
    connection.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.recv(100)
    connection.close()
    return connection


def open_stream(client):
    connection = silent(client)
    connection.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return connection


@pytest.mark.parametrize("slow", [silent, half_sent, never_reading, gone_stream, open_stream])
def test_200_slow_clients_do_not_hold_up_another(client, slow):
    """A silent, a half-sent, a never-reading client and event streams, closed and open: more than there is
    room for."""
    log_some(client.optimizer)
    held = []
    try:
        for _ in range(200):
            held.append(slow(client))
        times = [quick(client, path) for path in ("/health", "/", "/api/sessions", "/api/stats/current") * 3]
        assert sorted(times)[6] < 0.5 and max(times) < 3, times  # the machine may be busy for a moment
        assert len(client.server.connections) <= local_server.MAX_CONNECTIONS
        assert len(client.server.streams) <= local_server.MAX_STREAMS
        stream = http.client.HTTPConnection("127.0.0.1", client.port, timeout=5)
        stream.request("GET", "/api/events")
        reply = stream.getresponse()
        assert reply.status == 200 and reply.readline() == b"retry: 2000\n"
        stream.close()
    finally:
        for connection in held:
            connection.close()


def test_a_long_answer_holds_up_no_other(client, monkeypatch):
    """200 reports that take their time, and a client that wants something else."""
    session, begun, end = log_some(client.optimizer), threading.Event(), threading.Event()
    real = client.server.source.answer

    def slow(name, arguments):
        if name == "report":
            begun.set()
            end.wait(20)
        return real(name, arguments)
    monkeypatch.setattr(client.server.source, "answer", slow)
    asked = f"GET /api/reports/{session.id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    held = [silent(client) for _ in range(100)]
    try:
        for connection in held:
            connection.sendall(asked)
        assert begun.wait(10)
        assert sorted(quick(client, path) for path in ("/health", "/api/sessions") * 3)[3] < 0.5
        refused = client.ask(f"/api/reports/{session.id}")
        assert refused[0] == 503 and "Retry-After" in refused[1]
    finally:
        end.set()
        for connection in held:
            connection.close()


def test_too_many_at_work_are_refused(client, monkeypatch):
    """Where nobody keeps the server waiting, a new client is told to come back."""
    session, end = log_some(client.optimizer), threading.Event()
    monkeypatch.setattr(local_server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(client.server.source, "answer", lambda *_: end.wait(10) and ('"x"', b"{}"))
    held = [silent(client) for _ in range(2)]
    try:
        for connection in held:
            connection.sendall(f"GET /api/reports/{session.id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        deadline = time.monotonic() + 5
        while client.server.waiting < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        status, headers, text = client.ask("/health")
        assert status == 503 and headers["Retry-After"] and json.loads(text) == {"error": "too many connections"}
        end.set()
        assert b"200 OK" in held[0].recv(100)
        assert client.get("/health") == {"status": "ok"}
    finally:
        end.set()
        for connection in held:
            connection.close()


def test_an_answer_that_fails_is_told_and_the_others_go_on(client, monkeypatch, capfd):
    monkeypatch.setattr(client.server.source, "answer", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in client.get("/api/sessions", 500)["error"]
    assert client.get("/health") == {"status": "ok"}
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_events(client, monkeypatch):
    monkeypatch.setattr(local_server, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(local_server, "KEEP_ALIVE_SECONDS", 0.3)
    session = log_some(client.optimizer)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=5)
    connection.request("GET", "/api/events")
    reply = connection.getresponse()
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/event-stream")

    def message():
        lines = []
        for line in iter(reply.readline, b"\n"):
            lines.append(line.decode().rstrip("\n"))
        return lines

    first = message()
    assert "event: change" in first and json.loads(first[-1][len("data: ") :])["version"] >= 1
    assert message() == [": still here"]
    client.optimizer.log_event(session.id, "AI_RESPONSE", tokens_output=5)
    while True:
        lines = message()
        if lines != [": still here"]:
            break
    assert lines[-1] != first[-1] and "event: change" in lines
    connection.close()


def test_streams_are_bounded(client, monkeypatch):
    """A new page takes the place of the oldest, which comes back when it is still there."""
    monkeypatch.setattr(local_server, "MAX_STREAMS", 1)
    old, new = (http.client.HTTPConnection("127.0.0.1", client.port, timeout=5) for _ in range(2))
    old.request("GET", "/api/events")
    first = old.getresponse()
    assert first.status == 200
    new.request("GET", "/api/events")
    assert new.getresponse().status == 200
    first.read()  # comes to its end
    assert len(client.server.streams) == 1
    old.close(), new.close()


def test_a_closed_stream_frees_its_slot(client):
    gone_stream(client)
    deadline = time.monotonic() + 5
    while client.server.streams:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# the command line


def run(*arguments, **options):
    env = {name: value for name, value in os.environ.items() if name != "SESSIONOPTIMIZER_TOKEN"}
    return subprocess.run(
        [sys.executable, str(HERE / "dashboard.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=30,
        env=env,
        **options,
    )


def test_another_host_needs_a_long_token(tmp_path):
    for arguments, words in (
        (["--host", "0.0.0.0"], "--token"),
        (["--token", "short"], "at least 16"),
        (["--port", "70000"], "65535"),
    ):
        done = run("--store", str(tmp_path), *arguments)
        assert done.returncode == 2 and words in done.stderr


def test_port_in_use(client, tmp_path):
    done = run("--store", str(tmp_path), "--port", str(client.port))
    assert done.returncode == 1 and "in use" in done.stderr and "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--store", str(tmp_path / "file"), "--port", "0")
    assert done.returncode == 1 and done.stderr.startswith("dashboard:") and "Traceback" not in done.stderr


def test_help_says_whose_store_it_is():
    assert "your own" in " ".join(run("--help").stdout.split())


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to one process")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_runs_and_stops_by_ctrl_c(tmp_path, host):
    if host == "::1":
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "dashboard.py"), "--store", str(tmp_path), "--port", "0", "--host", host],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    try:
        port = int(re.search(r":(\d+)/", process.stdout.readline()).group(1))
        connection = http.client.HTTPConnection(host, port, timeout=5)
        connection.request("GET", "/api/events")  # an open page does not hold it up
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
    finally:
        process.kill()
        process.communicate()


# the page, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
CI = os.environ.get("CI", "") not in ("", "0", "false")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")) and not CI,
    reason="needs chromium and chromedriver on PATH, and the extra `browser`",
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert CHROMIUM and DRIVER, "install chromium and its driver (Debian: chromium, chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        driver.set_page_load_timeout(30)
        yield driver
        driver.quit()


def resize(browser, width, height, *, mode="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {
            "features": [
                {"name": "prefers-color-scheme", "value": mode},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ]
        },
    )


def wait_for(browser, script, *arguments, seconds=15):
    """What the script returns, once that is true."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        last = browser.execute_script(script, *arguments)
        if last:
            return last
        time.sleep(0.05)
    raise AssertionError(
        f"still {last!r}: {script}\n{browser.execute_script('return document.body.innerText')}"
    )


def complaints(browser):
    return [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


@in_browser
def test_the_page_follows_the_store(browser, client):
    resize(browser, 1280, 1000)
    complaints(browser)
    browser.get(client.url)
    wait_for(browser, "return document.body.innerText.includes('No sessions yet')")
    wait_for(browser, "return document.getElementById('live-text').textContent === 'Live'")
    session = log_some(client.optimizer)
    wait_for(browser, "return document.getElementById('score').innerText.replace(/\\s/g, '') === '75.0%'")
    title = "return document.querySelector('#active [data-part=task]').textContent"
    assert browser.execute_script(title) == TASK  # as text, and no script came of it
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    wait_for(browser, "return document.querySelector('#active [data-part=tokens]').textContent === '4,000'")
    began = time.monotonic()
    for _ in range(4):
        client.optimizer.log_event(session.id, "AI_RESPONSE", tokens_output=1500)
    wait_for(browser, "return document.querySelector('#active [data-part=tokens]').textContent === '10.0k'")
    assert time.monotonic() - began < 5
    wait_for(browser, "return document.querySelector('#active .meter').innerText.trim() === '90.0%'")
    client.optimizer.end_session(session.id)
    wait_for(browser, "return document.body.innerText.includes('Nothing is running')")
    assert complaints(browser) == []


@in_browser
def test_a_report_by_mouse(browser, client):
    session = log_some(client.optimizer)
    resize(browser, 1280, 1000)
    browser.get(client.url)
    wait_for(browser, "return document.querySelector('#sessions button')")
    browser.execute_script("document.querySelector('#sessions button').scrollIntoView()")
    browser.find_element("css selector", "#sessions button").click()
    text = wait_for(
        browser,
        "const d = document.getElementById('report');"
        "return d.open && d.innerText.includes('Findings') && d.innerText",
    )
    assert TASK in text and "Repeated file read" in text and "75.0%" in text and "src/a.py" in text
    assert browser.current_url.endswith(f"#session={session.id}")
    wasted = browser.find_elements("css selector", '#report svg rect[fill="var(--waste)"]')
    assert len(wasted) == 2, "the wasted part and its mark below the axis"
    browser.find_element("css selector", "#report .events button").click()
    assert "file read" in browser.find_element("css selector", "#report .told").text
    client.optimizer.log_event(session.id, "FILE_READ", {"file_path": "src/a.py"}, tokens_input=1000)
    wait_for(
        browser, "return document.getElementById('report').innerText.includes('60.0%')"
    )  # it goes on live
    browser.find_element("id", "report-close").click()
    wait_for(browser, "return !document.getElementById('report').open && !location.hash")
    assert complaints(browser) == []


@in_browser
def test_everything_by_keyboard(browser, client):
    from selenium.webdriver.common.keys import Keys

    log_some(client.optimizer)
    resize(browser, 1280, 1000)
    browser.get(client.url)
    wait_for(browser, "return document.querySelector('#active button')")
    reached, seen = "", []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached = browser.execute_script(
            "const node = document.activeElement; return node.className || node.id || node.name"
        )
        seen.append(reached)
        if reached == "live-row":
            break
    assert seen[0] == "skip" and "days" in seen and seen[-1] == "live-row", seen
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"
    press(browser, Keys.ENTER)
    wait_for(
        browser,
        "return document.getElementById('report').open && document.querySelector('#report [role=slider]')",
    )
    for _ in range(4):
        press(browser, Keys.TAB)
        if browser.execute_script("return document.activeElement.getAttribute('role')") == "slider":
            break
    press(browser, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    value = browser.execute_script("return document.activeElement.getAttribute('aria-valuetext')")
    assert "Event 3" in value and "1,000 wasted" in value
    press(browser, Keys.ESCAPE)
    wait_for(browser, "return !document.getElementById('report').open")
    assert browser.execute_script("return document.activeElement.className") == "live-row", (
        "the focus comes back"
    )


NAMELESS = """
const nodes = [...document.querySelectorAll('button, a, input, select, [tabindex="0"]')];
return nodes.filter(node => node.offsetParent && !(node.innerText || node.getAttribute('aria-label') ||
  node.labels && node.labels.length)).map(node => node.outerHTML);
"""
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const line = c => c / 255 <= .03928 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * line(r) + .7152 * line(g) + .0722 * line(b);
function ground(node) {
  for (; node; node = node.parentElement) {
    const color = rgb(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
}
const written = node => [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
return [...document.querySelectorAll('body *')].filter(
  node => node.offsetParent && !node.closest('.hidden, svg') && written(node)).map(node => {
    const style = getComputedStyle(node), big = parseFloat(style.fontSize) >= 24;
    const pair = [light(rgb(style.color)), light(ground(node))].sort((a, b) => b - a);
    return [(pair[0] + .05) / (pair[1] + .05), big ? 3 : 4.5, node.className, node.textContent.slice(0, 30)];
  }).filter(([ratio, needed]) => ratio < needed);
"""


def fill(optimizer):
    """A store as a working day leaves it: the sample transcripts, a month of sessions, and four that run."""
    import random

    chance, now = random.Random(7), datetime.now().astimezone()
    optimizer.scan([str(HERE / "transcripts")])
    files = [
        "src/app.py",
        "src/orders/api.py",
        "src/grammar.py",
        "tests/test_queue.py",
        "docs/plan.md",
        "src/cache.py",
    ]
    tasks = [
        "Fix the invoice rounding bug",
        "Add pagination to the orders API",
        "Write tests for the retry queue",
        "Explain the flaky deploy job",
        "Refactor the session cache",
        "Speed up the nightly import",
        "Localise the checkout page",
        "Find the memory leak in the worker",
        "Review the migration plan",
    ]
    agents = [
        ("FORGE", "opus", 0.30),
        ("ATLAS", "sonnet", 0.12),
        ("SCOUT", "haiku", 0.05),
        ("CLAUDE-CODE", "opus", 0.2),
    ]

    def session(number, agent, model, sloppy, task, start, length, active=False):
        moment, events, held = start, [], set()
        for step in range(length):
            moment += timedelta(seconds=chance.randint(5, 60))
            path, kind, data, entered, written = (
                chance.choice(files),
                "AI_RESPONSE",
                {},
                0,
                chance.randint(150, 900),
            )
            if step == 0:
                kind, data, entered, written = (
                    "CONTEXT_LOAD",
                    {"source": "system"},
                    chance.randint(2500, 4200),
                    0,
                )
            elif chance.random() < 0.45:
                again = sorted(held)[0] if held and chance.random() < sloppy else ""
                if again or path not in held:
                    path = again or path
                    held.add(path)
                    kind, data, written = (
                        "FILE_READ",
                        {"file_path": path, "tool": "Read"},
                        chance.randint(20, 60),
                    )
                    entered = 400 + 380 * files.index(path)
                else:
                    held.discard(path)
                    kind, data = "FILE_WRITE", {"file_path": path, "tool": "Edit"}
            elif chance.random() < 0.3:
                kind, data, entered = (
                    "SEARCH",
                    {"query": f"def part_{step}", "tool": "Grep"},
                    chance.randint(80, 600),
                )
            events.append(
                {
                    "id": f"e{number}_{step}",
                    "timestamp": moment.isoformat(),
                    "event_type": kind,
                    "data": data,
                    "tokens_input": entered,
                    "tokens_output": written,
                    "duration_ms": chance.randint(900, 24_000),
                }
            )
        optimizer.import_session(
            {
                "id": f"{agent.lower()}_{number:03}",
                "agent": agent,
                "task": task,
                "model": model,
                "status": "ACTIVE" if active else "COMPLETED",
                "events": events,
                "started_at": start.isoformat(),
                "ended_at": "" if active else moment.isoformat(),
            }
        )

    number = 0
    for day in range(29, -1, -1):
        for _ in range(0 if day in (5, 11, 18, 24) else chance.randint(1, 3) + (day == 0) * 5):
            number += 1
            agent, model, sloppy = agents[number % 4]
            session(
                number,
                agent,
                model,
                sloppy * (0.6 + day / 30),
                chance.choice(tasks),
                now - timedelta(days=day, hours=chance.uniform(1, 9)),
                chance.randint(14, 60),
            )
    session(
        900,
        "FORGE",
        "opus",
        0.35,
        "Make the loader read gzip files without a second pass",
        now - timedelta(minutes=26),
        40,
        active=True,
    )
    session(
        901, "ATLAS", "sonnet", 0.02, "Draft the release notes", now - timedelta(minutes=7), 14, active=True
    )
    session(
        902,
        "SCOUT",
        "haiku",
        0.0,
        "Find every caller of parse_order()",
        now - timedelta(minutes=2),
        9,
        active=True,
    )
    log_some(optimizer, "claude-code", 'Escape "<b>" in the mail template')


PICTURES = {
    (1280, 1180, False, "light"): "dashboard.png",
    (1280, 1180, False, "dark"): "dashboard-dark.png",
    (860, 960, True, "light"): "dashboard-report.png",
}


@in_browser
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_full_page_can_be_read_at_every_width(browser, client, tmp_path, mode):
    """No scrolling sideways, no control without a name, enough contrast. SESSIONOPTIMIZER_SCREENSHOTS=1
    renews the pictures of the documentation."""
    fill(client.optimizer)
    for width, height in ((375, 812), (768, 1000), (860, 960), (1280, 1180)):
        resize(browser, width, height, mode=mode)
        browser.get("about:blank")
        browser.get(client.url)
        wait_for(browser, "return document.querySelectorAll('#active li').length === 4")
        wait_for(browser, "return document.querySelector('#trend svg')")
        for report in (False, True):
            if report:
                browser.execute_script("location.hash = 'session=forge_900'")
                wait_for(browser, "return document.querySelector('#report .chart svg')")
            for wide in ("document.documentElement", "document.getElementById('report')"):
                assert browser.execute_script(f"return {wide}.scrollWidth <= innerWidth"), (width, report)
            assert browser.execute_script(NAMELESS) == [] and browser.execute_script(CONTRAST) == []
            picture = tmp_path / PICTURES.get((width, height, report, mode), "other.png")
            browser.save_screenshot(str(picture))
            assert picture.stat().st_size > 20_000
            if os.environ.get("SESSIONOPTIMIZER_SCREENSHOTS") and picture.name != "other.png":
                assert picture.stat().st_size < 200_000
                shutil.copyfile(str(picture), str(HERE.parent / "docs" / picture.name))


@in_browser
def test_the_page_with_a_token(browser, tmp_path):
    client = Client(tmp_path, token=TOKEN)
    try:
        log_some(client.optimizer)
        resize(browser, 1280, 1000)
        browser.get(f"{client.url}/?token={TOKEN}")
        wait_for(
            browser,
            "return document.querySelector('#active button') && "
            "document.getElementById('live-text').textContent === 'Live'",
        )
        assert TOKEN not in browser.current_url
    finally:
        client.close()
