"""Attention over drawn tokens: streamed, swept over n, shared out to processes; and exponents fitted to its errors."""
