"""Position ids: CREAM and its alternatives, and rotary positions scaled to a longer window."""
