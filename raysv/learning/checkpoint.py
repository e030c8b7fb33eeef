"""A checkpoint is a folder that explains itself.

README.md            what this is and how to use it
checkpoint.yaml      the full configuration, where training stood, error rates, threshold, versions
encoder.pt           weights of the encoder: all that verification needs
training_state.pt    class weights and optimiser: all that going on needs besides
metrics.jsonl        one line per epoch
det.csv              the DET curve on the dev pairs
"""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from raysv.config import Config, config_from_dict, config_to_dict, write_yaml
from raysv.speech.encoder import SpeakerEncoder
from raysv.verification.evaluation import Evaluation
from raysv.verification.metrics import det_curve

DET_POINTS = 300
TRAINING_STATE = "training_state.pt"


@dataclass(frozen=True)
class Standing:
    """Where a training run stands after an epoch.

    Attributes:
        history: the metrics of every epoch so far.
        dev: the evaluation after this epoch.
        speakers: classes in training.
        data_hash: of everything it learned from.
    """

    config: Config
    history: list[dict[str, float]]
    dev: Evaluation
    speakers: int
    data_hash: str


def save_checkpoint(folder: Path, standing: Standing, encoder: SpeakerEncoder, training_state: dict[str, Any]) -> None:
    """Write a checkpoint into an existing folder."""
    latest = standing.history[-1]
    description = {
        "epoch": latest["epoch"],
        "dev_eer": latest["dev/eer"],
        "threshold": standing.dev.rates.threshold,
        "threshold_is": "the cosine at which false acceptances equal false rejections on the dev pairs",
        "training_speakers": standing.speakers,
        "data_hash": standing.data_hash,
        "versions": versions(),
        "config": config_to_dict(standing.config),
    }
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    torch.save(training_state, folder / TRAINING_STATE)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in standing.history)
    with (folder / "det.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["p_miss", "p_fa"])
        rows.writerows(zip(*det_curve(standing.dev.scores, standing.dev.same_speaker, DET_POINTS), strict=True))
    (folder / "README.md").write_text(_readme(standing), encoding="utf-8")
    write_yaml(description, folder / "checkpoint.yaml")


def load_encoder(folder: Path) -> SpeakerEncoder:
    """The encoder of a checkpoint, in eval mode on the CPU. No pickle is run.

    Raises: ValueError when the folder is not a checkpoint.
    """
    config, _ = describe_checkpoint(folder)
    encoder = SpeakerEncoder(config.model)
    encoder.load_state_dict(_load(folder / "encoder.pt"))
    return encoder.eval()


def describe_checkpoint(folder: Path) -> tuple[Config, dict[str, Any]]:
    """A checkpoint's configuration and the rest of its `checkpoint.yaml`."""
    file = folder / "checkpoint.yaml"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no checkpoint: it has no checkpoint.yaml. Name the folder that raysv.train wrote."
        )
    description = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config_from_dict(description.pop("config")), description


def load_training_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    """What `fit` needs to go on: encoder weights, training state and the metrics of the epochs before."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return _load(folder / "encoder.pt"), _load(folder / TRAINING_STATE), [json.loads(line) for line in lines]


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    packages = ("raysv", "torch", "torchaudio", "numpy", "ray", "optuna", "mlflow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be loaded: {error}. The checkpoint is incomplete or damaged.") from error


def _readme(standing: Standing) -> str:
    latest, model = standing.history[-1], standing.config.model
    return f"""# Speaker encoder

ECAPA-TDNN with {model.channels} channels and embeddings of {model.embedding_dim} dimensions, trained with
raysv {version("raysv")} on {standing.speakers} speakers for {latest["epoch"]:.0f} of {standing.config.training.epochs} epochs.
EER on the dev pairs: {100 * latest["dev/eer"]:.2f} %. The full configuration is in `checkpoint.yaml`.

Are two recordings of one speaker? From the command line, and from Python:

    python -m raysv.verify THIS_FOLDER a.wav b.wav

    from raysv import load_encoder
    encoder = load_encoder("THIS_FOLDER")
    embeddings = encoder.embed([waveform_a, waveform_b])   # 16 kHz, in [-1, 1): (2, {model.embedding_dim})
"""
