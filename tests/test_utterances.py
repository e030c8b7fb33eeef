from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysv.corpus.utterances import (
    Utterance,
    VerificationPair,
    find_audio,
    read_clips,
    read_enrolments,
    read_pair_columns,
    read_pairs,
    read_utterances,
    write_enrolments,
    write_pairs,
    write_utterances,
)

NAMES = st.text(st.characters(categories=("L", "N")), min_size=1).map(lambda name: f"id{name}")


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        text(folder / name, "")
    return folder


def test_a_manifest_is_read_in_order_with_paths_below_the_root(tmp_path):
    path = text(
        tmp_path / "train.csv", "speaker,path,duration_s,session,age\nb,x/1.wav,2.5,monday,33\na,/far/2.wav,,,\n"
    )
    assert read_utterances(path, tmp_path / "corpus") == [
        Utterance("x/1.wav", "b", tmp_path / "corpus" / "x/1.wav", "monday", 2.5),
        Utterance("/far/2.wav", "a", Path("/far/2.wav")),
    ]


def test_paths_are_absolute_whatever_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = text(tmp_path / "train.csv", "path,speaker\n1.wav,a\n")
    assert read_utterances(path, Path(".")) == [Utterance("1.wav", "a", tmp_path / "1.wav")]


def test_byte_order_marks_crlf_and_blank_lines_change_nothing(tmp_path):
    plain = read_utterances(text(tmp_path / "a.csv", "speaker,path\na,1.wav\nb,2.wav\n"), tmp_path)
    windows = text(tmp_path / "b.csv", "\ufeffspeaker,path\r\na,1.wav\r\n\r\nb,2.wav\r\n")
    assert read_utterances(windows, tmp_path) == plain
    pairs = text(tmp_path / "pairs.txt", "\ufeff1 a b\r\n\r\n0 a c\r\n")
    assert read_pairs(pairs) == [VerificationPair("a", "b", True), VerificationPair("a", "c", False)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"train\.csv:1: the header lacks speaker, path; it has: nothing"),
        ("spk,path\na,1.wav\n", r"train\.csv:1: the header lacks speaker; it has: spk, path"),
        ("speaker,path\n", r"train\.csv holds no utterances"),
        ("speaker,path\na,1.wav\na\n", r"train\.csv:3: path is empty"),
        ("speaker,path\na,1.wav\n,2.wav\n", r"train\.csv:3: speaker is empty"),
        ("speaker,path\na,1.wav\nb,2.wav\nb,1.wav\n", r"train\.csv:4: 1\.wav was already listed in line 2"),
        ("speaker,path,duration_s\na,1.wav,long\n", r"train\.csv:2: a duration must be .* got 'long'"),
        ("speaker,path,duration_s\na,1.wav,-1\n", r"train\.csv:2: a duration must be"),
        ('speaker,path\na,"1.wav\n', r"train\.csv is not CSV"),
    ],
)
def test_a_faulty_manifest_is_refused_with_its_line(tmp_path, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_utterances(text(tmp_path / "train.csv", content), tmp_path)


def test_a_missing_list_and_one_that_is_no_text_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"No list .*train\.csv"):
        read_utterances(tmp_path / "train.csv", tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"speaker,path\nJos\xe9,1.wav\n")
    (tmp_path / "latin.txt").write_bytes(b"1 Jos\xe9 b\n")
    with pytest.raises(ValueError, match=r"latin\.csv is not CSV in UTF-8"):
        read_utterances(tmp_path / "latin.csv", tmp_path)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        read_pairs(tmp_path / "latin.txt")


def test_a_kaldi_folder_names_utterances_by_their_ids(tmp_path):
    text(tmp_path / "kaldi/wav.scp", "u1 audio/one.wav\nu2 /far/name with spaces.flac\n")
    text(tmp_path / "kaldi/utt2spk", "u2 bob\nu1 ann\n")
    text(tmp_path / "kaldi/utt2dur", "u1 1.25\n")
    assert read_utterances(tmp_path / "kaldi", tmp_path) == [
        Utterance("u1", "ann", tmp_path / "audio/one.wav", duration_s=1.25),
        Utterance("u2", "bob", Path("/far/name with spaces.flac")),
    ]


@pytest.mark.parametrize(
    ("recordings", "speakers", "complaint"),
    [
        ("u1 sph2pipe -f wav one.sph |\n", "u1 ann\n", r"wav\.scp:1: expected an audio file, got 'sph2pipe"),
        ("u1 all.ark:17\n", "u1 ann\n", r"wav\.scp:1: expected an audio file"),
        ("u1\n", "u1 ann\n", r"wav\.scp:1: expected an audio file, got ''"),
        ("u1 1.wav\nu2 2.wav\n", "u1 ann\n", r"wav\.scp:2: .*utt2spk gives no speaker for u2"),
        ("u1 1.wav\nu1 2.wav\n", "u1 ann\n", r"wav\.scp:2: u1 was already listed in line 1"),
        ("", "", "holds no utterances"),
    ],
)
def test_a_faulty_kaldi_folder_is_refused_with_its_line(tmp_path, recordings, speakers, complaint):
    text(tmp_path / "wav.scp", recordings)
    text(tmp_path / "utt2spk", speakers)
    with pytest.raises(ValueError, match=complaint):
        read_utterances(tmp_path, tmp_path)


def test_kaldi_segments_are_refused_rather_than_ignored(tmp_path):
    touch(tmp_path, "wav.scp", "utt2spk", "segments")
    with pytest.raises(ValueError, match="segments are not supported"):
        read_utterances(tmp_path, tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=("C",), exclude_characters="/"), min_size=1), unique=True)
)
def test_utterances_survive_writing_and_reading(tmp_path, names):
    kept = [name for name in names if name not in (".", "..")] or ["x"]
    utterances = [Utterance(f"a/{name}", name, tmp_path / "a" / name, name, 1 / 3) for name in kept]
    write_utterances(utterances, tmp_path / "list.csv", tmp_path)
    assert read_utterances(tmp_path / "list.csv", tmp_path) == utterances


def test_audio_outside_the_root_is_written_with_its_absolute_path(tmp_path):
    write_utterances([Utterance("u1", "ann", tmp_path / "1.wav")], tmp_path / "list.csv", tmp_path / "root")
    assert (tmp_path / "list.csv").read_text() == f"speaker,path,duration_s,session\nann,{tmp_path}/1.wav,,\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(NAMES, NAMES, st.booleans()), min_size=1), form=st.sampled_from(["vox", "kaldi", "cn"]))
def test_the_three_forms_of_pair_lists_say_the_same(tmp_path, rows, form):
    pairs = [VerificationPair(*row) for row in rows]
    lines = {
        "vox": lambda pair: f"{pair.same_speaker:d} {pair.enrolment} {pair.test}",
        "kaldi": lambda pair: f"{pair.enrolment} {pair.test} {'target' if pair.same_speaker else 'nontarget'}",
        "cn": lambda pair: f"{pair.enrolment}\t{pair.test}  {pair.same_speaker:d}",
    }
    assert read_pairs(text(tmp_path / "pairs.txt", "\n".join(map(lines[form], pairs)))) == pairs
    write_pairs(pairs, tmp_path / "again.txt")
    assert read_pairs(tmp_path / "again.txt") == pairs


def test_names_that_look_like_labels_are_told_apart_by_later_lines(tmp_path):
    path = text(tmp_path / "pairs.txt", "1 a 0\n0 1 0\n1 a b\n")
    assert read_pairs(path)[:2] == [VerificationPair("a", "0", True), VerificationPair("1", "0", False)]
    path = text(tmp_path / "pairs.txt", "1 a 0\na b 1\n")
    assert read_pairs(path) == [VerificationPair("1", "a", False), VerificationPair("a", "b", True)]
    with pytest.raises(ValueError, match=r"fits the forms `1\|0 enrolment test` and `enrolment test 1\|0`"):
        read_pairs(text(tmp_path / "pairs.txt", "1 a 0\n0 b 1\n"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"pairs\.txt holds no pairs"),
        ("a b same\n", r"pairs\.txt:1: 'a b same' is in none of the forms"),
        ("1 a\n", r"pairs\.txt:1: '1 a' is in none of the forms"),
        ("1 a b\n\n2 a b\n", r"pairs\.txt:3: expected `1\|0 enrolment test` as in the lines above, got '2 a b'"),
        ("1 a b\n0 a b c\n", r"pairs\.txt:2: expected"),
        ("a b target\na b 0\n", r"pairs\.txt:2: expected `enrolment test target\|nontarget`"),
    ],
)
def test_a_faulty_pair_list_is_refused_with_its_line(tmp_path, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_pairs(text(tmp_path / "pairs.txt", content))


def test_a_name_with_a_space_is_refused_when_pairs_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"pairs\.txt cannot hold 'John Doe/1\.wav'"):
        write_pairs([VerificationPair("John Doe/1.wav", "b", True)], tmp_path / "pairs.txt")


def test_equal_names_in_a_pair_list_share_one_string(tmp_path):
    first, second = read_pairs(text(tmp_path / "pairs.txt", "1 some-name x\n0 y some-name\n"))
    assert first.enrolment is second.test


def test_enrolments_survive_writing_and_reading(tmp_path):
    enrolments = {"ann": ("1.wav", "2.wav"), "bob": ("3.wav",)}
    write_enrolments(enrolments, tmp_path / "enrolments.txt")
    assert read_enrolments(tmp_path / "enrolments.txt") == enrolments


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no enrolments"),
        ("ann 1.wav\nbob\n", r"enrolments\.txt:2: enrolment bob names no utterance"),
        ("ann 1.wav\nann 2.wav\n", r"enrolments\.txt:2: ann was already listed in line 1"),
    ],
)
def test_faulty_enrolments_are_refused_with_their_line(tmp_path, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_enrolments(text(tmp_path / "enrolments.txt", content))


def test_clips_come_from_a_folder_a_musan_folder_or_a_list(tmp_path):
    folder = touch(tmp_path / "rooms", "b/2.WAV", "a/1.flac", "a/._1.flac", "readme.txt")
    assert read_clips(folder, "rir", tmp_path) == [folder / "a/1.flac", folder / "b/2.WAV"]

    musan = touch(tmp_path / "musan", "noise/free/n.wav", "music/fma/m.wav", "speech/us/s.wav")
    found = {kind: read_clips(musan, kind, tmp_path) for kind in ("noise", "music", "babble")}
    expected = {"noise": "noise/free/n.wav", "music": "music/fma/m.wav", "babble": "speech/us/s.wav"}
    assert found == {kind: [musan / name] for kind, name in expected.items()}

    table = text(tmp_path / "noise.csv", "path,split\nn/1.wav,train\nn/2.wav,eval\nn/3.wav,\n/far/4.wav,train\n")
    assert read_clips(table, "noise", tmp_path) == [tmp_path / "n/1.wav", tmp_path / "n/3.wav", Path("/far/4.wav")]
    assert read_clips(text(tmp_path / "all.csv", "path\n1.wav\n"), "rir", tmp_path) == [tmp_path / "1.wav"]


def test_missing_clips_are_refused_by_their_key(tmp_path):
    musan = touch(tmp_path / "musan", "noise/n.wav", "music/m.wav", "speech/readme")
    with pytest.raises(ValueError, match=r"data\.noise: no file or folder .*nowhere"):
        read_clips(tmp_path / "nowhere", "noise", tmp_path)
    with pytest.raises(ValueError, match=r"data\.babble: no \.wav or \.flac below .*speech"):
        read_clips(musan, "babble", tmp_path)
    with pytest.raises(ValueError, match=r"data\.rir: .* is a MUSAN folder"):
        read_clips(musan, "rir", tmp_path)
    with pytest.raises(ValueError, match=r"data\.noise: .* no rows whose split is train"):
        read_clips(text(tmp_path / "noise.csv", "path,split\n1.wav,eval\n"), "noise", tmp_path)


def test_audio_behind_a_link_is_found(tmp_path):
    touch(tmp_path / "store", "1.wav")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "ann").symlink_to(tmp_path / "store")
    assert find_audio(tmp_path / "corpus") == [tmp_path / "corpus/ann/1.wav"]


def test_columns_hold_every_name_once(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("1 a b\n0 b c\n\n1 a a\n", encoding="utf-8")
    columns = read_pair_columns(path)
    assert columns.names == ["a", "b", "c"]
    assert [column.tolist() for column in columns[1:]] == [[0, 1, 0], [1, 2, 0], [True, False, True]]
    named = [
        (columns.names[enrolment], columns.names[test], same)
        for enrolment, test, same in zip(*columns[1:], strict=True)
    ]
    assert read_pairs(path) == [VerificationPair(*pair) for pair in named]
