"""The ways in which a peer is connected."""
