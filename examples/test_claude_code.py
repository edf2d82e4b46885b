"""Claude Code: hooks' settings, status line, and the real client against a model on loopback.

The real client's tests skip where ``claude`` is not on the path
(``npm install @anthropic-ai/claude-code``).
"""
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]

import claude_code_hooks as hooks  # noqa: E402
import claude_code_status as status  # noqa: E402
import monitor  # noqa: E402
from agent_session.fake_api import CLASSES, FakeApi  # noqa: E402
from sessionoptimizer import EventType, SessionOptimizer, SessionStatus  # noqa: E402

TIMEOUT = 90
MODEL = "claude-opus-4-6"  # with prices that Claude Code 2.1 and the module's table both know


# ============================================================================
# Settings
# ============================================================================


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    return tmp_path / "config" / "settings.json"


@pytest.mark.parametrize(
    "command", ["my sessionoptimizer wrapper hook", "sh -c 'sessionoptimizer hook; say done'"])
def test_a_users_own_hook_stays(settings, command):
    mine = {"hooks": {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}}
    settings.write_text(json.dumps(mine), encoding="utf-8")
    for action in ("--uninstall", "--install", "--uninstall"):
        assert hooks.main([action]) == 0
        assert command in settings.read_text(encoding="utf-8")
    assert json.loads(settings.read_text(encoding="utf-8")) == mine


def edit_meanwhile(monkeypatch, path, times):
    """Let somebody edit the settings so often just before they are written."""
    make, edits = hooks.tempfile.mkstemp, []

    def edited(**places):
        if len(edits) < times:
            now = json.loads(path.read_text(encoding="utf-8"))
            edits.append(len(edits))
            path.write_text(json.dumps(dict(now, edit=len(edits))), encoding="utf-8")
        return make(**places)

    monkeypatch.setattr(hooks.tempfile, "mkstemp", edited)


@pytest.mark.parametrize("action", ["--install", "--uninstall"])
def test_an_edit_between_read_and_write_is_kept(settings, action, monkeypatch):
    settings.write_text("{}", encoding="utf-8")
    if action == "--uninstall":
        hooks.main(["--install"])
    edit_meanwhile(monkeypatch, settings, 2)
    assert hooks.main([action]) == 0
    now = json.loads(settings.read_text(encoding="utf-8"))
    assert now["edit"] == 2 and bool(hooks.ours_in(now)) is (action == "--install")


def test_a_file_that_changes_all_the_time_is_left_alone(settings, monkeypatch, capsys):
    settings.write_text("{}", encoding="utf-8")
    edit_meanwhile(monkeypatch, settings, 99)
    assert hooks.main(["--install"]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert json.loads(settings.read_text(encoding="utf-8")) == {"edit": hooks.ATTEMPTS}
    assert os.listdir(settings.parent) == ["settings.json"]


def test_the_status_line_comes_and_goes_with_the_hooks(settings, capsys):
    assert hooks.main(["--install", "--status-line"]) == 0
    line = json.loads(settings.read_text(encoding="utf-8"))["statusLine"]
    done = subprocess.run(line["command"], shell=True, input=b"{}", stdout=subprocess.PIPE,
                          timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (0, b"\n") and line["refreshInterval"] == hooks.REFRESH
    assert hooks.main(["--install"]) == 0
    assert "statusLine" not in json.loads(settings.read_text(encoding="utf-8"))
    hooks.main(["--install", "--status-line"])
    assert hooks.main(["--uninstall"]) == 0 and not settings.exists()


def test_a_users_own_status_line_is_not_replaced(settings, capsys):
    own = {"statusLine": {"type": "command", "command": "cat claude_code_status.py"}}
    settings.write_text(json.dumps(own), encoding="utf-8")
    assert hooks.main(["--install", "--status-line"]) == 1
    assert "statusLine of their own" in capsys.readouterr().err
    assert hooks.main(["--install"]) == hooks.main(["--uninstall"]) == 0
    assert json.loads(settings.read_text(encoding="utf-8")) == own


# ============================================================================
# The status line
# ============================================================================

AT = "2026-08-01T10:00:00.000Z"
SECONDS = 1785578400.0  # the same


@pytest.fixture
def optimizer(tmp_path):
    return SessionOptimizer(str(tmp_path / "store"))


def answer(read, write=0, lifetime="5m", **more):
    usage = {"input_tokens": 3, "cache_creation_input_tokens": write,
             "cache_read_input_tokens": read, "output_tokens": 9,
             "cache_creation": {f"ephemeral_{lifetime}_input_tokens": write}}
    return {"type": "assistant", "timestamp": AT, "isSidechain": False, **more,
            "message": {"id": f"m{read}", "role": "assistant", "model": MODEL, "content": [],
                        "usage": usage}}


def payload_of(tmp_path, *entries, **more):
    path = tmp_path / "s1.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return {"session_id": "s1", "transcript_path": str(path), "model": {"id": MODEL},
            "cost": {"total_cost_usd": 0.4842},
            "context_window": {"context_window_size": 200_000, "current_usage": None}, **more}


@pytest.mark.parametrize("entries, seconds, said", [
    ((answer(29_000, 997),), 10,
     "30.0k tokens (15%) · $0.4842, $0.0150 per call · cache 4m50s, until "),
    ((answer(29_000, 997, "1h"),), 10,
     "30.0k tokens (15%) · $0.4842, $0.0150 per call · cache 59m50s, until "),
    ((answer(0, 997), answer(29_997)), 290,
     "30.0k tokens (15%) · $0.4842, $0.0150 per call · cache 10s, until "),
    ((answer(29_000, 997),), 301,
     "30.0k tokens (15%) · $0.4842, $0.1875 for the next call · cache expired"),
    # no lifetime is told
    ((answer(29_997),), 10, "30.0k tokens (15%) · $0.4842, $0.0150 per call"),
    ((answer(29_000, 997), answer(5, 5, isSidechain=True)), 301,
     "30.0k tokens (15%) · $0.4842, $0.1875 for the next"),
    ((), 10, "$0.4842"),
])
def test_what_the_status_line_says(tmp_path, optimizer, entries, seconds, said):
    line = status.status_line(payload_of(tmp_path, *entries), optimizer, SECONDS + seconds)
    assert line.startswith(said) and "\n" not in line
    assert ("until" in said) is ("until" in line) and ("expired" in line) is (seconds > 300)


def test_the_clients_own_context_comes_first(tmp_path, optimizer):
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 9, "cache_read_input_tokens": 990,
             "output_tokens": 5}
    told = payload_of(tmp_path, answer(29_000, 997),
                      context_window={"context_window_size": 4_000, "current_usage": usage})
    assert status.status_line(told, optimizer, SECONDS).startswith("1,000 tokens (25%)")


def read(optimizer, name, content="a line\n" * 600):
    optimizer.log_hook(
        {"session_id": "s1", "hook_event_name": "PostToolUse", "cwd": "/w", "tool_name": "Read",
         "tool_input": {"file_path": name}, "tool_response": {"type": "text", "file": {
             "content": content, "numLines": 600, "startLine": 1, "totalLines": 600}}})


def test_what_was_read_twice_is_named_once(tmp_path, optimizer):
    told = payload_of(tmp_path, answer(29_000, 997))
    for name in ("/w/a.py", "/w/b.py"):
        read(optimizer, name)
    assert "read twice" not in status.status_line(told, optimizer, SECONDS)
    for name in ("/w/b.py", "/w/b.py", "/w/a.py"):
        read(optimizer, name)
    assert status.status_line(told, optimizer,
                              SECONDS).endswith(" · read twice: b.py (~2,334 tokens)")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"cost": 3, "model": [], "context_window": {"current_usage": 5}}', "5",
             '{"transcript_path": "\\u0000"}', '{"session_id": "../../x"}'])
def test_whatever_it_is_told_is_one_line(text, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    assert status.main(["--store", str(tmp_path)]) == 0
    sys.stdout.buffer.seek(0)
    assert sys.stdout.buffer.read().count(b"\n") == 1


def test_the_status_line_loads_no_more_than_a_log_does():
    """Its start-up is that of the module and its own file."""
    code = "import sys; sys.path[:0] = [%r, %r]; import %s; print(*sorted(sys.modules))"
    loaded = {name: set(subprocess.run([sys.executable, "-c", code % (ROOT, HERE, name)],
                                       stdout=subprocess.PIPE,
                                       timeout=TIMEOUT).stdout.decode().split())
              for name in ("sessionoptimizer", "claude_code_status")}
    assert loaded["claude_code_status"] - loaded["sessionoptimizer"] <= {"claude_code_status"}


# ============================================================================
# Running sessions
# ============================================================================


def hook(optimizer, name, path, **more):
    return optimizer.log_hook(
        {"session_id": "s1", "hook_event_name": name, "cwd": "/w", "transcript_path": path, **more})


def test_a_line_for_every_running_session(tmp_path, optimizer):
    assert monitor.Live(optimizer).lines() == ["no session is running"]
    path = payload_of(
        tmp_path, {"type": "user", "sessionId": "s1", "uuid": "u", "timestamp": AT, "cwd": "/w",
                   "message": {"role": "user", "content": "Fix it"}},
        dict(answer(29_000, 997), sessionId="s1", uuid="v", cwd="/w"))["transcript_path"]
    hook(optimizer, "UserPromptSubmit", path, prompt="Fix it")
    optimizer.start_session("FORGE", "Without a transcript", session_id="plain")
    optimizer.log_event("plain", "FILE_READ", {"file_path": "x"}, tokens_input=700)
    watched = monitor.Live(optimizer)
    first, second = sorted(watched.lines(SECONDS))
    assert first.startswith("plain  Without a transcript  700 tokens · $")
    price = optimizer.prices.lookup(MODEL)
    cost = (3 * price.input + 997 * price.cache_write + 29_000 * price.cache_read
            + 9 * price.output) / 1000
    assert second.startswith(
        f"s1  Fix it  30.0k tokens · ${cost:.4f}, $0.0150 per call · cache 5m00s, until ")
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(answer(29_997, 3), sessionId="s1", uuid="w", parentUuid="v",
                                   cwd="/w")) + "\n")
    assert f"${cost:.4f}" not in "".join(watched.lines(SECONDS))
    hook(optimizer, "SessionEnd", path)
    assert len(watched.lines()) == 1
    done = subprocess.run([sys.executable, os.path.join(HERE, "monitor.py"), "--live", "--store",
                           optimizer.store.root],
                          stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert done.returncode == 0 and done.stdout.decode().splitlines() == watched.lines()


WHOLE = ("1111111…  Fix it  33.0k tokens · $0.2075, $0.0165 per call · cache 4m17s, until 20:58 · "
         "read twice: a.py (~500 tokens)")


@pytest.mark.parametrize("width, fitted", [
    (200, WHOLE), (len(WHOLE), WHOLE),
    (len(WHOLE) - 1, WHOLE.replace(", until 20:58", "")),
    (100,
     "1111111…  Fix it  33.0k tokens · $0.2075 · cache 4m17s · read twice: a.py (~500 tokens)"),
    (79, "1111111…  Fix it  33.0k tokens · $0.2075 · cache 4m17s · read twice: a.py"),
    (59, "1111111…  Fix it  33.0k tokens · $0.2075 · cache 4m17s"),
    (20, "1111111…  Fix it  3…"), (1, "…"), (0, "…")])
def test_a_narrow_terminal_keeps_the_end_of_the_cache_longest(width, fitted):
    assert monitor.fitted(WHOLE, width) == fitted


# ============================================================================
# The real client
# ============================================================================


class Client:
    """Claude Code in an empty home with our hooks, guard and status line,
    and a model on loopback."""

    def __init__(self, place):
        self.home, self.work, self.store = place / "home", place / "work", str(place / "store")
        self.work.mkdir()
        (self.home / ".claude").mkdir(parents=True)
        (self.work / "a.txt").write_text("".join(f"{number}\n" for number in range(300)),
                                         encoding="utf-8")
        past = time.time() - 60
        os.utime(self.work / "a.txt", (past, past))
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT", "TMPDIR")
                if name in os.environ}
        self.env = dict(kept, HOME=str(self.home), TERM="xterm-256color", DISABLE_AUTOUPDATER="1",
                        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                        HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
        self.program("claude_code_hooks.py", "--install", "--guard", "--status-line",
                     "--store", self.store)

    def program(self, name, *words):
        done = subprocess.run([sys.executable, os.path.join(HERE, name), *words], env=self.env,
                              stdout=subprocess.PIPE, timeout=TIMEOUT, check=True)
        return done.stdout.decode()

    def start(self, api, prompt, *words):
        return subprocess.Popen(
            ["claude", "-p", prompt, "--model", MODEL, "--output-format", "json", "--allowedTools",
             "Read,Bash,Agent,Task",
             *words], env=dict(self.env, **api.environment()), cwd=str(self.work),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, api, prompt, *words):
        """What the client says of a run of its own."""
        output, errors = self.start(api, prompt, *words).communicate(timeout=TIMEOUT)
        told = json.loads(output.decode())
        assert not told["is_error"], (told, errors)
        return told

    def optimizer(self):
        return SessionOptimizer(self.store)


@pytest.fixture
def client(tmp_path):
    if not shutil.which("claude"):
        pytest.skip("claude is not on the path (npm install @anthropic-ai/claude-code)")
    return Client(tmp_path)


def sums(rows):
    return {name: sum(row["tokens"][key] for row in rows) for name, key in zip(
        CLASSES, ("uncached_input", "cache_write", "cache_read", "output"))}


def test_a_headless_run_is_logged_to_its_end(client):
    a, seen = str(client.work / "a.txt"), []
    turns = [{"tool": "Read", "input": {"file_path": a}},
             {"tool": "Bash", "input": {"command": f"cat {a}"}},
             {"tool": "Bash", "input": {"command": "wc -l a.txt"}},
             {"text": "Three hundred lines."}]

    def script(request):
        seen.append(json.dumps(request.items))
        return turns[request.answered]

    with FakeApi(script) as api:
        told = client.run(api, "How many lines?")
        optimizer = client.optimizer()
        session = optimizer.get_session(told["session_id"])
        assert ((session.status, session.model, session.task)
                == (SessionStatus.COMPLETED, MODEL, "How many lines?"))
        assert [event.data.get("command") for event in session.events
                if event.event_type is EventType.TOOL_CALL] == ["wc -l a.txt"]
        assert sum(event.event_type is EventType.AI_RESPONSE for event in session.events) == 4
        rows = optimizer.scan([str(client.home / ".claude")])["sessions"]
        assert sums(rows) == api.sums()
        assert (sum(row["estimated_cost"] for row in rows)
                == pytest.approx(told["total_cost_usd"], abs=1e-12))
        assert "it is still in the context" in seen[2]  # what the guard said of the cat
        assert "it is still in the context" not in seen[1]


def test_an_agent_that_was_killed_has_its_session_closed_by_the_next_command(client):
    a = str(client.work / "a.txt")
    with FakeApi(
            [{"tool": "Read", "input": {"file_path": a}}, {"text": "Never", "delay": 60}]) as api:
        process = client.start(api, "How many lines?")
        until = time.time() + TIMEOUT
        while len(api.requests) < 2 or not client.optimizer().list_sessions() or (
                client.optimizer().list_sessions()[0].model == "default"):
            assert time.time() < until
            time.sleep(0.2)
        (session,) = client.optimizer().list_sessions()
        assert (session.status, session.model) == (SessionStatus.ACTIVE, MODEL)
        (line,) = client.program("monitor.py", "--live", "--store", client.store).splitlines()
        assert (line.startswith(session.id[:7]) and "How many lines?" in line
                and " tokens · $" in line)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
        (session,) = client.optimizer().list_sessions()
        assert session.status is SessionStatus.COMPLETED
        assert sum(event.event_type is EventType.AI_RESPONSE for event in session.events) == 1


def test_a_resumed_session_a_compaction_and_a_sub_agent_cost_what_the_client_says(client):
    a = str(client.work / "a.txt")
    look = {"description": "look", "prompt": "Sub task: count", "subagent_type": "general-purpose"}
    scripts = {
        "Sub task": [{"tool": "Read", "input": {"file_path": a}}, {"text": "Three hundred."}],
        "How many": [{"tool": "Agent", "input": look}, {"text": "Three hundred lines."},
                     {"text": "Still as many."}],
        "": [{"text": "<summary>All done.</summary>"}]}
    with FakeApi(scripts) as api:
        first = client.run(api, "How many lines?")
        costs, untold = [first["total_cost_usd"]], []
        for prompt in ("And now?", "/compact", "After that?"):
            before = len(api.truth)
            told = client.run(api, prompt, "--resume", first["session_id"])
            if prompt == "/compact":
                # the client keeps the summary, not the usage of the call that wrote it
                untold = api.truth[before:]
            else:
                costs.append(told["total_cost_usd"])
        optimizer = client.optimizer()
        (live,) = optimizer.list_sessions()
        assert ((live.id, live.status, live.model)
                == (first["session_id"], SessionStatus.COMPLETED, MODEL))
        assert {event.agent_id != "" for event in live.events} == {True, False}
        assert sum(event.data.get("source") == "compaction" for event in live.events) == 1
        rows = optimizer.scan([str(client.home / ".claude")])["sessions"]
        everything = api.sums()
        assert len(untold) == 1
        assert sums(rows) == {name: everything[name] - untold[0][name] for name in CLASSES}
        assert sum(row["estimated_cost"] for row in rows) == pytest.approx(sum(costs), abs=1e-12)


def test_the_status_line_is_on_the_clients_screen(client):
    pytest.importorskip("ptyprocess",
                        reason="the extra 'agents' brings ptyprocess, which a terminal needs")
    from agent_session.terminal import spawn
    known = {"hasCompletedOnboarding": True, "theme": "dark",
             "customApiKeyResponses": {"approved": ["none"]}, "projects": {str(client.work): {
                 "hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}}}
    (client.home / ".claude.json").write_text(json.dumps(known), encoding="utf-8")
    with FakeApi([{"text": "Three hundred lines."}]) as api:
        process = spawn(["claude", "--model", MODEL], cwd=str(client.work),
                        env=dict(client.env, **api.environment()), rows=50, columns=150)
        try:
            for word, keys in (("effort", b"How many lines?"), ("lines?", b"\r"), ("hundred", b""),
                               ("until", b"")):
                shown(process, word)
                time.sleep(0.5)  # its input is not ready when it is drawn
                process.write(keys)
        finally:
            process.kill(signal.SIGKILL)
            process.close(force=True)
    (session,) = client.optimizer().list_sessions()
    assert session.status is SessionStatus.COMPLETED and session.model == MODEL


def shown(process, word):
    """Read the terminal until the word is drawn;
    the client separates words by moving the cursor."""
    output, until = b"", time.time() + TIMEOUT
    while word.encode() not in output:
        assert time.time() < until, output[-2000:]
        if select.select([process.fd], [], [], 1)[0]:
            output += process.read(65536)
