"""Speed and memory of the one-step LoRA generator at full size, against the published program's arrangement.

    python scripts/bench_generator.py [--tiles 8] [--batch 8] [--slide SLIDE --roi Y,X,H,W] [--bundle FILE]

Random weights of SD-Turbo's size, 512 px tiles. Each arrangement runs in a process of its own, so that its
peak memory is its own. ``published``: float32, adapters unmerged, four autoencoders, eager. ``ours``: the
generator as ``convert`` runs it, from a bundle. With ``--slide`` also the pipeline's efficiency: tiles/s of
``convert`` over those of the bare generator.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi_pipeline import convert, load_config
from wsi_pipeline.core.geometry import Region, Size, TileIndex
from wsi_pipeline.core.protocols import Tile, TileBatch
from wsi_pipeline.generators._torch import choose_device, from_uint8, to_uint8
from wsi_pipeline.generators.lora_turbo import LoraTurbo
from wsi_pipeline.models.assemble import adapted_vae, with_adapters
from wsi_pipeline.models.bundle import save_bundle
from wsi_pipeline.models.layout import DIRECTIONS, SD_TURBO_UNET, SD_TURBO_VAE, VAES, meta_unet, meta_vae
from wsi_pipeline.models.lora_turbo import Translator
from wsi_pipeline.models.random_weights import random_weights
from wsi_pipeline.readers.synthetic import SyntheticSlide

SIDE = 512
FULL_SIZE = {"unet_config": SD_TURBO_UNET, "vae_config": SD_TURBO_VAE, "rank_unet": 128, "rank_vae": 4}


def published(tiles: int, batch: int) -> dict[str, Any]:
    """The arrangement of the published program on our own model."""
    device = choose_device("auto")
    weights = random_weights(**FULL_SIZE)
    net = with_adapters(weights, DIRECTIONS)["a2b"].to(device).eval()
    unused = [adapted_vae(weights, VAES[d][1]).decoder.to(device) for d in DIRECTIONS]
    pixels = noise_tiles(batch)

    def run(count: int) -> None:
        with torch.no_grad():
            to_uint8(net(from_uint8(torch.from_numpy(pixels[:count]).to(device))), "truncate").cpu()

    return {**timed(run, batch, tiles), "batch": batch, "unused_parts": len(unused)}


def ours(tiles: int, bundle: Path) -> dict[str, Any]:
    """The generator as the pipeline calls it."""
    generator = LoraTurbo(weights=bundle)
    batch = generator.spec.batch
    where = Region(0, 0, SIDE, SIDE)
    tile = Tile(index=TileIndex(0, 0), read=where, write=where)
    pixels = noise_tiles(batch)

    def run(count: int) -> None:
        generator(TileBatch(tiles=(tile,) * count, pixels_BHWC=pixels[:count], noise_key=0), {})

    facts = generator.prepare(pixels[0], np.ones((SIDE, SIDE), bool), (8.0, 8.0))
    types = {name: facts[name] for name in ("dtype", "unet_dtype")}
    return {**timed(run, batch, tiles), "batch": batch, **types}


def precision(bundle: Path) -> dict[str, Any]:
    """Grey levels between the generator's own types and float32, on two tiles of a made slide."""
    slide = SyntheticSlide(size=Size(2048, 2048), tissue_share=0.9)
    pixels = np.stack([slide.read_level(0, Region(700, x, SIDE, SIDE)) for x in (600, 1000)])
    where = Region(0, 0, SIDE, SIDE)
    tiles = (Tile(index=TileIndex(0, 0), read=where, write=where),) * 2
    given = TileBatch(tiles=tiles, pixels_BHWC=pixels, noise_key=0)
    fast, exact = (LoraTurbo(weights=bundle, dtype=t)(given, {}).astype(int) for t in ("auto", "float32"))
    apart = np.abs(fast - exact)
    return {"mean": apart.mean(), "largest": int(apart.max()), "output_std": exact.std()}


def timed(run: Callable[[int], None], batch: int, tiles: int) -> dict[str, Any]:
    """Tiles/s after a call that warms up (one tile on a CPU), and the process's peak memory in GiB."""
    started = time.perf_counter()
    run(batch if torch.cuda.is_available() else 1)
    first = time.perf_counter() - started
    calls = max(1, round(tiles / batch))
    started = time.perf_counter()
    for _ in range(calls):
        run(batch)
    rate = calls * batch / (time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    vram = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"tiles_per_s": rate, "first_call_s": first, "peak_rss_gib": peak, "peak_vram_gib": vram}


def noise_tiles(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def tera_flop_a_tile() -> float:
    """Multiplications and additions of one tile, adapters merged; counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    vae, local = meta_vae(SD_TURBO_VAE), meta_vae(SD_TURBO_VAE)
    net = Translator(
        unet=meta_unet(SD_TURBO_UNET),
        encoder=vae.encoder,
        decoder=vae.decoder,
        quant_conv=vae.quant_conv,
        post_quant_conv=vae.post_quant_conv,
        local_encoder=local.encoder,
        text=torch.empty(1, 77, 1024, device="meta"),
        scaling_factor=0.18215,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, SIDE, SIDE, device="meta"))
    return counter.get_total_flops() / 1e12


def matmul_peak(dtype: torch.dtype, side: int = 4096, repeats: int = 5) -> float:
    """TFLOP/s of the best of a few square matrix products."""
    device = choose_device("auto")
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        (a @ b).flatten()[0].item()
        best = max(best, 2 * side**3 / (time.perf_counter() - started) / 1e12)
    return best


def pipeline(slide: str, roi: str, bundle: Path) -> dict[str, Any]:
    """Tiles/s of ``convert`` while it makes blocks; weights are loaded before."""
    options = [f"generator.options.weights={bundle}", "generator.name=lora_turbo", "output.zarr.block=1536"]
    settings = load_config(None, [*options, "output.background=white", f"input.roi={roi}"])
    with tempfile.TemporaryDirectory() as folder:
        result = convert(slide, Path(folder) / "out.ome.zarr", settings)
    seconds = result.figures["seconds"]
    return {"tiles_per_s": result.tiles / seconds, "tiles": result.tiles, "seconds": seconds}


def in_own_process(part: str, arguments: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--bundle",
        str(bundle),
        "--tiles",
        str(arguments.tiles),
    ]
    command += ["--batch", str(arguments.batch), "--slide", arguments.slide, "--roi", arguments.roi]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(arguments: argparse.Namespace, bundle: Path) -> None:
    flop = tera_flop_a_tile()
    peaks = {str(t).removeprefix("torch."): matmul_peak(t) for t in (torch.float32, torch.bfloat16)}
    print(f"{flop:.2f} TFLOP a tile; matmul peak {peaks} TFLOP/s; {torch.get_num_threads()} threads")
    rows = {part: in_own_process(part, arguments, bundle) for part in ("published", "ours")}
    for name, row in rows.items():
        achieved = row["tiles_per_s"] * flop
        share = achieved / peaks["float32" if name == "published" else "bfloat16"]
        print(f"{name}: {json.dumps(row)}; {achieved:.3f} TFLOP/s, {share:.0%} of the peak of its type")
    a, b = rows["published"], rows["ours"]
    ratios = {key: b[key] / a[key] for key in ("tiles_per_s", "peak_rss_gib")}
    print(f"ours / published: {json.dumps(ratios)}")
    row = in_own_process("precision", arguments, bundle)
    print(f"own types against float32, grey levels: {json.dumps(row)}")
    if arguments.slide:
        row = in_own_process("pipeline", arguments, bundle)
        print(f"pipeline: {json.dumps(row)}; efficiency {row['tiles_per_s'] / b['tiles_per_s']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="of the published arrangement")
    parser.add_argument("--slide", default="")
    parser.add_argument("--roi", default="")
    parser.add_argument("--bundle", type=Path, help="full-size bundle; made where it is missing (4.3 GB)")
    parser.add_argument(
        "--part", choices=["published", "ours", "precision", "pipeline"], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.part:
        run = {
            "published": lambda: published(arguments.tiles, arguments.batch),
            "ours": lambda: ours(arguments.tiles, arguments.bundle),
            "precision": lambda: precision(arguments.bundle),
            "pipeline": lambda: pipeline(arguments.slide, arguments.roi, arguments.bundle),
        }
        print(json.dumps(run[arguments.part]()))
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or Path(folder) / "full.safetensors"
        if not bundle.exists():
            save_bundle(random_weights(**FULL_SIZE), bundle)
        report(arguments, bundle)


if __name__ == "__main__":
    main()
