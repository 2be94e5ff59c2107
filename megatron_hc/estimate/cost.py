"""Time of a step by a roofline: matrix products at a share of the peak, the rest at a share of the memory's bandwidth.

Assumed: collectives of tensor and expert parallelism wait for nothing to hide them; those of data parallelism hide
behind the last micro-batch's backward pass with --overlap-grad-reduce and behind the first forward pass with
--overlap-param-gather; messages between stages travel beside the passes and delay only who waits for them. Methods with
a fused boundary (write of a sublayer, mixing weights, read and norm of the next) are counted by what its kernels move,
at the share of the bandwidth that these reach; all others at the least traffic of a kernel that does a boundary in one
pass: docs/scale.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_hc.config import TrainConfig
from megatron_hc.estimate.boundaries import Moved
from megatron_hc.estimate.hardware import Hardware
from megatron_hc.estimate.memory import StateBytes
from megatron_hc.estimate.paper import PaperRank
from megatron_hc.estimate.trace import Pass, StageTrace
from megatron_hc.parallel.stages import boundary_of


@dataclass(frozen=True)
class PassSeconds:
    """Parts of the time of a pass of one stage."""

    matmul: float = 0.0
    residual: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    """Collectives of tensor (with sequence) and of context parallelism."""
    expert: float = 0.0
    """Collectives of expert parallelism."""

    @property
    def total(self) -> float:
        return self.matmul + self.residual + self.elementwise + self.tensor + self.expert


class Roofline:
    """Times on one kind of machine."""

    def __init__(self, config: TrainConfig, hardware: Hardware, world_size: int) -> None:
        self.config, self.hardware, self.world_size = config, hardware, world_size

    def pass_seconds(self, rank: PaperRank, stage: tuple[int, int], part: Pass, kind: str) -> PassSeconds:
        """``stage``: its first layer and the one behind its last; ``kind`` as in a schedule."""
        hardware = self.hardware
        compute = hardware.peak_tflops * 1e12 * hardware.matmul_efficiency
        memory = hardware.memory_tb_s * 1e12 * hardware.memory_efficiency
        share = {"forward": 0, "backward": 1, "backward_input": 1, "backward_weight": None}[kind]
        residual = elementwise = 0.0
        if share is not None:
            residual = self._residual_seconds(rank, stage, share == 1)
            elementwise = self._elementwise_bytes(rank, stage) * (1 + share) / memory
            if share == 1 and self.config.parallel.recompute_granularity == "full":
                elementwise += self._elementwise_bytes(rank, stage) / memory
        return PassSeconds(
            matmul=part.flops / compute,
            residual=residual,
            elementwise=elementwise,
            tensor=self.sent_seconds(part.sent, ("tp", "cp", "kv", "tp_cp"), rank),
            expert=self.sent_seconds(part.sent, ("experts", "etp", "stage"), rank),
        )

    def _tokens(self) -> float:
        """Of a micro-batch, those on one rank outside of the tensor-parallel regions."""
        config = self.config
        shard = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
        return self._part() / shard

    def _part(self) -> float:
        """Of a micro-batch, those of one context-parallel rank."""
        config = self.config
        return config.training.micro_batch_size * config.model.seq_length / config.parallel.context_parallel_size

    def _residual_seconds(self, rank: PaperRank, stage: tuple[int, int], is_backward: bool) -> float:
        """What the residual path of a stage's layers takes, in a backward pass with what that does again."""
        seconds = 0.0
        for layer in range(*stage):
            moved, share = rank.fused_boundaries.get(layer), self.hardware.boundary_efficiency
            if moved is None:
                moved, share = self._least_moved(layer), self.hardware.memory_efficiency
            count = moved.backward + self._again(moved) if is_backward else moved.forward
            seconds += self._tokens() * count / (self.hardware.memory_tb_s * 1e12 * share)
        return seconds

    def _again(self, moved: Moved) -> float:
        """Recomputed layers read once more; what is kept of few streams is replayed, beside such layers by reads."""
        parallel = self.config.parallel
        if parallel.recompute_granularity == "full":
            return (1 + parallel.recomputes_residual) * moved.forward
        return moved.replay if parallel.recomputes_residual else 0.0

    def _least_moved(self, layer: int) -> Moved:
        """What a layer's residual path has to read and write at least."""
        model = self.config.model
        streams = history = 0.0
        for crossing in boundary_of(self.config, layer):
            width = crossing.num_bytes / self._part()
            streams += width if crossing.spec.kind == "stream" else 0
            history += width if crossing.spec.kind == "history" else 0
        unit = model.hidden_size * (2 if self.config.training.bf16 else 4)
        is_plain = streams == unit and not history and model.residual.residual_connection == "plain"
        repeats = 2 if is_plain else 3
        forward = 2 * (2 * streams + 2 * unit + history)
        return Moved(forward, 2 * (repeats * streams + repeats * unit + 2 * history), replay=forward)

    def _elementwise_bytes(self, rank: PaperRank, stage: tuple[int, int]) -> float:
        """Rotary embedding, attention's reads and writes, activation of the MLP: bytes forward."""
        model, tp = self.config.model, rank.mesh.size("tp")
        heads = 2 * (model.num_attention_heads + model.num_kv_heads) * model.head_size / tp
        attention = 2 * heads if model.position_embedding_type == "rope" else heads
        matrices = 3 if model.swiglu else 2
        total = 0.0
        for layer in range(*stage):
            mlp = matrices * model.ffn_size / tp
            if model.has_experts(layer):
                mlp = matrices * model.expert_ffn_size * model.moe.moe_router_topk / tp
                mlp += 4 * model.hidden_size * model.moe.moe_router_topk / tp  # rows there and back
                mlp += matrices * (model.moe.moe_shared_expert_intermediate_size or 0) / tp
            total += attention + mlp
        dtype = 2 if self.config.training.bf16 else 4
        return total * dtype * self._part()

    def sent_seconds(self, sent: Counter[tuple[str, str]], groups: tuple[str, ...], rank: PaperRank) -> float:
        """Of the collectives of some groups."""
        return sum(count / self.bandwidth(name, rank) for (name, _), count in sent.items() if name in groups)

    def bandwidth(self, group: str, rank: PaperRank) -> float:
        """Bytes per second that a rank sends within a group: over the network where it spans nodes."""
        mesh = rank.mesh
        tp = mesh.size("tp")
        block = mesh.experts.ranks * mesh.experts.parts
        spans = {
            "embedding": self.world_size,  # in the first and in the last stage
            "tp": tp,
            "kv": tp,
            "cp": tp * mesh.size("cp"),
            "tp_cp": tp * mesh.size("cp"),
            "etp": mesh.experts.parts,
            "experts": block,
        }.get(group, self.world_size // mesh.size("pp"))
        return self._rate(spans)

    def _rate(self, span: int) -> float:
        """Bytes per second between ranks of ``span`` neighbours."""
        hardware = self.hardware
        rate = hardware.node_gb_s if span <= hardware.gpus_per_node else hardware.network_gb_s
        return rate * 1e9 * hardware.network_efficiency

    def message_seconds(self, num_bytes: int) -> float:
        """Of what crosses into a stage."""
        return num_bytes / self._rate(self.world_size)

    def optimizer_seconds(self, state: StateBytes) -> float:
        """Read and write master weights and moments, read gradients, write weights; of state in CPU memory the last."""
        memory = self.hardware.memory_tb_s * 1e12 * self.hardware.memory_efficiency
        if state.optimizer == 0:
            return state.weights / memory
        masters = 3 * state.updated - state.optimizer  # those that are the weights themselves, and are read as such
        return (2 * state.optimizer + state.updated + masters + state.weights) / memory


def passes_of(trace: StageTrace, schedule_has_weights: bool) -> dict[str, Pass]:
    """Kind of pass -> what it does."""
    if schedule_has_weights:
        merged = Pass(
            trace.backward.flops + trace.weight.flops,
            max(trace.backward.peak_bytes, trace.weight.peak_bytes),
            trace.backward.sent + trace.weight.sent,
        )
        return {
            "forward": trace.forward,
            "backward_input": trace.backward,
            "backward_weight": trace.weight,
            "backward": merged,
        }
    return {"forward": trace.forward, "backward": trace.backward}
