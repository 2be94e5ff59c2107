"""Files and services that take a run's records: a JSONL file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_hc.config import LogConfig, TrainConfig
from megatron_hc.folders import check_folder
from megatron_hc.log_files import Prometheus

Record = dict[str, Any]
"""The numbers of one logged iteration, or of one validation, by name."""

TAGS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "global_batch_size": "batch-size",
    "loss_scale": "loss-scale",
    "grad_norm": "grad-norm",
    "num_zeros": "num-zeros",
    "params_norm": "params-norm",
    "seconds_per_iteration": "iteration-time",
    "tflops": "throughput",
    "world_size": "world-size",
    "memory_bytes": "mem-max-allocated-bytes",
    "tokens_per_second": "tokens-per-second",
    "mfu": "mfu",
    "bubble": "pipeline-bubble",
    "ideal_bubble": "ideal-pipeline-bubble",
    "lm_loss_validation": "lm loss validation",
    "lm_loss_validation_ppl": "lm loss validation ppl",
    "lm_loss_validation_stderr": "lm loss validation stderr",
    "lm_loss_test": "lm loss test",
    "lm_loss_test_ppl": "lm loss test ppl",
}
"""Key of a record -> Megatron-LM's tag in TensorBoard and W&B (those after "world-size" up to the bubbles are ours)."""

ROUTER_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss")
"""Keys that are their own tags, and begin those of single layers: moe/NAME_layer_3 (Megatron-LM's names)."""

NAMED = ("moe/", "eval/", "validation/", "residual/")
"""What keys that are their own tags begin with: routers of single layers, scores of tasks, sources of a blend."""


def tags_of(record: Record) -> dict[str, str]:
    """Key -> tag of what TensorBoard and W&B show of a record."""
    own = {key: key for key in record if key in ROUTER_LOSSES or key.startswith(NAMED)}
    return {key: tag for key, tag in {**TAGS, **own}.items() if record.get(key) is not None}


class Sink(Protocol):
    """Takes records until it is closed."""

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


def check_sinks(options: LogConfig) -> None:
    """Refuse what cannot be opened, before anything is written."""
    for name, given, library in (
        ("--tensorboard-dir", options.tensorboard_dir, "tensorboard"),
        ("--wandb-project", options.wandb_project, "wandb"),
    ):
        if given is not None and importlib.util.find_spec(library) is None:
            raise ValueError(f"{name} needs the {library} package: pip install 'megatron_hc[log]'")
    if options.metrics_jsonl is not None:
        check_folder("--metrics-jsonl: the folder", Path(options.metrics_jsonl).parent)
        _refuse_device("--metrics-jsonl", options.metrics_jsonl)
        _lines_until(Path(options.metrics_jsonl), 0)
    for name, file in (("--heartbeat-file", options.heartbeat_file), ("--prometheus-file", options.prometheus_file)):
        if file is not None:
            check_folder(f"{name}: the folder", Path(file).parent)
            if Path(file).is_dir():
                raise ValueError(f"{name} {file} is a folder: name a file")
            _refuse_device(name, file)
    for name, folder in (("--tensorboard-dir", options.tensorboard_dir), ("--wandb-save-dir", options.wandb_save_dir)):
        if folder is not None:
            check_folder(name, folder)


def _refuse_device(name: str, file: str) -> None:
    """A device or pipe would be read without end, or be replaced by a file: /dev/null too, where root runs this."""
    path = Path(file)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{name} {file} is a device or a pipe, which cannot be read again or replaced: name a file")


def open_sinks(config: TrainConfig, start_iteration: int) -> list[Sink]:
    """The sinks that the configuration asks for, open; see ``JsonLines`` for ``start_iteration``.

    Raises ``ValueError`` where one cannot be opened: what fails later does not end a run (``Logger``).
    """
    options = config.logging
    sinks: list[Sink] = []
    if options.metrics_jsonl is not None:
        with _named(f"--metrics-jsonl {options.metrics_jsonl}"):
            sinks.append(JsonLines(Path(options.metrics_jsonl), start_iteration))
    if options.tensorboard_dir is not None:
        with _named(f"--tensorboard-dir {options.tensorboard_dir}"):
            sinks.append(TensorBoard(options.tensorboard_dir))
    if options.wandb_project is not None:
        with _named(f"--wandb-project {options.wandb_project}"):
            sinks.append(WeightsAndBiases(config))
    if options.prometheus_file is not None:
        sinks.append(Prometheus(options.prometheus_file))
    return sinks


@contextmanager
def _named(log: str) -> Iterator[None]:
    """Name the log in an error of the system: the one of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{log} cannot be written: {error.strerror or error}") from error


class JsonLines:
    """One JSON object per line, floats at full precision; what is not finite or not known is null.

    A file that is there is taken for the file of the run that is resumed: lines beyond its iteration go. What a kept
    line says (a run that was done validates again) is not written a second time.
    """

    def __init__(self, path: Path, start_iteration: int) -> None:
        kept = _lines_until(path, start_iteration)
        self._kept = {_subject(json.loads(line)) for line in kept}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(line + "\n" for line in kept)
        if path.exists() and path.read_text(encoding="utf-8") != text:  # a full disk has room for what need not change
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        """Lines that a full disk has not taken yet."""

    def write(self, record: Record) -> None:
        if _subject(record) in self._kept:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._waiting += (json.dumps(finite, allow_nan=False) + "\n").encode()
        self._flush()

    def _flush(self) -> None:
        """Write what waits; a disk that is full in the middle of a line leaves no half of it."""
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                assert written is not None
                self._waiting = self._waiting[written:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        if self._waiting:
            self._flush()
        self._file.close()


class TensorBoard:
    """Megatron-LM's tags, each against iterations and, with " vs samples", against samples.

    Iterations that a resumed run trains again are written again. TensorBoard's data server shows the newer points of a
    tag; its older reader in Python shows both. ``purge_step`` is not given: that reader compares it with the steps of
    all tags, and would drop the points against samples of all earlier attempts.
    """

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, record: Record) -> None:
        for key, tag in tags_of(record).items():
            self._writer.add_scalar(tag, record[key], record["iteration"])
            self._writer.add_scalar(f"{tag} vs samples", record[key], record["consumed_samples"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The same tags in Weights & Biases; WANDB_MODE=offline keeps them on this machine."""

    def __init__(self, config: TrainConfig) -> None:
        import wandb

        options = config.logging
        if options.wandb_save_dir is not None:
            os.makedirs(options.wandb_save_dir, exist_ok=True)
        try:
            self._run = wandb.init(
                project=options.wandb_project,
                name=options.wandb_exp_name,
                dir=options.wandb_save_dir,
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:
            raise ValueError(f"--wandb-project: {error}; WANDB_MODE=offline needs no account") from error

    def write(self, record: Record) -> None:
        values = {tag: record[key] for key, tag in tags_of(record).items()}
        self._run.log(values | {"consumed-samples": record["consumed_samples"]}, step=record["iteration"])

    def close(self) -> None:
        self._run.finish()


def _subject(record: Record) -> tuple[int, frozenset[str]]:
    """What a line is about: the iteration, and training, validation, test or tasks."""
    return record["iteration"], frozenset(key for key in record if key.startswith(("lm_loss", "eval/")))


def _lines_until(path: Path, iteration: int) -> list[str]:
    """The whole lines of a metrics file up to an iteration; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    kept: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--metrics-jsonl {path} cannot be read ({error}): name another file") from error
    for number, line in enumerate(lines, 1):
        try:
            at = json.loads(line)["iteration"]
            if not isinstance(at, int):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines) and (number > 1 or line.startswith('{"iteration"')):
                break
            raise ValueError(
                f"--metrics-jsonl {path}: line {number} is not a line of metrics: name another file"
            ) from None
        if at <= iteration:
            kept.append(line)
    return kept
