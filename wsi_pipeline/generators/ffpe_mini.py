"""The embedded generator: a small member of the one-step LoRA family whose weights come with the package.

Everything but the weights is ``lora_turbo``: the same networks at a four-hundredth of the size
(``models.mini``), the same bundle format, the same code. It needs no download and no GPU.

Limits, which users have to know. It was trained on simulated frozen sections only (``core.frozen``), made
from a handful of paraffin pictures: it knows the artefacts that the simulation knows, and the tissues that
were in those pictures. Large ice holes stay; what is lost in a fine one, in smudged chromatin or in a blur it
makes up from the surroundings, and it may remove detail that it takes for an artefact. Its colours are those
of its few training slides. How it compares with recolouring alone is what ``scripts/judge_mini.py`` measures.
It is an illustration, not for diagnosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.generators.lora_turbo import LoraTurbo

__all__ = ["FfpeMini"]

PACKAGED = Path(__file__).with_suffix(".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class FfpeMini(LoraTurbo):
    """Small one-step generator, weights included: trained on simulated frozen sections; changes structure.

    ``weights``: another bundle than the packaged one, e.g. one that you trained; the other options are those
    of ``lora_turbo``. Raises CheckpointError where the package was installed without its weights.
    """

    kind: ClassVar[str] = "ffpe_mini"

    weights: Path = PACKAGED

    def __post_init__(self) -> None:
        if self.weights == PACKAGED and not PACKAGED.is_file():
            raise CheckpointError(
                f"{PACKAGED}: the weights of ffpe_mini are missing from this installation; install the "
                "package again, or make them with scripts/train_ffpe_mini.sh"
            )
        # slots=True makes the class anew, so the short form of super() would look at the wrong one.
        super(FfpeMini, self).__post_init__()
