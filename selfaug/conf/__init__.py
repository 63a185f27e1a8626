"""The Hydra configuration groups of selfaug; not Python code."""
