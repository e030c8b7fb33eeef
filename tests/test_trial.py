"""What a trial and its workers take of the cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray.tune

from raysv.search import worker
from raysv.search.results import NO_ROOM
from raysv.search.space import space_from_dict
from raysv.search.trial import Job, run_trial


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


@pytest.mark.parametrize("gpus", [0.0, 0.5, 1.0])
def test_the_search_learns_of_a_batch_that_does_not_fit_unless_others_may_have_taken_the_room(
    gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{NO_ROOM} 8 speakers")

    told: list[Any] = []
    monkeypatch.setattr(worker, "train_alone", run_out_of_memory)
    monkeypatch.setattr(ray.tune, "report", told.append)
    monkeypatch.setattr(ray.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a"))
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "1")
    job = Job(space_from_dict({}, "small"), gpus, "/storage", {}, room=1, head="")
    if gpus == 0.5:
        with pytest.raises(RuntimeError, match="8 speakers"):
            run_trial({}, job)
        assert told == []
    else:
        run_trial({}, job)
        assert [result["failure"] for result in told] == [f"{NO_ROOM} 8 speakers"]
