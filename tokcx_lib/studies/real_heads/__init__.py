"""Heads and tokens of the embedded model on real text (chapter 7)."""
