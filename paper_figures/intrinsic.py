"""Draw d90 of every search in analyses/results/intrinsic: a row a task, a column a structure. Computes nothing.

python paper_figures/intrinsic.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from spectra.intrinsic import IntrinsicDimension
from spectra.intrinsic.plot import accuracy_against_dimension
from spectra.report.drawing import drawing_style

HERE = Path(__file__).parent
RESULTS = HERE.parent / "analyses" / "results" / "intrinsic"


def main() -> None:
    found = [IntrinsicDimension.load(path) for path in sorted(RESULTS.glob("*.json"))]
    if not found:
        raise SystemExit(f"{RESULTS} holds no result: python -m analyses.intrinsic makes them")
    tasks = sorted({str(one.config["task"]) for one in found})
    kinds = sorted({(str(one.config["structure"]), str(one.config["projection"])) for one in found})
    with drawing_style():
        figure = Figure(figsize=(7.0 * len(kinds), 4.3 * len(tasks)), layout="constrained")
        axes = figure.subplots(len(tasks), len(kinds), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for one in found:
            kind = (str(one.config["structure"]), str(one.config["projection"]))
            ax = axes[tasks.index(str(one.config["task"])), kinds.index(kind)]
            ax.set_axis_on()
            accuracy_against_dimension(ax, one)
            ax.set_title(f"{one.config['task']}, {kind[0].upper()} with {kind[1]}", pad=6)
        for suffix, extra in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            figure.savefig(HERE / f"intrinsic.{suffix}", metadata=extra, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
