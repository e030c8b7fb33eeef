"""The encoder as MLflow serves it: a table of recordings in, embeddings out.

MLflow keeps this file with a registered model and runs it to load the model, so that nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from raysv.corpus.audio import BadAudio, Floats, floating, read_audio
from raysv.learning.checkpoint import load_encoder

WAVEFORM, PATH = "waveform", "path"  # the columns, of which a table has one


class ServedEncoder(PythonModel):
    """What `mlflow.pyfunc.load_model` gives, behind MLflow's check of the signature."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint that the model was made of; onto the GPU where there is one."""
        self._encoder = load_encoder(context.artifacts["checkpoint"]).to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Embeddings `(rows, dim)` float32, not normalised.

        Args:
            model_input: a column `waveform`, in each row samples in [-1, 1) at 16 kHz, rows of any length; or a column
                `path`, in each row a WAV or FLAC file of any rate.

        Raises: ValueError naming the row that cannot be used.
        """
        if [*model_input.columns] not in ([WAVEFORM], [PATH]):
            raise ValueError(f"A table has one column, {WAVEFORM} or {PATH}; this one has {[*model_input.columns]}.")
        read = _given if WAVEFORM in model_input else _read
        waveforms = [torch.from_numpy(read(cell, row)) for row, cell in enumerate(model_input.iloc[:, 0])]
        return self._encoder.embed(waveforms).cpu().numpy()


def _given(samples: Any, row: int) -> Floats:
    waveform = np.asarray(samples, np.float32)
    if waveform.ndim != 1 or not len(waveform) or not np.abs(waveform).max() <= 1:  # nor where one is not a number
        raise ValueError(
            f"The waveform in row {row} is not a list of samples in [-1, 1). Divide 16-bit samples by 32768; an empty "
            "recording has no embedding."
        )
    return waveform


def _read(path: Any, row: int) -> Floats:
    try:
        return floating(read_audio(Path(path)))
    except (BadAudio, TypeError) as problem:
        raise ValueError(f"{path}, in row {row}, cannot be used: {problem}.") from problem


set_model(ServedEncoder())
