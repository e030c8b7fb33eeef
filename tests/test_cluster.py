import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_nodes

from raysv.search import cluster
from raysv.search.autoscaling import NodeGroup
from raysv.search.cluster import Allotment, allot
from raysv.search.space import ResourcesConfig

HEAD = "node:10.0.0.1"


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what the cluster consists of."""

    def consist_of(*resources: dict[str, float]) -> None:
        there = [{"Alive": True, "Resources": node} for node in resources]
        there[0]["Resources"] = {cluster.HEAD: 1.0, HEAD: 1.0} | there[0]["Resources"]
        gone = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [gone, *there])

    return consist_of


@pytest.mark.parametrize(
    ("there", "resources", "expected"),
    [
        ([{"CPU": 4.0}], ResourcesConfig(), Allotment(0.0, 4, 4, 4, "gloo", "")),
        ([{"CPU": 4.0}], ResourcesConfig(workers=2), Allotment(0.0, 2, 2, 2, "gloo", HEAD)),
        ([{"CPU": 5.0}], ResourcesConfig(workers=2, cpus_per_worker=2), Allotment(0.0, 1, 1, 1, "gloo", HEAD)),
        ([{"CPU": 16.0, "GPU": 4.0}], ResourcesConfig(), Allotment(1.0, 4, 4, 4, "nccl", "")),
        ([{"CPU": 16.0, "GPU": 4.0}], ResourcesConfig(gpus_per_worker=0.0), Allotment(0.0, 16, 16, 16, "gloo", "")),
        (
            [{"CPU": 16.0, "GPU": 4.0}],
            ResourcesConfig(workers=4, cpus_per_worker=4),
            Allotment(1.0, 1, 1, 1, "nccl", HEAD),
        ),
        ([{"CPU": 16.0, "GPU": 1.0}], ResourcesConfig(gpus_per_worker=0.1), Allotment(0.1, 10, 10, 10, "nccl", "")),
        ([{"CPU": 16.0, "GPU": 1.0}], ResourcesConfig(gpus_per_worker=0.3), Allotment(0.3, 3, 3, 3, "nccl", "")),
        ([{"CPU": 16.0, "GPU": 4.0}], ResourcesConfig(gpus_per_worker=0.3), Allotment(0.3, 12, 12, 12, "nccl", "")),
        ([{"CPU": 16.0, "GPU": 4.0}], ResourcesConfig(gpus_per_worker=0.1), Allotment(0.1, 16, 16, 16, "nccl", "")),
    ],
)
def test_as_many_trials_run_at_a_time_as_have_room(
    nodes: Any, there: list[dict[str, float]], resources: ResourcesConfig, expected: Allotment
) -> None:
    nodes(*there)
    assert allot(resources, most_trials=100) == expected


def test_the_workers_of_a_trial_may_lie_on_several_nodes_but_none_on_two(nodes: Any) -> None:
    nodes({"CPU": 3.0}, {"CPU": 3.0}, {"memory": 1e9})
    assert allot(ResourcesConfig(workers=6), 100).concurrent_trials == 1
    assert allot(ResourcesConfig(workers=2, cpus_per_worker=2), 100).concurrent_trials == 1
    with pytest.raises(ValueError, match=r"6 CPUs and 0 GPUs on 3 node\(s\), room for 2"):
        allot(ResourcesConfig(workers=3, cpus_per_worker=2), 100)


def test_gpus_without_cpus_beside_them_are_of_no_use(nodes: Any) -> None:
    nodes({"CPU": 1.0, "GPU": 8.0}, {"CPU": 64.0})
    assert allot(ResourcesConfig(), 100).concurrent_trials == 1


def test_no_more_trials_run_at_a_time_than_asked_for(nodes: Any) -> None:
    nodes({"CPU": 64.0})
    assert allot(ResourcesConfig(), most_trials=3) == Allotment(0.0, 3, 64, 64, "gloo", "")


def test_a_trial_that_fits_nowhere_is_an_error_that_says_what_there_is(nodes: Any) -> None:
    nodes({"CPU": 2.0})
    with pytest.raises(ValueError, match=r"4 workers with 1 CPU and 0 GPU each.* 2 CPUs and 0 GPUs.* room for 2"):
        allot(ResourcesConfig(workers=4), 100)
    with pytest.raises(ValueError, match=r"1 workers with 1 CPU and 1 GPU each.* room for 0.*gpus_per_worker"):
        allot(ResourcesConfig(gpus_per_worker=1.0), 100)


def test_nodes_that_an_autoscaler_may_start_count_as_room(nodes: Any) -> None:
    nodes({"CPU": 2.0})
    gpu_nodes = NodeGroup(4, 0, {"CPU": 16.0, "GPU": 2.0})
    assert allot(ResourcesConfig(), 100, [gpu_nodes]) == Allotment(1.0, 8, 8, 0, "nccl", "")
    assert allot(ResourcesConfig(workers=4), 100, [gpu_nodes]) == Allotment(1.0, 2, 2, 0, "nccl", HEAD)
    assert allot(ResourcesConfig(), 3, [gpu_nodes]).concurrent_trials == 3  # it is asked for no more
    assert allot(ResourcesConfig(gpus_per_worker=0.0), 100, [gpu_nodes]) == Allotment(0.0, 66, 66, 2, "gloo", "")
    with pytest.raises(ValueError, match=r"66 CPUs and 8 GPUs on 5 node\(s\), room for 0"):
        allot(ResourcesConfig(gpus_per_worker=4.0), 1, [gpu_nodes])


def test_nodes_that_have_come_are_not_counted_twice(nodes: Any) -> None:
    nodes({"CPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0})
    assert allot(ResourcesConfig(), 100, [NodeGroup(3, 0, {"CPU": 16.0, "GPU": 2.0})]) == Allotment(
        1.0, 6, 6, 4, "nccl", ""
    )
    # machines of one's own: the launcher does not know what they have, Ray does once they are there
    assert allot(ResourcesConfig(), 100, [NodeGroup(2, 2, {})]) == Allotment(1.0, 4, 4, 4, "nccl", "")


def test_a_cluster_that_does_not_tell_its_head_node_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, HEAD: 1.0}}])
    with pytest.raises(ValueError, match=r"does not tell its head node.*ray start --head"):
        allot(ResourcesConfig(workers=2), 1)
    assert allot(ResourcesConfig(), 1).room == 2  # a lone worker is placed wherever there is room


def test_an_allotment_is_described_in_words() -> None:
    assert Allotment(0.0, 1, 1, 1, "gloo", HEAD).describe(ResourcesConfig()) == (
        "1 trial at a time, 1 worker a trial with 1 CPU and no GPU each (gloo)"
    )
    assert Allotment(1.0, 3, 3, 3, "nccl", HEAD).describe(ResourcesConfig(workers=2, cpus_per_worker=8)) == (
        "3 trials at a time, 2 workers a trial with 8 CPU and 1 GPU each (nccl)"
    )


@pytest.fixture
def environment() -> Iterator[Any]:
    """The environment, restored afterwards."""
    before = dict(os.environ)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_an_address_where_nobody_listens_is_an_error_at_once(environment: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    told = f"No Ray cluster answers at 127.0.0.1:{port}: .*refused.* local to run"
    with pytest.raises(ValueError, match=told), cluster.connected():
        pass


def test_an_address_for_clients_outside_is_an_error_that_says_what_to_do(environment: Any) -> None:
    environment["RAY_ADDRESS"] = "ray://head:10001"
    with pytest.raises(ValueError, match="ray job submit"), cluster.connected():
        pass


@pytest.mark.slow
def test_a_private_cluster_is_found_by_all_its_processes_although_there_is_another(environment: Any) -> None:
    def nodes_found() -> list[str]:
        return [node.node_id for node in list_nodes(timeout=30)]

    environment["RAY_ADDRESS"] = "local"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # not Ray's own, which any other Ray of this machine may have
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": port})
    try:
        with cluster.connected() as found:
            assert found == ("this machine alone", [])
            (own,) = [node["NodeID"] for node in ray.nodes()]
            assert nodes_found() == ray.get(ray.remote(nodes_found).remote()) == [own]
            assert allot(ResourcesConfig(gpus_per_worker=0.0), 1).concurrent_trials == 1
        assert not ray.is_initialized()

        environment["RAY_ADDRESS"] = other.address
        with cluster.connected() as found:
            assert found == (f"the cluster at {other.address}", [])
            assert [node["NodeID"] for node in ray.nodes()] == [other.head_node.node_id]
    finally:
        other.shutdown()
