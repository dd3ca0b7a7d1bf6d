"""How it learns: batches, the loop, one stage around it, checkpoints."""
