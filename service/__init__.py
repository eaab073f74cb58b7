"""Image bytes in, class probabilities out: the HTTP service (see ARCHITECTURE.md)."""
