"""Two hosts out of one machine: for each a network, a host name, process ids and host table of its own, and one link
between them. They share the file system, /dev/shm with it.

Each is a set of namespaces without a name, which lasts as long as its first process and takes every process in it
along. So ending two processes ends all of it, the link too.
"""

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REMOTE_SHELL = HERE / "remote_shell.py"
LINK = "link0"
NAMESPACES = ("--net", "--uts", "--pid", "--ipc", "--mount")


def what_is_missing() -> str | None:
    """What this machine lacks to make hosts of, in a sentence."""
    for program, package in {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux",
                             "mount": "mount", "mpirun": "openmpi-bin"}.items():
        if shutil.which(program) is None:
            return f"there is no program `{program}`: install {package}"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "ip", "link", "set", "lo", "up"],
                           capture_output=True, text=True)
    if tried.returncode != 0:
        return ("namespaces cannot be made, which takes root (or `unshare --map-root-user --net` before the command): "
                + (tried.stderr.strip().splitlines() or ["no reason was given"])[-1])
    return None


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout


class Host:
    """One host. `pid` is that of its first process, as this machine counts."""

    def __init__(self, name: str, hosts_file: Path) -> None:
        self.name = name
        # The first process ends with this one, whatever ends this one.
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--mount-proc", "--kill-child",
             sys.executable, str(REMOTE_SHELL), "serve"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid = self._first_process()
        self.run("hostname", name)
        self.run("mount", "--bind", str(hosts_file), "/etc/hosts")
        self.run("ip", "link", "set", "lo", "up")

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._unshare.poll() is None:
            # The first child there is is the namespace's first process.
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.01)
        raise RuntimeError("a host does not start")

    def words(self, *command: str) -> list[str]:
        """The words that run a command on this host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *command]

    def run(self, *command: str) -> str:
        return _run(*self.words(*command))

    def processes(self) -> dict[int, str]:
        """The processes on this host but for its first two, with their command lines."""
        own, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == own:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line and str(REMOTE_SHELL) + " serve" not in line:
                        found[int(folder.name)] = line
            except OSError:
                pass  # it has ended
        return found

    def bytes_received(self) -> int:
        told = json.loads(self.run("ip", "-statistics", "-json", "link", "show", LINK))
        return told[0]["stats64"]["rx"]["bytes"]

    def end(self) -> None:
        """Comes back when every process of the host has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()


class TwoHosts:
    """A context: host A, where the judge and mpirun run, host B, and the link between them."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.hosts: list[Host] = []

    def __enter__(self) -> "TwoHosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        network = _unused_network()
        addresses = [str(address) for address in network.hosts()]
        names = ["ulysses-a", "ulysses-b"]
        hosts_file = self._scratch / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(addresses, names))]
        hosts_file.write_text("\n".join(lines) + "\n")
        for name in names:
            self.hosts.append(Host(name, hosts_file))
        pids = [str(host.pid) for host in self.hosts]
        _run("ip", "link", "add", LINK, "netns", pids[0], "type", "veth", "peer", "name", LINK, "netns", pids[1])
        for host, address in zip(self.hosts, addresses):
            host.run("ip", "address", "add", f"{address}/{network.prefixlen}", "dev", LINK)
            host.run("ip", "link", "set", LINK, "up")
        self.network = str(network)
        self._wait_for_the_remote_shells()

    def _wait_for_the_remote_shells(self) -> None:
        deadline = time.monotonic() + 20
        for asker, asked in (self.hosts, self.hosts[::-1]):
            words = asker.words(sys.executable, str(REMOTE_SHELL), "ask", asked.name, "true")
            while (tried := subprocess.run(words, capture_output=True, text=True)).returncode != 0:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{asked.name} does not answer: {tried.stderr.strip()}")
                time.sleep(0.1)

    def pull_the_cable(self) -> None:
        """Cuts the link. Nobody is told: what is sent is lost, and connections stay open."""
        self.hosts[1].run("ip", "link", "set", LINK, "down")

    def plug_it_in(self) -> None:
        self.hosts[1].run("ip", "link", "set", LINK, "up")

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.end()


def _unused_network() -> ipaddress.IPv4Network:
    """Two addresses that this machine has no way to. They are seen by the two hosts alone."""
    routed = [word for line in _run("ip", "-4", "route", "show", "table", "all").splitlines()
              for word in line.split() if word[0].isdigit()]
    taken = []
    for word in routed:
        try:
            taken.append(ipaddress.ip_network(word, strict=False))
        except ValueError:
            pass  # a number that is no address
    for network in ipaddress.ip_network("10.213.0.0/16").subnets(new_prefix=30):
        if not any(network.overlaps(other) for other in taken if other.prefixlen > 0):
            return network
    raise RuntimeError("every network of 10.213.0.0/16 is in use")
