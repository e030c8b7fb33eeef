"""What makes the lists or recordings of a run unusable, said before anything trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from raysv.corpus.pairlists import PairList
from raysv.corpus.store import WaveformStore
from raysv.corpus.utterances import Utterance, lies_below

SHOWN = 20  # recordings that a message names; the others are counted


def refuse_unknown(listed: PairList) -> None:
    """Refuse pairs whose recordings are nowhere."""
    unknown = [key for key, path in listed.paths.items() if key not in listed.speakers and not path.is_file()]
    if unknown:
        raise ValueError(
            f"{listed.file} names {len(unknown)} recordings that no manifest lists and that are no files, first "
            f"{unknown[0]!r} at {listed.paths[unknown[0]]}. Mend the list, or name the one that knows them among the "
            "utterances or enrolments."
        )


def refuse_leak(listed: PairList, where: str, seen: Sequence[Utterance]) -> None:
    """Refuse pairs with recordings or speakers seen elsewhere: in training, in choosing a configuration or a cohort."""
    seen_speakers = {spoken.speaker for spoken in seen}
    seen_keys, seen_paths = {spoken.key for spoken in seen}, {spoken.path for spoken in seen}
    leaks = set()
    for key, path in listed.paths.items():
        if key in seen_keys or path in seen_paths:
            leaks.add(key)
        elif key in listed.speakers:
            leaks |= {listed.speakers[key]} & seen_speakers
        else:  # no manifest says who speaks, but many corpora have a folder per speaker
            leaks |= set(Path(key).parts[:-1]) & seen_speakers
    if leaks:
        shown = ", ".join(sorted(leaks)[:10])
        raise ValueError(
            f"{listed.file} and {where} share {len(leaks)} speakers or recordings: {shown}"
            f"{', ...' if len(leaks) > 10 else ''}. Error rates on them would mean nothing: take "
            "them out of one of the two."
        )


def refuse_outside(paths: Iterable[Path], root: Path, remedy: str) -> None:
    """Refuse recordings that a list names outside the folder of the corpus."""
    outside = [path for path in dict.fromkeys(paths) if not lies_below(path, root)]
    if outside:
        raise ValueError(f"Lists name {len(outside)} recordings outside {root}, first {outside[0]}. {remedy}")


def refuse_bad_audio(stores: Mapping[str, WaveformStore], remedy: str) -> None:
    """Refuse recordings that cannot be used, all at once."""
    problems = {path: why for store in stores.values() for path, why in store.problems.items()}
    if problems:
        listed = [f"  {path}: {why}" for path, why in list(problems.items())[:SHOWN]]
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValueError("\n".join([f"{len(problems)} recordings cannot be used:", *listed, *more, remedy]))


def refuse_nothing_left(stores: Mapping[str, WaveformStore]) -> None:
    """Refuse lists of which no recording can be used."""
    for name, store in stores.items():
        if not len(store.usable):
            path, why = next(iter(store.problems.items()))
            raise ValueError(f"None of the {len(store)} recordings of {name} can be used; {path}: {why}.")
