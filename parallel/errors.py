"""Every error that mtrl raises on purpose, as one tree.

::

    MtrlError
    ├── SpecError            (ValueError)          an allocation string is wrong; carries text and column
    ├── ConfigError          (ValueError)          a config key, value or combination of them
    ├── LayoutError          (ValueError)          a spec against the ranks, the model or the lengths
    ├── DataError            (ValueError)          a data file; names file and line
    ├── ModelError           (ValueError)          a model folder or config that cannot be used
    │   └── UnknownFamilyError                     no family for this architecture; lists those there are
    ├── WeightError          (KeyError)            a weight name or shape unmatched, unused or doubled
    ├── MissingPackageError  (ImportError)         an optional package; carries its install line
    ├── OutputExistsError    (FileExistsError)     an output folder holds something already
    ├── CheckpointError      (OSError)             a checkpoint could not be written, or is damaged
    ├── RolloutError         (RuntimeError)        the engine refused or failed
    ├── MismatchError        (RuntimeError)        sampler and trainer disagree beyond the configured bound
    └── NonFiniteError       (ArithmeticError)     a NaN or infinity was stopped before it reached the weights

Each also inherits the standard library's error for its kind, so callers may catch either.
Errors survive pickling by torchrun's error files because every argument is passed to ``super().__init__``.
"""


class MtrlError(Exception):
    """Base of every error mtrl raises on purpose."""


class SpecError(MtrlError, ValueError):
    """An allocation string is wrong.

    ``str()`` shows the reason, the string and a caret under ``column`` (0-based)::

        attn has no axis 'e'; its axes are d, p, t, c
          megatron:(attn:d4p2t2e2|ffn:d2p2t4e2)
                                 ^
    """

    def __init__(self, reason: str, text: str, column: int) -> None:
        super().__init__(reason, text, column)
        self.reason, self.text, self.column = reason, text, column

    def __str__(self) -> str:
        return f"{self.reason}\n  {self.text}\n  {' ' * self.column}^"


class ConfigError(MtrlError, ValueError):
    """A config key, value or combination of values cannot be used."""


class LayoutError(MtrlError, ValueError):
    """A spec does not fit the world size, the model or the sequence length."""


class DataError(MtrlError, ValueError):
    """A data file cannot be read or holds a bad record; the message names file and line."""


class ModelError(MtrlError, ValueError):
    """A model folder or its config cannot be used."""


class UnknownFamilyError(ModelError):
    """No registered family handles this Hugging Face architecture."""


class WeightError(MtrlError, KeyError):
    """A weight name or shape is unmatched, unused or written twice."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument, which hides line breaks.
        return str(self.args[0]) if self.args else ""


class MissingPackageError(MtrlError, ImportError):
    """An optional package is missing or broken; the message holds the line that installs it."""


class OutputExistsError(MtrlError, FileExistsError):
    """The output folder already holds something and nobody allowed replacing it."""


class CheckpointError(MtrlError, OSError):
    """A checkpoint could not be written, is incomplete or damaged, or does not fit the run."""


class RolloutError(MtrlError, RuntimeError):
    """The rollout engine refused or failed."""


class LostRanksError(RolloutError):
    """Other ranks cannot be reached: there is nothing that ranks could agree on."""


class MismatchError(MtrlError, RuntimeError):
    """Sampler and trainer give different log-probabilities for the same weights."""


class NonFiniteError(MtrlError, ArithmeticError):
    """A NaN or infinity was found before it could reach the weights."""
