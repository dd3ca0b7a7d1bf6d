"""What learns: loading and growing models, their rows, adapters, packed attention, the loss."""
