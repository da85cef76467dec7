"""Does anything of a slide's label, macro or vendor text stand in an output? Every byte is looked at."""
