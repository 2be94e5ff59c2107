"""What tools write for their user: whole or not at all, and one sentence where it cannot be written."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from megatron_hc.config import LogConfig
from megatron_hc.log_sinks import check_sinks
from megatron_hc.outputs import replace_file

TOOLS = Path(__file__).parents[2] / "tools"


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file"
    replace_file(file, lambda beside: beside.write_text("one"))
    assert file.read_text() == "one"

    def full(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=f"{file} cannot be written: No space left on device"):
        replace_file(file, full)
    assert file.read_text() == "one" and [path.name for path in file.parent.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="file/x cannot be written: "):
        replace_file(file / "x", lambda beside: beside.write_text("two"))


def test_what_is_no_file_stays(tmp_path: Path) -> None:
    """As root it could be replaced: the machine's /dev/null would be a file from then on."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, lambda beside: beside.write_text("one"))
    assert os.read(reader, 9) == b"one" and pipe.is_fifo()
    os.close(reader)
    link.symlink_to(tmp_path / "file")
    replace_file(link, lambda beside: beside.write_text("two"))
    assert link.is_symlink() and (tmp_path / "file").read_text() == "two"


@pytest.mark.parametrize("name", ["metrics_jsonl", "heartbeat_file", "prometheus_file"])
def test_logs_are_files(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a device or a pipe, which cannot be read again or replaced"):
        check_sinks(LogConfig(**{name: str(tmp_path / "pipe")}))


@pytest.mark.parametrize(
    "name, words",
    [
        ("check_environment", ["--only", "sentencepiece", "--json", "{here}/file/x"]),
        ("write_configuration", ["--output", "{here}/file/x"]),
        ("train_tokenizer", ["--input", "{here}/text", "--vocab-size", "280", "--output-prefix", "{here}/file/x"]),
        ("train_tokenizer", ["--input", "{here}/text", "--vocab-size", "280", "--output-prefix", "{here}/new/file/x"]),
        ("make_corpus", ["--root", "{here}", "--output", "{here}/file/x"]),
    ],
)
def test_tools_say_so(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "one.py").write_text("pass\n")
    (tmp_path / "text").write_text("".join(f"to be or not to be {number}\n" for number in range(300)))
    (tmp_path / "new" / "file" / "x.model").mkdir(parents=True)
    monkeypatch.syspath_prepend(TOOLS)
    words = [word.format(here=tmp_path) for word in words]
    monkeypatch.setattr(sys, "argv", [name, *words])
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(tool.main(words) if name != "make_corpus" else tool.main())
    assert ended.value.code == 2 and re.search(r"file/x(\.\w+)? cannot be written: ", capfd.readouterr().err)
    assert not list(tmp_path.rglob("*partial")), "nothing is left beside it"
