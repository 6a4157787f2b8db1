"""Hooks for the Runner of mmengine."""
