"""The encoder of a finished run as a version of a registered model in MLflow."""

from __future__ import annotations

import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Schema, TensorSpec

from raysv.config import SAMPLE_RATE
from raysv.learning.checkpoint import DESCRIPTION, README, WEIGHTS, encoder_facts
from raysv.search.cards import TRIAL_KIND
from raysv.search.commands import door, shown
from raysv.search.mlflow_store import KIND, STUDY, STUDY_ID, TRIAL, connect, experiment_id, search_runs
from raysv.search.stages import EXPERIMENT
from raysv.search.study import study_id
from raysv.search.wording import first_line

MODEL = "raysv-ecapa"
ALIAS = "best"  # alias of the version to use
FOLDER = "encoder"  # of the trial's artifacts
PARENT = "mlflow.parentRunId"
DATA, EER = "raysv.data_hash", "raysv.dev_eer"  # tags of a version
RECORDINGS = Schema(  # a table with one of these columns
    [ColSpec(Array(DataType.double), "waveform", required=False), ColSpec(DataType.string, "path", required=False)]
)
USE = (
    "Speaker encoders. `predict` takes a table with a column `waveform`, samples in [-1, 1) at 16 kHz, or `path`, WAV "
    "or FLAC files. Two embeddings are of one speaker where their cosine reaches the version's `raysv.threshold`."
)
NEEDED = ("mlflow", "numpy", "pandas", "pyyaml", "scipy", "soundfile", "torch", "torchaudio")  # to load it


def check_name(name: str) -> None:
    """Refuse a name of a model before anything is trained.

    Raises: ValueError for a name that MLflow, or the address `models:/NAME@best`, has no use for.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"A model cannot be called {name!r}. Use letters, digits, hyphens, underscores and dots.")


def register(checkpoint: Path, folder: Path, trial_id: str, tracking_uri: str, name: str = MODEL) -> str:
    """Make a run's encoder a version of a registered model, once; the best one has the alias `best`.

    The alias goes to a version if no other has it, or if that one learned of the same data (`data_hash`) and had a
    higher EER on the dev pairs. A training that has ended well must not end in this: what goes wrong is told.

    Args:
        checkpoint: the encoder's.
        folder: of the study that the run is the only trial of, whose id in there is `trial_id`.

    Returns: what came of it, in words.
    """
    try:
        client = connect(tracking_uri)
        run = _run(client, tracking_uri, folder, trial_id)
        made = _version_of(client, name, run) or _make(client, name, run, checkpoint)
        return f"{name} version {made.version}{_alias(client, made)}"
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the file system through
        again = f"{door('train')} --resume {shown(folder)}"
        return f"not registered as {name}: {first_line(error).rstrip('.')}. Once it can be: {again}"


def _run(client: MlflowClient, tracking_uri: str, folder: Path, trial_id: str) -> Run:
    tags = {KIND: TRIAL_KIND, STUDY: folder.name, STUDY_ID: study_id(folder), TRIAL: trial_id}
    found = search_runs(client, experiment_id(tracking_uri, EXPERIMENT), tags)
    if not found:
        raise ValueError(f"MLflow at {tracking_uri} has no run of {folder.name}.")
    return found[0]


def _version_of(client: MlflowClient, name: str, run: Run) -> ModelVersion | None:
    """The version that was made of a run before; a finished run may be resumed."""
    found = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    return next((made for made in found if made.name == name), None)


def _make(client: MlflowClient, name: str, run: Run, checkpoint: Path) -> ModelVersion:
    facts = encoder_facts(checkpoint)
    with TemporaryDirectory() as place:
        model = Path(place, "model")
        _save(model, checkpoint, facts)
        client.log_artifacts(run.info.run_id, str(model), FOLDER)
    try:
        client.create_registered_model(name, description=USE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    study = {key: run.data.tags[key] for key in (STUDY, STUDY_ID)} | {"raysv.parent_run": run.data.tags[PARENT]}
    return client.create_model_version(
        name,
        f"{run.info.artifact_uri}/{FOLDER}",
        run.info.run_id,
        tags=study | {f"raysv.{key}": value for key, value in facts.items()},
        description=f"Trained alone as {run.data.tags[STUDY]}: EER {_percent(facts['dev_eer'])} on the dev pairs.",
    )


def _save(model: Path, checkpoint: Path, facts: dict[str, str]) -> None:
    """A folder that MLflow loads: weights, and as code, so that no pickle is needed, raysv itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Any type hint", UserWarning)  # MLflow 3.17 of itself
        import mlflow.pyfunc
    own = model.with_name("checkpoint")  # without what only going on with training needs
    own.mkdir()
    for name in (README, DESCRIPTION, WEIGHTS):
        shutil.copy(checkpoint / name, own)
    embeddings = TensorSpec(np.dtype(np.float32), (-1, int(facts["embedding_dim"])))
    tone = 0.1 * np.sin(2 * np.pi * 200 * np.arange(SAMPLE_RATE // 10) / SAMPLE_RATE)
    mlflow.pyfunc.save_model(
        model,
        python_model=Path(__file__).with_name("served.py"),
        code_paths=[str(Path(__file__).parents[1])],
        artifacts={"checkpoint": str(own)},
        signature=ModelSignature(RECORDINGS, Schema([embeddings])),
        input_example=[{"waveform": tone.round(4).tolist()}],
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDED],
        metadata=facts,
    )


def _alias(client: MlflowClient, made: ModelVersion) -> str:
    """Give a version the alias if it is due; what came of it, in words."""
    holder = client.get_registered_model(made.name).aliases.get(ALIAS)
    if holder is not None and str(holder) != str(made.version):
        before, now = client.get_model_version(made.name, holder).tags, made.tags
        if before.get(DATA) != now[DATA]:
            return f"; {ALIAS} stays version {holder}, not known to have learned of the same data"
        if float(before[EER]) <= float(now[EER]):
            eers = f"EER {_percent(before[EER])} on the dev pairs, not {_percent(now[EER])}"
            return f"; {ALIAS} stays version {holder}: {eers}"
    client.set_registered_model_alias(made.name, ALIAS, made.version)
    return f", models:/{made.name}@{ALIAS}"


def _percent(eer: str) -> str:
    return f"{100 * float(eer):.2f} %"
