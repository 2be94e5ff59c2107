"""The loss of weights on validation data, outside of a run: for tools that choose between weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_hc import checkpoint
from megatron_hc.cli import from_flat
from megatron_hc.config import TrainConfig
from megatron_hc.data import Batch, build_datasets, tokenizer_of
from megatron_hc.data.loader import collate
from megatron_hc.inference import empty_model, single_process
from megatron_hc.inference.loading import ANY_KERNELS
from megatron_hc.mesh import Mesh
from megatron_hc.parallel.pipeline import MicroBatch, Pipeline


class Validation:
    """The model of a checkpoint in one process, and the first samples of validation data.

    folder: a checkpoint's own, whose weights are filled in. data_path: dataset prefixes, with weights or not, all of
    which is for validation; without, the validation split of the checkpoint's run. num_samples: sequences of the
    model's length, drawn as by a run that wants so many: where that takes more epochs of the data, the order is
    another. Raises ``ValueError`` where there is no such data.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data_path: Sequence[str] = (),
        num_samples: int = 256,
        micro_batch_size: int = 8,
        device: str = "cpu",
        tokenizer_model: str | None = None,
    ) -> None:
        for name, value in (("num-samples", num_samples), ("micro-batch-size", micro_batch_size)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {device} is not there: torch finds no CUDA device, use --device cpu")
        config = self.config = _of_one_process(folder, data_path)
        tokenizer = tokenizer_of(config.data, tokenizer_model)
        self.device = device
        self.model, self._tensors = empty_model(config, tokenizer.vocab_size, Mesh(device=device))
        self.model.requires_grad_(False).eval()
        _, dataset, _ = build_datasets(config, tokenizer, (0, num_samples, 0))
        if dataset is None:
            raise ValueError(f"the run of {folder} has no validation data: give --data-path PREFIX")
        samples = [dataset[index] for index in range(min(num_samples, len(dataset)))]
        self._batches = [
            collate(samples[first : first + micro_batch_size]).to(device)
            for first in range(0, len(samples), micro_batch_size)
        ]
        self._pipeline = Pipeline(self.model, config, Mesh(device=device))
        with checkpoint.Reader(folder) as reader:
            self.fill(reader.read)

    @torch.no_grad()
    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Take the weights ``read(name)``, whole tensors by their names in a checkpoint."""
        for name, stored in self._tensors.items():
            whole = read(name)
            for offset, local in stored.slices:
                local.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))])

    def loss(self) -> float:
        """Mean of the cross entropy over all unmasked tokens, in nats."""
        total, count = 0.0, 0.0
        for batch in self._batches:
            total += float(self._pipeline.forward([self._micro_batch(batch)]).double())
            count += float(batch.loss_mask.sum())
        if count == 0:
            raise ValueError("the validation data has no token that carries a loss: give another --data-path")
        return total / count

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        positions = batch.position_ids if self.config.data.reset_position_ids else None
        return MicroBatch(batch.tokens, batch.labels, batch.loss_mask, positions, batch.document_ids)


def _of_one_process(folder: Path, data_path: Sequence[str]) -> TrainConfig:
    config = single_process(from_flat(checkpoint.read_arguments(folder) | ANY_KERNELS))
    changes: dict[str, object] = {"num_workers": 0}
    if data_path:
        paths = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
        changes |= {"split": None, "data_args_path": None, "mock_data": False} | dict.fromkeys(paths, ())
        changes |= {"train_data_path": tuple(data_path), "valid_data_path": tuple(data_path)}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))  # type: ignore[arg-type]
