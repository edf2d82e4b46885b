"""The queue and bus in one SQLite file: for the processes of one machine, and nothing to install.

Every change is one transaction under SQLite's write lock, written through to the disk before it
counts (WAL, synchronous=FULL). A network file system cannot hold it: use Redis for several
machines.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import threading
import time
from typing import Iterator, List, Optional

from .bus import ALL, Bus, Claim, CrewError, Message, Task, TaskState

BUSY_SECONDS = 30.0  # how long a writer waits for the others
SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value REAL);
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, spec TEXT NOT NULL,
    priority INTEGER NOT NULL, requires TEXT NOT NULL, max_attempts INTEGER NOT NULL,
    status TEXT NOT NULL, ready INTEGER NOT NULL DEFAULT 0,  -- its place among equals
    attempts INTEGER NOT NULL DEFAULT 0, agent TEXT NOT NULL DEFAULT '',
    lease_until REAL NOT NULL DEFAULT 0,
    result TEXT NOT NULL DEFAULT 'null', error TEXT NOT NULL DEFAULT '', submitted_at REAL NOT NULL,
    claimed_at REAL NOT NULL DEFAULT 0, finished_at REAL NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS next_task ON tasks (status, priority DESC, ready);
CREATE INDEX IF NOT EXISTS places ON tasks (ready);
CREATE TABLE IF NOT EXISTS waits (
    task TEXT NOT NULL, needs TEXT NOT NULL, PRIMARY KEY (task, needs));
CREATE INDEX IF NOT EXISTS needed ON waits (needs);
CREATE TABLE IF NOT EXISTS messages (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, sender TEXT NOT NULL,
    recipient TEXT NOT NULL, body TEXT NOT NULL, priority INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS mail ON messages (recipient, priority DESC, number);
CREATE TABLE IF NOT EXISTS deliveries (
    message INTEGER NOT NULL, agent TEXT NOT NULL, lease_until REAL NOT NULL,
    acknowledged INTEGER NOT NULL, PRIMARY KEY (message, agent)) WITHOUT ROWID;
"""
NEXT_MAIL = """
SELECT m.* FROM messages m LEFT JOIN deliveries d ON d.message = m.number AND d.agent = :agent
WHERE (m.recipient = :agent OR (m.recipient = :all AND m.sender != :agent))
  AND (d.message IS NULL OR (d.acknowledged = 0 AND d.lease_until <= :now))
ORDER BY m.priority DESC, m.number LIMIT :limit
"""


class SqliteBus(Bus):
    """The bus in the file ``path``, made when missing. Threads may share it; CrewError when it
    cannot be used."""

    def __init__(self, path: str, *, lease_seconds: float = 60.0):
        self._lock = threading.Lock()
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise CrewError(f"cannot open the queue {path}: {error}") from error
        self._db.row_factory = sqlite3.Row
        try:
            self._prepare(lease_seconds)
        except (CrewError, sqlite3.Error) as error:
            self._db.close()
            raise CrewError(f"cannot use {path} as a queue: {error}") from error

    def _prepare(self, lease_seconds: float) -> None:
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA journal_mode=WAL")
        with self._change() as db:
            for statement in SCHEMA.split(";\n"):
                db.execute(statement)
            db.execute("INSERT OR IGNORE INTO settings VALUES ('lease_seconds', ?)",
                       (lease_seconds,))
            self.lease_seconds = db.execute("SELECT value FROM settings").fetchone()[0]

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start, so that what it read stays
        true."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise CrewError(f"the queue cannot be changed: {error}") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _submit(self, task: Task) -> None:
        spec = task.to_json()
        with self._change() as db:
            known = db.execute("SELECT spec FROM tasks WHERE id = ?", (task.id,)).fetchone()
            if known is not None:
                if known["spec"] != spec:
                    raise CrewError(f"task {task.id} was submitted before with other content")
                return
            states = {need: db.execute("SELECT status FROM tasks WHERE id = ?", (need,)).fetchone()
                      for need in task.after}
            unknown = sorted(need for need, state in states.items() if state is None)
            if unknown:
                raise CrewError(f"task {task.id} is after {', '.join(unknown)}: submit that first")
            db.execute("INSERT INTO tasks (id, spec, priority, requires, max_attempts, status, "
                       "submitted_at) VALUES (?, ?, ?, ?, ?, 'WAITING', ?)",
                       (task.id, spec, task.priority, json.dumps(sorted(set(task.requires))),
                        task.max_attempts, time.time()))
            db.executemany("INSERT INTO waits VALUES (?, ?)",
                           [(task.id, need) for need, state in states.items()
                            if state["status"] != "DONE"])
            failed = sorted(need for need, state in states.items() if state["status"] == "FAILED")
            if failed:
                self._sink(db, task.id, f"{failed[0]} failed")
            else:
                self._make_ready(db, task.id)

    @staticmethod
    def _make_ready(db: sqlite3.Connection, task_id: str) -> None:
        """Put a task that waits for nothing behind its equals."""
        db.execute("UPDATE tasks SET status = 'READY', ready = (SELECT max(ready) + 1 FROM tasks)"
                   " WHERE id = ? AND NOT EXISTS (SELECT 1 FROM waits WHERE task = tasks.id)",
                   (task_id,))

    def _sink(self, db: sqlite3.Connection, task_id: str, reason: str) -> None:
        """Settle a task as failed, and all that wait for it."""
        lost = [(task_id, reason)]
        while lost:
            task_id, reason = lost.pop()
            db.execute(
                "UPDATE tasks SET status = 'FAILED', error = ?, finished_at = ? WHERE id = ?",
                (reason, time.time(), task_id))
            waiting = db.execute("SELECT t.id FROM waits w JOIN tasks t ON t.id = w.task"
                                 " WHERE w.needs = ? AND t.status = 'WAITING'",
                                 (task_id,)).fetchall()
            lost.extend((row["id"], f"{task_id} failed") for row in waiting)

    def _claim(self, agent: str, able: List[str]) -> Optional[Claim]:
        now = time.time()
        with self._change() as db:
            over = db.execute("SELECT id, attempts, max_attempts, agent FROM tasks"
                              " WHERE status = 'CLAIMED' AND lease_until <= ?", (now,)).fetchall()
            for row in over:
                if row["attempts"] >= row["max_attempts"]:
                    self._sink(db, row["id"],
                               f"no sign of life from {row['agent']} in attempt {row['attempts']}")
                else:
                    db.execute("UPDATE tasks SET status = 'READY' WHERE id = ?", (row["id"],))
            ready = db.execute(
                "SELECT id, spec, requires, attempts FROM tasks WHERE status = 'READY'"
                " ORDER BY priority DESC, ready")
            found = next(
                (row for row in ready if set(json.loads(row["requires"])) <= set(able)), None)
            ready.close()
            if found is None:
                return None
            db.execute("UPDATE tasks SET status = 'CLAIMED', attempts = attempts + 1, agent "
                       "= ?, claimed_at = ?, lease_until = ? WHERE id = ?",
                       (agent, now, now + self.lease_seconds, found["id"]))
            return Claim(Task.from_json(found["spec"]), agent, found["attempts"] + 1, self)

    def _held(self, db: sqlite3.Connection, claim: Claim) -> bool:
        return (
            db.execute("SELECT 1 FROM tasks WHERE id = ? AND status = 'CLAIMED' AND attempts = ?",
                       (claim.task.id, claim.attempt)).fetchone() is not None)

    def _renew(self, claim: Claim) -> bool:
        with self._change() as db:
            held = self._held(db, claim)
            if held:
                db.execute("UPDATE tasks SET lease_until = ? WHERE id = ?",
                           (time.time() + self.lease_seconds, claim.task.id))
            return held

    def _complete(self, claim: Claim, result: str) -> bool:
        with self._change() as db:
            if not self._held(db, claim):
                return False
            db.execute("UPDATE tasks SET status = 'DONE', result = ?, finished_at = ? WHERE id = ?",
                       (result, time.time(), claim.task.id))
            waiting = db.execute("SELECT task FROM waits WHERE needs = ?",
                                 (claim.task.id,)).fetchall()
            db.execute("DELETE FROM waits WHERE needs = ?", (claim.task.id,))
            for row in waiting:
                if db.execute("SELECT status FROM tasks WHERE id = ?",
                              (row["task"],)).fetchone()[0] == "WAITING":
                    self._make_ready(db, row["task"])
            return True

    def _fail(self, claim: Claim, reason: str, retry: bool) -> bool:
        with self._change() as db:
            if not self._held(db, claim):
                return False
            if retry and claim.attempt < claim.task.max_attempts:
                db.execute("UPDATE tasks SET error = ? WHERE id = ?", (reason, claim.task.id))
                self._make_ready(db, claim.task.id)
            else:
                self._sink(db, claim.task.id, reason)
            return True

    def _send(self, identity: str, sender: str, to: str, body: str, priority: int) -> None:
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO messages (id, sender, recipient, body, priority)"
                       " VALUES (?, ?, ?, ?, ?)", (identity, sender, to, body, priority))

    def _receive(self, agent: str, limit: int) -> List[Message]:
        now = time.time()
        with self._change() as db:
            rows = db.execute(NEXT_MAIL,
                              {"agent": agent, "all": ALL, "now": now, "limit": limit}).fetchall()
            db.executemany("INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, 0)",
                           [(row["number"], agent, now + self.lease_seconds) for row in rows])
        return [Message(row["id"], row["sender"], row["recipient"], json.loads(row["body"]),
                        row["priority"],
                        functools.partial(self._acknowledge, row["number"], agent)) for row in rows]

    def _acknowledge(self, number: int, agent: str) -> None:
        with self._change() as db:
            db.execute("UPDATE deliveries SET acknowledged = 1 WHERE message = ? AND agent = ?",
                       (number, agent))

    def tasks(self) -> List[TaskState]:
        """All tasks, in the order they were submitted."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM tasks ORDER BY number").fetchall()
        return [TaskState(Task.from_json(row["spec"]), row["status"], row["attempts"], row["agent"],
                          json.loads(row["result"]), row["error"], row["submitted_at"],
                          row["claimed_at"], row["finished_at"]) for row in rows]
