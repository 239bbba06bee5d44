"""Heads of a language model in its own context: how many of its keys a query uses (chapter 14)."""
