"""Every class of transformers and timm that a small config can build, adapted as a whole."""
