"""Locks on disks that several machines share: what such a disk cannot promise is said."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pipeline.errors import Busy
from pipeline.saves.locks import broken_promise, held, locked

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 22 0:50 / /shared rw,relatime - nfs4 server:/export rw,vers=4.2,hard,local_lock=none,addr=10.0.0.1
41 22 0:51 / /alone rw,relatime - nfs server:/export rw,vers=3,nolock,local_lock=all
42 22 0:52 / /my\\040bucket rw - fuse.gcsfuse bucket rw,user_id=0
43 22 0:53 / /scratch rw - lustre 10.0.0.1@tcp:/lustre rw,localflock
44 40 254:1 / /shared/local rw - xfs /dev/vdb rw
45 22 254:2 / /media/li/备份\\0401 rw - ext4 /dev/sdb1 rw
46 22 0:54 / /media/li/云\u2028é\rü rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "promise"),
    [
        ("/home/saves", None),
        ("/shared/saves", None),
        ("/shared/local/saves", None),
        ("/shared/../alone/saves", "`{}` is on nfs, mounted with `nolock`: its locks do not reach other machines, "),
        ("/scratch/saves", "`{}` is on lustre, mounted with `localflock`: its locks do not reach other machines, "),
        ("/my bucket/saves", "`{}` is on an object store (gcsfuse), which has no locks and no renames in one step: "),
        ("/my bucketeer", None),
        ("/media/li/备份 1/saves", None),
        (
            "/media/li/云\u2028é\rü",
            "`{}` is on an object store (s3fs), which has no locks ",
        ),
    ],
)
def test_a_disk_that_cannot_keep_a_promise_is_named(tmp_path, folder, promise):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(MOUNTS.encode())
    said = broken_promise(Path(folder), mounts)
    assert (said is None) == (promise is None)
    assert promise is None or said.startswith(promise.format(folder))


def test_the_name_of_a_mount_that_is_not_utf8_is_read(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(b"46 22 0:54 / /media/\xd4\xc6 rw - fuse.s3fs s3fs rw\n")
    assert broken_promise(Path(os.fsdecode(b"/media/\xd4\xc6/saves")), mounts) is not None


def test_a_system_that_lists_no_mounts_says_nothing(tmp_path):
    assert broken_promise(tmp_path, tmp_path / "absent") is None


def test_a_disk_without_locks_is_not_taken_for_one_that_is_busy(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    part = tmp_path / "sft-000000000000.part"
    with locked(part, "sft"):
        pass
    monkeypatch.setattr(fcntl, "flock", flock)
    file = tmp_path / ".locks" / "sft-000000000000.part.runner"
    with pytest.raises(Busy) as raised, locked(part, "sft"):
        pass
    assert str(raised.value) == (
        f"`{file}` cannot be locked (No locks available): its disk knows no locks; "
        "mount it with locks, or use another one with `--saves DIR`"
    )
    assert held(part) is None


def test_the_plan_says_which_promise_the_disk_cannot_keep(project, monkeypatch):
    from tests.planned import CHAIN

    assert "locks" not in project.validate(CHAIN)[1]
    monkeypatch.setattr("pipeline.saves.locks.broken_promise", lambda folder: f"`{folder}` is on an object store")
    assert "note: `saves` is on an object store\n" in project.validate(CHAIN)[1]
