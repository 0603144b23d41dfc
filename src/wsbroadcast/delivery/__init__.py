"""The way from this process to one socket."""
