"""Recorders that write sessions as Claude Code, Codex and Gemini CLI would have written them.

Each keeps its books while it writes: a call's context is the previous context, plus the visible
part of the previous output, plus what entered since (tool results, prompts). All text is made here.
"""

import copy
import hashlib
import json
import uuid
import zlib
from collections import namedtuple
from datetime import datetime, timedelta

# first call: system prompt found in the provider's cache, and the rest of it
PREFIX, SYSTEM = 11264, 5120
PROJECTS = ("shop", "blog-engine", "weather-cli", "invoice-api")
Tool = namedtuple("Tool", "name input result tokens extra error", defaults=(None, None, False))
Cost = namedtuple("Cost", "entered written")

# ---- text of our own making ----------------------------------------------------------------------
WORDS = (
    "cart order price stock user route query cache batch parser header total index label "
    "draft page".split())
SHAPES = ("def {}_{}(self, {}):", "    {} = self.{}.get({})", "    if {} is None or {}:",
          "    return {} + {}", "    for {} in {}.{}():", "    self.{}.append({})",
          "    {}.{} = {}.copy()", "    log({}, {}, {})")
SENTENCES = ("The totals are rounded twice, once per line and once at the end. ",
             "That explains the missing cent. ",
             "A smaller change would be to round only when the invoice is shown. ",
             "Old orders keep their amounts. ",
             "The cache key leaves out the currency, so two shops can share an entry. ",
             "A test can show this. ")


def code(path, first, last, version=0):
    """Lines first..last of a source file, 40 characters each; another version has another third
    line."""
    lines = []
    for number in range(first, last + 1):
        seed = zlib.crc32(("%s:%d" % (path, number)).encode())
        words = [WORDS[(seed >> shift) % len(WORDS)] for shift in (3, 9, 15)]
        line = SHAPES[seed % len(SHAPES)].format(*words)
        lines.append(
            (("REVISION = %d" % version if number == 3 else line)
             + "  # see the notes in docs/design")[:40])
    return [line[:39] + "." if line.endswith(" ") else line for line in lines]


def prose(length):
    return ("".join(SENTENCES) * (length // 300 + 1))[:length - 1] + "."


def matches(pattern, where, seed=0, count=5):
    """What a search prints."""
    pattern = " ".join(pattern.lower().split())
    return "\n".join(
        "%s/%s_%s.py:%d:    %s = %s  # %s"
        % (where, WORDS[(i + seed) % 16], WORDS[(i * 5 + 1) % 16],
           12 + 17 * i + seed, WORDS[i % 16], pattern, WORDS[(i * 3) % 16])
        for i in range(count))


def failing(test, why, seconds="0.31"):
    """What a failing test run prints."""
    return (
        "============ FAILURES ============\n____ %s ____\n    def %s():\n"
        ">       assert run() == expected\n"
        "E       %s\n1 failed, 23 passed in %ss" % (test, test, why, seconds))


def tokens_of(text):
    return len(text) * 2 // 7  # 3.5 characters per token


class Recorder:
    """The books of one session. Subclasses write lines; ``files`` maps paths in the case to lists
    of lines."""

    count, batch, brief, parallel = 0, None, False, True

    def __init__(self, name, task="", project=None, start=None):
        number = Recorder.count = Recorder.count + 1
        self.name, self.task, self.serial = name, task, 0
        self.cwd = "/home/dev/" + (project or PROJECTS[number % len(PROJECTS)])
        self.now = (
            start or datetime(2026, 2, 2, 8, 30) + timedelta(hours=7 * number, minutes=13 * number))
        self.files, self.versions, self.always = {}, {}, []
        self.usage = {"uncached_input": 0, "cache_write": 0, "cache_read": 0, "output": 0,
                      "model_calls": 0}
        self.context, self.entering, self.back, self.expired = PREFIX, SYSTEM, 0, False
        self.sid = self.uid()
        self.open()
        if task:
            self.ask(task)

    def uid(self):
        self.serial += 1
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "sample/%s/%d" % (self.name, self.serial)))

    def key(self, prefix, length=22):
        return prefix + hashlib.sha1(self.uid().encode()).hexdigest()[:length]

    def stamp(self, seconds=0):
        self.now += timedelta(seconds=seconds, milliseconds=7)
        return self.now.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"

    def wait(self, minutes):
        self.now += timedelta(minutes=minutes)

    def charge(self, output, visible, uncached=None):
        """Book one call; returns its cache read and fresh tokens (the growth, unless the cache
        expired)."""
        read = PREFIX if self.expired else self.context
        self.context += self.back + self.entering
        fresh = self.context - read
        plain = fresh if uncached is None else uncached
        for key, amount in (("uncached_input", plain), ("cache_write", fresh - plain),
                            ("cache_read", read), ("output", output), ("model_calls", 1)):
            self.usage[key] += amount
        self.back, self.entering, self.expired = visible, 0, False
        return read, fresh

    def visible(self, text, tools):
        """The share of an output that enters the context again: 4 characters of text or input per
        token."""
        return len(text) // 4 + sum(len(self.typed(tool)) // 4 for tool in tools)

    def typed(self, tool):
        return json.dumps(tool.input)

    def use(self, name, arguments, result, tokens=None, text="", **more):
        """One call with one tool; returns the tokens of the result and those of the call."""
        tool = Tool(name, arguments, result,
                    tokens_of(result) if tokens is None else tokens, **more)
        if self.batch is None:
            self.turn(tool, text=text)
        else:
            self.batch.append(tool)
        return Cost(tool.tokens, len(self.typed(tool)) // 4)

    def say(self, text, even=1, thought=0, **more):
        """A closing answer; ``even`` pads its output until input + output of the session divide by
        it."""
        output = len(text) // 4 + thought
        total = (sum(self.usage[k]
                     for k in ("uncached_input", "cache_write", "output")) + self.back
                 + self.entering)
        self.turn(text=text, output=output + -(total + output) % even, thought=thought, **more)

    def fail(self, name, arguments, message):
        return self.use(name, arguments, message, error=True)

    def source(self, path, lines, first=1):
        return code(path, first, first + lines - 1, self.versions.get(path, 0))

    def change(self, path):
        """The file changes by other means than the agent's own edit."""
        self.versions[path] = self.versions.get(path, 0) + 1
        return "REVISION = %d" % (self.versions[path] - 1), "REVISION = %d" % self.versions[path]

    def cat(self, command, path, lines=10, first=1):
        return self.run(command, "\n".join(self.source(path, lines, first)))

    def browse(self, count, lines=10):
        """Ordinary work that is nobody's waste: files never seen before, in one response where
        ``parallel``."""
        self.batch, self.brief = [] if self.parallel else None, True
        for _ in range(count):
            self.serial += 1
            self.read(
                "src/%s/%s.py"
                % (WORDS[self.serial % 16], WORDS[self.serial * 7 % 16] + str(self.serial)),
                lines)
        tools, self.batch, self.brief = self.batch, None, False
        if tools:
            self.turn(*tools)


class Claude(Recorder):
    agent, folder, model, version = "claude-code", "claude-code", "claude-opus-4-6", "2.1.208"
    agent_id, layout, prompt_of_agent, parallel = "", "", "", False

    def open(self):
        self.slug = self.cwd.replace("/", "-")
        self.last = None
        self.lines = self.files.setdefault("%s/%s.jsonl" % (self.slug, self.sid), [])

    def add(self, kind, **fields):
        line = {
            "parentUuid": self.last, "isSidechain": bool(self.agent_id), "userType": "external",
            "cwd": self.cwd, "sessionId": self.sid, "version": self.version,
            "gitBranch": "main", "type": kind
        }
        if self.agent_id and self.layout != "inline":
            line["agentId"] = self.agent_id
        line.update(fields, uuid=self.uid(), timestamp=self.stamp(1))
        self.last = line["uuid"]
        if self.layout == "progress":
            inner = {k: line[k]
                     for k in ("type", "message", "requestId", "uuid", "timestamp") if k in line}
            line = dict(line,
                        type="progress",
                        isSidechain=False,
                        data={
                            "message": inner, "type": "agent_progress",
                            "prompt": self.prompt_of_agent, "agentId": self.agent_id
                        })
            for key in ("message", "requestId", "agentId", "toolUseResult"):
                line.pop(key, None)
        self.lines.append(line)
        return line

    def ask(self, text):
        self.entering += tokens_of(text)
        self.add("user", message={"role": "user", "content": text})

    def turn(self, *tools, text="", think=None, output=None, interleave=False,
             final=True, thought=0):
        """One response; ``think`` is its visible thinking, ``final`` False leaves out the last
        stop_reason."""
        visible = self.visible(text, tools)
        output = visible + thought if output is None else output
        read, fresh = self.charge(output, visible, uncached=3)
        usage = {
            "input_tokens": 3, "cache_creation_input_tokens": fresh - 3,
            "cache_read_input_tokens": read, "output_tokens": output, "cache_creation": {
                "ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": fresh - 3}
        }
        blocks = ([] if think is None else
                  [{"type": "thinking", "thinking": think, "signature": self.key("Eu")}])
        blocks += [{"type": "text", "text": text}] if text else []
        calls = [{"type": "tool_use", "id": self.key("toolu_01"), "name": t.name, "input": t.input}
                 for t in tools]
        envelope = {"model": self.model, "id": self.key("msg_01"), "type": "message",
                    "role": "assistant"}
        request = self.key("req_011")
        self.stamp(3)
        results = []
        for number, block in enumerate(blocks + calls):
            last = final and number == len(blocks + calls) - 1
            self.add("assistant",
                     requestId=request,
                     message=dict(
                         envelope,
                         content=[block],
                         stop_sequence=None,
                         stop_reason=("tool_use" if tools else "end_turn") if last else None,
                         usage=usage if last or not final
                         else dict(usage, output_tokens=min(8, output))))
            if block in calls:
                results.append((block, tools[calls.index(block)]))
                if interleave or last or (not final and len(results) == len(tools)):
                    for item in results:
                        self.result(*item)
                    results = []

    def result(self, call, tool):
        block = {"tool_use_id": call["id"], "type": "tool_result", "content": tool.result}
        if tool.error or tool.name == "Bash":
            block["is_error"] = tool.error
        extra = "Error: " + tool.result if tool.error else tool.extra
        if tool.result.startswith("The user doesn't want"):
            extra = "User rejected tool use"
        if tool.name == "Bash" and not tool.error:
            extra = dict(
                {"stdout": tool.result, "stderr": "", "interrupted": False, "isImage": False},
                **extra or {})
        self.entering += tool.tokens
        more = {"toolUseResult": extra} if extra else {}
        self.add("user", message={"role": "user", "content": [block]}, **more)

    def path(self, path):
        return path if path.startswith("/") else self.cwd + "/" + path

    def read(self, path, lines=10, first=None, total=None, tokens=None, text=""):
        """14 tokens a line, so that a range costs its share of the file."""
        source = self.source(path, lines, first or 1)
        shown = "\n".join("%6d\u2192%s" % (n, line) for n, line in enumerate(source, first or 1))
        where = {"file_path": self.path(path)}
        extra = {
            "type": "text", "file": {
                "filePath": self.path(path), "content": "\n".join(source), "numLines": lines,
                "startLine": first or 1, "totalLines": total or lines
            }
        }
        return self.use("Read",
                        dict(where, offset=first, limit=lines) if first else where,
                        shown,
                        14 * lines if tokens is None else tokens,
                        text,
                        extra=None if self.brief or lines > 99 else extra)

    def run(self, command, output="", code=0, extra=None, text=""):
        shown = "Exit code %d\n%s" % (code, output) if code else output
        return self.use("Bash", {"command": command, "description": "Run it in the project"},
                        shown,
                        text=text,
                        extra=extra,
                        error=bool(code))

    def search(self, pattern, where="src", seed=0, count=5, text=""):
        found = matches(pattern, where, seed, count)
        return self.use("Grep",
                        {"pattern": pattern, "path": self.path(where),
                         "output_mode": "content", "-n": True},
                        found,
                        text=text,
                        extra={
                            "mode": "content", "numFiles": 0, "filenames": [], "content": found,
                            "numLines": found.count("\n") + 1
                        })

    def edit(self, path, text=""):
        old, new = self.change(path)
        where = {"filePath": self.path(path), "oldString": old, "newString": new}
        return self.use(
            "Edit", {"file_path": self.path(path), "old_string": old, "new_string": new},
            "The file %s has been updated successfully." % self.path(path),
            text=text,
            extra=dict(where, structuredPatch=[], userModified=False, replaceAll=False))

    def compact(self, summary, call=False):
        if call:  # the call that wrote the summary, in a file of its own
            helper = self.helper("acompact-" + self.key("", 6), "subagents")
            helper.context, helper.entering = self.context, self.back + self.entering
            helper.ask("Your task is to create a detailed summary of the conversation so far.")
            helper.say(summary)
        before, self.last = self.last, None
        self.add("system",
                 subtype="compact_boundary",
                 content="Conversation compacted",
                 isMeta=False,
                 level="info",
                 logicalParentUuid=before,
                 compactMetadata={"trigger": "manual", "preTokens": self.context})
        self.context, self.back, self.entering = PREFIX, 0, SYSTEM + tokens_of(summary)
        self.add("user",
                 message={
                     "role": "user",
                     "content": "This session is being continued from a previous conversation. "
                     + summary
                 },
                 isVisibleInTranscriptOnly=True,
                 isCompactSummary=True)

    def helper(self, agent_id, layout):
        child = copy.copy(self)
        child.agent_id, child.layout, child.last = agent_id, layout, None
        child.name, child.context, child.entering, child.back = self.name + agent_id, 4096, 2048, 0
        place = {
            "subagents": "%s/%s/subagents/agent-%s.jsonl" % (self.slug, self.sid, agent_id),
            "beside": "%s/agent-%s.jsonl" % (self.slug, agent_id)
        }.get(layout)
        child.lines = self.files.setdefault(place, []) if place else self.lines
        return child

    def delegate(self, prompt, work, layout="subagents"):
        """Delegate to a sub-agent; ``work(child)`` is what it does in its own window."""
        name = "Agent" if layout == "subagents" else "Task"
        arguments = {"description": "Look around", "prompt": prompt, "subagent_type": "Explore"}
        child = self.helper(self.key("a", 7), layout)
        child.prompt_of_agent, main = prompt, self.lines
        self.lines = []  # the result is written after the sub-agent's own lines
        answer = "The module rounds once per line; src/cart.py is the place to change."
        report = {
            "status": "completed", "prompt": prompt, "agentId": child.agent_id,
            "totalToolUseCount": 2, "content": [{"type": "text", "text": answer}],
            "totalDurationMs": 41000, "totalTokens": 7300
        }
        self.use(name, arguments, answer, extra=report)
        call, result = self.lines
        main.append(call)
        child.now = self.now
        child.ask(prompt)
        work(child)
        child.say(answer)
        self.now = child.now
        result["timestamp"] = self.stamp(1)
        main.append(result)
        self.lines = main

    def fork(self, mark="+"):
        """Another session that begins with a copy of this one's history (a resume, a branch)."""
        other = copy.copy(self)
        other.name, other.versions = self.name + mark, dict(self.versions)
        other.sid = other.uid()
        other.lines = self.files["%s/%s.jsonl" % (self.slug, other.sid)] = [
            dict(line, sessionId=other.sid) for line in self.lines
        ]
        return other


class Codex(Recorder):
    agent, folder, model, repeat = "codex", "codex", "gpt-5.1-codex", False

    def open(self):
        name = "rollout-%s-%s.jsonl" % (self.now.strftime("%Y-%m-%dT%H-%M-%S"), self.sid)
        self.lines = self.files.setdefault(name, [])
        self.totals = dict.fromkeys(("input_tokens", "cached_input_tokens", "output_tokens",
                                     "reasoning_output_tokens", "total_tokens"), 0)
        self.meta = self.add("session_meta",
                             id=self.sid,
                             timestamp=self.stamp(),
                             cwd=self.cwd,
                             originator="codex_cli_rs",
                             cli_version="0.98.0",
                             source="cli",
                             model_provider="openai",
                             git={"branch": "main"})

    def add(self, kind, payload_type=None, **payload):
        if payload_type:
            payload = dict({"type": payload_type}, **payload)
        self.lines.append({"timestamp": self.stamp(), "type": kind, "payload": payload})
        return self.lines[-1]

    def ask(self, text):
        self.entering += tokens_of(text)
        turn = self.uid()
        self.add("event_msg", "task_started", turn_id=turn, model_context_window=272000)
        self.add("turn_context",
                 turn_id=turn,
                 cwd=self.cwd,
                 approval_policy="never",
                 model=self.model,
                 effort="medium",
                 sandbox_policy={"type": "danger-full-access"},
                 summary="auto")
        self.add("response_item", "message", role="user",
                 content=[{"type": "input_text", "text": text}])
        self.add("event_msg", "user_message", message=text, images=[])

    def typed(self, tool):
        return tool.input if isinstance(tool.input, str) else json.dumps(tool.input)

    def turn(self, *tools, text="", output=None, thought=0):
        visible = self.visible(text, tools)
        output = visible + thought if output is None else output
        read, fresh = self.charge(output, visible)
        self.stamp(4)
        if thought:
            self.add("response_item",
                     "reasoning",
                     summary=[],
                     content=None,
                     encrypted_content=self.key("gAAAA", 40))
        if text:
            self.add("event_msg", "agent_message", message=text)
            self.add("response_item",
                     "message",
                     role="assistant",
                     content=[{"type": "output_text", "text": text}])
        ids = [self.key("call_") for _ in tools]
        for call, tool in zip(ids, tools):
            if tool.name == "apply_patch":
                self.add("response_item",
                         "custom_tool_call",
                         status="completed",
                         call_id=call,
                         name=tool.name,
                         input=tool.input)
            else:
                self.add("response_item",
                         "function_call",
                         name=tool.name,
                         arguments=self.typed(tool),
                         call_id=call)
        for call, tool in zip(ids, tools):
            kind = ("custom_tool_call_output" if tool.name == "apply_patch"
                    else "function_call_output")
            self.stamp(1)
            self.add("response_item", kind, call_id=call, output=tool.result)
            self.entering += tool.tokens
        last = dict(zip(self.totals, (read + fresh, read, output, thought, read + fresh + output)))
        self.totals = {key: value + last[key] for key, value in self.totals.items()}
        info = {"total_token_usage": self.totals, "last_token_usage": last,
                "model_context_window": 272000}
        for _ in range(2 if self.repeat else 1):
            self.add("event_msg", "token_count", info=info, rate_limits=None)
        if self.repeat:
            self.add("event_msg", "token_count", info=None,
                     rate_limits={"primary": {"used_percent": 7.0}})

    def run(self, command, output="", code=0, text="", original=None, limit=None, tokens=None):
        shown = (
            "Chunk ID: %s\nWall time: 0.0512 seconds\nProcess exited with code %d\n"
            "Original token count: %d\n"
            "Output:\n%s" % (self.key("", 6), code, original or tokens_of(output), output))
        arguments = {"cmd": command, "workdir": self.cwd, "yield_time_ms": 10000}
        return self.use("exec_command",
                        dict(arguments, max_output_tokens=limit) if limit else arguments,
                        shown, tokens, text)

    def read(self, path, lines=10, first=None, text=""):
        command = ("sed -n '%d,%dp' %s" % (first, first + lines - 1, path) if first
                   else "cat " + path)
        return self.run(command, "\n".join(self.source(path, lines, first or 1)), text=text)

    def search(self, pattern, where="src", seed=0, text=""):
        return self.run(
            "rg -n '%s' %s" % (pattern, where), matches(pattern, where, seed), text=text)

    def edit(self, path, text=""):
        patch = "*** Begin Patch\n*** Update File: %s\n@@\n-%s\n+%s\n*** End Patch" % (
            (path, ) + self.change(path))
        done = (
            "Exit code: 0\nWall time: 0.1 seconds\nOutput:\n"
            "Success. Updated the following files:\nM %s\n" %
            path)
        return self.use("apply_patch", patch, done, text=text)


class Gemini(Recorder):
    agent, folder, model, jsonl = "gemini-cli", "gemini", "gemini-3.1-pro-preview", False

    def open(self):
        self.began, self.messages = self.stamp(), []
        self.file = "session-%s-%s" % (self.now.strftime("%Y-%m-%dT%H-%M"), self.sid[:8])
        self.head = {
            "sessionId": self.sid, "projectHash": hashlib.sha256(self.cwd.encode()).hexdigest(),
            "startTime": self.began, "lastUpdated": self.began, "kind": "main"
        }
        if self.jsonl:
            self.files[self.file + ".jsonl"] = self.messages
            self.messages.append(self.head)
        else:
            self.files[self.file + ".json"] = dict(self.head, messages=self.messages)

    def add(self, kind, **fields):
        stamp = self.stamp()
        if not self.jsonl:
            self.files[self.file + ".json"]["lastUpdated"] = stamp
        self.messages.append(dict({"id": self.uid(), "timestamp": stamp, "type": kind}, **fields))
        return self.messages[-1]

    def ask(self, text):
        self.entering += tokens_of(text)
        self.stamp(2)
        self.add("user", content=[{"text": text}] if self.jsonl else text)

    def turn(self, *tools, text="", output=None, thought=0):
        visible = self.visible(text, tools)
        output = (visible + thought if output is None else output) - thought
        read, fresh = self.charge(output + thought, visible)
        self.stamp(5)
        message = self.add(
            "gemini",
            content=text,
            model=self.model,
            tokens={
                "input": read + fresh, "output": output, "cached": read, "thoughts": thought,
                "tool": 0, "total": read + fresh + output + thought
            },
            thoughts=[{
                "subject": "Planning the next step", "description": prose(90),
                "timestamp": self.stamp()
            }] if thought else [])
        calls = []
        for tool in tools:
            ident = "%s-%s" % (tool.name, self.key("17", 22))
            answer = {"error": tool.result} if tool.error else {"output": tool.result}
            calls.append({
                "id": ident, "name": tool.name, "args": tool.input,
                "result": [{"functionResponse": {"id": ident, "name": tool.name,
                                                 "response": answer}}],
                "status": "error" if tool.error else "success", "timestamp": self.stamp(1)
            })
            self.entering += tool.tokens
        if calls and self.jsonl:  # written again, under the same id, when its tools are done
            self.messages.append({"$set": {"lastUpdated": self.stamp()}})
            self.messages.append(dict(message, toolCalls=calls))
        elif calls:
            message["toolCalls"] = calls

    def read(self, path, lines=10, first=None, text="", tokens=None):
        where = ({"file_path": path}
                 if first is None else {"file_path": path, "offset": first - 1, "limit": lines})
        return self.use("read_file", where,
                        "\n".join(self.source(path, lines, first or 1)), tokens, text)

    def run(self, command, output="", code=0, text=""):
        shown = (
            "Command: %s\nDirectory: (root)\nOutput: %s\nError: (none)\nExit Code: %d\nSignal: 0\n"
            "Background PIDs: (none)\nProcess Group PGID: %d")
        shown %= (command, output or "(empty)", code, 63000 + self.serial)
        return self.use(
            "run_shell_command", {"command": command, "description": "Run it."}, shown, text=text)

    def search(self, pattern, where="src", seed=0, text=""):
        return self.use("search_file_content", {"pattern": pattern, "dir_path": where},
                        matches(pattern, where, seed),
                        text=text)

    def edit(self, path, text=""):
        old, new = self.change(path)
        return self.use("replace", {"file_path": path, "old_string": old, "new_string": new},
                        "Successfully modified file: %s/%s (1 replacements)." % (self.cwd, path),
                        text=text)


class OpenCode(Recorder):
    """Sessions as ``opencode export`` gives them: {"info": ..., "messages":
    [{"info", "parts"}]}."""
    agent, folder, model, version = "opencode", "opencode", "gpt-5.2", "1.2.10"
    parent = None

    def open(self):
        self.sid = self.key("ses_", 24)
        self.head = {"id": self.sid, "slug": "quiet-otter", "projectID": self.key("", 40),
                     "directory": self.cwd, "title": self.task or "A helper's work",
                     "version": self.version,
                     "time": {"created": self.clock(), "updated": self.clock()}}
        if self.parent:
            self.head["parentID"] = self.parent
        self.messages = []
        self.files[self.sid + ".json"] = {"info": self.head, "messages": self.messages}

    def clock(self, seconds=0):
        self.stamp(seconds)
        return int((self.now - datetime(1970, 1, 1)).total_seconds() * 1000)

    def part(self, message, kind, **fields):
        message["parts"].append(dict({"id": self.key("prt_"), "sessionID": self.sid,
                                      "messageID": message["info"]["id"], "type": kind}, **fields))
        return message["parts"][-1]

    def add(self, role, **fields):
        self.head["time"]["updated"] = self.clock()
        info = dict({"id": self.key("msg_"), "sessionID": self.sid, "role": role,
                     "time": {"created": self.clock()}}, **fields)
        self.messages.append({"info": info, "parts": []})
        return self.messages[-1]

    def ask(self, text):
        self.entering += tokens_of(text)
        message = self.add(
            "user", agent="build", model={"providerID": "openai", "modelID": self.model})
        self.part(message, "text", text=text)

    def turn(self, *tools, text="", output=None, thought=0, summary=False):
        visible = self.visible(text, tools)
        output = visible + thought if output is None else output
        read, fresh = self.charge(output, visible)
        tokens = {"total": read + fresh + output, "input": fresh, "output": output,
                  "reasoning": thought, "cache": {"read": read, "write": 0}}
        message = self.add(
            "assistant", modelID=self.model, providerID="openai", mode="build", cost=0,
            path={"cwd": self.cwd, "root": self.cwd}, tokens=tokens,
            finish="tool-calls" if tools else "stop", **({"summary": True} if summary else {}))
        self.part(message, "step-start")
        if text:
            self.part(message, "text", text=text)
        for tool in tools:
            state = {"status": "error" if tool.error else "completed", "input": tool.input,
                     "error" if tool.error else "output": tool.result,
                     "metadata": dict({"truncated": False}, **(tool.extra or {})),
                     "time": {"start": self.clock(), "end": self.clock(1)}}
            self.part(message, "tool", callID=self.key("call_"), tool=tool.name, state=state)
            self.entering += tool.tokens
        self.part(message, "step-finish", reason="stop", cost=0, tokens=tokens)
        message["info"]["time"]["completed"] = self.clock()

    def path(self, path):
        return self.cwd + "/" + path

    def read(self, path, lines=10, first=None, text="", tokens=None):
        where = {"filePath": self.path(path)}
        if first is not None:
            where.update(offset=first, limit=lines)
        numbered = ["%05d| %s" % (number, line) for number, line in
                    enumerate(self.source(path, lines, first or 1), first or 1)]
        return self.use("read", where, "<file>\n%s\n\n(End of file - total %d lines)\n</file>" % (
            "\n".join(numbered), lines), tokens, text)

    def run(self, command, output="", code=0, text=""):
        return self.use("bash", {"command": command, "description": "Run it"}, output, text=text,
                        extra={"exit": code, "description": "Run it"})

    def search(self, pattern, where="src", seed=0, text=""):
        return self.use("grep", {"pattern": pattern, "path": self.path(where)},
                        matches(pattern, where, seed), text=text)

    def edit(self, path, text=""):
        old, new = self.change(path)
        return self.use("edit", {"filePath": self.path(path), "oldString": old, "newString": new},
                        "Edit applied successfully.", text=text)

    def compact(self, summary):
        """The user asks for a summary, which replaces the context."""
        self.part(self.add("user"), "compaction", auto=False)
        self.turn(text=summary, summary=True)
        self.context, self.entering, self.back = PREFIX, SYSTEM + tokens_of(summary), 0

    def helper(self, task, story):
        """A sub-agent: a session of its own, whose parent is this one."""
        kind = type("Helper", (OpenCode,), {"parent": self.sid})
        child = kind(self.name + "-helper", task, self.cwd.rsplit("/", 1)[1], self.now)
        story(child)
        self.files.update(child.files)
        for name, amount in child.usage.items():
            self.usage[name] += amount
        self.now = child.now
        return self.use("task", {"description": task, "prompt": task, "subagent_type": "general"},
                        "It is done.", extra={"sessionId": child.sid})
