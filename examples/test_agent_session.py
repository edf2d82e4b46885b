"""Tests of agent_session: the scripted model, sessions in a terminal, the HTTP API. The recorder
has a file of its own.

What needs a tool or a package that is not here is skipped with its name.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
from agent_session import (  # noqa: E402  (found above)
    SessionConfig, SessionError, SessionManager, UnknownSession)
from agent_session.fake_api import FakeApi  # noqa: E402
from agent_session.terminal import CLEAN_BYTES, Cast, clean_text, processes  # noqa: E402

PROGRAMS = os.path.join(HERE, "agent_session")
posix = pytest.mark.skipif(
    os.name == "nt",
    reason="the Windows half is written to pywinpty's documentation and not tested")
TIMEOUT = 120  # seconds for one program, a real agent among them


# ============================================================================
# The scripted model
# ============================================================================

ASKED = {  # protocol: path, request
    "messages": ("/v1/messages", {"model": "m", "tools": [{"name": "t"}],
                                  "messages": [{"role": "user", "content": "Hi"}]}),
    "responses": ("/v1/responses", {"model": "m", "tools": [{"name": "t"}],
                                    "input": [{"role": "user", "content": "Hi"}]}),
    "chat": ("/v1/chat/completions", {"model": "m", "tools": [{"name": "t"}],
                                      "messages": [{"role": "user", "content": "Hi"}]}),
    "gemini": ("/v1beta/models/m:generateContent", {
        "tools": [{"name": "t"}], "contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}),
}


def ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return answer.read().decode()


def streamed(protocol, path, body):
    if protocol == "gemini":
        return path.replace("generateContent", "streamGenerateContent?alt=sse"), body
    return path, dict(body, stream=True)


def usage_told(protocol, answer):
    """(all input, of it from the cache, output) as the protocol says it."""
    usage = answer["usageMetadata" if protocol == "gemini" else "usage"]
    if protocol == "messages":
        cached = usage["cache_read_input_tokens"]
        return (usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached, cached,
                usage["output_tokens"])
    if protocol == "responses":
        return (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"],
                usage["output_tokens"])
    if protocol == "chat":
        return (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"],
                usage["completion_tokens"])
    return (usage["promptTokenCount"], usage["cachedContentTokenCount"],
            usage["candidatesTokenCount"] + usage["thoughtsTokenCount"])


def last_usage(protocol, stream):
    """The usage of a stream: what its events say last."""
    told = {}
    for line in stream.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line[6:])
            told.update({k: v for k, v in data.get("response", data).items()
                         if k in ("usage", "usageMetadata") and v})
    return usage_told(protocol, told)


@pytest.mark.parametrize("protocol", ASKED)
def test_the_model_answers_whole_and_streamed_with_the_usage_of_its_truth(protocol):
    path, body = ASKED[protocol]
    with FakeApi([{"tool": "t", "input": {"a": 1}, "thinking": "Hm, so it is."}]) as api:
        whole = json.loads(ask(api.url + path, body))
        streaming_path, streaming = streamed(protocol, path, body)
        stream = ask(api.url + streaming_path, streaming)
    first, second = api.truth
    for row, told in ((first, usage_told(protocol, whole)), (second, last_usage(protocol, stream))):
        assert told == (row["uncached_input"] + row["cache_write"] + row["cache_read"],
                        row["cache_read"], row["output"])
        assert row["protocol"] == protocol and row["main"] and row["model"] == "m"
    assert first["cache_read"] == 0 < second["cache_read"]
    assert '"t"' in json.dumps(whole) and '"t"' in stream.replace('\\"', '"')


def test_the_turn_that_is_due_follows_from_the_request(tmp_path):
    """So a retry gets the same answer, and parallel conversations get their own script."""
    def said(*messages):
        body = {"model": "m", "tools": [{}],
                "messages": [{"role": role, "content": text} for role, text in messages]}
        return json.loads(ask(api.url + "/v1/messages", body))["content"][0]["text"]

    script = {"task one": [{"text": "a"}, {"text": "b"}], "": [{"text": "other"}]}
    with FakeApi(script, str(tmp_path / "truth.jsonl")) as api:
        assert ([said(("user", "task one")), said(("user", "task one")), said(("user", "task two"))]
                == ["a", "a", "other"])
        assert said(("user", "task one"), ("assistant", "a"), ("user", "go on")) == "b"
        assert said(("user", "task one"), *[("assistant", "a"), ("user", "go on")] * 2) == "Done."
    rows = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert (rows == api.truth and [row["conversation"] for row in rows]
            == ["task one", "task one", "", "task one", "task one"])


def test_the_model_fails_once_where_the_script_says_so_and_counts_nothing_for_it():
    path, body = ASKED["messages"]
    with FakeApi([{"text": "late", "status": 529}]) as api:
        with pytest.raises(urllib.error.HTTPError) as failed:
            ask(api.url + path, body)
        failed.value.close()
        assert failed.value.code == 529 and api.truth == []
        assert "late" in ask(api.url + path, body) and len(api.truth) == 1


# ============================================================================
# Clean text and recordings
# ============================================================================


def extra(*names):
    for name in names:
        pytest.importorskip(
            name, reason=f"{name} is not installed: pip install 'sessionoptimizer[agents]'")


CLEAN = [  # bytes, kept lines, text on a screen of 3 rows and 10 columns
    (b"a\r\nb\r\n", False, "a\nb"),
    (b"\x1b[31mred\x1b[0m  \r\n", False, "red"),
    (b"working 1%\rworking 2%\r\n", False, "working 2%"),
    (b"ab\x08c", False, "ac"),
    (b"0123456789abc", False, "0123456789\nabc"),
    (b"0123456789abc", True, "0123456789abc"),
    (b"1\r\n2\r\n3\r\n4\r\n\x1b[1A5", False, "1\n2\n3\n5"),
    (b"1\r\n2\r\n\x1b[2J\x1b[Hnew", False, "new"),
    ("h\u00e9\u4e2d\r\n".encode(), False, "h\u00e9\u4e2d"),
    (b"\x1b]0;title\x07text", False, "text"),
    (b"a\tb", False, "a       b"),
    (b"a\tb", True, "a\tb"),
    (b"", False, ""),
]


@pytest.mark.parametrize("data, keep_lines, text", CLEAN)
def test_clean_text_is_what_the_screen_shows_and_what_scrolled_off(data, keep_lines, text):
    extra("pyte")
    assert clean_text(data, rows=3, columns=10, keep_lines=keep_lines) == text


def test_clean_text_is_made_of_the_last_256_kilobytes():
    text = clean_text(b"x" * 9 + b"\n" + b"0123456789\n" * 30_000, columns=20)
    assert len(text) < CLEAN_BYTES and text.endswith("0123456789") and "x" not in text


def test_a_recording_is_asciicast_and_its_owners_alone(tmp_path):
    cast = Cast(str(tmp_path / "a.cast"), rows=24, columns=80, command=["ls", "-l"],
                env={"TERM": "xterm", "KEY": "secret"})
    for piece in (b"h\xc3", b"\xa9\r\n", b"\xff"):
        cast.output(piece)
    cast.resized(30, 100)
    cast.close()
    header, *events = [json.loads(line)
                       for line in (tmp_path / "a.cast").read_text(encoding="utf-8").splitlines()]
    assert ((header["version"], header["width"], header["height"], header["env"])
            == (2, 80, 24, {"TERM": "xterm"}))
    assert [event[1:] for event in events] == [["o", "h"], ["o", "\u00e9\r\n"], ["o", "\ufffd"],
                                               ["r", "100x30"]]
    assert [event[0] for event in events] == sorted(event[0] for event in events)
    if os.name != "nt":
        assert os.stat(tmp_path / "a.cast").st_mode & 0o777 == 0o600


# ============================================================================
# Sessions
# ============================================================================


@pytest.fixture
def place(tmp_path):
    """A directory of sessions; what still runs there afterwards is ended, and nothing of ours is
    left a zombie."""
    extra("ptyprocess", "pyte")
    directory = str(tmp_path / "sessions")

    async def clear():
        async with SessionManager(directory) as manager:
            for session in await manager.list_sessions():
                await manager.remove_session(session.name)

    yield directory
    asyncio.run(clear())
    assert ([process for process in processes() if process.parent == os.getpid() and process.zombie]
            == [])


def in_session(place, use, **config):
    """What ``use(session)`` returns, in a session of this configuration."""
    async def work():
        async with SessionManager(place) as manager:
            session = await manager.create_session(
                SessionConfig(**dict({"name": "s", "shell": SHELL}, **config)))
            result = await use(session)
            await manager.remove_session("s")
            return result
    return asyncio.run(asyncio.wait_for(work(), TIMEOUT))


SLEEP = f"sleep 4321.{os.getpid()}"  # found among the processes of others
SHELL = "bash --norc" if shutil.which("bash") else "sh"
SHELLS = ("bash --norc", "dash", "zsh -f", "busybox sh", "fish --no-config")
COMMANDS = [  # command, output, exit code
    ("echo out; echo err >&2", "out\nerr", 0),
    ("cd /; X=5", "", 0),
    ("pwd; echo $X", "/\n5", 0),
    ("sh -c 'exit 3'", "", 3),
    ("false", "", 1),
    ("sh -c 'kill -9 $$'", None, 137),
    ("printf 'no end of line'", "no end of line", 0),
    ("printf 'error: it only says so\\n'", "error: it only says so", 0),
    ("printf '\\033]7773;0123456789abcdef;0\\007still here\\n'", "still here", 0),
    ("echo one\necho two", "one\ntwo", 0),
    ("echo '" + "x" * 5000 + "'", "x" * 5000, 0),
    ("echo \u00e9\u4e2d", "\u00e9\u4e2d", 0),
    ("echo 'never closed", None, None),
    ("echo still well", "still well", 0),
]


@posix
@pytest.mark.parametrize("shell", SHELLS)
def test_the_end_of_a_command_is_found_with_its_status(place, shell):
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell.split()[0]} is not installed")

    async def all_of(session):
        return [await session.execute(command.replace("X=5", "set -g X 5")
                                      if shell.startswith("fish") else command)
                for command, _, _ in COMMANDS]

    for (command, output, code), result in zip(COMMANDS, in_session(place, all_of, shell=shell)):
        if output is not None:
            assert result.output == output, command
        assert (result.exit_code == code if code is not None
                else result.exit_code not in (0, None)), command
        assert (result.success is (result.exit_code == 0)
                and bool(result.error) is not result.success)


@posix
def test_what_follows_a_commands_end_is_none_of_its_output(place):
    """A prompt may arrive in a piece of its own before whoever waits for the command wakes up."""
    async def many(session):
        return {(await session.execute("printf 'no end of line'")).output for _ in range(150)}

    shell = "fish --no-config" if shutil.which("fish") else SHELL
    assert in_session(place, many, shell=shell) == {"no end of line"}


def running(words):
    """The processes whose command line has these words."""
    found = []
    for process in processes():
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/cmdline", "rb") as file:
            if words.encode() in file.read().replace(b"\0", b" ") and not process.zombie:
                found.append(process.pid)
    return found


LATE = [  # what is ended by a time-out: SLEEP is looked for afterwards
    "SLEEP; echo next",
    "SLEEP & SLEEP",
    "SLEEP | cat",
    "(SLEEP; echo next)",
    "sh -c 'SLEEP; echo a; SLEEP'",
    "while :; do :; done",
    "while :; do sleep 0.1; done",
    "sh -c \"trap '' INT TERM HUP; SLEEP; SLEEP\"",
    "cat",
]


@posix
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see what is left")
@pytest.mark.parametrize("command", LATE)
def test_a_time_out_ends_the_process_group_and_the_shell_goes_on(place, command):
    async def late(session):
        before = await session.execute("X=7; echo $X")
        result = await session.execute(command.replace("SLEEP", SLEEP), timeout=0.5)
        return before, result, running(SLEEP), await session.execute("echo $X")

    before, result, left, after = in_session(place, late)
    assert ((result.success, result.exit_code) == (False, None)
            and "timed out after 500 ms" in result.error)
    assert 500 <= result.execution_time_ms
    assert left == [] and before.output == after.output == "7"


@posix
def test_a_command_whose_caller_goes_away_is_ended(place):
    async def work(session):
        task = asyncio.ensure_future(session.execute(SLEEP))
        while not running(SLEEP):
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})
        after = await session.execute("echo next")
        return task.cancelled(), after.output, running(SLEEP)

    assert in_session(place, work) == (True, "next", [])


@posix
def test_a_background_process_of_an_earlier_command_survives_another_ones_time_out(place):
    async def work(session):
        await session.execute(f"{SLEEP}9 & echo $! >pid")
        await session.execute(SLEEP, timeout=0.3)
        return await session.execute('kill -0 "$(cat pid)"')

    os.makedirs(place, exist_ok=True)
    assert in_session(place, work, cwd=place).success
    assert running(SLEEP + "9") == []  # it ended with its session


@posix
def test_a_shell_that_ends_says_how_and_stays_terminated(place):
    async def work():
        async with SessionManager(place) as manager:
            session = await manager.create_session(SessionConfig("gone", shell=SHELL))
            result = await session.execute("echo bye; exit 7")
            with pytest.raises(SessionError, match="terminated"):
                await session.execute("echo no")
        async with SessionManager(place) as manager:
            session = await manager.restore_session("gone")
            status = await session.status()
            text = await session.read_output()
            return (result, status, text, await manager.cleanup_terminated(),
                    await manager.list_sessions())

    result, status, text, removed, left = asyncio.run(work())
    assert ((result.success, result.exit_code, result.output) == (False, 7, "bye")
            and "ended (exit status 7)" in result.error)
    assert (status["status"], status["exit_status"], status["signal"]) == ("terminated", 7, None)
    assert "bye" in text and removed == ["gone"] and left == [] and os.listdir(place) == []


@posix
def test_commands_at_once_in_one_session_run_one_after_the_other(place):
    async def many(session):
        return await asyncio.gather(
            *(session.execute(f"n=$((n+1)); echo {i} $n") for i in range(30)))

    outputs = [result.output.split() for result in in_session(place, many)]
    assert [int(first) for first, _ in outputs] == list(range(30))
    assert sorted(int(second) for _, second in outputs) == list(range(1, 31))


@posix
def test_a_program_that_is_no_shell_is_typed_to_and_read(place):
    async def work(session):
        with pytest.raises(SessionError, match="takes no commands"):
            await session.execute("echo no")
        await session.send_input("hello\n")
        for _ in range(200):
            if (await session.read_output()).count("hello") == 2:  # its echo, and what cat says
                break
            await asyncio.sleep(0.02)
        await session.send_input(b"\x04")
        status = await session.wait(10)
        return await session.read_output(), await session.raw_output(), status

    text, raw, status = in_session(place, work, shell="", command=["cat"])
    assert (text.split() == ["hello", "hello"] and raw.startswith(b"hello\r\nhello\r\n")
            and status == 0)


@posix
def test_the_program_sees_the_size_and_its_change(place):
    async def work(session):
        first = await session.execute("stty size")
        await session.resize(40, 100)
        return first.output, (await session.execute("stty size")).output

    assert in_session(place, work, rows=30, columns=90) == ("30 90", "40 100")


@posix
def test_signals_reach_a_program_as_in_any_terminal(place):
    """Python ignores SIGPIPE, and a host handles its own; what it starts must know nothing of
    that."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")

    async def work(session):
        return (await session.execute("grep -E '^Sig(Ign|Blk)' /proc/self/status")).output

    assert in_session(place, work).split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]


@posix
def test_the_buffer_is_bounded_and_says_so(place):
    async def work(session):
        result = await session.execute(
            "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done")
        return result, await session.raw_output(), await session.status()

    result, raw, status = in_session(place, work, buffer_bytes=8192)
    assert result.success and result.truncated and result.output.endswith("line 2999")
    assert len(raw) <= 8192 < status["output_bytes"]


@posix
def test_metadata_history_and_context_are_kept(place):
    async def work():
        async with SessionManager(place) as manager:
            session = await manager.create_session(
                SessionConfig("s", cwd="/", shell=SHELL, role="reviewer",
                              env={"API_KEY": "value-of-the-key"}))
            await session.set_metadata("ticket", {"id": 7})
            await session.set_metadata("gone", 1)
            await session.set_metadata("gone", None)
            with pytest.raises(TypeError):
                await session.set_metadata("bad", object())
            await session.execute("echo $API_KEY; cd /usr; false")
        async with SessionManager(place) as manager:
            session = await manager.get_session("s")
            return await session.get_ai_context(200), (await session.execute("echo on")).output

    context, on = asyncio.run(work())
    assert ((context["role"], context["status"], context["metadata"])
            == ("reviewer", "running", {"ticket": {"id": 7}}))
    assert ([(entry["command"], entry["exit_code"]) for entry in context["recent_commands"]]
            == [("echo $API_KEY; cd /usr; false", 1)])
    assert ("echo $API_KEY; cd /usr; false\nvalue-of-the-key" in context["recent_output"]
            and "__so" not in context["recent_output"])
    assert on == "on"
    with open(os.path.join(place, "s", "state.json"), encoding="utf-8") as file:
        assert "value-of-the-key" not in file.read()
    for name in ("", "s", "s/state.json"):
        assert os.stat(os.path.join(place, name)).st_mode & 0o077 == 0


@posix
def test_a_recording_of_a_session_holds_its_output_and_sizes(place, tmp_path):
    async def work(session):
        await session.execute("echo recorded")
        await session.resize(30, 100)
        return await session.execute("stty size")

    in_session(place, work, cast=str(tmp_path / "s.cast"))
    header, *events = [json.loads(line)
                       for line in (tmp_path / "s.cast").read_text(encoding="utf-8").splitlines()]
    assert (header["width"] == 120
            and "recorded" in "".join(event[2] for event in events if event[1] == "o"))
    assert [event[2] for event in events if event[1] == "r"] == ["100x30"]


MANAGER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from agent_session import SessionConfig, SessionManager
async def main():
    manager = SessionManager(sys.argv[2])
    session = await manager.create_session(SessionConfig("kept", cwd="/", shell=sys.argv[3]))
    await session.execute("X=before; cd /usr")
    await session.send_input("sleep 0.5; echo late $X\\n")
    print("ready", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@posix
def test_sessions_survive_the_death_of_their_manager(place):
    first = subprocess.Popen(
        [sys.executable, "-c", MANAGER, HERE, place, SHELL], stdout=subprocess.PIPE)
    with first:
        assert first.stdout.readline() == b"ready\n"
        first.kill()

    async def work():
        async with SessionManager(place) as manager:
            session = await manager.restore_session("kept")
            result = await session.execute("pwd; echo $X")
            with pytest.raises(UnknownSession):
                await manager.restore_session("other")
            assert await manager.get_session("../kept") is None
            return session.state, result.output, await session.read_output()

    state, output, screen = asyncio.run(work())
    assert (state, output) == ("running", "/usr\nbefore") and "late before" in screen


@posix
@pytest.mark.parametrize("who", ["host", "shell"])
def test_a_killed_session_is_honestly_terminated(place, who):
    async def work():
        async with SessionManager(place) as manager:
            session = await manager.create_session(SessionConfig("s", shell=SHELL))
            await session.send_input(f"sh -c \"trap '' HUP; {SLEEP}\"\n")
            while not running(SLEEP):
                await asyncio.sleep(0.02)
            os.kill(session.host_pid if who == "host" else session.pid, signal.SIGKILL)
            await session.wait(10)
            return await session.status()

    status = asyncio.run(asyncio.wait_for(work(), TIMEOUT))
    assert (status["status"] == "terminated"
            and status["exit_status"] == (None if who == "host" else 0))
    assert status["signal"] == (None if who == "host" else 9)

    async def again():
        async with SessionManager(place) as manager:
            session = await manager.restore_session("s")
            return (session.state, await manager.remove_session("s"),
                    await manager.remove_session("s"))

    assert asyncio.run(again()) == ("terminated", True, False)
    assert running(SLEEP) == [] or who == "shell"
    for pid in running(SLEEP):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("wrong", [
    {"name": ""}, {"name": "../up"}, {"name": ".hidden"}, {"name": "a/b"}, {"name": "x" * 101},
    {"name": 7}, {"rows": 0}, {"columns": 10**6}, {"rows": "24"}, {"buffer_bytes": 1},
    {"timeout": 0}, {"timeout": "1"}, {"env": {"A": 1}}, {"env": ["A"]},
])
def test_a_configuration_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        SessionConfig(**dict({"name": "a"}, **wrong))
    SessionConfig("a")


@posix
@pytest.mark.parametrize("config, says", [
    ({"command": ["no-such-program"]}, "no-such-program"),
    ({"cwd": "/no/such/place"}, "/no/such/place"),
])
def test_a_session_that_cannot_start_says_why_and_leaves_nothing(place, config, says):
    async def work():
        async with SessionManager(place) as manager:
            with pytest.raises(SessionError, match=says):
                await manager.create_session(SessionConfig("s", **config))
            await manager.create_session(SessionConfig("s", shell=SHELL))
            with pytest.raises(SessionError, match="already"):
                await manager.create_session(SessionConfig("s", shell=SHELL))

    asyncio.run(work())


@posix
def test_a_name_whose_session_never_started_is_free_again(place):
    os.makedirs(os.path.join(place, "s"))

    async def create():
        async with SessionManager(place) as manager:
            return (await manager.create_session(SessionConfig("s", shell=SHELL))).state

    with pytest.raises(SessionError, match="already"):
        asyncio.run(create())
    os.utime(os.path.join(place, "s"), (1e9, 1e9))
    assert asyncio.run(create()) == "running"


# ============================================================================
# The HTTP API
# ============================================================================

TOKEN = "a-token-of-the-tests"


def start_server(place, *options):
    """(process, base URL) of a server on a free port."""
    process = subprocess.Popen([sys.executable, os.path.join(PROGRAMS, "server.py"), "--port", "0",
                                "--directory", place, *options],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    if not line.startswith("http://"):
        process.kill()
        raise AssertionError(line + process.communicate()[0])
    return process, line.split()[0]


@pytest.fixture
def server(place):
    extra("aiohttp")
    process, url = start_server(place, "--token", TOKEN)
    with process:
        yield url
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def call(url, method="GET", body=None, **headers):
    """(status, answer) of a request with the token, unless the headers say otherwise."""
    given = {"Authorization": f"Bearer {TOKEN}",
             **{name.replace("_", "-"): value for name, value in headers.items()}}
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {k: v for k, v in given.items() if v is not None}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            text = answer.read()
            return (answer.status, json.loads(text)
                    if answer.headers.get_content_type() == "application/json" else text)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@posix
def test_every_request_needs_the_token_and_this_machines_name(server):
    for path in ("/health", "/sessions", "/nothing", "/events", "/sessions/x/execute"):
        assert call(server + path, Authorization=None)[0] == 401
        assert call(server + path, Authorization="Bearer wrong")[0] == 401
        assert call(server + path, Authorization=f"Basic {TOKEN}")[0] == 401
        assert call(server + path, Host="attacker.example")[0] == 421
        assert call(server + path, Host="127.0.0.1.attacker.example:80")[0] == 421
        assert call(server + path, Origin="https://attacker.example")[0] == 403
    assert (call(server + "/health", Host="localhost:1")
            == (200, {"status": "ok", "sessions": 0, "running": 0}))


@posix
def test_a_session_over_http_from_its_creation_to_its_end(server, tmp_path):
    assert call(server + "/sessions", "POST",
                {"name": "web", "cwd": str(tmp_path), "shell": SHELL, "role": "builder",
                 "metadata": {"ticket": 7}})[0] == 201
    status, result = call(server + "/sessions/web/execute", "POST",
                          {"command": "echo hi; pwd; false", "timeout_ms": 5000})
    assert status == 200 and result["output"] == f"hi\n{os.path.realpath(tmp_path)}"
    assert (result["success"], result["error"], result["exit_code"]) == (False, "exit status 1", 1)
    assert 0 <= result["execution_time_ms"] < 5000
    assert call(server + "/sessions/web/execute", "POST",
                {"command": SLEEP, "timeout_ms": 300})[1]["error"].startswith(
                    "timed out after 300 ms")
    assert running(SLEEP) == []
    status, output = call(server + "/sessions/web/output")
    assert ("hi" in output["clean"] and "\x1b" not in output["clean"]
            and "\x1b]7773;" in output["raw"])
    assert b"\x1b]7773;" in call(server + "/sessions/web/output?form=raw")[1]
    assert (call(server + "/sessions/web/output?form=clean")[1].decode()
            == call(server + "/sessions/web/output")[1]["clean"])
    assert call(server + "/sessions/web/resize", "POST", {"rows": 50})[1]["rows"] == 50
    assert (call(server + "/sessions/web/metadata", "PUT", {"owner": "me"})[1]
            == {"metadata": {"ticket": 7, "owner": "me"}})
    assert call(server + "/sessions/web/input", "POST", {"text": "echo typed\n"})[0] == 200
    shown = call(server + "/sessions/web")[1]
    assert (shown["status"] == "running" and shown["role"] == "builder"
            and shown["context"]["recent_commands"])
    assert [row["name"] for row in call(server + "/sessions")[1]["sessions"]] == ["web"]
    assert call(server + "/sessions/web/status")[1]["name"] == "web"
    assert call(server + "/sessions/web", "DELETE") == (200, {"removed": "web"})
    assert call(server + "/sessions/web")[0] == 404 and call(server + "/health")[1]["sessions"] == 0


@posix
def test_what_cannot_be_done_is_an_error_in_json(server):
    assert call(server + "/sessions", "POST", {"name": "s", "shell": SHELL})[0] == 201
    cases = [
        ("/nothing", "GET", None, 404), ("/sessions/none", "GET", None, 404),
        ("/sessions/none/execute", "POST", {"command": "ls"}, 404),
        ("/sessions", "PUT", None, 405), ("/sessions", "POST", b"{", 400),
        ("/sessions", "POST", [], 400), ("/sessions", "POST", {}, 400),
        ("/sessions", "POST", {"name": "../x"}, 400),
        ("/sessions", "POST", {"name": "t", "colour": 1}, 400),
        ("/sessions", "POST", {"name": "s"}, 409),
        ("/sessions", "POST", {"name": "t", "command": ["no-such-program"]}, 409),
        ("/sessions/s/execute", "POST", {"command": ""}, 400),
        ("/sessions/s/execute", "POST", {"command": 7}, 400),
        ("/sessions/s/execute", "POST", {"command": "ls", "timeout_ms": -1}, 400),
        ("/sessions/s/execute", "POST", {"command": "ls", "timeout_ms": "1"}, 400),
        ("/sessions/s/output?form=odd", "GET", None, 400),
        ("/sessions/s/output?last=-1", "GET", None, 400),
        ("/sessions/s/resize", "POST", {"rows": 0}, 400), ("/sessions/s/input", "POST", {}, 400),
        ("/sessions/s/execute", "POST", {"command": "x" * 5_000_000}, 413),
    ]
    for path, method, body, expected in cases:
        status, answer = call(server + path, method, body)
        assert (status, list(answer)) == (expected, ["error"]), (
            path, method, str(body)[:80], answer)
    assert (call(server + "/sessions/s/execute", "POST", {"command": "echo well"})[1]["output"]
            == "well")


@posix
def test_a_hundred_commands_at_once(server):
    """Fifty in one session and one in each of ten, five times: each gets its own output, none waits
    for ever."""
    names = ["one"] + [f"s{i}" for i in range(10)]
    for name in names:
        assert call(server + "/sessions", "POST", {"name": name, "shell": SHELL})[0] == 201
    asked = [("one", i) for i in range(50)] + [(f"s{i % 10}", i) for i in range(50)]
    answers = {}

    def execute(name, number):
        answers[name, number] = call(f"{server}/sessions/{name}/execute", "POST",
                                     {"command": f"echo {name} {number}"})

    threads = [threading.Thread(target=execute, args=pair) for pair in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert ({pair: answer["output"] for pair, (_, answer) in answers.items()}
            == {(n, i): f"{n} {i}" for n, i in asked})


@posix
@pytest.mark.parametrize("path", ["/events", "/sessions/s/events"])
def test_events_are_streamed_as_they_happen(server, path):
    assert call(server + "/sessions", "POST", {"name": "s", "shell": SHELL})[0] == 201
    request = urllib.request.Request(server + path, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as stream:
        assert (stream.headers.get_content_type() == "text/event-stream"
                and stream.readline() == b": connected\n")
        call(server + "/sessions/s/execute", "POST", {"command": "echo h\u00e9llo"})
        call(server + "/sessions/s", "DELETE")
        events, name = [], ""
        for line in iter(stream.readline, b""):
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                events.append((name, json.loads(line[6:])))
                if name == "terminated":
                    break
    assert "h\u00e9llo" in "".join(data["data"] for name, data in events if name == "output")
    assert ([(data["command"], data["exit_code"]) for name, data in events if name == "executed"]
            == [("echo h\u00e9llo", 0)])
    assert all(data["session"] == "s" for _, data in events)


@posix
def test_a_killed_server_finds_its_sessions_again(place):
    extra("aiohttp")
    process, url = start_server(place, "--token", TOKEN)
    with process:
        call(url + "/sessions", "POST", {"name": "kept", "shell": SHELL})
        call(url + "/sessions/kept/execute", "POST", {"command": "X=here"})
        process.kill()
    process, url = start_server(place, "--token", TOKEN)
    with process:
        assert (call(url + "/sessions/kept/execute", "POST", {"command": "echo $X"})[1]["output"]
                == "here")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0


@posix
def test_the_token_comes_from_a_file_that_nobody_else_reads(place, tmp_path):
    extra("aiohttp")
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    program = [sys.executable, os.path.join(PROGRAMS, "server.py"), "--port", "0",
               "--directory", place]
    refused = subprocess.run(
        program + ["--token-file", str(path)], stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert refused.returncode == 2 and f"chmod 600 {path}" in refused.stderr
    short = subprocess.run(
        program + ["--token", "short"], stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert short.returncode == 2 and "8 characters" in short.stderr
    path.chmod(0o600)
    made = os.path.join(place, ".token")
    for options, file in ((["--token-file", str(path)], str(path)), ([], made)):
        process, url = start_server(place, *options)
        with process, open(file, encoding="utf-8") as kept:
            assert call(url + "/health", Authorization="Bearer " + kept.read().strip())[0] == 200
            process.terminate()
    assert os.stat(made).st_mode & 0o777 == 0o600


@posix
@pytest.mark.parametrize("package, program, options", [
    ("aiohttp", "server.py", ["--port", "0", "--token", TOKEN]),
    ("ptyprocess", "record.py", ["--", "true"]),
])
def test_a_package_that_is_missing_is_named_with_its_extra(package, program, options, tmp_path):
    path = os.path.join(PROGRAMS, program)
    code = (f"import runpy, sys; sys.modules[{package!r}] = None; sys.path[0] = {PROGRAMS!r}; "
            f"sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')")
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        env=dict(os.environ, SESSIONOPTIMIZER_HOME=str(tmp_path)), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode != 0 and done.stdout == ""
    assert (done.stderr
            == f"{program}: {package} is not installed: pip install 'sessionoptimizer[agents]'\n")


# ============================================================================
# The page
# ============================================================================


def page_steps():
    """(line, command, what the page shows of its output) of docs/agent-session.md, in order."""
    with open(os.path.join(ROOT, "docs", "agent-session.md"), encoding="utf-8") as file:
        text = file.read()
    steps = []
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for step in re.split(r"^\$ ", block.group(1), flags=re.M)[1:]:
            lines = step.splitlines()
            command = [lines.pop(0)]
            while lines and re.match(">( |$)", lines[0]):
                command.append(lines.pop(0)[2:])
            steps.append(("\n".join(command), "\n".join(lines)))
    return steps


@posix
def test_what_the_page_shows_is_what_happens(tmp_path):
    extra("aiohttp", "ptyprocess", "pyte")
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    steps, port = page_steps(), str(free_port())
    assert sum(command.startswith("curl") for command, _ in steps) >= 14
    for name in ("examples", "sessionoptimizer.py"):
        os.symlink(os.path.join(ROOT, name), str(tmp_path / name))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    script = "".join(command.replace("8791", port) + "\nprintf '\\n@@@\\n'\n"
                     for command, _ in steps)
    kept = {name: value for name, value in os.environ.items()
            if not name.lower().endswith("_proxy")}
    env = dict(kept, PATH=str(tmp_path / "bin") + os.pathsep + os.environ["PATH"],
               HOME=str(tmp_path), VIRTUAL_ENV=sys.prefix,
               PYTHONPATH=os.pathsep.join(filter(None, map(str, sys.path))))
    process = subprocess.Popen(["sh", "-c", script], cwd=str(tmp_path), env=env,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        told = process.communicate(timeout=TIMEOUT)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    outputs = told.replace("\r\n", "\n").replace(port, "8791").split("\n@@@\n")
    assert len(outputs) == len(steps) + 1, told
    for (command, shown), output in zip(steps, outputs):
        wanted = re.sub(r"(?:\\ )+", "[ ]+", ".*".join(map(re.escape, shown.split("..."))))
        assert not shown or re.fullmatch(wanted, output.strip("\n"), re.S), (
            f"$ {command}\n{output}\n--- expected\n{shown}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
