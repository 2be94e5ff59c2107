"""--log-straggler: which rank of each pipeline stage works longest."""

from __future__ import annotations

import socket

import torch

from megatron_hc.mesh import Mesh
from megatron_hc.parallel.collectives import all_gather


def straggler_report(work_seconds: float, steps: int, mesh: Mesh) -> str:
    """One line: the slowest rank of each stage over the last ``steps`` iterations.

    ``work_seconds``: time this rank has spent in its forward and backward passes, without waiting for other stages and
    for data-parallel reductions. Ranks of a tensor-parallel or expert-parallel group wait for each other within the
    passes and show the same time: a slow one shows as its group. All ranks call together.
    """
    seconds = torch.tensor([work_seconds / max(steps, 1)], dtype=torch.float64, device=mesh.device)
    everyone = all_gather(seconds, mesh.group("world")).tolist()
    parts = []
    per_stage = mesh.world_size // mesh.size("pp")
    for stage in range(mesh.size("pp")):
        first = stage * per_stage
        times = everyone[first : first + per_stage]
        slowest = max(range(per_stage), key=lambda rank: times[rank])
        median = sorted(times)[(per_stage - 1) // 2]
        over = times[slowest] / median - 1 if median > 0 else 0.0
        parts.append(
            f"stage {stage}: rank {first + slowest} {times[slowest] * 1000:.1f} ms ({over:+.0%} over the median)"
        )
    return f"slowest rank over {steps} iterations | {' | '.join(parts)}"


def ranks_by_host(mesh: Mesh) -> str:
    """Which host has which ranks, one line. All ranks call together."""
    names: list[str] = [""] * mesh.world_size
    if mesh.world_size == 1:
        names = [socket.gethostname()]
    else:
        torch.distributed.all_gather_object(names, socket.gethostname(), group=mesh.group("world"))
    hosts: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        hosts.setdefault(name, []).append(rank)
    return "ranks by host: " + ", ".join(f"{name} {_spans(ranks)}" for name, ranks in hosts.items())


def _spans(ranks: list[int]) -> str:
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
