"""Time per iteration of the plain residual against a plain-torch script of the same shape, interleaved in one process.

    python tools/benchmark_plain.py [--rounds 15] [--iterations 20] [--clock cpu] [--residual-connection hyper]

The shape is nanoGPT's CPU configuration (4 layers, 128 wide, 4 heads, 64 tokens, batch 12, 256 byte tokens). Both
sides do a whole iteration: fetch a batch, forward, loss, backward, clip, AdamW. Rounds alternate, and the figure is the
median over rounds of the ratio of their times, so that a drift of the machine's speed falls on both. On a machine that
does other work take --clock cpu with --threads 1: the time that the process had a core.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.cli import parse
from megatron_hc.data import IndexedDatasetWriter, build_loader
from megatron_hc.train import set_up, train_step

LAYERS, WIDTH, HEADS, LENGTH, BATCH, VOCAB = 4, 128, 4, 64, 12, 256


class Block(nn.Module):
    def __init__(self, norm_bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=norm_bias), nn.LayerNorm(WIDTH, bias=norm_bias)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc, self.out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = (t.view(B, S, HEADS, -1).transpose(1, 2) for t in self.qkv(self.ln_1(x)).split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, S, C)
        x = x + self.proj(y)
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """What one would write without this project: nanoGPT's model. Its norms have no bias, the timed ones do."""

    def __init__(self, norm_bias: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(norm_bias) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=norm_bias)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("proj.weight", "out.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * LAYERS) if is_output else 1))

    def forward(self, tokens: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


def plain_side(data: np.ndarray) -> Callable[[], None]:
    """One iteration of the plain script: a random batch from a memory map, as nanoGPT does."""
    model = PlainGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,))
        rows = torch.stack([torch.from_numpy(data[i : i + LENGTH + 1].astype(np.int64)) for i in starts.tolist()])
        optimizer.zero_grad(set_to_none=True)
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def our_side(prefix: str, extra: list[str]) -> Callable[[], None]:
    """One iteration of this project's training loop."""
    flags = f"""--num-layers {LAYERS} --hidden-size {WIDTH} --num-attention-heads {HEADS} --seq-length {LENGTH}
        --micro-batch-size {BATCH} --train-iters 1000000 --lr 1e-3 --adam-beta2 0.99 --disable-bias-linear
        --lr-decay-style constant --data-path {prefix} --split 1,0,0 --tokenizer-type NullTokenizer
        --vocab-size {VOCAB - 1} --eval-iters 0 --num-workers 0 --log-interval 1000000 --device cpu"""
    run = set_up(parse(flags.split() + extra))
    loader = build_loader(run.datasets[0], run.mesh, micro_batch_size=BATCH)  # type: ignore[arg-type]
    return lambda: train_step(run, loader)


def timed(step: Callable[[], None], iterations: int, clock: Callable[[], float]) -> float:
    """Seconds per iteration."""
    start = clock()
    for _ in range(iterations):
        step()
    return (clock() - start) / iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="alternations (default: 15)")
    parser.add_argument("--iterations", type=int, default=20, help="iterations per round and side (default: 20)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what is timed (default: wall)")
    arguments, extra = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, VOCAB - 1, 1_000_000).astype(np.uint16)
        with IndexedDatasetWriter(str(Path(folder) / "random"), np.uint16) as writer:
            writer.add_document(tokens)
        sides = {"plain torch": plain_side(tokens), "megatron_hc": our_side(str(Path(folder) / "random"), extra)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for step in sides.values():
            timed(step, arguments.iterations, clock)  # warm-up
        for _ in range(arguments.rounds):
            for name in random.sample(list(sides), 2):
                times[name].append(timed(sides[name], arguments.iterations, clock))
    for name, values in times.items():
        print(f"{name:12s} {1e3 * statistics.median(values):8.2f} ms per iteration (median)")
    ratios = [ours / plain for ours, plain in zip(times["megatron_hc"], times["plain torch"], strict=True)]
    spread = f"{min(ratios):.3f} .. {max(ratios):.3f}"
    print(f"ratio {statistics.median(ratios):.3f} (median of {len(ratios)} rounds, {spread})")


if __name__ == "__main__":
    main()
