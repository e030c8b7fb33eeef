import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_fixtures import Cluster
from host_fixtures import Hosts, why_not
from hypothesis import HealthCheck, settings
from learning_fixtures import write_corpus

# a busy machine is slow without anything being wrong
settings.register_profile("raysv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("raysv")

EXIT_STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how it went for `pytest_unconfigure`."""
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without ending Python once everything is reported.

    Ray was started and shut down in this process. A native thread of it may outlive that, and now and then crashes
    while Python ends, after the last test has passed: the exit status would then be that of the crash.
    """
    if EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="session")
def _corpus_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny_corpus(_corpus_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of a second per recording with all the lists of the defaults, the test's own to spoil; its own cache."""
    monkeypatch.setenv("RAYSV_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(_corpus_template, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def _mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; MLflow takes seconds to make one, and as long to be imported."""
    from raysv.search.mlflow_store import check

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    check(f"sqlite:///{file}")
    return file


@pytest.fixture
def tracking_uri(_mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an MLflow database of the test's own."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    shutil.copy(_mlflow_template, tmp_path / "mlflow.db")
    yield f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert not (tmp_path / "mlruns").exists()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes file systems of the test's own: `mount("size=1m", "ro")`."""
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        folder = tmp_path / f"mounted {len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_ray() -> Iterator[None]:
    """A Ray of the test's own, with one CPU; enough for Tune without Train."""
    import ray

    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose nodes are processes of this machine; so far it has a head."""
    running = Cluster(tmp_path_factory.mktemp("ray"))
    yield running
    running.end()


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts."""
    if reason := why_not():
        pytest.skip(reason)
    running = Hosts(2, tmp_path_factory.mktemp("hosts"))
    yield running
    running.end()
