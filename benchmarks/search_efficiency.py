"""How much training a search needs to find a setting as good as the best: ways of searching, replayed over a table.

    python benchmarks/search_efficiency.py [--studies 500] [--parallel 1 8 64]

Over the learning curves of `loss_table.csv` (see `loss_table.py`), with Optuna's real samplers and Ray's real rules
of early stopping, set up as in raysv, with raysv's defaults where a row says nothing else. A study runs so many
trials at a time, an epoch of each takes as long as an epoch of any other, and as in raysv all its trials have one
training seed: one of the table's, so that half of the studies see one seed's curves and half the other's.

Told are: the training, in runs of all epochs, until a trial has come to its end with an EER within 2 % of the lowest
that the study's seed has in the table, which is one or two settings, and within 10 %, which is about what a setting's
EER deviates by from seed to seed; quartiles and the 90th percentile over studies, and the ratio of the median to that
of random search, in which no setting comes twice either, with its 90 % interval (bootstrap over studies: over what
samplers draw, not over tables).

raysv's grace was chosen on this table, and so its row is no prediction for others.

Confirmation itself is not counted: it costs all ways alike, twelve runs by default.
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
from loss_table import EPOCHS, GRID, SEEDS, TABLE
from optuna.trial import TrialState

from raysv.search.ranges import Range
from raysv.search.results import METRIC, TIME
from raysv.search.samplers import draw, make_sampler
from raysv.search.space import space_from_dict
from raysv.search.stopping import NOBODY, Entrant, make_rule

WITHIN = (1.02, 1.10)
RUNS = 160  # of all epochs: the training after which a study is given up
RANGES = {key: Range("int", (0, len(values) - 1)) for key, values in GRID.items()}
PUBLISHED = ({"margin": 0.2, "scale": 30.0, "temperature": 0.07, "strength": 0.5},)  # of the table's settings

Setting = tuple[int, ...]  # the place of each value in its list


@dataclass(frozen=True)
class Way:
    """A way of searching; None is raysv's default.

    Attributes:
        published: whether the paper's setting is tried first.
        once: whether, as in raysv, no setting is tried twice; the study ends when there are no more.
    """

    sampler: str
    early_stopping: str
    published: bool = True
    grace_epochs: int | None = None
    reduction_factor: int | None = None
    once: bool = True


WAYS = {
    "raysv: TPE, ASHA": Way("tpe", "asha"),
    "the same without the paper's setting": Way("tpe", "asha", published=False),
    "the same, settings may come again": Way("tpe", "asha", once=False),
    "TPE, ASHA, grace of a ninth": Way("tpe", "asha", grace_epochs=2),
    "TPE, ASHA, grace of a third": Way("tpe", "asha", grace_epochs=6),
    "TPE, ASHA, half go on": Way("tpe", "asha", reduction_factor=2),
    "TPE, Hyperband": Way("tpe", "hyperband"),
    "TPE, median rule": Way("tpe", "median"),
    "TPE, no early stopping": Way("tpe", "none"),
    "random, ASHA": Way("random", "asha", published=False),
    "random search": Way("random", "none", published=False),
    "random search, settings may come again": Way("random", "none", published=False, once=False),
}
REFERENCE = "random search"


class Table:
    """Curves by setting, `(seeds, epochs)` each.

    Raises: SystemExit where a setting lacks one of the seeds or epochs.
    """

    def __init__(self, file: Path) -> None:
        rows: dict[Setting, dict[tuple[int, int], float]] = {}
        with file.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines), 2):
                try:
                    setting = tuple(values.index(float(row[key])) for key, values in GRID.items())
                except ValueError as error:
                    raise SystemExit(f"{file}, line {number}: a setting that is not of the grid.") from error
                rows.setdefault(setting, {})[int(row["seed"]), int(row["epoch"])] = float(row["dev_eer"])
        settings = list(itertools.product(*map(range, map(len, GRID.values()))))
        wanted = [(seed, epoch) for seed in SEEDS for epoch in range(1, EPOCHS + 1)]
        if missing := [setting for setting in settings if not rows.get(setting, {}).keys() >= set(wanted)]:
            raise SystemExit(
                f"{len(missing)} of {len(settings)} settings are not complete in {file}: go on with loss_table.py."
            )
        self.curves = {
            setting: np.array([rows[setting][key] for key in wanted]).reshape(len(SEEDS), EPOCHS)
            for setting in settings
        }
        self.lowest = np.min([curves[:, -1] for curves in self.curves.values()], axis=0)  # by seed

    def describe(self) -> str:
        """What there is to be found."""
        last = 100 * np.array([curves[:, -1] for curves in self.curves.values()])
        lowest, means = last.min(0), last.mean(1)
        good = [(last <= within * lowest).sum(0) for within in WITHIN]
        between, agree = np.sqrt(last.var(1, ddof=1).mean()), np.corrcoef(last.T)[0, 1]
        found = ", ".join(
            f"{eer:.2f} % ({few} settings within 2 %, {many} within 10 %)"
            for eer, few, many in zip(lowest, *good, strict=True)
        )
        return (
            f"{len(means)} settings. Lowest EER by seed: {found}. Of the means over seeds the lowest is "
            f"{means.min():.2f} %, the median {np.median(means):.2f}, the highest {means.max():.2f}.\n"
            f"A setting's seeds deviate by {between:.2f} points, settings by {means.std():.2f}; over settings, the "
            f"seeds correlate by {agree:.2f}."
        )


Needs = tuple[float, ...]  # the training until something good was found, for each of `WITHIN`; infinite if it was not


def study(table: Table, way: Way, parallel: int, number: int) -> Needs:
    """One simulated study; its number is its sampler's seed and, by turns, chooses the training seed."""
    generator, training_seed = np.random.default_rng(number), number % len(SEEDS)
    search = optuna.create_study(sampler=make_sampler(way.sampler, RANGES, number))
    for point in PUBLISHED if way.published else ():
        search.enqueue_trial({key: GRID[key].index(value) for key, value in point.items()})
    defaults = space_from_dict({"training": {"epochs": EPOCHS}}, "defaults")
    rule = make_rule(
        way.early_stopping,
        epochs=EPOCHS,
        grace_epochs=way.grace_epochs or defaults.grace_epochs,
        reduction_factor=way.reduction_factor or defaults.search.reduction_factor,
    )
    if rule:
        rule.set_search_properties(METRIC, "min")
    running: list[tuple[float, int, int, optuna.Trial, Setting]] = []
    tried: set[tuple[int, ...]] | None = set() if way.once else None
    most = len(table.curves) if way.once else None  # then there is no more
    needs, trained = [np.inf] * len(WITHIN), 0
    numbers = itertools.count()

    def start(now: float) -> None:
        number = next(numbers)
        if most is not None and number >= most:
            return
        trial = draw(search, RANGES, tried)
        setting = tuple(trial.params[key] for key in GRID)
        if rule:
            rule.on_trial_add(NOBODY, Entrant(str(number), number))
        # trials that start together end their epochs in no order of theirs
        heapq.heappush(running, (now + 1 + 1e-6 * generator.random(), number, 1, trial, setting))

    for _ in range(parallel):
        start(0.0)
    while running and trained < RUNS * EPOCHS:
        now, number, epoch, trial, setting = heapq.heappop(running)
        trained += 1
        eer = float(table.curves[setting][training_seed, epoch - 1])
        trial.report(eer, epoch)
        if epoch < EPOCHS and not _stops(rule, number, epoch, eer):
            heapq.heappush(running, (now + 1, number, epoch + 1, trial, setting))
        else:
            if epoch == EPOCHS:
                search.tell(trial, eer)
                for place, within in enumerate(WITHIN):
                    if eer <= within * table.lowest[training_seed]:
                        needs[place] = min(needs[place], trained / EPOCHS)
            else:
                search.tell(trial, state=TrialState.PRUNED)
            start(now)
    return tuple(needs)


def _stops(rule: object, number: int, epoch: int, eer: float) -> bool:
    if rule is None:
        return False
    entrant = Entrant(str(number), number)
    return bool(rule.on_trial_result(NOBODY, entrant, {TIME: epoch, METRIC: eer}) == "STOP")  # type: ignore[attr-defined]


def _quiet(table: Table, way: Way, parallel: int, number: int) -> Needs:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return study(table, way, parallel, number)


def measure(table: Table, parallel: int, studies: int, processes: int) -> Iterator[tuple[str, list[Needs]]]:
    """What each way comes to, over studies that differ in their number alone."""
    with Pool(processes) as pool:
        for name, way in WAYS.items():
            yield name, pool.map(partial(_quiet, table, way, parallel), range(studies), chunksize=1)


def ratio(needs: np.ndarray, reference: np.ndarray) -> str:
    """The ratio of two medians with its 90 % interval over studies; a dash where it is not finite."""
    generator = np.random.default_rng(0)

    def drawn(values: np.ndarray) -> np.ndarray:
        return np.median(values[generator.integers(len(values), size=(1000, len(values)))], axis=1)

    with np.errstate(invalid="ignore"):
        low, high = np.quantile(drawn(needs) / drawn(reference), [0.05, 0.95], method="nearest")
        middle = np.median(needs) / np.median(reference)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if np.isfinite([low, middle, high]).all() else "–"


def show(outcomes: Mapping[str, list[Needs]], parallel: int) -> str:
    """A table of quartiles and ratios for each of `WITHIN`."""
    lines = []
    for place, within in enumerate(WITHIN):
        needs = {name: np.array([needs[place] for needs in many]) for name, many in outcomes.items()}
        lines += [
            f"{parallel} at a time: runs of all epochs until within {100 * (within - 1):.0f} % of the lowest EER",
            "",
        ]
        lines += ["| | lower quartile | median | upper quartile | 90th percentile | median to random search's |"]
        lines += ["|---" * 6 + "|"]
        for name, need in needs.items():
            quantiles = (f"{value:.1f}" for value in np.quantile(need, [0.25, 0.5, 0.75, 0.9], method="nearest"))
            beside = "1" if name == REFERENCE else ratio(need, needs[REFERENCE])
            lines.append(f"| {name} | {' | '.join(quantiles)} | {beside} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Print what each way needs and finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    table = Table(chosen.table)
    print(f"{table.describe()}\n")
    for parallel in chosen.parallel:
        print(show(dict(measure(table, parallel, chosen.studies, chosen.processes)), parallel) + "\n", flush=True)


if __name__ == "__main__":
    main()
