"""Batches: rows laid out for one forward pass, and where in it the completions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from essa.trdpo.data import Example

SHARED, PACKED, PADDED = "shared", "packed", "padded"
"""A prompt once for its two completions; once for each of them, in one row without padding; in rows of their own."""

Parts = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Collator:
    """Lays out examples, each as a prompt with two completions.

    A batch holds, for B rows whose completions have N tokens in all:
        rows [B]: their numbers in the dataset.
        lengths [B, 3]: tokens of the prompt and of the two completions.
        input_ids: padded: [2 B, longest], first all rows' first completions behind their prompts, then all second ones,
            padded on the right. No mask is needed: causal attention sees no padding that comes later. Else [1, all tokens],
            with position_ids and with branches, the tokens of every prompt and of the completions behind it: shared [B, 3],
            packed [2 B, 2].
        index [N], labels [N]: positions in the flattened input whose hidden state predicts a label, and the label.
        sequence [N]: 2 row + completion that the label belongs to.
        desirable [B], reference_logps [B, 2]: where the examples have them.

    Of a judged row the second completion is that of the row before it, the last row's for the first: the mismatched
    completions of KTO's reference point.
    """

    pad_token_id: int
    layout: str

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        paired: list[Parts] = [
            (
                e.prompt,
                *(e.completions if len(e.completions) == 2 else (e.completions[0], examples[i - 1].completions[0])),
            )
            for i, e in enumerate(examples)
        ]
        lengths = torch.tensor([[len(part) for part in parts] for parts in paired])
        batch = {"rows": torch.tensor([example.row for example in examples]), "lengths": lengths}
        if self.layout == PADDED:
            batch |= self._padded(paired)
        elif self.layout == PACKED:
            batch |= self._in_one_row([(prompt, part) for prompt, *parts in paired for part in parts])
        else:
            batch |= self._in_one_row(paired)
        labels = np.concatenate([part for _, first, second in paired for part in (first, second)])
        batch["labels"] = torch.from_numpy(labels).long()
        batch["sequence"] = torch.arange(2 * len(paired)).repeat_interleave(lengths[:, 1:].flatten())
        if examples[0].desirable is not None:
            batch["desirable"] = torch.tensor([bool(example.desirable) for example in examples])
        if examples[0].reference is not None:
            batch["reference_logps"] = torch.tensor([e.reference for e in examples], dtype=torch.float64)
        return batch

    def _in_one_row(self, groups: Sequence[Parts]) -> dict[str, Tensor]:
        positions, index, start = [], [], 0
        for prompt, *completions in groups:
            positions.append(torch.arange(len(prompt)))
            last, end = start + len(prompt) - 1, start + len(prompt)
            for completion in completions:
                positions.append(torch.arange(len(prompt), len(prompt) + len(completion)))
                index += [torch.tensor([last]), torch.arange(end, end + len(completion) - 1)]
                end += len(completion)
            start = end
        ids = torch.from_numpy(np.concatenate([part for parts in groups for part in parts])).long()
        return {
            "input_ids": ids[None],
            "position_ids": torch.cat(positions)[None],
            "branches": torch.tensor([[len(part) for part in parts] for parts in groups]),
            "index": torch.cat(index),
        }

    def _padded(self, paired: Sequence[Parts]) -> dict[str, Tensor]:
        width = max(len(prompt) + max(len(first), len(second)) for prompt, first, second in paired)
        ids = torch.full((2 * len(paired), width), self.pad_token_id)
        index = []
        for row, (prompt, *completions) in enumerate(paired):
            for which, completion in enumerate(completions):
                place, end = which * len(paired) + row, len(prompt) + len(completion)
                ids[place, :end] = torch.from_numpy(np.concatenate((prompt, completion)))
                index.append(torch.arange(place * width + len(prompt) - 1, place * width + end - 1))
        return {"input_ids": ids, "index": torch.cat(index)}
