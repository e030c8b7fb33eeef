"""From the proposal of a trial to the result of its first epoch, which is two steps of a tiny network.

    python benchmarks/trial_start.py [--workers 1 2] [--trials 4]

Beside raysv, in the same run: the pattern that Ray documents, a `TorchTrainer` started by each trial, training the same
with the same loop. Every way has a private Ray of its own; a trial's start is counted once the one before has ended.
The first trial starts processes, later ones find raysv's started. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# a Ray of its own; and Tune in as few words as in a study
os.environ |= {"RAY_ADDRESS": "local", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}

import ray
import ray.tune
from measure import machine

from raysv.config import config_from_dict, config_to_dict
from raysv.corpus.loading import load_corpus
from raysv.learning.training import fit
from raysv.search import cluster
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space, space_from_dict
from raysv.search.trial import Job, run_trial

TREE = {
    "batch": {"speakers": 24, "utterances_per_speaker": 9, "views": 1, "crop_seconds": 0.5},
    "augment": {"strength": 0.0},
    "model": {"channels": 16, "embedding_dim": 16},
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "contrast_weight": 0},
    "training": {"epochs": 1, "precision": "fp32"},
}


class Stopwatch(ray.tune.Callback):
    """When each trial was made and when its first result came."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial's first epoch is over."""
        if METRIC in result and result[TIME] == 1:
            self.seconds.append(time.monotonic() - self._since)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The next trial may be made from now on."""
        self._since = time.monotonic()


def stock_trial(values: dict[str, Any], job: Job) -> None:
    """A trial as Ray documents it: a Train run of its own."""
    import ray.train.torch
    from ray.tune.integration.ray_train import TuneReportCallback

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    checked = job.checked

    def work(tree: dict[str, Any]) -> None:
        def report(metrics: dict[str, float], folder: Path | None) -> None:
            checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
            ray.train.report(metrics, checkpoint=checkpoint)

        fit(config_from_dict(tree), report, checked=checked)

    ray.train.torch.TorchTrainer(
        work,
        train_loop_config=config_to_dict(job.space.config(values)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.space.resources.workers, resources_per_worker=job.worker_resources
        ),
        run_config=ray.train.RunConfig(
            name=ray.tune.get_context().get_trial_id(), storage_path=job.storage, callbacks=[TuneReportCallback()]
        ),
    ).fit()


def starts(space: Space, checked: dict[str, str], trials: int, stock: bool) -> list[float]:
    """Seconds from the end of one trial to the first result of the next, or from the start of Tune for the first."""
    with tempfile.TemporaryDirectory(prefix="raysv-start-") as folder:
        cluster.connect()
        allotment = cluster.allot(space.resources, 1)
        job = Job(space, 0.0, str(Path(folder, "trials")), checked, allotment.room, allotment.head)
        function, resources = (stock_trial, {cluster.HEAD: 0.01}) if stock else (run_trial, job.trial_resources)
        trainable = ray.tune.with_resources(ray.tune.with_parameters(function, job=job), resources)
        watch = Stopwatch()
        tuner = ray.tune.Tuner(
            trainable,
            param_space={"loss.margin": ray.tune.uniform(0.0, 0.5)},
            tune_config=ray.tune.TuneConfig(
                metric=METRIC,
                mode="min",
                num_samples=trials,
                max_concurrent_trials=1,
                reuse_actors=not stock,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(name="tune", storage_path=folder, callbacks=[watch], verbose=0),
        )
        watch._since = time.monotonic()
        results = tuner.fit()
        ray.shutdown()
        if results.errors:
            raise results.errors[0]
        return watch.seconds


def main() -> None:
    """Print the seconds of the first trial and the median of the later ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=4)
    chosen = parser.parse_args()
    print(machine())
    for workers in chosen.workers:
        space = space_from_dict(TREE | {"resources": {"workers": workers, "gpus_per_worker": 0.0}}, "start")
        config = space.config({"loss.margin": 0.2})
        checked = load_corpus(config.data, config.augment).digests
        print(f"{workers} worker{'s' if workers > 1 else ''}: seconds to the first result")
        ours, stock = (starts(space, checked, chosen.trials, stock) for stock in (False, True))
        for name, seconds in (("raysv", ours), ("a TorchTrainer for each trial", stock)):
            later = statistics.median(seconds[1:])
            ratio = later / statistics.median(stock[1:])
            print(f"  {name:30}  first {seconds[0]:6.2f} s   later {later:6.2f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
