"""Tests, and the real systems around them."""
