"""What a worker keeps in memory, and how long it waits for its data, at one and at ten times the data.

    python benchmarks/memory.py

Two corpora are listed, one of them with ten times the utterances, dev recordings and dev pairs of the other. For each,
a fresh process checks and decodes it as the driver of a study does, and another one judges an encoder by the dev pairs
and runs `fit` for an epoch, as a worker does. The allocator is set as in raysv's own clusters. Shown are seconds, and
the largest resident memory: anonymous, which a machine must have, and file-backed, which all processes of a node share
and the kernel takes back at need. The encoder is small, the speakers stay as many: measured is what data take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from measure import machine

from raysv.config import SAMPLE_RATE, Config, config_from_dict
from raysv.corpus.loading import load_corpus, open_corpus
from raysv.learning.training import Learner, fit
from raysv.verification.evaluation import evaluate

UTTERANCES, DEV_RECORDINGS, PAIRS = 4_000, 200, 100_000  # of the smaller corpus
TIMES = 10
SPEAKERS, DEV_SPEAKERS = 256, 50
SECONDS = 0.3  # of a recording
SOURCES = 50  # recordings that differ; the others are further names of them


class Memory:
    """The largest resident memory of this process while it is watched, in MB."""

    def __enter__(self) -> Memory:
        self.anonymous, self.mapped = resident()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            anonymous, mapped = resident()
            self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)


def resident() -> tuple[float, float]:
    """Anonymous and file-backed resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(values["RssAnon"]) / 1000, int(values["RssFile"]) / 1000


def write_corpus(folder: Path, times: int) -> None:
    """Lists and audio of a corpus: many names for few files, each of which is decoded as often as it has names."""
    generator = np.random.default_rng(0)
    (folder / "sources").mkdir(parents=True)
    for number in range(SOURCES):
        noise = generator.normal(0, 0.1, round(SECONDS * SAMPLE_RATE))
        soundfile.write(folder / "sources" / f"{number}.wav", noise, SAMPLE_RATE, subtype="PCM_16")
    names: dict[str, list[str]] = {}
    for name, count, speakers in (("train", UTTERANCES, SPEAKERS), ("dev", DEV_RECORDINGS, DEV_SPEAKERS)):
        (folder / name).mkdir()
        names[name] = [f"{name}/{number}.wav" for number in range(count * times)]
        for number, path in enumerate(names[name]):
            os.link(folder / "sources" / f"{number % SOURCES}.wav", folder / path)
        rows = [f"{name}-{number % speakers},{path}\n" for number, path in enumerate(names[name])]
        (folder / f"{name}.csv").write_text("".join(["speaker,path\n", *rows]))
    pairs = generator.integers(len(names["dev"]), size=(PAIRS * times, 2)).tolist()
    with (folder / "dev_pairs.txt").open("w") as file:
        for one, other in pairs:
            same = one % DEV_SPEAKERS == other % DEV_SPEAKERS
            file.write(f"{same:d} {names['dev'][one]} {names['dev'][other]}\n")


def configuration(folder: Path) -> Config:
    """A small encoder: what is measured is the memory that data take."""
    return config_from_dict(
        {
            "data": {
                "root": str(folder),
                "cache": str(folder / "cache"),
                "test_pairs": {},
                "utterances": ["dev.csv"],
                "loader_workers": 0,
            },
            "batch": {"speakers": 32, "utterances_per_speaker": 2, "views": 1, "crop_seconds": SECONDS},
            "augment": {"kinds": ["babble"]},
            "model": {"channels": 16, "embedding_dim": 16},
            "training": {"epochs": 1},
        }
    )


def drive(folder: Path) -> dict[str, float]:
    """What a driver does: check and decode, and once more when all is decoded."""
    config = configuration(folder)
    seconds = []
    with Memory() as memory:
        for _ in range(2):
            started = time.perf_counter()
            digests = load_corpus(config.data, config.augment).digests
            seconds.append(time.perf_counter() - started)
    (folder / "checked.json").write_text(json.dumps(digests))
    return {"decode s": seconds[0], "check s": seconds[1], "anonymous MB": memory.anonymous, "mapped MB": memory.mapped}


def work(folder: Path) -> dict[str, float]:
    """What a worker does: open what was checked, train an epoch and judge the encoder by the dev pairs."""
    config = configuration(folder)
    checked = json.loads((folder / "checked.json").read_text())
    started = time.perf_counter()
    corpus = open_corpus(config.data, config.augment, checked)
    seconds = time.perf_counter() - started
    with Memory() as judging:
        evaluate(Learner(config, len(corpus.train.speakers)).encoder, corpus.dev)
    with Memory() as training:
        fit(config, lambda metrics, folder: None, checked=checked)
    return {
        "open s": seconds,
        "dev pairs, anonymous MB": judging.anonymous,
        "dev pairs, mapped MB": judging.mapped,
        "fit, anonymous MB": training.anonymous,
        "fit, mapped MB": training.mapped,
    }


def main() -> None:
    """Measure both corpora, each process on its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", nargs=2, metavar=("ROLE", "FOLDER"), help=argparse.SUPPRESS)
    if process := parser.parse_args().process:
        torch.set_num_threads(2)
        role, folder = process
        print(json.dumps({"driver": drive, "worker": work}[role](Path(folder))))
        return
    from raysv.search.cluster import MALLOC_SETTINGS  # here: it imports Ray, which the measured processes do without

    print(machine())
    environment = os.environ | MALLOC_SETTINGS
    found: dict[tuple[str, int], dict[str, float]] = {}
    for times in (1, TIMES):
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), times)
            for role in ("driver", "worker"):
                command = [sys.executable, __file__, "--process", role, folder]
                found[role, times] = json.loads(subprocess.check_output(command, env=environment))
    print(f"{UTTERANCES} utterances, {DEV_RECORDINGS} dev recordings, {PAIRS} dev pairs; and {TIMES} times as many")
    for role in ("driver", "worker"):
        for name, small in found[role, 1].items():
            large = found[role, TIMES][name]
            print(f"  {role}  {name:24}  {small:9.3f}  {large:9.3f}  {large / small:6.2f} x")


if __name__ == "__main__":
    main()
