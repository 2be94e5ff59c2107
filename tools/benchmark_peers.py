"""Other people's implementations for tools/benchmark.py, where they are installed: same shape, same work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Peer = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


def transformers_llama(shape: Any, dtype: torch.dtype) -> Peer | None:
    """transformers' Llama with scaled-dot-product attention."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.seq,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(shape.device, dtype)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1).float(), labels.flatten())

    return model, loss


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, C]"""
        B, S, C = x.shape
        qkv = self.qkv(self.norms[0](x)).view(B, S, 3, self.heads, -1).transpose(1, 3)  # [B, heads, 3, S, H]
        q, k, v = qkv.unbind(2)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, S, C))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    """What one would write without any library."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(_Block(shape.hidden, shape.heads, shape.ffn) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, 1e-5)
        H = shape.hidden // shape.heads
        angles = torch.arange(shape.seq)[:, None] / 10000 ** (torch.arange(0, H, 2) / H)
        self.register_buffer("angles", torch.cat((angles, angles), dim=-1))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(tokens)
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def plain_gpt(shape: Any, dtype: torch.dtype) -> Peer:
    model = PlainGPT(shape).to(shape.device, dtype)
    return model, model


class _WithConnections(PlainGPT):
    """``PlainGPT`` whose sublayers are wrapped by the hyper-connections package."""

    def __init__(self, shape: Any, make: Any) -> None:
        super().__init__(shape)
        init, self.expand, self.reduce = make(4, dim=shape.hidden)
        branches = []
        for block in self.blocks:
            for branch in (_Attention(block), _MLP(block)):
                branches.append(init(dim=shape.hidden, branch=branch, layer_index=len(branches)))
        self.branches = nn.ModuleList(branches)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.expand(self.tokens(tokens))
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        for branch in self.branches:
            x = branch(x, cos, sin)
        logits = F.linear(self.norm(self.reduce(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class _Attention(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.heads = block.norms[0], block.qkv, block.out, block.heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, S, 3, self.heads, -1).transpose(1, 3).unbind(2)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, S, C))


class _MLP(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.norm, self.gate_up, self.down = block.norms[1], block.gate_up, block.down

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def hyper_connections(shape: Any, dtype: torch.dtype) -> Peer | None:
    """The plain GPT with 4 streams by the hyper-connections package."""
    try:
        from hyper_connections import get_init_and_expand_reduce_stream_functions
    except ImportError:
        return None
    model = _WithConnections(shape, get_init_and_expand_reduce_stream_functions).to(shape.device, dtype)
    return model, model


PEERS: dict[str, Callable[[Any, torch.dtype], Peer | None]] = {
    "peer-plain-torch": plain_gpt,
    "peer-transformers-llama": transformers_llama,
    "peer-hyper-connections-n4": hyper_connections,
}


def boundary_peers(
    method: str, n: int, d: int, tokens: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], Any]]:
    """Name -> forward and backward of the same boundary by other packages, where they have it."""
    module: nn.Module
    if method == "hyper-dynamic" and n > 1:
        try:
            from hyper_connections import HyperConnections
        except ImportError:
            return {}
        name, shape = "hyper-connections", (n, tokens, d)
        module = HyperConnections(n, dim=d, branch=nn.RMSNorm(d), layer_index=0)
    elif method == "mhc" and device == "cuda":  # Triton kernels
        try:
            from liger_kernel.transformers.mhc import LigerMHC
        except ImportError:
            return {}
        name, shape = "liger", (tokens, n, d)
        module = LigerMHC(nn.RMSNorm(d), hc=n, c=d, phi_dtype=torch.bfloat16)
    else:
        return {}
    module = module.to(device, dtype)
    x = torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)
    grad, leaves = torch.randn_like(x), [x, *module.parameters()]
    return {name: lambda: torch.autograd.grad(module(x), leaves, grad, allow_unused=True)}
