"""The pairs: for each analyzer, guilty cases and innocent look-alikes that differ in one fact."""

from .labels import again, case, finding, pair, reread, spike
from .recorders import PREFIX, WORDS, Claude, Codex, Gemini, Tool, failing, matches, prose


# Long enough that what is wasted is listed: the report leaves out findings below 50 tokens.
MISSING = ("File does not exist. Note: your current working directory is the project's. "
           "Did you mean one of the modules beside it? There are cart.py, loader.py, orders.py, "
           "prices.py and shipping.py.")
NO_RULE = ("make: Entering directory 'the project'\n"
           "make: *** No rule to make target 'clean'.  Stop.\n"
           "make: Leaving directory 'the project'\n"
           "The targets of this makefile are: build, check, dist, docs, install and test.")
REFUSED = ("Request failed with status code %d: the page could not be fetched from "
           "docs.example.org. The address was tried as it was given, with a time-out of thirty "
           "seconds, and without any credentials.")


def status(s):
    s.run("git status --short", "?? notes.txt")


def twice(issue_type, what, fact, harmless=status, browse=2, lines=5, **where):
    """``what``, other work, then ``fact`` (which excuses a repetition) or something else, then
    ``what`` again."""

    def story(s, bad):
        first = what(s)
        s.browse(browse, lines)
        (harmless if bad else fact)(s)
        second = what(s)
        s.say("That is all I needed; the change is in.")
        if issue_type == "REPEATED_FILE_READ":
            return [reread(where["file_path"], second)]
        return [again(issue_type, first, second, **where)]

    return story


def mutate(command, path, output=""):
    """A shell command that changes a file."""

    def step(s):
        s.change(path)
        s.run(command, output)

    return step


def reads():
    name, cart = "RepeatedFileRead", "src/cart.py"
    look, edit = (lambda s: s.read(cart, 5)), (lambda s: s.edit(cart))
    again_cart = dict(file_path=cart)
    pair(Claude, name, "Why is the cart total a cent too high for some orders?",
         ("read-twice", "The same unchanged file is read twice."),
         ("read-after-edit", "The file was edited between the two reads."),
         twice("REPEATED_FILE_READ", look, edit, lambda s: None, **again_cart))
    pair(
        Claude, name, "Move the shipping limits into the config, please.",
        ("read-after-git-status", "A harmless command between two reads excuses nothing."),
        ("read-after-sed-i", "A shell command that names the file changed it between the reads."),
        twice("REPEATED_FILE_READ",
              lambda s: s.read("src/config.py", 5),
              mutate("sed -i 's/REVISION = 0/REVISION = 1/' src/config.py", "src/config.py"),
              file_path="src/config.py"))
    pair(
        Codex, name, "tidy up the imports in the cart module",
        ("codex-read-after-git-log", "cat twice with only git log between: nothing was changed."),
        ("codex-read-after-formatter",
         "A formatter that names no path rewrote the file between the reads."),
        twice("REPEATED_FILE_READ", look,
              mutate("black .", cart, "reformatted src/cart.py\n1 file reformatted."),
              lambda s: s.run("git log --oneline -3", "4f1c2aa Round once\n9b00d17 Add coupons"),
              **again_cart))
    pair(
        Codex, name, "compare our cart module with the one on the feature branch",
        ("codex-read-after-git-show", "git show only prints; the second cat repeats the first."),
        ("codex-read-after-checkout", "git checkout put another version of the file there."),
        twice("REPEATED_FILE_READ", look,
              mutate("git checkout feature/rounding -- src/cart.py", cart),
              lambda s: s.run("git show --stat HEAD", " src/api.py | 4 ++--"), **again_cart))
    pair(
        Gemini, name, "Regenerate the API client and check that the cart still matches it.",
        ("gemini-read-after-unknown-command",
         "An unknown command ran, but the content is byte for byte the same."),
        ("gemini-read-after-unknown-change",
         "An unknown command ran, and the content differs afterwards."),
        twice("REPEATED_FILE_READ", look, mutate("./scripts/regen.sh", cart, "done"),
              lambda s: s.run("./scripts/regen.sh", "done"), **again_cart))
    pair(Gemini, name, "Give the cart a method that counts its items.",
         ("gemini-read-twice", "read_file twice on an unchanged file."),
         ("gemini-read-after-replace", "The file was edited between the two reads."),
         twice("REPEATED_FILE_READ", look, edit, **again_cart))

    def pages(s, bad):
        s.read(cart, 12, 1, tokens=140)
        s.browse(5, 11)
        second = s.read(cart, 12, 7 if bad else 13, tokens=140)
        s.say("Both halves are consistent.")
        return [finding("REPEATED_FILE_READ", second.entered // 2, 2, file_path=cart)]

    pair(Gemini, name, "Read through the cart module and summarise it for me.",
         ("gemini-overlapping-pages",
          "Lines 7-12 are read twice: half of the second page is waste."),
         ("gemini-paged-reads", "A file is read page by page; no line comes twice."), pages)

    def union(s, bad):
        s.read(cart, 12, 1)
        s.read(cart, 12, 13)
        s.browse(3, 10)
        third = s.read(cart, 12, 7 if bad else 25)
        s.say("The rounding happens in the middle part.")
        return [finding("REPEATED_FILE_READ", third.entered, None, file_path=cart)]

    pair(Codex, name, "where in the cart module do we round?",
         ("codex-union-of-ranges",
          "Lines 7-18 are already there, half from each of two earlier reads."),
         ("codex-next-page", "The third sed -n prints lines not seen before."), union)

    def part(s, bad):
        s.read(cart, 10)
        (status if bad else edit)(s)
        s.browse(6, 9)
        second = s.read(cart, 6, 2)
        s.say("Line 3 is the one that matters.")
        return [reread(cart, second)]

    pair(Gemini, name, "Which revision does the cart report?",
         ("gemini-range-after-whole", "Six lines of a file that is in the context whole."),
         ("gemini-range-after-edit", "The same lines, read to check an edit."), part)

    def whole(s, bad):
        s.read(cart, 6, 1)
        s.read(cart, 6, 7)
        s.browse(7, 10)
        (status if bad else edit)(s)
        third = s.read(cart, 12)
        s.say("Now I have seen all of it.")
        return [finding("REPEATED_FILE_READ", third.entered, None, file_path=cart)]

    pair(Gemini, name, "Explain how coupons are applied, step by step.",
         ("gemini-whole-after-ranges", "Two ranges cover the file; then it is read whole."),
         ("gemini-whole-after-ranges-edited", "The file was edited after the ranges were read."),
         whole)

    def spelled(s, bad):
        paths = [cart, "./" + cart, "src/../" + cart, s.cwd + "/" + cart]
        if not bad:
            paths = [cart, "api/cart.py", "web/../web/cart.py", s.cwd + "/tests/cart.py"]
        costs = [s.cat("cat " + p, cart if bad else p, 6) for p in paths]
        s.browse(3, 6)
        s.say("Same class everywhere.")
        return [reread(cart, *costs[1:])]

    pair(Codex, name, "is there more than one cart module in this repo?",
         ("codex-one-file-four-spellings",
          "./a, sub/../a and the absolute path are one file, read four times."),
         ("codex-four-files-one-name", "Four different files that share a name."), spelled)

    def shell(s, bad):
        size = 12 if bad else 24
        if bad:
            s.cat("cat " + cart, cart, 12)
        costs = [
            s.cat("head -n 6 " + cart, cart, 6),
            s.cat("sed -n '7,12p' " + cart, cart, 6, 7),
            s.cat("tail -n 6 " + cart, cart, 6, size - 5)
        ]
        s.browse(5, 9)
        s.say("The last method is unused.")
        return [reread(cart, *costs)]

    pair(Codex, name, "is the last method of the cart used anywhere?",
         ("codex-cat-then-head-sed-tail",
          "head, sed -n and tail print lines that cat already showed."),
         ("codex-head-sed-tail", "head, sed -n and tail print different parts of a file."), shell)

    def mixed(s, bad):
        s.read(cart, 5)
        s.browse(2, 5)
        second = s.cat("cat " + (cart if bad else "src/basket.py"),
                       cart if bad else "src/basket.py", 5)
        s.say("They agree with each other.")
        return [reread(cart, second)]

    pair(Claude, name, "Do the cart and the basket agree on discounts?",
         ("read-then-cat", "cat prints what the Read tool has read."),
         ("read-then-cat-another", "cat prints another file."), mixed)

    def compaction(s, bad):
        s.read(cart, 5)
        s.browse(2, 5)
        if not bad:
            s.compact("The user wants whole cents. " + prose(300))
        second = s.read(cart, 5)
        s.say("Rounding is the cause.")
        return [reread(cart, second)]

    pair(Claude, name, "Prices must be whole cents everywhere. Find the places that break this.",
         ("read-again-in-one-window", "The first read is still in the context."),
         ("read-after-compaction", "A compaction threw the first read away."), compaction)

    def helper(s, bad):
        costs = []

        def work(child):
            costs.append(child.read(cart, 5))
            child.browse(2, 5)
            if bad:
                costs.append(child.read(cart, 5))

        s.read(cart, 5)
        s.browse(2, 5)
        s.delegate("Find out where src/cart.py rounds prices.", work)
        s.say("The sub-agent found it.")
        return [reread(cart, *costs[1:])]

    pair(Claude, name, "Let a sub-agent look into the rounding problem.",
         ("subagent-reads-twice", "The sub-agent reads the file twice in its own window."),
         ("subagent-reads-too",
          "Main agent and sub-agent each read the file once, in windows of their own."), helper)

    def failed(s, bad):
        if bad:
            s.read(cart, 5)
        else:
            s.fail("Read", {"file_path": s.path(cart)}, "EIO: i/o error, read")
        s.browse(4, 5)
        second = s.read(cart, 5)
        s.say("Got it on the network share.")
        return [reread(cart, second)]

    pair(Claude, name,
         "The project is on a network share now; check that you can still read the cart.",
         ("read-after-good-read", "The first read succeeded."),
         ("read-after-failed-read",
          "The first read failed, so the second is the first to bring the file."), failed)

    def cut(s, bad):
        lines = s.source(cart, 16)
        if not bad:
            lines = (["Total output lines: 16", ""] + lines[:4]
                     + ["\u202698 tokens truncated\u2026"] +
                     lines[-4:])
        s.run("cat " + cart, "\n".join(lines), original=187, limit=5000 if bad else 90)
        s.browse(7, 12)
        second = s.read(cart, 16)
        s.say("The middle part has the bug.")
        return [reread(cart, second)]

    pair(Codex, name, "find the off-by-one in the cart",
         ("codex-read-after-whole-output", "The first cat printed the whole file."),
         ("codex-read-after-cut-output", "The first output was truncated in the middle."), cut)

    def notice(s, bad):
        s.read(cart, 6)
        s.browse(4, 5)
        if bad:
            second = s.read(cart, 6)
        else:
            text = ("File unchanged since last read. The content from the earlier Read tool_result "
                    "in this conversation is still current \u2014 refer to that instead of "
                    "re-reading.")
            second = s.use("Read", {"file_path": s.path(cart)},
                           text,
                           extra={"type": "file_unchanged", "file": {"filePath": s.path(cart)}})
        s.say("Nothing new there.")
        return [reread(cart, second)]

    pair(Claude, name, "Have another look at the cart before you answer.",
         ("read-in-full-again", "The file's text entered the context a second time."),
         ("read-unchanged-notice", "The second read brought only a notice that nothing changed."),
         notice)


def searches():
    name, kind = "RepeatedSearch", "REPEATED_SEARCH"
    pair(
        Claude, name, "Who still calls the old price function?",
        ("search-twice", "The same pattern in the same folder, nothing written between."),
        ("search-after-edit", "An edit stands between, so the answer may have changed."),
        twice(kind,
              lambda s: s.search("old_price"),
              lambda s: s.edit("src/cart.py"),
              browse=3,
              query="old_price"))

    def folded(s, bad):
        first = s.search("round cents", "src")
        s.browse(2, 6)
        second = s.search("Round  Cents" if bad else "round cents", "src" if bad else "tests")
        s.say("Three places round.")
        return [again(kind, first, second, query="round cents")]

    pair(Claude, name, "Look for every place that rounds cents.",
         ("search-respelled", "Upper case and a double space do not make another search."),
         ("search-elsewhere", "The same pattern in another folder is another search."), folded)
    pair(Codex, name, "remove the last uses of legacy_tax",
         ("codex-search-twice", "rg, git status, the same rg."),
         ("codex-search-after-patch", "A patch was applied between the two searches."),
         twice(kind, lambda s: s.search("legacy_tax"), lambda s: s.edit("src/tax.py"),
               query="legacy_tax"))

    def polling(s, bad):
        found = ["build/%s-1.0.tar.gz" % word for word in WORDS[:12]]
        first = s.run("find build -name '*.tar.gz'", "\n".join(found[:9]))
        s.browse(2, 6)
        second = s.run("find build -name '*.tar.gz'", "\n".join(found[:9] if bad else found))
        s.say("The packages are there.")
        return [again(kind, first, second, query="*.tar.gz")]

    pair(Codex, name, "the build runs in another terminal, tell me when all packages are there",
         ("codex-poll-same-answer", "The same search gave the same answer."),
         ("codex-poll-new-answer", "Polling whose output changed."), polling)
    pair(
        Gemini, name, "Check whether the generated code still uses the beta endpoint.",
        ("gemini-search-twice", "Only git status stands between two equal searches."),
        ("gemini-search-after-unknown-command",
         "A command nobody recognises may have changed anything."),
        twice(kind,
              lambda s: s.search("beta_endpoint"),
              lambda s: s.run("./scripts/regen.sh", "done"),
              query="beta_endpoint"))


def large_files():
    name = "LargeFile"

    def claude(s, bad):
        s.browse(2, 8)
        s.read("src/price_table.py", 500, tokens=10000 if bad else 9999)
        s.say("The table is complete.")
        s.always = [spike()]
        return [finding("LARGE_FILE_UNCOMPRESSED", 6000, 10000, file_path="src/price_table.py")]

    pair(Claude, name, "Are all products of the autumn catalogue in the price table?",
         ("large-file", "One read of 10,000 tokens, the limit."),
         ("large-file-just-below", "One read of 9,999 tokens."), claude)

    def codex(s, bad):
        s.browse(2, 8)
        text = "\n".join(s.source("src/orders_table.py", 530))
        s.run("cat src/orders_table.py" if bad else "npm test", text, limit=20000, tokens=10200)
        s.say("No row is damaged.")
        s.always = [spike()]
        return [finding("LARGE_FILE_UNCOMPRESSED", 6120, 10200, file_path="src/orders_table.py")]

    pair(Codex, name, "is the generated order table damaged? check everything",
         ("codex-large-file", "cat of 10,200 tokens."),
         ("codex-large-test-output", "The same amount, but printed by a test run: not a file."),
         codex)

    def gemini(s, bad):
        s.browse(6, 4)
        for first, lines in ((None, 560), ) if bad else ((1, 280), (281, 280)):
            s.read("src/messages.py", lines, first, tokens=lines * 75 // 4)
        s.say("The messages mention it twice.")
        s.always = [spike(1 if bad else 2)]
        return [finding("LARGE_FILE_UNCOMPRESSED", 6300, 10500, file_path="src/messages.py")]

    pair(Gemini, name, "Do the messages say anything about refunds?",
         ("gemini-large-file", "A read of 10,500 tokens."),
         ("gemini-large-file-in-pages", "The same file in two pages of 5,250 tokens."), gemini)


def thinking():
    name, kind = "ExcessiveThinking", "EXCESSIVE_THINKING"
    more = ("And for the invoices?", "What about refunds?", "So what do you propose?")

    def talk(s, per_answer, answer, shown=None):
        """Four answers of ``per_answer`` thinking tokens and ``answer`` visible ones; returns the
        finding."""
        for follow_up in more + ("", ):
            if s.agent == "claude-code":
                text = prose(per_answer * 4) if shown is None else shown
                s.say(prose(answer * 4), thought=per_answer, think=text)
            else:
                s.say(prose(answer * 4), thought=per_answer)
            if follow_up:
                s.ask(follow_up)
        output, thought = 4 * (per_answer + answer), 4 * per_answer
        return [finding(kind, thought - output * 3 // 10,
                        100 * per_answer // (per_answer + answer))]

    pair(Claude, name, "Should we round per line or per order? Think hard about it.",
         ("thinking-60-percent", "120 of every 200 output tokens are thinking."),
         ("thinking-40-percent", "80 of every 200: at the limit, not above it."),
         lambda s, bad: talk(s, 120 if bad else 80, 80 if bad else 120))
    pair(Claude, name, "Plan the move to whole cents; I want the reasons, too.",
         ("thinking-shown",
          "160 of every 200 output tokens are thinking, as the transcript shows."),
         ("thinking-redacted",
          "The same usage, but the thinking is redacted: its size is unknown."),
         lambda s, bad: talk(s, 160, 40, None if bad else ""))
    pair(Codex, name, "how would you split the cart module?",
         ("codex-reasoning-75-percent", "150 of every 200 output tokens are reasoning."),
         ("codex-reasoning-40-percent", "80 of every 200: at the limit."),
         lambda s, bad: talk(s, 150 if bad else 80, 50 if bad else 120))
    pair(Gemini, name, "Which of the two designs is easier to test?",
         ("gemini-thoughts-60-percent", "120 thought tokens to 80 of answer."),
         ("gemini-thoughts-40-percent", "80 thought tokens to 120 of answer: at the limit."),
         lambda s, bad: talk(s, 120 if bad else 80, 80 if bad else 120))


def retries():
    name, kind = "FailedRetry", "FAILED_RETRY"
    why = "AssertionError: assert 4199 == 4200"

    def rerun(s, bad):
        costs = []
        for _ in range(2):
            costs.append(
                s.run("python3 -m pytest -q tests/test_cart.py", failing("test_total", why), 1))
            s.browse(4, 3)
            if not bad:
                s.edit("src/cart.py")
        s.say("I need a hint from you.")
        return [again(kind, *costs)]

    pair(Codex, name, "make tests/test_cart.py pass",
         ("codex-test-rerun-without-a-change",
          "The same test fails twice; reading other files is no fix."),
         ("codex-test-rerun-after-a-fix", "The failure is followed by an attempt to fix it."),
         rerun)

    def missing(s, bad):
        s.browse(4, 3)
        if bad:
            found = [
                again(
                    kind, *[
                        s.fail("Read", {"file_path": s.path("src/vat.py")}, MISSING)
                        for _ in range(2)
                    ])
            ]
        else:
            s.turn(*[
                Tool("Read", {"file_path": s.path(p)}, MISSING, 40, error=True)
                for p in ("src/vat.py", "src/fees.py")
            ])
            found = []
        s.browse(4, 3)
        s.say("There is no such module.")
        return found

    pair(Claude, name, "Is VAT handled in a module of its own?",
         ("same-missing-file-twice", "The same missing file is opened again in the next response."),
         ("two-missing-files-at-once",
          "Two different files, opened in one parallel batch, are missing."), missing)

    def declined(s, bad):
        costs = []
        for _ in range(2):
            if bad:
                costs.append(s.run("make clean", NO_RULE, 2))
            else:
                s.use("Bash", {"command": "make clean", "description": "Run it in the project"},
                      "The user doesn't want to proceed with this tool use. "
                      "The tool use was rejected.", error=True)
            s.browse(4, 3)
        s.say("I left the build folder alone.")
        return [again(kind, *costs)]

    pair(Claude, name, "Clean up the build folder.",
         ("make-fails-twice", "make has no such target, and is asked again."),
         ("permission-declined-twice",
          "The user declined the same command twice: no failure of the agent."), declined)

    def fetch(s, bad):
        costs = []
        for _ in range(2):
            costs.append(
                s.fail("web_fetch",
                       {"prompt": "List the endpoints on https://docs.example.org/api"},
                       REFUSED % (404 if bad else 503)))
            s.browse(4, 3)
        s.say("The page cannot be had at the moment.")
        return [again(kind, *costs)]

    pair(Gemini, name, "Check our API client against the public documentation.",
         ("gemini-not-found-twice", "404 will be 404 the next time, too."),
         ("gemini-overloaded-twice", "503: the server was overloaded, trying again is right."),
         fetch)
    pair(
        Codex, name, "run the migration tests",
        ("codex-test-again", "The same failure, only git status between."),
        ("codex-test-after-unknown-command", "A command nobody recognises may have repaired it."),
        twice(kind,
              lambda s: s.run("pytest -q tests/test_db.py",
                              failing("test_db", "OperationalError: no table"), 1),
              lambda s: s.run("./scripts/setup_db.sh", "ok"),
              browse=7,
              lines=4))
    clock = iter(("0.31", "0.29", "0.31", "0.29"))
    pair(
        Gemini, name, "Fix the failing date test.",
        ("gemini-hidden-exit-code",
         "Status success, exit code 1: the same test fails twice, in another time."),
        ("gemini-test-after-replace", "The test file was edited between the two runs."),
        twice(kind,
              lambda s: s.run("pytest -q tests/test_date.py",
                              failing("test_date", why, next(clock)), 1),
              lambda s: s.edit("tests/test_date.py"),
              browse=7,
              lines=6))


TROUBLE = (  # command, what it prints when it fails, and when it succeeds
    ("npm run lint", "npm error Missing script: lint",
     "42 files are clean"), ("cat docs/setup.md", "cat: docs/setup.md: No such file or directory",
                             "Install Python 3.12, then run make."),
    ("python3 -m pytest tests/api", "ModuleNotFoundError: No module named flask",
     "18 passed in 0.40s"),
    ("docker compose ps", "Cannot connect to the Docker daemon", "db  postgres:16  Up 3 hours"),
    ("psql -c 'select 1'", "connection to server on socket refused",
     "(1 row)"),
    ("make docs", "make: *** No rule to make target docs.  Stop.", "docs are up to date"),
    ("ls vendor", "", "fonts  icons  licences"), ("node --version", "", "v22.3.0"))


def errors():

    def story(s, bad):
        costs = []
        for number, (command, failure, success) in enumerate(TROUBLE):
            fails = number < 6 if bad else number == 0
            costs.append(s.run(command, failure if fails else success, 1 if fails else 0))
        s.say("The setup is not complete.")
        return [finding("HIGH_ERROR_RATE", sum(c.entered + c.written for c in costs[:6]), None)]

    for kind, mark in ((Claude, ""), (Codex, "codex-"), (Gemini, "gemini-")):
        pair(kind, "HighErrorRate",
             "Set the project up on this new machine and tell me what is missing.",
             (mark + "six-of-eight-fail", "Six of eight commands fail, each in another way."),
             (mark + "one-of-eight-fails", "The same commands, but only one of them fails."), story)

    recorder = Claude("grep-finds-nothing", "Does lib still use any of the old names?")
    for word in WORDS[:6]:
        recorder.run(
            "grep -rn %s lib" % word, "", extra={"returnCodeInterpretation": "No matches found"})
    recorder.say("lib is empty.")
    case(recorder, "HighErrorRate", False, "grep exits with 1 when it finds nothing: not an error.",
         "six-of-eight-fail")


def spikes():

    def story(s, bad):
        for number, word in enumerate(WORDS[:11]):
            size = 40 if bad and number == 7 else 2
            if s.agent == "gemini-cli":
                s.read("src/%s.py" % word, size)
            elif s.agent == "codex":
                s.run("git show --stat HEAD~%d" % number, matches(word, "src", number, size // 2))
            else:
                s.search(word, "src", number, size // 2)
        s.say("Listed all of them.")
        return [spike()]

    for kind, mark, what in ((Claude, "", "search"), (Codex, "codex-", "command"),
                             (Gemini, "gemini-", "read")):
        pair(kind, "TokenSpike", "Make a list of the words our code uses for money.",
             (mark + "one-big-" + what,
              "One %s of eleven brings ten times as much as the others." % what),
             (mark + "even-%ses" % what if what == "search" else mark + "even-%ss" % what,
              "Eleven of equal size."), story)


def come_back(s, minutes, lost):
    """Work of some length, a pause, and a last answer; ``lost``: the cache is gone after the
    pause."""
    s.browse(10, 205)
    s.say("The first chapters match the code.")
    s.wait(minutes)
    rebuilt = s.context - PREFIX
    s.expired = lost
    s.ask("Go on with the last chapter.")
    s.browse(1, 2)
    s.say("All pages are checked now.")
    # all of it was written at the one-hour price (twice the input's) instead of read (a tenth of
    # it)
    return [finding("LONG_SESSION", rebuilt * 19 // 20, 1)]


def long_sessions():
    pair(Claude, "LongSession", "Check the pages of the handbook against the code, one by one.",
         ("return-after-an-hour",
          "The cache lives for an hour; after 70 minutes all of it is written again."),
         ("return-within-the-hour", "50 minutes later the cache is still there."),
         lambda s, bad: come_back(s, 70 if bad else 50, bad))
    pair(Claude, "LongSession", "Check the pages of the manual against the code, one by one.",
         ("return-after-lunch", "After 63 minutes the cache has expired by the clock."),
         ("cache-lost-within-the-hour",
          "Lost after 50 minutes: nobody says why, so it is no late return."),
         lambda s, bad: come_back(s, 63 if bad else 50, True))


def long_but_innocent():
    for kind, mark in ((Claude, ""), (Codex, "codex-")):
        s = kind(mark + "long-without-a-pause",
                 "Check the pages of the guide against the code, one by one.", "shop")
        for _ in range(16):
            s.wait(9.5)
            s.browse(1, 2)
        s.say("All pages are checked now.")
        case(s, "LongSession", False,
             "More than 150 minutes, but no return to a cache that is gone.")
    s = Codex("codex-return-after-an-hour",
              "Check the pages of the guide against the code, one by one.", "shop")
    come_back(s, 70, True)
    case(s, "LongSession", False,
         "Codex does not tell how long its cache lives: the clock proves nothing.")


def write_all():
    for group in (reads, searches, large_files, thinking, retries, errors, spikes, long_sessions):
        group()


def what_happened_meanwhile():
    """What others did between two equal answers: a process, a person, an installer."""
    cart, report = "src/cart.py", "\n".join(" M src/%s.py" % word for word in WORDS[:14])
    pair(
        Codex, "RepeatedSearch",
        "build it, and tell me whether the build leaves the tree as it was",
        ("codex-status-after-status",
         "git status twice with git log between: nothing can have changed."),
        ("codex-status-after-waiting", "A build was waited for between the two looks at the tree."),
        twice("REPEATED_SEARCH", lambda s: s.run("git status --short", report),
              lambda s: s.use(
                  "write_stdin", {"session_id": 4711, "chars": "", "yield_time_ms": 30000},
                  "Chunk ID: 5f1c\nWall time: 19.2890 seconds\nProcess exited with code 0\n"
                  "Original token count: 9\nOutput:\nBuild finished in 22 s"),
              lambda s: s.run("git log --oneline -1", "4f1c2aa Round once"),
              query="git status --short"))

    def asked(s, bad):
        s.read(cart, 6)
        s.browse(2, 6)
        s.say("Run `tr` over it if the line ends are wrong.")
        s.ask("and which revision is that now?" if bad else
              "tr -d '\\r' < src/cart.py > src/cart.new && mv src/cart.new src/cart.py")
        second = s.read(cart, 6)
        s.say("It is as it should be.")
        return [reread(cart, second)]

    pair(Gemini, "RepeatedFileRead", "Has the cart module Windows line ends?",
         ("gemini-read-after-a-question", "The user asks about a file that is in the context."),
         ("gemini-read-after-a-shell-line",
          "The user's prompt is the shell line that rewrote the file."), asked)

    def installed(s, bad):
        s.read(cart, 6)
        s.browse(2, 6)
        if not bad:
            s.change(cart)
        s.run("npm install", "added 212 packages in 9s")
        second = s.read(cart, 6)
        s.say("The cart is what it was." if bad else "The install script has bumped the revision.")
        return [reread(cart, second)]

    pair(Claude, "RepeatedFileRead",
         "Install the packages and check that the cart needs none of them.",
         ("read-after-install",
          "An install changes its own tree: the same lines of a source came again."),
         ("read-after-install-script", "The package's install script rewrote the file."), installed)
