"""Cohorts of slides: the table of a study, the index of its tiles, and pixels read through it."""
