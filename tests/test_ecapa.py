import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from raysv.speech.ecapa import ECAPATDNN, AttentiveStatistics, Res2, SqueezeExcitation

PUBLISHED = {512: (6.19e6, 1.037e9), 1024: (14.66e6, 2.649e9)}  # channels: parameters, multiply-adds of 200 frames


@pytest.fixture
def model():
    """A narrow model in eval mode whose BatchNorm has seen some features."""
    torch.manual_seed(0)
    model = ECAPATDNN(mels=12, channels=32, embedding_dim=10)
    for _ in range(10):
        model(torch.randn(8, 12, 40))
    return model.eval()


@pytest.mark.parametrize("channels", PUBLISHED)
def test_parameters_are_those_of_the_published_model(channels):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ECAPATDNN(channels=channels).parameters())
    assert count == pytest.approx(PUBLISHED[channels][0], rel=1e-3)


@pytest.mark.parametrize("channels", PUBLISHED)
def test_multiply_adds_are_the_published_ones_less_the_shared_context(channels):
    frames = 200
    with torch.device("meta"):
        model, features = ECAPATDNN(channels=channels).eval(), torch.empty(1, 80, frames)
    with FlopCounterMode(display=False) as counter:
        model(features)
    multiply_adds = counter.get_total_flops() / 2
    context_weights = model.pool.hidden.weight.numel() * 2 // 3
    published = multiply_adds + context_weights * (frames - 1)  # others multiply the context anew in every frame
    assert published == pytest.approx(PUBLISHED[channels][1], rel=1e-3)


def test_layers_shrink_with_a_narrow_model():
    model = ECAPATDNN(channels=64)
    assert model.aggregate.out_channels == 192
    assert model.pool.hidden.out_channels == model.blocks[0].gate.squeeze.out_features == 16


def test_res2_hands_each_group_to_the_next():
    torch.manual_seed(0)
    res2 = Res2(16, dilation=2).eval()
    values = torch.randn(3, 16, 9)
    groups, outputs = values.split(2, dim=1), []
    for layer, group in zip(res2.layers, groups, strict=False):
        given = group + outputs[-1] if outputs else group
        outputs.append(layer.norm(F.relu(F.conv1d(given, layer.conv.weight, layer.conv.bias, padding=2, dilation=2))))
    assert len(outputs) == 7
    torch.testing.assert_close(res2(values, None), torch.cat([*outputs, groups[7]], 1))


def test_a_gate_sees_only_the_mean():
    gate = SqueezeExcitation(4, 2)
    values = torch.randn(3, 4, 9)
    weights = gate(values, None)
    assert weights.shape == (3, 4, 1)
    assert ((weights > 0) & (weights < 1)).all()
    torch.testing.assert_close(weights, gate(values.flip(-1), None))


def test_pooling_is_that_of_the_paper():
    """Eqs. 1 to 4 with the context copied to each frame, as they are written."""
    torch.manual_seed(0)
    pool = AttentiveStatistics(6, 4)
    values = torch.randn(2, 6, 11).relu()
    std = (values.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    context = torch.cat([values, values.mean(-1, keepdim=True).expand_as(values), std.expand_as(values)], dim=1)
    weights = pool.logits(pool.hidden(context).tanh()).softmax(-1)
    mean = (weights * values).sum(-1)
    deviation = (weights * (values - mean[..., None]).square()).sum(-1).sqrt()
    torch.testing.assert_close(pool(values, None), torch.cat([mean, deviation], 1))


def test_pooling_a_constant_channel_has_a_finite_gradient():
    pool = AttentiveStatistics(6, 4)
    values = torch.zeros(2, 6, 11, requires_grad=True)
    pool(values, None).sum().backward()
    assert values.grad.isfinite().all()


def test_padding_has_no_influence(model):
    lengths = [7, 30, 18, 1]
    utterances = [torch.randn(1, 12, length) for length in lengths]
    alone = torch.cat([model(features) for features in utterances])
    padded = torch.cat([F.pad(features, (0, 30 - features.shape[-1]), value=5.0) for features in utterances])
    torch.testing.assert_close(model(padded, torch.tensor(lengths)), alone, rtol=0, atol=1e-5)


def test_lengths_of_a_full_batch_change_nothing(model):
    features = torch.randn(3, 12, 20)
    torch.testing.assert_close(model(features, torch.full((3,), 20)), model(features), rtol=0, atol=1e-5)


def test_every_parameter_learns():
    model = ECAPATDNN(mels=12, channels=16, embedding_dim=5)
    model(torch.randn(4, 12, 30)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients.pop("pool.logits.bias")  # the softmax over time forgets it
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_bfloat16_autocast_is_close_and_keeps_float32_statistics(model):
    features = torch.randn(4, 12, 60)
    exact = model(features)
    pooled = []
    model.pool.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(features)
    assert pooled[0].dtype == torch.float32
    assert F.cosine_similarity(exact, rounded.float()).min() > 0.99


def test_the_graph_has_no_breaks(model):
    explanation = torch._dynamo.explain(model)(torch.randn(2, 12, 20))
    assert explanation.graph_break_count == 0
    explanation = torch._dynamo.explain(model)(torch.randn(2, 12, 20), torch.tensor([20, 10]))
    assert explanation.graph_break_count == 0
