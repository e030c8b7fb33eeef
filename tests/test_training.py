"""Training as a whole, on a corpus it can learn in seconds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from learning_fixtures import process_group, run_workers, tiny_config, voice, write_audio, write_corpus, write_pairs

from raysv.corpus.loading import load_corpus
from raysv.learning import training
from raysv.learning.checkpoint import describe_checkpoint, load_encoder, load_training_state
from raysv.learning.training import DivergedError, Learner, fit, learning_rate_at, margin_at
from raysv.verification.evaluation import evaluate

WORKERS = (3, 2)
ONE_STEP = {"batch__speakers": 7, "batch__utterances_per_speaker": 8, "batch__views": 1, "training__epochs": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(config, keep=None, **options):
    """The metrics of every epoch; where `keep` is a folder, every checkpoint stays below it."""
    history = []

    def report(metrics, folder):
        history.append(metrics)
        if keep is not None and folder is not None:
            shutil.copytree(folder, keep / str(metrics["epoch"]))

    fit(config, report, **options)
    return history


def without_speed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("speed/")}


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """The history of a whole run and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained(tiny_config(root, training__epochs=3), folder), folder


def test_the_learning_rate_rises_straight_and_falls_as_half_a_cosine(tmp_path):
    values = {"optimizer__learning_rate": 0.2, "optimizer__final_learning_rate": 0.1}
    config = tiny_config(tmp_path, optimizer__warmup_epochs=2.0, training__epochs=10, **values)
    expected = {0: 0, 0.5: 0.05, 1: 0.1, 2: 0.2, 4: 0.02 + 0.18 * (2 + math.sqrt(2)) / 4, 6: 0.11, 10: 0.02}
    assert {epochs: learning_rate_at(config, epochs) for epochs in expected} == pytest.approx(expected)


def test_without_a_warm_up_the_learning_rate_begins_at_its_highest(tmp_path):
    config = tiny_config(tmp_path, optimizer__warmup_epochs=0.0)
    assert learning_rate_at(config, 0) == config.optimizer.learning_rate


def test_a_warm_up_as_long_as_the_training_ends_at_its_highest(tmp_path):
    config = tiny_config(tmp_path, optimizer__warmup_epochs=2.0, training__epochs=2)
    assert learning_rate_at(config, 1) == config.optimizer.learning_rate / 2
    assert learning_rate_at(config, 2) == config.optimizer.learning_rate


def test_the_margin_grows_straight_up_to_its_value(tmp_path):
    config = tiny_config(tmp_path, loss__margin=0.3, loss__margin_warmup_epochs=4.0, training__epochs=9)
    assert [margin_at(config, epochs) for epochs in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.075, 0.15, 0.3, 0.3])
    assert margin_at(tiny_config(tmp_path, loss__margin=0.3), 0) == 0.3


@pytest.mark.parametrize(("batch", "steps"), [(7, 4), (4, 7), (2, 14)])
def test_schedules_count_epochs_whatever_the_number_of_steps(root, monkeypatch, batch, steps):
    seen = []
    monkeypatch.setattr(training, "learning_rate_at", lambda _, epochs: seen.append(epochs) or 1e-3)
    monkeypatch.setattr(training._Run, "_step", lambda *_: torch.zeros(len(training.MEASURES)))
    trained(tiny_config(root, batch__speakers=batch, training__epochs=2))
    assert seen == pytest.approx([(step + 0.5) / steps for step in range(2 * steps)])


def test_training_lowers_the_loss_and_the_error_rate_of_the_dev_pairs(root):
    config = tiny_config(root, training__epochs=12, augment__strength=0.25)
    torch.manual_seed(config.training.seed)
    untrained = evaluate(Learner(config, 7).encoder, load_corpus(config.data, config.augment).dev)
    first, *_, last = trained(config)
    assert last["loss/total"] < 0.6 * first["loss/total"]
    assert last["train/accuracy"] > 0.5
    assert last["dev/eer"] < 0.7 * untrained.rates.eer


def test_every_metric_is_a_plain_number(undisturbed):
    history, _ = undisturbed
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    for metrics in history:
        assert {type(value) for value in metrics.values()} == {int, float}
        assert all(map(math.isfinite, metrics.values()))
        assert metrics["loss/total"] == pytest.approx(metrics["loss/aam"] + metrics["loss/supcon"], rel=1e-5)


@pytest.mark.parametrize(("kind", "terms"), [("aam", {"loss/aam"}), ("supcon", {"loss/supcon"})])
def test_a_loss_of_one_term_trains_and_reports_that_term_alone(root, kind, terms):
    (metrics,) = trained(tiny_config(root, loss__kind=kind, training__epochs=1))
    assert metrics.keys() & {"loss/aam", "loss/supcon"} == terms
    assert metrics["loss/total"] == metrics[terms.pop()]
    assert 0 <= metrics["train/accuracy"] <= 1


def test_schedules_are_reported_as_the_last_step_saw_them(root):
    config = tiny_config(root, loss__margin_warmup_epochs=1.0, training__epochs=1)
    (metrics,) = trained(config)
    assert metrics["schedule/margin"] == margin_at(config, 6.5 / 7)
    assert metrics["schedule/learning_rate"] == learning_rate_at(config, 6.5 / 7)


def test_a_checkpoint_lives_as_long_as_its_report(root):
    folders = []

    def report(_, folder):
        assert load_encoder(folder)
        folders.append(folder)

    fit(tiny_config(root), report)
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)


def test_a_resumed_run_ends_like_an_undisturbed_one(root, undisturbed, tmp_path):
    history, folder = undisturbed
    resumed = trained(tiny_config(root, training__epochs=3), tmp_path, resume=folder / "1")
    assert resumed[0] == history[0]
    assert [without_speed(metrics) for metrics in resumed[1:]] == [
        pytest.approx(without_speed(metrics), rel=1e-6) for metrics in history[1:]
    ]
    weights, state, kept = load_training_state(tmp_path / "3")
    expected_weights, expected_state, _ = load_training_state(folder / "3")
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["loss"], expected_state["loss"], rtol=1e-6, atol=1e-6)
    assert [metrics["epoch"] for metrics in kept] == [1, 2, 3]
    assert kept[0] == history[0]


def test_a_run_that_was_stopped_where_it_is_resumed_from_trains_no_further(root, undisturbed, tmp_path):
    history, folder = undisturbed

    def stop(metrics, where):
        assert (metrics, where) == (history[1], folder / "2")
        raise StopIteration

    with pytest.raises(StopIteration):
        fit(tiny_config(root, training__epochs=3), stop, resume=folder / "2")


def test_a_finished_run_that_is_resumed_reports_how_it_ended(root, undisturbed):
    history, folder = undisturbed
    reports = []
    fit(
        tiny_config(root, training__epochs=3),
        lambda metrics, where: reports.append((metrics, where)),
        resume=folder / "3",
    )
    assert reports == [(history[-1], folder / "3")]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss__margin": 0.3}, r"loss\.margin is 0\.2 there and 0\.3 here\. Go on"),
        ({"model__embedding_dim": 8}, r"model\.embedding_dim is 16 there and 8 here\. Go on"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(root, undisturbed, values, told):
    _, folder = undisturbed
    with pytest.raises(ValueError, match=rf"1 is a checkpoint of another configuration: {told}"):
        trained(tiny_config(root, training__epochs=3, **values), resume=folder / "1")


def test_a_run_goes_on_in_the_format_that_it_began_in(root, tmp_path, monkeypatch):
    """Another node, or another revision, may take `auto` for something else."""
    config = tiny_config(root, training__precision="auto")
    monkeypatch.setattr(training, "compute_dtype", lambda *_: torch.bfloat16)
    trained(config, tmp_path)
    monkeypatch.setattr(training, "compute_dtype", lambda *_: torch.float32)
    trained(config, tmp_path / "resumed", resume=tmp_path / "1")
    assert describe_checkpoint(tmp_path / "resumed" / "2")[1]["computed"] == "cpu, bfloat16"


def compute_in_several_formats(number, root, folder):
    """The second worker's processor multiplies bfloat16, the first one's does not."""
    training.compute_dtype = lambda *_: (torch.float32, torch.bfloat16)[number]
    config = calm_config(root)
    with process_group(folder / "meet", number, 2):
        run = training._Run(config, load_corpus(config.data, config.augment), torch.device("cpu"))
    assert run.precision == torch.float32


@pytest.mark.slow
def test_workers_on_unlike_machines_compute_in_one_format(root, tmp_path):
    run_workers(compute_in_several_formats, (root, tmp_path), 2)


def test_a_run_whose_data_moved_goes_on(root, undisturbed, tmp_path):
    history, folder = undisturbed
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    _, metrics = trained(tiny_config(moved, training__epochs=3), resume=folder / "2")
    assert without_speed(metrics) == pytest.approx(without_speed(history[2]), rel=1e-6)


def test_test_lists_are_judged_only_when_asked_for_and_only_at_the_end(root):
    first, last = trained(tiny_config(root, data__test_pairs={"easy": "test_pairs.txt"}), tests=True)
    assert not any(name.startswith("easy/") for name in first)
    assert {name for name in last if name.startswith("easy/")} == {"easy/eer", "easy/min_dcf_0.01", "easy/min_dcf_0.05"}
    assert not any(name.startswith("test/") for metrics in trained(tiny_config(root)) for name in metrics)


def test_the_eer_of_a_test_list_of_enough_speakers_has_an_interval(root):
    rows = [(f"more-{speaker}", f"more-{speaker}/{take}.wav") for speaker in range(5) for take in range(2)]
    for place, (_, path) in enumerate(rows):
        write_audio(root / path, voice(10 + place // 2, place % 2))
    write_pairs(root / "more_pairs.txt", rows)
    config = tiny_config(root, data__test_pairs={"more": "more_pairs.txt"}, training__epochs=1)
    (metrics,) = trained(config, tests=True)
    assert 0 <= metrics["more/eer_low"] < metrics["more/eer_high"] <= 1
    assert "dev/eer_low" not in metrics


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"optimizer__learning_rate": 1e20}, "The loss became nan"),
        ({"loss__scale": 1e38}, "The loss became inf"),
        ({"optimizer__learning_rate": 1e20, **ONE_STEP}, "embeddings of 20 of 20 recordings hold NaN or infinity"),
    ],
)
def test_divergence_is_told_with_its_epoch_and_a_remedy(root, values, what):
    with pytest.raises(DivergedError, match=rf"{what}.*Lower optimizer.learning_rate") as caught:
        trained(tiny_config(root, **values))
    assert "in epoch 1" in str(caught.value)


def test_a_later_divergence_names_its_epoch(root, monkeypatch):
    monkeypatch.setattr(training, "learning_rate_at", lambda _, epochs: 1e-3 if epochs < 1 else 1e20)
    with pytest.raises(DivergedError, match=r"became nan in epoch 2, at or before step 7\."):
        trained(tiny_config(root))


def test_an_infinite_gradient_is_a_divergence_too(root, monkeypatch):
    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(DivergedError, match="The gradient's norm became inf in epoch 1"):
        trained(tiny_config(root))


def test_weights_decay_but_biases_and_norms_do_not(root, tmp_path):
    config = tiny_config(root, optimizer__weight_decay=0.01, optimizer__name="sgd", **ONE_STEP, loss__contrast_weight=0)
    trained(config, tmp_path)
    decayed, free = load_training_state(tmp_path / "1")[1]["optimizer"]["param_groups"]
    shapes = [weight.dim() for weight in Learner(config, 7).parameters()]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0)
    assert len(decayed["params"]) == sum(dim > 1 for dim in shapes)
    assert len(free["params"]) == sum(dim <= 1 for dim in shapes)
    assert decayed["nesterov"] and decayed["momentum"] == 0.9


def test_the_gradient_is_clipped_as_a_whole(root, tmp_path):
    values = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 1e-2, "learning_rate": 1.0}
    config = tiny_config(root, **{f"optimizer__{key}": value for key, value in values.items()}, **ONE_STEP)
    (metrics,) = trained(config, tmp_path)
    assert metrics["train/gradient_norm"] > 1
    torch.manual_seed(config.training.seed)
    before = Learner(config, 7)
    encoder, state, _ = load_training_state(tmp_path / "1")
    after = {f"encoder.{name}": value for name, value in encoder.items()}
    after |= {f"loss.{name}": value for name, value in state["loss"].items()}
    moved = [(after[name] - weight.detach()).square().sum() for name, weight in before.named_parameters()]
    step = math.sqrt(torch.stack(moved).sum().item())
    assert step == pytest.approx(1e-2 * learning_rate_at(config, 0.5), rel=1e-3)


def test_half_precision_trains_on_a_cpu(root, undisturbed):
    (metrics,) = trained(tiny_config(root, training__epochs=1, training__precision="bf16"))
    (expected, *_), _ = undisturbed
    assert metrics["loss/total"] == pytest.approx(expected["loss/total"], rel=0.1)


def calm_config(root):
    """Steps so small that the rounding in which workers, and numbers of threads, differ stays as small as it is.

    A net this narrow is chaotic: at a learning rate of 0.001 it makes a difference of 1e-7 into one of 1e-3 in 5 steps.
    """
    return tiny_config(root, optimizer__learning_rate=1e-5, training__epochs=1)


def work(number, root, folder):
    """One process, a worker of three and then, unless it is the last, a worker of two: imports take longest."""
    for workers in WORKERS:
        if number < workers:
            reports = []
            with process_group(folder / f"meet-{workers}", number, workers):
                fit(calm_config(root), lambda metrics, at: reports.append((metrics, at is not None)))  # noqa: B023
            Path(folder, f"{number}-of-{workers}.json").write_text(json.dumps(reports), encoding="utf-8")


@pytest.fixture(scope="module")
def reports(root, tmp_path_factory):
    """What every worker reported, by the number of workers."""
    alone = trained(calm_config(root))  # which also decodes the corpus, once for all
    folder = tmp_path_factory.mktemp("workers")
    run_workers(work, (root, folder), max(WORKERS))
    many = {
        count: [json.loads((folder / f"{number}-of-{count}.json").read_text()) for number in range(count)]
        for count in WORKERS
    }
    return alone, many


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_several_workers_report_what_a_lone_one_does(reports, workers):
    alone, many = reports
    for ((measured, _),) in many[workers]:
        assert without_speed(measured) == pytest.approx(without_speed(alone[0]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_all_workers_agree_and_the_first_one_brings_the_checkpoint(reports, workers):
    first, *others = reports[1][workers]
    ((metrics, with_folder),) = first
    assert with_folder
    for ((same, with_folder),) in others:
        assert not with_folder
        assert without_speed(same) == without_speed(metrics)


def read_other_data(number, root, folder):
    """The second worker's node has a copy of the corpus with one recording changed."""
    if number == 1:
        root = Path(shutil.copytree(root, folder / "copy"))
        write_audio(root / "dev-0/10.wav", voice(0, 10)[:-1])
        refused = pytest.raises(ValueError, match=r"Worker 1 finds other data .* differ")
    else:  # it is left alone, whatever gloo calls that
        refused = pytest.raises(RuntimeError, check=lambda error: not isinstance(error, DivergedError))
    with process_group(folder / "meet", number, 2), refused:
        fit(calm_config(root), print)


@pytest.mark.slow
def test_a_worker_with_other_data_is_refused(root, tmp_path):
    run_workers(read_other_data, (root, tmp_path), 2)
