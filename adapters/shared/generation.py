"""Text generation and teacher forcing with encoder-decoders: token ids and the characters that each stands for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from adapters.shared.tokenization import tokenize
from grounding.core.errors import ModelError, TextError
from grounding.core.hub import quiet
from grounding.core.text import BLANK, Generate, Span, TokenizedText

# Limit if the checkpoint sets none; the default of transformers, 20 tokens, cuts many lines.
MOST_TOKENS = 64
UNSET = (None, 20)


@dataclass(frozen=True, eq=False)
class TextGenerator:
    """The decoder of an encoder-decoder and its tokenizer: generates texts, tokenizes given ones, finds token ids."""

    model: Any  # a VisionEncoderDecoderModel; its parts have no static types
    tokenizer: Any

    def generate(self, encoded: Float[Tensor, "T N D"], settings: Generate) -> list[TokenizedText]:
        """Generate the text of each encoded image, with its end token unless the length limit cut it."""
        config = self._generation_config(settings)
        outputs = BaseModelOutput(last_hidden_state=encoded)
        with quiet("transformers"):  # it warns of every length that is not the checkpoint's own
            sequences = self.model.generate(encoder_outputs=outputs, generation_config=config)
        ends = set(_as_list(config.eos_token_id))
        return [self._generated(row, ends) for row in sequences[:, 1:].tolist()]

    def force(self, text: str, encoded: Float[Tensor, "N D"]) -> TokenizedText:
        """Tokenize a text as the model would generate it: leading special tokens are kept only if the model itself
        begins with the first of them. Raises TextError, ModelError."""
        tokens = tokenize(self.tokenizer, text, self.limit)
        if not tokens.special[-1]:  # the tokenizer adds no end token: leave room for it
            tokens = tokenize(self.tokenizer, text, self.limit - 1)
        before, after = tokens.visible[0], tokens.visible[-1] + 1
        if before:
            start = torch.tensor([[self.start]], device=encoded.device)
            first = self.model(encoder_outputs=(encoded[None],), decoder_input_ids=start, use_cache=False).logits
            before = 0 if int(first[0, -1].argmax()) == tokens.ids[0] else before
        kept, end = slice(before, after), tokens.read
        return TokenizedText(
            text,
            (*tokens.ids[kept], self.end),
            (*tokens.offsets[kept], (end, end)),
            (*tokens.special[kept], True),
            tokens.dropped,
            origin="forced",
            warnings=tokens.warnings,
        )

    def named(self, tokens: TokenizedText, span: Span) -> Span:
        """The span with the id of its `token`, the one explained at its position. Raises TextError."""
        if not span.token or span.token_id is not None:
            return span
        return replace(span, token_id=self.token_id(span.token, tokens.ids[span.positions[0]]))

    def token_id(self, name: str, place: int) -> int:
        """The id of the token `name`, with a leading blank if the token with the id `place`, at whose position it is
        scored, has one, else without. Raises TextError if `name` is no single token, naming its tokens."""
        tokenizer, name = self.tokenizer, " " if name == BLANK else name
        begins = str(tokenizer.convert_ids_to_tokens(place)).startswith(("\u0120", "\u2581"))
        unknown = tokenizer.unk_token_id
        for text in (f" {name}", name) if begins else (name, f" {name}"):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) == 1 and (ids[0] != unknown or name == tokenizer.unk_token):
                return int(ids[0])
        known = tokenizer.get_vocab().get(name)
        if known is not None:
            return int(known)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(name, add_special_tokens=False, verbose=False)["input_ids"])
        if set(pieces) <= {tokenizer.unk_token}:
            raise TextError(f"{name!r} is no token of this model")
        raise TextError(f"{name!r} is {len(pieces)} tokens of this model ({', '.join(map(repr, pieces))}): ask for one")

    def label_of(self, token: int) -> str:
        """The text of a token, see `label_of`."""
        return label_of(self.tokenizer, token)

    @property
    def start(self) -> int:
        """Id of the token that the decoder starts with. Raises ModelError if the checkpoint names none."""
        config, generation = self.model.config, self.model.generation_config
        candidates = (
            generation.decoder_start_token_id,
            getattr(config, "decoder_start_token_id", None),
            getattr(config.decoder, "decoder_start_token_id", None),
            generation.bos_token_id,
            getattr(config.decoder, "bos_token_id", None),
            self.tokenizer.cls_token_id,
        )
        found = next((i for i in candidates if i is not None), None)
        if found is None:
            raise ModelError("the checkpoint does not name the token its decoder starts with (decoder_start_token_id)")
        return int(found)

    @property
    def end(self) -> int:
        """Id of the token that ends a text. Raises ModelError if there is none."""
        candidates = (
            *_as_list(self.model.generation_config.eos_token_id),
            self.tokenizer.eos_token_id,
            self.tokenizer.sep_token_id,
        )
        found = next((i for i in candidates if i is not None), None)
        if found is None:
            raise ModelError("this model has no end token: it cannot be forced to a given text")
        return int(found)

    @property
    def pad(self) -> int:
        """Id of the token that pads a text; no score depends on it."""
        return self.start if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    @property
    def limit(self) -> int:
        """Maximum number of tokens that the decoder can generate."""
        return int(self.model.config.decoder.max_position_embeddings)

    def _generated(self, row: list[int], ends: set[int]) -> TokenizedText:
        end = next((i for i, token in enumerate(row) if token in ends), None)
        tokens, warnings = tokens_of(self.tokenizer, row if end is None else row[: end + 1]), []
        if end is None:
            tokens = replace(tokens, stopped=True)
            more = "it can generate no more" if len(tokens) >= self.limit else "--max-length allows more"
            warnings.append(f"stopped_by_length: the text was cut at {len(tokens)} tokens before its end; {more}")
        if not tokens.text.strip():
            warnings.append("the model generated no text for this image")
        return replace(tokens, origin="generated", warnings=tuple(warnings))

    def _generation_config(self, settings: Generate) -> Any:
        """The checkpoint's own generation config without sampling, with the beams and length of `settings`."""
        config = copy.deepcopy(self.model.generation_config)
        config.do_sample = False
        config.temperature = config.top_k = config.top_p = None
        config.num_return_sequences = 1
        config.decoder_start_token_id = self.start
        if settings.beams is not None:
            config.num_beams = settings.beams
        if config.num_beams in (None, 1):
            config.early_stopping = config.length_penalty = None
        if settings.max_length is not None:
            config.max_new_tokens, config.max_length = min(settings.max_length, self.limit), None
        elif config.max_new_tokens is None and config.max_length in UNSET:
            config.max_new_tokens, config.max_length = min(MOST_TOKENS, self.limit), None
        return config


def tokens_of(tokenizer: Any, ids: Sequence[int]) -> TokenizedText:
    """Tokenized text of generated ids, which the tokenizer need not return for the same text.

    The offsets of a token are the characters by which it makes the decoded text longer. Byte tokens that only together
    make a character share its offsets.
    """
    ids = list(ids)
    frame = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    hidden = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - frame)

    def decoded(count: int) -> str:
        # Not `skip_special_tokens`: an unknown token stands for a character of the text.
        return str(tokenizer.decode([i for i in ids[:count] if i not in hidden]))

    whole = decoded(len(ids))
    reach = [0]
    for count in range(1, len(ids) + 1):
        prefix = decoded(count)
        same = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(prefix))
        reach.append(max(reach[-1], min(same, len(whole))))
    special = tuple(i in hidden for i in ids)
    offsets: list[tuple[int, int]] = []
    for i, flag in enumerate(special):
        start, end = reach[i], reach[i + 1]
        if start == end and not flag:  # a byte of a character: to the character's end
            end = next((r for r in reach[i + 1 :] if r > start), start)
        blanks = len(whole[start:end]) - len(whole[start:end].lstrip())
        start += blanks if blanks < end - start else 0
        offsets.append((start, end))
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    marks = tuple("" if i in ends or not flag else label_of(tokenizer, i) for i, flag in zip(ids, special, strict=True))
    return TokenizedText(whole, tuple(ids), tuple(offsets), special, marks=marks)


def label_of(tokenizer: Any, token: int) -> str:
    """The text of a token, or its name in the vocabulary if it decodes to no text."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text else text.strip() or " "


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, list | tuple) else torch.tensor([ids]))]
