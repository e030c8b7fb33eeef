import csv
import hashlib
import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import soundfile

from raysv.corpus import synthetic
from raysv.corpus.synthetic import corpus_folder, write_corpus

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(synthetic, "SPEAKERS", {"train": 1, "dev": 4, "test": 4})
    monkeypatch.setattr(synthetic, "SESSIONS", 2)
    monkeypatch.setattr(synthetic, "UTTERANCES", 2)
    monkeypatch.setattr(synthetic, "NOISE_SECONDS", 1.0)
    monkeypatch.setattr(synthetic, "TARGETS_PER_SPEAKER", (3, 1))
    monkeypatch.setattr(synthetic, "NON_TARGETS", 20)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pairs(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        label, enrolment, test = line.split(" ")
        yield label, enrolment, test


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log_mel(samples, mels=40):
    """The log of 40 triangular mel bands in frames of 25 ms every 10 ms, `(frames, mels)`."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 400)[::160] * np.hamming(400)
    scale = 2595 * np.log10(1 + np.fft.rfftfreq(512, 1 / 16_000) / 700)[:, None]
    edges = np.linspace(scale[1, 0], scale[-1, 0], mels + 2)
    rise, fall = scale - edges[:-2], edges[2:] - scale
    bank = np.maximum(np.minimum(rise, fall), 0) / (edges[1] - edges[0])
    return np.log(np.abs(np.fft.rfft(frames, 512)) ** 2 @ bank + 1e-8)


def equal_error_rate(targets, non_targets):
    """The mean of misses and false alarms, where a threshold makes them most alike."""
    rates = [(np.mean(targets < threshold), np.mean(non_targets >= threshold)) for threshold in targets]
    return np.mean(min(rates, key=lambda rate: abs(rate[0] - rate[1])))


def baseline_eer(folder):
    """EER of each pair list, for cosines of the mean and standard deviation over time of log-mels."""
    embeddings, training = {}, []
    for split in SPLITS:
        for row in rows(folder / f"{split}.csv"):
            mels = log_mel(soundfile.read(folder / row["path"])[0])
            embeddings[row["path"]] = np.concatenate([mels.mean(0), mels.std(0)])
            training += [embeddings[row["path"]]] if split == "train" else []
    mean, deviation = np.mean(training, 0), np.std(training, 0)
    whitened = {path: (embedding - mean) / deviation for path, embedding in embeddings.items()}
    unit = {path: embedding / np.linalg.norm(embedding) for path, embedding in whitened.items()}
    rates = {}
    for split in ("dev", "test"):
        scores = {"0": [], "1": []}
        for label, enrolment, test in pairs(folder / f"{split}_pairs.txt"):
            scores[label].append(unit[enrolment] @ unit[test])
        rates[split] = equal_error_rate(np.array(scores["1"]), np.array(scores["0"]))
    return rates


def test_statistics_of_the_spectrum_tell_speakers_apart_but_not_well(corpus):
    for split, rate in baseline_eer(corpus).items():
        assert 0.20 < rate < 0.38, (split, rate)


@pytest.mark.slow
def test_another_seed_is_as_hard(tmp_path):
    write_corpus(tmp_path, seed=1)
    for split, rate in baseline_eer(tmp_path).items():
        assert 0.20 < rate < 0.38, (split, rate)


def test_every_listed_recording_is_16_khz_mono_16_bit_flac_of_the_listed_duration(corpus):
    listed = set()
    for split in SPLITS:
        for row in rows(corpus / f"{split}.csv"):
            info = soundfile.info(corpus / row["path"])
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
            assert info.frames == round(float(row["duration_s"]) * 16_000)
            assert 1.5 <= float(row["duration_s"]) <= 3.0
            listed.add(corpus / row["path"])
    assert listed == set(corpus.glob("speech/*/*.flac"))


def test_recordings_are_neither_silent_nor_clipped(corpus):
    for path in [*corpus.glob("speech/dev-*/*.flac"), *corpus.glob("noise/*.flac")]:
        samples, _ = soundfile.read(path)
        assert 0.4 < np.abs(samples).max() < 0.99
        assert np.sqrt(np.mean(samples**2)) > 1e-3


def test_lists_have_their_headers_and_sizes(corpus):
    for split, speakers in (("train", 48), ("dev", 20), ("test", 20)):
        table = rows(corpus / f"{split}.csv")
        assert list(table[0]) == ["speaker", "path", "duration_s", "session"]
        assert len({row["speaker"] for row in table}) == speakers
        assert len({row["path"] for row in table}) == len(table) == 9 * speakers
    for kind in ("noise", "rir"):
        table = rows(corpus / f"{kind}.csv")
        assert list(table[0]) == ["path", "split"]
        assert {corpus / row["path"] for row in table} == set(corpus.glob(f"{kind}/*.flac"))
        assert len(table) == 12 and {row["split"] for row in table} == {"train"}


def test_nobody_is_in_two_splits(corpus):
    people = [{row["speaker"] for row in rows(corpus / f"{split}.csv")} for split in SPLITS]
    assert all(a.isdisjoint(b) for a, b in combinations(people, 2))


def test_each_speaker_has_several_sessions(corpus):
    for split in SPLITS:
        table = rows(corpus / f"{split}.csv")
        for speaker in {row["speaker"] for row in table}:
            assert len({row["session"] for row in table if row["speaker"] == speaker}) == 3


@pytest.mark.parametrize("split", ["dev", "test"])
def test_pairs_are_labelled_rightly_and_mostly_hard(corpus, split):
    said = {row["path"]: row for row in rows(corpus / f"{split}.csv")}
    listed = list(pairs(corpus / f"{split}_pairs.txt"))
    assert len({frozenset(paths) for _, *paths in listed}) == len(listed) < 5000
    across, one_sex = [], []
    for label, enrolment, test in listed:
        first, second = said[enrolment], said[test]
        assert enrolment != test
        assert label == str(int(first["speaker"] == second["speaker"]))
        if label == "1":
            across.append(first["session"] != second["session"])
        else:
            one_sex.append(first["speaker"].split("-")[1][0] == second["speaker"].split("-")[1][0])
    assert 0.7 < np.mean(across) < 1
    assert 0.7 < np.mean(one_sex) < 1
    assert {row["speaker"] for row in said.values()} == {said[path]["speaker"] for _, path, _ in listed}


def test_rooms_start_with_the_direct_path_and_decay_in_their_reverberation_time(corpus):
    times = []
    for path in sorted(corpus.glob("rir/*.flac")):
        response, _ = soundfile.read(path)
        assert np.abs(response).argmax() == 0
        assert np.abs(response).max() == pytest.approx(0.95, abs=1e-4)
        rest = np.cumsum(response[:0:-1] ** 2)[::-1]  # Schroeder 1965, without the direct path
        reached = [np.argmax(rest <= rest[0] * 10 ** (-decibels / 10)) for decibels in (5, 25)]
        times.append(3 * (reached[1] - reached[0]) / 16_000)
    assert times == pytest.approx(np.linspace(0.2, 0.8, 12), rel=0.15)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_voices(tiny, tmp_path):
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        write_corpus(tmp_path / name, seed)
    first, again, other = (digests(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first if path.suffix == ".flac")
    assert len(set(first.values())) == len(first)  # no two recordings are alike


def test_the_cached_corpus_is_made_once(monkeypatch, tmp_path):
    made = []

    def write(folder: Path, seed: int) -> None:
        made.append(seed)
        folder.mkdir()
        (folder / "train.csv").write_text(str(seed))

    monkeypatch.setattr(synthetic, "write_corpus", write)
    cache = tmp_path / "not" / "yet"
    first = corpus_folder(cache)
    assert corpus_folder(cache) == first == cache / f"synthetic-{synthetic.VERSION}-0"
    assert corpus_folder(cache, seed=1) != first
    assert made == [0, 1]
    assert (first / "train.csv").read_text() == "0"


def test_two_that_make_the_corpus_at_once_share_one_complete_folder(monkeypatch, tmp_path):
    both_are_writing, results = threading.Barrier(2, timeout=10), []

    def write(folder: Path, seed: int) -> None:
        folder.mkdir()
        both_are_writing.wait()
        (folder / "train.csv").write_text("complete")

    monkeypatch.setattr(synthetic, "write_corpus", write)
    threads = [threading.Thread(target=lambda: results.append(corpus_folder(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / f"synthetic-{synthetic.VERSION}-0"] * 2
    assert list(tmp_path.iterdir()) == results[:1]
    assert (results[0] / "train.csv").read_text() == "complete"


def test_a_corpus_broken_off_leaves_nothing_behind(monkeypatch, tmp_path):
    def write(folder: Path, seed: int) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "write_corpus", write)
    with pytest.raises(OSError, match="disk full"):
        corpus_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
