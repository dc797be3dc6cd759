"""In attention: which keys a query sees, and at which distance."""
