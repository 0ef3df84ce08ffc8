"""Compare training steps of ours and of the peers on the same model, sequences and adapter, in turns.

The parent (cells, compare, report) imports no torch. Each rank of a cell is a process (worker), which trains ours or a
peer's (peers) a step whenever it gets a turn (turns).
"""
