"""Closed forms: noise floors, random-matrix edges and perturbation bounds, on numpy and scipy alone."""
