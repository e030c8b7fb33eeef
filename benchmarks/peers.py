"""Other toolkits beside ours: wespeaker's modules made importable, the same audio given to each in its own way.

What is given in place of something else: soundfile where wespeaker calls `torchaudio.load`, because torchaudio 2.11
reads no files; empty modules where it imports what these benchmarks do not call (kaldiio, lmdb), small stand-ins for
the little its loop asks of tableprint and torchnet; clips held in memory where it has an LMDB file, which is a little
faster than the file. The peers get WAV where the pack has FLAC: that takes less decoding, and their users have WAV.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import soundfile
import torch
import torchaudio

from raysv.config import Config, config_from_dict


def keep_freed_memory() -> None:
    """Start this process anew with the allocator set as in raysv's own clusters, so that all ways here gain from it."""
    from raysv.search.cluster import MALLOC_SETTINGS  # here, because it imports Ray: other benchmarks measure memory

    if any(os.environ.get(name) != value for name, value in MALLOC_SETTINGS.items()):
        os.environ.update(MALLOC_SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def versions(checkout: Path | None) -> str:
    """Of SpeechBrain and of a checkout of wespeaker, in one line."""
    told = [f"SpeechBrain {version('speechbrain')}"]
    if checkout:
        command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        told.append(f"wespeaker {commit or 'of an unknown commit'}")
    return ", ".join(told)


def use_wespeaker(checkout: Path) -> None:
    """Make `wespeaker.dataset`, `wespeaker.models` and `wespeaker.utils` importable from a source checkout.

    Its `__init__`, which imports the command line and with it half of PyPI, is not run.

    Raises: SystemExit when there is no checkout there.
    """
    if not (checkout / "wespeaker" / "models").is_dir():
        raise SystemExit(f"{checkout} is no checkout of github.com/wenet-e2e/wespeaker. Clone it and name its folder.")
    package = ModuleType("wespeaker")
    package.__path__ = [str(checkout / "wespeaker")]
    sys.modules["wespeaker"] = package
    for name in ("kaldiio", "lmdb", "tableprint", "torchnet"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
    torchaudio.load = _load


def _load(path: str) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


@dataclass(frozen=True)
class Clips:
    """WAV files in memory with the interface of wespeaker's `LmdbData`."""

    files: list[tuple[str, bytes]] = field(default_factory=list)

    def random_one(self) -> tuple[str, bytes]:
        """A key and the bytes of a file."""
        return random.choice(self.files)


@dataclass(frozen=True)
class Speech:
    """The training list of the pack, as WAV files below a folder, with its noises, voices and rooms.

    Attributes:
        utterances: file and speaker.
        noise_files, room_files: WAV files.
        additive, rooms: clips in memory, in `additive` one voice for each noise.
    """

    utterances: list[tuple[Path, str]]
    noise_files: list[Path]
    room_files: list[Path]
    additive: Clips
    rooms: Clips

    def write_wespeaker_list(self, file: Path) -> dict[str, int]:
        """Write the list that its `Dataset` reads as `raw`; returns the classes of the speakers."""
        lines = [json.dumps({"key": path.stem, "wav": str(path), "spk": speaker}) for path, speaker in self.utterances]
        file.write_text("\n".join(lines), encoding="utf-8")
        return {name: label for label, name in enumerate(sorted({speaker for _, speaker in self.utterances}))}


def real_speech(folder: Path, speakers: int = 1000) -> Speech:
    """The first speakers of the training list of `RAYSV_DATA` and what disturbs them, copied as WAV into a folder."""
    root = Path(os.environ["RAYSV_DATA"])
    rows = _rows(root / "train.csv")
    chosen = sorted({row["speaker"] for row in rows})[:speakers]
    spoken = [(_copy(root, row["path"], folder), row["speaker"]) for row in rows if row["speaker"] in chosen]
    noises, rooms = (
        [_copy(root, row["path"], folder) for row in _rows(root / kind / f"{kind}.csv") if row["split"] == "train"]
        for kind in ("noise", "rir")
    )
    voices = [path for path, _ in spoken[:: len(spoken) // len(noises)]][: len(noises)]
    additive = [(f"noise-{path.stem}", path.read_bytes()) for path in noises]
    additive += [(f"speech-{path.stem}", path.read_bytes()) for path in voices]
    return Speech(spoken, noises, rooms, Clips(additive), Clips([(path.stem, path.read_bytes()) for path in rooms]))


def our_config(cache: Path, train: str = "train.csv", **sections: dict[str, object]) -> Config:
    """Our configuration for the same speech, with sections replaced or added to."""
    data = {
        "root": os.environ.get("RAYSV_DATA", ""),
        "train": train,
        "dev_pairs": "trials_speechocean_dev.txt",
        "utterances": ["dev.csv", "eval.csv"],
        "test_pairs": {},
        "noise": "noise/noise.csv",
        "rir": "rir/rir.csv",
        "cache": str(cache),
        "outside_root": True,  # some benchmarks list copies of recordings that lie elsewhere
    }
    return config_from_dict({"data": data, **sections})


def wespeaker_dataset(speech: Speech, folder: Path, frames: int) -> tuple[Any, dict[str, int]]:
    """Its chain for `raw` data: read, crop, disturb with probability 0.6, Kaldi's fbank; and the speakers' classes.

    As its `examples/voxceleb/v2/conf/ecapa_tdnn.yaml` has it, but for speed perturbation, which needs a part of
    torchaudio that is no more, and for the shuffle, whose buffer is made smaller than this list.
    """
    from wespeaker.dataset import dataset

    dataset.LmdbData = lambda clips: clips
    file = folder / "wespeaker.list"
    classes = speech.write_wespeaker_list(file)
    configs = {
        "shuffle": True,
        "shuffle_args": {"shuffle_size": 64},
        "filter_args": {"min_num_frames": 100, "max_num_frames": 800},
        "speed_perturb": False,
        "num_frms": frames,
        "aug_prob": 0.6,
        "fbank_args": {"num_mel_bins": 80, "frame_shift": 10, "frame_length": 25, "dither": 1.0},
    }
    made = dataset.Dataset(
        "raw", file, configs, classes, reverb_lmdb_file=speech.rooms, noise_lmdb_file=speech.additive
    )
    return made, classes


def tableprint_and_torchnet() -> None:
    """The little that wespeaker's loop asks of two packages: a line of a log, a mean and an accuracy."""
    vars(sys.modules["tableprint"])["row"] = lambda *cells, **style: ""
    vars(sys.modules["torchnet"])["meter"] = SimpleNamespace(AverageValueMeter=_Mean, ClassErrorMeter=_Accuracy)


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> list[float]:
        return [self.total / max(1, self.count)]


class _Accuracy:
    def __init__(self, accuracy: bool) -> None:
        self.mean = _Mean()

    def add(self, outputs: Any, targets: Any) -> None:
        self.mean.add(float((outputs.argmax(1) == targets).mean()))

    def value(self) -> list[float]:
        return self.mean.value()


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _copy(root: Path, path: str, folder: Path) -> Path:
    copy = (folder / path).with_suffix(".wav")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(root / path, dtype="int16")
        content = io.BytesIO()
        soundfile.write(content, samples, rate, format="WAV")
        copy.write_bytes(content.getvalue())
    return copy
