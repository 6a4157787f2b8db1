"""What a layer remembers of earlier iterations, call by call."""
