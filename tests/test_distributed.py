"""What several workers compute, beside what one worker computes with the whole batch."""

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist
from learning_fixtures import process_group, run_workers
from torch import nn

from raysv.config import config_from_dict
from raysv.distributed import BatchNorm1d, gather, rank, shard, together, world_size, wrap
from raysv.learning import training
from raysv.learning.views import Batch

WORKERS = (3, 2)
TOTALS = range(8)
BATCHES = {"equal": 6, "unequal": 5, "one worker empty": 2}  # rows of the global batch
GATHERED = BATCHES | {"one row": 1, "nothing": 0}
LEARNED = {"equal": 6, "unequal": 5}  # utterances of the global batch


def rows(total, *shape):
    generator = torch.Generator().manual_seed(total)
    return 3 + torch.randn(total, *shape, generator=generator)


def a_loss(values):
    """Any function in which every row meets every other one."""
    return (values @ values.T).tanh().sum() + (values * torch.arange(values.shape[1])).sum().square() / 100


def a_model():
    torch.manual_seed(7)
    layers = [nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 6), BatchNorm1d(6)]
    return nn.Sequential(*layers)


def normalise(values, norm=None, steps=2):
    """Outputs, gradients and running statistics of BatchNorm after some steps on this worker's rows."""
    if norm is None:
        norm = BatchNorm1d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.0]))
    for _ in range(steps):
        mine = values[shard(len(values))].clone().requires_grad_()
        norm.zero_grad()
        outputs = norm(mine)
        a_loss(gather(outputs, len(values)).flatten(1)).backward()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    return {"outputs": outputs.detach(), "rows": mine.grad, "weight": norm.weight.grad, "bias": norm.bias.grad} | state


def gather_and_differentiate(values):
    mine = values[shard(len(values))].clone().requires_grad_()
    everyone = gather(mine, len(values))
    a_loss(everyone).backward()
    return {"everyone": everyone.detach(), "rows": mine.grad}


def one_training_step(values):
    model = wrap(a_model())
    for _ in range(2):
        model.zero_grad()
        embeddings = model(values[shard(len(values))])
        a_loss(gather(embeddings, len(values))).backward()
    plain = model.module if world_size() > 1 else model
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in plain.named_buffers()}


def a_batch(total, views):
    """This worker's share of utterances of three speakers, some of whose views are noisy or masked."""
    generator = torch.Generator().manual_seed(total)
    mine = slice(shard(total).start * views, shard(total).stop * views)
    noisy = torch.tensor([row for row in range(0, total * views, 3) if row in range(mine.start, mine.stop)], dtype=int)
    masks = torch.tensor([5, 10, 20, 8]) * torch.randint(2, (total * views, 1), generator=generator)
    return Batch(
        waveforms=torch.randint(-3000, 3000, (total, 4000), generator=generator).short()[shard(total)],
        speakers=torch.tensor([0, 1, 0, 2, 1, 0])[:total][shard(total)],
        noise_rows=noisy - mine.start,
        noise=torch.randn(total * views, 4000, generator=generator)[noisy],
        snr_db=torch.full((len(noisy),), 5.0),
        room_rows=torch.zeros(0, dtype=int),
        rooms=torch.zeros(0, 1),
        masks=masks[mine],
        views=views,
    )


def learn(total, views=2):
    """The losses of one step of the real learner and the gradient of each of its parameters.

    In float64: in float32 a ReLU may stand so near zero that rounding decides whether it lets a gradient through.
    """
    torch.manual_seed(5)
    batch = {"speakers": total, "utterances_per_speaker": 1, "views": views}
    config = config_from_dict({"batch": batch, "model": {"channels": 16, "embedding_dim": 16}})
    learner = training.Learner(config, num_speakers=3).double()
    parallel = wrap(learner)  # kept: without it nobody would average the gradients
    losses = parallel(a_batch(total, views))
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in learner.named_parameters()}
    return {"losses": torch.stack(losses).detach(), "gradients": gradients}


def learn_without_gathering(total):
    """The common mistake: each worker contrasts its own rows, and DDP averages what comes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "gather", lambda rows, total: rows)
        return learn(total)


def complaint(rows, total):
    try:
        gather(torch.zeros(rows, 2), total)
    except ValueError as error:
        return str(error)


def everything():
    """All that the tests below look at, computed by one worker."""
    return {
        "rank": rank(),
        "world": world_size(),
        "shards": [list(range(total))[shard(total)] for total in TOTALS],
        "labels": gather(torch.arange(5)[shard(5)], 5),
        "flags": gather((torch.arange(5) % 2 == 0)[shard(5)], 5),
        "gather": {name: gather_and_differentiate(rows(total, 4)) for name, total in GATHERED.items()},
        "complaint": complaint(shard(5).stop - shard(5).start + 1, 5),
        "flat": {name: normalise(rows(total, 4)) for name, total in BATCHES.items()},
        "timed": {name: normalise(rows(total, 4, 3)) for name, total in BATCHES.items()},
        "bfloat16": normalise(rows(6, 4).bfloat16()),
        "far from zero": normalise(rows(6, 4) * 1e-2 + 1000),
        "step": {name: one_training_step(rows(total, 3, 5)) for name, total in BATCHES.items() if total > 2},
        "learner": {name: learn(total) for name, total in LEARNED.items()} | {"three views": learn(5, views=3)},
        "not gathered": {name: learn_without_gathering(total) for name, total in LEARNED.items()},
    }


def work(number, folder):
    """One process, a worker of three and then, unless it is the last, a worker of two: imports take longest."""
    for workers in WORKERS:
        if number < workers:
            with process_group(folder / f"rendezvous-{workers}", number, workers):
                torch.save(everything(), folder / f"{number}-of-{workers}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    run_workers(work, (folder,), max(WORKERS))
    return {count: [torch.load(folder / f"{number}-of-{count}.pt") for number in range(count)] for count in WORKERS}


@pytest.fixture(params=WORKERS, ids="{} workers".format)
def workers(request, results):
    """What each of the workers computed."""
    return results[request.param]


@pytest.fixture(scope="module")
def alone():
    """What one worker computes with the whole batch."""
    return everything()


def concatenated(workers, section, name, key):
    return torch.cat([worker[section][name][key] for worker in workers])


def test_a_lone_worker_has_everything(alone):
    assert (alone["rank"], alone["world"]) == (0, 1)
    assert alone["shards"] == [list(range(total)) for total in TOTALS]
    values = rows(3, 2)
    assert gather(values, 3) is values
    module = nn.Linear(1, 1)
    assert wrap(module) is module


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("section", "shape"), [("flat", (4,)), ("timed", (4, 3))])
def test_alone_batch_norm_is_that_of_pytorch(alone, section, shape, name):
    expected = normalise(rows(BATCHES[name], *shape), nn.BatchNorm1d(4))
    assert all(torch.equal(alone[section][name][key], value) for key, value in expected.items())


def test_workers_are_numbered(workers):
    assert [worker["rank"] for worker in workers] == list(range(len(workers)))
    assert {worker["world"] for worker in workers} == {len(workers)}


def test_shards_cover_every_item_once_and_differ_by_one_at_most(workers):
    for total in TOTALS:
        shares = [worker["shards"][total] for worker in workers]
        assert [item for share in shares for item in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_integers_and_flags_are_gathered_too(workers):
    for worker in workers:
        assert torch.equal(worker["labels"], torch.arange(5))
        assert torch.equal(worker["flags"], torch.arange(5) % 2 == 0)


@pytest.mark.parametrize("name", GATHERED)
def test_every_worker_gathers_all_rows_in_order(workers, name):
    for worker in workers:
        assert torch.equal(worker["gather"][name]["everyone"], rows(GATHERED[name], 4))


@pytest.mark.parametrize("name", GATHERED)
def test_gather_adds_up_what_all_workers_ask_of_a_row(workers, alone, name):
    gradient = concatenated(workers, "gather", name, "rows")
    torch.testing.assert_close(gradient, len(workers) * alone["gather"][name]["rows"])


def test_rows_that_are_not_the_worker_s_share_are_refused_before_anything_is_exchanged(workers, alone):
    assert alone["complaint"].startswith("Worker 0 of 1 has 6 rows to gather, but its share of 5 is 5. ")
    for number, worker in enumerate(workers):
        assert worker["complaint"].startswith(f"Worker {number} of {len(workers)} has ")
        assert "Take the rows of shard(total)" in worker["complaint"]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("section", ["flat", "timed"])
def test_batch_norm_sees_the_global_batch(workers, alone, section, name):
    expected = alone[section][name]
    torch.testing.assert_close(concatenated(workers, section, name, "outputs"), expected["outputs"])
    for worker in workers:
        for key in ["running_mean", "running_var", "num_batches_tracked"]:
            torch.testing.assert_close(worker[section][name][key], expected[key])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("section", ["flat", "timed"])
def test_batch_norm_has_the_gradients_of_one_worker(workers, alone, section, name):
    close = {"rtol": 1e-4, "atol": 1e-3}
    expected = alone[section][name]
    gradient = concatenated(workers, section, name, "rows") / len(workers)
    torch.testing.assert_close(gradient, expected["rows"], **close)
    for key in ["weight", "bias"]:
        mean = torch.stack([worker[section][name][key] for worker in workers]).mean(0)  # DDP's share of the work
        torch.testing.assert_close(mean, expected[key], **close)


def test_batch_norm_keeps_the_dtype_of_its_input(workers, alone):
    outputs = torch.cat([worker["bfloat16"]["outputs"] for worker in workers])
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, alone["bfloat16"]["outputs"], rtol=0.02, atol=0.02)
    assert workers[0]["bfloat16"]["rows"].dtype == torch.bfloat16


def test_batch_norm_does_not_cancel_far_from_zero(workers):
    exact = (rows(6, 4) * 1e-2 + 1000).double()
    variance = workers[0]["far from zero"]["running_var"].double()
    torch.testing.assert_close(variance, 0.81 + 0.19 * exact.var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["equal", "unequal"])
def test_workers_give_the_gradient_of_one(workers, alone, name):
    for worker in workers:
        torch.testing.assert_close(worker["step"][name], alone["step"][name], rtol=1e-4, atol=1e-4)


def distance(gradients, expected):
    """How far gradients, by parameter, are from the expected ones, relative to all of these together."""
    apart = torch.stack([(gradients[name] - value).norm() for name, value in expected.items()]).norm()
    return float(apart / torch.stack([value.norm() for value in expected.values()]).norm())


@pytest.mark.parametrize("name", [*LEARNED, "three views"])
def test_the_learner_of_several_workers_has_the_losses_and_every_gradient_of_one(workers, alone, name):
    expected = alone["learner"][name]
    for worker in workers:
        measured = worker["learner"][name]
        torch.testing.assert_close(measured["losses"], expected["losses"], rtol=1e-10, atol=0)
        assert distance(measured["gradients"], expected["gradients"]) < 1e-10
        assert measured["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            apart = (measured["gradients"][parameter] - gradient).norm()
            if parameter == "encoder.ecapa.pool.logits.bias":  # the softmax over time forgets it: nothing but rounding
                assert apart < 1e-12
            else:
                assert apart < 1e-9 * gradient.norm(), parameter


@pytest.mark.parametrize("name", LEARNED)
def test_contrast_within_each_worker_is_far_from_that(workers, alone, name):
    expected = alone["learner"][name]
    losses = torch.stack([worker["not gathered"][name]["losses"] for worker in workers]).mean(0)
    assert (expected["losses"] - losses)[0] > 2
    for worker in workers:
        assert distance(worker["not gathered"][name]["gradients"], expected["gradients"]) > 0.2


def take_longer_than_the_others_wait(number, folder):
    """The second worker is busy for longer than a collective may take."""
    with process_group(folder / "rendezvous", number, 2):
        dist.barrier()  # one may take longer to start; that is not what is tested
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=6))
        assert together(lambda: time.sleep(9 * number) or number) == number


def run_out_of_patience(number, folder):
    """The same without `together`: what it is for."""
    with process_group(folder / "rendezvous", number, 2):
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
        if number == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.ones(1))
        else:
            time.sleep(3)


@pytest.mark.slow
@pytest.mark.parametrize("behave", [take_longer_than_the_others_wait, run_out_of_patience])
def test_workers_wait_together_for_one_that_is_busy_but_not_in_a_collective(tmp_path, behave):
    run_workers(behave, (tmp_path,), 2)


def test_a_lone_worker_waits_for_nobody():
    assert together(lambda: threading.current_thread() is threading.main_thread())
