"""How to read each number of a report on two or more updates: label, formula, reading and source."""

from __future__ import annotations

from spectra.report.glossary import Term

# Δ_A, Δ_B updates of one base W (d × k); U, V their leading left and right singular vectors.
TERMS = (
    Term(
        "cosine",
        "cosine",
        "⟨Δ_A, Δ_B⟩ / (‖Δ_A‖ ‖Δ_B‖)",
        "Whether the two updates, each taken as one long vector, point the same way. 1 is the same up to size.",
        "definition",
    ),
    Term(
        "deviations",
        "cosine against chance",
        "cosine · √(d k)",
        "In standard deviations of the cosine of two updates of random directions, which is 0 ± 1/√(dk) whatever their "
        "ranks. Within 3 there is nothing to see; a large count can still be a small angle of agreement.",
        "Haar-random singular vectors; this report",
    ),
    Term(
        "norm_ratio",
        "norm of B over A",
        "‖Δ_B‖ / ‖Δ_A‖",
        "How much further B moved this matrix.",
        "definition",
    ),
    Term(
        "overlap_left",
        "overlap φ, output side",
        "‖U_A[:, :i]ᵀ U_B[:, :j]‖² / min(i, j)",
        "Share of the smaller subspace that lies in the larger: 1 where one holds the other. At high ranks random "
        "subspaces overlap too, so read the number above chance.",
        "Hu et al. (2022), eq. 4",
        "share",
    ),
    Term(
        "overlap_right",
        "overlap φ, input side",
        "‖V_A[:, :i]ᵀ V_B[:, :j]‖² / min(i, j)",
        "The same of the right singular vectors: which inputs an update listens to.",
        "Hu et al. (2022), eq. 4",
        "share",
    ),
    Term(
        "shared_left",
        "shared above chance, output side",
        "(φ − E) / (1 − E),  E = max(i, j) / d",
        "0 for random subspaces, 1 where one holds the other. The report counts at the leading 8, or at the smaller "
        "rank of an adapter.",
        "mean of the overlap of Haar-random subspaces",
        "share",
    ),
    Term(
        "shared_right",
        "shared above chance, input side",
        "(φ − E) / (1 − E),  E = max(i, j) / k",
        "The same of the right singular vectors.",
        "mean of the overlap of Haar-random subspaces",
        "share",
    ),
    Term(
        "captured_ab",
        "A held by B",
        "‖U_B U_Bᵀ Δ_A V_B V_Bᵀ‖² / ‖Δ_A‖²",
        "Share of A’s squared norm inside the leading row and column directions of B. No r directions hold more than "
        "A’s own leading r; random ones hold r²/(dk).",
        "orthogonal projection; Eckart–Young",
        "share",
    ),
    Term(
        "captured_ba",
        "B held by A",
        "‖U_A U_Aᵀ Δ_B V_A V_Aᵀ‖² / ‖Δ_B‖²",
        "The other way round; the two differ where the ranks or the spectra do.",
        "orthogonal projection; Eckart–Young",
        "share",
    ),
    Term(
        "resolved",
        "directions resolved in both",
        "greatest i: E₂ / (σᵢ − σᵢ₊₁ − E₂) ≤ ½",
        "How many leading directions form a subspace that storage rounding, arithmetic and what a truncated spectrum "
        "left out cannot have turned by more than 30°. The lesser of the two updates; overlaps beyond are uncertain.",
        "Wedin (1972)",
    ),
    Term(
        "chordal_left",
        "chordal distance, output side",
        "√Σ sin² θᵢ",
        "Distance of the two subspaces from their principal angles θ; at most √r.",
        "Björck and Golub (1973)",
    ),
    Term(
        "chordal_right",
        "chordal distance, input side",
        "√Σ sin² θᵢ",
        "The same of the right singular vectors.",
        "Björck and Golub (1973)",
    ),
    Term(
        "geodesic_left",
        "geodesic distance, output side",
        "√Σ θᵢ²",
        "Length of the shortest way from one subspace to the other, in radians.",
        "Björck and Golub (1973)",
    ),
    Term(
        "geodesic_right",
        "geodesic distance, input side",
        "√Σ θᵢ²",
        "The same of the right singular vectors.",
        "Björck and Golub (1973)",
    ),
)

# Numbers of one update, as the panel of a matrix lists them, one column an update.
UPDATE_TERMS = (
    Term(
        "relative",
        "relative change",
        "‖Δ‖ / ‖W‖",
        "How far the matrix moved against its own size.",
        "definition",
        "share",
    ),
    Term("frobenius", "Frobenius norm", "√Σ Δᵢⱼ²", "The size of the update.", "definition"),
    Term(
        "spectral_norm",
        "spectral norm σ₁",
        "max ‖Δx‖ / ‖x‖",
        "The most it does to any one input direction.",
        "definition",
    ),
    Term(
        "storage_floor",
        "storage floor",
        "√maxᵢ Σⱼ Sᵢⱼ + √maxⱼ Σᵢ Sᵢⱼ",
        "Spectral norm that rounding to the stored dtype alone can reach; an adapter’s is that of its stored factors.",
        "Bandeira and van Handel (2016), thm 1.1, leading term",
    ),
    Term(
        "resolved_count",
        "directions resolved",
        "Wedin sine ≤ ½",
        "Leading directions whose subspace rounding cannot have turned by more than 30°.",
        "Wedin (1972)",
    ),
    Term(
        "resolved_nf4",
        "resolved, were W in 4 bits",
        "the same with E₂ = ‖W − NF4(W)‖₂",
        "How many would still be resolved against the error of a base quantized to NF4.",
        "Wedin (1972); Dettmers et al. (2023)",
    ),
    Term(
        "intruder_count",
        "intruders at ε = 0.5",
        "#{i ≤ 10: maxⱼ |⟨uᵢ(W + Δ), uⱼ(W)⟩| < ε}",
        "Leading directions of the tuned matrix that resemble no direction of the base. Nearly every random direction "
        "would be one.",
        "Shuttleworth et al. (2024), algorithm 1",
    ),
    Term(
        "intruder_resolved",
        "of those leading directions, resolved",
        "√2 E₂ / (gap to either neighbour − E₂) ≤ ½",
        "How many of the same ten are directions at all: turned by less than 30° by rounding and by what an iteration "
        "left. One that is not may stand for any mixture with its neighbours.",
        "Wedin (1972)",
    ),
    Term(
        "amplification",
        "amplification at its rank",
        "‖Δ‖ / ‖UᵀWV‖",
        "How much louder the update is in its own directions than the base was there. Its twin in brackets is what "
        "random directions would give.",
        "Hu et al. (2022), table 7",
    ),
)

GENERAL = (
    (
        "Two updates",
        "Δ_A = W_A − W and Δ_B = W_B − W of one base W (d × k), or the product of an adapter’s factors. U holds the "
        "left singular vectors (output directions), V the right ones (input directions), the leading ones first.",
    ),
    (
        "Beside chance",
        "Two random subspaces overlap too, and the more the larger they are. Every number stands beside what subspaces "
        "of the same ranks give whose directions are drawn uniformly.",
    ),
    (
        "Resolved",
        "Rounding turns singular vectors, the more the closer their values lie. A subspace counts as resolved where "
        "Wedin’s bound keeps it within 30°; what is beyond is hatched.",
    ),
    (
        "Pooled",
        "Cosines and captured shares take all matrices as one, weighted by energy. Shared directions are medians over "
        "matrices; new directions are means.",
    ),
)
