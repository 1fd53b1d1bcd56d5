"""Fused operations: one file each, with a PyTorch reference beside every kernel.

Conventions that the GPU kernels share
--------------------------------------
* **KV cache**: per layer one contiguous tensor ``kv[2, num_blocks, kv_heads, tokens_per_block, head_size]``, fp16 or
  e4m3 without a scale; ``kv[0]`` holds rotated keys, ``kv[1]`` values. Position ``p`` of the sequence in ``slot``
  lives in block ``block_tables[slot, p // tokens_per_block]`` at row ``p % tokens_per_block``. Block 0 is scratch:
  padding rows write there and no sequence owns it.
* **Slot state** (device tensors, one row a slot): ``last_token`` int32 ``[slots]``, ``position`` int32 ``[slots]``
  (where that token will stand: its KV is not yet in the cache), ``block_tables`` int32
  ``[slots, max_blocks_per_sequence]``. ``slots = max_batch_size + 1``; the last row is the dummy slot of padding rows:
  token 0 at position 0 of block 0.
* **RoPE** rotates halves (dimensions ``d`` and ``d + head_size / 2``), from float32 tables ``cos, sin
  [max_seq_len, head_size / 2]`` (:func:`llama_engine.model.rope.rope_tables`).
* **Activations** between operations are fp16 in the residual stream, and so is the input of a 16-bit matrix. The input
  row of an FP8 matrix is e4m3 with one float32 scale (:func:`llama_engine.model.schemes.quantize_e4m3`); that of an
  INT8 one is quantized to ``a = 256 * hi + lo`` with signed 8-bit digits, ``|a| <= 32512``, and one float32 scale
  ``amax / 32512`` a row (rounded half away from zero), so
  ``y = (256 * (hi . W) + lo . W) * row_scale * weight_scale``, the sums exact.
"""
