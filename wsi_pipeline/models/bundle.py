"""Our own weights file: one ``.safetensors`` that holds all that a generator needs at run time.

Tensors have their canonical names (``layout``), adapters apart from what they adapt; the prompts' embeddings
are ``prompt.a2b`` and ``prompt.b2a``, so no text encoder is needed. The metadata holds ``notice`` for people
and ``wsi_pipeline``, one JSON document with everything else.

Why tensors of equal content are stored once, with a table of aliases: the four autoencoders share their base.
torch is imported on use: planning and ``wsi-pipeline models show`` read the facts without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline._version import __version__
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.tensor_file import Header, StoredTensors, read_header, stored_once, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_pipeline.models.layout import Direction, Layout
    from wsi_pipeline.models.weights import TurboWeights

__all__ = ["BundleFacts", "check_target", "load_bundle", "load_facts", "save_bundle"]

FORMAT = 1
KEY = "wsi_pipeline"
ENDING = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What a bundle is, without its tensors; most fields are those of ``TurboWeights`` and ``Layout``.

    ``prompts``: direction -> caption; ``digest``: of the tensors alone; ``identity``: of all that decides
    a pixel (tensors, configurations, scales, embeddings); ``created_by``: program and version.
    """

    path: Path
    size_bytes: int
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    rank_unet: int
    rank_vae: int
    vaes: tuple[str, ...]
    unet_scale: float
    vae_scale: float
    prompts: Mapping[str, str]
    base_name: str
    base_digest: str
    source: str
    licence: str
    mpp: float
    tile: int
    digest: str
    identity: str
    created_by: str

    @property
    def directions(self) -> tuple[str, ...]:
        """``a2b`` (fresh-frozen to FFPE), ``b2a``, or both."""
        return tuple(self.prompts)


def save_bundle(weights: TurboWeights, path: str | Path, overwrite: bool = False) -> BundleFacts:
    """Write a bundle, all of it or nothing, and return its facts.

    Raises ConfigError where the file exists (without ``overwrite``), cannot stand there or does not fit on
    the disk; CheckpointError where a tensor is missing or the file cannot be written.
    """
    from wsi_pipeline.models.checkpoint_file import few

    path = Path(path)
    check_target(path, overwrite)
    embeddings = {f"prompt.{d}": prompt.embedding for d, prompt in weights.prompts.items()}
    names = [*weights.layout.canonical(), *embeddings]
    if missing := [name for name in names if name not in embeddings and name not in weights.tensors]:
        raise CheckpointError(f"{path}: not written, the weights lack {few(missing)}; import them again")

    def take(name: str) -> Tensor:
        return embeddings[name] if name in embeddings else weights.tensors[name]

    from wsi_pipeline.models.weights import tensors_digest

    # Taken here, of what is written: it is what a run holds the file against.
    weights = replace(weights, digest=tensors_digest(weights.tensors, weights.layout.canonical()))
    entries, aliases = stored_once(names, take)
    document = json.dumps(_document(weights, embeddings) | {"aliases": aliases})
    notice = f"Generator of synthetic images: not for diagnosis. {weights.licence}"
    write_file(path, entries, take, {"format": "pt", "notice": notice, KEY: document})
    return load_facts(path)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise ConfigError where ``save_bundle`` could not write; asked early, it saves minutes."""
    if path.suffix != ENDING:
        raise ConfigError(f"{path}: a bundle's name must end in {ENDING}; call it {path.stem}{ENDING}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError(f"{path}: exists; choose another name, or replace a file with --overwrite")


def load_facts(path: str | Path) -> BundleFacts:
    """What a bundle is, from its metadata alone; CheckpointError where it is no bundle or is damaged."""
    return _read(Path(path))[0]


def load_bundle(path: str | Path) -> TurboWeights:
    """The weights of a bundle; tensors are mapped from the file when they are asked for.

    Raises CheckpointError for a file that is no bundle, is truncated, is of a newer format, or lacks tensors.
    """
    from wsi_pipeline.models.weights import Prompt, TurboWeights

    path = Path(path)
    facts, header, aliases = _read(path)
    layout = _layout(facts)
    directions: list[Direction] = ["a2b", "b2a"]
    directions = [direction for direction in directions if direction in facts.prompts]
    names = [*layout.canonical(), *(f"prompt.{direction}" for direction in directions)]
    tensors = StoredTensors({name: (path, aliases.get(name, name)) for name in names})
    _check_shapes(path, layout, header, aliases, names)
    weights = TurboWeights(
        layout=layout,
        tensors=StoredTensors({name: tensors.places[name] for name in layout.canonical()}),
        unet_scale=facts.unet_scale,
        vae_scale=facts.vae_scale,
        prompts={d: Prompt(text=facts.prompts[d], embedding=tensors[f"prompt.{d}"]) for d in directions},
        base_name=facts.base_name,
        base_digest=facts.base_digest,
        source=facts.source,
        licence=facts.licence,
        mpp=facts.mpp,
        tile=facts.tile,
        digest=facts.digest,
    )
    if lacking := [d for d in weights.directions if d not in weights.prompts]:
        raise CheckpointError(f"{path}: has no prompt for {', '.join(lacking)}; import the checkpoint again")
    return weights


def _check_shapes(
    path: Path, layout: Layout, header: Header, aliases: Mapping[str, str], names: list[str]
) -> None:
    from wsi_pipeline.models.checkpoint_file import few

    stored = {name: header.shapes.get(aliases.get(name, name)) for name in names}
    missing = [name for name, shape in stored.items() if shape is None]
    wrong = [
        name
        for name, shape in layout.canonical().items()
        if stored[name] is not None and stored[name] != shape
    ]
    problems = [f"lacks {len(missing)} tensors ({few(missing)})"] if missing else []
    if wrong:
        problems.append(f"has {len(wrong)} tensors of another shape ({few(wrong)})")
    if problems:
        raise CheckpointError(f"{path}: {' and '.join(problems)}; import the checkpoint again")


def _read(path: Path) -> tuple[BundleFacts, Header, Mapping[str, str]]:
    """Facts, header and aliases."""
    remedy = f"`wsi-pipeline models import` makes a bundle; copy {path.name} again if it was one"
    header = read_header(path, remedy)
    if KEY not in header.metadata:
        raise CheckpointError(f"{path}: is no bundle, but tensors of another program; {remedy}")
    try:
        document = json.loads(header.metadata[KEY])
        version, maker = int(document["format"]), str(document["created_by"])
        if version > FORMAT:
            raise CheckpointError(
                f"{path}: has format {version} (by {maker}) and this program reads up to {FORMAT}; "
                "update wsi-pipeline"
            )
        facts = _facts(path, header.size_bytes, document)
        aliases = {str(alias): str(name) for alias, name in document["aliases"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error!r}); {remedy}") from error
    return facts, header, aliases


def _document(weights: TurboWeights, embeddings: Mapping[str, Tensor]) -> dict[str, Any]:
    from wsi_pipeline.models.weights import tensors_digest

    layout = weights.layout
    deciding = {
        # Keys with an underscore tell where a folder lay on somebody's machine.
        "unet_config": {k: v for k, v in layout.unet_config.items() if not k.startswith("_")},
        "vae_config": {k: v for k, v in layout.vae_config.items() if not k.startswith("_")},
        "unet_scale": weights.unet_scale,
        "vae_scale": weights.vae_scale,
        "digest": weights.digest,
    }
    pixels = json.dumps([deciding, tensors_digest(embeddings)], sort_keys=True)
    return deciding | {
        "format": FORMAT,
        "created_by": f"wsi-pipeline {__version__}",
        "rank_unet": layout.rank_unet,
        "rank_vae": layout.rank_vae,
        "vaes": layout.vaes,
        "prompts": {direction: prompt.text for direction, prompt in weights.prompts.items()},
        "base_name": weights.base_name,
        "base_digest": weights.base_digest,
        "source": weights.source,
        "licence": weights.licence,
        "mpp": weights.mpp,
        "tile": weights.tile,
        "identity": hashlib.sha256(pixels.encode()).hexdigest(),
    }


def _facts(path: Path, size: int, document: Mapping[str, Any]) -> BundleFacts:
    texts = ("base_name", "base_digest", "source", "licence", "digest", "identity", "created_by")
    return BundleFacts(
        path=path,
        size_bytes=size,
        unet_config=dict(document["unet_config"]),
        vae_config=dict(document["vae_config"]),
        rank_unet=int(document["rank_unet"]),
        rank_vae=int(document["rank_vae"]),
        vaes=tuple(map(str, document["vaes"])),
        unet_scale=float(document["unet_scale"]),
        vae_scale=float(document["vae_scale"]),
        prompts={str(direction): str(text) for direction, text in document["prompts"].items()},
        mpp=float(document["mpp"]),
        tile=int(document["tile"]),
        **{name: str(document[name]) for name in texts},
    )


def _layout(facts: BundleFacts) -> Layout:
    from wsi_pipeline.models.layout import Layout

    layout = Layout(
        unet_config=facts.unet_config,
        vae_config=facts.vae_config,
        rank_unet=facts.rank_unet,
        rank_vae=facts.rank_vae,
        vaes=facts.vaes,
    )
    try:
        layout.canonical()
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{facts.path}: the networks that it describes cannot be built ({error}); import it again"
        ) from error
    return layout
