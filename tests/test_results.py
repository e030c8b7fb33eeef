import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysv.search.results import METRIC, TIME, error_in, metrics_by_epoch, outcome, trial_name

WORKER_REPORT = """Failure # 1 (occurred at 2026-11-20_10-00-00)
The actor died unexpectedly before finishing this task.
Failure # 2 (occurred at 2026-11-20_10-01-00)
ray.exceptions.RayTaskError(WorkerGroupError): ray::ImplicitFunc.train() (pid=1, ip=127.0.0.1)
  File "controller.py", line 10, in run
    raise ValueError("not this line")
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 0 Error Snippet]:
Traceback (most recent call last):
  File "trial.py", line 90, in train_worker
ValueError: no file data/a.wav
  name another one
"""


@pytest.mark.parametrize(
    ("last", "end", "reason"),
    [
        ({TIME: 3, METRIC: 0.1}, "complete", ""),
        ({TIME: 2, METRIC: 0.1}, "pruned", ""),
        ({TIME: 3, METRIC: 0.5, "failure": "the loss is NaN"}, "error", "the loss is NaN"),
        ({}, "error", "The trial ended without reporting a result."),
    ],
)
def test_the_last_result_tells_how_a_trial_ended(last: dict[str, object], end: str, reason: str) -> None:
    assert outcome(last, epochs=3) == (end, reason)


def test_the_error_in_a_trial_is_the_last_exception_in_its_report(tmp_path: Path) -> None:
    report = tmp_path / "error.txt"
    for text, reason in [
        (WORKER_REPORT, "ValueError: no file data/a.wav"),
        ("Failure # 1\nThe actor died.\n\n", "The actor died."),
        ("", "The trial ended without a report of its error."),
    ]:
        report.write_text(text)
        assert error_in(report) == reason


@pytest.mark.parametrize("file", [None, "gone/error.txt"])
def test_a_report_that_is_gone_is_said_to_be(file: str | None) -> None:
    assert error_in(file) == "The trial ended without a report of its error."


def test_trials_are_named_by_their_number_from_0_where_tune_counts_from_1() -> None:
    assert trial_name(SimpleNamespace(experiment_tag="13_loss.margin=0.2", trial_id="abc")) == "t012"
    assert trial_name(SimpleNamespace(experiment_tag="", trial_id="abc")) == "abc"


def test_a_result_tells_its_metrics_without_tunes_bookkeeping() -> None:
    result = {TIME: 2, METRIC: 0.1, "training_iteration": 7, "pid": 3, "done": True, "hostname": "x", "time_total_s": 9}
    assert metrics_by_epoch(result) == {2: {METRIC: 0.1, "time_total_s": 9.0}}
    assert metrics_by_epoch({"pid": 3}) == {}


def test_epochs_before_a_result_come_from_its_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({TIME: epoch, METRIC: eer}) for epoch, eer in ((1, 0.4), (2, 0.3))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = {TIME: 2, METRIC: 0.3, "time_total_s": 9, "checkpoint_path": str(tmp_path)}
    assert metrics_by_epoch(result) == {1: {METRIC: 0.4}, 2: {METRIC: 0.3, "time_total_s": 9.0}}
    assert metrics_by_epoch(result | {"checkpoint_path": str(tmp_path / "gone")}).keys() == {2}
