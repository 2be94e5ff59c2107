"""--profile: marks some iterations for nsys, or writes a trace of PyTorch's profiler."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from megatron_hc.config import LogConfig
from megatron_hc.folders import check_folder
from megatron_hc.mesh import Mesh


class Profiler:
    """Profiles iterations --profile-step-start .. --profile-step-end - 1 on --profile-ranks; else does nothing.

    Use it as a context and call ``step`` before every iteration. With --use-pytorch-profiler a rank writes
    ``FOLDER/rank_R.json``, to be opened in Perfetto or chrome://tracing; without, it starts and stops the collection of
    ``nsys profile -c cudaProfilerApi``. Raises ``ValueError`` for what this device cannot do, and for a folder that
    cannot be written.
    """

    def __init__(self, config: LogConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.is_on = config.profile and mesh.world_rank in config.profile_ranks
        self._active: Any = None
        if config.profile and not config.use_pytorch_profiler and not mesh.device.startswith("cuda"):
            raise ValueError("--profile on a CPU needs --use-pytorch-profiler: nsys is for GPUs")
        if self.is_on and config.use_pytorch_profiler:
            check_folder("--profile-dir", self.file.parent)

    @property
    def file(self) -> Path:
        folder = self.config.profile_dir or self.config.tensorboard_dir or "profile"
        return Path(folder) / f"rank_{self.mesh.world_rank}.json"

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def step(self, iteration: int) -> None:
        """``iteration`` is about to begin, the first being 0."""
        if not self.is_on:
            return
        if iteration >= self.config.profile_step_end:
            self._stop()
        elif iteration >= self.config.profile_step_start and self._active is None:
            self._active = self._start()

    def _start(self) -> Any:
        if not self.config.use_pytorch_profiler:
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
            return contextlib.nullcontext()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.mesh.device.startswith("cuda"):
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        found = torch.profiler.profile(activities=activities, record_shapes=True)
        found.start()
        return found

    def _stop(self) -> None:
        active, self._active = self._active, None
        if active is None:
            return
        if not self.config.use_pytorch_profiler:
            torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())
            return
        active.stop()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".json.tmp")
            active.export_chrome_trace(str(partial))
            os.replace(partial, self.file)
        except OSError as error:  # a trace is not worth a run
            logging.getLogger(__name__).warning("%s cannot be written (%s). Training goes on", self.file, error)
