"""What a handful of points can and cannot show: rank correlation, permutation, bootstrap.

Used by git_insights.py; docs/git.md explains the terms. Every function that draws takes a seeded
generator, so the same data and seed give the same numbers.
"""
from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sqlite3
import statistics
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from operator import mul
from typing import Any, Callable, Protocol, Sequence, runtime_checkable

from git_history import ratio

MIN_POINTS = 8  # points of a correlation, or sessions a side of a split; fewer are "no evidence"
ALPHA = 0.05  # chance of one false "evidence" among all the relations of a report
REPEATS, WORK = 1_999, 1_000_000  # permutations or resamples; fewer for many points
LEVEL, POWER_SAMPLES = 0.7, 400  # the rho, "strong", whose power is said, and from how many samples
BLOCKS = 20  # blocks lose at most 2/20 of the variance that neighbouring days share
SPLIT = [("%s per %s" % (words, unit), name, per)  # measure, amount and divisor (of a session)
         for per, unit in (("user_turns", "user turn"), ("files_modified", "edited file"))
         for name, words in (
             ("tokens", "tokens"), ("waste_tokens", "wasted tokens"), ("cost", "cost"))]
STRENGTHS = (("strong", 0.7), ("moderate", 0.4), ("weak", 0.2), ("none", 0.0))


@dataclass
class CorrelationInsight:
    """One relation; confidence = 1 - p. Without evidence strength is "none" and direction "neutral"
    whatever the coefficient: 0.9 in three points is not a strong relation."""
    correlation_type: str
    correlation_coefficient: float
    strength: str
    direction: str
    description: str
    confidence: float
    sample_size: int
    timestamp: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    interval: tuple[float, float] | None = None  # 95%; None below MIN_POINTS
    power: float | None = None  # the share of such samples in which a rho of LEVEL would be seen
    labels: tuple[str, str] = ("x", "y")
    points: list[tuple[float, float]] = field(default_factory=list)
    project_path: str = ""


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the average of theirs: [10, 20, 20] -> [1.0, 2.5, 2.5]."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result, start = [0.0] * len(values), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for index in order[start:end]:
                result[index] = (start + 1 + end) / 2
            start = end
    return result


def unit_ranks(values: Sequence[float]) -> list[float]:
    """Ranks centred on 0, of length 1: rho is the sum of their products. Empty if all are equal."""
    centred = [rank - (len(values) + 1) / 2 for rank in ranks(values)]
    length = math.sqrt(sum(map(mul, centred, centred)))
    return [rank / length for rank in centred] if length else []


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks; 0.0 where one side does not vary."""
    return round(sum(map(mul, unit_ranks(xs), unit_ranks(ys))), 12)  # not 0.9999999999999998 for 1


def block_length(xs: Sequence[float], ys: Sequence[float]) -> int:
    """Days in a row that must be shuffled together. If neighbours hang together by r on one side
    and s on the other, p = r * s, blocks of b lose 2p / ((1 - p * p) * b) of the variance of rho
    (the autocovariances p, p * p, ... that they cut); r and s are corrected for their bias."""
    count, shared = len(xs), 1.0
    for side in map(unit_ranks, (xs, ys)):
        seen = sum(map(mul, side, side[1:]))
        shared *= min(0.97, max(0.0, seen) + (1 + 4 * max(0.0, seen)) / count) if seen > 0 else 0.0
    return max(1, min(count, math.ceil(BLOCKS * shared / (1 - shared * shared)))) if count else 1


def repeats_for(count: int) -> int:
    return max(199, min(REPEATS, WORK // (count or 1)))


def shuffled_rhos(xs: Sequence[float], ys: Sequence[float], rng: random.Random,
                  block: int = 1) -> list[float]:
    """The rhos, without sign, of shuffled pairings. Of a series whole blocks are shuffled, every
    other one turned round and from any day on, so what hangs together stays together."""
    left, right, found = unit_ranks(xs), unit_ranks(ys), []
    for _ in range(repeats_for(len(xs))):
        if block > 1 and right:
            start = rng.randrange(len(right))
            turned = right[start:] + right[:start]
            blocks = [turned[at:at + block][::rng.choice((1, -1))]
                      for at in range(0, len(xs), block)]
            rng.shuffle(blocks)
            drawn = [rank for ranked in blocks for rank in ranked]
        else:
            drawn = rng.sample(right, len(right))
        found.append(abs(sum(map(mul, left, drawn))))
    return found


def share_beyond(rhos: Sequence[float], seen: float) -> float:
    """p: the share of shuffled rhos at least as far from 0, (count + 1) / (shuffles + 1)."""
    least = abs(seen) - 1e-9  # rounding must not turn a tie into a miss
    return (sum(rho >= least for rho in rhos) + 1) / (len(rhos) + 1)


def permutation_p(xs: Sequence[float], ys: Sequence[float], rng: random.Random,
                  block: int = 1) -> float:
    """Two-sided, of Spearman's rho."""
    return share_beyond(shuffled_rhos(xs, ys, rng, block), spearman(xs, ys))


def power_at(rhos: Sequence[float], alpha: float, sides: Sequence[Sequence[float]],
             rng: random.Random) -> float:
    """The share of samples in which a true rho of LEVEL would have p <= alpha: normal pairs, with
    the ties of the given sides, as many as independent points have the spread of shuffled rhos."""
    spread = sum(rho * rho for rho in rhos) / len(rhos)
    count = min(200, len(sides[0]), max(3, round(1 + 1 / spread)))
    steps = [[side[at * len(side) // count] for at in range(count)] for side in map(sorted, sides)]
    slope = 2 * math.sin(math.pi * LEVEL / 6)  # the correlation of normal values with that rho
    least, seen = sorted(rhos)[-max(1, int(alpha * (len(rhos) + 1)))] + 1e-9, 0
    for _ in range(POWER_SAMPLES):
        xs = [rng.gauss(0, 1) for _ in range(count)]
        ys = [slope * x + math.sqrt(1 - slope * slope) * rng.gauss(0, 1) for x in xs]
        tied = ([step[int(rank) - 1] for rank in ranks(drawn)]
                for step, drawn in zip(steps, (xs, ys)))
        seen += spearman(*tied) > least
    return seen / POWER_SAMPLES


def bootstrap(statistic: Callable[..., float], groups: Sequence[Sequence], rng: random.Random,
              block: int = 1) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over groups, each resampled with replacement, of
    a series in blocks (from the last day on to the first)."""
    def resampled(group: Sequence) -> list:
        if block == 1:
            return rng.choices(group, k=len(group))
        starts = rng.choices(range(len(group)), k=math.ceil(len(group) / block))
        drawn = [group[(at + step) % len(group)] for at in starts for step in range(block)]
        return drawn[:len(group)]

    count = repeats_for(sum(map(len, groups)))
    drawn = sorted(statistic(*map(resampled, groups)) for _ in range(count))
    return drawn[int(0.025 * (count - 1))], drawn[math.ceil(0.975 * (count - 1))]


def doubt_of(points: Sequence[tuple], block: int, interval: tuple | None, p: float,
             tests: int) -> str:
    """Why the points are no evidence; "" when they are."""
    low, high = interval or (-1, 1)
    doubts = (
        ("at least %d are needed" % MIN_POINTS, len(points) < MIN_POINTS),
        ("one side is the same in all", 1 in (len(set(side)) for side in zip(*points))),
        ("neighbours are so alike that they count as %d" % (len(points) // block),
         len(points) // block < MIN_POINTS),
        ("the interval crosses zero", low <= 0 <= high),
        ("chance explains it, with %d relations tested" % tests, p > ALPHA / tests))
    return next((words for words, holds in doubts if holds), "")


def correlate(kind: str, points: Sequence[tuple[float, float]], unit: str = "sessions",
              labels: tuple[str, str] = ("x", "y"), *, tests: int = 1, seed: int = 0,
              series: bool = False) -> CorrelationInsight:
    """The insight of one relation. Evidence takes MIN_POINTS points (of a `series`, in time order,
    as many blocks), an interval that leaves zero out, and p <= ALPHA / tests (Bonferroni, for
    `tests` relations looked at together). The same seed gives the same result."""
    rng, count = random.Random("%s:%s" % (seed, kind)), len(points)
    xs, ys = ([point[side] for point in points] for side in (0, 1))
    block, rho = block_length(xs, ys) if series else 1, spearman(xs, ys)
    rhos, interval, power = shuffled_rhos(xs, ys, rng, block), None, None
    p = share_beyond(rhos, rho)
    if count >= MIN_POINTS:
        interval = bootstrap(lambda drawn: spearman(*zip(*drawn)), [points], rng, block)
        power = power_at(rhos, ALPHA / tests, (xs, ys), rng) if any(rhos) else 0.0
    strength = next(word for word, least in STRENGTHS if abs(rho) >= least)
    doubt = doubt_of(points, block, interval, p, tests)
    trend = "they rise together" if rho > 0 else "one falls as the other rises"
    verdict = "no evidence in %d %s: %s" % (count, unit, doubt) if doubt else "%s, %s in %d %s" % (
        strength, trend, count, unit)
    text = "%s and %s: %s" % (*labels, verdict)
    if interval:
        text += " (rho %+.2f, 95%% interval %+.2f to %+.2f, p = %.4f)" % (rho, *interval, p)
    if doubt and power is not None:
        text += "; with %d points a rho of %s would be seen in %.0f%%" % (count, LEVEL, 100 * power)
    direction = "neutral" if doubt else ("negative", "positive")[rho > 0]
    return CorrelationInsight(
        kind, rho, "none" if doubt else strength, direction, text, 1 - p, count, interval=interval,
        power=power, labels=tuple(labels), points=list(points))


def median_change(before: Sequence[float], after: Sequence[float],
                  rng: random.Random) -> dict[str, Any]:
    """The medians of two groups, their difference (after - before), its 95% interval, a verdict."""
    result = dict.fromkeys(("before", "after", "difference", "interval"))
    result.update(n_before=len(before), n_after=len(after),
                  verdict="not enough sessions (%d a side)" % MIN_POINTS)
    if min(len(before), len(after)) >= MIN_POINTS:
        first, second = statistics.median(before), statistics.median(after)
        low, high = bootstrap(lambda b, a: statistics.median(a) - statistics.median(b),
                              (before, after), rng)
        moved = "lower after" if high < 0 else "higher after"
        result.update(before=first, after=second, difference=second - first, interval=(low, high),
                      verdict="no evidence of a change" if low <= 0 <= high else moved)
    return result


def split_at(sessions: Sequence[Any], moment: datetime, seed: int = 0) -> list[dict[str, Any]]:
    """For each measure the medians before and after a moment, over the sessions that have it."""
    rows = []
    for measure, name, per in SPLIT:
        groups: tuple[list[float], list[float]] = ([], [])
        for s in sessions:
            rate = ratio(getattr(s, name), getattr(s, per))
            if rate is not None:
                groups[s.started_at >= moment].append(rate)
        change = median_change(*groups, random.Random("%s:%s" % (seed, measure)))
        rows.append(dict(change, measure=measure))
    return rows


@runtime_checkable
class CorrelationStorage(Protocol):
    async def store_insight(self, insight: CorrelationInsight) -> None: ...
    async def get_insights(self, project_path: str | None = None,
                           since: datetime | None = None) -> list[CorrelationInsight]: ...


class NoOpCorrelationStorage:
    """Keeps nothing."""

    async def store_insight(self, insight: CorrelationInsight) -> None:
        return None

    async def get_insights(self, project_path: str | None = None,
                           since: datetime | None = None) -> list[CorrelationInsight]:
        return []


class CorrelationStorageSQLite:
    """Insights in one SQLite file, readable by its owner only. The work is done in a thread; `conn`
    is None once the storage is closed."""
    SCHEMA = """CREATE TABLE IF NOT EXISTS insights
                    (project_path TEXT, timestamp TEXT, insight TEXT);
                CREATE INDEX IF NOT EXISTS by_project ON insights (project_path);
                CREATE INDEX IF NOT EXISTS by_time ON insights (timestamp);"""  # UTC; JSON

    def __init__(self, db_path: str | os.PathLike = "~/.claude/data/correlation_insights.db"):
        self.db_path, self._lock = os.path.expanduser(os.fspath(db_path)), threading.Lock()
        os.makedirs(os.path.dirname(self.db_path) or ".", mode=0o700, exist_ok=True)
        os.close(os.open(self.db_path, os.O_CREAT | os.O_RDWR, 0o600))
        self.conn = sqlite3.connect(self.db_path, check_same_thread=False)
        self.conn.executescript(self.SCHEMA)

    async def store_insight(self, insight: CorrelationInsight) -> None:
        moment = insight.timestamp.astimezone(timezone.utc).isoformat()
        record = json.dumps(dict(vars(insight), timestamp=moment))
        statement = "INSERT INTO insights VALUES (?, ?, ?)"
        await self._run(statement, insight.project_path, moment, record)

    async def get_insights(self, project_path: str | None = None, since: datetime | None = None,
                           until: datetime | None = None) -> list[CorrelationInsight]:
        """Those of one project (None: all) and period, newest first."""
        period = (at and at.astimezone(timezone.utc).isoformat() for at in (since, until))
        rows = await self._run(
            "SELECT insight FROM insights WHERE project_path = ifnull(?, project_path) AND "
            "timestamp BETWEEN ifnull(?, '') AND ifnull(?, 'z') ORDER BY timestamp DESC",
            project_path, *period)
        records = (json.loads(text) for text, in rows)
        return [CorrelationInsight(**dict(r, timestamp=datetime.fromisoformat(r["timestamp"])))
                for r in records]

    async def _run(self, statement: str, *values: Any) -> list[tuple]:
        def work() -> list[tuple]:
            with self._lock, self.conn:
                return self.conn.execute(statement, values).fetchall()
        return await asyncio.get_running_loop().run_in_executor(None, work)

    def close(self) -> None:
        if self.conn:
            self.conn.close()
            self.conn = None

    __del__ = close
