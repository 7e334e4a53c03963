"""One folder an operation: `reference.py` is the specification, the dispatch lives in `__init__.py`."""
