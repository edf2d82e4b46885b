#!/usr/bin/env python3
"""Log Claude Code's sessions while they run: ``sessionoptimizer hook`` into settings.json, or out.

    python3 examples/claude_code_hooks.py                          shows what --install would change
    python3 examples/claude_code_hooks.py --install                ~/.claude/settings.json, all
                                                                   projects
    python3 examples/claude_code_hooks.py --install --project      .claude/settings.json of this
                                                                   directory
    python3 examples/claude_code_hooks.py --install --guard        advice before a read or a search
                                                                   repeats
    python3 examples/claude_code_hooks.py --install --status-line  and the line of
                                                                   claude_code_status.py
    python3 examples/claude_code_hooks.py --uninstall

The change is shown first, as a diff; a copy of the file stays beside it (settings.json.DATE.bak).
Installing twice is installing once. Uninstalling takes out these entries alone, and gives back the
file byte for byte when nothing else has changed since. A file that somebody else edits at that
moment is read again, not written over. The hooks print nothing, and the agent waits for none but
the guard, the one at the end of a turn and the one at the end of a session (a run with ``-p`` kills
those it does not wait for).
"""
from __future__ import annotations

import argparse
import copy
import difflib
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVENTS = ("SessionStart", "UserPromptSubmit", "PostToolUse", "PostToolUseFailure", "SubagentStop",
          "PreCompact", "Stop", "SessionEnd")
GUARDED = "Read|Grep|Glob|Bash|PowerShell"
WAITED = ("Stop", "SessionEnd")  # for the others the agent does not wait
SECONDS = 10        # a hook that takes longer is stopped
# where the agent waits; at the end of a session hooks have 1.5 s unless they ask for more
LAST_SECONDS = 5
REFRESH = 30        # seconds between two status lines while nothing happens but time
ATTEMPTS = 5        # at a file that others edit at the same moment
BOM = b"\xef\xbb\xbf"
STATUS = "claude_code_status.py"


class SettingsError(Exception):
    """A settings file that cannot be changed safely; the message names it and says why."""


class Edited(Exception):
    """Somebody changed the file between the reading and the writing."""


def command_line(words: list[str], store: str | None) -> str:
    """A command of these words for the shell, with the store it logs to."""
    place = ["--store", os.path.abspath(store)] if store else []
    words = words + place
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(map(shlex.quote, words))


def hook_command(store: str | None, project: bool = False) -> str:
    """The command of a hook: the installed program, else this clone's module. With its path, which
    the agent may not have on its own (an environment that is left); a project's settings are
    shared, and keep the name."""
    program = shutil.which("sessionoptimizer")
    words = [sys.executable, os.path.join(ROOT, "sessionoptimizer.py")]
    if program:
        words = ["sessionoptimizer" if project else os.path.abspath(program)]
    return command_line(words, store) + " hook"


def status_entry(store: str | None) -> dict[str, Any]:
    """What the settings' statusLine is to be."""
    words = [sys.executable, os.path.join(ROOT, "examples", STATUS)]
    return {"type": "command", "command": command_line(words, store), "refreshInterval": REFRESH}


def entries(command: str, guard: str = "") -> dict[str, dict[str, Any]]:
    """The group to add for each event. ``guard``: "advise" or "deny" answers repeated reads and
    searches."""
    result = {}
    for event in EVENTS:
        handler: dict[str, Any] = {"type": "command", "command": command, "timeout": SECONDS,
                                   "async": True}
        if event in WAITED:
            handler = {"type": "command", "command": command, "timeout": LAST_SECONDS}
        result[event] = {"hooks": [handler]}
    if guard:
        answer = command + " --guard" + (" --deny" if guard == "deny" else "")
        result["PreToolUse"] = {"matcher": GUARDED, "hooks": [{"type": "command", "command": answer,
                                                               "timeout": LAST_SECONDS}]}
    return result


def words_of(handler: Any) -> list[str]:
    """A handler's command: the base names of program and script, and the other words;
    [] where it is none."""
    try:
        words = shlex.split(str(handler["command"]),
                            posix=os.name != "nt" and "\\" not in handler["command"])
    except (ValueError, TypeError, KeyError):
        return []
    return [re.split(r"[/\\]", word.strip("\"'"))[-1] for word in words]


def arguments_of(handler: Any, *programs: str) -> list[str] | None:
    """The words after one of our programs, run by itself or by Python, and after its --store; None
    where the command is another, if it only names one of them."""
    words = words_of(handler)
    if words and re.match(r"(?:python|pypy|py)[\d.]*(?:\.exe)?$", words[0]):
        words = words[2 if words[1:2] == ["-m"] else 1:]
    if not words or words[0] not in programs:
        return None
    return words[3:] if words[1:2] == ["--store"] else words[1:]


def is_ours(handler: Any) -> bool:
    """Whether a handler runs ``sessionoptimizer hook``, and nothing else."""
    words = arguments_of(handler, "sessionoptimizer", "sessionoptimizer.py",
                         "sessionoptimizer.exe") or []
    return words[:1] == ["hook"] and words[1:] in ([], ["--guard"], ["--guard", "--deny"])


def is_our_status(settings: dict[str, Any]) -> bool:
    """Whether the settings' status line is ours."""
    return arguments_of(settings.get("statusLine"), STATUS) == []


def ours_in(settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The groups that hold a handler of ours, by event."""
    found = {}
    for event, groups in settings.get("hooks", {}).items():
        mine = [group for group in groups
                if isinstance(group, dict) and isinstance(group.get("hooks"), list)
                and any(map(is_ours, group["hooks"]))]
        if mine:
            found[event] = mine
    return found


def without(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without our handlers, and without the groups,
    events and hooks that this leaves empty."""
    result = copy.deepcopy(settings)
    for event, mine in ours_in(settings).items():
        groups = []
        for group in result["hooks"][event]:
            if group in mine:
                group["hooks"] = [handler for handler in group["hooks"] if not is_ours(handler)]
                if not group["hooks"]:
                    continue
            groups.append(group)
        result["hooks"][event] = groups
        if not groups:
            del result["hooks"][event]
    if not result.get("hooks", True) and settings["hooks"]:
        del result["hooks"]
    if is_our_status(settings):
        del result["statusLine"]
    return result


def merged(settings: dict[str, Any], wanted: dict[str, dict[str, Any]],
           status: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings with our entries; the same settings when they are there already. SettingsError
    where the user's own status line stands in the place of ours."""
    if ours_in(settings) == {event: [group] for event, group in wanted.items()}:
        if status == (settings.get("statusLine") if is_our_status(settings) else None):
            return settings
    result = without(settings)
    if status:
        if "statusLine" in result:
            raise SettingsError(
                "the settings have a statusLine of their own: take it out or install without "
                "--status-line; nothing was changed")
        result["statusLine"] = status
    for event, group in wanted.items():
        result.setdefault("hooks", {}).setdefault(event, []).append(copy.deepcopy(group))
    return result


def read_settings(path: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the file and what they say; b"" and {} when there is none.
    SettingsError when damaged."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return b"", {}
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    return data, parse(data, path)


def parse(data: bytes, path: str) -> dict[str, Any]:
    """The settings in a file's bytes; SettingsError unless they can be written again without a
    loss."""
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key occurs twice in {{{', '.join(key for key, _ in pairs)}}}")
        return dict(pairs)

    try:
        text = data[len(BOM):] if data.startswith(BOM) else data
        settings = json.loads(text.decode("utf-8"), object_pairs_hook=once) if text.strip() else {}
        write_like(settings, data)
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path} is damaged: {error}; mend it first, nothing was changed") from None
    hooks = settings.get("hooks", {}) if isinstance(settings, dict) else None
    if (not isinstance(hooks, dict)
            or not all(isinstance(groups, list) for groups in hooks.values())):
        raise SettingsError(
            f"{path} is damaged: it needs an object, in which hooks is an object of lists; "
            "mend it first, nothing was changed")
    return settings


def write_like(settings: dict[str, Any], old: bytes) -> bytes:
    """The settings as JSON with the byte order mark, indentation,
    line ends and last line of the old file."""
    indent = re.search(rb"^([ \t]+)\S", old, re.MULTILINE)
    text = json.dumps(settings, indent=indent.group(1).decode() if indent else 2,
                      ensure_ascii=False)
    text += "\n" if not old or old.endswith(b"\n") else ""
    data = text.replace("\n", "\r\n" if b"\r\n" in old else "\n").encode("utf-8")
    return BOM + data if old.startswith(BOM) else data


def uninstalled(path: str, old: bytes, settings: dict[str, Any]) -> bytes | None:
    """The file's bytes without our entries: those of a copy that says the same;
    None to remove the file."""
    if not ours_in(settings) and not is_our_status(settings):
        return old
    plain = without(settings)
    for backup in sorted(glob.glob(glob.escape(path) + ".*.bak"), reverse=True):
        try:
            with open(backup, "rb") as file:
                data = file.read()
            before = parse(data, backup)
        except (OSError, SettingsError):
            continue
        if not ours_in(before) and not is_our_status(before) and same(before, plain):
            return data
    return write_like(plain, old) if plain else None


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two settings say the same in the same order, empty hooks apart."""
    def text(settings: dict[str, Any]) -> str:
        hooks = {event: groups for event, groups in settings.get("hooks", {}).items() if groups}
        rest = {key: value for key, value in settings.items() if key != "hooks"}
        return json.dumps([hooks, rest])
    return text(before) == text(after)


def replace(path: str, old: bytes, new: bytes | None) -> str:
    """Keep a copy, then write the file in one step (or remove it); the copy's path, "" without a
    file. Edited when the file is not the old one any more; it stays as it is then."""
    backup, target = "", os.path.realpath(path)  # a link, as dotfile managers make, stays one
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.exists(target):
        backup = f"{path}.{datetime.now():%Y%m%d-%H%M%S-%f}.bak"
        shutil.copy2(target, backup)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(new or b"")
        if backup:
            shutil.copymode(target, temporary)
        if read_settings(path)[0] != old:
            raise Edited
        if new is not None:
            os.replace(temporary, target)
        else:
            os.remove(target)
            os.remove(temporary)
    except BaseException:
        os.remove(temporary)
        if backup:
            os.remove(backup)
        raise
    return backup


def shown(path: str, old: bytes, new: bytes | None) -> str:
    """The change as a diff."""
    before, after = (data.decode("utf-8", "replace").splitlines() for data in (old, new or b""))
    label = path + (" (new)" if new is not None else " (removed)")
    return "\n".join(difflib.unified_diff(before, after, path, label, lineterm=""))


def settings_path(project: str | None) -> str:
    """The user's settings file, or a project's."""
    if project is not None:
        return os.path.join(os.path.abspath(project), ".claude", "settings.json")
    home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.join(os.path.expanduser("~"), ".claude")
    return os.path.join(home, "settings.json")


def main(argv: list[str] | None = None) -> int:
    """Install or uninstall; 0, or 1 when the settings cannot be changed."""
    parser = argparse.ArgumentParser(
        description="Put sessionoptimizer's hooks into Claude Code's settings.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--install", action="store_true",
                        help="add the hooks (else: only show the change)")
    action.add_argument("--uninstall", action="store_true", help="take them out")
    parser.add_argument("--project", nargs="?", const=".", metavar="DIR",
                        help="a project's (default: .)")
    parser.add_argument("--dry-run", action="store_true", help="show the change and write nothing")
    parser.add_argument(
        "--guard", nargs="?", const="advise", choices=("advise", "deny"), default="",
        help="answer reads and searches that would repeat, by advice (default) or a refusal")
    parser.add_argument("--status-line", action="store_true",
                        help="also show context, dollars and the cache's end in Claude Code's "
                        "status line")
    parser.add_argument("--store", metavar="DIR", help="let the hooks log to this store")
    options = parser.parse_args(argv)
    path = settings_path(options.project)
    for _ in range(ATTEMPTS):
        try:
            return change(path, options)
        except Edited:
            print(f"\n{path}: somebody else has just changed it; once more", file=sys.stderr)
        except (SettingsError, OSError) as error:
            print(f"claude_code_hooks: {error}", file=sys.stderr)
            return 1
    print(f"claude_code_hooks: {path} changes all the time: nothing was written", file=sys.stderr)
    return 1


def change(path: str, options: argparse.Namespace) -> int:
    """Show the change and, where it is asked for, make it; 0. SettingsError,
    OSError or Edited when it cannot."""
    old, settings = read_settings(path)
    if options.uninstall:
        new = uninstalled(path, old, settings)
    else:
        status = status_entry(options.store) if options.status_line else None
        wanted = merged(settings, entries(hook_command(options.store, bool(options.project)),
                                          options.guard), status)
        new = old if wanted is settings else write_like(wanted, old)
    if new == old:
        print(f"{path}: nothing to change")
        return 0
    print(shown(path, old, new))
    if options.dry_run or not (options.install or options.uninstall):
        print(f"\n{path}: nothing written"
              + ("" if options.dry_run else "; --install makes this change"))
        return 0
    backup = replace(path, old, new)
    done = "removed" if new is None else "written"
    print(f"\n{path}: {done}" + (f"; the old one is {backup}" if backup else ""))
    if settings.get("disableAllHooks"):
        print("note: disableAllHooks is set there, so no hook runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
