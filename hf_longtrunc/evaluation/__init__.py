"""What a technique does to a text: tables and plots, on public names only."""
