"""After the logits: which tokens may be drawn."""
