"""The decoder's shape and arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from megatron_hc.config.common import flag, positive, require
from megatron_hc.config.moe import MoEConfig
from megatron_hc.config.residual import ResidualConfig

ValueResidualName = Literal["none", "half", "constant", "learnable", "sparse", "dense", "neutreno", "per-token"]
NormPlacementName = Literal[
    "pre", "post", "deepnorm", "reordered", "peri", "hybrid", "hybrid-star", "normformer", "res-post-cosine", "none"
]
VALUE_WEIGHTS = {"half": (0.5, 0.5), "constant": (2.0, 1.0), "sparse": (5.0, 1.0), "learnable": (0.5, 0.5)}
"""Default weights (of V_1, of a layer's own V) of the value residuals that have two numbers."""
REPLACING_PLACEMENTS = ("post", "deepnorm", "hybrid", "hybrid-star")
"""Norm placements in which a norm replaces the stream."""
REPLACEABLE_CONNECTIONS = ("plain", "rezero", "layerscale", "orthogonal")
"""Methods whose stream may be replaced by its norm: one stream, and no state beside it."""
NO_READ_NORM_PLACEMENTS = ("reordered", "res-post-cosine", "none")
HEAD_NORM_PLACEMENTS = ("hybrid", "hybrid-star", "res-post-cosine")
OWN_NORM_CONNECTIONS = ("gated", "muddformer")
"""Methods that norm their own reads."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape and arithmetic."""

    num_layers: int = field(default=0, metadata={"required": True})
    """Number of transformer layers; each holds two sublayers, attention and MLP."""
    hidden_size: int = field(default=0, metadata={"required": True})
    """Width d of the hidden vector."""
    ffn_hidden_size: int | None = None
    """Width of the MLP (default: 4 d, or with --swiglu int(4 d * 2/3 / 64) * 64)."""
    num_attention_heads: int = field(default=0, metadata={"required": True})
    """Number of query heads."""
    group_query_attention: bool = False
    """Grouped-query attention with --num-query-groups key/value heads."""
    num_query_groups: int = 1
    """Number of key/value heads with --group-query-attention."""
    kv_channels: int | None = None
    """Width of one head (default: d / heads)."""
    seq_length: int = field(default=0, metadata={"required": True})
    """Number of tokens of a training sample."""
    max_position_embeddings: int | None = None
    """Longest sequence that positions are made for (default: --seq-length)."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How a token learns its position."""
    rotary_base: float = 10000.0
    """Base period of rotary embeddings."""
    rotary_percent: float = 1.0
    """Share of a head's channels that are rotated."""
    use_rope_scaling: bool = False
    """Llama-3 scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of every norm."""
    disable_bias_layernorm: bool = False
    """No bias in LayerNorms, as nanoGPT has it with bias=False (Megatron-LM's LayerNorms always have one)."""
    rmsnorm_bias: bool = False
    """A bias in every RMSNorm: what a LayerNorm leaves that was made one (tools/retrofit_residual.py --pre-rmsnorm)."""
    norm_epsilon: float = 1e-5
    """Epsilon of every norm."""
    swiglu: bool = False
    """Gated SiLU in the MLP (the default is GELU)."""
    squared_relu: bool = False
    """Squared ReLU in the MLP."""
    openai_gelu: bool = False
    """GELU by its tanh formula, as GPT-2 has it (the default is exact; they differ by 1e-3 at most)."""
    disable_bias_linear: bool = False
    """No bias in linear layers (norms keep theirs: see --disable-bias-layernorm)."""
    add_qkv_bias: bool = False
    """Bias in the QKV projection even with --disable-bias-linear."""
    qk_layernorm: bool = False
    """Norm of queries and keys per head."""
    qk_layernorm_across_heads: bool = False
    """With --qk-layernorm: one norm over all heads together instead (OLMo 2, OLMoE)."""
    untie_embeddings_and_output_weights: bool = False
    """Output weights of their own instead of the embedding's."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary in memory to a multiple of this times the tensor-parallel size; never stored or predicted."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights (outputs of sublayers: divided by sqrt(2 layers))."""
    attention_dropout: float = 0.0
    """Dropout of attention weights (Megatron-LM's default is 0.1)."""
    hidden_dropout: float = 0.0
    """Dropout of embeddings and sublayer outputs (Megatron-LM's default is 0.1)."""
    fused_residual: bool = True
    """Write, mixing weights, read and norm of hyper-connections as one operation (float64: never)."""
    fused_residual_backend: Literal["auto", "torch", "cpp", "triton"] = "auto"
    """What --fused-residual runs on: auto takes triton on CUDA and torch on a CPU; cpp is built at its first use."""
    fp32_residual_connection: bool = False
    """Keep the residual streams in fp32 under --bf16."""
    attention_softmax_in_fp32: bool = False
    """Attention with scores and softmax held in fp32, instead of torch's fused attention."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Kernel of attention: flash attention, cuDNN's (fused, CUDA only) or matrix products and a softmax (unfused); auto
    tries cuDNN's first on NVIDIA Hopper, where it is fastest, and leaves the choice to torch elsewhere."""
    norm_placement: NormPlacementName = "pre"
    """Where a sublayer's norms stand."""
    normformer_residual_scale: bool = False
    """With --norm-placement normformer a learned factor per channel on the stream that the MLP is added to."""
    init_scheme: Literal["megatron", "deepnorm", "fixup", "t-fixup", "orthogonal"] = "megatron"
    """Initial weights: --init-method-std; Xavier's with DeepNorm's gains; Fixup's or T-Fixup's; orthogonal matrices."""
    value_residual: ValueResidualName = "none"
    """How attention of later layers mixes in the values of the first one (ResFormer, 2410.17897)."""
    value_residual_first_weight: float | None = None
    """Weight of the first layer's values with constant (default 2), sparse (5), learnable (initial value: 0.5)."""
    value_residual_own_weight: float | None = None
    """Weight of a layer's own values with constant, sparse (default 1), learnable (initial value: 0.5)."""
    value_residual_layers: int | None = None
    """With --value-residual sparse: number of last layers that mix (default: a third of the layers, rounded up)."""
    neutreno_coefficient: float | None = None
    """With --value-residual neutreno: weight of the difference of values (default 0.4)."""
    single_layer_value: bool = False
    """Only the first layer makes values, all others use them (SVFormer): the cache is almost halved."""
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """The residual path."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Mixture of experts."""

    @property
    def expert_ffn_size(self) -> int:
        """Width of one expert."""
        return self.moe.moe_ffn_hidden_size or self.ffn_size

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts instead of an MLP."""
        return self.moe.has_experts(self.num_layers)[layer]

    @property
    def residual_stream_factor(self) -> float:
        """What the stream is multiplied by when a sublayer's output is added to it."""
        return (2 * self.num_layers) ** 0.25 if self.norm_placement == "deepnorm" else 1.0

    @property
    def depth_ratio(self) -> float:
        """Layers over --base-num-layers."""
        return self.num_layers / (self.residual.base_num_layers or self.num_layers)

    @property
    def depth_power(self) -> float:
        """What a sublayer's output is multiplied by is ``depth_ratio`` to minus this power."""
        return {"none": 0.0, "depth-mup": 0.5, "completep": 1.0}[self.residual.residual_scale]

    @property
    def branch_scale(self) -> float:
        """What a sublayer's output is multiplied by before it is written (--residual-scale)."""
        return self.depth_ratio**-self.depth_power

    @property
    def layerscale_start(self) -> float:
        """Initial value of LayerScale's weights (CaiT's by depth)."""
        by_depth = 0.1 if self.num_layers <= 18 else 1e-5 if self.num_layers <= 24 else 1e-6
        given = self.residual.layerscale_init
        return by_depth if given is None else given

    @property
    def value_weights(self) -> tuple[float, float]:
        """(weight of V_1, weight of a layer's own V) of --value-residual."""
        first, own = VALUE_WEIGHTS[self.value_residual]
        given = (self.value_residual_first_weight, self.value_residual_own_weight)
        return first if given[0] is None else given[0], own if given[1] is None else given[1]

    @property
    def num_value_residual_layers(self) -> int:
        """How many last layers mix with --value-residual sparse."""
        return self.value_residual_layers or -(-self.num_layers // 3)

    @property
    def neutreno_weight(self) -> float:
        return 0.4 if self.neutreno_coefficient is None else self.neutreno_coefficient

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias. As in Megatron-LM, --disable-bias-linear is about linear layers alone."""
        return self.rmsnorm_bias if self.normalization == "RMSNorm" else not self.disable_bias_layernorm

    @property
    def num_kv_heads(self) -> int:
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    def validate(self) -> None:
        positive(self, "ffn_hidden_size", "kv_channels", "num_query_groups", "make_vocab_size_divisible_by")
        positive(self, "rotary_base", "rope_scaling_factor", "init_method_std")
        require(self.norm_epsilon >= 0, f"--norm-epsilon must not be negative, not {self.norm_epsilon}")
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
            require(getattr(self, name) > 0, f"{flag(name)} ({getattr(self, name)}) must be given and positive")
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"--num-attention-heads ({self.num_attention_heads}) must divide --hidden-size ({self.hidden_size}), "
            "or give --kv-channels",
        )
        require(
            self.ffn_size > 0, f"--hidden-size ({self.hidden_size}) is too small for --swiglu: set --ffn-hidden-size"
        )
        require(
            self.group_query_attention or self.num_query_groups == 1,
            f"--num-query-groups ({self.num_query_groups}) needs --group-query-attention, without which every head has "
            "its own: give both or neither",
        )
        require(
            self.num_attention_heads % self.num_kv_heads == 0,
            f"--num-query-groups ({self.num_kv_heads}) must divide --num-attention-heads ({self.num_attention_heads})",
        )
        require(
            self.max_positions >= self.seq_length,
            f"--max-position-embeddings ({self.max_positions}) must be at least --seq-length ({self.seq_length})",
        )
        require(not (self.swiglu and self.squared_relu), "--swiglu and --squared-relu exclude each other")
        require(
            not (self.openai_gelu and (self.swiglu or self.squared_relu)),
            "--openai-gelu is about GELU: it does not go with --swiglu or --squared-relu",
        )
        require(
            not self.disable_bias_layernorm or self.normalization == "LayerNorm",
            f"--disable-bias-layernorm needs --normalization LayerNorm, not {self.normalization}, which has no bias "
            "unless --rmsnorm-bias asks for one: leave it out",
        )
        require(
            not self.rmsnorm_bias or self.normalization == "RMSNorm",
            f"--rmsnorm-bias needs --normalization RMSNorm, not {self.normalization}",
        )
        require(
            not self.rmsnorm_bias or self.residual.residual_connection not in OWN_NORM_CONNECTIONS,
            f"--residual-connection {self.residual.residual_connection} norms its reads itself, without the bias of "
            "--rmsnorm-bias: leave it out",
        )
        for name in ("attention_dropout", "hidden_dropout"):
            require(0 <= getattr(self, name) < 1, f"{flag(name)} must be in [0, 1), not {getattr(self, name)}")
        self._validate_rotary()
        if self.position_embedding_type == "rope":
            rotary = int(self.head_size * self.rotary_percent)
            require(
                0 < self.rotary_percent <= 1 and rotary > 0 and rotary % 2 == 0,
                f"--rotary-percent ({self.rotary_percent}) of a head of {self.head_size} channels must be an even, "
                f"positive number of channels, not {rotary}",
            )
        self.residual.validate(self.hidden_size)
        self._validate_values()
        self._validate_attention()
        self._validate_norms()
        self.moe.validate(self.num_layers)
        require(
            self.moe.num_experts is None or self.norm_placement != "normformer",
            "--norm-placement normformer and --num-experts exclude each other: its norm stands inside an MLP",
        )
        require(
            self.residual.denseformer_period <= self.num_layers,
            f"--denseformer-period ({self.residual.denseformer_period}) must not exceed --num-layers "
            f"({self.num_layers}), or nothing is averaged",
        )

    def _validate_rotary(self) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in ("rotary_base", "rotary_percent", "use_rope_scaling"):
            require(
                self.position_embedding_type == "rope" or getattr(self, name) == defaults[name],
                f"{flag(name)} ({getattr(self, name)}) needs --position-embedding-type rope, not "
                f"{self.position_embedding_type}",
            )
        require(
            self.use_rope_scaling or self.rope_scaling_factor == defaults["rope_scaling_factor"],
            f"--rope-scaling-factor ({self.rope_scaling_factor}) needs --use-rope-scaling",
        )

    def _validate_values(self) -> None:
        variant = self.value_residual
        users = {
            "value_residual_first_weight": ("constant", "sparse", "learnable"),
            "value_residual_own_weight": ("constant", "sparse", "learnable"),
            "value_residual_layers": ("sparse",),
            "neutreno_coefficient": ("neutreno",),
        }
        for name, allowed in users.items():
            value = getattr(self, name)
            require(
                value is None or variant in allowed,
                f"{flag(name)} ({value}) needs --value-residual {' or '.join(allowed)}, not {variant}",
            )
        chosen = f"--value-residual {variant}" if variant != "none" else "--single-layer-value"
        require(
            self.num_layers > 1 or (variant == "none" and not self.single_layer_value),
            f"--num-layers ({self.num_layers}) must be at least 2 with {chosen}, which is about later layers",
        )
        layers = self.value_residual_layers
        require(
            layers is None or 0 < layers < self.num_layers,
            f"--value-residual-layers ({layers}) must be positive and less than --num-layers ({self.num_layers}): "
            "the first layer has nothing to mix in",
        )
        require(
            variant == "none" or not self.single_layer_value,
            f"--value-residual {variant} and --single-layer-value exclude each other: with the latter later layers "
            "have no values of their own to mix",
        )
        require(
            not (self.single_layer_value and self.residual.residual_connection == "muddformer"),
            "--single-layer-value and --residual-connection muddformer exclude each other: MUDDFormer makes an input "
            "for the values that later layers then do not have",
        )

    def _validate_attention(self) -> None:
        backend = self.attention_backend
        require(
            backend == "auto" or not self.attention_softmax_in_fp32,
            f"--attention-backend {backend} and --attention-softmax-in-fp32 exclude each other: the latter writes "
            "attention out",
        )

    def _validate_norms(self) -> None:
        placement, method = self.norm_placement, self.residual.residual_connection
        chosen = f"--norm-placement {placement}"
        require(
            placement not in REPLACING_PLACEMENTS or method in REPLACEABLE_CONNECTIONS,
            f"{chosen} replaces the stream by its norm, which --residual-connection {method} does not allow: use "
            "--norm-placement pre, peri, normformer or reordered",
        )
        require(
            placement not in NO_READ_NORM_PLACEMENTS or method not in OWN_NORM_CONNECTIONS,
            f"{chosen} has no norm where a sublayer reads, but --residual-connection {method} norms its reads itself: "
            "use --norm-placement pre, peri or normformer",
        )
        require(
            placement not in HEAD_NORM_PLACEMENTS or not self.qk_layernorm,
            f"--qk-layernorm does not go with {chosen}, which norms queries and keys itself: leave it out",
        )
        require(
            self.qk_layernorm or not self.qk_layernorm_across_heads,
            "--qk-layernorm-across-heads needs --qk-layernorm",
        )
        require(
            not self.normformer_residual_scale or (placement == "normformer" and method == "plain"),
            "--normformer-residual-scale needs --norm-placement normformer and --residual-connection plain, not "
            f"{placement} and {method}",
        )
        require(
            self.init_scheme != "deepnorm" or placement == "deepnorm",
            f"--init-scheme deepnorm needs --norm-placement deepnorm, for whose stream factor its gains are made, not "
            f"{placement}",
        )
        require(
            self.init_scheme != "fixup" or method not in ("rezero", "deep-delta"),
            f"--init-scheme fixup starts sublayers' outputs at 0, from where --residual-connection {method} does not "
            "learn: use another of the two",
        )
        require(
            self.residual.residual_scale == "none" or method != "deep-delta",
            f"--residual-scale {self.residual.residual_scale} scales sublayers' outputs, of which "
            "--residual-connection deep-delta takes the direction only: leave it out",
        )
        require(
            self.residual.residual_scale == "none" or self.init_scheme in ("megatron", "orthogonal"),
            f"--residual-scale {self.residual.residual_scale} has initial values of its own, which do not shrink with "
            f"depth: --init-scheme must be megatron or orthogonal, not {self.init_scheme}",
        )
