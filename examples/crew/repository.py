"""The git side of a crew: worktrees, the integration branch, and merges that happen once.

The crew moves one branch that nobody has checked out. A merge is made in the worktree and becomes
real by a compare-and-swap of that branch; its trailer ``Crew-Task`` says which task it is, so that
no task is merged twice.
"""
from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import glob
import os
import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Sequence, Tuple

from .bus import CrewError

GIT_SECONDS = 120.0
# The crew's commits are checked by its test command; a hook of the repository is not a part of
# that.
SETTINGS = ("-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", "-c", "commit.gpgSign=false", "-c",
            "core.quotePath=false")


class Conflict(Exception):
    """A merge that git could not make: ``files``, and the ``tasks`` that were merged there
    meanwhile."""

    def __init__(self, files: List[str], tasks: List[str]):
        super().__init__(f"conflict in {', '.join(files)}"
                         + (f" with {', '.join(tasks)}" if tasks else ""))
        self.files, self.tasks = files, tasks


@dataclass
class Merge:
    """A task's merge commit: lines added and deleted (a binary file counts none), and the files."""

    commit: str
    added: int = 0
    deleted: int = 0
    files: List[str] = field(default_factory=list)


def safe_name(text: str) -> str:
    """The text as a part of a branch's and a directory's name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:50]
    return (plain if plain and plain == text
            else f"{plain}-{zlib.crc32(text.encode()):08x}".strip("-"))


class Repository:
    """The repository that holds ``path``; ``into`` is the branch the crew moves. CrewError where
    that cannot be."""

    def __init__(self, path: str, crew: str, into: str = ""):
        self.top = os.path.realpath(path)
        try:
            self.common = os.path.realpath(
                os.path.join(self.top, self.git("rev-parse", "--git-common-dir")))
        except (CrewError, OSError) as error:
            raise CrewError(f"{path} is in no git repository") from error
        self.crew, self.into = safe_name(crew), into or f"crew/{safe_name(crew)}"
        self.reference, self.base = f"refs/heads/{self.into}", f"refs/crew-base/{self.crew}"
        self.state = os.path.join(self.common, "crew", self.crew)
        # beside the repository: agents take what is below .git for something they must not touch
        self.worktrees = os.path.join(f"{self._main()}.crew", self.crew)
        for folder in ("attempts", "slots"):
            os.makedirs(os.path.join(self.state, folder), mode=0o700, exist_ok=True)

    def _main(self) -> str:
        """The main worktree, or the repository itself where it has none."""
        return (os.path.dirname(self.common) if os.path.basename(self.common) == ".git"
                else self.common)

    def git(self, *arguments: str, cwd: str = "", status: Sequence[int] = (0,),
            held: Tuple[int, ...] = (),
            environment: Dict[str, str] = {}) -> str:  # noqa: B006 (read only)
        """What git prints, without the newline at its end; CrewError with git's words for another
        status.

        ``held``: locks that stay held while git runs, though this process be killed."""
        known = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
        try:
            done = subprocess.run(
                ["git", *SETTINGS, *arguments], cwd=cwd or self.top, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=GIT_SECONDS, pass_fds=held,
                env={**known, "LC_ALL": "C", **environment})
        except subprocess.TimeoutExpired as error:
            raise CrewError(f"git {arguments[0]} took more than {GIT_SECONDS:g} s") from error
        if done.returncode not in status:
            words = (done.stderr.decode(errors="replace").strip()
                     or done.stdout.decode(errors="replace").strip())
            raise CrewError(f"git {arguments[0]}: {words[-500:]}")
        return done.stdout.decode(errors="replace").rstrip("\n")

    def prepare(self) -> str:
        """Make the branch at HEAD where there is none, and return its tip; CrewError when somebody
        has it checked out."""
        with self.lock() as held:
            if not self.git("rev-parse", "-q", "--verify", self.reference, status=(0, 1)):
                self.git("update-ref", self.reference,
                         self.git("rev-parse", "--verify", "HEAD^{commit}"), held=held)
            if not self.git("rev-parse", "-q", "--verify", self.base, status=(0, 1)):
                self.git("update-ref", self.base, self.reference, held=held)
        for entry in self.git("worktree", "list", "--porcelain").split("\n\n"):
            if f"branch {self.reference}" in entry.split("\n"):
                raise CrewError(
                    f"{self.into} is checked out in {entry.split()[1]}: choose another with --into")
        return self.tip()

    def tip(self) -> str:
        """The commit the integration branch stands at."""
        return self.git("rev-parse", "--verify", f"{self.reference}^{{commit}}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[Tuple[int, ...]]:
        """Hold the crew's lock on the branch; what is yielded goes to ``git(held=...)``."""
        file = os.open(os.path.join(self.state, "merge.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # left by a git that was killed: nobody else is here now
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.common, *self.reference.split("/")) + ".lock")
            yield (file,)
        finally:
            os.close(file)

    def path_of(self, task: str, attempt: int) -> str:
        """Where the worktree of an attempt is."""
        return os.path.join(self.worktrees, f"{safe_name(task)}@{attempt}")

    def add_worktree(self, task: str, attempt: int) -> Tuple[str, str]:
        """A worktree of its own for an attempt at the branch's tip: its path and the commit it
        starts from."""
        path, tip = self.path_of(task, attempt), self.tip()
        os.makedirs(self.worktrees, mode=0o700, exist_ok=True)
        self.git("worktree", "add", "--detach", path, tip)
        return path, tip

    def remove_worktree(self, path: str) -> None:
        """Remove a worktree, one that was left half made too."""
        self.git("worktree", "unlock", path, status=(0, 128))  # git locks it while making it
        shutil.rmtree(path, ignore_errors=True)
        self.git("worktree", "prune", "--expire", "now")

    def worktrees_of(self, task: str) -> List[str]:
        """The worktrees that are left of all attempts at a task."""
        return [path for path in self.all_worktrees()
                if os.path.basename(path).rpartition("@")[0] == safe_name(task)]

    def all_worktrees(self) -> List[str]:
        """The crew's worktrees that are there."""
        return sorted(glob.glob(os.path.join(glob.escape(self.worktrees), "*@*")))

    def tidy(self) -> None:
        """Remove the folders of the worktrees where they are empty."""
        for folder in (self.worktrees, os.path.dirname(self.worktrees)):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def commit_all(self, path: str, title: str, agent: str) -> str:
        """Commit whatever the agent left uncommitted; the commit the worktree stands at then."""
        self.git("add", "-A", cwd=path)
        if self.git("status", "--porcelain", cwd=path):
            self.git("commit", "-q", "-m", title, cwd=path, environment=self._identity(agent))
        return self.git("rev-parse", "HEAD", cwd=path)

    def _identity(self, agent: str) -> Dict[str, str]:
        """The agent as author; as committer whom the repository names, else the agent."""
        names = {"GIT_AUTHOR_NAME": agent, "GIT_AUTHOR_EMAIL": f"{safe_name(agent)}@crew.invalid"}
        if not self.git("config", "user.email", status=(0, 1)):
            names.update(GIT_COMMITTER_NAME=agent, GIT_COMMITTER_EMAIL=names["GIT_AUTHOR_EMAIL"])
        return names

    def changed(self, base: str, head: str) -> List[str]:
        """The paths in which two commits differ; a renamed file is two of them."""
        return [name for name in self.git("diff", "--name-only", "--no-renames", "-z", base,
                                          head).split("\0") if name]

    def refused(self, base: str, head: str, protected: Sequence[str],
                forbidden: Sequence[str]) -> List[str]:
        """What must not be merged, in words: changed paths that match a protected pattern (``*``
        also matches ``/``), and added lines that match a forbidden regular expression."""
        found = [f"{name} is protected by {pattern}" for name in self.changed(base, head)
                 for pattern in protected if fnmatch.fnmatchcase(name, pattern)
                 or fnmatch.fnmatchcase(os.path.basename(name), pattern)]
        expressions = [re.compile(text) for text in forbidden]
        if expressions:
            lines = self.git("diff", "--no-renames", "--no-color", "--no-ext-diff", "-U0", base,
                             head).split("\n")
            added = [line[1:] for line in lines
                     if line.startswith("+") and not line.startswith("+++ ")]
            found += [f"an added line matches {expression.pattern}" for expression in expressions
                      if any(expression.search(line) for line in added)]
        return found

    def is_ancestor(self, base: str, head: str) -> bool:
        """Whether ``head`` builds on ``base``."""
        return base == self.git("merge-base", base, head, status=(0, 1))

    def merged(self) -> Dict[str, str]:
        """The merge commit of every task that is on the branch."""
        log = self.git("log", "--first-parent",
                       "--format=%(trailers:key=Crew-Task,valueonly,separator=%x2C)%x09%H",
                       f"{self.base}..{self.reference}")
        rows = [line.split("\t") for line in log.split("\n") if line]
        return {task: commit for task, commit in rows if task}

    def measure(self, commit: str) -> Merge:
        """A merge commit's lines and files."""
        rows = [line.split("\t", 2) for line in
                self.git("diff", "--numstat", "--no-renames", f"{commit}^1", commit).split("\n")
                if line]
        return Merge(commit, sum(int(row[0]) for row in rows if row[0] != "-"),
                     sum(int(row[1]) for row in rows if row[1] != "-"), [row[2] for row in rows])

    def join(self, path: str, head: str, tip: str, message: str, agent: str) -> str:
        """Make the merge of ``head`` into ``tip`` in a worktree and return its commit; Conflict
        where git cannot."""
        self.git("checkout", "-q", "-f", "--detach", tip, cwd=path)
        self.git("clean", "-fdq", cwd=path)
        try:
            self.git("merge", "-q", "--no-ff", "-m", message, head, cwd=path,
                     environment=self._identity(agent))
        except CrewError:
            files = [name for name in self.git("diff", "--name-only", "--diff-filter=U", "-z",
                                               cwd=path).split("\0") if name]
            if not files:
                raise
            raise Conflict(files, self._tasks_on(files, head, tip)) from None
        return self.git("rev-parse", "HEAD", cwd=path)

    def _tasks_on(self, files: List[str], head: str, tip: str) -> List[str]:
        """The tasks whose merges touched the files since ``head`` left the branch."""
        since = set(self.git("rev-list", "--first-parent", f"{head}..{tip}").split())
        return sorted(task for task, commit in self.merged().items()
                      if commit in since and set(files) & set(self.changed(f"{commit}^1", commit)))

    def move(self, new: str, old: str, held: Tuple[int, ...]) -> None:
        """Let the branch go from ``old`` to ``new``; CrewError when it stands elsewhere."""
        self.git("update-ref", self.reference, new, old, held=held)

    def keep(self, task: str, head: str, held: Tuple[int, ...] = ()) -> str:
        """Keep a commit that was not merged under a branch of its own, whose name is returned."""
        branch = f"crew-left/{self.crew}/{safe_name(task)}"
        self.git("update-ref", f"refs/heads/{branch}", head, held=held)
        return branch
