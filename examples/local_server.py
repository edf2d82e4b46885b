"""An HTTP server that is safe on a desk: a page, its API, a stream of events. For dashboard.py.

It answers GET and HEAD. It refuses pages of other sites (Host, Origin and Sec-Fetch-Site are
checked, which also stops DNS rebinding), asks for a token where it has one, lets the page run its
own script and style and nothing else. Errors are JSON, ``{"error": text}``.

Connections cost no thread: one loop waits for all of them, and a few workers make the answers. What
a client can take is bounded: the size of a request, the time to send it and to take its answer, the
number of connections and of event streams. Where there are too many, the one that has kept the
server waiting longest is closed for a new one, so clients that are slow or hostile shut out none
that is not.
"""
import asyncio
import base64
import hashlib
import hmac
import io
import json
import re
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from urllib.parse import unquote

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS, MAX_STREAMS = 128, 32  # of these, event streams: one per open page
MAX_HEAD, MAX_TARGET = 16_384, 2_048  # bytes of a request; characters of its path and query
MAX_WAITING = 32  # requests that wait for a long answer
# to send a request once begun; between two on one connection
REQUEST_SECONDS, IDLE_SECONDS = 10, 30
TAKE_SECONDS = 10  # for a client to take its answer
# bytes the system holds for one that does not: nothing more is made for it meanwhile
SEND_BUFFER = 65_536
POLL_SECONDS, KEEP_ALIVE_SECONDS = 1, 15  # of an event stream: looks at the state, signs of life
JSON = "application/json"
GONE = (OSError, EOFError, asyncio.TimeoutError)  # what a client that goes, or is too slow, raises


class Refused(Exception):
    """A request that gets an error instead of an answer: status, message and, at need, a dict of
    headers."""


def same(given, wanted):
    """Whether two secrets are equal, in a time that tells nothing of them."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))


def tag_of(data):
    """An ETag for these bytes."""
    return f'"{hashlib.sha256(data).hexdigest()[:24]}"'


class LocalServer:
    """Serves a page and what a subclass answers, until ``shutdown`` (from any thread) or Ctrl-C."""

    def __init__(self, page, *, host="127.0.0.1", port=8765, token=""):
        self.page, self.token, self.local = page, token, host in LOOPBACK
        self.names = (
            set(LOOPBACK) | (set() if self.local else {host.lower(), socket.gethostname().lower()}))
        hashes = [
            base64.b64encode(hashlib.sha256(re.search(tag, page, re.S).group(1)).digest()).decode()
            for tag in (b"<script>(.*?)</script>", b"<style>(.*?)</style>")]
        self.policy = (
            ("default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; "
             "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
             "require-trusted-types-for 'script'; trusted-types 'none'").format(*hashes))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=256)
        # its connections take it over
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.server_address = self.socket.getsockname()
        secret = hmac.new(token.encode(), b"cookie of this server", "sha256").hexdigest()
        self.cookie = f"dashboard_{self.server_address[1]}={secret}"
        self.connections, self.streams = [], []  # the oldest first
        self.workers, self.long_work = ThreadPoolExecutor(4), ThreadPoolExecutor(1)
        self.waiting = 0  # for long answers
        self._loop = self._end = None
        self._interrupted = False
        self._ended = threading.Event()

    def answer(self, path, query):
        """(media type, ETag, body) of a GET request; raises Refused. Called in a worker."""
        raise NotImplementedError

    def takes_long(self, path):
        """Whether an answer may take long: those wait for each other, and no other request waits
        for them."""
        return False

    def state(self, max_age):
        """(a number that grows with every change, seconds to wait before asking again); the number
        may be ``max_age`` seconds old. Called in a worker."""
        raise NotImplementedError

    def serve_forever(self):
        try:
            asyncio.run(self._serve())
        finally:
            self._ended.set()
        if self._interrupted:
            raise KeyboardInterrupt

    def shutdown(self):
        """End ``serve_forever`` in another thread."""
        deadline = time.monotonic() + 5
        while self._end is None and time.monotonic() < deadline:
            time.sleep(0.01)  # it has not begun yet
        self._loop.call_soon_threadsafe(self._end.set)
        self._ended.wait(10)

    def server_close(self):
        self.socket.close()
        for pool in (self.workers, self.long_work):
            pool.shutdown(wait=False)

    async def _serve(self):
        self._loop, end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(
            self._connected, sock=self.socket, limit=MAX_HEAD, backlog=256)
        self._end = end
        try:
            self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        except (NotImplementedError, RuntimeError, ValueError):
            pass  # Windows, or not the main thread: Ctrl-C comes as an exception
        try:
            await end.wait()
        finally:
            server.close()
            open_ones = list(self.connections)
            for connection in open_ones:
                connection.drop()
            await asyncio.gather(
                *(connection.task for connection in open_ones), return_exceptions=True)
            await asyncio.sleep(0)  # the transports end

    def _interrupt(self):
        self._interrupted = True
        self._end.set()

    def _connected(self, reader, writer):
        connection = Connection(self, reader, writer)
        if self._make_room():
            self.connections.append(connection)
            connection.task = self._loop.create_task(connection.run())
        else:
            connection.task = self._loop.create_task(connection.turn_away())

    def _make_room(self):
        """Close connections that keep the server waiting, the longest first; False where too many
        are at work."""
        while len(self.connections) >= MAX_CONNECTIONS:
            waiting = [connection for connection in self.connections
                       if connection.since is not None]
            if not waiting:
                return False
            min(waiting, key=lambda connection: connection.since).drop()
        return True


class Connection:
    """One client. ``since``: when the server began to wait for it, None while it waits for the
    server."""

    def __init__(self, server, reader, writer):
        self.server, self.reader, self.writer, self.since = server, reader, writer, time.monotonic()
        self.method, self.target, self.headers, self.keep = "", "", {}, False
        self.task = None  # which serves it
        writer.transport.set_write_buffer_limits(0)  # drained: the client's machine has it all

    async def run(self):
        """Answer one request after the other."""
        try:
            self.keep = True
            while self.keep:
                await self._serve_one()
        except GONE:
            pass
        finally:
            self.drop()

    async def turn_away(self):
        """Say that there is no room."""
        try:
            await self.refuse(503, "too many connections", {"Retry-After": "5"})
        except GONE:
            pass
        finally:
            self.drop()

    def drop(self):
        """Close the connection at once; its task ends."""
        for those in (self.server.connections, self.server.streams):
            if self in those:
                those.remove(self)
        self.keep = False
        if self.writer.transport.get_write_buffer_size():
            self.writer.transport.abort()  # the client does not take it
        else:
            self.writer.close()
        if self.task is not asyncio.current_task():
            self.task.cancel()

    async def _serve_one(self):
        try:
            head = await self._head()
            self.since, self.keep = None, self.keep and bool(head)
            if head:
                await self._answer(head)
        except Refused as refused:
            self.keep = False
            await self.refuse(*refused.args)
        except GONE:
            raise
        except Exception as error:  # what it is must be seen, and other clients go on
            traceback.print_exc(file=sys.stderr)
            await self.refuse(500, f"this request failed: {type(error).__name__}")

    async def _head(self):
        """The lines of the next request, bounded in size and, as a whole, in time; empty where none
        comes."""
        self.since, self.headers, self.method = time.monotonic(), {}, ""
        try:
            first = await asyncio.wait_for(self.reader.read(1), IDLE_SECONDS)
        except asyncio.TimeoutError:
            return b""
        try:
            return first + (first and await asyncio.wait_for(
                self.reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS))
        except asyncio.TimeoutError:
            raise Refused(408, "the request took too long") from None
        except asyncio.LimitOverrunError:
            raise Refused(431, f"a request has at most {MAX_HEAD:,} bytes") from None

    async def _answer(self, head):
        self._parse(head)
        path, _, query = self.target.partition("?")
        self._check_sender(path)
        if self.method not in ("GET", "HEAD"):
            raise Refused(405, f"only GET and HEAD, not {self.method}", {"Allow": "GET, HEAD"})
        server = self.server
        if path == "/health":
            return await self.send(200, JSON, b'{"status": "ok"}')
        if path == "/" and query.startswith("token=") and server.token:
            if not same(unquote(query[len("token="):]), server.token):
                raise Refused(401, "this is not the token", {"WWW-Authenticate": "Bearer"})
            cookie = f"{server.cookie}; Path=/; HttpOnly; SameSite=Strict"
            return await self.send(303, JSON, b"{}", {"Location": "/", "Set-Cookie": cookie})
        self._check_token()
        if path == "/api/events":
            return await self._stream()
        if path == "/":
            headers = {"ETag": tag_of(server.page), "Content-Security-Policy": server.policy}
            return await self.send(200, "text/html; charset=utf-8", server.page, headers)
        kind, etag, body = await self._work(path, query)
        return await self.send(200, kind, body, {"ETag": etag})

    async def _work(self, path, query):
        server, loop = self.server, asyncio.get_running_loop()
        if not server.takes_long(path):
            return await loop.run_in_executor(server.workers, server.answer, path, query)
        if server.waiting >= MAX_WAITING:
            raise Refused(503, "too many reports are asked for", {"Retry-After": "5"})
        server.waiting += 1
        try:
            return await loop.run_in_executor(server.long_work, server.answer, path, query)
        finally:
            server.waiting -= 1

    def _parse(self, head):
        lines = io.BytesIO(head)
        words = lines.readline().decode("latin-1").split()
        if len(words) != 3 or not re.fullmatch(r"HTTP/1\.[01]", words[2]):
            raise Refused(400, "not a request")
        self.method, self.target, version = words
        try:
            self.headers = parse_headers(lines)
        except HTTPException:
            raise Refused(431, "a request has at most 100 headers") from None
        wish = self.headers.get("Connection", "").lower()
        self.keep = (self.keep and wish != "close"
                     and (version == "HTTP/1.1" or wish == "keep-alive"))

    def _check_sender(self, path):
        """Refuse pages of other sites, also those whose name was made to lead here (DNS
        rebinding)."""
        if len(self.target) > MAX_TARGET:
            raise Refused(414, f"a path has at most {MAX_TARGET:,} characters")
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            raise Refused(400 if self.method in ("GET", "HEAD") else 405,
                          "a request has no body here", {"Allow": "GET, HEAD"})
        hosts = self.headers.get_all("Host", [])
        found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:@/\[\]]+)(:\d*)?",
                             hosts[0].lower() if hosts else "")
        if not found or len(hosts) > 1:
            raise Refused(400, "a request names one Host")
        name = found.group(1).strip("[]")
        # asks no DNS
        by_address = not self.server.local and (":" in name or re.fullmatch("[0-9.]+", name))
        if not by_address and name not in self.server.names:
            raise Refused(403, f"this server does not answer to the name {name!r}: use its address")
        # a link may lead there
        site = "none" if path == "/" else self.headers.get("Sec-Fetch-Site", "none")
        origins = (None, f"http://{hosts[0]}", f"https://{hosts[0]}")
        if self.headers.get("Origin") not in origins or site not in ("none", "same-origin"):
            raise Refused(403, "requests of other sites are refused")

    def _check_token(self):
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        cookies = [part.strip() for part in self.headers.get("Cookie", "").split(";")]
        if (self.server.token
                and not (kind.lower() == "bearer" and same(given.strip(), self.server.token)
                         or any(same(cookie, self.server.cookie) for cookie in cookies))):
            raise Refused(
                401, "a token is needed: open /?token=TOKEN once or send Authorization: Bearer",
                {"WWW-Authenticate": "Bearer"})

    async def _stream(self):
        """Server-sent events: the number of the state, now and whenever it changes, until the
        client goes."""
        server, loop = self.server, asyncio.get_running_loop()
        if len(server.streams) >= MAX_STREAMS:
            server.streams[0].drop()  # that page, if it is still one, comes back
        server.streams.append(self)
        self.keep = False
        await self.send(200, "text/event-stream; charset=utf-8", None)
        closed = asyncio.ensure_future(self.reader.read(1))
        sent, spoke = None, time.monotonic()
        try:
            while self.method != "HEAD" and not closed.done():
                number, wait = await loop.run_in_executor(server.workers, server.state,
                                                          POLL_SECONDS * 0.9)
                text = ": still here\n\n" if time.monotonic() - spoke > KEEP_ALIVE_SECONDS else ""
                if number != sent:
                    text = (f'retry: 2000\nid: {number}\nevent: change\n'
                            f'data: {{"version": {number}}}\n\n')
                if text:
                    await self._write(text.encode())
                    sent, spoke = number, time.monotonic()
                pause = max(POLL_SECONDS, min(wait, KEEP_ALIVE_SECONDS))
                await asyncio.wait({closed}, timeout=pause)
        finally:
            closed.cancel()

    async def _write(self, data):
        self.writer.write(data)
        self.since = time.monotonic() if self not in self.server.streams else None
        await asyncio.wait_for(self.writer.drain(), TAKE_SECONDS)

    async def send(self, status, kind, body, headers=None):
        """Write an answer; ``body`` None for none (a stream follows, or there is none)."""
        headers = dict({
            "Content-Type": kind, "Cache-Control": "private, no-cache",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"},
            **headers or {})
        if "ETag" in headers:
            known = self.headers.get("If-None-Match", "").split(",")
            if headers["ETag"] in [tag.strip().replace("W/", "") for tag in known]:
                status, body = 304, None
        if body is not None:
            headers["Content-Length"] = str(len(body))
        if not self.keep:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Server: SessionOptimizer",
                 *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        await self._write("\r\n".join(lines).encode("latin-1", "replace")
                          + (body if body and self.method != "HEAD" else b""))

    async def refuse(self, status, message, headers=None):
        await self.send(status, JSON, json.dumps({"error": message}).encode(), headers)
