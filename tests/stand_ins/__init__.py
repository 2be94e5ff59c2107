"""Stand-ins for transformer-engine and apex, which need a GPU: the documented signatures, the maths in plain torch.

With them in ``sys.modules`` a CPU runs all of our wiring: which module is made with which arguments, whose parameters
it gets, who communicates, what is in FP8, what a checkpoint holds. They say nothing of the packages' kernels.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron_hc.backends import check
from megatron_hc.config import BackendConfig
from stand_ins import apex, transformer_engine

TRANSFORMER_ENGINE: dict[str, dict[str, Any]] = {
    "transformer_engine": {},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": transformer_engine.RECIPES,
    "transformer_engine.pytorch": transformer_engine.MODULES,
    "transformer_engine.pytorch.optimizers": apex.ADAM,
}
APEX: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex.multi_tensor_apply": {"multi_tensor_applier": apex.ADAM["multi_tensor_applier"]},
    "apex.normalization": {},
    "apex.normalization.fused_layer_norm": apex.NORMS,
    "fused_layer_norm_cuda": {},
    "amp_C": {"multi_tensor_adam": apex.ADAM["multi_tensor_adam"]},
    "fused_weight_gradient_mlp_cuda": {"wgrad_gemm_accum_fp32": apex.wgrad_gemm_accum_fp32},
}


def module(name: str, contents: dict[str, Any]) -> ModuleType:
    found = ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    found.__path__ = []
    found.__dict__.update(contents)
    return found


@contextlib.contextmanager
def installed(*, in_float64: bool = False) -> Iterator[None]:
    """Both packages are there, and a CPU passes for a GPU; ``in_float64``: flags pass that have no float64."""
    made = {name: module(name, contents) for name, contents in (TRANSFORMER_ENGINE | APEX).items()}
    before = {name: sys.modules.get(name) for name in made}
    checks = {name: getattr(check, name) for name in ("is_gpu", "check_fp8_device")}
    validate = BackendConfig.validate
    transformer_engine.reset()
    sys.modules.update(made)
    check.is_gpu, check.check_fp8_device = lambda device: True, lambda options, device: None
    if in_float64:
        BackendConfig.validate = lambda *arguments: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        BackendConfig.validate = validate  # type: ignore[method-assign]
        for name, function in checks.items():
            setattr(check, name, function)
        for name, found in before.items():
            if found is None:
                sys.modules.pop(name)
            else:
                sys.modules[name] = found
