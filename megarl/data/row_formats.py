"""Recognise the format of a row by its columns, and rewrite formats that others reduce to.

The formats (:data:`megarl.config.row_formats.FORMATS`) are those of Alpaca, ShareGPT, OpenAI's chat API and
TRL's dataset types, standard (texts) and conversational (lists of messages).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from megarl.config.row_formats import FORMATS, RowFormat
from megarl.data.row_fields import as_messages, get_messages, get_text
from megarl.data.rows import Row
from megarl.errors import UserError

Messages = list[dict[str, Any]]


def recognise(record: dict[str, Any], where: str, usable: Sequence[str], named: str = "auto") -> str:
    """Return the name of the row's format.

    Args:
        record: the row.
        where: its file and line, to begin errors with.
        usable: formats that the job trains on.
        named: the format that the configuration names, or auto.

    Raises:
        UserError: a column is missing, the job does not train on such rows, or several formats fit.
    """
    if named != "auto":
        if missing := [name for name in FORMATS[named].needs if name not in record]:
            raise UserError(f"{where}: {_lacks(FORMATS[named], missing, record)}")
        return named
    full = [each for each in FORMATS.values() if _fits(each, record)]
    if found := [each.name for each in full if each.name in usable and not _is_part(each, full)]:
        if len(found) > 1:
            which = " and ".join(found)
            raise UserError(f"{where}: has the columns of {which} rows; choose one with row_format")
        return found[0]
    prompt_alone = full == [FORMATS["prompt"]]
    if full and not (prompt_alone and _closest(record, usable)):
        lacks = f"{_more_than_a_prompt(record, usable)}; " if prompt_alone else ""
        raise UserError(f"{where}: {lacks}{full[0].name} rows ({full[0].columns}): {full[0].users}")
    raise UserError(f"{where}: {_near_miss(record, usable)}")


def _more_than_a_prompt(record: dict[str, Any], usable: Sequence[str]) -> str:
    """Return the fields that a row with a prompt lacks for each format that has one."""
    with_prompt = (FORMATS[name] for name in usable if "prompt" in FORMATS[name].needs + FORMATS[name].may)
    lacking = (" and ".join(repr(n) for n in each.needs if n not in record) for each in with_prompt)
    return f"no field {', or '.join(lacking)}"


def _fits(format_: RowFormat, record: dict[str, Any]) -> bool:
    if not all(name in record for name in format_.needs):
        return False
    # A class number or a text in a column of this name is something else.
    return format_.name != "unpaired_preference" or isinstance(record["label"], bool)


def _is_part(format_: RowFormat, full: Sequence[RowFormat]) -> bool:
    """Whether a longer format that has all of these columns fits too: it says what the row means."""
    return any(set(format_.needs) < set(other.needs) for other in full)


def _closest(record: dict[str, Any], usable: Sequence[str]) -> RowFormat | None:
    """Return the format with most of its columns in the row, apart from the prompt, which many have."""
    best: tuple[float, RowFormat | None] = (0, None)
    for name in usable:
        needs = FORMATS[name].needs
        own = [column for column in needs if column != "prompt" and column in record]
        like = [column for column in needs if column not in record and _near(column, record)]
        share = (len(own) + 0.9 * len(like) + 0.5 * ("prompt" in needs and "prompt" in record)) / len(needs)
        if (own or like) and share > best[0]:
            best = share, FORMATS[name]
    return best[1]


def _near(column: str, record: dict[str, Any]) -> str | None:
    return next(iter(get_close_matches(column, record, 1, 0.75)), None)


def _near_miss(record: dict[str, Any], usable: Sequence[str]) -> str:
    if (format_ := _closest(record, usable)) is not None:
        return _lacks(format_, [name for name in format_.needs if name not in record], record)
    forms = "; ".join(f"{name}: {FORMATS[name].columns}" for name in usable)
    name = "name its columns (messages_field, prompt_field, ...)"
    return f"no known format of rows; it has {_has(record)}; known here are {forms}; or {name}"


def _lacks(format_: RowFormat, missing: Sequence[str], record: dict[str, Any]) -> str:
    close = [f" ({near!r} is close)" if (near := _near(column, record)) else "" for column in missing]
    lacks = ", ".join(f"{column!r}{note}" for column, note in zip(missing, close, strict=True))
    needs = f"which rows of format {format_.name} have ({format_.columns})"
    return f"no field {lacks}, {needs}; it has {_has(record)}"


def _has(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "nothing"


def instruction(record: dict[str, Any], where: str) -> str:
    """Return the prompt of an Alpaca row: the instruction, a blank line and the input, if it has one."""
    text = get_text(record, "instruction", where)
    given = record.get("input", "")
    if not isinstance(given, str):
        raise UserError(f"{where}: field 'input' must be a string, found {type(given).__name__}")
    return f"{text}\n\n{given}" if given.strip() else text


def alpaca_messages(record: dict[str, Any], where: str) -> Messages | None:
    """Return an Alpaca row as a conversation if it has a system text or earlier turns; else None."""
    turns: Messages = []
    if record.get("system"):
        turns.append({"role": "system", "content": get_text(record, "system", where)})
    for position, turn in enumerate(record.get("history") or ()):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise UserError(f"{where}: history[{position}] must be a pair of texts, prompt and response")
        roles = ("user", "assistant")
        turns += [{"role": role, "content": text} for role, text in zip(roles, turn, strict=True)]
    if not turns:
        return None
    turns.append({"role": "user", "content": instruction(record, where)})
    return [*turns, {"role": "assistant", "content": get_text(record, "output", where)}]


def sharegpt_messages(record: dict[str, Any], column: str, where: str, *, weighted: bool = False) -> Messages:
    """Return the conversation of a ShareGPT row; its column ``system``, if any, comes first."""
    messages = get_messages(record, column, where, weighted=weighted)
    if not record.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise UserError(f"{where}: has a system message, and a column 'system' too")
    return [{"role": "system", "content": get_text(record, "system", where)}, *messages]


def split_texts(where: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the common beginning of two texts and both rests; words are left whole.

    The blanks before the first different words belong to the rests, as in TRL's ``extract_prompt``, which
    also cuts inside of words.
    """
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1
    if end > 0 and chosen[end - 1] == " ":
        end -= 1
    prompt, rests = chosen[:end], (chosen[end:], rejected[end:])
    if not prompt.strip() or not all(rest.strip() for rest in rests) or rests[0] == rests[1]:
        raise UserError(
            f"{where}: a preference row without 'prompt' holds it in both: 'chosen' and 'rejected' must begin"
            " with the same words and go on differently"
        )
    return prompt, *rests


def pair_up(rows: Iterable[Row], named: str) -> Iterator[Row]:
    """Join rows of unpaired preference to pairs: the n-th desirable and undesirable response to a prompt.

    Other rows pass unchanged. Responses that are left over are errors.
    """
    waiting: dict[str, tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = {}
    for where, record in rows:
        if isinstance(record, UserError) or not _is_unpaired(record, named):
            yield where, record
            continue
        if missing := [n for n in FORMATS["unpaired_preference"].needs if n not in record]:
            yield where, UserError(f"{where}: {_lacks(FORMATS['unpaired_preference'], missing, record)}")
            continue
        if not isinstance(record["label"], bool):
            yield where, UserError(f"{where}: field 'label' must be true (desirable) or false")
            continue
        key = json.dumps(record["prompt"], sort_keys=True, ensure_ascii=False)
        rejected, chosen = sides = waiting.setdefault(key, ([], []))
        sides[record["label"]].append((where, record["completion"]))
        if rejected and chosen:
            (good_at, good), (bad_at, bad) = chosen.pop(0), rejected.pop(0)
            yield (
                f"{good_at} with {bad_at}",
                {"prompt": record["prompt"], "chosen": good, "rejected": bad},
            )
    for sides in waiting.values():
        for label, left in enumerate(sides):
            kind = ("undesirable", "desirable")[1 - label]
            for where, _ in left:
                yield where, UserError(f"{where}: no {kind} response to the same prompt to pair it with")


def refuse_unpaired(rows: Iterable[Row], field: str) -> Iterator[Row]:
    """Yield rows of a stream; raise UserError, which names ``field``, at one of unpaired preference."""
    for where, record in rows:
        if not isinstance(record, UserError) and _is_unpaired(record, "auto"):
            raise UserError(
                f"{field}: {where} is a row of unpaired preference, whose partner may lie anywhere; "
                "they cannot be streamed"
            )
        yield where, record


def _is_unpaired(record: dict[str, Any], named: str) -> bool:
    if named != "auto":
        return named == "unpaired_preference"
    return _fits(FORMATS["unpaired_preference"], record) and not _fits(FORMATS["preference"], record)


def preference_record(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row of preference with its prompt under "prompt", where Alpaca or ShareGPT columns hold it.

    A response may be one message instead of a list.
    """
    found = dict(record)
    if "prompt" not in found and "conversations" in found:
        found["prompt"] = sharegpt_messages(found, "conversations", where)
    elif "prompt" not in found and "instruction" in found:
        found["prompt"] = instruction(found, where)
        if record.get("system"):
            system = {"role": "system", "content": get_text(record, "system", where)}
            found["prompt"] = [system, *as_messages(found["prompt"], "user")]
    for name in ("chosen", "rejected"):
        if isinstance(found.get(name), dict):
            found[name] = [found[name]]
    return found
