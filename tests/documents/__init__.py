"""Documents of an app's sockets."""
