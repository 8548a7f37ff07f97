"""Checkpoint files against the safetensors and transformers packages: theirs in strobe, strobe's in theirs, bit for bit."""

import json
import os
import pathlib
import subprocess

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

STROBE = pathlib.Path(os.environ.get("STROBE_BUILD_DIR", "build/test")) / "bin" / "strobe"

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3, n_positions=32, vocab_size=101, bos_token_id=0, eos_token_id=0),
    "gpt2-wide-mlp": lambda: transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=77, n_inner=80,
                                                     layer_norm_epsilon=1e-6, bos_token_id=0, eos_token_id=0),
    "llama": lambda: transformers.LlamaConfig(num_hidden_layers=2, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
                                              intermediate_size=112, vocab_size=101, max_position_embeddings=64),
    "llama-tied": lambda: transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
                                                   intermediate_size=96, vocab_size=77, head_dim=24, tie_word_embeddings=True,
                                                   rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
}


def strobe(*arguments):
    return subprocess.run([STROBE, "checkpoint", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def export(source, out):
    result = strobe("export", source, out)
    assert result.returncode == 0, result.stderr
    return out


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_theirs_through_strobe_is_unchanged(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(loaded, model)
    ids = torch.arange(16)[None] % 70
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_in_several_files(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    export(tmp_path / "theirs", tmp_path / "ours")
    assert_same_weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    assert_same_weights(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32), model.to(torch.float32))


def test_safetensors_package_reads_ours_and_metadata(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    theirs = safetensors_torch.load_file(tmp_path / "theirs" / "model.safetensors")
    ours = safetensors_torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    from safetensors import safe_open
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_show_tells_what_is_in_it(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    report = json.loads(strobe("show", tmp_path / "theirs", "--json").stdout)
    assert report["architecture"] == model.config.model_type
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["resumable"] is False


def test_what_the_package_refuses_is_refused(model, tmp_path):
    """Every damaged header that the safetensors package refuses, strobe refuses too, with the file's name."""
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    good = file.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size:]

    damaged = {
        "truncated": good[:-1],
        "no header": good[:4],
        "huge header": b"\xff" * 8 + good[8:],
        "trailing bytes": good + b"\0\0\0\0",
        "unknown dtype": with_header(lambda h: h[first].update(dtype="F31")),
        "wrong shape": with_header(lambda h: h[first].update(shape=[1, *h[first]["shape"], 2])),
        "overlap": with_header(lambda h: h[second].update(data_offsets=h[first]["data_offsets"], shape=h[first]["shape"])),
        "backwards": with_header(lambda h: h[first].update(data_offsets=h[first]["data_offsets"][::-1])),
    }
    for name, data in damaged.items():
        file.write_bytes(data)
        with pytest.raises(Exception):
            safetensors_torch.load_file(file)
        result = strobe("show", tmp_path / "theirs")
        assert result.returncode != 0, name
        assert str(file) in result.stderr, (name, result.stderr)
