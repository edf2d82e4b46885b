"""What the fuzzer reads: transcripts changed as JSON values, as lines and as bytes, and command
lines of a grammar; made by the random numbers given, and nothing else."""
import contextlib
import json
import sqlite3

RAW = """NaN -Infinity 1e999 1e15 -0 -1 0.1 true null [] {} "" "\\ud800" "\\u0000"
    "2026-13-45T99:99:99Z" "../../etc/passwd" {"text":["a"]} "9999-12-31T23:59:59.999999999-14:00"
    "0001-01-01T00:00:00Z" [{"type":"text","text":5}] 100000000000000 1000000000000001""".split()
RAW += ["9" * 25, "9" * 4400, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "[" * 5000,
        '"' + "x" * 70_000 + '"']
ODD = [b"\xff", b"\0", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\n", b'"', b"{",
       b"\\", b"\x1b[31m", b""]
WORDS = r"""a src/a.py 'b\ c' "$A" $A ${A} ~/x *.py {a,b} -n -e -- - 5 1,9p 99999999999 -rf
    's/a/b/g' .. /etc/x \ '' " $((1+1)) é C:\x\y.txt --output=f NR==3 @ = % -exec \; {} -i -c
    --include=*.py -name {1..9} !$ <<<x >f 2>/dev/null""".split()
NAMES = """cat head tail sed awk rg grep find fd ls cd echo git python3 npx sudo xargs env bash
    timeout nl tee mv cp rm ssh docker jq tar eval export A=b pushd popd test [ if for while
    Get-Content Select-String curl dd make apply_patch sh time nice node perl""".split()
JOINTS = [" && ", " | ", "; ", "\n", " || ", " > ", " >> f; ", " 2>&1 | ", " <<'E'\nx\nE\n", " & ",
          "; do ", "; done; ", "; then ", "; fi; "]
# by a database's columns
UNTOLD = ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError


def places(value, found):
    for key in list(value) if isinstance(value, dict) else range(
            len(value) if isinstance(value, list) else 0):
        found.append((value, key))
        places(value[key], found)
    return found


def changed(value, chance):
    """The JSON text of a value with one place of it changed."""
    found, mark, raw = places(value, []), "\ue0ff", ""
    if not found:
        return chance.choice(RAW).encode()
    holder, key = chance.choice(found)
    other, its = chance.choice([place for place in found if place[1] == key]
                               if chance.random() < .5 else found)
    old, there, way = holder[key], json.dumps(other[its]), chance.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1:
        holder[key] = json.loads(there)
    elif way == 2 and isinstance(old, int):
        holder[key] = chance.choice(
            [-old, bool(old), old * 10**9, float(old), str(old), [old], old + 1])
    elif way == 3:
        holder[key] = chance.choice(
            [[old], {"text": old}, json.dumps(old), str(old) * 50, command(chance)])
    elif way == 4 and isinstance(holder, dict):  # the key twice
        holder[key], raw = mark, f"{there}, {json.dumps(key)}: {json.dumps(old)}"
    else:
        holder[key], raw = mark, chance.choice(RAW)
    return json.dumps(value, ensure_ascii=False).replace(f'"{mark}"',
                                                         raw).encode("utf-8", "surrogatepass")


def mutated(files, others, chance):
    files = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        name = chance.choice(sorted(files))
        lines, way = files[name].splitlines(True) or [b""], chance.random()
        at, to = chance.randrange(len(lines)), chance.randrange(len(lines))
        # one document, not one on each line
        whole = lines[0].strip() in (b"{", b"[") or b'{"info"' in lines[0][:20]
        if way < .7 or whole and way < .98:
            with contextlib.suppress(ValueError, RecursionError):
                text = changed(json.loads(files[name] if whole else lines[at]), chance)
                text = b"{\n" + text[1:] if whole else text + b"\n"
                lines[0 if whole else at:len(lines) if whole else at + 1] = [text]
        elif way < .85:
            lines[at:at + chance.randrange(2)] = chance.choice(
                [[], [lines[to]], [lines[at]] * 2, lines[to:to + 9], lines[at:] + lines[:at]])
        elif way < .9:
            lines.insert(at, chance.choice(
                chance.choice(list(chance.choice(others).values())).splitlines(True) or [b""]))
        else:
            cut = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + chance.choice(ODD) + lines[at][cut + chance.randrange(3):]
        files[name] = b"".join(lines)
    exports = [content for content in files.values() if b'"ses_' in content]
    return {"opencode.db": b"\n\n".join(exports)} if exports and chance.random() < .4 else files


def database(path, exports):
    """OpenCode's exports as its database; what cannot be told there is left out."""
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE session (id, parent_id, title, time_created, data)")
        base.execute("CREATE TABLE message (id, session_id, data)")
        base.execute("CREATE TABLE part (id, message_id, data)")
        for number, export in enumerate(exports):
            with contextlib.suppress(*UNTOLD, sqlite3.Error):
                export = json.loads(export)
                own = [export["info"].get(name) for name in ("id", "parentID", "title")]
                base.execute("INSERT INTO session VALUES (?, ?, ?, ?, ?)",
                             own + [1_770_000_000_000, json.dumps(export["info"])])
                for name, message in enumerate(export["messages"]):
                    key = f"m{number}.{name}"
                    base.execute("INSERT INTO message VALUES (?, ?, ?)",
                                 (key, own[0], json.dumps(message["info"])))
                    base.executemany("INSERT INTO part VALUES (?, ?, ?)", [
                        (f"p{key}.{place}", key, json.dumps(part))
                        for place, part in enumerate(message["parts"])])
        base.commit()


def command(chance, depth=0):
    def word():
        nested = chance.choice(["$(%s)", "`%s`", '"$(%s)"', "<(%s)", "'%s'", "-c '%s'", "(%s)"])
        return (nested.replace("%s", command(chance, depth + 1))
                if depth < 4 and chance.random() < .07 else chance.choice(WORDS))

    text = "".join(" ".join([chance.choice(NAMES)] + [word() for _ in range(chance.randrange(6))])
                   + chance.choice(JOINTS) for _ in range(chance.choice((1, 1, 2, 3, 6))))
    odd = [text * 200, "A=$A$A;" * 40 + text, "(" * 500 + text,
           text[:chance.randrange(len(text))] + chance.choice("\"'`$({"),
           "*** Update File: a" + " " * 9_000 + text, "sudo " * 900 + text, "cat {" + "," * 9_000,
           "find . " + "-exec find . " * 22 + text]
    return chance.choice(odd) if depth == 0 and chance.random() < .1 else text


def smaller(mutant):
    """Mutants that lack a part of this one: characters of a command; files, lines, keys."""
    if isinstance(mutant, str):
        yield from (mutant[:at] + mutant[at + size:] for size in (4096, 64, 4, 1)
                    for at in range(0, len(mutant), size))
        return
    yield from ({name: mutant[name] for name in mutant if name != left} for left in mutant
                if len(mutant) > 1)
    for name, content in mutant.items():
        lines = content.splitlines(True)
        yield from (dict(mutant, **{name: b"".join(lines[:at] + lines[at + size:])})
                    for size in (64, 8, 1) for at in range(0, len(lines), size))
        for at, line in enumerate(lines):
            with contextlib.suppress(ValueError, RecursionError):
                for number in range(len(places(json.loads(line), []))):
                    value = json.loads(line)
                    holder, key = places(value, [])[number]
                    del holder[key]
                    yield dict(mutant, **{name: b"".join(
                        lines[:at] + [json.dumps(value).encode() + b"\n"] + lines[at + 1:])})
