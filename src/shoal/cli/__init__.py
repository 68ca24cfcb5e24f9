"""The face for people at a terminal. Each command wires rooms together and prints; none decides anything.

`main` is where a command starts, `app` the list of commands, `output` how all of them print, fail and speak JSON; one
file per group of commands.
"""
