"""Tests of compression.py: strategies, what they lose, what they cost, the live context."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import compression  # noqa: E402
import sessionoptimizer as so  # noqa: E402
from compression import (  # noqa: E402
    Compressed, Deduplicate, Drops, SessionContext, Told, Tool, drops_in, priced)

SAMPLES = os.path.join(HERE, "transcripts")
needs_extra = pytest.mark.skipif(importlib.util.find_spec("tree_sitter_language_pack") is None,
                                 reason="needs the extra compression (tree-sitter-language-pack)")

OUTLINES = [
    ("a.go", ("package a\n\n// F adds\nfunc F(a int) int {\n\treturn a + 1\n}\n\ntype T struct {\n"
              "\tX int\n}\n\nfunc (t *T) M() {\n\tcall(t.X)\n}\n"),
     ("package a\n\n// F adds\nfunc F(a int) int { ... }\n\ntype T struct {\n\tX int\n}\n\n"
      "func (t *T) M() { ... }\n")),
    ("a.ts", ("export class A {\n  m(a: number): void {\n    use(a);\n  }\n}\nexport const f = (a: "
              "string) => {\n  return a;\n};\nfunction g() {\n  return 1;\n}\n"),
     ("export class A {\n  m(a: number): void { ... }\n}\n"
      "export const f = (a: string) => { ... };\nfunction g() { ... }\n")),
    ("a.py", ("class A:\n    def f(self) -> str:\n        '''Dóc.'''\n        x = 'é'\n"
              "        return x\n\n    def g(self):\n        return 11\n"),
     ("class A:\n    def f(self) -> str:\n        '''Dóc.'''\n        ...\n\n    def g(self):\n"
      "        ...\n")),
    ("a.rs", ("impl A {\n    /// Doc\n    pub fn f(&self) -> u8 {\n        1 + 1\n    }\n}\n"),
     "impl A {\n    /// Doc\n    pub fn f(&self) -> u8 { ... }\n}\n"),
    ("A.java", ("class A {\n  A() {\n    start();\n  }\n  int f(int a) {\n    return a;\n  }\n}\n"),
     "class A {\n  A() { ... }\n  int f(int a) { ... }\n}\n"),
    ("a.md", ("# T\n\nfirst\nsecond line\n\nanother paragraph\n\n## S\n\n- one item\n"
              "- two items\n"), "# T\n\nfirst\n...\n\n## S\n\n- one item\n...\n"),
]


@needs_extra
@pytest.mark.parametrize("path, text, short", OUTLINES, ids=[row[0] for row in OUTLINES])
def test_an_outline_keeps_what_a_file_offers(path, text, short):
    assert compression.outline(text, Tool("Read", path)) == short


@needs_extra
@pytest.mark.parametrize("path, text", [
    ("a.txt", "anything\n" * 50), ("", "func F() {\n}\n"), ("a.go", "func F( {\n  broken\n"),
    ("a.go", ""), ("a.rs", "fn f() {}"), ("a.md", "text without a heading")])
def test_what_no_outline_can_be_made_of_stays(path, text):
    assert compression.outline(text, Tool("Read", path)) == text


def test_the_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tree_sitter_language_pack", None)
    with pytest.raises(ImportError, match=r"pip install 'sessionoptimizer\[compression\]'"):
        compression.outline("x", Tool("Read", "a.go"))
    assert compression.outline("x", Tool("Read", "a.txt")) == "x"


def test_lines_shown_before_are_named_instead_of_shown():
    block, other = ("\n".join(f"line {n} of the text" for n in range(9)),
                    "\n".join(f"other {n} of it" for n in range(9)))
    deduplicate = Deduplicate()
    assert deduplicate(block, "Bash") == block
    assert deduplicate(f"new\n{block}\nend", "Bash") == "new\n[9 lines as shown above]\nend"
    assert deduplicate(other, "Bash") == other
    assert Deduplicate()(block, "Bash") == block
    few = "\n".join(block.split("\n")[:compression.SHINGLE - 1])
    assert deduplicate(few, "Bash") == few


def test_head_and_tail():
    lines = [f"line {n}" for n in range(100)]
    assert (compression.head_tail("\n".join(lines), "Bash").split("\n")
            == lines[:20] + ["[60 lines left out]"] + lines[-20:])
    assert compression.head_tail("\n".join(lines[:41]), "Bash") == "\n".join(lines[:41])


LONG = "\n".join(f"this is line number {n} of a long file" for n in range(200))


def loop(*results, follow=()):
    """A recorded session: one tool call per result, one answer each, every token cached; what was
    told of it. ``follow``: the arguments of the calls."""
    heard = compression.Listener.heard
    heard.clear()
    told = compression.Listener(so.TranscriptReader(), ["s"])
    told.at("2026-11-20T10:00:00Z", 1)
    told.prompt("Do it", 400)
    context, fresh = 0, 10_000
    for number, text in enumerate(results):
        told.call(f"r{number}", "sonnet",
                  so.Usage(write_5m=fresh, read=context, output=50), text=200)
        told.tool(f"t{number}", "Read", {"file_path": f"/p/{number}.txt",
                                         "extra": (dict(enumerate(follow)).get(number, ""))}, 200)
        told.returned(f"t{number}", text)
        context, fresh = context + fresh, 50 + len(text) // 4
    told.call("last", "sonnet", so.Usage(write_5m=fresh, read=context, output=50), text=200)
    session, = told.finish()
    return session, dict(heard)


def test_without_a_cut_the_replay_is_the_bill():
    session, _ = loop(LONG, LONG, "short")
    row = priced(session, Drops())
    assert (row["recorded"] > 0
            and (row["best"], row["worst"], row["sent"] - row["sent_then"]) == (0, 0, 0))


def test_a_cut_at_once_saves_its_write_and_every_later_read():
    session, heard = loop(LONG, "a", "b")
    drops = drops_in(session, heard, compression.head_tail)
    (event_id, (tokens, after)), = drops.cuts.items()
    event = next(event for event in session.events if event.id == event_id)
    short = compression.head_tail(LONG, "Read")
    assert (tokens, after) == (event.tokens_input * (len(LONG) - len(short)) // len(LONG), 0)
    rates = session.price_of(event).rates
    row = priced(session, drops)
    assert row["best"] == row["worst"] == tokens * (rates.write_5m + 2 * rates.read)
    assert row["sent"] - row["sent_then"] == 3 * tokens


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_late_cut_costs_what_clearing_results_costs_in_whatif(after):
    session, _ = loop(LONG, LONG + "x", "y" * 4_000, LONG, "z")
    cuts = {event.id: (event.tokens_input - so.CLEARED_RESULT, after) for event in session.events
            if event.event_type is so.EventType.FILE_READ
            and event.tokens_input > so.CLEARED_RESULT}
    assert len(cuts) == 4
    replay = Compressed(so.Analysis(session), cuts)
    so.Analysis(session).follow(replay)
    saves = so.what_if([session], f"clear --older {after}")["saves"]
    assert replay.saved / so.PICO == pytest.approx(saves["middle"], abs=1e-9) and replay.saved != 0


NEEDED = "this is line number 100 of a long file"
LOSSES = [  # what comes later, the strategy, after: how many results were needed
    (["ok"], ["", ""], 0, 0), (["ok"], ["", NEEDED], 0, 1),
    (["ok"], ["", "  " + NEEDED + "  "], 0, 1),
    (["ok"], ["", "this is line number 3 of a long file"], 0, 0),  # was kept
    ([f"7\t{NEEDED}"], ["", ""], 0, 1),                            # read again
    (["ok"], ["", NEEDED], 2, 0), (["ok", "ok", "ok"], ["", "", "", NEEDED], 2, 1),
]


@pytest.mark.parametrize("later, arguments, after, needed", LOSSES)
def test_an_answer_is_lost_where_a_later_call_needs_a_dropped_line(later, arguments, after, needed):
    session, heard = loop(LONG, *later, follow=arguments)
    drops = drops_in(session, heard, compression.head_tail, after)
    row = priced(session, drops)
    assert len(drops.cuts) == 1 and len(drops.lost) == row["needed"] == needed
    assert (row["worst"] < row["best"]) == bool(needed)


def test_what_was_needed_comes_back_at_the_price_of_a_call():
    session, heard = loop(LONG, "ok", follow=["", NEEDED])
    drops = drops_in(session, heard, compression.head_tail)
    event = next(event for event in session.events
                 if event.id == drops.lost[next(iter(drops.cuts))])
    rates, last = session.price_of(event).rates, session.events[-1]
    context = last.tokens_cache_read + 50
    row = priced(session, drops)
    assert row["worst"] == -(context * rates.read + event.tokens_output * rates.output)
    assert (compression.summed("x", 0, [row])["dearer"] == [session.id]
            and not compression.summed("x", 0, [row])["pays"])


def test_a_class_of_a_strategy_is_made_anew_for_every_window():
    heard = compression.Listener.heard
    heard.clear()
    told = compression.Listener(so.TranscriptReader(), ["s"])
    told.at("2026-11-20T10:00:00Z", 1)
    usages = [(9_000, 0), (2_000, 9_000), (2_000, 11_000), (9_000, 0), (2_000, 9_000)]
    for number, (write, read) in enumerate(usages):
        told.call(f"r{number}", "sonnet", so.Usage(write_5m=write, read=read, output=50), text=200)
        if number in (0, 1, 3):
            told.tool(f"t{number}", "Read", {"file_path": "/p/a.txt"}, 200)
            told.returned(f"t{number}", LONG)
        if number == 2:
            told.compaction(100)
    session, = told.finish()
    assert len(drops_in(session, dict(heard), Deduplicate).cuts) == 1


def run(*arguments):
    return subprocess.run(
        [sys.executable, os.path.join(HERE, "compression.py"), *arguments], timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def test_the_samples_by_the_command_and_the_same_bill_as_a_scan(tmp_path):
    done = run(SAMPLES, "--format", "json", "--strategy", "head_tail", "--strategy", "mask",
               "--after", "1")
    rows = json.loads(done.stdout)["strategies"]
    found = so.SessionOptimizer(str(tmp_path)).whatif("none", [SAMPLES])
    assert done.returncode == 0 and [row["strategy"] for row in rows] == ["head_tail", "mask"]
    assert all(row["recorded"] == pytest.approx(found["recorded"]) for row in rows)
    assert all(row["sent_then"] <= row["sent"] and row["worst"] <= row["best"] for row in rows)


def test_nothing_is_kept_and_the_readers_are_as_they_were():
    recorder = so.Recorder
    assert compression.compare([SAMPLES], ["deduplicate"])[0]["sessions"] > 10
    assert so.Recorder is recorder and compression.Listener.heard == {}


@pytest.mark.parametrize("arguments, error", [
    (["--strategy", "nothing"], "unknown strategy 'nothing': use one of outline, "),
    (["--strategy", "json:nothing"], "json has no nothing"),
    (["--strategy", "no_such_module:f"], "No module named"),
    (["/no/such/place"], "/no/such/place")])
def test_what_cannot_be_had_is_said(arguments, error):
    done = run(*arguments)
    assert ((done.returncode, done.stdout) == (1, "") and error in done.stderr
            and "Traceback" not in done.stderr)


def test_a_strategy_of_ones_own():
    done = run(SAMPLES, "--strategy", "compression:head_tail")
    assert done.returncode == 0 and "compression:head_tail (at once): " in done.stdout


def live(**options):
    context = SessionContext(**options)
    context.add_message("system", "You are careful. " * 20, at=0.0)
    for number in range(6):
        context.add_message("user", f"Question {number}", at=number * 10.0)
        context.add_message("assistant", "I look.", at=number * 10.0 + 1)
        context.add_message("tool", LONG, tool="Read", path=f"/p/{number}.txt",
                            at=number * 10.0 + 2)
    return context


def test_a_live_context_shortens_old_results_and_keeps_the_rest():
    context = live(limit=8_000, recent=6)
    before = [message.content for message in context.messages]
    saved = context.compress_context()
    after = [message.content for message in context.messages]
    changed = [number for number, pair in enumerate(zip(before, after)) if pair[0] != pair[1]]
    assert saved > 0 and changed and changed[0] == 3 and max(changed) < len(before) - 6
    assert {context.messages[number].role for number in changed} == {"tool"}
    assert live(limit=10**6).compress_context() == 0


def test_messages_within_a_limit_are_the_systems_and_the_latest():
    context = live()
    assert [m.content for m in context.get_recent_messages(2)] == ["I look.", LONG]
    kept = context.get_messages_within_limit(5_000)
    assert kept[0].role == "system" and kept[1].role != "tool" and kept[-1] is context.messages[-1]
    assert 1 < len(kept) < len(context.messages) and context.tokens(kept) <= 5_000
    assert context.get_messages_within_limit() == context.messages
    assert ([m.role for m in context.get_messages_within_limit(0)] == ["system"]
            and context.get_recent_messages(0) == [])


def test_what_a_live_context_saves_depends_on_the_calls_that_follow():
    context = live(limit=0, recent=1)
    context.compress_context()
    context.add_message("assistant", "Done.", at=61.0)
    once = context.get_summary()
    for number in range(60):
        context.add_message("user", "More", at=62.0 + number)
        context.add_message("assistant", "Done.", at=62.5 + number)
    often = context.get_summary()
    assert (once["compressed"] == often["compressed"] == 5 and often["saves"] > once["saves"]
            and often["pays"])
    assert often["recorded"] > often["saves"] and often["tokens"] < often["original_tokens"]
    assert live().get_summary()["saves"] == 0 and SessionContext().get_summary()["recorded"] == 0


def test_a_reported_usage_measures_the_tokens_per_character():
    context = SessionContext()
    context.add_message("user", "x" * 1_000)
    context.add_message("assistant", "ok", usage=so.Usage(uncached=100, read=400, output=7))
    assert context.rate == 0.5 and context.tokens() == 501
    with pytest.raises(ValueError):
        context.add_message("robot", "x")


def test_a_result_without_a_text_is_left_alone():
    session, heard = loop(LONG, "a")
    assert drops_in(session, {key: Told() for key in heard}, compression.mask).cuts == {}
