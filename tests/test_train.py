import shlex
from pathlib import Path
from typing import Any

import pytest

from raysv import train
from raysv.config import read_yaml
from raysv.search.results import METRIC, TIME
from raysv.search.space import Space, space_from_dict
from raysv.search.study import Study, TrialRecord, note_start, open_study

OPEN = {"loss": {"margin": {"uniform": [0.0, 0.5]}}, "search": {"trials": 4}}
URI = "http://mlflow.example"


class Trained:
    """Stands for the training: notes what it was asked for, and ends as told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []
        self.outcome, self.reason = "complete", ""
        self.metrics: dict[str, float] = {}
        self.registered: list[tuple[Any, ...]] = []

    def register(self, *given: Any) -> str:
        self.registered.append(given)
        return "what came of it"

    def __call__(self, space: Space, folder: Path, corpus: Any, uri: str, **options: Any) -> Study:
        self.asked.append({"space": space, "folder": folder, "uri": uri, **options})
        checkpoint = self.folder / "trial"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "encoder.pt").write_text("weights")
        metrics = {TIME: space.epochs, METRIC: 0.1, "dev/min_dcf_0.01": 0.5, "test/eer": 0.125, **self.metrics}
        return Study(space, [TrialRecord("t000", "id", {}, metrics, self.outcome, self.reason, str(checkpoint))])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """The door's room, without MLflow, data and Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setattr(train, "check", lambda uri: None)
    monkeypatch.setattr(train, "check_data", lambda space, tests: "some data")
    training = Trained(tmp_path)
    monkeypatch.setattr(train, "run_study", training)
    monkeypatch.setattr(train, "register", training.register)
    return training


@pytest.fixture
def refused(trained: Trained, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the door with something wrong; gives its one line of complaint."""

    def call(*arguments: str) -> str:
        assert train.main(list(arguments)) == 2
        written = capsys.readouterr()
        assert (written.out, trained.asked) == ("", [])
        assert written.err.startswith("raysv.train: ") and written.err.count("\n") == 1
        return written.err

    return call


def test_a_configuration_is_trained_once_to_its_end(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\nsearch: {trials: 9}\n")
    assert train.main(["mine.yaml", "--epochs", "7", "--set", "resources.workers=2"]) == 0
    (asked,) = trained.asked
    folder = tmp_path / "results" / "train-mine"
    assert (asked["folder"], asked["uri"], asked["resume"], asked["tests"]) == (folder, URI, False, True)
    space = asked["space"]
    assert (space.tree["loss"]["margin"], space.epochs, space.resources.workers) == (0.3, 7, 2)
    assert (space.search.trials, space.search.early_stopping) == (1, "none")
    assert (folder / "checkpoint" / "encoder.pt").read_text() == "weights"
    printed = capsys.readouterr().out
    assert "dev    EER 10.00 %   minDCF(0.01) 0.500\ntest   EER 12.50 %   no interval: too few speakers\n" in printed
    assert "raysv.verify results/train-mine/checkpoint" in printed


def test_the_encoder_of_a_run_that_ended_well_is_registered_unless_that_is_not_wanted(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\n")
    for options in ([], ["--register", "speakers"], ["--no-register"]):
        assert train.main(["mine.yaml", *options]) == 0
    folders = [asked["folder"] for asked in trained.asked]
    assert trained.registered == [
        (folders[0] / "checkpoint", folders[0], "id", URI, "raysv-ecapa"),
        (folders[1] / "checkpoint", folders[1], "id", URI, "speakers"),
    ]
    printed = capsys.readouterr().out
    assert f"Encoder  {folders[0] / 'checkpoint'}\nModel    what came of it\n\nNext:" in printed
    assert f"Encoder  {folders[2] / 'checkpoint'}\n\nNext:" in printed


def test_a_run_goes_on_to_be_registered_as_it_was_started_or_as_it_is_told_now(
    trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\n")
    trained.outcome = "unfinished"
    assert train.main(["mine.yaml", "--name", "named", "--register", "speakers"]) == 130
    assert train.main(["mine.yaml", "--name", "unnamed", "--no-register"]) == 130
    assert trained.registered == []
    trained.outcome = "complete"
    for options in (["named"], ["named", "--no-register"], ["unnamed"], ["unnamed", "--register", "late"]):
        assert train.main(["--resume", *options]) == 0
    assert [given[-1] for given in trained.registered] == ["speakers", "late"]


def test_a_name_that_no_model_can_have_is_refused_before_anything_is_read(refused: Any) -> None:
    assert "A model cannot be called 'a/b'" in refused("gone.yaml", "--register", "a/b")


def test_the_interval_of_a_test_list_s_eer_is_printed(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\n")
    trained.metrics = {"test/eer_low": 0.081, "test/eer_high": 0.1549}
    assert train.main(["mine.yaml"]) == 0
    assert "test   EER 12.50 %   90 % interval of the EER 8.1 to 15.5 %\n" in capsys.readouterr().out


def test_a_run_that_was_broken_off_goes_on_where_it_was(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\n")
    trained.outcome = "unfinished"
    assert train.main(["mine.yaml", "--results", "a b"]) == 130
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[-2:] == ["--resume", "a b/train-mine"]
    assert not (tmp_path / "a b/train-mine/checkpoint").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere.example")
    trained.outcome = "complete"
    assert train.main(command[command.index("raysv.train") + 1 :]) == 0
    first, again = trained.asked
    assert (again["folder"], again["uri"]) == (first["folder"], URI)
    assert again["space"].to_dict() == first["space"].to_dict()
    assert (again["resume"], again["tests"]) == (True, True)
    assert (tmp_path / "a b/train-mine/checkpoint/encoder.pt").is_file()


def test_a_run_that_failed_says_why(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("loss: {margin: 0.3}\n")
    trained.outcome, trained.reason = "error", "ValueError: no file a.wav"
    assert train.main(["mine.yaml"]) == 1
    assert capsys.readouterr().err == "Training failed: ValueError: no file a.wav\n"


def test_the_best_configuration_of_a_study_is_trained(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = space_from_dict(OPEN | {"resources": {"workers": 3}}, "small")
    folder = open_study(space, tmp_path / "results", URI, "study")
    note_start(folder, concurrent_trials=1)  # it ran
    best = TrialRecord("t000", "id", {"loss.margin": 0.125}, {TIME: space.epochs, METRIC: 0.1}, "complete", "", "")
    Study(space, [best]).write(folder)
    monkeypatch.setattr(train, "read_study", lambda folder: Study(space, [best]))
    for source in ("study", "results/study", "small", "results/study/best_config.yaml"):
        assert train.main([source]) == 0
    assert {asked["space"].tree["loss"]["margin"] for asked in trained.asked} == {0.125}
    assert {asked["space"].resources for asked in trained.asked} == {space.resources}
    names = ["train-study", *(f"train-study-{number}" for number in (2, 3, 4))]
    assert [asked["folder"].name for asked in trained.asked] == names
    assert read_yaml(tmp_path / "results" / names[0] / "space.yaml")["search"]["trials"] == 1


def test_a_source_or_a_run_to_go_on_with_is_named_but_not_both(refused: Any) -> None:
    assert "Name what to train, or a run to --resume" in refused()
    assert "Name what to train, or a run to --resume" in refused("mine.yaml", "--resume", "run")


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", "3"],
        ["--set", "loss.margin=0.1"],
        ["--name", "new"],
        ["--skip-bad-audio"],
        ["--workers-per-trial", "2"],
        ["--gpus-per-trial", "0"],
    ],
)
def test_a_run_goes_on_as_it_was_started(refused: Any, options: list[str]) -> None:
    assert "no other option fits" in refused("--resume", "run", *options)


def test_a_search_is_not_gone_on_with_as_a_run(refused: Any, tmp_path: Path) -> None:
    open_study(space_from_dict(OPEN, "small"), tmp_path / "results", URI, "study")
    assert "study is a search. Go on with it: raysv.tune --resume results/study" in refused("--resume", "study")


def test_a_configuration_that_leaves_something_open_is_refused(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "open.yaml").write_text("loss: {margin: {uniform: [0.0, 0.5]}}\n")
    assert "open.yaml leaves loss.margin open. Search it with raysv.tune" in refused("open.yaml")


def test_what_is_not_there_is_named_as_what_it_was_meant_to_be(refused: Any, tmp_path: Path) -> None:
    assert "No file " in refused("gone.yaml")
    assert "No file " in refused("results/study/best_config.yml")
    assert "No study gone to be found" in refused("gone")
    assert "No study gone to be found" in refused("--resume", "gone")
    open_study(space_from_dict(OPEN, "small"), tmp_path / "results", URI, "study")
    assert "Study study has no best configuration: no trial has come to its end" in refused("study")
