"""What a process asks: noisy pyramids to predictions."""
