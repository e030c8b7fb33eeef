"""The door, as a file from another folder."""

import os
from pathlib import Path

import pytest
from desk_fixtures import Desk

CHECKS = (
    *("versions", "GPUs", "workers", "audio", "shared memory", "open files", "results", "cache", "temporary"),
    *("MLflow", "Ray", "data"),
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def verdicts(printed: str) -> dict[str, str]:
    """What each check came to, from lines whose verdicts stand below each other."""
    return {line[:13].strip(): line[15:19].strip() for line in printed.splitlines()}


def test_a_machine_that_is_fit_has_a_line_for_each_check_and_nothing_stays_behind(desk: Desk) -> None:
    before = set(desk.folder.iterdir())
    found = verdicts(desk.run("doctor.py", "space.yaml", "--set", "search.trials=3"))
    assert tuple(found) == CHECKS
    assert set(found.values()) <= {"ok", "warn"}
    assert set(desk.folder.iterdir()) - before == {desk.folder / "cache"}
    (corpus,) = (desk.folder / "cache").iterdir()
    assert corpus.name.startswith("synthetic")


def test_a_machine_that_is_not_has_all_its_faults_told_at_once(desk: Desk) -> None:
    desk.environment |= {"MLFLOW_TRACKING_URI": "http://hidden@127.0.0.1:9/?token=hidden", "RAY_ADDRESS": "127.0.0.1:9"}
    (desk.folder / "results").touch()
    printed = desk.run("doctor.py", "space.yaml", "--set", "data.root=/nowhere", status=1)
    found = verdicts(printed)
    assert tuple(found) == CHECKS
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {"results", "MLflow", "Ray", "data"}
    assert "data.root is /nowhere, which is no folder" in printed
    assert "hidden" not in printed and "Traceback" not in printed


def test_a_broken_package_is_told_and_what_does_not_need_it_is_looked_at_all_the_same(desk: Desk) -> None:
    broken = desk.folder / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    desk.environment["PYTHONPATH"] = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    printed = desk.run("doctor.py", "space.yaml", status=1)
    found = verdicts(printed)
    assert tuple(found) == ("space", *CHECKS)
    assert {name for name in found if found[name] == "FAIL"} >= {"space", "versions", "GPUs", "workers"}
    assert {name for name in found if found[name] == "ok"} >= {"audio", "results", "cache", "temporary", "Ray"}
    assert "torch cannot be used: libcudart.so.12" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("none.yaml",), "No file none.yaml"),
        (("space.yaml", "--set", "loss.margn=1"), "Did you mean margin?"),
        (("space.yaml", "--set", "loss.margin"), "--set takes KEY=VALUE"),
        (("--set", "loss.margin=0.2"), "Name one"),
        (("--gpu",), "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(desk: Desk, arguments: tuple[str, ...], told: str) -> None:
    printed = desk.run("doctor.py", *arguments, status=2)
    assert told in printed
    assert "Traceback" not in printed
