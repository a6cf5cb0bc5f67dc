"""A function and a folder in; every system call that changes a file below the folder, and how the function ended, out.

The function runs in a forked process under a seccomp filter that hands each such call, of all its threads, children
and programs, to this process first (Linux 5.19, x86_64). That is below libc: safetensors renames its files with the
bare instruction, which a preloaded library would never see. At a chosen call the process that makes it is ended
with SIGKILL, before the call or after half of its bytes ("torn").
"""

import ctypes
import errno
import os
import platform
import re
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CONTENT, LOG = "content", "log"
LOGS = ("log.txt", "events.jsonl")  # how often these are written depends on how fast the machine is

# Number of a call, what it does, and its arguments: `d` a directory's descriptor, `p` a path, `f` a descriptor.
CALLS = {
    1: ("write", "f"),
    2: ("create", "p"),  # open
    9: ("map", "----f"),  # stores into a shared mapping are not seen; that there is one is
    18: ("pwrite", "f"),
    20: ("writev", "f"),
    40: ("sendfile", "f"),
    74: ("fsync", "f"),
    75: ("fsync", "f"),  # fdatasync
    76: ("truncate", "p"),
    77: ("truncate", "f"),
    82: ("rename", "pp"),
    83: ("mkdir", "p"),
    84: ("delete", "p"),  # rmdir
    85: ("create", "p"),  # creat
    86: ("link", "pp"),
    87: ("delete", "p"),  # unlink
    88: ("link", "-p"),  # symlink
    90: ("chmod", "p"),
    91: ("chmod", "f"),
    133: ("create", "p"),  # mknod
    257: ("create", "dp"),  # openat
    258: ("mkdir", "dp"),
    259: ("create", "dp"),  # mknodat
    263: ("delete", "dp"),  # unlinkat
    264: ("rename", "dpdp"),
    265: ("link", "dpdp"),
    266: ("link", "-dp"),  # symlinkat
    268: ("chmod", "dp"),
    277: ("fsync", "f"),  # sync_file_range
    280: ("utime", "dp"),
    285: ("truncate", "f"),  # fallocate
    296: ("pwritev", "f"),
    306: ("fsync", "f"),  # syncfs
    316: ("rename", "dpdp"),
    326: ("copy", "--f"),  # copy_file_range
    328: ("pwritev", "f"),
    437: ("create", "dp"),  # openat2
    452: ("chmod", "dp"),
}
WRITES = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy")

_FORBID_NEW_PRIVILEGES, _REAPER = 38, 36  # prctl
_LISTEN = 1 << 3 | 1 << 2 | 1 << 5  # NEW_LISTENER, SPEC_ALLOW, WAIT_KILLABLE_RECV
_RECEIVE, _ANSWER, _VALID, _CONTINUE = 0xC0502100, 0xC0182101, 0x40082102, 1
_GETFD = 438
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """The `number`-th call of its kind."""

    kind: str
    number: int
    pid: int
    name: str
    path: str
    size: int | None
    """Bytes that it writes; None for calls that write none."""


@dataclass
class Ended:
    """How the function ended."""

    status: int
    """Its exit code, or minus its signal."""
    pid: int
    calls: list[Call] = field(default_factory=list)
    fault: Call | None = None
    """The call that a process was ended at."""
    torn: int | None = None
    """How many bytes of it were written first."""
    left: list[int] = field(default_factory=list)
    """How the processes ended that were still there when the function's own had ended."""


def missing() -> str | None:
    """Why this machine cannot do it."""
    release = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if sys.platform != "linux" or platform.machine() != "x86_64" or release < (5, 19):
        return f"needs Linux 5.19 on x86_64, this is {platform.platform()}"
    return None


def watch(function: Callable[[], int], folder: Path, at: tuple[str, int] | None = None, *, torn: bool = False) -> Ended:
    """Run a function in a forked process and end it at the call `at`, a kind and a number.

    No process of it is left when this returns.
    """
    ours, theirs = socket.socketpair()
    _LIBC.prctl(_REAPER, 1)  # what outlives the function's process is handed to us
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _be(function, theirs)
    theirs.close()
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    if not descriptors:
        os.waitpid(pid, 0)
        raise RuntimeError("the kernel refuses the seccomp filter; see above")
    try:
        return _Watcher(descriptors[0], folder, at, torn).until_the_end(pid)
    finally:
        os.close(descriptors[0])


def _be(function: Callable[[], int], channel: socket.socket) -> None:
    """Be the function's process; never returns."""
    code = 70
    try:
        listener = _filter()
        socket.send_fds(channel, [b"."], [listener])
        os.close(listener)
        channel.close()
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _filter() -> int:
    """Put this process under the filter; the descriptor that its calls are told to."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, anyof, give = 0x20, 0x15, 0x45, 0x06
    number, architecture, arguments = 0, 4, 16
    allow, tell = 0x7FFF0000, 0x7FC00000
    changes = os.O_CREAT | os.O_TRUNC
    program = [step(load, architecture), step(equal, 0xC000003E, 1), step(give, allow), step(load, number)]
    for flags, call in ((1, 2), (2, 257)):  # open, openat: only those that make or empty a file
        program += [step(equal, call, 0, 4), step(load, arguments + 8 * flags)]
        program += [step(anyof, changes, 0, 1), step(give, tell), step(give, allow)]
    program += [step(equal, 9, 0, 6), step(load, arguments + 8 * 2), step(anyof, 2, 0, 3)]  # mmap: PROT_WRITE
    program += [step(load, arguments + 8 * 3), step(anyof, 1, 0, 1), step(give, tell), step(give, allow)]  # MAP_SHARED
    for call in CALLS.keys() - {2, 9, 257}:
        program += [step(equal, call, 0, 1), step(give, tell)]
    program.append(step(give, allow))
    code = ctypes.create_string_buffer(b"".join(program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    if _LIBC.prctl(_FORBID_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    listener: int = _LIBC.syscall(317, 1, _LISTEN, whole)  # seccomp(SET_MODE_FILTER)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


class _Watcher:
    def __init__(self, listener: int, folder: Path, at: tuple[str, int] | None, torn: bool) -> None:
        self.listener, self.folder, self.at, self.torn = listener, str(folder), at, torn
        self.counts = {CONTENT: 0, LOG: 0}
        self.ended = Ended(0, 0)

    def until_the_end(self, pid: int) -> Ended:
        """Answer every call until no process is left."""
        self.ended.pid = pid
        waiting = select.poll()
        waiting.register(self.listener, select.POLLIN)
        while True:
            if any(event & select.POLLIN for _, event in waiting.poll(20)):
                self.answer()
                continue
            try:
                gone, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return self.ended
            if gone == pid:
                self.ended.status = os.waitstatus_to_exitcode(status)
            elif gone:
                self.ended.left.append(os.waitstatus_to_exitcode(status))

    def answer(self) -> None:
        """Let one call go on, or end its process."""
        told = ctypes.create_string_buffer(80)
        if _LIBC.ioctl(self.listener, ctypes.c_ulong(_RECEIVE), told):
            return  # its process is gone already
        key, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", told.raw)
        name, shape = CALLS[number]
        try:
            process = _Process(thread)
            paths = process.paths(shape, arguments)
            changes = name != "delete" or any(os.path.lexists(path) for path in paths)  # else it will fail
            below = changes and any(path == self.folder or path.startswith(f"{self.folder}/") for path in paths)
            if below and self.is_the_end(process, name, arguments, " -> ".join(paths)):
                os.kill(process.pid, signal.SIGKILL)
                return
        except OSError:
            if _LIBC.ioctl(self.listener, ctypes.c_ulong(_VALID), told):
                return  # another of its threads was ended, or its parent
            raise
        goes_on = ctypes.create_string_buffer(struct.pack("QqiI", key, 0, 0, _CONTINUE))
        _LIBC.ioctl(self.listener, ctypes.c_ulong(_ANSWER), goes_on)  # fails only when the process is gone

    def is_the_end(self, process: "_Process", name: str, arguments: list[int], path: str) -> bool:
        """Count a call, and do half of it when it is the one to end at and that is wanted."""
        kind = LOG if path.endswith(LOGS) else CONTENT
        self.counts[kind] += 1
        size = len(process.data(name, arguments)) if name in WRITES else None
        call = Call(kind, self.counts[kind], process.pid, name, path, size)
        self.ended.calls.append(call)
        if self.at != (kind, call.number):
            return False
        self.ended.fault = call
        if self.torn and size is not None:
            self.ended.torn = process.write_half(name, arguments)
        return True


class _Process:
    """The process that a call was told of; it waits inside the call."""

    def __init__(self, thread: int) -> None:
        status = Path(f"/proc/{thread}/status").read_text(encoding="utf-8")
        self.pid = int(status.partition("\nTgid:")[2].split()[0])

    def paths(self, shape: str, arguments: list[int]) -> list[str]:
        """The absolute paths that a call is about."""
        found, directory = [], "cwd"
        for letter, value in zip(shape, arguments, strict=False):
            signed = ctypes.c_int(value & 0xFFFFFFFF).value
            if letter == "d":
                directory = "cwd" if signed == -100 else f"fd/{signed}"  # AT_FDCWD
            elif letter == "f":
                found.append(self.link(f"fd/{signed}"))
            elif letter == "p" and value:
                found.append(os.path.normpath(os.path.join(self.link(directory), self.text(value))))
                directory = "cwd"
            elif letter == "p":  # no path: the directory's descriptor itself is meant, as in futimens
                found.append(self.link(directory))
        return found

    def link(self, name: str) -> str:
        """What the process has under this name; "" for a descriptor that is not open, with which the call will fail."""
        if not os.path.lexists(f"/proc/{self.pid}/{name}") and os.path.isdir(f"/proc/{self.pid}/fd"):
            return ""
        return os.readlink(f"/proc/{self.pid}/{name}")

    def memory(self, address: int, size: int) -> bytes:
        memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        try:
            found = os.pread(memory, size, address)
        finally:
            os.close(memory)
        if len(found) < size:
            raise OSError(errno.EFAULT, f"{len(found)} of {size} bytes could be read")
        return found

    def text(self, address: int) -> str:
        """A string that ends with a zero; read page by page, since the next one may not be there."""
        found = b""
        while b"\0" not in found:
            found += self.memory(address + len(found), 4096 - (address + len(found)) % 4096)
        return os.fsdecode(found.partition(b"\0")[0])

    def data(self, name: str, arguments: list[int]) -> bytes:
        """What a call would write."""
        if name in ("write", "pwrite"):
            return self.memory(arguments[1], arguments[2])
        if name in ("writev", "pwritev"):
            parts = self.memory(arguments[1], 16 * arguments[2])
            return b"".join(self.memory(*part) for part in struct.iter_unpack("QQ", parts))
        # sendfile(to, from, offset, count); copy_file_range(from, offset, to, offset, count, flags)
        source, offset, count = arguments[1:4] if name == "sendfile" else (arguments[0], arguments[1], arguments[4])
        own = self.descriptor(source)
        try:
            start = struct.unpack("q", self.memory(offset, 8))[0] if offset else os.lseek(own, 0, os.SEEK_CUR)
            return os.pread(own, min(count, max(0, os.fstat(own).st_size - start)), start)
        finally:
            os.close(own)

    def descriptor(self, number: int) -> int:
        """The same open file, in this process."""
        process = os.pidfd_open(self.pid)
        try:
            own: int = _LIBC.syscall(_GETFD, process, number & 0xFFFFFFFF, 0)
        finally:
            os.close(process)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return own

    def write_half(self, name: str, arguments: list[int]) -> int:
        """Do the first half of a write in its place; the bytes written."""
        data = self.data(name, arguments)
        data = data[: len(data) // 2]
        own = self.descriptor(arguments[2] if name == "copy" else arguments[0])
        try:
            if name in ("pwrite", "pwritev"):
                return os.pwrite(own, data, ctypes.c_int64(arguments[3]).value)
            if name == "copy" and arguments[3]:
                return os.pwrite(own, data, struct.unpack("q", self.memory(arguments[3], 8))[0])
            return os.write(own, data)
        finally:
            os.close(own)
