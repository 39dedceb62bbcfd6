"""Random damage to bytes, texts, tables and configs."""

import csv
import gzip
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Chance = random.Random

# Values that no key expects, or that some parser of the way takes for something else.
HOSTILE = (
    "", "null", "true", "-1", "0", "1e400", "nan", "inf", "-inf", "1e-400", "9" * 30, "3.5", "1_0",
    "abc", "[]", "[1,2]", "[[1],[2]]", "{}", "{a: 1}", "{a: {b: [c]}}", "'", '"', "'a'", '"a b"',
    "${", "${x}", "${seed}", "${.seed}", "${..x.y}", "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}",
    "${hydra:job.num}", "${hydra:no.such}", "${oc.decode:[}", "${nope:1}", r"\${seed}", "\\", "a\\",
    "é", "日本", "\u202e", "\x7f", "a b", "a=b", "a:b", "a,b", "1,2", "choice(1,2)", "range(1,3)",
    "interval(0,1)", "interval(1,0)", "glob(*)", "shuffle(1,2)", "tag(x,1)",
    "tag(log,interval(0,1))", "int(1.5)", "float(abc)",
    "sort(2,1)", "extend_list(1)", "../../x",
    "/dev/null", "~", "???", "_target_", "{_target_: os.system, command: id}", "a" * 300,
    "\t", "a\nb", "$(id)", ";", "#",
    "%s", "{0}", "!!python/object:os.system", "2026-01-01", "0x10", "-0.0", "1,,2", ",", "(", ")",
    "<script>", "--", "-m", "*",
)  # fmt: skip
NUMBERS = ("0", "1", "2", "3", "-1", "0.5", "1e-3", "7", "64")


def damaged(content: bytes, chance: Chance) -> bytes:
    """Some bytes, with one or two faults as disks, transfers and editors make them."""
    for _ in range(chance.choice((1, 1, 2))):
        place, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 4, 64, 512))
        match chance.randrange(9):
            case 0:
                content = content[:place]
            case 1:
                flipped = bytes(
                    each ^ (1 << chance.randrange(8)) for each in content[place:][:length]
                )
                content = content[:place] + flipped + content[place + len(flipped) :]
            case 2:
                content = content[:place] + chance.randbytes(length) + content[place:]
            case 3:
                content = content[:place] + content[place + length :]
            case 4:
                hole = bytes(len(content[place:][:length]))
                content = content[:place] + hole + content[place + length :]
            case 5:
                content = chance.choice(
                    (b"", b"\n", b"\0", b"\xff\xfe", b"PK\x03\x04", b"\x1f\x8b")
                )
            case 6:
                content = chance.randbytes(chance.randrange(1, 2000))
            case 7:
                content = content[place:]
            case _:
                content = content + content[-length:]
    return content


def broken_text(text: str, chance: Chance) -> bytes:
    """A text in another coding, with other line ends, or with something odd in a line."""
    lines = text.splitlines()
    row = chance.randrange(len(lines) or 1)
    match chance.randrange(8):
        case 0:
            return text.encode(chance.choice(("utf-16", "utf-8-sig", "utf-32", "utf-7")))
        case 1:
            return text.replace("a", "é").encode("latin-1", "replace")
        case 2:
            return text.replace("\n", chance.choice(("\r\n", "\r", "\n\n", " \n", "\0\n"))).encode()
        case 3:
            return "\n".join(lines[: chance.randrange(3)]).encode()
        case 4:
            lines.insert(row, chance.choice(HOSTILE))
        case 5:
            lines[row:row] = lines[row : row + 2] * 2
        case 6:
            lines[row] = lines[row] + chance.choice(('"', "'", ",", ",,,", ": :", "\t", "}", " #"))
        case _:
            chance.shuffle(lines)
    return "\n".join(lines).encode(errors="replace")


def table(rows: Sequence[dict[str, Any]], chance: Chance) -> bytes:
    """Rows as a CSV file of another country, or with wrong, missing, odd or repeated columns."""
    rows = [dict(row) for row in rows]
    names = list(rows[0])
    name = chance.choice(names)
    odd = (*HOSTILE, "1e9", "-40", "1,5", "1.234,5", "n/a", "NULL", "inf", "1e999", " 5 ", "5 dB")
    match chance.randrange(8):
        case 0:
            rows = [{key: value for key, value in row.items() if key != name} for row in rows]
        case 1:
            for row in chance.sample(rows, chance.randrange(1, len(rows) + 1)):
                row[name] = chance.choice(odd)
        case 2:
            for row in rows:
                row[name] = chance.choice(("", 0, 1, name))
        case 3:
            other = chance.choice((name.upper(), f" {name}", f"{name}\n", "", "é", names[0]))
            rows = [{(other if k == name else k): v for k, v in row.items()} for row in rows]
        case 4:
            rows = rows[: chance.randrange(1, 5)]
        case 5:
            rows = [chance.choice(rows) for _ in rows]
        case _:
            pass
    separator = chance.choice(",,,,;;\t|")
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=chance.choice((0, 1, 2)))
    writer.writerow(rows[0])
    decimal = chance.choice((".", ".", ","))
    short = chance.randrange(len(rows)) if chance.random() < 0.1 else None
    for number, row in enumerate(rows):
        plain = [str(v).replace(".", decimal) if isinstance(v, float) else v for v in row.values()]
        writer.writerow(plain[:1] if number == short else plain)
    text = stream.getvalue()
    return broken_text(text, chance) if chance.random() < 0.3 else text.encode(errors="replace")


def damage_file(path: Path, chance: Chance) -> None:
    """Damage a file in its place; sometimes it is gone, or a folder."""
    kind = chance.random()
    content = path.read_bytes()
    path.unlink()  # other names of the same file stay whole
    if kind < 0.05:
        return
    if kind < 0.1:
        path.mkdir()
        return
    if kind < 0.3 and path.suffix in (".json", ".jsonl", ".yaml", ".csv"):
        path.write_bytes(broken_text(content.decode(errors="replace"), chance))
    else:
        path.write_bytes(damaged(content, chance))


def zipped(content: bytes, chance: Chance) -> bytes:
    """Some bytes as a .gz file, which may be damaged too."""
    packed = gzip.compress(content)
    return damaged(packed, chance) if chance.random() < 0.5 else packed


def misspelt(name: str, chance: Chance) -> str:
    """A name with a letter too many, too few, or in another place."""
    place = chance.randrange(len(name) or 1)
    return chance.choice(
        (
            name[:place] + name[place + 1 :],
            name[:place] + chance.choice("aeé._-@:$ 0") + name[place:],
            name.upper(),
            name + ".",
            "." + name,
            name + "." + chance.choice(("x", "0", "_target_", "a.b")),
            name[::-1],
        )
    )
