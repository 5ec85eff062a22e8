"""Machines of a small network on this one, each a set of Linux namespaces.

A host has an address, a host name, a process table, a /tmp, /run, /dev/shm and a home of its own; of the rest of the
file system it sees what all see: the Python environment, and one directory that all share, as an NFS mount would be.
So whatever runs on it must come over the network or through the shared directory, and `kill -9` of "everything" there,
or a `ray stop`, means that host alone.

Nothing here has a name outside: no `ip netns add`, no interface in the main namespace. A host is its first process,
which dies with this one; the kernel then takes away its processes, mounts and interfaces, also after `kill -9` of
the tests. So there is nothing to sweep up.
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOME = "/home/root"
NEEDED = ("ip", "setpriv", "unshare", "nsenter", "mount")
SUBNET = ipaddress.ip_network("10.77.0.0/24")
GATEWAY = SUBNET[254]

# The first process of a host. It adopts orphans, and so must not collect zombies.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); signal.pause()"

# $0 the host's name, $1 the directory of its own files, up to "--" what all hosts see, then the command of init.
# A shared path keeps its name, also where that lies below the /tmp or /home that each host has for itself.
BOOT = f"""
set -e
name=$0; etc=$1; shift
mount --make-rprivate /
for file in hosts passwd resolv.conf; do mount --bind "$etc/$file" /etc/$file; done
mount -t tmpfs tmpfs /mnt
seen=0; moves=
while test "$1" != --; do
  seen=$((seen + 1)); mkdir /mnt/$seen; mount --bind "$1" /mnt/$seen
  moves="$moves mkdir -p '$1'; mount --move /mnt/$seen '$1';"
  shift
done
shift
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /home
mount -t tmpfs tmpfs /run
eval "$moves"
umount /mnt
mount -t tmpfs -o size=512m tmpfs /dev/shm
mkdir -m 700 {HOME}
hostname "$name"
ip link set lo up
exec "$@"
"""


class NoNamespaces(RuntimeError):
    """This machine, or this user, cannot make hosts; a test that needs them has to fail, not to skip."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"make test-cluster needs root and Linux namespaces: {' '.join(command)}: {done.stderr}")
    return done.stdout


def _first_process(flags: Sequence[str], *command: str) -> tuple[subprocess.Popen[str], int]:
    """The process that holds new namespaces, once it prints "up", and the pid of its child inside."""
    process = subprocess.Popen(
        # both die with this process: setpriv's signal for the parent, --kill-child for the one inside
        ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "--fork", "--kill-child=KILL", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "up\n":
        process.kill()
        raise NoNamespaces(f"make test-cluster needs root and Linux namespaces: {process.stderr.read().strip()}")
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, int(child[0])


@dataclass
class Host:
    """One machine; made by `Network.host`."""

    name: str
    address: str
    pid: int
    environment: dict[str, str] = field(default_factory=dict)
    """Of every command here, beside PATH, HOME and LANG; nothing comes from the tests' own environment."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *command: str, env: Mapping[str, str] | None = None, cwd: str | Path = HOME) -> list[str]:
        """What to run, on the real machine, to have `command` run on this one."""
        variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": HOME,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.environment,
            **(env or {}),
        }
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid"]
        assignments = [f"{name}={value}" for name, value in variables.items()]
        return [*enter, "env", "--ignore-environment", f"--chdir={cwd}", *assignments, *command]

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: str | Path = HOME, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` here to its end, whatever its exit code."""
        prepared = self.command(*command, env=env, cwd=cwd)
        return subprocess.run(prepared, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def start(
        self, *command: str, log: Path, env: Mapping[str, str] | None = None, cwd: str | Path = HOME
    ) -> subprocess.Popen[bytes]:
        """Start `command` here, with its output in `log`; the host's end is its end."""
        prepared = self.command(*command, env=env, cwd=cwd)
        with log.open("ab") as output:
            process = subprocess.Popen(prepared, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def processes(self) -> list[str]:
        """The command lines of all that run here, except the host's first process."""
        listed = self.run("ps", "-e", "-o", "pid=,args=").stdout.splitlines()
        lines = [line.split(maxsplit=1) for line in listed]
        return [arguments for pid, arguments in lines if pid != "1" and not arguments.startswith("ps -e")]

    def kill_everything(self) -> None:
        """`kill -9` of every process here at once; the host itself, its files and its address stay."""
        self.run("sh", "-c", "kill -9 -1")

    def write(self, path: str, text: str, *, mode: str = "600") -> None:
        """A file of this host, in its own home or /tmp."""
        script = 'mkdir -p "$(dirname "$0")" && cat > "$0" && chmod "$1" "$0"'
        subprocess.run(self.command("sh", "-c", script, path, mode), input=text, text=True, check=True)


class Network:
    """A switch and the hosts at it, all of which end with the `with` block.

    `shared` is the directory that all hosts see under the same path and may write to; beside it they see what is
    outside of /tmp and /home anyway, and `seen`.
    """

    def __init__(self, shared: Path, *, seen: Sequence[Path] = ()) -> None:
        self.shared = shared
        self.seen = [path for path in (shared, *seen) if path.parts[:2] in (("/", "tmp"), ("/", "home"))]
        self.hosts: dict[str, Host] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self._switch = 0

    def __enter__(self) -> Self:
        missing = [tool for tool in NEEDED if shutil.which(tool) is None]
        if missing:
            raise NoNamespaces(f"make test-cluster needs {', '.join(missing)} (iproute2 and util-linux)")
        try:
            process, self._switch = _first_process(["--net"], sys.executable, "-S", "-c", INIT)
            self._processes.append(process)
            self._in_switch("link", "add", "switch", "type", "bridge")
            self._in_switch("addr", "add", f"{GATEWAY}/{SUBNET.prefixlen}", "dev", "switch")
            self._in_switch("link", "set", "switch", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.communicate()
        for host in self.hosts.values():
            for started in host.started:
                started.wait()
        self._processes.clear()

    def _in_switch(self, *arguments: str) -> None:
        _run("nsenter", f"--target={self._switch}", "--net", "ip", *arguments)

    def host(self, name: str) -> Host:
        """A new machine, connected; all know it by `name`."""
        address = str(SUBNET[len(self.hosts) + 1])
        etc = self._own_files(name, address)
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc"]
        init = [sys.executable, "-S", "-c", INIT]
        process, pid = _first_process(flags, "sh", "-c", BOOT, name, str(etc), *map(str, self.seen), "--", *init)
        self._processes.append(process)
        # one end of the cable is made inside the host at once: the main namespace never sees it
        self._in_switch("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._in_switch("link", "set", name, "master", "switch", "up")
        host = Host(name, address, pid)
        for arguments in (
            ["addr", "add", f"{address}/{SUBNET.prefixlen}", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            # leads nowhere; programs find their own address by asking which interface leads out
            ["route", "add", "default", "via", str(GATEWAY)],
        ):
            _run(*host.command("ip", *arguments))
        self.hosts[name] = host
        return host

    def _own_files(self, name: str, address: str) -> Path:
        """The host's own /etc: names without a name server, and root's home where nothing of the real one lies."""
        etc = self.shared / f".etc-{name}"
        etc.mkdir()
        hosts = [f"127.0.0.1 localhost\n{address} {name}\n"]
        hosts += [f"{host.address} {host.name}\n" for host in self.hosts.values()]
        (etc / "hosts").write_text("".join(hosts))
        (etc / "resolv.conf").write_text("")
        lines = Path("/etc/passwd").read_text().splitlines()
        others = [line for line in lines if not line.startswith("root:")]
        (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{HOME}:/bin/bash", *others, ""]))
        for host in self.hosts.values():
            with (self.shared / f".etc-{host.name}" / "hosts").open("a") as names:
                names.write(f"{address} {name}\n")
        return etc


def describe(done: subprocess.CompletedProcess[Any]) -> str:
    """All output of a command, for the message of a failed assertion."""
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
