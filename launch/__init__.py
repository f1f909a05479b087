"""`pretrain launch …`: starts a run's processes and reports how they ended."""
