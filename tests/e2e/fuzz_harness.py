"""Runs damaged slides through ``plan`` in child processes, and judges what comes back.

A child plans many files in turn, so that its start is paid once; where it dies, hangs or grows, the file in
hand is to blame and a new child goes on with the next one.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutate import Mutant, mutate

from wsi_pipeline.readers._base import slide_name

__all__ = ["BYTES_LIMIT", "SECONDS_LIMIT", "Base", "Verdict", "fuzz", "table"]

SECONDS_LIMIT = 20.0
BYTES_LIMIT = 2_000_000_000
_FILES_A_CHILD = 25
_POLL = 0.05
_NOISE = 2000
"""Bytes on standard error that make a flood; libtiff says a line or two that nobody can turn off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A sound slide; ``mpp`` is given to the plan where the file states none."""

    path: Path
    mpp: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a mutant did: ``outcome`` is ``plan``, the class of a clean error, or the kind of a finding.

    ``peak`` in bytes; ``noise``: lines that C libraries wrote to standard error.
    """

    mutant: Mutant
    outcome: str
    message: str
    seconds: float
    peak: int
    noise: int
    is_finding: bool


class Child:
    """One process that plans files; ``ask`` gives its answer, or the reason why there is none."""

    def __init__(self, folder: Path) -> None:
        self._stderr = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-W", "default", str(Path(__file__).with_name("fuzz_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.asked = 0
        assert self._process.stdout
        if self._process.stdout.readline() != b"ready\n":  # imports are no part of a file's time
            self._stderr.seek(0)
            raise RuntimeError(self._stderr.read().decode(errors="replace"))

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """The answer, with what the child wrote to standard error meanwhile as ``noise``."""
        assert self._process.stdin and self._process.stdout
        before = self._stderr.seek(0, os.SEEK_END)
        started = time.monotonic()
        answer: dict[str, Any] | None = None
        peak = 0
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = {"outcome": "died", "message": "before it was asked"}
        self.asked += 1
        while answer is None:
            ready, _, _ = select.select([self._process.stdout], [], [], _POLL)
            peak = max(peak, self._resident())
            if ready:
                line = self._process.stdout.readline()
                code = None if line else self._process.wait()
                answer = json.loads(line) if line else {"outcome": "died", "message": f"exit {code}"}
            elif time.monotonic() - started > SECONDS_LIMIT:
                answer = {"outcome": "hung", "message": f"no answer in {SECONDS_LIMIT:.0f} s"}
            elif peak > BYTES_LIMIT:
                answer = {"outcome": "memory", "message": f"{peak >> 20} MiB"}
        measured = {"seconds": time.monotonic() - started, "peak": peak}
        if answer["outcome"] in ("died", "hung", "memory"):
            self._process.kill()
            self._process.wait()
        self._stderr.seek(before)
        return measured | answer | {"noise": self._stderr.read().decode(errors="replace")}

    def _resident(self) -> int:
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGESIZE")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was written and never read
                    pipe.close()


def fuzz(bases: list[Base], seeds: Iterable[int], folder: Path) -> Iterator[Verdict]:
    """A verdict for each seed; the base files take turns."""
    child: Child | None = None
    try:
        for seed in seeds:
            base = bases[seed % len(bases)]
            mutant = mutate(base.path, folder / f"{seed:06d}", seed)
            if child is not None and (not child.is_alive or child.asked >= _FILES_A_CHILD):
                child.stop()
                child = None
            child = child or Child(folder)
            # Every third is asked as it is; the others go on past a damaged pixel size or an odd stain.
            forced = seed // len(bases) % 3 != 0
            mpp = 0.5 if forced else base.mpp
            task = {"path": str(mutant.path), "mpp": mpp, "stain": "any" if forced else "h&e"}
            yield judge(mutant, child.ask(task))
            shutil.rmtree(mutant.path.parent)
    finally:
        if child is not None:
            child.stop()


def judge(mutant: Mutant, answer: dict[str, Any]) -> Verdict:
    """Clean: one line that names the slide, in time and memory, without traceback, warning or flood."""
    outcome, message = answer["outcome"], answer["message"]
    if outcome not in ("plan", "died", "hung", "memory", "raised"):
        if "\n" in message or not message:
            outcome = f"{outcome} of several lines"
        elif slide_name(str(mutant.path)) not in message:
            outcome = f"{outcome} that names no file"
    if answer["peak"] > BYTES_LIMIT and outcome != "memory":
        outcome = f"{outcome}, large"
    noise = answer["noise"]
    if len(noise) > _NOISE or "Traceback" in noise or "Warning" in noise:
        outcome, message = f"{outcome}, noisy", f"{message} || {noise[:2000]}"
    return Verdict(
        mutant=mutant,
        outcome=outcome,
        message=message,
        seconds=answer["seconds"],
        peak=answer["peak"],
        noise=noise.count("\n"),
        is_finding=outcome != "plan" and not outcome.endswith("Error"),
    )


def table(verdicts: list[Verdict]) -> str:
    """Outcomes by kind of damage, the longest and the largest, and every finding."""
    kinds = sorted({v.mutant.kind for v in verdicts})
    counts = Counter((v.mutant.kind, v.outcome) for v in verdicts)
    outcomes = sorted({v.outcome for v in verdicts})
    width = max(map(len, kinds))
    lines = [f"{'':{width}}  " + "  ".join(outcomes)]
    for kind in [*kinds, "all"]:
        cells = (
            counts[kind, name] if kind != "all" else sum(n for (_, o), n in counts.items() if o == name)
            for name in outcomes
        )
        row = "  ".join(f"{n:>{len(name)}}" for n, name in zip(cells, outcomes, strict=True))
        lines.append(f"{kind:{width}}  {row}")
    longest, largest = max(verdicts, key=lambda v: v.seconds), max(verdicts, key=lambda v: v.peak)
    lines.append(f"longest {longest.seconds:.1f} s ({longest.mutant.key}: {longest.mutant.what})")
    lines.append(f"largest {largest.peak / 1e6:.0f} MB ({largest.mutant.key}: {largest.mutant.what})")
    lines.append(f"{sum(v.noise for v in verdicts)} lines of C libraries on standard error")
    for v in verdicts:
        if v.is_finding:
            lines.append(f"FINDING {v.mutant.key} ({v.mutant.what}): {v.outcome}: {v.message}")
    return "\n".join(lines)
