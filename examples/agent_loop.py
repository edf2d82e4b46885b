#!/usr/bin/env python3
"""Log what a provider's client answers: one line in the loop of an agent of your own.

    python3 examples/agent_loop.py                   a small agent with scripted answers, and its
                                                     report
    from agent_loop import log_response, usage_of    in a program of yours, beside this file

``log_response(optimizer, session.id, response)`` takes what the clients of Anthropic (messages) and
OpenAI (responses, chat completions) return, or their JSON, and logs it as one model call.
docs/agent-loop.md says how to put it into a loop.
"""
from __future__ import annotations

import os
import sys
import tempfile
from typing import Any, Iterable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import (  # noqa: E402
    EventType, SessionEvent, SessionOptimizer, Usage, estimated_tokens, text_report)


def value(holder: Any, *names: str) -> Any:
    """What is under the names in dicts or objects; None where there is nothing."""
    for name in names:
        holder = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
    return holder


def usage_of(usage: Any) -> tuple[Usage, int]:
    """The tokens of a response's ``usage``, each in one class, and how many of the output were
    thinking.

    Anthropic tells the input that no cache held; OpenAI all of it, cached or not. With both, output
    includes thinking."""
    def count(*names: str) -> int:
        return value(usage, *names) or 0

    kind = "prompt" if value(usage, "prompt_tokens") is not None else "input"
    words = "completion" if kind == "prompt" else "output"
    sent, output = count(f"{kind}_tokens"), count(f"{words}_tokens")
    details = f"{words}_tokens_details"
    thinking = min(output, count(details, "reasoning_tokens") or count(details, "thinking_tokens"))
    # OpenAI's: what was cached is part of what was sent
    if value(usage, f"{kind}_tokens_details") is not None:
        read = count(f"{kind}_tokens_details", "cached_tokens")
        written = count(f"{kind}_tokens_details", "cache_write_tokens")
        return Usage(max(0, sent - read - written), written, 0, read, output), thinking
    written, hour = (count("cache_creation_input_tokens"),
                     count("cache_creation", "ephemeral_1h_input_tokens"))
    written = max(written, hour + count("cache_creation", "ephemeral_5m_input_tokens"))
    return Usage(sent, written - hour, hour, count("cache_read_input_tokens"), output), thinking


def log_response(optimizer: SessionOptimizer, session_id: str, response: Any,
                 entered: Iterable[tuple] = (), *, duration_ms: int = 0) -> SessionEvent | None:
    """Log a response, an object of the client or its JSON, as AI_RESPONSE, and what it thought as
    THINKING; the event.

    ``entered``: (event type, data, text) of what its prompt brought, results of tools say, each
    logged before it with its part of the input; what is left of a session's first input is its
    start load. The tokens of all these events are those of the usage. ValueError where there is
    none: of a stream log the last chunk, with ``stream_options={"include_usage": True}``."""
    usage, session = value(response, "usage"), optimizer.get_session(session_id)
    if usage is None or session is None:
        raise ValueError(f"no usage in {type(response).__name__}" if session
                         else f"no session {session_id}")
    told, thinking = usage_of(usage)
    billed = {"model": value(response, "model") or "",
              "rate": "fast" if value(usage, "speed") == "fast" else ""}
    left = told._replace(read=0, output=0)

    def log(kind: Any, data: dict, tokens: int) -> None:
        nonlocal left
        hour = min(tokens, left.write_1h)
        short = min(tokens - hour, left.write_5m)
        part = Usage(min(tokens - hour - short, left.uncached), short, hour)
        left = Usage(*(have - taken for have, taken in zip(left, part)))
        optimizer.log_event(session_id, kind, data, usage=part, **billed)

    for kind, data, text in entered:
        log(kind, data, estimated_tokens(len(text)))
    if not any(event.event_type is EventType.AI_RESPONSE for event in session.events):
        log("CONTEXT_LOAD", {}, sum(left))
    data = {name: value(response, name) for name in ("id", "stop_reason") if value(response, name)}
    event = optimizer.log_event(session_id, "AI_RESPONSE", data, duration_ms=duration_ms, **billed,
                                usage=left._replace(read=told.read, output=told.output - thinking))
    if thinking:
        optimizer.log_event(session_id, "THINKING", tokens_output=thinking, **billed)
    return event


ANSWERS = [  # of a Claude, in the shape of its JSON
    {"id": "msg_1", "model": "claude-sonnet-4-5", "stop_reason": "tool_use", "usage": {
        "input_tokens": 12, "cache_creation_input_tokens": 4200, "cache_read_input_tokens": 0,
        "output_tokens": 180,
        "cache_creation": {"ephemeral_5m_input_tokens": 4200, "ephemeral_1h_input_tokens": 0}}},
    {"id": "msg_2", "model": "claude-sonnet-4-5", "stop_reason": "end_turn", "usage": {
        "input_tokens": 8, "cache_creation_input_tokens": 950, "cache_read_input_tokens": 4200,
        "output_tokens": 90, "output_tokens_details": {"thinking_tokens": 30}}}]


def main() -> int:
    optimizer, results = SessionOptimizer(tempfile.mkdtemp()), []
    with optimizer.session(
            "my agent", "say what setup.py does", model="claude-sonnet-4-5") as session:
        for answer in ANSWERS:  # of client.messages.create(...), say
            log_response(optimizer, session.id, answer, results)
            # what a tool returned
            results = [("FILE_READ", {"file_path": "setup.py"},
                        "from setuptools import setup\n" * 90)]
    report = optimizer.analyze(session.id)
    print(text_report(session, report) if report else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
