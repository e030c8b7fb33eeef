"""Folders of corpora as lists: who speaks in which file, and what is compared with what.

A layout names utterances the way the corpus's own pair lists do. `complete` gives every speaker to one part only, and
`write_lists` spells the names as paths below the root.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from raysv.corpus.utterances import (
    AUDIO_SUFFIXES,
    Utterance,
    VerificationPair,
    find_audio,
    read_enrolments,
    read_lines,
    read_pairs,
    read_utterances,
    write_enrolments,
    write_pairs,
    write_utterances,
    written,
)

DEV_TARGETS = 45  # target pairs per held-out speaker: all that ten utterances make
DEV_NONTARGETS = 5  # non-target pairs per target pair
TO_WAV = """find FOLDER -name '*.m4a' -exec sh -c 'ffmpeg -i "$1" -ac 1 -ar 16000 "${1%.m4a}.wav"' _ {} \\;"""


@dataclass(frozen=True)
class Lists:
    """What a corpus gives to training (`train`), to the search (`dev`) and to the final figures (`test`)."""

    train: list[Utterance]
    dev: list[Utterance] = field(default_factory=list)
    test: list[Utterance] = field(default_factory=list)
    dev_pairs: list[VerificationPair] = field(default_factory=list)
    test_pairs: dict[str, list[VerificationPair]] = field(default_factory=dict)
    enrolments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was left out and why, in sentences


def voxceleb(folder: Path) -> Lists:
    """VoxCeleb1, VoxCeleb2 or both: `idXXXXX/<video>/<utterance>.wav` (or .flac) at any depth.

    All of it is `train`, with the video as session; keys are spelled as in the published lists, for example
    `id10270/5r0dWxy17C8/00001.wav`, so that `complete` can take the speakers of those lists out.

    Raises: ValueError when a recording is there twice, or only as .m4a, the format VoxCeleb2 is published in.
    """
    found: dict[str, Utterance] = {}
    compressed: dict[str, Path] = {}
    elsewhere = 0
    for path in find_audio(folder, (*AUDIO_SUFFIXES, ".m4a")):
        speaker, video = path.parts[-3:-1]
        key = f"{speaker}/{video}/{path.stem}.wav"
        if not re.fullmatch(r"id\d{5}", speaker):
            elsewhere += 1
        elif path.suffix.lower() == ".m4a":
            compressed[key] = path
        else:
            _add(found, Utterance(key, speaker, path, session=video))
    if unread := [path for key, path in compressed.items() if key not in found]:
        raise ValueError(
            f"{len(unread)} recordings are there only as .m4a, such as {unread[0]}. Convert them: {TO_WAV}"
        )
    _check_found(found, folder, "idXXXXX/<video>/<utterance>")
    notes = [f"{elsewhere} audio files outside idXXXXX/<video>/ were left out."] if elsewhere else []
    return Lists(list(found.values()), notes=notes)


def cnceleb(folder: Path) -> Lists:
    """CN-Celeb1 or CN-Celeb2 as .flac or .wav, or a folder that holds both.

    Training speakers are those of dev/dev.lst, or all below data/ where there are no evaluation lists (CN-Celeb2).
    Utterances are `data/<speaker>/<genre>-<session>-<utterance>.flac`; genre and session together are the session.
    An enrolment is made of the recordings that eval/lists/enroll.map names; without that file it is the joined one of
    enroll.lst. The lists say .wav whatever the release holds, and so do the keys.

    Source: the corpus's lists as wespeaker (examples/cnceleb/v2/local) and Kaldi (egs/cnceleb/v1/local) read them:
    enroll.map `id00800-enroll id00800/singing-01-001.wav ...` (below data/), enroll.lst `id00800-enroll
    enroll/id00800-enroll.wav` and trials.lst `id00800-enroll test/id00800-singing-01-005.wav 1` (below eval/).
    """
    train: list[Utterance] = []
    evaluation = Lists([])
    for part in [folder, *sorted(folder.glob("*"))]:
        if not (part / "data").is_dir():
            continue
        recordings = _cnceleb_data(part)
        if (part / "eval" / "lists").is_dir():
            speakers = {line for _, line in read_lines(part / "dev" / "dev.lst")}
            evaluation = _cnceleb_eval(part, recordings)
            train += [item for item in recordings.values() if item.speaker in speakers]
        else:
            train += recordings.values()
    _check_found(train, folder, "data/<speaker>/<genre>-<session>-<utterance>")
    return dataclasses.replace(evaluation, train=train)


def kaldi(folder: Path) -> Lists:
    """A Kaldi data folder (all of it `train`), or a folder of them: train and, if there, dev and test with `trials`.

    Relative paths in wav.scp start from `folder`.
    """
    if (folder / "wav.scp").is_file():
        return Lists(read_utterances(folder, folder))
    parts = [part for part in ("train", "dev", "test") if (folder / part / "wav.scp").is_file()]
    if "train" not in parts:
        raise ValueError(f"{folder} is no Kaldi data folder: it holds neither wav.scp nor train/wav.scp.")
    utterances = {part: read_utterances(folder / part, folder) for part in parts}
    pairs = {part: read_pairs(folder / part / "trials") for part in parts if (folder / part / "trials").is_file()}
    test_pairs = {"test": pairs["test"]} if "test" in pairs else {}
    dev, test = utterances.get("dev", []), utterances.get("test", [])
    return Lists(utterances["train"], dev, test, pairs.get("dev", []), test_pairs)


def plain(folder: Path) -> Lists:
    """`<speaker>/<anything>.wav` or .flac, all of it `train`; folders between speaker and file are its session."""
    found = []
    elsewhere = 0
    for path in find_audio(folder):
        key = written(path, folder)
        speaker, *session = key.split("/")[:-1] or [""]
        if speaker:
            found.append(Utterance(key, speaker, path, session="/".join(session)))
        else:
            elsewhere += 1
    _check_found(found, folder, "<speaker>/<utterance>")
    notes = [f"{elsewhere} audio files outside the speakers' folders were left out."] if elsewhere else []
    return Lists(found, notes=notes)


def complete(
    lists: Lists,
    more_test_pairs: dict[str, list[VerificationPair]],
    dev_speakers: int,
    min_utterances: int,
    generator: np.random.Generator,
) -> Lists:
    """Lists that a search can use: no speaker of the dev or test part in training, and pairs for the dev part.

    Args:
        more_test_pairs: test lists by name, beside those of the corpus; their utterances become `test`.
        dev_speakers: training speakers to hold out for dev pairs where the corpus brings no dev part.
        min_utterances: training speakers with fewer are left out.

    Raises: ValueError when pairs name utterances that the corpus lacks, or when too few speakers are left.
    """
    test_pairs = lists.test_pairs | more_test_pairs
    known: dict[str, Utterance] = {}
    for item in [*lists.train, *lists.dev, *lists.test]:
        _add(known, item)
    test = {item.key: item for item in lists.test}
    for name, pairs in test_pairs.items():
        test |= {key: known[key] for key in _compared(f"test pairs {name}", pairs, lists.enrolments, known)}
    _compared("dev pairs", lists.dev_pairs, lists.enrolments, known)

    notes = list(lists.notes)
    train, out = _without({item.speaker for item in [*test.values(), *lists.dev]}, lists.train)
    if out:
        notes.append(f"{_count(out)} left out of training: these speakers are in the dev or test part.")
    counts = Counter(item.speaker for item in train)
    train, out = _without({speaker for speaker, count in counts.items() if count < min_utterances}, train)
    if out:
        notes.append(f"{_count(out)} left out of training: fewer than {min_utterances} utterances of a speaker.")
    dev = lists.dev
    if not dev:
        train, dev = hold_out(train, dev_speakers, generator)
        notes.append(f"{_count(dev)} held out of training for the dev pairs.")
    dev_pairs = lists.dev_pairs or make_pairs(dev, DEV_TARGETS, DEV_NONTARGETS, generator)
    return Lists(train, dev, list(test.values()), dev_pairs, test_pairs, lists.enrolments, notes)


def hold_out(
    utterances: list[Utterance], speakers: int, generator: np.random.Generator
) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances without some randomly chosen speakers, and those of the chosen ones.

    Only speakers of two or more utterances are chosen: the others make no target pair.
    """
    counts = Counter(item.speaker for item in utterances)
    eligible = sorted(speaker for speaker, count in counts.items() if count > 1)
    if not 2 <= speakers <= min(len(eligible), len(counts) - 2):
        raise ValueError(
            f"Cannot hold out {speakers} of {len(counts)} training speakers for the dev pairs: it takes two or more "
            f"with at least two utterances each (there are {len(eligible)}), and two must stay. Change --dev-speakers."
        )
    chosen = {eligible[index] for index in generator.choice(len(eligible), speakers, replace=False)}
    return _without(chosen, utterances)


def make_pairs(
    utterances: list[Utterance], targets_per_speaker: int, nontargets_per_target: int, generator: np.random.Generator
) -> list[VerificationPair]:
    """Random pairs, none of them twice (nor turned round); fewer than asked for only where there are no more.

    The target pairs of a speaker with several sessions are across sessions. A non-target pair keeps the enrolment of
    a target pair, so that both kinds have the same enrolments.
    """
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for item in utterances:
        by_speaker[item.speaker].append(item)
    targets = [
        pair for own in by_speaker.values() for pair in islice(_target_pairs(own, generator), targets_per_speaker)
    ]
    if not targets or len(by_speaker) < 2:
        raise ValueError("Pairs need two speakers, and two utterances of one of them.")
    pairs = []
    taken: set[frozenset[str]] = set()
    for enrolment, test in targets:
        pairs.append(VerificationPair(enrolment.key, test.key, True))
        order = (utterances[index] for index in generator.permutation(len(utterances)))
        fresh = (
            other.key
            for other in order
            if other.speaker != enrolment.speaker and frozenset((enrolment.key, other.key)) not in taken
        )
        for key in islice(fresh, nontargets_per_target):
            taken.add(frozenset((enrolment.key, key)))
            pairs.append(VerificationPair(enrolment.key, key, False))
    return pairs


def with_durations(lists: Lists) -> Lists:
    """The lists with `duration_s` of every utterance, from the header of its file."""
    with ThreadPoolExecutor() as pool:  # waiting for a file server is most of the work
        train, dev, test = (list(pool.map(_with_duration, part)) for part in (lists.train, lists.dev, lists.test))
    return dataclasses.replace(lists, train=train, dev=dev, test=test)


def write_lists(lists: Lists, output: Path, root: Path) -> dict[str, Any]:
    """Write every list that is not empty; return the `data:` section of a configuration that reads them.

    Args:
        output: folder for train.csv, dev.csv, dev_pairs.txt, test.csv, test_pairs.txt (or, where there are several,
            test_<name>.txt) and enrolments.txt.
        root: folder of the corpus; paths below it are written relative to it.
    """
    output.mkdir(parents=True, exist_ok=True)
    names = {item.key: written(item.path, root) for item in [*lists.train, *lists.dev, *lists.test]}

    def place(file: str) -> str:
        return written(Path(os.path.abspath(output / file)), root)

    def spelled(pairs: list[VerificationPair]) -> Iterator[VerificationPair]:
        for pair in pairs:
            enrolment = pair.enrolment if pair.enrolment in lists.enrolments else names[pair.enrolment]
            yield VerificationPair(enrolment, names[pair.test], pair.same_speaker)

    manifests = {"train.csv": lists.train, "dev.csv": lists.dev, "test.csv": lists.test}
    manifests = {file: utterances for file, utterances in manifests.items() if utterances}
    for file, utterances in manifests.items():
        write_utterances(utterances, output / file, root)
    write_pairs(spelled(lists.dev_pairs), output / "dev_pairs.txt")
    tests = {name: f"test_{name}.txt" if len(lists.test_pairs) > 1 else "test_pairs.txt" for name in lists.test_pairs}
    for name, file in tests.items():
        write_pairs(spelled(lists.test_pairs[name]), output / file)
    data: dict[str, Any] = {"root": os.path.abspath(root), "train": place("train.csv")}
    data["dev_pairs"] = place("dev_pairs.txt")
    data["test_pairs"] = {name: place(file) for name, file in tests.items()}
    data["utterances"] = [place(file) for file in manifests if file != "train.csv"]
    if lists.enrolments:
        models = {model: tuple(names[key] for key in keys) for model, keys in lists.enrolments.items()}
        write_enrolments(models, output / "enrolments.txt")
        data["enrolments"] = [place("enrolments.txt")]
    return data


def _cnceleb_data(part: Path) -> dict[str, Utterance]:
    found: dict[str, Utterance] = {}
    for path in find_audio(part / "data"):
        speaker = path.parent.name
        _add(found, Utterance(f"{speaker}/{path.stem}.wav", speaker, path, session=path.stem.rpartition("-")[0]))
    return found


def _cnceleb_eval(part: Path, recordings: dict[str, Utterance]) -> Lists:
    known = dict(recordings)
    for path in find_audio(part / "eval"):
        speaker, _, rest = path.stem.partition("-")
        _add(known, Utterance(f"{path.parent.name}/{path.stem}.wav", speaker, path, session=rest.rpartition("-")[0]))
    lists = part / "eval" / "lists"
    source = lists / "enroll.map" if (lists / "enroll.map").is_file() else lists / "enroll.lst"
    enrolments = {model: tuple(map(_as_wav, keys)) for model, keys in read_enrolments(source).items()}
    pairs = [dataclasses.replace(pair, test=_as_wav(pair.test)) for pair in read_pairs(lists / "trials.lst")]
    test = [known[key] for key in _compared(str(lists), pairs, enrolments, known)]
    return Lists([], test=test, test_pairs={"cnceleb": pairs}, enrolments=enrolments)


def _as_wav(name: str) -> str:
    return name.rpartition(".")[0] + ".wav"


def _add(found: dict[str, Utterance], item: Utterance) -> None:
    if found.setdefault(item.key, item).path != item.path:
        raise ValueError(f"{item.key} is there twice: {found[item.key].path} and {item.path}. Remove one of the two.")


def _check_found(found: Collection[Any], folder: Path, pattern: str) -> None:
    if not found:
        raise ValueError(f"No .flac or .wav of the form {pattern} below {folder}.")


def _compared(
    what: str, pairs: list[VerificationPair], enrolments: dict[str, tuple[str, ...]], known: dict[str, Utterance]
) -> list[str]:
    """Keys of all utterances that pairs compare, once each, in order of appearance."""
    keys: dict[str, None] = {}
    for pair in pairs:
        keys |= dict.fromkeys((*enrolments.get(pair.enrolment, (pair.enrolment,)), pair.test))
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"{what}: {len(unknown)} of {len(keys)} utterances are not in the corpus, such as {unknown[0]}; "
            f"names there look like {next(iter(known), 'nothing')}."
        )
    return list(keys)


def _without(speakers: set[str], utterances: list[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances of all others, and those of the speakers."""
    others = [item for item in utterances if item.speaker not in speakers]
    return others, [item for item in utterances if item.speaker in speakers]


def _count(utterances: list[Utterance]) -> str:
    return f"{len({item.speaker for item in utterances})} speakers ({len(utterances)} utterances)"


def _target_pairs(own: list[Utterance], generator: np.random.Generator) -> Iterator[tuple[Utterance, Utterance]]:
    """A speaker's pairs in an order that uses every utterance before any of them comes a third time."""
    several = len({item.session for item in own}) > 1
    shuffled = [own[index] for index in generator.permutation(len(own))]
    for step in range(1, len(own)):
        for first, second in zip(shuffled, shuffled[step:], strict=False):
            if not several or first.session != second.session:
                yield first, second


def _with_duration(item: Utterance) -> Utterance:
    try:
        return dataclasses.replace(item, duration_s=soundfile.info(item.path).duration)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"{item.path} cannot be read: {error}") from error
