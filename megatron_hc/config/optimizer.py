"""AdamW and its schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_hc.config.common import flag, positive, require


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedules."""

    lr: float = field(default=0.0, metadata={"required": True})
    """Largest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay, and its lower bound."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Iterations of the decay, warm-up included (default: --train-iters)."""
    lr_decay_samples: int | None = None
    """Samples of the decay, warm-up included (default: --train-samples)."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last part of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the last part of WSD (0: none, the learning rate stays)."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the last part of WSD (0: none, the learning rate stays)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases, norms and 1-D parameters have none."""
    start_weight_decay: float | None = None
    """Weight decay at the start of the run, with --weight-decay-incr-style linear or cosine."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the run, with --weight-decay-incr-style linear or cosine."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay grows over the run."""
    clip_grad: float = 1.0
    """Largest global gradient norm (0: no clipping)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""

    def validate(self, train_iters: int | None, train_samples: int | None) -> None:
        require(self.lr > 0, f"--lr ({self.lr}) must be given and positive")
        require(0 <= self.min_lr <= self.lr, f"--min-lr ({self.min_lr}) must be between 0 and --lr ({self.lr})")
        require(
            0 <= self.lr_warmup_init <= self.lr,
            f"--lr-warmup-init ({self.lr_warmup_init}) must be between 0 and --lr ({self.lr})",
        )
        positive(self, "lr_decay_iters", "lr_decay_samples")
        for name in ("lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            given = getattr(self, name)
            require(given is None or given >= 0, f"{flag(name)} must not be negative, not {given}")
        for name in ("lr_warmup_iters", "lr_warmup_samples", "weight_decay", "clip_grad", "adam_eps"):
            require(getattr(self, name) >= 0, f"{flag(name)} must not be negative, not {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{flag(name)} must be in [0, 1), not {getattr(self, name)}")
        unit, other = ("samples", "iters") if train_samples is not None else ("iters", "samples")
        for name in (f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}"):
            require(
                not getattr(self, name),
                f"{flag(name)} does not go with --train-{unit}: use {flag(name.replace(other, unit))}",
            )
        if self.lr_warmup_fraction is not None:
            require(
                0 <= self.lr_warmup_fraction < 1,
                f"--lr-warmup-fraction must be in [0, 1), not {self.lr_warmup_fraction}",
            )
            require(
                not (self.lr_warmup_iters or self.lr_warmup_samples),
                f"--lr-warmup-fraction and --lr-warmup-{unit} exclude each other",
            )
        require(
            not self.lr_warmup_init or bool(self.lr_warmup_iters or self.lr_warmup_samples or self.lr_warmup_fraction),
            f"--lr-warmup-init ({self.lr_warmup_init}) needs a warm-up: give --lr-warmup-{unit} or "
            "--lr-warmup-fraction, or leave it out",
        )
        self._validate_lengths(unit, train_iters if train_samples is None else train_samples)
        self._validate_weight_decay()

    def _validate_lengths(self, unit: str, length: int | None) -> None:
        """Warm-up and decay against the run; ``length`` in ``unit`` ("iters" or "samples")."""
        given, warmup = getattr(self, f"lr_decay_{unit}"), getattr(self, f"lr_warmup_{unit}")
        decay = length if given is None else given
        name = f"--train-{unit}" if given is None else f"--lr-decay-{unit}"
        require(decay is None or warmup < decay, f"--lr-warmup-{unit} ({warmup}) must be less than {name} ({decay})")
        last = getattr(self, f"lr_wsd_decay_{unit}")
        if self.lr_decay_style == "WSD":
            require(last is not None, f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}")
            require(
                decay is None or last <= decay, f"--lr-wsd-decay-{unit} ({last}) must be at most {name} ({decay})"
            )
        else:
            require(last is None, f"--lr-wsd-decay-{unit} needs --lr-decay-style WSD, not {self.lr_decay_style}")
            require(
                self.lr_wsd_decay_style == OptimizerConfig.lr_wsd_decay_style,
                f"--lr-wsd-decay-style {self.lr_wsd_decay_style} needs --lr-decay-style WSD, not "
                f"{self.lr_decay_style}: leave it out",
            )

    def _validate_weight_decay(self) -> None:
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_incr_style == "constant":
            require(
                start is None and end is None,
                f"--start-weight-decay ({start}) and --end-weight-decay ({end}) need --weight-decay-incr-style linear "
                "or cosine",
            )
        else:
            require(
                start is not None and end is not None and 0 <= start <= end,
                f"--weight-decay-incr-style {self.weight_decay_incr_style} needs --start-weight-decay ({start}) and a "
                f"--end-weight-decay ({end}) that is not smaller, neither of them negative",
            )
