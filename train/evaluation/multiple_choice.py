"""Multiple choice by ranked likelihood: the choice that the model finds likeliest after its context (as in GPT-3).

Three numbers for each set, by what the log likelihood of a choice is divided by: `accuracy`, nothing (`acc` of
lm-evaluation-harness); `accuracy_per_character`, the choice's length (its `acc_norm`); `accuracy_per_token`. Contexts
and choices are tokenized as there. Requests are packed as documents of training are, several to a row; ranks divide
them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.durable import atomic_write
from data.layout import IGNORE, Piece
from data.packing import ImageDraws, PackedBatch, collate, pack
from data.strict_json import dumps
from data.tokenizer import Tokenizer
from model.attention import block_mask
from model.document_attention import document_mask
from model.modalities import Modality
from train.evaluation.part import Inputs, Part, dealt, fingerprint_of, in_order
from train.evaluation.questions import DELIMITER, Question, read_multiple_choice
from train.evaluation.scores import Score, share
from train.inference.pipeline import Pipeline, Progress

TOKENS = 1 << 14  # of a batch: a few rows of packed requests
NO_DRAWS = ImageDraws(torch.zeros(0), [], [])
Likelihood = tuple[float, int]  # sum of the log probabilities of a choice's tokens, nats; how many they are


def evaluate_choices(files: dict[str, str], inputs: Inputs) -> Part:
    """Answer each file's questions; write every likelihood to choices-NAME.jsonl on rank 0. Collective.

    Scores are `choices/NAME/accuracy`, `accuracy_per_character` and `accuracy_per_token`. Raises ValueError for a
    question that does not fit the model's sequences.
    """
    ranks = inputs.ranks
    sets = {name: read_multiple_choice(Path(path)) for name, path in files.items()}
    prints = {name: fingerprint_of(f"choices.{name}", questions, ranks) for name, questions in sets.items()}
    asked = [
        (context, DELIMITER + choice)
        for questions in sets.values()
        for question in questions
        for context, choice in zip(question.contexts, question.choices, strict=True)
    ]
    _, mine = dealt(ranks, asked)
    with inputs.bar("multiple choice", len(mine)) as progress:
        found = iter(in_order(ranks, log_likelihoods(inputs.pipeline, mine, progress.update)))
    scores: dict[str, Score] = {}
    for name, questions in sets.items():
        answers = [[next(found) for _ in question.choices] for question in questions]
        scores |= {f"choices/{name}/{kind}": score for kind, score in accuracies(questions, answers).items()}
        if ranks.is_first:
            _write(inputs.output / f"choices-{name}.jsonl", questions, answers)
    data = {
        name: {"path": files[name], "fingerprint": prints[name], "items": len(questions)}
        for name, questions in sets.items()
    }
    return Part(scores, [], data)


def accuracies(questions: Sequence[Question], likelihoods: Sequence[Sequence[Likelihood]]) -> dict[str, Score]:
    """Return the shares of right answers; `likelihoods` are those of each question's choices. Of equals the first."""
    right = {"accuracy": 0, "accuracy_per_character": 0, "accuracy_per_token": 0}
    for question, of_choices in zip(questions, likelihoods, strict=True):
        sums, tokens = np.array(of_choices).T
        lengths = np.array([len(choice) for choice in question.choices])
        for kind, units in zip(right, (1, lengths, tokens), strict=True):
            right[kind] += int(np.argmax(sums / units)) == question.answer
    return {kind: share(count, len(questions)) for kind, count in right.items()}


@torch.no_grad()
def log_likelihoods(
    pipeline: Pipeline, requests: Sequence[tuple[str, str]], progress: Progress = lambda requests: None
) -> list[Likelihood]:
    """Return how likely each continuation is after its context; see `piece_of` for what is refused."""
    length = pipeline.config.data.sequence_length
    laid_out = [piece_of(pipeline.tokenizer, *request, length) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: -len(laid_out[i]))  # rows then fill well
    counts = [int((laid_out[i].labels != IGNORE).sum()) for i in order]
    sums: list[float] = []
    pad = pipeline.tokenizer.special.pad
    for rows in _batches([laid_out[i] for i in order], length):
        packed = [pack(row, length, pad) for row in rows]
        losses = _losses(pipeline, collate(packed, [NO_DRAWS] * len(packed), pipeline.config.model.patch_size))
        inside = counts[len(sums) : len(sums) + sum(map(len, rows))]
        sums += [-float(part.sum()) for part in losses.double().cpu().split(inside)]
        progress(len(inside))
    found = dict(zip(order, zip(sums, counts, strict=True), strict=True))
    return [found[i] for i in range(len(requests))]


def piece_of(tokenizer: Tokenizer, context: str, continuation: str, length: int) -> Piece:
    """Return BOS, context and continuation without its last token; targets are the continuation's tokens.

    As lm-evaluation-harness does: spaces at the context's end go to the continuation, both are tokenized together, and
    what follows the context's own tokens is the continuation's; a context that is too long loses its beginning. Raises
    ValueError for a continuation that has no tokens of its own, or more than `length`.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    before = tokenizer.encode(context)
    after = tokenizer.encode(context + continuation)[len(before) :]
    if not 0 < len(after) <= length:
        raise ValueError(
            f"choice {continuation[:60]!r} after {context[-60:]!r}: {len(after)} tokens; expected 1 to {length}, the "
            "model's sequence length"
        )
    ids = np.concatenate([[tokenizer.special.bos], before, after])[-(length + 1) :]
    labels = np.full(len(ids) - 1, IGNORE)
    labels[-len(after) :] = after
    return Piece(ids[:-1], labels, (), ())


def _batches(pieces: Sequence[Piece], length: int) -> Iterator[list[list[Piece]]]:
    """Yield batches of rows of pieces, in order; all have as many, the last ones empty: one shape on the device."""
    most = max(1, TOKENS // length)
    rows: list[list[Piece]] = [[]]
    room = length
    for piece in pieces:
        if len(piece) > room:
            if len(rows) == most:
                yield rows
                rows = []
            rows.append([])
            room = length
        rows[-1].append(piece)
        room -= len(piece)
    if rows[-1]:
        yield rows + [[]] * (most - len(rows))


def _losses(pipeline: Pipeline, batch: PackedBatch) -> torch.Tensor:
    """Return f32 [targets] nats of each target, in the order of rows and tokens."""
    model, device = pipeline.model, pipeline.stats.mean.device
    batch = batch.to(device)
    mask_of = block_mask if device.type == "cuda" else document_mask
    mask = mask_of(batch.document_ids, batch.image_ids, batch.visible_until)
    modality: Modality | None = None if model.config.untied == "none" else "text"
    embedded = model.embed_text(batch.input_ids)
    hidden = model.trunk(embedded, batch.position_ids, batch.grid_positions, mask, None, modality).flatten(0, 1)
    places, targets = (
        part[: batch.num_text_targets].split(model.config.text_loss_chunk)
        for part in (batch.text_target_index, batch.text_targets)
    )
    return torch.cat(
        [
            F.cross_entropy(model.text_logits(hidden.index_select(0, index)).float(), wanted, reduction="none")
            for index, wanted in zip(places, targets, strict=True)
        ]
    )


def _write(path: Path, questions: Sequence[Question], likelihoods: Sequence[Sequence[Likelihood]]) -> None:
    """Write a line for each question: its choices, the answer, and each choice's log likelihood and tokens."""
    with atomic_write(path) as file:
        for question, of_choices in zip(questions, likelihoods, strict=True):
            sums, tokens = zip(*of_choices, strict=True)
            row = {**vars(question), "log_likelihoods": sums, "tokens": tokens}
            file.write((dumps(row) + "\n").encode())
