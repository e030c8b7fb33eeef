"""A task trained in this process, as a lone worker does."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_fixtures import tiny_config

from raysv.config import config_to_dict
from raysv.search.desk import Task
from raysv.search.results import CHANCE
from raysv.search.worker import train_alone

Result = dict[str, Any]


class LeftError(Exception):
    """What a report raises to stop a training."""


def task(root: Path, **values: Any) -> Task:
    return Task(config_to_dict(tiny_config(root, **values)), str(root / "kept"), threads=1, tests=False)


def results_of(chosen: Task, leave_after: int = 99) -> list[Result]:
    told: list[Result] = []

    def report(result: Result) -> None:
        told.append(result)
        if len(told) == leave_after:
            raise LeftError

    train_alone(chosen, report, gpu=False)
    return told


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_epoch_is_reported_with_its_checkpoint(tiny_corpus: Path) -> None:
    told = results_of(task(tiny_corpus))
    assert [result["epoch"] for result in told] == [1, 2]
    assert [Path(result["checkpoint_path"]).name for result in told] == ["epoch-0001", "epoch-0002"]
    assert {folder.name for folder in (tiny_corpus / "kept").iterdir()} == {"epoch-0001", "epoch-0002"}


def test_a_task_goes_on_from_its_last_checkpoint_to_the_same_end(tiny_corpus: Path) -> None:
    with pytest.raises(LeftError):
        results_of(task(tiny_corpus), leave_after=1)
    rest = results_of(task(tiny_corpus))
    assert [result["epoch"] for result in rest] == [1, 2]
    undisturbed = results_of(Task(**vars(task(tiny_corpus)) | {"kept": str(tiny_corpus / "other")}))
    assert rest[-1]["dev/eer"] == undisturbed[-1]["dev/eer"]
    assert rest[-1]["loss/total"] == pytest.approx(undisturbed[-1]["loss/total"], rel=1e-6)


def test_a_task_whose_checkpoint_was_damaged_goes_on_from_the_one_before_and_says_so(tiny_corpus: Path) -> None:
    told = results_of(task(tiny_corpus))
    state = tiny_corpus / "kept" / "epoch-0002" / "training_state.pt"
    os.truncate(state, state.stat().st_size - 1)
    before, again = results_of(task(tiny_corpus))
    assert "epoch-0002 (training_state.pt differs from its checksum)" in before.pop("notice")
    assert (again["epoch"], again["dev/eer"]) == (2, told[-1]["dev/eer"])
    assert again["loss/total"] == pytest.approx(told[-1]["loss/total"], rel=1e-6)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import test_worker
chosen = test_worker.task(Path(sys.argv[1]), model__channels=4096)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 400 * 2**20,) * 2)
test_worker.results_of(chosen)
"""


def test_a_task_that_does_not_fit_into_memory_names_its_batch_and_its_peak(tiny_corpus: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_corpus)]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"raysv\.search\.worker\.NoRoomError: Out of memory with a batch of \d+ speakers × ", last), last
    assert re.search(r"the process had \d+\.\d GB at most\. Lower batch\.speakers", last)


def test_a_finished_task_that_is_asked_for_again_tells_how_it_ended(tiny_corpus: Path) -> None:
    told = results_of(task(tiny_corpus))
    assert results_of(task(tiny_corpus)) == [told[-1]]


def test_a_task_that_diverges_is_as_good_as_guessing(tiny_corpus: Path) -> None:
    wild = task(tiny_corpus, optimizer__learning_rate=1e30, optimizer__warmup_epochs=0)
    (told,) = results_of(wild)
    assert (told["epoch"], told["dev/eer"]) == (1, CHANCE)
    assert "Lower optimizer.learning_rate" in told["failure"]
