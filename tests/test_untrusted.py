"""Whatever a file holds, every parser of ours either reads it or says in a ValueError what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from encoder_fixtures import tiny_encoder, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_fixtures import tiny_config

from raysv.config import config_from_dict, parse_settings, read_yaml
from raysv.corpus.utterances import read_clips, read_enrolments, read_pair_columns, read_utterances
from raysv.learning.checkpoint import describe_checkpoint, load_encoder, load_training_state
from raysv.learning.keeping import SUMS, newest_intact
from raysv.search.confirmation import read_confirmation
from raysv.search.space import space_from_dict
from raysv.search.stopping import read_journal


def kaldi(name: str, valid: dict[str, str]) -> Callable[[Path, bytes], Any]:
    """A Kaldi folder in which one file is what it happens to be."""

    def read(folder: Path, content: bytes) -> Any:
        for other, text in valid.items():
            (folder / other).write_text(text)
        (folder / name).write_bytes(content)
        return read_utterances(folder, folder)

    return read


def file(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    """A file of a name, read by a function."""

    def written(folder: Path, content: bytes) -> Any:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return written


def checkpoint(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
    """A file of a checkpoint that is whole otherwise."""

    def spoil(folder: Path, content: bytes) -> Any:
        place = folder / "whole"
        if not place.exists():
            write_checkpoint(place, tiny_config(folder), tiny_encoder())
        (place / name).write_bytes(content)
        return read(place)

    return spoil


def sums(folder: Path, content: bytes) -> Any:
    kept = folder / "kept" / "epoch-0001"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / SUMS).write_bytes(content)
    (kept / "a").touch()
    return newest_intact(folder / "kept")


def whole(name: str) -> bytes:
    """What a file of a checkpoint holds that is whole."""
    with TemporaryDirectory() as folder:
        return (write_checkpoint(Path(folder), tiny_config(Path(folder)), tiny_encoder()) / name).read_bytes()


KALDI = {"wav.scp": "u1 a.wav\nu2 b.wav\n", "utt2spk": "u1 s\nu2 t\n", "utt2dur": "u1 1.5\nu2 2\n"}
SPACE = b"loss: {margin: {uniform: [0, 0.5]}, kind: {choice: [aam, aam_supcon]}}\nsearch: {trials: 3}\n"
ENTRY = json.dumps({"trial": "a", "epoch": 1, "value": 0.3, "stop": False}).encode()
CONFIRMED = b"""seeds: [1, 2]
speakers: 20
standings:
- {name: t001, values: {loss.margin: 0.2}, eers: [0.1, 0.2], estimate: [0.15, 0.1, 0.2]}
paper: t000
reference: the paper's setting
gain: [0.01, -0.01, 0.03]
failed: []
"""
PARSERS: dict[str, tuple[Callable[[Path, bytes], Any], bytes]] = {
    "manifest": (
        file("a.csv", lambda path: read_utterances(path, path.parent)),
        b"speaker,path,duration_s,session\ns,a.wav,1.5,x\nt,b.wav,,\n",
    ),
    "pairs": (file("pairs.txt", read_pair_columns), b"1 a.wav b.wav\n0 a.wav c.wav\n"),
    "enrolments": (file("enrolments.txt", read_enrolments), b"m1 a b\nm2 c\n"),
    "clips": (file("noise.csv", lambda path: read_clips(path, "noise", path.parent)), b"path,split\na.wav,train\n"),
    **{name: (kaldi(name, KALDI), KALDI[name].encode()) for name in KALDI},
    "config": (file("c.yaml", lambda path: config_from_dict(read_yaml(path))), b"loss: {margin: 0.2, scale: 3.0e+1}\n"),
    "space": (file("s.yaml", lambda path: space_from_dict(read_yaml(path), "s")), SPACE),
    "setting": (
        lambda folder, content: parse_settings([content.decode(errors="replace")]),
        b"loss.margin={uniform: [0, 1]}",
    ),
    "journal": (file("stopping.jsonl", read_journal), ENTRY + b"\n" + ENTRY + b"\n"),
    "confirmation": (file("confirmation.yaml", lambda path: read_confirmation(path.parent)), CONFIRMED),
    "description": (checkpoint("checkpoint.yaml", describe_checkpoint), whole("checkpoint.yaml")),
    "weights": (checkpoint("encoder.pt", load_encoder), whole("encoder.pt")),
    "state": (checkpoint("training_state.pt", load_training_state), whole("training_state.pt")),
    "history": (checkpoint("metrics.jsonl", load_training_state), whole("metrics.jsonl")),
    "sums": (sums, b"0  a\n"),
}


def read_or_refuse(parse: Callable[[Path, bytes], Any], folder: Path, content: bytes) -> None:
    """Have a parser take a file, or say in a sentence of ours what is wrong with it; any other error is let through."""
    try:
        parse(folder, content)
    except ValueError as error:
        if type(error) is not ValueError or not str(error).strip():
            raise AssertionError("not a sentence of ours") from error


PIECES = [b"\n", b" ", b",", b'"', b"\x00", b"\xff", b"-1", b"nan", b"1e999", b"[", b"{", b"!!x", b"~"]


@st.composite
def spoilt(draw: st.DrawFn, valid: bytes) -> bytes:
    """Something valid of which pieces are removed, repeated, exchanged for others; or anything at all."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    content = bytearray(valid)
    span = st.integers(1, 8) | st.integers(1, max(len(valid), 1))
    pieces = st.sampled_from(PIECES)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(content)))
        stop = min(start + draw(span), len(content))
        content[start:stop] = draw(pieces | st.binary(max_size=4) | st.just(bytes(content[start:stop]) * 2))
    return bytes(content)


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_valid_is_read(name: str, tmp_path: Path) -> None:
    parse, valid = PARSERS[name]
    parse(tmp_path, valid)


@pytest.mark.parametrize("name", PARSERS)
def test_a_file_is_read_or_refused_whatever_it_holds(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    parse, valid = PARSERS[name]
    folder = tmp_path_factory.mktemp("untrusted")

    @settings(max_examples=150)
    @given(content=spoilt(valid))
    def parse_anything(content: bytes) -> None:
        read_or_refuse(parse, folder, content)

    parse_anything()
