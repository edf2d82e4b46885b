"""What a queue and bus is: tasks, claims, messages, and six methods that change them.

A task is handed out under a lease to one agent at a time and accepted as done once. A message is
handed out until it is acknowledged. Whoever dies in between loses nothing: the lease ends, and the
next one gets it.
"""
from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, TypeVar

ALL = "*"  # the recipient of a broadcast
POLL_SECONDS = (0.02, 0.5)  # the first pause while waiting, and the longest
Found = TypeVar("Found")


class CrewError(Exception):
    """A request that cannot be met; the text names the value and what to do."""


@dataclass
class Task:
    """Something to do. A larger ``priority`` is more urgent, equals keep their order.

    ``requires``: capabilities its agent must have. ``after``: ids of tasks to be done before.
    ``max_attempts``: how often it is handed out before it counts as failed. ``data``: whatever else
    belongs to it (JSON).
    """

    id: str
    title: str
    prompt: str = ""
    priority: int = 50
    requires: Tuple[str, ...] = ()
    after: Tuple[str, ...] = ()
    max_attempts: int = 3
    data: Dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The task as one line of JSON, equal for equal tasks."""
        spec = dict(
            asdict(self), requires=sorted(set(self.requires)), after=sorted(set(self.after)))
        return json.dumps(spec, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task of such a line, or of any object with an ``id`` and a ``title``; CrewError for
        another."""
        try:
            spec = json.loads(text)
            task = cls(**dict(
                spec, requires=tuple(spec.get("requires", ())), after=tuple(spec.get("after", ()))))
            json.dumps(asdict(task))
        except (TypeError, ValueError, AttributeError) as error:
            raise CrewError(f"no task: {text.strip()[:80]}: {error}") from error
        check_task(task)
        return task


def check_task(task: Task) -> None:
    """Raise CrewError for a task that no backend could keep."""
    texts = [task.id, task.title, task.prompt, *task.requires, *task.after]
    if not all(isinstance(text, str) for text in texts) or not task.id.strip():
        raise CrewError(
            f"task {task.id!r}: id, title, prompt, requires and after are texts, the id not empty")
    if not task.id.isprintable() or task.id != task.id.strip():
        raise CrewError(f"task {task.id!r}: an id is one line of printable text")
    if any(mark in name for name in task.requires for mark in ",|"):
        raise CrewError(f"task {task.id}: a capability cannot contain a comma or a bar")
    if (not all(isinstance(number, int) for number in (task.priority, task.max_attempts))
            or task.max_attempts < 1):
        raise CrewError(
            f"task {task.id}: priority and max_attempts are whole numbers, max_attempts at least 1")
    if task.id in task.after:
        raise CrewError(f"task {task.id} waits for itself")


@dataclass
class Claim:
    """A task in an agent's hands. ``attempt`` (1, 2, ...) tells this claim from every other of the
    task."""

    task: Task
    agent: str
    attempt: int
    bus: "Bus" = field(repr=False)

    def renew(self) -> bool:
        """Start the lease anew; False when the task is no longer this agent's, whose work then
        counts for nothing."""
        return self.bus._renew(self)


@dataclass
class Message:
    """A message in its recipient's hands; one that is not acknowledged within the lease is handed
    out again."""

    id: str
    sender: str
    to: str
    body: Any
    priority: int
    _acknowledge: Callable[[], None] = field(repr=False)

    def acknowledge(self) -> None:
        """Say that it was dealt with; a second time does nothing."""
        self._acknowledge()


@dataclass
class TaskState:
    """A task and how it stands: WAITING (for others), READY, CLAIMED, DONE or FAILED. Times:
    seconds since 1970, 0 while there is none; ``agent`` and ``attempts`` of the last claim."""

    task: Task
    status: str
    attempts: int = 0
    agent: str = ""
    result: Any = None
    error: str = ""
    submitted_at: float = 0.0
    claimed_at: float = 0.0
    finished_at: float = 0.0


class Bus:
    """The six methods; a backend says how each is kept. Agents are names, any process may use any
    of them.

    ``lease_seconds``: how long a claim or a message stays with whoever got it without a sign of
    life. The first to open a queue decides; it is the same for all.
    """

    lease_seconds: float

    def submit(self, task: Task) -> str:
        """Add a task and return its id. The same task again changes nothing; CrewError when the id
        stands for another one, or when ``after`` names a task that was not submitted before."""
        check_task(task)
        self._submit(task)
        return task.id

    def claim(self, agent: str, capabilities: Iterable[str] = (), *,
              wait: float = 0.0) -> Optional[Claim]:
        """The most urgent task that is ready and requires nothing beyond ``capabilities``, now
        leased to the agent; None when there is none within ``wait`` seconds."""
        able = sorted(set(capabilities))
        return self._until(wait, lambda: self._claim(check_agent(agent), able))

    def complete(self, claim: Claim, result: Any = None) -> bool:
        """Mark the task as done with a result (JSON). True when this claim's work is the one that
        counts; False when the lease ran out and the task went to another, or is settled already."""
        return self._complete(claim, json.dumps(result))

    def fail(self, claim: Claim, reason: str, *, retry: bool = True) -> bool:
        """Give the task back; it is handed out again while attempts are left and ``retry`` is
        given. Else it is FAILED, and so is what waits for it. False when the claim no longer
        counts."""
        return self._fail(claim, reason, retry)

    def send(self, sender: str, to: str, body: Any, *, priority: int = 50,
             message_id: str = "") -> str:
        """Send a body (JSON) to an agent, or to ALL: every other agent, those that join later too.
        Returns the id; with a ``message_id`` of your own a message that is sent again is not
        doubled."""
        identity = message_id or uuid.uuid4().hex
        self._send(identity, check_agent(sender), to if to == ALL else check_agent(to),
                   json.dumps(body), priority)
        return identity

    def receive(self, agent: str, *, limit: int = 10, wait: float = 0.0) -> List[Message]:
        """At most ``limit`` messages, the most urgent first, then the oldest; [] when none came
        within ``wait`` seconds. Each is to be acknowledged."""
        return self._until(wait, lambda: self._receive(check_agent(agent), limit) or None) or []

    def tasks(self) -> List[TaskState]:
        """All tasks, in the order they were submitted."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and connections."""
        raise NotImplementedError

    def __enter__(self) -> "Bus":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @staticmethod
    def _until(wait: float, look: Callable[[], Optional[Found]]) -> Optional[Found]:
        """What ``look`` finds, asked again at growing pauses until ``wait`` seconds are over."""
        end, (pause, longest) = time.monotonic() + wait, POLL_SECONDS
        while True:
            found = look()
            left = end - time.monotonic()
            if found is not None or left <= 0:
                return found
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _submit(self, task: Task) -> None:
        raise NotImplementedError

    def _claim(self, agent: str, able: List[str]) -> Optional[Claim]:
        raise NotImplementedError

    def _renew(self, claim: Claim) -> bool:
        raise NotImplementedError

    def _complete(self, claim: Claim, result: str) -> bool:
        raise NotImplementedError

    def _fail(self, claim: Claim, reason: str, retry: bool) -> bool:
        raise NotImplementedError

    def _send(self, identity: str, sender: str, to: str, body: str, priority: int) -> None:
        raise NotImplementedError

    def _receive(self, agent: str, limit: int) -> List[Message]:
        raise NotImplementedError


def check_agent(name: str) -> str:
    """The name; CrewError for one that is empty or means everybody."""
    if not isinstance(name, str) or not name.strip() or name == ALL:
        raise CrewError(f"{name!r} is no name of an agent")
    return name
