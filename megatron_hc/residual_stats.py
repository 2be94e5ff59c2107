"""What a residual path does to its signal, measured in a forward pass without gradients, at any layout.

Dims: S sequence, B batch, N streams, D width of one stream, C hidden size, L layers, k = 0 .. 2 L - 1 sublayers; place
2 L is the final read. All sums are taken in float64 over the tokens of the pass, on all ranks that share its layers.

The state h_k is the stream at the read of sublayer k as one vector per token (``Residual.state``: the mean of n
streams); f_k what sublayer k writes.

    channel_squared_mean  mean over channels of (mean over tokens of h)^2         (Brock et al. 2021, 2101.08692)
    channel_variance      mean over channels of the variance over tokens of h     (the same)
    branch_variance       mean over channels of the variance over tokens of f     (the same)
    stream_cosine         mean over pairs of streams of G_ij / sqrt(G_ii G_jj), G_ij = sum over tokens of s_i . s_j
    stream_rank           exp(entropy of the singular values of the streams, over their sum): 1 .. n; near 1: collapse
    row_deviation         mean over tokens of the largest |row sum of H_res - 1|; column_deviation likewise
    forward_gain          largest absolute row sum of the product of the mean H_res of sublayers 0 .. k (2512.24880)
    backward_gain         largest absolute column sum of that product
    layer_cosine          mean over tokens of cos(stream into, stream out of a layer)
    linearity             how well a linear map predicts a layer's output from its input: 1 - min |X A - Y|^2 / |Y|^2,
                          X and Y centred (2405.12250, closed form); 1: a linear map
    update_linearity      the same for Y - X
    value_first, value_own  learned weights of a value residual: of the first values and of a layer's own
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.mesh import Mesh
from megatron_hc.model.attention import Context
from megatron_hc.model.gpt import GPT
from megatron_hc.model.layer import TransformerLayer
from megatron_hc.parallel.collectives import all_reduce
from megatron_hc.residual import Carry, Norm, Residual

Stats = dict[str, list[float | None]]
"""By name: a number per sublayer and final read, per sublayer, or per layer; None where it does not apply."""


class Sums:
    """Sums over tokens at one place; those of all places of a rank travel in one message."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.parts[name] = self.parts[name] + value if name in self.parts else value

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.parts


class Recorder:
    """Watches the residual modules of ``model`` while it runs forward."""

    def __init__(self, model: GPT, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.places: dict[int, Sums] = {}
        self.layers: dict[int, dict[str, float]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Reads, writes and layers are recorded inside. What was set on the modules before is put back."""
        patched: list[tuple[nn.Module, str, Any]] = []
        hooks = []

        def patch(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
            patched.append((module, name, module.__dict__.get(name)))
            object.__setattr__(module, name, wrapper(getattr(module, name), module))

        for layer in self.model.stage_layers():
            for residual in (layer.attention_residual, layer.mlp_residual):
                patch(residual, "read", self._reading)
                patch(residual, "write", self._writing)
            hooks.append(layer.register_forward_hook(self._layer_done))
        if self.model.is_last:
            patch(self.model.final_residual, "read", self._reading)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, name, before in reversed(patched):
                if before is None:
                    object.__delattr__(module, name)
                else:
                    object.__setattr__(module, name, before)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks that have other tokens of the same layers."""
        shards = self.mesh.group("tp") if self.mesh.sequence_parallel else None
        return all_reduce(all_reduce(x, self.mesh.group("dp_cp")), shards)

    def _place(self, residual: Residual) -> Sums:
        return self.places.setdefault(residual.site.index, Sums())

    def _reading(self, read: Callable[..., Any], residual: Residual) -> Callable[..., Any]:
        def recorded(carry: Carry, norm: Norm) -> Any:
            settled = residual.settle(carry)
            sums, state = self._place(residual), residual.merged(settled).double().flatten(0, 1)  # [T, C]
            sums.add("count", torch.full((1,), float(state.shape[0]), device=state.device))
            sums.add("state", state.sum(0))
            sums.add("state_squares", state.square().sum(0))
            if settled.stream.shape[2] > 1:
                streams = settled.stream.double().flatten(0, 1)  # [T, N, D]
                sums.add("gram", torch.einsum("tnd,tmd->nm", streams, streams))
            return read(carry, norm)

        return recorded

    def _writing(self, write: Callable[..., Any], residual: Residual) -> Callable[..., Any]:
        def recorded(carry: Carry, output: Tensor, value: Tensor | None = None) -> Carry:
            sums, f = self._place(residual), output.double().flatten(0, 1)
            sums.add("output", f.sum(0))
            sums.add("output_squares", f.square().sum(0))
            if carry.mix is not None and carry.mix.keep is not None:
                kept = carry.mix.keep.double().flatten(0, 1)  # [T, old, new]: H_res transposed
                sums.add("keep", kept.sum(0))
                sums.add("row", (kept.sum(1) - 1).abs().amax(1).sum().unsqueeze(0))
                sums.add("column", (kept.sum(2) - 1).abs().amax(1).sum().unsqueeze(0))
            return write(carry, output, value)

        return recorded

    def _layer_done(self, layer: nn.Module, inputs: tuple[Carry, Context], carry: Carry) -> None:
        """Linearity needs all tokens of a layer at once: it is reduced here, and only the scores are kept."""
        assert isinstance(layer, TransformerLayer)
        before, after = (layer.mlp_residual.state(c).double().flatten(0, 1) for c in (inputs[0], carry))
        cosines = torch.cosine_similarity(before, after, dim=-1).sum()
        sizes = torch.stack([cosines, torch.full_like(cosines, float(before.shape[0]))])
        total, count = self.total(sizes).tolist()
        full, update = linearity(before, after, self.total)
        found = self.layers.setdefault(layer.layer, {})
        found |= {"layer_cosine": total / count, "linearity": full, "update_linearity": update}


def linearity(x: Tensor, y: Tensor, total: Callable[[Tensor], Tensor] = lambda t: t) -> tuple[float, float]:
    """(score of Y, score of Y - X), 1 - min_A |X A - Y|^2 / |Y|^2 with centred X and Y [T, C] in float64.

    ``total`` sums over the processes that have other tokens. Directions of X below 1e-10 of the largest do not count.
    Numbers that are not finite, or whose squares are not, give scores that are not: no reason to end a run here.
    """
    C = x.shape[1]
    both = torch.cat((x, y, torch.ones_like(x[:, :1])), 1)
    moments = total(both.t() @ both)
    if not moments.isfinite().all():
        return math.nan, math.nan
    means = moments[-1, :-1] / moments[-1, -1]
    centred = moments[:-1, :-1] - moments[-1, -1] * torch.outer(means, means)
    xx, xy, yy = centred[:C, :C], centred[:C, C:], centred[C:, C:]
    values, vectors = torch.linalg.eigh(xx)
    inverse = torch.where(values > 1e-10 * values[-1], 1 / values.clamp(min=1e-300), 0.0)

    def score(cross: Tensor, size: Tensor) -> float:
        explained = ((vectors.t() @ cross).square().sum(1) * inverse).sum()
        return float(explained / size) if size > 0 else 1.0

    return score(xy, yy.trace()), score(xy - xx, (yy - 2 * xy + xx).trace())


@torch.no_grad()
def measure(model: GPT, mesh: Mesh, forward: Callable[[], object]) -> Stats:
    """Run ``forward`` in evaluation mode and say what the residual path did; the same on every rank, all call together.

    ``forward`` runs ``model``'s part of the network over one micro-batch of each data-parallel rank, whose tokens are
    what is measured. The model's mode is put back.
    """
    recorder, was_training = Recorder(model, mesh), model.training
    model.eval()
    try:
        # A compiler would make minutes of code of what watches, in pieces, for the few passes of a run.
        with recorder.watching(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        model.train(was_training)
    _sum_over_stage(recorder)
    return _assembled(recorder)


def _sum_over_stage(recorder: Recorder) -> None:
    """One message for all places of this rank."""
    parts = [(sums, name) for _, sums in sorted(recorder.places.items()) for name in sums.parts]
    if not parts:
        return
    flat = recorder.total(torch.cat([sums[name].flatten() for sums, name in parts]))
    for (sums, name), total in zip(parts, flat.split([sums[name].numel() for sums, name in parts]), strict=True):
        sums.parts[name] = total.view_as(sums[name])


def _assembled(recorder: Recorder) -> Stats:
    """Every stage's places put together."""
    model, mesh = recorder.model, recorder.mesh
    num_sublayers = 2 * model.config.num_layers
    # Values, and whether there is one: a place belongs to one stage.
    rows = {name: torch.zeros(2, num_sublayers + 1, dtype=torch.float64) for name in NAMES}
    found = [(place, at_place(sums)) for place, sums in recorder.places.items()]
    found += [(layer, scores | value_weights(model, layer)) for layer, scores in recorder.layers.items()]
    for place, values_here in found:
        for name, value in values_here.items():
            rows[name][:, place] = torch.tensor([value, 1.0], dtype=torch.float64)
    flat = torch.cat([rows[name].flatten() for name in NAMES]).to(mesh.device)
    flat = all_reduce(flat, mesh.group("pp")).cpu()
    table = flat.unflatten(0, (len(NAMES), 2, num_sublayers + 1))
    stats: Stats = {}
    for name, (values, given) in zip(NAMES, table, strict=True):
        if given.any():
            length = LENGTHS[name](model.config.num_layers)
            pairs = zip(values.tolist(), given.tolist(), strict=True)
            stats[name] = [value if has else None for value, has in pairs][:length]
    return stats | _gains(recorder, num_sublayers)


def at_place(sums: Sums) -> dict[str, float]:
    """The statistics of one sublayer, or of the final read."""
    count = sums["count"]
    found = {
        "channel_squared_mean": float((sums["state"] / count).square().mean()),
        "channel_variance": float(_variance(sums["state"], sums["state_squares"], count)),
    }
    if "output" in sums:
        found["branch_variance"] = float(_variance(sums["output"], sums["output_squares"], count))
    if "gram" in sums:
        found["stream_cosine"], found["stream_rank"] = stream_similarity(sums["gram"])
    if "keep" in sums:
        found |= {f"{kind}_deviation": float(sums[kind] / count) for kind in ("row", "column")}
    return found


def _variance(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    return (squares / count - (total / count).square()).clamp(min=0).mean()


def stream_similarity(gram: Tensor) -> tuple[float, float]:
    """(mean cosine, effective rank) of streams from their scalar products [N, N], float64; nan if one is not finite."""
    if not gram.isfinite().all():
        return math.nan, math.nan
    length = gram.diagonal().clamp(min=1e-300).sqrt()
    cosines = gram / torch.outer(length, length)
    N = gram.shape[0]
    mean = (cosines.sum() - cosines.diagonal().sum()) / (N * (N - 1))
    squares = torch.linalg.eigvalsh(gram)
    # Below are rounding errors of sums: copies of one stream have rank 1.
    singular = torch.where(squares > 1e-12 * squares[-1], squares, 0.0).sqrt()
    share = singular / singular.sum().clamp(min=1e-300)
    return float(mean), float(torch.exp(-torch.special.xlogy(share, share).sum()))


def value_weights(model: GPT, layer: int) -> dict[str, float]:
    """Learned weights of the layer's value residual: of the first layer's values, and of its own."""
    weights = getattr(model.get_submodule(f"layers.{layer}.attention.value_residual"), "weights", None)
    if weights is None:
        return {}
    whole = weights.full_tensor() if hasattr(weights, "full_tensor") else weights
    return {"value_first": float(whole[0]), "value_own": float(whole[-1])}


def _gains(recorder: Recorder, num_sublayers: int) -> Stats:
    """Composite gains from the mean H_res of all sublayers, which every rank gets."""
    places = {k: sums for k, sums in recorder.places.items() if "keep" in sums}
    sizes = torch.tensor(
        max((sums["keep"].shape[0] for sums in places.values()), default=0), device=recorder.mesh.device
    )
    N = int(all_reduce(sizes, recorder.mesh.group("pp"), torch.distributed.ReduceOp.MAX))
    if not N:
        return {}
    kept = torch.zeros(num_sublayers, N, N, dtype=torch.float64, device=recorder.mesh.device)
    for k, sums in places.items():
        kept[k] = sums["keep"] / sums["count"]
    return composite_gains(all_reduce(kept, recorder.mesh.group("pp")).cpu())


def composite_gains(kept: Tensor) -> Stats:
    """keep matrices [sublayers, old, new] -> gains of the products of sublayers 0 .. k, for every k."""
    product = torch.eye(kept.shape[-1], dtype=kept.dtype)
    forward, backward = [], []
    for matrix in kept:
        product = product @ matrix  # [old, new]: the transposed product of H_res
        forward.append(float(product.abs().sum(0).max()))
        backward.append(float(product.abs().sum(1).max()))
    return {"forward_gain": list(forward), "backward_gain": list(backward)}


LENGTHS: dict[str, Callable[[int], int]] = {
    "channel_squared_mean": lambda layers: 2 * layers + 1,
    "channel_variance": lambda layers: 2 * layers + 1,
    "branch_variance": lambda layers: 2 * layers,
    "stream_cosine": lambda layers: 2 * layers + 1,
    "stream_rank": lambda layers: 2 * layers + 1,
    "row_deviation": lambda layers: 2 * layers,
    "column_deviation": lambda layers: 2 * layers,
    "layer_cosine": lambda layers: layers,
    "linearity": lambda layers: layers,
    "update_linearity": lambda layers: layers,
    "value_first": lambda layers: layers,
    "value_own": lambda layers: layers,
}
"""How many numbers each statistic has."""
NAMES = tuple(LENGTHS)
