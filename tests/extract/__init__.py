"""Extraction: factors, places, patterns, folders, PEFT, the command."""
