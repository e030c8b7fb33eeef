import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raysv.config import Config, LossConfig, config_to_dict, parse_settings, with_values
from raysv.search.ranges import Range, combinations
from raysv.search.space import (
    PAPER,
    PUBLISHED,
    ResourcesConfig,
    SearchConfig,
    per_trial,
    read_space,
    space_from_dict,
)

OPEN = {
    "loss": {"margin": {"uniform": [0.1, 0.5]}, "temperature": {"loguniform": [0.03, 0.3]}, "scale": 32},
    "augment": {"strength": {"uniform": [0, 1]}},
    "batch": {"speakers": {"int": [4, 8]}},
    "optimizer": {"name": {"choice": ["adamw", "sgd"]}},
    "search": {"trials": 40},
}


NEIGHBOURS = ("paper", "wespeaker", "3D-Speaker", "paper, at the temperature that SimCLR takes for speakers")
WITH_CONTRAST = {"when": {"loss.kind": ["aam_supcon", "supcon"]}}
LOSSES = ("aam", "supcon", "aam_supcon")
KINDS = {
    "loss": {
        "temperature": {"loguniform": [0.03, 0.5]} | WITH_CONTRAST,
        "scale": {"loguniform": [16, 64], "when": {"loss.kind": ["aam", "aam_supcon"]}},
        "kind": {"choice": ["aam", "aam_supcon", "supcon"]},
    }
}


def written(folder, tree, name="small.yaml"):
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_ranges_are_the_open_keys_and_all_else_is_complete(tmp_path):
    space = read_space(written(tmp_path, OPEN))
    assert space.name == "small"
    assert space.ranges == {
        "loss.margin": Range("uniform", (0.1, 0.5)),
        "loss.temperature": Range("loguniform", (0.03, 0.3)),
        "augment.strength": Range("uniform", (0.0, 1.0)),
        "batch.speakers": Range("int", (4, 8)),
        "optimizer.name": Range("choice", ("adamw", "sgd")),
    }
    assert space.tree == config_to_dict(Config(loss=LossConfig(scale=32.0)))
    assert space.search == SearchConfig(trials=40)
    assert space.resources == ResourcesConfig()
    assert space.epochs == Config().training.epochs


def test_a_space_with_nothing_open_is_a_single_run():
    space = space_from_dict({}, "run")
    assert space.ranges == {}
    assert space.first_points() == [{}]
    assert space.config({}) == Config()


def test_a_point_fills_the_open_keys():
    config = space_from_dict(OPEN, "").config({"loss.margin": 0.25, "optimizer.name": "sgd"})
    assert (config.loss.margin, config.loss.scale, config.optimizer.name) == (0.25, 32.0, "sgd")


def test_folders_to_choose_from_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"data": {"root": {"choice": ["here", "/there", "synthetic"]}, "cache": {"choice": ["", "mine"]}}}
    tree["search"] = {"trials": 6}
    ranges = space_from_dict(tree, "").ranges
    assert ranges["data.root"].values == (f"{tmp_path}/here", "/there", "synthetic")
    assert ranges["data.cache"].values == ("", f"{tmp_path}/mine")


def test_optuna_gets_the_same_ranges():
    ranges = space_from_dict(OPEN, "").ranges
    assert {key: span.distribution() for key, span in ranges.items()} == {
        "loss.margin": FloatDistribution(0.1, 0.5),
        "loss.temperature": FloatDistribution(0.03, 0.3, log=True),
        "augment.strength": FloatDistribution(0.0, 1.0),
        "batch.speakers": IntDistribution(4, 8),
        "optimizer.name": CategoricalDistribution(["adamw", "sgd"]),
    }


def test_ranges_read_well():
    assert [str(span) for span in space_from_dict(OPEN, "").ranges.values()] == [
        "0.1 to 0.5",
        "0.03 to 0.3 (log)",
        "0 to 1",
        "4 to 8",
        "one of adamw, sgd",
    ]


def test_corners_are_both_ends_and_every_choice():
    tree = {**OPEN, "loss": {"margin": {"uniform": [0.1, 0.5]}, "aam_views": {"choice": ["first", "all"]}}}
    seen = [(c.loss.margin, c.batch.speakers, c.optimizer.name) for c in space_from_dict(tree, "").corners()]
    assert seen[:2] == [(0.1, 4, "adamw"), (0.5, 8, "sgd")]
    tree["loss"]["aam_views"] = {"choice": ["first", "first", "all"]}
    assert {c.loss.aam_views for c in space_from_dict(tree, "").corners()} == {"first", "all"}


def test_the_paper_s_setting_is_tried_first():
    tree = {
        "loss": {
            "margin": {"uniform": [0, 0.5]},
            "scale": {"loguniform": [10, 60]},
            "temperature": {"loguniform": [0.03, 0.5]},
        },
        "augment": {"strength": {"uniform": [0, 1]}},
        "search": {"published": 4},
    }
    points = space_from_dict(tree, "").first_points()
    assert points == [{key: published[key] for key in points[0]} for published in map(PUBLISHED.get, NEIGHBOURS)]
    assert points[0].items() <= PAPER.items()
    for fewer in (0, 1):
        tree["search"]["published"] = fewer
        assert space_from_dict(tree, "").first_points() == points[:fewer]


def test_published_settings_are_tried_with_the_loss_that_they_have():
    points = space_from_dict(KINDS | {"search": {"published": 5}}, "").first_points()
    assert points == [
        {"loss.kind": "aam_supcon", "loss.scale": 30.0, "loss.temperature": 0.07},
        {"loss.kind": "aam", "loss.scale": 32.0},
        {"loss.kind": "aam_supcon", "loss.scale": 30.0, "loss.temperature": 0.03},
        {"loss.kind": "aam", "loss.scale": 30.0},
    ]


def test_first_points_are_complete_inside_the_ranges_and_different():
    tree = {
        "loss": {"margin": {"uniform": [0.3, 0.5]}, "scale": {"int": [10, 20]}, "aam_views": {"choice": ["first"]}},
        "batch": {"speakers": {"choice": [16, 64]}, "views": {"int": [3, 4]}},
        "search": {"published": 4},
    }
    assert space_from_dict(tree, "").first_points() == [
        {"loss.margin": 0.3, "loss.scale": 20, "loss.aam_views": "first", "batch.speakers": 16, "batch.views": 3}
    ]


@given(st.data())
def test_a_first_point_always_lies_inside(data):
    low = data.draw(st.floats(1e-3, 1.5))
    high = data.draw(st.floats(low, 1.57, exclude_min=True))
    kind = data.draw(st.sampled_from(["uniform", "loguniform"]))
    tree = {"loss": {"margin": {kind: [low, high]}, "scale": {"int": [3, 5]}}, "search": {"published": 4}}
    space = space_from_dict(tree, "")
    for point in space.first_points():
        assert low <= point["loss.margin"] <= high
        for key, value in point.items():
            distribution = space.ranges[key].distribution()
            assert distribution._contains(distribution.to_internal_repr(value))
        space.config(point)


def test_whole_numbers_stay_whole():
    assert repr(Range("choice", (16, 30)).nearest(30.0)) == "30"
    assert repr(Range("int", (16, 64)).nearest(30.0)) == "30"


@pytest.mark.parametrize(
    ("values", "value", "nearest"),
    [
        ((16, 64), 30.0, 16),
        ((64, 16, 32), 30.0, 32),
        ((0.1, 0.3), 5, 0.3),
        ((30.0, 32.0), 32, 32.0),
        ((20, 40), 30, 20),  # the first of two that are as near
        (("sgd", "adamw"), "adamw", "adamw"),
        (("first",), "all", "first"),
        ((4, 8), None, 4),
        ((True, False), False, False),
    ],
)
def test_a_published_value_is_tried_at_the_choice_nearest_to_it(values, value, nearest):
    assert repr(Range("choice", values).nearest(value)) == repr(nearest)


def test_a_choice_of_numbers_is_open_to_a_key_that_is_not_set_by_default():
    space = space_from_dict({"data": {"loader_workers": {"choice": [0, 4]}}, "search": {"trials": 2}}, "")
    assert space.first_points() == [{"data.loader_workers": 0}]


def test_a_batch_may_give_each_worker_a_single_utterance():
    tree = {"batch": {"speakers": 2, "utterances_per_speaker": 2}, "resources": {"workers": 4}}
    assert space_from_dict(tree, "").resources.workers == 4


@pytest.mark.parametrize("tree", [OPEN, KINDS])
def test_a_space_survives_the_way_through_its_dict_and_a_file(tmp_path, tree):
    space = read_space(written(tmp_path, tree))
    assert space_from_dict(space.to_dict(), "small") == space
    assert read_space(written(tmp_path, space.to_dict())) == space


def test_what_depends_on_a_choice_comes_after_it_and_is_open_where_it_fits():
    ranges = space_from_dict(KINDS, "").ranges
    assert list(ranges) == ["loss.kind", "loss.temperature", "loss.scale"]
    is_open = {kind: [key for key, span in ranges.items() if span.is_open({"loss.kind": kind})] for kind in LOSSES}
    assert is_open == {
        "aam": ["loss.kind", "loss.scale"],
        "supcon": ["loss.kind", "loss.temperature"],
        "aam_supcon": ["loss.kind", "loss.temperature", "loss.scale"],
    }
    assert str(ranges["loss.temperature"]) == "0.03 to 0.5 (log), where loss.kind is aam_supcon or supcon"


def test_a_grid_holds_every_value_and_tries_nothing_first():
    tree = {"loss": {"margin": {"choice": [0, 0.2]}}, "batch": {"views": {"int": [2, 4]}}}
    space = space_from_dict(tree | {"search": {"sampler": "grid", "trials": 6}}, "")
    assert combinations(space.ranges) == 6
    assert space.first_points() == []


def test_more_trials_than_combinations_are_refused():
    tree = {"loss": {"margin": {"choice": [0.1, 0.2, 0.3]}}, "search": {"trials": 4}}
    with pytest.raises(ValueError, match=r"search\.trials is 4, but what is open has 3 combinations"):
        space_from_dict(tree, "")
    assert space_from_dict(tree | {"search": {"trials": 3}}, "").search.trials == 3


def test_settings_close_and_open_keys(tmp_path):
    path = written(tmp_path, OPEN)
    settings = {"loss.margin": 0.2, "loss.scale": {"loguniform": [16, 64]}, "search.trials": 3, "resources.workers": 2}
    space = read_space(path, settings)
    assert "loss.margin" not in space.ranges
    assert space.tree["loss"]["margin"] == 0.2
    assert space.ranges["loss.scale"] == Range("loguniform", (16.0, 64.0))
    assert (space.search.trials, space.resources.workers) == (3, 2)


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        (None, None, (1, None)),
        (4, None, (4, None)),
        (None, 4.0, (4, 1.0)),
        (None, 0.25, (1, 0.25)),
        (None, 0.0, (1, 0.0)),
        (2, 4.0, (2, 2.0)),
        (2, 0.0, (2, 0.0)),
    ],
)
def test_what_a_trial_gets_can_be_told_in_whole(workers, gpus, expected):
    resources = space_from_dict(with_values(OPEN, per_trial(workers, gpus)), "").resources
    assert (resources.workers, resources.gpus_per_worker) == expected


@pytest.mark.parametrize(
    ("workers", "gpus"), [(2, 3.0), (None, 1.5), (0, None), (0, 2.0), (None, -1.0), (None, math.inf)]
)
def test_what_no_trial_can_get_is_refused(workers, gpus):
    with pytest.raises(ValueError, match=r"resources\.(workers|gpus_per_worker)|cannot have"):
        space_from_dict(with_values(OPEN, per_trial(workers, gpus)), "")


def test_a_range_can_be_set_from_the_command_line(tmp_path):
    settings = parse_settings(
        ["loss.margin={uniform: [0.1, 0.3]}", "optimizer.learning_rate={loguniform: [1e-4, 1e-2]}"]
    )
    space = read_space(written(tmp_path, OPEN), settings)
    assert space.ranges["loss.margin"] == Range("uniform", (0.1, 0.3))
    assert space.ranges["optimizer.learning_rate"] == Range("loguniform", (1e-4, 1e-2))


def test_numbers_with_an_exponent_are_numbers_in_ranges_too(tmp_path):
    text = "optimizer: {learning_rate: {loguniform: [1e-4, 1e-2]}, weight_decay: {choice: [1e-4, 0]}}"
    space = read_space(written(tmp_path, text))
    assert space.ranges["optimizer.learning_rate"].values == (1e-4, 1e-2)
    assert space.first_points()[0]["optimizer.weight_decay"] == 1e-4


def test_folders_are_settled_where_the_study_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = read_space(written(tmp_path, OPEN), {"data.root": "corpora/ü b", "data.cache": "cache"}).tree["data"]
    assert (data["root"], data["cache"]) == (str(tmp_path / "corpora" / "ü b"), str(tmp_path / "cache"))
    data = read_space(written(tmp_path, OPEN), {"data.root": "/far", "data.cache": "~/cache"}).tree["data"]
    assert (data["root"], data["cache"]) == ("/far", "~/cache")
    data = read_space(written(tmp_path, OPEN)).tree["data"]
    assert (data["root"], data["cache"]) == ("synthetic", "")


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"lss": {}}, ["Unknown key lss.", "Did you mean loss?", "search, resources"]),
        ({"loss": 0}, ["loss must be a mapping"]),
        ({"search": 40}, ["search must be a mapping", "40"]),
        ({"loss": {"uniform": [0, 1]}}, ["Unknown key loss.uniform.", "margin, scale"]),
        ({"loss": {"marign": {"uniform": [0, 1]}}}, ["Unknown key loss.marign.", "Did you mean margin?", "scale"]),
        ({"loss": {"marign": 0.1}}, ["Unknown key loss.marign.", "Did you mean margin?"]),
        (
            {"loss": {"margin": {"unifrom": [0, 1]}}},
            ["loss.margin is opened with uniform, loguniform, int, choice; got {'unifrom'"],
        ),
        ({"loss": {"margin": {"uniform": [0, 90]}}}, ["loss.margin must lie in [0, 1.57], got 90.0.", "radians"]),
        ({"loss": {"margin": {"uniform": [-0.1, 1]}}}, ["loss.margin must lie in [0, 1.57], got -0.1."]),
        ({"loss": {"margin": {"uniform": [0.5, 0.1]}}}, ["loss.margin: uniform takes a lower and a higher end"]),
        ({"loss": {"margin": {"uniform": [0.5, 0.5]}}}, ["loss.margin: uniform takes a lower and a higher end"]),
        ({"loss": {"margin": {"uniform": [0, math.nan]}}}, ["loss.margin: uniform takes a lower and a higher end"]),
        ({"loss": {"scale": {"uniform": [1, math.inf]}}}, ["loss.scale must be finite"]),
        ({"loss": {"margin": {"uniform": [0, 0.1, 0.2]}}}, ["loss.margin: uniform takes two numbers"]),
        ({"loss": {"margin": {"uniform": 0.3}}}, ["loss.margin: uniform takes two numbers", "got 0.3"]),
        ({"loss": {"margin": {"uniform": ["a", "b"]}}}, ["loss.margin: uniform takes two numbers"]),
        ({"loss": {"margin": {"uniform": [False, True]}}}, ["loss.margin: uniform takes two numbers"]),
        ({"loss": {"scale": {"loguniform": [0, 1]}}}, ["loss.scale: loguniform takes a lower", "above 0"]),
        ({"batch": {"speakers": {"int": [4, 8.5]}}}, ["batch.speakers: int takes two whole numbers"]),
        ({"batch": {"speakers": {"uniform": [4, 8]}}}, ["batch.speakers is a whole number", "int or choice"]),
        ({"optimizer": {"name": {"uniform": [0, 1]}}}, ["optimizer.name is no number", "choice"]),
        ({"model": {"channels": {"int": [64, 512]}}}, ["model.channels must be a multiple of 16, got 65"]),
        ({"optimizer": {"name": {"choice": ["adamw", "adm"]}}}, ["optimizer.name must be one of", "'adm'"]),
        ({"optimizer": {"name": {"choice": []}}}, ["optimizer.name: choice takes a list"]),
        ({"optimizer": {"name": {"choice": "adamw"}}}, ["optimizer.name: choice takes a list"]),
        (
            {"augment": {"kinds": {"choice": [["noise"], []]}}},
            ["augment.kinds: choice takes a list of texts or numbers"],
        ),
        ({"training": {"epochs": {"int": [1, 9]}}}, ["training.epochs cannot be searched"]),
        ({"training": {"seed": {"choice": [0, 1]}}}, ["training.seed cannot be searched: the luckiest seed"]),
        (
            KINDS | {"search": {"sampler": "gp"}},
            ["search.sampler is gp, which", "keys with when by chance"],
        ),
        (
            {
                "loss": {
                    "kind": {"choice": ["aam", "aam_supcon"]},
                    "temperature": {"uniform": [0.1, 1], "when": {"optimizer.name": ["sgd"]}},
                },
                "optimizer": {"name": {"choice": ["adamw", "sgd"]}},
            },
            ["loss.temperature means nothing where loss.kind is aam"],
        ),
        ({"search": {"trails": 3}}, ["Unknown key search.trails.", "Did you mean trials?"]),
        ({"search": {"trials": {"int": [1, 2]}}}, ["search.trials must be a whole number"]),
        ({"search": {"trials": 0}}, ["search.trials must be at least 1"]),
        ({"search": {"early_stopping": "sha"}}, ["search.early_stopping must be one of asha, hyperband, median, none"]),
        (
            {"resources": {"workers": 2, "gpus_per_worker": 0.5}},
            ["gpus_per_worker is 0.5 with 2 workers", "Set it to 1"],
        ),
        ({"resources": {"gpus_per_worker": 1.5}}, ["gpus_per_worker is 1.5"]),
        (
            {"batch": {"views": 1, "utterances_per_speaker": 1}, "loss": {"contrast_weight": {"uniform": [0, 1]}}},
            ["The contrastive term needs two views"],
        ),
        (
            {
                "batch": {"speakers": {"int": [3, 8]}, "utterances_per_speaker": 1},
                "loss": {"contrast_weight": 0},
                "resources": {"workers": 4},
            },
            ["A batch of 3 utterances", "batch.speakers", "cannot be shared by 4 workers", "resources.workers"],
        ),
        (
            {"loss": {"kind": {"choice": ["aam", "aam_supcon"]}, "temperature": {"uniform": [0.1, 1]}}},
            ["loss.temperature means nothing where loss.kind is aam", "Add when: {loss.kind: [aam_supcon]}"],
        ),
        (
            {"loss": {"kind": "supcon", "margin": {"uniform": [0.1, 1]}}},
            ["loss.margin means nothing where loss.kind is supcon", "Do not open it."],
        ),
        (
            {"loss": {"kind": "aam_supcon", "margin": {"uniform": [0.1, 1], "when": {"loss.kind": ["aam"]}}}},
            ["loss.margin.when names loss.kind, which is no choice that is open everywhere"],
        ),
        (
            {"loss": {"margin": {"uniform": [0.1, 1], "when": {"loss.scale": [30]}}, "scale": {"uniform": [10, 40]}}},
            ["loss.margin.when names loss.scale, which is no choice"],
        ),
        (
            {"loss": {"kind": {"choice": ["aam", "aam_supcon"]}, "temperature": {"int": [1, 2], "when": ["aam"]}}},
            ["loss.temperature.when takes other keys and lists of their values", "got ['aam']"],
        ),
        (
            {
                "optimizer": {
                    "name": {"choice": ["adamw", "sgd"]},
                    "momentum": {"uniform": [0, 1], "when": {"optimizer.name": ["sdg"]}},
                }
            },
            ["optimizer.momentum.when: optimizer.name is never 'sdg'"],
        ),
        ({"loss": {"margin": {"when": {"loss.kind": ["aam"]}}}}, ["loss.margin must be a number"]),
        (
            {"loss": {"margin": {"uniform": [0, 0.5]}}, "search": {"sampler": "grid"}},
            ["search.sampler is grid, but loss.margin has no end of values", "choice or int"],
        ),
        (
            {
                "loss": {"margin": {"choice": [0, 0.2]}},
                "batch": {"views": {"int": [2, 4]}},
                "search": {"sampler": "grid"},
            },
            ["The grid has 6 combinations; set search.trials to that, not to 20."],
        ),
        (
            OPEN | {"search": {"second_objective": "cost"}},
            ["search.second_objective is cost, but asha stops what lags behind in EER", "early_stopping to none"],
        ),
        (
            KINDS | {"search": {"sampler": "grid"}},
            ["search.sampler is grid, but", "loss.temperature", "has no end of values"],
        ),
        (
            {"loss": {"margin_warmup_epochs": {"int": [1, 3]}}, "training": {"epochs": 2}},
            ["loss.margin_warmup_epochs is 3, but training ends after 2 epochs."],
        ),
    ],
)
def test_what_cannot_be_searched_is_named_with_file_and_key(tmp_path, tree, parts):
    with pytest.raises(ValueError, match=r"small\.yaml: ") as caught:
        read_space(written(tmp_path, tree))
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(("workers", "gpus"), [(1, 0.5), (1, 0.25), (1, 2), (4, 1), (4, 0), (2, 2.0), (8, None)])
def test_lone_workers_may_share_a_gpu_and_others_take_whole_ones(workers, gpus):
    space = space_from_dict({"resources": {"workers": workers, "gpus_per_worker": gpus}}, "")
    assert space.resources.gpus_per_worker == gpus


def test_sections_may_be_left_empty(tmp_path):
    assert read_space(written(tmp_path, "loss:\nsearch:\nresources:\n")).search == SearchConfig()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No file .*gone\.yaml"):
        read_space(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("epochs", "warmup", "given", "expected"),
    [
        (20, 1.0, None, 4),
        (9, 1.0, None, 2),
        (6, 2.5, None, 3),
        (2, 2.0, None, 2),
        (80, 6.0, None, 14),
        (20, 1.0, 5, 5),
        (3, 0.0, 9, 3),
    ],
)
def test_trials_get_a_sixth_of_the_epochs_and_more_than_the_warm_up(epochs, warmup, given, expected):
    tree = {
        "training": {"epochs": epochs},
        "optimizer": {"warmup_epochs": warmup},
        "search": {} if given is None else {"grace_epochs": given},
    }
    assert space_from_dict(tree, "").grace_epochs == expected


def test_grace_is_longer_than_the_longest_warm_up_that_is_searched():
    tree = {"training": {"epochs": 18}, "optimizer": {"warmup_epochs": {"choice": [1.0, 5.0]}}, "search": {"trials": 2}}
    assert space_from_dict(tree, "").grace_epochs == 6
