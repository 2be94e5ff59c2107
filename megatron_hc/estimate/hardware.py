"""Machines to estimate for. Figures are the vendors' data sheets; every one can be overridden."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU in nodes of several, and its networks."""

    name: str
    memory_gb: float
    """Of one GPU, in GB (10^9 bytes)."""
    peak_tflops: float
    """Dense bf16 matrix products of one GPU, TFLOP/s."""
    memory_tb_s: float
    """Memory bandwidth of one GPU, TB/s."""
    gpus_per_node: int = 8
    node_gb_s: float
    """What one GPU can send to the others of its node, GB/s in one direction."""
    network_gb_s: float
    """What one GPU can send to other nodes, GB/s in one direction."""
    matmul_efficiency: float = 0.65
    """Share of the peak that matrix products reach."""
    memory_efficiency: float = 0.85
    """Share of the bandwidth that element-wise work reaches."""
    boundary_efficiency: float = 0.7
    """Share of the bandwidth that fused boundaries of a residual path reach, by all that they move."""
    network_efficiency: float = 0.8
    """Share of a link's bandwidth that collectives reach."""
    reserved_gb: float = 4.0
    """Of each GPU's memory for CUDA, NCCL, cuBLAS and fragments."""

    def with_changes(self, **changes: float | int | None) -> Hardware:
        """The same with some figures given; raises ``ValueError`` for one that is not positive."""
        given = {name: value for name, value in changes.items() if value is not None}
        for name, value in given.items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "reserved_gb"):
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
            if name.endswith("efficiency") and value > 1:
                raise ValueError(f"--{name.replace('_', '-')} is a share of at most 1, not {value}")
        return dataclasses.replace(self, **given)  # type: ignore[arg-type]


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(name="a100", memory_gb=80, peak_tflops=312, memory_tb_s=2.0, node_gb_s=300, network_gb_s=25),
        Hardware(name="h100", memory_gb=80, peak_tflops=989, memory_tb_s=3.35, node_gb_s=450, network_gb_s=50),
        Hardware(name="h200", memory_gb=141, peak_tflops=989, memory_tb_s=4.8, node_gb_s=450, network_gb_s=50),
        Hardware(name="b200", memory_gb=180, peak_tflops=2250, memory_tb_s=8.0, node_gb_s=900, network_gb_s=50),
    )
}
