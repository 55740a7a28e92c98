"""What goes wrong in a command because of the person at the keyboard."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; the message says what was wrong and what to do."""
