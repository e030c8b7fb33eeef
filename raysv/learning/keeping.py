"""Where the checkpoints of a run are kept: each of them whole or not at all, and known to be whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from raysv.learning.checkpoint import load_training_state, read_history

SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
DAMAGED = ".damaged"


def keep_checkpoint(folder: Path, kept: Path) -> Path:
    """Copy a checkpoint to where those of its run are kept; the one before stays, and that of the lowest dev EER.

    It is copied aside, with a checksum for each file, and moved into place when all of it has reached the disk. Only
    then are others removed, so that at every moment a whole one is there.

    Args:
        kept: the run's own folder; made if need be.

    Returns: where it lies now, `kept/epoch-NNNN`.
    Raises: OSError when it cannot be written; what was kept before is as it was.
    """
    history = read_history(folder)
    target = epoch_folder(kept, len(history))
    if folder == target:
        return target  # what a finished run was resumed from
    aside = target.with_suffix(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        _copy(folder, aside)
        aside.rename(target)
        _reach_disk(kept)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not target.is_dir():  # if it is: another process, orphaned by a kill, trained the same epoch of the same run
            raise OSError(
                error.errno,
                f"The checkpoint of epoch {len(history)} cannot be kept in {kept}: {error.strerror or error}. The one "
                "before is intact. Make room there, and go on.",
            ) from error
    best = min(history, key=lambda metrics: metrics["dev/eer"])
    stay = {target, epoch_folder(kept, len(history) - 1), epoch_folder(kept, best["epoch"])}
    for other in kept.glob("epoch-*"):
        # of a later epoch are those of a process that took this one's place; what is damaged is left to be looked at
        if other.name < target.name and other not in stay and other.suffix != DAMAGED:
            shutil.rmtree(other, ignore_errors=True)
    return target


def epoch_folder(kept: Path, epoch: float) -> Path:
    """Where the checkpoint of an epoch is kept."""
    return kept / f"epoch-{epoch:04.0f}"


def latest_checkpoint(kept: Path) -> Path | None:
    """The checkpoint of the last epoch that `keep_checkpoint` put there, whole or damaged since."""
    return max((folder for folder in kept.glob("epoch-*") if not folder.suffix), default=None)


def newest_intact(kept: Path) -> tuple[Path | None, str]:
    """The checkpoint of the last epoch that is as it was written; newer ones are put aside.

    Returns: it, None where there is none, and a sentence on what was found damaged, empty if nothing was.
    """
    found: list[str] = []
    while (latest := latest_checkpoint(kept)) is not None and (damage := _damage(latest)):
        found.append(f"{latest.name} ({damage})")
        aside = latest.with_suffix(DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        latest.rename(aside)
    if not found:
        return latest, ""
    then = f"goes on from {latest.name}" if latest else "starts anew"
    return latest, f"Damaged since it was written: {', '.join(found)} of {kept}; {then}."


def _copy(folder: Path, aside: Path) -> None:
    aside.mkdir(parents=True)
    sums = ""
    for file in sorted(folder.iterdir()):
        if file.name != SUMS:
            sums += f"{_sum(file)}  {file.name}\n"
            shutil.copyfile(file, aside / file.name)
    (aside / SUMS).write_text(sums, encoding="utf-8")
    for file in (*aside.iterdir(), aside):  # the name must not reach the disk before what it stands for
        _reach_disk(file)


def _reach_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is.

    Raises: OSError when a file cannot be read for a reason that is none of its content's.
    """
    if not (folder / SUMS).is_file():
        return _unreadable(folder)
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: told for told, _, name in (line.partition("  ") for line in lines)}
    except UnicodeDecodeError:
        expected = {}
    there = {file.name for file in folder.iterdir()} - {SUMS}
    if missing := sorted(expected.keys() - there):
        return f"{missing[0]} is missing"
    if differing := [name for name in sorted(there) if expected.get(name) != _sum(folder / name)]:
        return f"{differing[0]} differs from its checksum"
    return ""


def _unreadable(folder: Path) -> str:
    """Without checksums, as earlier revisions left it: whether training can go on from it."""
    try:
        load_training_state(folder)
    except ValueError as error:
        return str(error)
    return ""


def _sum(file: Path) -> str:
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        if error.errno == errno.EIO:  # the disk has lost it
            return ""
        raise
