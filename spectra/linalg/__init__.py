"""Engines that make a Spectrum: dense, factored and sketched routes, and the choice among them."""
