"""Attention that reads only some of the keys, or a summary of them (chapter 11)."""
