"""What stands in a file, in a message: cut short, and without what moves a terminal's cursor."""

_LIMIT = 300  # characters


def shown(value: object) -> str:
    r"""The text of a value, or of an error, fit to be printed.

    Example:
        >>> shown("plain"), shown("\x1b[31m")
        ('plain', '\\x1b[31m')
    """
    text = str(value)
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_LIMIT])
    return f"{plain}..." if len(text) > _LIMIT else plain
