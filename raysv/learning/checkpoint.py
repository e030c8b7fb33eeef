"""A checkpoint is a folder that explains itself.

README.md            what this is and how to use it
checkpoint.yaml      the full configuration, where training stood, error rates, threshold, versions
encoder.pt           weights of the encoder: all that verification needs
training_state.pt    class weights and optimiser: all that going on needs besides
metrics.jsonl        one line per epoch
det.csv              the DET curve on the dev pairs
dev_scores.npy       their scores, in the order of the list
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import pickle
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysv.config import SAMPLE_RATE, Config, config_from_dict, config_to_dict, read_yaml, write_yaml
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.evaluation import Evaluation
from raysv.verification.metrics import det_curve

DET_POINTS = 300
WEIGHTS = "encoder.pt"
DESCRIPTION = "checkpoint.yaml"
README = "README.md"
TRAINING_STATE = "training_state.pt"
SCORES = "dev_scores.npy"
HISTORY = "metrics.jsonl"
FACTS = ("threshold", "threshold_is", "dev_eer", "data_hash")  # of a description, for those who have the encoder alone


@dataclass(frozen=True)
class Standing:
    """Where a training run stands after an epoch.

    Attributes:
        history: the metrics of every epoch so far.
        dev: the evaluation after this epoch.
        speakers: classes in training.
        data_hash: of everything it learned from.
        computed: on which kind of device and in which precision.
    """

    config: Config
    history: list[dict[str, float]]
    dev: Evaluation
    speakers: int
    data_hash: str
    computed: str


def save_checkpoint(folder: Path, standing: Standing, encoder: SpeakerEncoder, training_state: dict[str, Any]) -> None:
    """Write a checkpoint into an existing folder.

    Raises: OSError when there is no room for it.
    """
    try:
        _save(folder, standing, encoder, training_state)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise  # PyTorch's writer says of a full disk only that writing failed
        free, why = shutil.disk_usage(folder).free / 1e6, (str(error).splitlines() or [""])[0]
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"The checkpoint of epoch {len(standing.history)} cannot be written to {folder.parent}: {why}; "
            f"{free:.0f} MB are free there. Make room there, or let TMPDIR name another place.",
        ) from error


def _save(folder: Path, standing: Standing, encoder: SpeakerEncoder, training_state: dict[str, Any]) -> None:
    latest = standing.history[-1]
    description = {
        "epoch": latest["epoch"],
        "dev_eer": latest["dev/eer"],
        "threshold": standing.dev.rates.threshold,
        "threshold_is": "the cosine at which false acceptances equal false rejections on the dev pairs",
        "training_speakers": standing.speakers,
        "data_hash": standing.data_hash,
        "computed": standing.computed,
        "versions": versions(),
        "config": config_to_dict(standing.config),
    }
    torch.save(encoder.state_dict(), folder / WEIGHTS)
    torch.save(training_state, folder / TRAINING_STATE)
    with (folder / HISTORY).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in standing.history)
    with (folder / "det.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["p_miss", "p_fa"])
        rows.writerows(zip(*det_curve(standing.dev.scores, standing.dev.same_speaker, DET_POINTS), strict=True))
    np.save(folder / SCORES, standing.dev.scores.astype(np.float32))
    (folder / README).write_text(_readme(standing), encoding="utf-8")
    write_yaml(description, folder / DESCRIPTION)


def load_encoder(folder: Path | str) -> SpeakerEncoder:
    """The encoder of a checkpoint, in eval mode on the CPU. No pickle is run.

    Raises: ValueError when the folder is not a checkpoint, or a damaged one.
    """
    folder = Path(folder)
    config, _ = describe_checkpoint(folder)
    encoder = SpeakerEncoder(config.model)
    weights = _load(folder / WEIGHTS)
    try:
        encoder.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'encoder.pt'} does not hold the weights of the encoder that checkpoint.yaml describes. "
            "The two are of different checkpoints."
        ) from error
    return encoder.eval()


def describe_checkpoint(folder: Path) -> tuple[Config, dict[str, Any]]:
    """A checkpoint's configuration and the rest of its `checkpoint.yaml`.

    Raises: ValueError when the folder is not a checkpoint.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ValueError(
            f"{folder} is no checkpoint: it has no checkpoint.yaml. Name the folder that raysv.train wrote."
        )
    description = read_yaml(file)
    if "config" not in description:
        raise ValueError(f"{file} has no key config. The checkpoint is damaged, or the file is no checkpoint's.")
    for key, kind in {"epoch": int | float, "threshold": int | float, "computed": str}.items():
        if not isinstance(description.get(key), kind):
            raise ValueError(f"{file}: {key} is {description.get(key)!r}. The checkpoint is damaged.")
    return config_from_dict(description.pop("config")), description


def encoder_facts(folder: Path) -> dict[str, str]:
    """What whoever uses an encoder away from its checkpoint has to know of it, as text.

    Raises: ValueError when the folder is not a checkpoint.
    """
    config, description = describe_checkpoint(folder)
    noted = {key: str(description[key]) for key in FACTS if key in description}
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shape = {"sample_rate": str(SAMPLE_RATE), "embedding_dim": str(config.model.embedding_dim)}
    return shape | noted | {"encoder_sha256": digest, "written_by": f"raysv {version('raysv')}"}


def load_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    """What `fit` needs to go on: encoder weights, training state and the metrics of the epochs before.

    Raises: ValueError when a file of it is missing or damaged.
    """
    history = read_history(folder)
    _, description = describe_checkpoint(folder)
    if len(history) != description["epoch"]:
        raise ValueError(
            f"{folder / HISTORY} cannot be right: it has {len(history)} epochs, checkpoint.yaml "
            f"{description['epoch']}. The checkpoint is incomplete or damaged."
        )
    return _load(folder / WEIGHTS), _load(folder / TRAINING_STATE), history


def read_history(folder: Path) -> list[dict[str, float]]:
    """The metrics of every epoch that a checkpoint has seen.

    Raises: ValueError when the file is missing or damaged.
    """
    file = folder / HISTORY
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}. The checkpoint is incomplete or damaged.") from error


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    packages = ("raysv", "torch", "torchaudio", "numpy", "ray", "optuna", "mlflow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds something other than weights, which is not loaded: it could run code. "
            "Take the checkpoint anew from where it was made."
        ) from error
    except Exception as error:  # PyTorch raises whatever the bytes lead its readers to
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{file} cannot be loaded: {reason}. The checkpoint is incomplete or damaged.") from error


def _readme(standing: Standing) -> str:
    latest, model = standing.history[-1], standing.config.model
    epochs = f"{latest['epoch']:.0f} of {standing.config.training.epochs}"
    return f"""# Speaker encoder

ECAPA-TDNN with {model.channels} channels and embeddings of {model.embedding_dim} dimensions, trained with
raysv {version("raysv")} on {standing.speakers} speakers: epoch {epochs}.
EER on the dev pairs: {100 * latest["dev/eer"]:.2f} %. The full configuration is in `checkpoint.yaml`.

Are two recordings of one speaker? From the command line, and from Python:

    python -m raysv.verify THIS_FOLDER a.wav b.wav

    from raysv.learning.checkpoint import load_encoder
    encoder = load_encoder("THIS_FOLDER")
    embeddings = encoder.embed([waveform_a, waveform_b])   # 16 kHz, in [-1, 1): (2, {model.embedding_dim})
"""
