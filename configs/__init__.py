"""Presets: one YAML file for each recipe and model family."""
