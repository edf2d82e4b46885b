"""Sessions in a terminal: a shell or any program, kept when the program that made them goes.

    async with SessionManager() as manager:
        session = await manager.create_session(SessionConfig("build", cwd="/src"))
        result = await session.execute("make test", timeout=60)
        print(result.success, result.output)

A later SessionManager of the same directory finds the session again (``restore_session``): running,
since each has a process of its own that holds its terminal (host.py), or honestly ``terminated``.
"""
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, AsyncIterator, Callable, Dict, List, Optional, Sequence, Union

from agent_session.link import Link
from agent_session.terminal import (CLEAN_BYTES, WINDOWS, Moment, begun_in_session, clean_text,
                                    signal_begun, this_moment, write_private)

HOST = os.path.join(os.path.dirname(os.path.abspath(__file__)), "host.py")
START_SECONDS = 20  # for a terminal to be there, and for its shell to show a prompt
ABANDONED = 60.0  # seconds after which a session that has not started never will
STARTS_AT_ONCE = 2 * (os.cpu_count() or 1)
GRACE_SECONDS = 2.0  # between asking a session to end and killing it
HISTORY = 20  # commands that are remembered
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_MARK = re.compile(rb"\x1b\]7773;([0-9a-f]{16});(C|[0-9]+)\x07")
_TYPED = re.compile(rb"(?s) ?__so=([0-9a-f]{16}); printf (?:(?!__so=).)*?\x1b\]7773;\1;C\x07")
_PREPARED = re.compile(rb"(?s) ?__so=[0-9a-f]{16}(?:; unset |\r\n).*?(?=\x1b\]7773;)")
_MARK_BYTES = 48  # the longest one
_hosts: List["subprocess.Popen[bytes]"] = []  # started by this process and not reaped yet


class SessionError(Exception):
    """A session that cannot do what was asked of it; the message says why."""


class UnknownSession(SessionError, LookupError):
    """There is no session of this name."""


@dataclass
class SessionConfig:
    """What a session is. ``command`` runs instead of a shell; ``execute`` needs a shell (bash, zsh,
    a POSIX sh, fish, pwsh). Of ``env``, which is added to this process's own, only the names are
    kept on disk."""

    name: str
    cwd: str = "."
    shell: str = ""  # with options, as in "bash --norc"; default: bash, else sh (pwsh on Windows)
    command: Sequence[str] = ()
    rows: int = 24
    columns: int = 120
    buffer_bytes: int = 1 << 20  # of the last output
    timeout: float = 30.0  # seconds, of an execute that gives none
    env: Dict[str, str] = field(default_factory=dict)
    role: str = ""  # what the agent in it is for
    cast: str = ""  # a file that gets an asciicast v2 recording

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a session: letters, digits, '-', '_', "
                             "'.', at most 100")
        self.cwd = os.path.abspath(os.path.expanduser(self.cwd))
        self.command = [self.command] if isinstance(self.command, str) else list(self.command)
        for name, least, most in (("rows", 1, 5000), ("columns", 1, 5000),
                                  ("buffer_bytes", 4096, 1 << 26)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"{name} is {value!r}: it needs a whole number from {least:,} to {most:,}")
        if not isinstance(self.timeout, (int, float)) or not 0 < self.timeout <= 86_400:
            raise ValueError(f"timeout is {self.timeout!r}: it needs seconds, up to a day")
        if (not isinstance(self.env, dict)
                or not all(isinstance(v, str) for item in self.env.items() for v in item)):
            raise ValueError("env needs an object of texts")

    def arguments(self) -> List[str]:
        """What runs in the terminal."""
        if self.command:
            return list(self.command)
        return shlex.split(self.shell) or [shutil.which("pwsh" if WINDOWS else "bash") or "/bin/sh"]


@dataclass
class ExecuteResult:
    """What came of one command. ``output`` is what it wrote to the terminal, both streams, as text
    without control sequences; ``error`` says why it was no success ("" when it was one);
    ``exit_code`` is None without one."""

    success: bool
    output: str
    error: str
    execution_time_ms: int
    exit_code: Optional[int] = None
    truncated: bool = False  # output above the buffer's bound: its beginning is left out


# ============================================================================
# Shells
# ============================================================================

_POSIX = (r"""__so={mark}; unset HISTFILE PROMPT_COMMAND; PS2=; """
          r"""PS1="$(printf '\033]7773;')\${{__so}};\$?$(printf '\007')\$ " """)
_INIT = {  # what makes a shell's prompt say which command has ended with which status
    "bash": (r"""__so={mark}; unset HISTFILE PROMPT_COMMAND PS0; PS2=; """
             r"""PS1='\[\e]7773;${{__so}};$?\a\]\$ '"""),
    "zsh": (r"""__so={mark}; unset HISTFILE; unsetopt PROMPT_SP PROMPT_CR; """
            r"""precmd_functions=() preexec_functions=(); setopt prompt_subst; RPS1=; PS2=; """
            r"""PS1=$'%{{\e]7773;${{__so}};%?\a%}}%% '"""),
    "fish": (r"""set -g __so {mark}; set -g fish_history ''; functions -e fish_right_prompt; """
             r"""function fish_prompt; printf '> '; end; function __so_end --on-event """
             r"""fish_postexec; printf '\e]7773;%s;%d\a' $__so $status; end"""),
    "pwsh": (r"""$__so='{mark}'; function prompt {{ $c = if ($?) {{ 0 }} elseif ($LASTEXITCODE) """
             r"""{{ $LASTEXITCODE }} else {{ 1 }}; "$([char]27)]7773;$__so;$c$([char]7)> " }}"""),
}
_RUN = {  # say where the output begins, then run the file
    "fish": r"""set -g __so {mark}; printf '\e]7773;%s;C\a' $__so; source {file}""",
    "pwsh": (r"""$__so='{mark}'; Write-Host -NoNewline "$([char]27)]7773;$__so;C$([char]7)"; . """
             r"""{file}"""),
}
_POSIX_RUN = r""" __so={mark}; printf '\033]7773;%s;C\007' "$__so"; . {file}"""
_FAMILIES = {"bash": "bash", "zsh": "zsh", "fish": "fish", "pwsh": "pwsh", "powershell": "pwsh",
             "sh": "sh", "dash": "sh", "ash": "sh", "ksh": "sh", "mksh": "sh", "busybox": "sh"}
_MARK_LINE = {"fish": "set -g __so {mark}", "pwsh": "$__so='{mark}'"}
QUIET = {"PAGER": "cat", "GIT_PAGER": "cat"}  # a pager would wait for a key


def family_of(argv: Sequence[str]) -> str:
    """bash, zsh, sh, fish or pwsh; "" for a program that is no shell, or a shell that runs one
    thing (-c)."""
    name = os.path.basename(argv[0]).lower()
    name = name[:-4] if name.endswith(".exe") else name
    return "" if "-c" in argv[1:] else _FAMILIES.get(name, "")


class _Running:
    """A command in a shell, and what it has written so far. It ends at the mark that carries its
    number."""

    def __init__(self, mark: str, limit: int, command: str = ""):
        self.mark, self.limit, self.command = mark.encode(), limit, command[:500]
        self.output = bytearray()
        self.scanned = 0  # bytes of the output that hold no mark of this command
        self.began = self.truncated = False
        self.done: "asyncio.Future[Optional[int]]" = asyncio.get_running_loop().create_future()

    def feed(self, data: bytes) -> None:
        if self.done.done():  # the prompt, which came before its reader woke up
            return
        self.output += data
        start = max(0, self.scanned - _MARK_BYTES)
        self.scanned = len(self.output)
        for found in list(_MARK.finditer(bytes(self.output[start:]))):
            if found.group(1) != self.mark:
                continue
            if found.group(2) == b"C":
                del self.output[:start + found.end()]
                self.began = True
                self.scanned = 0
                return self.feed(b"")
            if self.began:
                del self.output[start + found.start():]
            status = int(found.group(2))
            # a ksh says 256 + signal, others 128 + signal
            return self.end(status - 128 if status > 256 else status)
        if len(self.output) > 2 * self.limit:
            del self.output[:-self.limit]
            self.scanned = len(self.output)
            self.truncated = True

    def end(self, status: Optional[int]) -> None:
        if not self.done.done():
            self.done.set_result(status)


# ============================================================================
# One session
# ============================================================================


class AISession:
    """A terminal with a shell or another program in it. Made by a SessionManager.

    ``state`` is "running" or "terminated" ("new" before ``start``). Every method raises
    SessionError with the reason when the session is not in a state for it.
    """

    def __init__(self, config: SessionConfig, directory: str):
        self.config, self.directory = config, directory
        self.name, self.state = config.name, "new"
        self.metadata: Dict[str, Any] = {}
        self.history: List[Dict[str, Any]] = []
        self.pid = self.host_pid = 0
        self.started_at = self.ended_at = 0.0
        self.exit_status: Optional[int] = None
        self.signal: Optional[int] = None
        self.watchers: List[Callable[[Dict[str, Any]], None]] = []
        self._family = family_of(config.arguments())
        self._link = Link(0, "", config.buffer_bytes, self._take, self._lost)
        self._running: Optional[_Running] = None
        self._cutting: Optional["asyncio.Task[None]"] = None
        self._carry = b""
        self._turn, self._prompt, self._over = asyncio.Lock(), asyncio.Event(), asyncio.Event()

    # -- its life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the program; for a shell, wait until it takes commands."""
        if self.state != "new":
            raise SessionError(f"session {self.name} was started already")
        self._link.secret = secrets.token_hex(16)
        quiet = QUIET if self._family else {}
        order = {"argv": self.config.arguments(), "cwd": self.config.cwd, "rows": self.config.rows,
                 "columns": self.config.columns,
                 "env": dict({"TERM": "xterm-256color"}, **quiet, **self.config.env),
                 "cast": self.config.cast and os.path.abspath(self.config.cast),
                 "secret": self._link.secret, "buffer_bytes": self.config.buffer_bytes,
                 "directory": os.path.abspath(self.directory)}
        loop = asyncio.get_running_loop()
        told = await loop.run_in_executor(None, _start_host, order)
        if "error" in told:
            raise SessionError(f"session {self.name} cannot start: {told['error']}")
        self.pid, self.host_pid, self._link.port = told["pid"], told["host"], told["port"]
        self.started_at, self.state = time.time(), "running"
        self._save()
        await self._link.connect()
        if self._family:
            await self._prepare_shell()

    async def _prepare_shell(self) -> None:
        mark = secrets.token_hex(8)
        line = _INIT.get(self._family, _POSIX).format(mark=mark)
        self._running = _Running(mark, 65_536)
        await self.send_input(" " + line + "\n")
        try:
            await asyncio.wait_for(asyncio.shield(self._running.done), START_SECONDS)
        except asyncio.TimeoutError:
            raise SessionError(f"session {self.name}: {' '.join(self.config.arguments())} "
                               f"shows no prompt after {START_SECONDS} s; "
                               f"its screen: {(await self.read_output())[-300:]!r}") from None
        finally:
            self._running = None

    async def attach(self) -> bool:
        """Connect to a session that another manager started. False when it is not there any
        more."""
        try:
            await self._link.connect()
        except Link.trouble:
            self._ended(None)
            return False
        self.state = "running"
        return True

    async def _lost(self, told: Optional[Dict[str, Any]]) -> None:
        # the host was killed: what ignores the hang-up that follows is ended here
        if told is None and not WINDOWS:
            signal_begun(self.pid, signal.SIGKILL)
        await _reaped(self.host_pid)
        self._ended(told)

    def _take(self, data: bytes) -> None:
        seen = self._carry + data
        if b"\x1b]7773" in seen:
            for found in _MARK.finditer(seen):
                if found.group(2) == b"C":
                    self._prompt.clear()
                else:
                    self._prompt.set()
        self._carry = seen[-_MARK_BYTES:]
        if self._running:
            self._running.feed(data)
        self._tell({"event": "output", "data": data})

    def _tell(self, event: Dict[str, Any]) -> None:
        for watcher in list(self.watchers):
            watcher(dict(event, session=self.name))

    def _ended(self, told: Optional[Dict[str, Any]]) -> None:
        """The session is over; ``told`` is what its host said last, or left in its directory."""
        if self.state == "terminated":
            return
        told = told or _read_json(os.path.join(self.directory, "exit.json")) or {}
        self.state, self.ended_at = "terminated", told.get("ended_at") or time.time()
        self.exit_status, self.signal = told.get("exit_status"), told.get("signal") or None
        if not self._link.tail.total:
            with contextlib.suppress(OSError), open(os.path.join(self.directory, "output"),
                                                    "rb") as file:
                self._link.tail.add(file.read())
        if self._running:
            self._running.end(None)
        self._over.set()
        self._prompt.set()
        self._save()
        self._tell({"event": "terminated", "exit_status": self.exit_status, "signal": self.signal})

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Hang the session up; what still runs after ``grace`` seconds is killed. Nothing when it
        is over already."""
        if self.state == "running":
            await self._send(b"k", json.dumps({"grace": grace}).encode())
            try:
                await asyncio.wait_for(self._over.wait(), grace + 10)
            except asyncio.TimeoutError:
                raise SessionError(
                    f"session {self.name} does not end (process {self.pid})") from None

    async def wait(self, timeout: Optional[float] = None) -> Optional[int]:
        """Wait until the session is over; its exit status, None when it has none.
        asyncio.TimeoutError."""
        await asyncio.wait_for(self._over.wait(), timeout)
        return self.exit_status

    async def detach(self) -> None:
        """Let go of the session, which goes on."""
        await self._link.close()

    # -- its terminal ------------------------------------------------------------------------------

    async def _send(self, kind: bytes, data: bytes) -> None:
        if self.state != "running":
            raise SessionError(f"session {self.name} is {self.state}")
        await self._link.send(kind, data)

    async def send_input(self, data: Union[str, bytes]) -> None:
        """Type something: "\\n" is the enter key, "\\x03" control-C."""
        await self._send(b"i", data.encode() if isinstance(data, str) else bytes(data))

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal; the program is told (SIGWINCH)."""
        self.config = dataclasses.replace(self.config, rows=rows, columns=columns)
        await self._send(b"w", json.dumps({"rows": rows, "columns": columns}).encode())
        self._save()

    async def raw_output(self, last: Optional[int] = None) -> bytes:
        """The last output as it was written: at most ``last`` bytes, and what the buffer holds."""
        return self._link.tail.last(last)

    async def read_output(self, last: Optional[int] = None) -> str:
        """The last output as text without control sequences: the screen and what has scrolled off
        it, of at most the last 256 KB."""
        return await self._clean(self._readable(self._link.tail.last(last)))

    def _readable(self, data: bytes) -> bytes:
        """Output where a command stands as it was given, not as what was typed to run it."""
        given = {entry["mark"].encode(): entry["command"] for entry in self.history}
        if self._running:
            given[self._running.mark] = self._running.command

        def command(found: "re.Match[bytes]") -> bytes:
            return given.get(found.group(1), "").replace("\n", "\r\n").encode() + b"\r\n"

        return _TYPED.sub(command, _PREPARED.sub(b"", data))

    async def _clean(self, data: bytes, keep_lines: bool = False) -> str:
        def work() -> str:
            return clean_text(
                data, rows=self.config.rows, columns=self.config.columns, keep_lines=keep_lines)
        if len(data) < 4096:
            return work()
        return await asyncio.get_running_loop().run_in_executor(None, work)

    # -- commands ----------------------------------------------------------------------------------

    async def execute(self, command: str, timeout: Optional[float] = None) -> ExecuteResult:
        """Run a command in the session's shell and wait for its end; what it changes there
        (directory, variables) stays. Commands of one session run one after the other. After
        ``timeout`` seconds (of its own run) its process groups are ended, and the shell with them
        where it does not come back."""
        if not self._family:
            raise SessionError(
                f"session {self.name} runs {self.config.arguments()[0]}, which takes no commands: "
                "use send_input and read_output")
        if not isinstance(command, str) or not command.strip() or "\0" in command:
            raise ValueError("a command is a text that is not empty")
        seconds = self.config.timeout if timeout is None else timeout
        async with self._turn:
            if self._cutting:  # a command whose caller went away
                await self._cutting
                self._cutting = None
            if self.state != "running":
                raise SessionError(f"session {self.name} is {self.state}")
            try:
                await asyncio.wait_for(self._prompt.wait(), seconds)
            except asyncio.TimeoutError:
                return ExecuteResult(False, "", "the shell is busy with something else",
                                     int(seconds * 1000))
            mark = secrets.token_hex(8)
            result = await self._run(command, seconds, mark)
        done = {"command": command[:500], "exit_code": result.exit_code,
                "execution_time_ms": result.execution_time_ms}
        self.history = (self.history + [dict(done, mark=mark)])[-HISTORY:]
        self._save()
        self._tell(dict(done, event="executed"))
        return result

    async def _run(self, command: str, seconds: float, mark: str) -> ExecuteResult:
        ending = ".ps1" if self._family == "pwsh" else ""
        file = os.path.join(os.path.abspath(self.directory), f"command-{mark}{ending}")
        write_private(file, command.encode() + b"\n")
        running = self._running = _Running(mark, self.config.buffer_bytes, command)
        line = _RUN.get(self._family, _POSIX_RUN).format(mark=mark, file=shlex.quote(file))
        began, since, late = time.monotonic(), this_moment(), False
        try:
            await self.send_input(line + "\n")
            await asyncio.wait({running.done}, timeout=seconds)
            late = not running.done.done()
            took = time.monotonic() - began
            if late:
                await self._cut_short(running, since)
        except asyncio.CancelledError:
            self._cutting = asyncio.get_running_loop().create_task(self._cut_short(running, since))
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
        self._running = None
        status = running.done.result() if running.done.done() else None
        output = await self._clean(bytes(running.output) if running.began else b"", keep_lines=True)
        ended = ", and the shell with it" if self.state != "running" else ""
        if late:
            error = f"timed out after {int(seconds * 1000)} ms: its process group was ended{ended}"
        elif status is None:
            code = f"signal {self.signal}" if self.signal else f"exit status {self.exit_status}"
            error, status = f"the shell ended ({code})", self.exit_status
        else:
            error = f"exit status {status}" if status else ""
        truncated = running.truncated or len(running.output) > CLEAN_BYTES
        return ExecuteResult(not error, output, error, int(took * 1000),
                             None if late else status, truncated)

    async def _cut_short(self, running: _Running, since: Moment) -> None:
        """End what a command has started: asked first, then killed; if the shell stays away, it
        goes too."""
        if WINDOWS:
            await self.send_input("\x03")
            await asyncio.wait({running.done}, timeout=GRACE_SECONDS)
        else:
            for number, patience in ([(signal.SIGINT, 0.3), (signal.SIGTERM, 0.5)]
                                     + [(signal.SIGKILL, 0.2)] * 8):
                if self.state != "running" or running.done.done():
                    break
                signal_begun(self.pid, number, since=since)
                if number != signal.SIGTERM:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.pid, signal.SIGINT)
                await asyncio.wait({running.done}, timeout=patience)
        if not running.done.done():
            await self.stop(0)
        elif self.state == "running" and not WINDOWS:
            until = time.monotonic() + GRACE_SECONDS
            while begun_in_session(self.pid, since=since) and time.monotonic() < until:
                signal_begun(self.pid, signal.SIGKILL, since=since)
                await asyncio.sleep(0.02)
            await self._new_prompt()

    async def _new_prompt(self) -> None:
        """Let the shell say now which of its jobs were ended, not in the middle of the next
        command."""
        waiting = _Running(secrets.token_hex(8), 65_536)
        self._running = waiting
        line = _MARK_LINE.get(self._family, " __so={mark}").format(mark=waiting.mark.decode())
        await self.send_input(line + "\n")
        await asyncio.wait({waiting.done}, timeout=GRACE_SECONDS)

    # -- what is known of it -----------------------------------------------------------------------

    async def status(self) -> Dict[str, Any]:
        """What can be said now: ``status`` is "running" or "terminated"; times are seconds since
        1970; what is not known is None."""
        busy = self.state == "running" and bool(self._family) and not self._prompt.is_set()
        return {"name": self.name, "status": self.state, "busy": busy, "role": self.config.role,
                "command": self.config.arguments(), "cwd": self.config.cwd,
                "directory": self._directory_now(),
                "rows": self.config.rows, "columns": self.config.columns, "pid": self.pid,
                "started_at": self.started_at, "ended_at": self.ended_at or None,
                "exit_status": self.exit_status,
                "signal": self.signal, "output_bytes": self._link.tail.total,
                "commands": len(self.history), "metadata": dict(self.metadata)}

    def _directory_now(self) -> Optional[str]:
        if self.state != "running":
            return None
        try:
            return os.readlink(f"/proc/{self.pid}/cwd")
        except OSError:
            return None

    async def set_metadata(self, key: str, value: Any) -> None:
        """Keep a value that JSON can hold; None takes the key away. TypeError otherwise."""
        json.dumps(value)
        if value is None:
            self.metadata.pop(key, None)
        else:
            self.metadata[key] = value
        self._save()

    async def get_ai_context(self, characters: int = 4000) -> Dict[str, Any]:
        """What an agent that takes over needs to know: role, directory, the last commands and how
        they ended, the last ``characters`` of clean output, metadata."""
        state = await self.status()
        text = await self.read_output(8 * characters)
        commands = [{key: entry[key] for key in entry if key != "mark"} for entry in self.history]
        return {"name": self.name, "role": self.config.role, "status": self.state,
                "busy": state["busy"], "directory": state["directory"] or self.config.cwd,
                "shell": " ".join(self.config.arguments()), "recent_commands": commands,
                "recent_output": text[-characters:], "metadata": dict(self.metadata)}

    async def events(self) -> AsyncIterator[Dict[str, Any]]:
        """What happens from now on, until the session is over: ``output`` (bytes in ``data``),
        ``executed``, ``terminated``. Who falls 1,000 events behind misses the next ones."""
        queue: "asyncio.Queue[Dict[str, Any]]" = asyncio.Queue(1000)

        def put(event: Dict[str, Any]) -> None:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(event)

        self.watchers.append(put)
        try:
            while self.state == "running" or not queue.empty():
                event = await queue.get()
                yield event
                if event["event"] == "terminated":
                    return
        finally:
            self.watchers.remove(put)

    # -- on disk -----------------------------------------------------------------------------------

    def _save(self) -> None:
        if os.path.isdir(self.directory):  # it is gone when the session was removed
            config = dict(dataclasses.asdict(self.config), env=sorted(self.config.env))
            state = {"config": config, "pid": self.pid, "host": self.host_pid,
                     "port": self._link.port,
                     "secret": self._link.secret, "started_at": self.started_at,
                     "metadata": self.metadata, "history": self.history}
            write_private(os.path.join(self.directory, "state.json"), json.dumps(state).encode())

    @classmethod
    def load(cls, directory: str) -> "AISession":
        """The session that was kept in a directory, not attached yet. SessionError when its state
        cannot be read."""
        state = _read_json(os.path.join(directory, "state.json"))
        try:
            kept = {key: value for key, value in state["config"].items() if key != "env"}
            session = cls(SessionConfig(**kept), directory)
            session.pid, session.host_pid, session.started_at = (
                state["pid"], state["host"], state["started_at"])
            session._link.port, session._link.secret = state["port"], state["secret"]
            session.metadata, session.history = state["metadata"], state["history"]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise SessionError(
                f"{directory} holds no session that can be read: {error!r}") from None
        return session


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _start_host(order: Dict[str, Any]) -> Dict[str, Any]:
    # detached, own group
    flags: Dict[str, Any] = ({"creationflags": 0x00000208} if WINDOWS
                             else {"start_new_session": True})
    process = subprocess.Popen(
        [sys.executable, HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **flags)
    assert process.stdin is not None and process.stdout is not None
    _hosts.append(process)
    with process.stdin as given, process.stdout as told:
        given.write(json.dumps(order).encode())
        given.close()
        line = told.readline()
    try:
        return dict(json.loads(line), host=process.pid)
    except ValueError:
        return {"error": f"its host ended with status {process.wait()}"}


async def _reaped(pid: int) -> None:
    """Reap the hosts that have ended, that one in any case (it is about to end)."""
    for _ in range(200):
        for process in list(_hosts):
            if process.poll() is not None:
                _hosts.remove(process)
        if all(process.pid != pid for process in _hosts):
            return
        await asyncio.sleep(0.01)


# ============================================================================
# All of them
# ============================================================================


def directory_of(given: Optional[str] = None) -> str:
    """Where sessions are kept, made if need be."""
    home = (os.environ.get("SESSIONOPTIMIZER_HOME")
            or os.path.join(os.path.expanduser("~"), ".sessionoptimizer"))
    directory = os.path.abspath(given or os.path.join(home, "agent-sessions"))
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory


class SessionManager:
    """The sessions of one directory (default: ``agent-sessions`` in SessionOptimizer's store), by
    name. Leaving it, or its program, leaves them running."""

    def __init__(self, directory: Optional[str] = None):
        self.directory = directory_of(directory)
        self.watchers: List[Callable[[Dict[str, Any]], None]] = []
        self._sessions: Dict[str, AISession] = {}
        self._locks: Dict[str, Any] = {}  # made where a loop runs: Python 3.8 binds them to it

    async def __aenter__(self) -> "SessionManager":
        await self.list_sessions()
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def _lock(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._locks:
            self._locks[name] = make()
        return self._locks[name]

    def _place(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _tell(self, event: Dict[str, Any]) -> None:
        for watcher in list(self.watchers):
            watcher(event)

    def _watch(self, session: AISession) -> AISession:
        session.watchers.append(self._tell)
        self._sessions[session.name] = session
        return session

    async def create_session(self, config: SessionConfig) -> AISession:
        """Start a session. SessionError when the name is taken or it cannot start."""
        place = self._place(config.name)
        with contextlib.suppress(OSError):  # of a manager that was killed while it started one
            if (not os.path.exists(os.path.join(place, "state.json"))
                    and time.time() - os.stat(place).st_mtime > ABANDONED):
                shutil.rmtree(place)
        try:
            os.mkdir(place, 0o700)
        except FileExistsError:
            raise SessionError(f"there is a session {config.name} already") from None
        session = self._watch(AISession(config, self._place(config.name)))
        try:
            async with self._lock("start", lambda: asyncio.Semaphore(STARTS_AT_ONCE)):
                await session.start()
        except BaseException:
            await self.remove_session(config.name)
            raise
        self._tell({"event": "created", "session": config.name})
        return session

    async def restore_session(self, name: str) -> AISession:
        """The session of this name, attached where it still runs, else ``terminated`` with what is
        known of its end. UnknownSession when there is none."""
        async with self._lock("restore", asyncio.Lock):
            known = self._sessions.get(name)
            if known is not None:
                return known
            if (not _NAME.fullmatch(name)
                    or not os.path.isfile(os.path.join(self._place(name), "state.json"))):
                raise UnknownSession(f"there is no session {name}")
            session = AISession.load(self._place(name))
            await session.attach()
            return self._watch(session)

    async def get_session(self, name: str) -> Optional[AISession]:
        """The session of this name, restored if need be; None when there is none."""
        try:
            return await self.restore_session(name)
        except UnknownSession:
            return None

    async def list_sessions(self) -> List[AISession]:
        """All sessions, in the order of their names. One that cannot be read is left out."""
        found = []
        for name in sorted(os.listdir(self.directory)):
            with contextlib.suppress(SessionError):
                found.append(await self.restore_session(name))
        return found

    async def remove_session(self, name: str) -> bool:
        """End a session and forget it, its files included (not its recording). False when there is
        none."""
        session = self._sessions.get(name) or await self.get_session(name)
        if session is None:
            return False
        await session.stop()
        await session.detach()
        self._sessions.pop(name, None)
        shutil.rmtree(self._place(name), ignore_errors=True)
        self._tell({"event": "removed", "session": name})
        return True

    async def cleanup_terminated(self) -> List[str]:
        """Remove what is over; the names."""
        over = [session.name for session in await self.list_sessions()
                if session.state == "terminated"]
        for name in over:
            await self.remove_session(name)
        return over

    async def close(self) -> None:
        """Let go of all sessions; they go on."""
        for session in list(self._sessions.values()):
            await session.detach()
        self._sessions.clear()
