"""The connections of one event loop."""
