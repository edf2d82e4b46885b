"""Tests of agent_session's recorder: what it shows, what it passes on, where its tokens come from.

Real agents (npm) run against the scripted model on loopback; what is not here is skipped with its
name.
"""

import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
from agent_session.fake_api import (  # noqa: E402  (found above)
    CLASSES, FakeApi, codex_config, gemini_settings)
from agent_session.logs import Watch, agent_of, roots_of  # noqa: E402
from agent_session.proxy import Meter, PassThrough, figures_of  # noqa: E402
from agent_session.record import Volume  # noqa: E402
from agent_session.terminal import processes  # noqa: E402

from sessionoptimizer import SessionOptimizer, SessionStatus  # noqa: E402

pytest.importorskip(
    "ptyprocess", reason="ptyprocess is not installed: pip install 'sessionoptimizer[agents]'")
RECORD = [sys.executable, os.path.join(HERE, "agent_session", "record.py")]
TIMEOUT = 120  # seconds for one program, a real agent among them
SIZE = (30, 100)


# ============================================================================
# A terminal to test in
# ============================================================================

IN_FRONT = ("import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execvp(sys.argv[1], sys.argv[1:])")


def shown(command, steps=(), *, cwd=None, env=None, size=SIZE):
    """(bytes, return code) of a command in a terminal of its own. A step is (bytes to wait for,
    what is typed then, or a function of process and terminal); the output is waited for to be quiet
    before."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", IN_FRONT, *command], stdin=slave, stdout=slave, stderr=slave,
        cwd=cwd, env=env, start_new_session=True)
    os.close(slave)
    steps, output, since, until = list(steps), b"", 0, time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < until:
            if select.select([master], [], [], 0.3)[0]:
                try:
                    data = os.read(master, 65_536)
                except OSError:  # Linux's end of a terminal
                    data = b""
                if not data:
                    return output, process.wait(TIMEOUT)
                output += data
            elif steps and steps[0][0] in output[since:]:
                since, step = len(output), steps.pop(0)[1]
                if callable(step):
                    step(process, master)
                else:
                    os.write(master, step)
        raise AssertionError(f"not over after {TIMEOUT} s; at {output[-500:]!r}")
    finally:
        os.close(master)
        if process.poll() is None:
            process.kill()
            process.wait()


def program(name):
    """The name, if there is such a program."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def store(tmp_path):
    yield str(tmp_path / "store")
    assert ([process for process in processes() if process.parent == os.getpid() and process.zombie]
            == [])


def recorded(store, command, *options):
    return [*RECORD, "--store", store, *options, "--", *command]


def result_of(store, command, *options, **how):
    """(what --result tells, output, return code) of a recorded command in a terminal."""
    path = os.path.join(os.path.dirname(store), "result.json")
    output, code = shown(recorded(store, command, "--result", path, *options), **how)
    with open(path, encoding="utf-8") as file:
        return json.load(file), output, code


def sums(store):
    """The tokens of all sessions of a store, by class."""
    totals = dict.fromkeys(CLASSES, 0)
    for session in SessionOptimizer(store).list_sessions():
        for event in SessionOptimizer(store).get_session(session.id).events:
            totals["uncached_input"] += event.tokens_input - event.tokens_cache_write
            totals["cache_write"] += event.tokens_cache_write
            totals["cache_read"] += event.tokens_cache_read
            totals["output"] += event.tokens_output
    return totals


# ============================================================================
# What is shown
# ============================================================================

SAME = {  # command, steps: bytes and status are those under script(1)
    "output": (["sh", "-c", "echo out; echo err >&2"], ()),
    "every byte": ([sys.executable, "-c",
                    "import os; os.system('stty raw'); os.write(1, bytes(range(256)))"], ()),
    "the terminal's settings": (["stty", "-a"], ()),
    "its size": (["stty", "size"], ()),
    "typed lines": (["sh", "-c", "echo go; read a; read b; echo $b$a"],
                    ((b"go", b"one\n"), (b"one", b"two\n"))),
    "end of input": (["sh", "-c", "echo go; cat"], ((b"go", b"line\n"), (b"line", b"\x04"))),
    "an interrupt": (
        ["sh", "-c", "trap 'echo caught; exit 9' INT; echo go; while :; do sleep 0.05; done"],
        ((b"go", b"\x03"),)),
    "no end of line": (["printf", "abc"], ()),
    "a full screen": (["vim", "-u", "NONE", "-i", "NONE", "-n", "file.txt"],
                      ((b"file.txt", b"ihello\x1b"), (b"hello", b"yyp"), (b"hello", b":wq\r"))),
}


@pytest.mark.parametrize("case", SAME)
def test_a_recorded_command_looks_the_same_as_under_script(case, store, tmp_path):
    program("script")
    command, steps = SAME[case]
    program(command[0])
    # an editor draws as its input arrives, which a busy machine may cut
    for attempt in range(3 if case == "a full screen" else 1):
        seen = []
        # exec: not every shell that script starts makes way for its last command, and one that
        # stays takes the signals too
        under_script = ["script", "-qe", "-c", "exec " + shlex.join(command), "/dev/null"]
        for name, line in (("script", under_script), ("record", recorded(store, command))):
            place = tmp_path / f"{name}{attempt}" / "work"
            place.mkdir(parents=True)
            seen.append(shown(line, steps, cwd=str(place))
                        + tuple(path.read_bytes() for path in place.iterdir()))
        if seen[0] == seen[1]:
            break
    assert seen[0] == seen[1]
    if case == "a full screen":
        assert seen[1][2:] == (b"hello\nhello\n",)


def typescript(path):
    """What script(1) has kept, without its own first and last line."""
    with open(path, "rb") as file:
        data = file.read()
    data = data[data.index(b"\n") + 1:] if data.startswith(b"Script started") else data
    at = data.rfind(b"\nScript done")
    return data if at < 0 else data[:at]


@pytest.mark.parametrize("command, steps", [
    (["top", "-d", "0.3", "-n", "3"], ()),
    (["vim", "-u", "NONE", "-i", "NONE", "-n", "file.txt"],
     ((b"file.txt", b"ihello\x1b"), (b"hello", b":q!\r"))),
])
def test_what_script_keeps_of_one_run_is_what_is_shown_of_it(command, steps, store, tmp_path):
    """For what is never twice the same: top under script under record, and record under script."""
    program("script"), program(command[0])
    kept, cast = str(tmp_path / "kept"), str(tmp_path / "run.cast")
    output, code = shown(recorded(store, ["script", "-qe", "-c", "exec " + shlex.join(command),
                                          kept], "--cast", cast), steps)
    assert (code == 0 and len(output) > 500
            and output.rstrip(b"\n") == typescript(kept).rstrip(b"\n"))
    with open(cast, encoding="utf-8") as file:
        events = [json.loads(line) for line in file][1:]
    assert "".join(event[2] for event in events if event[1] == "o").encode() == output
    inside = recorded(store, command, "--cast", cast)
    output, code = shown(["script", "-qe", "-c", "exec " + shlex.join(inside), kept], steps)
    assert code == 0 and output.rstrip(b"\n") == typescript(kept).rstrip(b"\n")
    with open(cast, encoding="utf-8") as file:
        events = [json.loads(line) for line in file][1:]
    assert ("".join(event[2] for event in events if event[1] == "o").encode().strip()
            == output.strip())


ENDS = ["exit 0", "exit 3", "exit 255", "kill -TERM $$", "kill -KILL $$", "kill -SEGV $$",
        "kill -HUP $$", "ulimit -c 0; kill -ABRT $$"]


@pytest.mark.parametrize("script", ENDS)
def test_it_ends_as_the_command_ends(script, store):
    bare = subprocess.run(["sh", "-c", script], timeout=TIMEOUT).returncode
    kept = subprocess.run(
        recorded(store, ["sh", "-c", script]), stdin=subprocess.DEVNULL, timeout=TIMEOUT).returncode
    assert kept == bare
    session, = SessionOptimizer(store).list_sessions()
    assert session.status is (SessionStatus.FAILED if bare else SessionStatus.COMPLETED)


@pytest.mark.parametrize("command, code, says", [
    (["no-such-program"], 127, "no-such-program"), (["/etc/passwd"], 126, "/etc/passwd"),
])
def test_a_command_that_cannot_be_run_ends_as_a_shell_says_it(command, code, says, store):
    done = subprocess.run(recorded(store, command), stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == code and says in done.stderr
    session, = SessionOptimizer(store).list_sessions()
    assert session.status is SessionStatus.FAILED and session.total_tokens == 0


@pytest.mark.parametrize("arguments", [[], ["ls"], ["--"], ["--data", "x", "--", "ls"],
                                       ["--usage", "screen", "--", "ls"]])
def test_a_command_line_that_is_wrong_is_refused(arguments):
    assert subprocess.run(
        [*RECORD, *arguments], stderr=subprocess.DEVNULL, timeout=TIMEOUT).returncode == 2


# ============================================================================
# What is passed on
# ============================================================================


def test_a_change_of_size_reaches_the_command(store):
    def grow(process, master):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 7, 9))

    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    output, code = shown(recorded(store, ["sh", "-c", script]), ((b"ready", grow),))
    assert output.split() == [b"ready", b"50", b"120"] and code == 0


CATCHES = """
import signal, sys
signal.signal(getattr(signal, sys.argv[1]), lambda *_: sys.exit(print("got it", flush=True) or 5))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_signals_are_passed_on(name, store):
    process = subprocess.Popen(recorded(store, [sys.executable, "-c", CATCHES, name]),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"ready\r\n"
        process.send_signal(getattr(signal, name))
        assert process.stdout.readline() == b"got it\r\n"
        assert process.wait(TIMEOUT) == 5


def test_a_signal_for_the_command_is_none_for_what_it_has_started(store):
    """As without a recorder; what a keyboard sends goes to all, as a terminal does it."""
    script = "trap 'echo asked' TERM; sleep 1; echo slept $?"
    process = subprocess.Popen(recorded(store, ["sh", "-c", "echo ready; " + script]),
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"ready\r\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().split() == [b"asked", b"slept", b"0"]


def test_the_command_inherits_no_ignored_signals(store):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    output, _ = shown(recorded(store, ["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]))
    assert output.split() == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


@pytest.mark.parametrize("given", [b"one\ntwo\n", b"", b"no end of line", b"x" * 3000 + b"\n"])
def test_input_that_is_no_terminal_is_passed_on_to_its_end(given, store):
    done = subprocess.run(
        recorded(store, ["cat"]), input=given, stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (0, given.replace(b"\n", b"\r\n"))


def test_much_input_and_output_at_once_is_no_deadlock(store):
    line = b"y" * 99 + b"\n"
    done = subprocess.run(
        recorded(store, ["sh", "-c",
                         "stty raw -echo; head -c 1000000 /dev/zero | tr '\\0' z; head -c 500000"]),
        input=line * 5000, stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert done.returncode == 0 and done.stdout.count(b"z") == 1_000_000
    assert len(done.stdout) == 1_500_000


def test_it_ends_when_nobody_reads_any_more(store):
    process = subprocess.Popen(
        recorded(store, ["yes"]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"y\r\n"
        process.stdout.close()
        assert process.wait(TIMEOUT) in (-signal.SIGHUP, 128 + signal.SIGHUP)


def test_what_holds_the_terminal_open_is_not_waited_for(store):
    done = subprocess.run(recorded(store, ["sh", "-c", "(trap '' HUP; sleep 20) & echo over"]),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=15)
    assert done.stdout == b"over\r\n"


def test_a_recorder_that_is_killed_takes_its_command_along_and_leaves_no_open_session(store):
    mark = f"sleep 4321.{os.getpid()}1"
    process = subprocess.Popen(
        recorded(store, ["sh", "-c", f"echo ready; {mark}; true"], "--session-id", "lost"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"ready\r\n"
        process.kill()
    until = time.monotonic() + TIMEOUT
    while any(mark in told for told in command_lines()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(mark in told for told in command_lines())
    subprocess.run(recorded(store, ["true"], "--session-id", "next"), stdin=subprocess.DEVNULL,
                   timeout=TIMEOUT)
    if os.path.isdir("/proc/self"):
        assert SessionOptimizer(store).get_session("lost").status is SessionStatus.ABANDONED
    assert os.listdir(os.path.join(store, "recordings")) in ([], ["lost"])


def command_lines():
    told = subprocess.run(
        ["ps", "-axo", "args="], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT)
    return told.stdout.splitlines()


def test_the_session_says_what_was_run_and_how_it_ended(store, tmp_path):
    told, _, code = result_of(
        store, ["sh", "-c", "TOKEN=sk-ant-api03-abcdefghijklmnopqrstuvwxyz0123456789; exit 4"],
        "--data", "task=7", "--data", "team=a=b", "--agent", "worker", "--session-id", "w1")
    session = SessionOptimizer(store).get_session("w1")
    assert code == told["exit_status"] == 4 and told["session"] == "w1" and told["signal"] == 0
    assert ((session.agent, session.metadata["task"], session.metadata["team"])
            == ("WORKER", "7", "a=b"))
    assert "abcdefghijklmnop" not in json.dumps(session.to_dict())
    kinds = [event.event_type.value for event in session.events]
    assert kinds[0] == "SESSION_START" and kinds[-2:] == ["TOKEN_USAGE", "SESSION_END"]
    assert session.events[-2].data["recorded"]["exit_status"] == 4
    assert os.stat(tmp_path / "result.json").st_mode & 0o777 == 0o600


def test_a_store_that_is_lost_meanwhile_does_not_change_how_the_command_ends(store):
    done = subprocess.run(recorded(
        store, ["sh", "-c", f"rm -rf {shlex.quote(store)}; : >{shlex.quote(store)}; exit 7"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert ((done.returncode, done.stdout) == (7, "")
            and done.stderr.startswith("record.py: not written down")
            and "Traceback" not in done.stderr)


# ============================================================================
# Tokens from the provider's answers
# ============================================================================

CLIENT = """
import json, os, sys, urllib.request
paths = {"messages": ("ANTHROPIC_BASE_URL", "/v1/messages"),
         "responses": ("OPENAI_BASE_URL", "/responses"),
         "chat": ("OPENAI_BASE_URL", "/chat/completions"),
         "gemini": ("GOOGLE_GEMINI_BASE_URL", "/v1beta/models/m:%s")}
protocol, how, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
name, path = paths[protocol]
for _ in range(times):
    body = {"model": "claude-opus-4-6", "tools": [{}],
            "messages": [{"role": "user", "content": "Hi"}]}
    if protocol == "responses":
        body = {"model": "gpt-5-codex", "tools": [{}], "input": "Hi"}
    if protocol == "gemini":
        body = {"tools": [{}], "contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
        url = path % ("streamGenerateContent?alt=sse" if how == "stream" else "generateContent")
    else:
        body["stream"], url = how == "stream", path
    request = urllib.request.Request(os.environ[name] + url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        print(len(answer.read()))
"""


def plain_environment(**more):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR")
            if name in os.environ}
    return dict(kept, TERM="xterm-256color", **more)


@pytest.mark.parametrize("how", ["whole", "stream"])
@pytest.mark.parametrize("protocol", ["messages", "responses", "chat", "gemini"])
def test_tokens_come_from_the_answers_where_no_log_is(protocol, how, store, tmp_path):
    with FakeApi([{"thinking": "Hm, let me see.", "tool": "t", "input": {"a": 1}}]) as api:
        env = plain_environment(**dict(api.environment(), HOME=str(tmp_path)))
        told, output, code = result_of(
            store, [sys.executable, "-c", CLIENT, protocol, how, "3"], env=env)
    truth = api.sums()
    assert code == 0 and len(api.truth) == 3 == told["calls"] and truth["cache_read"] > 0
    assert (told["source"], told["estimated"], told["sessions"]) == ("pass-through", False, [])
    assert {name: told["tokens"][name] for name in CLASSES} == truth == sums(store)
    session, = SessionOptimizer(store).list_sessions()
    assert session.status is SessionStatus.COMPLETED
    assert session.estimated_cost == pytest.approx(told["cost"]) and told["cost"] > 0
    assert session.model == {"messages": "claude-opus-4-6", "responses": "gpt-5-codex",
                             "chat": "claude-opus-4-6"}.get(protocol, "m")


def test_what_was_cut_off_or_says_no_usage_is_estimated_and_called_so(store):
    meter = Meter("messages", "/v1/messages", b'{"model": "m"}' + b" " * 386, streamed=True)
    meter.feed(b'event: ping\ndata: {"type": "ping"}\n\n' + b"x" * 60)
    answer = meter.answer(5)
    assert ((answer.estimated, answer.model, answer.uncached_input, answer.output)
            == (True, "m", 100, 24))


USAGE = [  # protocol, what the provider says, classes
    ("messages", {"input_tokens": 3, "cache_creation_input_tokens": 10,
                  "cache_read_input_tokens": 20, "output_tokens": 4,
                  "cache_creation": {"ephemeral_1h_input_tokens": 6}},
     {"uncached_input": 3, "cache_write": 10, "cache_write_1h": 6, "cache_read": 20, "output": 4}),
    ("messages", {"input_tokens": None, "output_tokens": True},
     {"uncached_input": 0, "cache_write": 0, "cache_write_1h": 0, "cache_read": 0, "output": 0}),
    ("responses", {"input_tokens": 30, "input_tokens_details": {"cached_tokens": 20},
                   "output_tokens": 4}, {"uncached_input": 10, "cache_read": 20, "output": 4}),
    ("responses", {"input_tokens": 30, "input_tokens_details": None, "output_tokens": 4},
     {"uncached_input": 30, "cache_read": 0, "output": 4}),
    ("chat", {"prompt_tokens": 30, "prompt_tokens_details": {"cached_tokens": 20},
              "completion_tokens": 4}, {"uncached_input": 10, "cache_read": 20, "output": 4}),
    ("gemini", {"promptTokenCount": 30, "cachedContentTokenCount": 20, "candidatesTokenCount": 4,
                "thoughtsTokenCount": 5, "toolUsePromptTokenCount": 2},
     {"uncached_input": 12, "cache_read": 20, "output": 9}),
]


@pytest.mark.parametrize("protocol, usage, classes", USAGE)
def test_usage_becomes_disjoint_classes(protocol, usage, classes):
    assert figures_of(protocol, usage) == classes


@pytest.mark.parametrize("pieces", [1, 7, 4096])
def test_a_stream_is_read_however_it_is_cut(pieces):
    stream = (b'event: message_start\ndata: {"type": "message_start", "message": {"id": "a", '
              b'"model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}}}\n\n'
              b'data: {"type": "content_block_delta", "delta": {"text": "the usage of words"}}\n\n'
              b'data: {"type": "message_delta", "usage": {"output_tokens": 9}}\n\n')
    meter = Meter("messages", "/v1/messages", b"{}", streamed=True)
    for at in range(0, len(stream), pieces):
        meter.feed(stream[at:at + pieces])
    answer = meter.answer(1)
    assert ((answer.id, answer.model, answer.uncached_input, answer.output, answer.estimated)
            == ("a", "m", 5, 9, False))


@contextlib.contextmanager
def passing(env):
    told = []
    through = PassThrough(told.append, env)
    through.start()
    try:
        yield through.environment(), told
    finally:
        through.stop()


def test_the_pass_through_hands_on_what_is_asked_and_answered():
    def ask(url, data=None, method=None, **headers):
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    body = json.dumps({"model": "m", "tools": [{}], "stream": True,
                       "messages": [{"role": "user", "content": "Hi"}]}).encode()
    with FakeApi([{"text": "h\u00e9", "status": 529}]) as api, passing({
            "ANTHROPIC_BASE_URL": api.url, "OPENAI_BASE_URL": "http://127.0.0.1:9"}) as (env, told):
        base = env["ANTHROPIC_BASE_URL"]
        assert ask(base + "/v1/messages?beta=true", body)[0] == 529 and told == []
        status, answer, headers = ask(base + "/v1/messages?beta=true", body)
        assert status == 200 and headers.get_content_type() == "text/event-stream"
        assert (
            answer == ask(api.url + "/v1/messages", body)[1].replace(b"000002", b"000001").replace(
                b'_read_input_tokens": 29', b'_read_input_tokens": 0') or b"h" in answer)
        assert ask(base + "/", method="HEAD")[:2] == (200, b"")
        assert ask(base + "/v1/models")[0] == 200
        assert (json.loads(ask(base + "/v1/messages/count_tokens", b"x" * 40)[1])["input_tokens"]
                == 10)
        assert (ask(base.rpartition("/")[0].rpartition("/")[0] + "/guess/0/v1/messages", body)[0]
                == 404)
        assert ask(env["OPENAI_BASE_URL"] + "/responses", b"{}")[0] == 502
        assert ("POST", "/v1/messages?beta=true") in api.requests and len(told) == 1
        assert told[0].output == api.truth[0]["output"] and told[0].id.endswith("000001")


def test_a_client_that_goes_away_is_counted_to_the_end():
    with FakeApi([{"text": "word " * 50_000}]) as api, passing(
            {"ANTHROPIC_BASE_URL": api.url}) as (env, told):
        body = json.dumps({"model": "m", "tools": [{}], "stream": True,
                           "messages": [{"role": "user", "content": "Hi"}]}).encode()
        answer = urllib.request.urlopen(
            urllib.request.Request(env["ANTHROPIC_BASE_URL"] + "/v1/messages", body),
            timeout=TIMEOUT)
        answer.read(100)
        answer.close()
        until = time.monotonic() + 30
        while not told and time.monotonic() < until:
            time.sleep(0.02)
        assert [(row.output, row.estimated) for row in told] == [(api.truth[0]["output"], False)]


# ============================================================================
# Estimates
# ============================================================================


def test_an_estimate_is_called_one_and_takes_no_figure_from_the_screen(store, tmp_path):
    told, _, _ = result_of(store, ["printf", "12345678"], env=plain_environment(HOME=str(tmp_path)))
    assert (told["source"], told["estimated"]) == ("estimate", True)
    assert (told["tokens"]["uncached_input"], told["tokens"]["output"]) == (2, 2)
    session = SessionOptimizer(store).get_session(told["session"])
    event, = [event for event in session.events if event.event_type.value == "AI_RESPONSE"]
    assert event.data["estimated"] is True and session.total_tokens == 4
    told, _, _ = result_of(store, ["printf", "Tokens: 90,000"], "--usage", "none",
                           env=plain_environment(HOME=str(tmp_path)))
    assert (told["source"], sum(told["tokens"].values())) == ("none", 0)


VOLUME = [  # pieces printed, characters counted
    ([b"hello"], 5), ([b"\x1b[31mred\x1b[0m\r\n"], 3), ([b"a\x1b[?1049hdrawn\x1b[?1049lb"], 2),
    ([b"\x1b[?1049h", b"drawn", b"\x1b[?1049l", b"b"], 1), (["h\u00e9".encode()], 2),
    ([b"x" * 100] * 20_000, 1 << 20),
]


@pytest.mark.parametrize("pieces, characters", VOLUME)
def test_an_estimate_counts_text_that_is_no_full_screen_up_to_a_megabyte(pieces, characters):
    volume = Volume()
    for piece in pieces:
        if volume.counting:
            volume.printed(piece)
    assert (abs(volume.answered - characters) < 100 if characters > 100
            else volume.answered == characters)


# ============================================================================
# Tokens from the agent's own log
# ============================================================================


def response(session, cwd, number, output, at=None):
    """One line of a Claude Code transcript: a response of 3 uncached, 100 read and ``output``
    tokens."""
    at = at or time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 100,
             "output_tokens": output}
    message = {"id": f"msg_{session}_{number}", "type": "message", "role": "assistant",
               "model": "claude-opus-4-6", "stop_reason": "end_turn",
               "content": [{"type": "text", "text": "Done."}], "usage": usage}
    return json.dumps({"parentUuid": None, "isSidechain": False, "userType": "external", "cwd": cwd,
                       "sessionId": session, "version": "2.1.200",
                       "type": "assistant", "uuid": f"u-{session}-{number}", "timestamp": stamp,
                       "message": message, "requestId": f"req_{session}_{number}"}) + "\n"


WRITES = """
import os, sys
path, line = sys.argv[1:3]
os.makedirs(os.path.dirname(path), exist_ok=True)
with open(path, "a") as file:
    file.write(line)
"""


def log_of(home, session):
    return os.path.join(str(home), ".claude", "projects", "-work", session + ".jsonl")


def test_the_log_of_the_directory_and_the_time_is_taken_and_no_other(store, tmp_path):
    home, work, other = tmp_path / "home", tmp_path / "work", tmp_path / "other"
    for place in (home, work, other):
        place.mkdir()
    old = log_of(home, "old")
    os.makedirs(os.path.dirname(old))
    with open(old, "w", encoding="utf-8") as file:
        file.write(response("old", str(work), 1, 1000, time.time() - 3600))
    os.utime(old, (time.time() - 3600,) * 2)
    lines = [(log_of(home, "mine"), response("mine", str(work), 1, 7)),
             (log_of(home, "theirs"), response("theirs", str(other), 1, 500))]
    command = ["sh", "-c",
               " && ".join(shlex.join([sys.executable, "-c", WRITES, *pair]) for pair in lines)]
    told, _, code = result_of(store, command, env=plain_environment(HOME=str(home)), cwd=str(work))
    assert code == 0 and (told["source"], told["sessions"], told["calls"]) == ("log", ["mine"], 1)
    assert told["tokens"] == {"uncached_input": 3, "cache_write": 0, "cache_write_1h": 0,
                              "cache_read": 100, "output": 7}
    assert ({session.id for session in SessionOptimizer(store).list_sessions()}
            == {"mine", told["session"]})
    assert sums(store)["output"] == 7
    with_all = SessionOptimizer(store).scan([str(home / ".claude")])["totals"]
    assert with_all["sessions"] == 3 and sums(store)["output"] == 1507  # nothing twice


def test_transcripts_of_other_directories_are_not_even_read(tmp_path):
    """But for those whose process says that they are ours."""
    home, work = tmp_path / "home", tmp_path / "w\u00f6rk \"quoted\""
    work.mkdir()
    watch = Watch(str(work), {"HOME": str(home)})
    os.makedirs(os.path.dirname(log_of(home, "here")))
    for name, cwd in (("here", work), ("there", tmp_path), ("damaged", work), ("told", tmp_path),
                      ("none", "")):
        with open(log_of(home, name), "w", encoding="utf-8") as file:
            file.write('{"cwd": "broken\\' if name == "damaged" else response(name, str(cwd), 1, 1)
                       if cwd else "{}")
    watch.sessions.add("told")
    assert ([os.path.basename(path) for path in sorted(watch.transcripts())]
            == ["here.jsonl", "told.jsonl"])


def test_of_a_session_that_goes_on_only_the_new_part_is_this_recordings(store, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    path = log_of(home, "long")
    os.makedirs(os.path.dirname(path))
    with open(path, "w", encoding="utf-8") as file:
        file.write(response("long", str(work), 1, 1000, time.time() - 3600))
    command = [sys.executable, "-c", WRITES, path,
               response("long", str(work), 2, 7, time.time() + 1)]
    told, _, _ = result_of(store, command, env=plain_environment(HOME=str(home)), cwd=str(work))
    assert (told["sessions"], told["calls"], told["tokens"]["output"]) == (["long"], 1, 7)
    assert sums(store)["output"] == 1007


def test_what_the_processes_say_goes_before_directory_and_time(tmp_path):
    """Claude Code names its session per process, Codex holds its rollout open."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    home, work = tmp_path / "home", tmp_path / "work"
    sessions, rollouts = home / ".claude" / "sessions", home / ".codex" / "sessions" / "2026"
    for place in (work, sessions, rollouts):
        place.mkdir(parents=True)
    rollout = rollouts / "rollout-2026-01-01T00-00-00-mine.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; f = open(sys.argv[1], 'a'); sys.stdin.read()",
         str(rollout)], stdin=subprocess.PIPE, cwd=str(work), env=plain_environment(HOME=str(home)))
    with process:
        for pid, identity in ((process.pid, "mine"), (1, "theirs")):
            (sessions / f"{pid}.json").write_text(json.dumps({"pid": pid, "sessionId": identity}))
        watch = Watch("/nowhere", {"HOME": "/nowhere"})
        until = time.monotonic() + TIMEOUT
        while not watch.open_files and time.monotonic() < until:
            watch.look(process.pid)
        process.stdin.close()
    claude = {"source": "claude-code", "project": str(work)}
    assert (watch.is_ours(dict(claude, path=str(home / "mine.jsonl")))
            and not watch.is_ours(dict(claude, path=str(home / "theirs.jsonl"))))
    assert (watch.is_ours(dict(claude, path=str(home / "unknown.jsonl")))
            and not watch.is_ours(dict(claude, project="/", path="/unknown.jsonl")))
    codex = {"source": "codex", "project": str(work)}
    assert (watch.is_ours(dict(codex, path=str(rollout)))
            and not watch.is_ours(dict(codex, path=str(rollouts / "rollout-other.jsonl"))))


@pytest.mark.parametrize("command, agent", [
    (["claude", "-p", "x"], "claude"), (["/usr/bin/codex", "exec"], "codex"),
    (["node", "/usr/bin/gemini"], "gemini"), (["claude.exe"], "claude"),
    (["vim", "x"], ""), (["sh", "-c", "claude"], ""), (["echo", "hello", "claude"], ""),
])
def test_an_agent_is_known_by_its_programs_name(command, agent):
    assert agent_of(command) == agent


def test_logs_are_looked_for_where_the_agents_variables_say():
    assert roots_of({"HOME": "/h"}) == ["/h/.claude/projects", "/h/.config/claude/projects",
                                        "/h/.codex/sessions", "/h/.gemini/tmp"]
    assert roots_of({"HOME": "/h", "CLAUDE_CONFIG_DIR": "/a, /b", "CODEX_HOME": "/c",
                     "GEMINI_CLI_HOME": "/g"}) == [
                         "/a/projects", "/b/projects", "/c/sessions", "/g/.gemini/tmp"]


# ============================================================================
# Real agents
# ============================================================================


def agent(name):
    if not shutil.which(name):
        pytest.skip(f"{name} is not on the path (npm)")
    return name


def run_of(name, place, url):
    """(script, command) that let an agent look at a.txt in two calls and answer."""
    (place / "a.txt").write_text("hello\n" * 50)
    if name == "claude":
        calls = [("Read", {"file_path": str(place / "a.txt")}),
                 ("Bash", {"command": "wc -l a.txt"})]
        command = ["claude", "-p", "How many lines?", "--allowedTools", "Read,Bash"]
    elif name == "codex":
        calls = [("exec_command", {"cmd": "cat a.txt"}), ("exec_command", {"cmd": "wc -l a.txt"})]
        command = ["codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access",
                   *codex_config(url), "How many lines?"]
    else:
        calls = [("read_file", {"file_path": str(place / "a.txt")}),
                 ("run_shell_command", {"command": "wc -l a.txt"})]
        command = ["gemini", "-p", "How many lines?", "--yolo", "--skip-trust", "-m",
                   "gemini-2.5-pro"]
    turns = [dict({"tool": tool, "input": given}, thinking="Let me look.") for tool, given in calls]
    return turns + [{"text": "Fifty lines."}], command


@pytest.fixture
def empty_home(tmp_path):
    """(home, work, environment): nothing of this machine's agents, and no way out but loopback."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    gemini_settings(str(home))
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT", "TMPDIR")
            if name in os.environ}
    return home, work, dict(kept, HOME=str(home), TERM="xterm-256color", DISABLE_AUTOUPDATER="1",
                            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                            HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1")


READ_BACK = ["--usage", "log"]


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a shell"])
def test_a_real_agents_tokens_are_the_models_to_the_token(name, wrapped, empty_home, store):
    agent(name)
    home, work, env = empty_home
    with FakeApi() as api:
        api.script, command = run_of(name, work, api.url)
        cwd = str(work)
        if wrapped:
            cwd, command = str(home), [
                "sh", "-c", f"cd {shlex.quote(str(work))} && {shlex.join(command)}; exit 5"]
        told, output, code = result_of(store, command, env=dict(env, **api.environment()), cwd=cwd)
    assert code == (5 if wrapped else 0) and b"Fifty lines." in output, output
    assert (told["source"], told["calls"], len(told["sessions"])) == ("log", 3, 1)
    truth = api.sums(main=True)
    assert {name: told["tokens"][name] for name in CLASSES} == truth == sums(store)
    before = sorted((session.id, session.total_tokens)
                    for session in SessionOptimizer(store).list_sessions())
    logs = [str(home / place) for place in (".claude", ".codex/sessions", ".gemini/tmp")
            if (home / place).is_dir()]
    SessionOptimizer(store).scan(logs)
    assert before == sorted((session.id, session.total_tokens)
                            for session in SessionOptimizer(store).list_sessions())


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
def test_without_its_log_a_real_agents_tokens_come_from_the_answers(name, empty_home, store):
    agent(name)
    home, work, env = empty_home
    with FakeApi() as api:
        api.script, command = run_of(name, work, api.url)
        if name == "codex":  # it takes the address from its configuration alone
            told_address = shlex.join(command).replace(api.url + "/v1", "'$OPENAI_BASE_URL'")
            command = ["sh", "-c", told_address]
        told, output, code = result_of(store, command, "--usage", "pass-through",
                                       env=dict(env, **api.environment()), cwd=str(work))
    assert code == 0 and b"Fifty lines." in output, output
    assert (told["source"], told["calls"]) == ("pass-through", len(api.truth))
    assert {name: told["tokens"][name] for name in CLASSES} == api.sums() == sums(store)


@pytest.mark.parametrize("name", ["claude", "codex"])
def test_agents_in_one_directory_at_one_time_are_told_apart(name, empty_home, store):
    agent(name)
    home, work, env = empty_home
    with FakeApi() as api:
        scripts, runs = {}, []
        for number in range(3):
            turns, command = run_of(name, work, api.url)
            # they overlap, and differ
            turns[1]["delay"], turns[2] = 2.0, {"text": "x" * (100 * number + 50)}
            scripts[f"Task {number}:"] = turns
            runs.append([word.replace("How many lines?", f"Task {number}: How many lines?")
                         for word in command])
        api.script = scripts
        results = [os.path.join(str(home), f"result-{number}.json") for number in range(3)]
        started = [subprocess.Popen(
            recorded(store, command, "--session-id", f"r{number}", "--result", results[number]),
            cwd=str(work), env=dict(env, **api.environment()), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL) for number, command in enumerate(runs)]
        assert [process.wait(TIMEOUT) for process in started] == [0, 0, 0]
    for number, path in enumerate(results):
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        assert ({name: told["tokens"][name] for name in CLASSES}
                == api.sums(main=True, conversation=f"Task {number}:"))
    assert sums(store) == api.sums(main=True)


def test_claudes_full_screen_is_worked_in_as_without_a_recorder(empty_home, store):
    agent("claude")
    home, work, env = empty_home
    known = {"hasCompletedOnboarding": True, "theme": "dark",
             "customApiKeyResponses": {"approved": ["none"]}, "projects": {str(work): {
                 "hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}}}
    (home / ".claude.json").write_text(json.dumps(known))

    def grow(process, master):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))

    with FakeApi() as api:
        api.script, _ = run_of("claude", work, api.url)
        told, output, code = result_of(
            store, ["claude", "--allowedTools", "Read,Bash"], env=dict(env, **api.environment()),
            cwd=str(work), steps=((b"effort", b"How many lines?"), (b"lines", b"\r"),
                                  (b"Fifty", grow), (b"", b"/exit"), (b"", b"\r"), (b"", b"\r")))
    assert code == 0 and told["source"] == "log", output[-2000:]
    assert {name: told["tokens"][name] for name in CLASSES} == api.sums(main=True)
    assert told["calls"] == 3


def processes_at(home):
    """The processes of this home, recorders left out."""
    for process in processes():
        with contextlib.suppress(OSError):
            with open(f"/proc/{process.pid}/environ",
                      "rb") as env, open(f"/proc/{process.pid}/cmdline", "rb") as line:
                if (f"HOME={home}".encode() in env.read().split(b"\0")
                        and b"record.py" not in line.read()):
                    yield process.pid


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
def test_a_real_agent_that_is_killed_leaves_what_it_had_used(name, empty_home, store):
    agent(name)
    home, work, env = empty_home
    with FakeApi() as api:
        turns, command = run_of(name, work, api.url)
        turns[1]["delay"], second = 60, threading.Event()

        def script(request):
            if request.answered == 1:
                second.set()
            return turns[request.answered]

        def kill():
            if second.wait(TIMEOUT):
                time.sleep(1.0)  # what it had is in its log by then
                for pid in processes_at(str(home)):
                    os.kill(pid, signal.SIGKILL)

        api.script = script
        killer = threading.Thread(target=kill)
        killer.start()
        told, _, code = result_of(store, command, env=dict(env, **api.environment()), cwd=str(work))
        killer.join(TIMEOUT)
    assert (code in (-9, 137) and 9 in (told["signal"], told["exit_status"] - 128)
            and told["source"] == "log" and told["calls"] >= 1)
    first = [row for row in api.truth if row["main"]][:told["calls"]]
    assert ({name: told["tokens"][name] for name in CLASSES}
            == {name: sum(row[name] for row in first) for name in CLASSES})
