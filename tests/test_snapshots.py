import errno
import json
import pickle
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.callback import CallbackList

from raysv.search import snapshots
from raysv.search.snapshots import (
    BEGAN,
    COUNTER,
    KINDS,
    TRIALS,
    TUNER,
    Spare,
    await_clock,
    mend,
    newest,
    remove_spares,
    set_aside,
)

FIRST, SECOND = "2025-11-30_10-00-00", "2025-11-30_11-00-00"


def written(folder: Path, session: str, trials: int) -> Path:
    """What a driver leaves that began at a time; only the record of the trials is JSON, whatever the names say."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        told = {"trial_data": list(range(trials)), "counter": trials}
        content = json.dumps(told).encode() if kind == TRIALS else pickle.dumps(told)
        (folder / kind.replace("*", session)).write_bytes(content)
    (folder / TUNER).write_bytes(pickle.dumps("tuner"))
    return folder


def told(folder: Path) -> dict[str, int]:
    """By file, how many trials it knows of."""
    return {
        file.name: (json.loads if "experiment" in file.name else pickle.loads)(file.read_bytes())["counter"]
        for kind in KINDS
        for file in folder.glob(kind)
    }


def of(session: str, trials: int) -> dict[str, int]:
    return {kind.replace("*", session): trials for kind in KINDS}


def tear(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"t") + 1])


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    """Tune's folder after a driver with two trials."""
    return written(tmp_path / "tune", FIRST, 2)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """Where that driver had written them first."""
    return written(tmp_path / "staging", FIRST, 1)


def test_the_newest_record_is_read_or_where_it_is_torn_its_copy(tune: Path, staging: Path, tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert set_aside(staging, tune)
    written(tune, SECOND, 3)
    assert newest(tune) == tune / f"experiment_state-{SECOND}.json"
    tear(tune / f"experiment_state-{SECOND}.json")
    copy = newest(tune)
    assert copy is not None
    assert json.loads(copy.read_text())["counter"] == 1
    remove_spares(tune)
    with pytest.raises(ValueError, match=rf"{SECOND}\.json cannot be read, .* Remove all files \*-{SECOND}\.\*"):
        newest(tune)


def test_what_is_whole_is_left_as_it_is(tune: Path, staging: Path, tmp_path: Path) -> None:
    assert mend(tmp_path / "nothing yet") == ""
    set_aside(staging, tune)
    written(tune, SECOND, 3)
    before = told(tune)
    assert mend(tune) == ""
    assert told(tune) == before


@pytest.mark.parametrize("torn", [*(kind.replace("*", SECOND) for kind in KINDS), TUNER])
@pytest.mark.parametrize("how", ["torn", "missing"])
def test_a_copy_takes_the_place_of_all_files_where_one_is_torn(torn: str, how: str, tune: Path, staging: Path) -> None:
    set_aside(staging, tune)
    written(tune, SECOND, 3)
    (tune / "trial").mkdir()
    if how == "torn":
        tear(tune / torn)
    else:
        (tune / torn).unlink()
    assert "was torn when its driver was killed" in mend(tune)
    assert told(tune) == of(FIRST, 2) | of(SECOND, 1)  # the last are what Tune reads
    assert pickle.loads((tune / TUNER).read_bytes()) == "tuner"
    assert (tune / "trial").is_dir()
    assert mend(tune) == ""


def test_a_search_that_has_counted_more_trials_than_tune_has_is_of_another_moment(tune: Path, staging: Path) -> None:
    newer = pickle.dumps({"counter": 3})
    (tune / COUNTER.replace("*", FIRST)).write_bytes(newer)
    assert mend(tune) == ""  # without a copy there is nothing better
    assert (tune / COUNTER.replace("*", FIRST)).read_bytes() == newer
    set_aside(staging, tune)
    assert "was torn" in mend(tune)
    assert told(tune) == of(FIRST, 1)


def test_without_a_copy_nothing_is_thrown_away(tune: Path) -> None:
    tear(tune / f"searcher-state-{FIRST}.pkl")
    before = {file.name: file.read_bytes() for file in tune.iterdir()}
    with pytest.raises(ValueError, match="there is no copy"):
        mend(tune)
    assert {file.name: file.read_bytes() for file in tune.iterdir()} == before


@pytest.mark.parametrize("writes", range(len(KINDS) + 1))
def test_mending_that_is_broken_off_is_begun_again(
    writes: int, tune: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_aside(staging, tune)
    for kind in KINDS:
        tear(tune / kind.replace("*", FIRST))
    write, left = snapshots._write, [None] * writes

    def full(target: Path, content: bytes) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        write(target, content)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            mend(tune)
    mend(tune)
    assert told(tune) == of(FIRST, 1)


def test_what_is_torn_is_not_put_aside_and_the_copy_before_stays(tune: Path, staging: Path) -> None:
    assert set_aside(staging, tune)
    written(staging, FIRST, 2)
    tear(staging / f"callback-states-{FIRST}.pkl")
    assert not set_aside(staging, tune)
    tear(tune / f"experiment_state-{FIRST}.json")
    mend(tune)
    assert told(tune) == of(FIRST, 1)


def test_of_copies_the_last_stays_and_what_is_none_does_not_count(tune: Path, staging: Path, tmp_path: Path) -> None:
    for number in range(12):
        written(staging, FIRST, number)
        assert set_aside(staging, tune)
    home = tmp_path / "tune-spare"
    for stranger in ("13.partial", "@eaDir"):
        (home / stranger).mkdir()
    assert sorted(place.name for place in home.iterdir()) == ["12", "13.partial", "@eaDir"]
    tear(tune / f"experiment_state-{FIRST}.json")
    mend(tune)
    assert told(tune) == of(FIRST, 11)
    assert set_aside(staging, tune)
    assert sorted(place.name for place in home.iterdir()) == ["13", "@eaDir"]


def test_a_clock_that_was_set_back_is_waited_for_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(snapshots.time, "sleep", slept.append)
    await_clock(tmp_path / "nothing yet")
    now = datetime.now()
    tune = written(tmp_path / "tune", FIRST, 1)
    await_clock(tune)
    assert not slept
    written(tune, (now + timedelta(seconds=20)).strftime(BEGAN), 1)
    await_clock(tune)
    assert 18 < slept.pop() < 22
    assert "Waiting" in capsys.readouterr().out
    written(tune, (now + timedelta(hours=2)).strftime(BEGAN), 1)
    with pytest.raises(ValueError, match=r"By this machine's clock and time zone it is .* driver began at .* set TZ"):
        await_clock(tune)
    assert not slept


class Driver:
    """What of Tune calls a callback."""

    def __init__(self, callback: Spare, staging: Path) -> None:
        self._callbacks = CallbackList([pickle.loads(pickle.dumps(callback))])
        self._trial = SimpleNamespace(storage=SimpleNamespace(experiment_driver_staging_path=str(staging)))
        self._callbacks.set_state(CallbackList([callback]).get_state() or {})
        self._callbacks.setup()

    def step(self, trials: int = 1) -> None:
        self._callbacks.on_step_begin(iteration=1, trials=[self._trial] * trials)
        self._callbacks.on_step_end(iteration=1, trials=[self._trial] * trials)


def copied(tune: Path) -> int:
    (place,) = tune.with_name("tune-spare").iterdir()
    (trials,) = set(told(place).values())
    return trials


def test_copies_are_made_at_once_and_then_now_and_then_in_every_life_of_a_driver(
    tmp_path: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    tune = tmp_path / "tune"
    tune.mkdir()
    (tune / TUNER).write_bytes(pickle.dumps("tuner"))
    driver = Driver(Spare(tune, every_seconds=30), staging)
    driver.step(trials=0)
    assert not (tmp_path / "tune-spare").exists()  # there is nothing yet
    driver.step()
    assert copied(tune) == 1
    written(staging, FIRST, 2)
    now += 29
    driver.step()
    assert copied(tune) == 1
    now += 2
    driver.step()
    assert copied(tune) == 2
    now = 5.0  # after a reboot the clock has begun anew
    written(staging, FIRST, 3)
    Driver(Spare(tune, every_seconds=30), staging).step()
    assert copied(tune) == 3


def test_a_copy_that_cannot_be_made_stops_nothing(
    tune: Path, staging: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.with_name("tune-spare").write_text("no folder")
    driver = Driver(Spare(tune, every_seconds=0), staging)
    driver.step()
    driver.step()
    assert capsys.readouterr().out.count("No copy of Tune's record can be made") == 1


def test_a_study_that_tune_could_not_restore_is_not_begun_anew(tune: Path, staging: Path) -> None:
    with pytest.raises(RuntimeError, match="Tune could not restore the trials"):
        Driver(Spare(tune), staging).step(trials=0)
    written(tune, FIRST, 0)
    Driver(Spare(tune), staging).step(trials=0)
