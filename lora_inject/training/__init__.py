"""What trains and what stands still, and what an optimizer gets."""
