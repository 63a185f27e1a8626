"""What watches a run: checkpoints, loggers, throughput."""
