"""The OpenAI-compatible HTTP API, its continuous batching and its page."""
