import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysv.config import LossConfig
from raysv.learning.losses import AAMSoftmax, AAMSupCon, nearest_accuracy, supcon_loss

VECTORS = json.loads((Path(__file__).parent / "data" / "loss_vectors.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in VECTORS["cases"]}
DTYPES = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-4, 2e-4)}  # relative tolerance of losses, of gradients


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    torch.manual_seed(0)


def rows_of(*names: str) -> list:
    """The expected rows of some cases, each beside its inputs and under a readable name."""
    rows = [(CASES[name]["inputs"], row, name) for name in names for row in CASES[name]["expected"]]
    marks = ("margin", "scale", "temperature")
    return [
        pytest.param(inputs, row, id="-".join([name, *(f"{key}{row[key]}" for key in marks if key in row)]))
        for inputs, row, name in rows
    ]


def tensors(inputs: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    embeddings = torch.tensor(inputs["embeddings_raw"], dtype=dtype, requires_grad=True)
    return embeddings, torch.tensor(inputs["labels"])


def head(inputs: dict, row: dict, dtype: torch.dtype, fallback: str = "mm") -> AAMSoftmax:
    weight = torch.tensor(inputs["class_weights_raw"], dtype=dtype)
    aam = AAMSoftmax(*weight.shape, row["margin"], row["scale"], fallback).to(dtype)
    aam.weight.data.copy_(weight)
    return aam


def sum_of_terms(row: dict, weights: dict, dtype: torch.dtype) -> AAMSupCon:
    config = LossConfig(margin=row["margin"], scale=row["scale"], temperature=row["temperature"], aam_views="first")
    criterion = AAMSupCon(config, len(weights), len(weights[0])).to(dtype)
    criterion.aam.weight.data.copy_(torch.tensor(weights, dtype=dtype))
    return criterion


def assert_close(actual: Tensor, expected: float | list, tolerance: float) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    # An entry may be tiny beside its neighbours: it is as exact as the whole gradient is.
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def random_batch(batch: int, views: int, dim: int, speakers: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, views, dim, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(speakers, (batch,), generator=generator)


def slow_supcon(embeddings: Tensor, speakers: Tensor, temperature: float) -> float:
    batch, views, _ = embeddings.shape
    points = [(b, v) for b in range(batch) for v in range(views)]
    unit = {(b, v): embeddings[b, v] / embeddings[b, v].norm() for b, v in points}
    total = 0.0
    for i in points:
        others = [a for a in points if a != i]
        positives = [p for p in others if speakers[p[0]] == speakers[i[0]]]
        normaliser = math.log(sum(math.exp(unit[i] @ unit[a] / temperature) for a in others))
        for p in positives:
            total -= (float(unit[i] @ unit[p]) / temperature - normaliser) / len(positives)
    return total / len(points)


def slow_aam(
    embeddings: Tensor, weight: Tensor, speakers: Tensor, margin: float, scale: float, fallback: str = "mm"
) -> Tensor:
    """The definition, with angles; differentiable where no angle is 0 or π."""
    losses = []
    for embedding, speaker in zip(embeddings, speakers.tolist(), strict=True):
        cosines = weight @ embedding / weight.norm(dim=1) / embedding.norm()
        angle = cosines[speaker].acos()
        if angle + margin <= math.pi:
            own = (angle + margin).cos()
        elif fallback == "mm":
            own = cosines[speaker] - margin * math.sin(margin)
        else:
            own = cosines[speaker] - (1 - math.cos(margin))
        others = torch.cat([cosines[:speaker], cosines[speaker + 1 :]])
        losses.append((scale * (others - own)).exp().sum().log1p())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "row"),
    rows_of(
        "supcon_2view_unequal_counts",
        "supcon_1view_with_singleton",
        "supcon_3view_all_distinct",
        "supcon_two_ranks_gather",
    ),
)
def test_supcon_agrees_with_published_code_up_to_its_temperature_factor(inputs, row, dtype):
    loss_tolerance, gradient_tolerance = DTYPES[dtype]
    embeddings, speakers = tensors(inputs, dtype)
    ours = supcon_loss(embeddings, speakers, row["temperature"])
    theirs = ours * row["temperature"] / row["base_temperature"]
    theirs.backward()
    assert_close(theirs.detach(), row["loss"] if "loss" in row else row["global_loss"], loss_tolerance)
    gradient = row.get("grad_wrt_raw_embeddings") or row.get("grad_of_global_loss_wrt_raw_embeddings")
    if gradient:
        assert_close(embeddings.grad, gradient, gradient_tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "row"), rows_of("aam_margin_scale_grid"))
def test_aam_agrees_with_published_code(inputs, row, dtype):
    loss_tolerance, gradient_tolerance = DTYPES[dtype]
    embeddings, speakers = tensors(inputs, dtype)
    aam = head(inputs, row, dtype)
    loss, _ = aam(embeddings, speakers)
    loss.backward()
    assert_close(loss.detach(), row["loss"], loss_tolerance)
    if "grad_wrt_raw_embeddings" in row:
        assert_close(embeddings.grad, row["grad_wrt_raw_embeddings"], gradient_tolerance)
        assert_close(aam.weight.grad, row["grad_wrt_raw_class_weights"], gradient_tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fallback", ["mm", "mmm"])
@pytest.mark.parametrize(("inputs", "row"), rows_of("aam_fallback_theta_plus_m_over_pi"))
def test_both_published_lines_take_over_beyond_pi(inputs, row, fallback, dtype):
    embeddings, speakers = tensors(inputs, dtype)
    loss, _ = head(inputs, row, dtype, fallback)(embeddings, speakers)
    loss.backward()
    assert_close(loss.detach(), row[f"loss_fallback_{fallback}"], DTYPES[dtype][0])
    assert embeddings.grad.isfinite().all()  # the last row is its class weight


def test_an_unknown_fallback_is_refused():
    with pytest.raises(ValueError, match="mm or mmm"):
        AAMSoftmax(3, 4, 0.2, 30.0, fallback="easy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "row"), rows_of("aamsupcon_2view_unequal"))
def test_the_sum_agrees_with_the_published_parts(inputs, row, dtype):
    loss_tolerance, gradient_tolerance = DTYPES[dtype]
    embeddings, speakers = tensors(inputs, dtype)
    criterion = sum_of_terms(row, inputs["class_weights_raw"], dtype)
    losses = criterion(embeddings, speakers)
    factor = row["temperature"] / row["base_temperature"]
    (losses.aam + factor * losses.supcon).backward()
    assert_close(losses.aam.detach(), row["part_aam_view0_only"], loss_tolerance)
    assert_close(factor * losses.supcon.detach(), row["part_supcon_all_views"], loss_tolerance)
    if factor == 1:
        assert_close(losses.total.detach(), row["total_reference"], loss_tolerance)
    if "grad_total_wrt_raw_embeddings" in row:
        assert_close(embeddings.grad, row["grad_total_wrt_raw_embeddings"], gradient_tolerance)
        assert_close(criterion.aam.weight.grad, row["grad_total_wrt_raw_class_weights"], gradient_tolerance)


@pytest.mark.parametrize("fallback", ["mm", "mmm"])
@pytest.mark.parametrize(("inputs", "row"), rows_of("aam_fallback_theta_plus_m_over_pi"))
def test_the_configuration_says_which_line_takes_over(inputs, row, fallback):
    embeddings, speakers = tensors(inputs, torch.float64)
    weight = torch.tensor(inputs["class_weights_raw"], dtype=torch.float64)
    config = LossConfig(margin=row["margin"], scale=row["scale"], contrast_weight=0, fallback=fallback)
    criterion = AAMSupCon(config, *weight.shape).double()
    criterion.aam.weight.data.copy_(weight)
    assert_close(criterion(embeddings[:, None], speakers).total.detach(), row[f"loss_fallback_{fallback}"], 1e-9)


@pytest.mark.parametrize(("inputs", "row"), rows_of("aamsupcon_2view_unequal"))
def test_aam_classifies_all_views_unless_told_otherwise(inputs, row):
    embeddings, speakers = tensors(inputs, torch.float64)
    criterion = sum_of_terms(row, inputs["class_weights_raw"], torch.float64)
    criterion.config = dataclasses.replace(criterion.config, aam_views="all")
    assert LossConfig().aam_views == "all"
    assert_close(criterion(embeddings, speakers).aam.detach(), row["aam_mean_over_all_views"], 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_both_losses_equal_a_slow_obvious_reference(seed):
    embeddings, speakers = random_batch(7, 1 + seed % 3, 5, speakers=4, seed=seed)
    assert_close(supcon_loss(embeddings, speakers, 0.1), slow_supcon(embeddings, speakers, 0.1), 1e-9)
    aam = AAMSoftmax(4, 5, 0.3, 20.0).double()
    loss, _ = aam(embeddings[:, 0], speakers)
    torch.testing.assert_close(loss, slow_aam(embeddings[:, 0], aam.weight, speakers, 0.3, 20.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("margin", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("fallback", ["mm", "mmm"])
def test_values_and_gradients_are_those_of_the_definition_on_both_sides_of_pi(fallback, margin):
    embeddings, speakers = random_batch(8, 1, 3, speakers=4)
    aam = AAMSoftmax(4, 3, margin, 20.0, fallback).double()
    towards = torch.where(torch.arange(8) < 4, -1.0, 1.0)[:, None]  # half of them lie close to the opposite side
    rows = (towards * aam.weight.detach()[speakers] + 0.05 * embeddings[:, 0]).requires_grad_()
    loss, _ = aam(rows, speakers)
    expected = slow_aam(rows, aam.weight, speakers, margin, 20.0, fallback)
    for_rows, for_weight = torch.autograd.grad(loss, (rows, aam.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected_rows, expected_weight = torch.autograd.grad(expected, (rows, aam.weight))
    torch.testing.assert_close(for_rows, expected_rows, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(for_weight, expected_weight, rtol=1e-9, atol=1e-9)


def test_an_angle_of_exactly_pi_less_the_margin_is_still_widened():
    # cos θ and −cos m are the same number here; widened, the own cosine is −1, on the other side of mm −1.02
    margin = math.acos(0.75)
    aam = AAMSoftmax(2, 2, margin, 1.0).double()
    aam.weight.data.copy_(torch.eye(2))
    sine = math.sqrt(1 - 0.75**2)
    own = torch.tensor([[-math.cos(margin), sine]], dtype=torch.float64)
    assert own[0, 0] / own.norm() == -math.cos(margin)
    loss, _ = aam(own, torch.tensor([0]))
    assert_close(loss.detach(), math.log1p(math.exp(sine + 1)), 1e-9)


def test_gradients_pass_a_numerical_check():
    embeddings, speakers = random_batch(4, 2, 3, speakers=3)
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: supcon_loss(e, speakers, 0.3), embeddings)
    criterion = AAMSupCon(LossConfig(scale=5.0, temperature=0.3), 3, 3).double()
    weight = criterion.aam.weight
    assert torch.autograd.gradcheck(lambda e, w: criterion(e, speakers).total, (embeddings, weight))


def test_the_order_of_utterances_and_of_views_does_not_matter():
    embeddings, speakers = random_batch(8, 3, 6, speakers=4)
    criterion = AAMSupCon(LossConfig(), 4, 6).double()
    expected = criterion(embeddings, speakers)
    utterances, views = torch.randperm(8), torch.randperm(3)
    shuffled = criterion(embeddings[utterances][:, views], speakers[utterances])
    torch.testing.assert_close(shuffled, expected)


def test_the_length_of_an_embedding_does_not_matter():
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    criterion = AAMSupCon(LossConfig(), 3, 5).double()
    lengths = torch.rand(6, 2, 1, dtype=torch.float64) * 100 + 0.01
    torch.testing.assert_close(criterion(embeddings * lengths, speakers), criterion(embeddings, speakers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1e-30, 1e-15, 1e15, 1e30])
def test_very_short_and_very_long_embeddings_are_worth_the_same(length, dtype):
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    criterion = AAMSupCon(LossConfig(), 3, 5).to(dtype)
    ordinary = embeddings.to(dtype).requires_grad_()
    criterion(ordinary, speakers).total.backward()
    extreme = (ordinary.detach() * length).requires_grad_()
    losses = criterion(extreme, speakers)
    losses.total.backward()
    torch.testing.assert_close(losses, criterion(ordinary, speakers))
    torch.testing.assert_close(extreme.grad * length, ordinary.grad, rtol=1e-3, atol=1e-4)


def test_an_embedding_of_zeros_gets_no_gradient_and_disturbs_no_other():
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    embeddings = embeddings.float()
    embeddings[2, 1] = 0
    embeddings.requires_grad_()
    criterion = AAMSupCon(LossConfig(temperature=0.03), 3, 5)
    losses = criterion(embeddings, speakers)
    losses.total.backward()
    assert losses.total.isfinite()
    assert torch.equal(embeddings.grad[2, 1], torch.zeros(5))
    assert 0 < embeddings.grad.norm() < 1e3
    assert criterion.aam.weight.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.5])
def test_temperature_does_not_rescale_the_loss(temperature):
    # All cosines equal: the share of the positives is 1/(N − 1) whatever the temperature, and so is the loss.
    embeddings = torch.ones(4, 2, 3, dtype=torch.float64)
    loss = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1]), temperature)
    assert_close(loss, math.log(7), 1e-9)


def test_an_anchor_without_positive_counts_in_the_mean_and_adds_nothing():
    embeddings, _ = random_batch(5, 1, 4, speakers=1)
    speakers = torch.tensor([0, 0, 1, 2, 2])
    assert_close(supcon_loss(embeddings, speakers, 0.1), slow_supcon(embeddings, speakers, 0.1), 1e-9)


@pytest.mark.parametrize("batch", [1, 4])
def test_without_any_positive_the_contrast_and_its_gradient_are_zero(batch):
    embeddings = torch.randn(batch, 1, 3, requires_grad=True)
    loss = supcon_loss(embeddings, torch.arange(batch), 0.07)
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_contrast_stays_finite_for_parallel_and_opposite_embeddings_at_a_tiny_temperature():
    axis = torch.randn(16)
    embeddings = torch.stack([axis, axis, -axis, -3 * axis, axis, -axis]).view(3, 2, 16).requires_grad_()
    loss = supcon_loss(embeddings, torch.tensor([0, 1, 0]), 0.01)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() < 1e4


@pytest.mark.parametrize("views", [2, 3, 5])
def test_a_batch_of_one_utterance_contrasts_its_views(views):
    embeddings, _ = random_batch(1, views, 4, speakers=1)
    embeddings.requires_grad_()
    loss = supcon_loss(embeddings, torch.tensor([5]), 0.07)
    loss.backward()
    assert_close(loss.detach(), slow_supcon(embeddings.detach(), [5], 0.07), 1e-9)
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [1, 2, 4, 5])
def test_values_hold_at_the_smallest_temperature_for_any_number_of_views(views, dtype):
    embeddings, speakers = random_batch(7, views, 5, speakers=3)
    expected = slow_supcon(embeddings, speakers, 0.01)
    assert_close(supcon_loss(embeddings.to(dtype), speakers, 0.01), expected, DTYPES[dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fallback", ["mm", "mmm"])
def test_cosines_of_exactly_one_and_minus_one_have_their_values_and_finite_gradients(fallback, dtype):
    # axes, so that nothing is rounded: the own cosines are 1 and −1, all others 0
    margin = 0.3
    aam = AAMSoftmax(4, 4, margin, 10.0, fallback).to(dtype)
    aam.weight.data.copy_(torch.eye(4))
    embeddings = torch.stack([torch.eye(4)[0], -torch.eye(4)[1]]).to(dtype).requires_grad_()
    loss, accuracy = aam(embeddings, torch.tensor([0, 1]))
    loss.backward()
    drop = margin * math.sin(margin) if fallback == "mm" else 1 - math.cos(margin)
    logits = [10 * math.cos(margin), 10 * (-1 - drop)]
    assert_close(loss.detach(), sum(math.log1p(3 * math.exp(-logit)) for logit in logits) / 2, DTYPES[dtype][0])
    assert accuracy == 0.5
    assert embeddings.grad.isfinite().all() and aam.weight.grad.isfinite().all()


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_is_finite_and_bounded_where_embeddings_meet_their_class_weights(sign, margin):
    generator = torch.Generator().manual_seed(1)
    aam = AAMSoftmax(200, 192, margin, 30.0)
    embeddings = sign * aam.weight.detach() * (0.1 + torch.rand(200, 1, generator=generator))
    embeddings.requires_grad_()
    loss = 200 * aam(embeddings, torch.arange(200))[0]
    loss.backward()
    assert loss.isfinite()
    for points in (embeddings, aam.weight):
        # Own and other logits each change by at most the scale per radian; a radian takes a step of one length.
        assert (points.grad.norm(dim=1) * points.detach().norm(dim=1)).max() < 2 * 30


@pytest.mark.parametrize("angle", [0.0, 1e-4, 2e-4, 3e-4, 1e-3])
def test_small_angles_lose_no_precision_in_float32(angle):
    # √(1 − cos²) would be wrong in the fourth decimal here.
    aam = AAMSoftmax(2, 2, margin=0.5, scale=1.0)
    aam.weight.data.copy_(torch.eye(2))
    loss, _ = aam(torch.tensor([[math.cos(angle), math.sin(angle)]]), torch.tensor([0]))
    expected = math.log1p(math.exp(math.sin(angle) - math.cos(angle + 0.5)))
    assert loss.item() == pytest.approx(expected, abs=3e-7)


@pytest.mark.parametrize("fallback", ["mm", "mmm"])
def test_loss_grows_with_the_angle_all_the_way(fallback):
    aam = AAMSoftmax(2, 3, margin=0.5, scale=1.0, fallback=fallback).double()
    aam.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    embeddings = torch.stack(
        [angles.cos(), angles.sin(), torch.zeros_like(angles)], dim=1
    )  # at right angles to class 1
    losses = torch.stack([aam(embedding[None], torch.tensor([0]))[0] for embedding in embeddings])
    assert (losses.diff() > 0).all()


def test_accuracy_is_without_the_margin():
    aam = AAMSoftmax(2, 2, margin=1.0, scale=30.0)
    aam.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    embeddings = torch.tensor([[1.0, 0.9], [0.9, 1.0], [1.0, 0.9], [0.0, -1.0]])
    speakers = torch.tensor([0, 1, 1, 0])
    assert aam(embeddings, speakers)[1] == 0.75
    assert aam(embeddings[:2], speakers[:2])[0] > math.log(2)  # with the margin, both would count as wrong


def test_margin_set_between_steps_changes_the_loss():
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    criterion = AAMSupCon(LossConfig(margin=0.2), 3, 5).double()
    before = criterion(embeddings, speakers)
    criterion.margin = 0.0
    after = criterion(embeddings, speakers)
    assert criterion.margin == criterion.aam.margin == 0.0
    assert after.aam < before.aam
    assert after.supcon == before.supcon
    logits = 30 * F.normalize(embeddings.flatten(0, 1), dim=1) @ F.normalize(criterion.aam.weight, dim=1).T
    torch.testing.assert_close(after.aam, F.cross_entropy(logits, speakers.repeat_interleave(2)))


def test_weight_of_the_contrast_multiplies_it():
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    losses = AAMSupCon(LossConfig(contrast_weight=2.5), 3, 5).double()(embeddings, speakers)
    torch.testing.assert_close(losses.total, losses.aam + 2.5 * losses.supcon)
    assert losses.supcon > 0


def test_zero_weight_leaves_the_contrast_out(monkeypatch):
    monkeypatch.setattr("raysv.learning.losses.supcon_loss", lambda *_: pytest.fail("computed"))
    embeddings, speakers = random_batch(4, 1, 5, speakers=3)
    losses = AAMSupCon(LossConfig(contrast_weight=0.0), 3, 5).double()(embeddings, speakers)
    assert losses.supcon == 0
    assert losses.total == losses.aam


def test_each_term_may_stand_alone():
    embeddings, speakers = random_batch(6, 2, 5, speakers=3)
    both = AAMSupCon(LossConfig(), 3, 5).double()
    terms = both(embeddings, speakers)
    aam = AAMSupCon(LossConfig(kind="aam"), 3, 5).double()
    aam.load_state_dict(both.state_dict())
    alone = aam(embeddings, speakers)
    assert (alone.total, alone.supcon, alone.accuracy) == (terms.aam, 0, terms.accuracy)
    supcon = AAMSupCon(LossConfig(kind="supcon", contrast_weight=7.0), 3, 5).double()
    alone = supcon(embeddings, speakers)
    assert (alone.total, alone.aam) == (terms.supcon, 0)  # a weight weighs against something
    assert list(supcon.parameters()) == []
    supcon.margin = 0.3  # a schedule may say so; there is nothing to set
    assert supcon.margin == 0


def test_the_accuracy_of_the_contrast_alone_is_that_of_nearest_neighbours():
    towards = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])[:, None]
    speakers = torch.tensor([0, 0, 1, 1])
    assert nearest_accuracy(towards, speakers) == 0.75  # the last one is closest to speaker 0, all others to their own
    losses = AAMSupCon(LossConfig(kind="supcon"), 2, 2)(towards, speakers)
    assert losses.accuracy == 0.75


def test_a_margin_of_the_contrast_is_taken_from_the_cosines_of_positives():
    """Against the definition, written out anchor by anchor."""
    embeddings, speakers = random_batch(5, 2, 4, speakers=2)
    unit, labels = F.normalize(embeddings.flatten(0, 1), dim=1), speakers.repeat_interleave(2).tolist()
    margin, temperature, terms = 0.15, 0.2, []
    for anchor, row in enumerate(unit):
        others = [other for other in range(len(unit)) if other != anchor]
        logits = {k: float(row @ unit[k] - margin * (labels[k] == labels[anchor])) / temperature for k in others}
        total = math.log(sum(math.exp(logit) for logit in logits.values()))
        own = [logits[k] - total for k in others if labels[k] == labels[anchor]]
        terms.append(-sum(own) / len(own))
    expected = sum(terms) / len(terms)
    assert float(supcon_loss(embeddings, speakers, temperature, margin)) == pytest.approx(expected, rel=1e-12)
    assert supcon_loss(embeddings, speakers, temperature, margin) > supcon_loss(embeddings, speakers, temperature)


def test_bf16_autocast_leaves_the_loss_in_float32():
    embeddings, speakers = random_batch(8, 2, 16, speakers=4)
    rounded = embeddings.bfloat16().requires_grad_()
    criterion = AAMSupCon(LossConfig(temperature=0.03), 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(rounded, speakers)
    expected = criterion(rounded.float(), speakers)
    assert {value.dtype for value in losses} == {torch.float32}
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    losses.total.backward()
    assert rounded.grad.isfinite().all()


def test_float64_stays_float64():
    embeddings, speakers = random_batch(4, 2, 5, speakers=3)
    assert AAMSupCon(LossConfig(), 3, 5).double()(embeddings, speakers).total.dtype == torch.float64


def test_the_head_alone_holds_the_parameters():
    criterion = AAMSupCon(LossConfig(), num_speakers=7, embedding_dim=5)
    assert {name: value.shape for name, value in criterion.state_dict().items()} == {"aam.weight": (7, 5)}
