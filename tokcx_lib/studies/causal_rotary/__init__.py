"""What masks, positions and dependence do to the limit: causal, rotary and serial attention (chapter 13)."""
