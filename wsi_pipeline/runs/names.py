"""Names that a run makes from names that it found: for people, for its records, for its outputs.

Why not the names as they are. A file name is bytes: it may hold line breaks, characters that turn the text
around it, or no valid UTF-8 at all, and a table may say ``../..`` or ``C:``. What a run shows, and where it
writes, is made of harmless characters only; the file itself is still opened under its own name.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection

from wsi_pipeline.readers._base import slide_name

__all__ = ["OutputNames", "key_of", "output_name", "shown"]

LONGEST_KEY = 80
LONGEST_NAME = 200
"""Bytes of an output's name; file systems take 255, and an output's side files add up to 50."""

_KEY_DIGITS = 12
_SPOKEN = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_FORBIDDEN = re.compile(r'[<>:"|?*\\]')
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\.|$)")
_ANOTHERS = re.compile(r"(?i)\.(zarr|tiff?|partial|old|lock|export|new)$")


def shown(name: str) -> str:
    """A file name as one line of text; different names stay different.

    Bytes that are no UTF-8 read ``\\xff``, unprintable characters ``\\u202e``; in a name that has any of
    them, or a backslash, backslashes are doubled.
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(map(_spoken, name))


def _spoken(character: str) -> str:
    if character in _SPOKEN:
        return _SPOKEN[character]
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def key_of(source: str) -> str:
    """A file name for what a run keeps about ``source``: at most 80 letters, digits, ``_`` and ``-``.

    The digest at its end tells sources apart that read alike. It has 12 digits, not 8: names in another
    script leave nothing but the digest, and of 100,000 such files two would share 8 digits.
    """
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_DIGITS]
    plain = unicodedata.normalize("NFKD", source).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "_", plain).strip("_")
    slug = slug[-(LONGEST_KEY - _KEY_DIGITS - 1) :].strip("_")
    return f"{slug}-{digest}" if slug else digest


def output_name(source: str, ending: str, taken: Collection[str]) -> str:
    """Where the output of ``source`` goes, relative to the run's target; not among ``taken``.

    ``sub/a.svs`` gives ``sub/a`` + ``ending`` (``.ome.zarr``); where that is taken, in whatever case,
    ``sub/a.svs`` + ``ending``, then ``sub/a.svs-2`` and so on. For many names use ``OutputNames``.
    """
    return OutputNames(taken).add(source, ending)


class OutputNames:
    """The outputs of a run: each name is given once, also where a file system takes ``A`` for ``a``."""

    def __init__(self, taken: Collection[str] = ()) -> None:
        self._taken = {_folded(name) for name in taken}

    def add(self, source: str, ending: str) -> str:
        """A new output's name, as in ``output_name``; it is taken from now on."""
        *folders, name = _components(source)
        where = [_component(folder, "") for folder in folders]
        number = 1
        stems = [slide_name(name), name]
        while True:
            stem = stems.pop(0) if stems else f"{name}-{(number := number + 1)}"
            found = "/".join((*where, _component(stem, ending, source=source)))
            if _folded(found) not in self._taken:
                self._taken.add(_folded(found))
                return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _components(source: str) -> list[str]:
    """Folders and name of a source; of an absolute path or a URL only the name."""
    if "://" in source:
        source = source.split("?", 1)[0].split("#", 1)[0]
    parts = [part for part in source.split("/") if part.strip(" .")]
    if "://" in source or os.path.isabs(source):
        parts = parts[-1:]
    return parts or ["slide"]


def _component(name: str, ending: str, *, source: str = "") -> str:
    """One component of an output's path that every file system takes, ending in ``ending``."""
    name = unicodedata.normalize("NFC", name)
    name = "".join(c if c.isprintable() and not _FORBIDDEN.match(c) else "_" for c in name).strip(" ")
    if name.startswith("."):
        name = "_" + name[1:]
    if not ending:
        name = re.sub(r"[ .]$", "_", name)
        if _ANOTHERS.search(name):  # a folder must not lie where an output or its side file goes
            name += "_"
    if device := _DEVICES.match(name + ending):
        name = f"{device[1]}_{name[len(device[1]) :]}"
    name = name or "slide"
    room = LONGEST_NAME - len(ending.encode())
    if len(name.encode()) > room:
        digest = hashlib.sha256(f"{name}\n{source}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name.encode()[: room - 9].decode('utf-8', 'ignore').rstrip(' .')}-{digest}"
    return name + ending
