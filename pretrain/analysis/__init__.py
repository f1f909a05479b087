"""What a network has learned to look at, in the figures of the ViT paper (arXiv:2010.11929, figure 7)."""
