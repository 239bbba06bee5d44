"""Layers on top of each other, and heads side by side (chapter 12)."""
