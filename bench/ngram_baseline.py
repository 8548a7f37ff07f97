"""What counting alone gets: the held-out loss of byte n-gram models on the split that strobe train used.

    python bench/ngram_baseline.py TRAIN.tok HELD_OUT.tok        the two shards in strobe's cache folder

Interpolated absolute discounting (Ney, Essen, Kneser 1994): p_n(x | c) = max(count(c x) - d, 0) / count(c) +
d * distinct(c) / count(c) * p_{n-1}(x | c'), down to the uniform distribution over 256 bytes. The discount is chosen on the
last tenth of the training part. Contexts do not cross document borders.
"""

import argparse
import json

import numpy as np

HEADER = 80


def read_documents(path):
    """The bytes of a shard and, for each, how many bytes of its document precede it."""
    with open(path, "rb") as file:
        raw = file.read()
    if raw[:8] != b"strobtok":
        raise SystemExit(f"{path} is not a token shard")
    width = int.from_bytes(raw[12:16], "little")
    tokens, documents = (int.from_bytes(raw[i:i + 8], "little") for i in (16, 24))
    data = np.frombuffer(raw, dtype=f"<u{width}", count=tokens, offset=HEADER).astype(np.uint64)
    begin = HEADER + (tokens * width + 7) // 8 * 8
    starts = np.frombuffer(raw, dtype="<u8", count=documents, offset=begin).astype(np.int64)
    if data.size and data.max() > 256:
        raise SystemExit(f"{path} does not hold bytes: train with --tokenizer bytes")
    age = np.arange(tokens) - np.repeat(starts, np.diff(np.append(starts, tokens)))
    is_byte = data < 256  # id 256 only says that a document starts
    return data[is_byte], age[is_byte] - (data[starts] == 256).any()


def grams(data, age, order):
    """Keys of all (order)-grams that lie inside one document, and where their last byte is."""
    where = np.flatnonzero(age >= order - 1)
    keys = np.zeros(where.size, dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        keys = (keys << np.uint64(8)) | data[where - back]
    return keys, where


def counts(keys):
    return np.unique(keys, return_counts=True)


def look_up(table, keys):
    values, numbers = table
    at = np.minimum(np.searchsorted(values, keys), values.size - 1)
    return np.where(values[at] == keys, numbers[at], 0)


class Model:
    def __init__(self, data, age, max_order):
        self.tables = []
        for order in range(1, max_order + 1):
            keys, _ = grams(data, age, order)
            full = counts(keys)
            contexts = full[0] >> np.uint64(8)
            values, first = np.unique(contexts, return_index=True)
            total = np.add.reduceat(full[1], first)
            distinct = np.diff(np.append(first, contexts.size))
            self.tables.append((full, (values, total), (values, distinct)))

    def losses(self, data, age, discount):
        """Mean nats per byte for each order from 1 on."""
        p = np.full(data.size, 1.0 / 256.0)
        out = []
        for order, (full, total, distinct) in enumerate(self.tables, start=1):
            keys, where = grams(data, age, order)
            n = look_up(total, keys >> np.uint64(8))
            seen = n > 0
            where, keys, n = where[seen], keys[seen], n[seen]
            c = look_up(full, keys)
            d = look_up(distinct, keys >> np.uint64(8))
            p[where] = np.maximum(c - discount, 0.0) / n + discount * d / n * p[where]
            out.append(float(-np.log(p).mean()))
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--max-order", type=int, default=7, choices=range(1, 8))
    parser.add_argument("--json")
    args = parser.parse_args()
    data, age = read_documents(args.train)
    cut = data.size * 9 // 10
    tuning = Model(data[:cut], age[:cut], args.max_order)
    discount = min(np.arange(0.4, 1.0, 0.1), key=lambda d: min(tuning.losses(data[cut:], age[cut:], d)))
    losses = Model(data, age, args.max_order).losses(*read_documents(args.held_out), discount)
    for order, loss in enumerate(losses, start=1):
        print(f"order {order}  {loss:.4f} nats per byte")
    print(f"discount {discount:.1f}; best {min(losses):.4f} nats per byte at order {1 + int(np.argmin(losses))}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"discount": float(discount), "nats_per_byte_by_order": losses}, file, indent=2)


if __name__ == "__main__":
    main()
