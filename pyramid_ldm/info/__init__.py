"""What a thing is, and what a config costs."""
