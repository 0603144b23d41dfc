"""Protocols: what publications look like to clients that speak more than plain messages. Pure functions, no I/O."""
