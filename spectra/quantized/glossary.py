"""How to read each number of a quantized run: label, formula, reading and source."""

from __future__ import annotations

from spectra.report.glossary import Term

GENERAL = (
    (
        "What is measured",
        "Every two-dimensional weight W is quantized and read back as Ŵ; E = W − Ŵ is the error. Nothing is trained "
        "and no activation is quantized: this is what the stored numbers lose, before the model is run.",
    ),
    (
        "All matrices together",
        "Squared errors are summed and divided by summed squared norms, as if all matrices were one long vector: large "
        "matrices count for what they are. Shares of the error are pooled by the error’s energy, bits by weights.",
    ),
    (
        "Why noise",
        "Rounding independent weights leaves independent errors, and a matrix of those has no directions of its own: "
        "its singular values follow Marchenko and Pastur’s law, and rank r holds a share that depends on the shape and "
        "on r/p alone. Where an error’s spectrum is that, a low-rank adapter can undo no more of it than of any noise.",
    ),
    (
        "Compare at equal r/p",
        "Rank 64 of a 384 × 384 matrix holds 47 % of noise, of a 4096 × 4096 one 5.8 %: p = min(rows, columns) grows "
        "and r does not. What low rank repairs in a small model says nothing of a large one, unless r/p is the same.",
    ),
)

TERMS = (
    Term(
        "bits",
        "bits a weight",
        "8 · bytes stored / entries",
        "Codes, scales, zero points and fitted levels, what fills the last byte too.",
        "definition",
    ),
    Term(
        "sqnr_db",
        "signal over error, dB",
        "−10 log₁₀(‖E‖² / ‖W‖²)",
        "Six more is a step half as wide: about one bit.",
        "definition",
    ),
    Term(
        "gaussian_db",
        "Gaussian weights would keep, dB",
        "the same levels and block, quadrature over the block’s largest entry",
        "More than this and the weights are kinder than Gaussian ones, less and their tails are heavier. Scales count "
        "as exact in it.",
        "Yoshida (2023)",
    ),
    Term(
        "lloyd_max_db",
        "Lloyd–Max, dB",
        "the least error of ⌊2^bits⌋ levels on a normal law",
        "The best that rounding one weight at a time can do without scales of blocks. A block’s scale tells where its "
        "largest entry lies, so that a block format may stand above it.",
        "Max (1960); Lloyd (1982)",
    ),
    Term(
        "shannon_db",
        "rate–distortion bound, dB",
        "20 log₁₀ 2 · bits",
        "No code for independent Gaussian weights keeps more in as many bits.",
        "Shannon (1959)",
    ),
    Term(
        "edge",
        "σ₁ over the noise edge",
        "σ₁(E) / (s (√rows + √columns)),  s² = ‖E‖² / entries",
        "About 1 for noise of one size everywhere. Rows or columns whose weights are larger have larger errors, and "
        "raise it: that is a profile, and low rank can take some of it.",
        "Marchenko and Pastur (1967)",
    ),
    Term(
        "edge_whitened",
        "σ₁ over the noise edge, profile divided out",
        "the same of E with every row and column divided by its size",
        "About 1 where nothing but noise is left.",
        "Sinkhorn and Knopp (1967)",
    ),
    Term(
        "outliers",
        "directions above noise",
        "#{σᵢ above the edge and its fluctuation}, profile divided out",
        "Noise passes there once in a thousand matrices. 0: the error looks like noise.",
        "Marchenko and Pastur (1967); Tracy and Widom (1996)",
    ),
    Term(
        "distance_whitened",
        "distance from the noise’s law",
        "sup |F(σ²) − F_MP(σ²)|, profile divided out",
        "Kolmogorov–Smirnov distance of the whole spectrum; a few thousandths for noise of some hundred rows.",
        "Marchenko and Pastur (1967)",
    ),
    Term(
        "absorbed",
        "error that rank r holds",
        "Σ_{i≤r} σᵢ² / ‖E‖²",
        "The most that a low-rank adapter beside Ŵ can take back, by Eckart and Young’s theorem.",
        "Eckart and Young (1936)",
        "share",
    ),
    Term(
        "absorbed_noise",
        "of noise",
        "the tail of Marchenko and Pastur’s law at r/p",
        "What the best rank-r matrix holds of noise of the same shape.",
        "Marchenko and Pastur (1967)",
        "share",
    ),
    Term(
        "weighted_db",
        "signal over error on inputs, dB",
        "−10 log₁₀(‖E R^½‖² / ‖W R^½‖²),  R = E[xxᵀ]",
        "What the map’s outputs lose on the inputs that calibration saw.",
        "definition",
    ),
    Term(
        "weighted_optimal",
        "error on inputs that rank r takes back",
        "Σ_{i≤r} σᵢ(E R^½)² / ‖E R^½‖²",
        "By the factors that are best there; inputs that lie in few directions make it large.",
        "Zhang et al. (2024), QERA, theorem 1",
        "share",
    ),
    Term(
        "weighted_plain",
        "by the plain SVD’s factors",
        "1 − ‖(E − E_r) R^½‖² / ‖E R^½‖²",
        "What the factors that are best for the entries take back on the inputs.",
        "Li et al. (2023), LoftQ",
        "share",
    ),
    Term(
        "captured",
        "error in the update’s directions",
        "1 − ‖(I − U_rU_rᵀ) E (I − V_rV_rᵀ)‖² / ‖E‖²,  U_r, V_r of ΔW",
        "What an adapter could take away that kept the update’s leading rows or columns. Read it beside chance.",
        "definition",
        "share",
    ),
    Term(
        "captured_chance",
        "by chance",
        "1 − (1 − r/rows)(1 − r/columns)",
        "What as many random directions would hold.",
        "definition",
        "share",
    ),
    Term(
        "repaired",
        "error along the update",
        "⟨ΔW, E⟩ / ‖E‖²",
        "1 where the update, added to Ŵ, makes up for all of E; 0 where it does not know of it.",
        "definition",
    ),
)
