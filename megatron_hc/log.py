"""Where a run's numbers go: Megatron-LM's console lines, TensorBoard, Weights & Biases, a JSONL file, a progress bar.

Every number is computed once, into a record (a flat dict); console and sinks all show that record.
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

from megatron_hc.config import LogConfig, ModelConfig, TrainConfig
from megatron_hc.log_files import Heartbeat
from megatron_hc.log_sinks import ROUTER_LOSSES, Record, Sink, check_sinks, open_sinks

PEAK_TFLOPS = {"H100 PCIe": 756.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "GB200": 2500.0, "B200": 2250.0}
"""Part of a GPU's name -> dense bf16 TFLOP/s by the vendor's data sheet; the first match counts."""


class Layout(Protocol):
    """What a logger needs to know of the mesh."""

    @property
    def world_size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def device(self) -> str: ...


def flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Floating-point operations of forward and backward per token, as Megatron-LM counts them.

    Twice a multiply-add, three times (forward, gradients of inputs and of weights), for the matrices of attention, MLP
    (three with --swiglu; of experts those that a token goes through) and output, and half (causal) of the scores and
    the weighted sum of values over --seq-length. The residual path, norms and recompute are not counted, so that the
    throughput of two residual methods, with or without recompute, compares as time does. ``vocab_size`` is rounded up
    to --make-vocab-size-divisible-by.
    """
    hidden, query = model.hidden_size, model.head_size * model.num_attention_heads
    key_value = 2 * model.head_size * model.num_kv_heads
    attention = hidden * (query + key_value) + query * hidden + query * model.seq_length
    matrices = 3 if model.swiglu else 2
    mlp = matrices * hidden * model.ffn_size
    with_experts = sum(model.moe.has_experts(model.num_layers))
    experts = model.moe.moe_router_topk * model.expert_ffn_size + (model.moe.moe_shared_expert_intermediate_size or 0)
    mlps = (model.num_layers - with_experts) * mlp + with_experts * matrices * hidden * experts
    unit = model.make_vocab_size_divisible_by
    vocabulary = math.ceil(vocab_size / unit) * unit
    return 6.0 * (model.num_layers * attention + mlps + hidden * vocabulary)


class Logger:
    """Collects what every step reports and shows it every --log-interval iterations.

    Use it as a context: entering opens files and services, leaving closes them. Only the first rank writes.

    Args:
        vocab_size: tokens of the tokenizer, for FLOPs.
        total_iterations: length of the run.
        start_iteration: iteration that the run resumes from; lines of --metrics-jsonl beyond it are removed.

    Raises ``ValueError`` where a library is missing or --metrics-jsonl cannot be this run's file.
    """

    def __init__(
        self,
        config: TrainConfig,
        layout: Layout,
        vocab_size: int,
        *,
        total_iterations: int,
        start_iteration: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.layout, self._clock = config, layout, clock
        self.total_iterations, self.start_iteration = total_iterations, start_iteration
        self.flops_per_sample = flops_per_token(config.model, vocab_size) * config.model.seq_length
        self.peak_tflops = _peak_tflops(config, layout.device)
        self._sinks: list[Sink] = []
        self._heartbeat: Heartbeat | None = None
        self._failing: set[str] = set()
        self._iteration = start_iteration
        self._skipped = 0
        self._bar: Any = None
        self._losses: list[Any] = []
        self._router_losses: dict[str, list[list[float | None]]] = {}
        self._num_timed = 0
        self._timed_samples = 0
        self._seconds = 0.0
        self._since: float | None = None
        if layout.is_first:
            check_sinks(config.logging)

    def __enter__(self) -> Logger:
        if self.layout.is_first:
            self._sinks = open_sinks(self.config, self.start_iteration)
            if self.config.logging.heartbeat_file is not None:
                self._heartbeat = Heartbeat(self.config.logging.heartbeat_file)
            self._beat("training")
            if sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=self.total_iterations, initial=self.start_iteration, unit="it", leave=False)
        self._since = self._clock()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._beat("ended" if exception == (None, None, None) else "failed")
        for sink in self._sinks:
            self._keep_going(sink.close)
        self._sinks = []

    def say(self, text: str) -> None:
        """Print a line of plain text, without breaking the progress bar."""
        if not self.layout.is_first:
            return
        if self._bar is not None:
            self._bar.clear()
        with suppress(OSError):  # the disk under the output is full: no reason to end the run
            print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    @contextmanager
    def pause(self, state: str = "paused") -> Iterator[None]:
        """Time spent inside (``state``: "validation", "saving") does not count as time of an iteration."""
        self._stop_clock()
        self._beat(state)
        try:
            yield
        finally:
            self._beat("training")
            self._since = self._clock()

    def _beat(self, state: str) -> None:
        if self._heartbeat is not None:
            beat = self._heartbeat.beat
            self._keep_going(lambda: beat(self._iteration, state))

    def _keep_going(self, action: Callable[[], object]) -> None:
        """A file of numbers that cannot be written does not end the run."""
        try:
            action()
        except OSError as error:
            name = str(error.filename or error)
            if name not in self._failing:
                self._failing.add(name)
                self.say(f"WARNING: {name} cannot be written ({error.strerror or error}). Training goes on")

    def is_due(self, iteration: int) -> bool:
        """Whether a line is shown at this iteration."""
        return iteration % self.config.logging.log_interval == 0 or iteration == self.total_iterations

    def skipped(self, iteration: int) -> None:
        """Note an iteration of --iterations-to-skip: it has no loss, and a line that is due comes with the next."""
        self._iteration, self._skipped = iteration, self._skipped + 1
        self.say(f"skipped iteration {iteration}, as --iterations-to-skip says")
        self._beat("training")

    def _stop_clock(self) -> None:
        if self._since is not None:
            self._seconds += self._clock() - self._since
            self._since = None

    def step(
        self,
        *,
        iteration: int,
        consumed_samples: int,
        batch_size: int,
        loss: Any,
        learning_rate: float,
        grad_norm: float | None = None,
        num_zeros: int | None = None,
        params_norm: Callable[[], float] | None = None,
        router_losses: Mapping[str, Sequence[float | None]] | None = None,
        bubble: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        """Note an iteration; at a multiple of --log-interval (and at the last one) show the mean since the last line.

        ``loss`` is a number or a tensor of one element, read only when a line is due. ``consumed_samples`` includes
        this iteration's. ``params_norm`` is called only when a line is due, on every rank. ``router_losses``: by name
        and layer, None for layers without experts. ``bubble``: the share of the time that pipeline stages waited, and
        the ideal; called as ``params_norm`` is.
        """
        self._iteration = iteration
        self._beat("training")
        self._losses.append(loss)
        for name, values in (router_losses or {}).items():
            self._router_losses.setdefault(name, []).append(list(values))
        self._num_timed += 1
        self._timed_samples += batch_size
        if self._bar is not None:
            self._bar.update()
        if not self.is_due(iteration):
            return
        losses = [float(value) for value in self._losses]
        self._stop_clock()
        seconds = self._seconds / self._num_timed
        waited, least = (None, None) if bubble is None else bubble()
        record: Record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self.config.model.seq_length,
            "seconds_per_iteration": seconds,
            "learning_rate": learning_rate,
            "global_batch_size": batch_size,
            "lm_loss": sum(losses) / len(losses),
            **self._means_of_router_losses(),
            "loss_scale": 1.0,
            "grad_norm": grad_norm,
            "num_zeros": num_zeros,
            "params_norm": None if params_norm is None else params_norm(),
            "bubble": waited,
            "ideal_bubble": least,
            "skipped_iterations": self._skipped,
            "nan_iterations": sum(not math.isfinite(value) for value in losses),
            **self._speed(seconds, self._timed_samples / self._num_timed),  # a batch that grows is not the last one's
            "memory_bytes": peak_memory(self.layout.device),
            "eta_seconds": (self.total_iterations - iteration) * seconds,
            "world_size": self.layout.world_size,
            "time": time.time(),
        }
        self._losses, self._router_losses, self._num_timed, self._seconds = [], {}, 0, 0.0
        self._timed_samples = 0
        self._skipped = 0
        self._show(console_line(record, self.total_iterations, self.config.logging), record)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['lm_loss']:.4f}")
        self._since = self._clock()

    def _means_of_router_losses(self) -> Record:
        """Over the iterations since the last line; of all layers with experts, and layer by layer where asked for."""
        found: Record = {}
        for name, steps in self._router_losses.items():
            layers = [layer for layer, value in enumerate(steps[0]) if value is not None]
            means = {layer: sum(step[layer] or 0.0 for step in steps) / len(steps) for layer in layers}
            found[name] = sum(means.values()) / len(means)
            if self.config.logging.moe_per_layer_logging:
                found |= {f"moe/{name}_layer_{layer}": mean for layer, mean in means.items()}
        return found

    def _speed(self, seconds: float, batch_size: float) -> Record:
        per_device = self.flops_per_sample * batch_size / self.layout.world_size / 1e12
        tflops = per_device / seconds if seconds > 0 else None
        return {
            "tokens_per_second": batch_size * self.config.model.seq_length / seconds if seconds > 0 else None,
            "tflops": tflops,
            "mfu": None if self.peak_tflops is None or tflops is None else tflops / self.peak_tflops,
        }

    def evaluation(
        self,
        split: str,
        iteration: int,
        consumed_samples: int,
        loss: float,
        *,
        details: Mapping[str, float | None] | None = None,
        lines: Sequence[str] = (),
    ) -> None:
        """Show the loss of a validation (``split`` "validation") or test ("test").

        ``details``: more numbers for the sinks; ``lines``: more lines for the console.
        """
        key, perplexity = f"lm_loss_{split}", math.exp(min(20.0, loss)) if not math.isnan(loss) else math.nan
        where = "" if split == "validation" else f" on {split} set"
        line = f" validation loss at iteration {iteration}{where} | lm loss value: {loss:.6E} | "
        line += f"lm loss PPL: {perplexity:.6E} | "
        rule = "-" * (len(line) + 1)
        record: Record = {"iteration": iteration, "consumed_samples": consumed_samples}
        record |= {"consumed_tokens": consumed_samples * self.config.model.seq_length, key: loss}
        record |= {f"{key}_ppl": perplexity, **(details or {}), "time": time.time()}
        self._show("\n".join([rule, line, *lines, rule]), record)

    def scores(self, iteration: int, consumed_samples: int, scores: Mapping[str, float]) -> None:
        """Show what tasks gave, 'TASK/METRIC' -> number."""
        record: Record = {"iteration": iteration, "consumed_samples": consumed_samples}
        record |= {f"eval/{name}": value for name, value in scores.items()}
        shown = [f"{name}: {value:.4f}" for name, value in scores.items() if "_stderr" not in name]
        self._show(f" scores at iteration {iteration} | {' | '.join(shown)} |", record | {"time": time.time()})

    def residual(self, iteration: int, consumed_samples: int, stats: Mapping[str, Sequence[float | None]]) -> None:
        """Show what --log-residual-stats measured: residual/NAME_PLACE in the sinks, the extremes in a line."""
        values = {
            f"residual/{name}_{place}": value
            for name, row in stats.items()
            for place, value in enumerate(row)
            if value is not None
        }
        parts = [f" residual stats at iteration {iteration}"]
        for name, pick in (("grad_norm", max), ("branch_variance", max), ("stream_rank", min), ("forward_gain", max)):
            if name in stats:
                given = [(v, i) for i, v in enumerate(stats[name]) if v is not None]
                value, place = next((pair for pair in given if math.isnan(pair[0])), None) or pick(given)
                parts.append(f"{'largest' if pick is max else 'smallest'} {name}: {value:.4g} at {place}")
        record: Record = {"iteration": iteration, "consumed_samples": consumed_samples, **values, "time": time.time()}
        self._show(" | ".join(parts) + " |", record)

    def _show(self, text: str, record: Record) -> None:
        self.say(text)
        for sink in self._sinks:
            self._keep_going(partial(sink.write, record))

    def state(self) -> dict[str, Any]:
        """What no line has shown yet: saved with a checkpoint, the next line is that of one run."""
        losses = [float(value) for value in self._losses]
        return {"losses": losses, "router_losses": self._router_losses, "skipped": self._skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over ``state()`` of the run that is resumed; its iterations were timed there, not here."""
        self._losses = list(state["losses"])
        self._router_losses = {name: list(steps) for name, steps in state.get("router_losses", {}).items()}
        self._skipped = state.get("skipped", 0)


def console_line(record: Record, total_iterations: int, options: LogConfig) -> str:
    """Megatron-LM's line: its names, order and ``|``; our own fields at the end."""
    now = datetime.datetime.fromtimestamp(record["time"]).strftime("%Y-%m-%d %H:%M:%S.%f")
    parts = [
        f" [{now}] iteration {record['iteration']:8d}/{total_iterations:8d}",
        f"consumed samples: {record['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {record['seconds_per_iteration'] * 1000:.1f}",
    ]
    if options.log_throughput and record["tflops"] is not None:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {record['tflops']:.1f}")
    parts += [
        f"learning rate: {record['learning_rate']:.6E}",
        f"global batch size: {record['global_batch_size']:5d}",
        f"lm loss: {record['lm_loss']:.6E}",
        *(f"{name}: {record[name]:.6E}" for name in ROUTER_LOSSES if name in record),
        f"loss scale: {record['loss_scale']:.1f}",
    ]
    if record["grad_norm"] is not None:
        parts.append(f"grad norm: {record['grad_norm']:.3f}")
    if record["num_zeros"] is not None:
        parts.append(f"num zeros: {record['num_zeros']}")
    if record["params_norm"] is not None:
        parts.append(f"params norm: {record['params_norm']:.3f}")
    parts.append(f"number of skipped iterations: {record['skipped_iterations']:3d}")
    parts.append(f"number of nan iterations: {record['nan_iterations']:3d}")
    if record["tokens_per_second"] is not None:
        parts.append(f"tokens per second: {record['tokens_per_second']:.0f}")
    if record["mfu"] is not None:
        parts.append(f"mfu: {record['mfu']:.3f}")
    if record["bubble"] is not None:
        parts.append(f"bubble: {record['bubble']:.3f} (ideal {record['ideal_bubble']:.3f})")
    parts.append(f"memory (GiB): {record['memory_bytes'] / 2**30:.2f}")
    parts.append(f"eta: {datetime.timedelta(seconds=round(record['eta_seconds']))}")
    return " | ".join(parts) + " |"


def peak_memory(device: str) -> int:
    """Bytes: the most that torch allocated on a GPU, or the most that this process held on a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_tflops(config: TrainConfig, device: str) -> float | None:
    """--peak-tflops, or that of a known GPU at bf16; None where it is not known."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops
    if not device.startswith("cuda") or not config.training.bf16:
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
