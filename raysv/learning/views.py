"""Training batches: crops of P × K utterances, and what is to be added to each of their views.

Reading happens here, on the CPU and ahead of time; mixing happens in `make_views`, batched on the worker's device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raysv.config import SAMPLE_RATE, Config, check_shares
from raysv.corpus.audio import FULL_SCALE, Floats, floating, take
from raysv.corpus.sampling import SpeakerBatches
from raysv.corpus.sets import Corpus
from raysv.corpus.store import WaveformStore
from raysv.distributed import shard, world_size
from raysv.speech.augmentation import ADDITIVE, Choices, add_noise, choose, recipe, reverberate
from raysv.speech.features import MELS, num_frames

RESPONSE_SAMPLES = SAMPLE_RATE  # a room response is cut after this much: longer ones lose their tail

Step = tuple[int, int]  # epoch, from 1, and step in it, from 0


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch.

    Attributes:
        waveforms: `(batch, samples)` int16 crops.
        speakers: `(batch,)` labels.
        noise_rows, noise, snr_db: which of the `batch × views` views get something added, `(n,)`; what, `(n, samples)`;
            and at which ratio, `(n,)`.
        room_rows, rooms: which views are reverberated, `(m,)`, and by what, `(m, taps)`.
        masks: `(batch × views, 4)`, see `Choices.masks`.
        views: views of each utterance.
    """

    waveforms: Tensor
    speakers: Tensor
    noise_rows: Tensor
    noise: Tensor
    snr_db: Tensor
    room_rows: Tensor
    rooms: Tensor
    masks: Tensor
    views: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the DataLoader's pinning thread calls it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(views=self.views, **tensors)


def make_views(batch: Batch) -> Tensor:
    """The augmented views `(batch × views, samples)`, float, on the batch's device; an utterance's are together.

    A view that nothing happens to keeps its samples bit for bit, in [-1, 1); noise may carry others beyond.
    """
    views = (batch.waveforms[:, None].expand(-1, batch.views, -1) / FULL_SCALE).flatten(0, 1)
    if len(batch.room_rows):
        views[batch.room_rows] = reverberate(views[batch.room_rows], batch.rooms)
    if len(batch.noise_rows):
        views[batch.noise_rows] = add_noise(views[batch.noise_rows], batch.noise, batch.snr_db)
    return views


class ViewBatches(Dataset[Batch]):
    """This worker's share of every batch, looked up by (epoch, step).

    What a batch holds follows from the seed, the epoch and the step alone, so any process may make any batch.

    Raises: ValueError when there are fewer utterances in a batch than workers.
    """

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.train, self.clips = corpus.train, corpus.clips
        self.batch, self.seed = config.batch, config.training.seed
        self.sampler = SpeakerBatches(
            self.train.by_speaker,
            self.train.speakers,
            config.batch.speakers,
            config.batch.utterances_per_speaker,
            config.training.seed,
        )
        self.recipe, self.kinds = recipe(config.augment.strength), config.augment.kinds
        self.samples = round(config.batch.crop_seconds * SAMPLE_RATE)
        check_shares(config.batch, world_size())
        self._mine = shard(config.batch.size)  # asked here: a loader process may not know of the other workers
        self._epoch, self._order = 0, np.zeros((0, 0), np.int64)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.sampler.steps

    def __getitem__(self, when: Step) -> Batch:
        epoch, step = when
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.sampler.epoch(epoch)
        generator = np.random.default_rng([self.seed, epoch, step])
        views = (self.batch.size, self.batch.views)
        starts = generator.random(self.batch.size)
        choices = choose(self.recipe, self.kinds, views, num_frames(self.samples), MELS, generator)
        return self._read(self._order[step][self._mine], starts[self._mine], choices[self._mine])

    def _read(self, utterances: npt.NDArray[np.int64], starts: npt.NDArray[np.float64], choices: Choices) -> Batch:
        crops = [
            self._crop(self.train.store, self.train.recordings[utterance], start)
            for utterance, start in zip(utterances, starts, strict=True)
        ]
        noisy, roomy = np.argwhere(choices.kind >= 0), np.argwhere(choices.reverberated)
        labels = self.train.labels[utterances]
        noise = [self._noise(choices, (row, view), labels[row]) for row, view in noisy]
        rooms = [self._room(choices.room[row, view]) for row, view in roomy]
        return Batch(
            waveforms=torch.from_numpy(np.stack(crops)),
            speakers=torch.from_numpy(labels),
            noise_rows=torch.from_numpy(noisy @ [self.batch.views, 1]),
            noise=torch.from_numpy(np.stack(noise) if noise else np.zeros((0, self.samples), np.float32)),
            snr_db=torch.from_numpy(choices.snr_db[tuple(noisy.T)].astype(np.float32)),
            room_rows=torch.from_numpy(roomy @ [self.batch.views, 1]),
            rooms=torch.from_numpy(_stack_padded(rooms)),
            masks=torch.from_numpy(choices.masks.reshape(-1, 4)),
            views=self.batch.views,
        )

    def _crop(self, store: WaveformStore, recording: int, start: float) -> npt.NDArray[np.int16]:
        """A crop at a position given in [0, 1); what is shorter than a crop is repeated from a random phase."""
        waveform = store[recording]
        room = len(waveform) - self.samples
        return take(waveform, int(start * (room + 1 if room >= 0 else len(waveform))), self.samples)

    def _noise(self, choices: Choices, view: tuple[int, int], speaker: int) -> Floats:
        kind, clip, offset = ADDITIVE[choices.kind[view]], choices.clip[view], choices.offset[view]
        if kind != "babble":
            return self._clip(self.clips[kind], clip[0], offset[0])
        babble = np.zeros(self.samples, np.float32)
        for voice in range(choices.voices[view]):
            if kind in self.clips:
                talker = self._clip(self.clips[kind], clip[voice], offset[voice])
            else:
                other = self._other_speaker(speaker, choices.babbler[view][voice], clip[voice])
                talker = floating(self._crop(self.train.store, self.train.recordings[other], offset[voice]))
            babble += talker * np.float32(_unit_gain(talker))
        return babble

    def _clip(self, store: WaveformStore, which: float, offset: float) -> Floats:
        return floating(self._crop(store, store.usable[int(which * len(store.usable))], offset))

    def _other_speaker(self, speaker: int, which: float, utterance: float) -> int:
        """An utterance of anybody but this speaker."""
        other = int(which * (len(self.train.speakers) - 1))
        theirs = self.train.by_speaker[other + (other >= speaker)]
        return int(theirs[int(utterance * len(theirs))])

    def _room(self, which: float) -> Floats:
        store = self.clips["reverb"]
        response = floating(store[store.usable[int(which * len(store.usable))]])
        return response[np.abs(response).argmax() :][:RESPONSE_SAMPLES]


def loader(batches: ViewBatches, first_epoch: int, last_epoch: int, workers: int, pin: bool) -> DataLoader[Batch]:
    """All batches from the first epoch to the last, in order, read ahead by `workers` processes."""
    order = itertools.product(range(first_epoch, last_epoch + 1), range(batches.steps))
    return DataLoader(batches, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin)


def batch_bytes(config: Config) -> int:
    """The most that a global batch takes, with every view disturbed in every way."""
    crop = round(config.batch.crop_seconds * SAMPLE_RATE)
    view = 4 * (crop + RESPONSE_SAMPLES) + 100  # float32 noise and room, and a few numbers
    return config.batch.size * (2 * crop + config.batch.views * view + 8)


def _unit_gain(waveform: Floats) -> float:
    """What brings a waveform to a mean power of 1; 1 for silence."""
    energy = float(waveform @ waveform)
    return math.sqrt(len(waveform) / energy) if energy else 1.0


def _stack_padded(rows: list[Floats]) -> Floats:
    """Rows of different lengths as one array, zeros behind the shorter ones."""
    stacked = np.zeros((len(rows), max(map(len, rows), default=1)), np.float32)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return stacked
