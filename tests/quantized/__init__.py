"""The quantize command: its numbers, its page, its files."""
