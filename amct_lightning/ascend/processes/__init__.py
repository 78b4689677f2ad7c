"""Processes of a job: how they start, how they notice that one is gone, how none stays behind."""
