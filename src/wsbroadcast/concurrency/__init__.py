"""Tasks, event loops and the borders between them."""
