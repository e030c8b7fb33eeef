"""The rules of the house: who may import what, and doors that open from anywhere."""

import ast
import graphlib
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import raysv
from raysv.search.space import read_space

HOUSE = Path(raysv.__file__).parent
GROUND = "config distributed precision"
FLOORS = (GROUND, "corpus", "speech", "verification", "learning", "search")  # above them, the doors
UPSTAIRS = {"ray", "optuna", "mlflow", "matplotlib"}
DOORS = ("prepare", "tune", "train", "verify", "export", "report", "doctor")


def module_name(file):
    return ".".join(file.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(HOUSE.rglob("*.py"))}


def imports(file):
    """Dotted names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import; a door that runs as a file cannot"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


IMPORTS = {name: set(imports(file)) for name, file in MODULES.items()}


def room(name):
    return name.partition(".")[2].partition(".")[0]


def floor(name):
    return next((level for level, rooms in enumerate(FLOORS) if room(name) in rooms.split()), len(FLOORS))


def run(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_or_stay_on_the_floor(name):
    inside = {other for other in IMPORTS[name] if other in MODULES and other != name}
    assert [other for other in inside if floor(other) > floor(name)] == []
    if floor(name) == len(FLOORS):
        assert [other for other in inside if floor(other) == len(FLOORS)] == [], "doors do not lead to doors"


def test_no_imports_go_in_a_circle():
    graph = {name: {other for other in IMPORTS[name] if other in MODULES} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_the_tools_of_the_search_stay_upstairs(name):
    if room(name) != "search":
        assert {other.partition(".")[0] for other in IMPORTS[name]} & UPSTAIRS == set()


def test_importing_raysv_does_not_pull_in_ray(tmp_path):
    code = f"import raysv, sys; print(sorted({UPSTAIRS} & sys.modules.keys()))"
    assert run("-c", code, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.parametrize(
    "name",
    [name for name, file in MODULES.items() if file.parent.parent == HOUSE and room(name) == name.rpartition(".")[2]],
)
def test_a_room_s_door_plate_holds_one_sentence(name):
    (sentence,) = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    assert isinstance(sentence, ast.Expr)
    assert isinstance(sentence.value.value, str)


def test_no_module_has_a_name_that_another_package_has():
    tops = {room(name) for name in MODULES} - {""}  # what a door that runs as a file has in front of the path
    assert tops & (packages_distributions().keys() - {"raysv"}) == set()
    assert {name.rpartition(".")[2] for name in MODULES} & sys.stdlib_module_names == set()


@pytest.mark.parametrize("file", sorted((HOUSE.parent / "search_spaces").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_search_space_that_comes_with_raysv_can_be_read(file, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSV_DATA", str(tmp_path))
    space = read_space(file)
    for point in space.first_points():
        space.config(point)


@pytest.mark.parametrize(
    "door",
    [pytest.param(door, marks=[pytest.mark.slow] if door in ("tune", "train") else []) for door in DOORS],
)
def test_a_door_opens_as_a_file_from_another_folder(door, tmp_path):
    finished = run(HOUSE / f"{door}.py", "--help", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("usage: ")
    assert finished.stderr == ""
    assert list(tmp_path.iterdir()) == []
