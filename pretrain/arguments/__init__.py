"""What the commands take that load torch, a module each: `--help` and wrong usage need none of it. Called by cli.py."""
