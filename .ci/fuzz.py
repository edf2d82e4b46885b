"""Mutated transcripts and command lines: nothing may raise, hang, or give sums that do not add up.

    python3 .ci/fuzz.py --seconds 30                mutants of the sample transcripts, and command
                                                    lines
    python3 .ci/fuzz.py --count 200000 --seed 7 FOLDER...      so many, other transcripts mutated
                                                               too
    python3 .ci/fuzz.py --seed 7 --first 1234 --count 1        one again; the smallest that fails so
                                                               is printed

A mutant is made by its seed and number alone: transcripts changed as JSON values, as lines and as
bytes; command lines of a grammar. Each may take 5 seconds of processor time. Every 50th is read by
the command line and a store too.
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]
import export_otlp  # noqa: E402
from mutants import command, database, mutated, smaller  # noqa: E402

import sessionoptimizer as so  # noqa: E402

# seconds of processor time for a mutant, bytes of a seed, every so-manieth
LIMIT, LARGEST, DEEP = 5, 200_000, 50


class Wrong(Exception):
    """Figures that do not add up."""


class Hang(BaseException):  # which no ``except Exception`` stops
    @staticmethod
    def out_of_time(number, frame):
        raise Hang(f"more than {LIMIT} s")


def expect(**pairs):
    for name, (left, right) in pairs.items():
        if left != right:
            raise Wrong(f"{name}: {str(left)[:300]} is not {str(right)[:300]}")


def seeds(folders):
    """What is mutated, as {name: content}: the files of a folder, or of one session where they are
    large; spans."""
    found = {}
    for unit in so.group_transcripts(
            map(so.describe_transcript, (file[0] for file in so.find_transcripts(folders)))):
        below = os.path.dirname(unit[0]["path"])
        for paths in [file[0] for file in so.find_transcripts([below])], [
                file["path"] for file in unit]:
            if paths and sum(map(os.path.getsize, paths)) <= LARGEST:
                names = [os.path.relpath(path, os.path.dirname(below)).replace("..", "up")
                         for path in paths]
                found[tuple(paths)] = {name: open(path, "rb").read()
                                       for name, path in zip(names, paths)}
                break
    for number, session in enumerate(so.sessions_at(folders[:1], so.PriceList())[::9]):
        found[number] = {"spans/s.jsonl": "".join(
            json.dumps(each) + "\n" for each in export_otlp.documents(session, 5)).encode()}
    return list(found.values())


def check_command(text):
    effects = so.shell_effects(text, "/home/dev")
    told = effects.changes + effects.writes + [path for path, _, _ in effects.reads]
    expect(size=(len("".join(told)) <= 40 * len(text) + 400_000, True),
           kind=(effects.kind in ("read", "search", "write", "other"), True))


def check_session(session, row):
    """What a session, its row, its bill and its usage say is one."""
    events, pico, bill, waste, tokens = (session.events, session.cost_in_pico, row["bill"],
                                         row["waste"], row["tokens"])
    names = "tokens_input", "tokens_output", "tokens_cache_read"
    entered, written, read = (sum(getattr(event, name) for event in events) for name in names)
    usage = [[sum(part[name] for part in so.usage_rows(session))
              for name in (*so.CLASSES, "cost")]] if events else []
    expect(session=((entered, written), (session.total_tokens_input, session.total_tokens_output)),
           row=([tokens["uncached_input"] + tokens["cache_write"], tokens["output"],
                 tokens["cache_read"], row["total_tokens"]],
                [entered, written, read, entered + written]),
           cost=(row["estimated_cost"], pico / so.PICO),
           notes=("analyzer failed" in str(row["notes"]), False),
           bill=([bill["total"], sum(cell["cost"] for cell in bill["cells"]),
                  sum(bill["classes"].values()), sum(bill["models"].values())], [pico] * 4),
           usage=(usage,
                  [[*map(sum, zip(*(event.usage for event in events))), pico]] if events else []),
           charged=(sum(issue["charged_tokens"] for issue in row["issues"]), waste["tokens"]),
           waste=(0 <= waste["measured_tokens"] <= waste["tokens"] <= row["total_tokens"]
                  and waste["cost"] <= row["estimated_cost"], True),
           again=(so.Session.from_dict(json.loads(json.dumps(session.to_dict(), allow_nan=False))),
                  session))


def check_transcripts(folder, deep):
    """Reads a folder through the pure functions, as a scan does; ``deep``: by the command line and
    a store too."""
    def tell(session, found):
        found["rows"].append(so.full_row(session, [cls() for cls in so.BUILT_IN_ANALYZERS]))
        check_session(session, found["rows"][-1])

    facts = [so.describe_transcript(path) for path, _, _ in so.find_transcripts([folder])]
    units = {unit[0]["path"]: unit for unit in so.group_transcripts(facts)}
    found = {name: so.read_unit(unit, frozenset(), tell) for name, unit in units.items()}
    owners = so.owners_of((key, most, units[name][0]["order"]) for name, its in found.items()
                          for key, most in its["responses"].items())
    for name, unit in units.items():
        lost = {key for key in found[name]["responses"] if owners[key] != unit[0]["order"]}
        if lost:
            told, found[name] = found[name]["responses"], so.read_unit(unit, lost, tell)
            expect(responses=(found[name]["responses"], told))
    ids = so.session_ids((name, [row["id"] for row in its["rows"]]) for name, its in found.items())
    rows = [so.renamed(row, session) for name, its in found.items()
            for row, session in zip(its["rows"], ids[name])]
    result = so.scan_result(
        rows, so.left_out(facts) + [entry for its in found.values() for entry in its["skipped"]])
    expect(totals=(result["totals"]["total_tokens"], sum(row["total_tokens"] for row in rows)))
    text, store = (json.dumps(result, allow_nan=False),
                   os.path.join(os.path.dirname(folder), "store"))
    for words in (["--no-store", "--format", "json"], ["--store", store],
                  ["--store", store, "--format", "html"]) if deep else ():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            expect(status=(so.main(["scan", folder, *words]), 0))
        expect(scan=(json.loads(out.getvalue() if "json" in words else text), json.loads(text)))
    for row in rows if deep else ():
        optimizer = so.SessionOptimizer(store)
        report, session = optimizer.analyze(row["id"]), optimizer.get_session(row["id"])
        expect(stored=([report.total_tokens, report.estimated_cost],
                       [row["total_tokens"], row["estimated_cost"]]))
        for render in so.FORMATS.values():
            render(session, report).encode()


def fault_of(mutant, deep):
    """What is wrong with a mutant, as (what and where, all of it); None where nothing is."""
    folder = tempfile.mkdtemp(dir=os.environ["HOME"])
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        if isinstance(mutant, str):
            return check_command(mutant)
        for name, content in mutant.items():
            path = os.path.join(folder, "in", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if name.endswith(".db"):
                database(path, content.split(b"\n\n"))
            else:
                with open(path, "wb") as file:
                    file.write(content)
        return check_transcripts(os.path.join(folder, "in"), deep)
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename == so.__file__]
        where = (str(error).partition(":")[0] if isinstance(error, (Wrong, Hang))
                 else (frames or [""])[-1])
        return f"{type(error).__name__} {where}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        shutil.rmtree(folder)


def reduced(mutant, where, deep):
    end, smallest = time.monotonic() + 60, None
    while mutant != smallest and time.monotonic() < end:
        smallest = mutant
        mutant = next((each for each in smaller(mutant) if time.monotonic() < end
                       and (fault_of(each, deep) or [""])[0] == where), mutant)
    return smallest


def strict(error, reason=so._reason_of):
    """In place of the barrier around a unit: what that would catch is a fault to be mended where it
    is."""
    if isinstance(error, OSError):
        return reason(error)
    raise error


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", help="transcripts to mutate besides the samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=10**9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    so._reason_of = strict
    signal.signal(signal.SIGVTALRM, Hang.out_of_time)
    sources = seeds([os.path.join(ROOT, "examples", "transcripts"), *options.folders])
    done, lines, faults, end = 0, 0, set(), time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
        os.environ.update(HOME=home, TZ="UTC")
        while done < options.count and time.monotonic() < end:
            number = options.first + done
            chance, deep = random.Random(f"{options.seed} {number}"), number % DEEP == 0
            mutant = (command(chance) if chance.random() < .3
                      else mutated(chance.choice(sources), sources, chance))
            fault = fault_of(mutant, deep)
            if fault and fault[0] not in faults:
                faults.add(fault[0])
                print(f"--- {fault[0]}\n{fault[1]}smallest: "
                      f"{repr(reduced(mutant, fault[0], deep))[:20_000]}\nagain:",
                      f"python3 .ci/fuzz.py --seed {options.seed} --first {number} --count 1",
                      *options.folders, flush=True)
            done, lines = done + 1, lines + isinstance(mutant, str)
            if done % 10_000 == 0:
                print(f"{done:,} mutants, {len(faults)} faults", file=sys.stderr, flush=True)
    print(f"{done:,} mutants of seed {options.seed} ({done - lines:,} of {len(sources)} sets of "
          f"transcripts, {lines:,} command "
          "lines): "
          + (f"{len(faults)} FAULTS" if faults else "no exception, no hang, every sum adds up"))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
