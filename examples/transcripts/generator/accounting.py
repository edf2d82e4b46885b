"""Sessions in which counting goes wrong easily, and three longer ones with much waste at once."""

from .labels import again, case, finding, reread, spike
from .recorders import SYSTEM, WORDS, Claude, Codex, Gemini, Tool, code, failing, prose, tokens_of

RULE = "accounting"


def work(s, count=2):
    s.browse(count, 3)
    s.say("Done, all checks pass.")


def claude_traps():
    s = Claude("response-over-many-lines", "Add a note about rounding to the readme.")
    for word in WORDS[:4]:
        s.turn(Tool("Read", {"file_path": s.path("src/%s.py" % word)},
                    "\n".join(code(word, 1, 4)), 46),
               text="Next I look at the %s module." % word,
               think=prose(20),
               thought=5)
    s.say("The note is written.")
    case(s, RULE, False,
         "One response over three lines (thinking, text, tool) with its usage on each; "
         "the output grows.")

    s = Claude("parallel-tools-interleaved", "Compare the three price modules.")
    s.turn(*[
        Tool("Read", {"file_path": s.path("src/%s.py" % word)}, "\n".join(code(word, 1, 4)), 46)
        for word in WORDS[:3]
    ],
           interleave=True)
    work(s)
    case(s, RULE, False, "Tool results stand between the lines of one response.")

    s = Claude("resumed-session", "Start with the rounding problem, I will be back tomorrow.")
    work(s)
    later = s.fork()
    later.wait(900)
    later.ask("Go on with the receipts, please.")
    work(later, 2)
    case(s, RULE, False,
         "The resumed session repeats the whole history in a second file: the calls count once.")

    s = Claude("forked-session", "Prepare both variants of the receipt.")
    work(s)
    branch = s.fork()
    for part, prompt in ((s, "Now the long variant."), (branch, "Now the short variant.")):
        part.wait(5)
        part.ask(prompt)
        work(part)
    case(s, RULE, False,
         "A branch begins with the same history, then both go on: that part counts once.")

    for layout, version, what in (("subagents", "2.1.208", "a file under subagents/"),
                                  ("beside", "2.0.60", "agent-<id>.jsonl beside the session"),
                                  ("inline", "1.0.98", "lines of the main file"),
                                  ("progress", "2.1.39", "agent_progress lines only")):
        s = Claude("subagent-" + layout, "Have a sub-agent look at the cart.")
        s.version = version
        s.browse(1, 3)
        s.delegate("Find out where prices are rounded.", lambda child: child.browse(2, 4), layout)
        work(s, 1)
        case(s, RULE, False,
             "The sub-agent's calls are in %s: its own window, counted in the session." % what)

    s = Claude("compaction-call-recorded", "Summarise what we know and go on.")
    work(s)
    s.compact("Three modules were read; the cart rounds twice.", call=True)
    work(s, 3)
    case(s, RULE, False, "The call that wrote the summary has a file of its own and is real spend.")

    s = Claude("synthetic-message", "Check the cart again.")
    s.browse(2, 3)
    usage = {
        "input_tokens": 0, "output_tokens": 0, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0
    }
    s.add("assistant",
          isApiErrorMessage=True,
          message={
              "id": s.uid(), "model": "<synthetic>", "role": "assistant", "type": "message",
              "stop_reason": "stop_sequence", "stop_sequence": "", "usage": usage,
              "content": [{"type": "text", "text": "API Error: 529 overloaded_error"}]
          })
    work(s)
    case(s, RULE, False, "A <synthetic> message is no model call.")

    s = Claude("two-iterations", "Write the security notes.")
    s.browse(5, 3)
    read, fresh = s.context, s.back + s.entering
    s.turn(text="The notes are in docs/security.md.")
    last = s.lines[-1]["message"]
    last["model"], other = ("claude-sonnet-4-6", {
        "input_tokens": 3, "cache_creation_input_tokens": fresh - 3,
        "cache_read_input_tokens": read, "output_tokens": 11
    })
    first = dict(other, type="message", model=s.model)
    last["usage"]["iterations"] = [
        first, dict(other, type="fallback_message", model=last["model"], output_tokens=8)
    ]
    for key, amount in (("uncached_input", 3), ("cache_write", fresh - 3),
                        ("cache_read", read), ("output", 11)):
        s.usage[key] += amount
    case(s,
         RULE,
         False,
         "Two iterations, the second by a fallback model: both are billed, the usage "
         "shows the last.",
         model_calls=None)

    s = Claude("output-placeholders", "Tidy up the tests.")
    s.version = "2.1.17"
    for word in WORDS[:5]:
        s.turn(Tool("Read", {"file_path": s.path("src/%s.py" % word)},
                    "\n".join(code(word, 1, 4)), 46),
               output=3,
               final=False)
    s.turn(text="The tests are tidy now, nothing else was changed.", output=2, final=False)
    case(s, RULE, False,
         "No line has a stop_reason: the recorded output is a placeholder, a lower bound.")

    s = Claude("sidechain-replay", "How does the coupon code work?")
    work(s, 3)
    s.files["%s/agent-%s.jsonl" % (s.slug, "aside01")] = [
        dict(line,
             isSidechain=True,
             agentId="aside01",
             **({"requestId": "req_again%d" % number} if "requestId" in line else {}))
        for number, line in enumerate(s.lines)
    ]
    case(s, RULE, False,
         "An aside replays the parent's messages: same message ids, other request ids, "
         "counted once.")

    s = Claude("cache-expired", "Go on with the receipts after lunch.")
    s.browse(2, 3)
    s.wait(75)
    s.expired = True
    work(s)
    case(s, RULE, False,
         "After a pause the context was written to the cache again: a rebuild, nobody's read.")


def other_traps():
    s = Codex("codex-repeated-token-counts", "list the open questions in the code")
    s.repeat = True
    work(s, 3)
    case(s, RULE, False,
         "Each token_count comes twice, and once without info; cached tokens are inside the input.")

    s = Codex("codex-session-meta-again", "what is in this repository?")
    s.browse(2, 3)
    s.lines.append(dict(s.meta, timestamp=s.stamp()))
    work(s)
    case(s, RULE, False, "session_meta is repeated in mid-file: still one session.")

    s = Codex("codex-compacted", "go on until the cart is done")
    s.read("src/cart.py", 4)
    s.browse(2, 3)
    summary = "The cart was read. " + prose(200)
    s.add("compacted",
          message=summary,
          replacement_history=[{
              "type": "message", "role": "user", "content": [{"type": "input_text", "text": s.task}]
          }])
    s.add("event_msg", "context_compacted")
    s.context, s.back, s.entering = 11264, 0, SYSTEM + tokens_of(summary)
    s.read("src/cart.py", 4)
    work(s, 2)
    case(s, RULE, False, "After a compaction the file is read again, in a new window.")

    s = Codex("codex-without-usage", "What is left to do?")
    work(s, 3)
    for line in s.lines:
        if line["payload"].get("type") == "token_count":
            line["payload"]["info"] = None
    s.usage.update(dict.fromkeys(s.usage, 0))
    case(s, RULE, False, "No token_count holds a usage: events without tokens.", model_calls=None)

    s = Gemini("gemini-cached-inside-input", "What does the receipt module do?")
    s.browse(5, 3)
    s.say("It prints receipts, one line per article.", thought=4)
    case(s, RULE, False,
         "Cached tokens are part of input; thoughts are not part of output, but billed as output.")

    s = Lines("gemini-messages-again", "What does the receipt module do with refunds?")
    work(s, 3)
    case(s, RULE, False,
         "A message is written again under its id when its tools are done: one call.")

    s = Gemini("gemini-resumed-into-jsonl", "Check the receipts for typos.")
    work(s)
    head = dict(s.head, lastUpdated=s.stamp())
    copies = [dict(m, content=[{"text": m["content"]}]) if m["type"] == "user" else m
              for m in s.messages]
    s.messages = s.files[s.file + ".jsonl"] = [head] + copies
    s.jsonl = True
    s.ask("And the invoices?")
    work(s, 2)
    case(s, RULE, False, "The .jsonl begins with a copy of the .json it resumes; both files stay.")

    s = Lines("gemini-rewound", "Shorten the footer of the receipt.")
    s.browse(2, 3)
    turn = s.messages[-1]["id"]
    work(s)
    s.messages.append({"$rewindTo": turn})
    case(s, RULE, False, "The conversation was rewound; what was spent stays spent.")


class Lines(Gemini):
    jsonl = True


def checkout_story():
    """Claude Code: rereads, a repeated search, a failed retry, a sub-agent, a compaction in one
    session."""
    s = Claude("story-checkout",
               "The checkout is off by one cent for some customers. Find out why and fix it.",
               "shop")
    s.search("total", "src", text="Let me see where totals are computed.")
    cart = [s.read("src/cart.py", 6, text="The cart first.")]
    s.browse(4, 6)
    first = s.search("round_cents", "src", 3)
    s.run(
        "git log --oneline -5", "\n".join("%x1f %s the %s" % (4711 * (i + 3), w, WORDS[i])
                                          for i, w in enumerate(
                                              ("Round", "Move", "Rename", "Test", "Drop"))))
    cart.append(s.read("src/cart.py", 6))
    s.browse(3, 6)
    cart.append(s.read("src/cart.py", 6))
    second = s.search("round_cents", "src", 3)
    s.delegate("Find out where src/cart.py is used.", lambda child:
               (child.read("src/cart.py", 6), child.browse(2, 6)))
    test = ("python3 -m pytest -q tests/test_checkout.py",
            failing("test_cents", "AssertionError: 4199 != 4200"), 1)
    runs = [s.run(*test)]
    s.browse(2, 6)
    runs.append(s.run(*test))
    s.edit("src/cart.py", text="Round once, at the end.")
    s.read("src/cart.py", 6)
    s.run(test[0], "24 passed in 0.33s")
    s.ask("Good. Please do the same for the invoices.")
    tax = [s.read("src/invoice.py", 6)]
    s.browse(3, 6)
    tax.append(s.read("src/invoice.py", 6))
    s.say("The invoices round once per line.")
    s.compact("The cart rounds once now; the invoices are next. " + prose(240))
    s.read("src/invoice.py", 6)
    s.edit("src/invoice.py")
    s.run("python3 -m pytest -q tests", "61 passed in 0.92s")
    s.say("Both round once now; all tests pass.")
    case(s, "story", True,
         "Rereads, a repeated search and a failed retry in an ordinary afternoon.", None, [
             reread("src/cart.py", *cart[1:]),
             reread("src/invoice.py", *tax[1:]),
             again("REPEATED_SEARCH", first, second, query="round_cents"),
             again("FAILED_RETRY", *runs)
         ])


def migration_story():
    """Codex: a large file, the same search three times, a build tried again, and much reasoning."""
    s = Codex("codex-story-logging",
              "move all modules to the new logging helper and keep the build green", "weather-cli")
    s.parallel = False
    s.browse(3, 6)
    found = [s.search("old_log", "src")]
    s.run("cat src/messages_table.py",
          "\n".join(s.source("src/messages_table.py", 560)),
          limit=20000,
          tokens=10400)
    s.browse(3, 6)
    found.append(s.search("old_log", "src"))
    s.run("git status --short", "?? notes.txt")
    found.append(s.search("old_log", "src"))
    for word in WORDS[:6]:
        s.edit("src/%s.py" % word)
    error = (
        "error[E0425]: cannot find function `old_log` in this scope\n --> src/route.rs:12:5\n"
        "error: aborting")
    runs = [s.run("cargo build", error, 101)]
    s.browse(3, 6)
    runs += [s.run("cargo build", error, 101) for _ in range(2)]
    s.edit("src/route.rs")
    s.run("cargo build", "   Finished dev profile in 4.12s")
    helper = [s.read("src/logging.rs", 6)]
    s.browse(3, 6)
    helper.append(s.read("src/logging.rs", 6))
    s.say("Every module uses the new helper; the build is green.")
    case(s, "story", True,
         "A large file read whole, one search run three times, one build tried again unchanged.",
         None, [again("REPEATED_SEARCH", *found, query="old_log"),
                again("FAILED_RETRY", *runs),
                reread("src/logging.rs", *helper[1:]),
                finding("LARGE_FILE_UNCOMPRESSED", 6240, 10400, file_path="src/messages_table.py"),
                spike()
         ])


def handbook_story():
    """Gemini: a long afternoon with pages read twice."""
    s = Gemini("gemini-story-handbook",
               "Bring the handbook up to date with the code, chapter by chapter.", "blog-engine")
    costs, found = [], []
    for number in range(10):
        s.wait(9)
        s.browse(1, 6)
        if number in (1, 4, 8):
            costs.append(s.read("docs/contents.md", 6))
        s.wait(8)
        if number in (3, 6):
            found.append(
                s.run("git log --oneline -2",
                      "%x Round once\n%x Add coupons" % (77001 + number, 55002)))
        s.browse(1, 6)
    first, second = s.search("deprecated", "docs"), s.search("deprecated", "docs")
    s.say("All ten chapters match the code again.")
    case(s, "story", True,
         "Almost three hours in one session, its table of contents read three times.", None, [
             reread("docs/contents.md", *costs[1:]),
             again("REPEATED_SEARCH", first, second, query="deprecated")
         ])


def write_all():
    for group in (claude_traps, other_traps, checkout_story, migration_story, handbook_story):
        group()
