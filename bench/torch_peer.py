"""PyTorch's scaled_dot_product_attention as a peer of `strobe bench`: one JSON request per line in, one answer per line out.

load     {"op": "load", "path", "dtype", "batch", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "head_dim", "causal",
          "threads"}: maps q, k, v, dout, each (batch, seqlen, heads, head_dim) and dense, one behind another in the file.
forward  times one forward; backward: times the backward of a forward that ran before. Answer: {"seconds": s}.
"""

import json
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Peer:
    def load(self, r):
        torch.set_num_threads(r["threads"])
        dtype = DTYPES[r["dtype"]]
        shapes = [(r["batch"], r[s], r[h], r["head_dim"]) for s, h in (
            ("seqlen_q", "num_heads"), ("seqlen_k", "num_heads_k"), ("seqlen_k", "num_heads_k"), ("seqlen_q", "num_heads"))]
        total = sum(torch.Size(s).numel() for s in shapes)
        flat = torch.from_file(r["path"], shared=False, size=total, dtype=dtype)
        tensors, at = [], 0
        for shape in shapes:
            size = torch.Size(shape).numel()
            tensors.append(flat[at:at + size].view(shape).transpose(1, 2))
            at += size
        *qkv, self.dout = tensors
        self.qkv = [t.detach().requires_grad_() for t in qkv]
        self.options = {"is_causal": r["causal"], "enable_gqa": r["num_heads"] != r["num_heads_k"]}
        self.out = None
        return {"torch": torch.__version__}

    def attend(self):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*self.qkv, **self.options)

    def forward(self, _):
        with torch.no_grad():
            start = time.perf_counter()
            self.attend()
            return {"seconds": time.perf_counter() - start}

    def backward(self, _):
        if self.out is None:
            self.out = self.attend()
        start = time.perf_counter()
        torch.autograd.grad(self.out, self.qkv, self.dout, retain_graph=True)
        return {"seconds": time.perf_counter() - start}


def main():
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request["op"])(request)), flush=True)


if __name__ == "__main__":
    main()
