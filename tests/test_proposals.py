import json
import logging
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from raysv.search.proposals import OptunaProposals
from raysv.search.ranges import Range
from raysv.search.results import METRIC, TIME
from raysv.search.samplers import make_sampler

SPACE = {"loss.margin": Range("uniform", (0.1, 0.5)), "loss.scale": Range("loguniform", (16.0, 64.0))}
EPOCHS = 4


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def proposals(storage: str, space: dict[str, Any] = SPACE, **options: Any) -> OptunaProposals:
    return OptunaProposals(space, epochs=EPOCHS, storage=storage, study_name="study", **options)


def result(epoch: int, eer: float, **more: Any) -> dict[str, Any]:
    return {TIME: epoch, METRIC: eer, "training_iteration": 1, **more}


def in_config(values: dict[str, Any]) -> dict[str, Any]:
    """A trial's values as Tune flattens them into its results."""
    return {f"config/{key}": value for key, value in values.items()}


def run(search: OptunaProposals, trial_id: str, eers: list[float], **more: Any) -> None:
    """Report a curve as Tune does: the last result comes once as a result and once more at the end."""
    search.suggest(trial_id)
    for epoch, eer in enumerate(eers, 1):
        search.on_trial_result(trial_id, result(epoch, eer))
    search.on_trial_complete(trial_id, result(len(eers), eers[-1], **more))


def stored(storage: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="study", storage=storage).trials


def killed_and_restored(search: OptunaProposals, storage: str, snapshot: Path, **options: Any) -> OptunaProposals:
    """A new driver's search, which knows what the snapshot of the old one held."""
    fresh = proposals(storage, **options)
    fresh.restore(str(snapshot))
    return fresh


def page(storage: str, path: str, query: str = "") -> Any:
    """What optuna-dashboard answers, as JSON."""
    asked: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": query}
    setup_testing_defaults(asked)
    return json.loads(b"".join(optuna_dashboard.wsgi(RDBStorage(storage))(asked, lambda *answer: None)))


def test_optuna_s_dashboard_opens_the_storage(storage: str) -> None:
    search = proposals(storage)
    run(search, "whole", [0.4, 0.3, 0.2, 0.1])
    run(search, "stopped", [0.4, 0.3])
    (listed,) = page(storage, "/api/studies")["study_summaries"]
    assert listed["study_name"] == "study"
    told = page(storage, f"/api/studies/{listed['study_id']}", "after=0")
    assert [trial["state"] for trial in told["trials"]] == ["Complete", "Pruned"]
    assert optuna.load_study(study_name="study", storage=storage).metric_names == [METRIC]


def test_a_proposal_lies_in_the_space(storage: str) -> None:
    values = proposals(storage).suggest("a")
    assert values is not None and values.keys() == SPACE.keys()
    assert 0.1 <= values["loss.margin"] <= 0.5 and 16 <= values["loss.scale"] <= 64


def test_a_trial_that_ran_all_epochs_is_complete_with_its_last_eer(storage: str) -> None:
    run(proposals(storage), "a", [0.4, 0.3, 0.1, 0.2])
    (trial,) = stored(storage)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.2)
    assert trial.intermediate_values == {1: 0.4, 2: 0.3, 3: 0.1, 4: 0.2}


def test_a_trial_stopped_early_is_pruned_and_keeps_the_result_it_was_stopped_at(storage: str) -> None:
    search = proposals(storage)
    search.suggest("a")
    search.on_trial_result("a", result(1, 0.4))
    search.on_trial_complete("a", result(2, 0.35))  # Tune sends the stopping result only here
    (trial,) = stored(storage)
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.35)
    assert trial.intermediate_values == {1: 0.4, 2: 0.35}


def test_a_trial_that_raised_or_reported_nothing_failed(storage: str) -> None:
    search = proposals(storage)
    search.suggest("raised")
    search.on_trial_result("raised", result(1, 0.4))
    search.on_trial_complete("raised", error=True)
    search.suggest("silent")
    search.on_trial_complete("silent", {"trial_id": "silent"})
    assert [trial.state for trial in stored(storage)] == [TrialState.FAIL, TrialState.FAIL]


def test_the_search_learns_from_a_trial_that_gave_itself_up(storage: str) -> None:
    run(proposals(storage), "a", [0.5], failure="the loss is NaN at step 7")
    (trial,) = stored(storage)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)
    assert trial.user_attrs == {"failure": "the loss is NaN at step 7"}


def test_points_come_first_and_may_leave_values_open(storage: str) -> None:
    search = proposals(storage, points=[{"loss.margin": 0.2, "loss.scale": 30.0}, {"loss.margin": 0.3}])
    assert search.suggest("a") == {"loss.margin": 0.2, "loss.scale": 30.0}
    values = search.suggest("b")
    assert values is not None and values["loss.margin"] == 0.3 and 16 <= values["loss.scale"] <= 64


def test_a_study_that_goes_on_does_not_try_its_points_again(storage: str) -> None:
    run(proposals(storage, points=[{"loss.margin": 0.2}]), "a", [0.3])
    proposals(storage, points=[{"loss.margin": 0.2}]).suggest("b")
    assert len(stored(storage)) == 2
    assert stored(storage)[1].params["loss.margin"] != 0.2


def test_the_same_seed_proposes_the_same_values(tmp_path: Path) -> None:
    def values(name: str) -> list[Any]:
        search = proposals(f"sqlite:///{tmp_path / name}", sampler=make_sampler("tpe", SPACE, 3))
        seen = []
        for number in range(7):  # beyond the random start
            seen.append(search.suggest(str(number)))
            search.on_trial_complete(str(number), result(EPOCHS, 0.3 - 0.01 * number))
        return seen

    assert values("one.db") == values("two.db")


def test_nothing_to_search_still_makes_a_study(storage: str) -> None:
    search = proposals(storage, space={})
    assert search.suggest("a") == {}
    search.on_trial_complete("a", result(EPOCHS, 0.3))
    assert search.suggest("b") == {}
    assert [trial.state for trial in stored(storage)] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_choices_are_proposed_as_they_are_written(storage: str) -> None:
    search = proposals(storage, space={"optimizer.name": Range("choice", ("adamw", "sgd"))})
    values = search.suggest("a")
    assert values is not None and values["optimizer.name"] in ("adamw", "sgd")


def test_no_more_trials_are_proposed_than_may_run_at_once(storage: str) -> None:
    search = proposals(storage)
    assert search.set_max_concurrency(2)
    values = search.suggest("a")
    assert values and search.suggest("b")
    assert search.suggest("c") is None
    search.on_trial_complete("a", error=True)
    search.on_trial_result("a", result(1, 0.4))  # retried: it takes its place again
    assert search.suggest("c") is None
    search.on_trial_complete("a", result(EPOCHS, 0.3, **in_config(values)))
    assert search.suggest("c")


def test_results_that_come_again_after_a_kill_change_nothing(storage: str, tmp_path: Path) -> None:
    search = proposals(storage)
    search.suggest("pruned")
    search.suggest("running")
    search.on_trial_result("running", result(1, 0.4))
    search.save(str(tmp_path / "snapshot"))
    search.on_trial_result("running", result(2, 0.3))
    search.on_trial_complete("pruned", result(1, 0.45))

    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    search.on_trial_result("running", result(2, 0.3))
    search.on_trial_result("running", result(3, 0.2))
    search.on_trial_complete("running", result(4, 0.1))
    search.on_trial_result("pruned", result(1, 0.45))
    search.on_trial_complete("pruned", result(1, 0.45))

    pruned, running = stored(storage)
    assert (pruned.state, pruned.value) == (TrialState.PRUNED, 0.45)
    assert (running.state, running.value) == (TrialState.COMPLETE, 0.1)
    assert running.intermediate_values == {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}


def test_a_trial_that_tune_forgot_in_a_kill_failed_and_its_point_is_tried_again(storage: str, tmp_path: Path) -> None:
    search = proposals(storage, points=[{"loss.margin": 0.2, "loss.scale": 30.0}])
    search.save(str(tmp_path / "snapshot"))
    search.suggest("forgotten")
    search.suggest("forgotten too")

    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    failed, drawn, *waiting = stored(storage)
    assert [failed.state, drawn.state] == [TrialState.FAIL, TrialState.FAIL]
    assert [trial.state for trial in waiting] == [TrialState.WAITING, TrialState.WAITING]
    assert search.suggest("a") == {"loss.margin": 0.2, "loss.scale": 30.0}
    assert search.suggest("b") == drawn.params  # a proposal that nobody tried is as good as ever
    assert search.suggest("c") != drawn.params  # and need not be drawn again


def test_a_trial_that_only_the_search_knew_before_a_kill_is_forgotten_and_its_point_is_tried_again(
    storage: str, tmp_path: Path
) -> None:
    search = proposals(storage, points=[{"loss.margin": margin, "loss.scale": 30.0} for margin in (0.2, 0.3)])
    assert search.set_max_concurrency(2)
    search.suggest("known")
    search.suggest("ghost")
    search.save(str(tmp_path / "snapshot"))
    for name, trials in (("1", ["known", "ghost"]), ("2", ["known"])):  # of two drivers; the newest counts
        trial_data = [[json.dumps({"trial_id": trial, "status": "RUNNING"}), "{}"] for trial in trials]
        (tmp_path / f"experiment_state-{name}.json").write_text(json.dumps({"trial_data": trial_data}))

    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    assert [trial.state for trial in stored(storage)] == [TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING]
    assert search.suggest("a") == {"loss.margin": 0.3, "loss.scale": 30.0}
    assert search.suggest("b") is None


def test_a_trial_that_tune_noted_after_the_search_was_saved_goes_on_and_is_not_tried_again(
    storage: str, tmp_path: Path
) -> None:
    search = proposals(storage)
    assert search.set_max_concurrency(2)
    search.suggest("a")
    search.save(str(tmp_path / "snapshot"))
    values = {name: search.suggest(name) for name in ("a", "b")}
    trials = [{"trial_id": name, "status": "RUNNING", "config": config} for name, config in values.items()]
    trial_data = [[json.dumps(trial), "{}"] for trial in trials]
    (tmp_path / "experiment_state-1.json").write_text(json.dumps({"trial_data": trial_data}))

    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    assert [trial.state for trial in stored(storage)] == [TrialState.RUNNING] * 2
    assert search.suggest("b") == values["b"] and search.suggest("c") is None
    assert values["b"] is not None
    for epoch in range(1, EPOCHS + 1):
        last = result(epoch, 0.1, **in_config(values["b"]))
        search.on_trial_result("b", last)
    search.on_trial_complete("b", last)
    assert [trial.state for trial in stored(storage)] == [TrialState.RUNNING, TrialState.COMPLETE]


def test_a_trial_that_ended_for_optuna_after_tune_and_the_search_were_saved_stays_one_trial(
    storage: str, tmp_path: Path
) -> None:
    search = proposals(storage)
    search.suggest("first")
    search.save(str(tmp_path / "snapshot"))
    values = search.suggest("a")
    assert values is not None
    trial = {"trial_id": "a", "status": "RUNNING", "config": values}
    noted = [json.dumps(one) for one in ({"trial_id": "first", "status": "RUNNING"}, trial)]
    snapshot = {"trial_data": [[one, "{}"] for one in noted]}
    (tmp_path / "experiment_state-1.json").write_text(json.dumps(snapshot))
    run(search, "a", [0.3])
    assert [trial.state for trial in stored(storage)] == [TrialState.RUNNING, TrialState.PRUNED]

    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    assert search.set_max_concurrency(2)
    assert search.suggest("b") is None  # "a" runs for Tune until that hears of its end
    search.on_trial_complete("a", result(1, 0.3, **in_config(values)))
    assert [trial.state for trial in stored(storage)] == [TrialState.RUNNING, TrialState.PRUNED]
    assert search.suggest("b") is not None


def test_a_trial_that_ended_in_tune_after_the_search_was_saved_leaves_its_place(storage: str, tmp_path: Path) -> None:
    search = proposals(storage)
    assert search.set_max_concurrency(1)
    search.suggest("a")
    search.save(str(tmp_path / "snapshot"))
    trial_data = [[json.dumps({"trial_id": "a", "status": "TERMINATED"}), "{}"]]
    (tmp_path / "experiment_state-1.json").write_text(json.dumps({"trial_data": trial_data}))
    search = killed_and_restored(search, storage, tmp_path / "snapshot")
    assert search.set_max_concurrency(1)
    assert search.suggest("b") is not None


@pytest.mark.parametrize("retry", ["a", "newer than the snapshot"])
def test_the_success_of_a_retry_is_added(storage: str, retry: str) -> None:
    search = proposals(storage)
    values = search.suggest("a")
    assert values is not None
    search.on_trial_complete("a", error=True)
    last = result(EPOCHS, 0.1, **in_config(values))
    search.on_trial_result(retry, last)
    search.on_trial_complete(retry, last)
    failed, succeeded = stored(storage)
    assert failed.state == TrialState.FAIL
    assert (succeeded.state, succeeded.value, succeeded.params) == (TrialState.COMPLETE, 0.1, values)


def test_optuna_talks_only_when_something_is_wrong(storage: str) -> None:
    proposals(storage)
    assert optuna.logging.get_verbosity() == logging.WARNING


CONDITIONAL = {
    "loss.kind": Range("choice", ("aam", "aam_supcon")),
    "loss.margin": Range("uniform", (0.0, 0.5)),
    "loss.temperature": Range("loguniform", (0.03, 0.5), {"loss.kind": ("aam_supcon",)}),
}


def test_what_depends_on_a_choice_is_proposed_only_there(storage: str) -> None:
    search = proposals(storage, CONDITIONAL, sampler=make_sampler("tpe", CONDITIONAL, 0))
    seen = set()
    for number in range(14):  # beyond the random start
        values = search.suggest(str(number))
        assert values is not None
        assert ("loss.temperature" in values) == (values["loss.kind"] == "aam_supcon")
        seen.add(values["loss.kind"])
        search.on_trial_complete(str(number), result(EPOCHS, 0.1 + values["loss.margin"], **in_config(values)))
    assert seen == {"aam", "aam_supcon"}


def test_the_success_of_a_retry_is_added_without_what_it_did_not_have(storage: str) -> None:
    search = proposals(storage, CONDITIONAL, points=[{"loss.kind": "aam", "loss.margin": 0.2}])
    values = search.suggest("a")
    assert values == {"loss.kind": "aam", "loss.margin": 0.2}
    search.on_trial_complete("a", error=True)
    search.on_trial_complete("a", result(EPOCHS, 0.1, **in_config(values)))
    assert stored(storage)[1].params == values


SECOND = "dev/min_dcf_0.01"


def test_two_objectives_are_told_to_optuna_which_keeps_their_front(storage: str) -> None:
    search = proposals(storage, second=SECOND)
    for name, eer, cost in (("a", 0.1, 0.9), ("b", 0.2, 0.5), ("c", 0.3, 0.6)):
        search.suggest(name)
        search.on_trial_result(name, result(1, 0.4, **{SECOND: 1.0}))
        search.on_trial_complete(name, result(EPOCHS, eer, **{SECOND: cost}))
    found = optuna.load_study(study_name="study", storage=storage)
    assert [trial.values for trial in found.trials] == [[0.1, 0.9], [0.2, 0.5], [0.3, 0.6]]
    assert sorted(trial.number for trial in found.best_trials) == [0, 1]


def test_a_trial_without_the_second_objective_failed(storage: str) -> None:
    search = proposals(storage, second=SECOND)
    search.suggest("a")
    search.on_trial_complete("a", result(1, 0.5, failure="the loss is NaN"))
    search.suggest("b")
    search.on_trial_complete("b", result(1, 0.5, failure="the loss is NaN", **{SECOND: 1.0}))  # as a worker reports it
    lost, diverged = stored(storage)
    assert (lost.state, diverged.state, diverged.values) == (TrialState.FAIL, TrialState.COMPLETE, [0.5, 1.0])


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_models_propose_with_two_objectives_too(storage: str, kind: str) -> None:
    search = proposals(storage, second=SECOND, sampler=make_sampler(kind, SPACE, 0))
    for number in range(9):  # beyond the random start
        values = search.suggest(str(number))
        assert values is not None
        search.on_trial_complete(str(number), result(EPOCHS, values["loss.margin"], **{SECOND: values["loss.scale"]}))
    assert len(stored(storage)) == 9
