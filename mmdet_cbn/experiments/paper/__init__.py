"""The paper's results as data, and the checkpoints that its authors released."""
