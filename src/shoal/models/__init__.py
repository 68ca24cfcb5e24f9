"""Models: which architecture, which tokenizer, and the files they come from and go to.

    config       an architecture as JSON, as `transformers` writes it; `preset_config` knows a few by name
    build_model  config -> module with causal-LM logits
    Checkpoint   a directory with config.json and safetensors weights, read and written the way `transformers` does
    TextTokenizer  text <-> token ids: bytes, or a tokenizer file

Invariants. Weights are read from safetensors only: a pickle is refused by name, unread. A config is data: nothing in
it makes code run (`auto_map` is refused). Tied weights are one tensor with one name. `tokenizers` needs no torch; the
rest does.
"""
