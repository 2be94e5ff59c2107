"""--check-logits: the same tokens through both models. Both must fit in memory, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_hc.convert.custom import MODEL_TYPE
from megatron_hc.convert.shards import read_json
from megatron_hc.inference import load_model

TOLERANCE = 1e-4
"""Largest difference of two logits over the largest logit: sums in another order, fp32, tens of layers."""
NOT_KEPT = "what was converted is not kept; convert without --check-logits to look into it"
TEXT = (
    "Residual connections let a network of a hundred layers start as something close to the identity.\n"
    "La somme des carr\u00e9s des c\u00f4t\u00e9s: 3\u00b2 + 4\u00b2 = 5\u00b2. def f(x): return x ** 2"
)


def check_logits(
    hf_folder: str, our_folder: str, step: int | None, say: Callable[[str], None], dtype: torch.dtype | None = None
) -> float:
    """The largest difference over both inputs, printed for each; ``ValueError`` where it is more than rounding.

    ``dtype``: what the conversion rounded all weights to, if anything; both models are then rounded likewise.
    """
    transformers = import_transformers()
    with torch.no_grad():
        # Not in the run's bf16: the checkpoint has fp32 weights, and so has the export.
        ours, tokenizer, config, _, _ = load_model(our_folder, step, dtype="float32")
        # Code in a folder runs only where this project has written it.
        is_custom = read_json(Path(hf_folder) / "config.json").get("model_type") == MODEL_TYPE
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(
                hf_folder, dtype=torch.float32, trust_remote_code=is_custom, local_files_only=True
            ).eval()
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--check-logits: {hf_folder} cannot be loaded ({reason}): {NOT_KEPT}") from error
        if dtype is not None:
            for value in (*ours.state_dict().values(), *theirs.state_dict().values()):
                value.copy_(value.to(dtype))
        length = min(config.model.max_positions, 128)
        generator = torch.Generator().manual_seed(1)
        inputs = {"random tokens": torch.randint(0, ours.vocab_size, (2, length), generator=generator)}
        if config.data.tokenizer_type not in (None, "NullTokenizer"):
            ids = tokenizer.tokenize(TEXT)[: config.model.max_positions]
            inputs["text"] = torch.tensor([ids])
        worst = 0.0
        for name, tokens in inputs.items():
            a = ours.output.logits(ours(tokens)).transpose(0, 1)
            worst = max(worst, _compare(name, a, theirs(tokens).logits, say))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"--check-logits: logits of {our_folder} and {hf_folder} differ by {worst:.2e} of the largest logit, "
            f"which is more than rounding ({TOLERANCE:.0e}): {NOT_KEPT}"
        )
    return worst


def check_ours(before: tuple[str, int | None], after: tuple[str, int | None], say: Callable[[str], None]) -> float:
    """The same for two checkpoints of ours: what a retrofit must not change."""
    with torch.no_grad():
        models = [load_model(root, step, dtype="float32") for root, step in (before, after)]
        length = min(models[0].config.model.max_positions, 128)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, models[0].model.vocab_size, (2, length), generator=generator)
        a, b = (found.model.output.logits(found.model(tokens)) for found in models)
        worst = _compare("random tokens", a.transpose(0, 1), b.transpose(0, 1), say)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"--check-logits: logits before and after differ by {worst:.2e} of the largest logit, which is more than "
            f"rounding ({TOLERANCE:.0e}): {NOT_KEPT}"
        )
    return worst


def _compare(name: str, a: Tensor, b: Tensor, say: Callable[[str], None]) -> float:
    difference, largest = float((a - b).abs().max()), float(a.abs().max())
    say(f"logits of {tuple(a.shape[:2])} {name}: largest difference {difference:.3e}, largest logit {largest:.3e}")
    return difference / max(largest, 1e-30)


def import_transformers():  # type: ignore[no-untyped-def]
    """The library, or the sentence that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"this needs transformers ({error}): pip install 'megatron_hc[hf]'") from error
    return transformers


def root_of(folder: Path) -> tuple[str, int | None]:
    """An iter_N folder as (what --load takes, iteration)."""
    name = folder.name
    if name.startswith("iter_") and name.removeprefix("iter_").isdigit():
        return str(folder.parent), int(name.removeprefix("iter_"))
    return str(folder), None
