"""Training with the batch that was found: exact accumulation beyond it, and recovery where memory runs out anyway."""
