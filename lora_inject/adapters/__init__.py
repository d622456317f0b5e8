"""Several adapters in one model: in use, switched off, combined, extracted, one for each row."""
