"""The files of a report on two or more updates, written as the report on one writes them."""

from __future__ import annotations

import os
from pathlib import Path

from spectra.report.files import write_folder
from spectra.report.pairs.build import GeometryLike, PairsData, build_report, manifest, summary
from spectra.report.pairs.figures import draw_figures
from spectra.report.pairs.page import render_page


def write_report(geometry: GeometryLike, out: str | os.PathLike[str], *, data: PairsData | None = None) -> list[Path]:
    """Write ``report.html``, ``summary.json``, ``manifest.json``, ``figures/*.svg`` and the geometry itself.

    Parameters
    ----------
    geometry : Geometry
        What `spectra.geometry` returned. ``geometry.save(out)`` writes ``geometry.parquet``.
    out : path
        Folder to write to; made if it is not there.
    data : PairsData, optional
        Content of the report, where `build_report` has made it already.

    Returns
    -------
    list of Path
        What was written, the page first. The same geometry gives the same bytes.

    Raises
    ------
    JournalError
        If a folder to write to is a symbolic link: what it points to is not the caller's ``--out``.
    OSError
        If a file cannot be written; whatever stood there before is whole.
    """
    data = build_report(geometry) if data is None else data
    drawings = draw_figures(data)
    page, told = render_page(data, drawings), {"summary": summary(data), "manifest": manifest(data)}
    return write_folder(Path(out), page, told, drawings, save=geometry.save, saved="geometry.parquet")
