import csv
import json
import shutil
import textwrap
from importlib.metadata import version

import pytest
import torch
import yaml
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config

from raysv.config import config_to_dict
from raysv.learning.checkpoint import (
    describe_checkpoint,
    load_encoder,
    load_training_state,
)

FILES = {
    "README.md",
    "checkpoint.yaml",
    "encoder.pt",
    "training_state.pt",
    "metrics.jsonl",
    "det.csv",
    "dev_scores.npy",
}


class Payload:
    """What a pickle could do to whoever loads it."""

    def __reduce__(self):
        return print, ("code was run",)


def waveforms():
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(samples, generator=generator) for samples in (8000, 12_000)]


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("corpus"), loss__margin=0.3)


@pytest.fixture(scope="module")
def original(encoder, config, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), config, encoder)


@pytest.fixture
def checkpoint(original, tmp_path):
    """A checkpoint to be damaged."""
    return shutil.copytree(original, tmp_path / "copy")


def test_a_checkpoint_has_the_files_it_promises(original):
    assert {file.name for file in original.iterdir()} == FILES


def test_an_encoder_comes_back_as_it_was(original, encoder):
    loaded = load_encoder(original)
    assert not loaded.training
    assert torch.equal(loaded.embed(waveforms()), encoder.embed(waveforms()))


def test_a_folder_may_be_given_as_text(original):
    assert load_encoder(str(original))


def test_the_description_tells_where_training_stood(original, config):
    described, rest = describe_checkpoint(original)
    assert described == config
    assert (rest["epoch"], rest["dev_eer"], rest["training_speakers"]) == (2, 0.25, 7)
    assert rest["data_hash"] == "0123456789abcdef"
    assert rest["threshold"] == pytest.approx(0.5)
    assert rest["versions"]["torch"] == version("torch")
    assert yaml.safe_load((original / "checkpoint.yaml").read_text())["config"] == config_to_dict(config)


def test_what_going_on_needs_comes_back(original, encoder):
    weights, state, history = load_training_state(original)
    assert weights.keys() == encoder.state_dict().keys()
    assert torch.equal(state["loss"]["aam.weight"], torch.ones(7, 16))
    assert [metrics["epoch"] for metrics in history] == [1, 2]
    lines = (original / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


def test_the_det_curve_runs_from_accepting_all_to_accepting_none(original):
    with (original / "det.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["p_miss", "p_fa"]
    points = [tuple(map(float, row)) for row in rows]
    assert (points[0], points[-1]) == ((0, 1), (1, 0))
    assert points == [(0, 1), (0, 0.5), (0.5, 0.5), (0.5, 0), (1, 0)]


def test_a_long_det_curve_is_thinned_out_between_its_ends(config, encoder, tmp_path):
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    same_speaker = scores + torch.rand(5000, generator=torch.Generator().manual_seed(1)) > 1
    write_checkpoint(tmp_path, config, encoder, scores.tolist(), same_speaker.tolist())
    lines = (tmp_path / "det.csv").read_text().splitlines()
    assert 100 < len(lines) <= 301
    assert lines[1] == "0.0,1.0" and lines[-1] == "1.0,0.0"


def test_the_readme_tells_what_the_encoder_is(original):
    text = (original / "README.md").read_text()
    for fact in ("16 channels", "16 dimensions", version("raysv"), "7 speakers", "epoch 2 of 2", "25.00 %"):
        assert fact in text


def test_the_code_in_the_readme_runs(original):
    text = (original / "README.md").read_text()
    code = textwrap.dedent("".join(line for line in text[text.index("    from") :].splitlines(keepends=True)))
    a, b = waveforms()
    names = {"waveform_a": a, "waveform_b": b}
    exec(code.replace("THIS_FOLDER", str(original)), names)
    assert names["embeddings"].shape == (2, 16)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no checkpoint\.yaml"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["encoder.pt", "training_state.pt", "metrics.jsonl"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.9])
def test_a_missing_or_truncated_file_is_named(checkpoint, name, share):
    file = checkpoint / name
    if share is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"{name} cannot be .*The checkpoint is incomplete or damaged") as caught:
        load_training_state(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_the_weights_is_refused_and_not_run(checkpoint, capsys, legacy):
    torch.save({"weights": Payload()}, checkpoint / "encoder.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"encoder\.pt holds something other than weights"):
        load_encoder(checkpoint)
    assert "code was run" not in capsys.readouterr().out


def test_a_file_that_never_held_weights_is_refused(checkpoint):
    (checkpoint / "encoder.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"encoder\.pt holds something other than weights"):
        load_encoder(checkpoint)


@pytest.mark.parametrize("weights", [{"ecapa.embedding.weight": torch.ones(2, 2)}, torch.ones(3), [1, 2]])
def test_weights_of_another_encoder_are_refused(checkpoint, weights):
    torch.save(weights, checkpoint / "encoder.pt")
    with pytest.raises(ValueError, match=r"does not hold the weights of the encoder that checkpoint\.yaml describes"):
        load_encoder(checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [("epoch: [1", "not valid YAML"), ("epoch: 3\n", "no key config"), ("just words", "must hold a mapping")],
)
def test_a_damaged_description_is_named(checkpoint, text, message):
    (checkpoint / "checkpoint.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"checkpoint\.yaml.*{message}"):
        load_encoder(checkpoint)
