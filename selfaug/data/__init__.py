"""From files to optimiser steps: sources, retrieval, prompts with roles, the token cache, batches."""
