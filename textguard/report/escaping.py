"""Foreign text (class names, answers, layers, revisions) for each kind of reader: shown as it is written, and never obeyed.

HTML is escaped by the page's template, CSV by `textguard.artifacts.write_csv`; matplotlib is told not to read it as markup.
"""

import re

# Control characters, lone surrogates, what turns the direction of text around or breaks lines. XML cannot hold most of them.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# What GitHub makes links, mentions, formulas, emoji and struck text of, even where a backslash stands before it.
LINKED = re.compile(r"[@#$~]|://|www\.|\bGH-\d|:[\w+-]+:", re.IGNORECASE)
# Beyond ASCII, what pdflatex has in T1: letters of most languages in Latin script, and common signs.
LATEX_SIGNS = frozenset("¡¿«»§°±·×µ–—‘’‚“”„†‡•…€™")
LATEX_LETTERS = frozenset(map(chr, range(0xC0, 0x180))) - frozenset("×÷ĦħĸĿŀŉŦŧſ")
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    # At the start of a row they would belong to the end of the row before.
    **{character: f"{{{character}}}" for character in "[]*"},
}


def visible(text: str) -> str:
    r"""The text, with what cannot be seen or must not be obeyed spelled out, as in \x1b. Line ends and tabs stay."""
    return UNSEEN.sub(lambda found: spelled_out(found[0]), text)


def spelled_out(character: str) -> str:
    r"""A character's code, as in \x1b."""
    return character.encode("unicode_escape", "surrogatepass").decode()


def one_line(text: str) -> str:
    """The visible text with a blank for each line end and tab."""
    return visible(re.sub(r"\r\n|[\n\r\t]", " ", text))


def shortened(text: str, most: int) -> str:
    """The visible text on one line, cut to `most` characters."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def for_markdown(text: str) -> str:
    """The text for a cell of GitHub's tables; as code where GitHub would make more of it than text."""
    line = one_line(text)
    if LINKED.search(line):
        fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
        room = " " * (line[:1] == "`" or line[-1:] == "`")
        code = line.replace("|", r"\|")
        return f"{fence}{room}{code}{room}{fence}"
    escaped = line.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\|*_`[]" else character for character in escaped)


def for_latex(text: str) -> str:
    """The text for LaTeX with inputenc utf8 and fontenc T1. Of what pdflatex has no letters for stands the code: U+732B."""
    escaped = "".join(LATEX.get(character) or _latex_letter(character) for character in one_line(text))
    return re.sub("-(?=-)", "-{}", escaped)  # two would become a dash


def _latex_letter(character: str) -> str:
    known = character.isascii() or character in LATEX_LETTERS or character in LATEX_SIGNS
    return character if known else f"U+{ord(character):04X}"
