import json
import math
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray.tune
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ray import cloudpickle

from raysv.config import read_yaml
from raysv.search import tracking
from raysv.search.figures import det_figure
from raysv.search.proposals import OptunaProposals
from raysv.search.results import METRIC, TIME, outcome
from raysv.search.stopping import JournaledASHA
from raysv.search.tracking import MLflowTracking, Outbox, StudyCard

# MLflow 3.17 with SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")

EPOCHS = 3
BASE = {"loss": {"margin": 0.2, "scale": 30.0}, "augment": {"kinds": ["noise", "reverb"]}, "training": {"seed": 0}}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.check(f"sqlite:///{file}")
    return file


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in tracking.SETTINGS:
        monkeypatch.setenv(name, tracking.SETTINGS[name])
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    yield f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert not (tmp_path / "mlruns").exists()


def new_driver(uri: str, **card: Any) -> MLflowTracking:
    """The callback as a driver has it that knows nothing of an earlier life."""
    options: dict[str, Any] = {
        "base": BASE,
        "searched": ["loss.margin"],
        "tags": {"raysv.revision": "abc123"},
        "description": "Which margin?",
    }
    callback = MLflowTracking(StudyCard(uri, "study", epochs=EPOCHS, **(options | card)))
    callback = pickle.loads(pickle.dumps(callback))  # Tune keeps it in its snapshot
    callback.setup(stop=None)
    return callback


def trial(number: int = 0, error_file: Path | None = None, **values: Any) -> Any:
    """What of a Tune trial the callback looks at."""
    config = values or {"loss.margin": 0.25}
    return SimpleNamespace(
        trial_id=f"id{number}", experiment_tag=f"{number + 1}_x", config=config, last_result={}, error_file=error_file
    )


def tell(callback: MLflowTracking, hook: str, subject: Any, **info: Any) -> None:
    getattr(callback, hook)(iteration=0, trials=[subject], trial=subject, **info)


def report(callback: MLflowTracking, subject: Any, epoch: int, eer: float, **more: Any) -> None:
    subject.last_result = {TIME: epoch, METRIC: eer, "training_iteration": 7, "pid": 123, "done": False, **more}
    tell(callback, "on_trial_result", subject, result=subject.last_result)


def run_trial(callback: MLflowTracking, subject: Any, eers: list[float], **more: Any) -> None:
    tell(callback, "on_trial_start", subject)
    for epoch, eer in enumerate(eers, 1):
        report(callback, subject, epoch, eer, **more)
    tell(callback, "on_trial_complete", subject)


def write_checkpoint(folder: Path, eers: list[float]) -> str:
    """A checkpoint as far as tracking looks into it, after `len(eers)` epochs."""
    folder.mkdir()
    lines = [json.dumps({TIME: epoch, METRIC: eer, "loss/total": 2 * eer}) for epoch, eer in enumerate(eers, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "encoder.pt").write_text(str(eers[-1]))
    (folder / "training_state.pt").write_text("large")
    (folder / "det.csv").write_text("p_miss,p_fa\n0.0,1.0\n0.1,0.2\n1.0,0.0\n")
    return str(folder)


def runs(uri: str, kind: str = "trial") -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raysv")
    found = client.search_runs([experiment.experiment_id], order_by=["start_time"])
    return [run for run in found if run.data.tags["raysv.kind"] == kind]


def curve(uri: str, run: Run, metric: str = METRIC) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


def test_a_trial_is_a_run_below_that_of_its_study(uri: str) -> None:
    run_trial(new_driver(uri), trial(3, **{"loss.margin": 0.24}), [0.4, 0.3, 0.2])
    (study,), (run,) = runs(uri, "study"), runs(uri)
    assert run.info.run_name == "t003 m0.24"
    tags = run.data.tags
    assert (tags["mlflow.parentRunId"], tags["raysv.study"], tags["raysv.trial_id"]) == (
        study.info.run_id,
        "study",
        "id3",
    )
    assert tags["raysv.revision"] == study.data.tags["raysv.revision"] == "abc123"


def test_parameters_are_the_whole_configuration_with_the_values_of_the_trial(uri: str) -> None:
    callback = new_driver(uri)
    tell(callback, "on_trial_start", trial(**{"loss.margin": 0.123456789, "optimizer.name": "sgd"}))
    (run,) = runs(uri)
    assert run.data.params == {
        "loss.margin": "0.123457",
        "loss.scale": "30",
        "augment.kinds": "['noise', 'reverb']",
        "training.seed": "0",
        "optimizer.name": "sgd",
    }


def test_more_parameters_than_one_call_may_log_are_all_there(uri: str) -> None:
    base = {"many": {f"p{number}": number for number in range(250)}}
    tell(new_driver(uri, base=base), "on_trial_start", trial())
    assert len(runs(uri)[0].data.params) == 251


def test_the_configuration_of_a_run_comes_back_with_every_digit(uri: str) -> None:
    tell(new_driver(uri), "on_trial_start", trial(**{"loss.margin": 0.123456789}))
    tree = tracking.config_of_run(runs(uri)[0].info.run_id, uri)
    assert tree == BASE | {"loss": {"margin": 0.123456789, "scale": 30.0}}


def test_an_unknown_run_is_an_error_that_names_it(uri: str) -> None:
    with pytest.raises(ValueError, match="No configuration of a run 0123"):
        tracking.config_of_run("0123", uri)


def test_metrics_keep_their_names_and_count_in_epochs(uri: str) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4, **{"loss/total": 3.5, "time_total_s": 12.0, "checkpoint_path": "gone"})
    report(callback, subject, 2, 0.3, **{"loss/total": math.nan})
    (run,) = runs(uri)
    assert curve(uri, run) == [(1, 0.4), (2, 0.3)]
    assert run.data.metrics.keys() == {METRIC, "loss/total", "time_total_s"}
    assert math.isnan(run.data.metrics["loss/total"])


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
    uri: str, eers: list[float], more: dict[str, Any], end: str, status: str
) -> None:
    callback, subject = new_driver(uri), trial()
    run_trial(callback, subject, eers, **more)
    callback.on_experiment_end([subject])
    (run,) = runs(uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == (end, status)
    assert run.data.tags["raysv.error"] == outcome(subject.last_result, EPOCHS)[1]
    assert runs(uri, "study")[0].info.status == "FINISHED"


def test_an_error_is_told_by_the_exception_its_report_ends_with(uri: str, tmp_path: Path) -> None:
    text = "Failure # 1\nTraceback:\n  File x\nValueError: no file data/a.wav\n  fix: name one\n\n"
    (tmp_path / "error.txt").write_text(text)
    callback, subject = new_driver(uri), trial(error_file=tmp_path / "error.txt")
    tell(callback, "on_trial_start", subject)
    tell(callback, "on_trial_error", subject)
    (run,) = runs(uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == ("error", "FAILED")
    assert run.data.tags["raysv.error"] == "ValueError: no file data/a.wav"
    assert Path(run.info.artifact_uri, "error.txt").read_text() == text


def test_an_interrupted_trial_is_killed_and_goes_on_in_the_same_run(uri: str) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4)
    callback.on_experiment_end([subject])
    assert [run.info.status for run in (*runs(uri), *runs(uri, "study"))] == ["KILLED", "KILLED"]

    callback = new_driver(uri, base=BASE | {"training": {"seed": 1}})  # a parameter of a run cannot change
    run_trial(callback, subject, [0.4, 0.3, 0.2])
    callback.on_experiment_end([subject])
    (run,) = runs(uri)
    assert (run.data.tags["raysv.outcome"], run.info.status) == ("complete", "FINISHED")
    assert curve(uri, run) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert runs(uri, "study")[0].info.status == "FINISHED"


def test_epochs_that_no_driver_saw_are_filled_in_from_the_checkpoint(uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4)
    callback = new_driver(uri)
    tell(callback, "on_trial_start", subject)
    folder = write_checkpoint(tmp_path / "checkpoint", [0.4, 0.3, 0.2])
    report(callback, subject, 3, 0.2, checkpoint_path=folder)
    (run,) = runs(uri)
    assert curve(uri, run) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert curve(uri, run, "loss/total") == [(2, 0.6)]


def test_the_best_checkpoint_that_still_exists_is_kept_without_training_state(uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    for epoch, eers in enumerate(([0.1], [0.1, 0.2], [0.1, 0.2, 0.3]), 1):
        report(callback, subject, epoch, eers[-1], checkpoint_path=write_checkpoint(tmp_path / str(epoch), eers))
    shutil.rmtree(tmp_path / "1")
    tell(callback, "on_trial_complete", subject)
    artifacts = Path(runs(uri)[0].info.artifact_uri)
    assert (artifacts / "best_checkpoint/encoder.pt").read_text() == "0.2"
    assert not (artifacts / "best_checkpoint/training_state.pt").exists()
    assert (artifacts / "det.png").read_bytes().startswith(b"\x89PNG")
    assert read_yaml(artifacts / "config.yaml")["loss"]["margin"] == 0.25
    assert artifacts.is_relative_to(tmp_path)


def test_a_new_driver_still_knows_the_best_checkpoint(uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.1, checkpoint_path=write_checkpoint(tmp_path / "1", [0.1]))
    callback = new_driver(uri)
    report(callback, subject, 2, 0.2, checkpoint_path=write_checkpoint(tmp_path / "2", [0.1, 0.2]))
    tell(callback, "on_trial_complete", subject)
    assert Path(runs(uri)[0].info.artifact_uri, "best_checkpoint/encoder.pt").read_text() == "0.1"


def test_the_study_counts_outcomes_and_names_the_best(uri: str) -> None:
    callback = new_driver(uri)
    run_trial(callback, trial(0, **{"loss.margin": 0.1}), [0.4, 0.3, 0.3])
    assert runs(uri)[0].data.tags["raysv.best"] == "true"
    run_trial(callback, trial(1, **{"loss.margin": 0.2}), [0.1])  # better, but not seen to the end
    run_trial(callback, trial(2, **{"loss.margin": 0.3}), [0.4, 0.3, 0.2])
    run_trial(callback, trial(3, **{"loss.margin": 0.4}), [0.5], failure="NaN")
    (study,) = runs(uri, "study")
    counts = {key: value for key, value in study.data.metrics.items() if key != "hours"}
    assert counts == {"trials_complete": 2, "trials_pruned": 1, "trials_error": 1, "best_eer": 0.2}
    assert 0 <= study.data.metrics["hours"] < 0.1
    assert curve(uri, study, "best_eer") == [(1, 0.3), (2, 0.3), (3, 0.2), (4, 0.2)]
    assert study.data.tags["raysv.best_trial"] == "id2"
    assert [run.data.tags.get("raysv.best") for run in runs(uri)] == [None, None, "true", None]
    assert study.data.tags["mlflow.note.content"].splitlines() == [
        "Which margin?",
        "",
        "| trial | EER % | loss.margin |",
        "| --- | --- | --- |",
        "| t002 | 20.00 | 0.3 |",
        "| t000 | 30.00 | 0.1 |",
    ]


def test_a_trial_that_tune_forgot_is_an_error(uri: str) -> None:
    tell(new_driver(uri), "on_trial_start", trial(0))
    callback = new_driver(uri)
    run_trial(callback, trial(1), [0.4, 0.3, 0.2])
    callback.on_experiment_end([trial(1)])
    forgotten, known = runs(uri)
    assert (forgotten.info.status, forgotten.data.tags["raysv.outcome"]) == ("FAILED", "error")
    assert "driver died" in forgotten.data.tags["raysv.error"]
    assert known.info.status == runs(uri, "study")[0].info.status == "FINISHED"


def test_an_outage_costs_no_result_and_no_order(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    with monkeypatch.context() as outage:
        outage.setattr(tracking, "MlflowClient", _unreachable)
        report(callback, subject, 1, 0.4)
        report(callback, subject, 2, 0.3)
    report(callback, subject, 3, 0.2)
    assert curve(uri, runs(uri)[0]) == []  # too soon to ask again
    tell(callback, "on_trial_complete", subject)
    callback.on_experiment_end([subject])
    assert curve(uri, runs(uri)[0]) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert runs(uri)[0].data.tags["raysv.outcome"] == "complete"
    assert [record.message for record in caplog.records if record.name == tracking.__name__] == [
        "MLflow: ConnectionError: no answer. The study goes on."
    ]


def test_an_epoch_whose_reply_got_lost_is_not_written_twice(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, subject = new_driver(uri), trial()
    tell(callback, "on_trial_start", subject)
    with monkeypatch.context() as outage:
        write = MlflowClient.log_batch

        def write_and_lose_the_reply(*args: Any, **metrics: Any) -> None:
            write(*args, **metrics)
            raise ConnectionError("no answer")

        outage.setattr(MlflowClient, "log_batch", write_and_lose_the_reply)
        report(callback, subject, 1, 0.4)
    callback.on_experiment_end([subject])
    assert curve(uri, runs(uri)[0]) == [(1, 0.4)]


def _unreachable(uri: str) -> MlflowClient:
    raise ConnectionError("no answer")


def test_an_entry_that_mlflow_refuses_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    made: list[str] = []

    def refused() -> None:
        made.append("refused")
        raise ValueError("not so")

    outbox = Outbox(ping=lambda: None)
    outbox.put(refused)
    outbox.put(lambda: made.append("a"))
    outbox.put(lambda: made.append("b"))
    assert made == ["refused"] * tracking.ATTEMPTS + ["a", "b"]
    outbox.empty()
    assert [record.message for record in caplog.records] == [
        "MLflow: ValueError: not so. The study goes on.",
        "1 entries could not be written to MLflow. Tune's own results and the checkpoints are complete.",
    ]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "file:///tmp/mlruns", "nonsense://x"])
def test_an_address_without_mlflow_is_an_error_that_names_it(address: str) -> None:
    with pytest.raises(ValueError, match=f"MLflow cannot be used at {address}: "):
        tracking.check(address)


def test_the_default_is_a_file_in_the_folder_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.default_tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert tracking.default_tracking_uri(tmp_path / "study") == f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert tracking.default_tracking_uri(tmp_path) == "http://mlflow.example"


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(uri: str) -> None:
    MlflowClient(uri).delete_experiment(tracking.experiment_id(uri, "raysv"))
    with pytest.raises(ValueError, match=r"raysv at .* was deleted.*mlflow experiments restore"):
        tracking.experiment_id(uri, "raysv")


def test_the_link_opens_the_trials_best_first() -> None:
    link = tracking.runs_link("http://host:5000/", "7")
    assert link.startswith("http://host:5000/#/experiments/7/runs?workflowType=machine_learning&orderByKey=metrics.%60")
    assert link.endswith("searchFilter=tags.%60raysv.kind%60%20%3D%20'trial'")


def test_names_of_runs_abbreviate_as_far_as_they_stay_apart(uri: str) -> None:
    values = {"loss.margin": 0.25, "loss.scale": 24, "augment.strength": 0.5, "optimizer.name": "sgd"}
    tell(new_driver(uri), "on_trial_start", trial(**values))
    assert runs(uri)[0].info.run_name == "t000 m0.25 sc24 st0.5 nsgd"


def test_a_det_curve_of_perfect_scores_can_be_drawn() -> None:
    figure = det_figure({"perfect": ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0])})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["perfect"]
    assert all(math.isfinite(value) for line in axes.lines for value in (*line.get_xdata(), *line.get_ydata()))


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
def small_ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its workers do not see the folder of the tests
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("small_ray")
def test_tune_optuna_and_mlflow_tell_the_same_story(uri: str, tmp_path: Path) -> None:
    margins = [0.1, 0.2, 0.5, 0.4, 0.05, 0.3]
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    search = OptunaProposals(
        {"loss.margin": FloatDistribution(0.0, 0.5)},
        epochs=EPOCHS,
        storage=storage,
        study_name="study",
        points=[{"loss.margin": margin} for margin in margins],
    )
    scheduler = JournaledASHA(tmp_path / "asha.jsonl", epochs=EPOCHS, grace_epochs=2, reduction_factor=2)
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
            callbacks=[MLflowTracking(StudyCard(uri, "study", BASE, searched=["loss.margin"], epochs=EPOCHS))],
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
        float(run.data.params["loss.margin"]): (run.data.tags["raysv.outcome"], dict(curve(uri, run)))
        for run in runs(uri)
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
    failed = next(run for run in runs(uri) if run.data.params["loss.margin"] == "0.5")
    assert failed.data.tags["raysv.error"] == "ValueError: this trial was made to fail"
    (study,) = runs(uri, "study")
    assert study.data.metrics["best_eer"] == pytest.approx(0.05 + 0.1 / 3)
    assert study.data.tags["raysv.best_trial"] == grid.get_best_result().metrics["trial_id"]
