"""Where a command ends: errors become one clean line and an exit code, for every verb alike.

Exit codes: 0 done · 1 some tensors failed · 2 usage · 3 names or shapes do not match · 4 unsafe input ·
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from spectra.errors import SpectraError

INTERRUPTED = 130
_RESUMES = "what was finished is kept, and the same command goes on from there"


def run(command: click.Command, arguments: Sequence[str] | None = None, *, name: str) -> int:
    """Run a command and return its exit code; whatever went wrong stands on stderr, in words.

    Parameters
    ----------
    command : click.Command
        What to run. It may return an exit code.
    arguments : sequence of str, optional
        The command line without the program's name; ``sys.argv`` when None.
    name : str
        How the usage line calls it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verbose = any(word == "--verbose" or word.startswith("-v") for word in arguments)
    try:
        return int(command.main(list(arguments), prog_name=name, standalone_mode=False) or 0)
    except click.exceptions.Abort as interrupt:  # click's name for KeyboardInterrupt
        tell(f"interrupted: {str(interrupt) or _RESUMES}")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SpectraError as error:
        return _failed(error, str(error), error.exit_code, verbose)
    except OSError as error:
        return _failed(
            error, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1, verbose
        )
    except Exception as error:
        said = f"{type(error).__name__}: {error}; this is a bug in spectra" + (
            "" if verbose else ", rerun with -v for where"
        )
        return _failed(error, said, 1, verbose)


@contextmanager
def interrupted_as(message: str) -> Iterator[None]:
    """Do work that an interrupt does not leave to be gone on with, and say what it leaves instead.

    Parameters
    ----------
    message : str
        What became of the work, and what the same command will do.

    Examples
    --------
    >>> @click.command()
    ... def command() -> None:
    ...     with interrupted_as("nothing was written; the same command begins anew"):
    ...         raise KeyboardInterrupt
    >>> run(command, [], name="x")
    130
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise click.exceptions.Abort(message) from interrupt


def tell(message: str) -> None:
    """Print one message to stderr.

    Parameters
    ----------
    message : str
        Shown with its control and bidirectional characters escaped; lines stay lines.
    """
    say(printable(message), err=True)


def say(text: str, *, err: bool = False, color: bool = False) -> None:
    """Print a text; a reader that has left, `head` for instance, ends neither the command nor its work.

    Parameters
    ----------
    text : str
        As it is to appear: `printable` first, where it quotes a file.
    err : bool
        To stderr in place of stdout.
    color : bool
        Leave escape sequences in it.
    """
    try:
        click.echo(text, err=err, color=color)
    except BrokenPipeError:
        stream = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter's last flush stays silent too


def printable(text: str) -> str:
    r"""Return a text whose every character moves the cursor by a letter or a line: an error may quote a file's name.

    Parameters
    ----------
    text : str
        Any text.

    Examples
    --------
    >>> printable("no tensor a\x1b[2J\nin it")
    'no tensor a\\x1b[2J\nin it'
    """
    hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in hidden else c.encode("unicode_escape").decode() for c in text
    )


def _failed(error: BaseException, message: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        tell("".join(traceback.format_exception(error)))
    tell(f"error: {message}")
    return code
