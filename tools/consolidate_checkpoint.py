"""A checkpoint as one safetensors file of whole tensors, and back.

::

    python tools/consolidate_checkpoint.py runs/a model.safetensors                   the weights of the latest
    python tools/consolidate_checkpoint.py runs/a all.safetensors --with-optimizer    everything
    python tools/consolidate_checkpoint.py --back all.safetensors runs/b              a folder to --load from

The file's metadata holds the run's progress and arguments as JSON, so nothing is lost on the way back; a checkpoint
made from weights alone is loaded with --finetune or --no-load-optim. All tensors must fit in memory at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_hc import checkpoint
from megatron_hc.checkpoint_folder import MANIFEST, all_or_nothing
from megatron_hc.checkpoint_save import open_to_readers
from megatron_hc.cli import exit_on_user_error
from megatron_hc.mesh import Mesh

STATE, ARGUMENTS = "megatron_hc_state", "megatron_hc_arguments"


def consolidate(source: str, target: Path, with_optimizer: bool) -> str:
    """Write the file; returns what was done. Raises ``ValueError`` for what is no checkpoint or cannot be written."""
    folder = Path(source) if (Path(source) / "state.json").exists() else checkpoint.find(source)
    if (target.parent / MANIFEST).exists():
        raise ValueError(f"{target} lies in a checkpoint, whose files must stay as they are: choose another place")
    shapes = checkpoint.load_tensor_shapes(folder)
    wanted = {name: spec for name, spec in shapes.items() if with_optimizer or name.startswith("model.")}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    checkpoint.load(folder, tensors, prefixes=())
    metadata = {
        "format": "pt",
        STATE: json.dumps(checkpoint.read_state(folder)),
        ARGUMENTS: (folder / "arguments.json").read_text(encoding="utf-8"),
    }
    partial = target.with_name(target.name + ".tmp")
    try:
        save_file(tensors, partial, metadata=metadata)
        open_to_readers(partial)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # a folder that is read-only
            partial.unlink()
        raise ValueError(f"{target} cannot be written ({error}): choose another place") from error
    return f"{len(tensors)} tensors of {folder} in {target}"


def back(source: Path, root: str) -> str:
    """Write a checkpoint of one process under ``root``, which may not hold any: one of that iteration would go."""
    if (latest := checkpoint.latest_iteration(root)) is not None:
        raise ValueError(f"{root} holds checkpoints already, the latest of iteration {latest}: choose another folder")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{source} cannot be read as a safetensors file ({error})") from error
    if STATE not in metadata or ARGUMENTS not in metadata:
        raise ValueError(f"{source} was not written by consolidate_checkpoint.py: it holds no progress and arguments")
    state, arguments = json.loads(metadata[STATE]), json.loads(metadata[ARGUMENTS])
    with all_or_nothing(Path(root), state["iteration"]):
        folder = checkpoint.save(root, state["iteration"], tensors, state, arguments, mesh=Mesh())
    return f"{len(tensors)} tensors of {source} in {folder}"


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="an iter_N folder or a folder of them; with --back the file")
    parser.add_argument("target", help="the file; with --back a folder of checkpoints")
    parser.add_argument("--with-optimizer", action="store_true", help="the optimizer's state too")
    parser.add_argument("--back", action="store_true", help="from the file to a checkpoint")
    options = parser.parse_args(argv)
    with exit_on_user_error("consolidate_checkpoint.py"):
        if options.back and options.with_optimizer:
            raise ValueError("--with-optimizer does not go with --back, which takes all that the file holds")
        if options.back:
            print(back(Path(options.source), options.target))
        else:
            print(consolidate(options.source, Path(options.target), options.with_optimizer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
