"""--recompute-modules residual: the same bits, and streams kept once per block of reads."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from helpers import assert_same_bits, build, full_recompute, gradients, loss_of, random_tokens, randomise, small_config
from test_boundary import counted
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_hc.config import MoEConfig, ParallelConfig, TrainConfig
from megatron_hc.model.gpt import GPT
from megatron_hc.model.linear import NormLayer
from megatron_hc.residual import RESIDUALS, VALUE_RESIDUALS, Carry, Residual


def blocks(interval: int | None) -> ParallelConfig:
    return ParallelConfig(
        recompute_granularity="selective", recompute_modules=("residual",), residual_recompute_interval=interval
    )


def groups(kind: Literal["uniform", "block"], number: int, interval: int | None) -> ParallelConfig:
    """Full recompute beside residual recompute."""
    return ParallelConfig(
        recompute_granularity="full",
        recompute_method=kind,
        recompute_num_layers=number,
        recompute_modules=("residual",),
        residual_recompute_interval=interval,
    )


def model_with(method: str, parallel: ParallelConfig | None = None) -> GPT:
    return randomise(build(small_config({"residual_connection": method}, num_layers=4), parallel=parallel))


WITH_FULL = [
    *(("uniform", 1, None), ("uniform", 1, 8), ("uniform", 2, 4), ("uniform", 3, None)),
    *(("block", 2, 4), ("block", 3, 2)),
]


@pytest.mark.parametrize("method", RESIDUALS)
def test_gradients_have_the_same_bits(method: str) -> None:
    tokens = random_tokens()
    expected_loss, expected = gradients(model_with(method), tokens)
    for parallel in (*map(blocks, (1, 3, None)), *(groups(*each) for each in WITH_FULL)):  # type: ignore[arg-type]
        loss, found = gradients(model_with(method, parallel), tokens)
        assert loss.equal(expected_loss)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("value", VALUE_RESIDUALS)
def test_values_of_earlier_layers_under_full_recompute(value: str) -> None:
    tokens = random_tokens()
    config = small_config({"residual_connection": "hyper"}, num_layers=4, value_residual=value)
    expected_loss, expected = gradients(randomise(build(config)), tokens)
    loss, found = gradients(randomise(build(config, parallel=groups("uniform", 1, None))), tokens)
    assert loss.equal(expected_loss)
    assert_same_bits(found, expected)


def test_routers_decide_once_under_full_recompute() -> None:
    """Capacities and counts would be others the second time."""
    moe = MoEConfig(num_experts=4, moe_expert_capacity_factor=0.5, moe_router_load_balancing_type=("aux_loss",))
    config = small_config({"residual_connection": "hyper"}, num_layers=4, moe=moe)
    found = [
        gradients(randomise(build(config, parallel=parallel)), random_tokens())[1]
        for parallel in (None, groups("uniform", 1, 4))
    ]
    assert_same_bits(*found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fused_boundary_and_dropout_under_full_recompute(precision: str) -> None:
    config = small_config({"residual_connection": "mhc"}, num_layers=4, attention_dropout=0.25, hidden_dropout=0.25)
    found = []
    for parallel in (None, groups("uniform", 1, 4)):
        model = randomise(build(config, precision, parallel=parallel))
        torch.manual_seed(7)
        found.append(gradients(model, random_tokens())[1])
    assert_same_bits(*found)


FUSED = ["hyper", "frac", "mhc", "kromhc", "virtual-width"]


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", FUSED)
def test_a_fused_boundary_is_not_run_again(method: str, precision: str, norm: str) -> None:
    """Its weights are known: the streams are folded, to the same bits."""
    config = small_config({"residual_connection": method}, num_layers=4, normalization=norm)
    tokens = random_tokens()
    expected = gradients(randomise(build(config, precision)), tokens)
    for interval in (1, 3, None, 8):
        model = randomise(build(config, precision, parallel=blocks(interval)))
        with counted() as names:
            loss, found = gradients(model, tokens)
        # The last write, read-out and final norm are the ninth, which virtual width has not.
        count = 8 + (method != "virtual-width")
        assert names.count("boundary") == names.count("boundary_backward") == count
        assert loss.equal(expected[0])
        assert_same_bits(found, expected[1])


def test_a_norm_outside_of_the_boundary_runs_it_again() -> None:
    """An RMSNorm with a bias keeps what the boundary has read."""
    config = small_config({"residual_connection": "hyper"}, num_layers=4)
    tokens, found = random_tokens(), []
    for parallel in (None, blocks(3)):
        model = build(config, "fp32", parallel=parallel)
        for norm in (module for module in model.modules() if isinstance(module, NormLayer)):
            norm.bias = torch.nn.Parameter(torch.ones_like(norm.weight))
        with counted() as names:
            found.append(gradients(randomise(model), tokens)[1])
    assert names.count("boundary") == 17  # the last one is not recomputed
    assert_same_bits(*found)


@pytest.mark.parametrize("parallel", [blocks(2), groups("uniform", 1, 4)], ids=["selective", "full"])
def test_micro_batches_in_flight_and_a_second_backward_pass(parallel: ParallelConfig) -> None:
    first, second = random_tokens(seed=1), random_tokens(seed=2)
    plain, model = model_with("mhc"), model_with("mhc", parallel)
    for each in (plain, model):
        losses = [loss_of(each, first), loss_of(each, second)]
        losses[0].backward(retain_graph=True)
        losses[1].backward()
        losses[0].backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert_same_bits({name: p.grad for name, p in model.named_parameters()}, expected)


def test_without_gradients_and_with_a_cache() -> None:
    tokens = random_tokens()
    plain, model = model_with("mhc"), model_with("mhc", blocks(2))
    with torch.no_grad():
        assert model(tokens).equal(plain(tokens))
        assert model(tokens, caches=model.new_caches(8, 2)).equal(plain(tokens, caches=plain.new_caches(8, 2)))


@pytest.mark.parametrize("interval,expected", [(0, 8), (1, 8), (3, 3), (4, 2), (8, 1), (None, 4)])
def test_streams_are_kept_once_per_block(interval: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read at a sublayer folds is a [S, B, n, C] tensor; count those that live on until the backward pass."""
    storages = []
    original = Residual.settle

    def settle(self: Residual, carry: Carry) -> Carry:
        settled = original(self, carry)
        if self.site.is_sublayer:
            storages.append(StorageWeakRef(settled.stream.untyped_storage()))
        return settled

    monkeypatch.setattr(Residual, "settle", settle)
    model = model_with("mhc", None if interval == 0 else blocks(interval))
    loss: Tensor = loss_of(model, random_tokens())
    assert len(storages) == 8
    # The final read, outside every block, keeps the stream of the last sublayer: one more where a block drops it.
    kept = sum(not storage.expired() for storage in storages)
    assert kept == min(expected + (interval != 0), 8)
    loss.backward()


@pytest.mark.parametrize("parallel", [full_recompute("block", 2), groups("block", 2, None)], ids=["alone", "reads"])
def test_only_the_layers_of_the_block_run_again(parallel: ParallelConfig) -> None:
    model, runs = model_with("mhc", parallel), [0] * 4

    def count(place: int) -> None:
        runs[place] += 1

    for place, layer in enumerate(model.stage_layers()):
        layer.attention.register_forward_pre_hook(lambda *_, place=place: count(place))
    gradients(model, random_tokens())
    assert runs == [2, 2, 1, 1]


def test_reads_behind_the_block_are_recomputed_too() -> None:
    """Of three layers, in blocks of two reads each."""
    model, runs = model_with("mhc", groups("block", 1, 2)), [0] * 4
    for place, layer in enumerate(model.stage_layers()):
        weights = layer.mlp_residual.weights

        def counted_weights(stream: Tensor, place: int = place, weights: Any = weights) -> Any:
            runs[place] += 1
            return weights(stream)

        layer.mlp_residual.weights = counted_weights  # type: ignore[method-assign]
    gradients(model, random_tokens())
    assert min(runs[1:]) == 2, "each read runs again once"


@pytest.mark.parametrize(
    "parallel,message",
    [
        (ParallelConfig(residual_recompute_interval=2), "needs --recompute-granularity selective or full"),
        (
            ParallelConfig(recompute_granularity="selective", residual_recompute_interval=2),
            "and --recompute-modules residual",
        ),
        (groups("uniform", 2, 6), r"must be a multiple of 4, two boundaries for each of the 2 layers"),
        (groups("block", 2, 3), r"must be a multiple of 2"),
        (blocks(0), "must be in 1"),
        (blocks(9), "must be in 1"),
    ],
)
def test_refusals(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=small_config(num_layers=4), parallel=parallel).validate()
