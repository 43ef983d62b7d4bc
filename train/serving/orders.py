"""What a client asks for: JSON read into an `Order`, or refused with value, expectation and remedy (P10).

Types are checked here by the fields of SamplerConfig. Rejected: OmegaConf, as for the command line: it would resolve
`${oc.env:NAME}` in a stranger's text.
"""

import base64
import binascii
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from data.pictures import decode_picture
from data.shards import BadRecord
from model.sampler_config import SamplerConfig, one_picture, text_alone
from train.inference.pipeline import Pipeline
from train.inference.prompts import Part, require_captions, require_instruction

OF_PICTURES = (
    *("sampler", "steps", "spacing", "eta", "guidance", "image_guidance", "guidance_interval", "guidance_rescale"),
    "clip_x0",
)
OF_TEXT = ("temperature", "top_p", "max_new_tokens")
MOST_CHARACTERS = 16_384  # of a text
MOST_PARTS = 32  # texts and pictures of a prompt
MOST = {"steps": 1000, "max_new_tokens": 4096, "max_images": 8}
T = TypeVar("T")
MOST_SEED = 2**53 - 1  # what every JSON reader keeps exactly


class Refusal(Exception):
    """A request that is not done; `status` is HTTP's."""

    def __init__(self, error: str, expectation: str, remedy: str, status: int = 400) -> None:
        super().__init__(f"{error}: expected {expectation}; {remedy}")
        self.error, self.expectation, self.remedy, self.status = error, expectation, remedy, status

    def as_json(self) -> dict[str, str]:
        return {"error": self.error, "expectation": self.expectation, "remedy": self.remedy}


@dataclass(frozen=True)
class Order:
    """`n` samples of one prompt."""

    parts: tuple[Part, ...]
    sampler: SamplerConfig
    draw: bool  # begin with a picture
    seed: int
    n: int
    previews: bool
    unknown: tuple[str, ...]  # parts of the texts that the tokenizer does not know: the model cannot tell them apart

    @property
    def key(self) -> tuple[bool, SamplerConfig]:
        """Return what orders of one batch have in common."""
        return self.draw, self.sampler


class Orders:
    """Reads orders for one model; `defaults` and `seed` are what a client leaves out."""

    def __init__(self, pipeline: Pipeline, defaults: SamplerConfig, seed: int = 0) -> None:
        self.pipeline, self.seed = pipeline, seed
        names = [field.name for field in fields(SamplerConfig)]
        self.defaults = SamplerConfig(**{name: getattr(defaults, name) for name in names})

    def draw(self, given: Mapping[str, Any]) -> Order:
        """Read {"prompt": text, "pictures": [base64, ...], ...}: with pictures the prompt says what to make of them."""
        _refuse_unknown(given, ("prompt", "pictures", "n", "seed", "previews", *OF_PICTURES))
        text, pictures = _text(given, "prompt"), self._pictures(given)
        if pictures:
            _checked(require_instruction, "prompt", text, len(pictures))
        sampler = one_picture(self._sampler(given, OF_PICTURES))
        return self._order((*pictures, text), given, sampler, True, [text])

    def describe(self, given: Mapping[str, Any]) -> Order:
        """Read {"picture": bytes or base64, ...}, or with {"question": text} also {"pictures": [base64, ...]}.

        Without a question the picture is described.
        """
        _refuse_unknown(given, ("picture", "pictures", "question", "seed", *OF_TEXT))
        if "pictures" in given and ("picture" in given or "question" not in given):
            raise Refusal("pictures", "a question about them, and no picture beside them", 'give "question": "..."')
        pictures = self._pictures(given) if "pictures" in given else [self._picture(given.get("picture"), "picture")]
        parts: list[Part] = [*pictures]
        texts = [_text(given, "question")] if "question" in given else []
        if texts:
            parts = _checked(self.pipeline.ask, pictures, texts[0])
        return self._order(tuple(parts), given, text_alone(self._sampler(given, OF_TEXT)), False, texts)

    def complete(self, given: Mapping[str, Any]) -> Order:
        """Read {"parts": [{"text": ...} or {"picture": base64}, ...], ...}."""
        names = (*OF_PICTURES, *OF_TEXT, "max_images")
        _refuse_unknown(given, ("parts", "n", "seed", "previews", *names))
        listed = given.get("parts")
        if not isinstance(listed, list) or not 0 < len(listed) <= MOST_PARTS:
            found = f"{len(listed)} parts" if isinstance(listed, list) else f"parts={_shown(listed)}"
            raise Refusal(found, f"a list of 1...{MOST_PARTS}", 'give "parts": [{"text": "..."}]')
        parts: list[Part] = []
        for i, part in enumerate(listed):
            if not isinstance(part, dict) or part.keys() not in ({"text"}, {"picture"}):
                raise Refusal(f"parts[{i}]={_shown(part)}", '{"text": ...} or {"picture": base64}', "correct this part")
            is_text = "text" in part
            parts.append(_text(part, "text") if is_text else self._picture(part["picture"], f"parts[{i}].picture"))
        texts = [part for part in parts if isinstance(part, str)]
        return self._order(tuple(parts), given, self._sampler(given, names), False, texts)

    def _order(
        self, parts: tuple[Part, ...], given: Mapping[str, Any], sampler: SamplerConfig, draw: bool, texts: list[str]
    ) -> Order:
        _checked(require_captions, "prompt", [parts])
        self._require_room(parts, sampler, draw)
        n = _integer(given, "n", 1, 1, self.pipeline.batch_size)
        seed = _integer(given, "seed", self.seed, 0, MOST_SEED)
        previews = given.get("previews", True)
        if not isinstance(previews, bool):
            raise Refusal(f"previews={_shown(previews)}", "true or false", "correct it or leave it out")
        unknown = tuple(dict.fromkeys(piece for text in texts for piece in self.pipeline.tokenizer.unknown_in(text)))
        return Order(parts, sampler, draw, seed, n, previews, unknown)

    def _sampler(self, given: Mapping[str, Any], names: Sequence[str]) -> SamplerConfig:
        hints = get_type_hints(SamplerConfig)
        changes = {name: _typed(name, given[name], hints[name]) for name in names if name in given}
        for name, most in MOST.items():
            if (value := changes.get(name, 0)) > most:
                raise Refusal(f"{name}={value}", f"at most {most:,} from this server", "use train.sample for more")
        if changes.get("image_guidance") is not None and self.pipeline.guide is not None:
            found = f"image_guidance={changes['image_guidance']} of a model with a guide"
            raise Refusal(found, "null: a guide reads the whole prompt", "leave it out")
        return _checked(lambda: replace(self.defaults, **changes).suited_to(self.pipeline.config.diffusion))

    def _pictures(self, given: Mapping[str, Any]) -> list[np.ndarray]:
        listed = given.get("pictures", [])
        if not isinstance(listed, list) or len(listed) >= MOST_PARTS:
            raise Refusal(f"pictures={_shown(listed)}", f"a list of 0...{MOST_PARTS - 1}", "correct it or leave it out")
        return [self._picture(picture, f"pictures[{i}]") for i, picture in enumerate(listed)]

    def _picture(self, given: Any, name: str) -> np.ndarray:
        """Decode a picture's bytes, or their base64."""
        side = self.pipeline.latent_spec.resolution
        try:
            if isinstance(given, str):
                given = base64.b64decode(given.rpartition("base64,")[2], validate=True)  # a data URI is as good
            if not isinstance(given, bytes):
                raise ValueError("it is not there")
            return decode_picture(given, [(side, side)], name)
        except (BadRecord, ValueError, binascii.Error) as error:
            expectation = "a whole JPEG, PNG or WebP file of at most 64 megapixels, or its base64"
            raise Refusal(f"{name}: {error}", expectation, "send another picture") from None

    def _require_room(self, parts: Sequence[Part], sampler: SamplerConfig, draw: bool) -> None:
        """Refuse a prompt that is longer than any sequence of the training."""
        room = self.pipeline.room(sampler)
        tokens, (most, whose) = room.taken(parts, draw), room.most
        if tokens > most:
            raise Refusal(f"a prompt of {tokens:,} tokens", f"at most {most:,}, {whose}", "shorten it")


def _checked(run: Callable[..., T], *arguments: Any) -> T:
    """Return run(*arguments); what it refuses as "found: expected something; remedy" is refused to the client."""
    try:
        return run(*arguments)
    except ValueError as error:
        found, _, told = str(error).partition(": expected ")
        expectation, _, remedy = told.partition("; ")
        raise Refusal(found, expectation or "another value", remedy or "correct it or leave it out") from None


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise Refusal(
                f"unknown field {_shown(name)}",
                f"some of {', '.join(known)}",
                f"did you mean {close[0]}?" if close else "leave it out",
            )


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        found = f"{len(value):,} characters" if isinstance(value, str) else _shown(value)
        raise Refusal(f"{name}: {found}", f"a text of at most {MOST_CHARACTERS:,} characters", f'give "{name}": "..."')
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Refusal(f"{name} with half a surrogate pair", "Unicode text", "correct the text")
    return value


def _integer(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    if name not in given:
        return default
    value = given[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refusal(f"{name}={_shown(value)}", f"a whole number in {least}...{most}", "correct it or leave it out")
    return value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a JSON value as the type of a field of SamplerConfig."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if value is None and type(None) in get_args(hint):
        return None
    if choices:
        expected, found = f"one of {', '.join(choices)}", value if value in choices else None
    elif name == "guidance_interval":
        pair = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
        expected, found = "[lowest, highest] timestep, or null", tuple(value) if pair else None
    elif hint is int:
        expected, found = "a whole number", value if is_number and isinstance(value, int) else None
    else:
        expected, found = "a number", float(value) if is_number else None
    if found is None:
        raise Refusal(f"{name}={_shown(value)}", expected, "correct it or leave it out")
    return found


def _shown(value: Any) -> str:
    """Return a stranger's value, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
