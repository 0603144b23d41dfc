"""A router for clients of the Centrifuge protocol."""
