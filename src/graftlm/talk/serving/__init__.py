"""The server: one engine a model, the OpenAI routes before it, and what guards them."""
