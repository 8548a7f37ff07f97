"""Trains one small Llama-shaped transformers model per attention implementation, from the same start on the same batches.

    python bench/training_curve.py TEXT --json results/<gpu>/training-curve.json --plot docs/img/training_curve.svg

The losses of "strobe" should lie on those of "eager" as closely as those of "sdpa" do: all three compute the same function and
differ by rounding. On CUDA the model runs in bfloat16 under autocast, on the CPU in float32.
"""

import argparse
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "peers"))

import machine  # noqa: E402
import strobe  # noqa: E402

IMPLEMENTATIONS = ("eager", "sdpa", "strobe")


def model_of(implementation: str, device: str, layers: int, width: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128), max_position_embeddings=4096,
    )  # fmt: skip
    config._attn_implementation = implementation
    return LlamaForCausalLM(config).to(device)


def train(implementation: str, text: torch.Tensor, options) -> dict:
    """{"losses": one per step, "seconds": of the steps}"""
    device = options.device
    model = model_of(implementation, device, options.layers, options.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(options.seqlen)
    losses = []
    start = time.perf_counter()
    for _ in range(options.steps):
        first = torch.randint(0, len(text) - options.seqlen, (options.batch, 1), generator=generator)
        batch = text[first + offsets].long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    return {"losses": losses, "seconds": round(time.perf_counter() - start, 3)}


def distance(curves: dict, a: str, b: str) -> float:
    """The largest distance of two curves, in units of the first loss."""
    return max(abs(x - y) for x, y in zip(curves[a]["losses"], curves[b]["losses"])) / curves[a]["losses"][0]


def draw(record: dict, path: pathlib.Path) -> None:
    import plot

    losses = {name: curve["losses"] for name, curve in record["curves"].items()}
    plot.loss_curves(losses, {"eager": "-", "sdpa": "--", "strobe": ":"}, "loss", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path, help="any file; its bytes are the tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    options = parser.parse_args()

    strobe.hooks.transformers()
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8)
    settings = {n: getattr(options, n) for n in ("device", "steps", "batch", "seqlen", "layers", "width")}
    record = {"machine": machine.describe(), "settings": settings, "text_bytes": len(text), "curves": {}}
    for name in IMPLEMENTATIONS:
        record["curves"][name] = train(name, text, options)
    for name in ("sdpa", "strobe"):
        record[f"{name}_from_eager"] = distance(record["curves"], "eager", name)
    for name, curve in record["curves"].items():
        print(f"{name:8s} loss {curve['losses'][0]:.4f} -> {curve['losses'][-1]:.4f} in {curve['seconds']:.1f} s")
    print(f"largest distance from eager, of the first loss: strobe {record['strobe_from_eager']:.2e}, sdpa {record['sdpa_from_eager']:.2e}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        draw(record, options.plot)


if __name__ == "__main__":
    main()
