from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config, voice, write_audio

from raysv.learning.checkpoint import encoder_facts, load_encoder
from raysv.search import registering


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("served"), tiny_config(Path()), tiny_encoder())
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    """As MLflow loads it, which runs raysv/search/served.py."""
    place = checkpoint / "place"
    place.mkdir()
    registering._save(place / "model", checkpoint, encoder_facts(checkpoint))
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(place / "model"))


def embedded(checkpoint: Path, *waveforms: Any) -> Any:
    return load_encoder(checkpoint).embed([torch.from_numpy(np.asarray(one, np.float32)) for one in waveforms]).numpy()


def test_waveforms_of_any_length_and_kind_of_float_are_embedded_in_their_order(model: Any, checkpoint: Path) -> None:
    spoken = [voice(0, 0, 2.0), voice(1, 0, 0.3), voice(2, 0, 1.0)]
    expected = embedded(checkpoint, *spoken)
    for given in (spoken, [one.astype(np.float32) for one in spoken], [one.tolist() for one in spoken]):
        embeddings = model.predict(pd.DataFrame({"waveform": given}))
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    np.testing.assert_allclose(model.predict([{"waveform": one} for one in spoken]), expected, atol=1e-6)


def test_a_file_is_embedded_as_its_samples_are(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", np.rint(32768 * voice(0, 0)) / 32768)
    expected = embedded(checkpoint, np.rint(32768 * voice(0, 0)) / 32768)
    np.testing.assert_allclose(model.predict(pd.DataFrame({"path": [str(tmp_path / "a.wav")]})), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"waveform": [[0.1] * 9, [100.0, -20.0]]}, "waveform in row 1 is not a list of samples in"),
        ({"waveform": [[0.1, float("nan")]]}, "waveform in row 0 is not a list of samples in"),
        ({"waveform": [[]]}, "waveform in row 0 is not a list of samples in"),
        ({"path": ["nowhere.wav"]}, "nowhere.wav, in row 0, cannot be used: there is no such file"),
        ({"path": ["a.wav"], "waveform": [[0.1]]}, "one column, waveform or path"),
        ({"path": []}, None),
    ],
)
def test_what_cannot_be_used_is_named(model: Any, table: Any, told: str | None) -> None:
    if told is None:
        assert model.predict(pd.DataFrame(table, dtype=str)).shape == (0, 16)
        return
    with pytest.raises(ValueError, match=told):
        model.predict(pd.DataFrame(table))
