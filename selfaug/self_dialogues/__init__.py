"""Dialogues that the base model writes itself, before it is fine-tuned: what SA-SFT and Magpie train on."""
