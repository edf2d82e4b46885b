"""The queue and bus on Redis Streams: for the processes of several machines.

Every change is one script (redis_bus.lua) that Redis runs whole or not at all. Redis 6.2 or later,
no cluster. What Redis has acknowledged is as safe as its settings make it: ``appendonly yes`` keeps
it over a crash.
"""
from __future__ import annotations

import functools
import json
import os
from typing import Any, Dict, List, Optional

from .bus import Bus, Claim, CrewError, Message, Task, TaskState

try:
    import redis
except ImportError as missing:
    raise CrewError(
        "a queue on Redis needs the redis package: pip install 'sessionoptimizer[redis]', "
        "or in a clone pip install -e '.[redis]'") from missing

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "redis_bus.lua")
TIMEOUT = 10.0  # seconds for an answer


class RedisBus(Bus):
    """The bus of the crew ``name`` in the Redis at ``url``; CrewError when it does not answer or is
    too old."""

    def __init__(self, url: str, *, name: str = "crew", lease_seconds: float = 60.0):
        self._prefix = name
        try:
            self._redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=TIMEOUT)
        except ValueError as error:
            raise CrewError(f"{url} is no address of a Redis: {error}") from error
        try:
            version = self._redis.info("server")["redis_version"]
            if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
                raise CrewError(f"the Redis at {url} is {version}: 6.2 or later is needed")
            self._redis.setnx(f"{name}:lease_seconds", lease_seconds)
            self.lease_seconds = float(self._redis.get(f"{name}:lease_seconds"))
        except redis.RedisError as error:
            self._redis.close()
            raise CrewError(f"no answer from the Redis at {url}: {error}") from error
        with open(SCRIPT, encoding="utf-8") as file:
            self._script = self._redis.register_script(file.read())

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _ask(self, operation: str, **given: Any) -> List[Any]:
        """What an operation of the script returns; CrewError when Redis does not answer."""
        try:
            return self._script(
                args=[operation, self._prefix, round(1000 * self.lease_seconds), json.dumps(given)])
        except redis.RedisError as error:
            raise CrewError(f"Redis cannot {operation}: {error}") from error

    def _submit(self, task: Task) -> None:
        answer = self._ask("submit", id=task.id, spec=task.to_json(), priority=task.priority,
                           max_attempts=task.max_attempts, requires=sorted(set(task.requires)),
                           after=sorted(set(task.after)))
        if answer[0] == "other":
            raise CrewError(f"task {task.id} was submitted before with other content")
        if answer[0] == "unknown":
            raise CrewError(f"task {task.id} is after {answer[1]}: submit that first")

    def _claim(self, agent: str, able: List[str]) -> Optional[Claim]:
        found = self._ask("claim", agent=agent, able=able)
        return Claim(Task.from_json(found[0]), agent, found[1], self) if found else None

    def _renew(self, claim: Claim) -> bool:
        return self._ask("renew", id=claim.task.id, attempt=claim.attempt) == [1]

    def _complete(self, claim: Claim, result: str) -> bool:
        return self._ask("complete", id=claim.task.id, attempt=claim.attempt, result=result) == [1]

    def _fail(self, claim: Claim, reason: str, retry: bool) -> bool:
        return self._ask(
            "fail", id=claim.task.id, attempt=claim.attempt, reason=reason, again=retry) == [1]

    def _send(self, identity: str, sender: str, to: str, body: str, priority: int) -> None:
        self._ask("send", id=identity, sender=sender, to=to, body=body, priority=priority)

    def _receive(self, agent: str, limit: int) -> List[Message]:
        return [Message(identity, sender, to, json.loads(body), int(priority),
                        functools.partial(
                            self._ask, "acknowledge", stream=stream, group=group, entry=entry))
                for identity, sender, to, body, priority, stream, group, entry
                in self._ask("receive", agent=agent, limit=limit)]

    def tasks(self) -> List[TaskState]:
        """All tasks, in the order they were submitted."""
        return [_state(dict(zip(row[::2], row[1::2]))) for row in self._ask("tasks")]


def _state(row: Dict[str, str]) -> TaskState:
    times = [float(row.get(name, 0)) for name in ("submitted_at", "claimed_at", "finished_at")]
    return TaskState(Task.from_json(row["spec"]), row["status"], int(row["attempts"]),
                     row.get("agent", ""),
                     json.loads(row.get("result", "null")), row.get("error", ""), *times)
