import pytest

from raysv.search.wording import columns, describe_values, duration, first_line, markdown, short_names, show_value


def test_numbers_are_shown_with_three_digits_and_words_as_they_are() -> None:
    assert [show_value(value) for value in (0.123456, 30.0, 32, "sgd")] == ["0.123", "30", "32", "sgd"]
    assert show_value(0.123456789, digits=6) == "0.123457"


def test_keys_are_short_where_that_tells_them_apart() -> None:
    assert short_names(["loss.margin", "augment.strength"]) == ["margin", "strength"]
    assert short_names(["model.name", "optimizer.name"]) == ["model.name", "optimizer.name"]


def test_values_are_described_in_one_line() -> None:
    assert describe_values({"loss.margin": 0.21234, "loss.scale": 30}) == "margin 0.212  scale 30"
    assert describe_values({}) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7265, "2:01:05")])
def test_durations_have_hours_only_where_needed(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_exception_that_says_nothing_is_told_by_its_kind() -> None:
    assert first_line(ValueError("\nwrong\nmore")) == "wrong"
    assert first_line(KeyError()) == "KeyError"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns([["trial", "EER"], ["t0", "12.50"]]) == "trial  EER\nt0     12.50"


def test_a_table_in_markdown_has_a_line_below_its_head() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
