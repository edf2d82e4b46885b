#!/usr/bin/env python3
"""One line on a running session of Claude Code: its status line, from the JSON on standard input.

    33.0k tokens (17%) · $0.48, $0.0165 per call · cache 4m50s,
    until 14:32 · read twice: a.py (~400 tokens)

``claude_code_hooks.py --install --status-line`` puts it into Claude Code's settings;
``monitor.py --live`` prints the same for every running session.

The tokens are the context of the last call. The dollars so far are Claude Code's own figure; "per
call" is what sending this context once more costs while the cache holds it. The cache's end is the
last call's time and the lifetime its transcript tells (5 minutes or an hour); when neither is
there, nothing is said of it, and when it is over, what the next call pays to write the context
again. What was read twice is known where the hooks log the session: the file whose repeated reads
brought the most tokens, by estimate.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is slow to load, and a status line is loaded often
    from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import (  # noqa: E402
    ContextMemory, EventType, Session, SessionOptimizer, SessionOptimizerError, Usage, dollars,
    plain, seconds_of, short_number)

TAIL = 1 << 18         # bytes at a transcript's end in which its last calls are looked for
# bytes of a logged session: a line must not wait for a larger one to be read
SESSION_SIZE = 1 << 21
LIFETIMES = (("ephemeral_1h_input_tokens", 3600), ("ephemeral_5m_input_tokens", 300))


LastCall = namedtuple("LastCall", "model context time lifetime", defaults=("", 0, 0.0, 0))
LastCall.__doc__ = """The last call of a transcript's main agent: its model, the tokens of its
context (0: not known), its time (seconds since 1970), the seconds the cache keeps what a call
writes (0: not known)."""


def last_call(path: str) -> LastCall:
    """What the end of a transcript tells; an empty LastCall where it tells of no call."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return LastCall()
    found = LastCall()
    for line in reversed(lines):
        try:
            entry = json.loads(line) if b'"usage"' in line else {}
            message = entry.get("message", {})
            usage, model = message.get("usage"), message.get("model")
            if not usage or entry.get("isSidechain") or not model or model.startswith("<"):
                continue
            if not found.time:
                found = LastCall(model, context_of(usage),
                                 seconds_of(entry.get("timestamp")) or 0.0)
            written = usage.get("cache_creation") or {}
            lifetime = next((seconds for name, seconds in LIFETIMES if written.get(name)), 0)
        except (ValueError, AttributeError, TypeError):
            continue  # the first line is cut
        if lifetime:
            return found._replace(lifetime=lifetime)
    return found


def context_of(usage: dict[str, Any]) -> int:
    """The tokens of the context a call sent."""
    return sum(usage.get(name) or 0 for name in (
        "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))


def read_twice(session: Session | None) -> str:
    """The file whose repeated reads brought the most tokens: "a.py (~400 tokens)";
    "" where there is none."""
    tokens: dict[str, int] = {}
    if session is None:
        return ""
    source = session.metadata.get("source")
    memory = ContextMemory(session.metadata.get("cwd") or (source or {}).get("cwd") or "")
    for event in session.events:
        repeat, path = memory.observe(event), event.data.get("file_path")
        if repeat is not None and path and event.event_type is EventType.FILE_READ:
            tokens[path] = (
                tokens.get(path, 0) + event.tokens_input * repeat.covered // max(1, repeat.total))
    if not tokens:
        return ""
    path = max(tokens, key=lambda name: tokens[name])
    return f"{plain(os.path.basename(path), 40)} (~{short_number(tokens[path])} tokens)"


def logged(optimizer: SessionOptimizer, session_id: str) -> Session | None:
    """The session as the hooks logged it; None where there is none,
    or one too large to wait for."""
    try:
        if os.path.getsize(optimizer.store.find(session_id)) <= SESSION_SIZE:
            return optimizer.get_session(session_id)
    except (OSError, SessionOptimizerError):
        pass
    return None


def in_words(seconds: float) -> str:
    """59s, 4m50s, 1h02m."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def line_of(optimizer: SessionOptimizer, call: LastCall, *, cost: float | None = None,
            window: int = 0, session: Session | None = None, now: float = 0.0) -> str:
    """The line. ``cost``: USD so far, None where not known; ``window``: the most tokens a context
    can have, 0 where not known; ``now``: seconds since 1970 (default: the clock)."""
    left = call.time + call.lifetime - (now or time.time())
    expired = call.lifetime and call.time and left <= 0
    share = f" ({round(100 * call.context / window)}%)" if window else ""
    parts = [f"{short_number(call.context)} tokens{share}"] if call.context else []
    money = [dollars(cost)] if cost is not None else []
    if call.context and call.model:
        hour = call.lifetime == LIFETIMES[0][1]
        write = Usage(write_1h=call.context) if hour else Usage(write_5m=call.context)
        usage = write if expired else Usage(read=call.context)
        price = optimizer.prices.lookup(call.model).cost(usage) / 1e12
        money.append(dollars(price) + (" for the next call" if expired else " per call"))
    parts += [", ".join(money)] if money else []
    if expired:
        parts.append("cache expired")
    elif call.lifetime and call.time:
        end = time.strftime("%H:%M", time.localtime(call.time + call.lifetime))
        parts.append(f"cache {in_words(left)}, until {end}")
    twice = read_twice(session)
    return " · ".join(parts + ([f"read twice: {twice}"] if twice else []))


def status_line(payload: dict[str, Any], optimizer: SessionOptimizer, now: float = 0.0) -> str:
    """The line for what Claude Code tells its status line."""
    def part(name: str) -> dict[str, Any]:
        value = payload.get(name)
        return value if isinstance(value, dict) else {}

    call = last_call(os.path.expanduser(str(payload.get("transcript_path") or "")))
    window, cost = part("context_window"), part("cost").get("total_cost_usd")
    usage = window.get("current_usage")
    context = context_of(usage) if isinstance(usage, dict) else 0
    call = call._replace(context=context or call.context,
                         model=part("model").get("id") or call.model)
    return line_of(optimizer, call, cost=cost, window=window.get("context_window_size") or 0,
                   now=now, session=logged(optimizer, str(payload.get("session_id") or "")))


def main(argv: list[str] | None = None) -> int:
    """Print the line; 0 whatever is read, so that the agent's screen stays whole. ``--store DIR``
    is the only option."""
    words = sys.argv[1:] if argv is None else argv
    try:
        payload = json.loads(sys.stdin.buffer.read().decode("utf-8", "replace"))
        optimizer = SessionOptimizer(words[1]
                                     if words[:1] == ["--store"] and len(words) > 1 else None)
        text = status_line(payload if isinstance(payload, dict) else {}, optimizer)
    except (ValueError, TypeError, AttributeError, RecursionError, SessionOptimizerError) as error:
        text = f"no status: {plain(error, 80)}"
    sys.stdout.buffer.write(text.encode("utf-8") + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
