import csv
import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune

from raysv.config import read_yaml
from raysv.search.confirmation import Candidate, Confirmation
from raysv.search.proposals import OptunaProposals
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space, space_from_dict
from raysv.search.study import (
    BEST_FILE,
    SPACE_FILE,
    STARTED_FILE,
    TRIALS_FILE,
    TUNE_FOLDER,
    Study,
    TrialRecord,
    driving,
    find_study,
    load_space,
    note_start,
    open_study,
    read_study,
    started,
)
from raysv.search.tuner import tune_settings

EPOCHS = 3
URI = "sqlite:////somewhere/mlflow.db"
TREE = {
    "loss": {"margin": {"uniform": [0.0, 0.5]}, "scale": {"choice": [30.0, 32.0]}},
    "training": {"epochs": EPOCHS},
    "search": {"trials": 4, "confirm": 0},
    "resources": {"workers": 2},
}


@pytest.fixture
def space() -> Space:
    return space_from_dict(TREE, "small")


def record(name: str, outcome: str, eer: float | None = None, epoch: int = EPOCHS, reason: str = "") -> TrialRecord:
    metrics = {} if eer is None else {TIME: epoch, METRIC: eer, "dev/min_dcf_0.01": 2 * eer}
    margin = int(name[1:]) / 10 + 1 / 3000
    return TrialRecord(
        name, f"id-{name}", {"loss.margin": margin, "loss.scale": 32.0}, metrics, outcome, reason, f"/trials/{name}"
    )


TRIALS = [
    record("t0", "complete", 0.3),
    record("t1", "pruned", 0.05, epoch=1),
    record("t2", "complete", 0.2),
    record("t3", "error", reason="ValueError: no file a.wav\nname another"),
    record("t4", "unfinished", 0.01, epoch=2),
    record("t5", "pruned", 0.4, epoch=2),
]


def test_the_best_trial_is_the_lowest_among_those_seen_to_their_end(space: Space) -> None:
    best = Study(space, TRIALS).best
    assert best is not None and best.name == "t2"
    assert Study(space, [trial for trial in TRIALS if trial.outcome != "complete"]).best is None
    assert Study(space, []).best is None


def test_trials_that_never_started_are_unfinished_too(space: Space) -> None:
    assert Study(space, []).unfinished == 4
    assert Study(space, TRIALS[:2]).unfinished == 2
    assert Study(space, [TRIALS[0], TRIALS[3], TRIALS[4]]).unfinished == 2
    assert Study(space, TRIALS[:4]).unfinished == 0
    assert Study(space, [*TRIALS[:4], TRIALS[5]]).unfinished == 0  # a kill may have left one too many


def test_the_table_ranks_by_how_far_a_trial_was_seen_and_then_by_its_eer(space: Space) -> None:
    assert Study(space, TRIALS).table().splitlines() == [
        "trial  margin    scale  epochs  EER %  minDCF .01  outcome",
        "t2     0.2       32     3       20.00  0.400       complete",
        "t0     0.000333  32     3       30.00  0.600       complete",
        "t5     0.5       32     2       40.00  0.800       pruned",
        "t1     0.1       32     1       5.00   0.100       pruned",
        "t3     0.3       32     0                          error: ValueError: no file a.wav",
        "t4     0.4       32     2       1.00   0.020       unfinished",
    ]


def test_a_study_without_trials_has_a_table_of_its_head(space: Space) -> None:
    assert Study(space, []).table() == "trial  margin  scale  epochs  EER %  minDCF .01  outcome"


def test_what_is_written_has_every_trial_and_every_digit(space: Space, tmp_path: Path) -> None:
    Study(space, TRIALS).write(tmp_path)
    with (tmp_path / TRIALS_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial.name for trial in TRIALS]
    assert float(rows[2]["loss.margin"]) == TRIALS[2].values["loss.margin"]
    assert rows[3] == {
        "trial": "t3",
        "trial_id": "id-t3",
        "outcome": "error",
        "reason": TRIALS[3].reason,
        "epoch": "0",
        "dev_eer": "",
        "loss.margin": str(0.3 + 1 / 3000),
        "loss.scale": "32.0",
        "checkpoint": "/trials/t3",
    }


def test_the_best_config_is_a_space_of_one_point_with_the_resources_of_the_study(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Study(space, TRIALS).write(tmp_path)
    written = (tmp_path / BEST_FILE).read_text()
    assert written.startswith("# The best of 6 trials of study small: trial t2 (id-t2), EER 20.00 % on the dev pairs.")
    assert f"# Train it alone with: python -m raysv.train {BEST_FILE}\n" in written
    assert read_yaml(tmp_path / BEST_FILE) == Study(space, TRIALS).best_config()
    best = space_from_dict(read_yaml(tmp_path / BEST_FILE), "best")
    assert best.ranges == {}
    assert best.config({}) == space.config(TRIALS[2].values)
    assert best.resources == space.resources


def test_without_a_complete_trial_there_is_no_best_config(space: Space, tmp_path: Path) -> None:
    Study(space, [TRIALS[1], TRIALS[3]]).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [TRIALS_FILE]
    with pytest.raises(ValueError, match="Study small has no best configuration: no trial has come to its end"):
        Study(space, [TRIALS[1], TRIALS[3]]).best_config()


def test_a_study_that_is_opened_keeps_what_it_searches(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path / "results", URI, "mine")
    assert folder == tmp_path / "results" / "mine"
    kept = load_space(folder)
    assert kept.to_dict() == space.to_dict()
    assert kept.name == "mine"
    start = started(folder)
    other = started(open_study(space, tmp_path / "elsewhere", URI, "mine"))
    assert start.pop("id") != other.pop("id")  # of one name, two studies all the same
    assert start == other == {"space": "small", "tracking_uri": URI}


def test_facts_about_a_start_are_added_to_those_before(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    before = started(folder)
    note_start(folder, concurrent_trials=3)
    note_start(folder, concurrent_trials=2)
    assert started(folder) == before | {"concurrent_trials": 2}


def test_facts_about_a_start_are_never_half_written(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    before = started(folder)
    os.link(folder / STARTED_FILE, tmp_path / "before.yaml")
    note_start(folder, concurrent_trials=3)
    assert read_yaml(tmp_path / "before.yaml") == before
    assert {file.name for file in folder.iterdir()} == {SPACE_FILE, STARTED_FILE}


def test_a_study_without_a_name_is_named_after_its_space_and_the_time(space: Space, tmp_path: Path) -> None:
    assert open_study(space, tmp_path, URI).name.startswith("small-")


def test_no_study_is_written_over(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    with pytest.raises(ValueError, match=r"There is a study .*mine already"):
        open_study(space, tmp_path, "http://elsewhere", "mine")
    assert started(folder)["tracking_uri"] == URI


def test_a_study_is_found_by_folder_by_name_and_by_the_name_of_its_space(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = (open_study(space, tmp_path / "results", URI, name) for name in ("small-1122-190000", "mine"))
    other = dataclasses.replace(space, name="other")
    of_another_space = open_study(other, tmp_path / "results", URI, "small-1122-200000")
    for folder in (older, newer, of_another_space):
        note_start(folder, concurrent_trials=1)
    open_study(space, tmp_path / "results", URI, "refused by its cluster")  # the newest of all, but it never ran
    for age, folder in enumerate((of_another_space, newer, older)):
        os.utime(folder / SPACE_FILE, (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert find_study(Path("results"), "results/small-1122-190000") == older
    assert find_study(Path("results"), "small-1122-190000") == older
    assert find_study(Path("results"), "small") == newer
    assert find_study(Path("results"), "other") == of_another_space


def test_a_study_that_is_not_there_is_an_error_that_lists_the_others(space: Space, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No study mine to be found. Studies in .*: none\."):
        find_study(tmp_path, "mine")
    open_study(space, tmp_path, URI, "yours")
    with pytest.raises(ValueError, match=r"Studies in .*: yours\."):
        find_study(tmp_path, "mine")


def test_a_folder_that_is_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is no study: it has no {SPACE_FILE}"):
        read_study(tmp_path)


def test_a_study_that_was_broken_off_at_once_has_no_trials(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    assert read_study(folder).trials == []
    (folder / TUNE_FOLDER).mkdir()  # Tune makes it before it has anything to note
    assert read_study(folder).trials == []


def test_a_record_that_a_dying_driver_tore_is_named(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    (folder / TUNE_FOLDER).mkdir()
    (folder / TUNE_FOLDER / "experiment_state-2026.json").write_text('{"trial_data": [["')
    with pytest.raises(
        ValueError, match=r"experiment_state-2026\.json cannot be read, .* Remove all files \*-2026\.\*"
    ):
        read_study(folder)


class BreakOff(ray.tune.Callback):
    """Ctrl-C at the first result of a trial."""

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if trial.config["loss.margin"] == 0.4:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_study_is_not_over_before_its_conclusion_is_drawn() -> None:
    """A driver may be killed after the last confirming run, before it could say what they came to."""
    space = space_from_dict(TREE | {"search": {"trials": 2, "confirm": 1, "confirm_seeds": 2}}, "small")
    trials = [record("t0", "complete", 0.3), record("t1", "complete", 0.2)]
    searched = Study(space, trials)
    assert [candidate.name for candidate in searched.candidates] == ["t1", "paper"]
    assert (searched.unsearched, searched.unfinished, searched.unconfirmed) == (0, 4, True)
    runs = [record(f"c{number}", "complete", 0.2) for number in range(4)]
    concluding = dataclasses.replace(searched, chosen=searched.candidates, confirming=runs)
    assert (concluding.unfinished, concluding.unconfirmed) == (0, True)
    found = Confirmation([1, 2], 4, [], "paper", "the paper's setting", None, [])
    over = dataclasses.replace(concluding, confirmation=found)
    assert (over.unfinished, over.unconfirmed) == (0, False)
    died = dataclasses.replace(over, confirming=[*runs[:3], record("c3", "error", reason="killed")])
    assert died.unconfirmed  # it is repeated, and the conclusion drawn anew
    interrupted = dataclasses.replace(over, confirming=[*runs[:3], record("c3", "unfinished")])
    assert (interrupted.unfinished, interrupted.unconfirmed) == (1, True)  # in the middle of such a repeat
    inconclusive = dataclasses.replace(concluding, inconclusive="of each a run failed")
    assert not inconclusive.unconfirmed  # asking again gives no other answer
    searching = dataclasses.replace(concluding, trials=[*trials[:1], record("t1", "unfinished")])
    assert not searching.unconfirmed  # a repeated trial of the search comes first


def test_what_is_to_be_confirmed_does_not_change_when_a_trial_is_repeated_later() -> None:
    space = space_from_dict(TREE | {"search": {"trials": 2, "confirm": 1}}, "small")
    chosen = [Candidate("t0", {"loss.margin": 0.1})]
    assert Study(space, [record("t1", "complete", 0.01)], chosen=chosen).candidates == chosen


def test_the_front_of_two_objectives_is_what_none_is_better_than_in_both() -> None:
    search = {"trials": 5, "confirm": 0, "early_stopping": "none", "second_objective": "min_dcf"}
    space = space_from_dict(TREE | {"search": search}, "two")
    trials = [record(f"t{number}", "complete", eer) for number, eer in enumerate((0.3, 0.1, 0.2, 0.1, 0.4))]
    for trial, cost in zip(trials, (0.5, 0.9, 0.6, 0.8, 0.5), strict=True):
        trial.metrics["dev/min_dcf_0.01"] = cost
    study = Study(space, trials)
    assert [trial.name for trial in study.front] == ["t3", "t2", "t0"]
    lines = study.table().splitlines()
    assert [line.split()[0] for line in lines if line.endswith("complete, on the front")] == ["t3", "t2", "t0"]
    assert Study(space_from_dict(TREE, "one"), trials).front == []


def test_what_died_of_an_accident_is_broken_but_what_diverged_is_not(space: Space) -> None:
    died = record("t0", "error", reason="ActorDiedError: killed")
    diverged = record("t1", "error", 0.5, reason="the loss is NaN")
    diverged.metrics["failure"] = "the loss is NaN"
    assert Study(space, [died, diverged, record("t2", "complete", 0.2)]).broken == 1


def test_a_study_has_one_driver_at_a_time(space: Space, tmp_path: Path) -> None:
    folder = open_study(space, tmp_path, URI, "mine")
    told = rf"mine is being run, by process {os.getpid()} on .*--resume"
    with driving(folder), pytest.raises(ValueError, match=told), driving(folder):
        pytest.fail("two drivers")
    with driving(folder):  # afterwards, or after a kill, there is room
        assert (folder / "driver.lock").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("small_ray")
def test_a_study_that_was_broken_off_tells_how_each_trial_ended(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(values: dict[str, Any], folder: str) -> None:
        margin = values["loss.margin"]
        for epoch in range(1, 2 if margin == 0.2 else EPOCHS + 1):
            if margin == 0.3:
                raise RuntimeError("this trial was made to fail")
            ray.tune.report({TIME: epoch, METRIC: margin, "checkpoint_path": f"{folder}/{epoch}"})

    for name, value in tune_settings(1).items():
        monkeypatch.setenv(name, value)
    folder = open_study(space, tmp_path, URI, "mine")
    proposals = OptunaProposals(
        space.ranges,
        epochs=EPOCHS,
        storage=f"sqlite:///{tmp_path / 'optuna.db'}",
        study_name="mine",
        points=[{"loss.margin": margin, "loss.scale": 30.0} for margin in (0.1, 0.2, 0.3, 0.4)],
    )
    ray.tune.Tuner(
        partial(train, folder="/trials"),
        tune_config=ray.tune.TuneConfig(
            metric=METRIC, mode="min", search_alg=proposals, num_samples=4, max_concurrent_trials=1
        ),
        run_config=ray.tune.RunConfig(name=TUNE_FOLDER, storage_path=str(folder), callbacks=[BreakOff()], verbose=0),
    ).fit()
    ray.shutdown()  # a study is read where no Ray runs
    study = read_study(folder)
    assert [(trial.name, trial.values["loss.margin"], trial.outcome, trial.reason) for trial in study.trials] == [
        ("t000", 0.1, "complete", ""),
        ("t001", 0.2, "pruned", ""),
        ("t002", 0.3, "error", "RuntimeError: this trial was made to fail"),
        ("t003", 0.4, "unfinished", ""),
    ]
    assert study.unfinished == 1
    assert study.best is not None
    assert (study.best.epoch, study.best.eer, study.best.checkpoint) == (EPOCHS, 0.1, "/trials/3")
    study.write(folder)
    assert read_yaml(folder / BEST_FILE)["loss"]["margin"] == 0.1
