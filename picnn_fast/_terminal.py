"""Text on the user's terminal: that of others, and what is counted."""

import unicodedata


def counted(number: int, noun: str) -> str:
    """A number of things, in English: one, or several of which the name ends with an s.

    Example:
        >>> counted(1, "epoch"), counted(1000, "image"), counted(0, "class")
        ('1 epoch', '1,000 images', '0 classes')
    """
    several = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else several}"


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
