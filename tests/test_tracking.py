import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow_fixtures
import optuna
import pytest
import ray.tune
from mlflow import MlflowClient
from mlflow_fixtures import (
    BASE,
    EPOCHS,
    RESOURCES,
    curve,
    mlflow_warnings,
    new_driver,
    report,
    run_trial,
    runs,
    tell,
    trial,
    write_checkpoint,
)
from optuna.trial import TrialState
from ray import cloudpickle

from raysv.search import outbox
from raysv.search.cards import StudyCard
from raysv.search.proposals import OptunaProposals
from raysv.search.ranges import Range
from raysv.search.results import METRIC, TIME, outcome
from raysv.search.stopping import make_stopping
from raysv.search.tracking import MLflowTracking

pytestmark = mlflow_warnings


def test_a_trial_is_a_run_below_that_of_its_study(tracking_uri: str) -> None:
    run_trial(new_driver(tracking_uri), trial(3, **{"loss.margin": 0.24}), [0.4, 0.3, 0.2])
    (study,), (run,) = runs(tracking_uri, "study"), runs(tracking_uri)
    assert run.info.run_name == "t003 m0.24"
    tags = run.data.tags
    assert (tags["mlflow.parentRunId"], tags["raysv.study"], tags["raysv.trial_id"]) == (
        study.info.run_id,
        "study",
        "id3",
    )
    assert tags["raysv.revision"] == study.data.tags["raysv.revision"] == "abc123"


@pytest.mark.parametrize(
    ("eers", "more", "end", "status"),
    [
        ([0.4, 0.3, 0.2], {}, "complete", "FINISHED"),
        ([0.4, 0.3], {}, "pruned", "FINISHED"),
        ([0.5], {"failure": "the loss is NaN"}, "error", "FAILED"),
        ([], {}, "error", "FAILED"),
    ],
)
def test_outcome_and_status_say_how_a_trial_ended(
    tracking_uri: str, eers: list[float], more: dict[str, Any], end: str, status: str
) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    run_trial(callback, subject, eers, **more)
    callback.on_experiment_end([subject])
    (run,) = runs(tracking_uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == (end, status)
    assert run.data.tags["raysv.error"] == outcome(subject.last_result, EPOCHS)[1]
    assert runs(tracking_uri, "study")[0].info.status == "FINISHED"


def test_an_error_is_told_by_the_exception_its_report_ends_with(tracking_uri: str, tmp_path: Path) -> None:
    text = "Failure # 1\nTraceback:\n  File x\nValueError: no file data/a.wav\n  fix: name one\n\n"
    (tmp_path / "error.txt").write_text(text)
    callback, subject = new_driver(tracking_uri), trial(error_file=tmp_path / "error.txt")
    tell(callback, "on_trial_start", subject)
    tell(callback, "on_trial_error", subject)
    (run,) = runs(tracking_uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == ("error", "FAILED")
    assert run.data.tags["raysv.error"] == "ValueError: no file data/a.wav"
    assert Path(run.info.artifact_uri, "error.txt").read_text() == text


def test_an_interrupted_trial_is_killed_and_goes_on_in_the_same_run(tracking_uri: str) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4)
    callback.on_experiment_end([subject])
    assert [run.info.status for run in (*runs(tracking_uri), *runs(tracking_uri, "study"))] == ["KILLED", "KILLED"]

    callback = new_driver(tracking_uri, base=BASE | {"training": {"seed": 1}})  # a parameter of a run cannot change
    run_trial(callback, subject, [0.4, 0.3, 0.2])
    callback.on_experiment_end([subject])
    (run,) = runs(tracking_uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == ("complete", "FINISHED")
    assert curve(tracking_uri, run) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert runs(tracking_uri, "study")[0].info.status == "FINISHED"


def test_an_outage_costs_no_result_and_no_order(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    with monkeypatch.context() as outage:
        for method in ("log_batch", "search_experiments", "search_runs", "create_run", "get_run"):
            outage.setattr(MlflowClient, method, _unreachable)
        report(callback, subject, 1, 0.4)
        report(callback, subject, 2, 0.3)
    report(callback, subject, 3, 0.2)
    assert curve(tracking_uri, runs(tracking_uri)[0]) == []  # too soon to ask again
    tell(callback, "on_trial_complete", subject)
    callback.on_experiment_end([subject])
    assert curve(tracking_uri, runs(tracking_uri)[0]) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert runs(tracking_uri)[0].data.tags["raysv.outcome"] == "complete"
    assert [record.message for record in caplog.records if record.name == outbox.__name__] == [
        "MLflow: ConnectionError: no answer. The study goes on."
    ]


def _unreachable(*args: Any, **more: Any) -> None:
    raise ConnectionError("no answer")


def train_stand_in(config: dict[str, Any], folder: Path) -> None:
    """A trial that learns well where the margin is small, gives itself up at 0.4 and raises at 0.5."""
    margin = config["loss.margin"]
    home = folder / ray.tune.get_context().get_trial_id()
    home.mkdir()
    eers: list[float] = []
    for epoch in range(1, EPOCHS + 1):
        if margin == 0.5 and epoch == 2:
            raise ValueError("this trial was made to fail")
        diverged = {"failure": "the loss is NaN"} if margin == 0.4 and epoch == 2 else {}
        eers.append(0.5 if diverged else margin + 0.1 / epoch)
        path = write_checkpoint(home / str(epoch), eers)
        ray.tune.report({TIME: epoch, METRIC: eers[-1], "loss/total": 2 * eers[-1], "checkpoint_path": path} | diverged)
        if diverged:
            return


@pytest.fixture
def pickled_by_value() -> Iterator[None]:
    """Ray's workers do not see the folder of the tests."""
    modules = sys.modules[__name__], mlflow_fixtures
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.slow
@pytest.mark.usefixtures("small_ray", "pickled_by_value")
def test_tune_optuna_and_mlflow_tell_the_same_story(tracking_uri: str, tmp_path: Path) -> None:
    margins = [0.1, 0.2, 0.5, 0.4, 0.05, 0.3]
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    search = OptunaProposals(
        {"loss.margin": Range("uniform", (0.0, 0.5))},
        epochs=EPOCHS,
        storage=storage,
        study_name="study",
        points=[{"loss.margin": margin} for margin in margins],
    )
    scheduler = make_stopping("asha", tmp_path / "journal", epochs=EPOCHS, grace_epochs=2, reduction_factor=2)
    (tmp_path / "checkpoints").mkdir()
    tuner = ray.tune.Tuner(
        partial(train_stand_in, folder=tmp_path / "checkpoints"),
        tune_config=ray.tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=search,
            scheduler=scheduler,
            num_samples=len(margins),
            max_concurrent_trials=1,
        ),
        run_config=ray.tune.RunConfig(
            name="study",
            storage_path=str(tmp_path / "tune"),
            callbacks=[
                MLflowTracking(
                    StudyCard(tracking_uri, "study", BASE, RESOURCES, "", searched=["loss.margin"], epochs=EPOCHS)
                )
            ],
            verbose=0,
        ),
    )
    grid = tuner.fit()

    tune: dict[float, tuple[str, dict[int, float]]] = {}
    for result in grid:
        end = "error" if result.error else outcome(result.metrics, EPOCHS)[0]
        rows = result.metrics_dataframe
        tune[result.config["loss.margin"]] = end, dict(zip(rows[TIME], rows[METRIC], strict=True))
    mlflow = {
        float(run.data.params["loss.margin"]): (run.data.tags["raysv.outcome"], dict(curve(tracking_uri, run)))
        for run in runs(tracking_uri)
    }
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "error"}
    stored = {
        trial.params["loss.margin"]: (
            "error" if "failure" in trial.user_attrs else states[trial.state],
            trial.intermediate_values,
        )
        for trial in optuna.load_study(study_name="study", storage=storage).trials
    }
    assert {margin: end for margin, (end, _) in tune.items()} == {
        0.1: "complete",
        0.2: "pruned",
        0.5: "error",
        0.4: "error",
        0.05: "complete",
        0.3: "pruned",
    }
    assert tune == mlflow == stored
    failed = next(run for run in runs(tracking_uri) if run.data.params["loss.margin"] == "0.5")
    assert failed.data.tags["raysv.error"] == "ValueError: this trial was made to fail"
    (study,) = runs(tracking_uri, "study")
    assert study.data.metrics["best_eer"] == pytest.approx(0.05 + 0.1 / 3)
    assert study.data.tags["raysv.best_trial"] == grid.get_best_result().metrics["trial_id"]
