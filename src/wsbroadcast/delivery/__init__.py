"""From this process to one socket."""
