"""Machines in one: network namespaces with an address each, on a bridge of their own; made and removed by root.

By hand: `.venv/bin/python tests/run/namespaces.py 2 -- pipeline run CONFIG --set launch.machines=2` runs a command on
each of two machines, with NODE_RANK, MASTER_ADDR and MASTER_PORT as a cluster sets them, and removes them afterwards.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PORT = 29500


def missing():
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "`ip` or `unshare` is not installed"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "delete", name)
    return None if made else "network namespaces cannot be made here"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A network namespace; programs in it see its address and a host name of its own."""

    def __init__(self, rank, prefix):
        self.rank, self.name, self.host = rank, f"{prefix}m{rank}", f"machine-{'abcdefgh'[rank]}"
        self.link, self.address = f"{prefix}v{rank}", f"10.213.77.{rank + 1}"

    def command(self, *words):
        """The words with which a command runs in it."""
        inside = f'hostname {self.host} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", inside, "sh", *map(str, words)]

    def start(self, *words, **more):
        """Start a program in it; the keyword arguments are those of Popen. `env` adds variables to the environment."""
        env = {**os.environ, **more.pop("env", {})}
        return subprocess.Popen(self.command(*words), env=env, **more)

    def processes(self):
        """The ids of all processes in it."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(word) for word in found.stdout.split()]

    def unplug(self):
        """Take its network away; its processes do not notice."""
        ip("link", "set", self.link, "down")


@contextlib.contextmanager
def machines(count):
    """Some machines that reach each other."""
    prefix = f"p{os.getpid() % 100000}"
    bridge, made = f"{prefix}b", [Machine(rank, prefix) for rank in range(count)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for machine in made:
            ip("netns", "add", machine.name)
            ip("link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            ip("link", "set", machine.link, "master", bridge, "up")
            for words in (
                ("address", "add", f"{machine.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", machine.name, *words)
        yield made
    finally:
        for machine in made:
            for pid in machine.processes() if Path("/run/netns", machine.name).exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            for words in (("netns", "delete", machine.name), ("link", "delete", machine.link)):
                subprocess.run(["ip", *words], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)


def main(count, words):
    with machines(count) as made:
        where = {"MASTER_ADDR": made[0].address, "MASTER_PORT": str(PORT)}
        started = [one.start(*words, env={**where, "NODE_RANK": str(one.rank)}) for one in made]
        codes = [one.wait() for one in started]
        print("exit codes:", *codes)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[3:]))
