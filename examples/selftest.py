#!/usr/bin/env python3
"""Scan the labelled sample transcripts and hold what is found against the labels: error rates.

    python3 examples/selftest.py                 the samples beside this program
    python3 examples/selftest.py DIR             a folder of your own with a labels.json
    python3 examples/selftest.py --format json   the same for programs

Status 3 when a case is wrong. A case counts for the analyzer it is about; a finding of any other
analyzer that no label expects is a false positive of that one. transcripts/README.md says how a
case is labelled.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import (  # noqa: E402
    BUILT_IN_ANALYZERS, SessionOptimizer, SessionOptimizerError)

EXIT_FAILED, EXIT_WRONG = 1, 3


@dataclass
class Tally:
    """How often one analyzer was right on labelled cases."""

    analyzer: str
    true_positives: int = 0
    false_positives: int = 0
    true_negatives: int = 0
    false_negatives: int = 0
    expected: int = 0  # tokens the labels expect
    off: int = 0       # by how many tokens the findings miss them

    def count(self, want: list[int], have: list[int]) -> None:
        """Count one case: the wasted tokens of the findings that are labelled, and of those that
        were made."""
        right = min(len(want), len(have))
        self.true_positives += right
        self.false_negatives += len(want) - right
        self.false_positives += len(have) - right
        self.true_negatives += not want and not have
        self.expected += sum(want)
        self.off += abs(sum(want) - sum(have))

    def to_dict(self) -> dict[str, Any]:
        """The counts with precision and recall (None where there is nothing to divide by)."""
        found = self.true_positives + self.false_positives
        there = self.true_positives + self.false_negatives
        row = asdict(self)
        expected, off = row.pop("expected"), row.pop("off")
        return {**row, "precision": self.true_positives / found if found else None,
                "recall": self.true_positives / there if there else None,
                "token_error_percent": 100.0 * off / expected if expected else 0.0}


def run_labelled_cases(folder: str) -> dict[str, Any]:
    """What a scan makes of the cases of a folder with labels.json:
    ``{"cases", "wrong", "mistakes": [text], "analyzers": [Tally.to_dict()]}``. OSError, ValueError
    or KeyError when the folder holds no labels."""
    with open(os.path.join(folder, "labels.json"), encoding="utf-8") as file:
        cases = json.load(file)["cases"]
    tallies = {cls.issue_type.value: Tally(cls.__name__) for cls in BUILT_IN_ANALYZERS}
    mistakes: list[str] = []
    wrong = 0
    with tempfile.TemporaryDirectory() as store:
        for case in cases:
            result = SessionOptimizer(store).scan([os.path.join(folder, case["path"])], store=False)
            found = [*wrong_findings(case, result, tallies), *wrong_totals(case, result["totals"])]
            mistakes += [f"{case['name']}: {mistake}" for mistake in found]
            wrong += bool(found)
    return {"cases": len(cases), "wrong": wrong, "mistakes": mistakes,
            "analyzers": [tally.to_dict() for tally in tallies.values()]}


def wrong_findings(case: dict[str, Any], result: dict[str, Any],
                   tallies: dict[str, Tally]) -> list[str]:
    """Count a case's findings and say which differ from its labels."""
    expected: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    for label in case["expected"]:
        expected.setdefault(label["issue_type"], []).append(label["waste_tokens"])
    for row in result["sessions"]:
        for issue in row["issues"]:
            found.setdefault(issue["issue_type"], []).append(issue["estimated_waste_tokens"])
    mistakes = []
    for kind, tally in tallies.items():
        want, have = sorted(expected.get(kind, [])), sorted(found.get(kind, []))
        tally.count(want, have)
        if want != have:
            mistakes.append(f"{kind} expected {want or 'silence'}, found {have or 'nothing'}")
    return mistakes


def wrong_totals(case: dict[str, Any], totals: dict[str, Any]) -> list[str]:
    """Which of the totals that the case's provider billed differ from those of the scan."""
    have = {**totals["tokens"], "model_calls": totals["model_calls"]}
    return [f"{name} expected {value}, found {have[name]}"
            for name, value in case.get("totals", {}).items()
            if value is not None and have[name] != value]


def selftest_report(result: dict[str, Any]) -> str:
    """The table: per analyzer what was right and wrong, precision, recall, error of the tokens."""
    lines = [(f"{result['cases']} labelled cases, {result['cases'] - result['wrong']} right, "
              f"{result['wrong']} wrong"),
             "", (f"{'analyzer':<28}{'TP':>5}{'FP':>5}{'TN':>5}{'FN':>5}{'precision':>11}"
                  f"{'recall':>8}{'tokens off':>12}")]
    for row in result["analyzers"]:
        ratios = ["-" if row[name] is None else f"{100 * row[name]:.0f}%"
                  for name in ("precision", "recall")]
        lines.append(f"{row['analyzer']:<28}{row['true_positives']:>5}{row['false_positives']:>5}"
                     f"{row['true_negatives']:>5}{row['false_negatives']:>5}{ratios[0]:>11}"
                     f"{ratios[1]:>8}"
                     f"{row['token_error_percent']:>11.1f}%")
    if result["mistakes"]:
        lines += ["", *(f"WRONG {mistake}" for mistake in result["mistakes"])]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the status."""
    parser = argparse.ArgumentParser(description="Hold the analyzers against labelled transcripts.")
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", default=os.path.join(HERE, "transcripts"),
        help="a folder with labels.json (default: transcripts beside this program)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    try:
        result = run_labelled_cases(options.folder)
    except (OSError, ValueError, KeyError, SessionOptimizerError) as error:
        print(f"{os.path.join(options.folder, 'labels.json')} cannot be used: {error!r}",
              file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(result, indent=2) if options.format == "json" else selftest_report(result))
    return EXIT_WRONG if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
