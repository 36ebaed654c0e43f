"""Measurements: every performance claim of this project is produced by a module here and read from its JSON."""
