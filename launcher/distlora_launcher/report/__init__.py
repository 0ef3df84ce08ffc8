"""`distlora report`: one HTML file of a run or a sweep, which needs nothing beside it; imports no torch."""
