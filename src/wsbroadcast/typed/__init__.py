"""Messages with types: what a JSON message may be, by annotations that pydantic understands. No I/O."""
