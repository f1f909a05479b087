"""How good features are, without training the backbone."""
