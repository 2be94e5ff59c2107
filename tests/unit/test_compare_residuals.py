"""tools/compare_residuals.py, its report, tools/inspect_residual.py: statistics by hand, and one small run of all."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_connections import Checker

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def tool(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


compare, reports, inspect = (tool(n) for n in ("compare_residuals", "comparison_report", "inspect_residual"))


def result(name: str, seed: int, loss: float, lr: float = 1e-3, **changes: object):
    values = {
        "diverged": False,
        "curve": [(100.0 * i, loss + 4 / i) for i in range(1, 61)],
        "validation": [(1000.0, loss + 2), (3000.0, loss + 1), (6000.0, loss)],
        "seconds": 0.5,
        "memory_bytes": 2.0**30,
        "largest_grad_norm": 1.5,
        "spikes": 0,
    }
    return reports.Result(name, lr, seed, **{**values, **changes})


# Statistics


def test_a_run_is_read(tmp_path: Path) -> None:
    """With batches that grow; a validation that was not finite is the worst there is."""
    same = {"seconds_per_iteration": 1.0, "memory_bytes": 5, "grad_norm": 1.0}
    lines = [
        {"iteration": 1, "consumed_tokens": 100, "lm_loss": 8.0, **same},
        {"iteration": 1, "consumed_tokens": 100, "lm_loss_validation": 7.5},
        {"iteration": 3, "consumed_tokens": 600, "lm_loss": 6.0, **same},
        {"iteration": 3, "consumed_tokens": 600, "lm_loss_validation": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = reports.read_result(tmp_path, "a", 1e-3, 1, diverged=False)
    assert run.curve == [(100, 8.0), (600, 6.0)] and run.validation == [(100, 7.5), (600, math.inf)]


def test_interval_is_students() -> None:
    mean, low, high = reports.interval([1.0, 2.0, 4.0])
    half = 4.303 * math.sqrt(7 / 3) / math.sqrt(3)  # t(0.975, 2), variance 7 / 3
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert math.isnan(reports.interval([1.0])[1])
    assert reports.t_quantile(40) == pytest.approx(2.0211, abs=1e-4)
    assert reports.t_quantile(60) == pytest.approx(2.0003, abs=1e-4)
    assert len(reports.T_975) == 30 and list(reports.T_975) == sorted(reports.T_975, reverse=True)


def test_tokens_to_reach() -> None:
    curve = [(10.0, 3.0), (20.0, 2.0), (30.0, 2.5), (40.0, 1.0)]
    assert reports.tokens_to_reach(curve, 2.25) == 17.5
    assert reports.tokens_to_reach(curve, 3.5) == 10.0
    assert reports.tokens_to_reach(curve, 1.75) == 35.0
    assert reports.tokens_to_reach(curve, 0.5) == math.inf
    assert reports.tokens_to_reach([(10.0, 2.0), (20.0, 3.0), (30.0, 1.0)], 2.25) == 10.0, "up again after it"
    assert reports.tokens_to_reach([(10.0, 2.0)], 2.0) == 10.0, "one validation, at the end"
    assert reports.tokens_to_reach([(10.0, math.inf), (20.0, 1.0)], 2.0) == 20.0


def test_best_rate_is_the_lowest_point_of_a_parabola() -> None:
    depth = tool("benchmark_depth")
    losses = {2.0**x: (x + 6.25) ** 2 + 1 for x in (-8, -7, -6, -5)}
    assert depth.best_rate(losses) == pytest.approx(-6.25)
    assert depth.best_rate({**losses, 2.0**-8: 0.0}) == -8  # an end of the sweep
    assert depth.best_rate({**losses, 2.0**-4: math.nan}) == pytest.approx(-6.25)


def test_spikes_count_once() -> None:
    calm = [2.0 + 0.01 * (i % 5) for i in range(120)]
    assert reports.num_spikes(calm) == 0
    assert reports.num_spikes([*calm[:60], 3.0, 3.1, *calm[62:90], 4.0, *calm[91:]]) == 2


def test_summary_is_paired_and_takes_the_best_rate() -> None:
    results = [result("plain", seed, 2.0 + 0.5 * seed) for seed in (1, 2, 3)]
    results += [result("a", seed, 1.9 + 0.5 * seed + 0.01 * seed, seconds=0.75) for seed in (1, 2, 3)]
    results += [result("a", seed, 9.0, lr=1e-2) for seed in (1, 2, 3)]
    results += [result("b", 1, 2.7), result("b", 2, 3.2, diverged=True), result("b", 3, 3.3)]
    plain, a, b = reports.summarise(results, {"plain": 10, "a": 11, "b": 12})
    assert plain.difference == 0 and plain.tokens_ratio == 1 and plain.mean == pytest.approx(3.0)
    assert a.lr == 1e-3 and a.num_runs == 3 and a.difference == pytest.approx(-0.08)
    assert a.low == pytest.approx(-0.08 - 4.303 * 0.01 / math.sqrt(3)) and a.high < 0 and not a.is_noise
    assert a.time_ratio == 1.5 and a.num_parameters == 11 and a.num_reached == 3
    assert 0.9 < a.tokens_ratio < 1
    assert b.num_diverged == 1 and b.difference == pytest.approx(-0.0, abs=0.21) and b.is_noise
    assert reports.verdict([plain, a, b]) == "a is better than plain; b is not told apart from plain by these runs."


def test_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    results = [
        result(name, seed, 2 + seed / 10 + shift) for name, shift in (("plain", 0), ("x <y>", -0.1)) for seed in (1, 2)
    ]
    summaries = reports.summarise(results, {"plain": 1, "x <y>": 2})
    content = reports.page(results, summaries, ["What & how."], "A < B")
    checker = Checker()
    checker.feed(content)
    assert checker.open == [] and {"svg", "table", "circle"} <= checker.seen
    assert (
        "script" not in checker.seen
        and "http" not in content
        and "x &lt;y&gt;" in content
        and "What &amp; how." in content
    )
    reports.write_csv(results, summaries, tmp_path)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["plain", "plain", "x <y>", "x <y>"] and float(
        rows[0]["validation_loss"]
    ) == 2.1


# Tasks


def options_of(tmp_path: Path, *more: str):
    return compare.parse_arguments(["--output", str(tmp_path), "--lrs", "1e-3", *more])


def test_methods() -> None:
    assert compare.read_method("hyper") == ("hyper", ["--residual-connection", "hyper"])
    wanted = ("s", ["--residual-connection", "hyper", "--static-residual"])
    assert compare.read_method("s=hyper --static-residual") == wanted
    assert compare.read_method("v=--value-residual half")[1] == [
        "--residual-connection",
        "plain",
        "--value-residual",
        "half",
    ]


SHARED = """--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 --train-iters 6
    --eval-interval 3 --eval-iters 1 --num-workers 0 --device cpu"""


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--methods", "plain", "plain"], "--methods has a name twice"),
        (["--methods", "="], "must be NAME or NAME=CONNECTION AND FLAGS"),
        (["--methods", "plain", "--", "--lr", "1"], "--lr behind -- is set by the comparison"),
        (["--methods", "plain", "--", "--lr=1"], "--lr behind -- is set by the comparison"),
        (["--methods", "plain", "x=hyper --seed 3"], "--seed of method x cannot be its own"),
        (["--methods", "hyper 4=hyper", "hyper_4=plain"], "would share the folder hyper_4-lr0.001-seed1"),
        (["--methods", "x=hyper 'y"], '--methods "x=hyper \'y": No closing quotation'),
        (["--methods", "plain", "--launcher", "", "--", *SHARED.split()], "--launcher is empty"),
        (["--methods", "plain", "--launcher", "'", "--", *SHARED.split()], "--launcher ': No closing quotation"),
        (["--methods", "plain", "--seeds", "0"], "--seeds must be at least 1"),
        (["--methods", "plain", "--task", "3"], r"--task \(3\) must be in 0 .. 2"),
        (["--methods", "plain", "hypr", "--", "--num-layers", "1"], "method plain: "),
        (["--methods", "plain", "--input", "/nowhere", "--", *SHARED.split()], "--input /nowhere cannot be read"),
        (["--methods", "plain", "--input", "x", "--", *SHARED.split(), "--eval-iters", "0"], "--eval-iters above 0"),
        (
            ["--methods", "plain", "x=hypr", "--input", "x", "--", *SHARED.split()],
            "method x: --residual-connection: must be one of .*did you mean hyper",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(["--output", str(tmp_path), "--lrs", "1e-3", *arguments])
    assert caught.value.code == 2 and re.search(message, capfd.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--samples 3", "--samples would do nothing without --input"),
        ("--samples 0 --input x", "--samples (0) must be at least 1"),
        ("--prompt The --input x", "--prompt would do nothing with --input"),
        ("--png page.html", "--png and --output both name page.html"),
        ("--png .", "--png . is a folder"),
        ("--device nonsense", "--device nonsense must be auto, cpu, cuda or cuda:K"),
        ("--device meta", "--device meta must be"),
        ("--device cuda:99", "--device cuda:99 is not there"),
    ],
)
def test_refusals_of_inspect_residual(arguments: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded: there is no checkpoint."""
    with pytest.raises(SystemExit) as caught:
        inspect.main(["nowhere", "--output", "page.html", *arguments.split()])
    assert caught.value.code == 2 and message in capfd.readouterr().err


def test_flags_joined_to_their_values_count(tmp_path: Path) -> None:
    """--save-interval=2 is not followed by the tool's own, which would win."""
    shared = [*SHARED.split(), "--mock-data", "--tokenizer-type", "ByteTokenizer", "--save-interval=2"]
    options, shared = compare.parse_arguments(
        ["--output", str(tmp_path), "--methods", "plain", "--lrs", "1", "--", *shared, "--log-interval=3"]
    )
    command = compare.tasks_of(options, shared)[0].command(["python"])
    assert "--save-interval" not in command and "--log-interval" not in command


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    shared = [*SHARED.split(), "--mock-data", "--tokenizer-type", "ByteTokenizer"]
    options, shared = compare.parse_arguments(
        ["--output", str(tmp_path), "--methods", "plain", "--lrs", "1", "--", *shared]
    )
    with pytest.raises(ValueError, match="--launcher no-such-program cannot be started: No such file"):
        compare.run(compare.tasks_of(options, shared)[0], ["no-such-program"])


def test_tokens_are_those_that_runs_have_seen(tmp_path: Path) -> None:
    """Two processes without --global-batch-size share a step of twice as many samples."""
    shared = [*SHARED.split(), "--mock-data", "--tokenizer-type", "ByteTokenizer"]
    options, shared = compare.parse_arguments(
        ["--output", str(tmp_path), "--methods", "plain", "--lrs", "1", "--", *shared]
    )
    text = compare.sentences([result("plain", 1, 2.0)], compare.tasks_of(options, shared), options)
    assert "6,000 tokens each" in text[0] and text[-1].endswith(" 2 of 3 runs are not finished.")


def test_runs_resumes_and_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two methods, one seed; a task at a time as on a cluster; what is done is not done again."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 100)
    methods = "--methods plain hyper --seeds 1 --lrs 1e-3"
    arguments = f"--output {tmp_path / 'out'} --input {text} {methods} --TASK -- {SHARED} --value-residual learnable"
    for number in (0, 1):
        assert compare.main(arguments.replace("--TASK", f"--task {number}").split()) == 0
    folder = tmp_path / "out" / "runs" / "hyper-lr0.001-seed1"
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert compare.main(arguments.replace("--TASK", "").split()) == 0
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    out = capfd.readouterr().out
    assert "| hyper | 0.001 | 1 |" in out and "The learning rate was fixed at 0.001" in out
    assert {"compare.html", "runs.csv", "summary.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit):
        compare.main(arguments.replace("--TASK", "").replace("--train-iters 6", "--train-iters 7").split())
    assert "holds runs with other flags" in capfd.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("Whether 'tis nobler in the mind to suffer. " * 100)
    with pytest.raises(SystemExit):
        compare.main(arguments.replace("--TASK", "--report").replace(str(text), str(other)).split())
    assert "has data of another text" in capfd.readouterr().err
    metrics = (folder / "metrics.jsonl").read_text()
    for broken, file in ((metrics[:-9], "metrics.jsonl"), ("{", "comparison.json")):
        target = folder / file if file == "metrics.jsonl" else tmp_path / "out" / file
        target.write_text(broken)
        with pytest.raises(SystemExit):
            compare.main(arguments.replace("--TASK", "--report").split())
        assert f"{target} cannot be read" in capfd.readouterr().err
        (folder / "metrics.jsonl").write_text(metrics)
    page = tmp_path / "residual.html"
    assert inspect.main([str(folder), "--input", str(text), "--output", str(page), "--samples", "4"]) == 0
    checker = Checker()
    checker.feed(content := page.read_text())
    assert checker.open == [] and "script" not in checker.seen and "http" not in content
    for title in (
        "Signal",
        "Gradient",
        "Effective rank",
        "Composite gain",
        "Linearity",
        "Value residual",
        "Connections",
    ):
        assert title in content
    with pytest.raises(SystemExit):
        inspect.main([str(folder), "--input", "/nowhere", "--output", str(page)])
    assert "--input /nowhere cannot be read" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        inspect.main([str(folder), "--prompt", "x" * 16, "--output", str(page)])
    assert "--prompt has 16 tokens, which fill a training sample (16)" in capfd.readouterr().err
