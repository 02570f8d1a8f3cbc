"""What stands behind scripts.serve: engine.py (the batch's thread), text.py (tokens to text), schema.py and api.py (HTTP),
guard.py (who may ask), page.py (the chat page)."""
