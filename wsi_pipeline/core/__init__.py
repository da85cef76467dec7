"""Floor 0: geometry, tissue, plan, blending and pyramid as pure functions. No I/O, no torch, no clock."""
