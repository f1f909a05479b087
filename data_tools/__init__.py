"""`pretrain data …`: make, index, check and look at shards."""
