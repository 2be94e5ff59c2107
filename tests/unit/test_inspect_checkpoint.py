"""tools/inspect_checkpoint.py and tools/consolidate_checkpoint.py."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hc import checkpoint, checkpoint_save
from megatron_hc.mesh import Mesh
from megatron_hc.stored import Stored

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import consolidate_checkpoint  # noqa: E402  (scripts, not part of the package)
import inspect_checkpoint  # noqa: E402

ARGUMENTS: dict[str, Any] = {"hidden_size": {"value": 4, "origin": "command line"}}


def tensors() -> dict[str, Tensor]:
    return {
        "model.a": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "model.b": torch.arange(3, dtype=torch.bfloat16),
        "optimizer.exp_avg.a": torch.full((2, 2), 1e-3, dtype=torch.float64),
        "optimizer.step": torch.tensor(7),
    }


def save(root: Path, iteration: int = 5, arguments: dict[str, Any] | None = None, **changed: Any) -> Path:
    state = {"iteration": iteration, "consumed_samples": 8 * iteration}
    return checkpoint.save(
        root, iteration, tensors() | {f"model.{k}": v for k, v in changed.items()}, state, arguments or ARGUMENTS,
        mesh=Mesh(),
    )  # fmt: skip


def run(tool: Any, *words: object, code: int = 0) -> None:
    try:
        found = tool.main([str(word) for word in words])
    except SystemExit as stop:
        found = stop.code
    assert found == code


def test_lists_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4)
    folder = save(tmp_path)
    run(inspect_checkpoint, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: iteration 5, 40 samples consumed"
    assert lines[1].split(maxsplit=2) == ["model.a", "float32", "[2, 2]            norm 5.000000e+00"]
    assert lines[2].split()[:3] == ["model.b", "bfloat16", "[3]"]
    assert "model: 7 numbers, 0.0 MiB" in lines and lines[-1] == "hidden_size: 4"
    run(inspect_checkpoint, tmp_path / "iter_0000004", "--filter", "optimizer.*", "--no-norms", "--no-arguments")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "norm" not in lines[1] and "iteration 4" in lines[0]


def test_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save(tmp_path / "one")
    save(tmp_path / "same")
    run(inspect_checkpoint, one, "--diff", tmp_path / "same")
    assert "hold the same" in capsys.readouterr().out
    nan = torch.tensor([[3.0, 4.0], [0.0, float("nan")]])
    changed = {"a": torch.tensor([[3.0, 4.0], [0.0, 0.5]]), "b": torch.ones(4), "c": torch.ones(1)}
    other = save(tmp_path / "other", 6, {"hidden_size": {"value": 5, "origin": ""}}, **changed)
    run(inspect_checkpoint, one, "--diff", other, code=1)
    assert capsys.readouterr().out.splitlines() == [
        "model.a: 1 of 4 numbers differ, by at most 5.000e-01; norm of the difference 1.000e-01 of the whole",
        "model.b: [3] and [4]",
        f"model.c: only in {other}",
        "iteration: 5 and 6",
        "consumed_samples: 40 and 48",
        "argument hidden_size: 4 and 5",
    ]
    run(inspect_checkpoint, save(tmp_path / "nan", a=nan), "--diff", one, "--filter", "model.a", code=1)
    assert "1 of 4 numbers differ, by at most nan" in capsys.readouterr().out
    run(inspect_checkpoint, tmp_path / "nan", "--diff", save(tmp_path / "nan too", a=nan))
    run(inspect_checkpoint, save(tmp_path / "wide", b=torch.arange(3.0)), "--diff", one, code=1)
    assert "model.b: float32 and bfloat16" in capsys.readouterr().out


def test_differences_of_dtypes_that_torch_does_not_compare() -> None:
    narrow = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert list(inspect_checkpoint.tensor_differences(torch.tensor([1.0, 2.0]), narrow)) == [
        "float32 and float8_e4m3fn"
    ]
    _, numbers = inspect_checkpoint.tensor_differences(torch.tensor([1.0, 2.5]), narrow)
    assert numbers.startswith("1 of 2 numbers differ, by at most 5.000e-01")


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        consolidate_checkpoint.main(["a", "b", "--with"])
    assert "unrecognized arguments: --with" in capsys.readouterr().err


def test_consolidated_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halves = tuple(((row, 0), tensors()["model.a"][row : row + 1].clone()) for row in range(2))
    whole = tensors() | {"model.a": Stored((2, 2), torch.float32, halves)}
    folder = checkpoint.save(tmp_path / "a", 5, whole, {"iteration": 5}, ARGUMENTS, mesh=Mesh())
    run(consolidate_checkpoint, tmp_path / "a", tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == {"model.a", "model.b"} and all(found[name].equal(tensors()[name]) for name in found)
    run(consolidate_checkpoint, folder, tmp_path / "all.safetensors", "--with-optimizer")
    run(consolidate_checkpoint, "--back", tmp_path / "all.safetensors", tmp_path / "b")
    run(inspect_checkpoint, tmp_path / "a", "--diff", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["all.safetensors", "weights.safetensors"]
    assert capsys.readouterr().err == ""


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What consolidate_checkpoint.py says."""
    run(consolidate_checkpoint, *words, code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_consolidation_leaves_checkpoints_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "a")
    run(consolidate_checkpoint, folder, tmp_path / "weights.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "lies in a checkpoint" in refused(capsys, tmp_path / "a", folder / "model_00000.safetensors")
    error = refused(capsys, "--back", tmp_path / "weights.safetensors", tmp_path / "a")
    assert "a holds checkpoints already, the latest of iteration 5: choose another folder" in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_consolidation_in_a_folder_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither can the file be written nor what is left of it be removed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    folder = save(tmp_path / "a")
    monkeypatch.setattr(consolidate_checkpoint, "save_file", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert "x cannot be written ([Errno 30] Read-only file system): choose" in refused(capsys, folder, tmp_path / "x")


@pytest.mark.parametrize("step", ["write_text", "write_tracker"])
def test_nothing_is_left_on_a_full_disk(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder made for the checkpoint; in another, what was there stays."""

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = save(tmp_path / "a")
    run(consolidate_checkpoint, folder, tmp_path / "all.safetensors", "--with-optimizer")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    monkeypatch.setattr(checkpoint_save, step, fill)
    for target in (tmp_path / "new", tmp_path / "there"):
        assert "No space left on device" in refused(capsys, "--back", tmp_path / "all.safetensors", target)
        with pytest.raises(ValueError, match="No space left on device"):
            checkpoint.save_one_by_one(target, 5, {"model.a": ((1,), torch.float32)}, lambda _: torch.ones(1), {}, {})
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "there" / "notes").read_text() == "mine"
    assert not (tmp_path / "there" / "iter_0000005.tmp").exists()


def test_a_write_that_fails_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(ValueError, match=r"No space left on device: '.*state.json'"):
        checkpoint.save(tmp_path, 1, {}, {}, {}, mesh=Mesh())


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "a")
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    damaged = save(tmp_path / "damaged")
    with (damaged / "model_00000.safetensors").open("ab") as file:
        file.write(b"x")
    for tool, words, message in (
        (inspect_checkpoint, [tmp_path / "none"], "is not a folder"),
        (inspect_checkpoint, [folder, "--filter", "x*"], "--filter 'x*' matches none of the 4 tensors"),
        (inspect_checkpoint, [damaged], "is not a whole checkpoint"),
        (inspect_checkpoint, [folder, "--diff", folder, "--no-norms"], "--no-norms would do nothing with --diff"),
        (inspect_checkpoint, [folder, "--diff", folder, "--no-arguments"], "--no-arguments would do nothing with"),
        (consolidate_checkpoint, [tmp_path / "none", tmp_path / "x"], "is not a folder"),
        (consolidate_checkpoint, [folder, tmp_path / "none" / "x"], "cannot be written"),
        (consolidate_checkpoint, ["--back", tmp_path / "text", tmp_path / "b"], "cannot be read as a safetensors file"),
        (consolidate_checkpoint, ["--back", tmp_path / "foreign.safetensors", tmp_path / "b"], "was not written by"),
        (consolidate_checkpoint, ["--back", "--with-optimizer", "x", "y"], "does not go with --back"),
    ):
        run(tool, *words, code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error
