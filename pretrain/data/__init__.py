"""From an indexed dataset to batches: index, order, reader, decode, augment, loader."""
