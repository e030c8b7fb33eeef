"""A pair list and what its names stand for: recordings, and who speaks in them as far as it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from raysv.corpus.groups import Groups, Indices, connected
from raysv.corpus.sets import PairSet
from raysv.corpus.store import WaveformStore
from raysv.corpus.utterances import PairColumns, Utterance, read_pair_columns


@dataclass(frozen=True)
class PairList:
    """The pairs of a file.

    Attributes:
        models: for each enrolment by name, the recordings it is made of: usually the one it is named after.
        paths: each recording that pairs and enrolments name, once, and where it is.
        speakers: of the recordings that a manifest lists.
    """

    file: Path
    pairs: PairColumns
    models: dict[str, tuple[str, ...]]
    paths: dict[str, Path]
    speakers: dict[str, str]


def read_pair_list(
    file: Path, root: Path, known: Mapping[str, Utterance], enrolments: Mapping[str, tuple[str, ...]]
) -> PairList:
    """The pairs of a file; recordings are where a manifest says, otherwise below the root.

    Args:
        known: the recordings of all manifests.
        enrolments: the recordings of each enrolment that has several.
    """
    pairs = read_pair_columns(file)
    enrolled, tested = ([pairs.names[name] for name in np.unique(column)] for column in (pairs.enrolment, pairs.test))
    models = {name: enrolments.get(name, (name,)) for name in enrolled}
    keys = dict.fromkeys(chain(chain.from_iterable(models.values()), tested))
    paths = {key: known[key].path if key in known else root / key for key in keys}
    return PairList(file, pairs, models, paths, {key: known[key].speaker for key in keys if key in known})


def pair_set(listed: PairList, store: WaveformStore) -> PairSet:
    """The pairs as indices into a store of their recordings; pairs of a recording that cannot be used are left out.

    Raises: ValueError when no pair of one speaker is left, or none of different speakers.
    """
    usable = store.lengths > 0
    places = {key: index for index, key in enumerate(listed.paths) if usable[index]}
    models = {name: [places[key] for key in keys if key in places] for name, keys in listed.models.items()}
    models = {name: recordings for name, recordings in models.items() if recordings}
    numbers = {name: number for number, name in enumerate(models)}
    enrolment = _looked_up(numbers, listed.pairs.names)[listed.pairs.enrolment]
    test = _looked_up(places, listed.pairs.names)[listed.pairs.test]
    whole = (enrolment >= 0) & (test >= 0)
    enrolment, test, same_speaker = enrolment[whole], test[whole], listed.pairs.same_speaker[whole]
    for kind, there in (("of one speaker", same_speaker.any()), ("of different speakers", not same_speaker.all())):
        if not there:
            left_out = " whose recordings can be used" if store.problems else ""
            raise ValueError(
                f"{listed.file} has no pairs {kind}{left_out}, and an error rate needs some of either kind."
            )
    groups = Groups.of(models.values())
    speakers = _speakers(listed, groups, enrolment[same_speaker], test[same_speaker])
    return PairSet(store, groups, enrolment, test, same_speaker, speakers)


def _looked_up(indices: Mapping[str, int], names: Sequence[str]) -> Indices:
    """The index of each name, −1 for one without."""
    return np.array([indices.get(name, -1) for name in names], np.int64)


def _speakers(listed: PairList, models: Groups, enrolment: Indices, test: Indices) -> Indices:
    """A number for the speaker of each recording, see `PairSet.speakers`.

    Args:
        enrolment, test: `(targets,)` of the pairs of one speaker.
    """
    first: dict[str, int] = {}  # recording of each speaker
    by_manifest = [
        (first.setdefault(listed.speakers[key], index), index)
        for index, key in enumerate(listed.paths)
        if key in listed.speakers
    ]
    heads = models.members[models.starts[:-1]]  # one recording stands for each enrolment
    links = np.concatenate(
        [
            np.array(by_manifest, np.int64).reshape(-1, 2).T,
            np.stack([np.repeat(heads, models.sizes), models.members]),
            np.stack([heads[enrolment], test]),
        ],
        axis=1,
    )
    return connected(len(listed.paths), *links)
