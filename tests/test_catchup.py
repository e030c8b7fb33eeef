import shutil
from pathlib import Path
from typing import Any

import pytest
from encoder_fixtures import tiny_encoder
from encoder_fixtures import write_checkpoint as whole_checkpoint
from learning_fixtures import tiny_config
from mlflow import MlflowClient
from mlflow_fixtures import curve, mlflow_warnings, runs

from raysv.learning.keeping import keep_checkpoint
from raysv.search import catchup
from raysv.search.records import TrialRecord
from raysv.search.space import space_from_dict
from raysv.search.study import Study, note_start, open_study

pytestmark = mlflow_warnings

SPACE = space_from_dict({"loss": {"margin": {"uniform": [0.1, 0.5]}}, "training": {"epochs": 2}}, "late")


@pytest.fixture
def folder(tmp_path: Path, tracking_uri: str) -> Path:
    folder = open_study(SPACE, tmp_path / "results", tracking_uri, "late")
    note_start(folder, tags={"raysv.git": "abc"})
    return folder


def record(folder: Path, number: int = 0, **more: Any) -> TrialRecord:
    """A trial of two epochs as Tune has it, with its checkpoint; the EER of the second epoch is 0.25."""
    made = whole_checkpoint(folder / "made", tiny_config(folder), tiny_encoder())
    kept = keep_checkpoint(made, folder / "trials" / f"id{number}")
    shutil.rmtree(made)
    metrics = {"epoch": 2, "dev/eer": 0.25, "checkpoint_path": str(kept)}
    values = {"loss.margin": 0.2 + number / 10}
    options: dict[str, Any] = {"metrics": metrics, "outcome": "complete", "reason": "", "checkpoint": str(kept)}
    return TrialRecord(f"t{number:03d}", f"id{number}", values, **(options | more))


def test_a_trial_that_mlflow_never_heard_of_is_written_with_its_curve_and_files(
    folder: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(SPACE, [record(folder)])
    catchup.catch_up(study, folder, tracking_uri)
    assert "MLflow missed the end of 1 of 1 trials" in capsys.readouterr().out
    (run,) = runs(tracking_uri)
    assert curve(tracking_uri, run) == [(1, 0.5), (2, 0.25)]
    assert (run.data.tags["raysv.outcome"], run.info.status) == ("complete", "FINISHED")
    assert run.data.params["loss.margin"] == "0.2"
    assert Path(run.info.artifact_uri, "best_checkpoint/encoder.pt").is_file()
    (parent,) = runs(tracking_uri, "study")
    assert (parent.info.status, parent.data.metrics["trials_complete"]) == ("FINISHED", 1)
    catchup.catch_up(study, folder, tracking_uri)
    assert capsys.readouterr().out == "", "nothing is missing any more"


def test_a_run_whose_files_were_refused_gets_them_later_and_keeps_the_tags_of_its_code(
    folder: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study(SPACE, [record(folder)])
    with monkeypatch.context() as refusing:
        log = MlflowClient.log_artifact

        def refuse(client: MlflowClient, run_id: str, path: str, *more: Any) -> None:
            if path.endswith("encoder.pt"):
                raise ConnectionError("no store")
            log(client, run_id, path, *more)

        refusing.setattr(MlflowClient, "log_artifact", refuse)
        catchup.catch_up(study, folder, tracking_uri)
    assert "--resume of the study writes them" in caplog.text
    note_start(folder, tags={"raysv.git": "of later code"})
    catchup.catch_up(study, folder, tracking_uri)
    (run,) = runs(tracking_uri)
    assert run.data.tags["raysv.git"] == "abc"
    assert Path(run.info.artifact_uri, "best_checkpoint/encoder.pt").is_file()
    assert curve(tracking_uri, run) == [(1, 0.5), (2, 0.25)]


def test_what_has_not_ended_is_left_to_the_driver(folder: Path, tracking_uri: str) -> None:
    catchup.catch_up(Study(SPACE, [record(folder, outcome="unfinished")]), folder, tracking_uri)
    assert runs(tracking_uri) == []
