"""Every row of a scan as one line, to hold two versions of the module against each other.

    python3 .ci/rows.py save FILE MODULE FOLDER...     the rows of a scan, one per line
    python3 .ci/rows.py compare OLD NEW                the rows and keys that differ; then status 1
"""
import json
import os
import subprocess
import sys
import tempfile


def save(out, module, folders):
    with open(out, "w", encoding="utf-8") as file:
        for folder in folders:
            result = subprocess.run(
                [sys.executable, module, "scan", "--no-store", "--format", "json",
                 os.path.abspath(folder)], stdout=subprocess.PIPE, check=True,
                env=dict(os.environ, HOME=tempfile.gettempdir(), TZ="UTC"))
            found = json.loads(result.stdout)
            rows = found["sessions"] + [dict(entry, id="skipped") for entry in found["skipped"]]
            lines = sorted(json.dumps(row, sort_keys=True) for row in rows)
            file.writelines(line.replace(os.path.abspath(folder), ".") + "\n" for line in lines)


def alike(left, right):
    """Equal, but for the last digits of a sum of floats."""
    if isinstance(left, float) or isinstance(right, float):
        return (isinstance(left, (int, float)) and isinstance(right, (int, float))
                and abs(left - right) <= 1e-9 * max(1, abs(left)))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(alike, left, right))
    return left == right


def compare(old, new):
    sides = []
    for path in (old, new):
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        sides.append(
            {(row.get("path"), row["id"], row.get("line"), row.get("reason")): row for row in rows})
    before, after = sides
    different = 0
    for key in sorted(set(before) | set(after), key=str):
        left, right = before.get(key, {}), after.get(key, {})
        names = [name for name in sorted(set(left) | set(right))
                 if not alike(left.get(name), right.get(name))]
        if names:
            different += 1
            print(key,
                  *(f"\n    {name}: {str(left.get(name))[:300]} -> {str(right.get(name))[:300]}"
                    for name in names))
    print(f"{len(before)} rows before, {len(after)} after, {different} differ")
    return int(bool(different))


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(compare(sys.argv[2], sys.argv[3]))
