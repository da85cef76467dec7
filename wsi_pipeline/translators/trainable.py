"""A translator as something that is trained: its network, what learns, and the way back to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.noise import lattice_normal
from wsi_pipeline.models.weights import tensors_digest
from wsi_pipeline.translators.bundle import TranslatorSpec, build_translator, save_translator
from wsi_pipeline.translators.parts import make_parts
from wsi_pipeline.translators.sampler import draw

__all__ = ["TileNetwork"]


class TileNetwork(nn.Module):
    """The network of ``spec``; all its parameters learn, by the names of its state dict.

    ``tensors``: weights to begin with, None for fresh ones; ``bf16``: run in bfloat16, with float32 weights.
    """

    directions = ("a2b",)

    def __init__(
        self, spec: TranslatorSpec, tensors: Mapping[str, Tensor] | None, bf16: bool = False
    ) -> None:
        super().__init__()
        self.spec, self._bf16 = spec, bf16
        self.network = build_translator(spec, tensors).train()
        self.parts = None if spec.diffusion is None else make_parts(spec.diffusion)
        self.learning: dict[str, nn.Parameter] = dict(self.network.named_parameters())
        floats = ((name, b) for name, b in self.network.named_buffers() if b.is_floating_point())
        self.buffers_by_name = {f"generator/{name}": buffer for name, buffer in floats}

    @property
    def digest(self) -> str:
        """Of the weights as they stand."""
        return tensors_digest({**self.learning, **self.buffers_by_name})

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """The network itself, float32: ``rest`` is a direction, or step and label of a denoiser."""
        given = rest if self.parts is not None else ()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bf16):
            made: Tensor = self.network(x, *given)
        return made.float()

    def translate(self, image: Tensor, direction: str, number: int) -> Tensor:
        """Output for ``image`` [1, 3, H, W] in evaluation mode; where noise is drawn it belongs to
        ``number``, and so does the label of what is drawn without a source."""
        self.network.eval()
        try:
            if self.parts is None:
                return self(image)
            classes = self.parts.condition.config.classes
            place = Region(0, 0, *image.shape[-2:])

            def noise(k: int) -> Tensor:
                drawn = lattice_normal(place, key=number, channels=self.spec.channels, step=k)
                return torch.from_numpy(drawn)[None].to(image.device)

            return draw(
                self,
                self.parts,
                self.spec.sampling,
                source=image if self.spec.translates else None,
                label=torch.tensor([number % classes], device=image.device) if classes else None,
                noise=noise,
            )
        finally:
            self.network.train()

    def save(self, learned: Mapping[str, Tensor], path: Path) -> None:
        """Write the translator's file, with ``learned`` in place of what it has."""
        state = self.network.state_dict()
        tensors = {name: learned.get(name, tensor).detach().cpu() for name, tensor in state.items()}
        save_translator(self.spec, tensors, path, overwrite=True)
