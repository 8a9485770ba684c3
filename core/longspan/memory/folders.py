"""Where longspan and its backends keep files of their own, and how those are written and read back.

One rule holds for all that is read back: a file, or a folder of code, is used where it is the user's own, which means
that it belongs to the user (or to root, who may do everything as it is) and that nobody else may write to it. Against
other users this is the protection. Digests stand beside it against damage: whoever may write a file may write its
digest too.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from attrs import frozen
from platformdirs import user_cache_dir

__all__ = [
    "NotOwn",
    "Unused",
    "cache_folder",
    "make_folder",
    "not_own",
    "open_own",
    "read_own",
    "scratch_folder",
    "why_unread",
    "write_whole",
]


class NotOwn(OSError):
    """A file or folder that others may write to, that is somebody else's, or that is no file at all."""


@frozen
class Unused:
    """A kept file or folder that is not used as it was meant to be: which, why, and the line that fixes it.

    `broken`: something that was to work does not; else longspan helps itself.
    """

    path: str
    why: str
    fix: str
    broken: bool = False


def cache_folder(name: str) -> Path:
    """The folder `name` in `$LONGSPAN_CACHE`, `$XDG_CACHE_HOME/longspan` or `~/.cache/longspan`; not created here.

    A relative `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification has it. On systems that keep caches
    elsewhere, there.

    Raises:
        RuntimeError: there is no home directory.
    """
    if own := os.environ.get("LONGSPAN_CACHE", "").strip():
        return Path(own).expanduser().absolute() / name
    shared = Path(user_cache_dir("longspan", appauthor=False))
    return (shared if shared.is_absolute() else Path.home() / ".cache" / "longspan") / name


def scratch_folder(name: str) -> Path:
    """The folder `name` of this user among the temporary files, for what the cache folder does not take; not created.

    Raises:
        OSError: there is nowhere to keep temporary files.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return Path(tempfile.gettempdir()).absolute() / f"longspan-{user}" / name


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone (0700); one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700)
    except FileNotFoundError:
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        if not path.is_dir():
            raise


def not_own(status: os.stat_result) -> str:
    """Why a file or folder is not the user's own, as the end of a sentence about it; empty where it is."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written to by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def open_own(path: str | Path, folder: int | None = None) -> int:
    """Open a file of the user's own for reading; what is checked is what was opened, whatever its name means later.

    Args:
        path: the file, or its name in `folder`.
        folder: an open folder.

    Raises:
        NotOwn: it is not the user's own, or no file.
        OSError: it cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), dir_fd=folder)  # a pipe would keep us waiting
    try:
        status = os.fstat(file)
        why = not_own(status) if stat.S_ISREG(status.st_mode) else "is no file"
        if why:
            raise NotOwn(why)
    except BaseException:
        os.close(file)
        raise
    return file


def why_unread(error: OSError) -> str:
    """What `open_own` and `read_own` raised, as the end of a sentence about the file."""
    return str(error) if isinstance(error, NotOwn) else f"cannot be read: {error.strerror or error}"


def read_own(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a file of the user's own.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        NotOwn: it is not the user's own, no file, or larger.
        OSError: it cannot be read.
    """
    with os.fdopen(open_own(path), "rb") as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise NotOwn(f"is larger than {most:,} bytes")
    return data


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step: whoever reads it, or dies meanwhile, meets the old one or the new one, and no part.

    It is written under a name of its own beside its place, so that writers do not meet either. Others may read it as
    far as the umask lets them, and never write to it.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name[:80]}.{os.getpid()}-{secrets.token_hex(8)}")
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(file, "wb") as whole:
            whole.write(data)
            whole.flush()
            os.fsync(whole.fileno())  # else a crash of the machine may leave the name without the bytes
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
