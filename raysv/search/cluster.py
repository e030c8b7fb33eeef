"""The cluster a study runs on: connecting to it, what it has, and how many trials fit."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.state import list_nodes

from raysv.search.space import ResourcesConfig

KNOCK_SECONDS = 5
DASHBOARD_SECONDS = 120
DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"  # of Ray: where every process of a cluster finds its dashboard
# Of glibc: keep memory instead of giving every activation back to the system, which on a CPU took a sixth of the time.
# A high MALLOC_MMAP_THRESHOLD_ would do as well, but glibc before 2.35 refuses one above 32 MiB.
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
LOCAL_SETTINGS = {  # of the processes of a private cluster
    "RAY_worker_maximum_startup_concurrency": "16",  # a trial has many helpers; Ray warns of each dozen
    **MALLOC_SETTINGS,
}
HEAD = "node:__internal_head__"  # Ray's own name for the head node, which its helpers take their share of
LOCAL_OBJECT_STORE = 256 * 2**20  # bytes; nothing large goes through it, audio is memory-mapped


@dataclass(frozen=True)
class Allotment:
    """What each trial gets, and how many of them run at a time.

    Attributes:
        room: how many the whole cluster has room for.
        head: what Ray calls the head node itself, as a resource of which there is 1; empty where no trial needs it.
    """

    gpus_per_worker: float
    concurrent_trials: int
    room: int
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


def connect() -> str:
    """Join the cluster of `RAY_ADDRESS`, or the one that `ray start` made on this machine, or start a private one.

    Returns: where it is, in words.
    Raises: ValueError when the address does not answer, or the cluster lacks the service that frees the workers of a
        trial's process.
    """
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    wanted = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(wanted)
        place = _start_or_join(wanted or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No Ray cluster answers at {wanted or 'the address that ray start noted'}: {error}. Set RAY_ADDRESS to "
            "HOST:PORT of a head node, or to local to run on this machine alone."
        ) from error
    _await_dashboard()
    return place


def _knock(address: str) -> None:
    """Find out in seconds, where Ray takes minutes, that nobody is there."""
    if "://" in address:
        raise ValueError("a study cannot be driven from outside its cluster. Send it there with ray job submit")
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _start_or_join(address: str | None) -> str:
    # Ray finds the dashboard by guessing, and gives up where it sees two clusters on a machine. All processes of a
    # new cluster inherit this environment; in one that is joined, Ray knows the address.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ[DASHBOARD_VARIABLE] = f"http://127.0.0.1:{port}"
    try:
        # only a new cluster takes these options; joining one, Ray refuses them
        _init(address, object_store_memory=LOCAL_OBJECT_STORE, include_dashboard=True, dashboard_port=port)
    except ValueError:
        del os.environ[DASHBOARD_VARIABLE]
        _init(address)
        return f"the cluster at {ray.get_runtime_context().gcs_address}"
    return "this machine alone"


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
                ray.shutdown()
                raise ValueError(
                    f"The cluster's dashboard does not answer: {error}. Without it Ray Train cannot free the workers "
                    "of a trial whose process ended, and the study would starve. Install ray[default] on the head node "
                    "and leave the dashboard on."
                ) from error
            time.sleep(1)


def allot(resources: ResourcesConfig, most_trials: int) -> Allotment:
    """Share the connected cluster out over at most so many trials at a time.

    Raises: ValueError when not even one trial fits, naming what is there and what is needed.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    per_worker = resources.gpus_per_worker if resources.gpus_per_worker is not None else float(gpus > 0)
    needs = {"CPU": resources.cpus_per_worker, "GPU": per_worker}
    places = sum(_workers_on(node, needs) for node in nodes)
    if places < resources.workers:
        has = f"{sum(node.get('CPU', 0) for node in nodes):g} CPUs and {gpus:g} GPUs on {len(nodes)} node(s)"
        raise ValueError(
            f"A trial needs {resources.workers} workers with {resources.cpus_per_worker} CPU and {per_worker:g} GPU "
            f"each, but the cluster has {has}, room for {places}. Lower resources.workers, "
            "resources.cpus_per_worker or resources.gpus_per_worker, or join a larger cluster."
        )
    room = places // resources.workers
    backend = "nccl" if per_worker else "gloo"
    head = _head_of(nodes) if resources.workers > 1 else ""
    return Allotment(per_worker, min(room, most_trials), room, backend, head)


def _head_of(nodes: list[dict[str, float]]) -> str:
    """The head node's own name: of the alias, Ray's helpers take their share, and one large trial would starve them."""
    named = [kind for node in nodes if HEAD in node for kind in node if kind.startswith("node:") and kind != HEAD]
    if not named:
        raise ValueError(
            "The cluster does not tell its head node, on which trials with several workers are placed: no node has the "
            f"resources {HEAD} and node:ADDRESS. Start the head with ray start --head and join that cluster."
        )
    return named[0]


def _workers_on(node: dict[str, float], needs: dict[str, float]) -> int:
    return min(_fitting(node.get(kind, 0), amount) for kind, amount in needs.items() if amount)


def _fitting(there: float, amount: float) -> int:
    """How often an amount is there; a fraction has to come from one GPU."""
    if amount < 1:
        return int(there) * int(1 / amount + 1e-9)
    return int(there / amount + 1e-9)
