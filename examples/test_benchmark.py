"""Test of benchmark.py: what a quick run measures and prints; no test asserts how fast."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("resource", reason="CPU time of child processes")


def test_a_quick_run_measures_every_row_and_draws_the_growth(tmp_path):
    picture = tmp_path / "cost.svg"
    module = str(HERE.parent / "sessionoptimizer.py")
    words = ["--quick", "--json", "--svg", str(picture), "--against", module, "--real",
             str(HERE / "transcripts")]
    run = subprocess.run([sys.executable, str(HERE / "benchmark.py"), *words],
                         env=dict(os.environ, TMPDIR=str(tmp_path)), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    rows = {row["what"].split(",")[0]: row for row in result["rows"]}
    assert list(rows) == ["log_event", "log command", "log -", "list", "stats", "stats again",
                          "analyze", "scan", "scan again", "memory of scan", "memory of analyze",
                          "scan of ten lines more", "scan of sessions of one line",
                          "scan of real claude-code", "scan of real codex"]
    for row in result["rows"]:
        assert set(row) == {"what", "unit", "figure", "target", "met", "ours_s",
                            "floor_s", "against"}
        assert row["figure"] >= 0 and row["unit"] in ("x floor", "us each", "s", "MB")
        if row["ours_s"] is not None:  # else a figure that is measured once
            assert (row["figure"] > 0 and row["ours_s"] > 0
                    and (row["floor_s"] is not None) == (row["unit"] == "x floor"))
        assert row["met"] == (None if row["target"] is None else row["figure"] <= row["target"])
    assert (rows["analyze"]["against"] > 0 and rows["stats"]["against"] > 0
            and rows["scan"]["against"] is None)
    drawing = ElementTree.parse(str(picture)).getroot()
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}polyline")) == 4
    assert os.listdir(str(tmp_path)) == ["cost.svg"]  # what was made is gone
