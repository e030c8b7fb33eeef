"""Whether a machine is fit for training: one small check for each thing that would otherwise end a study, late perhaps.

What a check needs is imported in it: a broken PyTorch is to be told of, not to end the telling.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import DEVNULL, PIPE

from raysv.config import SAMPLE_RATE
from raysv.search.commands import python
from raysv.search.wording import first_line

OK, WARN, FAIL = "ok", "warn", "FAIL"
GB, MB = 10**9, 10**6
LEAST_FREE = 1 * GB  # of a disk that is written to
LEAST_FILES, ENOUGH_FILES = 1024, 4096  # open ones; below the second Ray warns
GROUP_SECONDS = 90.0  # two processes import PyTorch, on a busy machine perhaps
CODECS = {
    "WAV": ("WAV", "PCM_16"),
    "FLAC": ("FLAC", "PCM_16"),
    "Ogg Vorbis": ("OGG", "VORBIS"),
    "Ogg Opus": ("OGG", "OPUS"),
    "MP3": ("MP3", "MPEG_LAYER_III"),
}
NEEDED_CODECS = ("WAV", "FLAC")  # corpora consist of them


@dataclass(frozen=True)
class Finding:
    """What a check came to: `ok`, `warn` or `FAIL`; and in words what is there, and what to do about it."""

    verdict: str
    words: str


def said(error: Exception) -> str:
    """An exception in one line; by its kind where it is none of those that raysv words itself."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def standing(path: Path) -> Path:
    """A folder, or where there is none yet the one in which it will be made."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / MB:.0f} MB"


def installed(name: str) -> str:
    """The version of a package, or of Python.

    Raises: whatever a package that is missing or broken raises.
    """
    if name == "python":
        return platform.python_version()
    if name in ("torch", "torchaudio"):  # they alone know of which build they are, and whether their libraries load
        return str(importlib.import_module(name).__version__)
    return importlib.metadata.version(name)


def versions(version_of: Callable[[str], str] = installed) -> Finding:
    """Python and the packages that raysv needs, against what it asks for; PyTorch and torchaudio are of one build."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    asked = [f"python{importlib.metadata.metadata('raysv')['Requires-Python']}", "raysv"]
    asked += [text for text in importlib.metadata.requires("raysv") or () if "extra ==" not in text]
    there: dict[str, str] = {}
    troubles, lacking, broken = [], [], False
    for need in map(Requirement, asked):
        try:
            there[need.name] = version_of(need.name)
            if need.specifier.contains(there[need.name], prereleases=True):
                continue
            troubles.append(f"{need.name} is {there[need.name]}, needed is {need.specifier}")
        except Exception as error:  # a broken package raises anything
            troubles.append(f"{need.name} cannot be used: {said(error)}")
            broken |= not isinstance(error, importlib.metadata.PackageNotFoundError)
        lacking.append(f"{need.name}{need.specifier}")
    pair = {name: Version(there[name]) for name in ("torch", "torchaudio") if name in there}
    releases, builds = {found.release[:2] for found in pair.values()}, {found.local for found in pair.values()} - {None}
    if len(releases) > 1 or len(builds) > 1:
        troubles.append(f"{' and '.join(f'{name} {found}' for name, found in pair.items())} are not of one build")
        lacking, broken = [*lacking, *pair], True
    if not troubles:
        return Finding(OK, ", ".join(f"{name} {version}" for name, version in there.items()))
    packages = [need for need in lacking if not need.startswith("python>")]
    mend = install(packages, broken) if packages else "Take another Python."
    return Finding(FAIL, f"{'; '.join(troubles)}. {mend}")


def install(packages: Iterable[str], broken: bool) -> str:
    """What to type for other versions of packages, or for broken ones once more."""
    again = "--force-reinstall --no-deps " if broken else ""
    return f"Mend it: {python()} -m pip install {again}{shlex.join(packages)}"


def gpus(system: Path = Path("/")) -> Finding:
    """The GPUs that PyTorch computes on; that there are none is a fault where the system has some."""
    import torch

    with warnings.catch_warnings(record=True) as told:  # PyTorch says in one why it sees none
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    file = system / "proc/driver/nvidia/version"
    driver = re.search(r" \d+\.[\d.]+", file.read_text()) if file.is_file() else None
    named = f"driver{driver[0] if driver else ' unknown'}, PyTorch {torch.__version__} for CUDA {torch.version.cuda}"
    if count:
        return Finding(OK, f"{', '.join(map(card, range(count)))}; {named}")
    devices = len(list(system.glob("dev/nvidia[0-9]*")))
    if not devices:
        return Finding(OK, "none: trials train on CPUs")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(WARN, f"{devices}, hidden by CUDA_VISIBLE_DEVICES. Unset it, unless they are not for you.")
    why = "; ".join(first_line(warning.message) for warning in told if isinstance(warning.message, Exception))
    mend = "See what nvidia-smi says." if torch.version.cuda else "Install a build of PyTorch for CUDA."
    return Finding(FAIL, f"{devices}, but PyTorch sees none ({why or named}). {mend}")


def card(index: int) -> str:
    """A GPU in words, once it has computed something: it may be too old or too new for this PyTorch."""
    import torch

    torch.ones(1000, device=f"cuda:{index}").sum().item()
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)} with {size(total)} ({size(free)} free)"


def group(seconds: float = GROUP_SECONDS) -> Finding:
    """Two processes sum a tensor up, with a GPU each by NCCL or without by gloo; a lone GPU has one process."""
    import torch

    count = torch.cuda.device_count()
    backend, world = "nccl" if count else "gloo", 1 if count == 1 else 2
    what, deadline = f"{backend}: {world} process{'es' * (world > 1)}", time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as store:
        calls = [(rank, world, backend, seconds / 3, f"{store}/group") for rank in range(world)]
        commands = [[sys.executable, "-c", f"from {__name__} import join; join{call}"] for call in calls]
        members = [subprocess.Popen(command, stdout=DEVNULL, stderr=PIPE, text=True) for command in commands]
        try:
            for member in members:
                member.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for member in members:
                member.kill()
            errors = [member.communicate()[1].strip().splitlines() for member in members]
    if not any(member.returncode for member in members):
        return Finding(OK, f"{what} summed a tensor up")
    why = "; ".join(dict.fromkeys(lines[-1] if lines else f"no answer in {seconds:g} s" for lines in errors))
    name = f"{backend.upper()}_SOCKET_IFNAME"
    mend = (
        f"Often it is the interface: set {name}, now {os.environ.get(name) or 'unset'}, to one that ip address shows."
    )
    return Finding(FAIL, f"{what} cannot sum a tensor up ({why}). {mend}")


def join(rank: int, world: int, backend: str, seconds: float, store: str) -> None:
    """What each process of `group` does; it exits with a sentence when that goes wrong."""
    import torch
    import torch.distributed as dist

    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        meeting = dist.FileStore(store, world)
        dist.init_process_group(backend, None, timedelta(seconds=seconds), world, rank, meeting)
        summed = torch.full((1000,), rank + 1.0, device=device)
        dist.all_reduce(summed)
        if summed.unique().tolist() != [world * (world + 1) / 2]:
            raise ValueError(f"the sum is {summed.unique().tolist()}")
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(first_line(error))


def audio(codecs: Mapping[str, tuple[str, str]] = CODECS) -> Finding:
    """The formats that come back as they were written."""
    import soundfile

    good = {name: _comes_back(*codec) for name, codec in codecs.items()}
    read, lacking = (", ".join(name for name in good if good[name] is sought) for sought in (True, False))
    words = f"libsndfile {soundfile.__libsndfile_version__} reads {read}" + (f", but not {lacking}" if lacking else "")
    if all(good[name] for name in NEEDED_CODECS):
        return Finding(OK, words)
    return Finding(FAIL, f"{words}. {install(['soundfile'], broken=True)}")


def _comes_back(container: str, coding: str) -> bool:
    import numpy as np
    import soundfile

    tone = (8000 * np.sin(0.1 * np.arange(SAMPLE_RATE))).astype(np.int16)
    file = io.BytesIO()
    try:
        soundfile.write(file, tone, SAMPLE_RATE, format=container, subtype=coding)
        file.seek(0)
        again, rate = soundfile.read(file, dtype="int16")
    except (soundfile.SoundFileError, ValueError):
        return False
    same = np.array_equal(again, tone) if coding == "PCM_16" else 0.5 < again.std() / tone.std() < 2
    return bool(same) and rate == SAMPLE_RATE


def shared_memory(batches: int, store: int, place: Path = Path("/dev/shm")) -> Finding:
    """Room for the batches that loader workers hand over, and for Ray's object store beside them, in bytes."""
    if not place.exists():
        return Finding(OK, f"no {place}: this system keeps it elsewhere")
    free = shutil.disk_usage(place).free
    words = f"{size(free)} free in {place}; batches take {size(batches)}, Ray {size(store)}"
    mend = "Enlarge it (docker run --shm-size 8g; mount -o remount,size=8g), or lower data.loader_workers."
    if free < batches:
        return Finding(FAIL, f"{words}. {mend}")
    return Finding(OK, words) if free >= batches + store else Finding(WARN, f"{words}, on disk then. {mend}")


def open_files() -> Finding:
    """How many files a process may have open; Ray itself raises the soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = f"{soft} for a process, {'any number' if hard == resource.RLIM_INFINITY else hard} at most"
    if hard == resource.RLIM_INFINITY or hard >= ENOUGH_FILES:
        return Finding(OK, words)
    mend = "Raise it: ulimit -n 8192 as root, or nofile in /etc/security/limits.conf."
    return Finding(FAIL if hard < LEAST_FILES else WARN, f"{words}, where Ray recommends 8192. {mend}")


def folder(path: Path, mend: str, wanted: float = 0) -> Finding:
    """Whether a folder can be written to and has room, in bytes, for what may come at most."""
    try:
        with tempfile.NamedTemporaryFile(dir=standing(path), prefix="raysv-doctor-") as probe:
            probe.write(bytes(MB))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding(FAIL, f"{path.absolute()} cannot be written to: {error.strerror}. {mend}, or mend that.")
    free = shutil.disk_usage(standing(path)).free
    words = f"{size(free)} free at {path.absolute()}" + (f"; checkpoints may take {size(wanted)}" if wanted else "")
    if free >= max(wanted, LEAST_FREE):
        return Finding(OK, words)
    return Finding(FAIL if free < LEAST_FREE else WARN, f"{words}. {mend}, or make room.")
