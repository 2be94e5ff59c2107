"""Which residual path the model has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from megatron_hc.config.common import flag, positive, require

RESIDUAL_CONNECTIONS = (
    "plain",
    "hyper",
    "frac",
    "mhc",
    "mhc-lite",
    "kromhc",
    "gated",
    "virtual-width",
    "attention",
    "denseformer",
    "muddformer",
    "rezero",
    "layerscale",
    "laurel",
    "orthogonal",
    "sparse-aggregation",
    "deep-delta",
)

LaurelForm = Literal["rw", "lr", "pa", "rw-lr", "rw-pa", "lr-pa", "rw-lr-pa"]
MIXING = ("hyper", "frac", "mhc", "mhc-lite", "kromhc", "virtual-width")
FLAG_USERS: dict[str, tuple[str, ...]] = {
    "residual_streams": (*MIXING, "gated"),
    "static_residual": MIXING,
    "residual_readout": tuple(name for name in MIXING if name != "frac"),
    "residual_norm_weight": ("hyper", "frac", "virtual-width"),
    "gated_residual_rank": ("gated",),
    "virtual_width_fractions": ("virtual-width",),
    "virtual_width_projections": ("virtual-width",),
    "attention_residual_block_size": ("attention",),
    "denseformer_dilation": ("denseformer",),
    "denseformer_period": ("denseformer",),
    "layerscale_init": ("layerscale",),
    "laurel_form": ("laurel",),
    "laurel_rank": ("laurel",),
    "laurel_previous": ("laurel",),
    "orthogonal_form": ("orthogonal",),
    "output_init_by_streams": ("hyper", "mhc", "mhc-lite", "kromhc", "gated"),
}
"""Flags that only some residual methods read."""


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Which residual path the model has."""

    residual_connection: str = field(default="plain", metadata={"choices": RESIDUAL_CONNECTIONS})
    """How a sublayer reads from and writes to the residual path: see docs/residual-methods.md."""
    residual_streams: int = 4
    """Expansion rate n of hyper-connections, or number m of fractions of frac-connections."""
    static_residual: bool = False
    """Mixing weights that do not depend on the token (the default is dynamic: static plus token-dependent)."""
    residual_readout: Literal["mean", "sum"] = "mean"
    """How n streams become one before the final norm; the papers print sum, mean equals pre-norm eps included."""
    residual_norm_weight: bool | None = None
    """Learned weight in the norm before dynamic coefficients (default: off for hyper, on for frac, virtual-width)."""
    gated_residual_rank: int | None = None
    """Inner width of the gates of gated residuals (default: d / 8)."""
    virtual_width_fractions: int = 2
    """Number m of fractions of the hidden vector in virtual width networks, whose --residual-streams are d / m wide."""
    virtual_width_projections: bool = True
    """Learned matrices between d and the virtual width at both ends (without: copies, and the mean of the copies)."""
    attention_residual_block_size: int = 0
    """Sublayers per block of attention residuals (0: full, every sublayer output is a source of its own)."""
    denseformer_dilation: int = 1
    """Average only layer outputs whose distance this divides."""
    denseformer_period: int = 1
    """Average after every so many layers."""
    mhc_convention: Literal["paper", "megatron"] = "paper"
    """Form of mhc: the paper's, starting at pre-norm, or Megatron-LM's (Sinkhorn rows first, Xavier initial values)."""
    mhc_single_pass: bool = False
    """mhc whose read weights come from the previous sublayer's streams (DeepSeek-V4.1)."""
    mhc_sinkhorn_iterations: int = 20
    """Pairs of normalisations that make the stream matrix of mhc doubly stochastic."""
    mhc_init_gating_factor: float = 0.01
    """Initial alpha, the scale of the token-dependent part of the weights of mhc, mhc-lite and kromhc."""
    layerscale_init: float | None = None
    """Initial value of LayerScale's weights (default: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond)."""
    laurel_form: LaurelForm = "lr"
    """Parts of LAuReL: rw weighs output and stream, lr adds a low-rank map of the stream, pa adds earlier streams."""
    laurel_rank: int = 4
    """Rank of the matrices of LAuReL's lr."""
    laurel_previous: int = 3
    """Number of streams, the newest included, that LAuReL's pa adds."""
    orthogonal_form: Literal["feature", "global"] = "feature"
    """Where orthogonal updates take their scalar products: within a token, or (refused) over all tokens."""
    residual_scale: Literal["none", "depth-mup", "completep"] = "none"
    """Factor on sublayers' outputs, (layers / base layers)^-a with a = 1/2 (depth-mup) or 1 (completep), with the rules
    for learning rates and Adam's epsilon that let both carry over from --base-num-layers."""
    base_num_layers: int | None = None
    """With --residual-scale: the number of layers that --lr was tuned at."""
    stochastic_depth: float = 0.0
    """Chance that a sublayer of a sample is left out in training: at the last sublayer, growing linearly with depth."""
    layerdrop: float = 0.0
    """Chance that a layer of a sample is left out in training, both of its sublayers together."""
    linearity_regularization: float = 0.0
    """Weight of the sum over layers of 1 - cosine(stream into, stream out of the layer) in the training loss."""
    output_init_by_streams: bool = False
    """Divide the initial weights of sublayers' output matrices by the square root of --residual-streams (HC's option).
    """

    @property
    def num_streams(self) -> int:
        """Streams as wide as the hidden vector that a token has, rounded up."""
        if self.residual_connection == "virtual-width":
            return -(-self.residual_streams // self.virtual_width_fractions)
        return self.residual_streams if self.residual_connection in MIXING and self.residual_connection != "frac" else 1

    def validate(self, hidden_size: int) -> None:
        require(
            self.residual_connection in RESIDUAL_CONNECTIONS,
            f"--residual-connection ({self.residual_connection}) must be one of {', '.join(RESIDUAL_CONNECTIONS)}",
        )
        positive(self, "residual_streams")
        if self.residual_connection == "frac":
            require(
                hidden_size % self.residual_streams == 0,
                f"--residual-streams ({self.residual_streams}) must divide --hidden-size ({hidden_size}) "
                "with --residual-connection frac, where a stream is a fraction of the hidden vector",
            )
        self._validate_manifold()
        self._validate_users()
        if self.residual_connection == "gated":
            require(
                self.gated_residual_rank is not None or hidden_size >= 8,
                f"--hidden-size ({hidden_size}) is too small for gates of rank d / 8: set --gated-residual-rank",
            )
        if self.residual_connection == "virtual-width":
            self._validate_virtual_width(hidden_size)
        self._validate_single_stream(hidden_size)
        self._validate_depth()

    def _validate_users(self) -> None:
        """A flag that the method does not read is refused, where it is not at its default."""
        positive(self, "gated_residual_rank", "virtual_width_fractions")
        positive(self, "denseformer_dilation", "denseformer_period")
        require(
            self.attention_residual_block_size >= 0,
            f"--attention-residual-block-size must not be negative, not {self.attention_residual_block_size}",
        )
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name, users in FLAG_USERS.items():
            require(
                self.residual_connection in users or getattr(self, name) == defaults[name],
                f"{flag(name)} ({getattr(self, name)}) needs --residual-connection {' or '.join(users)}, not "
                f"{self.residual_connection}",
            )
        require(
            not self.static_residual or self.residual_norm_weight is None,
            "--residual-norm-weight weights a norm that --static-residual takes away: leave it out",
        )

    def _validate_single_stream(self, hidden_size: int) -> None:
        positive(self, "layerscale_init", "laurel_rank")
        require(
            self.orthogonal_form == "feature",
            "--orthogonal-form global projects on the stream of all tokens together, so a token would see later ones: "
            "use feature",
        )
        if self.residual_connection != "laurel":
            return
        require(
            self.laurel_rank <= hidden_size,
            f"--laurel-rank ({self.laurel_rank}) must be at most --hidden-size ({hidden_size})",
        )
        require(
            self.laurel_rank == 4 or "lr" in self.laurel_form,
            f"--laurel-rank ({self.laurel_rank}) needs a --laurel-form with lr, not {self.laurel_form}",
        )
        require(
            self.laurel_previous == 3 or "pa" in self.laurel_form,
            f"--laurel-previous ({self.laurel_previous}) needs a --laurel-form with pa, not {self.laurel_form}",
        )
        require(self.laurel_previous >= 1, f"--laurel-previous must be at least 1, not {self.laurel_previous}")

    def _validate_depth(self) -> None:
        positive(self, "base_num_layers")
        require(
            (self.residual_scale == "none") == (self.base_num_layers is None),
            f"--residual-scale ({self.residual_scale}) and --base-num-layers ({self.base_num_layers}) go together: the "
            "factor is a power of layers / base layers",
        )
        for name in ("stochastic_depth", "layerdrop"):
            require(0 <= getattr(self, name) < 1, f"{flag(name)} must be in [0, 1), not {getattr(self, name)}")
        require(
            self.linearity_regularization >= 0,
            f"--linearity-regularization must not be negative, not {self.linearity_regularization}",
        )

    def _validate_virtual_width(self, hidden_size: int) -> None:
        n, m = self.residual_streams, self.virtual_width_fractions
        require(
            hidden_size % m == 0,
            f"--virtual-width-fractions ({m}) must divide --hidden-size ({hidden_size})",
        )
        require(
            n >= m,
            f"--residual-streams ({n}) must be at least --virtual-width-fractions ({m}), which a sublayer reads",
        )
        require(
            not self.virtual_width_projections or self.residual_readout == "mean",
            f"--residual-readout {self.residual_readout} needs --no-virtual-width-projections: a learned projection "
            "reads the streams out",
        )

    def _validate_manifold(self) -> None:
        method, n = self.residual_connection, self.residual_streams
        positive(self, "mhc_sinkhorn_iterations", "mhc_init_gating_factor")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name in ("mhc_convention", "mhc_single_pass", "mhc_sinkhorn_iterations", "mhc_init_gating_factor"):
            users = ("mhc", "mhc-lite", "kromhc") if name == "mhc_init_gating_factor" else ("mhc",)
            require(
                method in users or getattr(self, name) == defaults[name],
                f"{flag(name)} ({getattr(self, name)}) needs --residual-connection {' or '.join(users)}, not {method}",
            )
        if method not in ("mhc", "mhc-lite", "kromhc"):
            return
        require(n >= 2, f"--residual-streams ({n}) must be at least 2 with --residual-connection {method}")
        require(
            self.residual_norm_weight is None,
            f"--residual-norm-weight does not go with --residual-connection {method}, whose projection takes up the "
            "weight: leave it out",
        )
        require(
            not (self.static_residual and self.mhc_init_gating_factor != defaults["mhc_init_gating_factor"]),
            f"--mhc-init-gating-factor ({self.mhc_init_gating_factor}) scales the token-dependent part of the weights, "
            "which --static-residual takes away",
        )
        require(
            method != "mhc-lite" or n <= 5,
            f"--residual-streams ({n}) must be at most 5 with --residual-connection mhc-lite, whose projection has a "
            "row for each of the n! permutations: use kromhc or mhc",
        )
        require(
            method != "kromhc" or n & (n - 1) == 0,
            f"--residual-streams ({n}) must be a power of two with --residual-connection kromhc, whose stream matrix "
            "is a Kronecker product of 2 x 2 matrices",
        )
        if self.mhc_single_pass:
            require(
                self.mhc_convention == "paper",
                "--mhc-single-pass and --mhc-convention megatron exclude each other: Megatron-LM has no such form",
            )
            require(
                self.residual_readout == "mean",
                f"--residual-readout {self.residual_readout} does not go with --mhc-single-pass, which reads out with "
                "the last sublayer's weights",
            )
