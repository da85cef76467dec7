"""The generator as something that is trained: both directions with live adapters, and back to weights.

Which parameters learn (Zhang et al., Diffusion-FFPE; img2img-turbo):

    adapters    of the UNet and of the global autoencoders, and the UNet's first convolution itself, as
    published.
                The bases of the skip convolutions keep their constant; only their adapters learn.
    all         everything, for small networks that have no pretrained base. Adapters are merged into the
    layers and
                begin anew, with no effect: whoever has these weights can adapt them

The local encoders are used as they are unless ``train_local`` is set: the published program computed their
gradients and never applied them, so that is what its weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from wsi_pipeline.models.assemble import ADAPTER, with_adapters, without_adapters
from wsi_pipeline.models.bundle import save_bundle
from wsi_pipeline.models.layout import VAES, Direction
from wsi_pipeline.models.lora_turbo import Translator
from wsi_pipeline.models.weights import TurboWeights, tensors_digest

__all__ = ["Trainable", "TurboNetwork"]

Trainable: TypeAlias = Literal["adapters", "all"]

_TRAINED_BASE = ("unet.conv_in.weight", "unet.conv_in.bias")


class TurboNetwork(nn.Module):
    """Directions of one generator that share a UNet; parameters go by their canonical names (``layout``).

    ``trainable``, ``train_local``: see the module. All other parameters are frozen. ``recompute``: gradient
    checkpointing of UNet and autoencoders. ``bf16``: run in bfloat16 with float32 weights, but for the UNet's
    last layer, whose rounding x0 would enlarge 14.6 times; users report that without such care a model learns
    to return its input.
    """

    def __init__(
        self,
        weights: TurboWeights,
        *,
        trainable: Trainable = "adapters",
        train_local: bool = False,
        recompute: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self._bf16 = bf16
        self._initial = weights
        self._trainable = trainable
        build = without_adapters if trainable == "all" else with_adapters
        self.translators = nn.ModuleDict(build(weights, weights.directions))
        self.learning: dict[str, nn.Parameter] = {}
        for name, parameter in self._named():
            learns = _learns(name, trainable, train_local)
            parameter.requires_grad_(learns)
            if learns:
                self.learning[name] = parameter
        for translator in self.translators.values():
            translator.recompute = recompute
        if recompute:
            self._any.unet.enable_gradient_checkpointing()
        if bf16:
            last = self._any.unet.conv_out
            last.forward = _in_float32(last.forward)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return self._initial.directions

    @property
    def latent_channels(self) -> int:
        return int(self._initial.layout.vae_config["latent_channels"])

    @property
    def _any(self) -> Translator:
        first: Translator = next(iter(self.translators.values()))
        return first

    @property
    def digest(self) -> str:
        """Of the weights that training begins with."""
        return self._initial.digest

    def translate(self, image: Tensor, direction: Direction, number: int) -> Tensor:
        """A tile as ``forward`` makes it, whatever its ``number``: nothing is drawn."""
        translated: Tensor = self(image, direction)
        return translated

    def save(self, learned: Mapping[str, Tensor], path: Path) -> None:
        """Write the bundle, with ``learned`` in place of what it has."""
        save_bundle(self.weights(learned), path, overwrite=True)

    def forward(self, x: Tensor, direction: Direction, noise: Tensor | None = None) -> Tensor:
        """Translated tiles [B, 3, H, W] in [-1, 1], float32; see ``Translator``."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
            return self.translators[direction](x, noise)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Canonical name and parameter, in the order of the published optimiser: UNet, then each VAE."""
        seen: set[int] = set()
        for part, module in self._parts():
            for key, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    name = key.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")
                    yield f"{part}.{name}", parameter

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield "unet", self._any.unet
        for direction, translator in self.translators.items():
            whole, local = VAES[direction]
            for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
                yield f"{whole}.{part}", getattr(translator, part)
            if translator.local_encoder is not None:
                yield f"{local}.encoder", translator.local_encoder

    def weights(self, learned: Mapping[str, Tensor] | None = None) -> TurboWeights:
        """The weights as they stand, or with ``learned`` (e.g. averaged) in place of those that learn.

        Parts of a local autoencoder that nothing uses stay as they were, or where everything was trained
        become equal to the global one's, so that a bundle stores them once.
        """
        current = {name: parameter.detach().cpu() for name, parameter in self._named()}
        current |= {name: tensor.detach().cpu() for name, tensor in (learned or {}).items()}
        tensors = {}
        for name in self._initial.layout.canonical():
            part, _, key = name.partition(".")
            whole = next((whole for whole, local in VAES.values() if local == part), part)
            if name in current:
                tensors[name] = current[name]
            elif self._trainable == "adapters" or ".lora_A." in name:
                tensors[name] = self._initial.tensors[name]
            elif ".lora_B." in name:
                tensors[name] = torch.zeros_like(self._initial.tensors[name])
            else:
                tensors[name] = current[f"{whole}.{key}"]
        return replace(self._initial, tensors=tensors, digest=tensors_digest(tensors))


def _in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return run


def _learns(name: str, trainable: Trainable, train_local: bool) -> bool:
    if trainable == "all":
        return True
    is_local = name.partition(".")[0] in (local for _, local in VAES.values())
    return name in _TRAINED_BASE or (".lora_" in name and (train_local or not is_local))
