"""How much training a search needs to find a setting as good as the best: ways of searching, replayed over a table.

    python benchmarks/search_efficiency.py [--studies 200] [--parallel 1 8 64]

Over the learning curves of `loss_table.csv` (see `loss_table.py`), with Optuna's real samplers and Ray's real rules
of early stopping, set up as in raysv, with raysv's defaults where a row says nothing else. A study runs so many
trials at a time, an epoch of each takes as long as an epoch of any other, and a trial's EERs are those of one of the
table's seeds, drawn for it. What a study would hand over at a moment is the trial with the lowest last EER of those
that came to their end; what that setting is worth is its mean over the seeds (of two, one of which the trial was:
that flatters every way alike). Shown is the training, in runs of all epochs, until what would be handed over is
within 2 % of the table's best, as quartiles and the 90th percentile over studies. A study is given up, and counted as
endless, when it has trained as many epochs as all settings have from one seed. What confirming the winner costs is
not in it: it is the same for every way.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import optuna
from loss_table import EPOCHS, GRID, TABLE
from optuna.trial import TrialState

from raysv.search.results import METRIC, TIME
from raysv.search.samplers import make_sampler
from raysv.search.space import Range, space_from_dict
from raysv.search.stopping import NOBODY, Entrant, make_rule

WITHIN = 1.02
RANGES = {key: Range("int", (0, len(values) - 1)) for key, values in GRID.items()}
PUBLISHED = ({"margin": 0.2, "scale": 30.0, "temperature": 0.07, "strength": 0.5},)  # of the table's settings


@dataclass(frozen=True)
class Way:
    """A way of searching; `published`, whether the paper's setting is tried first."""

    sampler: str
    early_stopping: str
    published: bool = True


WAYS = {
    "raysv: TPE, ASHA": Way("tpe", "asha"),
    "the same without the paper's setting": Way("tpe", "asha", published=False),
    "TPE, Hyperband": Way("tpe", "hyperband"),
    "TPE, median rule": Way("tpe", "median"),
    "TPE, no early stopping": Way("tpe", "none"),
    "Gaussian process, ASHA": Way("gp", "asha"),
    "random, ASHA": Way("random", "asha", published=False),
    "random after the paper's setting": Way("random", "none"),
    "random search": Way("random", "none", published=False),
    "grid": Way("grid", "none", published=False),
}


class Table:
    """Curves by setting and seed."""

    def __init__(self, file: Path) -> None:
        self.curves: dict[tuple[int, ...], list[list[float]]] = {}
        rows: dict[tuple[tuple[int, ...], int], list[tuple[int, float]]] = {}
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                setting = tuple(values.index(float(row[key])) for key, values in GRID.items())
                rows.setdefault((setting, int(row["seed"])), []).append((int(row["epoch"]), float(row["dev_eer"])))
        for (setting, _), curve in sorted(rows.items()):
            self.curves.setdefault(setting, []).append([eer for _, eer in sorted(curve)])
        missing = [setting for setting in itertools.product(*map(range, map(len, GRID.values())))
                   if setting not in self.curves]  # fmt: skip
        if missing:
            raise SystemExit(f"{len(missing)} settings are missing in {file}: go on with benchmarks/loss_table.py.")
        self.worth = {setting: float(np.mean([curve[-1] for curve in seeds])) for setting, seeds in self.curves.items()}
        self.best = min(self.worth.values())


def study(table: Table, way: Way, parallel: int, seed: int) -> float:
    """One simulated study; its training, in runs of all epochs, until it would hand over something good enough."""
    generator = np.random.default_rng(seed)
    search = optuna.create_study(sampler=make_sampler(way.sampler, RANGES, seed))
    for point in PUBLISHED if way.published else ():
        search.enqueue_trial({key: GRID[key].index(value) for key, value in point.items()})
    defaults = space_from_dict({"training": {"epochs": EPOCHS}}, "defaults")
    rule = make_rule(
        way.early_stopping,
        epochs=EPOCHS,
        grace_epochs=defaults.grace_epochs,
        reduction_factor=defaults.search.reduction_factor,
    )
    if rule:
        rule.set_search_properties(METRIC, "min")
    running: list[tuple[float, int, int, optuna.Trial, list[float]]] = []
    budget, trained, lowest = len(table.curves) * EPOCHS, 0, np.inf
    numbers = itertools.count()

    def start(now: float) -> None:
        trial = search.ask()
        setting = tuple(RANGES[key].suggest(trial, key) for key in GRID)
        seeds = table.curves[setting]
        number = next(numbers)
        if rule:
            rule.on_trial_add(NOBODY, Entrant(str(number), number))  # type: ignore[arg-type]
        # trials that start together end their epochs in no order of theirs
        later = now + 1 + 1e-6 * generator.random()
        heapq.heappush(running, (later, number, 1, trial, seeds[generator.integers(len(seeds))]))

    for _ in range(parallel):
        start(0.0)
    while trained < budget:
        now, number, epoch, trial, curve = heapq.heappop(running)
        trained += 1
        eer = curve[epoch - 1]
        trial.report(eer, epoch)
        if epoch < EPOCHS and not _stops(rule, number, epoch, eer):
            heapq.heappush(running, (now + 1, number, epoch + 1, trial, curve))
            continue
        if epoch == EPOCHS:
            search.tell(trial, eer)
            setting = tuple(trial.params[key] for key in GRID)
            if eer < lowest:
                lowest = eer
                if table.worth[setting] <= WITHIN * table.best:
                    return trained / EPOCHS
        else:
            search.tell(trial, state=TrialState.PRUNED)
        start(now)
    return np.inf


def _stops(rule: object, number: int, epoch: int, eer: float) -> bool:
    if rule is None:
        return False
    entrant = Entrant(str(number), number)
    return bool(rule.on_trial_result(NOBODY, entrant, {TIME: epoch, METRIC: eer}) == "STOP")  # type: ignore[attr-defined]


def _quiet(table: Table, way: Way, parallel: int, seed: int) -> float:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return study(table, way, parallel, seed)


def measure(table: Table, parallel: int, studies: int, processes: int) -> Iterator[tuple[str, np.ndarray]]:
    """What each way needs, over studies that differ in their seed alone."""
    with Pool(processes) as pool:
        for name, way in WAYS.items():
            yield name, np.array(pool.map(partial(_quiet, table, way, parallel), range(studies), chunksize=1))


def show(needs: Mapping[str, np.ndarray], parallel: int) -> str:
    """A table of quartiles, and the ratio of each median to that of random search."""
    lines = [f"{parallel} at a time: runs of all epochs until within 2 % of the best", ""]
    lines += ["| | lower quartile | median | upper quartile | 90th percentile | median over random search's |"]
    lines += ["|---|---|---|---|---|---|"]
    reference = np.median(needs["random search"])
    for name, need in needs.items():
        quantiles = (f"{value:.1f}" for value in np.quantile(need, [0.25, 0.5, 0.75, 0.9], method="nearest"))
        ratio = f"{np.median(need) / reference:.2f}" if np.isfinite(reference) else "–"
        lines.append(f"| {name} | {' | '.join(quantiles)} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Print what each way needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    table = Table(chosen.table)
    good = sum(worth <= WITHIN * table.best for worth in table.worth.values())
    print(f"{len(table.curves)} settings; best mean EER {100 * table.best:.2f} %, {good} settings within 2 % of it\n")
    for parallel in chosen.parallel:
        print(show(dict(measure(table, parallel, chosen.studies, chosen.processes)), parallel) + "\n", flush=True)


if __name__ == "__main__":
    main()
