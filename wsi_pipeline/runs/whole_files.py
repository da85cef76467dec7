"""Files of a run that are replaced in one step, so that nobody ever reads half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from wsi_pipeline.pipeline.outputs import mapped

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file; raises OutputError where that fails, and then leaves the earlier file as it was.

    The new bytes lie beside it under a name of their own: two writers never share one.
    """
    fresh = path.with_name(f".{uuid.uuid4().hex}.new")
    with mapped(path):
        try:
            fresh.write_bytes(content)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
