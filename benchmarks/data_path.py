"""CPU time of an augmented 2 s view, from the recording to what the network gets, on one thread: ours and two peers'.

    RAYSV_DATA=PACK python benchmarks/data_path.py --wespeaker CHECKOUT

All read the same real speech, noises and rooms: ours from its store of decoded waveforms, with rooms cut at 1 s, the
peers WAV files and whole rooms. Each runs its own published recipe:

- raysv: crop, two views at strength 0.5 (noise, babble of 3 to 8 voices, reverb), batched fbank, SpecAugment. 2 of 3
  views are disturbed.
- wespeaker: read the WAV, crop, noise or one voice or reverb, Kaldi's fbank with dither, one view at a time; 0.6 of the
  views are disturbed. See `peers.py` for what is given in place of packages that are missing.
- SpeechBrain (its VoxCeleb recipe): read a segment of the WAV, then in a batch the original and noise, reverb, dropped
  frequencies and dropped chunks each on a copy: five views, 4 of 5 disturbed; batched fbank.

Printed beside it: what our time consists of, each part alone, and the FFT, power and mel product of the fbank on
frames that lie ready, below which PyTorch's operations do not get.

Process CPU seconds, which other work on the machine disturbs little; each way in turn, medians.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import machine, table
from peers import Speech, keep_freed_memory, our_config, real_speech, use_wespeaker, versions, wespeaker_dataset
from torch import Tensor

from raysv.corpus.loading import load_corpus
from raysv.learning.views import Batch, ViewBatches, make_views
from raysv.speech.features import CPU_ROWS, FFT_SIZE, BandMasks, Fbank, mask_bands, mean_normalise

FRAMES, SAMPLES = 198, 32_000
UTTERANCES = 32
VIEWS = 2 * UTTERANCES
HELD = 8  # batches that the parts of ours are measured on
Way = Callable[[], int]


def ours(cache: Path, strength: float) -> tuple[Way, dict[str, Way]]:
    """One batch of two views of 32 utterances, and its parts alone; each returns the number of views."""
    config = our_config(
        cache,
        batch={"speakers": 16, "utterances_per_speaker": 2, "views": 2, "crop_seconds": 2.0},
        augment={"strength": strength},
    )
    batches, fbank = ViewBatches(config, load_corpus(config.data, config.augment)), Fbank()
    steps = itertools.product(range(1, 1000), range(batches.steps))

    def normalise(features: Tensor, batch: Batch) -> int:
        return len(mask_bands(mean_normalise(features), BandMasks(*batch.masks.unbind(-1))))

    def whole() -> int:
        batch = batches[next(steps)]
        return normalise(fbank(make_views(batch)), batch)

    held = itertools.cycle([batches[next(steps)] for _ in range(HELD)])
    waveforms = make_views(next(held))
    features, frames = fbank(waveforms), torch.randn(CPU_ROWS, FRAMES, FFT_SIZE)

    def products() -> int:
        for _ in range(VIEWS // CPU_ROWS):
            fbank.mel_energies(frames)
        return VIEWS

    return whole, {
        "whole": whole,
        "sampling, reading, babble": lambda: len(batches[next(steps)].masks),
        "noise, rooms": lambda: len(make_views(next(held))),
        "fbank": lambda: len(fbank(waveforms)),
        "of it FFT, power, mel product": products,
        "mean, masks": lambda: normalise(features, next(held)),
    }


def wespeaker(speech: Speech, folder: Path) -> Way:
    """64 views, one after the other, and the mean over time that its loop subtracts from the batch."""
    views = iter(wespeaker_dataset(speech, folder, FRAMES)[0])

    def batch() -> int:
        from wespeaker.dataset.dataset_utils import apply_cmvn

        return len(apply_cmvn(torch.stack([next(views)["feat"] for _ in range(VIEWS)])))

    return batch


def speechbrain(speech: Speech, folder: Path) -> Way:
    """One batch of 32 utterances, which its recipe makes five views of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from speechbrain.augment.augmenter import Augmenter
        from speechbrain.augment.time_domain import AddNoise, AddReverb, DropChunk, DropFreq
        from speechbrain.dataio import audio_io
        from speechbrain.lobes.features import Fbank as TheirFbank
        from speechbrain.processing.features import InputNormalization
    noise = AddNoise(_annotation(speech.noise_files, folder / "noise.csv"), snr_low=0, snr_high=15)
    reverb = AddReverb(_annotation(speech.room_files, folder / "rooms.csv"))
    drop_freq = DropFreq(drop_freq_count_low=1, drop_freq_count_high=3, drop_freq_width=0.05)
    drop_chunk = DropChunk(drop_length_low=1000, drop_length_high=2000, drop_count_low=1, drop_count_high=5)
    augment = Augmenter(
        parallel_augment=True,
        concat_original=True,
        min_augmentations=4,
        max_augmentations=4,
        augmentations=[noise, reverb, drop_freq, drop_chunk],
    )
    fbank, normalise = TheirFbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False)
    files = itertools.cycle([path for path, _ in speech.utterances])
    generator = torch.Generator().manual_seed(0)

    def crop(path: Path) -> torch.Tensor:
        length = audio_io.info(str(path)).num_frames
        start = int(torch.randint(max(1, length - SAMPLES + 1), (1,), generator=generator))
        samples = audio_io.load(str(path), frame_offset=start, num_frames=SAMPLES)[0][0]
        return torch.nn.functional.pad(samples, (0, SAMPLES - len(samples)))

    def batch() -> int:
        waveforms = torch.stack([crop(next(files)) for _ in range(UTTERANCES)])
        views, lengths = augment(waveforms, torch.ones(UTTERANCES))
        return len(normalise(fbank(views), lengths))

    return batch


def _annotation(files: list[Path], target: Path) -> str:
    """The list that SpeechBrain reads clips from."""
    with target.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["ID", "duration", "wav", "wav_format", "wav_opts"])
        rows.writerows([path.stem, 5.0, path, "wav", ""] for path in files)
    return str(target)


def main() -> None:
    """Print CPU milliseconds per view and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wespeaker", type=Path, help="a checkout of its source; left out if not given")
    parser.add_argument("--repeats", type=int, default=15, help="batches of each")
    arguments = parser.parse_args()
    if not os.environ.get("RAYSV_DATA"):
        raise SystemExit("RAYSV_DATA must name the pack of real speech.")
    keep_freed_memory()
    torch.set_num_threads(1)
    print(machine())
    print(versions(arguments.wespeaker))
    with tempfile.TemporaryDirectory(prefix="raysv-data-path-") as name:
        folder = Path(name)
        speech = real_speech(folder)
        whole, parts = ours(folder / "cache", 0.5)
        ways = {"raysv": whole, "raysv, clean views": ours(folder / "cache", 0.0)[0]}
        ways["SpeechBrain"] = speechbrain(speech, folder)
        if arguments.wespeaker:
            use_wespeaker(arguments.wespeaker)
            ways["wespeaker"] = wespeaker(speech, folder)
        cpu, wall = _costs(ways, arguments.repeats)
        shares, _ = _costs(parts, arguments.repeats)
    peer = min((name for name in ways if not name.startswith("raysv")), key=cpu.__getitem__)
    print(table(f"CPU time of one augmented view, in ratio to {peer}", cpu, peer))
    print(table("Wall time of the same", wall, peer))
    print(table("CPU time of raysv's parts, in ratio to the whole", shares, "whole"))


def _costs(ways: dict[str, Way], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median CPU and wall seconds of one view, the ways taking turns, after one round to warm up."""
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, batch in ways.items():
            cpu_started, wall_started = time.process_time(), time.perf_counter()
            views = batch()
            if turn:
                cpu[name].append((time.process_time() - cpu_started) / views)
                wall[name].append((time.perf_counter() - wall_started) / views)
    medians = [{name: statistics.median(values) for name, values in costs.items()} for costs in (cpu, wall)]
    return medians[0], medians[1]


if __name__ == "__main__":
    main()
