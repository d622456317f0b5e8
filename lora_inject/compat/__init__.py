"""What depends on other libraries' inner names, in one place, each with a fallback."""
