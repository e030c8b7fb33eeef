import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from learning_fixtures import ROOM_DELAY, tiny_config, write_corpus

from raysv import distributed
from raysv.config import SAMPLE_RATE
from raysv.corpus.groups import Groups
from raysv.corpus.loading import load_corpus
from raysv.corpus.sets import TrainingSet
from raysv.learning import views
from raysv.learning.views import RESPONSE_SAMPLES, ViewBatches, batch_bytes, loader, make_views

LISTEN = {"augment__kinds": ["babble"], "augment__strength": 1.0, "batch__speakers": 7}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def make(root):
    """Makes the batches of a configuration given by what differs from the usual one."""

    def batches(**values):
        config = tiny_config(root, **values)
        return ViewBatches(config, load_corpus(config.data, config.augment))

    return batches


def tones(speakers, seconds, hertz=lambda speaker: 200 * (speaker + 1)):
    """A store of one pure tone for each speaker; what is heard tells who speaks."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    waveforms = [(8000 * np.sin(2 * np.pi * hertz(speaker) * time)).astype(np.int16) for speaker in range(speakers)]
    store = Clips(waveforms)
    labels = np.repeat(np.arange(speakers), 2)
    names = [f"speaker {number}" for number in range(speakers)]
    return TrainingSet(store, labels, labels, names, Groups.by_label(labels, speakers))


class Clips(list):
    @property
    def usable(self):
        return np.arange(len(self))


def assert_same(one, other):
    for item in dataclasses.fields(one):
        first, second = getattr(one, item.name), getattr(other, item.name)
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second)), item.name


def test_a_batch_has_the_shapes_it_promises(make):
    batch = make()[1, 0]
    assert batch.waveforms.shape == (8, 8000) and batch.waveforms.dtype == torch.int16
    assert batch.speakers.shape == (8,) and batch.speakers.dtype == torch.int64
    assert batch.masks.shape == (16, 4)
    assert len(batch.noise) == len(batch.noise_rows) == len(batch.snr_db) > 0
    assert len(batch.rooms) == len(batch.room_rows) > 0
    assert make_views(batch).shape == (16, 8000)


def test_zero_strength_returns_the_same_samples(make):
    batch = make(augment__strength=0.0)[1, 0]
    expected = batch.waveforms.double() / 32768
    for view in make_views(batch).unflatten(0, (8, 2)).unbind(1):
        assert torch.equal(view.double(), expected)
    assert not batch.masks[:, [1, 3]].any()


def test_a_view_that_nothing_happens_to_keeps_its_samples(make):
    batch = make(augment__strength=0.5)[1, 0]
    touched = set(batch.noise_rows.tolist()) | set(batch.room_rows.tolist())
    assert 0 < len(touched) < 16
    made = make_views(batch)
    for row in range(16):
        untouched = torch.equal(made[row], batch.waveforms[row // 2] / 32768)
        assert untouched == (row not in touched)


def test_crops_are_stretches_of_the_utterances_they_are_labelled_as(make):
    batches = make()
    for step in range(batches.steps):
        batch = batches[1, step]
        for crop, label in zip(batch.waveforms.numpy(), batch.speakers.numpy(), strict=True):
            theirs = [batches.train.store[at] for at in batches.train.recordings[batches.train.labels == label]]
            assert any(crop.tobytes() in utterance.tobytes() for utterance in theirs)


def test_what_is_shorter_than_a_crop_is_repeated(make):
    batches = make(batch__crop_seconds=3.0)
    waveforms = batches[1, 0].waveforms
    period = round(1.2 * SAMPLE_RATE)
    assert waveforms.shape == (8, 3 * SAMPLE_RATE)
    assert torch.equal(waveforms[:, period:], waveforms[:, :-period])


def test_noise_is_added_at_the_ratio_drawn_for_the_view(make):
    batch = make(augment__kinds=["noise"], augment__strength=1.0)[1, 0]
    clean = (batch.waveforms / 32768).repeat_interleave(2, 0)
    added = (make_views(batch) - clean)[batch.noise_rows]
    power = clean[batch.noise_rows].unflatten(1, (-1, 320)).square().mean(2)
    active = power * (power >= power.amax(1, keepdim=True) / 1000)
    measured = 10 * torch.log10(active.sum(1) / (active > 0).sum(1) / added.square().mean(1))
    torch.testing.assert_close(measured, batch.snr_db, rtol=0, atol=0.1)


def test_a_batch_follows_from_seed_epoch_and_step(make):
    batches = make()
    first = batches[1, 0]
    later = batches[2, 1]
    assert_same(batches[1, 0], first)
    assert_same(make()[2, 1], later)
    for other in (later, batches[1, 1], batches[2, 0], make(training__seed=1)[1, 0]):
        assert not torch.equal(other.waveforms, first.waveforms)
        assert not torch.equal(other.masks, first.masks)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is a single core
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_loader_workers_change_neither_batches_nor_their_order(make, loader_workers):
    batches = make()
    loaded = list(loader(batches, 1, 2, loader_workers, pin=False))
    assert len(loaded) == 2 * batches.steps
    for place, batch in enumerate(loaded):
        assert_same(batch, batches[1 + place // batches.steps, place % batches.steps])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_no_batch_takes_more_than_is_said(make, root, strength):
    values = {"augment__strength": strength, "batch__crop_seconds": 1.1}
    batches, most = make(**values), batch_bytes(tiny_config(root, **values))
    sizes = [
        sum(tensor.nbytes for tensor in vars(batches[1, step]).values() if isinstance(tensor, torch.Tensor))
        for step in range(batches.steps)
    ]
    assert max(sizes) <= most
    assert strength == 0 or max(sizes) > most / 3


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shares_of_all_workers_are_the_global_batch(make, monkeypatch, workers):
    whole = make(augment__strength=1.0)[1, 0]
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: workers)
    for worker in range(workers):
        monkeypatch.setattr(distributed, "rank", lambda worker=worker: worker)
        shares.append(make(augment__strength=1.0)[1, 0])
    for name in ("waveforms", "speakers", "masks", "noise", "snr_db"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name)), name
    made = torch.cat([make_views(share) for share in shares])
    torch.testing.assert_close(made, make_views(whole), rtol=0, atol=1e-6)


def test_more_workers_than_utterances_are_refused(make, monkeypatch):
    monkeypatch.setattr(views, "world_size", lambda: 9)
    with pytest.raises(ValueError, match=r"batch of 8 utterances .* shared by 9 workers"):
        make()


def test_nobody_babbles_over_themselves_and_everybody_else_does(root):
    speakers, seconds = 7, 0.5
    corpus = SimpleNamespace(train=tones(speakers, 2 * seconds), clips={})
    batches = ViewBatches(tiny_config(root, batch__crop_seconds=seconds, **LISTEN), corpus)
    heard = np.zeros((speakers, speakers), bool)
    for epoch in range(1, 9):
        batch = batches[epoch, 0]
        spectrum = torch.fft.rfft(batch.noise).abs().numpy()[:, [int(200 * (n + 1) * seconds) for n in range(speakers)]]
        owners = batch.speakers.repeat_interleave(2)[batch.noise_rows].numpy()
        for owner, loudness in zip(owners, spectrum > 0.1 * spectrum.max(1, keepdims=True), strict=True):
            heard[owner] |= loudness
    assert np.array_equal(heard, ~np.eye(speakers, dtype=bool))


def test_babble_comes_from_clips_where_there_are_some(root):
    clips = Clips(tones(2, 1.0, lambda speaker: 3000 + 1000 * speaker).store)
    corpus = SimpleNamespace(train=tones(7, 1.0), clips={"babble": clips})
    batch = ViewBatches(tiny_config(root, **LISTEN), corpus)[1, 0]
    loudest = torch.fft.rfft(batch.noise).abs().sum(0).topk(2).indices * 2  # Hz, in half a second
    assert set(loudest.tolist()) == {3000, 4000}


def test_every_voice_of_a_babble_is_as_loud(root):
    clips = Clips([tones(1, 1.0).store[0] // 100, *tones(2, 1.0, lambda _: 3000).store])
    corpus = SimpleNamespace(train=tones(7, 1.0), clips={"babble": clips})
    batches = ViewBatches(tiny_config(root, **LISTEN), corpus)
    noise = torch.cat([batches[epoch, 0].noise for epoch in range(1, 6)])
    quiet, loud = (torch.fft.rfft(noise).abs()[:, hertz // 2].sum() for hertz in (200, 3000))
    assert 0.2 < quiet / loud < 0.8  # one clip against two


def test_room_responses_begin_with_their_direct_path(make):
    batch = make(augment__kinds=["reverb"])[1, 0]
    assert batch.rooms.shape[1] == 2000
    torch.testing.assert_close(batch.rooms[:, 0], torch.full((len(batch.rooms),), 0.9), rtol=0, atol=1e-4)


def test_a_late_direct_path_does_not_delay_the_speech(root):
    response = np.zeros(ROOM_DELAY + 1, np.int16)
    response[ROOM_DELAY] = 20_000
    corpus = SimpleNamespace(train=tones(7, 1.0), clips={"reverb": Clips([response])})
    config = tiny_config(root, augment__kinds=["reverb"], augment__strength=1.0, batch__speakers=7)
    batch = ViewBatches(config, corpus)[1, 0]
    assert len(batch.room_rows)
    clean = (batch.waveforms / 32768).repeat_interleave(2, 0)
    torch.testing.assert_close(make_views(batch), clean, rtol=0, atol=1e-6)


def test_echoes_later_than_a_second_are_cut_and_short_responses_padded(root):
    long, short = np.full(2 * SAMPLE_RATE, 100, np.int16), np.full(5, 100, np.int16)
    corpus = SimpleNamespace(train=tones(7, 1.0), clips={"reverb": Clips([long, short])})
    config = tiny_config(root, augment__kinds=["reverb"], augment__strength=1.0, batch__speakers=7)
    rooms = ViewBatches(config, corpus)[1, 0].rooms
    assert rooms.shape[1] == RESPONSE_SAMPLES
    assert set((rooms > 0).sum(1).tolist()) == {RESPONSE_SAMPLES, 5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_reaches_the_gpu_through_pinned_memory(make):
    batches = make()
    (batch, *_) = loader(batches, 1, 1, 1, pin=True)
    assert batch.waveforms.is_pinned()
    assert_same(batch.to(torch.device("cuda")).to(torch.device("cpu")), batches[1, 0])


def test_a_batch_moves_with_everything_in_it(make):
    moved = make()[1, 0].to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.views == 2
