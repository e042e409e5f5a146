"""Tests of the report: its content, its files, its page as a document, its command."""
