"""Live objects: the only files that import a framework, inside functions."""
