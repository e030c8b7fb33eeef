"""A team of real Ray Train workers that trains task after task, and is killed meanwhile."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from learning_fixtures import tiny_config, write_corpus

from raysv.config import config_to_dict
from raysv.learning.checkpoint import load_training_state
from raysv.learning.training import fit
from raysv.search.desk import Task, WorkersError

WORKERS, EPOCHS = 2, 3
# rounding stays rounding where nothing is chaotic yet
CALM = {"optimizer__learning_rate": 1e-5, "training__epochs": EPOCHS, "batch__speakers": 3}
BESIDE = {"CPU": 0.0, "node:__internal_head__": 0.01}  # what fits beside the other team
Result = dict[str, Any]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray Train, here in the test's own process, has its own
]


class LeftError(Exception):
    """What a report raises when its trial is stopped."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("team") / "corpus")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two workers in a private Ray."""
    from raysv.search import cluster
    from raysv.search.team import Team

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        with cluster.connected():
            yield Team(WORKERS, {"CPU": 1.0}, str(tmp_path_factory.mktemp("storage")))


def task(root: Path, name: str, **values: Any) -> Task:
    config = config_to_dict(tiny_config(root, **(CALM | values)))
    return Task(config, str(root / "kept" / name), threads=1, tests=False)


def results_of(team: Any, chosen: Task, leave_after: int = 99, at_first: Any = None) -> list[Result]:
    told: list[Result] = []

    def report(result: Result) -> None:
        told.append(result)
        if at_first and len(told) == 1:
            at_first()
        if len(told) == leave_after:
            raise LeftError

    team.train(chosen, report)
    return told


def worker_pids() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended, or about to be buried
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> list[Result]:
    """What a lone worker reports that nobody disturbs."""
    told: list[Result] = []
    fit(tiny_config(root, **CALM), lambda metrics, _: told.append(metrics))
    return told


def assert_like(told: list[Result], undisturbed: list[Result]) -> None:
    assert [result["epoch"] for result in told] == list(range(1, EPOCHS + 1))
    for ours, theirs in zip(told, undisturbed, strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)
        assert ours["dev/eer"] == pytest.approx(theirs["dev/eer"], abs=1e-4)


def test_a_team_trains_task_after_task_in_the_same_processes(team: Any, root: Path, undisturbed: list[Result]) -> None:
    assert_like(results_of(team, task(root, "one")), undisturbed)
    workers = worker_pids()
    assert len(workers) == WORKERS
    assert_like(results_of(team, task(root, "two")), undisturbed)
    assert worker_pids() == workers


def test_a_trial_that_is_stopped_leaves_its_workers_to_the_next(
    team: Any, root: Path, undisturbed: list[Result]
) -> None:
    with pytest.raises(LeftError):
        results_of(team, task(root, "stopped"), leave_after=1)
    workers = worker_pids()
    assert_like(results_of(team, task(root, "after")), undisturbed)
    assert worker_pids() == workers
    assert [folder.name for folder in (root / "kept" / "stopped").iterdir()] == ["epoch-0001"]  # not one epoch more


def test_a_task_whose_worker_is_killed_within_an_epoch_goes_on_and_ends_as_if_undisturbed(
    team: Any, root: Path
) -> None:
    """With batches large enough for an epoch to take a while, and learning enough for everything to matter."""
    values = {"model__channels": 64, "batch__crop_seconds": 3.0, "optimizer__learning_rate": 0.003}
    undisturbed, disturbed = (task(root, name, **values) for name in ("left alone", "killed"))
    expected = results_of(team, undisturbed)
    workers, killed = worker_pids(), []

    def kill() -> None:
        os.kill(max(workers), signal.SIGKILL)
        killed.append(time.monotonic())
        assert not Path(disturbed.kept, "epoch-0002").exists()

    # trained are 7 steps an epoch; the timer runs from the moment at which the second may begin
    half = threading.Timer(0.4 * expected[1]["speed/epoch_seconds"], kill)
    told = results_of(team, disturbed, at_first=half.start)
    half.join()
    assert killed and not workers & worker_pids()
    assert [result["epoch"] for result in told] == [1, 1, 2, 3]  # the new workers say where they go on
    for ours, theirs in zip(told[1:], expected, strict=True):
        for name in ("loss/total", "dev/eer", "train/gradient_norm", "schedule/learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    state, other = (load_training_state(Path(one.kept, "epoch-0003"))[:2] for one in (disturbed, undisturbed))
    torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-6)


def test_a_task_that_cannot_be_trained_fails_at_once_and_the_next_is_trained(
    team: Any, root: Path, undisturbed: list[Result]
) -> None:
    with pytest.raises(WorkersError, match=r"ValueError.*batch\.speakers"):
        results_of(team, task(root, "impossible", batch__speakers=100))
    assert_like(results_of(team, task(root, "possible")), undisturbed)


def test_workers_that_cannot_come_together_fail_the_task_instead_of_waiting_for_ever(
    team: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from raysv.search import team as module

    def come_to_nothing(setup: dict[str, Any]) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(module, "serve", come_to_nothing)
    with pytest.raises(WorkersError, match="no network"):
        results_of(module.Team(1, BESIDE, str(tmp_path / "trials")), task(root, "never"))
    assert ray.is_initialized()
