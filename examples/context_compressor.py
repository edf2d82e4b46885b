#!/usr/bin/env python3
"""Read files as their outline (signatures and docstrings, headings), and log what that saved.

    python3 examples/context_compressor.py [FILE ...] [--show] [--store DIR]

Python needs nothing: imports, constants, classes, decorators, signatures and docstrings stay,
bodies become ``...``, and the outline is valid Python. Go, TypeScript, JavaScript, Rust, Java and
markdown need the extra ``compression`` (see compression.py, which tells what outlines would have
saved in recorded sessions). An outline answers "what is in this file?" for a fraction of the
tokens; the lines of a body are read when they matter.
"""
from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
import tokenize
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.exists(os.path.join(ROOT, "sessionoptimizer.py")):  # run from a clone
    sys.path.insert(0, ROOT)
import compression  # noqa: E402  (the program beside this one)
import sessionoptimizer  # noqa: E402
from sessionoptimizer import EventType, Session, SessionOptimizer  # noqa: E402

# A compressor is any function from a text and its path to a shorter text. To use your own, import
# it instead: from contextcompressor import ContextCompressor, whose compress_text(text)[0] is the
# shorter text.
Compressor = Callable[[str, str], str]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class CompressedRead:
    """A file as it goes into the context, and what it would have cost."""

    text: str
    original_tokens: int
    compressed_tokens: int


def estimate_tokens(text: str) -> int:
    """About four characters per token. For exact figures, put your provider's token counter
    here."""
    return (len(text) + 3) // 4


def outline(text: str, path: str) -> str:
    """A source without function bodies; text in no known language, and Python that does not parse,
    unchanged. ImportError where the language needs the extra."""
    if not path.endswith((".py", ".pyi")):
        return compression.outline(text, compression.Tool("Read", path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in the file that is read
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    source = text.encode("utf-8")
    starts = [0]  # byte offset of every line
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for first, last in sorted(bodies(tree), key=lambda pair: -pair[0].lineno):
        line = min([first.lineno]
                   + [decorator.lineno for decorator in getattr(first, "decorator_list", [])])
        begin = starts[line - 1] + first.col_offset  # where the @ is too, for a decorated one
        end = starts[last.end_lineno - 1] + last.end_col_offset
        if end - begin > len(b"..."):
            source = source[:begin] + b"..." + source[end:]
    return source.decode("utf-8")


def bodies(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """First and last statement of every function's body, without its docstring; nested ones stay in
    it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, FUNCTIONS):
            yield from bodies(child)
            continue
        statements = (child.body[1:] if ast.get_docstring(child, clean=False) is not None
                      else child.body)
        if statements:
            yield statements[0], statements[-1]


def read_text(path: str) -> str:
    """A file's text; Python source in the encoding it declares."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()


def read_compressed(optimizer: SessionOptimizer, session_id: str, path: str,
                    compress: Compressor = outline) -> CompressedRead:
    """Read a file in short and log the read; one that does not get shorter is logged as an ordinary
    read."""
    text = read_text(path)
    short = compress(text, path)
    read = CompressedRead(short, estimate_tokens(text), estimate_tokens(short))
    data: dict[str, Any] = {"file_path": os.path.abspath(path)}
    if read.compressed_tokens < read.original_tokens:
        saved = 100 * (1 - read.compressed_tokens / read.original_tokens)
        data.update(compressed=True, original_tokens=read.original_tokens,
                    compressed_tokens=read.compressed_tokens, savings_percent=round(saved, 1))
    optimizer.log_event(session_id, EventType.FILE_READ, data, tokens_input=read.compressed_tokens)
    return read


def compression_stats(session: Session) -> dict[str, float]:
    """What compression saved in a session: files, original and compressed tokens, percent."""
    reads = [event.data for event in session.events if "original_tokens" in event.data]
    original = sum(data["original_tokens"] for data in reads)
    compressed = sum(data["compressed_tokens"] for data in reads)
    return {"files": len(reads), "original_tokens": original, "compressed_tokens": compressed,
            "savings_percent": 100 * (1 - compressed / original) if original else 0.0}


def main(argv: list[str] | None = None) -> int:
    """Compress the files (default: the sessionoptimizer module itself) and return 0; 1 where one
    cannot be read."""
    parser = argparse.ArgumentParser(description="Read files as outlines and log what that saved.")
    parser.add_argument("files", nargs="*", metavar="FILE", default=[sessionoptimizer.__file__])
    parser.add_argument("--show", action="store_true", help="print the outlines too")
    parser.add_argument(
        "--store", metavar="DIR", help="keep the session there (default: a temporary store)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        optimizer = SessionOptimizer(options.store or scratch)
        session = optimizer.start_session("ATLAS", "Read a code base", model="sonnet")
        for path in options.files:
            try:
                read = read_compressed(optimizer, session.id, path)
            except (ImportError, OSError) as error:
                parser.exit(1, f"{path}: {error}\n")
            print(f"{os.path.basename(path)}: "
                  f"{read.original_tokens:,} -> {read.compressed_tokens:,} tokens "
                  "(estimated)")
            if options.show:
                print(read.text)
        optimizer.end_session(session.id)
        stats = compression_stats(session)
        print(f"saved: {stats['original_tokens'] - stats['compressed_tokens']:,} tokens "
              f"({stats['savings_percent']:.1f}%) in {stats['files']} files")
        report = optimizer.analyze(session.id)
        print(f"efficiency: {report.efficiency_score:.1f}%, issues: {len(report.issues)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
