"""Deterministic worlds that run the production machines under a virtual clock; see ``python -m simulations -h``."""
