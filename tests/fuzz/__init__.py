"""Random damaged and hostile inputs for everything that rayk reads from disk, from the network and from users.

`python -m tests.fuzz --inputs 1000000` changes valid inputs at random and gives them to the readers. A reader may
refuse an input with its documented error only, within the memory and the time of `tests.fuzz.limits`. Everything else
is a miss, which the command prints with the name under which `--only NAME` makes the same input again.
"""
