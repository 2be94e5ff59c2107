#!/usr/bin/env python3
"""Check a run's flags and layout, then submit it to Slurm: python tools/launch.py --nodes 4 [--dry-run] -- FLAGS

FLAGS are those of pretrain_gpt.py. What that would refuse of them at its start (flags, layout, micro-batches of the
pipeline) is refused here, before anything waits in a queue. --dry-run prints the batch file and the check, and submits
nothing. The batch file is examples/slurm/pretrain.sbatch (or pretrain_srun.sbatch) with its #SBATCH lines filled in;
the flags reach it as arguments, never through a shell.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_hc.cli import Parsed, exit_on_user_error, parse_with_checkpoint  # noqa: E402
from megatron_hc.config import TrainConfig  # noqa: E402

COUNTED = {
    "--nodes": "--nodes",
    "--ntasks": "--nodes and --processes-per-node",
    "--ntasks-per-node": "--processes-per-node",
}
"""Options of sbatch that say how many processes there are -> the flags that say it here."""
TEMPLATES = {"torchrun": "pretrain.sbatch", "srun": "pretrain_srun.sbatch"}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--nodes", type=int, default=1)
    found.add_argument("--gpus-per-node", type=int, default=8, help="0: CPUs only (default: 8)")
    found.add_argument("--processes-per-node", type=int, help="default: one per GPU")
    found.add_argument("--launcher", choices=TEMPLATES, default="torchrun", help="what starts them (default: torchrun)")
    found.add_argument("--job-name", default="pretrain")
    found.add_argument("--time", default="24:00:00", help="limit of one start; the job goes on after it (24:00:00)")
    found.add_argument("--cpus-per-process", type=int, default=8)
    found.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="others: --sbatch=--account=x")
    found.add_argument("--dry-run", action="store_true", help="print the batch file and the check, submit nothing")
    found.add_argument("flags", nargs=argparse.REMAINDER, metavar="-- FLAGS", help="of pretrain_gpt.py")
    return found


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    with exit_on_user_error("launch.py"):
        flags = options.flags[1:] if options.flags[:1] == ["--"] else options.flags
        check_numbers(options)
        per_node = options.processes_per_node or options.gpus_per_node or 1
        parsed = parse_with_checkpoint(flags)
        config = parsed.config
        flags = [*flags, *folders_of_files(parsed)]
        if config.checkpoint.save is None:
            raise ValueError("--save FOLDER must be given: a job that stops resumes from there")
        if "SIGUSR1" not in config.training.exit_signal:
            raise ValueError("--exit-signal must hold SIGUSR1, which Slurm sends before the time limit")
        config.validate(options.nodes * per_node)
        batch_file = fill_in(template(options.launcher), sbatch_options(options, per_node), per_node)
        check = "\n".join(layout_check(config, options.nodes, per_node))
    if options.dry_run:
        print(f"{batch_file}\n# Flags: {shlex.join(flags)}\n#\n{re.sub('^', '# ', check, flags=re.MULTILINE)}")
        return 0
    print(check)
    return submit(batch_file, flags)


def check_numbers(options: argparse.Namespace) -> None:
    for name in ("nodes", "processes_per_node", "cpus_per_process"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    if options.gpus_per_node < 0:
        raise ValueError(f"--gpus-per-node must not be negative, not {options.gpus_per_node} (0: CPUs only)")


def folders_of_files(parsed: Parsed) -> list[str]:
    """--save and --load that stand in YAML, as flags: the batch script looks for them there, and adds --load SAVE."""
    config = parsed.config.checkpoint
    found = {"save": config.save, "load": config.load}
    given = [(name, folder) for name, folder in found.items() if parsed.origins[name].startswith("yaml")]
    return [word for name, folder in given if folder is not None for word in (f"--{name}", folder)]


def template(launcher: str) -> str:
    return (ROOT / "examples" / "slurm" / TEMPLATES[launcher]).read_text(encoding="utf-8")


def sbatch_options(options: argparse.Namespace, per_node: int) -> dict[str, str]:
    """Option of sbatch -> value; an empty value for one that takes none."""
    tasks = 1 if options.launcher == "torchrun" else per_node
    found = {
        "--job-name": options.job_name,
        "--nodes": str(options.nodes),
        "--ntasks-per-node": str(tasks),
        "--cpus-per-task": str(options.cpus_per_process * per_node // tasks),
        "--gpus-per-node": str(options.gpus_per_node),
        "--time": options.time,
    }
    for text in options.sbatch:
        name, _, value = text.partition("=")
        if name in COUNTED:
            raise ValueError(f"--sbatch={text}: the check goes by {COUNTED[name]}: use that")
        if not name.startswith("--"):
            raise ValueError(f"--sbatch={text}: write the long form of the option, as in --sbatch=--account=x")
        found[name] = value
    for name, value in found.items():
        if not re.fullmatch(r"--[a-z][a-z-]*", name) or not re.fullmatch(r"[^\s#'\"\\$`]*", value):
            raise ValueError(f"{name}={value} cannot stand in a #SBATCH line: leave out spaces and quotes")
    if options.gpus_per_node == 0:
        del found["--gpus-per-node"]
    return found


def fill_in(text: str, options: dict[str, str], per_node: int) -> str:
    """The template with these options in place of its own, which stay where they are not named.

    What the script takes from the environment is written into it: --sbatch=--export=NAME leaves out all other names.
    """
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    kept = [line for line in lines[first:] if line.startswith("#SBATCH") and _name(line) not in options]
    if "--gpus-per-node" not in options:
        kept = [line for line in kept if _name(line) != "--gpus-per-node"]
    own = [f"#SBATCH {name}={value}".rstrip("=") for name, value in options.items()]
    rest = [line for line in lines[first:] if not line.startswith("#SBATCH")]
    settings = f"export MEGATRON_HC_ROOT={shlex.quote(str(ROOT))} PROCESSES_PER_NODE={per_node}"
    return "\n".join([*lines[:first], *own, *kept, "", settings, *rest[1:]])


def _name(line: str) -> str:
    return line.split()[1].partition("=")[0]


def layout_check(config: TrainConfig, nodes: int, per_node: int) -> list[str]:
    """What the run will be; lines that begin with "note:" work, and are rarely meant."""
    parallel, training, world = config.parallel, config.training, nodes * per_node
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data, context = parallel.data_parallel_size(world), parallel.context_parallel_size
    batch = training.global_batch_size or training.micro_batch_size * data
    lines = [
        f"layout: {nodes} nodes x {per_node} processes = {world} = pipeline {pipeline} x data {data} x "
        + (f"context {context} x " if context > 1 else "")
        + f"tensor {tensor}",
        f"a step: {batch} samples of {config.model.seq_length} tokens = {batch // (training.micro_batch_size * data)} "
        f"micro-batches of {training.micro_batch_size} on each of {data} copies",
    ]
    if pipeline > 1:
        lines.append(parallel.pipeline_layout(config.model.num_layers).describe())
    if tensor > per_node or per_node % tensor:
        lines.append(f"note: tensor-parallel groups of {tensor} cross nodes of {per_node} processes: slow")
    if context > 1 and (tensor * context > per_node or per_node % (tensor * context)):
        lines.append(f"note: context-parallel groups of {context} cross nodes of {per_node} processes: slow")
    experts = parallel.expert_model_parallel_size
    if experts > 1:
        lines.append(f"experts: {config.model.moe.num_experts} over groups of {experts} processes")
        if experts * parallel.expert_parts > per_node:
            lines.append(f"note: expert-parallel groups of {experts} cross nodes of {per_node} processes")
    if config.checkpoint.save_interval is None:
        lines.append("note: without --save-interval a crash loses everything since the start")
    return lines


def submit(batch_file: str, flags: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.sbatch"
        file.write_text(batch_file + "\n", encoding="utf-8")
        try:
            return subprocess.run(["sbatch", str(file), *flags]).returncode
        except FileNotFoundError:
            print("launch.py: error: sbatch is not on this machine; --dry-run needs none", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
