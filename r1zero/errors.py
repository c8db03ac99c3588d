"""What ends a run, told apart by type."""


class BadInput(Exception):
    """A mistake of the user's, in configuration, data, model, checkpoint or environment: one sentence a line.

    It is told without a traceback, with exit code 2. Nothing else is: a ValueError of ours or of a library is a fault
    of the program, and keeps its traceback.
    """
