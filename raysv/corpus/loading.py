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
Enrolments = dict[str, tuple[str, ...]]  # the recordings of each model that has several


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
    left_out: dict[str, str]  # unusable recordings by path, and why; none unless data.skip_bad_audio

    def __str__(self) -> str:
        train = self.train
        counts = f"{len(train.speakers)} speakers and {len(train.labels)} utterances to learn from"
        left_out = f"; {len(self.left_out)} unusable recordings left out" if self.left_out else ""
        return f"{counts}, {len(self.dev.same_speaker)} dev pairs{left_out}"

    @cached_property
    def digest(self) -> str:
        """Hash of training speech, labels and dev pairs: runs with the same one learned from the same speech.

        Clips are left out: which are read depends on the augmentation, and trials of one study differ in that.
        """
        digest = hashlib.sha256(f"{self.train.store.digest} {self.dev.store.digest}".encode())
        pairs = (self.dev.enrolment, self.dev.test, self.dev.same_speaker)
        for part in (self.train.recordings, self.train.labels, *pairs, *self.dev.models):
            digest.update(f"{len(part)} ".encode() + part.tobytes())
        return digest.hexdigest()[:16]


def cache_folder(data: DataConfig) -> Path:
    """Where decoded waveforms and the embedded corpus are kept.

    Raises: ValueError when RAYSV_CACHE is a relative path.
    """
    if data.cache:
        return Path(data.cache).expanduser().absolute()
    chosen = Path(os.environ.get("RAYSV_CACHE") or "~/.cache/raysv").expanduser()
    if not chosen.is_absolute():
        raise ValueError(f"RAYSV_CACHE is {chosen}, but every worker runs in a folder of its own. Make it absolute.")
    return chosen


def load_corpus(
    data: DataConfig, augment: AugmentConfig, *, tests: bool = False, progress: Progress | None = None
) -> Corpus:
    """Read, check and decode what the configuration names.

    Args:
        tests: whether to decode the test lists too; that their recordings exist and their speakers are not in training
            is checked either way.
        progress: called while recordings are decoded.

    Raises: ValueError when a list, a recording or a noise folder is not as it must be; all bad recordings at once.
        OSError when the cache cannot be written.
    """
    if "dev" in data.test_pairs:
        raise ValueError("data.test_pairs has a list named dev, which is the name of data.dev_pairs. Rename it.")
    root = _root(data)
    train = read_utterances(root / data.train, root)
    known, enrolments = _read_known(data.utterances, root), _read_models(data.enrolments, root)
    lists = {name: root / file for name, file in {"dev": data.dev_pairs, **data.test_pairs}.items()}
    pairs = {name: read_pairs(file) for name, file in lists.items()}
    paths = {name: _paths(root, listed, enrolments, known) for name, listed in pairs.items()}
    for name, file in lists.items():
        _refuse_unknown(file, paths[name], known)
        _refuse_leak(file, "the training list", paths[name], train, known)
    chosen_on = [known.get(key, Utterance(key, "", path)) for key, path in paths["dev"].items()]
    for name in data.test_pairs:
        _refuse_leak(lists[name], "the dev pairs", paths[name], chosen_on, known)
    wanted = list(lists) if tests else ["dev"]
    kinds = augment.kinds if augment.strength > 0 else []
    clips = {kind: files for kind in kinds if (files := _clip_paths(data, kind, root))}

    cache = cache_folder(data)
    stores = {"train": open_store([spoken.path for spoken in train], cache, progress)}
    stores |= {f"{name} pairs": open_store(list(paths[name].values()), cache, progress) for name in wanted}
    stores |= {f"{kind} clips": open_store(found, cache, progress) for kind, found in clips.items()}
    if data.skip_bad_audio:
        _refuse_nothing_left(stores)
    else:
        _refuse_bad_audio(stores, "Mend or remove them, or leave them out with --skip-bad-audio.")

    pair_sets = {
        name: _pair_set(stores[f"{name} pairs"], lists[name], pairs[name], paths[name], enrolments) for name in wanted
    }
    return Corpus(
        train=_training_set(stores["train"], train),
        dev=pair_sets.pop("dev"),
        tests=pair_sets,
        clips={kind: stores[f"{kind} clips"] for kind in clips},
        left_out={path: why for store in stores.values() for path, why in store.problems.items()},
    )


def load_pairs(
    pairs: Path, root: Path, cache: Path, utterances: Sequence[str] = (), enrolments: Sequence[str] = ()
) -> tuple[PairSet, list[VerificationPair]]:
    """A pair list of its own.

    Args:
        root: folder that recordings and lists are relative to.
        utterances: manifests or Kaldi folders with the recordings that pairs name otherwise than by their path.
        enrolments: lists of enrolments made of several recordings.

    Raises: ValueError when a recording is missing or cannot be used, OSError when the cache cannot be written.
    """
    listed = read_pairs(pairs)
    known, models = _read_known(utterances, root), _read_models(enrolments, root)
    paths = _paths(root, listed, models, known)
    _refuse_unknown(pairs, paths, known)
    store = open_store(list(paths.values()), cache)
    _refuse_bad_audio({"pairs": store}, "Mend them, or take their pairs out of the list.")
    return _pair_set(store, pairs, listed, paths, models), listed


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


def _parts(name: str, enrolments: Enrolments) -> tuple[str, ...]:
    """The recordings that an enrolment is made of: usually the one it is named after."""
    return enrolments.get(name, (name,))


def _paths(
    root: Path, pairs: Iterable[VerificationPair], enrolments: Enrolments, known: dict[str, Utterance]
) -> dict[str, Path]:
    """The recordings that pairs name, each once, and where they are: as a manifest says, otherwise below the root."""
    keys: dict[str, None] = {}
    for pair in pairs:
        keys.update(dict.fromkeys((*_parts(pair.enrolment, enrolments), pair.test)))
    return {key: known[key].path if key in known else root / key for key in keys}


def _read_known(lists: Sequence[str], root: Path) -> dict[str, Utterance]:
    """The recordings of several lists by the names that pairs call them."""
    known: dict[str, Utterance] = {}
    for name in lists:
        for spoken in read_utterances(root / name, root):
            before = known.setdefault(spoken.key, spoken)
            if (before.path, before.speaker) != (spoken.path, spoken.speaker):
                raise ValueError(f"{root / name} gives {spoken.key} another recording or speaker than an earlier list.")
    return known


def _read_models(lists: Sequence[str], root: Path) -> Enrolments:
    models: Enrolments = {}
    for name in lists:
        for model, parts in read_enrolments(root / name).items():
            if models.setdefault(model, parts) != parts:
                raise ValueError(f"{root / name} makes the enrolment {model} of others than an earlier list.")
    return models


def _refuse_leak(
    file: Path, where: str, paths: dict[str, Path], seen: Sequence[Utterance], known: dict[str, Utterance]
) -> None:
    """Refuse pairs with recordings or speakers that were seen elsewhere, in training or in choosing a configuration."""
    seen_speakers = {spoken.speaker for spoken in seen}
    seen_keys, seen_paths = {spoken.key for spoken in seen}, {spoken.path for spoken in seen}
    leaks = set()
    for key, path in paths.items():
        if key in seen_keys or path in seen_paths:
            leaks.add(key)
        elif key in known:
            leaks |= {known[key].speaker} & seen_speakers
        else:  # no manifest says who speaks, but many corpora have a folder per speaker
            leaks |= set(Path(key).parts[:-1]) & seen_speakers
    if leaks:
        shown = ", ".join(sorted(leaks)[:10])
        raise ValueError(
            f"{file} and {where} share {len(leaks)} speakers or recordings: {shown}"
            f"{', ...' if len(leaks) > 10 else ''}. Error rates on them would mean nothing: take "
            "them out of one of the two."
        )


def _refuse_unknown(file: Path, paths: dict[str, Path], known: dict[str, Utterance]) -> None:
    unknown = [key for key, path in paths.items() if key not in known and not path.is_file()]
    if unknown:
        raise ValueError(
            f"{file} names {len(unknown)} recordings that no manifest lists and that are no files, first "
            f"{unknown[0]!r} at {paths[unknown[0]]}. Mend the list, or name the one that knows them among the "
            "utterances or enrolments."
        )


def _refuse_bad_audio(stores: dict[str, WaveformStore], remedy: str) -> None:
    problems = {path: why for store in stores.values() for path, why in store.problems.items()}
    if problems:
        listed = "\n".join(f"  {path}: {why}" for path, why in problems.items())
        raise ValueError(f"{len(problems)} recordings cannot be used:\n{listed}\n{remedy}")


def _refuse_nothing_left(stores: dict[str, WaveformStore]) -> None:
    for name, store in stores.items():
        if not len(store.usable):
            path, why = next(iter(store.problems.items()))
            raise ValueError(f"None of the {len(store)} recordings of {name} can be used; {path}: {why}.")


def _training_set(store: WaveformStore, train: Sequence[Utterance]) -> TrainingSet:
    recordings = store.usable
    spoken = [train[index].speaker for index in recordings]
    speakers = sorted(set(spoken))
    classes = {speaker: label for label, speaker in enumerate(speakers)}
    return TrainingSet(store, recordings, np.array([classes[speaker] for speaker in spoken]), speakers)


def _pair_set(
    store: WaveformStore,
    file: Path,
    pairs: Sequence[VerificationPair],
    paths: dict[str, Path],
    enrolments: Enrolments,
) -> PairSet:
    """The pairs as indices; those of a recording that was left out are left out too."""
    places = {key: index for index, key in enumerate(paths) if store.lengths[index]}
    models: dict[str, list[int]] = {}
    for pair in pairs:
        if pair.enrolment not in models:
            models[pair.enrolment] = [places[key] for key in _parts(pair.enrolment, enrolments) if key in places]
    numbers = {name: number for number, name in enumerate(name for name, parts in models.items() if parts)}
    rows = [
        (numbers[pair.enrolment], places[pair.test], pair.same_speaker)
        for pair in pairs
        if pair.enrolment in numbers and pair.test in places
    ]
    enrolment, test, same_speaker = np.array(rows, np.int64).reshape(-1, 3).T
    for kind, there in (("of one speaker", same_speaker.any()), ("of different speakers", not same_speaker.all())):
        if not there:
            left_out = " whose recordings can be used" if store.problems else ""
            raise ValueError(f"{file} has no pairs {kind}{left_out}, and an error rate needs some of either kind.")
    parts = [np.array(parts, np.int64) for parts in models.values() if parts]
    return PairSet(store, parts, enrolment, test, same_speaker.astype(bool))
