"""The weights file of a translator: one ``.safetensors`` with its network, and all that decides a pixel.

The metadata holds ``notice`` for people and ``wsi_pipeline_translator``, one JSON document. Diffusion-FFPE
has a file of its own (``models.bundle``), as its adapters stay apart from what they adapt. torch is imported
on use: planning and ``wsi-pipeline models show`` read the facts without it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline._version import __version__
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.bundle import BundleFacts, check_target, load_facts
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.tensor_file import Header, read_header, stored_once, write_file
from wsi_pipeline.translators.settings import DiffusionConfig, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KEY",
    "TranslatorFacts",
    "TranslatorSpec",
    "build_translator",
    "is_translator",
    "load_any_facts",
    "load_translator",
    "load_translator_facts",
    "network_channels",
    "save_translator",
]

FORMAT = 1
KEY = "wsi_pipeline_translator"
LEFT_OUT = "num_batches_tracked"  # of batch norms: an integer that evaluation never looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatorSpec:
    """What a translator is, apart from its tensors.

    ``diffusion``: None for a network that translates at once; ``sampling``: what it is run with unless told
    otherwise; ``channels``: of the target image; ``axes``: ``yx``, or ``zyx`` for volumes; ``value_range``:
    of what the network sees; ``mpp``: µm per pixel, ``tile``: side in pixels that it was trained at;
    ``classes``: names of the labels, in order; ``source``: where it comes from; ``licence``: what users have
    to know. Raises ConfigError for a network that does not fit."""

    network: NetworkConfig
    diffusion: DiffusionConfig | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    channels: int = 3
    axes: str = "yx"
    value_range: tuple[float, float] = (-1.0, 1.0)
    mpp: float = 0.5
    tile: int = 256
    classes: tuple[str, ...] = ()
    source: str = "wsi-pipeline"
    licence: str = ""

    def __post_init__(self) -> None:
        if self.network.is_denoiser != (self.diffusion is not None):
            wanted = "unet2d or unet3d" if self.diffusion else "unet, pix2pix or resnet"
            raise ConfigError(f"network.family: {self.network.family} does not fit; choose {wanted}")
        low, high = self.value_range
        if not (0.02 <= self.mpp <= 20 and 1 <= self.tile <= 2**15 and -1e4 < low < high < 1e4):
            raise ConfigError(
                f"translator: mpp {self.mpp}, tile {self.tile}, values {low} to {high} cannot be"
            )
        labels = 0 if self.diffusion is None else self.diffusion.condition.classes
        if self.classes and len(self.classes) != labels:
            raise ConfigError(f"classes: {len(self.classes)} names for {labels} classes of the condition")

    @property
    def translates(self) -> bool:
        """Whether the output follows a source image."""
        return self.diffusion is None or self.diffusion.translates

    @property
    def alignment(self) -> int:
        """Places of tiles have to be multiples of this, or Haar coefficients differ from tile to tile."""
        representation = self.diffusion.representation if self.diffusion else None
        return 2**representation.levels if representation and representation.kind == "haar" else 1

    @property
    def multiple(self) -> int:
        """Sides of a tile have to be multiples of this."""
        return self.alignment * self.network.multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatorFacts:
    """A translator's file without its tensors. ``digest``: of the tensors; ``identity``: of all that decides
    a pixel; ``created_by``: program and version."""

    path: Path
    size_bytes: int
    spec: TranslatorSpec
    digest: str
    identity: str
    created_by: str


def network_channels(spec: TranslatorSpec) -> tuple[int, int]:
    """Channels that the network takes and gives."""
    if spec.diffusion is None:
        return spec.channels, spec.channels
    from wsi_pipeline.translators.parts import make_parts

    return make_parts(spec.diffusion).network_channels(spec.channels)


def build_translator(spec: TranslatorSpec, tensors: Mapping[str, Tensor] | None, device: Any = "cpu") -> Any:
    """The network (``torch.nn.Module``), in evaluation mode; fresh weights where ``tensors`` is None.

    Raises CheckpointError where the tensors are not those of the network.
    """
    import torch

    from wsi_pipeline.models.networks import build_network

    taken, given = network_channels(spec)
    classes = 0 if spec.diffusion is None else spec.diffusion.condition.classes
    made = partial(build_network, spec.network, in_channels=taken, out_channels=given, classes=classes)
    if tensors is not None:
        with torch.device("meta"):  # no memory for a network that the tensors do not fit
            shapes = {name: tensor.shape for name, tensor in made().state_dict().items()}
        wanted = {(name, shape) for name, shape in shapes.items() if not name.endswith(LEFT_OUT)}
        if odd := sorted(wanted ^ {(name, tensor.shape) for name, tensor in _kept(tensors).items()}):
            raise CheckpointError(f"weights do not fit the network ({odd[0][0]}); import them again")
    network = made()
    if tensors is not None:
        network.load_state_dict(dict(tensors), strict=False)
    return network.to(device).eval()


def save_translator(
    spec: TranslatorSpec, tensors: Mapping[str, Tensor], path: str | Path, overwrite: bool = False
) -> TranslatorFacts:
    """Write a translator's file, all of it or nothing, and return its facts.

    Raises ConfigError where the file exists (without ``overwrite``) or cannot stand there, CheckpointError
    where it cannot be written.
    """
    from wsi_pipeline.models.weights import tensors_digest

    path = Path(path)
    check_target(path, overwrite)
    kept = _kept(tensors)
    entries, aliases = stored_once(kept, kept.__getitem__)
    digest = tensors_digest(kept)
    document = {
        "format": FORMAT,
        "created_by": f"wsi-pipeline {__version__}",
        "spec": asdict(spec),
        "digest": digest,
        "aliases": aliases,
    }
    notice = f"Makes synthetic images: not for diagnosis. {spec.licence}"
    write_file(path, entries, kept.__getitem__, {"format": "pt", "notice": notice, KEY: json.dumps(document)})
    return load_translator_facts(path)


def load_translator_facts(path: str | Path) -> TranslatorFacts:
    """What the file holds, from its metadata alone; CheckpointError where it is none or is damaged."""
    return _read(Path(path))[0]


def is_translator(path: str | Path) -> bool:
    """Whether a file is one of these; False also for one that is not there or is damaged."""
    try:
        return KEY in read_header(Path(path), "").metadata
    except CheckpointError:
        return False


def load_any_facts(path: str | Path) -> BundleFacts | TranslatorFacts:
    """Facts of a weights file of either kind."""
    return load_translator_facts(path) if is_translator(path) else load_facts(path)


def load_translator(path: str | Path) -> tuple[TranslatorFacts, dict[str, Tensor]]:
    """Facts and tensors; CheckpointError where they are not those that were written."""
    from wsi_pipeline.models.tensor_file import StoredTensors
    from wsi_pipeline.models.weights import tensors_digest

    path = Path(path)
    facts, header, aliases = _read(path)
    names = [*header.shapes, *aliases]
    tensors = dict(StoredTensors({name: (path, aliases.get(name, name)) for name in names}))
    if tensors_digest(tensors) != facts.digest:
        raise CheckpointError(
            f"{path}: is damaged, its tensors are not those that were written; copy it again"
        )
    if odd := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise CheckpointError(f"{path}: {odd} holds values that are not numbers; train or import it again")
    return facts, tensors


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(LEFT_OUT)}


def _identity(spec: TranslatorSpec, digest: str) -> str:
    """Taken of what is read, so that an edited file is another translator."""
    deciding = json.dumps([asdict(spec) | {"licence": "", "source": ""}, digest], sort_keys=True)
    return hashlib.sha256(deciding.encode()).hexdigest()


def _read(path: Path) -> tuple[TranslatorFacts, Header, Mapping[str, str]]:
    import pydantic

    remedy = "make one with `wsi-pipeline train` or `wsi-pipeline models import --kind`"
    header = read_header(path, remedy)
    if KEY not in header.metadata:
        other = "weights of lora_turbo" if "wsi_pipeline" in header.metadata else "tensors of another program"
        raise CheckpointError(f"{path}: is no translator, but {other}; {remedy}")
    try:
        document = json.loads(header.metadata[KEY])
        if int(document["format"]) > FORMAT:
            raise CheckpointError(f"{path}: is of a newer format ({document['format']}); update wsi-pipeline")
        spec = pydantic.TypeAdapter(TranslatorSpec).validate_python(document["spec"])
        facts = TranslatorFacts(
            path=path,
            size_bytes=header.size_bytes,
            spec=spec,
            digest=str(document["digest"]),
            identity=_identity(spec, document["digest"]),
            created_by=str(document["created_by"]),
        )
        return facts, header, dict(document["aliases"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error!r}); {remedy}") from error
