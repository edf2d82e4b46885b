"""Tests of agent_session: the scripted model, sessions in a terminal, the recorder and the HTTP API.

What needs a tool or a package that is not here is skipped with its name.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]
from agent_session.fake_api import FakeApi, codex_config, gemini_settings  # noqa: E402  (found through the line above)

from sessionoptimizer import SessionOptimizer  # noqa: E402

TIMEOUT = 120  # seconds for one program, a real agent among them


# ============================================================================
# The scripted model
# ============================================================================

ASKED = {  # protocol: path, request
    "messages": ("/v1/messages", {"model": "m", "tools": [{"name": "t"}], "messages": [{"role": "user", "content": "Hi"}]}),
    "responses": ("/v1/responses", {"model": "m", "tools": [{"name": "t"}], "input": [{"role": "user", "content": "Hi"}]}),
    "chat": ("/v1/chat/completions", {"model": "m", "tools": [{"name": "t"}], "messages": [{"role": "user", "content": "Hi"}]}),
    "gemini": ("/v1beta/models/m:generateContent", {"tools": [{"name": "t"}], "contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}),
}


def ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
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
        return usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached, cached, usage["output_tokens"]
    if protocol == "responses":
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]
    if protocol == "chat":
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]
    return (usage["promptTokenCount"], usage["cachedContentTokenCount"],
            usage["candidatesTokenCount"] + usage["thoughtsTokenCount"])


def last_usage(protocol, stream):
    """The usage of a stream: what its events say last."""
    told = {}
    for line in stream.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line[6:])
            told.update({k: v for k, v in data.get("response", data).items() if k in ("usage", "usageMetadata") and v})
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
        assert told == (row["uncached_input"] + row["cache_write"] + row["cache_read"], row["cache_read"], row["output"])
        assert row["protocol"] == protocol and row["main"] and row["model"] == "m"
    assert first["cache_read"] == 0 < second["cache_read"]
    assert '"t"' in json.dumps(whole) and '"t"' in stream.replace('\\"', '"')


def test_the_turn_that_is_due_follows_from_the_request(tmp_path):
    """So a retry gets the same answer, and parallel conversations get their own script."""
    def said(*messages):
        body = {"model": "m", "tools": [{}], "messages": [{"role": role, "content": text} for role, text in messages]}
        return json.loads(ask(api.url + "/v1/messages", body))["content"][0]["text"]

    script = {"task one": [{"text": "a"}, {"text": "b"}], "": [{"text": "other"}]}
    with FakeApi(script, str(tmp_path / "truth.jsonl")) as api:
        assert [said(("user", "task one")), said(("user", "task one")), said(("user", "task two"))] == ["a", "a", "other"]
        assert said(("user", "task one"), ("assistant", "a"), ("user", "go on")) == "b"
        assert said(("user", "task one"), *[("assistant", "a"), ("user", "go on")] * 2) == "Done."
    rows = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert rows == api.truth and [row["conversation"] for row in rows] == ["task one", "task one", "", "task one", "task one"]


def test_the_model_fails_once_where_the_script_says_so_and_counts_nothing_for_it():
    path, body = ASKED["messages"]
    with FakeApi([{"text": "late", "status": 529}]) as api:
        with pytest.raises(urllib.error.HTTPError) as failed:
            ask(api.url + path, body)
        failed.value.close()
        assert failed.value.code == 529 and api.truth == []
        assert "late" in ask(api.url + path, body) and len(api.truth) == 1


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
        calls = [("Read", {"file_path": str(place / "a.txt")}), ("Bash", {"command": "wc -l a.txt"})]
        command = ["claude", "-p", "How many lines?", "--allowedTools", "Read,Bash"]
    elif name == "codex":
        calls = [("exec_command", {"cmd": "cat a.txt"}), ("exec_command", {"cmd": "wc -l a.txt"})]
        command = ["codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", *codex_config(url),
                   "How many lines?"]
    else:
        calls = [("read_file", {"file_path": str(place / "a.txt")}), ("run_shell_command", {"command": "wc -l a.txt"})]
        command = ["gemini", "-p", "How many lines?", "--yolo", "--skip-trust", "-m", "gemini-2.5-pro"]
    turns = [dict({"tool": tool, "input": given}, thinking="Let me look.") for tool, given in calls]
    return turns + [{"text": "Fifty lines."}], command


@pytest.fixture
def empty_home(tmp_path):
    """(home, work, environment): nothing of this machine's agents, and no way out but loopback."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    gemini_settings(str(home))
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    return home, work, dict(kept, HOME=str(home), TERM="xterm-256color", DISABLE_AUTOUPDATER="1",
                            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", HTTPS_PROXY="http://127.0.0.1:9",
                            NO_PROXY="127.0.0.1")


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
def test_a_real_agent_works_on_the_scripted_model_and_its_log_has_the_truth(name, empty_home, tmp_path):
    agent(name)
    home, work, env = empty_home
    with FakeApi() as api:
        api.script, command = run_of(name, work, api.url)
        done = subprocess.run(command, cwd=str(work), env=dict(env, **api.environment()), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT)
    assert done.returncode == 0 and b"Fifty lines." in done.stdout, done.stdout
    logs = [str(home / place) for place in (".claude", ".codex/sessions", ".gemini/tmp") if (home / place).is_dir()]
    totals = SessionOptimizer(str(tmp_path / "store")).scan(logs)["totals"]
    assert totals["model_calls"] == 3 == sum(row["main"] for row in api.truth)
    assert totals["tokens"] == api.sums(main=True)
