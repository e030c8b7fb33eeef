import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raysv.search.results import METRIC, TIME, outcome
from raysv.search.stopping import JournaledASHA

EPOCHS = 9
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def asha(journal: Path, trials: str = "") -> JournaledASHA:
    """A scheduler with rungs at 1, 3 and 9 that knows trials named by single letters."""
    scheduler = JournaledASHA(journal, epochs=EPOCHS, grace_epochs=1, reduction_factor=3)
    assert scheduler.set_search_properties(METRIC, "min")
    for trial_id in trials:
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial_id))
    return scheduler


def judge(scheduler: Any, trial_id: str, epoch: int, eer: float) -> str:
    decision: str = scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial_id), {TIME: epoch, METRIC: eer})
    return decision


def test_the_worse_trials_of_a_rung_stop(tmp_path: Path) -> None:
    scheduler = asha(tmp_path / "journal", "abc")
    assert [judge(scheduler, trial, 1, eer) for trial, eer in (("a", 0.2), ("b", 0.3), ("c", 0.1))] == [
        CONTINUE,
        STOP,
        CONTINUE,
    ]


def test_a_killed_driver_judges_on_as_if_it_had_lived(tmp_path: Path) -> None:
    curve = [
        (trial, epoch, 0.3 + 0.01 * ((7 * number + epoch) % 5))
        for epoch in (1, 2, 3)
        for number, trial in enumerate("abcdef")
    ]
    reference = ASHAScheduler(
        time_attr=TIME, metric=METRIC, mode="min", max_t=EPOCHS, reduction_factor=3, stop_last_trials=False
    )
    for trial in "abcdef":
        reference.on_trial_add(None, SimpleNamespace(trial_id=trial))
    expected, seen, stopped = [], [], set()
    for trial, epoch, eer in curve:
        if trial in stopped:
            continue
        expected.append(judge(reference, trial, epoch, eer))
        seen.append(judge(asha(tmp_path / "journal", "abcdef"), trial, epoch, eer))  # a new driver for every result
        if seen[-1] == STOP:
            stopped.add(trial)
    assert seen == expected
    assert STOP in seen and CONTINUE in seen


def test_a_trial_that_was_stopped_stops_again_after_a_restore(tmp_path: Path) -> None:
    scheduler = asha(tmp_path / "journal", "ab")
    judge(scheduler, "a", 1, 0.1)
    assert judge(scheduler, "b", 1, 0.4) == STOP
    assert judge(asha(tmp_path / "journal", "ab"), "b", 2, 0.01) == STOP


def test_an_epoch_that_comes_again_is_not_judged_again(tmp_path: Path) -> None:
    scheduler = asha(tmp_path / "journal", "ab")
    judge(scheduler, "a", 1, 0.4)
    judge(scheduler, "b", 1, 0.1)
    assert judge(asha(tmp_path / "journal", "ab"), "a", 1, 0.4) == CONTINUE
    assert len((tmp_path / "journal").read_text().splitlines()) == 2


def test_a_trial_is_never_stopped_at_its_last_epoch(tmp_path: Path) -> None:
    scheduler = asha(tmp_path / "journal", "ab")
    judge(scheduler, "a", EPOCHS, 0.1)
    assert judge(scheduler, "b", EPOCHS, 0.4) == CONTINUE


def test_the_last_line_that_a_dying_driver_tore_is_removed(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    judge(asha(journal, "a"), "a", 1, 0.1)
    with journal.open("a") as file:
        file.write('{"trial": "b", "ep')
    assert judge(asha(journal, "bc"), "c", 1, 0.4) == STOP
    assert [json.loads(line)["trial"] for line in journal.read_text().splitlines()] == ["a", "c"]


def test_a_file_that_is_no_journal_is_named_with_its_line(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    judge(asha(journal, "a"), "a", 1, 0.1)
    with journal.open("a") as file:
        file.write("hello\n")
    with pytest.raises(ValueError, match=r"journal, line 2: not an entry"):
        asha(journal, "a")


def test_it_travels_in_the_snapshot_of_the_tuner(tmp_path: Path) -> None:
    scheduler = pickle.loads(pickle.dumps(JournaledASHA(tmp_path / "j", epochs=2, grace_epochs=4, reduction_factor=2)))
    assert scheduler.set_search_properties(METRIC, "min")
    scheduler.on_trial_add(None, SimpleNamespace(trial_id="a"))
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
