"""What the layers of a model have to do with where their ranges start."""
