"""The rows of tables: what they are, how they are trained, and how their results are read and reported."""
