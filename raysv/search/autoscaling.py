"""The nodes that an autoscaler may still start, which a study that has not asked for them would not see.

Ray itself does not tell them. Ray's launcher leaves its configuration on the head node; elsewhere (KubeRay, or an
autoscaler of your own) the environment variable RAYSV_NODES names them, as YAML:

    RAYSV_NODES="{count: 4, CPU: 8, GPU: 1}"
    RAYSV_NODES="[{count: 4, CPU: 8, GPU: 1}, {count: 2, CPU: 96, GPU: 8}]"
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysv.search.wording import first_line

LAUNCHED = Path("~/ray_bootstrap_config.yaml")  # by Ray's launcher, on the head node
VARIABLE = "RAYSV_NODES"
COUNT = "count"


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind: how many there can be, how many there are to be at all times, and what each has."""

    most: int
    least: int
    resources: dict[str, float]


def node_groups(*, on_head: bool) -> list[NodeGroup]:
    """What the autoscaler of the connected cluster may start, in whole; nothing where there is none.

    Args:
        on_head: whether this is the cluster's head node, where its launcher left its configuration.

    Raises: ValueError when the environment names nodes in another way than above.
    """
    if told := os.environ.get(VARIABLE, ""):
        return _read_variable(told)
    launched = LAUNCHED.expanduser()
    if not on_head or not launched.is_file() or not _autoscaler_follows(launched):
        return []
    return _read_launched(yaml.safe_load(launched.read_text(encoding="utf-8")))


def _autoscaler_follows(config: Path) -> bool:
    """Whether an autoscaler of this machine was started with a configuration; `ray down` leaves the file behind."""
    options = {f"--autoscaling-config={name}".encode() for name in (config, LAUNCHED)}  # Ray is given it with a ~
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if options & set(command.read_bytes().split(b"\0")):
                return True
    return False


def _read_variable(text: str) -> list[NodeGroup]:
    try:
        told = yaml.safe_load(text)
        groups = told if isinstance(told, list) else [told]
        return [_read_group(dict(group)) for group in groups]
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(
            f"{VARIABLE} is {text!r}, which does not say what nodes an autoscaler may start ({first_line(error)}). "
            "Set it to, for example, {count: 4, CPU: 8, GPU: 1}, or unset it."
        ) from error


def _read_group(group: dict[str, Any]) -> NodeGroup:
    count = int(group.pop(COUNT))
    resources = {str(kind): float(amount) for kind, amount in group.items()}
    if count < 0 or not resources or min(resources.values()) < 0:
        raise ValueError("a count and what each of so many nodes has, none below 0")
    return NodeGroup(count, 0, resources)


def _read_launched(config: Mapping[str, Any]) -> list[NodeGroup]:
    """The worker types of a launcher's configuration, which the launcher has checked and filled out.

    Together they are no more than its `max_workers`: the types that come first are counted first, as the launcher has
    no order of its own.
    """
    left, groups = int(config.get("max_workers", 0)), []
    for name, kind in config.get("available_node_types", {}).items():
        is_head = name == config.get("head_node_type") and config["provider"]["type"] != "local"
        most = 0 if is_head else min(int(kind.get("max_workers", 0)), left)
        left -= most
        if most:
            groups.append(NodeGroup(most, int(kind.get("min_workers", 0)), dict(kind.get("resources", {}))))
    return groups
