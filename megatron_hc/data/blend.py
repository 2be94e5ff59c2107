"""Several datasets drawn from in given shares. This module needs no torch.

The order equals that of ``megatron.core.datasets`` 0.16.1: at every step the dataset that lags its share most is next,
the first one where several lag alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_hc.data.dataset import GPTDataset, Sample
from megatron_hc.data.indices import cached_arrays


def normalize(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """``dataset_index`` i16[size] and ``dataset_sample_index`` i64[size] of ``size`` draws with shares ``weights``.

    ``weights`` sum to 1. Step n takes argmax_i(weights[i] * max(n, 1) - count[i]), computed in float64.
    """
    return _draw(weights, size, [size + 1] * len(weights))


def exhaustive_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same where dataset i gives exactly ``sizes[i]`` samples, spread as evenly as possible."""
    total = sum(sizes)
    return _draw([size / total for size in sizes], total, sizes)


def _draw(weights: Sequence[float], size: int, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    if len(weights) > np.iinfo(np.int16).max:
        raise ValueError(f"a blend of {len(weights)} datasets: at most {np.iinfo(np.int16).max} are possible")
    dataset_index = np.empty(size, dtype=np.int16)
    shares = np.array(weights, dtype=np.float64)
    counts = [0] * len(weights)
    unspent = [i for i, limit in enumerate(limits) if limit > 0]
    chunk = max(1, 2**18 // len(weights))
    for start in range(0, size, chunk):
        steps = np.maximum(np.arange(start, min(start + chunk, size), dtype=np.float64), 1.0)
        chosen: list[int] = []
        # Each step depends on all before it; plain numbers in a plain loop beat an array operation per step.
        for due in np.multiply.outer(steps, shares).tolist():
            best = unspent[0]
            lag = due[best] - counts[best]
            for i in unspent:
                other = due[i] - counts[i]
                if other > lag:
                    best, lag = i, other
            counts[best] += 1
            chosen.append(best)
            if counts[best] == limits[best]:
                unspent.remove(best)
        dataset_index[start : start + len(chosen)] = chosen
    sample_index = np.empty(size, dtype=np.int64)
    for i, count in enumerate(counts):
        sample_index[dataset_index == i] = np.arange(count)
    return dataset_index, sample_index


class BlendedDataset:
    """Samples of several datasets in the shares ``weights``; ``size`` None takes exactly ``weights[i]`` of dataset i.

    Raises ``ValueError`` where a dataset is too short for its share.
    """

    def __init__(
        self, datasets: Sequence[GPTDataset], weights: Sequence[float], size: int | None, cache_dir: str | None = None
    ) -> None:
        self.datasets = list(datasets)
        weights = list(weights) if size is None else normalize(weights)
        first = self.datasets[0]
        self._folder = Path(cache_dir) if cache_dir else first.cache_folder
        description = {
            "class": "BlendedDataset",
            "datasets": [dataset.description for dataset in self.datasets],
            "weights": weights,
            "size": size,
        }
        self.dataset_index, self.dataset_sample_index = cached_arrays(
            self._folder,
            f"BlendedDataset-{first.split}",
            description,
            ("dataset_index", "dataset_sample_index"),
            lambda: (
                exhaustive_indices([int(weight) for weight in weights])
                if size is None
                else blending_indices(weights, size)
            ),
        )
        which = self.dataset_index
        is_whole = len(which) == len(self.dataset_sample_index) == (sum(weights) if size is None else size)
        if not is_whole or which.min(initial=0) < 0 or which.max(initial=0) >= len(self.datasets):
            raise ValueError(self._damaged())
        for i, count in enumerate(np.bincount(which, minlength=len(self.datasets)).tolist()):
            if count > len(self.datasets[i]):
                raise ValueError(
                    f"the {first.split} blend draws {count} samples from {self.datasets[i].indexed.prefix}, which "
                    f"prepared {len(self.datasets[i])}: raise --mid-level-dataset-surplus, e.g. ten-fold"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        dataset, sample = self.datasets[self.dataset_index[index]], int(self.dataset_sample_index[index])
        if not 0 <= sample < len(dataset):
            raise ValueError(self._damaged())
        return dataset[sample]

    def _damaged(self) -> str:
        which = f"the {self.datasets[0].split} blend in {self._folder}"
        return f"the index cache of {which} is damaged: delete that folder, it is written again"
