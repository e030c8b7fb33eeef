"""The cluster a study runs on: connecting to it, what it has, and how many trials fit."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import find_bootstrap_address
from ray.util.state import list_nodes

from raysv.learning.scratch import scratch, sweep
from raysv.search.autoscaling import NodeGroup, node_groups
from raysv.search.space import ResourcesConfig

KNOCK_SECONDS = 5
DASHBOARD_SECONDS = 120
NODES_SECONDS = 600  # in which a machine that the launcher just reached installs PyTorch and joins
DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"  # of Ray: where every process of a cluster finds its dashboard
# Of glibc: keep memory instead of giving every activation back to the system, which on a CPU took a sixth of the time.
# A high MALLOC_MMAP_THRESHOLD_ would do as well, but glibc before 2.35 refuses one above 32 MiB.
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
LOCAL_SETTINGS = {  # of the processes of a private cluster
    "RAY_worker_maximum_startup_concurrency": "16",  # a trial has many helpers; Ray warns of each dozen
    **MALLOC_SETTINGS,
}
HEAD = "node:__internal_head__"  # Ray's own name for the head node, which its helpers take their share of
LONGEST_PARENT = 20  # letters, of the folder for temporary ones: a socket's path may have 107, and Ray's part has 68
LOCAL_OBJECT_STORE = 256 * 2**20  # bytes; nothing large goes through it, audio is memory-mapped


Resources = dict[str, float]


@dataclass(frozen=True)
class Allotment:
    """What each trial gets, and how many of them run at a time.

    Attributes:
        room: how many the whole cluster has room for, with the nodes that its autoscaler may start.
        now: how many the nodes have room for that are there.
        head: what Ray calls the head node itself, as a resource of which there is 1; empty where no trial needs it.
    """

    gpus_per_worker: float
    concurrent_trials: int
    room: int
    now: int
    backend: str
    head: str

    def describe(self, resources: ResourcesConfig) -> str:
        """In words, for the terminal and for MLflow."""
        device = f"{self.gpus_per_worker:g} GPU" if self.gpus_per_worker else "no GPU"
        workers = f"{resources.workers} worker{'s' if resources.workers > 1 else ''} a trial"
        return (
            f"{self.concurrent_trials} trial{'s' if self.concurrent_trials > 1 else ''} at a time, {workers} "
            f"with {resources.cpus_per_worker} CPU and {device} each ({self.backend})"
        )


@contextlib.contextmanager
def connected() -> Iterator[tuple[str, list[NodeGroup]]]:
    """Join the cluster of `RAY_ADDRESS`, or the one that `ray start` made on this machine, or start a private one.

    A private one ends with the block, and all that it kept on disk goes with it.

    Yields: where it is, in words, and what its autoscaler may start; the nodes that it is to have at all times have
        been waited for.
    Raises: ValueError when the address does not answer, or the cluster lacks the service that frees the workers of a
        trial's process.
    """
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    wanted = os.environ.get("RAY_ADDRESS", "")
    with contextlib.ExitStack() as stack:
        try:
            knock(wanted)
            place, private = _start_or_join(wanted, stack)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No Ray cluster answers at {wanted or 'the address that ray start noted'}: {error}. Set RAY_ADDRESS "
                "to HOST:PORT of a head node, or to local to run on this machine alone."
            ) from error
        _await_dashboard()
        groups = [] if private else node_groups(on_head=_on_head())
        _await_nodes(1 + sum(group.least for group in groups))
        yield place, groups


def knock(address: str) -> None:
    """Find out in seconds, where Ray takes minutes, that nobody is there.

    Raises: OSError or ValueError when no study could begin at this address.
    """
    if "://" in address:
        raise ValueError("a study cannot be driven from outside its cluster. Send it there with ray job submit")
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _start_or_join(address: str, stack: contextlib.ExitStack) -> tuple[str, bool]:
    private = address == "local" or not (address or find_bootstrap_address(None))
    if private:
        _start(stack)
    else:
        _init(address or None)
    stack.callback(ray.shutdown)
    return "this machine alone" if private else f"the cluster at {ray.get_runtime_context().gcs_address}", private


def _start(stack: contextlib.ExitStack) -> None:
    """Start a cluster of this machine, in a folder of its own: in its usual one Ray would leave every session."""
    # Ray finds the dashboard by guessing, and gives up where it sees two clusters on a machine. All processes of a
    # new cluster inherit this environment; in one that is joined, Ray knows the address.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ[DASHBOARD_VARIABLE] = f"http://127.0.0.1:{port}"
    stack.callback(os.environ.pop, DASHBOARD_VARIABLE, None)
    usual = tempfile.gettempdir()  # asked before TMPDIR is another: Python remembers the answer
    parent = os.environ.get("RAY_TMPDIR") or usual
    if len(parent) > LONGEST_PARENT:
        parent = "/tmp"
    sweep(parent)
    folder = str(stack.enter_context(scratch(parent)))
    # what its processes, many of which are killed at the end, and Ray in this one put among temporary files
    stack.callback(_set_or_remove, "TMPDIR", os.environ.get("TMPDIR"))
    os.environ["TMPDIR"] = folder
    _init(
        "local",
        object_store_memory=LOCAL_OBJECT_STORE,
        include_dashboard=True,
        dashboard_port=port,
        _temp_dir=folder,
    )


def _set_or_remove(variable: str, value: str | None) -> None:
    os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value


def _init(address: str | None, **options: Any) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="error", **options)


def _await_dashboard() -> None:
    """Wait for the state service, which starts last and may take its time on a busy machine."""
    deadline = time.monotonic() + DASHBOARD_SECONDS
    while True:
        try:
            list_nodes(ray.get_runtime_context().gcs_address, timeout=10)
            return
        except Exception as error:  # Ray raises whatever its HTTP client does
            if time.monotonic() > deadline:
                raise ValueError(
                    f"The cluster's dashboard does not answer: {error}. Without it Ray Train cannot free the workers "
                    "of a trial whose process ended, and the study would starve. Install ray[default] on the head "
                    "node, leave the dashboard on, and start the study there: it listens on the head's loopback."
                ) from error
            time.sleep(1)


def _on_head() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and HEAD in node["Resources"] for node in ray.nodes())


def _await_nodes(count: int) -> None:
    """Wait for machines that are being set up: a study that starts without them would never use them."""
    deadline = time.monotonic() + NODES_SECONDS
    told = 0
    while (there := len(alive())) < count:
        if time.monotonic() > deadline:
            print(f"Nodes    {there} of {count} have joined; the study goes on without the others.", flush=True)
            return
        if there != told:
            told = there
            print(f"Nodes    {there} of {count} have joined. Waiting for the others ...", flush=True)
        time.sleep(1)


def allot(resources: ResourcesConfig, most_trials: int, to_come: Sequence[NodeGroup] = ()) -> Allotment:
    """Share the connected cluster out over at most so many trials at a time.

    Args:
        to_come: what an autoscaler keeps or starts beside the head node, see `node_groups`.

    Raises: ValueError when not even one trial fits, naming what is there and what is needed.
    """
    there = alive()
    whole = [node for node in there if HEAD in node] + [group.resources for group in to_come for _ in range(group.most)]
    gpus = any(node.get("GPU", 0) for node in there + whole)
    per_worker = resources.gpus_per_worker if resources.gpus_per_worker is not None else float(gpus)
    needs = {"CPU": resources.cpus_per_worker, "GPU": per_worker}
    now, later = (sum(_workers_on(node, needs) for node in nodes) for nodes in (there, whole))
    places = max(now, later)
    if places < resources.workers:
        larger = max(there, whole, key=lambda nodes: sum(map(_size, nodes)))
        raise ValueError(
            f"A trial needs {resources.workers} workers with {resources.cpus_per_worker} CPU and {per_worker:g} GPU "
            f"each, but the cluster has {_counted(larger)}, room for {places}. Lower "
            "resources.workers, resources.cpus_per_worker or resources.gpus_per_worker, or join a larger cluster."
        )
    room = places // resources.workers
    return Allotment(
        per_worker,
        min(room, most_trials),
        room,
        now // resources.workers,
        backend="nccl" if per_worker else "gloo",
        head=_head_of(there) if resources.workers > 1 else "",
    )


def alive() -> list[Resources]:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _size(node: Resources) -> float:
    return node.get("CPU", 0) + node.get("GPU", 0)


def _counted(nodes: Sequence[Resources]) -> str:
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"{cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node(s)"


def _head_of(nodes: Sequence[Resources]) -> str:
    """The head node's own name: of the alias, Ray's helpers take their share, and one large trial would starve them."""
    named = [kind for node in nodes if HEAD in node for kind in node if kind.startswith("node:") and kind != HEAD]
    if not named:
        raise ValueError(
            "The cluster does not tell its head node, on which trials with several workers are placed: no node has the "
            f"resources {HEAD} and node:ADDRESS. Start the head with ray start --head and join that cluster."
        )
    return named[0]


def _workers_on(node: Resources, needs: Resources) -> int:
    return min(_fitting(node.get(kind, 0), amount) for kind, amount in needs.items() if amount)


def _fitting(there: float, amount: float) -> int:
    """How often an amount is there; a fraction has to come from one GPU."""
    if amount < 1:
        return int(there) * int(1 / amount + 1e-9)
    return int(there / amount + 1e-9)
