"""One trial of Tune: trained in its own process, or by a team of workers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.tune

from raysv.config import config_to_dict
from raysv.search.desk import Result, Task
from raysv.search.results import NO_ROOM, TIME, failure
from raysv.search.space import Space

# Of Tune: how long a stopped trial has to leave its process to the next one; if it has not by then, that one fails.
LEAVE_VARIABLE, LEAVE_SECONDS = "TUNE_FUNCTION_THREAD_TIMEOUT_S", 600

FINEST = 10_000  # parts of a resource that Ray counts in


@dataclass(frozen=True)
class Job:
    """What all trials of a study have in common.

    Attributes:
        gpus_per_worker: settled from what the cluster has.
        storage: folder for the trials' checkpoints, reachable from every node.
        checked: the digests of the corpus that the study was started with, see `fit`.
        room, head: see `Allotment`.
        code: what the driver runs, see `nodes.code`.
        tests: whether a trial ends with the test lists; a search's must not.
    """

    space: Space
    gpus_per_worker: float
    storage: str
    checked: dict[str, str]
    room: int
    head: str
    code: dict[str, str] = field(default_factory=dict)
    tests: bool = False

    @property
    def worker_resources(self) -> dict[str, float]:
        """What each worker takes of the cluster."""
        cpus = {"CPU": float(self.space.resources.cpus_per_worker)}
        return cpus | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})

    @property
    def trial_resources(self) -> dict[str, float]:
        """What a trial's own process takes.

        A lone worker is that process. Several have processes of their own, and the trial's only waits for them: it
        takes none of the CPUs they need, and lives on the head node. Of that it takes its share, so that Ray starts no
        more trials than have room for their workers, whoever asks: those that a resumed study repeats come all at once.
        (In a cluster with room for more than a hundred teams Ray may start some too many, which then wait.)
        """
        if self.space.resources.workers == 1:
            return self.worker_resources
        return {self.head: max(FINEST // self.room, 1) / FINEST}


def run_trial(values: dict[str, Any], job: Job) -> None:
    """Train one point of the space. Runs as a Tune trial, reports through Tune.

    Checkpoints are kept in a folder named by the trial's id, so a trial that is started again, after whatever death of
    worker, node or driver, goes on from the last one. The process outlives the trial and runs the next.
    """
    os.environ[LEAVE_VARIABLE] = str(LEAVE_SECONDS)
    resources = job.space.resources
    task = Task(
        config=config_to_dict(job.space.config(values)),
        kept=str(Path(job.storage, ray.tune.get_context().get_trial_id())),
        threads=resources.cpus_per_worker,
        tests=job.tests,
        checked=job.checked,
        code=job.code,
    )
    epochs = [0]  # that were reported

    def report(result: Result) -> None:
        epochs.append(int(result[TIME]))
        ray.tune.report(result)

    # imported where needed: a lone worker's process can do without Ray Train
    try:
        if resources.workers == 1:
            from raysv.search.worker import train_alone

            train_alone(task, report, gpu=bool(job.gpus_per_worker))
        else:
            from raysv.search.team import team_of

            team_of(resources.workers, tuple(job.worker_resources.items()), job.storage).train(task, report)
    except RuntimeError as error:
        shares = 0 < job.gpus_per_worker < 1  # with others on its GPU, which may have taken the room
        if NO_ROOM not in str(error) or shares:
            raise
        # an answer, not an accident: trying again would not fit either, and the search is to learn from it
        reason = next(line for line in str(error).splitlines() if NO_ROOM in line)
        report(failure(epochs[-1] + 1, reason[reason.index(NO_ROOM) :]))
