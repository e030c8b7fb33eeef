"""What a trial and its workers take of the cluster."""

import pytest

from raysv.search.space import space_from_dict
from raysv.search.trial import Job


@pytest.mark.parametrize(
    ("workers", "gpus", "of_worker", "of_trial"),
    [
        (1, 0.0, {"CPU": 2.0}, {"CPU": 2.0}),
        (1, 0.5, {"CPU": 2.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 0.5}),
        (4, 1.0, {"CPU": 2.0, "GPU": 1.0}, {"node:__internal_head__": 0.01}),
    ],
)
def test_a_lone_worker_is_the_trial_and_several_stand_beside_it(
    workers: int, gpus: float, of_worker: dict[str, float], of_trial: dict[str, float]
) -> None:
    space = space_from_dict({"resources": {"workers": workers, "cpus_per_worker": 2}}, "small")
    job = Job(space, gpus, "/storage", {})
    assert (job.worker_resources, job.trial_resources) == (of_worker, of_trial)
