"""A pass-through on loopback that reads the ``usage`` in the answers of model providers. record.py
uses it for agents whose own log cannot be read.

Requests and answers go on unchanged, but for the encoding (answers are asked for uncompressed) and
what belongs to one connection (RFC 9110, 7.6.1). Nothing is kept but the figures.
"""
from __future__ import annotations

import http.client
import json
import secrets
import ssl
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, Optional, Tuple
from urllib.parse import urlsplit

UPSTREAM = {  # variable that points an agent at a provider: where it points by itself
    "ANTHROPIC_BASE_URL": "https://api.anthropic.com",
    "OPENAI_BASE_URL": "https://api.openai.com/v1",
    "GOOGLE_GEMINI_BASE_URL": "https://generativelanguage.googleapis.com",
}
ENDINGS = {"/messages": "messages", "/responses": "responses", "/chat/completions": "chat",
           ":generateContent": "gemini", ":streamGenerateContent": "gemini"}
OF_ONE_CONNECTION = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "accept-encoding", "expect"}
# of a JSON answer that is looked into; a longer one passes and is estimated
MAX_ANSWER = 64 * 1024 * 1024
ANSWER_SECONDS = 3600
CHARACTERS_PER_TOKEN = 4


@dataclass
class Answer:
    """The tokens of one model call, classes disjoint; ``estimated`` when the provider's answer did
    not say them."""

    protocol: str
    model: str = ""
    id: str = ""
    uncached_input: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0  # the part of it at the one-hour price
    cache_read: int = 0
    output: int = 0
    duration_ms: int = 0
    estimated: bool = False
    at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())


def figures_of(protocol: str, usage: Dict[str, Any]) -> Dict[str, int]:
    """The disjoint classes of a provider's usage object. Cached input is part of the input
    everywhere but at Anthropic; thinking is part of the output everywhere but at Gemini."""
    def count(value: Any, *path: str) -> int:
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    if protocol == "messages":
        return {"uncached_input": count(usage, "input_tokens"),
                "cache_write": count(usage, "cache_creation_input_tokens"),
                "cache_write_1h": count(usage, "cache_creation", "ephemeral_1h_input_tokens"),
                "cache_read": count(usage, "cache_read_input_tokens"),
                "output": count(usage, "output_tokens")}
    if protocol == "responses":
        cached = count(usage, "input_tokens_details", "cached_tokens")
        return {"uncached_input": max(0, count(usage, "input_tokens") - cached),
                "cache_read": cached, "output": count(usage, "output_tokens")}
    if protocol == "chat":
        cached = count(usage, "prompt_tokens_details", "cached_tokens")
        return {"uncached_input": max(0, count(usage, "prompt_tokens") - cached),
                "cache_read": cached, "output": count(usage, "completion_tokens")}
    cached = count(usage, "cachedContentTokenCount")
    entered = count(usage, "promptTokenCount") + count(usage, "toolUsePromptTokenCount")
    return {"uncached_input": max(0, entered - cached), "cache_read": cached,
            "output": count(usage, "candidatesTokenCount") + count(usage, "thoughtsTokenCount")}


class Meter:
    """Reads an answer as it passes: fed with its bytes, it has the usage when the answer is
    over."""

    def __init__(self, protocol: str, path: str, request: bytes, streamed: bool):
        self.protocol, self.streamed = protocol, streamed
        self.model = path.rpartition("/models/")[2].partition(":")[0] if "/models/" in path else ""
        self.asked = len(request)
        if not self.model:
            try:
                self.model = str(json.loads(request).get("model") or "")
            except (ValueError, AttributeError):
                self.model = ""
        self.usage: Dict[str, Any] = {}
        self.id, self.seen, self._rest = "", 0, b""

    def feed(self, data: bytes) -> None:
        self.seen += len(data)
        if not self.streamed:
            self._rest = (self._rest + data)[:MAX_ANSWER]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"sage" in line:  # usage, usageMetadata, message_start
                self._take(line[5:])

    def _take(self, text: bytes) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            return
        # Gemini streams an array where SSE is not asked for
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, dict):
                continue
            inner = part.get("message") or part.get("response")
            inner = inner if isinstance(inner, dict) else part
            told = inner.get("usage") or inner.get("usageMetadata")
            if isinstance(told, dict):
                self.usage.update({key: value for key, value in told.items() if value is not None})
            self.id = str(inner.get("id") or inner.get("responseId") or self.id)
            self.model = str(inner.get("model") or inner.get("modelVersion") or self.model)

    def answer(self, duration_ms: int) -> Answer:
        """What was said; where nothing was, an estimate by the size of request and answer."""
        self._take(self._rest if not self.streamed else self._rest.partition(b"data:")[2])
        self._rest = b""
        if self.usage:
            return Answer(self.protocol, self.model, self.id, duration_ms=duration_ms,
                          **figures_of(self.protocol, self.usage))
        return Answer(self.protocol, self.model, self.id, duration_ms=duration_ms, estimated=True,
                      uncached_input=self.asked // CHARACTERS_PER_TOKEN,
                      output=self.seen // CHARACTERS_PER_TOKEN)


class PassThrough(ThreadingHTTPServer):
    """The server. ``environment`` points agents at it; ``start`` once the child is forked (a thread
    serves); every model call is given to ``told``, from a thread."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, told: Callable[[Answer], None], env: Dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        # in the path: nobody else is served
        self.told, self._secret = told, secrets.token_urlsafe(16)
        self.upstream = {str(number): (name, env.get(name) or url)
                         for number, (name, url) in enumerate(UPSTREAM.items())}
        self._active, self._idle = 0, threading.Condition()

    def environment(self) -> Dict[str, str]:
        base = f"http://127.0.0.1:{self.server_address[1]}/{self._secret}"
        return {name: f"{base}/{number}" for number, (name, _) in self.upstream.items()}

    def start(self) -> None:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def stop(self, patience: float = 1.0) -> None:
        """Stop, and let what is under way be counted first."""
        self.shutdown()
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, patience)
        self.server_close()

    def target(self, path: str) -> Optional[str]:
        """The provider's address for a path of ours; None for one that is not."""
        _, secret, number, rest = (path.split("/", 3) + ["", "", ""])[:4]
        if (not secrets.compare_digest(secret.encode(), self._secret.encode())
                or number.split("?")[0] not in self.upstream):
            return None
        return self.upstream[number.split("?")[0]][1].rstrip("/") + "/" + rest

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._idle:
            self._active += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news, and the terminal is not ours."""


def connection_to(url: str) -> Tuple[http.client.HTTPConnection, str]:
    """(connection, path) for an address, by way of the proxy that HTTP_PROXY and HTTPS_PROXY
    name."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    proxy = None
    if not urllib.request.proxy_bypass(parts.netloc):
        proxy = urllib.request.getproxies().get(parts.scheme)
    made: Dict[str, Any] = {"timeout": ANSWER_SECONDS}
    if parts.scheme == "https":
        made["context"] = ssl.create_default_context()
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    if not proxy:
        return make(parts.hostname or "", parts.port, **made), path
    through = urlsplit(proxy)
    connection = make(through.hostname or "", through.port, **made)
    if parts.scheme == "https":
        connection.set_tunnel(parts.hostname or "", parts.port)
        return connection, path
    return connection, url


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: PassThrough

    def log_message(self, *_: Any) -> None:
        """Quiet: the terminal is the agent's."""

    def _refuse(self, status: int, reason: str) -> None:
        body = json.dumps({"error": {"type": "pass_through_error", "message": reason}}).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while True:
            size = int(self.rfile.readline(80).split(b";")[0], 16)
            pieces.append(self.rfile.read(size))
            self.rfile.readline(80)
            if not size:
                return b"".join(pieces)

    def _pass(self) -> None:
        began, body = time.monotonic(), self._body()
        url = self.server.target(self.path)
        if url is None:
            return self._refuse(404, "not an address of this pass-through")
        if self.headers.get("Upgrade"):  # a web socket: agents go on with plain requests
            return self._refuse(426, "no web sockets through here")
        headers = {name: value for name, value in self.headers.items()
                   if name.lower() not in OF_ONE_CONNECTION}
        headers["Accept-Encoding"] = "identity"
        connection, path = connection_to(url)
        try:
            connection.request(self.command, path,
                               body if body or self.command == "POST" else None, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return self._refuse(502, f"{urlsplit(url).netloc} does not answer: {error}")
        protocol = next(
            (name for ending, name in ENDINGS.items() if urlsplit(url).path.endswith(ending)), "")
        meter = None
        if protocol and self.command == "POST" and 200 <= answer.status < 300:
            streamed = "event-stream" in (answer.getheader("Content-Type") or "")
            meter = Meter(protocol, urlsplit(url).path, body, streamed)
        try:
            self._hand_on(answer, meter)
        finally:
            connection.close()
            if meter:
                self.server.told(meter.answer(int((time.monotonic() - began) * 1000)))

    def _hand_on(self, answer: http.client.HTTPResponse, meter: Optional[Meter]) -> None:
        length = answer.getheader("Content-Length")
        bodiless = self.command == "HEAD" or answer.status in (204, 304)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in OF_ONE_CONNECTION:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        elif not bodiless:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if bodiless:
            return
        listening = True
        while True:
            try:
                data = answer.read1(65_536)
            except (OSError, http.client.HTTPException):  # cut off there, so it is cut off here
                self.close_connection = True
                return
            if meter:
                meter.feed(data)
            if listening:
                listening = self._write(data if length is not None
                                        else b"%x\r\n%s\r\n" % (len(data), data))
            if not data or not listening and not meter:
                return

    def _write(self, data: bytes) -> bool:
        """False when the client has gone; what the provider still says is billed, so it is read to
        its end."""
        try:
            self.wfile.write(data)
            return True
        except OSError:
            self.close_connection = True
            return False

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _pass
