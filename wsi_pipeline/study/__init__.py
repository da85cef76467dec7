"""Reader studies: can an expert tell synthetic tiles from real ones? A blinded page, and its analysis."""
