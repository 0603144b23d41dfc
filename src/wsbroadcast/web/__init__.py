"""What connects a manager to a FastAPI app: routers, dependencies and access."""
