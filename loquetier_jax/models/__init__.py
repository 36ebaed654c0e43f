"""The frozen base model: what it is (spec), what it computes (decoder, dense), how it is loaded (load)."""
