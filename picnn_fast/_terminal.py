"""Text of others on the user's terminal."""

import unicodedata


def printable(text: str) -> str:
    r"""Text whose control characters, such as those that move the cursor, are written out.

    Names of classes and folders may hold any. Spaces and line ends are kept.

    Example:
        >>> printable("a wren\x1b[2J")
        'a wren\\x1b[2J'
    """
    kept = (c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" for c in text)
    return "".join(
        c if keep else c.encode("unicode_escape").decode()
        for c, keep in zip(text, kept, strict=True)
    )
