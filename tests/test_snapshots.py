import json
import pickle
from pathlib import Path

import pytest

from raysv.search import snapshots
from raysv.search.snapshots import KINDS, Spare, newest, settle


def write(folder: Path, session: str, told: object, kinds: tuple[str, ...] = KINDS) -> None:
    """What a driver leaves that began at a time."""
    for kind in kinds:
        content = pickle.dumps(told) if kind.endswith("pkl") else json.dumps(told).encode()
        (folder / kind.replace("*", session)).write_bytes(content)


def told(file: Path) -> object:
    return pickle.loads(file.read_bytes()) if file.suffix == ".pkl" else json.loads(file.read_bytes())


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_the_newest_snapshot_is_the_last_that_is_whole(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, "0", "spare")
    write(tmp_path, "2026-11-30_10-00-00", "first")
    write(tmp_path, "2026-11-30_11-00-00", "second")
    latest = newest(tmp_path)
    assert latest is not None
    assert told(latest) == "second"
    tear(latest)
    assert told(newest(tmp_path) or latest) == "first"
    tear(newest(tmp_path) or latest)
    assert told(newest(tmp_path) or latest) == "spare"


def test_a_driver_whose_clock_was_set_back_writes_what_the_next_one_finds(tmp_path: Path) -> None:
    write(tmp_path, "2026-11-30_10-00-00", "first")
    settle(tmp_path)
    assert told(newest(tmp_path) or tmp_path) == "first"
    write(tmp_path, "1999-12-31_23-59-59", "second")
    assert told(newest(tmp_path) or tmp_path) == "second"
    settle(tmp_path)
    settle(tmp_path)  # or it is killed before it writes anything, and resumed again
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kind.replace("*", "0") for kind in KINDS)
    assert {told(file) for file in tmp_path.iterdir()} == {"second"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_file_gives_way_to_the_one_before(kind: str, tmp_path: Path) -> None:
    write(tmp_path, "0", "spare")
    write(tmp_path, "2026", "late")
    tear(tmp_path / kind.replace("*", "2026"))
    settle(tmp_path)
    assert {file.name: told(file) for file in tmp_path.iterdir()} == {
        each.replace("*", "0"): "spare" if each == kind else "late" for each in KINDS
    }


def test_a_spare_is_put_aside_now_and_then_and_only_of_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now)
    spare = Spare(tmp_path, every_seconds=30)
    write(tmp_path, "2026", "early")
    spare.on_step_end(1, [])
    assert not list(tmp_path.glob("*-0.*"))
    now = 31
    spare.on_step_end(2, [])
    write(tmp_path, "2026", "late")
    tear(tmp_path / "searcher-state-2026.pkl")
    now = 40
    spare.on_step_end(3, [])
    assert {told(file) for file in tmp_path.glob("*-0.*")} == {"early"}
    now = 62
    spare.on_step_end(4, [])
    assert {file.name: told(file) for file in tmp_path.glob("*-0.*")} == {
        kind.replace("*", "0"): "early" if "searcher-state" in kind else "late" for kind in KINDS
    }
    assert not list(tmp_path.glob("*.partial"))
