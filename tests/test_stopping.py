import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from raysv.search.results import METRIC, TIME, outcome
from raysv.search.stopping import bracket_of, make_stopping

EPOCHS = 9
RULES = ("asha", "hyperband", "median")
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def trial(name: str) -> Any:
    """A trial of Tune as schedulers see it: `a` is the first, `b` the second."""
    return SimpleNamespace(trial_id=name, experiment_tag=f"{ord(name) - ord('a') + 1}_margin=0.2")


def stopping(journal: Path, trials: str = "", kind: str = "asha", grace: int = 1) -> Any:
    """A scheduler, with rungs at 1, 3 and 9 where it has any, that knows trials named by single letters."""
    scheduler = make_stopping(kind, journal, epochs=EPOCHS, grace_epochs=grace, reduction_factor=3)
    assert scheduler is not None and scheduler.set_search_properties(METRIC, "min")
    for name in trials:
        scheduler.on_trial_add(None, trial(name))
    return scheduler


def judge(scheduler: Any, name: str, epoch: int, eer: float) -> str:
    decision: str = scheduler.on_trial_result(None, trial(name), {TIME: epoch, METRIC: eer})
    return decision


def curves(names: str, epochs: int) -> list[tuple[str, int, float]]:
    """Results of trials side by side, some of which cross."""
    order = [(name, epoch) for epoch in range(1, epochs + 1) for name in names]
    return [(name, epoch, 0.3 - 0.01 * epoch + 0.01 * ((7 * ord(name) + epoch) % 5)) for name, epoch in order]


def decisions(judged: Any, results: list[tuple[str, int, float]]) -> list[tuple[str, int, str]]:
    """What is decided on each result; nothing more comes from a trial that was stopped."""
    stopped: set[str] = set()
    seen = []
    for name, epoch, eer in results:
        if name not in stopped:
            seen.append((name, epoch, judged(name, epoch, eer)))
            if seen[-1][-1] == STOP:
                stopped.add(name)
    return seen


def test_the_worse_trials_of_a_rung_stop(tmp_path: Path) -> None:
    scheduler = stopping(tmp_path / "journal", "abc")
    assert [judge(scheduler, name, 1, eer) for name, eer in (("a", 0.2), ("b", 0.3), ("c", 0.1))] == [
        CONTINUE,
        STOP,
        CONTINUE,
    ]


def test_what_is_worse_than_the_median_of_the_others_stops(tmp_path: Path) -> None:
    scheduler = stopping(tmp_path / "journal", "abcde", "median", grace=2)
    results = [("a", 0.2), ("b", 0.3), ("c", 0.25), ("d", 0.4), ("e", 0.1)]
    assert {judge(scheduler, name, 1, eer) for name, eer in results} == {CONTINUE}
    assert [judge(scheduler, name, 2, eer) for name, eer in results] == [CONTINUE, CONTINUE, CONTINUE, STOP, CONTINUE]


def of_ray(kind: str) -> Any:
    """Ray's own rule, fed by hand, without our journal."""
    if kind == "median":
        rule: Any = MedianStoppingRule(TIME, METRIC, "min", grace_period=1, min_time_slice=math.inf)
    else:
        rule = ASHAScheduler(
            time_attr=TIME, metric=METRIC, mode="min", max_t=EPOCHS, reduction_factor=3, stop_last_trials=False,
            brackets=3 if kind == "hyperband" else 1,
        )  # fmt: skip
    for number, name in enumerate("abcdef"):
        rule.on_trial_add(None, trial_by_id(name))
        if kind == "hyperband":
            rule._trial_info[name] = rule._brackets[bracket_of(number, 3, 3)]
    return rule


@functools.cache
def trial_by_id(name: str) -> Any:
    """One object for each trial: Ray's median rule tells them apart by identity."""

    class Trial:
        trial_id = name

    return Trial()


@pytest.mark.parametrize("kind", RULES)
def test_a_driver_that_is_killed_after_every_result_decides_what_ray_would_have(tmp_path: Path, kind: str) -> None:
    results = curves("abcdef", EPOCHS - 1)
    reference = of_ray(kind)
    expected = decisions(
        lambda name, epoch, eer: reference.on_trial_result(None, trial_by_id(name), {TIME: epoch, METRIC: eer}), results
    )
    seen = decisions(
        lambda name, epoch, eer: judge(stopping(tmp_path / "journal", "abcdef", kind), name, epoch, eer), results
    )
    assert seen == expected
    assert {decision for *_, decision in seen} == {CONTINUE, STOP}


def test_nobody_watches_where_all_are_trained_to_the_end(tmp_path: Path) -> None:
    assert make_stopping("none", tmp_path, epochs=EPOCHS, grace_epochs=1, reduction_factor=3) is None


@pytest.mark.parametrize(
    ("epochs", "grace", "rungs"), [(9, 1, [1, 3, 9]), (8, 1, [1, 3]), (27, 2, [2, 6, 18]), (4, 9, [4])]
)
def test_rungs_lie_at_powers_of_the_reduction_factor_also_where_logarithms_round(
    tmp_path: Path, epochs: int, grace: int, rungs: list[int]
) -> None:
    scheduler: Any = make_stopping("hyperband", tmp_path, epochs=epochs, grace_epochs=grace, reduction_factor=3)
    brackets = [[rung for rung, _ in bracket._rungs[::-1]] for bracket in scheduler._rule._brackets]
    assert brackets == [rungs[first:] for first in range(len(rungs))]


def test_brackets_are_shared_out_as_in_hyperband() -> None:
    chosen = [bracket_of(number, 3, 3) for number in range(17 * 2)]
    assert [chosen[:17].count(bracket) for bracket in range(3)] == [9, 5, 3]  # ⌈3/3·9⌉, ⌈3/2·3⌉, ⌈3/1·1⌉
    assert chosen[:17] == chosen[17:]
    assert set(chosen[:4]) == {0, 1, 2}  # no bracket waits for long


def test_a_trial_that_was_stopped_stops_again_after_a_restore(tmp_path: Path) -> None:
    scheduler = stopping(tmp_path / "journal", "ab")
    judge(scheduler, "a", 1, 0.1)
    assert judge(scheduler, "b", 1, 0.4) == STOP
    assert judge(stopping(tmp_path / "journal", "ab"), "b", 2, 0.01) == STOP


def test_an_epoch_that_comes_again_is_not_judged_again(tmp_path: Path) -> None:
    scheduler = stopping(tmp_path / "journal", "ab")
    judge(scheduler, "a", 1, 0.4)
    judge(scheduler, "b", 1, 0.1)
    assert judge(stopping(tmp_path / "journal", "ab"), "a", 1, 0.4) == CONTINUE
    assert len((tmp_path / "journal").read_text().splitlines()) == 2


def test_a_trial_is_never_stopped_at_its_last_epoch(tmp_path: Path) -> None:
    scheduler = stopping(tmp_path / "journal", "ab")
    judge(scheduler, "a", EPOCHS, 0.1)
    assert judge(scheduler, "b", EPOCHS, 0.4) == CONTINUE


def test_the_last_line_that_a_dying_driver_tore_is_removed(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    judge(stopping(journal, "a"), "a", 1, 0.1)
    with journal.open("a") as file:
        file.write('{"trial": "b", "ep')
    assert judge(stopping(journal, "bc"), "c", 1, 0.4) == STOP
    assert [json.loads(line)["trial"] for line in journal.read_text().splitlines()] == ["a", "c"]


def test_a_file_that_is_no_journal_is_named_with_its_line(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    judge(stopping(journal, "a"), "a", 1, 0.1)
    with journal.open("a") as file:
        file.write("hello\n")
    with pytest.raises(ValueError, match=r"journal, line 2: not an entry"):
        stopping(journal, "a")


@pytest.mark.parametrize("kind", RULES)
def test_it_travels_in_the_snapshot_of_the_tuner(tmp_path: Path, kind: str) -> None:
    made = make_stopping(kind, tmp_path / "j", epochs=2, grace_epochs=4, reduction_factor=2)
    scheduler = cloudpickle.loads(cloudpickle.dumps(made))
    assert scheduler.set_search_properties(METRIC, "min")
    scheduler.on_trial_add(None, trial("a"))
    assert judge(scheduler, "a", 1, 0.4) == CONTINUE


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({TIME: 9, METRIC: 0.1}, ("complete", "")),
        ({TIME: 8, METRIC: 0.1}, ("pruned", "")),
        ({TIME: 9, METRIC: 0.5, "failure": "NaN"}, ("error", "NaN")),
        ({"trial_id": "a"}, ("error", "The trial ended without reporting a result.")),
    ],
)
def test_an_outcome_follows_from_the_last_result(result: dict[str, Any], expected: tuple[str, str]) -> None:
    assert outcome(result, EPOCHS) == expected
