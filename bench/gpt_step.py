"""Times whole training steps (forward, backward, clip, AdamW) of one model in strobe and in PyTorch, in turn, on the same
machine with the same threads. Each turn is a process of its own, so that neither side's threads or memory touch the other's.

    python bench/gpt_step.py build/test/bin/gpt_step_bench --rounds 5 --json results/MACHINE/gpt-step.json

PyTorch's side is transformers' model with SDPA attention and the fused AdamW. The first step of every turn is not counted. A turn
in which others used more than a twentieth of a processor is told of: its wall-clock times are not to be believed.
"""

import argparse
import json
import statistics
import sys
import time

import measuring

SIZE = dict(layers=6, hidden=384, heads=6, seqlen=1024, batch=4, vocab=256)
BUSY_LIMIT = 0.05


def peer_model(architecture, size):
    import transformers

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
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def time_torch(architecture, size, steps, threads):
    """What gpt_step_bench prints, of the same model in transformers."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = peer_model(architecture, size)
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
    return {"torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_median": statistics.median(seconds[1:]), "seconds_min": min(seconds[1:]),
            "cpu_seconds_median": statistics.median(cpu_seconds[1:])}


def turn(command):
    output, others = measuring.run(command)
    return {**json.loads(output), "processors_used_by_others": round(others, 3)}


def compare(architecture, args):
    numbers = [SIZE[key] for key in ("layers", "hidden", "heads", "seqlen", "batch", "vocab")]
    ours_command = [args.program, architecture, *numbers, args.steps, args.threads]
    peer_command = [sys.executable, __file__, args.program, "--torch-only", architecture, "--steps", args.steps,
                    "--threads", args.threads, "--batch", SIZE["batch"]]
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(turn(ours_command))
        theirs.append(turn(peer_command))

    def ratio(key, choose=statistics.median):
        return choose(t[key] for t in theirs) / choose(o[key] for o in ours)

    return {"ratio_of_medians": ratio("seconds_median"), "ratio_of_fastest": ratio("seconds_min", min),
            "ratio_of_cpu_seconds": ratio("cpu_seconds_median"),
            "processors_used_by_others": max(r["processors_used_by_others"] for r in ours + theirs), "strobe": ours, "torch": theirs}


def report(architecture, result):
    ours = min(result["strobe"], key=lambda r: r["seconds_median"])
    theirs = min(result["torch"], key=lambda r: r["seconds_median"])
    print(f"{architecture}: {ours['parameters'] / 1e6:.1f} M parameters, {ours['threads']} threads, strobe {ours['seconds_median']:.3f} s, "
          f"torch {theirs['seconds_median']:.3f} s; torch / strobe = {result['ratio_of_medians']:.2f} (medians), "
          f"{result['ratio_of_fastest']:.2f} (fastest), {result['ratio_of_cpu_seconds']:.2f} (CPU seconds)")
    if result["processors_used_by_others"] > BUSY_LIMIT:
        print(f"    not quiet: others used up to {result['processors_used_by_others']:.2f} processors")
    total = sum(row["seconds_per_step"] for row in ours["operators"].values())
    for name, row in ours["operators"].items():
        flops = f"{row['gflops_per_second']:8.1f} GFLOP/s" if row["gflops_per_second"] else ""
        print(f"    {name:<14} {row['seconds_per_step']:8.4f} s {row['seconds_per_step'] / total:6.1%} {flops}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gpt_step_bench")
    parser.add_argument("--architecture", choices=["gpt2", "llama"], nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=SIZE["batch"])
    parser.add_argument("--json")
    parser.add_argument("--torch-only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    SIZE["batch"] = args.batch
    if args.torch_only:
        print(json.dumps(time_torch(args.torch_only, SIZE, args.steps, args.threads)))
        return

    record = {**measuring.header(), "size": SIZE, "threads": args.threads, "models": {}}
    for architecture in args.architecture:
        record["models"][architecture] = compare(architecture, args)
        report(architecture, record["models"][architecture])
        if args.json:
            with open(args.json, "w") as file:
                json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
