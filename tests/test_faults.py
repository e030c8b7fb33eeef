import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysv.search.faults import FEW, CommonFault


@pytest.fixture
def interrupts() -> Iterator[list[int]]:
    """What of Ctrl-C reached this process."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGINT, before)


def dead(folder: Path, number: int, error: str) -> Any:
    """A trial that died, with the report that Tune leaves of it."""
    report = folder / f"{number}.txt"
    report.write_text(f"Traceback (most recent call last):\n  File ...\n{error}\n")
    return SimpleNamespace(error_file=str(report), trial_id=f"id{number}")


def test_a_fault_of_every_trial_interrupts_the_study_and_is_named(
    tmp_path: Path, interrupts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = CommonFault()
    for number in range(FEW):
        assert not interrupts
        error = f"OSError: [Errno 28] Cannot write /store/{'xyz'[number]}bc_{number:05d}: no space left on device"
        callback.on_trial_error(0, [], dead(tmp_path, number, error))
    assert interrupts == [signal.SIGINT]
    assert f"zbc_{FEW - 1:05d}: no space left on device" in capsys.readouterr().out


def test_a_fault_is_not_everybodys_while_others_train(tmp_path: Path, interrupts: list[int]) -> None:
    callback, error = CommonFault(), "RuntimeError: CUDA error: unspecified launch failure"
    for number in range(FEW + 2):
        callback.on_trial_error(0, [], dead(tmp_path, number, error))
        if not number:
            callback.on_trial_result(0, [], SimpleNamespace(trial_id="id9"), {})
    assert not interrupts
    callback.on_trial_error(0, [], dead(tmp_path, 9, error))
    assert interrupts == [signal.SIGINT]


def test_a_fault_after_the_first_epoch_of_each_is_everybodys(tmp_path: Path, interrupts: list[int]) -> None:
    callback = CommonFault()
    for number in range(FEW):
        callback.on_trial_result(0, [], SimpleNamespace(trial_id=f"id{number}"), {})
        callback.on_trial_error(0, [], dead(tmp_path, number, "OSError: no space left on device"))
    assert interrupts == [signal.SIGINT]


def test_other_causes_and_trials_that_end_well_break_the_row(tmp_path: Path, interrupts: list[int]) -> None:
    callback = CommonFault()
    for number in range(FEW - 1):
        callback.on_trial_error(0, [], dead(tmp_path, number, "RuntimeError: NCCL error"))
    callback.on_trial_error(0, [], dead(tmp_path, 7, "OSError: no space left on device"))
    for number in range(FEW - 1):
        callback.on_trial_error(0, [], dead(tmp_path, number, "RuntimeError: NCCL error"))
    callback.on_trial_complete(0, [], SimpleNamespace())
    callback.on_trial_error(0, [], dead(tmp_path, 8, "RuntimeError: NCCL error"))
    assert not interrupts
