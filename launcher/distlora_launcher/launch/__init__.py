"""The processes of a run: who runs it, its workers, where machines meet, what they died of."""
