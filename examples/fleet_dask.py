#!/usr/bin/env python3
"""The figures of ``sessionoptimizer scan`` from a Dask cluster: the small twin of fleet_spark.py.

    python3 examples/fleet_dask.py FOLDER...                        workers on this machine
    python3 examples/fleet_dask.py --cluster tcp://HOST:8786 FOLDER...   that see the same folders

Prints what ``sessionoptimizer scan --no-store --format json`` prints, to the last digit.

Needs: pip install 'sessionoptimizer[fleet]'.
"""
from __future__ import annotations

import argparse
import json
import os

import sessionoptimizer as so


def scan(client, folders):
    """What a scan of the folders finds, read by the workers of a dask.distributed.Client."""
    def gathered(function, *arguments):
        return client.gather(client.map(function, *arguments, pure=False)) if arguments[0] else []

    paths = [path for path, _, _ in so.find_transcripts(folders)]
    facts = gathered(so.describe_transcript, paths)
    units = so.group_transcripts(facts)
    found = gathered(so.read_session_files, units)

    orders = [unit[0]["order"] for unit in units]
    owners = so.owners_of((response, output, order) for order, unit in zip(orders, found)
                          for response, output in unit["responses"].items())
    lost = [{response for response in unit["responses"] if owners[response] != order}
            for order, unit in zip(orders, found)]
    again = [number for number, responses in enumerate(lost) if responses]
    read = gathered(so.read_session_files, [units[number] for number in again],
                    [lost[number] for number in again])
    for number, unit in zip(again, read):
        found[number] = unit

    names = [unit[0]["path"] for unit in units]
    ids = so.session_ids((name, [row["id"] for row in unit["rows"]])
                         for name, unit in zip(names, found))
    rows = [so.renamed(row, session) for name, unit in zip(names, found)
            for row, session in zip(unit["rows"], ids[name])]
    skipped = [entry for unit in found for entry in unit["skipped"]]
    return so.scan_result(rows, skipped + so.left_out(facts))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", help="folders with transcripts")
    parser.add_argument("--cluster", help="a scheduler, tcp://HOST:8786 (default: here)")
    options = parser.parse_args()
    from dask.distributed import Client
    local = {"dashboard_address": None, "threads_per_worker": 1}
    with Client(options.cluster) if options.cluster else Client(**local) as client:
        client.upload_file(os.path.abspath(so.__file__))
        print(json.dumps(scan(client, options.folders), indent=2))


if __name__ == "__main__":
    main()
