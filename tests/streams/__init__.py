"""Streams: what outlives the request."""
