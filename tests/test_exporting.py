import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config, voice

import raysv
from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import floating, read_audio
from raysv.learning import exporting
from raysv.learning.checkpoint import load_encoder
from raysv.speech.features import FRAME_SAMPLES

Embed = Callable[[Any], Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its threshold is 0.5."""
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("exporting"), tiny_config(Path()), tiny_encoder())
    return folder


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> Any:
    """What PyTorch makes of the encoder, which takes it long."""
    return exporting._exported(load_encoder(checkpoint))


@pytest.fixture
def at_hand(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_exported", lambda encoder: program)


@pytest.fixture
def file(checkpoint: Path, at_hand: None, tmp_path: Path) -> Path:
    target = tmp_path / "speaker.onnx"
    distance = exporting.export_onnx(checkpoint, target)
    assert distance is not None and distance < 1e-5
    return target


@pytest.fixture
def differs(file: Path, checkpoint: Path) -> Embed:
    """Runs waveforms `(n, samples)` through onnxruntime and PyTorch; gives the largest difference."""
    session, encoder = onnxruntime.InferenceSession(file), load_encoder(checkpoint)

    def difference(waveforms: Any) -> float:
        given = np.asarray(waveforms, np.float32)
        (embeddings,) = session.run(None, {"waveforms": given})
        assert embeddings.dtype == np.float32
        expected = encoder.embed([*torch.from_numpy(given)]).numpy()
        assert embeddings.shape == expected.shape == (len(given), 16)
        return float(np.abs(embeddings - expected).max())

    return difference


@pytest.mark.parametrize("seconds", [0.5, 1.234, 12.0])
@pytest.mark.parametrize("count", [1, 5])
def test_waveforms_of_any_length_and_number_have_the_embeddings_of_pytorch(
    differs: Embed, seconds: float, count: int
) -> None:
    assert differs([voice(speaker, 30, seconds) for speaker in range(count)]) < 1e-4


def test_silence_and_an_offset_do_not_matter(differs: Embed) -> None:
    spoken = voice(3, 30, 2.0)
    late = np.where(np.arange(len(spoken)) < SAMPLE_RATE, 0, spoken)
    assert differs(np.rint([32768 * late, 6554 + 16384 * spoken, 6554 + 16384 * late]) / 32768) < 1e-4


@pytest.mark.skipif(not os.environ.get("RAYSV_DATA"), reason="RAYSV_DATA does not name the pack of real speech")
@pytest.mark.parametrize("corpus", ["speechocean762", "ravdess", "urdu"])
def test_real_speech_has_the_embeddings_of_pytorch(differs: Embed, corpus: str) -> None:
    speakers = sorted(path for path in Path(os.environ["RAYSV_DATA"], "speech", corpus).iterdir() if path.is_dir())
    recordings = [floating(read_audio(next(speaker.glob("*.flac")))) for speaker in speakers[:8]]
    together = np.concatenate(recordings)
    assert len(together) > 12 * SAMPLE_RATE
    batch = [waveform[: 2 * SAMPLE_RATE] for waveform in recordings]
    for waveforms in (batch, [recordings[0]], [recordings[0][:8000]], [together[: 12 * SAMPLE_RATE]], [together]):
        assert differs(waveforms) < 1e-4


def test_less_than_a_frame_is_refused(file: Path) -> None:
    session = onnxruntime.InferenceSession(file)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        session.run(None, {"waveforms": np.zeros((1, FRAME_SAMPLES - 1), np.float32)})


def test_the_file_tells_what_it_is(file: Path, checkpoint: Path) -> None:
    session = onnxruntime.InferenceSession(file)
    told = session.get_modelmeta()
    assert "16 kHz" in told.description
    assert told.custom_metadata_map == {
        "sample_rate": "16000",
        "embedding_dim": "16",
        "threshold": "0.5",
        "threshold_is": "the cosine at which false acceptances equal false rejections on the dev pairs",
        "dev_eer": "0.25",
        "data_hash": "0123456789abcdef",
        "encoder_sha256": hashlib.sha256((checkpoint / "encoder.pt").read_bytes()).hexdigest(),
        "written_by": f"raysv {version('raysv')}",
    }
    assert [(given.name, given.shape, given.type) for given in session.get_inputs()] == [
        ("waveforms", ["n", "samples"], "tensor(float)")
    ]
    assert [(given.name, given.shape) for given in session.get_outputs()] == [("embeddings", ["n", 16])]
    onnx.checker.check_model(file, full_check=True)


def test_the_file_names_nothing_of_the_machine_that_made_it(file: Path) -> None:
    assert str(Path(raysv.__file__).parent).encode() not in file.read_bytes()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("distance", [2e-4, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(
    checkpoint: Path, at_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distance: float
) -> None:
    monkeypatch.setattr(exporting, "_distance", lambda *given: distance)
    (tmp_path / "speaker.onnx").write_text("what was there before")
    with pytest.raises(ValueError, match="away from PyTorch's"):
        exporting.export_onnx(checkpoint, tmp_path / "speaker.onnx")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there before"]


def test_the_comparison_sees_other_weights(file: Path) -> None:
    other = tiny_encoder()
    with torch.no_grad():
        other.ecapa.embedding.weight[0, 0] += 0.1
    assert exporting._distance(file, other) > exporting.TOLERANCE
    with torch.no_grad():
        other.ecapa.embedding.weight[0, 0] = torch.nan
    assert np.isnan(exporting._distance(file, other))


def test_nothing_is_left_where_writing_breaks_off(
    checkpoint: Path, at_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_distance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exporting.export_onnx(checkpoint, tmp_path / "speaker.onnx")
    assert list(tmp_path.iterdir()) == []


def absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == package else find(name))


def test_without_onnxruntime_the_file_is_written_and_not_compared(
    checkpoint: Path, at_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "onnxruntime")
    assert exporting.export_onnx(checkpoint, tmp_path / "speaker.onnx") is None
    assert (tmp_path / "speaker.onnx").is_file()


def test_without_onnxscript_the_extra_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "onnxscript")
    with pytest.raises(ValueError, match="pip install onnxscript onnxruntime"):
        exporting.export_onnx(checkpoint, tmp_path / "speaker.onnx")


@pytest.mark.parametrize("name", ["nowhere/speaker.onnx", "."])
def test_what_cannot_be_written_is_said_before_the_work(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name a file in a folder that is there"):
        exporting.export_onnx(checkpoint, tmp_path / name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        exporting.export_onnx(tmp_path, tmp_path / "speaker.onnx")
