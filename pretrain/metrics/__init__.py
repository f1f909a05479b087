"""What a run shows: journal, Prometheus, progress, FLOPs."""
