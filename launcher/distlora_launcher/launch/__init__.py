"""The processes of a run: the lock, the workers, the rendezvous of nodes, failures."""
