"""Trained models at work: loading a checkpoint at any layout, scoring text, writing text.

``load_model`` gives the model of a checkpoint; ``Scorer`` the log-likelihoods of given tokens; ``Engine`` texts that
follow prompts, many at a time; ``harness.py`` is the model of lm-evaluation-harness and ``server.py`` the HTTP endpoint
on top of them.
"""

from megatron_hc.inference.decoder import Decoder
from megatron_hc.inference.engine import Engine, Generation, Request, Written, write_texts
from megatron_hc.inference.loading import Loaded, empty_model, inference_layout, load_model, single_process
from megatron_hc.inference.text import TextWriter

__all__ = [
    "Decoder",
    "Engine",
    "Generation",
    "Loaded",
    "Request",
    "TextWriter",
    "Written",
    "empty_model",
    "inference_layout",
    "load_model",
    "single_process",
    "write_texts",
]
