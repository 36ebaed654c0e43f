"""The frozen base model: architecture (spec), computation (decoder, dense) and loading (load)."""
