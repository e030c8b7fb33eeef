import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from raysv.search import autoscaling
from raysv.search.autoscaling import VARIABLE, NodeGroup, node_groups

GPU_NODE = {"CPU": 8.0, "GPU": 1.0}


@pytest.fixture(autouse=True)
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the launcher would leave its configuration."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(autoscaling, "LAUNCHED", file)
    monkeypatch.delenv(VARIABLE, raising=False)
    return file


@pytest.fixture(autouse=True)
def autoscaler(launched: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that was started as Ray's autoscaler is."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", f"--autoscaling-config={launched}"]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


def cloud(**types: dict[str, int]) -> dict[str, object]:
    """A configuration with a head and these worker types, as the launcher fills it out."""
    kinds = {name: {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}} | kind for name, kind in types.items()}
    return {
        "cluster_name": "study",
        "max_workers": 6,
        "provider": {"type": "aws", "region": "us-west-2"},
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0}, **kinds},
    }


def test_without_an_autoscaler_there_are_none() -> None:
    assert node_groups(on_head=True) == []


def test_what_an_earlier_cluster_left_is_not_believed(launched: Path, autoscaler: subprocess.Popen[bytes]) -> None:
    launched.write_text(yaml.safe_dump(cloud(spot={"max_workers": 4})))
    assert node_groups(on_head=True)
    assert node_groups(on_head=False) == []
    autoscaler.kill()
    autoscaler.wait()
    assert node_groups(on_head=True) == []


def test_the_launchers_worker_types_are_told_as_far_as_it_starts_them(launched: Path) -> None:
    config = prepare_config(
        cloud(spot={"max_workers": 4}, steady={"min_workers": 1, "max_workers": 4}, off={"max_workers": 0})
    )
    launched.write_text(yaml.safe_dump(config))
    assert node_groups(on_head=True) == [NodeGroup(4, 0, GPU_NODE), NodeGroup(2, 1, GPU_NODE)]


def test_machines_of_ones_own_are_awaited_although_the_launcher_does_not_know_what_they_have(launched: Path) -> None:
    config = prepare_config(
        {"cluster_name": "mine", "provider": {"type": "local", "head_ip": "h", "worker_ips": ["a", "b"]}}
    )
    launched.write_text(yaml.safe_dump(config))
    assert node_groups(on_head=True) == [NodeGroup(2, 2, {})]


def test_the_environment_names_nodes_before_the_launcher_does(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched.write_text(yaml.safe_dump(cloud(spot={"max_workers": 4})))
    monkeypatch.setenv(VARIABLE, "{count: 3, CPU: 8, GPU: 1}")
    assert node_groups(on_head=True) == [NodeGroup(3, 0, GPU_NODE)]
    monkeypatch.setenv(VARIABLE, "[{count: 3, CPU: 8, GPU: 1}, {count: 1, CPU: 2.5}]")
    assert node_groups(on_head=True) == [NodeGroup(3, 0, GPU_NODE), NodeGroup(1, 0, {"CPU": 2.5})]


@pytest.mark.parametrize(
    "text", ["4", "{CPU: 8}", "{count: -1, CPU: 8}", "{count: 2, CPU: many}", "{count: 2", "{count: 2}"]
)
def test_an_environment_that_says_something_else_is_an_error_that_shows_how(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=r"RAYSV_NODES is .* Set it to, for example, \{count: 4, CPU: 8, GPU: 1\}"):
        node_groups(on_head=True)
