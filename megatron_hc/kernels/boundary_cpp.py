"""The large parts of a boundary in C++ for CPUs, built at first use; signatures and meaning as ``boundary_blocks``.

One shared library per source, torch and machine is kept in torch's folder of extensions ($TORCH_EXTENSIONS_DIR, or
~/.cache/torch_extensions). Only a C++ compiler with OpenMP is needed ($CXX, or c++).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hc.kernels.boundary_results import NORMS, Written
from megatron_hc.kernels.coefficients import Form

SOURCE = Path(__file__).with_name("boundary.cpp")
# Without -fopenmp at::parallel_for is a plain loop.
FLAGS = (
    *("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp"),
    *("-fno-math-errno", "-ffp-contract=fast"),
)


@functools.cache
def operations() -> Any:
    """``torch.ops.megatron_hc_cpp``. ``ValueError`` where it cannot be built."""
    torch.ops.load_library(str(build()))
    return torch.ops.megatron_hc_cpp


def build() -> Path:
    """The shared library, compiled unless it is there; processes that come at the same time do not disturb another."""
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        raise ValueError(
            f"--fused-residual-backend cpp needs a C++ compiler, and {compiler} is not found: install g++, set CXX, or "
            "use --fused-residual-backend torch"
        )
    # Imported here: it looks for compilers when it is imported.
    from torch.utils.cpp_extension import get_default_build_root, include_paths, library_paths

    cxx11_abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, *FLAGS, cxx11_abi, *(f"-I{path}" for path in include_paths())]
    linked = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    key = (SOURCE.read_bytes(), torch.__version__, " ".join(command), platform.node(), platform.machine())
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "megatron_hc"
    library = root / f"boundary_{digest}.so"
    if library.exists():
        return library
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        built = Path(folder) / library.name
        done = subprocess.run([*command, str(SOURCE), *linked, "-o", str(built)], capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(
                f"--fused-residual-backend cpp: {compiler} failed on {SOURCE}, which needs OpenMP "
                f"({done.stderr.strip()[-2000:]}): install or name another compiler with CXX, or use "
                "--fused-residual-backend torch"
            )
        built.replace(library)
    return library


def enter(
    form: Form,
    streams: Tensor,
    output: Tensor | None,
    write: Tensor | None,
    keep: Tensor | None,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return operations().enter(streams, output, write, keep, projection, form.is_centred)


def leave(
    form: Form, new: Tensor, read: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return operations().leave(new, read, weight, bias, NORMS[form.norm], form.norm_eps)


def leave_backward(
    form: Form, grad: Tensor, new: Tensor, read: Tensor, found: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return operations().leave_backward(grad, new, read, found, weight, NORMS[form.norm])


def enter_backward(form: Form, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return operations().enter_backward(*tensors, form.is_centred)


def folds(streams: Tensor, written: Sequence[Written]) -> list[Tensor]:
    found: list[Tensor] = []
    for one in written:
        found.append(operations().fold(found[-1] if found else streams, *one))
    return found


def fold_backward(
    grad: Tensor, streams: Tensor, output: Tensor, write: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return operations().fold_backward(grad, streams, output, write, keep)
