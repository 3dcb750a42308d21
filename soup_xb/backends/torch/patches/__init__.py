"""Small reversible changes that one architecture needs; each fires by itself, says so, and is undone on close."""
