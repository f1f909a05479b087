"""What is learned: each objective is one file and returns a loss sum."""
