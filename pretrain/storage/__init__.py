"""Local folders and S3 buckets behind one small interface."""
