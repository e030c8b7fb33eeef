import copy
import functools
import importlib
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raysv.speech.ecapa import (
    ECAPATDNN,
    MIN_VARIANCE,
    SCALE,
    AttentiveStatistics,
    Res2,
    SqueezeExcitation,
    convolve,
)
from raysv.speech.features import frame_padding

# wespeaker's ECAPA_TDNN_GLOB by channels: parameters, multiply-adds of 200 frames
PUBLISHED = {512: (6.19e6, 1.04e9), 1024: (14.65e6, 2.65e9)}  # in its READMEs
COUNTED = {512: (6_190_720, 1_037_271_040), 1024: (14_657_088, 2_649_030_656)}  # by benchmarks/encoder_size.py


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
    assert count == COUNTED[channels][0]
    assert count == pytest.approx(PUBLISHED[channels][0], abs=0.01e6)


@pytest.mark.parametrize("channels", PUBLISHED)
def test_multiply_adds_are_the_published_ones_less_the_shared_context(channels):
    frames = 200
    with torch.device("meta"):
        model, features = ECAPATDNN(channels=channels).eval(), torch.empty(1, 80, frames)
    with FlopCounterMode(display=False) as counter:
        model(features)
    multiply_adds = counter.get_total_flops() / 2
    context_weights = model.pool.hidden.weight.numel() * 2 // 3
    theirs = multiply_adds + context_weights * (frames - 1)  # others multiply the context anew in every frame
    assert theirs == COUNTED[channels][1]
    assert theirs == pytest.approx(PUBLISHED[channels][1], abs=0.005e9)


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
    torch.testing.assert_close(res2(values[:, :, None], None).squeeze(2), torch.cat([*outputs, groups[7]], 1))


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


@pytest.mark.parametrize("lengths", [None, [5, 11]])
def test_the_gradient_of_pooling_is_that_of_its_formula(lengths):
    """The written-out gradient against autograd's of the same formula, also where a channel is constant."""
    torch.manual_seed(0)
    pool = AttentiveStatistics(6, 4)
    values, gradient = torch.randn(2, 6, 11).relu(), torch.randn(2, 12)
    values[0, 2] = 1.0
    padding = None if lengths is None else frame_padding(torch.tensor(lengths), 11)
    inside = torch.ones(2, 1, 11) if padding is None else (~padding).float()

    def formula(values):
        frames = inside.sum(-1, keepdim=True)
        mean = (values * inside).sum(-1, keepdim=True) / frames
        std = ((values - mean).square() * inside).sum(-1, keepdim=True).div(frames).clamp(min=MIN_VARIANCE).sqrt()
        context = torch.cat([values, mean.expand_as(values), std.expand_as(values)], dim=1)
        weights = pool.logits(pool.hidden(context).tanh()).masked_fill(inside == 0, -torch.inf).softmax(-1)
        mean = (weights * values).sum(-1, keepdim=True)
        variance = (weights * (values - mean).square()).sum(-1, keepdim=True)
        return torch.cat([mean, variance.clamp(min=MIN_VARIANCE).sqrt()], dim=1).squeeze(-1)

    def gradients(way):
        given = values.clone().requires_grad_()
        return torch.autograd.grad((way(given) * gradient).sum(), [given, *pool.parameters()])

    for ours, theirs in zip(gradients(lambda given: pool(given, padding)), gradients(formula), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_memory_layout_changes_no_number(model):
    rows = torch.randn(3, 12, 1, 20)
    torch.testing.assert_close(convolve(model.stem.conv, rows).squeeze(2), model.stem.conv(rows.squeeze(2)))
    torch.testing.assert_close(model.stem(rows.contiguous(memory_format=torch.channels_last)), model.stem(rows))


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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo itself does it
def test_the_graph_has_no_breaks(model):
    explanation = torch._dynamo.explain(model)(torch.randn(2, 12, 20))
    assert explanation.graph_break_count == 0
    explanation = torch._dynamo.explain(model)(torch.randn(2, 12, 20), torch.tensor([20, 10]))
    assert explanation.graph_break_count == 0


def zeros_beyond_the_edges(theirs, lengths):
    for module in theirs.modules():
        if getattr(module, "padding_mode", "") == "reflect":
            module.padding_mode = "constant"


def zeros_beyond_the_end(theirs, lengths):
    padding = torch.arange(int(lengths.max())) >= lengths[:, None, None]

    def silence(convolution, inputs):
        edge = (inputs[0].shape[-1] - padding.shape[-1]) // 2  # added before the convolution
        return (inputs[0].masked_fill(F.pad(padding, (edge, edge)), 0),)

    for module in theirs.modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            module.register_forward_pre_hook(silence)


def no_norm_after_the_aggregation(theirs, lengths):
    theirs.mfa.norm = nn.Identity()


def no_relu_in_the_attention(theirs, lengths):
    theirs.asp.tdnn.activation = nn.Identity()


def no_norm_in_the_attention(theirs, lengths):
    theirs.asp.tdnn.norm = nn.Identity()


def a_higher_floor_of_the_variance(theirs, lengths):
    theirs.asp.eps = 1e-7


DIFFERENCES = (  # what to change in SpeechBrain's model to have ours: the table of docs/encoder.md
    zeros_beyond_the_edges,
    zeros_beyond_the_end,
    no_norm_after_the_aggregation,
    no_relu_in_the_attention,
    no_norm_in_the_attention,
    a_higher_floor_of_the_variance,
)


@functools.cache
def speechbrain_class():
    """SpeechBrain's ECAPA-TDNN, without what its import leaves behind.

    That would turn TF32 on and the JIT's profiling off, for the whole process. Among its modules are stand-ins for some
    that have moved: they warn whoever looks at them, and Hypothesis looks at all modules there are.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("SB_DISABLE_QUIRKS", "allow_tf32,disable_jit_profiling")
        warnings.simplefilter("ignore")  # what another toolkit's import warns of is none of ours
        pytest.importorskip("speechbrain", reason="SpeechBrain, of the extra `test`, is not installed")
        module = importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN")
    for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
        del sys.modules[name]
    return module.ECAPA_TDNN


def speechbrain_model():
    """SpeechBrain's model with random weights and BatchNorms that have seen something."""
    ecapa = speechbrain_class()
    torch.manual_seed(0)
    model = ecapa(80)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.add_(torch.rand_like(values) - 0.5)
    return model.eval()


def with_weights_of(theirs):
    """Our model with the weights of SpeechBrain's, but those of its two further norms."""
    ours = ECAPATDNN().to(theirs.fc.conv.weight.dtype).eval()
    layers = [(theirs.blocks[0], ours.stem)]
    plain = [(theirs.mfa.conv, ours.aggregate), (theirs.asp.tdnn.conv, ours.pool.hidden)]
    plain += [(theirs.asp.conv, ours.pool.logits), (theirs.fc, ours.embedding)]
    for block, our_block in zip(theirs.blocks[1:], ours.blocks, strict=True):
        layers += [(block.tdnn1, our_block.enter), (block.tdnn2, our_block.leave)]
        layers += zip(block.res2net_block.blocks, our_block.res2.layers, strict=True)
        plain += [(block.se_block.conv1, our_block.gate.squeeze), (block.se_block.conv2, our_block.gate.excite)]
    for layer, our_layer in layers:
        plain.append((layer.conv, our_layer.conv))
        our_layer.norm.load_state_dict(layer.norm.norm.state_dict())
    ours.norm.load_state_dict(theirs.asp_bn.norm.state_dict())
    for convolution, our_layer in plain:
        our_layer.weight.data.copy_(convolution.conv.weight.view_as(our_layer.weight))
        our_layer.bias.data.copy_(convolution.conv.bias)
    for block in ours.blocks:
        _first_group_last(block)
    return ours


def _first_group_last(block):
    """Theirs, like the paper of Res2Net, passes the first group on, ours the last: the same but for channels' order."""
    entering = [*block.enter.conv.state_dict().values(), *block.enter.norm.state_dict().values()]
    for values in entering:
        if values.dim():  # not BatchNorm's count of batches
            values.copy_(values.roll(-len(values) // SCALE, 0))
    weight = block.leave.conv.weight.data
    weight.copy_(weight.roll(-weight.shape[1] // SCALE, 1))


def apart(differences):
    """How far SpeechBrain's embeddings, some differences removed, are from ours: the worst of a padded batch."""
    theirs, lengths = speechbrain_model(), torch.tensor([64, 32, 1])
    ours = with_weights_of(theirs)
    for difference in differences:
        difference(theirs, lengths)
    features = torch.randn(3, 80, 64)
    with torch.inference_mode():
        expected = theirs(features.mT, lengths / 64).squeeze(1)
        return float(((ours(features, lengths) - expected).norm(dim=1) / expected.norm(dim=1)).max())


def test_embeddings_are_those_of_speechbrain_but_for_the_differences_that_are_listed():
    assert apart(DIFFERENCES) < 1e-5


def gradients_as_ours(theirs):
    """The gradients of SpeechBrain's model, as the parameters of one of ours."""
    holder = copy.deepcopy(theirs)
    for parameter, trained in zip(holder.parameters(), theirs.parameters(), strict=True):
        parameter.data = torch.zeros_like(trained) if trained.grad is None else trained.grad  # of a norm put out
    return dict(with_weights_of(holder).named_parameters())


def test_training_has_the_embeddings_gradients_and_statistics_of_speechbrain():
    """In float64: in float32 a ReLU may stand so near zero that rounding decides whether it lets a gradient through."""
    theirs = speechbrain_model().double()
    ours = with_weights_of(theirs)
    for difference in DIFFERENCES:
        if difference is not zeros_beyond_the_end:  # no utterance ends before its batch does
            difference(theirs, None)
    features = torch.randn(4, 80, 60, dtype=torch.float64, requires_grad=True)
    their_features = features.detach().mT.requires_grad_()
    embeddings, their_embeddings = ours.train()(features), theirs.train()(their_features).squeeze(1)
    for outputs in (embeddings, their_embeddings):
        outputs.square().sum().backward()

    def assert_close(name, value, expected):  # its masks are float32
        assert (value - expected).norm() < 1e-7 * expected.norm() + 1e-12, name

    assert_close("embeddings", embeddings, their_embeddings)
    assert_close("features", features.grad, their_features.grad.mT)
    expected = gradients_as_ours(theirs)
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, expected[name])
    statistics = dict(with_weights_of(theirs).named_buffers())
    for name, buffer in ours.named_buffers():
        assert_close(name, buffer.double(), statistics[name].double())


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.__name__)
def test_each_difference_that_is_listed_is_one(difference):
    assert apart([other for other in DIFFERENCES if other is not difference]) > 1e-4


def test_speechbrain_has_only_the_norms_more():
    theirs = speechbrain_model()
    more = [*theirs.mfa.norm.parameters(), *theirs.asp.tdnn.norm.parameters()]
    ours = sum(weight.numel() for weight in ECAPATDNN().parameters())
    assert ours == sum(weight.numel() for weight in theirs.parameters()) - sum(weight.numel() for weight in more)
