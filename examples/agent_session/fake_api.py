#!/usr/bin/env python3
"""A scripted model on loopback: real agent command lines run without a model, key or network.

It speaks Anthropic Messages, OpenAI Responses (and Chat Completions) and Gemini generateContent,
streamed or not:

    python3 examples/agent_session/fake_api.py --port 8790 --script turns.json --truth truth.jsonl
    export ANTHROPIC_BASE_URL=http://127.0.0.1:8790 ANTHROPIC_API_KEY=any            # claude
    export OPENAI_BASE_URL=http://127.0.0.1:8790/v1 OPENAI_API_KEY=any  # codex: see codex_config
    export GOOGLE_GEMINI_BASE_URL=http://127.0.0.1:8790 GEMINI_API_KEY=any           # gemini

A script is a list of turns, or an object ``{"words in the prompt": [turns]}`` for several
conversations at once; the first key that occurs in a conversation's own text chooses ("" fits all).
Which turn is due follows from the request (how often the model has answered in it), so parallel
agents, retries and resumed sessions each get theirs. A turn:

    {"text": "Done."}                                       an answer, the default when a script has
                                                            come to its end
    {"tool": "Bash", "input": {"command": "ls"}}            a tool call, by the agent's own name for
                                                            the tool
    {"calls": [{"tool": ..., "input": ...}, ...]}           several calls in one answer
    "thinking": text      before any of them                "delay": seconds before it is sent
    "status": 529         fail so once, then answer "usage": {"output": 12} instead of the computed
                          figure

The usage follows prompt caching: a context is its characters / 4; what the conversation's last
request had of it is read from the cache. Every answer is a row of the truth (a list, and a JSON
line in the file): ``{"protocol", "id", "model", "main" (it had
tools: an agent's own call, not a title or a probe), "conversation" (the script's key),
"uncached_input", "cache_write", "cache_read", "output"}``, the
classes disjoint, thinking inside the output.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterator, List, Optional, Tuple
from urllib.parse import urlsplit

# tokens of a truth row, disjoint
CLASSES = ("uncached_input", "cache_write", "cache_read", "output")
UNCACHED = 3  # tokens after the last cache breakpoint of an Anthropic request


class Request:
    """What a request says in any of the protocols: its model, the conversation's text, how many
    answers it holds."""

    def __init__(self, protocol: str, path: str, body: Dict[str, Any]):
        self.protocol, self.body = protocol, body
        self.model = str(body.get("model") or (re.findall(r"models/([^:/]+)", path) or ["?"])[0])
        self.main = bool(body.get("tools"))
        self.stream = "stream" in path.lower() if protocol == "gemini" else bool(body.get("stream"))
        items = (body.get({"gemini": "contents", "responses": "input"}.get(protocol, "messages"))
                 or [])
        self.items: List[Any] = (items if isinstance(items, list)
                                 else [{"role": "user", "content": items}])
        self.answered, last_was_answer = 0, False
        for item in self.items:  # the parts of one answer follow each other
            answer = self._is_answer(item)
            self.answered += answer and not last_was_answer
            last_was_answer = answer
        first = next((i for i, item in enumerate(self.items) if self._is_answer(item)),
                     len(self.items))
        self.words = ""  # the script's key that was found in the prompt
        self.prompt = "\n".join(_texts(self.items[:first]))
        self.size = len(json.dumps(
            [body.get(k) for k in ("system", "systemInstruction", "instructions", "tools")]
            + self.items)) // 4

    @staticmethod
    def _is_answer(item: Dict[str, Any]) -> bool:
        return item.get("role") in ("assistant", "model") or item.get("type") in (
            "function_call", "custom_tool_call", "reasoning", "local_shell_call")


def _texts(value: Any) -> Iterator[str]:
    """All texts of a message, without what moves between requests (cache marks)."""
    if isinstance(value, dict):
        for key in ("text", "content", "parts", "output", "functionResponse", "response"):
            yield from _texts(value.get(key))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


class FakeApi(ThreadingHTTPServer):
    """The server. ``url`` is where it listens, ``truth`` what it has answered; use it as a context
    manager, which serves in a thread, or call serve_forever. ``script`` may also be a function of a
    Request that returns a turn."""

    daemon_threads, block_on_close, request_queue_size = True, False, 256

    def __init__(self, script: Any = (), truth_file: str = "", port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.truth_file = script, truth_file
        self.truth: List[Dict[str, Any]] = []
        self.requests: List[Tuple[str, str]] = []  # method and path of everything asked
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._lock = threading.Lock()
        self._failed, self._sizes = set(), {}  # type: ignore[var-annotated]

    def __enter__(self) -> FakeApi:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed in the middle of an answer is part of the tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def sums(self, **wanted: Any) -> Dict[str, int]:
        """The tokens of all answers whose rows have these values, by class:
        ``sums(main=True, protocol="messages")``."""
        rows = [row for row in self.truth
                if all(row[key] == value for key, value in wanted.items())]
        return {name: sum(row[name] for row in rows) for name in CLASSES}

    def environment(self) -> Dict[str, str]:
        """The variables that point the agents here. Codex wants `codex_config` on its command
        line as well."""
        return {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": "none",
                "OPENAI_BASE_URL": self.url + "/v1", "OPENAI_API_KEY": "none",
                "GOOGLE_GEMINI_BASE_URL": self.url, "GEMINI_API_KEY": "none"}

    def turn_of(self, request: Request) -> Tuple[Dict[str, Any], int]:
        """The turn that is due, and the HTTP status it fails with this time (0: it does not)."""
        if not request.main:
            return {"text": "Done."}, 0
        if callable(self.script):
            return self.script(request), 0
        turns = self.script
        if isinstance(turns, dict):
            request.words = next((words for words in turns if words in request.prompt), "")
            turns = turns.get(request.words, ())
        turn = turns[request.answered] if request.answered < len(turns) else {"text": "Done."}
        mark = (request.prompt, request.answered)
        with self._lock:
            if turn.get("status") and mark not in self._failed:
                self._failed.add(mark)
                return turn, int(turn["status"])
        return turn, 0

    def account(self, request: Request, turn: Dict[str, Any]) -> Dict[str, Any]:
        """The truth row of an answer, which is kept."""
        written = sum(len(json.dumps(turn.get(key, "")))
                      for key in ("text", "thinking", "input", "calls"))
        key = (request.protocol, request.model, request.prompt, request.main)
        with self._lock:
            read = min(self._sizes.get(key, 0), request.size)
            self._sizes[key] = request.size
            number = len(self.truth) + 1
            row = {"protocol": request.protocol, "id": f"fake-{request.protocol}-{number:06d}",
                   "model": request.model, "main": request.main, "conversation": request.words,
                   "uncached_input": request.size - read,
                   "cache_write": 0, "cache_read": read, "output": written // 4 + 1}
            if request.protocol == "messages":
                row.update(uncached_input=UNCACHED, cache_write=request.size - read)
            row.update(turn.get("usage") or {})
            self.truth.append(row)
            if self.truth_file:
                with open(self.truth_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        return row


def _calls_of(turn: Dict[str, Any]) -> List[Dict[str, Any]]:
    return list(turn.get("calls") or ([turn] if "tool" in turn else []))


def _text_of(turn: Dict[str, Any]) -> str:
    return str(turn.get("text", "" if _calls_of(turn) else "Done."))


def messages_answer(request: Request, turn: Dict[str, Any],
                    row: Dict[str, Any]) -> Tuple[Any, List[Any]]:
    """Anthropic Messages: the whole answer, and the same as server-sent events."""
    usage = {"input_tokens": row["uncached_input"],
             "cache_creation_input_tokens": row["cache_write"],
             "cache_read_input_tokens": row["cache_read"],
             "output_tokens": row["output"], "service_tier": "standard", "cache_creation": {
                 "ephemeral_5m_input_tokens": row["cache_write"], "ephemeral_1h_input_tokens": 0}}
    # whole, as begun, deltas
    blocks: List[Tuple[Dict[str, Any], Dict[str, Any], List[Dict[str, Any]]]] = []
    if turn.get("thinking"):
        blocks.append(({"type": "thinking", "thinking": turn["thinking"], "signature": "c2lnbmVk"},
                       {"type": "thinking", "thinking": "", "signature": ""},
                       [{"type": "thinking_delta", "thinking": turn["thinking"]},
                        {"type": "signature_delta", "signature": "c2lnbmVk"}]))
    if _text_of(turn):
        blocks.append(({"type": "text", "text": _text_of(turn)}, {"type": "text", "text": ""},
                       [{"type": "text_delta", "text": piece}
                        for piece in re.findall(r"(?s).{1,40}", _text_of(turn))]))
    for number, call in enumerate(_calls_of(turn)):
        whole = {"type": "tool_use", "id": f"toolu_{row['id']}_{number}".replace("-", "_"),
                 "name": call["tool"], "input": call.get("input", {})}
        blocks.append((whole, dict(whole, input={}),
                       [{"type": "input_json_delta", "partial_json": json.dumps(whole["input"])}]))
    stop = "tool_use" if _calls_of(turn) else "end_turn"
    message = {"id": "msg_" + row["id"].replace("-", "_"), "type": "message", "role": "assistant",
               "model": row["model"], "content": [whole for whole, _, _ in blocks],
               "stop_reason": stop, "stop_sequence": None, "usage": usage}
    events: List[Any] = [("message_start", {"message": dict(message, content=[], stop_reason=None,
                                                            usage=dict(usage, output_tokens=1))})]
    for index, (_, begun, deltas) in enumerate(blocks):
        events.append(("content_block_start", {"index": index, "content_block": begun}))
        events += [("content_block_delta", {"index": index, "delta": delta}) for delta in deltas]
        events.append(("content_block_stop", {"index": index}))
    events += [
        ("message_delta", {"delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage}),
        ("message_stop", {})]
    return message, [(name, dict(data, type=name)) for name, data in events]


def responses_answer(request: Request, turn: Dict[str, Any],
                     row: Dict[str, Any]) -> Tuple[Any, List[Any]]:
    """OpenAI Responses. A call whose input is a text is a custom tool's (Codex: apply_patch)."""
    entered = row["uncached_input"] + row["cache_read"]
    usage = {"input_tokens": entered, "input_tokens_details": {"cached_tokens": row["cache_read"]},
             "output_tokens": row["output"], "output_tokens_details": {"reasoning_tokens": 0},
             "total_tokens": entered + row["output"]}
    items: List[Dict[str, Any]] = []
    if turn.get("thinking"):
        items.append({"type": "reasoning", "id": f"rs_{row['id']}", "encrypted_content": None,
                      "summary": [{"type": "summary_text", "text": turn["thinking"]}]})
    if _text_of(turn):
        items.append(
            {"type": "message", "id": f"item_{row['id']}", "role": "assistant",
             "status": "completed",
             "content": [{"type": "output_text", "text": _text_of(turn), "annotations": []}]})
    for number, call in enumerate(_calls_of(turn)):
        given = call.get("input", {})
        kind, field = (("custom_tool_call", "input") if isinstance(given, str)
                       else ("function_call", "arguments"))
        items.append({
            "type": kind, "id": f"fc_{row['id']}_{number}", "call_id": f"call_{row['id']}_{number}",
            "name": call["tool"], field: given if isinstance(given, str) else json.dumps(given),
            "status": "completed"})
    whole = {"id": "resp_" + row["id"], "object": "response", "created_at": int(time.time()),
             "status": "completed",
             "model": row["model"], "output": items, "usage": usage, "error": None}
    events: List[Any] = [("response.created",
                          {"response": dict(whole, status="in_progress", output=[], usage=None)})]
    for index, item in enumerate(items):
        events.append(("response.output_item.added",
                       {"output_index": index, "item": dict(item, status="in_progress")}))
        if item["type"] == "message":
            events.append(
                ("response.output_text.delta", {"item_id": item["id"], "output_index": index,
                                                "content_index": 0, "delta": _text_of(turn)}))
        events.append(("response.output_item.done", {"output_index": index, "item": item}))
    events.append(("response.completed", {"response": whole}))
    return whole, [(name, dict(data, type=name, sequence_number=n))
                   for n, (name, data) in enumerate(events)]


def chat_answer(request: Request, turn: Dict[str, Any],
                row: Dict[str, Any]) -> Tuple[Any, List[Any]]:
    """OpenAI Chat Completions; a stream carries usage in its last chunk (``include_usage``)."""
    entered = row["uncached_input"] + row["cache_read"]
    usage = {"prompt_tokens": entered, "completion_tokens": row["output"],
             "total_tokens": entered + row["output"],
             "prompt_tokens_details": {"cached_tokens": row["cache_read"]}}
    calls = [{"index": number, "id": f"call_{row['id']}_{number}", "type": "function",
              "function": {"name": call["tool"], "arguments": json.dumps(call.get("input", {}))}}
             for number, call in enumerate(_calls_of(turn))]
    message: Dict[str, Any] = {"role": "assistant", "content": _text_of(turn) or None}
    if calls:
        message["tool_calls"] = calls
    reason = "tool_calls" if calls else "stop"
    base = {"id": "chatcmpl-" + row["id"], "created": int(time.time()), "model": row["model"]}
    whole = dict(base, object="chat.completion", usage=usage,
                 choices=[{"index": 0, "message": message, "finish_reason": reason}])
    chunk = dict(base, object="chat.completion.chunk")
    return (whole,
            [(None, dict(chunk, choices=[{"index": 0, "delta": message, "finish_reason": None}])),
             (None, dict(chunk, choices=[{"index": 0, "delta": {}, "finish_reason": reason}])),
             (None, dict(chunk, choices=[], usage=usage)), (None, "[DONE]")])


def gemini_answer(request: Request, turn: Dict[str, Any],
                  row: Dict[str, Any]) -> Tuple[Any, List[Any]]:
    """Gemini generateContent. Thinking is counted apart from the candidates there; the row's output
    is their sum."""
    thoughts = min(row["output"] - 1, len(turn.get("thinking", "")) // 4)
    entered = row["uncached_input"] + row["cache_read"]
    usage = {"promptTokenCount": entered, "cachedContentTokenCount": row["cache_read"],
             "candidatesTokenCount": row["output"] - thoughts, "thoughtsTokenCount": thoughts,
             "totalTokenCount": entered + row["output"]}
    parts: List[Dict[str, Any]] = []
    if turn.get("thinking"):
        parts.append({"text": turn["thinking"], "thought": True})
    if _text_of(turn):
        parts.append({"text": _text_of(turn)})
    parts += [{"functionCall": {"id": f"call_{row['id']}_{number}", "name": call["tool"],
                                "args": call.get("input", {})}}
              for number, call in enumerate(_calls_of(turn))]
    base = {"modelVersion": row["model"], "responseId": row["id"]}
    chunks = [dict(base, candidates=[{"content": {"role": "model", "parts": [part]}, "index": 0}])
              for part in parts]
    chunks[-1]["candidates"][0]["finishReason"] = "STOP"
    chunks[-1]["usageMetadata"] = usage
    whole = dict(base, candidates=[{"content": {"role": "model", "parts": parts},
                                    "finishReason": "STOP", "index": 0}], usageMetadata=usage)
    return whole, [(None, chunk) for chunk in chunks]


ANSWERS = {"messages": messages_answer, "responses": responses_answer, "chat": chat_answer,
           "gemini": gemini_answer}


def protocol_of(path: str) -> Optional[str]:
    """Which protocol's model call a path is; None for anything else."""
    for ending, name in (("/messages", "messages"), ("/responses", "responses"),
                         ("/chat/completions", "chat"),
                         (":generateContent", "gemini"), (":streamGenerateContent", "gemini")):
        if path.endswith(ending):
            return name
    return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeApi

    def log_message(self, *_: Any) -> None:
        """Quiet: the agents have the terminal."""

    def _reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path))
        self._reply({})

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path))
        if self.headers.get("Upgrade"):  # a web socket: clients fall back to server-sent events
            return self._reply({"error": {"message": "no web sockets here"}}, 426)
        self._reply({"data": [], "models": []})

    def do_POST(self) -> None:
        self.server.requests.append(("POST", self.path))
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        protocol = protocol_of(path)
        if protocol is None:
            counted = len(raw) // 4
            return self._reply({"input_tokens": counted, "totalTokens": counted})
        try:
            request = Request(protocol, path, json.loads(raw))
        except (ValueError, AttributeError) as error:
            return self._reply(
                {"error": {"type": "invalid_request_error", "message": str(error)}}, 400)
        turn, status = self.server.turn_of(request)
        if turn.get("delay"):
            time.sleep(float(turn["delay"]))
        if status:
            return self._reply(
                {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
                status)
        whole, events = ANSWERS[protocol](request, turn, self.server.account(request, turn))
        if not request.stream:
            return self._reply(whole)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for name, data in events:
            text = data if isinstance(data, str) else json.dumps(data)
            piece = ((f"event: {name}\n" if name else "") + f"data: {text}\n\n").encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def codex_config(url: str, model: str = "gpt-5-codex") -> List[str]:
    """Options for ``codex`` that make ``url`` its provider."""
    provider = f'{{name="fake",base_url="{url}/v1",env_key="OPENAI_API_KEY",wire_api="responses"}}'
    return ["-c", "model_provider=fake", "-c", f"model_providers.fake={provider}", "-c",
            f"model={model}"]


def gemini_settings(home: str) -> None:
    """Let the ``gemini`` of this home use its API key, which it else asks for on a screen."""
    os.makedirs(os.path.join(home, ".gemini"), exist_ok=True)
    with open(os.path.join(home, ".gemini", "settings.json"), "w", encoding="utf-8") as file:
        json.dump({"security": {"auth": {"selectedType": "gemini-api-key"}},
                   "privacy": {"usageStatisticsEnabled": False},
                   "general": {"disableAutoUpdate": True, "enableAutoUpdate": False}}, file)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--script", help="a JSON file of turns")
    parser.add_argument("--truth", default="", help="a file that gets one JSON line per answer")
    given = parser.parse_args(arguments)
    script: Any = ()
    if given.script:
        with open(given.script, encoding="utf-8") as file:
            script = json.load(file)
    with FakeApi(script, given.truth, given.port) as server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
