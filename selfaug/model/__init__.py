"""The model: loading, adapters, hidden states and head, the reference."""
