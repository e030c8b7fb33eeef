import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from learning_fixtures import write_audio

from raysv.config import AugmentConfig, DataConfig
from raysv.corpus import loading
from raysv.corpus.audio import read_audio
from raysv.corpus.cache import cache_folder
from raysv.corpus.loading import find_recordings, load_corpus, load_pairs
from raysv.corpus.store import store_folder
from raysv.corpus.utterances import read_pair_columns, read_pairs, read_utterances

QUIET = AugmentConfig(strength=0.0)


def load(root, augment=QUIET, tests=False, **data):
    return load_corpus(DataConfig(root=str(root), **data), augment, tests=tests)


def refused(root, augment=QUIET, **data):
    with pytest.raises(ValueError, match=r".") as caught:
        load(root, augment, **data)
    return str(caught.value)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def append(path, *lines):
    text(path, *path.read_text(encoding="utf-8").splitlines(), *lines)


def dev(root):
    """The paths of the dev recordings, speaker after speaker."""
    return [row["path"] for row in rows(root / "dev.csv")]


def silence(root, *paths):
    for path in paths:
        write_audio(root / path, np.zeros(2000))


def test_classes_are_what_the_training_list_holds(tiny_corpus):
    listed = rows(tiny_corpus / "train.csv")
    train = load(tiny_corpus).train
    assert train.speakers == sorted({row["speaker"] for row in listed})
    assert [train.speakers[label] for label in train.labels] == [row["speaker"] for row in listed]
    for place, row in zip(train.recordings, listed, strict=True):
        np.testing.assert_array_equal(train.store[place], read_audio(tiny_corpus / row["path"]))


def test_pairs_lead_to_the_recordings_that_the_list_names(tiny_corpus):
    corpus = load(tiny_corpus, tests=True)
    for name, pairs in (("dev", corpus.dev), ("test", corpus.tests["test"])):
        listed = read_pairs(tiny_corpus / f"{name}_pairs.txt")
        assert pairs.same_speaker.tolist() == [pair.same_speaker for pair in listed]
        for pair, model, test in list(zip(listed, pairs.enrolment, pairs.test, strict=True))[::17]:
            (enrolment,) = pairs.models[model]
            np.testing.assert_array_equal(pairs.store[enrolment], read_audio(tiny_corpus / pair.enrolment))
            np.testing.assert_array_equal(pairs.store[test], read_audio(tiny_corpus / pair.test))
    assert len(corpus.dev.store) == len(dev(tiny_corpus))


def test_recordings_are_found_without_being_opened(tiny_corpus):
    corpus = load(tiny_corpus, AugmentConfig())
    stores = [corpus.train.store, corpus.dev.store, *corpus.clips.values()]
    found = find_recordings(DataConfig(root=str(tiny_corpus)), AugmentConfig())
    cache = cache_folder(DataConfig())
    assert [store_folder(paths, cache) for paths in found] == [store.folder for store in stores]
    silence(tiny_corpus, *dev(tiny_corpus))
    assert find_recordings(DataConfig(root=str(tiny_corpus)), AugmentConfig()) == found


def test_test_lists_are_decoded_only_when_asked_for(tiny_corpus):
    (tiny_corpus / rows(tiny_corpus / "test.csv")[0]["path"]).unlink()
    assert load(tiny_corpus).tests == {}
    with pytest.raises(ValueError, match="1 recordings cannot be used"):
        load(tiny_corpus, tests=True)


def test_a_recording_may_be_known_by_its_path_alone(tiny_corpus):
    assert len(load(tiny_corpus, utterances=[]).dev.store) == len(dev(tiny_corpus))


def test_a_training_recording_among_the_pairs_is_refused(tiny_corpus):
    trained = rows(tiny_corpus / "train.csv")[0]["path"]
    append(tiny_corpus / "test_pairs.txt", f"0 {trained} {rows(tiny_corpus / 'test.csv')[0]['path']}")
    message = refused(tiny_corpus)
    assert "test_pairs.txt and the training list share 1 speakers or recordings" in message
    assert trained in message


def test_a_training_speaker_among_the_pairs_is_refused_by_manifest(tiny_corpus):
    speaker = rows(tiny_corpus / "train.csv")[0]["speaker"]
    write_audio(tiny_corpus / "elsewhere.wav", np.linspace(-0.5, 0.5, 2000))
    append(tiny_corpus / "dev.csv", f"{speaker},elsewhere.wav")
    append(tiny_corpus / "dev_pairs.txt", f"0 elsewhere.wav {dev(tiny_corpus)[0]}")
    message = refused(tiny_corpus)
    assert "dev_pairs.txt and the training list share 1" in message
    assert speaker in message


def test_a_training_speaker_among_the_pairs_is_refused_by_the_name_of_a_folder(tiny_corpus):
    speaker = rows(tiny_corpus / "train.csv")[0]["speaker"]
    write_audio(tiny_corpus / speaker / "session" / "new.wav", np.linspace(-0.5, 0.5, 2000))
    append(tiny_corpus / "dev_pairs.txt", f"0 {speaker}/session/new.wav {dev(tiny_corpus)[0]}")
    assert f"share 1 speakers or recordings: {speaker}." in refused(tiny_corpus)


def test_a_dev_recording_among_the_test_pairs_is_refused(tiny_corpus):
    listened, tested = dev(tiny_corpus)[0], rows(tiny_corpus / "test.csv")[0]["path"]
    append(tiny_corpus / "test_pairs.txt", f"0 {listened} {tested}")
    for manifests in (["dev.csv", "test.csv"], []):
        message = refused(tiny_corpus, utterances=manifests)
        assert f"test_pairs.txt and the dev pairs share 1 speakers or recordings: {listened}." in message


def test_a_dev_speaker_among_the_test_pairs_is_refused(tiny_corpus):
    tested = rows(tiny_corpus / "test.csv")[0]["path"]
    write_audio(tiny_corpus / "elsewhere.wav", np.linspace(-0.5, 0.5, 2000))
    append(tiny_corpus / "test.csv", "dev-0,elsewhere.wav")
    append(tiny_corpus / "test_pairs.txt", f"0 elsewhere.wav {tested}")
    assert "test_pairs.txt and the dev pairs share 1 speakers or recordings: dev-0." in refused(tiny_corpus)


def test_test_lists_may_share_speakers_and_recordings_among_themselves(tiny_corpus):
    shutil.copy(tiny_corpus / "test_pairs.txt", tiny_corpus / "again.txt")
    tests = load(tiny_corpus, tests=True, test_pairs={"test": "test_pairs.txt", "again": "again.txt"}).tests
    np.testing.assert_array_equal(tests["again"].same_speaker, tests["test"].same_speaker)


def test_a_training_recording_is_recognised_under_another_name(tiny_corpus):
    kaldi(tiny_corpus, "train")
    trained = rows(tiny_corpus / "train.csv")[0]["path"]
    plain = tiny_corpus / "plain.wav"
    shutil.move(tiny_corpus / trained, plain)
    scp = (tiny_corpus / "kaldi" / "wav.scp").read_text(encoding="utf-8").replace(trained, "plain.wav")
    (tiny_corpus / "kaldi" / "wav.scp").write_text(scp, encoding="utf-8")
    append(tiny_corpus / "dev_pairs.txt", f"0 plain.wav {dev(tiny_corpus)[0]}")
    assert "share 1 speakers or recordings: plain.wav" in refused(tiny_corpus, train="kaldi")


def test_a_leak_hidden_in_an_enrolment_of_several_recordings_is_found(tiny_corpus):
    first, second, *_, other = dev(tiny_corpus)
    trained = rows(tiny_corpus / "train.csv")[3]["path"]
    text(tiny_corpus / "enrolments.txt", f"model {first} {trained}")
    append(tiny_corpus / "dev_pairs.txt", f"1 model {second}", f"0 model {other}")
    assert trained in refused(tiny_corpus, enrolments=["enrolments.txt"])


def test_a_pair_of_a_recording_that_is_nowhere_is_named(tiny_corpus):
    append(tiny_corpus / "dev_pairs.txt", f"1 nobody/1.wav {dev(tiny_corpus)[0]}")
    message = refused(tiny_corpus)
    assert "dev_pairs.txt names 1 recordings that no manifest lists" in message
    assert "'nobody/1.wav'" in message
    assert "utterances or enrolments" in message


def test_test_lists_are_checked_even_where_they_are_not_decoded(tiny_corpus):
    append(tiny_corpus / "test_pairs.txt", f"1 nobody/1.wav {rows(tiny_corpus / 'test.csv')[0]['path']}")
    assert "test_pairs.txt names 1 recordings that no manifest lists" in refused(tiny_corpus)


@pytest.mark.parametrize("spelled", ["../{0}/{1}", "{2}"])
@pytest.mark.parametrize("listed", ["train.csv", "dev.csv", "noise.csv"])
def test_recordings_outside_the_root_are_refused_unless_they_are_allowed(tiny_corpus, tmp_path, listed, spelled):
    outside = tmp_path / "elsewhere" / "a.wav"
    write_audio(outside, read_audio(tiny_corpus / dev(tiny_corpus)[0]) / 32768)
    name = spelled.format("elsewhere", "a.wav", outside)
    if listed == "dev.csv":
        append(tiny_corpus / "dev.csv", f"dev-0,{name}")
        append(tiny_corpus / "dev_pairs.txt", f"1 {dev(tiny_corpus)[0]} {name}")
    else:
        append(tiny_corpus / listed, name if listed == "noise.csv" else f"new,{name}")
    noisy = AugmentConfig(strength=0.5, kinds=["noise"])
    assert "outside" in (told := refused(tiny_corpus, noisy)) and "data.outside_root" in told
    load(tiny_corpus, noisy, outside_root=True)


def test_one_name_for_two_recordings_or_speakers_is_refused_across_manifests(tiny_corpus):
    key, ids = dev(tiny_corpus)[0], kaldi(tiny_corpus, "dev")
    text(tiny_corpus / "same.csv", "speaker,path", f"dev-0,{key}")
    assert load(tiny_corpus, utterances=["dev.csv", "same.csv", "test.csv"]).dev
    text(tiny_corpus / "other.csv", "speaker,path", f"dev-1,{key}")
    message = refused(tiny_corpus, utterances=["dev.csv", "other.csv"])
    assert f"other.csv gives {key} another recording or speaker than an earlier list" in message
    text(tiny_corpus / "moved" / "utt2spk", f"{ids[0]} dev-0")
    text(tiny_corpus / "moved" / "wav.scp", f"{ids[0]} {dev(tiny_corpus)[1]}")
    assert f"moved gives {ids[0]} another recording" in refused(tiny_corpus, utterances=["kaldi", "moved"])


def test_one_name_for_two_enrolments_is_refused(tiny_corpus):
    first, second, third, *_, other = dev(tiny_corpus)
    append(tiny_corpus / "dev_pairs.txt", f"1 model {third}", f"0 model {other}")
    text(tiny_corpus / "one.txt", f"model {first} {second}")
    shutil.copy(tiny_corpus / "one.txt", tiny_corpus / "same.txt")
    assert load(tiny_corpus, enrolments=["one.txt", "same.txt"]).dev
    text(tiny_corpus / "two.txt", f"model {first}")
    message = refused(tiny_corpus, enrolments=["one.txt", "two.txt"])
    assert "two.txt makes the enrolment model of others than an earlier list" in message


def test_all_bad_recordings_are_named_at_once(tiny_corpus):
    trained, second = (row["path"] for row in rows(tiny_corpus / "train.csv")[:2])
    listened = dev(tiny_corpus)[0]
    noise = rows(tiny_corpus / "noise.csv")[0]["path"]
    (tiny_corpus / trained).unlink()
    silence(tiny_corpus, second, noise)
    (tiny_corpus / listened).write_bytes(b"no audio")
    message = refused(tiny_corpus, AugmentConfig(kinds=["noise"]))
    assert message.startswith("4 recordings cannot be used:\n")
    assert f"{tiny_corpus / trained}: there is no such file\n" in message
    assert f"{tiny_corpus / second}: it is silent from beginning to end\n" in message
    assert f"{tiny_corpus / noise}: it is silent from beginning to end\n" in message
    assert f"{tiny_corpus / listened}: it cannot be read as audio" in message
    assert message.endswith("leave them out with --skip-bad-audio.")


def test_of_very_many_bad_recordings_some_are_named(tiny_corpus):
    trained = [row["path"] for row in rows(tiny_corpus / "train.csv")]
    silence(tiny_corpus, *trained)
    message = refused(tiny_corpus).splitlines()
    assert message[0] == f"{len(trained)} recordings cannot be used:"
    assert message[20] == f"  {tiny_corpus / trained[19]}: it is silent from beginning to end"
    assert message[21] == f"  and {len(trained) - 20} more"
    assert len(message) == 23


def test_bad_recordings_can_be_left_out_with_their_pairs_and_speakers(tiny_corpus):
    listed = rows(tiny_corpus / "train.csv")
    gone = listed[0]["speaker"]
    silence(tiny_corpus, *(row["path"] for row in listed if row["speaker"] == gone), listed[-1]["path"])
    bad = dev(tiny_corpus)[0]
    (tiny_corpus / bad).unlink()
    noise = rows(tiny_corpus / "noise.csv")[0]["path"]
    silence(tiny_corpus, noise)
    corpus = load(tiny_corpus, AugmentConfig(kinds=["noise", "reverb"]), skip_bad_audio=True)

    silent = [row["path"] for row in listed if row["speaker"] == gone] + [listed[-1]["path"], noise]
    assert corpus.left_out == dict.fromkeys(
        (str(tiny_corpus / path) for path in silent), "it is silent from beginning to end"
    ) | {str(tiny_corpus / bad): "there is no such file"}
    assert str(corpus).endswith(f"; {len(silent) + 1} unusable recordings left out")
    kept = [row for row in listed[:-1] if row["speaker"] != gone]
    assert corpus.train.speakers == sorted({row["speaker"] for row in kept})
    assert [corpus.train.speakers[label] for label in corpus.train.labels] == [row["speaker"] for row in kept]
    for place, row in zip(corpus.train.recordings, kept, strict=True):
        np.testing.assert_array_equal(corpus.train.store[place], read_audio(tiny_corpus / row["path"]))

    pairs = [pair for pair in read_pairs(tiny_corpus / "dev_pairs.txt") if bad not in (pair.enrolment, pair.test)]
    assert corpus.dev.same_speaker.tolist() == [pair.same_speaker for pair in pairs]
    assert all(len(parts) for parts in corpus.dev.models)
    for pair, model, test in list(zip(pairs, corpus.dev.enrolment, corpus.dev.test, strict=True))[::13]:
        (enrolment,) = corpus.dev.models[model]
        np.testing.assert_array_equal(corpus.dev.store[enrolment], read_audio(tiny_corpus / pair.enrolment))
        np.testing.assert_array_equal(corpus.dev.store[test], read_audio(tiny_corpus / pair.test))


def test_nothing_left_to_train_on_is_an_error(tiny_corpus):
    trained = rows(tiny_corpus / "train.csv")
    silence(tiny_corpus, *(row["path"] for row in trained))
    message = refused(tiny_corpus, skip_bad_audio=True)
    assert f"None of the {len(trained)} recordings of train can be used; " in message
    assert "silent" in message


def test_no_clip_left_to_augment_with_is_an_error(tiny_corpus):
    silence(tiny_corpus, *(row["path"] for row in rows(tiny_corpus / "noise.csv")))
    assert "recordings of noise clips can be used" in refused(
        tiny_corpus, AugmentConfig(kinds=["noise"]), skip_bad_audio=True
    )


def test_a_pair_list_that_lost_one_kind_of_pairs_is_an_error(tiny_corpus):
    first, second, *_, other = dev(tiny_corpus)
    text(tiny_corpus / "dev_pairs.txt", f"1 {first} {second}", f"0 {first} {other}")
    silence(tiny_corpus, other)
    message = refused(tiny_corpus, skip_bad_audio=True)
    assert "dev_pairs.txt has no pairs of different speakers whose recordings can be used" in message
    silence(tiny_corpus, first)
    assert "has no pairs of one speaker whose" in refused(tiny_corpus, skip_bad_audio=True)


@pytest.mark.parametrize(("label", "kind"), [(1, "different speakers"), (0, "one speaker")])
def test_a_pair_list_of_one_kind_is_an_error(tiny_corpus, label, kind):
    text(tiny_corpus / "dev_pairs.txt", " ".join([str(label), *dev(tiny_corpus)[:2]]))
    assert f"dev_pairs.txt has no pairs of {kind}, and an error rate needs" in refused(tiny_corpus)


def test_clips_are_read_for_the_kinds_that_are_asked_for(tiny_corpus):
    assert load(tiny_corpus).clips == {}
    assert list(load(tiny_corpus, AugmentConfig(kinds=["noise", "babble"])).clips) == ["noise"]
    loud = AugmentConfig(kinds=["noise", "music", "babble", "reverb"])
    clips = load(tiny_corpus, loud, music="noise", babble="noise.csv").clips
    assert list(clips) == ["noise", "music", "babble", "reverb"]
    assert len(clips["reverb"]) == len(rows(tiny_corpus / "rir.csv"))


@pytest.mark.parametrize(("kind", "key"), [("noise", "data.noise"), ("music", "data.music"), ("reverb", "data.rir")])
def test_a_kind_without_a_source_is_refused_unless_nothing_is_augmented(tiny_corpus, kind, key):
    nothing = {"noise": "", "music": "", "rir": ""}
    message = refused(tiny_corpus, AugmentConfig(kinds=[kind]), **nothing)
    assert f"augment.kinds asks for {kind}, but {key} is empty" in message
    assert load(tiny_corpus, AugmentConfig(strength=0.0, kinds=[kind]), **nothing).clips == {}


def test_a_missing_noise_folder_is_named_with_its_key(tiny_corpus):
    assert "data.noise: no file or folder" in refused(tiny_corpus, AugmentConfig(kinds=["noise"]), noise="gone")


def test_a_musan_folder_serves_noise_music_and_babble(tiny_corpus):
    for number, part in enumerate(("noise", "music", "speech")):
        for clip in range(number + 1):
            write_audio(tiny_corpus / "musan" / part / f"{clip}.wav", np.linspace(-0.5, 0.5, 1000 + number))
    sources = dict.fromkeys(("noise", "music", "babble"), "musan")
    clips = load(tiny_corpus, AugmentConfig(kinds=["noise", "music", "babble"]), **sources).clips
    assert {kind: store.lengths.tolist() for kind, store in clips.items()} == {
        "noise": [1000],
        "music": [1001] * 2,
        "babble": [1002] * 3,
    }


def kaldi(root, split):
    """A Kaldi data folder of a manifest's utterances; returns their ids."""
    listed = rows(root / f"{split}.csv")
    ids = [row["path"].replace("/", "-").removesuffix(".wav") for row in listed]
    text(root / "kaldi" / "wav.scp", *(f"{key} {row['path']}" for key, row in zip(ids, listed, strict=True)))
    text(root / "kaldi" / "utt2spk", *(f"{key} {row['speaker']}" for key, row in zip(ids, listed, strict=True)))
    return ids


def test_the_training_list_may_be_a_kaldi_folder(tiny_corpus):
    kaldi(tiny_corpus, "train")
    listed, found = load(tiny_corpus).train, load(tiny_corpus, train="kaldi").train
    assert found.store.digest == listed.store.digest
    assert found.speakers == listed.speakers
    np.testing.assert_array_equal(found.labels, listed.labels)


def test_pairs_may_name_the_utterances_of_a_kaldi_folder(tiny_corpus):
    ids = kaldi(tiny_corpus, "dev")
    text(tiny_corpus / "dev_pairs.txt", f"{ids[0]} {ids[1]} target", f"{ids[0]} {ids[-1]} nontarget")
    pairs = load(tiny_corpus, utterances=["kaldi"]).dev
    assert pairs.same_speaker.tolist() == [True, False]
    np.testing.assert_array_equal(pairs.store[pairs.test[1]], read_audio(tiny_corpus / dev(tiny_corpus)[-1]))


def test_an_enrolment_may_be_made_of_several_recordings(tiny_corpus):
    first, second, third, *_, other = dev(tiny_corpus)
    text(tiny_corpus / "enrolments.txt", f"model {first} {second}", f"unused {other}")
    text(tiny_corpus / "dev_pairs.txt", f"1 model {third}", f"0 model {other}", f"1 {first} {third}")
    pairs = load(tiny_corpus, enrolments=["enrolments.txt"]).dev
    assert [len(parts) for parts in pairs.models] == [2, 1]
    assert pairs.enrolment.tolist() == [0, 0, 1]
    assert len(pairs.store) == 4
    for place, path in zip(pairs.models[0], (first, second), strict=True):
        np.testing.assert_array_equal(pairs.store[place], read_audio(tiny_corpus / path))

    silence(tiny_corpus, first)
    pairs = load(tiny_corpus, enrolments=["enrolments.txt"], skip_bad_audio=True).dev
    assert [len(parts) for parts in pairs.models] == [1]
    assert pairs.enrolment.tolist() == [0, 0]


def test_a_corpus_tells_what_it_holds(tiny_corpus):
    corpus = load(tiny_corpus)
    assert corpus.left_out == {}
    assert str(corpus) == "7 speakers and 56 utterances to learn from, 190 dev pairs"


def test_the_digest_changes_with_all_the_speech_that_is_learned_from(tiny_corpus):
    first, second, third, *_, other = dev(tiny_corpus)
    text(tiny_corpus / "enrolments.txt", f"model {first} {second}")
    append(tiny_corpus / "dev_pairs.txt", f"1 model {third}")

    def digest():
        return load(tiny_corpus, enrolments=["enrolments.txt"]).digest

    digests = [digest()]
    assert digest() == digests[0]
    text(tiny_corpus / "enrolments.txt", f"model {second} {first}")
    digests.append(digest())
    append(tiny_corpus / "dev_pairs.txt", f"0 {first} {other}")
    digests.append(digest())
    write_audio(tiny_corpus / first, np.linspace(-0.5, 0.5, 3000))
    digests.append(digest())
    write_audio(tiny_corpus / rows(tiny_corpus / "train.csv")[0]["path"], np.linspace(-0.5, 0.5, 3000))
    digests.append(digest())
    trained = (tiny_corpus / "train.csv").read_text(encoding="utf-8").splitlines()
    text(tiny_corpus / "train.csv", *trained[:-1], f"new-{trained[-1]}")
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_depend_on_what_the_speech_is_disturbed_with(tiny_corpus):
    quiet = load(tiny_corpus).digest
    assert load(tiny_corpus, AugmentConfig(kinds=["noise", "reverb"])).digest == quiet
    write_audio(tiny_corpus / rows(tiny_corpus / "noise.csv")[0]["path"], np.linspace(-0.5, 0.5, 3000))
    assert load(tiny_corpus, AugmentConfig(kinds=["noise"])).digest == quiet


def test_the_digest_does_not_depend_on_where_the_corpus_lies(tiny_corpus, tmp_path):
    moved = Path(shutil.copytree(tiny_corpus, tmp_path / "moved"))
    assert load(moved).digest == load(tiny_corpus).digest


def test_everything_is_decoded_once(tiny_corpus):
    counts = []
    data = DataConfig(root=str(tiny_corpus))
    for _ in range(2):
        load_corpus(data, AugmentConfig(kinds=["noise"]), progress=lambda done, total: counts.append(total))
    sizes = [len(rows(tiny_corpus / f"{name}.csv")) for name in ("train", "dev", "noise")]
    assert counts == [size for size in sizes for _ in range(size)]


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    assert "data.root is" in refused(tmp_path / "gone")


def test_a_test_list_must_not_be_called_dev(tiny_corpus):
    assert "data.test_pairs has a list named dev" in refused(tiny_corpus, test_pairs={"dev": "test_pairs.txt"})


def test_missing_lists_are_named(tiny_corpus):
    assert "No list" in refused(tiny_corpus, test_pairs={"test": "gone.txt"})
    assert "gone.csv" in refused(tiny_corpus, train="gone.csv")
    assert "gone.csv" in refused(tiny_corpus, utterances=["gone.csv"])


def test_no_root_is_the_embedded_corpus_in_the_cache(tiny_corpus, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "corpus_folder", lambda cache: asked.append(cache) or tiny_corpus)
    data = DataConfig()
    assert load_corpus(data, QUIET).train.speakers == load(tiny_corpus).train.speakers
    assert asked == [cache_folder(data)]


def test_a_pair_list_of_its_own_needs_no_manifest(tiny_corpus, tmp_path):
    file = tiny_corpus / "dev_pairs.txt"
    pairs, listed = load_pairs(file, tiny_corpus, tmp_path / "cache")
    expected = read_pair_columns(file)
    assert listed.names == expected.names
    np.testing.assert_array_equal(listed[1:], expected[1:])
    np.testing.assert_array_equal(pairs.same_speaker, expected.same_speaker)
    assert len(pairs.store) == len(read_utterances(tiny_corpus / "dev.csv", tiny_corpus))


def test_a_pair_list_of_its_own_may_name_utterances_and_enrolments(tiny_corpus, tmp_path):
    ids = kaldi(tiny_corpus, "dev")
    text(tiny_corpus / "enrolments.txt", f"model {ids[0]} {ids[1]}")
    file = text(tmp_path / "trials", f"model {ids[2]} target", f"model {ids[-1]} nontarget")
    pairs, listed = load_pairs(file, tiny_corpus, tmp_path / "cache", ["kaldi"], ["enrolments.txt"])
    assert [listed.names[name] for name in listed.enrolment] == ["model", "model"]
    assert [listed.names[name] for name in listed.test] == [ids[2], ids[-1]]
    assert [model.tolist() for model in pairs.models] == [[0, 1]]
    np.testing.assert_array_equal(pairs.store[pairs.models[0][1]], read_audio(tiny_corpus / dev(tiny_corpus)[1]))
    np.testing.assert_array_equal(pairs.store[pairs.test[1]], read_audio(tiny_corpus / dev(tiny_corpus)[-1]))
    with pytest.raises(ValueError, match="names 4 recordings that no manifest lists"):
        load_pairs(file, tiny_corpus, tmp_path / "cache", enrolments=["enrolments.txt"])


def test_a_pair_list_of_its_own_names_what_is_missing_or_bad(tiny_corpus, tmp_path):
    file = tiny_corpus / "dev_pairs.txt"
    silence(tiny_corpus, dev(tiny_corpus)[0])
    with pytest.raises(ValueError, match=r"(?s)^1 recordings cannot be used:\n.*take their pairs out of the list"):
        load_pairs(file, tiny_corpus, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"dev_pairs\.txt names \d+ recordings that no manifest lists"):
        load_pairs(file, tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("shared", ["recordings", "speakers"])
def test_a_pair_list_of_its_own_must_be_apart_from_lists_that_are_named(tiny_corpus, tmp_path, shared):
    file, cache = tiny_corpus / "dev_pairs.txt", tmp_path / "cache"
    train, spoken = (read_utterances(tiny_corpus / name, tiny_corpus) for name in ("train.csv", "dev.csv"))
    load_pairs(file, tiny_corpus, cache, apart={"train.csv": train})
    if shared == "speakers":
        spoken = [dataclasses.replace(one, key=f"more/{one.key}", path=tmp_path / one.path.name) for one in spoken]
    with pytest.raises(ValueError, match=r"dev_pairs\.txt and --cohort dev\.csv share \d+ speakers or recordings"):
        load_pairs(file, tiny_corpus, cache, apart={"train.csv": train, "--cohort dev.csv": spoken})


def test_loaded_sets_cannot_be_reassigned(tiny_corpus):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tiny_corpus).train = None
