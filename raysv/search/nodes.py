"""Whether the nodes of a cluster are fit for a study: the same code on each, and the same data within reach."""

from __future__ import annotations

import functools
import hashlib
import importlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysv.config import Config, config_from_dict, config_to_dict
from raysv.corpus.loading import open_corpus
from raysv.learning.checkpoint import versions

SOURCE = Path(__file__).parents[1]  # of raysv


@functools.cache
def code() -> dict[str, str]:
    """What runs in this process: the versions that results depend on, and raysv's source in short."""
    summed = hashlib.sha256()
    for file in sorted(SOURCE.rglob("*.py")):
        summed.update(f"{file.relative_to(SOURCE)}\n".encode() + file.read_bytes())
    return versions() | {"raysv's source": summed.hexdigest()[:12]}


def refuse_other_code(driver: Mapping[str, str]) -> None:
    """Raises: ValueError when other code runs here than in the driver of the study, with both named."""
    here = code()
    differing = [f"{name} {here.get(name)}, not {text}" for name, text in driver.items() if here.get(name) != text]
    if differing:
        raise ValueError(
            f"{socket.gethostname()} has {', '.join(differing)} as the driver of the study. Install the same on all "
            "nodes (with Ray's launcher: ray up --no-restart CLUSTER.yaml), and restart Ray where it was another. If "
            "raysv's source was edited while the study ran, go on with --resume: a driver keeps what it started with."
        )


def prepare_nodes(configs: Sequence[Config], checked: Mapping[str, str], *, tests: bool) -> None:
    """Have every other node look at its code, and read, check and decode the data, which its trials then only open.

    A node that joins later does so when its first trial starts.

    Args:
        configs: one for each different data that trials use.
        checked: the `digests` of what this node found, see `open_corpus`.
        tests: whether trials need the test lists too.

    Raises: ValueError when one differs or lacks something, with all that do, and what it is.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others.pop(here, None)
    trees = [config_to_dict(config) for config in configs]
    asked = {}
    for node in others:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_messenger())
        asked[node] = look.remote(trees, dict(checked), tests, code())
    told = [(others[node], trouble) for node, answer in asked.items() if (trouble := _answer(answer, node))]
    if told:
        raise ValueError("\n".join(f"Node {address}: {trouble}" for address, trouble in told))


def _messenger() -> Callable[..., str]:
    """What a node is asked. A function inside another travels in whole: the node may have no raysv, or an older one."""
    here = __name__

    def look(trees: list[dict[str, Any]], checked: dict[str, str], tests: bool, driver: dict[str, str]) -> str:
        try:
            trouble_there = importlib.import_module(here).trouble_here
        except (ImportError, AttributeError) as error:
            return f"it has no raysv like the driver's ({error})."
        return str(trouble_there(trees, checked, tests, driver))

    return look


def _answer(answer: Any, node: str) -> str:
    try:
        return str(ray.get(answer))
    except ray.exceptions.RayError as error:
        if any(there["NodeID"] == node and there["Alive"] for there in ray.nodes()):
            return f"it could not look at its data: {str(error).strip().splitlines()[-1]}"
        return ""  # it has left the cluster; no trial will run there


def trouble_here(trees: Sequence[dict[str, Any]], checked: dict[str, str], tests: bool, driver: dict[str, str]) -> str:
    """What keeps this node from training a study's trials, in words; empty when nothing does."""
    try:
        refuse_other_code(driver)
        for config in map(config_from_dict, trees):
            open_corpus(config.data, config.augment, checked, tests=tests)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
