"""A corpus made in no time, and a configuration that learns it in no time.

Plain functions, so that worker processes and fixtures of any scope may call them.
"""

import contextlib
import csv
import os
import sys

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing

from raysv.config import SAMPLE_RATE, config_from_dict, with_values

TRAIN, DEV, TEST = range(7), range(4), range(3, 7)  # dev and test have voices of training, in other utterances
UTTERANCES = {"train": 8, "dev": 5, "test": 4}
SECONDS = 1.2
NOISES, ROOMS = 3, 2
ROOM_DELAY = 40  # samples before the direct path


def voice(speaker, utterance, seconds=SECONDS):
    """Noise in syllables, with a resonance of the speaker and a weaker one of the utterance."""
    generator = np.random.default_rng([speaker, utterance])
    samples = round(seconds * SAMPLE_RATE)
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    own, other = 500 * 8 ** (speaker * 0.618 % 1), generator.uniform(500, 4000)
    gain = 0.05 + _resonance(frequencies, own) + 0.5 * _resonance(frequencies, other)
    sound = np.fft.irfft(gain * np.fft.rfft(generator.normal(size=samples)), samples)
    syllables = np.sin(np.pi * (generator.uniform(3, 6) * np.arange(samples) / SAMPLE_RATE + generator.uniform())) ** 2
    sound = sound * syllables + 0.01 * generator.normal(size=samples)
    return sound * generator.uniform(0.1, 0.5) / np.abs(sound).max()


def _resonance(frequencies, centre):
    return 1 / (1 + ((frequencies - centre) / 150) ** 2)


def write_corpus(folder):
    """The lists that a configuration names by default, and the audio below them."""
    for name, speakers, first in (("train", TRAIN, 0), ("dev", DEV, 10), ("test", TEST, 20)):
        rows = []
        for speaker in speakers:
            for utterance in range(first, first + UTTERANCES[name]):
                rows.append((f"{name}-{speaker}", f"{name}-{speaker}/{utterance}.wav"))
                write_audio(folder / rows[-1][1], voice(speaker, utterance))
        write_table(folder / f"{name}.csv", [("speaker", "path"), *rows])
        write_pairs(folder / f"{name}_pairs.txt", rows)
    generator = np.random.default_rng(0)
    noises = {f"noise/{name}.wav": 0.1 * generator.normal(size=8000 * (name + 1)) for name in range(NOISES)}
    rooms = {f"rir/{name}.wav": _room(generator) for name in range(ROOMS)}
    for path, samples in (noises | rooms).items():
        write_audio(folder / path, samples)
    write_table(folder / "noise.csv", [("path",), *zip(noises, strict=True)])
    write_table(folder / "rir.csv", [("path",), *zip(rooms, strict=True)])
    return folder


def write_audio(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_pairs(path, rows):
    """All pairs of rows `(speaker, path)`."""
    with path.open("w", encoding="utf-8") as file:
        for place, (speaker, enrolment) in enumerate(rows):
            file.writelines(f"{speaker == other:d} {enrolment} {test}\n" for other, test in rows[place + 1 :])


def tiny_config(root, **values):
    """A small configuration of that corpus; keyword arguments are dotted keys, with two underscores for the dot."""
    tree = {
        "data": {"root": str(root), "cache": str(root / "cache"), "loader_workers": 0},
        "batch": {"speakers": 4, "utterances_per_speaker": 2, "views": 2, "crop_seconds": 0.5},
        "model": {"channels": 16, "embedding_dim": 16},
        "optimizer": {"learning_rate": 0.003, "warmup_epochs": 0.5},
        "training": {"epochs": 2, "precision": "fp32"},
    }
    return config_from_dict(with_values(tree, {key.replace("__", "."): value for key, value in values.items()}))


def _room(generator):
    echo = 0.1 * np.exp(-np.arange(2000) / 300) * generator.normal(size=2000)
    echo[0] = 0.9
    return np.concatenate([np.zeros(ROOM_DELAY), echo])


def run_workers(work, arguments, count):
    """Run `work(number, *arguments)` in so many processes; what one raises is raised here."""
    torch.multiprocessing.spawn(_work_and_leave, (work, arguments), nprocs=count)


def _work_and_leave(number, work, arguments):
    work(number, *arguments)
    # DDP keeps gloo's threads although the group was destroyed (PyTorch 2.11): when Python ends under such a thread
    # while it holds a tensor, the process is aborted, once in some thirty times
    os._exit(0)


@contextlib.contextmanager
def process_group(meeting, number, workers):
    """Be one of several workers, who meet at a file."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{meeting}", rank=number, world_size=workers)
    try:
        yield
    finally:
        dist.destroy_process_group()
