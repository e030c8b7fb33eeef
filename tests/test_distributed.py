"""What several workers compute, beside what one worker computes with the whole batch."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from raysv.distributed import BatchNorm1d, gather, rank, shard, world_size, wrap

WORKERS = (3, 2)
TOTALS = range(8)
BATCHES = {"equal": 6, "unequal": 5, "one worker empty": 2}  # rows of the global batch


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
        a_loss(gather(outputs).flatten(1)).backward()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    return {"outputs": outputs.detach(), "rows": mine.grad, "weight": norm.weight.grad, "bias": norm.bias.grad} | state


def gather_and_differentiate(values):
    mine = values[shard(len(values))].clone().requires_grad_()
    everyone = gather(mine)
    a_loss(everyone).backward()
    return {"everyone": everyone.detach(), "rows": mine.grad}


def one_training_step(values):
    model = wrap(a_model())
    for _ in range(2):
        model.zero_grad()
        embeddings = model(values[shard(len(values))])
        a_loss(gather(embeddings)).backward()
    plain = model.module if world_size() > 1 else model
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in plain.named_buffers()}


def everything():
    """All that the tests below look at, computed by one worker."""
    return {
        "rank": rank(),
        "world": world_size(),
        "shards": [list(range(total))[shard(total)] for total in TOTALS],
        "labels": gather(torch.arange(5)[shard(5)]),
        "flags": gather((torch.arange(5) % 2 == 0)[shard(5)]),
        "gather": {name: gather_and_differentiate(rows(total, 4)) for name, total in BATCHES.items()},
        "flat": {name: normalise(rows(total, 4)) for name, total in BATCHES.items()},
        "timed": {name: normalise(rows(total, 4, 3)) for name, total in BATCHES.items()},
        "bfloat16": normalise(rows(6, 4).bfloat16()),
        "far from zero": normalise(rows(6, 4) * 1e-2 + 1000),
        "step": {name: one_training_step(rows(total, 3, 5)) for name, total in BATCHES.items() if total > 2},
    }


def work(number, folder):
    """One process, a worker of three and then, unless it is the last, a worker of two: imports take longest."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for workers in WORKERS:
        if number < workers:
            rendezvous = f"file://{folder}/rendezvous-{workers}"
            dist.init_process_group("gloo", rendezvous, rank=number, world_size=workers)
            torch.save(everything(), Path(folder) / f"{number}-of-{workers}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=max(WORKERS))
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
    assert gather(values) is values
    module = nn.Linear(1, 1)
    assert wrap(module) is module


def test_alone_batch_norm_is_that_of_pytorch(alone):
    expected = normalise(rows(6, 4), nn.BatchNorm1d(4))
    assert all(torch.equal(alone["flat"]["equal"][key], value) for key, value in expected.items())


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


@pytest.mark.parametrize("name", BATCHES)
def test_every_worker_gathers_all_rows_in_order(workers, name):
    for worker in workers:
        assert torch.equal(worker["gather"][name]["everyone"], rows(BATCHES[name], 4))


@pytest.mark.parametrize("name", BATCHES)
def test_gather_adds_up_what_all_workers_ask_of_a_row(workers, alone, name):
    gradient = concatenated(workers, "gather", name, "rows")
    torch.testing.assert_close(gradient, len(workers) * alone["gather"][name]["rows"])


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
