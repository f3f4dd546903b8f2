"""Ways to look at fewer pixels and tokens: tensor functions, and the hooks that run them inside a model."""
