"""A checked corpus, kept on the node for all processes that train on it: they map it and need not read or check again.

A kept corpus is a folder of the cache, beside the stores that it points to. It is named by the digests of its parts and
holds `corpus.json` and the arrays of all sets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from raysv.corpus.cache import alone, make_once, mapped
from raysv.corpus.groups import Groups, Indices
from raysv.corpus.sets import Corpus, PairSet, TrainingSet, arrays
from raysv.corpus.store import WaveformStore

FORMAT = 1  # a new number keeps every corpus anew


def kept_folder(digests: Mapping[str, str], cache: Path) -> Path:
    """Where a corpus with these digests is kept."""
    told = json.dumps([FORMAT, sorted(digests.items())])
    return cache / f"corpus-{hashlib.sha256(told.encode()).hexdigest()[:24]}"


def keep(corpus: Corpus, cache: Path) -> Corpus:
    """Keep a corpus, unless it is kept already; returns it as `open_kept` does.

    Raises: OSError when the cache cannot be written.
    """
    folder = kept_folder(corpus.digests, cache)
    if not open_kept(corpus.digests, cache):
        with alone(folder):
            if not open_kept(corpus.digests, cache):
                shutil.rmtree(folder, ignore_errors=True)  # a store that it points to may have been deleted
        make_once(folder, lambda aside: _write(corpus, aside))
    return dataclasses.replace(_open(folder), left_out=corpus.left_out)  # the same data may have lain elsewhere


def open_kept(digests: Mapping[str, str], cache: Path) -> Corpus | None:
    """The corpus that is kept with these digests, its arrays mapped; None where it, or a store of it, is missing."""
    try:
        return _open(kept_folder(digests, cache))
    except FileNotFoundError:
        return None


def _open(folder: Path) -> Corpus:
    told = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    stores = [WaveformStore(folder.with_name(name)) for name in told["stores"]]

    def array(part: int, name: str) -> Indices:
        return mapped(folder / f"{part}.{name}.npy")

    def groups(part: int, name: str) -> Groups:
        return Groups(array(part, f"{name}.members"), array(part, f"{name}.starts"))

    def pair_set(part: int) -> PairSet:
        return PairSet(
            stores[part],
            groups(part, "models"),
            array(part, "enrolment"),
            array(part, "test"),
            mapped(folder / f"{part}.same_speaker.npy"),
            array(part, "speakers"),
        )

    return Corpus(
        train=TrainingSet(
            stores[0], array(0, "recordings"), array(0, "labels"), told["speakers"], groups(0, "by_speaker")
        ),
        dev=pair_set(1),
        tests={name: pair_set(part) for part, name in enumerate(told["tests"], 2)},
        clips=dict(zip(told["clips"], stores[2 + len(told["tests"]) :], strict=True)),
        left_out=told["left_out"],
        digests=told["digests"],
    )


def _write(corpus: Corpus, folder: Path) -> None:
    sets: list[TrainingSet | PairSet] = [corpus.train, corpus.dev, *corpus.tests.values()]
    for part, of_set in enumerate(sets):
        for name, array in arrays(of_set).items():
            np.save(folder / f"{part}.{name}.npy", array)
    told = {
        "digests": corpus.digests,
        "stores": [store.folder.name for store in (*(of_set.store for of_set in sets), *corpus.clips.values())],
        "speakers": corpus.train.speakers,
        "tests": list(corpus.tests),
        "clips": list(corpus.clips),
        "left_out": corpus.left_out,
    }
    (folder / "corpus.json").write_text(json.dumps(told), encoding="utf-8")
