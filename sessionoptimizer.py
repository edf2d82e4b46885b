#!/usr/bin/env python3
"""SessionOptimizer: the waste auditor for AI-agent sessions whose numbers you can check.

It reads what an agent did (logged by you, or the agent's own transcript), finds tokens that bought
nothing, and says which events they are, what they cost and whether the figure was measured or
estimated.

>>> import tempfile
>>> optimizer = SessionOptimizer(tempfile.mkdtemp())
>>> session = optimizer.start_session("forge", "Fix the loader", model="opus")
>>> for _ in range(3):
...     event = optimizer.log_event(
...         session.id, "FILE_READ", {"file_path": "src/a.py"}, tokens_input=1000)
>>> event = optimizer.log_event(session.id, EventType.AI_RESPONSE, tokens_output=1000)
>>> session = optimizer.end_session(session.id)
>>> report = optimizer.analyze(session.id)
>>> [(issue.issue_type.name, issue.severity.name, issue.estimated_waste_tokens)
...  for issue in report.issues]
[('REPEATED_FILE_READ', 'HIGH', 2000)]
>>> report.efficiency_score     # 100 * (1 - 2,000 wasted / 4,000 used)
50.0

The same from a shell, one command per event, or over the transcripts an agent keeps by itself:

    ID=$(sessionoptimizer start FORGE "Fix the loader" --model opus --quiet)
    sessionoptimizer log "$ID" FILE_READ --data '{"file_path": "src/a.py"}' --tokens-in 1000
    sessionoptimizer analyze "$ID"
    sessionoptimizer scan

The rooms of this module, in order:

    Vocabulary          statuses, event types, issue types, severities
    Prices              what models cost, and how a model's name finds its price
    Errors              what goes wrong, one class per remedy
    Records             events, sessions, issues, reports
    Secrets             what is masked before anything is kept
    Shell               what a command line reads and changes
    Context             what a context window still holds
    Accounting          one charge per token, the score, the bill
    Analyzers           what counts as waste, one class per kind
    Replay              what a session would have cost under a policy
    Reports             the renderers
    Store               session files that survive parallel writers and crashes
    Recorder            what a reader says happened, laid out as events
    Readers             one per agent format
    Scan                which files, which units, who owns a response
    SessionOptimizer    the facade
    Quick functions     the same on a default instance
    Command line        the same from a shell

In docstrings and comments a name of this module stands in single backticks, as `Session`; a
parameter, a key or a literal in double ones, as ``session_id``.
"""
from __future__ import annotations

import copy
import errno
import functools
import json
import itertools
import os
import posixpath
import re
import stat
import sys
import time
import warnings
from _thread import RLock
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, namedtuple
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum

try:
    import fcntl
except ImportError:  # Windows: locked with msvcrt instead, which is untested
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:  # the names of types cost start-up time and are needed by type checkers alone
    from datetime import datetime
    from typing import (
        Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple,
        Union)

    Data = Dict[str, Any]  # an object of a JSON document
    Rows = List[Data]

__version__ = "2.0.0"
__all__ = [
    "SessionStatus", "EventType", "IssueType", "Severity", "EVENT_TYPES", "Source",
    "TOOL_KINDS", "AGENT_TOOLS", "Usage", "TOKEN_COSTS", "PICO", "Price", "PriceList",
    "SessionOptimizerError", "InvalidValue", "InvalidSessionId", "SessionExists",
    "SessionNotFound", "StorageError", "DamagedSession", "SessionOptimizerWarning", "IDLE_GAP",
    "MAX_TOKENS", "now_text", "parse_time", "seconds_of", "SessionEvent", "Session",
    "is_compaction", "EfficiencyIssue", "OptimizationReport", "mask_secrets", "masked",
    "ShellEffects", "shell_effects", "TO_THE_END", "failure_kind", "changes_of", "line_range",
    "Repeat", "ContextMemory", "search_key", "repeats_in", "Analysis", "CLASSES", "empty_bill",
    "bill_of", "add_bills", "in_usd", "ContextWalk", "Step", "Piece", "ClaimsLedger",
    "BaseAnalyzer", "RepeatedFileReadAnalyzer", "RepeatedSearchAnalyzer", "LargeFileAnalyzer",
    "ExcessiveThinkingAnalyzer", "FailedRetryAnalyzer", "normal_message", "LongSessionAnalyzer",
    "HighErrorRateAnalyzer", "TokenSpikeAnalyzer", "BUILT_IN_ANALYZERS", "POLICIES",
    "parse_policy", "what_if",
    "Replay", "CASES", "is_recommended", "build_report", "CAUSES", "bill_sections",
    "advice_section", "counted", "alerts_of", "alert_limits", "full_row", "billed", "time_text",
    "TranscriptScan", "cut", "plain", "markdown_text", "short_number", "dollars", "bar",
    "session_row", "summary_row", "scan_totals", "GROUPS", "measures", "grouped", "Section",
    "table", "text_sections", "findings", "event_place", "event_extract", "text_report",
    "evidence_text", "markdown_report", "json_report", "scan_report", "html_report",
    "html_scan_report", "csv_report", "FORMATS", "AlertRule", "ALERT_RULES", "check_id", "slug",
    "Store", "IMAGE_CHARACTERS", "Recorder", "TranscriptReader", "open_transcript",
    "numbered_lines", "transcript_entries", "ClaudeCodeReader", "CodexReader", "GeminiReader",
    "OtelReader", "OpenCodeReader", "READERS", "estimated_tokens", "find_transcripts",
    "describe_transcript", "group_transcripts", "left_out", "read_session_files", "owners_of",
    "session_ids", "renamed", "scan_settings", "scan_result", "usage_rows", "sessions_at",
    "SessionOptimizer", "get_optimizer", "start_session", "end_session", "log_event",
    "analyze_session", "get_agent_stats", "EXIT_DONE", "EXIT_FAILED", "EXIT_USAGE",
    "EXIT_LIMIT", "CommandError", "UsageError", "colour", "build_parser", "main"]


class _Pattern:
    """A regular expression that is compiled when one of its methods is first used: importing
    stays light, and what is used often is found without a look into the cache of ``re``."""

    sub: Callable[..., str]

    def __init__(self, text: Any, flags: int = 0):
        self._text, self._flags = text, flags

    def __getattr__(self, name: str) -> Any:
        method = getattr(re.compile(self._text, self._flags), name)
        setattr(self, name, method)
        return method


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Context in which the cycle collector rests. Records are no part of cycles: they are freed by
    the count of their references, and looking at all of them again and again takes a fifth of a
    scan."""
    import gc
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


# ==================================================================================================
# Vocabulary
# ==================================================================================================

class SessionStatus(Enum):
    """Where a session stands. Everything but ACTIVE has ended."""

    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    ABANDONED = "ABANDONED"


class EventType(Enum):
    """What happened in a session."""

    SESSION_START = "SESSION_START"
    SESSION_END = "SESSION_END"
    TOOL_CALL = "TOOL_CALL"          # a tool that neither reads, writes nor searches files
    TOKEN_USAGE = "TOKEN_USAGE"      # usage that belongs to no single event
    FILE_READ = "FILE_READ"
    FILE_WRITE = "FILE_WRITE"
    SEARCH = "SEARCH"
    ERROR = "ERROR"                  # a failed tool call
    USER_MESSAGE = "USER_MESSAGE"
    AI_RESPONSE = "AI_RESPONSE"      # one model call
    CONTEXT_LOAD = "CONTEXT_LOAD"    # system prompt, tools, instruction files, cache rebuilds
    THINKING = "THINKING"
    CUSTOM = "CUSTOM"


class IssueType(Enum):
    """Kinds of waste. UNUSED_CONTEXT, CIRCULAR_SEARCH, INEFFICIENT_TOOL_USE and CONTEXT_OVERFLOW
    are reported by no built-in analyzer: they are there for analyzers of your own."""

    REPEATED_FILE_READ = "REPEATED_FILE_READ"
    REPEATED_SEARCH = "REPEATED_SEARCH"
    LARGE_FILE_UNCOMPRESSED = "LARGE_FILE_UNCOMPRESSED"
    EXCESSIVE_THINKING = "EXCESSIVE_THINKING"
    UNUSED_CONTEXT = "UNUSED_CONTEXT"
    FAILED_RETRY = "FAILED_RETRY"
    CIRCULAR_SEARCH = "CIRCULAR_SEARCH"
    LONG_SESSION = "LONG_SESSION"
    HIGH_ERROR_RATE = "HIGH_ERROR_RATE"
    INEFFICIENT_TOOL_USE = "INEFFICIENT_TOOL_USE"
    TOKEN_SPIKE = "TOKEN_SPIKE"
    CONTEXT_OVERFLOW = "CONTEXT_OVERFLOW"


@functools.total_ordering
class Severity(Enum):
    """How much an issue matters; ordered, LOW < MEDIUM < HIGH < CRITICAL."""

    LOW = "LOW"
    MEDIUM = "MEDIUM"
    HIGH = "HIGH"
    CRITICAL = "CRITICAL"

    @property
    def rank(self) -> int:
        """0 for LOW to 3 for CRITICAL."""
        return list(Severity).index(self)

    def __lt__(self, other: "Severity") -> bool:
        return self.rank < other.rank if isinstance(other, Severity) else NotImplemented


EVENT_TYPES = {member.value: member for member in EventType}

# What an AI_RESPONSE's data tell of its call: why the provider says its cache was missed, the
# client's version, the effort and the mode it ran in; and the slash command that a CONTEXT_LOAD
# event stands for.
CACHE_MISS, VERSION, EFFORT, MODE, COMMAND = "cache_miss version effort mode command".split()


class Source:
    """Where the tokens of a CONTEXT_LOAD event came from: its ``data["source"]``."""

    SYSTEM = "system"                # system prompt, tool definitions, instruction files
    INJECTED = "injected"            # what the agent's program said in the user's place
    ATTACHMENT = "attachment"        # files, lists and reminders added to a prompt
    AGENT_MESSAGE = "agent message"  # what one agent said to another
    COMPACTION = "compaction"        # a new window begins
    REBUILD = "cache rebuild"        # context written again after the cache was lost
    HISTORY = "history"              # counted in another file: 0 tokens, ``contents`` by name
    RESUME = "resume"                # a new process went on with a context, and its last answer
    CLEAR = "clear"                  # the user emptied the context: a new window begins
    UNATTRIBUTED = "unattributed"    # what nothing explains; no analyzer may claim it


# What a tool does, by its name in lower case. A tool that is not listed may change anything.
TOOL_KINDS = {name: kind for kind, names in (
    ("read", """read read_file read_many_files view view_image cat notebookread get_file"""),
    ("search", """grep glob ls search rg find websearch webfetch toolsearch web_search list
        list_directory codesearch search_files search_file_content grep_search google_web_search
        web_fetch code_search file_search list_dir semantic_search"""),
    ("write", """edit multiedit write notebookedit write_file replace apply_patch create str_replace
        edit_file delete_file patch create_file replace_string_in_file"""),
    ("shell", """bash powershell shell shell_command exec_command local_shell run_shell_command
        container.exec execute_command run_command_in_terminal run_in_terminal"""),
    ("harmless", """todowrite todoread taskcreate taskupdate tasklist taskget taskoutput taskstop
        skill bashoutput killshell killbash askuserquestion exitplanmode enterplanmode sendmessage
        update_plan write_todos save_memory write_stdin wait monitor schedulewakeup
        question invalid listmcpresources readmcpresource request_user_input slashcommand"""),
) for name in names.split()}
AGENT_TOOLS = ("task", "agent")  # what a sub-agent changed is in its own events

COMMITS = "commits"  # in the data of a command's event: the ids of the commits it made


# ==================================================================================================
# Prices
# ==================================================================================================

Usage = namedtuple("Usage", "uncached write_5m write_1h read output", defaults=(0, 0, 0, 0, 0))
Usage.__doc__ = """Tokens by how they are billed, each in one class: input that no cache held, input
written to the cache for five minutes and for an hour, input read from the cache, and output
(thinking included)."""

# USD per 1,000 tokens: input, output, cache read, 5-minute cache write, 1-hour cache write; then,
# where a model has them, the first of these for calls with more than LONG_CONTEXT tokens ("long")
# and the factor on every price for responses in fast mode ("fast"). Source of the named models:
# LiteLLM model_prices_and_context_window as released in litellm 1.109.1, read 2026-11-20. Where it
# gives no 1-hour price for a Claude model, twice the input price (the provider's rule); where it
# gives no cache price, those tokens are billed as plain input. Per-search fees are left out.
_PRICE_TABLE = """
claude-haiku-4-5        0.001    0.005    0.0001    0.00125   0.002
claude-haiku-5-5        0.0001   0.0005   0.00001   0.000125  0.0002
claude-sonnet-4         0.003    0.015    0.0003    0.00375   0.006
claude-sonnet-4-5       0.003    0.015    0.0003    0.00375   0.006
claude-sonnet-4-6       0.003    0.015    0.0003    0.00375   0.006
claude-sonnet-5         0.002    0.010    0.0002    0.0025    0.004
claude-sonnet-5-5       0.002    0.010    0.0001    0.0025    0.004
claude-opus-4           0.015    0.075    0.0015    0.01875   0.030
claude-opus-4-1         0.015    0.075    0.0015    0.01875   0.030
claude-opus-4-5         0.005    0.025    0.0005    0.00625   0.010
claude-opus-4-6         0.005    0.025    0.0005    0.00625   0.010
claude-opus-4-7         0.005    0.025    0.0005    0.00625   0.010
claude-opus-4-8         0.005    0.025    0.0005    0.00625   0.010  fast=2
claude-opus-5           0.005    0.025    0.0005    0.00625   0.010  fast=2
claude-opus-5-5         0.004    0.020    0.0002    0.005     0.008  fast=2
claude-fable-5          0.010    0.050    0.001     0.0125    0.020
claude-fable-5-1        0.010    0.050    0.00025   0.0125    0.020
claude-mythos-5         0.010    0.050    0.001     0.0125    0.020
claude-mythos-5-1       0.010    0.050    0.00025   0.0125    0.020
claude-3-7-sonnet       0.003    0.015    0.0003    0.00375   0.006
claude-3-5-sonnet       0.003    0.015    0.0003    0.00375   0.006
claude-3-5-haiku        0.0008   0.004    0.00008   0.001     0.0016
claude-3-opus           0.015    0.075    0.0015    0.01875   0.030
claude-sonnet-4-5-20250929-v1:0 0.003    0.015    0.0003   0.00375  0.006     long=0.006,0.0225
claude-mythos-preview   0.01     0.05     0.001    0.0125   0.02
claude-3-7-sonnet-20240620 0.0036   0.018    0.00036  0.0045   0.0072
claude-instant          0.0008   0.0024   -        -        -
gpt-5                   0.00125  0.010    0.000125  -         -
gpt-5-codex             0.00125  0.010    0.000125  -         -
gpt-5-mini              0.00025  0.002    0.000025  -         -
gpt-5-nano              0.00005  0.0004   0.000005  -         -
gpt-5-pro               0.015    0.120    -         -         -
gpt-5.1                 0.00125  0.010    0.000125  -         -
gpt-5.1-codex           0.00125  0.010    0.000125  -         -
gpt-5.1-codex-max       0.00125  0.010    0.000125  -         -
gpt-5.1-codex-mini      0.00025  0.002    0.000025  -         -
gpt-5.2                 0.00175  0.014    0.000175  -         -
gpt-5.2-codex           0.00175  0.014    0.000175  -         -
gpt-5.2-pro             0.021    0.168    -         -         -
gpt-5.3-codex           0.00175  0.014    0.000175  -         -
gpt-5.4                 0.0025   0.015    0.00025   -         -
gpt-5.4-mini            0.00075  0.0045   0.000075  -         -
gpt-5.4-nano            0.0002   0.00125  0.00002   -         -
gpt-5.4-pro             0.030    0.180    -         -         -
gpt-5.5                 0.005    0.030    0.0005    -         -
gpt-5.5-pro             0.030    0.180    -         -         -
gpt-5.6                 0.004    0.020    0.0004    0.005     -
gpt-5.6-terra           0.002    0.012    0.0002    0.0025    -
gpt-5.6-luna            0.0002   0.0012   0.00002   0.00025   -
gpt-4                   0.030    0.060    -         -         -
gpt-4-turbo             0.010    0.030    -         -         -
gpt-4.1                 0.002    0.008    0.0005    -         -
gpt-4.1-mini            0.0004   0.0016   0.0001    -         -
gpt-4o                  0.0025   0.010    0.00125   -         -
gpt-4o-mini             0.00015  0.0006   0.000075  -         -
gpt-5.6-cyber           0.0125   0.075    0.00125  0.015625 -
gpt-5.5-cyber           0.0125   0.075    0.00125  -        -
gpt-5.3-chat            0.00175  0.014    0.000175 -        -
gpt-4.1-nano            0.0001   0.0004   0.000025 -        -
gpt-4o-2024-05-13       0.005    0.015    -        -        -
gpt-4-1106-preview      0.01     0.03     -        -        -
gpt-3.5-turbo           0.0005   0.0015   -        -        -
gpt-3.5-turbo-1106      0.001    0.002    -        -        -
gpt-3.5-turbo-16k       0.003    0.004    -        -        -
o1                      0.015    0.06     0.0075   -        -
o1-pro                  0.15     0.6      -        -        -
o3                      0.002    0.008    0.0005    -         -
o3-mini                 0.0011   0.0044   0.00055   -         -
o3-pro                  0.02     0.08     -        -        -
o4-mini                 0.0011   0.0044   0.000275  -         -
gemini-2.5-pro          0.00125  0.010    0.000125  -         -  long=0.0025,0.015
gemini-2.5-flash        0.0003   0.0025   0.00003   -         -
gemini-2.5-flash-lite   0.0001   0.0004   0.00001   -         -
gemini-3-flash-preview  0.0005   0.003    0.00005   -         -
gemini-3.1-pro-preview  0.002    0.012    0.0002    -         -  long=0.004,0.018
gemini-3.1-flash-lite   0.00025  0.0015   0.000025  -         -
gemini-3.5-flash        0.0015   0.009    0.00015   -         -
gemini-3.6-flash        0.00075  0.00375  0.000075  -         -
gemini-3.7-flash        0.00075  0.00375  0.000075  -         -
gemini-3.8-flash        0.00075  0.00375  0.000075  -         -
gemini-2.5-computer-use-preview-10-2025 0.00125  0.01     -        -        -  long=0.0025,0.015
gemini-3-pro-preview    0.002    0.012    0.0002    -         -  long=0.004,0.018,0.0004,0.00025
gemini-3.5-flash-lite   0.0003   0.0025   0.00003  -        -
gemini-3.8-flash-cyber  0.0015   0.0075   0.00015  -        -
grok-4.20               0.00125  0.0025   0.0002    -         -  long=0.0025,0.005
grok-4.3                0.00125  0.0025   0.0002    -         -  long=0.0025,0.005
grok-4.5                0.002    0.006    0.0003    -         -  long=0.004,0.012
grok-4.6                0.002    0.006    0.0005    -         -  long=0.004,0.012
grok-4.7                0.002    0.006    0.0005    -         -  long=0.004,0.012
grok-code-fast          0.001    0.002    0.0002    -         -  long=0.002,0.004
grok-build-latest       0.002    0.006    0.0003   -        -         long=0.004,0.012
grok-build-0.1          0.001    0.002    0.0002   -        -         long=0.002,0.004
grok-code-fast-1        0.001    0.002    0.0002   -        -         long=0.002,0.004
deepseek-chat           0.00028  0.00042  0.000028  -         -
deepseek-reasoner       0.00028  0.00042  0.000028  -         -
deepseek-v4-flash       0.0003   0.0012   0.000006  0         -
deepseek-v4-pro         0.00132  0.00396  0.000044  0         -
deepseek-flash          0.0003   0.0012   0.000006 0        -
deepseek.v3             0.00058  0.00168  -        -        -
deepseek.v3.2           0.00062  0.00185  -        -        -
deepseek.r1             0.00135  0.0054   -        -        -
deepseek-v3-2-251201    0        0        -        -        -
"""

# Short names matched exactly; their prices are the first public release's, the cache prices the
# usual multiples (0.1x read, 1.25x and 2x write) where the vendor sells caching that way.
_ALIAS_TABLE = """
opus                    0.015    0.075    0.0015    0.01875   0.030
sonnet                  0.003    0.015    0.0003    0.00375   0.006
gpt4                    0.010    0.030    -         -         -
gemini                  0.00025  0.0005   -         -         -
grok                    0        0        0         0         0
grok-(cline)            0        0        0         0         0
unpriced                0        0        0         0         0
default                 0.010    0.030    0.001     0.0125    0.020
"""

# The first public release's table, USD per 1,000 tokens. Costs are computed with `PriceList`.
TOKEN_COSTS = {
    name: {"input": float(plain), "output": float(written)}
    for name, plain, written, *_ in map(str.split, _ALIAS_TABLE.strip().split("\n"))
    if name not in ("grok-(cline)", "unpriced")}

UNPRICED = "unpriced"    # the model of calls whose transcript tells neither the model nor its price
LONG_CONTEXT = 200_000   # tokens of a call's context above which some models cost more
PICO = 10**12            # money is counted in whole pico-dollars: sums are exact in any order

_VENDOR = _Pattern(r"^(?:.*/)?(?:(?:us|eu|apac|jp|au|global)\.)?(?:(?:anthropic|openai)\.)?")
# What follows a table's name without changing the price: dates, versions, "latest", "chat",
# "preview".
_RELEASE = _Pattern(
    r"(?:[-@]?(?:\d{8}|\d{4}-\d\d-\d\d|latest|v\d+(?::\d+)?|\d{4})|-\d\d-\d{4}|-beta|-chat"
    r"|-preview|-sol|-(?:non-)?reasoning|-multi-agent|-customtools|-gv2|\[1m\])+$|^:\d+$")
_CLAUDE = _Pattern(r"opus|sonnet|haiku|fable|mythos")
_VERSION_FIRST = _Pattern(r"^claude-(\d(?:-\d)?)-(opus|sonnet|haiku)")
_NAME_FIRST = _Pattern(r"^claude-(opus|sonnet|haiku)-(3-\d|3)(?!\d)")


def _rate(name: str) -> Any:
    return property(lambda price: getattr(price.rates, name) / 1e9, doc="USD per 1,000 tokens.")


class Price(namedtuple("Price", "model exact rates")):
    """What a model's tokens cost. ``model``: the table row; ``exact``: whether the model's own name
    (or that name with a date) is that row, False when a family or the default had to stand in;
    ``rates``: a `Usage` of whole pico-dollars (1e-12 USD) per token."""

    __slots__ = ()

    def parts(self, usage: Sequence[int]) -> Tuple[int, ...]:
        """Pico-dollars of a usage, or of its first classes, by class."""
        return tuple(map(int.__mul__, self.rates, usage))

    def cost(self, usage: Sequence[int]) -> int:
        """Pico-dollars of a usage, or of its first classes."""
        return sum(map(int.__mul__, self.rates, usage))

    input, output, cache_read = map(_rate, ("uncached", "output", "read"))
    cache_write, cache_write_1h = map(_rate, ("write_5m", "write_1h"))


def _spellings(model: str) -> Iterator[str]:
    """The ways a table may spell a model's name: without the vendor's prefix ('us.anthropic.'),
    with dots as dashes, with 'claude-' in front, with name and version in the order of that
    generation."""
    name = _VENDOR.sub("", "-".join(str(model).lower().split()))
    yield name
    if _CLAUDE.search(name):
        dashed = re.sub(r"(?<=\d)\.(?=\d)", "-", name)
        full = "claude-" + re.sub("^claude-", "", dashed)
        yield from (dashed, full, _NAME_FIRST.sub(r"claude-\2-\1", full),
                    _VERSION_FIRST.sub(r"claude-\2-\1", full))


# USD per token; ``above``: those beyond LONG_CONTEXT, None where they are the same; ``fast``: a
# factor
_Row = namedtuple("_Row", "model figures above fast exact", defaults=(True,))


@functools.lru_cache(maxsize=None)
def _parse_prices(table: str) -> Dict[str, _Row]:
    rows = {}
    for name, *words in map(str.split, table.strip().split("\n")):
        more = dict(word.split("=") for word in words[5:])
        below, above = ([float(word) / 1000 if word.strip("-") else None for word in figures]
                        for figures in (words[:5], more.get("long", "").split(",")))
        rows[name] = _Row(name, below, above, float(more.get("fast", 1)))
    return rows


def _price(row: _Row, rate: str) -> Price:
    """The price of calls at a rate. A read or a write without a price of its own is billed as
    input."""
    figures = row.figures
    if "long" in rate:
        figures = [low if high is None else high
                   for low, high in itertools.zip_longest(figures, row.above)]
    plain, output, read, write, write_1h = figures
    read = plain if read is None else read
    write = plain if write is None else write
    usd = Usage(plain, write, write if write_1h is None else write_1h, read, output)
    factor = PICO * (row.fast if "fast" in rate else 1)
    return Price(row.model, row.exact, Usage(*(round((figure or 0) * factor) for figure in usd)))


class PriceList:
    """Model prices: the built-in table, and a user's own in the per-token format LiteLLM publishes.

    ``overrides``: ``{model: {"input_cost_per_token": USD, "output_cost_per_token": USD,
    "cache_read_input_token_cost": USD, "cache_creation_input_token_cost": USD,
    "cache_creation_input_token_cost_above_1hr": USD}}``, each also with "_above_200k_tokens" behind
    it, and "fast" (a factor on all of them in fast mode); raises InvalidValue when a price is not a
    number >= 0.
    """

    _fields = """input_cost_per_token output_cost_per_token cache_read_input_token_cost
        cache_creation_input_token_cost cache_creation_input_token_cost_above_1hr""".split()

    def __init__(self, overrides: Optional[Data] = None):
        self.overrides = overrides or {}
        self._own: Dict[str, _Row] = {}
        for model, entry in self.overrides.items():
            if model != "sample_spec" and isinstance(entry, dict) and self._fields[0] in entry:
                below, above = ([self._figure(model, entry, name + end) for name in self._fields]
                                for end in ("", "_above_200k_tokens"))
                fast = self._figure(model, dict({"fast": 1}, **entry), "fast")
                self._own[next(_spellings(model))] = _Row(model, below, above, fast)
        self._found: Dict[Tuple[str, str], Price] = {}

    @staticmethod
    def _figure(model: str, entry: Data, name: str) -> Optional[float]:
        value = entry.get(name)
        if value is None or value.__class__ in (int, float) and 0 <= value < 1e6:
            return value
        raise InvalidValue(f"price {name} of {model!r} is {value!r}: give USD per token, >= 0")

    def lookup(self, model: str, rate: str = "") -> Price:
        """The price of a model: its own row, else the longest row its name begins with (the rest
        must begin with '-', '@' or ':'), else 'default'. ``Price.exact`` is False in the last two
        cases, unless what was left over is only a release. ``rate``: "fast" or "long" where a call
        was."""
        found = self._found.get((model, rate))
        if found is None:
            found = self._found[model, rate] = _price(self._search(model or "default"), rate)
        return found

    def _search(self, model: str) -> _Row:
        aliases, table = _parse_prices(_ALIAS_TABLE), _parse_prices(_PRICE_TABLE)
        spellings = list(_spellings(model))
        for name in spellings:
            for rows in (self._own, aliases, table):
                if name in rows:
                    return rows[name]
        family = dict(table, **self._own)
        for name in spellings:
            for end in range(len(name) - 1, 0, -1):
                if name[end] in "-@:[" and name[:end] in family:
                    return family[name[:end]]._replace(exact=bool(_RELEASE.match(name[end:])))
        return (self._own.get("default") or aliases["default"])._replace(exact=False)


# ==================================================================================================
# Errors
# ==================================================================================================

class SessionOptimizerError(Exception):
    """Base of every error this module raises on purpose; the message names the value and the
    remedy."""


class InvalidValue(SessionOptimizerError, ValueError):
    """An argument or a stored value that cannot be used."""


class InvalidSessionId(InvalidValue):
    """A session id that could not be a file name on every system."""


class SessionExists(SessionOptimizerError):
    """The id is taken."""


class SessionNotFound(SessionOptimizerError, LookupError):
    """The store holds no session of this id, perhaps not any more."""


class StorageError(SessionOptimizerError):
    """A file cannot be read or written: ``path``, ``reason``, and ``remedy`` (what to do). What was
    stored stays."""

    def __init__(self, path: str, reason: str, remedy: str):
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{_printable(self.path)}: {self.reason}; {self.remedy}"


class DamagedSession(StorageError):
    """The file of one session holds no session, or not enough of one to be repaired."""


class SessionOptimizerWarning(UserWarning):
    """Something was lost, repaired or guessed that a caller may want to know of."""


def _warn(message: str) -> None:
    warnings.warn(message, SessionOptimizerWarning, stacklevel=3)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ==================================================================================================
# Records
# ==================================================================================================

IDLE_GAP = 600       # seconds without an event after which the session was idle
MAX_TOKENS = 10**15  # of one event: more is a mistake, and loses digits in JSON readers


def now_text() -> str:
    """The current local time as ISO-8601 with the zone's offset."""
    return time_text(time.time())


def time_text(moment: float) -> str:
    """Seconds since 1970 as ISO-8601 in local time with the zone's offset."""
    seconds, micros = divmod(round(moment * 1e6), 1_000_000)
    local = time.localtime(seconds)  # loading datetime takes as long as logging an event does
    minutes, rest = divmod(abs(local.tm_gmtoff), 60)
    offset = f"{'-' if local.tm_gmtoff < 0 else '+'}{minutes // 60:02d}:{minutes % 60:02d}"
    offset += f":{rest:02d}" if rest else ""
    return "%04d-%02d-%02dT%02d:%02d:%02d.%06d%s" % (*local[:6], micros, offset)


_TIME = _Pattern(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d)?(?:[.,](\d+))?\s*"
                 r"(Z|z|([+-]\d\d):?(\d\d)(?::?(\d\d))?)?$")


def parse_time(text: Any) -> Optional[datetime]:
    """ISO-8601 in any of its usual spellings as an aware datetime; without a zone it is local time;
    a date alone is its midnight. None when empty or not a time."""
    from datetime import datetime, timezone
    match = _TIME.match(text) if isinstance(text, str) else None
    try:
        if match:
            day, clock, second, fraction, zone, *offset = match.groups(default="")
            hours, minutes, seconds = offset
            text = f"{day}T{clock}{second or ':00'}.{fraction[:6]:0<6}"
            if zone:
                return datetime.fromisoformat(
                    f"{text}{hours or '+00'}:{minutes or '00'}:{seconds or '00'}")
            moment = datetime.fromisoformat(text)
        elif text:
            moment = datetime.strptime(text, "%Y-%m-%d")
        else:
            return None
    except (ValueError, TypeError, OverflowError):
        return None
    try:
        return moment.astimezone()
    except (OverflowError, OSError, ValueError):  # years 1 and 9999 have no local offset everywhere
        return moment.replace(tzinfo=timezone.utc)


@functools.lru_cache(maxsize=10_000)  # sessions hold few hours and many times
def _hour(day_and_hour: str, zone: str) -> int:
    moment = parse_time(f"{day_and_hour}:00:00{zone}")
    if moment is None:
        raise ValueError(day_and_hour)
    return int(moment.timestamp())


_ZONE_AT = {24: 23, 27: 26, 32: 26}  # where the zone begins in the usual spellings, by their length


def seconds_of(text: Any) -> Optional[float]:
    """Seconds since 1970 of an ISO-8601 text; None when it is empty or not a time."""
    zone = _ZONE_AT.get(len(text)) if text.__class__ is str and text[19:20] == "." else None
    try:
        if zone:
            seconds = _hour(text[:13], text[zone:]) + int(text[14:16]) * 60 + int(text[17:19])
            return (seconds * 1_000_000 + int(text[20:zone].ljust(6, "0"))) / 1_000_000
    except ValueError:
        pass
    moment = parse_time(text)
    return None if moment is None else moment.timestamp()


@functools.lru_cache(maxsize=10_000)
def _days(quarter: int, zone: Any) -> Tuple[str, str]:
    """The local and the UTC day of a quarter of an hour since 1970: no day begins within one."""
    moments = time.localtime(quarter * 900)[:3], time.gmtime(quarter * 900)[:3]
    local, utc = ("%04d-%02d-%02d" % min(max(moment, (1, 1, 1)), (9999, 12, 31))
                  for moment in moments)
    return local, utc


def days_of(stamp: Any) -> Tuple[str, str]:
    """The local and the UTC day of an ISO-8601 text, as YYYY-MM-DD; empty when it is not a time."""
    seconds, zone = seconds_of(stamp), (time.timezone, *time.tzname)
    return ("", "") if seconds is None else _days(int(seconds // 900), zone)


def _checked_count(name: str, value: Any) -> int:
    """A count of tokens or milliseconds given by a caller: a whole number from 0 to MAX_TOKENS."""
    if isinstance(value, (int, float)) and value.__class__ is not bool \
            and 0 <= value <= MAX_TOKENS and int(value) == value:
        return int(value)
    raise InvalidValue(f"{name} is {value!r}: give a whole number from 0 to {MAX_TOKENS:,}")


class _Record:
    """What the records have in common."""

    __slots__ = ()
    __dataclass_fields__: Data
    _made_by: Data = {}  # functions that make the value of a field of what JSON holds

    def _fields(self) -> Data:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, data: Data) -> Any:
        """The record a dict describes; unknown keys are ignored, InvalidValue when it is not
        one."""
        try:
            values = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            values.update((name, make(values[name])) for name, make in cls._made_by.items())
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidValue(f"not an {cls.__name__}: {error!r}") from None


def _without_dict(cls: Any) -> Any:
    """The dataclass with slots for its fields: large sessions have millions of events."""
    names = tuple(cls.__dataclass_fields__)
    kept = {name: value for name, value in vars(cls).items()
            if name not in (*names, "__dict__", "__weakref__")}
    return type(cls)(cls.__name__, cls.__bases__, dict(kept, __slots__=(*names, "__weakref__")))


@_without_dict
@dataclass
class SessionEvent(_Record):
    """One thing that happened in a session.

    ``tokens_input``: tokens new to the context with this event. ``tokens_output``: tokens the model
    wrote. ``tokens_cache_write``: the part of ``tokens_input`` billed as cache write,
    ``tokens_cache_write_1h`` the part of that at the one-hour price. ``tokens_cache_read``: context
    sent again from the provider's cache by this model call, in no other figure. ``model`` where it
    differs from the session's; ``agent_id`` of a sub-agent. ``rate``: "fast" or "long" where the
    call was billed at such a price. ``input_model``, ``input_rate``: those of the call that took
    the input in, where another one wrote the output.
    """

    id: str
    timestamp: str
    event_type: EventType
    data: Data = field(default_factory=dict)
    tokens_input: int = 0
    tokens_output: int = 0
    duration_ms: int = 0
    tokens_cache_write: int = 0
    tokens_cache_write_1h: int = 0
    tokens_cache_read: int = 0
    model: str = ""
    agent_id: str = ""
    rate: str = ""
    input_model: str = ""
    input_rate: str = ""

    _texts = "id timestamp model agent_id rate input_model input_rate".split()
    _rare = "tokens_cache_write tokens_cache_write_1h tokens_cache_read".split() + _texts[2:]
    _counts = "tokens_input tokens_output duration_ms".split() + _rare[:3]

    @property
    def tokens(self) -> int:
        """Input plus output, the tokens an analyzer can claim."""
        return self.tokens_input + self.tokens_output

    @property
    def entered(self) -> Tuple[int, int, int]:
        """The part of its usage that entered the context: its input by how it is billed."""
        write, hour = self.tokens_cache_write, self.tokens_cache_write_1h
        return self.tokens_input - write, write - hour, hour

    @property
    def usage(self) -> Usage:
        """The event's tokens by how they are billed."""
        return Usage(*self.entered, self.tokens_cache_read, self.tokens_output)

    @usage.setter
    def usage(self, usage: Usage) -> None:
        uncached, short, hour, self.tokens_cache_read, self.tokens_output = usage
        self.tokens_cache_write, self.tokens_cache_write_1h = short + hour, hour
        self.tokens_input = uncached + short + hour

    def to_dict(self) -> Data:
        """A dict JSON can hold; fields that are 0 or empty beyond the first seven are left out."""
        result = dict(self._fields(), event_type=self.event_type._value_)
        for name in self._rare:
            if not result[name]:
                del result[name]
        return result

    @classmethod
    def from_dict(cls, data: Data) -> "SessionEvent":
        """The event a dict describes. Unknown keys are ignored; a missing id, an unknown type or a
        count that is not a whole number >= 0 raises InvalidValue."""
        get = data.get
        try:
            kind: Any = data["event_type"]
            event = cls(data["id"], get("timestamp", ""), EVENT_TYPES[getattr(kind, "value", kind)],
                        get("data"),  # type: ignore[arg-type]  # `_check` looks at it
                        get("tokens_input", 0), get("tokens_output", 0), get("duration_ms", 0))
        except (KeyError, TypeError) as error:
            kinds = ", ".join(EVENT_TYPES)
            raise InvalidValue(
                f"not an event ({error!r}): it needs an id and an event_type of {kinds}") from None
        for name in cls._rare:
            if name in data:
                setattr(event, name, data[name])
        event._check()
        return event

    def _check(self) -> None:
        for name in self._counts:
            value = getattr(self, name)
            if value.__class__ is not int or not 0 <= value <= MAX_TOKENS:
                setattr(self, name, _checked_count(name, value))
        if not self.tokens_cache_write_1h <= self.tokens_cache_write <= self.tokens_input:
            raise InvalidValue(
                f"event {self.id!r} has more cache writes than the tokens they are part of: "
                "one-hour writes are part of the cache writes, and those of the input")
        if self.data.__class__ is not dict:
            self.data = _typed({"data": self.data}, "data", dict)
        for name in self._texts:
            value = getattr(self, name)
            if value.__class__ is not str:
                setattr(self, name, str(value or ""))

    def __getstate__(self) -> Data:
        return dict(getattr(self, "__dict__", ()), **self._fields())

    def __setstate__(self, state: Data) -> None:
        SessionEvent.__init__(self, "", "", EventType.CUSTOM)  # what an older pickle lacks
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Session(_Record):
    """What one agent did on one task: its events in order, and the totals that follow from them.

    The three totals may be set by the caller of a session that has no events. Times are ISO-8601
    texts.
    """

    id: str
    agent: str
    task: str
    status: SessionStatus = SessionStatus.ACTIVE
    started_at: str = ""
    ended_at: str = ""
    events: List[SessionEvent] = field(default_factory=list)
    total_tokens_input: int = 0
    total_tokens_output: int = 0
    total_duration_ms: int = 0
    model: str = "default"
    metadata: Data = field(default_factory=dict)

    prices = PriceList()  # a store's own prices replace it on the sessions read from there

    def __post_init__(self) -> None:
        if not self.started_at:
            self.started_at = now_text()
        if self.events and not self.total_tokens and not self.total_duration_ms:
            events, self.events = self.events, []
            for event in events:
                self.add_event(event)

    def add_event(self, event: SessionEvent) -> None:
        """Append an event and add its tokens and duration to the totals."""
        self.events.append(event)
        self.total_tokens_input += event.tokens_input
        self.total_tokens_output += event.tokens_output
        self.total_duration_ms += event.duration_ms

    def end(self, status: SessionStatus = SessionStatus.COMPLETED) -> None:
        """Mark the session as ended now."""
        self.status = status
        self.ended_at = now_text()

    @property
    def imported(self) -> bool:
        """True for a session read from an agent's transcript (its metadata names the source)."""
        return isinstance(self.metadata.get("source"), dict)

    @property
    def source(self) -> Data:
        """Where an imported session is from: its ``reader``, ``path``, ``cwd``, ``version``."""
        return self.metadata["source"] if self.imported else {}

    @property
    def total_tokens(self) -> int:
        """Input plus output tokens. Context sent again from the provider's cache is not part of
        it."""
        return self.total_tokens_input + self.total_tokens_output

    @property
    def estimated_cost(self) -> float:
        """USD at API prices: input, cache writes, cache reads and output, each at its own price."""
        return self.cost_in_pico / PICO

    @property
    def cost_in_pico(self) -> int:
        """`estimated_cost` in whole pico-dollars, the sum over the events in any order."""
        return sum(self.prices.lookup(*key).cost(usage) for key, usage in self.usages().items())

    def price_of(self, event: SessionEvent) -> Price:
        """What the tokens of an event cost."""
        return self.prices.lookup(event.model or self.model, event.rate)

    def taken_by(self, event: SessionEvent) -> Tuple[str, str]:
        """Model and rate of the call that took in what entered the context with an event."""
        if event.input_model:
            return event.input_model, event.input_rate
        return event.model or self.model, event.rate

    def entry_cost(self, event: SessionEvent) -> int:
        """Pico-dollars of what entered the context with an event."""
        return self.prices.lookup(*self.taken_by(event)).cost(event.entered)

    def usages(self) -> Dict[Tuple[str, str], Usage]:
        """The usage by model and rate."""
        groups: Dict[Tuple[str, str], List[int]] = defaultdict(lambda: [0] * 5)
        for event in self._counted():
            write, hour = event.tokens_cache_write, event.tokens_cache_write_1h
            sums = groups[self.taken_by(event)]
            sums[0] += event.tokens_input - write
            sums[1] += write - hour
            sums[2] += hour
            if event.input_model:
                sums = groups[event.model or self.model, event.rate]
            sums[3] += event.tokens_cache_read
            sums[4] += event.tokens_output
        return {key: Usage(*sums) for key, sums in groups.items()}

    def _counted(self) -> List[SessionEvent]:
        """The events; totals without events count as one."""
        return self.events or [SessionEvent("", "", EventType.CUSTOM, {}, self.total_tokens_input,
                                            self.total_tokens_output)]

    @property
    def duration_seconds(self) -> float:
        """Seconds: the durations recorded by the caller; without them, and for imported sessions
        (where calls run in parallel), the active wall time, which leaves out gaps of more than 10
        minutes."""
        if self.total_duration_ms and not self.imported:
            return self.total_duration_ms / 1000
        stamps = (seconds_of(stamp) for stamp in {event.timestamp for event in self.events})
        times = sorted(moment for moment in stamps if moment is not None)
        started, ended = seconds_of(self.started_at), seconds_of(self.ended_at)
        if not times and started is not None and ended is not None:
            return max(0.0, ended - started)
        gaps = (later - earlier for earlier, later in zip(times, itertools.islice(times, 1, None)))
        return sum(gap for gap in gaps if gap <= IDLE_GAP)

    def windows(self) -> Iterator[List[SessionEvent]]:
        """The context windows: the events of one agent that share one live context, cut at every
        compaction (a CONTEXT_LOAD event whose ``data["source"]`` is "compaction" begins a new
        one)."""
        current: Dict[str, List[SessionEvent]] = {}
        for event in self.events:
            if is_compaction(event) and current.get(event.agent_id):
                yield current.pop(event.agent_id)
            current.setdefault(event.agent_id, []).append(event)
        yield from current.values()

    def to_dict(self) -> Data:
        """A dict JSON can hold, events included."""
        whole = dict(self._head(), events=[event.to_dict() for event in self.events],
                     **self._foot())
        del whole["event_count"]
        return whole

    def _head(self) -> Data:
        """What is fixed at the start."""
        return {name: getattr(self, name)
                for name in "id agent task started_at model metadata".split()}

    def _foot(self) -> Data:
        """What changes with every event."""
        return {"status": self.status.value, "ended_at": self.ended_at,
                "event_count": len(self.events), "total_tokens_input": self.total_tokens_input,
                "total_tokens_output": self.total_tokens_output,
                "total_duration_ms": self.total_duration_ms}

    @classmethod
    def from_dict(cls, data: Data) -> "Session":
        """The session a dict describes. Totals are recomputed when there are events and kept when
        there are none; unknown keys are ignored; InvalidValue names what is missing or cannot be
        used."""
        if not isinstance(data, dict):
            raise InvalidValue(
                f"a session is an object with id, agent and task, not a {type(data).__name__}")
        missing = [name for name in ("id", "agent", "task") if name not in data]
        if missing:
            raise InvalidValue(
                f"the session has no {', '.join(missing)}: a session needs id, agent and task")
        entries = _typed(data, "events", list)
        for entry in entries:
            if not isinstance(entry, (dict, SessionEvent)):
                raise InvalidValue(
                    f"an event of session {data['id']!r} is a {type(entry).__name__}: give objects")
        events = [entry if entry.__class__ is SessionEvent else SessionEvent.from_dict(entry)
                  for entry in entries]
        fields: Data = {name: str(data.get(name) or "") for name in ("started_at", "ended_at")}
        for name in () if events else cls.__dataclass_fields__:
            if name.startswith("total"):
                fields[name] = _checked_count(name, data.get(name) or 0)
        return cls(str(data["id"]), str(data["agent"]), str(data["task"]),
                   _status(data.get("status", "ACTIVE")), events=events,
                   model=str(data.get("model") or "default"),
                   metadata=_typed(data, "metadata", dict), **fields)


def _typed(data: Data, name: str, kind: type) -> Any:
    value = data.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise InvalidValue(f"{name} is a {type(value).__name__}: give a {kind.__name__}")
    return value


def _status(value: Any) -> SessionStatus:
    """A status or its name; InvalidValue names the choices."""
    try:
        return SessionStatus(getattr(value, "value", value))
    except ValueError:
        choices = ", ".join(status.value for status in SessionStatus)
        raise InvalidValue(f"unknown status {value!r}: use one of {choices}") from None


def is_compaction(event: SessionEvent) -> bool:
    """True where a new context window begins. Where results left the context and the rest stayed
    (``data["left"]`` holds their ids), the window goes on."""
    return event.event_type is EventType.CONTEXT_LOAD and event.data.get("source") in (
        Source.COMPACTION, Source.CLEAR) and "left" not in event.data


@dataclass
class EfficiencyIssue(_Record):
    """A finding: what was wasted, on which events, and how sure the figure is.

    ``claims`` is ``{event id: (input tokens, output tokens)}``, whose sum is
    ``estimated_waste_tokens``; without claims the number is shared by ``events_involved``, or by
    the whole session where none is named. ``measured``: the tokens are recorded ones of events that
    provably repeat; otherwise a share was assumed. ``charged_tokens``, ``charged_cost``: what the
    report charges to this issue after overlaps (tokens, USD).
    """

    id: str
    issue_type: IssueType
    severity: Severity
    description: str
    suggestion: str
    estimated_waste_tokens: int = 0
    estimated_waste_cost: float = 0.0
    events_involved: List[str] = field(default_factory=list)
    metadata: Data = field(default_factory=dict)
    claims: Data = field(default_factory=dict)
    measured: bool = False
    charged_tokens: int = 0
    charged_cost: float = 0.0

    _made_by = {"issue_type": IssueType, "severity": Severity}

    def to_dict(self) -> Data:
        """A dict as JSON holds it."""
        claims = {event: list(pair) if pair.__class__ is tuple else pair
                  for event, pair in self.claims.items()}
        return dict(self.__dict__, issue_type=self.issue_type.value, severity=self.severity.value,
                    claims=claims)


@dataclass
class OptimizationReport(_Record):
    """What an analysis found. Tokens and USD; ``total_*`` is the upper bound (with estimates),
    ``measured_*`` the lower one. ``analyzer_errors`` names analyzers that failed, ``notes`` says
    what limits the figures."""

    session_id: str
    generated_at: str
    issues: List[EfficiencyIssue] = field(default_factory=list)
    total_waste_tokens: int = 0
    total_waste_cost: float = 0.0
    efficiency_score: float = 100.0
    recommendations: List[str] = field(default_factory=list)
    token_breakdown: Dict[str, int] = field(default_factory=dict)
    comparisons: Data = field(default_factory=dict)
    measured_waste_tokens: int = 0
    measured_waste_cost: float = 0.0
    total_tokens: int = 0
    estimated_cost: float = 0.0
    analyzer_errors: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    token_use: Dict[str, int] = field(default_factory=dict)
    bill: Data = field(default_factory=dict)
    advice: List[Data] = field(default_factory=list)

    _made_by = {"issues": lambda issues: list(map(EfficiencyIssue.from_dict, issues))}

    def to_dict(self) -> Data:
        """A dict JSON can hold."""
        return dict(self.__dict__, issues=[issue.to_dict() for issue in self.issues])


# ==================================================================================================
# Secrets
# ==================================================================================================

# Names of what is always secret, unless they end as a file, an address or a count does, and of what
# is when its value has letters and digits. How they begin is asked first: half the time.
_SECRET_NAME = r"""(?=[pP][aAwWrR]|[mM][nNaA]|[sS][eEhHiItT]|[tT][oO]|[cC][rRlLoO]|[aA][pPcCuUdD]
  |[eE][nN]|[lL][iI]|[dD][eE]|[wW][eE]|(?<=[_-])[KASPk])(?:
  (?i:pass(?:w(?:or)?d|phrase|code)?(?!word|ed|es|ing|ive|ion|age|port|through|thru|less)
    | (?:(?<![a-z])pw|(?-i:Pw))(?:d|(?=\\?["']?\s?[=:])) | mnemonic
    | (?<!existing)secret(?!ary|ion|s?[./]|[-_]keys\b)
    | token(?!s\b|iz|[_-]?(?:count|limit|type)) | (?<![a-z])cred(?:ential)?s?(?![a-z])
    | (?:api|access|account|shared|private|encrypt\w{0,3}|signing|secret|master|auth|client|license
        |app|storage|deploy|service|consumer|session|webhook|admin)[-_.\ ]?key(?!s(?!=)))
| (?<=_)(?<!PUB_)(?<!PUBLIC_)(?:KEY|AUTH|SIG|PAT|PSK|PIN)(?![A-Z])(?=[A-Z0-9_]{0,40}=)
| (?<=-)(?i:key)(?=:\s))
(?![\w.-]{0,40}
  (?i:file|path|stdin|dir|id|name|url|uri|type|policy|ttl|env|length|prompt|pattern|store
    |bucket)s?\b)
[\w-]{0,40}"""
_WEAK_NAME = r"""(?:(?i:(?<![a-z])(?<!pub[_-])(?<!public[_-])(?:key|auth|sig(?:nature)?)(?![a-z]))
  | (?<=[a-z])(?:Key|Auth|Sig(?:nature)?)(?![a-z]) | (?<=_)(?i:session)(?==[\w%-]{20})
  | (?<=[?&#])(?:jwt|sid|code|appid|ticket|session))[\w-]{0,40}"""
_NAMED = r"""
    (?:%(secret)s
      (?:\\?["']?\]?(?:=(?!=)|:=(?=[^\s}])|:(?![:=?]|[-+]\})(?=\S|\s{0,3}
            (?:\\?["']|\S{1,300}\s{0,3}(?:[^\w\s]|\n|\Z))))\s{0,3} | \}= | ["']\]\s(?=["'])
        | ["']?\]?\s{1,3}(?:=>|:=|->|=|(?:is|was|provided|used):?)\s{1,3}
          (?=[bBfFrRuU]{0,2}["']|(?!(?i:base|md|sha|utf|v|oauth)-?\d)\S{0,60}\d)
        | ["']?>(?=[^<>\s]{1,200}</) | ["']\s{1,3}(?::|value=)\s{0,3}(?=["'])
        | :\s{0,3}[\w.]{1,30}\s{1,3}=\s{1,3}(?=["'])
        | \\?["']?,?\s{0,20}\\?["']?(?i:value)\\?["']?\s{0,3}[:=]\s{0,3}
        | \s{1,3}(?=\w{0,60}\d[A-Za-z])(?=[\d_]{0,20}[A-Za-z])(?=[\w+]{8,60}(?![\w./=-])))
    | (?<![\w-])--?[\w.-]{0,40}?%(secret)s\s{1,9}(?!-)
    | (?:\b(?:set(?:x|env|-env\s+\S{1,60}|\s+-\w{1,3})?|ENV|ARG)|\#define)
      \s+[\w:]{0,40}?%(secret)s\s{1,3}(?!=|-|(?i:for)\s)
    | \b(?i:define|put_?env|set_?env\w{0,20}|set_?default|set_?prop\w{0,20})\(\s{0,3}
      \\?["'][\w.]{0,60}?%(secret)s\\?["']\s{0,3},\s{0,3}(?=\\?["'])
    | (?i:set_?(?:pass(?:w(?:or)?d)?|secret|token))\(\s{0,3}(?=\\?["'])
    | (?:%(weak)s\\?["']?\s{0,3}[=:]\s{0,3} | (?<![\w-])--?[\w-]{0,40}?%(weak)s\s{1,3})
      (?=\\?["']?[A-Za-z_+/=.:-]{0,60}\d)(?=\\?["']?[\d_+/=.:-]{0,20}[A-Za-z])
      (?=\\?["']?[\w+/=.:-]{8})(?!\\?["']?[\w-]{0,30}[./]\w{1,9}\b)
    | (?i:authorization)["']?\s{0,3}[:=]\s{0,3}["']?(?:[A-Za-z][\w-]{0,30}\s{1,3}(?=[^\s"'\\]))?
      (?!(?i:bearer|basic|token|digest|apikey)(?:\W|\Z)|[A-Za-z][\w-]{0,30}\s{1,3}[\w$"'{<%%])
    | (?i:_authToken|(?<!\w)_auth)["']?\s{1,3} )""" % {"secret": _SECRET_NAME, "weak": _WEAK_NAME}
_SAID = r"""
    (?i:(?:\b(?:bearer|basic)\s{1,3}(?=[\w.~+/=-]{12})(?=[A-Za-z._~+/-]{0,60}[\d=])
    | --oauth2-bearer\s{1,3} | \brequirepass\s+ | \bsecurestring\s+(?:-{1,2}\w{1,20}\s+)?
    | \bidentified\s+(?:with\s+\w{1,60}\s+)?by\s+ | \bpass:(?=\w)
    | \b(?:with|set|login|encrypted)\s+password\s*=?\s+(?=["']|\S{0,60}\d)
    | \bset\s+password(?:\s+for\s+\S{1,80})?\s*=\s*(?:password\(\s*)?
    | (?:\.login|\bauth=?|credentials?|superuser)\(\s{0,3}\\?["'][^"'\n]{1,80}["'],\s{0,3}
      (?:["'][^"'\n]{1,80}["'],\s{0,3})?(?=\\?["'])))"""
_ADDRESSED = r"""
    (?::/{1,2}(?=[^\s/@:'"]{8,200}:(?:x-oauth-basic)?@)
    | :/{1,2}[^\s/@:'"]{0,200}:(?=[^\s/'"]{1,200}@) | :/{1,2}(?=[\w-]{20,200}@)
    | \bhooks\.slack\.com/(?:services|workflows|triggers)/ | \bapi\.telegram\.org/bot
    | \bdiscord(?:app)?\.com/api/webhooks/\d{1,30}/ | \bwebhook\.office\.com/webhookb2/
    | \bhooks\.zapier\.com/hooks/catch/)"""
_GIVEN = r"""
    (?:(?=[\s-])(?:(?:\s-(?:u|[a-zA-Z]{1,5}u\s|U\s)|--(?:proxy-)?user|--auth)[\s=]{0,9}
      (?P<quote>["'])?[\w.@%+\\-]{1,100}:(?![/\\]|\d+\b)
    | \s-U\s{1,3}["']?[\w.\\/-]{1,60}% | (?:\s-b|--cookie)[\s=]{1,3}(?P<jar>["'])?[\w.-]{1,60}=
      (?:\d{1,3};\s?[\w.-]{1,60}=)?
    | \s/(?:p(?:ass)?:|user:\S{1,60}\s{1,3}(?!/)))
    | (?P<head>(?i:\bcookie)["']?\s{0,3}:\s{0,3}["']?[\w.-]{1,60}=(?:\d{1,3};\s?[\w.-]{1,60}=)?))"""
_TYPED = r"""
    \b(?:(?:mysql|mariadb)[\w-]{0,9}\b[^\n|;&]{0,200}?\s-p(?=\S)
    | (?:7z|(?:un)?rar)\b[^\n|;&]{0,80}?\s-h?p
    | (?:sshpass|mongo\w{0,9}|rdesktop|twine|login|psexec|security|cqlsh|cypher-shell|hdbsql|beeline
       |ncftpput|rabbitmqadmin|mycli|veracrypt|nuget|elasticsearch-users
       |(?:poetry|uv)\s+publish|conan\s+user)\b[^\n|;&]{0,200}?\s-p\s{0,3}
    | (?:plink|pscp|psftp|putty)\b[^\n|;&]{0,80}?\s-pw\s+
    | (?:zip|sqlcmd|ssh-keygen|unzip|bcp|osql|tsql|mosquitto_[ps]ub)\b[^\n|;&]{0,80}?\s-P\s{0,3}
    | ssh-keygen\b[^\n|;&]{0,80}?\s-N\s{1,3} | lftp\b[^\n|;&]{0,200}?\s-u\s{1,3}["']?[\w.@-]{1,60},
    | redis-cli\b[^\n|;&]{0,80}?\s(?:-a|(?i:auth)(?:\s\w{1,60}(?=\s[^\s|;&]))?)\s{1,3}
    | (?:ldap\w{3,8}|security)\b[^\n|;&]{0,200}?\s-w\s{1,3}
    | (?:lda|sla)ppasswd\b[^\n|;&]{0,99}?\s-s\s+
    | openssl\b[^\n|;&]{0,200}?\s-(?:[kK]|hmac)\s{1,3}
    | (?:openssl\s+passwd|mkpasswd)(?:\s+-(?:salt|m)\s+\S{1,60}|\s+-[\w-]{1,20}){0,4}\s+(?!-)
    | (?:sqlplus|expdp|impdp)\s+(?:-\w+\s+)?\w{1,60}/ | (?:vault|cargo)\s+login\s+(?!-)
    | vault\s+operator\s+unseal\s+ | bw\s+(?:unlock|login\s+\S{1,60})\s+(?!-) | rclone\s+obscure\s+
    | ngrok\s+(?:config\s+add-)?authtoken\s+ | (?:snyk\s+auth|auth:token)\s+(?!-)
    | b2\s+authorize-account\s+\S{1,60}\s+
    | (?:doctl\s+auth|glab\s+auth|codecov)\b[^\n|;&]{0,80}?\s-t\s+
    | mc\s+(?:alias\s+set|config\s+host\s+add)(?:\s+\S{1,80}){3}\s+
    | (?:http-basic\.\S{1,60}\s+\S{1,60}|pypi-token\.\S{1,60}|-oauth\.\S{1,60})\s+
    | bundle\s+config\s+(?:set\s+)?(?:--\w{1,9}\s+)?\S{1,60}\.\S{1,60}\s+[\w.-]{1,60}:(?![/\\])
    | rclone\s+config\s[^\n|;&]{0,100}?(?:pass|key|token)\s+ | nmcli\s[^\n|;&]{0,99}?\spassword\s+
    | wpa_passphrase\s+\S{1,60}\s+ | dscl\s[^\n|;&]{0,99}?\s(?:-passwd\s+\S{1,60}|Password)\s+
    | (?:re)?set-[\w-]{0,20}password\s+(?!-) | user:password\s+\S{1,60}\s+ | qpdf\s+--encrypt\s+
    | samba-tool\s+user\s+\w{3,9}\s+\S{1,60}\s+(?!-) | pdfto\w{2,5}\s[^\n|;&]{0,60}?-[uo]pw\s+
    | smbclient\s+//\S{1,99}\s+(?!-) | mysqlsh\b[^\n|;&]{0,80}?\s[\w.-]{1,60}:(?=[^\s@]{1,99}@)
    | nuget\s[^\n|;&]{0,99}?\s-k\s+
    | (?:encrypt_string|-plaintext|-setairport\w+\s+\S+\s+\S+)\s+(?!-)
    | sonar\.login=
    | signtool\b[^\n|;&]{0,200}?\s/p\s+ | swaks\b[^\n|;&]{0,200}?\s-ap\s+
    | db2\b[^\n|;&]{0,120}?\susing\s+ | curl\b[^\n|;&]{0,200}?\s(?:-E|--cert)\s+[\w./-]{1,99}:
    | (?:https?|xhs?|hey)\s(?:[^\n|;&]{0,200}?\s)?(?:-A\s?bearer\s+-a\s+|-a\s+(?=\S{1,99}:[^\s/]))
    | pulumi\s[^\n|;&]{0,60}?--secret\s+\S{1,60}\s+(?!-) | [\w.-]{1,60}:(?=[^\n:]{1,99}\.pgpass)
    | login\s+\S{1,100}\s+password\s+ | (?:add_user|change_password)\s+\S{1,60}\s+
    | (?:htpasswd|mosquitto_passwd)\s+-\w*b\w*\s+\S{1,200}\s+\S{1,60}\s+
    | htpasswd\s+-\w*n\w*\s+\S{1,60}\s+
    | (?:secrets?|variables?)(?::|\s+)(?:set|create|add|put)\s[^\n|;&]{0,80}?
      (?:(?:--(?:body|value)|\s-[bv])[\s=]{0,3}|=)
    | net\s+user\s+\S{1,60}\s+(?!/) | \w{1,9}_pw\s+
    | (?:sudo|(?:ch)?passwd|login|cryptsetup|keyring|secret|kinit|su|doas|pass\s+insert|env\s+add
       |kubeseal|gpg|ldap\w{3,8}|unlock|read\b[^\n|;&]{0,40}?(?i:pass|token|secret))\b
      [^\n|;&]{0,100}?(?:<<<\s{0,3}|<<\s?["']?EOF["']?\n)
    | (?:echo|printf|yes)\s{1,3}(?:-\w{1,3}\s{1,3}|["']?%s(?:\\n)?["']?\s{1,3})?
      (?=[^\n|;&]{1,200}\|\s{0,3}(?:sudo\s[^\n|;&]{0,40}-S
        |(?:sudo\s+)?(?:(?:ch|smb)?passwd|kinit|su|cryptsetup|pass\s+insert|ssh-keygen)\b
        |[^\n|;&]{0,60}\b(?:secrets?|env)\s+(?:versions\s+)?(?:create|put|set|add)\b
        |base64\s{0,3}(?:-w\s?0\s{0,3})?(?:[\n|;&)]|\Z)
        |\S{1,40}\s[^\n|;&]{0,60}--(?:password-stdin|with-token|passphrase-fd))))"""
# What follows: no variable, no file, no word of code; up to the closing quote where there is one.
_VALUE = r"""(?:\$(?=')|[bBfFrRuU]{1,2}(?=["'])
    | ["']?(?:\$\(|`)\s{0,3}(?:echo|printf)\s{1,3}(?:-\w{1,3}\s{1,3})?)?
  (?P<open>\\?["'](?!\s))?)
  (?!(?i:true|false|null|none|nil|undefined|yes|no|on|off|str|string|required|optional)
    (?(open)(?:(?P=open)|\Z)|(?![\w-])))
  (?!(?(open)(?:\$\([^\n]{0,999}? | `[^\n]{0,999}? | [~.]{0,2}/[\w./@+~-]{0,200}
      | \d{1,3} | (?:\$(?:\w+|\{{1,2}[^{}"']{0,99}\}{1,2})[\w\s./:@,=&?${}-]{0,99})
      | \w[\w.]{0,60}\([^"'\n]{0,99}\) | \{[^"'\n]{0,99}\} | <[^<>"'\n]{1,99}>
      | %\(?\w{0,30}\)?\w?%? | \*+ | \.+
      | (?:process\.env|os\.environ|secrets|env|config|self|args)\.[\w.]{1,60})(?:(?P=open)|\Z)
    | (?:(?:process\.env|os\.environ|secrets|env|config|self|args)(?![\w-])
      | [$<{%(*\[`] | ~ | \.{0,2}/ | [a-zA-Z_][\w.]*[(\[] | \d{1,3}\b(?![./\w-]))))
  (?(open)(?:'\\''|(?!(?P=open))(?:\\.|.)){1,2000}(?:\n(?:(?!(?P=open))[^\\]){0,300}(?=(?P=open)))?
  """
_BARE = r"""(?:[^\s"'`&|;,)}<>\\]|\\[^\s\w"'\\]){1,2000}"""
# The first line holds of all that follow, and of few words else.
_PROVIDERS = _Pattern(r"""(?ax)(?<![A-Za-z0-9])(?=[\w.:+/=~$-]{15})(?:
    [sprc]k[-_](?:live_|test_|ant-|proj-|or-)?[\w-]{16,} | gh[pousr]_\w{20,} | github_pat_\w{20,}
  | (?:AKIA|ASIA|ABIA|ACCA|LTAI)[0-9A-Za-z]{12,} | xox[a-z](?:\.xox[a-z])?-[\w-]{10,}
  | (?:A3T|SCW)[A-Z0-9]{17}\b | xapp-[\w-]{10,} | AIza[\w-]{30,} | ya29\.[\w-]{20,}
  | GOCSPX-[\w-]{20,} | gl(?:pat|dt|rt|ptt|cbt|soat|ft|imt|ffct|oas|agent)-[\w.-]{16,}
  | pypi-[\w-]{16,} | SG\.[\w-]{16,}\.[\w-]{16,} | ops_eyJ[\w+/-]{20,} | p8e-\w{32}
  | whsec_[\w+/=]{16,} | hv[sbr]\.[\w-]{16,} | dapi[0-9a-f]{32} | shp(?:at|ca|pa|ss)_\w{16,}
  | do[por]_v1_\w{16,} | sq0[a-z]{3}-[\w-]{16,} | EAA[A-Z]\w{30,} | PMAK-[\w-]{16,}
  | (?:NR(?:AK|II|JS|RA)|CFPAT|SWMTKN-1)-[\w-]{16,} | pat\w{14}\.[0-9a-f]{64} | API-[A-Z0-9]{26}\b
  | dp\.(?:pt|st|ct|sa|audit|scim)\.[\w.-]{16,} | dt0c01\.[\w.]{20,}
  | \w{10,20}\.atlasv1\.[\w-]{20,} | (?:hf|api_org)_\w{34}
  | AGE-SECRET-KEY-1\w{20,} | A(?:TATT3|TBB|TCTT3)[\w=-]{16,} | v1\.0-[0-9a-f]{24}-[0-9a-f]{40,}
  | A3-[A-Z0-9]{6}(?:-[A-Z0-9]{5,11}){4,5} | [\w~.]{3}\dQ~[\w~.-]{31,34} | sha256~[\w-]{43}
  | (?:sc|ext|scauth|authress)_\w{5,30}\.\w{4,6}\.acc[_-][\w-]{10,32}\.[\w+/=-]{30,120}
  | sl\.[\w-]{130,}
  | t1\.[\w-]{20,200}={0,2}\.[\w-]{80,} | [ps]at\.[\w-]{22}\.[0-9a-f]{24}\.\w{20} | mfa\.[\w-]{80,}
  | v[1-4]\.(?:local|public)\.[\w-]{40,} | amzn\.mws\.[0-9a-f-]{36} | rzp_(?:live|test)_\w{14}
  | access_token\$\w{4,12}\$\w{16}\$[0-9a-f]{32} | sandbox_\w{8}_\w{16} | live_[0-9a-f]{35}
  | (?:sdk|mob|api)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12} | oy2[a-z0-9]{43}\b
  | (?:npm|hf|gsk|lin_api|lin_oauth|sntry[su]|rubygems|figd|gl(?:c|sa)|r8|dckr_pat|sbp|sb_secret
     |ntn|secret|pscale_(?:tkn|pw|oauth)|shippo_(?:live|test)|bkua|CLOJARS|fo1|fm[12]r?|aio|rnd|rpa
     |e2b|jina|duffel_(?:live|test)|lsv2_(?:pt|sk)|phx|nvapi|pplx|pul|xkeysib|xsmtpsib|hrku|HRKU|key
     |tvly|xai|fc|FLWSECK(?:_TEST)?|tk-us|fio-u|sess|api_org|pnu|sgp|rdme|sq[aup]|s-s4t2ud|pubkey
     |tskey-\w{3,9}|waka)[-_](?=[A-Za-z_-]{0,30}\d)[\w=-]{20,} | sm_pat_\w{16}
  | (?<!-)eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)? | [MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}
  | \d{8,10}:AA[\w-]{32,34} | [0-9a-f]{32}-us\d\d? | SK[0-9a-f]{32} | EZ[AT]K\w{40,} )""")
_KEY_BLOCK = _Pattern(
    r"(?s)-----BEGIN [A-Z ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----.*?(?:-----END[^\n-]{0,50}-----|\Z)")
# Long words, but for the numbers of calls and messages, public keys and checksums.
_WORD = _Pattern(r"""(?x)(?<![\w/.+~@-])(?=[A-Za-z0-9+_/-]{24})
  (?!(?:toolu|msg|call|req|resp|chatcmpl|fc|rs|ses|prt|item|run|gen|evt)[_-]|AAAA|sha\d+-)
  (?=[^a-z\s]{0,99}[a-z])(?=[^A-Z\s]{0,99}[A-Z])(?=[^\d\s]{0,99}\d[^\d\s]{0,99}\d)
  (?P<word>[A-Za-z0-9+_][A-Za-z0-9+/_-]{23,2000}={0,2})(?![\w/.=:-])""")
_IN_JAR = r"""(?(quote)(?:(?!(?P=quote)).){1,2000}|(?(jar)(?:(?!(?P=jar)).){1,2000}
  |(?(head)[^"'\n]{1,2000}|%s)))""" % _BARE
# What a text must hold, in lower case, for a rule to be tried; the rule.
_RULES = [
    (hints.split("|"), _Pattern("(?x)(?P<kept>%s%s|%s)" % (before, _VALUE, value)))
    for hints, before, value in (
        ("""\
mysql|maria|7z|rar|sshp|passw|mongo|rdesk|twine|login|psexec|security|cqlsh|cypher|hdbsql|beeline|\
ncftp|rabbit|mycli|veracrypt|nuget|uv pub|poetry|conan|elasticsearch-|plink|scp |psftp|putty|zip|\
sqlcmd|ssh-key|bcp|osql|tsql|mosquitto|lftp|redis-cli|ldap|openssl|mkpass|sqlplus|xpdp|impdp|\
unseal|bw |obscure|authtoken|snyk|auth:|authorize-|doctl|glab|codecov|mc |http-basic|pypi-token|\
-oauth|bundle|rclone|nmcli|wpa_|dscl|password|qpdf|samba|pdfto|smbcl|signtool|swaks|db2|--cert|\
 -e | -a |pulumi|add_user|secret|variable|net user|_pw|<<<|sudo -s|sonar|echo |printf |yes |\
encrypt_|--plaint|airport|.pgpass""",
         _TYPED, _BARE),
        ("""pass|pw|key|secret|token|cred|auth|sig|_pat=|psk|pin=|mnemonic|_session=|jwt=|sid=\
|code=|appid=|ticket=|&session=|?session=""", _NAMED, _BARE),
        ("bearer|basic |pass|securestring|identified|login(|auth=(|auth(|credential|superuser",
         _SAID, _BARE),
        (":/|hook|telegram", _ADDRESSED, r"(?:[^\s/'\"]{1,200}(?=@)|%s)" % _BARE),
        (" -u| -b|curl|user|--auth|cookie|/p:|/pass:", _GIVEN, _IN_JAR))]


@functools.lru_cache(maxsize=4_096)  # paths and names come again and again
def mask_secrets(text: str) -> str:
    """Return the text with what looks like a key, a token or a password replaced by ``***``."""
    text = text.replace("\\\n", "\x1c ")  # the next line goes on: white space to the rules
    lower = text.lower()
    text = _PROVIDERS.sub("***", _KEY_BLOCK.sub("***", text))
    for hints, rule in _RULES:
        if any(map(lower.__contains__, hints)):
            text = rule.sub(r"\g<kept>***", text)
    return _WORD.sub(_hide_random, text).replace("\x1c ", "\\\n")


def _hide_random(match: Any) -> str:
    """Hide a word that looks drawn by lot: capitals, small letters and digits in quick change."""
    word = match.group()
    kinds = [char.isdigit() + 2 * char.isupper() + 4 * char.islower() for char in word]
    changes = sum(map(int.__ne__, kinds, kinds[1:]))
    quick = 5 * min(kinds.count(2), kinds.count(4), changes // 2)
    return "***" if quick >= len(word) >= 8 * word.count("/") else word


def masked(value: Any, *, hashes: bool = True) -> Any:
    """Return a JSON value with the secrets in all its strings masked, keys too.

    With ``hashes=False`` hashes are left out: for what an older version stored, which took them of
    text that was not masked.
    """
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, dict):
        return {masked(key): _masked_as(
            str(value.get("name")) if key == "value" else key, part, hashes)
                for key, part in value.items()
                if hashes or not isinstance(part, str) or not _HASH.match(f"{key}={part}")}
    if isinstance(value, (list, tuple)):
        if {*map(type, value)} == {str}:  # the words of a command, perhaps
            return mask_secrets(" \x1d".join(value)).split(" \x1d")
        return [masked(part, hashes=hashes) for part in value]
    return value


def _masked_as(key: Any, value: Any, hashes: bool) -> Any:
    """A value under its name, which may say that it is a secret; a number is none."""
    if key in ("response_id", "batch_id"):  # drawn by lot, and no secret
        return value
    if _may_name(key):
        if isinstance(value, list):
            return [_masked_as(key, part, hashes) for part in value]
        if isinstance(value, str) and mask_secrets(
                f"{key}='%s'" % re.sub(r"['\\\s]", "-", value)) == f"{key}='***'":
            return "***"
    return masked(value, hashes=hashes)


@functools.lru_cache(maxsize=1_000)
def _may_name(key: Any) -> bool:
    """Whether a name holds a word without which no rule takes it for a secret's."""
    return any(map(f"{key}=".lower().__contains__, _RULES[1][0]))


_HASH = _Pattern(r"(?:(?:content_hash|error_hash|operation)=|query=prompt )[0-9a-f]{16}\Z")


# ==================================================================================================
# Shell
# ==================================================================================================

if TYPE_CHECKING:
    Words = List[str]
    Pairs = List[Tuple[str, str]]
_PARSED_CHARS = 20_000  # characters of one command that are looked at, here-documents apart
_LONGEST_PATH = 1_000  # characters: what is longer is not known
_EXPANSIONS = 40  # words that one word with variables or braces may become
_GUARDS = [(char, chr(0xE000 + at)) for at, char in enumerate("$`{*?[~")]  # quoted: no meaning
_DRIVE = _Pattern(r"[A-Za-z]:(?=[\\/]|$)")
_CANONICAL = _Pattern(r"(?:/\.?\w[\w.@+-]*)+\Z")  # most paths: there is nothing to normalise
_WINDOWS = _Pattern(
    r"(?:\A|[;|{(=&])\s{0,9}[A-Z][a-z]+-[A-Z][A-Za-z]+(?![\w:-])|(?:\A|\s)[A-Za-z]:\\")
_MAYBE_WINDOWS = _Pattern(r"-(?<=[a-z]-)[A-Z]|:\\")  # wherever _WINDOWS finds something, and quick
# The last group that matched names the kind of a piece and holds its value; no group: a gap.
_PIECES = r"""(?xs)
  [^\S\n]+|%(escape)s\r?\n
| <<-?[ \t]*\\?(?P<q>['"]?)(?P<doc>[^\s'"|&;<>()]+)(?P=q)
| \d*[<>]&(?:\d+|-)
| (?P<redirect>(?:&|\d+|\*)?(?:>>|>\||<>|<<<|>&|>)(?!\()|\d*<(?!\())
| (?P<op>&&|\|\||;;&?|\|&|[;|&()\n%(braces)s])
| (?<![^\s|&;<>(){}])\#[^\n]*
| @(?P<at>['"])(?P<here>\s*\n.*?)(?:\n(?P=at)@|\Z)
| '(?P<single>[^']*)'
| \$'(?P<ansi>[^'\\]*(?:\\.[^'\\]*)*)'
| "(?P<double>[^"\\$`]*)"
| (?P<quote>")
| [$<>](?P<nested>\()%(tick)s
| %(escape)s(?P<escape>.)
| (?P<var>\$(?:\w+|\{[^}]{0,99}\}|[?@*\#!$-]))
| (?P<plain>[^\s'"`$|&;<>()%(plain)s]+|[\\$`{}])
"""
_BASH = _Pattern(_PIECES % {"escape": r"\\", "braces": "", "tick": "|(?P<tick>`)", "plain": r"\\"})
_POWERSHELL = _Pattern(_PIECES % {"escape": "`", "braces": "{}", "tick": "", "plain": "{}"})
_QUOTED = _Pattern(r"""(?xs)
  (?P<text>[^"\\$`]+)|\\(?P<escape>[$`"\\])|\\\n(?P<none>)|(?P<backslash>\\.)
| \$(?P<nested>\()|(?P<tick>`)|(?P<var>\$(?:\w+|\{\w*\}?))|(?P<dollar>\$)|(?P<quote>")""")
_IN_NESTED = _Pattern(r"""(?xs)
  (?<!<)<<-?[ \t]*\\?(['"]?)([A-Za-z_]\w*)\1.*?(?:\n[ \t]*\2(?!\w)|\Z)
| '[^']*'|"[^"\\]*(?:\\.[^"\\]*)*"|\\.|[()]""")
_ASSIGNMENT = _Pattern(r"\w+\+?=")
_EXPANDED = _Pattern(r"\$(?:(\w+)|\{(\w+)\})|\{([^{}]*)\}")
_NO_FILE = _Pattern(r"/dev/(?!shm)|\$null$|nul$|\$\(\)", re.I)
_PROGRAM = _Pattern(r"\.(?:exe|cmd|bat|ps1)$|(?<=.)@[^@]*$")
_SED_SPAN = r"(\d{1,9})(?:,\s*(\+?)(\d{1,9}|\$))?\s*p"
_SED_PRINTS = _Pattern(r"(?:%s[\s;|]*)+$" % _SED_SPAN)
_AWK_LINES = _Pattern(r"""(?x)
    \s*F?NR\s*(?:==\s*(\d{1,9})|>=\s*(\d{1,9})(?:\s*&&\s*F?NR\s*<=\s*(\d{1,9}))?)
    \s*(?:\{\s*print\s*(?:\$0\s*)?\}\s*)?$""")
_PATCHED = r"(?m)^(?:\*\*\* (?:(?:Update|Add|Delete) File|Move to): |\+\+\+ (?:b/)?)(\S[^\t\n]*)"


class ShellEffects:
    """What one command line does.

    reads: (path, first, last) of file lines in the output, 1-based and inclusive; last None = to
    the end, first negative = that many lines from the end. searches: (query, scope). writes: the
    paths it names (a directory stands for all below it). changes: [] nothing, paths, ["*"] any,
    ["?"] not known. acts: True when it changes what other commands tell, but no file (``git add``).
    pure: True when the output is the lines of ``reads`` (numbered or under echoed headings) and no
    more. In one command line changes come before reads.
    """

    def __init__(self) -> None:
        self.reads: List[Any] = []
        self.searches: Pairs = []
        self.writes: Words = []
        self.changes: Words = []
        self.pure = True
        self.acts = False

    @property
    def kind(self) -> str:
        """Return "write", "read", "search" or "other": what the command line mainly is."""
        if self.changes:
            return "other" if self.changes == ["?"] else "write"
        return "read" if self.reads else "search" if self.searches else "other"

    def settle(self) -> ShellEffects:
        marks = [mark for mark in "*?" if mark in self.changes]
        self.changes = marks[:1] or list(dict.fromkeys(self.changes))
        self.writes = list(dict.fromkeys(self.writes))
        self.pure &= bool(self.reads) and not self.searches and self.changes != ["?"]
        return self


def shell_effects(command: Any, cwd: str = "") -> ShellEffects:
    """Return the effects of a command, a string or a list of strings; paths are joined to ``cwd``.

    What cannot be read, or costs more than a command line may, gives changes ["?"]; never raises.
    """
    shell = _Shell(cwd if isinstance(cwd, str) else "")
    try:
        if isinstance(command, str):
            shell.run(command)
        elif isinstance(command, (list, tuple)) and all(isinstance(word, str) for word in command):
            shell.show(shell.command([_guarded(word) for word in command or ["true"]], []))
        else:
            shell.unknown()
    except OverflowError:
        shell.unknown()
    return shell.effects.settle()


def canonical_path(path: str, cwd: str = "") -> str:
    """Return ``path`` joined to ``cwd`` and normalised, with forward slashes on Windows."""
    windows = _DRIVE.match(cwd)
    if not windows and _CANONICAL.match(path):
        return path
    if windows or _DRIVE.match(path) or path.startswith((".\\", "..\\", "\\\\", "~\\")):
        path, cwd = path.replace("\\", "/"), cwd.replace("\\", "/")
        if windows and re.match(r"/[A-Za-z](?:/|$)", path):
            path = path[1] + ":" + path[2:]
    if cwd and not path.startswith(("/", "~")) and not _DRIVE.match(path):
        path = cwd + "/" + path
    path = posixpath.normpath(path)
    return path[0].upper() + path[1:] if _DRIVE.match(path) else path


def patched_paths(patch: str) -> Words:
    """Return the files a patch names in its headers, as often as it does; none for other text."""
    return [path.rstrip() for path in re.findall(_PATCHED, patch) if path != "/dev/null"]


def _guarded(text: str) -> str:
    for char, guard in _GUARDS:
        text = text.replace(char, guard)  # str.translate takes ten times as long
    return text


def _plain(word: str) -> str:
    for char, guard in _GUARDS:
        word = word.replace(guard, char)
    return word


# A command line becomes (kind, value) tokens: word, redirect, doc (a here-document's body), nested
# (code), cut (the rest was not read), or an operator.


def _nested_code(text: str, at: int, opening: str) -> Tuple[str, int]:
    """Return (the code of a ``$(`` or backtick that starts before ``at``, where it ends)."""
    if opening == "`":
        end = text.index("`", at)
        return text[at:end], end + 1
    depth = 1
    for match in _IN_NESTED.finditer(text, at):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if not depth:
            return text[at:match.start()], match.end()
    raise ValueError("unbalanced parenthesis")


def _tokens(text: str, outside: Any) -> Pairs:
    """Return the tokens of a command line; ValueError where quotes or brackets do not balance."""
    tokens: Pairs = []
    documents: List[int] = []
    word, redirect, at, limit, pieces = None, "word", 0, _PARSED_CHARS, outside
    while at < len(text) and (at < limit or pieces is _QUOTED):
        match = pieces.match(text, at)
        if not match:
            raise ValueError("unbalanced quote")
        kind, at = match.lastgroup, match.end()
        piece = match.group(kind or 0)
        if kind in (None, "op", "doc", "redirect"):
            if word is not None:
                tokens.append((redirect, word))
                word, redirect = None, "word"
            if kind == "redirect":
                redirect = piece
            elif kind == "doc":
                documents.append(len(tokens))
                tokens.append(("doc", piece))
            elif kind == "op":
                tokens.append((piece, ""))
            while piece == "\n" and documents:
                place = documents.pop(0)
                end = r"^[ \t]*%s[ \t\r]*(?:\n|\Z)|\Z" % re.escape(tokens[place][1])
                body: Any = re.compile(end, re.M).search(text, at)
                tokens[place] = "doc", text[at:body.start()]
                at, limit = body.end(), limit + body.end() - at
            continue
        if kind in ("nested", "tick"):
            code, at = _nested_code(text, at, piece)
            tokens.append(("nested", "" if code.startswith("(") else code))
            piece = "$()"
        elif kind == "quote":
            pieces, piece = (outside if pieces is _QUOTED else _QUOTED), ""
        elif kind not in ("var", "plain"):
            piece = _guarded(piece)
        word = (word or "") + piece
    if pieces is _QUOTED:
        raise ValueError("unbalanced quote")
    last = [] if word is None else [(redirect, word)]
    return tokens + last + [("cut" if at < len(text) else ";", "")]


def _options(args: Words, takes: Dict[str, str]) -> Tuple[Pairs, Words]:
    """Split arguments into [(flag, value)] and operands; -50 is ("-#", "50"), -rn two flags.

    ``takes`` are the options with a value and their mark: with < it stands for the first operand,
    with > for the last. Names of several letters after one dash are PowerShell's.
    """
    letters = "".join(option[1:] for option in takes if not option[2:])
    words = any(option[1] != "-" for option in takes if option[2:])
    flags: Pairs = []
    operands: Words = []
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        if arg == "--":
            operands.extend(rest)
        elif arg[:1] != "-" or arg == "-":
            operands += arg.split(",") if words else [arg]
        elif arg[1:].isdigit():
            flags.append(("-#", arg[1:]))
        else:
            name = name.lower() if words else name
            if not words and name[1:2] != "-":
                plain, name, value = re.findall("(?s)-([^=%s]*)(.?)(.*)" % letters, arg)[0]
                flags += [("-" + letter, "") for letter in plain]
                name, equals = "-" + name, value
            flags.append((name, value if equals or name not in takes else next(rest, "")))
    first, last = ([value for name, value in flags if takes.get(name) == mark] for mark in "<>")
    flags = [flag for flag in flags if takes.get(flag[0], "-") == "-" and flag != ("-", "")]
    return flags, ["|".join(first)] * bool(first) + operands + last


def _skip(args: Words, takes: Dict[str, str]) -> int:
    """Return how many options, settings and durations stand before the command of a wrapper."""
    at = 0
    while at < len(args) and re.match(r"-|\w+=|\d[\d.]*[smhd]?$", args[at]):
        at += 2 if args[at] in takes else 1
    return at


class _Budget:
    """What may be spent on following one command line: a few hundred characters can ask for
    gigabytes. OverflowError beyond it."""

    characters = 200_000  # produced by expansions; a word of a command counts as 20
    depth = 20  # commands and shells inside each other

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if min(self.characters, self.depth) < 0:
            raise OverflowError("a command line that costs too much to follow")


_Step = namedtuple("_Step", "name args takes flags operands flow")


class _Shell:
    """Follows one command line and collects its effects.

    What flows through a pipe is a list of reads (file lines), a (query, scope) tuple (the hits of a
    search), or None (anything else); [] is no output worth a word. The effects that _ROWS names are
    methods that take a _Step and return what flows out.
    """

    def __init__(self, cwd: str) -> None:
        self.effects = ShellEffects()
        self.cwd: Optional[str] = cwd  # None once it is lost
        self.variables = {"HOME": ["~"], "PWD": ["."]}
        self.budget = _Budget()
        self.windows = self.piped = self.optional = self.fresh = False
        self.folders: List[Optional[str]] = []
        self.doc = ""

    def run(self, text: str, *, windows: bool = False) -> Any:
        """Follow a script; its output is shown, so nothing is left to flow on."""
        self.windows = windows or bool(
            _MAYBE_WINDOWS.search(text) and _WINDOWS.search(text[:_PARSED_CHARS]))
        if text.lstrip().startswith("*** Begin Patch"):
            text = "apply_patch <<'~'\n" + text
        self.budget.depth -= 1
        self.budget.spend(0)
        try:
            tokens = _tokens(text, _POWERSHELL if self.windows else _BASH)
        except ValueError:
            tokens = [("cut", "")]
        words: Words = []
        targets: Pairs = []
        flow: Any = []
        for kind, value in tokens + [(";", "")]:
            if kind == "word":
                words.append(value)
            elif kind == "doc":
                self.doc = value
            elif kind == "nested":
                self.hidden(value)
            elif kind == "cut":
                self.unknown()
            elif value:
                targets.append((kind, value))
            else:
                flow = self.operator(kind, self.stage(words, targets, flow))
                words, targets, self.doc = [], [], ""
        self.budget.depth += 1
        return []

    def operator(self, kind: str, flow: Any) -> Any:
        self.piped = kind in ("|", "|&")
        if self.piped:
            return flow
        self.show(flow)
        self.optional = kind == "||"
        if kind == "(":
            self.folders.append(self.cwd)
        elif kind == ")" and self.folders:
            self.cwd = self.folders.pop()
        return []

    def show(self, flow: Any) -> None:
        """Take note of what a pipeline leaves on the screen."""
        if flow is None or flow and self.optional and isinstance(flow, list):
            self.effects.pure = False
        elif isinstance(flow, tuple):
            self.effects.searches.append(flow)
        else:
            self.effects.reads += flow

    def hidden(self, code: str) -> None:
        """Follow code whose output is not shown: only its changes count."""
        self.fresh = code.startswith("mktemp")  # a new file: to write it changes nothing known
        inner = copy.copy(self)
        inner.effects, inner.folders = ShellEffects(), []
        inner.run(code, windows=self.windows)
        self.effects.changes += inner.effects.changes
        self.effects.writes += inner.effects.writes

    def stage(self, words: Words, targets: Pairs, flow: Any) -> Any:
        """Run one simple command with its redirections; return what flows out of it."""
        words = [each for word in self.prefix(words) for each in self.expand(word)]
        for redirect, value in targets:
            if redirect == "<":
                flow = self.lines([value])
        flow = self.command(words, flow) if words else []
        for redirect, value in targets:
            if ">" in redirect and not _NO_FILE.match(value):
                self.change(self.expand(value))
                flow = flow if redirect[0] in "23456789" else []
        return flow

    def prefix(self, words: Words) -> Words:
        """Drop keywords and assignments in front of a command, and remember literal values."""
        while words and words[0] in _KEYWORDS:
            self.effects.pure &= words.pop(0) in "do done { } time".split()
        if words and words[0] in "for foreach select case function [[".split():
            if words[2:3] == ["in"]:
                values = [each for word in words[3:] for each in self.expand(word)]
                self.variables[words[1]] = values
            return []
        if self.windows and words[1:2] == ["="]:
            self.optional, words = True, words[2:]
        if self.windows and words and not re.match(r"[A-Za-z_~?%/\\]|\.[./\\]|\. ", words[0]):
            return []
        settings = list(itertools.takewhile(_ASSIGNMENT.match, words))
        if settings and settings == words:
            name, _, value = words[-1].partition("=")
            fresh = self.fresh and value == "$()"
            self.variables[name] = ["/tmp/mktemp"] if fresh else self.expand(value)
        return words[len(settings):]

    def expand(self, word: str) -> Words:
        """Return the words that variables and braces make of one;
        what is unknown keeps its ``$``."""
        if "$" not in word and "{" not in word:
            return [word]
        found = [word]
        for part in _EXPANDED.finditer(word):
            name, braced, choice = part.groups()
            values = self.variables.get(name or braced, [part.group()])
            values = choice.split(",") if choice and "," in choice else values
            if len(found) * len(values) > _EXPANSIONS:
                return ["$()"]
            found = [each.replace(part.group(), value, 1) for each in found for value in values]
            self.budget.spend(sum(map(len, found)))
        return ["$()"] if re.search(r"\{[^{}]*,", found[0]) else found

    def command(self, words: Words, flow: Any) -> Any:
        """Run one command and return what flows out of it."""
        name, args = words[0], words[1:]
        if "$" in name:
            return self.unknown()
        known = _words()
        if name not in known:
            name = _plain(name).replace("\\", "/").rsplit("/", 1)[-1].lower()
            name = _PROGRAM.sub("", name)
        cmdlet = self.windows or words[0][:1].isupper()
        family = name.partition("-")[0] + "-*" if cmdlet else "*"
        row = known.get(name) or known.get(family) or known["*"]
        flags, operands = _options(args, row.takes)
        given = {flag for flag, _ in flags}.union(map(posixpath.basename, operands[:2]))
        if len(args) < 4 and _HELP & set(args[-1:]):
            row = row._replace(effect="harmless")
        elif row.needs and not row.needs & given or row.idle & given:
            row = row._replace(effect=row.otherwise)
        self.budget.depth -= 1
        self.budget.spend(20 * len(words))
        flow = getattr(self, row.effect)(_Step(name, args, row.takes, flags, operands, flow))
        self.budget.depth += 1
        return flow

    def path(self, word: str) -> str:
        """Return the canonical path of a word, "" when it is not known."""
        if not word or "$" in word or "`" in word:
            return ""
        word = _plain(word.replace("\\", "/") if self.windows else word)
        absolute = word.startswith(("/", "~", "\\\\")) or _DRIVE.match(word)
        path = canonical_path(word, self.cwd or "")
        known = absolute or self.cwd is not None
        return path if known and len(path) <= _LONGEST_PATH else ""

    def lines(self, words: Words) -> Any:
        """Return the lines of the files named."""
        self.budget.spend(20 * len(words))
        paths = [self.path(word) for word in words]
        self.effects.pure &= all(paths)
        return [(path, 1, None) for path in paths if path]

    def cut(self, call: _Step, files: Words, *spans: Tuple[int, Optional[int]]) -> Any:
        """Return the lines of these (first, last) in the files, or in what flows in."""
        flow = self.lines(files) if files else call.flow
        if not files and (not isinstance(flow, list) or len(flow) != 1 or flow[0][1] < 0):
            return self.harmless(call)
        reads = []
        for path, start, stop in flow:
            for first, last in spans:
                if first < 0 and stop:
                    first = max(stop - start + 2 + first, 1)
                ends = [end for end in (stop, last and start + last - 1) if end]
                first += start - 1 if first > 0 else 0
                reads.append((path, first, min(ends, default=None)))
        return reads

    def change(self, words: Words) -> Any:
        """Note that the paths change; one not known, a glob or the whole tree may be anything."""
        for word in words:
            path = self.path(word)
            inside = (self.path(".") + "/").startswith(path.rstrip("/") + "/")
            known = path and not inside and not re.search(r"[*?]", word)
            self.effects.changes.append(path if known else "*")
            if path:
                self.effects.writes.append(path)
        return []

    def found(self, call: _Step, query: str, places: Words) -> Any:
        """Return a search in normal form: query; program, places, flags that change the answer."""
        flags = sorted(flag + value for flag, value in call.flags if flag not in _NOISE)
        if isinstance(call.flow, tuple):
            return self.harmless(call._replace(args=[query] + flags))
        if call.flow and not places:
            places = ["%s:%s-%s" % read if read[1:] != (1, None) else read[0] for read in call.flow]
        else:
            places = [self.path(place) or place for place in places or ["."]]
        return _plain(query) or "*", _plain(" ".join([call.name] + sorted(places) + flags))

    # -- the effects of _ROWS

    def quiet(self, call: _Step) -> Any:
        return []

    def harmless(self, call: _Step) -> Any:
        """A command that changes nothing; over the hits of a search it makes another search."""
        if not isinstance(call.flow, tuple):
            return None
        query, scope = call.flow
        scope = _plain(" ".join([scope, "|", call.name] + call.args))
        self.budget.spend(len(scope))
        return query, scope

    def act(self, call: _Step) -> Any:
        """A command that changes what others tell, though no file."""
        self.effects.acts = True
        return self.harmless(call) if re.match("git (?!add$)", call.name) else []  # says nothing

    def anything(self, call: Optional[_Step] = None) -> Any:
        self.effects.changes.append("*")

    def unknown(self, call: Optional[_Step] = None) -> Any:
        self.effects.changes.append("?")

    def cd(self, call: _Step) -> Any:
        place = (call.operands or ["~"])[-1]
        self.cwd = self.path(place) or None
        if place == "-" or call.name == "popd":
            self.cwd = None
        return []

    def read(self, call: _Step) -> Any:
        files = [file for file in call.operands if file != "-" and "select" not in call.name]
        given = dict(call.flags)
        counts = [given[flag] for flag in _COUNTS if given.get(flag) and call.name != "nl"]
        if call.name in ("head", "tail"):
            counts.append("10")
        if not counts:
            return self.lines(files) if files else call.flow or None
        if not re.match(r"\+?\d{1,9}$", counts[0]):
            return self.harmless(call)
        number = int(counts[0])
        if call.name == "tail" or {"-tail", "-last"} & set(given):
            return self.cut(call, files, (number if "+" in counts[0] else -number, None))
        return self.cut(call, files, (1, number))

    def sed(self, call: _Step) -> Any:
        script, *files = [each for each in call.operands if each] or [""]
        given = dict(call.flags)
        if "-i" in given or "--in-place" in given:
            return self.change(files)
        script = _plain(script).strip()
        if "-n" not in given and "--quiet" not in given:
            quits = re.match(r"\d{1,9}q$", script)
            return self.cut(call, files, (1, int(script[:-1]))) if quits else self.harmless(call)
        if _SED_PRINTS.match(script):
            return self.cut(call, files, *[
                (int(first), None if last == "$" else int(last or first) + int(first) * bool(plus))
                for first, plus, last in re.findall(_SED_SPAN, script)])
        if files or call.flow and isinstance(call.flow, list):
            return self.found(call._replace(flags=[]), script, files)
        return self.harmless(call)

    def awk(self, call: _Step) -> Any:
        script, *files = call.operands or [""]
        span = _AWK_LINES.match(_plain(script))
        if span:
            exact, first, last = span.groups()
            return self.cut(call, files, (int(exact or first), int(exact or last or 0) or None))
        writes = re.search(r'>\s*["$]|\bsystem\(|\|\s*"', _plain(script))
        return self.unknown() if writes else self.harmless(call)

    def search(self, call: _Step) -> Any:
        query, *places = call.operands or [""]
        if ("--files", "") in call.flags:
            query, places = "*", call.operands
        if self.piped and not places and not call.flow:
            return None
        return self.found(call, query, places)

    def listing(self, call: _Step) -> Any:
        return self.found(call, "*", call.operands)

    def find(self, call: _Step) -> Any:
        args = call.args
        at = len(list(itertools.takewhile(lambda word: word[:1] not in "-(!", args)))
        terms = iter(args[at:])
        for term in terms:
            if term in ("-delete", "-fprint", "-fls"):
                self.anything()
            elif term in ("-exec", "-execdir", "-ok"):
                run = itertools.takewhile(lambda word: word not in (";", "+"), terms)
                self.command([word.replace("{}", "$_") for word in run] or ["true"], [])
        return self.found(call._replace(flags=[]), " ".join(args[at:]), args[:at])

    def xargs(self, call: _Step) -> Any:
        names = [word.replace("{}", "$_") for word in call.args[_skip(call.args, call.takes):]]
        inner = self.command(names + ["$_"], []) if names else None
        return None if inner is None else self.harmless(call)

    def write(self, call: _Step) -> Any:
        self.change(call.operands or ["."])
        return call.flow if call.name == "tee" else []

    def copy(self, call: _Step) -> Any:
        """The last operand changes, the others are read; one with a colon is elsewhere."""
        last = "".join(call.operands[1:][-1:])
        return [] if last in ("", "-", "/dev/null") or ":" in last[2:] else self.change([last])

    def fetch(self, call: _Step) -> Any:
        self.copy(call)

    def patch(self, call: _Step) -> Any:
        text = "\n".join([self.doc] + [arg for arg in call.args if "\n" in arg])
        paths = [_guarded(path) for path in patched_paths(_plain(text))]
        return self.change(paths) if paths else self.anything()

    def verb(self, call: _Step) -> Any:
        """A program whose sub-commands are rows."""
        at = _skip(call.args, call.takes)
        outside, inside = self.cwd, dict(zip(call.args[:at], call.args[1:])).get("-C")
        if inside:
            self.cwd = self.path(inside) or None
        verb, *rest = call.args[at:] or ["status"]
        verb = call.name + " " + verb
        flow = self.command([verb] + rest, call.flow) if verb in _words() else self.unknown()
        self.cwd = outside
        return flow

    def checkout(self, call: _Step) -> Any:
        if "--" in call.args:
            return self.change(call.args[call.args.index("--") + 1:])
        return self.anything() if call.operands else []

    def wrap(self, call: _Step) -> Any:
        """Commands that run another one: sudo, timeout 10, env A=1, npx name@version ..."""
        at = _skip(call.args, call.takes)
        if at >= len(call.args) or call.name == "command" and {"-v", "-V"} & set(call.args[:at]):
            return None
        return self.command(call.args[at:], call.flow)

    def shell(self, call: _Step) -> Any:
        """Shells: ``-c`` and relatives are followed, a script is not known."""
        windows = self.windows = call.name in ("powershell", "pwsh", "cmd")
        at = 0 if windows else len(call.args)
        at = next((at for at, arg in enumerate(call.args, 1)
                   if re.match(r"-\w*c$|-command$|/[ck]$", arg, re.I)), at)
        code = call.args[at:] if windows else call.args[at:at + 1]
        if len(code) > 1:
            return self.command(code, call.flow)
        script = "".join(code) or self.doc * (not call.operands)
        return self.run(_plain(script), windows=windows) if script else self.unknown()

    def python(self, call: _Step) -> Any:
        """Interpreters: modules of known tools are told apart, other code is not known."""
        at = call.args.index("-m") + 1 if "-m" in call.args[:3] else len(call.args)
        return self.command(call.args[at:], call.flow) if call.args[at:] else self.unknown()

    def tool(self, call: _Step) -> Any:
        """Programs with sub-commands, and programs not known: told by the verb."""
        verb, script = (call.operands + ["", ""])[:2]
        managed = call.name in _MANAGERS
        runs = verb in ("exec", "dlx", "x") or verb == "run" and call.name in _RUNNERS
        if managed and (runs or verb == "pip"):
            return self.command(["npx"] + call.args[call.args.index(verb) + runs:], call.flow)
        if managed and verb in ("run", "run-script", "r"):
            verb = script
        given = {flag for flag, _ in call.flags}.union(re.split("[-_:]", verb), call.operands)
        fixes = _FIXING & given
        if managed and fixes:
            self.effects.changes += [] if _CHECKING & given else ["*"]
            return self.harmless(call)
        tests = managed and re.match(_TEST_TASK, verb)
        looks = re.match(r"[a-z][\w-]*$", call.name) and (
            re.match(_LOOK_VERBS, verb) or re.match(_LOOK_VERBS, script))
        if not tests and (fixes or not looks):
            self.unknown()
        return self.harmless(call)


_HELP = frozenset("--version -V --help -h -help /?".split())
_KEYWORDS = "if then elif else while until do done fi esac ! { } in try catch & time".split()
_NOISE = frozenset("""
    -n -H -h --line-number --color --colour --heading --no-heading --with-filename -N -p
    --no-messages --column --no-filename --text -G
""".split())
_COUNTS = "-n --lines -# -totalcount -head -first -tail -last".split()
_LOOK_VERBS = r"""(?x)(?:list|ls|show|status|view|get|info|search|logs?|help|version|ps|top|inspect
    |describe|config|doctor|outdated|why|query|diff|check|ready|whoami|history|audit|capture|display
    |has|read|wait|count|where|activate|freeze|tree)(?:-[\w-]+)?$"""
_FIXING = frozenset("fmt format fix autofix write reformat --fix --write --apply -u".split())
_CHECKING = frozenset("check dry --check --check-formatted --dry-run".split())
_TEST_TASK = r"""(?x)(?:unit|run|cargo)?[-_:]?(?:t|tst|tests?|lint|type-?check|tsc|check|clippy|vet
    |verify|spec|e2e|coverage|credo|dialyzer|bench|validate)(?:[-_:.]\S*)?$"""
_RUNNERS = frozenset("uv poetry pipenv hatch rye pdm bundle asdf conda pipx".split())
_MANAGERS = _RUNNERS | frozenset("""
    npm pnpm yarn bun deno mise pip pip3 brew apt apt-get dnf yum pacman paru yay choco winget scoop
    gem cargo go mix dotnet swift make just task rake gradle gradlew mvn mvnw composer terraform
    npm-check-updates flutter dart nx turbo lerna
""".split())
# effect, or what it is where it has none | words (+ joins a sub-command) | options with a value
# | only with | never with
_ROWS = """
tool | * | -C -w -p -F --prefix --filter --workspace --project |  |
tool | bun deno |  |  | --check --test
quiet | echo printf mktemp : true false export unset set shopt alias ulimit umask trap wait break \
    continue exit return local declare readonly sleep test [ read shift \
    write-host write-output start-sleep write-error write-warning setlocal pwd esac ] ;; param \
    clear cls git+config git+init |  |  |
harmless | date ps env printenv which whereis where wc du df stat file uniq cut tr jq yq diff cmp \
    comm join md5sum sha1sum sha256sum shasum md5 ping id whoami uname hostname uptime free top \
    htop lsof netstat ss dig nslookup host ip ifconfig ipconfig nc pgrep man \
    basename dirname realpath readlink seq expr column paste fold fmt rev od xxd hexdump strings \
    base64 cksum look locale tput stty tty history jobs fg bg open xdg-open pbcopy pbpaste \
    ccusage sysctl sw_vers system_profiler nvidia-smi lscpu lsblk lsusb lspci dmesg journalctl \
    tasklist systeminfo ver vol wmic pytest py.test jest vitest tox nox rspec phpunit ctest mocha \
    ava playwright cypress mypy pyright pyre flake8 pylint shellcheck actionlint hadolint \
    yamllint bandit vulture gitleaks golangci-lint staticcheck nproc arch getent groups arp sort \
    traceroute systemctl service openssl ffprobe identify cal bc dc sum nm ldd otool objdump \
    mdfind mdls format-table format-list out-string out-null ft fl measure numfmt unittest \
    py_compile compileall timeit doctest coverage site http.server json.tool get-* test-* \
    select-* where-* sort-* format-* measure-* out-* write-* convertto-* convertfrom-* resolve-* \
    find-* show-* compare-* group-* join-* split-* read-* wait-* foreach-* start-* stop-* \
    git+status git+log git+diff git+show git+blame git+rev-parse git+describe git+reflog \
    git+shortlog git+bundle git+merge-base \
    git+cat-file git+for-each-ref git+ls-remote git+rev-list git+name-rev git+symbolic-ref \
    git+show-ref git+check-ignore git+check-attr git+count-objects git+fsck git+gc git+notes \
    git+diff-tree git+diff-index git+hash-object git+var git+version git+help \
    git+range-diff git+cherry git+whatchanged git+update-index git+write-tree git+archive \
    git+show-branch git+update-ref findstr |  |  |
read | cat less more bat batcat tac zcat type view | -r --line-range -l --style |  |
read | nl | -v -s -w -b -l -i -n |  |
read | head tail | -n -c --lines --bytes |  | -c --bytes
read | get-content gc | >-path >-literalpath -totalcount -head -first -tail -last -encoding |  |
read | select-object select | -first -last -property | -first -last | -skip
sed | sed gsed | <-e <--expression -f -l |  |
write/awk | awk gawk mawk | -F -v -f -i | -i |
search | rg ripgrep | <-e <-f <--regexp -A -B -C -g -t -T -m -M -E -r -d --glob --iglob --type \
    --type-not --include --exclude --max-count --context --max-depth --sort |  |
search | grep egrep fgrep zgrep ag ack git+grep | <-e <-f <--regexp -A -B -C -m --include \
    --exclude --exclude-dir --max-count --context |  |
search | fd fdfind | -e -E -t -d --type --max-depth |  |
search | select-string sls | <-pattern >-path >-literalpath -context -include -exclude -encoding \
    |  |
listing | ls ll dir exa eza vdir git+ls-files git+ls-tree | -I |  |
listing | tree | -I -L -P |  |
listing | gci get-childitem | >-path >-literalpath -filter -include -exclude -depth -erroraction \
    |  |
find | find gfind |  |  |
xargs | xargs parallel | -n -I -P -L -d -s -a -E |  |
cd | cd pushd popd chdir set-location push-location sl |  |  |
verb | git | -C -c --git-dir --work-tree |  |
verb | ruff biome dprint | --config |  |
checkout | git+checkout git+switch | -b -B -c -C |  |
anything | git+merge git+rebase git+pull git+revert git+cherry-pick git+am git+filter-branch \
    git+filter-repo git+sparse-checkout git+read-tree git+checkout-index git+lfs wget dd |  |  |
act | git+add git+commit git+push git+fetch git+tag |  |  | -l --list
act | kill pkill killall chmod chown chgrp |  |  |
act | git+branch |  | -d -D -m -M -f --delete --move --set-upstream-to -u |
act | git+remote git+worktree |  | add remove rm rename set-url prune update move |
anything/act | git+stash git+bisect git+submodule |  |  | list show status log drop
anything/act | git+reset |  | --hard --merge --keep |
anything | git+clean |  |  | -n --dry-run
anything | tar unzip gunzip gzip 7z zip |  |  | -t -l tf tvf tzf --list
write | rm rmdir unlink md rd del erase mv move ren tee touch mkdir | -m -d |  |
write | truncate shred ed ex sponge dos2unix unix2dos | -s -r |  |
write/act | git+rm git+mv |  |  | --cached
write/act | git+restore | -s --source |  | --staged -S
write | set-content add-content out-file new-item remove-item clear-content move-item rename-item \
    ni ri | >-path >-literalpath >-filepath >-destination -value -encoding -itemtype -name \
    -newname -width -erroraction -filter -include -exclude |  |
copy | cp ln install rsync scp copy xcopy robocopy | >-t >--target-directory |  |
copy | copy-item | <-path >-destination |  |
copy | git+clone | -b -o --depth --branch --origin |  |
fetch | curl | >-o >--output -H -X -d -u -A -b -F |  |
patch | patch apply_patch applypatch git+apply |  |  | --check --stat --dry-run
write | black isort rustfmt stylua ruff+format dprint+fmt | -c -l --config --line-length |  | \
    --check --diff --check-only
write | prettier eslint gofmt goimports clang-format autopep8 yapf shfmt markdownlint stylelint \
    rubocop standard xo oxlint ruff+check biome+check biome+format biome+lint | -c -l --config \
    --select --ignore --ext | --fix --write -w -i --in-place --apply -a -A | --check --diff \
    --fix-dry-run
wrap | wsl | -d -u |  |
wrap | sudo env npx bunx uvx exec doas command builtin time nohup caffeinate setsid chronic | \
    -u -g -p -C -h -a -d --package |  |
wrap | timeout gtimeout nice ionice watch stdbuf | -s -k --signal --kill-after -n -c -i -o -e | \
    |
shell | bash sh zsh dash ksh |  |  | -n
shell | powershell pwsh cmd |  |  |
python | python python3 python2 py pypy |  |  |
write/unknown | perl ruby | -e -E -M -I | -i |
unknown | node php tsx ts-node tsc |  |  | --test --check --noEmit
unknown | docker kubectl |  | run exec cp compose build |
unknown | gh |  | checkout clone download |
unknown | ssh eval invoke-expression iex |  |  |
unknown | source . |  |  | activate .bashrc .zshrc .profile .bash_profile .env .envrc nvm.sh env
"""
_Word = namedtuple("_Word", "effect otherwise takes needs idle")


@functools.lru_cache(maxsize=None)
def _words() -> Dict[str, _Word]:
    """What is known of commands, by name."""
    return {
        word.replace("+", " "): _Word(
            effect.split("/")[0].strip(), (effect.strip() + "/harmless").split("/")[1],
            {option.lstrip("<>"): option[0] for option in valued.split()},
            set(needs.split()), set(idle.split()))
        for row in _ROWS.strip().split("\n")
        for effect, words, valued, needs, idle in [row.split("|")]
        for word in words.split()}


# ==================================================================================================
# Context
# ==================================================================================================

if TYPE_CHECKING:
    Events = List[SessionEvent]

TO_THE_END = 10**9  # last line of a read whose end is not known

_FAILURES = (
    ("collateral", _Pattern(r"sibling tool call errored|parallel tool call .* errored", re.I)),
    ("interrupted", _Pattern("Request interrupted by user|aborted by user")),
    ("declined", _Pattern(
        r"doesn't want to (?:proceed|take this action)|permission to use .{0,80} has been denied|"
        r"(?:declined|rejected|denied|cancelled|aborted) by (?:the )?user|"
        r"user (?:declined|rejected)|requires approval|you haven't granted it", re.I)),
    ("transient", _Pattern(r"\b(?:429|503|529)\b|overloaded|rate.?limit|too many requests|"
                           r"service unavailable", re.I)))


def failure_kind(data: Data) -> str:
    """Why a failure is not the agent's: "declined", "transient", "collateral" or "interrupted"; ""
    when it is."""
    if data.get("kind"):
        return str(data["kind"])
    message = str(data.get("message") or data.get("error") or "")[:1000]
    kind = next((kind for kind, pattern in _FAILURES if pattern.search(message)), "")
    code = data.get("status_code", data.get("code"))
    return kind or ("transient" if code in (429, 503, 529) else "")


def changes_of(event: SessionEvent, cwd: str = "") -> List[str]:
    """Paths the event may have changed; ["*"]: anything; ["?"]: not known; []: nothing."""
    data, kind = event.data, event.event_type
    if "changes" in data:
        changes = data["changes"]
        known = isinstance(changes, list) and all(path.__class__ is str for path in changes)
        return changes if known else ["?"]
    effect = "write"
    if kind in (EventType.TOOL_CALL, EventType.ERROR):
        command = _command_of(data)
        if command:
            return _effects_of(command, cwd).changes
        tool = str(data.get("tool") or data.get("name") or "").lower()
        effect = TOOL_KINDS.get(tool, "?" if tool else "")
    elif kind is not EventType.FILE_WRITE:
        return []
    if effect == "write" and kind is not EventType.ERROR:
        return [canonical_path(path, cwd) for path in _paths_of(data)] or ["*"]
    return ["?"] if effect in ("?", "shell") else []


# Agents run few commands many times.
_effects_of = functools.lru_cache(maxsize=2_000)(shell_effects)


def _command_of(data: Data) -> str:
    arguments = data.get("args")
    inner = arguments.get("command") if isinstance(arguments, dict) else ""
    command = data.get("command") or inner
    return command if isinstance(command, str) else ""


def _is_imported(data: Data) -> bool:
    """Whether a reader made the event: then ``line`` and ``path`` are its place in the
    transcript."""
    return "line" in data and "response_id" in data


def _paths_of(data: Data) -> List[str]:
    """The files an event names. In an imported event ``path`` is the transcript's."""
    path = data.get("file_path") or data.get("file") or not _is_imported(data) and data.get("path")
    paths = data.get("file_paths") or [path]
    return [path for path in paths if isinstance(path, str) and path] \
        if isinstance(paths, list) else []


def line_range(data: Data) -> Tuple[int, int]:
    """First and last line a read asked for; (1, TO_THE_END) for a whole file; the last n lines are
    (-n, -1)."""
    first: Any = data.get("start_line")
    last: Any = data.get("end_line")
    given = data.get("lines") or data.get("line_range") or data.get("view_range")
    if isinstance(given, str) and re.match(r"\d{1,9}\s*[-:,]\s*\d{1,9}$", given):
        given = [int(number) for number in re.findall(r"\d+", given)]
    if isinstance(given, (list, tuple)) and len(given) == 2:
        first, last = given
    elif first is None and last is None:
        first, limit = data.get("offset") or 1, data.get("limit")
        last = first + limit - 1 if _is_count(first) and _is_count(limit) and limit else None
    first = first if _is_count(first) else 1
    if first < 0:
        return first, -1
    last = last if _is_count(last) and last > 0 else data.get("total_lines")
    return max(first, 1), last if _is_count(last) and last >= first else TO_THE_END


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Repeat = namedtuple("Repeat", "earlier covered total also exact", defaults=((), True))
Repeat.__doc__ = """What of a read or a result its window holds already: the event that brought it
first, how many of how many lines or characters, further events that brought some of them, and
whether all of it is known to be the same (False: nearly all lines of an answer are)."""

_ANSWERING = (EventType.SEARCH, EventType.TOOL_CALL)  # what they bring is compared as a whole
LEAST_ANSWER = 50  # tokens of a result that counts as given before when another call gave it
LEAST_POLL = 500   # tokens of a result whose unchanged lines count where nine in ten are


# Tools that wait for a process of the agent's, which may write meanwhile.
_WAITING = "write_stdin wait bashoutput taskoutput monitor".split()
_JOINED = _Pattern(r"&&|\|\||[;\n]")
_SILENT = ("", "cd", "echo", "sleep", "export")  # commands that ask nothing


def _questions(command: str) -> int:
    """How many things a command line asks, one after the other."""
    first_words = [part.strip().split(" ")[0] for part in _JOINED.split(command)]
    return sum(word not in _SILENT for word in first_words)


_Held = namedtuple("_Held", "first last digest clock event")  # lines that a read brought


class _Holding:
    """What the live window of one agent holds."""

    def __init__(self) -> None:
        self.reads: Dict[str, List[_Held]] = {}      # by path
        self.answers: Dict[Any, SessionEvent] = {}   # by key of a search, by operation, by answer
        self.before: Set[Any] = set()  # ids of the answers given before a person spoke

    def leave(self, ids: Set[Any]) -> None:
        """Results left a context that goes on."""
        for held in self.reads.values():
            held[:] = [old for old in held if old.event.id not in ids]
        self.answers = {key: old for key, old in self.answers.items() if old.id not in ids}


class ContextMemory:
    """What every context window of a session still holds unchanged, followed event by event.

    Windows belong to one agent and end at a compaction. The files on disk are shared: a write by
    one agent makes the copies in every window stale. A command that is not recognised ends all
    searches, and leaves a read repeated only if its content is known to be the same.
    """

    def __init__(self, cwd: str = ""):
        self.cwd = cwd
        self._windows: Dict[str, _Holding] = {}
        self._folders: Set[str] = set()  # those above every path that was read
        self._clock = 0
        self._doubt = 0  # clock of the last command that was not recognised

    def _window(self, event: SessionEvent) -> _Holding:
        agent = event.agent_id
        return self._windows.get(agent) or self._windows.setdefault(agent, _Holding())

    def observe(self, event: SessionEvent) -> Optional[Repeat]:
        """What of this event its window held already (None: nothing), and take the event in."""
        self._clock += 1
        kind = event.event_type
        if kind is EventType.AI_RESPONSE and "changes" not in event.data:
            return None
        changes = changes_of(event, self.cwd)
        if changes:
            self._forget(changes)  # a command line that changes and reads shows what it has changed
        repeat, window = None, self._window(event)
        if kind is EventType.FILE_READ:
            asked = self._asked(event)
            repeat = self._repeated_read(event, asked)
            self._keep(window, event, asked)
        elif kind in _ANSWERING and self._acts(event):
            window.answers.clear()
        elif kind in _ANSWERING:
            repeat = self._repeated_answer(event)
            self._keep_answer(window, event)
        elif kind is EventType.USER_MESSAGE:
            window.before = {answer.id for answer in window.answers.values()}
        elif is_compaction(event):
            del self._windows[event.agent_id]
        elif "left" in event.data:
            window.leave(set(event.data["left"]))
        return repeat

    def repeats(self, event: SessionEvent) -> Optional[Repeat]:
        """What of this event its window holds, without taking the event in; None when nothing."""
        if event.event_type is EventType.FILE_READ:
            return self._repeated_read(event, self._asked(event))
        asks = event.event_type in _ANSWERING and not self._acts(event)
        return self._repeated_answer(event) if asks else None

    def _repeated_read(self, event: SessionEvent,
                       asked: List[Tuple[str, _Held]]) -> Optional[Repeat]:
        if event.data.get("unchanged"):
            return None
        found = [self._covered(*read) for read in asked]
        whole = [repeat for repeat in found if repeat and repeat.covered == repeat.total]
        if len(found) == 1:
            return found[0]
        if not found or len(whole) < len(found):
            return None  # of several files in one result, the share of each is not known
        _, *others = [e for repeat in whole for e in (repeat.earlier, *repeat.also)]
        return whole[0]._replace(also=tuple(others))

    def foresee(self, event: SessionEvent) -> None:
        """Give a read that has not run yet the lines it will bring: those the same request brought
        before, else as many as the file is known to have."""
        data = event.data
        asked = self._asked(event) if event.event_type is EventType.FILE_READ else []
        if len(asked) != 1 or "reads" in data:
            return
        path, (first, last, *_) = asked[0]
        for old in reversed(self._window(event).reads.get(path, ())):
            was = old.event.data
            if was.get("content_hash") and was.get("lines") \
                    and all(was.get(key) == data.get(key) for key in _REQUEST):
                data["lines"] = was["lines"]
                return
            total = was["total_lines"] if _is_count(was.get("total_lines")) else 0
            if first <= total < last:
                last = total
        data["lines"] = [first, last]

    def held_since(self, event: SessionEvent) -> Optional[float]:
        """When the oldest read of the event's files that its window holds was, in seconds since
        1970; None: not known."""
        reads = self._window(event).reads
        times = [seconds_of(old.event.timestamp) for path, _ in self._asked(event)
                 for old in reads.get(path, ())]
        known = [moment for moment in times if moment is not None]
        return min(known) if known and len(known) == len(times) else None

    def _asked(self, event: SessionEvent) -> List[Tuple[str, _Held]]:
        """The files of a read, and the lines of each."""
        data = event.data
        several, pages = data.get("reads"), data.get("pages")
        if isinstance(several, list) and all(
                isinstance(read, (list, tuple)) and len(read) == 3 for read in several):
            spans = [(str(path), line_range({"lines": span})) for path, *span in several]
        else:
            part = f"/#pages={pages}" if pages else ""
            spans = [(path + part, line_range(data)) for path in _paths_of(data)[:1]]
        digest = data.get("content_hash") or ""
        return [(canonical_path(path, self.cwd), _Held(*span, digest, self._clock, event))
                for path, span in spans]

    def _covered(self, path: str, new: _Held) -> Optional[Repeat]:
        first, last, digest, _, event = new
        held = self._window(event).reads.get(path, [])
        if digest and first < 0:
            # The end of a file may be another one each time: only the same answer repeats.
            held = [old for old in held if old.digest == digest and old.first == first]
        same = _same(held, new)
        if same is False:
            return None
        spans = [(max(old.first, first), min(old.last, last), old.clock, old.event) for old in held
                 if (same or old.clock > self._doubt) and old.first <= last and old.last >= first]
        covered, end = 0, first - 1
        used: Events = []
        for start, stop, _, earlier in sorted(spans, key=lambda span: span[:3]):
            brought = stop - max(start - 1, end)
            if brought > 0:
                covered, end = covered + brought, stop
                used.append(earlier)
        if not covered:
            return None
        total = last - first + 1
        lines, *characters = event.data.get("overlap") or (0, 0, 0)
        if covered == lines:  # lines are of different lengths
            covered, total = characters
        return Repeat(used[0], covered, total, tuple(used[1:]))

    def _repeated_answer(self, event: SessionEvent) -> Optional[Repeat]:
        """A search that was run before, or any result that was given before."""
        window, data = self._window(event), event.data
        held, answer = window.answers, data.get("content_hash")
        searched = event.event_type is EventType.SEARCH
        earlier = held.get(search_key(data)) if searched else None
        if earlier:
            old = earlier.data.get("content_hash")
            if not answer and _is_imported(data):
                return None  # a hosted search: what it found is not recorded, and has left
            if not (old and answer and old != answer):
                return Repeat(earlier, 1, 1)
        given, response = held.get(answer), data.get("response_id")
        if given and response and given.data.get("response_id") == response:
            return None  # asked in one breath: the first answer was not known yet
        if given and event.tokens_input >= LEAST_ANSWER:
            # A command looks at the world outside, where a person may have changed something; one
            # of several questions may have no answer, which is news.
            sure = searched or given.id not in window.before
            alike = data.get("operation") == given.data.get("operation")
            # Other questions have the same short answer by chance: a refusal, "none found".
            tells = searched or event.tokens_input >= LEAST_POLL
            return Repeat(given, 1, 1, (), sure and (
                alike or tells and _questions(_command_of(data)) < 2))
        last = held.get(("last", data.get("operation")))
        if last and event.tokens_input >= LEAST_POLL and data.get("same_lines"):
            same, total = data["same_lines"]
            return Repeat(last, same, total, (), False)
        return None

    def _acts(self, event: SessionEvent) -> bool:
        """Whether what other commands tell is another thing after this one, though no file is."""
        command = "" if "changes" in event.data else _command_of(event.data)
        return bool(event.data.get("acts") or command and _effects_of(command, self.cwd).acts)

    def _keep_answer(self, window: _Holding, event: SessionEvent) -> None:
        data, tool = event.data, event.data.get("tool")
        if str(tool).lower() in _WAITING:  # others tell news after it, but for what is polled
            window.answers = {key: old for key, old in window.answers.items()
                              if isinstance(key, tuple) and key[0] == "last"
                              or old.data.get("tool") == tool}
        key = search_key(data) if event.event_type is EventType.SEARCH else None
        if data.get("truncated"):
            return
        if key:
            window.answers[key] = event
        if data.get("content_hash"):
            window.answers[data["content_hash"]] = event
            window.answers["last", data.get("operation")] = event

    def _keep(self, window: _Holding, event: SessionEvent,
              asked: List[Tuple[str, _Held]]) -> None:
        data = event.data
        total = data["total_lines"] if _is_count(data.get("total_lines")) else 0
        if data.get("unchanged") or data.get("truncated"):
            return
        for path, new in asked:
            held = window.reads.setdefault(path, [])
            self._note_folders(path)
            if _same(held, new) is False:
                held.clear()
            polled = any(old[:3] == new[:3] and old.clock > self._doubt and all(
                data.get(key) == old.event.data.get(key) for key in _SAME_READ) for old in held)
            if not polled:  # what is polled is not kept a thousand times
                held.append(new)
                if new.first == 1 and new.last >= (total or TO_THE_END):
                    held.append(new._replace(first=-new.last, last=-1, digest=""))

    def _note_folders(self, path: str) -> None:
        while "/" in path:
            path = path.rpartition("/")[0]
            if path in self._folders:
                return
            self._folders.add(path)

    def _forget(self, changes: List[str]) -> None:
        if "?" in changes:
            self._doubt = self._clock
        stems = [place.rstrip("/") for place in changes]
        below, places = not self._folders.isdisjoint(stems), tuple(stem + "/" for stem in stems)
        for window in self._windows.values():
            window.answers.clear()
            for stem in stems:
                window.reads.pop(stem, None)
            if "*" in changes:
                window.reads.clear()
            elif below:  # a look at every path: not for each file that is written
                window.reads = {path: held for path, held in window.reads.items()
                                if not path.startswith(places)}


def _same(held: List[_Held], new: _Held) -> Optional[bool]:
    """Whether what came back is known to be as a window holds it; None where it is not known."""
    content = new.event.data.get("content")
    if content in ("same", "changed"):
        return bool(content == "same")
    answers = [old.digest == new.digest for old in held
               if old.digest and new.digest and old[:2] == new[:2]]
    return all(answers) if answers else None


_REQUEST = "tool operation offset limit pages".split()  # of one read, and of another like it
_SAME_READ = _REQUEST + "lines total_lines content".split()


def search_key(data: Data) -> Optional[Tuple[str, str, str]]:
    """Tool, query and scope with case and space folded; None without a query."""
    query = " ".join(str(data.get("query") or data.get("pattern") or "").lower().split())
    names = "scope file_path glob type include".split() + ["path"] * (not _is_imported(data))
    scope = " ".join(f"{name}={data[name]}" for name in names if data.get(name))
    tool = str(data.get("tool") or "").lower()
    return (tool, query, " ".join(scope.split())) if query else None


def _cwd_of(session: Session) -> str:
    cwd = (session.source or session.metadata).get("cwd")
    return cwd if isinstance(cwd, str) else ""


def repeats_in(session: Session) -> List[Tuple[SessionEvent, Repeat]]:
    """The reads and searches of a session that brought what their window held already, in order."""
    memory = ContextMemory(_cwd_of(session))
    pairs = [(event, memory.observe(event)) for event in session.events]
    return [(event, repeat) for event, repeat in pairs if repeat is not None]


# ==================================================================================================
# Accounting
# ==================================================================================================

def share_out(total: int, weights: List[int]) -> List[int]:
    """Whole parts of ``total`` in proportion to ``weights`` that add up to it (largest remainder,
    then order)."""
    if len(weights) == 1:
        return [total]
    whole = sum(weights) or 1
    shares = [total * weight // whole for weight in weights]
    missing = total - sum(shares) if any(weights) else 0
    if missing:
        remainders = [-(total * weight % whole) for weight in weights]
        for index in sorted(range(len(weights)), key=remainders.__getitem__)[:missing]:
            shares[index] += 1
    return shares


class Analysis:
    """What one analysis knows of a session: its events by id, what they repeat, what they cost. It
    is made for every analysis and forgotten with it, since events may be changed in place.

    A wasted input token costs the price class it was billed at, plus its carry: it is sent again
    with every later call of its window, at the cache-read price, while that call's cache read
    reaches its position in the context. A cache rebuild costs what it was billed beyond a cache
    read, and no carry.
    """

    def __init__(self, session: Session):
        self.session = session
        self.events = session._counted()
        self.by_id = {event.id: event for event in self.events}

    @functools.cached_property
    def repeats(self) -> List[Tuple[SessionEvent, Repeat]]:
        """The reads and searches that brought what their window held already, in order."""
        return repeats_in(self.session)

    @functools.cached_property
    def walk(self) -> ContextWalk:
        """The session's contexts, followed to the end."""
        return self.follow().walk

    @functools.cached_property
    def bill(self) -> Data:
        """The session's bill, as `bill_of` gives it."""
        return self.follow().bill

    @functools.cached_property
    def _carried(self) -> Dict[str, int]:
        """Pico-dollars paid for reading the tokens of an event from the cache, by its id."""
        paid: Dict[str, int] = defaultdict(int)
        for piece in self.walk.pieces:
            if piece.event is not None:
                paid[piece.event.id] += piece.carried // _PAIRED
        return paid

    def cost(self, event: SessionEvent, entered: int, written: int) -> int:
        """Pico-dollars of some of an event's input tokens, carry included, and of its output."""
        price, total = self.session.price_of(event), event.tokens_input
        cost = price.cost(Usage(output=written))
        if entered and total:
            billed = self.session.entry_cost(event)
            if event.data.get("source") == Source.REBUILD:
                read = total * price.rates.read
                return int(cost + min(billed * entered // total, max(0, billed - read)))
            cost += (billed + self._carried[event.id]) * entered // total
        return cost

    def follow(self, *watchers: Callable[[Step, Optional[Data]], Any]) -> Analysis:
        """Follow the contexts and make out the bill. The watchers are called with every step, and
        the rebuild where it is one."""
        session = self.session
        self.walk, self.bill = walk, bill = ContextWalk(session), empty_bill()
        self.days: Dict[Tuple[str, str], Dict[str, int]] = defaultdict(lambda: defaultdict(int))
        days = {stamp: days_of(stamp or session.started_at)
                for stamp in {event.timestamp for event in self.events}}
        cells = _add_usage(bill, session)
        hidden, small = bill["hidden_output"], bill["small_rebuilds"]
        hidden["calls"] = session.metadata.get("output_lower_bound_calls", 0)
        for step in walk:
            rebuild, tokens = None, step.kept - step.read if step.call else 0
            if tokens >= SMALL:
                rebuild = _rebuild(step, session)
                bill["rebuilds"].append(rebuild)
            elif tokens:
                small["count"] += 1
                small["tokens"] += tokens
                small["cost"] += step.rebuild_cost
            if step.call:
                hidden["of"] += 1
                bill["unpriced"]["calls"] += session.price_of(step.call).model == UNPRICED
            last, visible = step.last, step.last.tokens_input if step.last else 0
            if last and hidden["calls"] and visible > sum(e.tokens_output for e in step.events):
                hidden["cost_if_visible"] += session.price_of(last).cost(Usage(output=visible))
            for watch in watchers:
                watch(step, rebuild)
            self._date(step, days)
        for content, paid in walk.first.items():
            cells[content, FIRST] = paid
        for piece in walk.pieces:
            cells[piece.content, CARRIED] += piece.carried
            cells[piece.content, AGAIN] += piece.again
        bill["cells"] = _cell_rows(cells)
        return self

    def _date(self, step: Step, days: Dict[str, Tuple[str, str]]) -> None:
        """Book what a call read and took in on its day, what was written on that of the writing."""
        session, call = self.session, step.call
        if call:
            day = self.days[days[call.timestamp]]
            day[CARRIED] += step.read * session.price_of(call).rates.read
            day[AGAIN] += step.rebuild_cost
            day[FIRST] += step.fresh_cost - step.rebuild_cost
        for event in step.events:
            own, output = self.days[days[event.timestamp]], event.tokens_output
            taken = day if call else own
            taken["total_tokens"] += event.tokens_input
            taken["prompts"] += event.event_type is EventType.USER_MESSAGE
            if not call:
                again = event.data.get("source") == Source.REBUILD
                own[AGAIN if again else FIRST] += session.entry_cost(event)
            if output:
                own["total_tokens"] += output
                own["output"] += output * session.price_of(event).rates.output


# What a context holds; what other tools return goes by the tool's name.
START_LOAD, PROMPTS, FILE_READS = "start load", "prompts", "file reads"
SEARCHES, SHELL, NOT_ATTRIBUTED = "searches", "shell", "unattributed"
ANSWERS, ATTACHMENTS = "answers kept in the context", "attachments and injected text"
RELOAD = "reload after a compaction"
_LOADED = {"": START_LOAD, Source.SYSTEM: START_LOAD, Source.COMPACTION: RELOAD,
           Source.CLEAR: RELOAD, Source.UNATTRIBUTED: NOT_ATTRIBUTED, Source.RESUME: ANSWERS}
_CONTENTS = {EventType.USER_MESSAGE: PROMPTS, EventType.AI_RESPONSE: ANSWERS,
             EventType.THINKING: ANSWERS, EventType.FILE_READ: FILE_READS,
             EventType.SEARCH: SEARCHES}
_NOT_RETURNED = {PROMPTS, ATTACHMENTS, *_LOADED.values()}

HOW_PAID = FIRST, CARRIED, AGAIN = "first", "carried", "again"
_PAIRED = 1 << 64  # tokens and their cost in one number: cost * _PAIRED + tokens
SHORT_TTL, HOUR_TTL = 300, 3_600  # seconds that a cache lives
_LAID_OUT = (Source.REBUILD, Source.UNATTRIBUTED)  # loads that stand for no moment of their own


def content_of(event: SessionEvent) -> str:
    """What an event's input tokens are, in the bill's words."""
    data, kind = event.data, event.event_type
    if kind is EventType.CONTEXT_LOAD:
        return _LOADED.get(data.get("source") or "", ATTACHMENTS)
    if kind in _CONTENTS:
        return _CONTENTS[kind]
    return SHELL if data.get("command") else str(
        data.get("tool") or kind.value.lower().replace("_", " "))


class Piece:
    """What entered a context in one go. ``event``: None for what was counted elsewhere or stands
    for several. ``carried``, ``again``: what was paid for it after its entry: cost * _PAIRED +
    tokens."""

    __slots__ = ("serial", "content", "event", CARRIED, AGAIN)

    def __init__(self, serial: int, content: str, event: Optional[SessionEvent] = None):
        self.serial, self.content, self.event = serial, content, event
        self.carried = self.again = 0

    def __lt__(self, other: Piece) -> bool:
        return self.serial < other.serial


class HeldContext:
    """The pieces of a live context in order. A position is the number of tokens before it.

    What is paid for a span of positions is noted where the span begins and ends, and summed up when
    pieces leave: a call takes O(log pieces).
    """

    def __init__(self) -> None:
        self.pieces: List[Piece] = []
        self.ends: List[int] = []
        # Of every piece what is paid for each token up to its end, CARRIED and AGAIN.
        self._notes: Dict[str, List[int]] = {CARRIED: [], AGAIN: []}

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return self.ends[-1] if self.ends else 0

    def enter(self, piece: Piece, tokens: int) -> None:
        """A piece enters at the end."""
        self.ends.append(self.length + tokens)
        self.pieces.append(piece)
        for notes in self._notes.values():
            notes.append(0)

    def size(self, index: int) -> int:
        """Tokens of a piece."""
        return self.ends[index] - (self.ends[index - 1] if index else 0)

    def find(self, position: int) -> Tuple[int, int]:
        """The index of the piece that holds a position, and how far into the piece that is."""
        index = bisect_right(self.ends, position)
        return index, position - (self.ends[index - 1] if index else 0)

    def pay(self, how: str, start: int, end: int, price: int) -> None:
        """The positions from ``start`` to ``end`` are paid, at pico-dollars per token."""
        unit = price * _PAIRED + 1
        for position, paid in ((end, unit), (start, -unit)):
            index, inside = self.find(position)
            if index:
                self._notes[how][index - 1] += paid
            if inside:
                self._book(how, self.pieces[index], paid * inside)

    @staticmethod
    def _book(how: str, piece: Piece, paid: int) -> None:
        setattr(piece, how, getattr(piece, how) + paid)

    def settle(self) -> List[int]:
        """Sum up what was noted; the sizes of the pieces."""
        sizes = [end - start for start, end in zip([0] + self.ends, self.ends)]
        for how, notes in self._notes.items():
            paid = list(itertools.accumulate(reversed(notes)))
            for piece, size, each in zip(self.pieces, sizes, reversed(paid)):
                if each:
                    self._book(how, piece, each * size)
            notes[:] = [0] * len(notes)
        return sizes

    def lose(self, tokens: int) -> Dict[int, int]:
        """Tokens have left unmarked: of the oldest results of tools, then of what came last. How
        many each piece lost, by serial number."""
        sizes, lost = self.settle(), {}
        for index in sorted(range(len(sizes)), key=lambda index: (
                index if is_result(self.pieces[index]) else MAX_TOKENS - index)):
            part = min(tokens, sizes[index])
            sizes[index] -= part
            lost[self.pieces[index].serial] = part
            tokens -= part
            if not tokens:
                break
        self.pieces = list(itertools.compress(self.pieces, sizes))
        self.ends = list(itertools.accumulate(filter(None, sizes)))
        self._notes = {how: [0] * len(self.ends) for how in self._notes}
        return lost


def is_result(piece: Piece) -> bool:
    """Whether a tool returned a piece."""
    return piece.content not in _NOT_RETURNED


class Step:
    """A model call as its context shows it.

    ``call``: the AI_RESPONSE, None where a window ends with events that no call took in; ``last``:
    the call before in this window; ``events``: what came since, the answer of ``last`` first.
    ``held`` is the context with all that; ``before``: its length at ``last``; ``new``: the index
    there of the first piece that came since, and its serial number; ``lost``: tokens that pieces
    lost at their ends since, by serial number. The call read the positions up to ``read`` from the
    cache and wrote those up to ``kept`` again for ``rebuild_cost`` (pico-dollars); there begins
    what entered. ``fresh_cost``: pico-dollars of all that it wrote. ``ttl``: seconds that what was
    written before lives in the cache, 0 where nothing was.
    """

    __slots__ = """call last previous events held before new lost read kept rebuild_cost
        fresh_cost ttl""".split()

    def __init__(self, call: Optional[SessionEvent], previous: Optional[Step],
                 events: List[SessionEvent], held: HeldContext, ttl: int):
        self.call, self.previous, self.events = call, previous, events
        self.held, self.ttl = held, ttl
        self.last = previous.call if previous else None
        self.before, self.rebuild_cost, self.fresh_cost, self.new = held.length, 0, 0, (0, 0)
        self.read = self.kept = call.tokens_cache_read if call else held.length
        self.lost: Dict[int, int] = {}

    @property
    def began(self) -> Optional[float]:
        """When the call was sent (seconds since 1970): when the last thing that it answers had
        come."""
        answered = seconds_of(self.call.timestamp) if self.call else None
        if answered is None:
            return None
        came = [(seconds_of(event.timestamp) or 0.0) + event.duration_ms / 1000
                for event in self.events if event.data.get("source") not in _LAID_OUT
                and event.event_type not in (EventType.AI_RESPONSE, EventType.THINKING)]
        return min(answered, max(came, default=answered))

    @property
    def gap(self) -> Optional[float]:
        """Seconds between the beginnings of the call before and this one; None where unknown."""
        began = self.began
        before = self.previous.began if self.previous else None
        return None if began is None or before is None else began - before


class ContextWalk:
    """Follows the contexts of a session call by call, one window after the other. ``pieces``: all
    that entered; what was paid for them is complete when the walk is over. ``first``: what was
    paid for their entry, by content (cost * _PAIRED + tokens). ``starts``: the start load of each
    agent's first window (tokens)."""

    def __init__(self, session: Session):
        self.session = session
        self.pieces: List[Piece] = []
        self.first: Dict[str, int] = defaultdict(int)
        self.starts: Dict[str, int] = {}

    def __iter__(self) -> Iterator[Step]:
        """The steps, every event in one; the last of a window may be without a call."""
        session = self.session
        for window in session.windows() if session.events else [session._counted()]:
            held, ttl, step = HeldContext(), 0, None
            events: List[SessionEvent] = []
            for event in window:
                called = event.event_type is EventType.AI_RESPONSE and any(
                    e.tokens_input for e in events) and not event.data.get("unmetered")
                if not (called or event.tokens_cache_read):
                    events.append(event)  # no call, or one whose usage is not told
                    continue
                step = self._taken(Step(event, step, events, held, ttl))
                yield step
                step.previous = None
                written = sum(e.tokens_cache_write for e in events)
                if written:
                    hour = sum(e.tokens_cache_write_1h for e in events)
                    ttl = HOUR_TTL if 2 * hour >= written else SHORT_TTL
                events = [event]
            if events:
                yield self._taken(Step(None, step, events, held, ttl))
            held.settle()

    def _taken(self, step: Step) -> Step:
        """Bring the held context to what the call saw, and pay."""
        held, session, rebuilt, loads, entering = step.held, self.session, 0, [], []
        for event in step.events:
            source = event.data.get("source")
            if source == Source.REBUILD:
                rebuilt += event.tokens_input
                step.rebuild_cost += session.entry_cost(event)
            elif source == Source.HISTORY or step.last is None and content_of(event) in _FILLING:
                loads.append(event)
            elif event.tokens_input:
                entering.append(event)
        step.kept += rebuilt
        if step.before > step.kept:
            step.lost = held.lose(step.before - step.kept)
        step.new = len(held.pieces), len(self.pieces)
        step.fresh_cost = step.rebuild_cost
        self._fill(step, loads)
        if step.call and step.read:
            held.pay(CARRIED, 0, step.read, session.price_of(step.call).rates.read)
        if rebuilt:
            price, rest = divmod(step.rebuild_cost, rebuilt)
            held.pay(AGAIN, step.read, step.kept, price)
            held.pieces[held.find(step.read)[0]].again += rest * _PAIRED
        for event in entering:
            cost = session.entry_cost(event)
            self._enter(held, content_of(event), event.tokens_input, event, cost)
            step.fresh_cost += cost
        return step

    def _fill(self, step: Step, loads: List[SessionEvent]) -> None:
        """Name what the context holds beyond what was seen to enter: a window's loads, what other
        files tell (history), else unattributed."""
        held, rest = step.held, NOT_ATTRIBUTED
        missing = step.kept + sum(event.tokens_input for event in loads) - held.length
        told: Dict[str, int] = {}
        for event in loads:
            told.update(event.data.get("contents") or {})
        if step.last is None and missing:
            rest = rest if told else RELOAD
            start = told.pop(START_LOAD, max(0, missing - sum(told.values())))
            agent = (step.call or step.events[0]).agent_id
            start = min(start, self.starts.setdefault(agent, start))
            told = {START_LOAD: start, **told}
        spans = [*told.items(), (rest, missing)]
        for load in (None, *loads):
            tokens = load.tokens_input if load else step.kept - held.length
            cost = self.session.entry_cost(load) if load else 0
            step.fresh_cost += cost
            while tokens:
                content, room = spans[0]
                part = min(tokens, room)
                share = cost * part // tokens
                self._enter(held, content, part, load, share)
                tokens, cost = tokens - part, cost - share
                spans[:1] = [(content, room - part)] if room > part else []

    def _enter(self, held: HeldContext, content: str, tokens: int, event: Optional[SessionEvent],
               cost: int) -> None:
        if tokens:
            piece = Piece(len(self.pieces), content, event)
            self.first[content] += cost * _PAIRED + tokens if event else 0
            self.pieces.append(piece)
            held.enter(piece, tokens)


_FILLING = (START_LOAD, RELOAD)


def claims_of(analysis: Analysis, issue: EfficiencyIssue) -> Data:
    """The issue's claims by event id as they were given; without claims the shares of the waste in
    the events involved, or in all where none is named. `cut_claim` makes input and output of it."""
    keys = issue.claims or dict.fromkeys(issue.events_involved) or analysis.by_id
    ids = [key for key in keys if key in analysis.by_id
           and analysis.by_id[key].data.get("source") != Source.UNATTRIBUTED]
    if issue.claims:
        return {key: issue.claims[key] for key in ids}
    weights = [analysis.by_id[key].tokens for key in ids]
    shares = share_out(min(int(issue.estimated_waste_tokens), sum(weights)), weights)
    return {key: share for key, share in zip(ids, shares) if share}


def cut_claim(event: SessionEvent, claim: Any) -> Tuple[int, int]:
    """A claim as (input, output) tokens, never more than the event has; a bare number is split in
    the event's own proportion."""
    if isinstance(claim, (int, float)):
        tokens = max(0, min(int(claim), event.tokens))
        claim = share_out(tokens, [event.tokens_input, event.tokens_output])
    entered, written = claim
    return (max(0, min(int(entered), event.tokens_input)),
            max(0, min(int(written), event.tokens_output)))


def price_issue(analysis: Analysis, issue: EfficiencyIssue) -> None:
    """Set the issue's waste in tokens and USD from its claims; a cost its analyzer has set
    stays."""
    tokens = cost = 0
    for key, claim in claims_of(analysis, issue).items():
        event = analysis.by_id[key]
        parts = cut_claim(event, claim)
        tokens, cost = tokens + sum(parts), cost + analysis.cost(event, *parts)
    if issue.claims:
        issue.estimated_waste_tokens = tokens
    if not issue.estimated_waste_cost:
        issue.estimated_waste_cost = cost / PICO


class ClaimsLedger:
    """Charges every token once: an event pays its largest measured claim, then only what its
    largest estimated claim adds, never more than it has; of equal claims the first in registry
    order wins. ``tokens`` and ``cost`` (pico-dollars) are {True: measured, False: estimated}; the
    issues carry their part, and the parts add up. ``by_event``: tokens charged, by event id."""

    def __init__(self, analysis: Analysis, issues: List[EfficiencyIssue]):
        self.tokens, self.cost = {True: 0, False: 0}, {True: 0, False: 0}
        self.by_event: Dict[str, int] = defaultdict(int)
        claims = [claims_of(analysis, issue) for issue in issues]
        largest: Dict[bool, Dict[str, int]] = {True: {}, False: {}}  # by event: which issue's

        def claim_of(key: str, number: int) -> Tuple[int, int]:
            return cut_claim(analysis.by_id[key], claims[number][key])

        for number, issue in enumerate(issues):
            issue.charged_tokens, issue.charged_cost = 0, 0.0
            its = largest[issue.measured]
            for key in claims[number]:
                if key not in its or sum(claim_of(key, number)) > sum(claim_of(key, its[key])):
                    its[key] = number
        costs = [0] * len(issues)
        for measured, its in largest.items():
            for key, number in its.items():
                entered, written = claim_of(key, number)
                if not measured and key in largest[True]:
                    paid = claim_of(key, largest[True][key])
                    entered, written = max(0, entered - paid[0]), max(0, written - paid[1])
                cost = analysis.cost(analysis.by_id[key], entered, written)
                costs[number] += cost
                issues[number].charged_tokens += entered + written
                self.tokens[measured] += entered + written
                self.cost[measured] += cost
                self.by_event[key] += entered + written
        for issue, cost in zip(issues, costs):
            issue.charged_cost = cost / PICO


LEAST_FINDING = 50  # tokens of a measured finding that the report of a transcript lists


def charged_report(analysis: Analysis, analyzers: Iterable[BaseAnalyzer]) -> OptimizationReport:
    """What the analyzers find, charged: a report but for the bill and the advice. An analyzer that
    raises is named in it, the others count."""
    session, issues, failures = analysis.session, [], []
    for analyzer in analyzers:
        try:
            issues += _found_by(analyzer, analysis)
        except Exception as error:  # a user's analyzer may raise anything; the others count
            failures.append(f"{type(analyzer).__name__}: {type(error).__name__}: {error}")
    least = LEAST_FINDING if session.imported else 0
    small = [issue.estimated_waste_tokens for issue in issues
             if issue.measured and issue.estimated_waste_tokens < least]
    issues = [issue for issue in issues
              if not issue.measured or issue.estimated_waste_tokens >= least]
    ledger = ClaimsLedger(analysis, issues)
    issues.sort(key=lambda issue: (-issue.severity.rank, -issue.estimated_waste_tokens))
    waste, total = sum(ledger.tokens.values()), sum(event.tokens for event in analysis.events)
    cost, notes = analysis.bill["total"], report_notes(session)
    if any(small):
        notes.append(f"{len(small)} of the repeats: small, not listed (tokens: {sum(small):,})")
    report = OptimizationReport(
        session.id, now_text(), issues, waste, min(sum(ledger.cost.values()), cost) / PICO,
        100.0 * (1 - waste / total) if total else 100.0,
        token_breakdown=token_breakdown(session), measured_waste_tokens=ledger.tokens[True],
        measured_waste_cost=min(ledger.cost[True], cost) / PICO, total_tokens=total,
        estimated_cost=cost / PICO, analyzer_errors=failures, notes=notes,
        token_use=token_use(session))
    report.recommendations = recommendations(report)
    return report


def _found_by(analyzer: Any, analysis: Analysis) -> List[EfficiencyIssue]:
    """The issues of one analyzer. Those of one that overrides ``analyze`` are priced here."""
    if not getattr(type(analyzer), "analyzes_alone", True):
        return list(map(_sound, analyzer.analyze(analysis.session, analysis)))
    found = map(_sound, analyzer.analyze(analysis.session) or ())
    issues = list({id(issue): issue for issue in found}.values())
    for issue in issues:
        price_issue(analysis, issue)
        most = analysis.session.total_tokens or MAX_TOKENS
        issue.estimated_waste_tokens = min(issue.estimated_waste_tokens, most)
    return issues


def _sound(issue: Any) -> EfficiencyIssue:
    """An issue as an analyzer gave it, or the ValueError or TypeError that says what it lacks."""
    if not isinstance(issue, EfficiencyIssue):
        raise TypeError(f"an EfficiencyIssue was expected, not a {type(issue).__name__}")
    words = (getattr(word, "value", word) for word in (issue.severity, issue.issue_type))
    issue.severity, issue.issue_type = Severity(next(words)), IssueType(next(words))
    issue.description, issue.suggestion = str(issue.description), str(issue.suggestion)
    issue.estimated_waste_tokens = max(0, int(issue.estimated_waste_tokens or 0))
    issue.estimated_waste_cost = max(0.0, float(issue.estimated_waste_cost or 0.0))
    issue.events_involved = list(issue.events_involved or [])
    issue.claims = dict(issue.claims or {})
    return issue


def token_breakdown(session: Session) -> Dict[str, int]:
    """Tokens by event type, and the totals."""
    breakdown: Dict[str, int] = defaultdict(int)
    for event in session.events:  # all of them: ``value`` would be a property
        breakdown[event.event_type._value_] += event.tokens
    return dict(breakdown, TOTAL_INPUT=session.total_tokens_input,
                TOTAL_OUTPUT=session.total_tokens_output, TOTAL=session.total_tokens)


_CONTEXT_NAMES = {"system": "context load", "": "context load",
                  "compaction": "context after compaction"}
_PURPOSES = {EventType.USER_MESSAGE: ("prompts", "other output"),
             EventType.AI_RESPONSE: ("answers kept in context", "answers written"),
             EventType.THINKING: ("thinking kept in context", "thinking")}


def token_use(session: Session) -> Dict[str, int]:
    """Where all tokens went, by purpose, most first: what was loaded, asked, returned by each tool,
    written. The parts add up to the session's total tokens."""
    sums: Dict[Any, List[int]] = defaultdict(lambda: [0, 0])
    for event in session.events:
        kind = event.event_type
        told = event.data.get("source" if kind is EventType.CONTEXT_LOAD else "tool")
        its = sums[kind._value_, str(told or "")]
        its[0] += event.tokens_input
        its[1] += event.tokens_output
    use: Dict[str, int] = defaultdict(int)
    for (value, name), pair in sums.items():
        kind = EventType(value)
        names = _PURPOSES.get(kind) or (f"results of {name or value.lower()}", "tool calls written")
        if kind is EventType.CONTEXT_LOAD:
            names = _CONTEXT_NAMES.get(name, name), "other output"
        for purpose, tokens in zip(names, pair):
            use[purpose] += tokens
    return {name: tokens for name, tokens in sorted(use.items(), key=lambda item: -item[1])
            if tokens}


_NOTES = {
    "output_lower_bound_calls": "of the responses: only a placeholder for their output, so output "
                                "tokens and cost are a lower bound",
    "redacted_thinking_calls": "of the responses: thinking of a hidden size, which counts as their "
                               "visible output",
    "damaged_lines": "of the transcript's lines: damaged, and skipped",
    "estimated": "of the events: logged live with tokens estimated from their size, which scan "
                 "replaces by the real counts",
    "calls_elsewhere": "of the responses: a repeat of an earlier session, counted there"}


def report_notes(session: Session) -> List[str]:
    """What limits the figures of this session, in words."""
    notes = []
    unnamed = "no price for a model that the transcript does not name:"
    for model in sorted({event.model or session.model for event in session._counted()}):
        price = session.prices.lookup(model)
        if not price.exact:
            notes.append(f"no price for model {model!r}: priced as {price.model}")
        elif model == UNPRICED:
            notes.append(f"{unnamed} not priced")
        elif model == "default" and session.imported and session.total_tokens:
            notes.append(f"{unnamed} priced as default")
    estimated = sum(event.data.get("estimated") is True for event in session.events)
    counts = dict(session.metadata, estimated=estimated)
    return notes + [f"{counts[name]} {text}" for name, text in _NOTES.items() if counts.get(name)]


_LABELS = ("OPTIONAL", "RECOMMENDED", "HIGH PRIORITY", "CRITICAL")  # by the rank of the severity


def recommendations(report: OptimizationReport) -> List[str]:
    """What to do, one line per suggestion, the one with most waste charged first."""
    ranks: Dict[str, List[int]] = {}
    for issue in report.issues:
        rank = ranks.setdefault(issue.suggestion, [0, 0])
        rank[:] = max(rank[0], issue.severity.rank), rank[1] + issue.charged_tokens
    ranked = sorted(ranks.items(), key=lambda item: item[1], reverse=True)
    return [f"[INCOMPLETE] An analyzer failed, so its waste is missing: {failure}"
            for failure in report.analyzer_errors] + [
                f"[{_LABELS[rank]}] {advice}" for advice, (rank, _) in ranked]


# ---- the bill: every dollar in one cell, and why caches were lost (docs/bill.md) ----

CLASSES = "uncached_input cache_write_5m cache_write_1h cache_read output".split()
ROUNDING = 500     # tokens of a rebuild below which it is the provider's rounding
SMALL = 2_000      # tokens of a rebuild below which no cause is looked for
LARGE_READ = 10_000     # tokens of one read
LARGE_READ_SAVING = 60  # percent of a large read that a targeted one usually saves
GRACE = 30         # seconds beyond its time to live in which a cache may still be there
_PREFIX_CHANGED = ("system_changed", "tools_changed", "messages_changed")
_PROVIDER_SAYS = ("previous_message_not_found", "unavailable")
_NO_CLOCK = ("codex", "gemini-cli")  # readers of agents whose data tell no time to live
_SETTINGS = "/mcp /plugin /agents /config".split()


def cause_of(step: Step, session: Session) -> Tuple[str, str]:
    """Why the cache was lost before a call, and who says so ("provider", "transcript", "clock",
    "none"). Meaningful for rebuilds of SMALL tokens and more."""
    assert step.call is not None
    call, last = step.call.data, step.last or step.call
    told = str(call.get(CACHE_MISS) or "")
    sources = [event.data.get("source") for event in step.events]
    commands = [event.data.get(COMMAND) for event in step.events
                if event.event_type is EventType.CONTEXT_LOAD]
    changed = any(last.data.get(name) and call.get(name) not in (None, last.data[name])
                  for name in (VERSION, EFFORT, MODE))
    causes = (
        (told == "model_changed", told, "provider"),
        ((last.model or session.model) != (step.call.model or session.model), "model_switch",
         "transcript"),
        (told in _PREFIX_CHANGED, told, "provider"),
        (expired(step, session), "expired", "clock"),
        (Source.RESUME in sources, "resume", "transcript"),
        (step.before - step.kept >= ROUNDING, "shortened", "transcript"),
        (changed or any(command in _SETTINGS for command in commands), "settings", "transcript"),
        (told in _PROVIDER_SAYS, told, "provider"),
        (True, "not_explained", "none"))
    return next((cause, source) for holds, cause, source in causes if holds)


def expired(step: Step, session: Session) -> bool:
    """Whether the clock says that a rebuild came of a cache that had outlived its time."""
    if not step.ttl or session.source.get("reader") in _NO_CLOCK:
        return False
    return 2 * (step.kept - step.read) >= step.before and (step.gap or 0.0) > step.ttl + GRACE


def _rebuild(step: Step, session: Session) -> Data:
    """One rebuild in the words of the bill, in pico-dollars."""
    call, tokens, gap = step.call, step.kept - step.read, step.gap
    assert call is not None
    cause, said_by = cause_of(step, session)
    loaded = next(event for event in step.events if event.data.get("source") == Source.REBUILD)
    return {"session": session.id, "path": call.data.get("path") or session.source.get("path", ""),
            "line": call.data.get("line", 0), "at": call.timestamp, "cause": cause,
            "source": said_by, "gap_seconds": None if gap is None else round(gap, 3),
            "tokens": tokens, "cost": step.rebuild_cost,
            "net_cost": step.rebuild_cost - session.price_of(call).cost(Usage(read=tokens)),
            "model": call.model or session.model, "context": step.before, "event": loaded.id,
            "after": _came_before(step)}


def _came_before(step: Step) -> str:
    """What stands right before a call: a slash command, "prompt", or the name of a tool."""
    for event in reversed(step.events):
        if event.event_type is EventType.USER_MESSAGE:
            return "prompt"
        name = COMMAND if event.event_type is EventType.CONTEXT_LOAD else "tool"
        if event.data.get(name):
            return str(event.data[name])
    return ""


def empty_bill() -> Data:
    """The bill of nothing."""
    return {"total": 0, "guessed": 0, "classes": dict.fromkeys(CLASSES, 0), "models": {},
            "unpriced": {"calls": 0, "tokens": 0},
            "hidden_output": {"calls": 0, "of": 0, "cost_if_visible": 0},
            "cells": [], "small_rebuilds": {"count": 0, "tokens": 0, "cost": 0}, "rebuilds": []}


def bill_of(session: Session) -> Data:
    """The bill of a session as `empty_bill` has it, money in whole pico-dollars. The cells (content
    x how it was paid) add up to the total, which is `Session.cost_in_pico`; ``hidden_output``:
    calls whose output is a placeholder, of all, and what the output of those would cost at its
    visible size."""
    return Analysis(session).bill


def _add_usage(bill: Data, session: Session) -> Dict[Tuple[str, str], int]:
    """Add what the sums of the usage tell; the cells of the output."""
    output = 0
    for (model, rate), usage in session.usages().items():
        price = session.prices.lookup(model, rate)
        parts, cost = price.parts(usage), price.cost(usage)
        bill["total"] += cost
        if not price.exact or model == "default" and session.imported:
            bill["guessed"] += cost
        if price.model == UNPRICED:
            bill["unpriced"]["tokens"] += sum(usage)
        bill["models"][model] = bill["models"].get(model, 0) + cost
        for name, part in zip(CLASSES, parts):
            bill["classes"][name] += part
        output += parts[-1] * _PAIRED + usage.output
    return defaultdict(int, {("output", "output"): output})


def _cell_rows(cells: Dict[Tuple[str, str], int]) -> Rows:
    """The cells that hold something, the dearest first."""
    return [{"content": content, "how": how, "tokens": tokens, "cost": -cost}
            for cost, (content, how), tokens in sorted(
                (-(paid // _PAIRED), key, paid % _PAIRED) for key, paid in cells.items() if paid)]


def add_bills(bills: Iterable[Data]) -> Data:
    """The sum of bills, in any order the same."""
    total = empty_bill()
    cells: Dict[Tuple[str, str], int] = defaultdict(int)
    for bill in bills:
        _add(total, bill)
        for cell in bill["cells"]:
            cells[cell["content"], cell["how"]] += cell["cost"] * _PAIRED + cell["tokens"]
    total["cells"] = _cell_rows(cells)
    total["rebuilds"].sort(
        key=lambda rebuild: (-rebuild["net_cost"], rebuild["session"], rebuild["event"]))
    return total


def _add(total: Data, more: Data) -> None:
    """Add the numbers and lists of an object to those of another one."""
    for name, value in more.items():
        if value.__class__ is dict:
            _add(total.setdefault(name, {}), value)
        elif name in total:
            total[name] += value
        else:
            total[name] = value


_MONEY = frozenset("""total recorded replayed guessed classes models cost net_cost cost_if_visible
    paid saves replay without_largest worst""".split())


def in_usd(part: Any, money: bool = False) -> Any:
    """A bill or advice with its money in USD, rounded once to whole pico-dollars."""
    if part.__class__ is list:
        return [in_usd(each, money) for each in part]
    if part.__class__ is not dict:
        return round(part / PICO, 12) if money and part.__class__ is int else part
    found = dict(part)
    for name, value in part.items():
        paid = money or name in _MONEY
        if value.__class__ in (dict, list):
            found[name] = in_usd(value, paid)
        elif paid and value.__class__ is int:
            found[name] = round(value / PICO, 12)
    return found


# ==================================================================================================
# Analyzers
# ==================================================================================================

if TYPE_CHECKING:
    Issues = Iterator[EfficiencyIssue]


class BaseAnalyzer:
    """One kind of waste. A subclass gives ``issue_type``, thresholds as class attributes, and
    ``find(session, analysis)`` (or ``find(session)``) yielding issues made by ``self.issue(...)``;
    or it overrides ``analyze`` and makes its issues itself.

    Thresholds may be given to the constructor; an unknown name raises InvalidValue.
    """

    issue_type = IssueType.INEFFICIENT_TOOL_USE
    analyzes_alone = False  # whether a subclass overrides `analyze`
    finds_alone = False     # whether its `find` takes the session without the analysis

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.analyzes_alone |= "analyze" in vars(cls)
        code = getattr(vars(cls).get("find"), "__code__", None)
        if code:
            cls.finds_alone = code.co_argcount < 3 and not code.co_flags & 0x04  # no *args either

    def __init__(self, **thresholds: Any) -> None:
        for name, value in thresholds.items():
            if name not in self.thresholds():
                known = ", ".join(sorted(self.thresholds())) or "none"
                raise InvalidValue(
                    f"{type(self).__name__} has no threshold {name!r}; it has: {known}")
            setattr(self, name, value)

    def thresholds(self) -> Data:
        """The thresholds in force, by name."""
        names = [name for cls in type(self).__mro__ for name, value in vars(cls).items()
                 if isinstance(value, (int, float)) and not isinstance(value, bool)
                 and not name.startswith("_")]
        return {name: getattr(self, name) for name in names}

    def analyze(
            self, session: Session, analysis: Optional[Analysis] = None) -> List[EfficiencyIssue]:
        """The issues of this kind in a session, most wasteful first, with tokens and USD.
        ``analysis`` is what other analyzers of the same report have worked out; it is made when
        none is given."""
        analysis = analysis or Analysis(session)
        issues = list(self.find(session) if self.finds_alone else self.find(session, analysis))
        for issue in issues:
            price_issue(analysis, issue)
        return sorted(issues, key=lambda issue: -issue.estimated_waste_tokens)

    def find(self, *args: Any, **options: Any) -> Issues:
        """Yield the issues; what a subclass defines as find(session, analysis) or find(session)."""
        raise NotImplementedError(
            f"{type(self).__name__} needs find(session, analysis) or analyze(session)")

    def issue(self, severity: Severity, description: str, suggestion: str, *,
              events: Iterable[SessionEvent] = (), claims: Optional[Data] = None,
              tokens: int = 0, measured: bool = False,
              metadata: Optional[Data] = None) -> EfficiencyIssue:
        """An issue of this analyzer's type. ``claims`` maps event ids to (input, output) tokens;
        ``tokens`` alone is shared by ``events`` or, where there are none, by the session."""
        ids = [event.id for event in events]
        name = f"{self.issue_type.value.lower()}_{ids[0] if ids else 'session'}"
        total = sum(sum(claim) for claim in claims.values()) if claims else tokens
        return EfficiencyIssue(name, self.issue_type, severity, description, suggestion, total, 0.0,
                               ids, metadata or {}, claims or {}, measured)


def _all_of(events: Iterable[SessionEvent]) -> Data:
    """Claims of all tokens of the events."""
    return {event.id: (event.tokens_input, event.tokens_output) for event in events if event.tokens}


class RepeatedFileReadAnalyzer(BaseAnalyzer):
    """The agent read lines that its context window already held, unchanged.

    Counts when the lines are still in the window: no write to the file, no command that could have
    changed it, no compaction in between. Charged: the input tokens of the repeated share of every
    read after the first.
    """

    issue_type = IssueType.REPEATED_FILE_READ
    high_from = 3         # reads of one file
    minimum_share = 0.1   # of a read's lines; pages that overlap by a few lines are pages

    def find(self, session: Session, analysis: Analysis) -> Issues:
        window: Dict[str, str] = {}  # by id of a read: the finding that holds it
        runs: Dict[Tuple[str, str], List[Tuple[Repeat, SessionEvent]]] = {}
        for event, repeat in analysis.repeats:
            if event.event_type is EventType.FILE_READ \
                    and repeat.covered >= repeat.total * self.minimum_share:
                path = canonical_path(_paths_of(event.data)[0], _cwd_of(session))
                # One finding per file and window: a repeat is in that of the read it repeats.
                key = window.get(repeat.earlier.id) or event.id
                window[event.id] = window[repeat.earlier.id] = key
                runs.setdefault((key, path), []).append((repeat, event))
        for (_, path), repeats in runs.items():
            yield self._finding(path, repeats)

    def _finding(self, path: str, repeats: List[Tuple[Repeat, SessionEvent]]) -> EfficiencyIssue:
        claims = {event.id: (event.tokens_input * repeat.covered // repeat.total, 0)
                  for repeat, event in repeats}
        sources = [e for repeat, _ in repeats for e in (repeat.earlier, *repeat.also)]
        events = {event.id: event for event in sources + [event for _, event in repeats]}
        count, name = len(repeats) + 1, path.rpartition("/")[2]
        return self.issue(
            Severity.HIGH if count >= self.high_from else Severity.MEDIUM,
            f"File '{name}' was read {count} times while its content was still in the context",
            "Cache what was read: the lines are still in the context; read again only after a "
            "change or a compaction", events=events.values(), claims=claims, measured=True,
            metadata={"file_path": path, "read_count": count})


class RepeatedSearchAnalyzer(BaseAnalyzer):
    """A search, a command or a tool brought again what its context window held, with nothing
    written in between.

    The same tool, query and scope, case and space folded, unless the answer differs; or the same
    answer of LEAST_ANSWER tokens or more, whatever was asked. Charged: the input and output tokens
    of every run after the first. Of a result of LEAST_POLL tokens or more that is the one before
    but for a tenth of its lines at most, the lines that stayed are charged as an estimate.
    """

    issue_type = IssueType.REPEATED_SEARCH

    def find(self, session: Session, analysis: Analysis) -> Issues:
        runs: Dict[Tuple[str, bool], List[Any]] = {}
        for event, repeat in analysis.repeats:
            if event.event_type in _ANSWERING:
                run = runs.pop((repeat.earlier.id, repeat.exact), [(repeat.earlier, None)])
                runs[event.id, repeat.exact] = run + [(event, repeat)]
        for (_, exact), run in runs.items():
            yield self._finding(exact, run)

    def _finding(self, exact: bool, run: List[Tuple[SessionEvent, Repeat]]) -> EfficiencyIssue:
        events = [event for event, _ in run]
        data = events[0].data
        what = data.get("query") or data.get("pattern") or data.get("command") or data.get("tool")
        if what == "*":  # a listing is known by its directory
            what = data.get("command") or data.get("scope") or what
        query = " ".join(str(what or "").split())
        verb = "Search run" if data.get("query") or data.get("pattern") else "The same answer came"
        claims = _all_of(events[1:]) if exact else {
            event.id: (event.tokens_input * repeat.covered // repeat.total, 0)
            for event, repeat in run[1:]}
        return self.issue(
            Severity.MEDIUM,
            f"{verb} {len(events)} times with nothing changed in between: '{query[:60]}'",
            "Cache the result or widen the first search: its answer is still in the context",
            events=events, claims=claims, measured=exact,
            metadata={"query": query, "search_count": len(events)})


class LargeFileAnalyzer(BaseAnalyzer):
    """One read brought a very large file into the context.

    Counts reads at or above the limit that are not marked ``compressed``. Charged, as an estimate:
    the share that a targeted read (a line range, a search, an outline) usually saves.
    """

    issue_type = IssueType.LARGE_FILE_UNCOMPRESSED
    limit = LARGE_READ    # tokens of one read
    saving_percent = LARGE_READ_SAVING

    def find(self, session: Session, analysis: Analysis) -> Issues:
        for event in session.events:
            data, tokens = event.data, event.tokens_input
            if event.event_type is EventType.FILE_READ and tokens >= self.limit \
                    and not data.get("compressed") and not data.get("reads"):
                # Of several files in one result none may be large.
                path = "".join(_paths_of(data)[:1])
                yield self.issue(
                    Severity.HIGH,
                    f"Large file read whole ({tokens:,} tokens): '{path.rpartition('/')[2]}'",
                    "Read the part that is needed (a line range, a search first) or compress the "
                    "file before loading it", events=[event],
                    claims={event.id: (tokens * self.saving_percent // 100, 0)},
                    metadata={"file_path": path, "tokens": tokens,
                              "saving_percent": self.saving_percent})


class ExcessiveThinkingAnalyzer(BaseAnalyzer):
    """Thinking is most of what the model wrote.

    Counts above the threshold share of all output; where a provider hides the size of thinking
    there are no THINKING events, and where a transcript holds placeholders for the output no share
    is known: this analyzer is silent. Charged, as an estimate: what exceeds the acceptable share.
    """

    issue_type = IssueType.EXCESSIVE_THINKING
    threshold_percent = 40   # of output
    acceptable_percent = 30  # of output

    def find(self, session: Session, analysis: Analysis) -> Issues:
        events = [e for e in session.events if e.event_type is EventType.THINKING]
        sizes, output = [event.tokens_output for event in events], session.total_tokens_output
        thinking = sum(sizes)
        if session.metadata.get("output_lower_bound_calls") or not output \
                or thinking * 100 <= output * self.threshold_percent:
            return
        percent = 100 * thinking / output
        shares = share_out(thinking - output * self.acceptable_percent // 100, sizes)
        yield self.issue(
            Severity.MEDIUM,
            f"Thinking is {percent:.1f}% of the output (threshold {self.threshold_percent}%)",
            "State the task more precisely or lower the thinking budget for routine work",
            events=[event for event, size in zip(events, sizes) if size],
            claims={event.id: (0, share) for event, share in zip(events, shares) if share},
            metadata={"thinking_percent": percent, "thinking_tokens": thinking,
                      "total_output": output})


class FailedRetryAnalyzer(BaseAnalyzer):
    """The same operation failed again in the same way although nothing had been changed.

    The key is (tool or command, normalised message). A write, a look at the file that could not be
    written, a command that is not recognised, a success of the same operation, ``recovered: true``
    or a compaction ends a run; declined, transient and collateral failures and calls of one
    response do not count. Charged: input and output of every failure after the first.
    """

    issue_type = IssueType.FAILED_RETRY
    minimum = 2  # failures

    def find(self, session: Session, analysis: Analysis) -> Issues:
        runs: Dict[Tuple[str, str, str], List[Any]] = {}  # failures: event, batch, how many spoke
        ended: List[List[Any]] = []
        spoken: Dict[str, int] = {}  # by agent: how often somebody has spoken so far
        cwd = _cwd_of(session)
        for event in session.events:
            data, agent = event.data, event.agent_id
            failed = event.event_type is EventType.ERROR
            if event.event_type is EventType.USER_MESSAGE:
                spoken[agent] = spoken.get(agent, 0) + 1
            if not failed and not runs:
                continue
            key = self._key(event)
            if failed and data.get("recovered"):
                ended.append(runs.pop(key, []))
                continue
            acted = data.get("acts") or _effects_of(_command_of(data), cwd).acts
            changed = bool(runs) and bool(changes_of(event, cwd) or acted and not failed)
            for old in [old for old in runs if self._ends(old, key, event, changed, runs[old])]:
                ended.append(runs.pop(old))
            if failed and any(key[1:]) and not failure_kind(data):
                run = runs.setdefault(key, [])
                batch = data.get("response_id") or data.get("batch_id")
                if not run or not batch or batch != run[-1][1]:
                    run.append((event, batch, spoken.get(agent, 0)))
        for run in ended + list(runs.values()):
            if len(run) >= self.minimum:  # what a person said in between may have been the reason
                yield self._finding([event for event, *_ in run], run[0][2] == run[-1][2])

    @staticmethod
    def _ends(run: Tuple[str, str, str], key: Tuple[str, str, str], event: SessionEvent,
              changed: bool, failures: List[Any]) -> bool:
        """Whether an event ends a run of failures: by a change, a look at the file that could not
        be written, a compaction of its window, or a success."""
        if event.event_type is EventType.ERROR:
            return changed and run != key
        written = failures[-1][0].data.get("file_path")
        if event.event_type is EventType.FILE_READ and written and written in _paths_of(event.data):
            return True
        return changed or run[0] == event.agent_id and (
            is_compaction(event) or run[1] == key[1] != "")

    @staticmethod
    def _key(event: SessionEvent) -> Tuple[str, str, str]:
        data = event.data
        operation = data.get("operation") or _command_of(data) or data.get("tool") \
            or data.get("name") or ""
        message = ""
        if event.event_type is EventType.ERROR:
            message = data.get("error_hash") \
                or normal_message(data.get("message") or data.get("error") or "")
        return event.agent_id, " ".join(str(operation).split()), str(message)

    def _finding(self, run: Events, measured: bool) -> EfficiencyIssue:
        data = run[0].data
        what = _command_of(data) or data.get("tool") or data.get("message") or "operation"
        what = " ".join(str(what).split())
        return self.issue(
            Severity.HIGH,
            f"Failed {len(run)} times with nothing changed in between: '{what[:60]}'",
            "Read the first error and change something before trying again", events=run,
            claims=_all_of(run[1:]), measured=measured, metadata={"retry_count": len(run)})


def normal_message(message: Any) -> str:
    """An error text with numbers, addresses and space folded, so that two of a kind are equal: its
    beginning and its end."""
    if message == "":
        return ""
    text = str(message).lower()
    text = text if len(text) <= 3000 else text[:2000] + " " + text[-1000:]
    folded = " ".join(_VARYING.sub("#", text).split())
    return folded if len(folded) <= 600 else folded[:300] + folded[-300:]


_VARYING = _Pattern(r"0x[0-9a-f]+|\b[0-9a-f]{7,}\b|\d+")


class LongSessionAnalyzer(BaseAnalyzer):
    """The session outlived its context: after a pause all of it was written to the cache again.

    Counts returns after the cache had expired (cause "expired" in the bill). Charged, as an
    estimate (the rebuild is recorded, that the return could have been avoided is assumed): what the
    rebuild cost beyond a cache read. A session logged by hand without cache usage is charged 10% of
    its tokens per 30 minutes over the limit, at most 30%, spread over all events.
    """

    issue_type = IssueType.LONG_SESSION
    high_tokens = 100_000  # written again
    limit_minutes = 60
    high_minutes = 120
    percent_per_step = 10  # of the session's tokens
    step_minutes = 30
    most_percent = 30

    def find(self, session: Session, analysis: Analysis) -> Issues:
        if session.imported or any(event.usage[1:4] != (0, 0, 0) for event in session.events):
            returns = [rebuild for rebuild in analysis.bill["rebuilds"]
                       if rebuild["cause"] == "expired"]
            if returns:
                yield self._returned(analysis, returns)
            return
        minutes = session.duration_seconds / 60
        if minutes <= self.limit_minutes:
            return
        steps = (minutes - self.limit_minutes) / self.step_minutes
        percent = min(self.most_percent, steps * self.percent_per_step)
        yield self.issue(
            Severity.HIGH if minutes >= self.high_minutes else Severity.MEDIUM,
            f"The session was active for {minutes:.0f} minutes (threshold {self.limit_minutes})",
            "If the work fell into separate tasks, a fresh session for each would have carried "
            "less context",
            tokens=int(session.total_tokens * percent / 100),
            metadata={"duration_minutes": minutes, "threshold_minutes": self.limit_minutes})

    def _returned(self, analysis: Analysis, returns: List[Data]) -> EfficiencyIssue:
        tokens, times = sum(rebuild["tokens"] for rebuild in returns), len(returns)
        claims = {rebuild["event"]: (
            rebuild["tokens"] * rebuild["net_cost"] // max(1, rebuild["cost"]), 0)
            for rebuild in returns}
        return self.issue(
            Severity.HIGH if tokens >= self.high_tokens else Severity.MEDIUM,
            f"{times} return{'s' * (times > 1)} after the cache had expired wrote {tokens:,} "
            "tokens again",
            "Compact or note down what matters before a long pause, and begin anew after it",
            events=[analysis.by_id[rebuild["event"]] for rebuild in returns], claims=claims,
            metadata={"returns": times, "tokens": tokens,
                      "gaps_seconds": [rebuild["gap_seconds"] for rebuild in returns]})


class HighErrorRateAnalyzer(BaseAnalyzer):
    """Much of what the agent tried failed: the task or the environment was not clear to it.

    Counts errors among all events, not declined permissions, overload answers or collateral
    failures of a parallel call. Charged, as an estimate: the tokens of the error events.
    """

    issue_type = IssueType.HIGH_ERROR_RATE
    threshold_percent = 20  # of the events
    high_percent = 40
    more_than = 5           # events

    def find(self, session: Session, analysis: Analysis) -> Issues:
        errors = [event for event in session.events
                  if event.event_type is EventType.ERROR and not failure_kind(event.data)]
        count = len(session.events)
        if count <= self.more_than or len(errors) * 100 <= count * self.threshold_percent:
            return
        rate = 100 * len(errors) / count
        yield self.issue(
            Severity.HIGH if rate > self.high_percent else Severity.MEDIUM,
            f"{len(errors)} of {count} events are errors ({rate:.1f}%)",
            "Check the task's wording and the environment (paths, dependencies, permissions) "
            "before the next run", events=errors, claims=_all_of(errors),
            metadata={"error_rate": rate, "error_count": len(errors), "total_events": count})


class TokenSpikeAnalyzer(BaseAnalyzer):
    """Single events far above the usual size. Often legitimate: a place to look.

    Compared with the others of the same type (with all others where there are fewer than 10);
    CONTEXT_LOAD never counts. Nothing is charged; what the events cost, with every time they were
    sent again, is said.
    """

    issue_type = IssueType.TOKEN_SPIKE
    times = 3.0         # the average of the others
    enough = 10         # events of one type that make an average of their own
    minimum_events = 3  # with tokens

    def find(self, session: Session, analysis: Analysis) -> Issues:
        sums: Dict[str, List[int]] = defaultdict(lambda: [0, 0])  # by type: events, tokens
        events = [event for event in session.events
                  if event.tokens and event.event_type is not EventType.CONTEXT_LOAD]
        for event in events:
            for kind in ("", event.event_type._value_):  # "": all of them
                sums[kind][0] += 1
                sums[kind][1] += event.tokens
        spikes: List[Tuple[SessionEvent, float]] = []
        for event in events if len(events) >= max(2, self.minimum_events) else ():
            count, total = sums[event.event_type._value_]
            count, total = (count, total) if count >= self.enough else sums[""]
            average = (total - event.tokens) / (count - 1)
            if event.tokens > self.times * average:
                spikes.append((event, average))
        if spikes:
            yield self._finding(analysis, sorted(spikes, key=lambda spike: -spike[0].tokens))

    def _finding(self, analysis: Analysis,
                 spikes: List[Tuple[SessionEvent, float]]) -> EfficiencyIssue:
        worst, average = spikes[0]
        costs = [analysis.cost(event, event.tokens_input, event.tokens_output)
                 for event, _ in spikes]
        cost, bill = sum(costs) / PICO, analysis.bill["total"] / PICO
        multiplier = worst.tokens / (average or 1)
        more = f" and {len(spikes) - 1} more" if len(spikes) > 1 else ""
        return self.issue(
            Severity.MEDIUM, f"{worst.event_type.value} of {worst.tokens:,} tokens is "
            f"{multiplier:.1f} times the average of {average:,.0f}{more}: with what was sent again "
            f"{100 * cost / (bill or 1):.0f}% of the session's ${bill:,.2f}",
            "A place to look: a large output may be what was wanted, or a query that returned too "
            "much", events=[event for event, _ in spikes],
            metadata={"multiplier": multiplier, "event_tokens": worst.tokens,
                      "average_tokens": average, "spikes": len(spikes), "cost": cost})


BUILT_IN_ANALYZERS = (
    RepeatedFileReadAnalyzer, RepeatedSearchAnalyzer, LargeFileAnalyzer, ExcessiveThinkingAnalyzer,
    FailedRetryAnalyzer, LongSessionAnalyzer, HighErrorRateAnalyzer, TokenSpikeAnalyzer)


# ==================================================================================================
# Replay
# ==================================================================================================

# Medians measured after real compactions, in tokens (docs/bill.md says where).
SUMMARY = 12_000          # what a context holds after a compaction beyond the session's first one,
SUMMARIES = {"CODEX": 2_200}  # by agent, where it is not that
REREAD = 10_700           # read again after it, with the next call
WORST_REREAD = 3 * REREAD + 10_000
REQUEST_OUTPUT = 2_500    # written by the call that compacts
CALLS_BETWEEN = 10        # calls from one compaction to the next, at least
CLEARED_RESULT = 60       # left of a tool's result that is cleared
ENOUGH_COMPACTIONS = 5    # of the user's own, that their median stands in for SUMMARY
MISSES = (0, 13, 25)      # percent of the caches within their time to live that are lost even so
LOST = 95                 # percent of the caches beyond it that are lost
CALIBRATED_CALLS = 20     # calls after a real compaction that are predicted
POOR = 0.5                # error (p90) above which a range is all that can be said
CASES = BEST, MIDDLE, WORST = range(3)
RANGE = ("low", "middle", "high")

# Policies and their options, with the values they have when not given; None must be given.
POLICIES: Dict[str, Data] = {
    "none": {}, "compact": {"above": 200_000}, "return": {"above": 80_000}, "ttl": {"ttl": None},
    "cap": {"tokens": None, "tool": ""}, "start": {"tokens": None}, "no-repeats": {},
    "clear": {"older": None, "at_least": 0, "when_rebuilding": False},
    "all": {"return": 80_000, "compact": 200_000}}


class Replay:
    """A session's calls priced once more, with contexts whose pieces a policy cuts or replaces.

    What lies inside the prefix that a call read from the cache is priced as read, the rest at that
    call's own write price; an edit moves what is behind it from read to written, in that call only.
    ``saved``: pico-dollars against the recorded bill; 0 where the policy changes nothing.
    """

    def __init__(self, analysis: Analysis, name: str, options: Data, case: int, summary: int = 0):
        self.session, self.name, self.options, self.case = analysis.session, name, options, case
        self.summary = summary or SUMMARIES.get(self.session.agent, SUMMARY)
        self.saved = 0
        # The context above which it is compacted when coming back, and at any time.
        limits: Data = options if name == "all" else {name: options.get("above")}
        self._back, self._any = (limits.get(key, MAX_TOKENS) for key in ("return", "compact"))
        # A context has the recorded length, and is not looked at, until it is longer than this.
        self.idle, self.busy = limits.get(name) or -1, False
        self.repeated = repeated_tokens(analysis) if name in ("no-repeats", "all") else {}
        self._firsts: Dict[str, Tuple[int, int]] = {}  # by agent: first context, system prefix
        # Calls since a compaction, tokens to be read again, calls, length.
        self._since = self._due = self._calls = self._length = 0

    def __call__(self, step: Step, rebuild: Optional[Data]) -> None:
        if step.call is None:
            return
        if step.last is None:
            self._open(step)
        if not self.busy:
            self.busy, self._length = step.before > self.idle, step.before
        held, rates = step.held, self.session.price_of(step.call).rates
        if self.name == "ttl":
            self._keep_for(step, rebuild, rates)
            return
        self._since += 1
        for serial, lost in step.lost.items():  # what was cut is the end as well
            self._cut_to(serial, max(0, self._cuts.get(serial, 0) - lost))
        read_again, self._due = self._due, 0
        changed_from, extra = MAX_TOKENS, 0
        if self._length > self.idle:
            changed_from, extra = self._compact(step, rebuild, rates)
        if self.name not in ("compact", "return"):  # which cut nothing that enters
            self._enter(step)
            changed_from = min(changed_from, self._clear(step, rebuild))
        read = min(self._place(held, step.read), changed_from)
        self._inserted += read_again
        self._length = held.length - self._cut + self._inserted
        written = _written(step, self._length - read, rates)
        self.saved += (step.read - read) * rates.read + step.fresh_cost - written - extra

    def _open(self, step: Step) -> None:
        """A window begins."""
        self._cuts: Dict[int, int] = {}  # by serial number of a piece: tokens that are kept out
        self._results: List[Tuple[int, Piece, int]] = []  # that may be cleared: call, piece, tokens
        self._cut = 0       # their sum
        self._inserted = 0  # tokens of a summary, and of what was read again after it
        self._folded = 0    # pieces before this serial number stand in that summary
        self._calls = self._due = 0
        self._since, self.busy = CALLS_BETWEEN, False
        agent = step.call.agent_id if step.call else ""
        self._first, self._prefix = self._firsts.setdefault(
            agent, (step.held.length, step.read or step.held.length))

    def _cut_to(self, serial: int, tokens: int) -> None:
        self._cut += tokens - self._cuts.pop(serial, 0)
        if tokens:
            self._cuts[serial] = tokens

    def _place(self, held: HeldContext, position: int) -> int:
        """Where a recorded position is in the replayed context."""
        if not (self._cut or self._inserted):
            return position
        index, inside = held.find(position)
        serial = held.pieces[index].serial if index < len(held.pieces) else MAX_TOKENS
        behind = sum(self._cuts.get(piece.serial, 0) for piece in held.pieces[index:])
        place = position - self._cut + behind
        if inside:  # what is kept of the piece is its beginning
            place -= max(0, inside - held.size(index) + self._cuts.get(serial, 0))
        return place + (self._inserted if serial >= self._folded else 0)

    def _compact(self, step: Step, rebuild: Optional[Data], rates: Usage) -> Tuple[int, int]:
        """Compact where the policy does: from where on the context is new, and the request's
        cost."""
        base, held = self._first + self.summary, step.held
        back = self._length > max(base, self._back) and _is_expired(rebuild)
        if not back and (self._length <= max(base, self._any) or self._since < CALLS_BETWEEN):
            return MAX_TOKENS, 0
        read = min(step.read, self._length) if back and self.case == WORST else self._length
        cost = (read * rates.read + _written(step, self._length - read, rates)
                + REQUEST_OUTPUT * rates.output)
        loads = itertools.takewhile(lambda piece: piece.content == START_LOAD, held.pieces)
        start = sum(held.size(index) - self._cuts.get(piece.serial, 0)
                    for index, piece in enumerate(loads))
        for index, piece in enumerate(held.pieces[:step.new[0]]):
            if piece.content != START_LOAD and piece.serial >= self._folded:
                self._cut_to(piece.serial, held.size(index))
        self._inserted, self._folded, self._since = max(0, base - start), step.new[1], 0
        self._due = REREAD if back else (0, REREAD, WORST_REREAD)[self.case]
        return min(self._prefix, start), 0 if back and self.case == BEST else cost

    def _enter(self, step: Step) -> None:
        """Cut what enters."""
        self._calls += 1
        start, held = 0, step.held
        for index, piece in enumerate(held.pieces[step.new[0]:], step.new[0]):
            size = held.size(index)
            if piece.content == START_LOAD and self.name == "start":
                self._cut_to(piece.serial, size - max(0, min(size, self.options["tokens"] - start)))
                start += size
            elif piece.event is not None and piece.event.id in self.repeated:
                self._cut_to(piece.serial, min(size, self.repeated[piece.event.id]))
            elif self.name == "cap" and self.options["tool"].lower() in _returned_by(piece):
                over = max(0, size - self.options["tokens"])
                self._cut_to(piece.serial, over * (WORST - self.case) // 2)
            elif self.name == "clear" and is_result(piece) and size > CLEARED_RESULT:
                self._results.append((self._calls, piece, size))

    def _clear(self, step: Step, rebuild: Optional[Data]) -> int:
        """Clear old results where the policy does; the position from which on the context is
        new."""
        old = list(itertools.takewhile(
            lambda result: result[0] + self.options["older"] <= self._calls, self._results))
        freed = sum(size - CLEARED_RESULT for _, _, size in old)
        if not old or freed < self.options["at_least"] or \
                self.options["when_rebuilding"] and rebuild is None:
            return MAX_TOKENS
        del self._results[:len(old)]
        held, changed_from = step.held, MAX_TOKENS
        for _, piece, _ in old:
            index = bisect_left(held.pieces, piece)
            if held.pieces[index:index + 1] == [piece] and held.size(index) > CLEARED_RESULT:
                changed_from = min(
                    changed_from, self._place(held, held.ends[index] - held.size(index)))
                self._cut_to(piece.serial, held.size(index) - CLEARED_RESULT)
        return changed_from

    def _keep_for(self, step: Step, rebuild: Optional[Data], rates: Usage) -> None:
        """Price a call as if what is written lived for another time."""
        ttl, gap = self.options["ttl"], step.gap or 0.0
        price = rates.write_1h if ttl == HOUR_TTL else rates.write_5m
        for event in step.events:
            _, short, hour, *_ = event.usage
            self.saved += short * (rates.write_5m - price) + hour * (rates.write_1h - price)
        if step.ttl in (0, ttl) or step.last is None:  # a live cache outlived that time as well
            return
        if rebuild is not None and _is_expired(rebuild):
            if gap <= ttl + GRACE:
                hits = 100 - MISSES[self.case]
                self.saved += rebuild["tokens"] * (price - rates.read) * hits // 100
        elif gap > ttl + GRACE:
            missed = max(0, step.read - self._prefix)
            self.saved -= missed * (price - rates.read) * LOST // 100


def _returned_by(piece: Piece) -> Set[str]:
    """How a policy may name the tool that returned a piece; "" stands for any."""
    tool = piece.event.data.get("tool") if piece.event else ""
    return {"", piece.content.lower(), str(tool or "").lower()} if is_result(piece) else set()


def _is_expired(rebuild: Optional[Data]) -> bool:
    return rebuild is not None and rebuild["cause"] == "expired"


def _written(step: Step, tokens: int, rates: Usage) -> int:
    """Pico-dollars of tokens at a call's own write price; at the cache's where it wrote nothing."""
    fresh = step.held.length - step.read
    if fresh:
        return tokens * step.fresh_cost // fresh
    rate: int = {0: rates.uncached, HOUR_TTL: rates.write_1h}.get(step.ttl, rates.write_5m)
    return tokens * rate


def repeated_tokens(analysis: Analysis) -> Dict[str, int]:
    """Tokens that reads and searches brought although their window held them, by event id."""
    return {event.id: event.tokens_input * repeat.covered // repeat.total
            for event, repeat in analysis.repeats}


def replayed(analysis: Analysis, *policies: Tuple[str, Data],
             summary: int = 0) -> List[List[int]]:
    """What each policy saves in a session, in pico-dollars: in the worst, the middle and the best
    case. ``summary``: tokens that stand in for SUMMARY."""
    replays = [[Replay(analysis, *policy, case, summary) for case in CASES] for policy in policies]
    each = list(itertools.chain(*replays))

    def watch(step: Step, rebuild: Optional[Data]) -> None:
        for replay in each:
            if replay.busy or step.before > replay.idle or not step.last:
                replay(step, rebuild)

    analysis.follow(watch)
    return [sorted(replay.saved for replay in cases) for cases in replays]


def parse_policy(text: str) -> Tuple[str, Data]:
    """A policy as it is written ("compact --above 60k", "cap 2000 --tool Bash", "ttl 1h"): its name
    and all its options. InvalidValue says what is wrong."""
    name, *words = str(text).split() or [""]
    if name not in POLICIES:
        raise InvalidValue(f"unknown policy {name!r}: use one of {', '.join(POLICIES)}")
    options: Data = dict(POLICIES[name])
    key = next(iter(options), "")
    for word in words:
        if word.startswith("--"):
            key = word[2:].replace("-", "_")
            value = True if options.get(key) is False else None
        else:
            value = _policy_value(key, word, options.get(key))
        if key not in options or name == "all":
            known = ", ".join(options) or "none"
            raise InvalidValue(f"{name} has no option {word!r}: it has {known}")
        options[key] = value
    for key in [key for key, value in options.items() if value is None]:
        wanted = "5m or 1h" if key == "ttl" else "a number such as 60k"
        raise InvalidValue(f"{text!r} needs {key}: {wanted}")
    return name, options


def _policy_value(key: str, word: str, before: Any) -> Any:
    """None for what is no value."""
    if key == "tool":  # which may be of several words
        return f"{before or ''} {word}".strip()
    if key == "ttl":
        return {"5m": SHORT_TTL, "1h": HOUR_TTL}.get(word)
    number = re.match(r"(\d{1,9})([km]?)$", word.lower())
    return int(number[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[number[2]] if number else None


class Compactions:
    """The real compactions of sessions, from which others are predicted. ``by_agent``: of each what
    the context held beyond the session's first one, and the calls after it."""

    def __init__(self) -> None:
        self.by_agent: Dict[str, Rows] = {}

    def look_at(self, session: Session) -> None:
        """Take in those of a session."""
        firsts: Dict[str, Tuple[int, int]] = {}
        calls: List[Any] = []
        for step in ContextWalk(session):
            if step.call is None:
                continue
            length, agent = step.held.length, step.call.agent_id
            if step.last is None:
                calls = []
                if agent in firsts and any(map(is_compaction, step.events)):
                    first, prefix = firsts[agent]
                    self.by_agent.setdefault(session.agent, []).append(
                        {"beyond": length - first, "prefix": prefix, "calls": calls})
                firsts.setdefault(agent, (length, step.read))
            if len(calls) < CALIBRATED_CALLS:
                hit = step.read > step.before // 2
                price = session.price_of(step.call).rates.read
                calls.append((length, step.read, hit, step.fresh_cost, price))

    def summary(self, agent: str) -> int:
        """Tokens of a context beyond the first one, after a compaction of this agent's; 0 where
        there are too few."""
        beyond = [found["beyond"] for found in self.by_agent.get(agent, ())]
        return _median(beyond) if len(beyond) >= ENOUGH_COMPACTIONS else 0

    def errors(self) -> List[int]:
        """By how much the cost of the calls after each is missed when it is predicted from the
        others of that agent, in tenths of a percent, smallest first."""
        errors = []
        for all_of_them in self.by_agent.values():
            for found in all_of_them if len(all_of_them) >= ENOUGH_COMPACTIONS else ():
                more = _median([other["beyond"] for other in all_of_them if other is not found])
                more -= found["beyond"]
                paid = predicted = 0
                for number, (length, read, hit, cost, price) in enumerate(found["calls"]):
                    paid += read * price + cost
                    moved = read + more * hit if number else found["prefix"]
                    fresh = max(0, length + more - moved)
                    predicted += moved * price + cost * fresh // max(1, length - read)
                errors.append(1_000 * abs(predicted - paid) // max(1, paid))
        return sorted(errors)


def _median(values: Iterable[int]) -> int:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


# Errors (median, 90th percentile) of the cost of the calls after a compaction, predicted with the
# shipped medians; docs/bill.md.
SHIPPED_ERRORS = {"CODEX": (37, 82), "": (118, 630)}  # by agent; tenths of a percent
_ASSUMED = {
    "compact": "what is lost in a compaction is read again: nothing, 10.7k or 42.1k tokens",
    "return": "the summary is made by hand, before the pause, or on coming back",
    "ttl": "0, 13 or 25% of the caches within their time are lost all the same, 95% of those "
           "beyond it",
    "cap": "the rest of a result was needed never, half of the time, or always",
    "clear": "what was cleared is not read again",
    "start": "what is left out of the start load is not asked for"}
_SAME = ("the same calls with the same answers; what another context would have led to cannot be "
         "known")


def what_if(sessions: Any, policy: str,
            progress: Optional[Callable[[int], Any]] = None) -> Data:
    """Sessions priced again under a policy: "none", "compact --above N", "return --above N", "ttl
    5m|1h", "cap N [--tool T]", "start --tokens N", "no-repeats", "clear --older K [--at-least N]
    [--when-rebuilding]", "all" (return 80k, compact 200k and no-repeats in one replay).

    ``sessions``: a list of them, or a function that gives them again and again (None: left out);
    ``progress`` is called with the number of those done. Returns ``{"policy", "parameters",
    "recorded", "replayed": {"low", "middle", "high"}, "saves", "sessions": {"better", "worse",
    "same", "worst"}, "without_largest", "calibration": {"n", "source", "median_error", "p90_error"}
    (shares), "point", "assumptions", "recommended"}``, USD. ``replayed`` ascends from the best
    case, ``saves`` from the worst; where ``point`` is False the range alone is known. InvalidValue
    for a policy that is none."""
    name, options = parse_policy(policy)
    compacts = name in ("compact", "return", "all")
    compactions, rows, tools = Compactions(), [], set()  # type: Compactions, List[Any], Set[str]
    load = sessions if callable(sessions) else lambda: sessions
    for session in filter(None, load() if compacts else ()):
        compactions.look_at(session)
    for session in filter(None, load()):
        analysis, summary = Analysis(session), compactions.summary(session.agent)
        saves, = replayed(analysis, (name, options), summary=summary)
        tools.update(*map(_returned_by, analysis.walk.pieces))
        rows.append((saves[MIDDLE], session.id, saves, session.cost_in_pico, session.agent))
        if progress:
            progress(len(rows))
    if tools and options.get("tool", "").lower() not in tools:
        raise InvalidValue(f"no result of {options['tool']!r}: use one of "
                           f"{', '.join(sorted(tools - {''}))}")
    shipped = [SHIPPED_ERRORS.get(row[-1], SHIPPED_ERRORS[""]) for row in rows if compacts]
    median, high = max(shipped, default=(0, 0))
    errors = compactions.errors()
    if errors:
        median, high = _median(errors), errors[9 * (len(errors) - 1) // 10]
    middles = [row[0] for row in rows]
    largest = max(rows, key=lambda row: (abs(row[0]), row[1]), default=(0, ""))[1]
    worst, its_id, *_ = min(rows, default=(0, ""))
    return dict(
        _replay_sums(rows), policy=name, parameters=options, point=high <= POOR * 1_000,
        calibration={"n": len(errors), "source": "own" if errors else "shipped",
                     "median_error": median / 1_000, "p90_error": high / 1_000},
        sessions={"better": sum(middle > 0 for middle in middles),
                  "worse": sum(middle < 0 for middle in middles), "same": middles.count(0),
                  "worst": {"session": its_id, "costs": -worst / PICO} if worst < 0 else None},
        without_largest=dict(_replay_sums([row for row in rows if row[1] != largest]),
                             session=largest),
        assumptions=[_SAME] + [text for key, text in _ASSUMED.items()
                               if key == name or name == "all" and key in options])


def _replay_sums(rows: Iterable[Tuple[Any, ...]]) -> Data:
    recorded, saves = 0, [0, 0, 0]
    for _, _, saved, cost, _ in rows:
        recorded += cost
        saves = [sum(pair) for pair in zip(saves, saved)]
    replayed_costs = [recorded - saved for saved in reversed(saves)]
    found: Data = in_usd({"recorded": recorded, "replayed": dict(zip(RANGE, replayed_costs)),
                   "saves": dict(zip(RANGE, saves)),
                   "recommended": is_recommended(recorded, saves)})
    return found


def is_recommended(recorded: int, saves: Sequence[int]) -> bool:
    """Whether a saving (worst, middle, best) is worth advising: the worst case saves, the middle
    one at least 1% of what was ``recorded``."""
    return saves[0] > 0 and 100 * saves[1] >= recorded


# ---- what to do tomorrow (docs/bill.md) ----

# Replayed when a session is read, with the shipped medians: the policy, and what to say.
FIXED_POLICIES: Dict[str, Tuple[str, Data]] = {
    "return 80000": ("return", {"above": 80_000}),
    "compact 200000": ("compact", {"above": 200_000}),
    "compact 150000": ("compact", {"above": 150_000})}
_GETS_THERE = "Keep the context below %s tokens: `/compact` when it gets there."
_LONG_ADVICE = {
    "return 80000": ("return", "Leave a session above 80k tokens for longer than its cache lives? "
                     "`/compact` before you leave."),
    "compact 200000": ("context", _GETS_THERE % "200k"),
    "compact 150000": ("context", _GETS_THERE % "150k")}
# What to do about a prefix that was lost: what happened, and the line to paste.
_PREFIX_ADVICE = {
    "system_changed": (
        "the system prompt changed in mid-session (instruction file, output style or client "
        "update)",
        "Edit CLAUDE.md, output styles and settings between sessions, not during one."),
    "tools_changed": (
        "a tool server came or went in mid-session",
        "Connect MCP servers before the first prompt, and leave them connected."),
    "messages_changed": ("the client rewrote earlier messages", "claude update"),
    "model_switch": ("the model was changed in mid-session",
                     "Switch models with a new session or right after /compact."),
    "settings": ("settings were changed in mid-session",
                 "Change settings before the first prompt.")}
_READ_IN_PARTS = (
    "Read files of more than 10,000 tokens in parts: search first, then read those lines.")


def bill_columns(analysis: Analysis) -> Data:
    """What a row of a session has for the bill and the advice: ``bill`` (pico-dollars), ``replay``
    (policy: savings worst, middle and best), ``start_load`` (tokens of the main agent's first
    window), ``version`` of the client, ``large_reads``."""
    saves, session = replayed(analysis, *FIXED_POLICIES.values()), analysis.session
    reads = [{"file": str(event.data.get("file_path") or ""), "tokens": event.tokens_input,
              "cost": session.entry_cost(event) + (piece.carried + piece.again) // _PAIRED}
             for piece in analysis.walk.pieces for event in [piece.event] if event is not None
             and event.event_type is EventType.FILE_READ and event.tokens_input >= LARGE_READ]
    days = [{"day": local, "utc_day": utc, "prompts": sums["prompts"],
             "total_tokens": sums["total_tokens"],
             "paid": {how: sums[how] for how in (*HOW_PAID, "output") if sums[how]}}
            for (local, utc), sums in sorted(analysis.days.items()) if any(sums.values())]
    return {"bill": analysis.bill, "large_reads": reads, "project": _cwd_of(session), "days": days,
            "replay": {name: each for name, each in zip(FIXED_POLICIES, saves) if any(each)},
            "start_load": analysis.walk.starts.get("", 0),
            "version": str(session.source.get("version", ""))}


def day_parts(row: Data) -> Rows:
    """A session's row (with its `bill_columns`) cut by local day: rows whose prompts, tokens,
    dollars and cells are those of the day's calls, and add up to the session's. What was wasted is
    shared as the dollars are."""
    parts, whole = [], row["estimated_cost"] or 1
    for name in sorted({day["day"] for day in row["days"]}):
        days = [day for day in in_usd(row["days"]) if day["day"] == name]
        cells = [{"content": "", "how": how, "tokens": 0, "cost": paid}
                 for day in days for how, paid in day["paid"].items()]
        cost = sum(cell["cost"] for cell in cells)
        sums = {key: sum(day[key] for day in days) for key in ("prompts", "total_tokens")}
        wasted = {key: row[key] * cost / whole for key in ("waste_cost", "measured_waste_cost")}
        parts.append({**row, **sums, **wasted, "day": name, "estimated_cost": cost,
                      "bill": {"total": cost, "cells": cells}})
    return parts


def advice_of(rows: Rows) -> Rows:
    """What to do tomorrow, the largest saving first, from rows of sessions (`bill_columns`):
    ``{"kind", "text", "paste", "saves": {"low", "middle", "high"}, "sessions": [ids], "project"}``,
    in pico-dollars. ``"point": False`` says that of the saving the range alone is known."""
    found = itertools.chain(_long_advice(rows), _start_advice(rows), _read_advice(rows),
                            _prefix_advice(rows))
    return sorted((entry for entry in found if entry["saves"]["high"] > 0),
                  key=lambda entry: (-entry["saves"]["middle"], entry["text"]))


def _advised(kind: str, text: str, paste: str, saves: Iterable[int], by_session: Dict[str, int],
             **more: Any) -> Data:
    """``saves``: worst, middle and best; ``by_session``: the middle saving by session."""
    helped = sorted((-value, key) for key, value in by_session.items() if value > 0)
    entry = {"kind": kind, "text": text, "paste": paste, "saves": dict(zip(RANGE, saves)),
             "sessions": [key for _, key in helped], "project": "", **more}
    middle, largest = entry["saves"]["middle"], -helped[0][0] if helped else 0
    entry["without_largest"] = middle - middle * largest // (sum(by_session.values()) or 1)
    return entry


def _long_advice(rows: Rows) -> Iterable[Data]:
    """What a replay of the sessions themselves recommends."""
    best: Dict[str, Data] = {}
    recorded = sum(row["bill"]["total"] for row in rows)
    for policy, (kind, text) in _LONG_ADVICE.items():
        saves = {row["id"]: row["replay"].get(policy, (0, 0, 0)) for row in rows}
        totals = [sum(case) for case in zip((0, 0, 0), *saves.values())]
        middle = {key: each[MIDDLE] for key, each in saves.items()}
        worse = [value for value in middle.values() if value < 0]
        if is_recommended(recorded, totals) and (
                kind not in best or best[kind]["saves"]["middle"] < totals[MIDDLE]):
            best[kind] = _advised(kind, text, "/compact", totals, middle, point=False,
                                  worse=len(worse), worst=-min(worse, default=0))
    return best.values()


def _start_advice(rows: Rows) -> Iterator[Data]:
    """The start load of a project against the smallest seen with the same client and model."""
    least: Dict[Tuple[str, str], int] = {}
    projects: Dict[str, Rows] = {}
    for row in rows:
        if row["start_load"] and row["project"]:
            client = row["agent"], row["model"]
            least[client] = min(least.get(client, MAX_TOKENS), row["start_load"])
            projects.setdefault(row["project"], []).append(row)
    for project, its_rows in projects.items():
        total = bill = 0
        above = {}
        for row in its_rows:
            paid = sum(cell["cost"] for cell in row["bill"]["cells"]
                       if cell["content"] == START_LOAD)
            more = row["start_load"] - least[row["agent"], row["model"]]
            above[row["id"]] = paid * more // row["start_load"]
            total, bill = total + paid, bill + row["bill"]["total"]
        tokens = sorted(row["start_load"] for row in its_rows)[len(its_rows) // 2]
        per_1000, most = total * 1000 // tokens, sum(above.values())
        if bill:
            yield _advised(
                "start_load", f"{_last_name(project)} loads {tokens // 1000}k tokens before the "
                f"first prompt: ${total / PICO:,.2f}, {100 * total / bill:.0f}% of its bill.",
                "/context", sorted((min(per_1000, most), most // 2, most)), above, project=project,
                per_1000_tokens={"cost": per_1000})


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path)[-1] or path


def _read_advice(rows: Rows) -> Iterator[Data]:
    """Large reads with all that was paid for them: a part of each would have done, often but not
    always."""
    paid: Dict[str, int] = defaultdict(int)
    files: Dict[str, int] = defaultdict(int)
    for row in rows:
        for read in row["large_reads"]:
            paid[row["id"]] += read["cost"]
            files[read["file"]] += read["cost"]
    total = sum(paid.values())
    most = sorted(files, key=lambda name: (-files[name], name))[:5]
    names = ", ".join(dict.fromkeys(map(_last_name, most)))
    share = LARGE_READ_SAVING * total // 100
    if total:
        yield _advised("large_reads", f"Large files read whole cost ${total / PICO:,.2f}: {names}.",
                       _READ_IN_PARTS, (0, share // 2, share), paid, files=most)


def _prefix_advice(rows: Rows) -> Iterator[Data]:
    """Rebuilds whose cause can be avoided; the low figure leaves out the session with most of
    them."""
    for cause, (what, paste) in _PREFIX_ADVICE.items():
        net: Dict[str, int] = defaultdict(int)
        versions = set()
        for row in rows:
            for rebuild in row["bill"]["rebuilds"]:
                if rebuild["cause"] == cause:
                    net[row["id"]] += rebuild["net_cost"]
                    versions.add(row["version"])
        total, text = sum(net.values()), f"The cache was lost because {what}"
        if cause == "messages_changed" and any(versions):
            text += f" (version {', '.join(sorted(filter(None, versions)))})"
        if total > 0:
            yield _advised("broken_prefix", f"{text}: ${total / PICO:,.2f} more than with a live "
                           "cache.", paste,
                           (total - max(net.values()), total, total), net, cause=cause)


def build_report(session: Session, analyzers: Iterable[BaseAnalyzer]) -> OptimizationReport:
    """What the analyzers find, charged once, with the session's bill and the advice that follows
    from it (USD). An analyzer that raises is named in the report, the others count."""
    analysis = Analysis(session)
    row = dict(bill_columns(analysis), id=session.id, agent=session.agent, model=session.model)
    report = charged_report(analysis, analyzers)
    report.bill, report.advice = in_usd(row["bill"]), in_usd(advice_of([row]))
    return report


# ==================================================================================================
# Reports
# ==================================================================================================

_CONTROL = _Pattern(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")


def cut(text: str, most: int, *, middle: bool = False) -> str:
    """At most so many characters of a text; paths lose their ``middle``."""
    if len(text) <= most:
        return text
    left = (most - 1) // 3 if middle else most - 1
    return text[:left] + "…" + text[len(text) - (most - 1 - left):]


def plain(text: Any, limit: int = 200) -> str:
    """Text from outside on one line that cannot steer a terminal: control and direction characters
    become spaces, more than ``limit`` characters are cut."""
    return cut(" ".join(_CONTROL.sub(" ", str(text)).split()), limit)


def markdown_text(text: Any, limit: int = 200) -> str:
    """Text from outside that cannot break a markdown table, become a link or HTML, or call somebody
    by name."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~!&$])", r"\\\1", plain(text, limit))
    for sign, entity in (("\\&", "&amp;"), ("\\<", "&lt;"), ("\\>", "&gt;")):
        escaped = escaped.replace(sign, entity)
    return re.sub(r"(?i)(@|:(?=//)|#(?=\d)|\bwww(?=\.)|\bmailto:|\bxmpp:)", r"\1<!-- -->", escaped)


def short_number(count: float) -> str:
    """1,234 as it is, larger ones as 12.3k, 4.5M, 6.7G."""
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(count) >= least:
            return f"{count / size:,.1f}{unit}"
    return f"{count:,.0f}"


def share_text(part: float, whole: float) -> str:
    """A share in percent with one decimal; "0.0%" of nothing."""
    return f"{100 * part / (whole or 1):.1f}%"


def dollars(amount: float) -> str:
    """USD with cents, small amounts with four decimals."""
    size = f"{abs(amount):,.2f}" if abs(amount) >= 1 or not amount else f"{abs(amount):.4f}"
    return f"{'-' * (amount < 0)}${size}"


def counted(number: int, noun: str, form: str = ",") -> str:
    """A number and what it counts: "1 session", "2,000 sessions"; "+1 session" in the form
    "+,"."""
    return f"{number:{form}} {noun}{'s' * (abs(number) != 1)}"


def bar(part: float, whole: float, width: int = 24) -> str:
    """A bar of plain characters, ``width`` long where ``part`` is the whole."""
    return "#" * (max(1, round(width * part / whole)) if part > 0 and whole else 0)


def waste_text(measured: float, most: float, whole: float, show: Callable[[float], str]) -> str:
    """Waste as every report says it: what was measured with its share of the whole, then what it is
    at most, where something was estimated."""
    told = f"{show(measured)} measured ({share_text(measured, whole)})"
    return told if most <= measured else f"{told}, up to {show(most)} ({share_text(most, whole)})"


# -- one shape of a session row for every command, and their sums

HEAD = "id agent task model started_at ended_at total_tokens".split()
_JUDGED = "total_tokens estimated_cost efficiency_score token_use".split()
_CLASSES = "uncached_input cache_write cache_read output".split()
_WASTE = "waste_tokens measured_waste_tokens waste_cost measured_waste_cost".split()


def head_row(session: Session) -> Data:
    """What the header of a session says: the columns that all rows have."""
    return dict({name: getattr(session, name) for name in HEAD}, status=session.status.value)


def session_row(session: Session, report: OptimizationReport) -> Data:
    """What every command prints of one session (the ``sessions`` of ``scan --format json``)."""
    events, source = session.events, session.source
    last_at = events[-1].timestamp if events else ""
    calls = [event for event in events if event.event_type is EventType.AI_RESPONSE]
    errors = [event for event in events if event.event_type is EventType.ERROR]
    failures = sum(not failure_kind(error.data) for error in errors)
    reads = Counter(event.data["file_path"] for event in events
                    if event.event_type is EventType.FILE_READ and event.data.get("file_path"))
    used = Usage(*map(sum, zip(*session.usages().values())))
    waste = dict(zip(_WASTE, (report.total_waste_tokens, report.measured_waste_tokens,
                              report.total_waste_cost, report.measured_waste_cost)))
    return {
        **head_row(session), **waste, "waste": _nested(waste),
        "source": source.get("reader", ""), "path": source.get("path", ""),
        "project": source.get("cwd", ""),
        "last_at": last_at or session.ended_at or session.started_at,
        "minutes": session.duration_seconds / 60,
        "prompts": sum(event.event_type is EventType.USER_MESSAGE for event in events),
        "model_calls": sum(not call.data.get("unmetered") for call in calls),
        "tokens": dict(zip(_CLASSES, (used.uncached, used.write_5m + used.write_1h, used.read,
                                      used.output))),
        **{name: getattr(report, name) for name in _JUDGED},
        "issues": [issue.to_dict() for issue in report.issues], "issue_count": len(report.issues),
        "unattributed_tokens": sum(event.tokens_input for event in events
                                   if event.data.get("source") == Source.UNATTRIBUTED),
        "events": len(events), "errors": len(errors),
        "error_rate": 100 * failures / len(events) if failures > 1 else 0.0,
        "notes": report.notes + [f"analyzer failed: {text}" for text in report.analyzer_errors],
        "most_read": dict(reads.most_common(10)),
    }


def _nested(flat: Data) -> Data:
    return {name.replace("waste_", ""): flat[name] for name in _WASTE}


_LONG_KEYS = "tokens waste issues token_use notes most_read path".split()


def summary_row(session: Session, report: OptimizationReport) -> Data:
    """A session row as ``summaries()`` keeps it."""
    return short_row(session_row(session, report))


def short_row(row: Data) -> Data:
    """A session row without its lists, with the names it had in ``summaries()`` before: ``tokens``
    (their sum), ``cost``, ``efficiency``, ``issues`` ({type: count})."""
    kinds = [issue["issue_type"] for issue in row["issues"]]
    kept = {name: value for name, value in row.items() if name not in _LONG_KEYS}
    return dict(kept, usage=row["tokens"], tokens=row["total_tokens"], cost=row["estimated_cost"],
                efficiency=row["efficiency_score"], started=seconds_of(row["started_at"]) or 0.0,
                issues={kind: kinds.count(kind) for kind in kinds})


def _sums(rows: Rows, names: Iterable[str]) -> Data:
    """The sums of columns: tokens, or dollars to the pico-dollar, in any order and on any
    Python."""
    from math import fsum
    return {name: round(fsum(row[name] for row in rows), 12) if "cost" in name
            else sum(row[name] for row in rows) for name in names}


def scan_totals(rows: Rows) -> Data:
    """The sums over session rows, in any order the same: sessions, model calls, tokens, USD, waste;
    their efficiency."""
    totals = _sums(rows, "model_calls total_tokens estimated_cost unattributed_tokens".split())
    waste = _nested(_sums(rows, _WASTE))
    return dict(totals, sessions=len(rows), waste=waste,
                efficiency_score=100.0 * (1 - waste["tokens"] / (totals["total_tokens"] or 1)),
                tokens=_sums([row.get("usage") or row["tokens"] for row in rows], _CLASSES))


GROUPS = "day week model project agent session tool".split()


def cell_sums(cells: Iterable[Data], by: str) -> Dict[str, float]:
    """The dollars of a bill's cells by their ``how`` or ``content``."""
    sums: Dict[str, float] = {}
    for cell in cells:
        sums[cell[by]] = sums.get(cell[by], 0.0) + cell["cost"]
    return sums


def _paid(rows: Rows) -> Dict[str, float]:
    """The dollars of session rows by how they were paid."""
    return cell_sums((cell for row in rows for cell in row["bill"]["cells"]), "how")


def measures(rows: Rows) -> Data:
    """What sessions cost: ``{"sessions", "total_tokens", "estimated_cost", "waste_cost",
    "measured_waste_cost", "cost_per_session", "cost_per_prompt", "written_again"}`` (a share of the
    dollars); 0 where there is nothing to divide by."""
    sums = _sums(rows, "total_tokens estimated_cost waste_cost measured_waste_cost".split())
    prompts, cost, paid = sum(row["prompts"] for row in rows), sums["estimated_cost"], _paid(rows)
    sessions = len({row["id"] for row in rows})  # one may have several days of a week
    return dict(sums, sessions=sessions, cost_per_session=cost / (sessions or 1),
                cost_per_prompt=prompts and cost / prompts,
                written_again=paid.get("again", 0.0) / (sum(paid.values()) or 1))


def grouped(rows: Rows, by: str, bill: Data) -> Rows:
    """The `measures` of session rows by one of GROUPS, each with its ``key``; days and weeks (by
    their Monday) in order, else the most dollars first. A day is local; each call counts on its
    own (`day_parts`). By tool the ``bill`` (USD) is told by content: ``{"key", "first", "carried",
    "again", "output", "estimated_cost"}``; by model ``estimated_cost`` is what was billed at it and
    ``sessions`` are those that were, the rest is of the sessions that it leads."""
    if by == "tool":
        sums = [_tool_row(content, [cell for cell in bill["cells"] if cell["content"] == content])
                for content in cell_sums(bill["cells"], "content")]
    else:
        groups = _groups(rows, by)
        sums = [dict(measures(group), key=key) for key, group in sorted(groups.items())]
    if by == "model":
        sums = [_model_row(key, cost, groups.get(key, []), [
            row for row in rows if key in row["bill"]["models"]])
            for key, cost in bill.get("models", {}).items()]
    return sums if by in ("day", "week") else sorted(sums, key=lambda row: -row["estimated_cost"])


def _model_row(key: str, cost: float, led: Rows, billed_at: Rows) -> Data:
    return dict(measures(led), key=key, sessions=len(billed_at), estimated_cost=cost,
                cost_per_session=cost / (len(billed_at) or 1))


def _tool_row(key: str, cells: Rows) -> Data:
    how = dict(dict.fromkeys(_HOW, 0.0), **cell_sums(cells, "how"))
    return dict(how, key=key, estimated_cost=sum(how.values()))


def _groups(rows: Rows, by: str) -> Dict[str, Rows]:
    groups: Dict[str, Rows] = {}
    for row in rows:
        for part in day_parts(row) if by in ("day", "week") else (row,):
            key = part["id"] if by == "session" else part.get(by)
            key = _day(part["day"], True) if by == "week" else key
            groups.setdefault(key or "unknown", []).append(part)
    return groups


def _day(time: str, monday: bool = False) -> str:
    from datetime import timedelta
    moment = parse_time(time)
    if moment is None:
        return ""
    with suppress(OverflowError, OSError, ValueError):  # years 1 and 9999: no local day everywhere
        moment = moment.astimezone()
    return (moment - timedelta(moment.weekday() if monday else 0)).isoformat()[:10]


def rows_of_agent(rows: Rows, agent: Optional[str]) -> Rows:
    """The rows of one agent, in any spelling; all where none is named."""
    return [row for row in rows if not agent or agent_key(row["agent"]) == agent_key(agent)]


def agent_key(name: Any) -> str:
    """What the spellings of an agent's name have in common: "Claude Code" is "claude-code"."""
    return str(name).lower().replace(" ", "-")


def selection(rows: Rows, only_stored: int = 0) -> Data:
    """What there is before anything is filtered: how many sessions, the newest, the agents, and how
    many more the store alone has, since their transcripts are gone."""
    newest = max((_day(row["last_at"]) for row in rows), default="")
    return {"sessions": len(rows), "newest": newest, "only_stored": only_stored,
            "agents": sorted({row["agent"] for row in rows})}


# -- a report is a list of sections; each renderer escapes every text of them in its own way

class Pasted(str):
    """A command to be pasted, of a section's lines: it stays on one line, however long."""


Section = namedtuple("Section", "title facts heads rows lines parts picture hint",
                     defaults=((), (), (), (), (), "", ""))
Section.__doc__ = """A part of a report: a title, ``facts`` (label, text), a table (``heads`` and
``rows``), numbered ``parts`` (sections), ``lines`` of a list, and a ``picture`` for pages. A head
begins with > for numbers, ~ for paths, - for texts that may end early, + for those that wrap (the
last column); then with ? where the column is left out when there is no room for it."""


def table(title: str, columns: Dict[str, str], rows: Iterable[Data], **more: Any) -> Section:
    """A section with a table: for each head a column of the rows and how it is shown, as in
    "waste_cost:$" ($: USD, k: a short number, else a format specification)."""
    shown = [column.partition(":") for column in columns.values()]
    return Section(title, heads=tuple(columns), rows=[
        tuple(_figure(row[name], form) for name, _, form in shown) for row in rows], **more)


def _figure(value: Any, form: str) -> str:
    show = {"$": dollars, "k": short_number}.get(form)
    return show(value) if show else format(value, form)


def _wrapped(text: Any, width: int, lead: str = "") -> List[str]:
    import textwrap
    room = max(width - len(lead), 20)
    words = (cut(word, room, middle=True) for word in plain(text, 500).split())
    lines = textwrap.wrap(" ".join(words), len(lead) + room, initial_indent=lead,
                          subsequent_indent=" " * len(lead), break_on_hyphens=False)
    return lines or [lead.rstrip()]


def _indented(lines: Iterable[str], by: str) -> List[str]:
    return [(by + line).rstrip() for line in lines]


def text_sections(sections: Iterable[Section], width: int = 80) -> str:
    """Sections as plain text, no line wider than ``width``; those without content are left out."""
    blocks = []
    for section in sections:
        body = _text_body(section, width - 2)
        if body:
            title = section.title.upper() + f" ({section.hint})" * bool(section.hint)
            blocks.append("\n".join(_wrapped(title, width) + _indented(body, "  ")))
    return "\n\n".join(blocks)


def _text_body(section: Section, width: int) -> List[str]:
    lines = []
    labels = max((len(label) for label, _ in section.facts), default=0) + 3
    for label, value in section.facts:
        lines += _wrapped(value, width, f"{label + ':' * bool(label):<{labels}}")
    if section.rows:
        lines += text_table(section.heads, section.rows, width)
    for number, part in enumerate(section.parts, 1):
        body = _indented(_text_body(part, width - 3), "   ")
        lines += [""] * bool(body and number > 1)
        lines += _wrapped(part.title, width, f"{number}. ") + body
    for line in section.lines:
        lines += [f"$ {line}"] if isinstance(line, Pasted) else _wrapped(line, width, "* ")
    return lines


_SIGNS = ">~-+?"  # before the name of a column; what one of texts keeps where it is narrow
_LEAST = {"~": 12, "-": 16, "+": 24}


def _columns(heads: Sequence[str], cells: Iterable[Sequence[str]], width: int) -> Dict[int, int]:
    """Which columns of a table there is room for, and how wide each is."""
    sizes = {at: max(map(len, column)) for at, column in enumerate(zip(*cells))}
    least = {at: min(size, _LEAST.get(heads[at][:1], size)) for at, size in sizes.items()}
    for at in sorted(sizes, reverse=True):
        if "?" in heads[at][:2] and sum(least[other] + 2 for other in sizes) > width + 2:
            del sizes[at]
    texts = [at for at in sizes if heads[at][:1] != ">"]
    for _ in range(sum(sizes.values()) + 2 * (len(sizes) - 1) - width):
        widest = max(texts, key=lambda at: (sizes[at] > least[at], sizes[at]))
        sizes[widest] = max(8, sizes[widest] - 1)
    return sizes


def text_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 80) -> List[str]:
    """The lines of a table. Where it is too wide, columns are left out, and texts end early or go
    on below."""
    import textwrap
    names = [head.lstrip(_SIGNS) for head in heads]
    cells = [names] * any(names) + [[plain(cell, 400) for cell in row] for row in rows]
    columns, last = _columns(heads, cells, width), len(heads) - 1
    lines = []
    for row in cells:
        wraps = heads[last][:1] == "+" and last in columns
        for rest in textwrap.wrap(row[last], columns[last] or 1) or [""] if wraps else row[last:]:
            fitted = []
            for at, size in columns.items():
                text = rest if at == last else row[at]
                short = cut(text, size, middle=heads[at][:1] != "-")
                if short != text and heads[at][:1] == "-":
                    whole = textwrap.shorten(text, size, placeholder=" …")
                    short = whole if 2 * len(whole) > size else short
                fitted.append(f"{short:>{size}}" if heads[at][:1] == ">" else f"{short:<{size}}")
            lines.append("  ".join(fitted)[:width].rstrip())
            row = [""] * len(row)
    return lines


def _markdown_section(section: Section, level: str = "##") -> List[str]:
    lines = [f"- **{label}:** {markdown_text(value, 500)}" for label, value in section.facts]
    if section.rows:
        rules = ["---:" if head[:1] == ">" else "---" for head in section.heads]
        cells = [[markdown_text(cell, 400) for cell in row] for row in section.rows]
        names = [head.lstrip(_SIGNS) for head in section.heads]
        lines += [f"| {' | '.join(row)} |" for row in [names, rules, *cells]]
    for part in section.parts:
        lines += [""] * bool(lines) + _markdown_section(part, level + "#")
    lines += [f"- {markdown_text(line, 500)}" for line in section.lines]
    return [f"{level} {markdown_text(section.title, 400)}", "", *lines] if lines else []


# -- the bill, and what to do about it

_HOW = {"carried": "sent again with every call", "first": "entering the first time",
        "again": "written again (cache lost)", "output": "output"}
CAUSES = {"expired": "you came back after the cache expired", "resume": "a session was resumed",
           "system_changed": "the system prompt changed", "tools_changed": "the tools changed",
           "messages_changed": "the client rewrote messages", "model_changed": "another model",
           "model_switch": "another model", "settings": "settings were changed",
           "shortened": "the context was cut", "previous_message_not_found": "the provider lost it",
           "unavailable": "the provider lost it", "not_explained": "not explained"}


def bill_sections(bill: Data, period: str = "") -> List[Section]:
    """Where the money went (a bill in USD): how it was paid, and the largest parts of each."""
    rows = []
    paid = cell_sums(bill["cells"], "how") if bill else {}
    for how, cost in sorted(paid.items(), key=lambda item: -item[1]):
        parts = cell_sums((cell for cell in bill["cells"] if cell["how"] == how), "content")
        if how == "again":
            causes = [dict(lost, cause=CAUSES[lost["cause"]]) for lost in bill["rebuilds"]]
            parts = cell_sums(causes, "cause")
            parts["small ones"] = bill["small_rebuilds"]["cost"]
        ranked = sorted(parts.items(), key=lambda item: -item[1])
        largest = " · ".join(f"{name} {dollars(part)}" for name, part in ranked[:4] if part)
        hidden = bill["hidden_output"]
        if how == "output":
            largest = (f"a lower bound: hidden in {hidden['calls']:,} of "
                       f"{counted(hidden['of'], 'call')}" * bool(hidden["calls"]))
        if cost:
            rows.append((_HOW[how], dollars(cost), share_text(cost, bill["total"]), largest))
    guessed = f"{dollars(bill['guessed'])} of it at a guessed price" if bill.get("guessed") else ""
    hint = ", ".join(filter(None, [dollars(bill.get("total", 0)), guessed, period]))
    return [Section("Where the money went", heads=("-", ">", ">", "+"), rows=rows, hint=hint)]


def advice_section(advice: Rows, most: int = 5) -> Section:
    """What to do first (advice in USD), the largest saving first."""
    parts = []
    for entry in advice[:most]:
        low, high = dollars(entry["saves"]["low"]), dollars(entry["saves"]["high"])
        saves = low if low == high else f"{low} to {high}".replace("$0.00 to", "up to")
        saves += " (shipped medians)" * (entry.get("point") is False)
        if "per_1000_tokens" in entry:
            saves = f"{dollars(entry['per_1000_tokens']['cost'])} per 1,000 tokens removed"
        told = f"{entry['text']} Saves {saves}; {counted(len(entry['sessions']), 'session')}"
        if entry.get("worse"):
            told += f", {entry['worse']} worse ({dollars(entry['worst'])})"
        parts.append(Section(told + "."))
    return Section("What to do first", parts=parts, hint="the savings overlap",
                   lines=_more(len(advice), most, "--format json has all"))


def rebuild_section(bill: Data) -> Section:
    """Every time the context was written again because its cache was lost."""
    return table("Written again", {
        ">?when": "at:.16", ">where": "where", ">tokens": "tokens:,", ">net $": "net_cost:$",
        ">?minutes": "minutes:.0f", "+cause (who says so)": "cause"}, (dict(
            lost, where=f"line {lost['line']}" if lost.get("line") else "",
            cause=CAUSES[lost["cause"]] + f" ({lost['source']})".replace(" (none)", ""),
            minutes=(lost["gap_seconds"] or 0) / 60) for lost in bill["rebuilds"]))


def whatif_section(result: Data) -> Section:
    """What ``whatif`` prints of a replay."""
    def told(figures: Data) -> str:
        low, middle, high = (dollars(figures["saves"][name]) for name in ("low", "middle", "high"))
        return f"{middle} ({low} to {high})" if result["point"] else f"{low} to {high}"

    counts, known = result["sessions"], result["calibration"]
    worst = counts["worst"]
    worse = f"; {worst['session'][:8]} by {dollars(worst['costs'])}" if worst else ""
    by = f", by {known['n']:,} compactions of your own" if known["n"] else " (shipped medians)"
    facts = [
        ("Recorded", dollars(result["recorded"])),
        ("Saves", told(result) + by * bool(known["p90_error"])),
        ("Without the largest", told(result["without_largest"])),
        ("Sessions", f"{counts['better']:,} better, {counts['worse']:,} worse, {counts['same']:,} "
                     f"the same{worse}")]
    if known["p90_error"]:
        facts.append(("Error", f"{known['median_error']:.0%} in the middle, "
                               f"{known['p90_error']:.0%} for one in ten"))
    facts.append(("Verdict", f"{'' if result['recommended'] else 'not '}recommended"))
    return Section(f"What if: {result['policy']}", facts, lines=result["assumptions"])


def _more(count: int, most: int, how: str) -> List[str]:
    return [f"and {count - most:,} more ({how})"] * (count > most)


ADVICE_BEGIN, ADVICE_END = "<!-- sessionoptimizer: begin -->", "<!-- sessionoptimizer: end -->"


def advice_markdown(advice: Rows) -> str:
    """The lines for CLAUDE.md or AGENTS.md between their markers, each with its evidence as a
    comment; what is a command and no line is left out."""
    lines = [ADVICE_BEGIN]
    for entry, part in zip(advice, advice_section(advice, len(advice)).parts):
        if entry["paste"][-1:] == ".":
            why = plain(part.title, 400).replace("--", "-")
            lines += [f"- {plain(entry['paste'])}", f"  <!-- {why} -->"]
    return "\n".join([*lines, ADVICE_END]) + "\n"


def without_advice(text: str) -> str:
    """A file's text without the lines between the markers."""
    return re.sub(rf"\n?{ADVICE_BEGIN}.*?{ADVICE_END}\n?", "", text, flags=re.S)


# -- what a session's report holds

def _session_sections(session: Session, report: OptimizationReport, *more: Section,
                      evidence: bool = False) -> List[Section]:
    path = session.source.get("path")
    incomplete = " (incomplete: an analyzer failed)" if report.analyzer_errors else ""
    tokens = waste_text(report.measured_waste_tokens, report.total_waste_tokens,
                        report.total_tokens, lambda count: f"{count:,.0f}")
    cost = waste_text(report.measured_waste_cost, report.total_waste_cost,
                      report.estimated_cost, dollars)
    return [
        Section("Session", [
            ("Session ID", report.session_id), ("Generated", report.generated_at),
            ("Agent", session.agent), ("Task", session.task), ("Model", session.model),
            ("Status", session.status.value), *([("Transcript", path)] if path else ()),
            ("Duration", f"{session.duration_seconds / 60:.1f} minutes active")]),
        Section("Summary", [
            ("Efficiency Score", f"{report.efficiency_score:.1f}/100{incomplete}"),
            ("Total Waste Tokens", f"{tokens} of {report.total_tokens:,}"),
            ("Total Waste Cost", f"{cost} of {dollars(report.estimated_cost)} at API prices"),
            ("Issues Found", str(len(report.issues)))]),
        *more, *bill_sections(report.bill), advice_section(report.advice),
        Section("Issues", parts=findings(session, report, evidence=evidence),
                hint="by severity, then waste"),
        Section("Recommendations", lines=report.recommendations),
        Section("Notes", lines=report.notes)]


def findings(session: Session, report: OptimizationReport, *, facts: bool = True,
             evidence: bool = True) -> List[Section]:
    """A report's findings as sections: the ``facts`` of each, and as ``evidence`` its events."""
    events = {event.id: event for event in session.events}
    found = []
    for issue in report.issues:
        involved = [events[key] for key in issue.events_involved if key in events]
        told = f"[{issue.severity.value}] {issue.issue_type.value}: {plain(issue.description)}"
        where = ("Events", counted(len(involved), "event") if involved else "the whole session")
        found.append(table(
            told, {"~where": "where", "~what": "what", ">in": "tokens_input:,",
                   ">out": "tokens_output:,", ">wasted": "wasted:,"},
            [_evidence(session, event, issue) for event in involved] if evidence else (),
            facts=[("Waste", _issue_waste(issue)), where, ("Suggestion", issue.suggestion)]
            if facts else [where]))
    return found


def _issue_waste(issue: EfficiencyIssue) -> str:
    tokens, charged = issue.estimated_waste_tokens, issue.charged_tokens
    kind = "measured" if issue.measured else "estimated"
    told = f"{counted(tokens, 'token')} ({dollars(issue.estimated_waste_cost)}), {kind}"
    return told if charged == tokens else f"{told}, {charged:,} charged"


def _evidence(session: Session, event: SessionEvent, issue: EfficiencyIssue) -> Data:
    claim = issue.claims.get(event.id) or 0
    own = event.data.get("line") and not event.data.get("path")
    where = f"line {event.data['line']}" if own else event_place(session, event)
    return dict(event.to_dict(), where=where, what=event_extract(session, event),
                wasted=sum(claim) if isinstance(claim, (list, tuple)) else claim)


def event_place(session: Session, event: SessionEvent) -> str:
    """path:line of an imported event; the id and time of one logged by hand."""
    source, line = session.source, event.data.get("line")
    if source and line:
        return f"{plain(event.data.get('path') or source.get('path'), 300)}:{line}"
    return f"{plain(event.id, 80)} {plain(event.timestamp, 40)}"


def event_extract(session: Session, event: SessionEvent, most: int = 100) -> str:
    """One line that shows what the event was: command, path, query, message, or its source."""
    data = event.data
    for key in "command query file_path file message".split():
        if data.get(key):
            lines = data.get("lines") if key == "file_path" else None
            extra = f" lines {lines[0]}-{lines[-1]}" if isinstance(lines, list) and lines else ""
            return plain(f"{data.get('tool', '')} {data[key]}", most) + extra
    return plain(data.get("tool") or data.get("source") or event.event_type.value.lower(), most)


def text_report(session: Session, report: OptimizationReport, *, width: int = 80) -> str:
    """The report as plain text, no line wider than ``width``."""
    return "SESSION OPTIMIZATION REPORT\n\n" + text_sections(
        _session_sections(session, report), width)


def evidence_text(session: Session, report: OptimizationReport, *, width: int = 80) -> str:
    """Every finding with its events: where each stands in the transcript, its tokens, and a
    one-line extract of it."""
    return "\n\n" + text_sections([
        Section("Evidence", parts=findings(session, report, facts=False)),
        rebuild_section(report.bill)], width)


def markdown_report(session: Session, report: OptimizationReport) -> str:
    """The report as markdown."""
    breakdown = Section("Token Breakdown", heads=("category", ">tokens"), rows=[
        (name, f"{tokens:,}") for name, tokens in report.token_breakdown.items()])
    blocks = map(_markdown_section, _session_sections(session, report, breakdown))
    return "\n\n".join(["# Session Optimization Report",
                        *("\n".join(block) for block in blocks if block)]) + "\n"


def json_report(session: Session, report: OptimizationReport) -> str:
    """The report's fields as JSON."""
    return json.dumps(report.to_dict(), indent=2, default=str)


# -- what a scan's report holds

def _scan_sections(result: Data, most: int, by: Iterable[str] = (), *more: Section,
                   command: Callable[[str], str] = "sessionoptimizer {}".format) -> List[Section]:
    rows, skipped = result["sessions"], _skipped_lines(result["skipped"])
    found, facts = result.get("found") or selection(rows), []
    if result.get("changes"):
        facts.append(("Changed", result["changes"]))
    if found.get("only_stored"):
        facts.append(("Stored", f"{counted(found['only_stored'], 'more session')} in the store "
                                "alone: transcript gone. `stats` and `list` count all"))
    if not rows:
        some = [f"{counted(found['sessions'], 'session')}, none of them as asked for; the newest "
                f"is of {found['newest'] or 'an unknown day'}"] if found["sessions"] else []
        return [Section("No sessions found", facts, lines=some + skipped
                        or ["Nothing to read here."])]
    bill = result.get("bill", {})
    return [
        *bill_sections(bill, date_range(rows)), *more, advice_section(result.get("advice", [])),
        Section("Sessions", headline(result["totals"], rows) + facts),
        *(group_section(grouped(rows, name, bill), name) for name in by),
        _kinds_section(rows), _worst_section(rows, most, command),
        Section("Notes", lines=_scan_notes(rows) + skipped)]


def by_section(rows: Rows, by: str, bill: Data) -> Section:
    """The table of ``--by``: what `grouped` gives, and the total, which is the bill's."""
    total = (_tool_row("total", bill["cells"]) if by == "tool"
             else dict(measures(rows), key="total"))
    section = group_section([*grouped(rows, by, bill), total], by)
    return section._replace(hint=f"{date_range(rows)}; {section.hint}".strip("; "))


def group_section(groups: Rows, by: str) -> Section:
    """The table of what `grouped` gives."""
    if by == "session":
        groups = with_short_ids(groups, "key")
    columns, hint = {
        f"~{by}": "key", ">sessions": "sessions:,", ">cost $": "estimated_cost:$",
        ">?a session": "cost_per_session:$"}, "sessions: all that it was used in"
    if by == "tool":
        columns, hint = {"~tool": "key", ">cost $": "estimated_cost:$", ">first": "first:$",
                         ">carried": "carried:$", ">again": "again:$"}, ""
    elif by != "model":
        columns.update({">?a prompt": "cost_per_prompt:$", ">?wasted": "measured_waste_cost:$",
                        ">?again": "written_again:.1%"})
        hint = "wasted: measured; again: share written again"
    return table(f"By {by}", columns, groups, hint=hint)


def date_range(rows: Rows) -> str:
    """The days on which the sessions began and were last active: "2026-06-01 to 2026-11-20"."""
    days = sorted(filter(None, (
        _day(row[name]) for row in rows for name in ("started_at", "last_at"))))
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""


def headline(totals: Data, rows: Rows) -> List[Tuple[str, str]]:
    """The figures that every report on many sessions begins with."""
    tokens, waste, cost = totals["tokens"], totals["waste"], totals["estimated_cost"]
    agents = plain(", ".join(sorted({str(row["agent"]) for row in rows})), 60)
    new, writes, output, again = (short_number(count) for count in (
        tokens["uncached_input"] + tokens["cache_write"], tokens["cache_write"], tokens["output"],
        tokens["cache_read"]))
    wasted = waste_text(waste["measured_cost"], waste["cost"], cost, dollars)
    tokens_wasted = waste_text(waste["measured_tokens"], waste["tokens"], totals["total_tokens"],
                               short_number)
    return [
        ("Sessions", f"{len(rows):,} ({agents}), {counted(totals['model_calls'], 'model call')}"),
        ("Period", date_range(rows)),
        ("Tokens", f"{new} new input ({writes} of it cache writes), {output} output; {again} sent "
                   "again from the cache"),
        ("Cost", f"{dollars(cost)} at API prices"),
        ("Waste", f"{wasted} of the cost"), ("", f"{tokens_wasted} of the new tokens"),
        ("Efficiency", f"{totals['efficiency_score']:.1f}/100")]


def with_short_ids(rows: Rows, name: str = "id") -> Rows:
    """Rows with the ids of a column cut to 8 characters where no other one begins so, for
    people."""
    heads = Counter(known[:8] for known in {row[name] for row in rows})
    return [dict(row, **{name: row[name] if heads[row[name][:8]] > 1 else row[name][:8]})
            for row in rows]


def _kinds_section(rows: Rows) -> Section:
    kinds: Dict[Any, Data] = {}
    for issue in (issue for row in rows for issue in row["issues"]):
        told = ("estimated", "measured")[issue["measured"]]
        entry = kinds.setdefault((issue["issue_type"], told), {
            "kind": issue["issue_type"], "told": told, "cost": 0.0, "tokens": 0, "findings": 0})
        entry["cost"] += issue["charged_cost"]
        entry["tokens"] += issue["charged_tokens"]
        entry["findings"] += 1
    ranked = sorted(kinds.values(), key=lambda entry: (-entry["cost"], -entry["tokens"]))
    return table("Waste by kind", {"": "kind", ">?findings": "findings:,", ">?tokens": "tokens:,",
                                   ">wasted $": "cost:$", " ": "told"}, ranked,
                 hint="each token charged once", lines=[] if ranked else ["None found."])


def _worst_section(rows: Rows, most: int, command: Callable[[str], str]) -> Section:
    wasteful = [row for row in with_short_ids(rows) if row["waste_tokens"]]
    wasteful.sort(key=lambda row: (-row["waste_cost"], -row["waste_tokens"]))
    why = [Pasted(command(f"analyze {row['id']} --evidence")) for row in wasteful[:1]]
    return table("Worst sessions", {
        "~id": "id", ">score": "efficiency_score:.1f", ">?wasted": "waste_tokens:k",
        ">wasted $": "waste_cost:$", ">session $": "estimated_cost:$", "-task": "task",
    }, wasteful[:most], lines=why)


def _scan_notes(rows: Rows) -> List[str]:
    """The notes of all sessions: those that begin with a number once, with their numbers added
    up."""
    told: Dict[str, List[List[int]]] = defaultdict(list)
    for note in (note for row in rows for note in row["notes"]):
        numbers = re.findall(r"\b\d[\d,]*\b", note) if note[:1].isdigit() else []
        text = re.sub(r"\b\d[\d,]*\b", "\0", note) if numbers else note
        told[text].append([int(number.replace(",", "")) for number in numbers])
    lines = []
    for text, found in told.items():
        for count in map(sum, zip(*found)):
            text = text.replace("\0", f"{count:,}", 1)
        lines.append(text if found[0] else f"{plain(text)} ({counted(len(found), 'session')})")
    return lines


def _skipped_lines(skipped: Rows) -> List[str]:
    places = [entry["path"] for entry in skipped if entry["line"]]
    files = len(skipped) - len(places)
    told = [f"{counted(len(places), 'damaged line')} in {counted(len(set(places)), 'file')}"]
    told = told * bool(places) + [f"{counted(files, 'file')} without a session"] * bool(files)
    return [f"Skipped: {' and '.join(told)} (--format json names each with the reason)"
            ] * bool(told)


def scan_report(result: Data, most: int = 8, *, by: Iterable[str] = (),
                width: int = 80) -> str:
    """What a scan found, as plain text: where the money went, what to do first, totals, tables
    ``by`` some of GROUPS, waste by kind, the worst sessions."""
    return text_sections(_scan_sections(result, most, by), width)


# -- pages: one file each, with pictures drawn without a script

MOST_COLUMNS = 120  # of a picture: more would be thinner than a pixel on a phone
_KINDS = {"carried": "Sent again", "first": "New", "again": "Written again (cache lost)",
          "output": "Output", "wasted": "Wasted"}
_STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#161b24;--soft:#566072;--line:#ddd;
--bad:#c62730;--fair:#8a5200;--new:#3b82e6;--again:#b77400;--out:#57b58a;--carry:#9fb0c8}
@media (prefers-color-scheme:dark){:root{--page:#0e1218;--card:#171d26;--ink:#e8ecf2;--soft:#98a4b6;
--line:#28313e;--bad:#ff7b80;--fair:#f0b04a;--new:#5b9bf3;--again:#e6b53c;--out:#63c79a;
--carry:#4a5a72}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;margin:2px 0 6px}h2{font-size:16px;margin:0}
h1,p,li,dd,summary,td{overflow-wrap:anywhere}
.soft,dt,figcaption,footer{color:var(--soft);font-size:13px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px;
margin-top:16px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:10px 0 0}dd{margin:0}
dt{padding-top:1px}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;margin-top:8px}
th{font-weight:600;color:var(--soft);text-align:left}
th,td{border-bottom:1px solid var(--line);padding:5px 12px 5px 0;vertical-align:top}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.chip{border:1px solid;border-radius:999px;padding:1px 9px;font-size:11px;font-weight:650}
.critical,.high{color:var(--bad)}.medium,.recommended{color:var(--fair)}
ul{margin:6px 0 0;padding-left:22px}details{border-top:1px solid var(--line);padding:10px 0}
summary{cursor:pointer}details>:not(summary){margin-left:18px}
figure{margin:12px 0 0}svg{display:block;width:100%;border-bottom:1px solid var(--line)}
figcaption{display:flex;justify-content:space-between;flex-wrap:wrap;gap:0 16px}
.first{fill:var(--new);color:var(--new)}.again{fill:var(--again);color:var(--again)}
.output{fill:var(--out);color:var(--out)}.carried{fill:var(--carry);color:var(--carry)}
.wasted{fill:var(--bad);color:var(--bad)}g:hover{opacity:.7}footer{margin-top:22px}
@media (max-width:720px){main{padding:18px 12px}section{padding:14px}dl{display:block}
dd{margin:0 0 6px}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def _escaped(text: Any, limit: int = 400) -> str:
    """Text from outside that is text in a page, too; a [LABEL] in front becomes a chip."""
    import html
    line = plain(text, limit)
    label = re.match(r"\[([A-Z]+)([A-Z ]*)\] ", line)
    if label is None:
        return html.escape(line)
    chip = f'<span class="chip {label[1].lower()}">{"".join(label.groups())}</span> '
    return chip + html.escape(line[label.end():])


def _page(title: Any, about: str, sections: Iterable[Section]) -> str:
    """A whole HTML document in ASCII, which no encoding on its way can damage."""
    name, shown = _escaped(title), "\n".join(filter(None, map(_html_section, sections)))
    text = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{name}</title><style>{_STYLE}</style></head>\n<body><main>\n"
            f'<h1>{name}</h1><p class="soft">{about}</p>\n{shown}'
            f"\n<footer>Made by SessionOptimizer {__version__} on {now_text()[:10]}. "
            "Costs are at API prices. Every token is charged once; measured waste is recorded "
            "tokens of exact repeats, estimated waste assumes a share.</footer>\n"
            "</main></body></html>\n")
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _html_section(section: Section) -> str:
    body = _html_body(section)
    hint = f'<p class="soft">{_escaped(section.hint)}</p>' if section.hint else ""
    return f"<section><h2>{_escaped(section.title)}</h2>{hint}{body}</section>" if body else ""


def _html_body(section: Section) -> str:
    body: str = section.picture
    facts = [f"<dt>{_escaped(name)}</dt><dd>{_escaped(told)}</dd>" for name, told in section.facts]
    if facts:
        body += f"<dl>{''.join(facts)}</dl>"
    if section.rows:
        body += _html_table(section)
    for number, part in enumerate(section.parts, 1):
        title, inner = _escaped(part.title), _html_body(part)
        body += (f"<details><summary>{title}</summary>{inner}</details>" if inner
                 else f"<p>{number}. {title}</p>")
    lines = [f"<li>{_escaped(line)}</li>" for line in section.lines]
    return body + f"<ul>{''.join(lines)}</ul>" * bool(lines)


def _html_table(section: Section) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        shown = [f"<{tag}{' class=n' * (head[:1] == '>')}>{_escaped(cell)}</{tag}>"
                 for head, cell in zip(section.heads, cells)]
        return f"<tr>{''.join(shown)}</tr>"

    names = line([head.lstrip(_SIGNS) for head in section.heads], "th")
    rows = "".join(line(row, "td") for row in section.rows)
    return f'<div class="scroll"><table>{names}{rows}</table></div>'


def _chart(columns: Dict[str, Dict[str, float]], unit: str, show: Callable[[float], str]) -> str:
    """Stacked columns that stretch to their place: by what each is, its amounts by kind."""
    most = max((sum(parts.values()) for parts in columns.values()), default=0)
    if not most:
        return ""
    drawn = []
    for at, (name, parts) in enumerate(columns.items()):
        top, rects, said = 100.0, "", []
        for kind in filter(parts.get, _KINDS):
            size = parts[kind] * 100 / most
            top -= size
            rects += (f'<rect class="{kind}" x="{at * 10 + 1}" y="{top:.2f}" width="8" '
                      f'height="{size:.2f}"/>')
            said.append(f"{show(parts[kind])} {_KINDS[kind].lower()}")
        drawn.append(f"<g><title>{_escaped(f'{name}: ' + ', '.join(said))}</title>{rects}</g>")
    used = [kind for kind in _KINDS if any(parts.get(kind) for parts in columns.values())]
    keys = "".join(f'<span><b class="{kind}">&#9632;</b> {_KINDS[kind]}</span>' for kind in used)
    first, *_, last = [*columns, *columns]
    ends = "".join(f"<span>{_escaped(name)}</span>" for name in dict.fromkeys([first, last]))
    return (f"<figure><figcaption>up to {show(most)} {unit}</figcaption>"
            f'<svg role="img" aria-label="{_escaped(unit)}" preserveAspectRatio="none" height="99" '
            f'viewBox="0 0 {max(60, len(columns) * 10)} 100">{"".join(drawn)}</svg>'
            f"<figcaption>{ends}</figcaption><figcaption>{keys}</figcaption></figure>")


def _timeline(session: Session, charged: Dict[str, int]) -> str:
    """The context call by call: what was sent again, what is new, what had to be written again and
    what was wasted. A column is a model call, or several where they are many."""
    calls = sum(event.event_type is EventType.AI_RESPONSE for event in session.events)
    size = -(-calls // MOST_COLUMNS) or 1
    columns: Dict[str, Dict[str, float]] = {}
    done = 0
    for event in session.events:
        at = min(done, max(calls - 1, 0)) // size * size + 1
        parts = columns.setdefault(f"call {at}", dict.fromkeys(_KINDS, 0))
        wasted = min(charged.get(event.id, 0), event.tokens_input)
        entered = "again" if event.data.get("source") == Source.REBUILD else "first"
        parts[entered] += event.tokens_input - wasted
        parts["wasted"] += wasted
        parts["output"] += event.tokens_output
        parts["carried"] += event.tokens_cache_read
        done += event.event_type is EventType.AI_RESPONSE
    return _chart(columns, f"tokens per {size} calls" if size > 1 else "tokens per call",
                  short_number)


def _by_day(rows: Rows) -> Section:
    """Dollars by day and how they were paid, as a picture of the last MOST_COLUMNS days."""
    from datetime import date
    paid = {day: _paid(group) for day, group in _groups(rows, "day").items() if day != "unknown"}
    days = [date.fromisoformat(day).toordinal() for day in paid] or [date.today().toordinal()]
    first = max(min(days), max(days) - MOST_COLUMNS + 1)
    shown = [str(date.fromordinal(day)) for day in range(first, max(days) + 1)]
    earlier = sum(day < first for day in days)
    hint = f"{shown[0]} to {shown[-1]}"
    hint += f", and {counted(earlier, 'day')} with sessions before" * bool(earlier)
    return Section("By day", hint=hint, picture=_chart(
        {day: paid.get(day, {}) for day in shown}, "per day", dollars))


def html_report(session: Session, report: OptimizationReport) -> str:
    """The report as one HTML file that needs nothing else: what the text says, with the session's
    course as a picture and the events of every finding."""
    picture = _timeline(session, ClaimsLedger(Analysis(session), report.issues).by_event)
    return _page(session.task or session.id, "Session report", _session_sections(
        session, report, Section("From start to end", picture=picture), evidence=True))


def html_scan_report(result: Data, most: int = 12) -> str:
    """What a scan found as one HTML file: what the text says, with the dollars of every day."""
    return _page(counted(len(result["sessions"]), "session"), "Scan of agent transcripts",
                 _scan_sections(result, most, ("agent", "project", "model"),
                                _by_day(result["sessions"])))


_CSV_COLUMNS = """id timestamp event_type agent_id model tokens_input tokens_output
    tokens_cache_write tokens_cache_read duration_ms charged_tokens file_path query command tool
    line""".split()


def csv_report(session: Session, report: OptimizationReport) -> str:
    """The session's events for a spreadsheet, one per line; ``charged_tokens`` is what the report
    calls wasted of each. No text in it can be taken for a formula."""
    import csv
    import io
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    charged = ClaimsLedger(Analysis(session), report.issues).by_event
    for event in session.events:
        data = event.data
        known = dict(data, **event._fields())
        known.update(file_path=(_paths_of(data) or [""])[0], command=_command_of(data),
                     query=data.get("query") or data.get("pattern") or "",
                     event_type=event.event_type.value, model=event.model or session.model,
                     charged_tokens=charged.get(event.id, 0))
        writer.writerow([_cell(known.get(name, "")) for name in _CSV_COLUMNS])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A value for a spreadsheet: numbers as they are, texts without control characters, none of
    them a formula."""
    if isinstance(value, (int, float)):
        return value
    text = plain(value, 32_000)
    return "'" + text if text[:1] in {*"=+-@＝＋－＠"} else text


FORMATS = {"json": json_report, "markdown": markdown_report, "text": text_report,
           "html": html_report, "csv": csv_report}


# -- alerts

AlertRule = namedtuple("AlertRule", "name kind figure level threshold unit action cause")
AlertRule.__doc__ = """When a session deserves a look: the threshold's name, what the alert is
called, the figure of a ``summaries()`` row, how urgent, the limit and its unit, what to do, and the
cause, of which a session alerts once."""

ALERT_RULES = (
    AlertRule("efficiency", "LOW_EFFICIENCY", "efficiency_score", Severity.HIGH, 70, "%",
              "See analyze --evidence", "waste"),
    AlertRule("waste", "HIGH_WASTE", "waste_tokens", Severity.MEDIUM, 5_000, "tokens",
              "Follow its first advice", "waste"),
    AlertRule("minutes", "LONG_SESSION", "minutes", Severity.MEDIUM, 60, "minutes",
              "Start a new session", "length"),
    AlertRule("error_rate", "HIGH_ERROR_RATE", "error_rate", Severity.HIGH, 30, "% of events",
              "Read its first errors", "errors"))
LEAST_DOLLARS = 0.01  # of waste that a session alerts from


def alerts_of(row: Data, limits: Dict[str, float]) -> Iterator[Data]:
    """The alerts of one ``summaries()`` row, the first of each cause. An efficiency alerts below
    its limit, everything else above; less wasted dollars than the limit ``dollars`` never alert.
    ``{"id", "level", "kind", "session_id", "agent", "cost" (USD wasted), "message", "action",
    "value", "threshold", "time"}``."""
    causes: Dict[str, Data] = {}
    for rule in ALERT_RULES if row["waste_cost"] >= limits["dollars"] else ():
        value, limit = row[rule.figure], limits[rule.name]
        low = rule.name == "efficiency"
        if not (value < limit if low else value > limit):
            continue
        name = rule.kind.lower().replace("_", " ").capitalize()
        shown = (f"{value:,.1f}{rule.unit}" if rule.unit[0] == "%"
                 else counted(round(value), rule.unit[:-1]))
        causes.setdefault(rule.cause, {
            "id": f"{row['id']}:{rule.kind}", "level": rule.level.value, "kind": rule.kind,
            "session_id": row["id"], "agent": row["agent"], "cost": row["waste_cost"],
            "message": f"{name}: {shown} ({'below' if low else 'above'} {limit:g})",
            "action": rule.action, "value": value, "threshold": limit, "time": row["last_at"]})
    return iter(causes.values())


def alert_limits(thresholds: Optional[Dict[str, float]] = None) -> Dict[str, float]:
    """The limits of ALERT_RULES by name and that of ``dollars``, with ``thresholds`` in their
    place; InvalidValue for an unknown name or a value that is not a number >= 0."""
    limits = dict({rule.name: rule.threshold for rule in ALERT_RULES}, dollars=LEAST_DOLLARS)
    for name, value in (thresholds or {}).items():
        if name not in limits or value.__class__ not in (int, float) or not value >= 0:
            raise InvalidValue(f"threshold {name!r} is {value!r}: give a number >= 0 for one of "
                               f"{', '.join(limits)}")
        limits[name] = value
    return limits


def budget_alerts(budget: Data) -> Rows:
    """The alert of a budget that the pace leads beyond."""
    if budget["pace"] <= budget["budget"]:
        return []
    return [{"id": f"BUDGET:{budget['per']}:{budget['since'][:10]}", "level": Severity.HIGH.value,
             "kind": "BUDGET", "session_id": "", "agent": "", "cost": budget["spent"],
             "message": f"Budget: the pace leads to {dollars(budget['pace'])} this {budget['per']} "
                        f"(above {dollars(budget['budget'])})", "action": "See advice",
             "value": budget["pace"], "threshold": budget["budget"], "time": now_text()}]


def alert_section(alerts: Rows, most: int) -> Section:
    """The alerts as a table, the most dollars first."""
    rows = [dict(alert, what=alert["message"].split(" (")[0])
            for alert in with_short_ids(alerts, "session_id")[:most]]
    return table("Alerts", {">wasted $": "cost:$", "~id": "session_id", "level": "level",
                            "what": "what", "-?what to do": "action"}, rows,
                 lines=_more(len(alerts), most, f"--limit {len(alerts)} shows them")
                 if alerts else ["No alerts."])


# -- sessions over time

def statistics_of(rows: Rows) -> Data:
    """Sums and averages over ``summaries()`` rows (at least one), oldest first."""
    totals, scores = scan_totals(rows), [row["efficiency_score"] for row in rows]
    waste, counts = totals["waste"], Counter()  # type: Data, Any
    for row in rows:
        counts.update(row["issues"])
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return {"sessions_analyzed": len(rows), "total_tokens": totals["total_tokens"],
            "total_cost": totals["estimated_cost"], "average_efficiency": sum(scores) / len(rows),
            "efficiency_score": totals["efficiency_score"],
            "total_waste_tokens": waste["tokens"], "total_waste_cost": waste["cost"],
            "measured_waste_tokens": waste["measured_tokens"],
            "measured_waste_cost": waste["measured_cost"],
            "common_issues": [{"type": kind, "count": count} for kind, count in frequent],
            "trends": _trend(scores)}


def statistics_sections(stats: Data, rows: Rows) -> List[Section]:
    """What ``stats`` prints of ``agent_statistics`` and the rows it is about."""
    trend, change = stats["trends"]["trend"], stats["trends"]["change_percent"]
    told = ("Trend", f"{trend.replace('_', ' ')}{f' ({change:+.1f} points)' * (len(rows) > 1)}")
    return [Section(f"{stats['agent'] or 'All agents'}, last "
                    + counted(stats["period_days"], "day", "g"),
                    [*headline(scan_totals(rows), rows), told]),
            *bill_sections(stats["bill"]), advice_section(stats["advice"], 1),
            table("Most frequent findings", {"": "type", ">findings": "count:,"},
                  stats["common_issues"]),
            *(group_section(groups, name) for name, groups in stats["groups"].items()),
            *(split_sections(stats["split"]) if "split" in stats else ())]


ENOUGH_SESSIONS = 8  # on each side of a split


def split_at(rows: Rows, moment: float) -> Data:
    """``{"before", "after"}`` (measures of the sessions begun before a time and since), and the
    ``change`` of the dollars a session with its 95% ``interval`` from 2,000 resamples, None below
    ENOUGH_SESSIONS a side."""
    from random import Random
    sides = [[row for row in rows if (row["started"] >= moment) is late] for late in (False, True)]
    before, after = map(measures, sides)
    split: Data = {"before": before, "after": after, "change": None, "interval": None}
    if min(map(len, sides)) >= ENOUGH_SESSIONS:
        chance, changes = Random(1), []
        costs = [[row["estimated_cost"] for row in side] for side in sides]
        for _ in range(2_000):
            old, new = (sum(chance.choices(side, k=len(side))) / len(side) for side in costs)
            changes.append(new - old)
        changes.sort()
        split["change"] = after["cost_per_session"] - before["cost_per_session"]
        split["interval"] = [changes[50], changes[-51]]
    return split


def split_sections(split: Data) -> List[Section]:
    """What ``stats --split`` prints."""
    told = f"not enough sessions to compare: {ENOUGH_SESSIONS} on each side are needed"
    if split["change"] is not None:
        low, high = split["interval"]
        sure = "surely" if low > 0 or high < 0 else "perhaps"
        word = "more" if split["change"] > 0 else "less"
        told = (f"a session costs {dollars(abs(split['change']))} {word}, {sure}: the change is "
                f"between {low:+.2f} and {high:+.2f} USD (95%)")
    sides = group_section([dict(split[side], key=side) for side in ("before", "after")], "side")
    return [sides._replace(title="Before and after", lines=[told])]


def budget_of(rows: Rows, amount: float, unit: str) -> Data:
    """What was spent of a budget (USD a ``day``, ``week`` or ``month``) since that began, and where
    the straight pace leads: ``{"budget", "per", "since", "spent", "pace"}``."""
    from datetime import datetime, timedelta
    now = datetime.now()
    today = datetime(*now.timetuple()[:3])
    month, monday = today.replace(day=1), today - timedelta(today.weekday())
    begin, end = (day.astimezone() for day in {  # each at its own offset
        "day": (today, today + timedelta(1)), "week": (monday, monday + timedelta(7)),
        "month": (month, (month + timedelta(32)).replace(day=1))}[unit])
    since = begin.isoformat()
    spent = sum(part["estimated_cost"] for row in rows for part in day_parts(row)
                if part["day"] >= since[:10])
    return {"budget": amount, "per": unit, "since": since, "spent": spent,
            "pace": spent * ((end - begin) / (now.astimezone() - begin))}


def budget_section(budget: Data) -> Section:
    """What ``--budget`` prints."""
    over = " (above it)" if budget["pace"] > budget["budget"] else ""
    return Section("Budget", [
        ("Spent", f"{dollars(budget['spent'])} of {dollars(budget['budget'])} since "
                  f"{budget['since'][:10]}"),
        ("Pace", f"leads to {dollars(budget['pace'])} this {budget['per']}{over}")])


def _trend(scores: List[float]) -> Data:
    """The second half in time against the first, in points of efficiency; stable within 5."""
    middle = len(scores) // 2
    halves = [sum(half) / (len(half) or 1) for half in (scores[:middle], scores[middle:])]
    first, second = halves if middle else (0.0, 0.0)
    change, trend = second - first, "stable" if middle else "insufficient_data"
    if abs(change) > 5:
        trend = "improving" if change > 0 else "declining"
    return {"trend": trend, "change_percent": round(change, 1),
            "first_period_avg": round(first, 1), "second_period_avg": round(second, 1)}


def comparison_of(found: List[Tuple[Session, OptimizationReport]]) -> Data:
    """Sessions (at least two) side by side: what `SessionOptimizer.compare_sessions` returns."""
    rows = [dict(summary_row(session, report), task=session.task[:80])
            for session, report in found]
    ranked = sorted(found, key=lambda pair: -pair[1].efficiency_score)
    return {"sessions": rows, "averages": {
                name: sum(row[key] for row in rows) / len(rows) for name, key in (
                    ("tokens", "total_tokens"), ("cost", "cost"),
                    ("efficiency", "efficiency_score"), ("issues", "issue_count"))},
            "best_performer": ranked[0][0].id, "worst_performer": ranked[-1][0].id,
            "recommendations": _lessons(*ranked[0], *ranked[-1])}


def comparison_sections(result: Data) -> List[Section]:
    """What ``compare`` prints."""
    rows, mean = result["sessions"], result["averages"]
    average = {"id": "average", "task": "", "total_tokens": mean["tokens"],
               "estimated_cost": mean["cost"], "efficiency_score": mean["efficiency"],
               "issue_count": round(mean["issues"], 1),
               "waste_cost": sum(row["waste_cost"] for row in rows) / len(rows)}
    return [table("Comparison", {
                "~id": "id", ">tokens": "total_tokens:,.0f", ">session $": "estimated_cost:$",
                ">wasted $": "waste_cost:$", ">score": "efficiency_score:.1f",
                ">?issues": "issue_count:,", "-?task": "task"}, [*with_short_ids(rows), average]),
            Section("Best and worst", [("Best", result["best_performer"]),
                                       ("Worst", result["worst_performer"])]),
            Section("What the best did without", lines=result["recommendations"])]


def _lessons(best: Session, good: OptimizationReport, worst: Session,
             bad: OptimizationReport) -> List[str]:
    """What the better session did without, from the issues of both."""
    lessons = []
    kinds = {issue.issue_type for issue in bad.issues} - {issue.issue_type for issue in good.issues}
    for kind in kinds:
        issues = [issue for issue in bad.issues if issue.issue_type is kind]
        tokens = sum(issue.charged_tokens for issue in issues)
        lessons.append((-tokens, f"{best.id} had no {kind.value}, {worst.id} had {len(issues)} "
                                 f"({counted(tokens, 'token')}): {issues[0].suggestion}"))
    return [lesson for _, lesson in sorted(lessons)]


# ==================================================================================================
# Store
# ==================================================================================================

# One JSON document per session, laid out so that an append touches only its end:
#
#     {"id":...,"agent":...,"metadata":{...},"events": [           header
#     {"id":... }                                                  one event per line
#     ,{"id":... }
#     ], "status":"ACTIVE",...,"event_count":2,...,"layout":2}     footer
#
# An append writes ``,event + footer`` over the old footer. Only at the end of an event does a space
# stand before ``}``: one cut short by a crash cannot pass for whole where a brace of the old footer
# closes it.

_ID = _Pattern(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\Z")
_DEVICE = _Pattern(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?\Z", re.IGNORECASE)  # of Windows
_ID_LENGTH = 200  # characters
_SLUG_LENGTH = 100  # characters: leaves room for a date and a counter in an id

_HEADER_END = b'"events": ['
_FOOTER_START = b"\n], "
_FOOTER_END = b'"layout":2}\n'
_FOOTER_SIZE = 1024  # bytes read from the end of a file; a footer is shorter
_START, _LONG_PEEK = 1024, 1 << 16  # bytes that hold most headers, nearly all
_LINES = 1000  # events written at a time
_BLOCK = 1 << 20  # bytes of events read at a time
_TEMPORARY = ".tmp"  # the ending of files being written
_LEFT_BEHIND = 3600.0  # seconds after which such a file is nobody's
_REPORT = "_report.json"
_MASKED = "masked-1"  # this file says that all of the store was written with today's rules
_NAMES = "id timestamp event_type agent_id response_id batch_id".split()  # never masked
_COPY = _Pattern(r"\.json\.damaged-[0-9]+\Z")
_FINGERPRINT = 256  # bytes before the footer: they tell a file that took over an inode number

_TOTALS = {"total_tokens_input": "tokens_input", "total_tokens_output": "tokens_output",
           "total_duration_ms": "duration_ms"}
_STATE = ("status", "ended_at")
_NUMERIC = (int, float)
# The types of what a footer must have, and of what a session may.
_FOOTER: Data = {"status": (str,), "ended_at": (str,), "event_count": (int,),
                 **dict.fromkeys(_TOTALS, _NUMERIC)}
_FIELDS: Data = {**_FOOTER, "lost_events": (int,), "metadata": (dict,), "events": (list,),
                 **dict.fromkeys("id agent task started_at model".split(), (str,))}
_FOOTER_KEYS = (*_FOOTER, "lost_events")

_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | _SAFE  # O_NONBLOCK: opening a named pipe must not wait for its writer
_CHANGE = os.O_RDWR | _SAFE
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE

_ELSEWHERE = "choose another directory with --store or SESSIONOPTIMIZER_HOME"
_YOURS = f"make it yours (chown, chmod u+rwX) or {_ELSEWHERE}"
_FULL = "make room and repeat; what was stored before is intact"
_LINKED = ("a symbolic link, which the store does not follow", "replace it by what it points to")
_REASONS = {
    errno.ENOTDIR: ("part of this path is a file, not a directory", _ELSEWHERE),
    errno.EEXIST: ("a file, not a directory", _ELSEWHERE),
    errno.EISDIR: ("a directory where a file should be", "move it out of the store"),
    errno.ELOOP: _LINKED,
    errno.EACCES: ("no permission", _YOURS),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EFBIG: ("the size limit of files is reached (ulimit -f)", _FULL),
    errno.ENOSPC: ("the disk is full", _FULL),
}


def check_id(session_id: str) -> str:
    """The id itself; InvalidSessionId when it could not safely name a file on every system."""
    if isinstance(session_id, str) and _ID.match(session_id) and not _DEVICE.match(session_id):
        return session_id
    raise InvalidSessionId(
        f"invalid session id {ascii(session_id)[:60]}: use 1 to {_ID_LENGTH} of the characters "
        "A-Z a-z 0-9 . _ -, no dot in front, and no device name of Windows (CON, NUL, COM1, ...)")


def slug(text: str) -> str:
    """``text`` as a part of an id: 1 to 100 characters, each one an id may not hold replaced by
    '-'."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", str(text))[:_SLUG_LENGTH]
    # A leading '-' would read as an option on a command line.
    odd = name[:1] in ("", ".", "-") or _DEVICE.match(name)
    return "_" + name[1 - _SLUG_LENGTH:] if odd else name


def _stem(path: str) -> str:
    return os.path.basename(path)[:-len(".json")]


def _damaged(path: str, reason: str) -> DamagedSession:
    return DamagedSession(path, f"not a readable session ({reason})",
                          "restore it from a backup or delete it")


@contextmanager
def _naming(path: str) -> Any:
    """An OSError inside becomes a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        unknown = (error.strerror or str(error), "check the path and the disk")
        reason, remedy = _REASONS.get(error.errno or 0, unknown)
        one = DamagedSession if error.errno in (errno.ELOOP, errno.EISDIR) else StorageError
        raise one(path, reason, remedy) from error


# -- from dicts to bytes and back

def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if value - value == 0 else _reject(digits)


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_reject, parse_float=_finite)
# What _ENCODER makes anew at every call: a tenth of the time of logging an event. It detects no
# circles: they are nested too deeply.
_make_chunks = getattr(json.encoder, "c_make_encoder", None)
_chunks = _make_chunks and _make_chunks(
    None, _ENCODER.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False,
    False)


def _encode(value: Any) -> str:
    """Compact ASCII JSON. TypeError or ValueError: the value has no JSON form."""
    try:
        return "".join(_chunks(value, 0)) if _chunks else _ENCODER.encode(value)
    except RecursionError:
        raise ValueError("nested too deeply to be stored") from None


def _decoded(text: bytes) -> Any:
    """What the JSON says, None when it is none."""
    try:
        return _DECODER.decode(text.decode())
    except (ValueError, RecursionError):
        return None


def _encode_event(event: Data) -> str:
    return _encode(event)[:-1] + " }"


def _encode_footer(footer: Data, room: int = 0) -> bytes:
    """The footer line, padded to ``room`` bytes: a shorter one would leave remains of the old one
    behind."""
    told = {key: footer[key] for key in _FOOTER_KEYS if footer.get(key) or key in _FOOTER}
    text = f"], {_encode(told)[1:-1]},"
    if len(text) + len(_FOOTER_END) >= _FOOTER_SIZE:
        raise ValueError("status, end and totals of a session must fit in 1 KB")
    return text.ljust(room - len(_FOOTER_END)).encode() + _FOOTER_END


def _parse_footer(tail: bytes) -> Any:
    """(footer, offset of its line in ``tail``), or (None, 0) when the file does not end with a
    whole footer."""
    start = tail.rfind(_FOOTER_START) + 1
    footer = start and tail.endswith(_FOOTER_END) and _decoded(b"{" + tail[start + 3:])
    return (footer, start) if footer and _has_footer(footer) else (None, 0)


def _has_footer(doc: Data) -> bool:
    return all(type(doc.get(key)) in kinds for key, kinds in _FOOTER.items())


def _count(footer: Data, event: Data) -> None:
    footer["event_count"] += 1
    for total, key in _TOTALS.items():
        value = event.get(key, 0)
        if value and type(value) in _NUMERIC:
            footer[total] += value


def _ended(event: Data) -> Data:
    """What a SESSION_END tells of the footer."""
    data = event.get("data")
    status = data.get("status") if isinstance(data, dict) else None
    status = status if isinstance(status, str) else "COMPLETED"
    return {"status": status, "ended_at": str(event.get("timestamp") or "")}


def _first_part(header: Data) -> bytes:
    return f'{_encode(header)[:-1]},"events": [\n'.encode()


def _lay_out(doc: Data) -> Iterator[bytes]:
    """The parts of a session's file. What the document lacks of the footer comes from its
    events."""
    yield _first_part({key: value for key, value in doc.items()
                       if key not in ("events", "layout", *_FOOTER_KEYS)})
    footer: Data = dict.fromkeys(_FOOTER_KEYS, 0)
    footer.update(status="ACTIVE", ended_at="")
    lines: List[str] = []
    for event in doc["events"]:
        lines.append(("," if footer["event_count"] else "") + _encode_event(event) + "\n")
        _count(footer, event)
        if event.get("event_type") == "SESSION_END":
            footer.update(_ended(event))
        if len(lines) == _LINES:
            yield "".join(lines).encode()
            lines = []
    yield "".join(lines).encode()
    # Without events the totals are kept: a session may be known by its totals alone.
    kept = _STATE if footer["event_count"] else (*_STATE, *_TOTALS)
    footer.update((key, doc[key]) for key in (*kept, "lost_events") if key in doc)
    footer["event_count"] += footer["lost_events"]
    yield _encode_footer(footer)


def _fault(doc: Any) -> str:
    """What keeps a parsed document from being a session ("" when it is one)."""
    if type(doc) is not dict:
        return f"a JSON {type(doc).__name__} instead of an object"
    for key, kinds in _FIELDS.items():
        value = doc.get(key)
        if value is None and key != "events":
            doc.pop(key, None)
        elif type(value) not in kinds:
            return f"{key} is a {type(value).__name__}"
    return "" if doc.get("id") else "no id"


def _adds_up(doc: Data) -> bool:
    return bool(doc["event_count"] == len(doc["events"]) + doc.get("lost_events", 0))


def _parse(data: bytes, path: str) -> Any:
    """A whole session from the bytes of its file; DamagedSession when they are not one."""
    try:
        doc = _DECODER.decode(data.decode("utf-8-sig"))
        fault = _fault(doc)
    except ValueError as error:
        fault = f"{error}" if data.strip() else "empty"
    except RecursionError:
        fault = "nested too deeply"
    if not fault and any(type(event) is not dict for event in doc["events"]):
        fault = "an event is not an object"
    if not fault and data.endswith(_FOOTER_END) and not (_has_footer(doc) and _adds_up(doc)):
        fault = "the footer does not fit the events"
    if fault:
        raise _damaged(path, fault)
    doc.setdefault("event_count", len(doc["events"]))
    return doc


def _header_of(first: bytes) -> Any:
    """The header at the start of a session's file, None where it is not there."""
    end = max(first.find(b"\n"), 0)
    return _decoded(first[:end] + b"]}") if first.endswith(_HEADER_END, 0, end) else None


# -- repair

def _parse_event(line: bytes) -> Any:
    """The event at the start of a line, or None when there is no whole one."""
    text = line[line.find(b"{", 0, 2):].decode("utf-8", "replace")
    try:
        event, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    whole = type(event) is dict and text.endswith(" }", 0, end) and "\ufffd" not in text[:end]
    return event if whole else None


def _salvage(data: bytes, path: str) -> Any:
    """(document, numbers of damaged lines, bytes dropped at the end) from a file that does not
    parse.

    DamagedSession when it was not written line by line or no line tells whose session it is."""
    lines = data.split(b"\n")[1:]
    footer = _parse_footer(data[-_FOOTER_SIZE:])[0]
    while lines and (not lines[-1] or footer and lines[-1].startswith(b"], ")):
        lines.pop()
    found = [_parse_event(line) for line in lines]
    damaged = [number for number, event in enumerate(found, 2) if event is None]
    dropped = len(lines[damaged.pop() - 2]) if found and found[-1] is None and not footer else 0
    events, lost, state = [event for event in found if event is not None], len(damaged), {}
    if footer:
        lost = max(lost, footer["event_count"] - len(events))
        state = {key: footer[key] for key in _STATE}
    header = _header_of(data)
    if header is None or _fault(header):
        header = _derive_header(events, path)
        damaged.insert(0, 1)
    return {**header, **state, "events": events, "lost_events": lost}, damaged, dropped


def _derive_header(events: List[Any], path: str) -> Data:
    start = next((event for event in events if isinstance(event.get("event_type"), str)), None)
    if start is None:
        raise _damaged(path, "neither a header nor events")
    told = start.get("data")
    told = told if isinstance(told, dict) else {}
    return {"id": _stem(path), "metadata": {}, "started_at": str(start.get("timestamp")),
            **{key: str(told.get(key) or "") for key in ("agent", "task", "model")}}


def _restore(data: bytes, path: str) -> Any:
    """(document, what was repaired or "", whether lines were lost); DamagedSession when it is
    hopeless."""
    try:
        return _parse(data, path), "", False
    except DamagedSession as error:
        try:
            doc, damaged, dropped = _salvage(data, path)
        except DamagedSession:
            raise error from None  # the first reason says what is wrong with the file
    name = _printable(path)
    remark = f"{name}: repaired: kept {len(doc['events'])} events"
    if dropped:
        remark += f"; dropped {dropped} bytes of an unfinished write"
    if damaged:
        places = ", ".join(f"{name}:{number}" for number in damaged[:5])
        remark += f"; {len(damaged)} damaged lines (the first: {places})"
    return doc, remark, bool(damaged)


# -- files

def _read(fd: int, start: int, end: int) -> bytes:
    os.lseek(fd, start, os.SEEK_SET)
    data = b""
    while start + len(data) < end:  # one call reads 2 GB at most
        more = os.read(fd, end - start - len(data))
        if not more:
            break
        data += more
    return data


def _write(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def _lock(fd: int, exclusive: bool) -> None:
    if fcntl:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    else:
        import msvcrt
        os.lseek(fd, 1 << 30, os.SEEK_SET)  # past the data: what msvcrt locks nobody else can read
        msvcrt.locking(fd, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]


def _unlock(fd: int) -> None:
    if fcntl:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _release(fd: int) -> None:
    _unlock(fd)  # closing alone would leave the lock to a child forked meanwhile, which shares it
    os.close(fd)


def _open_locked(path: str, exclusive: bool) -> Any:
    """(descriptor, stat) of a session file; the caller releases it."""
    while True:
        fd = os.open(path, _CHANGE if exclusive else _READ)
        try:
            _lock(fd, exclusive)
            info, named = os.fstat(fd), os.lstat(path)
            if not stat.S_ISREG(info.st_mode):
                raise _damaged(path, "not a regular file")
            # Another process may have replaced the file meanwhile: then the lock is a dead one.
            if os.path.samestat(info, named):
                return fd, info
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextmanager
def _locked(path: str, *, exclusive: bool) -> Any:
    """A session file that is open and locked: (descriptor, stat). SessionNotFound when it is not
    there; an OSError inside becomes a StorageError."""
    with _naming(path):
        try:
            fd, info = _open_locked(path, exclusive)
        except FileNotFoundError:
            root = _printable(os.path.dirname(os.path.dirname(path)))
            raise SessionNotFound(f"no session {_printable(_stem(path))} in {root}; `list` shows "
                                  "what is there") from None
        try:
            yield fd, info
        finally:
            _release(fd)


def _make_folder(path: str) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)


@contextmanager
def _temporary(path: str, parts: Iterable[bytes], sync: bool) -> Any:
    """The name of a new file beside ``path`` that holds the ``parts``; gone behind it, unless it
    got another name."""
    folder = os.path.dirname(path)
    temp = os.path.join(folder, f".{os.urandom(8).hex()}{_TEMPORARY}")
    with _naming(path):
        _make_folder(os.path.dirname(folder))
        _make_folder(folder)
        fd = os.open(temp, _CREATE, 0o600)
        try:
            try:
                for part in parts:
                    _write(fd, part)
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            yield temp
        finally:
            _remove(temp)


def _replace(path: str, parts: Iterable[bytes], *, sync: bool) -> None:
    """Give ``path`` new content in one step; a session must be locked meanwhile."""
    with _temporary(path, parts, sync) as temp:
        os.replace(temp, path)


def _change_text(path: str, edit: Callable[[str], str]) -> None:
    """Give a file of the user's, or a new one, other content in one step; its mode stays, and where
    possible its owner. ValueError when it is no text, or changes meanwhile."""
    os.stat(os.path.dirname(path))  # it must be there
    info = os.stat(path) if os.path.exists(path) else None
    old, mask = read_regular(path) if info else b"", os.umask(0o077)
    os.umask(mask)
    if info:
        os.close(os.open(path, os.O_WRONLY))  # one that is read-only stays as it is
    with _temporary(path, [edit(old.decode()).encode()], True) as temp:
        with suppress(OSError, AttributeError):
            os.chown(temp, info.st_uid, info.st_gid)  # type: ignore[union-attr]
        os.chmod(temp, stat.S_IMODE(info.st_mode) if info else 0o666 & ~mask)
        if (read_regular(path) if os.path.exists(path) else b"") != old:
            raise ValueError("it has just been changed: try again")
        os.replace(temp, path)


def _publish(temp: str, path: str) -> bool:
    """Give a new file the name ``path`` in one step; False when the name is taken."""
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name, then fill it
        if os.path.lexists(path):
            return False
        os.close(os.open(path, _CREATE, 0o600))
        os.replace(temp, path)
    return True


def _remove(path: str) -> bool:
    """Whether there was such a file to remove."""
    with suppress(FileNotFoundError):
        os.unlink(path)
        return True
    return False


def _sync_folder(path: str) -> None:
    """Force the names in the folder of ``path`` to the disk."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _share_texts(parts: Iterable[Data], known: Data) -> None:
    """Hold texts that come again, as the names of tools and responses do, in memory once."""
    for part in parts:
        for name, value in part.items():
            if value.__class__ is str:
                part[name] = known.setdefault(value, value)
            elif value.__class__ is dict:
                _share_texts((value,), known)


def _stream(fd: int, info: os.stat_result, make: Any, start: int) -> Any:
    """(events, footer, mark for `Store.tail`) of what stands from ``start`` on in a locked session,
    which is unlocked while its events are read, a megabyte at a time, each handed through ``make``.
    None when it is not in the present layout."""
    tail_at = max(start - 1, info.st_size - _FOOTER_SIZE)
    footer, cut = _parse_footer(_read(fd, tail_at, info.st_size))
    if not footer:
        return None
    _unlock(fd)  # what stands before the footer does not change any more
    events: List[Any] = []
    end, rest, block = tail_at + cut, b"", _BLOCK
    while start < end:
        more = _read(fd, start, min(start + block, end))
        start += len(more)
        rest += more
        cut = len(rest) if start == end else rest.rfind(b"\n,") + 1
        found = _decoded(b"[%s]" % rest[:cut].lstrip(b","))
        if not more or found is None or any(type(event) is not dict for event in found):
            return None
        _share_texts(found, {})
        events.extend(map(make, found))
        rest, block = rest[cut:], _BLOCK if cut else 2 * block  # for a longer line
    before = _read(fd, max(end - _FINGERPRINT, 0), end)
    return events, footer, _mark(info, before, end, footer["event_count"])


class Store:
    """Session files under ``root``, safe against parallel writers, crashes and damaged files.

    Nothing is created before the first write. ``warnings`` tells what was repaired (and ``warn`` is
    called with each). With ``durable`` every event is forced to the disk before it is acknowledged.
    No file stays open between calls, so threads and forked processes may share a Store."""

    def __init__(self, root: str, *, warn: Any = None,
                 durable: bool = False):
        self.root = os.path.abspath(os.fspath(root))
        self.sessions = os.path.join(self.root, "sessions")
        self.reports = os.path.join(self.root, "reports")
        self.folders = self.root, self.sessions, self.reports
        self.durable = durable
        self.warnings: List[str] = []
        self.state = State(self.root, self._report)
        self._warn = warn
        self._checked = self._swept = self._masked = False

    def prepare(self) -> None:
        """Create the directories of the store; StorageError where that is not possible."""
        for folder in self.folders:
            with _naming(folder):
                _make_folder(folder)

    def needs_masking(self) -> bool:
        """Whether there are sessions of an older version, which masked less."""
        if not self._masked:
            self._masked = os.path.exists(os.path.join(self.root, _MASKED))
        return not self._masked and any(True for _ in self.files())

    def mark_masked(self) -> None:
        """Say that all of the store was written with today's rules."""
        _replace(os.path.join(self.root, _MASKED), (), sync=False)
        self._masked = True

    def files(self) -> Iterator[Tuple[str, os.stat_result]]:
        """Yield (id, stat) of every session file, without opening any."""
        for entry in self._entries(self.sessions):
            if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    yield _stem(entry.name), entry.stat(follow_symlinks=False)

    @staticmethod
    def _entries(folder: str) -> Any:
        with _naming(folder):
            try:
                entries = os.scandir(folder)
            except FileNotFoundError:
                return
            with entries:
                yield from entries

    def find(self, session_id: str) -> str:
        """Path of a session's file, there or not. InvalidSessionId for an id that breaks the rule,
        unless an older store holds exactly this name."""
        self._check_folders()
        path = f"{self.sessions}{os.sep}{session_id}.json"
        try:
            check_id(session_id)
        except InvalidSessionId:
            # A name that comes out of the directory cannot lead out of it.
            if path not in [entry.path for entry in self._entries(self.sessions)]:
                raise
        return path

    def _check_folders(self) -> None:
        """Refuse linked folders; nobody else may write into the store."""
        if self._checked:
            return
        for folder in self.folders:
            if folder != self.root and os.path.islink(folder):
                raise StorageError(folder, *_LINKED)
            mode = os.stat(folder).st_mode if os.name == "posix" and os.path.isdir(folder) else 0
            if not mode & 0o022 or mode & stat.S_ISVTX:
                continue
            with suppress(OSError):
                if folder != self.root:  # which may be shared on purpose
                    os.chmod(folder, stat.S_IMODE(mode) & ~0o022)
                    continue
            self._report(f"others can write into {_printable(folder)}: chmod go-w it, or use "
                         "another store")
        self._checked = True

    def _report_path(self, session_id: str) -> str:
        return os.path.join(self.reports, _stem(self.find(session_id)) + _REPORT)

    def write_report(self, session_id: str, report: Data) -> None:
        """Save a report in one step. It can be computed again, so it is not forced to the disk."""
        path = self._report_path(session_id)
        _replace(path, [_encode(report).encode()], sync=False)
        if not os.path.lexists(self.find(session_id)):
            with _naming(path):
                _remove(path)  # the session was deleted meanwhile

    def create(self, header: Data, events: Iterable[Any], footer: Data, *, replace: bool = False,
               sync: bool = True) -> None:
        """Store a session. SessionExists when its id is taken, unless ``replace``.

        Status and end that ``footer`` leaves out come from the events, counts and totals always do
        (without events the totals given stay). ``sync=False`` leaves it to the system when the file
        reaches the disk."""
        parts = _lay_out({**header, **footer, "events": events})
        self.write(header["id"], parts, replace=replace, sync=sync)

    def write(self, session_id: str, parts: Iterable[bytes], *, replace: bool = False,
              sync: bool = True) -> None:
        """Store a session's file, laid out already; otherwise as `create`."""
        path = self.find(check_id(session_id))
        if not self.needs_masking() and not self._masked:
            self.mark_masked()
        with _temporary(path, parts, sync or self.durable) as temp:
            while not _publish(temp, path):
                if not replace:
                    raise SessionExists(
                        f"session {session_id} is already in {_printable(self.root)}; choose "
                        "another id or delete it first")
                with suppress(SessionNotFound), _locked(path, exclusive=True):
                    os.replace(temp, path)
                    break
            if self.durable:
                _sync_folder(path)

    def append(self, session_id: str, make_event: Any, *, sync: bool = False) -> Any:
        """Add an event in constant time; (event, footer, mark for `tail`).

        ``make_event(footer)`` is called under the lock and returns (event, changes to the footer);
        its ``event_count`` was never given out before, count and totals follow from the event. A
        None event changes only the footer. TypeError or ValueError when the event has no JSON form:
        nothing is written then."""
        path = self.find(session_id)
        while True:
            with _locked(path, exclusive=True) as (fd, info):
                start = max(info.st_size - _FOOTER_SIZE, 0)
                tail = _read(fd, start, info.st_size)
                footer, cut = _parse_footer(tail)
                if not footer:
                    self._rewrite(fd, info, path)
                    continue
                event, changes = make_event(footer)
                line = b""
                if event is not None:
                    _count(footer, event)
                    line = f",{_encode_event(event)}\n"[tail.endswith(b"[\n", 0, cut):].encode()
                footer.update(changes)
                self._overwrite(fd, start + cut, tail[cut:], line, footer, sync)
            mark = _mark(info, line or tail[:cut], start + cut + len(line), footer["event_count"])
            return event, footer, mark

    def _overwrite(self, fd: int, offset: int, old: Any, line: Any, footer: Data,
                   sync: bool) -> None:
        """Write a line and the footer over the ``old`` end; when that fails put it back."""
        new = line + _encode_footer(footer, len(old) - len(line))
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            _write(fd, new)
        except OSError:
            os.lseek(fd, offset, os.SEEK_SET)
            _write(fd, old)  # its blocks are still the file's, so it fits on a full disk
            os.ftruncate(fd, offset + len(old))
            raise
        if sync or self.durable:
            os.fsync(fd)

    def load(self, session_id: str) -> Any:
        """The session as one dict, events included; a damaged file is repaired first."""
        return self.load_marked(session_id)[0]

    def load_marked(self, session_id: str, make: Any = dict, *, shown: bool = True) -> Any:
        """(the session as one dict, mark for `tail`). Every event is handed through ``make``: a
        large session is never whole in memory as text or as dicts. What an older version stored is
        masked, events only if they are to be ``shown``."""
        path, older = self.find(session_id), self.needs_masking()
        each = (lambda event: make(_masked_older(event))) if older and shown else make
        with _locked(path, exclusive=False) as (fd, info):
            first = _read(fd, 0, min(info.st_size, _LONG_PEEK))
            doc = _header_of(first)
            found = doc and _stream(fd, info, each, first.find(b"\n") + 1)
            if found:
                events, footer, mark = found
                doc.update(footer, events=events)
            if not found or _fault(doc) or not _adds_up(doc):
                doc = None
                data = _read(fd, 0, info.st_size)
        if doc is None:
            doc, remark, _ = _restore(data, path)
            if remark:
                try:
                    self.change(session_id, lambda doc: None)
                    return self.load_marked(session_id, make, shown=shown)
                except DamagedSession:
                    raise
                except StorageError:
                    self._report(remark + " (in memory: the store cannot be written)")
                    doc = _parse(b"".join(_lay_out(doc)), path)
            doc["events"] = list(map(each, doc["events"]))
            mark = _mark(info, b"", info.st_size + 1, 0)  # nothing that `tail` could go on from
        if older:
            doc.update(_masked_older(doc))
        return doc, mark

    def tail(self, session_id: str, mark: Tuple[Any, ...]) -> Any:
        """(events since ``mark``, footer, new mark), reading only those; None when the file was
        replaced."""
        path = self.find(session_id)
        device, inode, offset, count, before = mark
        with _locked(path, exclusive=False) as (fd, info):
            if (info.st_dev, info.st_ino) != (device, inode) \
                    or _read(fd, offset - len(before), offset) != before:
                return None
            found = _stream(fd, info, dict, offset)
        return found if found and found[1]["event_count"] == count + len(found[0]) else None

    def head(self, session_id: str) -> Any:
        """Header and footer of a session as one dict, from the ends of its file; from all of it
        when they do not fit."""
        head = _peek(self.find(session_id), header_only=False)
        if not head or _fault(head):
            head = self.load(session_id)
        del head["events"]
        return head

    def readable_head(self, session_id: str) -> Any:
        """Header and footer as one dict; None for a session that is gone meanwhile, and with a
        warning for one that cannot be read."""
        try:
            return self.head(session_id)
        except SessionNotFound:
            pass
        except SessionOptimizerError as error:
            self._report(f"left out of the list: {error}")
        return None

    def headers(self) -> Iterator[Tuple[str, Data]]:
        """Yield (id, header) of every session that can be read, by the first line of its file where
        that tells. The id is the one that addresses the session; the header's own may differ. In no
        particular order."""
        self._check_folders()
        for path in [entry.path for entry in self._entries(self.sessions)]:
            if path.endswith(".json"):
                session_id = _stem(path)
                head = _peek(path, header_only=True) or self.readable_head(session_id)
                if head:
                    yield session_id, head

    def change(self, session_id: str, edit: Any) -> None:
        """Let ``edit`` change the session's dict in place, under the lock, and store it anew in one
        step."""
        path = self.find(session_id)
        with _locked(path, exclusive=True) as (fd, info):
            self._rewrite(fd, info, path, edit)

    def _rewrite(self, fd: int, info: os.stat_result, path: str,
                 edit: Any = lambda doc: None) -> None:
        """Bring the file of a locked session into the present layout: converted if older, else
        repaired; what is damaged is kept beside it."""
        data = _read(fd, 0, info.st_size)
        doc, remark, lost = _restore(data, path)
        edit(doc)
        if lost:
            copy_ = next(name for name in _copies_of(path) if not os.path.lexists(name))
            _replace(copy_, [data], sync=True)
            remark += f"; the damaged file is kept as {_printable(copy_)}"
        try:
            _replace(path, _lay_out(doc), sync=True)
        except ValueError as error:
            raise _damaged(path, f"{error}") from error
        self._report(remark)

    def archive(self, session_id: str) -> str:
        """Keep a session under the first free of ``<id>.1``, ``<id>.2``, ...; the new id, also
        written inside."""
        path = self.find(check_id(session_id))
        with _locked(path, exclusive=True) as (fd, info):
            doc, remark, _ = _restore(_read(fd, 0, info.st_size), path)
            for number in itertools.count(1):
                doc["id"] = f"{session_id[:_ID_LENGTH - len(str(number)) - 1]}.{number}"
                try:
                    self.write(doc["id"], _lay_out(doc))
                    break
                except SessionExists:
                    pass
                except ValueError as error:
                    raise _damaged(path, f"{error}") from error
            _remove(path)
        self._report(remark)
        return str(doc["id"])

    def delete(self, session_id: str) -> bool:
        """Remove a session, readable or not, with its report and copies of it; False when there is
        none."""
        path = self.find(session_id)
        try:
            with _locked(path, exclusive=True):
                self._delete(session_id, path)
        except SessionNotFound:
            return False
        except DamagedSession:
            self._delete(session_id, path)  # a link or a pipe cannot be locked: the name goes
        return True

    def _delete(self, session_id: str, path: str) -> None:
        with _naming(path):
            _remove(self._report_path(session_id))
            all(map(_remove, _copies_of(path)))  # up to the first that is not there
            _remove(path)
            if self.durable:
                _sync_folder(path)

    def copies(self) -> List[str]:
        """The paths of what is kept of damaged files."""
        return sorted(entry.path for entry in self._entries(self.sessions)
                      if _COPY.search(entry.name))

    def sweep(self, *, once: bool = False) -> int:
        """Remove what crashes left behind: temporary files older than an hour, reports without a
        session; ``once``: not again by this instance. Returns how many."""
        found = 0
        for folder in () if once and self._swept else self.folders:
            for entry in self._entries(folder):
                with suppress(OSError):  # gone meanwhile, or not ours to remove
                    found += self._is_left(folder, entry) and _remove(entry.path)
        self._swept = True
        return found

    def _is_left(self, folder: str, entry: Any) -> Any:
        if folder == self.reports and entry.name.endswith(_REPORT):
            session = entry.name[:-len(_REPORT)] + ".json"
            return not os.path.lexists(os.path.join(self.sessions, session))
        return entry.name.startswith(".") and entry.name.endswith(_TEMPORARY) and \
            time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFT_BEHIND

    def repair(self, *, discard: bool = False) -> Data:
        """Mend every session that can be mended, and sweep: {"repaired": [what was said of each],
        "damaged": [what keeps each of the others from being read], "copies": [paths of damaged
        files that were kept], "removed": number of other files removed}. With ``discard`` the
        copies go."""
        before, damaged = len(self.warnings), []
        for session_id, _ in self.files():
            try:
                self.load_marked(session_id, bool)  # its events are not kept
            except SessionNotFound:
                pass
            except StorageError as error:
                damaged.append(f"{error}")
        copies = self.copies()
        for path in copies if discard else ():
            with _naming(path):
                _remove(path)
        return {"repaired": self.warnings[before:], "damaged": damaged, "copies": copies,
                "removed": self.sweep()}

    def _report(self, remark: str) -> None:
        if remark:
            self.warnings.append(remark)
            if self._warn:
                self._warn(remark)


def mask_older(store: Store) -> None:
    """Write everything with today's rules, where an older version has written, and drop hashes of
    what was not masked. Reports go: they are made again. Where the store cannot be written that is
    a warning; what is read is masked all the same."""
    def mask(doc: Data) -> None:
        doc.update(_masked_older(doc), events=list(map(_masked_older, doc["events"])))

    if not store.needs_masking():
        return
    try:
        for session_id, _ in store.files():
            with suppress(SessionNotFound, DamagedSession):  # gone, or `repair` names it
                store.change(session_id, mask)
        for entry in store._entries(store.reports):
            with _naming(entry.path):
                _remove(entry.path)
        store.state.clear()
        store.mark_masked()
    except StorageError as error:
        store._report(f"what an older version stored could not be masked: {error}")


def _masked_older(part: Data) -> Data:
    """A session without its events, or an event, with its secrets masked, but for what names
    things."""
    named = {name: value for name, value in part.items() if name in _NAMES}
    parts = {name: _masked_older(value) for name, value in part.items()
             if name in ("data", "metadata") and isinstance(value, dict)}
    return {**named, **masked({name: value for name, value in part.items() if name not in {
        *named, *parts, "events"}}, hashes=False), **parts}


def lock_scan(root: str) -> int:
    """The descriptor of the lock that one scan of the store holds while it reads what changed;
    close it with `_release`."""
    path = os.path.join(root, "scan.lock")
    with _naming(path):
        _make_folder(root)
        fd = os.open(path, os.O_CREAT | _CHANGE, 0o600)
        try:
            if fcntl:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _warn("another scan is reading into this store: waiting for it")
        _lock(fd, True)
    return fd


def _mark(info: os.stat_result, before: bytes, offset: int, count: int) -> Tuple[Any, ...]:
    return info.st_dev, info.st_ino, offset, count, before[-_FINGERPRINT:]


def _copies_of(path: str) -> Iterator[str]:
    """The names that copies of a damaged file have, one after the other."""
    return (f"{path}.damaged-{number}" for number in itertools.count(1))


def _peek(path: str, *, header_only: bool) -> Any:
    """Header, or header and footer, of a session from the ends of its file, None where they do
    not tell."""
    try:
        fd = os.open(path, _READ)
        try:
            first = _read(fd, 0, _START)
            if b"\n" not in first:
                first = _read(fd, 0, _LONG_PEEK)
            head, size = _header_of(first), os.fstat(fd).st_size
            if header_only or not head:
                older = first.startswith(b"{\n") and not header_only
                return _peek_older(_read(fd, 0, size)) if older else head
            footer, _ = _parse_footer(_read(fd, max(size - _FOOTER_SIZE, 0), size))
            return footer and {**head, **footer}
        finally:
            os.close(fd)
    except OSError:
        return None  # damaged, or read without a lock in the middle of an append


def _peek_older(data: bytes) -> Any:
    """What a session of the older layout, indented by two, says besides its events, whose JSON is
    most of the time that reading it takes; None where it looks otherwise."""
    start, end = data.find(b'\n  "events": [\n'), data.rfind(b'\n  ],\n  "total_tokens_input"')
    head = _decoded(data[:start] + b'"events": [' + data[end:]) if 0 <= start < end else None
    if head:
        head.setdefault("event_count", data.count(b"\n    },\n    {\n", start, end) + 1)
    return head


def _open_regular(path: str, flags: int) -> int:
    """Opens a file for ``open``; OSError for a pipe or a device, which could block or never end."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_regular(path: str) -> bytes:
    """The content of a file; OSError for a pipe or a device, which could block or never end."""
    with open(path, "rb", opener=_open_regular) as file:
        return file.read()


_DEAREST = 0.001  # USD per token: no model is known that costs as much


def own_prices(root: str) -> PriceList:
    """The prices, with what the user put into prices.json. InvalidValue when it cannot be used, a
    warning where it looks as if it were not in USD per token."""
    path = os.path.join(root, "prices.json")
    try:
        own = json.loads(read_regular(path).decode("utf-8-sig"))
    except FileNotFoundError:
        return PriceList()
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidValue(f"{path} cannot be read: {getattr(error, 'strerror', error)}; mend or "
                           "remove it") from None
    if not isinstance(own, dict):
        raise InvalidValue(f"{path} holds a {type(own).__name__}: it needs an object of models")
    prices = PriceList(own)
    known = {row.model: row.figures for row in prices._own.values()}
    for model, entry in own.items():
        dear = [figure for figure in known.get(model, ()) if figure and figure > _DEAREST]
        if dear or model not in known and "litellm_provider" not in str(entry):
            _warn(f"{path}: implausible price of {model!r}, {dear or entry}: give "
                  "input_cost_per_token and the others in USD per single token")
    return prices


# -- what a store knows across its sessions

_STATE_TABLES = "files units responses rows deleted summaries".split()
_STATE_VERSION = 1
_STATE_WAIT = 60.0  # seconds to wait for other processes
_SHOWN = "shown"  # stands where summaries have their settings
_MOST_SHOWN = 4 << 20  # characters of what is kept of one command's output
# The state files of version 2.0: the deletions are taken over, all else is made again.
_OLD_STATE = "deleted.json scan.json scan-responses.json summaries.json".split()


class State:
    """What scans have read and found, which ids were deleted, and summaries, in one SQLite file.

    Every method is one transaction on a connection of its own, so threads, processes and forks
    may share a State. Keys and values are JSON. Reading creates nothing; where the file cannot be
    written, it is read as it is. A damaged file is begun afresh, with a warning."""

    def __init__(self, root: str, report: Any):
        self.root, self.path = root, os.path.join(root, "state.sqlite3")
        self._report = report

    def generation(self) -> Any:
        """A number that grows whenever a scan saves what it found, or a session is deleted."""
        return self._run(_generation)

    def scanned(self) -> Any:
        """Where the next scan starts, of one moment: the generation; {path: [size, mtime in ns,
        reader, unit, reason]}; {first file of a unit: what is known of it}; {deleted id: a number
        that grows with every deletion}."""
        return self._run(lambda db: (
            _generation(db), _table(db, "files"), _table(db, "units"),
                                     _table(db, "deleted", "serial")))

    def responses(self) -> Any:
        """{unit: {response id: its output there}}."""
        return self._run(lambda db: _table(db, "responses"))

    def rows_of(self, units: Iterable[str]) -> Any:
        """{unit: the rows of its sessions}, in the order they were read."""
        return self._run(lambda db: {unit: _listed(
            db, "SELECT value FROM rows WHERE part = ? ORDER BY serial", _encode(unit))
            for unit in units})

    def units_of_rows(self) -> Any:
        """{session id: the unit it was read from}."""
        return self._run(lambda db: _table(db, "rows", "part"))

    def summaries(self, settings: str, shorten: Any = lambda row: row) -> Any:
        """{session id: row} of the summaries made under these settings, each passed through
        ``shorten``, a thousand at a time: they need not fit into memory together."""
        query = "SELECT key || ':' || value FROM summaries WHERE part = ? ORDER BY serial"

        def work(db: Any) -> Data:
            found: Data = {}
            cursor = db.execute(query, (_encode(settings),))
            for pairs in iter(lambda: cursor.fetchmany(_LINES), []):
                rows = json.loads("{%s}" % ",".join([pair for pair, in pairs]))
                found.update(zip(rows, map(shorten, rows.values())))
            return found
        return self._run(work)

    def save_summaries(self, settings: str, rows: Data, gone: Iterable[str]) -> None:
        """Keep the rows given, drop those of the ids ``gone``."""
        def work(db: Any) -> None:
            for session_id in gone:
                db.execute("DELETE FROM summaries WHERE key = ?", (_encode(session_id),))
            _put(db, "summaries", rows, settings)
        self._run(work, write=True)

    def shown(self, key: str, generation: int, show: Callable[[], Any]) -> Any:
        """What a command showed under this key, [text, ...], or what it shows now. That is kept,
        while what was found is of this generation."""
        query, part = "SELECT value FROM summaries WHERE key = ? AND part = ?", _encode(_SHOWN)
        kept = self._run(lambda db: _listed(db, query, _encode(key), part))
        shown = kept[0] if kept else json.loads(_encode(show()))

        def work(db: Any) -> None:
            if _generation(db) == generation:
                _put(db, "summaries", {key: shown}, _SHOWN)
        if not kept and len(shown[0]) < _MOST_SHOWN:
            with suppress(StorageError):  # a store that is for reading only
                self._run(work, write=True)
        return shown

    def save_scan(self, files: Data, units: Data, told: Data, rows: Data,
                  dropped: Iterable[str], mark: int) -> Any:
        """Keep what a scan has read: ``files``, ``units``, the responses each has ``told``, and its
        rows; forget the units ``dropped``. The ids deleted since ``mark`` are left out and
        returned; those deleted before whose rows have come back are deleted no more."""
        def work(db: Any) -> Any:
            late = set(_listed(db, "SELECT key FROM deleted WHERE serial > ?", mark))
            for unit in map(_encode, (*dropped, *units)):
                db.execute("DELETE FROM units WHERE key = ?", (unit,))
                db.execute("DELETE FROM responses WHERE key = ?", (unit,))
                db.execute("DELETE FROM rows WHERE part = ?", (unit,))
            for table, found in (("files", files), ("units", units), ("responses", told)):
                _put(db, table, found)
            for unit in units:
                kept = {row["id"]: row for row in rows[unit] if row["id"] not in late}
                _put(db, "rows", kept, unit)
            db.execute("DELETE FROM deleted WHERE key IN (SELECT key FROM rows)")
            _forget_shown(db)
            return late
        return self._run(work, write=True)

    def clear(self) -> None:
        """Forget all but the deletions: the next scan reads everything again."""
        self._run(lambda db: [db.execute(f"DELETE FROM {table}") for table in _STATE_TABLES
                              if table != "deleted"], write=True)

    def forget(self, session_id: str, imported: bool) -> None:
        """Drop row and summary of a session. One that was ``imported`` or has a row stays away from
        later scans."""
        key = (_encode(session_id),)

        def work(db: Any) -> None:
            known = db.execute("DELETE FROM rows WHERE key = ?", key).rowcount
            db.execute("DELETE FROM summaries WHERE key = ?", key)
            _forget_shown(db)
            if imported or known:
                db.execute("REPLACE INTO deleted(key) VALUES (?)", key)
        if imported or os.path.exists(self.path):
            self._run(work, write=True)

    def _run(self, work: Any, write: bool = False) -> Any:
        """What ``work(connection)`` returns, done in one transaction; StorageError when the file
        cannot be used."""
        try:
            import sqlite3
        except ImportError:
            raise StorageError(self.path, "this Python was built without sqlite3",
                               "use one that has it, or scan --no-store") from None
        # A full disk may have no room for what readers share; a store may be for reading only.
        for way in ("shared", "shared") if write else ("shared", "alone", "immutable"):
            try:
                return self._transact(work, write, way)
            except (sqlite3.DatabaseError, ValueError) as error:
                failure = error
            if not isinstance(failure, sqlite3.OperationalError) or "no such" in str(failure):
                self._begin_afresh(failure)
            elif write:
                break
        remedy = _FULL if "full" in str(failure) else _YOURS
        raise StorageError(self.path, str(failure), remedy) from failure

    def _transact(self, work: Any, write: bool, way: str) -> Any:
        import sqlite3
        from urllib.parse import quote
        if os.path.islink(self.path):
            raise StorageError(self.path, *_LINKED)
        if write and not os.path.exists(self.path):
            # Only a file that is new: closing one that SQLite uses would drop its locks.
            with _naming(self.path), suppress(FileExistsError):
                _make_folder(self.root)
                os.close(os.open(self.path, _CREATE, 0o600))
        target = f"file:{quote(self.path)}" + "?immutable=1" * (way == "immutable")
        target = target if os.path.exists(self.path) else ":memory:"
        with closing(sqlite3.connect(target, timeout=_STATE_WAIT, isolation_level=None,
                                     uri=True)) as db:
            if way == "alone":
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA secure_delete = ON")
            if db.execute("PRAGMA user_version").fetchone()[0] != _STATE_VERSION:
                self._prepare(db, write)
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            found = work(db)
            db.execute("COMMIT")
            return found

    def _prepare(self, db: Any, write: bool) -> None:
        """Make the tables; what version 2.0 left goes, once its deletions are noted."""
        import sqlite3
        with suppress(sqlite3.OperationalError):  # another is at it, or the file system cannot
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        version, = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _STATE_VERSION):
            raise sqlite3.DatabaseError("made by another version")
        older = [os.path.join(self.root, name) for name in _OLD_STATE]
        if not version:
            for table in _STATE_TABLES:
                db.execute(f"CREATE TABLE {table}(serial INTEGER PRIMARY KEY AUTOINCREMENT, "
                           "key TEXT UNIQUE, part TEXT, value TEXT)")
            db.execute("CREATE INDEX rows_by_part ON rows(part)")
            with suppress(OSError, ValueError):
                deleted = _decoded(read_regular(older[0]))
                if isinstance(deleted, list):
                    _put(db, "deleted", dict.fromkeys(map(str, deleted)))
            db.execute(f"PRAGMA user_version = {_STATE_VERSION}")
        db.execute("COMMIT")
        for path in older if write else ():
            with suppress(OSError):
                _remove(path)

    def _begin_afresh(self, error: Exception) -> None:
        with _naming(self.path):
            for ending in ("", "-wal", "-shm", "-journal"):
                _remove(self.path + ending)
        self._report(f"{_printable(self.path)} was damaged ({error}) and is begun afresh: the next "
                     "scan reads everything again, and deleted sessions may come back")


def _table(db: Any, name: str, column: str = "value") -> Any:
    return json.loads("{%s}" % ",".join([pair for pair, in db.execute(
        f"SELECT key || ':' || {column} FROM {name} ORDER BY serial")]))


def _listed(db: Any, query: str, *values: Any) -> Any:
    return json.loads("[%s]" % ",".join([text for text, in db.execute(query, values)]))


def _forget_shown(db: Any) -> None:
    db.execute("DELETE FROM summaries WHERE part = ?", (_encode(_SHOWN),))


def _generation(db: Any) -> Any:
    return db.execute("SELECT total(seq) FROM sqlite_sequence "
                      "WHERE name IN ('files', 'units', 'deleted')").fetchone()[0]


def _put(db: Any, table: str, found: Data, part: str = "") -> None:
    db.executemany(f"REPLACE INTO {table}(key, part, value) VALUES (?, ?, ?)",
                   [(_encode(key), _encode(part), _encode(value)) for key, value in found.items()])


# ==================================================================================================
# Recorder
# ==================================================================================================

IMAGE_CHARACTERS = 5_600   # what an image weighs against text: about 1,600 tokens
SHARP_DROP = 10_000        # tokens, and half of itself, a context must lose to end unmarked
SMALL_RESULT = 2_000       # characters up to which no text has more than a token for 2.5 of them
HIDDEN_THINKING = 4_000    # tokens of thinking that nine of ten steps stay below
SMALL_FALL, LARGE_FALL = 2_000, 8_000  # tokens: never, always more than thinking; else 12%
GUESSABLE = 500            # characters of a text whose hash is taken: longer ones are numbered,
HOOK_HASHED = 20_000       # but where a hook tells one event alone: masking takes 10 ms there
TASK_LENGTH = 160          # characters of the first prompt that are kept


class _SeenLines:
    """The lines that reads have shown in one window, to tell whether a later one shows the same."""

    def __init__(self) -> None:
        self._known: Data = {}  # by path: number and hash of every line known
        self._numbered: Set[str] = set()  # paths whose lines were shown with their numbers
        self._among: Data = {}  # by path: hashes of the last result in which it was one of several
        self.totals: Data = {}  # by path: lines of the file when it was last read whole
        self._answers: Data = {}  # by operation: hashes of its last answer's lines

    def verdict(self, path: str, first: int, count: int, text: str) -> Tuple[str, List[int]]:
        """ "same" where every line known of the file is as known, "changed" where one differs, ""
        where none is known; how many lines were known (all: another read may have brought them),
        their characters and those of all, line numbers among them where they are new. Keeps these
        lines."""
        lines = plain_lines(text)[:count]
        hashes = dict(enumerate(map(hash, lines), first))
        known = self._known.setdefault(path, {})
        shared = known.keys() & hashes.keys()
        same = all(known[number] == hashes[number] for number in shared)
        if not shared and path in self._among:
            shared, same = hashes.keys(), {*hashes.values()} <= {*self._among[path]}
        if not same:
            known.clear()
        known.update(hashes)
        verdict = ("same" if same else "changed") if shared else ""
        part = whole = sum(map(len, lines)) + len(lines)
        if 0 < len(shared) < len(lines):
            part = sum(len(lines[number - first]) + 1 for number in shared)
        if _NUMBERED.match(text) and path not in self._numbered:
            self._numbered.add(path)  # the numbers are new
            whole = max(whole, len(text))
        return verdict, [len(shared or lines), part, whole]

    def several(self, reads: List[Any], text: str) -> str:
        """The verdict about a result that shows several files; one that is shown whole gets the
        last line it is known to have."""
        hashes = list(map(hash, plain_lines(text)))
        left, found = iter(hashes), 0
        self._among.update(dict.fromkeys((path for path, *_ in reads), hashes))
        for read in reads:
            path, first, last = read
            known = self._known.get(path, {})
            read[2] = last or self.totals.get(path)
            for number in range(first, (read[2] or first) + 1):
                if known.get(number) not in left:
                    return "changed" if number in known else ""
                found += 1
        return "same" if 10 * found >= 9 * len(hashes) else "changed"  # a file may have grown

    def same_lines(self, operation: str, text: str) -> List[int]:
        """How many of how many characters stand in lines that an operation's last answer had too,
        none where they are less than nine tenths of the lines or of the characters. Keeps these
        lines."""
        lines = text.split("\n")
        before = self._answers.get(operation, ())
        self._answers[operation] = frozenset(map(hash, lines))
        same = [len(line) + 1 for line in lines if hash(line) in before]
        size = len(text) + 1
        return [sum(same), size] if 10 * min(len(same) / len(lines), sum(same) / size) >= 9 else []


def _under(value: Any, keys: Iterable[str]) -> Any:
    """What stands under these keys, one inside the other; None where it is not there."""
    for key in keys:
        value = value.get(key) if value.__class__ is dict else None
    return value


def _text(value: Any, *keys: str) -> str:
    """What stands under the keys where it is a text, else ""."""
    for key in keys:  # not by `_under`: this is called for every field of every line
        value = value.get(key) if value.__class__ is dict else None
    return value if value.__class__ is str else ""


def _texts(value: Any, *names: str) -> List[str]:
    """What stands under each of these keys of an object, "" for what is no text."""
    return [_text(value, name) for name in names]


def _first_text(value: Any, *names: str) -> str:
    """The first of these keys' values that is a text and says something; "" where none is."""
    return next(filter(None, _texts(value, *names)), "")


def _counts(value: Any, *names: str) -> List[int]:
    """The token counts under these keys of an object, each 0 where there is none (`_count_of`)."""
    value = _as_dict(value)
    return [_count_of(value.get(name)) for name in names]


def _as_dict(value: Any, *keys: str) -> Data:
    """What stands under the keys where it is an object, else an empty one."""
    value = _under(value, keys)
    return value if value.__class__ is dict else {}


def _as_list(value: Any, *keys: str) -> List[Any]:
    value = _under(value, keys)
    return value if value.__class__ is list else []


def _dicts(value: Any, *keys: str) -> List[Data]:
    """The objects of the list under the keys; none where there is no list."""
    return [part for part in _as_list(value, *keys) if part.__class__ is dict]


def plain_lines(text: str) -> List[str]:
    """The lines of what a read returned, without the numbers some tools put before them."""
    numbered = _NUMBERED.match(text)
    lines = text.split("\n")
    return [line.split(numbered[1], 1)[-1] for line in lines] if numbered else lines


def digest_of(text: Any) -> str:
    """A short hash of a text, for telling whether two are equal."""
    from hashlib import blake2b
    raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
    return blake2b(raw, digest_size=8).hexdigest()


def _count_of(value: Any) -> int:
    """A token count in a transcript; anything but a whole number from 0 to MAX_TOKENS / 1000 counts
    as 0."""
    return value if value.__class__ is int and 0 <= value <= MAX_TOKENS // 1000 else 0


def task_line(text: str) -> str:
    """The first line of a prompt that says something, secrets masked, cut to TASK_LENGTH
    characters."""
    first = next(filter(None, map(str.strip, text.split("\n"))), "")
    line = " ".join(mask_secrets(first[:4 * TASK_LENGTH]).split())
    return line if len(line) <= TASK_LENGTH else line[:TASK_LENGTH - 1] + "…"


_PARTS = ("offset", "limit", "start_line", "end_line")  # which lines of a file a read asks for
_NUMBERED = _Pattern(r" *\d+(\t|→)")
# What a command was allowed: tried again with more rights it is another one.
_RIGHTS = ("sandbox_permissions", "with_escalated_permissions", "dangerouslyDisableSandbox")
# Tools beside commands whose answers tell something: others acknowledge, in the same words.
_TELLING = ("mcp_", "write_stdin", "bashoutput", "taskoutput", "readmcpresource", "monitor")
_HERE = _Pattern(r"<<|@['\"]|\*\*\* Begin Patch")  # what follows in a command is file content

# Where a search looks and how it shows what it finds: kept as given. What else it is told may be a
# prompt: kept as a hash.
_SCOPE_KEYS = frozenset("""path dir_path glob type include output_mode head_limit offset limit
    max_results multiline context -i -n -A -B -C case_sensitive respect_git_ignore""".split())


_QUERY_TOOL = _Pattern(r"^mcp_.*(?:^|_)(?:get|list|read|search|find|query|fetch|view|show|describe|"
                       r"screenshot|snapshot)")
# What a program in a pipe says instead of a file, while the last one of the pipe succeeds.
_COMPLAINT = _Pattern(
    r"\s*(?:usage: |(?:\S{0,80}/)?(?:(?:ba|z|da)?sh|cat|head|tail|sed|nl|g?awk|less|bat|jq|sort|"
    r"cut|iconv|git|docker|kubectl|ssh|curl|Get-Content)\s?: )", re.I)
_UNCHANGED = _Pattern(r"unchanged since (?:your |the )?last read|file[ _]unchanged|"
                      r"file has not changed since", re.I)
_CUT_OFF = _Pattern("truncated|<persisted-output>|lines omitted|exceeds maximum allowed")
_STALE = _Pattern(
    r"has not been read yet|modified since (?:it was )?(?:last )?read|read it again", re.I)
_SERVICE = _Pattern(  # a signing agent, a name server, a gateway; not one's own server
    r"gpg failed to sign|signing failed|agent refused operation|could not resolve host|"
    r"name resolution|\b(?:EAI_AGAIN|ENOTFOUND|ETIMEDOUT)\b|connection timed out|"
    r"50[234] (?:bad gateway|service|gateway)|"
    r"\b(?:ECONNRESET|connection reset)\b(?!.{0,80}(?:localhost|127\.0\.0\.1))", re.I)
_SHELL_LINE = _Pattern(r"!|\$ |[^\n]*(?:&&|[|>;])[^\n]*\Z")
_OF_OUTPUT = ("declined", "transient")  # may be said by what a command printed
_COMMITTED = _Pattern(r"(?m)^\[[^\]\n]{1,200}? ([0-9a-f]{7,40})\] ")  # what ``git commit`` prints


def _too_deep(value: Any, levels: int = 40) -> bool:  # real arguments have fewer than 10
    """True for nesting that later steps (writing JSON, hashing) could not follow."""
    parts = value.values() if value.__class__ is dict else value
    return value.__class__ in (dict, list) and (
        levels < 1 or any(_too_deep(part, levels - 1) for part in parts))


def _arguments(value: Any) -> Data:
    """A tool's arguments, given as an object or as its JSON text; commands are texts or lists of
    texts."""
    if value.__class__ is str:
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value.__class__ is not dict or _too_deep(value):
        return {}
    arguments = dict(value)
    for key in ("command", "cmd", "script"):
        command = arguments.pop(key, None)
        if command.__class__ is list:
            arguments[key] = [word for word in command if word.__class__ is str]
        elif command.__class__ is str:
            arguments[key] = command
    return arguments


def _json_size(value: Any) -> int:
    """Characters of a value as JSON; 0 for what cannot be written."""
    return len(value if value.__class__ is str else _as_json(value))


_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def _as_json(value: Any) -> str:
    """A value as JSON; "" for what cannot be written."""
    return "" if _too_deep(value) else _to_json(value)


class _Call:
    """One model call while it is told. ``usage`` is None where it is not known. ``parts``:
    characters and event of what it wrote. ``visible``: tokens of its output that the next call's
    context can hold."""

    thoughts: Optional[int] = None  # tokens of its thinking, where the provider tells
    thinking: Optional[SessionEvent] = None
    complete: Optional[bool] = None
    hidden, visible = False, 0

    def __init__(self, event: SessionEvent, usage: Any, counted: bool = True):
        self.event, self.usage, self.counted = event, usage, counted
        self.parts: List[Any] = []
        self.earlier: List[_Call] = []

    def share_output(self, resends_thoughts: bool) -> None:
        """Give the output to text, thinking and tool calls by size. Of it the next context can
        hold what is visible: at most half its characters where thinking is in no text; where the
        output is a placeholder, a token for 3.6 characters."""
        rest, sizes, own = self.usage.output, [size for size, _ in self.parts], self.event
        characters = sum(sizes)
        if self.thoughts is None:
            told = rest if self.complete else max(rest, characters * 10 // 36)
            self.visible = min(told, characters // 2)
        else:
            thoughts = min(self.thoughts, rest)
            rest -= thoughts
            self.visible = rest + thoughts * resends_thoughts
            if thoughts:
                data = {name: value for name, value in own.data.items()
                        if name in ("line", "path", "response_id")}
                self.thinking = SessionEvent("", own.timestamp, EventType.THINKING, data, 0,
                                             thoughts, model=own.model, rate=own.rate)
        if self.counted:
            shares = share_out(rest, sizes)
            for (_, event), share in zip(self.parts, shares):
                event.tokens_output += share
                event.rate = own.rate
            own.tokens_output += rest - sum(shares)


class _Layout:
    """Tokens laid out by growth: what a call's context gained over the call before is shared among
    what entered it. The sums over the events equal the calls' usage to the token."""

    def __init__(self, resends_thoughts: bool) -> None:
        self.events: Events = []
        self._resends = resends_thoughts
        self._pending: List[Tuple[SessionEvent, int]] = []  # and their characters
        self._seen = [10, 36]  # tokens and characters that entered growing contexts
        self._begin_window(0)

    def _begin_window(self, start: int) -> None:
        self._previous: Optional[_Call] = None
        self._context, self._start = 0, start  # of the call before; where this call's items begin
        self._results: Events = []             # what may leave the window, oldest first
        self._history: Any = Counter()         # tokens that calls counted elsewhere brought

    def enter(self, event: SessionEvent, characters: int) -> None:
        """What enters with the next call; a compaction begins a window."""
        self.events.append(event)
        if is_compaction(event):
            self._pending = []
            self._begin_window(len(self.events))
        if "left" in event.data:
            left, lost = event.data["left"], event.data["lost"]
            self._lose(event, lost or sum(result.tokens_input for result in left), left)
        else:
            self._pending.append((event, characters))

    def _lose(self, event: SessionEvent, lost: int, left: Events) -> None:
        """Results leave the context: those known, or the oldest until the loss is used up."""
        if not left:
            sizes = (result.tokens_input for result in self._results)
            left = self._results[:bisect_left([0, *itertools.accumulate(sizes)], lost)]
        event.data.update(lost=lost, left=left)
        gone = set(map(id, left))
        self._results = [result for result in self._results if id(result) not in gone]
        self._context = max(0, self._context - lost)

    def _shrunk(self, call: _Call, context: int) -> int:
        """The tokens that older results had which left without a mark: a fall that dropped thinking
        does not explain, of a context whose cache was found no further than the system prompt."""
        fall = self._context - context
        least = max(SMALL_FALL, min(LARGE_FALL, self._context * 12 // 100))
        if self._previous is None or not self._results or fall <= least \
                or call.usage.read > self._base:
            return 0
        return fall + sum(size for _, size in self._pending) * 10 // 36

    def call(self, call: _Call) -> None:
        """A call takes in what has entered."""
        context = sum(call.usage[:4])
        if context > LONG_CONTEXT:
            call.event.rate = f"{call.event.rate} long".strip()
        if self._context - context > max(SHARP_DROP, self._context // 2):
            self._load(call, Source.COMPACTION, self._start, inferred=True)
            self._begin_window(self._start + 1)
        lost = self._shrunk(call, context)
        if lost:
            self._lose(self._load(call, Source.COMPACTION, inferred=True), lost, [])
        if self._previous is None:
            self._base = context  # of the window's first call
        elif call.counted and not self._previous.counted:
            # It goes on with a context that others have paid for; a mark stands for the answer.
            self._previous.event = self._load(call, Source.RESUME, self._start)
            if self._history:
                self._load(call, Source.HISTORY, self._start + 1, contents=dict(self._history))
            self._start += 1 + bool(self._history)
            self._history = Counter()
        self._lay_out(call, context - self._context)
        if not call.counted:
            # What led to a response that is counted elsewhere is told there, but for what a
            # response here has written.
            ours = [event for event in self.events[self._start:] if event.tokens_output]
            self.events[self._start:] = ours
        call.share_output(self._resends)
        if call.counted:
            self.events += [call.event] + ([call.thinking] if call.thinking else [])
        self._results += [event for event, _ in self._pending if "tool" in event.data]
        self._previous, self._context, self._pending = call, context, []
        self._start = len(self.events)

    def _lay_out(self, call: _Call, growth: int) -> None:
        fresh = sum(call.usage[:3])
        previous, pending = self._previous, self._pending
        size = sum(size for _, size in pending)
        most = [size // 2 - min(size, SMALL_RESULT) // 10 for _, size in pending]
        limit = sum(most)
        if growth < 0:  # what entered is known by its size alone
            growth = min(size * self._seen[0] // self._seen[1], limit)
            growth += self._kept(previous, 0) if previous else 0
        left = min(fresh, growth)
        laid: List[Any] = []  # events and their tokens
        if fresh > left:
            laid.append((self._load(call, Source.REBUILD), fresh - left))
        if previous:
            kept = min(left, self._kept(previous, left - limit))
            laid.append((previous.event, kept))
            left -= kept
        entered = min(left, limit)
        laid += zip((event for event, _ in pending), share_out(entered, most))
        if previous and left <= limit:
            self._seen = [self._seen[0] + entered, self._seen[1] + size]
        if left > entered:
            laid.append((self._rest(call), left - entered))
        if call.counted:
            _bill(call, laid)
            return
        told = [(content_of(event), tokens) for event, tokens in laid
                if event.data.get("source") != Source.REBUILD]
        if not previous:
            told.append((START_LOAD, call.usage.read))
        for content, tokens in told:
            self._history[content] += tokens

    def _kept(self, previous: _Call, unexplained: int) -> int:
        """Tokens of the answer before that are in the context now: while a prompt is worked on its
        thinking stays (measured: else results would weigh twice what their texts do). Where the
        output is a placeholder that thinking is what items do not explain."""
        prompted = any(event.event_type is EventType.USER_MESSAGE for event, _ in self._pending)
        if prompted or previous.thoughts is not None:
            return previous.visible
        if previous.complete:
            return int(previous.usage.output)
        return max(previous.visible, min(unexplained, HIDDEN_THINKING))

    def _rest(self, call: _Call) -> SessionEvent:
        """What no item explains: before a window's first call the system prompt and the like."""
        if self._previous:
            return self._load(call, Source.UNATTRIBUTED)
        rest = self._load(call, Source.SYSTEM, self._start)
        if self.events[self._start + 1:]:
            rest.timestamp = self.events[self._start + 1].timestamp
        return rest

    def _load(self, call: _Call, source: str, place: Optional[int] = None,
              **data: Any) -> SessionEvent:
        """What entered with a call, at the end of the events or at a place among them."""
        data.update(source=source, line=call.event.data.get("line"))
        model = "" if source == Source.COMPACTION else call.event.model
        event = SessionEvent("", call.event.timestamp, EventType.CONTEXT_LOAD, data, model=model)
        self.events.insert(len(self.events) if place is None else place, event)
        return event


def _bill(call: _Call, laid: List[Any]) -> None:
    """Book the tokens, and the call's cache writes on them in proportion."""
    uncached, write_5m, write_1h, read, _ = call.usage
    call.event.tokens_cache_read += read
    tokens = [count for _, count in laid]
    writes = share_out(write_5m + write_1h, tokens) if uncached else tokens
    hours = share_out(write_1h, writes) if write_5m else writes
    for (event, count), write, hour in zip(laid, writes, hours):
        if not event.model or not (
                event.tokens_output or event.event_type is EventType.AI_RESPONSE):
            # Who takes it in pays for it.
            event.model, event.rate = call.event.model, call.event.rate
        elif (event.model, event.rate) != (call.event.model, call.event.rate):
            event.input_model, event.input_rate = call.event.model, call.event.rate
        event.tokens_input += count
        event.tokens_cache_write += write
        event.tokens_cache_write_1h += hour


class _Window:
    """What one agent's calls and tools brought, in order."""

    calls = 0
    current: Optional[_Call] = None  # the response that is being told

    def __init__(self, agent: str, overhead: str):
        self.agent, self.overhead = agent, overhead
        self.seen = _SeenLines()
        self._steps: List[List[Any]] = []  # event or _Call, characters that enter

    def add(self, entry: Any, characters: int = 0) -> List[Any]:
        """The step that an event or a call becomes; a compaction told twice (its boundary and its
        summary) is one."""
        last = self._steps[-1][0] if self._steps else None
        if last.__class__ is entry.__class__ is SessionEvent \
                and is_compaction(entry) and is_compaction(last):
            self._steps[-1][1] += characters
        else:
            self._steps.append([entry, characters])
        return self._steps[-1]

    def finish(self, resends_thoughts: bool) -> Events:
        """The events in order, tokens laid out."""
        layout = _Layout(resends_thoughts)
        for entry, characters in self._steps:
            if entry.__class__ is SessionEvent:
                layout.enter(entry, characters)
            elif entry and entry.usage is None:
                own = [size for size, event in entry.parts if event is entry.event]
                layout.enter(entry.event, sum(own))
            elif entry:
                for call in (*entry.earlier, entry):
                    layout.call(call)
        for event in layout.events:
            event.agent_id = self.agent
            if self.overhead:
                event.data["overhead"] = self.overhead
        return layout.events


class _Tool:
    """One tool call while it is told: what it does by its name and arguments, and what its result
    shows."""

    open = True

    def __init__(self, told: Recorder, event: SessionEvent, arguments: Any):
        self.event, self.data, self.given = event, event.data, _arguments(arguments)
        self.window, self.cwd, self._hash_of = told._window(), told.cwd, told.hash_of
        self.step, self.calls = self.window.add(event), self.window.calls

    def describe(self) -> None:
        """What the call reads, searches, writes or changes."""
        tool, given = self.data["tool"].lower(), self.given
        kind = TOOL_KINDS.get(tool.rsplit("__", 1)[-1] if tool[:5] == "mcp__" else tool, "")
        path = _first_text(
            given, "file_path", "notebook_path", "path", "filePath", "absolute_path", "dir_path")
        place = canonical_path(path, self.cwd) if path else ""
        command = given.get("command") or given.get("cmd") or given.get("script")
        if kind == "shell" and command:
            self._command(command)
        elif kind == "search":
            self._search(path, place)
        elif kind == "read" and path:
            part = {key: given[key] for key in _PARTS if _is_count(given.get(key))}
            self._becomes(EventType.FILE_READ, file_path=place,
                          pages=str(given.get("pages") or "")[:40], **part)
        elif kind == "write":
            patch = _first_text(given, "input", "patch", "patchText")
            names = [path] if path else patched_paths(patch)
            paths = [canonical_path(name, self.cwd) for name in names]
            self._becomes(EventType.FILE_WRITE, changes=paths or ["*"],
                          file_path="".join(paths[:1]))
        else:
            self.data["changes"] = [] if kind or _QUERY_TOOL.search(tool) else ["?"]
            if tool.startswith("mcp_"):
                self.keep(file_path="" if kind == "harmless" else place,
                          query=_short(_first_text(given, "query", "pattern", "url")))

    def _becomes(self, event_type: EventType, **data: Any) -> None:
        self.event.event_type = event_type
        self.keep(**data)

    def keep(self, **data: Any) -> None:
        """Keep what says something."""
        self.data.update((name, value) for name, value in data.items() if value)

    def _command(self, command: Any) -> None:
        cwd = _first_text(self.given, "workdir", "dir_path") or self.cwd
        effects = shell_effects(command, cwd)
        text = command if isinstance(command, str) else " ".join(command)
        rights = [self.given[key] for key in _RIGHTS if self.given.get(key)]
        operation = self._hash_of(" ".join(text.split()), f" {mask_secrets(cwd)} {rights}")
        reads = list(map(list, effects.reads))
        shown = mask_secrets(_beginning(text, GUESSABLE))
        self.data.update(command=_HERE.split(shown, 1)[0][:300], operation=operation,
                         changes=effects.changes)
        self.keep(acts=effects.acts)
        if effects.kind == "read" and effects.pure:  # of other output the file's share is not known
            path, *part = reads[0]
            several = reads if reads[1:] else []
            self._becomes(EventType.FILE_READ, file_path=path, reads=several,
                          lines=[] if several or part == [1, None] else part)
        elif effects.kind == "search" and effects.searches:
            query, scope = effects.searches[0]
            scope = f"{scope} #{operation}" if effects.searches[1:] else scope
            self._becomes(EventType.SEARCH, query=mask_secrets(query)[:300], scope=scope)
        elif effects.kind == "write":
            self._becomes(EventType.FILE_WRITE, file_path="".join(effects.writes[:1]))

    def _search(self, path: str, place: str) -> None:
        given = self.given
        query = next((given[key] for key in ("pattern", "query", "url") if given.get(key)), path)
        if not query and given.get("prompt"):
            query = f"prompt {self._hash_of(given['prompt'])}"
        place = "" if path == query else place
        scope = {key: place if place and value == path
                 else value if _is_plain(key, value) else self._hash_of(value)
                 for key, value in sorted(given.items())
                 if value not in (None, query) and key != "description"}
        self._becomes(EventType.SEARCH, file_path=place, query=_short(query),
                      scope=mask_secrets(json.dumps(scope))[:600] if scope else "")

    def returned(self, text: str, first: int, count: int, total: int) -> None:
        """What a read or a search returned: its hash, its lines, and whether the window has seen
        them otherwise. First line, how many there are and how many the file has: 0 for not said."""
        data = self.data
        if self.event.event_type is not EventType.FILE_READ:
            # What a search, a command or a tool that tells something answered.
            tells = data.get("command") or data["tool"].lower().startswith(_TELLING)
            if self.event.event_type is EventType.SEARCH or tells and len(text) >= 2 * LEAST_ANSWER:
                data["content_hash"] = self._hash_of(text)
            if tells and len(text) >= 2 * LEAST_POLL:
                operation = data.setdefault(
                    "operation", self._hash_of(data["tool"] + _as_json(self.given)))
                self.keep(same_lines=self.window.seen.same_lines(operation, text))
        elif len(text) < 2000 and "changed" in text.lower() and _UNCHANGED.search(text):
            data["unchanged"] = True
        elif not text:
            data["truncated"] = True  # an image, say: what it showed is not known
        else:
            data["content_hash"] = self._hash_of(text)
            ends = text[:200] + text[-300:]  # say that it is not all there
            if "truncated…" in text or _CUT_OFF.search(ends) \
                    or "command" in data and _COMPLAINT.match(text):
                data["truncated"] = True
            elif "reads" in data:
                self.keep(content=self.window.seen.several(data["reads"], text))
            elif "pages" not in data:
                self._lines(text, first, count, total)

    def _lines(self, text: str, first: int, count: int, total: int) -> None:
        data, seen = self.data, self.window.seen
        count = count or text.count("\n") + (not text.endswith("\n"))
        path, start = data["file_path"], first or line_range(data)[0]
        if start < 0 and seen.totals.get(path, 0) >= count:
            start = seen.totals[path] - count + 1  # the last lines of a file whose length is known
        if start < 0:
            return
        if not total and not first and data.keys().isdisjoint(("lines", *_PARTS)):
            total = count
        if total:
            seen.totals[path] = total
        verdict, overlap = seen.verdict(path, start, count, text)
        self.keep(total_lines=total, lines=[start, start + count - 1], content=verdict,
                  overlap=overlap if verdict != "changed" and overlap[1] < overlap[2] else [])

    def failed(self, message: str, kind: str) -> None:
        """What is kept of a failure's message is a hash, the exit code and why it is nobody's
        fault."""
        if self.event.event_type is EventType.FILE_WRITE and not self.data.get("command") \
                and not _STALE.search(message[:600]):
            self.data["changes"] = []  # where it asks for a new read, that is no repetition
        code = re.match(r"(?:Exit code|Process exited with code) (\d+)", message[:200])
        self.data.setdefault("operation", self._hash_of(json.dumps(self.given, sort_keys=True)))
        self._becomes(EventType.ERROR, error_hash=self._hash_of(normal_message(message)),
                      exit_code=int(code[1]) if code else 0, kind=kind or _kind_of(message))


def _beginning(text: str, size: int) -> str:
    """The first characters of a text, without a last word that is cut off: half a secret is not
    known as one."""
    return text if len(text) <= size else text[:size].rsplit(None, 1)[0]


def _short(text: Any) -> str:
    return mask_secrets(_beginning(str(text), 600))[:300]


def _is_plain(key: str, value: Any) -> bool:
    """Whether an argument of a search is kept as it is: of what may be a prompt a hash is."""
    return key in _SCOPE_KEYS and not isinstance(value, (dict, list)) and len(str(value)) <= 80


def _kind_of(message: str) -> str:
    """Why a tool call failed, where it is nobody's fault (`failure_kind`)."""
    kind = failure_kind({"message": message[:600]})
    if message.startswith(("Exit code", "Process exited")) and kind in ("", *_OF_OUTPUT):
        # What the command printed is not about the call, unless it ends with a service that failed.
        return "transient" if _SERVICE.search(message[-400:]) else ""
    return kind


class Recorder:
    """What happened in one session, told in the order of its transcript, becomes the session: a
    window per agent, tokens laid out by growth, every response and every tool call once however
    often it is told, failures classified, texts kept as hashes, what looks like a secret masked.

    ``reader`` names the format and the agent; ``paths`` are the session's files, its own first;
    ``claim(id, output tokens)`` is True where a response counts in this session;
    ``skip(path, line, reason)`` hears of damage. ``resends_thoughts``: whether thinking stays in
    the context. Sizes are characters. Every verb returns the event it made or added to; a reader
    may add facts to its ``data``.
    """

    task = cwd = _time = _first = _last = _agent = _overhead = ""

    def __init__(self, reader: TranscriptReader, paths: List[str],
                 claim: Callable[..., bool] = lambda identity, output: True,
                 skip: Callable[[str, int, str], None] = lambda path, line, reason: None, *,
                 resends_thoughts: bool = True):
        self.reader, self.paths, self._agent_name = reader, paths, reader.agent
        self._claim, self._skip, self._resends = claim, skip, resends_thoughts
        self._windows: Dict[str, _Window] = {}
        self._calls: Dict[Any, _Call] = {}              # by agent and id
        self._owners: Data = {}               # by id of a response: who told it first
        self._tools: Dict[str, _Tool] = {}
        self._counters: Any = Counter()
        self._models: Any = Counter()                   # calls of the main agent by model
        self._source: Data = {}
        self._place: Data = {"line": 0}
        self._numbers: Data = {}                        # of long texts, by their hashes

    # where, and what session

    def at(self, time: str = "", line: Optional[int] = None, path: Optional[str] = None,
           agent: Optional[str] = None, overhead: str = "") -> None:
        """Where and when what is told next happened: ISO-8601 time, line, file (at first the
        session's own), agent ("" is the main one and the first, any other a sub-agent). What is
        not given, or is no time, stays as it was. ``overhead`` names what an agent of the
        program's own does, such as "compaction"."""
        if time and _TIME.match(time):
            self._time = time
            self._first = min(self._first or time, time)
            self._last = max(self._last, time)
        if path is not None:
            self._place = {"line": 0, "path": path} if path != self.paths[0] else {"line": 0}
        if line is not None:
            self._place["line"] = line
        if agent is not None:
            self._agent, self._overhead = agent, overhead

    def session(self, identity: str = "", cwd: str = "", version: str = "", task: str = "",
                agent: str = "") -> None:
        """Facts of the session: its id, directory, the program's version, task, the agent's name.
        Each stays as it was told first, but for the directory in which commands run from now on."""
        for name, value in (("session_id", identity), ("cwd", cwd), ("version", version)):
            if value:
                self._source.setdefault(name, value)
        self.cwd = cwd or self.cwd
        self.task = self.task or task_line(task)
        self._agent_name = agent or self._agent_name

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of the session's metadata, such as ``damaged_lines``."""
        self._counters[name] += by

    def skip(self, path: str, line: int, reason: str) -> None:
        """A line is damaged: it is counted and named."""
        self.count("damaged_lines")
        self._skip(path, line, reason)

    def hash_of(self, text: Any, where: str = "") -> str:
        """What tells a text (and where it was said) from the session's others, and from which no
        secret in it can be guessed: a hash of the masked text; of a long one, which takes long to
        mask, a number. Where a hook tells one event alone: "" for the longest."""
        text = str(text)
        if len(text) <= (GUESSABLE if self.paths[0] else HOOK_HASHED):
            return digest_of(mask_secrets(text) + where)
        number = self._numbers.setdefault(digest_of(text + where), len(self._numbers))
        return self.paths[0] and f"{number:016x}"

    def knows(self, identity: str) -> bool:
        """Whether a response of this id, or something of an agent of this name, was told."""
        return identity in self._owners or identity in self._windows

    # what entered the context

    def prompt(self, text: str, size: Optional[int] = None) -> SessionEvent:
        """A person said something. The main agent's first prompt is the task."""
        if not self.task and not self._agent:
            self.task = task_line(text)
        event = self._enter(EventType.USER_MESSAGE, len(text) if size is None else size)
        line = text.strip()
        if _SHELL_LINE.match(line):  # that the person has run
            effects = shell_effects(line.lstrip("!$ "), self.cwd)
            event.data["changes"] = effects.changes if line[0] in "!$" else effects.writes
        return event

    def context(self, source: str, size: int, **data: Any) -> SessionEvent:
        """Something else entered, from a `Source`; ``changes``: paths of what was edited with it
        outside the session."""
        return self._enter(EventType.CONTEXT_LOAD, size, source=source, **data)

    def compaction(self, size: int = 0, source: str = Source.COMPACTION,
                   **data: Any) -> SessionEvent:
        """The context was replaced by a summary of ``size`` characters, or emptied (Source.CLEAR):
        a new window begins."""
        self._window().seen = _SeenLines()
        return self.context(source, size, **data)

    def cleared(self, keys: Iterable[str], lost: int = 0) -> SessionEvent:
        """The results of these tool calls left the context, which goes on without them. Where the
        keys are not known the oldest results left, of ``lost`` tokens together."""
        left = [self._tools[key].event for key in keys if key in self._tools]
        return self.context(Source.COMPACTION, 0, left=left, lost=lost)

    def call_failed(self, text: str = "", kind: str = "") -> SessionEvent:
        """A model call failed; ``kind`` where the text does not tell (`failure_kind`)."""
        kind = kind or failure_kind({"message": text}) or "interrupted"
        data = {"error_hash": self.hash_of(normal_message(text))} if text else {}
        return self._enter(EventType.ERROR, 0, tool="model call", kind=kind, changes=[], **data)

    def _enter(self, event_type: EventType, size: int, **data: Any) -> SessionEvent:
        event = self._event(event_type, **data)
        self._window().add(event, size)
        return event

    def _event(self, event_type: EventType, model: str = "", **data: Any) -> SessionEvent:
        data.update(self._place)
        return SessionEvent("", self._time, event_type, data, model=model.lower(),
                            agent_id=self._agent)

    def _window(self) -> _Window:
        if self._agent not in self._windows:
            self._windows[self._agent] = _Window(self._agent, self._overhead)
        return self._windows[self._agent]

    # what the model did

    def call(self, identity: str, model: str, usage: Optional[Usage], *, text: int = 0,
             thinking: Optional[int] = None, thoughts: Optional[int] = None,
             complete: Optional[bool] = True,
             earlier: Sequence[Tuple[str, Usage]] = ()) -> SessionEvent:
        """A response, or more of one: told again it is the same, and its largest usage counts
        (None: its usage is not known). What is told next of this agent belongs to it.

        ``text`` and ``thinking``: characters of each (thinking 0: it is hidden); ``thoughts``:
        tokens of its thinking where the provider tells them. ``complete``: whether the output is
        final; False: a placeholder, None: not said. ``earlier``: model and usage of calls that
        were billed before it for the same response. A response that another agent told is a
        replay: what it adds counts where it was told first."""
        identity = identity or f"{self._place.get('path', '')}:{self._place['line']}"
        window, key = self._window(), (self._agent, identity)
        if key not in self._calls:
            self._owners.setdefault(identity, self._agent)
            event = self._event(EventType.AI_RESPONSE, model, response_id=identity)
            self._calls[key] = _Call(event, usage, self._owners[identity] == self._agent)
            window.calls += usage is not None
            window.add(self._calls[key])
        call = window.current = self._calls[key]
        for one in (call, self._calls[self._owners[identity], identity]):
            if usage != one.usage and usage is not None:
                one.usage = max(usage, one.usage or usage, key=sum)
            one.complete = one.complete or complete
        for its_model, its_usage in earlier[len(call.earlier):]:
            event = self._event(EventType.AI_RESPONSE, its_model or call.event.model,
                                response_id=identity, iteration=len(call.earlier))
            call.earlier.append(_Call(event, its_usage))
        if text:
            call.parts.append((text, call.event))
        if thinking and call.thinking is None:
            call.thinking = self._event(EventType.THINKING, call.event.model, response_id=identity)
        if thinking is not None:  # hidden thinking is written by the response itself
            call.hidden = call.hidden or not thinking
            call.parts.append((thinking, (thinking and call.thinking) or call.event))
        call.thoughts = call.thoughts if thoughts is None else thoughts
        return call.event

    def rolled_up(self, identity: str, model: str, usage: Usage) -> SessionEvent:
        """Several calls of which only the sum is known: their contexts are not, so what they took
        in can be laid on no event."""
        event = self._event(EventType.AI_RESPONSE, model, response_id=identity)
        if self._counts(event, usage):
            rest = self.context(Source.UNATTRIBUTED, 0, rolled_up=True)
            rest.model, rest.usage = event.model, usage._replace(read=0, output=0)
            event.usage = Usage(read=usage.read, output=usage.output)
            self._window().add(event)
        return event

    def _counts(self, event: SessionEvent, usage: Usage) -> bool:
        """Whether a response counts in this session; if so, note its model."""
        counted = self._claim(event.data["response_id"], usage.output)
        if counted:
            self._models[event.model or "default"] += not event.agent_id
        else:
            self.count("calls_elsewhere")
        return counted

    def tool(self, key: str, name: str, arguments: Any, size: Optional[int] = None, *,
             response: str = "") -> SessionEvent:
        """The response that was told last calls a tool; told twice it is one. ``size``: characters
        of the call (None: those of its name and arguments as JSON). ``response``: the id of the
        response where none was told."""
        if key and key in self._tools:
            return self._tools[key].event
        call = self._window().current
        response = call.event.data["response_id"] if call else response
        event = self._event(EventType.TOOL_CALL, call.event.model if call else "", tool=name,
                            response_id=response)
        tool = self._tools[key or f"#{len(self._tools)}"] = _Tool(self, event, arguments)
        tool.describe()
        if call:
            size = len(name) + len(_to_json(tool.given)) if size is None else size
            call.parts.append((size, event))
        return event

    def returned(self, key: str, text: Optional[str], size: Optional[int] = None, *,
                 failed: bool = False, lines: Tuple[int, int, int] = (0, 0, 0), cut: bool = False,
                 kind: str = "") -> SessionEvent:
        """A tool call returned ``size`` characters, of which ``text`` is what it printed or what a
        file holds, without the frame around it (None: not known), or why it ``failed``; ``kind``
        where the text does not tell why (`failure_kind`). ``lines``: number of the first line, how
        many there are and how many the file has, 0 where that is not said. ``cut``: it is not all
        there. A result whose call was not told is of a tool of unknown kind."""
        if key not in self._tools:
            self._tools[key] = _Tool(self, self._event(
                EventType.TOOL_CALL, tool="unknown", kind="unreadable", changes=["?"]), None)
        tool = self._tools[key]
        event, data = tool.event, tool.data
        if not tool.open:
            return event
        tool.open = False
        size = len(text or "") if size is None else size
        if tool.calls == tool.window.calls:
            tool.step[1] += size
        else:  # a later call has begun: it enters there
            tool.step[0] = None
            tool.window.add(event, size)
        began, ended = seconds_of(event.timestamp), seconds_of(self._time)
        if not event.duration_ms and began and ended:
            event.duration_ms = max(0, int((ended - began) * 1000))
        if failed:
            self.failed(key, text or "", kind)
        elif cut:
            data["truncated"] = True
        elif text is not None and event.event_type is not EventType.ERROR:
            tool.returned(text, *lines)
        if data["tool"].lower() in AGENT_TOOLS and "kind" not in data:
            data["changes"] = []
        if text and "commit" in data.get("command", ""):
            tool.keep(**{COMMITS: _COMMITTED.findall(text[:20_000])})
        return event

    def failed(self, key: str, text: str, kind: str = "") -> None:
        """A tool call has failed, which was learnt apart from its result."""
        tool = self._tools.get(key)
        if tool and tool.event.event_type is not EventType.ERROR:
            tool.failed(text, kind)

    # the session

    def finish(self, name: str = "") -> List[Session]:
        """The session told (``name``: its id where that is not the one it was told to have), as a
        list; an empty one where nothing was told."""
        if not self._windows and not self._source:
            return []
        model, path = self._settle(), self.paths[0]
        source = {"cwd": "", "version": "", **masked(self._source), "reader": self.reader.name,
                  "path": path, "session_id": self._source.get("session_id", _name_of(path))}
        if self.paths[1:]:
            source["paths"] = self.paths[1:]
        started = self._first or time_text(_changed_at(path))
        session = Session(slug(name or source["session_id"]), self._agent_name, self.task,
                          SessionStatus.COMPLETED, started, self._last or started,
                          model=mask_secrets(model), metadata=dict(+self._counters, source=source))
        keyed: List[Any] = []  # by time, and each agent's own order kept
        for window in self._windows.values():
            events = window.finish(self._resends)
            keyed += zip(itertools.accumulate((e.timestamp for e in events), max), events)
        keyed.sort(key=lambda pair: pair[0])
        for number, (_, event) in enumerate(keyed, 1):
            event.id = f"e{number}"
            event.model = mask_secrets(event.model) if event.model != model else ""
            event.input_model = mask_secrets(event.input_model)
            if "left" in event.data:
                event.data["left"] = [result.id for result in event.data["left"] if result.id]
            event.data = masked(event.data)
            session.add_event(event)
        return [session]

    def _settle(self) -> str:
        """Decide which responses count here; the model most used by the main agent."""
        for call in self._calls.values():
            if call.usage is None:
                call.event.data["unmetered"] = True
                self.count("unmetered_calls")
                continue
            call.counted = call.counted and self._counts(call.event, call.usage)
            for other in call.earlier:
                other.counted = call.counted
            if call.counted:
                self.count("redacted_thinking_calls", call.hidden)
                # Below half of what four characters per token make of its text is no output.
                text = sum(size for size, _ in call.parts)
                low = call.complete is None and 8 * call.usage.output < text
                self.count("output_lower_bound_calls", low or call.complete is False)
        return max(self._models, key=self._models.get, default="default")


def _name_of(path: str) -> str:
    """A file's name without its ending."""
    return os.path.splitext(os.path.basename(path))[0]


def _changed_at(path: str) -> float:
    """When a file was changed, in seconds since 1970; 0 where that is not known."""
    try:
        return os.path.getmtime(path)
    except OSError:
        return 0.0


# ==================================================================================================
# Readers
# ==================================================================================================

if TYPE_CHECKING:
    Claim = Callable[..., bool]  # of the id of a response and its output tokens
    Skip = Callable[[str, int, str], None]  # of a file, a line and what is damaged there


class TranscriptReader:
    """One agent's transcript format. ``name`` is the reader's, ``agent`` the sessions'; a new
    format is a subclass with ``detect`` and ``read``, appended to READERS."""

    name = agent = ""
    stamp = rb'"timestamp"\s*:\s*"([^"]{4,40})"'  # how a time is written
    home = ("", "", "")  # environment variable, where it is not set; folders in there
    separator = "\0"  # stands between several homes; no variable holds this one

    def roots(self) -> List[str]:
        """Where the agent keeps its transcripts: the folders in its homes; none by default."""
        variable, usual, folders = self.home
        homes = filter(str.strip, (os.environ.get(variable) or usual).split(self.separator))
        return [os.path.join(os.path.expanduser(home.strip()), folder)
                for home in homes for folder in folders.split()]

    def detect(self, path: str, head: bytes) -> bool:
        """Whether a file that begins with ``head`` (at most 64 KB, cut anywhere) is in this
        format."""
        raise NotImplementedError

    def companions(self, path: str) -> List[str]:
        """Further files that belong to the session of a file somebody named; none by default."""
        return []

    def kin(self, path: str, head: bytes) -> List[str]:
        """Two names: of the session that a file beginning with ``head`` tells ("": it is the only
        file that does), and of the session it is a sub-agent's of ("": none)."""
        return ["", ""]

    def group(self, files: Dict[str, List[str]]) -> List[List[str]]:
        """Which files (by path, with their `kin`) are read together: those of one session and of
        its sub-agents, its own first. Looks into no file."""
        named = {path: (own or path, parent) for path, (own, parent) in sorted(files.items())}
        parents, roots = dict(named.values()), {}  # type: Data, Data
        units: Data = {}
        for path, (own, _) in named.items():
            name, line = own, {own}  # of ancestors; a circle is led by the first that is met
            while name not in roots and parents[name] in parents and parents[name] not in line:
                name = parents[name]
                line.add(name)
            roots.update(dict.fromkeys(line, roots.get(name, name)))
            units.setdefault(roots[own], []).append(path)
        return [sorted(unit, key=lambda path: (named[path][0] != root, "archived_" in path, path))
                for root, unit in units.items()]

    def span(self, head: bytes, tail: bytes) -> List[str]:
        """The first and the last time in both ends of a file, as texts that sort ("~": none is
        found): of two files that tell as much of a response the first by them counts it."""
        first = min(re.findall(self.stamp, head), default=b"~")
        last = max(re.findall(self.stamp, tail), default=b"~")
        return [first.decode("ascii", "replace"), last.decode("ascii", "replace")]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        """The sessions of one group, usually what one `Recorder` was told. ``claim(id, output
        tokens)`` is True when the response of that id counts here; which are claimed, and with how
        much, must not depend on its answers. ``skip(path, line, reason)`` names what is damaged.
        Files are opened with `open_transcript`. OSError when one cannot be opened; nothing else is
        raised, whatever it holds."""
        raise NotImplementedError


# -- what readers share: files

_HEAD_SIZE = 1 << 16  # bytes of a file that detection and ordering look at
MAX_LINE = 1 << 26    # bytes of a line, or of a file that is one document; larger ones are named
_TOO_LONG = f"longer than {MAX_LINE >> 20} MB: left out"
_BOM = b"\xef\xbb\xbf"
_OPENER: Any = ContextVar("opener", default=open)  # what opens transcripts


def open_transcript(path: str, buffering: int = -1) -> Any:
    """A transcript opened for reading bytes, by what `read_session_files` was given. OSError when
    it cannot be, and for pipes and devices, which could block or never end."""
    opener = _OPENER.get()
    if opener is not open:
        import io
        # Some have no readline(size).
        return io.BufferedReader(opener(path, "rb"), max(buffering, 1 << 13))
    return open(path, "rb", buffering, opener=_open_regular)


@contextmanager
def _opening(opener: Any) -> Iterator[None]:
    """Context in which ``opener(path, "rb")`` opens transcripts; the built-in open stands for the
    disk."""
    token = _OPENER.set(opener)
    try:
        yield
    finally:
        _OPENER.reset(token)


def _head_of(path: str) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    with suppress(OSError), open_transcript(path) as file:
        return file.read(_HEAD_SIZE) or b""
    return b""


def _value_in(head: bytes, key: bytes, prefix: bytes = b"") -> str:
    """The first text under a key in a file's beginning; "" where there is none."""
    match = re.search(rb'"%s"\s*:\s*"(%s[^"]{1,200})"' % (key, prefix), head)
    return match[1].decode("utf-8", "replace") if match else ""


def numbered_lines(path: str, skip: Optional[Skip] = None) -> Iterator[Tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, as bytes; byte order marks are dropped. A line
    longer than MAX_LINE goes to ``skip``. OSError as `open_transcript`."""
    with open_transcript(path, 1 << 20) as file:
        lines = iter(functools.partial(file.readline, MAX_LINE), b"")
        for number, line in enumerate(lines, 1):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                if skip:
                    skip(path, number, _TOO_LONG)
            else:
                yield number, line.lstrip(_BOM)  # in mid-file where files were joined by cat


def transcript_entries(path: str, skip: Skip, broken: Any = None) -> Iterator[Tuple[int, Data]]:
    """The objects of a JSONL file with their line numbers, or the objects of a file that is one
    document, with 0. A last line that is not finished is left out, other damage goes to ``skip``;
    ``broken(line, bytes)`` is shown lines that are no JSON. OSError as `open_transcript`."""
    for number, line in numbered_lines(path, skip):
        if number == 1 and line.strip() in (b"{", b"["):
            with open_transcript(path) as file:
                number, line = 0, file.read(MAX_LINE + 1).lstrip(_BOM)
            if len(line) > MAX_LINE:
                skip(path, 1, _TOO_LONG)
                return
        entries: List[Any] = []
        try:
            value = json.loads(line.decode("utf-8", "replace"))
            entries = value if value.__class__ is list and not number else [value]
        except (ValueError, RecursionError) as error:
            if line.strip() and (not number or line.endswith(b"\n")):
                skip(path, number or 1, f"not JSON: {error}")
                if broken:
                    broken(number, line)
        for entry in entries:
            if entry.__class__ is dict:
                yield number, entry
            else:
                skip(path, number or 1, f"not an object but a {type(entry).__name__}")
        if not number:
            return


def places_of(path: str, key: bytes) -> Dict[Any, int]:
    """The line at which each text under a key (a regular expression) stands first, in a file that
    is one JSON document."""
    found: Data = {}
    for number, line in numbered_lines(path):
        for identity in re.findall(rb'"(?:%s)"\s*:\s*"([^"]{1,200})"' % key, line):
            found.setdefault(identity.decode("utf-8", "replace"), number)
    return found


def _content(content: Any) -> Tuple[str, int]:
    """The text of a message or a tool's output (a text, or parts with texts and images), and its
    size in characters."""
    if isinstance(content, dict):
        content = [content] if "text" in content else content.get("content", content.get("output"))
    parts = content if isinstance(content, list) else [content]
    images = sum("image" in _text(part, "type") or "inlineData" in _as_dict(part) for part in parts)
    text = "\n".join(_text(part) or _text(part, "text") for part in parts)
    return text, len(text) + images * IMAGE_CHARACTERS


# -- Claude Code

_NOT_HUMAN = ("<command-name>", "<command-message>", "<local-command-stdout>",
              "<local-command-stderr>", "<local-command-caveat>", "<bash-input>", "<bash-stdout>",
              "<bash-stderr>", "<task-notification>", "<system-reminder>", "<ide_opened_file>",
              "<ide_selection>", "[Request interrupted by user", "Caveat: The messages below")
_PLACEHOLDERS_FROM = (2, 1, 8)  # the first version with responses whose output is never filled in
_OVERHEAD = {"acompact": "compaction", "aprompt_suggestion": "suggestion"}  # by agents' ids
_UUID = _Pattern(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$")
_SUBAGENTS = f"{os.sep}subagents{os.sep}"


class ClaudeCodeReader(TranscriptReader):
    """Claude Code: one JSONL file per session, sub-agents in files of their own or inline. A
    response is spread over several lines that repeat its usage, with an output that grows; whole
    files repeat others (resume, fork)."""

    name = "claude-code"
    agent = "CLAUDE-CODE"
    home = ("CLAUDE_CONFIG_DIR", "~/.claude,~/.config/claude", "projects")
    separator = ","

    def detect(self, path: str, head: bytes) -> bool:
        return b'"sessionId"' in head and any(
            mark in head for mark in (b'"parentUuid"', b'"leafUuid"', b'"isSidechain"')) \
            or head.startswith(b'{"type":"summary"') and b'"leafUuid"' in head

    def companions(self, path: str) -> List[str]:
        """The files of the session's sub-agents: below <session>/subagents, or beside it."""
        from glob import escape, glob
        session = os.path.splitext(os.path.abspath(path))[0]
        beside = glob(os.path.join(escape(os.path.dirname(session)), "agent-*.jsonl"))
        below = glob(f"{escape(session)}{_SUBAGENTS}**{os.sep}*.jsonl", recursive=True)
        return [file for file in beside + below if self.kin(file, _head_of(file))[1] == session]

    def kin(self, path: str, head: bytes) -> List[str]:
        """A session is named by the path of its file, which its sub-agents' tell by the folder they
        are in, or by its id."""
        if not _is_agent_file(path, head):
            return [os.path.splitext(path)[0], ""]
        session = os.path.join(os.path.dirname(path), _value_in(head, b"sessionId"))
        return ["", path.rpartition(_SUBAGENTS)[0] or session]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        return _ClaudeSession(Recorder(self, paths, claim, skip)).read()


def _is_agent_file(path: str, head: bytes) -> bool:
    return os.path.basename(path).startswith("agent-") and (
        _SUBAGENTS in path or b'"isSidechain":true' in head[:4096].replace(b": ", b":"))


class _ClaudeSession:
    """One session while its files are told."""

    def __init__(self, told: Recorder):
        self.told = told
        self.final: Optional[bool] = None  # whether an output without a stop reason is the last
        self.facts = {"sessionId": "", "cwd": "", "version": ""}  # of the first line with each
        self.command = ""                  # the first slash command, for want of a prompt
        self.mode = self.marker = ""       # of permissions; a hook that ran since the last call
        self.agent = ""                    # whose line is told
        self.called = False                # whether the main agent's context holds a response
        self.uuids: set[str] = set()
        self.tell = {"assistant": self._assistant, "user": self._user, "system": self._system,
                     "attachment": self._attachment}
        self.roots: Data = {}              # by uuid of an inline sidechain's line: its agent
        self.echoes: List[Any] = []

    def read(self) -> List[Session]:
        """Tell all files."""
        paths = self.told.paths
        for path in paths:
            is_agent = path != paths[0] or _is_agent_file(path, _head_of(path))
            own = _name_of(path)[len("agent-"):] if is_agent else ""
            self.told.at(path=path)
            for line, entry in transcript_entries(path, self.told.skip, self._broken):
                self._entry(entry, path, line, own)
        self._echoed()
        self.told.session(task=self.command)
        stem = _name_of(paths[0])
        return self.told.finish(stem if _UUID.match(stem) else "")

    def _broken(self, line: int, text: bytes) -> None:
        """A tool result in a line that is no JSON still entered the context: its size is the
        line's."""
        key = _value_in(text, b"tool_use_id")
        if key:
            self.told.at(line=line)
            self.told.returned(key, None, len(text.split(b'"toolUseResult"')[0]), cut=True)

    def _entry(self, entry: Data, path: str, line: int, own: str) -> None:
        if not all(self.facts.values()):
            for name, known in self.facts.items():
                self.facts[name] = known or _text(entry, name)
            self.told.session(*self.facts.values())
            numbers = map(int, re.findall(r"\d{1,9}", self.facts["version"])[:3])
            self.final = False if tuple(numbers) >= _PLACEHOLDERS_FROM else None
        kind = _text(entry, "type")
        if kind in ("progress", "attachment"):
            data = _as_dict(entry, "data") or _as_dict(entry, "attachment")
            hook = _text(data, "hookName")
            if hook in ("SessionStart:resume", "SessionStart:clear") and hook != self.marker:
                self.marker = hook  # the program began anew, with the context or without it
                self._at(entry, line, "")
                if hook.endswith("clear"):
                    self._cleared(entry)
                else:
                    self.told.context(Source.RESUME, 0)
            if _as_dict(data, "message", "message"):
                self.echoes.append((path, line, _text(data, "agentId"), data["message"]))
        uuid = _text(entry, "uuid")
        if kind in self.tell and not (uuid and uuid in self.uuids):
            self.uuids.add(uuid)
            self._at(entry, line, self._agent_of(entry, own))
            self.tell[kind](entry)

    def _at(self, entry: Data, line: int, agent: str) -> None:
        self.agent = agent
        self.told.at(_text(entry, "timestamp"), line, agent=agent,
                     overhead=_OVERHEAD.get(agent.partition("-")[0], ""))

    def _agent_of(self, entry: Data, own: str) -> str:
        """The agent a line belongs to: "" for the main one. Inline sidechains without an id are
        told apart by the line they begin with."""
        agent, uuid = _text(entry, "agentId"), _text(entry, "uuid")
        if own:
            return agent or own
        if entry.get("isSidechain") is not True:
            return ""
        agent = agent or self.roots.get(_text(entry, "parentUuid"), "sidechain-" + uuid[:8])
        self.roots[uuid] = agent
        return agent

    # what the model said

    def _assistant(self, entry: Data) -> None:
        message, told = _as_dict(entry, "message"), self.told
        usage, model = _as_dict(message, "usage"), _text(message, "model")
        identity = _text(message, "id") or _first_text(entry, "requestId", "uuid")
        if model == "<synthetic>":
            if entry.get("isApiErrorMessage") is True:
                told.call_failed(_content(message.get("content"))[0])
        elif identity and usage:
            blocks = [(_text(block, "type"), block) for block in _dicts(message, "content")]
            thinking = [len(_text(block, "thinking")) for kind, block in blocks if "think" in kind]
            event = told.call(
                identity, model, _claude_usage(usage),
                text=sum(len(_text(block, "text")) for kind, block in blocks if kind == "text"),
                thinking=sum(thinking) if thinking else None,
                complete=True if message.get("stop_reason") else self.final,
                # The top level of a usage leaves out all calls but the last.
                earlier=[(_text(one, "model"), _claude_usage(one))
                         for one in _dicts(usage, "iterations")[:-1]])
            if usage.get("speed") == "fast":
                event.rate = "fast"
            self.marker, self.called = "", self.called or not self.agent
            # What the bill asks: why its cache was missed, and in what settings it ran.
            facts = {CACHE_MISS: _text(message, "diagnostics", "cache_miss_reason", "type"),
                     VERSION: _text(entry, "version"), MODE: self.mode,
                     EFFORT: _text(entry, "effort", "level") or _text(entry, "effort")}
            event.data.update((name, fact[:40]) for name, fact in facts.items() if fact)
            for kind, block in blocks:
                if kind.endswith("tool_use"):
                    told.tool(_text(block, "id"), _text(block, "name"), block.get("input"))

    # what entered

    def _cleared(self, entry: Data) -> None:
        """``/clear`` in mid-file: what follows has no line before it."""
        if self.called and entry.get("parentUuid") is None:
            self.called = False
            self.told.compaction(source=Source.CLEAR)

    def _user(self, entry: Data) -> None:
        content = _under(entry, ("message", "content"))
        self.mode = _text(entry, "permissionMode") or self.mode
        if entry.get("isCompactSummary") is True:
            self.told.compaction(_content(content)[1])
            return
        text, size = "", 0
        for block in content if isinstance(content, list) else [content]:
            if _text(block, "type") == "tool_result":
                shown, characters = _content(block.get("content"))
                self.told.returned(_text(block, "tool_use_id"), _without_reminders(shown),
                                   characters, failed=block.get("is_error") is True,
                                   lines=_file_lines(entry.get("toolUseResult")))
            else:
                part, characters = _content([block])
                text, size = text + part, size + characters
        if size and entry.get("isMeta") is not True and not text.lstrip().startswith(_NOT_HUMAN):
            self.told.prompt(text, size)
        elif size:
            if "<command-name>/clear<" in text:
                self._cleared(entry)
            event = self.told.context(Source.INJECTED, size)
            line = _tagged(text, "bash-input")  # that the user has run
            if line:
                event.data["changes"] = shell_effects(line, self.told.cwd).changes
            command = _tagged(text, "command-name")[:200]
            if command:
                # The user orders what comes next, and may have changed anything before.
                event.data.update({"changes": ["?"], COMMAND: mask_secrets(command)})
                if not self.agent and not self.command:
                    self.command = f"{command} {_tagged(text, 'command-args')}"

    def _system(self, entry: Data) -> None:
        subtype = entry.get("subtype")
        if subtype == "compact_boundary":
            self.told.compaction()
        elif subtype == "microcompact_boundary":
            cleared = _as_dict(entry, "microcompactMetadata")
            keys = map(_text, _as_list(cleared, "compactedToolIds"))
            self.told.cleared(keys, *_counts(cleared, "tokensSaved"))
        elif subtype == "api_error":
            self.told.call_failed(kind="transient")

    def _attachment(self, entry: Data) -> None:
        attachment = _as_dict(entry, "attachment")
        kind = _text(attachment, "type")
        if attachment:
            event = self.told.context(Source.ATTACHMENT, _json_size(attachment), kind=kind[:40])
            edited = _text(attachment, "filename")
            if edited and kind == "edited_text_file":
                event.data["changes"] = [canonical_path(edited, self.told.cwd)]

    def _echoed(self) -> None:
        """Tell the responses that only progress lines hold, and what their agents were told in
        between."""
        told = self.told
        names = {name for _, _, agent, inner in self.echoes
                 for name in (agent, _text(inner, "message", "id"))}
        known = set(filter(told.knows, names))
        for path, line, agent, inner in self.echoes:
            told.at(path=path)
            self._at(inner, line, agent)
            identity = _text(inner, "message", "id") or line
            if inner.get("type") == "assistant" and identity not in known:
                self._assistant(inner)
            elif inner.get("type") == "user" and agent not in known:
                self._user(inner)


def _tagged(text: str, tag: str) -> str:
    """What stands between a tag and its end; "" where there is none."""
    inside, closing, _ = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return inside if closing else ""


def _without_reminders(text: str) -> str:
    """What a tool returned, without what the program put before and behind it."""
    opening, closing = "<system-reminder>", "</system-reminder>"
    if text.startswith(opening) and closing in text:
        text = text.partition(closing)[2].lstrip("\n")
    if text.rstrip().endswith(closing) and "\n" + opening in text:
        text = text[:text.rindex("\n" + opening)]
        text = text[:-1] if text.endswith("\n") else text
    return text


def _file_lines(details: Any) -> Tuple[int, int, int]:
    """The first line, how many, and how many the file has, as a read's details tell them."""
    first, count, total = _counts(
        _as_dict(details, "file"), "startLine", "numLines", "totalLines")
    return first, count, total


def _claude_usage(usage: Data) -> Usage:
    hour, minutes = _counts(usage.get("cache_creation"), "ephemeral_1h_input_tokens",
                            "ephemeral_5m_input_tokens")
    entered, written, read, output = _counts(
        usage, "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
        "output_tokens")
    written = written or hour + minutes
    hour = min(hour, written)
    return Usage(entered, written - hour, hour, read, output)


# -- Codex CLI

_ROLLOUT = _Pattern(rb'^\{(?=[^\n]*"payload"\s*:)[^\n]*?"type"\s*:\s*'
                    rb'"(?:session_meta|turn_context|response_item|event_msg)"', re.M)
_OUTPUT_HEAD = _Pattern(
    r"(?:Chunk ID|Exit code|Wall time|Process exited|Process running|Command):? ?")
_EXIT_CODE = _Pattern(r"(?:Exit code: |Process exited with code |\bexit code: )(-?\d{1,9})")
_RUNNING = _Pattern(r"Process running with session ID (\d{1,18})")
_CODEX_FAILURE = _Pattern(
    r"failed in sandbox|[\w ]{1,40} failed: |error: |failed to parse function arguments|"
    r"aborted by user|execution error|unsupported (?:custom tool )?call|collab spawn failed|"
    r"tool call error", re.I)
_CODEX_CUT = _Pattern(
    r"\A(?:Total output lines: \d+)|(?:…|\.\.\. ?)\d+ (?:tokens|chars|lines) truncated|"
    r"\[\.\.\. omitted \d+ of \d+ lines")
# One of them is in every text that was cut; without a look for them a scan takes 7% longer.
_CUT_WORDS = ("Total output lines:", " truncated", "omitted ")
_INJECTED = _Pattern(r"\s*(?:<([a-z][\w -]{2,60})>[\s\S]*</\1>\s*$|# AGENTS\.md instructions|"
                     r"<[A-Z_]{4,40}>)")
_IDE_CONTEXT = "## My request for Codex:"  # what an editor adds to a prompt ends with this heading
_LAYOUT_GAP = 2  # seconds within which items that follow their token count are written
_CODEX_TOOLS = {"tool_search_call": "toolsearch"}  # names of hosted tools
_CODEX_USAGE = [f"{name}_tokens" for name in
                "input cached_input cache_write_input output reasoning_output".split()]


class CodexReader(TranscriptReader):
    """Codex CLI: one rollout per thread. Usage is the growth of the running total in
    ``token_count`` events, many of which only repeat it. Rollouts from before 0.32 have no usage
    and no times: they are not read.

    A sub-agent's rollout is a window of its parent's session where the parent is read with it.
    """

    name = "codex"
    agent = "CODEX"
    home = ("CODEX_HOME", "~/.codex", "sessions archived_sessions")

    def detect(self, path: str, head: bytes) -> bool:
        return bool(_ROLLOUT.search(head))

    def kin(self, path: str, head: bytes) -> List[str]:
        """The ids of its thread and of the thread that spawned it, in the first line."""
        first = head.partition(b"\n")[0]
        return [_value_in(first, b"id"), _value_in(first, b"parent_thread_id")]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        threads = {path: self.kin(path, _head_of(path))[0] for path in paths}
        copies: Any = {}  # an archived copy has the name of its original
        for path in paths:
            copies.setdefault((os.path.basename(path), threads[path]), path)
        told = Recorder(self, list(copies.values()), claim, skip)
        for path in told.paths:
            told.at(path=path, agent=slug(threads[path]) * (threads[path] != threads[paths[0]]))
            _Rollout(told, path).tell()
        return told.finish()


class _Rollout:
    """One rollout while it is told.

    A response's items are written before the token count that meters it (then they wait for it) or,
    to about 0.40, right after it (then the metered call takes them).
    """

    def __init__(self, told: Recorder, path: str):
        self.told, self.path, self.line = told, path, 0
        self.own = self.lineage = self.turn = self.model = self.version = self.effort = ""
        self.now = ""
        self.compacted = False  # since the last metered call
        self.total: List[int] = []  # input, cached and written in it, output, reasoning in it
        self.call = self.called_at = ""  # a metered call that takes what follows; its time
        # Time, line, whether the model wrote it, item.
        self.waiting: List[Any] = []
        self.open: Data = {}               # tool calls by their key
        self.running: Data = {}            # keys by id of a process

    def tell(self) -> None:
        """Tell the file."""
        verbs = {"session_meta": self._meta, "turn_context": self._turn, "event_msg": self._message,
                 "response_item": self._item, "compacted": self._compaction}
        for line, entry in transcript_entries(self.path, self.told.skip):
            stamp = _text(entry, "timestamp")
            self.line, self.now = line, stamp if _TIME.match(stamp) else self.now
            self.told.at(self.now, line)
            kind, payload = _text(entry, "type"), _as_dict(entry, "payload")
            if kind in verbs:
                verbs[kind](payload)
        self._tell_waiting()

    def _meta(self, meta: Data) -> None:
        name, origin = _texts(meta, "id", "forked_from_id")
        if not self.own:
            self.own, cwd, self.version, stamp = name, *_texts(
                meta, "cwd", "cli_version", "timestamp")
            self.lineage = origin or name
            self.told.at(stamp)
            self.told.session(name, cwd, self.version)
        elif name == self.lineage:  # forks repeat their ancestors' facts after their own
            self.lineage = origin or name

    def _turn(self, turn: Data) -> None:
        model, name, effort, cwd = _texts(turn, "model", "turn_id", "effort", "cwd")
        self.model, self.turn = model.lower() or self.model, name or self.turn
        self.effort = effort or self.effort
        self.told.session(cwd=cwd)

    def _message(self, message: Data) -> None:
        kind = message.get("type")
        if kind == "token_count":
            self._token_count(_as_dict(message, "info"))
        elif kind in ("task_started", "turn_aborted"):
            self._tell_waiting()
            self.turn = _text(message, "turn_id") or self.turn
        elif kind == "context_compacted" and not self.compacted or kind == "thread_rolled_back":
            self._compaction({})

    # usage

    def _token_count(self, info: Data) -> None:
        total, last = (_counts(info[name], *_CODEX_USAGE) if _as_dict(info, name) else []
                       for name in ("total_token_usage", "last_token_usage"))
        spent = last or total
        if total and self.total:
            growth = list(map(int.__sub__, total, self.total))
            if not any(growth):
                return  # said again; ``last`` may differ after a compaction
            if min(growth) >= 0 and total != last:  # else the total began anew
                spent = growth
        self.total = total or self.total
        if any(spent):
            self._metered(*spent)

    def _metered(self, entered: int, cached: int, write: int, output: int, thoughts: int) -> None:
        # A fork repeats its parent's token counts: the turn's id (or the first of the threads it
        # goes back to) and the running total are the same in both, the time is not.
        name = self.turn if len(self.turn) > 30 else self.lineage + self.turn
        identity = f"codex:{name}:{'/'.join(map(str, self.total or (self.line,)))}"
        cached = min(cached, entered)
        write = min(write, entered - cached)
        self.called_at = self.waiting[0][0] if self.waiting else self.now
        self.told.at(self.called_at)
        self._called(identity, Usage(entered - cached - write, write, 0, cached, output), thoughts)
        self._tell_waiting(identity)
        self.compacted = False

    def _called(self, identity: str, usage: Optional[Usage], thoughts: Optional[int]) -> None:
        """A call of the model; before 0.35 rollouts did not name it, and 0.34 had one default."""
        default = "gpt-5-codex" if self.version.startswith("0.34.") else UNPRICED
        event = self.told.call(identity, self.model or default, usage, thoughts=thoughts)
        if self.effort and usage:
            event.data[EFFORT] = self.effort

    def _tell_waiting(self, metered: str = "") -> None:
        """What waited was written by the metered call, which takes what follows where nothing did.
        Without one the usage of its responses never came (aborted, or a version that does not
        write it): what they wrote enters the next call."""
        waiting, self.waiting = self.waiting, []
        self.call, identity = "" if waiting else metered, metered
        for now, line, by_model, item in waiting:
            self.told.at(now, line)
            if not metered and not by_model:
                identity = ""
            elif not identity:
                identity = f"{self.path}:{line}"
                self._called(identity, None, None)
            self._tell(item, identity)

    # items

    def _item(self, item: Data) -> None:
        """What the model wrote belongs to the call just metered, or to the next. What entered the
        context stands behind what waits for its call."""
        kind, key = _text(item, "type"), self._key(item)
        wrote = kind == "reasoning" or kind.endswith("_call") or item.get("role") == "assistant"
        if wrote and key:
            self.open[key] = item
        elif key not in self.open and kind.endswith("_output"):
            return  # of a call that is not told
        if self.call and (_is_prompt(item) or wrote and _LAYOUT_GAP < (
                seconds_of(self.now) or 0) - (seconds_of(self.called_at) or 0)):
            self.call = ""
        if self.call if wrote else not self.waiting:
            self._tell(item, self.call)
        else:
            self.waiting.append((self.now, self.line, wrote, item))

    def _key(self, item: Data) -> str:
        identity = _text(item, "call_id")
        return f"{self.path}:{identity}" if identity else ""

    def _tell(self, item: Data, call: str) -> None:
        kind, key = _text(item, "type"), self._key(item)
        if kind in ("message", "agent_message"):
            text, size = _content(item.get("content"))
            if item.get("role") == "assistant":
                self.told.call(call, self.model, None, text=size)
            elif _is_prompt(item):
                self.told.prompt(text.rpartition(_IDE_CONTEXT)[2], size)
            else:
                self.told.context(
                    Source.ATTACHMENT if kind == "message" else Source.AGENT_MESSAGE, size)
        elif kind.endswith("_output"):
            self._returned(item, key, self.open[key])
        elif kind.endswith("_call"):
            self._tool(item, kind, key)

    def _tool(self, item: Data, kind: str, key: str) -> None:
        name = _text(item, "name") or _CODEX_TOOLS.get(kind) or kind[:-len("_call")]
        raw, action = item.get("arguments"), _as_dict(item, "action")
        if kind == "custom_tool_call":
            raw = {"input": _text(item, "input")}
        elif kind == "local_shell_call":
            raw = {"command": action.get("command"), "workdir": action.get("working_directory")}
        elif kind == "web_search_call":
            queries = " | ".join(filter(None, map(_text, _as_list(action, "queries"))))
            raw = {name: action[name] for name in ("pattern", "query", "url")
                   if _text(action, name)}
            raw.update({"query": queries} if queries else {})
        if _text(item, "namespace"):
            name = item["namespace"].rstrip("_") + "__" + name.lstrip("_")
        arguments = _arguments(raw)
        event = self.told.tool(key, name, arguments, len(name) + _json_size(raw))
        if name == "write_stdin":
            event.data["changes"] = ["?"] if arguments.get("chars") else []
        elif event.event_type is EventType.FILE_WRITE and "*** Begin Patch" in _as_json(raw):
            event.data.pop("command", None)  # the patch is file content

    def _returned(self, item: Data, key: str, call: Data) -> None:
        told, name, command = self.told, call.get("name"), key
        text, size, running, failed = _codex_outcome(item.get("output"))
        size = size or _json_size(item.get("tools"))
        if name == "write_stdin" and not running:
            process = _arguments(call.get("arguments")).get("session_id")
            command = self.running.pop(str(process), key)
        if text.strip() == "Exit code 1" and not told.tool(command, "", None).data.get("changes"):
            failed = False  # a search or a test says no
        if name == "write_stdin":  # input for a running command, or a look at it
            told.returned(key, None, size)
            if failed:
                told.failed(command, text)
            return
        if running:
            self.running[running] = key
        seen = name == "view_image" and not failed  # what a picture shows is not known
        told.returned(key, None if seen else text, size, failed=failed and not running,
                      cut=bool(running or any(map(text.__contains__, _CUT_WORDS))
                               and _CODEX_CUT.search(text)))

    def _compaction(self, compacted: Data) -> None:
        self._tell_waiting()
        size = sum(_content(item.get("content"))[1]
                   for item in _dicts(compacted, "replacement_history"))
        self.told.compaction(size or len(_text(compacted, "message")))
        self.compacted = True


def _is_prompt(item: Data) -> bool:
    return item.get("type") == "message" and item.get("role") == "user" \
        and not _INJECTED.match(_content(item.get("content"))[0])


def _codex_outcome(output: Any) -> Tuple[str, int, str, bool]:
    """What a tool returned, in the formats of Codex, none of which has an error flag: its output,
    the characters that entered, the id of a process that still runs, whether the call failed."""
    text, size = _content(output)
    code, failed = None, _under(output, ["success"]) is False
    if text.startswith('{"output"'):
        wrapped = _arguments(text)
        text = _text(wrapped, "output") if wrapped else text
        code = _under(wrapped, ("metadata", "exit_code"))
    head, body = "", text
    if _OUTPUT_HEAD.match(text):
        head, found, body = text.partition("\nOutput:")
        framed = bool(found) and len(head) < 2000
        head, body = (head, body.lstrip("\n")) if framed else (text[:2000], text)
    elif _CODEX_FAILURE.match(text):
        failed = True
    told, running = _EXIT_CODE.search(head or text[:300] * failed), _RUNNING.search(head)
    code = int(told[1]) if told else code
    if code.__class__ is int and code:
        failed, body = True, f"Exit code {code}\n{body}"
    return body, size, running[1] if running else "", failed


# -- Gemini CLI

_GEMINI_EXIT = _Pattern(r"(?:^|\n|\\n)Exit Code: (-?\d{1,9})")
_GEMINI_SHOWN = _Pattern(r"Showing lines (\d{1,9})-(\d{1,9}) of (\d{1,9}) total lines")
_GEMINI_LABELS = _Pattern(r"\n(?:Error|Exit Code|Signal|Background PIDs|Process Group PGID): ")


class GeminiReader(TranscriptReader):
    """Gemini CLI: one chat per file, an object (.json) or records (.jsonl) of which the last per id
    counts. Every message of the model is one call; what a rewind took back was still spent.
    Thoughts are not sent back (measured: they do not show in the growth of the context)."""

    name = "gemini-cli"
    agent = "GEMINI-CLI"
    stamp = rb'"(?:timestamp|startTime)"\s*:\s*"([^"]{4,40})"'
    home = ("GEMINI_CLI_HOME", "~", os.path.join(".gemini", "tmp"))

    def detect(self, path: str, head: bytes) -> bool:
        start = head[:4096]
        return b'"sessionId"' in start and (
            b'"projectHash"' in start or b'"startTime"' in start and b'"lastUpdated"' in start)

    def kin(self, path: str, head: bytes) -> List[str]:
        """A session goes by its id, after which the folder of its sub-agents' files is named."""
        if re.search(rb'"kind"\s*:\s*"subagent"', head[:4096]):
            return [os.path.splitext(path)[0], os.path.basename(os.path.dirname(path))]
        return [_value_in(head, b"sessionId"), ""]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        told = Recorder(self, paths, claim, skip, resends_thoughts=False)
        chats: Data = {}
        for path in paths:
            chats.setdefault(self.kin(path, _head_of(path))[0], _Chat(told)).add(path)
        main = next(iter(chats))
        for name, chat in chats.items():
            if chat.identity:
                chat.tell("" if name == main else slug(os.path.basename(name)))
        return told.finish()


class _Chat:
    """One chat, which may be in several files: what is known last of every message."""

    def __init__(self, told: Recorder):
        self.told, self.identity, self.tools = told, "", 0
        self.times: List[str] = []
        self.order: List[str] = []  # ids in the order they came; "" where messages were taken back
        self.messages: Data = {}

    def add(self, path: str) -> None:
        """Take a file in."""
        for line, entry in transcript_entries(path, self.told.skip):
            places = {} if line else places_of(path, rb"id")
            changed = _as_dict(entry, "$set")
            header = changed or (entry if "sessionId" in entry else {})
            messages = _dicts(header, "messages")
            if header:
                self.identity = self.identity or _text(header, "sessionId") or _name_of(path)
                self.times += _texts(header, "startTime", "lastUpdated")
            elif "$rewindTo" in entry:
                self.order.append("")
            else:
                messages = [entry]
            if "messages" in changed:
                kept = {_text(message, "id") for message in messages}
                self.order += [""] * (not kept.issuperset(filter(None, self.order)))
            for message in messages:
                name = _text(message, "id")
                identity = name or f"{path}:{len(self.order)}"
                if identity not in self.messages:
                    self.order.append(identity)
                self.messages[identity] = (line or places.get(name, 1), path, message)

    def tell(self, agent: str) -> None:
        """Tell the messages."""
        told = self.told
        told.session(self.identity)
        for moment in self.times:
            told.at(moment, agent=agent)
        for identity in self.order:
            if not identity:
                told.compaction(rewind=True)
                continue
            line, path, message = self.messages[identity]
            stamp, kind = _text(message, "timestamp"), message.get("type")
            told.at(stamp, line, path)
            text, size = _content(message.get("content", message.get("parts")))
            if kind == "user":
                told.prompt(text, size)
            elif kind in ("gemini", "model"):
                tokens = _as_dict(message, "tokens")
                entered, output, cached, thoughts, tool_use = _counts(
                    tokens, "input", "output", "cached", "thoughts", "tool")
                cached = min(cached, entered)
                usage = Usage(entered - cached + tool_use, 0, 0, cached, output + thoughts)
                told.call(f"{self.identity}:{identity}", _text(message, "model"),
                          usage if tokens else None, text=size,
                          thoughts=thoughts if tokens else None)
                for tool in _dicts(message, "toolCalls"):
                    told.at(stamp)
                    self._tool(tool)
            elif kind == "error":
                told.call_failed(text, "transient")

    def _tool(self, tool: Data) -> None:
        told, name, given = self.told, _text(tool, "name"), tool.get("args")
        arguments, size = _arguments(given), len(name) + _json_size(given)
        if arguments.get("offset").__class__ is int:
            arguments["offset"] += 1  # lines count from 0 there
        self.tools += 1
        key = f"{self.identity}:{self.tools}"
        told.tool(key, name, arguments, size)
        text, size, failed = _gemini_result(tool)
        shown, lines = _GEMINI_SHOWN.search(text[:600]), (0, 0, 0)
        if shown:
            text = text.partition("(truncated) ---\n")[2] or text
            start, end, total = map(int, shown.groups())
            lines = (start, end - start + 1, total)
        told.at(_text(tool, "timestamp"))
        told.returned(key, text, size, failed=failed, lines=lines,
                      kind="declined" if tool.get("status") == "cancelled" else "")


def _gemini_result(tool: Data) -> Tuple[str, int, bool]:
    """What a tool call returned: its text (a command's output alone), its size, whether it
    failed."""
    texts, size, failed = [], 0, tool.get("status") in ("error", "cancelled")
    for part in _as_list(tool, "result"):
        response = _as_dict(part, "functionResponse", "response")
        text = _first_text(response, "error", "output", "content")
        texts.append(text)
        failed = failed or bool(_text(response, "error"))
        size += len(text) or _json_size(response) if response else _content([part])[1]
    text = "\n".join(texts)
    codes = _GEMINI_EXIT.findall(text)
    if failed or tool.get("name") != "run_shell_command" \
            or not codes and not text.startswith(("Command: ", "Output: ")):
        return text, size, failed
    # What a command printed stands between labels.
    output = told = text[max(0, f"\n{text}".find("\nOutput: ")):]
    if told.startswith("Output: "):
        output = _GEMINI_LABELS.split(told[len("Output: "):], maxsplit=1)[0]
    if codes and int(codes[-1]):
        # Exit code 1 without a word is the "no" of a search or a test.
        no = codes[-1] == "1" and output.strip() in ("", "(empty)") and "\nError: (none)" in told
        return f"Exit code {codes[-1]}\n{told}", size, not no
    return output, size, False


# -- OpenTelemetry GenAI

_MODEL_CALLS = "chat generate_content text_completion embeddings".split()
_WITH_USAGE = (*_MODEL_CALLS, "invoke_agent")
_OTEL_USAGE = [names.split() for names in (
    # input, output, cache reads, cache writes, reasoning, by all their names
    "gen_ai.usage.input_tokens gen_ai.usage.prompt_tokens",
    "gen_ai.usage.output_tokens gen_ai.usage.completion_tokens",
    """gen_ai.usage.cache_read.input_tokens gen_ai.usage.cache_read_input_tokens
    gen_ai.usage.cached_input_tokens""",
    "gen_ai.usage.cache_creation.input_tokens gen_ai.usage.cache_creation_input_tokens",
    "gen_ai.usage.reasoning.output_tokens gen_ai.usage.reasoning_output_tokens")]
_NESTED = 100         # spans inside each other that are followed; real ones are fewer than 20
_LATEST = 4 * 10**18  # nanoseconds since 1970: the year 2096; what is later is no time


class OtelReader(TranscriptReader):
    """OpenTelemetry GenAI spans as OTLP/JSON: one object per line, or one document.

    A session is a conversation id, or a trace where there is none. Only leaf model calls are
    counted; an agent's span stands for them where it has usage and none of them was written.
    """

    name = "otel"
    agent = "OTEL"
    stamp = rb'"startTimeUnixNano"\s*:\s*"([^"]{4,40})"'

    def detect(self, path: str, head: bytes) -> bool:
        return bool(re.match(rb'\s*\{\s*"resource_?[sS]pans"\s*:', head))

    def kin(self, path: str, head: bytes) -> List[str]:
        """The files of one folder: an exporter spreads a conversation over them."""
        return [os.path.dirname(path), ""]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        told = Recorder(self, paths, claim, skip)  # the first has the damage of all files
        spans: Data = {}
        by_trace: Data = {}
        for path in paths:
            for span in _spans_of(path, told.skip):
                spans.setdefault(span.identity, span)
        for span in spans.values():
            span.above = spans.get(f"otel:{span.trace}:{span.parent}")
            if span.conversation:
                by_trace.setdefault(span.trace, span.conversation)
        conversations: Data = {}
        for span in sorted(spans.values(), key=lambda span: span.start):
            identity = next((one.conversation for one in _ancestry(span) if one.conversation),
                            by_trace.get(span.trace, span.trace))
            conversations.setdefault(identity, []).append(span)
        sessions: List[Session] = []
        for identity, members in conversations.items():
            if any(span.operation for span in members):
                own = list(dict.fromkeys(span.path for span in members))
                told.paths = own[:1] + sorted(own[1:])
                _Conversation(told, members).tell(identity)
                sessions += told.finish()
                told = Recorder(self, paths, claim, skip)
        return sessions


class _Span:
    """One span: names, nanoseconds and attributes in their Python types."""

    above: Optional[_Span] = None

    def __init__(self, span: Data, service: Data, path: str, line: int):
        self.given, self.service = _attributes(span.get("attributes")), service
        self.path, self.line, self.name = path, line, _text(span, "name")
        self.trace, self.id, above = (_text(_either(span, key)) for key in (
            "traceId", "spanId", "parentSpanId"))
        self.parent = above or self.text("virtual_parent.genai")
        start, end = (min(max(0, _integer(_either(span, f"{key}TimeUnixNano"))), _LATEST)
                      for key in ("start", "end"))
        self.start, self.end = start, max(start, end) if start else 0
        self.message = _text(span, "status", "message") or self.text("error.type")
        self.failed = bool(self.text("error.type")) or _under(span, ("status", "code")) in (
            2, "2", "STATUS_CODE_ERROR")
        self.operation = self.text("gen_ai.operation.name")
        self.conversation = self.text("gen_ai.conversation.id", "session.id")
        self.identity = f"otel:{self.trace}:{self.id}"
        self.model = self.text("gen_ai.response.model", "gen_ai.request.model")
        found = [[_count_of(_integer(self.given[key])) for key in keys if key in self.given]
                 for keys in _OTEL_USAGE]
        self.has_usage, self.usage = any(found), [counts[0] if counts else 0 for counts in found]

    def text(self, *names: str) -> str:
        """The first of these attributes that is a text which says something."""
        return _first_text(self.given, *names)


def _either(value: Any, key: str) -> Any:
    """What stands under a key, written so or with underscores."""
    value = _as_dict(value)
    return value[key] if key in value else value.get(re.sub("(?=[A-Z])", "_", key).lower())


def _spans_of(path: str, skip: Skip) -> Iterator[_Span]:
    for line, entry in transcript_entries(path, skip):
        places = {} if line else places_of(path, rb"spanId|span_id")
        for group in _dicts(_either(entry, "resourceSpans")):
            service = _attributes(_under(group, ("resource", "attributes")))
            for scope in _dicts(_either(group, "scopeSpans")):
                for span in _dicts(scope, "spans"):
                    place = line or places.get(_text(_either(span, "spanId")), 1)
                    yield _Span(span, service, path, place)


def _attributes(pairs: Any, depth: int = 0) -> Data:
    return {pair["key"]: _attribute(pair.get("value"), depth) for pair in _dicts(pairs)
            if _text(pair, "key")}


def _attribute(value: Any, depth: int) -> Any:
    """An OTLP value ({"intValue": "3"}) as a Python one; None for what is none."""
    for key, given in _as_dict(value).items():
        kind = key.lower().replace("_", "")
        if kind == "intvalue":
            return _integer(given)
        if kind in ("stringvalue", "doublevalue", "boolvalue"):
            return given if given.__class__ in (str, int, float, bool) else None
        if depth < 20 and kind == "arrayvalue":
            return [_attribute(part, depth + 1) for part in _as_list(given, "values")]
        if depth < 20 and kind == "kvlistvalue":
            return _attributes(_under(given, ["values"]), depth + 1)
    return None


def _integer(value: Any, *keys: str) -> int:
    """A whole number under the keys, given as one or as its digits; 0 for anything else."""
    value = _under(value, keys)
    if value.__class__ is str:
        return int(value) if re.match(r"\d{1,20}\Z", value, re.A) else 0
    if value.__class__ is float and value.is_integer() and abs(value) < 1e19:
        return int(value)
    return value if value.__class__ is int else 0


def _ancestry(span: Optional[_Span]) -> Iterator[_Span]:
    """The span and those above it, nearest first."""
    seen: Set[Any] = set()
    while span and span.id not in seen and len(seen) < _NESTED:
        seen.add(span.id)
        yield span
        span = span.above


def _iso_time(nanoseconds: int) -> str:
    if not 0 < nanoseconds < _LATEST:
        return ""
    seconds, micros = divmod(nanoseconds // 1000, 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{micros:06d}Z"


class _Conversation:
    """One conversation's spans, in the order of their beginnings."""

    def __init__(self, told: Recorder, members: List[_Span]):
        self.told, self.members = told, members
        self.seen: Data = {}   # how many input messages each agent's window has seen
        self.above = {one.id for span in members if span.operation in _MODEL_CALLS
                      for one in _ancestry(span) if one is not span}
        # Cached tokens are part of the input by convention; a call with more shows otherwise.
        self.exclusive = any(
            span.usage[2] + span.usage[3] > span.usage[0]
            for span in members if span.operation in _WITH_USAGE)

    def tell(self, identity: str) -> None:
        """Tell the spans."""
        told, first = self.told, self.members[0]
        named = next((span for span in self.members if span.text("gen_ai.agent.name")), first)
        agent = named.text("gen_ai.agent.name") or _text(named.service, "service.name") or "OTEL"
        told.session(identity, version=_text(named.service, "service.version"),
                     agent=slug(agent.upper()))
        for span in self.members:
            told.at(_iso_time(span.end))
            told.at(_iso_time(span.start), span.line, span.path, self._agent_of(span))
            if span.operation == "execute_tool":
                self._tool(span)
            elif span.operation in _WITH_USAGE and span.id not in self.above:
                self._call(span)
        roots = (span.name for span in self.members if span.operation == "invoke_agent")
        told.session(task=next(roots, first.name))

    def _agent_of(self, span: _Span) -> str:
        """The agent of a span: the nearest invoke_agent that another one called; "" for the
        outermost."""
        agents = [one for one in _ancestry(span) if one.operation == "invoke_agent"]
        if len(agents) > 1:
            return slug(f"{agents[0].text('gen_ai.agent.name') or 'agent'}-{agents[0].id[:8]}")
        return "embeddings" if span.operation == "embeddings" else ""

    def _call(self, span: _Span) -> None:
        """A model call, or an agent's span without those below it."""
        told = self.told
        entered, output, read, write, thoughts = span.usage
        if not self.exclusive:
            entered = max(0, entered - read - write)
        usage = Usage(entered, write, 0, read, output)
        if span.operation == "invoke_agent":
            if any(usage):
                told.rolled_up(span.identity, span.model, usage)
            else:
                told.call(span.identity, span.model, None)
            return
        messages, agent = _messages(span.given.get("gen_ai.input.messages")), self._agent_of(span)
        seen = self.seen.get(agent, 0)
        self.seen[agent] = len(messages)
        for role, parts in messages[seen if seen <= len(messages) else 0:]:  # new in this call
            text, size = _content(parts)
            if role == "user" and size:
                told.prompt(text, size)
        if span.failed and not span.has_usage:
            told.call_failed(span.message)
            return
        answers = _messages(span.given.get("gen_ai.output.messages"))
        event = told.call(span.identity, span.model, usage if span.has_usage else None,
                          text=sum(_content(parts)[1] for _, parts in answers),
                          thoughts=min(thoughts, output))
        event.duration_ms = (span.end - span.start) // 10**6

    def _tool(self, span: _Span) -> None:
        told, given = self.told, span.given.get("gen_ai.tool.call.arguments")
        name = span.text("gen_ai.tool.name") or span.name.partition(" ")[2] or "tool"
        arguments = _arguments(given)
        event = told.tool(span.identity, name, arguments,
                          len(name) + _json_size(arguments if given is None else given),
                          response=span.parent)
        event.duration_ms = (span.end - span.start) // 10**6
        result = span.given.get("gen_ai.tool.call.result", "")
        text = result if result.__class__ is str else _as_json(result)
        if text:  # many say of every failure the same, and what failed in the result
            told.returned(span.identity, text, failed=span.failed,
                          kind=failure_kind({"message": span.message}))
        elif span.failed:
            told.failed(span.identity, span.message)


def _messages(value: Any) -> List[Tuple[Any, Any]]:
    """Role and parts of chat messages, given as objects or as JSON text."""
    if value.__class__ is str:
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    messages = []
    for message in _dicts(value):
        parts = message.get("parts") or message.get("content")
        if parts.__class__ is list:
            parts = [dict(part, text=_first_text(part, "content", "text"))
                     for part in _dicts(parts)]
        messages.append((message.get("role"), parts))
    return [] if _too_deep(value) else messages


# -- OpenCode

_OPENCODE_EXPORT = _Pattern(rb'\s*\{\s*"info"\s*:\s*\{')
_OPENCODE_LINE = _Pattern(r"(?m)^ *(\d{1,9})(?:\| ?|: )(.*)$")  # how the read tool numbers lines

_Stored = namedtuple("_Stored", "path info messages places")
_Stored.__doc__ = """A stored session: its file, facts, messages with their parts, and in which line
of the file a message begins."""


class OpenCodeReader(TranscriptReader):
    """OpenCode: its SQLite database, and exported sessions. Every assistant message is one call, or
    every step of one that has several; a session with a parent is a sub-agent of it."""

    name = "opencode"
    agent = "OPENCODE"
    stamp = rb'"created"\s*:\s*(\d{13})'

    def roots(self) -> List[str]:
        from glob import escape, glob
        data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
        home = os.environ.get("OPENCODE_DATA_DIR") or os.path.join(data, "opencode")
        return sorted(glob(os.path.join(escape(home), "opencode*.db")))

    def detect(self, path: str, head: bytes) -> bool:
        if head.startswith(b"SQLite format 3"):  # its tables may stand in the write-ahead log alone
            return os.path.basename(path).startswith("opencode")
        return b'"ses_' in head and bool(_OPENCODE_EXPORT.match(head))

    def kin(self, path: str, head: bytes) -> List[str]:
        """The ids of an exported session and of the one that called it."""
        keys = (b"", b"") if path.endswith(".db") else (b"id", b"parentID")
        return [_value_in(head, key, b"ses_") for key in keys]

    def read(self, paths: List[str], claim: Claim, skip: Skip) -> List[Session]:
        copies: List[_Stored] = []
        for path in paths:
            if path.endswith(".db"):
                copies += _opencode_database(path, skip)
                continue
            for _, entry in transcript_entries(path, skip):  # an export
                copies.append(_Stored(path, _as_dict(entry, "info"), _dicts(entry, "messages"),
                                      places_of(path, rb"id")))
        copies.sort(key=lambda one: (-_integer(one.info, "time", "updated"), -len(one.messages)))
        known: Data = {}  # of several copies the one that was written last
        for stored in copies:
            known.setdefault(_text(stored.info, "id") or stored.path, stored)
        sessions: List[Session] = []
        for family in self.group({name: [name, _text(stored.info, "parentID")]
                                  for name, stored in known.items()}):
            files = list(dict.fromkeys(known[member].path for member in family))
            told = Recorder(self, files, claim, skip)
            for member in family:
                _opencode_session(told, known[member], slug(member) if member != family[0] else "")
            sessions += told.finish()
        return sessions


def _opencode_database(path: str, skip: Skip) -> List[_Stored]:
    """The sessions of a database, which is opened for reading only."""
    import sqlite3
    from urllib.request import pathname2url
    reason = ""
    for mode in ("mode=ro", "mode=ro&immutable=1"):  # the second where no lock file can be made
        where = f"file:{pathname2url(path)}?{mode}"
        try:
            with closing(sqlite3.connect(where, uri=True, timeout=5)) as base:
                base.row_factory = sqlite3.Row
                sessions, messages, parts = ([_opencode_row(row) for row in base.execute(
                    f"SELECT rowid AS line, * FROM {table} ORDER BY id")]
                    for table in ("session", "message", "part"))
            break
        except sqlite3.Error as error:
            reason = f"cannot be read as a database: {error}"
    else:
        skip(path, 0, reason)
        return []
    below: Data = {}  # by the id of a message or of a session
    for part in parts:
        below.setdefault(_text(part, "message_id"), []).append(part)
    for message in messages:
        whole = {"info": message, "parts": below.get(_text(message, "id"), [])}
        below.setdefault(_text(message, "session_id"), []).append(whole)
    places = {_text(message, "id"): message["line"] for message in messages}
    return [_Stored(path, row, below.get(_text(row, "id"), []), places) for row in sessions]


def _opencode_row(row: Any) -> Data:
    """A row's columns, and what its JSON in ``data`` says, named as in an export."""
    columns = dict(row)
    times = {name: columns.get(f"time_{name}") for name in ("created", "updated")}
    return {"parentID": columns.get("parent_id"), "time": times,
            **_arguments(columns.get("data")), **columns}


def _opencode_time(value: Any, name: str) -> str:
    return _iso_time(_integer(value, "time", name) * 10**6)


def _opencode_session(told: Recorder, stored: _Stored, agent: str) -> None:
    """Tell a session, the main one of its family or a sub-agent's."""
    for name in ("updated", "created"):
        told.at(_opencode_time(stored.info, name), 1, stored.path, agent)
    told.session(*_texts(stored.info, "id", "directory", "version"))
    for number, message in enumerate(stored.messages):
        info, parts = _as_dict(message, "info"), _dicts(message, "parts")
        identity = _text(info, "id") or f"{stored.path}:{_text(stored.info, 'id')}:{number}"
        told.at(_opencode_time(info, "created"), stored.places.get(identity, 1))
        if info.get("role") == "assistant":
            _opencode_answer(told, identity, info, parts)
            continue
        for part in parts:
            text = _text(part, "text")
            if text and part.get("synthetic") is True:
                told.context(Source.ATTACHMENT, len(text))
            elif text:
                told.prompt(text)
    told.session(task=_text(stored.info, "title"))


def _opencode_answer(told: Recorder, message: str, info: Data, parts: List[Data]) -> None:
    """Tell a message of the model: a call, or one for each of its steps."""
    ends = [end for end, part in enumerate(parts, 1)
            if part.get("type") == "step-finish" and any(_opencode_usage(part)[0])]
    steps = [(parts[start:end], parts[end - 1]) for start, end in zip([0] + ends, ends)]
    if len(steps) < 2:  # the message repeats the tokens of its only step
        steps = [(parts, info)]
    for number, (step, metered) in enumerate(steps):
        usage, thoughts = _opencode_usage(metered)
        identity = f"{message}/{number}" if number else message
        if any(usage) or step and not info.get("error"):
            told.call(identity, _text(info, "modelID"), usage if any(usage) else None,
                      thoughts=thoughts or None)
        elif info.get("error"):
            told.call_failed(
                _text(info, "error", "data", "message") or _text(info, "error", "name"))
        for place, part in enumerate(step):
            kind, size = part.get("type"), len(_text(part, "text"))
            if kind == "text":
                told.call(identity, "", None, text=size)
            elif kind == "reasoning" and not thoughts:
                told.call(identity, "", None, thinking=size)
            elif kind == "tool":
                _opencode_tool(
                    told, f"{part.get('callID')}:{part.get('id') or (identity, place)}", part)
    if info.get("summary") is True:
        told.compaction(sum(len(_text(part, "text")) for part in parts))


def _opencode_usage(metered: Data) -> Tuple[Usage, int]:
    """The usage of a message or a step, and the reasoning in its output. Output contains reasoning,
    but where the total or the sizes show otherwise."""
    tokens = _as_dict(metered, "tokens")
    entered, output, thoughts, total = _counts(tokens, "input", "output", "reasoning", "total")
    read, write = _counts(tokens.get("cache"), "read", "write")
    apart = thoughts > output or total == entered + output + thoughts + read + write
    return Usage(entered, write, 0, read, output + thoughts * apart), thoughts


def _opencode_tool(told: Recorder, key: str, part: Data) -> None:
    """Tell a tool call and what it returned, unless it was still running."""
    state, name = _as_dict(part, "state"), _text(part, "tool")
    told.at(_opencode_time(state, "start"))
    told.tool(key, name, state.get("input"))
    told.at(_opencode_time(state, "end"))
    status, code = state.get("status"), _integer(state, "metadata", "exit")
    text = _text(state, "error" if status == "error" else "output")
    size, lines = len(text), (0, 0, 0)
    failed = status == "error" or name == "invalid" or bool(code)
    if code and status == "completed":
        text = f"Exit code {code}\n{text}"
    elif name == "read" and not failed:
        numbered = _OPENCODE_LINE.findall(text)  # without the frame around them
        if numbered:
            whole = "(End of file" in text[-99:]
            lines = (int(numbered[0][0]), len(numbered), int(numbered[-1][0]) * whole)
            text = "\n".join(line for _, line in numbered)
    if status in ("completed", "error"):
        told.returned(key, text, size, failed=failed, lines=lines,
                      cut=_under(state, ("metadata", "truncated")) is True)


READERS: List[TranscriptReader] = [
    ClaudeCodeReader(), CodexReader(), GeminiReader(), OpenCodeReader(), OtelReader()]

_UNKNOWN = "not a transcript of a known agent"


# -- what an agent tells while it works: the hooks of Claude Code

CHARACTERS_PER_TOKEN = 3.6  # over transcripts that record their output in full
_PERSISTED = 2_000  # characters of a large output that are shown, the rest is in a file


def estimated_tokens(characters: int) -> int:
    """Tokens of a text that nobody has counted, by its length."""
    return round(characters / CHARACTERS_PER_TOKEN)


def hook_event(payload: Data) -> Optional[SessionEvent]:
    """The event that a hook of Claude Code tells of, without an id; None where it tells of none. Of
    a call to be made it is the one a scan would make. No prompt and no output is kept. Tokens are
    estimates (``data["estimated"]``): a hook knows texts, not usage, line or response."""
    kind, cwd, agent, agent_type, prompt, answer = _texts(
        payload, "hook_event_name", "cwd", "agent_id", "agent_type", "prompt",
        "last_assistant_message")
    told, entered, written = Recorder(ClaudeCodeReader(), [""]), len(prompt), len(answer)
    told.session(cwd=cwd)
    told.at(now_text(), agent=agent)
    if kind == "UserPromptSubmit":
        event = told.prompt(prompt)
    elif kind in ("Stop", "SubagentStop"):
        event = told.call("", "", None)
        if kind == "SubagentStop":
            event.event_type = EventType.CUSTOM
            event.data.update(source="sub-agent", agent_type=agent_type[:80])
    elif kind == "PreCompact":
        event = told.compaction(trigger=_text(payload, "trigger")[:20])
    elif kind in ("PreToolUse", "PostToolUse", "PostToolUseFailure"):
        arguments = payload.get("tool_input")
        event = told.tool("call", _text(payload, "tool_name"), arguments)
        written = len(json.dumps(arguments, ensure_ascii=False, separators=(",", ":")))
        entered = 0 if kind == "PreToolUse" else _hook_result(told, payload)
    elif kind == "SessionEnd":
        event = told.context("", 0)
        event.event_type, event.data = EventType.SESSION_END, {"status": "COMPLETED"}
    else:
        return None
    event.tokens_input, event.tokens_output = map(estimated_tokens, (entered, written))
    event.duration_ms, = _counts(payload, "duration_ms")
    event.data.update({"estimated": True} if event.tokens else {})
    for name in ("line", "response_id"):
        event.data.pop(name, None)
    return event


def _hook_result(told: Recorder, payload: Data) -> int:
    """Tell what the tool call returned; its size in characters."""
    if payload["hook_event_name"] == "PostToolUseFailure":
        text = _text(payload, "error")
        told.returned("call", text, failed=True,
                      kind="interrupted" if payload.get("is_interrupt") is True else "")
        return len(text)
    details = _as_dict(payload, "tool_response")
    text, size = _response_text(payload.get("tool_response"))
    cut = bool(details.get("persistedOutputPath")) or True in (
        details.get("interrupted"), details.get("truncated"))
    unchanged = details.get("type") == "file_unchanged"
    told.returned("call", details["type"] if unchanged else text, lines=_file_lines(details),
                  cut=cut)
    return size


def _response_text(response: Any) -> Tuple[str, int]:
    """The text of a tool's structured response as near as can be to what the model is shown, and
    its size in characters."""
    details, (text, size) = _as_dict(response), _content(response)
    images = size - len(text)
    if details.get("isImage") is True or "base64" in _as_dict(details, "file"):
        return digest_of(_as_json(response)), IMAGE_CHARACTERS
    if "structuredPatch" in details:  # a write: the model is shown what changed, not the file
        text = "\n".join(_text(line) for hunk in _dicts(details, "structuredPatch")
                         for line in _as_list(hunk, "lines"))
    elif "stdout" in details:
        text = "\n".join(filter(None, _texts(details, "stdout", "stderr")))
    elif details and not text:
        names = "\n".join(map(str, _as_list(details, "filenames")))
        text = _text(details, "file", "content") or _text(details, "result") or names
        if not text and details.keys().isdisjoint(("file", "filenames")):
            text = _as_json({key: value for key, value in details.items()
                             if not key.startswith("duration")})
    size = len(text) + images
    return text, min(size, _PERSISTED) if details.get("persistedOutputPath") else size


_REVIVING = ("SessionStart", "UserPromptSubmit")  # an ended session goes on with these
_GONE = 86_400  # seconds without a word after which an agent that keeps no list has gone


def _transcript_of(told: Data) -> str:
    """The transcript that a hook or a session's metadata names; "" where none is."""
    path = told.get("transcript_path") or _as_dict(told, "source").get("path")
    return os.path.expanduser(_text(path))


def _last_model(path: str) -> str:
    """The model of a transcript's last answer; "" where its end holds none."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _HEAD_SIZE))
        for line in reversed(file.read().split(b"\n")):
            with suppress(ValueError, RecursionError):  # the first line is cut
                model = _text(json.loads(line), "message", "model")
                if model[:1] not in ("", "<"):
                    return model.lower()
    return ""


def _agent_runs(metadata: Data) -> bool:
    """Whether the agent of a session is at work, by the list Claude Code keeps of its processes;
    where it keeps none, by the age of the transcript."""
    path = _transcript_of(metadata)
    home = path.rpartition(os.sep + "projects" + os.sep)[0] or os.devnull
    try:
        names = os.listdir(os.path.join(home, "sessions"))
    except OSError:
        return not os.path.exists(path) or time.time() - os.path.getmtime(path) < _GONE
    for name in names:
        # What cannot be read is not of an agent, or of one that has ended.
        with suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
            with open(os.path.join(home, "sessions", name), encoding="utf-8") as file:
                entry = json.load(file)
            if entry["sessionId"] == _name_of(path):
                if os.name != "nt":  # there it would end the process
                    os.kill(entry["pid"], 0)
                return True
    return False


class LiveHooks:
    """Logs what an agent's hooks tell to the session of that id in the store of a
    `SessionOptimizer`, and guards its window."""

    def __init__(self, optimizer: Any):
        self.optimizer, self.store = optimizer, optimizer.store

    def log(self, payload: Data) -> Optional[SessionEvent]:
        """See `SessionOptimizer.log_hook`."""
        name, kind = _texts(payload, "session_id", "hook_event_name")
        if not name or not kind:
            raise InvalidValue("a hook's event is an object with session_id and hook_event_name")
        session_id, event = slug(name), hook_event(payload)
        known = os.path.lexists(self.store.find(session_id))
        if kind == "PreToolUse" or event is None and kind != "SessionStart":
            return None
        if kind == "SessionEnd" and (not known or self._caught_up(session_id, payload)):
            return None
        if not known:
            prompt, model, cwd = _texts(payload, "prompt", "model", "cwd")
            facts = {"transcript_path": _transcript_of(payload), "cwd": cwd, "live": True}
            with suppress(SessionExists):  # another hook of the same moment was first
                self.optimizer.start_session(
                    ClaudeCodeReader.agent, task_line(prompt), model, session_id, facts)
        head = self.store.head(session_id)
        live = head["metadata"].get("live") or head["status"] == SessionStatus.ACTIVE.value
        if not live and kind not in _REVIVING and not _agent_runs(head["metadata"]):
            return None  # of a hook that came late: the transcript has told it
        self._append(session_id, kind, event)
        self._name(session_id, head, payload)
        if session_id in self.optimizer._sessions:
            self.optimizer._live.refreshed(session_id)
        return event if event is not None and event.id else None

    def _append(self, session_id: str, kind: str, event: Optional[SessionEvent]) -> None:
        """Append an event, or change the session's state alone."""
        def make(footer: Data) -> Tuple[Optional[Data], Data]:
            ended, changes = footer["status"] != SessionStatus.ACTIVE.value, {}
            if ended and kind in _REVIVING:
                changes = {"status": SessionStatus.ACTIVE.value, "ended_at": ""}
            if event is None or ended and kind == "SessionEnd":
                return None, changes
            if kind == "SessionEnd":
                changes = dict(event.data, ended_at=event.timestamp)
            event.id = event_id(session_id, footer, event.timestamp)
            event.data = masked(event.data)
            return event.to_dict(), changes

        self.store.append(session_id, make)

    def _name(self, session_id: str, head: Data, payload: Data) -> None:
        """Tell what a session had to begin without: its task by the first prompt, its model by the
        transcript."""
        def name(document: Data) -> None:
            document.update(news)
            document["events"][0]["data"].update(news)

        if not head["metadata"].get("live"):
            return
        task = "" if head["task"] else task_line(_text(payload, "prompt"))
        model = _last_model(_transcript_of(payload)) if head["model"] == "default" else ""
        news = {key: text for key, text in (("task", task), ("model", model)) if text}
        if news:
            self.store.change(session_id, name)

    def _caught_up(self, session_id: str, told: Data) -> bool:
        """Put what the transcript tells in the session's place; whether there was one and it
        did."""
        path = _transcript_of(told)
        if not os.path.isfile(path):
            return False
        self.optimizer.scan([path], again=True)
        head = self.store.readable_head(session_id)
        return head is None or head["status"] != SessionStatus.ACTIVE.value

    def closed(self, session_id: str, metadata: Data) -> bool:
        """Whether this active session's agent has gone; it is ended then, with what its transcript
        tells."""
        if not _transcript_of(metadata) or _agent_runs(metadata):
            return False
        try:
            if not self._caught_up(session_id, metadata):
                self.optimizer.end_session(session_id, SessionStatus.ABANDONED)
        except SessionOptimizerError as error:
            _warn(f"session {session_id} has ended, which could not be noted: {error}")
            return False
        return True

    def guard(self, payload: Data, deny: bool) -> Optional[Data]:
        """See `SessionOptimizer.guard`."""
        session_id, call = slug(_text(payload, "session_id")), hook_event(payload)
        if payload.get("hook_event_name") != "PreToolUse" or call is None:
            return None
        agent, read = call.agent_id, call.event_type is EventType.FILE_READ
        data = dict(call.data, content="same") if read else call.data  # the file's own time tells
        repeat = self.optimizer.would_repeat(session_id, call.event_type, data, agent)
        if repeat is None or repeat["lines"] < repeat["of_lines"]:
            return None
        events = self.optimizer._sessions[session_id].events
        later = list(itertools.dropwhile(lambda event: event.id != repeat["event_id"], events))
        if read:
            files = [entry[0] for entry in call.data.get("reads", ())] or _paths_of(call.data)
            if not _unchanged_since(files, repeat["held_since"]):
                return None
        elif any(event.event_type is EventType.USER_MESSAGE for event in later):
            return None
        advice = _repeat_advice(call, repeat)
        answer = {"additionalContext": advice}
        if deny:
            refused = {"refused_repeat_of": repeat["event_id"]}
            if any(event.agent_id == agent and refused.items() <= event.data.items()
                   for event in later):
                return None
            self._append(session_id, "PreToolUse", SessionEvent(
                "", now_text(), EventType.CUSTOM, refused, agent_id=agent))
            advice += " If it is not in view any more, make the same call again."
            answer = {"permissionDecision": "deny", "permissionDecisionReason": advice}
        return {"hookSpecificOutput": {"hookEventName": "PreToolUse", **answer}}


def event_id(session_id: str, footer: Data, timestamp: str) -> str:
    """The id of the next event of a session, by its footer and the event's time."""
    return f"{session_id}_{footer['event_count']}_{timestamp[11:19].replace(':', '')}"


def _unchanged_since(paths: Iterable[str], seconds: Optional[float]) -> bool:
    """Whether every file is there and neither its content nor its name has changed since."""
    with suppress(OSError, ValueError):
        changes = [max(info.st_mtime, 0 if os.name == "nt" else info.st_ctime)  # there: of creation
                   for info in map(os.stat, paths)]
        return seconds is not None and all(change <= seconds for change in changes)
    return False


def _repeat_advice(call: SessionEvent, repeat: Data) -> str:
    """What to tell an agent that is about to read or search again."""
    size, at = counted(repeat["tokens"], "token"), repeat["timestamp"][11:16]
    held = f"since: it is still in the context (about {size}). Use that instead of"
    if call.event_type is EventType.FILE_READ:
        path = plain(_paths_of(call.data)[0], 120)
        return f"{path} was read at {at} and has not changed {held} reading it again."
    return (f"The answer to the search '{plain(call.data.get('query'), 80)}' came at {at} and "
            f"nothing was changed {held} searching again.")


def foreseen_repeat(session: Session, event: SessionEvent) -> Optional[Data]:
    """What `SessionOptimizer.would_repeat` returns for a read or search that has not been made
    yet."""
    memory = ContextMemory(_cwd_of(session))
    for earlier in session.events:
        memory.observe(earlier)
    memory.foresee(event)
    repeat = memory.repeats(event)
    if repeat is None:
        return None
    first, last = line_range(repeat.earlier.data)
    lines = max(1, last - first + 1) if event.event_type is EventType.FILE_READ else 1
    return {"event_id": repeat.earlier.id, "timestamp": repeat.earlier.timestamp,
            "tokens": repeat.earlier.tokens_input * min(repeat.covered, lines) // lines,
            "lines": repeat.covered, "of_lines": repeat.total,
            "held_since": memory.held_since(event)}


# ==================================================================================================
# Scan
# ==================================================================================================

def _unreadable(error: OSError) -> None:
    """A folder that cannot be read is named, and the others are."""
    _warn(f"{_printable(str(error.filename))} cannot be read ({error.strerror}): check its "
          "permissions; what it holds is left out")


def find_transcripts(paths: Iterable[str]) -> Iterator[Tuple[str, int, int]]:
    """Files that could be transcripts, as (path, size, mtime in ns): the files named, and .jsonl,
    .json and .db files below the directories named (dot-directories too, links are not followed). A
    path that is not there raises StorageError; one that goes meanwhile is left out."""
    for path in map(os.path.abspath, paths):
        if os.path.isdir(path):
            files = (os.path.join(folder, name)
                     for folder, _, names in os.walk(path, onerror=_unreadable)
                     for name in names if name.endswith((".jsonl", ".json", ".db")))
            stamps = ((file, _stamp_of(file, os.lstat)) for file in files)
        elif os.path.isfile(path):
            named = itertools.chain([path], *(reader.companions(path) for reader in READERS))
            stamps = ((file, _stamp_of(file)) for file in named)
        else:
            odd = os.path.exists(path)
            raise StorageError(path, "not a regular file" if odd else "there is no such file or "
                               "directory", "give a transcript or a folder that holds some")
        for file, stamp in stamps:
            if stamp:
                yield file, stamp[0], stamp[1]


def _stamp_of(path: str, look: Callable[[str], Any] = os.stat) -> List[int]:
    """Size and time of change of a file, of a database with its write-ahead log; empty where no
    regular file is."""
    try:
        info = look(path)
    except OSError:
        return []
    if not stat.S_ISREG(info.st_mode):
        return []
    log = _stamp_of(path + "-wal") if path.endswith(".db") else []
    size, changed = log or (0, 0)
    return [info.st_size + size, max(info.st_mtime_ns, changed)]


# -- what a scan is made of: functions that keep nothing, which a cluster calls as this module does

def describe_transcript(path: str, open: Any = open) -> Data:
    """What must be known of a file before it is read: ``{"path", "size" (bytes), "reader" ("": none
    knows it), "reason" (why not), "kin" (what its reader groups by), "order"}``; of two files that
    tell as much of a response the one of lower order counts it.

    Reads at most 64 KB from each end. ``open(path, "rb")`` opens files that are elsewhere than on
    this disk. Raises nothing: what cannot be read has a reason."""
    facts = {"path": path, "size": 0, "reader": "", "reason": "", "kin": [],
             "order": ["~", "~", path]}
    try:
        with _opening(open), open_transcript(path, _HEAD_SIZE) as file:
            head = file.read(_HEAD_SIZE) or b""
            facts["size"] = size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _HEAD_SIZE))
            tail = file.read(_HEAD_SIZE) or b""
        known = [reader for reader in READERS if size and reader.detect(path, head)]
        if known:
            facts.update(kin=known[0].kin(path, head), order=[*known[0].span(head, tail), path])
            facts["reader"] = known[0].name
        else:
            facts["reason"] = _UNKNOWN if size else "empty file"
    except PermissionError:
        facts["reason"] = "cannot be read: check its permissions"
    except Exception as error:  # of a client of an object store it may be anything
        facts["reason"] = _reason_of(error)
    return facts


def group_transcripts(facts: Iterable[Data]) -> List[Rows]:
    """The files that are read together, earliest first, from what `describe_transcript` said of
    each; a session's own file leads and names the unit. Files of no known agent are left out."""
    by_path = {file["path"]: file for file in facts}
    kin: Data = {}
    for path in sorted(by_path):
        kin.setdefault(by_path[path]["reader"], {})[path] = by_path[path]["kin"]
    return sorted(([by_path[path] for path in group]
                   for reader in READERS for group in reader.group(kin.get(reader.name, {}))),
                  key=lambda unit: unit[0]["order"])


def left_out(facts: Iterable[Data], named: Any = ()) -> List[Any]:
    """The files that no reader takes, as [path, 0, reason]; JSON and databases of another kind are
    left out in silence, unless somebody ``named`` them."""
    return [[file["path"], 0, file["reason"]] for file in facts if not file["reader"]
            and (file["reason"] != _UNKNOWN or file["path"] in named
                 or not file["path"].endswith((".json", ".db")))]


def _chosen(analyzers: Optional[Iterable[Any]]) -> List[Any]:
    """The analyzers given, the built-in ones where none are."""
    return [cls() for cls in BUILT_IN_ANALYZERS] if analyzers is None else list(analyzers)


def read_session_files(facts: Sequence[Data], elsewhere: Any = frozenset(), open: Any = open, *,
                       analyzers: Optional[Sequence[Any]] = None,
                       prices: Optional[PriceList] = None) -> Data:
    """What one unit of `group_transcripts` holds, as JSON: ``{"rows": [as `full_row`], "usage":
    [for each row its `usage_rows`], "responses": {id: output tokens told here}, "skipped": [[path,
    line, reason]]}``.

    ``elsewhere``: the ids of responses that other units count. The responses told do not depend on
    it, so `owners_of` can decide after all units were read, and only those that lose some are read
    again. Raises nothing, whatever the files hold: a unit that cannot be read has no rows and no
    responses, and says why."""
    chosen = _chosen(analyzers)

    def tell(session: Session, found: Data) -> None:
        found["rows"].append(full_row(session, chosen, prices=prices))
        found.setdefault("usage", []).append(usage_rows(session))

    with _collector_paused():
        return dict({"usage": []}, **read_unit(facts, elsewhere, tell, open))


def read_unit(facts: Sequence[Data], elsewhere: Any, tell: _Tell, open: Any = open) -> Data:
    """See `read_session_files`; ``tell(session, found)`` adds to what was found what is wanted of
    a session."""
    responses: Data = {}
    skipped: List[Any] = []

    def claim(identity: str, output: int = 0) -> bool:
        responses[identity] = max(output, responses.get(identity, 0))
        return identity not in elsewhere

    def skip(path: str, line: int, reason: str) -> None:
        skipped.append([path, line, reason])

    found: Data = {"rows": []}
    try:
        reader = next(reader for reader in READERS if reader.name == facts[0]["reader"])
        with _opening(open):
            sessions = reader.read([file["path"] for file in facts], claim, skip)
            for session in sessions:
                tell(session, found)
        if not sessions and not skipped:
            skip(facts[0]["path"], 0, "holds no session")
    except Exception as error:  # one file, whatever is wrong with it, costs no other its figures
        found, responses = {"rows": []}, {}
        skip(str(getattr(error, "filename", None) or facts[0]["path"]), 0, _reason_of(error))
    return dict(found, responses=responses, skipped=skipped)


def _reason_of(error: Exception) -> str:
    said = getattr(error, "strerror", None) or f"{type(error).__name__}: {plain(str(error), 200)}"
    if isinstance(error, MemoryError):
        said = "there is not enough memory for it"
    return f"cannot be read: {said}"


def owners_of(told: Iterable[Tuple[str, float, List[str]]]) -> Data:
    """Which unit counts each response, as ``{id: its order}``, from (id, output tokens, order of
    the unit that tells it): the one that tells most of it, then the earliest; the same in any
    order."""
    best: Data = {}
    for identity, output, order in told:
        mine = (-output, order)
        if identity not in best or mine < best[identity]:
            best[identity] = mine
    return {identity: order for identity, (_, order) in best.items()}


class SessionIds:
    """Gives sessions their ids: of several that want one the earliest unit's has it, the next have
    "-2", "-3" and so on behind it. ``taken``: {id: the unit that has it}; ``free(id, unit)`` may
    refuse more."""

    def __init__(self, taken: Data, free: Callable[[str, str], bool]):
        self.taken, self.free = taken, free
        self._numbers: Data = {}  # the last one given behind an id
        self._given: Dict[str, List[str]] = {}  # by unit: one may be read again

    def give(self, unit: str, wanted: Iterable[str], own: Sequence[str] = ()) -> List[str]:
        """The ids of a unit's sessions in their order; of its ``own`` from before it keeps what
        fits."""
        given: Dict[str, None] = {}
        before = dict.fromkeys((*own, *self._given.get(unit, ())))
        mine: Data = defaultdict(list)  # by the names they may have been given for
        for old in before:
            for name in {old, re.sub(r"-\d+\Z", "", old)}:
                mine[name].append(old)
        for name in wanted:
            kept = mine.get(name, ())
            for session_id in itertools.chain(kept, [name], self._numbered(name)):
                if session_id not in given and self.taken.get(session_id, unit) == unit \
                        and (session_id in before or self.free(session_id, unit)):
                    break
            self.taken[session_id] = unit
            given[session_id] = None
        self._given[unit] = list(given)
        return list(given)

    def _numbered(self, name: str) -> Iterator[str]:
        while True:
            number = self._numbers[name] = self._numbers.get(name, 1) + 1
            yield f"{name}-{number}"


def session_ids(wanted: Iterable[Tuple[str, List[str]]]) -> Data:
    """The ids of all sessions, ``{unit: [ids]}``, from what each unit of `group_transcripts` wants,
    in their order (`SessionIds`)."""
    ids = SessionIds({}, lambda session_id, unit: True)
    return {unit: ids.give(unit, names) for unit, names in wanted}


def renamed(row: Data, session_id: str) -> Data:
    """A row of a session that has another id than it wanted."""
    if row["id"] == session_id:
        return row
    return dict(row, id=session_id, bill=dict(row["bill"], rebuilds=[
        dict(rebuild, session=session_id) for rebuild in row["bill"]["rebuilds"]]))


def scan_settings(analyzers: Optional[Iterable[Any]] = None,
                  prices: Optional[PriceList] = None) -> str:
    """A hash of what rows depend on besides the files; where it differs, units are read again."""
    return settings_of(_chosen(analyzers), prices or PriceList())


# -- units read in other processes

JOBS_FROM = 20 << 20  # bytes of changed files from which other processes are worth their start
if TYPE_CHECKING:
    _Tell = Callable[[Session, Data], None]  # adds to what was found what is wanted of a session
    _Task = Tuple[str, Rows, Any]  # a unit's name and files, what others count
    _Found = Iterator[Tuple[str, Any, Data]]


def found_in(tasks: Iterable[_Task], tell: _Tell, jobs: int = 1) -> _Found:
    """What `read_unit` finds, as (name, elsewhere, found), in the order of the tasks, in this
    process or in ``jobs`` others; where they cannot start or die, what is left is read in this
    one."""
    left = list(tasks)[::-1]
    if min(jobs, len(left)) > 1 and all(type(reader).__module__ == __name__ for reader in READERS):
        yield from _found_by_workers(left, tell, min(jobs, len(left)))
    while left:  # also readers that other processes do not know
        name, facts, elsewhere = left.pop()
        yield name, elsewhere, read_unit(facts, elsewhere, tell)


def _found_by_workers(left: List[_Task], tell: Any, jobs: int) -> _Found:
    """Takes what is done from the end of ``left``; stops early where processes cannot start, cannot
    be given the work, or die."""
    import pickle
    try:
        from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
        from multiprocessing import get_context
        pickle.dumps(tell)
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker)
    except (ImportError, OSError, pickle.PicklingError, AttributeError, TypeError):
        return
    waiting, running = left[:], []  # type: List[_Task], List[Any]
    try:
        while left:
            while waiting and len(running) < 3 * jobs:
                running.append(pool.submit(_read_in_worker, *waiting.pop()[1:], tell))
            found = running.pop(0).result()
            name, _, elsewhere = left.pop()
            yield name, elsewhere, found
    except (BrokenProcessPool, OSError, pickle.PicklingError) as error:
        _warn(f"worker processes cannot be used ({error}): reading goes on in this one")
    finally:
        for process in list((pool._processes or {}).values()) if left else ():
            process.terminate()  # interrupted: what they do is of no use
        pool.shutdown()


def _begin_worker() -> None:
    """Ctrl-C is the parent's business; a worker ends with its parent, however that ends."""
    import signal
    from multiprocessing import parent_process
    from threading import Thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _read_in_worker(facts: List[Data], elsewhere: Any, tell: Any) -> Data:
    def tell_all(session: Session, found: Data) -> None:
        tell(session, found)
        found["kept"] = [(head, list(parts)) for head, parts in found.get("kept", ())]

    with _collector_paused():
        return read_unit(facts, elsewhere, tell_all)


def tell_row(analyzers: Sequence[Any], prices: PriceList, keeping: bool,
             session: Session, found: Data) -> None:
    """Add to what is found (see `read_unit`) a session's row and, where they are kept, (the header,
    the other parts of its file)."""
    found["rows"].append(full_row(session, analyzers, prices=prices))
    if keeping:
        session.source.update(masked(_place_of(str(session.source.get("cwd", "")))))
        head = session._head()
        events = map(SessionEvent.to_dict, session.events)
        parts = _lay_out({**head, **session._foot(), "events": events})
        found.setdefault("kept", []).append((head, itertools.islice(parts, 1, None)))


@functools.lru_cache(maxsize=None)
def _place_of(cwd: str) -> Data:
    """The ``work_tree`` that a directory is in and its ``repository`` (the common git directory),
    real paths; empty where there is none, or no such directory any more."""
    if not os.path.isabs(cwd) or not os.path.isdir(cwd):
        return {}
    place = os.path.realpath(cwd)
    git, parent = os.path.join(place, ".git"), os.path.dirname(place)
    if not os.path.exists(git):
        return {} if parent == place else _place_of(parent)
    with suppress(OSError, ValueError):  # of a linked work tree or a submodule: "gitdir: PATH"
        if os.path.isfile(git):
            git = os.path.join(place, read_regular(git).decode().partition("gitdir:")[2].strip())
            git = os.path.join(git, read_regular(os.path.join(git, "commondir")).decode().strip())
    return {"repository": os.path.realpath(git), "work_tree": place} if os.path.isdir(git) else {}


class TranscriptScan:
    """Finds which transcripts changed since the last scan, reads those, and counts each response
    for one session.

    ``state``: what the scans before left, and where this one keeps what it finds; None for neither.
    A unit is one session's files, named by the first: {"files", "reader", "order", "settings",
    "skipped", "lost" (responses it tells that others count)}. ``settings``: a hash of what the rows
    depend on besides the files; units read under others count as changed, and all with ``again``.
    """

    def __init__(self, state: Optional[State], paths: Optional[Iterable[str]],
                 settings: str = "", again: bool = False):
        """``paths``: None for where each agent keeps its transcripts. StorageError for one that is
        not there."""
        self.state, self.settings = state, settings
        known = state.scanned() if state else (0, {}, {}, {})  # type: Tuple[int, Data, Data, Data]
        self.generation, files, self.units, self.deleted = known
        self.away = {} if again else self.deleted  # ids of sessions that do not come back
        self.files = {path: file for path, file in files.items() if "stamp" in file
                      and (not file["unit"] or file["unit"] in self.units)}
        self.dropped: List[str] = []  # units whose files have moved or now belong to others
        self.told: Data = {}  # of the units read: outputs by id of a response
        self._news: Data = {}  # files the state does not know so
        self._before: Optional[Rows] = None  # the rows, where some were read since
        if paths is None:
            paths = [root for reader in READERS for root in reader.roots() if os.path.exists(root)]
        roots = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        units = self._look(roots)
        self.scope = sorted(units)  # the units that the paths hold
        self.changed = sorted((unit for unit in units if again
                               or self.units[unit]["settings"] != settings), key=self._order)
        folders = tuple(os.path.join(os.path.abspath(root), "") for root in roots)
        # Units below the paths whose transcript is gone.
        self.gone = sorted(name for name in self.units.keys() - units
                           if name.startswith(folders) and not os.path.exists(name))
        # What marks a scan of these paths, and where the sums of the last one are.
        self.last = _encode(["sums of", *sorted(folders)]) * all(map(os.path.isdir, roots)), files

    def _look(self, roots: List[str]) -> Any:
        """Compare what is there with the state: the units there are. Files that somebody named are
        not left out in silence."""
        seen = {path: [size, mtime] for path, size, mtime in find_transcripts(roots)}
        known = {self.files[path]["unit"] for path in seen.keys() & self.files.keys()} - {""}
        parts = {path for unit in known for path in self.units[unit]["files"]}
        for path in parts - seen.keys():  # a session is read whole, whatever part of it was named
            stamp = _stamp_of(path)
            if stamp:
                seen[path] = stamp
        fresh = {path for path, stamp in seen.items()
                 if path not in self.files or self.files[path]["stamp"] != stamp}
        units = self._regroup(seen, fresh) if fresh or parts - seen.keys() else known
        self.skipped = left_out([self.files[path] for path in seen],  # files that are in no unit
                                set(map(os.path.abspath, roots)))
        return units

    def _regroup(self, seen: Data, fresh: Any) -> Any:
        for path in fresh:
            unit = self.files.get(path, {"unit": ""})["unit"]
            facts = dict(describe_transcript(path), stamp=seen[path], unit=unit)
            self.files[path] = self._news[path] = facts
        gone: Data = defaultdict(list)  # units whose files are not there any more, by their marks
        for name in self.units:
            if not os.path.exists(name):
                gone[self._mark(name)].append(name)
        return {self._unit([file["path"] for file in group], fresh, gone)
                for group in group_transcripts(self.files[path] for path in seen)}

    def _mark(self, path: str) -> Any:
        """What tells a file that was moved from another of its name: when it begins. One that does
        not say is never taken for another."""
        begins = self.files.get(path, {"order": "~"})["order"][0]
        return os.path.basename(path) if begins != "~" else path, begins

    def _unit(self, group: List[str], fresh: Any, gone: Any) -> str:
        name = group[0]
        for path in group:
            file, before = self.files[path], self.files[path]["unit"]
            if before == path != name:
                self._drop(before)  # a sub-agent whose session has come
            if before != name:
                file["unit"], self._news[path] = name, file
        if name not in self.units:
            self._drop(next(iter(gone[self._mark(name)]), ""))
            del gone[self._mark(name)][:1]
        old = self.units.get(name, {"files": (), "lost": ()})
        if old["files"] != group or not fresh.isdisjoint(group):
            self.units[name] = {"files": group, "reader": self.files[name]["reader"],
                                "order": self.files[name]["order"], "settings": "", "skipped": [],
                                "lost": list(old["lost"])}
        return name

    def _drop(self, name: str) -> None:
        if self.units.pop(name, None):
            self.dropped.append(name)

    def _order(self, name: str) -> List[str]:
        return list(self.units[name]["order"])

    def read(self, tell: _Tell, jobs: int = 1) -> Iterator[Tuple[str, Data]]:
        """Read the changed units, earliest first, then those that lose responses to others or
        regain some; yield what was found in each as `read_unit` does (a unit may come twice: the
        last counts). ``jobs``: in how many processes; what is found is the same."""
        known = self.state.responses() if self.state else {}
        waiting = {name: set(self.units[name]["lost"]) for name in self.changed}
        for _ in range(4):  # more than twice only where files grow meanwhile
            tasks = [(name, [self.files[path] for path in self.units[name]["files"]], elsewhere)
                     for name, elsewhere in waiting.items()]
            for name, elsewhere, found in found_in(tasks, tell, jobs):
                self.told[name] = found["responses"]
                self.units[name].update(settings=self.settings, skipped=found["skipped"],
                                        lost=sorted(elsewhere & found["responses"].keys()))
                yield name, found
            waiting = self._unsettled(known) if waiting else {}

    def _unsettled(self, known: Data) -> Data:
        """The units that must be read again, each with the ids of the responses that others
        count."""
        read = [self.told.get(name, {}) for name in self.units]
        read += [known.get(name, {}) for name in (*self.told, *self.dropped)]
        in_doubt = {key for its in read for key in its}
        told: Data = {}
        for name, outputs in {**known, **self.told}.items():
            keys = outputs.keys() & in_doubt
            if keys and name in self.units:
                if name in self.told or all(map(os.path.exists, self.units[name]["files"])):
                    told[name] = {key: outputs[key] for key in keys}
                else:  # a session whose transcript is gone keeps what it has counted
                    keys -= set(self.units[name]["lost"])
                    told[name] = dict.fromkeys(keys, float("inf"))
        owners = owners_of((key, output, self._order(name)) for name, its in told.items()
                           for key, output in its.items())
        unsettled = {}
        for name in sorted(told, key=self._order):
            lost, its = set(self.units[name]["lost"]), told[name]
            others = {key for key in its if owners[key] != self._order(name)} | lost - its.keys()
            if others != lost:
                unsettled[name] = others
        return unsettled

    def take_in(self, tell: _Tell, keep: Callable[[Any, Data], None], store: Store,
                drop: Callable[[str], bool], progress: Any, jobs: int = 1) -> None:
        """Read what changed, but for sessions that were deleted: ``tell`` (see `read_unit`) makes a
        session's row and what ``keep(it, row)`` stores (unless there is no state); ``drop`` removes
        one. ``jobs``: worker processes, 0 for as many as there are cores where more than JOBS_FROM
        bytes changed."""
        state, self._before = self.state, self._rows_in(self.scope)
        for row in self._rows_in(self.dropped) if state else ():
            drop(row["id"])
        before = state.units_of_rows() if state else {}
        own: Data = {}
        for session_id, name in before.items():
            own.setdefault(name, []).append(session_id)
        kept, gone = self.units.keys() - self.changed, self.away
        ids = SessionIds({session_id: name for session_id, name in before.items() if name in kept},
                         lambda session_id, unit: not state or _replaceable(
                             store, session_id, unit))
        for done, (name, found) in enumerate(self.read(tell, jobs or self._jobs()), 1):
            given = ids.give(name, [row["id"] for row in found["rows"]], own.get(name, ()))
            rows = list(map(renamed, found["rows"], given))
            self.rows[name] = [row for row in rows if row["id"] not in gone]
            for parts, row in zip(found.get("kept", ()), rows):
                if row["id"] not in gone:
                    keep(parts, row)
            found.clear()
            if progress:
                progress(done, max(done, len(self.changed)))
        renamed_from = [(session_id, name) for session_id, name in before.items()
                        if name in self.told and session_id not in ids.taken]
        known = state.responses() if state and renamed_from else {}
        for session_id, name in renamed_from:
            if self.rows.get(name) and known.get(name, {}).keys() <= self.told[name].keys():
                drop(session_id)  # its files tell all of it under another name now
        if state:
            self._save(state, drop)
            store.sweep(once=True)

    def _save(self, state: State, drop: Callable[[str], bool]) -> None:
        """Keep what was read, but for sessions that were deleted meanwhile."""
        late = state.save_scan(
            self._news, {name: self.units[name] for name in self.told}, self.told, self.rows,
            self.dropped, max(self.deleted.values(), default=0))
        for session_id in sorted(late):
            drop(session_id)
        for name in self.told:
            self.rows[name] = [row for row in self.rows[name] if row["id"] not in late]

    def _jobs(self) -> int:
        size = sum(self.files[path]["size"] for name in self.changed
                   for path in self.units[name]["files"])
        if size < JOBS_FROM:
            return 1
        cores = getattr(os, "sched_getaffinity", None)
        return len(cores(0)) if cores else os.cpu_count() or 1

    def _rows_in(self, units: Iterable[str]) -> Rows:
        return [row for unit in units for row in self.rows.get(unit, ())]

    @functools.cached_property
    def rows(self) -> Data:
        """The rows by unit: of those in scope as the state has them, of others once they are
        read."""
        return self.state.rows_of(self.scope + self.dropped) if self.state else {}

    def result(self, agent: str, since: Optional[datetime], project: str) -> Data:
        """What `SessionOptimizer.scan` returns."""
        after, wanted = since_seconds(since), agent_key(agent)
        rows = self._rows_in(self.scope)
        chosen = [row for row in rows
                  if wanted in ("", agent_key(row["agent"]), row["source"])
                  and (after is None
                       or (seconds_of(row["ended_at"] or row["started_at"]) or 0.0) >= after)
                  and (not project or project in row["project"] or project in row["path"])]
        skipped = [entry for unit in self.scope for entry in self.units[unit]["skipped"]]
        kept = list(self.state.units_of_rows().values()) if self.state and self.gone else []
        found = selection(rows, sum(map(kept.count, self.gone)))
        before = rows if self._before is None else self._before
        return dict(scan_result(chosen, skipped + self.skipped, found),
                    changes=self._changes(before, rows))

    def _changes(self, before: Rows, after: Rows) -> str:
        """What is new, or gone, since the last scan of these folders (of others: since the rows
        were as before), in words; keeps the sums for the next one."""
        key, known = self.last
        now, last = _sums_of(after), known.get(key) or _sums_of(before)
        if key and self.state and known.get(key) != now and (known or now[0]):
            with suppress(StorageError):  # a store for reading only
                self.state.save_scan({key: now}, {}, {}, {}, (), 0)
        *news, cost = (new - old for new, old in zip(now, last))
        told = map(counted, news, ("session", "model call", "token"), ("+,",) * 3)
        text = f"since the last scan: {', '.join(told)}, {cost:+.4f} USD"
        return "" if not last[0] else text if any((*news, cost)) else "nothing since the last scan"


def _sums_of(rows: Rows) -> List[Any]:
    sums = scan_totals(rows)
    return [sums["sessions"], sums["model_calls"], sum(sums["tokens"].values()),
            sums["estimated_cost"]]


def scan_result(rows: Iterable[Data], skipped: Iterable[List[Any]],
                found: Optional[Data] = None) -> Data:
    """What a scan says of the rows and the skipped lines of all units, given in any order, and of
    what it ``found`` (else these)."""
    rows = sorted(rows, key=lambda row: (row["started_at"], row["id"]))
    return {"sessions": [dict(row, **in_usd({name: row[name] for name in _IN_PICO}))
                         for row in rows],
            "totals": scan_totals(rows), **billed(rows),
            "skipped": [dict(zip(("path", "line", "reason"), entry)) for entry in sorted(skipped)],
            "changes": "", "found": found or selection(rows)}


def usage_rows(session: Session) -> Rows:
    """The session's usage by UTC day, model, tool and project: ``{"day", "model", "tool",
    "project", "calls", "uncached_input", "cache_write_5m", "cache_write_1h", "cache_read",
    "output", "cost"}``, tokens and whole pico-dollars that add up to the session's. What a call
    took in and read falls on its day, what it wrote on the day it was written; ``tool``: "" where
    none."""
    sums: Dict[Any, List[int]] = {}

    def book(stamp: str, event: SessionEvent, payer: Tuple[str, str], *figures: int) -> None:
        tool, cost = str(event.data.get("tool") or ""), session.prices.lookup(*payer).cost
        key = days_of(stamp or session.started_at)[1], payer[0], tool
        figures = (*figures, cost(figures[1:]))
        sums[key] = list(map(sum, zip(figures, sums.get(key, [0] * 7))))

    for step in ContextWalk(session):
        call = step.call
        if call:
            book(call.timestamp, call, (call.model or session.model, call.rate),
                 1, 0, 0, 0, step.read, 0)
        for event in step.events:
            book((call or event).timestamp, event, session.taken_by(event), 0, *event.entered, 0, 0)
            book(event.timestamp, event, (event.model or session.model, event.rate),
                 0, 0, 0, 0, 0, event.tokens_output)
    return [dict(zip(("calls", *CLASSES, "cost"), row), day=day, model=model, tool=tool,
                 project=_cwd_of(session))
            for (day, model, tool), row in sorted(sums.items()) if any(row)]


_IN_PICO = "bill replay large_reads days".split()  # columns of a row


def full_row(session: Session, analyzers: Iterable[BaseAnalyzer], *,
             prices: Optional[PriceList] = None, short: bool = False) -> Data:
    """The row of a session with its bill; ``short``: as ``summaries()`` keeps it."""
    session.prices = prices or session.prices
    analysis = Analysis(session)
    columns, report = bill_columns(analysis), charged_report(analysis, analyzers)
    return dict((summary_row if short else session_row)(session, report), **columns)


def sessions_at(paths: Iterable[str], prices: PriceList) -> List[Session]:
    """The sessions in the transcripts below these paths; nothing is stored."""
    def tell(session: Session, found: Data) -> None:
        session.prices = prices
        found["rows"].append(session)

    return [session for unit in dict(TranscriptScan(None, paths, "once").read(tell)).values()
            for session in unit["rows"]]


def billed(rows: Rows) -> Data:
    """The bill of all rows together and the advice that follows from them, in USD."""
    return {"bill": in_usd(add_bills(row["bill"] for row in rows)),
            "advice": in_usd(advice_of(rows))}


ROW_FORMAT = 5  # rises when rows of sessions get other columns: kept ones are made anew


def settings_of(analyzers: Iterable[Any], prices: PriceList) -> str:
    """A hash of what figures depend on besides the events: version, analyzers, their thresholds,
    prices of the user."""
    parts: List[Any] = [__version__, ROW_FORMAT, prices.overrides]
    for analyzer in analyzers:
        cls, state = type(analyzer), sorted(getattr(analyzer, "__dict__", ()))
        thresholds = analyzer.thresholds() if isinstance(analyzer, BaseAnalyzer) else state
        module = "" if cls in BUILT_IN_ANALYZERS else cls.__module__
        parts.append([module, cls.__qualname__, thresholds])
    return digest_of(json.dumps(parts, sort_keys=True, default=str))


def since_seconds(moment: Optional[datetime]) -> Optional[float]:
    """Seconds since 1970 of a datetime (without a zone: local), None for none; InvalidValue for
    anything else."""
    if moment is None:
        return None
    if not hasattr(moment, "isoformat"):
        raise InvalidValue(f"since is {moment!r}: give a datetime")
    return seconds_of(moment.isoformat())


def _replaceable(store: Store, session_id: str, path: str) -> bool:
    """True where no session has this id, or one of this transcript's: imported before, or logged
    live by hooks."""
    if not os.path.lexists(store.find(session_id)):
        return True
    try:
        metadata = store.head(session_id)["metadata"]
    except (StorageError, SessionNotFound):
        return False
    transcript = _transcript_of(metadata)
    if not transcript:
        return bool(metadata.get("live"))  # its hooks did not name the transcript, whose id it has
    return os.path.realpath(transcript) == os.path.realpath(path)


# ==================================================================================================
# SessionOptimizer
# ==================================================================================================

class _ListedSession(Session):
    """A session of which a listing has read the ends only; its events are read when asked for."""

    _load: Any = None

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Session) and self._fields() == other._fields()

    @functools.cached_property
    def events(self) -> Any:  # type: ignore[override]
        """The events, read from the store at first use."""
        return self.__dict__.get("events", getattr(self._load(self.id), "events", []))


_SAVE_EVERY = 3.0  # seconds of reading sessions after which what they came to is kept
_TAKING_IN = RLock()  # for all of them: a lock of their own would keep them from being pickled


class _LiveSessions:
    """The sessions handed out, one object per id, which take in what was logged since; safe from
    several threads."""

    def __init__(self, store: Store):
        self.store = store
        self.sessions: Dict[str, Session] = {}
        self.found: Data = {}  # summaries of what a scan has stored
        self.marks: Data = {}  # how far each has been read

    @functools.cached_property
    def prices(self) -> PriceList:
        """See `SessionOptimizer.prices`."""
        return own_prices(self.store.root)

    def refreshed(self, session_id: str) -> Optional[Session]:
        """The session with what was logged since; None when there is none."""
        with _TAKING_IN:
            session, mark = self.sessions.get(session_id), self.marks.get(session_id)
            try:
                news = self.store.tail(session_id, mark) if session is not None and mark else None
                if session is not None and news:
                    return self._take_in(session, *news)
                with _collector_paused():
                    document, mark = self.store.load_marked(session_id, SessionEvent.from_dict)
                    stored = Session.from_dict(document)
            except (SessionNotFound, InvalidSessionId):
                if session is not None and mark is None and type(session) is Session:
                    return session  # put into this instance by hand, never stored
                self.forget(session_id)
                return None
            self.marks[session_id] = mark
            return self.adopt(stored, session)

    def _take_in(self, session: Session, events: List[Data], footer: Data,
                 mark: Any) -> Session:
        for event in events:
            session.add_event(SessionEvent.from_dict(event))
        if events or session.status.value != footer["status"]:
            session.status, session.ended_at = _status(footer["status"]), footer["ended_at"]
        self.marks[session.id] = mark
        return session

    def take_own(self, session_id: str, event: SessionEvent, mark: Any) -> None:
        """Add an event just logged; read the session anew where others logged in between."""
        with _TAKING_IN:
            session, old = self.sessions.get(session_id), self.marks.get(session_id)
            if session is None:
                return
            if old and old[:2] == mark[:2] and old[3] + 1 == mark[3]:
                session.add_event(event)
                self.marks[session_id] = mark
            else:
                self.refreshed(session_id)

    def differs(self, session: Session) -> bool:
        """Whether another session is stored under this id; one that is damaged is none."""
        try:
            old = self.refreshed(session.id)
        except DamagedSession:
            return False
        except InvalidValue:
            return True
        return old is not None and old.to_dict() != session.to_dict()

    def glimpse(self, session_id: str) -> Optional[Session]:
        """The session, not handed out; None, with a warning, when it is damaged."""
        try:
            if session_id in self.marks:
                return self.refreshed(session_id)
            with _collector_paused():
                document, _ = self.store.load_marked(
                    session_id, SessionEvent.from_dict, shown=False)
                session = Session.from_dict(document)
        except SessionNotFound:
            return None  # deleted meanwhile
        except (StorageError, InvalidValue) as error:
            _warn(f"left out: {error}")
            return None
        session.prices = self.prices
        return session

    def adopt(self, session: Session, live: Optional[Session] = None) -> Session:
        """Keep a session live under its id; an object handed out before takes over what is new."""
        if live is not None:
            for name in Session.__dataclass_fields__:
                setattr(live, name, getattr(session, name))
            session = live
        session.prices = self.prices
        self.sessions[session.id] = session
        return session

    def listed(self, session_id: str, head: Data) -> Session:
        """The session by its header and footer, its events not read yet."""
        with _TAKING_IN:
            live = self.sessions.get(session_id)
            if live is not None and session_id in self.marks:
                return self.refreshed(session_id) or live
            known = {"agent": "", "task": "", **head, **dict.fromkeys(_TOTALS), "id": session_id}
            session: Any = _ListedSession.from_dict(known)
            for name in _TOTALS:
                setattr(session, name, head.get(name) or 0)
            del session.events
            session._load = self.refreshed
            return self.adopt(session)

    def create(self, session: Session, *, replace: bool = False, sync: bool = True) -> None:
        """Store a session; InvalidValue for what JSON cannot hold."""
        events = map(SessionEvent.to_dict, session.events)
        try:
            self.store.create(session._head(), events, session._foot(), replace=replace, sync=sync)
        except (TypeError, ValueError) as error:
            raise _not_json(error, "metadata or data") from None

    def keep(self, kept: Tuple[Data, Iterable[bytes]], row: Data) -> None:
        """Store what a scan found (`tell_row`) under the id of its row."""
        header = dict(kept[0], id=row["id"])
        self.store.write(header["id"], itertools.chain([_first_part(header)], kept[1]),
                         replace=True, sync=False)
        self.forget(header["id"])
        with suppress(FileNotFoundError):  # deleted meanwhile
            info = os.stat(self.store.find(header["id"]))
            self.found[header["id"]] = dict(short_row(row), stamp=[info.st_size, info.st_mtime_ns])

    def summaries(self, settings: str, analyzers: Iterable[BaseAnalyzer], progress: Any) -> Rows:
        """The summaries of all sessions; kept ones are taken from the store while nothing changed,
        others are made and kept every few seconds: who interrupts this loses little."""
        rows = self.store.state.summaries(settings)
        stamps = {name: [info.st_size, info.st_mtime_ns] for name, info in self.store.files()}
        gone = [name for name, row in rows.items() if stamps.get(name) != row["stamp"]]
        for name in gone:
            del rows[name]
        stale, news = [name for name in stamps if name not in rows], {}
        due = time.monotonic() + _SAVE_EVERY
        for done, name in enumerate(stale, 1):
            session = self.glimpse(name)
            if session is not None:
                row = full_row(session, analyzers, short=True)
                rows[name] = news[name] = dict(row, id=name, stamp=stamps[name])
            if time.monotonic() > due:
                self.save_summaries(settings, news)
                news, due = {}, time.monotonic() + _SAVE_EVERY
            if progress:
                progress(done, len(stale))
        if news or gone:
            self.save_summaries(settings, news, set(gone) - rows.keys())
        return list(rows.values())

    def save_summaries(self, settings: str, news: Data, gone: Iterable[str] = ()) -> None:
        """Keep rows that were made; what cannot be kept is a warning."""
        try:
            self.store.state.save_summaries(settings, news, gone)
            for session_id in news:
                if not os.path.lexists(self.store.find(session_id)):
                    self.store.state.forget(session_id, False)  # deleted meanwhile
        except StorageError as error:
            _warn(f"the summaries could not be saved: {error}")

    def make_room(self, session_id: str) -> None:
        """Keep a session that has ended under another id; SessionExists for one that has not."""
        old = self.refreshed(session_id)
        if old is not None and old.status is SessionStatus.ACTIVE:
            raise SessionExists(
                f"session {session_id} is still active: end it first (end {session_id} --status "
                "ABANDONED) or use another id")
        if old is not None:
            kept = self.store.archive(session_id)
            self.forget(session_id)
            _warn(f"session {session_id} had ended and is kept as {kept}")

    def erase(self, session_id: str) -> bool:
        """Remove a session for good: a scan leaves it out."""
        mask_older(self.store)
        try:
            metadata = self.store.head(session_id).get("metadata") or {}
        except SessionOptimizerError:
            metadata = {}  # not there, or damaged
        try:
            self.store.state.forget(session_id, bool(_transcript_of(metadata)))
        except StorageError as error:
            _warn(f"session {session_id} may come back with the next scan: {error}")
        self.store.sweep(once=True)
        return self.drop(session_id)

    def drop(self, session_id: str) -> bool:
        """Remove a session; False when there is none."""
        try:
            return self.store.delete(session_id)
        except InvalidSessionId:
            return False
        finally:
            self.found.pop(session_id, None)
            self.forget(session_id)

    def forget(self, session_id: str) -> None:
        """Hand the object out no more."""
        with _TAKING_IN:
            self.sessions.pop(session_id, None)
            self.marks.pop(session_id, None)


class SessionOptimizer:
    """Sessions in a store, and what an analysis says of them.

    ``storage_path``: the store's directory (else SESSIONOPTIMIZER_HOME, ~/.sessionoptimizer).
    ``analyzers`` replace the built-in ones. ``durable``: events are on the disk before they are
    acknowledged. Sessions handed out stay live: they show what this and, at the next call that
    names them, other processes have logged. Threads may share it. StorageError when it fails."""

    def __init__(self, storage_path: Optional[str] = None,
                 analyzers: Optional[Iterable[BaseAnalyzer]] = None, *, durable: bool = False):
        self.store = Store(
            storage_path or os.environ.get("SESSIONOPTIMIZER_HOME") or os.path.join(
                os.path.expanduser("~"), ".sessionoptimizer"), warn=_warn, durable=durable)
        if storage_path:
            self.store.prepare()
        self.analyzers = _chosen(analyzers)
        self._live = _LiveSessions(self.store)
        self._sessions = self._live.sessions

    def __repr__(self) -> str:
        try:
            stored = f"{sum(1 for _ in self.store.files()):,}"
        except StorageError as error:
            stored = error.reason
        return (f"<{type(self).__name__} {self.store.root}: sessions stored: {stored}, "
                f"in use: {len(self._sessions):,}>")

    def __eq__(self, other: Any) -> bool:
        mine = self.store.root, self._settings()
        return type(other) is type(self) and (other.store.root, other._settings()) == mine

    def __hash__(self) -> int:
        return hash(self.store.root)

    def _settings(self) -> str:
        return settings_of(self.analyzers, self.prices)

    @property
    def storage_path(self) -> Any:
        """The store's directory, a pathlib.Path."""
        return _path(self.store.root)

    @property
    def sessions_dir(self) -> Any:
        """The directory of the session files, a pathlib.Path."""
        return _path(self.store.sessions)

    @property
    def reports_dir(self) -> Any:
        """The directory of the saved reports, a pathlib.Path."""
        return _path(self.store.reports)

    @property
    def prices(self) -> PriceList:
        """The built-in prices with those of the store's prices.json on top (read once).
        InvalidValue names a file or a price that cannot be used."""
        return self._live.prices

    # -- single sessions

    def start_session(self, agent: str, task: str, model: str = "default",
                      session_id: Optional[str] = None,
                      metadata: Optional[Data] = None) -> Session:
        """Begin a session and log SESSION_START. The agent is kept in upper, the model in lower
        case. Without an id it becomes ``agent_YYYYMMDD_HHMMSS``, with a suffix when taken. An id
        whose session has ended is taken over: the old session is kept as ``<id>.1``, with a
        warning. SessionExists when it is still active; InvalidSessionId, InvalidValue (metadata
        that JSON cannot hold) and StorageError otherwise."""
        session = _begun(agent, task, model, session_id, metadata)
        base, number = session.id, 1
        while True:
            try:
                self._live.create(session)
                return self._live.adopt(session)
            except SessionExists:
                if session_id:
                    self._live.make_room(session_id)
                    continue
                number += 1
                session.id = f"{base}_{number}"
                session.events[0].id = f"{session.id}_start"

    def log_event(self, session_id: str, event_type: Union[EventType, str],
                  data: Optional[Data] = None, tokens_input: int = 0, tokens_output: int = 0,
                  duration_ms: int = 0, *, usage: Optional[Usage] = None, model: str = "",
                  rate: str = "") -> Optional[SessionEvent]:
        """Append an event (``event_type`` or its name; tokens; milliseconds) and return it.
        ``usage``: a model call's tokens by how they are billed, in place of the two counts;
        ``model`` where it is not the session's; ``rate`` "fast" or "long" where billed so. None,
        with a warning, when there is no such session; one that has ended takes the event with a
        warning. InvalidValue for an unknown type, a count that is not a whole number >= 0, or data
        that JSON cannot hold."""
        if data is not None and not isinstance(data, dict):
            raise InvalidValue(f"data is a {type(data).__name__}: give an object")
        event = SessionEvent("", now_text(), _event_type(event_type), dict(data or {}),
                             tokens_input, tokens_output, duration_ms,
                             model=mask_secrets(str(model or "")).lower(), rate=_known_rate(rate))
        if usage is not None:
            try:
                event.usage = Usage(*usage)
            except TypeError:
                raise InvalidValue(f"usage is {usage!r}: give a Usage") from None
        event._check()

        def make(footer: Data) -> Tuple[Data, Data]:
            event.id = event_id(session_id, footer, event.timestamp)
            event.data = masked(event.data)
            return event.to_dict(), {}

        try:
            _, footer, mark = self.store.append(session_id, make)
        except SessionNotFound:
            _warn(f"there is no session {session_id!r}: the event was not logged; start it first")
            return None
        except InvalidValue:
            raise  # of the id
        except (TypeError, ValueError, RecursionError) as error:
            raise _not_json(error, "data") from None
        if footer["status"] != SessionStatus.ACTIVE.value:
            _warn(f"session {session_id} has ended ({footer['status']}): the event was added")
        self._live.take_own(session_id, event, mark)
        return event

    def end_session(self, session_id: str,
                    status: Union[SessionStatus, str] = SessionStatus.COMPLETED,
                    ) -> Optional[Session]:
        """End a session and log SESSION_END; a second end only changes the status. Returns the
        session; None, with a warning, when there is none. InvalidValue for an unknown status."""
        status = _status(status)
        if status is SessionStatus.ACTIVE:
            raise InvalidValue("no session ends as ACTIVE: use COMPLETED, FAILED or ABANDONED")

        def make(footer: Data) -> Tuple[Optional[Data], Data]:
            if footer["status"] != SessionStatus.ACTIVE.value:
                return None, {"status": status.value}
            now, told = now_text(), {"status": status.value}
            event = SessionEvent(f"{session_id}_end", now, EventType.SESSION_END, told)
            return event.to_dict(), dict(told, ended_at=now)

        try:
            self.store.append(session_id, make, sync=True)
        except SessionNotFound:
            _warn(f"there is no session {session_id!r} to end: check the id with list_sessions()")
            return None
        return self._live.refreshed(session_id)

    @contextmanager
    def session(self, agent: str, task: str, model: str = "default",
                session_id: Optional[str] = None,
                metadata: Optional[Data] = None) -> Iterator[Session]:
        """``with optimizer.session("forge", "Fix it") as session:`` starts a session and ends it:
        COMPLETED, or FAILED on an exception, which goes on. One that was ended inside stays as it
        is. Parameters and errors: `start_session`."""
        session = self.start_session(agent, task, model, session_id, metadata)
        status = SessionStatus.FAILED
        try:
            yield session
            status = SessionStatus.COMPLETED
        finally:
            now = self.get_session(session.id)
            if now is not None and now.status is SessionStatus.ACTIVE:
                self.end_session(session.id, status)

    def get_session(self, session_id: str) -> Optional[Session]:
        """The session with everything logged so far by any process; None when there is none.
        DamagedSession when its file cannot be read."""
        session = self._live.refreshed(session_id) if isinstance(session_id, str) else None
        if session is not None and session.status is SessionStatus.ACTIVE:
            if LiveHooks(self).closed(session_id, session.metadata):
                return self._live.refreshed(session_id)
        return session

    def list_sessions(self, agent: Optional[str] = None,
                      status: Union[SessionStatus, str, None] = None,
                      since: Optional[datetime] = None, limit: int = 100) -> List[Session]:
        """Sessions, newest first, at most ``limit``. ``since`` is a datetime (without a zone:
        local). Reads the ends of the files only; a damaged one is named in a warning."""
        wanted = None if status is None else _status(status).value
        if limit.__class__ is not int or agent is not None and not isinstance(agent, str):
            raise InvalidValue(f"agent {agent!r}, limit {limit!r}: give a text and a whole number")
        after = since_seconds(since)
        rows = [(seconds_of(head.get("started_at")) or 0.0, session_id)
                for session_id, head in self.store.headers()
                if not agent or agent_key(head.get("agent")) == agent_key(agent)]
        found: List[Session] = []
        for started, session_id in sorted(rows, reverse=True):
            if len(found) >= limit or after is not None and started < after:
                break
            head = self.store.readable_head(session_id)
            if self._closed(session_id, head):
                head = self.store.readable_head(session_id)
            if head and wanted in (None, head.get("status")):
                found.append(self._live.listed(session_id, head))
        return found

    def _closed(self, session_id: str, head: Optional[Data]) -> bool:
        """Whether a session is active no more, since its agent has gone."""
        if not head or head.get("status") != SessionStatus.ACTIVE.value:
            return False
        return LiveHooks(self).closed(session_id, head.get("metadata") or {})

    def delete_session(self, session_id: str) -> bool:
        """Remove a session and its report; False when there is none. An imported one stays away
        from later scans until they are told otherwise (``scan(again=True)``)."""
        return isinstance(session_id, str) and self._live.erase(session_id)

    def repair(self, *, discard: bool = False) -> Data:
        """Mend every stored session that can be mended, and remove what crashes left behind:
        ``{"repaired": [what was said of each], "damaged": [what keeps each of the others from
        being read], "copies": [paths of damaged files that were kept], "removed": number of other
        files removed}``. With ``discard`` the copies are removed as well."""
        mask_older(self.store)
        return self.store.repair(discard=discard)

    def import_session(self, data: Data) -> Optional[Session]:
        """Store a session given as a dict (`Session.to_dict`). A stored one of the same id that
        differs is kept as ``<id>.1``. None, with a warning that says why, when it is none."""
        try:
            session = Session.from_dict(data)
            for record in (session, *session.events):
                for name in record.__dataclass_fields__.keys() - {"id", "agent_id", "events"}:
                    setattr(record, name, masked(getattr(record, name)))
            check_id(session.id)
            _encode(session.to_dict())
        except (InvalidValue, TypeError, ValueError, RecursionError) as error:
            _warn(f"not imported: {error}")
            return None
        mask_older(self.store)
        if self._live.differs(session):
            kept = self.store.archive(session.id)
            _warn(f"session {session.id} was there already and is kept as {kept}")
        self._live.create(session, replace=True)
        self._live.forget(session.id)
        return self._live.refreshed(session.id)

    # -- what agents tell: transcripts and hooks

    def scan(self, paths: Optional[Iterable[str]] = None, *, agent: str = "",
             since: Optional[datetime] = None, project: str = "", store: bool = True,
             again: bool = False, progress: Any = None, jobs: int = 1, show: Any = None,
             shown_as: Any = ()) -> Data:
        """Read transcripts at ``paths`` (default: where each agent keeps them) and say where the
        money went. Only what changed since the last scan is read, unless ``again``, which also
        brings deleted sessions back. ``agent``, ``since`` and ``project`` (a part of the working
        directory or path) narrow what is reported; with ``store=False`` nothing is kept;
        ``progress`` is called with units done and to do; ``jobs``: processes that read (0: the
        cores, from 20 MB on), for programs under ``if __name__ == "__main__"``. Returns
        ``{"sessions", "totals", "bill", "advice", "skipped": [{"path", "line", "reason"}],
        "changes": text}``, or the JSON that ``show`` makes of it, kept for the same ``shown_as``
        while nothing changes. StorageError: a path is not there."""
        def look() -> TranscriptScan:
            return TranscriptScan(self.store.state if store else None, roots, settings, again)

        def tell() -> Data:
            with _collector_paused():
                result = scan.result(agent, since, project)
                return show(result) if show else result

        if store:
            mask_older(self.store)
        settings = self._settings()
        roots = [paths] if isinstance(paths, (str, os.PathLike)) else paths and list(paths)
        scan, lock = look(), None
        if scan.changed or scan.dropped:
            try:
                if store:
                    lock = lock_scan(self.store.root)
                    if self.store.state.generation() != scan.generation:
                        scan = look()  # another scan was faster
                with _collector_paused():
                    rows = functools.partial(tell_row, self.analyzers, self.prices, store)
                    scan.take_in(rows, self._live.keep, self.store, self._live.drop, progress, jobs)
                if store:
                    self._live.save_summaries(settings, self._live.found)
            finally:
                self._live.found = {}
                if lock is not None:
                    _release(lock)
        elif show and store and scan.scope and since is None:
            parts = (settings, _stamp_of(__file__), self.store.root, now_text()[:10], time.timezone,
                     time.tzname, scan.scope, scan.gone, scan.skipped, scan.last[0], agent, project,
                     shown_as)
            return self.store.state.shown(  # type: ignore[no-any-return]
                digest_of(json.dumps(parts)), scan.generation, tell)
        return tell()

    def whatif(self, policy: str, paths: Optional[Iterable[str]] = None, *,
               progress: Any = None) -> Data:
        """What the stored sessions, or those at ``paths``, would have cost; see `what_if`."""
        with _collector_paused():
            return what_if((lambda: map(self._live.glimpse, dict(self.store.files())))
                           if paths is None else sessions_at(paths, self.prices), policy, progress)

    def log_hook(self, payload: Data) -> Optional[SessionEvent]:
        """Log what a hook of Claude Code tells (the object it gets on standard input) to the
        session of that id, which is created when missing; one that had ended goes on at
        SessionStart or with a prompt. Returns the event; None where there is nothing to log. A
        scan of the transcript replaces the session, with the real token counts. InvalidValue when
        it is no hook's event, StorageError when it cannot be written."""
        return LiveHooks(self).log(payload)

    def guard(self, payload: Data, *, deny: bool = False) -> Optional[Data]:
        """The answer to a PreToolUse hook whose read or search would bring what its context window
        holds unchanged: advice, or with ``deny`` a refusal (of the same call once: a second try
        passes). None: let it go on. A file must not have changed on disk since it was read, and a
        search must have run since the last prompt."""
        return LiveHooks(self).guard(payload, deny)

    def would_repeat(self, session_id: str, event_type: Union[EventType, str],
                     data: Data, agent_id: str = "") -> Optional[Data]:
        """Whether a read or a search would bring what its context window still holds unchanged, by
        the rule of the analyzers: ``{"event_id", "timestamp", "tokens", "lines", "of_lines",
        "held_since"}`` of what is there (``held_since``: seconds since 1970 of the oldest read of
        the file that is still there), or None."""
        session = self.get_session(session_id)
        event = SessionEvent("", "", _event_type(event_type), masked(dict(data)),
                             agent_id=agent_id)
        return None if session is None else foreseen_repeat(session, event)

    # -- what an analysis says

    def analyze(self, session_id: str) -> Optional[OptimizationReport]:
        """The report of a session, which is also saved in the store; None when there is no such
        session. A report that cannot be saved is a warning."""
        session = self.get_session(session_id)
        if session is None:
            return None
        with _collector_paused():
            report = build_report(session, self.analyzers)
        for failure in report.analyzer_errors:
            _warn(f"an analyzer failed and its findings are missing: {failure}")
        try:
            info = os.stat(self.store.find(session_id))
            stamp = [info.st_size, info.st_mtime_ns, self._settings()]
            self.store.write_report(session_id, dict(report.to_dict(), fingerprint=stamp))
        except FileNotFoundError:
            pass  # deleted meanwhile
        except (StorageError, InvalidSessionId, TypeError, ValueError) as error:
            _warn(f"the report could not be saved: {error}")
        return report

    def export_report(self, session_id: str, format: str = "json") -> Optional[str]:
        """The report as text in one of FORMATS; None when there is no such session. InvalidValue
        for another format."""
        if not isinstance(format, str) or format not in FORMATS:
            raise InvalidValue(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
        report = self.analyze(session_id)
        return None if report is None else FORMATS[format](self._sessions[session_id], report)

    def compare_sessions(self, session_ids: Iterable[str]) -> Data:
        """Sessions side by side, their averages, the best and the worst, and what only the best
        did; ``{"error": ...}`` when fewer than two are found."""
        if isinstance(session_ids, str) or not hasattr(session_ids, "__iter__"):
            raise InvalidValue(f"session_ids is {session_ids!r}: give a list of ids")
        reports = {name: self.analyze(name) for name in dict.fromkeys(map(str, session_ids))}
        found = [(self._sessions[name], report) for name, report in reports.items() if report]
        if len(found) < 2:
            missing = ", ".join(plain(name, 60) for name, report in reports.items() if not report)
            return {"error": "Need at least 2 different sessions to compare"
                             + f"; not found: {missing}" * bool(missing)}
        return comparison_of(found)

    def agent_statistics(self, agent: str, days: int = 30) -> Data:
        """An agent's sessions ("": all) of the last ``days``: tokens, USD, average efficiency
        (0–100), the five most frequent issues, and the trend of the second half; with no sessions
        ``{"agent", "sessions": 0, "message"}``. Unchanged ones are not read again."""
        if isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 <= days <= 1e9:
            raise InvalidValue(f"days is {days!r}: give a number from 0 to 1,000,000,000")
        rows = rows_of_agent(self.summaries(days), agent)
        if rows:
            return {"agent": agent, "period_days": days, **statistics_of(rows), **billed(rows)}
        return {"agent": agent, "sessions": 0,
                "message": f"No sessions found in the last {counted(days, 'day', 'g')}"}

    def summaries(self, days: Optional[float] = None, *, progress: Any = None) -> List[Data]:
        """One `summary_row` per session, oldest first; of the last ``days``. Unchanged ones come
        from the store; a damaged one is named in a warning. ``progress`` gets how many were read
        and are to be."""
        rows = self._live.summaries(self._settings(), self.analyzers, progress)
        active = [row["id"] for row in rows if row["status"] == SessionStatus.ACTIVE.value]
        if any([self._closed(name, self.store.readable_head(name)) for name in active]):
            return self.summaries(days)
        return sorted((row for row in rows if days is None
                       or row["started"] >= time.time() - days * 86400),
                      key=lambda row: (row["started"], row["id"]))

    def alerts(self, since: Optional[datetime] = None, agent: Optional[str] = None,
               thresholds: Optional[Dict[str, float]] = None) -> List[Data]:
        """What deserves a look, the most wasted dollars first, at most one of a session and cause
        (see `alerts_of`). An id stays the same while the session does not change its kind of
        trouble; the time is that of its last event. ``since``: active since (no zone: local).
        ``thresholds`` replaces limits of ALERT_RULES by name; InvalidValue for an unknown name or a
        value that is not a number >= 0."""
        limits, after = alert_limits(thresholds), since_seconds(since)
        return sorted((alert for row in rows_of_agent(self.summaries(), agent)
                       if after is None or (seconds_of(row["last_at"]) or row["started"]) >= after
                       for alert in alerts_of(row, limits)),
                      key=lambda alert: (-alert["cost"], -(seconds_of(alert["time"]) or 0.0)))


def _begun(agent: str, task: str, model: str, session_id: Optional[str],
           metadata: Optional[Data]) -> Session:
    """A session that begins now; its id is made of agent and time where none is given."""
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidValue(f"metadata is a {type(metadata).__name__}: give an object")
    now = now_text()
    digits = re.sub(r"\D", "", now[:19])
    session_id = session_id or f"{slug(str(agent).lower())}_{digits[:8]}_{digits[8:]}"
    try:
        metadata = masked(metadata or {})
    except (RecursionError, TypeError) as error:
        raise _not_json(error, "metadata") from None
    session = Session(
        check_id(session_id), mask_secrets(str(agent)).upper(), mask_secrets(str(task)),
        SessionStatus.ACTIVE, now, model=mask_secrets(str(model or "default")).lower(),
        metadata=metadata)
    session.add_event(SessionEvent(f"{session_id}_start", now, EventType.SESSION_START, {
        "agent": session.agent, "task": session.task, "model": session.model}))
    return session


def _known_rate(value: Any) -> str:
    if value in ("", "fast", "long", "fast long", None):
        return value or ""
    raise InvalidValue(f"rate is {value!r}: use 'fast', 'long', 'fast long' or ''")


def _path(name: str) -> Any:
    from pathlib import Path
    return Path(name)


def _not_json(error: Exception, what: str) -> InvalidValue:
    return InvalidValue(f"{what} has no JSON form ({error}): use texts, finite numbers, lists and "
                        "objects")


def _event_type(value: Union[EventType, str]) -> EventType:
    if value.__class__ is EventType:
        return value
    name = value.upper() if isinstance(value, str) else getattr(value, "value", "")
    kind = EVENT_TYPES.get(name)
    if kind is None:
        raise InvalidValue(f"unknown event type {value!r}: use one of {', '.join(EVENT_TYPES)}")
    return kind


# ==================================================================================================
# Quick functions
# ==================================================================================================

_default_optimizer: Optional[SessionOptimizer] = None


def get_optimizer(storage_path: Optional[str] = None) -> SessionOptimizer:
    """The default optimizer, made at first use; a ``storage_path`` other than its own makes a new
    default."""
    global _default_optimizer
    root = os.path.abspath(storage_path) if storage_path else None
    if _default_optimizer is None or root not in (None, _default_optimizer.store.root):
        _default_optimizer = SessionOptimizer(storage_path)
    return _default_optimizer


def start_session(agent: str, task: str, model: str = "default", session_id: Optional[str] = None,
                  metadata: Optional[Data] = None) -> Session:
    """SessionOptimizer.start_session on the default optimizer."""
    return get_optimizer().start_session(agent, task, model, session_id, metadata)


def end_session(session_id: str, status: Union[SessionStatus, str] = SessionStatus.COMPLETED,
                ) -> Optional[Session]:
    """SessionOptimizer.end_session on the default optimizer."""
    return get_optimizer().end_session(session_id, status)


def log_event(session_id: str, event_type: Union[EventType, str],
              data: Optional[Data] = None, tokens_input: int = 0, tokens_output: int = 0,
              duration_ms: int = 0, *, usage: Optional[Usage] = None, model: str = "",
              rate: str = "") -> Optional[SessionEvent]:
    """SessionOptimizer.log_event on the default optimizer."""
    return get_optimizer().log_event(session_id, event_type, data, tokens_input, tokens_output,
                                     duration_ms, usage=usage, model=model, rate=rate)


def analyze_session(session_id: str) -> Optional[OptimizationReport]:
    """SessionOptimizer.analyze on the default optimizer."""
    return get_optimizer().analyze(session_id)


def get_agent_stats(agent: str, days: int = 30) -> Data:
    """SessionOptimizer.agent_statistics on the default optimizer."""
    return get_optimizer().agent_statistics(agent, days)


# ==================================================================================================
# Command line
# ==================================================================================================

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_LIMIT = 0, 1, 2, 3


class CommandError(SessionOptimizerError):
    """A request that failed; the message goes to standard error and the status is 1."""

    status = EXIT_FAILED

    def __init__(self, text: str, command: str = ""):
        super().__init__(text)
        self.command = command  # to be pasted


class UsageError(CommandError):
    """A command line that names what there is not, such as an unknown agent; the status is 2."""

    status = EXIT_USAGE


# -- what commands print

def _say(text: str) -> None:
    """Print, whatever the terminal's encoding can show."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding))


_COLOURS = {"CRITICAL": "1;31", "HIGH": "31", "MEDIUM": "33", "LOW": "36", "title": "1"}
_PAINTED = _Pattern(r"(?m)(?P<title>^[A-Z][A-Z ]+(?=$| \())"
                    r"|\b(CRITICAL|HIGH|MEDIUM|LOW)\b(?=\]| PRIORITY\]|  )")


def colour(text: str, name: str, when: Optional[str] = None) -> str:
    """The text in a colour: ``when`` is "always" or "never", else where standard output is a
    terminal that shows one and NO_COLOR is not set."""
    if when not in ("always", "never"):
        blind = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or (
            os.name == "nt" and "WT_SESSION" not in os.environ)
        when = "always" if sys.stdout.isatty() and not blind else "never"
    return f"\033[{_COLOURS[name]}m{text}\033[0m" if when == "always" else text


def _painted(report: str, when: Optional[str]) -> str:
    """A text report with its titles and severities in colour."""
    return _PAINTED.sub(lambda match: colour(
        match.group(), match.lastgroup or match.group(), when), report)


def _width(stream: int = 1) -> int:
    """Columns of the terminal behind a stream; 80 where there is none."""
    width = 0
    with suppress(OSError, ValueError):
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream).columns)
    return max(40, min(200, width or 80))


def _program() -> str:
    """This program in the form in which it was started."""
    from shlex import join
    from shutil import which
    name, python = "sessionoptimizer", os.path.basename(sys.executable)
    if __name__ == "__main__" and __spec__:
        return join([python if which(python) == sys.executable else sys.executable, "-m", name])
    if __name__ == "__main__":
        return join([python, sys.argv[0]])
    own = os.path.basename(sys.argv[0]) == name and not which(name)  # its script, not in the path
    return join([sys.argv[0] if own else name])


def _command(options: Any, words: str) -> Pasted:
    """A command in the form in which this one was started, on the same store."""
    from shlex import quote
    store = f" --store {quote(options.store)}" if options.store else ""
    return Pasted(f"{_program()} {words}{store}")


def _complain(text: str, command: str = "") -> None:
    """Say on standard error what is wrong, on a terminal on lines as wide as it is, and on one of
    its own a command to be pasted."""
    import textwrap
    text = plain(mask_secrets(text), 1_200)
    lines = textwrap.wrap(text, _width(2), break_long_words=False, break_on_hyphens=False) \
        if sys.stderr.isatty() else [text]
    print("\n".join(lines + [f"  $ {command}"] * bool(command)), file=sys.stderr)


def _show(options: Any, data: Any, *sections: Section) -> int:
    """Print the data as JSON, or the sections as text."""
    if options.format == "json":
        print(json.dumps(data, indent=2))
    else:
        _say(_painted(text_sections(sections, _width()), options.color))
    return EXIT_DONE


def _write_out(text: str, path: Optional[str]) -> None:
    """To standard output, or to a file that its owner alone can read."""
    if not path:
        _say(text)
        return
    try:
        with open(path, "w", encoding="utf-8",
                  opener=functools.partial(os.open, mode=0o600)) as file:
            if os.path.isfile(path):  # also one that was there
                os.chmod(path, 0o600)
            file.write(text if text.endswith("\n") else text + "\n")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None
    _say(f"Report written: {plain(path, 1000)}")


def _found_id(options: Any, given: str, whole: bool = False) -> str:
    """The session's whole id: the one given, the only one that begins so (unless it must be
    ``whole``), or the newest for 'last'."""
    optimizer: SessionOptimizer = options.optimizer
    if given == "last":
        newest = optimizer.list_sessions(limit=1)
        if not newest:
            raise CommandError("there is no session yet:", _command(options, "scan"))
        return newest[0].id
    with suppress(InvalidSessionId):
        if os.path.lexists(optimizer.store.find(given)):
            return given
    matches = sorted(
        name for name, _ in optimizer.store.files() if given and name.startswith(given))
    if len(matches) == 1 and not whole:
        return matches[0]
    if not matches:
        raise CommandError(f"no session {given!r}:", _command(options, "list"))
    raise CommandError(f"{given!r} begins {counted(len(matches), 'id')}: give "
                       f"{'all' if whole else 'more'} of {', '.join(matches[:3])}")


def _known_agent(options: Any, agents: Iterable[str]) -> None:
    """UsageError where the agent asked for is none of these; every name is right where there are
    none."""
    known, asked = set(map(agent_key, filter(None, agents))), agent_key(options.agent or "")
    if asked and known and asked not in known:
        raise UsageError(f"no session of an agent {options.agent!r}{_did_you_mean(asked, known)} "
                         f"(agents: {', '.join(sorted(known))})")


def _judged(missed: bool, count: int, why: str) -> int:
    """The status of --fail-under and --fail-on: a limit was missed, or nothing was judged."""
    if count and not missed:
        return EXIT_DONE
    _complain("sessionoptimizer: "
              + (why if count else "nothing to judge: no session was selected"))
    return EXIT_LIMIT


def _judged_score(options: Any, score: float, count: int = 1) -> int:
    least = options.fail_under
    return EXIT_DONE if least is None else _judged(
        score < least, count, f"the score {score:.1f} is below {least:g}")


# -- the commands

def _welcome(options: Any) -> int:
    here = []
    for reader in READERS:
        count = sum(1 for _ in find_transcripts(filter(os.path.exists, reader.roots())))
        here += [f"{counted(count, 'file')} of {reader.name}"] * bool(count)
    found = ", ".join(here) or "none where agents keep them: give a path to scan"
    _say(text_sections([
        Section(f"sessionoptimizer {__version__}", lines=[
            "Where the tokens of your AI agents' sessions went, and what to change. Nothing leaves "
            "this machine.", f"Transcripts found: {found}"]),
        Section("Begin with", lines=[_command(options, words) for words in (
            "scan", "analyze last --evidence", "help")])], _width()))
    return EXIT_DONE


def _start(options: Any) -> int:
    session = options.optimizer.start_session(
        options.agent, options.task, options.model, options.id, options.metadata)
    if options.format == "json":
        head = {name: value for name, value in session.to_dict().items() if name != "events"}
        print(json.dumps(head, indent=2))
    elif options.quiet:
        print(session.id)
    else:
        _say(f"Session started: {session.id}\nAgent: {plain(session.agent)}\n"
             f"Task: {plain(session.task)}\nModel: {plain(session.model)}")
    return EXIT_DONE


def _end(options: Any) -> int:
    session = options.optimizer.end_session(_found_id(options, options.session_id), options.status)
    if session is None:
        return EXIT_FAILED
    print(f"Session ended: {session.id}\nStatus: {session.status.value}\n"
          f"Total tokens: {session.total_tokens:,}\nEstimated cost: ${session.estimated_cost:.4f}")
    return EXIT_DONE


def _log(options: Any) -> int:
    options.optimizer.store.durable = options.durable
    session_id = _found_id(options, options.session_id)
    if options.event_type == "-":
        return _log_stream(options.optimizer, session_id)
    event = options.optimizer.log_event(session_id, options.event_type, options.data,
                                        options.tokens_in, options.tokens_out, options.duration_ms)
    if event is None:
        return EXIT_FAILED
    print(f"Event logged: {event.id}")
    return EXIT_DONE


_STREAM_KEYS = "event_type data tokens_input tokens_output duration_ms"


def _log_stream(optimizer: SessionOptimizer, session_id: str) -> int:
    """Log one event per line as it comes; a bad line is named and skipped, and the status is 1 at
    the end."""
    logged = bad = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            if not isinstance(entry, dict) or "event_type" not in entry:
                raise InvalidValue('an event is an object with "event_type"')
            event = optimizer.log_event(
                session_id, **{key: entry[key] for key in _STREAM_KEYS.split() if key in entry})
        except (InvalidValue, ValueError, TypeError, RecursionError) as error:
            bad += 1
            _complain(f"sessionoptimizer: line {number} skipped: {error}")
            continue
        if event is None:
            return EXIT_FAILED
        logged += 1
    print(f"Events logged: {logged}" + (f", lines skipped: {bad}" if bad else ""))
    return EXIT_FAILED if bad else EXIT_DONE


def _hook(options: Any) -> int:
    text = sys.stdin.buffer.read(HOOK_SIZE + 1)
    if len(text) > HOOK_SIZE:
        while sys.stdin.buffer.read(HOOK_SIZE):
            pass  # the agent writes it all before it goes on
        raise CommandError("an event of more than 16 MB is not logged")
    payload = json.loads(text.decode("utf-8", "replace"))
    if not options.guard or _text(payload, "hook_event_name") != "PreToolUse":
        options.optimizer.log_hook(payload)
        return EXIT_DONE
    answer = options.optimizer.guard(payload, deny=options.deny)
    if answer:
        print(json.dumps(answer))
    return EXIT_DONE


def _list(options: Any) -> int:
    listed, store = options.optimizer.list_sessions, options.optimizer.store
    asked = options.agent, options.status, options.since
    limit = sys.maxsize if any(asked) else options.limit
    sessions = listed(*asked, limit=limit)
    count = len(sessions)
    if count == limit:
        count = sum(1 for _ in store.files())  # of the others no more is asked than their number
    if not sessions and options.agent:
        _known_agent(options, {session.agent for session in listed(limit=sys.maxsize)})
    for path in store.copies() if options.format == "text" else ():
        _say(f"copy of a damaged file: {plain(path, 300)} "
             f"({_command(options, 'repair --discard')} removes it)")
    rows = []
    for session in sessions[:options.limit]:
        row = dict(head_row(session), estimated_cost=0.0)
        try:
            row["estimated_cost"] = session.estimated_cost
        except SessionOptimizerError as error:  # its events cannot be read
            _complain(f"sessionoptimizer: {error}")
        rows.append(row)
    return _show(options, rows, table("Sessions", {
        "~id": "id", "?agent": "agent", "?status": "status", ">started": "started_at:.16",
        ">?tokens": "total_tokens:,", ">session $": "estimated_cost:$", "-task": "task",
    }, with_short_ids(rows), lines=_more(count, len(rows), f"--limit {count} shows them")
        if count else ["No sessions found."]))


def _delete(options: Any) -> int:
    session_id = _found_id(options, options.session_id, whole=True)
    if not options.optimizer.delete_session(session_id):
        return EXIT_FAILED
    print(f"Session deleted: {session_id}")
    return EXIT_DONE


def _repair(options: Any) -> int:
    found = options.optimizer.repair(discard=options.discard)
    copies = "removed" if options.discard else "kept (--discard removes them)"
    print(f"Repaired: {len(found['repaired'])}\n"
          f"Copies of damaged files {copies}: {len(found['copies'])}\n"
          f"Other leftovers removed: {found['removed']}\nNot readable: {len(found['damaged'])}")
    for line in found["damaged"] + ([] if options.discard else found["copies"]):
        _say(f"  {plain(line, 300)}")
    return EXIT_FAILED if found["damaged"] else EXIT_DONE


def _analyze(options: Any) -> int:
    session_id = _found_id(options, options.session_id)
    report = options.optimizer.analyze(session_id)
    session = options.optimizer.get_session(session_id)
    if report is None or session is None:
        raise CommandError(f"no session {session_id!r}")
    if options.format == "text":
        evidence = evidence_text(session, report, width=_width()) if options.evidence else ""
        _say(_painted(text_report(session, report, width=_width()) + evidence, options.color))
    else:
        _say(FORMATS[options.format](session, report))
    return _judged_score(options, report.efficiency_score)


def _stats(options: Any) -> int:
    optimizer, agent = options.optimizer, options.agent or ""
    optimizer.summaries(progress=_progress_bar("sessions"))
    _wipe()
    stats = optimizer.agent_statistics(agent, options.days)
    if "message" in stats:
        found = selection(optimizer.summaries())
        _known_agent(options, found["agents"])
        return _show(options, stats, Section(agent or "All agents", lines=[
            stats["message"], f"The store has {counted(found['sessions'], 'session')}; the newest "
            f"is of {found['newest'] or 'no day'} (--days asks for more)"]))
    rows = rows_of_agent(optimizer.summaries(options.days), agent)
    stats["groups"] = {by: grouped(rows, by, stats["bill"]) for by in (options.by, "week") if by}
    if options.split:
        stats["split"] = split_at(rows, options.split.timestamp())
    budget = []
    if options.budget:
        stats["budget"] = budget_of(optimizer.summaries(), *options.budget)
        budget = [budget_section(stats["budget"])]
    asked = [by_section(rows, options.by, stats["bill"])] if options.by else []
    return _show(options, stats, *budget, *(asked or statistics_sections(stats, rows)))


def _whatif(options: Any) -> int:
    words, show = list(options.policy), _progress_bar("sessions")  # type: List[str], Any
    for name in "above tokens tool older at_least".split():
        value = getattr(options, name)
        words += [] if value is None else ["--" + name.replace("_", "-"), value]
    words += ["--when-rebuilding"] * options.when_rebuilding
    policy = " ".join(words)
    try:
        parse_policy(policy)
    except InvalidValue as error:
        raise UsageError(str(error)) from None
    result = options.optimizer.whatif(policy, options.paths, progress=show and (
        lambda done: show(done, 0)))
    _wipe()
    return _show(options, result, whatif_section(result))


def _advice(options: Any) -> int:
    path = options.apply or options.undo
    if options.apply and options.undo:
        raise UsageError("give --apply or --undo, not both")
    advice = options.optimizer.agent_statistics("", options.days).get("advice", [])
    if not path:
        if options.format == "claude-md":
            _say(advice_markdown(advice).rstrip())
            return EXIT_DONE
        return _show(options, advice, advice_section(advice, 20) if advice else Section(
            "Advice", lines=["Nothing to advise: scan first, or ask for more --days."]))
    lines = advice_markdown(advice)
    count = lines.count("\n- ")

    def edit(old: str) -> str:
        kept = without_advice(old)
        if options.undo and kept == old:
            raise CommandError(f"{path} is as it was: it holds no advice")
        return kept if options.undo else kept + "\n" * bool(kept) + lines

    if not options.undo and not count:
        raise CommandError(f"{path} is as it was: no advice is a line for a file (more --days "
                           "may have some)")
    try:
        _change_text(os.path.realpath(path), edit)
    except (OSError, ValueError, StorageError) as error:
        why = getattr(error, "strerror", error)
        raise CommandError(
            f"{path} cannot be changed: {getattr(error, 'reason', why)}") from None
    if options.undo:
        _say(f"Taken out of {plain(path, 1000)}")
    else:
        _say(f"Put into {plain(path, 1000)}: {counted(count, 'line')}; the rest of the advice is "
             f"for you to do:\n{_command(options, f'advice --days {options.days}')}")
    return EXIT_DONE


def _alerts(options: Any) -> int:
    given = {name: value for name, value in vars(options).items()
             if name in alert_limits() and value is not None}
    alerts = options.optimizer.alerts(options.since, options.agent, given)
    asked = options.agent or options.fail_on or options.budget
    rows = options.optimizer.summaries() if asked else []
    _known_agent(options, {row["agent"] for row in rows})
    sections = [alert_section(alerts, options.limit), Section("Why", lines=[
        _command(options, f"analyze {alert['session_id']} --evidence")
        for alert in with_short_ids(alerts, "session_id")[:1]])]
    if options.budget:
        budget = budget_of(rows, *options.budget)
        sections.insert(0, budget_section(budget))
        alerts = budget_alerts(budget) + alerts
    _show(options, alerts, *sections)
    if options.fail_on is None:
        return EXIT_DONE
    since, level = since_seconds(options.since) or 0.0, options.fail_on
    chosen = [row for row in rows if (seconds_of(row["last_at"]) or 0.0) >= since]
    return _judged(any(Severity(alert["level"]) >= level for alert in alerts), len(chosen),
                   f"an alert is {level.value} or above")


def _compare(options: Any) -> int:
    result = options.optimizer.compare_sessions(
        [_found_id(options, given) for given in options.session_ids])
    if "error" in result:
        raise CommandError(result["error"])
    return _show(options, result, *comparison_sections(result))


def _export(options: Any) -> int:
    text = options.optimizer.export_report(_found_id(options, options.session_id), options.format)
    if text is None:
        return EXIT_FAILED
    _write_out(text, options.output)
    return EXIT_DONE


def _scan(options: Any) -> int:
    width = 80 if options.output else _width()

    def show(result: Data) -> Tuple[str, float, int]:
        _wipe()
        if not result["sessions"]:
            _known_agent(options, result["found"]["agents"] + [each.name for each in READERS])
        if options.by:
            result["groups"] = {
                options.by: grouped(result["sessions"], options.by, result["bill"])}
        if options.format == "json":
            text = json.dumps(result, indent=2)
        elif options.format == "html":
            text = html_scan_report(result)
        else:
            text = _scan_text(options, result, width)
        return text, result["totals"]["efficiency_score"], len(result["sessions"])

    shown: Any = options.optimizer.scan(
        options.paths or None, agent=options.agent or "", since=options.since,
        project=options.project or "", store=not options.no_store, again=options.again,
        progress=_progress_bar(), jobs=options.jobs, show=show,
        shown_as=(options.format, options.by, width, _command(options, "")))
    text, *judged = shown
    if options.format == "text" and not options.output:
        text = _painted(text, options.color)
    _write_out(text, options.output)
    return _judged_score(options, *judged)


def _scan_text(options: Any, result: Data, width: int) -> str:
    sections = _scan_sections(result, 8, command=functools.partial(_command, options))
    if not result["found"]["sessions"] and not options.paths:
        looked = ", ".join(root for reader in READERS for root in reader.roots())
        facts = [("Looked in", looked), *sections[0].facts]
        sections = [Section("No transcripts found", facts, lines=[
            "Give a path:", _command(options, "scan PATH")])]
    elif options.by and result["sessions"]:
        sections = [by_section(result["sessions"], options.by, result["bill"])]
    elif result["sessions"] and not result["changes"] and not options.no_store:
        sections.append(Section("Kept, also when the agent deletes its transcripts", lines=[
            options.optimizer.store.root], hint="Claude Code does after 30 days"))
    return text_sections(sections, width)


def _wipe() -> None:
    """Take the progress bar away."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def _progress_bar(what: str = "transcripts") -> Optional[Callable[[int, int], None]]:
    """Shows how far long work is, of how much where that is known; None where standard error is no
    terminal."""
    if not sys.stderr.isatty():
        return None
    begun = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - begun > 0.5 and now - shown > 0.1:
            shown = now
            of = f"/{total}" if total else ""
            print(f"\r[{bar(done, total, 30):<30}] {done}{of} {what}", end="", file=sys.stderr,
                  flush=True)
    return show


def _import(options: Any) -> int:
    failed = 0
    for path in options.files:
        imported = _import_file(options.optimizer, path)
        for session_id in imported:
            _say(f"Imported: {session_id}")
        failed += not imported
    return EXIT_FAILED if failed else EXIT_DONE


def _import_file(optimizer: SessionOptimizer, path: str) -> List[str]:
    """The ids of the sessions a file brought: a session's own JSON, else a transcript."""
    head = _head_of(path)
    if not any(reader.detect(path, head) for reader in READERS) and head.lstrip()[:1] == b"{":
        try:
            with open(path, encoding="utf-8-sig") as file:
                session = optimizer.import_session(json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            raise CommandError(f"{path} cannot be read: {error}") from None
        return [session.id] if session else []
    result = optimizer.scan([path], again=True)
    if not result["sessions"] and not result["skipped"]:
        _complain(f"sessionoptimizer: {path}: holds no session or transcript")
    for entry in result["skipped"]:
        place = f"{entry['path']}:{entry['line']}" if entry["line"] else entry["path"]
        _complain(f"sessionoptimizer: {place}: {entry['reason']}")
    return [row["id"] for row in result["sessions"]]


def _version(options: Any) -> int:
    print(f"sessionoptimizer {__version__}")
    return EXIT_DONE


def _help(options: Any) -> int:
    return main([*filter(None, [options.topic]), "--help"])


# -- what an option's value is

def _when(text: str) -> datetime:
    """A point in time: today, yesterday, 90m, 12h, 7d ago, or ISO-8601; ValueError otherwise."""
    from datetime import datetime, timedelta
    word, now = text.strip().lower(), datetime.now().astimezone()
    if word in ("today", "yesterday"):
        day = now.date() - timedelta(word == "yesterday")
        return datetime(day.year, day.month, day.day).astimezone()
    ago = re.match(r"(\d+(?:\.\d+)?)([smhdw])$", word)
    if ago:
        units = {unit[0]: unit for unit in "seconds minutes hours days weeks".split()}
        return now - timedelta(**{units[ago[2]]: float(ago[1])})
    moment = parse_time(word.upper())
    if moment is None:
        raise ValueError(text)
    return moment


def _number(text: str, read: Callable[[str], float] = float, most: float = 1e300) -> float:
    value = read(text)
    if not 0 <= value <= most:
        raise ValueError(text)
    return value


def _budget(text: str) -> Tuple[float, str]:
    [(amount, unit)] = re.findall(r"^\$?(\d+(?:\.\d+)?)/(day|week|month)$", text)
    return float(amount), unit


def _object(text: str) -> Data:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


# how the value of an option is read, and what to say of one that cannot be
_KINDS_OF_VALUES: Dict[str, Tuple[Callable[[str], Any], str]] = {
    "WHEN": (_when, "a time: use today, yesterday, 90m, 12h, 7d or ISO-8601"),
    "JSON": (_object, "a JSON object such as '{\"file_path\": \"a.py\"}'"),
    "N": (lambda text: _number(text, int), "a whole number >= 0"),
    "AMOUNT": (_number, "a number >= 0"),
    "SCORE": (lambda text: _number(text, most=100), "a score from 0 to 100"),
    "BUDGET": (_budget, "a budget such as 60/month"),
    "STATUS": (lambda text: SessionStatus(text.upper()),
               f"a status: use one of {', '.join(SessionStatus.__members__)}"),
    "LEVEL": (lambda text: Severity(text.upper()),
              f"a level: use one of {', '.join(Severity.__members__)}"),
}


def _reader(kind: str) -> Callable[[str], Any]:
    read, what = _KINDS_OF_VALUES.get(kind, (str, "a value: it is empty"))

    def convert(text: str) -> Any:
        with suppress(ValueError, OverflowError, RecursionError):
            if text:
                return read(text)
        from argparse import ArgumentTypeError
        raise ArgumentTypeError(f"{text!r} is not {what}")
    return convert


# -- the commands and their options: group, name and summary; an example; an option a line

_SESSION = "session_id  the session's id, a unique beginning of it, or 'last'"
_TEXT_OR_JSON = "--format text|json=text  text (default) or json"
_ANY_FORMAT = "--format FORMAT=text  one of these (default text)"
_AGENT = "--agent NAME  of this agent only"
_SINCE = "--since WHEN  today, yesterday, 90m, 12h, 7d ago, or ISO-8601"
_LIMIT = "--limit N=20  show at most N (default 20)"
_DAYS = "--days N=30  of the last N days (default 30)"
_BUDGET = "--budget BUDGET  USD a day, week or month, such as 60/month"
_BY = f"--by {'|'.join(GROUPS)}  a table by one of these"
_OUTPUT = "--output FILE  write to FILE (for you alone) instead of standard output"
_FAIL_UNDER = "--fail-under SCORE  status 3 when the efficiency is below or nothing was judged"
_SHARED = """\
  --store DIR  the store (default: SESSIONOPTIMIZER_HOME or ~/.sessionoptimizer)
  --color always|never|auto  (default: auto, on a terminal without NO_COLOR)"""
_ALERT_LIMITS = "\n".join(
    f"--{rule.name.replace('_', '-')} AMOUNT  {rule.level.value} alert "
    f"{'below' if rule.name == 'efficiency' else 'above'} this many "
    f"{rule.unit.replace('%', '%%')} (default {rule.threshold})" for rule in ALERT_RULES)

_GROUPS = {"look": "Look at what agents did", "record": "Record a session yourself",
           "watch": "Watch", "files": "Files, and this program"}
_COMMANDS = (
    (_scan, f"""look scan read agents' transcripts and say where the tokens went
        $ scan --since 7d
        paths* PATH  files or folders (default: where agents keep them)
        --agent NAME  this agent's only, e.g. claude-code
        {_SINCE}
        --project TEXT  whose working directory or path contains TEXT
        {_BY}
        --no-store  keep nothing
        --again  read everything again, deleted sessions too
        --jobs N=0  processes that read (default: the cores, from 20 MB on)
        --format text|json|html=text  text (default), json or html
        {_OUTPUT}
        {_FAIL_UNDER}"""),
    (_list, f"""look list list sessions, newest first
        $ list --since yesterday
        {_AGENT}
        --status STATUS  of this status only
        {_SINCE}
        {_LIMIT}
        {_TEXT_OR_JSON}"""),
    (_analyze, f"""look analyze say what a session wasted
        $ analyze last --evidence
        {_SESSION}
        {_ANY_FORMAT}
        {_FAIL_UNDER}
        --evidence  show the events of every finding: line, what, tokens"""),
    (_stats, f"""look stats sessions over time
        $ stats --by model --days 7
        agent?  of this agent only (default: all)
        {_DAYS}
        {_BY}
        {_BUDGET}
        {_TEXT_OR_JSON}
        --split WHEN  before and after a day, with what is sure"""),
    (_compare, f"""look compare compare sessions
        $ compare 3f2a 91bc
        session_ids+ session_id  two or more sessions
        {_TEXT_OR_JSON}"""),
    (_export, f"""look export write a session's report
        $ export last --format html --output report.html
        {_SESSION}
        {_ANY_FORMAT}
        {_OUTPUT}"""),
    (_advice, f"""look advice say what to change, from what sessions cost
        $ advice --format claude-md --apply CLAUDE.md
        {_DAYS}
        --format text|json|claude-md=text  text (default), json, or the lines for CLAUDE.md
        --apply FILE  put the lines into FILE, between markers
        --undo FILE  take them out of FILE again"""),
    (_whatif, f"""look whatif price the sessions again under another habit
        $ whatif return --above 80k
        policy+  one of {', '.join(POLICIES)}; what it needs stands behind it
        --above TOKENS  only contexts of more tokens, such as 80k
        --tokens TOKENS  how many
        --tool NAME  results of this tool
        --older CALLS  results older than so many calls
        --at-least TOKENS  not before so many tokens are cleared
        --when-rebuilding  only when the cache is lost anyway
        --paths+ PATH  transcripts to read instead of the store
        {_TEXT_OR_JSON}"""),
    (_alerts, f"""watch alerts say which sessions deserve a look, and what to do
        $ alerts --since 1d --dollars 0.50
        {_SINCE}
        {_AGENT}
        {_TEXT_OR_JSON}
        {_LIMIT}
        --fail-on LEVEL  status 3 at an alert of LOW, MEDIUM, HIGH or above
        --dollars AMOUNT  of so many wasted dollars or more (default {LEAST_DOLLARS})
        {_BUDGET}
        {_ALERT_LIMITS}"""),
    (_start, f"""record start begin a session
        $ start FORGE "Fix the loader" --model opus -q
        agent  the agent's name
        task  what it is to do
        --model NAME=default  its model, for prices
        --id ID  the session's id (default: agent and time)
        --metadata JSON  an object kept with the session
        -q --quiet  print the id alone
        {_TEXT_OR_JSON}"""),
    (_log, f"""record log log an event, or a stream of them from standard input
        $ log last SEARCH --data '{{"query": "x"}}'
        {_SESSION}
        event_type  such as FILE_READ; - reads a JSON object a line: {_STREAM_KEYS}
        --data JSON  the event's data, an object
        --tokens-in N=0  tokens new to the context
        --tokens-out N=0  tokens the model wrote
        --duration-ms N=0  milliseconds it took
        --durable  force the event to the disk before it is told"""),
    (_end, f"""record end end a session
        $ end last --status FAILED
        {_SESSION}
        --status STATUS=COMPLETED  COMPLETED (default), FAILED or ABANDONED"""),
    (_hook, """record hook log a hook event of Claude Code from standard input
        $ hook --guard
        --guard  answer PreToolUse when the context holds the answer
        --deny  with --guard: refuse such a call once, not only advise"""),
    (_import, """files import store sessions from JSON files or transcripts
        $ import session.json
        files+ FILE  a session's JSON, or a transcript of a known agent"""),
    (_delete, """files delete delete a session and its report
        $ delete last
        session_id  the session's whole id, or 'last'"""),
    (_repair, """files repair mend damaged sessions and remove what crashes left
        $ repair
        --discard  remove the copies of damaged files as well"""),
    (_version, """files version print the version
        $ version"""),
    (_help, """files help show the help of everything, or of one command
        $ help scan
        topic?  a command"""),
)

Command = namedtuple("Command", "run group summary example options")


def commands() -> Dict[str, Command]:
    """Every command by its name, in the order of the help: the function that runs it, its group,
    what it does, an example, and its options (flags, settings for argparse)."""
    known = {}
    for run, text in _COMMANDS:
        title, example, *lines = text.splitlines()
        group, name, summary = title.split(None, 2)
        known[name] = Command(run, group, summary, example.strip(" $"), list(map(_option, lines)))
    return known


def _option(line: str) -> Tuple[Any, ...]:
    """An option as argparse wants it, of a line such as "--limit N=20  show at most N": its flags
    or its name (with * + or ? where it may be given more or less than once), what its value is, a
    default, and what it is for."""
    spec, text = line.strip().split("  ", 1)
    words = spec.split()
    flags = [word for word in words if word[0] == "-"] or words[:1]
    kind, _, default = "".join(words[len(flags):]).partition("=")
    settings: Data = {"help": text}
    if flags[-1][-1] in "*+?":
        flags[-1], settings["nargs"] = flags[-1][:-1], flags[-1][-1]
    if kind == "FORMAT":
        settings["choices"] = list(FORMATS)  # one of your own may be among them
    elif "|" in kind:
        settings["choices"] = kind.split("|")
    elif kind:
        settings.update(metavar=kind, type=_reader(kind))
    elif flags[0][0] == "-":
        settings["action"] = "store_true"
    if default:
        settings["default"] = default
    return (*flags, settings)


_STATUSES = "status: 0 done, 1 the request failed, 2 bad command line, 3 a limit was missed"


def _overview() -> str:
    """The help of the whole program: the commands in groups, each with an example."""
    program = _program()
    lines = [f"usage: {program} [--store DIR] [--color WHEN] command ...", "",
             "Where the tokens of your AI agents' sessions went, on evidence you can check."]
    for group, title in _GROUPS.items():
        lines += ["", f"{title}:"]
        for name, command in commands().items():
            if command.group == group:
                lines += [f"  {name:<9} {command.summary}",
                          f"            $ {program} {command.example}"]
    lines += ["", "With every command:", _SHARED, "", _STATUSES,
              f"One command: {program} help COMMAND", ""]
    return "\n".join(lines)


def build_parser(only: str = "") -> Any:
    """The argparse parser: from it the shell completions in examples/completions are made.
    ``only``: with this command alone, which is sooner made; all where there is no such one."""
    import argparse
    known, program = commands(), _program()
    shared = list(map(_option, _SHARED.splitlines()))

    class Parser(argparse.ArgumentParser):
        """A parser that says what was meant, with the usage of the command it is about."""

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            known, words = self._option_string_actions, args or ()
            early = itertools.takewhile(_command_word(words).__ne__, words)
            for word in early if self is parser else ():
                if word[:2] == "--" != word and word.partition("=")[0] not in known:
                    near = _did_you_mean(word, re.findall(r"--[\w-]+", f"{_COMMANDS}{_SHARED}"))
                    self.error(f"{word} is unknown before a command, it may stand behind one{near}")
            options, rest = super().parse_known_args(args, namespace)
            if rest:
                self.error(f"unknown: {' '.join(rest)}{_did_you_mean(rest[0], known)}")
            return options, rest

        def error(self, message: str) -> Any:
            self.print_usage(sys.stderr)
            told = re.sub(r"^argument command: invalid choice: (\S+) .*\)", r"no command \1",
                          _with_guess(message))
            _complain(f"sessionoptimizer: {told}")
            self.exit(EXIT_USAGE)

    parser = Parser(prog=program, allow_abbrev=False)
    parser.format_help = _overview  # type: ignore[method-assign]
    parser.set_defaults(func=_welcome)
    parser.add_argument("--version", action="version", version=f"sessionoptimizer {__version__}")
    choice = parser.add_subparsers(dest="command", metavar="command")
    for flag, settings in shared:
        parser.add_argument(flag, **settings)
    for name in [only] if only in known else known:
        command = known[name]
        sub = choice.add_parser(
            name, help=command.summary, description=f"{name} - {command.summary}",
            epilog=f"example:\n  {program} {command.example}\n\n{_STATUSES}",
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        for *flags, settings in command.options:
            sub.add_argument(*flags, **settings)
        for flag, settings in shared:
            sub.add_argument(flag, default=argparse.SUPPRESS, **settings)
        sub.set_defaults(func=command.run)
    return parser


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches
    names = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), names, 1)
    return f": did you mean {names[near[0]]}?" if near else ""


def _with_guess(message: str) -> str:
    """A message of a word that is none of those it lists, with the one that was meant."""
    wrong = re.search(r"'([^']*)'.*?(?:(?:: use )?one of|choose from|: use) (.*)", message)
    if wrong is None:
        return message
    return message + _did_you_mean(wrong[1], re.findall(r"\w[\w -]*", wrong[2]))


# -- one command line, from its words to its status

def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line and return its status; the only place that turns errors into messages."""
    if argv is None:
        import gc
        gc.freeze()  # what is loaded stays, and need not be looked through at the end
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    command = _command_word(argv)
    if command != "hook":
        return _main(argv, command)
    try:
        with _deadline(HOOK_SECONDS):
            _main(argv, command)
    except _OutOfTime:
        print("sessionoptimizer hook: no time left, this event is not logged", file=sys.stderr)
    except Exception as error:  # whatever it is: the agent whose hook this is must go on
        print(f"sessionoptimizer hook: {plain(repr(error), 300)}", file=sys.stderr)
    return EXIT_DONE


def _command_word(argv: Iterable[str]) -> str:
    """The command of a command line; it may stand behind the options that all commands share."""
    words = iter(argv)
    for word in words:
        if word in ("--store", "--color"):
            next(words, "")
        elif word[:1] != "-":
            return word
    return ""


def _main(argv: List[str], command: str) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("always", SessionOptimizerWarning)
        warnings.showwarning = _show_warning
        try:
            options = build_parser(command).parse_args(argv)
            options.optimizer = SessionOptimizer(options.store)
            return _flushed(options.func(options))
        except SystemExit as stop:
            return _flushed(stop.code if isinstance(stop.code, int) else EXIT_USAGE)
        except SessionOptimizerError as error:
            said = str(error) if isinstance(error, InvalidSessionId) else _with_guess(str(error))
            _complain(f"sessionoptimizer: {said}", getattr(error, "command", ""))
            return error.status if isinstance(error, CommandError) else EXIT_FAILED
        except BrokenPipeError:
            return _flushed(EXIT_DONE)
        except OSError as error:
            _complain(f"sessionoptimizer: {error.filename or 'the output'} cannot be used: "
                      f"{error.strerror}; nothing stored is lost")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return EXIT_FAILED
        except KeyboardInterrupt:
            return 130


def _flushed(status: int) -> int:
    """The status, once what was printed is written, or nobody reads it any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the interpreter would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _show_warning(message: Any, *where: Any, **more: Any) -> None:
    _complain(f"warning: {message}")


HOOK_SECONDS = 0.9   # an agent gives the hooks at the end of a session 1.5 s, start-up included
HOOK_SIZE = 1 << 24  # bytes of an event: what is larger could not be read in that time


class _OutOfTime(BaseException):
    """The deadline is over; no handler of errors on the way takes it for one of its own."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Context in which _OutOfTime is raised after some seconds, where the system has timers and
    this is the main thread."""
    import signal

    def over(number: int, frame: Any) -> None:
        raise _OutOfTime

    try:
        before = signal.signal(signal.SIGALRM, over)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
