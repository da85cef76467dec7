"""Floor 4: measures on finished outputs, beside ``pipeline`` and never importing it."""
