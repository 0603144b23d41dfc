"""What `stats()` counts, as Prometheus and OpenTelemetry read it. This package itself imports neither of them."""
