"""One frozen, typed model for a whole run, and how YAML and overrides become it."""
