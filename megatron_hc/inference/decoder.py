"""Passes over new tokens of many texts with a cache, over tensor-parallel ranks and pipeline stages.

Every stage has caches of its own layers. A pass goes from stage to stage; what crosses is what crosses in training.
All processes that hold the model together call together, with the same texts.

Dims: B texts of a pass, S new tokens of each (padded), C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hc.config import TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.deepspeed_config import settings_of
from megatron_hc.parallel.stages import boundary_of, leave, method_of
from megatron_hc.residual import Carry, unflatten


def check_can_write(config: TrainConfig, mesh: Mesh) -> None:
    """Raise ``ValueError`` for layouts that only make sense in training."""
    parallel = config.parallel
    layout = parallel.pipeline_layout(config.model.num_layers)
    strategy = parallel.data_parallel_sharding_strategy
    reasons = {
        f"--context-parallel-size {mesh.size('cp')}": mesh.size("cp") > 1,
        "--sequence-parallel": mesh.sequence_parallel,
        f"--pipeline-schedule {layout.schedule}": layout.stages_per_rank > 1,
        f"--data-parallel-sharding-strategy {strategy}": strategy == "optim_grads_params",
        "--deepspeed at ZeRO stage 3": config.zero.deepspeed and settings_of(config, mesh.size("dp")).stage == 3,
        "experts shared out over data-parallel processes": mesh.experts.ranks * mesh.experts.parts > mesh.size("tp"),
    }
    given = [name for name, is_given in reasons.items() if is_given]
    if given:
        raise ValueError(f"text cannot be generated with {' and '.join(given)}: load the checkpoint without")


class Decoder:
    """The model of this process and its caches: ``rows`` texts of up to ``max_length`` tokens.

    Raises ``ValueError`` for layouts that only make sense in training.
    """

    def __init__(self, model: GPT, config: TrainConfig, mesh: Mesh, *, rows: int, max_length: int) -> None:
        check_can_write(config, mesh)
        self.layout = config.parallel.pipeline_layout(config.model.num_layers)
        if not 0 < max_length <= config.model.max_positions:
            raise ValueError(
                f"texts of {max_length} tokens: the model has --max-position-embeddings ({config.model.max_positions})"
            )
        self.model, self.config, self.mesh = model, config, mesh
        try:
            self.caches = model.new_caches(max_length, rows)
        except RuntimeError as error:  # of torch's allocators, on CPU and GPU
            raise ValueError(
                f"there is no memory for the keys and values of {rows} texts of {max_length} tokens: lower the batch "
                f"size or the length ({str(error).splitlines()[0]})"
            ) from error
        self.group, self.stage = mesh.group("pp"), mesh.rank("pp")
        self.method = method_of(config.model)

    @property
    def rows(self) -> int:
        return len(self.caches.lengths)

    @property
    def max_length(self) -> int:
        return self.caches.max_length

    @torch.inference_mode()
    def extend(self, texts: Sequence[Sequence[int]], first_row: int) -> Tensor | None:
        """New tokens of rows ``first_row`` .. -> logits of the token after each, [B, V]; None but on the last stage."""
        counts = [len(text) for text in texts]
        S, device = max(counts), self.mesh.device
        tokens = torch.tensor([[*text, *[0] * (S - len(text))] for text in texts]).to(device)
        span = self.caches.extend(counts, first_row)
        context = self.model.context(span.positions, None, span)
        shape = (S, len(texts))
        carry = self.model.open(tokens, span.positions) if self.stage == 0 else self._receive(shape)
        carry = self.model.run_stage(carry, context)
        if self.stage < self.layout.num_stages - 1:
            self._send(carry, shape)
            return None
        hidden = self.model.close(carry)  # [S, B, C]
        if S > 1:
            last = torch.tensor(counts, device=device) - 1
            hidden = hidden[last, torch.arange(len(texts), device=device)].unsqueeze(0)
        return self.model.output.logits(hidden)[0]

    def _receive(self, shape: tuple[int, int]) -> Carry:
        first = self.layout.bounds[self.stage][0]
        boundary = boundary_of(self.config, first, self.mesh.size("tp"), shape)
        tensors = [torch.empty(item.shape, dtype=item.dtype, device=self.mesh.device) for item in boundary]
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=self.stage - 1)
        return unflatten(tensors, [item.spec for item in boundary])

    def _send(self, carry: Carry, shape: tuple[int, int]) -> None:
        end = self.layout.bounds[self.stage][1]
        boundary = boundary_of(self.config, end, self.mesh.size("tp"), shape)
        for tensor in leave(self.method, carry, boundary):
            dist.send(tensor.contiguous(), group=self.group, group_dst=self.stage + 1)

    def share(self, chosen: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What the last stage chose, [*shape] in float64, on every process that holds a part of the model.

        Tensor-parallel ranks of that stage all have the logits; the first one's choice counts, so that no rounding can
        lead them apart.
        """
        if chosen is None:
            chosen = torch.empty(shape, dtype=torch.float64)
        if self.mesh.group("tp") is None and self.group is None:
            return chosen.cpu()
        chosen = chosen.to(self.mesh.device).contiguous()
        if self.mesh.group("tp") is not None and self.stage == self.layout.num_stages - 1:
            dist.broadcast(chosen, group=self.mesh.group("tp"), group_src=0)
        if self.group is not None:
            dist.broadcast(chosen, group=self.group, group_src=self.layout.num_stages - 1)
        return chosen.cpu()
