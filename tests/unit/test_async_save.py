"""Saves in the background: what is written is what was there, failures are heard, the last checkpoint stays."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hc import checkpoint, checkpoint_folder, checkpoint_save, mesh
from megatron_hc.checkpoint import Saver
from megatron_hc.mesh import Mesh


def test_the_run_goes_on_and_what_is_saved_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, said, real = threading.Event(), list[str](), checkpoint_save.save_file

    def slow(*arguments: Any, **options: Any) -> None:
        assert may_write.wait(20)
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint_save, "save_file", slow)
    weight = torch.ones(3)
    saver = Saver(Mesh(), True, said.append)
    saver.save(tmp_path, 1, {"model.w": weight}, {}, {})
    weight.fill_(2.0)  # the next step
    assert checkpoint.latest_iteration(tmp_path) is None and len(said) == 1 and "in the background" in said[0]
    threading.Timer(0.1, may_write.set).start()
    saver.save(tmp_path, 2, {"model.w": weight}, {}, {})  # waits for the first
    assert checkpoint.latest_iteration(tmp_path) == 1 or "iter_0000002" in said[-1]
    saver.wait()
    for iteration in (1, 2):
        found = torch.zeros(3)
        checkpoint.load(checkpoint.find(tmp_path, iteration), {"model.w": found})
        assert found.tolist() == [float(iteration)] * 3
    assert [line.split(" in ")[0] for line in said if line.startswith("saved")] == [
        f"saved {tmp_path / name}" for name in ("iter_0000001", "iter_0000002")
    ]


@pytest.mark.parametrize(("asked", "given"), [(10, 30), (120, 120)])
def test_saves_in_the_background_wait_as_long_as_the_run_may(
    asked: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: made.append(options))
    mesh._writer_group(timedelta(minutes=asked))
    assert made == [{"backend": "gloo", "timeout": timedelta(minutes=given)}]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_said_and_does_not_end_the_run(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = Saver(Mesh(), in_background, said.append)
    saver.save(tmp_path, 1, {"model.w": torch.ones(3)}, {}, {})
    saver.wait()
    assert saver.exit_code(1, 0) == 0

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_save, "save_file", full)
    for iteration in (2, 3):
        saver.save(tmp_path, iteration, {"model.w": torch.ones(3)}, {}, {})
        saver.wait()
        assert f"WARNING: the save of iteration {iteration} failed: " in said[-1] and "No space left" in said[-1]
        assert said[-1].endswith("Training goes on; the newest checkpoint is iteration 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", checkpoint_folder.TRACKER]
    assert saver.failed == [2, 3] and saver.exit_code(3, 85) == 74, "nothing to resume from at 3"
    monkeypatch.undo()
    saver.save(tmp_path, 4, {"model.w": torch.ones(3)}, {}, {})
    saver.wait()
    assert checkpoint.latest_iteration(tmp_path) == 4
    assert saver.exit_code(4, 0) == 74 and "not saved: iterations 2, 3; exit code 74" in said[-1]
    assert saver.exit_code(4, 85) == 85, "told to stop, and saved"


def test_a_mistake_in_the_background_is_raised_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    saver = Saver(Mesh(), True, lambda text: None)
    monkeypatch.setattr(checkpoint_save, "save_file", mistaken)
    saver.save(tmp_path, 2, {"model.w": torch.ones(3)}, {}, {})
    with pytest.raises(ZeroDivisionError):
        saver.save(tmp_path, 3, {"model.w": torch.ones(3)}, {}, {})
    assert saver.failed == []


def test_without_background_a_save_is_done_when_it_returns(tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver(Mesh(), False, said.append)
    saver.save(tmp_path, 1, {"model.w": torch.ones(3)}, {}, {})
    assert checkpoint.latest_iteration(tmp_path) == 1 and said[0].startswith(f"saved {tmp_path / 'iter_0000001'} in")
