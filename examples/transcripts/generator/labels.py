"""What a case must show: findings, pairs of cases, and the rules by which their numbers arise."""

from .recorders import PROJECTS

ALL = []  # every recorder, in the order of labels.json
MEASURED = ("REPEATED_FILE_READ", "REPEATED_SEARCH", "FAILED_RETRY")
NOTES = {
    "waste_tokens": "The finding's own figure, before the report charges every event once.",
    "reads":
        "Every read after the first: the tokens its result brought in, nothing for writing the "
        "call. Overlapping ranges cost their share of lines (all lines are equally long).",
    "searches and retries":
        "Every run after the first: the tokens its result brought in, and those of the call. "
        "Such a call is the only block of its response, so all output of the response is its "
        "own.",
    "result tokens":
        "One result enters per call where it counts, so it gets the growth of the next call's "
        "context, less the visible part of the output before it. That part is the whole output, "
        "without thinking.",
    "large file": "60% of the tokens the read brought in.",
    "thinking":
        "What exceeds 30% of all output. Claude: the output is shared by length (4 characters "
        "per token); Codex and Gemini report it.",
    "errors": "Tokens of the failed calls, in and out.",
    "long session":
        "What was written again after the cache had expired, less the tenth of the input price "
        "that reading it would have cost: 19/20 of it where it was written at the one-hour "
        "price.",
    "spikes":
        "A place to look, never waste in an imported session: 0 tokens; the count is the number "
        "of events.",
    "count":
        "Reads, runs, failures, percent of output, events; null where it can be counted in "
        "several ways.",
    "file_path and query":
        "file_path is relative to the project; query is the pattern as first written.",
    "guilty":
        "Whether the analyzer in `tests` must speak. An innocent case may have findings of "
        "other kinds.",
    "totals":
        "The usage the provider reported, each response once; null where it cannot be known."
}


def finding(issue_type, tokens, count, **where):
    return dict(
        {
            "issue_type": issue_type, "waste_tokens": tokens, "measured": issue_type in MEASURED,
            "count": count
        }, **where)


def reread(path, *costs):
    """Reads again: ``costs`` are those of the reads after the first."""
    return finding(
        "REPEATED_FILE_READ", sum(c.entered for c in costs), len(costs) + 1, file_path=path)


def again(issue_type, *costs, **where):
    """All runs of a search, or of an operation that failed; the first is not waste."""
    return finding(issue_type, sum(c.entered + c.written for c in costs[1:]), len(costs), **where)


def spike(count=1):
    return finding("TOKEN_SPIKE", 0, count)


def case(recorder, tests, guilty, why, twin=None, expected=(), **totals):
    ALL.append(recorder)
    recorder.label = {
        "name": recorder.name, "path": recorder.folder + "/" + recorder.name,
        "agent": recorder.agent,
        "tests": tests, "guilty": guilty, "why": why, "twin": twin, "expected": list(expected),
        "totals": dict(recorder.usage, **totals)
    }


def pair(kind, tests, task, guilty, innocent, story):
    """One story told twice; guilty and innocent are (name, why); it returns what the guilty one
    shows."""
    project = PROJECTS[len(ALL) // 2 % 4]
    for (name, why), (twin, _), bad in ((guilty, innocent, True), (innocent, guilty, False)):
        recorder = kind(name, task, project)
        found = story(recorder, bad)
        case(recorder, tests, bad, why, twin, (found if bad else []) + recorder.always)
