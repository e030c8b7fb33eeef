from dataclasses import replace

import numpy as np
import pytest
from learning_fixtures import write_audio

from raysv.corpus.pairlists import pair_set, read_pair_list
from raysv.corpus.store import open_store
from raysv.corpus.utterances import Utterance


@pytest.fixture
def speakers(tmp_path):
    """Finds whom the recordings of a pair list are said to be of, as sets of recordings."""
    for name in "abcdef":
        write_audio(tmp_path / f"{name}.wav", np.linspace(-0.5, 0.5, 400))

    def found(pairs, known=None, enrolments=None):
        file = tmp_path / "pairs.txt"
        file.write_text("".join(f"{label} {pair[0]} {pair[1:]}\n" for label, pair in pairs), encoding="utf-8")
        manifest = {key: Utterance(key, speaker, tmp_path) for key, speaker in (known or {}).items()}
        listed = read_pair_list(file, tmp_path, manifest, enrolments or {})
        listed = replace(listed, paths={key: tmp_path / f"{key}.wav" for key in listed.paths})
        pairs_found = pair_set(listed, open_store(list(listed.paths.values()), tmp_path / "cache"))
        assert len(pairs_found.speakers) == len(listed.paths)
        groups = {}
        for key, number in zip(listed.paths, pairs_found.speakers.tolist(), strict=True):
            groups[number] = groups.get(number, "") + key
        assert sorted(groups) == list(range(len(groups)))
        return {"".join(sorted(keys)) for keys in groups.values()}

    return found


def test_recordings_of_a_speaker_of_the_manifest_share_a_number(speakers):
    pairs = [(1, "ab"), (0, "ac"), (0, "ad")]
    assert speakers(pairs, dict(zip("abcd", "xxyy", strict=True))) == {"ab", "cd"}


def test_without_a_manifest_pairs_of_one_speaker_link_recordings(speakers):
    assert speakers([(1, "ab"), (1, "cb"), (0, "ad"), (0, "ef"), (1, "ed")]) == {"abc", "de", "f"}


def test_pairs_link_those_of_a_manifest_with_those_of_none(speakers):
    assert speakers([(1, "ab"), (1, "cd"), (0, "ce")], {"b": "x", "c": "x", "e": "y"}) == {"abcd", "e"}


def test_the_recordings_of_an_enrolment_are_of_one_speaker(speakers):
    pairs = [(1, "Md"), (0, "Me"), (0, "fe")]
    assert speakers(pairs, enrolments={"M": ("a", "b", "c")}) == {"abcd", "e", "f"}


def test_recordings_that_cannot_be_used_link_nothing(speakers, tmp_path):
    write_audio(tmp_path / "b.wav", np.zeros(400))
    assert speakers([(1, "ab"), (1, "bc"), (1, "de"), (0, "da")]) == {"a", "b", "c", "de"}
