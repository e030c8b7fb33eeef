import re
import shutil
from dataclasses import astuple

import numpy as np
import pytest
import torch
from encoder_fixtures import tiny_encoder, write_checkpoint
from learning_fixtures import tiny_config, write_audio, write_corpus

from raysv import verify
from raysv.corpus.audio import floating, read_audio
from raysv.corpus.layouts import cnceleb, write_lists
from raysv.corpus.utterances import VerificationPair, read_pairs, read_utterances, write_pairs
from raysv.verification.metrics import eer, min_dcf
from raysv.verification.scoring import as_norm

SPOKEN = ("dev-0", "dev-1")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def checkpoint(root, encoder, tmp_path_factory):
    """Its threshold is 0.5."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(root), encoder)


@pytest.fixture
def run(root, capsys, monkeypatch):
    """Calls the door; gives its exit status and what it wrote."""
    monkeypatch.setenv("RAYSV_CACHE", str(root / "cache"))

    def call(*arguments):
        status = verify.main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return status, written.out, written.err

    return call


@pytest.fixture
def refused(run):
    """Calls the door with something wrong; gives its one line of complaint."""

    def call(*arguments):
        status, out, error = run(*arguments)
        assert (status, out) == (2, "")
        assert error.startswith("raysv.verify: ") and error.count("\n") == 1
        return error

    return call


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def score_of(line):
    return float(re.search(r"score (-?[\d.]+)", line).group(1))


def scores_in(file):
    table = [line.split() for line in file.read_text().splitlines()]
    return [(enrolment, test, label) for enrolment, test, _, label in table], [float(row[2]) for row in table]


def test_a_recording_is_of_its_own_speaker(run, root, checkpoint):
    status, out, error = run(checkpoint, root / "dev-0/10.wav", root / "dev-0/10.wav")
    assert (status, error) == (0, "")
    assert out == "same speaker   score 1.000, threshold 0.500 (equal error rate on the dev pairs)\n"


@pytest.mark.parametrize(
    ("threshold", "verdict"), [(-1.0, "same speaker"), (0.9999, "different speakers")], ids=["low", "high"]
)
def test_the_threshold_of_the_checkpoint_decides(run, root, encoder, tmp_path, threshold, verdict):
    scores = (1.0, threshold, threshold - 0.5, threshold - 0.6)
    write_checkpoint(tmp_path, tiny_config(root), encoder, scores)
    status, out, _ = run(tmp_path, root / "dev-0/10.wav", root / "dev-1/10.wav")
    assert status == 0
    assert out.startswith(verdict)
    assert -1 <= score_of(out) < 0.999


def test_the_order_of_two_recordings_does_not_matter(run, root, checkpoint):
    pair = (root / "dev-0/10.wav", root / "dev-1/10.wav")
    assert run(checkpoint, *pair) == run(checkpoint, *reversed(pair))


def test_a_pair_list_gives_error_rates_and_a_file_of_scores(run, root, checkpoint, tmp_path):
    target = tmp_path / "scores.txt"
    status, out, error = run(checkpoint, root / "dev_pairs.txt", "--scores", target)
    assert (status, error) == (0, "")
    listed = read_pairs(root / "dev_pairs.txt")
    named, scores = scores_in(target)
    assert named == [(pair.enrolment, pair.test, "target" if pair.same_speaker else "nontarget") for pair in listed]
    labels = [pair.same_speaker for pair in listed]
    for fact in (
        f"EER {100 * eer(scores, labels):.2f} %",
        f"minDCF(0.01) {min_dcf(scores, labels, 0.01):.4f}",
        f"minDCF(0.05) {min_dcf(scores, labels, 0.05):.4f}",
        "190 pairs of 20 recordings",
        f"scores in {target}",
    ):
        assert fact in out


def test_a_pair_scores_in_a_list_what_it_scores_alone(run, root, checkpoint, tmp_path):
    run(checkpoint, root / "dev_pairs.txt", "--scores", tmp_path / "scores.txt")
    (enrolment, test, _), score = next(zip(*scores_in(tmp_path / "scores.txt"), strict=True))
    _, out, _ = run(checkpoint, root / enrolment, root / test)
    assert score_of(out) == pytest.approx(score, abs=0.0006)


def test_scores_lie_beside_the_list_unless_told_otherwise(run, root, checkpoint, tmp_path):
    pairs = shutil.copy(root / "dev_pairs.txt", tmp_path / "my_pairs.txt")
    status, _, _ = run(checkpoint, pairs, "--root", root)
    assert status == 0
    assert (tmp_path / "my_pairs.txt.scores").is_file()


def test_trials_of_kaldi_are_verified_by_the_ids_of_utterances(run, root, checkpoint, tmp_path):
    spoken = read_utterances(root / "dev.csv", root)
    ids = {item.key: f"utterance{number}" for number, item in enumerate(spoken)}
    pairs = read_pairs(root / "dev_pairs.txt")
    (tmp_path / "wav.scp").write_text("".join(f"{ids[item.key]} {item.path}\n" for item in spoken))
    (tmp_path / "utt2spk").write_text("".join(f"{ids[item.key]} {item.speaker}\n" for item in spoken))
    write_pairs((VerificationPair(ids[a], ids[b], same) for a, b, same in map(astuple, pairs)), tmp_path / "trials")
    command = (checkpoint, tmp_path / "trials", "--utterances", tmp_path, "--scores", tmp_path / "by_id")
    status, out, error = run(*command)
    assert status == 2 and "--outside-root allows it" in error
    status, out, error = run(*command, "--outside-root")
    assert (status, error) == (0, "")
    assert "190 pairs of 20 recordings" in out
    run(checkpoint, root / "dev_pairs.txt", "--scores", tmp_path / "by_path")
    assert scores_in(tmp_path / "by_id")[1] == scores_in(tmp_path / "by_path")[1]


def test_trials_of_cnceleb_are_verified_by_models_of_several_recordings(run, root, checkpoint, encoder, tmp_path):
    folder = tmp_path / "CN-Celeb_flac"
    copies = {f"data/{name}/drama-01-00{take}.wav": f"{name}/1{take}.wav" for name in SPOKEN for take in (0, 1)}
    copies |= {f"eval/test/{name}-vlog-01-001.wav": f"{name}/12.wav" for name in SPOKEN}
    copies |= {f"data/id0000{name}/drama-01-001.wav": f"train-{name}/0.wav" for name in range(3)}
    for copy, original in copies.items():
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / original, folder / copy)
    write(folder / "dev/dev.lst", *(f"id0000{name}" for name in range(3)))
    write(folder / "eval/lists/enroll.lst", *(f"{name}-enroll enroll/{name}-enroll.wav" for name in SPOKEN))
    write(folder / "eval/lists/enroll.map", *(f"{n}-enroll {n}/drama-01-000.wav {n}/drama-01-001.wav" for n in SPOKEN))
    trials = [(enrolment, test) for enrolment in SPOKEN for test in SPOKEN]
    write(folder / "eval/lists/trials.lst", *(f"{e}-enroll test/{t}-vlog-01-001.wav {e == t:d}" for e, t in trials))
    write_lists(cnceleb(folder), folder, folder)

    options = ("--enrolments", "enrolments.txt", "--scores", tmp_path / "scores")
    status, out, error = run(checkpoint, folder / "test_pairs.txt", "--cohort", folder / "train.csv", *options)
    assert (status, error) == (0, "")
    status, out, error = run(checkpoint, folder / "test_pairs.txt", *options)
    assert (status, error) == (0, "")
    assert "4 pairs of 6 recordings" in out

    def embedded(path):
        (embedding,) = encoder.embed([torch.from_numpy(floating(read_audio(root / path)))])
        return torch.nn.functional.normalize(embedding, dim=0)

    models = {name: embedded(f"{name}/10.wav") + embedded(f"{name}/11.wav") for name in SPOKEN}
    tests = {name: embedded(f"{name}/12.wav") for name in SPOKEN}
    expected = [torch.cosine_similarity(models[e], tests[t], dim=0).item() for e, t in trials]
    assert scores_in(tmp_path / "scores")[1] == pytest.approx(expected, abs=1e-4)


def test_a_model_that_is_not_explained_is_refused(refused, root, checkpoint, tmp_path):
    pairs = write(tmp_path / "pairs.txt", "1 model dev-0/12.wav", "0 model dev-1/12.wav")
    error = refused(checkpoint, pairs, "--root", root)
    assert "'model'" in error and "utterances or enrolments" in error


def test_a_cohort_normalises_the_scores_of_a_list(run, root, checkpoint, tmp_path):
    plain, normalised = tmp_path / "plain", tmp_path / "normalised"
    run(checkpoint, root / "dev_pairs.txt", "--scores", plain)
    status, _, _ = run(
        checkpoint, root / "dev_pairs.txt", "--cohort", root / "train.csv", "--top", 4, "--scores", normalised
    )
    assert status == 0
    assert scores_in(plain)[0] == scores_in(normalised)[0]
    assert not np.allclose(scores_in(plain)[1], scores_in(normalised)[1], atol=0.1)


def embedded(root, encoder, name):
    """The embeddings of a list's recordings by their paths."""
    paths = [str(spoken.path.relative_to(root)) for spoken in read_utterances(root / name, root)]
    waveforms = [torch.from_numpy(floating(read_audio(root / path))) for path in paths]
    return dict(zip(paths, encoder.embed(waveforms), strict=True))


def test_centring_subtracts_the_mean_of_all_recordings_of_a_list(run, root, checkpoint, encoder, tmp_path):
    write(
        tmp_path / "uneven.csv", "speaker,path", *(f"train-{n},train-{n}/{t}.wav" for n, t in ((0, 0), (0, 1), (1, 0)))
    )
    options = ("--root", root, "--centre", tmp_path / "uneven.csv", "--scores", tmp_path / "scores")
    status, _, error = run(checkpoint, root / "dev_pairs.txt", *options)
    assert (status, error) == (0, "")
    train = embedded(root, encoder, "train.csv")
    mean = torch.stack([train[f"train-{name}.wav"] for name in ("0/0", "0/1", "1/0")]).mean(0)
    centred = {path: embedding - mean for path, embedding in embedded(root, encoder, "dev.csv").items()}
    assert scores_in(tmp_path / "scores")[1] == pytest.approx(
        [
            torch.cosine_similarity(centred[e], centred[t], dim=0).item()
            for e, t, _ in scores_in(tmp_path / "scores")[0]
        ],
        abs=1e-4,
    )


def test_a_cohort_is_centred_too_and_embedded_once_where_it_is_what_is_centred_on(
    run, root, checkpoint, encoder, tmp_path, monkeypatch
):
    embed, lists = verify.embed_utterances, []
    monkeypatch.setattr(verify, "embed_utterances", lambda *given: lists.append(given) or embed(*given))
    options = ("--cohort", root / "train.csv", "--centre", root / "train.csv", "--top", 4)
    status, _, error = run(checkpoint, root / "dev_pairs.txt", *options, "--scores", tmp_path / "scores")
    assert (status, error, len(lists)) == (0, "", 1)

    train, dev = (embedded(root, encoder, name) for name in ("train.csv", "dev.csv"))
    mean = torch.stack([*train.values()]).mean(0)
    unit = {path: torch.nn.functional.normalize(row - mean, dim=0) for path, row in (train | dev).items()}
    speakers = sorted({path.split("/")[0] for path in train})
    cohort = torch.stack([torch.stack([unit[p] for p in train if p.startswith(f"{s}/")]).mean(0) for s in speakers])
    pairs, scores = scores_in(tmp_path / "scores")
    enrolment, test = ([[*dev].index(pair[side]) for pair in pairs] for side in (0, 1))
    rows = torch.stack([unit[path] for path in dev])
    cosines = (rows[enrolment] * rows[test]).sum(1).numpy()
    np.testing.assert_allclose(scores, as_norm(cosines, rows, enrolment, test, cohort, 4), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("option", ["--cohort", "--centre"])
def test_a_population_with_the_speakers_that_are_tested_is_refused(refused, root, checkpoint, option):
    error = refused(checkpoint, root / "dev_pairs.txt", option, root / "dev.csv")
    assert f"dev_pairs.txt and {option} {root / 'dev.csv'} share 20 speakers or recordings: dev-0/10.wav" in error


def test_the_eer_of_a_list_has_an_interval_over_its_speakers(run, root, checkpoint, tmp_path):
    spoken = [(f"train-{name}", f"train-{name}/{take}.wav") for name in range(5) for take in range(2)]
    write_pairs(
        [VerificationPair(one, two, who == other) for who, one in spoken for other, two in spoken if one < two],
        tmp_path / "pairs.txt",
    )
    call = (checkpoint, tmp_path / "pairs.txt", "--root", root)
    status, out, _ = run(*call)
    found = re.match(r"EER ([\d.]+) % \(90 % interval ([\d.]+) to ([\d.]+) over 5 speakers\)   minDCF", out)
    assert status == 0 and found, out
    assert 0 <= float(found[2]) < float(found[3]) <= 100
    assert run(*call)[1] == out


def test_the_eer_of_a_list_of_few_speakers_has_none(run, root, checkpoint, tmp_path):
    status, out, _ = run(checkpoint, root / "dev_pairs.txt", "--scores", tmp_path / "scores")
    assert status == 0
    assert " % (no interval: fewer than 5 speakers)   minDCF" in out


def test_a_folder_that_is_no_checkpoint_is_refused(refused, root):
    assert "is no checkpoint" in refused(root, root / "dev-0/10.wav", root / "dev-0/11.wav")
    assert "is no checkpoint" in refused(root / "nowhere", root / "dev_pairs.txt")


def test_a_missing_recording_is_named(refused, root, checkpoint):
    assert "gone.wav cannot be used: there is no such file" in refused(
        checkpoint, root / "dev-0/10.wav", root / "gone.wav"
    )


def test_a_silent_recording_is_named(refused, root, checkpoint, tmp_path):
    write_audio(tmp_path / "silent.wav", np.zeros(16_000))
    assert "silent.wav cannot be used: it is silent" in refused(checkpoint, tmp_path / "silent.wav", root / "a.wav")


def test_a_missing_list_is_named(refused, root, checkpoint):
    assert "gone.txt" in refused(checkpoint, root / "gone.txt")


def test_a_list_of_recordings_that_are_not_there_is_refused(refused, root, checkpoint, tmp_path):
    pairs = shutil.copy(root / "dev_pairs.txt", tmp_path / "pairs.txt")
    assert "dev-0/10.wav" in refused(checkpoint, pairs)


def test_three_recordings_are_refused(refused, root, checkpoint):
    recordings = [root / f"dev-0/{take}.wav" for take in (10, 11, 12)]
    assert "Name two recordings or one pair list, got 3 files" in refused(checkpoint, *recordings)


@pytest.mark.parametrize("option", ["--cohort", "--centre", "--root", "--utterances", "--enrolments", "--scores"])
def test_what_two_recordings_have_no_use_for_is_refused(refused, root, checkpoint, option):
    pair = (root / "dev-0/10.wav", root / "dev-0/11.wav")
    assert f"{option} goes with a pair list" in refused(checkpoint, *pair, option, root / "train.csv")


def test_too_few_of_a_cohort_are_refused(refused, root, checkpoint):
    assert "top_n must lie between 2" in refused(
        checkpoint, root / "dev_pairs.txt", "--cohort", root / "train.csv", "--top", 1
    )


def test_scores_that_cannot_be_written_are_told_without_a_traceback(refused, root, checkpoint, tmp_path):
    assert "nowhere" in refused(checkpoint, root / "dev_pairs.txt", "--scores", tmp_path / "nowhere/scores.txt")
