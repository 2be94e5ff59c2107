"""Mixture of experts."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hc.config.common import flag, positive, require, shown

BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")
"""Values of --moe-router-load-balancing-type; the first three are losses."""


def layer_pattern(expression: str) -> list[int]:
    """A list of numbers written as Python: lists, whole numbers, + and *, as in ``([0]*2+[1]*3)*2``.

    Raises ``ValueError`` in one sentence for anything else; nothing is evaluated but these.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= 10_000:
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and type(left) is type(right):
                return left + right
            if isinstance(node.op, ast.Mult) and int in (type(left), type(right)):
                return left * right
        raise ValueError

    try:
        found = value(ast.parse(expression.strip(), mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = None
    if not isinstance(found, list) or not all(type(item) is int for item in found):
        raise ValueError(
            f"--moe-layer-freq ({expression}) must be a whole number N (every Nth layer) or a list of 0 and 1, one per "
            "layer, such as ([0]+[1]*15)"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of MLPs."""

    num_experts: int | None = None
    """Number of experts of an MoE layer (default: no MoE layers)."""
    moe_layer_freq: tuple[str, ...] = ("1",)
    """Which layers have experts: N (every Nth, from the first), or a list of 0 and 1 such as ([0]+[1]*15)."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert (default: --ffn-hidden-size)."""
    moe_router_topk: int = 2
    """Experts per token."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How a router's logits become weights of experts."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, then the top k, not normalised again (default: top k, then softmax over the k)."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the weights of the chosen experts."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of routers; their weights are kept in at least fp32."""
    moe_router_num_groups: int | None = None
    """Number of groups of experts, of which a token chooses --moe-router-group-topk."""
    moe_router_group_topk: int | None = None
    """Groups per token."""
    moe_router_enable_expert_bias: bool = False
    """A bias per expert that only takes part in choosing, moved after each step against the expert's load."""
    moe_router_bias_update_rate: float = 1e-3
    """Step of the expert bias."""
    moe_router_load_balancing_type: tuple[str, ...] = ("aux_loss",)
    """One or several of aux_loss (per micro-batch), seq_aux_loss (per sequence), global_aux_loss (counts of the global
    batch so far); or sinkhorn; or none."""
    moe_aux_loss_coeff: tuple[float, ...] = (0.0,)
    """Coefficient of each loss of --moe-router-load-balancing-type."""
    moe_z_loss_coeff: float | None = None
    """Coefficient of the square of the router's log-sum-exp (2202.08906)."""
    moe_expert_capacity_factor: float | None = None
    """In training an expert takes at most this times the mean load (default: nothing is dropped)."""
    moe_pad_expert_input_to_capacity: bool = False
    """Every expert gets exactly its capacity of rows: shapes are fixed, nothing waits for counts."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert over its capacity drops: those of least weight, or the last."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of an MLP beside the experts that every token goes through."""
    moe_shared_expert_gate: bool = False
    """A learned sigmoid gate on the shared expert."""
    moe_input_jitter_eps: float | None = None
    """In training a router's input is multiplied by uniform noise in 1 - eps .. 1 + eps."""
    moe_grouped_gemm: bool = True
    """All experts in one matrix multiplication where torch has it for the dtype and sizes; otherwise one by one."""

    def aux_loss_coeff(self, kind: str) -> float:
        """Coefficient of a balancing loss; 0 where it is not chosen."""
        chosen = zip(self.moe_router_load_balancing_type, self.moe_aux_loss_coeff, strict=False)
        return dict(chosen).get(kind, 0.0)

    def has_experts(self, num_layers: int) -> list[bool]:
        """Layer by layer whether it has experts instead of an MLP."""
        if self.num_experts is None:
            return [False] * num_layers
        given = self.moe_layer_freq
        if len(given) == 1 and given[0].strip().isdigit():
            every = int(given[0])
            require(every > 0, f"--moe-layer-freq must be positive, not {every}")
            return [layer % every == 0 for layer in range(num_layers)]
        pattern = layer_pattern(given[0] if len(given) == 1 else f"[{','.join(given)}]")
        require(
            len(pattern) == num_layers and set(pattern) <= {0, 1},
            f"--moe-layer-freq ({' '.join(given)}) gives {len(pattern)} numbers, which must be --num-layers "
            f"({num_layers}) times 0 or 1",
        )
        return [bool(item) for item in pattern]

    def validate(self, num_layers: int) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        if self.num_experts is None:
            for name, default in defaults.items():
                given = getattr(self, name)
                require(given == default, f"{flag(name)} ({shown(given)}) needs --num-experts")
            return
        positive(self, "num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_topk_scaling_factor")
        positive(self, "moe_expert_capacity_factor", "moe_shared_expert_intermediate_size")
        positive(self, "moe_router_num_groups", "moe_router_group_topk")
        require(any(self.has_experts(num_layers)), "--moe-layer-freq gives no layer experts: leave out --num-experts")
        E, k = self.num_experts, self.moe_router_topk
        require(k <= E, f"--moe-router-topk ({k}) must be at most --num-experts ({E})")
        self._validate_scores(E, k)
        self._validate_balancing()
        require(
            self.moe_expert_capacity_factor is not None
            or not (self.moe_pad_expert_input_to_capacity or self.moe_token_drop_policy != "probs"),
            "--moe-pad-expert-input-to-capacity and --moe-token-drop-policy need --moe-expert-capacity-factor",
        )
        require(
            self.moe_shared_expert_intermediate_size is not None or not self.moe_shared_expert_gate,
            "--moe-shared-expert-gate needs --moe-shared-expert-intermediate-size",
        )
        eps = self.moe_input_jitter_eps
        require(eps is None or 0 < eps < 1, f"--moe-input-jitter-eps must be between 0 and 1, not {eps}")

    def _validate_scores(self, E: int, k: int) -> None:
        is_softmax = self.moe_router_score_function == "softmax"
        has_sinkhorn = "sinkhorn" in self.moe_router_load_balancing_type
        require(
            not self.moe_router_pre_softmax or (is_softmax and not has_sinkhorn),
            "--moe-router-pre-softmax needs --moe-router-score-function softmax and no sinkhorn balancing",
        )
        factor = self.moe_router_topk_scaling_factor
        require(
            not has_sinkhorn or (is_softmax and factor is None),
            f"--moe-router-load-balancing-type sinkhorn has weights of its own: leave out --moe-router-score-function "
            f"({self.moe_router_score_function}) and --moe-router-topk-scaling-factor ({factor})",
        )
        require(
            k > 1 or not is_softmax or self.moe_router_pre_softmax or has_sinkhorn,
            "--moe-router-topk 1 with a softmax over that one expert is always 1 and teaches the router nothing: add "
            "--moe-router-pre-softmax",
        )
        require(
            not (self.moe_router_enable_expert_bias and (is_softmax or has_sinkhorn)),
            "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid and no sinkhorn balancing",
        )
        default_rate = MoEConfig.moe_router_bias_update_rate
        require(
            self.moe_router_enable_expert_bias or self.moe_router_bias_update_rate == default_rate,
            f"--moe-router-bias-update-rate ({self.moe_router_bias_update_rate}) needs --moe-router-enable-expert-bias",
        )
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        require(
            (groups is None) == (chosen is None), "--moe-router-num-groups and --moe-router-group-topk need each other"
        )
        if groups is None or chosen is None:
            return
        require(not has_sinkhorn, "--moe-router-num-groups does not go with sinkhorn balancing")
        require(E % groups == 0, f"--moe-router-num-groups ({groups}) must divide --num-experts ({E})")
        require(
            chosen <= groups and k % chosen == 0,
            f"--moe-router-group-topk ({chosen}) must be at most --moe-router-num-groups ({groups}) and divide "
            f"--moe-router-topk ({k})",
        )
        require(
            k // chosen <= E // groups,
            f"--moe-router-topk ({k}) from --moe-router-group-topk ({chosen}) groups is more than their "
            f"{E // groups} experts each",
        )

    def _validate_balancing(self) -> None:
        kinds, coefficients = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        for kind in kinds:
            allowed = ", ".join(BALANCING)
            require(kind in BALANCING, f"--moe-router-load-balancing-type ({kind}) must be any of {allowed}")
        require(
            len(set(kinds)) == len(kinds) > 0 and (len(kinds) == 1 or not {"sinkhorn", "none"} & set(kinds)),
            f"--moe-router-load-balancing-type ({' '.join(kinds)}) must be several different losses, or one word",
        )
        require(
            len(coefficients) == len(kinds),
            f"--moe-aux-loss-coeff ({shown(coefficients)}) must have one number for each of "
            f"--moe-router-load-balancing-type ({' '.join(kinds)})",
        )
        for value in (*coefficients, self.moe_z_loss_coeff or 0.0, self.moe_router_bias_update_rate):
            require(value >= 0, f"coefficients and rates of the router must not be negative, not {value}")
        require(
            not any(coefficients) or not {"sinkhorn", "none"} & set(kinds),
            f"--moe-aux-loss-coeff ({shown(coefficients)}) needs a loss as --moe-router-load-balancing-type, not "
            f"{' '.join(kinds)}",
        )
