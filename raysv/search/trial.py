"""One trial: a Ray Train run whose DDP workers call `learning.training.fit`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from raysv.config import config_from_dict, config_to_dict
from raysv.learning.training import DivergedError, Metrics, fit
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space

# The trial itself only waits for its workers: it takes none of the CPUs they need, and lives on the head node.
DRIVER_RESOURCES = {"node:__internal_head__": 0.01}
CHANCE = 0.5  # the EER of an encoder that has diverged: it tells speakers apart by guessing
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how often results come through; Ray's own 2 s delay every epoch
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
}


@dataclass(frozen=True)
class Job:
    """What all trials of a study have in common.

    Attributes:
        gpus_per_worker: settled from what the cluster has.
        storage: folder for the trials' checkpoints, reachable from every node.
        tests: whether a trial ends with the test lists; a search's must not.
    """

    space: Space
    gpus_per_worker: float
    storage: str
    tests: bool = False


def run_trial(values: dict[str, Any], job: Job) -> None:
    """Train one point of the space on workers of its own. Runs as a Tune trial, reports through Tune.

    The Train run is named after the trial in fixed storage, so a trial that is started again, after whatever death of
    worker, node or driver, goes on from its last checkpoint.
    """
    os.environ.update(TRAIN_SETTINGS)
    resources = job.space.resources
    devices = {"CPU": float(resources.cpus_per_worker)}
    if job.gpus_per_worker:
        devices["GPU"] = job.gpus_per_worker
    ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config_to_dict(job.space.config(values)),
            "threads": resources.cpus_per_worker,
            "tests": job.tests,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=bool(job.gpus_per_worker), resources_per_worker=devices
        ),
        run_config=ray.train.RunConfig(
            name=ray.tune.get_context().get_trial_id(),
            storage_path=job.storage,
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=1),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=METRIC, checkpoint_score_order="min"
            ),  # the one with the lowest EER and, always, the latest
        ),
    ).fit()


def train_worker(job: dict[str, Any]) -> None:
    """What each DDP worker of a trial runs."""
    config = config_from_dict(job["config"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job["threads"])

    def report(metrics: Metrics, folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None)

    checkpoint = ray.train.get_checkpoint()
    try:
        if checkpoint is None:
            fit(config, report, device=device, tests=job["tests"])
        else:
            with checkpoint.as_directory() as folder:
                fit(config, report, device=device, tests=job["tests"], resume=Path(folder))
    except DivergedError as error:
        # an answer, not an accident: trying again would diverge again, and the search is to learn from it
        ray.train.report({TIME: error.epoch, METRIC: CHANCE, "failure": str(error)})
