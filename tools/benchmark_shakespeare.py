"""Does another residual path learn a small text better? Validation loss of several methods over several seeds.

    python tools/benchmark_shakespeare.py --input tinyshakespeare.txt [--seeds 3] [--methods plain hyper]
    python tools/benchmark_shakespeare.py --input tinyshakespeare.txt --methods torch-epochs torch-windows

The model is nanoGPT's CPU configuration: 4 layers, 128 wide, 4 heads, 64 tokens, batch 12, 2,000 iterations, GELU,
LayerNorm, learned positions, no bias in linear layers and LayerNorms, no dropout, AdamW with lr 1e-3 to 1e-4 (cosine,
100 warm-up), beta2 0.99, weight decay 0.1, clip 1. Tokens are bytes (and an end of document, which never occurs). The
first 90 % of the bytes are for training: windows that do not overlap, in random order, epoch by epoch, where nanoGPT
draws windows at random.

Validation: the other 10 % are cut, from the start, into windows of 64 predictions that do not overlap (the last token
of a window is the first input of the next), so that every byte after the first is predicted once, with 0 to 63 bytes
of context before its input; the few bytes left over at the end are not. The figure is the mean loss, in nats, of all
predictions. A seed gives every method the same order of data and the same initial weights of what all methods have, so
methods are compared seed by seed. Every run is trained, saved and loaded as a user's would be.

``torch-epochs`` and ``torch-windows`` are not of this project: the same model and recipe in plain torch, which says
what the figures of ``plain`` should be. The one draws the windows of an epoch in random order, as this project does,
the other random windows, as nanoGPT does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_hc.cli import exit_on_user_error, parse
from megatron_hc.data import IndexedDatasetWriter
from megatron_hc.inference import load_model
from megatron_hc.train import train

from benchmark_plain import BATCH, LENGTH, PlainGPT  # isort: skip

FLAGS = f"""--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length {LENGTH} --disable-bias-linear
    --normalization LayerNorm --disable-bias-layernorm --position-embedding-type learned_absolute
    --make-vocab-size-divisible-by 1 --micro-batch-size {BATCH} --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
    --adam-beta2 0.99 --weight-decay 0.1 --clip-grad 1.0 --tokenizer-type ByteTokenizer --eval-iters 0
    --eval-interval 0 --num-workers 0 --log-interval 100 --device cpu"""


def write_part(prefix: Path, data: bytes) -> str:
    """One document of bytes as a dataset."""
    with IndexedDatasetWriter(str(prefix), "uint16") as writer:
        writer.add_document(np.frombuffer(data, dtype=np.uint8).astype(np.uint16))
    return str(prefix)


def validation_windows(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, each [windows, LENGTH]."""
    count = (len(tokens) - 1) // LENGTH
    tokens = tokens[: count * LENGTH + 1]
    return tokens[:-1].view(count, LENGTH), tokens[1:].view(count, LENGTH)


@torch.no_grad()
def validation_loss(checkpoint: Path, data: bytes) -> float:
    """Nats per byte of the checkpoint's model over the windows of ``data``."""
    model = load_model(str(checkpoint)).model
    inputs, labels = validation_windows(torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64)))
    total = 0.0
    for x, y in zip(inputs.split(64), labels.split(64), strict=True):
        logits = model.output.logits(model(x)).double()  # [S, B, V]
        total += float(F.cross_entropy(logits.flatten(0, 1), y.t().flatten(), reduction="sum"))
    return total / labels.numel()


def one_run(method: str, seed: int, folder: Path, train_prefix: str, data: bytes, iterations: int) -> float:
    """Train a method (name and further flags) with a seed; returns the validation loss."""
    save = folder / f"{seed}-{method.replace(' ', '_')}"
    flags = f"""{FLAGS} --train-iters {iterations} --lr-warmup-iters {min(100, iterations // 10)} --seed {seed}
        --train-data-path {train_prefix} --data-cache-path {folder / "cache"} --save {save}
        --residual-connection {method}"""
    parsed = parse(flags.split())
    parsed.config.validate()
    with contextlib.redirect_stdout(io.StringIO()):
        train(parsed)
    return validation_loss(save, data)


def plain_torch_run(order: str, seed: int, train_data: bytes, data: bytes, iterations: int) -> float:
    """The recipe without this project; returns the validation loss."""
    train_tokens, tokens = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train_data, data))
    torch.manual_seed(seed)
    model = PlainGPT(norm_bias=False)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    warmup = min(100, iterations // 10)
    starts = epochs(train_tokens) if order == "torch-epochs" else windows(train_tokens)
    for iteration in range(iterations):
        done = (iteration - warmup) / (iterations - warmup)
        rate = iteration / warmup if done < 0 else 0.1 + 0.45 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        rows = torch.stack([train_tokens[start : start + LENGTH + 1] for start in next(starts)])
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    inputs, labels = validation_windows(tokens)
    with torch.no_grad():
        pairs = zip(inputs.split(64), labels.split(64), strict=True)
        return sum(float(model(x, y, reduction="sum")) for x, y in pairs) / labels.numel()


def windows(tokens: torch.Tensor) -> Iterator[list[int]]:
    """Starts of the windows of each batch, drawn with replacement."""
    while True:
        yield torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()


def epochs(tokens: torch.Tensor) -> Iterator[list[int]]:
    """The same for windows that do not overlap, all of them once an epoch; a batch does not reach into the next."""
    count = (len(tokens) - 1) // LENGTH
    while True:
        for chosen in torch.randperm(count)[: count // BATCH * BATCH].split(BATCH):
            yield (chosen * LENGTH).tolist()


def report(losses: dict[str, list[float]]) -> None:
    """Means, and each method against the first one, seed by seed."""
    first, *others = losses
    for method, values in losses.items():
        print(f"{method:24s} mean {statistics.mean(values):.4f}  of  {'  '.join(f'{v:.4f}' for v in values)}")
    for method in others:
        differences = [b - a for a, b in zip(losses[first], losses[method], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
        print(
            f"{method} - {first}: {statistics.mean(differences):+.4f} +- {error:.4f} (standard error, paired by seed)"
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", type=Path, required=True, help="the text")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 1 .. N (default: 3)")
    parser.add_argument("--iterations", type=int, default=2000, help="length of a run (default: 2000)")
    parser.add_argument(
        "--methods", nargs="+", default=["plain", "hyper"], help="'NAME and flags' of each; the first is the baseline"
    )
    arguments = parser.parse_args(argv)
    with exit_on_user_error("benchmark_shakespeare.py"), tempfile.TemporaryDirectory() as name:
        try:
            text = arguments.input.read_bytes()
        except OSError as error:
            raise ValueError(f"--input {arguments.input} cannot be read ({error.strerror})") from error
        if len(text) < 100 * LENGTH or arguments.seeds < 1 or arguments.iterations < 20:
            raise ValueError(
                f"--input needs {100 * LENGTH} bytes or more, --seeds at least 1, --iterations at least 20"
            )
        cut = int(0.9 * len(text))
        prefix = write_part(Path(name) / "train", text[:cut])
        losses: dict[str, list[float]] = {method: [] for method in arguments.methods}
        for seed in range(1, arguments.seeds + 1):
            for method, values in losses.items():
                start = time.perf_counter()
                if method in ("torch-epochs", "torch-windows"):
                    loss = plain_torch_run(method, seed, text[:cut], text[cut:], arguments.iterations)
                else:
                    loss = one_run(method, seed, Path(name), prefix, text[cut:], arguments.iterations)
                values.append(loss)
                print(f"seed {seed}  {method:24s} {values[-1]:.4f}  ({time.perf_counter() - start:.0f} s)", flush=True)
        print(f"validation loss in nats per byte after {arguments.iterations} iterations of {BATCH} x {LENGTH} bytes")
        report(losses)


if __name__ == "__main__":
    main(sys.argv[1:])
