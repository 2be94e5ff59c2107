"""The statistics of --log-residual-stats against a reference that spells them out, token by token, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import build, random_tokens, randomise, selective_recompute, small_config
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.residual import RESIDUALS
from megatron_hc.residual_stats import NAMES, Stats, composite_gains, linearity, measure, stream_similarity


def measured(model: GPT, tokens: Tensor) -> Stats:
    return measure(model, Mesh(), lambda: model(tokens))


@torch.no_grad()
def walk(model: GPT, tokens: Tensor) -> tuple[list[Any], list[Tensor], list[Any]]:
    """(settled carry at every read, output of every sublayer, mix of every sublayer), by hand."""
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    carry, context = model.open(tokens, positions), model.context(positions, None)
    carries, outputs, mixes = [], [], []
    for layer in model.stage_layers():
        for residual, norm, branch in (
            (layer.attention_residual, layer.attention_read_norm, layer.attention),
            (layer.mlp_residual, layer.mlp_read_norm, layer.mlp),
        ):
            carries.append(residual.settle(carry))
            x, carry = residual.read(carry, norm)
            if branch is layer.attention:
                y, value = branch(x, context, first_values=carry.values)
            else:
                y, value = branch(x), None
            outputs.append(y)
            mixes.append(carry.mix)
            carry = residual.write(carry, y, value)
    return [*carries, model.final_residual.settle(carry)], outputs, mixes


def test_compiled_layers_are_measured_as_they_run() -> None:
    """Nothing is compiled for it, and what was compiled goes on."""
    torch._dynamo.reset()
    counter, tokens = CompileCounter(), random_tokens()
    model = randomise(build(small_config({"residual_connection": "hyper"}, num_layers=1))).eval()
    expected = measured(model, tokens)
    for layer in model.stage_layers():
        layer.compile(backend=counter)
    with torch.no_grad():
        model(tokens)
        before = counter.frame_count
        assert measured(model, tokens) == expected
        model(tokens)
    assert counter.frame_count == before > 0


def variance(x: Tensor) -> float:
    """Mean over channels of the variance over tokens of [S, B, C]."""
    flat = x.reshape(-1, x.shape[-1])
    return sum(float(((flat[:, c] - flat[:, c].mean()) ** 2).mean()) for c in range(flat.shape[1])) / flat.shape[1]


@pytest.mark.parametrize("method", ["plain", "hyper", "mhc", "frac", "virtual-width", "attention", "laurel"])
def test_signal_of_every_sublayer(method: str) -> None:
    model = randomise(build(small_config({"residual_connection": method}))).eval()
    stats = measured(model, tokens := random_tokens())
    carries, outputs, _ = walk(model, tokens)
    states = [carry.stream.flatten(2) if method == "frac" else carry.stream.mean(2) for carry in carries]
    if method == "virtual-width":  # streams 0 and 2 are of the first half of the hidden vector, 1 and 3 of the second
        states = [(carry.stream[:, :, :2] + carry.stream[:, :, 2:]).flatten(2) / 2 for carry in carries]
    if method == "attention":
        states = [sum(source.squeeze(2) for source in (*carry.history, carry.stream)) for carry in carries]
    means = [float((state.flatten(0, 1).mean(0) ** 2).mean()) for state in states]
    assert stats["channel_squared_mean"] == pytest.approx(means, rel=1e-9)
    assert stats["channel_variance"] == pytest.approx([variance(state) for state in states], rel=1e-9)
    assert stats["branch_variance"] == pytest.approx([variance(output) for output in outputs], rel=1e-9)
    cosines = []
    for before, after in zip(states[0::2], states[2::2], strict=False):
        cosines.append(float(((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).mean()))
    assert stats["layer_cosine"] == pytest.approx(cosines, rel=1e-9)


@pytest.mark.parametrize("method", ["hyper", "mhc", "virtual-width"])
def test_streams_and_mixing_matrices(method: str) -> None:
    model = randomise(build(small_config({"residual_connection": method}))).eval()
    stats = measured(model, tokens := random_tokens())
    carries, _, mixes = walk(model, tokens)
    for place, carry in enumerate(carries):
        rows = carry.stream.permute(2, 0, 1, 3).flatten(1)  # [N, tokens * D]
        singular = torch.linalg.svdvals(rows)
        share = singular / singular.sum()
        assert stats["stream_rank"][place] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)
        N = len(rows)
        cosines = [float(torch.cosine_similarity(rows[i], rows[j], 0)) for i in range(N) for j in range(i)]
        assert stats["stream_cosine"][place] == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
    product = torch.eye(mixes[0].keep.shape[-1], dtype=torch.float64)
    for k, mix in enumerate(mixes):
        H = mix.keep.flatten(0, 1).transpose(1, 2)  # [T, new, old]
        rows = [max(abs(float(row.sum()) - 1) for row in matrix) for matrix in H]
        columns = [max(abs(float(column.sum()) - 1) for column in matrix.t()) for matrix in H]
        assert stats["row_deviation"][k] == pytest.approx(sum(rows) / len(rows), rel=1e-9, abs=1e-15)
        assert stats["column_deviation"][k] == pytest.approx(sum(columns) / len(columns), rel=1e-9, abs=1e-15)
        product = H.mean(0) @ product
        assert stats["forward_gain"][k] == pytest.approx(float(product.abs().sum(1).max()), rel=1e-9)
        assert stats["backward_gain"][k] == pytest.approx(float(product.abs().sum(0).max()), rel=1e-9)


def test_linearity_equals_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64) + 3
    y = x @ torch.randn(7, 7, generator=generator, dtype=torch.float64) + torch.tanh(x).roll(1, 1)
    for target, found in ((y, linearity(x, y)[0]), (y - x, linearity(x, y)[1])):
        centred, wanted = x - x.mean(0), target - target.mean(0)
        solution = torch.linalg.lstsq(centred, wanted / wanted.norm()).solution
        residual = (centred @ solution - wanted / wanted.norm()).square().sum()
        assert found == pytest.approx(1 - float(residual), rel=1e-9)
    assert linearity(x, x @ torch.randn(7, 7, generator=generator, dtype=torch.float64) + 1)[0] == pytest.approx(1)
    flat = torch.cat((x, x[:, :2]), 1)  # directions that do not exist
    assert linearity(flat, flat)[0] == pytest.approx(1)


def test_linearity_of_the_layers() -> None:
    model = randomise(build(small_config())).eval()
    stats, tokens = measured(model, random_tokens(16, 8)), random_tokens(16, 8)
    states = [carry.stream.squeeze(2).flatten(0, 1) for carry in walk(model, tokens)[0]][0::2]
    for layer, (x, y) in enumerate(zip(states, states[1:], strict=False)):
        x, y = x - x.mean(0), y - y.mean(0)
        y = y / y.norm()
        residual = (x @ torch.linalg.lstsq(x, y).solution - y).square().sum()
        assert stats["linearity"][layer] == pytest.approx(1 - float(residual), rel=1e-6)


def test_known_values() -> None:
    assert stream_similarity(torch.ones(4, 4).double()) == (pytest.approx(1), pytest.approx(1, abs=1e-6))
    assert stream_similarity(torch.eye(4).double()) == (pytest.approx(0), pytest.approx(4))
    assert composite_gains(torch.tensor([[[2.0, 0.0], [1.0, 1.0]]] * 2)) == {
        "forward_gain": [3.0, 7.0],  # H_res = [[2, 1], [0, 1]], squared [[4, 3], [0, 1]]
        "backward_gain": [2.0, 4.0],
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_said_and_ends_nothing(bad: float) -> None:
    """The streams of a run that diverges: whoever logs them wants to see where it begins."""
    good = torch.arange(12.0, dtype=torch.float64).view(6, 2)
    worse = torch.where(good == 5, bad, good)
    for found in (linearity(worse, good), linearity(good, worse), stream_similarity(worse.t() @ worse)):
        assert all(math.isnan(value) for value in found)


def test_what_a_fresh_model_shows() -> None:
    tokens = random_tokens()
    stats = measured(build(small_config({"residual_connection": "mhc"})), tokens)
    assert all(rank == pytest.approx(1, abs=1e-6) for rank in stats["stream_rank"])  # copies
    assert all(gain == pytest.approx(1, abs=1e-6) for gain in stats["forward_gain"])
    learnable = measured(build(small_config(value_residual="learnable")), tokens)
    assert learnable["value_first"] == [None, 0.5, 0.5] and learnable["value_own"] == [None, 0.5, 0.5]
    plain = measured(build(small_config()), tokens)
    assert not {"stream_rank", "forward_gain", "row_deviation", "value_first"} & set(plain)


def wrapped(model: GPT) -> dict[str, tuple[object, object]]:
    """What stands in the place of the modules' own read and write."""
    return {name: (m.__dict__.get("read"), m.__dict__.get("write")) for name, m in model.named_modules()}


@pytest.mark.parametrize("method", list(RESIDUALS))
def test_every_method_is_measured_and_left_as_it_was(method: str) -> None:
    """Also with recomputed reads, whose wrappers must be put back."""
    model = build(small_config({"residual_connection": method}), "fp32", parallel=selective_recompute("residual"))
    before = wrapped(model)
    stats = measured(model, random_tokens())
    assert all(len(row) in (3, 6, 7) for row in stats.values()) and set(stats) <= {
        *NAMES,
        "forward_gain",
        "backward_gain",
    }
    assert all(value is None or math.isfinite(value) for row in stats.values() for value in row)
    assert model.training and before == wrapped(model)


def test_dropout_is_off_and_the_mode_is_put_back() -> None:
    model, tokens = build(small_config(hidden_dropout=0.5)), random_tokens()
    stats = measured(model, tokens)
    assert measured(model, tokens) == stats and model.training
    assert measured(model.eval(), tokens) == stats and not model.training
    assert not any(module._forward_hooks for module in model.modules()), "steps of training are not watched"


def test_weights_of_a_dense_value_residual() -> None:
    """Of n weights the first one and the layer's own."""
    model = randomise(build(small_config(value_residual="dense")))
    stats = measured(model, random_tokens())
    weights = [layer.attention.value_residual.weights.tolist() for layer in model.stage_layers()[1:]]
    assert len(weights[1]) == 3
    assert stats["value_first"] == [None, *(own[0] for own in weights)]
    assert stats["value_own"] == [None, *(own[-1] for own in weights)]
