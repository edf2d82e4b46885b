#!/usr/bin/env python3
"""A knowledge base on SQLite's full-text search; loads, queries and saves go to a session's log.

    python3 examples/knowledge_base.py [--base FILE] [--store DIR]

A load is a CONTEXT_LOAD, a query a SEARCH (so asking the same twice is found), a save a CUSTOM
event that says the base has changed (so asking again after it is not). Without FTS5 in SQLite the
search compares words.
"""
from __future__ import annotations

import argparse
import os
import re
import sqlite3
import sys
import tempfile
from contextlib import closing
from typing import Protocol

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
from sessionoptimizer import EventType, SessionOptimizer  # noqa: E402


class Knowledge(Protocol):
    """What is needed of a base. To use your own, import it: ``from
    knowledgesync import KnowledgeSync``."""

    name: str
    def load(self, entry_id: int) -> tuple[str, str] | None: ...
    def query(self, words: str, limit: int = 5) -> list[tuple[int, str, str]]: ...
    def save(self, topic: str, text: str) -> int: ...


class SqliteKnowledge:
    """Entries in one SQLite file. ``full_text=False`` does without FTS5 even where it is there."""

    def __init__(self, path: str, *, full_text: bool = True):
        self.name = os.path.abspath(path)
        self._db = sqlite3.connect(path)
        self.full_text = full_text and self._has_fts5()
        self._table = "entries" if self.full_text else "plain_entries"
        kind, using = ("VIRTUAL TABLE", "USING fts5") if self.full_text else ("TABLE", "")
        self._db.execute(f"CREATE {kind} IF NOT EXISTS {self._table} {using} (topic, text)")

    def _has_fts5(self) -> bool:
        try:
            self._db.execute("CREATE VIRTUAL TABLE temp.probe USING fts5(a)")
        except sqlite3.OperationalError:
            return False
        self._db.execute("DROP TABLE temp.probe")
        return True

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def load(self, entry_id: int) -> tuple[str, str] | None:
        """Topic and text of an entry; None when there is none."""
        question = f"SELECT topic, text FROM {self._table} WHERE rowid = ?"
        return self._db.execute(question, (entry_id,)).fetchone()

    def query(self, words: str, limit: int = 5) -> list[tuple[int, str, str]]:
        """The entries that hold any of the words, best match first; [] where there is no word to
        look for."""
        terms = sorted(set(re.findall(r"\w+", words.lower())))
        if not terms:
            return []
        if self.full_text:  # every term quoted: FTS5 operators in a question are words
            match = " OR ".join(f'"{term}"' for term in terms)
            return self._db.execute("SELECT rowid, topic, text FROM entries WHERE entries MATCH ? "
                                    "ORDER BY rank LIMIT ?", (match, limit)).fetchall()
        score = " + ".join(["(instr(lower(topic || ' ' || text), ?) > 0)"] * len(terms))
        scored = f"SELECT rowid AS id, topic, text, {score} AS score FROM plain_entries"
        return self._db.execute(f"SELECT id, topic, text FROM ({scored}) WHERE score > 0 "
                                "ORDER BY score DESC, id LIMIT ?", (*terms, limit)).fetchall()

    def save(self, topic: str, text: str) -> int:
        """Add an entry and return its id."""
        with self._db:  # commits
            return self._db.execute(f"INSERT INTO {self._table} VALUES (?, ?)",
                                    (topic, text)).lastrowid


def estimate_tokens(text: str) -> int:
    """About four characters per token."""
    return -(-len(text) // 4)


def load_knowledge(optimizer: SessionOptimizer, session_id: str, base: Knowledge,
                   entry_id: int) -> str:
    """The text of an entry, logged as context; "" when there is none."""
    topic, text = base.load(entry_id) or ("", "")
    if text:
        optimizer.log_event(session_id, EventType.CONTEXT_LOAD,
                            {"source": "knowledge base", "knowledge_id": entry_id, "topic": topic},
                            tokens_input=estimate_tokens(text))
    return text


def query_knowledge(optimizer: SessionOptimizer, session_id: str, base: Knowledge, words: str,
                    limit: int = 5) -> list[tuple[int, str, str]]:
    """The entries that match, logged as a search; the tokens are those of the answer and of the
    question."""
    found = base.query(words, limit)
    optimizer.log_event(session_id, EventType.SEARCH,
                        {"tool": "knowledge", "query": words, "scope": f"{base.name} {limit}",
                         "results_count": len(found)},
                        tokens_input=sum(estimate_tokens(topic + text) for _, topic, text in found),
                        tokens_output=estimate_tokens(words))
    return found


def save_knowledge(optimizer: SessionOptimizer, session_id: str, base: Knowledge, topic: str,
                   text: str) -> int:
    """Save what the model wrote, logged with its tokens; returns the entry's id."""
    entry_id = base.save(topic, text)
    optimizer.log_event(session_id, EventType.CUSTOM,
                        {"type": "knowledge_save", "knowledge_id": entry_id, "topic": topic,
                         "changes": [base.name]},
                        tokens_output=estimate_tokens(text))
    return entry_id


def demo(optimizer: SessionOptimizer, base: SqliteKnowledge) -> None:
    """Save two entries, ask the same question twice, load what was found."""
    session = optimizer.start_session("FORGE", "Collect what we know of tokens", model="opus")
    save_knowledge(optimizer, session.id, base, "JWT",
                   "Signed tokens; rotate the signing keys weekly.")
    save_knowledge(optimizer, session.id, base, "Sessions", "They end when the cookie expires.")
    for _ in range(2):
        found = query_knowledge(optimizer, session.id, base, "which keys sign our tokens?")
    print(f"search: {'FTS5' if base.full_text else 'word by word'}, best match: {found[0][1]}")
    print(f"loaded: {load_knowledge(optimizer, session.id, base, found[0][0])}")
    optimizer.end_session(session.id)
    report = optimizer.analyze(session.id)
    kinds = ", ".join(issue.issue_type.value for issue in report.issues)
    print(f"efficiency: {report.efficiency_score:.1f}%, found: {kinds}")


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration and return 0."""
    parser = argparse.ArgumentParser(description="A knowledge base whose use is logged.")
    parser.add_argument("--base", metavar="FILE", help="the SQLite file (default: a temporary one)")
    parser.add_argument(
        "--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.base or os.path.join(scratch, "knowledge.db")
        with closing(SqliteKnowledge(path)) as base:
            demo(SessionOptimizer(options.store or scratch), base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
