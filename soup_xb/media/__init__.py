"""Pictures and sounds: found beside the data file, looked at once, and made into a model's inputs when they are due."""
