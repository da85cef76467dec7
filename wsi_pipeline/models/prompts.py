"""Captions to embeddings, with the base model's tokenizer and text encoder: once, when weights are imported.

Why the padding is checked: SD-Turbo pads with "!" = id 0, not with the end-of-text id as other CLIP models
do, and the pads are attended to, so another id gives another embedding (huggingface/diffusers #2201, #4153).
transformers is imported on use; at run time nothing needs it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_pipeline.models.layout import Direction
    from wsi_pipeline.models.weights import Prompt

__all__ = ["PROMPTS", "embed_prompts", "token_ids"]

PROMPTS: Mapping[Direction, str] = {"a2b": "paraffin section", "b2a": "frozen section"}
"""What the published model was trained with; another caption gives another image."""

PAD_ID = 0
TOKENS = 77
"""Positions that CLIP's text encoder has; a tokenizer without a stated length would pad for ever."""


def embed_prompts(base_folder: str | Path, texts: Sequence[str]) -> list[Prompt]:
    """Each text with its embedding [1, 77, width] float32: the last hidden state after the final norm.

    No attention mask: pads count, as in training. Raises CheckpointError where ``text_encoder/`` or
    ``tokenizer/`` of the base model is missing, damaged or of another kind.
    """
    import torch

    from wsi_pipeline.models.weights import Prompt

    ids = token_ids(base_folder, texts)
    encoder = _text_encoder(Path(base_folder) / "text_encoder")
    with torch.no_grad(), _errors_of(Path(base_folder) / "text_encoder"):
        states = encoder(ids)[0]
    return [
        Prompt(text=text, embedding=state[None].clone()) for text, state in zip(texts, states, strict=True)
    ]


def token_ids(base_folder: str | Path, texts: Sequence[str]) -> Tensor:
    """Token ids [texts, 77] int64, padded with id 0; what is longer is cut. Raises CheckpointError."""
    from transformers import CLIPTokenizer

    folder = Path(base_folder) / "tokenizer"
    with _errors_of(folder):
        _check_vocabulary(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token_id != PAD_ID:
            raise CheckpointError(
                f"{folder}: pads with id {tokenizer.pad_token_id} ({tokenizer.pad_token!r}), SD-Turbo with "
                f"{PAD_ID} ('!'); copy the tokenizer of SD-Turbo again"
            )
        length = min(tokenizer.model_max_length, TOKENS)
        padded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    import torch

    return torch.tensor(padded["input_ids"], dtype=torch.int64)


def _check_vocabulary(folder: Path) -> None:
    """Raise OSError, ValueError or TypeError for a vocabulary that is absent, damaged or not of these merges.

    Why here: without a vocabulary transformers makes one of three words, and a damaged one ends in a bare
    Exception of its tokenizer library.
    """
    vocabulary = dict(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if strange := [pair for pair in pairs if not {*pair, "".join(pair)} <= vocabulary.keys()]:
        raise ValueError(f"merges.txt has '{' '.join(strange[0])}', which is not in vocab.json")


def _text_encoder(folder: Path) -> Any:
    """The text encoder in float32, whatever its file holds."""
    from transformers import CLIPTextModel

    halves = (folder / "model.fp16.safetensors").is_file() and not (folder / "model.safetensors").is_file()
    with _errors_of(folder), _no_progress_bar():
        encoder, report = CLIPTextModel.from_pretrained(
            folder, variant="fp16" if halves else None, local_files_only=True, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise CheckpointError(f"{folder}: lacks {len(missing)} tensors, e.g. {missing[0]}; copy it again")
    return encoder.float().eval()


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """Map what transformers raises for files that it cannot use."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    # Newer versions check configurations with a class of errors of their own.
    invalid = getattr(errors, "StrictDataclassError", ValueError)
    if not (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is missing; `wsi-pipeline models fetch` gets it, or copy it there")
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError, invalid) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded ({said}); copy it again from SD-Turbo") from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows one on stderr for each model that it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
