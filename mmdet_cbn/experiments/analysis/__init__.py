"""How well compensation predicts the statistics that old images have under the current weights."""
