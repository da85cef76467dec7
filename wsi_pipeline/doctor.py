"""Is everything here that a conversion needs?"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.readers import READERS
from wsi_pipeline.writers.manifest import environment

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; ``remedy`` is empty where nothing has to be done."""

    part: str
    ok: bool
    state: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Versions, readers, devices and disk, in that order. Nothing is changed."""
    return [_versions(), *_readers(), _devices(), _memory(), _disk()]


def _versions() -> Finding:
    listed = ", ".join(f"{name} {version}" for name, version in environment().items())
    return Finding(part="versions", ok=True, state=listed)


def _readers() -> list[Finding]:
    findings = []
    for name, home in READERS.items():
        try:
            importlib.import_module(home.partition(":")[0])
            findings.append(Finding(part=f"reader {name}", ok=True, state="loads"))
        except (ImportError, OSError) as error:
            findings.append(
                Finding(
                    part=f"reader {name}",
                    ok=False,
                    state=" ".join(str(error).split()),
                    remedy="reinstall the package: pip install --force-reinstall wsi-pipeline",
                )
            )
    return findings


def _devices() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    state = f"{cores} CPU cores ({platform.machine()})"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Finding(
            part="devices",
            ok=True,
            state=f"{state}; torch is not installed, which only learned generators need",
            remedy="for learned generators: in its folder, pip install -c constraints.txt '.[models]'",
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding(part="devices", ok=True, state=f"{state}; GPUs: {', '.join(names) or 'none'}")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    enough = total >= 4
    remedy = "" if enough else "lower output.zarr.block to 1024 and run.threads to 1"
    return Finding(part="memory", ok=enough, state=f"{total:.1f} GiB", remedy=remedy)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    enough = free >= 5
    remedy = "" if enough else "free space: a 100,000 x 100,000 px slide needs about 15 GB"
    return Finding(part="disk", ok=enough, state=f"{free:.1f} GB free in this folder", remedy=remedy)
