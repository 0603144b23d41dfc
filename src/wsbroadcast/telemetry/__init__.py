"""What `stats()` counts, in the forms that Prometheus and OpenTelemetry read. Imports neither."""
