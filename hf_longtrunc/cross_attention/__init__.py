"""A text longer than an encoder's window: which of its states the decoder's cross-attention reads."""
