"""Composition: products, interference, merges, merged checkpoints, the command."""
