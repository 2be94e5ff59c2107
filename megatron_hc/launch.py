"""Being one of several processes: the environment that says so, and one voice for their errors.

When a process fails, the others fail too, with a connection that broke. What the user should see is the first error,
once: ``one_voice`` keeps an account of it in the process group's store. Loads fast: torch only once a group exists.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_hc.place import Place, place_of

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes
SAVE_FAILED = 74
"""Exit code: trained to the end, but a checkpoint could not be written (EX_IOERR of sysexits.h)."""
SAVED_TO_RESUME = 85
"""Exit code: saved because told to stop; started again, the run goes on."""
PATIENCE_S = 5.0  # how long a process waits for the one that failed first to say so
GRACE_S = 0.5
PACKAGE = Path(__file__).parent


class TrainingStopped(RuntimeError):
    """The run cannot go on, and no traceback explains why: a number is not finite, copies have come apart."""


class Hang(RuntimeError):
    """A process waited for the others for too long; says where."""


def leave_with(code: int) -> int:
    """The exit code of a run that has ended in order, for ``sys.exit``.

    Rank 0 also writes it to the file that MEGATRON_HC_EXIT_CODE_FILE names: torchrun ends with 1 for any code but 0.
    While torchrun has --max-restarts left, any code but 0 would make it start the run again: then it is told 0.
    """
    place, file = place_of(), os.environ.get("MEGATRON_HC_EXIT_CODE_FILE")
    if place.rank == 0 and file:
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk below the log: Python would try again at its end, and make the exit code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    restarts = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if code and all(text.isdecimal() for text in restarts) and int(restarts[0]) < int(restarts[1]):
        if place.rank == 0:
            print(f"exit code {code}, told to torchrun as 0: it would start the run again", flush=True)
        return 0
    return code


def note_iteration(error: BaseException, iteration: int) -> None:
    """Have ``one_voice`` say at which iteration an error came."""
    error.iteration = iteration  # type: ignore[attr-defined]


@contextmanager
def one_voice(prog: str) -> Iterator[None]:
    """End the process at an error, which is printed by the first process that failed.

    Exit code 2 and one sentence for a ``ValueError`` (what the user can mend); exit code 1 and one sentence for
    ``TrainingStopped`` and for collectives that broke off or waited too long; exit code 1 and the traceback, each line
    with the rank, for all else; exit code 130 and one sentence after Ctrl-C. ``MEGATRON_HC_TRACEBACK=1`` in the
    environment prints every process's traceback.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        speak(prog, error)


def speak(prog: str, error: BaseException) -> NoReturn:
    """``one_voice``'s way to end the process."""
    try:
        place = place_of()
    except ValueError:
        place = Place(0, 1, None)  # the error is about these variables
    text, code = _told(prog, error, place)
    if os.environ.get("MEGATRON_HC_TRACEBACK"):
        traceback.print_exception(error)
    store = _store()
    if store is not None:
        _tell_once(store, text, place, waits=_is_broken_contact(error))
        _flush()
        os._exit(code)  # leaving the process groups in order would wait for the others
    if place.world_size > 1 and place.rank > 0:
        _leave_it_to_the_first(code)
        text = f"[rank {place.rank}] {text}"
    _print(text)
    raise SystemExit(code) from error


def _leave_it_to_the_first(code: int) -> None:
    """Before there is a group: most errors are the same everywhere, and the launcher ends us once rank 0 has told."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    time.sleep(PATIENCE_S)


def _store() -> Any:
    """The process group's store; None before there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _tell_once(store: Any, text: str, place: Place, waits: bool) -> None:
    """Print the text if no other process has failed before; otherwise see that the other one's gets out."""
    failed, told = "megatron_hc/failed", "megatron_hc/told"
    try:
        if waits:  # somebody else ended, and may be about to say why
            _wait(store, failed)
        if store.add(failed, 1) == 1:
            _print(text)
            store.set(told, "1")
            if place.rank == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
                time.sleep(GRACE_S)  # the store is in this process, and the others are about to look
        else:
            _wait(store, told)
    except RuntimeError:  # the store was in a process that has ended
        if not waits:
            _print(text)


def _wait(store: Any, key: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not store.check([key]):
        time.sleep(0.05)


def _told(prog: str, error: BaseException, place: Place) -> tuple[str, int]:
    """(what to print, exit code)."""
    if isinstance(error, ValueError):
        return f"{prog}: error: {error}", USER_ERROR
    if isinstance(error, TrainingStopped):
        return f"{prog}: stopped: {error}", FAILURE
    if isinstance(error, Hang):
        return _timed_out(prog, place, str(error)), FAILURE
    iteration = getattr(error, "iteration", None)
    if isinstance(error, KeyboardInterrupt):
        return f"{prog}: interrupted{f' at iteration {iteration}' if iteration is not None else ''}", INTERRUPTED
    where = f"{f'at iteration {iteration} ' if iteration is not None else ''}in {_own_frames(error)}"
    if _is_broken_contact(error):
        lost = f"rank {place.rank} lost another process, which ended without a word, {where}"
        return f"{prog}: stopped: {lost} ({str(error).splitlines()[0]})", FAILURE
    if _is_timeout(error):
        return _timed_out(prog, place, where), FAILURE
    lines = "".join(traceback.format_exception(error)).rstrip()
    if place.world_size > 1:
        lines = "\n".join(f"[rank {place.rank}] {line}" for line in lines.splitlines())
    return f"{lines}\n{prog}: failed: rank {place.rank} {where}: {type(error).__name__}: {error}", FAILURE


def _timed_out(prog: str, place: Place, where: str) -> str:
    return (
        f"{prog}: stopped: rank {place.rank} waited longer than --distributed-timeout-minutes for the other processes, "
        f"{where}"
    )


def _is_collective(error: BaseException) -> bool:
    """Whether an error came out of torch.distributed."""
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "torch/distributed" in frames[-1].filename.replace(os.sep, "/")
    return inside or bool(re.search(r"gloo|NCCL|ProcessGroup", str(error)))


def _is_timeout(error: BaseException) -> bool:
    return _is_collective(error) and bool(re.search(r"timed? ?out", str(error), re.IGNORECASE))


def _is_broken_contact(error: BaseException) -> bool:
    text = r"connection|peer|socket|broken pipe|remote process|aborted"
    return _is_collective(error) and not _is_timeout(error) and bool(re.search(text, str(error), re.IGNORECASE))


def _own_frames(error: BaseException) -> str:
    return describe_frames([(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)])


def describe_frames(frames: list[tuple[str, int, str]]) -> str:
    """The last calls within this package: 'train.py:210 train_step > parallel/data.py:120 grad_norm'."""
    own = [
        f"{Path(file).relative_to(PACKAGE)}:{line} {name}"
        for file, line, name in frames
        if Path(file).is_relative_to(PACKAGE) and Path(file) != Path(__file__)
    ]
    return " > ".join(own[-3:]) or "code outside the package"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
    _tell_torchrun(text)


def _tell_torchrun(text: str) -> None:
    """torchrun shows what lies in this file in place of its '<N/A>'."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        last = text.splitlines()[-1]
        message = {"message": last, "extraInfo": {"py_callstack": last, "timestamp": str(int(time.time()))}}
        try:
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
        except OSError:
            pass  # it was printed


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
