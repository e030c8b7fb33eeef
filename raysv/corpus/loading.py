"""Everything a run reads, found, checked and decoded before anything trains."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raysv.config import SYNTHETIC, AugmentConfig, DataConfig
from raysv.corpus.store import Progress, WaveformStore, open_store
from raysv.corpus.synthetic import corpus_folder
from raysv.corpus.utterances import (
    Utterance,
    VerificationPair,
    read_clips,
    read_enrolments,
    read_pairs,
    read_utterances,
)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingSet:
    """Labelled recordings.

    Attributes:
        recordings: `(utterances,)` where each utterance lies in the store.
        labels: `(utterances,)` class of each, an index into `speakers`.
    """

    store: WaveformStore
    recordings: Indices
    labels: Indices
    speakers: list[str]


@dataclass(frozen=True)
class PairSet:
    """A pair list over recordings that are embedded once each.

    Attributes:
        models: for each enrolment, the recordings it is made of.
        enrolment, test: `(pairs,)` indices into `models` and into the store.
        same_speaker: `(pairs,)` bool.
    """

    store: WaveformStore
    models: list[Indices]
    enrolment: Indices
    test: Indices
    same_speaker: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """The audio of a run: what it trains on, is judged by, and is disturbed with."""

    train: TrainingSet
    dev: PairSet
    tests: dict[str, PairSet]
    clips: dict[str, WaveformStore]

    @cached_property
    def digest(self) -> str:
        """Hash of training audio, labels and dev pairs: two runs with the same one learned from the same data."""
        digest = hashlib.sha256(self.train.store.digest.encode())
        for part in (
            self.train.recordings,
            self.train.labels,
            self.dev.enrolment,
            self.dev.test,
            self.dev.same_speaker,
        ):
            digest.update(part.tobytes())
        for store in (self.dev.store, *self.clips.values()):
            digest.update(store.digest.encode())
        return digest.hexdigest()[:16]


def cache_folder(data: DataConfig) -> Path:
    """Where decoded waveforms and the embedded corpus are kept."""
    chosen = data.cache or os.environ.get("RAYSV_CACHE") or "~/.cache/raysv"
    return Path(chosen).expanduser().absolute()


def load_corpus(
    data: DataConfig, augment: AugmentConfig, *, tests: bool = False, progress: Progress | None = None
) -> Corpus:
    """Read, check and decode what the configuration names.

    Args:
        tests: whether to decode the test lists too; their speakers are checked against training either way.
        progress: called while recordings are decoded.

    Raises: ValueError when a list, a recording or a noise folder is not as it must be; all bad recordings at once.
    """
    root = _root(data)
    train = read_utterances(root / data.train, root)
    known = {spoken.key: spoken for name in data.utterances for spoken in read_utterances(root / name, root)}
    enrolments = {model: parts for name in data.enrolments for model, parts in read_enrolments(root / name).items()}
    lists = {"dev": data.dev_pairs, **data.test_pairs}
    if len(lists) <= len(data.test_pairs):
        raise ValueError("data.test_pairs has a list named dev, which is the name of data.dev_pairs. Rename it.")
    pairs = {name: read_pairs(root / file) for name, file in lists.items()}
    for name, listed in pairs.items():
        _refuse_leak(root / lists[name], _named(listed, enrolments), train, known)
    kinds = augment.kinds if augment.strength > 0 else []
    clips = {kind: files for kind in kinds if (files := _clip_paths(data, kind, root))}

    cache = cache_folder(data)
    wanted = pairs if tests else {"dev": pairs["dev"]}
    paths = {
        name: _paths(root, root / lists[name], _named(listed, enrolments), known) for name, listed in wanted.items()
    }
    stores = {"train": open_store([spoken.path for spoken in train], cache, progress)}
    stores |= {name: open_store(list(named.values()), cache, progress) for name, named in paths.items()}
    stores |= {f"{kind} clips": open_store(found, cache, progress) for kind, found in clips.items()}
    _refuse_bad_audio(stores, data.skip_bad_audio)

    pair_sets = {name: _pair_set(stores[name], paths[name], listed, enrolments) for name, listed in wanted.items()}
    return Corpus(
        train=_training_set(stores["train"], train),
        dev=pair_sets.pop("dev"),
        tests=pair_sets,
        clips={kind: stores[f"{kind} clips"] for kind in clips},
    )


def load_pairs(pairs: Path, root: Path, cache: Path) -> tuple[PairSet, list[VerificationPair]]:
    """A pair list of its own, its recordings named by their paths below `root`."""
    listed = read_pairs(pairs)
    paths = _paths(root, pairs, _named(listed, {}), {})
    store = open_store(list(paths.values()), cache)
    _refuse_bad_audio({"pairs": store}, skip=False)
    return _pair_set(store, paths, listed, {}), listed


def _root(data: DataConfig) -> Path:
    if data.root == SYNTHETIC:
        return corpus_folder(cache_folder(data))
    root = Path(data.root).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(f"data.root is {data.root}, which is no folder. Give the folder that holds your corpus.")
    return root


def _clip_paths(data: DataConfig, kind: str, root: Path) -> list[Path]:
    key = "rir" if kind == "reverb" else kind
    source = getattr(data, key)
    if not source:
        if kind == "babble":
            return []  # the training speakers babble
        raise ValueError(
            f"augment.kinds asks for {kind}, but data.{key} is empty. Set data.{key} to a folder or a CSV of clips, or "
            f"leave {kind} out of augment.kinds."
        )
    return read_clips(root / source, key, root)


def _named(pairs: Iterable[VerificationPair], enrolments: dict[str, tuple[str, ...]]) -> list[str]:
    """The recordings that pairs name, each once, an enrolment of several recordings replaced by them."""
    keys: dict[str, None] = {}
    for pair in pairs:
        keys.update(dict.fromkeys(enrolments.get(pair.enrolment, (pair.enrolment,))))
        keys[pair.test] = None
    return list(keys)


def _refuse_leak(file: Path, keys: Sequence[str], train: Sequence[Utterance], known: dict[str, Utterance]) -> None:
    trained_keys, trained = {spoken.key for spoken in train}, {spoken.speaker for spoken in train}
    leaks = set()
    for key in keys:
        if key in trained_keys:
            leaks.add(key)
        elif key in known:
            leaks |= {known[key].speaker} & trained
        else:  # no manifest says who speaks; VoxCeleb and CN-Celeb have a folder per speaker
            leaks |= set(Path(key).parts[:-1]) & trained
    if leaks:
        shown = ", ".join(sorted(leaks)[:10])
        raise ValueError(
            f"{file} and the training list share {len(leaks)} speakers or recordings: {shown}"
            f"{', ...' if len(leaks) > 10 else ''}. Error rates on them would mean nothing: take "
            "them out of one of the two."
        )


def _paths(root: Path, file: Path, keys: Sequence[str], known: dict[str, Utterance]) -> dict[str, Path]:
    paths = {key: known[key].path if key in known else root / key for key in keys}
    missing = [key for key, path in paths.items() if key not in known and not path.is_file()]
    if missing:
        raise ValueError(
            f"{file} names {len(missing)} recordings that are in no manifest of data.utterances and no files below "
            f"{root}, first {missing[0]!r}. Mend the list, or add the manifest that knows them."
        )
    return paths


def _refuse_bad_audio(stores: dict[str, WaveformStore], skip: bool) -> None:
    problems = {path: why for store in stores.values() for path, why in store.problems.items()}
    if problems and not skip:
        listed = "\n".join(f"  {path}: {why}" for path, why in problems.items())
        raise ValueError(
            f"{len(problems)} recordings cannot be used:\n{listed}\n"
            "Mend or remove them, or leave them out with --skip-bad-audio."
        )
    for name, store in stores.items():
        if not store.lengths.any():
            raise ValueError(f"None of the {len(store)} recordings of {name} can be used.")


def _training_set(store: WaveformStore, train: Sequence[Utterance]) -> TrainingSet:
    recordings = store.usable
    spoken = [train[index].speaker for index in recordings]
    speakers = sorted(set(spoken))
    classes = {speaker: label for label, speaker in enumerate(speakers)}
    return TrainingSet(store, recordings, np.array([classes[speaker] for speaker in spoken]), speakers)


def _pair_set(
    store: WaveformStore,
    paths: dict[str, Path],
    pairs: Sequence[VerificationPair],
    enrolments: dict[str, tuple[str, ...]],
) -> PairSet:
    """The pairs as indices; those of a recording that was left out are left out too."""
    place = {key: index for index, key in enumerate(paths) if store.lengths[index]}
    models: dict[str, int] = {}
    parts: list[Indices] = []
    rows = []
    for pair in pairs:
        if pair.enrolment not in models:
            usable = [place[key] for key in enrolments.get(pair.enrolment, (pair.enrolment,)) if key in place]
            models[pair.enrolment] = len(parts)
            parts.append(np.array(usable, np.int64))
        model = models[pair.enrolment]
        if len(parts[model]) and pair.test in place:
            rows.append((model, place[pair.test], pair.same_speaker))
    table = np.array(rows, np.int64).reshape(-1, 3)
    return PairSet(store, parts, table[:, 0], table[:, 1], table[:, 2].astype(bool))
