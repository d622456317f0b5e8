"""A few lines each for trainers of others; nothing here is imported unless you import it."""
