"""The rows of the paper and of our study: what is trained, how it runs, and how it is reported."""
