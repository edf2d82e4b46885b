"""What a crew's work cost and what came of it, per task, agent and merged line, and files that
several agents read."""
from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import Any, Dict, List, Optional, Set, Tuple

from sessionoptimizer import EventType, Session, SessionOptimizer, plain

from .bus import Bus, TaskState
from .repository import Repository

Row = Dict[str, Any]


def sessions_of(
        optimizer: SessionOptimizer, crew: str, ledger: str = "") -> List[Tuple[Session, Row]]:
    """The sessions of a crew with their metadata, by ``collab_id`` or, where a scan of the
    transcript has replaced the session since, by the crew's ledger; oldest first."""
    noted = {}
    if os.path.exists(ledger):
        with open(ledger, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # the last one may be torn
                    entry = json.loads(line)
                    noted[entry["id"]] = entry["metadata"]
    found = [(session, session.metadata if session.metadata.get("collab_id") == crew
              else noted.get(session.id))
             for session in reversed(optimizer.list_sessions(limit=10 ** 9))]
    return [(session, metadata) for session, metadata in found if metadata is not None]


def empty_row(**names: Any) -> Row:
    """A row of figures to add to. ``cost`` is USD at API prices."""
    return dict(names, sessions=0, tokens=0, cost=0.0, waste_tokens=0, added=0, deleted=0)


def add_session(rows: List[Row], session: Session, waste: int) -> None:
    """Add a session's figures to rows."""
    for row in rows:
        row["sessions"] += 1
        row["tokens"] += session.total_tokens
        row["cost"] += session.estimated_cost
        row["waste_tokens"] += waste


def outcome_of(state: TaskState) -> str:
    """What became of a task: merged, unchanged, conflict, protected, tests, ...; its status while
    it is under way."""
    if state.status == "DONE":
        return str((state.result or {}).get("outcome", "done"))
    return state.error.split(":")[0] if state.status == "FAILED" else state.status.lower()


def crew_report(bus: Bus, repository: Repository, optimizer: SessionOptimizer) -> Row:
    """``tasks``, ``agents`` (by worker), ``totals`` and ``shared_files`` {path: workers that read
    it}. The sums over tasks and over agents are the totals, and those are what ``stats`` counts of
    these sessions."""
    tasks = {state.task.id: task_row(state) for state in bus.tasks()}
    agents: Dict[str, Row] = {}
    totals, readers = empty_row(), defaultdict(set)
    for session, metadata in sessions_of(optimizer, repository.crew,
                                         os.path.join(repository.state, "sessions.jsonl")):
        task = tasks.setdefault(metadata["task_id"],
                                empty_row(id=metadata["task_id"], outcome="unknown"))
        worker = agents.setdefault(metadata["crew_agent"], empty_row(agent=metadata["crew_agent"]))
        report = optimizer.analyze(session.id)
        add_session([task, worker, totals], session, report.total_waste_tokens if report else 0)
        for path in files_read(session, metadata.get("worktree", "")):
            readers[path].add(metadata["crew_agent"])
    for row in tasks.values():
        worker = (agents.setdefault(row["agent"], empty_row(agent=row["agent"])) if row.get("agent")
                  else empty_row())
        for name in ("added", "deleted"):
            totals[name] += row[name]
            worker[name] += row[name]
    for row in [*tasks.values(), *agents.values(), totals]:
        row["cost_per_line"] = cost_per_line(row)
    return {"name": repository.crew, "branch": repository.into, "tasks": list(tasks.values()),
            "agents": [agents[name] for name in sorted(agents)], "totals": totals,
            "shared_files": {path: sorted(names) for path, names in sorted(readers.items())
                             if len(names) > 1}}


def task_row(state: TaskState) -> Row:
    """A task's row before its sessions are added."""
    result = state.result if isinstance(state.result, dict) else {}
    row = empty_row(id=state.task.id, title=state.task.title, status=state.status,
                    outcome=outcome_of(state), agent=state.agent, attempts=state.attempts,
                    error=state.error if state.status == "FAILED" else "",
                    commit=result.get("commit", ""), files=result.get("files", []))
    row.update(added=result.get("added", 0), deleted=result.get("deleted", 0))
    return row


def cost_per_line(row: Row) -> Optional[float]:
    """USD per line added or deleted on the branch; None where nothing was merged or no usage is
    known."""
    lines = row["added"] + row["deleted"]
    return row["cost"] / lines if lines and row["tokens"] else None


def files_read(session: Session, worktree: str) -> Set[str]:
    """The files a session read, relative to its worktree."""
    paths = {str(event.data.get("file_path") or "") for event in session.events
             if event.event_type is EventType.FILE_READ}
    return {os.path.relpath(path, worktree) if worktree and path.startswith(worktree + os.sep)
            else path for path in paths if path}


def money(amount: Optional[float], tokens: int = 1) -> str:
    """USD; a dash where it is not known."""
    return f"${amount:.4f}" if amount is not None and tokens else "–"


def report_text(report: Row) -> str:
    """The report for people."""
    lines = [f"Crew {report['name']}, branch {report['branch']}", "",
             (f"{'task':<20} {'outcome':<11} {'agent':<12} {'tries':>5} {'tokens':>10} "
              f"{'cost':>10} {'lines':>11} {'per line':>9}")]
    lines += [row_text(row) for row in report["tasks"]]
    lines.append("")
    for row in [*report["agents"], dict(report["totals"], agent="together")]:
        word = "session " if row["sessions"] == 1 else "sessions"
        lines.append(
            f"{plain(row['agent'], 20):<20} {row['sessions']:>3} {word} {row['tokens']:>10,} "
            f"tokens {money(row['cost'], row['tokens'])}, +{row['added']} -{row['deleted']} lines, "
            f"{money(row['cost_per_line'])} per line")
    if report["shared_files"]:
        lines += ["", "Read by more than one agent (a better hand-over could save it):"]
        lines += [f"  {plain(path)}: {', '.join(names)}"
                  for path, names in report["shared_files"].items()]
    failed = [row for row in report["tasks"] if row.get("error")]
    if failed:
        lines += ["", "Not merged:"]
        lines += [f"  {plain(row['id'])}: {plain(row['error'], 400)}" for row in failed]
    return "\n".join(lines)


def row_text(row: Row) -> str:
    """One task as a line of the table."""
    change = f"+{row['added']} -{row['deleted']}" if row.get("commit") else "–"
    return (
        f"{plain(row['id'], 20):<20} {row['outcome']:<11} {plain(row.get('agent', ''), 12):<12} "
        f"{row.get('attempts', 0):>5} {row['tokens']:>10,} {money(row['cost'], row['tokens']):>10} "
        f"{change:>11} {money(row['cost_per_line']):>9}")
