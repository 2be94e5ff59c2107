"""The connection matrix against what is known of the methods, and the page of tools/compare_runs.py."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import VOCAB, build, small_config

from megatron_hc.cli import parse
from megatron_hc.connections import connection_matrix, names
from megatron_hc.residual import RESIDUALS
from megatron_hc.residual.hyper import HyperConnection

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_compare_runs", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["plain", "hyper", "mhc", "denseformer"])
def test_what_begins_as_the_plain_residual_takes_everything_once(method: str) -> None:
    matrix = connection_matrix(build(small_config({"residual_connection": method})), tokens())
    assert matrix.shape == (7, 7)
    torch.testing.assert_close(matrix, torch.ones(7, 7, dtype=torch.float64).tril(), atol=1e-2, rtol=0)


def test_attention_residuals_begin_with_the_mean_of_all_outputs() -> None:
    matrix = connection_matrix(build(small_config({"residual_connection": "attention"})), tokens())
    wanted = torch.ones(7, 7, dtype=torch.float64).tril() / torch.arange(1, 8)[:, None]
    torch.testing.assert_close(matrix, wanted, atol=1e-6, rtol=0)


def test_static_hyper_connections_give_the_product_of_their_matrices() -> None:
    model = build(small_config({"residual_connection": "hyper", "residual_streams": 3, "static_residual": True}))
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for m in model.modules() if isinstance(m, HyperConnection) for p in m.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    found = connection_matrix(model, tokens())
    sites = [r for layer in model.stage_layers() for r in (layer.attention_residual, layer.mlp_residual)]
    stream = torch.zeros(1, 1, 3, sites[0].stream_width(), dtype=torch.float64)
    weights: list[torch.Tensor] = [torch.ones(3, dtype=torch.float64)]  # of each source in each stream
    for row, site in enumerate(sites):
        mix = site.weights(stream)
        read, write, keep = (part[0, 0].double() for part in mix)  # type: ignore[union-attr]
        for column, weight in enumerate(weights):
            torch.testing.assert_close(found[row, column], (weight @ read)[0], atol=1e-6, rtol=1e-6)
        weights = [weight @ keep for weight in weights] + [write[0]]
    for column, weight in enumerate(weights):
        torch.testing.assert_close(found[-1, column], weight.mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", sorted(RESIDUALS))
def test_every_method_has_a_matrix_and_is_left_as_it_was(method: str) -> None:
    model = build(small_config({"residual_connection": method}), "fp32")
    before = model(tokens())
    matrix = connection_matrix(model, tokens())
    assert matrix.isfinite().all() and (matrix.triu(1) == 0).all() and (matrix != 0).any()
    assert torch.equal(model(tokens()), before)


def test_names() -> None:
    assert names(2) == ["embed", "attn 0", "mlp 0", "attn 1", "mlp 1"]


# --- the page -----------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Counts the tags that are open, and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def run_of(compare: ModuleType, name: str, loss: float):
    return compare.Run(
        name,
        [(1000.0 * i, loss + 5 / i) for i in range(1, 30)],
        [(10_000.0, loss + 0.4), (29_000.0, loss)],
        1234.0,
        2**29,
        1000,
        10,
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [1.7, -0.2, 1.0]],
        [("def ", "f(x) < y & z:\n    <b>")],
        {"layers": 1},
    )


def test_page_is_whole_and_loads_nothing(compare: ModuleType) -> None:
    runs = [run_of(compare, "plain", 4.0), run_of(compare, "hyper <4>", 3.9)]
    content = compare.page(runs, "A & B")
    checker = Checker()
    checker.feed(content)
    assert checker.open == [] and {"svg", "polyline", "circle", "table", "pre"} <= checker.seen
    assert "script" not in checker.seen and "http" not in content and "url(" not in content
    assert "prefers-color-scheme: dark" in content
    assert "<b>hyper &lt;4&gt;</b> ends at a validation loss of <b>3.9000</b>, 0.1000 below plain (4.0000)" in content
    assert "f(x) &lt; y &amp; z:" in content and "A &amp; B" in content
    assert content.count("<circle") == 4 and "-0.1000" in content
    numbers = [float(x) for x in re.findall(r'c[xy]="([-\d.]+)"', content)]
    assert all(0 <= number <= 960 for number in numbers)


def test_runs_that_differ_in_more_than_the_residual_path(compare: ModuleType) -> None:
    """Of the same size and length on other data, or with another MLP, they have not seen "the same tokens"."""

    def run(words: str):
        given = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 4 --micro-batch-size 1 --lr 1"
        found = run_of(compare, "x", 4.0)
        found.others = compare.others_of(parse([*given.split(), *words.split()]).config)
        return found

    plain = run("--data-path a --save x")
    hyper = run("--data-path a --save y --residual-connection hyper --value-residual half --norm-placement peri")
    assert "only the residual path differs" in compare.fairness([plain, hyper])
    other = run("--data-path b --swiglu --residual-connection hyper")
    assert compare.fairness([plain, other]).endswith("in more than the residual path</b>: swiglu, data_path.")
    hyper.curve = hyper.curve[:-1]
    assert compare.fairness([plain, hyper]).endswith(": tokens seen.")


def test_ticks(compare: ModuleType) -> None:
    assert compare.ticks(0, 410_000, 6) == [0, 100_000, 200_000, 300_000, 400_000]
    assert compare.ticks(3.97, 4.31, 6) == [4.0, 4.1, 4.2, 4.3]
    assert [compare.short(x) for x in (5.0, 1500.0, 2_500_000.0, 3e9)] == ["5", "1.5k", "2.5M", "3B"]


def test_metrics_are_read(compare: ModuleType, tmp_path: Path) -> None:
    lines = [
        {"iteration": i, "lm_loss": 9.0 - i, "consumed_tokens": 100 * i, "tokens_per_second": s, "memory_bytes": i}
        for i, s in ((1, 1.0), (2, 50.0), (2, 70.0), (3, 90.0))
    ]
    lines[1:] = [{**line, "consumed_tokens": line["consumed_tokens"] + 100} for line in lines[1:]]  # larger batches
    for iteration, tokens, loss in ((1, 100, 7.5), (3, 400, 6.5)):
        lines.append({"iteration": iteration, "consumed_tokens": tokens, "lm_loss_validation": loss})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = compare.read_metrics("a", tmp_path)
    assert run.curve == [(100, 8.0), (300, 7.0), (400, 6.0)] and run.validation == [(100, 7.5), (400, 6.5)]
    assert run.tokens_per_second == 80.0 and run.memory_bytes == 3 and run.final_loss == 6.5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "consumed_tokens": 500, "lm_loss_validation": null}\n')
    with pytest.raises(ValueError, match="lm_loss_validation of iteration 4 is not finite"):
        compare.read_metrics("a", tmp_path)


def test_compare_refuses(compare: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{")
    for text, message in (("x", "x must be NAME=FOLDER"), (f"a={tmp_path}", "metrics.jsonl cannot be read")):
        with pytest.raises(SystemExit) as caught:
            compare.main([text, "--output", str(tmp_path / "o.html")])
        assert caught.value.code == 2 and message in capfd.readouterr().err


def test_picture(compare: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare.draw([run_of(compare, "plain", 4.0), run_of(compare, "hyper", 3.9)], "title", tmp_path / "o" / "c.png")
    assert (tmp_path / "o" / "c.png").read_bytes()[:4] == b"\x89PNG" and len(list((tmp_path / "o").iterdir())) == 1
