import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysv.search import progress
from raysv.search.progress import Decoding, Progress
from raysv.search.results import METRIC, TIME

EPOCHS = 4


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still unless a test sets it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def trial(number: int, error_file: str | None = None, **values: Any) -> Any:
    """What of a Tune trial is looked at; numbered from 0."""
    config = values or {"loss.margin": 0.25}
    tag = f"{number + 1}_loss.margin=0.2"
    return SimpleNamespace(
        trial_id=f"id{number}", experiment_tag=tag, config=config, last_result={}, error_file=error_file
    )


def progress_of(trials: int, epochs: int, *, kept: Path = Path("nowhere"), single: bool = False) -> Progress:
    return Progress(trials, epochs, kept, single)


def tell(callback: Progress, hook: str, subject: Any, **info: Any) -> None:
    getattr(callback, hook)(iteration=0, trials=[subject], trial=subject, **info)


def report(callback: Progress, subject: Any, epoch: int, eer: float, **more: Any) -> None:
    subject.last_result = {TIME: epoch, METRIC: eer, **more}
    tell(callback, "on_trial_result", subject, result=subject.last_result)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_trial_tells_what_it_tries_how_it_fares_and_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    callback = progress_of(trials=2, epochs=2)
    subject = trial(0, **{"loss.margin": 0.21234, "loss.scale": 30})
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.3)
    report(callback, subject, 2, 0.25)
    tell(callback, "on_trial_complete", subject)
    assert lines(capsys) == [
        "[   0:00] t000  starts   margin 0.212  scale 30",
        "[   0:00] t000  epoch 1/2   EER 30.00 %   lowest 30.00 % (t000)",
        "[   0:00] t000  epoch 2/2   EER 25.00 %   lowest 25.00 % (t000)",
        "[   0:00] t000  done   1 of 2 trials ended",
    ]


def test_the_lowest_so_far_may_be_of_another_trial(capsys: pytest.CaptureFixture[str]) -> None:
    callback = progress_of(trials=2, epochs=EPOCHS)
    report(callback, trial(0), 1, 0.2)
    report(callback, trial(1), 1, 0.3)
    assert lines(capsys)[-1].endswith("t001  epoch 1/4   EER 30.00 %   lowest 20.00 % (t000)")


def test_a_trial_stopped_early_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    callback, subject = progress_of(trials=3, epochs=EPOCHS), trial(0)
    report(callback, subject, 2, 0.4)
    tell(callback, "on_trial_complete", subject)
    assert lines(capsys)[-1].endswith("stopped early after epoch 2   1 of 3 trials ended")


def test_a_trial_that_gave_itself_up_says_why_and_its_stand_in_for_a_result_counts_for_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback, subject = progress_of(trials=3, epochs=EPOCHS), trial(0)
    report(callback, subject, 1, 0.5, failure="The loss became nan.")
    tell(callback, "on_trial_complete", subject)
    assert lines(capsys) == ["[   0:00] t000  failed: The loss became nan.   1 of 3 trials ended"]


def test_a_trial_that_died_says_of_what(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("Traceback\n  File x\nValueError: no file a.wav\n")
    tell(progress_of(trials=3, epochs=EPOCHS), "on_trial_error", trial(0, str(tmp_path / "error.txt")))
    assert lines(capsys) == ["[   0:00] t000  failed: ValueError: no file a.wav   1 of 3 trials ended"]


def test_a_lone_run_needs_no_name_and_no_count(capsys: pytest.CaptureFixture[str]) -> None:
    callback, subject = progress_of(trials=1, epochs=1, single=True), trial(0)
    subject.config = {}
    tell(callback, "on_trial_start", subject)
    report(callback, subject, 1, 0.3)
    tell(callback, "on_trial_complete", subject)
    assert lines(capsys) == ["[   0:00] starts", "[   0:00] epoch 1/1   EER 30.00 %", "[   0:00] done"]


def test_the_time_left_follows_from_the_pace_and_from_how_long_trials_live(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    callback, (first, second, third) = progress_of(trials=4, epochs=EPOCHS), (trial(0), trial(1), trial(2))
    tell(callback, "on_trial_start", first)
    clock[0] = 200.0  # mostly the start of processes, which tells nothing
    report(callback, first, 1, 0.4)
    assert lines(capsys)[-1].endswith("(t000)")
    clock[0] = 260.0
    report(callback, first, 2, 0.4)
    assert lines(capsys)[-1].endswith("about 14:00 left")  # of 16 epochs of a minute each, 14
    tell(callback, "on_trial_complete", first)  # stopped early: so may the others be
    tell(callback, "on_trial_start", second)
    clock[0] = 270.0
    report(callback, second, 1, 0.4)
    assert lines(capsys)[-1].endswith("about 5:00 left")  # of 8 epochs, 5
    tell(callback, "on_trial_start", third)
    report(callback, third, 1, 0.4)
    assert lines(capsys)[-1].endswith("about 2:00 left")  # of 8 epochs, 4, in two trials at a time


def test_a_trial_with_a_checkpoint_goes_on_even_if_nobody_noted_its_results(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "id1" / "epoch-0001").mkdir(parents=True)
    callback = progress_of(trials=2, epochs=EPOCHS, kept=tmp_path)
    for number in range(2):
        tell(callback, "on_trial_start", trial(number))
    assert lines(capsys) == ["[   0:00] t000  starts   margin 0.25", "[   0:00] t001  goes on   margin 0.25"]


def test_a_resumed_study_goes_on_counting_at_its_own_pace(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    callback, done, broken = progress_of(trials=2, epochs=3), trial(0), trial(1)
    for epoch, subject in itertools.product((1, 2), (done, broken)):
        report(callback, subject, epoch, 0.1 * epoch)
    tell(callback, "on_trial_complete", done)
    tell(callback, "on_trial_error", broken)

    again = progress_of(trials=2, epochs=3)
    again.set_state(callback.get_state())
    clock[0] = 1000.0
    again.setup()
    capsys.readouterr()
    tell(again, "on_trial_start", broken)
    clock[0] = 1010.0
    report(again, broken, 3, 0.2)
    tell(again, "on_trial_complete", broken)
    assert lines(capsys) == [
        "[   0:00] t001  starts   margin 0.25",
        "[   0:10] t001  epoch 3/3   EER 20.00 %   lowest 10.00 % (t000)",
        "[   0:10] t001  done   2 of 2 trials ended",
    ]


def test_decoding_speaks_up_only_where_it_takes_long(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    say = Decoding(every_seconds=5)
    for done, clock[0] in enumerate((1.0, 4.0, 6.0, 10.0, 11.5), 1):
        say(done, 9)
    assert lines(capsys) == [
        "decoding audio, once for all trials: 3 of 9",
        "decoding audio, once for all trials: 5 of 9",
    ]
