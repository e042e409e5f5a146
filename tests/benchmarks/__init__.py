"""Timings as ratios against named rivals, accuracy beside each: ``make bench``. No test asserts on seconds."""
