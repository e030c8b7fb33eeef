from functools import partial

import pytest

from raysv.search import outbox
from raysv.search.outbox import Outbox


def test_an_entry_that_mlflow_refuses_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "RETRY_SHARE", 0.0)
    made: list[str] = []

    def refused() -> None:
        made.append("refused")
        raise ValueError("not so")

    entries = Outbox(recover=lambda: None)
    entries.put(refused)
    entries.put(lambda: made.append("a"))
    entries.put(lambda: made.append("b"))
    assert made == ["refused"] * outbox.ATTEMPTS + ["a", "b"]
    entries.empty()
    assert [record.message for record in caplog.records] == [
        "MLflow: ValueError: not so. The study goes on.",
        "1 entries could not be written to MLflow. Tune's own results and the checkpoints are complete; once MLflow "
        "answers, --resume of the study writes what is missing.",
    ]


def test_while_nothing_answers_entries_wait_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [0.0], [True]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])
    made: list[int] = []

    def answer() -> None:
        if out[0]:
            raise ConnectionError("no answer")

    def entry(number: int) -> None:
        answer()
        made.append(number)

    entries = Outbox(recover=answer)
    for number in range(10):  # more than ATTEMPTS: an outage of any length costs nothing
        entries.put(partial(entry, number))
        now[0] += outbox.RETRY_SECONDS
    assert made == []
    out[0] = False
    entries.put(partial(entry, 10))
    assert made == list(range(11))


def test_a_server_that_accepts_and_never_answers_holds_the_study_up_for_a_tenth_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, waited = [0.0], [0.0]
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now[0])

    def time_out() -> None:
        now[0] += 40.0
        waited[0] += 40.0
        raise TimeoutError

    entries = Outbox(recover=time_out)
    while now[0] < 36_000:
        entries.put(time_out)
        now[0] += 5.0
    assert 1000 < waited[0] < 3600


def test_what_cannot_be_written_at_the_end_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(outbox.time, "sleep", slept.append)

    def unreachable() -> None:
        raise ConnectionError("no answer")

    entries = Outbox(recover=unreachable)
    entries.put(unreachable)
    entries.put(unreachable)
    entries.empty()
    assert "2 entries could not be written to MLflow" in caplog.messages[-1]
    assert "MLflow does not answer. Waiting 60 s for it." in caplog.messages
    assert 60 < sum(slept) < 180
