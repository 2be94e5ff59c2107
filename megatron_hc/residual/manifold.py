"""Manifold-constrained hyper-connections: mHC (arXiv 2512.24880), mHC-lite (2601.05732) and KromHC (2601.21579).

Dims: S sequence, B batch, n streams (N), C their width, M logits of the stream matrix, K = 2 n + M logits in all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.kernels.coefficients import Form, doubly_stochastic
from megatron_hc.kernels.norm import promote
from megatron_hc.kernels.sinkhorn import sinkhorn
from megatron_hc.residual.base import Carry, Draw, FusedMix, LinearMix, Mix, Reads, Site, TensorSpec

OFF = -8.0  # initial logit of what the stream matrix is not to have: exp(-8) = 3e-4


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


class _ManifoldMix(LinearMix):
    """What the three have in common; a member writes the stream matrix H_res from M logits, and the initial values.

        h = alpha * (vec(X) / rms(vec(X))) phi + b        one rms over all n C numbers of a token
        H_pre = sigmoid(h[:n])    H_post = 2 sigmoid(h[n:2n])    H_res = doubly stochastic(h[2n:])
        x = H_pre X               X' = H_res X + H_post^T F(norm(x))

    phi is one matrix ``projection`` [K, n C], its rows in the order of h, and takes up the norm's weight; ``alpha`` has
    one number per kind (pre, post, res). ``--static-residual`` leaves h = b.
    """

    def __init__(self, site: Site, kind: str, num_matrix_logits: int) -> None:
        """``kind``: how the matrix is made, a name of ``kernels.coefficients``."""
        super().__init__(site)
        config, n = site.config.residual, self.num_streams()
        self.kind, self.sizes = kind, (n, n, num_matrix_logits)
        self.iterations = 0
        self.is_dynamic = not config.static_residual
        if not site.is_sublayer:
            return
        self.bias = nn.Parameter(torch.empty(sum(self.sizes)))
        if self.is_dynamic:
            self.projection = nn.Parameter(torch.empty(sum(self.sizes), n * self.stream_width()))
            self.alpha = nn.Parameter(torch.empty(3))

    def matrix(self, logits: Tensor) -> Tensor:
        """Logits [S, B, M] -> H_res [S, B, new, old]."""
        matrices = doubly_stochastic(self.kind, logits.flatten(0, 1), self.num_streams(), self.iterations)
        return matrices.unflatten(0, logits.shape[:2])

    def initial_bias(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of H_pre [n], H_post [n] and H_res [M] at the start."""
        raise NotImplementedError

    def initial(self, name: str, draw: Draw) -> Tensor:
        if name == "bias":
            return torch.cat(self.initial_bias())
        if name == "alpha":
            return torch.full((3,), self.site.config.residual.mhc_init_gating_factor)
        assert name == "projection", name
        return torch.zeros(sum(self.sizes), self.num_streams() * self.stream_width())

    def weight_decay(self, name: str) -> bool:
        return name == "projection"

    def weights(self, stream: Tensor) -> Mix:
        pre, post, res = self.logits(stream)
        return Mix(*self.mix(pre, post, res))

    def mix(self, pre: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [..., n], [..., n], [..., M] -> read [..., n, 1], write [..., 1, n], keep [..., n, n]."""
        read, write = torch.sigmoid(pre).unsqueeze(-1), 2 * torch.sigmoid(post).unsqueeze(-2)
        return read, write, self.matrix(res).transpose(-1, -2)

    def scales(self, alpha: Tensor, dtype: torch.dtype) -> Tensor:
        """alpha [3] -> one number per logit, [K]."""
        return torch.cat([a.expand(size) for a, size in zip(alpha.split(1), self.sizes, strict=True)]).to(dtype)

    def fused(self) -> FusedMix | None:
        n, eps, dtype = self.num_streams(), self.site.config.norm_epsilon, promote(self.bias.dtype)
        form = Form(self.kind, n, 1, is_joint=True, is_centred=False, eps=eps, iterations=self.iterations)
        if not self.is_dynamic:
            return FusedMix(form, None, (self.bias.to(dtype),))
        return FusedMix(form, self.projection.to(dtype), (self.bias.to(dtype), self.alpha.to(dtype)))

    def logits(self, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stream [S, B, n, C] -> h [S, B, K] in at least fp32, cut by kind."""
        flat = stream.flatten(2).to(promote(stream.dtype))
        bias = self.bias.to(flat.dtype)
        if self.is_dynamic:
            # The division by the norm comes after the product, so that one pass over the streams can do both.
            scales = self.scales(self.alpha, flat.dtype)
            h = F.linear(flat, self.projection.to(flat.dtype)) * self.inverse_rms(flat) * scales + bias
        else:
            h = bias.expand(*flat.shape[:2], -1)
        pre, post, res = h.split(self.sizes, dim=-1)
        return pre, post, res

    def inverse_rms(self, flat: Tensor) -> Tensor:
        """[S, B, n C] -> [S, B, 1]"""
        norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
        return torch.rsqrt(norm * norm / flat.shape[-1] + self.site.config.norm_epsilon)


class ManifoldConnection(_ManifoldMix):
    """mHC: arXiv 2512.24880, equations 5-9: H_res = Sinkhorn-Knopp(exp(h_res)), M = n^2.

    20 iterations (``--mhc-sinkhorn-iterations``) of columns, then rows: rows of H_res sum to 1 to rounding, columns
    nearly. The paper gives alpha = 0.01 (``--mhc-init-gating-factor``) and no other initial value.

    Initial values: phi = 0; b_pre = logit(0.7) at stream k mod n and logit(0.3 / (n - 1)) elsewhere, so that H_pre sums
    to 1; b_post = 0, H_post = 1; b_res = 0 on the diagonal, -8 off it: equals pre-norm exactly, the norms' eps included
    (with the mean as read-out). The streams part after the first update, since their H_post gradients differ.

    ``--mhc-convention megatron`` is Megatron-LM's form: r = 1 / (rms + 1e-6); rows then columns, sums taken as at least
    1e-6; phi Xavier-uniform, b = 0. It claims no equality at its start: H_pre is near 1/2 and H_res near 1/n. Here its
    weights are computed in at least fp32, there in the activation dtype.

    ``--mhc-single-pass`` (DeepSeek-V4.1, arXiv 2609.19969): X' = H_res X + H_post^T F(H_pre^- X), H_pre^- being the
    read weights that the previous sublayer computed from *its* streams, so that one pass over X serves everything.
    The first sublayer reads stream 0; the final norm reads with the last sublayer's weights, in place of the
    ``--residual-readout``. Sublayer k then initialises b_pre for stream k + 1 mod n: equals pre-norm exactly, too.

    Boundary: n streams, [S, B, n, C]; single-pass also the read weights, [S, B, n, 1], in at least fp32. With K =
    n^2 + 2 n: parameters per sublayer n C K + K + 3 (static: K); FLOPs per token and sublayer, forward:
    2 n C K + 2 n C (norm) + 2 C n (n + 2), static 2 C n (n + 2); memory: n C activations per sublayer.
    """

    def __init__(self, site: Site) -> None:
        config = site.config.residual
        super().__init__(site, "sinkhorn", num_matrix_logits=config.residual_streams**2)
        self.is_megatron = config.mhc_convention == "megatron"
        self.is_single_pass = config.mhc_single_pass
        self.iterations = config.mhc_sinkhorn_iterations

    def matrix(self, logits: Tensor) -> Tensor:
        if not self.is_megatron:
            return super().matrix(logits)
        square = logits.unflatten(-1, (self.num_streams(), -1))
        return sinkhorn(square, self.iterations, rows_first=True, min_sum=1e-6)

    def fused(self) -> FusedMix | None:
        # Megatron-LM's epsilon stands outside the root, and the single pass reads with the weights before.
        return None if self.is_megatron or self.is_single_pass else super().fused()

    def inverse_rms(self, flat: Tensor) -> Tensor:
        if not self.is_megatron:
            return super().inverse_rms(flat)
        rms = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) / math.sqrt(flat.shape[-1])
        return 1 / (rms + 1e-6)

    def initial_bias(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams()
        if self.is_megatron:
            return torch.zeros(n), torch.zeros(n), torch.zeros(n * n)
        pre = torch.full((n,), _logit(0.3 / (n - 1)))
        pre[(self.site.index + self.is_single_pass) % n] = _logit(0.7)
        return pre, torch.zeros(n), (OFF * (1 - torch.eye(n))).flatten()

    def initial(self, name: str, draw: Draw) -> Tensor:
        if name != "projection" or not self.is_megatron:
            return super().initial(name, draw)
        rows, columns = sum(self.sizes), self.num_streams() * self.stream_width()
        # The distribution function of the normal distribution makes uniform numbers of normal ones.
        uniform = torch.erf(draw("", (rows, columns), 1.0) / math.sqrt(2))
        return uniform * math.sqrt(6 / (rows + columns))

    def open(self, hidden: Tensor) -> Carry:
        carry = super().open(hidden)
        if not self.is_single_pass:
            return carry
        first = torch.eye(self.num_streams(), 1, dtype=promote(hidden.dtype), device=hidden.device)
        return carry.replace(ahead=first.expand(*hidden.shape[:2], -1, -1))

    def boundary(self, layer: int) -> tuple[TensorSpec, ...]:
        specs = super().boundary(layer)
        ahead = TensorSpec("ahead", (self.num_streams(), 1), "coefficient")
        return (*specs, ahead) if self.is_single_pass else specs

    def read_out_weights(self, stream: Tensor) -> Tensor | None:
        return None if self.is_single_pass else super().read_out_weights(stream)

    def mixed(self, carry: Carry) -> tuple[Tensor | Reads, Carry]:
        if not self.is_single_pass:
            return super().mixed(carry)
        assert carry.ahead is not None, "a single-pass carry holds read weights"
        if self.site.is_final:
            return self.combine(carry.stream, Mix(carry.ahead, carry.ahead.transpose(-1, -2), None)), carry
        mix = self.weights(carry.stream)
        now = Mix(carry.ahead, mix.write, mix.keep)
        return self.combine(carry.stream, now), carry.replace(mix=now, ahead=mix.read)


class _ExactManifoldMix(_ManifoldMix):
    """H_res doubly stochastic by construction, as a mean of permutations; initial values as both papers publish them.

    phi = 0, alpha = 0.01, b_pre = b_post = 1 at stream k mod n and -1 elsewhere, b_res = 0 for the identity and -8 for
    everything else.
    """

    def initial_bias(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams()
        own = torch.full((n,), -1.0)
        own[self.site.index % n] = 1.0
        return own, own, self.initial_matrix_bias()

    def initial_matrix_bias(self) -> Tensor:
        """[M]"""
        raise NotImplementedError


class PermutationConnection(_ExactManifoldMix):
    """mHC-lite: arXiv 2601.05732: H_res = sum_k softmax(h_res)_k P_k over all M = n! permutations, 2 <= n <= 5.

    Every doubly stochastic matrix is such a mean (Birkhoff, von Neumann), and no iteration is needed. The norm's weight
    of the published code is taken up by phi, which it multiplies.

    Initial values: H_post is 1.46 at stream k mod n and 0.54 elsewhere, as published, so that no equality with pre-norm
    holds; since phi = 0, it equals static hyper-connections with these weights (``A_m = sigmoid(b_pre)``,
    ``B = 2 sigmoid(b_post)``, ``A_r = H_res^T``).

    Boundary: n streams, [S, B, n, C]. With K = n! + 2 n: parameters per sublayer n C K + K + 3 (static: K); FLOPs per
    token and sublayer, forward: 2 n C K + 2 n C + 2 n! n^2 + 2 C n (n + 2); memory: n C activations per sublayer.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site, "permutations", math.factorial(site.config.residual.residual_streams))

    def initial_matrix_bias(self) -> Tensor:
        logits = torch.full((self.sizes[2],), OFF)
        logits[0] = 0.0  # the identity is the first permutation
        return logits


class KroneckerConnection(_ExactManifoldMix):
    """KromHC: arXiv 2601.21579: H_res = U_1 x .. x U_m (Kronecker product), n = 2^m, U_i = [[a, b], [b, a]].

    (a, b) = softmax of two logits per factor: M = 2 m, so that the projection is O(n^2 C). The norm's weight of the
    published code is taken up by phi, which it multiplies. With n = 2 it is mHC-lite.

    Initial values: as mHC-lite's (a = softmax(0, -8)), and the same claim: no equality with pre-norm; equals static
    hyper-connections with these weights.

    Boundary: n streams, [S, B, n, C]. With K = 2 n + 2 log2(n): parameters per sublayer n C K + K + 3 (static: K);
    FLOPs per token and sublayer, forward: 2 n C K + 2 n C + 2 C n (n + 2); memory: n C activations per sublayer.
    """

    def __init__(self, site: Site) -> None:
        num_factors = site.config.residual.residual_streams.bit_length() - 1
        super().__init__(site, "kronecker", 2 * num_factors)
        self.num_factors = num_factors

    def initial_matrix_bias(self) -> Tensor:
        return torch.tensor([0.0, OFF]).repeat(self.num_factors)
