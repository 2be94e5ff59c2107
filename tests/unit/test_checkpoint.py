"""Checkpoints: every bit comes back in every layout, and no kill at any moment costs the last good one."""

from __future__ import annotations

import dataclasses
import errno
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hc import checkpoint, checkpoint_access, checkpoint_folder, checkpoint_save
from megatron_hc.checkpoint_access import choose
from megatron_hc.checkpoint_folder import find_if_any
from megatron_hc.config.training import CheckpointConfig
from megatron_hc.mesh import AXES, Mesh
from megatron_hc.stored import Stored

ONE = Mesh()
ARGUMENTS = {"hidden_size": {"value": 64, "origin": "command line"}, "lr": {"value": 1e-3, "origin": "default"}}


def numbers(seed: int = 0) -> dict[str, Tensor]:
    """Every dtype, no dimension, no element, odd sizes, names with dots."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0.mlp.linear_fc1.weight": torch.randn(10, 3, generator=draw),
        "model.layers.11.mlp.linear_fc2.weight": torch.randn(5, 7, generator=draw).bfloat16(),
        "model.final.scale": torch.randn(1, generator=draw),
        "model.nothing": torch.empty(0, 4),
        "optimizer.exp_avg.layers.0.mlp.linear_fc1.weight": torch.randn(9, 4, 3, generator=draw, dtype=torch.float64),
        "optimizer.exp_avg_sq.half": torch.randn(6, generator=draw).half(),
        "optimizer.step": torch.tensor(12.0 + seed),
        "optimizer.ids": torch.randint(-(2**62), 2**62, (13,), generator=draw),
        "rng.0.cpu": torch.randint(0, 256, (17,), generator=draw, dtype=torch.uint8),
        "rng.flags": torch.tensor([True, False, True]),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def save(root: Path, iteration: int, **kwargs: object) -> Path:
    """A checkpoint whose numbers say which iteration it is."""
    return checkpoint.save(root, iteration, numbers(iteration), {"iteration": iteration}, ARGUMENTS, mesh=ONE, **kwargs)


def assert_whole(folder: Path, iteration: int, *, seed: int | None = None) -> None:
    wanted = numbers(iteration if seed is None else seed)
    found = blank(wanted)
    checkpoint.load(folder, found)
    assert checkpoint.read_state(folder)["iteration"] == iteration
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def listing(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


# ---- one process ----


def test_every_bit_comes_back_and_plain_safetensors_reads_it(tmp_path: Path) -> None:
    state = {"iteration": 100, "consumed_samples": 2**40 + 1, "best": 0.1 + 0.2, "words": ["a", None, True]}
    tensors = numbers()
    tensors["model.nan"] = torch.tensor([0x7FC00001, 0x7F800000, 0x00000001], dtype=torch.int32).view(torch.float32)
    folder = checkpoint.save(tmp_path / "new" / "runs", 100, tensors, state, ARGUMENTS, mesh=ONE)
    assert folder.name == "iter_0000100" and checkpoint.find(tmp_path / "new" / "runs") == folder
    found = blank(tensors)
    checkpoint.load(folder, found)
    raw = {}
    for file in folder.glob("*.safetensors"):
        raw |= load_file(file)
    assert raw.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for copy in (found[name], raw[name]):
            assert copy.dtype == tensor.dtype and copy.shape == tensor.shape, name
            assert torch.equal(copy.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    modes = {(file.stat().st_mode & 0o777) for file in folder.iterdir()}
    assert modes == {folder.stat().st_mode & 0o666}, "whoever may read the folder may read the files"
    assert checkpoint.read_state(folder) == state
    assert checkpoint.read_arguments(folder) == {"hidden_size": 64, "lr": 1e-3}
    shapes = checkpoint.load_tensor_shapes(folder)
    assert shapes == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert listing(folder) == [
        "arguments.json",
        "checkpoint.json",
        "model_00000.safetensors",
        "optimizer_00000.safetensors",
        "rng_00000.safetensors",
        "state.json",
    ]


def test_views_of_one_buffer_parameters_and_transposes(tmp_path: Path) -> None:
    buffer = torch.arange(24.0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    tensors = {"model.a": buffer[:10], "model.b": buffer[10:].view(2, 7), "model.t": weight.t(), "model.w": weight}
    folder = checkpoint.save(tmp_path, 1, tensors | {"model.x": weight}, {}, {}, mesh=ONE)
    target = torch.nn.Parameter(torch.zeros(4, 3))
    found = {"model.a": torch.zeros(10), "model.b": torch.zeros(2, 7), "model.t": torch.zeros(3, 4), "model.w": target}
    checkpoint.load(folder, found, prefixes=())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again = {"model.x": torch.zeros(4, 3)}
    checkpoint.load(folder, again, prefixes=())
    assert torch.equal(again["model.x"], weight)
    assert target.requires_grad and target.grad_fn is None


def test_what_no_rank_has_is_not_saved_as_whole(tmp_path: Path) -> None:
    part = Stored((4,), torch.float32, (((0,), torch.ones(3)),))
    with pytest.raises(ValueError, match="model.w cannot be saved: the ranks hold 3 of the 4 elements of its shape"):
        checkpoint.save(tmp_path, 1, {"model.w": part}, {}, {}, mesh=ONE)
    assert listing(tmp_path) == []


def test_part_of_the_names(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    weights = {name: tensor for name, tensor in blank(numbers()).items() if name.startswith("model.")}
    checkpoint.load(folder, weights)  # without the optimizer
    assert torch.equal(weights["model.final.scale"], numbers(3)["model.final.scale"])
    one = {"model.final.scale": torch.zeros(1)}
    checkpoint.load(folder, one, prefixes=())
    assert torch.equal(one["model.final.scale"], numbers(3)["model.final.scale"])
    with pytest.raises(ValueError, match=r"it alone has model.layers.0.mlp.*use-checkpoint-args"):
        checkpoint.load(folder, one)


def test_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    found = blank(numbers())
    extra = found | {f"model.hyper.{index}": torch.zeros(2) for index in range(5)}
    with pytest.raises(ValueError, match=r"it lacks model.hyper.0, model.hyper.1, model.hyper.2 and 2 more"):
        checkpoint.load(folder, extra)
    wrong = found | {"model.final.scale": torch.zeros(2), "optimizer.ids": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"another shape: model.final.scale is \[1\] there and \[2\] here.*use-checkp"):
        checkpoint.load(folder, wrong)
    with pytest.raises(ValueError, match=r"optimizer.ids as torch.int64, which cannot be loaded as torch.float32"):
        checkpoint.load(folder, found | {"optimizer.ids": torch.zeros(13)})
    with pytest.raises(ValueError, match=r"model.final.scale as torch.float32, which cannot be loaded as torch.int64"):
        checkpoint.load(folder, found | {"model.final.scale": torch.zeros(1, dtype=torch.int64)})
    assert not any(tensor.any() for tensor in (found | extra | wrong).values())


def test_floats_are_cast(tmp_path: Path) -> None:
    tensors = numbers(3)
    folder = save(tmp_path, 3)
    found = blank(tensors)
    name = "model.layers.0.mlp.linear_fc1.weight"
    found[name] = found[name].bfloat16()
    checkpoint.load(folder, found)
    assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], tensors[name].bfloat16())


# ---- folders ----


def test_latest_follows_the_tracker_and_survives_its_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.latest_iteration(tmp_path / "none") is None and checkpoint.latest_iteration(tmp_path) is None
    for iteration in (5, 10, 15):
        save(tmp_path, iteration)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "15"
    with caplog.at_level(logging.WARNING):
        tracker.write_text("10")
        assert checkpoint.latest_iteration(tmp_path) == 10 and caplog.text == ""
        for text in ("", "release", "99", "\x00\x00", "-5", "9" * 5000):
            caplog.clear()
            tracker.write_text(text)
            assert checkpoint.latest_iteration(tmp_path) == 15 and "using iteration 15" in caplog.text
        tracker.unlink()
        (tmp_path / "iter_0000020").mkdir()  # no manifest
        shutil.copytree(tmp_path / "iter_0000015", tmp_path / "iter_0000025.tmp")
        assert checkpoint.latest_iteration(tmp_path) == 15 and "is missing" in caplog.text
    assert_whole(checkpoint.find(tmp_path), 15)


def test_a_checkpoint_is_found_without_the_tracker(tmp_path: Path) -> None:
    """By a number of more than seven digits, and as a kill between the two renames of a save leaves it."""
    folder = save(tmp_path, 12_345_678)
    (tmp_path / checkpoint_folder.TRACKER).unlink()
    assert_whole(checkpoint.find(tmp_path), 12_345_678)
    folder.rename(tmp_path / "iter_12345678.old")
    assert find_if_any(tmp_path) == checkpoint.find(tmp_path) == tmp_path / "iter_12345678.old"
    save(tmp_path, 3)
    assert_whole(folder, 12_345_678)


def test_nothing_and_nothing_whole_are_not_the_same(tmp_path: Path) -> None:
    """Where a run has saved, another may not begin anew: it would take the place of what is left."""
    assert find_if_any(tmp_path / "none") is None and find_if_any(tmp_path) is None
    (tmp_path / "iter_0000005.tmp").mkdir()  # killed in its first save
    assert find_if_any(tmp_path) is None
    save(tmp_path, 5)
    assert find_if_any(tmp_path) == tmp_path / "iter_0000005"
    with pytest.raises(ValueError, match=r"^--load .*iter_0000005 is one checkpoint: name the folder that it is in"):
        find_if_any(tmp_path / "iter_0000005")
    (tmp_path / "iter_0000005" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint of iteration 5: .*checkpoint.json is missing: bring"):
        find_if_any(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000005")
    with pytest.raises(ValueError, match=r"holds no checkpoint, though latest_checkpointed_iteration.txt names '5'"):
        find_if_any(tmp_path)
    (tmp_path / "unmounted").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unmounted is not a folder"):
        find_if_any(tmp_path / "unmounted")


def failing(monkeypatch: pytest.MonkeyPatch, module: object, name: str, path: Path, code: int) -> None:
    """Have a function fail, with this error of the system, for one path."""
    real = getattr(module, name)

    def call(given: Path, *arguments: object) -> object:
        if Path(given) == path:
            raise OSError(code, os.strerror(code), str(path))
        return real(given, *arguments)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("name", ["state.json", "model_00000.safetensors"])
def test_a_disk_that_has_lost_a_file_is_a_damaged_checkpoint(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)
    failing(monkeypatch, checkpoint_folder, "checksum", tmp_path / "iter_0000010" / name, errno.EIO)
    options = CheckpointConfig(load=str(tmp_path), verify_checkpoint=True)
    assert choose(options, ONE) == tmp_path / "iter_0000005"
    if name == "state.json":  # looked at without being asked
        assert checkpoint.find(tmp_path) == tmp_path / "iter_0000005" and "no whole checkpoint" in caplog.text
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(Input/output error\)"):
        choose(dataclasses.replace(options, ckpt_step=10), ONE)


def test_a_folder_that_is_closed_to_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that holds nothing: the run would begin anew."""
    save(tmp_path, 5)
    for name in ("scandir", "listdir"):
        failing(monkeypatch, os, name, tmp_path, errno.EACCES)
    for load in (find_if_any, checkpoint.find):
        with pytest.raises(ValueError, match=rf"^--load {tmp_path} cannot be read: Permission denied$"):
            load(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert checkpoint.latest_iteration(tmp_path) is None, "what a failed save tells of the folder it failed in"


def test_a_job_started_again_goes_on_from_its_own_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever says where its first attempt began, and with all that it saves."""
    monkeypatch.setattr(checkpoint_access, "_is_of_this_job", lambda options: True)
    first = CheckpointConfig(save="own", load="other", ckpt_step=2, load_rng=False, load_optim=False)
    own = CheckpointConfig(save="own", load="own")
    assert checkpoint_access.going_on(first, ONE) == own
    for begins in ("finetune", "moe_use_upcycling"):
        assert checkpoint_access.going_on(dataclasses.replace(first, **{begins: True}), ONE) == own
    less = {"save_rng": False, "save_optim": False}
    found = checkpoint_access.going_on(dataclasses.replace(first, **less), ONE)
    assert found == dataclasses.replace(own, load_rng=False, load_optim=False, **less)


def test_find_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--load .*nowhere is not a folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no checkpoint"):
        checkpoint.find(tmp_path)
    for iteration in (5, 10):
        save(tmp_path, iteration)
    assert_whole(checkpoint.find(tmp_path, 5), 5)
    with pytest.raises(ValueError, match=r"^--ckpt-step 7 is not in .*: 5, 10$"):
        checkpoint.find(tmp_path, 7)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    file = folder / "model_00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    message = rf"model_00000.safetensors has {size - 1} bytes instead of {size}"
    with pytest.raises(ValueError, match=message):
        checkpoint.find(tmp_path, 10)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder, blank(numbers()))
    assert checkpoint.find(tmp_path).name == "iter_0000005"
    shutil.rmtree(tmp_path / "iter_0000005")
    with pytest.raises(ValueError, match=message):
        checkpoint.find(tmp_path)
    file = folder / "checkpoint.json"
    for text in (file.read_text().replace(f": {size}", f": {size - 1}"), '{"format": 1, "files"'):
        file.write_text(text)  # the first would make the folder whole
        with pytest.raises(ValueError, match="checkpoint.json is not the index"):
            checkpoint.find(tmp_path)


@pytest.mark.parametrize("is_short", [True, False])
def test_an_index_that_is_not_of_its_files_is_refused(is_short: bool, tmp_path: Path) -> None:
    """A part that no file has would stay as it was, a file of other numbers would be cast."""
    folder, name = save(tmp_path, 3), "model.layers.0.mlp.linear_fc1.weight"
    manifest = checkpoint_folder.read_manifest(folder)
    if is_short:
        manifest["tensors"][name]["chunks"] = []
        message = f"its index covers 0 of 30 elements of {name}$"
    else:
        file = folder / "model_00000.safetensors"
        changed = {key: tensor.view(torch.int32) if key == name else tensor for key, tensor in load_file(file).items()}
        save_file(changed, file)
        manifest["files"][file.name] = file.stat().st_size
        message = rf"holds {name} as I32 \[10, 3\], its index has float32 \[10, 3\]$"
    (folder / "checkpoint.json").write_text(checkpoint_folder.manifest_text(manifest))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder, blank(numbers()))
    with checkpoint.Reader(folder) as reader, pytest.raises(ValueError, match=message):
        reader.read(name)


def test_an_old_checkpoint_behind_a_link_does_not_stop_the_saves(tmp_path: Path) -> None:
    """Old checkpoints that were moved away, with a link in their place: the link goes, what it names does not."""
    root, archive = tmp_path / "run", tmp_path / "archive"
    save(root, 5)
    (root / "iter_0000005").rename(archive)
    (root / "iter_0000005").symlink_to(archive)
    save(root, 10, retain_interval=20)
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000010"]
    (root / "iter_0000010").rename(tmp_path / "ten")
    (root / "iter_0000010").symlink_to(tmp_path / "ten")
    save(root, 10)  # a link is replaced as a folder is
    assert not (root / "iter_0000010").is_symlink() and [path.name for path in root.glob("iter_*")] == ["iter_0000010"]
    assert_whole(archive, 5)
    assert_whole(tmp_path / "ten", 10)


def test_what_cannot_be_deleted_does_not_stop_the_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a network file system, where a file that some process reads keeps its folder from going."""

    def busy(path: Path, *arguments: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    save(tmp_path, 5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for iteration in (10, 15, 15, 15, 15, 20):
            save(tmp_path, iteration, retain_interval=20)
            assert checkpoint.latest_iteration(tmp_path) == iteration
            assert_whole(checkpoint.find(tmp_path), iteration)
    assert f"{tmp_path / 'iter_0000005.trash'} cannot be deleted (Directory not empty)" in caplog.text
    save(tmp_path, 25, retain_interval=20)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000020", "iter_0000025"]


@pytest.mark.parametrize(
    "file, what",
    [
        ("iter_0000100/.metadata", r"of Megatron-LM \(.*iter_0000100\): .*convert_checkpoint.py --from megatron$"),
        (".metadata", r"of Megatron-LM \(.*\): convert it with .* --from megatron$"),
        (
            "iter_0000100/mp_rank_00_001/model_optim_rng.pt",
            r"of Megatron-LM in its format torch \(.*iter_0000100\): make it torch_dist",
        ),
        ("release/mp_rank_00/model_optim_rng.pt", r"of Megatron-LM in its format torch \(.*release\): make it"),
        ("model.safetensors", r"a model of Hugging Face: convert it with .* --from hf$"),
    ],
)
def test_checkpoints_of_other_programs(file: str, what: str, tmp_path: Path) -> None:
    """A script of Megatron-LM names the folder of its earlier run: it is not empty, and not one to write in."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for has_tracker in (False, True):
        if has_tracker:
            tracker.write_text("100")
        for step in (None, 100):
            with pytest.raises(ValueError, match=rf"^--load .* holds .*{what}"):
                checkpoint.find(tmp_path, step)
        with pytest.raises(ValueError, match=what):
            find_if_any(tmp_path)
        if "of Megatron-LM" in what:
            with pytest.raises(ValueError, match=r"^--save .* a checkpoint of Megatron-LM \(.*\): choose another"):
                checkpoint.check_not_megatrons(tmp_path)
        else:
            checkpoint.check_not_megatrons(tmp_path)
    tracker.unlink()
    save(tmp_path, 3)
    assert checkpoint.find(tmp_path) == find_if_any(tmp_path) == tmp_path / "iter_0000003"


def test_retained_iterations(tmp_path: Path) -> None:
    for iteration in range(5, 45, 5):
        save(tmp_path, iteration, retain_interval=20)
    assert [name for name in listing(tmp_path) if name.startswith("iter")] == ["iter_0000020", "iter_0000040"]
    save(tmp_path, 35, retain_interval=20)  # after a resume from 20: later ones stay
    assert [name[-2:] for name in listing(tmp_path) if name.startswith("iter")] == ["20", "35", "40"]
    assert checkpoint.latest_iteration(tmp_path) == 35


def test_retention_keeps_what_is_newer_and_what_is_not_ours(tmp_path: Path) -> None:
    """A run that begins again at an earlier iteration."""
    for iteration in (10, 25):
        save(tmp_path, iteration)
    (tmp_path / "iter_0000005").mkdir()
    save(tmp_path, 15, retain_interval=20)
    assert listing(tmp_path)[:-1] == ["iter_0000005", "iter_0000015", "iter_0000025"]


def test_the_same_iteration_again_replaces_and_a_foreign_folder_stays(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, numbers(6), {"iteration": 5}, ARGUMENTS, mesh=ONE)
    assert_whole(checkpoint.find(tmp_path), 5, seed=6)
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "iter_0000007" / "theirs.pt").write_bytes(b"precious")
    save(tmp_path, 7)
    assert_whole(checkpoint.find(tmp_path), 7)
    assert [file.read_bytes() for file in tmp_path.glob("iter_0000007.foreign-*/theirs.pt")] == [b"precious"]


def test_a_folder_that_lacks_another_rank_s_file_gets_no_name(tmp_path: Path) -> None:
    """--save on a disk of each machine's own."""
    save(tmp_path, 1)
    partial = save(tmp_path / "other", 2)
    (partial / "model_00000.safetensors").unlink()
    with pytest.raises(ValueError, match="model_00000.safetensors is missing.: --save must be one folder that all"):
        checkpoint_folder.publish(partial, tmp_path / "iter_0000002")
    assert not (tmp_path / "iter_0000002").exists()


def test_tensors_made_in_their_turn_and_stopped_by_hand(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        if name == "model.b":
            raise KeyboardInterrupt
        return torch.ones(2)

    shapes = {name: ((2,), torch.float32) for name in ("model.a", "model.b")}
    for root in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_one_by_one(root, 1, shapes, read, {}, {}, file_bytes=8)
        assert listing(tmp_path) == []


def test_a_folder_that_cannot_hold_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        save(tmp_path / "file" / "deeper", 1)
    with pytest.raises(ValueError, match="file is a file"):
        checkpoint.check_save_folder(tmp_path / "file")
    checkpoint.check_save_folder(tmp_path / "not" / "yet")
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "checkpoint.json").touch()
    with pytest.raises(ValueError, match=r"--save .*iter_0000001 is a checkpoint: name the folder it lies in"):
        checkpoint.check_save_folder(tmp_path / "iter_0000001")
    save(tmp_path / "runs", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"^--save .* has 0.000 GB free and a checkpoint needs"):
        save(tmp_path / "runs", 2)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="read-only"):
        save(tmp_path / "runs", 2)
    assert_whole(checkpoint.find(tmp_path / "runs"), 1)


# ---- kills ----


class Killed(BaseException):
    """Nothing in the package may catch it: the process is gone."""


def test_a_kill_before_every_single_step_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing iteration 20 (numbers of 21) and dropping 15 by retention, after another kill left its rests."""
    count, alive, finished = 0, 10**9, 0

    def step(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count > alive:
                raise Killed
            return call(*args, **kwargs)

        return counted

    original = tmp_path / "original"
    for iteration in (10, 15, 20):
        save(original, iteration)
    shutil.copytree(original / "iter_0000015", original / "iter_0000030.tmp")
    shutil.copytree(original / "iter_0000015", original / "iter_0000015.old")
    shutil.copytree(original / "iter_0000015", original / "iter_0000015.trash")
    for module, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
        (Path, "rename"),
        (Path, "mkdir"),
        (checkpoint_save, "save_file"),
        (checkpoint_folder, "write_text"),
        (checkpoint_save, "write_text"),
    ):
        monkeypatch.setattr(module, name, step(getattr(module, name)))
    for survived in range(200):
        root = tmp_path / "run"
        alive = 10**9
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        count, alive = 0, survived
        arguments = (root, 20, numbers(21), {"iteration": 20}, ARGUMENTS)
        try:
            checkpoint.save(*arguments, mesh=ONE, retain_interval=10)
            finished = survived
        except Killed:
            pass
        alive = 10**9
        folder = checkpoint.find(root)
        new = torch.equal(load_file(folder / "optimizer_00000.safetensors")["optimizer.step"], torch.tensor(33.0))
        assert new or not finished
        assert_whole(folder, 20, seed=21 if new else 20)
        assert_whole(checkpoint.find(root, 10), 10)
        checkpoint.save(*arguments, mesh=ONE, retain_interval=10)
        assert_whole(checkpoint.find(root), 20, seed=21)
        assert listing(root) == ["iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"]
        if finished:
            break
    assert finished > 20


def test_a_machine_that_stops_finds_what_has_a_name_on_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and their folder are flushed before the rename, the names after it, the tracker likewise."""
    flushed: set[tuple[int, int]] = set()
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def key(path: Path | int) -> tuple[int, int]:
        found = os.stat(path)
        return found.st_dev, found.st_ino

    def flush(handle: int) -> None:
        flushed.add(key(handle))
        fsync(handle)

    def named(partial: Path, final: Path) -> Path:
        if final.name == "iter_0000001":
            assert [path.name for path in (partial, *partial.iterdir()) if key(path) not in flushed] == []
            flushed.clear()
        return rename(partial, final)

    def replaced(partial: Path, final: Path) -> None:
        assert final.name == checkpoint_folder.TRACKER and {key(partial), key(tmp_path)} <= flushed
        flushed.clear()
        replace(partial, final)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", named)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path, 1)
    assert flushed == {key(tmp_path)}


@pytest.mark.parametrize("is_damaged", [False, True])  # what has taken its place
def test_a_save_after_a_kill_between_renames_first_repairs(
    is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5).rename(tmp_path / "iter_0000005.old")
    if is_damaged:
        shutil.copytree(tmp_path / "iter_0000005.old", tmp_path / "iter_0000005")
        (tmp_path / "iter_0000005" / "model_00000.safetensors").unlink()
    assert_whole(checkpoint.find(tmp_path), 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="free space"):
        save(tmp_path, 10)
    assert_whole(tmp_path / "iter_0000005", 5)


def save_for_ever(root: str) -> None:
    """In a child process: iterations 1, 2, 2, 3, 4, 4, ... of 4 MB, each announced by a file before it starts."""
    torch.set_num_threads(1)
    iteration = (checkpoint.latest_iteration(root) or 0) + 1
    while True:
        tensors = {f"model.{index}": torch.full((1000, 100 + index), float(iteration)) for index in range(10)}
        for _ in range(1 + (iteration % 2 == 0)):
            checkpoint.save(root, iteration, tensors, {"iteration": iteration}, {}, mesh=ONE, retain_interval=3)
        iteration += 1


def kill_again_and_again(root: Path, kills: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "torch.distributed.tensor"])
    delay, last = random.Random(kills), 0
    for _ in range(kills):
        child = context.Process(target=save_for_ever, args=(str(root),))
        child.start()
        deadline = time.monotonic() + 60
        while (checkpoint.latest_iteration(root) or 0) <= last:  # it has saved at least once
            assert child.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay.uniform(0, 0.4))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        iteration = checkpoint.latest_iteration(root)
        assert iteration is not None and iteration > last
        folder = checkpoint.find(root)
        found = {f"model.{index}": torch.zeros(1000, 100 + index) for index in range(10)}
        checkpoint.load(folder, found)
        assert checkpoint.read_state(folder) == {"iteration": iteration}
        assert all((tensor == iteration).all() for tensor in found.values())
        last = iteration


def test_sigkill_while_saving(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, kills=5)


@pytest.mark.slow
def test_sigkill_while_saving_many_times(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, kills=60)


# ---- several processes ----


def four_ranks(rank: int, port: int, root: str, errors: multiprocessing.Queue) -> None:
    try:
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
        sizes = dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 2}
        ranks = dict.fromkeys(AXES, 0) | {"dp": rank // 2, "tp": rank % 2}
        mesh = Mesh(sizes=sizes, ranks=ranks, groups={"world": dist.group.WORLD})
        check_layouts(mesh, Path(root))
        check_stages(mesh, Path(root))
        check_failures(mesh, Path(root))
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise


def check_layouts(mesh: Mesh, root: Path) -> None:
    """Save in each layout, load in each other and in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2))
    layouts = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (grid, [Shard(0), Shard(0)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(1), Shard(0)]),
        None,
    ]

    def lay(tensors: dict[str, Tensor], layout: tuple | None) -> dict[str, Tensor]:
        if layout is None:
            return {name: tensor.clone() for name, tensor in tensors.items()}
        laid = {}
        for name, tensor in tensors.items():
            places = [p if p.is_replicate() or p.dim < tensor.dim() else Replicate() for p in layout[1]]
            laid[name] = distribute_tensor(tensor, layout[0], places)
        return laid

    for number, layout in enumerate(layouts, start=1):
        wanted = numbers(number)
        folder = checkpoint.save(root, number, lay(wanted, layout), {"iteration": number}, ARGUMENTS, mesh=mesh)
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        assert sum(t.nbytes for file in files for t in file.values()) == sum(t.nbytes for t in wanted.values())
        assert {file.stem[-5:] for file in folder.glob("*.safetensors")} == {f"{rank:05d}" for rank in range(4)}
        assert_whole(folder, number)  # each rank alone, whole tensors
        for other in layouts:
            found = lay(blank(wanted), other)
            checkpoint.load(folder, found, mesh=mesh)
            for name, target in lay(wanted, other).items():
                ours, theirs = found[name], target
                if isinstance(ours, DTensor) and isinstance(theirs, DTensor):
                    ours, theirs = ours.to_local(), theirs.to_local()
                assert torch.equal(ours, theirs), (layout, other, name)


def check_stages(mesh: Mesh, root: Path) -> None:
    """Each rank has names of its own (pipeline stages, generators): loading checks the names of all ranks together."""
    own = {f"model.layers.{mesh.world_rank}.weight": torch.full((3, 2), float(mesh.world_rank))}
    own[f"rng.{mesh.world_rank}"] = torch.full((4,), mesh.world_rank, dtype=torch.uint8)
    folder = checkpoint.save(root, 50, own | {"model.shared": torch.arange(4.0)}, {}, {}, mesh=mesh)
    found = blank(own) | {"model.shared": torch.zeros(4)}
    checkpoint.load(folder, found, mesh=mesh)
    assert all(torch.equal(found[name], tensor) for name, tensor in own.items())
    if mesh.world_rank == 2:
        del found["model.layers.2.weight"]
    with pytest.raises(ValueError, match="it alone has model.layers.2.weight: load"):
        checkpoint.load(folder, found, mesh=mesh)


def check_failures(mesh: Mesh, root: Path) -> None:
    """What fails on one rank ends the save on all of them with its message, and the last checkpoint stays."""
    real = checkpoint_save.save_file
    if mesh.world_rank == 3:

        def full_disk(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        checkpoint_save.save_file = full_disk
    own = {f"model.{mesh.world_rank}": torch.zeros(1)}
    with pytest.raises(ValueError, match="No space left"):
        checkpoint.save(root, 60, own, {}, {}, mesh=mesh)
    checkpoint_save.save_file = real
    assert checkpoint.latest_iteration(root) == 50
    with pytest.raises(ValueError, match=r"model.w cannot be saved: it is float32 \[1\] on one rank and float32 \[2\]"):
        checkpoint.save(root, 60, {"model.w": torch.zeros(1 + mesh.world_rank)}, {}, {}, mesh=mesh)
    checkpoint.save(root, 60, own, {}, {}, mesh=mesh)
    assert checkpoint.latest_iteration(root) == 60


def test_four_ranks_reshard_bit_for_bit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "torch.distributed.tensor"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = context.Queue()
    children = [context.Process(target=four_ranks, args=(rank, port, str(tmp_path), errors)) for rank in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=90)
    alive = [child for child in children if child.is_alive()]
    for child in alive:
        child.kill()
    assert not alive and all(child.exitcode == 0 for child in children), errors.get(timeout=5)
    assert_whole(checkpoint.find(tmp_path, 3), 3)  # what four ranks wrote, one process reads
