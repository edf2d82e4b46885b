"""The talk between a session and the host of its terminal (host.py), and the session's side.

A message is a letter, four bytes of length and that many bytes. To the host: ``i`` input, ``w``
window size, ``k`` end the session. From it: ``h`` hello, ``o`` output, ``x`` the exit. Before that
each side proves that it knows the session's secret, which is never said: the port may belong to
somebody else by now.
"""
from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import struct
from typing import Any, Awaitable, Callable, Dict, Optional, Tuple

NONCE_BYTES = 16
MAX_MESSAGE = 16 * 1024 * 1024
SECONDS = 5  # for each step of a connection


def proof(secret: str, side: bytes, nonce: bytes) -> bytes:
    """What only somebody who knows the secret can answer to a nonce."""
    return hmac.new(secret.encode(), side + nonce, hashlib.sha256).digest()


def packed(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">I", len(data)) + data


async def read_message(reader: asyncio.StreamReader) -> Tuple[bytes, bytes]:
    """The next message; asyncio.IncompleteReadError at the end, ConnectionError for one that is too
    long."""
    kind, size = struct.unpack(">cI", await reader.readexactly(5))
    if size > MAX_MESSAGE:
        raise ConnectionError(f"a message of {size} bytes")
    return kind, await reader.readexactly(size)


class Tail:
    """The last ``limit`` bytes of a stream, and how many went through."""

    def __init__(self, limit: int):
        self.limit, self.total = limit, 0
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        self._data += data
        if len(self._data) > 2 * self.limit:
            del self._data[:-self.limit]

    def last(self, count: Optional[int] = None) -> bytes:
        count = self.limit if count is None else min(count, self.limit)
        return bytes(self._data[-count:]) if count > 0 else b""


class Link:
    """A session's connection to its host. ``take`` gets what the terminal shows, first what it has
    shown of late; ``over`` is called once, with what the host said of the end, or None where it
    said nothing."""

    trouble = (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError)  # what connect raises

    def __init__(self, port: int, secret: str, limit: int, take: Callable[[bytes], None],
                 over: Callable[[Optional[Dict[str, Any]]], Awaitable[None]]):
        self.port, self.secret, self.tail = port, secret, Tail(limit)
        self._take, self._over = take, over
        self._writer: Optional[asyncio.StreamWriter] = None
        self._listening: Optional["asyncio.Task[None]"] = None

    async def connect(self) -> None:
        """ConnectionError when who answers is not the session's host; see ``trouble`` for when
        nobody does."""
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", self.port), SECONDS)
        try:
            nonce = os.urandom(NONCE_BYTES)
            writer.write(nonce)
            answer = await asyncio.wait_for(reader.readexactly(32 + NONCE_BYTES), SECONDS)
            if not hmac.compare_digest(answer[:32], proof(self.secret, b"host", nonce)):
                raise ConnectionError(f"port {self.port} is not this session's any more")
            writer.write(proof(self.secret, b"client", answer[32:]))
            _, hello = await asyncio.wait_for(read_message(reader), SECONDS)
            _, shown = await asyncio.wait_for(read_message(reader), SECONDS)
        except BaseException:
            writer.close()
            raise
        self.tail = Tail(self.tail.limit)
        self.tail.total = json.loads(hello)["total"] - len(shown)
        self._writer = writer
        self._show(shown)
        self._listening = asyncio.get_running_loop().create_task(self._listen(reader))

    def _show(self, data: bytes) -> None:
        self.tail.add(data)
        self._take(data)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        told: Optional[Dict[str, Any]] = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while told is None:
                kind, data = await read_message(reader)
                if kind == b"o":
                    self._show(data)
                elif kind == b"x":
                    told = json.loads(data)
        if self._writer:
            self._writer.close()
        if told is None:
            with contextlib.suppress(*self.trouble):
                return await self.connect()  # it was let go because it fell behind
        await self._over(told)

    async def send(self, kind: bytes, data: bytes) -> None:
        """Send a message. Nothing when the host has gone: ``over`` is on its way then."""
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):
                self._writer.write(packed(kind, data))
                await self._writer.drain()

    async def close(self) -> None:
        """Let go; the host goes on."""
        if self._listening:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        if self._writer:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
