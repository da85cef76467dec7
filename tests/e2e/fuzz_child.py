"""Plans the slides that are named on standard input, one JSON line each on standard output.

A line in: ``{"path": ..., "mpp": ... or null, "stain": ...}``. A line out: outcome, message, seconds, and the
peak of resident memory since the file was begun. What is no clean error is told with its traceback.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from wsi_pipeline.api import plan
from wsi_pipeline.errors import WsiPipelineError
from wsi_pipeline.pipeline.settings import ConvertConfig, InputConfig
from wsi_pipeline.readers._cache import TILE_CACHE

__all__ = ["main"]


def peak_bytes() -> int:
    """Peak resident memory (VmHWM) since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def judge(task: dict[str, Any]) -> dict[str, Any]:
    config = ConvertConfig(input=InputConfig(mpp=task["mpp"], stain=task["stain"]))
    try:
        found = plan(task["path"], config)
    except WsiPipelineError as error:
        return {"outcome": type(error).__name__, "message": str(error)}
    except BaseException as error:  # the point of the exercise: whatever it is, it is told
        return {"outcome": "raised", "message": f"{type(error).__name__}: {traceback.format_exc()[-3000:]}"}
    size = found.survey.plan.grid.size
    tiles = found.estimate.tiles
    found.slide.close()
    return {"outcome": "plan", "message": f"{size.height} x {size.width} px, {tiles} tiles"}


def main() -> None:
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write("ready\n")
    for line in sys.stdin:
        task = json.loads(line)
        reset_peak()
        started = time.perf_counter()
        answer = judge(task)
        answer |= {"seconds": time.perf_counter() - started, "peak": peak_bytes()}
        TILE_CACHE.clear()
        gc.collect()
        sys.stderr.flush()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
