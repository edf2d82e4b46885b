"""A command in a pseudo terminal, and what can be said of its output: clean text, a recording.

POSIX by ptyprocess, Windows by pywinpty (written to its documentation, not tested there).
"""
from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

WINDOWS = os.name == "nt"
CLEAN_BYTES = 256 * 1024  # of output, the last ones, that clean text is made of
EXTRA = "pip install 'sessionoptimizer[agents]'"


_OWN_SIGNALS = [getattr(signal, name) for name in (
    "SIGINT", "SIGQUIT", "SIGHUP", "SIGTERM", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGPIPE", "SIGXFSZ",
    "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT") if hasattr(signal, name)]


class MissingExtra(ImportError):
    """A package that is not installed; says which extra brings it."""

    def __init__(self, error: ImportError):
        super().__init__(f"{error.name or error} is not installed: {EXTRA}")


def spawn(argv: Sequence[str], *, cwd: str, env: Dict[str, str], rows: int, columns: int,
          attributes: Any = None, echo: bool = True) -> Any:
    """A ptyprocess.PtyProcess (winpty.PtyProcess on Windows) that runs ``argv``. ``attributes``:
    the terminal's, as termios.tcgetattr gives them. FileNotFoundError or PermissionError when it
    cannot be run; MissingExtra."""
    if WINDOWS:
        try:
            from winpty import PtyProcess
        except ImportError as error:
            raise MissingExtra(error) from None
        return PtyProcess.spawn(list(argv), cwd=cwd, env=env, dimensions=(rows, columns))
    try:
        from ptyprocess import PtyProcess
    except ImportError as error:
        raise MissingExtra(error) from None
    if not os.path.isdir(cwd):
        raise FileNotFoundError(f"there is no directory {cwd}")

    def prepare() -> None:  # in the child, before exec
        import termios
        # what this program ignores or handles is no business of the command
        for number in _OWN_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if attributes is not None:
            termios.tcsetattr(0, termios.TCSANOW, attributes)

    return PtyProcess.spawn(list(argv), cwd=cwd, env=env, echo=echo, dimensions=(rows, columns),
                            preexec_fn=prepare)


def release(terminal: Any) -> None:
    """Close our side of a terminal whose command has been reaped; what still runs in it is hung up
    by that."""
    terminal.fileobj.close()
    terminal.closed = True


def exit_of(wait_status: int) -> Tuple[int, int]:
    """(exit status, signal) of what os.waitpid returned; the one that does not apply is 0."""
    if os.WIFSIGNALED(wait_status):
        return 0, os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status), 0


# ============================================================================
# Clean text
# ============================================================================

_MOVES_NOTHING = re.compile(rb"\x1b\[[0-9;:]*m|\x1b\[\?(?:1|7|25|1004|2004|2026)[hl]|"
                            rb"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x07")
_CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")


def clean_text(data: bytes, *, rows: int = 24, columns: int = 80, keep_lines: bool = False) -> str:
    """What a terminal of this size shows after these bytes (of which the last 256 KB count), with
    what has scrolled off its top; trailing blanks are cut. With ``keep_lines`` a line longer than
    the terminal is wide stays one. Bytes that only colour go the short way; others through pyte
    (MissingExtra without it)."""
    data = _MOVES_NOTHING.sub(b"", data[-CLEAN_BYTES:]).replace(b"\r\n", b"\n")
    longest = max(map(len, data.split(b"\n")))
    if not _CONTROLS.search(data) and (keep_lines or longest <= columns and b"\t" not in data):
        lines = data.decode("utf-8", "replace").split("\n")
    else:
        width = max(columns, min(longest, 10_000)) if keep_lines else columns
        lines = _screen_lines(data.replace(b"\n", b"\r\n"), rows, width)
    return "\n".join(line.rstrip() for line in lines).rstrip("\n")


def _screen_lines(data: bytes, rows: int, columns: int) -> List[str]:
    try:
        import pyte
    except ImportError as error:
        raise MissingExtra(error) from None

    class Scrolled(pyte.Screen):
        """A screen that keeps the lines that leave it at the top."""

        def index(self) -> None:
            top, bottom = self.margins or (0, self.lines - 1)
            if self.cursor.y == bottom and top == 0:
                line = self.buffer[0]
                gone.append("".join(line[x].data for x in range(max(line, default=-1) + 1)))
            super().index()

    gone: List[str] = []
    screen = Scrolled(columns, rows)
    pyte.ByteStream(screen).feed(data)
    return gone + list(screen.display)


# ============================================================================
# Recording
# ============================================================================


class Cast:
    """A recording in asciicast v2: a header line, then ``[seconds, "o" or "r", text]`` per line.
    The file is for its owner alone, since a screen may show secrets. What was typed is not
    recorded."""

    def __init__(self, path: str, *, rows: int, columns: int, command: Sequence[str],
                 env: Dict[str, str]):
        self._file = os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8")
        self._began = time.monotonic()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        kept = {name: env[name] for name in ("SHELL", "TERM") if name in env}
        self._line({"version": 2, "width": columns, "height": rows, "timestamp": int(time.time()),
                    "command": " ".join(command), "env": kept})

    def _line(self, value: Any) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False) + "\n")

    def _event(self, kind: str, text: str) -> None:
        if text:
            self._line([round(time.monotonic() - self._began, 6), kind, text])

    def output(self, data: bytes) -> None:
        self._event("o", self._decoder.decode(data))

    def resized(self, rows: int, columns: int) -> None:
        self._event("r", f"{columns}x{rows}")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._event("o", self._decoder.decode(b"", True))
        self._file.close()


# ============================================================================
# Processes
# ============================================================================


class Moment(NamedTuple):
    """A point in time on the clock of `Process.started`."""

    seconds: float
    last_pid: int  # given to a process by then


BEGINNING = Moment(-1.0, 0)


class Process(NamedTuple):
    """One process. ``session`` is -1 and ``started`` 0 where the system does not tell."""

    pid: int
    parent: int
    group: int
    session: int
    foreground: int  # the process group its terminal listens to
    started: float  # seconds since boot
    zombie: bool


def processes() -> List[Process]:
    """All processes, from /proc; without one from ``ps``."""
    if not os.path.isdir("/proc/self"):
        told = subprocess.run(["ps", "-axo", "pid=,ppid=,pgid=,tpgid=,stat="],
                              stdout=subprocess.PIPE, text=True).stdout
        rows = (line.split() for line in told.splitlines())
        return [Process(int(row[0]), int(row[1]), int(row[2]), -1, int(row[3]), 0,
                        row[4].startswith("Z")) for row in rows if len(row) == 5]
    found = (process_of(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def process_of(pid: int) -> Optional[Process]:
    """A process from /proc; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return None
    if len(fields) < 20:
        return None
    parent, group, session, _, foreground = map(int, fields[1:6])
    return Process(pid, parent, group, session, foreground,
                   int(fields[19]) / os.sysconf("SC_CLK_TCK"), fields[0] == b"Z")


def this_moment() -> Moment:
    """Now. What begins later is greater: by its start, which is counted in hundredths, then by its
    process id."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None:
        return Moment(0.0, 0)
    with contextlib.suppress(OSError, ValueError,
                             IndexError), open("/proc/loadavg", encoding="ascii") as file:
        return Moment(int(time.clock_gettime(clock) * 100) / 100, int(file.read().split()[-1]))
    return Moment(int(time.clock_gettime(clock) * 100) / 100, 0)


def begun_in_session(leader: int, *, since: Moment = BEGINNING) -> List[Process]:
    """The processes of the terminal session ``leader`` leads, itself left out, that began after
    ``since``. Where the system tells no sessions: those its terminal listens to."""
    everything = processes()
    front = next((process.foreground for process in everything if process.pid == leader), 0)
    return [process for process in everything if process.pid != leader and not process.zombie
            and (process.session == leader or process.session < 0 and process.group == front)
            and (process.started, process.pid) > since]


def signal_begun(leader: int, number: int, *, since: Moment = BEGINNING) -> None:
    """Send a signal to the process groups that began in a session; of the leader's own group to
    those who began."""
    begun = begun_in_session(leader, since=since)
    signal_groups(sorted({process.group for process in begun} - {leader, 0}), number)
    for process in begun:
        if process.group == leader:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def signal_groups(groups: Sequence[int], number: int) -> None:
    """Send a signal to process groups; one that is gone, or is not ours any more, is passed
    over."""
    for group in groups:
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            continue


def write_private(path: str, data: bytes) -> None:
    """Replace a file that only its owner may read, in one step."""
    part = f"{path}.{os.getpid()}.part"
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.replace(part, path)
