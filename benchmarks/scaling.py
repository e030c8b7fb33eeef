"""What a study of ten thousand trials costs its driver: the real tuner, with trials that only sleep and report.

    python benchmarks/scaling.py [--trials 10000] [--parallel 16] [--seconds 0.2] [--minutes 30]

The stage that raysv runs when it searches: Tune, Optuna's TPE in its database, ASHA with its journal, MLflow in a
database of its own, a line for every event; what trains is replaced. A trial sleeps so long for each epoch and reports
an EER that follows from its values, and, with --checkpoints, a checkpoint of a small encoder, of which the driver puts
the files and a DET curve into MLflow. Every so many trials a line says what came since the one before: trials and
results a second, the driver's CPU time for each result, of all threads and of the main one in each part, and its
memory. The trials' processes share the machine with the driver, so its CPU time is what carries over to others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_ADDRESS"] = "local"

import numpy as np
import ray
import ray.tune
from measure import machine
from ray.tune.execution.tune_controller import TuneController

from raysv.config import config_from_dict
from raysv.learning.checkpoint import Standing, save_checkpoint
from raysv.search.mlflow_store import check
from raysv.search.proposals import OptunaProposals
from raysv.search.results import METRIC, TIME
from raysv.search.snapshots import Spare
from raysv.search.space import Space, space_from_dict
from raysv.search.stages import make_tuner, search_stage
from raysv.search.stopping import JournaledStopping
from raysv.search.study import open_study
from raysv.search.tracking import MLflowTracking
from raysv.search.tuner import tune_settings
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.evaluation import Evaluation
from raysv.verification.metrics import error_rates

TREE = {
    "loss": {
        "margin": {"uniform": [0.0, 0.5]},
        "scale": {"loguniform": [10.0, 60.0]},
        "temperature": {"loguniform": [0.02, 0.5]},
    },
    "augment": {"strength": {"uniform": [0.0, 1.0]}},
}
PARTS = {
    "proposing": (OptunaProposals, ["suggest"]),
    "Optuna's records": (OptunaProposals, ["on_trial_result", "on_trial_complete"]),
    "early stopping": (JournaledStopping, ["on_trial_result"]),
    "MLflow": (MLflowTracking, ["on_trial_start", "on_trial_result", "on_trial_complete"]),
    "Tune's snapshots": (TuneController, ["checkpoint"]),
    "their copies": (Spare, ["on_step_end"]),
}


def stand_in(values: dict[str, Any], epochs: int, seconds: float, checkpoint: dict[str, str]) -> None:
    """A trial that learns nothing: its EER falls to what a smooth function of its values says."""
    distance = (
        (values["loss.margin"] - 0.2) ** 2
        + (values["augment.strength"] - 0.6) ** 2
        + math.log(values["loss.scale"] / 30) ** 2
        + math.log(values["loss.temperature"] / 0.07) ** 2
    )
    for epoch in range(1, epochs + 1):
        time.sleep(seconds)
        eer = 0.05 + 0.02 * math.tanh(distance) + 0.3 / (1 + epoch)
        ray.tune.report({METRIC: eer, TIME: epoch} | checkpoint)


class Clock:
    """Where the seconds of the driver's main thread go: its CPU time inside each part, by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for part, (owner, names) in PARTS.items():
            inside: list[str] = []  # one part may call itself
            for name in names:
                setattr(owner, name, self._timed(part, getattr(owner, name), inside))

    def _timed(self, part: str, method: Callable[..., Any], inside: list[str]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **named: Any) -> Any:
            started = time.thread_time()
            inside.append(part)
            try:
                return method(*args, **named)
            finally:
                inside.pop()
                if not inside:
                    self.seconds[part] += time.thread_time() - started

        return timed


class Told(ray.tune.Callback):
    """A line for every so many trials that ended."""

    def __init__(self, clock: Clock, every: int, minutes: float) -> None:
        self._clock, self._every, self._until = clock, every, time.monotonic() + 60 * minutes
        self._ended = self._results = 0
        self._before = self._now()
        print("| trials | a second | results a second | ms of CPU a result | " + " | ".join(PARTS) + " | MB |")
        print("|---" * (len(PARTS) + 5) + "|", flush=True)

    def _now(self) -> list[float]:
        return [time.monotonic(), time.process_time(), self._results, *self._clock.seconds.values()]

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """Count it."""
        self._results += 1

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how it went from time to time."""
        self._ended += 1
        if self._ended % self._every:
            return
        now = self._now()
        wall, cpu, results, *parts = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        each = (f"{1000 * seconds / results:.1f}" for seconds in (cpu, *parts))
        row = [self._ended, f"{self._every / wall:.2f}", f"{results / wall:.1f}", *each, f"{_resident():.0f}"]
        print(f"| {' | '.join(map(str, row))} |", file=sys.__stdout__, flush=True)
        if time.monotonic() > self._until:
            signal.raise_signal(signal.SIGINT)  # Tune ends in order


def _resident() -> float:
    """The driver's own memory in MB, files that it maps left out."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_checkpoint(folder: Path) -> dict[str, str]:
    """A checkpoint of an encoder that has learned nothing, as part of a result."""
    folder.mkdir()
    config = config_from_dict({"model": {"channels": 64, "embedding_dim": 64}})
    generator = np.random.default_rng(0)
    same_speaker = np.arange(5400) % 2 == 0
    scores = generator.normal(same_speaker, 1.0)
    dev = Evaluation(scores, same_speaker, error_rates(scores, same_speaker))
    standing = Standing(config, [{"epoch": 1, METRIC: 0.3}], dev, 100, "none", "cpu, float32")
    save_checkpoint(folder, standing, SpeakerEncoder(config.model), {})
    return {"checkpoint_path": str(folder)}


def run(space: Space, parallel: int, seconds: float, every: int, minutes: float, checkpoints: bool) -> None:
    """One study with trials that sleep."""
    os.environ.update(tune_settings(space.search.trials))
    clock = Clock()
    ray.init(num_cpus=parallel, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory(prefix="raysv-scaling-") as name, open(os.devnull, "w") as nowhere:
        uri = f"sqlite:///{name}/mlflow.db"
        check(uri)
        folder = open_study(space, Path(name), uri, "scaling")
        checkpoint = write_checkpoint(Path(name, "checkpoint")) if checkpoints else {}
        trainable = functools.partial(stand_in, epochs=space.epochs, seconds=seconds, checkpoint=checkpoint)
        stage = search_stage(space, folder)
        tuner = make_tuner(stage, ray.tune.with_resources(trainable, {"CPU": 1}), space, folder, parallel, uri)
        callbacks = tuner._local_tuner.get_run_config().callbacks
        callbacks.append(Told(clock, every, minutes))
        started = time.monotonic()
        with contextlib.redirect_stdout(nowhere):
            results = tuner.fit()
        print(f"\n{len(results)} trials in {(time.monotonic() - started) / 60:.1f} minutes")
        for what in ("mlflow.db", "scaling/optuna.db", "scaling/stopping.jsonl"):
            print(f"{what}: {Path(name, what).stat().st_size / 1e6:.1f} MB")
        ray.shutdown()


def main() -> None:
    """Run the study and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.2, help="that an epoch of a trial sleeps")
    parser.add_argument("--every", type=int, default=500, help="trials from one line to the next")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--checkpoints", action="store_true", help="trials leave checkpoints")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end the study after so long")
    chosen = parser.parse_args()
    print(machine(), flush=True)
    search = {"trials": chosen.trials, "confirm": 0, "concurrent_trials": chosen.parallel}
    space = space_from_dict(TREE | {"search": search, "training": {"epochs": chosen.epochs}}, "scaling")
    run(space, chosen.parallel, chosen.seconds, chosen.every, chosen.minutes, chosen.checkpoints)


if __name__ == "__main__":
    main()
