"""Routers: which experts a token goes to, with what weights, and the losses that keep experts busy.

Dims: S sequence, B batch, T tokens (S * B, in that order), E experts, k experts per token, C hidden size.

What depends on more than one token (capacity, drop order, Sinkhorn, counts) is about the micro-batch as a whole, even
where this process has a part of it: ``TokenGroup`` tells the router of the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.config import ModelConfig, MoEConfig
from megatron_hc.kernels.attach import attach_loss
from megatron_hc.kernels.norm import promote
from megatron_hc.model.initial import initial_of
from megatron_hc.residual import Draw

SINKHORN_TOLERANCE, SINKHORN_EPS, SINKHORN_LIMIT = 1e-4, 1e-8, 1000
LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Balancing loss -> its name in logs (Megatron-LM's)."""


class Routing(NamedTuple):
    """Where tokens go."""

    experts: Tensor
    """[T, k] the chosen experts of each token."""
    weights: Tensor
    """[T, k] their weights, in the router's precision, with gradients; 0 where dropped."""
    kept: Tensor | None
    """[T, k] false where the expert was over its capacity; None: nothing is dropped."""
    num_slots: int | None
    """Rows that every expert gets from this process (--moe-pad-expert-input-to-capacity)."""


class TokenGroup:
    """The processes that share a micro-batch, and those that share a step. Here: one process has all of it."""

    num_parts: int = 1
    """Processes that share the tokens of a micro-batch, each with an equal part of the sequence."""
    part: int = 0
    batch_ranks: int = 1
    """Processes that have micro-batches of their own in one step."""
    batch_rank: int = 0

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] of this process -> of the whole micro-batch in its order. No gradients."""
        return x

    def own(self, x: Tensor) -> Tensor:
        """The inverse of ``gather``: dim 0 of the whole (T, or S) -> this process's part."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes that share the micro-batch. No gradients."""
        return x

    def sum_over_batches(self, x: Tensor) -> Tensor:
        """Sum over all processes of the stage, those with other micro-batches included. No gradients."""
        return x


class Step:
    """What routers know of the step they are in, and gather for its end."""

    def __init__(self, key: str = "", loss_share: float = 1.0) -> None:
        self.key = key
        """What random numbers of the step depend on, beside layer and micro-batch."""
        self.loss_share = loss_share
        """Factor of a micro-batch's losses of the router in the step's loss: 1 / (micro-batches of all processes)."""
        self.num_calls = 0
        self.load: Tensor | None = None
        """[E] tokens that this process sent to each expert."""
        self.losses: dict[str, Tensor] = {}
        """Name in logs -> this process's share of the loss over its coefficient, summed over micro-batches."""
        self.global_counts: Tensor | None = None
        """[E] unbiased choices of the micro-batches so far, of all processes."""

    def log(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def count(self, chosen: Tensor) -> None:
        self.load = chosen if self.load is None else self.load + chosen


class Decision(NamedTuple):
    """What a router decided about a micro-batch: everything about it that has no gradient."""

    experts: Tensor
    kept: Tensor | None
    num_slots: int | None
    shares: dict[str, Tensor]
    """Balancing loss -> f, choices of each expert per token: [E], for seq_aux_loss [B, E]."""


class Memory:
    """The decision of one forward pass that will be run a second time."""

    def __init__(self) -> None:
        self.call: int | None = None
        self.decision: Decision | None = None


class Remembering:
    """A context in which ``routers`` decide once: entered again, they repeat what they decided the first time.

    For recompute: the second run must route as the first did, and must not count anything again.
    """

    def __init__(self, routers: Iterable[Router]) -> None:
        self.memories = [(router, Memory()) for router in routers]

    def __enter__(self) -> None:
        for router, memory in self.memories:
            router.memory = memory

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for router, _ in self.memories:
            router.memory = None


class Router(nn.Module):
    """logits = W x -> chosen experts, weights (Megatron-LM's semantics; see docs/moe.md for the equations).

    In evaluation nothing is dropped and Sinkhorn balancing is off: there a token's output depends on no other token's
    routing, so that text generated with a cache equals text generated without.
    """

    keeps_fp32 = True
    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.options: MoEConfig = config.moe
        assert self.options.num_experts is not None
        self.num_experts, self.layer = self.options.num_experts, layer
        self.dtype = torch.float64 if self.options.moe_router_dtype == "fp64" else torch.float32
        self.initial_values = initial_of("fc1", "", config, config.hidden_size, self.num_experts)
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        has_bias = self.options.moe_router_enable_expert_bias
        self.register_buffer("expert_bias", torch.zeros(self.num_experts) if has_bias else None)
        self.tokens = TokenGroup()
        self.step = Step()
        self.memory: Memory | None = None

    def initial(self, name: str, draw: Draw) -> Tensor:
        return self.initial_values.value(draw, "", (self.weight.shape[0], self.weight.shape[1]))

    def forward(self, x: Tensor) -> Routing:
        """x [S, B, C], this process's part of the sequence -> where its tokens go."""
        options = self.options
        dtype = torch.promote_types(promote(x.dtype), self.dtype)
        x = x.to(dtype)
        if options.moe_input_jitter_eps and self.training:
            x = self._jittered(x, self._call())
        logits = F.linear(x, self.weight.to(dtype)).flatten(0, 1)  # [T, E]
        has_losses = self.training and torch.is_grad_enabled()
        is_first = self.memory is None or self.memory.decision is None
        if has_losses and options.moe_z_loss_coeff:
            logits = self._with_z_loss(logits, options.moe_z_loss_coeff, is_first)
        decision = self._decide(logits.detach(), x.shape[1], has_losses)
        weights = self.weigh(logits, decision.experts)
        if decision.kept is not None:
            weights = weights.masked_fill(~decision.kept, 0.0)
        if has_losses and decision.shares:
            weights = self._with_balancing_losses(weights, logits, decision, is_first)
        return Routing(decision.experts, weights, decision.kept, decision.num_slots)

    # ---- scores ----

    @property
    def has_sinkhorn(self) -> bool:
        return "sinkhorn" in self.options.moe_router_load_balancing_type

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """logits [T, E], chosen experts [T, k] -> their weights [T, k]."""
        options, k = self.options, self.options.moe_router_topk
        if self.has_sinkhorn:
            scores = logits.sigmoid() if k == 1 else logits.softmax(-1)
            return scores.gather(1, experts)
        if options.moe_router_score_function == "sigmoid":
            weights = logits.gather(1, experts).sigmoid()
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if k > 1 else weights
        elif options.moe_router_pre_softmax:
            weights = logits.softmax(-1).gather(1, experts)
        else:
            weights = logits.gather(1, experts).softmax(-1)
        factor = options.moe_router_topk_scaling_factor
        return weights * factor if factor else weights

    def choose(self, logits: Tensor) -> Tensor:
        """logits [T, E] -> the chosen experts [T, k], best first; of equal ones the lower index."""
        options, k = self.options, self.options.moe_router_topk
        if self.has_sinkhorn:
            if not self.training:
                return _top(logits, k)
            return _top(self.tokens.own(sinkhorn(self.tokens.gather(logits))), k)
        scores = logits
        if options.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
            if self.expert_bias is not None:
                scores = scores + self.expert_bias.to(scores.dtype)
        elif options.moe_router_pre_softmax:
            scores = logits.softmax(-1)
        groups, group_topk = options.moe_router_num_groups, options.moe_router_group_topk
        if groups is not None and group_topk is not None:
            scores = _only_best_groups(scores, groups, group_topk, k // group_topk)
        return _top(scores, k)

    def balancing_scores(self, logits: Tensor) -> Tensor:
        """[T, E] probabilities that the balancing losses look at: of all experts, without bias and groups."""
        if self.options.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
            return scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return logits.softmax(-1)

    # ---- decisions ----

    def _call(self) -> int:
        """Number of this forward pass in the step. Asked for jitter alone: a compiler makes code for every number."""
        if self.memory is not None and self.memory.call is not None:
            return self.memory.call
        call = self.step.num_calls
        self.step.num_calls += 1
        if self.memory is not None:
            self.memory.call = call
        return call

    def _decide(self, logits: Tensor, batch: int, has_losses: bool) -> Decision:
        if self.memory is not None and self.memory.decision is not None:
            return self.memory.decision
        with torch.no_grad():
            experts = self.choose(logits)
            kept, num_slots = None, None
            if self.options.moe_expert_capacity_factor is not None and self.training:
                kept, num_slots = self._within_capacity(logits, experts)
            if has_losses and self.expert_bias is not None:
                self.step.count(_count(experts, self.num_experts, kept))
            shares = self._shares(logits, batch) if has_losses else {}
        decision = Decision(experts, kept, num_slots, shares)
        if self.memory is not None:
            self.memory.decision = decision
        return decision

    def _within_capacity(self, logits: Tensor, experts: Tensor) -> tuple[Tensor, int | None]:
        """([T, k] which choices their experts take, rows per expert where they are padded)."""
        options, tokens, k = self.options, self.tokens, self.options.moe_router_topk
        num_tokens = experts.shape[0] * tokens.num_parts
        capacity = math.ceil(num_tokens * k / self.num_experts * (options.moe_expert_capacity_factor or 0.0))
        everyone = tokens.gather(experts)
        ranking = None
        if options.moe_token_drop_policy == "probs":
            ranking = tokens.gather(self.weigh(logits, experts))
        kept = tokens.own(first_come(everyone, ranking, capacity, self.num_experts))
        # Of the whole micro-batch's capacity any part may fall to this process.
        slots = min(capacity, experts.shape[0])
        return kept, slots if options.moe_pad_expert_input_to_capacity else None

    def _shares(self, logits: Tensor, batch: int) -> dict[str, Tensor]:
        """f of every balancing loss: choices per expert and token, without bias, groups and drops."""
        options, tokens = self.options, self.tokens
        kinds = [kind for kind in LOSS_NAMES if options.aux_loss_coeff(kind) > 0]
        if not kinds:
            return {}
        plain = _top(self.balancing_scores(logits), options.moe_router_topk)
        chosen = torch.zeros_like(logits).scatter_(1, plain, 1.0)  # [T, E]
        num_tokens = logits.shape[0] * tokens.num_parts
        shares = {}
        for kind in kinds:
            if kind == "aux_loss":
                shares[kind] = tokens.sum(chosen.sum(0)) / num_tokens
            elif kind == "seq_aux_loss":
                per_sequence = chosen.unflatten(0, (-1, batch)).sum(0)  # [B, E]
                shares[kind] = tokens.sum(per_sequence) * (batch / num_tokens)
            else:
                new, before = tokens.sum_over_batches(chosen.sum(0)), self.step.global_counts
                counts = new if before is None else before + new
                self.step.global_counts = counts
                shares[kind] = counts * options.moe_router_topk / counts.sum()
        return shares

    # ---- losses ----

    def _with_z_loss(self, logits: Tensor, coefficient: float, is_first: bool) -> Tensor:
        """coefficient * mean over the micro-batch's tokens of logsumexp(logits)^2."""
        num_tokens = logits.shape[0] * self.tokens.num_parts
        loss = logits.logsumexp(-1).square().sum() / num_tokens
        if is_first:
            self.step.log("z_loss", loss)
        return attach_loss(logits, loss * coefficient, self.step.loss_share)

    def _with_balancing_losses(self, weights: Tensor, logits: Tensor, decision: Decision, is_first: bool) -> Tensor:
        """coefficient * E / k * sum_e f_e P_e: f_e choices of expert e per token, P_e its mean probability.

        A process adds its own tokens' part of P; the parts of all processes that share a micro-batch make the loss.
        """
        scores = self.balancing_scores(logits)
        num_tokens = logits.shape[0] * self.tokens.num_parts
        factor = self.num_experts / self.options.moe_router_topk
        for kind, share in decision.shares.items():
            if kind == "seq_aux_loss":  # the mean over sequences of each one's loss
                batch = share.shape[0]
                mean = scores.unflatten(0, (-1, batch)).sum(0) / (num_tokens / batch)  # [B, E]
                loss = (share * mean).sum() * factor / batch
            else:
                loss = (share * (scores.sum(0) / num_tokens)).sum() * factor
            if is_first:
                self.step.log(LOSS_NAMES[kind], loss)
            weights = attach_loss(weights, loss * self.options.aux_loss_coeff(kind), self.step.loss_share)
        return weights

    def _jittered(self, x: Tensor, call: int) -> Tensor:
        """x times noise that depends on step, layer, micro-batch and a token's place in it: not on the layout.

        Drawn for the whole micro-batch, of which this process uses its part.
        """
        eps, tokens = self.options.moe_input_jitter_eps or 0.0, self.tokens
        micro_batch = call * tokens.batch_ranks + tokens.batch_rank
        digest = hashlib.blake2b(f"{self.step.key}/{self.layer}/{micro_batch}".encode(), digest_size=8).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        shape = (x.shape[0] * tokens.num_parts, *x.shape[1:])
        noise = torch.rand(shape, generator=generator, dtype=torch.float32, device=x.device)
        return x * (1 - eps + 2 * eps * tokens.own(noise).to(x.dtype))

    @torch.no_grad()
    def move_bias(self) -> None:
        """After a step: raise the bias of experts with less than the mean load, lower that of the others."""
        if self.expert_bias is None or self.step.load is None:
            return
        load = self.tokens.sum_over_batches(self.step.load).to(self.expert_bias.dtype)
        self.expert_bias += (load.mean() - load).sign() * self.options.moe_router_bias_update_rate


def _top(scores: Tensor, k: int) -> Tensor:
    """[T, E] -> indices of the k largest, [T, k]; of equal ones the lower index, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _only_best_groups(scores: Tensor, num_groups: int, group_topk: int, per_group: int) -> Tensor:
    """[T, E] with -inf outside the ``group_topk`` groups whose ``per_group`` best experts have the largest sum."""
    grouped = scores.unflatten(1, (num_groups, -1))  # [T, groups, experts of a group]
    sums = grouped.topk(per_group, dim=-1).values.sum(-1)
    is_best = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, _top(sums, group_topk), True)
    return grouped.masked_fill(~is_best.unsqueeze(-1), float("-inf")).flatten(1)


def _count(experts: Tensor, num_experts: int, kept: Tensor | None) -> Tensor:
    """[T, k] -> choices per expert [E], of those kept."""
    ones = torch.ones_like(experts) if kept is None else kept.to(experts.dtype)
    return experts.new_zeros(num_experts).scatter_add_(0, experts.flatten(), ones.flatten())


def first_come(experts: Tensor, ranking: Tensor | None, capacity: int, num_experts: int) -> Tensor:
    """[T, k] whether a choice is among the first ``capacity`` of its expert: by weight, or (None) by position.

    Of equal weights the earlier token comes first.
    """
    flat = experts.flatten()
    order = torch.arange(flat.numel(), device=flat.device)
    if ranking is not None:
        order = ranking.flatten().sort(descending=True, stable=True).indices
    order = order[flat[order].sort(stable=True).indices]  # by expert, then as above
    starts = _count(experts, num_experts, None).cumsum(0).roll(1)
    starts[0] = 0
    place = torch.arange(flat.numel(), device=flat.device) - starts[flat[order]]
    return torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, place < capacity).view_as(experts)


def sinkhorn(logits: Tensor) -> Tensor:
    """logits [T, E] -> a matrix with equal sums of rows and equal sums of columns, as near to exp(logits) as can be.

    As in Megatron-LM: rows, then columns are scaled until the columns' factors change by at most 1e-4 on average; but
    no more than 1,000 times, for logits so far apart that this takes forever.
    A row's largest logit is taken off first, which only changes the row's factor, so that exp cannot overflow.
    """
    cost = (logits - logits.amax(-1, keepdim=True)).exp()
    T, E = cost.shape
    columns = cost.new_ones(E)
    for _ in range(SINKHORN_LIMIT):
        rows = 1 / (T * ((columns * cost).sum(1) + SINKHORN_EPS))
        before, columns = columns, 1 / (E * ((rows.unsqueeze(1) * cost).sum(0) + SINKHORN_EPS))
        if not float((before - columns).abs().mean()) > SINKHORN_TOLERANCE:
            break
    return columns * cost * rows.unsqueeze(1)


def routers_of(modules: Iterable[nn.Module]) -> list[Router]:
    """All routers in some modules, in their order."""
    return [module for root in modules for module in root.modules() if isinstance(module, Router)]
