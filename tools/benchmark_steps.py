"""Whole training steps, for tools/benchmark.py: time and memory of every method in turns with the plain residual."""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmark_peers import PEERS
from benchmark_report import Report, release_memory
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hc.config import ModelConfig, MoEConfig, ParallelConfig, ResidualConfig, TrainConfig, TrainingConfig
from megatron_hc.log import flops_per_token
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.compiled import compile_layers
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, materialize, placements
from megatron_hc.residual import Draw


@dataclass(frozen=True)
class Case:
    """One method: fields of ResidualConfig, ModelConfig and ParallelConfig."""

    residual: dict[str, Any]
    model: dict[str, Any]
    parallel: dict[str, Any]


def case(name: str = "plain", *, model: Any = None, parallel: Any = None, **residual: Any) -> Case:
    return Case({"residual_connection": name, **residual}, model or {}, parallel or {})


RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ("residual",)}
CASES: dict[str, Case] = {
    "plain": case(),
    "hyper-static-n2": case("hyper", residual_streams=2, static_residual=True),
    "hyper-static-n4": case("hyper", static_residual=True),
    "hyper-dynamic-n2": case("hyper", residual_streams=2),
    "hyper-dynamic-n4": case("hyper"),
    "hyper-dynamic-n4-einsum": case("hyper", model={"fused_residual": False}),
    "hyper-dynamic-n4-recompute": case("hyper", parallel=RECOMPUTE),
    "frac-m4": case("frac"),
    "mhc-n4": case("mhc"),
    "value-residual": case(model={"value_residual": "learnable"}),
    "attention": case("attention", attention_residual_block_size=8),
}


def config_of(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> TrainConfig:
    experts = getattr(shape, "experts", None)
    moe = {} if experts is None else {"moe": MoEConfig(num_experts=experts, moe_router_topk=shape.topk)}
    own = dict(chosen.model)
    if own.get("fused_residual", True):
        own["fused_residual_backend"] = shape.backend
    model = ModelConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        seq_length=shape.seq,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        residual=ResidualConfig(**chosen.residual),
        **own,
        **moe,
    )
    training = TrainingConfig(bf16=dtype == torch.bfloat16)
    config = TrainConfig(model=model, training=training, parallel=ParallelConfig(**chosen.parallel))
    model.validate()
    config.parallel.validate(model)
    return config


def model_of(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> GPT:
    """Weights on the device, through the same steps as a run."""
    config, mesh = config_of(chosen, shape, dtype), Mesh(device=shape.device)
    built = build_model(config, shape.vocab, mesh)
    with torch.device(shape.device):
        materialize(built, placements(built, mesh), 1, mesh, compute_dtype(config), drawn_on_device)
    cast_parameters(built, compute_dtype(config))
    if shape.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else layers beyond the limit are not compiled
        compile_layers(built, config.parallel, mesh)
    return built


def drawn_on_device(name: str, seed: int) -> Draw:
    """Numbers of the device's own generator: a run draws every weight on the CPU, seconds per billion."""
    return lambda part, shape, std: torch.randn(shape).mul_(std)


class Trainer:
    """Training steps of one model on one batch."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: Any) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        size = (shape.batch, shape.seq + 1)
        rows = torch.randint(0, shape.vocab, size, generator=torch.Generator().manual_seed(0)).to(shape.device)
        self.clock = time.process_time if shape.cpu_time else time.perf_counter
        self.tokens, self.labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self.is_cuda, self.is_compiled = shape.device == "cuda", shape.compile
        self.peak: int | None = None
        self.saved: int | None = None

    def step(self) -> float:
        """Seconds of one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        start = self.clock()
        self.loss(self.tokens, self.labels).backward()
        self.optimizer.step()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def warm_up(self, count: int) -> None:
        """``count`` steps, in which kernels are compiled and the optimizer gets its state, and on CUDA the peak."""
        for _ in range(count):
            self.step()
        if self.is_cuda and self.peak is None:
            self.peak = self.measured_peak()

    def measured_peak(self) -> int:
        """Bytes that this model has allocated at most during a step on CUDA; another model's are left out."""
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.state_bytes()
        self.step()
        return torch.cuda.max_memory_allocated() - others

    def peak_memory(self) -> int:
        """Bytes at most during a step; counted where they cannot be measured: state, and what a forward pass keeps."""
        return self.state_bytes() + self.saved_bytes() if self.peak is None else self.peak

    def state_bytes(self) -> int:
        """Parameters, gradients and the optimizer's moments; between steps the gradients are still there."""
        parameters = list(self.model.parameters())
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
        return sum(t.numel() * t.element_size() for t in held)

    def saved_bytes(self) -> int:
        """What is there for the backward pass between the two passes, parameters left out."""
        if self.saved is None:
            self.saved = self._saved_by_hooks() if self.is_compiled else self._alive_after_forward()
        return self.saved

    def _saved_by_hooks(self) -> int:
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(self.tokens, self.labels)
        del loss
        return sum(kept.values())

    def _alive_after_forward(self) -> int:
        """Also what recompute holds for itself, which no hook sees."""
        weights = {StorageWeakRef(p.untyped_storage()) for p in self.model.parameters()}
        with Storages() as storages:
            loss = self.loss(self.tokens, self.labels)
            found = storages.alive(weights)
        del loss
        return found


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.found[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self, without: set[StorageWeakRef]) -> int:
        """Bytes."""
        found = ((storage, size) for storage, size in self.found.items() if storage not in without)
        return sum(size for storage, size in found if not storage.expired())


def trainer_of(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> Trainer:
    model = model_of(chosen, shape, dtype)
    weights = torch.full((shape.batch, shape.seq), 1 / (shape.batch * shape.seq), device=shape.device)
    return Trainer(model, lambda tokens, labels: model.output.loss(model(tokens), labels, weights), shape)


def steps(shape: argparse.Namespace, dtype: torch.dtype, report: Report) -> None:
    """The table "steps": name -> step_time_ratio, peak_memory_ratio and what they come from."""
    shape.flops = flops_per_token(config_of(CASES["plain"], shape, dtype).model, shape.vocab)
    report.figures["flops_per_token"] = shape.flops
    if shape.peak_tflops is not None:
        print(
            f"MFU: {shape.flops / 1e9:.3f} GFLOP per token, as Megatron-LM counts them: three times the products of a "
            "forward pass, scores of attention by half (causal); residual path, norms and recompute not counted"
        )
    base = report.attempt("plain", functools.partial(warm_trainer, CASES["plain"], shape, dtype))
    if base is None:
        return
    makers: dict[str, Callable[[], Trainer | None]] = {
        name: functools.partial(warm_trainer, CASES[name], shape, dtype) for name in shape.methods
    }
    makers["plain"] = lambda: base
    if shape.peers and not hasattr(shape, "experts"):
        makers |= {name: functools.partial(_peer, make, shape, dtype) for name, make in PEERS.items()}
    for name, make in makers.items():
        if name != "plain" or "plain" in shape.methods:
            row = report.attempt(name, functools.partial(_compared, name, make, base, shape))
            if row is not None:
                report.add("steps", row, name)
            release_memory()  # it is the next one's


def warm_trainer(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> Trainer:
    trainer = trainer_of(chosen, shape, dtype)
    trainer.warm_up(3 if shape.compile else 2)
    return trainer


def _peer(make: Any, shape: argparse.Namespace, dtype: torch.dtype) -> Trainer | None:
    with torch.device(shape.device):  # weights are drawn there
        peer = make(shape, dtype)
    if peer is None:
        return None
    trainer = Trainer(*peer, shape)
    trainer.warm_up(2)
    return trainer


def _compared(
    name: str, make: Callable[[], Trainer | None], plain: Trainer, shape: argparse.Namespace
) -> dict[str, Any] | None:
    """The figures of one method, measured in turns with plain; None: not installed."""
    trainer = make()
    if trainer is None:
        print(f"{name:28s} not installed", flush=True)
        return None
    sides, times = (trainer, plain), ([], [])  # type: ignore[var-annotated]
    for side in sides:
        side.step()
    for _ in range(shape.rounds):
        for which in random.sample((0, 1), 2):
            times[which].append(sides[which].step())
    ratios = sorted(mine / theirs for mine, theirs in zip(*times, strict=True))
    seconds, tokens = statistics.median(times[0]), shape.batch * shape.seq
    # After the rounds: hooks on what autograd keeps may have compiled layers compiled again.
    saved, memory = [side.saved_bytes() for side in sides], [side.peak_memory() for side in sides]
    mfu = None if shape.peak_tflops is None else shape.flops * tokens / seconds / (shape.peak_tflops * 1e12)
    found = {
        "step_time_ratio": statistics.median(ratios),
        "step_time_ratio_spread": [ratios[0], ratios[-1]],
        "peak_memory_ratio": memory[0] / memory[1],
        "saved_activations_ratio": saved[0] / saved[1],
        "step_seconds": seconds,
        "peak_memory_bytes": memory[0],
        "saved_activations_bytes": saved[0],
        "tokens_per_second": tokens / seconds,
        "mfu": mfu,
    }
    print(
        f"{name:28s} {1e3 * seconds:9.1f} ms  x {found['step_time_ratio']:.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})  "
        f"memory x {memory[0] / memory[1]:.3f}  saved x {saved[0] / saved[1]:.3f}  {tokens / seconds:.0f} tokens/s"
        + ("" if mfu is None else f"  MFU {mfu:.3f}"),
        flush=True,
    )
    return found
