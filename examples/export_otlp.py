#!/usr/bin/env python3
"""Write a stored session as OpenTelemetry GenAI spans (OTLP/JSON), to a file or an endpoint.

    python3 examples/export_otlp.py SESSION_ID > session.jsonl
    python3 examples/export_otlp.py last --output session.jsonl
    python3 examples/export_otlp.py last --endpoint http://127.0.0.1:4318 \\
        --header "Authorization=Bearer KEY"

An agent is an invoke_agent span (sub-agents below it), a model call a chat span with its usage, a
tool call an execute_tool span; prompts and context loads are events of the agent's span. As the
conventions ask, input tokens include cache reads and writes. Ids come from the session's: the same
export twice is the same spans.

``sessionoptimizer scan session.jsonl`` reads it back: same tokens, model calls, cache reads and
writes. What spans cannot say is lost: the one-hour part of cache writes, compactions, which tokens
belong to which read. Tokens of an agent without any model call are put on its invoke_agent span,
which readers count as one call.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import urllib.request
from typing import Any, Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import (EventType, Session, SessionEvent, SessionOptimizer,  # noqa: E402
                              SessionOptimizerError, __version__, plain, seconds_of)

TOOLS = {EventType.FILE_READ: "read", EventType.FILE_WRITE: "write", EventType.SEARCH: "search",
         EventType.TOOL_CALL: "tool", EventType.ERROR: "tool"}
PROVIDERS = (("claude", "anthropic"), ("opus", "anthropic"), ("sonnet", "anthropic"),
             ("gpt", "openai"),
             ("o3", "openai"), ("o4", "openai"), ("gemini", "gcp.gemini"), ("grok", "x_ai"),
             ("deepseek", "deepseek"))
ARGUMENTS = ("file_path", "file_paths", "lines", "offset", "limit", "query", "scope", "command")
BATCH = 1_000          # spans of one request
TIMEOUT = 10.0         # seconds
STEP = 1_000           # nanoseconds between two spans at least: readers order by time
CLIENT, INTERNAL, ERROR = 3, 1, 2  # span kinds and the status code of a failure


def value_of(value: Any) -> dict[str, Any]:
    """A Python value as an OTLP one; whole numbers are text there, as protobuf's JSON has them."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"stringValue": str(value)}


def attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """OTLP attributes of a dict, without what is empty."""
    return [{"key": key, "value": value_of(value)} for key, value in values.items()
            if value is not None and value != ""]


def hex_id(*parts: str, size: int = 8) -> str:
    """An id of ``size`` bytes that is the same for the same parts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:2 * size]


class Usage:
    """Tokens that go on one span."""

    def __init__(self) -> None:
        self.input = self.output = self.read = self.write = self.reasoning = 0

    def enter(self, event: SessionEvent) -> None:
        """Add what the event brought into the context."""
        self.input += event.tokens_input
        self.write += event.tokens_cache_write

    def leave(self, event: SessionEvent) -> None:
        """Add what the model wrote for the event, and the cache read of a call."""
        self.output += event.tokens_output
        self.read += event.tokens_cache_read
        self.reasoning += event.tokens_output if event.event_type is EventType.THINKING else 0

    def attributes(self) -> dict[str, Any]:
        """The attributes of the conventions: input with the cached part, output with the
        reasoning."""
        return {"gen_ai.usage.input_tokens": self.input + self.read,
                "gen_ai.usage.output_tokens": self.output,
                "gen_ai.usage.cache_read.input_tokens": self.read or None,
                "gen_ai.usage.cache_creation.input_tokens": self.write or None,
                "gen_ai.usage.reasoning.output_tokens": self.reasoning or None}


def usages(events: list[SessionEvent], imported: bool) -> dict[str, Usage]:
    """The usage of every model call of one agent, by event id; under "" that of an agent without
    any.

    What entered before a call belongs to it, what entered after the last to the last. In an
    imported session a call's own ``tokens_input`` entered with the call after it, and what follows
    it is part of its output.
    """
    calls = [event.id for event in events if event.event_type is EventType.AI_RESPONSE] or [""]
    result = {name: Usage() for name in calls}
    done = 0  # model calls so far
    for event in events:
        following, latest = (result[calls[min(done, len(calls) - 1)]],
                             result[calls[max(done - 1, 0)]])
        if event.event_type is EventType.AI_RESPONSE:
            done += 1
            after = result[calls[min(done, len(calls) - 1)]]
            (after if imported else following).enter(event)
            following.leave(event)
        else:
            following.enter(event)
            (latest if imported else following).leave(event)
    return result


class Exporter:
    """The spans of one session."""

    def __init__(self, session: Session):
        self.session, self.trace = session, hex_id("trace", session.id, size=16)
        self.clock = 0
        self.agents: dict[str, dict[str, Any]] = {}
        self.usage: dict[str, dict[str, Usage]] = {}

    def time(self, text: str) -> int:
        """Nanoseconds of a time, later than the last one given: some logs have no times, or equal
        ones."""
        self.clock = max(self.clock + STEP, int((seconds_of(text) or 0) * 1e6) * 1_000)
        return self.clock

    def span(self, name: str, key: str, parent: str, start: int, duration_ms: int, kind: int,
             values: dict[str, Any]) -> dict[str, Any]:
        """A span of the session's trace."""
        return {
            "traceId": self.trace, "spanId": hex_id("span", self.session.id, key),
            "parentSpanId": parent, "name": name, "kind": kind, "startTimeUnixNano": str(start),
            "endTimeUnixNano": str(start + duration_ms * 1_000_000),
            "attributes": attributes(dict({"gen_ai.conversation.id": self.session.id}, **values)),
            "status": {}, "events": []}

    def spans(self) -> list[dict[str, Any]]:
        """All spans, the agents' first."""
        by_agent: dict[str, list[SessionEvent]] = {"": []}
        for event in self.session.events:
            by_agent.setdefault(event.agent_id, []).append(event)
        for agent, events in by_agent.items():
            self.usage[agent] = usages(events, self.session.imported)
            started = events[0].timestamp if events else self.session.started_at
            self.agents[agent] = self.agent_span(agent, started)
        spans = [span for event in self.session.events for span in [self.event_span(event)] if span]
        end = max([int(span["endTimeUnixNano"]) for span in spans] + [self.clock])
        for agent in self.agents.values():
            agent["endTimeUnixNano"] = str(end)
        return list(self.agents.values()) + spans

    def agent_span(self, agent: str, started: str) -> dict[str, Any]:
        """The span of the agent, or of a sub-agent below it."""
        name = agent or self.session.agent
        parent = self.agents[""]["spanId"] if agent else ""
        alone = self.usage[agent].get("")  # tokens without a model call
        tokens = alone is None or alone.input + alone.output + alone.read
        # the first of them implies a model call
        operation = "invoke_agent" if tokens else "invoke_workflow"
        values = {"gen_ai.operation.name": operation, "gen_ai.agent.name": name,
                  "gen_ai.request.model": self.session.model}
        if not agent:
            values.update({"sessionoptimizer.task": self.session.task,
                           "sessionoptimizer.status": self.session.status.value})
        if alone is not None and tokens:
            values.update(alone.attributes())
        start = self.time(started)
        return self.span(f"{operation} {name}", f"agent {agent}", parent, start, 0,
                         INTERNAL, values)

    def event_span(self, event: SessionEvent) -> dict[str, Any] | None:
        """The span of a model call or a tool; None for others, which become events of the agent's
        span."""
        parent, start = self.agents[event.agent_id], self.time(event.timestamp)
        if event.event_type is EventType.AI_RESPONSE:
            model = event.model or self.session.model
            values = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": provider_of(model),
                      "gen_ai.request.model": model, "gen_ai.response.model": model,
                      "gen_ai.response.id": event.data.get("response_id") or event.id}
            values.update(self.usage[event.agent_id][event.id].attributes())
            return self.span(f"chat {model}", event.id, parent["spanId"], start, event.duration_ms,
                             CLIENT, values)
        if event.event_type in TOOLS:
            return self.tool_span(event, parent["spanId"], start)
        if event.event_type is not EventType.THINKING:
            parent["events"].append(
                {"timeUnixNano": str(start), "name": event.event_type.value.lower(),
                 "attributes": attributes({"source": event.data.get("source"),
                                           "tokens": event.tokens})})
        return None

    def tool_span(self, event: SessionEvent, parent: str, start: int) -> dict[str, Any]:
        """The span of a tool call; ``result_tokens`` is what its result brought into the
        context."""
        name = str(event.data.get("tool") or TOOLS[event.event_type])
        arguments = {key: event.data[key] for key in ARGUMENTS if event.data.get(key)}
        failed = event.event_type is EventType.ERROR
        span = self.span(
            f"execute_tool {name}", event.id, parent, start, event.duration_ms, INTERNAL, {
                "gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name,
                "gen_ai.tool.call.id": event.id,
                "gen_ai.tool.call.arguments": json.dumps(arguments) if arguments else "",
                "error.type": str(event.data.get("error_type") or "tool_error") if failed else "",
                "result_tokens": event.tokens_input})
        if failed:
            span["status"] = {"code": ERROR, "message": plain(event.data.get("message") or "")}
        return span


def provider_of(model: str) -> str:
    """The provider's name in the conventions; "custom" for a model that is not known."""
    bare = model.rsplit("/", 1)[-1]
    return next((provider for start, provider in PROVIDERS if bare.startswith(start)), "custom")


def documents(session: Session, batch: int = BATCH) -> Iterator[dict[str, Any]]:
    """The session as OTLP documents of at most ``batch`` spans."""
    spans = Exporter(session).spans()
    resource = {"attributes": attributes({"service.name": session.agent.lower()})}
    scope = {"name": "sessionoptimizer", "version": __version__}
    for start in range(0, len(spans), batch):
        yield {"resourceSpans": [{"resource": resource, "scopeSpans": [
            {"scope": scope, "spans": spans[start:start + batch]}]}]}


def post(endpoint: str, document: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a document to an OTLP/HTTP endpoint; OSError when it is refused or some of its spans
    are."""
    url = (endpoint if endpoint.rstrip("/").endswith("/v1/traces")
           else endpoint.rstrip("/") + "/v1/traces")
    headers = dict({"Content-Type": "application/json"}, **headers)
    request = urllib.request.Request(url, json.dumps(document).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        answer = response.read()
    try:
        rejected = json.loads(answer or b"{}").get("partialSuccess", {}).get("rejectedSpans", 0)
    except (ValueError, AttributeError):
        return  # some collectors answer with an empty protobuf message
    if int(rejected or 0):
        raise OSError(f"{url} rejected {rejected} spans")


def main(argv: list[str] | None = None) -> int:
    """Export a session; 0, or 1 when it is not there or could not be written."""
    parser = argparse.ArgumentParser(
        description="Export a stored session as OTLP/JSON GenAI spans.")
    parser.add_argument("session_id", help="the session's id, or 'last'")
    parser.add_argument(
        "--output", metavar="FILE", help="write to FILE (.jsonl) instead of standard output")
    parser.add_argument("--endpoint", metavar="URL", help="POST to this OTLP/HTTP endpoint instead")
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="to send along")
    parser.add_argument("--store", metavar="DIR", help="the store (default: your own)")
    options = parser.parse_args(argv)
    if not all("=" in header for header in options.header):
        parser.error("a header is NAME=VALUE")
    headers = dict(header.split("=", 1) for header in options.header)
    if options.endpoint and not options.endpoint.startswith(("http://", "https://")):
        parser.error(f"{options.endpoint} is not an http or https URL")
    try:
        optimizer = SessionOptimizer(options.store)
        newest = optimizer.list_sessions(limit=1) if options.session_id == "last" else []
        session = optimizer.get_session(newest[0].id if newest else options.session_id)
        if session is None:
            raise OSError(f"there is no session {options.session_id!r}")
        write(session, options, headers)
    except (OSError, SessionOptimizerError) as error:
        print(f"export_otlp: {plain(error, 500)}", file=sys.stderr)
        return 1
    return 0


def write(session: Session, options: argparse.Namespace, headers: dict[str, str]) -> None:
    """Send the documents to where the options say."""
    if options.endpoint:
        for document in documents(session):
            post(options.endpoint, document, headers)
        return
    lines = "".join(json.dumps(document) + "\n" for document in documents(session))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(lines)
    else:
        sys.stdout.write(lines)


if __name__ == "__main__":
    sys.exit(main())
