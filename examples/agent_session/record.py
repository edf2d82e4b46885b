#!/usr/bin/env python3
"""Run any command in a terminal of its own, unchanged, and keep what it cost as a session.

    python3 examples/agent_session/record.py -- claude
    python3 examples/agent_session/record.py --cast run.cast -- codex exec "Fix the loader"
    python3 examples/agent_session/record.py --store DIR --result run.json --data task=7 -- \\
        sh -c 'cd src && gemini -p "Why?"'

The terminal is passed through byte for byte: raw mode, size and its changes, signals, the exit
status. The session gets a start, an end, and the tokens: from the agent's own log where there is
one (its transcript becomes a session of the store, as ``scan`` makes it, and this one names it),
else from the answers of the model provider (a pass-through on loopback), else an estimate that is
called one. Figures that stand on the screen are never read.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import queue
import re
import select
import shlex
import signal
import sys
import time
import warnings
from typing import Any, Dict, List, Optional

if __name__ == "__main__":
    HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:1] = [HERE, os.path.dirname(HERE)] if os.path.exists(
        os.path.join(os.path.dirname(HERE), "sessionoptimizer.py")) else [HERE]  # run from a clone
from agent_session import logs  # noqa: E402
from agent_session.proxy import UPSTREAM, Answer, PassThrough  # noqa: E402
from agent_session.terminal import (  # noqa: E402
    WINDOWS, Cast, exit_of, process_of, release, signal_groups, spawn, write_private)

from sessionoptimizer import (EventType, Session, SessionEvent, SessionOptimizer,  # noqa: E402
                              SessionOptimizerError, SessionStatus, mask_secrets)

if not WINDOWS:
    import fcntl
    import termios
    import tty

CHUNK = 65_536
# pieces that are handed on together: a terminal gives 4 KB at a time, and a write costs more than a
# read
AT_ONCE = 8
MAX_TYPED = 65_536  # bytes that wait for the command to read them
LOOKS = (0.1, 0.25, 0.5, 1.0)  # seconds after the start; then every second
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


# ============================================================================
# The terminal
# ============================================================================


class Screen:
    """The terminal this program was started in, or what stands in for it."""

    def __init__(self) -> None:
        self.attributes = termios.tcgetattr(0) if os.isatty(0) else None
        self.raw = False

    def size(self) -> bytes:
        """The struct winsize of whichever of our files is a terminal; 24 by 80 where none is."""
        for descriptor in (0, 1, 2):
            with contextlib.suppress(OSError):
                return fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
        return b"\x18\0P\0\0\0\0\0"

    def take(self) -> None:
        if self.attributes is not None:
            tty.setraw(0, termios.TCSANOW)
            self.raw = True

    def give_back(self) -> None:
        if self.raw and self.attributes is not None:
            self.raw = False
            termios.tcsetattr(0, termios.TCSADRAIN, self.attributes)


class Copy:
    """Copies between our terminal and the command's until the command has ended."""

    def __init__(self, screen: Screen, terminal: Any, *, cast: Optional[Cast], watch: logs.Watch,
                 volume: Volume):
        self.screen, self.terminal, self.cast, self.watch, self.volume = (
            screen, terminal, cast, watch, volume)
        self.master, self.pid = terminal.fd, terminal.pid
        self.status: Optional[int] = None
        self.typed = bytearray()
        self.reading, self.showing, self.line_over = True, True, True
        self.began = time.monotonic()
        self.looks = list(LOOKS)
        self.wake, self._wakes = os.pipe()
        self._old: Dict[int, Any] = {}
        for descriptor in (self.wake, self._wakes, self.master):
            os.set_blocking(descriptor, False)

    def run(self) -> int:
        """What os.waitpid says of the command in the end."""
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        # A handler may run between waitpid and the line after it: it only wakes the loop, which
        # alone waits for the child.
        handlers = {"SIGCHLD": lambda *_: None, "SIGWINCH": self._resized,
                    "SIGCONT": self._continued, "SIGTSTP": self._suspended}
        handlers.update(dict.fromkeys(PASSED_ON, self._pass_on))
        for name, handler in handlers.items():
            number = getattr(signal, name)
            self._old[number] = signal.signal(number, handler)
        try:
            self.screen.take()
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, self.screen.size())
            self._child()
            while self.status is None:
                self._turn()
            self._drain()
        finally:
            self.screen.give_back()
            signal.set_wakeup_fd(-1)
            for number, old in self._old.items():
                signal.signal(number, old)
        return self.status

    def _turn(self) -> None:
        waiting = select.poll()
        waiting.register(self.wake, select.POLLIN)
        waiting.register(self.master, select.POLLIN | (select.POLLOUT if self.typed else 0))
        if self.reading and len(self.typed) < MAX_TYPED:
            waiting.register(0, select.POLLIN)
        ready = True
        while ready and self.status is None:  # as long as nothing but output comes
            ready = self._look_now(waiting.poll(self._milliseconds()))

    def _look_now(self, found: List[Any]) -> bool:
        """Do what can be done; False when something else is to be waited for."""
        events, same = dict(found), True
        if self.wake in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake, 1024)
            self._child()
        if events.get(self.master, 0) & ~select.POLLOUT and not self._show():
            time.sleep(0.01)  # closed, and the command not reaped yet
        if 0 in events:
            self._type()
            same = False
        if events.get(self.master, 0) & select.POLLOUT:
            self._enter()
            same = False
        if not events or time.monotonic() - self.began >= self.looks[0]:
            self.watch.look(self.pid)
            past = time.monotonic() - self.began
            self.looks = [at for at in self.looks if at > past] or [past + 1.0]
            if self.cast:
                self.cast.flush()
        return same

    def _milliseconds(self) -> int:
        return max(1, int((self.looks[0] - (time.monotonic() - self.began)) * 1000) + 1)

    def _show(self) -> bool:
        """Hand on what the command has written; False when its terminal is closed."""
        pieces: List[bytes] = []
        while len(pieces) < AT_ONCE:
            try:
                data = os.read(self.master, CHUNK)
            except BlockingIOError:
                break
            except OSError as error:  # EIO: nobody has the other side open
                if error.errno != errno.EIO:
                    raise
                data = b""
            if not data:
                if not pieces:
                    return False
                break
            pieces.append(data)
        data = b"".join(pieces)
        self._write(data)
        if self.cast:
            self.cast.output(data)
        if self.volume.counting:
            self.volume.printed(data)
        return True

    def _write(self, data: bytes) -> None:
        while data and self.showing:
            try:
                data = data[os.write(1, data):]
            except BlockingIOError:
                select.select([], [1], [])
            except OSError:  # our terminal is gone: to the command that is a hang-up
                self.showing = False
                self._pass_on(signal.SIGHUP)

    def _type(self) -> None:
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if not data:
            self.reading = False
            # end of input, as a terminal says it: in mid-line only the second is one
            if self.screen.attributes is None:
                data = b"\x04" if self.line_over else b"\x04\x04"
        else:
            self.volume.typed(data)
            self.line_over = data.endswith(b"\n")
        self.typed += data
        self._enter()

    def _enter(self) -> None:
        try:
            while self.typed:
                del self.typed[:os.write(self.master, bytes(self.typed[:4096]))]
        except BlockingIOError:
            return
        except OSError:
            self.typed.clear()

    def _drain(self) -> None:
        """What the command wrote before it ended. Others that hold its terminal open are not waited
        for."""
        waiting = select.poll()
        waiting.register(self.master, select.POLLIN)
        while waiting.poll(50) and self._show():
            pass

    # -- signals -----------------------------------------------------------------------------------

    def _child(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            if self.screen.attributes is not None:  # a shell is there to wake us up
                self._suspended()
                self._pass_on(signal.SIGCONT)
        elif pid:
            self.status = status

    def _resized(self, *_: Any) -> None:
        size = self.screen.size()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
        if self.cast:
            rows, columns = (int.from_bytes(size[at:at + 2], sys.byteorder) for at in (0, 2))
            self.cast.resized(rows, columns)

    def _pass_on(self, number: int, *_: Any) -> None:
        """To the command; what a keyboard or a closed window sends, to all that a terminal would
        send it to."""
        group = 0
        with contextlib.suppress(OSError):
            group = os.tcgetpgrp(self.master)
        if number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP) and group:
            return signal_groups([group], number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _suspended(self, *_: Any) -> None:
        self.screen.give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._continued()

    def _continued(self, *_: Any) -> None:
        self.screen.take()
        self._resized()


class Volume:
    """How much was typed and printed, for the estimate: text alone, not what draws a full screen,
    at most a megabyte (an answer is no longer). Characters per token: four."""

    most = 1 << 20
    per_token = 4
    _controls = re.compile(
        rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\x00-\x1f\x7f]")
    _full_screen = re.compile(rb"\x1b\[\?(?:1049|1047|47)([hl])")

    def __init__(self) -> None:
        self.counting, self._full = True, False
        self.given, self.answered, self._seen = 0, 0, 0

    def typed(self, data: bytes) -> None:
        self.given += len(self._controls.sub(b"", data).decode("utf-8", "ignore"))

    def printed(self, data: bytes) -> None:
        self._seen += len(data)
        self.counting = self._seen < self.most
        start = 0
        for found in self._full_screen.finditer(data):
            self._count(data[start:found.start()])
            self._full, start = found.group(1) == b"h", found.end()
        self._count(data[start:])

    def _count(self, data: bytes) -> None:
        if not self._full:
            self.answered += len(self._controls.sub(b"", data).decode("utf-8", "ignore"))


# ============================================================================
# The session
# ============================================================================


class Recording:
    """One command's session in the store: begun, ended, and told its tokens."""

    def __init__(self, command: List[str], given: argparse.Namespace):
        self.command, self.given, self.env = command, given, dict(os.environ)
        self.optimizer = SessionOptimizer(given.store)
        self.agent = logs.agent_of(command)
        self.answers: "queue.Queue[Answer]" = queue.Queue()
        self.through: Optional[PassThrough] = None
        self.volume, self.ran = Volume(), False
        self.markers = os.path.join(str(self.optimizer.storage_path), "recordings")
        os.makedirs(self.markers, mode=0o700, exist_ok=True)

    def begin(self) -> Session:
        """Start the session; those whose recorder was killed are ended."""
        self._end_the_lost()
        words = mask_secrets(shlex.join(self.command))
        metadata: Dict[str, Any] = {
            "recorded": {"command": words, "cwd": os.getcwd(), "pid": os.getpid()}}
        if self.given.cast:
            metadata["recorded"]["cast"] = os.path.abspath(self.given.cast)
        metadata.update(dict(pair.split("=", 1) for pair in self.given.data))
        name = self.given.agent or self.agent or os.path.basename(self.command[0])
        self.session = self.optimizer.start_session(
            name, self.given.task or words[:200], session_id=self.given.session_id,
            metadata=metadata)
        own = process_of(os.getpid())
        write_private(os.path.join(self.markers, self.session.id),
                      json.dumps([os.getpid(), own.started if own else 0]).encode())
        return self.session

    def _end_the_lost(self) -> None:
        for name in os.listdir(self.markers):
            with contextlib.suppress(OSError, ValueError):
                with open(os.path.join(self.markers, name), encoding="utf-8") as file:
                    pid, started = json.load(file)
                process = process_of(pid)
                if os.path.isdir("/proc/self") and (process is None or process.started != started):
                    self.optimizer.end_session(name, SessionStatus.ABANDONED)
                    os.unlink(os.path.join(self.markers, name))

    def environment(self) -> Dict[str, str]:
        """What the command gets: our own, pointed at a pass-through where its log may not do. An
        agent whose log we read is left alone, unless it goes by another address than its provider's
        already."""
        mode = self.given.usage
        wanted = mode == "pass-through" or mode == "auto" and (
            not self.agent or any(self.env.get(name) for name in UPSTREAM))
        if wanted:
            self.through = PassThrough(self.answers.put, self.env)
            return dict(self.env, **self.through.environment())
        return self.env

    def run(self) -> int:
        """Run the command; what os.waitpid says of it."""
        screen, self.watch = Screen(), logs.Watch(os.getcwd(), self.env)
        size = screen.size()
        rows, columns = (int.from_bytes(size[at:at + 2], sys.byteorder) for at in (0, 2))
        attributes = screen.attributes
        env = self.environment()
        terminal = spawn(self.command, cwd=os.getcwd(), env=env, rows=rows, columns=columns,
                         attributes=attributes, echo=attributes is not None)
        self.ran = True
        if self.through:
            self.through.start()
        cast = None
        if self.given.cast:
            cast = Cast(self.given.cast, rows=rows, columns=columns, command=self.command, env=env)
        try:
            return Copy(screen, terminal, cast=cast, watch=self.watch, volume=self.volume).run()
        finally:
            if cast:
                cast.close()
            if self.through:
                self.through.stop()
            release(terminal)

    def end(self, exit_status: int, number: int, duration_ms: int) -> Dict[str, Any]:
        """Write down how it ended and what it cost; the same as a dict."""
        told: Dict[str, Any] = {
            "session": self.session.id, "exit_status": exit_status, "signal": number,
            "duration_ms": duration_ms, "source": "none", "estimated": False, "sessions": [],
            "tokens": dict.fromkeys(logs.CLASSES, 0), "calls": 0, "cost": 0.0}
        found = (logs.read_logs(self.watch, self.optimizer)
                 if self.given.usage in ("auto", "log") else None)
        if found is not None:
            told.update(source="log", sessions=found.sessions, tokens=found.tokens,
                        calls=found.calls, cost=found.cost)
        answers = [] if found is not None else list(self.answers.queue)
        if answers:
            told.update(source="pass-through",
                        estimated=any(answer.estimated for answer in answers), calls=len(answers))
            for name in logs.CLASSES:
                told["tokens"][name] = sum(getattr(answer, name) for answer in answers)
            told["cost"] = self._keep(answers)
        elif found is None and self.given.usage != "none" and self.ran:
            words = len(" ".join(self.command[1:])) + self.volume.given
            told.update(source="estimate", estimated=True)
            told["tokens"]["uncached_input"] = -(-words // self.volume.per_token)
            told["tokens"]["output"] = -(-self.volume.answered // self.volume.per_token)
            self.optimizer.log_event(self.session.id, EventType.AI_RESPONSE,
                                     {"source": "estimate", "estimated": True,
                                      "characters": words + self.volume.answered},
                                     told["tokens"]["uncached_input"], told["tokens"]["output"])
        self.optimizer.log_event(self.session.id, EventType.TOKEN_USAGE, {"recorded": told})
        failed = exit_status or number
        self.optimizer.end_session(self.session.id,
                                   SessionStatus.FAILED if failed else SessionStatus.COMPLETED)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.markers, self.session.id))
        return told

    def _keep(self, answers: List[Answer]) -> float:
        """The model calls as events of the session, with their cache classes, which log_event has
        no words for; USD."""
        session = self.optimizer.get_session(self.session.id)
        if session is None:
            return 0.0
        whole = Session.from_dict(session.to_dict())
        for number, answer in enumerate(answers, 1):
            data: Dict[str, Any] = {"source": "pass-through", "protocol": answer.protocol,
                                    "response": answer.id}
            if answer.estimated:
                data["estimated"] = True
            whole.add_event(SessionEvent(
                f"{whole.id}_call_{number}", answer.at, EventType.AI_RESPONSE, data,
                tokens_input=answer.uncached_input + answer.cache_write,
                tokens_output=answer.output,
                duration_ms=answer.duration_ms, tokens_cache_write=answer.cache_write,
                tokens_cache_write_1h=answer.cache_write_1h, tokens_cache_read=answer.cache_read,
                model=answer.model))
        whole.model = max((answer.model for answer in answers),
                          key=[answer.model for answer in answers].count).lower()
        whole.prices = session.prices
        self.optimizer.delete_session(whole.id)
        self.optimizer.import_session(whole.to_dict())
        return whole.estimated_cost


# ============================================================================
# Command line
# ============================================================================


def parsed(arguments: List[str]) -> "tuple[argparse.Namespace, List[str]]":
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False,
        usage="record.py [options] -- COMMAND [ARGUMENT ...]")
    parser.add_argument("--store", help="the directory of sessions (default: ~/.sessionoptimizer)")
    parser.add_argument("--cast", help="a file that gets a recording in asciicast v2")
    parser.add_argument(
        "--agent", help="what the session calls the agent (default: the command's name)")
    parser.add_argument("--task", help="what it is for (default: the command line)")
    parser.add_argument("--session-id", help="the session's id (default: made from agent and time)")
    parser.add_argument("--data", action="append", default=[], metavar="KEY=VALUE",
                        help="metadata of the session; repeatable")
    parser.add_argument("--result", help="a file that gets exit status, tokens and dollars as JSON")
    parser.add_argument("--usage", choices=("auto", "log", "pass-through", "none"), default="auto",
                        help="where tokens come from (default: the agent's log, else the "
                        "provider's answers, else an estimate)")
    if "--" not in arguments:
        given = parser.parse_args(arguments)  # --help, or a mistake in an option
        parser.error("give the command after --")
    at = arguments.index("--")
    given, command = parser.parse_args(arguments[:at]), arguments[at + 1:]
    if not command:
        parser.error("give the command after --")
    if any("=" not in pair for pair in given.data):
        parser.error("--data needs KEY=VALUE")
    return given, command


def main(arguments: Optional[List[str]] = None) -> int:
    given, command = parsed(sys.argv[1:] if arguments is None else arguments)
    if WINDOWS:
        print("record.py: needs a POSIX terminal: use it in WSL", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # the terminal is the command's
    try:
        recording = Recording(command, given)
        recording.begin()
    except (SessionOptimizerError, OSError) as error:
        print(f"record.py: {error}", file=sys.stderr)
        return 2
    began, failure = time.monotonic(), ""
    try:
        exit_status, number = exit_of(recording.run())
    except (OSError, ImportError) as error:  # as a shell says it
        exit_status, number = 126 if os.path.exists(command[0]) else 127, 0
        failure = str(error)
    try:
        told = recording.end(exit_status, number, int((time.monotonic() - began) * 1000))
        if given.result:
            write_private(given.result, (json.dumps(told, indent=1) + "\n").encode())
    except (SessionOptimizerError, OSError, ValueError, LookupError) as error:
        # the command's own end is what counts
        print(f"record.py: not written down: {error}", file=sys.stderr)
    if failure:
        print(f"record.py: {failure}", file=sys.stderr)
    if number:
        end_by(number)
    return exit_status


def end_by(number: int) -> None:
    """End as the command did, by the same signal, without a second core file."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
