import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cluster_fixtures import end, free_port
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config, voice, write_audio
from mlflow import MlflowClient
from mlflow.models import Model
from mlflow_fixtures import Server, mlflow_warnings, runs

from raysv import train
from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import floating, read_audio
from raysv.learning.checkpoint import load_encoder
from raysv.search import registering
from raysv.search.catchup import catch_up
from raysv.search.records import TrialRecord
from raysv.search.registering import check_name, register
from raysv.search.space import space_from_dict
from raysv.search.study import Study, open_study, study_id

pytestmark = mlflow_warnings

SPACE = space_from_dict({"training": {"epochs": 2}, "search": {"trials": 1}}, "train-best")

LOADED_ELSEWHERE = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
tables = json.load(sys.stdin)
import raysv
print(json.dumps({
    "embeddings": [model.predict(pandas.DataFrame(table)).tolist() for table in tables],
    "example": model.predict(model.input_example).tolist(),
    "facts": model.metadata.metadata,
    "source": raysv.__file__,
    "search": sorted({"ray", "optuna", "onnxruntime"} & sys.modules.keys()),
}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    end(running.process)


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tracking_uri: str) -> str:
    return str(request.getfixturevalue("server").uri if request.param == "server" else tracking_uri)


@pytest.fixture
def name() -> str:
    """Of a model that no other test registers."""
    return f"speakers-{uuid.uuid4().hex[:8]}"


class Trained:
    """What a finished `raysv.train` leaves: its study's folder, its encoder's and its run in MLflow."""

    def __init__(self, results: Path, uri: str, name: str = "train-best", **facts: Any) -> None:
        self.uri, self.folder = uri, open_study(SPACE, results, uri, name)
        self.checkpoint = write_checkpoint(self.folder / "checkpoint", tiny_config(self.folder), tiny_encoder())
        description = self.checkpoint / "checkpoint.yaml"
        description.write_text(yaml.safe_dump(yaml.safe_load(description.read_text()) | facts))
        metrics = {"epoch": 2, "dev/eer": 0.25, "checkpoint_path": str(self.checkpoint)}
        self.record = TrialRecord("t000", "id0", {}, metrics, "complete", "", str(self.checkpoint))
        catch_up(Study(SPACE, [self.record]), self.folder, uri)

    def register(self, name: str) -> str:
        return register(self.checkpoint, self.folder, "id0", self.uri, name)


def best(uri: str, name: str) -> str | None:
    holder = MlflowClient(uri).get_registered_model(name).aliases.get("best")
    return None if holder is None else str(holder)


def test_a_finished_run_becomes_a_version_that_tells_where_it_is_from(tmp_path: Path, uri: str, name: str) -> None:
    trained = Trained(tmp_path, uri, name)
    assert trained.register(name) == f"{name} version 1, models:/{name}@best"
    client = MlflowClient(uri)
    made = client.get_model_version_by_alias(name, "best")
    assert str(made.version) == "1" and made.status == "READY"
    run = client.get_run(made.run_id)
    assert run.data.tags["raysv.trial_id"] == "id0"
    parent = client.get_run(made.tags["raysv.parent_run"])
    assert (parent.info.run_name, parent.data.tags["raysv.kind"]) == (name, "study")
    assert run.info.status == "FINISHED"
    told = {key.removeprefix("raysv."): value for key, value in made.tags.items()}
    assert (told["study"], told["study_id"]) == (name, study_id(trained.folder))
    assert (told["dev_eer"], told["threshold"], told["data_hash"]) == ("0.25", "0.5", "0123456789abcdef")
    assert "EER 25.00 % on the dev pairs" in made.description
    assert "16 kHz" in client.get_registered_model(name).description


def test_training_ends_with_a_version(tmp_path: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(tmp_path, tracking_uri)
    shutil.copytree(trained.checkpoint, tmp_path / "kept")
    study = Study(SPACE, [replace(trained.record, checkpoint=str(tmp_path / "kept"))])
    assert train._conclude(study, trained.folder, tracking_uri, "raysv-ecapa") == 0
    assert "Model    raysv-ecapa version 1, models:/raysv-ecapa@best\n" in capsys.readouterr().out


def test_a_version_has_a_signature_an_input_example_and_no_pickle(tmp_path: Path, uri: str, name: str) -> None:
    Trained(tmp_path, uri, name).register(name)
    (run_id,) = {made.run_id for made in MlflowClient(uri).search_model_versions(f"name = '{name}'")}
    folder = Path(MlflowClient(uri).download_artifacts(run_id, "encoder", str(tmp_path)))
    model = Model.load(folder)
    assert model.signature is not None
    inputs = {column["name"]: column for column in model.signature.inputs.to_dict()}
    assert inputs == {
        "waveform": {"type": "array", "items": {"type": "double"}, "name": "waveform", "required": False},
        "path": {"type": "string", "name": "path", "required": False},
    }
    assert model.signature.outputs.to_dict()[0]["tensor-spec"] == {"dtype": "float32", "shape": (-1, 16)}
    (example,) = model.load_input_example(str(folder))
    assert [*example] == ["waveform"] and max(example["waveform"]) == pytest.approx(0.1)
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".pickle") or file.name == "__pycache__"]
    artifacts = folder / "artifacts" / "checkpoint"
    assert {file.name for file in artifacts.iterdir()} == {"README.md", "checkpoint.yaml", "encoder.pt"}
    assert f"torch=={version('torch').partition('+')[0]}" in (folder / "requirements.txt").read_text().splitlines()


def test_another_process_loads_the_best_version_and_embeds_as_the_checkpoint_does(
    tmp_path: Path, uri: str, name: str
) -> None:
    trained = Trained(tmp_path, uri, name)
    trained.register(name)
    files = [tmp_path / f"{number}.wav" for number in range(3)]
    for number, seconds in enumerate((0.3, 1.2, 2.5)):
        write_audio(files[number], voice(number, 0, seconds))
    waveforms = [floating(read_audio(file)) for file in files]
    tables = [{"waveform": [samples.tolist() for samples in waveforms]}, {"path": [str(file) for file in files]}]
    desk = tmp_path / "elsewhere"
    desk.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, uri, f"models:/{name}@best"],
        input=json.dumps(tables),
        cwd=desk,
        env=environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    expected = load_encoder(trained.checkpoint).embed([torch.from_numpy(samples) for samples in waveforms])
    np.testing.assert_allclose(told["embeddings"], [expected.numpy()] * 2, atol=1e-6)
    assert np.isfinite(told["example"]).all() and np.shape(told["example"]) == (1, 16)
    assert told["facts"]["threshold"] == "0.5" and told["facts"]["sample_rate"] == str(SAMPLE_RATE)
    assert Path(told["source"]).parts[-3:] == ("code", "raysv", "__init__.py")  # it carries the code it was made with
    assert told["search"] == []


def test_the_alias_goes_to_a_lower_eer_on_the_same_data_alone(tmp_path: Path, tracking_uri: str, name: str) -> None:
    def one(number: int, **facts: Any) -> str:
        return Trained(tmp_path, tracking_uri, f"run{number}", **facts).register(name)

    assert one(1, dev_eer=0.2) == f"{name} version 1, models:/{name}@best"
    worse = f"{name} version 2; best stays version 1: EER 20.00 % on the dev pairs, not 30.00 %"
    assert one(2, dev_eer=0.3) == worse
    assert one(3, dev_eer=0.2) == f"{name} version 3; best stays version 1: EER 20.00 % on the dev pairs, not 20.00 %"
    other = f"{name} version 4; best stays version 1, not known to have learned of the same data"
    assert one(4, dev_eer=0.1, data_hash="other") == other
    assert best(tracking_uri, name) == "1"
    assert one(5, dev_eer=0.1) == f"{name} version 5, models:/{name}@best"
    MlflowClient(tracking_uri).delete_registered_model_alias(name, "best")
    assert one(6, dev_eer=0.4) == f"{name} version 6, models:/{name}@best"
    assert best(tracking_uri, name) == "6"


def test_a_model_of_somebody_else_keeps_its_alias(tmp_path: Path, tracking_uri: str, name: str) -> None:
    client = MlflowClient(tracking_uri)
    client.create_registered_model(name)
    client.create_model_version(name, str(tmp_path))
    client.set_registered_model_alias(name, "best", "1")
    told = Trained(tmp_path, tracking_uri).register(name)
    assert told == f"{name} version 2; best stays version 1, not known to have learned of the same data"


def test_a_run_is_registered_once_under_a_name(tmp_path: Path, tracking_uri: str, name: str) -> None:
    trained = Trained(tmp_path, tracking_uri)
    assert trained.register(name) == trained.register(name) == f"{name} version 1, models:/{name}@best"
    assert trained.register(f"{name}-too") == f"{name}-too version 1, models:/{name}-too@best"


def test_what_was_broken_off_before_the_alias_was_set_is_mended_by_the_next_time(
    tmp_path: Path, tracking_uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(tmp_path, tracking_uri)

    def interrupt(*given: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(registering, "_alias", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained.register(name)
    assert best(tracking_uri, name) is None
    assert trained.register(name) == f"{name} version 1, models:/{name}@best"


def test_registering_leaves_the_run_as_it_ended(tmp_path: Path, tracking_uri: str, name: str) -> None:
    trained = Trained(tmp_path, tracking_uri)
    (before,) = runs(tracking_uri)
    trained.register(name)
    (after,) = runs(tracking_uri)
    assert (after.info.end_time, after.info.status) == (before.info.end_time, "FINISHED")
    assert after.data.metrics == before.data.metrics


def test_a_server_that_is_gone_is_told_and_nothing_is_raised(tmp_path: Path, tracking_uri: str, name: str) -> None:
    trained = Trained(tmp_path, tracking_uri)
    gone = f"http://127.0.0.1:{free_port()}"
    told = register(trained.checkpoint, trained.folder, "id0", gone, name)
    assert told.startswith(f"not registered as {name}: ")
    assert told.endswith(f"raysv.train --resume {trained.folder}")
    assert "\n" not in told


def test_a_run_that_mlflow_missed_is_told(tmp_path: Path, tracking_uri: str, name: str) -> None:
    trained = Trained(tmp_path, tracking_uri)
    told = register(trained.checkpoint, trained.folder, "another", tracking_uri, name)
    assert "has no run of train-best. Once it can be: " in told


@pytest.mark.parametrize("bad", ["", "a/b", "a:b", ".", "..", "two words", "-x", "a\n"])
def test_a_name_that_no_model_can_have_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="A model cannot be called"):
        check_name(bad)


@pytest.mark.parametrize("good", ["raysv-ecapa", "cnceleb_2.1", "Sprecher"])
def test_a_name_that_a_model_can_have_is_taken(good: str) -> None:
    check_name(good)
