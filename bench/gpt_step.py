"""Times whole training steps (forward, backward, clip, AdamW) of one model in strobe and in PyTorch, in turn, on the same
machine with the same threads.

    python bench/gpt_step.py build/release/bin/gpt_step_bench --rounds 3 --json results/FILE.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

SIZES = dict(layers=6, hidden=384, heads=6, seqlen=1024, batch=4, vocab=256)


def time_torch(architecture, size, steps, threads):
    """Seconds of each step of the same model in transformers, attention through SDPA, fused AdamW."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            n_layer=size["layers"], n_embd=size["hidden"], n_head=size["heads"], n_positions=size["seqlen"],
            vocab_size=size["vocab"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=size["layers"], hidden_size=size["hidden"], num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"], max_position_embeddings=size["seqlen"], vocab_size=size["vocab"],
            intermediate_size=(8 * size["hidden"] // 3 + 31) // 32 * 32, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    parameters = sum(p.numel() for p in model.parameters())
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(size["vocab"], (size["batch"], size["seqlen"]))
    targets = torch.randint(size["vocab"], (size["batch"] * size["seqlen"],))
    seconds, cpu_seconds = [], []
    for _ in range(steps + 1):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.view(-1, size["vocab"]), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu_begin)
    return {"parameters": parameters, "seconds_median": statistics.median(seconds[1:]), "seconds_min": min(seconds[1:]),
            "cpu_seconds_median": statistics.median(cpu_seconds[1:])}


def time_strobe(program, architecture, size, steps, threads):
    numbers = [size[key] for key in ("layers", "hidden", "heads", "seqlen", "batch", "vocab")]
    command = [program, architecture, *map(str, numbers), str(steps), str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gpt_step_bench")
    parser.add_argument("--architecture", choices=["gpt2", "llama"], nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=SIZES["batch"])
    parser.add_argument("--json")
    parser.add_argument("--torch-only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    SIZES["batch"] = args.batch
    if args.torch_only:  # a process of its own, so that neither side's threads or memory touch the other
        print(json.dumps(time_torch(args.torch_only, SIZES, args.steps, args.threads)))
        return

    record = {"command": " ".join(sys.argv), "size": SIZES, "threads": args.threads, "models": {}}
    for architecture in args.architecture:
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(time_strobe(args.program, architecture, SIZES, args.steps, args.threads))
            peer = [sys.executable, __file__, args.program, "--torch-only", architecture, "--steps", str(args.steps),
                    "--threads", str(args.threads), "--batch", str(args.batch)]
            theirs.append(json.loads(subprocess.run(peer, check=True, capture_output=True, text=True).stdout))
        best = min(ours, key=lambda r: r["seconds_median"])
        ratio = statistics.median(t["seconds_median"] for t in theirs) / statistics.median(o["seconds_median"] for o in ours)
        cpu = statistics.median(t["cpu_seconds_median"] for t in theirs) / statistics.median(o["cpu_seconds_median"] for o in ours)
        fastest = min(t["seconds_min"] for t in theirs) / min(o["seconds_min"] for o in ours)
        record["models"][architecture] = {"ratio_of_medians": ratio, "ratio_of_fastest": fastest, "ratio_of_cpu_seconds": cpu,
                                           "strobe": ours, "torch": theirs}
        print(f"{architecture}: {best['parameters'] / 1e6:.1f} M parameters, strobe {best['seconds_median']:.3f} s, torch "
              f"{min(t['seconds_median'] for t in theirs):.3f} s; torch / strobe = {ratio:.2f} (medians), {fastest:.2f} (fastest), {cpu:.2f} "
              "(CPU seconds)")
        for name, row in best["operators"].items():
            print(f"    {name:<14} {row['seconds_per_step']:8.4f} s  {row['gflops_per_second']:8.1f} GFLOP/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
