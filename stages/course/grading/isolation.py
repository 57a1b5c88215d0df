"""Linux namespaces around a graded process: no network but itself, a file system it can only read, processes of its own.

`unshare` makes the namespaces, also for ordinary users where the system lets them; what is in them is set up here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import sys
from pathlib import Path

MS_BIND, MS_NOSUID, MS_NODEV, MS_RDONLY, MS_REC = 0x1000, 0x2, 0x4, 0x1, 0x4000
MOUNT_ATTR_RDONLY, AT_RECURSIVE, AT_FDCWD = 0x1, 0x8000, -100
SYS_MOUNT_SETATTR = 442
"""The same number on every architecture: it is from after the tables were joined."""
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG = 38, 24, 36, 1
LAST_CAPABILITY = 63
NOBODY = 65534
"""The user who owns nothing."""
SHARED_MEMORY = "size=1g"


def unshare_command() -> list[str] | None:
    """What to put before a command so that it runs in namespaces of its own; None where there is nothing to do it."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return None
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc", "--"]


def close_the_room(scratch: Path, hidden: list[Path]) -> None:
    """Set up the namespaces that this process is in.

    Args:
        scratch: the only folder that stays writable.
        hidden: folders that are to look empty, such as the reference's.

    Raises:
        OSError: the system does not let us.
    """
    for folder in hidden:
        if folder.is_dir():
            _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4k")
    _mount(str(scratch), scratch, None, MS_BIND | MS_REC)
    shared = Path("/dev/shm")
    writable = [scratch]
    if shared.is_dir():
        _mount("tmpfs", shared, "tmpfs", MS_NOSUID | MS_NODEV, SHARED_MEMORY)
        writable.append(shared)
    _set_read_only(Path("/"), True)
    for folder in writable:
        _set_read_only(folder, False)
    _loopback_up()


def prctl(option: int, value: int) -> int:
    """Linux's call of this name; minus one when it fails."""
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def give_up_rights() -> None:
    """Let this process and what it starts never undo what `close_the_room` did."""
    for capability in range(LAST_CAPABILITY + 1):
        prctl(PR_CAPBSET_DROP, capability)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def hand_over(folder: Path) -> None:
    """Let a folder and all in it, which root has made, be nobody's."""
    for path, _, names in os.walk(folder):
        for each in (Path(path), *(Path(path, name) for name in names)):
            os.chown(each, NOBODY, NOBODY, follow_symlinks=False)


def become_nobody() -> None:
    """Give up being root for good: what only root may read, such as a salt, is out of reach."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, str(target), kind, data)]
    if ctypes.CDLL(None, use_errno=True).mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", str(target))


def _set_read_only(folder: Path, on: bool) -> None:
    """Make a mount and all below it read-only, or writable again."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY if on else 0, 0 if on else MOUNT_ATTR_RDONLY, 0, 0)
    flags = AT_RECURSIVE if on else 0
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(folder), flags, attributes, len(attributes))
    if result != 0:
        raise OSError(ctypes.get_errno(), f"mount_setattr: {os.strerror(ctypes.get_errno())}", str(folder))


def _loopback_up() -> None:
    """A new network namespace has its loopback interface switched off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(channel, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(channel, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
