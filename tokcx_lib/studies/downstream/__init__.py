"""What a reader of embeddings notices when the encoder reads fewer keys (chapter 8)."""
