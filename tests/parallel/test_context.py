"""Context parallelism beyond the covering arrays: heads against tokens, documents, pipelines, what a rank keeps."""

from __future__ import annotations

import functools
import re

import pool as pools
import pytest
import torch
from cells import CP2, CP4, HEADS, RECOMPUTE, SHAPES, SP, TP2
from parity import TOLERANCES, Cell, Runs, differences
from pool import Pool
from torch import Tensor

from megatron_hc import train
from megatron_hc.cli import UsageError, parse
from megatron_hc.config import ParallelConfig
from megatron_hc.inference.decoder import check_can_write
from megatron_hc.parallel.collectives import own_part
from megatron_hc.parallel.context import HeadExchange
from megatron_hc.parallel.stages import MicroBatch, Stage

LLAMA = SHAPES["llama"]
HYPER = f"{LLAMA} --residual-connection hyper"
PP2 = "--pipeline-model-parallel-size 2"
S, B, Q, H = 8, 3, 4, 5


def exchanged(ranks: int, groups: int) -> list[tuple[Tensor, ...]] | None:
    """On a rank: its heads of q, k and v, tokens after the way back, and gradients of its tokens."""
    config = parse(Cell(layout=f"--context-parallel-size {ranks}").flags).config
    mesh = pools.mesh(config, ranks)
    if mesh is None:
        return None
    exchange = HeadExchange(mesh.group("cp"))
    inputs = [own_part(x, mesh.group("cp")).requires_grad_() for x in random_heads(groups)]
    heads = exchange.heads(*inputs)
    back = exchange.tokens(heads[0].flatten(2))
    loss = sum((x * weights_like(x, mesh.rank("cp"))).sum() for x in (*heads, back))
    grads = torch.autograd.grad(loss, inputs)
    return [tuple(t.detach() for t in part) for part in (heads, (back,), grads)]


def random_heads(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(S, B, heads, H, generator=generator, dtype=torch.float64) for heads in (Q, groups, groups)]


def weights_like(x: Tensor, rank: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(rank), dtype=x.dtype)


@pytest.mark.parametrize(("ranks", "groups"), [(2, 4), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1)])
def test_heads_for_tokens_and_back(pool: Pool, ranks: int, groups: int) -> None:
    """Every rank has all tokens of its queries, and of the keys and values that these look at; gradients likewise."""
    found = pool.run(exchanged, ranks, groups)[:ranks]
    q, k, v = (x.requires_grad_() for x in random_heads(groups))
    share = Q // ranks
    loss = torch.zeros((), dtype=torch.float64)
    for rank, (heads, (back,), _) in enumerate(found):
        of_query = [head * groups // Q for head in range(rank * share, (rank + 1) * share)]
        own = sorted(set(of_query))
        expected = q[:, :, rank * share : (rank + 1) * share], k[:, :, own], v[:, :, own]
        assert all(x.equal(y) for x, y in zip(heads, expected, strict=True))
        tokens = q.flatten(2).chunk(ranks)[rank]
        assert back.equal(tokens)
        for x in (*expected, tokens):
            loss = loss + (x * weights_like(x, rank)).sum()
    for index, grad in enumerate(torch.autograd.grad(loss, (q, k, v))):
        torch.testing.assert_close(torch.cat([grads[index] for _, _, grads in found]), grad)


LAYOUTS = {
    "cp4": (CP4, 4),
    "cp2-tp2": (f"{CP2} {TP2}", 4),
    "cp2-pp2": (f"{CP2} {PP2}", 4),
    "cp2-pp2-interleaved": (f"{CP2} {PP2} --num-virtual-stages-per-pipeline-rank 2", 4),
    "cp2-pp2-zbv": (f"{CP2} {PP2} --pipeline-schedule zbv", 4),
    "cp2-pp2-dualpipev": (f"{CP2} {PP2} --pipeline-schedule dualpipev", 4),
    "cp2-fully-sharded": (f"{CP2} --data-parallel-sharding-strategy optim_grads_params", 4),
}
METHODS = ("hyper", "mhc", "attention", "muddformer", "virtual-width", "denseformer", "frac")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turn", [0, pytest.param(range(1, len(METHODS)), marks=pytest.mark.slow)])
def test_layouts(runs: Runs, layout: str, turn: int | range) -> None:
    flags, world_size = LAYOUTS[layout]
    for shift in turn if isinstance(turn, range) else [turn]:
        method = METHODS[(list(LAYOUTS).index(layout) + shift) % len(METHODS)]
        model = f"{LLAMA} --num-layers 4 --residual-connection {method} --value-residual learnable {HEADS['kv2']}"
        runs.check(Cell(model, flags, world_size=world_size))


@pytest.mark.parametrize("recompute", [name for name in RECOMPUTE if name != "none"])
def test_recompute(runs: Runs, recompute: str) -> None:
    runs.check(Cell(f"{HYPER} {HEADS['kv1']}", CP2, RECOMPUTE[recompute], world_size=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_narrow_precisions(runs: Runs, precision: str) -> None:
    layout = f"{CP2} {TP2} {SP}"
    runs.check(Cell(f"{HYPER} --lr 1e-4", layout, world_size=4, precision=precision))


def with_documents(run: train.Run) -> None:
    """Documents that begin anywhere, whose positions begin again: some reach over the ranks' border, some do not."""
    step = run.pipeline.forward_backward

    def changed(batches: list[MicroBatch]) -> Tensor:
        return step([batch._replace(**documents_of(batch.tokens)) for batch in batches])

    run.pipeline.forward_backward = changed  # type: ignore[method-assign,assignment]


def documents_of(tokens: Tensor) -> dict[str, Tensor]:
    starts = tokens % 4 == 0
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    first = torch.where(starts, index, 0).cummax(1).values
    return {"document_ids": starts.long().cumsum(1), "position_ids": index - first}


@pytest.mark.parametrize("layout", [CP2, f"{CP2} {TP2} {SP}", CP4, f"{CP2} {PP2}"])
def test_documents_do_not_see_each_other(runs: Runs, layout: str) -> None:
    cell = Cell(HYPER, layout, world_size=2 if layout == CP2 else 4)
    whole = runs.outcome(cell.whole, with_documents)
    assert whole.losses != runs.whole(cell).losses
    found = differences(runs.outcome(cell, with_documents), whole, TOLERANCES["fp64"])
    assert not found, "\n".join(found[:10])


def broken(kind: str, run: train.Run) -> None:
    """A mistake that parity must see."""
    for layer in run.model.stage_layers():
        exchange = layer.attention.exchange
        if exchange is not None and kind == "attention of own tokens":
            layer.attention.exchange = None
        elif exchange is not None and kind == "others' heads":
            heads = exchange.heads
            exchange.heads = lambda q, k, v, heads=heads: heads(q.flip(2), k, v)
    if kind == "positions":
        for stage in run.pipeline.stages.values():
            stage._own = functools.partial(own_without_positions, stage)  # type: ignore[method-assign]


def own_without_positions(stage: Stage, batch: MicroBatch) -> MicroBatch:
    own = Stage._own(stage, batch)
    return own._replace(position_ids=torch.arange(own.tokens.shape[1]).unsqueeze(0))


@pytest.mark.parametrize("kind", ["attention of own tokens", "others' heads", "positions"])
def test_parity_sees_mistakes(runs: Runs, kind: str) -> None:
    cell = Cell(HYPER, CP2, world_size=2)
    assert not runs.differences(cell)
    assert runs.differences(cell, functools.partial(broken, kind))


def kept_streams(cell: Cell) -> tuple[int, ...] | None:
    """On a rank: shapes of the streams that enter its layers."""
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    seen = []
    for layer in run.model.stage_layers():
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].stream.shape)))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    run.pipeline.forward([MicroBatch(tokens, tokens, torch.ones(2, 8))])
    assert len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize(("layout", "tokens"), [(CP2, 4), (CP4, 2), (f"{CP2} {TP2} {SP}", 2)])
def test_a_rank_has_its_tokens_streams_only(pool: Pool, layout: str, tokens: int) -> None:
    cell = Cell(HYPER, layout, world_size=2 if layout == CP2 else 4)
    shapes = [shape for shape in pool.run(kept_streams, cell) if shape is not None]
    assert shapes == [(tokens, 2, 4, 16)] * cell.world_size


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--context-parallel-size 0", 2, "--context-parallel-size must be positive, not 0"),
        (CP2, 3, "--context-parallel-size (2) must divide the number of processes (3)"),
        (f"{CP2} {TP2}", 6, "--tensor-model-parallel-size (2) times --context-parallel-size (2) must divide"),
        ("--context-parallel-size 8", 8, "must divide the attention heads (4), of which every process takes a part"),
        (f"{CP4} {TP2}", 8, "must divide the attention heads of a tensor-parallel process (2)"),
        (
            f"{CP2} --num-attention-heads 6 --hidden-size 24 --group-query-attention --num-query-groups 3",
            2,
            "must divide the query groups (3) or be a multiple of them",
        ),
        (f"{CP2} --seq-length 7", 2, "--context-parallel-size (2) must divide --seq-length (7)"),
        (f"{CP2} {TP2} {SP} --seq-length 6", 4, "times --tensor-model-parallel-size (2) with --sequence-parallel must"),
        (f"{CP2} --deepspeed", 2, "--deepspeed and --context-parallel-size (2) exclude each other"),
        (f"{CP2} --num-distributed-optimizer-instances 3", 4, "data-parallel size times --context-parallel-size (4)"),
    ],
)
def test_refusals(flags: str, world_size: int, message: str) -> None:
    model = Cell(layout=flags, precision="fp32").flags
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(model).config.validate(world_size)


def refused_to_write(cell: Cell) -> str | None:
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    try:
        check_can_write(parsed.config, mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_text_is_not_written(pool: Pool) -> None:
    found = pool.run(refused_to_write, Cell(HYPER, CP2, world_size=2))[0]
    assert found == "text cannot be generated with --context-parallel-size 2: load the checkpoint without"


def test_megatrons_flag() -> None:
    assert ParallelConfig().context_parallel_size == 1
    flags = Cell(layout=CP2).flags
    assert parse(flags).config.parallel.context_parallel_size == 2
    with pytest.raises(UsageError, match="--cp-comm-type a2a is not needed here: context-parallel ranks exchange"):
        parse([*flags, "--cp-comm-type", "a2a"])
    with pytest.raises(UsageError, match="--cp-comm-type p2p"):
        parse([*flags, "--cp-comm-type", "p2p"])
