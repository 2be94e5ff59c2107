"""The batch scripts of examples/slurm under a real Slurm of three emulated nodes: stopped, moved and resumed, runs give
the losses of a run that nothing disturbs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT, TINY, Processes
from slurm_cluster import Cluster, IsolatedCluster, cluster, running, why_not

SCRIPTS = ROOT / "examples" / "slurm"
ITERATIONS = 150
LAYOUTS = {
    "2 nodes, srun": ("pretrain_srun.sbatch", 2, 1, "--tensor-model-parallel-size 2"),
    "2 nodes, torchrun": ("pretrain.sbatch", 2, 2, "--tensor-model-parallel-size 2"),
    "2 nodes, torchrun, tp x dp x pp": (
        *("pretrain.sbatch", 2, 4),
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
    ),
    "3 nodes, srun, tp x dp x pp": (
        *("pretrain_srun.sbatch", 3, 4),
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3 --num-layers 3",
    ),
}
"""Name -> batch script, nodes, processes of a node, flags."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as found:
        yield found


class Job:
    """A batch script of the examples, submitted for a run whose every iteration is logged."""

    def __init__(self, slurm: Cluster, layout: str, folder: Path, *options: str, python: str = sys.executable) -> None:
        script, nodes, per_node, flags = LAYOUTS[layout]
        self.slurm, self.folder, self.log = slurm, folder, folder / "job.log"
        self.processes, self.flags = nodes * per_node, f"{TINY} {flags} --train-iters {ITERATIONS}"
        tasks = 1 if script == "pretrain.sbatch" else per_node
        argv = f"{self.flags} --save {folder}/run --save-interval 1000 --metrics-jsonl {folder}/metrics.jsonl".split()
        self.number = slurm.submit(
            *(f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--output={self.log}", "--cpus-per-task=1"),
            *("--gpus-per-node=0", *options, str(SCRIPTS / script), *argv),
            environment={"MEGATRON_HC_ROOT": str(ROOT), "PROCESSES_PER_NODE": str(per_node), "PYTHON": python},
            cwd=folder,
        )

    def losses(self) -> dict[int, float]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return {record["iteration"]: record["lm_loss"] for record in found}

    def wait_for_iteration(self, iteration: int) -> None:
        self.slurm.wait_until(lambda: max(self.losses(), default=0) >= iteration, 300, self.output)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> dict[str, str]:
        return self.slurm.wait_for_end(self.number, self.log)

    def check_against_undisturbed(self) -> None:
        folder = self.folder / "undisturbed"
        argv = f"{self.flags} --metrics-jsonl {folder}/metrics.jsonl"
        with Processes(self.processes, argv, folder) as run:
            assert run.wait(300) == [0] * self.processes, run.output()
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert self.losses() == {record["iteration"]: record["lm_loss"] for record in records}
        assert len(records) == ITERATIONS

    def check_resumed(self, restarts: int = 1) -> None:
        """It ended once and for all, after going on where it was saved."""
        found = self.wait()
        assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("COMPLETED", str(restarts), "0:0"), (
            found,
            self.output(),
        )
        assert "finished" in self.output().splitlines()[-1]
        self.check_against_undisturbed()


def test_told_to_stop_a_job_is_saved_requeued_and_resumed(slurm: Cluster, tmp_path: Path) -> None:
    check_stop(slurm, tmp_path, "2 nodes, srun")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "2 nodes, srun"])
def test_told_to_stop_at_other_layouts(layout: str, slurm: Cluster, tmp_path: Path) -> None:
    check_stop(slurm, tmp_path, layout)


def check_stop(slurm: Cluster, folder: Path, layout: str) -> None:
    job = Job(slurm, layout, folder)
    job.wait_for_iteration(20)
    slurm.run("scancel", "--signal=USR1", "--batch", job.number)
    job.check_resumed()
    output = job.output()
    stopped = re.search(r"SIGUSR1: saving and exiting the program at iteration (\d+)", output)
    assert stopped and 20 <= int(stopped[1]) < ITERATIONS, output
    assert f"loaded {folder / 'run'}/iter_{int(stopped[1]):07d}" in output
    assert "saved; back into the queue" in output and f"job {job.number}, start 2: starting from iteration" in output
    launcher = "Slurm" if "srun" in LAYOUTS[layout][0] else "torchrun"
    network = slurm.names[0].rsplit(".", 1)[0]
    assert output.count(f"{job.processes} processes by {launcher}, meeting at {network}.") == 2
    assert sorted(path.name for path in (folder / "run").glob("*.txt")) == ["latest_checkpointed_iteration.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2 nodes, srun", "2 nodes, torchrun"])
def test_preempted_by_a_higher_partition(layout: str, slurm: Cluster, tmp_path: Path) -> None:
    job = Job(slurm, layout, tmp_path)
    job.wait_for_iteration(20)
    other = slurm.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    job.check_resumed()
    assert slurm.job(other)["JobState"] == "COMPLETED"
    assert "saving and exiting the program at iteration" in job.output() and "loaded " in job.output()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2 nodes, srun", "2 nodes, torchrun"])
def test_a_node_goes_down(layout: str, slurm: Cluster, tmp_path: Path) -> None:
    job = Job(slurm, layout, tmp_path, "--export=ALL")
    job.wait_for_iteration(20)
    node = slurm.job(job.number)["NodeList"]
    lost = slurm.run("scontrol", "show", "hostnames", node).split()[1]
    slurm.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        job.check_resumed()
    finally:
        with contextlib.suppress(AssertionError):  # it may have come back by itself
            slurm.run("scontrol", "update", f"nodename={lost}", "state=resume")
        slurm.wait_until(lambda: slurm.run("sinfo", "-h", "-n", lost, "-p", "low", "-o", "%T").strip() == "idle")
    assert "back into the queue" not in job.output(), "Slurm itself has put it there"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2 nodes, srun", "2 nodes, torchrun"])
def test_nodes_that_do_not_share_a_loopback(
    layout: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """127.0.0.1 is another machine on each node, as everywhere but in this file's other tests."""
    # A short path: slurmd starts no job where that of its socket, which names the node twice, is above 108 characters.
    found = IsolatedCluster(tmp_path_factory.mktemp("nodes"), nodes=2)
    reason = why_not() or found.why_not()
    if reason is not None:
        pytest.skip(reason)
    with running(found):
        check_stop(found, tmp_path, layout)


# ---- the scripts alone, with something quicker than training ----

STANDS_IN = """#!/usr/bin/env bash
# In the place of python: "trains" until it is told to stop.
{body}
"""


def stand_in(folder: Path, body: str) -> str:
    file = folder / "python"
    file.write_text(STANDS_IN.format(body=body))
    file.chmod(0o755)
    return str(file)


def test_two_restarts_without_progress_end_the_job(slurm: Cluster, tmp_path: Path) -> None:
    job = Job(slurm, "2 nodes, srun", tmp_path, python=stand_in(tmp_path, "exit 85"))
    found = job.wait()
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "2", "1:0"), job.output()
    assert job.output().count("back into the queue") == 2
    reason = rf"stopping: two restarts in a row found no checkpoint newer than iteration 0 in {tmp_path}/run"
    assert re.search(reason, job.output())


@pytest.mark.slow
def test_progress_keeps_a_job_going_and_its_own_failure_ends_it(slurm: Cluster, tmp_path: Path) -> None:
    count = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    body = f"""
    [ "$SLURM_PROCID" = 0 ] || exit 0
    done=$(cat {count} 2>/dev/null || echo 0)
    echo $((done + 1)) > {count}
    [ "$done" -lt 3 ] && exit 85
    exit 7
    """
    job = Job(slurm, "2 nodes, srun", tmp_path, python=stand_in(tmp_path, body))
    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "3"), job.output()
    assert job.output().count("back into the queue") == 3


def test_a_cancelled_job_stays_out_of_the_queue(slurm: Cluster, tmp_path: Path) -> None:
    body = f"trap 'exit 85' TERM USR1; touch {tmp_path}/up-$SLURM_PROCID; sleep 60 & wait"
    job = Job(slurm, "2 nodes, srun", tmp_path, python=stand_in(tmp_path, body))
    slurm.wait_until(lambda: (tmp_path / "up-0").exists() and (tmp_path / "up-1").exists(), 60, job.output)
    slurm.run("scancel", job.number)
    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), job.output()
    assert "cancelled, it stays out of the queue" in job.output() and "back into the queue" not in job.output()


def test_the_sweep_gives_each_task_its_method_and_seed(slurm: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, f'echo "$*" > {tmp_path}/$SLURM_ARRAY_TASK_ID.txt')
    environment = {"MEGATRON_HC_ROOT": str(ROOT), "PYTHON": python, "METHODS": "plain mhc", "SEEDS": "5 6"}
    slurm.run(
        *("sbatch", "--wait", "--array=0-3", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(f"--output={tmp_path}/job-%a.log", str(SCRIPTS / "sweep_residuals.sbatch"), "--lr", "1e-3"),
        environment=environment | {"RUNS": str(tmp_path / "a folder")},
        cwd=tmp_path,
    )
    for task, (method, seed) in enumerate([("plain", 5), ("plain", 6), ("mhc", 5), ("mhc", 6)]):
        folder = f"{tmp_path}/a folder/{method}-{seed}"
        said = (tmp_path / f"{task}.txt").read_text()
        assert said.startswith(
            f"{ROOT}/pretrain_gpt.py --lr 1e-3 --residual-connection {method} --seed {seed} --save {folder} "
        )
        assert f"--load {folder}" in said and os.path.isdir(folder)
