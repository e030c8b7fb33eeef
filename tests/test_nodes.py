import re
import shutil
from pathlib import Path

import pytest
import yaml
from cluster_fixtures import Cluster
from desk_fixtures import SOURCE, SPACE, Desk
from learning_fixtures import write_corpus

from raysv.search import nodes
from raysv.search.nodes import code, refuse_other_code


def test_the_code_of_a_process_is_told_by_versions_and_source() -> None:
    assert {"raysv", "python", "torch", "ray", "raysv's source"} <= set(code())
    refuse_other_code(code())


def test_the_source_is_another_when_a_line_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told_of(source: Path) -> str:
        code.cache_clear()
        monkeypatch.setattr(nodes, "SOURCE", source)
        return code()["raysv's source"]

    before = code()["raysv's source"]
    copy = Path(shutil.copytree(SOURCE / "raysv", tmp_path / "raysv"))
    try:
        assert told_of(copy) == before
        with (copy / "learning" / "losses.py").open("a") as file:
            file.write("# changed\n")
        assert told_of(copy) != before
    finally:
        code.cache_clear()


def test_other_code_than_the_drivers_is_refused_with_both_named() -> None:
    driver = code() | {"torch": "1.0", "raysv's source": "0123456789ab"}
    with pytest.raises(
        ValueError, match=rf"has torch {code()['torch']}, not 1\.0, raysv's source .*, not 0123456789ab"
    ):
        refuse_other_code(driver)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.slow
def test_a_node_with_other_code_is_refused_before_anything_trains(desk: Desk, cluster: Cluster) -> None:
    edited = Path(shutil.copytree(SOURCE / "raysv", desk.folder / "elsewhere" / "raysv"))
    with (edited / "learning" / "losses.py").open("a") as file:
        file.write("# changed\n")
    cluster.add(PYTHONPATH=str(edited.parent))
    driver = desk.open("tune.py", "space.yaml", "--name", "skewed", **cluster.variables)
    printed, _ = driver.communicate(timeout=200)
    assert driver.returncode == 2, printed
    assert re.search(r"raysv\.tune: Node [\d.]+: ", printed)
    source = code()["raysv's source"]
    assert f"not {source} as the driver of the study. Install the same on all nodes" in printed
    assert not list((desk.folder / "results" / "skewed").glob("trials/*"))


@pytest.mark.slow
def test_data_that_a_node_lacks_are_named_with_it_before_anything_trains(desk: Desk, cluster: Cluster) -> None:
    write_corpus(desk.folder / "home" / "corpus")
    space = SPACE | {"data": {"root": "~/corpus"}, "batch": {"speakers": 4, "crop_seconds": 0.6}}
    (desk.folder / "space.yaml").write_text(yaml.safe_dump(space))
    cluster.add(HOME=str(desk.folder / "another home"), RAYSV_CACHE=str(desk.folder / "another cache"))
    variables = cluster.variables | {"HOME": str(desk.folder / "home")}
    driver = desk.open("tune.py", "space.yaml", "--name", "lacking", **variables)
    printed, _ = driver.communicate(timeout=200)
    assert driver.returncode == 2, printed
    assert re.search(r"raysv\.tune: Node [\d.]+: data\.root is ~/corpus, which is no folder\.", printed), printed
