#!/usr/bin/env python
"""What the residual path costs at every scale, on paper: the tables of docs/scale.md.

    python tools/scale_table.py [--hardware h100] [--models 1b 7b] [--methods plain hyper]

Each model has a layout per number of GPUs, the same for all methods, so that only the residual path differs. Prints
markdown: memory of the fullest GPU, bytes sent to other pipeline stages, time of a step over plain, and where it goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from megatron_hc.cli import exit_on_user_error, parse
from megatron_hc.estimate.estimate import Estimate, estimate
from megatron_hc.estimate.hardware import HARDWARE

LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --bf16 --seq-length 4096 "
    "--untie-embeddings-and-output-weights --train-iters 1 --lr 3e-4 --mock-data --tokenizer-type NullTokenizer "
    "--overlap-grad-reduce --overlap-param-gather"
)
GROUPED = "--group-query-attention --num-query-groups"
EXPERTS = "--moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1 --num-experts"
MODELS = {
    "1b": "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 8192 --vocab-size 50303",
    "7b": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 --vocab-size 50303",
    "70b": f"--num-layers 80 --hidden-size 8192 --num-attention-heads 64 {GROUPED} 8 --ffn-hidden-size 28672 "
    "--vocab-size 128255",
    "moe-7b": "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --vocab-size 50303 --ffn-hidden-size 1024 "
    f"{EXPERTS} 64 --moe-router-topk 8 --moe-ffn-hidden-size 1024",
    "moe-30b": f"--num-layers 48 --hidden-size 2048 --num-attention-heads 32 --kv-channels 128 {GROUPED} 4 "
    f"--vocab-size 151935 --ffn-hidden-size 6144 {EXPERTS} 128 --moe-router-topk 8 --moe-ffn-hidden-size 768",
    "moe-1t": f"--num-layers 61 --hidden-size 7168 --num-attention-heads 64 --kv-channels 128 {GROUPED} 8 "
    f"--vocab-size 163839 --ffn-hidden-size 18432 {EXPERTS} 384 --moe-router-topk 8 --moe-ffn-hidden-size 2048 "
    "--moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]+[1]*60) "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}
"""The last three: the sizes of OLMoE-1B-7B, Qwen3-30B-A3B and Kimi K2, the last with grouped queries and every layer
recomputed, without which it needs twice the memory of the GPU."""


class Layout(NamedTuple):
    """Of one model on a number of GPUs."""

    gpus: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    virtual: int = 1
    micro_batch: int = 1
    batch: int = 1024

    @property
    def flags(self) -> str:
        words = f"--micro-batch-size {self.micro_batch} --global-batch-size {self.batch}"
        words += f" --tensor-model-parallel-size {self.tp}" + (" --sequence-parallel" if self.tp > 1 else "")
        words += f" --pipeline-model-parallel-size {self.pp} --expert-model-parallel-size {self.ep}"
        return words + (f" --num-virtual-stages-per-pipeline-rank {self.virtual}" if self.virtual > 1 else "")

    def __str__(self) -> str:
        parts = [f"{name} {size}" for name, size in (("tp", self.tp), ("pp", self.pp), ("ep", self.ep)) if size > 1]
        return ", ".join(parts) or "data parallel"


LAYOUTS = {
    "1b": [Layout(8, micro_batch=2), Layout(64, micro_batch=2)],
    "7b": [Layout(8, tp=4), Layout(64, tp=2), Layout(512, tp=2)],
    "70b": [Layout(64, tp=8, pp=4), Layout(512, tp=8, pp=4), Layout(4096, tp=8, pp=8, virtual=2, batch=2048)],
    "moe-7b": [Layout(8, ep=8), Layout(64, ep=8)],
    "moe-30b": [Layout(64, ep=8, pp=2), Layout(512, ep=8, pp=2)],
    "moe-1t": [
        Layout(1024, pp=16, ep=64, batch=2048),
        Layout(4096, pp=16, ep=64, batch=4096),
        Layout(16384, pp=16, ep=64, batch=16384),
    ],
}
METHODS = {
    "plain": "",
    "hyper": "--residual-connection hyper --residual-streams 4",
    "frac": "--residual-connection frac --residual-streams 4",
    "mhc": "--residual-connection mhc --residual-streams 4",
    "attention": "--residual-connection attention --attention-residual-block-size {block}",
}
RECOMPUTE = {
    "no recompute": "",
    "residual reads recomputed": "--recompute-granularity selective --recompute-modules residual",
}


def row(name: str, found: Estimate, plain: Estimate) -> str:
    """One line of a table."""
    residual = found.seconds["residual"] / found.step_seconds
    cells = (
        name,
        f"{found.peak_bytes / 1e9:.1f}",
        f"{max(rank.activations for rank in found.ranks) / 1e9:.1f}",
        f"{found.sent.get('pp', 0) / 1e9:.1f}",
        f"{found.step_seconds:.3f}",
        f"{found.step_seconds / plain.step_seconds:.3f}",
        f"{residual:.1%}",
        f"{found.mfu:.1%}",
    )
    return "| " + " | ".join(cells) + " |"


def tables(models: list[str], methods: list[str], hardware: str) -> Iterator[str]:
    """Line by line."""
    machine = HARDWARE[hardware]
    for model in models:
        for layout in LAYOUTS[model]:
            num_layers = int(MODELS[model].split()[1])
            yield f"\n### {model}, {layout.gpus:,} GPUs ({layout}, {layout.batch:,} sequences per step)\n"
            yield "| method | GB per GPU | activations | GB to stages | step (s) | over plain | residual | MFU |"
            yield "|---|---|---|---|---|---|---|---|"
            plain = None
            for method in methods:
                for name, recompute in RECOMPUTE.items():
                    if recompute and (method in ("plain", "frac") or "--recompute" in MODELS[model]):
                        continue
                    block = max(2, 2 * num_layers // 8)
                    flags = f"{LLAMA} {MODELS[model]} {layout.flags} {METHODS[method].format(block=block)} {recompute}"
                    config = parse(flags.split()).config
                    vocab_size = (config.data.vocab_size or 0) + 1
                    found = estimate(config, machine, layout.gpus, vocab_size)
                    plain = plain or found
                    yield row(method if not recompute else f"{method}, {name}", found, plain)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="h100")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    with exit_on_user_error("tools/scale_table.py"):
        for line in tables(options.models, options.methods, options.hardware):
            print(line, flush=True)


if __name__ == "__main__":
    main()
