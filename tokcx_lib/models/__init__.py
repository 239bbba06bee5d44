"""Hugging Face models and the texts they read: heads, tokens, and encoders whose layers read fewer keys."""
