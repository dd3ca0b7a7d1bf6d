"""What is said: tokenizers, templates, rendering, and data from files to rows of tokens."""
