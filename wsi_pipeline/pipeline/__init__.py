"""Floor 4: one slide from file to pyramid."""
