"""Data sets: files in, normalised, cleaned and drawn rows out."""
