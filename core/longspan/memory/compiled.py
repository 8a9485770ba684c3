"""Compiled code that a backend keeps on disk, and how much it is trusted.

Code is looked for in two homes: the backend's folder in the cache folder, and this user's folder among the temporary
files, for when the first cannot be used. A home is used only where it and the folder above it are the user's own:
nobody else can then put a file there. A file is loaded only where it is the user's own too and holds what its name
says, which ends with a digest (SHA-256) of its content; it is opened once, and what was checked is what is loaded. The
digest is against damage. Against other users it would be worth nothing, as they can compute one: there owners and
modes decide, and against whoever runs as the same user, or as root, nothing does.

A file that is refused is set aside under another name and never loaded. `longspan doctor` lists it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

from longspan.errors import PluginWarning, warn_caller
from longspan.memory.folders import (
    NotOwn,
    Unused,
    cache_folder,
    make_folder,
    not_own,
    open_own,
    read_own,
    scratch_folder,
    why_unread,
    write_whole,
)

__all__ = ["RETRY", "ROOM", "Code", "Home", "homes", "survey"]

CODE, REFUSED, FAILED = ".so", ".refused", ".failed"
RETRY = 3600.0
"""Seconds for which a build that took too long is not tried again."""
ROOM = 2**24
"""Bytes that a disk is to have left."""
NAMED = re.compile(r"(?P<key>.+)-(?P<digest>[0-9a-f]{64})\.(so|refused)")


@frozen
class Code:
    """A file that was opened and checked. It stays open, so that `address` goes on to mean it."""

    path: Path
    file: int

    @property
    def address(self) -> str:
        """What to hand to the loader: the opened file itself where the system can name it, else its path."""
        opened = f"/proc/self/fd/{self.file}"
        return opened if os.path.exists(opened) else str(self.path)


@frozen
class Home:
    """A folder in which a backend keeps compiled code. Looking into it creates nothing."""

    path: Path

    def refusal(self) -> str:
        """Why no code is taken from here, as the end of a sentence; empty where it is, or where nothing is yet."""
        for folder in (self.path.parent, self.path):
            try:
                if why := not_own(folder.stat()):
                    return why if folder == self.path else f"is in {folder}, which {why}"
            except FileNotFoundError:
                return ""
            except OSError as error:
                return f"cannot be read: {error.strerror}"
        return ""

    def find(self, key: str) -> Iterator[Code]:
        """The files kept under this key that may be loaded. One that may not is set aside, with a warning."""
        with self._opened() as folder:
            for name in _names(folder, CODE) if folder >= 0 else ():
                if not name.startswith(f"{key}-"):
                    continue
                try:
                    file = _checked(name, folder)
                except FileNotFoundError:  # another process set it aside
                    continue
                except OSError as error:
                    self._set_aside(name, folder, error)
                    continue
                yield Code(self.path / name, file)

    def keep(self, key: str, data: bytes) -> Code:
        """Write code under a key, and open what was written.

        Raises:
            OSError: it cannot be kept here.
        """
        make_folder(self.path)
        if why := self.refusal():
            raise NotOwn(f"{self.path} {why}")
        path = self.path / f"{key}-{hashlib.sha256(data).hexdigest()}{CODE}"
        write_whole(path, data)
        with suppress(OSError):
            (self.path / f"{key}{FAILED}").unlink()
        with self._opened() as folder:
            return Code(path, _checked(path.name, folder))

    def remember_failure(self, key: str, why: str) -> None:
        """Have other processes leave a build alone for `RETRY` seconds.

        Raises:
            OSError: it cannot be written here.
        """
        make_folder(self.path)
        if refused := self.refusal():
            raise NotOwn(f"{self.path} {refused}")
        write_whole(self.path / f"{key}{FAILED}", why.encode())

    def failure(self, key: str) -> str:
        """Why a build is to be left alone for now, and the line that has it tried again; empty where it is not."""
        path = self.path / f"{key}{FAILED}"
        return "" if self.refusal() else _failure(path)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder, opened and the user's own; -1 where it is not."""
        folder = -1
        if not self.refusal():
            with suppress(OSError):
                folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # What was opened counts, and not what its name meant before.
            yield -1 if folder < 0 or not_own(os.fstat(folder)) else folder
        finally:
            if folder >= 0:
                os.close(folder)

    def _set_aside(self, name: str, folder: int, error: OSError) -> None:
        with suppress(OSError):
            os.replace(name, Path(name).with_suffix(REFUSED), src_dir_fd=folder, dst_dir_fd=folder)
        text = f"{self.path / name} {why_unread(error)}: it is set aside, and built anew. Next: longspan doctor"
        warn_caller(text, PluginWarning)


def homes(name: str) -> tuple[Home, ...]:
    """Where code of this name may be kept, the better place first; without a home directory there is one less."""
    known = []
    for folder in (cache_folder, scratch_folder):
        with suppress(OSError, RuntimeError):
            known.append(Home(folder(name)))
    return tuple(dict.fromkeys(known))


def _checked(name: str, folder: int) -> int:
    """Open a file in a folder whose content is what its name says.

    Raises:
        NotOwn: it is not the user's own, or holds something else.
        OSError: it cannot be read.
    """
    file = open_own(name, folder)
    try:
        if why := _differs(name, file):
            raise NotOwn(why)
    except BaseException:
        os.close(file)
        raise
    return file


def _differs(name: str, file: int) -> str:
    match = NAMED.fullmatch(name)
    if match is None:
        return "has no digest of its content in its name"
    with os.fdopen(os.dup(file), "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if digest == match["digest"] else "is damaged, or not what was kept: its content has another digest"


def _names(folder: int | Path, *endings: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(endings) and not name.startswith("."))


def _failure(path: Path) -> str:
    try:
        when = path.stat().st_mtime
        why = read_own(path, 4096).decode(errors="replace")
    except OSError:
        return ""
    if not abs(time.time() - when) < RETRY:
        return ""
    again = time.strftime("%Y-%m-%d %H:%M", time.localtime(when + RETRY))
    return f"{why}; not tried again before {again}. Next: rm {shlex.quote(str(path))}"


# --------------------------------------------------------------------------------------------------- for the doctor


def survey() -> tuple[Unused, ...]:
    """All compiled code of this user that is refused, and builds that are left alone for now. Changes nothing."""
    unused: list[Unused] = []
    with suppress(OSError, RuntimeError):
        unused += _surveyed(cache_folder(""), "LONGSPAN_CACHE")
    with suppress(OSError):
        unused += _surveyed(scratch_folder(""), "TMPDIR")
    return tuple(unused)


def _surveyed(base: Path, variable: str) -> Iterator[Unused]:
    nearest = next(folder for folder in (base, *base.parents) if folder.exists())
    another = f'mkdir -m 700 -p ~/.cache/longspan && export {variable}="$HOME/.cache/longspan"'
    if nearest == base and (why := not_own(base.stat())):
        mine = base.stat().st_uid in (os.geteuid(), 0)
        fix = f"chmod go-w {shlex.quote(str(base))}" if mine else another
        yield Unused(str(base), f"{why}: no compiled code is loaded from there", fix)
    elif not os.access(nearest, os.W_OK):
        yield Unused(str(base), "cannot be written to: compiled code is kept among the temporary files", another)
    elif shutil.disk_usage(nearest).free < ROOM:
        yield Unused(str(base), "is on a full disk: compiled code may not fit", another)
    if nearest == base:
        for folder in sorted(path for path in base.iterdir() if path.is_dir()):
            with suppress(OSError):
                yield from _refused(Home(folder))


def _refused(home: Home) -> Iterator[Unused]:
    names = _names(home.path, CODE, REFUSED, FAILED)
    if names and (why := home.refusal()):  # what lies there may be anybody's by now
        remove = f"rm -r {shlex.quote(str(home.path))}"
        yield from (Unused(str(home.path / name), f"is not loaded: its folder {why}", remove) for name in names)
        return
    for name in names:
        path = home.path / name
        remove = f"rm {shlex.quote(str(path))}"
        if name.endswith(FAILED):
            if why := _failure(path):
                yield Unused(str(path), why.partition(". Next: ")[0], remove)
            continue
        try:
            file = open_own(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Unused(str(path), f"{why_unread(error)}: it is not loaded, but built anew", remove)
            continue
        try:
            why = _differs(name, file) or ("was set aside once" if name.endswith(REFUSED) else "")
        finally:
            os.close(file)
        if why:
            yield Unused(str(path), f"{why}: it is not loaded, but built anew", remove)
