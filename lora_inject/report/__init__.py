"""What trains and what it costs, counted from the live model."""
