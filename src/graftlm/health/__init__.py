"""Why training fails: what to watch, what it means, what cures it."""
