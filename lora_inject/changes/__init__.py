"""What a commit is made of: small reversible changes of a model, and how they are carried out."""
