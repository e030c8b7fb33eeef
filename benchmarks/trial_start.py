"""From the proposal of a trial to the result of its first epoch, which is two steps of a tiny network.

    python benchmarks/trial_start.py [--workers 1 2] [--trials 4] [--rounds 2]

raysv is run as it is: `run_study` with Optuna, MLflow and checkpoints, whose entries and uploads lie between trials.
Beside it, in turns, the pattern that Ray documents: Tune alone, a `TorchTrainer` started by each trial, training the
same with the same loop. Every study has a private Ray of its own and one trial at a time.
The first trial starts processes, later ones find raysv's started. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# a Ray of its own; and Tune in as few words as in a study
os.environ |= {"RAY_ADDRESS": "local", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}

import optuna
import ray
import ray.tune
from measure import machine
from mlflow import MlflowClient

from raysv.config import config_from_dict, config_to_dict
from raysv.corpus.loading import load_corpus
from raysv.corpus.sets import Corpus
from raysv.learning.training import fit
from raysv.search import cluster
from raysv.search.mlflow_store import KIND, check, experiment_id, search_runs
from raysv.search.nodes import code
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space, space_from_dict
from raysv.search.stages import EXPERIMENT, OPTUNA_FILE
from raysv.search.study import open_study
from raysv.search.trial import Job
from raysv.search.tuner import run_study

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
        self.start()

    def start(self) -> None:
        """The first trial may be made from now on."""
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


def ours(space: Space, corpus: Corpus) -> list[float]:
    """A study through the real tuner, with MLflow, Optuna's storage and checkpoints, told from its own records.

    Returns: seconds from Optuna's proposal of each trial to the result of its first epoch.
    """
    with tempfile.TemporaryDirectory(prefix="raysv-start-") as name, contextlib.redirect_stdout(io.StringIO()):
        uri = f"sqlite:///{name}/mlflow.db"
        check(uri)  # a new database takes MLflow seconds
        folder = open_study(space, Path(name), uri, "start")
        run_study(space, folder, corpus, uri, resume=False)
        client = MlflowClient(uri)
        runs = search_runs(client, experiment_id(uri, EXPERIMENT), {KIND: "trial"})
        runs.sort(key=lambda run: run.info.run_name)
        heard = [client.get_metric_history(run.info.run_id, METRIC)[0].timestamp / 1000 for run in runs]
        trials = optuna.load_study(study_name="start", storage=f"sqlite:///{folder / OPTUNA_FILE}").trials
        asked = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
        return [result - proposal for result, proposal in zip(heard, asked, strict=True)]


def stock(space: Space, corpus: Corpus) -> list[float]:
    """The documented pattern; seconds from the end of each trial, or the start of Tune, to the next first result."""
    with tempfile.TemporaryDirectory(prefix="raysv-start-") as folder, cluster.connected():
        job = Job(space, 0.0, str(Path(folder, "trials")), corpus.digests, room=1, head="", code=code())
        watch = Stopwatch()
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(stock_trial, job=job), {cluster.HEAD: 0.01}),
            param_space={"loss.margin": ray.tune.uniform(0.0, 0.5)},
            tune_config=ray.tune.TuneConfig(
                metric=METRIC, mode="min", num_samples=space.search.trials, max_concurrent_trials=1
            ),
            run_config=ray.tune.RunConfig(name="tune", storage_path=folder, callbacks=[watch], verbose=0),
        )
        watch.start()
        results = tuner.fit()
        if results.errors:
            raise results.errors[0]
        return watch.seconds


def main() -> None:
    """Print the median seconds of first trials and of later ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="studies of each way, taking turns")
    chosen = parser.parse_args()
    print(machine())
    for workers in chosen.workers:
        search = {"trials": chosen.trials, "early_stopping": "none", "confirm": 0, "concurrent_trials": 1}
        tree = TREE | {"search": search, "resources": {"workers": workers, "gpus_per_worker": 0.0}}
        space = space_from_dict(tree, "start")
        config = space.config({"loss.margin": 0.2})
        corpus = load_corpus(config.data, config.augment)
        ways = {"raysv": ours, "a TorchTrainer for each trial": stock}
        seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(chosen.rounds):
            for name, way in ways.items():
                seconds[name].append(way(space, corpus))
        print(f"{workers} worker{'s' if workers > 1 else ''}: seconds to the first result, medians")
        for name, studies in seconds.items():
            later = [second for study in studies for second in study[1:]]
            firsts = ", ".join(f"{study[0]:.2f}" for study in studies)
            print(f"  {name:30}  first trials {firsts} s   {len(later)} later ones {statistics.median(later):6.2f} s")


if __name__ == "__main__":
    main()
