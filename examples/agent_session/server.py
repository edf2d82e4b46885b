#!/usr/bin/env python3
"""Sessions in a terminal over HTTP, for this machine alone (every call: docs/agent-session.md).

    python3 examples/agent_session/server.py --port 8791 --token "$TOKEN"
    python3 examples/agent_session/server.py --port 8791 --token-file ~/.agent-session-token
    python3 examples/agent_session/server.py --port 8791       (makes a token, in a file that it
                                                               names)

It runs commands by design. Therefore: loopback only, every request carries the token
(``Authorization: Bearer``), the Host header must be this machine's, and a page of another site is
refused. Sessions outlive the server; started again on the same directory it has them back.

aiohttp, because it is one well-kept package that serves, streams and bounds requests on asyncio;
starlette would need uvicorn and a third for its tests.
"""
from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import hmac
import json
import os
import secrets
import signal
import stat
import sys
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, List, Optional

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from agent_session.session import (  # noqa: E402
    AISession, SessionConfig, SessionError, SessionManager, directory_of)
from agent_session.terminal import EXTRA  # noqa: E402

try:
    from aiohttp import web
except ImportError as missing:
    sys.exit(f"server.py: {missing.name} is not installed: {EXTRA}")

MAX_BODY = 4 * 1024 * 1024  # bytes of a request
MAX_TIMEOUT_MS = 86_400_000
ALIVE_SECONDS = 15  # between signs of life in a stream
MANAGER: Any = "manager"  # keys of the application
TOKEN: Any = "token"
if hasattr(web, "AppKey"):
    MANAGER, TOKEN = web.AppKey("manager", SessionManager), web.AppKey("token", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CONFIG_KEYS = ("name", "cwd", "shell", "command", "rows", "columns", "buffer_bytes", "env",
               "role", "cast")


class Refused(Exception):
    """A request that gets an error: the HTTP status and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def guarded(request: web.Request) -> None:
    """Refuse what does not come from this machine's own programs with the token."""
    host = request.headers.get("Host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() not in ("127.0.0.1", "localhost"):
        raise Refused(421, f"this server is not {host!r}")
    if ("Origin" in request.headers
            or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")):
        raise Refused(403, "no pages of other sites")
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if (scheme.lower() != "bearer"
            or not hmac.compare_digest(given.strip().encode(), request.app[TOKEN].encode())):
        raise Refused(401, "a token is needed: Authorization: Bearer TOKEN")


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error is JSON, ``{"error": reason}``."""
    try:
        guarded(request)
        return await handler(request)
    except Refused as error:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return web.json_response({"error": str(error)}, status=error.status, headers=headers)
    except SessionError as error:
        return web.json_response({"error": str(error)}, status=409)
    except (ValueError, TypeError) as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return web.json_response({"error": error.text or error.reason}, status=error.status)


async def body_of(request: web.Request, *allowed: str) -> Dict[str, Any]:
    """The JSON object of a request, which may have these keys."""
    try:
        value = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise Refused(400, f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body needs to be an object")
    unknown = sorted(set(value) - set(allowed))
    if unknown:
        raise Refused(400, f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
    return value


def seconds_in(body: Dict[str, Any]) -> Optional[float]:
    given = body.get("timeout_ms")
    if given is None:
        return None
    if (isinstance(given, bool) or not isinstance(given, (int, float))
            or not 0 < given <= MAX_TIMEOUT_MS):
        raise Refused(400, f"timeout_ms is {given!r}: it needs milliseconds, up to a day")
    return given / 1000


async def session_of(request: web.Request) -> AISession:
    session = await request.app[MANAGER].get_session(request.match_info["name"])
    if session is None:
        raise Refused(404, f"there is no session {request.match_info['name']}")
    return session


routes = web.RouteTableDef()


@routes.get("/health")
async def health(request: web.Request) -> web.StreamResponse:
    sessions = await request.app[MANAGER].list_sessions()
    running = sum(session.state == "running" for session in sessions)
    return web.json_response({"status": "ok", "sessions": len(sessions), "running": running})


@routes.post("/sessions")
async def create(request: web.Request) -> web.StreamResponse:
    body = await body_of(request, *CONFIG_KEYS, "timeout_ms", "metadata")
    if "name" not in body:
        raise Refused(400, "a session needs a name")
    seconds, metadata = seconds_in(body), body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Refused(400, "metadata needs to be an object")
    given = {key: body[key] for key in CONFIG_KEYS if key in body}
    config = SessionConfig(**given) if seconds is None else SessionConfig(**given, timeout=seconds)
    session = await request.app[MANAGER].create_session(config)
    for key, value in metadata.items():
        await session.set_metadata(str(key), value)
    return web.json_response(await session.status(), status=201)


@routes.get("/sessions")
async def listed(request: web.Request) -> web.StreamResponse:
    sessions = await request.app[MANAGER].list_sessions()
    return web.json_response({"sessions": [await session.status() for session in sessions]})


@routes.get("/sessions/{name}")
async def shown(request: web.Request) -> web.StreamResponse:
    session = await session_of(request)
    return web.json_response({**await session.status(), "context": await session.get_ai_context()})


@routes.delete("/sessions/{name}")
async def removed(request: web.Request) -> web.StreamResponse:
    session = await session_of(request)
    await request.app[MANAGER].remove_session(session.name)
    return web.json_response({"removed": session.name})


@routes.get("/sessions/{name}/status")
async def status(request: web.Request) -> web.StreamResponse:
    return web.json_response(await (await session_of(request)).status())


@routes.post("/sessions/{name}/execute")
async def execute(request: web.Request) -> web.StreamResponse:
    body = await body_of(request, "command", "timeout_ms")
    session = await session_of(request)
    result = await session.execute(body.get("command", ""), seconds_in(body))
    return web.json_response(vars(result))


@routes.post("/sessions/{name}/input")
async def typed(request: web.Request) -> web.StreamResponse:
    body = await body_of(request, "text")
    if not isinstance(body.get("text"), str):
        raise Refused(400, "text is what is typed")
    await (await session_of(request)).send_input(body["text"])
    return web.json_response({"typed": len(body["text"])})


@routes.post("/sessions/{name}/resize")
async def resized(request: web.Request) -> web.StreamResponse:
    body = await body_of(request, "rows", "columns")
    session = await session_of(request)
    await session.resize(body.get("rows", session.config.rows),
                         body.get("columns", session.config.columns))
    return web.json_response(await session.status())


@routes.put("/sessions/{name}/metadata")
async def described(request: web.Request) -> web.StreamResponse:
    session = await session_of(request)
    body = json.loads(await request.read() or b"{}")
    if not isinstance(body, dict):
        raise Refused(400, "the body needs to be an object")
    for key, value in body.items():
        await session.set_metadata(key, value)
    return web.json_response({"metadata": session.metadata})


@routes.get("/sessions/{name}/output")
async def output(request: web.Request) -> web.StreamResponse:
    """Both forms as JSON, or one alone: ``?form=clean`` as text, ``?form=raw`` as the very bytes;
    ``last=N`` bytes."""
    session, form = await session_of(request), request.query.get("form", "")
    last = request.query.get("last")
    if last is not None and not last.isdecimal() or form not in ("", "clean", "raw"):
        raise Refused(400, "form is clean or raw, last a number of bytes")
    count = None if last is None else int(last)
    raw = await session.raw_output(count)
    if form == "raw":
        return web.Response(body=raw, content_type="application/octet-stream")
    clean = await session.read_output(count)
    if form == "clean":
        return web.Response(text=clean)
    return web.json_response({"clean": clean, "raw": raw.decode("utf-8", "replace"),
                              "total_bytes": (await session.status())["output_bytes"]})


# ============================================================================
# Streams
# ============================================================================


async def streamed(request: web.Request,
                   events: AsyncIterator[Dict[str, Any]]) -> web.StreamResponse:
    """Events as server-sent events, with a sign of life when nothing happens."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    await response.write(b": connected\n\n")
    decoders: Dict[str, Any] = {}
    waiting: Optional["asyncio.Future[Dict[str, Any]]"] = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(events.__anext__())
            done, _ = await asyncio.wait({waiting}, timeout=ALIVE_SECONDS)
            if not done:
                await response.write(b": still here\n\n")
                continue
            finished, waiting = waiting, None
            try:
                event = dict(finished.result())
            except StopAsyncIteration:
                return response
            kind = event.pop("event")
            if kind == "output":
                decoder = decoders.setdefault(event["session"],
                                              codecs.getincrementaldecoder("utf-8")("replace"))
                event["data"] = decoder.decode(event["data"])
            await response.write(f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode())
    except ConnectionError:  # whoever listened has gone
        return response
    finally:
        if waiting:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await waiting
        with contextlib.suppress(RuntimeError):
            await events.aclose()  # type: ignore[attr-defined]


@routes.get("/sessions/{name}/events")
async def session_events(request: web.Request) -> web.StreamResponse:
    return await streamed(request, (await session_of(request)).events())


@routes.get("/events")
async def all_events(request: web.Request) -> web.StreamResponse:
    return await streamed(request, events_of(request.app[MANAGER]))


async def events_of(manager: SessionManager) -> AsyncIterator[Dict[str, Any]]:
    """What happens in all sessions from now on."""
    queue: "asyncio.Queue[Dict[str, Any]]" = asyncio.Queue(1000)

    def put(event: Dict[str, Any]) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            queue.put_nowait(event)

    manager.watchers.append(put)
    try:
        while True:
            yield await queue.get()
    finally:
        manager.watchers.remove(put)


# ============================================================================
# Starting
# ============================================================================


def application(manager: SessionManager, token: str) -> web.Application:
    """The HTTP API over a manager. ValueError for a token of less than 8 characters."""
    if len(token) < 8:
        raise ValueError("a token needs 8 characters or more")
    app = web.Application(middlewares=[answer], client_max_size=MAX_BODY)
    app[MANAGER], app[TOKEN] = manager, token
    app.add_routes(routes)
    return app


def token_from(path: str) -> str:
    """The token a file holds; ValueError where others could read or write it."""
    path = os.path.expanduser(path)
    with open(path, encoding="utf-8") as file:
        if os.name != "nt" and os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"{path} can be read by others: chmod 600 {path}")
        return file.read().strip()


def new_token(path: str) -> str:
    """A token in a file of its own, made where there is none."""
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
    return token_from(path)


async def serve(manager_directory: Optional[str], port: int, token: str, said: str) -> None:
    async with SessionManager(manager_directory) as manager:
        runner = web.AppRunner(application(manager, token), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        over = asyncio.Event()
        with contextlib.suppress(NotImplementedError):  # Windows
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, over.set)
        bound = runner.addresses[0][1]
        print(f"http://127.0.0.1:{bound} {said}".rstrip(), flush=True)
        await over.wait()
        await runner.cleanup()


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8791,
                        help="0 takes a free one, which it prints (default: 8791)")
    parser.add_argument(
        "--token", help="what a request must carry; others may see it in the list of processes")
    parser.add_argument("--token-file", help="a file of mode 0600 that holds the token")
    parser.add_argument(
        "--directory", help="where sessions are kept (default: agent-sessions in the store)")
    given = parser.parse_args(arguments)
    try:
        directory = directory_of(given.directory)
        said, token = "", given.token
        if token is None:
            path = given.token_file or os.path.join(directory, ".token")
            token = token_from(path) if given.token_file else new_token(path)
            said = f"(token in {path})"
        if len(token) < 8:
            raise ValueError("a token needs 8 characters or more")
        asyncio.run(serve(directory, given.port, token, said))
    except (OSError, ValueError) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
