"""Generate the text of a demo line: words, pieces of receipts, or random characters."""

from __future__ import annotations

import random
import string

PUNCTUATION = ".,:-/'&%$#()!?"
ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + " " + PUNCTUATION
SHORTEST, LONGEST = 3, 16

_WORDS = (
    "able about above across after again air all almost along also always animal another answer any apple arm around "
    "ask away baby back bag ball bank bath bean bear beat bed bell below best better big bird black blue board boat "
    "body book both bottle box boy bread break bridge bright bring brown build bus busy butter button buy cake call "
    "camp can car card carry castle cat chair cheese child choose circle city class clean clear clock close cloud coat "
    "coffee cold colour come cook cool corner cost cotton could count country cover cross cup cut dance dark day deep "
    "desk dinner dish doctor dog door down draw dream dress drink drive dry each early earth east easy eat egg eight "
    "engine enough even evening every eye face fall family far farm fast feel few field fill find fire first fish five "
    "floor flower fly follow food foot four free fresh friend fruit full game garden gate girl give glass go gold good "
    "grass great green ground grow hair half hall hand happy hard hat have head hear heart heavy hello help here high "
    "hill hold home horse hotel hour house ice idea ink inside iron jacket jam join juice jump just keep kettle key "
    "kind king kitchen kitten lamp large last late leaf learn left lemon letter light line list little live long look "
    "low lunch machine make many map market meal meet middle milk minute moon morning mother mouth music name near "
    "never new next night nine north nose note number ocean offer office often old onion open orange paper park people "
    "pepper picture quick quiet rain rice river road room salt school sea seven shop six sleep small snow soap soup "
    "south sugar summer sunny table taxi tea ten total tree under vase water week west window winter yellow zero zoo"
)
_RECEIPT = "TOTAL Total CASH Cash CHANGE TAX Tax VAT Tip SUM Sum DUE CARD Net Fee Qty ITEM Price"
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"
WORDS, RECEIPT_WORDS, MONTHS = _WORDS.split(), _RECEIPT.split(), _MONTHS.split()


def _price(rng: random.Random) -> str:
    return rng.choice(("", "", "$")) + f"{rng.choice((9, 99, 999)) * rng.random():.2f}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 5)))


def receipt(rng: random.Random) -> str:
    """A piece of a receipt, a form or a timetable: "TOTAL 12.50", "No. 4417", "03/11/24"."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(0, 99)
    forms = (
        lambda: f"{rng.choice(RECEIPT_WORDS)}{rng.choice((' ', ': '))}{_price(rng)}",
        lambda: f"{rng.randint(1, 12)} x {_price(rng)}",
        lambda: f"{rng.choice(('No. ', 'No ', '#', 'Ref ', 'Nr. '))}{_number(rng)}",
        lambda: f"{day:02d}{rng.choice('/.-')}{month:02d}{rng.choice('/.-')}{year:02d}",
        lambda: f"{day} {rng.choice(MONTHS)} {2000 + year}",
        lambda: f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}",
        lambda: f"{rng.choice(('VAT', 'Tax', 'Off'))} {rng.randint(1, 99)}%",
        lambda: f"({rng.choice(WORDS)}) {_number(rng)}",
        lambda: f"{rng.choice(WORDS).capitalize()} {_price(rng)}",
        lambda: f"Tel. {rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}",
    )
    return rng.choice(forms)()


def _cased(word: str, rng: random.Random) -> str:
    return rng.choice((word, word, word.capitalize(), word.upper()))


def words(rng: random.Random, longest: int) -> str:
    """Everyday words, at most `longest` characters, sometimes with punctuation between or after them."""
    text = _cased(rng.choice(WORDS), rng)
    while len(text) < longest and rng.random() < 0.7:
        text += rng.choices((" ", " & ", ", ", "-", "/", "'s "), (12, 1, 1, 1, 1, 1))[0]
        text += _cased(rng.choice(WORDS), rng)
    return text + rng.choices(("", ".", "!", "?", ":"), (10, 1, 1, 1, 1))[0]


def random_string(rng: random.Random, longest: int) -> str:
    """Random characters; one in eight repeats the previous one."""
    letters = rng.choice((ALPHABET, ALPHABET, ALPHABET, string.ascii_letters, string.digits + ".-/ "))
    text = ""
    for _ in range(rng.randint(SHORTEST, longest)):
        text += text[-1] if text and rng.random() < 0.125 else rng.choice(letters)
    return text


def sample_text(rng: random.Random, longest: int = LONGEST) -> str:
    """A line of 3 to `longest` characters without leading, trailing or repeated spaces."""
    while True:
        kind = rng.random()
        if kind < 0.4:
            text = random_string(rng, longest)
        elif kind < 0.6:
            text = receipt(rng)
        else:
            text = words(rng, longest)
        text = " ".join(text.split())
        if len(text) > longest:
            text = text[:longest].rstrip()
        if len(text) >= SHORTEST:
            return text
