"""One job at a time writes a --save folder: a lock file with host, job and time, which no crash leaves locked.

The kernel's record lock on the file ends with the process, so on the same machine a lock is either held or stale. From
another machine (record locks do not reach across every network file system) the lock counts as held while its time is
younger than ``STALE_S``, by the clock of the file system: the holder renews it every ``RENEW_S``. A job that Slurm or
torchrun has started again knows its own earlier attempt, and takes its lock over at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "lock.json"
RENEW_S = 15.0
STALE_S = 120.0
ENDING_S = 60.0


class SaveLock:
    """A context that holds the lock of a folder; refuses (ValueError) where another job does."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._handle: int | None = None
        self._text = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock of --save", daemon=True)

    def __enter__(self) -> SaveLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self._take()
        except OSError as error:
            raise ValueError(f"--save: {self.path} cannot be written: {error.strerror}") from error
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._handle is not None:
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self.path.unlink()
            os.close(self._handle)
            self._handle = None

    def _take(self) -> int:
        _wait_for_earlier_attempt(self.path)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                stale = _refuse_if_held(self.path, handle)
                if _is_still_at(self.path, handle):
                    if stale is not None:
                        logging.getLogger(__name__).warning("%s", stale)
                    self._text = json.dumps(_self_description()).encode()
                    _write(handle, self._text)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its last holder has just removed it

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self.path)

    def check(self) -> None:
        """Refuse to go on (ValueError) where another job has taken the lock over: it has begun from what is saved."""
        with contextlib.suppress(OSError):  # a file system that is away will say so itself
            if not self._is_ours():
                other = _who(_description(self.path.read_bytes()))
                raise ValueError(
                    f"--save {self.path.parent} is another job's, as this one gave no sign of life for "
                    f"{STALE_S:.0f} s: {other} has taken {NAME} over and goes on from the newest checkpoint; this job "
                    "ends here and saves nothing more"
                )

    def _is_ours(self) -> bool:
        """Whether no other job took the lock over, be it that this process was still for too long and another name was
        written into the file, or that the file was deleted by hand and made anew."""
        assert self._handle is not None
        if not self.path.exists():
            return True  # deleted, and nobody has come since
        # Not read by its path: closing a file ends the record lock that this process has on it.
        return _is_still_at(self.path, self._handle) and os.pread(self._handle, 65536, 0) == self._text


def check_lock(folder: str | Path) -> None:
    """Refuse a folder that another job is writing to; writes nothing."""
    path = Path(folder) / NAME
    _wait_for_earlier_attempt(path)
    with _opened(path) as handle:
        if handle is not None:
            _refuse_if_held(path, handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A handle of a lock file; None where it is not there, or where taking it will say why it cannot be opened."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _wait_for_earlier_attempt(path: Path) -> None:
    """A scheduler may start a job again a moment before the last process of its earlier attempt has ended."""
    deadline = time.monotonic() + ENDING_S
    while time.monotonic() < deadline:
        with _opened(path) as handle:
            if handle is None or not _is_earlier_attempt(_description(os.pread(handle, 65536, 0))):
                return
            if not _is_held(handle):
                return


def _refuse_if_held(path: Path, handle: int) -> str | None:
    """What to say of a stale lock that is taken over; None where there was none."""
    content = os.pread(handle, 65536, 0)
    held = _description(content)
    age = _age(path)
    is_held = _is_held(handle)
    if is_held:
        raise ValueError(_refusal(path, held, age))
    if not content:
        return None  # made by us just now, or by a job that ended before it could write
    if held and held.get("boot") == _boot() and (is_held is not None or _has_ended(held)):
        why = "its process has ended"
    elif _is_earlier_attempt(held):
        why = "it is of an earlier attempt of this job"
    elif age is None or age <= STALE_S:
        raise ValueError(_refusal(path, held, age))
    else:
        why = f"its last sign of life is {age:.0f} s old"
    return f"{path} is stale ({why}): taking it over from {_who(held)}"


def _is_held(handle: int, patience_s: float = 1.0) -> bool | None:
    """Whether another process has the record lock; else this one has it now. A look like this one passes quickly.

    None: this file system has no record locks (Lustre often has none), and the lock's time decides.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            if time.monotonic() > deadline:
                return True
        except OSError:
            return None
        time.sleep(0.1)


def _has_ended(held: Mapping[str, Any]) -> bool:
    """Whether the process of a lock of this machine is gone; one of another container cannot be seen from here."""
    pid = held.get("pid")
    if type(pid) is not int or pid <= 0 or held.get("pids") != _pids():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _refusal(path: Path, held: Mapping[str, Any], age: float | None) -> str:
    sign = "" if age is None else f", last sign of life {max(age, 0):.0f} s ago"  # never -0
    if age is not None and age < -1:
        sign = f", and its time lies {-age:.0f} s ahead"
    return (
        f"--save {path.parent} is being written by {_who(held)}{sign}: wait until that job ends, choose another "
        f"folder, or delete {path} if you know that the job is gone"
    )


def _who(held: Mapping[str, Any]) -> str:
    if not held:
        return "a job whose lock cannot be read"
    job = f"job {held.get('job')}, " if held.get("job") else ""
    return f"{job}process {held.get('pid')} on {held.get('host')}, started {held.get('time')}"


def _age(path: Path) -> float | None:
    """Seconds since the lock was renewed, by the file system's own clock where a file can be made beside it."""
    try:
        renewed = path.stat().st_mtime
    except OSError:
        return None
    probe = path.with_name(f".{NAME}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    return now - renewed


def _is_still_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _write(handle: int, text: bytes) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    os.fsync(handle)


def _description(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # UnicodeDecodeError too
        return {}
    return found if isinstance(found, dict) else {}


def _self_description() -> dict[str, Any]:
    job, attempt = job_and_attempt()
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pids": _pids(),
        "pid": os.getpid(),
        "job": job,
        "attempt": attempt,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def job_and_attempt() -> tuple[str | None, list[int]]:
    """(what Slurm or torchrun calls this job, how often they have started it again)."""
    slurm, elastic = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    restarts = [_count("SLURM_RESTART_COUNT"), _count("TORCHELASTIC_RESTART_COUNT")]
    if slurm:
        return f"{slurm} of Slurm", restarts
    return (f"{elastic} of torchrun" if elastic and elastic != "none" else None), restarts


def _count(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _is_earlier_attempt(held: Mapping[str, Any]) -> bool:
    job, attempt = job_and_attempt()
    theirs = held.get("attempt")
    is_list = isinstance(theirs, list) and all(isinstance(count, int) for count in theirs)
    return job is not None and held.get("job") == job and is_list and theirs < attempt  # type: ignore[operator]


def _boot() -> str:
    """What two processes of one running kernel have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return socket.gethostname()


def _pids() -> str | None:
    """What processes that see each other have in common: their namespace of process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
