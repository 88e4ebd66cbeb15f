"""All that knows time: processes between noise and data, and their solvers."""
