"""Where the curves and tables of a record are read off, and what counts as an intruder."""

from __future__ import annotations

# Ranks of overlap tables and capture curves: doublings, and one between each, which a logarithmic axis spaces evenly.
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Leading directions of a tuned matrix that are matched with its base, and the |cos| below which one is called an
# intruder where a single number is shown: the middle of the range that Shuttleworth et al. (2024) sweep.
TOP = 10
EPSILON = 0.5
