"""How a FastAPI app plugs the manager in."""
