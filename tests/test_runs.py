import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
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

from raysv.config import read_yaml
from raysv.learning.keeping import keep_checkpoint
from raysv.search import outbox
from raysv.search.results import METRIC
from raysv.search.study import note_start

pytestmark = mlflow_warnings


def test_parameters_are_the_whole_configuration_with_the_values_of_the_trial(tracking_uri: str) -> None:
    callback = new_driver(tracking_uri)
    tell(callback, "on_trial_start", trial(**{"loss.margin": 0.123456789, "optimizer.name": "sgd"}))
    (run,) = runs(tracking_uri)
    assert run.data.params == {
        "loss.margin": "0.123457",
        "loss.scale": "30",
        "augment.kinds": "['noise', 'reverb']",
        "training.seed": "0",
        "optimizer.name": "sgd",
    }


def test_what_starts_under_another_driver_has_the_tags_that_it_noted(tracking_uri: str, tmp_path: Path) -> None:
    note_start(tmp_path, tags={"raysv.git": "123456e78901"})  # a text, although it looks like a number
    callback = new_driver(tracking_uri, folder=tmp_path)
    for number in range(2):
        tell(callback, "on_trial_start", trial(number))
    note_start(tmp_path, tags={"raysv.git": "def"})
    callback = pickle.loads(pickle.dumps(callback))
    callback.setup()
    for number in (1, 2):
        tell(callback, "on_trial_start", trial(number))
    revisions = [run.data.tags["raysv.git"] for run in (*runs(tracking_uri, "study"), *runs(tracking_uri))]
    assert revisions == ["def", "123456e78901", "def", "def"]


def test_what_was_searched_and_with_which_resources_is_kept_beside_the_parameters(tracking_uri: str) -> None:
    space = "# What study mine searches.\nloss: {margin: {uniform: [0.0, 0.5]}}\n"
    tell(new_driver(tracking_uri, space=space), "on_trial_start", trial(**{"loss.margin": 0.25}))
    (study,), (run,) = runs(tracking_uri, "study"), runs(tracking_uri)
    assert Path(study.info.artifact_uri, "space.yaml").read_text() == space
    tree = read_yaml(Path(run.info.artifact_uri, "config.yaml"))
    assert tree == BASE | {"loss": {"margin": 0.25, "scale": 30.0}, "resources": RESOURCES}
    assert not any(key.startswith("resources") for key in run.data.params)


def test_more_parameters_than_one_call_may_log_are_all_there(tracking_uri: str) -> None:
    base = {"many": {f"p{number}": number for number in range(250)}}
    tell(new_driver(tracking_uri, base=base), "on_trial_start", trial())
    assert len(runs(tracking_uri)[0].data.params) == 251


def test_metrics_keep_their_names_and_count_in_epochs(tracking_uri: str) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4, **{"loss/total": 3.5, "time_total_s": 12.0, "checkpoint_path": "gone"})
    report(callback, subject, 2, 0.3, **{"loss/total": math.nan})
    (run,) = runs(tracking_uri)
    assert curve(tracking_uri, run) == [(1, 0.4), (2, 0.3)]
    assert run.data.metrics.keys() == {METRIC, "loss/total", "time_total_s"}
    assert math.isnan(run.data.metrics["loss/total"])


def test_epochs_that_no_driver_saw_are_filled_in_from_the_checkpoint(tracking_uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.4)
    callback = new_driver(tracking_uri)
    tell(callback, "on_trial_start", subject)
    folder = write_checkpoint(tmp_path / "checkpoint", [0.4, 0.3, 0.2])
    report(callback, subject, 3, 0.2, checkpoint_path=folder)
    (run,) = runs(tracking_uri)
    assert curve(tracking_uri, run) == [(1, 0.4), (2, 0.3), (3, 0.2)]
    assert curve(tracking_uri, run, "loss/total") == [(2, 0.6)]


def test_an_epoch_whose_reply_got_lost_is_not_written_twice(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    with monkeypatch.context() as outage:
        write = MlflowClient.log_batch

        def write_and_lose_the_reply(*args: Any, **metrics: Any) -> None:
            write(*args, **metrics)
            raise ConnectionError("no answer")

        outage.setattr(MlflowClient, "log_batch", write_and_lose_the_reply)
        report(callback, subject, 1, 0.4)
    callback.on_experiment_end([subject])
    assert curve(tracking_uri, runs(tracking_uri)[0]) == [(1, 0.4)]


def test_the_best_checkpoint_that_still_exists_is_kept_but_no_training_state(tracking_uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    for epoch, eers in enumerate(([0.1], [0.1, 0.2], [0.1, 0.2, 0.3]), 1):
        report(callback, subject, epoch, eers[-1], checkpoint_path=write_checkpoint(tmp_path / str(epoch), eers))
    shutil.rmtree(tmp_path / "1")
    tell(callback, "on_trial_complete", subject)
    artifacts = Path(runs(tracking_uri)[0].info.artifact_uri)
    assert (artifacts / "best_checkpoint/encoder.pt").read_text() == "0.2"
    assert not (artifacts / "best_checkpoint/training_state.pt").exists()
    assert (artifacts / "det.png").read_bytes().startswith(b"\x89PNG")
    assert read_yaml(artifacts / "config.yaml")["loss"]["margin"] == 0.25
    assert artifacts.is_relative_to(tmp_path)


def test_the_run_of_a_trial_says_in_which_format_it_was_computed(tracking_uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    run_trial(callback, subject, [0.2], checkpoint_path=write_checkpoint(tmp_path / "1", [0.2]))
    assert runs(tracking_uri)[0].data.tags["raysv.computed"] == "cpu, float32"


def test_a_server_that_refuses_files_costs_no_outcome(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MlflowClient.log_artifact

    def refuse(client: MlflowClient, run_id: str, path: str, *folder: Any) -> None:
        if path.endswith("encoder.pt"):
            raise MlflowException("413: request entity too large")
        log(client, run_id, path, *folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "RETRY_SHARE", 0.0)
    callback, subjects = new_driver(tracking_uri), [trial(0), trial(1)]
    for number, subject in enumerate(subjects):
        run_trial(callback, subject, [0.2] * EPOCHS, checkpoint_path=write_checkpoint(tmp_path / str(number), [0.2]))
    callback.on_experiment_end(subjects)
    assert [run.data.tags["raysv.outcome"] for run in runs(tracking_uri)] == ["complete", "complete"]
    assert [run.info.status for run in runs(tracking_uri)] == ["FINISHED", "FINISHED"]
    (study,) = runs(tracking_uri, "study")
    assert (study.info.status, study.data.metrics["best_eer"]) == ("FINISHED", 0.2)


def test_a_new_driver_still_knows_the_best_checkpoint(tracking_uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.1, checkpoint_path=write_checkpoint(tmp_path / "1", [0.1]))
    callback = new_driver(tracking_uri)
    report(callback, subject, 2, 0.2, checkpoint_path=write_checkpoint(tmp_path / "2", [0.1, 0.2]))
    tell(callback, "on_trial_complete", subject)
    assert Path(runs(tracking_uri)[0].info.artifact_uri, "best_checkpoint/encoder.pt").read_text() == "0.1"


def test_of_equally_good_checkpoints_the_first_is_the_best_as_it_is_the_one_that_stays(
    tracking_uri: str, tmp_path: Path
) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    eers = [0.1, 0.2, 0.1, 0.3]
    for epoch in range(1, 5):
        made = Path(write_checkpoint(tmp_path / "made", eers[:epoch]))
        folder = keep_checkpoint(made, tmp_path / "kept")
        shutil.rmtree(made)
        if epoch == 4:
            callback = new_driver(tracking_uri)
        report(callback, subject, epoch, eers[epoch - 1], checkpoint_path=str(folder))
        assert Path(runs(tracking_uri)[0].data.tags["raysv.checkpoint"]).is_dir()
    tell(callback, "on_trial_complete", subject)
    assert Path(runs(tracking_uri)[0].info.artifact_uri, "best_checkpoint/encoder.pt").read_text() == "0.1"


def test_what_ends_on_an_equal_of_its_best_hands_over_the_first(tracking_uri: str, tmp_path: Path) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    for epoch, eers in enumerate(([0.1], [0.1, 0.2], [0.1, 0.2, 0.1]), 1):
        report(callback, subject, epoch, eers[-1], checkpoint_path=write_checkpoint(tmp_path / str(epoch), eers))
    tell(callback, "on_trial_complete", subject)
    (run,) = runs(tracking_uri)
    assert run.data.tags["raysv.checkpoint"] == str(tmp_path / "1")
    history = Path(run.info.artifact_uri, "best_checkpoint/metrics.jsonl").read_text()
    assert len(history.splitlines()) == 1


def test_a_lost_reply_does_not_leave_the_best_checkpoint_behind(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, subject = new_driver(tracking_uri), trial()
    tell(callback, "on_trial_start", subject)
    write, eers = MlflowClient.log_batch, [0.3, 0.2, 0.25, 0.1, 0.4]
    for epoch in range(1, 6):
        made = Path(write_checkpoint(tmp_path / "made", eers[:epoch]))
        folder = keep_checkpoint(made, tmp_path / "kept")
        shutil.rmtree(made)
        with monkeypatch.context() as outage:

            def write_and_lose_the_reply(*args: Any, **metrics: Any) -> None:
                write(*args, **metrics)
                raise ConnectionError("no answer")

            if epoch == 4:
                outage.setattr(MlflowClient, "log_batch", write_and_lose_the_reply)
            report(callback, subject, epoch, eers[epoch - 1], checkpoint_path=str(folder))
    callback.on_experiment_end([subject])
    assert runs(tracking_uri)[0].data.tags["raysv.checkpoint"] == str(tmp_path / "kept" / "epoch-0004")


def test_the_study_counts_outcomes_and_names_the_best(tracking_uri: str) -> None:
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(0, **{"loss.margin": 0.1}), [0.4, 0.3, 0.3])
    assert runs(tracking_uri)[0].data.tags["raysv.best"] == "true"
    run_trial(callback, trial(1, **{"loss.margin": 0.2}), [0.1])  # better, but not seen to the end
    run_trial(callback, trial(2, **{"loss.margin": 0.3}), [0.4, 0.3, 0.2])
    run_trial(callback, trial(3, **{"loss.margin": 0.4}), [0.5], failure="NaN")
    (study,) = runs(tracking_uri, "study")
    counts = {key: value for key, value in study.data.metrics.items() if key != "hours"}
    assert counts == {"trials_complete": 2, "trials_pruned": 1, "trials_error": 1, "best_eer": 0.2}
    assert 0 <= study.data.metrics["hours"] < 0.1
    assert curve(tracking_uri, study, "best_eer") == [(1, 0.3), (2, 0.3), (3, 0.2), (4, 0.2)]
    assert study.data.tags["raysv.best_trial"] == "id2"
    assert [run.data.tags.get("raysv.best") for run in runs(tracking_uri)] == [None, None, "true", None]
    assert study.data.tags["mlflow.note.content"].splitlines() == [
        "Which margin?",
        "",
        "| trial | EER % | loss.margin |",
        "| --- | --- | --- |",
        "| t002 | 20.00 | 0.3 |",
        "| t000 | 30.00 | 0.1 |",
    ]


def test_a_new_driver_counts_what_ended_before_it(tracking_uri: str) -> None:
    run_trial(new_driver(tracking_uri), trial(0, **{"loss.margin": 0.1}), [0.4, 0.3, 0.2])
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(1, **{"loss.margin": 0.2}), [0.4, 0.3, 0.1])
    (study,) = runs(tracking_uri, "study")
    assert study.data.metrics["trials_complete"] == 2
    assert [run.data.tags.get("raysv.best") for run in runs(tracking_uri)] == [None, "true"]
    note = study.data.tags["mlflow.note.content"]
    assert note.index("| t001 | 10.00 | 0.2 |") < note.index("| t000 | 20.00 | 0.1 |")


def test_a_trial_that_is_tried_again_has_not_ended(tracking_uri: str) -> None:
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(0), [0.4], failure="NaN")
    tell(callback, "on_trial_start", trial(0))
    run_trial(callback, trial(1), [0.4, 0.3, 0.2])
    (study,) = runs(tracking_uri, "study")
    assert study.data.metrics["trials_error"] == 0 and study.data.metrics["trials_complete"] == 1


def test_the_best_that_starts_again_is_not_marked_beside_the_new_one(tracking_uri: str) -> None:
    run_trial(new_driver(tracking_uri), trial(0), [0.4, 0.3, 0.2])
    callback = new_driver(tracking_uri)
    tell(callback, "on_trial_start", trial(0))  # Tune did not hear of its end
    run_trial(callback, trial(1), [0.4, 0.3, 0.3])
    assert [run.data.tags.get("raysv.best") for run in runs(tracking_uri)] == [None, "true"]


@pytest.mark.parametrize("method", ["log_batch", "delete_tag", "set_tag"])
def test_a_lost_reply_to_the_summary_costs_neither_the_mark_nor_the_end(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "RETRY_SHARE", 0.0)
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(0), [0.4, 0.3, 0.3])
    write, lost = getattr(MlflowClient, method), []

    def write_and_lose_a_reply(client: MlflowClient, run_id: str, *args: Any, **more: Any) -> None:
        write(client, run_id, *args, **more)
        if ("metrics" in more and "tags" in more) or method != "log_batch":
            lost.append(run_id)
            if len(lost) == 1:
                raise ConnectionError("no answer")

    monkeypatch.setattr(MlflowClient, method, write_and_lose_a_reply)
    run_trial(callback, trial(1), [0.4, 0.3, 0.2])
    run_trial(callback, trial(2), [0.4, 0.3, 0.25])
    callback.on_experiment_end([trial(0), trial(1), trial(2)])
    assert lost
    assert [run.data.tags.get("raysv.best") for run in runs(tracking_uri)] == [None, "true", None]
    (study,) = runs(tracking_uri, "study")
    assert (study.info.status, study.data.metrics["trials_complete"]) == ("FINISHED", 3)


def test_the_best_run_may_be_removed_by_hand_while_the_study_runs(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "RETRY_SHARE", 0.0)
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(0), [0.4, 0.3, 0.2])
    MlflowClient(tracking_uri).delete_run(runs(tracking_uri)[0].info.run_id)
    run_trial(callback, trial(1), [0.4, 0.3, 0.3])
    run_trial(callback, trial(2), [0.4, 0.3, 0.1])
    callback.on_experiment_end([trial(1), trial(2)])
    assert [run.data.tags.get("raysv.best") for run in runs(tracking_uri)] == [None, "true"]


def test_the_end_of_a_trial_asks_mlflow_for_no_other(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(0), [0.4, 0.3, 0.2])
    asked: list[str] = []
    searching = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient,
        "search_runs",
        lambda self, ids, conditions, **more: asked.append(conditions) or searching(self, ids, conditions, **more),
    )
    run_trial(callback, trial(1), [0.4, 0.3, 0.1])
    assert asked == []


def test_a_trial_that_tune_forgot_is_removed(tracking_uri: str) -> None:
    tell(new_driver(tracking_uri), "on_trial_start", trial(0))
    callback = new_driver(tracking_uri)
    run_trial(callback, trial(1), [0.4, 0.3, 0.2])
    callback.on_experiment_end([trial(1)])
    (known,) = runs(tracking_uri)
    assert known.data.tags["raysv.trial_id"] == "id1"
    assert known.info.status == runs(tracking_uri, "study")[0].info.status == "FINISHED"


def test_two_studies_of_one_name_leave_each_other_alone(tracking_uri: str) -> None:
    mine, theirs = (new_driver(tracking_uri, study_id=study) for study in ("mine", "theirs"))
    tell(mine, "on_trial_start", trial(0))
    tell(theirs, "on_trial_start", trial(1))
    theirs.on_experiment_end([])
    assert [run.data.tags["raysv.trial_id"] for run in runs(tracking_uri)] == ["id0"]
    assert len(runs(tracking_uri, "study")) == 2
