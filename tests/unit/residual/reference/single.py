"""Methods with one stream that change how an output is written, or what the stream becomes. State: see each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.decoder import Method, rms
from reference.streams import Plain


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)[..., None]


class Scaled(Plain):
    """arXiv 2003.04887 (one number) and arXiv 2103.17239 (one per channel): x' = x + w F(norm(x))."""

    def write(self, state: Any, k: int, output: Tensor) -> Tensor:
        return super().write(state, k, self.p(k, "weight") * output)


class Orthogonal(Plain):
    """arXiv 2505.11881: x' = x + f - <x, f> / (<x, x> + 1e-6) x."""

    def write(self, state: Any, k: int, output: Tensor) -> Tensor:
        along = dot(state, output) / (dot(state, state) + 1e-6) * state
        return super().write(state, k, output - along)


class DeepDelta(Plain):
    """arXiv 2601.00417, d_v = 1: x' = (I - b k k^T) x + b v k."""

    def write(self, state: Any, k: int, output: Tensor) -> Tensor:
        z, (w_gate, w_value), (c_gate, c_value) = rms(state, self.eps), self.p(k, "projection"), self.p(k, "bias")
        gate = 2 / (1 + torch.exp(-(dot(z, w_gate) + c_gate)))
        value = dot(z, w_value) + c_value
        direction = output / (dot(output, output) + 1e-12).sqrt()
        return state - gate * dot(direction, state) * direction + gate * value * direction


class Laurel(Method):
    """arXiv 2411.07501: x_(k+1) = a f(x_k) + b (x_k + sum_j g_j h_j(x_(k-j))). State: x_0 .. x_k."""

    def open(self, hidden: Tensor) -> Any:
        return [hidden]

    def read(self, state: Any, k: int) -> tuple[Tensor, Any]:
        return state[-1], state

    def write(self, state: Any, k: int, output: Tensor) -> Any:
        form = self.options.laurel_form
        a, b = 1.0, 1.0
        if "rw" in form:
            exponentials = torch.exp(self.p(k, "weights"))
            a, b = exponentials / exponentials.sum()
        count = min(self.options.laurel_previous, k + 1) if "pa" in form else 1
        skip = state[k]
        for j in range(count):
            term = state[k - j]
            if "lr" in form:
                term = (term @ self.p(k, "low")[j].t()) @ self.p(k, "high")[j].t()
            if "pa" in form:
                term = self.p(k, "gammas")[j] * term
            if form != "rw":
                skip = skip + term
        return [*state, a * output + b * skip]

    def close(self, state: Any) -> Tensor:
        return state[-1]


class SparseAggregation(Method):
    """arXiv 1801.05895, c = 2: x_k = sum_i a_i y_(k + 1 - 2^i); y_(k+1) = x_k + F(x_k). State: (y_0 .. y_k, x_k)."""

    def open(self, hidden: Tensor) -> Any:
        return [hidden], hidden

    def aggregated(self, ys: list[Tensor]) -> Tensor:
        k = len(ys) - 1
        if k == 0:
            return ys[0]
        weights, total, offset = list(self.p(k, "weights")), torch.zeros_like(ys[0]), 1
        while offset <= k + 1:
            total = total + weights.pop(0) * ys[k + 1 - offset]
            offset *= 2
        assert not weights
        return total

    def read(self, state: Any, k: int) -> tuple[Tensor, Any]:
        x = self.aggregated(state[0])
        return x, (state[0], x)

    def write(self, state: Any, k: int, output: Tensor) -> Any:
        ys, x = state
        return [*ys, x + output], x

    def close(self, state: Any) -> Tensor:
        return self.aggregated(state[0])
