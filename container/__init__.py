"""The image: how it is started, built, pushed and checked. What runs inside it needs the standard library alone."""
