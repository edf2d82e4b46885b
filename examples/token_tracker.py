#!/usr/bin/env python3
"""Reconcile the sessions with who else counted: ccusage, LiteLLM's log, Claude Code's OTel metrics.

    npx ccusage session --json | python3 examples/token_tracker.py ccusage -
    python3 examples/token_tracker.py litellm spend-logs.jsonl     # or of a JSON logger
    python3 examples/token_tracker.py otel metrics.jsonl           # from a collector's file
                                                                   # exporter

Every session that both sides know is compared by class (uncached input, cache write, cache read,
output) and in USD. Status 0: all the tokens agree; 3: some do not, or a session is missing in the
store. `sync_usage` brings a session that is logged live up to date.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any, Callable, Dict, Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, Session, SessionOptimizer  # noqa: E402

DONE, FAILED, DIFFERENT = 0, 1, 3
# As Claude Code names its session to the API, and so to a proxy:
# user_..._account_UUID_session_UUID, or a JSON object.
NAMED = re.compile(r"session(?:_id)?[\"':=_\s]*([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


@dataclass
class Usage:
    """Tokens by class, which do not overlap, and USD."""

    uncached: int = 0
    cache_write: int = 0
    cache_read: int = 0
    output: int = 0
    cost: float = 0.0

    def add(self, other: Usage) -> None:
        """Add another usage to this one."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def tokens(self) -> list[int]:
        """The four classes."""
        return [self.uncached, self.cache_write, self.cache_read, self.output]


Counted = Dict[str, Usage]  # by session id


def usage_of(session: Session) -> Usage:
    """What a session's events hold."""
    write = sum(event.tokens_cache_write for event in session.events)
    return Usage(session.total_tokens_input - write, write,
                 sum(event.tokens_cache_read for event in session.events),
                 session.total_tokens_output, session.estimated_cost)


def json_values(text: str) -> Iterator[Any]:
    """The values of a JSON document, an array or JSON lines; ValueError for what is none of
    them."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = [json.loads(line) for line in text.splitlines() if line.strip()]
    yield from whole if isinstance(whole, list) else [whole]


def from_ccusage(text: str) -> Counted:
    """``ccusage session --json``: a list ``session`` (``period`` is the id) or ``sessions``
    (``sessionId``)."""
    counted: Counted = {}
    for report in json_values(text):
        for row in report.get("sessions") or report.get("session") or []:
            usage = Usage(row["inputTokens"], row["cacheCreationTokens"], row["cacheReadTokens"],
                          row["outputTokens"], row["totalCost"])
            counted.setdefault(str(row.get("sessionId") or row.get("period")).split("/")[-1],
                               Usage()).add(usage)
    return counted


def from_litellm(text: str) -> Counted:
    """Rows of LiteLLM's spend log or StandardLoggingPayload. ``prompt_tokens`` include what the
    cache gave and took; the session is the id that Claude Code sends as the end user, else the
    proxy's own ``session_id``."""
    counted: Counted = {}
    for row in json_values(text):
        metadata = row.get("metadata") or {}
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        detail = metadata.get("usage_object") or {}
        read = (detail.get("cache_read_input_tokens")
                or (detail.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        write = detail.get("cache_creation_input_tokens") or 0
        cost = row.get("response_cost", row.get("spend")) or 0.0
        usage = Usage((row.get("prompt_tokens") or 0) - read - write, write, read,
                      row.get("completion_tokens") or 0, cost)
        named = NAMED.search(
            str(row.get("end_user") or metadata.get("user_api_key_end_user_id") or ""))
        session_id = (named.group(1) if named
                      else str(row.get("session_id") or row.get("trace_id") or "?"))
        if row.get("status") != "failure":
            counted.setdefault(session_id, Usage()).add(usage)
    return counted


def from_otel(text: str) -> Counted:
    """Claude Code's ``claude_code.token.usage`` and ``claude_code.cost.usage`` by ``session.id``,
    of delta temporality (its default) or cumulative, where the last value of a series counts."""
    names = {"input": "uncached", "cacheCreation": "cache_write", "cacheRead": "cache_read",
             "output": "output"}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    last: dict[str, tuple[tuple[str, str], float]] = {}
    for export in json_values(text):
        for metric in _each(export, "resourceMetrics", "scopeMetrics", "metrics"):
            if metric["name"] not in ("claude_code.token.usage", "claude_code.cost.usage"):
                continue
            for point in metric["sum"]["dataPoints"]:
                told = {pair["key"]: next(iter(pair["value"].values()))
                        for pair in point["attributes"]}
                key = (told.get("session.id", "?"), names.get(told.get("type", ""), "cost"))
                value = float(point.get("asDouble", point.get("asInt", 0)))
                if (metric["sum"].get("aggregationTemporality")
                        in (2, "AGGREGATION_TEMPORALITY_CUMULATIVE")):
                    last[json.dumps([metric["name"], sorted(told.items()),
                                     point.get("startTimeUnixNano")])] = (key, value)
                else:
                    sums[key] += value
    for key, value in last.values():
        sums[key] += value
    counted: Counted = {}
    for (session_id, name), value in sums.items():
        setattr(counted.setdefault(session_id, Usage()), name,
                value if name == "cost" else round(value))
    return counted


def _each(value: dict[str, Any], *path: str) -> Iterator[dict[str, Any]]:
    """The objects at the end of a path of lists."""
    for item in value.get(path[0]) or []:
        yield from _each(item, *path[1:]) if path[1:] else [item]


SOURCES: dict[str, Callable[[str], Counted]] = {"ccusage": from_ccusage, "litellm": from_litellm,
                                                "otel": from_otel}


def reconcile(optimizer: SessionOptimizer, counted: Counted) -> list[dict[str, Any]]:
    """A row for every session that was counted elsewhere: ``theirs``, ``ours`` (None when the store
    has none), ``equal``."""
    rows = []
    for session_id, theirs in sorted(counted.items()):
        session = (optimizer.get_session(session_id)
                   if re.fullmatch(r"[\w][\w.-]*", session_id) else None)
        ours = usage_of(session) if session is not None else None
        rows.append({"session": session_id, "theirs": theirs, "ours": ours,
                     "equal": ours is not None and ours.tokens() == theirs.tokens()})
    return rows


def sync_usage(optimizer: SessionOptimizer, session_id: str, counted: Usage) -> int:
    """Log what a tracker counted beyond a live session's own events as TOKEN_USAGE; the tokens that
    were added.

    A sync may run after every call, twice in a row or not at all: nothing is counted twice. Let one
    process sync a session."""
    session = optimizer.get_session(session_id)
    if session is None:
        return 0
    added = (max(0, counted.uncached + counted.cache_write - session.total_tokens_input),
             max(0, counted.output - session.total_tokens_output))
    if any(added):
        optimizer.log_event(
            session_id, EventType.TOKEN_USAGE, {"source": "token tracker"}, tokens_input=added[0],
            tokens_output=added[1])
    return sum(added)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows for people: one line where both agree, two where they do not."""
    print(f"{'session':<38}{'uncached':>12}{'cache write':>13}{'cache read':>13}{'output':>11}"
          f"{'USD':>11}")
    for row in rows:
        sides = ([("", row["theirs"])] if row["equal"]
                 else [("theirs", row["theirs"]), ("ours", row["ours"])])
        for name, usage in sides:
            figures = ("".join(f"{n:>{w},}" for n, w in zip(usage.tokens(), (12, 13, 13, 11)))
                       if usage else "  not in the store")
            print(f"{row['session'][:36] if name != 'ours' else '  in the store':<38}{figures}"
                  + (f"{usage.cost:>11.4f}" if usage else ""))
    print(f"{sum(row['equal'] for row in rows)} of {len(rows)} sessions agree to the token")


def main(argv: list[str] | None = None) -> int:
    """Reconcile a file with the store."""
    parser = argparse.ArgumentParser(
        description="Reconcile the sessions with who else counted their tokens.")
    parser.add_argument("source", choices=sorted(SOURCES))
    parser.add_argument("file", metavar="FILE", help="what it wrote; - for standard input")
    parser.add_argument(
        "--store", metavar="DIR", help="the store (default: as for sessionoptimizer)")
    options = parser.parse_args(argv)
    try:
        with (sys.stdin if options.file == "-" else open(options.file, encoding="utf-8")) as file:
            counted = SOURCES[options.source](file.read())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"token_tracker: {options.file} is not what {options.source} writes: {error!r}",
              file=sys.stderr)
        return FAILED
    rows = reconcile(SessionOptimizer(options.store), counted)
    print_rows(rows)
    return DONE if all(row["equal"] for row in rows) else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
