"""Tests of git_insights.py, on real git repositories in temporary directories, in its order."""

import asyncio
import json
import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from datetime import date, datetime, timedelta, timezone

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "git_insights.py")
sys.path.insert(0, HERE)
import git_history as gh  # noqa: E402  (found through the line above)
import git_insights as gi  # noqa: E402
import git_statistics as gs  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
UTC = timezone.utc
DAY0 = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)  # a Monday
ALL = (datetime(1930, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


class Repo:
    """A repository whose commits have given authors and times."""

    def __init__(self, path):
        self.path = os.path.realpath(str(path))
        os.makedirs(self.path, exist_ok=True)
        self.git("init", "-q", ".")
        self.git("symbolic-ref", "HEAD", "refs/heads/main")

    def git(self, *arguments, when=DAY0, author="Ann Dev <ann@example.com>", **more):
        name, mail = re.match(r"(.*) <(.*)>", author).groups()
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env.update(
            GIT_CONFIG_NOSYSTEM="1",
            GIT_CONFIG_GLOBAL=os.devnull,
            GIT_AUTHOR_NAME=name,
            GIT_AUTHOR_EMAIL=mail,
            GIT_COMMITTER_NAME=name,
            GIT_COMMITTER_EMAIL=mail,
            GIT_AUTHOR_DATE=when.isoformat(),
            GIT_COMMITTER_DATE=when.isoformat(),
        )
        return (
            subprocess.run(
                ["git", "-C", self.path, *arguments],
                env=env,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **more,
            )
            .stdout.decode("utf-8", "replace")
            .strip()
        )

    def write(self, name, text):
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as out:
            out.write(text)

    def commit(self, message, when=DAY0, author="Ann Dev <ann@example.com>", **files):
        for name, text in files.pop("files", {}).items():
            self.write(name, text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "--no-verify", "-m", message, when=when,
                 author=author)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repo(tmp_path):
    return Repo(tmp_path / "work")


def history(repo, since=ALL[0], until=ALL[1], **more):
    reader = gi.GitReader()
    return reader.history(reader.root(repo.path), since, until, **more)


def numbered(count, word="line"):
    return "".join("%s %d\n" % (word, i) for i in range(count))


def session(number=0, start=DAY0, minutes=60, **fields):
    """A session as a source gives it, before git is read."""
    record = dict(
        session_id="s%04d" % number,
        project_path="",
        started_at=start,
        ended_at=start + timedelta(minutes=minutes),
        duration_minutes=float(minutes),
        checkpoint_count=0,
        commit_count=None,
        quality_start=None,
        quality_end=None,
        quality_delta=None,
        avg_quality=90.0,
        files_modified=0,
        tools_used=[],
        primary_language=None,
        time_of_day="morning",
        tokens=1000,
        waste_tokens=100,
        cost=1.0,
        user_turns=1,
    )
    record.update(fields)
    return gi.ExtendedSessionMetrics(**record)


class Listed:
    """A source of given sessions."""

    def __init__(self, *sessions):
        self.listed = list(sessions)

    def sessions(self, root, since=None, until=None):
        return [s for s in self.listed
                if (since or s.started_at) <= s.started_at <= (until or s.started_at)]


# ---- Git ----


@pytest.mark.parametrize(
    "message, follows, breaks",
    [
        ("feat: add", True, False),
        ("feat(parser): add", True, False),
        ("fix(a b/c)!: drop", True, True),
        ("FEAT!: x", True, True),
        ("build-deps: x", True, False),
        ("feat: x\n\nbody", True, False),
        ("feat: x\r\n\r\nbody", True, False),
        ("feat: x\n\nbody\n\nBREAKING CHANGE: gone", True, True),
        ("feat: x\n\nBREAKING-CHANGE: gone", True, True),
        ("feat: x\n\nbody\n\nReviewed-by: Z\nRefs: #1\nBREAKING CHANGE: gone", True, True),
        ("feat: x\n\nFixes #12\nBREAKING CHANGE: gone", True, True),
        ("odd subject\n\nBREAKING CHANGE: gone", False, True),
        ("feat: x\n\nthe text\nBREAKING CHANGE: in prose", True, False),
        ("feat: x\n\nbreaking change: small", True, False),
        ("feat: x\n\nNo BREAKING CHANGE: here", True, False),
        ("feat:x", False, False),
        ("feat : x", False, False),
        ("feat():x", False, False),
        ("feat(): x", False, False),
        ("feat:  x", False, False),
        ("feat: ", False, False),
        ("feat!(a): x", False, False),
        ("Merge branch 'x'", False, False),
        ("", False, False),
        ("feat: x\nno blank line", False, False),
        ('Revert "feat: x"', False, False),
        ("two words: x", False, False),
        ("(scope): x", False, False),
    ],
)
def test_conventional_commits(message, follows, breaks):
    assert gh.conventional(message.encode()) == (follows, breaks)


def test_velocity_counts_merges_apart(repo):
    repo.commit("feat: one", files={"a": numbered(3)})
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("fix!: two", DAY0 + timedelta(hours=2), files={"b": numbered(2)})
    repo.git("checkout", "-q", "main")
    repo.commit("three", DAY0 + timedelta(hours=3), files={"a": numbered(2)})
    repo.git("merge", "-q", "--no-ff", "-m", "Merge side", "side", when=DAY0 + timedelta(hours=4))
    found = history(repo, DAY0, DAY0 + timedelta(days=14))
    pace = found.velocity()
    assert (pace.total_commits, found.merges) == (3, 1)
    assert pace.conventional_compliance_rate == pytest.approx(2 / 3)
    assert pace.breaking_change_count == 1
    assert (found.added, found.deleted) == (5, 1)
    assert (pace.commit_velocity_per_day, pace.avg_commits_per_week) == (pytest.approx(3 / 14), 1.5)
    assert pace.commit_velocity_per_hour == pytest.approx(3 / 14 / 24)
    assert (pace.most_active_day, pace.period_start) == (0, DAY0)
    with pytest.raises(AttributeError):
        pace.total_commits = 4


def test_rate_is_not_extrapolated_from_less_than_its_unit(repo):
    repo.commit("one")
    pace = history(repo, DAY0, DAY0 + timedelta(minutes=5)).velocity()
    assert (pace.commit_velocity_per_hour, pace.commit_velocity_per_day,
            pace.avg_commits_per_week) == (1, 1, 1)


def test_hours_are_as_committed(repo):
    for number, zone in enumerate((-8, 9, 9)):
        there = timezone(timedelta(hours=zone))
        repo.commit("c%d" % number, datetime(2026, 3, 4, 23, 30, tzinfo=there))
    pace = history(repo).velocity()
    assert (pace.most_active_hour, pace.most_active_day) == (23, 2)
    assert list(history(repo).days) == [date(2026, 3, 4)]


def test_period_goes_by_the_authored_time(repo):
    for day in range(6):
        repo.commit("day %d" % day, DAY0 + timedelta(days=day))
    found = history(repo, DAY0 + timedelta(days=2), DAY0 + timedelta(days=4))
    assert found.velocity().total_commits == 3


def test_author_filter_is_literal(repo):
    repo.commit("one", author="Ann Dev <ann+git@example.com>")
    repo.commit("two", author="Bob <bob@example.com>")
    count = {
        who: history(repo, author=who).velocity().total_commits
        for who in ("ann+git@", "Bob", "", ".*", "--all")
    }
    assert count == {"ann+git@": 1, "Bob": 1, "": 2, ".*": 0, "--all": 0}


def test_renames_and_odd_names(repo):
    names = [
        'quo"te',
        "tab\there",
        "new\nline",
        " lead",
        "-dash",
        "ünï",
        "{a => b}",
        "5\t6\tx",
        "*",
        ":(top)x",
        "\x01y",
    ]
    repo.commit("feat: all", files={name: numbered(5, name[:2].strip()) for name in names})
    for name in names:
        os.rename(os.path.join(repo.path, name), os.path.join(repo.path, name + ".moved"))
    repo.write("bin", "\0\1\2")
    moved = repo.commit("refactor: move")
    found = history(repo, spans=[ALL])
    changes = next(c.files for c in found.commits if c.sha == moved)
    assert sorted(changes) == sorted([(0, 0, n + ".moved", n) for n in names] + [(0, 0, "bin", "")])
    lines, complete = gi.GitReader().surviving_lines(repo.path, found.commits)
    assert complete and sum(lines.values()) == 5 * len(names) and lines[moved] == 0


def test_message_that_looks_like_numstat(repo):
    repo.commit("feat: x\n\n3\t4\tnot a file\n\x01also not", files={"a": "1\n"})
    found = history(repo, spans=[ALL])
    assert [c.files for c in found.commits] == [[(1, 0, "a", "")]]


def test_settings_and_environment_change_nothing(repo, tmp_path, monkeypatch):
    repo.commit("feat: one", files={"a": numbered(4), "b": "x\n"})
    repo.git("mv", "a", "c")
    repo.commit("fix: two", DAY0 + timedelta(days=1), author="Bob <b@example.com>")
    expected = [c._replace(authored=c.authored.isoformat())
                for c in history(repo, spans=[ALL]).commits]
    other = Repo(tmp_path / "other")
    for name, value in {
        "log.showSignature": "true",
        "color.ui": "always",
        "core.pager": "false",
        "log.date": "relative",
        "format.pretty": "raw",
        "diff.renames": "false",
        "diff.noprefix": "true",
        "log.showRoot": "false",
        "log.decorate": "full",
        "core.quotePath": "true",
        "i18n.logOutputEncoding": "UTF-16",
        "grep.patternType": "perl",
        "blame.ignoreRevsFile": "missing",
        "diff.external": "false",
        "log.diffMerges": "m",
        "diff.relative": "true",
        "blame.coloring": "repeatedLines",
        "core.fsmonitor": "false",
    }.items():
        repo.git("config", name, value)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, other.path + "/.git")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    found = history(repo, spans=[ALL])
    assert [c._replace(authored=c.authored.isoformat()) for c in found.commits] == expected
    assert sum(gi.GitReader().surviving_lines(repo.path, found.commits)[0].values()) == 5


def test_out_of_range_zone_does_not_stop_the_reading(repo):
    stream = b"".join(
        b"commit refs/heads/main\ncommitter A <a@b> %d %s\ndata 1\nx\n" % (when, zone)
        for when, zone in ((1772442000, b"+0000"), (1772442001, b"-0700"), (1772442002, b"+1400"))
    )
    repo.git("fast-import", "--quiet", input=stream)
    raw = repo.git("cat-file", "commit", "main").replace("+1400", "+9900").encode()
    repo.git(
        "update-ref",
        "refs/heads/main",
        repo.git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", input=raw + b"\n"),
    )
    assert history(repo).velocity().total_commits == 3


def fast_import(repo, count, files=200, lines=40, seed=1):
    """`count` commits five minutes apart, four lines of one file rewritten in each."""
    rng, now, texts, stream = random.Random(seed), int(DAY0.timestamp()), {}, []
    for number in range(count):
        name = rng.randrange(files)
        text = texts.setdefault(name, [b"line %d" % i for i in range(lines)])
        for _ in range(4):
            text[rng.randrange(lines)] = b"v %d" % number
        body, message = (
            b"\n".join(text) + b"\n",
            b"%s: change %d\n\nA body.\n" % (b"fix" if number % 2 else b"odd one", number),
        )
        stream.append(
            b"commit refs/heads/main\ncommitter D <d@x> %d +0200\ndata %d\n%s"
            b"M 100644 inline d%d/f%d.py\ndata %d\n%s\n"
            % (now + 300 * number, len(message), message, name % 9, name, len(body), body)
        )
    repo.git("fast-import", "--quiet", input=b"".join(stream))


def test_five_thousand_commits(repo):
    fast_import(repo, 5_000)
    spans = [(DAY0 + timedelta(days=day), DAY0 + timedelta(days=day, hours=1)) for day in range(5)]
    found = history(repo, spans=spans)
    pace = found.velocity()
    assert (pace.total_commits, pace.conventional_compliance_rate) == (5_000, 0.5)
    assert len(found.commits) == 5 * 13  # every five minutes, both ends included
    expected = [line.split("\t") for line in repo.git("log", "--numstat", "--format=").split("\n")
                if line]
    assert found.added == sum(int(row[0]) for row in expected)
    assert found.deleted == sum(int(row[1]) for row in expected)
    lines, complete = gi.GitReader().surviving_lines(repo.path, found.commits)
    text = "\n".join(
        repo.git("show", "HEAD:" + name)
        for name in repo.git("ls-tree", "-r", "--name-only", "HEAD").split()
    )
    numbers = lines_by_version(text)
    subjects = dict(line.split(" ", 1) for line in repo.git("log", "--format=%H %s").split("\n"))
    for commit in found.commits:
        number = int(subjects[commit.sha].split()[-1])
        if commit.files[0][1]:  # a first commit also brings the lines nobody changed since
            assert lines[commit.sha] == numbers.get(number, 0)
    assert complete


def lines_by_version(text):
    numbers = {}
    for found in re.findall(r"^v (\d+)$", text, re.M):
        numbers[int(found)] = numbers.get(int(found), 0) + 1
    return numbers


def test_surviving_lines_follow_renames_by_others(repo):
    first = repo.commit("feat: ten", files={"a.py": numbered(10)})
    repo.git("mv", "a.py", "b.py")
    repo.commit("mv", DAY0 + timedelta(days=1), author="Bob <b@x>")
    repo.git("mv", "b.py", "c.py")
    repo.commit("mv", DAY0 + timedelta(days=2), author="Bob <b@x>", files={"a.py": "other\n"})
    repo.commit("cut", DAY0 + timedelta(days=3), files={"c.py": numbered(7)})
    found = history(repo, author="Ann", spans=[(DAY0, DAY0)])
    assert gi.GitReader().surviving_lines(repo.path, found.commits) == ({first: 7}, True)


def test_files_that_are_gone_and_limits(repo, monkeypatch):
    repo.commit("feat: x", files={"a": numbered(3), "b": numbered(3)})
    os.remove(os.path.join(repo.path, "a"))
    repo.commit("rm", DAY0 + timedelta(days=1))
    commits = history(repo, spans=[ALL]).commits
    lines, complete = gi.GitReader().surviving_lines(repo.path, commits)
    assert sum(lines.values()) == 3 and complete
    monkeypatch.setattr(gh, "BLAME_FILES", 1)
    assert gi.GitReader().surviving_lines(repo.path, commits)[1] is False
    monkeypatch.setattr(gh, "BLAME_SECONDS", 0)
    assert gi.GitReader().surviving_lines(repo.path, commits)[1] is False


def test_no_commits(repo):
    pace = history(repo).velocity()
    assert (pace.total_commits, pace.most_active_hour) == (0, None)
    assert pace.conventional_compliance_rate == 0.0


def test_shallow_clone_does_not_count_the_cut_commit(repo, tmp_path):
    for number in range(5):
        repo.commit("feat: %d" % number, DAY0 + timedelta(days=number),
                    files={"f%d" % number: numbered(10)})
    repo.git("clone", "-q", "--depth", "2", "file://" + repo.path, str(tmp_path / "shallow"))
    found = gi.GitReader().history(str(tmp_path / "shallow"), *ALL)
    assert (found.shallow, found.total, found.added) == (True, 2, 10)
    assert history(repo).shallow is False


def test_errors_are_named(tmp_path, monkeypatch):
    reader = gi.GitReader()
    with pytest.raises(gi.InsightsError, match="is no directory"):
        reader.root(str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(gi.InsightsError, match="not a git repository"):
        reader.root(str(tmp_path))
    Repo(tmp_path / "x").git("init", "-q", "--bare", str(tmp_path / "bare"))
    with pytest.raises(gi.InsightsError, match="work tree"):
        reader.root(str(tmp_path / "bare"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gi.InsightsError, match="install it"):
        reader.root(str(tmp_path))


# ---- Statistics ----


def test_ranks_share_ties():
    assert gs.ranks([10, 20, 20, 5]) == [2.0, 3.5, 3.5, 1.0]
    assert gs.ranks([7, 7, 7]) == [2.0, 2.0, 2.0]
    assert gs.ranks([]) == []


def test_spearman_worked_examples():
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    # the sum of d^2 is 194: rho = 1 - 6 * 194 / (10 * 99) = -29/165
    assert gs.spearman(iq, hours) == pytest.approx(-29 / 165)
    # with ties, Pearson's formula on the ranks 1 2.5 2.5 4 and 1 3 2 4: 4.5 / sqrt(4.5 * 5)
    assert gs.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert gs.spearman([1, 2, 3], [8, 9, 30]) == 1.0
    assert gs.spearman([1, 2, 3], [3, 2, 1]) == -1.0
    assert gs.spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_permutation_p_against_all_permutations():
    xs, ys = list(range(6)), [0, 2, 1, 3, 5, 4]  # rho 0.886; of 720 pairings 24 are as far from 0
    p = gs.permutation_p(xs, ys, random.Random(1))
    assert p == pytest.approx(24 / 720, abs=0.012)
    assert gs.permutation_p([1] * 9, list(range(9)), random.Random(1)) == 1.0
    assert gs.permutation_p(list(range(20)), list(range(20)), random.Random(1)) == 1 / 2000


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(5)
    for count in (5, 12, 60):
        for _ in range(10):
            xs = [rng.randrange(6) for _ in range(count)]
            ys = [x + rng.gauss(0, 3) for x in xs]
            expected = stats.spearmanr(xs, ys)
            assert gs.spearman(xs, ys) == pytest.approx(expected[0])
            assert list(gs.ranks(xs)) == list(stats.rankdata(xs))
            if count == 60:  # the t approximation is good enough there
                assert gs.permutation_p(xs, ys, rng) == pytest.approx(expected[1], abs=0.03)


def planted(rng, count, rho):
    """Pairs of a bivariate normal with that correlation; Spearman's is 6/pi * asin(rho/2)."""
    xs = [rng.gauss(0, 1) for _ in range(count)]
    return [(x, rho * x + (1 - rho * rho) ** 0.5 * rng.gauss(0, 1)) for x in xs]


@pytest.mark.parametrize(
    "rho, word, direction",
    [
        (0.9, "strong", "positive"),
        (-0.9, "strong", "negative"),
        (0.6, "moderate", "positive"),
        (-0.6, "moderate", "negative"),
    ],
)
def test_planted_correlation_is_found(rho, word, direction):
    found = gi.correlate("planted", planted(random.Random(3), 120, rho), tests=4)
    assert (found.strength, found.direction, found.sample_size) == (word, direction, 120)
    assert found.correlation_coefficient == pytest.approx(rho, abs=0.12)
    assert found.interval[0] < rho < found.interval[1]
    assert found.confidence == pytest.approx(1 - 1 / 2000)


def test_interval_holds_the_truth_in_most_runs(monkeypatch):
    monkeypatch.setattr(gs, "REPEATS", 299)
    rng, held = random.Random(8), 0
    for _ in range(100):
        low, high = gi.correlate("x", planted(rng, 40, 0.5)).interval
        held += low <= 0.483 <= high
    assert held >= 88


def independent_report(seed, monkeypatch):
    rng = random.Random(seed)
    listed = [
        session(
            i,
            DAY0 + timedelta(days=i),
            avg_quality=rng.uniform(50, 100),
            waste_tokens=rng.randrange(10_000),
            cost=rng.expovariate(1),
            git_velocity_per_hour=float(rng.randrange(6)),
            lines_surviving=rng.randrange(300),
            git_conventional_compliance=rng.random(),
        )
        for i in range(rng.randrange(10, 40))
    ]
    found = gi.History("", *ALL)
    found.days.update({(DAY0 + timedelta(days=i)).astimezone().date(): rng.randrange(9)
                       for i in range(40)})
    return gi.insights_of(gi.Report(found, listed, [], True, []), seed)


def test_independent_data_is_no_evidence(monkeypatch):
    """All four relations of a report stay silent in at least 90 of 100 runs."""
    monkeypatch.setattr(gs, "REPEATS", 299)
    reports = [independent_report(seed, monkeypatch) for seed in range(100)]
    assert all(len(report) == 4 for report in reports)
    assert sum(all("no evidence" in insight.description for insight in report)
               for report in reports) >= 90


def day_series(rng, count, shared):
    """Days that hang together: an autoregression of order 1 with that correlation of neighbours."""
    value, found = rng.gauss(0, 1), []
    for _ in range(count):
        found.append(value)
        value = shared * value + (1 - shared * shared) ** 0.5 * rng.gauss(0, 1)
    return found


@pytest.mark.parametrize("days", [30, 90])
def test_days_that_hang_together_raise_no_false_alarm(monkeypatch, days):
    """Independent, of autocorrelation 0.8: at most 6% evidence; shuffled days give 15% and more."""
    monkeypatch.setattr(gs, "REPEATS", 199)
    monkeypatch.setattr(gs, "power_at", lambda *arguments: 0.0)
    rng, alarms = random.Random(days), {True: 0, False: 0}
    for seed in range(80):
        points = list(zip(day_series(rng, days, 0.8), day_series(rng, days, 0.8)))
        for series in alarms:
            alarms[series] += gs.correlate("x", points, tests=1, seed=seed,
                                           series=series).strength != "none"
    assert alarms[True] <= 0.06 * 80 and alarms[False] >= 0.15 * 80


def test_blocks_are_as_long_as_the_days_hang_together():
    rng = random.Random(6)
    lengths = {shared: [gs.block_length(day_series(rng, 200, shared), day_series(rng, 200, shared))
                        for _ in range(20)] for shared in (0.0, 0.4, 0.8)}
    middle = {shared: sorted(found)[10] for shared, found in lengths.items()}
    assert middle[0.0] == 1 and 2 <= middle[0.4] <= 7 and 15 <= middle[0.8] <= 30
    assert gs.block_length([], []) == 1 and gs.block_length(range(9), range(9)) == 9
    trend = gs.correlate("k", [(i, i) for i in range(60)], series=True)
    assert "so alike that they count as 1" in trend.description


def test_a_series_without_memory_is_still_evidence():
    points = planted(random.Random(2), 60, 0.7)
    assert gs.correlate("k", points, series=True).direction == "positive"


@pytest.mark.parametrize("count", [8, 12, 20])
def test_power_is_what_a_simulation_shows(monkeypatch, count):
    """The power that is said is the share of samples with a rho of 0.7 in which it is seen."""
    monkeypatch.setattr(gs, "REPEATS", 299)
    rng, seen, said = random.Random(count), 0, []
    pearson = 2 * 0.3583679495453  # 2 sin(pi * 0.7 / 6)
    for seed in range(80):
        found = gs.correlate("k", planted(rng, count, pearson), tests=4, seed=seed)
        seen += found.strength != "none"
        said.append(found.power)
    assert sum(said) / 80 == pytest.approx(seen / 80, abs=0.13)
    assert "would be seen in" in gs.correlate("k", [(i, i * 5 % 11) for i in range(11)]).description


def test_same_seed_same_numbers():
    points = planted(random.Random(4), 30, 0.5)
    first, second, other = (gi.correlate("k", points, seed=seed) for seed in (1, 1, 2))
    assert (first.interval, first.confidence) == (second.interval, second.confidence)
    assert first.interval != other.interval


@pytest.mark.parametrize(
    "points, words",
    [
        ([], "no evidence in 0 sessions"),
        ([(1, 1)], "no evidence in 1 sessions"),
        ([(i, i) for i in range(5)], "no evidence in 5 sessions"),
        ([(i, i) for i in range(7)], "no evidence in 7 sessions"),
        ([(i, 3) for i in range(9)], "the same in all"),
        ([(i, i * 5 % 11) for i in range(11)], "crosses zero"),
    ],
)
def test_what_cannot_be_shown_is_said(points, words):
    found = gi.correlate("k", points)
    assert words in found.description
    assert (found.strength, found.direction, found.sample_size) == ("none", "neutral", len(points))


def test_eight_points_can_be_evidence():
    assert gi.correlate("k", [(i, 2 * i) for i in range(8)], tests=4).strength == "strong"


@pytest.mark.parametrize("count, repeats",
                         [(8, 1_999), (500, 1_999), (3_000, 333), (90_000, 199), (0, 1_999)])
def test_many_points_are_drawn_less_often(count, repeats):
    assert gs.repeats_for(count) == repeats


def test_no_power_where_no_order_of_the_points_would_be_evidence():
    """One session of ten differs: even in perfect order that happens by chance once in ten."""
    found = gs.correlate("k", [(0, i) for i in range(9)] + [(1, 9)])
    assert found.strength == "none" and found.power == 0.0
    varied = gs.correlate("k", [(i * 7 % 10, i) for i in range(10)])
    assert varied.strength == "none" and varied.power > 0.4


def test_split_finds_a_change_and_says_when_it_cannot():
    rng = random.Random(2)
    listed = [
        session(
            i,
            DAY0 + timedelta(days=i),
            tokens=int(rng.gauss(9_000 if i < 15 else 4_000, 500)),
            user_turns=2,
            files_modified=i % 2,
            waste_tokens=rng.randrange(100, 200),
        )
        for i in range(30)
    ]
    rows = {row["measure"]: row for row in gi.split_at(listed, DAY0 + timedelta(days=15))}
    change = rows["tokens per user turn"]
    assert (change["n_before"], change["n_after"], change["verdict"]) == (15, 15, "lower after")
    assert change["interval"][0] < -2_500 < change["interval"][1]
    assert change["difference"] == pytest.approx(-2_500, abs=300)
    assert rows["wasted tokens per user turn"]["verdict"] == "no evidence of a change"
    assert rows["tokens per edited file"]["verdict"].startswith("not enough sessions")
    assert rows["tokens per edited file"]["n_before"] == 7
    assert len(rows) == 6


# ---- Joining ----


def wrote(ids=(), made=(), **writes):
    """Traces: minutes after DAY0 at which files were written."""
    at = {name: sorted(DAY0.timestamp() + 60 * m for m in minutes)
          for name, minutes in writes.items()}
    return gi.Traces(frozenset(ids), at, tuple(made))


def joined(repo, *sessions, checkpoints=()):
    commits = sorted(history(repo, spans=[ALL]).commits, key=lambda commit: commit.authored)
    joiner = gi.Joiner(sessions, dict(checkpoints))
    found = [joiner.join(commit) for commit in commits]
    return [(commit.subject, *(join[1:3] if join else (None, None)))
            for commit, join in zip(commits, found)]


def minute(count):
    return DAY0 + timedelta(minutes=count)


def test_files_of_the_hour_before_most_and_newest_win(repo):
    listed = [
        session(1, traces=wrote(a=[10], b=[11], c=[12])),
        session(2, traces=wrote(c=[14], d=[50])),
        session(3, minutes=1, traces=wrote(e=[0])),
        session(4),
    ]
    for name, when, *files in [
        ("most files", 20, "a", "b", "c"),
        ("newest write", 21, "c"),
        ("spent", 22, "a"),
        ("after its end", 59, "e"),
        ("written after", 49, "d"),
        ("an hour later", 111, "d"),
        ("nobody's", 30, "z"),
    ]:
        repo.commit(name, minute(when), files={f: "%s %d\n" % (f, when) for f in files})
    listed[3] = session(4, traces=wrote())
    assert joined(repo, *listed) == [
        ("most files", "s0001", "files"),
        ("newest write", "s0002", "files"),
        ("spent", None, None),
        ("nobody's", None, None),
        ("written after", None, None),
        ("after its end", "s0003", "files"),
        ("an hour later", None, None),
    ]


def test_a_session_that_records_no_files_is_matched_by_time(repo):
    repo.commit("within", minute(5), files={"a": "1"})
    repo.commit("after", minute(61), files={"a": "2"})
    assert joined(repo, session(1)) == [("within", "s0001", "time"), ("after", None, None)]


@pytest.mark.parametrize(
    "trailer, expected",
    [
        ("Entire-Checkpoint: 0a1b2c3d4e5f", ("s0001", "trailer")),
        ("Entire-Checkpoint: ffffffffffff", ("s0002", "files")),  # known to nobody: no evidence
        ("Entire-Checkpoint: eeeeeeeeeeee", (None, None)),  # of a session that is not here
        ("Claude-Session: https://claude.ai/code/session_01AbC", ("s0001", "trailer")),
        ("Co-Authored-By: Agent <0BB9A2D9-A51E-4D5A-8275-566c766a0ff2@agent.example>",
         ("s0001", "trailer")),
        ("Co-Authored-By: Claude <noreply@anthropic.com>", ("s0002", "files")),
        ("Co-Authored-By: s0001 <noreply@anthropic.com>",
         ("s0002", "files")),  # too short for an id
        ("In prose, Claude-Session: session_01AbC", ("s0002", "files")),
    ],
)
def test_trailers_come_first(repo, trailer, expected):
    names = ("0bb9a2d9-a51e-4d5a-8275-566c766a0ff2", "session_01abc", "s0001")
    listed = [session(1, traces=wrote(names)), session(2, traces=wrote(a=[3]))]
    repo.commit("x\n\nBody.\n\n" + trailer, minute(5), files={"a": "1"})
    checkpoints = {"0a1b2c3d4e5f": {names[0]}, "eeeeeeeeeeee": {"somebody-else"}}
    assert joined(repo, *listed, checkpoints=checkpoints) == [("x", *expected)]


def test_an_id_printed_twice_is_of_the_command_at_that_time(repo):
    """A fork of a transcript repeats what git printed."""
    sha, at = repo.commit("fix: x", minute(5)), minute(5).timestamp()
    told = [gi.Made(at + late, at + late, frozenset({sha[:size]}), frozenset())
            for late, size in ((900, 9), (1, 7))]
    listed = [session(number, traces=wrote(made=[made])) for number, made in enumerate(told)]
    for order in (listed, listed[::-1]):
        assert joined(repo, *order) == [("fix: x", "s0001", "commit line")]


@pytest.mark.parametrize("ref", ["refs/heads/entire/checkpoints/v1",
                                 "refs/remotes/origin/entire/sessions"])
def test_checkpoint_branches_name_sessions(repo, ref):
    repo.commit("one")
    repo.git("checkout", "-q", "--orphan", "kept")
    repo.commit("kept", files={
        "0a/1b2c3d4e5f/0/metadata.json": json.dumps({"session_id": "first"}, indent=2),
        "0a/1b2c3d4e5f/1/metadata.json": json.dumps({"sessionID": "second"}),
        "0a/1b2c3d4e5f/0/full.jsonl": json.dumps({"session_id": "not this"})})
    repo.git("update-ref", ref, "kept")
    repo.git("checkout", "-q", "main")
    assert gi.GitReader().checkpoints(repo.path) == {"0a1b2c3d4e5f": {"first", "second"}}
    assert gi.GitReader().checkpoints(Repo(repo.path + "/none").path) == {}


def test_commit_lines_and_commands(repo):
    first = repo.commit("fix: the first", minute(5), files={"a": "1"})
    repo.commit("feat: rebased", minute(20), files={"b": "1"})
    repo.commit("unnamed", minute(40), files={"c": "1"})
    repo.commit("of another, at that time", minute(40.1), files={"e": "1"})
    repo.commit("fix: by a human at that time", minute(41), files={"d": "1"})
    at = DAY0.timestamp()
    own = [
        gi.Made(at + 9e5, at + 9e5, frozenset({first[:7]}),
                frozenset()),  # the id tells, whatever the clock
        gi.Made(at + 1190, at + 1205, frozenset({"0" * 7}), frozenset({"feat: rebased"})),
        gi.Made(at + 2390, at + 2410, frozenset(), frozenset()),
        gi.Made(at + 2450, at + 2470, frozenset(), frozenset({"another subject"})),
    ]
    other = session(2, traces=wrote(a=[3], b=[3], c=[3, 4], e=[3]))
    assert joined(repo, session(1, traces=wrote(made=own, c=[3])), other) == [
        ("fix: the first", "s0001", "commit line"),
        ("feat: rebased", "s0001", "commit command"),
        ("unnamed", "s0001", "commit command"),
        ("of another, at that time", "s0002", "files"),
        ("fix: by a human at that time", None, None),
    ]


def test_collect_joins_and_divides(repo):
    repo.commit("feat: start", DAY0 + timedelta(minutes=5), files={"a.py": numbered(10)})
    repo.commit("fix!: less", DAY0 + timedelta(minutes=65), files={"a.py": numbered(8) + "x\ny\n"})
    listed = Listed(
        session(1, minutes=60, cost=2.0),
        session(2, DAY0 + timedelta(hours=1), cost=3.0),
        session(3, DAY0 + timedelta(days=1), cost=5.0),
    )
    report = gi.collect(gi.GitReader(), listed.listed, repo.path, *ALL)
    first, second, third = (s.to_dict() for s in report.sessions)
    assert (first["commit_count"], first["lines_changed"], first["lines_surviving"]) == (1, 10, 8)
    assert (first["cost_per_commit"], first["cost_per_surviving_line"],
            first["tokens_per_commit"]) == (
        2.0,
        0.25,
        1000,
    )
    assert (second["lines_changed"], second["lines_surviving"],
            second["git_breaking_changes"]) == (4, 2, 1)
    assert (second["files_modified"], second["primary_language"]) == (1, "Python")
    assert (third["commit_count"], third["cost_per_commit"],
            third["cost_per_surviving_line"]) == (0, None, None)
    assert third["git_conventional_compliance"] is None and third["git_velocity_per_hour"] == 0
    assert len(report.joins) == 2 and json.dumps(first)


def test_planted_relation_of_sessions_and_commits(repo):
    """More commits in better sessions, fewer surviving lines in dearer ones: the right signs."""
    listed, stream, mark = [], [], int(DAY0.timestamp())
    for day, rank in enumerate(random.Random(1).sample(range(24), 24)):
        start = DAY0 + timedelta(days=day)
        waste = 900 - 30 * rank
        listed.append(session(day, start, avg_quality=50.0 + rank, cost=100.0 - rank,
                              waste_tokens=waste))
        for commit in range(rank // 2 + 1):
            when = mark + 86_400 * day + 60 * commit
            stream.append(
                b"commit refs/heads/main\ncommitter A <a@b> %d +0000\ndata 6\nfeat:x\n"
                b"M 100644 inline f%d\ndata 4\n1\n2\n\n"
                % (when, when)
            )
    repo.git("fast-import", "--quiet", input=b"".join(stream))
    report = gi.collect(gi.GitReader(), listed, repo.path, *ALL)
    found = {i.correlation_type: (i.strength, i.direction) for i in gi.insights_of(report)}
    assert found == {
        "quality_vs_velocity": ("strong", "positive"),
        "conventional_vs_quality": ("none", "neutral"),
        "waste_vs_commits": ("strong", "negative"),
        "cost_vs_surviving_lines": ("strong", "negative"),
    }


def test_waste_is_a_share_since_activity_is_no_evidence(repo):
    """Twice the work is twice the waste and twice the commits: no relation of waste to commits."""
    rng, report = random.Random(3), gi.Report(gi.History("", *ALL), [], [], True, [])
    for day in range(40):
        work, start = rng.randrange(1, 9), DAY0 + timedelta(days=day)
        tokens = 1_000 * work
        report.sessions.append(
            session(day, start, tokens=tokens, waste_tokens=int(tokens * rng.uniform(0.1, 0.3))))
        report.history.days[start.astimezone().date()] = work
    found = {i.correlation_type: i for i in gi.insights_of(report)}["waste_vs_commits"]
    assert found.strength == "none" and abs(found.correlation_coefficient) < 0.4
    totals = [(s.waste_tokens, s.tokens) for s in report.sessions]
    assert gs.spearman(*zip(*totals)) > 0.8  # what the sums would have shown


# ---- The truth ----


class World:
    """A repository, agents in several work trees, a human among them, and a book of who made what.

    The book is kept by the script that acts; nothing of it is read from git or from a session."""

    def __init__(self, folder, seed, trailers=True):
        self.folder, self.rng, self.trailers = str(folder), random.Random(seed), trailers
        self.repo, self.truth, self.count = Repo(os.path.join(self.folder, "work")), {}, 0
        self.logs = os.path.join(self.folder, "logs")
        os.makedirs(self.logs)
        self.repo.commit("start", DAY0 - timedelta(days=1),
                         files={"f%02d.py" % n: numbered(6) for n in range(40)})
        self.agents, self.plan, self.recent = [], [], []

    def at(self, tree, *arguments, when):
        moment = {"when": when}
        return self.repo.git("-C", tree, *arguments, **moment)

    def change(self, tree, name, who):
        self.count += 1
        with open(os.path.join(tree, name), "a", encoding="utf-8") as out:
            out.write("%s %d\n" % (who, self.count))

    def commit(self, tree, names, when, who, subject=None, body=""):
        """Commit these files, write down who did it, and return what git printed."""
        self.count += 1
        subject = subject or "change %d" % self.count
        self.truth[subject] = who
        self.at(tree, "add", *names, when=when)
        self.at(tree, "commit", "-q", "-m", subject + body, "--", *names, when=when)
        short = self.at(tree, "rev-parse", "--short", "HEAD", when=when)
        return "[main %s] %s\n %d files changed" % (short, subject, len(names))

    def run(self, agents=14):
        """All that happens, in the order of time."""
        for number in range(agents):
            start = DAY0 + timedelta(minutes=self.rng.randrange(0, 60 * 30))
            tree = self.repo.path
            if number % 3:
                tree = os.path.join(self.folder, "work-worktrees", "w%02d" % number)
                self.at(self.repo.path, "worktree", "add", "-q", "-b", "w%02d" % number, tree,
                        when=DAY0)
            self.agents.append(Agent(self, number, tree, start))
        for agent in self.agents:
            agent.schedule()
        for _ in range(30):
            self.plan.append((DAY0 + timedelta(minutes=self.rng.randrange(0, 60 * 32)), self.human))
        while self.plan:
            self.plan.sort(key=lambda step: step[0])
            when, act = self.plan.pop(0)
            act(when)
        end = DAY0 + timedelta(days=3)
        self.keep_checkpoints()
        for agent in self.agents:
            agent.save()
            if agent.tree != self.repo.path:  # rebased, merged, and the work tree is gone
                self.at(agent.tree, "checkout", "-q", "--force", ".", when=end)
                self.at(agent.tree, "rebase", "-q", "-X", "theirs", "main", when=end)
                self.at(self.repo.path, "checkout", "-q", "--force", ".", when=end)
                self.at(self.repo.path, "merge", "-q", "--ff-only", "w%02d" % agent.number,
                        when=end)
                self.at(self.repo.path, "worktree", "remove", "--force", agent.tree, when=end)

    def keep_checkpoints(self):
        told = [("%012x" % agent.number, json.dumps({"session_id": agent.name}, indent=1))
                for agent in self.agents]
        files = "".join("M 100644 inline %s/%s/0/metadata.json\ndata %d\n%s\n" % (
            name[:2], name[2:], len(text), text) for name, text in told)
        head = "commit refs/heads/entire/checkpoints/v1\ncommitter A <a@b> 1 +0000\ndata 0\n"
        self.repo.git("fast-import", "--quiet", input=(head + files).encode())

    def human(self, when):
        """Somebody edits a file or two of their own and commits them a little later."""
        names = self.rng.sample(["f%02d.py" % n for n in range(40)], self.rng.randrange(1, 3))
        if self.recent and self.rng.random() < 0.5:  # a file that an agent worked on just before
            names = [self.rng.choice(self.recent[-6:])]
        for name in names:
            self.change(self.repo.path, name, "human")
        self.commit(self.repo.path, names, when, None)


class Agent:
    """One session: it writes files and commits them itself, or leaves that to a human."""

    def __init__(self, world, number, tree, start):
        self.world, self.number, self.tree, self.start = world, number, tree, start
        self.name, self.lines, self.dirty = "0000%04d-0000-4000-8000-000000000000" % number, [], []
        self.say("user", start, [{"type": "text", "text": "work"}])

    def say(self, kind, when, content, **more):
        message = {"role": kind, "content": content}
        if kind == "assistant":
            message.update(id="msg_%d_%d" % (self.number, len(self.lines)),
                           model="claude-sonnet-4-5", type="message",
                           usage=dict(input_tokens=10, output_tokens=50, cache_read_input_tokens=0,
                                      cache_creation_input_tokens=200))
        self.lines.append(dict(
            type=kind, message=message, sessionId=self.name, cwd=self.tree, version="2.1.0",
            isSidechain=False,
            uuid="u-%d-%d" % (self.number, len(self.lines)),
            timestamp=when.isoformat().replace("+00:00", "Z"), **more))

    def tool(self, when, name, result, **arguments):
        key = "toolu_%d_%d" % (self.number, len(self.lines))
        self.say("assistant", when,
                 [{"type": "tool_use", "id": key, "name": name, "input": arguments}])
        self.say("user", when + timedelta(seconds=2),
                 [{"type": "tool_result", "tool_use_id": key, "content": result}])

    def schedule(self):
        rng, when = self.world.rng, self.start
        for _ in range(rng.randrange(2, 6)):
            for _ in range(rng.randrange(1, 4)):
                when += timedelta(minutes=rng.randrange(1, 6))
                self.world.plan.append((when, self.write))
            when += timedelta(minutes=rng.randrange(1, 4))
            self.world.plan.append((when, self.finish))
            when += timedelta(minutes=rng.randrange(5, 20))

    def write(self, when):
        name = "f%02d.py" % self.world.rng.randrange(40)
        self.world.change(self.tree, name, self.name)
        self.world.recent.append(name)
        self.tool(when, "Edit", "The file has been updated.",
                  file_path=os.path.join(self.tree, name),
                  old_string="a", new_string="b")
        self.dirty = sorted({*self.dirty, name})

    def finish(self, when):
        how, names, self.dirty = self.world.rng.random(), self.dirty, []
        if not names:
            return
        if how < 0.4:  # a human commits the session's work, mostly soon
            when += timedelta(minutes=self.world.rng.randrange(1, 70))
            self.world.plan.append((when, lambda late: self.committed(late, names, self.name, "")))
            return
        signed = self.world.trailers and how < 0.6
        body = "\n\nEntire-Checkpoint: %012x" % self.number if signed else ""
        printed = self.committed(when, names, self.name, body)
        subject = printed.partition("] ")[2].partition("\n")[0]
        quoted = '"$(cat <<\'EOF\'\n%s\nEOF\n)"' % subject if how < 0.8 else '"%s"' % subject
        self.tool(when - timedelta(seconds=1), "Bash", printed,
                  command="git add -A && git commit -m " + quoted)

    def committed(self, when, names, who, body):
        """Nothing where another's commit already took these changes along."""
        states = self.world.at(self.tree, "status", "--porcelain", "--", *names, when=when)
        names = [line[-6:] for line in states.split("\n") if line]
        return self.world.commit(self.tree, names, when, who, body=body) if names else ""

    def save(self):
        with open(os.path.join(self.world.logs, self.name + ".jsonl"), "w",
                  encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n"
                           for line in sorted(self.lines, key=lambda line: line["timestamp"]))


def quality_of(world, store):
    """(precision, recall, joins by evidence) against the book."""
    source = gi.StoreSource(gi.SessionOptimizer(str(store)))
    report = gi.collect(gi.GitReader(), source.sessions(world.repo.path), world.repo.path, *ALL)
    subjects = dict(line.split(" ", 1)
                    for line in world.repo.git("log", "--format=%H %s").split("\n"))
    told = {subjects[join.commit]: join for join in report.joins}
    right = [subject for subject, join in told.items() if world.truth.get(subject) == join.session]
    made = [subject for subject in subjects.values() if world.truth.get(subject)]
    by = {}
    for subject, join in told.items():
        by.setdefault(join.evidence, []).append(subject in right)
    return len(right) / len(told), len(right) / len(made), by, report


@pytest.mark.parametrize("known", ["all", "no transcripts", "files alone"])
def test_precision_and_recall_against_the_book(tmp_path, known, monkeypatch):
    world = World(tmp_path, 5, trailers=known == "all")
    world.run()
    scanned = gi.SessionOptimizer(str(tmp_path / "store")).scan([world.logs])
    assert scanned["totals"]["sessions"] == 14
    if known in ("no transcripts", "files alone"):
        shutil.rmtree(world.logs)
    if known == "files alone":
        monkeypatch.setattr(gi, "COMMITS", re.compile("(?!)"))
    precision, recall, by, _ = quality_of(world, tmp_path / "store")
    assert precision >= 0.85 and recall >= 0.65, (precision, recall)
    kinds = ["trailer", "commit line", "commit command", "files"]
    expected = {"all": kinds, "no transcripts": kinds[1:], "files alone": kinds[3:]}
    assert set(by) == set(expected[known]) and all(all(by[kind]) for kind in by if kind != "files")


# ---- Sources and storage ----


def stored(store, number, cwd, start, *, writes=("a.py",), reads=2, metadata=None, command="",
           tokens=1):
    """Import a finished session of an hour, with a wasteful re-read for each of `reads` but one."""
    at = [(start + timedelta(minutes=m)).isoformat() for m in range(60)]
    write = gi.EventType.FILE_WRITE.value
    events = [dict(timestamp=at[0], event_type=gi.EventType.USER_MESSAGE.value, tokens_input=50)]
    events += [
        dict(
            timestamp=at[1 + i],
            event_type=gi.EventType.FILE_READ.value,
            data={"file_path": os.path.join(cwd, "r.py"), "tool": "Read"},
            tokens_input=1000,
            tokens_output=20,
        )
        for i in range(reads)
    ]
    events += [
        dict(timestamp=at[20], event_type=write, data={"file_path": os.path.join(cwd, n)},
             tokens_output=500)
        for n in writes
    ]
    if command:
        shell = gi.EventType.TOOL_CALL.value
        events.append(dict(timestamp=at[30], event_type=shell,
                           data={"tool": "Bash", "command": command}))
    for index, event in enumerate(events):
        event.setdefault("id", "e%d" % index)
        event.update({name: event.get(name, 0) * tokens
                      for name in ("tokens_input", "tokens_output")})
    if metadata is None:
        metadata = {"source": {"cwd": cwd, "path": "t.jsonl"}}
    return gi.SessionOptimizer(str(store)).import_session(
        dict(
            id="sess-%d" % number,
            agent="FORGE",
            task="work <b>&",
            model="default",
            status="COMPLETED",
            started_at=at[0],
            ended_at=(start + timedelta(hours=1)).isoformat(),
            events=events,
            metadata=metadata,
        )
    )


def test_store_source_matches_by_work_tree(repo, tmp_path):
    store = tmp_path / "store"
    Repo(os.path.join(repo.path, "nested"))
    os.symlink(repo.path, str(tmp_path / "link"))
    places = [repo.path, repo.path + "/gone/now", repo.path + "/nested", str(tmp_path),
              str(tmp_path / "link")]
    for number, place in enumerate(places):
        stored(store, number, place, DAY0 + timedelta(days=number))
    stored(store, 10, repo.path, DAY0 + timedelta(days=10), metadata={"project_path": repo.path})
    stored(store, 11, repo.path, DAY0 + timedelta(days=11), metadata={"cwd": repo.path})
    stored(store, 12, repo.path, DAY0 + timedelta(days=12), metadata={})
    found = gi.StoreSource(gi.SessionOptimizer(str(store))).sessions(repo.path)
    assert [s.session_id for s in found] == ["sess-11", "sess-10", "sess-4", "sess-1", "sess-0"]
    first = found[-1]
    written = (DAY0 + timedelta(minutes=20)).timestamp()
    assert first.traces.writes == {"a.py": [written]}
    assert (first.user_turns, first.primary_language) == (1, "Python")
    assert first.to_dict()["files_written"] == ["a.py"] and "traces" not in first.to_dict()
    assert (first.started_at, first.ended_at) == (DAY0, DAY0 + timedelta(hours=1))
    assert 0 < first.avg_quality < 100 and first.cost > 0 and first.tokens == 2590
    assert first.tools_used == ["Read"]
    assert first.time_of_day in ("morning", "afternoon", "evening", "night")
    late = gi.StoreSource(gi.SessionOptimizer(str(store))).sessions(
        repo.path, DAY0 + timedelta(days=5), DAY0 + timedelta(days=10)
    )
    assert [s.session_id for s in late] == ["sess-10"]


# ---- Places ----


def worktree(repo, place, branch):
    repo.git("worktree", "add", "-q", "-b", branch, str(place))
    return os.path.realpath(str(place))


def files_of(store, repo, maps=()):
    found = gi.StoreSource(gi.SessionOptimizer(str(store)), maps).sessions(repo.path)
    return {s.session_id: sorted(s.traces.writes) for s in found}


def test_a_repository_is_its_common_directory(repo, tmp_path):
    """A linked work tree, there or gone, is the repository; a clone beside it is not."""
    repo.commit("start", files={"a.py": "1"})
    linked = worktree(repo, tmp_path / "elsewhere" / "x", "x")
    inner = worktree(repo, repo.path + "/.claude/worktrees/y", "y")
    gone = [repo.path + "-worktrees/z", repo.path + ".worktrees/z", repo.path + "/.worktrees/z/sub"]
    clone = Repo(repo.path + "2")
    for number, place in enumerate([linked, inner, *gone, clone.path,
                                    str(tmp_path / "other-worktrees" / "z")]):
        stored(tmp_path / "store", number, place, DAY0 + timedelta(days=number))
    expected = {"sess-%d" % n: ["a.py"] for n in range(4)}
    expected["sess-4"] = ["sub/a.py"]
    assert files_of(tmp_path / "store", repo) == expected
    from_linked = gi.StoreSource(gi.SessionOptimizer(str(tmp_path / "store"))).sessions(linked)
    assert len(from_linked) == 5
    shared = os.path.join(repo.path, ".git")
    assert gi.repository_of(inner)[1] == gi.repository_of(repo.path)[1] == shared


def test_removed_work_trees_are_remembered(repo, tmp_path):
    """By the `git worktree add` that a session ran, or by what was known when it was read."""
    place, store = str(tmp_path / "gone"), tmp_path / "store"
    metadata = {"source": {"cwd": place + "/2", "path": "t", "repository": repo.path + "/.git"}}
    stored(store, 1, place + "/1", DAY0)
    stored(store, 2, place + "/2", DAY0, metadata=metadata)
    stored(store, 3, place + "/3", DAY0,
           metadata={"source": {**metadata["source"], "repository": place}})
    assert files_of(store, repo) == {"sess-2": ["a.py"]}
    stored(store, 4, repo.path, DAY0,
           command="cd . && git worktree add -b side ../gone/1 main && ls")
    assert files_of(store, repo) == {"sess-1": ["a.py"], "sess-2": ["a.py"], "sess-4": ["a.py"]}


def test_a_link_to_a_place_within_is_no_other_place(repo, tmp_path):
    """A link tells the repository by another name, but not what lies beside the link."""
    os.makedirs(repo.path + "/deep")
    os.symlink(repo.path + "/deep", str(tmp_path / "link"))
    stored(tmp_path / "store", 1, str(tmp_path / "link"), DAY0,
           writes=["../beside.py", repo.path + "/deep/a.py"])
    assert files_of(tmp_path / "store", repo) == {"sess-1": ["deep/a.py"]}


def test_copies_of_a_session_share_their_checkpoints(repo, tmp_path):
    """A checkpoint keeps the transcript so far; the last may hold nothing new."""
    for number, place in enumerate(("0a/1b2c3d4e5f/0/full.jsonl", "ff/0000000000/1/full.jsonl")):
        source = {"cwd": repo.path, "path": "/kept/" + place, "session_id": "native"}
        stored(tmp_path / "store", number, repo.path, DAY0, metadata={"source": source})
    found = gi.StoreSource(gi.SessionOptimizer(str(tmp_path / "store"))).sessions(repo.path)
    names = {"native", "0a1b2c3d4e5f", "ff0000000000"}
    assert len(found) == 2 and all(names < s.traces.ids for s in found)


@pytest.mark.parametrize(
    "recorded, pair",
    [
        ("/Users/x/code/cli", ("/Users/x/code/cli", "{here}")),
        ("/Users/x/code/cli", ("/Users/x/code/", "{parent}")),
        ("/Users/x/trees/a-b", ("/Users/x/trees/*", "{here}")),
        ("/Users/x/code/cli/.worktrees/w", ("/Users/x/code/cli", "{here}")),
        ("D:\\code\\cli", ("D:\\code\\cli", "{here}")),
        ("/Users/x/code/clip", ("/Users/x/code/cli", "{here}")),
    ],
)
def test_map_brings_paths_of_another_machine(tmp_path, recorded, pair):
    repo = Repo(tmp_path / "cli")
    stored(tmp_path / "store", 1, recorded, DAY0, writes=["src/a.py"])
    new = pair[1].format(here=repo.path, parent=os.path.dirname(repo.path))
    maps = [("/nothing", "/x"), (pair[0], new)]
    expected = {} if recorded.endswith("clip") else {"sess-1": ["src/a.py"]}
    assert files_of(tmp_path / "store", repo, maps) == expected
    assert files_of(tmp_path / "store", repo) == {}


def session_buddy_file(path, rows):
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect(str(path))
    connection.execute("""CREATE TABLE session_metrics (
        session_id TEXT, project_path TEXT, started_at TIMESTAMP, ended_at TIMESTAMP,
        duration_minutes FLOAT, checkpoint_count INTEGER, commit_count INTEGER, quality_start FLOAT,
        quality_end FLOAT, quality_delta FLOAT, avg_quality FLOAT, files_modified INTEGER,
        tools_used TEXT[], primary_language TEXT, time_of_day TEXT)""")
    connection.executemany("INSERT INTO session_metrics VALUES (%s)" % ", ".join("?" * 15), rows)
    connection.close()


def test_session_buddy_file(repo, tmp_path):
    local = datetime(2026, 3, 2, 9, 0)
    rows = [
        [
            "b%d" % i,
            repo.path,
            local + timedelta(days=i),
            local + timedelta(days=i, hours=1),
            60.0,
            2,
            7,
            70.0,
            80.0 + i,
            10.0,
            75.0 + i,
            3,
            ["ruff", "pytest"],
            "Python",
            "morning",
        ]
        for i in range(9)
    ]
    rows.append(
        [
            "open",
            repo.path,
            local + timedelta(days=20),
            None,
            None,
            0,
            0,
            0.0,
            0.0,
            0.0,
            0.0,
            None,
            None,
            None,
            "night",
        ]
    )
    rows.append(["else", str(tmp_path), local, None, 1.0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0, [], None,
                 "night"])
    path = tmp_path / "workflow_metrics.db"
    session_buddy_file(path, rows)
    before = path.read_bytes()
    repo.commit("feat: x", (local + timedelta(minutes=30)).astimezone(),
                files={"q.py": numbered(4)})
    wired = gi.create_session_buddy_integration(db_path=str(path),
                                                storage_path=str(tmp_path / "store"))
    found = asyncio.run(wired.collect_extended_session_metrics("b0", repo.path))
    assert (found.commit_count, found.avg_quality, found.tools_used, found.checkpoint_count) == (
        7,
        75.0,
        ["ruff", "pytest"],
        2,
    )
    assert (found.git_velocity_per_hour, found.git_conventional_compliance,
            found.lines_surviving) == (1.0, 1.0, 4)
    assert found.to_dict()["cost_per_commit"] is None
    assert len(wired.session_buddy.sessions(repo.path)) == 10 and path.read_bytes() == before
    with pytest.raises(gi.InsightsError, match="none.db"):
        gi.SessionBuddyDirectClient(str(tmp_path / "none.db")).sessions(repo.path)


def test_session_buddy_without_duckdb(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(gi.InsightsError, match="pip install duckdb"):
        gi.SessionBuddyDirectClient("x.db").sessions("/")


def test_storage_filters_and_is_private(tmp_path):
    path = tmp_path / "new" / "insights.db"
    storage = gi.CorrelationStorageSQLite(path)

    async def stored_and_found():
        for day in range(4):
            insight = gi.correlate("kind%d" % day, [(i, i) for i in range(9)])
            there = timezone(timedelta(hours=5))
            insight.timestamp = (DAY0 + timedelta(days=day)).astimezone(there)
            insight.project_path = "/p%d" % (day % 2)
            await storage.store_insight(insight)
        asked = ({}, dict(project_path="/p1"), dict(since=DAY0 + timedelta(days=2)),
                 dict(project_path="/p0", until=DAY0))
        return [await storage.get_insights(**question) for question in asked]

    found = asyncio.run(stored_and_found())
    days = ["".join(i.correlation_type[-1] for i in insights) for insights in found]
    assert days == ["3210", "31", "32", "0"]
    assert found[0][0].timestamp == DAY0 + timedelta(days=3) and 0 < found[0][0].power < 1
    assert stat.S_IMODE(os.stat(str(path)).st_mode) == 0o600
    indexes = storage.conn.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
    assert len(indexes) == 2
    storage.close()
    assert storage.conn is None
    storage.close()
    os.rename(str(path), str(path) + ".moved")  # nothing holds it open


# ---- Integration ----


def test_integration_works_off_the_event_loop(repo, tmp_path):
    now = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=5)
    repo.commit("feat: x", now + timedelta(minutes=30), files={"a.py": numbered(4)})
    stored(tmp_path / "store", 1, repo.path, now)
    wired = gi.create_session_buddy_integration(storage_path=str(tmp_path / "store"))

    async def both():
        ticks = 0
        task = asyncio.ensure_future(wired.calculate_correlations(repo.path, days_back=7))
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return (
            ticks,
            await task,
            await wired.collect_extended_session_metrics("sess-1", repo.path),
            await wired.collect_extended_session_metrics("none", repo.path),
        )

    ticks, insights, found, missing = asyncio.run(both())
    assert ticks > 3 and missing is None
    assert [i.correlation_type for i in insights] == [
        "quality_vs_velocity",
        "conventional_vs_quality",
        "waste_vs_commits",
        "cost_vs_surviving_lines",
    ]
    assert (found.commit_count, found.lines_surviving, found.git_velocity_per_hour) == (1, 4, 1.0)
    assert len(insights_in(tmp_path / "store", repo.path)) == 4
    wired.storage.close()


def insights_in(store, place):
    storage = gi.CorrelationStorageSQLite(os.path.join(str(store), "insights.db"))
    found = asyncio.run(storage.get_insights(place))
    storage.close()
    return found


def test_integration_without_storage(repo, tmp_path):
    wired = gi.create_session_buddy_integration(storage_path=str(tmp_path / "store"),
                                                store_insights=False)
    assert len(asyncio.run(wired.calculate_correlations(repo.path))) == 4
    assert not (tmp_path / "store" / "insights.db").exists()


class Figures:
    """A reader as the original protocol has it: figures, no commits."""

    def __init__(self, *figures):
        self.figures = [dict(metric_type=kind, value=value, timestamp=when)
                        for kind, value, when in figures]

    def get_metrics(self, repository_path, metric_types=None, since=None, until=None):
        return [f for f in self.figures if (not since or f["timestamp"] >= since)
                and (not until or f["timestamp"] <= until)]

    def get_latest_metrics(self, repository_path):
        return {figure["metric_type"]: figure for figure in self.figures}


class Rows:
    """A client as the original protocol has it: dicts, by coroutines."""

    def __init__(self, *rows):
        self.rows = list(rows)

    async def get_session_metrics(self, session_id=None, project_path=None, start_date=None,
                                  end_date=None):
        return [row for row in self.rows if session_id in (None, row["session_id"])]

    async def get_workflow_metrics(self, project_path=None, start_date=None, end_date=None):
        return None


def row_of(number, start, **fields):
    return dict(dict(session_id="r%d" % number, project_path="/p", started_at=start.isoformat(),
                     ended_at=(start + timedelta(hours=2)).isoformat(), avg_quality=80.0 + number),
                     **fields)


def test_the_original_protocols_work_together():
    """No repository is needed: everything comes through the two protocols, into a third."""
    kept, middle = [], timedelta(hours=1)

    class Kept(gi.NoOpCorrelationStorage):
        async def store_insight(self, insight):
            kept.append((insight.correlation_type, insight.project_path))

    now = datetime.now(UTC) - timedelta(days=1)
    starts = [now - timedelta(days=i) for i in range(10)]
    figures = [(kind, value, start + middle) for i, start in enumerate(starts) for kind, value in (
        ("commit_velocity_per_hour", 5.0 + i), ("conventional_compliance_rate", 0.9),
        ("breaking_changes", 2),
        ("breaking_changes", 1), ("most_active_hour", 9))]
    wired = gi.SessionBuddyIntegration(
        Figures(*figures), Rows(*(row_of(i, start) for i, start in enumerate(starts))), Kept())
    found = asyncio.run(wired.collect_extended_session_metrics("r3", "/p"))
    assert (found.git_velocity_per_hour, found.git_conventional_compliance,
            found.git_breaking_changes,
            found.git_most_active_hour, found.git_most_active_day) == (8.0, 0.9, 3, 9, None)
    insights = {i.correlation_type: i for i in asyncio.run(wired.calculate_correlations("/p"))}
    assert insights["quality_vs_velocity"].strength == "strong"
    assert insights["cost_vs_surviving_lines"].sample_size == 0
    assert kept == [(kind, "/p") for kind in insights]
    assert asyncio.run(wired.collect_extended_session_metrics("none", "/p")) is None


def test_no_op_parts_and_protocols(repo):
    assert isinstance(gi.NoOpGitMetricsReader(), gi.GitMetricsReader)
    assert isinstance(gi.GitReader(), gi.GitMetricsReader)
    assert isinstance(gi.NoOpSessionBuddyClient(), gi.SessionBuddyClient)
    assert isinstance(gi.SessionBuddyDirectClient("x.db"), gi.SessionBuddyClient)
    assert isinstance(gi.NoOpCorrelationStorage(), gi.CorrelationStorage)
    assert not isinstance(object(), gi.GitMetricsReader)
    silent = gi.NoOpGitMetricsReader()
    assert silent.get_metrics("/p") == [] and silent.get_latest_metrics("/p") == {}
    wired = gi.SessionBuddyIntegration()

    async def nothing():
        return (await wired.collect_extended_session_metrics("s", "/p"),
                await wired.session_buddy.get_session_metrics(),
                await wired.session_buddy.get_workflow_metrics("/p"),
                await wired.storage.get_insights(),
                await wired.calculate_correlations("/p"))

    *empty, insights = asyncio.run(nothing())
    assert empty == [None, [], None, []]
    assert len(insights) == 4
    assert all("no evidence in 0" in insight.description for insight in insights)


def test_reader_gives_figures_by_type(repo):
    now = datetime.now(UTC).replace(microsecond=0)
    for message, hours in (("old", 2_000), ("feat!: one", 3), ("two", 2)):
        repo.commit(message, now - timedelta(hours=hours))
    reader = gi.GitReader()
    latest = reader.get_latest_metrics(repo.path)
    assert latest["breaking_changes"]["value"] == 1
    assert latest["conventional_compliance_rate"]["value"] == 0.5
    period = dict(since=now - timedelta(hours=4), until=now)
    assert reader.get_metrics(repo.path, ["commit_velocity_per_hour"], **period) == [
        dict(metric_type="commit_velocity_per_hour", value=0.5, timestamp=now)]


def test_workflow_metrics_of_a_store(repo, tmp_path):
    now = datetime.now(UTC) - timedelta(days=30)
    for number in range(20):
        stored(tmp_path / "store", number, repo.path, now + timedelta(days=number),
               reads=1 if number > 9 else 6)
    client = gi.StoreSource(gi.SessionOptimizer(str(tmp_path / "store")))
    found = asyncio.run(client.get_workflow_metrics(repo.path))
    assert (found.total_sessions, found.quality_trend) == (20, "improving")
    assert 0 < found.avg_session_duration_minutes < 60 < found.avg_quality_score < 100
    rows = asyncio.run(client.get_session_metrics("sess-3", repo.path))
    assert [row["session_id"] for row in rows] == ["sess-3"] and json.dumps(rows)
    assert asyncio.run(client.get_workflow_metrics(str(tmp_path))) is None


# ---- Command line ----


def run(*arguments, cwd=None, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        env={**kept, "PYTHONIOENCODING": "utf-8", **env},
        timeout=60,
    )


@pytest.fixture
def busy(repo, tmp_path):
    """A repository and a store with ten sessions, nine of which committed."""
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=12)
    for number in range(10):
        begun = start + timedelta(days=number)
        stored(tmp_path / "store", number, repo.path, begun, reads=1 + number % 4)
        if number:
            repo.commit("feat: <b>%d" % number, begun + timedelta(minutes=30),
                        files={"a.py": numbered(3 * number)})
    return repo, str(tmp_path / "store")


def test_text_json_html(busy):
    repo, store = busy
    text = run("--repo", repo.path, "--store", store)
    assert (text.returncode, text.stderr) == (0, "")
    for words in ("10 sessions", "9 commits and 0 merges", "  +----"):
        assert words in text.stdout
    data = json.loads(run("--store", store, "--format", "json", cwd=repo.path).stdout)
    assert data["committed"]["in_sessions"] == 9 and data["committed"]["surviving"] == 27
    assert data["per_commit"]["cost"] == pytest.approx(data["spent"]["cost"] / 9)
    assert data["per_surviving_line"]["cost"] == pytest.approx(data["spent"]["cost"] / 27)
    assert len(data["sessions"]) == 10 and len(data["insights"]) == 4
    page = run("--repo", repo.path, "--store", store, "--format", "html", "--split",
               "2026-01-01").stdout
    assert (
        page.startswith("<!doctype html>")
        and page.count("<svg") == 4
        and "<script" not in page
        and "http" not in page
    )
    assert "color-scheme:light dark" in page and "not enough sessions" in page
    assert page.count("<circle") >= 30


def test_joins_carry_their_evidence(busy):
    repo, store = busy
    data = json.loads(run("--repo", repo.path, "--store", store, "--format", "json").stdout)
    heads = repo.git("log", "--reverse", "--format=%H").split()
    assert [join["commit"] for join in data["joins"]] == heads
    assert [join["session"] for join in data["joins"]] == ["sess-%d" % n for n in range(1, 10)]
    assert {(join["evidence"], join["confidence"]) for join in data["joins"]} == {("files", 0.9)}
    assert "9 by files" in run("--repo", repo.path, "--store", store).stdout


def test_unknown_money_is_a_dash(repo, tmp_path):
    """A session whose tokens nobody recorded cost something; a cost that is known stays known."""
    store = str(tmp_path / "store")
    now = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=5)
    stored(store, 1, repo.path, now, tokens=0)
    repo.commit("feat: x", now + timedelta(minutes=30), files={"a.py": "1\n"})
    told = run("--repo", repo.path, "--store", store).stdout
    assert "– at API prices: – tokens" in told and "– per commit" in told and "$" not in told
    assert "What 1 of 1 sessions cost is unknown" in told
    data = json.loads(run("--repo", repo.path, "--store", store, "--format", "json").stdout)
    assert data["spent"]["cost"] is None and data["per_commit"] == {"tokens": None, "cost": None}
    assert data["sessions"][0]["cost"] is None and data["sessions"][0]["avg_quality"] is None
    stored(store, 2, repo.path, now + timedelta(hours=1), writes=["b.py"])
    repo.commit("feat: y", now + timedelta(minutes=90), files={"b.py": "1\n"})
    data = json.loads(run("--repo", repo.path, "--store", store, "--format", "json").stdout)
    assert data["spent"]["cost"] == data["per_commit"]["cost"] > 0
    assert data["committed"]["in_sessions"] == 2


def test_several_repositories_in_one_report(busy, tmp_path):
    repo, store = busy
    other, now = Repo(tmp_path / "other"), datetime.now(UTC).replace(microsecond=0)
    stored(store, 50, other.path, now - timedelta(hours=3))
    other.commit("feat: there", now - timedelta(hours=3) + timedelta(minutes=30),
                 files={"a.py": "1\n"})
    both = ("--repo", repo.path, "--repo", other.path, "--store", store)
    data = json.loads(run(*both, "--format", "json").stdout)
    assert [(r["repository"], r["commits"], r["in_sessions"], r["sessions"])
            for r in data["repositories"]] == [
        (repo.path, 9, 9, 10), (other.path, 1, 1, 1)]
    assert data["committed"]["commits"] == 10 and data["spent"]["sessions"] == 11
    assert data["spent"]["cost"] == pytest.approx(sum(r["cost"] for r in data["repositories"]))
    assert data["velocity"]["total_commits"] == 10 and len(data["sessions"]) == 11
    text = run(*both).stdout
    assert "What the tokens bought: work, other" in text
    assert "other      1 commits, 1 of them in 1 sessions" in text


def test_branches_and_conflicts(repo, tmp_path):
    now = datetime.now(UTC).replace(microsecond=0)
    hours = (now - timedelta(hours=n) for n in range(40, 0, -1))
    repo.commit("start", next(hours), files={"a b.py": "1\n", "c.py": "1\n"})
    repo.git("checkout", "-q", "-b", "clash")
    repo.commit("one", next(hours), files={"a b.py": "2\n"})
    repo.git("checkout", "-q", "main")
    repo.commit("two", next(hours), files={"a b.py": "3\n"})
    with pytest.raises(subprocess.CalledProcessError):
        repo.git("merge", "-q", "clash", when=next(hours))
    repo.commit("Merge clash", next(hours), files={"a b.py": "4\n"})
    repo.git("checkout", "-q", "-b", "clean")
    repo.commit("three", next(hours), files={"c.py": "2\n"})
    repo.git("checkout", "-q", "main")
    repo.git("merge", "-q", "--no-ff", "-m", "Merge clean", "clean", when=next(hours))
    repo.git("checkout", "-q", "-b", "open")
    repo.commit("four", next(hours), files={"d.py": "2\n"})
    repo.git("checkout", "-q", "main")
    objects = repo.git("count-objects")
    found = gi.GitReader().branches(repo.path, now - timedelta(days=3))
    assert [(b["name"], b["commits"]) for b in found] == [("open", 1), ("clash", 0), ("clean", 0),
                                                          ("main", 0)]
    conflicts = gi.GitReader().conflicts(repo.path, now - timedelta(days=3), now)
    assert list(conflicts.values()) == [["a b.py"]] and repo.git("count-objects") == objects
    assert gi.GitReader().conflicts(repo.path, now - timedelta(hours=20), now) == {}
    told = run("--repo", repo.path, "--store", str(tmp_path / "s")).stdout
    assert "4, 1 with commits not in HEAD; open: 1" in told and "in 1 merges; a b.py: 1" in told


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for an older git")
def test_no_conflicts_are_claimed_where_git_cannot_tell(repo, tmp_path):
    repo.commit("one", datetime.now(UTC))
    older = tmp_path / "bin" / "git"
    older.parent.mkdir()
    script = '#!/bin/sh\ncase "$*" in *--remerge-diff*) exit 128;; esac\nexec %s "$@"\n'
    older.write_text(script % shutil.which("git"))
    older.chmod(0o755)
    path = "%s%s%s" % (older.parent, os.pathsep, os.environ["PATH"])
    told = run("--repo", repo.path, "--store", str(tmp_path / "s"), PATH=path)
    assert told.returncode == 0 and re.search("^Conflicts +–$", told.stdout, re.M)


def test_hostile_repository_name(tmp_path):
    repo = Repo(tmp_path / "<img src=x>\x1b[31m")
    assert "<img" not in run("--repo", repo.path, "--store", str(tmp_path / "s"), "--format",
                             "html").stdout
    assert "\x1b" not in run("--repo", repo.path, "--store", str(tmp_path / "s")).stdout


def test_nothing_to_divide_by(repo, tmp_path):
    stored(tmp_path / "store", 1, repo.path, datetime.now(UTC) - timedelta(hours=3))
    done = run("--repo", repo.path, "--store", str(tmp_path / "store"))
    assert done.returncode == 0 and "– per commit" in done.stdout
    assert "No commits in this period" in done.stdout
    done = run("--repo", repo.path, "--store", str(tmp_path / "store"), "--format", "html",
               PYTHONIOENCODING="ascii")
    assert done.returncode == 0


def test_statuses(repo, tmp_path):
    store = ("--store", str(tmp_path / "store"))
    assert run("--repo", repo.path, *store).returncode == 0
    failed = run("--repo", str(tmp_path / "none"), *store)
    assert (failed.returncode, failed.stdout) == (1, "") and "is no directory" in failed.stderr
    assert "Traceback" not in failed.stderr
    piped = subprocess.run(
        "%s %s --repo %s --store %s | true" % tuple(map(shlex.quote,
            (sys.executable, PROGRAM, repo.path, store[1]))),
        shell=True,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert piped.stderr == ""
    assert run("--repo", str(tmp_path), *store,
               GIT_CEILING_DIRECTORIES=str(tmp_path)).returncode == 1
    assert "install it" in run("--repo", repo.path, *store, PATH=str(tmp_path)).stderr
    for wrong in (("--days", "0"), ("--days", "x"), ("--split", "soon"), ("--format", "pdf"),
                  ("--rep", "."), ("--map", "x"),
                  ("--map", "=x")):
        assert run(*wrong, *store).returncode == 2


def test_save_keeps_the_insights(busy):
    repo, store = busy
    assert run("--repo", repo.path, "--store", store, "--save").returncode == 0
    assert len(insights_in(store, repo.path)) == 4


# ---- The page ----


def test_examples_of_the_page_run(busy, tmp_path, monkeypatch):
    repo, store = busy
    with open(os.path.join(os.path.dirname(HERE), "docs", "git.md"), encoding="utf-8") as page:
        blocks = re.findall(r"```(\w+)\n(.*?)```", page.read(), re.S)
    commands = [
        line[2:] for kind, body in blocks if kind == "console" for line in body.splitlines()
        if line.startswith("$ ")
    ]
    assert commands
    for command in commands:
        words = shlex.split(command.partition(" > ")[0])
        assert words[:2] == ["python3", "examples/git_insights.py"]
        done = run(*words[2:], "--store", store, cwd=repo.path)
        assert done.returncode == 0, (command, done.stderr)
    monkeypatch.chdir(repo.path)
    monkeypatch.setenv("SESSIONOPTIMIZER_HOME", store)
    monkeypatch.syspath_prepend(HERE)
    for body in (body for kind, body in blocks if kind == "python"):
        exec(compile(body, "docs/git.md", "exec"), {"__name__": "example"})


# ---- Measurement ----


@pytest.mark.skipif(
    not os.environ.get("GIT_INSIGHTS_MEASURE"),
    reason="set GIT_INSIGHTS_MEASURE=1 to measure 50,000 commits"
)
def test_speed_and_memory(repo):
    resource = pytest.importorskip("resource")
    fast_import(repo, 50_000, files=2_000, lines=60)
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(["git", "-C", repo.path, "log", "--numstat"], stdout=subprocess.DEVNULL,
                       check=True)
        middle = time.perf_counter()
        assert history(repo).total == 50_000
        ratios.append((time.perf_counter() - middle) / (middle - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        "time / git log --numstat: %s; peak memory of this process %d KB"
        % (["%.2f" % r for r in sorted(ratios)], peak)
    )
    assert sorted(ratios)[2] <= 1.5
