"""Utterances, pairs and enrolments, and the lists that hold them.

Lists are plain text that other toolkits read too: CSV or Kaldi data folders for utterances, the pair lists of VoxCeleb,
Kaldi and CN-Celeb. Each is checked when it is read; whether the audio is there is found out by whoever reads audio.
"""

from __future__ import annotations

import csv
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

AUDIO_SUFFIXES = (".flac", ".wav")
_MUSAN = {"noise": "noise", "music": "music", "babble": "speech"}  # kind of clip: folder below a MUSAN root


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one speaker.

    `key` is the name by which pair lists refer to it (CSV: the path as written; Kaldi: the utterance id); `path` is
    absolute; `session` is empty and `duration_s` None where unknown.
    """

    key: str
    speaker: str
    path: Path
    session: str = ""
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class VerificationPair:
    """A question put to the encoder: does `test` hold the speaker of `enrolment`? Both are keys, see `Utterance`."""

    enrolment: str
    test: str
    same_speaker: bool


def read_utterances(path: Path, root: Path) -> list[Utterance]:
    """The utterances of a list, in its order.

    Args:
        path: CSV with the columns `speaker,path` and, if known, `duration_s` and `session` (others are ignored), or a
            Kaldi data folder: wav.scp, utt2spk and, if there, utt2dur.
        root: folder that relative audio paths start from.

    Raises: ValueError naming file and line for a list that is missing, empty, incomplete or names an utterance twice.
    """
    start = Path(os.path.abspath(root))
    utterances = _read_kaldi(path, start) if path.is_dir() else _read_csv(path, start)
    if not utterances:
        raise ValueError(f"{path} holds no utterances.")
    return utterances


def write_utterances(utterances: Iterable[Utterance], path: Path, root: Path) -> None:
    """Write utterances as CSV; reading it again with the same root gives keys as `written` spells them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["speaker", "path", "duration_s", "session"])
        for item in utterances:
            rows.writerow([item.speaker, written(item.path, root), item.duration_s, item.session])


def written(path: Path, root: Path) -> str:
    """How a list spells an audio path: relative to `root` where it lies below, otherwise absolute."""
    text, prefix = path.as_posix(), Path(os.path.abspath(root)).as_posix().rstrip("/") + "/"
    return text.removeprefix(prefix)


def lies_below(path: Path, root: Path) -> bool:
    """Whether a path leads to something below a folder as it is spelled; links are not looked at."""
    return os.path.abspath(path).startswith(os.path.abspath(root).rstrip("/") + "/")


class _Form(NamedTuple):
    """A way to write pairs: in which of three columns is what, and what the labels mean."""

    example: str
    label: int
    enrolment: int
    test: int
    labels: dict[str, bool]


_FORMS = (
    _Form("1|0 enrolment test", 0, 1, 2, {"1": True, "0": False}),  # VoxCeleb
    _Form("enrolment test target|nontarget", 2, 0, 1, {"target": True, "nontarget": False}),  # Kaldi
    _Form("enrolment test 1|0", 2, 0, 1, {"1": True, "0": False}),  # CN-Celeb
)


class PairColumns(NamedTuple):
    """The pairs of a list in columns: lists of millions of pairs name few recordings.

    Attributes:
        names: of enrolments and recordings, each once.
        enrolment, test: `(pairs,)` indices into `names`.
        same_speaker: `(pairs,)` bool.
    """

    names: list[str]
    enrolment: npt.NDArray[np.int32]
    test: npt.NDArray[np.int32]
    same_speaker: npt.NDArray[np.bool_]


def read_pairs(path: Path) -> list[VerificationPair]:
    """The verification pairs of a list in the form of VoxCeleb, Kaldi or CN-Celeb, recognised from its first lines.

    Raises: ValueError naming file and line where a line has another form, or when the whole list fits two forms.
    """
    columns = read_pair_columns(path)
    rows = zip(*(column.tolist() for column in columns[1:]), strict=True)
    return [VerificationPair(columns.names[enrolment], columns.names[test], same) for enrolment, test, same in rows]


def read_pair_columns(path: Path) -> PairColumns:
    """The same as `read_pairs`, in little memory."""
    form = _recognise(path)
    places: dict[str, int] = {}
    enrolment, test, same_speaker = array("i"), array("i"), array("b")
    for number, line in read_lines(path):
        fields = line.split()
        same = form.labels.get(fields[form.label]) if len(fields) == 3 else None
        if same is None:
            raise ValueError(f"{path}:{number}: expected `{form.example}` as in the lines above, got {line!r}.")
        enrolment.append(places.setdefault(fields[form.enrolment], len(places)))
        test.append(places.setdefault(fields[form.test], len(places)))
        same_speaker.append(same)
    columns = np.array(enrolment, np.int32), np.array(test, np.int32), np.array(same_speaker, bool)
    return PairColumns(list(places), *columns)


def write_pairs(pairs: Iterable[VerificationPair], path: Path) -> None:
    """Write pairs in the form of VoxCeleb: `1 enrolment test`."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            file.write(f"{pair.same_speaker:d} {_one_word(pair.enrolment, path)} {_one_word(pair.test, path)}\n")


def read_enrolments(path: Path) -> dict[str, tuple[str, ...]]:
    """Enrolments made of several recordings: `model utterance [utterance ...]` per line."""
    enrolments = {}
    for model, (number, rest) in _table(path).items():
        if not rest:
            raise ValueError(f"{path}:{number}: enrolment {model} names no utterance.")
        enrolments[model] = tuple(rest.split())
    if not enrolments:
        raise ValueError(f"{path} holds no enrolments.")
    return enrolments


def write_enrolments(enrolments: dict[str, tuple[str, ...]], path: Path) -> None:
    """Write enrolments as `read_enrolments` reads them."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for model, keys in enrolments.items():
            file.write(" ".join(_one_word(name, path) for name in (model, *keys)) + "\n")


def read_clips(path: Path, kind: str, root: Path) -> list[Path]:
    """The recordings to augment with.

    Args:
        path: a folder (every .wav and .flac below it), a MUSAN folder (the part that suits the kind), or CSV
            `path[,split]`, of which rows with split `train` or none count.
        kind: noise, music, babble or rir; errors name the key `data.<kind>`.
        root: folder that relative paths in a CSV start from.

    Raises: ValueError when there is nothing to find.
    """
    if path.is_file():
        start = Path(os.path.abspath(root))
        rows = _rows(path, ("path",))
        clips = [start / row["path"] for _, row in rows if (row.get("split") or "train") == "train"]
        missing = f"data.{kind}: {path} has no rows whose split is train or empty."
    elif path.is_dir():
        folder = path
        if all((folder / part).is_dir() for part in _MUSAN.values()):
            if kind not in _MUSAN:
                raise ValueError(f"data.{kind}: {path} is a MUSAN folder, which has no clips of this kind.")
            folder = path / _MUSAN[kind]
        clips = find_audio(folder)
        missing = f"data.{kind}: no .wav or .flac below {folder}."
    else:
        raise ValueError(f"data.{kind}: no file or folder {path}. Correct the path, or leave data.{kind} empty.")
    if not clips:
        raise ValueError(missing)
    return clips


def find_audio(folder: Path, suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[Path]:
    """Absolute paths of the audio files below a folder, sorted.

    Links are followed. Hidden files are left out: in archives made on a Mac they are no audio whatever their name.
    """
    found = [
        os.path.join(at, name)
        for at, _, names in os.walk(os.path.abspath(folder), followlinks=True)
        for name in names
        if name.lower().endswith(suffixes) and not name.startswith(".")
    ]
    return [Path(name) for name in sorted(found)]


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and text of the lines of a UTF-8 file that are not blank.

    Raises: ValueError when there is no such file, or when it is not text.
    """
    _check_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_csv(path: Path, root: Path) -> list[Utterance]:
    lines: dict[str, int] = {}
    utterances = []
    for number, row in _rows(path, ("speaker", "path")):
        key = row["path"]
        if key in lines:
            raise ValueError(f"{path}:{number}: {key} was already listed in line {lines[key]}. Remove one of the two.")
        lines[key] = number
        duration_s = _duration(row.get("duration_s"), f"{path}:{number}")
        utterances.append(Utterance(key, row["speaker"], root / key, row.get("session") or "", duration_s))
    return utterances


def _read_kaldi(folder: Path, root: Path) -> list[Utterance]:
    if (folder / "segments").exists():
        raise ValueError(f"{folder / 'segments'}: segments are not supported. Cut the recordings into files first.")
    recordings, speakers = _table(folder / "wav.scp"), _table(folder / "utt2spk")
    durations = _table(folder / "utt2dur") if (folder / "utt2dur").exists() else {}
    utterances = []
    for key, (number, name) in recordings.items():
        where = f"{folder / 'wav.scp'}:{number}"
        if not name or name.endswith("|") or ".ark:" in name:
            raise ValueError(
                f"{where}: expected an audio file, got {name!r}. Commands and archives are not run or opened: "
                "write their output to .wav or .flac files and list those."
            )
        _, speaker = speakers.get(key, (0, ""))
        if not speaker:
            raise ValueError(f"{where}: {folder / 'utt2spk'} gives no speaker for {key}.")
        line, seconds = durations.get(key, (0, None))
        duration_s = _duration(seconds, f"{folder / 'utt2dur'}:{line}")
        utterances.append(Utterance(key, speaker, root / name, duration_s=duration_s))
    return utterances


def _recognise(path: Path) -> _Form:
    """The only form that fits the first lines of a list, read as far as it takes to be sure."""
    forms = list(_FORMS)
    for number, line in read_lines(path):
        fields = line.split()
        forms = [form for form in forms if len(fields) == 3 and fields[form.label] in form.labels]
        if len(forms) == 1:
            return forms[0]
        if not forms:
            known = ", ".join(f"`{form.example}`" for form in _FORMS)
            raise ValueError(f"{path}:{number}: {line!r} is in none of the forms {known}.")
    if len(forms) == len(_FORMS):
        raise ValueError(f"{path} holds no pairs.")
    raise ValueError(
        f"{path} fits the forms {' and '.join(f'`{form.example}`' for form in forms)}: "
        "its names look like labels. Write target or nontarget in the last column instead of 1 and 0."
    )


def _table(path: Path) -> dict[str, tuple[int, str]]:
    """Lines `key rest` as key: (line number, rest)."""
    table: dict[str, tuple[int, str]] = {}
    for number, line in read_lines(path):
        key, *rest = line.split(maxsplit=1)
        if key in table:
            raise ValueError(
                f"{path}:{number}: {key} was already listed in line {table[key][0]}. Remove one of the two."
            )
        table[key] = (number, rest[0] if rest else "")
    return table


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbers and columns of the rows of a CSV file, whose needed columns are all filled."""
    _check_file(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if lacking := [name for name in needed if name not in (reader.fieldnames or [])]:
                found = ", ".join(reader.fieldnames or []) or "nothing"
                raise ValueError(f"{path}:1: the header lacks {', '.join(lacking)}; it has: {found}.")
            for row in reader:
                if empty := [name for name in needed if not row[name]]:
                    raise ValueError(f"{path}:{reader.line_num}: {', '.join(empty)} is empty.")
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV in UTF-8: {error}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"No list {path}. Correct the path, or write lists with `python -m raysv.prepare`.")


def _duration(text: str | None, where: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{where}: a duration must be a positive number of seconds, got {text!r}.")
    return seconds


def _one_word(name: str, path: Path) -> str:
    if len(name.split()) != 1:
        raise ValueError(f"{path} cannot hold {name!r}: names in pair and enrolment lists have no spaces. Rename it.")
    return name
