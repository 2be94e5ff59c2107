"""What the ranks ask of their process groups, and whether NCCL could do it.

gloo keeps a message until somebody takes it. NCCL does not: a call is a kernel that waits on the device until all the
others have come, and two communicators that ranks use in different orders can wait for each other. So what runs on gloo
may hang on NCCL. But if the calls of all ranks can be played through one at a time, every rank's strictly in its own
order and every rank of a call there at once, then no streams, and no lack of room on the device, can make them hang.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_hc.parallel import collectives

MESSAGES = ("send", "isend", "recv", "irecv")
EVEN = (
    *("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"),
    *("broadcast", "reduce"),
)
"""Collectives to which every rank brings as many numbers."""
OTHERS = (
    *("all_to_all_single", "all_to_all", "all_gather", "gather", "scatter", "reduce_scatter", "barrier"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
)


class Call(NamedTuple):
    """One call, the same for all its ranks."""

    kind: str
    """The function; 'message' on both of its sides."""
    ranks: tuple[int, ...]
    """Who has to come; of a message sender and receiver, in this order."""
    size: int | None = None
    """Numbers of each rank, where they have to be as many."""
    dtype: torch.dtype | None = None


class Recorder:
    """Notes what this process calls in torch.distributed, from now on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        for name in (*MESSAGES, *EVEN, *OTHERS):
            if hasattr(dist, name):  # torch 2.11 has fewer names than 2.13
                setattr(dist, name, self._noted(name, getattr(dist, name)))
        for name in ("all_gather_single", "reduce_scatter_single"):  # bound where the module was imported
            setattr(collectives, f"_{name}", self._noted(name, getattr(collectives, f"_{name}")))

    def take(self) -> list[Call]:
        """The calls since the last time."""
        found, self.calls = self.calls, []
        return found

    def _noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noted(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name != "checkpoint writer":  # whose group is gloo's everywhere
                self.calls.append(_call(name, arguments, options))
            return function(*arguments, **options)

        return noted


def _call(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Call:
    values = (*arguments, *options.values())
    ranks = tuple(dist.get_process_group_ranks(next((v for v in values if isinstance(v, dist.ProcessGroup)), None)))
    tensor = next((v for v in values if isinstance(v, torch.Tensor)), None)
    if tensor is None:
        return Call(name, ranks)
    size = None if name in OTHERS else tensor.numel()
    if name not in MESSAGES:
        return Call(name, ranks, size, tensor.dtype)
    own, is_sent = dist.get_rank(), name in ("send", "isend")
    peer = ranks[options["group_dst" if is_sent else "group_src"]]
    return Call("message", (own, peer) if is_sent else (peer, own), size, tensor.dtype)


def hang(calls: Sequence[Sequence[Call]]) -> str:
    """Play all ranks' calls through. What each rank that is left waiting waits for, a line each; '' if none is."""
    done = [0] * len(calls)

    def next_of(rank: int) -> Call | None:
        return calls[rank][done[rank]] if done[rank] < len(calls[rank]) else None

    ranks, has_moved = range(len(calls)), True
    while has_moved:
        has_moved = False
        for rank in ranks:
            while (call := next_of(rank)) is not None and all(next_of(other) == call for other in call.ranks):
                for other in call.ranks:
                    done[other] += 1
                has_moved = True
    left = [(rank, next_of(rank)) for rank in ranks if next_of(rank) is not None]
    return "\n".join(f"rank {rank} waits in its call {done[rank]}, {call}" for rank, call in left)
