"""Every error that spectra raises on purpose, each with the exit code its command ends with.

::

    SpectraError                    1   base: catch this one
    ├── UsageError                  2   arguments that cannot work together, or name nothing
    ├── CheckpointError             2   a checkpoint that cannot be opened or read
    │   ├── CheckpointNotFound      2   no such file, folder or hub id
    │   ├── UnsupportedFormat       2   a format or element type that has no reader here
    │   └── UnsafeCheckpoint        4   a file that lies about itself, or could run code
    ├── MismatchError               3   names or shapes of two checkpoints do not match
    ├── MatrixError                 1   a matrix whose spectrum cannot be given
    │   ├── NonFiniteMatrix         1   NaN or infinity among its entries
    │   ├── NoConvergence           1   every LAPACK driver failed
    │   └── IncompleteSpectrum      2   a truncated spectrum asked for a whole one's measure
    ├── OutOfMemory                 2   the memory allowed is too small for any route
    ├── TrainingError               1   training that cannot go on, a loss that is NaN for instance
    └── JournalError                2   the output folder cannot be continued
        ├── JournalBusy             2   another run owns it
        └── JournalMismatch         2   it was begun with other inputs or flags

An interrupted command ends with 130, as shells expect.
"""

from __future__ import annotations


class SpectraError(Exception):
    """Base of every deliberate error; ``exit_code`` is what a command ends with."""

    exit_code = 1


class UsageError(SpectraError):
    """Arguments that cannot work together, or that name nothing."""

    exit_code = 2


class CheckpointError(SpectraError):
    """A checkpoint that cannot be opened or read."""

    exit_code = 2


class CheckpointNotFound(CheckpointError):
    """No such file, folder, hub id or revision."""


class UnsupportedFormat(CheckpointError):
    """A format or element type that has no reader here; the message gives the way out."""


class UnsafeCheckpoint(CheckpointError):
    """A file that lies about its own contents, or that could run code when opened."""

    exit_code = 4


class MismatchError(SpectraError):
    """Names or shapes of two checkpoints do not match."""

    exit_code = 3


class MatrixError(SpectraError):
    """A matrix whose spectrum cannot be given."""


class NonFiniteMatrix(MatrixError):
    """NaN or infinity among the entries of a matrix."""


class NoConvergence(MatrixError):
    """Every singular value driver that was tried failed to converge."""


class IncompleteSpectrum(MatrixError):
    """A measure of the whole spectrum was asked of a truncated one."""

    exit_code = 2


class OutOfMemory(SpectraError):
    """The memory allowed is too small for any route to a matrix's spectrum."""

    exit_code = 2


class TrainingError(SpectraError):
    """Training that cannot go on; what was saved before stays."""


class JournalError(SpectraError):
    """An output folder that cannot be continued."""

    exit_code = 2


class JournalBusy(JournalError):
    """Another run owns the output folder."""


class JournalMismatch(JournalError):
    """The journal was begun with other inputs or flags."""
