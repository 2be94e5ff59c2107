"""--transformer-impl transformer_engine: linear layers, experts and attention by transformer-engine's modules.

Its modules get our parameters for each call (``kept.py``), our tensor-parallel groups, and do the collectives of a
tensor-parallel region themselves, in FP8 where they can. Everything between them stays ours: streams, residual methods,
norms (unless --norm-impl says otherwise), routers, embeddings, loss. FP8 is what these modules do inside of
``autocast``, so nothing else can fall into it; passes without gradients are in bf16.

Written against transformer-engine 2.20: ``module/linear.py``, ``module/grouped_linear.py``,
``attention/dot_product_attention``, ``quantization.py`` and ``common/recipe``.

Dims: S sequence, B batch, N rows, E experts, Q query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.backends.kept import Kept
from megatron_hc.config import BackendConfig, ModelConfig
from megatron_hc.kernels.norm import cast
from megatron_hc.model.attention import Attention, CoreAttention
from megatron_hc.model.experts import ExpertMatrix, Experts
from megatron_hc.model.gpt import GPT, LayerRunner
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.model.linear import Linear
from megatron_hc.packages import load
from megatron_hc.parallel.collectives import group_size
from megatron_hc.parallel.tensor import ColumnParallelLinear, RowParallelLinear, become

FLAG = "--transformer-impl transformer_engine"


# ---- linear layers ----


def _run(linear: Any, x: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    return linear.kept.lend(parameters)(cast(x, linear.weight.dtype))


def _weight_and_bias(linear: Linear) -> dict[str, nn.Parameter]:
    return {"weight": linear.weight} if linear.bias is None else {"weight": linear.weight, "bias": linear.bias}


class EngineLinear(Linear):
    """y = x W^T + b by ``Linear`` of transformer-engine."""

    kept: Kept

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x, _weight_and_bias(self))

    def forward_parts(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("config.validate: transformer-engine takes one input for all parts of a matrix")


class EngineColumnLinear(ColumnParallelLinear):
    """Its parallel_mode 'column': all-gather of the sequence (or the backward pass's all-reduce) inside."""

    kept: Kept

    def forward(self, x: Tensor) -> Tensor:
        return _run(self, x, _weight_and_bias(self))

    forward_parts = EngineLinear.forward_parts


class EngineRowLinear(RowParallelLinear):
    """Its parallel_mode 'row': the reduce-scatter (or all-reduce) inside; b is added once, after the sum."""

    kept: Kept

    def forward(self, x: Tensor) -> Tensor:
        y = _run(self, x, {"weight": self.weight})
        return y if self.bias is None else y + self.bias

    forward_parts = EngineLinear.forward_parts


LINEARS: dict[type[Linear], tuple[type[Linear], str | None]] = {
    Linear: (EngineLinear, None),
    ColumnParallelLinear: (EngineColumnLinear, "column"),
    RowParallelLinear: (EngineRowLinear, "row"),
}
"""Our class -> (the one that takes its place, transformer-engine's parallel_mode)."""


def attach_linear(modules: ModuleType, linear: Linear, fuses_accumulation: bool) -> Kept:
    """Have a linear layer, whole or a rank's part of one, run by transformer-engine.

    ``fuses_accumulation``: weight gradients go straight into ``weight.main_grad`` (Megatron-LM's protocol).
    """
    kind, mode = LINEARS[type(linear)]
    region = getattr(linear, "region", None)
    group = None if region is None else region.group
    rows, columns = linear.weight.shape
    ranks = group_size(group)
    module = modules.Linear(
        in_features=columns * (ranks if mode == "row" else 1),
        out_features=rows * (ranks if mode == "column" else 1),
        bias=linear.bias is not None and mode != "row",
        params_dtype=linear.weight.dtype,
        device="meta",
        parallel_mode=mode,
        tp_group=group,
        tp_size=ranks,
        sequence_parallel=region is not None and region.sequence_parallel,
        fuse_wgrad_accumulation=fuses_accumulation,
    )
    if fuses_accumulation:
        linear.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    become(linear, kind, kept=Kept(module))
    return linear.kept  # type: ignore[return-value]


# ---- attention ----


class EngineAttention(CoreAttention):
    """Causal attention by ``DotProductAttention``; while generating, and under other masks, torch's."""

    kept: Kept

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None or q.shape[0] != k.shape[0]:
            return super().forward(q, k, v, mask)
        module = self.kept.module
        if module.training != self.training:  # for dropout: it is no child, so train() does not reach it
            module.train(self.training)
        return module(q, k, v, qkv_format="sbhd", attn_mask_type="causal")


def attach_attention(modules: ModuleType, attention: Attention, layer: int) -> None:
    """Have a layer's softmax(q k^T) v, of this rank's heads, run by transformer-engine."""
    core, sizes = attention.core, dict(attention.qkv_parts.sizes)
    groups = attention.linear_qkv.weight.shape[0] // attention.qkv_parts.rows_per_group
    module = modules.DotProductAttention(
        num_attention_heads=groups * sizes["q"] // attention.head_size,
        kv_channels=attention.head_size,
        num_gqa_groups=groups,
        attention_dropout=core.dropout,
        qkv_format="sbhd",
        attn_mask_type="causal",
        layer_number=layer + 1,
        softmax_scale=1 / core.divisor,
    )
    become(core, EngineAttention, kept=Kept(module))


KERNELS = {"flash": "NVTE_FLASH_ATTN", "fused": "NVTE_FUSED_ATTN", "unfused": "NVTE_UNFUSED_ATTN"}
"""--attention-backend -> the environment variable by which transformer-engine is told."""


def choose_attention_kernel(backend: str) -> None:
    """As Megatron-LM does: only the chosen one is allowed; auto leaves the variables as they are."""
    if backend != "auto":
        os.environ.update({variable: str(int(name == backend)) for name, variable in KERNELS.items()})


# ---- experts ----


class EngineExperts:
    """Both matrices of a layer's experts by ``GroupedLinear``: one call for all experts of this rank."""

    def __init__(self, modules: ModuleType, experts: Experts, align: int | None) -> None:
        """``align``: under FP8, what each expert's rows are padded to a multiple of; None: no FP8 here."""
        self.experts, self.matrices = experts, {}
        for matrix in (experts.linear_fc1, experts.linear_fc2):
            _, in_features, out_features = matrix.stacked(experts.num_experts).shape
            module = modules.GroupedLinear(
                num_gemms=experts.num_experts,
                in_features=in_features,
                out_features=out_features,
                bias=False,
                params_dtype=matrix.weight.dtype,
                device="meta",
            )
            self.matrices[matrix.kind] = Kept(module)
        self.pad = self.unpad = None
        if align is not None:
            self.pad = modules.Fp8Padding(experts.num_experts, align)
            self.unpad = modules.Fp8Unpadding(experts.num_experts, align)

    def grouped(self, x: Tensor, matrix: ExpertMatrix, counts: Tensor) -> Tensor:
        """x [N, in] sorted by expert, counts [E] -> [N, out]; rows past the counts are zero."""
        sizes = counts.tolist()
        num_rows, rest = sum(sizes), x.shape[0] - sum(sizes)
        # [E, out, in]: fc2's are stored transposed, and transposed back at every call
        weights = matrix.stacked(self.experts.num_experts).transpose(1, 2)
        lent = {f"weight{expert}": weight.contiguous() for expert, weight in enumerate(weights.unbind(0))}
        module, rows = self.matrices[matrix.kind].lend(lent), x[:num_rows]
        if self.pad is not None and self.unpad is not None and torch.is_grad_enabled():
            rows, padded = self.pad(rows, sizes)
            y = self.unpad(module(rows, padded), sizes)
        else:
            y = module(rows, sizes)
        return torch.cat([y, y.new_zeros(rest, y.shape[1])]) if rest else y


def attach_experts(modules: ModuleType, experts: Experts, align: int | None) -> list[Kept]:
    """Have a layer's experts run by transformer-engine."""
    engine = EngineExperts(modules, experts, align)
    experts.grouped = engine.grouped  # type: ignore[method-assign]
    return list(engine.matrices.values())


# ---- FP8 ----


def recipe_of(options: BackendConfig, recipes: ModuleType, reduces_amax: bool) -> Any:
    """transformer-engine's recipe of --fp8-recipe, --fp8-format and the flags of delayed scaling."""
    kind = {"e4m3": recipes.Format.E4M3, "hybrid": recipes.Format.HYBRID}[options.fp8_format or "hybrid"]
    if options.fp8_recipe == "delayed":
        return recipes.DelayedScaling(
            fp8_format=kind,
            amax_history_len=options.fp8_amax_history_len,
            amax_compute_algo=options.fp8_amax_compute_algo,
            reduce_amax=reduces_amax,
        )
    names = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    return getattr(recipes, names[options.fp8_recipe])(fp8_format=kind)


def run_in_fp8(
    run: LayerRunner, autocast: Callable[..., Any], recipe: Any, group: Any, layers: Any, carry: Any, context: Any
) -> Any:
    """The layers of a stage in one FP8 region: delayed scaling updates its scales where a region ends."""
    if not torch.is_grad_enabled():
        return run(layers, carry, context)
    with autocast(enabled=True, recipe=recipe, amax_reduction_group=group):
        return run(layers, carry, context)


def keep_in_bf16(layer: TransformerLayer, autocast: Callable[..., Any]) -> None:
    """One of --first-last-layers-bf16."""
    forward = layer.forward

    def run(carry: Any, context: Any) -> Any:
        with autocast(enabled=False):
            return forward(carry, context)

    layer.forward = run  # type: ignore[method-assign]


def align_of(options: BackendConfig) -> int:
    """Rows of an expert in FP8 are padded to a multiple of this (``get_align_size_for_quantization``)."""
    return 32 if options.fp8_recipe == "mxfp8" else 16


# ---- all of it ----


def attach_transformer_engine(
    model: GPT, config: ModelConfig, options: BackendConfig, group: Any
) -> tuple[dict[str, Any], Any]:
    """Have a rank's model run by transformer-engine; ``group``: the ranks that agree on the scales of delayed scaling.

    Returns (its modules that may hold FP8 state, by the name of ours, their recipe); none without FP8.
    """
    modules, recipes = load(
        "transformer-engine", FLAG, "transformer_engine.pytorch", "transformer_engine.common.recipe"
    )
    choose_attention_kernel(config.attention_backend)
    found: dict[str, Any] = {}
    for layer in model.stage_layers():
        is_fp8, prefix = options.is_fp8_layer(layer.layer, config.num_layers), f"layers.{layer.layer}"
        kept = _attach_layer(
            modules, layer, align_of(options) if is_fp8 else None, options.gradient_accumulation_fusion
        )
        if is_fp8:
            found |= {f"{prefix}.{name}": module for name, module in kept.items()}
        elif options.fp8_format is not None:
            keep_in_bf16(layer, modules.autocast)
    if options.fp8_format is None:
        return {}, None
    recipe = recipe_of(options, recipes, reduces_amax=group is not None)
    model.run = partial(run_in_fp8, model.run, modules.autocast, recipe, group)
    return found, recipe


def _attach_layer(
    modules: ModuleType, layer: TransformerLayer, align: int | None, fuses_accumulation: bool
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, module in list(layer.named_modules()):
        if isinstance(module, Linear):
            kept[name] = attach_linear(modules, module, fuses_accumulation).module
        elif isinstance(module, Experts):
            first, second = attach_experts(modules, module, align)
            kept |= {f"{name}.linear_fc1": first.module, f"{name}.linear_fc2": second.module}
    attach_attention(modules, layer.attention, layer.layer)
    return kept
