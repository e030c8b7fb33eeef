import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from learning_fixtures import tiny_config
from mlflow_fixtures import mlflow_warnings

from raysv.config import config_to_dict
from raysv.corpus.loading import load_corpus
from raysv.learning.training import fit
from raysv.search import machine, readiness
from raysv.search.cluster import LOCAL_OBJECT_STORE
from raysv.search.machine import FAIL, OK, WARN, Finding
from raysv.search.readiness import checkpoint_bytes, data, examine, mlflow, ray_address, shared_memory
from raysv.search.space import Space, space_from_dict

pytestmark = mlflow_warnings
Mount = Callable[..., Path]


def space_of(root: Path, **values: Any) -> Space:
    """The space of one small configuration; `data__root=...` sets a key otherwise."""
    return space_from_dict(config_to_dict(tiny_config(root, **values)), "tiny")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at but the results folder."""
    for name in ("versions", "gpus", "group", "audio", "open_files"):
        monkeypatch.setattr(machine, name, lambda: Finding(OK, "as it should be"))
    for name in ("shared_memory", "mlflow", "data"):
        monkeypatch.setattr(readiness, name, lambda _: Finding(OK, "as it should be"))


@pytest.mark.usefixtures("quick")
def test_a_check_that_breaks_is_a_finding_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Finding:
        raise RuntimeError("CUDA error:\n  no kernel image")

    monkeypatch.setattr(machine, "gpus", broken)
    findings = dict(examine(None, {}, tmp_path))
    assert findings.pop("GPUs") == Finding(FAIL, "RuntimeError: CUDA error: no kernel image")
    assert {finding.verdict for finding in findings.values()} == {OK}
    assert len(findings) == 11


@pytest.mark.usefixtures("quick")
def test_a_space_that_a_broken_package_keeps_from_being_read_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "raysv.search.space", None)
    findings = dict(examine(tmp_path / "space.yaml", {}, tmp_path))
    assert findings["space"].verdict == FAIL
    assert "ModuleNotFoundError" in findings["space"].words
    assert findings["results"].verdict == OK


@pytest.mark.usefixtures("quick")
def test_the_folders_are_those_that_a_study_would_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "from the environment"))
    assert str(tmp_path / "from the environment") in dict(examine(None, {}, tmp_path))["cache"].words
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"data": {"cache": str(tmp_path / "from the space")}}))
    findings = dict(examine(tmp_path / "space.yaml", {"search.trials": 3}, tmp_path / "kept"))
    assert str(tmp_path / "from the space") in findings["cache"].words
    assert str(tmp_path / "kept") in findings["results"].words and "checkpoints may take" in findings["results"].words
    monkeypatch.setenv("RAYSV_CACHE", "relative")
    assert "Make it absolute" in dict(examine(None, {}, tmp_path))["cache"].words


def test_a_space_that_is_wrong_is_no_finding_but_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No file"):
        next(examine(tmp_path / "none.yaml", {}, tmp_path))


def test_checkpoints_take_what_is_said(tiny_corpus: Path) -> None:
    config = tiny_config(tiny_corpus, training__epochs=1, model__channels=64)
    sizes = []

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        assert folder is not None
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.pt")))

    fit(config, report)
    expected = checkpoint_bytes(space_from_dict(config_to_dict(config) | {"search": {"trials": 1}}, "tiny")) / 3
    assert sizes[0] == pytest.approx(expected, rel=0.2)
    with_ranges = config_to_dict(config) | {"search": {"trials": 10, "confirm": 1, "confirm_seeds": 5}}
    with_ranges["loss"] |= {"margin": {"uniform": [0.1, 0.3]}}
    assert checkpoint_bytes(space_from_dict(with_ranges, "tiny")) == 20 * 3 * expected
    assert checkpoint_bytes(None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="loader workers are the default beside a GPU")
def test_loader_workers_take_shared_memory_for_the_batches_they_read_ahead(tiny_corpus: Path) -> None:
    none, many = (tiny_config(tiny_corpus, data__loader_workers=workers) for workers in (None, 10**6))
    ray = f"Ray {LOCAL_OBJECT_STORE / 1e6:.0f} MB"
    assert f"batches take 0 MB, {ray}" in shared_memory([none]).words
    finding = shared_memory([none, many])
    assert finding.verdict == FAIL
    assert "lower data.loader_workers" in finding.words


def test_a_database_of_mlflow_that_a_study_would_make_is_tried_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    finding = mlflow(tmp_path)
    assert finding == Finding(OK, f"sqlite:///{tmp_path}/mlflow.db, which a study makes")
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_mlflow_that_is_there_is_asked(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    assert mlflow(Path("/")) == Finding(OK, tracking_uri)
    Path(tracking_uri.removeprefix("sqlite:///")).write_text("no database")
    finding = mlflow(Path("/"))
    assert finding.verdict == FAIL
    assert "MLflow cannot be used at" in finding.words


def test_a_database_of_mlflow_that_cannot_be_made_fails(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    finding = mlflow(mount("ro"))
    assert finding.verdict == FAIL
    assert "mlflow.db cannot be made: Read-only file system. Start in another folder" in finding.words


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9/base",
        "http://hidden@127.0.0.1:9/base?token=hidden",
        "https://me:hidden@127.0.0.1:9",
        "nonsense://hidden@127.0.0.1/x?password=hidden",
    ],
)
def test_a_server_of_mlflow_that_does_not_answer_fails_and_no_secret_is_told(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    finding = mlflow(Path("/"))
    assert finding.verdict == FAIL
    assert "127.0.0.1" in finding.words
    assert "hidden" not in finding.words


def test_a_cluster_that_does_not_answer_fails_and_one_that_does_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address().verdict == OK
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert ray_address() == Finding(OK, f"RAY_ADDRESS is {address}")
    finding = ray_address()
    assert finding.verdict == FAIL
    assert f"no Ray cluster answers at RAY_ADDRESS {address}: [Errno 111] Connection refused. Set" in finding.words
    monkeypatch.setenv("RAY_ADDRESS", "ray://hidden@127.0.0.1:10001")
    finding = ray_address()
    assert finding.verdict == FAIL
    assert "ray job submit" in finding.words and "hidden" not in finding.words


def test_data_are_read_and_tried_before_they_are_decoded_and_known_afterwards(tiny_corpus: Path) -> None:
    space = space_of(tiny_corpus)
    finding = data(space)
    assert finding.verdict == OK, finding.words
    assert "MB of the cache when decoded" in finding.words
    assert not (tiny_corpus.parent / "cache").exists()
    (config,) = {repr(corner): corner for corner in space.corners()}.values()
    corpus = load_corpus(config.data, config.augment)
    stores = (corpus.train.store, corpus.dev.store, *corpus.clips.values())
    assert data(space).words == f"{sum(map(len, stores))} recordings, decoded already"
    assert finding.words.startswith(f"{sum(map(len, stores))} recordings, ")


def test_what_decoding_takes_is_known_beforehand(tiny_corpus: Path, mount: Mount) -> None:
    small = mount("size=2m")
    finding = data(space_of(tiny_corpus, data__cache=str(small)))
    assert finding.verdict == FAIL
    assert "of the cache when decoded, where 2 MB are free. Name another by data.cache" in finding.words
    config = tiny_config(tiny_corpus)
    corpus = load_corpus(config.data, config.augment)
    stores = (corpus.train.store, corpus.dev.store, *corpus.clips.values())
    bytes_taken = sum((store.folder / "samples.i16").stat().st_size for store in stores)
    assert f" {bytes_taken / 1e6:.0f} MB of the cache" in finding.words


@pytest.mark.parametrize("skip", [False, True])
def test_recordings_that_cannot_be_used_fail_unless_they_are_to_be_left_out(tiny_corpus: Path, skip: bool) -> None:
    recordings = sorted((tiny_corpus).glob("train-0/*.wav"))
    recordings[0].unlink()
    recordings[1].write_bytes(b"no audio")
    for decoded in (False, True):
        finding = data(space_of(tiny_corpus, data__skip_bad_audio=skip))
        assert finding.verdict == (WARN if skip else FAIL)
        assert "2 or more cannot be used" in finding.words
        assert ("--skip-bad-audio" in finding.words) != skip
        assert ("decoded already" in finding.words) == decoded
        config = tiny_config(tiny_corpus, data__skip_bad_audio=True)
        load_corpus(config.data, config.augment)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: (root / "train.csv").unlink(), "No list"),
        (lambda root: (root / "dev_pairs.txt").write_text("1 a\n"), "dev_pairs.txt:1"),
        (lambda root: (root / "noise.csv").unlink(), "data.noise"),
        (lambda root: (root / "dev_pairs.txt").write_text("1 nobody.wav no-one.wav\n"), "names 2 recordings"),
    ],
)
def test_lists_that_are_missing_or_wrong_are_refused_as_a_study_refuses_them(
    tiny_corpus: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    spoil(tiny_corpus)
    with pytest.raises(ValueError, match=told):
        data(space_of(tiny_corpus))
