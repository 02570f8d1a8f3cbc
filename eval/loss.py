"""Held-out loss, perplexity and bits per byte of every source, in one batched pass over all its held-out text.

Bits per byte = nats summed over the targets / ln 2 / UTF-8 bytes of the text: special tokens cost bits and add no bytes, so
the figure does not depend on the tokenizer's unit. A conversation's targets, and its bytes, are the assistant's words alone.
"""

from __future__ import annotations

from data.prepare import open_prepared
from eval.routing import RoutingRecorder
from train.checkpoint import Run
from train.validate import held_out_loss


def held_out(run: Run, *, batch_size: int | None = None, recorder: RoutingRecorder | None = None) -> dict[str, dict]:
    """{SOURCE: {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}} at the run's context length.

    loss is in nats per target and tokens counts the targets; a source without held-out text is left out. batch_size (rows)
    changes speed and memory alone. A recorder, already entered, sees every token that passes. Raises ValueError where the data
    is not prepared, is damaged, or was prepared with another tokenizer.
    """
    data = run.config.data
    masked = data.document_mask or data.format == "chat"
    prepared = open_prepared(data, run.tokenizer)
    if data.verify:
        prepared.verify("held_out")
    figures = {}
    for name in prepared.names:
        rows = prepared.held_out(name, run.config.context_length, masked)
        if rows.n_tokens == 0:
            continue
        batches = rows.batches(batch_size or run.config.eval.batch_size)
        if recorder is not None:
            batches = recorder.watch(name, batches)
        figures[name] = held_out_loss(run.model, batches, run.device, run.autocast).figures(rows.n_bytes)
    return figures
