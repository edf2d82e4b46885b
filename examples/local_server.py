"""An HTTP server that is safe to run on a desk: a page, its API, a stream of events. For dashboard.py.

It answers GET and HEAD. It refuses pages of other sites (Host, Origin and Sec-Fetch-Site are checked, which
also stops DNS rebinding), asks for a token where it has one, lets the page run its own script and style and
nothing else, and bounds what a client can take: the size of a request, the time to send it, the number of
connections and of event streams. Errors are JSON, ``{"error": text}``.
"""
import base64
import hashlib
import hmac
import io
import json
import os
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from urllib.parse import unquote

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS, MAX_STREAMS = 64, 16  # of these, event streams: one per open page
MAX_HEAD, MAX_TARGET = 16_384, 2_048  # bytes of a request; characters of its path and query
REQUEST_SECONDS, IDLE_SECONDS = 10, 30  # to send a request once begun; between two on one connection
POLL_SECONDS, KEEP_ALIVE_SECONDS = 1, 15  # of an event stream: looks at the state, signs of life
JSON = "application/json"


class Refused(Exception):
    """A request that gets an error instead of an answer: status, message and, at need, a dict of headers."""


def same(given, wanted):
    """Whether two secrets are equal, in a time that tells nothing of them."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))


def tag_of(data):
    """An ETag for these bytes."""
    return f'"{hashlib.sha256(data).hexdigest()[:24]}"'


class LocalServer(ThreadingMixIn, TCPServer):
    """A bounded number of connections, one thread each. A subclass says what ``answer`` and ``state`` are."""

    daemon_threads, block_on_close, request_queue_size = True, False, 32
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port

    def __init__(self, page, *, host="127.0.0.1", port=8765, token=""):
        self.page, self.token, self.local, self.closing = page, token, host in LOOPBACK, threading.Event()
        self.slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.streams = threading.BoundedSemaphore(MAX_STREAMS)
        self.names = set(LOOPBACK) | (set() if self.local else {host.lower(), socket.gethostname().lower()})
        hashes = [base64.b64encode(hashlib.sha256(re.search(tag, page, re.S).group(1)).digest()).decode()
                  for tag in (b"<script>(.*?)</script>", b"<style>(.*?)</style>")]
        self.policy = ("default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; "
                       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                       "require-trusted-types-for 'script'; trusted-types 'none'").format(*hashes)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        secret = hmac.new(token.encode(), b"cookie of this server", "sha256").hexdigest()
        self.cookie = f"dashboard_{self.server_address[1]}={secret}"

    def answer(self, path, query):
        """(media type, ETag, body) of a GET request; raises Refused."""
        raise NotImplementedError

    def state(self, max_age):
        """(a number that grows with every change, seconds to wait before asking again); the number may be
        ``max_age`` seconds old."""
        raise NotImplementedError

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            return super().process_request(request, client_address)
        request.setblocking(False)
        try:
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                         b"Retry-After: 5\r\nConnection: close\r\nContent-Length: 33\r\n\r\n"
                         b'{"error": "too many connections"}')
        except OSError:
            pass  # gone already
        return self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, socket.timeout)):
            super().handle_error(request, client_address)

    def server_close(self):
        self.closing.set()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "SessionOptimizer", ""
    timeout, disable_nagle_algorithm, pending = REQUEST_SECONDS, True, b""

    def handle_one_request(self):
        """Read a request's head, bounded in size and, as a whole, in time; then answer it."""
        head, deadline = self.pending, time.monotonic() + (REQUEST_SECONDS if self.pending else IDLE_SECONDS)
        self.close_connection, self.requestline, self.request_version, self.command = True, "", "HTTP/1.1", ""
        try:
            while b"\r\n\r\n" not in head and len(head) <= MAX_HEAD:
                self.connection.settimeout(max(0.01, deadline - time.monotonic()))
                chunk = self.connection.recv(4_096)
                if not chunk:
                    return None
                deadline, head = deadline if head else time.monotonic() + REQUEST_SECONDS, head + chunk
        except socket.timeout:
            return self.send_error(408, "the request took too long") if head else None
        finally:
            self.connection.settimeout(self.timeout)
        head, end, self.pending = head.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            return self.send_error(431, f"a request has at most {MAX_HEAD:,} bytes")
        self.rfile = io.BytesIO(head + end)
        return super().handle_one_request()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        try:
            self._check_sender(path)
            if path == "/health":
                return self.send(200, JSON, b'{"status": "ok"}')
            if path == "/" and query.startswith("token=") and self.server.token:
                if not same(unquote(query[len("token="):]), self.server.token):
                    raise Refused(401, "this is not the token", {"WWW-Authenticate": "Bearer"})
                cookie = f"{self.server.cookie}; Path=/; HttpOnly; SameSite=Strict"
                return self.send(303, JSON, b"{}", {"Location": "/", "Set-Cookie": cookie})
            self._check_token()
            if path == "/api/events":
                return self._stream()
            if path == "/":
                headers = {"ETag": tag_of(self.server.page), "Content-Security-Policy": self.server.policy}
                return self.send(200, "text/html; charset=utf-8", self.server.page, headers)
            kind, etag, body = self.server.answer(path, query)
            return self.send(200, kind, body, {"ETag": etag})
        except Refused as refused:
            status, message, *headers = refused.args
            return self.send_error(status, message, None, *headers)

    do_HEAD = do_GET

    def _check_sender(self, path):
        """Refuse pages of other sites, also those whose name was made to lead here (DNS rebinding)."""
        if len(self.path) > MAX_TARGET:
            raise Refused(414, f"a path has at most {MAX_TARGET:,} characters")
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            raise Refused(400, "a request has no body here")
        hosts = self.headers.get_all("Host", [])
        found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:@/\[\]]+)(:\d*)?", hosts[0].lower() if hosts else "")
        if not found or len(hosts) > 1:
            raise Refused(400, "a request names one Host")
        name = found.group(1).strip("[]")
        by_address = not self.server.local and (":" in name or re.fullmatch("[0-9.]+", name))  # asks no DNS
        if not by_address and name not in self.server.names:
            raise Refused(403, f"this server does not answer to the name {name!r}: use its address")
        site = "none" if path == "/" else self.headers.get("Sec-Fetch-Site", "none")  # a link may lead there
        origins = (None, f"http://{hosts[0]}", f"https://{hosts[0]}")
        if self.headers.get("Origin") not in origins or site not in ("none", "same-origin"):
            raise Refused(403, "requests of other sites are refused")

    def _check_token(self):
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        cookies = [part.strip() for part in self.headers.get("Cookie", "").split(";")]
        if self.server.token and not (kind.lower() == "bearer" and same(given.strip(), self.server.token)
                                      or any(same(cookie, self.server.cookie) for cookie in cookies)):
            raise Refused(401, "a token is needed: open /?token=TOKEN once or send Authorization: Bearer",
                          {"WWW-Authenticate": "Bearer"})

    def _stream(self):
        """Server-sent events: the number of the state, now and whenever it changes."""
        if not self.server.streams.acquire(blocking=False):
            raise Refused(503, "too many open pages", {"Retry-After": "30"})
        try:
            self.close_connection = True
            self.send(200, "text/event-stream; charset=utf-8", None)
            sent, spoke, pause = None, time.monotonic(), 0.0
            while self.command != "HEAD" and not self.server.closing.wait(pause):
                (number, wait), text = self.server.state(max_age=POLL_SECONDS * 0.9), ": still here\n\n"
                if number != sent:
                    text = f'retry: 2000\nid: {number}\nevent: change\ndata: {{"version": {number}}}\n\n'
                if number != sent or time.monotonic() - spoke > KEEP_ALIVE_SECONDS:
                    self.wfile.write(text.encode())
                    sent, spoke = number, time.monotonic()
                pause = max(POLL_SECONDS, min(wait, KEEP_ALIVE_SECONDS))
        finally:
            self.server.streams.release()

    def send(self, status, kind, body, headers=None):
        headers = dict({
            "Content-Type": kind, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}, **headers or {})
        if "ETag" in headers:
            known = self.headers.get("If-None-Match", "").split(",")
            if headers["ETag"] in [tag.strip().replace("W/", "") for tag in known]:
                status, body = 304, None
        if body is not None:
            headers["Content-Length"] = str(len(body))
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None, headers=None):
        if code == 501:  # what http.server says of a method it has no function for
            code, message, headers = 405, f"only GET and HEAD, not {self.command}", {"Allow": "GET, HEAD"}
        self.close_connection, self.request_version = True, "HTTP/1.1"  # a status line also for HTTP/0.9
        self.send(code, JSON, json.dumps({"error": message or "not a request"}).encode(), headers)

    def log_message(self, format, *arguments):
        """Nothing: a page asks again at every change."""
