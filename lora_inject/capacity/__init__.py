"""Capacity on paper: what training needs, counted where nothing is computed."""
