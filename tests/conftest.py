import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from learning_fixtures import write_corpus

# a busy machine is slow without anything being wrong
settings.register_profile("raysv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raysv")


@pytest.fixture(scope="session")
def _corpus_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny_corpus(_corpus_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of a second per recording with all the lists of the defaults, the test's own to spoil; its own cache."""
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(_corpus_template, tmp_path / "corpus"))
