#!/usr/bin/env python3
"""Usage that a token tracker counted becomes TOKEN_USAGE events, without counting anything twice.

    python3 examples/token_tracker.py [--store DIR]

A tracker knows what an API reported; a session knows the events that were logged with tokens of their own.
Only the difference is logged, so a sync may run after every call, twice in a row or not at all: the session's
totals never exceed the tracker's unless the events alone already do.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer  # noqa: E402


@dataclass
class Usage:
    """Running totals of one session. ``input_tokens`` are those new to the context, without cache reads."""

    model: str = "default"
    input_tokens: int = 0
    output_tokens: int = 0


class TokenTracker(Protocol):
    """What a tracker has to answer. To use your own, import it: ``from tokentracker import TokenTracker``."""

    def session_usage(self, session_id: str) -> Usage:
        """The totals of a session so far."""


class MemoryTracker:
    """A tracker that adds up what it is told, in memory."""

    def __init__(self) -> None:
        self._usage: dict[str, Usage] = {}

    def log_usage(self, session_id: str, model: str, input_tokens: int, output_tokens: int) -> None:
        """Add the usage of one model call."""
        usage = self._usage.setdefault(session_id, Usage(model))
        usage.input_tokens += input_tokens
        usage.output_tokens += output_tokens

    def session_usage(self, session_id: str) -> Usage:
        """The totals so far; zeros for a session it has not heard of."""
        return self._usage.get(session_id, Usage())


@dataclass
class Synced:
    """What a sync did: tokens it added, and by how many the session's own events exceed the tracker."""

    added_input: int
    added_output: int
    ahead_input: int
    ahead_output: int


def sync_usage(optimizer: SessionOptimizer, tracker: TokenTracker, session_id: str) -> Synced | None:
    """Log what the tracker counted beyond the session's own events; None when there is no such session.

    Nothing is logged when nothing is missing. Let one process sync a session: two could log the same tokens.
    """
    session = optimizer.get_session(session_id)
    if session is None:
        return None
    usage = tracker.session_usage(session_id)
    missing_input = usage.input_tokens - session.total_tokens_input
    missing_output = usage.output_tokens - session.total_tokens_output
    synced = Synced(max(0, missing_input), max(0, missing_output),
                    max(0, -missing_input), max(0, -missing_output))
    if synced.added_input or synced.added_output:
        optimizer.log_event(session_id, EventType.TOKEN_USAGE,
                            {"source": "token tracker", "model": usage.model,
                             "tracked_input": usage.input_tokens, "tracked_output": usage.output_tokens},
                            tokens_input=synced.added_input, tokens_output=synced.added_output)
    return synced


def demo(optimizer: SessionOptimizer) -> None:
    """A session of which some calls were logged as events and some only tracked."""
    tracker = MemoryTracker()
    session = optimizer.start_session("FORGE", "Plan the authentication module", model="opus")

    tracker.log_usage(session.id, "opus", 2_000, 800)
    optimizer.log_event(session.id, EventType.FILE_READ, {"file_path": "src/auth.py"}, tokens_input=1_500)
    optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=800)
    for _ in range(2):  # the second sync finds nothing to add
        synced = sync_usage(optimizer, tracker, session.id)
        print(f"synced: {synced.added_input:,} tokens in, {synced.added_output:,} out")

    tracker.log_usage(session.id, "opus", 3_000, 1_200)
    synced = sync_usage(optimizer, tracker, session.id)
    print(f"synced: {synced.added_input:,} tokens in, {synced.added_output:,} out")

    optimizer.end_session(session.id)
    usage = tracker.session_usage(session.id)
    print(f"tracker: {usage.input_tokens:,} in, {usage.output_tokens:,} out")
    print(f"session: {session.total_tokens_input:,} in, {session.total_tokens_output:,} out, "
          f"${session.estimated_cost:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and return 0."""
    parser = argparse.ArgumentParser(description="Sync a token tracker, counting nothing twice.")
    parser.add_argument("--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        demo(SessionOptimizer(options.store or scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
