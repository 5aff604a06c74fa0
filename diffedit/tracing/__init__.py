"""Running a causal trace to the end: interrupted or not, on one process or many, and what is kept of it."""
