import subprocess
from pathlib import Path

import pytest

from raysv.search import tuner


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which the tuner lies, committed."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file = tmp_path / "raysv" / "search" / "tuner.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(tuner, "__file__", str(file))
    return tmp_path


def test_the_revision_tells_whether_the_source_differs_from_it(checkout: Path) -> None:
    clean = tuner.git_revision()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (checkout / "notes.txt").write_text("not source")
    assert tuner.git_revision() == clean
    (checkout / "raysv" / "new.py").write_text("")
    assert tuner.git_revision() == clean + "+changes"


def test_the_revision_of_a_checkout_that_only_holds_the_environment_is_not_told(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / ".venv" / "raysv" / "search" / "tuner.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(tuner, "__file__", str(installed))
    assert tuner.git_revision() == "unknown"
