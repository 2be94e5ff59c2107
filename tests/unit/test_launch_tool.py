"""tools/launch.py: what it prints, what it refuses, and the launch scripts of the papers' models."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ("job.sh", "submit.sh")
SCRIPTS = sorted(path.name for path in (ROOT / "examples" / "slurm").glob("*.sh") if path.name not in SHARED)
MODEL = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 8 --micro-batch-size 2 --train-iters 9"
FLAGS = f"{MODEL} --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 50000".split()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_tool", ROOT / "tools" / "launch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dry_run_prints_the_batch_file_and_the_layout(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--nodes 2 --gpus-per-node 4 --time 2:00:00 --job-name one --sbatch=--partition=big --sbatch=--requeue"
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 8"
    argv = [*options.split(), "--dry-run", "--", *FLAGS, *layout.split(), "--save", "a folder"]
    assert tool.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/usr/bin/env bash\n")
    given = [line.removeprefix("#SBATCH ") for line in out.splitlines() if line.startswith("#SBATCH")]
    for line in ("--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--cpus-per-task=32", "--time=2:00:00"):
        assert line in given
    assert given.count("--requeue") == 1 and "--partition=big" in given and "--signal=B:USR1@300" in given
    assert len(given) == len({line.partition("=")[0] for line in given}), "no option twice"
    assert out.splitlines().index('run_job torchrun "$@"') > 10
    assert "layout: 2 nodes x 4 processes = 8 = pipeline 2 x data 2 x tensor 2" in out
    assert "a step: 8 samples of 8 tokens = 2 micro-batches of 2 on each of 2 copies" in out
    assert "--save 'a folder'" in out and "note: without --save-interval" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--", *FLAGS], "--save FOLDER must be given"),
        (["--nodes", "0", "--", *FLAGS, "--save", "x"], "--nodes must be positive, not 0"),
        (["--", *FLAGS, "--save", "x", "--hiden-size", "3"], "--hiden-size is not a flag"),
        (["--", *FLAGS, "--save", "x", "--tensor-model-parallel-size", "3"], r"size \(3\) must divide"),
        (["--nodes", "3", "--", *FLAGS, "--save", "x", "--pipeline-model-parallel-size", "5"], "pipeline"),
        (["--gpus-per-node", "-1", "--", *FLAGS, "--save", "x"], "--gpus-per-node must not be negative, not -1"),
        (["--processes-per-node", "0", "--", *FLAGS, "--save", "x"], "--processes-per-node must be positive, not 0"),
        (["--sbatch=--nodes=8", "--", *FLAGS, "--save", "x"], "--sbatch=--nodes=8: .* --nodes: use that"),
        (["--sbatch=-Aaccount", "--", *FLAGS, "--save", "x"], "--sbatch=-Aaccount: write the long form"),
        (["--job-name", "a; rm -rf b", "--", *FLAGS, "--save", "x"], "cannot stand in a #SBATCH line"),
        (["--sbatch=--comment=$(id)", "--", *FLAGS, "--save", "x"], "cannot stand in a #SBATCH line"),
        (["--", *FLAGS, *"--save x --exit-signal-handler --exit-signal SIGTERM".split()], "must hold SIGUSR1"),
    ],
)
def test_what_cannot_work_is_refused(
    argv: list[str], message: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--dry-run", *argv])
    assert stopped.value.code == 2
    found = capsys.readouterr()
    assert re.search(message, found.err) and found.out == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_launch_scripts_of_the_papers_models(
    name: str, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The script's own arguments, given to the tool here: a process each would take long."""
    recorder = tmp_path / "python"
    recorder.write_text("#!/usr/bin/env bash\nshift\nprintf '%s\\n' \"$@\"\n")
    recorder.chmod(0o755)
    script = ROOT / "examples" / "slurm" / name
    user = ["--save", "x y", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50000"]
    run = subprocess.run(
        [str(script), *user],
        env=os.environ | {"PYTHON": str(recorder), "DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    argv = run.stdout.splitlines()
    assert argv[-len(user) :] == user
    assert tool.main(argv) == 0
    out = capsys.readouterr().out
    assert f"--job-name={name.removesuffix('.sh')}" in out and "layout: " in out
    assert len(script.read_text().splitlines()) <= 6, "a few lines over one shared script"


def test_folders_in_yaml_reach_the_batch_script(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It reads flags alone: without --save it ends, and without --load it would load from --save."""
    (tmp_path / "folders.yaml").write_text("save: runs/new\nload: runs/old\n")
    file = ["--yaml-cfg", str(tmp_path / "folders.yaml")]
    assert tool.main(["--dry-run", "--", *FLAGS, *file]) == 0
    assert f"{file[1]} --save runs/new --load runs/old\n" in capsys.readouterr().out
    assert tool.main(["--dry-run", "--", *FLAGS, *file, "--save", "x", "--load=y"]) == 0
    assert f"{file[1]} --save x --load=y\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, is_given",
    [("--load x", True), ("--load=x", True), ("--no-load", True), ("--load-x y", False), ("--save x --lo", False)],
)
def test_flags_that_the_batch_script_finds(words: str, is_given: bool) -> None:
    """What it does not find it adds, and the last one of two counts."""
    script = f'. "{ROOT}/examples/slurm/job.sh"; has_flag --load {words}'
    assert (subprocess.run(["bash", "-c", script]).returncode == 0) == is_given


def run_job(folder: Path, *words: str, **programs: str) -> tuple[int, list[str], str]:
    """run_job of job.sh in ``folder``, with ``programs`` (name -> lines of bash) in the place of Slurm's.

    Its exit code, the arguments of pretrain_gpt.py behind those of the launcher, and what it printed.
    """
    called = f'printf \'%s\\n\' "$PWD" "$@" >{folder}/called'
    for name, body in ({"srun": called, "scontrol": "echo node1"} | programs).items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    found = subprocess.run(
        ["bash", "-c", f'. "{ROOT}/examples/slurm/job.sh"; run_job srun "$@"', "job", *words],
        env=os.environ | job | {"MEGATRON_HC_ROOT": str(ROOT), "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    words_seen = (folder / "called").read_text().splitlines() if (folder / "called").exists() else []
    return found.returncode, words_seen, found.stdout + found.stderr


@pytest.mark.parametrize(
    "yaml, added",
    [
        ("lr: 1e-3\n# load: x\n", ["--load", "run", "--verify-checkpoint", "--exit-signal-handler"]),
        ("checkpoint:\n  load: runs/old\n  'verify-checkpoint' : false\n", ["--exit-signal-handler"]),
        ("{load: runs/old, no_verify_checkpoint: true, exit_signal_handler: true}", []),
    ],
)
def test_the_batch_script_undoes_nothing_of_a_yaml_file(yaml: str, added: list[str], tmp_path: Path) -> None:
    """A flag that is added goes before a file: a run that should begin at the file's --load would begin anew."""
    (tmp_path / "run.yaml").write_text(yaml)
    for file in (["--yaml-cfg", "run.yaml"], ["--yaml-cfg=run.yaml"]):
        code, called, out = run_job(tmp_path, *file, "--save", "run")
        assert code == 0, out
        assert called[called.index("run") + 1 :] == added


def test_a_job_runs_where_it_was_submitted(tmp_path: Path) -> None:
    """The flags were checked there: a relative folder is another one in the checkout."""
    code, called, out = run_job(tmp_path, "--save", "run")
    assert code == 0, out
    assert called[0] == str(tmp_path) and str(ROOT / "pretrain_gpt.py") in called
    assert [file.name for file in tmp_path.glob("run*")] == ["run"] and not (ROOT / "run").exists()


def test_a_signal_that_the_run_would_die_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("exit-signal: [SIGTERM]\n")
    (tmp_path / "two.yaml").write_text("exit-signal: [SIGTERM, SIGUSR1]\n")
    for words in ("--exit-signal SIGTERM", "--exit-signal=SIGUSR2 --lr 1", "--yaml-cfg one.yaml"):
        code, called, out = run_job(tmp_path, "--save", "run", *words.split())
        assert (code, called) == (2, []) and "--exit-signal must hold SIGUSR1" in out, words
    for words in ("--exit-signal SIGTERM SIGUSR1", "--exit-signal=SIGUSR1", "--yaml-cfg two.yaml"):
        assert run_job(tmp_path, "--save", "run", *words.split())[0] == 0, words


@pytest.mark.parametrize("is_told", [True, False])
def test_a_job_told_to_stop_while_it_loads_goes_back_into_the_queue(is_told: bool, tmp_path: Path) -> None:
    """Python ends by a signal that it has no handler for yet: without the signal, such an end is the job's."""
    srun = "kill -USR1 $PPID; exec /bin/sleep 60" if is_told else "kill -USR1 $$"
    scontrol = "echo JobState=RUNNING; [ $1 != requeue ] || touch requeued"
    code, _, out = run_job(tmp_path, "--save", "run", srun=srun, scontrol=scontrol, sleep="exit 0")
    assert code == (85 if is_told else 138), out
    assert (tmp_path / "requeued").exists() == is_told == ("back into the queue" in out)


def test_what_the_batch_script_needs_is_written_into_it(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """With --sbatch=--export=NAME no variable of ours reaches it: it would start one process on each node."""
    options = "--dry-run --gpus-per-node 0 --processes-per-node 2 --sbatch=--export=KEY=1 -- --save x"
    assert tool.main([*options.split(), *FLAGS]) == 0
    out = capsys.readouterr().out.splitlines()
    last = max(index for index, line in enumerate(out) if line.startswith("#SBATCH"))
    export = out.index(f"export MEGATRON_HC_ROOT={ROOT} PROCESSES_PER_NODE=2")
    assert last < export < out.index('run_job torchrun "$@"')


def test_batch_scripts_are_valid_bash() -> None:
    for file in sorted((ROOT / "examples" / "slurm").iterdir()):
        assert subprocess.run(["bash", "-n", str(file)], capture_output=True).stderr == b"", file
