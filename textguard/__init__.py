"""Text-guided image classifiers and their resilience to bit flips in hardware."""

__version__ = "0.1.0"
