"""Images and classes in, artifact out: fine-tuning (see ARCHITECTURE.md)."""
