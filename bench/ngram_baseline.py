#!/usr/bin/env python3
"""What a byte-level n-gram model gets on the split that `strobe train` makes of a text: the yardstick for a trained model's
held-out loss per byte. Interpolated Witten-Bell smoothing; a document's end is a symbol of its own, as in training.

    bench/ngram_baseline.py TEXT [--order 6] [--held-out 0.1]
"""

import argparse
import json
import math

END = 256


def documents_of(text):
    """As gpt/data/corpus.cpp cuts them."""
    pieces = text.split(b"<|endoftext|>")
    for i, piece in enumerate(pieces):
        if i > 0 and piece.startswith(b"\n"):
            piece = piece[1:]
        if i + 1 < len(pieces) and piece.endswith(b"\n"):
            piece = piece[:-1]
        if piece:
            yield piece


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--order", type=int, default=6)
    parser.add_argument("--held-out", type=float, default=0.1)
    arguments = parser.parse_args()
    with open(arguments.text, "rb") as file:
        documents = list(documents_of(file.read()))
    if len(documents) * arguments.held_out < 8:
        parser.error("too few documents: strobe would hold out their ends, which this program does not do")
    every = round(1 / arguments.held_out)

    # Per order: context -> [total, distinct], and context + symbol -> count. Contexts are bytes; END never precedes anything.
    totals = [{} for _ in range(arguments.order)]
    counts = [{} for _ in range(arguments.order)]
    for index, document in enumerate(documents, 1):
        if index % every == 0:
            continue
        for i in range(len(document) + 1):
            symbol = document[i] if i < len(document) else END
            for length in range(min(arguments.order, i + 1)):
                context = document[i - length:i]
                total = totals[length].setdefault(context, [0, 0])
                key = (context, symbol)
                count = counts[length].get(key, 0)
                counts[length][key] = count + 1
                total[0] += 1
                total[1] += count == 0

    nats = [0.0] * arguments.order
    num_bytes = 0
    for document in documents[every - 1::every]:
        num_bytes += len(document)
        for i in range(len(document) + 1):
            symbol = document[i] if i < len(document) else END
            probability = 1 / 257
            for length in range(arguments.order):
                context = document[i - length:i] if length <= i else None
                total = totals[length].get(context)
                if total:
                    probability = (counts[length].get((context, symbol), 0) + total[1] * probability) / (total[0] + total[1])
                nats[length] -= math.log(probability)
    print(json.dumps({"text": arguments.text, "held_out_bytes": num_bytes,
                      "nats_per_byte": {str(n + 1): round(x / num_bytes, 4) for n, x in enumerate(nats)}}))


if __name__ == "__main__":
    main()
