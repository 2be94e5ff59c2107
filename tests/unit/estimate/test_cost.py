"""The roofline where it can be done by hand: times of a pass, of messages and of the optimizer; links of groups.

Bytes are of bf16 numbers. A micro-batch is 2 texts of 32 tokens; a layer has 64 channels, 4 query heads and 2 key/value
heads of 16, and an MLP 192 wide.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from megatron_hc.cli import parse
from megatron_hc.config import TrainConfig
from megatron_hc.estimate.cost import PassSeconds, Roofline, passes_of
from megatron_hc.estimate.hardware import Hardware
from megatron_hc.estimate.memory import state_bytes
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.estimate.trace import Pass, StageTrace

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--ffn-hidden-size 192 --seq-length 32 --position-embedding-type rope --swiglu --normalization RMSNorm "
    "--disable-bias-linear --bf16 --micro-batch-size 2 --train-iters 1 --lr 1e-4 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127"
)
HARDWARE = Hardware(
    name="x",
    memory_gb=1,
    peak_tflops=3,
    memory_tb_s=5,
    gpus_per_node=4,
    node_gb_s=70,
    network_gb_s=11,
    matmul_efficiency=0.5,
    memory_efficiency=0.25,
    boundary_efficiency=0.125,
    network_efficiency=0.75,
)
MEMORY = 5e12 * 0.25
TP2, SP = "--tensor-model-parallel-size 2", "--sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def seconds(flags: str, kind: str, part: Pass | None = None, world_size: int = 1, layers: int = 1) -> PassSeconds:
    """Of layers 1 and on."""
    config = parse([*MODEL.split(), *flags.split()]).config
    rank = PaperRank(config, world_size, 0, 128)
    return Roofline(config, HARDWARE, world_size).pass_seconds(rank, (1, 1 + layers), part or Pass(), kind)


def test_matrix_products() -> None:
    assert seconds("", "backward_weight", Pass(flops=6e9)).matmul == pytest.approx(6e9 / (3e12 * 0.5))


def test_all_parts_add_up() -> None:
    assert PassSeconds() == PassSeconds(0, 0, 0, 0, 0)
    assert PassSeconds(1, 20, 300, 4_000, 50_000).total == 54_321


HEADS = 2 * (4 + 2) * 16
"""Numbers of a token that attention reads and writes; rotary embedding moves as many."""


@pytest.mark.parametrize(
    ("flags", "world_size", "numbers"),
    [
        ("", 1, 64 * (2 * HEADS + 3 * 192)),
        ("--no-swiglu", 1, 64 * (2 * HEADS + 2 * 192)),
        ("--position-embedding-type none", 1, 64 * (HEADS + 3 * 192)),
        (TP2, 2, 64 * (2 * HEADS + 3 * 192) / 2),
        (f"{TP2} {SP}", 2, 64 * (2 * HEADS + 3 * 192) / 2),
        ("--context-parallel-size 2", 2, 32 * (2 * HEADS + 3 * 192)),
        # 3 experts of 16 for each token, whose 64 channels go there and back, read and written
        ("--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 3", 1, 64 * (2 * HEADS + 3 * (3 * 16 + 4 * 64))),
        (
            "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 3 --moe-shared-expert-intermediate-size 40",
            1,
            64 * (2 * HEADS + 3 * (3 * 16 + 4 * 64 + 40)),
        ),
        (
            f"--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 3 {TP2} {SP}",
            2,
            64 * (2 * HEADS + 3 * (3 * 16 + 4 * 64)) / 2,
        ),
    ],
)
def test_element_wise_work(flags: str, world_size: int, numbers: float) -> None:
    """Twice as much backward, and forward's once more where layers are run again; none with weights' gradients."""
    forward = 2 * numbers / MEMORY
    assert seconds(flags, "forward", world_size=world_size).elementwise == pytest.approx(forward)
    assert seconds(flags, "forward", world_size=world_size, layers=2).elementwise == pytest.approx(2 * forward)
    for kind in ("backward", "backward_input"):
        assert seconds(flags, kind, world_size=world_size).elementwise == pytest.approx(2 * forward)
    assert seconds(f"{flags} {FULL}", "forward", world_size=world_size).elementwise == pytest.approx(forward)
    assert seconds(f"{flags} {FULL}", "backward", world_size=world_size).elementwise == pytest.approx(3 * forward)
    assert seconds(flags, "backward_weight", world_size=world_size) == PassSeconds()


def test_element_wise_work_in_fp32() -> None:
    assert seconds("--no-bf16", "forward").elementwise == pytest.approx(2 * seconds("", "forward").elementwise)


HYPER = "--residual-connection hyper --no-fused-residual"
SELECTIVE = "--recompute-granularity selective --recompute-modules residual"


@pytest.mark.parametrize(
    ("flags", "world_size", "forward", "backward"),
    [
        # Two boundaries: streams and an output read, streams and an input written; their gradients the same way.
        ("", 1, 64 * 2 * (2 + 2), 64 * 2 * (2 + 2)),
        ("--no-bf16", 1, 64 * 2 * (4 + 4), 64 * 2 * (4 + 4)),
        (TP2, 2, 64 * 2 * (2 + 2), 64 * 2 * (2 + 2)),
        (f"{TP2} {SP}", 2, 32 * 2 * (2 + 2), 32 * 2 * (2 + 2)),
        ("--context-parallel-size 2", 2, 32 * 2 * (2 + 2), 32 * 2 * (2 + 2)),
        (FULL, 1, 64 * 2 * (2 + 2), 64 * 2 * (2 + 2 + 2 + 2)),
        # Of mixed streams the states are read once more for the weights' gradients.
        (HYPER, 1, 64 * 2 * (8 + 2), 64 * 2 * (12 + 3)),
        (f"{HYPER} {SELECTIVE}", 1, 64 * 2 * (8 + 2), 64 * 2 * (12 + 3 + 8 + 2)),
        (f"{HYPER} {FULL}", 1, 64 * 2 * (8 + 2), 64 * 2 * (12 + 3 + 8 + 2)),
        (f"{HYPER} {FULL} --recompute-modules residual", 1, 64 * 2 * (8 + 2), 64 * 2 * (12 + 3 + 2 * (8 + 2))),
        # One earlier state, read forward, read and its gradient written backward.
        ("--residual-connection denseformer", 1, 64 * 2 * (2 + 2 + 1), 64 * 2 * (3 + 3 + 2)),
        ("--residual-connection rezero", 1, 64 * 2 * (2 + 2), 64 * 2 * (3 + 3)),
        ("--fp32-residual-connection", 1, 64 * 2 * (4 + 2), 64 * 2 * (6 + 3)),
    ],
)
def test_the_residual_path_at_least(flags: str, world_size: int, forward: float, backward: float) -> None:
    """In numbers of one channel."""
    unit = 2 * 64 / MEMORY
    assert seconds(flags, "forward", world_size=world_size).residual == pytest.approx(forward * unit)
    assert seconds(flags, "backward_input", world_size=world_size).residual == pytest.approx(backward * unit)


def test_a_fused_residual_path() -> None:
    """10 and 24 passes of a boundary (test_time.py), two of them, each at the share that its kernels reach."""
    unit = 2 * 64 * 64 / (5e12 * 0.125)
    fused = "--residual-connection hyper"
    assert seconds(fused, "forward").residual == pytest.approx(2 * 10 * unit)
    assert seconds(fused, "backward").residual == pytest.approx(2 * 24 * unit)
    assert seconds(f"{fused} {SELECTIVE}", "backward").residual == pytest.approx(2 * (24 + 5) * unit)


LAYOUT = f"{TP2} {SP} --pipeline-model-parallel-size 2 --global-batch-size 32"
WITH_EXPERTS = f"{LAYOUT} --num-experts 4 --expert-model-parallel-size"


def rank_of(flags: str, world_size: int) -> tuple[TrainConfig, PaperRank]:
    config = parse([*MODEL.split(), *flags.split()]).config
    return config, PaperRank(config, world_size, 0, 128)


@pytest.mark.parametrize(
    ("flags", "world_size", "in_a_node", "across"),
    [
        (LAYOUT, 8, ("tp", "kv", "dp", "dp_cp"), ()),
        (LAYOUT, 16, ("tp", "kv"), ("dp", "dp_cp", "dp_cp_shard")),
        (LAYOUT, 8, ("dp",), ("embedding",)),
        (f"{LAYOUT} --context-parallel-size 2", 16, ("tp", "cp", "tp_cp"), ("dp_cp",)),
        (f"{LAYOUT.replace(' 2', ' 4', 1)} --group-query-attention --num-query-groups 4", 16, ("tp", "kv"), ("dp",)),
        (
            f"{LAYOUT} --context-parallel-size 4 --num-query-groups 4 --num-attention-heads 8",
            16,
            ("tp",),
            ("cp", "tp_cp"),
        ),
        (f"{WITH_EXPERTS} 2", 16, ("experts", "etp"), ("stage", "edp")),
        (f"{WITH_EXPERTS} 4", 16, ("tp", "etp"), ("experts",)),
        (f"{WITH_EXPERTS} 4 --expert-tensor-parallel-size 1", 16, ("experts", "etp"), ("edp", "stage")),
    ],
)
def test_links_of_groups(flags: str, world_size: int, in_a_node: tuple[str, ...], across: tuple[str, ...]) -> None:
    """Four GPUs to a node; a group's ranks lie apart by the sizes of those inside of it."""
    config, rank = rank_of(flags, world_size)
    roofline = Roofline(config, HARDWARE, world_size)
    found = {name: roofline.bandwidth(name, rank) for name in (*in_a_node, *across)}
    assert found == pytest.approx(dict.fromkeys(in_a_node, 70e9 * 0.75) | dict.fromkeys(across, 11e9 * 0.75))


def test_collectives_of_a_pass() -> None:
    """Each kind counts once, over its own group's link."""
    names = ("tp", "cp", "kv", "tp_cp", "experts", "etp", "stage")
    sent = Counter({(name, "all_gather"): 10**6 * 2**i for i, name in enumerate(names)} | {("tp", "x"): 10**9})
    found = seconds(f"{WITH_EXPERTS} 4", "forward", Pass(sent=sent), world_size=16)
    node, network = 70e3 * 0.75, 11e3 * 0.75  # bytes in 10^-6 s
    assert found.tensor == pytest.approx((1 + 2 + 4 + 8 + 1000) / node)
    assert found.expert == pytest.approx(16 / network + 32 / node + 64 / network)


@pytest.mark.parametrize(("world_size", "rate"), [(4, 70), (8, 11)])
def test_messages_between_stages(world_size: int, rate: int) -> None:
    config, _ = rank_of(LAYOUT, 8)
    assert Roofline(config, HARDWARE, world_size).message_seconds(10**6) == pytest.approx(1e6 / (rate * 0.75e9))


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        ("", 30),  # 12 bytes read and written, 4 of the gradient read and 2 of the weight written
        ("--no-bf16", 28),  # 12 read and written, the weight among them, and 4 of the gradient read
        ("--optimizer-cpu-offload", 2),
    ],
)
def test_the_optimizer(flags: str, moved: int) -> None:
    """Bytes of each parameter; norms, which are fp32 throughout, have 28 of their own."""
    config, rank = rank_of(flags, 1)
    norms = 9 * 64
    numbers = sum(parameter.numel() for _, parameter, _ in rank.parameters())
    found = Roofline(config, HARDWARE, 1).optimizer_seconds(state_bytes(rank))
    wide = 4 if "offload" in flags else 28
    assert found == pytest.approx((moved * (numbers - norms) + wide * norms) / MEMORY)


def test_passes_of_a_schedule() -> None:
    """Where weights' gradients may come apart, a whole backward pass does both, and holds the larger of the two."""
    parts = [Pass(1.0, 5), Pass(20.0, 7, Counter({("tp", "x"): 3})), Pass(300.0, 9, Counter({("tp", "x"): 40}))]
    trace = StageTrace(10, *parts)
    assert passes_of(trace, False) == {"forward": parts[0], "backward": parts[1]}
    found = passes_of(trace, True)
    assert found.pop("backward") == Pass(320.0, 9, Counter({("tp", "x"): 43}))
    assert found == dict(zip(("forward", "backward_input", "backward_weight"), parts, strict=True))
    swapped = dataclasses.replace(trace, backward=parts[2], weight=parts[1])
    assert passes_of(swapped, True)["backward"].peak_bytes == 9
