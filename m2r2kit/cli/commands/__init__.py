"""One file a sub-command; `m2r2kit/__main__.py` parses the arguments and calls it."""
