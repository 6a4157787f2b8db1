"""What CBN costs in time, memory and FLOPs."""
