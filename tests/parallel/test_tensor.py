"""Tensor parallelism beyond training steps: padding, logits for generation; and sums of many bf16 gradients."""

from __future__ import annotations

import copy
import unittest.mock

import numpy as np
import pytest
import torch
from cells import AXES, SHAPES, SP, TP2, TP4
from helpers import small_config
from parity import Cell, RandomSamples, Runs, move_off_initial_values, run_steps
from pool import Pool, mesh

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.data.loader import build_loader
from megatron_hc.model.generate import Sampling, generate
from megatron_hc.model.linear import NormLayer
from megatron_hc.parallel.tensor import Region, WidthParallelNorm, become


@pytest.mark.parametrize("layout", ["", TP4])
@pytest.mark.parametrize("tables", ["", "--untie-embeddings-and-output-weights"])
def test_padding_changes_nothing(runs: Runs, layout: str, tables: str) -> None:
    """Rows that pad the vocabulary of 23 to as many as 512: the same numbers up to the order of sums."""
    world_size = 4 if layout else 1
    least = runs.outcome(Cell(tables, layout, world_size=world_size))
    for multiple in (16, 128):
        padded = f"{tables} --make-vocab-size-divisible-by {multiple}"
        more = runs.outcome(Cell(padded, layout, world_size=world_size))
        np.testing.assert_allclose(more.losses, least.losses, rtol=1e-14)
        np.testing.assert_allclose(more.grad_norms, least.grad_norms, rtol=1e-12)


def zeros_in_gradient(cell: Cell) -> int | None:
    """What --log-num-zeros-in-grad shows of the first step."""
    parsed = parse([*cell.flags, "--log-num-zeros-in-grad"])
    own = mesh(parsed.config, cell.world_size)
    if own is None:
        return None
    run, found = train.set_up(parsed, own), []
    run.logger.step = lambda num_zeros, **others: found.append(num_zeros)  # type: ignore[method-assign]
    samples = RandomSamples(8, parsed.config.model.seq_length, run.tokenizer.vocab_size)
    train.train_step(run, build_loader(samples, own, micro_batch_size=parsed.config.training.micro_batch_size))
    return found[0]


@pytest.mark.parametrize(("layout", "world_size"), [(TP4, 4), ("", 2), ("--pipeline-model-parallel-size 2", 2)])
@pytest.mark.parametrize("tables", ["", "--untie-embeddings-and-output-weights"])
def test_padding_is_not_counted_among_zeros(pool: Pool, layout: str, world_size: int, tables: str) -> None:
    model = f"{SHAPES['gpt']} --disable-bias-linear {tables}"  # the keys' bias has gradients of rounding errors
    padded = f"{model} --make-vocab-size-divisible-by 128"
    whole, *_ = pool.run(zeros_in_gradient, Cell(model))
    assert whole >= 4 * 16  # positions that no sample reaches
    found = pool.run(zeros_in_gradient, Cell(padded, layout, world_size=world_size))[:world_size]
    assert found == [whole] * world_size


def with_many_zeros(cell: Cell) -> int | None:
    with unittest.mock.patch("megatron_hc.parallel.data.num_zeros", lambda parts: 2**24 + 1):
        return zeros_in_gradient(cell)


def test_more_zeros_than_fp32_counts(pool: Pool) -> None:
    assert pool.run(with_many_zeros, Cell(precision="fp32"))[0] == 2**24 + 1


def logits_and_text(cell: Cell) -> tuple[np.ndarray, list[int]] | None:
    """Logits of a batch, and a greedy continuation with the key/value cache (without sequence parallelism)."""
    parsed = parse(cell.flags)
    own = mesh(parsed.config, cell.world_size)
    if own is None:
        return None
    run = train.set_up(parsed, own)
    move_off_initial_values(run)
    tokens = torch.arange(16).reshape(2, 8) % run.tokenizer.vocab_size
    with torch.no_grad():
        logits = run.model.output.logits(run.model(tokens)).numpy()
    text: list[int] = []
    if not own.sequence_parallel:
        text = list(generate(run.model, [1, 2, 3], 5, Sampling(temperature=0), eod=-1))
    return logits, text


@pytest.mark.parametrize("axes", ["tp2", "tp4", "tp2-sp", "tp4-sp"])
@pytest.mark.parametrize("tables", ["", "--untie-embeddings-and-output-weights"])
def test_logits_for_generation(pool: Pool, axes: str, tables: str) -> None:
    model = f"{SHAPES['llama']} {tables} --residual-connection hyper --group-query-attention --num-query-groups 2"
    world_size, layout = AXES[axes]
    (whole, text), *_ = pool.run(logits_and_text, Cell(model))
    for found in pool.run(logits_and_text, Cell(model, layout, world_size=world_size)):
        if found is not None:
            np.testing.assert_allclose(found[0], whole, rtol=1e-10, atol=1e-12)
            assert whole.shape[-1] == 23
            assert SP in layout or found[1] == text
    assert len(text) == 5


def accumulation_error(cell: Cell) -> float | None:
    """|sum as trained - fp64 sum of the same micro-batch gradients| / |fp64 sum|, over all parameters."""
    parsed = parse(cell.flags)
    own = mesh(parsed.config, cell.world_size)
    if own is None:
        return None
    run = train.set_up(parsed, own)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in run.model.named_parameters()}

    def add(name: str, gradient: torch.Tensor) -> None:
        expected = run.model.get_parameter(name).dtype
        assert gradient.dtype == expected
        sums[name] += gradient.double()

    for name, parameter in run.model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: add(name, gradient))
    assert any(p.dtype == torch.bfloat16 for p in run.model.parameters())
    run_steps(run, 1)
    total = {slot.name: slot.grad for slot in run.optimizer.slots}
    group = own.group("dp_cp")
    for name in sorted(sums):
        if group is not None:
            torch.distributed.all_reduce(sums[name], group=group)
    error = sum(float((total[name].double() - sums[name]).square().sum()) for name in sums)
    return (error / sum(float(s.square().sum()) for s in sums.values())) ** 0.5


@pytest.mark.parametrize("world_size", [1, 2])
def test_many_micro_batches_in_bf16(pool: Pool, world_size: int) -> None:
    """64 micro-batches; sums in bf16 would be off by more than 1e-3."""
    batch = "--micro-batch-size 1 --global-batch-size 64"
    model = f"{SHAPES['llama']} --residual-connection mhc --clip-grad 0"
    layout = "--data-parallel-sharding-strategy no_shard" if world_size > 1 else ""
    cell = Cell(model, layout, world_size=world_size, precision="bf16", num_steps=1, batch=batch)
    errors = [error for error in pool.run(accumulation_error, cell) if error is not None]
    assert len(errors) == world_size and max(errors) <= 1e-7, errors


def test_a_table_that_is_cut_is_the_whole_one(runs: Runs) -> None:
    """Twice the ranks, the same rows: also where the last rank has nothing but padding."""
    for layout, world_size in ((TP2, 2), (TP4, 4)):
        # 5 tokens for 4 ranks of 8 rows: three ranks have padding only.
        runs.check(Cell("--vocab-size 4 --make-vocab-size-divisible-by 8", layout, world_size=world_size, num_steps=2))


@pytest.mark.parametrize("axes", ["tp2", "tp4-sp"])
@pytest.mark.parametrize(
    "norms",
    ["--norm-placement reordered --rmsnorm-bias", "--normalization LayerNorm --disable-bias-layernorm --openai-gelu"],
)
def test_norms_across_heads(runs: Runs, axes: str, norms: str) -> None:
    """OLMo 2's norm of queries and keys looks at the heads of all ranks."""
    world_size, layout = AXES[axes]
    shape = SHAPES["llama"] if "gelu" not in norms else SHAPES["gpt"]
    heads = "--group-query-attention --num-query-groups 2" if axes == "tp2" else ""
    model = f"{shape} {norms} {heads} --qk-layernorm --qk-layernorm-across-heads"
    runs.check(Cell(model, layout, world_size=world_size, num_steps=3))


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_of_a_cut_width_is_computed_in_fp32(kind: str) -> None:
    """Of bf16 numbers with a mean far from 0, the one rounding at the end apart."""
    plain = NormLayer(small_config(normalization=kind, disable_bias_linear=False), 64)
    torch.nn.init.constant_(plain.weight, 1.0)
    cut = copy.deepcopy(plain)
    for layer in (plain, cut):
        layer.bias = None
    become(cut, WidthParallelNorm, region=Region(None, False))
    x = (torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    equal = (cut(x) == plain.double()(x.double()).bfloat16()).double().mean()
    assert equal > 0.999, equal
