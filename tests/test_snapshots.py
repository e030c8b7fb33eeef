import json
import os
import pickle
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.callback import CallbackList

from raysv.search import snapshots
from raysv.search.snapshots import BEGAN, KINDS, TRIALS, TUNER, Spare, forget, mend, newest, set_aside

FIRST, SECOND = "2025-11-30_10-00-00", "2025-11-30_11-00-00"


def written(folder: Path, session: str, told: object) -> Path:
    """What a driver leaves that began at a time; only the record of the trials is JSON, whatever the names say."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        content = json.dumps(told).encode() if kind == TRIALS else pickle.dumps(told)
        (folder / kind.replace("*", session)).write_bytes(content)
    (folder / TUNER).write_bytes(pickle.dumps("tuner"))
    return folder


def told(folder: Path) -> dict[str, Any]:
    files = [file for file in folder.iterdir() if file.is_file() and file.name != TUNER]
    return {
        file.name: json.loads(file.read_bytes()) if "experiment" in file.name else pickle.loads(file.read_bytes())
        for file in files
    }


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.fixture
def tune(tmp_path: Path) -> Path:
    return tmp_path / "tune"


def test_the_newest_record_is_read_or_where_it_is_torn_its_copy(tune: Path, tmp_path: Path) -> None:
    assert newest(tune) is None
    written(tune, FIRST, "first")
    assert set_aside(written(tmp_path / "staging", FIRST, "copy"), tune)
    written(tune, SECOND, "second")
    assert newest(tune) == tune / f"experiment_state-{SECOND}.json"
    tear(tune / f"experiment_state-{SECOND}.json")
    copy = newest(tune)
    assert copy is not None
    assert json.loads(copy.read_text()) == "copy"
    forget(tune)
    with pytest.raises(ValueError, match=rf"{SECOND}\.json cannot be read, .* Remove all files \*-{SECOND}\.\*"):
        newest(tune)


def test_what_is_whole_is_left_as_it_is(tune: Path, tmp_path: Path) -> None:
    assert mend(tune) == ""
    written(tune, FIRST, "first")
    set_aside(written(tmp_path / "staging", FIRST, "copy"), tune)
    written(tune, SECOND, "second")
    before = told(tune)
    assert mend(tune) == ""
    assert told(tune) == before


@pytest.mark.parametrize("torn", [*(kind.replace("*", SECOND) for kind in KINDS), TUNER])
@pytest.mark.parametrize("how", ["torn", "missing"])
def test_a_copy_takes_the_place_of_all_files_where_one_is_torn(torn: str, how: str, tune: Path, tmp_path: Path) -> None:
    written(tune, FIRST, "first")
    set_aside(written(tmp_path / "staging", FIRST, "copy"), tune)
    written(tune, SECOND, "second")
    (tune / "trial").mkdir()
    if how == "torn":
        tear(tune / torn)
    else:
        (tune / torn).unlink()
    assert "was torn when its driver was killed" in mend(tune)
    assert told(tune) == {kind.replace("*", FIRST): "copy" for kind in KINDS}
    assert pickle.loads((tune / TUNER).read_bytes()) == "tuner"
    assert (tune / "trial").is_dir()
    assert mend(tune) == ""


def test_without_a_copy_nothing_is_thrown_away_but_what_has_no_result(tune: Path) -> None:
    written(tune, FIRST, "first")
    tear(tune / f"searcher-state-{FIRST}.pkl")
    (tune / "trial").mkdir()
    (tune / "trial" / "result.json").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="there is no copy"):
        mend(tune)
    assert len(told_names(tune)) == len(KINDS)
    (tune / "trial" / "result.json").write_text("")
    assert mend(tune) == ""
    assert told_names(tune) == set()
    assert newest(tune) is None


def told_names(folder: Path) -> set[str]:
    return {file.name for kind in KINDS for file in folder.glob(kind)}


def test_what_is_torn_is_not_put_aside_and_the_copy_before_stays(tune: Path, tmp_path: Path) -> None:
    staging = written(tmp_path / "staging", FIRST, "early")
    written(tune, FIRST, "early")
    assert set_aside(staging, tune)
    written(staging, FIRST, "late")
    tear(staging / f"callback-states-{FIRST}.pkl")
    assert not set_aside(staging, tune)
    written(tune, FIRST, "late")
    tear(tune / f"experiment_state-{FIRST}.json")
    mend(tune)
    assert set(told(tune).values()) == {"early"}


def test_of_copies_the_last_stays_and_one_that_was_broken_off_does_not_count(tune: Path, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    written(tune, FIRST, "early")
    for number in range(12):
        written(staging, FIRST, number)
        assert set_aside(staging, tune)
    home = tmp_path / "tune-spare"
    (home / "000013.partial").mkdir()
    assert sorted(place.name for place in home.iterdir()) == ["000012", "000013.partial"]
    written(tune, FIRST, "late")
    tear(tune / f"experiment_state-{FIRST}.json")
    mend(tune)
    assert set(told(tune).values()) == {11}
    assert set_aside(staging, tune)
    assert [place.name for place in home.iterdir()] == ["000013"]


def test_a_clock_that_was_set_back_is_waited_for_or_named(
    tune: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(snapshots.time, "sleep", slept.append)
    now = datetime.now()
    written(tune, (now + timedelta(seconds=20)).strftime(BEGAN), "a little ahead")
    assert mend(tune) == ""
    assert 18 < slept.pop() < 22
    written(tune, (now + timedelta(hours=2)).strftime(BEGAN), "in another time zone")
    with pytest.raises(ValueError, match=r"By this machine's clock and time zone it is .* driver began at .* Set the"):
        mend(tune)
    assert not slept


def test_copies_are_made_at_once_and_then_now_and_then_in_every_life_of_a_driver(
    tune: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    staging = written(tmp_path / "staging", FIRST, "early")
    written(tune, FIRST, "early")
    trial = SimpleNamespace(storage=SimpleNamespace(experiment_driver_staging_path=str(staging)))
    spare = Spare(tune, every_seconds=30)
    spare.setup()
    spare.on_step_end(1, [])
    assert not (tmp_path / "tune-spare").exists()  # there is nothing yet

    def copied() -> Any:
        (place,) = (tmp_path / "tune-spare").iterdir()
        return told(place)[f"searcher-state-{FIRST}.pkl"]

    spare.on_step_end(2, [trial])
    assert copied() == "early"
    written(staging, FIRST, "late")
    now += 29
    spare.on_step_end(3, [trial])
    assert copied() == "early"
    now += 2
    spare.on_step_end(4, [trial])
    assert copied() == "late"
    again = CallbackList([pickle.loads(pickle.dumps(spare))])  # after a reboot, when the clock has begun anew
    again.set_state(CallbackList([spare]).get_state() or {})
    now = 5.0
    again.setup()
    written(staging, FIRST, "after the reboot")
    again.on_step_end(iteration=1, trials=[trial])
    assert copied() == "after the reboot"
    assert time.monotonic() == now
    assert os.path.isdir(tune)
