"""What raysv's default search finds beside random search, by real training at the same compute.

    RAYSV_DATA=PACK python benchmarks/default_against_random.py [--trials 24] [--seeds 3]

For each seed two studies on the narrow network and the real speech of `loss_table.py`, over ranges where that has a
grid: raysv as it is by default (the published settings first, TPE, ASHA), and random search without early stopping,
which may train as many epochs as the first one did, rounded up to a whole trial. What each hands over, the trial with
the lowest EER at the end of all epochs, is trained again from three seeds that no study has seen; so is the paper's
setting. Neither confirms (`search.confirm: 0`): that would cost and help both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["RAY_ADDRESS"] = "local"

from loss_table import CONFIG, EPOCHS, TESTS, learn
from measure import machine

from raysv.search.mlflow_store import check
from raysv.search.space import space_from_dict
from raysv.search.study import Study, open_study
from raysv.search.tuner import check_data, run_study

RANGES = {
    "margin": {"uniform": [0.0, 0.5]},
    "scale": {"loguniform": [10.0, 60.0]},
    "temperature": {"loguniform": [0.02, 0.5]},
    "strength": {"uniform": [0.0, 1.0]},
}
PAPER = {"margin": 0.2, "scale": 30.0, "temperature": 0.07, "strength": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "raysv's default": {},
    "random search": {"sampler": "random", "early_stopping": "none", "published": 0},
}
NEW_SEEDS = (1000, 1001, 1002)


def search(name: str, trials: int, seed: int, root: str, cache: str) -> Study:
    """A study of so many trials."""
    tree = CONFIG | {
        "data": CONFIG["data"] | {"root": root, "cache": cache},
        "loss": {key: RANGES[key] for key in ("margin", "scale", "temperature")},
        "augment": {"strength": RANGES["strength"]},
        "training": {"epochs": EPOCHS, "seed": seed, "precision": "fp32"},
        "search": {"trials": trials, "seed": seed, "confirm": 0} | WAYS[name],
        "resources": {"gpus_per_worker": 0.0},
    }
    space = space_from_dict(tree, "against-random")
    with tempfile.TemporaryDirectory(prefix="raysv-against-") as results, contextlib.redirect_stdout(io.StringIO()):
        uri = f"sqlite:///{results}/mlflow.db"
        check(uri)
        corpus = check_data(space)
        folder = open_study(space, Path(results), uri, "study")
        return run_study(space, folder, corpus, uri, resume=False)


def setting(study: Study) -> dict[str, float]:
    """What a study hands over."""
    assert study.best_values is not None
    return {key.rpartition(".")[2]: float(value) for key, value in study.best_values.items()}


def again(values: dict[str, float], seed: int, root: str, cache: str) -> dict[str, float]:
    """What a setting comes to from a new seed: EERs in %, on the dev pairs and the test lists."""
    last = learn(values, seed, root, cache)[-1]
    return {key: 100 * last[key] for key in ("dev/eer", *(name.replace("_eer", "/eer") for name in TESTS))}


def main() -> None:
    """Run the studies, train again what they hand over, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24, help="of raysv's default")
    parser.add_argument("--seeds", type=int, default=3, help="studies of each way")
    chosen = parser.parse_args()
    if not (root := os.environ.get("RAYSV_DATA")):
        raise SystemExit("RAYSV_DATA must name the pack of real speech.")
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="raysv-against-") as cache:
        found: dict[tuple[str, int], dict[str, float]] = {}
        for seed in range(chosen.seeds):
            trials = chosen.trials
            for name in WAYS:
                started = time.monotonic()
                study = search(name, trials, seed, root, cache)
                epochs = sum(trial.epoch for trial in study.trials)
                found[name, seed] = values = setting(study)
                minutes = (time.monotonic() - started) / 60
                told = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
                print(f"{name}, seed {seed}: {trials} trials, {epochs} epochs, {minutes:.1f} min; {told}", flush=True)
                trials = -(-epochs // EPOCHS)
        settings = found | {("the paper's setting", 0): PAPER}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
            jobs = itertools.product(settings.values(), NEW_SEEDS)
            futures = [pool.submit(again, values, seed, root, cache) for values, seed in jobs]
            runs = [future.result() for future in futures]
    print(f"\nEER in %, means of {len(NEW_SEEDS)} new seeds\n")
    print(f"| way, seed | {' | '.join(runs[0])} |\n{'|---' * (1 + len(runs[0]))}|")
    means: dict[str, list[float]] = {}
    for number, (name, seed) in enumerate(settings):
        mine = runs[number * len(NEW_SEEDS) : (number + 1) * len(NEW_SEEDS)]
        mean = [statistics.mean(run[key] for run in mine) for key in mine[0]]
        means.setdefault(name, []).append(mean[0])
        print(f"| {name}, {seed} | {' | '.join(f'{value:.2f}' for value in mean)} |")
    print("\n" + "; ".join(f"{name}: {statistics.mean(values):.2f} % on dev" for name, values in means.items()))


if __name__ == "__main__":
    main()
