"""Two or more updates of one base side by side: shared directions, captured energy, intruders, each beside chance."""

from spectra.pairwise.plan import GeometryPlan, execute_geometry, geometry, plan_geometry
from spectra.pairwise.ranks import EPSILON, RANKS, TOP
from spectra.pairwise.result import Geometry

__all__ = [
    "EPSILON",
    "RANKS",
    "TOP",
    "Geometry",
    "GeometryPlan",
    "execute_geometry",
    "geometry",
    "plan_geometry",
]
