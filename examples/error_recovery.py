#!/usr/bin/env python3
"""Decorators that log failures to a session: tracking alone, a fallback, or retries with exponential backoff.

    python3 examples/error_recovery.py [--store DIR]

An operation that fails leaves one ERROR event, however many attempts it took, with ``recovery_strategy``
(none, fallback or retry) and ``recovered``; every attempt that is repeated leaves a CUSTOM ``retry_attempt``.
"""
from __future__ import annotations

import argparse
import functools
import os
import random
import sys
import tempfile
import time
from typing import Any, Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer, mask_secrets  # noqa: E402

# To use a library of your own instead (``from tenacity import retry``), call log_error from its callbacks.


def log_error(optimizer: SessionOptimizer, session_id: str, error: BaseException, *, operation: str,
              strategy: str, recovered: bool, attempts: int = 1) -> None:
    """Log the outcome of an operation that failed at least once; what looks like a secret is masked."""
    optimizer.log_event(session_id, EventType.ERROR,
                        {"tool": operation, "message": mask_secrets(str(error))[:300],
                         "error_type": type(error).__name__, "recovery_strategy": strategy,
                         "recovered": recovered, "attempts": attempts})


def with_session_tracking(optimizer: SessionOptimizer, session_id: str, *,
                          fallback: Callable[[Exception], Any] | None = None) -> Callable:
    """Decorator: log an exception and raise it again, or return what ``fallback(error)`` gives instead."""
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            note = functools.partial(log_error, optimizer, session_id, operation=function.__name__,
                                     strategy="fallback" if fallback else "none")
            try:
                return function(*args, **kwargs)
            except Exception as error:  # whatever it is, it is raised again or handed to the fallback
                if fallback is None:
                    note(error, recovered=False)
                    raise
                try:
                    result = fallback(error)
                except Exception:
                    note(error, recovered=False)
                    raise
                note(error, recovered=True)
                return result
        return tracked
    return decorate


def backoff_delays(attempts: int, delay: float, factor: float, most: float, jitter: float) -> list[float]:
    """Seconds before the second attempt, the third and so on: ``delay`` times powers of ``factor``, at most
    ``most``, and up to the share ``jitter`` longer, so that many clients do not come back at one moment."""
    return [min(most, delay * factor ** number) * (1 + random.uniform(0, jitter))
            for number in range(attempts - 1)]


def retry_with_tracking(optimizer: SessionOptimizer, session_id: str, *, max_attempts: int = 3,
                        delay: float = 0.5, factor: float = 2.0, max_delay: float = 30.0, jitter: float = 0.1,
                        retry_on: tuple[type[Exception], ...] = (OSError,),
                        sleep: Callable[[float], Any] = time.sleep) -> Callable:
    """Decorator: try again after the exceptions in ``retry_on``; raise the last one when no attempt is left.

    The default covers network and file trouble (ConnectionError and TimeoutError are OSErrors). A bug is not
    cured by waiting: any other exception is logged and raised at once. ``delay``, ``max_delay``: seconds.
    """
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            note = functools.partial(log_error, optimizer, session_id, operation=function.__name__)
            delays = backoff_delays(max_attempts, delay, factor, max_delay, jitter)
            failed = None
            for attempt in range(1, max_attempts + 1):
                try:
                    result = function(*args, **kwargs)
                except retry_on as error:
                    failed = error
                    if attempt == max_attempts:
                        note(error, strategy="retry", recovered=False, attempts=attempt)
                        raise
                except Exception as error:
                    note(error, strategy="none", recovered=False, attempts=attempt)
                    raise
                else:
                    if failed is not None:
                        note(failed, strategy="retry", recovered=True, attempts=attempt)
                    return result
                pause = delays[attempt - 1]
                optimizer.log_event(session_id, EventType.CUSTOM,
                                    {"type": "retry_attempt", "operation": function.__name__,
                                     "attempt": attempt, "max_attempts": max_attempts,
                                     "delay_seconds": round(pause, 3), "error_type": type(failed).__name__})
                sleep(pause)
            raise ValueError(f"max_attempts is {max_attempts}: give at least 1")
        return tracked
    return decorate


def demo(optimizer: SessionOptimizer) -> None:
    """An operation that works at the third attempt, and one that a fallback stands in for."""
    session = optimizer.start_session("BOLT", "Fetch and parse the index", model="grok")
    answers = iter([ConnectionError("connection reset"), ConnectionError("connection reset"), "index v2"])

    @retry_with_tracking(optimizer, session.id, max_attempts=3, delay=0.05)
    def fetch() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @with_session_tracking(optimizer, session.id, fallback=lambda error: {})
    def parse(text: str) -> dict:
        raise ValueError(f"not an index: {text}")

    print(f"fetched: {fetch()}")
    print(f"parsed: {parse('index v2')}")
    optimizer.end_session(session.id)
    for event in session.events:
        if event.event_type is EventType.ERROR:
            data = event.data
            print(f"{data['tool']}: {data['error_type']}, {data['recovery_strategy']}, "
                  f"recovered: {data['recovered']}, attempts: {data['attempts']}")


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and return 0."""
    parser = argparse.ArgumentParser(description="Log failures, fallbacks and retries to a session.")
    parser.add_argument("--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        demo(SessionOptimizer(options.store or scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
