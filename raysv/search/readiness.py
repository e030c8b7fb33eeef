"""Whether a study could start: the machine, what it is to write to, and what it is to read. Nothing is started."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysv.config import Config
from raysv.corpus.cache import cache_folder
from raysv.search import machine
from raysv.search.machine import FAIL, OK, WARN, Finding, said, size, standing

if TYPE_CHECKING:
    from raysv.search.space import Space

CHECKPOINTS = 3  # that are kept of a trial
SAMPLED = 100  # recordings of a list that are opened


def examine(file: Path | None, settings: dict[str, Any], results: Path) -> Iterator[tuple[str, Finding]]:
    """Every check by name, as it is done; what one raises is its finding.

    Args:
        file: the search space of the study, if it is known yet; `settings` are keys of it that are set otherwise.
        results: where studies are to be kept.

    Raises: ValueError or OSError when the space cannot be read.
    """
    space = None
    if file:
        try:
            from raysv.search.space import read_space
        except Exception as error:  # a broken package raises anything
            yield "space", Finding(FAIL, f"{file} cannot be read: {said(error)}")
        else:
            space = read_space(file, settings)
    configs = space.corners() if space else [Config()]
    checks: dict[str, Callable[[], Finding]] = {
        "versions": machine.versions,
        "GPUs": machine.gpus,
        "workers": machine.group,
        "audio": machine.audio,
        "shared memory": lambda: shared_memory(configs),
        "open files": machine.open_files,
        "results": lambda: machine.folder(results, "Name another by --results", checkpoint_bytes(space)),
        "cache": lambda: machine.folder(cache_folder(configs[0].data), "Name another by data.cache or RAYSV_CACHE"),
        "temporary": lambda: machine.folder(Path(tempfile.gettempdir()), "Name another by TMPDIR"),
        "MLflow": lambda: mlflow(Path.cwd()),
        "Ray": ray_address,
        "data": lambda: data(space) if space else Finding(OK, "not looked at: no SPACE was named"),
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:  # no reason to leave out the others
            yield name, Finding(FAIL, said(error))


def shared_memory(configs: Sequence[Config]) -> Finding:
    """Whether there is enough of it for as many trials as there are GPUs, or for one."""
    import torch

    from raysv.learning.training import loader_workers
    from raysv.learning.views import batch_bytes
    from raysv.search.cluster import LOCAL_OBJECT_STORE

    count = torch.cuda.device_count()
    device = torch.device("cuda" if count else "cpu")
    ahead = [
        (2 * workers + 1) * batch_bytes(config) for config in configs if (workers := loader_workers(config, device))
    ]
    return machine.shared_memory(max(count, 1) * max(ahead, default=0), LOCAL_OBJECT_STORE)


def checkpoint_bytes(space: Space | None) -> float:
    """The most that a study's checkpoints take: weights and two moments of the optimiser, in float32."""
    if space is None:
        return 0
    from raysv.speech.encoder import SpeakerEncoder

    models = {config.model for config in space.corners()}
    values = max(sum(weights.numel() for weights in SpeakerEncoder(model).parameters()) for model in models)
    return 3.0 * 4 * values * CHECKPOINTS * (space.search.trials + space.confirming_runs)


def mlflow(here: Path) -> Finding:
    """Whether MLflow answers where a study that is started in a folder would write; no database is made there yet."""
    from raysv.search.mlflow_store import check, default_tracking_uri

    uri = default_tracking_uri(here)
    database = Path(uri.removeprefix("sqlite:///"))
    try:
        if uri.startswith("sqlite:///") and not database.exists():
            with tempfile.TemporaryDirectory(dir=standing(database.parent), prefix="raysv-doctor-") as aside:
                check(f"sqlite:///{aside}/mlflow.db")
            return Finding(OK, f"{uri}, which a study makes")
        check(uri)
        verdict, words = OK, uri
    except ValueError as error:
        verdict, words = FAIL, str(error)
    except OSError as error:
        mend = "Start in another folder, or set MLFLOW_TRACKING_URI."
        verdict, words = FAIL, f"{uri} cannot be made: {error.strerror}. {mend}"
    for secret in re.findall(r"(?<=://)[^/]*@|\?.*", uri):  # a token may stand before the host or behind the path
        words = words.replace(secret, "")
    return Finding(verdict, words)


def ray_address() -> Finding:
    """Whether somebody answers at `RAY_ADDRESS`."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        joins = "" if address else "joins what ray start made here, or "
        return Finding(OK, f"RAY_ADDRESS is {address or 'not set'}: a study {joins}starts a Ray of its own")
    from raysv.search.cluster import knock

    shown = address.rpartition("@")[2]
    try:
        knock(address)
    except (ValueError, OSError) as error:
        mend = "Set RAY_ADDRESS to HOST:PORT of a head node, or to local to run on this machine alone."
        return Finding(FAIL, f"no Ray cluster answers at RAY_ADDRESS {shown}: {said(error)}. {mend}")
    return Finding(OK, f"RAY_ADDRESS is {shown}")


def data(space: Space) -> Finding:
    """All lists, read and checked as a study does first; of what it would decode, some recordings are."""
    from raysv.corpus.loading import find_recordings
    from raysv.corpus.store import WaveformStore, store_folder

    corners = sorted(space.corners(), key=lambda config: config.augment.strength)
    different = {repr((config.data, config.augment.kinds)): config for config in corners}  # the most disturbed of each
    stores: dict[Path, list[Path]] = {}
    for config in different.values():
        for paths in find_recordings(config.data, config.augment):
            stores[store_folder(paths, cache_folder(config.data))] = paths
    problems: dict[str, str] = {}
    for store in filter(Path.is_dir, stores):
        problems |= WaveformStore(store).problems
    needed = [_try_some(paths, problems) for store, paths in stores.items() if not store.is_dir()]
    free = shutil.disk_usage(standing(next(iter(stores)))).free
    words = f"{sum(map(len, stores.values()))} recordings, "
    words += f"{size(sum(needed))} of the cache when decoded" if needed else "decoded already"
    if problems:
        path, why = next(iter(problems.items()))
        words += f"; {len(problems)} or more cannot be used, first {path}: {why}"
        if space.tree["data"]["skip_bad_audio"]:
            return Finding(WARN, f"{words}. They will be left out.")
        return Finding(FAIL, f"{words}. Mend or remove them, or leave them out with --skip-bad-audio.")
    if sum(needed) > free:
        return Finding(FAIL, f"{words}, where {size(free)} are free. Name another by data.cache or RAYSV_CACHE.")
    return Finding(OK, words)


def _try_some(paths: Sequence[Path], problems: dict[str, str]) -> float:
    """Look whether recordings are there, and decode some of them.

    Args:
        problems: where those that cannot be used are entered, and why.

    Returns: the bytes that all of them would take.
    """
    from raysv.corpus.audio import BadAudio, read_audio

    problems |= {str(path): "there is no such file" for path in paths if not path.is_file()}
    lengths = []
    for path in paths[:: -(-len(paths) // SAMPLED)]:
        try:
            lengths.append(len(read_audio(path)))
        except BadAudio as problem:
            problems[str(path)] = str(problem)
    return 2 * len(paths) * sum(lengths) / max(len(lengths), 1)
