"""Commands that are not yet of the command line's one shape."""
