"""Files that are whole at every moment."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

_PREFIX, _SUFFIX = ".pyro_bmr-", ".unfinished"
# Of a writer that is alive, a file is never untouched for so long.
_ABANDONED = 3600.0


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a new path beside a file, and put what was written there in its place when it is whole.

    Each writer has a path of its own, so that the last one wins. The mode of the file is kept; a
    link stays one. What `check_file` refuses raises an error.
    """
    target = Path(os.path.realpath(check_file(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    unfinished = target.with_name(f"{_PREFIX}{token_hex(8)}{_SUFFIX}")
    created = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(unfinished, created, 0o666 if mode is None else mode | stat.S_IWUSR))
    mode = stat.S_IMODE(unfinished.stat().st_mode) if mode is None else mode
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(mode)
        unfinished.replace(target)
        _keep_name(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def check_file(path: str | Path) -> Path:
    """Return the path of a file that is there or may be made; raise an error for anything else."""
    if not isinstance(path, str | os.PathLike):
        msg = f"got the path {path!r}. Expected a string or a pathlib.Path"
        raise TypeError(msg)
    if not os.fspath(path):
        msg = "got an empty path. Expected the name of a file"
        raise ValueError(msg)
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return Path(path)
    except ValueError as error:
        msg = f"got the path {str(path)!r} ({error}). Expected the name of a file"
        raise ValueError(msg) from error
    if stat.S_ISDIR(mode):
        msg = f"{path} is a folder. Expected a file: give a name in it"
        raise IsADirectoryError(msg)
    if not stat.S_ISREG(mode):
        kind = next((kind for is_one, kind in _KINDS.items() if is_one(mode)), "no file")
        msg = f"{path} is {kind}. Expected a file on a disk"
        raise ValueError(msg)
    return Path(path)


_KINDS = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def _keep_name(folder: Path) -> None:
    """Bring a new name to the disk, where folders can be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove what writers that were killed have left."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another writer was faster, or it is another user's
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
