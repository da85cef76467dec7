"""The story on one page: one band of one slide, from native pixels to committed blocks.

    slide -> SlideView -> TileBatch -> Generator -> Stitcher -> blend -> PyramidBuilder -> writer + ledger

Each arrow is a lazy stream; reading, blending and writing run in threads a few items ahead, the generator in
a thread of its own and the bookkeeping in the caller's. Every stream is bounded, so memory is too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wsi_pipeline.core.batching import groups, read_batch
from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.plan import Band, SlidePlan
from wsi_pipeline.core.protocols import (
    U8_BHWC,
    U8_HWC,
    Block,
    Context,
    Generator,
    Slide,
    TileBatch,
    View,
)
from wsi_pipeline.core.pyramid import BlockKey, PyramidBuilder
from wsi_pipeline.core.stitch import Gather, Stitcher, blend
from wsi_pipeline.errors import GeneratorContractError
from wsi_pipeline.generators import make_generator
from wsi_pipeline.pipeline.events import Emit, Progress, ignore
from wsi_pipeline.pipeline.memory import settle_memory
from wsi_pipeline.pipeline.prefetch import ordered_map
from wsi_pipeline.pipeline.settings import GeneratorConfig, InputConfig
from wsi_pipeline.readers.lattice import SlideView
from wsi_pipeline.writers.ledger import Ledger
from wsi_pipeline.writers.manifest import environment
from wsi_pipeline.writers.omezarr import OmeZarrWriter

__all__ = ["Job", "JobReport", "run_band"]

READ_AHEAD = 3
GENERATE_AHEAD = 2  # the device works on the next batch while this one is stitched
BLEND_AHEAD = 2
WRITE_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one worker needs to know; picklable, never carries pixels or weights.

    ``done``: blocks that earlier runs committed and whose checksums still hold; ``batch``: constant
    batch size; ``name``: of this job's ledger.
    """

    slide: Slide
    plan: SlidePlan
    band: Band | None
    generator: GeneratorConfig
    input: InputConfig
    writer: OmeZarrWriter
    ledgers: Path
    name: str
    done: frozenset[BlockKey]
    batch: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """What one job did; ``seconds`` is wall time."""

    slide_id: str
    band: Band | None
    blocks: int
    tiles: int
    seconds: float


def run_band(job: Job, emit: Emit = ignore) -> JobReport:
    """Make and commit every block of a band that is not done yet, and each parent that they complete."""
    started, plan = time.perf_counter(), job.plan
    settle_memory()
    mine = plan.blocks(job.band)
    todo = {index for index in mine if (0, index) not in job.done}
    tiles = plan.tiles_for(todo)
    view = SlideView(job.slide, plan.mpp, icc=job.input.icc)
    generator = make_generator(job.generator.name, job.generator.options)
    background = background_reader(plan, view, generator)
    pyramid = PyramidBuilder(plan.shape, plan.blocks(), mine, job.done, job.writer.read)
    ledger = Ledger.open(job.ledgers / f"{job.name}.jsonl", plan.fingerprint, environment())
    total, taken, committed = len(tiles) + _blocks_to_write(job), 0, 0

    def advance(steps: int) -> None:
        nonlocal taken
        taken += steps
        emit(Progress(slide_id=plan.slide_id, done=taken, total=total))

    try:
        with (
            ThreadPoolExecutor(job.threads, "read") as readers,
            ThreadPoolExecutor(1, "generate") as generate,
            ThreadPoolExecutor(job.threads, "blend") as blenders,
            ThreadPoolExecutor(job.threads, "write") as writers,
        ):
            batches = ordered_map(
                readers,
                lambda group: read_batch(view, group, job.batch, plan.noise_key),
                groups(tiles, job.batch),
                job.threads + READ_AHEAD,
            )
            results = ordered_map(
                generate, lambda b: (b, checked(generator, b, plan.context)), batches, GENERATE_AHEAD
            )
            gathers = _gathers(Stitcher(plan, todo), results, advance)
            blocks = ordered_map(blenders, lambda g: blend(g, background), gathers, BLEND_AHEAD)
            finished = itertools.chain(
                pyramid.resume(), (done for block in blocks for done in pyramid.put(block))
            )
            commits = ordered_map(writers, lambda b: _commit(job.writer, b), finished, WRITE_AHEAD)
            for key, checksum in commits:
                ledger.record(key, checksum)
                committed += 1
                advance(1)
    finally:
        ledger.close()
    return JobReport(
        slide_id=plan.slide_id,
        band=job.band,
        blocks=committed,
        tiles=len(tiles),
        seconds=time.perf_counter() - started,
    )


def background_reader(plan: SlidePlan, view: View, generator: Generator) -> Callable[[Region], U8_HWC] | None:
    """How the pixels that no tile covers are read; None means white."""
    if plan.background == "white":
        return None
    if plan.background == "source":
        return view.read
    return lambda region: generator.background(view.read(region), plan.context)


def _blocks_to_write(job: Job) -> int:
    return sum(key not in job.done for key in job.plan.block_keys(job.band))


def checked(generator: Generator, batch: TileBatch, context: Context) -> U8_BHWC:
    """Call the generator and hold it to its promise on shape and dtype."""
    generated = generator(batch, context)
    expected = batch.pixels_BHWC
    if generated.shape != expected.shape or generated.dtype != expected.dtype:
        raise GeneratorContractError(
            f"generator {generator.spec.kind}: returned {generated.dtype} {generated.shape}, promised "
            f"{expected.dtype} {expected.shape}; the generator has to be corrected",
            spec=generator.spec,
        )
    return generated


def _gathers(
    stitcher: Stitcher, results: Iterable[tuple[TileBatch, U8_BHWC]], advance: Callable[[int], None]
) -> Iterator[Gather]:
    yield from stitcher.ready()
    for batch, generated in results:
        advance(len(batch.tiles))
        yield from stitcher.put(batch, generated)


def _commit(writer: OmeZarrWriter, block: Block) -> tuple[BlockKey, int]:
    return (block.level, block.index), writer.write(block)
