"""Adapters on disk: saved, loaded, converted, in any format."""
