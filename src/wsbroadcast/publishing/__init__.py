"""Broadcasts from programs that hold no connections."""
