"""Where the checkpoints of a run are kept: each of them whole or not at all, and known to be whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from raysv.learning.checkpoint import read_history

SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it


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
    target = kept / _name(len(history))
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
    stay = {target.name, _name(len(history) - 1), _name(best["epoch"])}
    for other in kept.iterdir():
        if other.name not in stay:
            shutil.rmtree(other, ignore_errors=True)
    return target


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
        shutil.rmtree(latest.with_suffix(".damaged"), ignore_errors=True)
        latest.rename(latest.with_suffix(".damaged"))
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
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            expected, _, name = line.partition("  ")
            if _sum(folder / name) != expected:
                return f"{name} differs from its checksum"
    except (OSError, ValueError) as error:
        return f"{error.strerror or error}: {Path(error.filename).name}" if isinstance(error, OSError) else str(error)
    return ""


def _sum(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _name(epoch: float) -> str:
    return f"epoch-{epoch:04.0f}"
