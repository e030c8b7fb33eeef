import pytest

from raysv.search.ranges import Range, combinations, read_range


def test_combinations_are_counted_where_they_end():
    spans = {"a": Range("choice", ("x", "y", "x")), "b": Range("int", (1, 5))}
    assert combinations(spans) == 10
    assert combinations(spans | {"c": Range("uniform", (0.0, 1.0))}) is None
    assert combinations(spans | {"c": Range("choice", (1, 2), {"a": ("x",)})}) is None


def test_a_range_with_no_end_to_speak_of_is_counted_and_not_written_out():
    assert combinations({"a": Range("int", (1, 10**17)), "b": Range("int", (0, 1))}) == 2 * 10**17
    assert len(Range("int", (1, 10**17)).all_values()) == 10**17


def test_all_values_are_each_there_once():
    assert list(Range("choice", ("x", "y", "x")).all_values()) == ["x", "y"]
    assert list(Range("int", (2, 4)).all_values()) == [2, 3, 4]


def test_what_is_closest_of_a_range_to_a_value_outside():
    assert Range("uniform", (0.1, 0.5)).nearest(0.7) == 0.5
    assert Range("int", (2, 4)).nearest(3.4) == 3
    assert Range("choice", (16, 32)).nearest(30.0) == 32
    assert Range("choice", ("adamw", "sgd")).nearest("lion") == "adamw"


@pytest.mark.parametrize("opened", [{"int": [1.5, 3]}, {"uniform": [2, 1]}, {"loguniform": [0, 1]}, {"choice": []}])
def test_what_is_no_range_is_refused_with_its_key(opened):
    with pytest.raises(ValueError, match=r"^loss\.margin: "):
        read_range("loss.margin", opened)
