"""The pairs of OpenCode: exports, with sub-agents, compactions and commands that fail silently."""

from .labels import case, pair, reread
from .recorders import OpenCode, failing
from .waste import twice

CART = "src/cart.py"


def look(s):
    return s.read(CART, 6)


def test_run(s):
    return s.run("pytest -q tests/test_cart.py", failing("test_total", "assert 401 == 400"), code=1)


def compacted(s, bad):
    look(s)
    s.browse(3, 6)
    if not bad:
        s.compact("The cart rounds twice. Next: round once, at the end.")
    second = look(s)
    s.say("It rounds once now.")
    return [reread(CART, second)]


def helped(s, bad):
    """The helper's second read is waste where the helper had read the file itself."""
    costs = []

    def work(child):
        if bad:
            look(child)
        child.browse(3, 6)
        costs.append(look(child))
        child.say("The totals are rounded twice.")

    look(s)
    s.browse(3, 6)
    s.helper("Find where totals are rounded", work)
    s.say("Rounded once, then.")
    return [reread(CART, costs[0])]


def write_all():
    pair(OpenCode, "RepeatedFileRead", "Round the cart total once",
         ("opencode-read-twice",
          "read twice on an unchanged file, with the numbers the tool adds."),
         ("opencode-read-after-edit", "The file was edited between the two reads."),
         twice("REPEATED_FILE_READ", look, lambda s: s.edit(CART), file_path=CART))
    pair(OpenCode, "RepeatedFileRead", "Where are totals rounded?",
         ("opencode-read-twice-in-one-window", "The same file twice, no compaction in between."),
         ("opencode-read-after-compaction",
          "A summary replaced the context between the two reads."), compacted)
    pair(OpenCode, "RepeatedFileRead", "Let a helper find the rounding",
         ("opencode-sub-agent-reads-twice", "A sub-agent reads a file twice in its own window."),
         ("opencode-sub-agent-reads-too",
          "A sub-agent reads what its parent has read: another window."), helped)
    pair(OpenCode, "RepeatedSearch", "Who calls load?",
         ("opencode-search-twice", "grep twice for the same words."),
         ("opencode-search-after-edit", "A file was edited between the two searches."),
         twice("REPEATED_SEARCH", lambda s: s.search("def load"), lambda s: s.edit("src/loader.py"),
               query="def load"))
    pair(OpenCode, "FailedRetry", "Make the cart test pass",
         ("opencode-test-again",
          "The exit code stands in the metadata alone; nothing was changed."),
         ("opencode-test-after-a-fix", "The cart was edited before the test ran again."),
         twice("FAILED_RETRY", test_run, lambda s: s.edit(CART)))
    story = OpenCode("opencode-thinking-in-the-output", "Explain the rounding", "shop")
    story.browse(4, 6)
    story.say("Per line, and again at the end. " * 8, thought=20)
    case(story, "accounting", False, "Reasoning is part of the output and is counted once.")
