"""When a trial is stopped early: Ray's rules, with a memory."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raysv.search.results import METRIC, TIME, trial_number

FEWEST_OTHERS = 3  # trials whose median is worth comparing with
NOBODY: Any = None  # in place of Tune's controller, which these rules do not ask


def make_stopping(
    kind: str, journal: Path, *, epochs: int, grace_epochs: int, reduction_factor: int
) -> TrialScheduler | None:
    """What stops a study's trials early, see `make_rule`, with a memory; None where all are trained to the end.

    Args:
        journal: see `JournaledStopping`.
    """
    rule = make_rule(kind, epochs=epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
    return JournaledStopping(journal, rule, epochs=epochs) if rule else None


def make_rule(kind: str, *, epochs: int, grace_epochs: int, reduction_factor: int) -> TrialScheduler | None:
    """The rule by which trials are stopped early, one of Ray's; None where all are trained to the end.

    Args:
        kind: `asha`, `hyperband`, `median` or `none`, see `SearchConfig.early_stopping`.
        epochs: of a trial that is not stopped early.
        grace_epochs: no trial stops before it; the first rung.
        reduction_factor: rungs lie at `grace_epochs` times its powers; of the trials that reach a rung, about one in
            `reduction_factor` goes on.

    Source: Li et al. 2020, arXiv 1810.05934 (ASHA, and Hyperband without waiting); Golovin et al. 2017, Google Vizier,
        KDD (the median rule).
    """
    grace = min(grace_epochs, epochs)
    rungs = {"time_attr": TIME, "max_t": epochs, "grace_period": grace, "reduction_factor": reduction_factor}
    if kind == "asha":
        return ASHAScheduler(**rungs, stop_last_trials=False)
    if kind == "hyperband":
        return _Hyperband(**rungs, stop_last_trials=False, brackets=_powers(epochs / grace, reduction_factor) + 1)
    if kind == "median":
        # a time slice without end: nothing is paused, which would take the trial's process away
        return MedianStoppingRule(
            time_attr=TIME, grace_period=grace, min_samples_required=FEWEST_OTHERS, min_time_slice=math.inf
        )
    return None


@dataclass(frozen=True)
class Entrant:
    """A trial as rules know it: they see no others, so that one that is recalled is the same as one that lives."""

    trial_id: str
    number: int


class JournaledStopping(FIFOScheduler):
    """A rule over epochs whose memory survives the driver: a journal of every result and of what was decided on it.

    Ray saves no scheduler's state, so after a restore its ASHA would judge against empty rungs
    (https://github.com/ray-project/ray/issues/30838). Here the journal is replayed before the first trial is added.
    A decision stays made: a trial that was stopped stops again, and an epoch that comes again is not judged again.

    The last epoch is not judged at all: that trial is about to return by itself, and there is nothing left to save.

    Args:
        journal: JSON lines, one per result; written by the driver alone. A new study needs a new journal.
        rule: one of Ray's; it only ever answers CONTINUE or STOP.
        epochs: of a trial that is not stopped early.

    Raises: ValueError, when the first trial is added, naming the file and line that is not the journal of such a study.
    """

    def __init__(self, journal: Path, rule: TrialScheduler, *, epochs: int) -> None:
        super().__init__()
        self._journal, self._rule, self._epochs = Path(journal), rule, epochs
        self._entrants: dict[str, Entrant] = {}
        self._judged: dict[str, int] = {}  # trial → its last epoch in the journal
        self._stopped: set[str] = set()
        self._replayed = False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """What the rule compares, and whether less is more."""
        return bool(self._rule.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Place a trial, the first time after recalling what earlier drivers decided."""
        if not self._replayed:
            self._replayed = True
            for entry in read_journal(self._journal):
                self._recall(**entry)
        self._enter(trial.trial_id, trial_number(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """`STOP` or `CONTINUE`, written to the journal before Tune hears of it."""
        name, epoch, value = trial.trial_id, int(result[TIME]), float(result[METRIC])
        if name in self._stopped:
            return TrialScheduler.STOP
        if epoch <= self._judged.get(name, 0) or epoch >= self._epochs:
            return TrialScheduler.CONTINUE
        entrant = self._entrants[name]
        decision = str(self._rule.on_trial_result(NOBODY, entrant, {TIME: epoch, METRIC: value}))
        self._note(name, epoch, stop=decision == TrialScheduler.STOP)
        stop = name in self._stopped
        self._append({"trial": name, "number": entrant.number, "epoch": epoch, "value": value, "stop": stop})
        return decision

    def _recall(self, trial: str, epoch: int, value: float, stop: bool, number: int = 0) -> None:
        self._rule.on_trial_result(NOBODY, self._enter(trial, number), {TIME: epoch, METRIC: value})
        self._note(trial, epoch, stop)

    def _enter(self, name: str, number: int) -> Any:
        if name not in self._entrants:
            self._entrants[name] = Entrant(name, number)
            self._rule.on_trial_add(NOBODY, self._entrants[name])
        return self._entrants[name]

    def _note(self, trial: str, epoch: int, stop: bool) -> None:
        self._judged[trial] = epoch
        if stop:
            self._stopped.add(trial)

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class _Hyperband(ASHAScheduler):
    """ASHA in brackets, of which each leaves its trials alone for longer than the one before; the last for good.

    Ray draws a trial's bracket from NumPy's global generator. Here it follows from the trial's number, with the shares
    of Hyperband, so that a study can be repeated and resumed.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        chosen = bracket_of(trial.number, len(self._brackets), self._reduction_factor)
        self._trial_info[trial.trial_id] = self._brackets[chosen]


def bracket_of(number: int, brackets: int, reduction_factor: float) -> int:
    """The bracket of the trial of this number, from 0: all get their shares as evenly as goes.

    Bracket s of B, counted from the one that stops earliest, gets ⌈B/(B−s) · r^(B−1−s)⌉ trials of every round.

    Source: Li et al. 2018, Hyperband, arXiv 1603.06560, algorithm 1.
    """
    last = brackets - 1
    shares = [math.ceil(brackets / (last - s + 1) * reduction_factor ** (last - s)) for s in range(brackets)]
    credit = [0] * brackets
    chosen = 0
    for _ in range(number % sum(shares) + 1):
        credit = [had + share for had, share in zip(credit, shares, strict=True)]
        chosen = max(range(brackets), key=credit.__getitem__)
        credit[chosen] -= sum(shares)
    return chosen


def _powers(ratio: float, base: float) -> int:
    """How often a number can be divided by another before it is below 1, less once: ⌊log⌋ without its rounding."""
    return sum(1 for _ in itertools.takewhile(lambda power: base**power <= ratio, itertools.count(1)))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal; a last line that a dying driver tore off is removed from the file.

    Raises: ValueError naming the line that is no entry.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or entry.keys() - {"number"} != {"trial", "epoch", "value", "stop"}:
            raise ValueError(
                f"{path}, line {number}: not an entry of the journal of early stopping: {line[:80]!r}. "
                "Remove that line, or start the study anew under another name."
            )
        entries.append(entry)
    return entries
