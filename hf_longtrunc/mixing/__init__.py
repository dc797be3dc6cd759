"""After the logits of one model: its next-token distribution mixed with those of other models or of an adapter."""
