"""A small mixture of experts against the dense model of the same active size: loss, load balance, cost of a step.

    python tools/benchmark_moe.py --input tinyshakespeare.txt [--seeds 3] [--iterations 2000]

Model, training and validation are those of benchmark_shakespeare.py (4 layers, 128 wide, bytes). The dense MLP is 512
wide; the mixture has 8 experts of width 256, of which a token takes 2: the same active parameters but for the router,
4 times as many MLP parameters in all. Balancing is by the auxiliary loss with coefficient 0.01.

Load balance is Megatron-LM's ``load_balancing_loss`` divided by its coefficient, averaged over layers, in the last
tenth of the run: 1 is balanced, at most 8 / 2 = 4. The cost is the CPU time of forward and backward passes of one
micro-batch in one thread (OMP_NUM_THREADS=1), medians of interleaved measurements, of the whole model and of one branch
alone; in a ratio the machine's speed cancels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_shakespeare import FLAGS, one_run, report, write_part
from torch import Tensor

from megatron_hc.cli import exit_on_user_error, parse
from megatron_hc.mesh import Mesh
from megatron_hc.model.experts import arrange, combine, dispatch, weights_of_rows
from megatron_hc.model.gpt import GPT
from megatron_hc.model.moe import MoE
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, materialize, placements

EXPERTS = """--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"""
METHODS = {"dense": "plain", "experts": " ".join(f"plain {EXPERTS}".split())}
LOOP = f"{EXPERTS} --no-moe-grouped-gemm"


def built(flags: str, precision: str) -> GPT:
    """A model of the benchmark with its initial values."""
    config = parse(f"{FLAGS} {precision} --mock-data --train-iters 1000 {flags}".split()).config
    model = build_model(config, 257, Mesh())
    materialize(model, placements(model, Mesh()), 1, Mesh(), compute_dtype(config))
    cast_parameters(model, compute_dtype(config))
    return model.train()


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU time of each, measured in turns: other work on the machine disturbs it less than wall time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat >= 3:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def costs(repeats: int) -> None:
    """Ratios of a step's time, experts over dense."""
    tokens = torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(1))
    weights = torch.full((12, 64), 1 / (12 * 64))

    def step(model: GPT) -> Callable[[], object]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            model.output.loss(model(tokens), tokens.roll(-1, 1), weights).backward()

        return run

    def branch(model: GPT) -> Callable[[], object]:
        mlp, dtype = model.stage_layers()[0].mlp, model.embedding.weight.dtype
        x = inputs(dtype).requires_grad_()

        def run() -> None:
            mlp.zero_grad(set_to_none=True)
            mlp(x).sum().backward()

        return run

    for precision in ("", "--bf16"):
        models = {
            name: built(flags, precision) for name, flags in (("dense", ""), ("grouped", EXPERTS), ("loop", LOOP))
        }
        for what, of in (("step", step), ("branch alone", branch)):
            found = seconds({name: of(model) for name, model in models.items()}, repeats)
            ratios = ", ".join(f"{name} {found[name] / found['dense']:.2f}" for name in ("grouped", "loop"))
            print(f"time of a {what} over dense, {precision[2:] or 'fp32'}: {ratios}", flush=True)
        found = seconds(parts(models["grouped"]), repeats)
        shares = ", ".join(f"{name} {100 * time / sum(found.values()):.0f} %" for name, time in found.items())
        print(f"of the branch's forward pass, {precision[2:] or 'fp32'}: {shares}", flush=True)


def inputs(dtype: torch.dtype) -> Tensor:
    """What a branch reads, [S, B, C]."""
    return torch.randn(64, 12, 128, generator=torch.Generator().manual_seed(1)).to(dtype)


def parts(model: GPT) -> dict[str, Callable[[], object]]:
    """What a branch of experts does, step by step, without gradients."""
    moe = model.stage_layers()[0].mlp
    assert isinstance(moe, MoE)
    x = inputs(model.embedding.weight.dtype)
    with torch.no_grad():
        routing = moe.router(x)
        rows = arrange(routing.experts, routing.kept, moe.num_experts)
        weights = weights_of_rows(routing.weights, rows)
        tokens = x.flatten(0, 1)
        moved = dispatch(tokens, rows, moe.topk)
        y = moe.experts(moved, weights, rows.counts)

    def move() -> None:
        dispatch(tokens, rows, moe.topk)
        combine(y, rows, moe.topk)

    found: dict[str, Callable[[], object]] = {
        "router": lambda: moe.router(x),
        "sorting": lambda: arrange(routing.experts, routing.kept, moe.num_experts),
        "moving rows": move,
        "experts": lambda: moe.experts(moved, weights, rows.counts),
    }
    return {name: torch.no_grad()(run) for name, run in found.items()}


def balance(metrics: Path) -> float:
    """Mean balancing loss in the last tenth of a run."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    values = [line["load_balancing_loss"] for line in lines if "load_balancing_loss" in line]
    return statistics.mean(values[-max(len(values) // 10, 1) :])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", type=Path, required=True, help="the text")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 1 .. N (default: 3; 0: costs only)")
    parser.add_argument("--iterations", type=int, default=2000, help="length of a run (default: 2000)")
    parser.add_argument("--repeats", type=int, default=20, help="measurements of each cost (default: 20)")
    arguments = parser.parse_args(argv)
    with exit_on_user_error("benchmark_moe.py"), tempfile.TemporaryDirectory() as name:
        try:
            text = arguments.input.read_bytes()
        except OSError as error:
            raise ValueError(f"--input {arguments.input} cannot be read ({error.strerror})") from error
        costs(arguments.repeats)
        cut, folder = int(0.9 * len(text)), Path(name)
        prefix = write_part(folder / "train", text[:cut])
        losses: dict[str, list[float]] = {method: [] for method in METHODS}
        for seed in range(1, arguments.seeds + 1):
            for method, flags in METHODS.items():
                metrics = folder / f"{method}-{seed}.jsonl"
                logged = f"{flags} --metrics-jsonl {metrics}"
                losses[method].append(one_run(logged, seed, folder / method, prefix, text[cut:], arguments.iterations))
                more = f"  balance {balance(metrics):.3f}" if method == "experts" else ""
                print(f"seed {seed}  {method:8s} {losses[method][-1]:.4f}{more}", flush=True)
        if arguments.seeds:
            print(f"validation loss in nats per byte after {arguments.iterations} iterations of 12 x 64 bytes")
            report(losses)


if __name__ == "__main__":
    main(sys.argv[1:])
