import copy
import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raysv.config import (
    LOSS_KEYS,
    AugmentConfig,
    BatchConfig,
    Config,
    LossConfig,
    config_from_dict,
    config_to_dict,
    flatten,
    parse_settings,
    read_yaml,
    with_values,
    write_yaml,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.text("xyz", max_size=3)
TREES = st.dictionaries(
    st.text("abc", min_size=1), LEAVES | st.dictionaries(st.text("abc", min_size=1), LEAVES, min_size=1)
)


def complaint(tree):
    with pytest.raises(ValueError, match=r".") as caught:
        config_from_dict(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def text(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_nothing_given_is_the_default_configuration():
    assert config_from_dict({}) == Config() == config_from_dict({"loss": None, "data": {}})


def test_the_defaults_are_the_field_s_usual_values():
    config = Config()
    assert (config.loss.margin, config.loss.scale, config.loss.temperature) == (0.2, 30.0, 0.07)
    assert (config.loss.contrast_weight, config.augment.strength) == (1.0, 0.5)
    assert (config.model.channels, config.model.embedding_dim) == (512, 192)
    assert config.data.root == "synthetic"
    assert config.batch.size == 64


def test_every_value_is_documented():
    for section in dataclasses.fields(Config):
        for value in dataclasses.fields(section.default_factory):
            assert value.metadata["doc"], f"{section.name}.{value.name}"


@given(
    st.builds(LossConfig, margin=st.floats(0, 1.57), scale=st.floats(1e-3, 1e6), temperature=st.floats(1e-6, 10)),
    st.builds(BatchConfig, speakers=st.integers(2, 999), crop_seconds=st.floats(0.2, 60)),
    st.builds(AugmentConfig, strength=st.floats(0, 1), kinds=st.lists(st.sampled_from(["noise", "reverb"]))),
)
def test_a_configuration_survives_the_way_through_a_dict_and_yaml(loss, batch, augment):
    config = Config(loss=loss, batch=batch, augment=augment)
    tree = config_to_dict(config)
    assert config_from_dict(tree) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(tree))) == config


def test_a_configuration_survives_the_way_through_a_file(tmp_path):
    tree = config_to_dict(Config(loss=LossConfig(temperature=1e-5))) | {"data": {"root": "/körper/Ä b"}}
    write_yaml(tree, tmp_path / "config.yaml", "Where it comes from,\nand why.")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8").startswith("# Where it comes from,\n# and why.\n")
    assert read_yaml(tmp_path / "config.yaml") == tree


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"lss": {}}, ["Unknown key lss.", "Did you mean loss?", "data, batch, augment"]),
        ({"loss": {"marign": 1}}, ["Unknown key loss.marign.", "Did you mean margin?", "margin, scale, temperature"]),
        ({"loss": {1: 1}}, ["Unknown key loss.1."]),
        ({"loss": 0.2}, ["loss must be a mapping", "0.2"]),
        ({"loss": 0}, ["loss must be a mapping", "0"]),
        ({"loss": [1]}, ["loss must be a mapping", "[1]"]),
        ({"loss": {"margin": 11.5}}, ["loss.margin must lie in [0, 1.57], got 11.5.", "radians, not degrees"]),
        ({"loss": {"margin": math.nan}}, ["loss.margin must be finite, got nan"]),
        ({"loss": {"scale": math.inf}}, ["loss.scale must be finite, got inf"]),
        ({"loss": {"scale": 0}}, ["loss.scale must be larger than 0, got 0.0"]),
        ({"loss": {"margin": "wide"}}, ["loss.margin must be a number, got 'wide'"]),
        ({"loss": {"margin": None}}, ["loss.margin must be a number, got None"]),
        ({"loss": {"margin": True}}, ["loss.margin must be a number, got True"]),
        ({"loss": {"margin": {"uniform": [0, 1]}}}, ["loss.margin must be a number, got {'uniform'"]),
        ({"loss": {"aam_views": "last"}}, ["loss.aam_views must be one of all, first; got 'last'"]),
        ({"batch": {"speakers": 1}}, ["batch.speakers must be at least 2, got 1."]),
        ({"batch": {"speakers": 8.5}}, ["batch.speakers must be a whole number, got 8.5"]),
        ({"batch": {"speakers": True}}, ["batch.speakers must be a whole number, got True"]),
        ({"training": {"seed": 2**31}}, ["training.seed must lie in [0, 2147483647], got 2147483648."]),
        ({"model": {"channels": 24}}, ["model.channels must be a multiple of 16, got 24"]),
        ({"data": {"root": 5}}, ["data.root must be a text, got 5"]),
        ({"data": {"skip_bad_audio": 1}}, ["data.skip_bad_audio must be true or false, got 1"]),
        ({"data": {"utterances": "dev.csv"}}, ["data.utterances must be a list of texts, got 'dev.csv'"]),
        ({"data": {"test_pairs": {"a": 1}}}, ["data.test_pairs must be a mapping of names to texts"]),
        ({"data": {"loader_workers": -1}}, ["data.loader_workers must be at least 0, got -1"]),
        ({"augment": {"kinds": ["noise", "nosie"]}}, ["augment.kinds must be one of noise, music", "got 'nosie'"]),
        ({"augment": {"kinds": [1]}}, ["augment.kinds must be a list of texts, got [1]"]),
        (
            {"batch": {"views": 1, "utterances_per_speaker": 1}},
            ["batch.views", "batch.utterances_per_speaker", "loss.kind to aam"],
        ),
        (
            {"optimizer": {"warmup_epochs": 2.5}, "training": {"epochs": 2}},
            ["optimizer.warmup_epochs is 2.5, but training ends after 2 epochs."],
        ),
        (
            {"loss": {"margin_warmup_epochs": 3}, "training": {"epochs": 2}},
            ["loss.margin_warmup_epochs is 3, but training ends after 2 epochs."],
        ),
    ],
)
def test_a_bad_value_is_named_in_one_sentence(tree, parts):
    message = complaint(tree)
    assert [part for part in parts if part not in message] == []


def test_without_the_contrast_one_view_of_one_utterance_will_do():
    for loss in ({"contrast_weight": 0}, {"kind": "aam"}):
        tree = {"batch": {"views": 1, "utterances_per_speaker": 1}, "loss": loss}
        assert config_from_dict(tree).batch.views == 1


def test_every_key_that_belongs_to_some_kinds_of_loss_is_one_and_a_loss_alone_needs_no_weight():
    keys = [key for belonging in LOSS_KEYS.values() for key in belonging]
    assert len(set(keys)) == len(keys)
    assert {item.name for item in dataclasses.fields(LossConfig)} == {"kind", *keys}
    alone = LossConfig(kind="supcon", contrast_weight=0)
    assert alone.contrasts and not alone.classifies


def test_a_warm_up_may_last_as_long_as_the_training():
    tree = {"optimizer": {"warmup_epochs": 2}, "loss": {"margin_warmup_epochs": 2}, "training": {"epochs": 2}}
    assert config_from_dict(tree).training.epochs == 2


def test_whole_numbers_pass_for_floats_and_the_other_way_round():
    config = config_from_dict({"loss": {"scale": 32}, "batch": {"speakers": 8.0}, "data": {"loader_workers": None}})
    assert (config.loss.scale, type(config.loss.scale)) == (32.0, float)
    assert (config.batch.speakers, type(config.batch.speakers)) == (8, int)
    assert config.data.loader_workers is None


def test_an_empty_value_is_an_empty_text():
    assert config_from_dict({"data": {"rir": None}}).data.rir == ""


def test_two_configurations_share_no_lists():
    first, second = Config(), Config()
    first.data.utterances.append("more.csv")
    first.data.test_pairs["more"] = "more.txt"
    assert second == Config()


def test_a_tree_is_flattened_to_dotted_keys():
    assert flatten({"loss": {"margin": 0.2, "deep": {"er": 1}}, "x": None}) == {
        "loss.margin": 0.2,
        "loss.deep.er": 1,
        "x": None,
    }


@given(TREES)
def test_flattening_and_setting_give_the_tree_back_and_change_nothing(tree):
    before = copy.deepcopy(tree)
    flat = flatten(tree)
    rebuilt = with_values({}, flat)
    assert rebuilt == {key: value for key, value in tree.items() if value != {}}
    with_values(tree, dict.fromkeys(flat, "other"))
    assert tree == before


def test_setting_values_copies_every_branch():
    tree = {"loss": {"margin": 0.2}, "data": {"utterances": ["dev.csv"]}, "batch": None}
    changed = with_values(tree, {"loss.margin": 0.3, "batch.views": 3, "data.test_pairs.a": "a.txt"})
    changed["data"]["utterances"].append("x")
    assert changed["loss"] == {"margin": 0.3}
    assert changed["batch"] == {"views": 3}
    assert changed["data"]["test_pairs"] == {"a": "a.txt"}
    assert tree == {"loss": {"margin": 0.2}, "data": {"utterances": ["dev.csv"]}, "batch": None}


def test_a_value_has_no_keys_below_it():
    with pytest.raises(ValueError, match=r"loss\.margin\.low cannot be set: margin is a value"):
        with_values({"loss": {"margin": 0}}, {"loss.margin.low": 1})


def test_settings_are_dotted_keys_and_yaml_values():
    settings = ["loss.margin=0.3", " batch.views = 3", "data.root=/a=b", "augment.kinds=[noise]", "data.rir=", "a=1e-3"]
    assert parse_settings(settings) == {
        "loss.margin": 0.3,
        "batch.views": 3,
        "data.root": "/a=b",
        "augment.kinds": ["noise"],
        "data.rir": None,
        "a": 0.001,
    }


@pytest.mark.parametrize("setting", ["loss.margin", "=3", " =3", "loss.margin=[0.1", "loss.margin=a: b: c"])
def test_a_setting_that_cannot_be_read_is_quoted(setting):
    with pytest.raises(ValueError, match="--set") as caught:
        parse_settings([setting])
    assert setting in str(caught.value)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001"])
def test_yaml_files_may_write_numbers_with_an_exponent(tmp_path, number):
    tree = read_yaml(text(tmp_path / "c.yaml", f"optimizer: {{learning_rate: {number}}}"))
    assert config_from_dict(tree).optimizer.learning_rate == 0.001


def test_words_that_look_a_little_like_numbers_stay_words(tmp_path):
    assert read_yaml(text(tmp_path / "c.yaml", "a: [1e3x, e-3, '1e-3', 1.2e, id1e3]")) == {
        "a": ["1e3x", "e-3", "1e-3", "1.2e", "id1e3"]
    }


def test_variables_are_filled_in_wherever_a_text_is(tmp_path, monkeypatch):
    monkeypatch.setenv("CORPORA", "/corpora")
    monkeypatch.setenv("NAME", "celeb")
    tree = read_yaml(
        text(tmp_path / "c.yaml", 'data: {root: "${CORPORA}/${NAME}", utterances: ["${NAME}.csv", $HOME]}')
    )
    assert tree == {"data": {"root": "/corpora/celeb", "utterances": ["celeb.csv", "$HOME"]}}


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named_with_file_and_key(tmp_path, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("NOWHERE", raising=False)
    else:
        monkeypatch.setenv("NOWHERE", value)
    path = text(tmp_path / "c.yaml", 'data: {root: "${NOWHERE}/x"}')
    with pytest.raises(ValueError, match=r"c\.yaml: data\.root uses \$\{NOWHERE\}, which is not set"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss: {margin: 0.2", r"c\.yaml is not valid YAML.*line 1"),
        (
            "loss: {margin: 0.2}\nbatch: {}\nloss: {scale: 32}\n",
            r"c\.yaml is not valid YAML.*loss is there twice.*line 3",
        ),
        ("loss: &all {margin: 0.2}\nmodel: *all", r"c\.yaml is not valid YAML.*an alias; write out.*line 2"),
        ("loss: " + 5000 * "[" + 5000 * "]", r"c\.yaml is nested too deeply"),
        ("loss:\n  scale: 1\n  scale: 2\n", r"c\.yaml is not valid YAML.*scale is there twice.*line 3"),
        ("", r"c\.yaml must hold a mapping of sections"),
        ("- loss", r"c\.yaml must hold a mapping of sections"),
    ],
)
def test_a_file_that_is_no_tree_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_yaml(text(tmp_path / "c.yaml", content))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match=r"c\.yaml is not valid YAML"):
        read_yaml(tmp_path / "c.yaml")


def test_a_text_that_looks_like_a_number_stays_a_text(tmp_path):
    tree = {"tags": {"revision": "123456e78901", "digits": "12"}, "numbers": [1e-5, 1e20, 3]}
    write_yaml(tree, tmp_path / "c.yaml")
    assert read_yaml(tmp_path / "c.yaml") == tree


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No file .*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")
