"""Configuration of a decoder whose residual path is a part that was chosen. Written by megatron_hc."""

from transformers import PretrainedConfig


class MegatronHCConfig(PretrainedConfig):
    """All that the modelling code beside this file reads. Its defaults are those of a plain pre-norm decoder."""

    model_type = "megatron_hc"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=256,
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.02,
        use_cache=True,
        # Shape of a layer.
        position_embedding="rope",  # or "learned", "none"
        rope_base=10000.0,
        rotary_percent=1.0,
        rope_scaling_factor=None,  # Llama 3's scaling
        norm="RMSNorm",  # or "LayerNorm"
        norm_epsilon=1e-5,
        norm_bias=False,  # of an RMSNorm
        layernorm_bias=True,  # of a LayerNorm
        norm_placement="pre",
        normformer_residual_scale=False,
        activation="swiglu",  # or "gelu", "gelu_tanh", "squared_relu"
        linear_bias=False,
        qkv_bias=False,
        qk_norm=None,  # or "per-head", "across-heads"
        # Residual path.
        residual="plain",
        residual_options=None,  # what the method needs beside its name, see its class
        fp32_residual=False,
        stream_factor=1.0,  # DeepNorm's alpha
        branch_scale=1.0,  # on every sublayer's output
        # Value residual.
        value_residual="none",  # or "constant", "learnable", "dense", "neutreno", "per-token", "single"
        value_weights=None,  # of the first layer's values and of a layer's own; neutreno: one number
        value_first_layer=1,  # the first one that mixes
        # Mixture of experts.
        num_experts=None,
        expert_layers=None,  # one truth value per layer
        expert_size=None,
        experts_per_token=2,
        router_options=None,  # see Router
        shared_expert_size=None,
        shared_expert_gate=False,
        tie_word_embeddings=True,
        **kwargs,
    ):
        values = dict(locals())
        for name in ("self", "kwargs", "__class__", "tie_word_embeddings"):
            values.pop(name, None)
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
