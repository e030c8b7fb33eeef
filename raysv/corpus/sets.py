"""What a run reads, as arrays of indices into waveform stores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raysv.corpus.groups import Groups, Indices
from raysv.corpus.store import WaveformStore

TRAIN, DEV = "train", "dev pairs"  # parts that every corpus has


@dataclass(frozen=True)
class TrainingSet:
    """Labelled recordings.

    Attributes:
        recordings: `(utterances,)` where each utterance lies in the store.
        labels: `(utterances,)` class of each, an index into `speakers`.
        by_speaker: the utterances of each class, as indices into `recordings`.
    """

    store: WaveformStore
    recordings: Indices
    labels: Indices
    speakers: list[str]
    by_speaker: Groups


@dataclass(frozen=True)
class PairSet:
    """A pair list over recordings that are embedded once each.

    Attributes:
        models: the recordings that each enrolment is made of: `models.members` of all, one enrolment behind the other
            from `models.starts`, or `models[3]` those of one.
        enrolment, test: `(pairs,)` indices into `models` and into the store.
        same_speaker: `(pairs,)` bool.
        speakers: `(recordings,)` a number from 0 for each of the store, the same for recordings of one speaker: by the
            manifests, by the pairs of one speaker, and because an enrolment is of one speaker. Recordings that nothing
            links to another have a number of their own.
    """

    store: WaveformStore
    models: Groups
    enrolment: Indices
    test: Indices
    same_speaker: npt.NDArray[np.bool_]
    speakers: Indices


@dataclass(frozen=True)
class Corpus:
    """The audio of a run: what it trains on, is judged by, and is disturbed with."""

    train: TrainingSet
    dev: PairSet
    tests: dict[str, PairSet]
    clips: dict[str, WaveformStore]
    left_out: dict[str, str]  # unusable recordings by path, and why; none unless data.skip_bad_audio
    digests: dict[str, str]  # a hash of every part, see `part_names`

    def __str__(self) -> str:
        train = self.train
        counts = f"{len(train.speakers)} speakers and {len(train.labels)} utterances to learn from"
        left_out = f"; {len(self.left_out)} unusable recordings left out" if self.left_out else ""
        return f"{counts}, {len(self.dev.same_speaker)} dev pairs{left_out}"

    @property
    def digest(self) -> str:
        """Hash of training speech, labels and dev pairs: runs with the same one learned from the same speech.

        Clips are left out: which are read depends on the augmentation, and trials of one study differ in that.
        """
        return hashlib.sha256(f"{self.digests[TRAIN]} {self.digests[DEV]}".encode()).hexdigest()[:16]


def part_names(tests: Iterable[str], clips: Iterable[str]) -> list[str]:
    """The names of a corpus's parts, given those of its test lists and its kinds of clips."""
    return [TRAIN, DEV, *(f"{name} pairs" for name in tests), *(f"{kind} clips" for kind in clips)]


def arrays(part: TrainingSet | PairSet) -> dict[str, npt.NDArray[Any]]:
    """All arrays of a set by name, those of its groups as `group.array`."""
    found = {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}
    for name, value in vars(part).items():
        if isinstance(value, Groups):
            found |= {f"{name}.members": value.members, f"{name}.starts": value.starts}
    return found


def digest(part: TrainingSet | PairSet | WaveformStore) -> str:
    """Hash of all that a part says, wherever its audio lies."""
    if isinstance(part, WaveformStore):
        return part.digest
    told = hashlib.sha256(part.store.digest.encode())
    for name, array in arrays(part).items():
        told.update(f" {name} {len(array)} ".encode() + array.tobytes())
    if isinstance(part, TrainingSet):
        told.update("\n".join(part.speakers).encode("utf-8", "surrogateescape"))
    return told.hexdigest()
