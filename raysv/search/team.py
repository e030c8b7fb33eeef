"""A team of DDP workers that outlives a trial: one Ray Train run whose workers train task after task.

Starting the workers of a Train run takes 10 to 20 seconds, as long as many a trial that ASHA stops early. So the
process of a trial, which Tune hands to the next trial, keeps them. Train does what it is there for: it places the
workers, makes their process group, and replaces them all when one dies; the new ones find the task on the desk and go
on from its last checkpoint.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysv.search.desk import Desk, Result, Task, WorkersError
from raysv.search.results import TIME
from raysv.search.worker import serve

STARTS = 10  # attempts to bring a team together; one that only waits for room takes a quarter of an hour
TRAIN_SETTINGS = {
    # for some hours, and then once more by Tune: others may train in that room, or a node be replaced meanwhile
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # while a node drains, it tells of one death again and again
    "RAY_TRAIN_METRICS_ENABLED": "0",  # nobody reads them; MLflow has ours
}


class _WorkerDeaths(ray.train.UserCallback):
    """Tells the desk of dead workers, also of those that had not come to it yet; runs where Train does."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        worker, error = next(iter(worker_exceptions.items()))
        error = getattr(error, "health_check_failure", error)  # what Train's own words for a dead process wrap
        reason = next(line for line in f"{error}\n{error!r}".splitlines() if line.strip())
        self._desk.count_death.remote(f"Worker {worker} died: {reason}")


class Team:
    """The workers and their desk, kept by the process of a trial."""

    def __init__(self, workers: int, resources: dict[str, float], storage: str) -> None:
        os.environ.update(TRAIN_SETTINGS)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._desk = ray.remote(num_cpus=0, scheduling_strategy=here)(Desk).remote()
        self._end: BaseException | None = None
        trainer = ray.train.torch.TorchTrainer(
            serve,
            train_loop_config={"desk": self._desk},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=uuid.uuid4().hex[:12],
                storage_path=str(Path(storage).with_name("teams")),
                callbacks=[_WorkerDeaths(self._desk)],
                # deaths are counted at the desk, by task; here only what keeps a team from coming together at all
                failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=STARTS),
            ),
        )
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def _run(self, trainer: Any) -> None:
        try:
            trainer.fit()
            self._end = WorkersError("The workers left.")
        except BaseException as error:
            self._end = error

    def train(self, task: Task, report: Callable[[Result], None]) -> None:
        """Have a task trained, reporting the metrics of each epoch; when `report` raises, the workers leave the task.

        Raises: WorkersError.
        """
        number = ray.get(self._desk.lay_down.remote(task))
        try:
            while (metrics := self._next_result()) is not None:
                report(metrics)
                ray.get(self._desk.note.remote(number, int(metrics[TIME])))
        finally:
            self._desk.clear.remote(number)

    def _next_result(self) -> Result | None:
        pending = self._desk.next_result.remote()
        while not ray.wait([pending], timeout=1)[0]:
            if self._end:
                raise WorkersError(f"Ray Train gave the workers up: {self._end}") from self._end
        result: Result | None = ray.get(pending)
        return result


@functools.cache
def team_of(workers: int, resources: tuple[tuple[str, float], ...], storage: str) -> Team:
    """The team of this process, made when it is first asked for. A trial that fails takes the process with it."""
    return Team(workers, dict(resources), storage)
