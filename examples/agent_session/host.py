#!/usr/bin/env python3
"""The process that holds one session's terminal, which so outlives the program that made it.

Started by session.py with an order (JSON) on standard input, answers with one JSON line
(``{"port", "pid"}`` or ``{"error"}``) and goes on alone: it reads the terminal, keeps the last
output, records, and serves whoever proves that it knows the session's secret, on loopback. It ends
with its command, and leaves ``exit.json`` and the last output in the session's directory.

link.py is the other side, and says what a message is.
"""
from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import json
import os
import signal
import sys
import threading
import time
from typing import Any, Dict, Optional, Set

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from agent_session.link import NONCE_BYTES, Tail, packed, proof, read_message  # noqa: E402
from agent_session.terminal import (  # noqa: E402
    CLEAN_BYTES, WINDOWS, Cast, exit_of, release, signal_begun, signal_groups, spawn, write_private)

CHUNK = 65_536
MAX_BEHIND = 4 * 1024 * 1024  # bytes that wait for a listener before the terminal waits too
PATIENCE = 10  # seconds; then the listener is let go


class Host:
    """One terminal, its output and those who listen."""

    def __init__(self, order: Dict[str, Any]):
        self.order, self.secret = order, order["secret"]
        self.tail = Tail(order["buffer_bytes"])
        self.listeners: Set[asyncio.StreamWriter] = set()
        self.typed = bytearray()
        self.stopping = False
        self.exit: Optional[Dict[str, Any]] = None
        self.cast: Optional[Cast] = None
        env = dict(os.environ, **order["env"])
        self.terminal = spawn(
            order["argv"], cwd=order["cwd"], env=env, rows=order["rows"], columns=order["columns"])
        if order.get("cast"):
            self.cast = Cast(order["cast"], rows=order["rows"], columns=order["columns"],
                             command=order["argv"], env=env)
        if not WINDOWS:
            os.set_blocking(self.terminal.fd, False)

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        print(json.dumps({"port": server.sockets[0].getsockname()[1], "pid": self.terminal.pid}),
              flush=True)
        _let_go_of_output()
        ended = self.loop.create_task(self._wait())
        await self._pump(ended)
        self.exit = dict(await ended, ended_at=time.time(), bytes=self.tail.total)
        self._leave()
        for writer in list(self.listeners):
            writer.write(packed(b"x", json.dumps(self.exit).encode()))
            with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.drain(), 2)
            writer.close()
        server.close()

    # -- the terminal ------------------------------------------------------------------------------

    async def _wait(self) -> Dict[str, int]:
        """The exit of the command, once it has one."""
        if WINDOWS:
            while self.terminal.isalive():
                await asyncio.sleep(0.1)
            return {"exit_status": self.terminal.exitstatus or 0, "signal": 0}
        changed = asyncio.Event()
        self.loop.add_signal_handler(signal.SIGCHLD, changed.set)
        while True:
            pid, status = os.waitpid(self.terminal.pid, os.WNOHANG)
            if pid:
                exit_status, number = exit_of(status)
                return {"exit_status": exit_status, "signal": number}
            await changed.wait()
            changed.clear()

    async def _pump(self, ended: "asyncio.Task[Dict[str, int]]") -> None:
        """Hand on output until the terminal is closed, or the command has ended and nothing more
        comes at once. A listener that falls behind slows the terminal down for a while, as a slow
        screen does."""
        chunks: "asyncio.Queue[bytes]" = asyncio.Queue(8)
        if WINDOWS:
            threading.Thread(target=self._read_windows, args=(chunks,), daemon=True).start()
        while True:
            data = await (chunks.get() if WINDOWS else self._read(ended))
            if not data:
                return
            self.tail.add(data)
            if self.cast:
                self.cast.output(data)
                self.cast.flush()
            message = packed(b"o", data)
            for writer in list(self.listeners):
                writer.write(message)
                if writer.transport.get_write_buffer_size() > MAX_BEHIND:
                    await self._caught_up(writer)

    async def _caught_up(self, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.wait_for(writer.drain(), PATIENCE)
        except (ConnectionError, asyncio.TimeoutError):
            # it may come back, and gets what the tail holds
            self.listeners.discard(writer)
            writer.transport.abort()

    async def _read(self, ended: "asyncio.Task[Dict[str, int]]") -> bytes:
        descriptor = self.terminal.fd
        while True:
            try:
                return os.read(descriptor, CHUNK)
            except BlockingIOError:
                pass
            except OSError as error:  # Linux says EIO when the other side is closed
                if error.errno == errno.EIO:
                    return b""
                raise
            readable = self.loop.create_future()
            self.loop.add_reader(descriptor, _wake, readable)
            try:
                # others may hold the terminal open: what they write later is not the command's
                if ended.done():
                    await asyncio.wait_for(readable, 0.1)
                else:
                    await asyncio.wait({readable, ended}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.TimeoutError:
                return b""
            finally:
                self.loop.remove_reader(descriptor)

    def _read_windows(self, chunks: "asyncio.Queue[bytes]") -> None:
        while True:
            try:
                data = self.terminal.read(CHUNK).encode("utf-8", "replace")
            except EOFError:
                data = b""
            asyncio.run_coroutine_threadsafe(chunks.put(data), self.loop).result()
            if not data:
                return

    def _type(self) -> None:
        """Write what was typed, as far as the terminal takes it now."""
        if WINDOWS:
            self.terminal.write(self.typed.decode("utf-8", "replace"))
            return self.typed.clear()
        try:
            while self.typed:
                del self.typed[:os.write(self.terminal.fd, self.typed[:CHUNK])]
        except BlockingIOError:
            return self.loop.add_writer(self.terminal.fd, self._type)
        except OSError:  # nobody is there to read it
            self.typed.clear()
        self.loop.remove_writer(self.terminal.fd)

    def _leave(self) -> None:
        """Close the terminal, which hangs up what still runs in it, and keep what is worth
        keeping."""
        if not WINDOWS:
            if self.stopping:
                signal_begun(self.terminal.pid, signal.SIGKILL)
            release(self.terminal)
        if self.cast:
            self.cast.close()
        directory = self.order["directory"]
        if os.path.isdir(directory):  # it is gone when the session was removed
            write_private(os.path.join(directory, "output"), self.tail.last(CLEAN_BYTES))
            write_private(os.path.join(directory, "exit.json"), json.dumps(self.exit).encode())

    # -- listeners ---------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await asyncio.wait_for(self._proved(reader, writer), 5):
                self.listeners.add(writer)
                writer.write(packed(b"h", json.dumps({"total": self.tail.total}).encode())
                             + packed(b"o", self.tail.last()))
                while True:
                    self._obey(*await read_message(reader))
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, ConnectionError):
            pass
        finally:
            self.listeners.discard(writer)
            writer.close()

    async def _proved(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Both sides know the secret; neither has said it."""
        theirs, ours = await reader.readexactly(NONCE_BYTES), os.urandom(NONCE_BYTES)
        writer.write(proof(self.secret, b"host", theirs) + ours)
        return hmac.compare_digest(await reader.readexactly(32),
                                   proof(self.secret, b"client", ours))

    def _obey(self, kind: bytes, data: bytes) -> None:
        if kind == b"i":
            self.typed += data
            self._type()
        elif kind == b"w":
            size = json.loads(data)
            self.terminal.setwinsize(size["rows"], size["columns"])
            if self.cast:
                self.cast.resized(size["rows"], size["columns"])
        elif kind == b"k":
            self._end(json.loads(data)["grace"])

    def _end(self, grace: float) -> None:
        if WINDOWS:
            return self.terminal.terminate(True)
        self.stopping = True
        for number in (signal.SIGHUP, signal.SIGCONT):
            self._signal_all(number)
        self.loop.call_later(grace, self._signal_all, signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        signal_begun(self.terminal.pid, number)
        if self.exit is None:
            signal_groups([self.terminal.pid], number)


def _wake(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


def _let_go_of_output() -> None:
    """Who started this may close its end."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def main() -> int:
    order = json.loads(sys.stdin.buffer.read())
    if not WINDOWS:
        for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal it was started from
            signal.signal(number, lambda *_: None)
    try:
        host = Host(order)
    except (OSError, ImportError, ValueError) as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        return 1
    asyncio.run(host.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
