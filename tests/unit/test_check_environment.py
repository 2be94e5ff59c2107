"""tools/check_environment.py: statuses, the table, JSON and exit codes; and some probes as they are."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    spec = importlib.util.spec_from_file_location("check_environment", TOOLS / "check_environment.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_probes_of_this_machine(tmp_path: Path) -> None:
    """In a process of its own, as a user's: in this one other tests may have left a process group."""
    names = ["torch", "gloo", "flash attention", "sentencepiece", "transformer-engine delayed", "apex's norms"]
    command = [sys.executable, str(TOOLS / "check_environment.py"), "--only", *names]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=120, cwd=TOOLS.parent
    )
    assert run.returncode == 0, run.stdout + run.stderr
    out = run.stdout
    assert "all-reduce in a group of one process" in out and "a text there and back" in out
    parts = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["parts"]}
    assert set(parts) == {*names} and all(parts[name]["status"] == "ok" for name in names[:4])
    if parts["apex's norms"]["version"] is None:
        assert parts["apex's norms"]["status"] == "no" and "github.com/NVIDIA/apex" in parts["apex's norms"]["details"]


def test_without_torch() -> None:
    """One sentence: it is what a user runs where something is wrong."""
    command = [sys.executable, "-S", str(TOOLS / "check_environment.py")]  # without the packages of this environment
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=TOOLS.parent)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "cannot be imported (No module named 'torch'): pip install torch numpy" in run.stderr


def test_exit_codes(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import environment_probes

    def noisy() -> str:
        print("noise")
        print("noise", file=sys.stderr)
        return "fine"

    def absent() -> str:
        raise environment_probes.Unusable("not here")

    def broken() -> str:
        raise OSError("libx.so: not found\nmore")

    part = environment_probes.Part
    good, missing, bad = (part(name, "torch", "1", "x", probe) for name, probe in
                          (("good", noisy), ("missing", absent), ("bad", broken)))  # fmt: skip
    monkeypatch.setattr(tool, "PARTS", (good, missing))
    assert tool.main([]) == 0
    out, err = capfd.readouterr()
    assert "noise" not in out + err and "not here" in out
    assert tool.main(["--require", "missing"]) == 1
    monkeypatch.setattr(tool, "PARTS", (good._replace(is_base=True), missing._replace(is_base=True)))
    assert tool.main([]) == 1
    monkeypatch.setattr(tool, "PARTS", (good, bad))
    capfd.readouterr()
    assert tool.main(["--json", "-"]) == 1
    rows = json.loads(capfd.readouterr().out)["parts"]
    assert [row["status"] for row in rows] == ["ok", "FAILED"] and rows[1]["details"] == "OSError: libx.so: not found"


@pytest.mark.parametrize(
    "error", [SystemExit("no licence"), type("PanicException", (BaseException,), {})("no licence")]
)
def test_a_package_that_ends_its_process_is_a_row(
    tool: ModuleType, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import environment_probes

    def ends() -> str:
        raise error

    good, bad = (
        environment_probes.Part(name, "torch", "1", "x", probe)
        for name, probe in (("good", lambda: "fine"), ("bad", ends))
    )
    monkeypatch.setattr(tool, "PARTS", (bad, good))
    assert tool.main([]) == 1
    assert re.search(r"bad +FAILED .*: no licence\ngood +ok .* fine\n", capsys.readouterr().out)


def test_a_number_that_is_off_fails(tool: ModuleType) -> None:
    import environment_probes
    import torch

    with pytest.raises(AssertionError, match="from plain torch, more than 1e-05"):
        environment_probes.near(torch.ones(3) * 1.001, torch.ones(3), 1e-5)
    with pytest.raises(AssertionError):
        environment_probes.near(torch.full((3,), float("nan")), torch.ones(3), 1e-5)


def test_every_part_is_named_once(tool: ModuleType) -> None:
    names = [part.name for part in tool.PARTS]
    assert len(names) == len(set(names)) and all(part.flags and part.known for part in tool.PARTS)
