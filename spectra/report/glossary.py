"""How to read each number: label, formula, reading and source of every measure the report prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One measure. `kind` says how a value is printed: ``"number"``, ``"share"`` (as a percentage), or
    ``"trace"`` (a percentage that nobody needs below a hundredth).
    """

    key: str
    label: str
    formula: str
    reading: str
    source: str
    kind: str = "number"


# Δ = W_tuned − W_base, σ₁ ≥ σ₂ ≥ … its singular values, p = min(rows, cols).
TERMS = (
    Term(
        "frobenius",
        "Frobenius norm ‖Δ‖",
        "√Σ Δᵢⱼ²",
        "The size of the update, summed from the entries in float64, whatever the route to the spectrum.",
        "definition",
    ),
    Term(
        "relative_frobenius",
        "relative change",
        "‖Δ‖ / ‖W_base‖",
        "How far the matrix moved against its own size. Fine-tuning is usually within a few per cent.",
        "definition",
        "share",
    ),
    Term(
        "spectral_norm",
        "spectral norm σ₁",
        "max ‖Δx‖ / ‖x‖",
        "The most that the update can do to any one input direction.",
        "definition",
    ),
    Term(
        "nuclear_norm",
        "nuclear norm",
        "Σ σᵢ",
        "The convex stand-in for rank; compare it with ‖Δ‖ √p, its largest possible value.",
        "definition",
    ),
    Term(
        "storage_floor",
        "storage floor",
        "√maxᵢ Σⱼ Sᵢⱼ + √maxⱼ Σᵢ Sᵢⱼ,  Sᵢⱼ = ulp(wᵢⱼ)²/12 of each stored side",
        "The spectral norm that rounding to the stored dtype alone can reach. Singular values beneath it cannot be "
        "told from rounding. It comes from the weights themselves; nothing is fitted.",
        "Bandeira and van Handel (2016), thm 1.1, leading term",
    ),
    Term(
        "storage_frobenius",
        "rounding norm ‖E‖",
        "√Σ Sᵢⱼ",
        "The Frobenius norm that storage rounding is expected to add to the update.",
        "uniform rounding error, variance ulp²/12",
    ),
    Term(
        "rounding",
        "share that is rounding",
        "‖E‖ / ‖Δ‖",
        "Below a few per cent the ranks describe the update. Above 71 % (half of the squared norm) they mostly "
        "describe the rounding, and the report says so.",
        "this report",
        "trace",
    ),
    Term(
        "signal_rank",
        "directions above the floor",
        "#{σᵢ > storage floor}",
        "How many directions stand out of storage rounding: it cannot have made them. A coarser dtype can hide some.",
        "this report",
    ),
    Term(
        "entropy_rank",
        "entropy rank",
        "exp(−Σ pᵢ ln pᵢ),  pᵢ = σᵢ / Σσ",
        "Effective rank: as many equal directions would have this entropy. It weighs small singular values heavily, "
        "so read it beside the floor.",
        "Roy and Vetterli (2007)",
    ),
    Term(
        "entropy_rank_energy",
        "entropy rank of the energy",
        "exp(−Σ qᵢ ln qᵢ),  qᵢ = σᵢ² / Σσ²",
        "The same of the squared singular values: never larger, and a different measure. Papers mix the two up.",
        "common variant",
    ),
    Term(
        "stable_rank",
        "stable rank",
        "‖Δ‖² / σ₁²",
        "How many directions as strong as the first would make this norm. Hardly moved by noise.",
        "Rudelson and Vershynin (2007)",
    ),
    Term(
        "participation_ratio",
        "participation ratio",
        "(Σσ²)² / Σσ⁴",
        "Number of directions that share the energy, between stable rank and entropy rank of the energy.",
        "physics of disordered systems",
    ),
    Term(
        "numerical_rank",
        "numerical rank",
        "#{σᵢ > max(rows, cols) · ε · σ₁}",
        "Rank to working precision. For an adapter, its true rank; for a full update, nearly always p.",
        "LAPACK, NumPy",
    ),
    Term("rank_50", "directions for 50 %", "least k: Σᵢ≤ₖ σ² ≥ 0.5 Σσ²", "Half of the squared norm.", "Eckart–Young"),
    Term(
        "rank_90",
        "directions for 90 %",
        "least k: Σᵢ≤ₖ σ² ≥ 0.9 Σσ²",
        "An adapter of this rank could hold 90 % of the squared norm: an error of 32 % of the norm.",
        "Eckart–Young",
    ),
    Term("rank_95", "directions for 95 %", "least k: Σᵢ≤ₖ σ² ≥ 0.95 Σσ²", "95 % of the squared norm.", "Eckart–Young"),
    Term("rank_99", "directions for 99 %", "least k: Σᵢ≤ₖ σ² ≥ 0.99 Σσ²", "99 % of the squared norm.", "Eckart–Young"),
    *(
        Term(
            f"error_r{rank}",
            f"error at rank {rank}",
            f"√Σᵢ>{rank} σᵢ² / ‖Δ‖",
            f"What the best possible rank-{rank} matrix leaves out, as a share of the norm.",
            "Eckart, Young and Mirsky",
            "share",
        )
        for rank in (1, 2, 4, 8, 16, 32, 64)
    ),
    Term(
        "mp_edge",
        "Marchenko–Pastur edge",
        "s√n (1 + √β), raised to the 99.9 % quantile of its fluctuation; β = p/n",
        "Where the singular values of pure noise of the same size and median end. Values beyond it are structure.",
        "Marchenko and Pastur (1967), Johnstone (2001)",
    ),
    Term(
        "mp_rank",
        "directions above the edge",
        "#{σᵢ > edge and floor}",
        "How many stand out of random-looking bulk and of the storage floor.",
        "same",
    ),
    Term(
        "gd_rank",
        "Gavish–Donoho rank",
        "#{σᵢ > ω(β) · median σ and floor}",
        "How many directions the optimal hard threshold would keep if the rest were noise.",
        "Gavish and Donoho (2014)",
    ),
    Term(
        "elbow",
        "elbow",
        "#{σᵢ > ‖Δ‖ / √p}",
        "Where the curve of kept energy bends most: directions of more than the average energy.",
        "Kneedle, Satopää et al. (2011), on that curve; Kaiser (1960)",
    ),
    Term(
        "decay_exponent",
        "decay exponent",
        "α in p(λ) ∝ λ^(−α), λ = σ²",
        "Tail of the squared singular values: the smaller, the heavier; below 2 the leading directions hold most.",
        "Clauset, Shalizi and Newman (2009)",
    ),
    Term(
        "zero_fraction",
        "entries that did not move",
        "#{Δᵢⱼ = 0} / (rows · cols)",
        "High in a coarse dtype: updates smaller than half a grid step vanish when stored.",
        "count",
        "share",
    ),
    Term(
        "merge_loss",
        "lost on merging",
        "‖round(W + Δ) − (W + Δ)‖ / ‖Δ‖",
        "Share of an adapter’s update that merging into the stored dtype would lose.",
        "this report",
        "share",
    ),
    Term(
        "quantization_frobenius",
        "quantization error ‖E‖",
        "‖Ŵ − W‖,  Ŵ = dequant(Q(W))",
        "How far quantizing moved the base that the update was trained on. It is no part of Δ here: Δ = W_tuned − Ŵ.",
        "Dettmers et al. (2023), eq. 5",
    ),
    Term(
        "quantization_projection",
        "quantization error undone",
        "⟨Δ, −E⟩ / ‖E‖²",
        "1 where the update makes up for all of the quantization error, 0 where it does not know of it.",
        "this report",
        "share",
    ),
    Term(
        "quantization_cosine",
        "cosine to the error",
        "⟨Δ, −E⟩ / (‖Δ‖ ‖E‖)",
        "Of independent matrices it is 0 ± 1/√(rows · cols).",
        "definition",
    ),
    Term(
        "gap",
        "norm left out",
        "√(‖Δ‖² − Σσ²)",
        "Norm of everything the computed directions leave out. Deterministic; 0 for a complete spectrum.",
        "Pythagoras",
    ),
    Term(
        "tail_norm",
        "bound on the next value",
        "‖(I − QQᵀ)Δ‖₂ ≤",
        "No singular value that was left out exceeds this, up to a stated probability of failure.",
        "Kuczyński and Woźniakowski (1992)",
    ),
    Term(
        "roundoff",
        "floating-point error",
        "C · ε · σ₁",
        "Additive error that the arithmetic of the route may have left in a singular value.",
        "Weyl; LAPACK Users' Guide",
    ),
)

GENERAL = (
    (
        "The update",
        "Δ = W_tuned − W_base, both cast up before they are subtracted. σ₁ ≥ σ₂ ≥ … are its singular values, and "
        "p = min(rows, cols) is how many it has.",
    ),
    (
        "Medians and bounds",
        "Lines by role and layer give medians over matrices. A range such as 120–180 is a certified interval: the "
        "exact value lies inside, since only part of the spectrum was computed.",
    ),
    (
        "Energy and budgets",
        "The energy of an update is ‖Δ‖², rounding included. A budget is what one rank in every matrix costs, rows + "
        "columns parameters a direction. Spent where it helps most, the same budget goes to whichever directions of "
        "the whole model hold most energy for their cost: exactly, so that it never does worse.",
    ),
    (
        "LoRA’s bet",
        "That a low rank is enough. Here it means: the best rank-r matrix keeps 90 % of the squared norm of the "
        "update that full training made. It speaks of this update; training under the constraint may find another.",
    ),
)
