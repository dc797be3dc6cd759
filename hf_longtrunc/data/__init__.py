"""Before the model: which documents share a row."""
