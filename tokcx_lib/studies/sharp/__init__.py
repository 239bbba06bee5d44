"""The sharp exponent: what chapter 10 measures, and how its checks can fail."""
