"""transformer-engine 2.20's modules: signatures word for word, maths in plain torch, collectives of their own.

FP8 is a rounding of the operands to e4m3 or e5m2 with one scale per tensor, from the tensor (current scaling) or from
earlier steps (delayed scaling, with the state where the package keeps it: ``fp8_meta``).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

MADE: list[tuple[str, dict[str, Any]]] = []
"""(class, arguments) of every module that was made."""
CALLED: list[str] = []
"""Of every module that ran in FP8: its class."""


class Format(enum.Enum):
    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: Any = None


@dataclass
class Float8CurrentScaling:
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID


@dataclass
class Float8BlockScaling:
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling:
    margin: int = 0
    fp8_format: Format = Format.E4M3


class Region:
    """The package's global state of autocast."""

    enabled = False
    recipe: Any = None
    group: Any = None
    depth = 0
    is_first = False
    """Whether no module has run in FP8 yet in the outermost region."""
    is_again = False
    """A forward pass that is computed once more for the backward pass."""
    keeps = False
    """A forward pass that will be computed once more."""
    ran: list[Any] = []


def reset() -> None:
    MADE.clear()
    CALLED.clear()
    Region.ran = []
    assert Region.depth == 0 and not Region.enabled


class autocast:
    def __init__(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
        self.chosen = enabled, recipe, amax_reduction_group

    def __enter__(self) -> autocast:
        self.before = Region.enabled, Region.recipe, Region.group
        Region.enabled, Region.recipe, Region.group = self.chosen
        if Region.depth == 0:
            Region.is_first = True
        Region.depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        Region.enabled, Region.recipe, Region.group = self.before
        Region.depth -= 1
        if self.chosen[0] and Region.depth == 0 and torch.is_grad_enabled() and not Region.is_again:
            update_scales("scaling_fwd", Region.ran, self.chosen[2])


class State:
    """DelayedScalingRecipeState: one column per tensor."""

    def __init__(self, recipe: DelayedScaling, count: int) -> None:
        self.scale = torch.ones(count)
        self.amax_history = torch.zeros(recipe.amax_history_len, count)


@torch.no_grad()
def update_scales(direction: str, modules: list[Any], group: Any) -> None:
    """The largest values over the group's ranks, then the scales of the next pass."""
    for module in dict.fromkeys(modules):
        state, recipe = module.fp8_meta.get(direction), module.fp8_meta["recipe"]
        if not isinstance(state, State):
            continue
        if recipe.reduce_amax and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(state.amax_history[0], op=dist.ReduceOp.MAX, group=group)
        amax = state.amax_history.amax(0) if recipe.amax_compute_algo == "max" else state.amax_history[0]
        largest = torch.finfo(recipe.fp8_format.value[direction == "scaling_bwd"]).max
        state.scale.copy_(torch.where(amax > 0, largest / amax, state.scale))
        state.amax_history.copy_(state.amax_history.roll(-1, 0))
        state.amax_history[0].zero_()


class Module(nn.Module):
    """TransformerEngineBaseModule."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.kept_scales: list[Tensor] = []

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        count = self.fp8_meta["num_gemms"]
        for direction, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if direction not in self.fp8_meta:
                is_delayed = isinstance(recipe, DelayedScaling)
                self.fp8_meta[direction] = State(recipe, tensors * count) if is_delayed else object()

    def prepare_forward(self, inp: Tensor, num_gemms: int = 1) -> None:
        for name, parameter in self.named_parameters():
            assert parameter.device.type != "meta", f"{name} was not lent"
            assert parameter.dtype == inp.dtype, f"{name} is {parameter.dtype}, the input {inp.dtype}"
        if Region.enabled:
            CALLED.append(type(self).__name__)
            self.fp8_meta["num_gemms"], self.fp8_meta["recipe"] = num_gemms, Region.recipe
            self.init_fp8_meta_tensors(Region.recipe)
            Region.ran.append(self)

    def rounded(self, x: Tensor, direction: str, column: int, scales: Tensor | None = None) -> Tensor:
        """x in FP8 and back."""
        recipe, state = self.fp8_meta["recipe"], self.fp8_meta[direction]
        dtype = recipe.fp8_format.value[direction == "scaling_bwd"]
        largest = torch.finfo(dtype).max
        if isinstance(state, State):
            scale = (state.scale if scales is None else scales)[column]
            if not Region.is_again:
                state.amax_history[0, column] = torch.maximum(state.amax_history[0, column], x.abs().amax().float())
        else:
            scale = largest / x.abs().amax().float().clamp(min=1e-12)
        return ((x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)

    def scales_of_pass(self) -> Tensor | None:
        """Of delayed scaling; a second forward pass takes those of the first."""
        state = self.fp8_meta["scaling_fwd"]
        if not isinstance(state, State):
            return None
        if Region.is_again:
            return self.kept_scales.pop(0)
        scales = state.scale.clone()
        if Region.keeps:
            self.kept_scales.append(scales)
        return scales


class Linear(Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ) -> None:
        MADE.append(("Linear", {key: value for key, value in locals().items() if key not in ("self", "__class__")}))
        super().__init__()
        self.tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
        assert parallel_mode in (None, "column", "row") and self.tp_size == tp_size
        divide = {None: (1, 1), "column": (self.tp_size, 1), "row": (1, self.tp_size)}[parallel_mode]
        assert out_features % divide[0] == 0 and in_features % divide[1] == 0
        shape = out_features // divide[0], in_features // divide[1]
        self.tp_group, self.parallel_mode = tp_group, parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuses = fuse_wgrad_accumulation
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=params_dtype))
        self.use_bias = bias
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=params_dtype))

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self.prepare_forward(inp)
        if Region.enabled:
            for tensor in (inp, self.weight):
                leading = math.prod(tensor.shape[:-1])
                assert leading % 8 == 0 and tensor.shape[-1] % 16 == 0, f"FP8 does not take {tuple(tensor.shape)}"
        bias = self.bias if self.use_bias else None
        return _Linear.apply(inp, self.weight, bias, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: Linear) -> Tensor:
        ctx.module, ctx.is_fp8, ctx.has_bias, ctx.weight = module, Region.enabled, bias is not None, weight
        ctx.is_last = ctx.is_fp8 and Region.is_first  # the first to run is the last in the backward pass
        if ctx.is_fp8:
            Region.is_first = False
            ctx.group, scales = Region.group, module.scales_of_pass()
            x, used = module.rounded(x, "scaling_fwd", 0, scales), module.rounded(weight, "scaling_fwd", 1, scales)
        else:
            used = weight
        ctx.save_for_backward(x, used)  # this rank's part of the sequence
        gathers = module.parallel_mode == "column" and module.sequence_parallel
        y = F.linear(gathered(x, module.tp_group) if gathers else x, used, bias)
        if module.parallel_mode == "row":
            y = scattered(y, module.tp_group) if module.sequence_parallel else summed(y, module.tp_group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        module, (x, used) = ctx.module, ctx.saved_tensors
        grad = grads[0]
        if module.parallel_mode == "row" and module.sequence_parallel:
            grad = gathered(grad, module.tp_group)
        if module.parallel_mode == "column" and module.sequence_parallel:
            x = gathered(x, module.tp_group)
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        if ctx.is_fp8:
            grad = module.rounded(grad, "scaling_bwd", 0)
        grad_x = grad @ used
        if module.parallel_mode == "column":
            grad_x = scattered(grad_x, module.tp_group) if module.sequence_parallel else summed(grad_x, module.tp_group)
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        if module.fuses:
            ctx.weight.main_grad.addmm_(rows.t().float(), columns.float())
            ctx.weight.grad_added_to_main_grad = True
            grad_weight = torch.full_like(ctx.weight, float("nan"))  # of any content
        else:
            grad_weight = rows.t() @ columns
        if ctx.is_last:
            update_scales("scaling_bwd", Region.ran, ctx.group)
            Region.ran.clear()
        return grad_x, grad_weight, grad_bias, None


def gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def summed(x: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def scattered(x: Tensor, group: Any) -> Tensor:
    return summed(x, group).chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


class GroupedLinear(Module):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cuda",
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
        single_grouped_weight=False,
        single_grouped_bias=False,
        name=None,
        use_grouped_tensor=None,
    ) -> None:
        MADE.append(("GroupedLinear", {k: v for k, v in locals().items() if k not in ("self", "__class__")}))
        super().__init__()
        self.num_gemms = num_gemms
        for gemm in range(num_gemms):
            weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
            self.register_parameter(f"weight{gemm}", nn.Parameter(weight))

    def forward(self, inp, m_splits, is_first_microbatch=None, out=None, dgrad_out=None):
        self.prepare_forward(inp, self.num_gemms)
        assert len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        scales = self.scales_of_pass() if Region.enabled else None
        outputs = []
        for gemm, rows in enumerate(inp.split(m_splits)):
            weight = getattr(self, f"weight{gemm}")
            assert weight.is_contiguous()
            if Region.enabled:
                assert rows.shape[0] % 16 == 0, f"FP8 does not take {rows.shape[0]} rows"
                rows = _round_through(self, rows, 3 * gemm, scales) if rows.shape[0] else rows
                weight = _round_through(self, weight, 3 * gemm + 1, scales)
            outputs.append(rows @ weight.t())
        return torch.cat(outputs)


def _round_through(module: Module, x: Tensor, column: int, scales: Tensor | None) -> Tensor:
    return x + (module.rounded(x.detach(), "scaling_fwd", column, scales) - x.detach())


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms, align_size=None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp, m_splits):
        padded = [-(-m // self.align_size) * self.align_size for m in m_splits]
        parts = zip(inp.split(m_splits), padded, strict=True)
        return torch.cat([F.pad(part, (0, 0, 0, size - part.shape[0])) for part, size in parts]), padded


class Fp8Unpadding(Fp8Padding):
    def forward(self, inp, m_splits):
        padded = [-(-m // self.align_size) * self.align_size for m in m_splits]
        return torch.cat([part[:m] for part, m in zip(inp.split(padded), m_splits, strict=True)])


class DotProductAttention(Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        bottom_right_diagonal=None,
        softcap=0.0,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
        name=None,
    ) -> None:
        MADE.append(("DotProductAttention", {k: v for k, v in locals().items() if k not in ("self", "__class__")}))
        super().__init__()
        self.heads, self.groups, self.width = num_attention_heads, num_gqa_groups, kv_channels
        self.dropout, self.softmax_scale = attention_dropout, softmax_scale

    def forward(
        self,
        query_layer=None,
        key_layer=None,
        value_layer=None,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        bottom_right_diagonal=None,
        softcap=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
    ):
        assert attn_mask_type == "causal" and attention_mask is None and qkv_format == "sbhd"
        assert query_layer.shape[2:] == (self.heads, self.width), tuple(query_layer.shape)
        assert key_layer.shape[2:] == value_layer.shape[2:] == (self.groups, self.width), tuple(key_layer.shape)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        k, v = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * self.softmax_scale
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return (weights @ v).permute(2, 0, 1, 3).flatten(2)


class _Norm(nn.Module):
    """Computes, and returns, in its weights' dtype."""

    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        **kwargs,
    ) -> None:
        MADE.append((type(self).__name__, {"normalized_shape": normalized_shape, "eps": eps, **kwargs}))
        assert kwargs.keys() <= {"device", "dtype", "sm_margin"}
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, **kwargs))


class RMSNorm(_Norm):
    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class LayerNorm(_Norm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps)


def checkpoint(function: Any, *args: Any, use_reentrant: bool = True, **kwargs: Any) -> Any:
    """The second pass runs in the FP8 region of the first, with its scales, and moves none."""
    region = Region.enabled, Region.recipe, Region.group
    assert not use_reentrant
    runs: list[bool] = []

    def run(*arguments: Any) -> Any:
        is_again = bool(runs)
        runs.append(True)
        if not is_again:
            Region.keeps = True
            try:
                return function(*arguments)
            finally:
                Region.keeps = False
        Region.is_again, before = True, (Region.enabled, Region.recipe, Region.group)
        Region.enabled, Region.recipe, Region.group = region
        try:
            return function(*arguments)
        finally:
            Region.is_again = False
            Region.enabled, Region.recipe, Region.group = before

    return torch_checkpoint(run, *args, use_reentrant=False, **kwargs)


RECIPES = {
    kind.__name__: kind
    for kind in (Format, DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling)
}
MODULES = {
    kind.__name__: kind
    for kind in (
        *(Linear, GroupedLinear, DotProductAttention, RMSNorm, LayerNorm, Fp8Padding, Fp8Unpadding),
        *(autocast, checkpoint),
    )
}
