"""Memory is bounded by blocks and look-ahead, not by the slide's area."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
from pathlib import Path
from wsi_pipeline.config import load_config
from wsi_pipeline.core.geometry import Size
from wsi_pipeline.pipeline.convert import convert_slide
from wsi_pipeline.readers.synthetic import SyntheticSlide
side, out = int(sys.argv[1]), Path(sys.argv[2])
config = load_config(None, ["generator.name=identity", "output.background=white", "output.qc=false"])
result = convert_slide(SyntheticSlide(size=Size(side, side), mpp=(0.25, 0.25), tissue_share=0.3), out, config)
# Not getrusage: its maximum includes the process that forked this one, which may have torch in memory.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"peak_mib": peak, "tiles": result.tiles, "seconds": result.seconds}))
"""


def peak(side: int, out: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(side), str(out)], capture_output=True, text=True, check=True
    )
    print(side, done.stdout)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_slide_of_400_megapixels_stays_under_the_ceiling(tmp_path: Path) -> None:
    assert peak(20_000, tmp_path / "a.ome.zarr")["peak_mib"] < 1500


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_36_times_the_area_takes_little_more(tmp_path: Path) -> None:
    """Measured 1.3 times: three more pyramid levels are open at once, and the overview is larger."""
    small = peak(20_000, tmp_path / "small.ome.zarr")["peak_mib"]
    large = peak(120_000, tmp_path / "large.ome.zarr")["peak_mib"]
    assert large < 1500
    assert large / small < 1.4
