"""What SelfAug costs, measured side by side: python -m benchmarks.NAME. See docs/speed.md."""
