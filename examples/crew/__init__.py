"""Several agents on one repository: queue and bus, workers with worktrees, merge queue, report.

    python3 examples/crew --help

`open_bus` gives the queue and bus on SQLite or on Redis; see docs/crew.md.
"""
from __future__ import annotations

from .bus import ALL, Bus, Claim, CrewError, Message, Task, TaskState

__all__ = ["ALL", "Bus", "Claim", "CrewError", "Message", "Task", "TaskState", "open_bus"]


def open_bus(where: str, *, name: str = "crew", lease_seconds: float = 60.0) -> Bus:
    """The queue and bus at ``where``: a file for SQLite, or a ``redis://`` (``rediss://``,
    ``unix://``) URL.

    ``name`` separates crews that share one Redis; a URL that ends in ``#NAME`` brings its own.
    Raises CrewError when it cannot be opened or, for Redis, when the ``redis`` package is missing.
    """
    if where.startswith(("redis://", "rediss://", "unix://")):
        from .redis_bus import RedisBus
        address, _, own = where.partition("#")
        return RedisBus(address, name=own or name, lease_seconds=lease_seconds)
    from .sqlite_bus import SqliteBus
    return SqliteBus(where, lease_seconds=lease_seconds)
