"""The bundled reference over MPI on two hosts, and what the judge tells when one of them is lost.

`make hosts-check` runs this. It is not part of `make test`: it makes network namespaces, which takes iproute2 and root
(CAP_SYS_ADMIN and CAP_NET_ADMIN, which `unshare --map-root-user --net` gives to anybody where that is allowed). Nothing
of this machine's own network is touched, and all that it makes ends with it. Each scenario asserts what it prints. Exit
codes: 0 all holds, 1 something does not, 5 it cannot run here.

Two hosts are namespaces with a link between them (two_hosts.py); Open MPI starts its daemon on the other one over TCP,
as it would over ssh (remote_shell.py). They share a file system, and so the folder of the exchange.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from two_hosts import LINK, REMOTE_SHELL, Host, TwoHosts, what_is_missing

MACHINE_LACKS = 5
START_LIMIT = 60
# Eight cases of one size, so that a case takes a tenth of a second.
FEW = ["--filter", "attention/p4-b2-s84-"]
# Its q, k, v, out and their gradients are 2 MiB each. Each host holds half of a tensor and keeps half of that.
LARGE = "attention/p4-b1-s1024-hq8-hkv8-d64-causal-f32-gaussian-seed0"
LARGE_BYTES_EACH_WAY = 8 * (2 << 20) // 4
# A verdict as it is told while a run goes on.
VERDICT = re.compile(r"^\S+ \[ *\d+/\d+\] +(exact|pass|refused|fail|crash|hang|unclear) (\S+)(?: (.*))?$")


class Told:
    """One verdict, and when it came: seconds from the start of the run."""

    def __init__(self, seconds: float, verdict: str, case: str, why: str) -> None:
        self.seconds, self.verdict, self.case, self.why = seconds, verdict, case.rstrip(":"), why


class Run:
    """A run of the judge on host A."""

    def __init__(self, check: "Check", arguments: list[str], time_limit: int) -> None:
        words = [str(check.programs / "ulysses-conformance"), "run", "--implementation", "reference-mpi",
                 "--exchange", str(check.exchange), "--time-limit", str(time_limit),
                 "--start-limit", str(START_LIMIT), *arguments]
        print("$", " ".join(["ulysses-conformance", *words[1:]]), flush=True)
        self.check, self.time_limit = check, time_limit
        self.told: list[Told] = []
        self.rank_hosts: dict[int, str] = {}
        self.begun = time.monotonic()
        self.process = subprocess.Popen(check.a.words(*words), env=check.environment, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # A run that does not end by itself is ended, and fails.
        self._last_resort = threading.Timer(1800, self.process.kill)
        self._last_resort.daemon = True
        self._last_resort.start()

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def watch(self, after: dict[int, Callable[["Run"], None]] | None = None) -> "Run":
        """Reads the verdicts to the end. After as many as a key says, its function is called."""
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(self.process.stdout.read()))
        reader.start()
        for line in self.process.stderr:
            if not (match := VERDICT.match(line.rstrip())):
                print("  " + line.rstrip())
                continue
            verdict, case, why = match.groups()
            self.told.append(Told(self.seconds(), verdict, case, why or ""))
            self._read_hellos()
            if act := (after or {}).get(len(self.told)):
                act(self)
        self.code = self.process.wait()
        self._last_resort.cancel()
        reader.join()
        self.output = output[0]
        self.took = self.seconds()
        return self

    def _read_hellos(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # of a session that has just ended
            for hello in self.check.exchange.glob("*/hello/rank-*.json"):
                said = json.loads(hello.read_text())
                self.rank_hosts[said["rank"]] = said["host"]

    def show(self) -> None:
        for told in self.told:
            print(f"  {told.seconds:6.2f} s  {told.verdict:>7} {told.case}{': ' if told.why else ''}{told.why}")

    def failures(self) -> str:
        """What the judge prints of the failures, up to the tables."""
        return self.output.partition("\n| implementation")[0].strip()


class DoesNotHold(Exception):
    pass


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise DoesNotHold(what)
    print(f"  ok: {what}", flush=True)


class Check:
    def __init__(self, programs: Path, hosts: TwoHosts, scratch: Path, exchange: Path) -> None:
        self.programs, self.hosts, self.exchange = programs, hosts, exchange
        self.a, self.b = hosts.hosts
        self.environment = dict(os.environ) | open_mpi(scratch, hosts)

    def run(self, *arguments: str, time_limit: int = 30) -> Run:
        return Run(self, list(arguments), time_limit)

    def expect_nothing_left(self, seconds: float) -> None:
        """No process on either host and no folder of the exchange, at the latest after so long."""
        begun = time.monotonic()
        while (left := self.a.processes() | self.b.processes()) and time.monotonic() < begun + seconds:
            time.sleep(0.1)
        expect(not left, f"no process is left on either host, {time.monotonic() - begun:.1f} s after the end {left or ''}")
        left = [entry.name for entry in self.exchange.iterdir()]
        expect(not left, f"no folder is left {left or ''}")

    def data_cross_the_link(self) -> None:
        before = [host.bytes_received() for host in (self.a, self.b)]
        run = self.run("--case", LARGE).watch()
        run.show()
        received = [host.bytes_received() - bytes for host, bytes in zip((self.a, self.b), before)]
        expect(run.code == 0, "a case with 2 MiB in each tensor is right")
        expect(run.rank_hosts == {0: self.a.name, 1: self.b.name, 2: self.a.name, 3: self.b.name},
               f"ranks 0, 2 ran on {self.a.name} and ranks 1, 3 on {self.b.name}")
        for host, bytes in zip((self.a, self.b), received):
            expect(LARGE_BYTES_EACH_WAY < bytes < 1.25 * LARGE_BYTES_EACH_WAY,
                   f"{host.name} received {bytes} bytes, of which the tensors are {LARGE_BYTES_EACH_WAY}")
        self.expect_nothing_left(5)

    def catalogue(self) -> None:
        before = [host.bytes_received() for host in (self.a, self.b)]
        run = self.run("--world", "4").watch()
        received = [host.bytes_received() - bytes for host, bytes in zip((self.a, self.b), before)]
        print(run.output.strip())
        expect(run.code == 0 and len(run.told) > 200, f"all {len(run.told)} cases of 4 ranks are right, in {run.took:.0f} s")
        expect(set(run.rank_hosts.values()) == {self.a.name, self.b.name}, "ranks ran on both hosts")
        print(f"  {self.a.name} received {received[0]} bytes over the link, {self.b.name} {received[1]}")
        self.expect_nothing_left(5)

    def cut_off_for_good(self) -> None:
        """A time limit shorter than what Open MPI needs to notice: the judge says who waits where."""
        run = self.run(*FEW, time_limit=5).watch({3: lambda _: self.hosts.pull_the_cable()})
        try:
            run.show()
            print(run.failures())
            hung, *others = run.told[3:]
            expect(run.code == 1, f"the run ends with exit code 1, after {run.took:.1f} s")
            expect(hung.verdict == "hang" and hung.why.startswith("no answer within 5 s: rank")
                   and " wait in " in hung.why, "the case that was asked hangs, and is told with who waits where")
            expect(hung.why.endswith("; ranks 0, 2 are on ulysses-a, ranks 1, 3 on ulysses-b"), "and on which host")
            expect(all(told.verdict in ("crash", "hang") and " hello " in told.why for told in others),
                   "each of the others says that no ranks could be started")
            self.expect_within_limits(run)
            self.expect_nothing_left(30)
        finally:
            self.hosts.plug_it_in()

    def cut_off_and_back(self) -> None:
        """A longer time limit: Open MPI notices, and ends the ranks. Then the link comes back."""
        run = self.run(*FEW, time_limit=30).watch({
            3: lambda _: self.hosts.pull_the_cable(),
            5: lambda _: self.hosts.plug_it_in(),
        })
        run.show()
        print(run.failures())
        verdicts = [told.verdict for told in run.told]
        expect(run.code == 1, f"the run ends with exit code 1, after {run.took:.1f} s")
        expect(verdicts[3] == "crash" and "rank 0 ended in " in run.told[3].why, "the case that was asked crashes")
        expect("ORTE has lost communication with a remote daemon" in run.failures()
               and "on node ulysses-b" in run.failures(), "and mpirun's words name the host that was lost")
        expect(" hello " in run.told[4].why, "the next case says that no ranks could be started")
        expect(set(verdicts[6:]) <= {"exact", "pass", "refused"}, "with the link back cases are right again")
        self.expect_within_limits(run)
        self.expect_nothing_left(30)

    def daemon_killed(self) -> None:
        """What ranks on the other host are given is looked at first: a variable of a user's, too."""
        given = []

        def kill(_: Run) -> None:
            for pid, line in self.b.processes().items():
                if "/reference-adapter " in line:
                    given.append(Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0"))
                if line.startswith("orted "):
                    os.kill(pid, 9)

        self.environment |= {"OMPI_MCA_mca_base_env_list": "HOSTS_CHECK", "HOSTS_CHECK": "a user's"}
        run = self.run(*FEW, time_limit=30).watch({3: kill})
        run.show()
        print(run.failures())
        lost = [told for told in run.told if told.verdict == "crash"]
        expect(len(given) == 2 and all({"HOSTS_CHECK=a user's", "OMP_NUM_THREADS=1"} < set(one) for one in given),
               "ranks on ulysses-b have the variables of mca_base_env_list")
        expect(run.code == 1 and len(lost) == 1, "one case crashes, and the run ends with exit code 1")
        expect("; ranks 0, 2 are on ulysses-a, ranks 1, 3 on ulysses-b" in lost[0].why, "it is told which ranks were where")
        expect("ORTE has lost communication with a remote daemon" in run.failures(), "mpirun's words are told")
        expect(all(told.verdict in ("exact", "pass", "refused") for told in run.told if told is not lost[0]),
               "all other cases are right")
        self.expect_within_limits(run)
        self.expect_nothing_left(30)

    def expect_within_limits(self, run: Run) -> None:
        """A case is waited for no longer than it and a start may take, and what ends ranks."""
        ends = [told.seconds for told in run.told] + [run.took]
        longest = max(later - earlier for earlier, later in zip([0.0, *ends], ends))
        limit = max(run.time_limit, START_LIMIT) + 5
        expect(longest < limit, f"the longest that nothing was told is {longest:.1f} s")


def open_mpi(scratch: Path, hosts: TwoHosts) -> dict[str, str]:
    """What makes any mpirun spread its ranks over both hosts. Each variable is a parameter of Open MPI's."""
    hostfile, agent = scratch / "hostfile", scratch / "agent"
    hostfile.write_text("".join(f"{host.name} slots=2\n" for host in hosts.hosts))
    agent.write_text(f'#!/bin/sh\nexec {sys.executable} {REMOTE_SHELL} ask "$@"\n')
    agent.chmod(0o755)
    return {
        "OMPI_MCA_orte_default_hostfile": str(hostfile),
        "OMPI_MCA_plm_rsh_agent": str(agent),
        "OMPI_MCA_rmaps_base_mapping_policy": "node",  # consecutive ranks on different hosts
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",  # two ranks of one host talk over TCP, too
        "OMPI_MCA_btl_tcp_if_include": LINK,
        "OMPI_MCA_oob_tcp_if_include": LINK,
    }


def namespace_is_gone(host: Host, own: str) -> bool:
    links = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            links.append(os.readlink(folder / "ns/net"))
        except OSError:
            pass  # it has ended
    return own not in links


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="the folder of the two programs")
    parser.add_argument("scenario", nargs="*", help="only these: " + ", ".join(SCENARIOS))
    arguments = parser.parse_args()
    for name in ("ulysses-conformance", "reference-adapter"):
        if not (arguments.programs / name).exists():
            print(f"hosts-check: there is no program {arguments.programs / name}: run `cargo build`", file=sys.stderr)
            return MACHINE_LACKS
    if missing := what_is_missing():
        print(f"hosts-check: cannot run here: {missing}", file=sys.stderr)
        return MACHINE_LACKS
    for number in (signal.SIGTERM, signal.SIGHUP):  # leaves through what removes folders and hosts
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with (tempfile.TemporaryDirectory(prefix="hosts-check-") as scratch,
          tempfile.TemporaryDirectory(prefix="hosts-check-", dir="/dev/shm") as exchange):
        try:
            with TwoHosts(Path(scratch)) as hosts:
                print(f"two hosts on {hosts.network}: " + ", ".join(host.name for host in hosts.hosts))
                networks = {host: os.readlink(f"/proc/{host.pid}/ns/net") for host in hosts.hosts}
                check = Check(arguments.programs.resolve(), hosts, Path(scratch), Path(exchange))
                for name in arguments.scenario or SCENARIOS:
                    print(f"\n=== {name.replace('_', ' ')}", flush=True)
                    getattr(check, name)()
            print("\n=== afterwards")
            expect(all(namespace_is_gone(host, own) for host, own in networks.items()), "no namespace is left")
        except DoesNotHold as what:
            print(f"hosts-check: does not hold: {what}", file=sys.stderr)
            return 1
    print("\nhosts-check: all holds")
    return 0


SCENARIOS = ["data_cross_the_link", "catalogue", "cut_off_for_good", "cut_off_and_back", "daemon_killed"]

if __name__ == "__main__":
    sys.exit(main())
