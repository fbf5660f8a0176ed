"""Speed beside what a user would pick instead, as a ratio in one run: ``python -m benchmarks --help``."""
