"""Weights as files: import published checkpoints, export them again, fetch the base model, show a bundle.

What ``wsi-pipeline models`` does, as functions. torch, diffusers and transformers are imported on use.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.bundle import BundleFacts, check_target, load_bundle, save_bundle
from wsi_pipeline.models.hub import SD_TURBO, fetch_base, find_base, load_base
from wsi_pipeline.models.prompts import PROMPTS, embed_prompts
from wsi_pipeline.translators.bundle import TranslatorFacts, load_any_facts, save_translator

if TYPE_CHECKING:
    from wsi_pipeline.models.base_model import Base
    from wsi_pipeline.models.layout import Direction
    from wsi_pipeline.models.weights import Imported, Prompt
    from wsi_pipeline.translators.importers import Kind

__all__ = [
    "MPP",
    "PROMPTS",
    "SD_TURBO",
    "TILE",
    "Fetched",
    "ImportResult",
    "export_model",
    "fetch_model",
    "import_foreign",
    "import_model",
    "show_model",
]

MPP = 0.5
"""µm per pixel that published weights are taken to be trained at, as no file states it (20x)."""

TILE = 512
"""Side in pixels of the images that the published model was trained on."""

FRAMEWORKS = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub")

BASE_LICENCE = (
    "SD-Turbo, the base model, is under the Stability AI Community License: non-commercial use, and "
    "commercial use below a limit of revenue (https://stability.ai/license)."
)
LICENCES = {
    "diffusion-ffpe": (
        "Diffusion-FFPE's code is MIT; its weights come without a stated licence and were trained with "
        "CONCH (CC-BY-NC-ND 4.0: non-commercial; its terms count models trained on its outputs as "
        "derivatives)."
    ),
}
OTHER_LICENCE = "img2img-turbo's code is MIT; ask the author of these weights for theirs."


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """A new bundle; ``notices``: what the user should know about the file that was imported."""

    facts: BundleFacts | TranslatorFacts
    notices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A base model in the Hugging Face cache; ``size_bytes`` of its files."""

    hub_id: str
    folder: Path
    size_bytes: int

    @property
    def is_default(self) -> bool:
        """Whether ``import_model`` takes this one unless told otherwise."""
        return self.hub_id == SD_TURBO


def import_model(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path = SD_TURBO,
    mpp: float = MPP,
    tile: int = TILE,
    prompts: Mapping[Direction, str] = PROMPTS,
    overwrite: bool = False,
) -> ImportResult:
    """Make a bundle of a published checkpoint and the base model that it was trained on.

    ``base``: folder or hub id; ``mpp``: µm per pixel and ``tile``: pixels that the weights were trained with;
    ``prompts``: caption of each direction, which must be those of the training. Raises ConfigError, and
    CheckpointError for a file or base that does not fit.
    """
    _need_frameworks()
    from wsi_pipeline.models.checkpoint_file import read_checkpoint
    from wsi_pipeline.models.lora_turbo import SIZE_MULTIPLE
    from wsi_pipeline.models.published import import_checkpoint
    from wsi_pipeline.models.weights import TurboWeights, tensors_digest

    _check_size(mpp, tile, SIZE_MULTIPLE)
    check_target(Path(out), overwrite)
    folder = find_base(base)
    read_checkpoint(checkpoint)  # a wrong file is told before minutes go into reading the base
    loaded_base = load_base(base)
    found = import_checkpoint(checkpoint, loaded_base)
    weights = TurboWeights(
        layout=found.layout,
        tensors=found.tensors,
        unet_scale=found.unet_scale,
        vae_scale=found.vae_scale,
        prompts=_embedded(folder, loaded_base, found, prompts),
        base_name=loaded_base.name,
        base_digest=loaded_base.digest,
        source=found.source,
        licence=f"{BASE_LICENCE} {LICENCES.get(found.source, OTHER_LICENCE)}",
        mpp=mpp,
        tile=tile,
        digest=tensors_digest(found.tensors),
    )
    return ImportResult(facts=save_bundle(weights, out, overwrite), notices=found.notices)


def import_foreign(
    checkpoint: str | Path,
    out: str | Path,
    *,
    kind: Kind,
    options: Any = None,
    mpp: float = MPP,
    tile: int | None = None,
    overwrite: bool = False,
) -> ImportResult:
    """Make a translator's file of a checkpoint of another program: ``adm``, ``i2sb`` or ``pix2pix``.

    ``options``: how it was trained, of ``importers.OPTIONS[kind]``; ``mpp``, ``tile``: as of
    ``import_model``, None: what the network was made for. Raises ConfigError, and CheckpointError for a file
    that does not fit.
    """
    _need_frameworks()
    from wsi_pipeline.translators.importers import import_translator

    check_target(Path(out), overwrite)
    found = import_translator(checkpoint, kind=kind, options=options)
    spec = replace(found.spec, mpp=mpp, tile=found.spec.tile if tile is None else tile)
    _check_size(mpp, spec.tile, spec.multiple)
    return ImportResult(facts=save_translator(spec, found.tensors, out, overwrite), notices=found.notices)


def export_model(bundle: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a bundle as the published program's ``model.pkl``.

    Raises ConfigError where ``out`` exists (without ``overwrite``), and CheckpointError.
    """
    _need_frameworks()
    from wsi_pipeline.models.published import export_published

    path = Path(out)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: exists; choose another name, or replace the file with --overwrite")
    export_published(load_bundle(bundle), path)
    return path


def fetch_model(hub_id: str = SD_TURBO) -> Fetched:
    """Download a base model into the Hugging Face cache; CheckpointError says what to do where it cannot."""
    _need_frameworks()
    folder = fetch_base(hub_id)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Fetched(hub_id=hub_id, folder=folder, size_bytes=size)


def show_model(bundle: str | Path) -> BundleFacts | TranslatorFacts:
    """What a bundle is; its tensors are not read. Raises CheckpointError."""
    return load_any_facts(bundle)


def _need_frameworks() -> None:
    if lacking := [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"wsi-pipeline models: needs {', '.join(lacking)}; "
            "in its folder, pip install -c constraints.txt '.[models]'"
        )


def _check_size(mpp: float, tile: int, multiple: int) -> None:
    if not (math.isfinite(mpp) and 0.05 <= mpp <= 5):
        raise ConfigError(f"--mpp {mpp}: is no pixel size of tissue; give µm per pixel, e.g. {MPP} for 20x")
    if tile < multiple or tile % multiple:
        below, above = (tile // multiple + k for k in (0, 1))
        nearest = " or ".join(str(count * multiple) for count in (below, above) if count > 0)
        raise ConfigError(f"--tile {tile}: is not a multiple of {multiple}; give {nearest or multiple}")


def _embedded(
    folder: Path, base: Base, found: Imported, prompts: Mapping[Direction, str]
) -> dict[Direction, Prompt]:
    """Captions with embeddings of the directions that the weights have."""
    from wsi_pipeline.models.layout import DIRECTIONS, VAES

    directions = [d for d in DIRECTIONS if VAES[d][0] in found.layout.vaes]
    embedded = embed_prompts(folder, [prompts[d] for d in directions])
    width, wanted = embedded[0].embedding.shape[-1], int(base.unet_config["cross_attention_dim"])
    if width != wanted:
        raise CheckpointError(
            f"{folder}: its text encoder makes embeddings of width {width}, its UNet takes {wanted}; "
            "copy both from the same model"
        )
    return dict(zip(directions, embedded, strict=True))
