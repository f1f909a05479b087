"""`pretrain benchmark …`: what the parts cost here, next to the tools one would use instead."""
