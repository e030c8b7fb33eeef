import dataclasses
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raysv import prepare
from raysv.config import DataConfig
from raysv.corpus.layouts import (
    Lists,
    cnceleb,
    complete,
    hold_out,
    kaldi,
    make_pairs,
    plain,
    voxceleb,
    with_durations,
    write_lists,
)
from raysv.corpus.utterances import Utterance, VerificationPair, read_enrolments, read_pairs, read_utterances


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        text(folder / name, "")
    return folder


def speakers(utterances):
    return {item.speaker for item in utterances}


def made_up(count, utterances, sessions=1):
    """`count` speakers; utterance n of each belongs to session n modulo `sessions`."""
    return [
        Utterance(f"{s}/{n}.wav", f"s{s}", Path(f"/{s}/{n}.wav"), session=str(n % sessions) if sessions > 1 else "")
        for s in range(count)
        for n in range(utterances)
    ]


def generator(seed=0):
    return np.random.default_rng(seed)


def cn_celeb(folder):
    """A CN-Celeb1 with two training speakers and two evaluation speakers, and a CN-Celeb2 beside it."""
    one = folder / "CN-Celeb_flac"
    touch(one, *(f"data/{s}/{u}.flac" for s in ("id00010", "id00011") for u in ("singing-01-001", "vlog-02-003")))
    touch(one, *(f"data/id0080{s}/{u}.flac" for s in (0, 1) for u in ("drama-01-001", "drama-01-002", "speech-02-001")))
    touch(one, *(f"eval/enroll/id0080{s}-enroll.flac" for s in (0, 1)))
    touch(one, *(f"eval/test/id0080{s}-singing-01-005.flac" for s in (0, 1)))
    text(one / "dev/dev.lst", "id00010\nid00011\n")
    text(one / "eval/lists/enroll.lst", "".join(f"id0080{s}-enroll enroll/id0080{s}-enroll.wav\n" for s in (0, 1)))
    text(
        one / "eval/lists/enroll.map",
        "id00800-enroll id00800/drama-01-001.wav id00800/drama-01-002.wav\nid00801-enroll id00801/drama-01-001.wav\n",
    )
    trials = ((e, t, int(e == t)) for e in (0, 1) for t in (0, 1))
    text(
        one / "eval/lists/trials.lst",
        "".join(f"id0080{e}-enroll test/id0080{t}-singing-01-005.wav {same}\n" for e, t, same in trials),
    )
    touch(folder / "CN-Celeb2_flac", "spk.lst", "data/id10000/vlog-01-001.flac", "data/id10000/vlog-01-002.flac")
    return folder


def test_voxceleb_is_found_at_any_depth_and_keyed_like_its_lists(tmp_path):
    touch(tmp_path, "vox1/dev/wav/id10001/abc/00001.wav", "vox2/flac/id00012/-x_y/00002.flac", "musan/noise/n.wav")
    lists = voxceleb(tmp_path)
    assert lists.train == [
        Utterance("id10001/abc/00001.wav", "id10001", tmp_path / "vox1/dev/wav/id10001/abc/00001.wav", "abc"),
        Utterance("id00012/-x_y/00002.wav", "id00012", tmp_path / "vox2/flac/id00012/-x_y/00002.flac", "-x_y"),
    ]
    assert lists.notes == ["1 audio files outside idXXXXX/<video>/ were left out."]


def test_voxceleb_that_is_not_converted_yet_says_how_to(tmp_path):
    touch(tmp_path, "aac/id00012/abc/00001.m4a", "aac/id00012/abc/00002.m4a", "wav/id00012/abc/00001.wav")
    with pytest.raises(ValueError, match=r"^1 recordings are there only as \.m4a, such as .*00002\.m4a.*ffmpeg"):
        voxceleb(tmp_path)
    touch(tmp_path, "wav/id00012/abc/00002.wav")
    assert [item.path.suffix for item in voxceleb(tmp_path).train] == [".wav", ".wav"]


def test_a_recording_that_is_there_twice_is_refused(tmp_path):
    touch(tmp_path, "a/id00012/abc/00001.wav", "b/id00012/abc/00001.flac")
    with pytest.raises(ValueError, match=r"id00012/abc/00001\.wav is there twice"):
        voxceleb(tmp_path)


@pytest.mark.parametrize("layout", [voxceleb, cnceleb, kaldi, plain])
def test_a_folder_without_the_corpus_is_refused(tmp_path, layout):
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        layout(touch(tmp_path, "readme.txt"))


def test_cnceleb_trains_on_its_dev_speakers_and_on_cnceleb2(tmp_path):
    lists = cnceleb(cn_celeb(tmp_path))
    assert Counter(item.speaker for item in lists.train) == {"id00010": 2, "id00011": 2, "id10000": 2}
    assert {item.session for item in lists.train if item.speaker == "id00010"} == {"singing-01", "vlog-02"}


def test_cnceleb_enrolments_are_the_recordings_of_the_map(tmp_path):
    lists = cnceleb(cn_celeb(tmp_path) / "CN-Celeb_flac")
    assert lists.enrolments == {
        "id00800-enroll": ("id00800/drama-01-001.wav", "id00800/drama-01-002.wav"),
        "id00801-enroll": ("id00801/drama-01-001.wav",),
    }
    assert {item.path.relative_to(tmp_path / "CN-Celeb_flac").as_posix() for item in lists.test} == {
        "data/id00800/drama-01-001.flac",
        "data/id00800/drama-01-002.flac",
        "data/id00801/drama-01-001.flac",
        "eval/test/id00800-singing-01-005.flac",
        "eval/test/id00801-singing-01-005.flac",
    }
    first = lists.test_pairs["cnceleb"][0]
    assert first == VerificationPair("id00800-enroll", "test/id00800-singing-01-005.wav", True)


def test_cnceleb_without_a_map_enrols_with_the_joined_recordings(tmp_path):
    folder = cn_celeb(tmp_path) / "CN-Celeb_flac"
    (folder / "eval/lists/enroll.map").unlink()
    lists = cnceleb(folder)
    assert lists.enrolments["id00800-enroll"] == ("enroll/id00800-enroll.wav",)
    assert {item.path.parent.name for item in lists.test} == {"enroll", "test"}


def test_cnceleb_trials_without_their_audio_are_refused(tmp_path):
    folder = cn_celeb(tmp_path) / "CN-Celeb_flac"
    (folder / "eval/test/id00801-singing-01-005.flac").unlink()
    with pytest.raises(ValueError, match=r"lists: 1 of 5 utterances are not in the corpus, such as test/id00801-sing"):
        cnceleb(folder)


def test_kaldi_folders_are_one_set_or_three(tmp_path):
    for part, speaker in (("train", "a"), ("dev", "b"), ("test", "c")):
        text(tmp_path / part / "wav.scp", f"{speaker}1 {part}/1.wav\n{speaker}2 {part}/2.wav\n")
        text(tmp_path / part / "utt2spk", f"{speaker}1 {speaker}\n{speaker}2 {speaker}\n")
        text(tmp_path / part / "trials", f"{speaker}1 {speaker}2 target\n")
    lists = kaldi(tmp_path)
    assert [speakers(part) for part in (lists.train, lists.dev, lists.test)] == [{"a"}, {"b"}, {"c"}]
    assert lists.dev_pairs == [VerificationPair("b1", "b2", True)]
    assert lists.test_pairs == {"test": [VerificationPair("c1", "c2", True)]}
    assert kaldi(tmp_path / "dev").train[0].path == tmp_path / "dev/dev/1.wav"


def test_a_plain_folder_has_a_folder_per_speaker(tmp_path, monkeypatch):
    touch(tmp_path, "ann/1.wav", "ann/monday/am/2.flac", "bob/1.wav", "stray.wav")
    monkeypatch.chdir(tmp_path)
    lists = plain(Path("."))
    assert [(item.key, item.speaker, item.session) for item in lists.train] == [
        ("ann/1.wav", "ann", ""),
        ("ann/monday/am/2.flac", "ann", "monday/am"),
        ("bob/1.wav", "bob", ""),
    ]
    assert lists.train[0].path == tmp_path / "ann/1.wav"
    assert lists.notes == ["1 audio files outside the speakers' folders were left out."]


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(2, 4), each=st.integers(2, 6), sessions=st.integers(1, 3), targets=st.integers(1, 20),
    nontargets=st.integers(0, 5), seed=st.integers(0, 9),
)  # fmt: skip
def test_pairs_are_right_fresh_across_sessions_and_as_many_as_asked(count, each, sessions, targets, nontargets, seed):
    known = {item.key: item for item in made_up(count, each, sessions)}
    pairs = make_pairs(list(known.values()), targets, nontargets, generator(seed))
    sides = [(known[pair.enrolment], known[pair.test]) for pair in pairs]
    assert len({frozenset((pair.enrolment, pair.test)) for pair in pairs}) == len(pairs)
    assert all(pair.same_speaker == (a.speaker == b.speaker) for pair, (a, b) in zip(pairs, sides, strict=True))
    own = [utterance for utterance in known.values() if utterance.speaker == "s0"]
    across = [1 for a, b in combinations(own, 2) if sessions == 1 or a.session != b.session]
    assert sum(pair.same_speaker for pair in pairs) == count * min(targets, len(across))
    if sessions > 1:
        assert all(a.session != b.session for pair, (a, b) in zip(pairs, sides, strict=True) if pair.same_speaker)
    if targets * nontargets <= each and count > 2:  # no enrolment can run out of strangers
        assert sum(not pair.same_speaker for pair in pairs) == nontargets * sum(pair.same_speaker for pair in pairs)


def test_target_pairs_use_utterances_evenly():
    pairs = make_pairs(made_up(2, 30), 30, 0, generator())
    assert max(Counter(name for pair in pairs for name in (pair.enrolment, pair.test)).values()) <= 3


def test_pairs_need_two_speakers_and_two_utterances():
    for utterances in (made_up(1, 5), made_up(5, 1)):
        with pytest.raises(ValueError, match="two speakers, and two utterances"):
            make_pairs(utterances, 1, 1, generator())


def test_held_out_speakers_leave_training_and_depend_on_the_seed_alone():
    utterances = [*made_up(10, 3), Utterance("once.wav", "once", Path("/once.wav"))]
    train, dev = hold_out(utterances, 4, generator())
    assert len(speakers(dev)) == 4 and "once" not in speakers(dev)
    assert not speakers(train) & speakers(dev) and len(train) + len(dev) == len(utterances)
    assert hold_out(utterances[::-1], 4, generator())[1] == [item for item in utterances[::-1] if item in dev]
    assert hold_out(utterances, 4, generator(1))[1] != dev


@pytest.mark.parametrize("wanted", [0, 1, 4, 20])
def test_holding_out_leaves_at_least_two_speakers_on_both_sides(wanted):
    with pytest.raises(ValueError, match=f"Cannot hold out {wanted} of 5 training speakers"):
        hold_out(made_up(5, 2), wanted, generator())


def test_no_speaker_of_the_test_pairs_stays_in_training():
    pairs = {"hard": [VerificationPair("0/0.wav", "1/0.wav", False), VerificationPair("0/0.wav", "0/1.wav", True)]}
    lists = complete(Lists(made_up(12, 3)), pairs, 4, 2, generator())
    assert [item.key for item in lists.test] == ["0/0.wav", "1/0.wav", "0/1.wav"]
    assert len(speakers(lists.train)) == 6 and len(speakers(lists.dev)) == 4
    assert not {"s0", "s1"} & speakers([*lists.train, *lists.dev])
    assert "2 speakers (6 utterances) left out of training: these speakers are in the dev or test part." in lists.notes


def test_speakers_with_few_utterances_are_left_out_and_counted():
    once = [Utterance(f"{n}.wav", f"once{n}", Path(f"/{n}.wav")) for n in range(3)]
    lists = complete(Lists([*made_up(6, 2), *once]), {}, 2, 2, generator())
    assert len(speakers(lists.train)) == 4
    assert "3 speakers (3 utterances) left out of training: fewer than 2 utterances of a speaker." in lists.notes


def test_dev_lists_of_the_corpus_are_kept():
    own = Lists(made_up(3, 2), dev=made_up(2, 2), dev_pairs=[VerificationPair("0/0.wav", "1/0.wav", False)])
    lists = complete(own, {}, 20, 2, generator())
    assert (lists.dev, lists.dev_pairs) == (own.dev, own.dev_pairs)
    assert speakers(lists.train) == {"s2"}


def test_pairs_of_another_corpus_are_refused_by_name():
    pairs = {"vox1_O": [VerificationPair("0/0.wav", "id10270/x/1.wav", False)]}
    with pytest.raises(ValueError, match=r"test pairs vox1_O: 1 of 2 .* such as id10270/x/1\.wav; .* like 0/0\.wav"):
        complete(Lists(made_up(6, 2)), pairs, 2, 2, generator())


def test_one_name_for_two_recordings_is_refused():
    other = [Utterance("0/0.wav", "s9", Path("/elsewhere.wav"))]
    with pytest.raises(ValueError, match=r"0/0\.wav is there twice"):
        complete(Lists(made_up(6, 2), test=other), {}, 2, 2, generator())


def test_written_lists_name_everything_by_its_path(tmp_path):
    found = cnceleb(cn_celeb(tmp_path))
    dev_pairs = make_pairs(found.train, 1, 1, generator())
    data = write_lists(dataclasses.replace(found, dev=found.train, dev_pairs=dev_pairs), tmp_path / "lists", tmp_path)
    DataConfig(**data)
    assert data == {
        "root": str(tmp_path),
        "train": "lists/train.csv",
        "dev_pairs": "lists/dev_pairs.txt",
        "test_pairs": {"cnceleb": "lists/test_pairs.txt"},
        "utterances": ["lists/dev.csv", "lists/test.csv"],
        "enrolments": ["lists/enrolments.txt"],
    }
    known = {item.key for item in read_utterances(tmp_path / "lists/test.csv", tmp_path)}
    enrolments = read_enrolments(tmp_path / "lists/enrolments.txt")
    pairs = read_pairs(tmp_path / "lists/test_pairs.txt")
    assert all(pair.enrolment in enrolments and pair.test in known for pair in pairs)
    assert all((tmp_path / key).is_file() for key in known)
    assert {key for keys in enrolments.values() for key in keys} <= known


def test_durations_come_from_the_files(tmp_path):
    soundfile.write(tmp_path / "1.wav", np.zeros(8000, np.float32), 16000)
    item = Utterance("1.wav", "ann", tmp_path / "1.wav")
    assert with_durations(Lists([item])).train[0].duration_s == 0.5
    touch(tmp_path, "empty.wav")
    with pytest.raises(ValueError, match=r"empty\.wav cannot be read"):
        with_durations(Lists([dataclasses.replace(item, path=tmp_path / "empty.wav")]))


def test_the_door_runs_as_a_file_and_prints_the_section_to_paste(tmp_path):
    corpus, output = tmp_path / "corpus", tmp_path / "lists"
    for speaker in range(8):
        for session in "ab":
            path = corpus / f"s{speaker}" / session / "1.wav"
            path.parent.mkdir(parents=True)
            soundfile.write(path, np.zeros(16000, np.float32), 16000)
    easy = text(tmp_path / "easy.txt", "1 s0/a/1.wav s0/b/1.wav\n0 s0/a/1.wav s1/b/1.wav\n")
    hard = text(tmp_path / "hard.txt", "s1/a/1.wav s0/b/1.wav nontarget\ns1/a/1.wav s1/b/1.wav target\n")
    door = shutil.copy(prepare.__file__, tmp_path / "prepare.py")
    command = [sys.executable, door, "folder", "corpus", "--output", "lists", "--pairs", easy, hard]
    command += ["--dev-speakers", "3", "--durations"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "train: 3 speakers, 6 utterances, 0.0 hours\n" in run.stdout
    data = yaml.safe_load(run.stdout[run.stdout.index("data:") :])["data"]
    DataConfig(**data)
    assert data["root"] == str(corpus) and data["train"] == str(output / "train.csv")
    assert data["test_pairs"] == {"easy": str(output / "test_easy.txt"), "hard": str(output / "test_hard.txt")}
    assert read_pairs(output / "test_hard.txt")[1] == VerificationPair("s1/a/1.wav", "s1/b/1.wav", True)
    parts = [read_utterances(Path(data["root"]) / name, corpus) for name in (data["train"], *data["utterances"])]
    assert [len(speakers(part)) for part in parts] == [3, 3, 2]
    assert {item.duration_s for part in parts for item in part} == {1.0}


def test_the_door_lets_a_corpus_name_recordings_elsewhere_only_when_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, *(f"audio/s{speaker}/{take}.wav" for speaker in range(6) for take in (1, 2)))
    names = [f"s{speaker}-{take}" for speaker in range(6) for take in (1, 2)]
    scp = "".join(f"{name} {tmp_path}/audio/{name.replace('-', '/')}.wav\n" for name in names)
    text(tmp_path / "lists" / "wav.scp", scp)
    text(tmp_path / "lists" / "utt2spk", "".join(f"{name} {name[:2]}\n" for name in names))
    command = ["kaldi", "lists", "--dev-speakers", "2"]
    assert prepare.main(command) == 2
    assert "12 recordings outside lists" in capsys.readouterr().err
    assert not (tmp_path / "lists" / "train.csv").exists()
    assert prepare.main([*command, "--outside-root"]) == 0
    assert yaml.safe_load(capsys.readouterr().out.partition("\n\n")[2].partition("\n\n")[2])["data"]["outside_root"]


@pytest.mark.parametrize(
    "arguments",
    [["voxceleb", "nowhere"], ["folder", "."], ["folder", ".", "--pairs", "a.txt", "b/a.txt"], ["kaldi", "pyproject"]],
)
def test_the_door_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("raysv.prepare: ") and error.count("\n") == 1


def test_the_door_writes_over_lists_only_when_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(touch(tmp_path, *(f"corpus/s{speaker}/{take}.wav" for speaker in range(6) for take in (1, 2))))
    door = ["folder", "corpus", "--output", "lists", "--dev-speakers", "2"]
    assert prepare.main(door) == 0
    before = (tmp_path / "lists/train.csv").read_text()
    assert prepare.main([*door, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "lists has lists already" in error and "--overwrite" in error
    assert (tmp_path / "lists/train.csv").read_text() == before
    assert prepare.main([*door, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "lists/train.csv").read_text() != before


def test_the_door_calls_itself_as_it_is_called(capsys):
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: raysv.prepare ")
