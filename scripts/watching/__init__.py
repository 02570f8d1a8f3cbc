"""What `scripts.watch` is made of."""
