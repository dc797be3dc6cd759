"""Questions about a text of any length: find the passages that answer, then read them right before the question."""
