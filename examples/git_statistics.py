"""What a handful of points can and cannot show: rank correlation, permutation test, bootstrap; and where it is kept.

Used by git_insights.py; docs/git.md explains the terms. Every function that draws takes a seeded generator, so the
same data and seed give the same numbers.
"""
from __future__ import annotations

import json
import math
import os
import random
import sqlite3
import statistics
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from operator import mul
from typing import Any, Callable, Protocol, Sequence

from git_history import ratio

MIN_POINTS = 8  # points of a correlation, or sessions on each side of a split; fewer are "no evidence"
ALPHA = 0.05  # chance of one false "evidence" among all the relations of a report
REPEATS, WORK = 1_999, 1_000_000  # permutations or resamples; fewer for many points, to stay at WORK points drawn
SPLIT = [("%s per %s" % (words, unit), name, per)  # measure, amount and divisor (attributes of a session)
         for per, unit in (("user_turns", "user turn"), ("files_modified", "edited file"))
         for name, words in (("tokens", "tokens"), ("waste_tokens", "wasted tokens"), ("cost", "cost"))]
STRENGTHS = (("strong", 0.7), ("moderate", 0.4), ("weak", 0.2), ("none", 0.0))


@dataclass
class CorrelationInsight:
    """One relation; confidence = 1 - p. Without evidence strength is "none" and direction "neutral" whatever the
    coefficient: 0.9 in three points is not a strong relation."""
    correlation_type: str
    correlation_coefficient: float
    strength: str
    direction: str
    description: str
    confidence: float
    sample_size: int
    timestamp: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    interval: tuple[float, float] | None = None  # 95%; None below MIN_POINTS
    labels: tuple[str, str] = ("x", "y")
    points: list[tuple[float, float]] = field(default_factory=list)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the average of theirs: [10, 20, 20] -> [1.0, 2.5, 2.5]."""
    order, result, start = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values), 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for index in order[start:end]:
                result[index] = (start + 1 + end) / 2
            start = end
    return result


def unit_ranks(values: Sequence[float]) -> list[float]:
    """Ranks centred on 0 and scaled to length 1: rho is a sum of their products. Empty when all values are equal."""
    centred = [rank - (len(values) + 1) / 2 for rank in ranks(values)]
    length = math.sqrt(sum(map(mul, centred, centred)))
    return [rank / length for rank in centred] if length else []


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks; 0.0 where one side does not vary."""
    return round(sum(map(mul, unit_ranks(xs), unit_ranks(ys))), 12)  # not 0.9999999999999998 for 1


def permutation_p(xs: Sequence[float], ys: Sequence[float], rng: random.Random) -> float:
    """Two-sided: the share of shuffled pairings whose rho is at least as far from 0, (count + 1) / (shuffles + 1)."""
    left, right, repeats = unit_ranks(xs), unit_ranks(ys), max(199, min(REPEATS, WORK // (len(xs) or 1)))
    seen, count = abs(sum(map(mul, left, right))) - 1e-12, 0  # rounding must not turn a tie into a miss
    for _ in range(repeats):
        rng.shuffle(right)
        count += abs(sum(map(mul, left, right))) >= seen
    return (count + 1) / (repeats + 1)


def bootstrap(statistic: Callable[..., float], groups: Sequence[Sequence], rng: random.Random) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over groups, each resampled with replacement."""
    repeats = max(199, min(REPEATS, WORK // sum(map(len, groups))))
    drawn = sorted(statistic(*(rng.choices(group, k=len(group)) for group in groups)) for _ in range(repeats))
    return drawn[int(0.025 * (repeats - 1))], drawn[math.ceil(0.975 * (repeats - 1))]


def correlate(kind: str, points: Sequence[tuple[float, float]], unit: str = "sessions",
              labels: tuple[str, str] = ("x", "y"), *, tests: int = 1, seed: int = 0) -> CorrelationInsight:
    """The insight of one relation. Evidence takes MIN_POINTS points, an interval that leaves zero out, and
    p <= ALPHA / tests (Bonferroni, for `tests` relations looked at together). The same seed gives the same result."""
    rng, count, xs, ys = random.Random("%s:%s" % (seed, kind)), len(points), *([p[i] for p in points] for i in (0, 1))
    rho, p = spearman(xs, ys), permutation_p(xs, ys, rng)
    low, high = bootstrap(lambda drawn: spearman(*zip(*drawn)), [points], rng) if count >= MIN_POINTS else (-1.0, 1.0)
    strength = next(word for word, least in STRENGTHS if abs(rho) >= least)
    doubt = ("at least %d are needed" % MIN_POINTS if count < MIN_POINTS else
             "one side is the same in all" if len(set(xs)) == 1 or len(set(ys)) == 1 else
             "the interval crosses zero" if low <= 0 <= high else
             "chance explains it, with %d relations tested" % tests if p > ALPHA / tests else "")
    verdict = ("no evidence in %d %s: %s" % (count, unit, doubt) if doubt else "%s, %s in %d %s" % (
        strength, "they rise together" if rho > 0 else "one falls as the other rises", count, unit))
    text = "%s and %s: %s" % (*labels, verdict)
    if count >= MIN_POINTS:
        text += " (rho %+.2f, 95%% interval %+.2f to %+.2f, p = %.4f)" % (rho, low, high, p)
    direction = "neutral" if doubt else "positive" if rho > 0 else "negative"
    return CorrelationInsight(kind, rho, "none" if doubt else strength, direction, text, 1 - p, count,
                              interval=(low, high) if count >= MIN_POINTS else None, labels=tuple(labels),
                              points=list(points))


def median_change(before: Sequence[float], after: Sequence[float], rng: random.Random) -> dict[str, Any]:
    """The medians of two groups, their difference (after - before) with its 95% interval, and a verdict in words."""
    result = dict.fromkeys(("before", "after", "difference", "interval"))
    result.update(n_before=len(before), n_after=len(after), verdict="not enough sessions (%d a side)" % MIN_POINTS)
    if min(len(before), len(after)) >= MIN_POINTS:
        first, second = statistics.median(before), statistics.median(after)
        low, high = bootstrap(lambda b, a: statistics.median(a) - statistics.median(b), (before, after), rng)
        verdict = "no evidence of a change" if low <= 0 <= high else "lower after" if high < 0 else "higher after"
        result.update(before=first, after=second, difference=second - first, interval=(low, high), verdict=verdict)
    return result


def split_at(sessions: Sequence[Any], moment: datetime, seed: int = 0) -> list[dict[str, Any]]:
    """For each measure the medians before and after a moment, over the sessions that have something to divide by."""
    rows = []
    for measure, name, per in SPLIT:
        groups: tuple[list[float], list[float]] = ([], [])
        for s in sessions:
            rate = ratio(getattr(s, name), getattr(s, per))
            if rate is not None:
                groups[s.started_at >= moment].append(rate)
        rows.append(dict(median_change(*groups, random.Random("%s:%s" % (seed, measure))), measure=measure))
    return rows


class CorrelationStorage(Protocol):
    def store_insight(self, insight: CorrelationInsight, project_path: str) -> None: ...
    def get_insights(self, project_path: str | None, since: datetime | None) -> list[CorrelationInsight]: ...


class SqliteCorrelationStorage:
    """Insights in one SQLite file, readable by its owner only; opened for each call and closed after it."""
    SCHEMA = """CREATE TABLE IF NOT EXISTS insights (project_path TEXT, timestamp TEXT, insight TEXT);  -- UTC; JSON
                CREATE INDEX IF NOT EXISTS by_project ON insights (project_path);
                CREATE INDEX IF NOT EXISTS by_time ON insights (timestamp);"""

    def __init__(self, path: str) -> None:
        self.path = os.path.expanduser(path)

    def _connect(self) -> sqlite3.Connection:
        os.makedirs(os.path.dirname(self.path) or ".", mode=0o700, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self.path)
        connection.executescript(self.SCHEMA)
        return connection

    def store_insight(self, insight: CorrelationInsight, project_path: str = "") -> None:
        moment = insight.timestamp.astimezone(timezone.utc).isoformat()
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT INTO insights VALUES (?, ?, ?)", (
                project_path, moment, json.dumps(dict(vars(insight), timestamp=moment))))

    def get_insights(self, project_path: str | None = None, since: datetime | None = None,
                     until: datetime | None = None) -> list[CorrelationInsight]:
        """Those of one project (None: all) and period, newest first."""
        first, last = (moment and moment.astimezone(timezone.utc).isoformat() for moment in (since, until))
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT insight FROM insights WHERE project_path = ifnull(?, project_path) AND timestamp BETWEEN "
                "ifnull(?, '') AND ifnull(?, 'z') ORDER BY timestamp DESC", (project_path, first, last)).fetchall()
        records = (json.loads(text) for text, in rows)
        return [CorrelationInsight(**dict(r, timestamp=datetime.fromisoformat(r["timestamp"]))) for r in records]
