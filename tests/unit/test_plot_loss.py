"""tools/plot_loss.py: reading runs, the chart in the terminal, pictures, and its one-sentence errors."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "plot_loss.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_loss", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_loss"] = module
    spec.loader.exec_module(module)
    return module


def metrics(path: Path, losses: list[float], validation: dict[int, float] | None = None) -> Path:
    with path.open("w") as file:
        for iteration, loss in enumerate(losses, 1):
            file.write(json.dumps({"iteration": iteration, "consumed_samples": 8 * iteration, "lm_loss": loss}) + "\n")
            if validation and iteration in validation:
                record = {"iteration": iteration, "lm_loss_validation": validation[iteration]}
                file.write(json.dumps(record | {"consumed_samples": 8 * iteration}) + "\n")
    return path


CONSOLE = """\
 [2026-11-23 04:00:00.123456] iteration        5/      10 | consumed samples:           40 | \
elapsed time per iteration (ms): 200.0 | learning rate: 2.500000E-04 | global batch size:     8 | \
lm loss: 3.000000E+00 | loss scale: 1.0 | grad norm: 1.235 | number of skipped iterations:   0 |
some other output | lm loss: 9
------------------------------
 validation loss at iteration 5 | lm loss value: 3.500000E+00 | lm loss PPL: 3.3E+01 |
 [2026-11-23 04:00:00.123456] iteration       10/      10 | consumed samples:           80 | lm loss: 2.000000E+00 |
 validation loss at iteration 10 on validation set | lm loss value: 2.500000E+00 | lm loss PPL: 1.2E+01 |
 validation loss at iteration 10 on test set | lm loss value: 7.000000E+00 | lm loss PPL: 1.0E+03 |
"""


def test_reads_metrics_and_console_logs(tool: ModuleType, tmp_path: Path) -> None:
    run = tool.load(metrics(tmp_path / "a", [3.0, 2.0, 1.0], {2: 2.5}), "a", "lm_loss", "iteration", 1)
    assert run.curve == [(1, 3.0), (2, 2.0), (3, 1.0)] and run.validation == [(2, 2.5)]
    (tmp_path / "b.log").write_text(CONSOLE)
    run = tool.load(tmp_path / "b.log", "b", "lm_loss", "samples", 1)
    assert run.curve == [(40, 3.0), (80, 2.0)]
    run = tool.load(tmp_path / "b.log", "b", "lm_loss", "iteration", 1)
    assert run.curve == [(5, 3.0), (10, 2.0)] and run.validation == [(5, 3.5), (10, 2.5)]
    assert tool.load(tmp_path / "b.log", "b", "grad_norm", "iteration", 1).curve == [(5, 1.235)]


def test_a_later_line_of_an_iteration_wins(tool: ModuleType, tmp_path: Path) -> None:
    file = metrics(tmp_path / "a", [3.0, 2.0, 1.0])
    with file.open("a") as stream:
        stream.write('{"iteration": 2, "lm_loss": 1.5}\n{"iteration": 3, "lm_loss": null}\n{"iteration": 4, "lm_')
    assert tool.load(file, "a", "lm_loss", "iteration", 1).curve == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_validations_against_samples_and_tokens(tool: ModuleType, tmp_path: Path) -> None:
    """Their lines do not say how many there were: the training's of the same iteration do."""
    lines = [{"iteration": i, "consumed_samples": 8 * i, "consumed_tokens": 256 * i, "lm_loss": 5.0} for i in (1, 2)]
    lines.append({"iteration": 2, "consumed_samples": 16, "lm_loss_validation": 4.0})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tool.load(tmp_path / "m.jsonl", "a", "lm_loss", "tokens", 1).validation == [(512.0, 4.0)]
    (tmp_path / "c.log").write_text(CONSOLE)
    assert tool.load(tmp_path / "c.log", "a", "lm_loss", "samples", 1).validation == [(40.0, 3.5), (80.0, 2.5)]


def test_a_log_that_is_cut_off(tool: ModuleType, tmp_path: Path) -> None:
    """In the middle of a number, as a log is whose run has been killed."""
    for number, end in enumerate(("lm loss: 2.000000E", "lm loss value: 2.500000E")):
        file = tmp_path / f"{number}.log"
        file.write_text(CONSOLE[: CONSOLE.rindex(end) + len(end)])
        assert tool.load(file, "b", "lm_loss", "iteration", 1).curve[0] == (5, 3.0)


def test_smoothing(tool: ModuleType) -> None:
    points = [(1.0, 4.0), (2.0, 2.0), (3.0, 0.0)]
    assert tool.smoothed(points, 1) == points
    assert tool.smoothed(points, 2) == [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0)]
    assert tool.smoothed(points, 9) == [(1.0, 4.0), (2.0, 3.0), (3.0, 2.0)]


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_chart_is_aligned(tool: ModuleType, unicode: bool, colour: bool, count: int) -> None:
    runs = [
        tool.Run(f"run {i}", [(x, 10.0 / x + i) for x in range(1, 101)], [(50.0, 1.0 + i), (100.0, 0.5 + i)])
        for i in range(count)
    ]
    text = tool.chart(runs, "lm_loss", "iteration", 80, unicode=unicode, colour=colour)
    assert ("\x1b" in text) == colour and (text.isascii() or unicode)
    lines = re.sub(r"\x1b\[\d+m", "", text).splitlines()
    assert max(map(len, lines[:20])) <= 80 and lines[0].strip() == "lm loss"
    axis = {line.index("┤" if unicode else "+") for line in lines[1:18:4]}
    assert len(axis) == 1 and all(line[axis.copy().pop()] in "┤│+|" for line in lines[1:18])
    numbers = [line.split()[0] for line in lines[1:18:4]]
    assert [float(n) for n in numbers] == sorted(map(float, numbers), reverse=True)
    assert len({len(n.split(".")[1]) for n in numbers}) == 1
    assert lines[19].split() == ["1", "iteration", "100"]
    assert text.count("◆" if unicode else "#") == 2 * count + count  # points and legend
    for i, line in enumerate(lines[20:]):
        assert f"run {i}" in line and f"lowest {0.5 + i:.4g}" in line


def test_chart_puts_points_where_they_belong(tool: ModuleType) -> None:
    falling = tool.Run("a", [(0.0, 1.0), (100.0, 0.0)], [])
    rows = tool.chart([falling], "m", "iteration", 60, unicode=False, colour=False).splitlines()[1:18]
    columns = [(row.index("*"), row.rindex("*")) for row in rows if "*" in row]
    assert len(columns) == 17 and columns == sorted(columns)
    assert all(later[0] <= earlier[1] + 1 for earlier, later in zip(columns, columns[1:], strict=False))  # no gaps


@pytest.mark.parametrize("points", [[(5.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3e-5)]])
def test_chart_of_a_single_point_or_a_flat_line(tool: ModuleType, points: list) -> None:
    text = tool.chart([tool.Run("a", points, [])], "m", "iteration", 40, unicode=False, colour=False)
    assert "*" in "".join(line.partition("|")[2] + line.partition("+")[2] for line in text.splitlines()[1:18])


def test_command(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    a, b = metrics(tmp_path / "a.jsonl", [3.0, 2.0]), metrics(tmp_path / "b.jsonl", [2.0, 1.0], {1: 2.5})
    tool.main([str(a), str(b), "--labels", "plain", "hyper"])
    out = capsys.readouterr().out
    assert "plain" in out and "hyper" in out
    picture = tmp_path / "out" / "loss.png"
    tool.main([str(a), str(b), "--output", str(picture), "--smooth", "2"])
    assert capsys.readouterr().out == f"wrote {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG") and [path.name for path in picture.parent.iterdir()] == [
        "loss.png"
    ]
    tool.main([str(a), "--output", str(tmp_path / "loss.svg"), "--ascii"])
    assert "lm loss" in capsys.readouterr().out and "<svg" in (tmp_path / "loss.svg").read_text()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("missing.jsonl", "missing.jsonl cannot be read: No such file or directory"),
        ("empty", "empty has no points of lm_loss against iteration: it holds no lines of metrics"),
        ("a --metric loss", "a has no points of loss against iteration: it has lm_loss"),
        ("a --against tokens", "a has no points of lm_loss against tokens: it holds no lines of metrics"),
        ("a --labels x y", "--labels has 2 names for 1 runs: give one for each"),
        ("a --smooth 0", "--smooth must be at least 1, not 0"),
        ("a --output a/loss.png", "a/loss.png cannot be written: "),
        ("a --output loss.xyz", "--output loss.xyz: a picture's name ends in .png, .svg or .pdf"),
    ],
)
def test_mistakes(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics(Path("a"), [1.0])
    Path("empty").write_text("nothing\n")
    with pytest.raises(SystemExit) as caught:
        tool.main(argv.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"plot_loss.py: error: {message}")


def test_missing_matplotlib_names_the_extra(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        tool.main([str(metrics(tmp_path / "a", [1.0])), "--output", str(tmp_path / "a.png")])
    assert "pip install 'megatron_hc[log]'" in capsys.readouterr().err
