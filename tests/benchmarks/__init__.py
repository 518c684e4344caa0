"""Measured claims: each module is one command (`python -m tests.benchmarks.NAME`) that prints; `make bench` runs all."""
