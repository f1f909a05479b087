"""The files other libraries read, and how theirs come in."""
