"""The cluster programs say what `scan --format json` says: on a real Spark master with two workers
and a bucket, with processes killed, and with files that come late, grow and go."""
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import sessionoptimizer as so

HERE = os.path.dirname(os.path.abspath(__file__))
SAMPLES = os.path.join(HERE, "transcripts")
pytestmark = pytest.mark.filterwarnings("ignore")  # of what the clusters' own packages say
LATE, WAIT = 3, 240  # seconds a slow file takes, seconds until a run counts as hung

# What a file that kills its reader does, and one that takes a while: appended to a copy of the
# module.
ODD_FILES = """

def _read_oddly(self, paths, claim, skip, read=ClaudeCodeReader.read):
    if "killer" in paths[0]:
        os.kill(os.getpid(), 9)
    if "slow" in paths[0]:
        time.sleep(%d)
    return read(self, paths, claim, skip)


ClaudeCodeReader.read = _read_oddly
""" % LATE


def needs_spark():
    pytest.importorskip("pyspark", reason="needs pip install 'sessionoptimizer[fleet]'")
    pytest.importorskip("pyarrow", reason="needs pip install 'sessionoptimizer[fleet]'")
    pytest.importorskip("fsspec", reason="needs pip install 'sessionoptimizer[fleet]'")
    if not shutil.which("java"):
        pytest.skip("needs Java 17")
    sys.path.insert(0, HERE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(command, port=None, **options):
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, **options)
    end = time.monotonic() + 60
    while port:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < end, command
            time.sleep(0.2)
    return process


def killed(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("moto", reason="needs pip install 'moto[server]'")
    import s3fs
    port = free_port()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
             "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": "http://127.0.0.1:%d" % port}
    server = started(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        s3fs.S3FileSystem().mkdir("fleet")
        yield "s3://fleet"
    finally:
        killed(server)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a standalone master, and its two workers."""
    needs_spark()
    import pyspark
    home = os.path.dirname(pyspark.__file__)
    run, port = os.path.join(home, "bin", "spark-class"), free_port()
    environment = dict(os.environ, SPARK_HOME=home, SPARK_LOCAL_IP="127.0.0.1",
                       SPARK_DAEMON_MEMORY="256m")
    address = "spark://127.0.0.1:%d" % port
    processes = [started([run, "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1",
                          "--port", str(port), "--webui-port", "0"], port, env=environment)]
    try:
        for number in range(2):
            folder = str(tmp_path_factory.mktemp("worker%d" % number))
            processes.append(started([run, "org.apache.spark.deploy.worker.Worker", "--host",
                                      "127.0.0.1", "--webui-port", "0", "--cores", "1",
                                      "--memory", "1g", "-d", folder, address], env=environment))
        yield address, processes[1:]
    finally:
        for process in processes:
            killed(process)


def run_spark(master, source, target, module=None):
    """The program as a process; ``module``: the folder of the library it takes."""
    environment = dict(os.environ, PYTHONPATH=module
                       or os.path.dirname(os.path.abspath(so.__file__)), SPARK_LOCAL_IP="127.0.0.1",
                       PYSPARK_PYTHON=sys.executable)
    command = [sys.executable, os.path.join(HERE, "fleet_spark.py"), "--master", master,
               source, target]
    return subprocess.Popen(command, env=environment, cwd=environment["PYTHONPATH"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finished(process):
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err.decode()[-4000:]
    return out.decode()


def scanned(folder):
    out = subprocess.run([sys.executable, so.__file__, "scan", "--no-store", "--format", "json",
                          folder], stdout=subprocess.PIPE, check=True)
    return json.loads(out.stdout)


def tables(target):
    """{table: its rows} of the version there is, and what was skipped."""
    import fleet_spark
    from pyarrow import parquet
    now = fleet_spark.load(target + "/current")
    found = {}
    for table, days in now["tables"].items():
        found[table] = []
        for day, file in days.items():
            fs, path, _ = fleet_spark.storage("%s/%s" % (target, file))
            with fs.open(path) as opened:
                rows = parquet.read_table(opened).to_pylist()
            assert {row["day"] for row in rows} == {day}
            found[table] += rows
    return found, now["skipped"]


def objects(target, below=""):
    """{object: what tells a change of it}."""
    import fleet_spark
    fs, root, _ = fleet_spark.storage(target + below)
    return {path: (info["size"], str(info.get("mtime") or info.get("LastModified")))
            for path, info in fs.find(root, detail=True).items()} \
        if fs.exists(root) else {}


def says(target, source, folder):
    """What the tables say as a whole, in the words of a scan of the folder."""
    found, skipped = tables(target)
    rows = [json.loads(row["row"]) for row in found["sessions"]]
    return json.loads(json.dumps(so.scan_result(rows, skipped)).replace(source, folder)), found


def assert_adds_up(found, result):
    totals = result["totals"]
    def total(table, *names):
        return sum(row[name] for row in found[table] for name in names)
    assert (len({row["session"] for row in found["sessions"]}) == len(found["sessions"])
            == totals["sessions"])
    for table in ("sessions", "usage"):
        assert (total(table, "output") == totals["tokens"]["output"]
                and total(table, "cache_read") == totals["tokens"]["cache_read"])
        assert total(table, "uncached_input") == totals["tokens"]["uncached_input"]
    assert total("usage", "cache_write_5m", "cache_write_1h") == totals["tokens"]["cache_write"]
    assert (total("findings", "charged_tokens") == total("sessions", "waste_tokens")
            == totals["waste"]["tokens"])
    assert (total("bill", "cost") == total("usage", "cost") == total("sessions", "cost")
            == round(totals["estimated_cost"] * so.PICO))


def seen_in_duckdb(found):
    """The same sums, exactly, from the engine the documentation names."""
    duckdb, pyarrow = pytest.importorskip("duckdb"), pytest.importorskip("pyarrow")
    for table in ("sessions", "bill", "usage"):
        rows = pyarrow.Table.from_pylist(found[table])
        assert (duckdb.sql("SELECT sum(cost) FROM rows").fetchall()[0][0]
                == sum(rows.column("cost").to_pylist())), table


def put_transcripts(folder):
    """Samples of each agent, five damaged files, one that takes a while and one that kills its
    reader."""
    for agent, names in (("claude-code", ("forked-session", "resumed-session", "read-twice",
                                          "subagent-reads-twice", "permission-declined-twice")),
                         ("codex", None), ("gemini", None)):
        for name in names or sorted(os.listdir(os.path.join(SAMPLES, agent)))[:4]:
            sample = os.path.join(SAMPLES, agent, name)
            if os.path.isdir(sample):
                shutil.copytree(sample, os.path.join(folder, agent, name))
    whole = sorted(path for path, size, _ in so.find_transcripts([folder])
                   if path.endswith(".jsonl") and size > 2000)[0]
    with open(whole, "rb") as file:
        data = file.read()
    damage = {"cut": data[:len(data) // 2], "binary": bytes(range(256)) * 40, "empty": b"",
              "zeros": data[:600] + b"\0" * 4000,
              "unknown": b'{"a": 1}\n', "slow": data, "killer": data}
    for name, content in damage.items():
        os.makedirs(os.path.join(folder, "odd", name))
        with open(os.path.join(folder, "odd", name, name + ".jsonl"), "wb") as file:
            file.write(content)


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory):
    """The folder, the killer's file, a folder with a module that the odd files are odd to, what a
    scan without the killer says."""
    place = tmp_path_factory.mktemp("fleet")
    folder, module, killer = (str(place / "in"), str(place / "module"),
                              str(place / "in" / "odd" / "killer"))
    put_transcripts(folder)
    os.makedirs(module)
    with open(so.__file__, encoding="utf-8") as file, open(
            os.path.join(module, "sessionoptimizer.py"), "w", encoding="utf-8") as copy:
        # The copy ends where the command line would begin, so that it is patched before anything
        # runs.
        copy.write(file.read().replace('\nif __name__ == "__main__":',
                                       ODD_FILES + '\nif __name__ == "__main__":'))
    shutil.move(killer, str(place / "killer"))
    expected = scanned(folder)
    shutil.move(str(place / "killer"), killer)
    died = {"path": os.path.join(killer, "killer.jsonl"), "line": 0,
            "reason": "the process that read it died (signal 9)"}
    expected["skipped"] = sorted(expected["skipped"] + [died],
                                 key=lambda entry: (entry["path"], entry["line"]))
    return folder, module, expected


def wait_for(process, condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()[-4000:]
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_cluster_that_loses_a_worker_says_what_one_machine_says(cluster, bucket, transcripts):
    """Source and tables in a bucket; one of two workers is killed with its executor while a file is
    read."""
    import fleet_spark
    (address, workers), (folder, module, expected) = cluster, transcripts
    fs, path, _ = fleet_spark.storage(bucket + "/in")
    fs.put(folder, path, recursive=True)
    process = run_spark(address, bucket + "/in", bucket + "/out", module)
    wait_for(process, lambda: objects(bucket + "/out", "/units"))
    killed(workers[0])
    finished(process)
    result, found = says(bucket + "/out", bucket + "/in", folder)
    assert result == expected
    assert_adds_up(found, result)
    seen_in_duckdb(found)


def test_a_driver_that_was_killed_goes_on_where_it_was(transcripts, tmp_path):
    needs_spark()
    import fleet_spark
    folder, module, expected = transcripts
    target = str(tmp_path / "out")
    process = run_spark("local[2]", folder, target, module)
    wait_for(process, lambda: len(objects(target, "/units")) > 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert fleet_spark.load(target + "/current", {}) == {}
    before = objects(target, "/units")
    finished(run_spark("local[2]", folder, target, module))
    after = objects(target, "/units")
    assert {path: after.get(path) for path in before} == before and len(after) > len(before)
    result, found = says(target, folder, folder)
    assert result == expected
    assert_adds_up(found, result)


@pytest.fixture(scope="module")
def context():
    needs_spark()
    from pyspark import SparkConf, SparkContext
    os.environ["PYSPARK_PYTHON"] = sys.executable
    conf = SparkConf().setMaster("local[2]").set("spark.ui.enabled", "false").set(
        "spark.driver.bindAddress", "127.0.0.1")
    with SparkContext(conf=conf.set("spark.driver.host", "127.0.0.1")) as context:
        context.addPyFile(os.path.abspath(so.__file__))
        context.addPyFile(os.path.join(HERE, "fleet_spark.py"))
        yield context


class Reader(threading.Thread):
    """Reads the tables again and again: no version ever holds a session twice or lacks a file."""

    def __init__(self, target):
        super().__init__(daemon=True)
        self.target, self.stop, self.versions, self.failure = target, threading.Event(), set(), None

    def run(self):
        try:
            while not self.stop.is_set():
                found, _ = tables(self.target)
                ids = sorted(row["session"] for row in found["sessions"])
                assert (len(ids) == len(set(ids))
                        and {row["session"] for row in found["bill"]} <= set(ids))
                self.versions.add(json.dumps(sorted(row["row"] for row in found["sessions"])))
                time.sleep(0.1)
        except BaseException as failure:
            self.failure = failure


def test_what_changes_is_read_again_and_nothing_else(context, tmp_path):
    import fleet_spark
    folder, target = str(tmp_path / "in"), str(tmp_path / "out")
    for name in ("resumed-session", "subagent-reads-twice", "read-twice", "search-twice"):
        shutil.copytree(os.path.join(SAMPLES, "claude-code", name), os.path.join(folder, name))
    paths = sorted(path for path, _, _ in so.find_transcripts([folder]) if path.endswith(".jsonl"))
    units = so.group_transcripts(map(so.describe_transcript, paths))
    resumed = [unit[0]["path"] for unit in units if "resumed-session" in unit[0]["path"]]
    agents = [file["path"] for unit in units for file in unit[1:]]
    single = [unit[0]["path"] for unit in units if "search-twice" in unit[0]["path"]][0]
    gone = [unit[0]["path"] for unit in units if "read-twice" in unit[0]["path"]][0]
    # the earlier of two that share responses, and a sub-agent's file, come after the rest
    late = str(tmp_path / "late")
    os.makedirs(late)
    for number, path in enumerate([resumed[0], agents[0]]):
        os.rename(path, os.path.join(late, str(number)))
    with open(single, "rb") as file:
        lines = file.readlines()
    with open(single, "wb") as file:
        file.writelines(lines[:len(lines) // 2])

    def check():
        fleet_spark.run(context, folder, target)
        result, found = says(target, folder, folder)
        assert result == dict(scanned(folder), changes="")
        assert_adds_up(found, result)
        return objects(target)

    before = check()
    assert check() == before  # no change: no object written
    reader = Reader(target)
    reader.start()
    with open(single, "wb") as file:
        file.writelines(lines)
    for number, path in enumerate([resumed[0], agents[0]]):
        os.rename(os.path.join(late, str(number)), path)
    os.remove(gone)
    after = check()
    reader.stop.set()
    reader.join(60)
    assert reader.failure is None and reader.versions
    kept = {path for path in before if "/units/" in path and path in after}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept} and kept
    with open(single, "wb") as file:  # cut and grown otherwise
        file.writelines(lines[:3] + [
            line.replace(b'"id": "msg', b'"id": "gsm').replace(b'"id":"msg', b'"id":"gsm')
            for line in lines[3:]])
    check()


def test_dask_says_what_a_scan_prints():
    pytest.importorskip("distributed", reason="needs pip install 'sessionoptimizer[fleet]'")
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.abspath(so.__file__)))
    folders = [os.path.join(SAMPLES, name) for name in ("claude-code", "codex")]
    out = subprocess.run([sys.executable, os.path.join(HERE, "fleet_dask.py"), *folders],
                         stdout=subprocess.PIPE, env=environment, check=True, timeout=WAIT).stdout
    plain = subprocess.run([sys.executable, so.__file__, "scan", "--no-store", "--format", "json",
                            *folders], stdout=subprocess.PIPE, check=True).stdout
    assert out == plain and len(json.loads(out)["sessions"]) > 10


# ---- the same program without a cluster: what it does in what order, with which files ----

class Stopped(Exception):
    """The driver ends here."""


class Here:
    """Does at once, in this process, what `fleet_spark.run` asks of a SparkContext; ``stop``: after
    how many actions and objects of its own the driver ends."""

    defaultParallelism = 2

    def __init__(self, stop=None):
        self.done, self.stop = 0, stop

    def count(self):
        self.done += 1
        if self.done == self.stop:
            raise Stopped

    def parallelize(self, values, parts=None):
        return Rows(self, values)


class Rows:
    def __init__(self, context, values):
        self.context, self.values = context, list(values)

    def map(self, function):
        return Rows(self.context, map(function, self.values))

    def flatMap(self, function):
        return Rows(self.context, (each for value in self.values for each in function(value)))

    def filter(self, function):
        return Rows(self.context, filter(function, self.values))

    def mapValues(self, function):
        return Rows(self.context, ((key, function(value)) for key, value in self.values))

    def groupByKey(self, parts=None):
        groups = {}
        for key, value in self.values:
            groups.setdefault(key, []).append(value)
        return Rows(self.context, groups.items())

    def reduceByKey(self, function, parts=None):
        return self.groupByKey().mapValues(lambda values: functools.reduce(function, values))

    def join(self, other, parts=None):
        right = dict(other.groupByKey().values)
        return Rows(self.context, ((key, (value, each)) for key, value in self.values
                                   for each in right.get(key, ())))

    def collect(self):
        self.context.count()
        return self.values

    def collectAsMap(self):
        return dict(self.collect())

    def foreach(self, function):
        for value in self.values:
            function(value)
        self.context.count()


@pytest.fixture
def fleet(monkeypatch):
    """run(folder, target, stop=None): the program on this machine; checked against a scan, in every
    figure."""
    pytest.importorskip("pyarrow", reason="needs pip install 'sessionoptimizer[fleet]'")
    pytest.importorskip("fsspec", reason="needs pip install 'sessionoptimizer[fleet]'")
    monkeypatch.syspath_prepend(HERE)
    import fleet_spark
    put = fleet_spark.put

    def run(folder, target, stop=None):
        here, driver = Here(stop), os.getpid()

        def counted(place, data):
            put(place, data)
            if os.getpid() == driver and not place.startswith(target + "/tables"):
                here.count()

        monkeypatch.setattr(fleet_spark, "put", counted)
        fleet_spark.run(here, folder, target)
        result, found = says(target, folder, folder)
        assert result == dict(scanned(folder), changes="")
        assert_adds_up(found, result)
        return result, here.done

    return run


def hashes(target):
    """{object: the hash of what it holds}."""
    found = {}
    for base, _, names in os.walk(target):
        for name in names:
            with open(os.path.join(base, name), "rb") as file:
                found[os.path.relpath(os.path.join(base, name), target)] = (
                    hashlib.sha256(file.read()).hexdigest())
    return found


def copied(tmp_path, *names):
    folder = str(tmp_path / "in")
    for name in names:
        shutil.copytree(
            os.path.join(SAMPLES, "codex" if name.startswith("codex") else "claude-code", name),
            os.path.join(folder, name))
    return folder


def test_a_run_that_ends_after_any_stage_is_made_up_for_by_the_next(fleet, tmp_path):
    folder = copied(tmp_path, "forked-session", "resumed-session", "subagent-reads-twice",
                    "read-twice", "codex-search-twice")
    whole = str(tmp_path / "whole")
    result, stages = fleet(folder, whole)
    expected = hashes(whole)
    assert stages > 6 and len(result["sessions"]) > 5
    for stop in range(1, stages + 1):
        target = str(tmp_path / ("stopped%d" % stop))
        with pytest.raises(Stopped):
            fleet(folder, target, stop)
        assert os.path.exists(os.path.join(target, "current")) == (stop == stages)
        left = hashes(target)
        assert fleet(folder, target)[0] == result and hashes(target) == expected
        # what was written before the end is used, and never written otherwise
        assert {name: expected[name] for name in left} == left


def codex_fork(path, at, identity, days):
    """A fork of a rollout: its own head, then all lines of its parent up to a line, some days
    later."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][:at]
    head = json.loads(json.dumps(lines[0]))
    head["payload"].update(id=identity, forked_from_id=head["payload"]["id"])
    return "".join(json.dumps(
        dict(line, timestamp=line["timestamp"].replace("2026-02", "2026-%02d" % (2 + days)))) + "\n"
        for line in [head] + lines)


def test_a_codex_fork_in_another_folder_counts_what_is_its_own(fleet, tmp_path):
    folder = copied(tmp_path, "codex-one-file-four-spellings")
    path, = (path for path, _, _ in so.find_transcripts([folder]))
    alone = scanned(folder)["totals"]
    with open(path, "rb") as file:
        lines = file.readlines()
    identity = "11111111-2222-4333-8444-555555555555"
    fork = os.path.join(folder, "laptop", "b", "rollout-2026-03-08T16-03-00-%s.jsonl" % identity)
    os.makedirs(os.path.dirname(fork))
    with open(fork, "w", encoding="utf-8") as file:
        file.write(codex_fork(path, len(lines), identity, 1))
    # the parent tells all that the fork does, or stopped half-way
    for kept in (len(lines), len(lines) // 2):
        with open(path, "wb") as file:
            file.writelines(lines[:kept])
        result, _ = fleet(folder, str(tmp_path / "out"))
        calls = {row["id"]: row["model_calls"] for row in result["sessions"]}
        assert (result["totals"]["tokens"] == alone["tokens"]
                and sum(calls.values()) == alone["model_calls"])
        assert (calls[identity] == 0) == (kept == len(lines))
    os.remove(path)  # the parent is gone: what it counted falls to the fork
    result, _ = fleet(folder, str(tmp_path / "out"))
    assert ([(row["id"], row["model_calls"]) for row in result["sessions"]]
            == [(identity, alone["model_calls"])])


def test_of_two_sessions_that_want_one_id_the_earlier_has_it(fleet, tmp_path):
    folder = copied(tmp_path, "read-twice")
    path, = (path for path, _, _ in so.find_transcripts([folder]))
    name = os.path.basename(path)[:-6]
    with open(path, "rb") as file:
        data = file.read()
    for month, place in ((b"2026-03", "later"), (b"2026-01", "earlier")):
        other = os.path.join(folder, place, os.path.basename(path))
        os.makedirs(os.path.dirname(other))
        with open(other, "wb") as file:  # the same id, other responses
            file.write(data.replace(b"2026-02", month).replace(
                b'"id":"msg', b'"id":"%s' % place.encode()).replace(
                    b'"id": "msg', b'"id": "%s' % place.encode()))
        rows = fleet(folder, str(tmp_path / "out"))[0]["sessions"]
        assert ([row["id"] for row in sorted(rows, key=lambda row: row["started_at"])]
                == [name] + ["%s-%d" % (name, n) for n in range(2, len(rows) + 1)])
        assert (len(rows) == (2 if place == "later" else 3)
                and len({row["path"] for row in rows}) == len(rows))


def test_a_file_that_is_gone_and_an_earlier_twin_that_comes(fleet, tmp_path):
    folder, target = copied(tmp_path, "read-twice", "search-twice"), str(tmp_path / "out")
    path, = (path for path, _, _ in so.find_transcripts([os.path.join(folder, "read-twice")]))
    first = fleet(folder, target)[0]
    with open(path, "rb") as file:
        data = file.read()
    os.remove(path)
    assert len(fleet(folder, target)[0]["sessions"]) == len(first["sessions"]) - 1
    twin = os.path.join(folder, "a", os.path.basename(path))
    os.makedirs(os.path.dirname(twin))
    with open(twin, "wb") as file:  # the same responses, told a month earlier
        file.write(data.replace(b"2026-02", b"2026-01"))
    alone = fleet(folder, target)[0]
    assert alone["totals"]["tokens"] == first["totals"]["tokens"]
    with open(path, "wb") as file:  # and the first file is back: the twin keeps what it tells first
        file.write(data)
    both = fleet(folder, target)[0]
    calls = {row["path"]: row["model_calls"] for row in both["sessions"]}
    assert (both["totals"]["tokens"] == alone["totals"]["tokens"] and calls[twin] > 0
            and calls[path] == 0)


def test_a_pool_of_processes_gives_the_bytes_of_a_scan():
    """Needs no package and no Java: on every Python the functions of the cluster say what the
    command prints."""
    folders = [os.path.join(SAMPLES, name)
               for name in ("claude-code", "codex", "gemini", "opencode")]
    paths = [path for path, _, _ in so.find_transcripts(folders)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        facts = list(pool.map(so.describe_transcript, reversed(paths), chunksize=16))
        units = so.group_transcripts(facts)
        found = dict(zip((unit[0]["path"] for unit in units),
                         pool.map(so.read_session_files, units, chunksize=8)))
        orders = {unit[0]["path"]: unit[0]["order"] for unit in units}
        owners = so.owners_of((key, most, orders[name]) for name, its in found.items()
                              for key, most in its["responses"].items())
        lost = {name: {key for key in its["responses"] if owners[key] != orders[name]}
                for name, its in found.items()}
        again = [unit for unit in units if lost[unit[0]["path"]]]
        found.update(zip((unit[0]["path"] for unit in again), pool.map(
            so.read_session_files, again, [lost[unit[0]["path"]] for unit in again])))
    ids = so.session_ids((name, [row["id"] for row in its["rows"]]) for name, its in found.items())
    rows = [so.renamed(row, session) for name, its in found.items()
            for row, session in zip(its["rows"], ids[name])]
    result = so.scan_result(rows[::-1], so.left_out(facts)
                            + [entry for its in found.values() for entry in its["skipped"]])
    out = subprocess.run([sys.executable, so.__file__, "scan", "--no-store", "--format", "json",
                          *folders], stdout=subprocess.PIPE, check=True).stdout
    assert ((json.dumps(result, indent=2) + "\n").encode() == out and again
            and len(result["sessions"]) > 100)
