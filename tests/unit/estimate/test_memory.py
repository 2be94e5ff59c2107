"""Parameters, and activations that are really kept, against the estimates made on paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import VOCAB
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_hc.cli import parse
from megatron_hc.config import TrainConfig
from megatron_hc.estimate.memory import (
    StateBytes,
    active_parameters,
    data_parallel_bytes,
    state_bytes,
    total_parameters,
)
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.estimate.simulate import _memory, _ready
from megatron_hc.estimate.trace import trace
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import padded_vocab_size
from megatron_hc.parallel import recompute, recompute_reads
from megatron_hc.parallel.plan import build_model, cast_parameters, compute_dtype, materialize, placements
from megatron_hc.parallel.schedules import Action
from megatron_hc.parallel.stages import MicroBatch, Stage
from megatron_hc.residual import RESIDUALS

RUN = (
    "--seq-length 32 --micro-batch-size 2 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    f"--vocab-size {VOCAB - 1} --make-vocab-size-divisible-by 4 --device cpu --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear"
)
SIZES = {
    "small": "--num-layers 2 --hidden-size 32 --num-attention-heads 4",
    "deep": "--num-layers 5 --hidden-size 48 --num-attention-heads 4 --group-query-attention --num-query-groups 2",
    "wide": "--num-layers 2 --hidden-size 128 --num-attention-heads 8 --ffn-hidden-size 256 --bf16",
}
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-layer-freq 2"
RECOMPUTE = {
    "none": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
    "residual": "--recompute-granularity selective --recompute-modules residual",
}
TP2, TP4 = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"
PP2, SP = "--pipeline-model-parallel-size 2", "--sequence-parallel"
LAYOUTS = {
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "tp2-sp": (2, f"{TP2} {SP}"),
    "tp4-sp": (4, f"{TP4} {SP}"),
    "dp2": (2, ""),
    "dp4": (4, ""),
    "tp2-dp2": (4, TP2),
    "tp2-sp-dp2": (4, f"{TP2} {SP}"),
    "pp2": (2, PP2),
    "pp2-tp2": (4, f"{PP2} {TP2}"),
    "pp2-tp2-sp": (4, f"{PP2} {TP2} {SP}"),
    "pp2-dp2": (4, PP2),
}
EXPERT_LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "ep2-etp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"),
    "ep4": (4, "--expert-model-parallel-size 4"),
    "ep2-dp2": (4, "--expert-model-parallel-size 2"),
    "ep2-etp1": (4, f"{TP2} {SP} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "tp2-etp1": (2, f"{TP2} {SP} --expert-tensor-parallel-size 1"),
    "pp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}


def config_of(*parts: str) -> TrainConfig:
    return parse(" ".join((RUN, *parts)).split()).config


@pytest.mark.parametrize("experts", ["", EXPERTS], ids=["dense", "moe"])
@pytest.mark.parametrize("method", list(RESIDUALS))
def test_parameters(method: str, experts: str) -> None:
    """The whole model's are those of the real one; the ranks' parts make up the whole at every layout."""
    base = (SIZES["small"], f"--residual-connection {method}", experts)
    config = config_of(*base)
    model = build_model(config, VOCAB, Mesh())
    materialize(model, placements(model, Mesh()), 1, Mesh(), torch.float32)
    padding = (padded_vocab_size(config.model, VOCAB) - VOCAB) * config.model.hidden_size
    total = total_parameters(config, VOCAB)
    real = sum(p.numel() for p in model.parameters())
    assert sum(total.values()) == real - padding
    moe = config.model.moe
    if experts:
        experts_only = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        assert total["experts"] == experts_only and moe.num_experts == 4
        assert active_parameters(config, total) == real - padding - experts_only // 2
    for name, (world_size, flags) in (EXPERT_LAYOUTS if experts else LAYOUTS).items():
        held = _held(config_of(*base, flags), world_size)
        expected = {n: p.numel() for n, p in model.named_parameters() if n != "embedding.weight"}
        assert {n: c for n, c in held.items() if n != "embedding.weight"} == expected, name


def test_layernorms_without_bias() -> None:
    """Two norms in each of two layers and the final one, 32 wide: nothing else goes."""
    flags = SIZES["small"], "--normalization LayerNorm"
    without = config_of(*flags, "--disable-bias-layernorm")
    fewer = sum(total_parameters(config_of(*flags), VOCAB).values()) - sum(total_parameters(without, VOCAB).values())
    assert fewer == 5 * 32
    model = build_model(without, VOCAB, Mesh())
    assert not [name for name, _ in model.named_parameters() if name.endswith("norm.bias")]


def _held(config: TrainConfig, world_size: int) -> dict[str, float]:
    """Parameter -> elements that all ranks hold, each counted once whatever the number of its holders."""
    dp = config.parallel.data_parallel_size(world_size)
    found: Counter[str] = Counter()
    for index in range(world_size):
        rank = PaperRank(config, world_size, index, VOCAB)
        block = rank.mesh.experts.ranks * rank.mesh.experts.parts
        experts_dp = world_size // config.parallel.pipeline_model_parallel_size // block
        for name, parameter, placement in rank.parameters():
            row = parameter.numel() / parameter.shape[placement.dim]
            copies = experts_dp if placement.is_expert else dp
            found[name] += sum(piece.length * row / piece.holders for piece in placement.pieces) / copies  # type: ignore[assignment]
    return {name: round(count, 6) for name, count in found.items()}


STATE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --bf16"
MATRICES = 32 * 96 + 32 * 32 + 32 * 128 + 64 * 32
"""Of a layer: queries, keys and values; their output; gate and up; down."""
P = 2 * MATRICES + 24 * 32
"""Numbers in bf16: the layers' matrices, the embedding with its padding."""
NORMS = 5 * 32
"""Numbers that stay in fp32 under --bf16."""


def state_of(flags: str, world_size: int = 1) -> StateBytes:
    return state_bytes(PaperRank(config_of(STATE, flags), world_size, 0, 24))


def test_state_of_one_process() -> None:
    """bf16 weights, fp32 gradients, fp32 masters and two moments; norms are masters themselves."""
    found = state_of("")
    assert sum(found.parameters.values()) == P + NORMS and found.parameters["norms"] == NORMS
    assert (found.weights, found.gradients) == (2 * P + 4 * NORMS, 4 * (P + NORMS))
    assert (found.optimizer, found.buffers) == (12 * P + 8 * NORMS, 0)
    assert found.total == found.weights + found.gradients + found.optimizer
    assert state_of("--data-parallel-sharding-strategy optim_grads_params") == found, "no copy to share with"
    offloaded = state_of("--optimizer-cpu-offload")
    assert (offloaded.optimizer, offloaded.total) == (0, found.weights + found.gradients)


def test_state_of_four_copies() -> None:
    """Shares of the optimizer's state, sums over ranks of the same size, and a bucket of fp32."""
    found = state_of("--global-batch-size 8", 4)
    assert (found.weights, found.optimizer) == (2 * P + 4 * NORMS, (12 * P + 8 * NORMS) / 4)
    assert (found.gradients, found.buffers) == (4 * (P + NORMS) * 5 / 4, 4 * (P + NORMS))
    small = state_of("--global-batch-size 8 --ddp-bucket-size 1000", 4)
    assert small.buffers == 4 * (1000 + 32 * 128), "full by a little less than the largest parameter"
    assert found.total == found.weights + found.gradients + found.optimizer + found.buffers


def test_state_without_shares() -> None:
    found = state_of("--global-batch-size 8 --data-parallel-sharding-strategy no_shard", 4)
    assert found.optimizer == 12 * P + 8 * NORMS and found.gradients == 2 * 4 * (P + NORMS)


def test_state_of_fully_sharded_copies() -> None:
    """FSDP2 has a quarter of fp32 weights and gradients; two layers in bf16 and gradients of one are gathered."""
    flags = "--global-batch-size 8 --data-parallel-sharding-strategy optim_grads_params"
    found = state_of(flags, 4)
    assert (found.weights, found.optimizer) == (P + 4 * NORMS, 2 * P + 2 * NORMS)
    assert found.gradients == P + 4 * NORMS * 5 / 4
    assert found.buffers == (2 * 2 + 4) * MATRICES
    assert found.total == found.weights + found.gradients + found.optimizer + found.buffers


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ("", 1, {}),
        # fp32 gradients to the three others, a quarter each, and weights in their own dtype from them
        (
            "--global-batch-size 8",
            4,
            {
                ("dp", "reduce_scatter"): 3 * (P + NORMS),
                ("dp", "all_gather"): 1.5 * P + 3 * NORMS,
            },
        ),
        (
            "--global-batch-size 8 --data-parallel-sharding-strategy no_shard",
            4,
            {("dp", "all_reduce"): 6 * (P + NORMS)},
        ),
        (
            "--global-batch-size 8 --num-distributed-optimizer-instances 2",
            4,
            {
                ("dp_cp_shard", "reduce_scatter"): 2 * (P + NORMS),
                ("dp_cp_shard", "all_gather"): P + 2 * NORMS,
                ("dp_cp_replica", "all_reduce"): 2 * (P + NORMS),
            },
        ),
    ],
)
def test_traffic_of_data_parallelism(flags: str, world_size: int, expected: dict[tuple[str, str], float]) -> None:
    """Bytes that one rank sends in a step; a ring's all-reduce sends everything twice but for its own share."""
    rank = PaperRank(config_of(STATE, flags), world_size, 0, 24)
    assert dict(data_parallel_bytes(rank)) == expected


class Kept:
    """Storages that wait for the backward pass: saved by autograd, or held by recomputed regions as their inputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sizes: dict[int, int] = {}
        self.tensors: list[Tensor] = []  # so that no address is used twice
        self.not_activations = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.not_activations:
            self.tensors.append(tensor)
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


@pytest.fixture
def kept_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kept]]:
    """What recomputed regions keep as their inputs is not seen by autograd's hooks."""
    counting: list[Kept] = []
    checkpoint, leaf = recompute.checkpoint, recompute_reads.leaf

    def noted(function, *arguments, **options):  # type: ignore[no-untyped-def]
        for tensor in torch.utils._pytree.tree_leaves(arguments):
            if isinstance(tensor, Tensor) and counting:
                counting[0].note(tensor)
        return checkpoint(function, *arguments, **options)

    monkeypatch.setattr(recompute, "checkpoint", noted)
    monkeypatch.setattr(recompute_reads, "leaf", lambda t: counting[0].note(leaf(t)) if counting else leaf(t))
    yield counting


METHODS = ("plain", "hyper", "frac", "mhc", "attention")


@pytest.mark.parametrize("recomputed", list(RECOMPUTE))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", list(SIZES))
def test_activations(size: str, method: str, recomputed: str, kept_inputs: list[Kept]) -> None:
    """Within 5 % of what a real forward pass keeps."""
    config = config_of(SIZES[size], f"--residual-connection {method}", RECOMPUTE[recomputed])
    rank = PaperRank(config, 1, 0, VOCAB, device="cpu")
    estimated = trace(rank, 0).held_bytes
    kept = _really_kept(config, kept_inputs)
    assert abs(estimated - kept) <= 0.05 * kept, f"{estimated} bytes on paper, {kept} kept"


def _really_kept(config: TrainConfig, counting: list[Kept]) -> int:
    model = build_model(config, VOCAB, Mesh())
    materialize(model, placements(model, Mesh()), 1, Mesh(), compute_dtype(config))
    cast_parameters(model, compute_dtype(config))
    stage = Stage(model, 0, config.parallel.pipeline_layout(config.model.num_layers), config, Mesh())
    shape = (config.training.micro_batch_size, config.model.seq_length)
    tokens = torch.randint(0, VOCAB, shape)
    kept = Kept(model)
    counting.append(kept)
    with saved_tensors_hooks(kept.note, lambda tensor: tensor):
        (loss,) = stage.forward(MicroBatch(tokens, tokens, torch.rand(shape)), [])
    assert loss.requires_grad
    return kept.bytes


def test_what_waits_for_its_weight_gradients_takes_memory() -> None:
    """Two micro-batches hold 10 each; after their input gradients 12 each wait, which the weights' give back."""
    of_pass = [SimpleNamespace(peak_bytes=peak) for peak in (5, 7, 2)]
    stage: Any = SimpleNamespace(**dict(zip(("forward", "backward", "weight"), of_pass, strict=True)))
    stage.held_bytes, stage.waiting_bytes = 10, 12
    kinds = ["forward"] * 2 + ["backward_input"] * 2 + ["backward_weight"] * 2
    actions = [Action(kind, 0, index % 2) for index, kind in enumerate(kinds * 2)]
    assert _memory(actions, [stage]) == (2, 10 + 12 + 7)


def test_messages_travel_between_processes_only() -> None:
    """A V of four stages over two processes, which turns within the second one."""
    layout: Any = SimpleNamespace(num_stages=4, rank_of=[0, 1, 1, 0].__getitem__)
    ends = {Action("forward", 0, 0): 10.0, Action("forward", 1, 0): 20.0}
    ends |= {Action("backward_input", 3, 0): 30.0, Action("backward_input", 2, 0): 40.0}
    wanted = {("forward", 0): 0, ("forward", 1): 10 + 1, ("forward", 2): 20, ("backward", 2): 30 + 4}
    wanted |= {("backward_input", 1): 40, ("backward_weight", 2): 40, ("forward", 3): None}
    for (kind, stage), expected in wanted.items():
        assert _ready(layout, Action(kind, stage, 0), ends, [0.0, 1.0, 2.0, 4.0]) == expected
