"""What the flags of ``config/backends.py`` need of a machine, before anything is built."""

from __future__ import annotations

import torch

from megatron_hc.config import TrainConfig
from megatron_hc.config.backends import BackendConfig
from megatron_hc.config.common import require
from megatron_hc.optim import adam_update
from megatron_hc.packages import load

CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The least compute capability of the GPU, by --fp8-recipe (transformer-engine's ``quantization.py``, 2.20)."""


def check_backends(config: TrainConfig, device: torch.device) -> None:
    """Refuse, in one sentence, a back end that is not installed or that this device cannot run."""
    options = config.backends
    for flag in gpu_flags(options):
        require(is_gpu(device), f"{flag} needs an NVIDIA GPU (--device cuda), and this run is on {device.type}")
    if options.fp8_format is not None and is_gpu(device):
        check_fp8_device(options, device)
    if options.uses_transformer_engine:
        load("transformer-engine", "--transformer-impl transformer_engine", "transformer_engine.pytorch")
    if options.norm_impl == "transformer_engine":
        load("transformer-engine", "--norm-impl transformer_engine", "transformer_engine.pytorch")
    if options.norm_impl == "apex":
        load("apex", "--norm-impl apex", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
    if options.fp8_format is not None and options.fp8_backend == "torchao":
        load("torchao", "--fp8-backend torchao", "torchao.float8")
    adam_update(options.optimizer_impl, torch.device("cpu" if config.parallel.optimizer_cpu_offload else device))


def gpu_flags(options: BackendConfig) -> list[str]:
    """The flags that were given and have kernels for GPUs only."""
    given = {
        "--transformer-impl transformer_engine": options.uses_transformer_engine,
        f"--norm-impl {options.norm_impl}": options.norm_impl != "torch",
        f"--optimizer-impl {options.optimizer_impl}": options.optimizer_impl in ("apex", "transformer_engine"),
        "--gradient-accumulation-fusion": options.gradient_accumulation_fusion,
    }
    return [flag for flag, is_given in given.items() if is_given]


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def check_fp8_device(options: BackendConfig, device: torch.device) -> None:
    """Refuse a recipe that this GPU or CUDA does not have."""
    found, needed = torch.cuda.get_device_capability(device), CAPABILITIES[options.fp8_recipe]
    name = torch.cuda.get_device_name(device)
    require(
        found >= needed,
        f"--fp8-recipe {options.fp8_recipe} needs a GPU of compute capability {needed[0]}.{needed[1]}, and {name} has "
        f"{found[0]}.{found[1]}: use {_other_recipe(options, found)}",
    )
    require(
        options.fp8_recipe != "mxfp8" or found < (12, 0) or options.fp8_backend == "torchao",
        f"transformer-engine has no --fp8-recipe mxfp8 for compute capability {found[0]}.{found[1]} ({name}): use "
        "--fp8-recipe tensorwise",
    )
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    require(
        options.fp8_recipe != "blockwise" or cuda >= (12, 9),
        f"--fp8-recipe blockwise needs CUDA 12.9, and this torch has {torch.version.cuda}: use --fp8-recipe tensorwise",
    )


def _other_recipe(options: BackendConfig, capability: tuple[int, int]) -> str:
    fits = [name for name, least in CAPABILITIES.items() if capability >= least]
    return "--fp8-recipe tensorwise" if "tensorwise" in fits else "--bf16 without --fp8-format"
