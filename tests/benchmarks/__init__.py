"""Commands that measure what README.md in this folder reports. `make bench` runs those that need nothing else."""
