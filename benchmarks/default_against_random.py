"""What raysv's default search finds beside random search, by real training at the same compute.

    RAYSV_DATA=PACK python benchmarks/default_against_random.py [--trials 24] [--seeds 3]

For each seed two studies on the narrow network and the real speech of `loss_table.py`, over ranges where that has a
grid: raysv as it is by default (the published settings first, TPE, ASHA), and random search without early stopping,
which may train as many epochs as the first one did, rounded up to a whole trial; two trials at a time in both. What
each hands over, the trial with the lowest EER at the end of all epochs, is trained again from three seeds that no study
has seen; so is the paper's setting. Neither confirms (`search.confirm: 0`): that would cost and help both alike.

Every study and every run from a new seed is a line of `default_against_random.csv` as soon as it has ended; what is
there is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ["RAY_ADDRESS"] = "local"

import numpy as np
from loss_table import CONFIG, EPOCHS, TESTS, learn
from measure import machine

from raysv.search.mlflow_store import check
from raysv.search.space import space_from_dict
from raysv.search.study import open_study
from raysv.search.tuner import check_data, run_study
from raysv.verification.confidence import mean_over_seeds

FILE = Path(__file__).with_suffix(".csv")
RANGES = {
    "margin": {"uniform": [0.0, 0.5]},
    "scale": {"loguniform": [10.0, 60.0]},
    "temperature": {"loguniform": [0.02, 0.5]},
    "strength": {"uniform": [0.0, 1.0]},
}
OURS, RANDOM, PAPER = "raysv's default", "random search", "the paper's setting"
WAYS: dict[str, dict[str, Any]] = {
    OURS: {},
    RANDOM: {"sampler": "random", "early_stopping": "none", "published": 0},
}
PAPER_VALUES = {"margin": 0.2, "scale": 30.0, "temperature": 0.07, "strength": 0.5}
NEW_SEEDS = (1000, 1001, 1002)
COLUMNS = ("way", "seed", *RANGES, "trials", "epochs", "minutes", "new_seed", "dev_eer", *TESTS)

Row = dict[str, Any]


def search(way: str, trials: int, seed: int, root: str, cache: str) -> Row:
    """A study of so many trials, and what it hands over."""
    started = time.monotonic()
    tree = CONFIG | {
        "data": CONFIG["data"] | {"root": root, "cache": cache},
        "loss": {key: RANGES[key] for key in ("margin", "scale", "temperature")},
        "augment": {"strength": RANGES["strength"]},
        "training": {"epochs": EPOCHS, "seed": seed, "precision": "fp32"},
        "search": {"trials": trials, "seed": seed, "confirm": 0, "concurrent_trials": 2} | WAYS[way],
        "resources": {"gpus_per_worker": 0.0},
    }
    space = space_from_dict(tree, "against-random")
    with tempfile.TemporaryDirectory(prefix="raysv-against-") as results, contextlib.redirect_stdout(io.StringIO()):
        uri = f"sqlite:///{results}/mlflow.db"
        check(uri)
        corpus = check_data(space)
        study = run_study(space, open_study(space, Path(results), uri, "study"), corpus, uri, resume=False)
    if study.best is None:
        raise SystemExit(f"{way}, seed {seed}: no trial has come to its end.")
    values = {key.rpartition(".")[2]: value for key, value in study.best.values.items()}
    epochs, minutes = sum(trial.epoch for trial in study.trials), (time.monotonic() - started) / 60
    cost = {"trials": trials, "epochs": epochs, "minutes": f"{minutes:.1f}"}
    return {"way": way, "seed": seed} | values | cost | {"dev_eer": study.best.eer}


def again(found: Row, new_seed: int, root: str, cache: str) -> Row:
    """What a study has found, trained from a new seed."""
    values = {key: float(found[key]) for key in RANGES}
    last = learn(values, new_seed, root, cache)[-1]
    eers = {"dev_eer": last["dev/eer"]} | {name: last[name.replace("_eer", "/eer")] for name in TESTS}
    return {"way": found["way"], "seed": found["seed"]} | values | {"new_seed": new_seed} | eers


def recorded() -> list[Row]:
    """The lines that are there."""
    if not FILE.exists():
        return []
    with FILE.open(newline="", encoding="utf-8") as file:
        return [row | {"seed": int(row["seed"])} for row in csv.DictReader(file)]


def record(row: Row) -> None:
    """Add a line, and print it."""
    new = not FILE.exists()
    with FILE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def find(rows: list[Row], way: str, seed: int) -> Row | None:
    """The study of a way and seed, if it is there."""
    return next((row for row in rows if (row["way"], row["seed"]) == (way, seed) and not row["new_seed"]), None)


def run(trials: int, seeds: int, root: str, cache: str) -> None:
    """All studies and all runs from new seeds that are not there yet."""
    for seed in range(seeds):
        count = trials
        for way in WAYS:
            if find(recorded(), way, seed) is None:
                record(search(way, count, seed, root, cache))
            ours = find(recorded(), OURS, seed)
            assert ours is not None
            count = -(-int(ours["epochs"]) // EPOCHS)
    found = [row for row in recorded() if not row["new_seed"] and row["seed"] < seeds]
    found.append({"way": PAPER, "seed": 0} | PAPER_VALUES)
    there = {(row["way"], row["seed"], row["new_seed"]) for row in recorded()}
    missing = [(row, seed) for seed in NEW_SEEDS for row in found if (row["way"], row["seed"], str(seed)) not in there]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for future in as_completed([pool.submit(again, row, seed, root, cache) for row, seed in missing]):
            record(future.result())


def report(seeds: int) -> str:
    """A row for each study, and how much lower raysv's are in the mean, paired by the studies' seed."""
    names = ("dev_eer", *TESTS)
    means: dict[tuple[str, int], np.ndarray] = {}
    for way, seed in [(way, seed) for seed in range(seeds) for way in WAYS] + [(PAPER, 0)]:
        runs = [row for row in recorded() if (row["way"], row["seed"]) == (way, seed) and row["new_seed"]]
        means[way, seed] = np.mean([[100 * float(row[name]) for name in names] for row in runs], axis=0)
    lines = [
        f"| EER in %, means of {len(NEW_SEEDS)} new seeds | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for (way, seed), eers in means.items():
        lines.append(f"| {way}, seed {seed} | {' | '.join(f'{eer:.2f}' for eer in eers)} |")
    lower = [means[RANDOM, seed] - means[OURS, seed] for seed in range(seeds)]
    for name, differences in zip(names, np.transpose(lower), strict=True):
        told = mean_over_seeds(differences, None, 0)
        lines.append(f"{name}: {OURS} is lower by {told.mean:.2f} points ({told.low:.2f} to {told.high:.2f})")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24, help="of raysv's default")
    parser.add_argument("--seeds", type=int, default=3, help="studies of each way")
    chosen = parser.parse_args()
    if not (root := os.environ.get("RAYSV_DATA")):
        raise SystemExit("RAYSV_DATA must name the pack of real speech.")
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="raysv-against-") as cache:
        run(chosen.trials, chosen.seeds, root, cache)
    print(f"\n{report(chosen.seeds)}")


if __name__ == "__main__":
    main()
