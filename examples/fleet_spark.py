#!/usr/bin/env python3
"""Transcripts of a whole company on Apache Spark, in the figures of ``sessionoptimizer scan``.

    python3 examples/fleet_spark.py --master spark://HOST:7077 s3://bucket/in s3://bucket/fleet

Writes Parquet tables (sessions, findings, usage, bill; by UTC day) and, last, the one object that
says which files are the tables: a reader sees the version before or this one, never a mixture. What
a unit of files holds is kept under a hash of these files, so a run that was killed goes on where it
was, and what did not change is not read again. Tables, limits and costs: docs/fleet.md.
Needs: pip install 'sessionoptimizer[fleet]', Java 17."""
import argparse
import gzip
import hashlib
import io
import json
import os
import sys
import time

import sessionoptimizer as so

TABLES = {  # columns; money in whole pico-dollars (1e-12 USD)
    "sessions": "day session unit agent source model project status started_at ended_at minutes "
                "model_calls uncached_input cache_write cache_read output total_tokens "
    "waste_tokens "
                "measured_waste_tokens waste_cost cost row".split(),
    "findings": "day session type severity measured tokens charged_tokens cost events".split(),
    "usage": "day session model tool project calls".split() + [*so.CLASSES, "cost"],
    "bill": "day session content how tokens cost".split()}
HEAD, BODY = 1 << 16, 8 << 20  # bytes fetched at once of a file that is looked at, that is read


def storage(place):
    from fsspec.core import url_to_fs
    fs, path = url_to_fs(place)
    fs.invalidate_cache()
    return fs, path, "file" in fs.protocol


def opener(path, block):  # given the built-in open, the library refuses pipes and devices
    fs, _, local = storage(path)
    return open if local else lambda path, mode: fs.open(path, mode, block_size=block)


def load(place, default=None):
    fs, path, _ = storage(place)
    there = default is None or fs.exists(path)
    return json.loads(gzip.decompress(fs.cat_file(path))) if there else default


def put(place, data):
    """Write an object whole or not at all; what is no bytes as JSON."""
    if not isinstance(data, bytes):
        data = gzip.compress(json.dumps(data, sort_keys=True).encode(), 6, mtime=0)
    fs, path, local = storage(place)
    if not local:
        return fs.pipe_file(path, data)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fs.pipe_file(f"{path}.{os.getpid()}", data)
    os.replace(f"{path}.{os.getpid()}", path)


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_unit(place, unit, lost):
    """Read a unit in a process of its own, which leaves there what it found. A file that kills its
    reader twice is named, and costs no other its figures."""
    for _ in range(2):
        child = os.fork()
        if not child:
            try:
                put(place, so.read_session_files(unit, set(lost), opener(unit[0]["path"], BODY)))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        if os.WIFEXITED(status):
            raise OSError(f"{place} cannot be written")
    died = [unit[0]["path"], 0, f"the process that read it died (signal {os.WTERMSIG(status)})"]
    put(place, {"rows": [], "usage": [], "responses": {}, "skipped": [died]})


def table_rows(found, ids):
    """((table, UTC day), row) of everything that a unit's sessions have in the tables."""
    for row, usage, session in zip(found["rows"], found["usage"], ids):
        row, seconds = so.renamed(row, session), so.seconds_of(row["started_at"])
        day = "" if seconds is None else time.strftime("%Y-%m-%d", time.gmtime(seconds))
        rows = ([("usage", part) for part in usage]
                + [("bill", cell) for cell in row["bill"]["cells"]])
        rows += [("findings", dict(
            issue, type=issue["issue_type"], tokens=issue["estimated_waste_tokens"],
            cost=round(issue["charged_cost"] * so.PICO),
            events=json.dumps(issue["events_involved"]))) for issue in row["issues"]]
        rows.append(("sessions", dict(
            row, **row["tokens"], unit=row["path"], cost=row["bill"]["total"],
            waste_cost=round(row["waste_cost"] * so.PICO), row=json.dumps(row, sort_keys=True))))
        for table, cells in rows:
            cells = dict({"day": day}, session=session, **cells)
            cells["day"] = cells["day"] or "unknown"
            yield (table, cells["day"]), [cells[name] for name in TABLES[table]]


def write_table(place, rows):
    import pyarrow
    from pyarrow import parquet
    out, names = io.BytesIO(), TABLES[place.split("/")[-3]]
    rows = [dict(zip(names, row)) for row in sorted(rows, key=json.dumps)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    put(place, out.getvalue())


def run(context, source, target):
    """Bring the tables up to date; {"tables": {table: {day: file}}, "skipped", "facts"}."""
    before, settings = load(f"{target}/current", {"tables": {}, "facts": ""}), so.scan_settings()
    parts = 2 * context.defaultParallelism
    fs, root, local = storage(source)
    files = {path if local else fs.unstrip_protocol(path): [
        info["size"], str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))]
        for path, info in fs.find(root, detail=True).items()
        if path.endswith((".jsonl", ".json", ".db")) and not info.get("islink")}
    facts = load(f"{target}/{before['facts']}") if before["facts"] else {}
    facts = {path: facts[path] for path, stamp in files.items() if facts.get(path, [0])[0] == stamp}
    for file in context.parallelize(sorted(files.keys() - facts), parts).map(
            lambda path: so.describe_transcript(path, opener(path, HEAD))).collect():
        facts[file["path"]] = [files[file["path"]], file]
    units = {unit[0]["path"]: unit
             for unit in so.group_transcripts(file for _, file in facts.values())}

    def read(lost):
        """Read what was not read yet of these units, given what others count; where it is."""
        keys = {name: key_of(settings, [facts[file["path"]] for file in units[name]], its)
                for name, its in lost.items()}
        fs, root, _ = storage(f"{target}/units")
        there = {path.rpartition("/")[2] for path in (fs.find(root) if fs.exists(root) else ())}
        tasks = sorted(((f"{target}/units/{key}", units[name], lost[name])
                        for name, key in keys.items() if key not in there),
                       key=lambda task: -sum(file["size"] for file in task[1]))  # longest first
        context.parallelize(tasks, len(tasks) or 1).foreach(lambda task: read_unit(*task))
        return {name: f"{target}/units/{key}" for name, key in keys.items()}

    places = read(dict.fromkeys(units, ()))
    told = context.parallelize([(places[name], units[name][0]["order"]) for name in units], parts
                               ).flatMap(lambda unit: [
                                   (response, (-output, unit[1])) for response, output
                                   in load(unit[0])["responses"].items()])
    lost = told.join(told.reduceByKey(min, parts), parts).filter(
        lambda pair: pair[1][0] != pair[1][1]).map(
        lambda pair: (pair[1][0][1][2], pair[0])).groupByKey(parts).mapValues(sorted)
    places.update(read(lost.collectAsMap()))

    def index(place):
        found = load(place)
        ids = [row["id"] for row in found["rows"]]
        return place, (ids, sorted({key for key, _ in table_rows(found, ids)}), found["skipped"])

    indexed = dict(context.parallelize(list(places.values()), parts).map(index).collect())
    ids = so.session_ids((name, indexed[places[name]][0]) for name in units)
    content = {}
    for name in units:
        for key in indexed[places[name]][1]:
            content.setdefault(key, []).append([places[name][len(target):], ids[name]])
    tables = {table: {} for table in TABLES}
    for (table, day), those in content.items():
        tables[table][day] = f"tables/{table}/day={day}/{key_of(sorted(those))}.parquet"
    changed = {(table, day): f"{target}/{tables[table][day]}" for table, day in content
               if before["tables"].get(table, {}).get(day) != tables[table][day]}
    context.parallelize([(places[name], ids[name]) for name in units if changed.keys() & set(
        indexed[places[name]][1])], parts).flatMap(lambda unit: [
        (changed[key], row) for key, row in table_rows(load(unit[0]), unit[1]) if key in changed
    ]).groupByKey(parts).foreach(lambda pair: write_table(*pair))

    now = {"tables": tables, "facts": f"facts/{key_of(facts)}", "skipped": sorted(
        so.left_out(file for _, file in facts.values())
        + [entry for name in units for entry in indexed[places[name]][2]])}
    if now != before:
        put(f"{target}/{now['facts']}", facts)
        put(f"{target}/current", now)
    return now


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="where the transcripts are, a folder or s3://bucket/prefix")
    parser.add_argument("target", help="where the tables are")
    parser.add_argument("--master", default="local[*]", help="spark://HOST:7077 (default: here)")
    options = parser.parse_args()
    from pyspark import SparkConf, SparkContext
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    conf = SparkConf().setMaster(options.master).setAppName("sessionoptimizer").setAll(
        [(f"spark.executorEnv.{name}", os.environ[name]) for name in os.environ if "AWS_" in name])
    with SparkContext(conf=conf.set("spark.ui.showConsoleProgress", "false")) as context:
        context.addPyFile(os.path.abspath(so.__file__))
        now = run(context, *((place if "://" in place else os.path.abspath(place)).rstrip("/")
                             for place in (options.source, options.target)))
    print(f"{sum(map(len, now['tables'].values()))} table files, {len(now['skipped'])} skipped")


if __name__ == "__main__":
    main()
