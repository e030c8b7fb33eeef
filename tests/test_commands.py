import os
from pathlib import Path

import pytest

from raysv.search.commands import CLUSTER_VARIABLE, door, fetch, python, serve, shown

STORE = "sqlite:////home/me/mlflow.db"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    return tmp_path


def test_a_path_is_shown_as_short_as_it_can_be_typed(here: Path) -> None:
    assert shown(here / "results" / "my study") == "'results/my study'"
    assert shown(Path(os.sep, "corpora")) == "/corpora"


def test_at_home_a_door_is_a_module_and_nothing_needs_fetching(here: Path) -> None:
    assert door("train") == f"{python()} -m raysv.train"
    assert fetch(here) == ""
    assert serve(STORE) == f"{python()} -m mlflow server --backend-store-uri {STORE}"


def test_what_the_launcher_brought_to_a_cluster_is_called_through_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLUSTER_VARIABLE, "cluster/aws.yaml")
    (here / "my study").mkdir()
    (here / "best.yaml").touch()
    assert door("train") == "ray submit cluster/aws.yaml raysv/train.py --"
    assert fetch(here / "best.yaml") == f"ray rsync-down cluster/aws.yaml {here}/best.yaml best.yaml"
    assert fetch(here / "my study") == f"ray rsync-down cluster/aws.yaml '{here}/my study/' 'my study/'"
    assert serve(STORE) == (
        f"ray exec cluster/aws.yaml --port-forward 5000 'mlflow server --backend-store-uri {STORE}'"
    )
