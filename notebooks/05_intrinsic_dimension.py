# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How few numbers does a task need?
#
# Fine-tuning moves every weight θ of a model. Let it move along $d$ fixed random directions alone,
#
# $$\theta = \theta_0 + P\,\theta_d, \qquad P \in \mathbb{R}^{D \times d},$$
#
# and train the $d$ numbers $\theta_d$. The least $d$ that reaches 90 % of full fine-tuning's accuracy is the *intrinsic
# dimension* d90 of model, task, directions and training together (Li et al. 2018; Aghajanyan et al. 2021). This
# notebook puts MiniLM into such a subspace, reads a search that was made before, and asks how much of a real update
# random directions could have held.

# %%
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

import spectra
from spectra.examples import fetch
from spectra.intrinsic import IntrinsicDimension, captured
from spectra.methods import Subspace, inject

base = fetch("minilm")
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base)
injection = inject(model, "", Subspace(dimension=512, structure="said"))
injection

# %% [markdown]
# Nothing of $P$ is stored: Fastfood makes its entries from a seed, in each pass, by Walsh–Hadamard transforms. SAID
# gives each layer a trained scale $\lambda$ besides, and counts it among the 512.

# %%
core = model.spectra_subspace
dict(zip(core.layers, core.scales.tolist(), strict=True))

# %%
text = {"input_ids": torch.tensor([[101, 2023, 2003, 2204, 102]]), "labels": torch.tensor([1])}
before = model(**text).loss
before.backward()
with torch.no_grad():  # one step down the gradient of 512 numbers moves 22.7 million
    core.coordinates -= 20.0 * core.coordinates.grad
float(before.detach()), float(model(**text).loss.detach())

# %% [markdown]
# Columns of $P$ have norm 1, so that $\|P\theta_d\| \approx \|\theta_d\|$:

# %%
moved = sum(float(delta.square().sum()) for part in injection.parts.values() for delta in part.deltas().values()) ** 0.5
moved / float(core.coordinates.norm())

# %% [markdown]
# ## The search
#
# `python -m spectra.intrinsic --task subjectivity.tsv --structure said --out d90/` trains the reference, brackets
# d90, bisects, and repeats with seeds what decides. Here is what it found on Pang and Lee's subjectivity sentences,
# 100 steps a training (`analyses/intrinsic.py`):

# %%
results = Path("../analyses/results/intrinsic")
found = IntrinsicDimension.load(results / "subjectivity-said-fastfood.json")
found

# %%
for path in sorted(results.glob("*.json")):
    print(path.stem, "–", IntrinsicDimension.load(path).sentence())

# %% [markdown]
# ## What random directions hold of a real update
#
# Of a fixed update, a random $d$-dimensional space holds $d/D$ of the squared norm, whatever the update is. That
# training still works in so small a space says that very many updates solve the task, not that the full one is small.

# %%
update = {
    delta.name: delta.dense() for delta in spectra.deltas(base, fetch("minilm-sre"), include=r"layer\.0\..*weight$")
}
for projection in ("fastfood", "lora"):
    share = captured(update, dimension=256, projection=projection)
    print(f"{projection:9} {share.share:.2e} of the squared norm, {share.times_chance:.2f} times chance")

# %% [markdown]
# The singular vectors of the update itself hold far more with as many numbers, which is what LoRA bets on:

# %%
share = captured(update, dimension=256, projection="gradient", gradients=update)
print(f"own       {share.share:.2e} of the squared norm, {share.times_chance:.0f} times chance")
