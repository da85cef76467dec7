"""Everything below a folder, with symbolic links under control.

Three steps. First every folder is listed, links aside. Then each link is judged: one to what was listed is a
duplicate; one to another place in the folder is followed (a store of large files keeps them in a hidden
folder, and links where people look); one that leaves the folder is followed only if that was asked for. No
folder is listed twice, so links that lead in circles end. At last the files of each folder are judged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wsi_pipeline.runs.companions import FOLLOW, SLIDEDAT, is_within, owner_of
from wsi_pipeline.runs.folder import HIDDEN
from wsi_pipeline.runs.found import Found
from wsi_pipeline.runs.judge import Listing, Verdict, judge, judge_zarr
from wsi_pipeline.runs.kinds import ZARR_MARKERS, ending_of, is_hidden, is_output_part
from wsi_pipeline.runs.names import shown

__all__ = ["Walk", "is_zarr_like"]

_SPECIAL = "a device, pipe or socket, not a file"

Parts = tuple[str, ...]
Key = tuple[int, int]


@dataclass(slots=True)
class _Folder:
    """A listed folder. ``path``: as reached; ``real``: without links; ``files``: (device, inode) by name;
    ``run``: an earlier run of this program put its outputs there."""

    path: str
    real: str
    parts: Parts
    device: int
    owner: Verdict | None
    run: bool
    files: dict[str, Key] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)

    @property
    def prefix(self) -> str:
        return "".join(f"{shown(part)}/" for part in self.parts)


@dataclass(slots=True, kw_only=True)
class Walk:
    """One walk; ``rows`` does it. ``exclude``: a folder that counts as not there; ``matches`` and ``enters``:
    which files get a row and which folders are looked into, by their names from ``root`` on."""

    root: str
    links: bool
    exclude: Path | None
    pictures: Collection[str]
    matches: Callable[[Parts], bool]
    enters: Callable[[Parts], bool]
    _folders: dict[str, _Folder] = field(default_factory=dict)
    _rows: list[tuple[Found, Key | None]] = field(default_factory=list)
    _stores: dict[str, str] = field(default_factory=dict)
    _links: list[tuple[_Folder, str]] = field(default_factory=list)

    def rows(self) -> list[tuple[Found, Key | None]]:
        """All rows in the order of their sources, slides with (device, inode); OSError: no such folder."""
        real = os.path.realpath(self.root, strict=True)
        self._list(self.root, real, (), None, root=True)
        while self._links:
            links = sorted(self._links, key=lambda link: (*link[0].parts, link[1]))
            self._links = []
            for folder, name in links:
                self._follow(folder, name)
        for folder in self._folders.values():
            self._judge(folder)
        return sorted(self._rows, key=lambda row: row[0].source)

    def _list(self, path: str, real: str, parts: Parts, owner: Verdict | None, *, root: bool = False) -> None:
        pending = [(path, real, parts, owner)]
        while pending:
            path, real, parts, owner = pending.pop()
            try:
                with os.scandir(path) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
                device = os.stat(path).st_dev
            except OSError as error:
                if root and not parts:
                    raise
                self._add(
                    parts, path, f"cannot be listed ({error.strerror}); check permissions", unknown=True
                )
                continue
            names = {entry.name for entry in found}
            if parts and self._is_one(path, real, parts, names, owner):
                continue
            folder = self._folders[real] = _Folder(path, real, parts, device, owner, HIDDEN in names)
            pending += reversed(list(self._sort(folder, found, names)))

    def _is_one(self, path: str, real: str, parts: Parts, names: set[str], owner: Verdict | None) -> bool:
        """Whether a folder is one row and not walked: an OME-Zarr or an unfinished output."""
        if owner is not None:
            return False
        if not names & ZARR_MARKERS and not is_zarr_like(parts[-1]):
            return False
        if self.matches(parts):
            self._stores[real] = _source(parts)
            self._rows.append((judge_zarr(path, _source(parts), links=self.links), file_key(path)))
        return True

    def _sort(
        self, folder: _Folder, entries: list[os.DirEntry[str]], names: set[str]
    ) -> Iterator[tuple[str, str, Parts, Verdict | None]]:
        """Put each entry of a folder where it belongs; its sub-folders come back, to be listed."""
        for entry in entries:
            parts = (*folder.parts, entry.name)
            if is_hidden(entry.name):
                continue
            if entry.is_symlink():
                if self.matches(parts) or self.enters(parts):
                    self._links.append((folder, entry.name))
            elif entry.is_dir(follow_symlinks=False):
                if self.enters(parts) and not self._is_excluded(entry):
                    owner = folder.owner or _owner(folder, entry, names)
                    yield entry.path, os.path.join(folder.real, entry.name), parts, owner
            elif entry.is_file(follow_symlinks=False):
                folder.files[entry.name] = (folder.device, entry.inode())
                if self.matches(parts):
                    folder.wanted.add(entry.name)
            else:
                self._add(parts, entry.path, _SPECIAL)

    def _is_excluded(self, entry: os.DirEntry[str]) -> bool:
        return (
            self.exclude is not None
            and self.exclude.exists()
            and os.path.samestat(entry.stat(follow_symlinks=False), self.exclude.stat())
        )

    def _follow(self, folder: _Folder, name: str) -> None:
        parts, path = (*folder.parts, name), os.path.join(folder.path, name)
        try:
            real = os.path.realpath(path, strict=True)
            mode = os.stat(real).st_mode
        except OSError as error:
            ends = "leads back to itself" if error.errno == errno.ELOOP else "leads nowhere"
            self._add(parts, path, f"a link that {ends}; delete it or restore its target")
            return
        reason = self._against(real, mode)
        if reason:
            self._add(parts, path, reason)
        elif stat.S_ISDIR(mode):
            if self.enters(parts) or is_zarr_like(name):
                owner = folder.owner or _owner_by_names(name, folder.files)
                self._list(path, real, parts, owner)
        elif self.matches(parts):
            folder.files[name] = file_key(path) or (0, 0)
            folder.wanted.add(name)

    def _against(self, real: str, mode: int) -> str:
        """Why a link is not followed, "" where it is."""
        root = os.path.realpath(self.root)
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return "a link to a device, pipe or socket, not to a file"
        if self.exclude is not None and is_within(real, os.path.realpath(self.exclude)):
            return "a link into the output folder of this run"
        if is_within(root, real):
            return "a link to a folder that contains it"
        if target := self._listed(real):
            return f"a link to {target}"
        if not self.links and not is_within(real, root):
            return f"a link that leaves the input folder; {FOLLOW}"
        return ""

    def _listed(self, real: str) -> str:
        """Source of what has a row already, or lies inside of such; "" where there is none."""
        parent = self._folders.get(os.path.dirname(real))
        name = os.path.basename(real)
        if parent is not None and name in parent.wanted:
            return parent.prefix + shown(name)
        if real in self._folders:
            return self._folders[real].prefix
        while real != os.path.dirname(real):
            if real in self._stores:
                return self._stores[real]
            real = os.path.dirname(real)
        return ""

    def _judge(self, folder: _Folder) -> None:
        listing = Listing(
            path=folder.path,
            prefix=folder.prefix,
            files=folder.files.keys(),
            wanted=sorted(folder.wanted),
            owner=folder.owner,
            run=folder.run,
        )
        for found in judge(listing, links=self.links, pictures=self.pictures):
            key = None if found.skip else folder.files[os.path.basename(found.path)]
            self._rows.append((found, key))

    def _add(self, parts: Parts, path: str, skip: str, *, unknown: bool = False) -> None:
        if self.matches(parts):
            self._rows.append((Found(source=_source(parts), path=path, skip=skip, unknown=unknown), None))


def is_zarr_like(name: str) -> bool:
    """Whether a folder's name is that of an OME-Zarr or of an unfinished output, whatever is in it yet."""
    return ending_of(name) in (".zarr", ".partial") or is_output_part(name)


def _source(parts: Parts) -> str:
    return "/".join(map(shown, parts))


def file_key(path: str) -> Key | None:
    """Device and number of a file, by which one is known under several names; None where it is gone."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _owner(folder: _Folder, entry: os.DirEntry[str], names: set[str]) -> Verdict | None:
    """To what everything in a sub-folder belongs; a MIRAX folder may have lost its ``.mrxs``."""
    owner = owner_of(entry.name, names)
    if owner:
        return f"part of {folder.prefix}{shown(owner)}", False
    if os.path.isfile(os.path.join(entry.path, SLIDEDAT)):
        return f"part of a MIRAX slide whose {shown(entry.name)}.mrxs is not beside its folder", True
    return None


def _owner_by_names(name: str, siblings: Collection[str]) -> Verdict | None:
    owner = owner_of(name, siblings)
    return (f"part of {shown(owner)}", False) if owner else None
