"""Engines: resized images in, logits out. `base` is the contract; every other module is one engine."""
