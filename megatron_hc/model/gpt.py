"""The decoder: embedding, layers, output layer. A pipeline stage holds a part of it.

Dims: S sequence, B batch, C hidden size, V vocabulary (padded), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.config import ModelConfig
from megatron_hc.kernels.cross_entropy import WHOLE, VocabShard, chunk_logits, linear_cross_entropy, token_scores
from megatron_hc.kernels.embedding import embedded
from megatron_hc.model.attention import Context
from megatron_hc.model.cache import Caches, LayerCache, Span
from megatron_hc.model.dropout import hidden_dropout
from megatron_hc.model.initial import embedding_std
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.model.linear import NormLayer
from megatron_hc.model.placement import embedding_norm
from megatron_hc.model.rope import rope_table
from megatron_hc.residual import Carry, Draw, Norm, Site, build_residual


def padded_vocab_size(config: ModelConfig, vocab_size: int, tensor_parallel_size: int = 1) -> int:
    """Rows of the embedding in memory: the vocabulary rounded up. Padding is zero, never stored, never predicted."""
    multiple = config.make_vocab_size_divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


class VocabTable(nn.Module):
    """A [V, C] table over the vocabulary, rows from ``vocab_size`` on being padding: embedding or output weights."""

    is_embedding = True

    def __init__(self, config: ModelConfig, vocab_size: int, num_rows: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.std = embedding_std(config)
        self.weight = nn.Parameter(torch.empty(num_rows, config.hidden_size))

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, S] -> [S, B, C]"""
        return embedded(tokens.t(), self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, B, C] -> [S, B, vocab_size] in at least fp32."""
        flat = hidden.flatten(0, 1).to(self.weight.dtype)
        return chunk_logits(flat, self.weight, self.vocab_size)[:, : self.vocab_size].unflatten(0, hidden.shape[:2])

    def loss(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """hidden [S, B, C], labels and weights [B, S] -> sum of weights times cross entropy."""
        flat = hidden.to(self.weight.dtype).flatten(0, 1)
        labels, weights = labels.t().reshape(-1), weights.t().reshape(-1)
        return linear_cross_entropy(flat, self.weight, labels, weights, self.vocab_size)

    def scores(self, hidden: Tensor, labels: Tensor, is_wanted: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [S, B, C], labels and is_wanted [B, S] -> (cross entropy, whether no token is likelier), each [B, S].

        0 and true where not wanted, which costs nothing. No gradients.
        """
        positions = is_wanted.t().reshape(-1).nonzero().squeeze(1)
        flat = self.whole(hidden).flatten(0, 1)[positions].to(self.weight.dtype)
        found = token_scores(flat, self.weight, labels.t().reshape(-1)[positions], self.vocab_size, self.shard)
        losses = found[0].new_zeros(is_wanted.numel()).index_copy_(0, positions, found[0])
        is_top = found[1].new_ones(is_wanted.numel()).index_copy_(0, positions, found[1])
        shape = is_wanted.t().shape
        return losses.view(shape).t(), is_top.view(shape).t()

    def whole(self, hidden: Tensor) -> Tensor:
        """The hidden states of the whole sequence, where this process has a part of it. No gradients."""
        return hidden

    @property
    def shard(self) -> VocabShard:
        """The rows that are here."""
        return WHOLE

    def initial(self, name: str, draw: Draw) -> Tensor:
        table = torch.zeros(self.weight.shape)
        table[: self.vocab_size] = draw("", (self.vocab_size, self.weight.shape[1]), self.std)
        return table


class PositionTable(nn.Module):
    """Learned absolute positions, [max positions, C]."""

    is_embedding = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.std = embedding_std(config)
        self.weight = nn.Parameter(torch.empty(config.max_positions, config.hidden_size))

    def forward(self, position_ids: Tensor) -> Tensor:
        """[B or 1, S] -> [S, B or 1, C]"""
        return embedded(position_ids.t(), self.weight)

    def initial(self, name: str, draw: Draw) -> Tensor:
        return draw("", tuple(self.weight.shape), self.std)


LayerRunner = Callable[[Iterable[TransformerLayer], Carry, Context], Carry]


def run_layers(layers: Iterable[TransformerLayer], carry: Carry, context: Context) -> Carry:
    """The layers one after the other; ``parallel/recompute.py`` has others of the same signature."""
    for layer in layers:
        carry = layer(carry, context)
    return carry


class GPT(nn.Module):
    """tokens -> embedding -> open -> layers -> final read -> norm -> hidden -> loss or logits

    A part of it, for one process of a pipeline: ``layers`` names the global indices it holds, ``has_embedding`` and
    ``has_output`` say whether it holds the ends (default: those beside its layers). Parameter names carry global layer
    indices, so that a checkpoint does not depend on the stages. A tied table exists at both ends.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        padded_vocab: int | None = None,
        layers: Sequence[int] | None = None,
        has_embedding: bool | None = None,
        has_output: bool | None = None,
        run: LayerRunner = run_layers,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.run = config, vocab_size, run
        rows = padded_vocab or padded_vocab_size(config, vocab_size)
        held = range(config.num_layers) if layers is None else layers
        self.is_first = 0 in held if has_embedding is None else has_embedding
        self.is_last = config.num_layers - 1 in held if has_output is None else has_output
        untied = config.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and not untied):
            self.embedding = VocabTable(config, vocab_size, rows)
        if self.is_first:
            learned = config.position_embedding_type == "learned_absolute"
            self.position_embedding = PositionTable(config) if learned else None
            self.embedding_norm = embedding_norm(config)
            self.dropout = hidden_dropout(config)
            self.entry_residual = build_residual(Site("entry", 0, config))
        self.layers = nn.ModuleDict({str(index): TransformerLayer(config, index) for index in held})
        if self.is_last:
            self.final_residual = build_residual(Site("final", config.num_layers, config))
            self.final_norm = None if self.final_residual.replaces_norm else NormLayer(config)
            self.output_layer = VocabTable(config, vocab_size, rows) if untied else None

    @property
    def output(self) -> VocabTable:
        """The table that gives the logits: the output layer's own, or the embedding's when tied."""
        return self.embedding if self.output_layer is None else self.output_layer

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        caches: Caches | Span | None = None,
    ) -> Tensor:
        """tokens [B, S] -> normed hidden states [S, B, C], for ``output.loss`` and ``output.logits``.

        ``position_ids`` [B, S]: default 0 .. S-1. ``document_ids`` [B, S]: tokens see only earlier tokens of their own
        document. ``caches``: the tokens follow what its first B rows hold, or lie where a span of it says.
        """
        span = caches.extend([tokens.shape[1]] * tokens.shape[0]) if isinstance(caches, Caches) else caches
        if span is not None:
            position_ids = span.positions
        elif position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        context = self.context(position_ids, document_ids, span)
        return self.close(self.run_stage(self.open(tokens, position_ids), context))

    def run_stage(self, carry: Carry, context: Context) -> Carry:
        """All layers of this stage."""
        if context.span is None:
            return self.run(self.stage_layers(), carry, context)
        for layer, cache in zip(self.stage_layers(), context.span.caches, strict=True):
            carry = layer(carry, context._replace(cache=cache))
        return carry

    def through(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """``part(*arguments)``, a function outside that runs some of the model's parts: to FSDP2 one forward pass."""
        return part(*arguments)

    def stage_layers(self) -> list[TransformerLayer]:
        return list(self.layers.values())  # type: ignore[arg-type]

    def context(self, position_ids: Tensor, document_ids: Tensor | None, span: Span | None = None) -> Context:
        """What the layers share: rotary tables from [B or 1, S] positions, and a mask where causal is not enough.

        ``document_ids``: [B, S] of the whole sequence, also where this process has the positions of a part of it.
        """
        # Of the weights: a stage without an embedding begins with a norm, whose parameters are wider.
        table = self.embedding if hasattr(self, "embedding") else self.stage_layers()[0].attention.linear_qkv
        is_rotary = self.config.position_embedding_type == "rope"
        rope = rope_table(position_ids, self.config, table.weight.dtype) if is_rotary else None
        if span is not None:
            assert document_ids is None, "documents are masked in training, not while generating"
            return Context(rope=rope, mask=span.mask, span=span)
        mask = None
        if document_ids is not None:
            S = document_ids.shape[1]  # of the whole sequence, of which positions may be a part
            same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # [B, 1, S, S]
            mask = same & torch.ones(S, S, dtype=torch.bool, device=same.device).tril()
        return Context(rope=rope, mask=mask)

    def open(self, tokens: Tensor, position_ids: Tensor) -> Carry:
        """tokens [B, S], positions [B or 1, S] -> the carry into layer 0."""
        hidden = self.embedding.embed(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        return self.entry_residual.open(self.dropout(self.embedding_norm(hidden)))

    def close(self, carry: Carry) -> Tensor:
        """The carry out of the last layer -> normed hidden states [S, B, C]."""
        hidden, _ = self.final_residual.read(carry, Norm(self.final_norm))
        assert isinstance(hidden, Tensor)
        return hidden

    def new_caches(self, max_length: int, rows: int) -> Caches:
        """Empty caches for generating ``rows`` texts of up to ``max_length`` tokens, of the layers of this stage."""
        layers: list[LayerCache] = []
        for layer in self.stage_layers():
            layers.append(layer.attention.new_cache(max_length, rows, layers[0].values if layers else None))
        return Caches(layers, rows, max_length, next(self.parameters()).device)
