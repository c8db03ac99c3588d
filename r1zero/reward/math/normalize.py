r"""Normalisation: one spelling for each thing an answer may contain, from LaTeX, Unicode or text.

`clean` is what every reader of an answer starts from. After it, symbols are single characters
(`\le`, `<=` and U+2264 are all LE), sets stand in SET_OPEN and SET_CLOSE, rows of a matrix end in
ROW, "and" and "or" are AND and OR, roman and bold text is `\text{...}`, fractions are `\frac`, and
nothing is left that only changes how a formula looks.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

LE = "\u2264"
GE = "\u2265"
NE = "\u2260"
APPROX = "\u2248"
PM = "\u00b1"
MP = "\u2213"
DEGREE = "\u00b0"
INFINITY = "\u221e"
PI = "\u03c0"
CUP = "\u222a"
CAP = "\u2229"
IN = "\u2208"
EMPTY = "\u2205"
MINUS_SET = "\u2216"
SET_OPEN = "\u2983"
SET_CLOSE = "\u2984"
ANGLE_OPEN = "\u27e8"
ANGLE_CLOSE = "\u27e9"
ROW = "\u23ce"
AND = "\u2227"
OR = "\u2228"
REALS = "\u211d"

_SUPERSCRIPTS = dict(
    zip(
        "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b",
        "0123456789+-",
        strict=True,
    )
)
_SUBSCRIPTS = dict(
    zip("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789", strict=True)
)
_RAISED = re.compile("[" + "".join(_SUPERSCRIPTS) + "]+")
_LOWERED = re.compile("[" + "".join(_SUBSCRIPTS) + "]+")
# the 2 of 2 1/2 keeps its distance
_VULGAR = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")

_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014", "-")
    | dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
    | {"\u2236": ":", "\u3002": ".", "\u3001": ",", "\u2018": "'", "\u2019": "'", "\u2032": "'"}
    | {
        "\u221a": r"\sqrt ",
        "\u2a7d": LE,
        "\u2a7e": GE,
        "\u2245": APPROX,
        "\u00f8": EMPTY,
        "\u00d8": EMPTY,
    }
    | {
        "\u2228": OR,
        "\u2227": AND,
        "\u00ba": DEGREE,
        "\uffe5": "\u00a5",
        "\u2220": "",
        "\ufeff": "",
    }
    | {
        chr(code): ""
        for code in (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070))
    }
)

_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi _ _ rho _ sigma tau"
)
_CHARACTERS |= {
    0x3B1 + place: f"\\{name} " for place, name in enumerate(_GREEK.split()) if name != "_"
}
_CHARACTERS |= {0x3C6: r"\phi ", 0x3C7: r"\chi ", 0x3C8: r"\psi ", 0x3C9: r"\omega "}

# What a command stands for; a command not named here stays.
_COMMANDS = (
    dict.fromkeys("left right big Big bigl bigr Bigl Bigr bigg Bigg limits middle".split(), "")
    | dict.fromkeys(
        "displaystyle textstyle scriptstyle rm bf it angle hfill boxed fbox".split(), ""
    )
    | dict.fromkeys("large Large LARGE huge Huge small normalsize underline".split(), "")
    | dict.fromkeys("quad qquad enspace thinspace space nobreakspace".split(), " ")
    | dict.fromkeys("frac dfrac tfrac cfrac".split(), r"\frac")
    | dict.fromkeys("binom dbinom tbinom".split(), r"\binom")
    | dict.fromkeys("text textbf textit textrm textsf textnormal texttt mbox".split(), r"\text")
    | dict.fromkeys("mathbf mathit boldsymbol bm mathsf vec hat".split(), r"\letter")
    | dict.fromkeys("mathrm operatorname".split(), r"\roman")
    | dict.fromkeys("le leq leqslant".split(), LE)
    | dict.fromkeys("ge geq geqslant".split(), GE)
    | dict.fromkeys("ne neq".split(), NE)
    | dict.fromkeys("approx simeq cong doteq".split(), APPROX)
    | dict.fromkeys("emptyset varnothing".split(), EMPTY)
    | dict.fromkeys("cdot times ast cdotp".split(), "*")
    | dict.fromkeys("setminus backslash smallsetminus".split(), MINUS_SET)
    | dict.fromkeys("mid vert lvert rvert".split(), "|")
    | dict.fromkeys("land wedge".split(), AND)
    | dict.fromkeys("lor vee".split(), OR)
    | dict.fromkeys("dots cdots dotsc".split(), r"\ldots")
    | {
        "lt": "<",
        "gt": ">",
        "pm": PM,
        "mp": MP,
        "infty": INFINITY,
        "pi": PI,
        "cup": CUP,
        "cap": CAP,
    }
    | {"in": IN, "circ": "\u2218", "degree": DEGREE, "textdegree": DEGREE, "div": "/", "colon": ":"}
    | {"lbrace": SET_OPEN, "rbrace": SET_CLOSE, "langle": ANGLE_OPEN, "rangle": ANGLE_CLOSE}
    | {"lbrack": "[", "rbrack": "]", "prime": "'", "varphi": r"\phi", "varepsilon": r"\epsilon"}
    | {"lg": r"\log", "yen": "\u00a5", "euro": "\u20ac", "pounds": "\u00a3", "dollar": "\ue000"}
)
_ESCAPED = {"{": SET_OPEN, "}": SET_CLOSE, "$": "\ue000", "!": "\ue001", "|": "\u2016"}
_ESCAPED |= dict.fromkeys(",;:> \n\t", " ") | dict.fromkeys("()[]", "")
_ESCAPE = re.compile(
    r"\\(?:(?:left|right) ?(?P<angle>[<>])|(?P<row>\\(?: ?\[[0-9a-z. ]*\])?)|(?P<command>[A-Za-z]+)"
    r"|(?P<other>[^A-Za-z\\]))",
    re.DOTALL,
)

_FUNCTION = (
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|cis"
    rf"|(?:gcd|lcm|GCD|LCM|max|min)(?= ?\}} ?[(\[{{{SET_OPEN}])"
)
_DIGITS = "[0-9][0-9., ]*"
_REWRITES = [  # (what a text must have in it to be worth a try, pattern, replacement)
    ("color", r"\\(?:text)?color ?(?:\[[^]]*\] ?)?\{ ?(?!white|transparent)[^{}]*\}", ""),
    ("\\", r"\\letter ?\{ ?([A-Za-z]|\\[a-z]+) ?\}|\\roman ?\{ ?([ei]) ?\}", r" \1\2"),
    ("\\letter", r"\\letter(?= ?[A-Za-z])|\\letter ?(?=\{[^{}]*\\)", " "),
    ("\\roman", r"(?:^|(?<=[-+*/=(^_]))\\roman ?\{ ?([A-Za-z]) ?\}", r"\1"),
    ("\\", rf"\\(?:roman|text) ?\{{ ?({_FUNCTION}) ?\}}", r"\\\1 "),
    ("\\", r"\\(?:letter|roman)", r"\\text"),
    ("\\mathbb", r"\\mathbb ?\{? ?R ?\}?", REALS),
    ("phantom", r"\\[hv]?phantom ?(?:\{[^{}]*\}|.)", ""),
    ("", r"\s+|~", " "),
    (",", r"(?<=[0-9]) ?(?:\{,\}|,\ue001) ?(?=[0-9])", ""),  # thousands
    ("\\text", rf"(?<![0-9.])(?<![0-9.] )\\text ?\{{ ?({_DIGITS}|\{{ ?{_DIGITS}\}} ?)\}}", r"{\1}"),
    ("\\pmod", r"\\pmod ?\{ ?([0-9]+|[a-z]) ?\}", r"\\pmod \1"),
    ("\u2218", r"\^ ?(?:\u2218|\{ ?\u2218 ?\})|\u2218", DEGREE),
    (DEGREE, rf"\^ ?\{{ ?{DEGREE} ?\}}", DEGREE),
    (" and", r"\b(hundred|thousand|million) and\b", r"\1"),
    ("half", r"\band (?:a|one)[ -]half\b", "1/2"),
    ("...", r"(?<=,) ?\.\.\. ?(?=,)", r"\\ldots "),
    ("<=", r"<=", LE),
    (">=", r">=", GE),
    ("=", r"!=|\\not ?=", NE),
    ("**", r"\*\*", "^"),
    ("x", r"(?<=[0-9]) ?x ?(?=10 ?\^)", "*"),
    (":", r"\{ ?: ?\}", ":"),
    ("\u00a2", "\u00a2", " cents"),
    ("", r"\\text ?\{ ?,? ?(?:and|&) ?\}|(?<![A-Za-z])and(?![A-Za-z])|[\u548c\u53ca]", f" {AND} "),
    ("", r"\\text ?\{ ?,? ?or ?\}|(?<![A-Za-z])or(?![A-Za-z])|\u6216(?:\u8005)?", f" {OR} "),
    ("eal", r"(?:\\text ?\{ ?)?\b[Aa]ll (?:the )?real(?: number)?s?\b(?: ?\})?", REALS),
    ("\ue001", "\ue001", ""),
    ("  ", " +", " "),
]
_PATTERNS = [(hint, re.compile(pattern), replacement) for hint, pattern, replacement in _REWRITES]
_ENTITY = re.compile(r"&(?:[A-Za-z]+|#[0-9]+|#x[0-9A-Fa-f]+);")
_TWICE = re.compile(r"(?<!\\)(?:\\\\)+(?=[A-Za-z]{2}|[{}%$,;:!])")
_ENVIRONMENT = re.compile(r"(?<!\\)\\begin")
_WRAPPED = re.compile(r"\\text ?\{([^{}]*)\}\.?")


def _escape(match: re.Match[str]) -> str:
    if match["row"]:
        return ROW
    if match["angle"]:
        if match["angle"] == "<":
            return ANGLE_OPEN
        return ANGLE_CLOSE
    if match["command"]:
        return _COMMANDS.get(match["command"], match[0])
    return _ESCAPED.get(match["other"], match["other"])


def _math_signs(text: str) -> str:
    """Drop the `$` that open and close math; one without a partner is money."""
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    return text.replace("\ue000", "$")


def _grouped(characters: Iterable[str]) -> str:
    joined = "".join(characters)
    if len(joined) == 1:
        return joined
    return f"{{{joined}}}"


def _in_ascii(text: str) -> str:
    """Write what Unicode has signs for as LaTeX or ASCII, as far as it goes."""
    text = _RAISED.sub(lambda match: "^" + _grouped(_SUPERSCRIPTS[each] for each in match[0]), text)
    text = _LOWERED.sub(lambda match: "_" + _grouped(_SUBSCRIPTS[each] for each in match[0]), text)
    text = _VULGAR.sub(" ", text).replace("\u211d", r"\mathbb{R}")
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


def undo_escapes(text: str) -> str:
    r"""Undo `&nbsp;` and the like, and the second escape of a text with `\\frac` in it."""
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if "\\\\" not in text or _ENVIRONMENT.search(text):
        return text  # there, two of them end a row
    if "\\\\begin" in text:
        return undo_escapes(text.replace("\\\\", "\\"))
    return _TWICE.sub(lambda _: "\\", text)


def clean(text: str) -> str:
    """Give a text one spelling; what carries no meaning goes. Takes time linear in the text."""
    text = undo_escapes(text)
    text = (text if text.isascii() else _in_ascii(text)).strip("* ")
    text = _math_signs(_ESCAPE.sub(_escape, text))
    for hint, pattern, replacement in _PATTERNS:
        if hint in text:
            text = pattern.sub(replacement, text)
    return text.strip(" ").rstrip(".,; ")


def unwrap(text: str) -> str:
    r"""Take a text that is wholly one `\text{...}` out of it."""
    match = _WRAPPED.fullmatch(text)
    if match:
        return match[1].strip()
    return text


OPENING = {"(": ")", "[": "]", "{": "}", SET_OPEN: SET_CLOSE, ANGLE_OPEN: ANGLE_CLOSE}
CLOSING = frozenset(OPENING.values())


@cache
def _marks(separators: str) -> re.Pattern[str]:
    """Return a pattern for brackets and separators."""
    return re.compile("[" + re.escape("".join([*OPENING, *CLOSING, separators])) + "]")


def split(text: str, separators: str) -> list[tuple[str, str]]:
    """Cut a text at separators (one character each) outside of brackets.

    Returns (separator before the part or "", part) for each part; [] when brackets do not match.
    """
    if not any(map(text.__contains__, separators)):
        return [("", text)]
    parts: list[tuple[str, str]] = []
    depth = 0
    start = 0
    before = ""
    for match in _marks(separators).finditer(text):
        character = match[0]
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
            if depth < 0:
                return []
        elif depth == 0:
            parts.append((before, text[start : match.start()].strip()))
            start = match.end()
            before = character
    parts.append((before, text[start:].strip()))
    if depth == 0:
        return parts
    return []


def is_balanced(text: str) -> bool:
    """Tell whether as many braces open as close, none before it opened."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def is_enclosed(text: str) -> bool:
    """Tell whether the first bracket of a text closes at its end, by whatever bracket."""
    depth = 0
    for place, character in enumerate(text):
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
            if depth <= 0:
                return depth == 0 and place == len(text) - 1
        elif depth == 0:
            return False
    return False
