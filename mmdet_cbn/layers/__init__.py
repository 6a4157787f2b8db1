"""The normalization layers. They need torch and mmengine alone."""
