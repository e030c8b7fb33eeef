"""Commands for a person to type next: here, or at home when Ray's launcher has brought a study to a cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

# Set on a cluster by the file that Ray's launcher made it from: how that file is called where the launcher was called.
CLUSTER_VARIABLE = "RAYSV_CLUSTER"


def shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def python() -> str:
    """How to call the interpreter that runs, for a command to be pasted: the environment need not be activated."""
    found = shutil.which("python")
    return "python" if found and Path(found) == Path(sys.executable) else shown(Path(sys.executable))


def door(name: str) -> str:
    """How to call a door of raysv, up to its arguments."""
    cluster = os.environ.get(CLUSTER_VARIABLE)
    return f"ray submit {shlex.quote(cluster)} raysv/{name}.py --" if cluster else f"{python()} -m raysv.{name}"


def fetch(path: Path) -> str:
    """How to bring a file or a folder from the cluster; empty where it is here already."""
    cluster = os.environ.get(CLUSTER_VARIABLE)
    slash = "/" if path.is_dir() else ""
    if not cluster:
        return ""
    return f"ray rsync-down {shlex.quote(cluster)} {shlex.quote(str(path) + slash)} {shlex.quote(path.name + slash)}"


def serve(tracking_uri: str) -> str:
    """How to start MLflow's pages over a store, and reach them, if need be, through a tunnel."""
    command = f"mlflow server --backend-store-uri {shlex.quote(tracking_uri)}"
    cluster = os.environ.get(CLUSTER_VARIABLE)
    if cluster:
        return f"ray exec {shlex.quote(cluster)} --port-forward 5000 {shlex.quote(command)}"
    return f"{python()} -m {command}"
