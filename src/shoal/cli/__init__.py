"""The face for people at a terminal. Each command wires rooms together and prints; none decides anything.

`app` is the list of commands; `output` is how all of them print, fail and speak JSON; one file per group of commands.
"""
