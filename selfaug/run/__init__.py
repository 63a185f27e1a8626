"""What happens in a run: its identity and directory, objects from the config, fitting, scoring, sweeps."""
