"""Everything a run reads, found, checked and decoded before anything trains."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from raysv.config import SYNTHETIC, AugmentConfig, DataConfig
from raysv.corpus.cache import alone, cache_folder
from raysv.corpus.checks import refuse_bad_audio, refuse_leak, refuse_nothing_left, refuse_outside, refuse_unknown
from raysv.corpus.groups import Groups
from raysv.corpus.kept import keep, kept_folder, open_kept
from raysv.corpus.pairlists import PairList, pair_set, read_pair_list
from raysv.corpus.sets import DEV, TRAIN, Corpus, PairSet, TrainingSet, digest, part_names
from raysv.corpus.store import Progress, WaveformStore, open_store
from raysv.corpus.synthetic import corpus_folder
from raysv.corpus.utterances import PairColumns, Utterance, read_clips, read_enrolments, read_utterances


def load_corpus(
    data: DataConfig, augment: AugmentConfig, *, tests: bool = False, progress: Progress | None = None
) -> Corpus:
    """Read, check and decode what the configuration names, and keep the outcome on this node for `open_corpus`.

    Args:
        tests: whether to decode the test lists too; that their recordings exist and their speakers are not in training
            is checked either way.
        progress: called while recordings are decoded.

    Raises: ValueError when a list, a recording or a noise folder is not as it must be; all bad recordings at once.
        OSError when the cache cannot be written.
    """
    cache = cache_folder(data)
    train, lists, recordings = _find(data, augment, tests)
    stores = {name: open_store(paths, cache, progress) for name, paths in recordings.items()}
    if data.skip_bad_audio:
        refuse_nothing_left(stores)
    else:
        refuse_bad_audio(stores, "Mend or remove them, or leave them out with --skip-bad-audio.")

    training = _training_set(train, stores[TRAIN])
    pair_sets = {f"{name} pairs": pair_set(listed, stores[f"{name} pairs"]) for name, listed in lists.items()}
    corpus = Corpus(
        train=training,
        dev=pair_sets[DEV],
        tests={name: pair_sets[f"{name} pairs"] for name in lists if name != "dev"},
        clips={kind: stores[f"{kind} clips"] for kind in _clip_kinds(data, augment)},
        left_out={path: why for store in stores.values() for path, why in store.problems.items()},
        digests={name: digest(part) for name, part in (stores | pair_sets | {TRAIN: training}).items()},
    )
    return keep(corpus, cache)


def find_recordings(data: DataConfig, augment: AugmentConfig) -> list[list[Path]]:
    """What a search would have decoded, a list for each store: all lists are read and checked, no recording is opened.

    Raises: see `load_corpus`.
    """
    return list(_find(data, augment, tests=False)[2].values())


def open_corpus(data: DataConfig, augment: AugmentConfig, checked: Mapping[str, str], *, tests: bool = False) -> Corpus:
    """A corpus that was checked before, as it was then, without a look at its lists or audio.

    A node that does not have it loads it first; of several processes that ask for it there, one does.

    Args:
        checked: the `digests` of what `load_corpus` found, here or on another node; it may hold more parts than asked
            for.

    Raises: see `load_corpus`; ValueError also when this node has other lists or audio than were checked.
    """
    cache = cache_folder(data)
    wanted = part_names(data.test_pairs if tests else (), _clip_kinds(data, augment))
    digests = {name: checked.get(name, "") for name in wanted}
    if kept := open_kept(digests, cache):
        return kept
    with alone(kept_folder(digests, cache), "-load"):
        corpus = open_kept(digests, cache) or load_corpus(data, augment, tests=tests)
    if differing := [name for name, told in digests.items() if told and told != corpus.digests[name]]:
        raise ValueError(
            f"On {socket.gethostname()}, {' and '.join(differing)} below {data.root} differ from what was checked when "
            "the study started. Give all nodes the same lists and recordings."
        )
    return corpus


def load_pairs(
    pairs: Path,
    root: Path,
    cache: Path,
    utterances: Sequence[str] = (),
    enrolments: Sequence[str] = (),
    *,
    apart: Mapping[str, Sequence[Utterance]] | None = None,
    outside_root: bool = False,
) -> tuple[PairSet, PairColumns]:
    """A pair list of its own, as indices and as it names them.

    Args:
        root: folder that recordings and lists are relative to.
        utterances: manifests or Kaldi folders with the recordings that pairs name otherwise than by their path.
        enrolments: lists of enrolments made of several recordings.
        apart: utterances, by what a message calls them, whose recordings and speakers must not be among the pairs'.
        outside_root: whether recordings may lie elsewhere than below the root.

    Raises: ValueError when a recording is missing, cannot be used or must not be there, OSError when the cache cannot
        be written.
    """
    listed = read_pair_list(pairs, root, _read_known(utterances, root), _read_models(enrolments, root))
    if not outside_root:
        refuse_outside(listed.paths.values(), root, "Mend the list or --root; --outside-root allows it.")
    refuse_unknown(listed)
    for where, seen in (apart or {}).items():
        refuse_leak(listed, where, seen)
    store = open_store(list(listed.paths.values()), cache)
    refuse_bad_audio({"pairs": store}, "Mend them, or take their pairs out of the list.")
    return pair_set(listed, store), listed.pairs


def _find(
    data: DataConfig, augment: AugmentConfig, tests: bool
) -> tuple[list[Utterance], dict[str, PairList], dict[str, list[Path]]]:
    """The training list, the pair lists that are wanted, and the recordings of every part by its name."""
    if "dev" in data.test_pairs:
        raise ValueError("data.test_pairs has a list named dev, which is the name of data.dev_pairs. Rename it.")
    root = _root(data)
    train, lists = _read_lists(data, root)
    wanted = {name: lists[name] for name in ("dev", *(data.test_pairs if tests else ()))}
    recordings = {TRAIN: [spoken.path for spoken in train]}
    recordings |= {f"{name} pairs": list(listed.paths.values()) for name, listed in wanted.items()}
    recordings |= {f"{kind} clips": _clip_paths(data, kind, root) for kind in _clip_kinds(data, augment)}
    return train, wanted, recordings


def _root(data: DataConfig) -> Path:
    if data.root == SYNTHETIC:
        return corpus_folder(cache_folder(data))
    root = Path(data.root).expanduser().absolute()
    if not root.is_dir():
        raise ValueError(f"data.root is {data.root}, which is no folder. Give the folder that holds your corpus.")
    return root


def _read_lists(data: DataConfig, root: Path) -> tuple[list[Utterance], dict[str, PairList]]:
    """The training list, and the pair lists by name; nobody is in two of training, dev and test."""
    train = read_utterances(root / data.train, root)
    known, enrolments = _read_known(data.utterances, root), _read_models(data.enrolments, root)
    files = {"dev": data.dev_pairs, **data.test_pairs}
    lists = {name: read_pair_list(root / file, root, known, enrolments) for name, file in files.items()}
    if not data.outside_root:  # before any of them is looked at
        named = chain((spoken.path for spoken in train), *(listed.paths.values() for listed in lists.values()))
        refuse_outside(named, root, "Mend the lists or data.root; data.outside_root: true allows it.")
    for listed in lists.values():
        refuse_unknown(listed)
        refuse_leak(listed, "the training list", train)
    chosen_on = [known.get(key, Utterance(key, "", path)) for key, path in lists["dev"].paths.items()]
    for name in data.test_pairs:
        refuse_leak(lists[name], "the dev pairs", chosen_on)
    return train, lists


def _read_known(lists: Sequence[str], root: Path) -> dict[str, Utterance]:
    """The recordings of several lists by the names that pairs call them."""
    known: dict[str, Utterance] = {}
    for name in lists:
        for spoken in read_utterances(root / name, root):
            before = known.setdefault(spoken.key, spoken)
            if (before.path, before.speaker) != (spoken.path, spoken.speaker):
                raise ValueError(f"{root / name} gives {spoken.key} another recording or speaker than an earlier list.")
    return known


def _read_models(lists: Sequence[str], root: Path) -> dict[str, tuple[str, ...]]:
    """The enrolments of several recordings that several lists hold."""
    models: dict[str, tuple[str, ...]] = {}
    for name in lists:
        for model, keys in read_enrolments(root / name).items():
            if models.setdefault(model, keys) != keys:
                raise ValueError(f"{root / name} makes the enrolment {model} of others than an earlier list.")
    return models


def _clip_kinds(data: DataConfig, augment: AugmentConfig) -> list[str]:
    """The kinds of augmentation that take clips; without clips of its own, babble is made of the training speakers."""
    kinds = augment.kinds if augment.strength > 0 else []
    return [kind for kind in kinds if kind != "babble" or data.babble]


def _clip_paths(data: DataConfig, kind: str, root: Path) -> list[Path]:
    key = "rir" if kind == "reverb" else kind
    source = getattr(data, key)
    if not source:
        raise ValueError(
            f"augment.kinds asks for {kind}, but data.{key} is empty. Set data.{key} to a folder or a CSV of clips, or "
            f"leave {kind} out of augment.kinds."
        )
    clips = read_clips(root / source, key, root)
    if (root / source).is_file() and not data.outside_root:
        refuse_outside(clips, root, f"Mend data.{key} or data.root; data.outside_root: true allows it.")
    return clips


def _training_set(train: Sequence[Utterance], store: WaveformStore) -> TrainingSet:
    spoken = [train[index].speaker for index in store.usable]
    speakers = sorted(set(spoken))
    classes = {speaker: label for label, speaker in enumerate(speakers)}
    labels = np.array([classes[speaker] for speaker in spoken])
    return TrainingSet(store, store.usable, labels, speakers, Groups.by_label(labels, len(speakers)))
