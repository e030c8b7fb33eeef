"""What a search over margin, scale, temperature and augmentation strength searches: a table of learning curves.

    RAYSV_DATA=PACK python benchmarks/loss_table.py [--processes 2] [--minutes 60]

Trains a narrow ECAPA-TDNN with every setting of a grid, to the end, from two seeds, on the real speech of the pack, and
writes each run's EER on the dev pairs after every epoch into `benchmarks/loss_table.csv`. So a search can be replayed
over it in milliseconds, thousands of times (`search_efficiency.py`), by anybody. Every finished run is in the file: a
broken-off table goes on where it stopped. `docs/loss_table.md` says what the columns are and what the table shows.

Processes of one thread each, in float32, so that the table does not depend on how many cores made it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from raysv.config import config_from_dict
from raysv.learning.training import DivergedError, Metrics, fit

TABLE = Path(__file__).with_name("loss_table.csv")
EPOCHS, SEEDS = 18, (0, 1)
GRID = {  # the paper's setting is one of them, and so is no augmentation at all
    "margin": (0.0, 0.2, 0.4),
    "scale": (15.0, 30.0, 60.0),
    "temperature": (0.03, 0.07, 0.2),
    "strength": (0.0, 0.5, 1.0),
}
CONFIG: dict[str, dict[str, Any]] = {
    "data": {
        "dev_pairs": "trials_speechocean_dev.txt",
        "test_pairs": {
            "speechocean": "trials_speechocean_eval.txt",
            "ravdess": "trials_ravdess.txt",
            "urdu": "trials_urdu.txt",
        },
        "utterances": ["dev.csv", "eval.csv", "speech/ravdess/utterances.csv", "speech/urdu/utterances.csv"],
        "noise": "noise/noise.csv",
        "rir": "rir/rir.csv",
    },
    "batch": {"speakers": 32, "utterances_per_speaker": 2, "views": 2, "crop_seconds": 1.5},
    "model": {"channels": 32, "embedding_dim": 64},
    "optimizer": {"learning_rate": 3e-3},
}
TESTS = tuple(f"{name}_eer" for name in ("speechocean", "ravdess", "urdu"))
COLUMNS = (*GRID, "seed", "epoch", "dev_eer", "dev_min_dcf_0.01", "epoch_seconds", *TESTS)

Setting = tuple[float, ...]  # a value for each key of the grid
Run = tuple[Setting, int]  # and a seed


def runs() -> Iterator[Run]:
    """All runs, in an order in which any beginning of it is spread over the whole grid; the first seed first.

    The settings' numbers are multiplied by one that has no factor in common with how many they are.
    """
    settings = list(itertools.product(*GRID.values()))
    stride = 50  # near the golden section of 81
    for seed in SEEDS:
        for number in range(len(settings)):
            yield settings[number * stride % len(settings)], seed


def learn(values: Mapping[str, float], seed: int, root: str, cache: str, epochs: int = EPOCHS) -> list[Metrics]:
    """Train with a setting to the end; the metrics after each epoch, after the last those on the test lists too."""
    torch.set_num_threads(1)
    tree = CONFIG | {
        "data": CONFIG["data"] | {"root": root, "cache": cache},
        "loss": {key: values[key] for key in ("margin", "scale", "temperature")},
        "augment": {"strength": values["strength"]},
        "training": {"epochs": epochs, "seed": seed, "precision": "fp32"},
    }
    history: list[Metrics] = []
    try:
        fit(config_from_dict(tree), lambda metrics, _: history.append(metrics), tests=True)
    except DivergedError:  # as in a study: as good as guessing from then on
        chance = {"dev/eer": 0.5, "dev/min_dcf_0.01": 1.0, "speed/epoch_seconds": 0.0}
        history += [chance | {"epoch": epoch} for epoch in range(len(history) + 1, epochs + 1)]
    return history


def train(run: Run, root: str, cache: str) -> list[dict[str, Any]]:
    """One run to its end; its rows of the table."""
    setting, seed = run
    values = dict(zip(GRID, setting, strict=True))
    return [
        values
        | {
            "seed": seed,
            "epoch": int(metrics["epoch"]),
            "dev_eer": f"{metrics['dev/eer']:.5f}",
            "dev_min_dcf_0.01": f"{metrics['dev/min_dcf_0.01']:.4f}",
            "epoch_seconds": f"{metrics['speed/epoch_seconds']:.2f}",
        }
        | {name: f"{metrics[key]:.5f}" for name in TESTS if (key := name.replace("_eer", "/eer")) in metrics}
        for metrics in learn(values, seed, root, cache)
    ]


def finished(table: Path = TABLE) -> set[Run]:
    """The runs whose last epoch is in the table."""
    if not table.exists():
        return set()
    with table.open(newline="", encoding="utf-8") as file:
        return {
            (tuple(float(row[key]) for key in GRID), int(row["seed"]))
            for row in csv.DictReader(file)
            if int(row["epoch"]) == EPOCHS
        }


def append(rows: list[dict[str, Any]], table: Path = TABLE) -> None:
    """Add a run to the table, in one write: a process that is killed leaves whole runs."""
    with tempfile.SpooledTemporaryFile(mode="w+", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if not table.exists():
            writer.writeheader()
        writer.writerows(rows)
        lines.seek(0)
        text = lines.read()
    with table.open("a", encoding="utf-8") as file:
        file.write(text)


def summary(table: Path = TABLE) -> str:
    """What the finished runs say: the best settings, each value's mean, and how early an epoch tells the last."""
    done = finished(table)
    curves: dict[Run, dict[int, dict[str, str]]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            run = tuple(float(row[key]) for key in GRID), int(row["seed"])
            if run in done:
                curves.setdefault(run, {})[int(row["epoch"])] = row
    dev = {run: 100 * np.array([float(curve[epoch + 1]["dev_eer"]) for epoch in range(EPOCHS)])
           for run, curve in curves.items()}  # fmt: skip
    last = {run: curve[-1] for run, curve in dev.items()}
    means: dict[Setting, list[float]] = {}
    for (setting, _), eer in last.items():
        means.setdefault(setting, []).append(eer)
    ranked = sorted((float(np.mean(eers)), setting) for setting, eers in means.items())
    lines = [f"{len(done)} runs of {len(means)} settings; EER in % on the dev pairs after epoch {EPOCHS}", ""]
    lines += [f"best: {mean:5.2f}  {dict(zip(GRID, setting, strict=True))}" for mean, setting in ranked[:5]]
    lines += [f"paper: {mean:.2f}" for mean, setting in ranked if setting == (0.2, 30.0, 0.07, 0.5)]
    lines += [f"worst: {ranked[-1][0]:4.2f}  {dict(zip(GRID, ranked[-1][1], strict=True))}", ""]
    for place, (key, values) in enumerate(GRID.items()):
        by_value = {value: [eer for (run, _), eer in last.items() if run[place] == value] for value in values}
        told = (f"{value:g}: {np.mean(eers):.2f}" for value, eers in by_value.items())
        lines.append(f"mean by {key:11}  {'   '.join(told)}")
    matrix = np.array(list(dev.values()))
    told = (f"{epoch}: {spearmanr(matrix[:, epoch - 1], matrix[:, -1])[0]:.2f}" for epoch in (1, 2, 3, 4, 6, 9, 12, 18))
    lines += ["", f"rank correlation of an epoch's EER with the last one's   {'   '.join(told)}"]
    for name in TESTS:
        tested = [100 * float(curve[EPOCHS][name]) for curve in curves.values()]
        lines.append(f"rank correlation of dev with {name:16} {spearmanr(list(last.values()), tested)[0]:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further run after so long")
    parser.add_argument("--show", action="store_true", help="train nothing, tell what is there")
    arguments = parser.parse_args()
    if arguments.show:
        print(summary())
        return
    if not (root := os.environ.get("RAYSV_DATA")):
        raise SystemExit("RAYSV_DATA must name the pack of real speech.")
    done = finished()
    missing = [run for run in runs() if run not in done]
    count, total, started = len(done), len(done) + len(missing), time.monotonic()
    print(f"{count} of {total} runs are in {TABLE.name}", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="raysv-table-") as cache,
        ProcessPoolExecutor(arguments.processes, mp_context=context) as pool,
    ):
        waiting: set[Future[list[dict[str, Any]]]] = set()
        while waiting or missing:
            if (time.monotonic() - started) / 60 > arguments.minutes:
                missing.clear()
            while missing and len(waiting) < arguments.processes:
                waiting.add(pool.submit(train, missing.pop(0), root, cache))
            over, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(over, key=lambda future: future.exception() is not None):  # what is good is kept first
                append(future.result())
                count, last = count + 1, future.result()[-1]
                told = "  ".join(f"{key} {last[key]}" for key in (*GRID, "seed", "dev_eer"))
                print(f"{(time.monotonic() - started) / 60:6.1f} min  {count} of {total}  {told}", flush=True)


if __name__ == "__main__":
    main()
