"""Heads that turn the features of an encoder into answers of a task."""
