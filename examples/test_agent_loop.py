"""What the clients of Anthropic and OpenAI answer is logged to the token: recorded shapes, and the
real clients against a server on loopback where they are installed."""
import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE]
import agent_loop  # noqa: E402
from agent_loop import log_response, usage_of  # noqa: E402
from sessionoptimizer import (  # noqa: E402
    PriceList, SessionOptimizer, SessionStatus, Usage, bill_of)

ANTHROPIC = {"input_tokens": 7, "output_tokens": 90}
CHAT = {"prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300}
RESPONSES = {"input_tokens": 1000, "output_tokens": 300, "total_tokens": 1300}
# the usage as the provider documents it; uncached, written for 5 minutes and an hour, read, output;
# thinking
SHAPES = [
    ("no cache", ANTHROPIC, (7, 0, 0, 0, 90), 0),
    ("nulls", dict(ANTHROPIC, cache_creation_input_tokens=None, cache_read_input_tokens=None,
                   cache_creation=None), (7, 0, 0, 0, 90), 0),
    ("no split", dict(ANTHROPIC, cache_creation_input_tokens=50, cache_read_input_tokens=600),
     (7, 50, 0, 600, 90), 0),
    ("split",
     dict(ANTHROPIC, cache_creation_input_tokens=50, cache_read_input_tokens=600, cache_creation={
         "ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30}),
     (7, 20, 30, 600, 90), 0),
    ("split alone", dict(ANTHROPIC, cache_creation={
        "ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 30}), (7, 20, 30, 0, 90), 0),
    ("thinking", dict(ANTHROPIC, output_tokens_details={"thinking_tokens": 60}),
     (7, 0, 0, 0, 90), 60),
    ("chat", CHAT, (1000, 0, 0, 0, 300), 0),
    ("chat, cached", dict(CHAT, prompt_tokens_details={"cached_tokens": 900, "audio_tokens": 0},
                          completion_tokens_details={"reasoning_tokens": 200,
                                                     "accepted_prediction_tokens": 0}),
     (100, 0, 0, 900, 300), 200),
    ("chat, null details", dict(CHAT, prompt_tokens_details=None, completion_tokens_details=None),
     (1000, 0, 0, 0, 300), 0),
    ("responses", dict(RESPONSES, input_tokens_details={"cached_tokens": 0},
                       output_tokens_details={"reasoning_tokens": 0}), (1000, 0, 0, 0, 300), 0),
    ("responses, cached",
     dict(RESPONSES, input_tokens_details={"cached_tokens": 700, "cache_write_tokens": 200},
          output_tokens_details={"reasoning_tokens": 250}), (100, 200, 0, 700, 300), 250),
]


def as_object(shape):
    return json.loads(json.dumps(shape), object_hook=lambda fields: SimpleNamespace(**fields))


@pytest.mark.parametrize("make", [dict, as_object], ids=["JSON", "objects"])
@pytest.mark.parametrize(
    "shape, classes, thinking", [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_every_token_is_in_one_class_and_costs_what_the_provider_bills(
        tmp_path, make, shape, classes, thinking):
    assert usage_of(make(shape)) == (Usage(*classes), thinking)
    optimizer = SessionOptimizer(str(tmp_path))
    model = "gpt-5" if "total_tokens" in shape else "claude-sonnet-4-5"
    with optimizer.session("mine", "a task", model=model) as session:
        event = log_response(optimizer, session.id,
                             make({"id": "r1", "model": model, "usage": shape}), duration_ms=9)
    stored = SessionOptimizer(str(tmp_path)).get_session(session.id)
    assert Usage(*map(sum, zip(*(each.usage for each in stored.events)))) == Usage(*classes)
    assert stored.cost_in_pico == PriceList().lookup(model).cost(Usage(*classes)) > 0
    assert sum(cell["cost"] for cell in bill_of(stored)["cells"]) == stored.cost_in_pico
    assert ((event.data["id"], event.duration_ms, event.usage.output)
            == ("r1", 9, classes[-1] - thinking))
    assert ([each.tokens_output for each in stored.events if each.event_type.value == "THINKING"]
            == [thinking] * bool(thinking))


def test_what_tools_returned_has_its_part_of_the_input_and_is_found_when_it_comes_again(tmp_path):
    optimizer, text = SessionOptimizer(str(tmp_path)), "x = 1\n" * 600
    with optimizer.session("mine", "a task", model="claude-sonnet-4-5") as session:
        for number, written in enumerate((4000, 1100, 1100)):
            answer = {"usage": {"input_tokens": 3, "output_tokens": 20,
                                "cache_creation_input_tokens": written,
                                "cache_read_input_tokens": 4000 * bool(number)}}
            log_response(optimizer, session.id, answer,
                         [("FILE_READ", {"file_path": "a.py"}, text)] if number else [])
    report = optimizer.analyze(session.id)
    assert [(issue.issue_type.value, issue.charged_tokens) for issue in report.issues
            if issue.measured] == [("REPEATED_FILE_READ", 1000)]
    assert Usage(*map(sum, zip(*(each.usage for each in session.events)))) == (9, 6200, 0, 8000, 60)


@pytest.mark.parametrize("entered", [[("FILE_READ", {"file_path": "a"}, "x" * 10**6)],
                                     [("SEARCH", {"query": "q"}, "")], []])
def test_no_more_enters_than_was_billed(tmp_path, entered):
    optimizer = SessionOptimizer(str(tmp_path))
    session = optimizer.start_session("mine", "a task")
    log_response(optimizer, session.id, {"usage": dict(CHAT)}, entered)
    assert session.total_tokens_input == 1000 and session.total_tokens_output == 300


@pytest.mark.parametrize("response", [{}, {"usage": None}, "text", None, SimpleNamespace(id="x")])
def test_an_answer_without_usage_is_refused_by_name(tmp_path, response):
    optimizer = SessionOptimizer(str(tmp_path))
    session = optimizer.start_session("mine", "a task")
    with pytest.raises(ValueError, match="no usage in"):
        log_response(optimizer, session.id, response)
    with pytest.raises(ValueError, match="no session nobody"):
        log_response(optimizer, "nobody", {"usage": ANTHROPIC})
    assert len(session.events) == 1


def test_a_session_that_raises_has_failed_and_fast_mode_has_its_price(tmp_path):
    optimizer = SessionOptimizer(str(tmp_path))
    with pytest.raises(RuntimeError):
        with optimizer.session("mine", "a task", model="claude-opus-4-8") as session:
            log_response(optimizer, session.id,
                         {"model": "claude-opus-4-8", "usage": dict(ANTHROPIC, speed="fast")})
            raise RuntimeError
    assert session.status is SessionStatus.FAILED
    fast, usual = (PriceList().lookup("claude-opus-4-8", rate).cost(Usage(uncached=7, output=90))
                   for rate in ("fast", ""))
    assert session.cost_in_pico == fast > usual


def test_threads_and_tasks_lose_nothing(tmp_path):
    optimizer = SessionOptimizer(str(tmp_path))
    shared = optimizer.start_session("mine", "shared")
    answer = {"usage": dict(ANTHROPIC)}

    async def agent(number):
        with optimizer.session("mine", "task %d" % number) as session:
            for _ in range(5):
                await asyncio.sleep(0)
                log_response(optimizer, session.id, answer)
                await asyncio.get_running_loop().run_in_executor(
                    None, log_response, optimizer, shared.id, answer)
        return session

    async def agents():
        return await asyncio.gather(*map(agent, range(4)))

    sessions = asyncio.run(agents())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: log_response(optimizer, shared.id, answer), range(20)))
    assert [session.total_tokens for session in sessions] == [5 * 97] * 4
    assert SessionOptimizer(str(tmp_path)).get_session(shared.id).total_tokens == 40 * 97
    assert {session.status for session in sessions} == {SessionStatus.COMPLETED}


ANSWERS = {  # as the providers' references show them
    "/v1/messages": {"id": "msg_1", "type": "message", "role": "assistant",
                     "model": "claude-sonnet-4-5", "stop_reason": "end_turn", "stop_sequence": None,
                     "content": [{"type": "text", "text": "hi"}], "usage": dict(SHAPES[3][1])},
    "/v1/chat/completions": {"id": "c1", "object": "chat.completion", "created": 1,
                             "model": "gpt-5", "usage": SHAPES[7][1], "choices": [
                                 {"index": 0, "finish_reason": "stop",
                                  "message": {"role": "assistant", "content": "hi"}}]},
    "/v1/responses": {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5",
                      "status": "completed", "output": [], "parallel_tool_calls": True,
                      "tool_choice": "auto", "tools": [], "usage": SHAPES[10][1]},
}


class Provider(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = ANSWERS[self.path]
        body, kind = json.dumps(answer), "application/json"
        if asked.get("stream"):
            chunk = dict(answer, object="chat.completion.chunk", choices=[])
            first = dict(chunk, usage=None,
                         choices=[{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}])
            body, kind = ("".join("data: %s\n\n" % line
                                  for line in (json.dumps(first), json.dumps(chunk), "[DONE]")),
                          "text/event-stream")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def provider():
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield "http://127.0.0.1:%d" % server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client, ask, shape", [
    ("anthropic", lambda c: c.messages.create(model="claude-sonnet-4-5", max_tokens=9,
                                              messages=[{"role": "user", "content": "x"}]), 3),
    ("openai", lambda c: c.chat.completions.create(model="gpt-5",
                                                   messages=[{"role": "user", "content": "x"}]), 7),
    ("openai", lambda c: list(c.chat.completions.create(
        model="gpt-5", messages=[{"role": "user", "content": "x"}], stream=True,
        stream_options={"include_usage": True}))[-1], 7),
    ("openai", lambda c: c.responses.create(model="gpt-5", input="x"), 10)],
    ids=["messages", "chat", "chat stream", "responses"])
def test_the_real_clients_answer_so(tmp_path, provider, client, ask, shape):
    module = pytest.importorskip(client, reason="needs pip install " + client)
    make = {"anthropic": lambda: module.Anthropic(base_url=provider, api_key="x"),
            "openai": lambda: module.OpenAI(base_url=provider + "/v1", api_key="x")}[client]
    optimizer = SessionOptimizer(str(tmp_path))
    with make() as connection, optimizer.session("mine", "a task") as session:
        response = ask(connection)
        event = log_response(optimizer, session.id, response)
    assert usage_of(response.usage) == (Usage(*SHAPES[shape][2]), SHAPES[shape][3])
    assert (event.model == response.model
            and Usage(*map(sum, zip(*(each.usage for each in session.events)))) == SHAPES[shape][2])


def test_the_program_runs(capsys):
    assert agent_loop.main() == 0
    out = capsys.readouterr().out
    assert "Total Waste Tokens:  0 measured (0.0%) of 5,440" in out and "start load" in out
