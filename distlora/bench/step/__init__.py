"""`distlora bench step`: training steps of ours and of the peers, on the same model, rows and adapter, in turns.

The parent (cells, processes, compare, curves, report) imports no torch; each cell is a process of its own, or one a
rank (worker), which makes ours (ours) or a peer's (peers) and trains a step whenever its turn comes (turns).
"""
