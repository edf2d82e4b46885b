#!/usr/bin/env python3
"""Retry what fails with tenacity: every failure is an event, a retry is told from a fresh mistake.

    python3 examples/error_recovery.py [--attempts 3] [--wait 1] [--on-status 75] [--session ID] \\
        -- COMMAND...

runs a command again until it ends with 0, with pauses that double, and logs it to the session ID
(``last`` is the newest), or to a session of its own. An operation that fails leaves one ERROR
event, however many attempts it took, with ``recovery_strategy`` (none, fallback or retry) and
``recovered``; every attempt that is repeated leaves a CUSTOM ``retry_attempt``. Needs the extra
``recovery``. The decorators do the same for functions.
"""
from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from typing import Any, Callable, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
try:
    import tenacity
except ImportError as missing:
    raise ImportError("error_recovery.py needs tenacity: pip install 'sessionoptimizer[recovery]', "
                      "or in a clone pip install -e '.[recovery]'") from missing
from sessionoptimizer import (  # noqa: E402
    EventType, Session, SessionOptimizer, SessionStatus, mask_secrets)

LONGEST_WAIT = 30.0  # seconds between two attempts
TAIL = 300  # characters of a failure's text


class CommandFailed(Exception):
    """A command ended with a status other than 0."""

    def __init__(self, status: int, text: str):
        super().__init__(text or f"status {status}")
        self.status = status


def log_error(optimizer: SessionOptimizer, session_id: str, error: BaseException, *, operation: str,
              strategy: str, recovered: bool, attempts: int = 1) -> None:
    """Log the outcome of an operation that failed at least once; what looks like a secret is
    masked."""
    optimizer.log_event(session_id, EventType.ERROR,
                        {"tool": operation, "message": mask_secrets(str(error))[-TAIL:],
                         "error_type": type(error).__name__, "recovery_strategy": strategy,
                         "recovered": recovered, "attempts": attempts})


def retry_with_tracking(optimizer: SessionOptimizer, session_id: str, *,
                        retry_on: tuple[type[Exception], ...] = (OSError,), **how: Any) -> Callable:
    """Decorator: try again after the exceptions in ``retry_on``; raise the last one when no attempt
    is left.

    The default covers network and file trouble (ConnectionError and TimeoutError are OSErrors). A
    bug is not cured by waiting: any other exception is logged and raised at once. ``how``:
    tenacity's own arguments (``stop``, ``wait``, ``sleep``); without them 3 attempts, and pauses
    that double from 0.5 s on, each up to 0.5 s longer, so that many do not come back at one moment.
    """
    settings = {"stop": tenacity.stop_after_attempt(3),
                "wait": tenacity.wait_exponential(multiplier=0.5, max=LONGEST_WAIT)
                + tenacity.wait_random(0, 0.5), **how}

    def decorate(function: Callable) -> Callable:
        note = functools.partial(log_error, optimizer, session_id, operation=function.__name__)

        def repeat(state: tenacity.RetryCallState) -> None:
            optimizer.log_event(session_id, EventType.CUSTOM, {
                "type": "retry_attempt", "operation": function.__name__,
                "attempt": state.attempt_number, "delay_seconds": round(state.next_action.sleep, 3),
                "error_type": type(state.outcome.exception()).__name__})

        @functools.wraps(function)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            failures: list[Exception] = []

            def attempt() -> Any:
                try:
                    return function(*args, **kwargs)
                except Exception as error:  # it is raised again
                    failures.append(error)
                    raise

            try:
                result = tenacity.Retrying(reraise=True, before_sleep=repeat,
                                           retry=tenacity.retry_if_exception_type(retry_on),
                                           **settings)(attempt)
            except Exception as error:
                note(error, strategy="retry" if isinstance(error, retry_on) else "none",
                     recovered=False, attempts=len(failures))
                raise
            if failures:
                note(failures[-1], strategy="retry", recovered=True, attempts=len(failures) + 1)
            return result
        return tracked
    return decorate


def with_session_tracking(optimizer: SessionOptimizer, session_id: str, *,
                          fallback: Callable[[Exception], Any] | None = None) -> Callable:
    """Decorator: log an exception and raise it again, or return what ``fallback(error)`` gives
    instead."""
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            note = functools.partial(log_error, optimizer, session_id, operation=function.__name__,
                                     strategy="fallback" if fallback else "none")
            try:
                return function(*args, **kwargs)
            except Exception as error:
                # whatever it is, it is raised again or handed to the fallback
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


def run_command(optimizer: SessionOptimizer, session_id: str, command: Sequence[str], *,
                attempts: int, wait: float, on_status: Sequence[int]) -> int:
    """Run a command until it ends with 0, or with a status that is not in ``on_status`` (empty:
    any); its last status."""
    class Again(CommandFailed):
        """It ended with a status after which another attempt makes sense."""

    def run() -> int:
        done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
        text = done.stderr.decode(errors="replace")
        sys.stderr.write(text)
        if done.returncode == 0:
            return 0
        raise (Again if not on_status or done.returncode in on_status else CommandFailed)(
            done.returncode, text)

    run.__name__ = " ".join(command)[:100]
    tracked = retry_with_tracking(
        optimizer, session_id, retry_on=(Again,), stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_exponential(multiplier=wait, max=LONGEST_WAIT))(run)
    try:
        return tracked()
    except CommandFailed as error:
        return error.status if error.status > 0 else 128 - error.status


def find_session(optimizer: SessionOptimizer, name: str) -> Session | None:
    """The session of an id, or the newest for ``last``; None when there is none."""
    if name != "last":
        return optimizer.get_session(name)
    newest = optimizer.list_sessions(limit=1)
    return newest[0] if newest else None


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its last status; 1 when there is no such session or command."""
    parser = argparse.ArgumentParser(
        description="Run a command again until it works, and log that to a session.")
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="at most N (3)")
    parser.add_argument("--wait", type=float, default=1.0, metavar="S",
                        help="seconds before the second attempt, doubling (1)")
    parser.add_argument("--on-status", type=int, action="append", default=[], metavar="N",
                        help="again after this status only")
    parser.add_argument("--session", metavar="ID",
                        help="log to this session (last: the newest), not to one of its own")
    parser.add_argument(
        "--store", metavar="DIR", help="the store (default: as for sessionoptimizer)")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(argv)
    optimizer = SessionOptimizer(options.store)
    session = find_session(optimizer, options.session) if options.session else None
    if options.session and session is None:
        print(f"error_recovery: no session {options.session!r}", file=sys.stderr)
        return 1
    own = (None if session
           else optimizer.start_session("error-recovery", " ".join(options.command)[:100]))
    try:
        status = run_command(
            optimizer, (session or own).id, options.command, attempts=max(1, options.attempts),
            wait=options.wait, on_status=options.on_status)
    except OSError as error:
        print(f"error_recovery: cannot run {options.command[0]}: {error}", file=sys.stderr)
        status = 1
    if own:
        optimizer.end_session(own.id, SessionStatus.FAILED if status else SessionStatus.COMPLETED)
    return status


if __name__ == "__main__":
    sys.exit(main())
