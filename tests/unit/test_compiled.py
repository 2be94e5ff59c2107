"""What compiled code takes in the place of eager code's: the same numbers and gradients."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import build, full_recompute, gradients, random_tokens, randomise, selective_recompute, small_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from megatron_hc.config import MoEConfig, ParallelConfig
from megatron_hc.kernels.compiled import gated, own, turned
from megatron_hc.kernels.depth import key_scores, weighted_sum
from megatron_hc.kernels.swiglu import swiglu
from megatron_hc.mesh import Mesh
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.model.rope import RopeTable, apply_rope
from megatron_hc.model.router import Router, Routing
from megatron_hc.parallel.collectives import CountedGroup
from megatron_hc.parallel.compiled import _with_recomputed_experts, compile_layers
from megatron_hc.parallel.gather import ParameterGatherer
from megatron_hc.parallel.slots import Sharding
from megatron_hc.residual import RESIDUALS

READS_RECOMPUTED = {
    "residual": selective_recompute("residual"),
    "residual mlp": selective_recompute("residual", "mlp"),
    "full": dataclasses.replace(full_recompute(), recompute_modules=("residual",)),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


@pytest.mark.parametrize("width", [8, 12])
def test_rotary_formula(width: int) -> None:
    """All channels turned, and the first eight alone."""
    angles = torch.randn(5, 1, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    table, x = RopeTable(angles.cos(), angles.sin()), torch.randn(5, 2, 3, width, dtype=torch.float64)
    ours, theirs = (with_gradient(lambda x, turn=turn: turn(x, table), x) for turn in (turned, apply_rope))
    torch.testing.assert_close(ours, theirs)


def test_gated_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    expected = with_gradient(swiglu, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(with_gradient(gated, x), expected)
    assert gated(x.requires_grad_()).grad_fn.name() == "MulBackward0"


def test_waiting_for_parameters_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """--overlap-param-gather: a hook of every layer, each with other buckets, would be code of its own each time."""

    class Layer(nn.Linear):  # a plain one's forward is left alone by some versions of the compiler
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    layer, counter, found = Layer(2, 2), CompileCounter(), list[bool]()
    sharding = Sharding(CountedGroup("dp", 2, 0, Counter()), None, 2, 0)
    gatherer = ParameterGatherer([], sharding, True, [layer])
    monkeypatch.setattr(gatherer, "wait", lambda indices: found.append(torch.compiler.is_compiling()))
    layer.compile(backend=counter)
    layer(torch.ones(1, 2))
    assert found == [False] and counter.frame_count == 1


def test_every_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers that each look back over other states: more than the eight that torch compiles by itself."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(TransformerLayer, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    model = build(small_config({"residual_connection": "denseformer"}, num_layers=10), "fp32")
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_layers(model, ParallelConfig(), Mesh())
        model(random_tokens())
    assert counter.frame_count == 10


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("parts", ["residual", "residual mlp", "full"])
@pytest.mark.parametrize("method", ["plain", "hyper", "attention"])
def test_sublayers_compile_where_reads_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, method: str, parts: str, precision: str
) -> None:
    """Both of every layer; in fp32 hyper-connections' streams are folded again outside of what is compiled."""
    torch._dynamo.reset()
    counter, parallel = CompileCounter(), READS_RECOMPUTED[parts]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    config, tokens = small_config({"residual_connection": method}, num_layers=3), random_tokens()
    compiled, eager = (randomise(build(config, precision, parallel=parallel), scale=0.1) for _ in range(2))
    compile_layers(compiled, parallel, Mesh())
    torch._dynamo.utils.counters.clear()
    (loss, found), (expected_loss, expected) = (gradients(model, tokens) for model in (compiled, eager))
    # Layers share their code, but where each has a recomputed part of its own.
    assert counter.frame_count == (4 if "mlp" in parts else 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    bound = {"fp64": 1e-10, "fp32": 1e-3}[precision]
    assert abs(loss / expected_loss - 1) < min(bound, 1e-5)
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_are_compiled_for_all_micro_batches(precision: str) -> None:
    """The first of a step has no losses to add to, which is code of its own; the numbers are eager code's."""
    torch._dynamo.reset()
    moe = MoEConfig(num_experts=2, moe_aux_loss_coeff=(0.1,))
    config, counter = small_config({"residual_connection": "hyper"}, num_layers=1, moe=moe), CompileCounter()
    compiled, eager = build(config, precision), build(config, precision)
    compiled.stage_layers()[0].compile(backend=counter)
    counts = []
    for _ in range(4):
        tokens = random_tokens()
        found, expected = gradients(compiled, tokens), gradients(eager, tokens)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[precision], atol=TOLERANCE[precision])
        counts.append(counter.frame_count)
    assert counts[1] == counts[3]


EXPERTS_RECOMPUTED = {
    "moe": selective_recompute("moe"),
    "full": full_recompute(),
    "residual moe": selective_recompute("residual", "moe"),
    "full residual": READS_RECOMPUTED["full"],
    "block": full_recompute("block"),
}


@pytest.mark.parametrize("parallel", EXPERTS_RECOMPUTED.values(), ids=EXPERTS_RECOMPUTED)
def test_experts_that_are_recomputed_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig
) -> None:
    torch._dynamo.reset()
    counter, seen, forward = CompileCounter(), [], Router.forward

    def watched(router: Router, x: Tensor) -> Routing:
        seen.append(torch.compiler.is_compiling())
        return forward(router, x)

    monkeypatch.setattr(Router, "forward", watched)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(TransformerLayer, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    moe = MoEConfig(num_experts=2, moe_aux_loss_coeff=(0.1,))
    model = build(small_config(num_layers=1, moe=moe), "fp32", parallel=parallel)
    compile_layers(model, parallel, Mesh())
    gradients(model, random_tokens())
    assert counter.frame_count > 0
    assert seen == [False, False], "run, and run again by recompute"


def test_experts_behind_the_block_that_is_recomputed_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "disable", lambda forward: "as it is")
    parallel = full_recompute("block", 2)
    model = build(small_config(num_layers=3, moe=MoEConfig(num_experts=2)), "bf16", parallel=parallel)
    compile_layers(model, parallel, Mesh())
    assert [layer.mlp.forward == "as it is" for layer in model.stage_layers()] == [True, True, False]
    assert _with_recomputed_experts(dataclasses.replace(parallel, pipeline_model_parallel_size=2), 6) == {0, 1, 3, 4}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", EXPERTS_RECOMPUTED.values(), ids=EXPERTS_RECOMPUTED)
def test_gradients_beside_experts_that_are_recomputed(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig
) -> None:
    """What is around them is compiled, with code of its own for gradients."""
    torch._dynamo.reset()
    monkeypatch.setattr(TransformerLayer, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    moe = MoEConfig(num_experts=4, moe_aux_loss_coeff=(0.1,), moe_z_loss_coeff=0.1, moe_expert_capacity_factor=0.75)
    config = small_config({"residual_connection": "hyper"}, num_layers=2, moe=moe, disable_bias_linear=False)
    compiled, eager = (build(config, "fp32", parallel=parallel) for _ in range(2))
    compile_layers(compiled, parallel, Mesh())
    for seed in (3, 4):  # the first micro-batch of a step has no losses to add to
        tokens = random_tokens(seed=seed)
        found, expected = gradients(compiled, tokens), gradients(eager, tokens)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE["fp32"], atol=TOLERANCE["fp32"])


def test_saved_tensors_are_not_written_into() -> None:
    """What keeps torch 2.13 right, which the slow test below sees."""
    compile_layers(build(small_config(num_layers=1), "fp32"), ParallelConfig(), Mesh())
    assert not torch._functorch.config.donated_buffer
    assert torch.compiler.config.cache_key_tag


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("method", "precision"), [*((method, "fp64") for method in RESIDUALS), ("hyper", "fp32")])
def test_the_compiler_itself(method: str, precision: str) -> None:
    """torch's own, not one that counts: gradients are eager code's. (torch 2.11 on a CPU has no attention in fp64.)"""
    if precision == "fp64" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 compiles attention in fp64 to a call that it refuses")
    torch._dynamo.reset()
    config, tokens = small_config({"residual_connection": method}, num_layers=2), random_tokens()
    compiled, eager = (randomise(build(config, precision), scale=0.1) for _ in range(2))
    compile_layers(compiled, ParallelConfig(), Mesh())
    with torch.compiler.config.patch(force_disable_caches=True):  # code of an earlier run says nothing
        loss, found = gradients(compiled, tokens)
    expected_loss, expected = gradients(eager, tokens)
    bound = {"fp64": 1e-10, "fp32": 1e-3}[precision]
    assert abs(loss / expected_loss - 1) < min(bound, 1e-5)
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < bound, errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["plain", "hyper", "frac", "mhc", "attention"])
def test_layers_compile_on_a_gpu(method: str) -> None:
    """Without a graph break; loss and gradients are eager code's, but for the order of sums in fp32."""
    torch._dynamo.reset()
    shape = {"hidden_size": 256, "ffn_hidden_size": 512, "init_method_std": 0.05, "seq_length": 64}
    config, tokens = small_config({"residual_connection": method}, **shape), random_tokens(length=64).cuda()
    compiled, eager = (randomise(build(config, "fp32"), scale=0.1).cuda() for _ in range(2))
    for layer in compiled.stage_layers():
        layer.compile(fullgraph=True)
    (loss, found), (expected_loss, expected) = (gradients(model, tokens) for model in (compiled, eager))
    assert abs(loss / expected_loss - 1) < 1e-5
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("number", [1, 2, 3])
def test_evaluation_looks_back_in_one_graph(number: int) -> None:
    """Over as many states as torch 2.13 takes for no ``ctx``, too."""
    torch._dynamo.reset()
    states = [torch.randn(3, 2, 1, 4) for _ in range(number)]
    weights, query = torch.randn(3, 2, 5, number), torch.randn(4)

    def look(weights: Tensor, query: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_sum(weights, states), key_scores(query, states, 1e-5)

    with torch.no_grad():
        found = torch.compile(look, fullgraph=True, backend="eager")(weights, query, *states)
    torch.testing.assert_close(found, look(weights, query, *states))


class Doubled(torch.autograd.Function):
    """Changes its result in place."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return own(x.clone().mul_(2))

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_gradient_of_a_result_changed_in_place() -> None:
    torch._dynamo.reset()
    x = torch.randn(3)
    compiled = torch.compile(lambda x: Doubled.apply(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(with_gradient(compiled, x), with_gradient(lambda x: 2 * x, x))
    assert own(x) is x, "eager code needs no view"
