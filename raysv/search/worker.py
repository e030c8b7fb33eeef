"""What runs where a trial is trained: one task in a lone worker, task after task in each worker of a team."""

from __future__ import annotations

import functools
import gc
import resource
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from raysv.config import Config, config_from_dict
from raysv.distributed import agree, rank, world_size
from raysv.learning.keeping import keep_checkpoint, newest_intact
from raysv.learning.scratch import sweep
from raysv.learning.training import DivergedError, Metrics, fit
from raysv.search.desk import Result, StoppedError, Task
from raysv.search.nodes import refuse_other_code
from raysv.search.results import NO_ROOM, NOTICE, TIME, failure


class NoRoomError(RuntimeError):
    """A batch does not fit into the memory of a worker."""


def train(task: Task, report: Callable[[Result], None], device: torch.device) -> None:
    """Train a task, or go on with it, in this process: alone, or as one of several workers that all do the same.

    Args:
        report: called by every worker with the metrics of each epoch.

    Raises: ValueError when other code runs here than in the driver of the study.
    """
    gc.collect()  # the process has trained before; only now nothing refers to that any more
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        torch.set_num_threads(task.threads)
    sweep()
    refuse_other_code(task.code)
    kept = Path(task.kept)
    latest, notice = agree(newest_intact(kept) if rank() == 0 else (None, ""))
    told = [{NOTICE: notice}] if notice else []

    def keep_and_report(metrics: Metrics, folder: Path | None) -> None:
        checkpoint = {"checkpoint_path": str(keep_checkpoint(folder, kept))} if folder else {}
        report(metrics | checkpoint | (told.pop() if told else {}))

    config = config_from_dict(task.config)
    try:
        fit(config, keep_and_report, device=device, resume=latest, tests=task.tests, checked=task.checked)
    except DivergedError as error:
        # an answer, not an accident: trying again would diverge again, and the search is to learn from it
        report(failure(error.epoch, str(error)))
    except (RuntimeError, MemoryError) as error:
        if not _ran_out_of_memory(error):
            raise
        raise NoRoomError(_no_room(config, device)) from error


def _ran_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _no_room(config: Config, device: torch.device) -> str:
    batch = config.batch
    if device.type == "cuda":
        peak, room = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        memory = f"{peak / 1e9:.1f} GB were taken at most, of {room / 1e9:.1f} GB of the GPU"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = f"the process had {peak / 1e9:.1f} GB at most"
    return (
        f"{NO_ROOM} {batch.speakers} speakers × {batch.utterances_per_speaker} utterances × "
        f"{batch.views} views of {batch.crop_seconds:g} s on {world_size()} worker(s): {memory}. Lower batch.speakers, "
        "batch.crop_seconds or model.channels, or raise resources.workers."
    )


def train_alone(task: Task, report: Callable[[Result], None], *, gpu: bool) -> None:
    """`train` in a process that has no others beside it."""
    train(task, report, torch.device("cuda" if gpu else "cpu"))


def serve(setup: dict[str, Any]) -> None:
    """What each worker runs: one task after another, until it is killed."""
    import ray.train.torch  # a lone worker can do without

    device = ray.train.torch.get_device()
    desk, group, number = setup["desk"], agree(uuid.uuid4().hex), 0
    while True:
        try:
            number, task = ray.get(desk.pick_up.remote(group, rank() == 0, number))
        except ray.exceptions.ActorDiedError:
            return  # the trial's process is gone, and this team with it
        report = functools.partial(_report, desk, number)
        try:
            train(task, report, device)
            if rank() == 0:
                ray.get(desk.hand_in.remote(number, None))
        except StoppedError:
            pass
        except Exception as error:
            # what is wrong with the data or the configuration stays wrong, whoever trains it
            again = not isinstance(error, (ValueError, NoRoomError))
            ray.get(desk.give_up.remote(number, traceback.format_exc(), again))
            raise  # the other workers wait for this one: Train replaces them all


def _report(desk: Any, number: int, metrics: Result) -> None:
    if rank() == 0:
        ray.get(desk.hand_in.remote(number, metrics))
    if not ray.get(desk.may_go_on.remote(number, int(metrics[TIME]))):
        raise StoppedError
