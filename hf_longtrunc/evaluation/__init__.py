"""What a long context is worth: perplexity by position, and whether a fact in the middle is found again."""
