"""Our checkpoint folders, read tensor by tensor; and new folders that appear when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.checkpoint_folder import MANIFEST, TRACKER, folder_name, remove
from megatron_hc.cli_options import dump, options
from megatron_hc.config import TrainConfig
from megatron_hc.convert.shards import Spec

FILE_BYTES = 1 << 28
"""Of one file of ours at most, if it is more than one tensor: twice as much is in memory while it is written."""

UNFINISHED = ".unfinished"
"""An empty file in a folder that a conversion is writing: without it a folder is not a conversion's to delete."""


class Folder:
    """A checkpoint of any layout; ``root``: an iter_N folder, or what --save wrote them to."""

    def __init__(self, root: str, step: int | None = None) -> None:
        path = Path(root)
        if (path / MANIFEST).exists() and step is not None and path.name != folder_name(step):
            raise ValueError(f"--ckpt-step {step} does not go with --load {root}, which is one checkpoint")
        self.path = path if (path / MANIFEST).exists() else checkpoint.find(root, step)
        self._reader = checkpoint.Reader(self.path)
        self.specs = {name: Spec(*found) for name, found in self._reader.shapes.items()}
        self.origins = checkpoint.read_origins(self.path)
        self.arguments = checkpoint.read_arguments(self.path)
        self.state = checkpoint.read_state(self.path)

    def read(self, name: str) -> Tensor:
        """A whole tensor. Files are closed at once: an open one holds in memory what was read of it."""
        with self._reader as reader:
            return reader.read(name)


def kept_arguments(source: Folder, config: TrainConfig) -> dict[str, Any]:
    """The arguments to write of a changed configuration; where they came from is as it was."""
    origins = {name: entry["origin"] for name, entry in source.origins.items()}
    return dump(config, {name: origins.get(name, "default") for name in options()})


def save_weights(
    save: str,
    iteration: int,
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    state: Mapping[str, Any],
    arguments: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a checkpoint of tensors that ``read`` makes in their turn; where that fails, nothing is left of it.

    Refuses a folder of checkpoints: one of the same iteration (perhaps the source) would be replaced, and the new one
    would be the latest, from which a run there goes on.
    """
    checkpoint.check_save_folder(save)
    if Path(save).is_dir() and (latest := checkpoint.latest_iteration(save)) is not None:
        raise ValueError(f"--save {save} holds checkpoints already, the latest of iteration {latest}: choose another")
    checkpoint.check_not_megatrons(save)
    return checkpoint.save_one_by_one(
        *(save, iteration, specs, read, state, arguments), file_bytes=min(FILE_BYTES, file_bytes)
    )


@contextmanager
def kept_if_right(folder: Path) -> Iterator[None]:
    """Look at a checkpoint that ``save_weights`` has just written; where that fails, nothing is left of it."""
    try:
        yield
    except BaseException:
        (folder.parent / TRACKER).unlink(missing_ok=True)
        remove(folder)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``path`` at the end, or goes where something fails."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--save {path} exists and is not an empty folder: choose another")
    partial = path.absolute().with_name(path.absolute().name + ".tmp")
    try:
        _clear_own(partial)
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
    except OSError as error:
        raise ValueError(f"--save {path} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield partial
        (partial / UNFINISHED).unlink()
        if path.exists():
            path.rmdir()
        os.replace(partial, path)
    except OSError as error:  # a disk that is full, a file that is gone
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"--save {path} could not be written ({error}): free space or choose another") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _clear_own(partial: Path) -> None:
    """Delete what a conversion that was killed left; ``ValueError`` for anything else of that name."""
    if not os.path.lexists(partial):
        return
    is_folder = partial.is_dir() and not partial.is_symlink()
    if not is_folder or (any(partial.iterdir()) and not (partial / UNFINISHED).exists()):
        raise ValueError(
            f"{partial} is in the way: a conversion writes there before it takes the name of --save, and this one was "
            "not left by a conversion: move it, or choose another --save"
        )
    shutil.rmtree(partial)
