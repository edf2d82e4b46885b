#!/usr/bin/env python3
"""Turn ``sessionoptimizer scan --format json`` into JUnit XML: findings in a pull request.

    sessionoptimizer scan PATH --format json --no-store | python3 examples/ci_report.py > report.xml
    python3 examples/ci_report.py scan.json --level MEDIUM --output report.xml --strict

One testcase per session; its time is the session's active time. Its findings at or above
``--level`` (default HIGH) make it fail; the others, and what limits the figures, are its output.
Damaged files are the suite's error output. docs/ci.md shows a whole job.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import Severity, counted  # noqa: E402

# XML 1.0, section 2.2
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STATUS_FINDINGS = 3


def clean(text: Any) -> str:
    """A text without the characters XML cannot hold,
    escape sequences and lone surrogates among them."""
    return NOT_XML.sub("", str(text))


def finding_line(issue: dict[str, Any]) -> str:
    """A finding in two lines: what was wasted, and what to do."""
    how = "measured" if issue.get("measured") else "estimated"
    return clean(f"[{issue['severity']}] {issue['issue_type']}: {issue['description']} "
                 f"({counted(issue['estimated_waste_tokens'], 'token')}, {how})\n"
                 f"    {issue['suggestion']}")


def testcase(row: dict[str, Any], level: Severity) -> ElementTree.Element:
    """The testcase of one session of a scan."""
    bad = [issue for issue in row["issues"] if Severity(issue["severity"]) >= level]
    rest = [issue for issue in row["issues"] if Severity(issue["severity"]) < level]
    case = ElementTree.Element("testcase", {
        "classname": clean(f"sessionoptimizer.{row['agent']}"),
        "name": clean(f"{row['task'] or 'session'} ({row['id']})"),
        "time": f"{60 * row['minutes']:.3f}"})  # active, as everywhere else
    if bad:
        kinds = sorted({issue["issue_type"] for issue in bad})
        message = (
            f"{counted(len(bad), 'finding')} ({', '.join(kinds)}), "
            f"efficiency {row['efficiency_score']:.1f}%")
        failure = ElementTree.SubElement(case, "failure", {
            "type": clean(kinds[0] if len(kinds) == 1 else "WASTE"), "message": clean(message)})
        failure.text = "\n".join([finding_line(issue) for issue in bad]
                                 + [clean(f"transcript: {row['path']}")])
    output = ([finding_line(issue) for issue in rest]
              + [clean(note) for note in row.get("notes", [])])
    summary = (
        f"efficiency {row['efficiency_score']:.1f}%, "
        f"{counted(row['waste']['tokens'], 'token')} wasted "
        f"(${row['waste']['cost']:.4f} of ${row['estimated_cost']:.4f})")
    ElementTree.SubElement(case, "system-out").text = "\n".join([summary] + output)
    return case


def junit(result: dict[str, Any], level: Severity = Severity.HIGH) -> tuple[str, int]:
    """The XML of a scan's result, and how many of its testcases failed."""
    cases = [testcase(row, level) for row in result["sessions"]]
    failed = sum(case.find("failure") is not None for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": "0",
              "time": f"{sum(float(case.get('time', 0)) for case in cases):.3f}"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", dict(counts, name="sessionoptimizer"))
    suite.extend(cases)
    if result.get("skipped"):
        ElementTree.SubElement(suite, "system-err").text = "\n".join(
            clean(f"{entry['path']}:{entry['line']}: {entry['reason']}")
            for entry in result["skipped"])
    for element in [suites, suite] + cases:  # one element per line
        element.text = "\n"
    for element in suites.iter():
        element.tail = "\n"
    text = ElementTree.tostring(suites, encoding="unicode")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text, failed


def read_result(path: str | None) -> dict[str, Any]:
    """The scan's result from a file or standard input; ValueError when it is none."""
    if path:
        with open(path, "rb") as file:
            text = file.read()
    else:
        text = sys.stdin.buffer.read()
    result = json.loads(text.decode("utf-8-sig"))
    if not isinstance(result, dict) or not isinstance(result.get("sessions"), list):
        raise ValueError("there is no list of sessions in it")
    return result


def main(argv: list[str] | None = None) -> int:
    """Write the report; 0, 1 when the input is no scan, 3 with --strict when a testcase failed."""
    parser = argparse.ArgumentParser(description="Turn scan --format json into JUnit XML.")
    parser.add_argument("file", nargs="?", help="the scan's JSON (default: standard input)")
    parser.add_argument("--level", type=lambda text: Severity(text.upper()), default=Severity.HIGH,
                        metavar="LEVEL", help="findings from LOW, MEDIUM or HIGH (default) on fail")
    parser.add_argument("--output", metavar="FILE", help="write to FILE instead of standard output")
    parser.add_argument("--strict", action="store_true", help="status 3 when a testcase failed")
    options = parser.parse_args(argv)
    try:
        text, failed = junit(read_result(options.file), options.level)
        if options.output:
            with open(options.output, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            sys.stdout.buffer.write(text.encode("utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"ci_report: {options.file or 'standard input'} is not what scan --format json "
              f"prints, or a file cannot be read or written: {error!r}", file=sys.stderr)
        return 1
    return STATUS_FINDINGS if options.strict and failed else 0


if __name__ == "__main__":
    sys.exit(main())
