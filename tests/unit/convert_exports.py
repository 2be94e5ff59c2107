"""Run as a program of its own, without megatron_hc: load exported folders, compare their logits, generate.

python convert_exports.py CASES.json RESULTS.json; a case is a folder with expected.safetensors (tokens, logits) in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def check(folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = expected["tokens"]
    with torch.no_grad():
        logits = model(tokens).logits
        padded = torch.cat((torch.zeros_like(tokens[:1, :3]), tokens[:1, :5]), dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 5])
        shifted = model(padded, attention_mask=mask).logits[:, 3:]
        alone = model(tokens[:1, :5]).logits
        seen = torch.ones(8, 8, dtype=torch.bool).tril() & mask.bool()[:, None, None]
        added = torch.zeros(1, 1, 8, 8).masked_fill(~seen, float("-inf"))
        positions = {"position_ids": torch.tensor([[0] * 3 + [0, 1, 2, 3, 4]])}
        masked = torch.stack([model(padded, attention_mask=own, **positions).logits[:, 3:] for own in (seen, added)])
        # What Trainer adds up over micro-batches: each is given the number of labels of all.
        whole = model(tokens, labels=tokens).loss
        count = tokens[:, 1:].numel()
        parts = [model(row, labels=row, num_items_in_batch=count).loss for row in tokens.split(1)]
        fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 5)}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        cached = model.generate(tokens[:, :5], **options)
        uncached = model.generate(tokens[:, :5], use_cache=False, **options)
        static = model.generate(tokens[:, :5], cache_implementation="static", **options)
    refusals = []
    for name in ("output_attentions", "output_hidden_states"):
        try:
            model(tokens, **{name: True})
        except ValueError as error:
            refusals.append(str(error))
    for wrong in (seen.long(), seen.float()):
        try:
            model(padded, attention_mask=wrong, **positions)
        except ValueError as error:
            refusals.append(str(error))
    steps = [*zip(cached.logits, uncached.logits, strict=True), *zip(static.logits, uncached.logits, strict=True)]
    return {
        "error": float((logits - expected["logits"]).abs().max()),
        "loss": float((sum(parts) - whole).abs()),
        "padding": max(float((shifted - alone).abs().max()), float((masked - alone).abs().max())),
        "tuple": bool(model(tokens, return_dict=False)[0].equal(model(tokens).logits)),
        "cache": max(float((a - b).abs().max()) for a, b in steps),
        "unset": bool(fresh(tokens).logits.isnan().all()),
        "refusals": refusals,
        "same_text": bool(cached.sequences.equal(uncached.sequences)),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }


def main() -> None:
    results = {}
    for folder in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results[folder] = check(Path(folder))
        except Exception as error:
            results[folder] = {"failed": f"{type(error).__name__}: {error}"}
    assert "megatron_hc" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
