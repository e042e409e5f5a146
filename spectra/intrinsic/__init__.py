"""Intrinsic dimension: the fewest numbers that fine-tuning must train to reach a share of its full accuracy."""
