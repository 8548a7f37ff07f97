"""Times decoding behind texts of several lengths, with the key-value cache and without.

    python bench/gpt_generate.py build/test/bin/gpt_generate_bench --json results/MACHINE/gpt-generate.json
"""

import argparse
import json

import measuring

SIZE = dict(layers=6, hidden=384, heads=6, vocab=256)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gpt_generate_bench")
    parser.add_argument("--architecture", choices=["gpt2", "llama"], nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()

    record = {**measuring.header(), "size": SIZE, "models": {}}
    for architecture in args.architecture:
        numbers = [SIZE[key] for key in ("layers", "hidden", "heads", "vocab")]
        output, others = measuring.run([args.program, architecture, *numbers, args.tokens, args.threads, *args.lengths])
        result = {**json.loads(output), "processors_used_by_others": round(others, 3)}
        record["models"][architecture] = result
        print(f"{architecture}: {result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads; others used {others:.2f} processors")
        for row in result["lengths"]:
            attention = row["seconds_per_token"]["attention"]
            print(f"    behind {row['length']:6} tokens: {row['tokens_per_second']:8.1f} tokens/s, {row['tokens_per_second_without_cache']:8.2f} "
                  f"without the cache; attention {attention * 1e3:.2f} ms of {1e3 / row['tokens_per_second']:.2f} ms, "
                  f"reads the cache at {row['cache_bytes'] / attention * 1e-9:.1f} GB/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
