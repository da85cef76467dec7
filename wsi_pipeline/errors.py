"""Every error that the package raises on purpose.

    WsiPipelineError
      ConfigError                   exit 2: stop at once, nothing was started
      SlideError                    this slide fails, a run over many slides goes on; exit 3
        UnsupportedSlideError       no reader opens it, or it is not an H&E brightfield image
        MissingMppError             no source states the pixel size
        MppConflictError            two sources state different pixel sizes
        CorruptRegionError          the file opens, but these pixels cannot be decoded
      GeneratorError                exit 4
        CheckpointError             weights that are missing, damaged or of another shape; exit 2
        GeneratorContractError      a generator returned something else than it promised
      TrainingError                 exit 4: training cannot go on (collapse, numbers that are none)
      OutputError                   exit 5
        OutputExistsError           the output is there already and is never overwritten unasked
        FingerprintMismatchError    the partial output was made by another plan, slide or generator
        IncompleteOutputError       the output was never finished, or a block is missing
        LedgerCorruptError          the ledger contradicts itself or the blocks
        RegistrationError           two slides do not lie to each other in a way that can be trusted
      WorkerDiedError               a worker process ended before its work did; a run tries again
      StoppedError                  the work was asked to stop; what is committed stays

A message names the file first, then what is wrong, then the remedy, on one line.
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorruptRegionError",
    "FingerprintMismatchError",
    "GeneratorContractError",
    "GeneratorError",
    "IncompleteOutputError",
    "LedgerCorruptError",
    "MissingMppError",
    "MppConflictError",
    "OutputError",
    "OutputExistsError",
    "RegistrationError",
    "SlideError",
    "StoppedError",
    "TrainingError",
    "UnsupportedSlideError",
    "WorkerDiedError",
    "WsiPipelineError",
]


class WsiPipelineError(Exception):
    """Base of all errors of this package; ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; keyword attributes are lost by the default reduction.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(
    kind: type[WsiPipelineError], args: tuple[object, ...], state: dict[str, object]
) -> WsiPipelineError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(WsiPipelineError):
    """A setting that cannot work; nothing was started."""

    exit_code = 2


class SlideError(WsiPipelineError):
    """One slide cannot be processed; other slides of the run are not affected.

    ``slide_id`` names the slide; ``region`` (lattice or level pixels) is given where one is to blame.
    """

    exit_code = 3

    def __init__(self, message: str, *, slide_id: str, region: object = None) -> None:
        super().__init__(message)
        self.slide_id = slide_id
        self.region = region


class UnsupportedSlideError(SlideError):
    """No reader opens the file, or its content is not what the pipeline is made for."""


class MissingMppError(SlideError):
    """No source states how large a pixel is; the pipeline never guesses."""


class MppConflictError(SlideError):
    """Two sources state pixel sizes that differ too much to choose one silently."""


class CorruptRegionError(SlideError):
    """The slide opens, but some of its pixels cannot be decoded or have vanished."""


class GeneratorError(WsiPipelineError):
    """A generator cannot be built or run; ``spec`` describes it where it exists."""

    exit_code = 4

    def __init__(self, message: str, *, spec: object = None) -> None:
        super().__init__(message)
        self.spec = spec


class CheckpointError(GeneratorError):
    """Weights that are missing, damaged, or of another architecture; nothing was started."""

    exit_code = 2


class GeneratorContractError(GeneratorError):
    """A generator broke its promise on shape, dtype or tile size."""


class TrainingError(WsiPipelineError):
    """Training cannot go on; what was saved before stays."""

    exit_code = 4


class OutputError(WsiPipelineError):
    """The output cannot be written, continued or trusted; ``path`` names it."""

    exit_code = 5

    def __init__(self, message: str, *, path: Path | str) -> None:
        super().__init__(message)
        self.path = Path(path)


class OutputExistsError(OutputError):
    """A finished output, or somebody else's file, stands where this one would go."""


class FingerprintMismatchError(OutputError):
    """The partial output belongs to another plan, slide or generator; the two must not mix."""


class IncompleteOutputError(OutputError):
    """The output was never finished, or lacks a block that its ledger names."""


class LedgerCorruptError(OutputError):
    """The ledger contradicts itself, or a block differs from its recorded checksum."""


class RegistrationError(OutputError):
    """Two slides do not register, or not well enough to be trusted; no transform was written."""


class WorkerDiedError(WsiPipelineError):
    """A worker process ended before its work did; ``alone``: it had nothing else in hand."""

    def __init__(self, message: str, *, alone: bool = True) -> None:
        super().__init__(message)
        self.alone = alone


class StoppedError(WsiPipelineError):
    """The run was stopped (deadline, Ctrl-C, or its parent is gone); the slide can be continued."""
