"""The folders of checkpoints on the disk: which are whole, which is the latest, how a new one takes its place.

See `megatron_hc.checkpoint` for what is in them. A save writes ``iter_N.tmp`` and renames it; a folder of the same
iteration waits as ``iter_N.old`` meanwhile; a folder is renamed to ``iter_N.trash`` before it is deleted. So a kill
leaves no half checkpoint under a name that a load looks at, and the next save clears the rest away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hc.checkpoint_foreign import foreign
from megatron_hc.folders import check_folder


class FileRecord(NamedTuple):
    """What the manifest says of a file."""

    size: int
    """Bytes."""
    crc32: int


MANIFEST = "checkpoint.json"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = 1


def check_save_folder(root: str | Path) -> None:
    """Refuse, before a run starts, a ``--save`` folder that can be neither written nor made, or is a checkpoint."""
    check_folder("--save", root)
    if (Path(root) / MANIFEST).exists():
        raise ValueError(f"--save {root} is a checkpoint: name the folder it lies in, {Path(root).parent}, or another")


def prepare(root: Path, partial: Path, needed: int) -> None:
    """Make the empty folder to write in; clear away what killed saves left."""
    check_save_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(root.iterdir()):
        if re.fullmatch(r"iter_\d{7,}(\.tmp|(\.\d+)?\.trash)", leftover.name):
            discard(leftover)
        elif re.fullmatch(r"iter_\d{7,}\.old", leftover.name):  # killed between the two renames of publish, or after
            final = leftover.with_suffix("")
            if problem(final) is not None and problem(leftover) is None:
                remove(final)
                leftover.rename(final)
            else:
                remove(leftover)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(
            f"--save {root} has {free / 1e9:.3f} GB free and a checkpoint needs {needed / 1e9:.3f} GB: "
            "free space or choose another folder"
        )
    partial.mkdir()


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name; one that had the name stays loadable (as ``.old``) until it is replaced."""
    reason = problem(partial)
    if reason is not None:
        raise ValueError(f"the save failed ({reason}): --save must be one folder that all ranks share")
    flush(partial)
    if (final / MANIFEST).exists():
        final.rename(beside(final, ".old"))
    elif final.exists():  # not ours: keep it
        final.rename(beside(final, f".foreign-{time.time_ns()}"))
    partial.rename(final)
    flush(final.parent)


@contextlib.contextmanager
def all_or_nothing(root: Path, iteration: int) -> Iterator[None]:
    """For one process that writes a checkpoint: where that fails nothing is left of it, nor of a ``root`` made for it.

    What was in ``root`` before stays.
    """
    final, is_new = root / folder_name(iteration), not root.exists()
    try:
        yield
    except BaseException:
        shutil.rmtree(beside(final, ".tmp"), ignore_errors=True)
        if is_new:
            shutil.rmtree(final, ignore_errors=True)
            with contextlib.suppress(OSError):
                (root / (TRACKER + ".tmp")).unlink(missing_ok=True)
                root.rmdir()
        raise


def write_tracker(root: Path, iteration: int) -> None:
    """Make an iteration the latest."""
    partial = root / (TRACKER + ".tmp")
    write_text(partial, str(iteration))
    os.replace(partial, root / TRACKER)
    flush(root)


def retain(root: Path, newest: int, interval: int) -> None:
    """Delete the checkpoints before ``newest`` whose iteration ``interval`` does not divide."""
    for iteration in _iterations(root):
        folder = root / folder_name(iteration)
        if iteration < newest and iteration % interval != 0 and (folder / MANIFEST).exists():
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a folder so that no kill leaves half of it under a name that is looked at."""
    if folder.exists():
        trash = folder.with_suffix(".trash")
        discard(trash)
        if trash.exists():  # it stays: see discard
            trash = folder.with_suffix(f".{time.time_ns()}.trash")
        try:
            folder.rename(trash)
        except OSError as error:
            _say_it_stays(folder, error)
        else:
            discard(trash)


def discard(path: Path) -> None:
    """Delete what no load looks at, of a link the link alone.

    What cannot be deleted yet (a process still reads it on a network file system, say) is said and stays for the next
    save to try: no checkpoint is worth less for it.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():  # else removed meanwhile, as a .trash with its .old
            shutil.rmtree(path)
    except OSError as error:
        _say_it_stays(path, error)


def _say_it_stays(path: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning("%s cannot be deleted (%s)", path, error.strerror or error)


def write_text(path: Path, text: str) -> FileRecord:
    """Write a line and wait until it is on the disk; returns the file's size and checksum."""
    try:
        with path.open("w", encoding="utf-8") as file:
            size = file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # of a write it names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    assert size == path.stat().st_size, "json.dumps and digits are ASCII"
    return FileRecord(size, zlib.crc32((text + "\n").encode()))


def manifest_text(manifest: dict[str, Any]) -> str:
    """The content of ``checkpoint.json``: with a checksum of itself."""
    return json.dumps(manifest | {"self": zlib.crc32(json.dumps(manifest).encode())})


def checksum(path: Path) -> int:
    """The CRC-32 of a file's bytes: found to be the quickest of the standard library's, and accidents are all there
    is to find."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 17):
            found = zlib.crc32(chunk, found)
    return found


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_iteration(root: str | Path) -> int | None:
    """The iteration to resume: the tracker's, or (with a warning) the newest whole checkpoint; None without any."""
    root = Path(root)
    text = _tracked(root)
    if text is not None and re.fullmatch(r"[0-9]{1,18}", text) and _whole(root, int(text)) is not None:
        return int(text)
    for iteration in sorted(_iterations(root), reverse=True):
        if _whole(root, iteration) is not None:
            why = "is missing" if text is None else f"names {text[:20]!r}, which is no whole checkpoint"
            logging.getLogger(__name__).warning("%s %s; using iteration %d", root / TRACKER, why, iteration)
            return iteration
    return None


def find(root: str | Path, step: int | None = None) -> Path:
    """The folder of the latest checkpoint under ``--load``, or that of ``--ckpt-step``; ValueError if there is none."""
    root = Path(root)
    try:
        os.scandir(root).close()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--load {root} is not a folder: name the folder that --save wrote to") from None
    except OSError as error:
        raise ValueError(f"--load {root} cannot be read: {error.strerror}") from error
    chosen = latest_iteration(root) if step is None else step
    folder = None if chosen is None else _whole(root, chosen)
    if folder is not None:
        return folder
    if (root / MANIFEST).exists():
        raise ValueError(f"--load {root} is one checkpoint: name the folder that it is in, and its --ckpt-step")
    if (theirs := foreign(root)) is not None:
        raise ValueError(f"--load {root} holds {theirs}")
    found = sorted(_iterations(root))
    asked = found[-1:] if step is None else [step]
    if asked and asked[0] in found:
        why = problem(root / folder_name(asked[0]))
        raise ValueError(
            f"--load {root} holds no whole checkpoint of iteration {asked[0]}: {why}: bring it back, or name another "
            "folder"
        )
    if step is None:
        tracked = _tracked(root)
        raise ValueError(
            f"--load {root} holds no checkpoint: name the folder that --save wrote to"
            if tracked is None
            else f"--load {root} holds no checkpoint, though {TRACKER} names {tracked[:20]!r}: bring its folder back, "
            "or delete that file to begin anew"
        )
    whole = ", ".join(str(iteration) for iteration in found if _whole(root, iteration) is not None)
    raise ValueError(f"--ckpt-step {step} is not in {root}, which holds the iterations: {whole or 'none'}")


def find_if_any(root: str | Path) -> Path | None:
    """``find`` of the latest; None where no run has saved anything yet.

    ValueError where something was saved, by whichever program, and nothing of it is whole and ours: a run that began
    anew there would take its place.
    """
    root = Path(root)
    try:
        root.lstat()
        names = os.listdir(root) if root.is_dir() else None
    except FileNotFoundError:
        return None
    except OSError:
        names = None
    has_ours = names is None or MANIFEST in names or _iterations(root) or _tracked(root) is not None
    if not has_ours and foreign(root) is None:
        return None
    return find(root)  # or what is wrong


def _tracked(root: Path) -> str | None:
    """What the tracker says; None where it cannot be read."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def iterations_before(root: str | Path, folder: Path) -> list[Path]:
    """The whole checkpoints older than one of them, newest first."""
    root, last = Path(root), int(folder.name.split("_")[1].split(".")[0])
    older = (_whole(root, iteration) for iteration in sorted(_iterations(root), reverse=True) if iteration < last)
    return [whole for whole in older if whole is not None]


def problem(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint; None if it is. Compares sizes, and checksums of JSON; reads no tensor."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, size in manifest["files"].items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{file} has {found} bytes instead of {size}"
            if file.suffix == ".json" and is_changed(folder, name, manifest):
                return f"{file} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


def is_changed(folder: Path, name: str, manifest: dict[str, Any]) -> bool:
    """Whether a file's checksum differs from the manifest's; one of an older version has none."""
    expected = manifest.get("crc32", {}).get(name)
    return expected is not None and checksum(folder / name) != expected


def read_manifest(folder: Path) -> dict[str, Any]:
    """The ``checkpoint.json`` of a folder; ValueError if there is none that makes sense."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"{folder / MANIFEST} has format {manifest['format']}, this program reads format {FORMAT}")
        own = manifest.pop("self", None)
        if own is not None and own != zlib.crc32(json.dumps(manifest).encode()):
            raise TypeError
        _check_manifest(manifest)
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder / MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / MANIFEST} is not the index of a checkpoint") from None


def _check_manifest(manifest: dict[str, Any]) -> None:
    """TypeError for what no save writes: a file of another folder, a slice that does not lie in its tensor."""
    files, sums = manifest["files"], manifest.get("crc32", {})
    _must(isinstance(files, dict) and isinstance(sums, dict) and isinstance(manifest["tensors"], dict))
    _must(all(name == Path(name).name and name not in ("", ".", "..") for name in files))
    _must(_are_counts(list(files.values())) and _are_counts(list(sums.values())))
    for entry in manifest["tensors"].values():
        _must(isinstance(entry, dict) and isinstance(entry["dtype"], str) and _are_counts(entry["shape"]))
        _must(isinstance(entry["chunks"], list))
        for chunk in entry["chunks"]:
            _must(isinstance(chunk, list) and len(chunk) == 3)
            file, offset, shape = chunk
            _must(isinstance(file, str) and file in files and _are_counts(offset) and _are_counts(shape))
            _must(len(offset) == len(shape) == len(entry["shape"]))
            ends = (first + size for first, size in zip(offset, shape, strict=True))
            _must(all(end <= whole for end, whole in zip(ends, entry["shape"], strict=True)))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _must(condition: bool) -> None:
    if not condition:
        raise TypeError


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _iterations(root: Path) -> set[int]:
    """Iterations with a folder, whole or not."""
    try:
        names = os.listdir(root)
    except OSError:
        names = []
    return {int(match[1]) for name in names if (match := re.fullmatch(r"iter_(\d{7,})(\.old)?", name))}


def _whole(root: Path, iteration: int) -> Path | None:
    """The whole checkpoint of an iteration; the ``.old`` one if a kill came between the two renames of publish."""
    final = root / folder_name(iteration)
    return next((folder for folder in (final, beside(final, ".old")) if problem(folder) is None), None)
