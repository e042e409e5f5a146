"""The report's files, each written beside its place and renamed into it: a reader never meets half a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spectra.errors import JournalError
from spectra.report.build import ReportData, build_report, manifest, summary
from spectra.report.drawing import Drawing
from spectra.report.figures import draw_figures
from spectra.report.page import render_page
from spectra.report.rows import RunLike
from spectra.report.text import dump


def write_report(run: RunLike, out: str | os.PathLike[str], *, data: ReportData | None = None) -> list[Path]:
    """Write ``report.html``, ``summary.json``, ``manifest.json``, ``figures/*.svg`` and the run itself.

    Parameters
    ----------
    run : Run
        What `spectra.compare` returned. ``run.save(out)`` writes ``spectra.parquet``.
    out : path
        Folder to write to; made if it is not there.
    data : ReportData, optional
        Content of the report, where `build_report` has made it already.

    Returns
    -------
    list of Path
        What was written, the page first. The same run gives the same bytes.

    Raises
    ------
    JournalError
        If a folder to write to is a symbolic link: what it points to is not the caller's ``--out``.
    OSError
        If a file cannot be written; whatever stood there before is whole.
    """
    data = build_report(run) if data is None else data
    drawings = draw_figures(data)
    page, told = render_page(data, drawings), {"summary": summary(data), "manifest": manifest(data)}
    return write_folder(Path(out), page, told, drawings, save=run.save, saved="spectra.parquet")


def write_folder(
    folder: Path,
    page: str,
    told: Mapping[str, Any],
    drawings: Iterable[Drawing],
    *,
    save: Callable[[Path], object],
    saved: str,
) -> list[Path]:
    """Write the files of a report into one folder.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    page : str
        What goes to ``report.html``.
    told : mapping
        What goes to JSON files, by their stems.
    drawings : iterable of Drawing
        What goes to ``figures/``.
    save : callable
        Writes the numbers behind it, a file called `saved`.
    saved : str
        Its name.

    Returns
    -------
    list of Path
        What was written, the page first.

    Raises
    ------
    JournalError
        If ``figures`` is a symbolic link.
    """
    figures = figures_folder(folder)
    save(folder)
    texts = {"report.html": page, **{f"{stem}.json": dump(value, indent=1) + "\n" for stem, value in told.items()}}
    written = [write_atomically(folder / name, text.encode()) for name, text in texts.items()]
    written += [write_atomically(figures / f"{drawing.key}.svg", drawing.svg) for drawing in drawings]
    return [*written[:1], folder / saved, *written[1:]]


def figures_folder(folder: Path) -> Path:
    """Give ``figures/`` of an output folder, made with it if need be.

    Parameters
    ----------
    folder : Path
        Where a page goes.

    Raises
    ------
    JournalError
        If it is a symbolic link: what it points to is not the caller's folder.
    """
    figures = folder / "figures"
    if figures.is_symlink():
        raise JournalError(f"{figures} is a symbolic link; pages are written inside {folder} only: remove the link")
    figures.mkdir(parents=True, exist_ok=True)
    return figures


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file by way of a temporary one in the same folder; a link in its place is replaced, not followed.

    Parameters
    ----------
    path : Path
        Where the content goes.
    content : bytes
        All of it.

    Returns
    -------
    Path
        `path`.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)  # left by a run that was killed; its owner is gone, or the journal would say so
    try:
        with temporary.open("xb") as stream:  # exclusive: a link put in its place is not followed
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
