"""The Centrifuge client protocol, without I/O."""
