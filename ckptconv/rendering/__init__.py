"""Checkpoints, reports and problems for people: what the command line shows.

A view is a list of texts and aligned rows, without a frame. On a terminal rich colours, folds them; `plain`
gives the same text for a pipe: no colour, nothing wrapped, nothing cut off. What comes from a file is shown
with its control characters escaped, so that a name cannot write to the terminal.
"""
