"""Write the labelled sample transcripts of this directory, and labels.json beside them.

    python3 examples/transcripts/make_cases.py

The same bytes come out on every run: no clock, no chance. generator/recorders.py knows the formats,
generator/labels.py what a case is, generator/waste.py and generator/accounting.py hold the cases.
"""

import json
import os
import shutil
import sys

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))


def write_case(recorder):
    for name, content in sorted(recorder.files.items()):
        path = os.path.join(HERE, recorder.folder, recorder.name, *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as stream:
            if isinstance(content, dict):
                json.dump(content, stream, indent=0, ensure_ascii=False)
                stream.write("\n")
            else:
                for line in content:
                    stream.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    from generator import accounting, labels, opencode, waste

    for folder in ("claude-code", "codex", "gemini", "opencode"):
        shutil.rmtree(os.path.join(HERE, folder), ignore_errors=True)
    waste.write_all()
    accounting.write_all()
    opencode.write_all()
    waste.long_but_innocent()
    waste.what_happened_meanwhile()
    for recorder in labels.ALL:
        write_case(recorder)
    with open(os.path.join(HERE, "labels.json"), "w", encoding="utf-8", newline="\n") as stream:
        stream.write('{"notes": %s,\n "cases": [\n  %s\n]}\n' % (json.dumps(
            labels.NOTES, indent=2),
            ",\n  ".join(json.dumps(recorder.label) for recorder in labels.ALL),
                                                                 ))
    print("%d cases written" % len(labels.ALL))


if __name__ == "__main__":
    main()
