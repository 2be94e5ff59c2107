"""Tokens per second while writing text: this package against transformers on the same exported model, in one process.

    python tools/benchmark_decode.py [--hidden-size 512] [--num-layers 8] [--batch-size 16] [--device cuda --bf16]

A plain Llama-like model with random weights is saved, exported with tools/convert_checkpoint.py and loaded by both. All
texts are greedy and must be the same tokens. Rounds visit the cases in random order; a ratio is the median over rounds
of two times of the same round, so that a drift of the machine falls on both. On a CPU it is the process's CPU time that
counts, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_hc.inference import Decoder, Engine, Request, load_model
from megatron_hc.model.generate import Sampling

ROOT = Path(__file__).parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8191, help="tokens, end-of-document not counted")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16, help="texts at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def make_models(arguments: argparse.Namespace, folder: Path) -> None:
    """A checkpoint in ``folder/ours`` and its export in ``folder/hf``."""
    heads = max(1, arguments.hidden_size // 64)
    room = arguments.prompt_tokens + arguments.new_tokens
    flags = f"""--num-layers {arguments.num_layers} --hidden-size {arguments.hidden_size} --num-attention-heads {heads}
        --seq-length {room} --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --micro-batch-size 1 --train-iters 1 --lr 1e-9 --mock-data
        --tokenizer-type NullTokenizer --vocab-size {arguments.vocab_size} --eval-iters 0 --num-workers 0 --device cpu
        --save {folder / "ours"}"""
    run("pretrain_gpt.py", *flags.split())
    run("tools/convert_checkpoint.py", "--from", "megatron-hc", "--to", "hf", "--load", folder / "ours", "--save",
        folder / "hf")  # fmt: skip


def cases(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], list[list[int]]]]:
    """Name -> writes all texts; every case gives the same ones."""
    from transformers import AutoModelForCausalLM

    dtype = "bfloat16" if arguments.bf16 else "float32"
    model, tokenizer, config, _, mesh = load_model(str(folder / "ours"), device=arguments.device, dtype=dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, dtype))
    theirs = theirs.to(arguments.device).eval()
    numbers, B = random.Random(0), arguments.batch_size
    prompts = [[numbers.randrange(arguments.vocab_size) for _ in range(arguments.prompt_tokens)] for _ in range(B)]
    requests = [
        Request(
            prompt=tuple(prompt), max_new_tokens=arguments.new_tokens, sampling=Sampling(temperature=0), ignore_eod=True
        )
        for prompt in prompts
    ]
    room = arguments.prompt_tokens + arguments.new_tokens
    engine = Engine(Decoder(model, config, mesh, rows=B, max_length=room), tokenizer)

    def ours_together() -> list[list[int]]:
        return [text.tokens for text in engine.run(requests)]

    def ours_alone() -> list[list[int]]:
        return [engine.run([request])[0].tokens for request in requests]

    @torch.inference_mode()
    def generated(batch: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(batch, device=arguments.device)
        new = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return new[:, ids.shape[1] :].tolist()

    return {
        "ours, together": ours_together,
        "ours, one by one": ours_alone,
        "transformers, together": lambda: generated(prompts),
        "transformers, one by one": lambda: [generated([prompt])[0] for prompt in prompts],
    }


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_models(arguments, Path(folder))
        measured = cases(arguments, Path(folder))
    texts = {name: write() for name, write in measured.items()}  # also warms up
    first = texts["ours, together"]
    differing = {name: sum(a != b for a, b in zip(found, first, strict=True)) for name, found in texts.items()}
    print(f"texts that differ from 'ours, together', of {arguments.batch_size}: {differing}")
    if not arguments.bf16 and any(differing.values()):
        raise SystemExit("the models do not write the same: the times say nothing")
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(arguments.rounds):
        for name in random.sample(list(measured), len(measured)):
            started = clock()
            measured[name]()  # ends with tokens on the CPU
            times[name].append(clock() - started)
    number = arguments.batch_size * arguments.new_tokens
    for name, found in times.items():
        print(f"{name:26} {number / statistics.median(found):9.0f} tokens/s")
    for faster, slower in (
        ("ours, together", "ours, one by one"),
        ("ours, together", "transformers, together"),
        ("ours, one by one", "transformers, one by one"),
    ):
        ratios = [b / a for a, b in zip(times[faster], times[slower], strict=True)]
        print(f"{faster} / {slower}: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
