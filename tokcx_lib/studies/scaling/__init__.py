"""Heads whose logits are multiplied by a factor that grows with the context (chapter 15)."""
