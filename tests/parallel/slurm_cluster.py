"""A real Slurm of several emulated nodes on this machine: any user, no munge, no configuration outside a folder.

Node names are addresses, so that a batch script can take the first node's name for one. The nodes of ``Cluster`` are
loopback addresses: they cannot show what happens where nodes do not reach each other by 127.0.0.1. Those of
``IsolatedCluster`` can, each with a network of its own, but only root can make them.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

CONFIG = """
ClusterName=test
SlurmctldHost={host}({address})
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=60
KillWait=20
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName=DEFAULT CPUs=16 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    environment = os.environ | {"PATH": _path()}
    missing = [name for name in PROGRAMS if shutil.which(name, path=environment["PATH"]) is None]
    return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm" if missing else None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian has the daemons


class Cluster:
    """``nodes`` nodes 127.0.0.1, 127.0.0.2, ... of 16 CPUs and 8 GPUs (/dev/null); state and logs in a folder."""

    address = "127.0.0.1"
    """Of slurmctld."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.names = folder, self.addresses(nodes)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
                del self.environment[name]

    def addresses(self, nodes: int) -> list[str]:
        """Names of the nodes."""
        return [f"127.0.0.{index}" for index in range(1, nodes + 1)]

    def reached_at(self, name: str) -> str:
        """Where the slurmd of a node listens."""
        return "127.0.0.1"

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name)

    def start(self) -> None:
        for name in ("state", "log", "run", *(f"spool-{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True)
        for index in range(8):
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-7]\n")
        host, port = socket.gethostname().split(".")[0], _free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={self.reached_at(name)} Port={port + index}"
            for index, name in enumerate(self.names, 1)
        )
        config = CONFIG.format(
            host=host, address=self.address, user=getpass.getuser(), port=port, folder=self.folder, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(config)
        self.run("slurmctld")
        for name in self.names:
            self.start_node(name)
        self.wait_until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * len(self.names)
        )

    def stop(self) -> None:
        """End all jobs and daemons."""
        with contextlib.suppress(AssertionError):
            self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        pids = [int(file.read_text()) for file in sorted((self.folder / "run").glob("slurmd-*.pid"))]
        with contextlib.suppress(AssertionError):
            self.run("scontrol", "shutdown")
        deadline = time.monotonic() + 20
        while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        found = subprocess.run(
            command, env=self.environment | (environment or {}), cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert found.returncode == 0, f"{' '.join(command)}: {found.stdout}{found.stderr}"
        return found.stdout

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """sbatch: the job's number."""
        return self.run("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait_for_end(self, number: str, log: Path, timeout_s: float = 600.0) -> dict[str, str]:
        """A job, once it will not run any more. One that is put back waits for 6 s: until then slurmd refuses it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

        def is_over() -> bool:
            return self.job(number)["JobState"] in ends

        self.wait_until(is_over, timeout_s, lambda: f"{self.job(number)}\n{log.read_text() if log.exists() else ''}")
        return self.job(number)

    @staticmethod
    def wait_until(condition: object, timeout_s: float = 60.0, describe: object = str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, describe()  # type: ignore[operator]
            time.sleep(0.2)


class IsolatedCluster(Cluster):
    """Every node with a network of its own (address, loopback, host name) on a bridge. Needs root.

    ``network``: the first three bytes of all addresses.
    """

    def __init__(self, folder: Path, nodes: int, network: str = "10.213.7") -> None:
        self.network, self.address = network, f"{network}.1"
        super().__init__(folder, nodes)
        self.bridge = f"hc{os.getpid()}"

    def addresses(self, nodes: int) -> list[str]:
        return [f"{self.network}.{10 + index}" for index in range(1, nodes + 1)]

    def reached_at(self, name: str) -> str:
        return name

    def why_not(self) -> str | None:
        """Why it cannot be made here."""
        missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name, path=_path()) is None]
        if missing:
            return f"networks of their own need the programs {', '.join(missing)}"
        made = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
        return f"no networks of their own: {made.stderr.strip()}" if made.returncode else None

    def start(self) -> None:
        self._ip(f"link add {self.bridge} type bridge", f"addr add {self.address}/24 dev {self.bridge}")
        self._ip(f"link set {self.bridge} up")
        for name in self.names:
            space, cable = self._space(name), f"{self.bridge}-{name.split('.')[-1]}"
            self._ip(f"netns add {space}", f"link add {cable} type veth peer name eth0 netns {space}")
            self._ip(f"link set {cable} master {self.bridge} up", f"-n {space} addr add {name}/24 dev eth0")
            self._ip(f"-n {space} link set eth0 up", f"-n {space} link set lo up")
        super().start()

    def start_node(self, name: str) -> None:
        hosts = self.folder / f"hosts-{name}"
        host, number = socket.gethostname().split(".")[0], name.split(".")[-1]
        nodes = "".join(f"{node} node{node.split('.')[-1]}\n" for node in self.names)
        hosts.write_text(f"127.0.0.1 localhost\n{self.address} {host}\n{nodes}")
        inside = f"mount --bind {hosts} /etc/hosts && hostname node{number} && exec slurmd -N {name}"
        self.run("nsenter", f"--net=/run/netns/{self._space(name)}", "unshare", "--mount", "--uts", "sh", "-c", inside)

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            for name in self.names:
                with contextlib.suppress(AssertionError):
                    self._ip(f"netns del {self._space(name)}")
            with contextlib.suppress(AssertionError):
                self._ip(f"link del {self.bridge}")

    def _space(self, name: str) -> str:
        return f"{self.bridge}-{name.split('.')[-1]}"

    def _ip(self, *commands: str) -> None:
        for command in commands:
            self.run("ip", *command.split())


@contextlib.contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    with running(Cluster(folder, nodes)) as found:
        yield found


@contextlib.contextmanager
def running(found: Cluster) -> Iterator[Cluster]:
    try:
        found.start()
        yield found
    finally:
        found.stop()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_ports(count: int) -> int:
    """The first of several neighbouring ports that are free."""
    for first in range(20000 + os.getpid() * 7 % 10000, 32000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(contextlib.closing(socket.socket())).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")
