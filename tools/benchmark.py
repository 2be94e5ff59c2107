"""Cost of residual methods at a model's real shapes: bytes per second of a boundary, and whole training steps.

    python tools/benchmark.py --preset cpu-small [--output figures.json] [--plot figures.png]

Parts (--parts, default all that can run): "kernels" runs one boundary forward and backward and compares the bytes that
it must move with a copy measured in the same run; "steps" runs whole training steps (forward, loss, backward, AdamW)
of every method, of this project's peers where they are installed, and prints times and peak memory as ratios to the
plain residual; "curves" repeats "kernels" over widths and numbers of streams. A method and plain take turns in random
order, and a ratio is the median over rounds of ratios within a round, so that a drift of the machine falls on both.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_kernels import KERNELS, kernel
from benchmark_peers import PEERS
from torch import Tensor

from megatron_hc.config import ModelConfig, MoEConfig, ParallelConfig, ResidualConfig, TrainConfig, TrainingConfig
from megatron_hc.kernels.boundary import check_backend
from megatron_hc.log import flops_per_token
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, materialize, placements

PRESETS: dict[str, dict[str, Any]] = {
    "cpu-small": {"hidden": 512, "layers": 3, "heads": 8, "ffn": 1344, "seq": 2048, "batch": 1, "vocab": 256},
    "gpt-124m": {"hidden": 768, "layers": 12, "heads": 12, "ffn": 2048, "seq": 1024, "batch": 16, "vocab": 50304},
    "dense-1b": {"hidden": 2048, "layers": 16, "heads": 16, "ffn": 8192, "seq": 4096, "batch": 4, "vocab": 128256},
    "dense-7b-slice": {"hidden": 4096, "layers": 4, "heads": 32, "ffn": 11008, "seq": 4096, "batch": 2, "vocab": 32000},
    "moe-1b-7b-slice": {
        **{"hidden": 2048, "layers": 4, "heads": 16, "ffn": 1024, "seq": 4096, "batch": 2, "vocab": 50304},
        **{"experts": 64, "topk": 8},
    },
}
"""Llama-like decoders (MoE: OLMoE's shape); the slices have the width of a large model and few of its layers."""


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


def model_of(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> GPT:
    """Weights on the device, through the same steps as a run."""
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
    mesh = Mesh(device=shape.device)
    built = build_model(config, shape.vocab, mesh)
    materialize(built, placements(built, mesh), 1, mesh, compute_dtype(config))
    cast_parameters(built, compute_dtype(config))
    if shape.compile:
        for layer in built.stage_layers():
            layer.compile()
    return built


class Trainer:
    """Training steps of one model on one batch."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Tensor, Tensor], Tensor], shape: Any) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        size = (shape.batch, shape.seq + 1)
        rows = torch.randint(0, shape.vocab, size, generator=torch.Generator().manual_seed(0)).to(shape.device)
        self.clock = time.process_time if shape.cpu_time else time.perf_counter
        self.tokens, self.labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        self.is_cuda = shape.device == "cuda"
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

    def peak_memory(self) -> int:
        """Bytes: allocated at most during a step on CUDA; on a CPU counted, see ``counted_memory``."""
        if not self.is_cuda:
            return self.counted_memory()
        self.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - sum(self.state_bytes())
        self.step()
        return torch.cuda.max_memory_allocated() - before

    def state_bytes(self) -> tuple[int, int]:
        """Parameters; gradients and two moments."""
        parameters = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return parameters, 3 * parameters

    def counted_memory(self) -> int:
        """Parameters, gradients, moments and what autograd keeps for the backward pass."""
        return sum(self.state_bytes()) + self.saved_bytes()

    def saved_bytes(self) -> int:
        """What autograd keeps between the forward and the backward pass, parameters left out."""
        if self.saved is None:
            self.saved = self._saved_bytes()
        return self.saved

    def _saved_bytes(self) -> int:
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


def trainer_of(model: GPT, shape: argparse.Namespace) -> Trainer:
    weights = torch.full((shape.batch, shape.seq), 1 / (shape.batch * shape.seq), device=shape.device)
    return Trainer(model, lambda tokens, labels: model.output.loss(model(tokens), labels, weights), shape)


def steps(shape: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Name -> step_time_ratio, peak_memory_ratio and what they come from."""
    plain = model_of(CASES["plain"], shape, dtype)
    shape.flops = flops_per_token(plain.config, shape.vocab)
    base = trainer_of(plain, shape)
    makers: dict[str, Callable[[], Trainer | None]] = {
        name: functools.partial(_trainer, CASES[name], shape, dtype) for name in shape.methods
    }
    if shape.peers and not hasattr(shape, "experts"):
        makers |= {name: functools.partial(_peer, make, shape, dtype) for name, make in PEERS.items()}
    found = {}
    for name, make in makers.items():
        trainer = base if name == "plain" else make()
        if trainer is None:
            print(f"{name}: not installed", file=sys.stderr)
        else:
            found[name] = compared(name, trainer, base, shape)
        del trainer  # its memory is the next one's
    return found


def _trainer(chosen: Case, shape: argparse.Namespace, dtype: torch.dtype) -> Trainer:
    return trainer_of(model_of(chosen, shape, dtype), shape)


def _peer(make: Any, shape: argparse.Namespace, dtype: torch.dtype) -> Trainer | None:
    peer = make(shape, dtype)
    return None if peer is None else Trainer(*peer, shape)


def compared(name: str, trainer: Trainer, plain: Trainer, shape: argparse.Namespace) -> dict[str, Any]:
    """The figures of one method, measured in turns with plain."""
    sides, times = (trainer, plain), ([], [])  # type: ignore[var-annotated]
    memory = [side.peak_memory() for side in sides]
    for side in sides:
        side.step()
    for _ in range(shape.rounds):
        for which in random.sample((0, 1), 2):
            times[which].append(sides[which].step())
    ratios = sorted(mine / theirs for mine, theirs in zip(*times, strict=True))
    seconds, tokens = statistics.median(times[0]), shape.batch * shape.seq
    saved = [side.saved_bytes() for side in sides]
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


def plot(figures: dict[str, Any], path: str) -> None:
    """Ratios of steps, and share of a copy's speed over d and n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    names = list(figures.get("steps", {}))
    for offset, key in ((0.2, "step_time_ratio"), (-0.2, "peak_memory_ratio")):
        values = [figures["steps"][name][key] for name in names]
        axes[0].barh([i + offset for i in range(len(names))], values, height=0.4, label=key)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].legend()
    rows = figures.get("curves", []) or figures.get("kernels", [])
    for axis, over, fixed in ((axes[1], "d", "n"), (axes[2], "n", "d")):
        for method in KERNELS:
            most = max((row[fixed] for row in rows if row["method"] == method), default=None)
            points = sorted((r for r in rows if r["method"] == method and r[fixed] == most), key=lambda r: r[over])
            seconds = [1e9 * (r["forward_seconds"] + r["backward_seconds"]) / r["tokens"] for r in points]
            axis.plot([r[over] for r in points], seconds, marker="o", label=f"{method} ({fixed} {most})")
        axis.set_xlabel(over)
        axis.set_ylabel("ns per token and boundary")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    for name in ("hidden", "layers", "heads", "ffn", "seq", "batch", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--parts", default="kernels,steps", help="comma-separated: kernels, steps, curves")
    parser.add_argument("--methods", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other implementations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a machine that is busy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--backend", default="auto", help="--fused-residual-backend")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer")
    parser.add_argument("--peak-tflops", type=float, help="of one device, for MFU")
    parser.add_argument("--output", help="JSON file of all figures")
    parser.add_argument("--plot", help="PNG file")
    arguments = parser.parse_args()
    for name, value in PRESETS[arguments.preset].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    arguments.methods, arguments.parts = arguments.methods.split(","), arguments.parts.split(",")
    for name, values, known in (
        ("--methods", arguments.methods, CASES),
        ("--parts", arguments.parts, ("kernels", "steps", "curves")),
    ):
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"{name}: {', '.join(unknown)} must be among {', '.join(known)}")
    if arguments.hidden % arguments.heads:
        parser.error(f"--heads ({arguments.heads}) must divide --hidden ({arguments.hidden})")
    return arguments


def main() -> None:
    shape = read_arguments()
    torch.set_num_threads(shape.threads)
    chosen = shape.dtype or ("bf16" if shape.device == "cuda" else "fp32")
    dtype = torch.bfloat16 if chosen == "bf16" else torch.float32
    try:
        check_backend(shape.backend, torch.device(shape.device))
    except ValueError as error:
        raise SystemExit(f"benchmark.py: error: {error}") from None
    tokens = shape.seq * shape.batch
    device = torch.cuda.get_device_name() if shape.device == "cuda" else f"CPU, {shape.threads} threads"
    figures: dict[str, Any] = {"preset": shape.preset, "device": device, "dtype": chosen, "torch": torch.__version__}
    print(f"{shape.preset}: {device}, {chosen}, d {shape.hidden}, {shape.layers} layers, {tokens} tokens", flush=True)
    if "kernels" in shape.parts:
        pairs = [(method, n) for method in KERNELS for n in ((4,) if method == "frac" else (2, 4))]
        figures["kernels"] = [kernel(method, n, shape.hidden, tokens, dtype, shape) for method, n in pairs]
    if "curves" in shape.parts:
        widths = [(4, d) for d in (256, 512, 1024, 2048, 4096) if d <= 2 * shape.hidden]
        counts = [(n, shape.hidden) for n in (1, 2, 3, 8) if shape.hidden % n == 0]
        sizes = [(method, n, d) for method in KERNELS for n, d in (*widths, *counts) if method != "mhc" or n > 1]
        figures["curves"] = [kernel(method, n, d, tokens, dtype, shape) for method, n, d in sizes]
    if "steps" in shape.parts:
        figures["steps"] = steps(shape, dtype)
    if shape.output is not None:
        beside = Path(f"{shape.output}.tmp")
        beside.write_text(json.dumps(figures, indent=1))
        beside.replace(shape.output)
    if shape.plot is not None:
        plot(figures, shape.plot)


if __name__ == "__main__":
    main()
