"""Floor 5: many slides to one folder of outputs, above ``pipeline``, which makes one."""
