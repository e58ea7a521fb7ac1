"""Performance claims, each measured as a ratio in one run: `make bench`."""
