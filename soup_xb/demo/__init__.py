"""The demonstration: a small real base, a dataset that teaches an answer format, the judge of that format."""
