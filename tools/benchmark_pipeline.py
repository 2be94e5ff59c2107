"""Pipelines against one process with the same work: step time, bubble, memory and bytes between stages.

    python tools/benchmark_pipeline.py [--methods plain,hyper,mhc] [--schedules 1f1b,zbv] [--hidden-size 256] ...

Each run goes through the code of a training run (set-up, steps) on mock data, ``--size`` processes of one thread each
against one process with as many threads. On GPUs (--device cuda) every process takes one. Step time: median over
steps. CPU time: of all threads in a mean step, which other work on the machine hardly changes. Bytes: what the stages
sent in a step, which must be what the boundaries of the residual method say.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

VIRTUAL = {"interleaved", "interleaved-zero-bubble"}


class Figures(NamedTuple):
    """What one process measured."""

    rank: int
    seconds: float
    """Of a step."""
    cpu_seconds: float
    """Of all of the process's threads, of a step."""
    memory: int
    """Peak, bytes; on a CPU of the whole process."""
    bubble: float
    ideal_bubble: float
    sent: int
    """Bytes in a step."""
    declared: int
    """Bytes in a step that all stages together should send."""


def flags_of(options: argparse.Namespace, method: str, size: int, schedule: str) -> list[str]:
    flags = f"""--num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --num-attention-heads {max(1, options.hidden_size // 64)} --seq-length {options.seq_length}
        --micro-batch-size 1 --global-batch-size {options.micro_batches} --train-iters {options.steps} --lr 1e-3
        --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --num-workers 0 --eval-iters 0
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --log-interval {options.steps + 1} --residual-connection {method} --device {options.device}
        {options.flags}""".split()
    if size > 1:
        flags += ["--pipeline-model-parallel-size", str(size), "--pipeline-schedule", schedule]
        if schedule in VIRTUAL:
            flags += ["--num-virtual-stages-per-pipeline-rank", "2"]
    return flags


def measure(rank: int, flags: list[str], size: int, threads: int, store: str, results: Any) -> None:
    """One process of one run."""
    import torch
    import torch.distributed as dist

    from megatron_hc import train
    from megatron_hc.cli import parse
    from megatron_hc.data import build_loader
    from megatron_hc.log import peak_memory
    from megatron_hc.mesh import Mesh, mesh_of
    from megatron_hc.parallel.pipeline import declared_bytes

    sys.stdout = open(os.devnull, "w")  # the run's own log
    torch.set_num_threads(threads)
    config = parse(flags).config
    device = f"cuda:{rank}" if config.parallel.device == "cuda" else "cpu"
    if size > 1:
        if device != "cpu":
            torch.cuda.set_device(device)
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=size)
    mesh = mesh_of(rank, size, config, device) if size > 1 else Mesh(device=device)
    os.environ["TQDM_DISABLE"] = "1"
    run = train.set_up(parse(flags), mesh)
    run.logger.step = lambda **numbers: None  # type: ignore[method-assign,assignment]
    loader = build_loader(run.datasets[0], mesh, micro_batch_size=1)  # type: ignore[arg-type]
    times: list[float] = []
    cpu_started = 0.0
    for step in range(config.training.train_iters or 0):
        if step == 1:
            run.pipeline.bubble()  # the first step makes plans and buffers
            cpu_started = time.process_time()
        started = time.perf_counter()
        train.train_step(run, loader)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    cpu_seconds = (time.process_time() - cpu_started) / (len(times) - 1)
    bubble, ideal = run.pipeline.bubble()
    number = run.batches.num_micro_batches(0)
    results.put(
        Figures(
            rank,
            statistics.median(times[1:]),
            cpu_seconds,
            peak_memory(device),
            bubble,
            ideal,
            run.pipeline.sent_bytes // len(times),
            number * declared_bytes(run.pipeline),
        )
    )
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_one(flags: list[str], size: int, threads: int) -> list[Figures]:
    """All processes of one run, by rank."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin on a busy machine take ten times as long
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        arguments = (flags, size, threads, f"{folder}/store", results)
        processes = [context.Process(target=measure, args=(rank, *arguments), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        found: list[Figures] = []
        while len(found) < size:
            try:
                found.append(results.get(timeout=1))
            except queue.Empty:
                failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
                if failed:
                    raise RuntimeError(f"process {failed[0]} failed, its error is above") from None
        for process in processes:
            process.join()
    return sorted(found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    from megatron_hc.residual import RESIDUALS

    parser.add_argument("--methods", default=",".join(RESIDUALS))
    parser.add_argument("--schedules", default="1f1b")
    parser.add_argument("--size", type=int, default=2, help="processes of the pipeline")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="the first one is not measured (default: 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--flags", default="", help="more flags of a run, for both sides")
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error(f"--steps ({options.steps}) must be at least 2: the first one makes plans and buffers")
    print(
        "| method | schedule | one process, s | pipeline, s | ratio | CPU s: one; stages | bubble (ideal) "
        "| MiB: one; stages | KiB sent |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for method in options.methods.split(","):
        (whole,) = run_one(flags_of(options, method, 1, ""), 1, options.size)
        for schedule in options.schedules.split(","):
            stages = run_one(flags_of(options, method, options.size, schedule), options.size, 1)
            seconds = max(stage.seconds for stage in stages)
            sent, declared = sum(stage.sent for stage in stages), stages[0].declared
            assert sent == declared, f"{method}, {schedule}: {sent} bytes sent, {declared} by the boundaries"
            memory = ", ".join(f"{stage.memory / 2**20:.0f}" for stage in stages)
            cpu = ", ".join(f"{stage.cpu_seconds:.2f}" for stage in stages)
            print(
                f"| {method} | {schedule} | {whole.seconds:.3f} | {seconds:.3f} | {seconds / whole.seconds:.2f} "
                f"| {whole.cpu_seconds:.2f}; {cpu} | {stages[0].bubble:.3f} ({stages[0].ideal_bubble:.3f}) "
                f"| {whole.memory / 2**20:.0f}; {memory} | {sent / 2**10:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
