"""The comparison shows each tool's own figures, and names those that cannot be had. The tools here
are scripts that answer as the real ones do; docs/comparison.md shows a run of the real ones."""
import json
import os
import re
import stat
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE]
import compare_tools  # noqa: E402
from sessionoptimizer import SessionOptimizer  # noqa: E402

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
TOTALS = {"inputTokens": 1, "cacheCreationTokens": 2, "cacheReadTokens": 3, "outputTokens": 4,
          "totalCost": 0.5}
OVERVIEW = {"overview": {"sessions": 7, "calls": 8, "cost": 0.25,
                         "tokens": {"input": 9, "cacheWrite": 10, "cacheRead": 11, "output": 12}},
            "summary": {"potentialSavingsTokens": 5000, "potentialSavingsCostUSD": 0.125},
            "findings": [{"title": "heavy"}]}


def put(folder, name, answer, version):
    path = folder / name
    path.write_text("#!/bin/sh\ncase $1 in --version) echo %s;; *) echo '%s';; esac\n"
                    % (version, json.dumps(answer)))
    path.chmod(stat.S_IRWXU)


def test_each_tool_speaks_for_itself_and_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    put(tmp_path, "ccusage", {"sessions": [1, 2], "totals": TOTALS}, "9.8.7")
    put(tmp_path, "codeburn", OVERVIEW, "6.5")
    (tmp_path / "cachemiss").write_text(
        "#!/bin/sh\necho 'no transcripts are like these' >&2\nexit 3\n")
    (tmp_path / "cachemiss").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/bin" + os.pathsep + "/usr/bin")
    monkeypatch.setattr(sys, "argv", ["compare_tools.py"])
    assert compare_tools.main() == 0
    out = capsys.readouterr().out
    rows = {(agent, name): words
            for agent, block in zip(("claude", "codex", "gemini"), out.split("\n\n"))
            for name, *words in map(str.split, block.splitlines()[1:])}
    assert rows["codex", "ccusage"] == ["2", "-", "1", "2", "3", "4", "0.5000"]
    assert rows["gemini", "codeburn"] == ["7", "8", "9", "10", "11", "12", "0.2500"]
    assert (not [key for key in rows if "cachemiss" in key]
            and "cachemiss: skipped: no transcripts are like these" in out)
    assert ("ccusage 9.8.7: days" in out
            and "codeburn 6.5: all agents: could save 5,000 tokens, $0.1250 (heavy)" in out)


def test_days_that_moved_change_none_of_our_figures(tmp_path):
    home, samples = str(tmp_path / "home"), os.path.join(HERE, "transcripts")
    compare_tools.lay_out(samples, home)
    found = compare_tools.ours(home, compare_tools.Tools(str(tmp_path)))
    for folder, agent in compare_tools.AGENTS.items():
        totals = SessionOptimizer(str(tmp_path / "store")).scan(
            [os.path.join(samples, folder)], store=False)["totals"]
        assert found["rows"][agent] == [totals["sessions"], totals["model_calls"],
                                        *totals["tokens"].values(), totals["estimated_cost"]]
    assert len(found["notes"]) == 3 and re.match(r"\d", found["version"])


def test_days_move_together_and_nothing_else_does(tmp_path):
    case = tmp_path / "in" / "codex" / "case"
    case.mkdir(parents=True)
    for day in ("2026-01-30", "2026-02-02"):
        (case / ("rollout-%sT10-00-00-x.jsonl" % day)).write_text(
            '{"timestamp": "%sT10:00:00Z", "note": "2026-01-01"}\n' % day)
    compare_tools.lay_out(str(tmp_path / "in"), str(tmp_path / "home"))
    days = []
    for base, _, names in os.walk(str(tmp_path / "home")):
        for name in names:
            with open(os.path.join(base, name), encoding="utf-8") as file:
                entry = json.load(file)
            assert entry["note"] == "2026-01-01" and entry["timestamp"][:10] in name
            assert base.endswith(os.path.join("sessions", *entry["timestamp"][:10].split("-")))
            days.append(compare_tools.datetime.date.fromisoformat(entry["timestamp"][:10]))
    assert ((max(days) - min(days)).days == 3
            and (compare_tools.datetime.date.today() - max(days)).days == 1)


def test_nothing_is_fetched_where_npm_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(compare_tools.NotHere, match="npm is not here"):
        compare_tools.Tools(str(tmp_path)).node("ccusage", "@ccusage/ccusage")
