"""What a trial and its workers tell each other; nothing here takes long to import.

Tasks, results and the word to stop go over a desk, a Ray actor that both sides know, so that either may die and be
replaced.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

RETRIES = 2  # of a task: how often its workers may be replaced. A death may be heard of a task late, hence not one

Result = dict[str, Any]


class StoppedError(Exception):
    """The trial was stopped: its workers are to leave it."""


class WorkersError(RuntimeError):
    """The workers of a trial died, or raised, more often than is retried."""


@dataclass(frozen=True)
class Task:
    """What is to be trained; plain data.

    Attributes:
        config: the full tree.
        kept: the folder of its checkpoints.
        threads: of each worker that computes on a CPU.
        tests: whether it ends with the test lists.
        checked: the digests of the corpus, if it was checked before; see `fit`.
        code: what the driver of the study runs, which is what its workers are to run; see `nodes.code`.
    """

    config: dict[str, Any]
    kept: str
    threads: int
    tests: bool
    checked: dict[str, str] | None = None
    code: dict[str, str] = field(default_factory=dict)


class Desk:
    """Where a trial lays down a task and its workers pick it up; an actor. Both sides wait here for each other.

    Everything is told by the number of the task and the epoch, so that workers who begin a task again may repeat what
    dead ones have said already.
    """

    def __init__(self) -> None:
        self._change = asyncio.Condition()
        self._number = 0  # of the task that was laid down last
        self._task: Task | None = None  # None: nothing to do
        self._deaths = 0  # how often its workers had to be replaced
        self._group = ""  # of workers, whose first has come to the desk last
        self._begun: tuple[str, int, Task] | None = None  # the group that began a task last, and that task
        self._failure = ""  # why it cannot be trained
        self._trouble = ""  # what a worker said before it gave up
        self._results: list[Result | None] = []  # not yet fetched by the trial; None: trained to the end
        self._noted = 0  # the last epoch that the trial took note of

    async def lay_down(self, task: Task) -> int:
        """A new task; returns its number."""
        async with self._change:
            self._number, self._task = self._number + 1, task
            self._deaths, self._failure, self._trouble = 0, "", ""
            self._results, self._noted = [], 0
            self._change.notify_all()
            return self._number

    async def next_result(self) -> Result | None:
        """The metrics of an epoch; None when there are no more.

        Raises: WorkersError.
        """
        async with self._change:
            await self._change.wait_for(lambda: self._results or self._failure)
            if not self._results:
                raise WorkersError(self._failure)
            return self._results.pop(0)

    async def note(self, number: int, epoch: int) -> None:
        """The trial took note of an epoch; its workers may train the next."""
        async with self._change:
            if self._open(number):
                self._noted = epoch
                self._change.notify_all()

    async def clear(self, number: int) -> None:
        """The trial ends here."""
        async with self._change:
            if self._open(number):
                self._task = None
                self._change.notify_all()

    async def pick_up(self, group: str, first: bool, after: int) -> tuple[int, Task]:
        """The next task and its number, for a worker of a group that has seen the tasks up to `after`.

        The first worker of a group begins a task, the others then follow, so that all do the same, even if the task
        has ended meanwhile. Ray goes on with the call of a worker that died while it waited here: a first worker that
        another one has followed gets nothing.
        """
        async with self._change:
            if not first:
                await self._change.wait_for(lambda: self._begun_by(group, after))
                assert self._begun is not None
                return self._begun[1:]
            self._group = group
            self._change.notify_all()
            await self._change.wait_for(
                lambda: self._group != group or (self._task is not None and self._number > after)
            )
            if self._task is None or self._group != group:
                raise StoppedError
            self._begun = group, self._number, self._task
            self._change.notify_all()
            return self._number, self._task

    async def hand_in(self, number: int, result: Result | None) -> None:
        """A result of the task, from its first worker."""
        async with self._change:
            if self._open(number):
                self._results.append(result)
                self._change.notify_all()

    async def may_go_on(self, number: int, epoch: int) -> bool:
        """Whether the trial wants another epoch; waits until it has taken note of this one, or has ended."""
        async with self._change:
            await self._change.wait_for(lambda: self._noted >= epoch or not self._open(number))
            return self._open(number)

    async def give_up(self, number: int, trouble: str, again: bool) -> None:
        """A worker raises, for this reason; whether the task may be begun again."""
        async with self._change:
            if self._open(number):
                self._trouble = self._trouble or trouble
                if not again:
                    self._fail(trouble)

    async def count_death(self, reason: str) -> None:
        """The workers are being replaced, whatever they were doing."""
        async with self._change:
            if self._task is not None:
                self._deaths += 1
                if self._deaths > RETRIES:
                    self._fail(f"{reason}\n{self._trouble}".strip())
                self._trouble = ""

    def _begun_by(self, group: str, after: int) -> bool:
        return self._begun is not None and self._begun[0] == group and self._begun[1] > after

    def _open(self, number: int) -> bool:
        return number == self._number and self._task is not None

    def _fail(self, reason: str) -> None:
        self._task, self._failure = None, reason
        self._change.notify_all()
