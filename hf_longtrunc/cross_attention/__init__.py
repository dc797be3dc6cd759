"""Cross-attention to texts that are longer than the encoder's window."""
