"""Words that this program itself writes: where they stand in an output, they prove nothing.

The list is not kept by hand. What an output can say is what stands in the package's own string constants
(docstrings aside) and field names, in its sRGB profile, and in the formats' own vocabulary. A word of a slide
that is also one of these (``Image``, ``aperio``, and, alas, a patient called Green) is not searched for alone
but only as part of its whole value; the audit says how many there were.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from wsi_pipeline.audit.texts import icc_texts
from wsi_pipeline.readers.icc import srgb_profile
from wsi_pipeline.writers.manifest import environment

__all__ = ["WORD", "own_text", "own_versions", "own_words"]

WORD = re.compile(r"[^\W_]+")
PACKAGE = Path(__file__).resolve().parents[1]

# What libraries write for us: each group with its writer.
_FORMATS = (
    "zarr format node type attributes shape chunk grid regular configuration codecs data dimension names "
    "storage transformers fill value uint8 crc32c blosc zstd bitshuffle",  # tensorstore, zarr.json
    "jfif exif adobe ihdr idat iend text photoshop",  # Pillow: names of segments and chunks
    "true false null none infinity nan utf html head body meta charset",  # json, HTML
    "white reflective transmissive rgb black pixel pixels micron microns inch centimeter",  # units, ICC
)


@lru_cache(maxsize=1)
def own_text() -> str:
    """Everything that the program can write, folded to lower case, one constant a line."""
    pieces = [*_FORMATS, *icc_texts(srgb_profile())]
    for path in sorted(PACKAGE.rglob("*.py")):
        pieces += _constants(ast.parse(path.read_text(encoding="utf-8")))
    return "\n".join(pieces).casefold()


@lru_cache(maxsize=1)
def own_words() -> frozenset[str]:
    return frozenset(WORD.findall(own_text().replace("_", " ")))


@lru_cache(maxsize=1)
def own_versions() -> frozenset[str]:
    """Versions that a manifest names."""
    return frozenset(environment().values())


def _constants(tree: ast.Module) -> Iterator[str]:
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(id(node.value))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
