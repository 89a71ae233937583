"""A language model from mlx-lm, seen as embedding, blocks and head; its cache and its compiled passes."""
