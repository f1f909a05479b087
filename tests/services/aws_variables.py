"""What tests take out of the environment before they meet an S3 server."""

# Whatever the caller's shell says must not reach a test: nor may a test reach out.
AWS_VARIABLES = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "PRETRAIN_S3_ADDRESSING_STYLE",
    "PRETRAIN_S3_CHECKSUMS",
)
