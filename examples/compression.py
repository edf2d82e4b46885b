#!/usr/bin/env python3
"""What would compressing the tool results of recorded sessions have saved, and what lost?

    python3 examples/compression.py [TRANSCRIPT ...] [--strategy NAME | MODULE:FUNCTION] \\
        [--after K] [--format json]

Nothing is stored and nothing is sent. docs/compression.md says how each figure arises.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
import sessionoptimizer as so  # noqa: E402

EXTRA = ("outlines need tree-sitter-language-pack below 1.0: pip install "
         "'sessionoptimizer[compression]'")
LANGUAGES = {".go": "go", ".ts": "typescript", ".tsx": "tsx", ".js": "javascript", ".py": "python",
             ".pyi": "python", ".rs": "rust", ".java": "java", ".md": "markdown"}
FUNCTIONS = {"function_definition", "function_declaration", "function_expression", "function_item",
             "generator_function_declaration", "arrow_function", "method_declaration",
             "method_definition", "constructor_declaration"}
BODIES = {"block", "statement_block", "constructor_body"}
KEPT_LINES = 20      # at each end of a result, by head_tail
CACHE_SECONDS = 300  # that what was written to the cache lives there
SHINGLE = 5          # lines that stand together before they count as a repetition
TELLING = 20         # characters of a line by which it is known again
# what a search or a numbered listing sets before a line
ANY_NUMBER = re.compile(r"^(?:[^\s:]+:)?\d+[:\u2192\t-]")


class Tool(str):
    """The name of the tool that returned a text; ``path``: the one file that it read,
    "" where it is none."""

    path = ""

    def __new__(cls, name: str, path: str = "") -> Tool:
        tool = super().__new__(cls, name)
        tool.path = path
        return tool


# Strategies: f(text, tool) -> text. A class is made anew for every context window,
# and may remember.

def outline(text: str, tool: str) -> str:
    """Code without the bodies of its functions, markdown as its headings with the line after each;
    by the file's name. ImportError without the extra; what does not get shorter, or is in another
    language, unchanged."""
    language = LANGUAGES.get(os.path.splitext(getattr(tool, "path", ""))[1].lower())
    if not language:
        return text
    try:
        import tree_sitter_language_pack as pack
    except ImportError as error:
        raise ImportError(EXTRA) from error
    if hasattr(pack, "download"):  # it would fetch the grammar from the network
        raise ImportError(EXTRA)
    source = text.encode("utf-8", "replace")
    root = pack.get_parser(language).parse(source).root_node  # type: ignore[arg-type]
    cuts = _sections(root) if language == "markdown" else _bodies(root)
    short = source
    for begin, end, mark in sorted(cuts, reverse=True):
        if end - begin > len(mark):
            short = short[:begin] + mark + short[end:]
    return short.decode("utf-8", "replace") if len(short) < len(source) else text


def _bodies(root: Any) -> Iterator[Tuple[int, int, bytes]]:
    """What the outermost functions do, but for docstrings;
    one that the parser did not understand stays."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        body = node.child_by_field_name("body") if node.type in FUNCTIONS else None
        if body is None or body.type not in BODIES:
            waiting += node.children
        elif not node.has_error and body.children:
            braces = body.children[0].type == "{"
            statements = body.named_children
            first = statements[0] if statements else None
            if first is not None and not braces and (first.type == "string" or [
                    child.type for child in first.children] == ["string"]):
                statements = statements[1:]
            if braces:
                yield body.start_byte, body.end_byte, b"{ ... }"
            elif statements:
                yield statements[0].start_byte, statements[-1].end_byte, b"..."


def _sections(root: Any) -> Iterator[Tuple[int, int, bytes]]:
    """What follows the first line below each heading, up to the next one."""
    waiting = [root]
    while waiting:
        section = waiting.pop()
        inner = [child for child in section.children if child.type == "section"]
        waiting += inner
        own = [child for child in section.children
               if child.type not in ("section", "atx_heading", "setext_heading")]
        if own and section.type == "section":
            begin = own[0].start_byte + len(own[0].text.split(b"\n")[0])
            yield begin, own[-1].end_byte, b"\n...\n"


class Deduplicate:
    """Lines that the window was shown before, SHINGLE and more together,
    are named instead of shown."""

    def __init__(self) -> None:
        self.seen: set = set()

    def __call__(self, text: str, tool: str) -> str:
        lines = text.split("\n")
        shingles = [hash(tuple(lines[at:at + SHINGLE])) for at in range(len(lines) - SHINGLE + 1)]
        again = [False] * len(lines)
        for at, shingle in enumerate(shingles):
            if shingle in self.seen:
                again[at:at + SHINGLE] = [True] * SHINGLE
        self.seen.update(shingles)
        kept: List[str] = []
        run = 0
        for line, known in zip(lines + [""], again + [False]):
            if run and not known:
                kept.append(f"[{run} lines as shown above]")
            run = run + 1 if known else 0
            if not known:
                kept.append(line)
        short = "\n".join(kept[:-1])
        return short if len(short) < len(text) else text


def head_tail(text: str, tool: str) -> str:
    """The first and the last KEPT_LINES lines."""
    lines = text.split("\n")
    left = len(lines) - 2 * KEPT_LINES
    if left <= 1:
        return text
    short = "\n".join(lines[:KEPT_LINES] + [f"[{left} lines left out]"] + lines[-KEPT_LINES:])
    return short if len(short) < len(text) else text


def mask(text: str, tool: str) -> str:
    """Nothing but a word that something was there."""
    return "[result masked]" if len(text) > 200 else text


# and after how many calls it is applied; 0: at once
STRATEGIES: Dict[str, Tuple[Callable[..., Any], int]] = {
    "outline": (outline, 0), "deduplicate": (Deduplicate, 0), "head_tail": (head_tail, 0),
    "mask": (mask, 10)}


def strategy_named(name: str) -> Tuple[Callable[..., Any], int]:
    """One of STRATEGIES, or your own as MODULE:FUNCTION.
    ValueError or ImportError says what is wrong."""
    module, _, function = name.partition(":")
    if name in STRATEGIES:
        return STRATEGIES[name]
    if not function:
        raise ValueError(
            f"unknown strategy {name!r}: use one of {', '.join(STRATEGIES)}, or MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function), 0
    except AttributeError as error:
        raise ValueError(f"{module} has no {function}") from error


# What a transcript told

@dataclass
class Told:
    """What a tool was asked and what it returned: texts that the session itself does not keep."""

    event: Any = None  # kept alive, so that its id() stays its own
    arguments: str = ""
    text: str = ""
    size: int = 0  # characters that entered, with the frame around the text


class Listener(so.Recorder):
    """A recorder that remembers, until the session has been looked at, what it was told.
    ``heard`` by id()."""

    heard: Dict[int, Told] = {}

    def tool(self, key: str, name: str, arguments: Any, *rest: Any, **more: Any) -> so.SessionEvent:
        event = super().tool(key, name, arguments, *rest, **more)
        values = arguments.values() if isinstance(arguments, dict) else [arguments]
        texts = [value if isinstance(value, str) else json.dumps(value, indent=0, default=str)
                 for value in values]
        self.heard.setdefault(id(event), Told(event)).arguments = "\n".join(texts)
        return event

    def returned(self, key: str, text: Optional[str], size: Optional[int] = None,
                 **more: Any) -> so.SessionEvent:
        event = super().returned(key, text, size, **more)
        told = self.heard.setdefault(id(event), Told(event))
        if text and not told.text:
            told.text, told.size = text, max(size or 0, len(text))
        return event


def sessions_told(paths: Iterable[str]) -> Iterator[Tuple[str, List[so.Session], Dict[int, Told]]]:
    """The sessions in transcripts of every format, each response counted once, with what was told
    of their events. A unit may come twice: the last counts."""
    scan = so.TranscriptScan(None, list(paths) or None, "once")
    recorder, sessions = so.Recorder, []  # type: Tuple[Any, List[so.Session]]
    so.Recorder = Listener  # type: ignore[misc]  # the readers make theirs by this name
    try:
        for name, _ in scan.read(lambda session, found: sessions.append(session)):
            yield name, sessions[:], Listener.heard
            sessions.clear()
            Listener.heard.clear()
    finally:
        so.Recorder = recorder  # type: ignore[misc]
        Listener.heard.clear()


@dataclass
class Drops:
    """What a strategy drops of a session. ``cuts``: tokens and after how many calls, by event id;
    ``lost``: the event that needed what was dropped of another, by that other's id."""

    cuts: Dict[str, Tuple[int, int]] = field(default_factory=dict)
    lost: Dict[str, str] = field(default_factory=dict)


def _telling(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = ANY_NUMBER.sub("", line.strip()).strip()
        if len(line) >= TELLING:
            yield line


def drops_in(session: so.Session, heard: Dict[int, Told], strategy: Callable[..., Any],
             after: int = 0) -> Drops:
    """Run a strategy over a session's tool results. A later call of the window needs what was
    dropped when its arguments hold a dropped line,
    or when it is a read or a search and returns one."""
    drops = Drops()
    for window in session.windows():
        compress = strategy() if isinstance(strategy, type) else strategy
        calls, shown, dropped = 0, set(), {}  # type: int, set, Dict[str, Tuple[str, int]]
        for event in window:
            calls += event.event_type is so.EventType.AI_RESPONSE
            told = heard.get(id(event))
            if told is None:
                continue
            looks = event.event_type in (so.EventType.FILE_READ, so.EventType.SEARCH)
            for line in _telling(told.arguments + "\n" + told.text * looks):
                source, due = dropped.get(line, ("", 0))
                if source and calls >= due:
                    drops.lost.setdefault(source, event.id)
            files = event.data.get("file_paths") or [event.data.get("file_path") or ""]
            tool = Tool(str(event.data.get("tool") or ""), files[0] if len(files) == 1 else "")
            short = compress(told.text, tool) if told.text else ""
            removed = len(told.text) - len(short)
            if removed > 0 and event.tokens_input:
                drops.cuts[event.id] = event.tokens_input * removed // told.size, after
                left = set(_telling(short))
                dropped.update((line, (event.id, calls + 1 + after)) for line in _telling(told.text)
                               if line not in left and line not in shown)
            shown.update(() if after else _telling(short))
    return drops


# What it would have cost

class Compressed(so.Replay):
    """The module's replay with some tokens of some results cut, at once or after some calls; the
    prefix behind an edit is written again. ``fetches``: events before which something dropped was
    asked for once more, which takes a call. ``sent``: tokens of all contexts,
    as recorded and as replayed."""

    def __init__(self, analysis: so.Analysis, cuts: Dict[str, Tuple[int, int]],
                 fetches: Iterable[str] = ()):
        super().__init__(analysis, "none", {}, so.CASES[1])
        self.cuts, self.fetches, self.sent = cuts, set(fetches), [0, 0]

    def _open(self, step: so.Step) -> None:
        super()._open(step)
        self._waiting: List[Tuple[int, so.Piece, int]] = []
        self._entered = -1

    def __call__(self, step: so.Step, rebuild: Optional[Dict[str, Any]]) -> None:
        super().__call__(step, rebuild)
        if step.call is None:
            return
        self.sent[0] += step.held.length
        self.sent[1] += self._length
        rates = self.session.price_of(step.call).rates
        for event in step.events:
            if event.id in self.fetches:
                self.saved -= self._length * rates.read + event.tokens_output * rates.output

    def _clear(self, step: so.Step, rebuild: Optional[Dict[str, Any]]) -> int:
        pieces = step.held.pieces
        for piece in pieces[bisect_left(pieces, so.Piece(self._entered + 1, "")):]:
            self._entered = piece.serial
            tokens, after = self.cuts.get(piece.event.id, (0, 0)) if piece.event else (0, 0)
            if tokens:
                self._waiting.append((self._calls + after, piece, tokens))
        changed_from = so.MAX_TOKENS
        due = [waiting for waiting in self._waiting if waiting[0] <= self._calls]
        self._waiting = [waiting for waiting in self._waiting if waiting[0] > self._calls]
        for _, piece, tokens in due:
            index = bisect_left(pieces, piece)
            if pieces[index:index + 1] == [piece]:
                size = step.held.size(index)
                changed_from = min(changed_from,
                                   self._place(step.held, step.held.ends[index] - size))
                self._cut_to(piece.serial, min(size, tokens))
        return changed_from


def priced(session: so.Session, drops: Drops) -> Dict[str, Any]:
    """A session's row: tokens, and pico-dollars saved where nothing is asked for again (``best``)
    and where each result that was needed later comes back whole,
    at the price of one more call (``worst``)."""
    analysis = so.Analysis(session)
    kept = {key: cut for key, cut in drops.cuts.items() if key not in drops.lost}
    best, worst = Compressed(analysis, drops.cuts), Compressed(analysis, kept, drops.lost.values())
    analysis.follow(best, worst)
    return {"session": session.id, "dropped": sum(tokens for tokens, _ in drops.cuts.values()),
            "sent": best.sent[0], "sent_then": best.sent[1], "recorded": session.cost_in_pico,
            "best": best.saved, "worst": worst.saved,
            "shortened": len(drops.cuts), "needed": len(drops.lost)}


def summed(name: str, after: int, rows: List[Dict[str, Any]]) -> Dict[str, Any]:
    """All sessions under one strategy, in tokens and USD;
    ``pays``: even where everything needed comes back."""
    whole = {key: sum(row[key] for row in rows) for key in (
        "dropped", "sent", "sent_then", "recorded", "best", "worst", "shortened", "needed")}
    saves = sorted([whole["worst"], (whole["worst"] + whole["best"]) // 2, whole["best"]])
    dearer = [row["session"] for row in rows if row["worst"] < 0]
    money = {key: whole[key] / so.PICO for key in ("recorded", "best", "worst")}
    return dict(whole, **money, strategy=name, after=after, sessions=len(rows),
                dearer=sorted(dearer), dearer_at_best=sum(row["best"] < 0 for row in rows),
                pays=so.is_recommended(int(whole["recorded"]), saves))


def compare(paths: Iterable[str], names: Iterable[str],
            after: Optional[int] = None) -> List[Dict[str, Any]]:
    """What each strategy would have saved in the sessions at ``paths``; no path: where agents keep
    them."""
    chosen = {name: strategy_named(name) for name in names}
    rows: Dict[str, Dict[str, List[Dict[str, Any]]]] = {name: {} for name in chosen}
    for unit, sessions, heard in sessions_told(paths):
        for name, (strategy, usual) in chosen.items():
            rows[name][unit] = [priced(session, drops_in(session, heard, strategy,
                                                         usual if after is None else after))
                                for session in sessions]
    return [summed(name, chosen[name][1] if after is None else after,
                   [row for unit in found.values() for row in unit])
            for name, found in rows.items()]


# One's own agent loop

@dataclass
class Message:
    """``content`` is what is sent now, ``original`` what was added; ``calls``: answers before it
    came; ``cut_after``: answers before it was shortened."""

    role: str
    content: str
    tool: Tool
    at: float
    calls: int
    original: str = ""
    cut_after: int = -1


class SessionContext:
    """The messages of an agent loop, within ``limit`` tokens. ``strategy`` shortens tool results
    older than the last ``recent`` messages; system messages and recent ones stay as they are.
    Tokens are characters times ``rate``, which every reported usage measures anew."""

    def __init__(self, limit: int = 100_000, *, model: str = "sonnet",
                 strategy: Callable[..., Any] = head_tail, recent: int = 6):
        self.limit, self.model, self.recent, self.rate = limit, model, recent, 0.25
        self._compress = strategy() if isinstance(strategy, type) else strategy
        self.messages: List[Message] = []
        self.calls = 0

    def tokens(self, messages: Optional[Iterable[Message]] = None) -> int:
        """Tokens of messages; of all of them where none are given."""
        return round(self.rate * sum(len(m.content)
                                     for m in (self.messages if messages is None else messages)))

    def add_message(self, role: str, content: str, *, tool: str = "", path: str = "",
                    usage: Optional[so.Usage] = None, at: Optional[float] = None) -> Message:
        """Add a message of "system", "user", "assistant" or "tool" (with the tool's name and the
        file it read); ``usage``: what the provider reported for an answer to all messages; ``at``:
        seconds since 1970 (now)."""
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"unknown role {role!r}")
        sent = sum(len(m.content) for m in self.messages)
        if usage and sent:
            self.rate = (sum(usage) - usage.output) / sent
        message = Message(role, content, Tool(tool, path), time.time() if at is None else at,
                          self.calls, content)
        self.messages.append(message)
        self.calls += role == "assistant"
        return message

    def get_recent_messages(self, count: Optional[int] = None) -> List[Message]:
        """The last messages that are not the system's, oldest first."""
        count = self.recent if count is None else count
        return [m for m in self.messages if m.role != "system"][-count:] if count > 0 else []

    def get_messages_within_limit(self, limit: Optional[int] = None) -> List[Message]:
        """The system's messages and, of the others, the latest ones that fit; a result never
        without its call."""
        kept = [m for m in self.messages if m.role == "system"]
        room = (self.limit if limit is None else limit) - self.tokens(kept)
        others = [m for m in self.messages if m.role != "system"]
        first = len(others)
        while first and self.tokens(others[first - 1:]) <= room:
            first -= 1
        while first < len(others) and others[first].role == "tool":
            first += 1
        chosen = set(map(id, kept + others[first:]))
        return [m for m in self.messages if id(m) in chosen]

    def compress_context(self, limit: Optional[int] = None) -> int:
        """Shorten old tool results, oldest first, until the context is within the limit; the tokens
        it got shorter."""
        before, fresh = self.tokens(), set(map(id, self.get_recent_messages()))
        for message in self.messages:
            if self.tokens() <= (self.limit if limit is None else limit):
                break
            if message.role == "tool" and id(message) not in fresh and message.cut_after < 0:
                short = self._compress(message.content, message.tool)
                if len(short) < len(message.content):
                    message.content, message.cut_after = short, self.calls
        return before - self.tokens()

    def get_summary(self) -> Dict[str, Any]:
        """Messages by role, tokens now and as added, and what the compression saves by the replay:
        USD, negative where writing the prefix again costs more than it saves;
        ``pays`` says which."""
        roles = [m.role for m in self.messages]
        session, cuts = self.session()
        analysis = so.Analysis(session)
        best = Compressed(analysis, cuts)
        analysis.follow(best)
        return {"messages": {role: roles.count(role) for role in sorted(set(roles))},
                "tokens": self.tokens(),
                "original_tokens": round(self.rate * sum(len(m.original) for m in self.messages)),
                "compressed": len(cuts), "calls": self.calls,
                "recorded": session.cost_in_pico / so.PICO,
                "saves": best.saved / so.PICO, "pays": best.saved > 0}

    def session(self) -> Tuple[so.Session, Dict[str, Tuple[int, int]]]:
        """The loop as a session in which nothing was compressed, under the provider's cache rule
        (what was sent in the last five minutes is read, the rest written),
        and the cuts by event id."""
        told = so.Recorder(so.TranscriptReader(), ["session-context"])
        results: List[Tuple[Message, so.SessionEvent]] = []
        length = cached = 0
        last = 0.0
        for number, m in enumerate(self.messages):
            told.at(so.time_text(m.at), number + 1)
            tokens = round(self.rate * len(m.original))
            if m.role == "system":
                told.context(so.Source.SYSTEM, len(m.original))
            elif m.role == "user":
                told.prompt(m.original)
            elif m.role == "tool":
                told.tool(f"t{number}", m.tool or "tool",
                          {"file_path": m.tool.path} if m.tool.path else {}, 0)
                results.append((m, told.returned(f"t{number}", m.original)))
            else:
                read = cached if m.at - last <= CACHE_SECONDS else 0
                usage = so.Usage(write_5m=length - read, read=read, output=tokens)
                told.call(f"r{number}", self.model, usage, text=len(m.original))
                cached, last = length, m.at
            length += tokens
        found = told.finish("session-context")
        session = found[0] if found else so.Session("session-context", "", "")
        return session, {
            event.id: (event.tokens_input * (len(m.original) - len(m.content)) // len(m.original),
                       m.cut_after - m.calls) for m, event in results if m.cut_after >= 0}


def shown(row: Dict[str, Any]) -> str:
    """A strategy's figures as two lines and a verdict."""
    share = 100 * (row["sent_then"] / row["sent"] - 1) if row["sent"] else 0.0
    lost = 100 * row["needed"] / row["shortened"] if row["shortened"] else 0.0
    low, high = sorted((row["worst"], row["best"]))
    verdict = "pays" if row["pays"] else "DOES NOT PAY"
    percent = [f"{100 * saved / row['recorded']:+.1f}%" if row["recorded"] else "-"
               for saved in (low, high)]
    return (f"{row['strategy']} "
            f"({'at once' if not row['after'] else 'after %d calls' % row['after']}): {verdict}\n"
            f"  tokens   {row['dropped']:,} dropped from {row['shortened']:,} results; "
            f"{share:+.1f}% sent\n"
            f"  dollars  saves {low:,.4f} to {high:,.4f} of {row['recorded']:,.4f} ({percent[0]} "
            f"to {percent[1]})\n"
            f"  dearer   {len(row['dearer'])} of {row['sessions']} sessions "
            f"({row['dearer_at_best']} at best)\n"
            f"  answers  {row['needed']:,} of the shortened results were needed by a later call "
            f"({lost:.1f}%)")


def main(argv: Optional[List[str]] = None) -> int:
    """Print what each strategy saves; 0, or 1 where a strategy cannot be had."""
    parser = argparse.ArgumentParser(description="What compressing tool results would have saved.",
                                     allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="TRANSCRIPT",
                        help="files or folders (default: where agents keep them)")
    parser.add_argument("--strategy", action="append", metavar="NAME",
                        help=f"{', '.join(STRATEGIES)}, or your own as MODULE:FUNCTION; "
                        "repeatable (default: all four)")
    parser.add_argument("--after", type=int, metavar="K",
                        help="compress results K calls old (default: 0, mask: 10)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    names = options.strategy or list(STRATEGIES)
    try:
        if not options.strategy and importlib.util.find_spec("tree_sitter_language_pack") is None:
            print(f"left out: {EXTRA}", file=sys.stderr)
            names.remove("outline")
        rows = compare(options.paths, names, options.after)
    except (ImportError, ValueError, so.StorageError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.format == "json":
        print(json.dumps({"strategies": rows}, indent=2))
    elif not any(row["sessions"] for row in rows):
        print("no sessions found")
    else:
        print("\n".join(map(shown, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
