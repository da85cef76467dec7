"""Slow: forty slides in every way of running them, and three hundred in a row with flat memory."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
from run_helpers import contents, make_slide, records, run

from wsi_pipeline.core.geometry import Size
from wsi_pipeline.readers.synthetic import SyntheticSlide
from wsi_pipeline.writers.ometiff import TiffConfig, export_ometiff

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FORTY = 40


@pytest.fixture(scope="module")
def forty(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real small slides, every broken one, and generated ones up to forty files."""
    folder = tmp_path_factory.mktemp("forty")
    for source in sorted((data_dir / "slides").iterdir()):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name)
    shutil.copytree(data_dir / "broken", folder / "broken")
    there = len(list(folder.iterdir())) - 1 + len(list((folder / "broken").iterdir()))
    for seed in range(FORTY - there - 3):
        make_slide(folder / "made" / f"s{seed}.ome.tif", seed, side=1200 + 50 * seed)
    make_slide(folder / "made" / "glass.ome.tif", 99, tissue=0.0)
    cut = make_slide(folder / "made" / "cut.ome.tif", 100)
    cut.write_bytes(cut.read_bytes()[:40_000])
    (folder / "notes.txt").write_text("no slide")
    return folder


def test_forty_slides_in_every_way(forty: Path, tmp_path: Path) -> None:
    ways = {
        "inline": ("directory.executor=inline",),
        "processes": ("directory.executor=processes", "run.workers=2"),
        "dask": ("directory.executor=dask", "run.workers=2"),
    }
    made = {}
    for way, chosen in ways.items():
        assert run(forty, tmp_path / way, *chosen).exit_code == 3
        made[way] = contents(tmp_path / way)
        print(f"\n{way}: {len(made[way])} done")
    assert len(records(tmp_path / "inline")) == FORTY
    assert len(made["inline"]) >= 20
    assert made["inline"] == made["processes"] == made["dask"]
    found = records(tmp_path / "processes")
    for record in found.values():
        print(f"{record.status:8}{record.source}: {record.reason[:150]}")
        assert record.status in ("done", "failed", "skipped")
        assert record.reason or record.status == "done"
    bad = {"broken/lfs_pointer_a.tiff", "broken/unopenable.tiff", "broken/unreadable.svs", "made/cut.ome.tif"}
    assert all(found[name].status == "failed" for name in bad)
    largest = max((forty / "made").glob("s*.tif"), key=lambda path: path.stat().st_size)
    run(str(largest).replace(".ome", "*"), tmp_path / "split", ways["processes"][0], "run.workers=2")
    assert list(contents(tmp_path / "split").values()) == [made["inline"][f"made/{largest.name}"]]


def test_three_hundred_slides_leave_memory_and_files_flat(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for seed in range(6):
        slide = SyntheticSlide(size=Size(1100, 1050), tissue_share=0.4, seed=seed)
        export_ometiff(slide, source / f"base{seed}.ome.tif", TiffConfig())
    for number in range(294):  # copies of one content would be one file only as hard links
        shutil.copy(source / f"base{number % 6}.ome.tif", source / f"s{number:03}.ome.tif")
    looks: list[tuple[float, int, int, int, int]] = []
    me, ended = psutil.Process(), threading.Event()

    def look() -> None:
        while not ended.wait(2.0):
            lanes = [child for child in me.children() if "spawn_main" in " ".join(child.cmdline())]
            if len(lanes) == 2:
                workers = [(lane.memory_info().rss, lane.num_fds()) for lane in lanes]
                top = max(rss for rss, _ in workers), max(fds for _, fds in workers)
                looks.append((time.monotonic(), me.memory_info().rss, me.num_fds(), *top))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        result = run(
            source, tmp_path / "out", "directory.executor=processes", "run.workers=2", "output.qc=false"
        )
    finally:
        ended.set()
        watcher.join()
    assert result.counts == {"done": 300}
    third = len(looks) // 3
    for name, column in (("parent RSS", 1), ("parent files", 2), ("worker RSS", 3), ("worker files", 4)):
        early = max(line[column] for line in looks[third : 2 * third])
        late = max(line[column] for line in looks[2 * third :])
        print(f"\n{name}: {early:,} then {late:,}")
        assert late <= early * 1.1 + (2 if "files" in name else 8e6)
