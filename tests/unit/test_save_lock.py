"""The lock of a --save folder: held by one living job, and by no dead one."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hc import save_lock
from megatron_hc.save_lock import NAME, STALE_S, SaveLock, check_lock


def hold(folder: str, ready: Any) -> None:
    with SaveLock(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of ``tmp_path``."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def written(folder: Path, age_s: float = 0.0, **changes: object) -> Path:
    """The lock that a job of another machine left."""
    content = {"host": "n7", "boot": "of another machine", "pid": 12, "job": None, "attempt": [0, 0], "time": "then"}
    path = folder / NAME
    path.write_text(json.dumps(content | changes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_the_second_job_is_refused_and_told_who_writes(holder: Any, tmp_path: Path) -> None:
    sentence = (
        rf"--save {tmp_path} is being written by process {holder.pid} on \S+, started \d{{4}}-.*, last sign of life"
    )
    for attempt in (lambda: SaveLock(tmp_path).__enter__(), lambda: check_lock(tmp_path)):
        with pytest.raises(ValueError, match=sentence):
            attempt()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid, "its lock is untouched"


def test_a_killed_job_leaves_a_lock_that_is_taken_over_at_once(
    holder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    check_lock(tmp_path)
    with SaveLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert caplog.text.count("is stale (its process has ended)") == 1
    assert list(tmp_path.iterdir()) == [], "an orderly end leaves nothing"


def test_without_record_locks_a_living_process_still_holds_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Lustre mounted without them: where the process cannot be seen, the lock's time decides."""

    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", missing)
    with SaveLock(tmp_path) as lock:
        for attempt in (lambda: SaveLock(tmp_path).__enter__(), lambda: check_lock(tmp_path)):
            with pytest.raises(ValueError, match=f"written by process {os.getpid()} on "):
                attempt()
        held = json.loads(lock.path.read_text())
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    written(tmp_path, **(held | {"pid": ended.pid, "pids": "of another container"}))
    with pytest.raises(ValueError, match=f"written by process {ended.pid} on "):
        check_lock(tmp_path)
    written(tmp_path, **(held | {"pid": ended.pid}))
    with SaveLock(tmp_path):
        assert "is stale (its process has ended)" in caplog.text
    written(tmp_path, STALE_S + 5, **held)
    check_lock(tmp_path)


@pytest.mark.parametrize("age_s", [0.0, STALE_S / 2, -3600.0])
def test_a_young_lock_of_another_machine_counts_as_held(tmp_path: Path, age_s: float) -> None:
    path = written(tmp_path, age_s)
    with pytest.raises(ValueError, match="written by process 12 on n7, started then, (last|and its time lies 3[56]00)"):
        SaveLock(tmp_path).__enter__()
    assert json.loads(path.read_text())["host"] == "n7"


def test_the_clock_of_the_file_system_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's is an hour ahead."""
    written(tmp_path)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    with pytest.raises(ValueError, match="last sign of life [0-9] s ago"):
        check_lock(tmp_path)


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a file that has no name any more would keep nobody away."""
    looked = []

    def removed_first(path: Path, handle: int) -> None:
        looked.append(path)
        if len(looked) == 1:
            path.unlink()

    monkeypatch.setattr(save_lock, "_refuse_if_held", removed_first)
    with SaveLock(tmp_path) as lock:
        assert len(looked) == 2 and json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        lock.check()


def test_an_old_lock_of_another_machine_is_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, STALE_S + 5)
    with SaveLock(tmp_path):
        pass
    assert "its last sign of life is 12" in caplog.text and "from process 12 on n7" in caplog.text


@pytest.mark.parametrize("is_deleted", [False, True])  # by hand, as the refusal of the other job suggests
def test_a_lock_that_another_job_has_taken_over_is_left_to_it(
    is_deleted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for minutes, or whose disk was, neither renews nor removes it once it goes on."""
    monkeypatch.setattr(save_lock, "RENEW_S", 0.01)
    with SaveLock(tmp_path) as lock:
        lock.check()
        if is_deleted:
            (tmp_path / NAME).unlink()
            lock.check()
        path = written(tmp_path, age_s=50.0)
        old = path.stat().st_mtime
        time.sleep(0.1)
        assert path.stat().st_mtime == old
        with pytest.raises(ValueError, match="process 12 on n7, started .* has taken lock.json over"):
            lock.check()
    assert json.loads(path.read_text())["host"] == "n7"


@pytest.mark.parametrize(
    "variables, held, is_taken",
    [
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}, {"job": "5 of Slurm", "attempt": [1, 0]}, True),
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}, {"job": "5 of Slurm", "attempt": [2, 0]}, False),
        ({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}, {"job": "6 of Slurm", "attempt": [1, 0]}, False),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, {"job": "a of torchrun"}, True),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, {"job": "none of torchrun"}, False),
    ],
)
def test_a_job_started_again_knows_its_earlier_attempt(
    variables: dict[str, str], held: dict[str, object], is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    written(tmp_path, **held)
    if is_taken:
        started = time.monotonic()
        with SaveLock(tmp_path):
            assert time.monotonic() - started < save_lock.ENDING_S / 2, "it waited for a process that has ended"
    else:
        with pytest.raises(ValueError, match="being written by job "):
            SaveLock(tmp_path).__enter__()


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b"\xff\xfe", b'{"host": 3, "attempt": "x"}'])
def test_a_lock_that_cannot_be_read_is_held_while_it_is_young(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    if content:
        with pytest.raises(ValueError, match="is being written by"):
            SaveLock(tmp_path).__enter__()
        os.utime(path, (time.time() - STALE_S - 5,) * 2)
    with SaveLock(tmp_path):
        pass


def test_the_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_lock, "RENEW_S", 0.02)
    with SaveLock(tmp_path):
        path = tmp_path / NAME
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_a_folder_without_a_lock_is_free_and_stays_as_it_is(tmp_path: Path) -> None:
    check_lock(tmp_path)
    check_lock(tmp_path / "not there")
    assert list(tmp_path.iterdir()) == []
