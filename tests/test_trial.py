"""What a trial and its workers take of the cluster."""

import pytest

from raysv.search.space import space_from_dict
from raysv.search.trial import Job


@pytest.mark.parametrize(
    ("workers", "gpus", "of_worker", "of_trial"),
    [
        (1, 0.0, {"CPU": 2.0}, {"CPU": 2.0}),
        (1, 0.5, {"CPU": 2.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 0.5}),
        (4, 1.0, {"CPU": 2.0, "GPU": 1.0}, {"node:10.0.0.1": 0.25}),
    ],
)
def test_a_lone_worker_is_the_trial_and_several_stand_beside_it(
    workers: int, gpus: float, of_worker: dict[str, float], of_trial: dict[str, float]
) -> None:
    space = space_from_dict({"resources": {"workers": workers, "cpus_per_worker": 2}}, "small")
    job = Job(space, gpus, "/storage", {}, room=4, head="node:10.0.0.1")
    assert (job.worker_resources, job.trial_resources) == (of_worker, of_trial)


@pytest.mark.parametrize("room", [1, 2, 3, 7, 30, 31, 64, 99])
def test_as_many_trials_of_teams_start_as_have_room_and_not_one_more(room: int) -> None:
    space = space_from_dict({"resources": {"workers": 2}}, "small")
    job = Job(space, 0.0, "/storage", {}, room=room, head="node:10.0.0.1")
    share = job.trial_resources["node:10.0.0.1"]
    assert room * share < 1 + 1e-9 < (room + 1) * share


def test_a_trial_of_a_cluster_without_end_still_takes_something_of_the_head_node() -> None:
    space = space_from_dict({"resources": {"workers": 2}}, "small")
    assert list(Job(space, 0.0, "/storage", {}, room=100_000, head="node:10.0.0.1").trial_resources.values()) == [
        0.0001
    ]
