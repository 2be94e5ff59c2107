"""Which residual path trains best here? Several methods, several seeds, the same data, order and budget, one report.

    python tools/compare_residuals.py --output runs/compare --input text.txt --seeds 3 --lrs 1e-3 \\
        --methods plain hyper "static=hyper --static-residual" "value=plain --value-residual learnable" \\
        -- --num-layers 6 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --micro-batch-size 8 \\
           --train-iters 1000 --eval-interval 200 --eval-iters 20

A method is NAME, or NAME=CONNECTION AND FLAGS; the first one is what the others are compared with. What follows `--`
are flags of pretrain_gpt.py that all runs share; --input FILE makes a byte dataset of a text (nine tenths for training)
and may be left out where those flags name the data. With several --lrs every method is shown at its best one.

Every run is a process of its own below OUTPUT/runs and resumes where it was stopped: give the same command again. On a
cluster, `--print-tasks` makes the data and lists the runs, and `--task INDEX` (in a Slurm array: --task
"$SLURM_ARRAY_TASK_ID") does one; afterwards `--report` writes runs.csv, summary.csv, compare.html and, where there is
matplotlib, compare.png from what is done.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import comparison_report

from megatron_hc.cli import exit_on_user_error, parse
from megatron_hc.outputs import replace_file

PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain_gpt.py"
OWN = ("--seed", "--lr", "--min-lr", "--save", "--load", "--metrics-jsonl", "--residual-connection")
"""Flags that the comparison sets itself."""


@dataclass(frozen=True)
class Task:
    """One run."""

    name: str
    lr: float
    seed: int
    flags: tuple[str, ...]
    """All of pretrain_gpt.py, but for the folders."""
    folder: Path

    def command(self, launcher: Sequence[str]) -> list[str]:
        save_interval = (
            [] if "--save-interval" in flags_in(self.flags) else ["--save-interval", str(max(1, self.iterations // 4))]
        )
        folders = ["--save", str(self.folder), "--load", str(self.folder)]
        metrics = ["--metrics-jsonl", str(self.folder / "metrics.jsonl")]
        return [*launcher, str(PRETRAIN), *self.flags, *folders, *save_interval, *metrics]

    @property
    def iterations(self) -> int:
        return parse([*self.flags]).config.training.train_iters or 0

    @property
    def outcome(self) -> str | None:
        """done, diverged, or None: not finished."""
        file = self.folder / "outcome.txt"
        return file.read_text(encoding="utf-8").strip() if file.exists() else None


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own arguments, and the shared flags behind ``--``."""
    own, shared = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--methods", nargs="+", required=True, metavar="NAME[=FLAGS]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 1 .. N (default: 3)")
    parser.add_argument("--lrs", type=float, nargs="+", required=True, help="largest learning rates; one: not swept")
    parser.add_argument("--min-lr-ratio", type=float, default=0.1, help="last over largest rate (default: 0.1)")
    parser.add_argument("--input", type=Path, help="a text whose bytes are the data")
    parser.add_argument("--launcher", default=sys.executable, help='command before pretrain_gpt.py, as "torchrun ..."')
    parser.add_argument("--title", default="Residual paths compared")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print-tasks", action="store_true", help="list the runs and end")
    what.add_argument("--task", type=int, metavar="INDEX", help="do this one run of the list and end")
    what.add_argument("--report", action="store_true", help="only write the report of what is done")
    return parser.parse_args(own), shared


# What to run


def read_method(text: str) -> tuple[str, list[str]]:
    """NAME, or NAME=CONNECTION AND FLAGS -> name and flags."""
    name, equals, rest = text.partition("=")
    try:
        words = shlex.split(rest if equals else text)
    except ValueError as error:
        raise ValueError(f"--methods {text!r}: {error}") from error
    if not words or not name.strip():
        raise ValueError(f"--methods {text!r} must be NAME or NAME=CONNECTION AND FLAGS")
    connection = [] if words[0].startswith("--") else ["--residual-connection", words.pop(0)]
    return name.strip(), [*(connection or ["--residual-connection", "plain"]), *words]


def tasks_of(options: argparse.Namespace, shared: Sequence[str]) -> list[Task]:
    """Every run, the seeds of all methods in turn, so that a comparison that is stopped early is a fair one."""
    methods = [read_method(text) for text in options.methods]
    names = [name for name, _ in methods]
    if len({*names}) < len(names):
        raise ValueError(f"--methods has a name twice ({', '.join(names)}): write NAME=FLAGS with names of your own")
    given = own_flags(shared)
    if given:
        raise ValueError(f"{', '.join(given)} behind -- {'is' if len(given) == 1 else 'are'} set by the comparison")
    for name, flags in methods:
        given = [flag for flag in own_flags(flags[2:]) if flag != "--residual-connection"]
        if given:
            raise ValueError(f"{', '.join(given)} of method {name} cannot be its own: the comparison sets it for all")
    if options.seeds < 1 or not 0 <= options.min_lr_ratio <= 1 or len({*options.lrs}) < len(options.lrs):
        raise ValueError("--seeds must be at least 1, --min-lr-ratio in [0, 1], and no rate of --lrs given twice")
    found = []
    for seed in range(1, options.seeds + 1):
        for lr in options.lrs:
            for name, flags in methods:
                rates = ["--lr", repr(lr), "--min-lr", repr(lr * options.min_lr_ratio)]
                log = [] if "--log-interval" in flags_in(shared) else ["--log-interval", "1"]
                words = (*shared, *data_flags(options), *log, *flags, *rates, "--seed", str(seed))
                safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
                folder = options.output / "runs" / f"{safe}-lr{lr:g}-seed{seed}"
                found.append(Task(name, lr, seed, words, folder))
    folders = [task.folder.name for task in found]
    twice = next((name for name in folders if folders.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two of the runs would share the folder {twice}: give methods names of other letters")
    return found


def own_flags(words: Sequence[str]) -> list[str]:
    """Those of ``OWN``."""
    return [flag for flag in OWN if flag in flags_in(words)]


def flags_in(words: Sequence[str]) -> set[str]:
    """The flags among the words, also where a value is joined to them by =."""
    return {word.partition("=")[0] for word in words}


def data_flags(options: argparse.Namespace) -> list[str]:
    if options.input is None:
        return []
    folder = options.output / "data"
    parts = ["--train-data-path", str(folder / "train"), "--valid-data-path", str(folder / "valid")]
    return [*parts, "--tokenizer-type", "ByteTokenizer", "--data-cache-path", str(folder / "cache")]


def check(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Refuse what cannot work, and a folder of another comparison, before anything is trained."""
    for task in tasks:
        try:
            config = parse([*task.flags]).config
            if options.launcher == sys.executable:  # with another one the number of processes is not known here
                config.validate()
        except ValueError as error:
            raise ValueError(f"method {task.name}: {error}") from error
        training = config.training
        if not training.train_iters or not training.eval_interval or not training.eval_iters:
            raise ValueError("the shared flags need --train-iters, --eval-interval and --eval-iters above 0")
    record = options.output / "comparison.json"
    wanted = {task.folder.name: list(task.flags) for task in tasks}
    if record.exists():
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{record} cannot be read: {error}: name another folder as --output") from error
        changed = [name for name in known.keys() & wanted.keys() if known[name] != wanted[name]]
        if changed:
            raise ValueError(
                f"{options.output} holds runs with other flags ({sorted(changed)[0]}): name another folder"
            )
        wanted = {**known, **wanted}
        if wanted == known:
            return
    replace_file(record, lambda beside: beside.write_text(json.dumps(wanted, indent=1), encoding="utf-8"))


def launcher_of(options: argparse.Namespace) -> list[str]:
    """The words of --launcher; the default is one program, whatever is in its path."""
    try:
        words = [options.launcher] if options.launcher == sys.executable else shlex.split(options.launcher)
    except ValueError as error:
        raise ValueError(f"--launcher {options.launcher}: {error}") from error
    if not words:
        raise ValueError("--launcher is empty: leave it out, or name the command before pretrain_gpt.py")
    return words


def write_data(options: argparse.Namespace) -> None:
    """The text as two byte datasets, once."""
    if options.input is None:
        return
    try:
        text = options.input.read_bytes()
    except OSError as error:
        raise ValueError(f"--input {options.input} cannot be read: {error.strerror}") from error
    if len(text) < 1000:
        raise ValueError(f"--input {options.input} has {len(text)} bytes, too few to learn from")
    digest, record = hashlib.sha256(text).hexdigest(), options.output / "data" / "text.sha256"
    if (options.output / "data" / "valid.idx").exists():
        if record.exists() and record.read_text(encoding="utf-8") != digest:
            raise ValueError(
                f"{options.output} has data of another text than --input {options.input}: name another folder"
            )
        return
    import numpy as np

    from megatron_hc.data import IndexedDatasetWriter

    cut = len(text) * 9 // 10
    replace_file(record, lambda beside: beside.write_text(digest, encoding="utf-8"))
    for name, part in (("train", text[:cut]), ("valid", text[cut:])):
        with IndexedDatasetWriter(str(options.output / "data" / name), "uint16") as writer:
            writer.add_document(np.frombuffer(part, dtype=np.uint8).astype(np.uint16))


# Running


def run(task: Task, launcher: Sequence[str]) -> None:
    """Train until done; what it prints goes to log.txt in its folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / "log.txt").open("a", encoding="utf-8") as log:
        try:
            code = subprocess.run(task.command(launcher), stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        except OSError as error:
            raise ValueError(f"--launcher {shlex.join(launcher)} cannot be started: {error.strerror}") from error
    text = (task.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-4000:]
    if code and "are not both finite" not in text:
        last = text.strip().splitlines()[-1] if text.strip() else "no output"
        raise ValueError(f"the run in {task.folder} ended with exit code {code}: {last}")
    outcome = "diverged" if code else "done"
    replace_file(task.folder / "outcome.txt", lambda beside: beside.write_text(outcome, encoding="utf-8"))


def num_parameters(task: Task) -> int:
    """Of the run's model."""
    from megatron_hc.data import tokenizer_of
    from megatron_hc.mesh import Mesh
    from megatron_hc.parallel.plan import build_model

    config = parse([*task.flags]).config
    model = build_model(config, tokenizer_of(config.data).vocab_size, Mesh())
    return sum(parameter.numel() for parameter in model.parameters())


def report(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Write everything that can be said of the runs that are finished."""
    done = [task for task in tasks if task.outcome is not None]
    if not any(task.name == tasks[0].name for task in done):
        raise ValueError(f"no run of {tasks[0].name}, with which the others are compared, is finished yet")
    results = [
        comparison_report.read_result(task.folder, task.name, task.lr, task.seed, task.outcome == "diverged")
        for task in done
    ]
    parameters = {task.name: num_parameters(task) for task in {task.name: task for task in done}.values()}
    summaries = comparison_report.summarise(results, parameters)
    about = sentences(results, tasks, options)
    comparison_report.write_csv(results, summaries, options.output)
    content = comparison_report.page(results, summaries, about, options.title)
    replace_file(options.output / "compare.html", lambda beside: beside.write_text(content, encoding="utf-8"))
    print(comparison_report.markdown(summaries))
    print(comparison_report.verdict(summaries), *about)
    has_picture = importlib.util.find_spec("matplotlib") is not None
    if has_picture:
        comparison_report.draw(results, summaries, options.title, options.output / "compare.png")
    print(f"wrote compare.html, {'compare.png, ' if has_picture else ''}runs.csv and summary.csv in {options.output}")


def sentences(
    results: Sequence[comparison_report.Result], tasks: Sequence[Task], options: argparse.Namespace
) -> list[str]:
    """What was run, for the page."""
    # As the runs counted them: how many processes share a step is the launcher's affair.
    tokens = max((run.curve[-1][0] for run in results if run.curve), default=0)
    rates = ", ".join(f"{lr:g}" for lr in options.lrs)
    rate = f"The learning rate was swept over {rates}, each method is at its best." if len(options.lrs) > 1 else (
        f"The learning rate was fixed at {rates} for all, not tuned for any method."
    )  # fmt: skip
    model, missing = parse([*tasks[0].flags]).config.model, len(tasks) - len(results)
    return [
        f"{options.seeds} seeds, {tokens:,.0f} tokens each, the same in the same order for every method of a seed;",
        f"{model.num_layers} layers, {model.hidden_size} wide, {model.seq_length} tokens a sample.",
        rate + (f" {missing} of {len(tasks)} runs are not finished." if missing else ""),
    ]


def main(argv: list[str]) -> int:
    options, shared = parse_arguments(argv)
    with exit_on_user_error("compare_residuals.py"):
        tasks = tasks_of(options, shared)
        if options.task is not None and not 0 <= options.task < len(tasks):
            raise ValueError(f"--task ({options.task}) must be in 0 .. {len(tasks) - 1}")
        launcher = launcher_of(options)
        check(tasks, options)
        write_data(options)
        if options.print_tasks:
            for index, task in enumerate(tasks):
                print(f"{index}  {task.name}  lr {task.lr:g}  seed {task.seed}  {task.outcome or 'to do'}")
            print(f'as a Slurm array: --array=0-{len(tasks) - 1}, and --task "$SLURM_ARRAY_TASK_ID" in its command')
            return 0
        for task in [] if options.report else tasks if options.task is None else [tasks[options.task]]:
            if task.outcome is None:
                print(f"{task.name}, lr {task.lr:g}, seed {task.seed}", flush=True)
                run(task, launcher)
        if options.task is None:
            report(tasks, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
