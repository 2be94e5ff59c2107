"""mHC, mHC-lite and KromHC: what is particular to them; what every method owes is in test_registry.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config
from torch import Tensor

from megatron_hc.cli import parse
from megatron_hc.kernels.coefficients import permutation_matrices
from megatron_hc.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from megatron_hc.model.gpt import GPT
from megatron_hc.residual import Residual

FORMS = [(False, 0.0), (True, 1e-6), (True, 0.3)]  # the paper's, Megatron-LM's, and one whose bound is often met


def logits(*shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(scale).to(dtype)


def residuals(model: GPT) -> list[Residual]:
    return [r for layer in model.stage_layers() for r in (layer.attention_residual, layer.mlp_residual)]


def with_values(model: GPT, source: GPT) -> GPT:
    model.load_state_dict(source.state_dict())
    return model


# Sinkhorn


@pytest.mark.parametrize("rows_first,min_sum", FORMS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_sinkhorn_equals_its_reference(n: int, rows_first: bool, min_sum: float) -> None:
    leaf = logits(5, 2, n, n, scale=4).requires_grad_()
    weight = logits(5, 2, n, n)
    results, grads = [], []
    for function in (sinkhorn, sinkhorn_reference):
        result = function(leaf, 7, rows_first, min_sum)
        results.append(result)
        grads.append(torch.autograd.grad(result, leaf, weight)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows_first,min_sum", FORMS)
def test_sinkhorn_gradcheck(rows_first: bool, min_sum: float) -> None:
    leaf = logits(2, 1, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 20, rows_first, min_sum), (leaf,))


@pytest.mark.parametrize("scale", [1.0, 5.0, 200.0])
@pytest.mark.parametrize("rows_first", [False, True])
def test_sums_normalised_last_are_one(rows_first: bool, scale: float) -> None:
    result = sinkhorn(logits(64, 2, 4, 4, scale=scale, dtype=torch.float32), 20, rows_first)
    last, other = (-2, -1) if rows_first else (-1, -2)
    assert result.dtype == torch.float32
    assert (result.sum(last) - 1).abs().max() <= 1e-6
    expected = sinkhorn_reference(logits(64, 2, 4, 4, scale=scale), 20, rows_first)
    if scale <= 5:  # beyond, logits themselves lose 1e-5 in fp32
        assert (result.sum(other) - expected.sum(other)).abs().max() <= 1e-5


def test_a_row_below_the_smallest_exponent_has_no_gradient() -> None:
    leaf = logits(3, 2, 3, 3)
    leaf[..., 1, :] = -2000 + 10 * leaf[..., 1, :]
    leaf.requires_grad_()
    found, expected = (
        torch.autograd.grad(function(leaf, 4), leaf, logits(3, 2, 3, 3))[0]
        for function in (sinkhorn, sinkhorn_reference)
    )
    assert found[..., 1, :].eq(0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_sinkhorn_gradient_in_fp32() -> None:
    """Undoing the normalisations from their sums loses nothing to speak of."""
    wide = logits(200, 1, 4, 4, scale=3).requires_grad_()
    single = wide.detach().float().requires_grad_()
    weight = logits(200, 1, 4, 4)
    (expected,) = torch.autograd.grad(sinkhorn_reference(wide, 20), wide, weight)
    (found,) = torch.autograd.grad(sinkhorn(single, 20), single, weight.float())
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_sinkhorn_takes_any_order_of_strides() -> None:
    square = logits(4, 4, 3, 5).permute(2, 3, 0, 1)
    assert sinkhorn(square, 3).equal(sinkhorn(square.contiguous(), 3))


# Initial values


@pytest.mark.parametrize("form", [{}, {"mhc_single_pass": True}, {"static_residual": True}, {"residual_streams": 2}])
def test_mhc_starts_at_pre_norm_with_streams_that_can_part(form: dict[str, Any]) -> None:
    model = build(small_config({"residual_connection": "mhc", **form}))
    tokens = random_tokens()
    # The initial values are fp32 numbers: H_pre sums to 1 within 1e-7, which the norm's eps lets through in part.
    assert (model(tokens) - build(small_config())(tokens)).abs().max() <= 1e-9
    model(tokens).square().sum().backward()
    n = model.config.residual.residual_streams
    for residual in residuals(model)[:-1]:  # behind the last write, only the mean is read
        post = residual.bias.grad[n : 2 * n]
        assert (post - post.mean()).abs().min() > 1e-6 * post.abs().max(), "streams have the same gradient: symmetric"


@pytest.mark.parametrize("method", ["mhc-lite", "kromhc"])
def test_exact_methods_start_at_static_hyper_connections(method: str) -> None:
    model = build(small_config({"residual_connection": method}))
    static = build(small_config({"residual_connection": "hyper", "static_residual": True}))
    state = {name: value for name, value in model.state_dict().items() if name in static.state_dict()}
    for layer, (mine, other) in enumerate(zip(residuals(model), residuals(static), strict=True)):
        pre, post, res = mine.bias.detach().split(mine.sizes)
        own = torch.full((4,), -1.0, dtype=torch.float64)
        own[layer % 4] = 1
        assert pre.equal(own) and post.equal(own)
        with torch.no_grad():
            other.static_read.copy_(pre.sigmoid().unsqueeze(-1))
            other.static_write.copy_(2 * post.sigmoid())
            other.static_keep.copy_(mine.matrix(res[None, None])[0, 0].T)
    static.load_state_dict(state, strict=False)
    tokens = random_tokens()
    torch.testing.assert_close(model(tokens), static(tokens), rtol=0, atol=1e-12)


# Special cases


@pytest.mark.parametrize("method", ["mhc", "mhc-lite", "kromhc"])
def test_stream_matrix_is_doubly_stochastic(method: str) -> None:
    model = randomise(build(small_config({"residual_connection": method})), scale=1.0)
    carry = model.open(random_tokens(), torch.arange(8).unsqueeze(0))
    mix = residuals(model)[0].weights(carry.stream)
    assert mix.keep is not None and mix.keep.min() >= 0
    assert (mix.keep.sum(-2) - 1).abs().max() <= 1e-12  # keep[old, new]: rows of H_res
    if method != "mhc":  # 20 iterations leave a few per cent where the matrix is near the identity
        assert (mix.keep.sum(-1) - 1).abs().max() <= 1e-12
    assert mix.keep.var(0).max() > 1e-5, "does not depend on the token"


def test_kromhc_of_two_streams_is_mhc_lite() -> None:
    lite = randomise(build(small_config({"residual_connection": "mhc-lite", "residual_streams": 2})))
    kron = with_values(build(small_config({"residual_connection": "kromhc", "residual_streams": 2})), lite)
    tokens = random_tokens()
    torch.testing.assert_close(kron(tokens), lite(tokens), rtol=0, atol=1e-12)


def test_kronecker_product() -> None:
    residual = residuals(build(small_config({"residual_connection": "kromhc", "residual_streams": 8})))[0]
    raw = logits(1, 1, 6)
    a = raw.view(3, 2).softmax(-1)
    factors = [torch.stack((row, row.flip(0))) for row in a]
    expected = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    torch.testing.assert_close(residual.matrix(raw)[0, 0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_permutation_matrices(n: int) -> None:
    table = permutation_matrices(n, torch.device("cpu"), torch.float64)
    assert [tuple(row) for row in table.argmax(-1).tolist()] == list(itertools.permutations(range(n)))
    assert table.sum(-1).eq(1).all() and table.amax(-1).eq(1).all()


def test_static_residual_is_the_limit_of_alpha_zero() -> None:
    dynamic = randomise(build(small_config({"residual_connection": "mhc"})))
    for residual in residuals(dynamic):
        residual.alpha.data.zero_()
    state = {k: v for k, v in dynamic.state_dict().items() if not k.endswith(("alpha", "projection"))}
    static = build(small_config({"residual_connection": "mhc", "static_residual": True}))
    static.load_state_dict(state)
    tokens = random_tokens()
    torch.testing.assert_close(static(tokens), dynamic(tokens), rtol=0, atol=1e-12)


def test_megatron_convention() -> None:
    """Megatron-LM's HyperConnectionModule in its own words, for one sublayer; initial values by their distribution."""
    config = small_config({"residual_connection": "mhc", "mhc_convention": "megatron"})
    residual = residuals(build(config))[1]
    n, C = 4, 16
    bound = (6 / (n * C + n * n + 2 * n)) ** 0.5
    projection = residual.projection.detach()
    assert projection.abs().max() <= bound and projection.abs().max() > 0.99 * bound
    assert abs(projection.std().item() - bound / 3**0.5) < 0.03 * bound
    assert residual.bias.eq(0).all() and residual.alpha.allclose(torch.tensor(0.01, dtype=torch.float64))

    with torch.no_grad():
        residual.bias.copy_(logits(n * n + 2 * n))
        residual.bias[2 * n + 1 :: n] -= 20  # a column whose sum is below 1e-6
        residual.alpha.copy_(torch.tensor([0.5, 0.7, 0.9]))
    stream = logits(3, 2, n, C)
    mix = residual.weights(stream)
    flat = stream.reshape(6, n * C)
    r = 1 / (flat.norm(dim=-1, keepdim=True) / (n * C) ** 0.5 + 1e-6)
    alpha = torch.cat([residual.alpha[0].expand(n), residual.alpha[1].expand(n), residual.alpha[2].expand(n * n)])
    h = r * (flat @ residual.projection.T) * alpha + residual.bias
    square = h[:, 2 * n :].reshape(6, n, n)
    matrix = (square - square.max(-1, keepdim=True).values).exp()
    for _ in range(20):
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-6)
        matrix = matrix / matrix.sum(-2, keepdim=True).clamp(min=1e-6)
    assert mix.read is not None and mix.keep is not None
    torch.testing.assert_close(mix.read.reshape(6, n), h[:, :n].sigmoid())
    torch.testing.assert_close(mix.write.reshape(6, n), 2 * h[:, n : 2 * n].sigmoid())
    torch.testing.assert_close(mix.keep.reshape(6, n, n), matrix.transpose(1, 2))


def test_single_pass_reads_with_the_weights_of_the_sublayer_before() -> None:
    model = randomise(build(small_config({"residual_connection": "mhc", "mhc_single_pass": True})))
    carry = model.open(random_tokens(), torch.arange(8).unsqueeze(0))
    first, second = residuals(model)[:2]
    x, carry = first.mixed(carry)
    assert x.equal(carry.stream[:, :, 0]), "the first sublayer reads stream 0"
    expected = first.weights(carry.stream).read
    carry = second.settle(first.write(carry, logits(8, 2, 16)))
    x, after = second.mixed(carry)
    torch.testing.assert_close(x, (expected * carry.stream).sum(2))
    assert after.ahead.equal(second.weights(carry.stream).read)
    final, _ = model.final_residual.mixed(after)
    torch.testing.assert_close(final, (after.ahead * after.stream).sum(2))


# Flags


@pytest.mark.parametrize(
    "residual,message",
    [
        ({"residual_connection": "mhc", "residual_streams": 1}, "at least 2"),
        ({"residual_connection": "mhc-lite", "residual_streams": 6}, "at most 5"),
        ({"residual_connection": "kromhc", "residual_streams": 6}, "power of two"),
        ({"residual_connection": "mhc", "mhc_sinkhorn_iterations": 0}, "--mhc-sinkhorn-iterations must be positive"),
        ({"residual_connection": "mhc", "residual_norm_weight": True}, "--residual-norm-weight does not go"),
        ({"residual_connection": "hyper", "mhc_single_pass": True}, "--mhc-single-pass .* needs"),
        ({"residual_connection": "kromhc", "mhc_convention": "megatron"}, "--mhc-convention .* needs"),
        ({"residual_connection": "mhc-lite", "mhc_sinkhorn_iterations": 10}, "--mhc-sinkhorn-iterations .* needs"),
        ({"residual_connection": "hyper", "mhc_init_gating_factor": 0.1}, "--mhc-init-gating-factor .* needs"),
        (
            {"residual_connection": "mhc", "static_residual": True, "mhc_init_gating_factor": 0.1},
            "which --static-residual takes away",
        ),
        ({"residual_connection": "mhc", "mhc_single_pass": True, "mhc_convention": "megatron"}, "exclude each other"),
        ({"residual_connection": "mhc", "mhc_single_pass": True, "residual_readout": "sum"}, "--residual-readout sum"),
    ],
)
def test_refusals(residual: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(residual)


REQUIRED = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 1 --lr-warmup-iters 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
).split()


def test_megatron_flags() -> None:
    words = (
        "--enable-mhc-connections --mhc-num-residual-streams 8 --mhc-sinkhorn-iterations 5 "
        "--mhc-init-gating-factor 0.1 --recompute-granularity selective --recompute-modules core_attn mhc "
        "--residual-recompute-interval 6"
    )
    config = parse([*REQUIRED, *words.split()]).config
    residual = config.model.residual
    assert (residual.residual_connection, residual.residual_streams) == ("mhc", 8)
    assert (residual.mhc_sinkhorn_iterations, residual.mhc_init_gating_factor) == (5, 0.1)
    assert config.parallel.recompute_modules == ("core_attn", "mhc")
    assert config.parallel.residual_recompute_interval == 6
    config.validate()
