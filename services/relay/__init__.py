"""The door for LLM clients: it finds their session, asks an upstream model, and keeps what was said."""
