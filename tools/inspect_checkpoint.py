"""What is in a checkpoint, or what is different between two.

::

    python tools/inspect_checkpoint.py runs/a                       the latest checkpoint: tensors, progress, arguments
    python tools/inspect_checkpoint.py runs/a/iter_0000100 --no-arguments --filter 'model.layers.0.*'
    python tools/inspect_checkpoint.py runs/a --diff runs/b         exit code 1 where they are different

The layout that saved a checkpoint makes no difference. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.cli import exit_on_user_error


def folder_of(path: str) -> Path:
    """A checkpoint's own folder, or the latest in a folder of checkpoints."""
    folder = Path(path)
    return folder if (folder / "state.json").exists() else checkpoint.find(folder)


def tensor_of(folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    whole = torch.empty(shape, dtype=dtype)
    checkpoint.load(folder, {name: whole}, prefixes=())
    return whole


def norm_of(tensor: Tensor) -> float:
    """Euclidean, computed in float64."""
    return float(torch.linalg.vector_norm(tensor.double())) if tensor.numel() else 0.0


def kind_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(folder: Path, pattern: str, with_norms: bool) -> Iterator[str]:
    """A line per tensor, and sums per first part of the names."""
    shapes = checkpoint.load_tensor_shapes(folder)
    names = fnmatch.filter(sorted(shapes), pattern)
    width = max((len(name) for name in names), default=0)
    sums: dict[str, tuple[int, int]] = {}
    for name in names:
        shape, dtype = shapes[name]
        norm = f"  norm {norm_of(tensor_of(folder, name, shape, dtype)):.6e}" if with_norms else ""
        yield f"{name:{width}}  {kind_of(dtype):8}  {str(list(shape)):16}{norm}"
        part = name.split(".")[0]
        count, size = sums.get(part, (0, 0))
        sums[part] = count + math.prod(shape), size + math.prod(shape) * dtype.itemsize
    for part, (count, size) in sums.items():
        yield f"{part}: {count:,} numbers, {size / 2**20:,.1f} MiB"


def differences(one: Path, other: Path, pattern: str) -> Iterator[str]:
    """A line per difference: names, shapes, dtypes, numbers, progress, arguments."""
    ours, theirs = checkpoint.load_tensor_shapes(one), checkpoint.load_tensor_shapes(other)
    for name in fnmatch.filter(sorted(ours.keys() | theirs.keys()), pattern):
        if name not in ours or name not in theirs:
            yield f"{name}: only in {one if name in ours else other}"
        elif ours[name][0] != theirs[name][0]:
            yield f"{name}: {list(ours[name][0])} and {list(theirs[name][0])}"
        else:
            a, b = tensor_of(one, name, *ours[name]), tensor_of(other, name, *theirs[name])
            yield from (f"{name}: {what}" for what in tensor_differences(a, b))
    states = checkpoint.read_state(one), checkpoint.read_state(other)
    for key in ("iteration", "consumed_samples"):
        if states[0].get(key) != states[1].get(key):
            yield f"{key}: {states[0].get(key)} and {states[1].get(key)}"
    arguments = checkpoint.read_arguments(one), checkpoint.read_arguments(other)
    for key in sorted(arguments[0].keys() | arguments[1].keys()):
        values = [values.get(key, "(none)") for values in arguments]
        if values[0] != values[1]:
            yield f"argument {key}: {values[0]} and {values[1]}"


def tensor_differences(a: Tensor, b: Tensor) -> Iterator[str]:
    if a.dtype != b.dtype:
        yield f"{kind_of(a.dtype)} and {kind_of(b.dtype)}"
        a, b = a.double(), b.double()  # torch does not compare every pair of dtypes
    both_nan = a.isnan() & b.isnan() if a.is_floating_point() and b.is_floating_point() else torch.zeros(())
    count = int(((a != b) & ~both_nan.bool()).sum())
    if count:
        gap = (a.double() - b.double()).abs()
        size = norm_of(a) or norm_of(b)
        yield (
            f"{count:,} of {a.numel():,} numbers differ, by at most {float(gap.max()):.3e}; "
            f"norm of the difference {norm_of(gap) / size if size else math.nan:.3e} of the whole"
        )


def _require_match(pattern: str, *folders: Path) -> None:
    names = {name for folder in folders for name in checkpoint.load_tensor_shapes(folder)}
    if not fnmatch.filter(names, pattern):
        raise ValueError(f"--filter {pattern!r} matches none of the {len(names)} tensors of {folders[0]}")


def main(argv: list[str]) -> int:
    """Exit codes: 0, 1 for checkpoints that differ, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="an iter_N folder, or a folder of them: the latest")
    parser.add_argument("--diff", metavar="OTHER", help="list the differences from another checkpoint")
    parser.add_argument("--filter", default="*", metavar="PATTERN", help="tensors to look at, as a shell pattern")
    parser.add_argument("--no-norms", action="store_true", help="read no tensor, only the index")
    parser.add_argument("--no-arguments", action="store_true", help="leave out the arguments of the run")
    options = parser.parse_args(argv)
    with exit_on_user_error("inspect_checkpoint.py"):
        folder = folder_of(options.checkpoint)
        if options.diff is not None:
            idle = [f"--{name.replace('_', '-')}" for name in ("no_norms", "no_arguments") if getattr(options, name)]
            if idle:
                raise ValueError(f"{' and '.join(idle)} would do nothing with --diff: leave it out")
            other = folder_of(options.diff)
            _require_match(options.filter, folder, other)
            found = list(differences(folder, other, options.filter))
            print("\n".join(found) or f"{folder} and {other} hold the same")
            return int(bool(found))
        _require_match(options.filter, folder)
        state = checkpoint.read_state(folder)
        print(f"{folder}: iteration {state.get('iteration')}, {state.get('consumed_samples')} samples consumed")
        for line in describe(folder, options.filter, not options.no_norms):
            print(line)
        if not options.no_arguments:
            for name, value in sorted(checkpoint.read_arguments(folder).items()):
                print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
