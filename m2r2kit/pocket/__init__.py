"""How the small models in `data/` are made."""
