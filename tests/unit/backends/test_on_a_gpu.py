"""transformer-engine, apex and torchao themselves, where they and a GPU are: every module, and a training step.

Bounds: a product or a norm in bf16 is within 1e-2 of ours (both round to bf16 once; sums differ in order), its
gradients within 2e-2; attention within 2e-2, gradients 4e-2. A step's loss is within 2e-2 of ours (the bound of bf16 in
tests/parallel/parity.py). In FP8 a loss curve of 50 steps, from 5.7 to 0.9, is nowhere farther from bf16's
than 1 % of the first loss (torchao emulated on a CPU, and a stand-in with delayed scaling: 0.2 %).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL
from torch import Tensor, nn

from megatron_hc import cli, packages, train
from megatron_hc.backends import transformer_engine
from megatron_hc.backends.check import check_fp8_device
from megatron_hc.backends.norms import attach_norms
from megatron_hc.config import BackendConfig
from megatron_hc.data.loader import build_loader
from megatron_hc.model.attention import Attention
from megatron_hc.model.experts import Experts
from megatron_hc.model.linear import NormLayer, build_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: tests/parallel/test_backends.py has stand-ins"),
]
HAS = {name: packages.folder_of(package.module) is not None for name, package in packages.PACKAGES.items()}
CONFIG = dataclasses.replace(
    SMALL, hidden_size=256, ffn_hidden_size=512, seq_length=64, kv_channels=None, init_method_std=0.05
)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not HAS[name], reason=f"{name} is not installed: {packages.PACKAGES[name].install}")


def modules_of_engine() -> Any:
    return packages.load("transformer-engine", "this test", "transformer_engine.pytorch")[0]


def filled(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """On the GPU with random weights."""
    module = module.to("cuda", dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.0, std=0.05)
    return module


def compare(module: nn.Module, attach: Callable[[], Any], *inputs: Any, run: Any = None, bound: float = 1e-2) -> None:
    """Output and gradients before and after ``attach``."""

    def outcome() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        module.zero_grad()
        y = (run or module)(*leaves)
        (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        grads = [x.grad for x in leaves if isinstance(x, Tensor) and x.grad is not None]
        return [y.detach(), *grads, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    expected = outcome()
    attach()
    got = outcome()
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < bound * (1 if index == 0 else 2), f"{index}: {error}"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@needs("transformer-engine")
@pytest.mark.parametrize("kind", ["qkv", "proj", "fc1", "fc2"])
def test_linear(kind: Any) -> None:
    linear = filled(build_linear(kind, dataclasses.replace(CONFIG, disable_bias_linear=False), 0))
    x = random(64, 2, linear.weight.shape[1])
    compare(linear, lambda: transformer_engine.attach_linear(modules_of_engine(), linear, False), x)


@needs("transformer-engine")
def test_attention() -> None:
    attention = filled(Attention(CONFIG, 0))
    q, k = random(64, 2, 4, 64), random(64, 2, 2, 64)
    attach = lambda: transformer_engine.attach_attention(modules_of_engine(), attention, 0)  # noqa: E731
    compare(attention.core, attach, q, k, k.clone(), run=lambda q, k, v: attention.core(q, k, v, None), bound=2e-2)


@needs("transformer-engine")
def test_experts() -> None:
    moe = dataclasses.replace(CONFIG.moe, num_experts=4, moe_ffn_hidden_size=128)
    experts = filled(Experts(dataclasses.replace(CONFIG, moe=moe)))
    counts, weights = torch.tensor([5, 0, 30, 29], device="cuda"), torch.rand(64, device="cuda")
    attach = lambda: transformer_engine.attach_experts(modules_of_engine(), experts, None)  # noqa: E731
    compare(experts, attach, random(64, 256), weights, counts)


@pytest.mark.parametrize("impl", [pytest.param("apex", marks=needs("apex")),
                                  pytest.param("transformer_engine", marks=needs("transformer-engine"))])  # fmt: skip
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm(impl: str, kind: Any) -> None:
    holder = filled(nn.Sequential(NormLayer(dataclasses.replace(CONFIG, normalization=kind))), torch.float32)
    compare(holder, lambda: attach_norms(holder, impl), random(64, 2, 256))


# ---- whole runs ----

RUN = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128 --bf16 "
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope --residual-connection hyper "
    "--micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --mock-data --eval-iters 0 "
    "--tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0 --device cuda --log-interval 1000"
)
TE = "--transformer-impl transformer_engine"
STEPS = [
    pytest.param(TE, marks=needs("transformer-engine")),
    pytest.param(f"{TE} --gradient-accumulation-fusion", marks=needs("transformer-engine")),
    pytest.param("--optimizer-impl transformer_engine", marks=needs("transformer-engine")),
    pytest.param(f"{TE} --num-experts 4 --moe-ffn-hidden-size 128", marks=needs("transformer-engine")),
    pytest.param("--norm-impl apex --optimizer-impl apex --gradient-accumulation-fusion", marks=needs("apex")),
    pytest.param("--optimizer-impl deepspeed", marks=needs("deepspeed")),
]


def losses(flags: str, steps: int) -> list[float]:
    run = train.set_up(cli.parse(f"{RUN} --train-iters {steps} {flags}".split()))
    found: list[float] = []
    run.logger = _Recorder(found)  # type: ignore[assignment]
    loader = build_loader(run.datasets[0], run.mesh, micro_batch_size=4, consumed_samples=0)  # type: ignore[arg-type]
    for _ in range(steps):
        train.train_step(run, loader)
    return found


class _Recorder:
    """In a logger's place."""

    def __init__(self, found: list[float]) -> None:
        self.found = found

    def step(self, *, loss: float, **others: Any) -> None:
        self.found.append(loss)

    def pause(self, *arguments: Any) -> Any:
        return contextlib.nullcontext()


@pytest.mark.parametrize("flags", STEPS)
def test_a_training_step(flags: str) -> None:
    experts = "--num-experts 4 --moe-ffn-hidden-size 128" if "experts" in flags else ""
    assert all(abs(a / b - 1) < 2e-2 for a, b in zip(losses(flags, 3), losses(experts, 3), strict=True))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8", "torchao"])
def test_fifty_steps_in_fp8(recipe: str) -> None:
    name = "torchao" if recipe == "torchao" else "transformer-engine"
    chosen: Any = "tensorwise" if recipe == "torchao" else recipe
    if not HAS[name]:
        pytest.skip(f"{name} is not installed: {packages.PACKAGES[name].install}")
    try:
        check_fp8_device(BackendConfig(fp8_format="hybrid", fp8_recipe=chosen), torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    backend = "--fp8-backend torchao" if recipe == "torchao" else TE
    fp8 = losses(f"{backend} --fp8-format hybrid --fp8-recipe {chosen}", 50)
    plain = losses("", 50)
    distance = max(abs(a - b) for a, b in zip(fp8, plain, strict=True)) / plain[0]
    assert 0 < distance < 0.01 and plain[-1] < 0.3 * plain[0]
