"""Adapters merged into weights, and out of them again."""
