"""The C++ model against transformers: logits, gradients and AdamW steps of randomly initialised models, and checkpoints
both ways."""

import json
import os
import pathlib
import subprocess

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

BUILD = pathlib.Path(os.environ.get("STROBE_BUILD_DIR", "build"))
PROBE = BUILD / "bin" / "gpt_model_probe"
LEARNING_RATE, WEIGHT_DECAY, CLIP, STEPS = 3e-3, 0.1, 1.0, 10


def gpt2(layers, hidden, heads, context, vocab):
    return transformers.GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=heads, n_positions=context, vocab_size=vocab, initializer_range=0.08,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)


def llama(layers, hidden, heads, heads_k, context, vocab, **more):
    return transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads_k,
        max_position_embeddings=context, vocab_size=vocab, intermediate_size=hidden * 5 // 2, initializer_range=0.08,
        bos_token_id=0, eos_token_id=0, **more)


CASES = {
    "gpt2-small": gpt2(2, 48, 3, 64, 101),
    "gpt2-large": gpt2(4, 128, 8, 160, 515),
    "llama-small": llama(2, 48, 6, 2, 64, 101, tie_word_embeddings=True),
    "llama-large": llama(4, 128, 8, 2, 160, 515, head_dim=32, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "llama-one-key-head": llama(3, 96, 4, 1, 96, 301, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
}


def shifted_loss(model, sequences):
    """Mean over all tokens that have a successor; the sequences do not see each other."""
    total, count = 0.0, 0
    for ids in sequences:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        count += len(ids) - 1
    return total / count


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Their model, our probe of it, and the sequences that both read."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    config = CASES[request.param]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # fresh biases are zero and fresh gains one: a test of nothing
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "theirs")
    context = config.max_position_embeddings
    sequences = [torch.randint(config.vocab_size, (n,)).tolist() for n in (context, 17, 2, context // 2 + 1)]
    request_file = folder / "input.json"
    request_file.write_text(json.dumps({"sequences": sequences, "steps": STEPS, "learning_rate": LEARNING_RATE,
                                        "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP}))
    subprocess.run([PROBE, folder / "theirs", request_file, folder / "ours"], check=True)
    return model, sequences, load_file(folder / "ours" / "probe.safetensors"), folder


def test_logits(case):
    model, sequences, ours, _ = case
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])
    assert theirs.abs().max() > 1  # the comparison is one of numbers of this size
    assert (ours["logits"] - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("saved, key", [("checkpoint", "logits"), ("trained", "logits_after")])
def test_checkpoint_of_ours_in_transformers(case, saved, key):
    _, sequences, ours, folder = case
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours" / saved, attn_implementation="eager",
                                                                    output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = torch.cat([model.eval()(torch.tensor([ids])).logits[0] for ids in sequences])
    assert (ours[key] - theirs).abs().max() < 1e-4


def test_gradients(case):
    model, sequences, ours, _ = case
    model.zero_grad()
    loss = shifted_loss(model, sequences)
    loss.backward()
    assert abs(ours["losses"][0] - loss.item()) < 1e-4
    names = {name for name, _ in model.named_parameters()}
    assert names == {key.removeprefix("grad.") for key in ours if key.startswith("grad.")}
    for name, parameter in model.named_parameters():
        difference = ours["grad." + name] - parameter.grad
        assert parameter.grad.abs().max() > 0, name
        assert difference.abs().max() / parameter.grad.abs().max() < 1e-4, name
        assert difference.norm() / parameter.grad.norm() < 1e-4, name


def test_adamw_steps(case):
    model, sequences, ours, folder = case
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs", attn_implementation="eager").eval()
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = shifted_loss(model, sequences)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert (ours["losses"] - torch.tensor(losses)).abs().max() < 1e-4
