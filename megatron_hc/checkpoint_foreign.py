"""Folders with checkpoints of other programs, which a run neither goes on from nor writes among."""

from __future__ import annotations

import os
from pathlib import Path


def check_not_megatrons(root: str | Path) -> None:
    """Refuse a ``--save`` with checkpoints of Megatron-LM: its tracker has the same name and would name ours."""
    theirs = _megatron_checkpoint(Path(root))
    if theirs is not None:
        raise ValueError(f"--save {root} holds a checkpoint of Megatron-LM ({theirs}): choose another folder")


def foreign(root: Path) -> str | None:
    """What a folder without a whole checkpoint of ours holds of another program, and what to do with it."""
    theirs = _megatron_checkpoint(root)
    if theirs is not None and _is_torch_dist(theirs):
        return f"a checkpoint of Megatron-LM ({theirs}): convert it with tools/convert_checkpoint.py --from megatron"
    if theirs is not None:
        return (
            f"a checkpoint of Megatron-LM in its format torch ({theirs}): make it torch_dist there "
            "(--ckpt-convert-format torch_dist), then convert it with tools/convert_checkpoint.py --from megatron"
        )
    if os.path.isfile(root / "config.json") and any(root.glob("*.safetensors")):
        return "a model of Hugging Face: convert it with tools/convert_checkpoint.py --from hf"
    return None


def _megatron_checkpoint(root: Path) -> Path | None:
    """A folder of Megatron-LM's tensors: ``root`` itself, or one in it."""
    inner = sorted(root.glob("iter_*")) + [root / "release"] if os.path.isdir(root) else []
    return next((path for path in (root, *inner) if _is_torch_dist(path) or any(path.glob("mp_rank_*"))), None)


def _is_torch_dist(folder: Path) -> bool:
    return os.path.isfile(folder / ".metadata")  # False too where it may not be looked at
