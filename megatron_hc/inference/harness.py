"""The model of lm-evaluation-harness: native checkpoints, at any layout, without conversion.

The harness asks for log-likelihoods, for rolling log-likelihoods of whole texts and for texts. Every process gets all
requests and reports rank 0 of 1; ``Scorer`` and ``write_texts`` share the work out. ``model_args`` are named as in the
harness's Megatron-LM back end.
"""

from __future__ import annotations

import difflib
import inspect
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_hc.cli import parse
from megatron_hc.cli_options import COMMAND_LINE, options, to_flat
from megatron_hc.config import TrainConfig, flag
from megatron_hc.data.tokenizer import Tokenizer
from megatron_hc.inference.decoder import Decoder
from megatron_hc.inference.engine import Engine, Request, write_texts
from megatron_hc.inference.loading import checkpoint_arguments, inference_layout, load_model
from megatron_hc.inference.scoring import Item, Scorer
from megatron_hc.launch import place_of
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling
from megatron_hc.model.gpt import GPT

NAME = "megatron_hc"
MODEL_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups")
"""model_args of the Megatron-LM back end that a checkpoint knows: they may be given, and must agree."""
GENERATION_ROWS = 16  # texts written at a time where no batch size is given


def register() -> type:
    """Make ``--model megatron_hc`` known to the harness; returns its class."""
    try:
        import lm_eval.models  # noqa: F401  the stock models, which the harness adds to an empty registry only
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness is missing ({error}): pip install 'megatron_hc[eval]'") from error
    if NAME in MODEL_REGISTRY:
        return MODEL_REGISTRY[NAME]
    return register_model(NAME)(type("MegatronHC", (HarnessModel, TemplateLM), {}))


class HarnessModel:
    """What ``TemplateLM`` leaves open. Made by the harness from ``model_args``, or ``of`` a model in memory."""

    model: GPT
    config: TrainConfig
    mesh: Mesh
    tokenizer_: Tokenizer
    max_length: int
    max_gen_toks: int
    batch_size_: int | None
    cache_hook: Any

    def __init__(
        self,
        load: str,
        ckpt_step: int | None = None,
        tokenizer_type: str | None = None,
        tokenizer_model: str | None = None,
        devices: int | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        max_gen_toks: int = 256,
        dtype: str | None = None,
        extra_args: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        """
        Args:
            load, ckpt_step: folder that --save wrote to, and an iteration instead of the last.
            tokenizer_type, tokenizer_model: instead of those of the training run.
            devices: number of processes, which must be what torchrun started.
            *_parallel_size: the layout; processes that are left over are data parallel.
            seq_length: longest text that the model sees at once (default: the positions it has).
            micro_batch_size, batch_size: texts of a batch on one copy of the model; 'auto': about 8,192 tokens.
            max_gen_toks: tokens written where a task does not say.
            dtype: 'float32', 'bfloat16' or 'float64' instead of the training run's.
            extra_args: flags of pretrain_gpt.py that go over those of the training run.

        Raises ``ValueError`` in one sentence for arguments that do not exist or cannot work.
        """
        super().__init__()
        arguments = checkpoint_arguments(load, ckpt_step)
        _check_others(others, arguments)
        world_size = place_of().world_size
        if devices is not None and int(devices) != world_size:
            raise ValueError(
                f"devices={devices}, but there are {world_size} processes: start them with "
                f"torchrun --nproc-per-node {devices}"
            )
        loaded = load_model(
            load,
            ckpt_step,
            # The harness's own default is cuda:0, whatever there is.
            device=device if device in ("cpu", "cuda") else "auto",
            layout=inference_layout(
                tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size
            ),
            dtype=dtype,
            changes=_extra(extra_args, arguments)
            | {
                name: value
                for name, value in (("tokenizer_type", tokenizer_type), ("tokenizer_model", tokenizer_model))
                if value is not None
            },
        )
        size = _batch_size(batch_size if micro_batch_size is None else micro_batch_size)
        self._take(loaded.model, loaded.config, loaded.mesh, loaded.tokenizer, size, max_gen_toks, seq_length)

    @classmethod
    def of(
        cls, model: GPT, config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer, batch_size: int | None = None
    ) -> HarnessModel:
        """A model in memory, of which this process has a part."""
        found = cls.__new__(cls)
        super(HarnessModel, found).__init__()
        found._take(model, config, mesh, tokenizer, batch_size, 256, None)
        return found

    def _take(
        self,
        model: GPT,
        config: TrainConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        batch_size: int | None,
        max_gen_toks: int,
        seq_length: int | None,
    ) -> None:
        room = config.model.max_positions
        if seq_length is not None and not 0 < seq_length <= room:
            raise ValueError(f"seq_length ({seq_length}) must be in 1 .. {room}, the positions the model has")
        self.model, self.config, self.mesh, self.tokenizer_ = model, config, mesh, tokenizer
        self.max_length, self.max_gen_toks, self.batch_size_ = seq_length or room, max_gen_toks, batch_size
        self._device = mesh.device

    # ---- what the harness asks a model for ----

    @property
    def batch_size(self) -> int | str:
        return self.batch_size_ or "auto"

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer_.eod

    @property
    def tokenizer_name(self) -> str:
        return f"{type(self.tokenizer_).__name__}-{self.tokenizer_.fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(next(self.model.parameters()).dtype),
            "world_size": self.mesh.world_size,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        return list(self.tokenizer_.tokenize(string))

    def tok_decode(self, tokens: Iterable[int], **others: Any) -> str:
        return self.tokenizer_.detokenize(tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation; contexts are cut from the left where there is no room."""
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the model "
                    "sees at once"
                )
        # The harness moves the spaces at a context's end to the continuation: of spaces alone nothing is left.
        requests = [(pair, context or [self.eot_token_id], continuation) for pair, context, continuation in requests]
        # An empty continuation is certain.
        places = [place for place, (_, _, continuation) in enumerate(requests) if continuation]
        items = [
            Item([*requests[place][1], *requests[place][2]][-(self.max_length + 1) :], len(requests[place][2]))
            for place in places
        ]
        results = [(0.0, True)] * len(requests)
        for place, score in zip(places, self._scored(items, disable_tqdm), strict=True):
            results[place] = tuple(score)
        for (pair, _, _), result in zip(requests, results, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, every token with as much context as the model can see."""
        from lm_eval.utils import get_rolling_token_windows

        items: list[Item] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for inputs, predicted in windows:
                items.append(Item([*inputs, predicted[-1]], len(predicted)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scored(items, disable_tqdm), strict=True):
            totals[owner] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text that follows each context, up to a stop string, end-of-document or the number of tokens."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        if not asked:
            return []
        longest = max(len(request.prompt) + request.max_new_tokens for request in asked)
        rows = min(self.batch_size_ or GENERATION_ROWS, -(-len(asked) // self.mesh.size("dp")))
        decoder = Decoder(self.model, self.config, self.mesh, rows=rows, max_length=longest)
        texts = [written.text for written in write_texts(Engine(decoder, self.tokenizer_), asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _scored(self, items: Sequence[Item], disable_tqdm: bool) -> Any:
        from tqdm import tqdm

        is_quiet = disable_tqdm or not self.mesh.is_first
        with tqdm(total=len(items), disable=is_quiet, desc="Scoring") as bar:
            return Scorer(self.model, self.config, self.mesh, self.batch_size_)(items, bar.update)

    def _request(self, number: int, context: str, given: dict[str, Any]) -> Request:
        from lm_eval.models.utils import normalize_gen_kwargs

        wanted: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop, max_new_tokens = wanted.pop("until"), int(wanted.pop("max_gen_toks"))
        is_drawn, temperature = wanted.pop("do_sample", False), wanted.pop("temperature", None)
        top_p = wanted.pop("top_p", None)
        sampling = Sampling(
            temperature=(1.0 if temperature is None else float(temperature)) if is_drawn else 0.0,
            top_k=int(wanted.pop("top_k", None) or 0),
            top_p=1.0 if top_p is None else float(top_p),
            seed=int(wanted.pop("seed", 1234)) + number,
        )
        if wanted:
            raise ValueError(f"generation arguments {', '.join(sorted(wanted))} are not known here")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks ({max_new_tokens}) must be less than the model's {self.max_length} tokens")
        prompt = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        return Request(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=tuple(text for text in stop if text),
        )


def _batch_size(value: int | str | None) -> int | None:
    """None for 'auto'."""
    if value is None or str(value).startswith("auto"):
        return None
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size ({value}) must be a positive number or auto")
    return size


def _check_others(others: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Arguments that only repeat what the checkpoint says; all else is refused."""
    for name, value in others.items():
        if name in ("use_dist_ckpt", "vocab_file", "merge_file", "trust_remote_code") and not value:
            continue
        if name not in MODEL_SIZES:
            known = [*inspect.signature(HarnessModel.__init__).parameters, *MODEL_SIZES]
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"model_args has no {name}" + (f": did you mean {near[0]}?" if near else ""))
        if value is not None and value != arguments[name]:
            raise ValueError(
                f"model_args {name}={value}, but the checkpoint's model has {arguments[name]}: leave it out"
            )


def _extra(flags: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Flags of pretrain_gpt.py, as values by field name."""
    if not flags:
        return {}
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ValueError(f"extra_args ({flags}) cannot be read: {error}") from error
    parsed = parse(words, base=arguments, prog="extra_args")
    given = [name for name, origin in parsed.origins.items() if origin == COMMAND_LINE]
    idle = [flag(name) for name in given if options()[name].path[0] not in ("model", "data", "training")]
    if idle:
        raise ValueError(f"extra_args: {', '.join(idle)} would do nothing here: a layout is given as model_args")
    values = to_flat(parsed.config)
    return {name: values[name] for name in given}
